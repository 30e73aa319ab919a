"""PNDM and iPNDM: weights, the call of the warm-up, orders on grids uniform in sigma/alpha."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from diffaccel.core.path import Nodes, Path
from diffaccel.core.prediction import Prediction
from diffaccel.errors import OptionError
from diffaccel.samplers.pndm import adams_bashforth
from diffaccel.samplers.registry import get
from diffaccel.testing.problems import four_modes

PNDM, IPNDM = get("pndm"), get("ipndm")
TABLE = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}


def grid(n, path=None, end=False, high=4.0, low=0.2):
    path = path or Path.edm()
    levels = np.linspace(high, low, n + (0 if end else 1))
    return Nodes([*(path.at_level(float(v)) for v in levels), *([path.end] if end else [])], path)


@pytest.mark.parametrize("r", [1, 2, 3, 4])
def test_weights(r):
    np.testing.assert_allclose(adams_bashforth(r), TABLE[r], atol=1e-14)


def test_warm_up_is_improved_euler():
    """Two calls on the first interval; the trial state's prediction stays out of the history."""
    nodes = grid(4)
    rows = PNDM.trace(nodes, order=4).rows
    h = nodes[1].level - nodes[0].level
    assert [row.node for row in rows] == [nodes[0], nodes[1], nodes[1], nodes[2], nodes[3]]
    assert rows[0].out.p == pytest.approx((h,))
    # handed the trial state x + h e_0, the row gives x + h (e_0 + e_1)/2
    assert rows[1].a == pytest.approx(1)
    assert rows[1].out.p == pytest.approx((h / 2, -h / 2))
    assert rows[2].out.p == pytest.approx((1.5 * h, 0, -0.5 * h))
    assert rows[3].out.p == pytest.approx((23 / 12 * h, -16 / 12 * h, 0, 5 / 12 * h))
    assert [row.opens for row in rows] == [True, False, True, True, True]


def test_calls_and_intervals():
    assert [PNDM.intervals_of(n) for n in (1, 2, 3, 4, 20)] == [1, 2, 2, 3, 19]
    assert [PNDM.intervals_of(n, order=1) for n in (1, 3)] == [1, 3]
    for path in (Path.vp_linear(), Path.edm(), Path.flow()):
        for end in (False, True):
            for calls in (1, 2, 3, 4, 9):
                nodes = grid(PNDM.intervals_of(calls), path, end)
                assert len(PNDM.trace(nodes, calls)) == calls


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_without_the_extra_call_the_order_grows(order):
    nodes = grid(6)
    table = IPNDM.trace(nodes, order=order)
    assert table == PNDM.trace(nodes, 6, order=order)
    assert [len(row.out.p) for row in table.rows] == [min(order, i + 1) for i in range(6)]
    np.testing.assert_allclose(table.rows[-1].out.p, (nodes[1].level - nodes[0].level) * np.array(TABLE[order]))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order_on_uniform_levels_from_an_exact_start(order):
    problem, (start, stop) = four_modes(), grid(1, high=3.0, low=0.5)
    x = start.sigma * np.random.default_rng(0).standard_normal((8, 2))
    exact = problem.flow(x, start, stop)
    errors = []
    for n in (80, 160):
        nodes = grid(n, high=3.0, low=0.5)
        states = [x]
        for s, t in pairwise(nodes[:order]):
            states.append(problem.flow(states[-1], s, t))

        def predict(state, node, nodes=nodes, states=states):
            k = next(i for i, other in enumerate(nodes) if other is node)
            if k < len(states):
                state[...] = states[k]
            return Prediction(problem.denoise(state, node))

        errors.append(np.abs(IPNDM.run(x.copy(), nodes, predict, order=order) - exact).max())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def test_ends():
    path = Path.flow()
    nodes = Nodes([path.first, *grid(4, path), path.end], path)
    for table, calls in ((PNDM.trace(nodes), 7), (IPNDM.trace(nodes), 6)):
        assert len(table) == calls
        assert [row.space for row in table.rows] == [*["x0"] * (calls - 5), *["eps"] * 5]
        assert len(table.rows[-1].out.p) == 1
        x = table.apply(np.ones(2), lambda x, s, space: 0.3 if space == "x0" else (x - s.alpha * 0.3) / s.sigma)
        np.testing.assert_allclose(x, 0.3, atol=1e-12)


def test_long_first_step_is_averaged_in_data_space():
    """The mean of two eps would multiply the second prediction by (e^h - 1)/2."""
    path = Path.edm()
    nodes = Nodes([path.at_level(v) for v in (80.0, 2.0, 1.0)], path)
    rows = PNDM.trace(nodes).rows
    assert [row.space for row in rows] == ["x0", "x0", "eps"]
    assert rows[1].out.p[0] == pytest.approx(0.5 * (1 - 2.0 / 80))
    assert [row.space for row in PNDM.trace(nodes, order=1).rows] == ["eps", "eps"]


def test_refuses_what_it_cannot_do():
    with pytest.raises(OptionError, match="1 to 4"):
        PNDM.trace(grid(3), order=5)
    with pytest.raises(OptionError, match="calls"):
        PNDM.trace(grid(3), 5)
