"""Running a sampler loop: with arrays or tensors (functional), or with symbols (the table)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..errors import OptionError, TraceError
from .linear import ONE, Coef, Linear, is_zero
from .node import Node
from .path import Nodes
from .prediction import Space, convert
from .table import Mix, Row, Table

Loop = Callable[..., Any]  # loop(x, nodes, predict, noise, **options) -> state at nodes[-1]


class Tracer:
    """Turns the calls that a loop makes into rows. One use: build, run the loop, `table()`."""

    def __init__(self, nodes: Nodes, space: Space) -> None:
        self.nodes, self.space = nodes, space
        self.calls: list[tuple[Node, float, Space]] = []
        self.nexts: list[Linear] = []
        self.carried: list[tuple[int, Linear]] = []  # (call in whose row it is computed, definition)
        self.draw_rows: list[int] = []
        self.start = Linear({("x", 0): 1.0}, self)
        self._alone: dict[int, Linear] = {}

    # ------------------------------------------------------------------ what the loop sees
    def predict(self, x: Any, node: Node, *, space: Space | None = None, fed: float | None = None) -> Linear:
        """Record a model call at state `x`; the object `x` itself becomes the symbol of the state handed in."""
        if not isinstance(x, Linear):
            raise TraceError(f"the loop calls the model on a {type(x).__name__}, not on a traced state")
        if not isinstance(node, Node):
            raise TraceError(f"the loop calls the model at {node!r}; pass the node of the state")
        i = len(self.calls)
        if i:
            self.nexts.append(Linear(x.terms, self))
        elif x.terms != {("x", 0): 1.0}:
            raise TraceError(
                "the loop changes the state before the first model call, but a scheduler first sees the state with "
                "the first output. Begin with predict(x, nodes[0])."
            )
        self.calls.append((node, node.t if fed is None else float(fed), space or self.space))
        x.terms = {("x", i): 1.0}
        return Linear({("p", i): 1.0}, self)

    def noise(self) -> Linear:
        """Record a standard normal draw."""
        if not self.calls:
            raise TraceError("the loop draws noise before the first model call; a table can only do so after it")
        self.draw_rows.append(len(self.calls) - 1)
        return Linear({("z", len(self.draw_rows) - 1): 1.0}, self)

    def carry(self, value: Linear) -> Linear:
        """Record a register; see `core.linear.carry`."""
        self.carried.append((max(0, len(self.calls) - 1), value))
        return Linear({("m", len(self.carried) - 1): 1.0}, self)

    # ------------------------------------------------------------------ the table
    def table(self, result: Any, name: str, options: dict[str, Any]) -> Table:
        """The rows, once the loop has returned `result`."""
        if not self.calls:
            raise TraceError(f"the loop {name!r} never calls the model")
        if not isinstance(result, Linear):
            raise TraceError(f"the loop {name!r} returns a {type(result).__name__}, not the state at the last node")
        self.nexts.append(result)
        slots = self._slots()
        opens = self._opens()
        rows = []
        for i, (node, fed, space) in enumerate(self.calls):
            end = self.calls[i + 1][0] if i + 1 < len(self.calls) else self.nodes[-1]
            registers = tuple(
                (slots[v], self._mix(definition, i, slots))
                for v, (row, definition) in enumerate(self.carried)
                if row == i and v in slots
            )
            out = self._mix(self.nexts[i], i, slots)
            rows.append(Row(node, end, space, out, fed, registers, self.draw_rows.count(i), i in opens))
        return Table(tuple(rows), name, options)

    def _eliminate(self, value: Linear, i: int) -> Linear:
        """Express older states by the one handed in at call i, oldest first.

        State j, made by `nexts[j - 1] = a x_k + rest`, gives `x_k = (x_j - rest)/a`. The newest such j is taken: a
        loop that writes `x = a*x + b*predict(x, s)` computes `a*x` before the call, so that each of its states is
        made from the first one and all predictions, and only from one to the next do these cancel.
        """
        while older := _states(value, i):
            k = min(older)
            j = next((j for j in range(i, k, -1) if min(_states(self.nexts[j - 1], j), default=-1) == k), k + 1)
            step = self.nexts[j - 1]
            if min(_states(step, j), default=-1) < k:
                step = self._eliminated(k)
            a = step.terms.get(("x", k), 0.0)
            if is_zero(a):
                raise TraceError(
                    f"the loop goes back to the state of call {k} after a step that forgot it (a = 0); keep what you "
                    "need with carry()"
                )
            rest = Linear({s: c for s, c in step.terms.items() if s != ("x", k)}, self)
            value = value.substitute(("x", k), (Linear({("x", j): 1.0}, self) - rest) / a)
        return value

    def _eliminated(self, k: int) -> Linear:
        """`nexts[k]` in terms of state k alone, computed once."""
        if k not in self._alone:
            self._alone[k] = self._eliminate(self.nexts[k], k)
        return self._alone[k]

    def _mix(self, value: Linear, i: int, slots: dict[int, int]) -> Mix:
        terms = self._eliminate(value, i).terms
        x, one = terms.get(("x", i), 0.0), terms.get(ONE, 0.0)
        lags = {i - n: c for (kind, n), c in terms.items() if kind == "p"}
        p = tuple(lags.get(j, 0.0) for j in range(max(lags) + 1)) if lags else ()
        m = tuple(sorted(((slots[n], c) for (kind, n), c in terms.items() if kind == "m"), key=lambda e: e[0]))
        drawn = sum(row <= i for row in self.draw_rows)
        z = tuple(sorted(((drawn - 1 - n, c) for (kind, n), c in terms.items() if kind == "z"), key=lambda e: e[0]))
        return Mix(x, p, m, z, one)

    def _slots(self) -> dict[int, int]:
        """Register of each carried value, by liveness; a value that nobody reads gets none."""
        last: dict[int, int] = {}
        reads = [(i, e) for i, e in enumerate(self.nexts)]
        for row, definition in reversed(self.carried):
            reads.append((row, definition))
        for i, e in reads:
            for kind, n in self._eliminate(e, i).terms:
                if kind == "m":
                    last[n] = max(last.get(n, -1), i)
        slots: dict[int, int] = {}
        for v, (row, definition) in enumerate(self.carried):
            if v not in last:
                continue
            if any(kind == "m" and self.carried[n][0] == row for kind, n in self._eliminate(definition, row).terms):
                raise TraceError("a carried value may not be computed from one carried at the same call; combine them")
            # A register is overwritten in the row that last reads its old value for its own successor.
            busy = {s for n, s in slots.items() if last[n] > row or (last[n] == row and self._read_late(n, row))}
            slots[v] = next(s for s in range(len(self.carried) + 1) if s not in busy)
        return slots

    def _read_late(self, version: int, row: int) -> bool:
        """Whether the row's new state (computed after the registers) reads this version."""
        return ("m", version) in self._eliminate(self.nexts[row], row).terms or self.carried[version][0] == row

    def _opens(self) -> set[int]:
        """Calls at which an interval of the grid begins: for each node of the grid the last call made at it."""
        at = {id(n): k for k, n in enumerate(self.nodes)}
        last = {id(node): i for i, (node, _, _) in enumerate(self.calls) if id(node) in at}
        return set(last.values())


def _states(value: Linear, below: int) -> list[int]:
    """Calls before `below` whose state occurs in a combination."""
    return [n for kind, n in value.terms if kind == "x" and n < below]


def repeats(nodes: Nodes) -> tuple[Nodes, dict[int, list[Node]], list[Node]]:
    """Grids may repeat a level (legal in diffusers); a step of size 0 would divide by it.

    Returns:
        the nodes without repeats (the last of each group is kept, but for the end node's group: its last but one
        is where the model can be called), the repeats before each kept node by its id, and those at the end.
    """
    kept: list[Node] = []
    before: dict[int, list[Node]] = {}
    for node in nodes:
        if kept and _same_level(kept[-1], node):
            old = kept.pop()
            before[id(node)] = [*before.pop(id(old), []), old]
        kept.append(node)
    return Nodes(kept, nodes.path), before, before.pop(id(kept[-1]), [])


def _same_level(s: Node, t: Node) -> bool:
    if min(s.alpha, s.sigma, t.alpha, t.sigma) == 0:
        return (s.alpha, s.sigma) == (t.alpha, t.sigma)
    return abs(s.lam - t.lam) < 1e-10


def _with_repeats(loop: Loop, x: Any, nodes: Nodes, predict: Any, noise: Any, options: dict[str, Any]) -> Any:
    """Run the loop on distinct nodes, and spend one call that changes nothing on each repeat."""
    distinct, before, tail = repeats(nodes)
    if options.get("calls") is not None:
        options = options | {"calls": options["calls"] - len(nodes) + len(distinct)}

    def call(state: Any, node: Node, **how: Any) -> Any:
        for repeat in before.pop(id(node), []):
            predict(state, repeat, **how)
        return predict(state, node, **how)

    x = loop(x, distinct, call, noise, **options) if len(distinct) > 1 else x
    for repeat in tail:
        predict(x, repeat)
    return x


def trace_loop(
    loop: Loop, nodes: Nodes, *, space: Space = "x0", name: str = "custom", options: dict[str, Any] | None = None
) -> Table:
    """Run `loop` with symbols and return its table.

    Raises:
        TraceError: with the reason, if the loop does what no table can hold.
        OptionError: if there are fewer than 2 nodes.
    """
    if len(nodes) < 2:
        raise OptionError(f"a run needs at least 2 nodes (1 interval), got {len(nodes)}")
    tracer = Tracer(nodes, space)
    result = _with_repeats(loop, tracer.start, nodes, tracer.predict, tracer.noise, options or {})
    shown = {k: _shown(v) for k, v in (options or {}).items() if k != "calls"}
    return tracer.table(result, name, shown)


def _shown(value: Any) -> Any:
    """An option as JSON can hold it; objects (calibrated data) by their text."""
    return value if value is None or isinstance(value, (bool, int, float, str, list, tuple, dict)) else str(value)


def run_loop(
    loop: Loop,
    x: Any,
    nodes: Nodes,
    predict: Callable[[Any, Node], Any],
    noise: Callable[[Any], Any] | None = None,
    *,
    space: Space = "x0",
    options: dict[str, Any] | None = None,
) -> Any:
    """Run `loop` with arrays or tensors.

    Args:
        predict: `predict(x, node)` gives a `Prediction`, or x0.
        noise: `noise(x)` gives a standard normal draw of the shape of x.
    """
    default = space

    def call(state: Any, node: Node, *, space: Space | None = None, fed: float | None = None) -> Any:
        seen = node if fed is None else replace(node, t=float(fed))
        return convert(predict(state, seen), space or default, state, node)

    def draw() -> Any:
        if noise is None:
            raise OptionError("this sampler draws noise: pass noise=, a function of the state")
        return noise(x)

    return _with_repeats(loop, x, nodes, call, draw, options or {})


def first_order(s: Node, t: Node) -> tuple[Coef, Coef]:
    """DDIM from s to t in data space, exact for constant x0: coefficients of the state and of x0."""
    if s.sigma == 0:
        return (t.alpha / s.alpha, 0.0)
    a = t.sigma / s.sigma
    return a, t.alpha - s.alpha * a
