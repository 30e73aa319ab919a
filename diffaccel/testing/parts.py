"""Tiny, randomly initialised components that several pipelines share: text encoders, VAE, UNet, ControlNet."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextConfig, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from diffaccel.testing.tokenizers import BYTES

__all__ = ["clip_config", "controlnet", "t5_encoder", "umt5_encoder", "unet", "vae"]


# ------------------------------------------------------------------------------------------------- text encoders
def clip_config(hidden: int = 32) -> CLIPTextConfig:
    """For a CLIP text encoder behind `clip_tokenizer()`."""
    return CLIPTextConfig(
        vocab_size=BYTES + 3,
        pad_token_id=BYTES,
        bos_token_id=BYTES + 1,
        eos_token_id=BYTES + 2,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=hidden,
        num_attention_heads=4,
        num_hidden_layers=2,
        hidden_act="gelu",
    )


def _t5_sizes(hidden: int) -> dict[str, int]:
    vocabulary = {"vocab_size": BYTES + 2, "pad_token_id": BYTES, "eos_token_id": BYTES + 1}
    return vocabulary | {"d_model": hidden, "d_ff": 2 * hidden, "d_kv": 8, "num_layers": 2, "num_heads": 4}


def t5_encoder(hidden: int = 32) -> T5EncoderModel:
    """A T5 encoder behind `t5_tokenizer()`."""
    return T5EncoderModel(T5Config(**_t5_sizes(hidden)))


def umt5_encoder(hidden: int = 32) -> UMT5EncoderModel:
    """A UMT5 encoder behind `t5_tokenizer()`."""
    return UMT5EncoderModel(UMT5Config(**_t5_sizes(hidden)))


# ---------------------------------------------------------------------------------------- autoencoder, denoisers
def vae(latent_channels: int = 4, *, levels: int = 2, quant: bool = True, **more: Any) -> AutoencoderKL:
    """An image VAE that scales by 2**(levels - 1)."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=latent_channels,
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        force_upcast=False,  # nothing to gain at this size, and SDXL warns at every image
        **more,
    )


_BLOCKS: dict[str, Any] = {
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "attention_head_dim": 2,
}


def unet(cross: int, *, in_channels: int = 4, **more: Any) -> UNet2DConditionModel:
    """A text-conditioned UNet on 16 x 16 latents with text features of width `cross`."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=in_channels,
        out_channels=4,
        cross_attention_dim=cross,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **{**_BLOCKS, **more},
    )


def controlnet(cross: int, **more: Any) -> ControlNetModel:
    """A ControlNet for `unet(cross, **more)` whose control image has twice the size of the latents."""
    model = ControlNetModel(
        in_channels=4,
        cross_attention_dim=cross,
        conditioning_embedding_out_channels=(4, 8),
        **{**_BLOCKS, **more},
    )
    # Its last convolutions start at zero, which would make the control image do nothing.
    zero = [model.controlnet_mid_block, model.controlnet_cond_embedding.conv_out, *model.controlnet_down_blocks]
    for layer in zero:
        torch.nn.init.normal_(layer.weight, std=0.1)
    return model
