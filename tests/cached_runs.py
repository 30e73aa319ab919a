"""Runs of tiny pipelines in which each image of a batch has a prompt, a seed and a size of state of its own."""

from __future__ import annotations

from typing import Any

import hooked_runs
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffaccel.testing.pipelines import build, call_kwargs

PROMPTS = ("a red fox", "an oil painting of two boats in a storm, very detailed", "x")
SCALES = (1.0, 3.0, 0.2)  # of the initial states: batch mates of very different size
# name -> (tiny pipeline, scheduler or None for its own, further arguments)
BATCHES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "flux": ("flux", None, {}),
    "flux-cfg": ("flux", None, hooked_runs.FLUX_CFG),
    "sd3": ("sd3", None, {}),
    "qwen": ("qwen_image", None, {}),
    "wan": ("wan", FlowMatchEulerDiscreteScheduler, {}),
    "dit": ("dit", DDIMScheduler, {}),
    "sd15": ("sd15", DDIMScheduler, {}),
    "ddpm": ("ddpm", DDIMScheduler, {}),
}


def made(case: str) -> Any:
    """The pipeline of a case."""
    name, kind, _ = BATCHES[case]
    pipe = build(name)
    if kind is not None:
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    return pipe


def batch(pipe: Any, case: str, images: tuple[int, ...], steps: int = 12, **changes: Any) -> torch.Tensor:
    """Results of some of the three images, generated together."""
    name, _, more = BATCHES[case]
    given = call_kwargs(name, num_inference_steps=steps, **{**more, **changes})
    given["generator"] = [torch.Generator().manual_seed(k) for k in images]
    if name == "dit":
        given["class_labels"] = [k + 1 for k in images]
    elif name == "ddpm":
        given["batch_size"] = len(images)
    else:
        given["prompt"] = [PROMPTS[k] for k in images]
    for key in ("negative_prompt",):
        if key in given:
            given[key] = [given[key]] * len(images)
    scales = [SCALES[k] for k in images]
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    if not hasattr(pipe, "prepare_latents"):
        return _tensor(pipe(**given)[0])
    true = pipe.prepare_latents

    def prepare(*args: Any, **kwargs: Any) -> Any:
        found = true(*args, **kwargs)
        latents = found[0] if isinstance(found, tuple) else found
        assert len(latents) == len(scales), type(model).__name__
        latents = latents * latents.new_tensor(scales).reshape(-1, *[1] * (latents.ndim - 1))
        return (latents, *found[1:]) if isinstance(found, tuple) else latents

    pipe.prepare_latents = prepare
    try:
        return _tensor(pipe(**given)[0])
    finally:
        del pipe.prepare_latents


def _tensor(found: Any) -> torch.Tensor:
    return found if isinstance(found, torch.Tensor) else torch.as_tensor(found)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the larger of 1 and the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1))
