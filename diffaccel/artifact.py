"""Artifacts: what was calibrated on a checkpoint, in one file, with everything that tells whether it fits.

An artifact is a safetensors file; its metadata is JSON: kind, format, library version, path, model, calls, options,
guidance, shape, cost, receipt. Reading one needs neither torch nor the model.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from .core.families import VP
from .core.path import Path
from .errors import ArtifactError

FORMAT = 1
KEY = "diffaccel"  # of the JSON in the metadata of the file


class Receipt(dict[str, Any]):
    """What was measured when the artifact was made; printed one entry a line."""

    def __str__(self) -> str:
        return "\n".join(_lines(self)) or "no receipt"


def _lines(entries: Mapping[str, Any], indent: str = "") -> list[str]:
    lines = []
    for key, value in entries.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {f'{value:.4g}' if isinstance(value, float) else value}")
    return lines


@dataclass(frozen=True, eq=False)
class Artifact:
    """Calibrated data of one checkpoint. Equality and hash are by content.

    Args:
        kind: which method it belongs to ("ems", "dc", "fit", ...).
        tensors: name -> array; kept as they are, read-only.
        meta: JSON values. Known keys: `path` (`path_identity`), `model` (`identity.model_identity`), `guidance`,
            `shape` (of one sample), `calls`, `options`, `seeds`, `cost` ({"calls", "seconds"}), `receipt`.
        file: the name that it is saved under beside a scheduler's config.

    Raises:
        ArtifactError: for metadata that JSON cannot hold.
    """

    kind: str
    tensors: dict[str, np.ndarray]
    meta: dict[str, Any] = field(default_factory=dict)
    file: str = ""

    def __post_init__(self) -> None:
        fixed = {}
        for name, values in self.tensors.items():
            array = np.ascontiguousarray(values).reshape(np.shape(values)).copy()
            array.flags.writeable = False
            fixed[name] = array
        try:
            meta = json.loads(json.dumps(self.meta, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"metadata of a {self.kind!r} artifact must be JSON values: {error}") from None
        object.__setattr__(self, "tensors", fixed)
        object.__setattr__(self, "meta", meta)
        object.__setattr__(self, "file", self.file or f"{self.kind}.safetensors")

    # ------------------------------------------------------------------ content
    @property
    def receipt(self) -> Receipt:
        """What was measured when it was made."""
        return Receipt(self.meta.get("receipt", {}))

    @cached_property
    def sha256(self) -> str:
        """Of kind, metadata and tensors (not of the file's bytes, which another safetensors may lay out anew)."""
        sha = hashlib.sha256(json.dumps([self.kind, self.meta], sort_keys=True).encode())
        for name in sorted(self.tensors):
            array = self.tensors[name]
            sha.update(f"{name} {array.dtype.str} {array.shape}".encode())
            sha.update(array.tobytes())
        return sha.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Artifact) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __deepcopy__(self, memo: dict[int, Any]) -> Artifact:
        return self  # nothing in it changes

    # ------------------------------------------------------------------ files
    def save(self, path: str | os.PathLike[str]) -> FilePath:
        """Write the file at once or not at all.

        Returns:
            the path.
        """
        from . import __version__

        head = {"kind": self.kind, "format": FORMAT, "library_version": __version__, "sha256": self.sha256}
        return write_whole(path, serialize(self.tensors, metadata={KEY: json.dumps(head | {"meta": self.meta})}))

    @classmethod
    def load(cls, path: str | os.PathLike[str], kind: str | tuple[str, ...] | None = None) -> Artifact:
        """Read a file that `save` wrote.

        Args:
            path: of the file.
            kind: the kind that is needed, or several; any if None.

        Raises:
            ArtifactError: no such file, truncated, not an artifact, of another format or kind, or changed since.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise ArtifactError(f"an artifact is an Artifact or its file, got {path!r}")
        path = FilePath(path)
        if not path.is_file():
            raise ArtifactError(f"there is no artifact {str(path)!r}")
        head, tensors = _read(path)
        if head.get("format") != FORMAT:
            raise ArtifactError(
                f"{path} has format {head.get('format')} (written by diffaccel {head.get('library_version')}); this "
                f"version reads format {FORMAT}. Calibrate again, or install the version that wrote it."
            )
        made = cls(head["kind"], tensors, head["meta"], path.name)
        if made.sha256 != head["sha256"]:
            raise ArtifactError(f"{path} was changed after it was written: its checksum does not match its content")
        return made.of_kind(kind) if kind is not None else made

    def of_kind(self, kind: str | tuple[str, ...]) -> Artifact:
        """The artifact itself if it is of that kind, or of one of those kinds.

        Raises:
            ArtifactError: if not.
        """
        kinds = (kind,) if isinstance(kind, str) else kind
        if self.kind not in kinds:
            wanted = " or ".join(map(repr, kinds))
            raise ArtifactError(f"{self.file} is an artifact of kind {self.kind!r}; {wanted} is needed here")
        return self


def write_whole(path: str | os.PathLike[str], data: bytes) -> FilePath:
    """Write a file at once or not at all, and make its folder.

    Returns:
        the path.
    """
    path = FilePath(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        FilePath(partial).unlink(missing_ok=True)
        raise
    return path


def _read(path: FilePath) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(metadata, tensors) of an artifact file."""
    try:
        with safe_open(path, framework="numpy") as data:
            text = (data.metadata() or {}).get(KEY)
            head = json.loads(text) if text else None
            tensors = {name: data.get_tensor(name) for name in data.keys()} if head else {}  # noqa: SIM118
    except (SafetensorError, struct.error, OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is truncated or no safetensors file ({error})") from None
    if not isinstance(head, dict) or not {"kind", "meta", "sha256"} <= head.keys():
        raise ArtifactError(
            f"{path} is a safetensors file, but no artifact of diffaccel (weights of a model?). Artifacts are made by "
            "`diffaccel calibrate ... MODEL --out FILE`"
        )
    return head, tensors


# ---------------------------------------------------------------------- the path
def path_identity(path: Path, prediction_type: str) -> dict[str, Any]:
    """What must agree where calibrated data is used: family, prediction type, the (alpha, sigma) table.

    The table is taken at fixed t, so the shift of a flow path, which only places nodes, is no part of it; nor is what
    a VP path has between its training steps, which is the scheduler's choice. EDM paths have one table, `alpha = 1`.
    """
    return _identity(replace(path, interpolation="lam") if isinstance(path, VP) else path, prediction_type)


def _identity(path: Path, prediction_type: str) -> dict[str, Any]:
    if path.family == "edm":
        table = np.zeros(0)
    else:
        first, last = path.first.t, path.last.t
        ts = np.linspace(0.0 if path.family == "flow" else last, first, 67)[1:-1]
        table = np.round([path.at(float(t)).lam for t in ts], 9)
    ends = [path.last.lam if path.last.sigma else None, path.first.lam if path.first.alpha else None]
    return {
        "family": path.family,
        "prediction_type": prediction_type,
        "table_sha256": hashlib.sha256(table.tobytes()).hexdigest(),
        "lam_range": sorted(e for e in ends if e is not None),
    }


def check_path(artifact: Artifact, path: Path, prediction_type: str) -> None:
    """Raise if the artifact was made on another path or for another prediction type.

    Raises:
        ArtifactError: with both sides.
    """
    made, here = artifact.meta.get("path"), path_identity(path, prediction_type)
    if made is None:
        raise ArtifactError(f"{artifact.file} does not say which path it was made on; calibrate again")
    known = [here]
    if isinstance(path, VP):  # older artifacts were told apart between the training steps, too
        known.append(_identity(replace(path, interpolation="sigma"), prediction_type))
    if any(all(made[key] == one[key] for key in ("family", "prediction_type", "table_sha256")) for one in known):
        return
    raise ArtifactError(
        f"{artifact.file} was calibrated on another path.\n  artifact:  {_path_text(made)}\n"
        f"  scheduler: {_path_text(here)}\nCalibrate again on this model."
    )


def _path_text(p: Mapping[str, Any]) -> str:
    ends = ", ".join(f"{v:.4g}" for v in p["lam_range"])
    return f"{p['family']}, {p['prediction_type']}, lam in [{ends}], table {p['table_sha256'][:12]}"


def check_shape(artifact: Artifact, name: str, shape: tuple[int, ...], more: str = "") -> None:
    """Raise if a tensor of the artifact (without its first axis) does not broadcast to one sample.

    Args:
        name: of the tensor, (n, *shape of one sample or broadcastable).
        shape: of one sample.
        more: end of the message: what else can be done.

    Raises:
        ArtifactError: with both shapes.
    """
    mine = artifact.tensors[name].shape[1:]
    try:
        fits = np.broadcast_shapes(mine, shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ArtifactError(
            f"{artifact.file} was calibrated for samples of shape {tuple(mine)}, this run's are {tuple(shape)}. "
            f"Calibrate at this size, or with reduce='channel', which serves every size.{more}"
        )
