"""Momentum on any sampler: heavy ball or Nesterov, acting on the steps of x / alpha."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..core.linear import is_zero
from ..core.path import Nodes
from ..core.table import Mix, Row, Table
from ..errors import OptionError, one_of
from .mixes import plus, reduced, times
from .registry import Sampler
from .rewrite import rewriter, with_edit

CANCELS = 1e-13
KINDS = ("heavy_ball", "nesterov")


@rewriter(
    "momentum",
    stage="increment",
    clashes={"restart": "a jump up in noise is folded into a row, so the row has no velocity"},
)
def momentum(sampler: Sampler, beta: float, *, kind: str = "heavy_ball") -> Sampler:
    """`v <- (1 - beta) v + beta u`, u the sampler's own velocity `d(x/alpha) / d(sigma/alpha)` (arXiv:2307.11118).

    Damps the artifacts of strong guidance; its order is 1 where beta < 1. The step to sigma = 0 and one from alpha = 0
    are the sampler's own. One register, and another where rows combine x0.

    Args:
        beta: in (0, 1]; 1 is the sampler itself. There is no published best value.
        kind: "heavy_ball" moves with v, "nesterov" with `(1 - beta) v + beta u`.
    """
    one_of("kind of rewriter 'momentum'", kind, KINDS)
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0 < beta <= 1:
        raise OptionError(f"rewriter 'momentum' needs beta in (0, 1], got {beta!r}")
    if beta == 1:
        return sampler

    def edit(table: Table, nodes: Nodes) -> Table:
        _check(table)
        slot, moving = table.slots, False
        rows = []
        for row in table.rows:
            if row.node.alpha == 0 or row.next.sigma == 0 or _stays(row):
                rows.append(row)
                continue
            rows.append(_moved(row, slot, float(beta), kind, moving))
            moving = True
        return replace(table, rows=tuple(rows))

    return with_edit(sampler, edit)


def _check(table: Table) -> None:
    if table.stochastic:
        raise OptionError(
            f"rewriter 'momentum' cannot be combined with sampler {table.sampler!r}: it draws noise, and a velocity "
            "would carry each draw on into later steps"
        )
    steps = [row for row in table.rows if row.node.alpha > 0 and not _stays(row)]
    if any(row.next.level >= row.node.level * (1 - 1e-12) for row in steps):
        raise OptionError(
            f"rewriter 'momentum' cannot be combined with sampler {table.sampler!r}: it makes several calls an "
            "interval, so its rows are no steps from one level to the next"
        )


def _stays(row: Row) -> bool:
    """Whether the row leaves its state as it is: a level that the grid repeats."""
    return row.out.x == 1.0 and not (any(row.out.p) or row.out.m or row.out.z)


def _moved(row: Row, slot: int, beta: float, kind: str, moving: bool) -> Row:
    s, t = row.node, row.next
    ds = t.level - s.level
    # u = (x'/alpha' - x/alpha) / ds, as the row's end sees it and (its registers' definitions put in) as registers do
    u = plus(times(row.out, 1 / (t.alpha * ds)), Mix(-1 / (s.alpha * ds)))
    if np.all(np.abs(u.x) * abs(s.alpha * ds) < CANCELS):  # rows of noise predictions carry the state along
        u = replace(u, x=0.0)
    before = reduced(u, dict(row.registers))
    v = plus(times(before, beta), Mix(m=((slot, 1 - beta),))) if moving else before
    share = t.alpha * ds * (1.0 if kind == "heavy_ball" else 1 - beta)
    rest = plus(Mix(t.alpha / s.alpha), times(u, t.alpha * ds - share))
    registers = (*row.registers, (slot, v))
    if is_zero(v.x):
        return replace(row, out=plus(rest, Mix(m=((slot, share),))), registers=registers)
    # v holds the state: the row's end takes it without, so that its coefficient of the state says what an edit does
    out = plus(rest, Mix(v.x * share, m=((slot + 1, share),)))
    return replace(row, out=out, registers=(*registers, (slot + 1, replace(v, x=0.0))))
