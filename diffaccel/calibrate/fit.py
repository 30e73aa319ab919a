"""`calibrate.fit`: tables fitted to a checkpoint's own trajectories, with a receipt; no training, no backward pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..artifact import Artifact, path_identity
from ..core.node import Node
from ..core.path import Path
from ..drive import denoiser
from ..errors import OptionError
from ..identity import check_model
from ..samplers.fitted import Rows, Tables
from .fit_core import Fitted, Fitting, Plan
from .fit_run import Functional
from .fit_setup import artifact_of, budgets, default, prepared, teacher_of
from .grid import AUTO

KIND = "fit"


def fit(
    pipe: Any,
    prompts: str | os.PathLike[str] | Sequence[str] | None = None,
    calls: int | Sequence[int] = 8,
    *,
    samples: int = 16,
    holdout: int = 32,
    seed: int = 0,
    teacher_steps: int = 100,
    order: int = 3,
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
    if progress:
        again = ", the teacher twice because its states need more than memory_limit" if twice else ""
        print(f"fit: at most {planned} model calls ({planned / 50:.0f} images at 50 calls){again}", flush=True)
    with engine.working(planned, "fit"):
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


def extend(artifact: Artifact, pipe: Any, prompts: Any, calls: int | Sequence[int], **options: Any) -> Artifact:
    """The artifact with tables for further budgets, fitted as its own were.

    The rows are fitted to states that no artifact holds, so the teacher runs again.

    Args:
        artifact: of `fit`, made on this checkpoint.
        pipe, prompts, calls: as of `fit`; guidance and the plan are the artifact's.
        options: `batch`, `memory_limit`, `out`, `progress`, and arguments of the pipeline's call.

    Raises:
        ArtifactError: made on another checkpoint.
        OptionError: budgets that it holds already, options that the artifact decides.
    """
    check_model(artifact.of_kind(KIND), pipe)
    fixed = {k: v for k, v in artifact.meta["options"].items() if k != "calls"}
    taken = sorted({*fixed, "guidance", "seed"} & set(options))
    known = sorted(set(budgets(calls)) & set(artifact.meta["calls"]))
    if taken or known:
        what = f"{', '.join(taken)}: decided by the artifact" if taken else f"it holds tables for {known} calls already"
        raise OptionError(f"extend: {what}")
    guidance = artifact.meta["guidance"] if default(pipe, "guidance_scale") is not None else None
    seed = artifact.meta["seeds"][0]
    more = fit(pipe, prompts, calls, guidance=guidance, seed=seed, **fixed, **options)
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
