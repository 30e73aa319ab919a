"""From the name of a model to a function that paints a chunk of images, with model calls counted at the denoiser."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
import torch

from . import models
from . import schedulers as ours
from .compare import denoiser
from .errors import OptionError, RunError, no_leftover, one_of
from .parallel.generate import Painted, Task
from .samplers.registry import samplers

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SAMPLE = 64  # values of each tensor that the hash of a checkpoint reads


# ---------------------------------------------------------------------- model
def load(model: str, dtype: str = "float32") -> Any:
    """The pipeline of an embedded model, a folder or a hub id, on the CPU, without bars.

    Raises:
        OptionError: no such model or dtype; the message says what diffusers said.
    """
    wanted = DTYPES[one_of("dtype", dtype, DTYPES)]
    from diffusers.pipelines import pipeline_utils

    option = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"
    try:
        if model in models.names():
            pipe = models.load(model, torch_dtype=wanted)
        else:
            pipe = diffusers.DiffusionPipeline.from_pretrained(model, **{option: wanted})
    except (OSError, ValueError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OptionError(
            f"cannot load the model {model!r}: {said} (a model is {', '.join(models.names())}, a folder saved by "
            "diffusers, or a hub id)"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fingerprint(pipe: Any) -> str:
    """Hash of a pipeline's weights: names, shapes, dtypes and evenly spread values of every tensor."""
    found = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if not isinstance(part, torch.nn.Module):
            continue
        for key, value in sorted(part.state_dict().items()):
            found.update(f"{name}.{key} {tuple(value.shape)} {value.dtype}".encode())
            flat = value.detach().flatten()
            few = flat[:: max(1, flat.numel() // SAMPLE)]
            found.update(few.to("cpu", torch.float64).numpy().tobytes())
    return found.hexdigest()


# ---------------------------------------------------------------------- scheduler
def scheduler_for(config: Mapping[str, Any], own: type, name: str | None, options: Mapping[str, Any]) -> Any:
    """A scheduler for the model that `config` belongs to.

    Args:
        config: of the checkpoint's scheduler.
        own: its class, taken where `name` is None.
        name: a registered sampler, a scheduler class of diffaccel, or one of diffusers.
        options: of the sampler or the class.

    Raises:
        OptionError: an unknown name or option.
    """
    kind: Any = own if name is None else _scheduler_class(name)
    if issubclass(kind, ours.TableScheduler):
        chosen = {"sampler": name} if name in samplers() else {}
        # a NaN is counted image by image; an error would end the whole run
        return kind.from_config(config, **{"check_finite": "never", **chosen, **options})
    no_leftover(kind.__name__, options, kind._get_init_keys(kind) - {"self"})
    return kind.from_config(config, **options)


def _scheduler_class(name: str) -> Any:
    if name in samplers():
        return ours.TableScheduler
    mine = [n for n in ours.__all__ if n.endswith("Scheduler")]
    stock = [n for n in dir(diffusers) if n.endswith("Scheduler") and "Flax" not in n]
    one_of("scheduler", name, {*samplers(), *mine, *stock})
    return getattr(ours if name in mine else diffusers, name)


def steps_for(scheduler: Any, calls: int) -> int:
    """The `num_inference_steps` with which a scheduler makes `calls` model calls (PNDM and Heun make more than steps).

    Raises:
        OptionError: there is none.
    """
    lengths = {}
    for steps in dict.fromkeys([calls, calls - 1, calls + 1, (calls + 1) // 2, calls // 2]):
        trial = copy.deepcopy(scheduler)
        if steps < 1:
            continue
        try:
            trial.set_timesteps(steps)
        except Exception:
            # Needs what only its pipeline knows (mu): the count of the first chunk decides. A scheduler that cannot
            # do this number at all says so there, in its own words.
            return calls
        lengths[steps] = len(trial.timesteps)
        if lengths[steps] == calls:
            return steps
    nearest = ", ".join(f"{made} ({steps} steps)" for steps, made in sorted(lengths.items()))
    raise OptionError(
        f"{type(scheduler).__name__} cannot spend exactly {calls} model calls; nearby it can make {nearest}"
    )


def scheduler_name(scheduler: Any) -> str:
    """Class (and sampler) of a scheduler with a hash of its config, for the lines of a manifest."""
    settings = plain_config(scheduler)
    text = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    sampler = settings.get("sampler")
    return f"{type(scheduler).__name__}{f'({sampler})' if sampler else ''}-{text}"


def plain_config(scheduler: Any) -> dict[str, Any]:
    """A scheduler's config as JSON, without the notes that diffusers keeps in it."""
    kept = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
    return json.loads(json.dumps(kept, sort_keys=True, default=_as_list))


def _as_list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


# ---------------------------------------------------------------------- painting
class Painter:
    """Paints chunks with one pipeline; every image gets exactly `calls` model calls, or it is an error.

    Args:
        pipe: text-to-image, or class-conditional (the prompts are then class numbers).
        calls: model calls an image; a pair for classifier-free guidance counts once.
        options: further arguments of the pipeline's call (guidance_scale, height, ...).
        on_call: called before each pass of the denoiser.

    Raises:
        OptionError: an option that this pipeline does not take, or a scheduler that cannot spend these calls.
    """

    def __init__(
        self, pipe: Any, calls: int, options: Mapping[str, Any], on_call: Callable[[], None] = lambda: None
    ) -> None:
        if calls < 1:
            raise OptionError(f"an image needs 1 model call or more, got {calls}")
        self.pipe, self.calls, self.options, self._on_call = pipe, calls, dict(options), on_call
        taken = inspect.signature(pipe.__call__).parameters
        kind = type(pipe).__name__
        self._prompt = next((k for k in ("prompt", "class_labels") if k in taken), "")
        if not self._prompt:
            raise OptionError(f"{kind} takes neither prompts nor class labels: generate cannot drive it")
        fixed = {self._prompt, "generator", "num_inference_steps", "output_type"}
        no_leftover(kind, self.options, set(taken) - fixed - {"latents", "return_dict"})
        needed = [k for k, p in taken.items() if p.default is p.empty and k not in {*fixed, *options}]
        needed = [k for k in needed if taken[k].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        if needed:
            raise OptionError(f"{kind} needs {', '.join(needed)}, which generate does not make")
        self.steps = steps_for(pipe.scheduler, calls)

    def __call__(self, tasks: Sequence[Task]) -> Painted:
        """The images of these tasks, each from its own generator."""
        prompts = [t.prompt if self._prompt == "prompt" else _label(t.prompt) for t in tasks]
        with _Passes(denoiser(self.pipe), self._on_call) as passes, torch.no_grad():
            found = self.pipe(
                **{self._prompt: prompts},
                **self.options,
                generator=[t.generator() for t in tasks],
                num_inference_steps=self.steps,
                output_type="np",
            )
        if passes.calls != self.calls:
            raise RunError(
                f"{type(self.pipe.scheduler).__name__} was asked for {self.calls} model calls an image and made "
                f"{passes.calls}; choose another --calls or --scheduler"
            )
        if not hasattr(found, "images"):
            raise OptionError(f"{type(self.pipe).__name__} makes {', '.join(found)}, not images")
        return Painted(found.images, passes.calls)


def _label(text: str) -> int:
    if not text.isdecimal():
        raise OptionError(f"this model is told class numbers: a prompt must be a number, got {text!r}")
    return int(text)


class _Passes:
    """Counts model calls: passes of the denoiser, but two in a row on the same state (guidance done in two passes)."""

    def __init__(self, network: torch.nn.Module, on_call: Callable[[], None]) -> None:
        self.calls = 0
        self._network, self._on_call = network, on_call
        self._last: torch.Tensor | None = None

    def __enter__(self) -> _Passes:
        self._handle = self._network.register_forward_pre_hook(self._hook, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        self._last = None

    def _hook(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._on_call()
        given = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        state = given if isinstance(given, torch.Tensor) else None
        before = self._last
        twin = state is not None and before is not None and state.shape == before.shape and torch.equal(state, before)
        self.calls += not twin
        self._last = None if twin else state
