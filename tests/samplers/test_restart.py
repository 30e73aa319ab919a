"""Restart: the marginal law, contraction, budgets, begin indices. Its golden runs are in tests/parity."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest

from diffaccel import TableScheduler, restart
from diffaccel.api import trace
from diffaccel.core.grid import nodes as grid_nodes
from diffaccel.core.path import Nodes
from diffaccel.core.table import Table
from diffaccel.errors import OptionError
from diffaccel.samplers.begin import begin_at
from diffaccel.samplers.registry import get
from diffaccel.samplers.restart import Plan, Segment
from diffaccel.samplers.restart_presets import PRESETS
from diffaccel.samplers.rewrite import rewritten
from diffaccel.testing.problems import Gaussian
from diffaccel.testing.runs import PATHS, invariant, point_mass_error

SEGMENTS = [(4, 2, 0.3, 2.0), (3, 1, 1.0, 4.0)]
SAMPLERS = ["ddim", "ddpm", "dpmpp", "unipc", "deis", "ghvb", "heun", "dpmpp_2s", "er_sde"]


def snr_nodes(path, n=14):
    lams = np.linspace(-2.3, 2.4, n)
    return Nodes([*(path.at_lam(float(v)) for v in lams), path.end], path)


# ---------------------------------------------------------------------- exactness
@pytest.mark.parametrize("path", ["vp", "edm", "flow"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_mean_and_variance_are_those_of_the_path(sampler, path):
    """For data that is one point, every state of the run has the level that the table says, jumps included."""
    table = trace(sampler, snr_nodes(PATHS[path]), rewrite=[restart(SEGMENTS, churn=0.05)])
    assert point_mass_error(table) < 1e-9
    ups = sum(t.level > s.level * (1 + 1e-9) for s, t in pairwise(table.nodes))
    assert ups >= 3


def test_the_marginal_law_of_gaussian_data_is_kept():
    """Renoise and the ODE back, as a linear map of (state, mean, noise): mean and variance at the node stay."""
    path = PATHS["vp"]
    data, var = Gaussian(np.array([0.7]), 0.8), 0.64
    nodes = snr_nodes(path)
    plan = Plan((Segment(400, 1, 0.3, 3.0),), 1.0, 0.0, (0.0, 0.0), "karras", get("unipc"))
    piece = plan.pieces(get("ddim"), {"eta": 0.0}, nodes, None)[1]
    ((low, _),) = piece.lifts

    def predict(x, node, space=None):  # x = (weight of the state, constant, weight of the draw)
        gain = node.alpha * var / (node.alpha**2 * var + node.sigma**2)
        return gain * x + np.array([0.0, (1 - gain * node.alpha) * 0.7, 0.0])

    k, c, z = piece.loop(np.array([1.0, 0.0, 0.0]), predict, lambda: np.array([0.0, 0.0, 1.0]), 1.0)
    assert data.denoise(np.array([0.2]), low) == pytest.approx(predict(np.array([0.0, 0.2, 0.0]), low)[1])
    mean, size = low.alpha * 0.7, low.alpha**2 * var + low.sigma**2
    assert k * mean + c == pytest.approx(mean, abs=1e-6)
    assert k * k * size + z * z == pytest.approx(size, abs=1e-6)
    assert abs(k) < 0.6  # and the state was really renewed


@pytest.mark.parametrize("path", ["vp", "edm", "flow"])
def test_contraction(path):
    """A perturbation shrinks by s_m/s_M in VE units at each repeat, times the change of alpha (there is none)."""
    nodes = snr_nodes(PATHS[path])
    plain = trace("ddim", nodes)
    table = trace("ddim", nodes, rewrite=[restart([(5, 1, 0.3, 2.0)])])
    m = min(range(1, len(nodes)), key=lambda j: abs(nodes[j].level - 0.3))
    high = max(row.node.level for row in table.rows[m:])
    until = m + 4
    factor = np.prod([row.a for row in table.rows[:until]]) / np.prod([row.a for row in plain.rows[:m]])
    assert factor == pytest.approx(nodes[m].level / high, rel=1e-12)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "unipc", "ghvb", "heun", "cps"])
def test_path_invariance(sampler):
    tables = [trace(sampler, snr_nodes(PATHS[p]), rewrite=[restart(SEGMENTS)]) for p in ("vp", "edm", "flow")]
    for other in tables[1:]:
        np.testing.assert_allclose(invariant(other), invariant(tables[0]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_segments_is_the_sampler_itself(sampler):
    nodes = snr_nodes(PATHS["vp"])
    assert trace(sampler, nodes, rewrite=[restart([])]) == trace(sampler, nodes)


def test_the_history_is_forgotten_at_a_jump():
    table = trace("unipc", snr_nodes(PATHS["vp"]), rewrite=[restart(SEGMENTS)], order=3)
    since = 0
    for row, (s, t) in zip(table.rows, pairwise(table.nodes), strict=True):
        since += 1
        assert len(row.out.p) <= since
        since = 0 if t.level > s.level else since


def test_the_order_does_not_fall_before_a_jump():
    """`lower_order_final` is about the last nodes of the run, not of its pieces."""
    table = trace("dpmpp", snr_nodes(PATHS["vp"]), rewrite=[restart(SEGMENTS)], order=2)
    jumps = [i for i, (s, t) in enumerate(pairwise(table.nodes)) if t.level > s.level]
    assert len(jumps) == 3 and all(len(table.rows[i].out.p) == 2 for i in jumps)
    assert len(table.rows[-1].out.p) == 1


# ---------------------------------------------------------------------- budget
@pytest.mark.parametrize(("sampler", "inner"), [("dpmpp", None), ("heun", None), ("ddim", "heun")])
@pytest.mark.parametrize("preset", [*PRESETS, "auto"])
def test_n_calls_stay_n(preset, sampler, inner):
    """For N in 8..60 the table has N calls, or the error names the smallest N, which works."""
    made = rewritten(sampler, [restart(preset, inner=inner)])
    path = PATHS["edm"]
    for calls in range(8, 61):
        try:
            intervals = made.intervals_of(calls)
        except OptionError as error:
            least = re.search(r"that works is (\d+)", str(error))
            if preset == "auto":
                assert calls < 20 or least is None
                continue
            assert least is not None and int(least[1]) > calls
            calls = int(least[1])
            intervals = made.intervals_of(calls)
        assert len(made.trace(grid_nodes(path, intervals, "karras"), calls)) == calls


def test_published_numbers_of_calls():
    """(2N - 1) + sum 2 K (R - 1) for Heun, with N main nodes: 43 for CIFAR-10, 39 .. 203 for ImageNet-64."""
    for preset, n, calls in (
        ("cifar10-vp", 18, 27 + 16),
        ("imagenet64-edm-39", 14, 39),
        ("imagenet64-edm-67", 18, 67),
        ("imagenet64-edm-99", 18, 99),
        ("imagenet64-edm-203", 36, 203),
    ):
        made = rewritten("heun", [restart(preset, churn=0.05)])
        assert len(made.trace(grid_nodes(PATHS["edm"], n, "karras"))) == calls
        assert made.intervals_of(calls) == n


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segments": [(4, 2, 1e-4, 2.0)]}, r"segment \(4, 2, 0.0001, 2.0\).*sigma = 0"),
        ({"segments": [(4, 2, 0.3, 200.0)]}, "trained up to"),
        ({"segments": [(4, 2, 0.3, 0.305)]}, "finer grid or a wider segment"),
        ({"segments": [(1, 2, 0.3, 2.0)]}, "nodes of 2 or more"),
        ({"segments": [(3, 0, 0.3, 2.0)]}, "repeats of 1 or more"),
        ({"segments": [(3, 1, 2.0, 0.3)]}, "low < high"),
        ({"segments": "sd15"}, "unknown preset"),
        ({"segments": SEGMENTS, "s_noise": 0.0}, "s_noise > 0"),
        ({"segments": SEGMENTS, "grid": "linear"}, "unknown grid"),
        ({"segments": SEGMENTS, "inner": "hean"}, "unknown sampler"),
        ({"segments": [(200, 1, 0.3, 0.4)], "grid": "uniform_t"}, "do not fit"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(OptionError, match=message):
        trace("dpmpp", snr_nodes(PATHS["vp"], 20), rewrite=[restart(**options)])


@pytest.mark.parametrize("sampler", ["pndm", "dpmpp_3s"])
def test_samplers_with_several_calls_an_interval_keep_the_budget(sampler):
    made = rewritten(sampler, [restart([(4, 1, 0.3, 2.0)])])
    for calls in range(24, 40):
        table = made.trace(grid_nodes(PATHS["edm"], made.intervals_of(calls), "karras"), calls)
        assert len(table) == calls


# ---------------------------------------------------------------------- beginning in the middle
@pytest.mark.parametrize("sampler", ["dpmpp", "unipc", "heun", "ghvb", "ddpm"])
def test_every_call_begins_a_run_or_is_refused(sampler):
    made = rewritten(sampler, [restart(SEGMENTS)])
    calls = 30
    grid = grid_nodes(PATHS["edm"], made.intervals_of(calls), "karras")
    table = made.trace(grid, calls)
    options = made.options({})
    refused = []
    for k in range(1, calls):
        level = table.rows[k].node.level
        later = max(t.level for s, t in zip(table.nodes[k:], table.nodes[k + 1 :], strict=False))
        try:
            begun = begin_at(table, grid, k, made, options)
        except OptionError as error:
            assert "throw the image away" in str(error)
            assert later > level
            refused.append(k)
            continue
        assert later <= level * (1 + 1e-9)
        assert [r.t for r in begun.rows] == [r.t for r in table.rows[k:]]
        assert point_mass_error(begun) < 1e-9
    assert 0 < len(refused) < calls - 5


def test_base_and_refiner_meet_at_the_same_level():
    """SDXL counts `timesteps >= cutoff`, which is no place in a run whose timesteps rise; both halves count alike."""
    made = rewritten("dpmpp", [restart(SEGMENTS)])
    grid = grid_nodes(PATHS["vp"], made.intervals_of(24), "trailing")
    table = made.trace(grid, 24)
    done = 0
    for cutoff in range(50, 1000, 50):
        k = sum(t >= cutoff for t in table.timesteps)
        if not 0 < k < 24:
            continue
        try:
            refiner = begin_at(table, grid, k, made, made.options({}))
        except OptionError:
            continue
        assert refiner.rows[0].node.key == table.rows[k - 1].next.key
        assert point_mass_error(Table((*table.rows[:k], *refiner.rows))) < 1e-9
        done += 1
    assert done >= 5


def test_inpainting_keeps_the_known_region_across_jumps():
    import torch

    scheduler = TableScheduler(sampler="dpmpp", rewrite=[restart(SEGMENTS)])
    scheduler.set_timesteps(24)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(1, 2, 4, 4, generator=generator) for _ in range(2))
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    x, levels = noise.clone(), scheduler.table.nodes
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(torch.tanh(x), t, x, generator=generator).prev_sample
        known = x0
        if i < 23:  # what the inpainting pipelines do
            known = scheduler.add_noise(x0, noise, torch.tensor([scheduler.timesteps[i + 1]]))
            exact = levels[i + 1].alpha * x0 + levels[i + 1].sigma * noise
            assert torch.allclose(known, exact, atol=1e-6)
        x = mask * known + (1 - mask) * x
    assert torch.equal(x[..., :2], x0[..., :2])
    assert x.isfinite().all()
