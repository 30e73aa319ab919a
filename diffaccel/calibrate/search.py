"""`calibrate.search`: the order, space, corrector and node of each call, searched on a checkpoint (USF, S^3)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..artifact import Artifact, path_identity
from ..core.node import Node
from ..core.path import Nodes, Path
from ..errors import OptionError, one_of
from ..samplers.usf import HIGHEST, SPACES, Choice
from .fit_core import Fitted, Fitting, Plan, Tables
from .fit_run import Functional
from .fit_setup import artifact_of, budgets, prepared, teacher_of
from .grid import GRIDS, choose
from .search_core import MULTISTEP, Costs, Solver, beam, improved, kinds, start_rows, thinned, weights

KIND = "search"
KEPT = 3  # solvers of each beam that are tried on runs
# Rows that are tried alike on every grid: DPM++ 2M and 3M, UniPC 2 in both spaces, order 3 in the angle.
ALIKE = (MULTISTEP, Choice(3), Choice(2, "x0", True), Choice(2, "eps", True), Choice(3, "v"))


@dataclass(frozen=True)
class Space:
    """What is searched; every field enters the artifact.

    Args:
        order: highest order of a row, 1 to 3.
        spaces: of rows, of "x0", "eps", "v".
        correctors: whether rows may have one.
        beam_width: histories that the beam keeps for each node.
        trials: changes that are tried on runs after the beam, for each budget.
    """

    order: int = HIGHEST
    spaces: tuple[str, ...] = SPACES
    correctors: bool = True
    beam_width: int = 4
    trials: int = 60

    def __post_init__(self) -> None:
        if not self.spaces:
            raise OptionError(f"spaces must name one or more of {', '.join(SPACES)}")
        for space in self.spaces:
            one_of("space", space, SPACES)
        Choice.of({"order": self.order})
        for name, least in (("beam_width", 1), ("trials", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionError(f"{name} must be a whole number of {least} or more, got {value!r}")

    @property
    def choices(self) -> list[Choice]:
        """Every way to make a row."""
        return kinds(self.order, self.spaces, self.correctors)

    @property
    def alike(self) -> list[Choice]:
        """Rows that are tried alike on every grid."""
        able = self.choices
        return [c for c in ALIKE if c in able] or able[-1:]

    def pool(self) -> int:
        """Solvers that start on runs, at most."""
        return 2 * KEPT + len(GRIDS) * len(self.alike)


def search(
    pipe: Any,
    prompts: str | os.PathLike[str] | Sequence[str] | None = None,
    calls: int | Sequence[int] = 8,
    *,
    samples: int = 16,
    holdout: int = 32,
    seed: int = 0,
    teacher_steps: int = 100,
    order: int = HIGHEST,
    spaces: str | Sequence[str] = SPACES,
    correctors: bool = True,
    beam_width: int = 4,
    trials: int = 60,
    rivals: str | None = "usual",
    guidance: float | None = None,
    batch: int = 8,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **call: Any,
) -> Artifact:
    """Search a solver for a pipeline: `FittedScheduler.from_config(config, artifact=search(pipe, prompts, calls=8))`.

    Every coefficient is analytic; what is searched is which analytic row stands at which call, and where the call is
    (arXiv:2312.07243). First by beam search on the Gram matrix of a teacher's trajectories, where the residual of
    every row along the teacher's trajectory is exact and costs no model call; that is not the error of a run, in which
    errors of earlier rows come back through the model. So the best solvers of the beam, and uniform ones on each
    candidate grid, are scored on runs, by the geometric mean of their images' paired errors to the teacher's; the best
    is then changed in one row's kind or one node at a time as long as that falls. Inputs that nothing was chosen on
    judge it, as in `fit`.

    Args:
        pipe, prompts, calls, samples, holdout, seed, teacher_steps, rivals, guidance, batch, out, progress, call: as
            of `calibrate.fit`.
        order, spaces, correctors, beam_width, trials: see `Space`.

    Returns:
        artifact of kind "search"; its receipt lists the rows, which `sampler="usf", rows=...` runs on any nodes.

    Raises:
        OptionError: no prompts, numbers out of range, a pipeline that cannot be driven.
        RunError: outputs that are not finite.

    Warns:
        ArtifactWarning: for what the receipt warns of.
    """
    plan = Plan(budgets(calls), samples, holdout, teacher_steps, rivals=rivals or "none")
    space = Space(order, (spaces,) if isinstance(spaces, str) else tuple(spaces), correctors, beam_width, trials)
    how: dict[str, Any] = {"guidance": guidance, "call": call, "batch": batch, "seed": seed, "out": out}
    setup = prepared(KIND, pipe, prompts, plan, _json(plan, space), progress=progress, **how)
    planned = _cost(plan, space, setup.rivals)
    with setup.engine.working(planned, KIND):
        tables, common = _all(setup.made, space)
    return setup.engine.finish(artifact_of(KIND, _json(plan, space), tables, common, setup.meta(), out))


def search_function(
    predict: Callable[[np.ndarray, Node], np.ndarray],
    path: Path,
    noise: np.ndarray,
    calls: int | Sequence[int] = 8,
    *,
    samples: int = 16,
    teacher_steps: int = 100,
    batch: int = 1 << 30,
    **options: Any,
) -> Artifact:
    """`search` for a plain function; the arguments are those of `fit_function`, and `Space`'s."""
    noise = np.asarray(noise)
    plan = Plan(budgets(calls), samples, len(noise) - samples, teacher_steps, rivals="none")
    space = Space(**options)
    tables, common = _all(Fitting(Functional(predict, path, noise, batch), plan), space)
    meta = {"path": path_identity(path, "sample"), "shape": list(noise.shape[1:])}
    return artifact_of(KIND, _json(plan, space), tables, common, meta)


# ---------------------------------------------------------------------- parts
def _json(plan: Plan, space: Space) -> dict[str, Any]:
    told = {k: getattr(plan, k) for k in ("calls", "samples", "holdout", "teacher_steps", "rivals")}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in (told | vars(space)).items()}


def _cost(plan: Plan, space: Space, rivals: int) -> int:
    """Model calls, at most."""
    total = 1 + (plan.teacher_steps + 1) * (plan.samples + plan.holdout) + 2 * (plan.teacher_steps // 2 + 1)
    for n in plan.calls:
        total += n * (plan.samples * (space.pool() + space.trials) + plan.holdout * (3 + rivals + 1))
    return total


def _all(made: Fitting, space: Space) -> tuple[dict[int, Fitted], dict[str, Any]]:
    made.keeps = False  # the Gram matrix and the images are enough
    made.learn()
    costs = Costs(made.teacher.gram, made.teacher.nodes, space.choices)
    tables = {calls: _searched(made, space, costs, calls) for calls in made.plan.calls}
    return tables, teacher_of(made, tables)


def _searched(made: Fitting, space: Space, costs: Costs, calls: int) -> Fitted:
    """The solver of one budget, judged."""

    def score(solver: Solver) -> float:
        nodes = made.teacher.at(solver.chosen)
        return made.errors(f"search/{solver.key}", nodes, solver.weights(nodes), made.inputs).geometric

    tried = {solver.key: (score(solver), name, solver) for name, solver in _pool(made, space, costs, calls)}
    begin, name, solver = min(tried.values(), key=lambda entry: entry[0])
    beams = min(value for value, from_, _ in tried.values() if from_.startswith("beam"))
    found, value, trials = improved(solver, begin, score, space.choices, made.teacher.gram.size, space.trials)
    nodes, rows = made.teacher.at(found.chosen), (*found.rows[:-1], Choice(order=1))  # what every last row is
    w = weights(nodes, rows)
    report: dict[str, Any] = {
        "begun from": name,
        "error on the inputs that were searched on": {
            **{k: float(f"{v:.4g}") for k, v in (("best of the beams", beams), ("best begun from", begin))},
            "found": float(f"{value:.4g}"),
        },
        "solvers scored on runs": len(tried) + trials,
    }
    order = w.shape[1] - 1
    baselines = _multistep(made, calls, nodes, max(order, 2))
    judged, refused = made.judged("searched", calls, nodes, w, baselines)
    if refused is not None:
        nodes, w = baselines[refused]
        rows = (MULTISTEP,) * calls
    w = weights(nodes, rows)
    report["rows"] = [dict(c._asdict(), t=float(f"{n.t:.6g}")) for c, n in zip(rows, nodes, strict=False)]
    return Fitted(nodes, w, start_rows(nodes, rows, w.shape[1] - 1), report | judged)


def _multistep(made: Fitting, calls: int, nodes: Nodes, order: int) -> Tables:
    return {"DPM++ 2M on the found nodes": (nodes, _padded(weights(nodes, (MULTISTEP,) * calls), order))} | made.usual(
        calls, order
    )


def _padded(w: np.ndarray, order: int) -> np.ndarray:
    return np.pad(w, ((0, 0), (0, max(0, order + 1 - w.shape[1]))))


def _pool(made: Fitting, space: Space, costs: Costs, calls: int) -> list[tuple[str, Solver]]:
    """(where it comes from, solver): the best of the beams, and uniform rows on each candidate grid."""
    gram, nodes = made.teacher.gram, made.teacher.nodes
    places, found = thinned(gram.size), []
    for power in (2.0, 1.0):
        best = beam(costs, calls, width=space.beam_width, places=places, power=power, keep=KEPT)
        found += [(f"beam, power {power:g}", solver) for _, solver in best]
    own = made.own(calls)
    for grid in GRIDS:
        chosen = choose(grid, gram, nodes, calls, None if own is None else own[:-1])
        if chosen is not None:
            found += [(f"{grid}, all rows alike", Solver(tuple(chosen), (c,) * calls)) for c in space.alike]
    return found
