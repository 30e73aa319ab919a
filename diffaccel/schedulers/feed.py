"""A hook that feeds the denoiser a timestep of its own for each image, as policies ask."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ..errors import OptionError, RunError

_FED: weakref.WeakSet[Any] = weakref.WeakSet()  # schedulers whose denoiser has the hook


def is_fed(scheduler: Any) -> bool:
    """Whether a hook feeds what this scheduler's policy asks for."""
    return scheduler in _FED


class feed_timesteps:
    """While active, the denoiser is fed the timesteps that the pipeline's scheduler asks for, one for each image.

    For `time_shift(mode="timestep")`: `with diffaccel.feed_timesteps(pipe): pipe(...)`. In batches of several
    conditions (classifier-free guidance) the images' timesteps are repeated.

    Args:
        pipe: a pipeline with a `unet` or `transformer`, and a `TableScheduler`.
    """

    def __init__(self, pipe: Any) -> None:
        denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        if denoiser is None or not hasattr(pipe.scheduler, "fed_timesteps"):
            raise OptionError(
                f"feed_timesteps needs a pipeline with a unet or transformer and a TableScheduler, got "
                f"{type(pipe).__name__} with {type(getattr(pipe, 'scheduler', None)).__name__}"
            )
        if is_fed(pipe.scheduler):
            raise OptionError("feed_timesteps: this pipeline's scheduler is fed already")
        self.scheduler = pipe.scheduler
        self._hook = denoiser.register_forward_pre_hook(self._before, with_kwargs=True)
        _FED.add(self.scheduler)

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wanted = self.scheduler.fed_timesteps
        if wanted is None:
            return None
        batch = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.ndim > 1)
        if len(batch) % len(wanted):
            raise RunError(f"feed_timesteps: the denoiser got a batch of {len(batch)} for {len(wanted)} images")
        fed = wanted.to(batch.device).repeat(len(batch) // len(wanted))
        if "timestep" in kwargs:
            return args, {**kwargs, "timestep": fed}
        return (args[0], fed, *args[2:]), kwargs

    def remove(self) -> None:
        """Take the hook away; the pipeline is as it was."""
        self._hook.remove()
        _FED.discard(self.scheduler)

    def __enter__(self) -> feed_timesteps:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()
