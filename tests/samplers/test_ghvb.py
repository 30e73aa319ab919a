"""GHVB: its published weights, its limit without momentum, its registers, orders and refusals."""

from __future__ import annotations

import numpy as np
import pytest

from diffaccel.core.path import Nodes, Path
from diffaccel.core.prediction import Prediction
from diffaccel.errors import OptionError
from diffaccel.samplers.ghvb import split, velocity_weights
from diffaccel.samplers.registry import get

GHVB = get("ghvb")
LEVELS = (9.0, 5.0, 3.0, 1.5, 0.8, 0.4, 0.2)


def grid(path=None, levels=LEVELS, end=False):
    path = path or Path.edm()
    return Nodes([*(path.at_level(v) for v in levels), *([path.end] if end else [])], path)


@pytest.mark.parametrize(
    ("order", "r", "beta"), [(0.3, 1, 0.3), (1, 1, 1), (1.0, 1, 1), (1.2, 2, 0.2), (3.7, 4, 0.7), (4, 4, 1)]
)
def test_split(order, r, beta):
    assert split(order) == (r, pytest.approx(beta))


@pytest.mark.parametrize("order", [0, -1, 4.1, True, "2"])
def test_refuses_other_orders(order):
    with pytest.raises(OptionError, match=r"\(0, 4\]|order must be a number, got '2'"):
        GHVB.trace(grid(), order=order)


@pytest.mark.parametrize("beta", [0.2, 0.7, 1.0])
def test_published_weights(beta):
    nodes = grid()
    for r, want in (
        (2, np.array([2 + beta, -(2 - beta)]) / 2),
        (4, np.array([46 + 9 * beta, -(78 - 19 * beta), 42 - 5 * beta, -(10 - beta)]) / 24),
    ):
        past = [(nodes[3 - j], 0.0) for j in range(r)]
        ours = velocity_weights(past, nodes[3], nodes[4], beta, "constant")
        np.testing.assert_allclose(ours, want / beta, atol=1e-12)


def test_variable_weights_on_equal_steps_are_the_constant_ones():
    nodes = grid(levels=(6.0, 5.0, 4.0, 3.0, 2.0, 1.0))
    for r in (1, 2, 3, 4):
        past = [(nodes[4 - j], 0.0) for j in range(r)]
        tables = [velocity_weights(past, nodes[4], nodes[5], 0.6, w) for w in ("constant", "variable")]
        np.testing.assert_allclose(*tables, atol=1e-12)


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("r", [1, 2, 3, 4])
def test_without_momentum_it_is_adams_bashforth(r, end):
    nodes = grid(Path.vp_linear(), end=end)
    constant, variable = get("ipndm").trace(nodes, order=r), get("lms").trace(nodes, order=r)
    for kind in ("ghvb", "heavy_ball", "nesterov"):
        assert GHVB.trace(nodes, order=float(r), kind=kind) == constant
        assert GHVB.trace(nodes, order=float(r), kind=kind, weights="variable") == variable


@pytest.mark.parametrize("kind", ["ghvb", "heavy_ball", "nesterov"])
@pytest.mark.parametrize("weights", ["constant", "variable"])
def test_velocity_recursion(kind, weights):
    """The first three rows by hand, on a model that gives a fixed number at each node."""
    nodes, e, beta = grid(), [0.5, -1.0, 2.0, 0.25, 0.0, 0.0], 0.7
    seen = iter(e)
    table = GHVB.trace(nodes, order=2.7, kind=kind, weights=weights)
    states = table.apply(np.zeros(1), lambda x, s, space: np.full(1, next(seen)), trajectory=True)
    h = np.diff(LEVELS)
    k = 1.5, -0.5
    if weights == "variable":  # the line through the values at the two last nodes, at the middle of the step
        k = 1 - h[1] / (2 * (LEVELS[0] - LEVELS[1])), h[1] / (2 * (LEVELS[0] - LEVELS[1]))
    if kind == "ghvb":
        v = [e[0], (1 - beta) * e[0] + beta * e[1]]
        w, q = np.array(k), np.array([0.5, 0.5])
        u = [v[0], (w + (1 / beta - 1) * (w - q)) @ [v[1], v[0]]]
    else:
        push = k[0] * e[1] + k[1] * e[0]
        v = [e[0], (1 - beta) * e[0] + beta * push]
        u = [e[0], v[1] if kind == "heavy_ball" else (1 - beta) * v[1] + beta * push]
    np.testing.assert_allclose([s.item() for s in states[1:3]], np.cumsum(h[:2] * u), atol=1e-12)


@pytest.mark.parametrize(("order", "depth", "slots"), [(0.5, 1, 1), (1.5, 1, 2), (3.7, 1, 4), (4.0, 4, 0)])
def test_velocities_are_registers(order, depth, slots):
    table = GHVB.trace(grid(levels=tuple(np.geomspace(10, 0.1, 40))), order=order)
    assert (table.depth, table.slots) == (depth, slots)


@pytest.mark.parametrize("order", [0.4, 1.6, 2.5, 3.3, 4.0])
@pytest.mark.parametrize("kind", ["ghvb", "heavy_ball", "nesterov"])
def test_constant_noise_is_exact(order, kind):
    """For a point mass eps is the same at every node: v = e, whatever the weights."""
    for path in (Path.vp_linear(), Path.edm(), Path.flow()):
        for weights in ("constant", "variable"):
            nodes = grid(path)
            x = nodes[0].alpha * 0.3 + nodes[0].sigma * 1.7
            out = GHVB.run(x, nodes, lambda x, s: Prediction(0.3), order=order, kind=kind, weights=weights)
            assert out == pytest.approx(nodes[-1].alpha * 0.3 + nodes[-1].sigma * 1.7, abs=1e-9)


def test_ends():
    path = Path.flow()
    nodes = Nodes([path.first, *grid(path), path.end], path)
    table = GHVB.trace(nodes, order=2.7)
    assert [row.space for row in table.rows] == ["x0", *["eps"] * 7]
    last = table.rows[-1].out
    assert (last.m, len(last.p)) == ((), 1)


def test_declared_orders():
    assert [GHVB.order_of(order=k) for k in (0.5, 1.0, 1.5, 2.0, 2.5, 4.0)] == [1, 1, 2, 2, 2, 2]
    assert [GHVB.order_of(order=k, weights="variable") for k in (0.5, 2.5, 4.0)] == [1, 3, 4]
    assert [GHVB.order_of(order=2.5, kind=k) for k in ("heavy_ball", "nesterov")] == [1, 1]
    with pytest.raises(OptionError, match="kind"):
        GHVB.trace(grid(), kind="polyak")
