"""What `calibrate.cache` measured on a checkpoint, found again by everything that it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..artifact import Artifact
from ..errors import ArtifactError
from ..identity import EXACT, both_sides, differing
from .cache import Cache, letters
from .compensate import Compensation
from .contract import denoisers

KIND = "cache"
PASSES = "number of model calls a step"  # of a key: guidance by two calls, or none
CHOICES = ("forecast", "level", "variable")  # of a cache, beside its mask


def key_of(
    pipe: Any, scheduler: Any, shape: tuple[int, ...], quant: Mapping[str, Any] | None, passes: int = 0
) -> dict[str, Any]:
    """What calibrated data of a cache depends on beside the checkpoint, during or after a run.

    Args:
        pipe: which runs; its guidance scale is read.
        scheduler: after `set_timesteps`.
        shape: of one sample of the state, without the batch.
        quant: the recipe of the quantisation (`Quantised.recipe`), or None.
        passes: calls of the denoiser in a step; 0: not known.

    Returns:
        JSON values; the grid's is a hash of the timesteps and sigmas.
    """
    config = {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")}
    return {
        "scheduler": type(scheduler).__name__,
        "scheduler config": _sha(json.dumps(config, sort_keys=True, default=str).encode()),
        "steps": len(scheduler.timesteps),
        "grid": grid_hash(scheduler),
        "guidance": guidance_of(pipe),
        "shape": [int(n) for n in shape],
        "quantisation": None if quant is None else {k: quant[k] for k in ("mode", "layers")},
        **({PASSES: passes} if passes else {}),
    }


class Passes:
    """Counts calls of a pipeline's denoisers until `taken`: guidance that calls twice is no part of its scale.

    Args:
        pipe: whose denoisers are watched, until `remove`.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe, self._local = pipe, threading.local()
        self._handles = [model.register_forward_pre_hook(self._count) for model in denoisers(pipe).values()]

    def _count(self, *_: Any) -> None:
        now = self._pipe.scheduler.timesteps
        if getattr(self._local, "timesteps", None) is not now:  # a run that ended in an error left its count
            self._local.timesteps, self._local.count = now, 0
        self._local.count += 1

    def taken(self) -> int:
        """Calls in this thread since the last time."""
        found, self._local.count = getattr(self._local, "count", 0), 0
        return found

    def remove(self) -> None:
        """Stop counting; twice is fine."""
        while self._handles:
            self._handles.pop().remove()


def grid_hash(scheduler: Any) -> str:
    """Of timesteps and sigmas, rounded to 6 digits (float32 has 7)."""
    parts = [scheduler.timesteps, getattr(scheduler, "sigmas", None)]
    values = [v.detach().double().cpu().numpy() for v in parts if isinstance(v, torch.Tensor)]
    return _sha(b"".join(np.char.mod("%.5e", v).tobytes() for v in values))


def guidance_of(pipe: Any) -> float | None:
    """The guidance scale of the pipeline's last call, or None where it has none."""
    value = getattr(pipe, "_guidance_scale", None)
    return None if value is None else float(value)


class Calibrated:
    """An artifact of `calibrate.cache`.

    Raises:
        ArtifactError: an artifact of another kind, or without runs.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact.of_kind(KIND)
        self.runs: list[dict[str, Any]] = artifact.meta.get("runs") or []
        if not self.runs:
            raise ArtifactError(f"{artifact.file} holds no calibrated run; calibrate again")

    @classmethod
    def load(cls, source: Artifact | str | os.PathLike[str]) -> Calibrated:
        """From a file, or an artifact itself."""
        return cls(source if isinstance(source, Artifact) else Artifact.load(source))

    def run(self, cache: Cache, level: str) -> int:
        """The number of the run that was calibrated with these settings.

        Args:
            cache: static settings.
            level: in use (`cache.level` may be None).

        Raises:
            ArtifactError: none was; lists those that were.
        """
        if not cache.static:
            raise ArtifactError(f"{self.artifact.file} serves policies that are known before the run, not {cache.name}")
        steps = int(self.artifact.meta["key"]["steps"])
        mine = (letters(cache.full_steps(steps)), cache.forecast, level, cache.variable)
        known = [(run["decisions"], *(run["cache"][name] for name in CHOICES)) for run in self.runs]
        if mine not in known:
            told = "; ".join(_told(*k) for k in known)
            raise ArtifactError(
                f"{self.artifact.file} was not calibrated for {cache.name}: {_told(*mine)}. It holds {told}. Use one "
                "of these, or calibrate with cache=[...]"
            )
        return known.index(mine)

    def compensation(self, number: int) -> Compensation | None:
        """Of a run; None where it brought no benefit (or was not asked for).

        Raises:
            ArtifactError: gains that are no correction.
        """
        if not self.runs[number].get("compensated"):
            return None
        mu_ref, mu_acc, gain = (self.artifact.tensors[f"{name}_{number}"] for name in ("mu_ref", "mu_acc", "gain"))
        return Compensation(mu_ref, mu_acc, gain, self.runs[number].get("axis"))

    def check(self, key: Mapping[str, Any]) -> None:
        """Raise if the run is not the calibrated one.

        Args:
            key: of `key_of`.

        Raises:
            ArtifactError: naming the first field that differs, with both sides.
        """
        made = self.artifact.meta["key"]
        for name, here in key.items():
            if made.get(name) != here and (name != PASSES or name in made):  # older artifacts do not say it
                raise ArtifactError(
                    f"{self.artifact.file} was calibrated at another {name}.\n  artifact: {_short(made.get(name))}\n"
                    f"  here:     {_short(here)}\nCalibrate again with this setting."
                )

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Raise if the checkpoint is another one (its identity as read before it was quantised).

        Raises:
            ArtifactError: naming the part that differs.
        """
        made = self.artifact.meta["model"]
        part = differing(made, identity, (*EXACT, "adapters"))
        if part:
            raise ArtifactError(
                f"{self.artifact.file} was calibrated on another model: {part} differs.\n"
                f"{both_sides(made, identity, part)}\nCalibrate on this checkpoint."
            )


def _told(decisions: str, forecast: int, level: str, variable: str) -> str:
    return f"{decisions} (forecast {forecast}, level {level}, variable {variable})"


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {len(v) if isinstance(v, list) else v}" for k, v in value.items())
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
