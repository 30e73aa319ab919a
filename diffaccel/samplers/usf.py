"""Rows of different kinds in one run: each has its own order, space and corrector (the unified framework USF)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..core.extrapolation import lagrange
from ..core.node import Node
from ..core.path import Nodes
from ..core.table import Table
from ..errors import OptionError, no_leftover, one_of
from . import unipc
from .common import check_order, eps_space, finite, intervals, is_long, lead
from .registry import REGISTRY, add, get, sampler

SPACES = ("x0", "eps", "v")
HIGHEST = 3
VARIANT = "bh2"  # of second-order predictors and first-order correctors; makes order 2 in data space DPM++ 2M
POINTS, WEIGHTS = np.polynomial.legendre.leggauss(16)  # the integrands are entire and a step is shorter than pi/2


class Choice(NamedTuple):
    """How one row is made.

    Args:
        order: predictions that it combines, 1 to 3 (fewer where there are not so many yet).
        space: what is interpolated between them: "x0" or "eps" in lam, or "v": `v = cos(a) eps - sin(a) x0`, both
            interpolated in the angle a = atan2(sigma, alpha), which is finite at both ends of every path.
        corrector: whether the state is corrected (UniC) once the prediction at its end is known.
    """

    order: int = 2
    space: str = "x0"
    corrector: bool = False

    @classmethod
    def of(cls, entry: Any) -> Choice:
        """From what a user or an artifact says.

        Raises:
            OptionError: with what is wrong.
        """
        given = entry._asdict() if isinstance(entry, Choice) else entry
        if not isinstance(given, Mapping):
            raise OptionError(f"sampler 'usf': a row is {{'order', 'space', 'corrector'}}, got {entry!r}")
        no_leftover("a row of sampler 'usf'", given, cls._fields)
        made = cls(**given)
        check_order("usf", made.order, HIGHEST)
        one_of("space", made.space, SPACES)
        if not isinstance(made.corrector, bool):
            raise OptionError(f"sampler 'usf': corrector must be True or False, got {made.corrector!r}")
        return made


class Seen(NamedTuple):
    """A model call: its node, the x0-prediction, and the state that the model saw."""

    node: Node
    d: Any
    x: Any

    def prediction(self, space: str) -> Any:
        """In space "x0" or "eps"."""
        return self.d if space == "x0" else (self.x - self.node.alpha * self.d) / self.node.sigma


class Made(NamedTuple):
    """A predicted row, kept for its corrector."""

    t: Node
    used: Sequence[Seen]
    weights: Sequence[Any]
    space: str


def usable(past: Sequence[Seen], order: int, space: str) -> Sequence[Seen]:
    """The newest calls that a row may combine; a node with infinite lam has no place in a polynomial in lam."""
    return [e for e in past if space == "v" or finite(e.node)][:order]


def advanced(x: Any, past: Sequence[Seen], t: Node, choice: Choice) -> tuple[Any, Made | None]:
    """(the state at t, what a corrector needs) from the state x at `past[0].node`, `past` being newest first.

    Linear in x and in what `past` holds, whatever these are: arrays, tensors, traced values, coefficient vectors.
    """
    s, space = past[0].node, choice.space
    used = usable(past, choice.order, space)
    if t.sigma == 0 or (space != "v" and not finite(s)):  # of first order
        here = "x0" if space == "v" else eps_space(s) if space == "eps" else space
        return lead(x, past[0].prediction(here), s, t, here), None
    if space == "v":
        weights = angle_weights([_angle(e.node) for e in used], _angle(s), _angle(t))
        return x * (_size(t) / _size(s)) + _turned(used, weights, t), Made(t, used, weights, space)
    pairs = [(e.node, e.prediction(space)) for e in used]
    plain = unipc.predictor(pairs, s, t, space, VARIANT)
    state = lead(x, pairs[0][1], s, t, space) + unipc.increment(pairs[1:], plain, pairs[0][1])
    return state, None if space == "eps" and is_long(s, t) else Made(t, used, plain, space)


def correction(made: Made, seen: Seen) -> Any:
    """What the corrector adds to a predicted state, once the model was called there (`seen`)."""
    t, used, old, space = made
    if space != "v":
        pairs = [(e.node, e.prediction(space)) for e in used]
        return unipc.correction(unipc.Step(used[0].node, t, pairs, old), seen.prediction(space), space, VARIANT)
    angles = [_angle(e.node) for e in (*used, seen)]
    new = angle_weights(angles, angles[0], angles[-1])
    changes = [(a[0] - b[0], a[1] - b[1]) for a, b in zip(new, [*old, (0.0, 0.0)], strict=True)]
    return _turned([*used, seen], changes, t)


def angle_weights(angles: Sequence[float], start: float, stop: float) -> list[tuple[float, float]]:
    """(c_j, s_j): integrals over [start, stop] of `cos(a) l_j(a)` and `sin(a) l_j(a)`, l_j the Lagrange polynomials."""
    half = (stop - start) / 2
    at = [start + half * (1 + p) for p in POINTS]
    basis = np.array([lagrange(angles, a) for a in at])
    c, s = (half * (WEIGHTS * f(at)) @ basis for f in (np.cos, np.sin))
    return [(float(a), float(b)) for a, b in zip(c, s, strict=True)]


def _turned(used: Sequence[Seen], weights: Sequence[tuple[float, float]], t: Node) -> Any:
    total: Any = 0.0
    for e, (c, s) in zip(used, weights, strict=True):
        total = total + (_size(t) * c) * e.prediction("eps") - (_size(t) * s) * e.d
    return total


def _angle(node: Node) -> float:
    return math.atan2(node.sigma, node.alpha)


def _size(node: Node) -> float:
    return math.hypot(node.alpha, node.sigma)


def choices(rows: Any, calls: int) -> list[Choice]:
    """One choice a call, from one for all or a list.

    Raises:
        OptionError: for a list of another length.
    """
    if isinstance(rows, (Mapping, Choice)):
        return [Choice.of(rows)] * calls
    if isinstance(rows, str) or not isinstance(rows, Sequence) or len(rows) != calls:
        raise OptionError(f"sampler 'usf': rows must be one row for all or a list of {calls}, one a call, got {rows!r}")
    return [Choice.of(row) for row in rows]


def _order(rows: Any = None, **_: Any) -> int:
    listed = rows if isinstance(rows, (list, tuple)) and not isinstance(rows, Choice) else [rows or {}]
    return min(c.order + c.corrector for c in map(Choice.of, listed))


@sampler(
    "usf",
    order=_order,
    paper="arXiv:2312.07243 (USF: a row's order, prediction type and corrector are chosen one by one)",
    variants=(
        {"rows": {"order": 1, "space": "v"}},
        {"rows": {"order": 1, "space": "eps", "corrector": True}},
        {"rows": {"order": 2, "space": "v"}},
        {"rows": {"order": 2, "space": "x0", "corrector": True}},
        {"rows": {"order": 3, "space": "v"}},
        {"rows": {"order": 2, "space": "v", "corrector": True}},
        {"rows": {"order": 3, "space": "eps"}},
    ),
)
def usf(x: Any, nodes: Nodes, predict: Any, noise: Any, *, rows: Any = None) -> Any:
    """Row i: `rows[i]`'s order, space and corrector. Rows from a node with infinite lam and rows to sigma = 0 are of
    first order.

    Args:
        rows: one of `{"order": 2, "space": "x0", "corrector": False}` for all calls, or a list of one a call; None is
            DPM-Solver++ 2M. `calibrate.search` finds them.
    """
    past: list[Seen] = []
    made: Made | None = None
    for (_, s, t), choice in zip(intervals(nodes), choices(rows or {}, len(nodes) - 1), strict=True):
        seen = Seen(s, predict(x, s), x)
        if made is not None:
            x = x + correction(made, seen)
        past = [seen, *past][:HIGHEST]
        x, done = advanced(x, past, t, choice)
        made = done if choice.corrector else None
    return x


def _begun(table: Table, nodes: Nodes, k: int, options: dict[str, Any]) -> Table:
    """A run that begins at call k: its rows, without history."""
    rows = options["rows"]
    tail = rows[k:] if isinstance(rows, list | tuple) and not isinstance(rows, Choice) else rows
    return get("usf").unedited(nodes[k:], **{**options, "rows": tail})


add(replace(REGISTRY["usf"], begin=_begun))
