"""CPS: coefficients-preserving sampling, stochastic and of first order."""

from __future__ import annotations

import math
from typing import Any

from ..core.path import Nodes
from ..errors import OptionError
from .common import intervals, lead
from .registry import sampler


@sampler(
    "cps",
    order=lambda eta=0.7, **_: 0 if eta else 1,  # see the docstring
    paper="FlowCPS, arXiv:2509.05952; on any path: x' = alpha' D + sigma' (|cos th| e + sin th z)",
    stochastic=True,
    variants=({"eta": 0.0}, {"eta": 1.6}),
)
def cps(x: Any, nodes: Nodes, predict: Any, noise: Any, *, eta: float = 0.7) -> Any:
    """`x_t = alpha_t D + sigma_t (|cos th| e + sin th z)`, `th = eta pi/2`: the noise level stays exactly sigma_t.

    It is DDIM with fresh noise of standard deviation `sigma_t sin th`, the same share at every step however small. So
    it has no order for a fixed `eta > 0`: more steps exchange more noise, each against a posterior mean that varies
    less than true noise does, and the law of the samples tends to another one than the data's.

    Args:
        eta: 0 is DDIM; 1 replaces all noise; published settings lie between 0.7 and 1.8.
    """
    if not 0 <= eta <= 2:
        raise OptionError(f"sampler 'cps': eta must lie in [0, 2], got {eta}")
    keep, fresh = abs(math.cos(eta * math.pi / 2)), math.sin(eta * math.pi / 2)
    for _, s, t in intervals(nodes):
        d = predict(x, s)
        if fresh == 0 or t.sigma == 0:
            x = lead(x, d, s, t, "x0")
        else:
            a = t.sigma * keep / s.sigma
            x = a * x + (t.alpha - s.alpha * a) * d + (t.sigma * fresh) * noise()
    return x
