"""The real tiny pipelines with the stock scheduler and with ours: the same latents after every call.

Ours visits the timesteps of the stock scheduler, and states of the Euler family (variance exploding) are divided by
`sqrt(1 + sigma^2)`. Differences are relative to the largest value of a state. Measured, they stay below 1e-6 (the
float32 tables of diffusers; ours are float64), but for LMS: its last row is a polynomial to sigma = 0, ours is the
first-order step in data space, as at the end of every run.
"""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from diffaccel import TableScheduler
from diffaccel.testing.pipelines import build, call_kwargs

TOLERANCE = 1e-5
CALLS = 10
SD = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
EULER = {"timestep_spacing": "leading"}  # starts at sqrt(sigma^2 + 1), as a variance preserving run does
EXPLODING = ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler")


def trajectory(pipe, name, scheduler, calls=CALLS, **changes):
    """Latents after every call, variance preserving."""
    pipe.scheduler = scheduler
    states = []

    def keep(pipe, i, t, kwargs):
        sigma = float(scheduler.sigmas[scheduler.step_index]) if type(scheduler).__name__ in EXPLODING else 0.0
        states.append(kwargs["latents"] / (1 + sigma**2) ** 0.5)
        return kwargs

    pipe(**call_kwargs(name, num_inference_steps=calls, callback_on_step_end=keep, **changes))
    return states


def visiting(ours, **given):
    """`ours`, whose set_timesteps is given these nodes whatever the pipeline asks for."""
    plain = ours.set_timesteps
    ours.set_timesteps = lambda *args, device=None, **kwargs: plain(device=device, **given)
    return ours


def worst(a, b):
    """Largest difference of two lists of states, each relative to its largest value."""
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------------- Stable Diffusion 1.5
# stock class, its settings, our sampler and its options
SD_CASES = {
    "ddim": ("DDIMScheduler", {"set_alpha_to_one": True, "clip_sample": False}, "ddim", {}),
    "euler": ("EulerDiscreteScheduler", EULER, "ddim", {}),
    "dpmpp_1": ("DPMSolverMultistepScheduler", {"solver_order": 1}, "dpmpp", {"order": 1}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}, "dpmpp", {"order": 2}),
    "unipc_1": ("UniPCMultistepScheduler", {"solver_order": 1}, "unipc", {"order": 1}),
    "unipc_2": ("UniPCMultistepScheduler", {"solver_order": 2}, "unipc", {"order": 2}),
    "unipc_3": ("UniPCMultistepScheduler", {"solver_order": 3}, "unipc", {"order": 3}),
    "deis_1": ("DEISMultistepScheduler", {"solver_order": 1}, "deis", {"order": 1}),
    "deis_2": ("DEISMultistepScheduler", {"solver_order": 2}, "deis", {"order": 2}),
    "deis_3": ("DEISMultistepScheduler", {"solver_order": 3}, "deis", {"order": 3}),
    "heun": ("HeunDiscreteScheduler", EULER, "heun", {}),
    "lms": ("LMSDiscreteScheduler", EULER, "lms", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}, "pndm", {}),
}


@pytest.fixture(scope="module")
def sd15():
    return build("sd15")


def sd_pair(case, calls=CALLS):
    name, settings, sampler, options = SD_CASES[case]
    stock = getattr(diffusers, name)(**SD, **settings)
    stock.set_timesteps(calls)
    # these two end at alphas_cumprod[0], not at sigma = 0
    ends = {"final_sigmas_type": "sigma_min"} if name in ("DEISMultistepScheduler", "PNDMScheduler") else {}
    if case in ("heun", "pndm"):  # several calls on an interval: the same grid, and as many calls
        grid = {"grid": "leading", "grid_options": {"offset": 1}}
        ours = TableScheduler.from_config(stock.config, sampler=sampler, **grid, **ends)
        return stock, visiting(ours, num_inference_steps=len(stock.timesteps))
    ours = TableScheduler.from_config(stock.config, sampler=sampler, **options, **ends)
    return stock, visiting(ours, timesteps=stock.timesteps)


@pytest.mark.parametrize("case", SD_CASES)
def test_stable_diffusion(sd15, case):
    stock, ours = sd_pair(case)
    expected = trajectory(sd15, "sd15", stock)
    got = trajectory(sd15, "sd15", ours)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    assert worst(got[:-1], expected[:-1]) < 2e-6
    assert worst(got, expected) < TOLERANCE


def test_a_wrong_order_is_seen(sd15):
    """The comparison can fail: one order apart is a thousand times the tolerance."""
    expected = trajectory(sd15, "sd15", sd_pair("dpmpp_1")[0])
    got = trajectory(sd15, "sd15", sd_pair("dpmpp_2m")[1])
    assert worst(got, expected) > 1000 * TOLERANCE


# ---------------------------------------------------------------------- flow models
@pytest.mark.parametrize("calls", [4, 10])
@pytest.mark.parametrize("name", ["sd3", "flux", "qwen_image", "z_image"])
def test_flow_match_euler(name, calls):
    """SD3 passes N alone, for which FlowMatchEuler has a grid of its own; the others pass their sigmas."""
    pipe = build(name)
    stock = pipe.scheduler
    assert type(stock).__name__ == "FlowMatchEulerDiscreteScheduler"
    own = {"grid": "flow_stock"} if name == "sd3" else {}
    ours = TableScheduler.from_config(stock.config, sampler="ddim", **own)
    expected, got = (trajectory(pipe, name, scheduler, calls) for scheduler in (stock, ours))
    assert torch.allclose(ours.timesteps, stock.timesteps, rtol=1e-6)
    assert worst(got, expected) < TOLERANCE


WAN = {
    "unipc_1": ("UniPCMultistepScheduler", {"solver_order": 1}, "unipc", {"order": 1}),
    "unipc_2": ("UniPCMultistepScheduler", {"solver_order": 2}, "unipc", {"order": 2}),
    "unipc_3": ("UniPCMultistepScheduler", {"solver_order": 3}, "unipc", {"order": 3}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}, "dpmpp", {"order": 2}),
}


@pytest.mark.parametrize("case", WAN)
def test_wan(case):
    """The stock classes feed the model truncated timesteps; given their sigmas and timesteps, ours does so, too."""
    name, settings, sampler, options = WAN[case]
    pipe = build("wan")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    stock = getattr(diffusers, name)(**settings, **flow)
    expected = trajectory(pipe, "wan", stock)
    ours = TableScheduler.from_config(stock.config, sampler=sampler, shift=1.0, **options)
    got = trajectory(pipe, "wan", visiting(ours, sigmas=stock.sigmas[:-1], timesteps=stock.timesteps))
    assert worst(got, expected) < TOLERANCE


# ---------------------------------------------------------------------- other families
@pytest.mark.parametrize("name", ["sdxl", "pixart", "dit", "ddpm"])
def test_other_families_with_the_scheduler_they_came_with(name):
    pipe = build(name)
    samplers = {"sdxl": ("ddim", {}), "pixart": ("dpmpp", {"order": 2}), "dit": ("ddim", {}), "ddpm": ("ddim", {})}
    sampler, options = samplers[name]
    stock = (
        pipe.scheduler
        if name != "ddpm"
        else diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    )
    stock.set_timesteps(CALLS)
    ours = visiting(TableScheduler.from_config(stock.config, sampler=sampler, **options), timesteps=stock.timesteps)
    images = []
    for scheduler in (stock, ours):
        pipe.scheduler = scheduler
        images.append(torch.as_tensor(np.asarray(pipe(**call_kwargs(name, num_inference_steps=CALLS))[0])))
    assert worst(images[1:], images[:1]) < TOLERANCE


# ---------------------------------------------------------------------- where diffusers is not right
@pytest.mark.parametrize("case", ["unipc_2", "unipc_3", "pndm"])
def test_edits_between_calls_are_dropped_by_stock_and_kept_by_ours(case):
    """With predictions that do not depend on the state, an edit after call j must reach every later state by DDIM's
    own factor; the correctors of UniPC and PNDM's warm-up start again from a hidden copy of the sample."""
    generator = torch.Generator().manual_seed(0)
    x, delta = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    outputs = torch.randn(CALLS + 1, 1, 4, 8, 8, generator=generator)
    kept = []
    for which in (0, 1):
        final = []
        for edit in (0.0, 1.0):
            scheduler = sd_pair(case)[which]
            scheduler.set_timesteps(CALLS)
            alpha = scheduler.alphas_cumprod.double().sqrt()
            state = x
            for i, t in enumerate(scheduler.timesteps):
                node_alpha = alpha[int(t)]
                sigma = (1 - node_alpha**2).sqrt()
                # x0-predicting rows get an output whose x0 is fixed, noise-predicting rows one whose eps is
                fixed = outputs[i]
                output = fixed if case == "pndm" else ((state - node_alpha * fixed) / sigma).float()
                state = scheduler.step(output, t, state, return_dict=False)[0] + (edit * delta if i == 0 else 0.0)
                if i == 2:
                    break
            final.append(state)
        kept.append(float(((final[1] - final[0]) / delta).median()))
    steps = sd_pair(case)[1]
    steps.set_timesteps(CALLS)
    true = float(np.prod([row.a for row in steps.table.rows[1:3]]))
    assert kept[1] == pytest.approx(true, rel=1e-3)
    assert abs(kept[0] - true) > 0.05 * true
