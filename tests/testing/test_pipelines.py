"""Every tiny pipeline is the real thing: it runs, is deterministic, and its inputs matter."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from diffaccel.testing import pipelines
from diffaccel.testing.pipelines import build, call_kwargs, denoiser, known_region, names, picture, reference_config

STEPS = 4  # with the strength 0.75 of call_kwargs exactly three of them, however a pipeline rounds
FROM_A_PICTURE = [name for name in names() if "image" in call_kwargs(name)]


@contextmanager
def forwards(pipe) -> Iterator[list]:
    """The timesteps that the denoiser was called with, in order."""
    seen: list[float] = []

    def note(_, args, kwargs):
        t = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        seen.append(float(torch.as_tensor(t).flatten()[0]))

    handle = denoiser(pipe).register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def result(pipe, name: str, **changes) -> torch.Tensor:
    out = pipe(**call_kwargs(name, **{"num_inference_steps": STEPS, **changes}))[0]
    return torch.as_tensor(np.stack([np.asarray(x) for x in out]) if isinstance(out, list) else out)


@pytest.mark.parametrize("name", names())
def test_runs_and_is_deterministic(name):
    state = torch.get_rng_state()
    pipe = build(name)
    assert torch.equal(torch.get_rng_state(), state), "build touched the global random state"
    with forwards(pipe) as seen:
        first = result(pipe, name)
    # distinct values: PNDM calls twice at one timestep, Wan and Qwen-Image call once for each half of the guidance
    assert len(set(seen)) == STEPS * call_kwargs(name).get("strength", 1.0)
    assert torch.isfinite(first).all()
    assert first.std() > 0
    again = result(build(name), name)
    assert torch.equal(first, again)
    assert not torch.equal(first, result(pipe, name, seed=1))
    assert not torch.equal(first, result(build(name, seed=1), name))


@pytest.mark.parametrize("name", names())
def test_is_small_and_carries_the_published_scheduler_settings(name):
    pipe = build(name)
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert sum(p.numel() for module in modules for p in module.parameters()) < 400_000
    assert not any(module.training for module in modules)
    config = reference_config(name)
    assert config.items() <= dict(pipe.scheduler.config).items()
    config["num_train_timesteps"] = 1
    assert reference_config(name)["num_train_timesteps"] == 1000


@pytest.mark.parametrize("name", names())
def test_survives_saving_and_loading(name, tmp_path):
    pipe = build(name)
    before = result(pipe, name, num_inference_steps=2)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    after = result(loaded, name, num_inference_steps=2)
    assert torch.allclose(before, after, rtol=1e-5, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize("name", FROM_A_PICTURE)
def test_the_picture_matters(name):
    pipe = build(name)
    assert not torch.equal(result(pipe, name), result(pipe, name, image=picture(seed=3)))


@pytest.mark.parametrize("name", ["sd15_inpaint", "sdxl_inpaint"])
def test_inpainting_keeps_the_known_region(name):
    pipe = build(name)
    half = known_region(size=16).bool().expand(1, 4, -1, -1)
    one, other = (result(pipe, name, generator=torch.Generator().manual_seed(0), prompt=text) for text in ("a", "zzzz"))
    assert torch.equal(one[half], other[half])
    assert not torch.equal(one[~half], other[~half])


def test_base_hands_over_to_the_refiner():
    base, refiner = build("sdxl"), build("sdxl_refiner")
    with forwards(base) as high:
        latents = result(base, "sdxl", num_inference_steps=10, denoising_end=0.8)
    with forwards(refiner) as low:
        out = result(refiner, "sdxl_refiner", num_inference_steps=10, denoising_start=0.8, image=latents)
    assert len(high) + len(low) == 10
    assert min(high) >= 200 > max(low)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "wan", "qwen_image", "z_image", "pixart", "dit"])
def test_decodes_to_pixels_in_a_batch(name):
    if name == "dit":
        changes = {"class_labels": [1, 2, 3]}
    else:
        changes = {"prompt": ["a red fox", "a boat", "snow"]}
        changes |= {"negative_prompt": ["", "", ""]} if "negative_prompt" in call_kwargs(name) else {}
    pixels = result(build(name), name, num_inference_steps=2, output_type="np", **changes)
    assert len(pixels) == 3
    assert pixels.shape[-1] == 3
    assert 0 <= pixels.min() < pixels.max() <= 1


def test_calls_name_only_known_parameters():
    for name in names():
        assert call_kwargs(name).keys() <= inspect.signature(type(build(name)).__call__).parameters.keys(), name


def test_unknown_name_lists_the_known_ones():
    for function in (build, call_kwargs, reference_config):
        with pytest.raises(ValueError, match=r"unknown tiny pipeline 'sd16'; known: sd15, .*z_image"):
            function("sd16")


def test_generic_loader_finds_every_class_offline(tmp_path):
    """As a user loads it: DiffusionPipeline.from_pretrained of a folder, in a process of its own, without the hub."""
    build("qwen_image").save_pretrained(tmp_path)
    code = f"from diffusers import DiffusionPipeline as P; print(type(P.from_pretrained({str(tmp_path)!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "QwenImagePipeline"
    assert issubclass(type(build("qwen_image")), DiffusionPipeline)


def test_every_pipeline_has_a_call():
    assert set(pipelines._CALLS) == set(pipelines._BUILDERS)
