"""Where a cache ends: what it cannot follow is said, with what to do; what it can only half follow is in its notes."""

from __future__ import annotations

import hooked_runs as runs
import pytest
import torch
from calibrated_cache import STEPS, artifact_for
from diffusers import DDIMScheduler, Flux2Transformer2DModel, UNet2DModel

import diffaccel as da
from diffaccel.denoiser.cache import Cache
from diffaccel.denoiser.cache_attach import attach_cache, cached
from diffaccel.denoiser.cache_layout import layout_of
from diffaccel.denoiser.quant import quantise
from diffaccel.errors import ArtifactError, OptionError, RunError
from diffaccel.schedulers import TimeShiftScheduler
from diffaccel.testing.pipelines import build, call_kwargs, denoiser


# ---------------------------------------------------------------------- schedulers and steps
def test_a_scheduler_that_repeats_timesteps_is_refused():
    pipe = build("sd15")  # PNDM
    with cached(pipe, Cache.every(3)), pytest.raises(OptionError, match="repeats timesteps"):
        pipe(**call_kwargs("sd15", num_inference_steps=12))


def test_a_policy_that_moves_the_timesteps_runs_and_artifacts_of_other_grids_do_not():
    pipe, cache = runs.made("sd15-ddim"), Cache.every(3)
    made = artifact_for(pipe, "sd15-ddim", cache)
    own = pipe.scheduler
    pipe.scheduler = TimeShiftScheduler.from_config(own.config, window=40, cutoff=100)
    with da.quant_cache(pipe, cache=cache) as h:
        runs.run(pipe, "sd15-ddim", STEPS)
        assert h.report().cache.decisions["0"] == ["FFFF..F..F"] * 2
    with da.quant_cache(pipe, cache=cache, artifact=made), pytest.raises(ArtifactError, match="another scheduler"):
        runs.run(pipe, "sd15-ddim", STEPS)
    pipe.scheduler = DDIMScheduler.from_config(own.config, timestep_spacing="trailing")
    with da.quant_cache(pipe, cache=cache, artifact=made), pytest.raises(ArtifactError, match=r"scheduler config|grid"):
        runs.run(pipe, "sd15-ddim", STEPS)


def test_a_mask_counts_the_steps_that_run():
    pipe = runs.with_ddim("sd15_img2img")
    with cached(pipe, Cache.mask([1, 1, 0] * 4)) as handle:
        pipe(**call_kwargs("sd15_img2img", num_inference_steps=16, strength=0.75))
        assert handle.report().decisions["0"] == ["FF.FF.FF.FF."] * 2
        with pytest.raises(OptionError, match="has 12 steps, the run has 15"):
            pipe(**call_kwargs("sd15_img2img", num_inference_steps=20, strength=0.75))


def test_nothing_is_carried_over_to_another_size_within_a_run():
    pipe = runs.made("sd15")

    def enlarge(pipe, step, t, kwargs):
        return {"latents": torch.nn.functional.interpolate(kwargs["latents"], scale_factor=2)} if step == 3 else kwargs

    with cached(pipe, Cache.every(3)) as handle:
        runs.run(pipe, "sd15", 12, callback_on_step_end=enlarge, callback_on_step_end_tensor_inputs=["latents"])
        report = handle.report()
    assert report.decisions["0"] == ["FFFFF.F..F.F"] * 2  # step 4, the first of the new size, would be reused
    assert "step 4 is full, because there was nothing to reuse" in report.notes


# ---------------------------------------------------------------------- models
def test_blocks_that_join_the_streams_need_sublayers():
    torch.manual_seed(0)
    model = Flux2Transformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    with pytest.raises(OptionError, match=r"Flux2SingleTransformerBlock.*level='sublayer'"):
        layout_of(model, None, False)
    names = [name for name, _ in layout_of(model, "sublayer", False).parts]
    assert any(name.startswith("transformer_blocks.1.") for name in names)
    assert any(name.startswith("single_transformer_blocks.1.") for name in names)


def test_blocks_of_several_kinds_that_diffusers_does_not_know_need_sublayers(monkeypatch):
    """As FLUX.2 below diffusers 0.41; a single kind is taken, and looked at when it returns."""
    monkeypatch.setattr("diffaccel.denoiser.cache_layout._registered", lambda block: None)
    with pytest.raises(OptionError, match=r"several kinds \(FluxSingle.*, Flux.*\).*level='sublayer'"):
        layout_of(denoiser(build("flux")), None, False)
    assert layout_of(denoiser(build("wan")), None, False).level == "stack"


def test_unets_without_a_deep_part_or_sublayers():
    flat = UNet2DModel(sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",),
                       up_block_types=("UpBlock2D",), layers_per_block=1)  # fmt: skip
    with pytest.raises(OptionError, match="has 1 and 1 blocks"):
        layout_of(flat, None, False)
    plain = build("ddpm").unet
    with pytest.raises(OptionError, match="no attention or feed-forward of a known class; found: no transformer block"):
        layout_of(plain, "sublayer", False)


def test_a_part_that_is_never_called_is_an_error():
    pipe = runs.made("flux")
    spare = torch.nn.ModuleList([*denoiser(pipe).single_transformer_blocks, runs.last_block(denoiser(build("flux")))])
    with cached(pipe, Cache.every(3)):
        runs.run(pipe, "flux", 10)
    used = denoiser(pipe).single_transformer_blocks
    denoiser(pipe).single_transformer_blocks = spare
    with cached(pipe, Cache.every(3)):
        denoiser(pipe).single_transformer_blocks = used  # the hooked spare block is out of the model
        with pytest.raises(RunError, match=r"single_transformer_blocks.1 were never called"):
            runs.run(pipe, "flux", 10)


def test_a_model_that_others_quantised_keeps_its_quantisation():
    pytest.importorskip("torchao")
    pipe = runs.made("flux")
    quantise(denoiser(pipe), da.Quant("w8a8", min_features=16))
    before = runs.run(pipe, "flux", 10)
    with pytest.raises(OptionError, match="quantised already"):
        da.quant_cache(pipe, cache=Cache.every(3), quant="w8a8")
    with da.quant_cache(pipe, cache=Cache.every(3)) as h:
        assert not torch.equal(runs.run(pipe, "flux", 10), before)
        assert h.report().quantised == {} and h.report().cache.forwards["reused"] > 0
    assert torch.equal(runs.run(pipe, "flux", 10), before)


# ---------------------------------------------------------------------- forecasts and decisions
def test_half_log_snr_needs_levels_that_the_config_proves():
    pipe = runs.made("sd15")

    class Other(DDIMScheduler):
        """Not one that we know."""

    pipe.scheduler = Other.from_config(pipe.scheduler.config, prediction_type="mystery")
    with cached(pipe, Cache.every(3, variable="lam")), pytest.raises(OptionError, match="variable='step'"):
        runs.run(pipe, "sd15", 10)


def test_rows_of_unknown_images_decide_alone_and_the_report_says_so():
    pipe = runs.with_ddim("ddpm")  # its pipeline does not say whether it guides
    with cached(pipe, Cache.first_block(0.3)) as handle:
        pipe(**call_kwargs("ddpm", num_inference_steps=10))
        assert "which rows belong to one image is not known, so each decided by itself" in handle.report().notes
        assert len(handle.report().decisions["0"]) == 2
    guided = runs.made("sd15-ddim")
    with cached(guided, Cache.first_block(0.3)) as handle:
        runs.run(guided, "sd15-ddim", 10)
        assert handle.report().notes == []


def test_a_probe_must_be_given_as_many_values_as_there_are():
    pipe = runs.made("flux")

    def drive(probe):
        output, values = probe.full()
        with pytest.raises(RunError, match=rf"{len(values) + 1} values are given"):
            probe.forced([*values, values[0]])
        return output

    with cached(pipe, Cache.every(3), drive) as handle:
        runs.run(pipe, "flux", 9)
        with pytest.raises(RunError, match="driven by a calibration"):
            handle.memory(lambda: None)
    with cached(pipe, Cache.every(3)) as handle, pytest.raises(RunError, match="never called its denoiser"):
        handle.memory(lambda: None)


def test_two_wrappers_of_sizes_and_caches_are_refused():
    pipe = runs.made("sd15-ddim")
    with da.bottleneck(pipe, "bottleneck-3x"), pytest.raises(OptionError, match="'bottleneck' already"):
        attach_cache(pipe, Cache.every(3))
    with cached(pipe, Cache.every(3)), pytest.raises(OptionError, match="'quant_cache' already"):
        da.bottleneck(pipe, "bottleneck-3x")
