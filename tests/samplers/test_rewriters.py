"""Rewriters other than Restart: what each does to a table, and the checks of samplers on rewritten ones."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import diffaccel as da
from diffaccel import TableScheduler
from diffaccel.core.grid import nodes as grid_nodes
from diffaccel.core.prediction import Affine, Output, pair
from diffaccel.errors import OptionError
from diffaccel.samplers.registry import Sampler, get
from diffaccel.samplers.rewrite import REWRITERS, read, rewriter, rewritten
from diffaccel.schedulers.policy import dynamic_threshold
from diffaccel.testing.checks import CHECKS
from diffaccel.testing.runs import PATHS, point_mass_error, unroll

VP = PATHS["vp"]
MADE = {
    "epsilon_scale": da.epsilon_scale(1.01, slope_per_call=0.002, below=20.0),
    "momentum": da.momentum(0.6),
    "nesterov": da.momentum(0.4, kind="nesterov"),
    "contrast": da.contrast(0.2, lag=2),
    "align": da.align([(0.0, 0.0), (500.0, 4.0), (999.0, 0.0)]),
}
SAMPLERS = ["ddim", "dpmpp", "unipc", "deis", "ghvb", "lms"]


# ---------------------------------------------------------------------- the checks of every sampler
@pytest.mark.parametrize("check", ["path_invariance", "calls", "functional", "edits", "serial", "batch", "finite"])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", [n for n in MADE if n != "align"])
def test_checks(name, sampler, check):
    if check == "finite":  # the longest; one sampler in each space tells
        pytest.skip("checked for two samplers") if sampler not in ("dpmpp", "ghvb") else None
    result = CHECKS[check](rewritten(sampler, [MADE[name]]), {})
    assert result.passed, str(result)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", [n for n in MADE if n != "epsilon_scale"])
def test_point_mass_is_exact(name, sampler):
    """There the noise prediction is constant along a run; a scaled one is wrong by design."""
    result = CHECKS["point_mass"](rewritten(sampler, [MADE[name]]), {})
    assert result.passed, str(result)


# ---------------------------------------------------------------------- epsilon scaling
@pytest.mark.parametrize("path", ["vp", "edm", "flow"])
def test_scaled_point_mass(path):
    """`x' - alpha' c = alpha'/alpha (1 - (s - s')/(s lambda)) (x - alpha c)` for DDIM rows, s = sigma/alpha."""
    factor, nodes = 1.03, grid_nodes(PATHS[path], 7, "karras")
    table = da.trace("ddim", nodes, rewrite=[da.epsilon_scale(factor)])
    c, x = 0.4, np.array([1.7, -0.2]) * nodes[0].sigma

    def predict(x, node, space):
        u, w = pair(Output("x0"), space, node)
        return u * x + w * c

    states = table.apply(x, predict, trajectory=True)
    for (s, t), (a, b) in zip(pairwise(nodes), pairwise(states), strict=True):
        if s.alpha == 0:
            continue  # unscaled
        shrink = 1 - (s.level - t.level) / (s.level * factor)
        np.testing.assert_allclose(b - t.alpha * c, t.alpha / s.alpha * shrink * (a - s.alpha * c), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "unipc", "deis", "lms"])
def test_rows_of_scaled_predictions(sampler):
    """x0-space: `a + b (1 - 1/lambda)/alpha` and `b/lambda`; eps-space: `b/lambda`; each seen by a first-order row."""
    nodes = grid_nodes(VP, 3, "karras")
    plain, scaled = (da.trace(sampler, nodes, rewrite=r) for r in (None, [da.epsilon_scale(1.2)]))
    row, new = plain.rows[0], scaled.rows[0]
    a, b = row.out.x, row.out.p[0]
    assert isinstance(new.space, Affine) and new.space.scale == 1.2
    u, w = pair(Output("x0" if row.space == "x0" else "eps"), new.space, row.node)
    got = (new.out.x + new.out.p[0] * u, new.out.p[0] * w)
    if row.space == "x0":
        assert got == pytest.approx((a + b * (1 - 1 / 1.2) / row.node.alpha, b / 1.2), rel=1e-12)
    else:
        assert got == pytest.approx((a, b / 1.2), rel=1e-12)


def test_lambda_is_counted_from_the_end():
    nodes = grid_nodes(VP, 5, "karras")
    made = [da.epsilon_scale(1.01, slope_per_call=0.003), da.epsilon_scale(1.02, below=1.0)]
    slope, low = (da.trace("heun", nodes, rewrite=[r]) for r in made)
    scales = [row.space.scale for row in slope.rows]
    np.testing.assert_allclose(scales, 1.01 + 0.003 * np.arange(len(slope))[::-1], rtol=1e-12)
    assert len(scales) == 9  # Heun's second calls, too
    assert all((not isinstance(r.space, str)) == (r.node.level <= 1.0) for r in low.rows)
    assert da.trace("heun", nodes, rewrite=[da.epsilon_scale(1.0)]) == da.trace("heun", nodes)


def test_pure_noise_is_not_scaled():
    table = da.trace("dpmpp", grid_nodes(PATHS["flow"], 5, "trailing"), rewrite=[da.epsilon_scale(1.1)])
    assert table.rows[0].node.alpha == 0 and table.rows[0].space == "x0"
    assert not isinstance(table.rows[1].space, str)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_scale_first_then_threshold(kind):
    """x0 from the scaled noise prediction is what thresholding sees, and what the row uses."""
    factor, t = 1.3, 400
    scheduler = TableScheduler(
        prediction_type=kind, sampler="ddim", thresholding=True, rewrite=[da.epsilon_scale(factor)], beta_end=0.02
    )
    scheduler.set_timesteps(timesteps=[t, 100])
    node, after = scheduler.table.nodes[:2]
    x, output = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    u, w = pair(Output.of(kind), "eps", node)
    clean = dynamic_threshold(0.995, 1.0)((x - node.sigma * (u * x + w * output) / factor) / node.alpha)
    got = scheduler.step(output, t, x)
    torch.testing.assert_close(got.pred_original_sample, clean)
    # a clipped x0 changes the noise prediction with it, as for every sampler here
    expected = after.alpha * clean + after.sigma * (x - node.alpha * clean) / node.sigma
    torch.testing.assert_close(got.prev_sample, expected)


# ---------------------------------------------------------------------- momentum
@pytest.mark.parametrize("path", ["vp", "edm", "flow", "vp_zero_snr"])
@pytest.mark.parametrize("kind", ["heavy_ball", "nesterov"])
@pytest.mark.parametrize("r", [1, 2, 3])
def test_momentum_on_adams_bashforth_is_the_published_sampler(path, kind, r):
    nodes = grid_nodes(PATHS[path], 9, "linspace_open")
    ours = da.trace("ipndm", nodes, order=r, rewrite=[da.momentum(0.7, kind=kind)])
    theirs = da.trace("ghvb", nodes, order=r - 0.3, kind=kind)
    np.testing.assert_allclose(unroll(ours), unroll(theirs), rtol=0, atol=1e-12)
    assert ours.slots == 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_identities(sampler):
    nodes = grid_nodes(VP, 8, "karras")
    plain = da.trace(sampler, nodes)
    for same in (da.momentum(1.0), da.contrast(0.0), da.contrast([0.0, 0.0]), da.align([(0.0, 0.0)])):
        assert da.trace(sampler, nodes, rewrite=[same]) == plain


def test_contrast_is_what_it_says():
    """For DDIM: the row on `e_n + c (e_n - e_{n-1})`, written by hand."""
    nodes, c = grid_nodes(VP, 6, "karras"), 0.35
    table = da.trace("ddim", nodes, rewrite=[da.contrast(c)])
    x = np.array([0.3, -1.2])
    given = np.sin(np.arange(12.0)).reshape(6, 2)
    feed = iter(given)
    states = table.apply(x, lambda x, node, space: next(feed), trajectory=True)
    assert all(row.space == "eps" for row in table.rows)
    for i, (s, t) in enumerate(pairwise(nodes)):
        e = given[i] + (c * (given[i] - given[i - 1]) if i else 0.0)
        x = t.alpha * (x - s.sigma * e) / s.alpha + t.sigma * e
        np.testing.assert_allclose(states[i + 1], x, rtol=0, atol=1e-12)


def test_contrast_of_a_multistep_sampler_keeps_the_changed_predictions():
    """dpmpp on predictions changed by hand, call by call, passes through the same states."""
    nodes, c = grid_nodes(VP, 7, "karras"), -0.25
    table = da.trace("dpmpp", nodes, rewrite=[da.contrast(c)])
    earlier = []

    def eps(x, node):
        return np.tanh(x + node.sigma)

    def changed(x, node):
        e = eps(x, node)
        earlier.append(e)
        return da.Prediction(e + c * (e - earlier[-2]) if len(earlier) > 1 else e, "eps")

    x = np.array([0.4, -0.9, 2.0])
    ours = table.apply(x, lambda x, node, space: np.add(*(f * v for f, v in zip(pair(Output("eps"), space, node), (x, eps(x, node)), strict=True))))  # fmt: skip  # noqa: E501
    np.testing.assert_allclose(ours, da.sample(changed, x, "dpmpp", nodes=nodes), rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- alignment, boost
def test_alignment_changes_what_is_fed_and_nothing_else():
    nodes = grid_nodes(VP, 8, "linspace")
    plain = da.trace("unipc", nodes)
    moved = da.trace("unipc", nodes, rewrite=[da.align([(0.0, 10.0), (999.0, 110.0)])])
    np.testing.assert_array_equal(unroll(plain), unroll(moved))
    expected = [min(999.0, row.t + 10 + 100 * row.t / 999) for row in plain.rows]
    np.testing.assert_allclose(moved.timesteps, expected)
    assert [n.key for n in moved.nodes] == [n.key for n in plain.nodes]


def test_boost_and_skip():
    scheduler = TableScheduler(sampler="ddpm", rewrite=[da.boost_and_skip(4.0, drop=3)], grid="trailing")
    plain = TableScheduler(sampler="ddpm", grid="trailing")
    scheduler.set_timesteps(10)
    plain.set_timesteps(13)
    assert scheduler.timesteps.tolist() == plain.timesteps.tolist()[3:]
    assert (scheduler.init_noise_sigma, plain.init_noise_sigma) == (4.0, 1.0)
    with pytest.raises(OptionError, match="cannot begin at call 2"):
        scheduler.set_begin_index(2)
    with pytest.raises(OptionError, match="'boost_and_skip' cannot be combined with sampler 'dpmpp'"):
        TableScheduler(sampler="dpmpp", rewrite=[da.boost_and_skip(4.0, drop=3)]).set_timesteps(10)
    with pytest.raises(OptionError, match="VP paths"):
        TableScheduler(path="flow", sampler="ddpm", rewrite=[da.boost_and_skip(4.0, drop=3)]).set_timesteps(10)


def test_the_functional_run_is_boosted():
    nodes = grid_nodes(VP, 12, "karras")
    seen = []

    def predict(x, node):
        seen.append((x, node))
        return 0.0 * x

    da.sample(predict, np.ones(3), "ddpm", nodes=nodes, noise=np.zeros_like, rewrite=[da.boost_and_skip(2.5, drop=2)])
    assert np.all(seen[0][0] == 2.5) and seen[0][1].key == nodes[2].key


# ---------------------------------------------------------------------- the mechanism
def test_the_order_of_the_list_does_not_matter():
    parts = [da.align([(0.0, 1.0)]), da.momentum(0.5), da.epsilon_scale(1.01), da.contrast(0.1)]
    nodes = grid_nodes(VP, 8, "karras")
    forward, backward = (da.trace("unipc", nodes, rewrite=r) for r in (parts, parts[::-1]))
    assert forward == backward
    names = [part.name for part in read(parts)]
    assert names == ["epsilon_scale", "contrast", "momentum", "align"]
    assert forward.sampler.startswith("unipc + epsilon_scale(at_end=1.01) + contrast(c=0.1) + momentum(beta=0.5)")


def test_parts_survive_json_and_configs(tmp_path):
    parts = [da.epsilon_scale(1.005, below=3.0), da.restart([(4, 2, 0.3, 2.0)], s_noise=1.003)]
    scheduler = TableScheduler(sampler="unipc", rewrite=parts)
    scheduler.save_pretrained(tmp_path)
    for twin in (TableScheduler.from_pretrained(tmp_path), TableScheduler.from_config(scheduler.config)):
        scheduler.set_timesteps(20)
        twin.set_timesteps(20)
        assert twin.table == scheduler.table
        assert [p["name"] for p in twin.config.rewrite] == ["restart", "epsilon_scale"]
    assert TableScheduler.from_config(scheduler.config, rewrite=[]).config.rewrite is None


@pytest.mark.parametrize(
    ("rewrite", "message"),
    [
        (["nothing"], "unknown rewriter 'nothing'"),
        ([3], "3 is no rewriter"),
        ([{"name": "momentum"}], "'momentum' needs beta"),
        ([{"name": "momentum", "beta": 0.5, "gamma": 1}], "takes no option 'gamma'"),
        ([da.momentum(0.5), da.momentum(0.6)], "listed twice"),
        ([da.restart(), da.momentum(0.5)], "'momentum' cannot be combined with 'restart': a jump up in noise"),
        ([da.restart(), da.skip()], "'skip' cannot be combined with 'restart'"),
        ([da.momentum(0.0)], r"beta in \(0, 1\]"),
        ([da.momentum(0.5, kind="x")], "unknown kind"),
        ([da.contrast(math.inf)], "finite"),
        ([da.contrast(0.1, lag=0)], "lag must be"),
        ([da.epsilon_scale(0.0)], "at_end > 0"),
        ([da.epsilon_scale("1.01")], "finite numbers"),
        ([da.align([(5.0, 1.0), (4.0, 1.0)])], "must be finite and rise"),
        ([da.align([3.0])], r"shifts are \[\(t, shift\)"),
        ([da.boost_and_skip(0.0, drop=1)], "gamma > 0"),
        ([da.boost_and_skip(2.0, drop=-1)], "drop must be"),
    ],
    ids=str,
)
def test_refused_when_the_scheduler_is_built(rewrite, message):
    with pytest.raises(OptionError, match=message):
        TableScheduler(sampler="ddpm", rewrite=rewrite)


def test_missing_and_unknown_arguments():
    with pytest.raises(OptionError, match="missing a required argument: 'at_end'"):
        da.epsilon_scale()
    with pytest.raises(OptionError, match="unexpected keyword"):
        da.restart(sigma=3)
    with pytest.raises(OptionError, match="cannot be saved"):
        da.contrast(print)


def test_a_slope_that_turns_lambda_negative_is_refused():
    with pytest.raises(OptionError, match="lambda = -"):
        da.trace("ddim", grid_nodes(VP, 8, "karras"), rewrite=[da.epsilon_scale(1.0, slope_per_call=-0.3)])


def test_momentum_refuses_what_has_no_steps():
    nodes = grid_nodes(VP, 8, "karras")
    with pytest.raises(OptionError, match="draws noise"):
        da.trace("ddpm", nodes, rewrite=[da.momentum(0.5)])
    with pytest.raises(OptionError, match="several calls an interval"):
        da.trace("heun", nodes, rewrite=[da.momentum(0.5)])


def test_a_rewriter_of_ones_own():
    @rewriter("half_step", stage="path")
    def half_step(sampler: Sampler, factor: float = 0.5) -> Sampler:
        """Every other node."""
        from diffaccel.samplers.rewrite import with_loop

        def loop(x, nodes, predict, noise, **options):
            return sampler.loop(x, nodes[::2], predict, noise, **options)

        return with_loop(sampler, loop, calls=False, intervals=lambda calls, **_: 2 * calls)

    try:
        scheduler = TableScheduler(sampler="dpmpp", rewrite=[half_step()])
        scheduler.set_timesteps(6)
        assert len(scheduler.timesteps) == 6
        assert point_mass_error(scheduler.table) < 1e-9
        with pytest.raises(OptionError, match="registered already"):
            rewriter("restart", stage="path")(lambda sampler: sampler)
        with pytest.raises(OptionError, match="unknown stage"):
            rewriter("other", stage="middle")
    finally:
        REWRITERS.kinds.pop("half_step")


def test_the_rewritten_sampler_is_not_the_registered_one():
    before = get("dpmpp")
    assert rewritten("dpmpp", [da.momentum(0.5)]).edits and not before.edits
    assert rewritten("dpmpp", None) is before
