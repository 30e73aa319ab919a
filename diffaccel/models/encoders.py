"""Training of the parts that the denoisers need: VAE, CLIP, feature network."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from . import data, nets
from .fit import Budget, fit
from .words import COLOURS, TEMPLATES, THINGS, all_captions

VAE = Budget(steps=3000, lr=2e-3, batch=32, ema=0.998, seed=1)
CLIP = Budget(steps=2500, lr=1e-3, batch=96, seed=2)
FEATURES = Budget(steps=6000, lr=2e-3, batch=64, seed=3)
KL_WEIGHT = 1e-3


def size_of(step: int) -> int:
    """Three steps of 32 pixels to one of 64."""
    return 64 if step % 4 == 3 else 32


# ---------------------------------------------------------------- VAE
def _differences(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def vae_loss(net, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """L1 + 0.5 * L1 of finite differences + 1e-3 KL (mean per latent element). No loss on features: it would train on
    the metric."""
    x = data.to_float(images).to(net.device, memory_format=torch.channels_last)
    posterior = net.encode(x).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator).to(x.device)
    y = net.decode(posterior.mean + posterior.std * noise).sample
    edges = sum(F.l1_loss(a, b) for a, b in zip(_differences(y), _differences(x)))
    kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
    return F.l1_loss(y, x) + 0.5 * edges + KL_WEIGHT * kl


@torch.no_grad()
def fold_latents(net, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold per-channel latent mean and std into `quant_conv` and `post_quant_conv`: afterwards latents have mean 0 and
    std 1, images are unchanged, and `scaling_factor=1, shift_factor=0` is right for every pipeline."""
    c = len(mean)
    q, p = net.quant_conv, net.post_quant_conv
    q.weight[:c] /= std[:, None, None, None]
    q.bias[:c] = (q.bias[:c] - mean) / std
    q.bias[c:] -= 2 * std.log()  # log-variance: weights stay, the scale is an offset
    p.bias += p.weight[:, :, 0, 0] @ mean
    p.weight *= std[None, :, None, None]


@torch.no_grad()
def encode(net, images: torch.Tensor, batch: int = 128) -> torch.Tensor:
    """uint8 (N, 3, S, S) -> posterior means (N, 8, S/4, S/4)."""
    return torch.cat(
        [net.encode(data.to_float(x).to(net.device, net.dtype)).latent_dist.mode().cpu() for x in images.split(batch)]
    )


@torch.no_grad()
def decode(net, latents: torch.Tensor, batch: int = 128) -> torch.Tensor:
    """Latents -> uint8 images, rounded as diffusers rounds."""
    y = torch.cat([net.decode(z.to(net.device, net.dtype)).sample.float().cpu() for z in latents.split(batch)])
    return ((y / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Per image, dB, of uint8 images (N, ...); inf where equal."""
    mse = ((a.double() - b.double()) / 255).flatten(1).pow(2).mean(1)
    return -10 * mse.log10()


def train_vae(train: data.Split, test: data.Split, out: Path, budget: Budget = VAE, device: str = "cpu", **kw):
    torch.manual_seed(budget.seed)
    net = nets.vae().to(device, memory_format=torch.channels_last)

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        size = size_of(step)
        return vae_loss(net, data.draw(train, budget.batch if size == 32 else budget.batch // 2, g, size).images, g)

    receipt = fit("vae", net, loss, budget, out, **kw)
    net = net.to("cpu", memory_format=torch.contiguous_format)
    raw = encode(net, data.draw(train, 4000, torch.Generator().manual_seed(0)).images)
    fold_latents(net, raw.mean((0, 2, 3)), raw.std((0, 2, 3)))
    receipt["channel_std_before_folding"] = [round(s, 3) for s in raw.std((0, 2, 3)).tolist()]
    for size in (32, 64):
        images = data.reference(test, size).images[:1000]
        with torch.no_grad():
            posterior = net.encode(data.to_float(images[:200])).latent_dist
        z = encode(net, images)
        receipt[f"check_{size}"] = {
            "test_psnr_db": round(float(psnr(decode(net, z), images).mean()), 2),
            "latent_mean": [round(v, 3) for v in z.mean((0, 2, 3)).tolist()],
            "latent_std": [round(v, 3) for v in z.std((0, 2, 3)).tolist()],
            "posterior_std": [round(v, 3) for v in posterior.std.mean((0, 2, 3)).tolist()],
        }
    return net, receipt


# ---------------------------------------------------------------- CLIP
def tokenize(tok, captions: list[str]) -> dict[str, torch.Tensor]:
    return dict(tok(captions, padding="max_length", truncation=True, return_tensors="pt"))


def clip_targets(batch: data.Batch) -> torch.Tensor:
    """(B, B): row i spreads probability 1 over the images that caption i fits; a caption without background fits three
    meanings, and a batch holds repeats."""
    same = (batch.thing[:, None] == batch.thing) & (batch.colour[:, None] == batch.colour)
    silent = batch.template == len(TEMPLATES) - 1
    return (same & (silent[:, None] | (batch.background[:, None] == batch.background))).float()


def train_clip(train: data.Split, test: data.Split, out: Path, budget: Budget = CLIP, device: str = "cpu", **kw):
    torch.manual_seed(budget.seed)
    nets.write_tokenizer_files(out / "tokenizer")
    tok = nets.tokenizer(out / "tokenizer")
    net = nets.clip(tok).to(device)
    tokens = tokenize(tok, all_captions())

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        batch = data.draw(train, budget.batch, g)
        y = net(
            pixel_values=data.to_float(batch.images).to(device),
            **{k: v[batch.caption].to(device) for k, v in tokens.items()},
        )
        fits = clip_targets(batch).to(device)
        log_text = y.logits_per_text.log_softmax(1)
        log_image = y.logits_per_image.log_softmax(1)
        return (
            -0.5
            * (
                (log_text * fits / fits.sum(1, keepdim=True)).sum(1)
                + (log_image * fits.T / fits.T.sum(1, keepdim=True)).sum(1)
            ).mean()
        )

    receipt = fit("clip", net, loss, budget, out, **kw)
    net = net.cpu()

    batch = data.reference(test)
    with torch.no_grad():
        named = {k: v.view(-1, len(TEMPLATES), v.shape[-1])[:, 0] for k, v in tokens.items()}  # 180 full captions
        text = F.normalize(_tensor(net.get_text_features(**named)), dim=-1)
        image = F.normalize(
            torch.cat(
                [_tensor(net.get_image_features(pixel_values=data.to_float(x))) for x in batch.images.split(500)]
            ),
            dim=-1,
        )
    cos = image @ text.T
    right = cos.argmax(1)
    per_thing = len(COLOURS) * 3
    receipt["check"] = {
        "zero_shot_180": round(float((right == batch.meaning).float().mean()), 4),
        "thing_alone": round(float((right // per_thing == batch.thing).float().mean()), 4),
        "clip_score_true": round(float(100 * cos[torch.arange(len(cos)), batch.meaning].mean()), 2),
        "clip_score_random": round(float(100 * cos[torch.arange(len(cos)), batch.meaning.roll(1)].mean()), 2),
    }
    return net, tok, receipt


def _tensor(output) -> torch.Tensor:
    """transformers >= 5 returns an output object, 4 a tensor."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


# ---------------------------------------------------------------- features
def train_features(
    train: data.Split, test: data.Split, out: Path, budget: Budget = FEATURES, device: str = "cpu", **kw
):
    torch.manual_seed(budget.seed)
    net = nets.FashionFeatures().to(device)

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        size = size_of(step)
        batch = data.draw(train, budget.batch if size == 32 else budget.batch // 2, g, size)
        flip = torch.rand(len(batch.images), generator=g) < 0.5
        images = torch.where(flip[:, None, None, None], batch.images.flip(3), batch.images)
        logits = net.heads(net(images.to(device)))
        truth = (batch.thing, batch.colour, batch.background)
        return torch.stack([F.cross_entropy(a, b.to(device)) for a, b in zip(logits, truth)]).sum()

    receipt = fit("features", net, loss, budget, out, **kw)
    net = net.cpu()
    for size in (32, 64):
        batch = data.reference(test, size)
        with torch.no_grad():
            logits = net.heads(features(net, batch.images))
        receipt[f"check_{size}"] = {
            name: round(float((a.argmax(1) == b).float().mean()), 4)
            for name, a, b in zip(
                ("thing", "colour", "background"), logits, (batch.thing, batch.colour, batch.background)
            )
        }
    return net, receipt


@torch.no_grad()
def features(net: nn.Module, images: torch.Tensor, batch: int = 250) -> torch.Tensor:
    return torch.cat([net(x) for x in images.split(batch)])


assert math.prod((len(THINGS), len(COLOURS), 3, len(TEMPLATES))) == len(all_captions())
