"""Heun, singlestep, SDE multistep and Euler against diffusers' own schedulers on an analytic model, noise replayed."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_dpmsolver_multistep, scheduling_euler_ancestral_discrete

from diffaccel.core.families import betas
from diffaccel.core.path import Nodes, Path
from diffaccel.core.phi import phi
from diffaccel.samplers.registry import get
from diffaccel.testing.problems import four_modes

CLOSE = 1e-5
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
VP = Path.vp(betas("scaled_linear", 0.00085, 0.012, 1000))
FLOW = Path.flow()
MODEL = four_modes()


def noises():
    rng = np.random.default_rng(7)
    return lambda *_, **__: rng.standard_normal((16, 2))


def level_node(path, sigma):
    return path.at(1000 * sigma) if path is FLOW else path.at_level(sigma)


def stock(scheduler, calls, path, kind):
    """The scheduler's nodes, the start and its own final state in the scale of the path."""
    scheduler.set_timesteps(calls)
    sigmas = [float(s) for s in scheduler.sigmas]
    nodes = Nodes([level_node(path, s) for s in dict.fromkeys(sigmas)], path)
    exploding = path is VP and scheduler.init_noise_sigma > 1.5  # diffusers keeps x/alpha in these classes
    start = np.random.default_rng(1).standard_normal((16, 2))
    x = torch.tensor(start / nodes[0].alpha if exploding else start)
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t) if exploding else x
        out = MODEL.predict(seen.double().numpy(), level_node(path, sigmas[i]), kind)
        x = scheduler.step(torch.from_numpy(out), t, x).prev_sample
    return nodes, start, x.double().numpy(), len(scheduler.timesteps)


def ours(name, nodes, start, calls=None, **options):
    table = get(name).trace(nodes, calls, **options)
    draw = noises()
    return table.apply(start, MODEL.predict, lambda _: draw())


def test_heun():
    nodes, start, theirs, calls = stock(diffusers.HeunDiscreteScheduler(**BETAS), 9, VP, "eps")
    assert calls == 17
    assert np.abs(ours("heun", nodes, start, calls) - theirs).max() < CLOSE


def test_heun_on_a_karras_grid():
    nodes, start, theirs, _ = stock(diffusers.HeunDiscreteScheduler(**BETAS, use_karras_sigmas=True), 7, VP, "eps")
    assert np.abs(ours("heun", nodes, start) - theirs).max() < CLOSE


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_heun(shift):
    """It averages velocities in sigma: the same table from pure noise on."""
    nodes, start, theirs, calls = stock(diffusers.FlowMatchHeunDiscreteScheduler(shift=shift), 8, FLOW, "flow")
    assert nodes[0].alpha == 0
    assert np.abs(ours("heun", nodes, start, calls, clock="flow") - theirs).max() < CLOSE


def test_flow_match_euler():
    nodes, start, theirs, calls = stock(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 8, FLOW, "flow")
    assert np.abs(ours("ddim", nodes, start, calls) - theirs).max() < CLOSE


def test_euler():
    nodes, start, theirs, calls = stock(diffusers.EulerDiscreteScheduler(**BETAS), 8, VP, "eps")
    assert np.abs(ours("ddim", nodes, start, calls) - theirs).max() < CLOSE


def test_euler_ancestral(monkeypatch):
    draw = noises()
    monkeypatch.setattr(
        scheduling_euler_ancestral_discrete, "randn_tensor", lambda *a, **k: torch.from_numpy(draw()).float()
    )
    nodes, start, theirs, calls = stock(diffusers.EulerAncestralDiscreteScheduler(**BETAS), 8, VP, "eps")
    assert np.abs(ours("ddpm", nodes, start, calls) - theirs).max() < CLOSE


@pytest.mark.parametrize("calls", [7, 9])
def test_singlestep_order_2(calls):
    """Its second calls lie at the grid's odd nodes; on a grid uniform in lam these are our midpoints."""
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        **BETAS, use_exponential_sigmas=True, lower_order_final=True, final_sigmas_type="zero"
    )
    nodes, start, theirs, made = stock(scheduler, calls, VP, "eps")
    assert made == calls
    assert np.abs(ours("dpmpp_2s", Nodes([*nodes[:-1:2], nodes[-1]], VP), start, calls) - theirs).max() < CLOSE


@pytest.mark.parametrize("solver_type, form", [("midpoint", "midpoint"), ("heun", "exact")])
def test_sde_multistep_order_2(monkeypatch, solver_type, form):
    draw = noises()
    monkeypatch.setattr(scheduling_dpmsolver_multistep, "randn_tensor", lambda *a, **k: torch.from_numpy(draw()))
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS, algorithm_type="sde-dpmsolver++", solver_type=solver_type
    )
    nodes, start, theirs, calls = stock(scheduler, 9, VP, "eps")
    assert np.abs(ours("dpmpp_2m_sde", nodes, start, calls, form=form) - theirs).max() < CLOSE


# ---------------------------------------------------------------------- where diffusers is wrong
def parabola_row(algorithm):
    """diffusers' third-order row for `D = (lam - lam_s)^2`, x = 0 and no noise; the same by us; the true integral."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **BETAS, algorithm_type=algorithm, solver_order=3, prediction_type="sample", final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(20)
    nodes = [VP.at_level(float(s)) for s in scheduler.sigmas[8:12]]
    s, t = nodes[2], nodes[3]

    def clean(node):
        return (node.lam - s.lam) ** 2

    scheduler.set_begin_index(8)
    x, still = torch.zeros(1, 1), torch.zeros(1, 1)
    for time, node in zip(scheduler.timesteps[8:11], nodes, strict=False):
        x = scheduler.step(torch.full((1, 1), clean(node)), time, x * 0, variance_noise=still).prev_sample
    name, options = ("dpmpp", {"order": 3, "lower_order_final": False})
    rate = 1.0
    if algorithm == "sde-dpmsolver++":
        name, options, rate = "dpmpp_3m_sde", {}, 2.0
    row = get(name).trace(Nodes(nodes, VP), **options).rows[2].out
    mine = sum(b * clean(n) for b, n in zip(row.p, reversed(nodes[:3]), strict=True))
    h = t.lam - s.lam
    true = t.alpha * rate * h * 2 * h**2 * phi(3, -rate * h)  # Int rate e^(rate (u - h)) u^2 du over [0, h]
    return float(x), mine, true


def test_third_order_ode_row():
    """It takes half of the second difference."""
    theirs, mine, true = parabola_row("dpmsolver++")
    assert mine == pytest.approx(true, rel=1e-9)
    assert 0.4 < theirs / true < 0.95


def test_third_order_sde_row():
    """Its coefficient of the second difference has the wrong sign, so the row is not even of second order."""
    theirs, mine, true = parabola_row("sde-dpmsolver++")
    assert mine == pytest.approx(true, rel=1e-9)
    assert theirs < 0 < true
