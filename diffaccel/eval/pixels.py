"""One image of any kind to uint8 (H, W, 3) RGB."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from ..errors import DiffaccelError

ALPHA = ("white", "black", "drop")
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_TOLERANCE = 1e-3  # how far outside [0, 1] rounding errors of a decoder may lead


class ImageError(DiffaccelError, ValueError):
    """An image or a source of images that cannot be used as it is."""


def is_channels_first(shape: tuple[int, ...]) -> bool:
    """Of one NumPy image (3-D): channels first where shape[0] is 1 or 3 and shape[2] is not."""
    return shape[0] in (1, 3) and shape[2] not in (1, 3)


def from_item(item: Any, alpha: str | None = None) -> np.ndarray:
    """uint8 (H, W, 3) from a file, PIL image, NumPy array (HWC, CHW, HW), tensor (CHW), or a tuple or dict (key
    "image") that holds one. Raises ImageError."""
    if isinstance(item, dict):
        if "image" not in item:
            raise ImageError(f'a dict needs the key "image", it has {", ".join(map(str, item))}')
        item = item["image"]
    elif isinstance(item, (tuple, list)) and item:
        item = item[0]
    if isinstance(item, (str, Path, io.BytesIO)):
        with Image.open(item) as image:
            return from_pil(image, alpha)
    if isinstance(item, Image.Image):
        return from_pil(item, alpha)
    if isinstance(item, torch.Tensor):
        x = (item.float() if item.is_floating_point() else item).detach().cpu().numpy()
        return from_array(np.moveaxis(x, 0, -1) if x.ndim == 3 else x)
    if isinstance(item, np.ndarray):
        return from_array(np.moveaxis(item, 0, -1) if item.ndim == 3 and is_channels_first(item.shape) else item)
    raise ImageError(f"not an image: {type(item).__name__}")


def from_array(x: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) from an array (H, W), (H, W, 1) or (H, W, 3), uint8 or float in [0, 1]."""
    if x.ndim == 2:
        x = x[..., None]
    if x.ndim != 3 or x.shape[2] not in (1, 3):
        raise ImageError(f"an image must have 1 or 3 channels, got shape {tuple(x.shape)}")
    if x.dtype != np.uint8:
        x = to_uint8(x)
    return np.ascontiguousarray(np.repeat(x, 3, 2) if x.shape[2] == 1 else x)


def to_uint8(x: np.ndarray) -> np.ndarray:
    """round(255 x) of floats in [0, 1], half to even, exactly as diffusers' `VaeImageProcessor` makes its images: a PNG
    made by a pipeline and the array in memory then give the same score. Truncation, as in torchmetrics, turns 0.999
    into 254."""
    if not np.issubdtype(x.dtype, np.floating):
        raise ImageError(f"images must be uint8, or float in [0, 1]; got {x.dtype}")
    if np.isnan(x).any():
        raise ImageError("it contains NaN")
    low, high = float(x.min()), float(x.max())
    if low < -_TOLERANCE or high > 1 + _TOLERANCE:
        hint = "looks like [-1, 1]: pass (x + 1) / 2" if low >= -1.1 and high <= 1.1 else "floats must be in [0, 1]"
        raise ImageError(f"values from {low:.4g} to {high:.4g}: {hint}")
    x = x.astype(np.float32) if x.dtype == np.float16 else x
    return np.rint(x.clip(0, 1) * 255).astype(np.uint8)


def from_pil(image: Image.Image, alpha: str | None = None) -> np.ndarray:
    """uint8 (H, W, 3): EXIF orientation applied, 16 bit scaled by 1/257 (Pillow's own conversion clips at 255),
    grayscale, palette and CMYK converted, transparency by `alpha`. A fully opaque alpha channel is no transparency."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        return from_array(np.asarray(image))
    if image.mode.startswith("I"):
        return from_array(_sixteen_bit(np.asarray(image)))
    if image.mode not in _WITH_ALPHA and "transparency" not in image.info:
        return np.asarray(image.convert("RGB"))
    image = image.convert("RGBA")
    if alpha is None and image.getchannel("A").getextrema()[0] != 255:
        raise ImageError(
            'it has transparent pixels: say what they show with alpha="white", "black", or "drop" '
            "(the colour stored under them)"
        )
    if alpha in ("white", "black"):
        image = Image.alpha_composite(Image.new("RGBA", image.size, alpha), image)
    return np.asarray(image.convert("RGB"))


def _sixteen_bit(x: np.ndarray) -> np.ndarray:
    if x.min() < 0 or x.max() > 65535:
        raise ImageError(f"integer values from {x.min()} to {x.max()}; 8 or 16 bits are understood")
    return np.rint(x / 257.0).astype(np.uint8)
