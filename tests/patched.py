"""Tiny denoisers that are shared by emulated ranks; what tests of patch parallelism share. No test file."""

from __future__ import annotations

import functools

import torch
from diffusers import SD3Transformer2DModel, UNet2DModel

from diffaccel.parallel.patch import PatchHook
from diffaccel.parallel.patch_arguments import arguments
from diffaccel.parallel.patch_settings import Settings
from diffaccel.parallel.world_emulated import EmulatedWorld
from diffaccel.testing.pipelines import build, denoiser

patches = functools.partial(Settings, guidance="patches")  # a batch of two would be split between two ranks
MODELS = ("sd15", "sdxl", "ddpm", "old_ddpm", "sd3", "sd35", "flux")
MODES = ("displaced", "partial", "fresh_halo")


@functools.cache
def model(name: str) -> torch.nn.Module:
    """A tiny denoiser in which no parameter is a trivial zero or one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "old_ddpm":  # pads at the bottom and on the right alone, and normalises tokens
            found = UNet2DModel(
                16,
                3,
                3,
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                block_out_channels=(8, 16),
                layers_per_block=1,
                norm_num_groups=4,
                attention_head_dim=4,
                downsample_padding=0,
            )
        elif name == "sd35":  # a second attention, of image tokens alone
            sizes = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16}
            found = SD3Transformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                caption_projection_dim=16,
                pooled_projection_dim=16,
                dual_attention_layers=(0,),
                qk_norm="rms_norm",
                **sizes,
            )
        else:
            found = denoiser(build(name))
        for part in found.modules():
            if isinstance(part, (torch.nn.GroupNorm, torch.nn.LayerNorm)) and part.weight is not None:
                torch.nn.init.normal_(part.weight)
                torch.nn.init.normal_(part.bias)
    return found.eval().requires_grad_(False)


def call(shared: torch.nn.Module, height: int, width: int, batch: int, time: float = 1.0, seed: int = 0):
    given = arguments(shared, height, width, batch, 7, seed=seed)
    given["timestep"] = given["timestep"] * time
    return shared(**given, return_dict=False)[0]


def run(name, ranks, settings, times=(1.0,), size=(16, 12), batch=2, seeds=None, world=None):
    """Outputs of a chain of calls, and the world."""
    world = world or EmulatedWorld(ranks, timeout=20)
    hook = PatchHook(world, settings)
    hook.attach(model(name))
    try:
        return [call(model(name), *size, batch, t, (seeds or [0] * len(times))[i]) for i, t in enumerate(times)], world
    finally:
        hook.detach(model(name))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference, in units of the largest output."""
    return float((got - want).abs().max() / want.abs().max())
