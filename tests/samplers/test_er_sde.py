"""ER-SDE-Solver: limits, marginals, exact integrals."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad

import diffaccel as da
from diffaccel.core.path import Nodes, Path
from diffaccel.errors import OptionError
from diffaccel.samplers.er_sde import SCALINGS
from diffaccel.testing.runs import point_mass_error, unroll

EDM, FLOW = Path.edm(), Path.flow(3.0)


@pytest.mark.parametrize("scaling, parent", [("ode", "ddim"), ("sde", "ddpm")])
def test_order_1_limits(scaling, parent):
    nodes = da.nodes(FLOW, 6)
    ours = unroll(da.trace("er_sde", nodes, order=1, scaling=scaling))
    np.testing.assert_allclose(ours, unroll(da.trace(parent, nodes)), atol=1e-14)


def test_the_ode_limit_draws_nothing():
    assert not da.trace("er_sde", da.nodes(FLOW, 6), scaling="ode").stochastic


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_marginals_of_a_point_mass_are_exact(scaling, order):
    for path in (EDM, FLOW):
        assert point_mass_error(da.trace("er_sde", da.nodes(path, 8, "karras"), order=order, scaling=scaling)) < 1e-12


PUBLISHED = {
    "ode": lambda s: s,
    "sde": lambda s: s**2,
    "sde_2": lambda s: s**1.5,
    "sde_3": lambda s: s**2.5,
    "sde_4": lambda s: s**0.9 * math.log10(1 + 100 * s**1.5),
    "sde_5": lambda s: s * (math.exp(s**0.3) + 10),
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_parabola_is_integrated_exactly(scaling):
    """`phi_t Int_t^s phi'(u)/phi(u)^2 D(u) du = phi_t (D(t)/phi_t - D(s)/phi_s + Int_t^s D'(u)/phi(u) du)`."""
    levels = [9.0, 6.0, 4.0, 0.5]
    s, t = levels[2:]
    row = da.trace("er_sde", Nodes([EDM.at_level(v) for v in levels], EDM), scaling=scaling).rows[2].out
    fn = PUBLISHED[scaling]

    def d(u):
        return 0.3 + 0.7 * u - 0.2 * u * u

    inner = quad(lambda u: (0.7 - 0.4 * u) / fn(u), t, s, epsabs=1e-13, epsrel=1e-13)[0]
    true = d(t) - fn(t) / fn(s) * d(s) + fn(t) * inner
    assert sum(b * d(u) for b, u in zip(row.p, (4.0, 6.0, 9.0), strict=True)) == pytest.approx(true, abs=1e-11)
    assert row.x == pytest.approx(fn(t) / fn(s), rel=1e-12)
    if scaling != "ode":
        assert row.z[0][1] == pytest.approx(math.sqrt(t**2 - (s * fn(t) / fn(s)) ** 2), rel=1e-10)


def test_bad_options():
    with pytest.raises(OptionError, match="scaling"):
        da.trace("er_sde", da.nodes(EDM, 4), scaling="sde5")
    with pytest.raises(OptionError, match="order"):
        da.trace("er_sde", da.nodes(EDM, 4), order=4)
