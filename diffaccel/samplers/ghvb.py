"""GHVB: Adams-Bashforth with momentum (generalised heavy ball), and heavy ball or Nesterov momentum on PLMS."""

from __future__ import annotations

import math
from typing import Any

from ..core.linear import carry
from ..core.node import Node
from ..core.path import Nodes
from ..errors import OptionError, one_of
from .common import eps_space, intervals, lead, weighted
from .lms import level_weights
from .pndm import adams_bashforth
from .registry import sampler

KINDS = ("ghvb", "heavy_ball", "nesterov")
WEIGHTS = ("constant", "variable")


def split(order: float) -> tuple[int, float]:
    """(r, beta) with `order = r - 1 + beta`, `0 < beta <= 1`.

    Raises:
        OptionError: outside (0, 4].
    """
    if isinstance(order, bool) or not isinstance(order, (int, float)) or not 0 < order <= 4:
        raise OptionError(f"sampler 'ghvb': order must lie in (0, 4], got {order!r}")
    r = math.ceil(order)
    return r, order - r + 1.0


def _order(order: float = 1.8, kind: str = "ghvb", weights: str = "constant", **_: Any) -> int:
    r, beta = split(order)
    if kind != "ghvb" and beta < 1:
        return 1  # the velocity lags behind the prediction by (1 - beta)/beta steps
    return r if weights == "variable" else min(r, 2)


@sampler(
    "ghvb",
    order=_order,
    space="eps",
    paper="arXiv:2307.11118 (heavy ball, Nesterov, GHVB), with the weights of the authors' momentum_scheduler.py",
    variants=(
        {"order": 0.9},
        {"order": 2.0},
        {"order": 3.7},
        {"order": 2.5, "weights": "variable"},
        {"order": 3.7, "weights": "variable"},
        {"order": 2.7, "kind": "heavy_ball"},
        {"order": 2.7, "kind": "nesterov"},
    ),
)
def ghvb(
    x: Any,
    nodes: Nodes,
    predict: Any,
    noise: Any,
    *,
    order: float = 1.8,
    kind: str = "ghvb",
    weights: str = "constant",
) -> Any:
    """`x_t/alpha_t = x_s/alpha_s + (sigma_t/alpha_t - sigma_s/alpha_s) u` with a velocity `v <- (1 - beta) v + beta e`.

    Args:
        order: `r - 1 + beta`: 2.7 is r = 3, beta = 0.7; an integer is plain Adams-Bashforth (beta = 1). Momentum
            (smaller beta) damps the artifacts of strong guidance; there is no published best value.
        kind: "ghvb": u is the integral of the prediction implied by the past velocities. "heavy_ball": v averages the
            Adams-Bashforth increment, `u = v`. "nesterov": the same v, `u = (1 - beta) v + beta (increment)`.
        weights: "constant" for equidistant steps, as published; or "variable", integrals over the actual sigma/alpha,
            which have the full order r but are often worse below 100 steps.
    """
    r, beta = split(order)
    one_of("kind", kind, KINDS)
    one_of("weights", weights, WEIGHTS)
    past: list[tuple[Node, Any]] = []  # velocities ("ghvb") or predictions, newest first
    v: Any = None
    for _, s, t in intervals(nodes):
        space = eps_space(s)
        mean = p = predict(x, s, space=space)
        if space == "eps" and t.sigma > 0:
            if kind == "ghvb":
                v = averaged(v, p, beta)
                past = [(s, v), *past][:r]
                mean = weighted(velocity_weights(past, s, t, beta, weights), past)
            else:
                past = [(s, p), *past][:r]
                push = weighted(step_weights(past, s, t, weights), past)
                v = averaged(v, push, beta)
                mean = v if kind == "heavy_ball" else (1 - beta) * v + beta * push
        x = lead(x, mean, s, t, space)
    return x


def averaged(v: Any, p: Any, beta: float) -> Any:
    """`(1 - beta) v + beta p`, which begins with p, kept as a register; without momentum p itself."""
    if beta == 1:
        return p
    return carry(p if v is None else (1 - beta) * v + beta * p)


def step_weights(past: list[tuple[Node, Any]], s: Node, t: Node, weights: str) -> Any:
    """Weights (sum 1) of the mean over the step s -> t of the polynomial through `past`."""
    if weights == "constant":
        return adams_bashforth(len(past))
    return level_weights([node.level for node, _ in past], s.level, t.level)


def velocity_weights(past: list[tuple[Node, Any]], s: Node, t: Node, beta: float, weights: str) -> Any:
    """`w + (1/beta - 1)(w - q)`: w the weights of the step s -> t, q those of the step that ended at s.

    The prediction is `v_n + (1/beta - 1)(v_n - v_{n-1})`, so its mean is that of v and of v one step earlier.
    """
    w = step_weights(past, s, t, weights)
    if len(past) == 1:
        return w
    if weights == "constant":
        q = adams_bashforth(len(past), -1.0, 0.0)
    else:
        q = level_weights([node.level for node, _ in past], past[1][0].level, s.level)
    return w + (1 / beta - 1) * (w - q)
