"""What a fit does, and in which order: teacher, candidates, rows, guard. Knows no pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..core.path import Nodes
from ..errors import OptionError, one_of
from .fit_guard import Errors, judge, relative, report_of
from .fit_rows import Gram, spread
from .fit_run import Memo, Runner, Teacher, Tensors, analytic, batches, fit_once, fit_rows, images_of, start_rows, teach
from .grid import AUTO, GRIDS, choose, descend, teacher_nodes
from .refine import Refiner, round_cost

Tables = dict[str, tuple[Nodes, np.ndarray]]  # by name: nodes and normalised rows
RIVALS = ("usual", "all", "none")
ORDERS = 8  # at most


@dataclass(frozen=True)
class Plan:
    """What a fit does; every field enters the artifact.

    Args:
        calls: budgets.
        samples: inputs S that rows are fitted to (8 are enough, 4 work).
        holdout: inputs that only judge, and are reported.
        teacher_steps: K; the teacher makes K + 1 calls an input.
        order: predictions that a row combines, 1 to 8; more than 4 help from 10 calls on, if at all.
        ridge: relative weight of the pull to the analytic rows.
        grids: candidates; the best by cross-validation is taken.
        moves: how many changes of its nodes are then tried, and kept if cross-validation finds them
            better; none where the teacher's states do not fit in memory.
        refine: rounds of Gauss-Newton on all rows and nodes together (see `refine`), each kept only if
            cross-validation finds it better; none where the model computes in half precision.
        channels: a coefficient for each channel: True, False, or "auto": what cross-validation finds better.
        rounded: nodes at whole training steps, for models that embed integers.
        rivals: which of diffusers' schedulers are measured beside: "usual", "all", "none".
    """

    calls: tuple[int, ...]
    samples: int = 16
    holdout: int = 32
    teacher_steps: int = 100
    order: int = 4
    ridge: float = 1e-4
    grids: tuple[str, ...] = AUTO
    moves: int = 16
    refine: int = 3
    channels: bool | str = "auto"
    rounded: bool = False
    rivals: str = "usual"

    def __post_init__(self) -> None:
        if not self.calls or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in self.calls):
            raise OptionError(f"calls must be one or more numbers of model calls, got {self.calls!r}")
        if self.samples < 4 or self.holdout < 4:
            raise OptionError(f"a fit needs 4 or more inputs and 4 held out, got {self.samples} and {self.holdout}")
        if max(self.calls) >= self.teacher_steps / 4:
            raise OptionError(
                f"{max(self.calls)} calls against a teacher of {self.teacher_steps} steps: nothing to gain; take fewer "
                "calls or more teacher_steps"
            )
        if self.order not in range(1, ORDERS + 1) or not self.ridge >= 0:
            raise OptionError(f"order must be 1 to {ORDERS} and ridge 0 or more, got {self.order!r} and {self.ridge!r}")
        if not self.grids:
            raise OptionError(f"grids must name one or more of {', '.join(GRIDS)}")
        for name in self.grids:
            one_of("grid", name, GRIDS)
        for name in ("moves", "refine"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise OptionError(f"{name} must be a number of 0 or more, got {value!r}")
        if self.channels not in (True, False, "auto"):
            raise OptionError(f"channels must be True, False or 'auto', got {self.channels!r}")
        one_of("rivals", self.rivals, RIVALS)

    def cost(self, batch: int, rivals: int, twice: bool) -> int:
        """Model calls that it will make, at most (a guidance pair counts once).

        Args:
            batch: inputs that run together.
            rivals: schedulers measured beside.
            twice: whether the teacher runs a second time, because its states do not fit in memory.
        """
        s, k = self.samples, self.teacher_steps
        half, moves, once = s // 2, 0 if twice else self.moves, s <= batch
        trials = len(self.grids) + (self.channels == "auto") + (moves > 0 if once else moves)
        total = 1 + (k + 1) * (s * (1 + twice) + self.holdout) + 2 * (k // 2 + 1)  # 1: to see the shape
        for n in self.calls:
            for part in (half, s - half) if trials > 1 else ():
                total += trials * (_row_calls(n, part, batch) + n * part)
            total += n * s * (moves + 1) if once and moves else 0
            total += _row_calls(n, s, batch) + n * self.holdout * (rivals + 1)
            total += (1 + self.refine) * n * (s + 3 * self.holdout)  # judged, where the guard refuses all
            total += self.refine * s * round_cost(n, self.order, moves=not self.rounded)
        return total


def _row_calls(calls: int, inputs: int, batch: int) -> int:
    return inputs * (calls if inputs <= batch else calls * (calls + 1) // 2)


@dataclass(frozen=True)
class Fitted:
    """The table of one budget, and what was measured of it."""

    nodes: Nodes
    w: np.ndarray
    start: np.ndarray
    report: dict[str, Any]

    def tensors(self, calls: int) -> dict[str, np.ndarray]:
        """For the artifact."""
        node = np.array([n.key for n in self.nodes[:-1]])
        return {f"n{calls}.node": node, f"n{calls}.w": self.w, f"n{calls}.start": self.start}


# rivals(inputs, calls, images): errors of the pipeline's present scheduler, then of others
Rivals = Callable[[Sequence[int], int, dict[int, np.ndarray]], list[Errors]]


class Fitting:
    """One fit: inputs 0..S-1 are fitted to, S..S+holdout-1 judge.

    Args:
        runner: of the model.
        plan: what to do.
        own: the nodes of the pipeline's own grid at so many calls, if it has one.
        memo: keeps pieces of work, for going on after a stop.
        rivals: the pipeline's present scheduler (first) and others; none for a plain function.
    """

    def __init__(
        self,
        runner: Runner,
        plan: Plan,
        *,
        own: Callable[[int], Nodes | None] = lambda calls: None,
        memo: Memo = lambda name, compute: compute(),
        rivals: Rivals = lambda *_: [],
    ) -> None:
        self.runner, self.plan, self.own, self.memo, self.rivals = runner, plan, own, memo, rivals
        self.keeps = True  # the teacher's states
        self.groups: tuple[int, ...] = ()  # of a coefficient for each channel
        self.inputs = list(range(plan.samples))
        self.held = list(range(plan.samples, plan.samples + plan.holdout))
        nodes = teacher_nodes(runner.path, plan.teacher_steps, rounded=plan.rounded)
        self.teacher = Teacher(nodes, Gram(len(nodes) - 1))

    # ------------------------------------------------------------------ teacher
    def learn(self) -> None:
        """Run the teacher on all inputs; keep the states if they fit in memory."""
        for k, group in enumerate(batches(self.inputs, self.runner.batch)):
            self._learn(f"teacher/{k}", group, gram=True)
        for k, group in enumerate(batches(self.held, self.runner.batch)):
            self._learn(f"held/{k}", group, gram=False)
        for n, image in self.teacher.images.items():
            twin = next((m for m in range(n) if np.array_equal(self.teacher.images[m], image)), None)
            if twin is not None:
                raise OptionError(f"inputs {twin} and {n} start from the same noise (the same seed?): they must differ")

    def _learn(self, name: str, group: list[int], *, gram: bool) -> None:
        size = len(self.teacher.nodes) - 1

        def compute() -> Tensors:
            made = Teacher(self.teacher.nodes, Gram(size))
            keep = range(size) if gram and self.keeps else ()
            teach(self.runner, group, made, gram=gram, keep=keep)
            found = {"images": np.stack([made.images[n] for n in group])}
            if gram:
                found |= {"gram": made.gram.products, "elements": np.array(made.gram.elements)}
            if keep:
                found["states"] = np.stack([[made.states[k, n] for n in group] for k in range(size)])
            return found

        found = self.memo(name, compute)
        self.teacher.images.update(zip(group, found["images"], strict=True))
        if gram:
            self.teacher.gram.merge(Gram(size, found["gram"], int(found["elements"])))
        if "states" in found:
            states = found["states"]
            self.teacher.states.update({(k, n): states[k][j] for k in range(size) for j, n in enumerate(group)})

    def runs_twice(self, limit: int, elements: int) -> bool:
        """Decide whether the states are kept. Returns whether the teacher must run twice.

        Args:
            limit: bytes.
            elements: of one input's state.
        """
        self.keeps = 4 * elements * len(self.inputs) * len(self.teacher.nodes) <= limit
        return not self.keeps

    def again(self, chosen: Sequence[int]) -> None:
        """Where the states did not fit: run the teacher once more for those at the chosen nodes."""
        missing = sorted({k for k in chosen if (k, self.inputs[0]) not in self.teacher.states})
        if missing:
            teach(self.runner, self.inputs, self.teacher, gram=False, keep=missing)

    def gap(self) -> float:
        """How far a teacher of half as many steps lands from the teacher, on two inputs: root mean square error."""
        path, steps = self.runner.path, self.plan.teacher_steps // 2
        nodes = teacher_nodes(path, steps, rounded=self.plan.rounded)
        coarse = Teacher(nodes, Gram(len(nodes) - 1))
        pair = self.inputs[:2]

        def compute() -> Tensors:
            teach(self.runner, pair, coarse, gram=False, keep=())
            return {"images": np.stack([coarse.images[n] for n in pair])}

        found = self.memo("gap", compute)["images"]
        return float(np.sqrt(np.mean(relative(found, self._images(pair)) ** 2)))

    def _images(self, inputs: Sequence[int]) -> np.ndarray:
        return np.stack([self.teacher.images[n] for n in inputs])

    # ------------------------------------------------------------------ one budget
    def fit(self, calls: int) -> Fitted:
        """The table for this many calls, judged."""
        groups = self.groups if self.plan.channels else ()
        candidates = self._candidates(calls)
        self.again([k for chosen in candidates.values() for k in chosen])
        moves = self.plan.moves if self.keeps else 0
        compared = len(candidates) > 1 or moves or (groups and self.plan.channels == "auto")
        scores = {n: self.validated(chosen, groups) if compared else math.nan for n, chosen in candidates.items()}
        name = min(scores, key=lambda n: scores[n])
        chosen, best = candidates[name], scores[name]
        report: dict[str, Any] = {"grid": name}
        if len(scores) > 1:
            report["candidates"] = {k: float(f"{v:.4g}") for k, v in scores.items()}
        if groups and self.plan.channels == "auto":
            alike = self.validated(chosen, ())
            report["one coefficient for all channels"] = float(f"{alike:.4g}")
            groups, best = ((), alike) if alike <= best else (groups, best)
        if moves:
            chosen, report["moved nodes"] = self._moved(chosen, best, groups, moves)
        report["coefficients"] = "one for each channel" if groups else "one for all channels"
        tables = self._refined(calls, self.teacher.at(chosen), self._rows(self.inputs, chosen, groups), report)
        return self._judged(calls, tables, lambda nodes: spread(self._start(nodes, chosen), groups), report)

    def _refined(
        self, calls: int, nodes: Nodes, w: np.ndarray, report: dict[str, Any]
    ) -> list[tuple[Nodes, np.ndarray]]:
        """The table, and after as many rounds as cross-validation finds better; what they gained goes to the report."""
        if not self.plan.refine:
            return [(nodes, w)]
        if not self.runner.smooth:
            report["refined"] = "not at all: forward differences need a model in float32"
            return [(nodes, w)]
        refiner = Refiner(self.runner, self.teacher.images, moves=not self.plan.rounded)
        tables, rounds = refiner.rounds(self.plan.refine, self.inputs, nodes, w, self._under(f"refine/{calls}"))
        report["refined"] = rounds
        return tables

    def _under(self, folder: str) -> Memo:
        return lambda name, compute: self.memo(f"{folder}/{name}", compute)

    def _start(self, nodes: Nodes, chosen: Sequence[int]) -> np.ndarray:
        """Rows with less history, of the teacher's nodes; what they add to the analytic ones is added near them too."""
        made = partial(start_rows, self.teacher.gram, order=self.plan.order, ridge=self.plan.ridge)
        there = self.teacher.at(chosen)
        return made(nodes, None) + (made(there, chosen) - made(there, None))

    def _moved(
        self, chosen: list[int], best: float, groups: tuple[int, ...], moves: int
    ) -> tuple[list[int], dict[str, Any]]:
        """Better nodes near `chosen`, if cross-validation agrees, and what was tried.

        Inputs of one batch are scored in the very pass that fits their rows, which costs half of a cross-validation.
        """
        once = len(self.inputs) <= self.runner.batch
        score = partial(self._calibrated if once else self.validated, groups=groups)
        start = score(chosen) if once else best
        found, _, tried = descend(chosen, start, score, self.teacher.gram.size, moves)
        value = self.validated(found, groups)
        report = {"from": float(f"{best:.4g}"), "to": float(f"{value:.4g}"), "tried": tried}
        return (found if value < best else chosen), report

    def _calibrated(self, chosen: Sequence[int], groups: tuple[int, ...]) -> float:
        """Geometric mean of the errors of the very inputs that the rows are fitted to."""
        nodes, target, plan = self.teacher.at(chosen), self.teacher.target(chosen), self.plan

        def compute() -> Tensors:
            options: dict[str, Any] = {"order": plan.order, "ridge": plan.ridge, "groups": groups}
            _, images = fit_once(self.runner, self.inputs, nodes, target, **options)
            return {"e": relative(images, self._images(self.inputs))}

        return Errors("", self.memo(f"once/{_key(chosen, groups)}", compute)["e"]).geometric

    def _candidates(self, calls: int) -> dict[str, list[int]]:
        own = self.own(calls)
        found: dict[str, list[int]] = {}
        for name in self.plan.grids:
            chosen = choose(name, self.teacher.gram, self.teacher.nodes, calls, None if own is None else own[:-1])
            if chosen is not None and chosen not in found.values():
                found[name] = chosen
        if not found:
            raise OptionError(f"none of the grids {', '.join(self.plan.grids)} has {calls} nodes on this path")
        return found

    def _rows(self, inputs: Sequence[int], chosen: Sequence[int], groups: tuple[int, ...]) -> np.ndarray:
        plan, nodes = self.plan, self.teacher.at(chosen)
        self.again(chosen)
        target = self.teacher.target(chosen)

        def compute() -> Tensors:
            options: dict[str, Any] = {"order": plan.order, "ridge": plan.ridge, "groups": groups}
            return {"w": fit_rows(self.runner, inputs, nodes, target, **options)}

        return self.memo(f"rows/{_key(chosen, groups)}/{inputs[0]}-{inputs[-1]}", compute)["w"]

    def validated(self, chosen: Sequence[int], groups: tuple[int, ...]) -> float:
        """Geometric mean of the errors of each half of the inputs, with rows fitted to the other half."""
        half = len(self.inputs) // 2
        parts = [self.inputs[:half], self.inputs[half:]]
        errors = []
        for fitted, scored in (parts, parts[::-1]):
            w = self._rows(fitted, chosen, groups)
            name = f"{_key(chosen, groups)}/{scored[0]}"
            errors.append(self.errors(name, self.teacher.at(chosen), w, scored).values)
        return Errors("", np.concatenate(errors)).geometric

    def errors(self, name: str, nodes: Nodes, w: np.ndarray, inputs: Sequence[int]) -> Errors:
        """Relative errors of a table's images."""

        def compute() -> Tensors:
            return {"e": relative(images_of(self.runner, inputs, nodes, w), self._images(inputs))}

        return Errors(name, self.memo(f"errors/{name}", compute)["e"])

    # ------------------------------------------------------------------ guard
    def _judged(
        self,
        calls: int,
        tables: Sequence[tuple[Nodes, np.ndarray]],
        start: Callable[[Nodes], np.ndarray],
        report: dict[str, Any],
    ) -> Fitted:
        """The most refined table that the guard accepts, else an analytic one."""
        order, name = self.plan.order, "DDIM" if self.plan.order == 1 else "DPM++ 2M"
        for rounds, (nodes, w) in reversed(list(enumerate(tables))):
            others = {f"{name} on the chosen nodes": (nodes, analytic(nodes, order))} | self.usual(calls, order)
            found, instead = self.judged("fitted", calls, nodes, w, others, key=f"{calls}/{rounds}")
            if instead is None:
                return Fitted(nodes, w, start(nodes), report | found)
            if rounds:
                report.setdefault("refused", {})[f"round {rounds}"] = found["verdict"].removeprefix("analytic: ")
        assert instead is not None
        nodes, w = others[instead]
        return Fitted(nodes, w, start_rows(self.teacher.gram, nodes, None, order, self.plan.ridge), report | found)

    def usual(self, calls: int, order: int) -> Tables:
        """The analytic rows on the pipeline's own grid, where it has one."""
        own, name = self.own(calls), "DDIM" if order == 1 else "DPM++ 2M"
        return {} if own is None else {f"{name} on the pipeline's grid": (own, analytic(own, order))}

    def judged(
        self, what: str, calls: int, nodes: Nodes, w: np.ndarray, tables: Tables, key: str = ""
    ) -> tuple[dict[str, Any], str | None]:
        """Run rows on the held-out inputs beside baselines.

        Args:
            what: their name in the receipt ("fitted").
            calls: budget.
            nodes, w: the rows.
            tables: analytic ones, by name; the pipeline's present scheduler is a baseline too.
            key: names its pieces of work, where rows for these calls are judged more than once.

        Returns:
            (what the receipt says, None or the name of the table that stands in for the refused rows).
        """
        key = key or str(calls)
        calibration = self.errors(f"{key}/calibration", nodes, w, self.inputs).rmse
        mine = Errors(what, self.errors(f"{key}/{what}", nodes, w, self.held).values)
        analytics = [
            Errors(name, self.errors(f"{key}/{name}", *table, self.held).values) for name, table in tables.items()
        ]
        others = self.rivals(self.held, calls, self.teacher.images)
        found = judge(mine, [*analytics, *others[:1]], calibration)
        report = report_of(found, mine, calibration, analytics, others)
        if found.accepted:
            return report, None
        best = min(analytics, key=lambda e: e.geometric).name
        return report | {"table": best}, best


def _key(chosen: Sequence[int], groups: tuple[int, ...]) -> str:
    return "-".join(map(str, chosen)) + ("c" if groups else "")
