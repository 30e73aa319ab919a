"""Settings that an artifact holds for each number of calls, from the best to the worst as they were measured.

`meta["scheduler"]["by_calls"]` is {number of calls: [{"options", "grid", "grid_options"}, ...]}. What the user says
wins: of the settings that agree with it the best is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..artifact import Artifact
from ..core.held import nearest_calls

Setting = Mapping[str, Any]
GRID = ("grid", "grid_options")


def held_by(artifact: Artifact | None) -> Mapping[str, Sequence[Setting]]:
    """{number of calls: settings}; empty where the artifact has none."""
    advice = {} if artifact is None else artifact.meta.get("scheduler") or {}
    return advice.get("by_calls") or {}


def grids(artifact: Artifact, own: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`grid` and `grid_options` of a scheduler that takes the best grid for each number of calls.

    Args:
        own: the user's options of the sampler.
        defaults: the sampler's.
    """
    found = {n: _grid(_best(settings, own, defaults)) for n, settings in held_by(artifact).items()}
    return {"grid": "by_calls", "grid_options": {"grids": found}}


def measured(
    artifact: Artifact | None, defaults: Mapping[str, Any], config: Mapping[str, Any], calls: int
) -> dict[str, Any]:
    """The sampler's options for a run of `calls`, on the grid that the config has; {} where none were measured."""
    held = held_by(artifact)
    if not held:
        return {}
    settings, own = held[nearest_calls(held, calls)], config["sampler_options"] or {}
    if config["grid"] == "by_calls":
        chosen = config["grid_options"]["grids"]
        grid = _grid(chosen[nearest_calls(chosen, calls)])
    else:
        grid = _grid(config)
    placed = [s for s in settings if _grid(s) == grid]
    found = _best(placed or settings, own, defaults)
    return dict(found["options"]) if _agrees(found, settings, own, defaults) else {}


def advice(artifact: Artifact, calls: int) -> dict[str, Any]:
    """What an artifact was calibrated with ("sampler", "options", "grid", "grid_options"), for a run of `calls`."""
    told, held = dict(artifact.meta.get("scheduler") or {}), held_by(artifact)
    best = held[nearest_calls(held, calls)][0] if held else {}
    return {k: v for k, v in {**told, **best}.items() if k not in ("by_calls", "error")}


def where_measured(artifact: Artifact | None, calls: int) -> list[str]:
    """A note for a run of a number of calls that nothing was measured at, if it is one."""
    held = held_by(artifact)
    if artifact is None or not held or str(calls) in held:
        return []
    return [f"{artifact.file} measured no settings at {calls} calls; those of {nearest_calls(held, calls)} are used"]


def _best(settings: Sequence[Setting], own: Mapping[str, Any], defaults: Mapping[str, Any]) -> Setting:
    """The first that agrees with the user's own options, or the first of all."""
    return next((s for s in settings if _agrees(s, settings, own, defaults)), settings[0])


def _agrees(setting: Setting, settings: Sequence[Setting], own: Mapping[str, Any], defaults: Mapping[str, Any]) -> bool:
    """Whether a setting has the user's value of every option that the settings differ in."""
    varied = {key for s in settings for key in s["options"]}
    have = {**defaults, **setting["options"]}
    return all(_plain(have[key]) == _plain(value) for key, value in own.items() if key in varied)


def _grid(setting: Setting) -> dict[str, Any]:
    return {"grid": setting["grid"], "grid_options": dict(setting.get("grid_options") or {})}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
