"""Conversions among predictions: every kind says the same of x0 and eps, at every level."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from diffaccel.core.node import Node
from diffaccel.core.prediction import SPACES, Affine, Output, Prediction, convert, pair
from diffaccel.errors import OptionError, PathError

KINDS = (*SPACES, "edm_eps", "edm_v")
SIGMA_DATA = 0.7
X0, EPS = np.array([0.3, -1.2, 2.0]), np.array([-0.5, 0.9, 1.4])
angles = st.floats(1e-3, math.pi / 2 - 1e-3)
scale = st.floats(0.3, 3.0)


def output_of(kind: str, node: Node) -> np.ndarray:
    """What a perfect model of this kind gives, from the definitions."""
    a, s = node.alpha, node.sigma
    if kind in ("edm_eps", "edm_v"):
        level, d = s / a, SIGMA_DATA
        y = X0 + level * EPS
        skip, out = d**2 / (level**2 + d**2), level * d / math.hypot(level, d)
        return (X0 - skip * y) / (out if kind == "edm_eps" else -out)
    return {"x0": X0, "eps": EPS, "v": a * EPS - s * X0, "flow": EPS - X0}[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", SPACES)
@given(angle=angles, size=scale)
def test_every_kind_converts_to_every_space(kind: str, space: str, angle: float, size: float) -> None:
    # v is defined for alpha^2 + sigma^2 = 1, and its inverse holds for every scale
    node = Node(0.0, size * math.cos(angle), size * math.sin(angle))
    x = node.alpha * X0 + node.sigma * EPS
    assume(kind not in ("edm_eps", "edm_v") or node.level > 1e-2)
    got = convert(Prediction(output_of(kind, node), kind, SIGMA_DATA), space, x, node)
    np.testing.assert_allclose(got, output_of(space, node), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", SPACES)
@given(angle=angles)
def test_there_and_back(kind: str, space: str, angle: float) -> None:
    node = Node(0.0, math.cos(angle), math.sin(angle))
    x, raw = node.alpha * X0 + node.sigma * EPS, np.array([1.0, -0.4, 0.2])
    there = convert(Prediction(raw, kind, SIGMA_DATA), space, x, node)
    if kind in SPACES:
        back = convert(Prediction(there, space), kind, x, node)
        np.testing.assert_allclose(back, raw, rtol=1e-8, atol=1e-6)
    x0 = convert(Prediction(there, space), "x0", x, node)
    np.testing.assert_allclose(x0, convert(Prediction(raw, kind, SIGMA_DATA), "x0", x, node), rtol=1e-6, atol=1e-6)


def test_a_bare_array_is_x0() -> None:
    node = Node(0.0, 0.6, 0.8)
    assert convert(X0, "x0", EPS, node) is X0
    np.testing.assert_allclose(convert(X0, "eps", 0.6 * X0 + 0.8 * EPS, node), EPS)


def test_an_affine_space_combines_state_and_noise() -> None:
    node, u = Node(0.0, 0.6, 0.8), np.array([0.1, 0.2, 0.3])
    x = node.alpha * X0 + node.sigma * EPS
    for kind in SPACES:
        got = convert(Prediction(output_of(kind, node), kind), Affine(u, 2.0), x, node)
        np.testing.assert_allclose(got, u * x + 2.0 * EPS, rtol=1e-12)


def test_pure_noise_still_gives_x0_from_v_and_flow() -> None:
    noise = Node(1.0, 0.0, 1.0)
    for kind in ("x0", "v", "flow"):
        got = convert(Prediction(output_of(kind, noise), kind), "x0", EPS, noise)
        np.testing.assert_allclose(got, X0, rtol=1e-12)


def test_where_the_information_is_missing_it_says_so() -> None:
    with pytest.raises(PathError, match=r"zero terminal SNR.*'v_prediction' or 'sample'"):
        pair(Output("eps"), "x0", Node(999.0, 0.0, 1.0))
    with pytest.raises(PathError, match="no noise, so it has no noise prediction"):
        pair(Output("x0"), "eps", Node(0.0, 1.0, 0.0))
    with pytest.raises(OptionError, match="EDM preconditioning needs alpha > 0"):
        pair(Output("edm_eps", 0.5), "x0", Node(999.0, 0.0, 1.0))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(OptionError, match="unknown kind of model output 'epsilon'"):
        Output("epsilon")
    with pytest.raises(OptionError, match=r"unknown prediction_type 'epsilom'\. Did you mean 'epsilon'"):
        Output.of("epsilom")
    with pytest.raises(OptionError, match="unknown space 'y'"):
        pair(Output("eps"), "y", Node(0.0, 0.6, 0.8))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("epsilon", "eps"), ("sample", "x0"), ("v_prediction", "v"), ("flow_prediction", "flow")],
)
def test_diffusers_names(name: str, kind: str) -> None:
    assert Output.of(name).kind == kind
