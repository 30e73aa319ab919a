"""Policies: clipping and dynamic thresholding of the x0-prediction, as diffusers does them, and off unless asked."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from scheduler_runs import SD, loop, make, noise, sampled

from diffaccel import TableScheduler
from diffaccel.errors import OptionError
from diffaccel.schedulers.policy import dynamic_threshold

X = noise(2, 3, 8, 8)
SD_BETAS = {k: v for k, v in SD.items() if k != "prediction_type"}
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def wild(x, t):
    """An eps-prediction that is wrong enough for x0 to leave [-1, 1]."""
    return 0.7 * torch.sin(3 * x) + 0.1 * x


def stock_run(scheduler, calls):
    scheduler.set_timesteps(calls)
    x = X
    for t in scheduler.timesteps:
        x = scheduler.step(wild(x, t), t, x).prev_sample
    return x


def ours(stock, **options):
    """Our scheduler at the timesteps of a run of `stock`."""
    made = TableScheduler.from_config(stock.config, **options)
    made.set_timesteps(timesteps=stock.timesteps)
    return made


def close(a, b):
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max())), float((a - b).abs().max())


@pytest.mark.parametrize("limit", [1.0, 0.6])
def test_clip_sample_equals_ddim(limit):
    stock = DDIMScheduler(**LINEAR, clip_sample=True, clip_sample_range=limit, set_alpha_to_one=True)
    stock.set_timesteps(10)
    x = y = X
    scheduler = ours(stock, sampler="ddim", clip_sample=True, clip_sample_range=limit)
    for t in stock.timesteps:
        x = scheduler.step(wild(x, t), t, x)[0]
        # DDIM derives eps from the clipped x0 only if it is told to; ours always does, so that the level is kept
        y = stock.step(wild(y, t), t, y, use_clipped_model_output=True).prev_sample
    close(x, y)
    assert float(x.abs().max()) <= limit + 1e-6
    close_without = stock_run(DDIMScheduler(**LINEAR, clip_sample=False, set_alpha_to_one=True), 10)
    assert not torch.allclose(x, close_without, atol=1e-2)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("largest", [1.0, 1.5])
def test_thresholding_equals_dpmpp(order, largest):
    policy = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": largest}
    stock = DPMSolverMultistepScheduler(**LINEAR, solver_order=order, **policy)
    y = stock_run(stock, 8)
    stock.set_timesteps(8)
    x = loop(ours(stock, sampler="dpmpp", order=order), X, predict=wild)
    close(x, y)
    free = loop(ours(stock, sampler="dpmpp", order=order, thresholding=False), X, predict=wild)
    assert not torch.allclose(x, free, atol=1e-2)


def test_thresholding_equals_unipc():
    stock = UniPCMultistepScheduler(**LINEAR, solver_order=2, thresholding=True, dynamic_thresholding_ratio=0.95)
    y = stock_run(stock, 8)
    stock.set_timesteps(8)
    close(loop(ours(stock, sampler="unipc", order=2), X, predict=wild), y)


@pytest.mark.parametrize("sampler", ["dpmpp", "unipc", "deis", "heun", "ddim"])
@pytest.mark.parametrize("path", ["sd15", "flow"])
def test_policies_bind_every_sampler(sampler, path):
    free = sampled(make(path, sampler), X, 7, predict=wild)
    clipped = sampled(make(path, sampler, {"clip_sample": True, "clip_sample_range": 0.5}), X, 7, predict=wild)
    limited = sampled(
        make(path, sampler, {"thresholding": True, "dynamic_thresholding_ratio": 0.8}), X, 7, predict=wild
    )
    assert float(free.abs().max()) > 1.0  # otherwise this test tests nothing
    assert float(clipped.abs().max()) <= 0.5 + 1e-6
    assert float(limited.abs().max()) <= 1.0 + 1e-6


def test_each_image_has_its_own_threshold():
    apply = dynamic_threshold(0.9, 10.0)
    both = torch.stack([X[0], 5 * X[1]])
    assert torch.equal(apply(both), torch.cat([apply(both[:1]), apply(both[1:])]))
    small = 0.2 * torch.tanh(X)
    assert torch.equal(apply(small), small)  # the range is at least 1


# ---------------------------------------------------------------------- off unless explicit
def test_defaults_of_a_class_are_not_a_wish():
    """DDIM's and DDPM's `clip_sample=True` is a default; on latents it would ruin the image."""
    for stock in (DDIMScheduler(**SD_BETAS), DDPMScheduler(**SD_BETAS)):
        assert stock.config.clip_sample
        assert not TableScheduler.from_config(stock.config).config.clip_sample
    said = DDIMScheduler(**SD_BETAS, clip_sample=False)
    assert not TableScheduler.from_config(said.config).config.clip_sample
    explicit = DDIMScheduler(**SD_BETAS, thresholding=True)
    assert TableScheduler.from_config(explicit.config).config.thresholding


def test_both_at_once_are_refused():
    with pytest.raises(OptionError, match="thresholding and clip_sample are both on"):
        make(settings={"thresholding": True, "clip_sample": True})
    with pytest.raises(OptionError, match="thresholding and clip_sample are both on"):
        TableScheduler.from_config(DDIMScheduler(**SD_BETAS).config, thresholding=True, clip_sample=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_sample": True, "clip_sample_range": 0.0}, "clip_sample_range must be positive"),
        ({"thresholding": True, "dynamic_thresholding_ratio": 1.5}, r"ratio in \(0, 1\]"),
        ({"thresholding": True, "sample_max_value": 0.5}, "sample_max_value of 1 or more"),
    ],
    ids=str,
)
def test_bad_limits(settings, message):
    with pytest.raises(OptionError, match=message):
        make(settings=settings)
