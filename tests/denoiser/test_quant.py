"""Quantised denoisers: error, what is left alone, the way back, recipes, batch mates, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel
from diffusers.hooks import HookRegistry, ModelHook

from diffaccel.denoiser.quant import Quant, quantise
from diffaccel.errors import ArtifactError, OptionError, RunError
from diffaccel.identity import model_identity

pytest.importorskip("torchao", reason="the extra 'quant' is not installed")
from torchao.quantization import PerRow


@pytest.fixture(scope="module")
def original():
    """Three blocks of real width, random weights."""
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=3, sample_size=16,
        patch_size=2, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip


@pytest.fixture
def model(original):
    return copy.deepcopy(original)


def answer(model, rows=2, scale=1.0):
    x = torch.randn((3, 4, 16, 16), generator=torch.Generator().manual_seed(1))
    x[1:] *= scale
    with torch.no_grad():
        label = torch.arange(3)
        return model(x[:rows], timestep=torch.full((rows,), 5), class_labels=label[:rows]).sample


def relative(a, b):
    return float((a - b).norm() / b.norm())


# ---------------------------------------------------------------------- what it does
def test_int8_is_within_two_percent_and_leaves_embedders_and_modulation(model):
    before = answer(model)
    done = quantise(model, "w8a8")
    assert 1e-5 < relative(answer(model), before) < 2e-2
    assert len(done.layers) == 18 and all(name.startswith("transformer_blocks.") for name in done.layers)
    assert {reason: len(names) for reason, names in done.skipped.items()} == {
        "outside the blocks": 2,  # proj_out_1 and proj_out_2
        "embedding or modulation": 9,
    }
    assert "18 linear layers" in str(done)


def test_undo_gives_the_same_weights_back(model):
    before, weights = answer(model), dict(model.named_parameters())
    described = repr(model)
    done = quantise(model, "w8a8")
    done.undo()
    done.undo()  # twice is fine
    assert torch.equal(answer(model), before)
    assert all(p is weights[name] for name, p in model.named_parameters())
    assert repr(model) == described and not model._forward_pre_hooks
    quantise(model, "w8")  # and again, otherwise


def test_weights_only_is_more_exact(model):
    before = answer(model)
    quantise(model, "w8")
    assert 1e-6 < relative(answer(model), before) < 5e-3


def test_skipped_layers_stay(model):
    done = quantise(model, Quant("w8a8", skip=("*.ff.*",)))
    assert len(done.layers) == 12 and len(done.skipped["by skip="]) == 6
    assert type(model.transformer_blocks[0].ff.net[2].weight) is torch.nn.Parameter


def test_a_deep_copy_answers_the_same_and_guards_itself(model):
    quantise(model, "w8a8")
    twin = copy.deepcopy(model)
    assert torch.equal(answer(twin), answer(model))
    twin.to(torch.bfloat16)
    with pytest.raises(RunError, match="bfloat16"):
        answer(twin)
    answer(model)


def test_a_quantised_model_has_an_identity_of_its_own(model):
    plain, found = model_identity(model), []
    for mode in ("w8a8", "w8"):
        done = quantise(model, mode)
        found.append(model_identity(model))
        assert found[-1] == model_identity(model) and "int8" in found[-1]["dtype"]
        done.undo()
    assert plain["weights_sha256"] not in [f["weights_sha256"] for f in found] and model_identity(model) == plain


# ---------------------------------------------------------------------- batch mates
def test_a_quantised_layer_is_bitwise_independent_of_batch_mates(model):
    quantise(model, "w8a8")
    layer = model.transformer_blocks[1].attn1.to_q
    x = torch.randn((3, 64, 256), generator=torch.Generator().manual_seed(2))
    x[1:] *= 30
    with torch.no_grad():
        assert torch.equal(layer(x)[:1], layer(x[:1]))


def test_the_model_is_independent_of_batch_mates_up_to_int8_noise(model):
    quantise(model, "w8a8")
    alone = answer(model, rows=1)
    assert relative(answer(model, rows=3, scale=30.0)[:1], alone) < 2e-2


# ---------------------------------------------------------------------- recipes
def test_a_recipe_makes_the_same_model_again(model, original, tmp_path):
    done = quantise(model, Quant("w8a8", skip=("*.ff.net.2",)))
    done.save(tmp_path / "recipe.safetensors")
    again = copy.deepcopy(original)
    followed = quantise(again, tmp_path / "recipe.safetensors")
    assert followed.layers == done.layers
    assert torch.equal(answer(again), answer(model))


def test_a_recipe_of_another_checkpoint(model, original, tmp_path):
    quantise(model, "w8a8").save(tmp_path / "recipe.safetensors")
    other = copy.deepcopy(original)
    with torch.no_grad():
        other.proj_out_2.weight.add_(1.0)
    with pytest.raises(ArtifactError, match="weights_sha256"):
        quantise(other, tmp_path / "recipe.safetensors")


def test_where_int8_products_overflow_half_of_the_range_is_used(model, original, tmp_path, monkeypatch):
    """A CPU without VNNI: pairs of products are summed in 16 bits."""
    before = answer(model)
    monkeypatch.setattr("torchao.utils.should_reduce_range", lambda device: device.type == "cpu")
    done = quantise(model, "w8a8")
    first = model.transformer_blocks[0].attn1.to_q
    assert int(first.weight.qdata.min()) >= -64 and int(first.weight.qdata.max()) == 63
    assert 1e-5 < relative(answer(model), before) < 2e-2
    assert done.scale[0] * 63.5 == pytest.approx(float(model.get_submodule(done.scale[1]).diffaccel_peak))
    done.save(tmp_path / "recipe.safetensors")
    monkeypatch.undo()
    monkeypatch.setattr("torchao.utils.should_reduce_range", lambda device: False)
    with pytest.raises(ArtifactError, match="VNNI"):
        quantise(copy.deepcopy(original), tmp_path / "recipe.safetensors")


def test_scales_are_those_that_torchao_computes(model):
    done = quantise(model, "w8a8")
    layer = model.get_submodule(done.layers[3])
    seen = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    answer(model)
    made = type(layer.weight).from_hp(seen[0], PerRow())
    assert float(layer.diffaccel_peak) / 127.5 == pytest.approx(float(made.scale.max()), rel=1e-6)
    assert done.scale[0] >= float(made.scale.max())


# ---------------------------------------------------------------------- refusals
def test_nothing_to_quantise():
    narrow = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    with pytest.raises(OptionError, match=r"no layer of this FluxTransformer2DModel.*min_features"):
        quantise(narrow, "w8a8")
    # the feed-forward of a single block is called as the last projection of others; it is inside a block
    assert "single_transformer_blocks.0.proj_out" in quantise(narrow, Quant("w8a8", min_features=16)).layers


def test_a_pattern_without_effect(model):
    with pytest.raises(OptionError, match=r"no_such_layer.*none of the 29"):
        quantise(model, Quant("w8a8", skip=("no_such_layer",)))


def test_a_second_quantisation(model):
    quantise(model, "w8a8")
    with pytest.raises(OptionError, match="quantised already"):
        quantise(model, "w8")


@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_a_conversion_afterwards(model, convert):
    quantise(model, "w8a8")
    convert(model)
    with pytest.raises(RunError, match="converted"):
        answer(model)


def test_an_adapter_before_or_afterwards(model):
    # the attribute that diffusers' add_adapter sets; peft itself is not needed to see it
    model._hf_peft_config_loaded = True
    with pytest.raises(OptionError, match="fuse_lora"):
        quantise(model, "w8a8")
    model._hf_peft_config_loaded = False
    quantise(model, "w8a8")
    model._hf_peft_config_loaded = True
    with pytest.raises(RunError, match="fuse_lora"):
        answer(model)


def test_hooks_and_compilation_come_later(model):
    HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[0]).register_hook(ModelHook(), "mine")
    with pytest.raises(OptionError, match="mine"):
        quantise(model, "w8a8")


def test_a_compiled_block(model):
    model.transformer_blocks[0].compile()
    with pytest.raises(OptionError, match="compiled"):
        quantise(model, "w8a8")


def test_where_it_would_be_slower_or_cannot_run(model):
    with pytest.raises(OptionError, match="CUDA"):
        quantise(model, "fp8")
    with pytest.raises(OptionError, match="slower"):
        quantise(model.to(torch.bfloat16), "w8a8")
    with pytest.raises(OptionError, match="meta"):
        quantise(model.to("meta"), "w8a8")


def test_freed_weights_cannot_come_back(model):
    done = quantise(model, Quant("w8a8", keep_float=False))
    with pytest.raises(RunError, match="load the pipeline again"):
        done.undo()


def test_unknown_words():
    with pytest.raises(OptionError, match="w8a8"):
        Quant("int8")
    with pytest.raises(OptionError, match="backend"):
        Quant("w8a8", backend="numpy")
    with pytest.raises(OptionError, match="w8a8"):
        quantise(torch.nn.Linear(2, 2), "w4a4")
