"""phi functions and quadrature weights against 120-digit arithmetic."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffaccel.core.phi import exact_weights, lagrange_integrals, moments, phi, zphi
from diffaccel.errors import OptionError

# on both sides of every switch between series and recursion, and where the recursion would cancel
ARGUMENTS = [s * z for z in (1e-12, 1e-6, 1e-3, 0.1, 0.5, 0.999, 1.001, 1.5, 2.0, 2.5, 3.0, 7.0, 20.0) for s in (-1, 1)]


def true_phi(k: int, z: float) -> mpmath.mpf:
    """The recursion from phi_0 = exp, with 120 digits."""
    with mpmath.workdps(120):
        value, big = mpmath.exp(z), mpmath.mpf(z)
        for j in range(k):
            value = (value - 1 / mpmath.factorial(j)) / big
        return +value


@pytest.mark.parametrize("k", range(7))
@pytest.mark.parametrize("z", ARGUMENTS)
def test_phi_has_full_precision(k: int, z: float) -> None:
    assert phi(k, z) == pytest.approx(float(true_phi(k, z)), rel=3e-15)


@pytest.mark.parametrize("k", range(7))
def test_phi_at_zero_and_minus_infinity(k: int) -> None:
    assert phi(k, 0.0) == 1 / math.factorial(k)
    assert phi(k, -math.inf) == 0.0


@pytest.mark.parametrize("k", range(1, 6))
def test_zphi_reaches_its_limit(k: int) -> None:
    assert zphi(k, -math.inf) == -1 / math.factorial(k - 1)
    assert zphi(k, -1e9) == pytest.approx(zphi(k, -math.inf), rel=1e-8)
    assert zphi(k, -0.7) == pytest.approx(float(-0.7 * true_phi(k, -0.7)), rel=3e-15)


def test_negative_index_is_refused() -> None:
    with pytest.raises(OptionError, match="k >= 0, got -1"):
        phi(-1, 0.5)


@pytest.mark.parametrize("z", [-30.0, -2.0, -0.3, -1e-8, 0.3, 2.0])
def test_moments_are_the_integrals(z: float) -> None:
    with mpmath.workdps(30):
        true = [mpmath.quad(lambda u, i=i: z * mpmath.exp((1 - u) * z) * u**i, [0, 0.5, 1]) for i in range(5)]
    np.testing.assert_allclose(moments(5, z), [float(v) for v in true], rtol=1e-12)


@given(
    st.lists(st.floats(-4, 1), min_size=1, max_size=4, unique_by=lambda r: round(4 * r)),
    st.floats(-8, 3).filter(lambda z: abs(z) > 1e-3),
)
def test_exact_weights_integrate_every_polynomial(ratios: list[float], z: float) -> None:
    weights = exact_weights(ratios, z)
    powers = np.vander(ratios, increasing=True)
    scale = np.abs(weights) @ np.abs(powers)
    np.testing.assert_array_less(np.abs(weights @ powers - moments(len(ratios), z)), 1e-9 * (1 + scale))


def test_exact_weights_of_an_infinite_step_take_the_polynomial_at_its_start() -> None:
    # z e^{(1-u) z} becomes minus a delta at u = 1
    weights = exact_weights([0.0, -1.0, -2.0], -math.inf)
    assert weights @ [0.0, -1.0, -2.0] == pytest.approx(-1.0)
    assert weights.sum() == pytest.approx(-1.0)


def test_coinciding_positions_are_refused() -> None:
    with pytest.raises(OptionError, match=r"coincide.*repeats a noise level"):
        exact_weights([0.0, -0.5, -0.5], -1.0)


def test_lagrange_integrals_are_adams_bashforth_on_even_points() -> None:
    np.testing.assert_allclose(24 * lagrange_integrals([0, -1, -2, -3], 0, 1), [55, -59, 37, -9], rtol=1e-12)
    np.testing.assert_allclose(12 * lagrange_integrals([1, 0, -1], 0, 1), [5, 8, -1], rtol=1e-12)


@given(st.floats(-50, 50), st.floats(0.01, 20))
def test_lagrange_integrals_on_shifted_scaled_points(origin: float, width: float) -> None:
    points = [origin + width * r for r in (0.0, -0.7, -1.9, -3.2)]
    a, b = origin, origin + width
    weights = lagrange_integrals(points, a, b)
    for k in range(4):
        true = width ** (k + 1) / (k + 1)  # of (s - origin)^k
        assert weights @ [(p - origin) ** k for p in points] == pytest.approx(
            true, rel=1e-7, abs=1e-7 * width ** (k + 1)
        )
