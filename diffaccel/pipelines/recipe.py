"""Recipes: what `diffaccel tune` found for one checkpoint, as JSON that names everything and holds every number.

A recipe says what to run (`choice`), where it was found (`made_on`), what was measured (`receipt`), and what that cost
(`spent`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import Artifact, Receipt, write_whole
from ..errors import ArtifactError

FORMAT = 1
KIND = "diffaccel recipe"
PARTS = (
    "choice",
    "made_on",
    "receipt",
)  # what the checksum covers; what was spent, and versions, differ from run to run
DTYPES = ("float64", "float32", "int64")
MOST = 200_000  # numbers that a recipe embeds, about 4 MB of text


@dataclass(frozen=True, eq=False)
class Choice:
    """One way to run a pipeline: a candidate of `tune`, and what a recipe holds.

    Args:
        name: for tables and messages; unique among candidates.
        kind: how it is applied, a key of `pipelines.applied.BUILDERS`.
        settings: of that kind (JSON values).
        calls: model calls an image; a pair for classifier-free guidance counts once.
        work: the same in calls of the whole model at full size, where calls differ in cost; None: `calls`.
        artifact: calibrated data that it needs.
    """

    name: str
    kind: str
    settings: Mapping[str, Any]
    calls: int
    work: float | None = None
    artifact: Artifact | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        """JSON values, the artifact's numbers included."""
        plain: dict[str, Any] = {"name": self.name, "kind": self.kind, "calls": self.calls}
        plain |= {} if self.work is None else {"work": self.work}
        plain |= {"settings": json.loads(json.dumps(dict(self.settings)))}
        return plain | ({} if self.artifact is None else {"artifact": _packed(self.artifact)})

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Choice:
        """What `to_json` gave."""
        held = given.get("artifact")
        artifact = None if held is None else _unpacked(held)
        return cls(given["name"], given["kind"], given["settings"], given["calls"], given.get("work"), artifact)


def _packed(artifact: Artifact) -> dict[str, Any]:
    """An artifact as JSON. `repr` of a float is its shortest text that reads back as the same float."""
    tensors, count = {}, sum(array.size for array in artifact.tensors.values())
    if count > MOST:
        raise ArtifactError(f"{artifact.file} holds {count} numbers; a recipe embeds {MOST} at most; use fewer")
    for name, array in sorted(artifact.tensors.items()):
        if array.dtype.name not in DTYPES:
            raise ArtifactError(f"{artifact.file}: {name} is {array.dtype}; a recipe holds {', '.join(DTYPES)}")
        values = " ".join(map(repr, array.ravel().tolist()))
        tensors[name] = {"dtype": array.dtype.name, "shape": list(array.shape), "values": values}
    return {"kind": artifact.kind, "file": artifact.file, "meta": artifact.meta, "tensors": tensors}


def _unpacked(held: Mapping[str, Any]) -> Artifact:
    tensors = {}
    for name, part in held["tensors"].items():
        if part["dtype"] not in DTYPES:
            raise ValueError(f"dtype {part['dtype']!r}")
        read = int if part["dtype"] == "int64" else float
        values = np.array([read(v) for v in part["values"].split()], dtype=part["dtype"])
        tensors[name] = values.reshape(part["shape"])
    return Artifact(held["kind"], tensors, held["meta"], held["file"])


@dataclass(frozen=True, eq=False)
class Recipe:
    """See the module. Equality and hash are by `sha256`.

    Args:
        choice: what to run.
        made_on: `pipeline` (class), `model` (`identity.model_identity`), `path` (`artifact.path_identity`), `guidance`,
            `shape` (of one state as the denoiser sees it), `call` (further arguments of the pipeline's call).
        receipt: what was measured; deterministic.
        spent: model calls and seconds of the tuning, seconds an image; not part of the recipe's identity.
        file: for messages.
    """

    choice: Choice
    made_on: Mapping[str, Any]
    receipt: Receipt
    spent: Mapping[str, Any] = field(default_factory=dict)
    file: str = "recipe.json"

    def _parts(self) -> dict[str, Any]:
        return {"choice": self.choice.to_json(), "made_on": dict(self.made_on), "receipt": dict(self.receipt)}

    @cached_property
    def sha256(self) -> str:
        """Of everything but what was spent, and versions."""
        return _checksum(self._parts())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def as_artifact(self) -> Artifact:
        """Where it was made, in the form that `identity.check_model` and `artifact.check_path` compare."""
        return Artifact("recipe", {}, {key: self.made_on[key] for key in ("model", "path", "guidance")}, self.file)

    # ------------------------------------------------------------------ files
    def to_json(self) -> str:
        """The text of the file."""
        from .. import __version__

        head = {"kind": KIND, "format": FORMAT, "library_version": __version__, "sha256": self.sha256}
        whole = head | self._parts() | {"spent": dict(self.spent)}
        return json.dumps(whole, indent=1, allow_nan=False, ensure_ascii=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file at once or not at all."""
        return write_whole(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a file that `save` wrote.

        Raises:
            ArtifactError: no such file, damaged, no recipe, of another format, or changed since.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ArtifactError(f"there is no recipe {os.fspath(path)!r} ({error.strerror})") from None
        except UnicodeDecodeError:
            raise ArtifactError(f"{os.fspath(path)} is no recipe: it is not text") from None
        return cls.from_json(text, os.path.basename(path))

    @classmethod
    def from_json(cls, text: str, file: str = "recipe.json") -> Recipe:
        """What `to_json` gave; errors as for `load`."""
        try:
            whole = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArtifactError(
                f"{file} is damaged or no recipe: line {error.lineno}: {error.msg}. Recipes are made by `diffaccel "
                "tune MODEL --calls N --out recipe.json`"
            ) from None
        if not isinstance(whole, dict) or whole.get("kind") != KIND:
            raise ArtifactError(f"{file} is JSON, but no recipe of diffaccel (its kind is not {KIND!r})")
        if whole.get("format") != FORMAT:
            raise ArtifactError(
                f"{file} has format {whole.get('format')!r}, written by diffaccel {whole.get('library_version')}; this "
                f"version reads format {FORMAT}. Tune again, or install the version that wrote it."
            )
        missing = [key for key in (*PARTS, "sha256") if key not in whole]
        if missing:
            raise ArtifactError(f"{file} is damaged: it has no {', '.join(missing)}")
        if whole["sha256"] != _checksum({key: whole[key] for key in PARTS}):
            raise ArtifactError(f"{file} was changed after it was written: its checksum does not match its content")
        try:
            choice = Choice.from_json(whole["choice"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{file} is damaged: its choice cannot be read ({error!r})") from None
        return cls(choice, whole["made_on"], Receipt(whole["receipt"]), whole.get("spent") or {}, file)


def _checksum(parts: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(parts, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"a recipe holds JSON values: {error}") from None
    return hashlib.sha256(text.encode()).hexdigest()
