"""Predictors, gate and stabiliser by themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffaccel.core.extrapolation import Predictor, gate_error, index_weights, lagrange
from diffaccel.core.extrapolation_policy import Count, Extrapolating, Gate, Memory, with_gradient
from diffaccel.core.grid import nodes as grid_nodes
from diffaccel.core.path import Path
from diffaccel.core.pattern import parse
from diffaccel.core.prediction import Prediction
from diffaccel.errors import OptionError
from diffaccel.samplers.registry import get
from diffaccel.samplers.rewrite import rewritten
from diffaccel.samplers.skip import skip
from diffaccel.testing.problems import four_modes

points = st.lists(st.floats(-5, 5), min_size=2, max_size=4, unique_by=lambda v: round(v, 1))


@given(points, st.floats(-6, 6), st.lists(st.floats(-2, 2), min_size=4, max_size=4))
def test_polynomials_are_continued_exactly(where, target, coefficients):
    def p(v):
        return sum(c * v**k for k, c in enumerate(coefficients[: len(where)]))

    weights = lagrange(where, target)
    total = sum(w * p(v) for w, v in zip(weights, where, strict=True))
    size = 1 + sum(abs(w) for w in weights) * max(abs(p(v)) for v in where)
    assert total == pytest.approx(p(target), abs=1e-9 * size)


def test_index_weights_are_the_published_ones():
    assert [index_weights(n) for n in (2, 3, 4)] == [[2, -1], [3, -3, 1], [4, -6, 4, -1]]


def test_equal_positions_are_an_error():
    with pytest.raises(OptionError, match="coincide"):
        lagrange([1.0, 1.0], 2.0)


def test_nodes_without_a_position_take_no_part():
    flow = Path.flow()
    assert not Predictor(coordinate="lam").usable(flow.first, flow)
    assert Predictor(coordinate="sigma").usable(flow.first, flow)
    assert not Predictor(quantity="eps", coordinate="sigma").usable(flow.first, flow)


def test_the_order_of_refusals():
    gate, count = Gate(anchor=3, max_consecutive=2), Count(real=3)
    assert gate.refusal(1, 20, count) == gate.refusal(18, 20, count) == "protected"
    assert gate.refusal(5, 20, Count(real=2)) == "history"
    assert gate.refusal(5, 20, Count(real=3, consecutive=2)) == "max_consecutive"
    assert gate.refusal(5, 20, count) == "anchor" and gate.refusal(6, 20, count) == ""


def test_gate_errors_of_arrays_and_tensors_agree_and_are_per_image():
    rng = np.random.default_rng(0)
    high, low, x = rng.standard_normal((3, 2, 5))
    both = gate_error(high, low, x, (0.7, 0.2), per_image=True)
    alone = [float(gate_error(high[i : i + 1], low[i : i + 1], x[i : i + 1], (0.7, 0.2))) for i in range(2)]
    np.testing.assert_allclose(both, alone, rtol=1e-14)
    tensors = [torch.from_numpy(v) for v in (high, low, x)]
    np.testing.assert_allclose(gate_error(*tensors, (0.7, 0.2), per_image=True).numpy(), both, rtol=1e-14)


def test_the_gradient_is_limited():
    slope, previous = np.ones(4), -9 * np.ones(4)
    np.testing.assert_allclose(with_gradient(slope, previous), 1.25 * slope)
    np.testing.assert_allclose(with_gradient(slope, slope * 0.9), 1.1 * slope)


def test_the_stabilizer_is_inert_on_sigma_weights():
    """q_hat comes from a history that holds q already, so at q's own position it is q itself."""
    memory = Memory(beta=0.9)
    for position in (1.0, 2.0, 3.5, 4.0):
        memory.add(position, np.array([position**3, 1.0]))
    assert float(memory.level) == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize("pattern", ["h2/s2", "h3/s4", "h3, 5, 6, 9"])
def test_the_functional_loop_is_the_table(pattern):
    nodes = grid_nodes(Path.edm(0.03, 14.6), 18, "karras")
    problem, x = four_modes(), 14.6 * np.random.default_rng(0).standard_normal((4, 2))
    predict = Extrapolating(
        lambda v, n: Prediction(problem.denoise(v, n)), nodes, parse(pattern), predictor=Predictor(int(pattern[1]))
    )
    found = get("ddim").run(x, nodes, predict)
    wanted = rewritten("ddim", skip(pattern)).run(x, nodes, problem.denoise)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    assert predict.calls == 18 - len(parse(pattern).skipped(18))
