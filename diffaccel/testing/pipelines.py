"""Tiny, randomly initialised diffusers pipelines built from configs alone: no hub, no files, no network.

Every builder returns a real pipeline class of diffusers with every component in place (text encoders, tokenizers made
in code, denoiser, VAE), small enough to run a few steps on one CPU core in well under a second. They are meant for
tests of schedulers and wrappers; the weights are random, so the pictures mean nothing.

    pipe = build("sdxl")                       # any of `names()`
    image = pipe(**call_kwargs("sdxl", num_inference_steps=4)).images[0]

The global random state is left as it was found.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffaccel.testing import transformer_pipelines, unet_pipelines
from diffaccel.testing.scheduler_configs import SCHEDULER_CONFIGS

__all__ = ["build", "call_kwargs", "denoiser", "known_region", "names", "picture", "reference_config"]

_BUILDERS = unet_pipelines.BUILDERS | transformer_pipelines.BUILDERS

_PROMPT: dict[str, Any] = {"prompt": "a red fox"}
_GUIDED: dict[str, Any] = {**_PROMPT, "height": 32, "width": 32, "guidance_scale": 4.0}
_SD3: dict[str, Any] = {**_GUIDED, "max_sequence_length": 16}
_FLUX: dict[str, Any] = {**_PROMPT, "height": 32, "width": 32, "guidance_scale": 3.5, "max_sequence_length": 16}
_WAN: dict[str, Any] = {**_PROMPT, "negative_prompt": "", "height": 16, "width": 16, "max_sequence_length": 16}
_IMG2IMG: dict[str, Any] = {**_PROMPT, "guidance_scale": 4.0, "strength": 0.75}
_CALLS: dict[str, dict[str, Any]] = {
    "sd15": _GUIDED,
    "sd15_img2img": _IMG2IMG,
    "sd15_inpaint": {**_GUIDED, "strength": 0.75},
    "sd15_inpaint_9ch": {**_GUIDED, "strength": 1.0},
    "sd15_controlnet": _GUIDED,
    "sdxl": _GUIDED,
    "sdxl_img2img": _IMG2IMG,
    "sdxl_inpaint": {**_GUIDED, "strength": 0.75},
    "sdxl_refiner": _IMG2IMG,
    "sdxl_controlnet": _GUIDED,
    "ddpm": {"batch_size": 2},
    "sd3": _SD3,
    "sd3_img2img": {**_SD3, "strength": 0.75},
    "flux": _FLUX,
    "flux_img2img": {**_FLUX, "strength": 0.75},
    "wan": {**_WAN, "num_frames": 5},
    "wan_video2video": {**_WAN, "strength": 0.75},
    "qwen_image": {**_PROMPT, "negative_prompt": " ", "true_cfg_scale": 2.0, "height": 32, "width": 32},
    "z_image": {**_GUIDED, "max_sequence_length": 32},
    "pixart": {**_GUIDED, "height": 16, "width": 16, "use_resolution_binning": False, "clean_caption": False},
    "dit": {"class_labels": [1, 2], "guidance_scale": 4.0},
}
_PIXELS_ONLY = ("dit", "ddpm")  # their pipelines know no output_type="latent"


def names() -> tuple[str, ...]:
    """The pipelines that `build` knows."""
    return tuple(_BUILDERS)


def reference_config(name: str) -> dict[str, Any]:
    """The scheduler settings of the published checkpoints of the family of `name`, as a fresh dict."""
    known = _known(name)
    return dict(next(config for family, config in SCHEDULER_CONFIGS.items() if _is_of(known, family)))


def build(name: str, *, seed: int = 0) -> DiffusionPipeline:
    """Build the tiny pipeline `name` on the CPU, in float32 and eval mode, with its progress bar off.

    Args:
        name: one of `names()`.
        seed: seed of the random weights; the caller's random state is not touched.

    Raises:
        ValueError: if `name` is unknown.
    """
    builder = _BUILDERS[_known(name)]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        pipe = builder()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser(pipe: DiffusionPipeline) -> torch.nn.Module:
    """The module whose calls are counted as model calls: `pipe.unet` or `pipe.transformer`."""
    return pipe.unet if "unet" in pipe.components else pipe.transformer


def call_kwargs(
    name: str, *, num_inference_steps: int = 4, seed: int = 0, output_type: str = "latent", **changes: Any
) -> dict[str, Any]:
    """Keyword arguments with which the pipeline `name` can be called; a fresh CPU generator each time.

    Args:
        name: one of `names()`.
        num_inference_steps: as the pipelines take it; with a `strength` they do that part of it.
        seed: seed of the generator, and of the picture or video where the pipeline takes one.
        output_type: "latent" skips the VAE. DiT and DDPM know no latent output; they get "np".
        changes: replace or add arguments, such as `strength=0.3` or `denoising_end=0.8`.
    """
    kwargs = dict(_CALLS[_known(name)])
    if name == "wan_video2video":
        kwargs["video"] = [_pil(picture(seed=seed + frame, size=16)) for frame in range(5)]
        # Embeddings, because this pipeline cleans a prompt with a package (ftfy) that diffusers does not install.
        kwargs |= {"prompt": None, "negative_prompt": None}
        kwargs |= {f"{kind}prompt_embeds": _embeddings(kind) for kind in ("", "negative_")}
    elif name.endswith(("_img2img", "_refiner", "_inpaint", "_inpaint_9ch", "_controlnet")):
        kwargs["image"] = picture(seed=seed)
    if "_inpaint" in name:
        kwargs["mask_image"] = 1.0 - known_region()
    if name in _PIXELS_ONLY and output_type == "latent":
        output_type = "np"
    return {
        **kwargs,
        "num_inference_steps": num_inference_steps,
        "generator": torch.Generator("cpu").manual_seed(seed),
        "output_type": output_type,
        **changes,
    }


def picture(*, seed: int = 0, size: int = 32) -> torch.Tensor:
    """A picture of three smooth waves, (1, 3, size, size) in [0, 1]: input of img2img, inpainting and ControlNet."""
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    waves = [torch.sin(2 * torch.pi * ((k + 1) * x + (seed % 5 + 1) * y + 0.3 * k)) for k in range(3)]
    return 0.5 + 0.5 * torch.stack(waves)[None]


def known_region(*, size: int = 32) -> torch.Tensor:
    """1 where inpainting keeps the picture (the left half), 0 where it paints; (1, 1, size, size)."""
    known = torch.zeros(1, 1, size, size)
    known[..., : size // 2] = 1.0
    return known


def _pil(image: torch.Tensor) -> Any:
    from PIL import Image

    return Image.fromarray((image[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def _embeddings(kind: str) -> torch.Tensor:
    return torch.randn(1, 16, 32, generator=torch.Generator("cpu").manual_seed(len(kind)))


def _is_of(name: str, family: str) -> bool:
    return name == family or name.startswith(family + "_")


def _known(name: str) -> str:
    if name not in _BUILDERS:
        raise ValueError(f"unknown tiny pipeline {name!r}; known: {', '.join(_BUILDERS)}")
    return name
