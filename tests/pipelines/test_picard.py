"""`paradigms` on stock pipelines: the sequential result, counted at the denoiser, and every refusal."""

from __future__ import annotations

import threading

import pytest
import torch
from diffusers import EDMEulerScheduler, FirstBlockCacheConfig

import diffaccel as da
from diffaccel.errors import OptionError, RunError
from diffaccel.pipelines.picard import PIPELINES, paradigms
from diffaccel.schedulers import TableScheduler
from diffaccel.testing import pipelines as tiny

NAMES = [
    "sd15", "sd15_img2img", "sdxl", "sdxl_img2img", "sd3", "sd3_img2img", "flux", "flux_img2img", "qwen_image", "wan",
]  # fmt: skip
CALLS = 8


def built(name, sampler="dpmpp", **options):
    pipe = tiny.build(name)
    pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler=sampler, **options)
    return pipe


def latents(call, name, **changes):
    torch.manual_seed(5)  # SD3, FLUX and Wan give the scheduler no generator
    out = call(**tiny.call_kwargs(name, num_inference_steps=CALLS, **changes))
    return out.frames if hasattr(out, "frames") else out.images


class Counter:
    """Counts the calls that really run, inside the denoiser, and the images in each."""

    def __init__(self, pipe):
        self.sizes = []
        inside = tiny.denoiser(pipe)
        parts = dict(inside.named_children())
        first = next(parts[n] for n in ("conv_in", "x_embedder", "pos_embed") if n in parts)
        first.register_forward_pre_hook(lambda module, args: self.sizes.append(len(args[0])))


@pytest.mark.parametrize("sampler", ["dpmpp", "ddpm"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_plain_run(name, sampler):
    """tol = 0: the plain run of the same seed, to rounding; afterwards the pipeline is what it was."""
    pipe = built(name, sampler)
    before, scheduler = latents(pipe, name), pipe.scheduler
    with paradigms(pipe, window=3, tol=0) as h:
        inside, report = latents(h, name), h.report()
    after = latents(pipe, name)
    assert torch.allclose(inside, before, rtol=0, atol=2e-6 * float(before.abs().max()))
    assert torch.equal(after, before)
    assert pipe.scheduler is scheduler
    assert report.complete and report.sweeps <= report.rows


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_calls_are_counted_at_the_denoiser(name):
    pipe = built(name, "ddim")
    with paradigms(pipe, window=4, tol=0.3) as h:
        counter = Counter(pipe)
        latents(h, name)
        report = h.report()
    copies = 1 if name == "flux" else 2  # guidance
    assert [n // copies for n in counter.sizes] == [s.rows for s in report.work.sweeps]
    assert report.sweeps == len(counter.sizes) < CALLS
    assert report.calls == sum(counter.sizes) // copies >= CALLS
    assert report.work.sweeps[0].rows == 1


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "qwen_image"])
def test_batches_of_images(name):
    """Two prompts with two images each; the windows of all go through the denoiser together."""
    pipe = built(name)
    kwargs = {"num_images_per_prompt": 2, "prompt": ["a red fox", "a blue bird"]}
    if name == "qwen_image":
        kwargs["negative_prompt"] = [" ", " "]
    plain = latents(pipe, name, **kwargs)
    with paradigms(pipe, window=3, tol=0) as h:
        ours = latents(h, name, **kwargs)
    assert len(ours) == 4
    assert torch.allclose(ours, plain, rtol=0, atol=2e-6 * float(plain.abs().max()))


def test_edm_inputs_are_scaled_for_each_row():
    pipe = tiny.build("sd15")
    pipe.scheduler = TableScheduler.from_config(EDMEulerScheduler().config, sampler="dpmpp")
    plain = latents(pipe, "sd15")
    with paradigms(pipe, window=4, tol=0) as h:
        ours = latents(h, "sd15")
    assert torch.allclose(ours, plain, rtol=0, atol=2e-6 * float(plain.abs().max()))


def test_guidance_rescale_is_per_image():
    pipe = built("sdxl")
    plain = latents(pipe, "sdxl", guidance_rescale=0.7)
    with paradigms(pipe, window=4, tol=0) as h:
        ours = latents(h, "sdxl", guidance_rescale=0.7)
    assert torch.allclose(ours, plain, rtol=0, atol=2e-6 * float(plain.abs().max()))


def test_half_precision():
    """The state between calls is float32, so a bfloat16 pipeline is followed closely, and stays bfloat16."""
    pipe = built("flux").to(torch.bfloat16)
    plain = latents(pipe, "flux")
    with paradigms(pipe, window=4, tol=0.01) as h:
        ours = latents(h, "flux")
    assert ours.dtype == torch.bfloat16
    assert (ours - plain).abs().max() < 0.05 * plain.abs().max()


def test_rewritten_samplers():
    """A row that scales the noise prediction is linear too."""
    pipe = built("sd15", "ddim", rewrite=[da.epsilon_scale(1.02)])
    plain = latents(pipe, "sd15")
    with paradigms(pipe, window=4, tol=0) as h:
        ours = latents(h, "sd15")
    assert torch.allclose(ours, plain, rtol=0, atol=2e-6 * float(plain.abs().max()))


def test_tolerance_saves_sweeps():
    pipe = built("sd3", "ddim")
    plain, found = latents(pipe, "sd3"), {}
    for tol in (0.0, 0.02, 0.2):
        with paradigms(pipe, tol=tol) as h:
            out = latents(h, "sd3")
            found[tol] = (h.report().sweeps, float((out - plain).pow(2).mean().sqrt()))
    sweeps, errors = zip(*found.values(), strict=True)
    assert sweeps[0] > sweeps[1] > sweeps[2]
    assert errors[0] < 1e-5 and errors[1] < 0.02 and errors[2] < 0.2


def test_images_come_out():
    pipe = built("sd15")
    with da.paradigms(pipe, window=4) as h:
        image = latents(h, "sd15", output_type="pil")[0]
    assert image.size == (32, 32)


def test_callbacks_see_every_iteration():
    seen = []
    pipe = built("sd3")

    def callback(pipe, i, t, kwargs):
        seen.append(kwargs["latents"].shape)
        return {}

    with paradigms(pipe, window=4, tol=0.3) as h:
        latents(h, "sd3", callback_on_step_end=callback)
    assert len(seen) == CALLS and len(set(seen)) == 1


def test_a_callback_that_edits_is_refused():
    pipe = built("sd3")

    def callback(pipe, i, t, kwargs):
        return {"latents": kwargs["latents"] * 1.1}

    with paradigms(pipe, window=4) as h, pytest.raises(RunError, match="a callback changed it"):
        latents(h, "sd3", callback_on_step_end=callback)


def test_threads():
    """Runs of several threads on one wrapped pipeline do not see each other."""
    pipe = built("flux")
    prompt, pooled, _ = pipe.encode_prompt("a red fox", "a red fox", max_sequence_length=16)  # not made for threads
    given = {"prompt": None, "prompt_embeds": prompt, "pooled_prompt_embeds": pooled}
    with paradigms(pipe, window=4, tol=0.05) as h:
        serial = [latents(h, "flux", seed=s, **given) for s in range(4)]
        found = {}
        threads = [
            threading.Thread(target=lambda s=s: found.update({s: latents(h, "flux", seed=s, **given)}))
            for s in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.allclose(found[s], serial[s], atol=1e-5) for s in range(4))


def test_report():
    pipe = built("sd15", "ddim")
    with paradigms(pipe, window=4) as h:
        with pytest.raises(RunError, match="no run was begun"):
            h.report()
        latents(h, "sd15")
        report = h.report()
    assert report.rows == CALLS and report.window == 4
    assert report.seconds > 0 and report.seconds_scan > 0
    assert report.predicted(1) == pytest.approx(report.seconds)
    assert report.predicted(4) < report.predicted(2) < report.seconds
    assert "measured on this device" in str(report) and "predicted on 4 devices" in str(report)


# ---------------------------------------------------------------------- refusals
def test_a_stock_scheduler_is_refused():
    with pytest.raises(OptionError, match="has none; set pipe"):
        paradigms(tiny.build("sd15"))


@pytest.mark.parametrize("name", ["sd15_inpaint_9ch", "sd15_controlnet", "dit", "z_image"])
def test_other_pipelines_are_refused(name):
    pipe = built(name)
    assert type(pipe).__name__ not in PIPELINES
    with pytest.raises(OptionError, match=f"{type(pipe).__name__} is not supported"):
        paradigms(pipe)


POLICIES = [{"thresholding": True}, {"clip_sample": True}, {"policy": [da.time_shift(window=40, cutoff=300)]}]


@pytest.mark.parametrize("option", POLICIES, ids=["thresholding", "clip", "time_shift"])
def test_policies_are_refused(option):
    with pytest.raises(OptionError, match="no linear solve can foresee"):
        paradigms(built("sd15", "ddim", **option))


def test_caches_are_refused():
    pipe = built("flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(OptionError, match="remembers earlier calls"):
        paradigms(pipe)


@pytest.mark.parametrize(("name", "value"), [("denoising_end", 0.8), ("skip_guidance_layers", [0])])
def test_arguments_are_refused(name, value):
    with paradigms(built("sdxl")) as h, pytest.raises(OptionError, match=f"{name} is refused"):
        h("a fox", **{name: value})


def test_wrapping_twice_is_refused():
    pipe = built("sd15")
    with paradigms(pipe), pytest.raises(OptionError, match="wrapped by 'paradigms' already"):
        paradigms(pipe)
    paradigms(pipe).remove()


def test_a_scheduler_put_in_between_is_not_lost():
    pipe = built("sd15")
    h = paradigms(pipe)
    ours, pipe.scheduler = pipe.scheduler, tiny.build("sd15").scheduler
    with pytest.raises(RunError, match="was replaced"):
        h.remove()
    pipe.scheduler = ours
    h.remove()
    h.remove()


def test_a_run_that_is_cut_short_says_so():
    pipe = built("sd3", "ddim")
    with paradigms(pipe, window=2, tol=0) as h:

        def callback(pipe, i, t, kwargs):
            pipe._interrupt = i >= 2
            return {}

        latents(h, "sd3", callback_on_step_end=callback)
        assert not h.report().complete and "INCOMPLETE" in str(h.report())


def test_bad_options_are_refused_at_once():
    with pytest.raises(OptionError, match="window is a number of rows"):
        paradigms(built("sd15"), window=0)
