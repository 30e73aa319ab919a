"""DPM-Solver++ SDE multistep: its limits, marginals, orders."""

from __future__ import annotations

import math

import numpy as np
import pytest

import diffaccel as da
from diffaccel.core.path import Nodes, Path
from diffaccel.errors import OptionError
from diffaccel.samplers.registry import get
from diffaccel.testing.convergence import weak_slope
from diffaccel.testing.runs import point_mass_error, unroll

EDM, FLOW = Path.edm(), Path.flow(3.0)


@pytest.mark.parametrize("form", ["midpoint", "exact"])
def test_eta_0_is_the_ode_sampler(form):
    nodes = da.nodes(FLOW, 9)
    parent = da.trace("dpmpp", nodes, form=form, lower_order_final=False)
    np.testing.assert_allclose(unroll(da.trace("dpmpp_2m_sde", nodes, eta=0.0, form=form)), unroll(parent), atol=1e-14)


def test_eta_0_of_order_3_is_the_ode_sampler():
    nodes = da.nodes(FLOW, 9)
    parent = da.trace("dpmpp", nodes, order=3, form="exact", lower_order_final=False)
    np.testing.assert_allclose(unroll(da.trace("dpmpp_3m_sde", nodes, eta=0.0)), unroll(parent), atol=1e-14)


def test_its_first_row_is_the_ddpm_posterior():
    nodes = Nodes([FLOW.at(700.0), FLOW.at(400.0)], FLOW)
    np.testing.assert_allclose(unroll(da.trace("dpmpp_2m_sde", nodes)), unroll(da.trace("ddpm", nodes)), atol=1e-15)


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_3m_sde"])
@pytest.mark.parametrize("eta", [0.3, 1.0, 1.7])
def test_marginals_of_a_point_mass_are_exact(name, eta):
    for path in (EDM, FLOW):
        table = da.trace(name, da.nodes(path, 8, "karras"), eta=eta)
        assert table.stochastic and point_mass_error(table) < 1e-12


def test_noise_is_drawn_only_where_it_is_used():
    table = da.trace("dpmpp_2m_sde", da.nodes(EDM, 5, "karras"))
    assert [row.draws for row in table.rows] == [1, 1, 1, 1, 0]
    assert not da.trace("dpmpp_2m_sde", da.nodes(EDM, 5, "karras"), eta=0.0).stochastic
    assert not da.trace("dpmpp_2m_sde", da.nodes(EDM, 5, "karras"), s_noise=0.0).stochastic


@pytest.mark.parametrize(
    "name, options", [("dpmpp_2m_sde", {}), ("dpmpp_2m_sde", {"form": "exact"}), ("dpmpp_3m_sde", {})]
)
def test_weak_order_2(name, options):
    assert 1.8 < weak_slope(get(name), options).value < 2.3


def error_of_mean(name, n):
    """Conditional mean of single-Gaussian data for a state off the mean: linear in noise, so run without it.

    With eta = 1 it is exact: the posterior mean of the data is a martingale, so D is constant on average.
    """
    c, std, eta = 0.8, 0.6, 0.5
    lams = np.linspace(-1.5, 1.5, n + 1)
    graded = lams[0] + (lams[1] - lams[0]) * 2.0 ** np.arange(-9, 0)  # so fine that its low order does not show
    lams = np.concatenate([lams[:1], graded, lams[1:]])
    nodes = Nodes([EDM.at_lam(float(v)) for v in lams], EDM)

    def clean(x, node, space):
        return c + std**2 / (std**2 + node.level**2) * (x - c)

    ours = da.trace(name, nodes, eta=eta).apply(np.array([c + 1.0]), clean, lambda x: 0 * x)
    shrink = (nodes[-1].level ** 2 + std**2) / (nodes[0].level ** 2 + std**2)
    return abs(float(ours[0]) - c - shrink ** ((1 + eta) / 2))


def test_slope_of_the_mean():
    assert math.log2(error_of_mean("dpmpp_2m_sde", 40) / error_of_mean("dpmpp_2m_sde", 80)) == pytest.approx(2, abs=0.3)
    assert math.log2(error_of_mean("dpmpp_3m_sde", 40) / error_of_mean("dpmpp_3m_sde", 80)) == pytest.approx(3, abs=0.4)


def test_bad_options():
    with pytest.raises(OptionError, match="eta"):
        da.trace("dpmpp_2m_sde", da.nodes(EDM, 3), eta=-1.0)
    with pytest.raises(OptionError, match="form"):
        da.trace("dpmpp_2m_sde", da.nodes(EDM, 3), form="heun")
