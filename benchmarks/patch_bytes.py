"""Bytes, waits and memory of patch parallelism for real model sizes, as docs/patch_parallel.md has them.

    python benchmarks/patch_bytes.py

Nothing is run or downloaded: the models are built on the meta device from their published sizes, and
`diffaccel.parallel.patch_cost` counts what their layers exchange (the tests compare its counts with real traffic).
"""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

from diffaccel.parallel.patch_cost import costs
from diffaccel.parallel.patch_settings import Settings

MODES = ("displaced", "fresh_halo", "partial")


def sdxl() -> torch.nn.Module:
    """The UNet of SDXL base."""
    return UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )


def sd15() -> torch.nn.Module:
    """The UNet of SD 1.5."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


def sd3() -> torch.nn.Module:
    """The transformer of SD3 medium."""
    sizes = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
    return SD3Transformer2DModel(sample_size=128, **sizes)


def flux() -> torch.nn.Module:
    """The transformer of FLUX.1 dev."""
    return FluxTransformer2DModel(guidance_embeds=True)


def main() -> None:
    """Print a row for each model and number of ranks."""
    print("megabytes that a rank receives in a call, float16, one image, all ranks as patches, mean over ranks")
    for name, make, latent, worlds in (
        ("SDXL 1024", sdxl, 128, (2, 4, 8)),
        ("SD 1.5 512", sd15, 64, (4,)),
        ("SD3 medium 1024", sd3, 128, (4,)),
        ("FLUX 1024", flux, 128, (4,)),
    ):
        with torch.device("meta"):
            model = make().half()
        for ranks in worlds:
            found = {mode: costs(model, latent, latent, ranks, Settings(mode, guidance="patches")) for mode in MODES}
            published = sum(sum(kinds.values()) for kinds in found["displaced"].published) / ranks / 1e6
            print(f"{name}, p = {ranks}: DistriFusion as published {published:.1f}")
            for mode, cost in found.items():
                received = sum(sum(kinds.values()) for kinds in cost.bytes) / ranks / 1e6
                waited = sum(cost.waits.values())
                print(f"  {mode:10} {received:7.1f}; {cost.memory / 1e6:.0f} MB kept; {waited} exchanges waited for")


if __name__ == "__main__":
    main()
