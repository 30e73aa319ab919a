"""Small feature networks and image sets for tests of diffaccel.eval; nothing here needs the embedded weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch


class Pooled(torch.nn.Module):
    """uint8 (N, 3, H, W), H and W multiples of 4 -> (N, 12): mean colours of four quarters."""

    id = "pooled"
    num_features = 12

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1)


def coloured(n: int, seed: int = 0, size: int = 16, shift: float = 0.0) -> np.ndarray:
    """n uint8 images (n, size, size, 3) of a smooth random law."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(120 + shift, 30, (n, 2, 2, 3)).repeat(size // 2, 1).repeat(size // 2, 2)
    return (coarse + rng.normal(0, 5, coarse.shape)).clip(0, 255).astype(np.uint8)


def tiny_clip(folder: Path, pad: str | None = None):
    """(CLIPModel, CLIPProcessor) with random weights, 16 positions, 32 pixels."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from diffaccel.models import nets

    nets.write_tokenizer_files(folder)
    tokenizer = nets.tokenizer(folder)
    if pad:
        tokenizer.pad_token = pad
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=24)
    text = dict(
        shape,
        vocab_size=len(tokenizer),
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = CLIPConfig(text_config=text, vision_config=dict(shape, image_size=32, patch_size=8), projection_dim=24)
    torch.manual_seed(0)
    model = CLIPModel(config).eval().requires_grad_(False)
    image = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return model, CLIPProcessor(image_processor=image, tokenizer=tokenizer)


def inception_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights for FID's Inception that NumPy draws, key by key in sorted order, so that another project's module can be
    given the same ones."""
    from diffaccel.eval.inception import Inception

    rng, state = np.random.default_rng(seed), {}
    for key, old in sorted(Inception().state_dict().items()):
        x = rng.standard_normal(old.shape) if old.ndim else np.zeros(())
        if key.endswith("running_var"):
            x = 0.5 + x**2
        elif key.endswith("bn.weight"):
            x = 1 + 0.1 * x
        elif old.ndim > 1:
            x = x * (2 / x[0].size) ** 0.5
        else:
            x = 0.1 * x
        state[key] = torch.from_numpy(np.asarray(x)).to(old.dtype)
    return state
