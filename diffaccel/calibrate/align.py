"""`calibrate.align`: what the model is fed as t at each call, fitted to the many-step images of a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..artifact import Artifact, path_identity
from ..core.grid import GRIDS
from ..core.grid import nodes as grid_nodes
from ..core.node import Node
from ..core.path import Nodes, Path
from ..errors import OptionError, one_of
from ..samplers.fitted import KINDS, Tables
from ..samplers.registry import get
from . import align_core
from .align_core import Aligning
from .check import check
from .fit_core import Fitted, Fitting, Plan
from .fit_rows import normalised
from .fit_run import Functional
from .fit_setup import artifact_of, budgets, prepared, teacher_of

KIND = "align"
Source = str | os.PathLike[str] | Artifact


@dataclass(frozen=True)
class Base:
    """Whose rows are aligned.

    Args:
        name: a sampler, or the name of an artifact's file.
        options: of the sampler.
        grid: of the sampler; None is the pipeline's own.
        tables: of an artifact, in place of a sampler.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    grid: str | None = None
    tables: Tables | None = None

    @classmethod
    def of(cls, base: Source, options: Mapping[str, Any] | None, grid: str | None, pipe: Any = None) -> Base:
        """From the arguments of `align`."""
        if isinstance(base, str) and not base.endswith(".safetensors"):
            if grid is not None:
                one_of("grid", grid, GRIDS)
            made, given = get(base), dict(options or {})
            made.options(given)
            return cls(made.name, given, grid)
        found = base.of_kind(KINDS) if isinstance(base, Artifact) else Artifact.load(base, KINDS)
        if options or grid:
            raise OptionError("align: options= and grid= are of a sampler; an artifact has its rows and nodes already")
        if found.kind == KIND:
            raise OptionError(f"align: {found.file} is aligned already")
        if pipe is not None:
            check(found, pipe)
        return cls(found.file, tables=Tables.of(found))

    def table(self, made: Fitting, calls: int) -> tuple[Nodes, np.ndarray, Callable[[int], np.ndarray]]:
        """(nodes, normalised rows, `start(order)`: rows of runs that begin later) of a budget."""
        path = made.runner.path
        if self.tables is not None:
            rows = self.tables.rows(calls)
            return Nodes(rows.nodes(path.end), path), rows.w, lambda order: rows.start
        nodes = self._nodes(made, calls)
        w = self._rows(nodes)
        return nodes, w, lambda order: self._start(nodes, order)

    def _nodes(self, made: Fitting, calls: int) -> Nodes:
        own = made.own(calls) if self.grid is None else grid_nodes(made.runner.path, calls, self.grid)
        if own is None:
            raise OptionError("align: this pipeline has no grid of its own that is known here; name one with grid=")
        return own

    def _rows(self, nodes: Nodes) -> np.ndarray:
        made = get(self.name)
        if made.stochastic or made.intervals is not None:
            raise OptionError(f"align needs a sampler of one call an interval that draws no noise, not {made.name!r}")
        table = made.trace(nodes, **self.options)
        return normalised(table, max(table.depth, 2))

    def _start(self, nodes: Nodes, order: int) -> np.ndarray:
        n = len(nodes) - 1
        found = np.zeros((n, order - 1, order + 1))
        for first in range(n):
            w = self._rows(nodes[first:])
            for past in range(min(order - 1, n - first)):
                found[first + past, past, : w.shape[1]] = w[past]
        return found

    def __str__(self) -> str:
        options = "".join(f", {k}={v!r}" for k, v in self.options.items())
        return self.name + options + (f", grid {self.grid}" if self.grid else "")


def align(
    pipe: Any,
    prompts: str | os.PathLike[str] | Sequence[str] | None = None,
    calls: int | Sequence[int] = 8,
    *,
    base: Source = "dpmpp",
    options: Mapping[str, Any] | None = None,
    grid: str | None = None,
    samples: int = 16,
    holdout: int = 32,
    seed: int = 0,
    teacher_steps: int = 100,
    rounds: int = 4,
    reach: float = 0.5,
    rivals: str | None = "usual",
    guidance: float | None = None,
    batch: int = 8,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **call: Any,
) -> Artifact:
    """Fit what the model is fed as t at each call of a table; states, levels and coefficients stay as they are.

    At few calls a state that a solver made is not one that the model knows from its level, and another t may suit it
    better (timestep alignment, arXiv:2310.09469, which trains one ratio a step against noised images). Here the shifts
    of all calls are found together, against the images of a many-step teacher, by Gauss-Newton steps with differences:
    no data and no backward pass. Each step is computed on one half of the inputs and kept only if the error of both
    halves falls; other inputs judge the result as in `fit`, against the same table unaligned.

    Args:
        pipe, prompts, calls, samples, holdout, seed, teacher_steps, rivals, guidance, batch, out, progress, call: as
            of `calibrate.fit`.
        base: a deterministic sampler of one call an interval, or an artifact of `fit` or `search`.
        options, grid: of that sampler; the grid is the pipeline's own if None.
        rounds: steps, at most.
        reach: largest shift, in units of the mean distance of a node's t to its neighbours'.

    Returns:
        artifact of kind "align", for `FittedScheduler`.

    Raises:
        OptionError: no prompts, numbers out of range, a base that has no rows of numbers, a pipeline that cannot be
            driven.
        ArtifactError: a base of another path or checkpoint, or without tables for these calls.
        RunError: outputs that are not finite.

    Warns:
        ArtifactWarning: for what the receipt warns of.
    """
    plan = Plan(budgets(calls), samples, holdout, teacher_steps, rivals=rivals or "none")
    _check(rounds, reach)
    start = Base.of(base, options, grid, pipe)
    how: dict[str, Any] = {"guidance": guidance, "call": call, "batch": batch, "seed": seed, "out": out}
    told = _json(plan, start, rounds, reach)
    setup = prepared(KIND, pipe, prompts, plan, told, progress=progress, **how)
    planned = 1 + (teacher_steps + 1) * (samples + holdout) + 2 * (teacher_steps // 2 + 1)
    for n in plan.calls:
        start.table(setup.made, n)  # before the first call, if it is not possible
        planned += align_core.cost(n, samples, rounds) + n * (samples + holdout * (4 + setup.rivals))
    with setup.engine.working(planned, KIND):
        tables, common = _all(setup.made, start, rounds, reach)
    return setup.engine.finish(artifact_of(KIND, told, tables, common, setup.meta(), out))


def align_function(
    predict: Callable[[np.ndarray, Node], np.ndarray],
    path: Path,
    noise: np.ndarray,
    calls: int | Sequence[int] = 8,
    *,
    base: Source = "dpmpp",
    options: Mapping[str, Any] | None = None,
    grid: str = "linspace_open",
    samples: int = 16,
    teacher_steps: int = 100,
    rounds: int = 4,
    reach: float = 0.5,
    batch: int = 1 << 30,
) -> Artifact:
    """`align` for a plain function; `predict(x, node)` is fed `node.t` at a state of level (node.alpha, node.sigma)."""
    noise = np.asarray(noise)
    plan = Plan(budgets(calls), samples, len(noise) - samples, teacher_steps, rivals="none")
    _check(rounds, reach)
    start = Base.of(base, options, grid if isinstance(base, str) else None)
    made = Fitting(Functional(predict, path, noise, batch), plan)
    tables, common = _all(made, start, rounds, reach)
    meta = {"path": path_identity(path, "sample"), "shape": list(noise.shape[1:])}
    return artifact_of(KIND, _json(plan, start, rounds, reach), tables, common, meta)


# ---------------------------------------------------------------------- parts
def _check(rounds: int, reach: float) -> None:
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1 or not 0 < reach <= 2:
        raise OptionError(f"align needs 1 round or more and a reach in (0, 2], got {rounds!r} and {reach!r}")


def _json(plan: Plan, base: Base, rounds: int, reach: float) -> dict[str, Any]:
    told = {k: getattr(plan, k) for k in ("samples", "holdout", "teacher_steps", "rivals")}
    return {"calls": list(plan.calls), "base": str(base), "rounds": rounds, "reach": reach, **told}


def _all(made: Fitting, base: Base, rounds: int, reach: float) -> tuple[dict[int, Fitted], dict[str, Any]]:
    made.keeps = False  # the images are enough
    made.learn()
    tables = {calls: _aligned(made, base, calls, rounds, reach) for calls in made.plan.calls}
    return tables, teacher_of(made, tables)


def _aligned(made: Fitting, base: Base, calls: int, rounds: int, reach: float) -> Fitted:
    """The table of one budget, judged."""
    nodes, w, start = base.table(made, calls)
    job = Aligning(made, nodes, w, reach)
    shifts, told = job.run(rounds)
    tried = {"unaligned": np.zeros(calls), "aligned": shifts}
    scores = {name: job.fitted(s) for name, s in tried.items()}
    fed = job.at(shifts)
    report: dict[str, Any] = {
        "base": str(base),
        "error on the inputs that were fitted to": {k: float(f"{v:.4g}") for k, v in scores.items()},
        "rounds": told or "none kept: no step lowered the error of both halves",
        "fed t": [f"{a.t:.5g} -> {b.t:.5g}" for a, b in zip(nodes[:-1], fed[:-1], strict=True)],
    }
    order = w.shape[1] - 1
    unaligned = f"{base} unaligned"
    baselines = {unaligned: (nodes, w)} | made.usual(calls, order)
    judged, refused = made.judged("aligned", calls, fed, w, baselines)
    if refused is not None:  # it holds the table that it was to improve, unaligned
        fed = nodes
        judged |= {"table": unaligned}
    return Fitted(fed, w, start(order), report | judged)
