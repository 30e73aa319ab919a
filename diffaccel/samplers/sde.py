"""DPM-Solver++ multistep for the diffusion SDE, orders 2 and 3."""

from __future__ import annotations

import math
from typing import Any

from ..core.node import Node, decay, step
from ..core.path import Nodes
from ..core.phi import exact_weights
from ..errors import OptionError, one_of
from .common import finite, intervals, ratios
from .dpmpp import FORMS
from .registry import sampler

PAPER = "arXiv:2211.01095, Section 6 and Appendix B; with eta as in k-diffusion"


def _order(p: int) -> Any:
    """p for the ODE (eta = 0); the weak order of an Adams method under additive noise is 2 at most."""
    return lambda eta=1.0, **_: p if eta == 0 else min(p, 2)


@sampler(
    "dpmpp_2m_sde",
    order=_order(2),
    paper=PAPER,
    stochastic=True,
    variants=({"eta": 0.0}, {"eta": 0.0, "form": "exact"}, {"eta": 0.4, "form": "exact"}),
)
def dpmpp_2m_sde(
    x: Any,
    nodes: Nodes,
    predict: Any,
    noise: Any,
    *,
    eta: float = 1.0,
    form: str = "midpoint",
    s_noise: float = 1.0,
) -> Any:
    """`x_t = (sigma_t/sigma_s) e^(-eta h) x_s + alpha_t sum_j w_j D_j + sigma_t sqrt(1 - e^(-2 eta h)) z`.

    The weights integrate `e^((1 + eta)(lam - lam_t)) (1 + eta) D(lam)` over the step.

    Args:
        eta: 0 is `dpmpp` (ODE), 1 the time-reversed SDE; 0 or more.
        form: "midpoint", or "exact" (the line through two predictions integrated exactly; elsewhere called "heun").
        s_noise: scale of the fresh noise; other than 1 the noise level is no longer the grid's.
    """
    one_of("form", form, FORMS)
    return _multistep(x, nodes, predict, noise, 2, eta, form, s_noise)


@sampler("dpmpp_3m_sde", order=_order(3), paper=PAPER, stochastic=True, variants=({"eta": 0.0}, {"eta": 0.5}))
def dpmpp_3m_sde(x: Any, nodes: Nodes, predict: Any, noise: Any, *, eta: float = 1.0, s_noise: float = 1.0) -> Any:
    """As `dpmpp_2m_sde`, with the parabola through three predictions integrated exactly.

    Args:
        eta: 0 is the ODE, 1 the time-reversed SDE; 0 or more.
        s_noise: scale of the fresh noise.
    """
    return _multistep(x, nodes, predict, noise, 3, eta, "exact", s_noise)


def _multistep(
    x: Any, nodes: Nodes, predict: Any, noise: Any, order: int, eta: float, form: str, s_noise: float
) -> Any:
    if not (0 <= eta < math.inf and 0 <= s_noise < math.inf):
        raise OptionError(f"eta and s_noise must be finite and 0 or more, got eta = {eta}, s_noise = {s_noise}")
    past: list[tuple[Node, Any]] = []
    for _, s, t in intervals(nodes):
        d = predict(x, s)
        e = decay(s, t)
        kept = e**eta  # 1 at eta = 0 even where h is infinite
        x = (t.sigma / s.sigma * kept) * x + (t.alpha * (1 - e * kept)) * d
        for w, dj in _slopes(past, s, t, eta, form):
            x = x + (t.alpha * w) * (dj - d)
        fresh = s_noise * t.sigma * math.sqrt(1 - kept * kept)
        if fresh > 0:
            x = x + fresh * noise()
        if finite(s):
            past = [(s, d), *past][: order - 1]
    return x


def _slopes(past: list[tuple[Node, Any]], s: Node, t: Node, eta: float, form: str) -> list[tuple[float, Any]]:
    """(weight, past prediction) in units of alpha_t; none without history or for the step to sigma = 0."""
    if not past or t.sigma == 0 or not finite(s):
        return []
    h = step(s, t)
    r = ratios([node for node, _ in past], s, h)
    z = -(1 + eta) * h
    if form == "midpoint" and len(past) == 1:
        return [(-0.5 * math.expm1(z) / r[0], past[0][1])]
    weights = exact_weights([0.0, *r], z)[1:]
    return [(-float(w), dj) for w, (_, dj) in zip(weights, past, strict=True)]
