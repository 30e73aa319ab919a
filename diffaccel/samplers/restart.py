"""Restart: jumps back up in noise and solves down again, within the same number of model calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

from ..core.node import Node
from ..core.path import Nodes
from ..core.table import Table
from ..core.trace import trace_loop
from ..errors import OptionError, one_of
from .begin import begin_at, raised
from .registry import Sampler, get
from .restart_presets import PRESETS
from .rewrite import cost_of, rewriter, with_loop

GRIDS = ("karras", "uniform_t")
MIN_MAIN = 4  # calls of the main loop, and at least a third of all
AUTO_FROM = 20  # below that no setting is published
RHO = 7.0


class Segment(NamedTuple):
    """Restart between two noise levels (sigma/alpha).

    Args:
        nodes: of the restart grid, both ends included; one more than intervals.
        repeats: how often.
        low, high: levels; `low` is snapped to the nearest node of the main grid.
    """

    nodes: int
    repeats: int
    low: float
    high: float


@dataclass(frozen=True)
class Piece:
    """A part of a run without jumps: levels raised before it, then a sampler on nodes of its own."""

    lifts: tuple[tuple[Node, Node], ...]
    nodes: Nodes
    sampler: Sampler
    options: dict[str, Any]
    calls: int | None = None

    def loop(self, x: Any, predict: Any, noise: Any, s_noise: float) -> Any:
        """The state after it."""
        for s, t in self.lifts:
            a, fresh = raised(s, t)
            x = a * x + (s_noise * fresh) * noise()
        space = self.sampler.space_of(self.options)
        extra = {"calls": self.calls} if self.sampler.counts_calls else {}

        def call(state: Any, node: Node, **how: Any) -> Any:
            return predict(state, node, **({"space": space} | how))

        return self.sampler.loop(x, self.nodes, call, noise, **self.options, **extra)

    def table(self) -> Table:
        """Its rows alone."""
        return self.sampler.unedited(self.nodes, self.calls, **self.options)


@dataclass(frozen=True)
class Plan:
    """What `restart` was asked for, checked."""

    segments: tuple[Segment, ...] | None  # None: "auto"
    s_noise: float
    churn: float
    churn_range: tuple[float, float]
    grid: str
    inner: Sampler | None
    strict: bool = True  # a segment that would end at sigma = 0 is an error; else it ends at the last node before

    def segments_for(self, calls: int | None, cost: int) -> tuple[Segment, ...]:
        """The segments of a run of `calls` model calls; "auto" has A1111's sizes, counted in calls."""
        if self.segments is not None:
            return self.segments
        if calls is None or calls < AUTO_FROM:
            raise OptionError(
                f"rewriter 'restart': no setting is published for {calls} calls; from {AUTO_FROM} on 'auto' has one. "
                "Give segments=[(nodes, repeats, low, high), ...]"
            )
        n, repeats = (9, 1) if calls < 36 else (calls // 4, 2)
        return (Segment(max(1, n // cost) + 1, repeats, 0.1, 2.0),)

    # ------------------------------------------------------------------ calls
    def spent(self, sampler: Sampler, options: dict[str, Any], calls: int | None) -> int:
        """Model calls of all restarts of a run."""
        used, given = self._inner(sampler, options)
        each = cost_of(used, 1, given)
        return sum(s.repeats * cost_of(used, s.nodes - 1, given) for s in self.segments_for(calls, each))

    def main_calls(self, sampler: Sampler, options: dict[str, Any], calls: int) -> int:
        """What is left for the main loop.

        Raises:
            OptionError: if that is too little; the message has the smallest number of calls that works.
        """
        spent = self.spent(sampler, options, calls)
        if calls - spent < max(MIN_MAIN, calls / 3):
            least = max(spent + MIN_MAIN, math.ceil(1.5 * spent))
            least_text = f"the smallest number that works is {least}" if self.segments else "give smaller segments"
            raise OptionError(
                f"rewriter 'restart': its segments take {spent} of {calls} model calls; at least {MIN_MAIN}, and a "
                f"third of all, must be left for the main loop: {least_text}"
            )
        return calls - spent

    def _inner(self, sampler: Sampler, options: dict[str, Any]) -> tuple[Sampler, dict[str, Any]]:
        used, given = (sampler, dict(options)) if self.inner is None else (self.inner, self.inner.options({}))
        return used, _middle(used, given)

    # ------------------------------------------------------------------ pieces
    def pieces(self, sampler: Sampler, options: dict[str, Any], nodes: Nodes, calls: int | None) -> list[Piece]:
        """The whole run on the main grid `nodes`."""
        inner, inner_options = self._inner(sampler, options)
        segments = self.segments_for(calls, cost_of(inner, 1, inner_options))
        found: list[Piece] = []
        begin = 0
        for m, high, segment in self._placed(segments, nodes):
            if m > begin:
                found.append(Piece((), nodes[begin : m + 1], sampler, _middle(sampler, dict(options))))
                begin = m
            body = inner.placed(self._restart_grid(segment, nodes[m], high, nodes), inner_options)
            for _ in range(segment.repeats):
                found += self._repeat(nodes[m], body, inner, inner_options)
        if begin < len(nodes) - 1:
            found.append(Piece((), nodes[begin:], sampler, dict(options)))
        return _budgeted(found, sampler, calls)

    def _placed(self, segments: Sequence[Segment], nodes: Nodes) -> list[tuple[int, Node, Segment]]:
        """(node of the main grid where it ends, node where it begins, segment), in the order of the run."""
        found = []
        for segment in segments:
            last = len(nodes) - (not self.strict and nodes[-1].sigma == 0 and len(nodes) > 2)
            m = min(range(1, last), key=lambda j: abs(nodes[j].level - segment.low))
            what = f"rewriter 'restart': segment {tuple(segment)}"
            if nodes[m].sigma == 0:
                raise OptionError(
                    f"{what}: the node nearest to level {segment.low:g} is the end (sigma = 0), where a restart has "
                    f"nothing to solve; the last node before it has level {nodes[m - 1].level:g}"
                )
            high = self._high(segment, nodes)
            most = nodes.path.first.level
            if high.alpha == 0 or high.level > most * (1 + 1e-9):
                raise OptionError(
                    f"{what} would raise the noise to level {high.level:g}, but the model was trained up to {most:g}"
                )
            if high.level <= nodes[m].level:
                raise OptionError(
                    f"{what}: it ends at the node nearest to {segment.low:g}, which has level {nodes[m].level:g}; "
                    f"that is not below {high.level:g}, where it begins. A finer grid or a wider segment is needed"
                )
            found.append((m, high, segment))
        return sorted(found, key=lambda entry: (entry[0], entry[2].high))

    def _high(self, segment: Segment, nodes: Nodes) -> Node:
        node = nodes.path.at_level(segment.high)
        if self.grid == "karras" or not _discrete(nodes):
            return node
        near = [nodes.path.at(float(t)) for t in (math.floor(node.t), math.ceil(node.t))]
        return min(near, key=lambda n: abs(n.level - segment.high))

    def _restart_grid(self, segment: Segment, low: Node, high: Node, nodes: Nodes) -> Nodes:
        """From `high` to a copy of `low` (a copy, because the interval that opens at `low` is the main loop's)."""
        n, path = segment.nodes, nodes.path
        shares = [i / (n - 1) for i in range(1, n - 1)]
        if self.grid == "karras":
            a, b = high.level ** (1 / RHO), low.level ** (1 / RHO)
            inside = [path.at_level((a + (b - a) * r) ** RHO) for r in shares]
        else:
            ts = [high.t + (low.t - high.t) * r for r in shares]
            inside = [path.at(float(round(t)) if _discrete(nodes) else t) for t in ts]
        found = [high, *inside, replace(low)]
        if any(t.level >= s.level for s, t in pairwise(found)):
            raise OptionError(
                f"rewriter 'restart': {n} nodes do not fit between t = {high.t:g} and t = {low.t:g}; use fewer"
            )
        return Nodes(found, path)

    def _repeat(self, low: Node, body: Nodes, inner: Sampler, options: dict[str, Any]) -> list[Piece]:
        """One jump from `low` and the way down; an interval with churn is a piece of its own."""
        if self.churn == 0:
            return [Piece(((low, body[0]),), body, inner, options)]
        found: list[Piece] = []
        lifts: tuple[tuple[Node, Node], ...] = ((low, body[0]),)
        begin = 0
        for i, s in enumerate(body[:-1]):
            if self.churn_range[0] <= s.level <= self.churn_range[1]:
                if i > begin:
                    found.append(Piece(lifts, body[begin : i + 1], inner, options))
                    lifts = ()
                hat = body.path.at_level(s.level * (1 + self.churn))
                lifts = (*lifts, (s, hat))
                found.append(Piece(lifts, Nodes([hat, body[i + 1]], body.path), inner, options))
                lifts, begin = (), i + 1
        if begin < len(body) - 1:
            found.append(Piece(lifts, body[begin:], inner, options))
        return found


def _discrete(nodes: Nodes) -> bool:
    """Whether the model is fed whole training steps."""
    return nodes.path.family == "vp" and hasattr(nodes.path, "betas")


def _middle(sampler: Sampler, options: dict[str, Any]) -> dict[str, Any]:
    """The options for a piece that does not end the run: an order that falls towards the last nodes stays up."""
    return options | ({"lower_order_final": False} if "lower_order_final" in options else {})


def _budgeted(pieces: list[Piece], sampler: Sampler, calls: int | None) -> list[Piece]:
    """The pieces with as many calls as there are: what is short is saved in the last intervals of the main loop."""
    if calls is None:
        return pieces
    counts = [len(piece.table()) for piece in pieces]
    excess = sum(counts) - calls
    found = list(pieces)
    for i in reversed(range(len(pieces))):
        if pieces[i].sampler is sampler and not pieces[i].lifts and sampler.counts_calls and excess > 0:
            cut = min(excess, counts[i] - (len(pieces[i].nodes) - 1))
            found[i] = replace(pieces[i], calls=counts[i] - cut)
            excess -= cut
    if excess:
        raise OptionError(
            f"rewriter 'restart': sampler {sampler.name!r} makes {sum(counts)} calls on {len(pieces)} pieces, not "
            f"{calls}: it spends extra calls after each jump (a warm-up); use a sampler without"
        )
    return found


@rewriter("restart", stage="path", rank=1)
def restart(
    sampler: Sampler,
    segments: Any = "auto",
    *,
    s_noise: float | None = None,
    churn: float = 0.0,
    churn_range: Sequence[float] = (0.01, 1.0),
    grid: str | None = None,
    inner: str | None = None,
) -> Sampler:
    """Restart (arXiv:2306.14878, Algorithm 1) between noise levels: renoise, then solve down again, K times.

    The renoising is folded into the row that arrives at the lower level, the history is forgotten there, and the
    calls of the segments are taken from the main loop, so N model calls stay N. Timesteps are not monotonic then.

    Args:
        segments: [(nodes, repeats, low, high), ...] with levels in sigma/alpha, where `low` means the nearest node of
            the main grid; or the name of a published setting (`PRESETS`); or "auto": from 20 calls on 9 of them
            between levels 2 and 0.1, from 36 on twice a quarter. Where the node nearest to `low` is the end
            (sigma = 0), segments given by numbers are an error and named ones end at the node before it.
        s_noise: scale of all noise that is added; 1, or what the preset says.
        churn: at each restart interval that begins at a level in `churn_range`, the level is first raised by this
            share (the published EDM figures have 0.05).
        grid: of a segment: "karras" (rho = 7; the EDM settings) or "uniform_t" (the Stable Diffusion settings).
        inner: another sampler for the segments, with its default options ("heun" in the paper); None: the same.

    Raises:
        OptionError: unknown presets, values out of range, too few calls (with the smallest number that works), a
            sampler whose artifact decides the nodes.
    """
    if sampler.calibrated is not None and sampler.calibrated.nodes:
        raise OptionError(
            f"rewriter 'restart' takes calls from the main loop, but sampler {sampler.name!r} has its nodes for each "
            "number of calls from its artifact; leave one of them out"
        )
    preset: dict[str, Any] = {}
    named = isinstance(segments, str)
    if named and segments != "auto":
        preset = PRESETS[one_of("preset of rewriter 'restart'", segments, PRESETS)]
        segments = preset["segments"]
    made = Plan(
        None if segments == "auto" else tuple(_segment(s) for s in segments),
        preset.get("s_noise", 1.0) if s_noise is None else s_noise,
        churn,
        (float(churn_range[0]), float(churn_range[1])),
        one_of("grid of rewriter 'restart'", preset.get("grid", "karras") if grid is None else grid, GRIDS),
        None if inner is None else get(inner),
        strict=not named,
    )
    if not (made.s_noise > 0 and churn >= 0):
        raise OptionError(
            f"rewriter 'restart' needs s_noise > 0 and churn >= 0, got {made.s_noise} and {churn}: a restart without "
            "noise solves the same way twice"
        )
    return planned(sampler, made)


def _segment(given: Any) -> Segment:
    try:
        nodes, repeats, low, high = given
        found = Segment(int(nodes), int(repeats), float(low), float(high))
        ok = found == tuple(given) and found.nodes >= 2 and found.repeats >= 1 and 0 < found.low < found.high < math.inf
    except (TypeError, ValueError):
        ok = False
    if not ok:
        raise OptionError(
            "rewriter 'restart': a segment is (nodes, repeats, low, high) with nodes of 2 or more, repeats of 1 or "
            f"more, and levels 0 < low < high; got {given!r}"
        )
    return found


def planned(sampler: Sampler, made: Plan) -> Sampler:
    """The sampler that restarts by a plan."""
    if made.segments == ():
        return sampler

    def loop(x: Any, nodes: Nodes, predict: Any, noise: Any, *, calls: int | None = None, **options: Any) -> Any:
        for piece in made.pieces(sampler, options, nodes, calls):
            x = piece.loop(x, predict, noise, made.s_noise)
        return x

    def intervals(calls: int, **options: Any) -> int:
        return sampler.intervals_of(made.main_calls(sampler, options, calls), **options)

    def begin(table: Table, nodes: Nodes, k: int, options: dict[str, Any]) -> Table:
        pieces = made.pieces(sampler, options, nodes, len(table))
        tables = [piece.table() for piece in pieces]
        p = next(i for i in range(len(pieces)) if sum(map(len, tables[: i + 1])) > k)
        level = table.rows[k].node.level
        highest = max((t.level for piece in pieces[p + 1 :] for _, t in piece.lifts), default=0.0)
        if highest > level * (1 + 1e-9):
            raise OptionError(
                f"rewriter 'restart': a run that begins at call {k} of {len(table)} begins at level {level:g}, and a "
                f"later segment would raise the noise to {highest:g}: it would throw the image away. Begin at one of "
                f"the calls {_starts(table, pieces, tables)}, or use lower segments"
            )
        at = k - sum(map(len, tables[:p]))
        head = begin_at(tables[p], pieces[p].nodes, at, pieces[p].sampler, pieces[p].options)

        def rest(x: Any, nodes: Nodes, predict: Any, noise: Any, **_: Any) -> Any:
            x = head.apply(x, lambda state, node, space: predict(state, node, space=space), lambda _: noise())
            for piece in pieces[p + 1 :]:
                x = piece.loop(x, predict, noise, made.s_noise)
            return x

        return trace_loop(rest, nodes, name=table.sampler, options=dict(options))

    return with_loop(sampler, loop, calls=True, intervals=intervals, begin=begin, stochastic=True)


def _starts(table: Table, pieces: list[Piece], tables: list[Table]) -> list[int]:
    """The calls at which a run can begin."""
    found, count = [], 0
    for p, rows in enumerate(tables):
        highest = max((t.level for piece in pieces[p + 1 :] for _, t in piece.lifts), default=0.0)
        found += [count + i for i, row in enumerate(rows.rows) if row.node.level * (1 + 1e-9) >= highest]
        count += len(rows)
    return found
