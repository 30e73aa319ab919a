"""RES 2M: the multistep form of the refined exponential solver."""

from __future__ import annotations

from typing import Any

from ..core.node import Node, step
from ..core.path import Nodes
from ..core.phi import phi
from .common import finite, intervals, lead
from .registry import sampler


@sampler("res_2m", order=2, paper="arXiv:2308.02157, Eq. 12 with one past prediction as the second stage")
def res_2m(x: Any, nodes: Nodes, predict: Any, noise: Any) -> Any:
    """`x_t = (sigma_t/sigma_s) x_s + alpha_t h (b_1 D_s + b_2 D_last)`, `b_2 = phi_2(-h)/c`, `b_1 = phi_1(-h) - b_2`.

    `c = (lam_last - lam_s)/h < 0` is where the last prediction was made. It integrates the line through both
    predictions exactly, as `dpmpp` with `form="exact"` does, but with no lower order towards the end.
    """
    last: tuple[Node, Any] | None = None
    for _, s, t in intervals(nodes):
        d = predict(x, s)
        x = lead(x, d, s, t, "x0")
        if last is not None and t.sigma > 0:
            h = step(s, t)
            b2 = h * phi(2, -h) * h / (last[0].lam - s.lam)
            x = x + (t.alpha * b2) * (last[1] - d)
        last = (s, d) if finite(s) else None
    return x
