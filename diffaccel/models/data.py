"""Fashion-MNIST (MIT licence), coloured by rule: the training data of the embedded models.

Grey garments alone would make a caption a mere class label; colour and background drawn anew for every image make
180 meanings out of 10 and are free augmentation. Images are uint8 NCHW RGB, 32 or 64 pixels.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .words import BACKGROUNDS, COLOURS, N_MEANINGS, TEMPLATES

FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
DEBIAN_PATH = "/usr/share/datasets/fashion-mnist"  # where the Debian package dataset-fashion-mnist puts them
GARMENT = {32: 28, 64: 56}  # image size -> size of the garment in it


class DataError(RuntimeError):
    """The data set is missing or damaged."""


def _idx(path: Path, header: int, magic: int) -> np.ndarray:
    """Payload of a gzip IDX file as flat uint8."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise DataError(f"{path} is not a readable gzip file: {error}") from error
    if len(raw) < header or int.from_bytes(raw[:4], "big") != magic:
        raise DataError(f"{path} is not an IDX file of the expected kind (magic number {magic:#x})")
    return np.frombuffer(raw, np.uint8, offset=header)


@dataclass(frozen=True)
class Split:
    """Grey images (N, 28, 28) uint8 and labels (N,) int64 of one split; `digest` is the SHA-256 of its two files."""

    images: torch.Tensor
    labels: torch.Tensor
    digest: str


def load(folder: str | Path, split: str) -> Split:
    """Read the 'train' (60,000) or 'test' (10,000) split from a folder with the four published .gz files."""
    folder = Path(folder)
    missing = [name for pair in FILES.values() for name in pair if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"Fashion-MNIST not found in {folder}: missing {', '.join(missing)}. Pass --data DIR with "
            f"the four files, or install the Debian package dataset-fashion-mnist (they are then in {DEBIAN_PATH})."
        )
    images, labels = (folder / name for name in FILES[split])
    x = _idx(images, 16, 0x803).reshape(-1, 28, 28)
    y = _idx(labels, 8, 0x801)
    if len(x) != len(y):
        raise DataError(f"{images} has {len(x)} images, {labels} has {len(y)} labels")
    digest = hashlib.sha256(images.read_bytes() + labels.read_bytes()).hexdigest()
    return Split(torch.from_numpy(x.copy()), torch.from_numpy(y.astype(np.int64)), digest)


def render(grey: torch.Tensor, colour: torch.Tensor, background: torch.Tensor, size: int = 32) -> torch.Tensor:
    """Colour grey garments: (N, 28, 28) uint8, indices (N,), (N,) -> (N, 3, size, size) uint8.

    pixel = (1 - m) background + m (0.35 + 0.65 g) colour, with the mask m = min(5 g, 1).
    """
    if size not in GARMENT:
        raise ValueError(f"size is {size}; the data is made at {sorted(GARMENT)} pixels")
    g = grey[:, None].float() / 255
    inner = GARMENT[size]
    if inner != 28:
        g = F.interpolate(g, size=(inner, inner), mode="bilinear", align_corners=False)
    g = F.pad(g, [(size - inner) // 2] * 4)
    rgb = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[colour][:, :, None, None]
    back = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)[background][:, None, None, None]
    mask = (5 * g).clamp(max=1)
    return ((1 - mask) * back + mask * (0.35 + 0.65 * g) * rgb).round().to(torch.uint8)


@dataclass(frozen=True)
class Batch:
    """Rendered images (N, 3, S, S) uint8, indices (N,) of thing, colour, background, and of a caption template."""

    images: torch.Tensor
    thing: torch.Tensor
    colour: torch.Tensor
    background: torch.Tensor
    template: torch.Tensor

    @property
    def meaning(self) -> torch.Tensor:
        return (self.thing * len(COLOURS) + self.colour) * len(BACKGROUNDS) + self.background

    @property
    def caption(self) -> torch.Tensor:
        """Row of `words.all_captions()`."""
        return self.meaning * len(TEMPLATES) + self.template


def draw(split: Split, n: int, generator: torch.Generator, size: int = 32, index: torch.Tensor | None = None) -> Batch:
    """n images (or those of `index`) with fresh colours, backgrounds and caption templates."""

    def pick(high: int) -> torch.Tensor:
        return torch.randint(high, (n,), generator=generator)

    index = pick(len(split.labels)) if index is None else index
    colour, background, template = pick(len(COLOURS)), pick(len(BACKGROUNDS)), pick(len(TEMPLATES))
    return Batch(
        render(split.images[index], colour, background, size), split.labels[index], colour, background, template
    )


def reference(test: Split, size: int = 32) -> Batch:
    """The reference set: the whole test split, colours and backgrounds fixed by seed 0 (all colours first)."""
    g = torch.Generator().manual_seed(0)
    n = len(test.labels)
    colour = torch.randint(len(COLOURS), (n,), generator=g)
    background = torch.randint(len(BACKGROUNDS), (n,), generator=g)
    return Batch(
        render(test.images, colour, background, size), test.labels, colour, background, torch.zeros(n, dtype=torch.long)
    )


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 to the [-1, 1] that VAE and pixel model are fed."""
    return images.float() / 127.5 - 1


assert 10 * len(COLOURS) * len(BACKGROUNDS) == N_MEANINGS
