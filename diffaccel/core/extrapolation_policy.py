"""Decisions during a run: skip this call or not, and what is answered instead (FSampler's adaptive part).

The state of a run is explicit (`Memory`, `Count`), so the hook on a denoiser and the functional loop share the rules.
Values are numpy arrays or tensors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import OptionError
from .extrapolation import Predictor, combined, gate_error, lagrange, norm
from .node import Node
from .path import Nodes
from .pattern import LEAST, Pattern
from .prediction import Output, Prediction, convert, pair
from .trace import first_order

KEPT = 4  # answers: no predictor goes through more
GRADIENT_LIMIT = 0.25
STABILIZER_RANGE = (0.5, 2.0)


@dataclass(frozen=True)
class Gate:
    """When an adaptive run may skip a call.

    Args:
        tol: largest relative difference of the predictions by 3 and by 2 points (see `gate_error`).
        anchor: every so many nodes, counted from the end of the protected start, the model is called; 0: never for
            this reason.
        max_consecutive: most skips in a row.
        protect: nodes at both ends of a run that are always called.
    """

    tol: float = 0.10
    anchor: int = 4
    max_consecutive: int = 4
    protect: tuple[int, int] = (2, 2)

    def __post_init__(self) -> None:
        if not (self.tol > 0 and self.anchor >= 0 and self.max_consecutive >= 1):
            raise OptionError(
                f"an adaptive gate needs tol > 0, anchor of 0 or more, max_consecutive of 1 or more; got {self.tol}, "
                f"{self.anchor}, {self.max_consecutive}"
            )
        if self.protect[0] < 0 or self.protect[1] < 1:
            raise OptionError(f"protect = {self.protect}: the first number is 0 or more, the second 1 or more")

    def refusal(self, i: int, n: int, count: Count) -> str:
        """Why node i of n is called without looking at the predictions; "" if they decide."""
        if not self.protect[0] <= i < n - self.protect[1]:
            return "protected"
        if count.real < 3:
            return "history"
        if count.consecutive >= self.max_consecutive:
            return "max_consecutive"
        return "anchor" if self.anchor and (i - self.protect[0]) % self.anchor == 0 else ""


@dataclass
class Count:
    """Calls so far in a run: real ones, and skips since the last one."""

    real: int = 0
    consecutive: int = 0

    def note(self, skipped: bool) -> None:
        """One more node."""
        self.consecutive = self.consecutive + 1 if skipped else 0
        self.real += not skipped


@dataclass
class Memory:
    """Real answers of one branch, newest first, and the stabiliser.

    Args:
        index: whether weights count answers instead of using their positions.
        beta: of the stabiliser `L <- clip(beta L + (1 - beta) |q_hat| / |q|, 0.5, 2)`, `q_hat` from a history that
            already holds q, as in FSampler; None: no stabiliser.
        order: points of its q_hat.
    """

    index: bool = False
    beta: float | None = None
    order: int = 2
    past: deque[tuple[Any, Any]] = field(default_factory=lambda: deque(maxlen=KEPT))  # (position, answer)
    level: Any = 1.0
    seen: int = 0

    def add(self, position: Any, answer: Any) -> None:
        """A real answer."""
        self.past.appendleft((position, answer))
        self.seen += 1
        if self.beta is not None and self.seen >= 3:
            ratio = norm(self.raw(self.order, position)) / (norm(answer) + 1e-8)
            self.level = stabilized(self.level, ratio, self.beta)

    def raw(self, order: int, position: Any) -> Any:
        """The polynomial through the latest `order` answers (or as many as there are, 2 at least) at a position."""
        chosen = list(self.past)[:order]
        where: Sequence[Any] = range(len(chosen), 0, -1) if self.index else [p for p, _ in chosen]
        target = len(chosen) + 1 if self.index else position
        return combined(lagrange(where, target), [q for _, q in chosen])

    def predicted(self, order: int, position: Any) -> Any:
        """What a skip answers: `raw`, divided by the stabiliser's level."""
        value = self.raw(order, position)
        return value / self.level if self.beta is not None and self.seen >= 3 else value


def stabilized(level: Any, ratio: Any, beta: float) -> Any:
    """The stabiliser's next level, from the ratio of predicted to real size."""
    return (beta * level + (1 - beta) * ratio).clip(*STABILIZER_RANGE)


def with_gradient(slope: Any, previous: Any) -> Any:
    """FSampler's "gradient estimation": `d + g`, `g = d - d_prev` scaled to at most 0.25 |d|."""
    g = slope - previous
    limit = GRADIENT_LIMIT * norm(slope) / norm(g).clip(1e-12)
    return slope + g * limit.clip(None, 1.0)


@dataclass
class Extrapolating:
    """A `predict` for functional sampling that answers some calls by extrapolation.

        predict = Extrapolating(model, nodes, pattern="h2/s2")    # or gate=Gate()
        x = da.sample(predict, x_T, "ddim", nodes=nodes)

    Args:
        model: `model(x, node)` gives a `Prediction`, or x0.
        nodes: of the run; each is called once, in order.
        pattern: which nodes are skipped; None: the gate decides.
        gate: decides where there is no pattern.
        predictor: what is extrapolated; an adaptive run skips with 3 points, compared with 2.
        stabilizer: beta of FSampler's "learning", or None.
        gradient: FSampler's "gradient estimation" on skips.

    Attributes:
        decisions: (node, skipped, reason, error) for each node; error is None where a rule decided.
        predictions: (node, answer in the predictor's space, before the stabiliser) of the skips.
        levels: the stabiliser after each node.
    """

    model: Callable[[Any, Node], Any]
    nodes: Nodes
    pattern: Pattern | None = None
    gate: Gate = field(default_factory=Gate)
    predictor: Predictor = field(default_factory=Predictor)
    stabilizer: float | None = None
    gradient: bool = False

    def __post_init__(self) -> None:
        self.decisions: list[tuple[int, bool, str, float | None]] = []
        self.predictions: list[tuple[int, Any]] = []
        self.levels: list[float] = []
        self._count, self._slope = Count(), None
        adaptive = self.pattern is None
        history = 3 if adaptive else self.pattern.history  # type: ignore[union-attr]
        self._order = history
        order = 2 if adaptive else history
        self._memory = Memory(self.predictor.coordinate == "index", self.stabilizer, order)
        n = len(self.nodes) - 1
        self._skipped = set() if adaptive else set(self.pattern.skipped(n))  # type: ignore[union-attr]

    def __call__(self, x: Any, node: Node) -> Prediction:
        """The model's answer, or its extrapolation."""
        i = len(self.decisions)
        skip, reason, error = self._decide(i, x, node)
        self.decisions.append((i, skip, reason, error))
        answer = self._skip(i, x, node) if skip else self._call(x, node)
        self._count.note(skip)
        self.levels.append(float(self._memory.level))
        return answer

    @property
    def calls(self) -> int:
        """Model calls made."""
        return sum(not skipped for _, skipped, _, _ in self.decisions)

    # ------------------------------------------------------------------ the two answers
    def _call(self, x: Any, node: Node) -> Prediction:
        given = self.model(x, node)
        given = given if isinstance(given, Prediction) else Prediction(given)
        if self.predictor.usable(node, self.nodes.path):
            self._memory.add(self._position(node), self._quantity(given, x, node))
        if self.gradient:
            self._slope = convert(given, self._slope_space, x, node)
        return given

    def _skip(self, i: int, x: Any, node: Node) -> Prediction:
        position = self._position(node)
        self.predictions.append((i, self._memory.raw(self._order, position)))
        answer = self._given(self._memory.predicted(self._order, position), node)
        if not self.gradient:
            return answer
        slope = convert(answer, self._slope_space, x, node)
        return Prediction(with_gradient(slope, self._slope), self._slope_space)

    # ------------------------------------------------------------------ the decision
    def _decide(self, i: int, x: Any, node: Node) -> tuple[bool, str, float | None]:
        n = len(self.nodes) - 1
        if self.pattern is not None:
            due = i in self._skipped
            enough = len(self._memory.past) >= LEAST and self.predictor.usable(node, self.nodes.path)
            return (True, "", None) if due and enough else (False, "history" if due else "pattern", None)
        reason = self.gate.refusal(i, n, self._count)
        if reason:
            return False, reason, None
        position = self._position(node)
        high, low = (self._memory.raw(order, position) for order in (3, 2))
        error = float(gate_error(high, low, x, self._step(i, node)))
        return (True, "", error) if error <= self.gate.tol else (False, "tolerance", error)

    def _step(self, i: int, node: Node) -> tuple[float, float]:
        """The first-order step from node i in the extrapolated quantity."""
        a, b = first_order(node, self.nodes[i + 1])
        u, w = pair(Output(self._space), "x0", node)
        return float(a + b * u), float(b * w * self._scale(node))

    # ------------------------------------------------------------------ quantities
    @property
    def _space(self) -> str:
        return self.predictor.space(self.nodes.path)

    @property
    def _slope_space(self) -> str:
        return "flow" if self.nodes.path.family == "flow" else "eps"

    def _position(self, node: Node) -> float:
        return self.predictor.position(node, self.nodes.path)

    def _scale(self, node: Node) -> float:
        """The quantity is an answer in `_space` divided by this."""
        return 1.0 / self.predictor.factor(node, self.nodes.path)

    def _quantity(self, given: Prediction, x: Any, node: Node) -> Any:
        return convert(given, self._space, x, node) * self.predictor.factor(node, self.nodes.path)

    def _given(self, quantity: Any, node: Node) -> Prediction:
        return Prediction(quantity * self._scale(node), self._space)
