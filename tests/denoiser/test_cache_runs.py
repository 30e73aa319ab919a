"""Caches on unmodified pipelines: what runs, and what is left behind."""

from __future__ import annotations

import statistics
import threading

import hooked_runs as runs
import pytest
import torch
from cached_runs import gap
from diffusers.hooks import TaylorSeerCacheConfig

from diffaccel import models
from diffaccel.denoiser.cache import Cache
from diffaccel.denoiser.cache_attach import cached
from diffaccel.errors import RunError
from diffaccel.schedulers import TableScheduler
from diffaccel.testing.pipelines import build, call_kwargs, denoiser

each_case = pytest.mark.parametrize("case", list(runs.CASES))


# ---------------------------------------------------------------------- what runs
@each_case
@pytest.mark.parametrize("level", [None, "sublayer"])
def test_all_full_is_every_bit_of_the_plain_run(case, level):
    pipe = runs.made(case)
    before = runs.run(pipe, case, steps=6)
    for settings in (Cache.every(1, level=level), Cache.mask([1] * 6, level=level)):
        with cached(pipe, settings):
            assert torch.equal(runs.run(pipe, case, steps=6), before)
    assert runs.clean(denoiser(pipe))
    assert torch.equal(runs.run(pipe, case, steps=6), before)


@each_case
def test_parts_are_left_out_and_the_pipeline_comes_back(case):
    pipe = runs.made(case)
    model, branches = denoiser(pipe), runs.CASES[case][3]
    inner = model.mid_block.resnets[0] if hasattr(model, "mid_block") else runs.last_block(model)
    before, seen = runs.run(pipe, case, steps=12), []
    inner.register_forward_hook(lambda *_: seen.append(1))
    with cached(pipe, Cache.every(3)) as handle:
        first = runs.run(pipe, case, steps=12)
        counted = len(seen)
        again = runs.run(pipe, case, steps=12)
        report = handle.report()
    # the hook counts calls of the last block itself only where it lies inside of ours
    assert counted == (7 if hasattr(model, "mid_block") else 12) * branches
    assert report.forwards == {"full": 7 * branches, "mixed": 0, "reused": 5 * branches}
    assert {row for rows in report.decisions.values() for row in rows} == {"FFFF..F..F.F"}
    assert report.bytes > 0 and report.equal_calls is not None and report.parts >= 1
    assert torch.equal(first, again) and not torch.equal(first, before)
    assert runs.clean(model)
    assert torch.equal(runs.run(pipe, case, steps=12), before)


def by_hand(pipe, case, full, steps):
    """Reuse of the stack's residual, written with a patched `forward` of each block: no hook, no contract."""
    model, branches = denoiser(pipe), runs.CASES[case][3]
    first, last = model.transformer_blocks[0], runs.last_block(model)
    true_first, true_last = first.forward, last.forward
    count, kept, state = iter(range(10**6)), {}, {}

    def head(*args, **kwargs):
        state["step"], state["branch"] = divmod(next(count), branches)
        state["head"] = true_first(*args, **kwargs)
        return state["head"]

    def tail(*args, **kwargs):
        if full[state["step"]]:
            found = true_last(*args, **kwargs)
            kept[state["branch"]] = [None if a is None else a - b for a, b in zip(found, state["head"], strict=True)]
            return found
        return tuple(
            None if r is None else h + r for h, r in zip(state["head"], kept[state["branch"]], strict=True)
        )  # fmt: skip

    first.forward, last.forward = head, tail
    try:
        return runs.run(pipe, case, steps)
    finally:
        del first.forward, last.forward


@pytest.mark.parametrize("case", ["sd3", "flux", "flux-cfg", "qwen"])
def test_reuse_is_the_last_residual_of_the_stack(case):
    """The tiny models have two blocks, so the stack after the first is the second alone."""
    pipe, settings = runs.made(case), Cache.every(3, forecast=0)
    with cached(pipe, settings):
        found = runs.run(pipe, case, 12)
    assert gap(found, by_hand(pipe, case, settings.full_steps(12), 12)) < 1e-6


def test_sublayers_are_those_of_taylorseer():
    """FORA: order 0 is TaylorSeer's order 0, which is full at steps 0, 2, 5, ...: 10 of 28 calls."""
    pipe = runs.made("flux")
    denoiser(pipe).enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=3, disable_cache_before_step=1, max_order=0, taylor_factors_dtype=torch.float32,
            cache_identifiers=[".*attn", r".*\.ff(_context)?"],
        )
    )  # fmt: skip
    theirs = runs.run(pipe, "flux", 28)
    denoiser(pipe).disable_cache()
    mask = [1, *(int((step - 2) % 3 == 0) for step in range(1, 28))]
    with cached(pipe, Cache.mask(mask, forecast=0, level="sublayer")) as handle:
        ours = runs.run(pipe, "flux", 28)
    assert handle.report().full == {"cond": [10]}
    assert gap(ours, theirs) < 1e-6
    assert gap(runs.run(pipe, "flux", 28), theirs) > 1e-4


def test_forecasts_are_closer_than_reuse_on_trained_models():
    for name, level in (("tiny-sd", "deep"), ("tiny-flow", "stack")):
        pipe = models.load(name)
        pipe.set_progress_bar_config(disable=True)
        given = {
            "prompt": ["a red coat"] * 2,
            "num_inference_steps": 30,
            "guidance_scale": 4.0,
            "output_type": "latent",
        }

        def latents(pipe=pipe, given=given):
            return pipe(**given, generator=[torch.Generator().manual_seed(k) for k in range(2)])[0]

        full, errors = latents(), []
        for forecast in (0, 1):
            with cached(pipe, Cache.every(3, forecast=forecast)) as handle:
                errors.append(float((latents() - full).square().mean().sqrt()))
            assert handle.report().level == level
        assert errors[1] < errors[0], (name, errors)


@pytest.mark.parametrize("case", ["sd15-ddim", "flux"])
def test_forecasts_in_half_log_snr(case):
    """FLUX begins at infinite noise, where lam is not finite: that step takes no part in a forecast."""
    pipe, found = runs.made(case), []
    for variable in ("step", "lam"):
        with cached(pipe, Cache.every(3, warmup=2, variable=variable)) as handle:
            found.append(runs.run(pipe, case, 12))
            assert handle.report().forwards["reused"] == 6
    assert found[1].isfinite().all() and not torch.equal(*found)


# ---------------------------------------------------------------------- state
def test_size_and_steps_change_between_runs():
    pipe = runs.made("sd15")
    with cached(pipe, Cache.every(2)):
        runs.run(pipe, "sd15", 10)
        larger = runs.run(pipe, "sd15", 12, height=64, width=64)
    with cached(pipe, Cache.every(2)):
        assert torch.equal(runs.run(pipe, "sd15", 12, height=64, width=64), larger)


def test_a_run_after_an_exception_is_clean():
    pipe = runs.made("sd3")

    def stop(pipe, step, t, kwargs):
        if step == 5:
            raise KeyboardInterrupt
        return kwargs

    with cached(pipe, Cache.every(3)) as handle:
        good = runs.run(pipe, "sd3", 12)
        with pytest.raises(KeyboardInterrupt):
            runs.run(pipe, "sd3", 12, callback_on_step_end=stop, prompt="another picture")
        assert torch.equal(runs.run(pipe, "sd3", 12), good)
        assert handle.report().decisions["0"] == ["FFFF..F..F.F"] * 2


def test_eight_threads_share_a_model():
    def pipeline(own=None):
        pipe = build("sd3")
        pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config)
        if own is not None:
            pipe.register_modules(transformer=own.transformer)
        return pipe

    first = pipeline()
    pipes = [first, *(pipeline(first) for _ in range(7))]
    found: dict[int, torch.Tensor] = {}
    alone = {}
    with cached(first, Cache.first_block(0.3)):
        for k, pipe in enumerate(pipes):
            alone[k] = runs.run(pipe, "sd3", 10, seed=k)

        def work(k):
            found[k] = runs.run(pipes[k], "sd3", 10, seed=k)

        threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(found) == list(range(8))
    for k in range(8):
        assert torch.equal(found[k], alone[k])


def test_another_batch_within_a_run_is_an_error():
    pipe = runs.made("sd15")

    def unguided(pipe, step, t, kwargs):
        if step == 5:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"][-1:]
        return kwargs

    tensors = ["latents", "prompt_embeds"]
    with cached(pipe, Cache.every(3)), pytest.raises(RunError, match="1 rows, before with 2"):
        runs.run(pipe, "sd15", 12, callback_on_step_end=unguided, callback_on_step_end_tensor_inputs=tensors)


def test_a_run_that_begins_later_begins_full():
    pipe = runs.with_ddim("sd15_img2img")
    with cached(pipe, Cache.every(3)) as handle:
        pipe(**call_kwargs("sd15_img2img", num_inference_steps=16, strength=0.75))
    assert handle.report().decisions["0"] == ["FFFF..F..F.F"] * 2


def test_two_experts_have_caches_of_their_own():
    pipe = runs.two_experts()
    with cached(pipe, Cache.every(3)) as handle:
        runs.run(pipe, "wan", steps=20)
        report = handle.report()
    found = report.decisions
    first, second = found["transformer cond"][0], found["transformer_2 cond"][0]
    each = {kind: timer.each() for kind, timer in report.timers.items()}
    cost = sum(len(each[kind]) * statistics.median(each[kind]) for kind in ("full", "reused"))
    assert report.equal_calls == pytest.approx(cost / statistics.median(each["full"]) / 2)  # two branches a step
    assert len(first) + len(second) == 20 and len(second) > 5
    assert first.startswith("FFFF..F") and second.startswith("FFFF..F") and second.endswith("F")
    assert runs.clean(pipe.transformer) and runs.clean(pipe.transformer_2)


def test_few_steps_are_warned_about():
    pipe = runs.made("flux")
    with cached(pipe, Cache.every(2)), pytest.warns(UserWarning, match="6 steps: a cache gains little"):
        runs.run(pipe, "flux", 6)


def test_what_is_not_finite_is_not_carried_on():
    pipe = runs.made("flux")
    runs.last_block(denoiser(pipe)).proj_out.weight.data[0, 0] = float("nan")
    with cached(pipe, Cache.every(3)), pytest.raises(RunError, match=r"step 0: .*single_transformer_blocks.0.*float32"):
        runs.run(pipe, "flux", 10)
