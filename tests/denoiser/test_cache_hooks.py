"""Caches beside hooks, caches and layouts of others: what stays, what is refused."""

from __future__ import annotations

import copy
import functools

import hooked_runs as runs
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook as AccelerateHook
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers import FirstBlockCacheConfig, HeunDiscreteScheduler
from diffusers.hooks import HookRegistry, ModelHook

import diffaccel as da
from diffaccel.denoiser.cache import Cache
from diffaccel.denoiser.cache_attach import attach_cache, cached
from diffaccel.errors import OptionError, RunError
from diffaccel.testing.pipelines import call_kwargs, denoiser


# ---------------------------------------------------------------------- other hooks
def test_a_foreign_hook_below_stays():
    pipe = runs.made("flux")
    block = runs.last_block(denoiser(pipe))
    HookRegistry.check_if_exists_or_initialize(block).register_hook(ModelHook(), "foreign")
    with cached(pipe, Cache.every(3)):
        runs.run(pipe, "flux", 10)
    assert list(block._diffusers_hook.hooks) == ["foreign"]
    runs.run(pipe, "flux", 10)


def test_a_foreign_hook_above_is_named_and_nothing_is_removed():
    pipe = runs.made("flux")
    block = runs.last_block(denoiser(pipe))
    before = runs.run(pipe, "flux", 10)
    handle = attach_cache(pipe, Cache.every(3))
    with_cache = runs.run(pipe, "flux", 10)
    block._diffusers_hook.register_hook(ModelHook(), "foreign")
    with pytest.raises(RunError, match="'foreign' was put on FluxSingleTransformerBlock"):
        handle.remove()
    assert torch.equal(runs.run(pipe, "flux", 10), with_cache)
    block._diffusers_hook.remove_hook("foreign")
    handle.remove()
    assert runs.clean(denoiser(pipe)) and torch.equal(runs.run(pipe, "flux", 10), before)


def test_offloading_hooks_of_accelerate_stay_around():
    pipe = runs.made("sd3")
    before = runs.run(pipe, "sd3", 10)
    handle = attach_cache(pipe, Cache.every(3))
    with_cache = runs.run(pipe, "sd3", 10)
    add_hook_to_module(denoiser(pipe), AccelerateHook())
    assert torch.equal(runs.run(pipe, "sd3", 10), with_cache)
    handle.remove()
    assert torch.equal(runs.run(pipe, "sd3", 10), before)
    remove_hook_from_module(denoiser(pipe))
    assert all(runs.clean(part) for part in denoiser(pipe).children())


def test_offloaded_layers_of_accelerate_are_left_out_too():
    pipe = runs.made("sd3")
    with cached(pipe, Cache.every(3)):
        expected = runs.run(pipe, "sd3", 10)
    cpu_offload(denoiser(pipe), execution_device=torch.device("cpu"))
    before = runs.run(pipe, "sd3", 10)
    with cached(pipe, Cache.every(3)) as handle:
        assert torch.equal(runs.run(pipe, "sd3", 10), expected)
        assert handle.report().forwards["reused"] == 4
    assert torch.equal(runs.run(pipe, "sd3", 10), before)


def test_caches_of_diffusers_and_ours_are_refused():
    pipe = runs.made("flux")
    denoiser(pipe).enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(OptionError, match="disable_cache"):
        attach_cache(pipe, Cache.every(3))
    denoiser(pipe).disable_cache()
    with da.extrapolate(pipe, "h2/s3"), pytest.raises(OptionError, match="'extrapolate' already"):
        attach_cache(pipe, Cache.every(3))
    with cached(pipe, Cache.every(3)), pytest.raises(OptionError, match="'quant_cache' already"):
        attach_cache(pipe, Cache.every(3))
    assert runs.clean(denoiser(pipe))


def test_group_offloading_and_cache_dit_are_refused():
    pipe = runs.made("flux")
    denoiser(pipe)._is_cached = True  # as cache-dit marks it
    with pytest.raises(OptionError, match="cache-dit"):
        attach_cache(pipe, Cache.every(3))
    pipe, cpu = runs.made("flux"), torch.device("cpu")
    denoiser(pipe).enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    with pytest.raises(OptionError, match="offloaded in groups"):
        attach_cache(pipe, Cache.every(3))


def test_a_copy_would_run_the_weights_of_the_original():
    pipe = runs.made("flux")
    with cached(pipe, Cache.every(3)), pytest.raises(OptionError, match="copied"):
        copy.deepcopy(denoiser(pipe))
    copy.deepcopy(denoiser(pipe))


def test_two_calls_a_step_are_refused():
    pipe = runs.made("sd15")
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with cached(pipe, Cache.every(3)), pytest.raises(OptionError, match="2 model calls a step"):
        runs.run(pipe, "sd15", 10)


# ---------------------------------------------------------------------- layouts
def test_control_between_blocks_needs_sublayers():
    pipe = runs.made("flux")
    model = denoiser(pipe)
    true, extra = model.forward, torch.randn(1, 1, 1) * 0.1

    @functools.wraps(true)
    def controlled(*args, **kwargs):
        return true(*args, controlnet_block_samples=[extra], **kwargs)

    model.forward = controlled
    with cached(pipe, Cache.every(3)), pytest.raises(OptionError, match="level='sublayer'"):
        runs.run(pipe, "flux", 10)
    with cached(pipe, Cache.every(3, level="sublayer")):
        runs.run(pipe, "flux", 10)


def test_controlnet_works_on_the_deep_part():
    pipe = runs.with_ddim("sd15_controlnet")
    with cached(pipe, Cache.every(3)) as handle:
        pipe(**call_kwargs("sd15_controlnet", num_inference_steps=10))
    assert handle.report().forwards["reused"] == 4


def test_models_of_other_layouts_say_what_was_found():
    pipe = runs.made("flux")
    with pytest.raises(OptionError, match="level='deep' is of UNets"):
        attach_cache(pipe, Cache.every(3, level="deep"))
    with pytest.raises(OptionError, match="level='stack' is of transformers"):
        attach_cache(runs.made("sd15"), Cache.every(3, level="stack"))
    del denoiser(pipe).single_transformer_blocks[0]
    with pytest.raises(OptionError, match="two transformer blocks or more"):
        attach_cache(pipe, Cache.every(3))
    assert runs.clean(denoiser(pipe))


def test_models_without_weights_are_refused():
    pipe = runs.made("flux")
    pipe.transformer.to("meta")
    with pytest.raises(OptionError, match="meta device"):
        attach_cache(pipe, Cache.every(3))
