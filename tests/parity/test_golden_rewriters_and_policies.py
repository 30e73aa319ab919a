"""GHVB, Restart and epsilon scaling against their authors' code (tests/golden/rewriters_and_policies)."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import golden_mixture as golden
import numpy as np
import pytest
from scipy.special import ndtri

from diffaccel.api import nodes as grid_nodes
from diffaccel.api import trace
from diffaccel.core.families import betas
from diffaccel.core.path import Nodes, Path
from diffaccel.core.prediction import Prediction
from diffaccel.samplers.epsilon_scale import epsilon_scale
from diffaccel.samplers.registry import Sampler, get
from diffaccel.samplers.restart import Plan, Segment, planned

SD = Path.vp(betas("scaled_linear", 0.00085, 0.012, 1000))


def found(file, wanted=lambda meta: True):
    return [case for case in golden.cases(file) if wanted(case.values[1])]


# ---------------------------------------------------------------------- GHVB
KINDS = {"ghvb": "ghvb", "hb": "heavy_ball", "nt": "nesterov"}


def ghvb_nodes(meta, call_t):
    """The grid of the two code bases: "dpm" ends at training step 0, "ddim" at alphas_cumprod[0] as well."""
    n = meta["N"]
    if meta["base"] == "dpm":
        steps = np.linspace(0, 999, n + 1).round()[:0:-1]
    else:
        steps = np.arange(n)[::-1] * (1000 // n) + 1
    np.testing.assert_array_equal(steps, call_t)
    return Nodes([SD.at(float(t)) for t in [*steps, 0]], SD)


# the authors' velocity starts from the raw output, which is wrong for v
@pytest.mark.parametrize(("data", "meta"), found("ghvb.npz", lambda meta: meta["pred"] == "epsilon"))
def test_momentum(data, meta):
    model, nodes = golden.model_of(data, meta), ghvb_nodes(meta, data["call_t"])
    options = {"order": meta["order"], "kind": KINDS[meta["kind"]]}
    golden.assert_states(golden.replayed(get("ghvb").trace(nodes, **options), data["x_init"], model), data)
    final = get("ghvb").run(data["x_init"], nodes, lambda x, s: Prediction(model.eps(x, s), "eps"), **options)
    np.testing.assert_allclose(final, data["out"], rtol=0, atol=1e-9)


def test_inputs_are_those_of_the_readme():
    x = found("ghvb.npz")[0].values[0]["x_init"]
    draws = ndtri(((np.arange(x.size) + 0.5) * 0.6180339887498949) % 1)
    np.testing.assert_allclose(x.ravel(), draws, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- Restart
def segments_of(meta):
    """`restart_info` of the published command line."""
    entries = json.loads(meta["restart_info"] or "{}").values()
    return tuple(Segment(int(r), int(k), low, high) for r, k, low, high in entries)


def edm_plan(meta):
    churn = (meta["restart_gamma"], (meta.get("S_min", 0.0), meta.get("S_max", 0.0)))
    return Plan(segments_of(meta), meta["S_noise"], *churn, "karras", None)


def check_restart(table, start, data, meta, noise):
    assert len(table) == meta["n_calls"]
    assert sum(row.draws for row in table.rows) == len(noise)
    golden.assert_states(golden.replayed(table, start, golden.model_of(data, meta), noise), data)


@pytest.mark.parametrize(("data", "meta"), found("restart.npz", lambda meta: meta.get("path") == "generate_restart.py"))
def test_restart_edm(data, meta):
    nodes = grid_nodes(Path.edm(0.002, 80.0), meta["num_steps"], "karras")
    table = planned(get("heun"), edm_plan(meta)).trace(nodes)
    np.testing.assert_allclose([row.node.sigma for row in table.rows], data["call_sigma"], rtol=1e-12)
    draws = sum(row.draws for row in table.rows)
    # without noise the draws have weight 0, and not all of them are recorded
    noise = data["noise"] if meta["S_noise"] else np.ones((draws, *data["x_init"].shape))
    check_restart(table, data["x_init"] * 80.0, data, meta, noise)


def dpm_solver(x, nodes, predict, noise, *, orders=()):
    """Singlestep DPM-Solver in noise space (arXiv:2206.00927, Algorithms 1 and 2), of a given order an interval."""
    for i, (s, t) in enumerate(pairwise(nodes)):
        order = orders[i] if orders else 3
        e = predict(x, s)

        def euler(m, x=x, e=e, s=s):
            return (m.alpha / s.alpha) * x + m.alpha * (m.level - s.level) * e

        if order == 1:
            x = euler(t)
            continue
        h = t.lam - s.lam
        if order == 2:
            m = nodes.between(s, t, 0.5)
            x = (t.alpha / s.alpha) * x - t.sigma * np.expm1(h) * predict(euler(m), m)
            continue
        m1, m2 = nodes.between(s, t, 1 / 3), nodes.between(s, t, 2 / 3)
        x1 = euler(m1)
        e1 = predict(x1, m1)
        x2 = euler(m2) - m2.sigma * 2 * (np.expm1(2 * h / 3) / (2 * h / 3) - 1) * (e1 - e)
        x = euler(t) - t.sigma * 1.5 * (np.expm1(h) / h - 1) * (predict(x2, m2) - e)
    return x


class OfficialOrders(Plan):
    """Order 2 in the last but one interval of the main loop, 1 in the last."""

    def pieces(self, sampler, options, nodes, calls):
        made = super().pieces(sampler, options, nodes, calls)
        last = len(nodes) - 1
        orders = [3] * (last - 2) + [2, 1]
        main = [i for i, piece in enumerate(made) if not piece.lifts]
        begin = 0
        for i in main:
            end = begin + len(made[i].nodes) - 1
            made[i] = replace(made[i], options={"orders": orders[begin:end]})
            begin = end
        return made


@pytest.mark.parametrize(
    ("data", "meta"), found("restart.npz", lambda meta: meta.get("path") == "generate_dpm_solver.py")
)
def test_restart_around_dpm_solver(data, meta):
    """The published variant: DPM-Solver-3 inside and outside, of order 2 and 1 in the last two main intervals."""
    beta = Path.vp_linear(0.1, 20.0)
    path = Path.edm(beta.at(1e-3).level, beta.at(1.0).level)
    nodes = grid_nodes(path, meta["num_steps"], "karras")
    plan = edm_plan(meta)
    table = planned(Sampler("dpm_solver", dpm_solver, 3, "eps"), OfficialOrders(*vars(plan).values())).trace(nodes)
    np.testing.assert_allclose([row.node.sigma for row in table.rows], data["call_sigma"], rtol=1e-9)
    check_restart(table, data["x_init"] * nodes[0].sigma, data, meta, data["noise"])


SD_SEGMENTS = {
    2: ((5, 2, 1.0, 9.0), (5, 2, 5.0, 10.0)), 3: ((10, 2, 0.1, 3.0),), 5: ((10, 2, 0.1, 2.0),), 8: ((10, 2, 0.1, 2.0),)
}  # fmt: skip


class OfficialSD(Plan):
    """The published pipeline does not correct the last interval of a repeat that ends at training step 0 or 1."""

    def _repeat(self, low, body, inner, options):
        made = super()._repeat(low, body, inner, options)
        return [replace(p, calls=2 * (len(body) - 1) - 1) for p in made] if low.t <= 1 else made


@pytest.mark.parametrize(("data", "meta"), found("restart.npz", lambda meta: "guidance_scale" in meta))
def test_restart_stable_diffusion(data, meta):
    nodes = Nodes([SD.at(float(t)) for t in data["timesteps"]], SD)
    segments = tuple(Segment(*s) for s in SD_SEGMENTS.get(meta["guidance_scale"], ()))
    plan = OfficialSD(segments, meta["S_noise"], 0.0, (0.0, 0.0), "uniform_t", get("heun"))
    table = planned(get("heun" if meta["second_order"] else "ddim"), plan).trace(nodes, meta["n_calls"])
    np.testing.assert_array_equal(table.timesteps, data["call_t"])
    check_restart(table, data["x_init"], data, meta, data["noise"])


# ---------------------------------------------------------------------- epsilon scaling
@pytest.mark.parametrize(("data", "meta"), found("epsilon_scaling.npz", lambda meta: "eps_scaler" in meta))
def test_epsilon_scaling_edm(data, meta):
    nodes = grid_nodes(Path.edm(0.002, 80.0), meta["num_steps"], "karras")
    sampler = "ddim" if meta.get("solver") == "euler" else "heun"
    table = trace(sampler, nodes, rewrite=[epsilon_scale(meta["eps_scaler"])])
    golden.assert_states(golden.replayed(table, data["x_init"] * 80.0, golden.model_of(data, meta)), data)


ADM = {
    "linear": Path.vp(betas("linear", 1e-4, 0.02, 1000)),
    "cosine": Path.vp(betas("squaredcos_cap_v2", 0.0, 0.0, 1000)),
}


@pytest.mark.parametrize(("data", "meta"), found("epsilon_scaling.npz", lambda meta: "schedule" in meta))
def test_epsilon_scaling_adm(data, meta):
    path = ADM[meta["schedule"]]
    nodes = Nodes([*(path.at(float(t)) for t in data["call_t"]), path.end], path)
    scaling = epsilon_scale(meta["b"], slope_per_call=meta["k"] or 0.0)
    table = trace("ddim" if meta["ddim"] else "ddpm", nodes, rewrite=[scaling])
    factors = [1.0 if isinstance(row.space, str) else row.space.scale for row in table.rows]
    np.testing.assert_allclose(factors[::-1], data["scaler"], rtol=1e-12)
    states = golden.replayed(table, data["x_init"], golden.model_of(data, meta), data["noise"])
    golden.assert_states(states, data, 1e-8 if meta["schedule"] == "cosine" else 1e-9, rtol=1e-10)
