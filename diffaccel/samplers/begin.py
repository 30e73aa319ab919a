"""The rows of a run that begins in the middle of a table: img2img, refiners."""

from __future__ import annotations

import math
from typing import Any

from ..core.node import Node
from ..core.path import Nodes
from ..core.table import Mix, Row, Table
from ..core.trace import first_order
from ..errors import OptionError
from .registry import Sampler


def begin_at(table: Table, grid: Nodes, k: int, sampler: Sampler, options: dict[str, Any]) -> Table:
    """The rows of a run that begins at row k of `table`, with no history.

    Rows that need nothing from before are used as they are. Else the sampler's own rows begin at the next row that
    opens an interval of the grid; rows before it (the inner calls of an interval that was cut) are first-order steps
    between the levels at which the model is called anyway.

    Args:
        table: of the whole run.
        grid: the nodes that it was traced on.
        k: row, 0 to `len(table) - 1`.
        sampler: with which it was traced.
        options: all of the sampler's.

    Raises:
        OptionError: if the sampler cannot begin there.
    """
    plain = sampler.unedited(grid, len(table), **options) if sampler.edits else table
    rest = sampler.begin(plain, grid, k, options) if sampler.begin else _retraced(plain, grid, k, sampler, options)
    found = sampler.edited(rest, grid)
    if [r.t for r in found.rows] != [r.t for r in table.rows[k:]]:
        raise OptionError(f"sampler {table.sampler!r} cannot begin at call {k} of {len(table)}: its calls would move")
    return found


def _retraced(table: Table, grid: Nodes, k: int, sampler: Sampler, options: dict[str, Any]) -> Table:
    bridge: list[Row] = []
    for i in range(k, len(table)):
        if stands_alone(table, i):
            return Table((*bridge, *table.rows[i:]), table.sampler, table.options)
        at = next((n for n, node in enumerate(grid) if node is table.rows[i].node), None)
        if table.rows[i].opens and at is not None:
            rest = sampler.unedited(grid[at:], len(table) - i, **options)
            return Table((*bridge, *rest.rows), table.sampler, table.options)
        bridge.append(bridge_row(table.rows[i]))
    return Table(tuple(bridge), table.sampler, table.options)


def stands_alone(table: Table, k: int) -> bool:
    """Whether rows k and later use no prediction, register or draw of earlier rows."""
    written: set[int] = set()
    drawn = 0
    for i, row in enumerate(table.rows[k:]):
        drawn += row.draws
        mixes = [mix for _, mix in row.registers]
        if any(slot not in written for mix in mixes for slot, _ in mix.m):
            return False
        written.update(slot for slot, _ in row.registers)
        if any(slot not in written for slot, _ in row.out.m):
            return False
        for mix in (*mixes, row.out):
            if len(mix.p) > i + 1 or any(age >= drawn for age, _ in mix.z):
                return False
    return True


def bridge_row(row: Row) -> Row:
    """The first-order step between the levels of a row: DDIM, or added noise where the level rises."""
    s, t = row.node, row.next
    if t.level > s.level:
        a, fresh = raised(s, t)
        return Row(s, t, "x0", Mix(a, (), z=((0, fresh),)), s.t, draws=1)
    a0, b = first_order(s, t)
    return Row(s, t, "x0", Mix(a0, (b,)), s.t)


def raised(s: Node, t: Node) -> tuple[float, float]:
    """(scale of the state, standard deviation of the noise) that take a state of level s to the noisier level t."""
    a = t.alpha / s.alpha
    kept = a * s.sigma
    return a, math.sqrt(max(0.0, (t.sigma - kept) * (t.sigma + kept)))
