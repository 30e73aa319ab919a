"""Cached values carried to later steps: the polynomial through the last full ones, for each row of a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..core.extrapolation import lagrange

LARGEST = 10.0  # |weight|; beyond it an order is dropped: rounding and curvature are multiplied by it


def weights(nodes: Sequence[float], target: float, order: int, largest: float = LARGEST) -> list[float]:
    """Weights of the values at the last `order + 1` nodes, in the order of `nodes`, for the value at `target`.

    `w_j = prod_{i != j} (u - u_i) / (u_j - u_i)`: exact for polynomials of degree <= order. There are fewer where
    there are fewer nodes, or where a weight would be larger than `largest`.

    Args:
        nodes: of the full values, oldest first; distinct.
        target: u.
        order: 0 or more.
        largest: bound of |w_j|.

    Returns:
        1 to `order + 1` float64 weights whose sum is 1.
    """
    for points in range(min(order + 1, len(nodes)), 1, -1):
        if all(math.isfinite(u) for u in (*nodes[-points:], target)):  # lam is not where alpha or sigma is 0
            found = lagrange(nodes[-points:], target)
            if max(map(abs, found)) <= largest:
                return found
    return [1.0]


class History:
    """The last full values of a branch: row by row, because rows are full at different steps.

    Args:
        order: of the forecast.
        largest: bound of its weights, see `weights`.
    """

    def __init__(self, order: int, largest: float = LARGEST) -> None:
        self.order, self.largest = order, largest
        self.nodes: list[list[float]] = []  # of each row, oldest first
        self._values: list[list[torch.Tensor]] = []  # newest first; each a list of tensors (rows, ...)
        self._dtypes: list[torch.dtype] = []

    def __len__(self) -> int:
        """Rows."""
        return len(self.nodes)

    @property
    def bytes(self) -> int:
        """Of all values kept."""
        return sum(v.numel() * v.element_size() for values in self._values for v in values)

    def push(self, values: Sequence[torch.Tensor], node: float, rows: Sequence[int] | None, total: int) -> None:
        """Keep full values.

        Args:
            values: tensors (len(rows), ...).
            node: where they lie.
            rows: theirs in the batch; None: all.
            total: rows of the batch.
        """
        chosen = range(total) if rows is None else rows
        if len(self.nodes) != total:
            self.nodes, self._values = [[] for _ in range(total)], []
        self._dtypes = [v.dtype for v in values]
        kept = [v.detach().to(_wide(v.dtype, self.order)) for v in values]
        if rows is None:
            self._values = [kept, *self._values[: self.order]]
        else:
            self._put(kept, chosen, total)
        for r in chosen:
            self.nodes[r] = [*self.nodes[r], node][-self.order - 1 :]

    def _put(self, kept: list[torch.Tensor], rows: Sequence[int], total: int) -> None:
        index = torch.tensor(list(rows), device=kept[0].device)
        if len(self._values) <= self.order:
            self._values.append([v.new_zeros((total, *v.shape[1:])) for v in kept])
        # older values move down one place in these rows alone; in new tensors, because runs may share the old ones
        for age in range(len(self._values) - 1, 0, -1):
            self._values[age] = [
                old.index_copy(0, index, new.index_select(0, index))
                for old, new in zip(self._values[age], self._values[age - 1], strict=True)
            ]
        self._values[0] = [old.index_copy(0, index, v) for old, v in zip(self._values[0], kept, strict=True)]

    def predict(self, node: float, rows: Sequence[int] | None = None) -> list[torch.Tensor]:
        """The values at `node`, of some rows or all, in the dtype in which they came."""
        chosen = range(len(self.nodes)) if rows is None else rows
        each = [weights(self.nodes[r], node, self.order, self.largest)[::-1] for r in chosen]  # newest first
        depth = max(len(w) for w in each)
        same = all(w == each[0] for w in each)
        found = []
        for k, dtype in enumerate(self._dtypes):
            total: torch.Tensor | None = None
            for age in range(depth):
                value = self._values[age][k]
                if rows is not None:
                    value = value.index_select(0, torch.tensor(list(rows), device=value.device))
                if same:
                    part = value if each[0] == [1.0] else value * each[0][age]
                else:
                    factors = value.new_tensor([w[age] if age < len(w) else 0.0 for w in each])
                    part = value * factors.reshape(-1, *[1] * (value.ndim - 1))
                total = part if total is None else total + part
            assert total is not None
            alone = same and each[0] == [1.0] and rows is None  # the value itself: models change tensors in place
            found.append(total.clone() if alone else total.to(dtype))
        return found


def expected_bytes(values: Sequence[torch.Tensor], order: int) -> int:
    """Of a history that has taken in values such as these `order + 1` times or more."""
    return (order + 1) * sum(v.numel() * _wide(v.dtype, order).itemsize for v in values)


def _wide(dtype: torch.dtype, order: int) -> torch.dtype:
    """Sums are made in float32 at least; a value that is only reused stays as it is."""
    return torch.float32 if order and dtype in (torch.float16, torch.bfloat16) else dtype
