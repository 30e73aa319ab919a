"""Tiny pipelines for the tests of hooks: schedulers that hooks can follow, and denoisers that count their calls."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from diffaccel.testing.pipelines import build, call_kwargs

FLUX_CFG = {"true_cfg_scale": 2.0, "negative_prompt": "a cat"}
# name -> (tiny pipeline, scheduler class or None for its own, further arguments, calls of the model a step)
CASES: dict[str, tuple[str, Any, dict[str, Any], int]] = {
    "sd15": ("sd15", EulerDiscreteScheduler, {}, 1),
    "sd15-ddim": ("sd15", DDIMScheduler, {}, 1),
    "sdxl": ("sdxl", None, {}, 1),
    "sd3": ("sd3", None, {}, 1),
    "flux": ("flux", None, {}, 1),
    "flux-cfg": ("flux", None, FLUX_CFG, 2),
    "qwen": ("qwen_image", None, {}, 2),
    "wan": ("wan", None, {}, 2),
}


def made(case: str) -> Any:
    """The pipeline of a case."""
    name, kind, _, _ = CASES[case]
    pipe = build(name)
    if kind is not None:
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    return pipe


def run(pipe: Any, case: str, steps: int = 14, **changes: Any) -> torch.Tensor:
    """Latents of one run."""
    name, _, more, _ = CASES[case]
    return pipe(**call_kwargs(name, num_inference_steps=steps, **{**more, **changes}))[0]


class Counter:
    """What was seen by the inner forward of a module."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)


@contextlib.contextmanager
def counted(module: torch.nn.Module) -> Iterator[Counter]:
    """Count the calls that reach the module itself; to be entered before a hook is attached."""
    seen = Counter()

    # hooks of diffusers replace `forward`, so the first block of the model is watched instead of the model
    first = module.conv_in if hasattr(module, "conv_in") else embedder(module)
    handle = first.register_forward_pre_hook(lambda _, args: seen.rows.append(len(args[0])))
    try:
        yield seen
    finally:
        handle.remove()


def embedder(module: torch.nn.Module) -> torch.nn.Module:
    """The first layer of a transformer."""
    for name in ("x_embedder", "img_in", "patch_embedding", "pos_embed"):
        if hasattr(module, name):
            return getattr(module, name)
    raise AssertionError(f"no first layer known of {type(module).__name__}")


def last_block(model: torch.nn.Module) -> torch.nn.Module:
    """The last block of a transformer."""
    name = next(n for n in ("single_transformer_blocks", "transformer_blocks", "blocks") if hasattr(model, n))
    return getattr(model, name)[-1]


def clean(module: torch.nn.Module) -> bool:
    """Whether no part of a model has a hook, or a forward of its own."""
    registries = (part.__dict__.get("_diffusers_hook") for part in module.modules())
    return not any(r.hooks for r in registries if r) and not any("forward" in p.__dict__ for p in module.modules())


def with_ddim(name: str) -> Any:
    """A tiny pipeline whose own scheduler repeats timesteps, with one that does not."""
    pipe = build(name)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    return pipe


def two_experts() -> Any:
    """Wan 2.2: two transformers, the second one for the second part of a run."""
    from diffusers import WanPipeline

    pipe = build("wan")
    second = copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        for p in second.parameters():
            p.mul_(0.9)
    made = WanPipeline(**{**pipe.components, "transformer_2": second}, boundary_ratio=0.875)
    made.set_progress_bar_config(disable=True)
    return made
