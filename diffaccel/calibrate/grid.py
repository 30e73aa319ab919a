"""Choosing nodes among a teacher's: dynamic programming on the Gram matrix, and what else may be tried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, product

import numpy as np

from ..core.families import VP
from ..core.grid import nodes as grid_nodes
from ..core.node import Node
from ..core.path import Nodes, Path
from ..core.trace import first_order
from ..errors import OptionError, one_of
from .fit_rows import Gram, scale

GAIN = 0.005  # a move must lower the score by this much
RIDGE = 1e-6  # relative; keeps the rows of the search finite
GITS = 1.15  # weight of later rows (zju-pi/diff-sampler, gits: `coeff`)
GRIDS = AUTO = ("dp2", "dp1", "gits", "time", "quadratic", "lam", "own")


def teacher_nodes(path: Path, steps: int, *, rounded: bool = False) -> Nodes:
    """The steps + 1 nodes of a teacher, uniform in lam, and its end.

    A first node of pure noise is kept; the others then begin where sigma/alpha = 199 (sigma = 0.995 on a flow path).

    Args:
        rounded: to whole training steps, for models that embed integers (VP paths only; equal ones are merged).
    """
    lowest = path.last.lam
    if path.first.alpha > 0:
        lams = np.linspace(path.first.lam, lowest, steps + 1)[1:]
        found = [path.first, *(path.at_lam(float(v)) for v in lams[:-1]), path.last]
    else:
        lams = np.linspace(-np.log(199.0), lowest, steps)
        found = [path.first, *(path.at_lam(float(v)) for v in lams[:-1]), path.last]
    if rounded:
        if not isinstance(path, VP):
            raise OptionError("rounded=True is for paths with training steps (VP)")
        found = [path.at(t) for t in dict.fromkeys(float(round(node.t)) for node in found)]
    return Nodes([*found, path.end], path)


# ---------------------------------------------------------------------- dynamic programming
def costs(gram: Gram, ridge: float = RIDGE) -> tuple[np.ndarray, np.ndarray]:
    """Mean squared residuals of the best rows of three features.

    Returns:
        `first` (K + 2,): of the row from node 0, without history, to node j; entry K + 1 is the image.
        `c` (K + 1, K + 1, K + 2): `c[p, i, j]` of the row from i, the previous node being p, to node j or the image;
        inf unless p < i < j.
    """
    g, size = gram.products, gram.size
    targets = np.array([*range(size), gram.target])
    first = _residuals(g, np.array([[0, gram.d(0)]]), targets, ridge)[0]
    first[0] = np.inf
    c = np.full((size, size, size + 1), np.inf)
    for i in range(1, size):
        p = np.arange(i)
        features = np.stack([np.full(i, i), np.full(i, gram.d(i)), gram.d(0) + p], axis=1)
        c[p, i, i + 1 :] = _residuals(g, features, targets[i + 1 :], ridge)
    return first, c


def _residuals(g: np.ndarray, features: np.ndarray, targets: np.ndarray, ridge: float) -> np.ndarray:
    """(sets, targets) mean squared residuals of features (sets, m)."""
    a = g[features[:, :, None], features[:, None, :]]
    b = g[features[:, :, None], targets[None, None, :]]
    m = features.shape[1]
    level = ridge * np.trace(a, axis1=1, axis2=2) / m
    w = np.linalg.solve(a + level[:, None, None] * np.eye(m), b)
    fitted = 2 * np.einsum("sft,sft->st", w, b) - np.einsum("sft,sfe,set->st", w, a, w)
    return np.maximum(g[targets, targets] - fitted, 0.0)


def shortest(first: np.ndarray, c: np.ndarray, calls: int, power: float = 2.0) -> tuple[list[int], float]:
    """The `calls` nodes, from node 0, of least total cost.

    Args:
        first, c: of `costs`.
        power: 2 sums mean squares; 1 sums their roots, as GITS sums norms.

    Returns:
        (indices, total cost).

    Raises:
        OptionError: if there are not so many nodes.
    """
    size = len(c)
    if not 1 <= calls <= size:
        raise OptionError(f"{calls} calls cannot be placed on {size} nodes")
    first, c = (first, c) if power == 2 else (first ** (power / 2), c ** (power / 2))
    if calls == 1:
        return [0], float(first[-1])
    value = np.full((size, size), np.inf)
    value[0] = first[:-1]
    back = []
    for _ in range(calls - 2):
        total = value[:, :, None] + c[:, :, :-1]
        back.append(np.argmin(total, axis=0))
        value = np.min(total, axis=0)
    end = value + c[:, :, -1]
    p, i = np.unravel_index(int(np.argmin(end)), end.shape)
    cost, found = float(end[p, i]), [int(i), int(p)]
    for best in reversed(back):
        found.append(int(best[found[-1], found[-2]]))
    return found[::-1], cost


def gits(gram: Gram, nodes: Sequence[Node], calls: int, weight: float = GITS) -> list[int]:
    """Nodes by GITS' rule (arXiv:2405.11326): first-order steps against the teacher's states, later ones weigh more.

    `V[k][i] = min_j c[i, j] + weight V[k - 1][j]`, c the root mean square error of a first-order step i -> j.
    """
    g, size = gram.products, gram.size
    ends = [*range(size), gram.target]
    c = np.full((size, size + 1), np.inf)
    for i in range(size):
        for j in range(i + 1, size + 1):
            end = nodes[j]
            x, d = first_order(nodes[i], end)
            w = np.array([x * scale(nodes[i]) / scale(end), d / scale(end)])
            f = [i, gram.d(i)]
            left = g[ends[j], ends[j]] - 2 * w @ g[f, ends[j]] + w @ g[np.ix_(f, f)] @ w
            c[i, j] = np.sqrt(max(left, 0.0))
    return chain(c, calls, weight)


def chain(c: np.ndarray, calls: int, weight: float = 1.0) -> list[int]:
    """The `calls` places, from 0, whose steps cost least; what follows a step counts `weight` times.

    Args:
        c: (K, K + 1), `c[i, j]` of a step from place i to place j, inf unless i < j; place K is the end.
    """
    value, back = c[:, -1], []
    for _ in range(calls - 1):
        total = c[:, :-1] + weight * value[None, :]
        back.append(np.argmin(total, axis=1))
        value = np.min(total, axis=1)
    found = [0]
    for best in reversed(back):
        found.append(int(best[found[-1]]))
    return found


# ---------------------------------------------------------------------- other grids
def snapped(wanted: Sequence[Node], nodes: Sequence[Node]) -> list[int] | None:
    """The nearest of `nodes` (noisiest first) to each wanted one, by angle; None where two fall together."""
    have = np.array([np.arctan2(node.sigma, node.alpha) for node in nodes])
    found = [int(np.argmin(np.abs(have - np.arctan2(node.sigma, node.alpha)))) for node in wanted]
    found[0] = 0
    return found if all(i < j for i, j in pairwise(found)) else None


def choose(name: str, gram: Gram, nodes: Nodes, calls: int, own: Sequence[Node] | None) -> list[int] | None:
    """The indices of the `calls` nodes of a candidate; None where the candidate does not exist.

    Args:
        name: of `GRIDS`.
        nodes: the teacher's, with its end.
        own: the calls of the pipeline's own grid, for "own".
    """
    one_of("grid", name, GRIDS)
    if name in ("dp1", "dp2"):
        return shortest(*costs(gram), calls, power=float(name[-1]))[0]
    if name == "gits":
        return gits(gram, nodes, calls)
    if name == "own":
        return None if own is None else snapped(own, nodes[:-1])
    kind = {"time": "linspace_open", "quadratic": "quadratic", "lam": "uniform_lambda"}[name]
    return snapped(grid_nodes(nodes.path, calls, kind)[:-1], nodes[:-1])


def descend(
    chosen: Sequence[int], best: float, score: Callable[[list[int]], float], size: int, most: int
) -> tuple[list[int], float, int]:
    """Move one node at a time, by ever smaller distances, as long as the score falls.

    Args:
        chosen: increasing indices below `size`; the first stays.
        best: their score.
        score: of a choice.
        most: how many choices are scored.

    Returns:
        (indices, score, how many were scored).
    """
    found, seen = list(chosen), {tuple(chosen)}
    for distance in _distances(found, size):
        better = True
        while better:
            better = False
            for i, by in product(range(1, len(found)), (distance, -distance)):
                moved = [*found[:i], found[i] + by, *found[i + 1 :]]
                ends = [*moved, size]
                if tuple(moved) in seen or not ends[i - 1] < ends[i] < ends[i + 1]:
                    continue
                if len(seen) > most:
                    return found, best, most
                seen.add(tuple(moved))
                value = score(moved)
                if value < (1 - GAIN) * best:
                    found, best, better = moved, value, True
    return found, best, len(seen) - 1


def _distances(chosen: Sequence[int], size: int) -> list[int]:
    """A third of the mean gap, half of that, half again."""
    first = max(1, round(size / len(chosen) / 3))
    return sorted({max(1, first // k) for k in (1, 2, 4)}, reverse=True)
