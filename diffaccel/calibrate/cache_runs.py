"""Real runs of a cache for its calibration: how far they end from the full run, and what they cost."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..denoiser.cache import Cache
from ..denoiser.cache_attach import cached
from ..denoiser.cache_report import quantiles
from ..denoiser.compensate import Compensation, Fit
from ..errors import ArtifactError, OptionError
from .cache_measure import Measurement
from .engine import Batch, Engine
from .schedule import Mask, intervals, letters, neighbours, shortest, shortest_few
from .validate import ends, errors, finite, over_processes
from .watched import watched

FEW = 4  # shortest paths that are tried on real runs
TIMED = 3  # runs, the fastest of which counts
SMALLEST = 1e-6  # a threshold of first_block at which everything is full
CLIFF = 2.0  # an error that grows by more than this from one threshold to the next is pointed out


@dataclass
class Images:
    """Batches of images (of this process) and the last states (n, ...) of their full float runs.

    Attributes:
        tag: their name, for going on after a stop.
    """

    tag: str
    batches: list[Batch]
    ends: np.ndarray


@dataclass
class Runs:
    """The pipeline under caches.

    Args:
        engine: of the calibration.
        scheduler: the pipeline's own.
        steps: N.
        settings: level and forecast of learned masks.
    """

    engine: Engine
    scheduler: Any
    steps: int
    settings: Cache

    def masked(self, mask: Mask) -> Cache:
        """The settings with a mask."""
        return replace(Cache.mask(mask), forecast=self.settings.forecast, level=self.settings.level)

    def plain(self, tag: str, batches: Sequence[Batch], calls: int) -> np.ndarray:
        """Last states without a cache."""
        return ends(self.engine, f"{tag}/plain{calls}", batches, lambda: copy.deepcopy(self.scheduler), calls)

    def images(self, tag: str, first: int, count: int) -> Images:
        """Images first..first + count - 1 with their full runs."""
        batches = self.engine.batches(first, count)
        return Images(tag, batches, self.plain(tag, batches, self.steps))

    def errors(self, images: Images, cache: Cache, compensation: Compensation | None = None) -> np.ndarray:
        """Relative errors of runs with a cache, of the images of all processes."""
        name = letters(cache.full_steps(self.steps))
        what = f"{images.tag}/{name}.{cache.forecast}{cache.level}{'' if compensation is None else '+vc'}"
        with cached(self.engine.pipe, cache):
            z = ends(self.engine, what, images.batches, self.schedulers(compensation), self.steps)
        return over_processes(self.engine, what, errors(z, images.ends))

    def plain_errors(self, images: Images, calls: int) -> np.ndarray:
        """As `errors`, of runs with fewer calls and no cache."""
        z = self.plain(images.tag, images.batches, calls)
        return over_processes(self.engine, f"{images.tag}/plain{calls}", errors(z, images.ends))

    def seconds(self, batch: Batch, cache: Cache | None = None) -> float:
        """Of a whole run of a batch, the least of a few: CPU seconds on the CPU, where others may work too.

        The mean over processes, because what runs next depends on it, and must be the same on all.
        """
        with contextlib.nullcontext() if cache is None else cached(self.engine.pipe, cache):
            own = min(self._timed(batch) for _ in range(TIMED))
        return float(over_processes(self.engine, "seconds", np.array([own])).mean())

    def _timed(self, batch: Batch) -> float:
        cuda = self.engine.device.type == "cuda"
        now = time.perf_counter if cuda else time.process_time
        start = now()
        self.engine.run(batch, copy.deepcopy(self.scheduler), self.steps)
        if cuda:
            torch.cuda.synchronize()
        return now() - start

    def schedulers(self, compensation: Compensation | None) -> Callable[[], Any]:
        """Makes a scheduler that compensates."""
        return lambda: watched(self.scheduler, state=None if compensation is None else compensation.apply)

    # ------------------------------------------------------------------ compensation
    def share(self, first: int, count: int) -> Batch:
        """This process's share of images that are fitted together, as one batch."""
        world = self.engine.world
        start, end = (first + count * r // world.size for r in (world.rank, world.rank + 1))
        return self.engine.group(range(start, end), world.rank)

    def total(self, share: torch.Tensor) -> torch.Tensor:
        """The sum over processes, the same on all."""
        parts = over_processes(self.engine, "compensation", share.double().cpu().numpy().ravel())
        return torch.from_numpy(parts.reshape(self.engine.world.size, *share.shape).sum(0)).to(share.device)

    def trajectory(self, batch: Batch) -> torch.Tensor:
        """States (N, B, ...) after each step of the full run of a batch."""
        states: list[torch.Tensor] = []

        def keep(_: int, x: torch.Tensor) -> torch.Tensor:
            states.append(x.detach().cpu())
            return x

        self.engine.run(batch, watched(self.scheduler, state=keep), self.steps)
        return torch.stack(states)

    def compensate(self, batch: Batch, reference: torch.Tensor, cache: Cache, kind: str) -> Compensation | str:
        """Fit a compensation on the batches of all processes, or say why there is none."""
        fit = Fit(reference, kind, total=self.total)

        def correct(i: int, x: torch.Tensor) -> torch.Tensor:
            return fit.correct(i, x.cpu()).to(x.device)

        with cached(self.engine.pipe, cache):
            self.engine.run(batch, watched(self.scheduler, state=correct), self.steps)
        try:
            return fit.done()
        except ArtifactError as error:
            return str(error)

    # ------------------------------------------------------------------ thresholds
    def thresholds(self, images: Images, values: Sequence[float]) -> dict[str, Any]:
        """What `first_block` does at each threshold: error, full steps, and where a small change costs much."""
        told: dict[str, Any] = {}
        before = math.inf
        for t in (SMALLEST, *sorted(values)):
            cache = replace(Cache.first_block(t), forecast=self.settings.forecast, level=self.settings.level)
            e, known = self._threshold(images, cache, f"first_block {t:g}")
            if t == SMALLEST:  # every step is full, so that each d is seen
                told["quartiles of d"] = " ".join(f"{q:.3g}" for q in known["quantiles"])
                told["nothing is reused below"] = known["quantiles"][0]
                continue
            error = float(np.nan_to_num(e, nan=1e30).mean())
            cliff = f", CLIFF: error x {error / before:.1f}" if error > CLIFF * before else ""
            told[f"{t:g}"] = f"error {error:.4f}, {known['full']:.1f} of {self.steps} steps full{cliff}"
            before = error if error > 0 else math.inf
        return told

    def _threshold(self, images: Images, cache: Cache, name: str) -> tuple[np.ndarray, dict[str, Any]]:
        notes = self.engine.kept.notes
        with cached(self.engine.pipe, cache) as attached:
            z = ends(self.engine, name, images.batches, self.schedulers(None), self.steps)
            if name not in notes:
                report = attached.report()  # of the last batch
                notes[name] = {"d": report.changes, "full": [n for rows in report.full.values() for n in rows]}
        d, full = (over_processes(self.engine, f"{name}/{key}", np.array(notes[name][key])) for key in ("d", "full"))
        e = over_processes(self.engine, name, errors(z, images.ends))
        return e, {"quantiles": quantiles(d.tolist()), "full": float(full.mean())}

    # ------------------------------------------------------------------ masks
    def learn(self, images: Images, measured: Measurement, budget: int, window: int) -> tuple[Mask, dict[str, Any]]:
        """The mask with the smallest error on real runs, and what it was chosen among.

        Candidates: the shortest paths, the one with the scheduler's own coefficients as sensitivities, every interval
        of the same number of full steps; then the neighbours of the best of them.
        """
        window = max(window, -(-self.steps // budget))
        paths = [s.mask for s in shortest_few(measured.cost(measured.arriving), budget, window, FEW)]
        table = shortest(measured.cost(measured.direct), budget, window).mask
        regular = intervals(self.steps, budget)
        scores: dict[Mask, float] = {}
        self._score(scores, images, [*paths, table, *regular])
        if not scores:
            raise OptionError(
                f"no mask of {budget} full steps of {self.steps} allows a forecast of order {self.settings.forecast}; "
                "more full steps do"
            )
        first = min(scores, key=lambda mask: scores[mask])
        self._score(scores, images, list(neighbours(first)))
        best = min(scores, key=lambda mask: scores[mask])
        fixed = min((mask for mask in regular if mask in scores), key=lambda mask: scores[mask], default=None)
        told = {
            "masks tried": len(scores),
            "kept": _told(best, scores),
            "shortest path": _told(min(paths, key=lambda mask: scores[mask]), scores),
            "shortest path, sensitivities from the scheduler's coefficients": _told(table, scores),
        }
        if fixed is not None:
            told |= {"best interval": f"every{regular[fixed]}: {_told(fixed, scores)}", "interval": list(fixed)}
        return best, told

    def _score(self, scores: dict[Mask, float], images: Images, masks: Iterable[Mask]) -> None:
        """Add the root mean square relative error of each mask that the forecast allows."""
        for mask in masks:
            if mask in scores:
                continue
            cache = self.masked(mask)
            try:
                cache.full_steps(self.steps)
            except OptionError:
                continue  # too few full steps before the first reused one, at every one of them
            e = self.errors(images, cache)
            scores[mask] = float(np.sqrt(np.mean(finite(e) ** 2)))


def _told(mask: Mask, scores: dict[Mask, float]) -> str:
    return f"{letters(mask)} {scores[mask]:.4f}" if mask in scores else f"{letters(mask)} (no forecast of this order)"
