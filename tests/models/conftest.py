"""A tiny stand-in for Fashion-MNIST: rectangles in the same four files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from diffaccel.models import data


def write_idx(folder: Path, name: str, array: np.ndarray) -> None:
    header = (0x800 + array.ndim).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in array.shape)
    (folder / name).write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture(scope="session")
def fake_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fashion")
    rng = np.random.default_rng(0)
    for split, n in (("train", 80), ("test", 40)):
        labels = rng.integers(0, 10, n)
        images = np.zeros((n, 28, 28))
        for image, label in zip(images, labels):
            image[4 : 10 + label, 6:22] = rng.integers(60, 255)
        for name, array in zip(data.FILES[split], (images, labels)):
            write_idx(folder, name, array)
    return folder
