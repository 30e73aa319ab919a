"""`accelerate(pipe, recipe)`: run a pipeline as a recipe of `diffaccel tune` says, and undo it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..artifact import Artifact, Receipt, check_path
from ..calibrate.guided import scale_name
from ..errors import ArtifactError, ArtifactWarning, OptionError, RunError
from ..identity import check_guidance, check_model
from ..schedulers.from_config import read
from .applied import Cached, Scheduled, applied
from .handle import refuse_wrapped
from .recipe import Choice, Recipe


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

    def __init__(self, inner: Any, recipe: Recipe) -> None:
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
        scale = kwargs.get(scale_name(self.pipe))
        if isinstance(scale, (int, float)):
            check_guidance(self.recipe.as_artifact(), scale)
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
    if isinstance(inner, (Scheduled, Cached)):
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
