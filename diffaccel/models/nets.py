"""Architectures of the embedded models: stock diffusers and transformers classes, and one small CNN."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from .words import BACKGROUNDS, COLOURS, N_MEANINGS, THINGS, all_captions

MAX_TOKENS = 16
START, END = "<|startoftext|>", "<|endoftext|>"


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def write_tokenizer_files(folder: str | Path, merges: int = 80) -> None:
    """Learn byte-pair merges on the captions and write `vocab.json`, `merges.txt`: 2*256 + merges + 2 entries."""
    words = Counter(w for c in all_captions() for w in c.replace(",", " ,").replace("-", " - ").split())
    split = {w: [*w[:-1], w[-1] + "</w>"] for w in words}
    learned: list[tuple[str, str]] = []
    while len(learned) < merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in split.items():
            for pair in pairwise(pieces):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))  # ties by spelling, so that a rerun gives the same file
        learned.append(best)
        for word, pieces in split.items():
            merged, i = [], 0
            while i < len(pieces):
                hit = tuple(pieces[i : i + 2]) == best
                merged.append("".join(best) if hit else pieces[i])
                i += 2 if hit else 1
            split[word] = merged
    alphabet = _byte_alphabet()
    vocab = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(p) for p in learned), START, END]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({w: i for i, w in enumerate(vocab)}, ensure_ascii=False), encoding="utf-8"
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in learned), encoding="utf-8")


def tokenizer(folder: str | Path):
    """CLIPTokenizer over the files written by `write_tokenizer_files`; 16 positions, padded with the end token."""
    from transformers import CLIPTokenizer

    folder = Path(folder)
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=MAX_TOKENS,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
    )


def clip(tok):
    """`tiny-clip`: 0.65 M parameters; text 3 x 96, vision 3 x 96 on 8-pixel patches of 32 pixels, projection 64."""
    from transformers import CLIPConfig, CLIPModel

    shape = dict(hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=3, projection_dim=64)
    text = dict(
        shape,
        vocab_size=len(tok),
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config=dict(shape, image_size=32, patch_size=8), projection_dim=64)
    )


def vae():
    """`tiny-vae`: f = 4, eight latent channels, widths (32, 48, 64). The log-variance starts at -3."""
    from diffusers import AutoencoderKL

    net = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=16,
        mid_block_add_attention=False,
        sample_size=32,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    with torch.no_grad():
        net.quant_conv.bias[8:] = -3.0
    return net


def sd_unet():
    """`tiny-sd` denoiser: 8x8x8 latents, widths (64, 96), cross-attention width 96 (4 heads)."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def flow_transformer(layers: int = 4):
    """`tiny-flow` denoiser: 64 tokens of an 8x8x8 latent, width 128. Modulation and output start at zero."""
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=8,
        out_channels=8,
        num_layers=layers,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=192,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        pos_embed_max_size=16,
    )
    with torch.no_grad():
        for name, p in net.named_parameters():
            if any(k in name for k in ("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
                p.zero_()
    return net


def pixel_unet():
    """`tiny-pixel` denoiser: 32x32 RGB, label = meaning (180). Its embedding starts as a sum of three, since a label is
    a thing, a colour and a background. Four groups: GroupNorm over two channels (16 groups of 32) erases the mean of an
    image, and with it the background."""
    from diffusers import UNet2DModel

    net = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=4,
        num_class_embeds=N_MEANINGS,
    )
    table = net.class_embedding.weight
    a, b, c = (torch.randn(n, table.shape[1]) / 3**0.5 for n in (len(THINGS), len(COLOURS), len(BACKGROUNDS)))
    with torch.no_grad():
        table.copy_((a[:, None, None] + b[None, :, None] + c[None, None]).reshape(table.shape))
    return net


class FashionFeatures(nn.Module):
    """`tiny-fashion` feature network: uint8 (N, 3, S, S) -> (N, 128) float32, S = 32 or 64.

    The features are averages of a middle map (S/4) and of the last map (S/8), 64 channels each. `heads` gives the
    logits of thing (10), colour (6), background (3) from them. GroupNorm: features do not depend on the batch.
    """

    id = "tiny-fashion"
    num_features = 128

    def __init__(self) -> None:
        super().__init__()

        def block(cin: int, cout: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(cin, cout, 3, stride, 1), nn.GroupNorm(8, cout), nn.SiLU())

        self.middle = nn.Sequential(block(3, 32), block(32, 48, 2), block(48, 64, 2), block(64, 64))
        self.last = nn.Sequential(block(64, 64, 2), block(64, 64), block(64, 64))
        self.thing, self.colour, self.background = (
            nn.Linear(128, n) for n in (len(THINGS), len(COLOURS), len(BACKGROUNDS))
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"tiny-fashion wants uint8 images (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        dtype = self.thing.weight.dtype
        middle = self.middle(images.to(dtype) / 127.5 - 1)
        return torch.cat([middle.mean((2, 3)), self.last(middle).mean((2, 3))], 1)

    def heads(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of thing, colour, background."""
        return self.thing(features), self.colour(features), self.background(features)
