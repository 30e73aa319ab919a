"""Timestep alignment: the model is fed another t than that of the state's level; the state keeps its level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..core.path import Nodes
from ..core.table import Table
from ..errors import OptionError
from .registry import Sampler
from .rewrite import rewriter, with_edit


@rewriter("align", stage="fed")
def align(sampler: Sampler, shifts: Sequence[Sequence[float]]) -> Sampler:
    """The model is fed `t + shift(t)`, piecewise linear through (t, shift) points and constant outside them.

    Args:
        shifts: [(t, shift), ...] in the units of t, rising in t; what is fed stays within the path's timesteps.
    """
    try:
        t, by = np.array([[float(v) for v in point] for point in shifts], dtype=float).T
    except (TypeError, ValueError):
        raise OptionError(f"rewriter 'align': shifts are [(t, shift), ...], got {shifts!r}") from None
    if not (np.all(np.isfinite(t)) and np.all(np.isfinite(by)) and np.all(np.diff(t) > 0)):
        raise OptionError(f"rewriter 'align': the t of shifts must be finite and rise, got {shifts!r}")

    def edit(table: Table, nodes: Nodes) -> Table:
        ends = sorted((nodes.path.first.t, nodes.path.last.t))
        rows = []
        for row in table.rows:
            shift = float(np.interp(row.t, t, by))
            fed = min(max(row.t + shift, ends[0]), ends[1]) if shift else row.t
            rows.append(replace(row, t=fed) if math.isfinite(fed) else row)
        return replace(table, rows=tuple(rows))

    return with_edit(sampler, edit)
