"""One reader of images for all metrics: uint8 (H, W, 3) RGB arrays in a stable order.

Numbers that change when images are saved, resized or converted are what users of FID complain of most; every rule that
decides about a pixel is here or in `pixels.py`.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import DiffaccelError, OptionError, one_of
from ..parallel.folder import Folder
from .pixels import ALPHA, ImageError, from_item, is_channels_first

SUFFIXES = (".bmp", ".jpg", ".jpeg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_LISTED = 10  # unreadable files that an error names
# what libraries raise for broken or absurdly large files
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, Image.DecompressionBombError)


class Images:
    """A sized, indexable source of uint8 (H, W, 3) arrays.

    Attributes: `id` (what it was opened from), `names` (one an image), `jpeg` (how many are JPEG files), `skipped`
    (unreadable files left out, with the reason; only with `unreadable="skip"`), `numbers` (which prompt each one has:
    0, 1, 2, ..., but in a part of a folder of `generate`), `prompts` (what each one was made from, where the source is
    such a folder; else None).
    """

    def __init__(
        self,
        id: str,
        names: list[str],
        item: Callable[[int], Any],
        alpha: str | None = None,
        numbers: Sequence[int] | None = None,
        prompts: Sequence[str | None] | None = None,
    ) -> None:
        self.id, self.names, self._item, self._alpha = id, names, item, alpha
        self.numbers: Sequence[int] = range(len(names)) if numbers is None else numbers
        self.prompts = prompts
        self.jpeg = sum(name.lower().endswith((".jpg", ".jpeg")) for name in names)
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> np.ndarray:
        """Image i. Raises `ImageError` if it cannot be read or its values are no image."""
        if not 0 <= i < len(self):
            raise IndexError(i)  # ends a for loop, too
        try:
            return from_item(self._item(i), self._alpha)
        except ImageError as error:
            raise ImageError(f"{self.names[i]} of {self.id}: {error}") from None
        except _BROKEN as error:
            raise ImageError(f"{self.names[i]} of {self.id}: {error or type(error).__name__}") from error

    def _try(self, i: int) -> np.ndarray | ImageError:
        try:
            return self[i]
        except ImageError as error:
            return error

    def digest(self) -> str:
        """SHA-256 of the content: of the bytes of files, else of the pixels."""
        found = hashlib.sha256(repr((len(self), self._alpha, self.skipped)).encode())
        for i, name in enumerate(self.names):
            try:
                item = self._item(i)
                file = Path(item).read_bytes() if isinstance(item, (str, Path)) else None
                data = item.getvalue() if isinstance(item, io.BytesIO) else file or self[i].tobytes()
            except _BROKEN as error:
                raise error if isinstance(error, ImageError) else ImageError(f"{name} of {self.id}: {error}") from None
            found.update(f"{PurePosixPath(name).suffix} {len(data)} ".encode() + data)
        return found.hexdigest()

    def batches(self, size: int = 64, workers: int = 0) -> Iterator[list[np.ndarray]]:
        """All images in order, `size` at a time, decoded by `workers` threads (0: in this one). If one cannot be read,
        the rest is looked through, and the error lists them (at most 10)."""
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            each: Callable[..., Iterator[Any]] = pool.map if workers else map
            for first in range(0, len(self), size):
                got = list(each(self._try, range(first, min(first + size, len(self)))))
                bad = [x for x in got if isinstance(x, ImageError)]
                if bad:
                    bad += [x for x in each(self._try, range(first + size, len(self))) if isinstance(x, ImageError)]
                    raise unreadable_error(bad)
                yield got

    def without_unreadable(self) -> Images:
        """Decodes every image once and leaves out what fails; `skipped` says what and why."""
        bad = {i: x for i in range(len(self)) if isinstance(x := self._try(i), ImageError)}
        kept = [i for i in range(len(self)) if i not in bad]
        if not kept:
            raise unreadable_error(list(bad.values()))
        names, numbers = [self.names[i] for i in kept], [self.numbers[i] for i in kept]
        prompts = None if self.prompts is None else [self.prompts[i] for i in kept]
        out = Images(self.id, names, lambda i: self._item(kept[i]), self._alpha, numbers, prompts)
        out.skipped = [str(x) for x in bad.values()]
        return out


def unreadable_error(bad: list[ImageError]) -> ImageError:
    """One error for all bad images."""
    if len(bad) == 1:
        return bad[0]
    more = f"\n  and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
    return ImageError(f"{len(bad)} images cannot be used:\n  " + "\n  ".join(map(str, bad[:_LISTED])) + more)


def natural(name: str) -> tuple[Any, ...]:
    """Sort key: numbers by value, so that 2.png comes before 10.png; the name itself decides ties (01 and 1)."""
    return ([(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"([0-9]+)", name) if p], name)


def open_images(
    source: Any, *, alpha: str | None = None, unreadable: str = "error", expected: int | None = None
) -> Images:
    """Open images for any metric; nothing is decoded yet.

    source: a folder (recursive: bmp jpg jpeg png ppm tif tiff webp, sorted by relative POSIX path with numbers by
      value); a zip of such files; an .npz or .npy (`arr_0` or the only 4-D array; NHWC, or NCHW where shape[1] is 1 or
      3 and shape[3] is not); a NumPy array of that form; a tensor NCHW; a list of PIL images or files; any object with
      `__len__` and `__getitem__` whose items are images, tuples that begin with one, or dicts with the key "image".
      Arrays are uint8, or float in [0, 1], rounded as diffusers does.
    alpha: what shows through transparent pixels: "white", "black", or "drop" (the colour stored under them). None:
      an image that is transparent anywhere is an error.
    unreadable: "error", or "skip": leave such files out and say so in the score.
    expected: how many images there are at least, for a folder of `generate` that is not complete (else an error).
    Raises ImageError (a ValueError) for a source without images, OptionError for statistics or unknown options.
    """
    if alpha is not None:
        one_of("alpha", alpha, ALPHA)
    one_of("unreadable", unreadable, ("error", "skip"))
    try:
        images = _open(source, alpha, expected)
    except DiffaccelError:
        raise
    except _BROKEN as error:
        raise ImageError(f"cannot read {source}: {error}") from None
    if not len(images):
        raise ImageError(f"{images.id} holds no images (files that count: {' '.join(s[1:] for s in SUFFIXES)})")
    return images.without_unreadable() if unreadable == "skip" else images


def _open(source: Any, alpha: str | None, expected: int | None) -> Images:
    if isinstance(source, Images):
        return source
    if isinstance(source, (str, Path)):
        return _open_path(Path(source), alpha, expected)
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _open_array(source, f"{type(source).__name__}{tuple(source.shape)}", alpha)
    if hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, (bytes, dict)):
        paths = source if isinstance(source, (list, tuple)) else [None] * len(source)
        names = [str(x) if isinstance(x, (str, Path)) else f"item {i}" for i, x in enumerate(paths)]
        return Images(f"{type(source).__name__} of {len(names)}", names, source.__getitem__, alpha)
    raise OptionError(
        f"cannot read images from {type(source).__name__}: give a folder, zip, .npz, .npy, array, tensor, "
        "list of PIL images or a data set"
    )


def _open_path(path: Path, alpha: str | None, expected: int | None) -> Images:
    if path.is_dir():
        generated = Folder(path)
        if generated.manifest.exists() and generated.lines.exists():
            return _open_generated(generated, alpha, expected)
        files = [f for f in _files(path) if f.suffix.lower() in SUFFIXES]
        names = sorted((f.relative_to(path).as_posix() for f in files), key=natural)
        return Images(str(path), names, lambda i: path / names[i], alpha)
    if not path.exists():
        raise ImageError(f"no file or folder {path}")
    if path.suffix.lower() == ".zip":
        archive = zipfile.ZipFile(path)
        if any(i.flag_bits & 1 for i in archive.infolist()):
            raise ImageError(f"{path} is encrypted: unpack it and give the folder")
        inside = (n for n in archive.namelist() if PurePosixPath(n).suffix.lower() in SUFFIXES)
        names = sorted((n for n in inside if not n.startswith("__MACOSX/")), key=natural)
        return Images(str(path), names, lambda i: io.BytesIO(archive.read(names[i])), alpha)
    if path.suffix.lower() == ".npy":
        return _open_array(np.load(path, mmap_mode="r", allow_pickle=False), str(path), alpha)
    if path.suffix.lower() == ".npz":
        return _open_array(_array_of(path), str(path), alpha)
    if path.suffix.lower() in SUFFIXES:
        return Images(str(path.parent), [path.name], lambda i: path, alpha)
    raise ImageError(f"cannot read images from {path}: give a folder, .zip, .npz or .npy")


def _files(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """All files below a folder, through links too, but not through one that leads back to a folder above it."""
    real = folder.resolve()
    if real in above:
        return
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _files(entry, above | {real})
        elif entry.is_file():
            yield entry


def _open_generated(folder: Folder, alpha: str | None, expected: int | None) -> Images:
    """A folder of `generate`, by its lines: image i stays image i, whatever else lies there."""
    try:
        count = int(folder.read()["recipe"]["images"]["count"])
    except (KeyError, TypeError, ValueError) as error:
        raise ImageError(f"{folder.manifest} does not say how many images there should be") from error
    there = [(i, r) for i, r in sorted(folder.records().items()) if i < count and folder.good(r)]
    if len(there) < count and (expected is None or len(there) < expected):
        known = {i for i, _ in there}
        first = next(i for i in range(count) if i not in known)
        raise ImageError(
            f"{folder.root} is not complete: {count - len(there)} of {count} images are missing or damaged, first: "
            f"image {first}. Give the command of `diffaccel generate` that made it again: it goes on; or say how many "
            f"are expected, to use the {len(there)} that are there: expected={len(there)} (--expected {len(there)})"
        )
    names, prompts = [r["file"] for _, r in there], [r.get("prompt") for _, r in there]
    return Images(str(folder.root), names, lambda i: folder.root / names[i], alpha, [i for i, _ in there], prompts)


def _array_of(path: Path) -> np.ndarray:
    """`arr_0`, or the only 4-D array of a file that is no statistics."""
    with np.load(path, allow_pickle=False) as data:
        keys = set(data.files)
        if {"mu", "sigma"} <= keys and "arr_0" not in keys:
            raise OptionError(f"{path} holds statistics (mu, sigma), not images")
        if "arr_0" in keys:
            return data["arr_0"]
        arrays = {k: data[k] for k in data.files if data[k].ndim == 4}
    if len(arrays) != 1:
        raise ImageError(f"{path} must hold arr_0 or exactly one 4-D array; it holds {', '.join(sorted(keys))}")
    return next(iter(arrays.values()))


def _open_array(x: np.ndarray | torch.Tensor, id: str, alpha: str | None) -> Images:
    if x.ndim != 4:
        raise ImageError(f"{id}: images must be a 4-D array, got shape {tuple(x.shape)}")
    first = isinstance(x, torch.Tensor) or is_channels_first(x.shape[1:])

    def item(i: int) -> np.ndarray:
        one = x[i]
        if isinstance(one, torch.Tensor):
            # NumPy has no bfloat16, and diffusers converts half precision to float32 before it rounds
            one = (one.float() if one.is_floating_point() else one).detach().cpu().numpy()
        return np.moveaxis(np.asarray(one), 0, -1) if first else np.asarray(one)

    return Images(id, [f"image {i}" for i in range(len(x))], item, alpha)
