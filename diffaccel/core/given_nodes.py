"""The user's own nodes: lists of sigmas or timesteps in place of a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import OptionError
from .families import Flow
from .grid import checked, stretched
from .node import Node
from .path import Nodes, Path

_ROUNDED = 1e-2  # by which a user's level may lie outside the path: lists are published with few digits


def from_sigmas(path: Path, sigmas: Sequence[float], *, final: str = "zero", warp: bool = True) -> Nodes:
    """Nodes from the user's sigmas, one a call; a closing 0 is the end node.

    Args:
        path: flow: sigmas in (0, 1], shifted by the path (`warp`) as diffusers does; VP and EDM: `sigma / alpha`.
        sigmas: falling values.
        final: where the run ends if the last value is not 0.
    """
    values = [float(s) for s in sigmas]
    if not values or not all(math.isfinite(s) and s >= 0 for s in values):
        raise OptionError(f"sigmas must be one or more finite values of 0 or more, got {values[:8]}")
    closing = values[-1] == 0
    values = values[:-1] if closing else values
    if not values or 0 in values:
        raise OptionError("sigmas must be positive, but for one 0 at the end")
    if isinstance(path, Flow):
        if max(values) > 1 + 1e-6:
            raise OptionError(f"flow sigmas lie in (0, 1], got {max(values):g}")
        t = [path.train_steps * min(s, 1.0) for s in values]
        found = stretched(path, [path.warp(v) for v in t] if warp else t)
    else:
        found = [path.at_level(s) for s in values]
    end = path.end if closing or final == "zero" else path.last
    if found[-1].level <= end.level:
        end = path.end
    return checked([*_inside(found, path, "sigmas"), end], path, "sigmas")


def _inside(found: list[Node], path: Path, where: str) -> list[Node]:
    """The nodes, after the check that the model was trained at their levels (but for the rounding of published lists).

    Raises:
        OptionError: naming the level that was not.
    """
    high = path.first.level * (1 + _ROUNDED)
    low = path.last.level * (1 - _ROUNDED) if path.family == "vp" else 0.0
    for node in found:
        if not low <= node.level <= high:
            side, most = ("above", path.first.level) if node.level > high else ("below", path.last.level)
            raise OptionError(
                f"{where}: sigma/alpha = {node.level:g} is {side} {most:g}, where this {path.family} path ends; the "
                "model was not trained there"
            )
    return found


def from_timesteps(path: Path, timesteps: Sequence[float], *, final: str = "zero") -> Nodes:
    """Nodes from the user's timesteps, one a call, as the model is fed (flow: no shift is applied to them)."""
    values = [float(t) for t in timesteps]
    if not values or not all(math.isfinite(t) for t in values):
        raise OptionError(f"timesteps must be one or more finite values, got {values[:8]}")
    found = [path.at(t) for t in values]
    end = path.end if final == "zero" or found[-1].level <= path.last.level else path.last
    return checked([*_inside(found, path, "timesteps"), end], path, "timesteps")
