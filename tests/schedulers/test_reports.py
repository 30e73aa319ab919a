"""What users reported to diffusers, as tests of ours; the ids are numbers of its issues and pull requests.

Reports that have a file of their own: img2img at every (N, strength) (9366, 1866, 3116, 1867) and its first level
(7651) in test_begin, repeated timesteps (5687, 5746) and inconsistent ones (14461) in test_set_timesteps, threads
(3672, 5749, 7851, 9362, 9833) in test_threads, waiting for the device (11696, 9417, 9485, 13564, 14589, 14176) in
test_sync, edits in inpainting in test_edit. Here are the rest, and the same ones through real pipelines.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from scheduler_runs import PATHS, SD, cases, generator, loop, make, noise

from diffaccel import TableScheduler
from diffaccel.core.grid import GRIDS
from diffaccel.errors import OptionError, PathError
from diffaccel.testing.pipelines import build, call_kwargs, denoiser

X = noise(1, 4, 4, 4)
ON_ALL = sorted(set(GRIDS) - {"flow_stock", "flow_dpmpp", "ays", "listed", "by_calls"})
GRID_OF_PATH = [
    *((path, grid) for path in PATHS for grid in ON_ALL),
    *(("flow", grid) for grid in ("flow_stock", "flow_dpmpp")),
    *((path, "ays") for path in PATHS if path != "flow"),
]


FLOW = ("sd3", "flux", "wan", "qwen_image", "z_image")
SOURCES = {name: build(name).scheduler.config for name in (*FLOW, "sd15", "dit")}


def result(pipe, name, **changes):
    return torch.as_tensor(np.asarray(pipe(**call_kwargs(name, **changes))[0]))


# ---------------------------------------------------------------------- img2img through the pipelines
@pytest.mark.parametrize("calls", [1, 2, 3, 7, 20])
def test_img2img_pipeline_9366_1866_3116_1867(calls):
    pipe = build("sd15_img2img")
    pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="dpmpp", order=3)
    seen = []
    denoiser(pipe).register_forward_pre_hook(lambda _, args: seen.append(float(args[1])))
    for strength in (0.05, 0.35, 0.7, 1.0):
        seen.clear()
        out = result(pipe, "sd15_img2img", num_inference_steps=calls, strength=strength)
        begin = pipe.scheduler.begin_index  # with no call left, the picture itself comes back
        assert begin == calls - int(calls * strength)  # 7651: it begins at node t_start
        assert seen == pipe.scheduler.timesteps[begin:].tolist()
        assert torch.isfinite(out).all()


# ---------------------------------------------------------------------- repeated timesteps
def test_repeated_timesteps_in_a_pipeline_5687_5746():
    """As diffusers' Karras grids give them, whose values are rounded to training steps."""
    repeated = [999, 700, 700, 400, 100, 20, 20, 20]
    stock = DPMSolverMultistepScheduler(**SD, use_karras_sigmas=True)
    pipe = build("sd15")
    pipe.scheduler = TableScheduler.from_config(stock.config, sampler="unipc")
    seen = []
    denoiser(pipe).register_forward_pre_hook(lambda _, args: seen.append(float(args[1])))
    out = result(pipe, "sd15", timesteps=repeated, guidance_scale=1.0)
    assert seen == repeated
    assert torch.isfinite(out).all()
    distinct = sorted(set(repeated), reverse=True)
    assert torch.allclose(out, result(pipe, "sd15", timesteps=distinct, guidance_scale=1.0), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- residual noise
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("name", "options"), cases(variants=False), ids=lambda v: v if isinstance(v, str) else "")
def test_no_noise_is_left_5689(path, name, options):
    """The run ends at sigma = 0 by default, and its last row gives x0 itself."""
    scheduler = make(path, name, **options)
    for calls in (1, 2, 5):
        scheduler.set_timesteps(calls)
        x = X
        for t in scheduler.timesteps:
            x, x0 = scheduler.step(torch.tanh(x), t, x, generator=generator(), return_dict=False)
        assert scheduler.sigmas[-1] == 0
        end = scheduler.table.rows[-1]
        assert (end.next.alpha, end.next.sigma) == (1.0, 0.0)
        if end.node.t == scheduler.timesteps[-1] and end.opens:
            assert torch.allclose(x, x0, rtol=1e-5, atol=1e-5 * float(x0.abs().max()))


def test_stock_ddim_ends_above_zero_5689():
    """The complaint itself: SD's config ends DDIM at alphas_cumprod[0], a noise of 0.03; asked for, we do so too."""
    stock = DDIMScheduler(**SD, set_alpha_to_one=False)
    ours = TableScheduler.from_config(stock.config, sampler="ddim", final_sigmas_type="sigma_min")
    ours.set_timesteps(5)
    left = (1 - stock.final_alpha_cumprod).sqrt()
    assert ours.table.rows[-1].next.sigma == pytest.approx(float(left), rel=1e-3)
    assert TableScheduler.from_config(stock.config).config.final_sigmas_type == "zero"


# ---------------------------------------------------------------------- NaN
@pytest.mark.parametrize(("path", "grid"), GRID_OF_PATH)
def test_finite_for_every_number_of_calls_9007_10748_14213_5103(path, grid):
    """Order 3 to the end, inverse, squaredcos, zero SNR: each N, with samplers of order 3 in both spaces."""
    pytest.importorskip("scipy")
    for calls in range(1, 51):
        name, options = [("unipc", {"order": 3}), ("deis", {}), ("dpmpp", {"order": 3})][calls % 3]
        options = {**options, "lower_order_final": calls % 2 == 0}
        final = "sigma_min" if calls % 5 == 0 else "zero"
        scheduler = make(path, name, {"grid": grid, "final_sigmas_type": final}, **options)
        scheduler.set_timesteps(calls)
        out = loop(scheduler, X)
        assert torch.isfinite(out).all() and float(out.abs().max()) < 1e4, calls
        assert torch.isfinite(scheduler.timesteps).all() and len(scheduler.timesteps) == calls


@pytest.mark.parametrize("calls", [1, 2, 8])
def test_one_call_with_a_terminal_shift_14411(calls):
    """diffusers divides 0 by 0 at N = 1."""
    stock = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    scheduler = TableScheduler.from_config(stock.config, sampler="dpmpp")
    scheduler.set_timesteps(calls, mu=1.0)
    assert torch.isfinite(scheduler.sigmas).all() and torch.isfinite(loop(scheduler, X)).all()
    assert scheduler.sigmas[0] == 1
    if calls > 1:
        assert scheduler.sigmas[-2] == pytest.approx(0.1, rel=1e-6)


def test_an_epsilon_model_without_signal_is_an_error_5103():
    with pytest.raises(PathError, match="zero SNR needs v_prediction or sample"):
        TableScheduler.from_config(DDIMScheduler(**SD, rescale_betas_zero_snr=True).config)


# ---------------------------------------------------------------------- flow models from their config alone
@pytest.mark.parametrize(("name", "options"), cases(variants=False), ids=lambda v: v if isinstance(v, str) else "")
def test_every_sampler_on_flow_models_9607_9924_11907(name, options):
    """`pipe.scheduler.config` says enough: no flag by hand for SD3, FLUX or Wan; nor for SD 1.5 and DiT."""
    for model, source in SOURCES.items():
        scheduler = TableScheduler.from_config(source, sampler=name, **options)
        assert scheduler.config.path == ("flow" if model in FLOW else "vp")
        scheduler.set_timesteps(6, mu=0.8)
        assert torch.isfinite(loop(scheduler, X, generator=generator())).all()
        assert scheduler.step_index == 6


SOURCES = {
    name: build(name).scheduler.config for name in ("sd3", "flux", "wan", "qwen_image", "z_image", "sd15", "dit")
}


@pytest.mark.parametrize("name", ["sd3", "flux", "wan", "qwen_image", "z_image", "sdxl", "pixart", "dit"])
def test_one_line_swaps_the_scheduler_of_any_pipeline_9607(name):
    pipe = build(name)
    pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="unipc")
    out = result(pipe, name, num_inference_steps=3)
    assert pipe.scheduler.step_index == 3
    assert torch.isfinite(out).all()


def test_pixart_with_one_call():
    """It takes `[1]` of the result when N = 1, which its own DPM++ does not have."""
    pipe = build("pixart")
    pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config)
    assert torch.isfinite(result(pipe, "pixart", num_inference_steps=1)).all()


# ---------------------------------------------------------------------- inconsistent timesteps
def test_timesteps_of_flow_models_mean_their_own_sigma_14461():
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = TableScheduler.from_config(stock.config, sampler="ddim")
    ours.set_timesteps(timesteps=[1000.0, 600.0, 200.0])
    assert torch.allclose(ours.sigmas, torch.tensor([1.0, 0.6, 0.2, 0.0]))
    assert torch.allclose(ours.timesteps, 1000 * ours.sigmas[:-1])


# ---------------------------------------------------------------------- configs that say too little
def test_configs_that_prove_nothing_list_their_keys_3280_1674():
    with pytest.raises(PathError, match=r"keys stated: num_train_timesteps[\s\S]*keys missing: .*beta_schedule"):
        TableScheduler.from_config({"num_train_timesteps": 1000})
    with pytest.raises(PathError, match="IPNDMScheduler"):
        TableScheduler.from_config(IPNDMScheduler().config)
    with pytest.raises(OptionError, match=r"needs a config \(pipe.scheduler.config\), got UniPCMultistepScheduler"):
        TableScheduler.from_config(UniPCMultistepScheduler())


def test_deepfloyd_if_is_squaredcos_with_thresholding_3280():
    config = {
        "_class_name": "DDPMScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "epsilon",
        "num_train_timesteps": 1000,
        "thresholding": True,
        "sample_max_value": 1.5,
        "dynamic_thresholding_ratio": 0.95,
        "variance_type": "learned_range",
    }
    scheduler = TableScheduler.from_config(config, sampler="dpmpp_2m_sde")
    assert scheduler.config.beta_schedule == "squaredcos_cap_v2" and scheduler.config.thresholding
    assert scheduler.config["variance_type"] == "learned_range"  # the pipeline reads it and hands in 2C channels
    scheduler.set_timesteps(6)
    out = loop(scheduler, X, predict=lambda x, t: torch.cat([torch.tanh(x), x], 1), generator=generator())
    assert out.shape == X.shape and float(out.abs().max()) <= 1 + 1e-6


# ---------------------------------------------------------------------- compiled denoisers
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_one_graph_for_runs_of_different_length_11085_3286_5453(name):
    """`timesteps` iterates to 0-d tensors of one dtype, and states keep theirs: nothing is compiled again."""
    pipe = build(name)
    pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="dpmpp")
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    module = denoiser(pipe)
    eager = {n: result(pipe, name, num_inference_steps=n) for n in (4, 3)}
    module.forward = torch.compile(module.forward, backend=backend, fullgraph=True)
    for n, expected in eager.items():
        assert torch.allclose(result(pipe, name, num_inference_steps=n), expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
