"""Tiny pipelines whose denoiser is a UNet: Stable Diffusion 1.5, SDXL and their relatives, DDPM."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffaccel.testing.parts import clip_config, controlnet, unet, vae
from diffaccel.testing.scheduler_configs import SCHEDULER_CONFIGS
from diffaccel.testing.tokenizers import clip_tokenizer

__all__ = ["BUILDERS"]


# ----------------------------------------------------------------------------------------- Stable Diffusion 1.5
def _sd15_parts(*, in_channels: int = 4) -> dict[str, Any]:
    return {
        "unet": unet(32, in_channels=in_channels),
        "vae": vae(),
        "text_encoder": CLIPTextModel(clip_config()),
        "tokenizer": clip_tokenizer(),
        "scheduler": PNDMScheduler(**SCHEDULER_CONFIGS["sd15"]),
        "safety_checker": None,
        "feature_extractor": None,
        "image_encoder": None,
        "requires_safety_checker": False,
    }


def _sd15() -> DiffusionPipeline:
    return StableDiffusionPipeline(**_sd15_parts())


def _sd15_img2img() -> DiffusionPipeline:
    return StableDiffusionImg2ImgPipeline(**_sd15_parts())


def _sd15_inpaint() -> DiffusionPipeline:
    """An ordinary checkpoint: the pipeline puts the known region back after each step."""
    return StableDiffusionInpaintPipeline(**_sd15_parts())


def _sd15_inpaint_9ch() -> DiffusionPipeline:
    """An inpainting checkpoint: mask and masked image are five more input channels, nothing is put back."""
    return StableDiffusionInpaintPipeline(**_sd15_parts(in_channels=9))


def _sd15_controlnet() -> DiffusionPipeline:
    return StableDiffusionControlNetPipeline(**_sd15_parts(), controlnet=controlnet(32))


# ------------------------------------------------------------------------------------------------------- SDXL
def _sdxl_sizes(text: int, ids: int) -> dict[str, Any]:
    """UNet settings for text features of width `text` pooled and `ids` numbers about size and crop."""
    return {
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": ids * 8 + text,
    }


def _sdxl_parts(*, in_channels: int = 4) -> dict[str, Any]:
    return {
        "unet": unet(64, in_channels=in_channels, **_sdxl_sizes(32, 6)),
        "vae": vae(),
        "text_encoder": CLIPTextModel(clip_config()),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": CLIPTextModelWithProjection(clip_config()),
        "tokenizer_2": clip_tokenizer(),
        "scheduler": EulerDiscreteScheduler(**SCHEDULER_CONFIGS["sdxl"]),
        "add_watermarker": False,
    }


def _sdxl() -> DiffusionPipeline:
    return StableDiffusionXLPipeline(**_sdxl_parts())


def _sdxl_img2img() -> DiffusionPipeline:
    return StableDiffusionXLImg2ImgPipeline(**_sdxl_parts())


def _sdxl_inpaint() -> DiffusionPipeline:
    return StableDiffusionXLInpaintPipeline(**_sdxl_parts())


def _sdxl_refiner() -> DiffusionPipeline:
    """Like the published refiner: the second text encoder alone, and an aesthetic score in place of a target size."""
    parts = _sdxl_parts() | {
        "unet": unet(32, **_sdxl_sizes(32, 5)),
        "text_encoder": None,
        "tokenizer": None,
        "requires_aesthetics_score": True,
    }
    return StableDiffusionXLImg2ImgPipeline(**parts)


def _sdxl_controlnet() -> DiffusionPipeline:
    return StableDiffusionXLControlNetPipeline(**_sdxl_parts(), controlnet=controlnet(64, **_sdxl_sizes(32, 6)))


# ------------------------------------------------------------------------------------------------------- pixels
def _ddpm() -> DiffusionPipeline:
    denoiser = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        norm_num_groups=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return DDPMPipeline(unet=denoiser, scheduler=DDPMScheduler(**SCHEDULER_CONFIGS["ddpm"]))


BUILDERS = {
    "sd15": _sd15,
    "sd15_img2img": _sd15_img2img,
    "sd15_inpaint": _sd15_inpaint,
    "sd15_inpaint_9ch": _sd15_inpaint_9ch,
    "sd15_controlnet": _sd15_controlnet,
    "sdxl": _sdxl,
    "sdxl_img2img": _sdxl_img2img,
    "sdxl_inpaint": _sdxl_inpaint,
    "sdxl_refiner": _sdxl_refiner,
    "sdxl_controlnet": _sdxl_controlnet,
    "ddpm": _ddpm,
}
