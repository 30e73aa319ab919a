"""Feature statistics: what every source becomes before a metric, and the files of five projects.

| file | holds |
|---|---|
| ours | mu (d,), sigma (d, d), n, features (id with the resize), version, remarks; optional jpeg, feats (n, d) |
| pytorch-fid, EDM, clean-fid | mu, sigma |
| ADM | arr_0 (images), mu, sigma (pool3), mu_s, sigma_s (spatial; not used) |
| clean-fid, for KID | feats |

Only ours tells the features; for the others the user must name them, since nothing in such a file tells the resize.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import OptionError, no_leftover
from . import frechet
from .features import DEFAULT, canonical, embedded, extract, get
from .images import Images, open_images

VERSION = 1
_KEYS = ("mu", "sigma", "n", "features", "feats", "version", "jpeg", "remarks")
GIVEN = "given features"  # id of plain feature arrays that nobody named


@dataclass(frozen=True)
class Stats:
    """One side of a comparison.

    values: all features (n, d), if known; rows: a part of them, enough for kernel metrics; moments: (mu, sigma) of a
    file; n: images (None: not known); features: id (None: not known); sizes: (height, width) -> count; jpeg: how many
    are JPEG files (None: not known).
    """

    name: str
    features: str | None
    n: int | None = None
    values: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    moments: tuple[np.ndarray, np.ndarray] | None = None
    sizes: dict[tuple[int, int], int] | None = None
    jpeg: int | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @cached_property
    def gaussian(self) -> frechet.Statistics:
        """Mean and covariance factor, computed once. Raises OptionError if the file holds neither."""
        try:
            if self.values is not None:
                return frechet.from_features(self.values)
            if self.moments is not None:
                return frechet.from_moments(*self.moments, self.n)
        except ValueError as error:
            raise OptionError(f"{self.name}: {error}") from None
        raise OptionError(f"{self.name} holds neither features nor mu and sigma")

    @property
    def width(self) -> int:
        """Features of one image."""
        if self.moments is not None:
            return len(self.moments[0])
        return int(self.sample.shape[1])

    @property
    def sample(self) -> torch.Tensor:
        """Features for kernel metrics: all, or the stored part. Raises OptionError if there are none."""
        found = self.values if self.values is not None else self.rows
        if found is None:
            raise OptionError(
                f"{self.name} holds only mu and sigma; kernel metrics need features: give the images, or a file "
                "written with keep_features=True (--keep-features)"
            )
        return found

    def save(self, path: str | Path, *, keep_features: bool = False) -> Path:
        """Write our format (.npz, written to a temporary name first). keep_features: with all features, for KID and
        intervals (4 n d bytes)."""
        path = _writable(path)
        mean, cov = self.gaussian.mean.numpy(), self.gaussian.covariance.numpy()
        arrays: dict[str, Any] = {
            "mu": mean,
            "sigma": cov,
            "version": np.array(VERSION),
            "features": np.array(self.features or ""),
            "remarks": np.array(json.dumps({"notes": self.notes, "warnings": self.warnings})),
        }
        if self.jpeg is not None:
            arrays["jpeg"] = np.array(self.jpeg)
        if self.n is not None:
            arrays["n"] = np.array(self.n)
        if keep_features:
            arrays["feats"] = self.sample.float().numpy()
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                np.savez(file, **arrays)
            partial.replace(path)
        except OSError as error:
            raise OptionError(f"cannot write {path}: {error.strerror or error}") from None
        finally:
            partial.unlink(missing_ok=True)
        return path

    def digest(self) -> str:
        """SHA-256 of everything that a score takes from it, but the name."""
        found = hashlib.sha256(repr((self.n, self.jpeg, self.sizes, self.notes, self.warnings)).encode())
        for x in (self.values, self.rows, *(self.moments or ())):
            found.update(b"" if x is None else repr(tuple(x.shape)).encode() + np.ascontiguousarray(x).tobytes())
        return found.hexdigest()


def _writable(path: str | Path) -> Path:
    """A name that statistics can be written under, as far as that can be told before."""
    path = Path(path)
    if path.suffix != ".npz":
        raise OptionError(f"statistics are written as .npz, got {path}")
    if path.is_dir():
        raise OptionError(f"cannot write {path}: it is a folder")
    above = next(p for p in path.absolute().parents if p.exists())
    if not above.is_dir():
        raise OptionError(f"cannot write {path}: {above} is no folder")
    return path


def read(path: str | Path, features: str | None = None) -> Stats:
    """Statistics of a file. features: the id, for files that do not tell it; a contradiction is an error."""
    path = Path(path)
    found = _read(path, path.stat().st_mtime_ns)
    if features and found.features and canonical(features) != found.features:
        raise OptionError(f"{path} was made with features {found.features!r}, not {canonical(features)!r}")
    return found if found.features or not features else replace(found, features=canonical(features))


@lru_cache(maxsize=8)  # the factor of a reference is then computed once a process
def _read(path: Path, mtime: int) -> Stats:
    try:
        with np.load(path, allow_pickle=False) as data:
            # the images of an ADM file stay where they are
            got = {k: data[k] for k in _KEYS if k in data.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise OptionError(f"cannot read statistics from {path}: {error}") from None
    _check_shapes(path, got)
    if int(got.get("version", VERSION)) > VERSION:
        raise OptionError(f"{path} has version {int(got['version'])}, this diffaccel reads up to {VERSION}: update it")
    if "feats" not in got and not {"mu", "sigma"} <= set(got):
        raise OptionError(f"{path} holds neither mu and sigma nor feats")
    feats = torch.from_numpy(got["feats"]) if "feats" in got else None
    n = int(got["n"]) if "n" in got else len(feats) if feats is not None and "mu" not in got else None
    whole = feats is not None and n == len(feats)
    remarks = _remarks(path, got)
    return Stats(
        str(path),
        str(got["features"]) or None if "features" in got else None,
        n,
        values=feats if whole else None,
        rows=None if whole else feats,
        moments=(got["mu"], got["sigma"]) if "mu" in got else None,
        jpeg=int(got["jpeg"]) if "jpeg" in got else None,
        notes=remarks.get("notes", ()),
        warnings=remarks.get("warnings", ()),
    )


def _remarks(path: Path, got: dict[str, np.ndarray]) -> dict[str, tuple[str, ...]]:
    """What was said of the images when they were measured; files of other projects say nothing."""
    try:
        return {k: tuple(map(str, v)) for k, v in json.loads(str(got.get("remarks", "{}"))).items()}
    except (ValueError, AttributeError, TypeError):
        raise OptionError(f"{path}: remarks are not those of diffaccel: measure the images again") from None


def _check_shapes(path: Path, got: dict[str, np.ndarray]) -> None:
    """What a file holds under our names may be anything."""
    wanted = {"mu": (1, "fiu"), "sigma": (2, "fiu"), "feats": (2, "fiu"), "n": (0, "iu"), "version": (0, "iu")}
    wanted |= {"jpeg": (0, "iu"), "remarks": (0, "U")}
    for key, (ndim, kinds) in wanted.items():
        if key in got and (got[key].ndim != ndim or got[key].dtype.kind not in kinds):
            raise OptionError(
                f"{path}: {key} is no {'number' if ndim == 0 else f'array of {ndim} dimensions'}: it has the shape "
                f"{got[key].shape} and the type {got[key].dtype}"
            )


def _keys(path: Path) -> set[str]:
    try:
        with np.load(path, allow_pickle=False) as data:
            return set(data.files)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise OptionError(f"cannot read {path}: {error}") from None


def is_statistics(path: Path) -> bool:
    """An .npz with mu and sigma, or with feats and no images."""
    if path.suffix.lower() != ".npz" or not path.is_file():
        return False
    keys = _keys(path)
    return {"mu", "sigma"} <= keys or ("feats" in keys and "arr_0" not in keys)


def reference(name: str) -> Stats:
    """The embedded reference: "tiny-fashion" (32 pixels) or "tiny-fashion:64"."""
    size = name.partition(":")[2] or "32"
    try:
        r = embedded().reference(int(size))
    except FileNotFoundError as error:
        raise OptionError(str(error)) from None
    except ValueError as error:
        raise OptionError(f"{name!r}: {error}") from None
    side = int(r["size"])
    return Stats(
        name,
        r["features"],
        r["n"],
        rows=torch.from_numpy(r["rows"]),
        moments=(r["mu"], r["sigma"]),
        sizes={(side, side): r["n"]},
        jpeg=0,
    )


def known(source: Any, features: str | None, kernel: bool = False) -> Stats | None:
    """The statistics that a source is or names; None if it must be read as images. kernel: features are needed, so an
    ADM file is its images."""
    if isinstance(source, Stats):
        return source if source.features or not features else replace(source, features=canonical(features))
    if isinstance(source, frechet.Statistics):
        id = canonical(features) if features else GIVEN
        found = Stats("statistics", id, source.n, moments=(source.mean.numpy(), source.covariance.numpy()))
        vars(found)["gaussian"] = source  # the cached property: its factor is there already
        return found
    if isinstance(source, (np.ndarray, torch.Tensor)) and source.ndim == 2:
        values = torch.as_tensor(source).detach().cpu()
        return Stats(f"features {tuple(values.shape)}", canonical(features) if features else GIVEN, len(values), values)
    if not isinstance(source, (str, Path)):
        return None
    path = Path(source)
    if isinstance(source, str) and source.partition(":")[0] == "tiny-fashion" and not path.exists():
        return reference(source)
    if not is_statistics(path):
        return None
    found = read(path, features)
    return None if kernel and found.values is None and found.rows is None and "arr_0" in _keys(path) else found


_READING = ("alpha", "unreadable", "batch", "device", "workers", "expected", "progress")


def stats(
    source: Any, out: str | Path | None = None, *, features: Any = None, weights: Any = None, **reading: Any
) -> Stats:
    """Features and statistics of a source (anything `open_images` reads), to compare with more than once.

    out: also write them there (.npz); `keep_features=True` writes the features too. features, weights: see `fid`.
    reading: alpha, unreadable, batch, device, workers, expected, progress.
    """
    keep = bool(reading.pop("keep_features", False))
    no_leftover("stats", reading, [*_READING, "keep_features"])
    name = features if isinstance(features, str) else None
    if out is not None:
        _writable(out)  # before hours of measuring
    found = known(source, name) or _measure(_open(source, reading), features, weights, reading)
    if out is not None:
        found.save(out, keep_features=keep)
    return found


def _open(source: Any, reading: dict[str, Any]) -> Images:
    return open_images(source, **{k: reading[k] for k in ("alpha", "unreadable", "expected") if k in reading})


def _measure(images: Images, features: Any, weights: Any, reading: dict[str, Any]) -> Stats:
    net = get(features, weights)
    got = extract(images, net, **{k: v for k, v in reading.items() if k not in ("alpha", "unreadable")})
    return Stats(
        images.id,
        net.id,
        len(images),
        got.values,
        sizes=got.sizes,
        jpeg=images.jpeg,
        notes=got.notes,
        warnings=got.warnings,
    )


def pair(
    a: Any, b: Any, features: Any, weights: Any, reading: dict[str, Any], kernel: bool = False
) -> tuple[Stats, Stats]:
    """Both sides of a comparison, with the same features: the named ones, else those of the side that knows them, else
    the default. Raises OptionError where they differ or cannot be told. `expected` counts for `a` only."""
    no_leftover("a metric", reading, _READING)
    name = features if isinstance(features, str) or features is None else getattr(features, "id", None)
    # both are opened before either is measured: a wrong path is told at once
    options = [reading, {k: v for k, v in reading.items() if k != "expected"}]
    sides = [known(x, name, kernel) or _open(x, o) for x, o in zip((a, b), options)]
    for side in sides:
        if isinstance(side, Stats) and side.features is None:
            raise OptionError(
                f"{side.name} does not tell its features: name them with features=... (--features), for example "
                "inception-v3:torch for a file of pytorch-fid, inception-v3:tf for one of ADM or EDM, "
                "inception-v3:clean for clean-fid"
            )
    ids = {s.features for s in sides if isinstance(s, Stats)}
    if features is None:
        features = next(iter(ids - {GIVEN}), DEFAULT)
    left, right = (
        side if isinstance(side, Stats) else _measure(side, features, weights, o) for side, o in zip(sides, options)
    )
    if left.features != right.features:
        raise OptionError(
            f"different features: {left.name} has {left.features!r}, {right.name} has {right.features!r}; "
            "their numbers cannot be compared (plain arrays are named with features=...)"
        )
    widths = [s.width for s in (left, right)]
    if len(set(widths)) > 1:
        raise OptionError(f"features have different widths: {left.name} {widths[0]}, {right.name} {widths[1]}")
    return left, right


def remarks(a: Stats, b: Stats) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Notes and warnings about the two sides together."""
    notes, warnings = [*a.notes, *b.notes], [*a.warnings, *b.warnings]
    jpegs = [(s, s.jpeg) for s in (a, b) if s.jpeg]
    if len(jpegs) == 1:
        side, count = jpegs[0]
        other = b if side is a else a
        if other.jpeg == 0:
            warnings.append(f"{side.name} holds {count} JPEG files, {other.name} none: compression changes the number")
        else:
            notes.append(f"{side.name} holds {count} JPEG files; how the images of {other.name} were stored is unknown")
    resizes = (a.features or "").startswith(("inception-v3:", "clip:", "dino:"))
    if a.sizes and b.sizes and not resizes and set(a.sizes) != set(b.sizes):
        text = (", ".join(sorted(f"{h}x{w}" for h, w in s.sizes or ())) for s in (a, b))
        warnings.append(f"{a.features} does not resize, and the sizes differ: {' against '.join(text)}")
    return tuple(notes), tuple(warnings)
