"""LMS: linear multistep in sigma/alpha."""

from __future__ import annotations

from typing import Any

from ..core.node import Node
from ..core.path import Nodes
from ..core.phi import lagrange_integrals
from .common import check_order, eps_space, intervals, lead, weighted
from .registry import sampler


@sampler(
    "lms",
    order=lambda order=4, **_: order,
    space="eps",
    paper="K. Crowson, k-diffusion, sample_lms; the ODE of arXiv:2206.00364, Eq. 1",
    variants=tuple({"order": k} for k in (1, 2, 3)),
)
def lms(x: Any, nodes: Nodes, predict: Any, noise: Any, *, order: int = 4) -> Any:
    """`x_t/alpha_t = x_s/alpha_s + Int eps d(sigma/alpha)`, eps a polynomial in sigma/alpha through past predictions.

    Args:
        order: 1 to 4; it grows from 1 as predictions become known. The step to sigma = 0 is of first order.
    """
    check_order("lms", order, 4)
    past: list[tuple[Node, Any]] = []
    for _, s, t in intervals(nodes):
        space = eps_space(s)
        mean = p = predict(x, s, space=space)
        if space == "eps" and t.sigma > 0:
            past = [(s, p), *past][:order]
            mean = weighted(level_weights([node.level for node, _ in past], s.level, t.level), past)
        x = lead(x, mean, s, t, space)
    return x


def level_weights(levels: list[float], a: float, b: float) -> Any:
    """Weights (sum 1) of the mean over [a, b] of polynomials through values at `levels`."""
    return lagrange_integrals(levels, a, b) / (b - a)
