"""Gaussian data in closed form: the flow equals the ODE, composes, and starts at pure noise; IADB."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

import diffaccel as da
from diffaccel.core.gauss import GaussLaw, fitted
from diffaccel.core.grid import nodes as grid_nodes
from diffaccel.core.path import Path
from diffaccel.errors import OptionError, PathError
from diffaccel.testing.problems import four_modes, solve
from diffaccel.testing.runs import PATHS

RNG = np.random.default_rng(0)
AXES = np.linalg.qr(RNG.standard_normal((6, 6)))[0][:3]
LAW = GaussLaw(RNG.standard_normal(6), AXES, np.array([2.0, 0.5, 0.1]), 0.03)
X = RNG.standard_normal((4, 6))


def covariance(law):
    along = law.axes.T @ np.diag(law.variances) @ law.axes
    return along + law.rest * (np.eye(law.axes.shape[1]) - law.axes.T @ law.axes)


@pytest.mark.parametrize("name", ["vp", "edm", "flow"])
def test_the_flow_is_the_ode(name):
    """In u = ln(sigma/alpha), with xb = x/alpha: `dxb/du = (sigma/alpha) e`, e of the Gaussian data."""
    path, total = PATHS[name], covariance(LAW)
    s, t = path.at_level(5.0), path.at_level(0.2)

    def slope(u, xb):
        level = np.exp(u)
        return level**2 * (xb - LAW.mean) @ np.linalg.inv(total + level**2 * np.eye(6))

    exact = t.alpha * solve(slope, X / s.alpha, np.log(s.level), np.log(t.level))
    np.testing.assert_allclose(LAW.flow(X, s, t), exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["vp", "edm", "flow", "vp_zero_snr"])
def test_semigroup(name):
    path = PATHS[name]
    r, s, t = path.first, path.at_level(2.0), path.at_level(0.3)
    np.testing.assert_allclose(LAW.flow(LAW.flow(X, r, s), s, t), LAW.flow(X, r, t), rtol=0, atol=1e-12)
    np.testing.assert_allclose(LAW.flow(X, s, s), X, rtol=0, atol=1e-12)
    np.testing.assert_allclose(LAW.flow(LAW.flow(X, s, t), t, s), X, rtol=0, atol=1e-11)


def test_from_pure_noise():
    path = PATHS["flow"]
    assert path.first.alpha == 0
    end = LAW.flow(X, path.first, path.end)
    inside = end - LAW.mean
    root = AXES.T @ np.diag(np.sqrt(LAW.variances)) @ AXES + np.sqrt(LAW.rest) * (np.eye(6) - AXES.T @ AXES)
    np.testing.assert_allclose(inside, X @ root, rtol=0, atol=1e-12)


def test_no_way_back_from_a_point():
    with pytest.raises(PathError, match="without variance"):
        GaussLaw(np.zeros(2), np.eye(2)[:1], np.ones(1)).flow(np.zeros((1, 2)), PATHS["edm"].end, PATHS["edm"].last)


def test_a_mixture_is_nearly_gaussian_at_high_noise():
    """The error of its Gaussian law falls as the level of arrival grows."""
    problem, path = four_modes(), PATHS["edm"]
    samples = problem.draw(np.random.default_rng(1), 20000)
    law = fitted(samples, 1)
    x = 80.0 * np.random.default_rng(2).standard_normal((16, 2))
    errors = []
    for level in (8.0, 4.0, 2.0, 1.0):
        node = path.at_level(level)
        there = problem.flow(x, path.first, node, 1e-9)
        errors.append(np.sqrt(np.mean((law.flow(x, path.first, node) - there) ** 2)))
    assert all(a < 0.7 * b for a, b in pairwise(errors))
    assert errors[0] < 0.05


def test_the_law_of_samples():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4000, 3)) @ np.diag([2.0, 1.0, 0.5]) + 1.5
    law = fitted(x, 2)
    np.testing.assert_allclose(covariance(law), np.diag([4.0, 1.0, 0.25]), atol=0.15)
    np.testing.assert_allclose(law.mean, 1.5, atol=0.1)
    few = fitted(rng.standard_normal((12, 200)), 5)  # more directions than samples: shrunk to one variance
    assert few.rest == pytest.approx(1.0, abs=0.3) and np.all(few.variances < 8)
    assert np.linalg.eigvalsh(np.cov(rng.standard_normal((12, 200)).T))[-1] > 15
    with pytest.raises(OptionError, match="4 samples"):
        fitted(np.zeros((3, 2)), 1)


def test_iadb_is_ddim_on_the_flow_path():
    nodes = grid_nodes(Path.flow(), 9, "trailing")

    def model(x, a):
        return np.tanh(x) * (1 - a) + 0.3 * a

    x = np.array([0.7, -1.1, 0.2])
    ours = da.sample(da.iadb(model), x, "ddim", nodes=nodes)
    for s, t in pairwise(nodes):
        x = x + ((1 - t.sigma) - (1 - s.sigma)) * model(x, 1 - s.sigma)
    np.testing.assert_allclose(ours, x, rtol=0, atol=1e-12)
