"""Changing the size of a noisy latent: the spectral transition of `core.stages`, on tensors.

States are (..., H, W); the transform is over the last two axes, in float64, on the device of the state.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..core.stages import Size, dct_matrix
from ..errors import RunError

RESIZES = ("spectral", "bicubic")
Draw = Callable[[tuple[int, ...]], torch.Tensor]  # float64 standard normal of a shape


# ---------------------------------------------------------------------- the transform
@functools.lru_cache(maxsize=64)
def _matrix(n: int, device: torch.device) -> torch.Tensor:
    return torch.tensor(dct_matrix(n), device=device)


def dct(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal DCT-II of (..., H, W), float64."""
    h, w = (_matrix(n, x.device) for n in x.shape[-2:])
    return h @ x.double() @ w.T


def idct(c: torch.Tensor) -> torch.Tensor:
    """The inverse of `dct`."""
    h, w = (_matrix(n, c.device) for n in c.shape[-2:])
    return h.T @ c @ w


def fitted(c: torch.Tensor, size: Size) -> torch.Tensor:
    """Coefficients of another size: the shared block, and zeros elsewhere."""
    h, w = c.shape[-2:]
    return F.pad(c[..., : size[0], : size[1]], (0, max(0, size[1] - w), 0, max(0, size[0] - h)))


def resized(x: torch.Tensor, size: Size, kernel: str = "spectral") -> torch.Tensor:
    """A clean latent at another size, its amplitude kept, in its own dtype.

    Never give it a noisy one with `kernel="bicubic"`: interpolated noise is neither white nor of unit variance.
    """
    if kernel == "bicubic":
        flat = x.reshape(-1, 1, *x.shape[-2:])
        return F.interpolate(flat, size, mode="bicubic").reshape(*x.shape[:-2], *size)
    return idct(_scaled(x, size)).to(x.dtype)


def _scaled(x: torch.Tensor, size: Size) -> torch.Tensor:
    h, w = x.shape[-2:]
    return math.sqrt(size[0] * size[1] / (h * w)) * fitted(dct(x), size)


# ---------------------------------------------------------------------- what is known of the new band
@dataclass
class Memory:
    """Coefficients that earlier stages had, in units of their noise: `units = Y/rho`, with the rho of each.

    Args:
        units: (..., H, W) float64.
        rho: (H, W) float64: the level at which each was stored, inf for pure noise, 0 where nothing is stored.
    """

    units: torch.Tensor
    rho: torch.Tensor

    @classmethod
    def of(cls, coefficients: torch.Tensor, rho: float) -> Memory:
        """All of a state's coefficients; of pure noise (rho = inf) the noise's own."""
        units = coefficients if rho == math.inf else coefficients / rho
        return cls(units, torch.full(units.shape[-2:], rho, dtype=torch.float64, device=units.device))

    def over(self, older: Memory | None) -> Memory:
        """This memory, with what only the older one has beside it."""
        if older is None:
            return self
        size = tuple(max(a, b) for a, b in zip(self.rho.shape, older.rho.shape, strict=True))
        rho, back = fitted(self.rho, size), fitted(older.rho, size)  # type: ignore[arg-type]
        new, old = fitted(self.units, size), fitted(older.units, size)  # type: ignore[arg-type]
        return Memory(torch.where(rho > 0, new, old), torch.where(rho > 0, rho, back))

    @property
    def bytes(self) -> int:
        """Memory of the stored tensors."""
        return self.units.nbytes + self.rho.nbytes


def filled(shape: tuple[int, ...], rho: float, fill: str, power: torch.Tensor | None, memory: Memory | None,
           draw: Draw) -> torch.Tensor:  # fmt: skip
    """Coefficients for the whole of a state at level rho, from which a transition takes the new band.

    white: `rho z`; memory: `(rho/rho_d) Y_d` where a coefficient is stored, else white; matched: `sqrt(P + rho^2) z`;
    memory_matched: `sqrt((P + rho^2)/(P + rho_d^2)) Y_d` where one is stored, else matched.

    Args:
        shape: (..., H, W) of the state.
        power: P of each mode, (H, W); needed by the matched fills.
        draw: called only for what memory does not cover.
    """
    matched, size = fill.endswith("matched"), (shape[-2], shape[-1])
    if matched and power is None:
        raise RunError(f"fill={fill!r} needs the spectrum of the latents")
    spread = torch.sqrt(power + rho * rho) if matched and power is not None else torch.tensor(rho, dtype=torch.float64)
    kept = memory if fill.startswith("memory") else None
    if kept is None:
        return spread * draw(shape)
    level = fitted(kept.rho, size)
    units = fitted(kept.units, size)
    if matched and power is not None:
        units = units / torch.sqrt(1 + power / level**2)
    if bool((level > 0).all()):
        return spread * units
    return spread * torch.where(level > 0, units, draw(shape))


def transition(
    x: torch.Tensor,
    node: tuple[float, float],
    to: tuple[float, float],
    size: Size,
    *,
    fill: str = "white",
    power: torch.Tensor | None = None,
    memory: Memory | None = None,
    draw: Draw,
) -> torch.Tensor:
    """A state at another size and level.

    Args:
        x: (..., H, W), `alpha x0 + sigma eps`.
        node, to: (alpha, sigma) before and after; `to` at the aligned level r sigma/alpha, or above it.
        size: (H', W').
        fill, power, memory, draw: of the new band; see `filled`. `draw` also makes the noise of a higher level.

    Returns:
        (..., H', W') in the dtype of x.

    Raises:
        RunError: for a level below the aligned one, which takes model calls to reach.
    """
    h, w = x.shape[-2:]
    shape = (*x.shape[:-2], *size)
    r = math.sqrt(size[0] * size[1] / (h * w))
    aligned, rho = r * node[1] / node[0], to[1] / to[0]
    if rho < aligned * (1 - 1e-9):
        raise RunError(f"a transition cannot lower the noise level: from rho = {aligned} (aligned) to {rho}")
    y = r * fitted(dct(x), size) / node[0]
    if size[0] > h or size[1] > w:
        new = filled(shape, aligned, fill, power, memory, draw)
        new[..., :h, :w] = y[..., :h, :w]
        y = new
    if rho > aligned * (1 + 1e-9):
        y = y + math.sqrt(rho * rho - aligned * aligned) * draw(shape)
    return (to[0] * idct(y)).to(x.dtype)


# ---------------------------------------------------------------------- noise and tokens
def drawer(seeds: list[int], device: torch.device) -> Draw:
    """Noise for each image from its own seed, whatever else is in the batch. The first axis counts images."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        parts = [torch.randn(shape[1:], generator=g, dtype=torch.float64) for g in generators]
        return torch.stack(parts).to(device)

    return draw


def seeds_of(latents: torch.Tensor) -> list[int]:
    """A seed for each image: the first 7 bytes of the SHA-256 of its initial latent as float32."""
    flat = latents.detach().float().cpu().contiguous()
    return [int.from_bytes(hashlib.sha256(image.numpy().tobytes()).digest()[:7], "big") for image in flat]


def unpacked(tokens: torch.Tensor, size: Size) -> torch.Tensor:
    """(B, h/2 * w/2, 4 C) -> (B, C, h, w), the layout of FLUX and Qwen-Image.

    Raises:
        RunError: if that is not the number of tokens of this size.
    """
    b, count, channels = tokens.shape
    h, w = size
    if count != (h // 2) * (w // 2):
        raise RunError(f"a packed latent of {h}x{w} has {(h // 2) * (w // 2)} tokens, got {count}")
    x = tokens.view(b, h // 2, w // 2, channels // 4, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, channels // 4, h, w)


def packed(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpacked`."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), 4 * c)
