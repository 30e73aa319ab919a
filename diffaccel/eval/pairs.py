"""Images against those of a many-step teacher from the same noise: PSNR, SSIM, LPIPS, latent error, image by image."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..errors import OptionError, one_of
from .images import Images, open_images

COLUMNS = ("psnr", "ssim", "lpips", "latent")
_WINDOW = 11  # pixels of SSIM's window
_AT_ONCE = 1 << 18  # values of images whose SSIM is computed together


@dataclass(frozen=True)
class Paired:
    """Errors of n images against their teacher's.

    columns: per image (n,) float64: psnr (dB; infinite where the images are equal), ssim, lpips, latent (|z - z*| /
    |z*|). identical: equal images; the mean PSNR is over the others. missing: column -> why it is not there.
    """

    n: int
    identical: int
    columns: dict[str, np.ndarray]
    missing: dict[str, str] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Means; of the latent error the median and the 90 % quantile; reasons for missing columns."""
        out: dict[str, Any] = {"n": self.n, "identical": self.identical}
        for name in COLUMNS:
            values = self.columns.get(name)
            if values is None:
                out[name] = self.missing.get(name, "not measured")
            elif name == "latent":
                out["latent_median"], out["latent_90"] = (float(np.quantile(values, q)) for q in (0.5, 0.9))
            else:
                finite = values[np.isfinite(values)]
                out[name] = float(finite.mean()) if len(finite) else "all images are identical"
        return out

    def __str__(self) -> str:
        return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in self.summary().items())


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """dB per image of uint8 (N, 3, H, W), data range 1; infinite for equal images. (Pooling the squared error of a
    batch, as torchmetrics does by default, is another number.)"""
    error = (a.double() - b.double()).div(255).pow(2).flatten(1).mean(1)
    return -10 * error.log10()


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """SSIM per image of uint8 (N, 3, H, W): 11x11 Gaussian, sigma 1.5, K 0.01 and 0.03, borders reflected.

    Wang et al. 2004, Eq. 13. The same numbers as torchmetrics' (a test compares them), whose two-dimensional window
    costs ten times as much: this one is applied to rows, then to columns.
    """
    if min(a.shape[2:]) < _WINDOW:
        raise OptionError(f"SSIM needs images of at least {_WINDOW}x{_WINDOW}, got {a.shape[2]}x{a.shape[3]}")
    few = max(1, _AT_ONCE // a[0].numel())
    return torch.cat([_ssim(x.double() / 255, y.double() / 255) for x, y in zip(a.split(few), b.split(few))])


def _ssim(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    k = torch.arange(_WINDOW) - _WINDOW // 2
    window = torch.softmax(-(k.double() ** 2) / (2 * 1.5**2), 0).tolist()

    def mean(z: torch.Tensor) -> torch.Tensor:
        z = torch.nn.functional.pad(z, (_WINDOW // 2,) * 4, mode="reflect")
        for axis in (2, 3):
            inside = z.shape[axis] - _WINDOW + 1
            total = torch.zeros(()).to(z)
            for i, w in enumerate(window):
                total = torch.add(total, z.narrow(axis, i, inside), alpha=w)
            z = total
        return z

    mx, my = mean(x), mean(y)
    vx, vy = (mean(x * x) - mx * mx).clamp(min=0), (mean(y * y) - my * my).clamp(min=0)
    cov = mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    found = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return found.mean((1, 2, 3))


def latent_error(z: Any, teacher: Any) -> np.ndarray:
    """|z - z*| / |z*| per image of latents (N, ...)."""
    z, teacher = (torch.as_tensor(x).detach().cpu().double().flatten(1) for x in (z, teacher))
    if z.shape != teacher.shape:
        raise OptionError(f"latents and the teacher's differ in shape: {tuple(z.shape)} and {tuple(teacher.shape)}")
    return ((z - teacher).norm(dim=1) / teacher.norm(dim=1)).numpy()


def _lpips() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | str:
    """LPIPS (AlexNet) on uint8 pairs, or why there is none."""
    if not importlib.util.find_spec("torchvision"):
        return "not installed (pip install lpips)"
    try:
        if importlib.util.find_spec("lpips"):
            import lpips

            net = lpips.LPIPS(net="alex", verbose=False).eval()
        else:
            from torchmetrics.functional.image.lpips import _LPIPS

            net = _LPIPS(pretrained=True, net="alex").eval()
    except Exception as error:  # the backbone is downloaded: any network error is a missing column, not a failed run
        return f"not available: {str(error)[:100]}"
    return lambda a, b: net(a.float() / 127.5 - 1, b.float() / 127.5 - 1).reshape(len(a)).detach()


def _measures() -> tuple[dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]], dict[str, str]]:
    found: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {"psnr": psnr, "ssim": ssim}
    missing = {}
    perceptual = _lpips()
    if isinstance(perceptual, str):
        missing["lpips"] = perceptual
    else:
        found["lpips"] = perceptual
    return found, missing


def _stack(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def paired(
    images: Any, teacher: Any, *, latents: Any = None, teacher_latents: Any = None, alpha: str | None = None
) -> Paired:
    """Errors of images against a teacher's images from the same seeds and prompts, in the same order.

    images, teacher: what `open_images` reads, equally many, equal sizes. latents, teacher_latents: (N, ...), both or
    none. They say nothing for stochastic samplers, where the same seed is not the same image.
    Raises OptionError for unequal numbers or sizes, and for images smaller than SSIM's window.
    """
    left, right = open_images(images, alpha=alpha), open_images(teacher, alpha=alpha)
    if len(left) != len(right):
        raise OptionError(f"pairs need equally many images: {left.id} has {len(left)}, {right.id} {len(right)}")
    if (latents is None) != (teacher_latents is None):
        raise OptionError("give latents and teacher_latents, or neither")
    measures, missing = _measures()
    columns = _measure(left, right, measures)
    if latents is None:
        missing["latent"] = "no latents were given"
    else:
        columns["latent"] = latent_error(latents, teacher_latents)
        if len(columns["latent"]) != len(left):
            raise OptionError(f"{len(left)} images have {len(columns['latent'])} latents")
    return Paired(len(left), int(np.isinf(columns["psnr"]).sum()), columns, missing)


@torch.no_grad()
def _measure(left: Images, right: Images, measures: dict[str, Any]) -> dict[str, np.ndarray]:
    values: dict[str, list[torch.Tensor]] = {name: [] for name in measures}
    done = 0
    for a, b in zip(left.batches(), right.batches(), strict=True):
        shapes = {x.shape for x in (*a, *b)}
        if len(shapes) > 1:
            raise OptionError(
                f"images {done} to {done + len(a) - 1}: pairs need one size, got "
                + ", ".join(sorted(f"{h}x{w}" for h, w, _ in shapes))
            )
        done += len(a)
        for name, measure in measures.items():
            values[name].append(measure(_stack(a), _stack(b)).double())
    return {name: torch.cat(parts).numpy() for name, parts in values.items()}


@dataclass(frozen=True)
class MeanDifference:
    """Mean of a - b over n pairs with its 95 % bootstrap interval; left_out: pairs with an infinite value."""

    value: float
    low: float
    high: float
    n: int
    left_out: int


def paired_difference(a: Paired, b: Paired, column: str = "psnr", *, samples: int = 2000) -> MeanDifference:
    """a - b of two rows that share seeds and prompts, by a bootstrap over images (a mean has no bias that resampling
    would add to, unlike FID)."""
    one_of("column", column, COLUMNS)
    for row in (a, b):
        if column not in row.columns:
            raise OptionError(f"{column}: {row.missing.get(column, 'not measured')}")
    if a.n != b.n:
        raise OptionError(f"paired rows must have equally many images, got {a.n} and {b.n}")
    with np.errstate(invalid="ignore"):  # equal images on both sides: inf - inf
        difference = a.columns[column] - b.columns[column]
    kept = difference[np.isfinite(difference)]
    if not len(kept):
        raise OptionError(f"{column}: no pair has a finite value on both sides")
    low, high = mean_interval(kept, samples)
    return MeanDifference(float(kept.mean()), low, high, len(kept), a.n - len(kept))


def mean_interval(values: np.ndarray, samples: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of values (n,)."""
    rng = np.random.default_rng(0)
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(samples)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
