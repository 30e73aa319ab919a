"""DPM-Solver++ singlestep, orders 2 and 3: each interval stands alone, with its own model calls inside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..core.node import Node, decay, step
from ..core.path import Nodes
from ..core.phi import phi
from ..errors import OptionError
from .common import finite, intervals, lead, most_intervals, spend
from .ddim import ancestral
from .registry import sampler

PAPER = "arXiv:2211.01095, Algorithm 1 and Appendix B"


@sampler(
    "dpmpp_2s",
    order=2,  # with eta > 0: weak order, the order of its deterministic part
    paper=PAPER,
    intervals=most_intervals(2),
    variants=({"r": 0.3}, {"eta": 1.0}),
)
def dpmpp_2s(
    x: Any,
    nodes: Nodes,
    predict: Any,
    noise: Any,
    *,
    r: float = 0.5,
    eta: float = 0.0,
    calls: int | None = None,
) -> Any:
    """Two calls an interval: at its start, and at the fraction `r` of it in lam.

    `x_t = (sigma_t/sigma_s) x_s + alpha_t (1 - e^-h) ((1 - 1/(2r)) D_s + 1/(2r) D_m)`.

    Args:
        r: where the second call is made, in (0, 1).
        eta: 0 is deterministic; otherwise the step goes down to less noise and fresh noise is added, as in `ddim`
            (1 is k-diffusion's "DPM++ 2S a"). Each part keeps the marginal law, so the weak order stays 2. The
            step from alpha = 0, which starts at pure noise, is always deterministic.
        calls: total model calls; left-over ones shorten the last intervals to one call.
    """
    if not 0 < r < 1:
        raise OptionError(f"sampler 'dpmpp_2s': r must lie in (0, 1), got {r}")
    if not 0 <= eta <= 1:
        raise OptionError(f"sampler 'dpmpp_2s': eta must lie in [0, 1], got {eta}")
    counts = spend(nodes, 2, calls, "dpmpp_2s")
    for i, s, t in intervals(nodes):
        d = predict(x, s)
        kept, fresh = ancestral(s, t, eta) if finite(s) else (t.sigma, 0.0)
        down = replace(t, sigma=kept) if fresh else t
        x = _second(x, d, s, down, nodes, predict, r) if counts[i] == 2 else lead(x, d, s, down, "x0")
        if fresh:
            x = x + fresh * noise()
    return x


@sampler("dpmpp_2s_ancestral", order=2, paper=PAPER, intervals=most_intervals(2), stochastic=True)
def dpmpp_2s_ancestral(x: Any, nodes: Nodes, predict: Any, noise: Any, *, calls: int | None = None) -> Any:
    """`dpmpp_2s` with `eta = 1`."""
    return dpmpp_2s(x, nodes, predict, noise, eta=1.0, calls=calls)


@sampler("dpmpp_3s", order=3, paper=PAPER, intervals=most_intervals(3))
def dpmpp_3s(x: Any, nodes: Nodes, predict: Any, noise: Any, *, calls: int | None = None) -> Any:
    """Three calls an interval, at 0, 1/3 and 2/3 of it in lam (only with 2/3 is the published form of order 3).

    `x_1 = lead(s -> 1/3)`, `x_2 = lead(s -> 2/3) + 2 alpha_2 (1 - phi_1(-2h/3)) (D_1 - D_s)`,
    `x_t = lead(s -> t) + 3/2 alpha_t (1 - phi_1(-h)) (D_2 - D_s)`.

    Args:
        calls: total model calls; left-over ones shorten the last intervals to two calls or one.
    """
    counts = spend(nodes, 3, calls, "dpmpp_3s")
    for i, s, t in intervals(nodes):
        d = predict(x, s)
        if counts[i] == 3:
            x = _third(x, d, s, t, nodes, predict)
        else:
            x = _second(x, d, s, t, nodes, predict, 0.5) if counts[i] == 2 else lead(x, d, s, t, "x0")
    return x


def _second(x: Any, d: Any, s: Node, t: Node, nodes: Nodes, predict: Any, r: float) -> Any:
    """Both stages of order 2; at infinite h the method in u = alpha/sigma that it tends to for small steps."""
    m = _inside(nodes, s, t, r)
    dm = predict(lead(x, d, s, m, "x0"), m)
    return lead(x, d, s, t, "x0") + (t.alpha * (1 - decay(s, t)) / (2 * r)) * (dm - d)


def _third(x: Any, d: Any, s: Node, t: Node, nodes: Nodes, predict: Any) -> Any:
    """The three stages of order 3; `h phi_2(-h) = 1 - phi_1(-h)`."""
    m1, m2 = _inside(nodes, s, t, 1 / 3), _inside(nodes, s, t, 2 / 3)
    d1 = predict(lead(x, d, s, m1, "x0"), m1)
    d2 = predict(lead(x, d, s, m2, "x0") + (2 * m2.alpha * _slope(s, m2)) * (d1 - d), m2)
    return lead(x, d, s, t, "x0") + (1.5 * t.alpha * _slope(s, t)) * (d2 - d)


def _inside(nodes: Nodes, s: Node, t: Node, r: float) -> Node:
    """The fraction r of the way in lam; from alpha = 0, where lam is infinite, in alpha/sigma."""
    return nodes.between(s, t, r) if finite(s) else nodes.path.at_level(t.level / r)


def _slope(s: Node, t: Node) -> float:
    """Weight of a unit slope of D: `h phi_2(-h)`; from alpha = 0, with D linear in alpha/sigma, 1/2."""
    if not finite(s):
        return 0.5
    h = step(s, t)
    return h * phi(2, -h)
