"""Calibration of a denoiser cache: learned skip masks, variance compensation, and whether either pays (Q&C)."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..artifact import Artifact, path_identity
from ..core.path import Path
from ..denoiser.cache import Cache
from ..denoiser.cache_attach import cached
from ..denoiser.cache_hook import FEW, WIDEST, refuse_wide
from ..denoiser.calibrated import KIND, Passes, key_of
from ..denoiser.compensate import FEWEST as FEWEST_FIT
from ..denoiser.compensate import KINDS, Compensation
from ..denoiser.contract import denoisers
from ..denoiser.quant import Quant, Quantised, quantise
from ..errors import OptionError, one_of
from ..identity import model_identity
from ..parallel.protocol import World
from .cache_measure import Measure, Measurement
from .cache_runs import Runs
from .engine import Engine
from .gauss import config_prediction, one_budget
from .schedule import Mask, letters
from .validate import FEWEST, Verdict, best_stock, verdict
from .watched import watched

NONE = "none"


def cache(
    pipe: Any,
    prompts: Sequence[str],
    *,
    calls: int | Sequence[int] = 50,
    full: int | Sequence[int] | None = None,
    cache: Cache | Sequence[Cache] | None = None,
    forecast: int = 1,
    level: str | None = None,
    quant: Quant | str | None = None,
    compensation: str = "std",
    thresholds: Sequence[float] = (0.05, 0.1, 0.15, 0.2, 0.3),
    images: int = 8,
    select: int = 8,
    fit: int = 16,
    held_out: int = 16,
    window: int = 5,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    batch: int = 8,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    world: World | None = None,
) -> Artifact:
    """Learn where to run the denoiser in full, and correct what a cache and a quantisation do to the states.

    For each number of full steps: errors of forecasts and how much of them arrives at the end are measured on the full
    trajectory; the cheapest masks by these, every interval of as many full steps, and the neighbours of the best are
    then run, and the one that ends nearest to the full run is kept. Variance compensation is fitted to it and to the
    fixed policies of `cache`, step by step, and shipped where it lowers the error on images that nothing was fitted
    on. Each is compared on those images with plain runs of the same number of calls, and of the same seconds.

    Args:
        pipe: a pipeline of diffusers with its scheduler, which makes one call a step; left as it was.
        prompts: used in turn.
        calls: N, steps of the run.
        full: numbers of full steps to learn masks for; None: 2/5 of N; () for none.
        cache: fixed policies to compensate too; None: `Cache.every(3, forecast=forecast)` (up to 8 steps `every(2)`);
            () for none.
        forecast: of learned masks, 0 or 1.
        level: of the caches, as in `Cache`.
        quant: quantisation of the accelerated runs, as in `quant_cache`; the full runs stay in float.
        compensation: "std", "ls", "tac" (see `denoiser.compensate`) or "none".
        thresholds: of `Cache.first_block`, for which the receipt tells error and full steps.
        images, select, fit, held_out: to measure errors on, to choose masks on, to fit the compensation on (in one
            pass, whatever `batch` is) and to judge on.
        window: largest distance of full steps of a learned mask (larger where few full steps ask for it).
        guidance, call, batch, seed, out, progress: as for every calibration.
        world: this process among others; each takes its share of the images.

    Returns:
        kind "cache": `meta["runs"]`, with `mu_ref_k`, `mu_acc_k`, `gain_k` where run k has a compensation; the best
        learned run is also `mask`, `cache`, `benefit` of the metadata.

    Raises:
        OptionError: an option out of range, too few images, or nothing to calibrate.
    """
    steps = one_budget("cache", calls)
    budgets = _budgets(full, steps)
    usual = Cache.every(WIDEST if steps <= FEW else 3, forecast=forecast)
    fixed = [usual] if cache is None else [cache] if isinstance(cache, Cache) else [*cache]
    processes = 1 if world is None else world.size
    _check(steps, budgets, fixed, forecast, compensation, (images, select, fit, held_out), window, processes)
    quant = Quant.of(quant)
    identity = model_identity(pipe)
    settings = {
        "kind": KIND, "steps": steps, "full": budgets, "cache": [c.to_dict() for c in fixed], "forecast": forecast,
        "level": level, "quant": None if quant is None else vars(quant), "compensation": compensation,
        "thresholds": list(thresholds), "images": [images, select, fit, held_out], "window": window, "model": identity,
    }  # fmt: skip
    engine = Engine(pipe, prompts, guidance=guidance, call=call, batch=batch, seed=seed, out=out, settings=settings,
                    progress=progress, world=world)  # fmt: skip
    scheduler = copy.deepcopy(pipe.scheduler)
    shared = Cache("mask", forecast=forecast, level=_level(pipe, forecast, level))
    work = _Work(engine, Runs(engine, scheduler, steps, shared), compensation, (images, select, fit, held_out))
    measure = Measure(engine, scheduler, steps, shared, window)
    expected = steps * ((images if budgets else 0) * measure.passes() // 2 + (select + held_out) * 12 + 3 * fit)
    with engine.working(expected // engine.world.size, "calibrate cache", bound="about"):
        work.references()
        done = quantise(_only(pipe), quant) if quant is not None else None
        try:
            found = [work.learned(m, measure, window) for m in budgets]
            found += [work.fixed(replace(c, level=shared.level)) for c in fixed]
            told = work.runs.thresholds(work.select, thresholds) if thresholds else {}
            key = work.key(done)
        finally:
            if done is not None:
                done.undo()
        runs = [work.judged(*run) for run in found]
        cost = engine.cost
    best = min((r for r in runs if r["learned"]), key=lambda r: (not r["benefit"], r["error"]), default=None)
    helped = sum(r["benefit"] for r in runs)
    config = pipe.scheduler.config
    meta: dict[str, Any] = {
        "runs": [{k: v for k, v in r.items() if k != "receipt"} for r in runs],
        "key": key,
        "quant": None if done is None else done.recipe,
        "path": path_identity(Path.from_config(config), config_prediction(config)),
        "model": identity,
        "guidance": key["guidance"],
        "shape": key["shape"],
        "calls": [steps],
        "fit images": fit,
        "seeds": [seed, seed + sum((images, select, fit, held_out)) - 1],
        "cost": cost,
        "receipt": {
            "result": f"{helped} of {len(runs)} runs beat plain runs of equal cost" if helped else "no benefit found",
            **({} if done is None else {"quantisation": str(done)}),
            **{r["name"]: r["receipt"] for r in runs},
            **({"first_block": told} if told else {}),
            "model calls": cost["calls"],
            "seconds": cost["seconds"],
        },
    }
    if best is not None:
        meta |= {name: best[name] for name in ("mask", "cache", "benefit")}
    return engine.finish(Artifact(KIND, work.tensors, meta, os.path.basename(out or "")))


class _Work:
    """The runs of one calibration.

    Args:
        engine, runs: to run with.
        kind: of the compensation.
        sizes: images to measure, choose, fit and judge on.
    """

    def __init__(self, engine: Engine, runs: Runs, kind: str, sizes: tuple[int, int, int, int]) -> None:
        self.engine, self.runs, self.kind = engine, runs, kind
        images, select, fit, held_out = sizes
        self.measured_on = engine.batches(0, images)
        self._select, self._held = (images, select), (images + select + fit, held_out)
        self.fit_batch = runs.share(images + select, fit)
        self.tensors: dict[str, np.ndarray] = {}
        self.measurement: Measurement | None = None
        self.count = 0

    def references(self) -> None:
        """Full float runs."""
        self.plain_seconds = self.runs.seconds(self.measured_on[0])
        self.select = self.runs.images("select", *self._select)
        self.held = self.runs.images("held", *self._held)
        self.reference = self.runs.trajectory(self.fit_batch) if self.kind != NONE else None

    def key(self, done: Quantised | None) -> dict[str, Any]:
        """What the result depends on."""
        shape: list[int] = []
        passes, calls = Passes(self.engine.pipe), []

        def see(i: int, x: torch.Tensor) -> torch.Tensor:
            shape[:] = x.shape[1:]
            calls.append(passes.taken())
            return x

        seen = watched(self.runs.scheduler, state=see)
        try:
            self.engine.run(self.measured_on[0], seen, self.runs.steps)
        finally:
            passes.remove()
        return key_of(self.engine.pipe, seen, tuple(shape), None if done is None else done.recipe, calls[0])

    # ------------------------------------------------------------------ with the cache on
    def learned(self, budget: int, measure: Measure, window: int) -> tuple[Cache, np.ndarray, dict[str, Any]]:
        """The mask of a budget, its held-out errors and what is known of it."""
        if self.measurement is None or measure.window * budget < self.runs.steps:
            measure.window = max(window, math.ceil(self.runs.steps / budget))
            self.measurement = Measurement.of(
                self.engine.accumulate(f"measure{measure.window}", self.measured_on, lambda b: measure(b).tensors(),
                                       lambda a, b: {k: a[k] + b[k] for k in a})
            )  # fmt: skip
        mask, told = self.runs.learn(self.select, self.measurement, budget, measure.window)
        e, known = self._run(self.runs.masked(mask))
        interval: Mask = tuple(told.pop("interval", ()))
        if interval and interval != mask:
            rival = self.runs.errors(self.held, self.runs.masked(interval))
            told["held-out error, best interval -> kept mask"] = verdict(rival, known["without"]).to_json()
        known["receipt"] = {"choice (root mean square error)": told} | known["receipt"]
        return self.runs.masked(mask), e, known | {"learned": True}

    def fixed(self, policy: Cache) -> tuple[Cache, np.ndarray, dict[str, Any]]:
        """As `learned`, of a given policy."""
        e, known = self._run(policy)
        return policy, e, known | {"learned": False}

    def _run(self, policy: Cache) -> tuple[np.ndarray, dict[str, Any]]:
        without = self.runs.errors(self.held, policy)
        seconds = self.runs.seconds(self.measured_on[0], policy) / self.plain_seconds
        known: dict[str, Any] = {"without": without, "compensated": False, "receipt": {}, "number": self.count}
        known["equal"] = seconds * self.runs.steps
        self.count += 1
        if self.reference is None:
            return without, known
        made = self.runs.compensate(self.fit_batch, self.reference, policy, self.kind)
        if not isinstance(made, Compensation):
            known["receipt"] = {"compensation": f"no benefit found: {made}"}
            return without, known
        with_ = self.runs.errors(self.held, policy, made)
        found = verdict(without, with_)
        low, high = made.range
        known["receipt"] = {"compensation": {"gains": f"[{low:.4f}, {high:.4f}]", "held-out error": found.to_json()}}
        if not found.helps:
            return without, known
        self.tensors |= {f"{name}_{known['number']}": value for name, value in made.tensors().items()}
        return with_, known | {"compensated": True, "axis": made.axis}

    # ------------------------------------------------------------------ against plain runs
    def judged(self, policy: Cache, e: np.ndarray, known: dict[str, Any]) -> dict[str, Any]:
        """The entry of a run: compared with plain runs of as many calls, and of as many seconds."""
        steps = self.runs.steps
        mask = tuple(map(int, policy.full_steps(steps)))
        calls, name = sum(mask), letters(mask)
        equal = known["equal"]
        seconds = min(max(calls, math.ceil(equal)), steps)
        plain = {n: self.runs.plain_errors(self.held, n) for n in sorted({calls, seconds})}
        against: Verdict = verdict(plain[seconds], e)
        told: dict[str, Any] = {
            "full calls": f"{calls} of {steps}",
            "plain calls that take as long": round(equal, 2),
            f"held-out error, plain with {calls} calls (as many full calls)": float(plain[calls].mean()),
            f"held-out error, plain with {seconds} calls (as many seconds) -> this": against.to_json(),
            f"best stock scheduler with {seconds} calls": self._stock(seconds),
        }
        return {
            "name": f"{'learned ' if known['learned'] else ''}{policy.name}",
            "full": calls, "mask": list(mask), "decisions": name, "cache": policy.to_dict(),
            "learned": known["learned"], "benefit": against.helps, "error": float(e.mean()),
            "compensated": known["compensated"], "axis": known.get("axis"), "equal calls": equal,
            "receipt": told | known["receipt"],
        }  # fmt: skip

    def _stock(self, calls: int) -> dict[str, Any]:
        tag, config = f"stock{calls}", self.runs.scheduler.config
        return best_stock(self.engine, tag, self.held.batches, self.held.ends, calls, config)


# ---------------------------------------------------------------------- options
def _budgets(full: int | Sequence[int] | None, steps: int) -> list[int]:
    if full is None:
        return [max(1, round(0.4 * steps))]
    found = [full] if isinstance(full, int) else list(full)
    for m in found:
        if isinstance(m, bool) or not isinstance(m, int) or not 1 <= m < steps:
            raise OptionError(f"full={m!r}: full steps of a learned mask are 1 to {steps - 1} of {steps}")
    return sorted(set(found))


def _check(
    steps: int,
    budgets: list[int],
    fixed: list[Cache],
    forecast: int,
    compensation: str,
    sizes: tuple[int, int, int, int],
    window: int,
    processes: int,
) -> None:
    images, select, fit, held_out = sizes
    one_of("compensation", compensation, (*KINDS, NONE))
    if forecast not in (0, 1):
        raise OptionError(f"forecast={forecast}: errors are measured for forecasts of order 0 and 1")
    few = min(images, select, held_out) < processes or held_out < FEWEST
    if few or (compensation != NONE and fit < max(FEWEST_FIT, processes)) or window < 2:
        raise OptionError(
            f"calibrate cache needs an image to measure and to select on, {FEWEST_FIT} to fit on, {FEWEST} held_out "
            f"ones (one of each for a process) and a window of 2: got {images}, {select}, {fit}, {held_out} and "
            f"{window}, {processes} process(es)"
        )
    if not budgets and (not fixed or compensation == NONE):
        raise OptionError("nothing to calibrate: full and cache are empty, or there is no compensation to fit")
    for policy in fixed:
        if not policy.static:
            raise OptionError(f"{policy.name} decides during the run; a compensation belongs to decisions known before")
        policy.full_steps(steps)
        refuse_wide(policy, steps)


def _level(pipe: Any, forecast: int, level: str | None) -> str:
    """The level in use."""
    with cached(pipe, Cache("mask", forecast=forecast, level=level, rows=(1,))) as attached:
        return attached.level


def _only(pipe: Any) -> Any:
    found = denoisers(pipe)
    if len(found) > 1:
        raise OptionError(f"{type(pipe).__name__} has several denoisers ({', '.join(found)}); one is quantised here")
    return next(iter(found.values()))
