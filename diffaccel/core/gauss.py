"""Gaussian data: the exact probability-flow ODE between any two levels, and the law of samples."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import OptionError, PathError
from .node import Node


@dataclass(frozen=True, eq=False)
class GaussLaw:
    """N(mu, U diag(L) U^T + rho (I - U U^T)), with k orthonormal directions.

    Args:
        mean: (d,).
        axes: (k, d), the rows of U^T.
        variances: (k,), 0 or more.
        rest: variance in every other direction, 0 or more.
    """

    mean: np.ndarray
    axes: np.ndarray
    variances: np.ndarray
    rest: float = 0.0

    def flow(self, x: Any, s: Node, t: Node) -> Any:
        """The state at node t of the ODE that is at x at node s; also from alpha_s = 0.

        `x_t = alpha_t mu + sum_k r(L_k) u_k u_k^T y + r(rho) (I - U U^T) y`, `y = x_s - alpha_s mu`,
        `r(v) = sqrt((alpha_t^2 v + sigma_t^2) / (alpha_s^2 v + sigma_s^2))` (arXiv:2311.10892, 2412.09726).

        Args:
            x: (B, d) numpy array or tensor; the result has its type.
        """
        mean, axes = (_like(v, x) for v in (self.mean, self.axes))
        rest = self._ratio(self.rest, s, t)
        along = np.array([self._ratio(float(v), s, t) - rest for v in self.variances])
        y = x - s.alpha * mean
        return t.alpha * mean + rest * y + ((y @ axes.T) * _like(along, x)) @ axes

    @staticmethod
    def _ratio(variance: float, s: Node, t: Node) -> float:
        before = s.alpha**2 * variance + s.sigma**2
        if before == 0:
            raise PathError("the flow of Gaussian data cannot start at sigma = 0 in a direction without variance")
        return math.sqrt((t.alpha**2 * variance + t.sigma**2) / before)


def _like(values: np.ndarray, x: Any) -> Any:
    return values if isinstance(x, np.ndarray) else x.new_tensor(values)


def fitted(samples: np.ndarray, rank: int) -> GaussLaw:
    """The law of samples: Ledoit and Wolf's shrunk covariance (2004), its leading axes, one variance for the rest.

    Args:
        samples: (n, d), n of 4 or more.
        rank: axes to keep, at most n - 1 and d.
    """
    n, d = samples.shape
    if n < 4 or rank < 1:
        raise OptionError(f"a Gaussian law needs 4 samples and an axis or more, got {n} and {rank}")
    mean = samples.mean(axis=0)
    y = samples - mean
    _, singular, axes = np.linalg.svd(y, full_matrices=False)
    values = singular**2 / n
    size = float(values.sum() / d)
    spread = float((values**2).sum()) - d * size**2
    noise = (float((np.einsum("ij,ij->i", y, y) ** 2).sum()) / n - float((values**2).sum())) / n
    share = min(1.0, max(0.0, noise / spread)) if spread > 0 else 1.0
    k = min(rank, n - 1, d)
    kept = (1 - share) * values[:k] + share * size
    rest = max(0.0, (size * d - float(kept.sum())) / (d - k)) if d > k else 0.0
    return GaussLaw(mean, axes[:k], kept, rest)
