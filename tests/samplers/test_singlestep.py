"""DPM-Solver++ singlestep: budgets, the published rows, the start from pure noise, the ancestral form."""

from __future__ import annotations

import math

import numpy as np
import pytest

import diffaccel as da
from diffaccel.core.path import Nodes, Path
from diffaccel.errors import OptionError
from diffaccel.samplers.registry import get
from diffaccel.testing.convergence import weak_slope
from diffaccel.testing.problems import four_modes
from diffaccel.testing.runs import point_mass_error, unroll

EDM, FLOW = Path.edm(), Path.flow(3.0)


def opened(table):
    """Calls of each interval."""
    starts = [i for i, row in enumerate(table.rows) if row.opens] + [len(table)]
    return list(np.diff(starts))


@pytest.mark.parametrize(
    "calls, spent",
    [
        (1, [1]),
        (2, [1, 1]),
        (3, [2, 1]),
        (4, [3, 1]),
        (5, [3, 1, 1]),
        (6, [3, 2, 1]),
        (7, [3, 3, 1]),
        (9, [3, 3, 2, 1]),
    ],
)
def test_calls_of_3s_run_short_at_the_clean_end(calls, spent):
    sampler = get("dpmpp_3s")
    nodes = da.nodes(EDM, sampler.intervals_of(calls), "karras")
    assert opened(sampler.trace(nodes, calls)) == spent


def test_calls_that_do_not_fit_are_refused():
    nodes = da.nodes(EDM, 4, "karras")
    with pytest.raises(OptionError, match=r"makes 4 to 7 model calls, not 8; for 8 calls .* 5 intervals"):
        da.trace("dpmpp_2s", nodes, calls=8)
    with pytest.raises(OptionError, match="not 3"):
        da.trace("dpmpp_2s", nodes, calls=3)


def test_rows_of_2s_are_the_published_ones():
    r, h = 0.3, 0.7
    nodes = Nodes([EDM.at_lam(0.0), EDM.at_lam(h)], EDM)
    middle, last = unroll(da.trace("dpmpp_2s", nodes, r=r))[1:]
    np.testing.assert_allclose(middle, [math.exp(-r * h), -math.expm1(-r * h), 0], atol=1e-15)
    outer = -math.expm1(-h)
    np.testing.assert_allclose(last, [math.exp(-h), outer * (1 - 1 / (2 * r)), outer / (2 * r)], atol=1e-15)


@pytest.mark.parametrize("name, order", [("dpmpp_2s", 2), ("dpmpp_3s", 3), ("heun", 2)])
def test_full_order_of_the_step_from_pure_noise(name, order):
    """It is a Runge-Kutta step in alpha/sigma with the interval's full number of calls; its error is local."""
    problem, errors = four_modes(), []
    start = FLOW.at(1000.0)
    x = np.random.default_rng(0).standard_normal((24, 2))
    for u in (0.02, 0.01):
        nodes = Nodes([start, FLOW.at_level(1 / u)], FLOW)
        table = da.trace(name, nodes)
        assert len(table) == order
        errors.append(np.abs(table.apply(x, problem.predict) - problem.flow(x, *nodes)).max())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order + 1, abs=0.3)


def test_ancestral_keeps_the_marginals_and_its_order():
    nodes = da.nodes(FLOW, 6, "trailing")
    table = da.trace("dpmpp_2s_ancestral", nodes)
    assert table.stochastic and point_mass_error(table) < 1e-12
    assert table == da.trace("dpmpp_2s", nodes, eta=1.0)
    assert table.rows[0].draws + table.rows[1].draws == 0  # pure noise needs no fresh noise
    assert 1.8 < weak_slope(get("dpmpp_2s_ancestral"), {}).value < 2.2


@pytest.mark.parametrize("options", [{"r": 0.0}, {"r": 1.0}, {"eta": -0.1}, {"eta": 1.1}])
def test_bad_options(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        da.trace("dpmpp_2s", da.nodes(EDM, 3, "karras"), **options)
