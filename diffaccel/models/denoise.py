"""Training of the three denoisers. `tiny-sd` and `tiny-flow` see latents of 32 and 64 pixel images, mixed 3:1; the size
is told by the latent's shape alone."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from . import data, encoders, export, nets
from .encoders import size_of
from .fit import Budget, _save, fit
from .words import N_MEANINGS, TEMPLATES, all_captions

SD = Budget(steps=5000, lr=1.5e-3, batch=48, warmup=200, ema=0.999, seed=4)
FLOW = Budget(steps=3800, lr=1.5e-3, batch=48, warmup=100, ema=0.998, seed=5)
PIXEL = Budget(steps=12_000, lr=1.5e-3, batch=32, warmup=200, ema=0.999, seed=6)
MEAN_WEIGHT = 0.1  # see `epsilon_loss`
SD_MEAN_FROM = 1700  # first step of `tiny-sd` with it: found to be needed while the shipped model trained
DROP = 0.1  # share of empty prompts, for classifier-free guidance
ZERO_TOKENS, ZERO_ODDS = (1, 16, 256), (0.8, 0.15, 0.05)
POOL = {32: 60_000, 64: 12_000}  # pre-encoded latents, colours drawn once


def batch_of(budget: Budget, size: int) -> int:
    return budget.batch if size == 32 else budget.batch // 2


def latent_pool(train: data.Split, out: Path, size: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Unit latents (M, 8, size/4, size/4) float16 (posterior means) and their meanings (M,), encoded once and kept."""
    file = out / f"latents-{size}.pt"
    if not file.exists():
        net = export.load_vae(out).to(device, memory_format=torch.channels_last)
        g = torch.Generator().manual_seed(1000 + size)
        z, meaning = [], []
        order = torch.cat(
            [torch.randperm(len(train.labels), generator=g) for _ in range(-(-POOL[size] // len(train.labels)))]
        )
        for index in order[: POOL[size]].split(1000):
            batch = data.draw(train, len(index), g, size, index)
            z.append(encoders.encode(net, batch.images, batch=100).half())
            meaning.append(batch.meaning)
        out.mkdir(parents=True, exist_ok=True)
        _save({"latents": torch.cat(z), "meaning": torch.cat(meaning)}, file)
        print(f"latents-{size}: {POOL[size]} encoded", flush=True)
    return torch.load(file, weights_only=True, mmap=True)


class Latents:
    """Draws (latents, caption rows) of a training step; row 720 is the empty prompt."""

    def __init__(self, train: data.Split, out: Path, device: str = "cpu") -> None:
        self.pools = {size: latent_pool(train, out, size, device) for size in POOL}

    def __call__(self, n: int, size: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        pool = self.pools[size]
        i = torch.randint(len(pool["meaning"]), (n,), generator=g)
        row = pool["meaning"][i] * len(TEMPLATES) + torch.randint(len(TEMPLATES), (n,), generator=g)
        row[torch.rand(n, generator=g) < DROP] = N_MEANINGS * len(TEMPLATES)
        return pool["latents"][i].float(), row


def vp_alphas(scheduler) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(alpha_bar), sqrt(1 - alpha_bar) of the training steps, float32 (1000,)."""
    a = scheduler.alphas_cumprod.double()
    return a.sqrt().float(), (1 - a).sqrt().float()


def vp_batch(x: torch.Tensor, tables, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(noisy, timestep, epsilon) at uniform training steps."""
    t = torch.randint(len(tables[0]), (len(x),), generator=g)
    eps = torch.randn(x.shape, generator=g)
    alpha, sigma = (a[t].view(-1, 1, 1, 1) for a in tables)
    return alpha * x + sigma * eps, t, eps


def epsilon_loss(error: torch.Tensor, mean_weight: float = MEAN_WEIGHT) -> torch.Tensor:
    """Mean squared error, and `mean_weight` times that of the channel means, scaled so that white noise has 1 in both.

    The means carry colour and background. They are one of 64 or 1024 directions, normalisation layers hide them, and
    sampling multiplies their error by sigma / alpha: after 1,477 steps of the plain loss the error of the means of
    `tiny-sd` at t = 999 was 15 times that of the whole latent. Any positive weight has the same minimiser.
    """
    means = error.mean((2, 3)).square().mean() * error[0, 0].numel()
    return error.square().mean() + mean_weight * means


def train_sd(train: data.Split, out: Path, budget: Budget = SD, device: str = "cpu", **kw):
    torch.manual_seed(budget.seed)
    net = nets.sd_unet().to(device)
    pipe = export.sd_pipeline(net, out)
    with torch.no_grad():
        text = pipe.encode_prompt([*all_captions(), ""], "cpu", 1, False)[0].to(device)
    tables = vp_alphas(pipe.scheduler)
    draw = Latents(train, out, device)

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        size = size_of(step)
        x, row = draw(batch_of(budget, size), size, g)
        noisy, t, eps = (v.to(device) for v in vp_batch(x, tables, g))
        error = net(noisy, t, encoder_hidden_states=text[row]).sample - eps
        return epsilon_loss(error, MEAN_WEIGHT if step >= SD_MEAN_FROM else 0.0)

    return net, fit("sd", net, loss, budget, out, **kw)


def train_flow(train: data.Split, out: Path, budget: Budget = FLOW, device: str = "cpu", **kw):
    """x_s = (1 - s) x0 + s eps, target eps - x0, s logit-normal. SD3 appends `max_sequence_length` zero tokens in place
    of T5: their number is drawn, so that the model knows the default call (256) and the fast one (1)."""
    torch.manual_seed(budget.seed)
    net = nets.flow_transformer().to(device)
    pipe = export.flow_pipeline(net, out)
    with torch.no_grad():
        text, _, pooled, _ = pipe.encode_prompt(
            [*all_captions(), ""], None, None, device="cpu", max_sequence_length=1, do_classifier_free_guidance=False
        )
    text, pooled = text[:, : nets.MAX_TOKENS].to(device), pooled.to(device)
    draw = Latents(train, out, device)
    odds = torch.tensor(ZERO_ODDS)

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        size = size_of(step)
        x, row = draw(batch_of(budget, size), size, g)
        zeros = ZERO_TOKENS[int(torch.multinomial(odds, 1, generator=g))]
        s = torch.randn(len(x), generator=g).sigmoid()
        eps = torch.randn(x.shape, generator=g)
        w = s.view(-1, 1, 1, 1)
        noisy, target, s = (v.to(device) for v in ((1 - w) * x + w * eps, eps - x, s))
        y = net(
            noisy,
            timestep=1000 * s,
            encoder_hidden_states=F.pad(text[row], (0, 0, 0, zeros)),
            pooled_projections=pooled[row],
        ).sample
        return F.mse_loss(y, target)

    return net, fit("flow", net, loss, budget, out, **kw)


def train_pixel(train: data.Split, out: Path, budget: Budget = PIXEL, device: str = "cpu", **kw):
    torch.manual_seed(budget.seed)
    net = nets.pixel_unet().to(device)
    tables = vp_alphas(export.pixel_pipeline(net).scheduler)

    def loss(step: int, g: torch.Generator) -> torch.Tensor:
        # v, not epsilon: in a loss of epsilon the high noise levels, where the label is all there is to go by, hardly
        # count (after 6,000 steps of it one image in five was of the right thing)
        batch = data.draw(train, budget.batch, g)
        x = data.to_float(batch.images)
        noisy, t, eps = vp_batch(x, tables, g)
        alpha, sigma = (a[t].view(-1, 1, 1, 1) for a in tables)
        v = net(noisy.to(device), t.to(device), class_labels=batch.meaning.to(device)).sample
        return F.mse_loss(v, (alpha * eps - sigma * x).to(device))

    return net, fit("pixel", net, loss, budget, out, **kw)


TRAINERS = {"sd": train_sd, "flow": train_flow, "pixel": train_pixel}
