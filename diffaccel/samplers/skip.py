"""FSampler's static patterns as a rewriter: at some nodes the model's answer is a polynomial through earlier ones.

Such a run is a linear multistep method, so it needs no hook: it compiles to a table with one row a real call, and
`num_inference_steps` stays the number of model calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.extrapolation import Predictor, combined
from ..core.node import Node
from ..core.path import Nodes
from ..core.pattern import LEAST, Pattern, parse
from ..core.prediction import Prediction, convert
from ..core.table import Mix, Row, Table
from ..core.trace import trace_loop
from ..errors import OptionError
from .registry import Sampler
from .rewrite import rewriter, with_loop


@rewriter(
    "skip",
    stage="path",
    clashes={
        "restart": "a jump back up in noise drops the answers that a skip is predicted from",
        "time_shift": "the model would be fed other times than those that predictions are made for",
    },
)
def skip(
    sampler: Sampler,
    pattern: str | Sequence[int] = "h2/s2",
    *,
    quantity: str | None = None,
    coordinate: str = "lam",
    protect: Sequence[int] = (2, 2),
    real_history: bool = True,
    streak_rule: bool = False,
) -> Sampler:
    """Leave out model calls and predict their answers (ComfyUI-FSampler, arXiv:2511.09180).

    Args:
        pattern: "h2/s3" (2 points, 3 calls between skips), explicit nodes "h3, 5, 9" or [5, 9]; see `core.pattern`.
        quantity: what is extrapolated: "x0", "eps", "flow", "residual"; None: the sampler's own space. A sampler with a
            history takes its own space only.
        coordinate: "lam", "sigma" or "index"; see `core.extrapolation.Predictor`.
        protect: nodes at the two ends that a pattern always calls.
        real_history: predicted answers do not enter the history of a multistep sampler. With the predictor that
            matches the sampler (exact `dpmpp` of order p, p points, "lam") the run is then that sampler on the nodes
            that are called.
        streak_rule: FSampler's own rule for explicit nodes, which drops some of them.
    """
    first, last = protect
    found = parse(pattern, (first, last), streak_rule=streak_rule)
    own = sampler.space if isinstance(sampler.space, str) else "x0"
    predictor = Predictor(found.history, quantity or own, coordinate)
    if sampler.counts_calls or sampler.intervals is not None:
        raise OptionError(f"rewriter 'skip' needs a sampler that makes one call an interval; {sampler.name!r} does not")
    made = _Skipping(sampler, found, predictor, real_history, quantity is None)
    return with_loop(
        sampler,
        made.loop,
        calls=False,
        intervals=lambda calls, **_: found.nodes_for(calls),
        begin=made.begin,
    )


@dataclass(frozen=True)
class _Skipping:
    sampler: Sampler
    pattern: Pattern
    predictor: Predictor
    real_history: bool
    own_space: bool

    # ------------------------------------------------------------------ whole runs
    def loop(self, x: Any, nodes: Nodes, predict: Any, noise: Any, **options: Any) -> Any:
        skipped = frozenset(self.pattern.skipped(len(nodes) - 1))
        return self._run(x, nodes, predict, noise, skipped, LEAST, options)

    def begin(self, table: Table, nodes: Nodes, k: int, options: dict[str, Any]) -> Table:
        """The rows from row k on, the same nodes being called; without enough answers the latest one is held."""
        called = {id(row.node) for row in table.rows[k:]}
        at = next(i for i, node in enumerate(nodes) if node is table.rows[k].node)
        rest = nodes[at:]
        skipped = frozenset(i for i, node in enumerate(rest[:-1]) if id(node) not in called)

        def loop(x: Any, nodes: Nodes, predict: Any, noise: Any, **options: Any) -> Any:
            return self._run(x, nodes, predict, noise, skipped, 1, options)

        return trace_loop(
            loop, rest, space=self.sampler.space_of(options), name=table.sampler, options=dict(table.options)
        )

    def _run(
        self,
        x: Any,
        nodes: Nodes,
        predict: Any,
        noise: Any,
        skipped: frozenset[int],
        least: int,
        options: dict[str, Any],
    ) -> Any:
        base = self._table(nodes, options)
        predictor = self._predictor(options)
        past = _Past(predictor, nodes, least)
        if not self.real_history:
            answer = _answers(predict, nodes, skipped, past, predictor, self.sampler.space_of(options))
            return self.sampler.loop(x, nodes, answer, noise, **options)
        one_step = all(len(row.out.p) <= 1 for row in base.rows)
        rows = list(base.rows) if one_step else self._rows(nodes, skipped, options)
        kept: list[Any] = []  # answers as later rows use them, newest first
        for i, row in enumerate(rows):
            node = nodes[i]
            if i in skipped:
                quantity = Prediction(past.predicted(i), predictor.space(nodes.path))
                x = _advanced(row.out, x, [convert(quantity, row.space, x, node), *kept])
                continue
            space = self._space(row, node, nodes, predictor, one_step)
            given = predict(x, node, space=space)
            if space == predictor.space(nodes.path):
                past.add(node, given)
            p = convert(Prediction(given, space), row.space, x, node) if space != row.space else given
            kept = [p, *kept]
            x = _advanced(row.out, x, kept)
        return x

    def _space(self, row: Row, node: Node, nodes: Nodes, predictor: Predictor, one_step: bool) -> Any:
        """The space in which the model is called: the predictor's, or the row's where they cannot be one."""
        wanted = predictor.space(nodes.path)
        if row.space == wanted or not predictor.usable(node, nodes.path):
            return row.space
        if not one_step:
            raise OptionError(
                f"rewriter 'skip': {self.sampler.name!r} combines earlier predictions in {row.space!r} space, and "
                f"quantity {predictor.quantity!r} is kept in {wanted!r}; one would have to be made from the other with "
                f"earlier states, which edits of the state do not reach. Use quantity={row.space!r}, or a one-step "
                "sampler (ddim)."
            )
        return wanted

    def _predictor(self, options: dict[str, Any]) -> Predictor:
        space = self.sampler.space_of(options)
        if not self.own_space or not isinstance(space, str):
            return self.predictor
        return Predictor(self.predictor.history, space, self.predictor.coordinate)

    # ------------------------------------------------------------------ rows
    def _table(self, nodes: Nodes, options: dict[str, Any]) -> Table:
        """The sampler's own table, after the checks that its rows can be composed."""
        name = self.sampler.name
        table = trace_loop(
            self.sampler.loop, nodes, space=self.sampler.space_of(options), name=name, options=dict(options)
        )
        if table.stochastic:
            raise OptionError(f"rewriter 'skip': {name!r} draws noise with these options; skips need a sampler without")
        if len(table) != len(nodes) - 1:
            raise OptionError(f"rewriter 'skip': {name!r} makes {len(table)} calls on {len(nodes) - 1} intervals")
        if self.real_history and (table.slots or not all(row.out.scalar for row in table.rows)):
            what = "keeps running averages" if table.slots else "has coefficients that are no numbers"
            raise OptionError(f"rewriter 'skip': {name!r} {what}, which a skip cannot be left out of")
        return table

    def _rows(self, nodes: Nodes, skipped: frozenset[int], options: dict[str, Any]) -> list[Row]:
        """Row i of the result is that of node i where the history holds only nodes that are called.

        It is taken from the sampler's table on the called nodes, together with both ends of interval i.
        """
        n = len(nodes) - 1
        called = [i for i in range(n) if i not in skipped]
        tables: dict[tuple[int, ...], Table] = {}
        rows = []
        for i in range(n):
            chosen = tuple(sorted({*called, i, i + 1, n}))
            if chosen not in tables:
                tables[chosen] = self._table(Nodes([nodes[j] for j in chosen], nodes.path), options)
            rows.append(tables[chosen].rows[chosen.index(i)])
        return rows


@dataclass
class _Past:
    """Real answers that a skip is predicted from, newest first."""

    predictor: Predictor
    nodes: Nodes
    least: int
    answers: list[tuple[Node, Any]] = field(default_factory=list)

    def add(self, node: Node, answer: Any) -> None:
        if self.predictor.usable(node, self.nodes.path):
            self.answers = [(node, answer), *self.answers][:4]

    def predicted(self, i: int) -> Any:
        """The answer at node i, in the predictor's space."""
        target, path = self.nodes[i], self.nodes.path
        chosen = self.answers[: self.predictor.history]
        if len(chosen) < self.least or not self.predictor.usable(target, path):
            raise OptionError(
                f"rewriter 'skip': node {i} (t = {target.t:g}) cannot be predicted: {len(chosen)} earlier answers have "
                f"a finite {self.predictor.coordinate!r} and {self.predictor.quantity!r}, and {self.least} are needed"
            )
        weights = self.predictor.weights([node for node, _ in chosen], target, path)
        return combined(weights, [answer for _, answer in chosen])


def _answers(
    predict: Any, nodes: Nodes, skipped: frozenset[int], past: _Past, predictor: Predictor, default: Any
) -> Callable[..., Any]:
    """A `predict` whose skipped nodes are answered by extrapolation; the loop may keep these answers."""
    place = {id(node): i for i, node in enumerate(nodes)}
    space_kept = predictor.space(nodes.path)

    def answer(x: Any, node: Node, *, space: Any = None, **how: Any) -> Any:
        wanted = default if space is None else space
        i = place[id(node)]
        if i in skipped:
            return convert(Prediction(past.predicted(i), space_kept), wanted, x, node)
        inner = space_kept if predictor.usable(node, nodes.path) else wanted
        given = predict(x, node, space=inner, **how)
        past.add(node, given)
        return given if inner == wanted else convert(Prediction(given, inner), wanted, x, node)

    return answer


def _advanced(mix: Mix, x: Any, predictions: list[Any]) -> Any:
    """The next state; numbers for coefficients, anything linear for values."""
    total = mix.x * x
    for b, p in zip(mix.p, predictions, strict=False):
        if b:
            total = total + b * p
    return total + mix.one if mix.one else total
