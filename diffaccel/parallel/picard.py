"""ParaDiGMS (arXiv:2305.16317) for any table: the rows of a window are called in one batch, sweep after sweep.

A sweep calls the model on all states of the window at once and then solves the rows for all states, with what the
model said held fixed. What is held fixed is the choice: in `rule="scan"` it is one prediction a row, and the rows, a
linear recurrence, are solved for the states exactly (a prefix scan of multiply-adds); in `rule="official"`, the
authors' code, it is the whole increment of the row, and the increments are summed. The fixed point of both is the
sequential run, and each sweep makes at least one more state of the window exact.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.node import Node, decay
from ..core.prediction import SPACES, Output, Space, pair
from ..core.table import Row, Table
from ..errors import OptionError, RunError, one_of

RULES = ("scan", "official")


@dataclass(frozen=True)
class Sweep:
    """One batch: the first row of the window, its rows, and by how many rows the window then moved."""

    first: int
    rows: int
    moved: int


@dataclass(frozen=True)
class Work:
    """What a run took.

    Args:
        rows: of the table: model calls of the sequential run.
        sweeps: the batches, in order; their number is the latency in units of one batched call.
    """

    rows: int
    sweeps: tuple[Sweep, ...]

    @property
    def calls(self) -> int:
        """Model calls, each row of each batch counted."""
        return sum(s.rows for s in self.sweeps)

    def rounds(self, devices: int) -> int:
        """Calls one after the other if each batch is shared among `devices`, one row a device at a time."""
        return sum(math.ceil(s.rows / devices) for s in self.sweeps)


@dataclass
class _Edge:
    """What a row sees from before it: predictions (newest first) and registers."""

    history: tuple[Any, ...] = ()
    registers: tuple[Any, ...] = ()


@dataclass
class Picard:
    """A run in progress. Ask `requests()`, call the model on all of them at once, pass the answers to `sweep`.

    Args:
        table: the sampler on its nodes.
        start: state at `table.nodes[0]`; the first axis counts samples, which converge each by itself.
        noise: `noise(x)` gives a standard normal draw of the shape of x; needed if the table is stochastic. A row's
            noise is drawn once, in the order of the rows, as in a sequential run.
        window: rows a batch; None: all of them.
        tol: a state counts as found when a sweep changes it by less than `tol` times the standard deviation of the
            posterior q(x_next | x, x0) there (root mean square of each sample). 0: only when it does not change.
        space: what a sweep holds fixed, for `rule="scan"`: "v" (default), "x0", "eps" or "flow".
        rule: "scan", or "official" for the sums of the authors' code (new states are copies of the last one, then).
        opening: rows of the first batch, which has little to go by; None: `window`.

    Raises:
        OptionError: an option out of range, or without effect.
        RunError: if the table draws noise and there is none to draw.
    """

    table: Table
    start: Any
    noise: Callable[[Any], Any] | None = None
    window: int | None = None
    tol: float = 0.1
    space: str | None = None
    rule: str = "scan"
    opening: int | None = None
    first: int = field(default=0, init=False)
    sweeps: list[Sweep] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        check_options(self.window, self.tol, self.space, self.rule, self.opening)
        self.space, self.window = self.space or "v", self.window or len(self.table)
        if self.table.stochastic and self.noise is None:
            raise RunError(f"the table of {self.table.sampler!r} draws noise: pass noise=")
        self._official = self.rule == "official"
        self._variances = variances(self.table, floor=not self._official)
        self._states: list[Any] = [self.start]
        self._draws: list[Any] = []
        self._edge = _Edge(registers=(self.start * 0.0,) * self.table.slots)
        self._copies()

    # ------------------------------------------------------------------ the window
    @property
    def last(self) -> int:
        """One past the last row of the window."""
        rows = self.opening if self.opening and not self.sweeps else self.window
        return min(self.first + int(rows or 0), len(self.table))

    @property
    def done(self) -> bool:
        """Whether the state at the last node is found."""
        return self.first == len(self.table)

    @property
    def state(self) -> Any:
        """The last state that is found: at the window's first row, or the result."""
        return self._states[0]

    @property
    def work(self) -> Work:
        """What was done so far."""
        return Work(len(self.table), tuple(self.sweeps))

    def requests(self) -> list[tuple[Any, Node, Space]]:
        """(state, node, space) of each row of the window: where the model is to be called, and what is wanted."""
        rows = self.table.rows[self.first : self.last]
        return [(x, fed(row), self._space_at(row)) for x, row in zip(self._states, rows, strict=False)]

    def _space_at(self, row: Row) -> Space:
        if self._official:
            return row.space
        return "x0" if self.space == "eps" and row.node.alpha == 0 else str(self.space)

    def _copies(self) -> None:
        """Fill the window with copies of its last state, scaled to the level of their nodes."""
        nodes = self.table.nodes
        while len(self._states) <= self.last - self.first:
            n = self.first + len(self._states)
            size = _size(nodes[n]) / _size(nodes[n - 1])
            self._states.append(self._states[-1] if self._official or size == 1.0 else self._states[-1] * size)

    # ------------------------------------------------------------------ a sweep
    def sweep(self, values: Sequence[Any]) -> None:
        """Take the model's answers to `requests()`, solve the rows, move the window.

        Raises:
            RunError: if there is not one answer for each request.
        """
        if self.done or len(values) != self.last - self.first:
            raise RunError(f"sweep needs one answer for each of {self.last - self.first} requests, got {len(values)}")
        old, first = self._states, self.first
        new, edges = self._solve(first, old, self._edge, values)
        changed = (self._changed(a, b, first + k) for k, (a, b) in enumerate(zip(new[1:], old[1:], strict=True), 1))
        moved = next((k for k, flag in enumerate(changed, 1) if flag), len(values))
        self.sweeps.append(Sweep(first, len(values), moved))
        self._edge, self.first, self._states = edges[moved - 1], first + moved, new[moved:]
        del self._states[self.last - self.first + 1 :]  # `opening` may be more than `window`
        if not self._official:
            self._guess(first + len(values), new[-2:], edges[-1], values[-1])
        self._copies()

    def _guess(self, row: int, states: list[Any], edge: _Edge, value: Any) -> None:
        """Solve the rows that enter the window with the last prediction held: nearer than copies of the last state."""
        if self.last > row:
            before = self.table.rows[row - 1]
            u, w = pair(Output(str(self._space_at(before))), str(self.space), before.node)
            held = states[0] * u + value * w
            new, _ = self._solve(row, states[1:], edge, [held] * (self.last - row))
            self._states += new[1:]

    def _solve(self, first: int, old: list[Any], edge: _Edge, values: Sequence[Any]) -> tuple[list[Any], list[_Edge]]:
        """The states of the rows from `first` with `values` held fixed, and what the row after each of them sees."""
        history = deque(edge.history, maxlen=self.table.depth)
        registers, states, edges = list(edge.registers), [old[0]], []
        for k, value in enumerate(values):
            row, x = self.table.rows[first + k], states[-1]
            seen = old[k] if self._official else x
            u, w = (0.0, 1.0) if self._official else pair(Output(str(self._space_at(row))), row.space, row.node)
            history.appendleft(seen * _like(u, seen) + value * _like(w, value))
            draws = self._drawn(first + k)
            updates = {slot: mix.evaluate(seen, history, registers, draws) for slot, mix in row.registers}
            for slot, new in updates.items():
                registers[slot] = new
            y = row.out.evaluate(seen, history, registers, draws)
            states.append(x + (y - seen) if self._official else y)
            edges.append(_Edge(tuple(history), tuple(registers)))
        return states, edges

    def _drawn(self, i: int) -> list[Any]:
        """The draws that row i sees, newest first."""
        count = sum(row.draws for row in self.table.rows[: i + 1])
        while len(self._draws) < count:
            self._draws.append(self.noise(self.start) if self.noise else None)
        return self._draws[:count][::-1]

    def _changed(self, new: Any, old: Any, n: int) -> bool:
        """Whether any sample of state n still moves; one that is not finite does.

        Raises:
            RunError: if that is the state next to the last one found: no sweep will change it.
        """
        square = float(((new - old) ** 2).reshape(len(new), -1).mean(1).max())
        if n == self.first + 1 and not math.isfinite(square):
            raise RunError(
                f"row {self.first} of {len(self.table)}: the state became NaN or infinite; the model's output is not "
                "finite there, or this sampler diverges"
            )
        return not square <= self.tol**2 * self._variances[n]


def check_options(
    window: int | None = None,
    tol: float = 0.1,
    space: str | None = None,
    rule: str = "scan",
    opening: int | None = None,
) -> None:
    """Raise `OptionError` for options of `Picard` that are out of range or without effect."""
    one_of("rule", rule, RULES)
    if rule == "official" and space is not None:
        raise OptionError("space has no effect with rule='official', which holds whole increments fixed")
    one_of("space", space or "v", SPACES)
    for name, rows in (("window", window), ("opening", opening)):
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise OptionError(f"{name} is a number of rows in a batch, an integer of 1 or more; got {rows!r}")
    if not (isinstance(tol, (int, float)) and 0 <= tol < math.inf):
        raise OptionError(f"tol must be a finite number of 0 or more, got {tol!r}")


def picard(
    table: Table,
    x: Any,
    predict: Callable[[list[Any], list[Node], list[Space]], Sequence[Any]],
    noise: Callable[[Any], Any] | None = None,
    **options: Any,
) -> tuple[Any, Work]:
    """Run a table with its rows in parallel; `Table.apply` is the sequential form.

    Args:
        table: of any sampler (`diffaccel.trace`).
        x: state at the first node, arrays or tensors; the first axis counts samples.
        predict: `predict(states, nodes, spaces)` gives the predictions at all of these states, in these spaces: one
            batch. `node.t` is what the model is fed.
        noise: as in `Table.apply`.
        options: `window`, `tol`, `space`, `rule`, `opening`: see `Picard`.

    Returns:
        the state at the last node, and the work that it took.
    """
    run = Picard(table, x, noise, **options)
    while not run.done:
        states, nodes, spaces = map(list, zip(*run.requests(), strict=True))
        run.sweep(predict(states, nodes, spaces))
    return run.state, run.work


def variances(table: Table, *, floor: bool = True) -> list[float]:
    """Variance of q(x_next | x, x0), `sigma_next^2 (1 - e^-2h)`, for the row that leaves each of the N + 1 states.

    Args:
        floor: rows to sigma = 0, and rows that stay on their level, have none: give them the last positive one
            before them. Without it they have 0, and so has the last state.
    """
    found = [r.next.sigma**2 * abs(1 - decay(r.node, r.next) ** 2) if r.next.sigma > 0 else 0.0 for r in table.rows]
    found.append(0.0)
    if floor:
        kept = next((v for v in found if v > 0), 0.0)
        for i, v in enumerate(found):
            found[i] = kept = v if v > 0 else kept
    return found


def fed(row: Row) -> Node:
    """The node of a row's call, with the time that the model is fed."""
    return row.node if row.t == row.node.t else Node(row.t, row.node.alpha, row.node.sigma)


def _size(node: Node) -> float:
    return math.hypot(node.alpha, node.sigma)


def _like(c: Any, x: Any) -> Any:
    """An array coefficient in the array family of x."""
    return x.new_tensor(c) if hasattr(c, "shape") and hasattr(x, "new_tensor") else c
