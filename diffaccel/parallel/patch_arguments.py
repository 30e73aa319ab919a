"""Random arguments of the denoisers that can be shared: to look at shapes, and to compare with one process."""

from __future__ import annotations

from typing import Any

import torch

from .layers_found import family_of


def image_tokens(model: Any, height: int, width: int) -> int:
    """Image tokens of a transformer for a latent of this size, of which FLUX packs 2 x 2 into one; 0 for a UNet."""
    if family_of(model).rows:
        return 0
    side = 2 if _packed(model) else model.config.patch_size
    return (height // side) * (width // side)


def _packed(model: Any) -> bool:
    return "img_ids" in family_of(model).cut


def arguments(
    model: Any, height: int, width: int, batch: int, text: int, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """Random arguments of a call of a known denoiser, for a latent of this size."""
    dtype, config = next(model.parameters()).dtype, model.config
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    if family_of(model).rows:
        found: dict[str, Any] = {"sample": noise(batch, config.in_channels, height, width)}
        found["timestep"] = torch.tensor(500.0)
        if config.get("cross_attention_dim"):
            found["encoder_hidden_states"] = noise(batch, text, config.cross_attention_dim)
        if config.get("addition_embed_type") == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            found["added_cond_kwargs"] = {"text_embeds": noise(batch, pooled), "time_ids": noise(batch, 6)}
        if config.get("num_class_embeds"):
            found["class_labels"] = torch.zeros(batch, dtype=torch.long, device=device)
        return found
    found = {"encoder_hidden_states": noise(batch, text, config.joint_attention_dim)}
    found["pooled_projections"] = noise(batch, config.pooled_projection_dim)
    if not _packed(model):
        return {
            **found,
            "hidden_states": noise(batch, config.in_channels, height, width),
            "timestep": torch.full((batch,), 500.0, dtype=dtype, device=device),
        }
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    ids = torch.stack((torch.zeros_like(rows), rows, columns), -1).reshape(-1, 3).to(device, dtype)
    found |= {"hidden_states": noise(batch, len(ids), config.in_channels), "img_ids": ids}
    found |= {"txt_ids": torch.zeros(text, 3, dtype=dtype, device=device)}
    found["timestep"] = torch.full((batch,), 0.5, dtype=dtype, device=device)
    if config.guidance_embeds:
        found["guidance"] = torch.full((batch,), 3.5, dtype=dtype, device=device)
    return found
