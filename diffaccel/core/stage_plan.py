"""From a list of stages and the sizes they have to the levels of every model call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import OptionError, no_leftover, one_of
from .stages import Size, Spectrum, Stage, flow_time, grid_times, level, ratio, shares, shifted_times, switch_time

TRANSITIONS = ("aligned", "renoise")


@dataclass(frozen=True)
class Leg:
    """One stage with everything decided.

    Args:
        size: of its latents.
        times: n + 1 flow times, falling.
        raised: whether it begins above the level at which the stage before ended (noise is added).
    """

    stage: Stage
    size: Size
    times: np.ndarray
    raised: bool = False


def checked_stages(stages: Sequence[Stage | dict[str, Any]], transition: str) -> tuple[Stage, ...]:
    """The stages as objects.

    Raises:
        OptionError: if they make no run.
    """
    one_of("transition", transition, TRANSITIONS)
    found = tuple(s if isinstance(s, Stage) else _stage(s) for s in stages)
    if not found:
        raise OptionError("a staged run needs at least one stage")
    if found[-1].scale != 1:
        raise OptionError(
            f"the last stage must have scale 1.0, got {found[-1].scale}: most pipelines would return a small image "
            "without complaint"
        )
    if found[-1].t_end is not None:
        raise OptionError("the last stage ends where the scheduler's own grid ends: leave its t_end out")
    for k, (a, b) in enumerate(pairwise(found)):
        if transition == "renoise":
            if a.t_end is not None:
                raise OptionError(f"stage {k}: with transition='renoise' each stage runs to the end; leave t_end out")
            if b.t_start is None:
                raise OptionError(f"stage {k + 1}: transition='renoise' needs t_start, the strength of the new noise")
        elif a.t_end is None and b.scale <= a.scale:
            raise OptionError(
                f"stage {k} needs t_end: the delta rule says when to go up in size, and stage {k + 1} goes down"
            )
    return found


def _stage(given: dict[str, Any]) -> Stage:
    no_leftover("a stage", given, ("scale", "steps", "t_end", "t_start", "shift"))
    return Stage(**given)


def needs_spectrum(stages: Sequence[Stage], transition: str) -> bool:
    """Whether some stage's end is left to the delta rule."""
    return transition == "aligned" and any(s.t_end is None for s in stages[:-1])


def plan_legs(
    stages: Sequence[Stage],
    sizes: Sequence[Size],
    grid: Sequence[float],
    top: float,
    *,
    transition: str = "aligned",
    spectrum: Spectrum | None = None,
    delta: float = 0.01,
    rule: str = "missing",
    spacing: str = "the scheduler's grid",
) -> list[Leg]:
    """The levels of every call.

    Args:
        stages: from `checked_stages`.
        sizes: of each stage's latents.
        grid: flow times of the scheduler's own run, falling; its first and last values are where the run begins and
            ends, and stages without a shift are spaced like it.
        top: the highest flow time that the model was trained on.
        spacing: what the grid is called, for messages.

    Raises:
        OptionError: if a stage would not fall, begin below the end of the one before, or lie above `top`.
    """
    legs: list[Leg] = []
    for k, (stage, size) in enumerate(zip(stages, sizes, strict=True)):
        start, raised = _start(legs, stage, size, grid[0], transition, k)
        if start > top * (1 + 1e-9):
            raise OptionError(
                f"stage {k} would begin at flow time {start:.4f}, above {top:.4f}, the most noise that the model was "
                f"trained on; end stage {k - 1} earlier (t_end below {flow_time(level(top) / _growth(legs, size)):.4f})"
            )
        end = grid[-1]
        if k + 1 < len(stages) and transition == "aligned":
            end = stage.t_end if stage.t_end is not None else _rule(spectrum, size, sizes[k + 1], delta, rule)
        if not start > end:
            why = f" ({spacing} begins at {grid[0]:.4f})" if k == 0 else ""
            raise OptionError(f"stage {k} must fall, but begins at flow time {start:.4f}{why} and ends at {end:.4f}")
        times = (
            grid_times(grid, start, end, stage.steps)
            if stage.shift is None
            else shifted_times(start, end, stage.steps, stage.shift)
        )
        if not np.all(np.diff(times) < 0):
            raise OptionError(
                f"stage {k}: {spacing} has no {stage.steps} levels between {start:.4f} and {end:.4f}; give it a shift"
            )
        legs.append(Leg(stage, size, times, raised))
    return legs


def _start(legs: list[Leg], stage: Stage, size: Size, first: float, transition: str, k: int) -> tuple[float, bool]:
    """Where a stage begins, and whether that takes more noise than the stage before left."""
    if not legs or transition == "renoise":
        return (first if stage.t_start is None else stage.t_start), bool(legs)
    aligned = flow_time(_growth(legs, size) * level(float(legs[-1].times[-1])))
    if stage.t_start is None or abs(stage.t_start - aligned) < 1e-9:
        return aligned, False
    if stage.t_start < aligned:
        raise OptionError(
            f"stage {k} begins at flow time {stage.t_start:.4f}, but the state that stage {k - 1} leaves has "
            f"{aligned:.4f} at this size; going below takes model calls. Leave t_start out, or lower the t_end before"
        )
    return stage.t_start, True


def _growth(legs: list[Leg], size: Size) -> float:
    return ratio(legs[-1].size, size) if legs else 1.0


def _rule(spectrum: Spectrum | None, size: Size, to: Size, delta: float, rule: str) -> float:
    if spectrum is None:
        raise OptionError(
            "a stage without t_end needs the spectrum of the model's latents: spectrum='flux', 'wan2.1', or a fit by "
            "diffaccel.calibrate.spectrum; or give the stage a t_end"
        )
    return switch_time(spectrum, size, to, delta, rule)


# ---------------------------------------------------------------------- presets
def preset(name: str, calls: int | None = None) -> tuple[tuple[Stage, ...], str]:
    """Stages and transition of a named schedule.

    bottleneck-3x: 4, 13, 8 calls with strengths 1/.8/.6 and shifts 9/6/9, as in a third-party reproduction of
    Bottleneck Sampling (arXiv:2503.18940) for FLUX; the authors' code was not seen. spectral-hlh and spectral-lh:
    aligned transitions, the second with its end from the delta rule. few-4, few-8: switch positions of third-party
    notes on distilled models.

    Args:
        calls: of the presets that are shares of them (25 if None); an error for the others unless it is their number.
    """
    one_of("preset", name, PRESETS)
    stages, transition = PRESETS[name](25 if calls is None else calls)
    total = sum(s.steps for s in stages)
    if calls is not None and total != calls:
        raise OptionError(f"the preset {name!r} makes {total} model calls, not {calls}; leave calls out")
    return stages, transition


def _bottleneck(_: int) -> tuple[tuple[Stage, ...], str]:
    return (Stage(1, 4, shift=9), Stage(0.5, 13, t_start=0.8, shift=6), Stage(1, 8, t_start=0.6, shift=9)), "renoise"


def _hlh(calls: int) -> tuple[tuple[Stage, ...], str]:
    a, b, c = shares(calls, (16, 52, 32))
    return (Stage(1, a, t_end=0.95), Stage(0.5, b, t_end=0.5), Stage(1, c)), "aligned"


def _lh(calls: int) -> tuple[tuple[Stage, ...], str]:
    a, b = shares(calls, (50, 50))
    return (Stage(0.5, a), Stage(1, b)), "aligned"


def _few(first: int, low: int, last: int) -> tuple[tuple[Stage, ...], str]:
    return (Stage(1, first, t_end=0.95), Stage(0.5, low, t_end=0.5), Stage(1, last)), "aligned"


PRESETS = {
    "bottleneck-3x": _bottleneck,
    "spectral-hlh": _hlh,
    "spectral-lh": _lh,
    "few-4": lambda _: _few(1, 2, 1),
    "few-8": lambda _: _few(1, 5, 2),
}
