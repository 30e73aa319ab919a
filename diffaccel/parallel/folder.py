"""The folder that `generate` fills: images, the recipe they were made with, and one line for each image.

    manifest.json     the recipe; written once, before the first image
    images.jsonl      one JSON line an image, in order of index; rewritten when a run begins and when it ends
    failed.jsonl      one JSON line a chunk that could not be painted by the last run; no file where there is none
    parts/*.jsonl     lines that a process wrote since; each process of each run has its own file
    000000/000123.png image 123 (a thousand a folder)

A process can be killed at any moment: files appear under their names only when they are whole, an image's line is
written after the image, and a torn last line is no line.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import DiffaccelError, OptionError
from .agree import differences, in_both, parsed, plain

Record = dict[str, Any]
VERIFY = ("fast", "full")
IMAGE, FAILURE = {"index", "file", "bytes", "sha256"}, {"chunk", "images", "error"}  # keys that tell lines apart


class FolderError(DiffaccelError, OSError):
    """The output folder cannot be used, or holds something else."""


class Folder:
    """`root` need not exist yet."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.manifest, self.lines, self.parts = (self.root / n for n in ("manifest.json", "images.jsonl", "parts"))
        self.failed = self.root / "failed.jsonl"

    # ------------------------------------------------------------------ the recipe
    def begin(self, recipe: Mapping[str, Any], environment: Mapping[str, Any]) -> list[str]:
        """Write the recipe, or check that its images were made with this recipe.

        Returns:
            Lines that say where the environment (versions, device name) differs: worth a warning, no more.

        Raises:
            FolderError: not usable, holds other files, or images of another recipe; the message shows both sides.
        """
        with self.writing():
            # a run that was killed before it wrote its recipe may have left the unfinished file of it
            if not self.manifest.exists() and any(not p.name.endswith(".tmp") for p in self.root.iterdir()):
                raise FolderError(f"{self.root} is not empty and has no {self.manifest.name}: choose a new folder")
            # a recipe that failed before its first image binds nobody
            if not self.manifest.exists() or not any(self.root.glob("*/*.png")):
                whole = plain({"recipe": recipe, "environment": environment})
                text = json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False)
                self.replace(self.manifest, (text + "\n").encode())
        before, asked = self.read(), plain(recipe)
        # earlier versions wrote no configs, and another version of a library may write other keys of them
        configs = in_both(before["recipe"].get("configs", {}), asked.get("configs", {}))
        known, asked = ({**side, "configs": found} for side, found in zip((before["recipe"], asked), configs))
        wrong = differences(known, asked, "the folder has", "this run has")
        if wrong:
            raise FolderError(
                f"{self.root} holds images of another recipe:\n"
                + "\n".join(wrong)
                + "\nGive the same options to go on, or another --out; images of two recipes are never mixed."
            )
        with self.writing():
            self.parts.mkdir(exist_ok=True)
        return differences(before["environment"], plain(environment), "the folder has", "this run has")

    def read(self) -> dict[str, Any]:
        """What manifest.json holds: {"recipe": ..., "environment": ...}."""
        try:
            found = parsed(self.manifest.read_text(encoding="utf-8"))
            return {"recipe": found["recipe"], "environment": found["environment"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FolderError(f"{self.manifest} cannot be read ({type(error).__name__}: {error})") from error

    # ------------------------------------------------------------------ images
    def name(self, index: int) -> str:
        """Of image `index`, relative to the folder."""
        return f"{index // 1000 * 1000:06d}/{index:06d}.png"

    def save(self, index: int, pixels: np.ndarray) -> Record:
        """Write (H, W, 3) uint8 as PNG; `file`, `bytes` and `sha256` (of the pixels) of its line."""
        held = io.BytesIO()
        Image.fromarray(pixels).save(held, "png")
        name, data = self.name(index), held.getvalue()
        with self.writing():
            (self.root / name).parent.mkdir(exist_ok=True)
            self.replace(self.root / name, data)
        return {"file": name, "bytes": len(data), "sha256": _digest(pixels)}

    def good(self, record: Record, verify: str = "fast") -> bool:
        """Whether the image of a line is there: by its size, or ("full") by its pixels."""
        path = self.root / record["file"]
        try:
            if path.stat().st_size != record["bytes"]:
                return False
            if verify == "fast":
                return True
            with Image.open(path) as image:
                return _digest(np.asarray(image)) == record["sha256"]
        except (OSError, SyntaxError, ValueError):  # missing, or what PIL raises for a broken file
            return False

    # ------------------------------------------------------------------ lines
    def records(self) -> dict[int, Record]:
        """The line of each image, by index; later lines replace earlier ones."""
        return {r["index"]: r for r in self._read(self.lines, IMAGE)}

    def failures(self) -> dict[int, Record]:
        """What the last run could not paint, by chunk: {"chunk", "images" (indexes), "error"}."""
        return {r["chunk"]: r for r in self._read(self.failed, FAILURE)}

    def _read(self, merged: Path, keys: set[str]) -> Iterator[Record]:
        for file in [merged, *sorted(self.parts.glob("*.jsonl"))]:
            with contextlib.suppress(FileNotFoundError):
                yield from _whole_lines(file.read_bytes(), keys)

    def part(self, run: str, rank: int) -> Part:
        """A new file for the lines of one process of one run."""
        return Part(self, self.parts / f"{run}-{rank:05d}.jsonl")

    def merge(self, records: Mapping[int, Record], failures: Mapping[int, Record] | None = None) -> None:
        """Write `records` as images.jsonl and `failures` as failed.jsonl, then drop the parts that they replace."""
        old = list(self.parts.glob("*.jsonl"))
        with self.writing():
            self.replace(self.lines, _sorted(records))
            if failures:
                self.replace(self.failed, _sorted(failures))
            else:
                self.failed.unlink(missing_ok=True)
            for file in old:
                file.unlink()

    def sweep(self) -> None:
        """Remove what killed processes left half-written."""
        with self.writing():
            for pattern in ("*.tmp", "*/*.tmp"):
                for file in self.root.glob(pattern):
                    file.unlink(missing_ok=True)

    def end(self) -> None:
        """Remove the folder of parts of a run that is over."""
        with contextlib.suppress(OSError):  # not empty: another process still writes there
            self.parts.rmdir()

    # ------------------------------------------------------------------ writing
    def replace(self, path: Path, data: bytes) -> None:
        """Write a file so that it is under its name whole or not at all."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                if path.parent == self.root:  # few and precious; a lost image is found by its size
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an error of the file system into one that says what to do."""
        try:
            yield
        except FolderError:
            raise
        except OSError as error:
            raise FolderError(
                f"cannot write to {self.root}: {error.strerror or error}. Finished images are kept: repair this and "
                "run the same command again"
            ) from error


class Part:
    """Lines of one process, written a chunk at a time so that they survive a kill right after."""

    def __init__(self, folder: Folder, path: Path) -> None:
        self._folder = folder
        with folder.writing():
            self._file = open(path, "xb", buffering=0)  # noqa: SIM115 - closed by __exit__

    def write(self, records: Iterable[Record]) -> None:
        """Append the lines of one chunk."""
        data = "".join(map(_line, records)).encode()
        with self._folder.writing():
            while data:  # a write can be short where the disk is nearly full; the next one then says so
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextlib.contextmanager
def locked(folder: Folder) -> Iterator[None]:
    """Make the folder, and keep a second run out of it while this one lasts (where the system has flock)."""
    root = folder.root
    with folder.writing():
        root.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    held = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(held)
        raise FolderError(f"another run is writing to {root}; wait for it or stop it") from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(held)


def check_verify(verify: str) -> str:
    """`verify`, or an error that lists what it can be."""
    if verify not in VERIFY:
        raise OptionError(f"verify is 'fast' (sizes of files) or 'full' (pixels), not {verify!r}")
    return verify


def _whole_lines(data: bytes, keys: set[str]) -> Iterator[Record]:
    for line in data.split(b"\n")[:-1]:  # what follows the last newline was torn
        try:
            found = json.loads(line)
        except ValueError:  # a torn line in the middle: the disk was full once
            continue
        if isinstance(found, dict) and keys <= found.keys():
            yield found


def _sorted(lines: Mapping[int, Record]) -> bytes:
    return "".join(_line(lines[i]) for i in sorted(lines)).encode()


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
