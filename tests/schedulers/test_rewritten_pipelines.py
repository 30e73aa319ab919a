"""Stock pipelines with rewriters and policies: N calls at the denoiser, img2img and inpainting begin in the middle."""

from __future__ import annotations

import pytest
import torch

import diffaccel as da
from diffaccel.compare import counted
from diffaccel.errors import OptionError
from diffaccel.testing.pipelines import build, call_kwargs

N = 12
TEXT = ["sd15", "sdxl", "sd3", "flux"]
PARTS = {
    "restart": {"rewrite": [da.restart([(3, 1, 1.0, 3.0)])]},
    "scaled momentum": {"rewrite": [da.momentum(0.7), da.epsilon_scale(1.01, below=5.0)]},
    "time_shift": {"sampler": "ddim"},
}


def pipeline(name, part):
    pipe = build(name)
    pipe.set_progress_bar_config(disable=True)
    options = dict(PARTS[part])
    if part == "time_shift":
        flow = "shift" in pipe.scheduler.config and "beta_start" not in pipe.scheduler.config
        shift = {"window_lam": 0.3, "cutoff_lam": 2.0} if flow else {"window": 60, "cutoff": 100}
        options["policy"] = [da.time_shift(**shift)]
    pipe.scheduler = da.TableScheduler.from_config(pipe.scheduler.config, **options)
    kwargs = call_kwargs(name) | {"num_inference_steps": N, "generator": torch.Generator().manual_seed(0)}
    return pipe, kwargs


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", TEXT)
def test_text_to_image(name, part):
    pipe, kwargs = pipeline(name, part)
    with counted(pipe) as count:
        images = torch.as_tensor(pipe(**kwargs).images)
    assert count.calls == N and images.isfinite().all()
    plain = da.TableScheduler.from_config(pipe.scheduler.config, rewrite=[], policy=[])
    pipe.scheduler = plain
    kwargs["generator"].manual_seed(0)
    assert not torch.equal(torch.as_tensor(pipe(**kwargs).images), images)  # the part has an effect


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["sd15_img2img", "sdxl_refiner", "flux_img2img"])
@pytest.mark.parametrize("strength", [0.2, 0.5, 0.9])
def test_image_to_image(name, part, strength):
    """As many calls as the pipeline takes of N; where a segment would go above the start, an error before any."""
    pipe, kwargs = pipeline(name, part)
    with counted(pipe) as count:
        try:
            images = torch.as_tensor(pipe(**kwargs | {"strength": strength}).images)
        except OptionError as error:
            assert part == "restart" and "throw the image away" in str(error)
            assert count.calls == 0
            return
    assert images.isfinite().all()
    assert count.calls == len(pipe.scheduler.timesteps) - pipe.scheduler.begin_index < N


def test_inpainting_keeps_what_is_known():
    pipe, kwargs = pipeline("sd15_inpaint", "restart")
    kwargs["strength"] = 1.0
    with counted(pipe) as count:
        images = torch.as_tensor(pipe(**kwargs).images)
    assert count.calls == N and images.isfinite().all()
