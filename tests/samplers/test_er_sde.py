"""ER-SDE-Solver: limits, marginals, exact integrals."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy.integrate import quad

import diffaccel as da
from diffaccel.core.path import Nodes, Path
from diffaccel.errors import OptionError
from diffaccel.samplers.er_sde import SCALINGS
from diffaccel.testing.problems import four_modes
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


def published_order_3(x, nodes, model):
    """The authors' Taylor form for `phi = s` with exact integrals; the slope at s is a backward difference."""
    past = []
    for i, (s, t) in enumerate(pairwise(n.level for n in nodes)):
        d = model.denoise(x, nodes[i])
        x = t / s * x + (1 - t / s) * d
        slope = None
        if past:
            slope = (d - past[-1][1]) / (s - past[-1][0])
            x = x + (t - s + t * math.log(s / t)) * slope
            if past[-1][2] is not None:
                bend = 2 * (slope - past[-1][2]) / (s - past[-2][0])
                x = x + ((t - s) ** 2 / 2 + t * (s - t - s * math.log(s / t))) * bend
        past.append((s, d, slope))
    return x


def test_order_3_is_order_3_where_the_published_form_is_2():
    model, high, low = four_modes(), math.exp(1.5), math.exp(-1.5)
    x = np.random.default_rng(0).standard_normal((24, 2)) * math.hypot(1, high)
    ours, theirs = [], []
    for n in (80, 160):
        levels = np.linspace(high, low, n + 1)
        graded = high - (high - levels[1]) * 2.0 ** np.arange(-9, 0)  # so fine that its low order does not show
        nodes = Nodes([EDM.at_level(float(v)) for v in [high, *graded, *levels[1:]]], EDM)
        true = model.flow(x, nodes[0], nodes[-1])
        ours.append(np.abs(da.trace("er_sde", nodes, scaling="ode").apply(x, model.predict) - true).max())
        theirs.append(np.abs(published_order_3(x, nodes, model) - true).max())
    assert math.log2(ours[0] / ours[1]) == pytest.approx(3, abs=0.3)
    assert math.log2(theirs[0] / theirs[1]) == pytest.approx(2, abs=0.3)


def test_bad_options():
    with pytest.raises(OptionError, match="scaling"):
        da.trace("er_sde", da.nodes(EDM, 4), scaling="sde5")
    with pytest.raises(OptionError, match="order"):
        da.trace("er_sde", da.nodes(EDM, 4), order=4)
