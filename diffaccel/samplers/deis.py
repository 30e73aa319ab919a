"""DEIS: exponential Adams-Bashforth in noise space, integrated exactly."""

from __future__ import annotations

import math
from typing import Any

from ..core.node import Node, step
from ..core.path import Nodes
from ..core.phi import exact_weights
from .common import check_order, eps_space, intervals, lead, order_at, ratios, weighted
from .registry import sampler


@sampler(
    "deis",
    order=lambda order=3, **_: order,
    space="eps",
    paper="arXiv:2204.13902, Eq. 14, 15 (rhoAB with the polynomial in log rho)",
    variants=tuple({"order": k, "lower_order_final": False} for k in (1, 2, 3)),
)
def deis(x: Any, nodes: Nodes, predict: Any, noise: Any, *, order: int = 3, lower_order_final: bool = True) -> Any:
    """`x_t = (alpha_t/alpha_s) x_s - alpha_t Int e^-lam eps(lam) dlam`, eps a polynomial in lam = -log(sigma/alpha).

    The same as `unipc(variant="exact", space="eps", corrector=False)`.

    Args:
        order: 1 to 4, the number of predictions that the polynomial goes through.
        lower_order_final: one order less towards the last nodes (advised below 15 calls).
    """
    check_order("deis", order, 4)
    past: list[tuple[Node, Any]] = []
    n = len(nodes) - 1
    for i, s, t in intervals(nodes):
        space = eps_space(s)
        mean = p = predict(x, s, space=space)
        if space == "eps" and t.sigma > 0:
            past = [(s, p), *past][:order]
            used = past[: order_at(i, n, order, len(past) - 1, lower_final=lower_order_final)]
            mean = weighted(exponential_weights(used, s, t), used)
        x = lead(x, mean, s, t, space)
    return x


def exponential_weights(past: list[tuple[Node, Any]], s: Node, t: Node) -> Any:
    """Weights (sum 1) of the mean of eps over s -> t under `e^-lam dlam`, for polynomials through `past`."""
    h = step(s, t)
    return exact_weights(ratios([node for node, _ in past], s, h), h) / math.expm1(h)
