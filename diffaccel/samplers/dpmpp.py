"""DPM-Solver++ multistep, orders 1 to 3."""

from __future__ import annotations

from typing import Any

from ..core.node import Node, decay, step
from ..core.path import Nodes
from ..core.phi import exact_weights
from ..errors import one_of
from .common import check_order, finite, intervals, lead, order_at, ratios
from .registry import sampler

FORMS = ("exact", "midpoint")


@sampler(
    "dpmpp",
    order=lambda order=2, **_: order,
    paper="arXiv:2211.01095, Algorithm 2 and Appendix B",
    variants=(
        {"order": 1},
        {"order": 2, "form": "midpoint"},
        {"order": 2, "form": "exact", "lower_order_final": False},
        {"order": 3, "form": "exact", "lower_order_final": False},
        {"order": 3},
    ),
)
def dpmpp(
    x: Any,
    nodes: Nodes,
    predict: Any,
    noise: Any,
    *,
    order: int = 2,
    form: str = "midpoint",
    lower_order_final: bool = True,
) -> Any:
    """`x_t = (sigma_t/sigma_s) x_s + alpha_t (1 - e^-h) sum_j w_j D_j`, D_j the newest predictions.

    Args:
        order: 1, 2 or 3.
        form: of rows with one past prediction: "midpoint" as in the paper's Algorithm 2, or "exact", where the
            interpolation polynomial is integrated exactly (exponential Adams-Bashforth). Rows with two are always
            exact: the form in use elsewhere takes half of the second difference and is of order 2.
        lower_order_final: one order less towards the last nodes (advised below 15 calls).
    """
    check_order("dpmpp", order, 3)
    one_of("form", form, FORMS)
    past: list[tuple[Node, Any]] = []
    n = len(nodes) - 1
    for i, s, t in intervals(nodes):
        d = predict(x, s)
        p = order_at(i, n, order, len(past), lower_final=lower_order_final)
        x = lead(x, d, s, t, "x0") + correction(d, past[: p - 1], s, t, form)
        if finite(s):
            past = [(s, d), *past][: order - 1]
    return x


def correction(d: Any, past: list[tuple[Node, Any]], s: Node, t: Node, form: str) -> Any:
    """What higher orders add to the first-order step; 0 without history and for the step to sigma = 0."""
    if not past or t.sigma == 0 or not finite(s):
        return 0.0
    h = step(s, t)
    r = ratios([node for node, _ in past], s, h)
    if form == "midpoint" and len(past) == 1:
        weights = [0.5 * (decay(s, t) - 1) / r[0]]
    else:
        weights = list(exact_weights([0.0, *r], -h)[1:])
    total: Any = 0.0
    for w, (_, dj) in zip(weights, past, strict=True):
        total = total + (-t.alpha * w) * (dj - d)
    return total
