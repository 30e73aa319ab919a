"""LoRA (by peft) under a cache and under quantisation: loaded before and afterwards, fused, taken off."""

from __future__ import annotations

import hooked_runs as runs
import pytest
import torch
from cached_runs import gap
from calibrated_cache import STEPS, artifact_for

import diffaccel as da
from diffaccel.errors import ArtifactError, OptionError, RunError
from diffaccel.testing.pipelines import denoiser

peft = pytest.importorskip("peft", reason="peft is not installed")
QUANT = da.Quant("w8a8", min_features=16)
CASES = ["sd15", "sd3", "flux"]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def lora(case, tmp_path_factory):
    """A folder with an adapter on all attention layers, and the images of the pipeline without and with it."""
    folder, pipe = tmp_path_factory.mktemp(case), runs.made(case)
    before, model = runs.run(pipe, case, STEPS), denoiser(pipe)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        names = ["to_q", "to_k", "to_v", "to_out.0"]
        model.add_adapter(peft.LoraConfig(r=4, init_lora_weights=False, target_modules=names))
    layers = "unet_lora_layers" if hasattr(pipe, "unet") else "transformer_lora_layers"
    type(pipe).save_lora_weights(folder, **{layers: peft.get_peft_model_state_dict(model)})
    pipe = loaded(case, folder)
    with_lora = runs.run(pipe, case, STEPS)
    assert gap(with_lora, before) > 1e-3
    return folder, before, with_lora


def loaded(case, folder):
    pipe = runs.made(case)
    pipe.load_lora_weights(folder)
    return pipe


def fused(case, folder):
    pipe = loaded(case, folder)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe


# ---------------------------------------------------------------------- under a cache
@pytest.mark.parametrize("level", [None, "sublayer"])
def test_a_lora_loaded_before_or_afterwards_runs_alike(case, lora, level):
    folder, before, with_lora = lora
    pipe = loaded(case, folder)
    with da.quant_cache(pipe, cache=da.Cache.every(1, level=level)):
        assert torch.equal(runs.run(pipe, case, STEPS), with_lora)
    with da.quant_cache(pipe, cache=da.Cache.every(3, level=level)) as h:
        cached = runs.run(pipe, case, STEPS)
        assert h.report().cache.forwards["reused"] > 0
    assert torch.equal(runs.run(pipe, case, STEPS), with_lora)
    pipe = runs.made(case)
    with da.quant_cache(pipe, cache=da.Cache.every(3, level=level)):
        plain = runs.run(pipe, case, STEPS)
        pipe.load_lora_weights(folder)
        assert torch.equal(runs.run(pipe, case, STEPS), cached)
        pipe.unload_lora_weights()
        assert torch.equal(runs.run(pipe, case, STEPS), plain) and gap(plain, cached) > 1e-4
    assert torch.equal(runs.run(pipe, case, STEPS), before) and runs.clean(denoiser(pipe))


def test_a_fused_lora_runs_as_an_unfused_one(case, lora):
    folder, _, _ = lora
    found = []
    for made in (loaded, fused):
        pipe = made(case, folder)
        with da.quant_cache(pipe, cache=da.Cache.every(3)):
            found.append(runs.run(pipe, case, STEPS))
    assert gap(*found) < 1e-4


# ---------------------------------------------------------------------- quantised
def test_a_fused_lora_is_quantised_and_comes_back(case, lora):
    folder, before, with_lora = lora
    pipe = fused(case, folder)
    plain = runs.run(pipe, case, STEPS)
    with da.quant_cache(pipe, quant=QUANT) as h:
        quantised = runs.run(pipe, case, STEPS)
        assert "linear layers" in h.report().quantised[next(iter(h.report().quantised))]
    assert 0 < gap(quantised, with_lora) < 0.5 * gap(before, with_lora)  # the adapter is in what was quantised
    assert torch.equal(runs.run(pipe, case, STEPS), plain)


def test_an_unfused_lora_is_refused_by_quantisation(case, lora):
    pipe = loaded(case, lora[0])
    with pytest.raises(OptionError, match="fuse_lora"):
        da.quant_cache(pipe, cache=da.Cache.every(3), quant=QUANT)
    assert torch.equal(runs.run(pipe, case, STEPS), lora[2])


@pytest.mark.parametrize("first", ["remove", "unload"])
def test_a_lora_loaded_on_a_quantised_model_is_refused_and_all_can_be_taken_off(case, lora, first):
    folder, before, with_lora = lora
    pipe = runs.made(case)
    weights = dict(denoiser(pipe).named_parameters())
    h = da.quant_cache(pipe, cache=da.Cache.every(3), quant=QUANT)
    pipe.load_lora_weights(folder)
    with pytest.raises(RunError, match="fuse_lora"):
        runs.run(pipe, case, STEPS)
    if first == "unload":
        pipe.unload_lora_weights()
        h.remove()
    else:
        h.remove()
        assert gap(runs.run(pipe, case, STEPS), with_lora) < 1e-4
        pipe.unload_lora_weights()
    assert torch.equal(runs.run(pipe, case, STEPS), before)
    assert all(p is weights[name] for name, p in denoiser(pipe).named_parameters())


# ---------------------------------------------------------------------- calibrated
def test_an_artifact_belongs_to_its_adapters(case, lora):
    folder, cache = lora[0], da.Cache.every(3)
    without, with_ = runs.made(case), loaded(case, folder)
    made = artifact_for(without, case, cache)
    with pytest.raises(ArtifactError, match=r"adapters differs[\s\S]*none[\s\S]*default_0"):
        da.quant_cache(with_, cache=cache, artifact=made)
    with da.quant_cache(without, cache=cache, artifact=made):
        runs.run(without, case, STEPS)
        without.load_lora_weights(folder)
        with pytest.raises(ArtifactError, match=r"other adapters: none .*here \['default_0 at 1'\]"):
            runs.run(without, case, STEPS)
        without.fuse_lora()
        without.unload_lora_weights()
        with pytest.raises(ArtifactError, match="fused"):
            runs.run(without, case, STEPS)
    with da.quant_cache(with_, cache=cache, artifact=artifact_for(with_, case, cache)) as h:
        runs.run(with_, case, STEPS)
        assert h.report().compensated == STEPS


def test_an_artifact_belongs_to_the_strength_of_its_adapters(case, lora):
    cache, pipe = da.Cache.every(3), loaded(case, lora[0])
    pipe.set_adapters("default_0", 0.5)
    made = artifact_for(pipe, case, cache)
    pipe.set_adapters("default_0", 0.8)
    with pytest.raises(ArtifactError, match=r"adapters differs[\s\S]* at 0.5\)[\s\S]* at 0.8\)"):
        da.quant_cache(pipe, cache=cache, artifact=made)
    pipe.set_adapters("default_0", 0.5)
    with da.quant_cache(pipe, cache=cache, artifact=made):
        first = runs.run(pipe, case, STEPS)
        for change in (lambda: pipe.set_adapters("default_0", 0.8), pipe.disable_lora):
            change()
            with pytest.raises(ArtifactError, match=r"other adapters: \['default_0 at 0.5'\] .*here"):
                runs.run(pipe, case, STEPS)
            pipe.enable_lora()
            pipe.set_adapters("default_0", 0.5)
            assert torch.equal(runs.run(pipe, case, STEPS), first)


def test_a_lora_that_does_not_act_is_none(case, lora):
    pipe, cache = loaded(case, lora[0]), da.Cache.every(3)
    pipe.disable_lora()
    with da.quant_cache(pipe, cache=cache, artifact=artifact_for(runs.made(case), case, cache)):
        disabled = runs.run(pipe, case, STEPS)
    without = runs.made(case)
    with da.quant_cache(without, cache=cache, artifact=artifact_for(without, case, cache)):
        assert torch.equal(runs.run(without, case, STEPS), disabled)


def test_a_cache_follows_a_change_of_strength(case, lora):
    pipe, other = loaded(case, lora[0]), loaded(case, lora[0])
    other.set_adapters("default_0", 0.4)
    with da.quant_cache(other, cache=da.Cache.every(3)):
        expected = runs.run(other, case, STEPS)
    with da.quant_cache(pipe, cache=da.Cache.every(3)):
        assert gap(runs.run(pipe, case, STEPS), expected) > 1e-4
        pipe.set_adapters("default_0", 0.4)
        assert torch.equal(runs.run(pipe, case, STEPS), expected)
