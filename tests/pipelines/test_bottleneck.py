"""`bottleneck` on six stock pipelines: sizes, determinism, batches, receipts, refusals."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from diffusers import DiffusionPipeline
from torch.utils.flop_counter import FlopCounterMode

import diffaccel as da
from diffaccel.errors import OptionError, RunError
from diffaccel.pipelines.bottleneck import LAYOUTS, bottleneck
from diffaccel.schedulers import TableScheduler
from diffaccel.testing import pipelines as tiny

NAMES = ["sd15", "sdxl", "sd3", "flux", "qwen_image", "wan"]
HLH = [da.Stage(1, 2, t_end=0.85), da.Stage(0.5, 3, t_end=0.4), da.Stage(1, 2)]
LH = [da.Stage(0.5, 3, t_end=0.6), da.Stage(1, 2)]
SIZE = {"height": 48, "width": 64}
SIZES = {"wan": {"height": 64, "width": 96}}
ON_PACKED = ("flux", "qwen_image")


def wrapped(pipe, stages=HLH, **options):
    return bottleneck(pipe, stages, on_small="warn", **options)


def latents(call, name, calls=None, **changes):
    kwargs = tiny.call_kwargs(name, num_inference_steps=calls or 0, **(SIZES.get(name, SIZE) | changes))
    if calls is None:
        del kwargs["num_inference_steps"]
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "smaller than the model is known to draw"
        out = call(**kwargs)
    return out.frames if hasattr(out, "frames") else out.images


@pytest.mark.parametrize("stages", [HLH, LH], ids=["high-low-high", "low-high"])
@pytest.mark.parametrize("name", NAMES)
def test_stock_pipelines(name, stages):
    """Right size, finite, bitwise repeatable; afterwards the pipeline is what it was."""
    pipe = tiny.build(name)
    plain, scheduler = latents(pipe, name, 5), pipe.scheduler
    with wrapped(pipe, stages) as h:
        out, report = latents(h, name), h.report()
        assert torch.equal(latents(h, name), out)
    assert "forward" not in vars(tiny.denoiser(pipe))
    assert out.shape == plain.shape and torch.isfinite(out).all()
    assert torch.equal(latents(pipe, name, 5), plain) and pipe.scheduler is scheduler
    sizes, full = [s.size for s in report.stages], report.stages[-1].size
    assert report.complete and report.calls == sum(s.steps for s in stages)
    assert all((size == full) == (stage.scale == 1) for size, stage in zip(sizes, stages, strict=True))
    assert report.step_equivalents < report.calls
    if name in ON_PACKED:
        branches = 2 if name == "qwen_image" else 1  # true guidance calls twice
        assert report.rewritten == 3 * branches


@pytest.mark.parametrize("name", NAMES)
def test_an_image_in_a_batch_is_the_image_alone(name):
    prompts = ["a red fox", "a blue bird"]
    more = {"negative_prompt": [" ", " "]} if name in ("qwen_image",) else {}
    more |= {"negative_prompt": ["", ""]} if name == "wan" else {}
    generators = [torch.Generator().manual_seed(i) for i in (5, 6)]
    with wrapped(tiny.build(name)) as h:
        both = latents(h, name, prompt=prompts, generator=generators, **more)
        alone = latents(h, name, prompt=prompts[1], generator=torch.Generator().manual_seed(6))
    scale = float(alone.abs().max())
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5 * max(1.0, scale))


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_the_picture_of_the_seed_is_kept(name):
    """Low-first runs begin with the block of the full-size noise, given or drawn."""
    pipe = tiny.build(name)
    shape = {"sd15": (1, 4, 24, 32), "sd3": (1, 4, 24, 32), "flux": (1, 192, 16)}[name]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if name == "flux":
        drawn = torch.randn(1, 4, 24, 32, generator=torch.Generator().manual_seed(0))
        noise = pipe._pack_latents(drawn, 1, 4, 24, 32)
    with wrapped(pipe, LH) as h:
        given = latents(h, name, latents=noise)
        drawn = latents(h, name, generator=torch.Generator().manual_seed(0))
        assert not any(s.drew for s in h.report().switches)
    assert torch.equal(given, drawn)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan"])
def test_callbacks_see_the_size_of_each_stage(name):
    seen = []

    def callback(pipe, i, t, kwargs):
        seen.append(kwargs["latents"].shape[1 if name == "flux" else -1])
        return {}

    with wrapped(tiny.build(name)) as h:
        latents(h, name, callback_on_step_end=callback)
    large, small = seen[0], seen[2]
    assert seen == [large, small, small, small, large, large, large] or len(seen) == 7
    assert seen[-1] == seen[0] and small < large


@pytest.mark.parametrize(
    ("name", "size"),
    [("sd15", (40, 56)), ("sd15", (56, 72)), ("sd3", (34, 50)), ("flux", (36, 52)), ("flux", (44, 60))],
)
def test_sizes_that_do_not_divide(name, size):
    pipe = tiny.build(name)
    plain = latents(pipe, name, 4, height=size[0], width=size[1])
    with wrapped(pipe) as h:
        out = latents(h, name, height=size[0], width=size[1])
    assert out.shape == plain.shape and torch.isfinite(out).all()


def test_a_size_that_changes_the_aspect():
    with wrapped(tiny.build("flux")) as h, pytest.raises(OptionError, match="another aspect by"):
        latents(h, "flux", height=20, width=28)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "wan"])
def test_images_come_out(name):
    with wrapped(tiny.build(name)) as h:
        out = latents(h, name, output_type="pil")
    image = out[0][0] if name == "wan" else out[0]
    size = SIZES.get(name, SIZE)
    assert image.size == (size["width"], size["height"])


def test_presets():
    for preset, calls in (("bottleneck-3x", 25), ("spectral-hlh", 25), ("few-4", 4), ("few-8", 8)):
        with wrapped(tiny.build("sd3"), preset) as h:
            out = latents(h, "sd3")
            assert torch.isfinite(out).all() and h.report().calls == calls
    with wrapped(tiny.build("sd3"), "spectral-lh", calls=6, spectrum="flux") as h:
        latents(h, "sd3")
        report = h.report()
        assert report.calls == 6 and report.switches[0].missing == pytest.approx(0.01, rel=1e-4)


def test_a_preset_fits_a_grid_that_starts_late():
    """SDXL's leading grid starts at flow time 0.9: the first stage ends at 0.97 of that."""
    pipe = tiny.build("sdxl")
    with wrapped(pipe, "spectral-hlh", calls=10) as h:
        latents(h, "sdxl")
        first = h.report().stages[0].times
    assert first[-1] == pytest.approx(0.97 * first[0]) and first[0] < 0.95


@pytest.mark.parametrize("name", ["sd15", "flux", "sd3"])
def test_work_is_what_the_flop_counter_counts(name):
    """step_equivalents of the receipt against all FLOPs of the denoiser in the run, to 2 %."""
    pipe = tiny.build(name)
    model, spent = tiny.denoiser(pipe), []
    with wrapped(pipe) as h:
        latents(h, name)
        report = h.report()
        inner = model.forward

        def counted(*args, **kwargs):
            with FlopCounterMode(display=False) as counter:
                out = inner(*args, **kwargs)
            state = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
            spent.append((counter.get_total_flops(), state.shape))
            return out

        model.forward = counted
        latents(h, name)
        model.forward = inner
    assert len(spent) == report.calls
    assert sum(f for f, _ in spent) / spent[-1][0] == pytest.approx(report.step_equivalents, rel=0.02)
    assert report.plain_calls == round(report.step_equivalents)


def test_report_in_words():
    with wrapped(tiny.build("sd3"), spectrum="flux", fill="white") as h:
        with pytest.raises(RunError, match="no run was begun"):
            h.report()
        latents(h, "sd3")
        text = str(h.report())
    assert "stage 1: 12x16, 3 calls" in text and "compare with a plain run of" in text
    assert "new band white (fresh noise), predicted missing power" in text


@pytest.mark.parametrize("name", ON_PACKED)
def test_positions_of_a_small_stage_are_those_of_a_small_run(name):
    """What the position embedding is given in the half-size stage, against a stock run of that size."""
    seen = []
    pipe = tiny.build(name)
    tiny.denoiser(pipe).pos_embed.register_forward_pre_hook(
        lambda m, args, kw: seen.append((args, kw)), with_kwargs=True
    )
    latents(pipe, name, 1, height=24, width=32)
    small = seen[0]
    seen.clear()
    with wrapped(pipe) as h:
        latents(h, name)
    staged = seen[len(seen) * 2 // 7]  # of 2 + 3 + 2 calls the third
    assert str(staged) == str(small) and str(seen[0]) != str(small)


def test_microcond():
    """SDXL's target size follows the stage if asked to, and only then."""
    seen = {}
    for microcond in ("keep", "target"):
        pipe = tiny.build("sdxl")
        inner = pipe.unet.add_embedding
        rows = seen.setdefault(microcond, [])
        inner.register_forward_pre_hook(lambda m, args, rows=rows: rows.append(args[0].clone()))
        with wrapped(pipe, microcond=microcond) as h:
            latents(h, "sdxl")
            assert h.report().rewritten == (3 if microcond == "target" else 0)
    assert torch.equal(seen["keep"][0], seen["target"][0])
    assert not torch.equal(seen["keep"][3], seen["target"][3])


def test_another_sampler():
    with wrapped(tiny.build("sd15"), sampler="unipc") as h:
        latents(h, "sd15")
        assert h.scheduler.base.config.sampler == "unipc"


@pytest.mark.parametrize("sampler", ["ddim", "deis", "ddpm"])
def test_our_schedulers(sampler):
    pipe = tiny.build("sd15")
    pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler=sampler)
    with wrapped(pipe) as h:
        assert torch.isfinite(latents(h, "sd15")).all()


def test_half_precision():
    pipe = tiny.build("flux").to(torch.bfloat16)
    with wrapped(pipe) as h:
        out = latents(h, "flux")
    assert out.dtype == torch.bfloat16 and torch.isfinite(out).all()


def test_threads():
    """The prompt is encoded before: tokenizers are not made for threads."""
    pipe = tiny.build("flux")
    prompt, pooled, _ = pipe.encode_prompt("a red fox", "a red fox", max_sequence_length=16)
    given = {"prompt": None, "prompt_embeds": prompt, "pooled_prompt_embeds": pooled}
    with wrapped(pipe) as h:
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


def test_save_and_load(tmp_path):
    """A loaded SD pipeline runs its stages at once; FLUX says that it needs the wrapper."""
    for name in ("sd3", "flux"):
        pipe = tiny.build(name)
        with wrapped(pipe) as h:
            want = latents(h, name)
            pipe.save_pretrained(tmp_path / name)
        loaded = DiffusionPipeline.from_pretrained(tmp_path / name)
        loaded.set_progress_bar_config(disable=True)
        if name == "sd3":
            assert torch.equal(latents(loaded, name, 7), want)
        else:
            with pytest.raises(RunError, match="wrap the loaded pipeline"):
                latents(loaded, name, 7)


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize("name", ["sd15_controlnet", "sd15_inpaint", "sd15_img2img", "flux_img2img", "dit"])
def test_other_pipelines(name):
    pipe = tiny.build(name)
    assert type(pipe).__name__ not in LAYOUTS
    with pytest.raises(OptionError, match="is not supported"):
        wrapped(pipe)


@pytest.mark.parametrize(("name", "value"), [("denoising_end", 0.6), ("timesteps", [9, 5]), ("sigmas", [1.0, 0.5])])
def test_arguments(name, value):
    with wrapped(tiny.build("sdxl")) as h, pytest.raises(OptionError, match=f"{name} is refused"):
        h("a fox", **{name: value})


def test_another_number_of_calls():
    with wrapped(tiny.build("sd3")) as h, pytest.raises(ValueError, match=r"make 7 model calls .* is 20"):
        latents(h, "sd3", 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": HLH, "calls": 9}, "calls has no effect"),
        ({"stages": "few-4", "calls": 9}, "makes 4 model calls"),
        ({"stages": "few-5"}, "unknown preset"),
        ({"microcond": "target"}, "only on SDXL"),
        ({"on_small": "ignore"}, "unknown on_small"),
        ({"stages": "bottleneck-3x", "fill": "white"}, "have no effect"),
    ],
)
def test_options(options, message):
    with pytest.raises(OptionError, match=message):
        bottleneck(tiny.build("sd3"), **options)


def test_small_images():
    with bottleneck(tiny.build("sd15"), HLH) as h:
        with pytest.warns(UserWarning, match="known to draw"):
            h(**(tiny.call_kwargs("sd15", num_inference_steps=7) | {"height": 32, "width": 32}))
        with pytest.raises(OptionError, match="on_small='warn'"):
            h(**(tiny.call_kwargs("sd15", num_inference_steps=7) | {"height": 16, "width": 16}))


def test_wrapping_twice():
    pipe = tiny.build("sd3")
    with wrapped(pipe), pytest.raises(OptionError, match="wrapped by 'bottleneck' already"):
        wrapped(pipe)
    wrapped(pipe).remove()


def test_policies_and_rewriters():
    pipe = tiny.build("sd15")
    pipe.scheduler = TableScheduler.from_config(
        pipe.scheduler.config, sampler="ddim", policy=[da.time_shift(window=40, cutoff=300)]
    )
    with pytest.raises(OptionError, match="aims rows at levels of its own"):
        wrapped(pipe)


def test_a_run_that_is_cut_short_says_so():
    def callback(pipe, i, t, kwargs):
        pipe._interrupt = i >= 5
        return {}

    with wrapped(tiny.build("sd3")) as h:
        latents(h, "sd3", callback_on_step_end=callback)
        assert not h.report().complete and "INCOMPLETE" in str(h.report())
