"""The checks that every registered sampler goes through. Each returns a `Result`; none raises for a failure.

All of them look at the table as a linear map of what it is given (start, predictions, noise), or run it on an
analytic problem, so each takes milliseconds and needs neither torch nor diffusers.
"""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..core.grid import nodes as grid_nodes
from ..core.node import Node
from ..core.path import Nodes, Path
from ..core.prediction import Prediction, Space, convert
from ..core.table import Table
from ..samplers.registry import Sampler
from .convergence import ode_slope, rms, uniform, weak_slope
from .problems import four_modes
from .runs import PATHS, Options, invariant, point_mass_error, run_cases, run_nodes, scales, traced

EXACT = 1e-9
LARGEST = 1e3  # state of a run with predictions in [-1, 1], in units of `hypot(alpha, sigma)`


@dataclass(frozen=True)
class Result:
    """What a check found.

    Args:
        name: of the check.
        passed: whether `value` is within `limit`.
        value, limit: measured and allowed (what they measure is in the check's docstring).
        detail: where the value was found, or what went wrong.
    """

    name: str
    passed: bool
    value: float
    limit: float
    detail: str = ""

    def __str__(self) -> str:
        verdict = "ok" if self.passed else "FAILED"
        return f"{self.name}: {verdict} ({self.value:.3g}, limit {self.limit:.3g}) {self.detail}".rstrip()


Check = Callable[[Sampler, Options], Result]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Register a check; an exception inside it becomes a failed result that says which."""
    name = function.__name__.removeprefix("check_")

    @functools.wraps(function)
    def guarded(sampler: Sampler, options: Options = {}) -> Result:  # noqa: B006 (never changed)
        try:
            return function(sampler, options)
        except Exception as error:
            return Result(name, False, math.inf, 0.0, f"{type(error).__name__}: {error}")

    CHECKS[name] = guarded
    return guarded


def worst(name: str, limit: float, found: Iterator[tuple[float, str]]) -> Result:
    """The largest of many (value, where); NaN counts as infinite."""
    top = max(((math.inf if math.isnan(v) else v, where) for v, where in found), key=lambda e: e[0])
    return Result(name, top[0] <= limit, top[0], limit, top[1])


# ---------------------------------------------------------------------- the checks
@check
def check_point_mass(sampler: Sampler, options: Options = {}) -> Result:  # noqa: B006
    """For data that is one point every row is exact (mean; noise; variance where noise is drawn), begun anywhere."""

    def found() -> Iterator[tuple[float, str]]:
        for label, path, calls, grid, final in run_cases(((1, "sigma_min"), (4, "zero"), (7, "sigma_min"))):
            if grid in ("linspace_open", "karras"):
                nodes = run_nodes(sampler, options, path, calls, grid, final)
                for k in range(0, len(nodes) - 1, 1 if final == "zero" else 3):
                    yield point_mass_error(sampler.trace(nodes[k:], **options)), f"{label}, begun at node {k}"

    return worst("point_mass", EXACT, found())


@check
def check_path_invariance(sampler: Sampler, options: Options = {}) -> Result:  # noqa: B006
    """Equal signal-to-noise ratios on VP, EDM and flow paths give equal states up to their scale, noise included."""

    def found() -> Iterator[tuple[float, str]]:
        for name, make in _SNR_NODES.items():
            tables = {p: sampler.trace(make(PATHS[p]), **options) for p in ("vp_zero_snr", "edm", "flow")}
            true = invariant(tables.pop("vp_zero_snr"))
            for other, table in tables.items():
                if np.shape(invariant(table)) == true.shape:
                    yield float(np.max(np.abs(invariant(table) - true))), f"vp against {other}, {name}"
                elif "pure noise" not in name:  # EDM has no node of pure noise
                    yield math.inf, f"vp and {other} differ in their calls, {name}"

    return worst("path_invariance", EXACT, found())


def _snr_nodes(n: int, *, noise: bool = False, zero: bool = False) -> Callable[[Path], Nodes]:
    def make(path: Path) -> Nodes:
        body = [path.at_lam(float(v)) for v in np.linspace(-2.2, 2.6, n + 1) + 0.11 * np.sin(np.arange(n + 1))]
        head = [path.first] if noise and path.first.alpha == 0 else []
        return Nodes([*head, *body, *([path.end] if zero else [])], path)

    return make


_SNR_NODES = {
    "8 steps": _snr_nodes(8),
    "8 steps to sigma = 0": _snr_nodes(8, zero=True),
    "from pure noise to sigma = 0": _snr_nodes(6, noise=True, zero=True),
    "1 step": _snr_nodes(1),
}


@check
def check_order(sampler: Sampler, options: Options = {}) -> Result:  # noqa: B006
    """The measured order is the declared one, within 0.2.

    Deterministic: full rows against the exact flow of a mixture of four modes. Stochastic: mean and standard deviation
    for Gaussian data, with the noise averaged exactly; a linear problem may show a higher order than others would, so
    there the declared order is only a lower limit.
    """
    declared = sampler.order_of(**options)
    if draws(sampler, options):
        weak = weak_slope(sampler, options)
        return Result("order", weak.value >= declared - 0.2, weak.value, declared, f"weak {weak}")
    slope = ode_slope(sampler, options)
    return Result("order", abs(slope.value - declared) <= 0.2, slope.value, declared, str(slope))


@check
def check_start(sampler: Sampler, options: Options = {}) -> Result:  # noqa: B006
    """With its start and end in the measurement, a deterministic method of order p has at least min(p, 2)."""
    least = min(sampler.order_of(**options), 2.0)
    if draws(sampler, options):
        return Result("start", True, least, least, "measured as weak order")
    slope = ode_slope(sampler, options, window=False, counts=(80, 160))
    return Result("start", slope.value >= least - 0.2, slope.value, least, str(slope))


def draws(sampler: Sampler, options: Options) -> bool:
    """Whether the sampler draws noise with these options."""
    return sampler.trace(uniform(PATHS["edm"], 6), **options).stochastic


@check
def check_begin_anywhere(sampler: Sampler, options: Options = {}) -> Result:  # noqa: B006
    """Begun at any node with the exact state, the error is at most 1.5 times that of first-order steps from there.

    Deterministic samplers only; for all, the rows from any node on are checked by `point_mass` and `finite`.
    """
    if draws(sampler, options):
        return Result("begin_anywhere", True, 0.0, 1.5, "stochastic: see point_mass and finite")
    nodes, states, euler = _exact_states()

    def found() -> Iterator[tuple[float, str]]:
        for k, x in enumerate(states[:-1]):
            ours = sampler.trace(nodes[k:], **options).apply(x, four_modes().predict)
            yield rms(ours - states[-1]) / (euler[k] + 1e-7), f"begun at node {k} of {len(nodes) - 1}"

    return worst("begin_anywhere", 1.5, found())


@functools.cache
def _exact_states() -> tuple[Nodes, list[np.ndarray], list[float]]:
    """Nodes, exact states of 32 particles at each, and the error of first-order steps begun at each but the last."""
    problem, path = four_modes(), PATHS["vp"]
    nodes = grid_nodes(path, 18, "uniform_lambda", final="sigma_min")
    states = [problem.draw(np.random.default_rng(1), 32, nodes[0])]
    for s, t in pairwise(nodes):
        states.append(problem.flow(states[-1], s, t, 1e-10))
    errors = []
    for k, x in enumerate(states[:-1]):
        for s, t in pairwise(nodes[k:]):
            x = t.alpha * problem.denoise(x, s) + t.sigma * problem.noise(x, s)
        errors.append(rms(x - states[-1]))
    return nodes, states, errors


@check
def check_calls(sampler: Sampler, options: Options = {}) -> Result:  # noqa: B006
    """N model calls asked are N model calls made, N = 1..50, and each interval of the grid opens at one row.

    An interval whose level is raised first (churn) opens at no node of the grid; where that is so, the rows are counted
    only.
    """

    def found() -> Iterator[tuple[float, str]]:
        for calls in range(1, 51):
            nodes = run_nodes(sampler, options, PATHS["vp"], calls, "linspace_open")
            table = sampler.trace(nodes, calls, **options)
            yield abs(len(table) - calls), f"{len(table)} calls for {calls}"
            opened = [row.node.key for row in table.rows if row.opens]
            levels = {n.key for n in nodes}
            raised = any(row.draws and row.next.key not in levels for row in table.rows)
            yield (
                float(not raised and opened != [n.key for n in nodes[:-1]]),
                f"rows that open intervals, {calls} calls",
            )
            yield float(table.rows[-1].next.key != nodes[-1].key), f"where the run ends, {calls} calls"

    return worst("calls", 0.0, found())


@check
def check_functional(sampler: Sampler, options: Options = {}) -> Result:  # noqa: B006
    """The loop run with arrays passes through the states of its table, with the same noise replayed."""
    problem = four_modes()

    def found() -> Iterator[tuple[float, str]]:
        for name, final, calls in (("vp", "zero", 9), ("edm", "sigma_min", 8), ("flow_shift3", "zero", 7)):
            nodes = run_nodes(sampler, options, PATHS[name], calls, "linspace_open", final)
            x = nodes[0].sigma * np.random.default_rng(2).standard_normal((5, 2))
            seen: list[np.ndarray] = []

            def predict(state: np.ndarray, node: Node, seen: list[np.ndarray] = seen) -> np.ndarray:
                seen.append(state)
                return problem.denoise(state, node)

            seen.append(sampler.run(x, nodes, predict, _replay(), calls, **options))
            table = sampler.trace(nodes, calls, **options)
            states = table.apply(x, problem.predict, _replay(), trajectory=True)
            if len(seen) != len(states):
                yield math.inf, f"{name}: {len(seen) - 1} calls by the loop, {len(table)} by its table"
                continue
            for i, (a, b) in enumerate(zip(seen, states, strict=True)):
                yield float(np.max(np.abs(a - b)) / (1 + np.max(np.abs(b)))), f"{name}, state {i}"

    return worst("functional", 1e-10, found())


def _replay() -> Callable[[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(3)
    return lambda x: rng.standard_normal(x.shape)


@check
def check_edits(sampler: Sampler, options: Options = {}) -> Result:  # noqa: B006
    """An edit of the state moves the next state by `row.a` times itself, and `a > 0` while noise is left."""
    table = traced(sampler, options, PATHS["vp"], 8, "linspace_open", "sigma_min")
    problem, edit = four_modes(), np.array([0.5, -0.25])
    x = np.random.default_rng(4).standard_normal((3, 2))
    plain, fed = _edited(table, x, problem.predict, None, edit)

    def found() -> Iterator[tuple[float, str]]:
        for i, row in enumerate(table.rows):
            replay = iter(fed)
            moved, _ = _edited(table, x, lambda *_, r=replay: next(r), i, edit)
            yield float(np.max(np.abs(moved[i + 1] - plain[i + 1] - row.a * edit))), f"row {i}, a = {row.a}"
            yield float(row.a <= 0 and row.next.sigma > 0), f"row {i} forgets the state it is handed: a = {row.a}"

    return worst("edits", EXACT, found())


def _edited(
    table: Table, x: np.ndarray, predict: Any, at: int | None, edit: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """States and predictions of a run in which the state handed to row `at` is edited."""
    fed: list[np.ndarray] = []

    def call(state: np.ndarray, node: Node, space: Space) -> np.ndarray:
        fed.append(predict(state, node, space))
        if len(fed) - 1 == at:
            state += edit  # in place: the row combines the edited state
        return fed[-1]

    return table.apply(x.copy(), call, _replay(), trajectory=True), fed


@check
def check_serial(sampler: Sampler, options: Options = {}) -> Result:  # noqa: B006
    """JSON, pickle and deepcopy of a table give an equal table with an equal hash; other nodes give another."""
    table = traced(sampler, options, PATHS["vp"], 6, "karras")
    copies = {
        "json": Table.from_json(table.to_json()),
        "pickle": pickle.loads(pickle.dumps(table)),
        "deepcopy": copy.deepcopy(table),
    }
    wrong = [k for k, t in copies.items() if t != table or hash(t) != hash(table) or t.to_json() != table.to_json()]
    if traced(sampler, options, PATHS["vp"], 6, "linspace") == table:
        wrong.append("equal to the table of another grid")
    return Result("serial", not wrong, float(len(wrong)), 0.0, ", ".join(wrong))


@check
def check_batch(sampler: Sampler, options: Options = {}) -> Result:  # noqa: B006
    """Bit for bit, an image does not depend on the batch that it is in."""
    table = traced(sampler, options, PATHS["flow"], 7, "trailing")
    x = np.random.default_rng(5).standard_normal((4, 3, 2))
    z = np.random.default_rng(6).standard_normal((table.noise_depth and 40, 4, 3, 2))

    def run(pick: Any) -> np.ndarray:
        fresh = iter(z)
        return table.apply(x[pick], _elementwise, lambda _: next(fresh)[pick])

    together = run(slice(None))
    different = sum(not np.array_equal(together[i : i + 1], run(slice(i, i + 1))) for i in range(len(x)))
    return Result("batch", different == 0, float(different), 0.0, "images that changed")


def _elementwise(x: np.ndarray, node: Node, space: Space) -> np.ndarray:
    out: np.ndarray = convert(Prediction(np.tanh(node.alpha * x / (0.25 + node.sigma**2))), space, x, node)
    return out


@check
def check_finite(sampler: Sampler, options: Options = {}) -> Result:  # noqa: B006
    """No run on any path, grid, number of calls, end or first node blows up for predictions in [-1, 1].

    The value is the largest state, in units of `hypot(alpha, sigma)`.
    """
    runs = ((1, "zero"), (1, "sigma_min"), (2, "zero"), (2, "sigma_min"), (3, "sigma_min"), (5, "zero"), (16, "zero"))

    def found() -> Iterator[tuple[float, str]]:
        for label, path, calls, grid, final in run_cases(runs):
            yield growth(traced(sampler, options, path, calls, grid, final)), label
        for i, (name, path) in enumerate(PATHS.items()):
            for grid in ("linspace_open", "trailing", ("karras", "uniform_lambda")[i % 2]):
                yield growth(traced(sampler, options, path, 50, grid)), f"{name}, {grid}, 50 calls"
            nodes = run_nodes(sampler, options, path, 9, "linspace")
            for k in range(len(nodes) - 1):
                yield growth(sampler.trace(nodes[k:], **options)), f"{name}, linspace, begun at node {k}"

    return worst("finite", LARGEST, found())


def growth(table: Table) -> float:
    """The largest state of a run with predictions in [-1, 1], in units of `hypot(alpha, sigma)`; inf if not finite."""
    first = table.nodes[0]
    x = math.hypot(first.alpha, first.sigma) * np.array([-2.0, -0.3, 0.0, 0.7, 2.5])
    states = table.apply(x, _elementwise, lambda v: np.cos(np.arange(v.size) + v), trajectory=True)
    size = np.array(states) / scales(table)[:, None]
    return float(np.max(np.abs(size))) if np.all(np.isfinite(size)) else math.inf
