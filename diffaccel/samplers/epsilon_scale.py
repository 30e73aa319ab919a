"""Epsilon scaling: the noise prediction divided by a constant near 1 before anything else uses it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ..core.path import Nodes
from ..core.prediction import Affine, Output, Space, pair
from ..core.table import Row, Table
from ..errors import OptionError
from .registry import Sampler
from .rewrite import rewriter, with_edit


@rewriter("epsilon_scale", stage="prediction")
def epsilon_scale(
    sampler: Sampler, at_end: float, *, slope_per_call: float = 0.0, below: float | None = None
) -> Sampler:
    """`e <- e / lambda_i`, `lambda_i = at_end + slope_per_call * i`, i = 0 at the last call (arXiv:2308.15321).

    It compensates for noise predictions that come out too large along a sampler's own trajectory. There is no default:
    published constants (1.0005 to 1.017) were tuned for FID, one model, solver and grid each; `calibrate.epsilon` fits
    one on a checkpoint. Each model call is scaled when it is made, also Heun's second. Where alpha = 0 the noise
    prediction is the state itself, and lambda is 1.

    Args:
        at_end: lambda at the last call.
        slope_per_call: how much lambda grows with each call before it.
        below: scale only the calls at levels (sigma/alpha) up to this.
    """
    checked = _positive(at_end, slope_per_call, below)

    def edit(table: Table, nodes: Nodes) -> Table:
        count = len(table)
        rows = [_scaled(row, checked(count - 1 - i, row.node.level)) for i, row in enumerate(table.rows)]
        return replace(table, rows=tuple(rows))

    return with_edit(sampler, edit)


def _positive(at_end: float, slope: float, below: float | None) -> Any:
    """lambda of (calls that are left, level)."""
    numbers = [at_end, slope, *([] if below is None else [below])]
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in numbers):
        raise OptionError(f"rewriter 'epsilon_scale' takes finite numbers, got {numbers}")
    if at_end <= 0 or (below is not None and below <= 0):
        raise OptionError(f"rewriter 'epsilon_scale' needs at_end > 0 and below > 0, got {at_end} and {below}")

    def factor(left: int, level: float) -> float:
        value = at_end + slope * left
        if value <= 0:
            raise OptionError(f"rewriter 'epsilon_scale': lambda = {value:g} at {left} calls before the end")
        return 1.0 if below is not None and level > below else value

    return factor


def _scaled(row: Row, factor: float) -> Row:
    return row if factor == 1 or row.node.alpha == 0 else replace(row, space=scaled_space(row.space, row, factor))


def scaled_space(space: Space, row: Row, factor: float) -> Affine:
    """The space of the same quantity, made from a noise prediction that is divided by `factor` first."""
    if not isinstance(space, Affine):
        space = Affine(*pair(Output("eps"), space, row.node))
    return Affine(space.x, space.eps / factor, space.scale * factor)
