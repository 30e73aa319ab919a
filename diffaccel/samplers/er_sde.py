"""ER-SDE-Solver: the extended reverse-time SDE with a noise scaling function, orders 1 to 3."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..core.node import Node
from ..core.path import Nodes
from ..errors import one_of
from .common import check_order, finite, intervals
from .registry import sampler

# ln g(s), where phi(s) = s g(s) is the noise scaling function of the level s = sigma/alpha (Appendix A.8). g must not
# fall with s, or the variance of the noise would be negative.
SCALINGS: dict[str, Callable[[Any], Any]] = {
    "ode": lambda s: 0.0 * s,  # s: no noise
    "sde": np.log,  # s^2: the time-reversed SDE
    "sde_2": lambda s: 0.5 * np.log(s),  # s^1.5
    "sde_3": lambda s: 1.5 * np.log(s),  # s^2.5
    "sde_4": lambda s: -0.1 * np.log(s) + np.log(np.log1p(100 * s**1.5)),  # s^0.9 log10(1 + 100 s^1.5), a constant off
    "sde_5": lambda s: np.logaddexp(s**0.3, math.log(10.0)),  # s (e^(s^0.3) + 10), the published default
}
ABSCISSAE, QUADRATURE = np.polynomial.legendre.leggauss(48)


def _order(order: int = 3, scaling: str = "sde_5", **_: Any) -> int:
    """The order of the ODE; the weak order of an Adams method under additive noise is 2 at most."""
    return order if scaling == "ode" else min(order, 2)


@sampler(
    "er_sde",
    order=_order,
    paper="arXiv:2309.06169, Eq. 14-16 (order 3 with the slope at the current point corrected)",
    stochastic=True,
    smooth="level",
    variants=(
        {"scaling": "ode", "order": 1},
        {"scaling": "ode", "order": 2},
        {"scaling": "ode", "order": 3},
        {"scaling": "sde", "order": 2},
    ),
)
def er_sde(x: Any, nodes: Nodes, predict: Any, noise: Any, *, order: int = 3, scaling: str = "sde_5") -> Any:
    """`y_t = r y_s + phi_t Int_t^s phi'(u)/phi(u)^2 D(u) du + sqrt(t^2 - r^2 s^2) z` in `y = x/alpha`, s and t levels.

    `r = phi(t)/phi(s)`; D is the polynomial in the level through the newest predictions, and its integral is exact
    (48 points of Gauss; the published code sums 100 rectangles, and takes a backward difference for the slope at s,
    which leaves its order 3 at 2).

    Args:
        order: 1, 2 or 3.
        scaling: noise scaling function phi: "ode" (`s`, no noise), "sde" (`s^2`), "sde_2" (`s^1.5`), "sde_3"
            (`s^2.5`), "sde_4", or "sde_5" (`s (e^(s^0.3) + 10)`, the published default).
    """
    check_order("er_sde", order, 3)
    log_g = SCALINGS[one_of("scaling", scaling, SCALINGS)]
    past: list[tuple[Node, Any]] = []
    for _, s, t in intervals(nodes):
        d = predict(x, s)
        g = _ratio(s, t, log_g, scaling)
        a = t.sigma / s.sigma * g
        x = a * x + (t.alpha - a * s.alpha) * d
        if past and t.sigma > 0 and finite(s):
            weights = _weights([node.level for node, _ in past], s.level, t.level, log_g)
            for w, (_, dj) in zip(weights, past, strict=True):
                x = x + (t.alpha * w) * (dj - d)
        fresh = t.sigma * math.sqrt(1 - g * g)
        if fresh > 0:
            x = x + fresh * noise()
        if finite(s):
            past = [(s, d), *past][: order - 1]
    return x


def _ratio(s: Node, t: Node, log_g: Callable[[Any], Any], scaling: str) -> float:
    """g(t)/g(s); 0 from infinite levels, where every g but the constant one is infinite."""
    if scaling == "ode":
        return 1.0
    if not finite(s) or t.sigma == 0:
        return 0.0
    return min(1.0, math.exp(float(log_g(t.level)) - float(log_g(s.level))))


def _weights(past: list[float], s: float, t: float, log_g: Callable[[Any], Any]) -> list[float]:
    """Weights of past predictions: `sum_j w_j p(u_j) = phi_t Int_t^s phi'/phi^2 p du` for polynomials p.

    For `p = q^k`, `q = (u - s)/(t - s)`, integration by parts leaves `1 - k phi_t/(s - t) Int_t^s q^(k-1)/phi du`,
    which is smooth in ln(u).
    """
    low, high = math.log(t), math.log(s)
    u = np.exp(low + (high - low) * (ABSCISSAE + 1) / 2)
    density = QUADRATURE * (high - low) / 2 * (t / (s - t)) * np.exp(log_g(t) - log_g(u))
    q = (u - s) / (t - s)
    moments = [1 - k * float(np.sum(density * q ** (k - 1))) for k in range(1, len(past) + 1)]
    at = (np.asarray(past) - s) / (t - s)
    powers = np.array([at**k for k in range(1, len(past) + 1)])  # the weight of q = 0 follows from the sum
    return [float(w) for w in np.linalg.solve(powers, moments)]
