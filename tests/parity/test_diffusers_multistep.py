"""UniPC, DEIS, PNDM and LMS against diffusers' classes on the exact model of a Gaussian mixture.

Where diffusers is right we agree to 1e-9 with its formulas on float64 levels, and to 1e-5 with the class as it is
(3e-5 for DEIS of order 3), whose levels are float32; where it is wrong the tests show its value, ours and the true one.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DEISMultistepScheduler, LMSDiscreteScheduler, PNDMScheduler, UniPCMultistepScheduler

from diffaccel.core.path import Nodes, Path
from diffaccel.samplers.registry import get
from diffaccel.testing.problems import four_modes, point_mass

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PROBLEM = four_modes()
START = np.random.default_rng(0).standard_normal((6, 2))


def path_of(scheduler):
    """The VP path of the scheduler's own (float32) alphas_cumprod."""
    acp = scheduler.alphas_cumprod.double().numpy()
    return Path.vp(1 - acp / np.concatenate([[1.0], acp[:-1]]))


def nodes_of(scheduler, final):
    path = path_of(scheduler)
    times = list(dict.fromkeys(float(t) for t in scheduler.timesteps))
    return Nodes([*(path.at(t) for t in times), path.end if final == "zero" else path.at(0)], path)


def their_states(scheduler, path, problem=PROBLEM, start=START, edit=None):
    """States before each model call and the last one, in the scheduler's own scale; `edit(i, x)` acts between steps."""
    x = torch.from_numpy(start * float(scheduler.init_noise_sigma))
    states = [x.numpy()]
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t)
        eps = torch.from_numpy(problem.noise(seen.numpy(), path.at(float(t))))
        x = scheduler.step(eps, t, x).prev_sample
        x = x if edit is None else edit(i, x)
        states.append(x.numpy())
    return states


def our_states(name, nodes, calls=None, problem=PROBLEM, start=START, **options):
    return get(name).trace(nodes, calls, **options).apply(start, problem.predict, trajectory=True)


def distance(ours, theirs):
    return max(float(np.max(np.abs(a - b))) for a, b in zip(ours, theirs, strict=True))


def sharpened(scheduler, nodes):
    """The same scheduler with levels in float64."""
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = torch.tensor([node.level for node in nodes], dtype=torch.float64)
    else:
        scheduler.alphas_cumprod = torch.from_numpy(nodes.path.alphas_cumprod)
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def agree(theirs, n, nodes, ours, limit=1e-5):
    """Whether all states agree: with the class as it is, and with float64 levels."""
    found = their_states(theirs, nodes.path)
    assert distance(ours, found) < limit
    theirs.set_timesteps(n)
    assert distance(ours, their_states(sharpened(theirs, nodes), nodes.path)) < 1e-9


# ---------------------------------------------------------------------- agreement
@pytest.mark.parametrize("n", [2, 5, 10, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order, n):
    theirs = DEISMultistepScheduler(**SD, solver_order=order)
    theirs.set_timesteps(n)
    nodes = nodes_of(theirs, "sigma_min")
    agree(
        theirs, n, nodes, our_states("deis", nodes, order=order, lower_order_final=n < 15), 1e-5 if order < 3 else 3e-5
    )


@pytest.mark.parametrize("n", [4, 10, 25])
def test_pndm(n):
    theirs = PNDMScheduler(**SD, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    theirs.set_timesteps(n)
    nodes = nodes_of(theirs, "sigma_min")
    calls = len(theirs.timesteps)
    assert get("pndm").intervals_of(calls) == n == len(nodes) - 1
    agree(theirs, n, nodes, our_states("pndm", nodes, calls))


@pytest.mark.parametrize("n", [2, 5, 10, 25])
def test_lms(n):
    """All states but the last: to sigma = 0 they extrapolate with order 4, we go to the prediction."""
    theirs = LMSDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1)
    theirs.set_timesteps(n)
    nodes = nodes_of(theirs, "zero")
    for sharp, limit in ((False, 1e-5), (True, 1e-9)):
        theirs.set_timesteps(n)
        found = their_states(sharpened(theirs, nodes) if sharp else theirs, nodes.path)
        ours = our_states("lms", nodes, start=nodes[0].alpha * found[0])
        assert distance([x / s.alpha for x, s in zip(ours, nodes, strict=True)][:-1], found[:-1]) < limit


@pytest.mark.parametrize("n", [2, 5, 10, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("final", ["sigma_min", "zero"])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("space", ["x0", "eps"])
def test_unipc(space, variant, final, order, n):
    options = {"solver_order": order, "solver_type": variant, "final_sigmas_type": final}
    theirs = UniPCMultistepScheduler(**SD, **options, predict_x0=space == "x0", disable_corrector=[1])
    theirs.set_timesteps(n)
    nodes = nodes_of(theirs, final)
    ours = our_states("unipc", nodes, order=order, variant=variant, space=space, corrector=[1])
    if final == "zero" and (variant, space) != ("bh2", "x0"):
        found = their_states(theirs, nodes.path)  # of which the last is not finite, see below
        assert distance(ours[:-1], found[:-1]) < 1e-5
    else:
        agree(theirs, n, nodes, ours)


# ---------------------------------------------------------------------- where diffusers is wrong
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("variant", "space"), [("bh1", "x0"), ("bh1", "eps"), ("bh2", "eps")])
def test_unipc_to_sigma_zero(variant, space, order):
    """Their last row multiplies B = -inf or e^inf by 0; the true final state is the end of the exact ODE."""
    theirs = UniPCMultistepScheduler(**SD, solver_order=order, solver_type=variant, predict_x0=space == "x0")
    theirs.set_timesteps(20)
    nodes = nodes_of(theirs, "zero")
    found = their_states(theirs, nodes.path)
    ours = our_states("unipc", nodes, order=order, variant=variant, space=space)
    true = PROBLEM.flow(START, nodes[0], nodes[-1], 1e-9)
    assert not np.isfinite(found[-1]).any()
    assert distance(ours[:-1], found[:-1]) < 1e-5
    assert np.median(np.abs(ours[-1] - true)) < 0.05


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_keeps_edits(order):
    """Data that is one point c: an edit e of the state at s moves the true state at t by (sigma_t/sigma_s) e.

    Theirs forgets it: the corrector rebuilds the state from a copy that it kept of the one before. An inpainting blend
    or a callback has no effect except through the model.
    """
    theirs = UniPCMultistepScheduler(**SD, solver_order=order)
    theirs.set_timesteps(10)
    nodes = nodes_of(theirs, "zero")
    problem, at, edit = point_mass([0.3, -0.2]), 4, np.array([0.5, -0.25])
    plain = their_states(theirs, nodes.path, problem)
    theirs.set_timesteps(10)
    # A model of one point answers an edited state with another eps, of the same x0.
    moved = their_states(
        theirs, nodes.path, problem, edit=lambda i, x: x + torch.from_numpy(edit) if i == at - 1 else x
    )
    table = get("unipc").trace(nodes, order=order)
    states = table.apply(START, problem.predict, trajectory=True)

    def predict(x, node, space):
        if node is nodes[at]:
            x += edit
        return problem.predict(x, node, space)

    edited = table.apply(START.copy(), predict, trajectory=True)
    s, t = list(pairwise(nodes))[at]
    true = (t.sigma / s.sigma) * edit
    np.testing.assert_allclose(edited[at + 1] - states[at + 1], np.broadcast_to(true, (6, 2)), atol=1e-9)
    np.testing.assert_allclose(moved[at + 1] - plain[at + 1], 0, atol=1e-6)
    assert table.rows[at].a == pytest.approx(t.sigma / s.sigma)
    assert math.hypot(*true) > 0.3
