"""Momentum on any sampler: heavy ball or Nesterov, acting on the steps of x / alpha."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..core.path import Nodes
from ..core.table import Mix, Row, Table
from ..errors import OptionError, one_of
from .mixes import plus, reduced, times
from .registry import Sampler
from .rewrite import rewriter, with_edit

KINDS = ("heavy_ball", "nesterov")


@rewriter(
    "momentum",
    stage="increment",
    clashes={"restart": "a jump up in noise is folded into a row, so the row has no velocity"},
)
def momentum(sampler: Sampler, beta: float, *, kind: str = "heavy_ball") -> Sampler:
    """`v <- (1 - beta) v + beta u`, u the sampler's own velocity `d(x/alpha) / d(sigma/alpha)` (arXiv:2307.11118).

    Damps the artifacts of strong guidance; its order is 1 where beta < 1. The step to sigma = 0 and one from alpha = 0
    are the sampler's own. One register.

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
            if row.node.alpha == 0 or row.next.sigma == 0:
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
    if any(row.next.level >= row.node.level * (1 - 1e-12) for row in table.rows if row.node.alpha > 0):
        raise OptionError(
            f"rewriter 'momentum' cannot be combined with sampler {table.sampler!r}: it makes several calls an "
            "interval, so its rows are no steps from one level to the next"
        )


def _moved(row: Row, slot: int, beta: float, kind: str, moving: bool) -> Row:
    s, t = row.node, row.next
    ds = t.level - s.level
    # u = (x'/alpha' - x/alpha) / ds, as the row's end sees it and (its registers' definitions put in) as registers do
    u = plus(times(row.out, 1 / (t.alpha * ds)), Mix(-1 / (s.alpha * ds)))
    registers = dict(row.registers)
    before = reduced(u, registers)
    v = plus(times(before, beta), Mix(m=((slot, 1 - beta),))) if moving else before
    share: Any = 1.0 if kind == "heavy_ball" else 1 - beta
    out = plus(Mix(t.alpha / s.alpha, m=((slot, t.alpha * ds * share),)), times(u, t.alpha * ds * (1 - share)))
    return replace(row, out=out, registers=(*row.registers, (slot, v)))
