"""Least squares for rows: the Gram matrix of a teacher's trajectories, and ridge regression towards analytic rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..core.node import Node
from ..core.table import Row, Table
from ..errors import OptionError, RunError

BLOCK = 1 << 16  # elements that are turned into float64 at once


def scale(node: Node) -> float:
    """`hypot(alpha, sigma)`: what a state is divided by, so that all noise levels weigh alike (1 on VP paths)."""
    return math.hypot(node.alpha, node.sigma)


class Gram:
    """Mean products of the normalised states U_k and predictions D_k of a teacher, k = 0..K.

    Args:
        size: K + 1.
        products: (2 size, 2 size) float64, means over elements; U_k is index k, D_k index size + k.
        elements: how many elements entered.
    """

    def __init__(self, size: int, products: np.ndarray | None = None, elements: int = 0) -> None:
        self.size, self.elements = size, elements
        self._sum = np.zeros((2 * size, 2 * size)) if products is None else products * max(elements, 1)

    def add(self, states: Sequence[np.ndarray], predictions: Sequence[np.ndarray]) -> None:
        """One batch: K + 1 states and predictions of one shape. Sums are kept, so that batches do not matter."""
        rows = [np.asarray(v).reshape(-1) for v in (*states, *predictions)]
        for start in range(0, rows[0].size, BLOCK):
            block = np.stack([r[start : start + BLOCK] for r in rows]).astype(np.float64)
            self._sum += block @ block.T
        self.elements += rows[0].size

    def merge(self, other: Gram) -> None:
        """Add what another one of the same size saw."""
        self._sum += other.products * other.elements
        self.elements += other.elements

    @property
    def products(self) -> np.ndarray:
        """The mean products, (2 size, 2 size)."""
        return self._sum / max(self.elements, 1)

    def d(self, k: int) -> int:
        """The index of D_k."""
        return self.size + k

    @property
    def target(self) -> int:
        """The index of the image: the last prediction."""
        return self.d(self.size - 1)


def best_weights(
    gram: np.ndarray, features: Sequence[int], target: int, ridge: float, base: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """(weights, mean squared residual) of the best row from `features` to `target` (indices of `gram`).

    Args:
        ridge: as of `ridge_solve`.
        base: weights that the ridge pulls to; 0 if None.
    """
    f = list(features)
    a, b = gram[np.ix_(f, f)], gram[f, target]
    w = ridge_solve(a, b, ridge, np.zeros(len(f)) if base is None else base)
    return w, float(gram[target, target] - 2 * w @ b + w @ a @ w)


def ridge_solve(a: np.ndarray, b: np.ndarray, ridge: float, base: np.ndarray) -> np.ndarray:
    """`w = base + (A + ridge s I)^-1 (b - A base)`, s the mean of A's diagonal.

    Args:
        a: (m, m) mean products of the features, b: (m,) of the features with the target.
        ridge: 0 is least squares; infinity gives `base` back.

    Raises:
        RunError: for values that are not finite, or a matrix that cannot be inverted.
    """
    if not (np.all(np.isfinite(a)) and np.all(np.isfinite(b))):
        raise RunError("the model's outputs are not finite, so no row can be fitted to them")
    m = len(b)
    matrix = a + ridge * np.trace(a) / m * np.eye(m)
    try:
        return base + np.linalg.solve(matrix, b - a @ base)
    except np.linalg.LinAlgError:
        raise RunError(
            "the features of a row depend on each other exactly, so its coefficients are not determined; are all "
            "inputs equal (the same seed)? Else pass a ridge above 0"
        ) from None


def moments(features: Sequence[np.ndarray], target: np.ndarray, groups: tuple[int, ...] = ()) -> np.ndarray:
    """Mean products of m features with (features, target), (G, m, m + 1) float64.

    Args:
        features, target: (B, *shape).
        groups: broadcasts to `shape`; elements that share an entry of it belong together. () is one group of all.
    """
    m, count = len(features), int(np.prod(groups))
    rows = [_grouped(v, groups) for v in (*features, target)]
    total = np.zeros((count, m, m + 1))
    size = rows[0].shape[1]
    block = max(1, BLOCK // count)
    for start in range(0, size, block):
        part = np.stack([r[:, start : start + block] for r in rows], axis=1).astype(np.float64)
        total += part[:, :m] @ part.swapaxes(1, 2)
    return total / size


def _grouped(v: np.ndarray, groups: tuple[int, ...]) -> np.ndarray:
    """(G, elements of a group) of v (B, *shape)."""
    axes = [k + 1 for k, n in enumerate(groups) if n > 1]
    return np.moveaxis(v, axes, range(len(axes))).reshape(int(np.prod(groups)), -1)


def solved(products: np.ndarray, ridge: float, base: np.ndarray, groups: tuple[int, ...]) -> np.ndarray:
    """The ridge solutions (m, *groups) of `moments`; `base` (m,) is what the ridge pulls to."""
    m = len(base)
    w = np.stack([ridge_solve(p[:, :m], p[:, m], ridge, base) for p in products], axis=1)
    return w.reshape(m, *groups)


def spread(rows: np.ndarray, groups: tuple[int, ...]) -> np.ndarray:
    """The same coefficients for every group: (..., *groups) of rows (...)."""
    return np.array(np.broadcast_to(rows.reshape(*rows.shape, *(1 for _ in groups)), (*rows.shape, *groups)))


# ---------------------------------------------------------------------- analytic rows
def normalised(table: Table, order: int) -> np.ndarray:
    """The rows of a table of data predictions, (N, order + 1), for normalised states.

    Raises:
        OptionError: if a row holds more than the state and `order` predictions.
    """
    w = np.zeros((len(table), order + 1))
    for i, row in enumerate(table.rows):
        w[i, : len(row.out.p) + 1] = _row(row, order)
    return w


def _row(row: Row, order: int) -> list[float]:
    mix = row.out
    if row.space != "x0" or mix.m or mix.z or row.registers or not mix.scalar or len(mix.p) > order:
        raise OptionError(f"a row of {len(mix.p)} predictions in space {row.space!r} is none of order {order}")
    here, there = scale(row.node), scale(row.next)
    return [float(mix.x) * here / there, *(float(b) / there for b in mix.p)]
