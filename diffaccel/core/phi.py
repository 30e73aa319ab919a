"""Exponential-integrator functions, accurate for every argument, and weights that integrate polynomials exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..errors import OptionError

SERIES_BELOW = 1.0  # under it the recursion loses up to k digits a level, the series none


def phi(k: int, z: float) -> float:
    """`phi_k(z) = int_0^1 e^((1-u) z) u^(k-1)/(k-1)! du`, `phi_0 = exp`; entire in z.

    `phi_{k+1}(z) = (phi_k(z) - 1/k!)/z`, by its Taylor series where that recursion cancels.

    Args:
        k: 0 or more.
        z: finite, or -inf (there `phi_0 = 0`, `phi_k = 0`).

    Raises:
        OptionError: if `k < 0`.
    """
    if k < 0:
        raise OptionError(f"phi_k needs k >= 0, got {k}")
    if z == -math.inf:
        return 0.0
    if k == 0:
        return math.exp(z)
    if abs(z) < SERIES_BELOW + 0.5 * k:
        return _series(k, z)
    value = math.expm1(z) / z
    for j in range(1, k):
        value = (value - 1.0 / math.factorial(j)) / z
    return value


def _series(k: int, z: float) -> float:
    term = 1.0 / math.factorial(k)
    total, n = term, 0
    while abs(term) > 1e-18 * abs(total):
        n += 1
        term *= z / (k + n)
        total += term
    return total


def zphi(k: int, z: float) -> float:
    """`z * phi_k(z)`, with its finite limit at z = -inf: -1 for k = 1, `-1/(k-1)!` in general."""
    if z == -math.inf:
        return -1.0 / math.factorial(k - 1) if k else 0.0
    return math.expm1(z) if k == 1 else z * phi(k, z)


def moments(n: int, z: float) -> np.ndarray:
    """`q_i = i! z phi_{i+1}(z)` for i = 0..n-1: the integral of `z e^((1-u) z) u^i` over u in [0, 1], shape (n,)."""
    return np.array([math.factorial(i) * zphi(i + 1, z) for i in range(n)])


def exact_weights(ratios: Sequence[float], z: float) -> np.ndarray:
    """Weights w with `sum_j w_j p(r_j) = int_0^1 z e^((1-u) z) p(u) du` for every polynomial p of degree < n.

    Args:
        ratios: n distinct positions r_j in units of the step (0 = its start, 1 = its end, negative = the past).
        z: `-h` in data space, `+h` in noise space; -inf is allowed.

    Returns:
        (n,) float64. Their sum is `e^z - 1`.

    Raises:
        OptionError: if two positions coincide.
    """
    r = np.asarray(ratios, dtype=np.float64)
    if len(set(ratios)) < len(r):
        raise OptionError(f"two of the positions {list(ratios)} coincide: the grid repeats a noise level")
    powers = np.vander(r, increasing=True).T
    return np.linalg.solve(powers, moments(len(r), z))


def lagrange_integrals(points: Sequence[float], a: float, b: float) -> np.ndarray:
    """Integrals over [a, b] of the Lagrange basis polynomials on `points`, shape (n,) float64 (plain, no weight)."""
    r = np.asarray(points, dtype=np.float64)
    scale = max(abs(a - r[0]), abs(b - r[0]), np.max(np.abs(r - r[0])), 1e-300)
    u, lo, hi = (r - r[0]) / scale, (a - r[0]) / scale, (b - r[0]) / scale
    powers = np.vander(u, increasing=True).T
    k = np.arange(1, len(r) + 1)
    return scale * np.linalg.solve(powers, (hi**k - lo**k) / k)
