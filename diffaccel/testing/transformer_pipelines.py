"""Tiny pipelines whose denoiser is a transformer: flow matching (images and video), PixArt and DiT."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
)

from diffaccel.testing.parts import clip_config, t5_encoder, umt5_encoder, vae
from diffaccel.testing.scheduler_configs import SCHEDULER_CONFIGS
from diffaccel.testing.tokenizers import chat_tokenizer, clip_tokenizer, t5_tokenizer

__all__ = ["BUILDERS"]


def _flow_scheduler(name: str) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**SCHEDULER_CONFIGS[name])


# --------------------------------------------------------------------------------------------------- SD3, FLUX
def _sd3_parts() -> dict[str, Any]:
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=64,
        pooled_projection_dim=64,
    )
    return {
        "transformer": transformer,
        "vae": vae(quant=False, shift_factor=0.0609, scaling_factor=1.5035),
        "text_encoder": CLIPTextModelWithProjection(clip_config()),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": CLIPTextModelWithProjection(clip_config()),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": t5_encoder(64),
        "tokenizer_3": t5_tokenizer(),
        "scheduler": _flow_scheduler("sd3"),
        "image_encoder": None,
        "feature_extractor": None,
    }


def _sd3() -> DiffusionPipeline:
    return StableDiffusion3Pipeline(**_sd3_parts())


def _sd3_img2img() -> DiffusionPipeline:
    return StableDiffusion3Img2ImgPipeline(**_sd3_parts())


def _flux_parts() -> dict[str, Any]:
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,  # 4 latent channels, packed 2 x 2
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return {
        "transformer": transformer,
        "vae": vae(quant=False, shift_factor=0.1159, scaling_factor=0.3611),
        "text_encoder": CLIPTextModel(clip_config()),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": t5_encoder(),
        "tokenizer_2": t5_tokenizer(),
        "scheduler": _flow_scheduler("flux"),
        "image_encoder": None,
        "feature_extractor": None,
    }


def _flux() -> DiffusionPipeline:
    return FluxPipeline(**_flux_parts())


def _flux_img2img() -> DiffusionPipeline:
    return FluxImg2ImgPipeline(**_flux_parts())


# --------------------------------------------------------------------------------------------------------- Wan
def _wan_parts() -> dict[str, Any]:
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=64,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    autoencoder = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return {
        "transformer": transformer,
        "vae": autoencoder,
        "text_encoder": umt5_encoder(),
        "tokenizer": t5_tokenizer(),
        "scheduler": UniPCMultistepScheduler(**SCHEDULER_CONFIGS["wan"]),
    }


def _wan() -> DiffusionPipeline:
    return WanPipeline(**_wan_parts(), transformer_2=None)


def _wan_video2video() -> DiffusionPipeline:
    return WanVideoToVideoPipeline(**_wan_parts())


# ------------------------------------------------------------------------------------------ Qwen-Image, Z-Image
def _qwen_image() -> DiffusionPipeline:
    tokenizer = chat_tokenizer()
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    marks = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    marks |= {f"{name}_token_id": name for name in ("vision_start", "vision_end")}
    ids = {key: tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for key, mark in marks.items()}
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )
    autoencoder = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return QwenImagePipeline(
        transformer=transformer,
        vae=autoencoder,
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
        ),
        tokenizer=tokenizer,
        scheduler=_flow_scheduler("qwen_image"),
    )


def _z_image() -> DiffusionPipeline:
    tokenizer = chat_tokenizer()
    encoder = Qwen3Config(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
    )
    transformer = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        qk_norm=True,
        cap_feat_dim=16,
        rope_theta=256.0,
        t_scale=1000.0,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token, std=0.02)  # made with torch.empty: whatever was in memory
    return ZImagePipeline(
        transformer=transformer,
        vae=vae(quant=False, shift_factor=0.1159, scaling_factor=0.3611),
        text_encoder=Qwen3Model(encoder),
        tokenizer=tokenizer,
        scheduler=_flow_scheduler("z_image"),
    )


# ------------------------------------------------------------------------- noise prediction with learned variance
def _pixart() -> DiffusionPipeline:
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        out_channels=8,  # learned variance, which the pipeline drops
        cross_attention_dim=24,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        use_additional_conditions=False,
    )
    return PixArtAlphaPipeline(
        transformer=transformer,
        vae=vae(),
        text_encoder=t5_encoder(),
        tokenizer=t5_tokenizer(),
        scheduler=DPMSolverMultistepScheduler(**SCHEDULER_CONFIGS["pixart"]),
    )


def _dit() -> DiffusionPipeline:
    transformer = DiTTransformer2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,  # learned variance, which the pipeline drops
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,  # the pipeline's null class is number 1000
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return DiTPipeline(
        transformer=transformer,
        vae=vae(),
        scheduler=DDIMScheduler(**SCHEDULER_CONFIGS["dit"]),
        id2label={i: f"class {i}" for i in range(1000)},
    )


BUILDERS = {
    "sd3": _sd3,
    "sd3_img2img": _sd3_img2img,
    "flux": _flux,
    "flux_img2img": _flux_img2img,
    "wan": _wan,
    "wan_video2video": _wan_video2video,
    "qwen_image": _qwen_image,
    "z_image": _z_image,
    "pixart": _pixart,
    "dit": _dit,
}
