"""A node: one noise level of a path."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import PathError


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One noise level, `x = alpha * x0 + sigma * eps`.

    Two nodes with equal values stay two nodes (equality is identity), because grids with repeated levels are legal
    and a table must know which of the two a row belongs to. Compare `node.key` for equal values.

    Args:
        t: what the model is fed at this node (training step, `1000 * sigma` for flow models, `ln(sigma)/4` for EDM).
        alpha: scale of the data, in [0, 1].
        sigma: scale of the noise, non-negative; `alpha` and `sigma` are not both 0.

    Raises:
        PathError: if `alpha` or `sigma` is negative, not finite, or both are 0.
    """

    t: float
    alpha: float
    sigma: float

    def __post_init__(self) -> None:
        ok = math.isfinite(self.alpha) and math.isfinite(self.sigma) and self.alpha >= 0 and self.sigma >= 0
        if not ok or self.alpha == self.sigma == 0:
            raise PathError(f"no noise level has alpha = {self.alpha} and sigma = {self.sigma} (t = {self.t})")

    @property
    def lam(self) -> float:
        """Half log-SNR `ln(alpha / sigma)`; -inf at `alpha = 0`, +inf at `sigma = 0`."""
        if self.alpha == 0:
            return -math.inf
        if self.sigma == 0:
            return math.inf
        return math.log(self.alpha) - math.log(self.sigma)

    @property
    def level(self) -> float:
        """Noise-to-signal ratio `sigma / alpha` (the EDM noise level); inf at `alpha = 0`."""
        return math.inf if self.alpha == 0 else self.sigma / self.alpha

    @property
    def key(self) -> tuple[float, float, float]:
        """The three numbers, for comparison by value."""
        return (self.t, self.alpha, self.sigma)


def decay(s: Node, t: Node) -> float:
    """`exp(-h) = alpha_s sigma_t / (sigma_s alpha_t)` for the step s -> t, without a logarithm.

    0 if the step leaves `alpha = 0` or arrives at `sigma = 0`; inf is never returned, because no path goes back to
    `alpha = 0`.

    Raises:
        PathError: if the step arrives at `alpha = 0` from a node with signal.
    """
    if s.alpha == 0 or t.sigma == 0:
        return 0.0
    if t.alpha == 0 or s.sigma == 0:
        raise PathError(f"a step from t = {s.t} to t = {t.t} would leave no finite ratio exp(-h)")
    return (s.alpha / t.alpha) * (t.sigma / s.sigma)


def step(s: Node, t: Node) -> float:
    """Step size `h = lam_t - lam_s` (positive towards the data; inf if either end is an end of the path)."""
    e = decay(s, t)
    return math.inf if e == 0 else -math.log(e)
