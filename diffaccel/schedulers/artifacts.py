"""Artifacts of calibrated samplers: from a scheduler's config to the file and to the sampler's option, and back."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any
from weakref import WeakValueDictionary

from ..artifact import Artifact, check_path, check_shape
from ..errors import ArtifactError, ArtifactWarning, OptionError
from ..samplers.registry import Calibrated, Sampler, get
from .measured import GRID, grids, held_by
from .settings import path_of

RESAMPLE = " resample='bilinear' interpolates it to another height and width."
GRID_KIND = "ays"  # of artifacts that hold a grid for any sampler

# A config names its artifact by file and checksum; within a process that is enough to find it again.
_SEEN: WeakValueDictionary[str, Artifact] = WeakValueDictionary()


def resolve(value: Any, kind: str | tuple[str, ...]) -> Artifact:
    """The artifact that a user or a config means.

    Args:
        value: an `Artifact`, the path of one, or a config's entry {"file", "sha256"}.
        kind: that is needed, or several.

    Raises:
        ArtifactError: not found, of another kind, or not the one that the config was saved with.
        OptionError: if it is none of these.
    """
    if isinstance(value, Artifact):
        found = value.of_kind(kind)
    elif isinstance(value, (str, os.PathLike)):
        found = Artifact.load(value, kind)
    elif isinstance(value, Mapping) and {"file", "sha256"} <= set(value):
        found = _named(value, kind)
    else:
        raise OptionError(f"artifact must be a file or an Artifact, got {value!r}")
    _SEEN[found.sha256] = found
    return found


def _named(entry: Mapping[str, Any], kind: str | tuple[str, ...]) -> Artifact:
    """The artifact of a config's entry: one of this process, or a file that stands where the entry says."""
    known = _SEEN.get(entry["sha256"])
    if known is not None:
        return known.of_kind(kind)
    if not FilePath(entry["file"]).is_file():
        raise ArtifactError(
            f"this scheduler's config was saved with the artifact {entry['file']!r}, which is not here. It lies beside "
            "scheduler_config.json of the saved pipeline; load that folder with from_pretrained, or pass artifact=FILE"
        )
    return saved_with(Artifact.load(entry["file"], kind), entry)


def saved_with(found: Artifact, entry: Mapping[str, Any]) -> Artifact:
    """The artifact itself, if it is the one that a config was saved with.

    Raises:
        ArtifactError: if it is another.
    """
    if found.sha256 != entry["sha256"]:
        raise ArtifactError(
            f"{found.file} is another artifact than the one that this config was saved with (checksum "
            f"{found.sha256[:12]}, the config says {entry['sha256'][:12]}); pass artifact=FILE if you mean it"
        )
    return found


def advised(given: Mapping[str, Any], sampler: str | None) -> dict[str, Any]:
    """A user's arguments of `from_config`, completed by those that a newly given artifact was calibrated with.

    An artifact says them in `meta["scheduler"]`: "sampler", "options" (of the sampler), "grid", "grid_options",
    "final_sigmas_type", or (in place of options and grid) "by_calls", see `measured`. What the user says wins; with
    another sampler than the artifact's nothing is completed.

    Args:
        given: keyword arguments of `from_config`.
        sampler: that the class is fixed to, if it is.
    """
    value = given.get("artifact")
    if not isinstance(value, (str, os.PathLike, Artifact)):
        return dict(given)
    found = value if isinstance(value, Artifact) else Artifact.load(value)
    advice, chosen = found.meta.get("scheduler") or {}, given.get("sampler") or sampler
    if chosen not in (None, advice.get("sampler")):
        return {**given, "artifact": found}
    grid = {} if "grid" in given else {k: advice[k] for k in GRID if advice.get(k) is not None}
    if held_by(found) and not set(GRID) & set(given):
        defaults = get(advice["sampler"]).defaults
        own = {k: v for k, v in given.items() if k in defaults} | dict(given.get("sampler_options") or {})
        grid = grids(found, own, defaults)
    final = {k: advice[k] for k in ("sampler", "final_sigmas_type") if advice.get(k) is not None}
    options = {**(advice.get("options") or {}), **(given.get("sampler_options") or {})}
    return {**grid, **final, **given, "sampler_options": options, "artifact": found}


def placed_by(given: Mapping[str, Any]) -> tuple[dict[str, Any], Artifact | None]:
    """A user's arguments of `from_config` with an artifact given as `grid=` turned into its nodes, and that artifact.

    Raises:
        OptionError: options beside it.
    """
    value = given.get("grid")
    if not isinstance(value, (Artifact, os.PathLike)) and not str(value).endswith(".safetensors"):
        return dict(given), None
    if given.get("grid_options"):
        raise OptionError("grid_options= has no effect on the grid of an artifact")
    found = resolve(value, GRID_KIND)
    times = {str(n): found.tensors[f"n{n}.node"][:, 0].tolist() for n in found.meta["calls"]}
    return {**given, "grid": "listed", "grid_options": {"times": times}}, found


def entry_of(artifact: Artifact) -> dict[str, str]:
    """What a config holds of an artifact."""
    return {"file": artifact.file, "sha256": artifact.sha256}


def beside(entry: Mapping[str, Any], folder: Any, subfolder: str | None, **hub: Any) -> Artifact:
    """The artifact of a config's entry, from the folder or hub repository that the config was read from.

    As long as it is held, `resolve` finds it by the entry.

    Raises:
        ArtifactError: if it is not there, or is another one.
    """
    found = saved_with(Artifact.load(_file_beside(entry, folder, subfolder, hub)), entry)
    _SEEN[found.sha256] = found
    return found


def _file_beside(entry: Mapping[str, Any], folder: Any, subfolder: str | None, hub: Mapping[str, Any]) -> FilePath:
    name = "/".join(part for part in (subfolder, entry["file"]) if part)
    if not os.path.isdir(folder):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        known = ("cache_dir", "force_download", "local_files_only", "token", "revision", "proxies")
        try:
            return FilePath(hf_hub_download(str(folder), name, **{k: v for k, v in hub.items() if k in known}))
        except EntryNotFoundError:
            raise ArtifactError(f"{folder} has a scheduler config that needs {name!r}, but not that file") from None
    path = FilePath(folder) / name
    if not path.is_file():
        raise ArtifactError(
            f"{path} is missing: the scheduler saved there was calibrated and needs it. Copy it from where the "
            "pipeline was saved, or calibrate again"
        )
    return path


def calibrated_options(sampler: Sampler, options: Mapping[str, Any] | None, artifact: Any, settings: Any) -> Any:
    """(artifact, {option: value}) that the sampler's artifact fills in; (None, {}) where there is nothing to fill in.

    Args:
        options: the user's options of the sampler.
        artifact: as `resolve` takes it, or None.
        settings: normalized settings, for the path.

    Raises:
        OptionError: an artifact for a sampler that takes none, or beside the option that it fills in.
        ArtifactError: a missing artifact, or one that does not fit.
    """
    takes: Calibrated | None = sampler.calibrated
    if takes is None:
        if artifact is not None:
            raise OptionError(f"artifact= would have no effect: sampler {sampler.name!r} takes no calibrated data")
        return None, {}
    if takes.option in (options or {}):
        if artifact is not None:
            raise OptionError(
                f"sampler {sampler.name!r} was given both artifact= and {takes.option}=, which the artifact fills in"
            )
        return None, {}
    if artifact is None:
        raise ArtifactError(
            f"sampler {sampler.name!r} needs data calibrated on your checkpoint: artifact=FILE. Make it with\n"
            f"  {takes.command}\n{takes.without}"
        )
    found = resolve(artifact, takes.kind)
    check_path(found, path_of(settings), settings["prediction_type"])
    return found, {takes.option: takes.read(found)}


def options_on(
    sampler: Sampler, artifact: Artifact | None, options: dict[str, Any], shape: tuple[int, ...]
) -> dict[str, Any]:
    """The options of a run on samples of this shape: the same, or with data resampled where `resample` asks for it.

    Raises:
        ArtifactError: if the data is of another shape.

    Warns:
        ArtifactWarning: where the data serves every shape, but was fitted at another one.
    """
    takes = sampler.calibrated
    if takes is not None and takes.resample is not None and options.get("resample"):
        value = takes.resample(options[takes.option], shape)
        return options if value is options[takes.option] else {**options, takes.option: value}
    if artifact is None or takes is None:
        return options
    made = artifact.meta.get("shape")
    if takes.tensor:
        check_shape(artifact, takes.tensor, shape, "" if takes.resample is None else RESAMPLE)
    elif takes.nodes and made is not None and tuple(made) != shape:
        text = f"{artifact.file} was fitted to samples of shape {tuple(made)}, this run's are {shape}"
        warnings.warn(f"{text}; some of its gain may be lost. Fit again at this size.", ArtifactWarning, stacklevel=4)
    return options
