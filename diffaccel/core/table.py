"""The table: a traced sampler as rows of coefficients, one row a model call."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import OptionError, RunError
from .linear import Coef, fit, is_zero
from .node import Node
from .prediction import Space

FORMAT = 1


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """`x*X + sum_j p[j] P_{i-j} + sum_k m[k] M_k + sum z[a] Z_{-a} + one`: a combination of what a row can see.

    `p` is indexed by lag (0 = this call's prediction), `m` by register slot (after the row's own updates),
    `z` holds (age, coefficient) with age 0 for the latest draw.
    """

    x: Coef = 0.0
    p: tuple[Coef, ...] = ()
    m: tuple[tuple[int, Coef], ...] = ()
    z: tuple[tuple[int, Coef], ...] = ()
    one: Coef = 0.0

    def evaluate(self, x: Any, predictions: Any, registers: Any, draws: Any) -> Any:
        """The value of the combination for arrays or tensors."""
        parts = [x * fit(self.x, x)] if not is_zero(self.x) else []
        parts += [predictions[j] * fit(c, x) for j, c in enumerate(self.p) if not is_zero(c)]
        parts += [registers[k] * fit(c, x) for k, c in self.m]
        parts += [draws[a] * fit(c, x) for a, c in self.z]
        total = parts[0] if parts else x * 0.0
        for part in parts[1:]:
            total = total + part
        return total if is_zero(self.one) else total + fit(self.one, x)

    @property
    def scalar(self) -> bool:
        """Whether every coefficient is a plain number."""
        values = [self.x, self.one, *self.p, *(c for _, c in self.m), *(c for _, c in self.z)]
        return not any(isinstance(c, np.ndarray) for c in values)


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One model call and what follows it.

    Args:
        node: level of the state that the model sees.
        next: level of the state that the row returns.
        space: what `P` is at this call ("x0", "eps", "v", "flow", or an `Affine`).
        out: the next state.
        t: what the model is fed; differs from `node.t` only under timestep alignment.
        registers: (slot, new value), evaluated before `out`, each from the slots' old values.
        draws: standard normal draws that this row makes.
        opens: whether an interval of the grid begins at this row (a run can start here with the sampler's own rows).
    """

    node: Node
    next: Node
    space: Space
    out: Mix
    t: float
    registers: tuple[tuple[int, Mix], ...] = ()
    draws: int = 0
    opens: bool = True

    @property
    def a(self) -> Coef:
        """d(next state) / d(state handed in), at fixed predictions."""
        return self.out.x


@dataclass(frozen=True, eq=False)
class Table:
    """A sampler on a list of nodes, as numbers. Equality and hash are by value.

    Args:
        rows: one a model call.
        sampler: name of the sampler, for display.
        options: the options it was traced with, for display.
    """

    rows: tuple[Row, ...]
    sampler: str = "custom"
    options: dict[str, Any] = field(default_factory=dict)

    # ------------------------------------------------------------------ size
    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def depth(self) -> int:
        """Predictions that must be kept, the current one included (at least 1)."""
        mixes = [m for r in self.rows for m in (r.out, *(m for _, m in r.registers))]
        return max([1, *(len(m.p) for m in mixes)])

    @cached_property
    def slots(self) -> int:
        """Registers in use."""
        return max([0, *(s + 1 for r in self.rows for s, _ in r.registers)])

    @cached_property
    def noise_depth(self) -> int:
        """Noise draws that must be kept, the current row's included."""
        mixes = [m for r in self.rows for m in (r.out, *(m for _, m in r.registers))]
        return max([0, *(a + 1 for m in mixes for a, _ in m.z)])

    @cached_property
    def scalar(self) -> bool:
        """Whether every coefficient is a plain number (else some have the shape of one sample)."""
        return all(mix.scalar for row in self.rows for mix in (row.out, *(m for _, m in row.registers)))

    @property
    def stochastic(self) -> bool:
        """Whether any row draws noise."""
        return any(r.draws for r in self.rows)

    @property
    def timesteps(self) -> list[float]:
        """What the model is fed, one entry a call."""
        return [r.t for r in self.rows]

    @property
    def nodes(self) -> list[Node]:
        """Levels of the states: N + 1 nodes, the last one being where the run ends."""
        return [r.node for r in self.rows] + [self.rows[-1].next] if self.rows else []

    # ------------------------------------------------------------------ use
    def apply(
        self,
        x: Any,
        predict: Callable[[Any, Node, Space], Any],
        noise: Callable[[Any], Any] | None = None,
        *,
        trajectory: bool = False,
    ) -> Any:
        """Run the table on arrays or tensors.

        Args:
            x: state at `rows[0].node`, any shape.
            predict: `predict(x, node, space)` gives the prediction in that space, of the shape of x. `node.t` is
                what the model is fed.
            noise: `noise(x)` gives a standard normal draw of the shape of x; needed if `stochastic`.
            trajectory: return the list of N + 1 states instead of the last one.

        Raises:
            RunError: if the table draws noise and `noise` is None.
        """
        if self.stochastic and noise is None:
            raise RunError(f"the table of {self.sampler!r} draws noise: pass noise=")
        history: deque[Any] = deque(maxlen=self.depth)
        draws: deque[Any] = deque(maxlen=max(1, self.noise_depth))
        registers: list[Any] = [x * 0.0] * self.slots
        states = [x]
        for row in self.rows:
            fed = row.node if row.t == row.node.t else Node(row.t, row.node.alpha, row.node.sigma)
            history.appendleft(predict(x, fed, row.space))
            for _ in range(row.draws):
                draws.appendleft(noise(x) if noise else None)
            new = {slot: mix.evaluate(x, history, registers, draws) for slot, mix in row.registers}
            for slot, value in new.items():
                registers[slot] = value
            x = row.out.evaluate(x, history, registers, draws)
            if trajectory:
                states.append(x)
        return states if trajectory else x

    # ------------------------------------------------------------------ text
    def describe(self, first: int = 0) -> str:
        """One line a row: level, what the model is fed, coefficients. `first`: number of the first row."""
        begun = f", begun at call {first}" if first else ""
        head = f"{self.sampler}({', '.join(f'{k}={v!r}' for k, v in self.options.items())}): {len(self)} calls{begun}"
        lines = [head, f"{'i':>3} {'t fed':>10} {'lam':>9} {'space':>6} {'a':>10}  b_0 b_1 ... | noise | registers"]
        for i, row in enumerate(self.rows, first):
            b = " ".join(_short(c) for c in row.out.p)
            z = " ".join(f"{_short(c)}" + (f"[-{a}]" if a >= row.draws else "") for a, c in row.out.z)
            m = " ".join(f"{_short(c)}*m{k}" for k, c in row.out.m)
            space = row.space if isinstance(row.space, str) else "affine"
            lines.append(
                f"{i:>3} {row.t:>10.4f} {row.node.lam:>9.4f} {space:>6} {_short(row.out.x):>10}  {b} | {z} | {m}"
            )
        if self.rows:
            end = self.rows[-1].next
            lines.append(f"end: alpha = {end.alpha:.6g}, sigma = {end.sigma:.6g}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Exact text form (floats keep every bit; arrays are base64 float64)."""
        rows = [_row_out(r) for r in self.rows]
        return json.dumps(
            {"format": FORMAT, "sampler": self.sampler, "options": self.options, "rows": rows}, sort_keys=True
        )

    @classmethod
    def from_json(cls, text: str) -> Table:
        """Read `to_json`.

        Raises:
            OptionError: if the text is not a table of this format.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise OptionError(f"this table has format {data['format']}; this version reads format {FORMAT}")
            return cls(tuple(_row_in(r) for r in data["rows"]), data["sampler"], data["options"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise OptionError(f"this text is not a diffaccel table: {type(error).__name__} {error}") from error

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the rows (names and options do not count)."""
        return hashlib.sha256(json.dumps([_row_out(r) for r in self.rows], sort_keys=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Table) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def _short(c: Coef) -> str:
    return f"{c:.5g}" if not isinstance(c, np.ndarray) else f"<{'x'.join(map(str, c.shape))}>"


# ---------------------------------------------------------------------- JSON of rows
def _coef_out(c: Coef) -> Any:
    if not isinstance(c, np.ndarray):
        return float(c)
    raw = base64.b64encode(np.ascontiguousarray(c, dtype="<f8").tobytes()).decode()
    return {"shape": list(c.shape), "f8": raw}


def _coef_in(c: Any) -> Coef:
    if not isinstance(c, dict):
        return float(c)
    return np.frombuffer(base64.b64decode(c["f8"]), dtype="<f8").reshape(c["shape"]).astype(np.float64)


def _mix_out(m: Mix) -> dict[str, Any]:
    pairs = {"m": [[k, _coef_out(c)] for k, c in m.m], "z": [[k, _coef_out(c)] for k, c in m.z]}
    return {"x": _coef_out(m.x), "p": [_coef_out(c) for c in m.p], "one": _coef_out(m.one), **pairs}


def _mix_in(d: dict[str, Any]) -> Mix:
    m, z = (tuple((int(k), _coef_in(c)) for k, c in d[key]) for key in ("m", "z"))
    return Mix(_coef_in(d["x"]), tuple(_coef_in(c) for c in d["p"]), m, z, _coef_in(d["one"]))


def _row_out(r: Row) -> dict[str, Any]:
    space: Any = r.space
    if not isinstance(r.space, str):
        space = {"x": _coef_out(r.space.x), "eps": _coef_out(r.space.eps), "scale": r.space.scale}
    return {
        "node": list(r.node.key),
        "next": list(r.next.key),
        "space": space,
        "out": _mix_out(r.out),
        "t": r.t,
        "registers": [[s, _mix_out(m)] for s, m in r.registers],
        "draws": r.draws,
        "opens": r.opens,
    }


def _row_in(d: dict[str, Any]) -> Row:
    from .prediction import Affine

    space = d["space"]
    if not isinstance(space, str):
        space = Affine(_coef_in(space["x"]), _coef_in(space["eps"]), float(space.get("scale", 1.0)))
    registers = tuple((int(s), _mix_in(m)) for s, m in d["registers"])
    node, nxt = Node(*d["node"]), Node(*d["next"])
    return Row(node, nxt, space, _mix_in(d["out"]), float(d["t"]), registers, int(d["draws"]), bool(d["opens"]))
