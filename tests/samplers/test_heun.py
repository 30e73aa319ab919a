"""Heun: EDM's Algorithm 2 with churn, the clocks, the budget."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

import diffaccel as da
from diffaccel.core.path import Nodes, Path
from diffaccel.errors import OptionError
from diffaccel.samplers.registry import get
from diffaccel.testing.convergence import weak_slope
from diffaccel.testing.problems import four_modes
from diffaccel.testing.runs import invariant, point_mass_error

EDM, FLOW = Path.edm(), Path.flow(3.0)
CHURN = {"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 50.0}


def algorithm_2(x, nodes, draw, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """arXiv:2206.00364, Algorithm 2, but for the churn of the first step."""
    model = four_modes()
    n = len(nodes) - 1
    for i, (t, t_next) in enumerate(pairwise(nodes)):
        gamma = min(s_churn / n, math.sqrt(2) - 1) if i and s_tmin <= t.sigma <= s_tmax else 0.0
        hat = EDM.at_level(t.sigma * (1 + gamma))
        if gamma:
            x = x + s_noise * math.sqrt(hat.sigma**2 - t.sigma**2) * draw()
        d = (x - model.denoise(x, hat)) / hat.sigma
        after = x + (t_next.sigma - hat.sigma) * d
        if t_next.sigma > 0:
            d2 = (after - model.denoise(after, t_next)) / t_next.sigma
            after = x + (t_next.sigma - hat.sigma) * (d + d2) / 2
        x = after
    return x


@pytest.mark.parametrize("options", [{}, CHURN, {"s_churn": 40.0, "s_noise": 1.007}])
def test_it_is_algorithm_2(options):
    nodes = da.nodes(EDM, 8, "karras")
    x = 80 * np.random.default_rng(0).standard_normal((5, 2))
    z = np.random.default_rng(1).standard_normal((20, 5, 2))
    a, b = iter(z), iter(z)
    ours = da.trace("heun", nodes, **options).apply(x, four_modes().predict, lambda _: next(a))
    np.testing.assert_allclose(ours, algorithm_2(x, nodes, lambda: next(b), **options), rtol=1e-11, atol=1e-11)


def test_churn_raises_the_levels_that_the_model_sees_but_the_first():
    nodes = da.nodes(EDM, 6, "karras")
    table = da.trace("heun", nodes, s_churn=0.6, s_tmax=30.0)
    seen = [row.node.level for row in table.rows[::2]]
    raised = [n.level * (1.1 if i and n.level <= 30 else 1.0) for i, n in enumerate(nodes[:-1])]
    np.testing.assert_allclose(seen, raised, rtol=1e-12)
    assert sum(row.draws for row in table.rows) == sum(n.level <= 30 for n in nodes[1:-1])


def test_churn_keeps_the_marginals_and_the_order():
    for path in (EDM, FLOW):
        assert point_mass_error(da.trace("heun", da.nodes(path, 7, "karras"), **CHURN)) < 1e-12
    assert 1.8 < weak_slope(get("heun"), CHURN).value < 2.2


def test_churn_does_not_depend_on_the_path():
    def table(path):
        nodes = Nodes([path.at_lam(float(v)) for v in np.linspace(-2, 2, 8)], path)
        return invariant(da.trace("heun", nodes, **CHURN))

    np.testing.assert_allclose(table(FLOW), table(EDM), atol=1e-12)


def test_left_over_calls_become_euler_steps_at_the_end():
    nodes = da.nodes(EDM, 4, "karras")
    assert [row.opens for row in da.trace("heun", nodes, calls=6).rows] == [True, False, True, False, True, True]
    assert da.trace("heun", nodes, calls=4) == da.trace("ddim", nodes)


def test_bad_options():
    nodes = da.nodes(EDM, 4, "karras")
    with pytest.raises(OptionError, match="s_tmin <= s_tmax"):
        da.trace("heun", nodes, s_tmin=2.0, s_tmax=1.0)
    with pytest.raises(OptionError, match="clock"):
        da.trace("heun", nodes, clock="sigma")
