"""The four ways in which projects bring an image to Inception's 299x299. They are not interchangeable.

Input uint8 (H, W, 3), output float32 (3, k, k) in grey levels, before any normalisation.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image


def clean(image: np.ndarray, k: int) -> torch.Tensor:
    """clean-fid (arXiv:2104.11222): PIL bicubic with antialias, per channel in float, clipped, not rounded."""
    channels = [
        np.asarray(Image.fromarray(image[..., c].astype(np.float32)).resize((k, k), Image.Resampling.BICUBIC))
        for c in range(3)
    ]
    return torch.from_numpy(np.stack(channels)).clamp(0, 255)


def _float(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(image, -1, 0).astype(np.float32))


def tf(image: np.ndarray, k: int) -> torch.Tensor:
    """TensorFlow 1: bilinear, no antialias, no half-pixel centres (output i reads input i * size / k)."""
    x = _float(image)
    for axis in (1, 2):
        size = x.shape[axis]
        at = torch.arange(k, dtype=torch.float32) * (size / k)
        low = at.long().clamp(max=size - 1)
        weight = (at - low).reshape((k, 1) if axis == 1 else (1, k))
        left, right = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=size - 1))
        x = left + (right - left) * weight
    return x


def torch_bilinear(image: np.ndarray, k: int) -> torch.Tensor:
    """pytorch-fid: torch bilinear, half-pixel centres, no antialias."""
    return F.interpolate(_float(image)[None], (k, k), mode="bilinear", align_corners=False)[0]


def torchmetrics(image: np.ndarray, k: int) -> torch.Tensor:
    """torchmetrics: torch bilinear with antialias."""
    return F.interpolate(_float(image)[None], (k, k), mode="bilinear", align_corners=False, antialias=True)[0]


RESIZERS: dict[str, Callable[[np.ndarray, int], torch.Tensor]] = {
    "clean": clean,
    "tf": tf,
    "torch": torch_bilinear,
    "torchmetrics": torchmetrics,
}
