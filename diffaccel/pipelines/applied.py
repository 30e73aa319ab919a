"""Ways to run a pipeline, by name: what a recipe's choice becomes when it is applied."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..calibrate.captured import model_config
from ..denoiser.cache import Cache
from ..denoiser.contract import PREFIX, Uncopied, attach, detach, outermost
from ..drive import denoiser
from ..errors import ArtifactError, ArtifactWarning, RunError, one_of
from ..schedulers import TableScheduler
from .bottleneck import bottleneck
from .handle import Handle, refuse_wrapped
from .quant_cache import quant_cache
from .recipe import Choice

Builder = Callable[[Any, Choice], Any]
BUILDERS: dict[str, Builder] = {}
STATES = ("sample", "hidden_states")


def builder(kind: str) -> Callable[[Builder], Builder]:
    """Register `build(pipe, choice)`, which applies choices of a kind and returns their handle."""

    def register(build: Builder) -> Builder:
        BUILDERS[kind] = build
        return build

    return register


def applied(pipe: Any, choice: Choice) -> Any:
    """The pipeline with a choice applied, without any check that it was found on this checkpoint.

    Returns:
        a handle: a context manager with `remove()` and `report()`, callable in place of the pipeline.

    Raises:
        OptionError: an unknown kind, or what that kind refuses.
    """
    return BUILDERS[one_of("kind of choice", choice.kind, BUILDERS)](pipe, choice)


# ---------------------------------------------------------------------- schedulers
class Guard(Uncopied):
    """Sees to it, before the first model call of a run, that the run is the recipe's."""

    def __init__(self, scheduler: TableScheduler, choice: Choice) -> None:
        super().__init__()
        self.scheduler, self.choice = scheduler, choice
        self.where = choice.name
        self.shape: tuple[int, ...] | None = None  # that the recipe was tuned at
        self._seen: Any = None
        self._warned = False

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        timesteps = self.scheduler.timesteps
        if timesteps is not self._seen:
            self._check(args[0] if args else next((kwargs[n] for n in STATES if n in kwargs), None))
            self._seen = timesteps
        return args, kwargs

    def _check(self, state: Any) -> None:
        calls, made = self.scheduler.num_inference_steps, self.choice.calls
        if calls is not None and calls != made:
            raise ArtifactError(
                f"{self.where} is a recipe for {made} model calls, and this run has {calls}. Pass num_inference_steps="
                f"{made}, or tune again with --calls {calls}"
            )
        if self.shape is not None and isinstance(state, torch.Tensor):
            self._check_shape(tuple(state.shape[1:]), self.shape)

    def _check_shape(self, here: tuple[int, ...], made: tuple[int, ...]) -> None:
        axis = 0 if len(made) > 2 else -1  # of channels: (C, H, W), (C, F, H, W), or tokens (L, C)
        if len(here) != len(made) or here[axis] != made[axis]:
            raise ArtifactError(
                f"{self.where} was tuned on states of shape {made}, this run's are {here}: other channels or another "
                "packing, so it belongs to another kind of model. Tune again."
            )
        if here != made and not self._warned:
            self._warned = True
            text = f"{self.where} was tuned on states of shape {made}, this run's are {here}"
            warnings.warn(f"{text}: what its receipt says was measured there", ArtifactWarning, stacklevel=2)


class Scheduled(Handle):
    """A pipeline with another scheduler."""

    def __init__(self, pipe: Any, scheduler: TableScheduler, choice: Choice) -> None:
        self.guard = Guard(scheduler, choice)
        super().__init__(pipe, "accelerate", scheduler, {denoiser(pipe): self.guard})

    def report(self) -> int | None:
        """Steps that this thread's last run has made; None before it."""
        return self._scheduler.step_index if self._scheduler.num_inference_steps is not None else None


def scheduler_of(pipe: Any, choice: Choice, settings: Mapping[str, Any]) -> TableScheduler:
    """The scheduler that these settings name, for the model of this pipeline."""
    given = dict(settings) | ({} if choice.artifact is None else {"artifact": choice.artifact})
    found: TableScheduler = TableScheduler.from_config(model_config(pipe.scheduler.config), **given)
    return found


@builder("scheduler")
def _scheduled(pipe: Any, choice: Choice) -> Scheduled:
    refuse_wrapped(pipe)
    return Scheduled(pipe, scheduler_of(pipe, choice, choice.settings), choice)


@builder("bottleneck")
def _staged(pipe: Any, choice: Choice) -> Any:
    return bottleneck(pipe, **choice.settings)


# ---------------------------------------------------------------------- a scheduler and a cache
class Cached:
    """A pipeline with another scheduler and a cache in its denoiser; settings `scheduler` and `cache`."""

    def __init__(self, pipe: Any, choice: Choice) -> None:
        refuse_wrapped(pipe)
        self.pipe, self._original = pipe, pipe.scheduler
        self._scheduler = scheduler_of(pipe, choice, choice.settings["scheduler"])
        self.guard = Guard(self._scheduler, choice)
        pipe.scheduler = self._scheduler
        try:
            self._inner: Any = quant_cache(pipe, cache=Cache.from_dict(dict(choice.settings["cache"])))
        except BaseException:
            pipe.scheduler = self._original
            raise
        self._on = True
        attach(denoiser(pipe), self.guard, PREFIX + "accelerate")  # above the cache: before anything is reused

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`pipe(...)`."""
        return self.pipe(*args, **kwargs)

    def report(self) -> Any:
        """What the cache measured in this thread's last run."""
        return self._inner.report()

    def remove(self) -> None:
        """Undo both; twice is fine.

        Raises:
            RunError: if somebody put another scheduler or a hook in place meanwhile; nothing is undone then.
        """
        if not self._on:
            return
        if self.pipe.scheduler is not self._scheduler:
            raise RunError(
                f"accelerate: pipe.scheduler was replaced by a {type(self.pipe.scheduler).__name__} while the recipe "
                "was on; put the recipe's scheduler back, or remove the recipe before changing the scheduler"
            )
        if not outermost(denoiser(self.pipe), PREFIX + "accelerate"):
            raise RunError("accelerate: another hook lies above this recipe's; remove that one first")
        detach(denoiser(self.pipe), PREFIX + "accelerate")
        self._inner.remove()
        self.pipe.scheduler, self._on = self._original, False

    def __enter__(self) -> Cached:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


@builder("cached")
def _cached(pipe: Any, choice: Choice) -> Cached:
    return Cached(pipe, choice)
