"""What a stopped calibration goes on from."""

from __future__ import annotations

import glob
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import Artifact
from ..errors import OptionError

EVERY = 60.0  # seconds between writes

Tensors = dict[str, np.ndarray]


class Checkpoint:
    """State on disk, written at most once a minute and removed at the end.

    Args:
        path: of the file; None keeps nothing.
        settings: everything that the result depends on (JSON); a file of other settings is refused.

    Attributes:
        arrays: name -> array.
        notes: JSON values.

    Raises:
        OptionError: a file that belongs to another calibration.
        ArtifactError: a damaged file.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self.settings = json.loads(json.dumps(settings))
        self.arrays: Tensors = {}
        self.notes: dict[str, Any] = {}
        self._written = time.monotonic()
        if self.path is None or not self.path.exists():
            return
        found = Artifact.load(self.path, "partial")
        theirs = found.meta["settings"]
        if theirs != self.settings:
            differ = [k for k in {**theirs, **self.settings} if theirs.get(k) != self.settings.get(k)]
            raise OptionError(
                f"{self.path} was left by another calibration ({', '.join(sorted(differ))} differ); finish that one, "
                "delete the file, or write to another --out"
            )
        self.arrays, self.notes = dict(found.tensors), dict(found.meta["notes"])

    def tick(self) -> None:
        """Write if a minute has passed."""
        if time.monotonic() - self._written >= EVERY:
            self.save()

    def save(self) -> None:
        """Write now."""
        if self.path is not None:
            Artifact("partial", self.arrays, {"settings": self.settings, "notes": self.notes}).save(self.path)
        self._written = time.monotonic()

    def remove(self) -> None:
        """The calibration is finished: the file goes, and what a process killed while writing it left."""
        if self.path is not None:
            for file in (self.path, *self.path.parent.glob(f".{glob.escape(self.path.name)}.*")):
                file.unlink(missing_ok=True)
