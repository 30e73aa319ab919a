"""Predicted answers in place of model calls: polynomial weights, quantities, coordinates (FSampler).

Everything that takes predictions or states works on numpy arrays, on tensors and on traced values alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError, one_of
from .grid import native
from .node import Node
from .path import Path

QUANTITIES = ("x0", "eps", "flow", "residual")
COORDINATES = ("index", "sigma", "lam")


def lagrange(points: Sequence[float], target: float) -> list[float]:
    """Weights w with `p(target) = sum_k w_k p(points_k)` for every polynomial p of degree < len(points).

    Raises:
        OptionError: if two points coincide.
    """
    if len(set(points)) < len(points):
        raise OptionError(f"two of the positions {list(points)} coincide: the grid repeats a noise level")
    return [
        math.prod((target - other) / (own - other) for j, other in enumerate(points) if j != k)
        for k, own in enumerate(points)
    ]


def index_weights(n: int) -> list[float]:
    """Weights of the n latest answers, newest first, counted as equally spaced: (2, -1), (3, -3, 1), (4, -6, 4, -1)."""
    return lagrange(list(range(n, 0, -1)), n + 1)


@dataclass(frozen=True)
class Predictor:
    """A polynomial through the latest real answers.

    Args:
        history: answers that it goes through, 2 to 4 (fewer where there are fewer).
        quantity: what is extrapolated: "x0", "eps", "flow", or "residual" (FSampler's "epsilon": `x0 - x/alpha` on VP
            and EDM paths, `x0 - x` on flow paths; it carries a factor sigma, so it depends on the path).
        coordinate: "index" (equally spaced, whatever lies between), "sigma" (sigma/alpha; sigma on flow paths), "lam".
    """

    history: int = 2
    quantity: str = "x0"
    coordinate: str = "lam"

    def __post_init__(self) -> None:
        one_of("quantity", self.quantity, QUANTITIES)
        one_of("coordinate", self.coordinate, COORDINATES)
        if self.history not in (2, 3, 4):
            raise OptionError(f"a predictor goes through 2 to 4 answers, not {self.history!r}")

    def space(self, path: Path) -> str:
        """The space in which answers are kept; "residual" is one of them times -sigma (or -sigma/alpha)."""
        if self.quantity != "residual":
            return self.quantity
        return "flow" if path.family == "flow" else "eps"

    def usable(self, node: Node, path: Path) -> bool:
        """Whether an answer at this node can take part: its position is finite, its quantity defined."""
        return math.isfinite(self.position(node, path)) and (self.space(path) != "eps" or node.alpha > 0)

    def factor(self, node: Node, path: Path) -> float:
        """The quantity is an answer in `space` times this: 1, for "residual" -sigma/alpha (-sigma on flow paths)."""
        return -native(node, path) if self.quantity == "residual" else 1.0

    def weights(self, past: Sequence[Node], target: Node, path: Path) -> list[float]:
        """Weights of answers at the nodes `past` (newest first, in `space`) for the answer at `target`."""
        n = len(past)
        if self.coordinate == "index":
            found = index_weights(n)
        else:
            found = lagrange([self.position(node, path) for node in past], self.position(target, path))
        scale = self.factor(target, path)
        return [w * self.factor(node, path) / scale for w, node in zip(found, past, strict=True)]

    def position(self, node: Node, path: Path) -> float:
        """Where an answer at this node lies in the coordinate ("index" has no positions of its own)."""
        return node.lam if self.coordinate == "lam" else native(node, path)


def combined(weights: Sequence[float], answers: Sequence[Any]) -> Any:
    """`sum_k w_k q_k`."""
    total = weights[0] * answers[0]
    for w, q in zip(weights[1:], answers[1:], strict=True):
        total = total + w * q
    return total


# ---------------------------------------------------------------------- sizes of arrays and tensors
def rms(value: Any, *, per_image: bool = False) -> Any:
    """Root mean square of everything (a scalar), or of each image (B,)."""
    flat = value.reshape(len(value), -1) if per_image else value
    return (flat * flat).mean(-1) ** 0.5 if per_image else (flat * flat).mean() ** 0.5


def norm(value: Any) -> Any:
    """Euclidean norm of everything, a scalar."""
    return (value * value).sum() ** 0.5


def gate_error(high: Any, low: Any, x: Any = None, step: tuple[float, float] | None = None, **how: bool) -> Any:
    """The relative difference that two predictors make to the next state.

    Args:
        high, low: predictions of the same answer by 3 and 2 points.
        x: the state at the node.
        step: (a, b) of the first-order step `x_next = a x + b q`; None: relative to the prediction itself.
        how: `per_image`.

    Returns:
        `|b| rms(high - low) / max(rms(a x + b high), 1e-6)`; a scalar, or (B,).
    """
    if step is None:
        return rms(high - low, **how) / rms(high, **how).clip(1e-6)
    a, b = step
    return abs(b) * rms(high - low, **how) / rms(a * x + b * high, **how).clip(1e-6)
