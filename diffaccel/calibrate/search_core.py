"""Searching a solver row by row: order, space, corrector and node of each call (USF, S^3). Knows no pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Any

import numpy as np

from ..core.path import Nodes
from ..errors import OptionError
from ..samplers.registry import get
from ..samplers.usf import HIGHEST, SPACES, Choice, Seen, advanced, correction
from .fit_rows import Gram, normalised, scale

GAIN = 0.005  # a change must lower the score by this much
MOST = 40  # nodes that the beam chooses among
DISTANCES = (1, 2, 4)  # of a node's moves, in the teacher's nodes
MULTISTEP = Choice()  # DPM-Solver++ 2M


@dataclass(frozen=True)
class Solver:
    """One candidate.

    Args:
        chosen: the nodes' places among the teacher's, from 0.
        rows: how each row is made.
    """

    chosen: tuple[int, ...]
    rows: tuple[Choice, ...]

    @property
    def key(self) -> str:
        """Short text, one for each solver."""
        made = ("".join((str(c.order), c.space[0], "c" * c.corrector)) for c in self.rows)
        return "-".join(map(str, self.chosen)) + ":" + ".".join(made)

    def weights(self, nodes: Nodes) -> np.ndarray:
        """The normalised rows on `nodes` (with their end), (N, m + 1)."""
        return weights(nodes, self.rows)

    def plan(self) -> list[dict[str, Any]]:
        """For the receipt and for `rows=` of the sampler "usf"."""
        return [choice._asdict() for choice in self.rows]


def weights(nodes: Nodes, rows: Sequence[Choice]) -> np.ndarray:
    """Normalised rows of the sampler "usf"."""
    table = get("usf").trace(nodes, rows=list(rows))
    return normalised(table, table.depth)


def start_rows(nodes: Nodes, rows: Sequence[Choice], order: int) -> np.ndarray:
    """(N, order - 1, order + 1): the rows of runs that begin later; see `samplers.fitted.Rows`."""
    n = len(rows)
    found = np.zeros((n, order - 1, order + 1))
    for first in range(n):
        w = weights(nodes[first:], rows[first:])
        for past in range(min(order - 1, n - first)):
            found[first + past, past, : w.shape[1]] = w[past]
    return found


def kinds(order: int = HIGHEST, spaces: Sequence[str] = SPACES, correctors: bool = True) -> list[Choice]:
    """Every way to make a row; first-order rows without a corrector are the same in every space."""
    found = [Choice(o, s, c) for o, s, c in product(range(1, order + 1), spaces, (False, True)[: 1 + correctors])]
    return [c for c in found if c.order > 1 or c.corrector or c.space == spaces[0]]


# ---------------------------------------------------------------------- on the Gram matrix
class Costs:
    """Mean squared residuals of analytic rows between states of the teacher: exact, and without a model call.

    A row with a corrector is judged by its corrected state. The row is computed by the sampler's own functions, on
    vectors of coefficients.

    Args:
        gram: of the teacher.
        nodes: the teacher's, with its end.
        choices: of a row.
    """

    def __init__(self, gram: Gram, nodes: Nodes, choices: Sequence[Choice]) -> None:
        self.gram, self.nodes, self.choices = gram, nodes, list(choices)
        self.products = gram.products
        self._known: dict[tuple[Any, ...], float] = {}

    def best(self, past: tuple[int, ...], j: int) -> tuple[float, Choice]:
        """The least residual from `past` (places, newest first) to place j (the end counts as one more)."""
        able = [c for c in self.choices if c.order <= max(len(past), 1)]
        return min(((self.of(past, j, c), c) for c in able), key=lambda pair: pair[0])

    def of(self, past: tuple[int, ...], j: int, choice: Choice) -> float:
        """The residual of one row."""
        key = (past[: choice.order], j, choice)
        if key not in self._known:
            self._known[key] = self._residual(*key)
        return self._known[key]

    def _residual(self, past: tuple[int, ...], j: int, choice: Choice) -> float:
        gram, nodes = self.gram, self.nodes
        last = j == gram.size
        f = [k for i in past for k in (i, gram.d(i))] + ([] if last else [gram.d(j)])
        unit = np.eye(len(f))
        seen = [Seen(nodes[i], unit[2 * k + 1], scale(nodes[i]) * unit[2 * k]) for k, i in enumerate(past)]
        state, made = advanced(seen[0].x, seen, nodes[j], choice)
        if choice.corrector and made is not None:
            state = state + correction(made, Seen(nodes[j], unit[-1], state))
        w, target = state / scale(nodes[j]), gram.target if last else j
        g = self.products
        return max(float(g[target, target] - 2 * w @ g[f, target] + w @ g[np.ix_(f, f)] @ w), 0.0)


def beam(
    costs: Costs, calls: int, *, width: int = 4, places: Sequence[int] | None = None, power: float = 2.0, keep: int = 1
) -> list[tuple[float, Solver]]:
    """Solvers of least total residual along the teacher's trajectory.

    A row's residual depends on its node and the nodes before it that a row of the highest order combines; for each
    number of calls and each node the `width` best histories are kept. With all of them the result is the optimum.

    Args:
        places: the nodes to choose among, from 0; None: all of the teacher's.
        power: 2 sums mean squares, 1 their roots.
        keep: how many solvers are returned, best first, each on other nodes.

    Raises:
        OptionError: if there are not so many nodes.
    """
    size, deep = costs.gram.size, max(c.order for c in costs.choices)
    free = list(range(size)) if places is None else list(places)
    if not 1 <= calls <= len(free):
        raise OptionError(f"{calls} calls cannot be placed on {len(free)} nodes")
    states = [(0.0, Solver((0,), ()))]
    for row in range(calls - 1):
        left = calls - 2 - row
        found: dict[tuple[int, ...], tuple[float, Solver]] = {}
        for (value, solver), j in product(states, free[: len(free) - left]):
            if j > solver.chosen[-1]:
                _keep(found, _longer(costs, value, solver, j, power, deep), deep)
        states = _best_each(found, width)
    ends = [_longer(costs, value, solver, size, power, deep) for value, solver in states]
    return sorted(ends, key=lambda entry: entry[0])[:keep]


def _longer(costs: Costs, value: float, solver: Solver, j: int, power: float, deep: int) -> tuple[float, Solver]:
    cost, choice = costs.best(solver.chosen[: -deep - 1 : -1], j)
    chosen = solver.chosen if j == costs.gram.size else (*solver.chosen, j)
    return value + cost ** (power / 2), Solver(chosen, (*solver.rows, choice))


def _keep(found: dict[tuple[int, ...], tuple[float, Solver]], entry: tuple[float, Solver], deep: int) -> None:
    key = entry[1].chosen[-deep:]
    if key not in found or entry[0] < found[key][0]:
        found[key] = entry


def _best_each(found: dict[tuple[int, ...], tuple[float, Solver]], width: int) -> list[tuple[float, Solver]]:
    """The `width` best histories of each last node."""
    taken: dict[int, int] = {}
    kept = []
    for key, entry in sorted(found.items(), key=lambda item: item[1][0]):
        if taken.get(key[-1], 0) < width:
            taken[key[-1]] = taken.get(key[-1], 0) + 1
            kept.append(entry)
    return kept


def thinned(size: int, most: int = MOST) -> list[int]:
    """Every k-th place of `size`, so that there are at most `most` of them."""
    return list(range(0, size, -(-size // most)))


# ---------------------------------------------------------------------- on runs
def neighbours(solver: Solver, choices: Sequence[Choice], size: int) -> Iterator[Solver]:
    """Solvers that differ in one row's kind or one node, in a fixed shuffled order."""
    n = len(solver.rows)
    made: list[Solver] = []
    for i, choice in product(range(n), choices):
        if choice != solver.rows[i] and choice.order <= max(i + 1, 1) and not (choice.corrector and i == n - 1):
            made.append(replace(solver, rows=(*solver.rows[:i], choice, *solver.rows[i + 1 :])))
    for i, by in product(range(1, n), (*DISTANCES, *(-d for d in DISTANCES))):
        moved = (*solver.chosen[:i], solver.chosen[i] + by, *solver.chosen[i + 1 :])
        if all(a < b for a, b in pairwise((*moved, size))):
            made.append(replace(solver, chosen=moved))
    yield from (made[k] for k in np.random.default_rng(n).permutation(len(made)))


def improved(
    solver: Solver, best: float, score: Callable[[Solver], float], choices: Sequence[Choice], size: int, trials: int
) -> tuple[Solver, float, int]:
    """Change one thing at a time, as long as the score falls.

    Returns:
        (solver, score, how many were scored).
    """
    seen = {solver.key}
    better = True
    while better:
        better = False
        for other in neighbours(solver, choices, size):
            if other.key in seen:
                continue
            if len(seen) > trials:
                return solver, best, trials
            seen.add(other.key)
            value = score(other)
            if value < (1 - GAIN) * best:
                solver, best, better = other, value, True
                break
    return solver, best, len(seen) - 1
