"""One chunk of images: painted, saved, or what was wrong with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..errors import DiffaccelError, RunError
from .folder import Folder, Record
from .world import WorldError


class ChunkError(RunError):
    """A chunk could not be painted; the message names it and says why."""


@dataclass(frozen=True)
class Task:
    """Image `index`: its prompt and the seed of its noise."""

    index: int
    prompt: str
    seed: int

    def generator(self) -> torch.Generator:
        """Its own source of noise, on the CPU on every device, so that its noise depends on nothing else."""
        return torch.Generator("cpu").manual_seed(self.seed)


@dataclass(frozen=True)
class Painted:
    """What was made for a chunk.

    Args:
        images: (B, H, W, 3) float in [0, 1]; (B, H, W, 1) is grey.
        calls: model calls that each of them took, counted.
    """

    images: np.ndarray
    calls: int


Paint = Callable[[Sequence[Task]], Painted]


def painted(paint: Paint, tasks: Sequence[Task], number: int) -> tuple[Painted, float]:
    """The images of chunk `number`, and the seconds that each took.

    Raises:
        ChunkError: whatever went wrong.
        WorldError: another rank failed.
    """
    start = time.perf_counter()
    try:
        made = paint(tasks)
        images = np.asarray(made.images)
        if images.ndim != 4 or len(images) != len(tasks) or images.shape[-1] not in (1, 3):
            raise RunError(f"expected ({len(tasks)}, H, W, 3) images, got shape {images.shape}")
    except WorldError:
        raise
    except Exception as error:
        raise _explained(error, tasks, number) from error
    return Painted(images, made.calls), (time.perf_counter() - start) / len(tasks)


def _explained(error: Exception, tasks: Sequence[Task], number: int) -> ChunkError:
    first, last = tasks[0], tasks[-1]
    where = f"chunk {number} (images {first.index} to {last.index}; first prompt {first.prompt!r}, seed {first.seed})"
    if isinstance(error, DiffaccelError):
        return ChunkError(f"{where}: {error}")
    lines = str(error).strip().splitlines() or [""]
    advice = ""
    if isinstance(error, torch.OutOfMemoryError):
        advice = ". Use a smaller --batch and a new --out: the batch size changes images by rounding"
    return ChunkError(f"{where}: {type(error).__name__}: {lines[0]}{advice}")


def usable(device: torch.device) -> bool:
    """Whether a device still computes after an error; after one in a kernel, no more for this process."""
    try:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    except RuntimeError:
        return False
    return True


def saved(folder: Folder, made: Painted, tasks: Sequence[Task], scheduler: str, seconds: float) -> list[Record]:
    """Save the images of one chunk; their lines."""
    found = []
    for task, image in zip(tasks, made.images, strict=True):
        pixels, flaw = to_pixels(image)
        held = folder.save(task.index, pixels)
        found.append(
            {"index": task.index, "prompt": task.prompt, "seed": task.seed, "scheduler": scheduler}
            | {"calls": made.calls, "seconds": round(seconds, 6), "flaw": flaw, **held}
        )
    return found


def to_pixels(image: np.ndarray) -> tuple[np.ndarray, str | None]:
    """(H, W, 1 or 3) float in [0, 1] to ((H, W, 3) uint8, flaw): "nan" if it holds a NaN, "black" if all is zero."""
    bad = not np.isfinite(image).all()
    image = np.nan_to_num(image, nan=0.0, posinf=1.0, neginf=0.0)
    pixels = (image.clip(0, 1) * 255).round().astype(np.uint8)
    flaw = "nan" if bad else None if pixels.any() else "black"
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).copy(), flaw
