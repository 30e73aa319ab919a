"""`accelerate(pipe, recipe)`: run a pipeline as a recipe of `diffaccel tune` says, and undo it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.hooks import ModelHook

from ..artifact import Artifact, Receipt, check_path
from ..calibrate.captured import model_config
from ..drive import denoiser
from ..errors import ArtifactError, ArtifactWarning, OptionError, RunError, one_of
from ..identity import check_guidance, check_model
from ..schedulers import TableScheduler
from ..schedulers.from_config import read
from .bottleneck import bottleneck
from .handle import Handle, refuse_wrapped
from .recipe import Choice, Recipe

Builder = Callable[[Any, Choice], Handle]
BUILDERS: dict[str, Builder] = {}
STATES = ("sample", "hidden_states")


def builder(kind: str) -> Callable[[Builder], Builder]:
    """Register `build(pipe, choice)`, which applies choices of a kind and returns their handle."""

    def register(build: Builder) -> Builder:
        BUILDERS[kind] = build
        return build

    return register


def applied(pipe: Any, choice: Choice) -> Handle:
    """The pipeline with a choice applied, without any check that it was found on this checkpoint.

    Raises:
        OptionError: an unknown kind, or what that kind refuses.
    """
    return BUILDERS[one_of("kind of choice", choice.kind, BUILDERS)](pipe, choice)


# ---------------------------------------------------------------------- schedulers
class _Guard(ModelHook):
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
        self.guard = _Guard(scheduler, choice)
        super().__init__(pipe, "accelerate", scheduler, {denoiser(pipe): self.guard})

    def report(self) -> int | None:
        """Steps that this thread's last run has made; None before it."""
        return self._scheduler.step_index if self._scheduler.num_inference_steps is not None else None


@builder("scheduler")
def _scheduled(pipe: Any, choice: Choice) -> Handle:
    refuse_wrapped(pipe)
    given = dict(choice.settings) | ({} if choice.artifact is None else {"artifact": choice.artifact})
    return Scheduled(pipe, TableScheduler.from_config(model_config(pipe.scheduler.config), **given), choice)


@builder("bottleneck")
def _staged(pipe: Any, choice: Choice) -> Handle:
    return bottleneck(pipe, **choice.settings)


# ---------------------------------------------------------------------- recipes
@dataclass(frozen=True)
class AccelerateReport:
    """What ran, beside what was measured when it was tuned.

    Args:
        name: of the recipe's choice.
        calls: model calls an image that the recipe makes.
        last: what the part that was applied says of this thread's last run; None before the first.
        receipt: of the tuning.
    """

    name: str
    calls: int
    last: Any
    receipt: Receipt

    def __str__(self) -> str:
        last = "no run yet" if self.last is None else f"last run: {self.last}"
        return f"{self.name}, {self.calls} model calls an image; {last}\nwhen it was tuned: {self.receipt['verdict']}"


class Accelerated:
    """Handle of `accelerate`: callable in place of the pipeline, a context manager, and the way back."""

    def __init__(self, inner: Handle, recipe: Recipe) -> None:
        self.inner, self.recipe, self.pipe = inner, recipe, inner.pipe
        self._removed = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`pipe(...)` with the recipe's number of calls; arguments as of the pipeline.

        Raises:
            RunError: if the recipe was taken off.
            ArtifactError: another `num_inference_steps` than the recipe's.
        """
        if self._removed:
            raise RunError(f"{self.recipe.file} was taken off this pipeline; call accelerate() again")
        asked, calls = kwargs.setdefault("num_inference_steps", self.recipe.choice.calls), self.recipe.choice.calls
        if asked != calls:
            raise ArtifactError(
                f"{self.recipe.file} is a recipe for {calls} model calls, not {asked}; leave num_inference_steps "
                f"out, or tune again with --calls {asked}"
            )
        if isinstance(kwargs.get("guidance_scale"), (int, float)):
            check_guidance(self.recipe.as_artifact(), kwargs["guidance_scale"])
        return self.inner(*args, **kwargs)

    def report(self) -> AccelerateReport:
        """What ran, beside the receipt of the tuning."""
        try:
            last = self.inner.report()
        except RunError:  # no run yet
            last = None
        return AccelerateReport(self.recipe.choice.name, self.recipe.choice.calls, last, self.recipe.receipt)

    def remove(self) -> None:
        """Give the pipeline its own scheduler (the same object) back, and take hooks off. Twice is fine.

        Raises:
            RunError: if somebody put another scheduler or a hook in place meanwhile.
        """
        self.inner.remove()
        self._removed = True

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()


def accelerate(pipe: Any, recipe: Recipe | str | os.PathLike[str], *, strict: bool = True) -> Accelerated:
    """Run a pipeline as a recipe of `diffaccel tune` says.

        with da.accelerate(pipe, "recipe.json") as h:
            image = h(prompt).images[0]

    Args:
        pipe: a pipeline of the class and checkpoint that the recipe was tuned on.
        recipe: the file, or the `Recipe` that `da.tune` returned.
        strict: other weights are an error; if False a warning (fine-tunes).

    Returns:
        a handle: call it in place of the pipeline (or the pipeline itself, with the recipe's number of steps);
        `.remove()`, or leaving the `with` block, gives the pipeline its own scheduler object back.

    Raises:
        ArtifactError: no recipe, damaged, of another format, or tuned on another class of pipeline, checkpoint, path or
            prediction type; at the first run: for another number of calls, or states of another kind.
        OptionError: a pipeline that is wrapped already.

    Warns:
        ArtifactWarning: the same weights in another precision, other adapters, guidance or size; other weights if not
            `strict`; a recipe whose receipt found no benefit.
    """
    found = recipe if isinstance(recipe, Recipe) else Recipe.load(_file(recipe))
    refuse_wrapped(pipe)
    made, choice = found.made_on, found.choice
    if type(pipe).__name__ != made["pipeline"]:
        raise ArtifactError(
            f"{found.file} was tuned on a {made['pipeline']}, this is a {type(pipe).__name__}; tune again on it"
        )
    reading, held = read(pipe.scheduler.config), found.as_artifact()
    check_path(held, reading.path, reading.settings["prediction_type"])
    check_model(held, pipe, strict=strict)
    if not found.receipt.get("helps", True):
        text = f"{found.file}: {found.receipt['verdict']}"
        warnings.warn(text, ArtifactWarning, stacklevel=2)
    inner = applied(pipe, _of_model(choice, made["model"]))
    if isinstance(inner, Scheduled):
        inner.guard.where, inner.guard.shape = found.file, tuple(made["shape"])
    return Accelerated(inner, found)


def _file(given: Any) -> str | os.PathLike[str]:
    if not isinstance(given, (str, os.PathLike)):
        raise OptionError(f"recipe must be a file or a Recipe, got a {type(given).__name__}")
    return given


def _of_model(choice: Choice, model: Mapping[str, Any]) -> Choice:
    """The choice, its artifact saying which checkpoint it belongs to, as it must once a pipeline is saved with it."""
    held = choice.artifact
    if held is None or "model" in held.meta:
        return choice
    whole = Artifact(held.kind, held.tensors, held.meta | {"model": model}, held.file)
    return Choice(choice.name, choice.kind, choice.settings, choice.calls, choice.work, whole)
