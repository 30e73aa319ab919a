"""The analytic problems are what they claim: denoisers against quadrature, flows against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from diffaccel.core.node import Node
from diffaccel.core.path import Path
from diffaccel.testing.problems import Gaussian, Mixture, Problem, Windowed, four_modes, point_mass, smooth_step, solve

LINE = Mixture(np.array([1.0, 3.0]), np.array([[-1.0], [0.8]]), np.array([0.3, 0.5]))
NOISE, DATA = Node(1.0, 0.0, 1.0), Node(0.0, 1.0, 0.0)


def density(x0: np.ndarray) -> np.ndarray:
    shares, means, stds = (0.25, 0.75), (-1.0, 0.8), (0.3, 0.5)
    parts = [w / s * np.exp(-0.5 * ((x0 - m) / s) ** 2) for w, m, s in zip(shares, means, stds, strict=True)]
    return np.sum(parts, axis=0)


@pytest.mark.parametrize("node", [Node(0.0, 0.6, 0.8), Node(0.0, 1.0, 3.0), Node(0.0, 0.9, 0.1), NOISE])
def test_mixture_against_quadrature(node: Node) -> None:
    x0 = np.linspace(-6, 6, 40001)
    x = np.array([[-1.3], [0.2], [1.9]])
    weight = density(x0) * np.exp(-0.5 * ((x - node.alpha * x0) / node.sigma) ** 2)
    true = (weight * x0).sum(-1) / weight.sum(-1)
    np.testing.assert_allclose(LINE.denoise(x, node)[:, 0], true, rtol=1e-10)
    np.testing.assert_allclose(LINE.noise(x, node), (x - node.alpha * LINE.denoise(x, node)) / node.sigma, rtol=1e-10)


def test_at_the_ends_of_the_path() -> None:
    x = np.array([[0.3], [-0.7]])
    np.testing.assert_allclose(LINE.denoise(x, NOISE), np.full((2, 1), 0.25 * -1.0 + 0.75 * 0.8))
    np.testing.assert_allclose(LINE.denoise(x, DATA), x)
    np.testing.assert_array_equal(LINE.noise(x, DATA), 0 * x)


@pytest.mark.parametrize("space", ["x0", "eps", "v", "flow"])
def test_predict_in_every_space(space: str) -> None:
    node, x = Node(0.0, 0.6, 0.8), np.array([[0.3], [-0.7]])
    d, e = LINE.denoise(x, node), LINE.noise(x, node)
    want = {"x0": d, "eps": e, "v": 0.6 * e - 0.8 * d, "flow": e - d}[space]
    np.testing.assert_allclose(LINE.predict(x, node, space), want, rtol=1e-12)


@pytest.mark.parametrize("ends", [(-2.0, 3.0), (1.5, -3.0)])
@pytest.mark.parametrize("path", [Path.edm(), Path.flow(), Path.vp_linear()], ids=lambda p: p.family)
def test_reference_flow_is_the_closed_form_of_a_gaussian(path: Path, ends: tuple[float, float]) -> None:
    data = Gaussian(np.array([1.0, -2.0]), np.array([0.5, 0.1]))
    s, t = path.at_lam(ends[0]), path.at_lam(ends[1])
    x = s.alpha * data.mean + s.sigma * np.random.default_rng(0).standard_normal((6, 2))
    np.testing.assert_allclose(Problem.flow(data, x, s, t), data.flow(x, s, t), rtol=1e-11, atol=1e-11)


def test_flow_from_pure_noise_to_data_goes_there_and_back() -> None:
    x = np.random.default_rng(1).standard_normal((6, 2))
    there = four_modes().flow(x, NOISE, DATA)
    np.testing.assert_allclose(four_modes().flow(there, DATA, NOISE), x, atol=1e-9)


def test_flow_carries_the_marginal() -> None:
    rng = np.random.default_rng(2)
    node = Node(0.0, 0.5, 0.5)
    moved = LINE.flow(LINE.draw(rng, 4000, node), node, DATA, 1e-8)
    fresh = LINE.draw(rng, 4000)
    np.testing.assert_allclose(
        np.quantile(moved, [0.1, 0.3, 0.5, 0.9]), np.quantile(fresh, [0.1, 0.3, 0.5, 0.9]), atol=0.06
    )


def test_one_point() -> None:
    data, x = point_mass([0.5, -1.0]), np.array([[3.0, 2.0]])
    s, t = Node(0.0, 0.6, 0.8), Node(0.0, 0.9, 0.1)
    np.testing.assert_array_equal(data.denoise(x, s), [[0.5, -1.0]])
    eps = (x - 0.6 * data.mean) / 0.8
    np.testing.assert_allclose(data.noise(x, s), eps)
    np.testing.assert_allclose(data.flow(x, s, t), 0.9 * data.mean + 0.1 * eps)


def test_windowed_is_one_point_at_the_ends_and_the_mixture_in_the_middle() -> None:
    path, c = Path.edm(), np.array([0.3, -0.2])
    data = Windowed(four_modes(), c, -2.0, 2.0)
    x = np.array([[0.4, 0.1]])
    for lam in (-2.0, -1.5, 1.5, 2.0):
        np.testing.assert_array_equal(data.denoise(x, path.at_lam(lam)), c[None])
    middle = path.at_lam(0.0)
    np.testing.assert_allclose(data.denoise(x, middle), four_modes().denoise(x, middle))
    assert 0 < data.weight(path.at_lam(-0.8)) < 1 and data.weight(NOISE) == data.weight(DATA) == 0


def test_smooth_step_is_flat_at_both_ends() -> None:
    assert (smooth_step(-1.0), smooth_step(0.0), smooth_step(1.0), smooth_step(2.0)) == (0, 0, 1, 1)
    assert smooth_step(0.5) == pytest.approx(0.5, abs=1e-12)
    assert smooth_step(1e-2) < 1e-10 and 1 - smooth_step(0.99) < 1e-10


def test_solve_has_its_tolerance() -> None:
    got = solve(lambda t, y: np.array([y[1], -y[0]]), np.array([0.0, 1.0]), 0.0, 20.0)
    np.testing.assert_allclose(got, [np.sin(20.0), np.cos(20.0)], atol=1e-11)
