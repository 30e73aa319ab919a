"""The greedy search of DC-Solver's ratios, node by node, on states replayed from known model outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from ..core.node import Node
from ..core.path import Nodes
from ..core.prediction import pair
from ..core.table import Table
from ..samplers.registry import get
from ..schedulers.settings import output_of
from .captured import Captured
from .engine import Batch, Engine, joined

BOUNDS = (0.3, 2.0)
TOLERANCE = 1e-2
EVALUATIONS = 12
OBJECTIVES = ("trajectory", "final")
GAIN = 0.99  # a ratio must bring the calibration loss below this share of what 1 gives

Raw = tuple[torch.Tensor, torch.Tensor]  # (state as the model saw it, its output)


@dataclass
class Student:
    """The sampler that is calibrated, on its nodes; replays runs whose model outputs are known.

    Args:
        name: of the compensated sampler.
        parent: its parent.
        options: complete options of the parent.
        k: `dc_order`.
        config: of a scheduler of ours for the pipeline, with its grid.
        nodes: N + 1.
    """

    name: str
    parent: str
    options: dict[str, Any]
    k: int
    config: Mapping[str, Any]
    nodes: Nodes
    _open: Nodes = field(init=False)

    def __post_init__(self) -> None:
        # The corrector at the last call is looked at on its own, which a step to sigma = 0 would hide (a = 0).
        last, end = self.nodes[-2:]
        opened = Node(end.t, last.alpha, 0.5 * last.sigma) if end.sigma == 0 else end
        self._open = Nodes([*self.nodes[:-1], opened], self.nodes.path)

    def __len__(self) -> int:
        return len(self.nodes) - 1

    def table(self, rho: Sequence[float], nodes: Nodes | None = None, **changed: Any) -> Table:
        """With these ratios (missing ones are 1)."""
        full = [*rho, *[1.0] * (len(self) - len(rho))]
        return get(self.name).trace(nodes or self.nodes, **{**self.options, **changed}, dc_order=self.k, ratios=full)

    def state(self, table: Table, raws: Sequence[Raw], upto: int) -> torch.Tensor:
        """The state at node `upto`, from the outputs of the calls before."""
        known, output = iter(raws), output_of(self.config)

        def predict(_: torch.Tensor, node: Node, space: Any) -> Any:
            seen, raw = next(known)
            u, w = pair(output, space, node)
            return u * seen + w * raw

        state: torch.Tensor = Table(table.rows[:upto]).apply(raws[0][0], predict)
        return state

    def corrects(self, j: int) -> bool:
        """Whether there is a corrector at node j."""
        how = self.options.get("corrector", False)
        return bool(how is True or (how is not False and j - 1 not in how)) and 0 < j < len(self)

    def corrected(self, rho: Sequence[float], raws: Sequence[Raw], x: torch.Tensor) -> torch.Tensor:
        """The state at node `len(raws) - 1` after its corrector, from x before it."""
        j = len(raws) - 1
        if not self.corrects(j):
            return x
        how = self.options["corrector"]
        off = [*([] if how is True else how), j - 1]
        with_, without = self.table(rho, self._open), self.table(rho, self._open, corrector=off)
        change = self.state(with_, raws, j + 1) - self.state(without, raws, j + 1)
        return x + change / float(with_.rows[j].a)

    def scheduler(self, rho: Sequence[float] | None) -> Captured:
        """For the pipeline: with ratios, or the parent."""
        if rho is None:
            return Captured.of(self.config, self.parent, self.options)
        extra = {"dc_order": self.k, "ratios": list(rho)}
        return Captured.of(self.config, self.name, {**self.options, **extra})


def refined(nodes: Nodes, calls: int) -> tuple[Nodes, list[int]]:
    """About `calls` intervals that contain `nodes`, uniform in lam within each of theirs, and where those are.

    From alpha = 0, where lam is infinite, they are uniform in t; to sigma = 0 they go to the end of the training range.
    """
    path, found, at = nodes.path, [nodes[0]], [0]
    each = max(1, round(calls / (len(nodes) - 1)))
    for s, t in pairwise(nodes):
        shares = np.arange(1, each) / each
        if s.alpha == 0:
            inner = [path.at(float(s.t + r * (t.t - s.t))) for r in shares]
        else:
            stop = t.lam if t.sigma > 0 else max(path.last.lam if path.last.sigma > 0 else s.lam + 3.0, s.lam + 0.5)
            inner = [path.at_lam(float(s.lam + r * (stop - s.lam))) for r in shares]
        found += [*inner, t]
        at.append(len(found) - 1)
    return Nodes(found, path), at


# ---------------------------------------------------------------------- pieces of work
TEACHER = {"order": 3, "form": "exact"}


def teacher_states(engine: Engine, tag: str, batches: Sequence[Batch], student: Student, calls: int) -> np.ndarray:
    """The teacher's states at the student's nodes, (n, N + 1, ...) float32."""
    nodes, at = refined(student.nodes, calls)
    place = {node: k for k, node in enumerate(at)}

    def work(batch: Batch) -> dict[str, np.ndarray]:
        kept: list[np.ndarray] = [np.zeros(0)] * len(at)

        def see(i: int, sample: torch.Tensor, output: torch.Tensor, state: torch.Tensor) -> None:
            if i in place:
                kept[place[i]] = sample.detach().float().cpu().numpy()
            kept[-1] = state.detach().float().cpu().numpy() if i + 2 == len(nodes) else kept[-1]

        engine.run(batch, Captured.of(student.config, "dpmpp", TEACHER, see=see, nodes=nodes), len(nodes) - 1)
        return {"x": np.stack(kept, axis=1)}

    return engine.accumulate(tag, batches, work, joined, gather=False)["x"]


def _squares(x: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    """(sum of squares of the difference, how many numbers)."""
    return float((x - target).square().sum()), float(x.numel())


class Search:
    """The search of one run's ratios, node by node, by bounded Brent, at most 12 evaluations each.

    At node i the ratio minimises the squared distance to the teacher of the state at node i + 1 after its corrector
    (the end of the run for the last node). With the objective "final" a second sweep follows, in which each ratio in
    turn minimises the squared distance of the last state, the others as they are; an evaluation then takes the calls
    of all later nodes.

    Args:
        engine: of the calibration.
        tag: name of this run, for going on after a stop.
        student: the sampler.
        batches: calibration images of this process.
        teacher: their `teacher_states`, (n, N + 1, ...).
        bounds: of a ratio.
        objective: "trajectory" or "final".
    """

    def __init__(
        self,
        engine: Engine,
        tag: str,
        student: Student,
        batches: Sequence[Batch],
        teacher: np.ndarray,
        bounds: tuple[float, float] = BOUNDS,
        objective: str = "trajectory",
    ) -> None:
        self.bounds, self.objective = bounds, objective
        self.engine, self.tag, self.student, self.batches = engine, tag, student, batches
        edges = np.cumsum([0, *map(len, batches)])
        self.targets = [torch.tensor(teacher[a:b], dtype=torch.float64) for a, b in pairwise(edges)]
        self.sums: dict[str, list[float]] = engine.kept.notes.setdefault(f"{tag}/sums", {})  # of this process

    def ratios(self) -> list[float]:
        """The N ratios."""
        student = self.student
        rho: list[float] = []
        raws = [[self._call(k, 0, None)] for k in range(len(self.batches))]
        for i in range(len(student)):
            rho.append(1.0 if i < student.k else self._next(i, rho, raws))
            if i + 1 < len(student):
                for k, own in enumerate(raws):
                    own.append(self._call(k, i + 1, student.state(student.table(rho), own, i + 1)))
        if self.objective == "final":
            rho, raws = self._second_sweep(rho, raws)
        self.ends = [student.state(student.table(rho), own, len(student)) for own in raws]
        return rho

    def _second_sweep(self, rho: list[float], raws: list[list[Raw]]) -> tuple[list[float], list[list[Raw]]]:
        """The ratios again, each for the sake of the last state, and the calls of the run with them."""
        for i in range(self.student.k, len(rho)):
            before = rho[i]
            rho = [*rho[:i], self._better(i, rho, raws), *rho[i + 1 :]]
            if rho[i] != before:
                raws = [self._rerun(k, i, rho, own) for k, own in enumerate(raws)]
        return rho, raws

    def _next(self, i: int, rho: list[float], raws: list[list[Raw]]) -> float:
        return self._best(lambda value: self._loss(i, [*rho, value], raws))

    def _better(self, i: int, rho: list[float], raws: list[list[Raw]]) -> float:
        return self._best(lambda value: self._end_loss(i, value, rho, raws), rho[i])

    def _best(self, loss: Callable[[float], float], *known: float) -> float:
        """The ratio of the lowest loss within the bounds, if that is lower by 1 % than with 1; else 1."""
        plain = loss(1.0)
        limits = {"xatol": TOLERANCE, "maxiter": EVALUATIONS - 1}
        found = minimize_scalar(lambda v: loss(float(v)), bounds=self.bounds, method="bounded", options=limits)
        least, value = min([(float(found.fun), float(found.x)), *((loss(v), v) for v in known)])
        return value if least < GAIN * plain else 1.0

    def _loss(self, i: int, rho: list[float], raws: list[list[Raw]]) -> float:
        """Mean square of the state at node i + 1 after its corrector; `raws` are the calls up to node i."""
        return self._mean(f"{i}/{rho[-1].hex()}", lambda k: self._distance(k, i, rho, raws[k]))

    def _end_loss(self, i: int, value: float, rho: list[float], raws: list[list[Raw]]) -> float:
        """Mean square of the last state with another ratio at node i; `raws` are the calls of the run with `rho`."""
        student, changed = self.student, [*rho[:i], value, *rho[i + 1 :]]

        def distance(k: int) -> tuple[float, float]:
            own = self._rerun(k, i, changed, raws[k]) if value != rho[i] else raws[k]
            x = student.state(student.table(changed), own, len(student))
            return _squares(x, self.targets[k][:, -1])

        return self._mean(f"final/{i}/{value.hex()}", distance)

    def _rerun(self, k: int, i: int, rho: list[float], raws: list[Raw]) -> list[Raw]:
        """The calls of a run with these ratios; those up to node i do not depend on the ratio there."""
        student, made = self.student, raws[: i + 1]
        table = student.table(rho)
        for j in range(i + 1, len(student)):
            x = student.state(table, made, j)
            made.append(self.engine.output(self.batches[k], student.nodes[j], x, student.config))
        return made

    def _mean(self, key: str, distance: Callable[[int], tuple[float, float]]) -> float:
        """The mean square over all processes of `distance(batch)` = (sum of squares, count); kept under `key`."""
        if key not in self.sums:
            parts = [distance(k) for k in range(len(self.batches))]
            self.sums[key] = [float(v) for v in np.sum(parts, axis=0)]
            self.engine.tick()
        # known or not, every process speaks: after a stop some may know more than others
        own_sums = np.array(self.sums[key])
        found = [np.frombuffer(p) for p in self.engine.world.gather("loss", own_sums.tobytes(), timeout=None)]
        squares, count = np.sum(found, axis=0)
        return float(squares / count)

    def _distance(self, k: int, i: int, rho: list[float], raws: list[Raw]) -> tuple[float, float]:
        """(sum of squares, count) of one batch."""
        student, target = self.student, self.targets[k][:, i + 1]
        x = student.state(student.table(rho), raws, i + 1)
        if student.corrects(i + 1):
            raw = self.engine.output(self.batches[k], student.nodes[i + 1], x, student.config)
            x = student.corrected(rho, [*raws, raw], x)
        return _squares(x, target)

    def _call(self, k: int, i: int, x: torch.Tensor | None) -> Raw:
        """The call at node i of the run with the ratios found; kept for going on after a stop."""
        name = f"{self.tag}/call/{i}/{k}"
        arrays = self.engine.kept.arrays
        if f"{name}/x" not in arrays:
            seen, raw = self.engine.output(self.batches[k], self.student.nodes[i], x, self.student.config)
            arrays[f"{name}/x"], arrays[f"{name}/o"] = seen.numpy(), raw.numpy()
            self.engine.tick()
        return torch.from_numpy(arrays[f"{name}/x"].copy()), torch.from_numpy(arrays[f"{name}/o"].copy())
