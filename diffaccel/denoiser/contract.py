"""What every hook on a denoiser stands on: arguments, branches, clock, run identity, state of each thread.

    class MyHook(DenoiserHook):
        def answer(self, call):                  # in place of every call of the model
            store = call.run.store               # this run's own dict, of this thread and this denoiser
            if call.opens: ...                   # the first call of step call.step; decide here, for all branches
            return call.forward()                # the real call

    attach(pipe.unet, MyHook(Clock(lambda: pipe.scheduler)), "diffaccel.my_hook")

Nothing of a run survives it, so a run that ended in an exception needs no cleaning up: the next one is told by the
scheduler's new `timesteps`. Nothing here reads a value from the device, except where `Clock` has no other way.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager

from ..errors import OptionError, RunError
from .clock import Clock, Run

PREFIX = "diffaccel."  # of the names of our hooks
DENOISERS = ("unet", "transformer", "transformer_2", "prior")
SAMPLES = ("sample", "hidden_states")
TIME = "timestep"
_MARKED: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()


def denoisers(pipe: Any) -> dict[str, torch.nn.Module]:
    """The modules of a pipeline whose calls are model calls, by name.

    Raises:
        OptionError: if it has none.
    """
    found = {name: getattr(pipe, name, None) for name in DENOISERS}
    modules = {name: module for name, module in found.items() if isinstance(module, torch.nn.Module)}
    if not modules:
        raise OptionError(f"{type(pipe).__name__} has no denoiser; looked for {', '.join(DENOISERS)}")
    return modules


# ---------------------------------------------------------------------- arguments and outputs
class Arguments:
    """The arguments of a module's `forward`, by name."""

    def __init__(self, module: torch.nn.Module) -> None:
        parameters = inspect.signature(type(module).forward).parameters.values()
        self.names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][1:]

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """All arguments of a call by name."""
        return {**dict(zip(self.names, args, strict=False)), **kwargs}


class Signature(Arguments):
    """The arguments of a denoiser's `forward`, by name.

    Raises:
        OptionError: if it takes no single tensor of state (`sample` or `hidden_states`) or no `timestep`.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        inner = getattr(module, "_orig_mod", module)  # under torch.compile
        super().__init__(inner)
        samples = [name for name in SAMPLES if name in self.names]
        if not samples or TIME not in self.names:
            raise OptionError(
                f"{type(inner).__name__}.forward({', '.join(self.names)}) has no {' or '.join(SAMPLES)} and {TIME}; "
                "hooks know UNets and transformers that take one tensor of state"
            )
        self.sample = samples[0]


def unpacked(output: Any) -> torch.Tensor:
    """The tensor in what a denoiser returned: a tensor, a tuple of one, or an output class with `sample` alone.

    Raises:
        OptionError: if there is more in it.
    """
    if isinstance(output, torch.Tensor):
        return output
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    if not isinstance(values, tuple) or len(values) != 1 or not isinstance(values[0], torch.Tensor):
        raise OptionError(
            f"the denoiser returns a {type(output).__name__} of more than one tensor; no hook knows those"
        )
    return values[0]


def form_of(output: Any) -> Callable[[torch.Tensor], Any]:
    """What puts a tensor into the form of this output (see `unpacked`), without keeping the output."""
    if isinstance(output, torch.Tensor):
        return _plain
    kind = type(output)
    return (lambda value: kind(sample=value)) if hasattr(output, "to_tuple") else _tupled


def _plain(value: torch.Tensor) -> torch.Tensor:
    return value


def _tupled(value: torch.Tensor) -> tuple[torch.Tensor]:
    return (value,)


@dataclass(slots=True)
class Call:
    """One call of a denoiser.

    Attributes:
        run: the run that it belongs to.
        step: 0..run.steps - 1.
        branch: the pipeline's name for it ("cond", "uncond"), else its place in the step ("0", "1").
        named: whether the pipeline gave the name.
        opens: whether it is the first call of its step.
        sample: the state that the model is fed, (rows, ...).
        arguments: all arguments by name.
    """

    run: Run
    step: int
    branch: str
    named: bool
    opens: bool
    sample: torch.Tensor
    arguments: dict[str, Any]
    _args: tuple[Any, ...]
    _kwargs: dict[str, Any]
    _model: Callable[..., Any]

    def forward(self, changes: dict[str, Any] | None = None) -> Any:
        """The real call, with some arguments replaced; returns what the model returns."""
        if changes is None:
            return self._model(*self._args, **self._kwargs)
        return self._model(**{**self.arguments, **changes})


# ---------------------------------------------------------------------- the hook
class ThreadContext(StateManager):
    """The cache context that a pipeline states (`with transformer.cache_context("cond")`), for each thread its own."""

    def __init__(self) -> None:
        self._local = threading.local()

    def set_context(self, context: Any) -> None:
        self._local.context = context

    def current(self) -> Any:
        """The context, or None outside of one."""
        return getattr(self._local, "context", None)

    def reset(self, *args: Any, **kwargs: Any) -> None:
        self._local.context = None


class Uncopied(ModelHook):
    """Base of hooks that refuse to be copied with their model."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise OptionError(
            "a wrapped denoiser was copied; the copy would run the weights of the original. Take the wrapper off first "
            "(remove()), copy, and wrap the copy"
        )


class DenoiserHook(Uncopied):
    """Base of hooks on a denoiser: understands each call and hands it to `answer`."""

    _is_stateful = True

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.context = ThreadContext()  # diffusers finds it by its type
        self._local = threading.local()

    def answer(self, call: Call) -> Any:
        """What is returned in place of the model's output; `call.forward()` is the model."""
        raise NotImplementedError

    # ------------------------------------------------------------------ what diffusers calls
    def initialize_hook(self, module: torch.nn.Module) -> torch.nn.Module:
        self.signature = Signature(module)
        return module

    @torch.compiler.disable
    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.answer(self._understood(args, kwargs))

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        self._local.run = None
        self.context.reset()
        return module

    # ------------------------------------------------------------------ one call
    def _understood(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        arguments = self.signature.bind(args, kwargs)
        context = self.context.current()
        stated = getattr(context, "step_index", None)
        old: Run | None = getattr(self._local, "run", None)
        run = self.clock.read(old, arguments.get(TIME), stated, threading.get_ident())
        self._local.run = run
        opens = not run.branches
        # before diffusers 0.41 a context is its name
        branch = str(len(run.branches)) if context is None else getattr(context, "name", context)
        if context is not None and branch in run.branches:
            raise RunError(
                f"the pipeline calls the model twice as {branch!r} in step {run.step}; a hook cannot tell the two apart"
            )
        run.branches.append(branch)
        sample = arguments[self.signature.sample]
        if not isinstance(sample, torch.Tensor):
            raise OptionError(f"the model's {self.signature.sample} is a {type(sample).__name__}, not one tensor")
        model = self.fn_ref.original_forward
        return Call(run, run.step, branch, context is not None, opens, sample, arguments, args, kwargs, model)


# ---------------------------------------------------------------------- hooks on and off
def hooks_of(module: torch.nn.Module) -> Iterator[tuple[str, ModelHook]]:
    """Name and hook of every hook of diffusers on a module and inside it, ours included."""
    for part in module.modules():
        registry = getattr(part, "_diffusers_hook", None)
        if registry is not None:
            yield from registry.hooks.items()


def mark(module: torch.nn.Module, name: str) -> None:
    """Say that a module is wrapped where no hook says it, until `unmark`; copies of it are not."""
    _MARKED[module] = name


def unmark(module: torch.nn.Module) -> None:
    """Take the mark back; twice is fine."""
    _MARKED.pop(module, None)


def refuse_wrapped(module: torch.nn.Module) -> None:
    """Raise `OptionError` if one of our wrappers is on a denoiser: two answers for one call do not compose."""
    marks = [_MARKED[module]] if module in _MARKED else []
    for name in (*(name for name, _ in hooks_of(module)), *marks):
        if name.startswith(PREFIX):
            raise OptionError(
                f"this pipeline is wrapped by {name.removeprefix(PREFIX)!r} already; call .remove() on that handle "
                "first: two wrappers of one pipeline do not compose"
            )


def attach(module: torch.nn.Module, hook: ModelHook, name: str) -> None:
    """Register a hook as the outermost one of a module.

    Raises:
        OptionError: if the module has a hook of that name, or was compiled in place.
    """
    if getattr(module, "_compiled_call_impl", None) is not None:
        raise OptionError(
            "this denoiser was compiled in place (module.compile()), which goes past hooks; set "
            "pipe.unet = torch.compile(pipe.unet), or pipe.transformer, instead"
        )
    registry = HookRegistry.check_if_exists_or_initialize(module)
    if registry.get_hook(name) is not None:
        raise OptionError(f"this denoiser has the hook {name!r} already; remove() the other handle first")
    registry.register_hook(hook, name)
    hook.entrance = module.forward


def detach(module: torch.nn.Module, name: str) -> None:
    """Remove a hook; a module without others is then what it was. What was put around it stays."""
    registry = getattr(module, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook(name)
    if registry is None or hook is None:
        return
    around = module.forward if module.__dict__.get("_old_forward") is hook.entrance else None
    registry.remove_hook(name, recurse=False)
    if around is not None:  # accelerate's, which calls `_old_forward`
        module.__dict__.update(_old_forward=module.forward, forward=around)
        return
    if not registry.hooks and getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
        del module.__dict__["forward"]
        del module._diffusers_hook


def outermost(module: torch.nn.Module, name: str) -> bool:
    """Whether the hook `name` is called before everything else that was put around the module."""
    registry = getattr(module, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook(name)
    if registry is None or hook is None or registry._hook_order[-1] != name:
        return False
    # accelerate keeps what it replaced in `_old_forward`
    return getattr(module, "_old_forward", None) is None or module.forward is getattr(hook, "entrance", None)
