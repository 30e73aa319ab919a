"""`patch_parallel` on tiny pipelines, with emulated ranks."""

from __future__ import annotations

import functools
import logging
import re
from pathlib import Path

import pytest
import torch
from diffusers import FirstBlockCacheConfig

import diffaccel
from diffaccel.errors import OptionError
from diffaccel.parallel.protocol import SoloWorld
from diffaccel.parallel.world_emulated import EmulatedWorld
from diffaccel.testing.pipelines import build, call_kwargs

NAMES = (
    "sd15", "sd15_img2img", "sd15_inpaint", "sd15_inpaint_9ch", "sd15_controlnet", "sdxl", "sdxl_img2img",
    "sdxl_inpaint", "sdxl_refiner", "sdxl_controlnet", "sd3", "sd3_img2img", "flux", "flux_img2img", "ddpm",
)  # fmt: skip


@functools.cache
def pipeline(name):
    return build(name)


def images(pipe, name, **changes) -> torch.Tensor:
    return torch.as_tensor(pipe(**call_kwargs(name, **changes)).images)


def error(got, want) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_synchronous_ranks_make_the_image_of_one_process(name):
    pipe = pipeline(name)
    want = images(pipe, name)
    for ranks, guidance in ((3, "patches"), (4, "auto")):
        with diffaccel.patch_parallel(pipe, "sync", guidance=guidance, world=EmulatedWorld(ranks)) as h:
            assert h.pipe is pipe
            assert error(images(h, name), want) < 1e-5
            assert h.report().late == 0
    assert torch.equal(images(pipe, name), want)


@pytest.mark.parametrize("name", ["sd15", "sdxl_controlnet", "sd3", "flux"])
@pytest.mark.parametrize("mode", ["displaced", "partial", "fresh_halo"])
def test_late_modes_are_near_the_image_of_one_process_and_repeat(name, mode):
    pipe = pipeline(name)
    want = images(pipe, name, num_inference_steps=6)
    with diffaccel.patch_parallel(pipe, mode, warmup=2, guidance="patches", world=EmulatedWorld(2)) as h:
        first, second = (images(h, name, num_inference_steps=6) for _ in range(2))
        report = h.report()
    assert torch.equal(first, second)
    assert 1e-6 < error(first, want) < 0.1
    calls = 7 if name == "sd15" else 6  # PNDM calls twice at its second timestep
    assert (report.calls, report.late, report.ranks, report.mode) == (calls, 4, 2, mode)
    assert f"{mode} on 2 rank(s): {calls} calls, 4 of them with late messages" in str(report)


def test_one_process_is_left_alone_and_told_so(caplog):
    pipe = pipeline("sdxl")
    want = images(pipe, "sdxl")
    with (
        caplog.at_level(logging.WARNING, "diffaccel"),
        diffaccel.patch_parallel(pipe, "displaced") as h,
    ):
        assert isinstance(h.world, SoloWorld)
        assert not any(hasattr(m, "_diffusers_hook") for m in pipe.unet.modules())
        assert torch.equal(images(h, "sdxl"), want)
        assert "nothing is shared" in h.explain(32, 32) and h.report().calls == 0
    assert "torchrun --nproc-per-node P" in caplog.text


def test_the_next_image_may_have_another_size_prompt_and_number():
    pipe = pipeline("sd15")
    settings = ({}, {"height": 48}, {"num_images_per_prompt": 2}, {"prompt": "a blue dog"}, {"guidance_scale": 1.0})
    with diffaccel.patch_parallel(pipe, "sync", world=EmulatedWorld(2)) as h:
        got = [images(h, "sd15", num_inference_steps=2, **changes) for changes in settings]
    for x, changes in zip(got, settings, strict=True):
        assert error(x, images(pipe, "sd15", num_inference_steps=2, **changes)) < 1e-5


def test_without_a_generator_the_global_seed_of_rank_0_decides():
    pipe, found = pipeline("sd15"), []
    with diffaccel.patch_parallel(pipe, "sync", world=EmulatedWorld(2)) as h:
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(images(h, "sd15", num_inference_steps=1, generator=None))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_wrapping_twice_and_beside_a_cache_is_refused():
    pipe = build("flux")
    with (
        diffaccel.patch_parallel(pipe, world=EmulatedWorld(2)),
        pytest.raises(OptionError, match=r"wrapped by 'patch_parallel.*' already"),
    ):
        diffaccel.patch_parallel(pipe, world=EmulatedWorld(2))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(OptionError, match="remembers earlier calls"):
        diffaccel.patch_parallel(pipe, world=EmulatedWorld(2))


def test_new_modules_after_wrapping_are_refused():
    pipe = build("sd15")
    with diffaccel.patch_parallel(pipe, "sync", world=EmulatedWorld(2)) as h:
        pipe.unet.mid_block.more = torch.nn.Conv2d(1, 1, 3)
        with pytest.raises(OptionError, match="changed since it was wrapped"):
            images(h, "sd15")


def test_costs_are_told_before_a_run():
    with diffaccel.patch_parallel(pipeline("sd15"), "partial", guidance="patches", world=EmulatedWorld(4)) as h:
        text = h.explain(64, 64, seconds=0.1)
        found = h.costs(64, 64, ranks=2)
    assert "4 ranks, 1 group(s)" in text and "a model, not a measurement" in text
    assert len(found.bytes) == 2 and found.bytes[0]["attn"] < found.sync_bytes[0]["attn"]
    with diffaccel.patch_parallel(pipeline("flux"), "sync", world=EmulatedWorld(2)) as h:
        assert "Ulysses" in h.explain(64, 64, batch=1)


def test_only_the_worlds_know_torch_distributed():
    root = Path(diffaccel.__file__).parent
    files = [f for room in ("parallel", "pipelines", "denoiser") for f in (root / room).glob("*.py")]
    uses = {f.name for f in files if re.search(r"torch\.distributed\b(?! )|accelerate import", f.read_text("utf-8"))}
    assert uses == {"world.py", "mail.py", "ulysses.py"}  # the last hands a device mesh to diffusers
