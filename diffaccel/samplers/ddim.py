"""DDIM, DDPM (ancestral) and plain Euler: first order, deterministic or stochastic."""

from __future__ import annotations

import math
from typing import Any

from ..core.node import Node, decay
from ..core.path import Nodes
from ..errors import OptionError
from .common import intervals, lead
from .registry import sampler


def ancestral(s: Node, t: Node, eta: float) -> tuple[float, float]:
    """Split of sigma_t into (kept noise, fresh noise) for a step s -> t; `eta = 1` is the DDPM posterior.

    `fresh = eta * sigma_t * sqrt(1 - e^(-2h))`: DDIM's Eq. 16 for VP, k-diffusion's ancestral step for VE.
    """
    fresh = eta * t.sigma * math.sqrt(max(0.0, 1 - decay(s, t) ** 2))
    return math.sqrt(max(0.0, (t.sigma - fresh) * (t.sigma + fresh))), fresh


@sampler("ddim", order=1, paper="arXiv:2010.02502, Eq. 12 and 16", variants=({"eta": 1.0}, {"eta": 0.5}))
def ddim(x: Any, nodes: Nodes, predict: Any, noise: Any, *, eta: float = 0.0) -> Any:
    """`x_t = alpha_t D + sqrt(sigma_t^2 - c^2) e + c z`, `c = eta sigma_t sqrt(1 - e^(-2h))`.

    Args:
        eta: 0 is deterministic (the same as Euler's method in sigma/alpha, and as flow-matching Euler); 1 is DDPM.
    """
    if not 0 <= eta <= 1:
        raise OptionError(f"sampler 'ddim': eta must lie in [0, 1], got {eta}")
    for _, s, t in intervals(nodes):
        d = predict(x, s)
        kept, fresh = ancestral(s, t, eta)
        if fresh == 0:
            x = lead(x, d, s, t, "x0")
        else:
            x = (kept / s.sigma) * x + (t.alpha - s.alpha * (kept / s.sigma)) * d + fresh * noise()
    return x


@sampler("ddpm", order=1, paper="arXiv:2006.11239, Eq. 7", stochastic=True)
def ddpm(x: Any, nodes: Nodes, predict: Any, noise: Any) -> Any:
    """The DDPM posterior between any two levels: `ddim` with `eta = 1` (also known as Euler ancestral)."""
    return ddim(x, nodes, predict, noise, eta=1.0)
