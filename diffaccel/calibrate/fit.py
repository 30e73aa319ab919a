"""`calibrate.fit`: tables fitted to a checkpoint's own trajectories, with a receipt; no training, no backward pass."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from ..artifact import Artifact, path_identity
from ..core.node import Node
from ..core.path import Path
from ..drive import denoiser
from ..errors import ArtifactError, OptionError
from ..identity import check_model
from ..prompts import read_prompts
from ..samplers.fitted import Rows, Tables
from .engine import Engine
from .fit_core import Fitted, Fitting, Plan
from .fit_pipe import Piped
from .fit_run import Functional
from .fit_setup import artifact_of, budgets, prepared, teacher_of
from .grid import AUTO
from .guided import SCALE, default

KIND = "fit"
GUIDANCE = ("guidance", SCALE)


def fit(
    pipe: Any,
    prompts: str | os.PathLike[str] | Sequence[str] | None = None,
    calls: int | Sequence[int] = 8,
    *,
    samples: int = 16,
    holdout: int = 32,
    seed: int = 0,
    teacher_steps: int = 100,
    order: int = 4,
    ridge: float = 1e-4,
    grids: str | Sequence[str] = "auto",
    moves: int = 16,
    refine: int = 3,
    channels: bool | str = "auto",
    rounded: bool = False,
    rivals: str | None = "usual",
    guidance: float | None = None,
    batch: int = 8,
    memory_limit: int = 1 << 30,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **call: Any,
) -> Artifact:
    """Fit tables to a pipeline: `FittedScheduler.from_config(config, artifact=fit(pipe, prompts, calls=(5, 8)))`.

    The pipeline runs by its own call, without gradients, and is left as it was. Input i has prompt i (mod their
    number) and the noise of seed + i; the first `samples` are fitted to, the next `holdout` only judge. Where the
    fitted table is not better than what is there already, the artifact holds the best analytic table of the two that
    were tried, and the receipt's verdict says so.

    Args:
        pipe: text-to-image or class-conditional.
        prompts: like the ones that it will be used with: a list or a file (classes of class-conditional models).
            16 or more; 48 different ones also judge on prompts that were not fitted to.
        calls: budgets of model calls.
        samples, holdout, teacher_steps, order, ridge, moves, refine, channels, rounded, rivals: see `fit_core.Plan`
            (rivals=None is "none").
        seed: of the first input's noise.
        grids: candidates of `grid.GRIDS`; "auto" is all of them.
        guidance: `guidance_scale` of the pipeline's call; None leaves the pipeline's own.
        batch: images that run together. As many as `samples` make the fit cheapest.
        memory_limit: bytes that the teacher's states may take; above, the teacher runs twice.
        out: where the artifact will be saved; a stopped fit goes on from `OUT.partial`. The file is written at the end.
        progress: print the planned cost and show a bar.
        call: further arguments of the pipeline's call (height, width, ...).

    Returns:
        artifact of kind "fit"; `print(artifact.receipt)`.

    Raises:
        OptionError: no prompts, numbers out of range, inputs that are equal, a pipeline that cannot be driven.
        RunError: outputs that are not finite.

    Warns:
        ArtifactWarning: for what the receipt warns of.
    """
    plan = Plan(
        *(budgets(calls), samples, holdout, teacher_steps, order, ridge),
        *(_grids(grids), moves, refine, channels, rounded, rivals or "none"),
    )
    how: dict[str, Any] = {"guidance": guidance, "call": call, "batch": batch, "seed": seed, "out": out}
    setup = prepared(KIND, pipe, prompts, plan, _json(plan), progress=progress, **how)
    engine, made = setup.engine, setup.made
    made.groups = _channels(setup.shape, pipe)
    twice = made.runs_twice(memory_limit, int(np.prod(setup.shape)))
    planned = plan.cost(batch, setup.rivals, twice)
    again = ", the teacher twice because its states need more than memory_limit" if twice else ""
    with engine.working(planned, "fit", again):
        tables, common = _all(made)
    return engine.finish(artifact_of(KIND, _json(plan), tables, common, setup.meta(), out))


def fit_function(
    predict: Callable[[np.ndarray, Node], np.ndarray],
    path: Path,
    noise: np.ndarray,
    calls: int | Sequence[int] = 8,
    *,
    samples: int = 16,
    batch: int = 1 << 30,
    **options: Any,
) -> Artifact:
    """`fit` for a plain function: notebooks, tests.

    Args:
        predict: `predict(x, node)` gives the x0-prediction for states x (B, ...).
        path: of the model.
        noise: (samples + holdout, ...) standard normal; the first `samples` are fitted to, the others judge.
        calls: budgets.
        batch: inputs that run together.
        options: `teacher_steps`, `order`, `ridge`, `grids`, `moves`, `refine`, `rounded`: as of `fit`.

    Returns:
        artifact of kind "fit" without a model; the path's prediction type is "sample".
    """
    noise = np.asarray(noise)
    grids = _grids(options.pop("grids", "auto"))
    plan = Plan(budgets(calls), samples, len(noise) - samples, grids=grids, rivals="none", **options)
    made = Fitting(Functional(predict, path, noise, batch), plan)
    tables, common = _all(made)
    meta = {"path": path_identity(path, "sample"), "shape": list(noise.shape[1:])}
    return artifact_of(KIND, _json(plan), tables, common, meta)


def extend(
    artifact: Artifact | str | os.PathLike[str], pipe: Any, prompts: Any, calls: int | Sequence[int], **options: Any
) -> Artifact:
    """The artifact with tables for further budgets, fitted as its own were.

    The rows are fitted to states that no artifact holds, so the teacher runs again.

    Args:
        artifact: of `fit`, made on this checkpoint, or its file.
        pipe, prompts, calls: as of `fit`; guidance, the plan and the arguments of the pipeline's call are the
            artifact's.
        options: `batch`, `memory_limit`, `out`, `progress`, and arguments of the call that no file can hold (tensors).

    Raises:
        ArtifactError: made on another checkpoint, or for states of another shape.
        OptionError: budgets that it holds already, options that the artifact decides, arguments of the call that it
            does not hold and that are not given, or are others.
    """
    artifact = (artifact if isinstance(artifact, Artifact) else Artifact.load(artifact)).of_kind(KIND)
    check_model(artifact, pipe)
    fixed = {k: v for k, v in artifact.meta["options"].items() if k != "calls"}
    taken = sorted({*fixed, *GUIDANCE, "seed"} & set(options))
    known = sorted(set(budgets(calls)) & set(artifact.meta["calls"]))
    if taken or known:
        what = f"{', '.join(taken)}: decided by the artifact" if taken else f"it holds tables for {known} calls already"
        raise OptionError(f"extend: {what}")
    own = {name: value for name, value in options.items() if name in inspect.signature(fit).parameters}
    call = _replayed(artifact, pipe, {name: value for name, value in options.items() if name not in own})
    _check_shape(artifact, pipe, prompts, call)
    more = fit(pipe, prompts, calls, seed=artifact.meta["seeds"][0], **fixed, **own, **call)
    receipt = {**artifact.meta["receipt"], **more.meta["receipt"]}
    cost = {k: artifact.meta["cost"][k] + more.meta["cost"][k] for k in ("calls", "seconds")}
    both = sorted({*artifact.meta["calls"], *more.meta["calls"]})
    options_ = {**artifact.meta["options"], "calls": both}
    meta = artifact.meta | {"receipt": receipt | {"cost": cost}, "cost": cost, "calls": both, "options": options_}
    joined = Artifact(KIND, {**artifact.tensors, **more.tensors}, meta, artifact.file)
    if options.get("out") is not None:
        joined.save(options["out"])
    return joined


def rows_of(artifact: Artifact, calls: int) -> Rows:
    """The normalised rows of a budget, with their nodes."""
    return Tables.of(artifact).rows(calls)


# ---------------------------------------------------------------------- parts
def _replayed(artifact: Artifact, pipe: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the pipeline's call that a fit was made with; `given` has those that its file cannot hold."""
    made: dict[str, str] = artifact.meta.get("call", {})
    kept: dict[str, Any] = artifact.meta.get("arguments", {})
    for name, value in given.items():
        if made.get(name) != str(value):
            was = f"{name}={made[name]}" if name in made else f"without {name}="
            raise OptionError(
                f"extend: {artifact.file} was fitted {was}, and {name}={value} is given; leave it out, or fit anew"
            )
    missing = sorted(set(made) - set(kept) - set(given))
    if missing:
        told = ", ".join(f"{name}={made[name]}" for name in missing)
        raise OptionError(
            f"extend: {artifact.file} was fitted with {told}, which it does not hold; pass the same again"
        )
    scale = {} if "arguments" in artifact.meta or default(pipe, SCALE) is None else {SCALE: artifact.meta["guidance"]}
    return {**scale, **kept, **given}


def _check_shape(artifact: Artifact, pipe: Any, prompts: Any, call: dict[str, Any]) -> None:
    """Raise if a run with these arguments has states of another shape; the first model call of one tells."""
    named = read_prompts(FilePath(prompts) if isinstance(prompts, os.PathLike) else prompts)
    here, made = Piped(Engine(pipe, named, call=call, progress=False)).shape(), tuple(artifact.meta["shape"])
    if here != made:
        raise ArtifactError(
            f"extend: {artifact.file} was fitted to states of shape {made}, this pipeline's are {here}. Pass the "
            "arguments of the call that it was fitted with (height, width), or fit anew"
        )


def _grids(grids: str | Sequence[str]) -> tuple[str, ...]:
    if grids == "auto":
        return AUTO
    return (grids,) if isinstance(grids, str) else tuple(grids)


def _json(plan: Plan) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(plan).items()}


def _channels(shape: tuple[int, ...], pipe: Any) -> tuple[int, ...]:
    """The shape of a coefficient for each channel; () where it is not known which axis they are."""
    channels = getattr(denoiser(pipe).config, "in_channels", None)
    axes = [k for k, n in enumerate(shape) if n == channels]
    axis = 0 if len(shape) > 2 else axes[0] if len(axes) == 1 else None
    return () if axis is None or shape[axis] == 1 else tuple(n if k == axis else 1 for k, n in enumerate(shape))


def _all(made: Fitting) -> tuple[dict[int, Fitted], dict[str, Any]]:
    """The tables of every budget, and what concerns all of them."""
    made.learn()
    tables = {calls: made.fit(calls) for calls in made.plan.calls}
    return tables, teacher_of(made, tables)
