"""`quant_cache` as a user has it: on, run, report, off; with quantisation and with what was calibrated."""

from __future__ import annotations

import contextlib
import copy
import warnings

import hooked_runs as runs
import pytest
import torch
from accelerate import cpu_offload
from calibrated_cache import STEPS, artifact_for

import diffaccel as da
from diffaccel.artifact import Artifact
from diffaccel.errors import ArtifactError, OptionError, RunError
from diffaccel.schedulers import FSamplerScheduler, RestartScheduler, TableScheduler
from diffaccel.testing.pipelines import call_kwargs, denoiser

QUANT = da.Quant("w8a8", min_features=16)  # the tiny models are narrow


def gap(a, b):
    return float((a - b).abs().max() / b.abs().max().clamp_min(1))


# ---------------------------------------------------------------------- on, run, off
@pytest.mark.parametrize("case", ["sd15", "sd3", "flux", "qwen"])
def test_cache_and_quantisation_and_the_way_back(case):
    pipe = runs.made(case)
    before = runs.run(pipe, case, STEPS)
    weights = dict(denoiser(pipe).named_parameters())
    with da.quant_cache(pipe, cache=da.Cache.every(3), quant=QUANT) as h:
        first = runs.run(pipe, case, STEPS)
        again = h(**call_kwargs(runs.CASES[case][0], num_inference_steps=STEPS))[0]
        report = h.report()
    assert torch.equal(first, again) and gap(first, before) > 1e-4
    assert report.cache.forwards["reused"] > 0 and "w8a8" in str(report) and "FFFF..F..F" in str(report)
    assert report.to_dict()["cache"]["full_calls"]
    assert torch.equal(runs.run(pipe, case, STEPS), before)
    assert all(p is weights[name] for name, p in denoiser(pipe).named_parameters())


def test_freed_weights_leave_the_denoiser_quantised():
    pipe = runs.made("flux")
    with da.quant_cache(pipe, cache=da.Cache.every(3), quant=da.Quant("w8a8", min_features=16, keep_float=False)):
        runs.run(pipe, "flux", STEPS)
    alone = runs.run(pipe, "flux", STEPS)
    with da.quant_cache(runs.made("flux"), quant=QUANT) as h:
        assert torch.equal(runs.run(h.pipe, "flux", STEPS), alone)
    with pytest.raises(OptionError, match="quantised already"):
        da.quant_cache(pipe, quant=QUANT)


@pytest.mark.parametrize("buffers", [False, True])
def test_offloading_comes_after_quantisation_and_goes_before_it(buffers):
    pipe = runs.made("sd3")
    before = runs.run(pipe, "sd3", STEPS)
    with da.quant_cache(pipe, cache=da.Cache.every(3), quant=QUANT) as h:
        expected, scales = runs.run(pipe, "sd3", STEPS), h.report().scales
        cpu_offload(denoiser(pipe), execution_device=torch.device("cpu"), offload_buffers=buffers)
        assert torch.equal(runs.run(pipe, "sd3", STEPS), expected) and h.report().scales == scales
        with pytest.raises(RunError, match=r"remove_all_hooks\(\)"):
            h.remove()
        assert torch.equal(runs.run(pipe, "sd3", STEPS), expected)  # nothing was undone
        pipe.remove_all_hooks()
    assert torch.equal(runs.run(pipe, "sd3", STEPS), before)
    cpu_offload(denoiser(pipe), execution_device=torch.device("cpu"))
    with pytest.raises(OptionError, match="quantise first"):
        da.quant_cache(pipe, quant=QUANT)


def test_quantisation_alone_is_near_and_cache_alone_needs_no_torchao():
    pipe = runs.made("flux")
    before = runs.run(pipe, "flux", STEPS)
    with da.quant_cache(pipe, quant=QUANT) as h:
        assert 0 < gap(runs.run(pipe, "flux", STEPS), before) < 0.05
        assert h.report().cache is None
    with da.quant_cache(pipe, cache=da.Cache.every(1)):
        assert torch.equal(runs.run(pipe, "flux", STEPS), before)


def test_a_removed_handle_does_not_pretend():
    pipe = runs.made("flux")
    h = da.quant_cache(pipe, cache=da.Cache.every(3))
    with pytest.raises(RunError, match="no run was made"):
        h.report()
    h.remove()
    h.remove()
    with pytest.raises(RunError, match="removed"):
        h("a prompt")
    for use in (lambda: h.memory("a prompt"), h.compile):
        with pytest.raises(RunError, match="wrapper was removed"):
            use()
    with pytest.raises(RunError, match="no run was made before"):
        h.report()


def test_the_last_report_outlives_the_wrapper():
    pipe = runs.made("flux")
    with da.quant_cache(pipe, cache=da.Cache.every(3), quant=QUANT) as h:
        runs.run(pipe, "flux", STEPS)
        before = h.report()
    runs.run(pipe, "flux", 3)
    assert h.report().to_dict() == before.to_dict() and h.report().cache is not None and h.report().scales


def test_a_failure_undoes_what_was_done_before_it():
    pipe = runs.made("flux")
    before = runs.run(pipe, "flux", STEPS)
    with pytest.raises(OptionError, match="level='deep'"):
        da.quant_cache(pipe, cache=da.Cache.every(3, level="deep"), quant=QUANT)
    assert torch.equal(runs.run(pipe, "flux", STEPS), before)
    da.quant_cache(pipe, quant=QUANT).remove()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "does nothing"),
        ({"cache": "every"}, "no Cache"),
        ({"quant": "w4"}, "unknown quantisation"),
        ({"quant": 3}, "quant=3 is no quantisation"),
        ({"quant": True}, "quant=True is no quantisation"),
        ({"quant": "w8a8"}, "no layer of this"),
        ({"quant": QUANT, "artifact": "file"}, "belongs to a cache"),
    ],
)
def test_options_that_mean_nothing(options, says):
    with pytest.raises(OptionError, match=says):
        da.quant_cache(runs.made("flux"), **options)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: da.quant_cache(None, cache=da.Cache.every(3)), "needs a pipeline.*got a NoneType"),
        (lambda: da.quant_cache(runs.made("flux").transformer, quant=QUANT), "needs a pipeline.*got a Flux"),
        (lambda: da.quant_cache(runs.made("flux"), cache=da.Cache.every(3), artifact=5), "got 5"),
        (lambda: da.Quant(skip=3), "skip is a pattern"),
        (lambda: da.Quant(min_features="a"), "min_features is a width, got 'a'"),
        (lambda: da.Cache.mask(5), "a list of 0 and 1.*not 5"),
        (lambda: da.Cache.first_block("a"), "threshold='a' must lie"),
        (lambda: da.Cache.learned(3), "an Artifact or its file, got 3"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(make, says):
    with pytest.raises((OptionError, ArtifactError), match=says):
        make()


def test_wrappers_that_do_not_compose():
    pipe = runs.made("flux")
    with da.quant_cache(pipe, cache=da.Cache.every(3)):
        with pytest.raises(OptionError, match="'quant_cache' already"):
            da.quant_cache(pipe, cache=da.Cache.every(3))
        with pytest.raises(OptionError, match="'quant_cache' already"):
            da.extrapolate(pipe, "h2/s3")
    with da.extrapolate(pipe, "h2/s3"), pytest.raises(OptionError, match="'extrapolate' already"):
        da.quant_cache(pipe, cache=da.Cache.every(3))
    pipe.scheduler = FSamplerScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(OptionError, match="two extrapolations"):
        da.quant_cache(pipe, cache=da.Cache.every(3))


def test_quantisation_alone_is_a_wrapper_too():
    pipe = runs.made("sd3")
    with da.quant_cache(pipe, quant=QUANT):
        for wrap in (lambda: da.quant_cache(pipe, cache=da.Cache.every(3)), lambda: da.extrapolate(pipe)):
            with pytest.raises(OptionError, match="wrapped by 'quant_cache' already"):
                wrap()
    with da.quant_cache(pipe, quant=da.Quant("w8a8", min_features=16, keep_float=False)):
        pass
    with da.quant_cache(pipe, cache=da.Cache.every(3)):  # quantised for good, and wrapped no more
        runs.run(pipe, "sd3", STEPS)


def test_our_schedulers_run_under_a_cache():
    pipe = runs.made("sd15-ddim")
    pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="dpmpp", order=2)
    with da.quant_cache(pipe, cache=da.Cache.every(3)) as h:
        runs.run(pipe, "sd15-ddim", 12)
        assert h.report().cache.decisions["0"] == ["FFFF..F..F.F"] * 2


def test_steps_that_go_up_in_noise_are_full_and_carry_nothing_over():
    pipe = runs.made("sd15-ddim")
    pipe.scheduler = RestartScheduler.from_config(pipe.scheduler.config)
    with da.quant_cache(pipe, cache=da.Cache.every(3)) as h:
        runs.run(pipe, "sd15-ddim", 24)
        letters = h.report().cache.decisions["0"][0]
    levels = [float(s) for s in pipe.scheduler.sigmas[:-1]]
    ups = [i for i in range(1, len(levels)) if levels[i] > levels[i - 1]]
    assert ups and all(letters[i] == "F" for i in ups)


# ---------------------------------------------------------------------- told before the run
@pytest.mark.parametrize("case", ["sd15", "sd3", "flux-cfg", "qwen", "wan"])
@pytest.mark.parametrize(("level", "forecast"), [(None, 0), (None, 1), ("sublayer", 2)])
def test_memory_is_told_before_anything_is_kept(case, level, forecast):
    pipe = runs.made(case)
    name, _, more, branches = runs.CASES[case]
    model = denoiser(pipe)
    with da.quant_cache(pipe, cache=da.Cache.every(3, forecast=forecast, level=level)) as h:
        with runs.counted(model) as seen:
            told = h.memory(**call_kwargs(name, num_inference_steps=12, **more))
        assert len(seen) <= 2 * branches  # one step, and perhaps the beginning of the next
        with pytest.raises(RunError, match="no run was made"):
            h.report()
        first = runs.run(pipe, case, 12)
        assert h.report().cache.bytes == told > 0
        assert h.memory(**call_kwargs(name, num_inference_steps=12, **more)) == told
        assert h.report().cache.steps == 12  # still the run before
        assert torch.equal(runs.run(pipe, case, 12), first)


def test_memory_in_half_precision_counts_float32_sums():
    pipe = runs.made("flux").to(torch.bfloat16)
    given = call_kwargs("flux", num_inference_steps=12)
    with da.quant_cache(pipe, cache=da.Cache.every(3)) as h:
        told = h.memory(**given)
        h(**given)
        assert h.report().cache.bytes == told
    with da.quant_cache(pipe, cache=da.Cache.every(3, forecast=0)) as h:
        assert told == 4 * h.memory(**given)
    with da.quant_cache(runs.made("flux"), quant=QUANT) as h, pytest.raises(OptionError, match="no cache"):
        h.memory(**given)


def test_the_largest_scale_of_an_activation_is_that_of_the_last_run():
    pipe, seen = runs.made("flux"), {}
    with da.quant_cache(pipe, cache=da.Cache.every(3), quant=QUANT) as h:
        layers = {name: part for name, part in denoiser(pipe).named_modules() if hasattr(part, "diffaccel_peak")}
        for name, part in layers.items():
            part.register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name, max(seen.get(name, 0.0), float(args[0].abs().max())))
            )
        runs.run(pipe, "flux", STEPS, guidance_scale=30.0)
        large = h.report().scales["transformer"]
        seen.clear()
        runs.run(pipe, "flux", STEPS)
        scale, layer = h.report().scales["transformer"]
        assert len(layers) > 5 and layer in layers and f"{scale:.4g}, in {layer}" in str(h.report())
        assert h.report().to_dict()["largest_activation_scale"]["transformer"] == (scale, layer)
        assert scale == pytest.approx(max(seen.values()) / 127.5, rel=1e-6) and layer == max(seen, key=seen.get)
        assert scale != large[0]
    assert not any(hasattr(part, "diffaccel_peak") for part in denoiser(pipe).modules())
    with da.quant_cache(pipe, quant=da.Quant("w8", min_features=16)) as h:
        runs.run(pipe, "flux", STEPS)
        assert h.report().scales == {}  # only weights are quantised


@pytest.mark.parametrize("case", ["sd15", "flux"])
def test_wide_intervals_at_few_steps_are_refused(case):
    pipe = runs.made(case)
    with da.quant_cache(pipe, cache=da.Cache.every(3)):
        with pytest.raises(OptionError, match=r"every\(3, .*at 8 steps.*every\(2\)"):
            runs.run(pipe, case, 8)
        runs.run(pipe, case, 9)
    mask = da.Cache.mask([1, 1, 0, 0, 0, 1, 0, 1])
    for settings in (da.Cache.every(2), da.Cache.every(1), mask):  # a mask says what it means
        with warnings.catch_warnings(), da.quant_cache(pipe, cache=settings):
            warnings.simplefilter("ignore")
            runs.run(pipe, case, 8)


# ---------------------------------------------------------------------- calibrated
@pytest.mark.parametrize("case", ["sd15-ddim", "sd15", "sd3", "flux"])
def test_compensation_is_applied_after_each_step(case):
    pipe, cache = runs.made(case), da.Cache.every(3)
    found = artifact_for(pipe, case, cache)
    own, seen = pipe.scheduler, []
    with da.quant_cache(pipe, cache=cache):
        plain = runs.run(pipe, case, STEPS)

    def by_hand(pipe, step, t, kwargs):
        x = kwargs["latents"]
        seen.append(step)
        return {"latents": 0.01 + (1.02 if step < 2 else 1.0) * x}

    with da.quant_cache(pipe, cache=cache):
        expected = runs.run(pipe, case, STEPS, callback_on_step_end=by_hand)
    with da.quant_cache(pipe, cache=cache, artifact=found) as h:
        assert type(pipe.scheduler).__name__ == type(own).__name__ and isinstance(pipe.scheduler, type(own))
        ours = runs.run(pipe, case, STEPS)
        report = h.report()
    assert len(seen) == STEPS and gap(ours, plain) > 1e-3
    assert gap(ours, expected) < 1e-5
    assert report.gains == (1.0, 1.02) and report.compensated == STEPS
    assert pipe.scheduler is own


def test_compensation_on_a_scheduler_of_ours_and_in_its_copies():
    pipe, cache = runs.made("sd15-ddim"), da.Cache.every(3)
    pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="dpmpp", order=2)
    found = artifact_for(pipe, "sd15-ddim", cache)
    with da.quant_cache(pipe, cache=cache):
        plain = runs.run(pipe, "sd15-ddim", STEPS)
    with da.quant_cache(pipe, cache=cache, artifact=found) as h:
        ours = runs.run(pipe, "sd15-ddim", STEPS)
        assert h.report().compensated == STEPS and gap(ours, plain) > 1e-3
        copied = copy.deepcopy(pipe.scheduler)
        assert copied.config == pipe.scheduler.config and copied is not pipe.scheduler
        assert torch.equal(runs.run(pipe, "sd15-ddim", STEPS), ours)


def test_an_artifact_serves_only_what_it_was_made_for(tmp_path):
    pipe, cache = runs.made("sd3"), da.Cache.every(3)
    file = artifact_for(pipe, "sd3", cache).save(tmp_path / "vc.safetensors")
    with da.quant_cache(pipe, cache=cache, artifact=file):
        runs.run(pipe, "sd3", STEPS)
        with pytest.raises(ArtifactError, match="steps"):
            runs.run(pipe, "sd3", 12)
        with pytest.raises(ArtifactError, match="guidance"):
            runs.run(pipe, "sd3", STEPS, guidance_scale=5.0)
        with pytest.raises(ArtifactError, match="shape"):
            runs.run(pipe, "sd3", STEPS, height=64, width=64)
        runs.run(pipe, "sd3", STEPS)
    with pytest.raises(ArtifactError, match="not calibrated for"):
        da.quant_cache(pipe, cache=da.Cache.every(2), artifact=file)
    with pytest.raises(ArtifactError, match="not first_block"):
        da.quant_cache(pipe, cache=da.Cache.first_block(0.2), artifact=file)
    with da.quant_cache(pipe, cache=cache, artifact=file, quant=QUANT), pytest.raises(ArtifactError, match="quantis"):
        runs.run(pipe, "sd3", STEPS)
    next(iter(denoiser(pipe).parameters())).data += 0.1
    with pytest.raises(ArtifactError, match="another model"):
        da.quant_cache(pipe, cache=cache, artifact=file)


@pytest.mark.parametrize("case", ["flux-cfg", "qwen"])
def test_an_artifact_of_guidance_by_two_calls_serves_no_run_without(case):
    pipe, cache = runs.made(case), da.Cache.every(3)
    made = artifact_for(pipe, case, cache)
    assert "number of model calls a step" not in made.meta["key"]  # as older versions wrote them: all are served
    key = {**made.meta["key"], "number of model calls a step": 2}
    for found, fits in ((made, True), (Artifact("cache", made.tensors, made.meta | {"key": key}), False)):
        with da.quant_cache(pipe, cache=cache, artifact=found):
            runs.run(pipe, case, STEPS)
            with (
                contextlib.nullcontext()
                if fits
                else pytest.raises(ArtifactError, match="another number of model calls")
            ):
                runs.run(pipe, case, STEPS, true_cfg_scale=1.0)
            runs.run(pipe, case, STEPS)


def test_learned_masks_come_with_their_artifact():
    pipe, mask = runs.made("sd3"), da.Cache.mask([1, 1, 0, 0, 1, 0, 1, 0, 0, 1])
    found = artifact_for(pipe, "sd3", mask, learned=True)
    with da.quant_cache(pipe, cache=da.Cache.learned(found)) as h:
        runs.run(pipe, "sd3", STEPS)
        assert h.report().cache.decisions["0"] == ["FF..F.F..F"] * 2 and h.report().compensated == STEPS
        with pytest.raises(OptionError, match="10 steps, the run has 12"):
            runs.run(pipe, "sd3", 12)
    assert da.Cache.learned(found, full=5).rows == mask.rows
    with pytest.raises(ArtifactError, match="no learned mask of 4"):
        da.Cache.learned(found, full=4)
    with pytest.raises(ArtifactError, match="no learned mask"):
        da.Cache.learned(artifact_for(pipe, "sd3", mask))
    useless = artifact_for(pipe, "sd3", mask, learned=True, benefit=False)
    with pytest.raises(ArtifactError, match="no benefit found"):
        da.Cache.learned(useless)
    assert da.Cache.learned(useless, force=True).rows == mask.rows


def test_a_scheduler_that_was_replaced_is_named():
    pipe, cache = runs.made("sd3"), da.Cache.every(3)
    own = pipe.scheduler
    h = da.quant_cache(pipe, cache=cache, artifact=artifact_for(pipe, "sd3", cache))
    ours, pipe.scheduler = pipe.scheduler, own
    with pytest.raises(RunError, match=r"pipe\.scheduler was replaced"):
        h.remove()
    pipe.scheduler = ours
    h.remove()
    assert pipe.scheduler is own
