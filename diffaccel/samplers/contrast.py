"""A noise prediction pushed away from, or towards, an earlier one: `e_n + c (e_n - e_{n-lag})`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..core.linear import Coef, is_zero
from ..core.path import Nodes
from ..core.prediction import Affine, Output, pair
from ..core.table import Mix, Row, Table
from ..errors import OptionError
from .mixes import plus, times
from .registry import Sampler
from .rewrite import rewriter, with_edit


@rewriter("contrast", stage="prediction", rank=1)
def contrast(sampler: Sampler, c: float | Sequence[float], *, lag: int = 1) -> Sampler:
    """`e_n <- e_n + c (e_n - e_{n-lag})`, the one-parameter family of corrections by an earlier noise prediction.

    Not a published method: it is the family that `tune` can search. What the sampler keeps of earlier calls is the
    changed prediction. The first `lag` calls, and those after a jump up in noise, are as they are.

    Args:
        c: one number, or one for each call counted from the last (the last entry serves all calls before).
        lag: calls between the two predictions, 1 or more.
    """
    values = [float(c)] if isinstance(c, (int, float)) else [float(v) for v in c]
    if not values or not all(math.isfinite(v) for v in values):
        raise OptionError(f"rewriter 'contrast': c is a finite number, or a list of them, got {c!r}")
    if isinstance(lag, bool) or not isinstance(lag, int) or lag < 1:
        raise OptionError(f"rewriter 'contrast': lag must be an integer of 1 or more, got {lag!r}")

    def edit(table: Table, nodes: Nodes) -> Table:
        count = len(table)
        weights = [values[min(count - 1 - i, len(values) - 1)] for i in range(count)]
        return replace(table, rows=tuple(_Edit(table, weights, lag).rows())) if any(weights) else table

    return with_edit(sampler, edit)


class _Edit:
    """One table; `P_i` becomes the noise prediction of call i, and what the rows used is made of these."""

    def __init__(self, table: Table, weights: Sequence[float], lag: int) -> None:
        self.table, self.lag = table, lag
        since = 0  # calls in a row that have a noise prediction and no jump between them
        self.weight: list[float] = []
        for row, w in zip(table.rows, weights, strict=True):
            self.weight.append(w if since >= lag and row.node.alpha > 0 else 0.0)
            since = since + 1 if row.node.alpha > 0 and row.next.level <= row.node.level else 0
        self.made = [self._from_eps(row) for row in table.rows]

    def _from_eps(self, row: Row) -> tuple[Coef, Coef] | None:
        """(u, w) with P = u x + w e for the row's own space; None at alpha = 0, where there is no e."""
        return None if row.node.alpha == 0 else pair(Output("eps"), row.space, row.node)

    def rows(self) -> list[Row]:
        return [self._row(i, row) for i, row in enumerate(self.table.rows)]

    def _row(self, i: int, row: Row) -> Row:
        registers = [(slot, self._mix(i, mix)) for slot, mix in row.registers]
        if self._keeps(i):
            registers.append((self._slot(i), self._now(i)))
        return replace(row, space=self._space(i), out=self._mix(i, row.out), registers=tuple(registers))

    def _space(self, i: int) -> Any:
        row = self.table.rows[i]
        if self.made[i] is None:
            return row.space
        scale = row.space.scale if isinstance(row.space, Affine) else 1.0
        return "eps" if scale == 1 else Affine(0.0, 1.0, scale)

    def _keeps(self, i: int) -> bool:
        """Whether P_i holds the state of its call, which later rows no longer see."""
        made = self.made[i]
        return self.table.depth > 1 and made is not None and not is_zero(made[0])

    def _slot(self, i: int) -> int:
        return self.table.slots + i % self.table.depth

    def _now(self, i: int) -> Mix:
        """The changed P_i as row i sees it."""
        made, c = self.made[i], self.weight[i]
        if made is None:
            return Mix(p=(1.0,))
        u, w = made
        past = (*(0.0 for _ in range(self.lag - 1)), -(w * c)) if c else ()
        return Mix(u, (w * (1 + c), *past))

    def _mix(self, i: int, mix: Mix) -> Mix:
        found = Mix(mix.x, (), mix.m, mix.z, mix.one)
        for j, b in enumerate(mix.p):
            if is_zero(b):
                continue
            if j and self._keeps(i - j):
                part = Mix(m=((self._slot(i - j), 1.0),))
            else:
                now = self._now(i - j)
                part = Mix(now.x, (*(0.0 for _ in range(j)), *now.p))
            found = plus(found, times(part, b))
        return found
