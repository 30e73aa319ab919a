"""Which checkpoint an artifact was made on, and what is said where another one is in use."""

from __future__ import annotations

import warnings

import pytest
import torch

from diffaccel.artifact import Artifact
from diffaccel.errors import ArtifactError, ArtifactWarning, OptionError
from diffaccel.identity import check_guidance, check_model, denoiser_of, model_identity
from diffaccel.testing.pipelines import build


def made(pipe, **meta):
    return Artifact("dc", {}, {"model": model_identity(pipe), **meta}, "mine.safetensors")


class Adapted(torch.nn.Module):
    """A layer under an adapter, with peft's names."""

    def __init__(self, base, name="style", scale=0.1):
        super().__init__()
        self.base_layer = base
        weight = torch.nn.Linear(base.in_features, 2, bias=False)
        torch.nn.init.constant_(weight.weight, scale)
        self.lora_A = torch.nn.ModuleDict({name: weight})

    def forward(self, x):
        return self.base_layer(x)


def load_lora(pipe, **options):
    block = pipe.unet.time_embedding
    block.linear_1 = Adapted(block.linear_1, **options)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_the_same_checkpoint_passes_in_silence(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArtifactWarning)
        check_model(made(build(name)), build(name))
        check_model(made(build(name)), denoiser_of(build(name)))


def test_the_identity_is_json_and_does_not_depend_on_where_the_weights_rest():
    pipe = build("sd15")
    before = model_identity(pipe)
    assert before == made(pipe).meta["model"]
    try:
        from accelerate import cpu_offload
    except ImportError:
        pytest.skip("accelerate is not installed")
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    assert next(pipe.unet.parameters()).device.type == "meta"
    assert model_identity(pipe) == before


def test_other_weights_are_an_error_and_by_request_a_warning():
    pipe = build("sd15")
    artifact = made(pipe)
    with torch.no_grad():
        pipe.unet.conv_in.weight[0, 0, 0, 0] += 1e-3
    with pytest.raises(ArtifactError, match=r"other weights[\s\S]*artifact: .*[\s\S]*model: [\s\S]*strict=False"):
        check_model(artifact, pipe)
    with pytest.warns(ArtifactWarning, match="other weights"):
        check_model(artifact, pipe, strict=False)
    both = (artifact.meta["model"]["weights_sha256"][:12], model_identity(pipe)["weights_sha256"][:12])
    with pytest.raises(ArtifactError) as caught:
        check_model(artifact, pipe)
    assert all(part in str(caught.value) for part in both)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_another_precision_is_a_warning_with_both_names(dtype):
    pipe = build("sd15")
    artifact = made(pipe)
    pipe.unet.to(dtype)
    with pytest.warns(ArtifactWarning, match=rf"calibrated in float32.*{str(dtype)[6:]}"):
        check_model(artifact, pipe)
    with torch.no_grad():
        for weight in pipe.unet.parameters():
            weight.mul_(1.05)
    with pytest.raises(ArtifactError, match="other weights"):
        check_model(artifact, pipe)


def test_another_model_is_an_error_that_strict_does_not_soften():
    for other in (build("sdxl"), build("dit")):
        with pytest.raises(ArtifactError, match=r"another model[\s\S]*UNet2DConditionModel"):
            check_model(made(build("sd15")), other, strict=False)


def test_a_lora_loaded_after_the_calibration_is_a_warning_with_both_sides():
    pipe = build("sd15")
    artifact = made(pipe)
    load_lora(pipe)
    with pytest.warns(ArtifactWarning, match=r"artifact: none[\s\S]*model: .*style \("):
        check_model(artifact, pipe)


def test_the_lora_that_it_was_calibrated_with_passes_and_another_does_not():
    pipe, same, other, without = (build("sd15") for _ in range(4))
    for one, options in ((pipe, {}), (same, {}), (other, {"scale": 0.2})):
        load_lora(one, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArtifactWarning)
        check_model(made(pipe), same)
    for wrong in (other, without):
        with pytest.warns(ArtifactWarning, match="adapters differ"):
            check_model(made(pipe), wrong)


def test_guidance_by_more_than_a_factor_of_two_is_a_warning():
    artifact = made(build("sd15"), guidance=4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArtifactWarning)
        check_guidance(artifact, 7.5)
    for scale in (1.0, 9.0):
        with pytest.warns(ArtifactWarning, match=rf"guidance 4, this run uses {scale:g}"):
            check_guidance(artifact, scale)


def test_what_says_nothing_of_its_checkpoint_is_refused():
    with pytest.raises(ArtifactError, match="does not say which checkpoint"):
        check_model(Artifact("dc", {}), build("sd15"))
    pipe = build("sd15")
    pipe.unet = None
    with pytest.raises(OptionError, match="transformer, unet"):
        model_identity(pipe)
