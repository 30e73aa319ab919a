"""What a wrapper of a pipeline returns: another scheduler and a hook on the denoiser, and the way back."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks import ModelHook

from ..denoiser import contract
from ..denoiser.contract import PREFIX, attach, detach, hooks_of
from ..errors import OptionError, RunError

DENOISERS = ("unet", "transformer", "transformer_2")


class Handle:
    """A wrapped pipeline: a context manager, and callable in place of the pipeline.

    Args:
        pipe: the pipeline; its scheduler is replaced and its denoisers are hooked until `remove()`.
        name: of the wrapper, for messages and hooks.
        scheduler: takes the place of `pipe.scheduler`.
        hooks: one for each module.

    Raises:
        OptionError: if the pipeline is wrapped already.
    """

    def __init__(self, pipe: Any, name: str, scheduler: Any, hooks: dict[torch.nn.Module, ModelHook]) -> None:
        self.pipe, self.name = pipe, name
        self._original, self._scheduler, self._hooks = pipe.scheduler, scheduler, hooks
        refuse_wrapped(pipe)
        for module, hook in hooks.items():
            attach(module, hook, PREFIX + name)
        pipe.scheduler = scheduler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`pipe(...)`, with what the wrapper adds."""
        return self.pipe(*args, **kwargs)

    def report(self) -> Any:
        """What was measured in this thread's last run."""
        raise NotImplementedError

    def remove(self) -> None:
        """Give the pipeline its own scheduler back and take the hooks off. Removing twice is fine.

        Raises:
            RunError: if somebody else put a hook above ours, or another scheduler in place.
        """
        if not self._hooks and self._original is None:
            return
        if self.pipe.scheduler is not self._scheduler:
            raise RunError(
                f"{self.name}: pipe.scheduler was replaced by a {type(self.pipe.scheduler).__name__} while the wrapper "
                "was on; put the wrapper's scheduler back, or remove the wrapper before changing the scheduler"
            )
        for module in self._hooks:
            order: Any = module._diffusers_hook._hook_order  # type: ignore[union-attr]
            if order[-1] != PREFIX + self.name:
                raise RunError(f"{self.name}: the hook {order[-1]!r} lies above this wrapper's; remove that one first")
        for module in self._hooks:
            detach(module, PREFIX + self.name)
        self.pipe.scheduler = self._original
        self._hooks, self._original = {}, None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


def denoisers(pipe: Any) -> dict[str, torch.nn.Module]:
    """The modules that are called once or more a step, by their name in the pipeline."""
    found = {name: getattr(pipe, name, None) for name in DENOISERS}
    # Not by truth: a compiled module has a length.
    return {name: module for name, module in found.items() if module is not None}


def refuse_wrapped(pipe: Any) -> None:
    """Raise `OptionError` if one of our wrappers is on the pipeline."""
    for module in denoisers(pipe).values():
        contract.refuse_wrapped(module)


def refuse_stateful(pipe: Any, name: str, why: str) -> None:
    """Raise `OptionError` if a hook that remembers earlier calls (a cache) is on the pipeline's denoiser."""
    for part, module in denoisers(pipe).items():
        for hook_name, hook in hooks_of(module):
            if hook._is_stateful:
                raise OptionError(
                    f"{name}: the hook {hook_name!r} on pipe.{part} remembers earlier calls; {why}. Take it off first "
                    f"(pipe.{part}.disable_cache())"
                )
