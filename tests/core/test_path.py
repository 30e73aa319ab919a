"""Nodes and paths: alpha and sigma, inverse maps, ends, and what is refused."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffaccel.core.families import betas
from diffaccel.core.node import Node, decay, step
from diffaccel.core.path import Nodes, Path
from diffaccel.errors import DiffaccelError, OptionError, PathError
from diffaccel.testing.runs import PATHS, SD_BETAS

each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())


# ---------------------------------------------------------------------- nodes
@pytest.mark.parametrize(("alpha", "sigma"), [(0.0, 0.0), (-0.1, 1.0), (1.0, -1e-9), (math.nan, 1.0), (1.0, math.inf)])
def test_impossible_levels_are_refused(alpha: float, sigma: float) -> None:
    with pytest.raises(PathError, match="no noise level has"):
        Node(3.0, alpha, sigma)


def test_ends_have_infinite_lam_and_nodes_compare_by_identity() -> None:
    noise, data = Node(1.0, 0.0, 1.0), Node(0.0, 1.0, 0.0)
    assert (noise.lam, noise.level, data.lam, data.level) == (-math.inf, math.inf, math.inf, 0.0)
    assert noise != Node(1.0, 0.0, 1.0) and noise.key == Node(1.0, 0.0, 1.0).key


def test_decay_is_exp_minus_h_without_logarithms() -> None:
    s, t = Node(2.0, 0.3, 0.9), Node(1.0, 0.8, 0.5)
    assert decay(s, t) == pytest.approx(math.exp(s.lam - t.lam), rel=1e-14)
    assert step(s, t) == pytest.approx(t.lam - s.lam, rel=1e-14)
    assert decay(Node(3.0, 0.0, 1.0), t) == 0.0 and decay(s, Node(0.0, 1.0, 0.0)) == 0.0
    assert step(Node(3.0, 0.0, 1.0), t) == math.inf


@pytest.mark.parametrize("ends", [((0.5, 0.5), (0.0, 1.0)), ((1.0, 0.0), (0.5, 0.5))])
def test_steps_that_have_no_ratio_are_refused(ends: tuple[tuple[float, float], tuple[float, float]]) -> None:
    with pytest.raises(PathError, match="no finite ratio"):
        decay(Node(2.0, *ends[0]), Node(1.0, *ends[1]))


# ---------------------------------------------------------------------- every path
@each_path
def test_alpha_and_sigma_obey_the_family(path: Path) -> None:
    for t in np.linspace(path.last.t, path.first.t, 37):
        node = path.at(float(t))
        relation = {"vp": node.alpha**2 + node.sigma**2, "flow": node.alpha + node.sigma, "edm": node.alpha}
        assert relation[path.family] == pytest.approx(1.0, abs=1e-12)


@each_path
def test_noise_rises_with_t(path: Path) -> None:
    levels = [path.at(float(t)).level for t in np.linspace(path.last.t, path.first.t, 211)]
    assert all(a < b for a, b in pairwise(levels))
    assert path.last.level < path.first.level
    assert path.end.sigma == 0 and path.end.alpha == 1


@each_path
@given(u=st.floats(0, 1))
def test_at_inverts_at_lam(path: Path, u: float) -> None:
    node = path.at(path.last.t + u * (path.first.t - path.last.t))
    if node.alpha == 0:
        return
    again = path.at_lam(node.lam)
    assert (again.alpha, again.sigma) == pytest.approx((node.alpha, node.sigma), rel=1e-9)
    assert again.lam == pytest.approx(node.lam, abs=1e-9)
    if path is not PATHS["vp_sigma"]:  # there t is linear in sigma/alpha between steps, at_lam's in lam
        assert again.t == pytest.approx(node.t, rel=1e-6, abs=1e-6 * abs(path.first.t))


@each_path
@given(lam=st.floats(-8, 5))
def test_at_lam_gives_that_lam(path: Path, lam: float) -> None:
    node = path.at_lam(lam)
    assert node.lam == pytest.approx(lam, abs=1e-9)
    assert path.at_level(node.level).lam == pytest.approx(lam, abs=1e-9)
    assert path.node(3 * node.alpha, 3 * node.sigma).lam == pytest.approx(lam, abs=1e-9)


@each_path
def test_levels_at_the_ends(path: Path) -> None:
    assert path.at_level(0.0).key == path.end.key
    assert path.node(1.0, 0.0).key == path.end.key
    if path.first.alpha == 0:
        assert path.at_level(math.inf).key == path.first.key
    else:
        with pytest.raises(PathError, match="sigma/alpha = inf"):
            path.at_level(math.inf)
    with pytest.raises(PathError, match=r"sigma/alpha = -1\.0"):
        path.at_level(-1.0)


@each_path
def test_paths_survive_copies_and_have_their_digest(path: Path) -> None:
    for again in (copy.deepcopy(path), pickle.loads(pickle.dumps(path))):
        assert again == path and again.digest == path.digest and again.first.key == path.first.key


def test_digest_tells_paths_apart() -> None:
    # a flow path's shift moves grids, not nodes
    distinct = {path.digest for name, path in PATHS.items() if not name.startswith("flow")} | {Path.flow().digest}
    assert len(distinct) == len([n for n in PATHS if not n.startswith("flow")]) + 1


# ---------------------------------------------------------------------- families
def test_vp_is_the_cumulative_product() -> None:
    path = Path.vp(SD_BETAS)
    acp = np.cumprod(1 - np.array(SD_BETAS))
    np.testing.assert_allclose(path.alphas_cumprod, acp, rtol=1e-12)
    for t in (0, 417, 999):
        assert path.at(t).alpha ** 2 == pytest.approx(acp[t], rel=1e-12)
        assert path.at(t).sigma ** 2 == pytest.approx(1 - acp[t], rel=1e-12)


def test_zero_snr_moves_the_last_step_to_pure_noise_and_keeps_the_first() -> None:
    path, plain = Path.vp(SD_BETAS, zero_snr=True), Path.vp(SD_BETAS)
    assert (path.first.alpha, path.first.sigma) == (0.0, 1.0)
    assert path.last.alpha == pytest.approx(plain.last.alpha, rel=1e-12)
    tail = [path.at(998 + f).alpha for f in (0.0, 0.3, 0.6, 0.9, 0.999)]
    assert tail == sorted(tail, reverse=True) and tail[-1] > 0


def test_snr_shift_divides_the_snr() -> None:
    shifted, plain = Path.vp(SD_BETAS, snr_shift=3.0), Path.vp(SD_BETAS)
    for t in (0, 500, 999):
        assert (shifted.at(t).level / plain.at(t).level) ** 2 == pytest.approx(3.0, rel=1e-9)


def test_vp_interpolates_as_asked() -> None:
    lam, sigma = Path.vp(SD_BETAS), Path.vp(SD_BETAS, interpolation="sigma")
    assert lam.at(500.5).lam == pytest.approx((lam.at(500).lam + lam.at(501).lam) / 2, rel=1e-12)
    assert sigma.at(500.5).level == pytest.approx((sigma.at(500).level + sigma.at(501).level) / 2, rel=1e-12)


@given(u=st.floats(1e-3, 1), mu=st.floats(-1, 3))
def test_flow_shift_and_its_inverse(u: float, mu: float) -> None:
    for path in (Path.flow(3.0), Path.flow(mu=mu), Path.flow(mu=1 + abs(mu), shift_type="linear")):
        assert path.unwarp(path.warp(1000 * u)) == pytest.approx(1000 * u, rel=1e-9)
    dynamic = Path.flow(mu=mu)
    assert dynamic.warp(1000 * u) / 1000 == pytest.approx(math.exp(mu) / (math.exp(mu) + 1 / u - 1), rel=1e-9)


@pytest.mark.parametrize(
    ("time", "fed"), [("log", math.log(5.0) / 4), ("atan", 2 * math.atan(5.0) / math.pi), ("sigma", 5.0)]
)
def test_edm_feeds_its_time(time: str, fed: float) -> None:
    path = Path.edm(time=time)
    assert path.at_level(5.0).t == pytest.approx(fed, rel=1e-12)
    assert path.at(fed).sigma == pytest.approx(5.0, rel=1e-12)


def test_betas_match_their_definitions() -> None:
    assert betas("linear", 1e-4, 0.02, 1000)[[0, -1]] == pytest.approx([1e-4, 0.02])
    assert betas("scaled_linear", 0.00085, 0.012, 1000)[[0, -1]] == pytest.approx([0.00085, 0.012])
    cosine = betas("squaredcos_cap_v2", 0, 0, 1000)
    assert cosine.max() == 0.999 and np.all(np.diff(cosine) >= 0)
    for name in ("sigmoid", "laplace", "exp"):
        values = betas(name, 1e-4, 0.02, 100)
        assert values.shape == (100,) and np.all((values > 0) & (values < 1))


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Path.vp([0.1]), "2 or more betas"),
        (lambda: Path.vp([0.1, 1.5]), r"out of range: \[1\.5\]"),
        (lambda: Path.vp([0.1, 0.2], interpolation="cubic"), "unknown interpolation 'cubic'"),
        (lambda: Path.edm(2.0, 1.0), "0 < sigma_min < sigma_max"),
        (lambda: Path.edm(time="ln"), "unknown time 'ln'"),
        (lambda: Path.flow(-1.0), "positive shift, got -1.0"),
        (lambda: Path.flow(terminal=2.0), r"shift_terminal must lie in \(0, 1\)"),
        (lambda: Path.flow(train_steps=1), "num_train_timesteps must be 2 or more"),
        (lambda: Path.flow(mu=-1.0, shift_type="linear").warp(500), "mu > 0, got -1.0"),
        (lambda: Path.flow(mu=1.0, shift_type="cubic"), "unknown time_shift_type 'cubic'"),
        (lambda: Path.vp_linear(t_min=0.0), "0 < t_min < t_max <= 1"),
        (lambda: Path.vp(SD_BETAS).at(1000), r"outside the training steps 0\.\.999"),
        (lambda: Path.flow().at(1001), r"outside 0\.\.1000"),
        (lambda: Path.vp_linear().at(1.5), "continuous VP path"),
        (lambda: Path.edm(time="sigma").at(-1.0), "no EDM node has"),
        (lambda: betas("cosine", 0, 1, 10), "unknown beta_schedule 'cosine'"),
    ],
)
def test_bad_input_says_what_is_wrong(make: object, message: str) -> None:
    with pytest.raises(DiffaccelError, match=message) as caught:
        make()  # type: ignore[operator]
    assert isinstance(caught.value, (OptionError, PathError))


def test_nodes_keep_their_path() -> None:
    path = Path.flow()
    nodes = Nodes([path.at(t) for t in (900.0, 500.0, 100.0)], path)
    assert isinstance(nodes[1:], Nodes) and nodes[1:].path is path and nodes[0].t == 900.0
    again = pickle.loads(pickle.dumps(nodes))
    assert [n.key for n in again] == [n.key for n in nodes] and again.path == path
    middle = nodes.between(nodes[0], nodes[1], 0.25)
    assert middle.lam == pytest.approx(0.75 * nodes[0].lam + 0.25 * nodes[1].lam)
