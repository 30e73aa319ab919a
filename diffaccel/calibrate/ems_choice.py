"""Grid and options of DPM-Solver-v3 for each number of calls, chosen on some images and judged on others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.quad import Ems
from ..schedulers.settings import grid_of
from .engine import Batch, Captured, Engine
from .validate import Verdict, best_stock, ends, finite, over_processes, run_errors, verdict

TEACHER = ("dpmpp", {"order": 3, "form": "exact"})
TEACHER_GRID: dict[str, Any] = {"grid": "mid", "grid_options": {"w": 0.5}}
# Grid and solver belong together, so they are chosen together.
GRIDS: tuple[dict[str, Any], ...] = (
    {"grid": "trailing"},
    {"grid": "karras", "grid_options": {"rho": 4.0}},
    {"grid": "mid", "grid_options": {"w": 0.15}},
    {"grid": "mid", "grid_options": {"w": 0.4}},
    {"grid": "uniform_lambda"},
)
SOLVERS: tuple[dict[str, Any], ...] = ({"order": 2, "corrector": None}, {"order": 2, "corrector": "plus"})
# Tried on the best grid of these. The last is what the authors run with five calls.
MORE: tuple[dict[str, Any], ...] = (
    {"order": 1, "corrector": "plus"},
    {"order": 2, "corrector": "same"},
    {"order": 2, "corrector": "plus", "pseudo": ["corrector"]},
    {"order": 3, "corrector": None},
    {"order": 3, "corrector": "same"},
    {"order": 3, "corrector": "plus"},
    {"order": 3, "corrector": "same", "pseudo": ["predictor"], "lower_order_final": False},
)
LEAST = 3  # calls; with fewer these are no other solvers


@dataclass(frozen=True)
class Setting:
    """A grid and options of the sampler."""

    grid: Mapping[str, Any]
    options: Mapping[str, Any]

    def scheduler(self, config: Mapping[str, Any], statistics: Ems | str) -> Captured:
        """For the pipeline."""
        return Captured.of(config, "dpm_v3", {**self.options, "statistics": statistics}, **self.grid)

    def to_json(self) -> dict[str, Any]:
        """As an artifact says it (`schedulers.measured`)."""
        return {"options": dict(self.options), "grid_options": {}, **self.grid}

    def __str__(self) -> str:
        words = [self.grid["grid"], *(f"{k}={v}" for k, v in self.grid.get("grid_options", {}).items())]
        return ", ".join([*words, *(f"{k}={v}" for k, v in self.options.items())])


def default(config: Mapping[str, Any]) -> Setting:
    """What a scheduler does with the checkpoint's own grid and the sampler's own options."""
    name, options, _ = grid_of(config)
    return Setting({"grid": name, **({"grid_options": options} if options else {})}, SOLVERS[1])


def expected(calls: Sequence[int]) -> int:
    """Model calls of an image that the choice takes, about."""
    return 2 * sum(n * ((len(GRIDS) + 1) * len(SOLVERS) + len(MORE)) for n in calls)


class Trial:
    """Errors to a teacher on some images."""

    def __init__(
        self, engine: Engine, config: Mapping[str, Any], tag: str, batches: Sequence[Batch], teacher_calls: int
    ) -> None:
        self.engine, self.config, self.tag, self.batches = engine, config, tag, batches
        self.target = ends(engine, f"{tag}/teacher", batches, self._teacher, teacher_calls)

    def _teacher(self) -> Captured:
        return Captured.of(self.config, TEACHER[0], TEACHER[1], **TEACHER_GRID)

    def errors(self, setting: Setting, statistics: Ems | str, n: int) -> np.ndarray:
        """Of each image of all processes, (n,)."""
        tag = f"{self.tag}/{'none' if statistics == 'none' else 'statistics'}/{n}/{setting}"
        make: Callable[[], Captured] = lambda: setting.scheduler(self.config, statistics)  # noqa: E731
        own = run_errors(self.engine, tag, self.batches, make, n, self.target)
        return over_processes(self.engine, f"{tag}/errors", own)

    def ranking(self, statistics: Ems | str, n: int) -> list[tuple[float, Setting]]:
        """(mean error, setting) from the best to the worst: all grids with two solvers, the best of them with more."""
        own = default(self.config)
        grids = [own.grid, *(g for g in GRIDS if g != own.grid)]
        found: list[tuple[float, Setting]] = []

        def tried(settings: Sequence[Setting]) -> None:
            found.extend((float(finite(self.errors(s, statistics, n)).mean()), s) for s in settings)
            found.sort(key=lambda pair: pair[0])

        tried([Setting(g, o) for g, o in itertools.product(grids, SOLVERS)])
        if n >= LEAST:
            tried([Setting(found[0][1].grid, o) for o in MORE])
        return found


@dataclass(frozen=True)
class Choice:
    """The setting of one number of calls, with or without statistics.

    Args:
        ranking: (mean error where it was chosen, setting), the one to use first.
        errors: of that one on the held-out images, (n,).
        receipt: what was chosen, and by how much.
    """

    ranking: Sequence[tuple[float, Setting]]
    errors: np.ndarray
    receipt: dict[str, Any]


def chosen(trial: Trial, final: Trial, statistics: Ems | str, n: int) -> Choice:
    """The best of the ranking; the default where that is the better one on the held-out images.

    The verdict says more: whether held-out images show that the setting is better than the default.
    """
    ranking, own = trial.ranking(statistics, n), default(trial.config)
    at = {str(setting): error for error, setting in ranking}
    best, before = ranking[0][1], final.errors(own, statistics, n)
    receipt: dict[str, Any] = {"setting": str(best), "default": str(own), "tried": len(ranking)}
    receipt["error where it was chosen"] = {"default": at[str(own)], "setting": ranking[0][0]}
    if str(best) == str(own):
        return Choice(ranking, before, receipt | {"verdict": "no benefit found: the default is the best"})
    after = final.errors(best, statistics, n)
    found = verdict(before, after)
    receipt["held-out error"] = found.to_json()
    if found.difference < 0:
        return Choice(ranking, after, receipt | {"verdict": "helps" if found.helps else "no benefit found"})
    kept = sorted(ranking, key=lambda pair: str(pair[1]) != str(own))
    told = {
        "setting": str(own),
        "best where it was chosen": str(best),
        "verdict": "no benefit found: the default stays",
    }
    return Choice(kept, before, receipt | told)


def validated(
    engine: Engine,
    config: Mapping[str, Any],
    statistics: Ems,
    calls: Sequence[int],
    parts: tuple[int, int, int],
    teacher_calls: int,
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """The settings for each number of calls, from the best to the worst, and the receipt.

    Args:
        parts: images of the calibration, the choice, the validation, one after the other.
    """
    images, chosen_on, held_out = parts
    trial = Trial(engine, config, "choose", engine.batches(images, chosen_on), teacher_calls)
    final = Trial(engine, config, "valid", engine.batches(images + chosen_on, held_out), teacher_calls)
    found: dict[int, Verdict] = {}
    settings: dict[str, list[dict[str, Any]]] = {}
    receipt: dict[str, Any] = {}
    for n in calls:
        without, with_ = (chosen(trial, final, value, n) for value in ("none", statistics))
        found[n] = verdict(without.errors, with_.errors)
        settings[str(n)] = [setting.to_json() | {"error": error} for error, setting in with_.ranking]
        stock = best_stock(engine, f"valid/{n}", final.batches, final.target, n, engine.pipe.scheduler.config)
        receipt[f"{n} calls"] = {
            "held-out error": found[n].to_json(),
            "with statistics": with_.receipt,
            "without": without.receipt,
            "best stock scheduler": stock,
        }
    helped = [n for n in calls if found[n].helps]
    where = f"helps at {', '.join(map(str, helped))} of {', '.join(map(str, calls))} calls"
    return settings, {"result": where if helped else "no benefit found", **receipt}
