"""Heun's method with optional churn: EDM Algorithm 2, on any path."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ..core.node import Node, decay
from ..core.path import Nodes
from ..errors import OptionError, one_of
from .common import intervals, lead, most_intervals, spend
from .registry import sampler

CLOCKS = ("level", "flow")
MOST_CHURN = math.sqrt(2) - 1
STEEPEST = 100.0  # a larger fall of the level in one step would weigh D_t - D_s by more than 50


@sampler(
    "heun",
    order=2,  # with churn: weak order, because adding noise keeps the marginal law exactly
    paper="arXiv:2206.00364, Algorithms 1 and 2",
    intervals=most_intervals(2),
    variants=({"clock": "flow"},),
)
def heun(
    x: Any,
    nodes: Nodes,
    predict: Any,
    noise: Any,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    clock: str = "level",
    calls: int | None = None,
) -> Any:
    """Euler to the next node, then the slopes of both ends averaged: `x_t = x~ + alpha_t g (D_t - D_s)`.

    `g = (level_s - level_t)/(2 level_t)` with `level = sigma/alpha`. Two calls an interval, one for the step to 0.

    Args:
        s_churn: total noise added over the run: a level in [s_tmin, s_tmax] is first raised by the factor
            `1 + min(s_churn/intervals, sqrt(2) - 1)`. Not at the first node: a scheduler first sees the state together
            with the model's output there, so it has no chance to add noise before it.
        s_tmin, s_tmax: range of levels (sigma/alpha) with churn.
        s_noise: scale of the noise that is added.
        clock: the time in which slopes are averaged: "level" (EDM) or "flow", `sigma/(sigma + alpha)`, which is
            flow matching's own Heun method. Intervals over which the level falls by a factor of more than 100, as from
            alpha = 0 where it is infinite, use "flow".
        calls: total model calls; left-over ones make the last intervals Euler steps.
    """
    one_of("clock", clock, CLOCKS)
    if not (s_churn >= 0 and 0 <= s_tmin <= s_tmax and s_noise >= 0):
        raise OptionError(
            "sampler 'heun': s_churn and s_noise must be 0 or more and s_tmin <= s_tmax, got "
            f"s_churn = {s_churn}, s_noise = {s_noise}, s_tmin = {s_tmin}, s_tmax = {s_tmax}"
        )
    counts = spend(nodes, 2, calls, "heun")
    gamma = min(s_churn / (len(nodes) - 1), MOST_CHURN)
    for i, s, t in intervals(nodes):
        if i > 0 and gamma > 0 and s_tmin <= s.level <= s_tmax:
            x, s = _churn(x, s, nodes, noise, gamma, s_noise)
        d = predict(x, s)
        x = lead(x, d, s, t, "x0")
        if counts[i] == 2:
            # Called at a copy of t: the interval that opens at t begins with a call of its own.
            x = x + (t.alpha * _half(s, t, clock)) * (predict(x, replace(t)) - d)
    return x


def _churn(x: Any, s: Node, nodes: Nodes, noise: Any, gamma: float, s_noise: float) -> tuple[Any, Node]:
    """Raise the level of s by 1 + gamma: `x^ = (alpha^/alpha) x + S sqrt(sigma^^2 - (alpha^ sigma/alpha)^2) z`."""
    hat = nodes.path.at_level(s.level * (1 + gamma))
    x = (hat.alpha / s.alpha) * x
    fresh = s_noise * hat.alpha * s.level * math.sqrt(gamma * (2 + gamma))
    return (x + fresh * noise() if fresh else x), hat


def _half(s: Node, t: Node, clock: str) -> float:
    """g, with which `alpha_t g (D_t - D_s)` turns the Euler step into the trapezoidal rule in the clock's time."""
    if clock == "level" and decay(s, t) * STEEPEST >= 1:
        return (1 / decay(s, t) - 1) / 2
    us, ut = s.sigma / (s.sigma + s.alpha), t.sigma / (t.sigma + t.alpha)
    return (us - ut) / (2 * ut * (1 - ut))
