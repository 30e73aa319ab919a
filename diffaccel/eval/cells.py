"""The folder of a sweep: which images it consists of, and the blocks of them that are done.

    sweep.json                     what is swept; rewritten by every start
    cells/<name>-<calls>-<hash>/   one scheduler at one number of calls; the hash is of all that an image depends on
        cell.json                  that, readable
        000000-000255.npz          a finished block: images, last latents, digests, and what was counted
        000000-000255.<kind>.npz   what was measured on it (features, embeddings, errors to the teacher)

A file appears under its name only when it is whole. Another option gives another hash, so nothing is ever mixed.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OptionError
from ..parallel.agree import differences, in_both, plain
from ..parallel.folder import Folder

VERSION = 1
CANDIDATE, STOCK, TEACHER, HALF = "candidate", "stock", "teacher", "half teacher"


@dataclass(frozen=True)
class Block:
    """Images first .. last."""

    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.first:06d}-{self.last:06d}"

    def __len__(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True)
class Cell:
    """A scheduler at a budget of calls.

    name: of the scheduler. calls: asked for. role: candidate, stock, teacher or half teacher. images: how many.
    folder: its name under cells/. steps: `num_inference_steps`; None if the scheduler cannot do it. extra: a budget
    that nobody asked for, there to show what fewer calls do. scheduler: class, config and ramp.
    """

    name: str
    calls: int
    role: str
    images: int
    folder: str
    steps: int | None
    extra: bool = False
    scheduler: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.name}, {self.calls} calls"

    def blocks(self, size: int) -> list[Block]:
        if self.steps is None:
            return []
        return [Block(i, min(i + size, self.images) - 1) for i in range(0, self.images, size)]


@dataclass(frozen=True)
class Plan:
    """A sweep.

    recipe: what all images depend on (weights, call options, seed, ...). prompts: image i has prompt i mod P. texts:
    whether they are texts (not class numbers). reference: file or name, None without FID. features, clip: ids of the
    networks, None without. notes: what was left out, and why. environment: versions and machine. command: how it was
    started.
    """

    recipe: dict[str, Any]
    prompts: list[str]
    texts: bool
    images: int
    block: int
    batch: int
    calls: list[int]
    cells: list[Cell]
    reference: str | None
    features: str | None
    clip: str | None
    notes: list[str]
    environment: dict[str, Any]
    command: str

    def prompt(self, i: int) -> str:
        return self.prompts[i % len(self.prompts)]

    def of_role(self, role: str) -> Cell | None:
        return next((c for c in self.cells if c.role == role), None)


def cell_folder(name: str, calls: int, recipe: Mapping[str, Any]) -> str:
    """The name of a cell's folder."""
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9.+-]+', '_', name)[:40]}-{calls}-{digest}"


class Store:
    """The folder of a sweep on disk."""

    def __init__(self, out: str | Path) -> None:
        self.folder = Folder(out)
        self.root = self.folder.root
        self.file = self.root / "sweep.json"

    # ------------------------------------------------------------------ the plan
    def begin(self, plan: Plan) -> None:
        """Write the plan, and make the folders of its cells."""
        with self.folder.writing():
            strangers = [p for p in self.root.iterdir() if not p.name.endswith(".tmp")]
            if strangers and not self.file.exists():
                raise OptionError(
                    f"{self.root} is not empty and holds no sweep (no {self.file.name}): choose a new --out"
                )
            self._agree(plan)
            self.folder.replace(self.file, _json({"version": VERSION, **asdict(plan)}))
            for cell in plan.cells:
                where = self.root / "cells" / cell.folder
                where.mkdir(parents=True, exist_ok=True)
                if not (where / "cell.json").exists():
                    self.folder.replace(where / "cell.json", _json({**plan.recipe, **asdict(cell)}))

    def _agree(self, plan: Plan) -> None:
        """Raises OptionError where a cell that is there was made with other configs of the pipeline's components.

        They are no part of a cell's name: cells of earlier versions, which know none, stay valid.
        """
        for cell in plan.cells:
            file = self.root / "cells" / cell.folder / "cell.json"
            before = json.loads(file.read_text(encoding="utf-8")).get("configs", {}) if file.exists() else {}
            known, asked = in_both(before, plain(plan.recipe.get("configs", {})))
            if wrong := differences(known, asked, "the folder has", "this pipeline has", "configs"):
                raise OptionError(
                    f"{self.root} holds images of another pipeline:\n" + "\n".join(wrong) + "\nChoose another --out; "
                    "images of two models are never mixed."
                )

    def plan(self) -> Plan:
        """Raises OptionError where there is none."""
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
        except OSError as error:
            raise OptionError(f"{self.root} holds no sweep: cannot read {self.file.name} ({error.strerror})") from None
        except ValueError as error:
            raise OptionError(f"{self.file} is damaged: {error}") from None
        version = found.pop("version", None)
        if version != VERSION:
            raise OptionError(f"{self.file} has version {version}, this diffaccel reads {VERSION}")
        return Plan(**{**found, "cells": [Cell(**c) for c in found["cells"]]})

    # ------------------------------------------------------------------ blocks
    def path(self, cell: Cell, block: Block, kind: str = "") -> Path:
        return self.root / "cells" / cell.folder / f"{block.name}{f'.{kind}' if kind else ''}.npz"

    def done(self, cell: Cell, block: Block, kind: str = "") -> bool:
        """Whether it is there, whole (a file that a crash of the machine cut short has no table of contents)."""
        path = self.path(cell, block, kind)
        return path.exists() and zipfile.is_zipfile(path)

    def write(self, cell: Cell, block: Block, arrays: Mapping[str, Any], kind: str = "") -> None:
        held = io.BytesIO()
        np.savez(held, **arrays)
        with self.folder.writing():
            self.folder.replace(self.path(cell, block, kind), held.getvalue())

    def read(self, cell: Cell, block: Block, kind: str = "", only: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
        """Arrays of a finished block (`only` these, where given)."""
        path = self.path(cell, block, kind)
        try:
            with np.load(path, allow_pickle=False) as data:
                return {k: data[k] for k in data.files if not only or k in only}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise OptionError(f"{path} is damaged ({error}); delete it and run the same command again") from None

    def counted(self, cell: Cell, block: Block) -> dict[str, Any]:
        """What was counted when a block was made."""
        return json.loads(str(self.read(cell, block, only=("counted",))["counted"]))


def _json(value: Any) -> bytes:
    return (json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
