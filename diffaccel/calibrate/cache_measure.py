"""What a skip schedule is made from: errors of forecasts, one step at a time, and how much of each arrives.

Everything runs through the pipeline's own call. A full run is recorded; then the model is answered from the record, in
part (cached values forced into it) or in full, while the scheduler is held on the recorded trajectory or let go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..denoiser.cache import Cache
from ..denoiser.cache_attach import cached
from ..denoiser.cache_forecast import weights
from ..denoiser.cache_probe import Driver, Probe
from ..errors import RunError
from .engine import Batch, Engine
from .watched import Change, watched

NUDGE = 0.05  # size of an injected error, relative to the model's output: far above rounding, still in the linear range


@dataclass
class Record:
    """A full run of one batch.

    Attributes:
        outputs: of each step, branch -> what the model returned.
        values: of each step, branch -> the cached quantity.
        guided: of each step, what the scheduler was handed, (B, ...).
        states: after each step, (B, ...).
    """

    outputs: list[dict[str, Any]] = field(default_factory=list)
    values: list[dict[str, list[torch.Tensor]]] = field(default_factory=list)
    guided: list[torch.Tensor] = field(default_factory=list)
    states: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Measurement:
    """Of one batch of B images over N steps.

    Attributes:
        errors: (N, N, N) mean square error of the guided output of step j with a forecast from full steps p < l < j
            (`errors[l, l, j]`: reuse of l alone); nan where it was not measured.
        arriving: (N,) squared change of the last state for a squared change of step j's output, relative; the model
            answers the changed states. Step 0, which is always full, has 0.
        direct: the same if the model's later answers did not change (what the scheduler's coefficients say).
        images: B.
    """

    errors: np.ndarray
    arriving: np.ndarray
    direct: np.ndarray
    images: int

    def tensors(self) -> dict[str, np.ndarray]:
        """Sums over images, which add."""
        b = self.images
        return {
            "errors": self.errors * b,
            "arriving": self.arriving * b,
            "direct": self.direct * b,
            "images": np.array([float(b)]),
        }

    @classmethod
    def of(cls, sums: dict[str, np.ndarray]) -> Measurement:
        """From sums."""
        b = float(sums["images"][0])
        return cls(sums["errors"] / b, sums["arriving"] / b, sums["direct"] / b, int(b))

    def cost(self, arriving: np.ndarray) -> np.ndarray:
        """(N, N, N) of `schedule.shortest`: errors at the end of the run; inf where nothing was measured."""
        return np.where(np.isnan(self.errors), np.inf, self.errors * arriving)


class Measure:
    """Measures one batch.

    Args:
        engine: of the calibration.
        scheduler: the pipeline's own.
        steps: N.
        settings: of the cache; its forecast is 0 or 1.
        window: largest distance of full steps.
    """

    def __init__(self, engine: Engine, scheduler: Any, steps: int, settings: Cache, window: int) -> None:
        self.engine, self.scheduler, self.steps = engine, scheduler, steps
        self.settings, self.window = settings, window

    def passes(self) -> int:
        """Runs of a batch, about."""
        gaps = self.window - 1
        return 1 + gaps * (self.window if self.settings.forecast else 1) + (self.steps - 1)

    def __call__(self, batch: Batch) -> Measurement:
        record = self.record(batch)
        errors, directions = self._errors(batch, record)
        arriving, direct = (self._arriving(batch, record, directions, answering) for answering in (True, False))
        return Measurement(errors, arriving, direct, len(batch))

    # ------------------------------------------------------------------ runs
    def _run(
        self, batch: Batch, asked: int, drive: Driver, output: Change | None = None, state: Change | None = None
    ) -> None:
        """A run in which the model is asked at `asked` steps, in full or in part."""
        with cached(self.engine.pipe, self.settings, drive):
            self.engine.run(batch, watched(self.scheduler, output, state), self.steps)
        self.engine.calls -= (self.steps - asked) * len(batch)  # answered from the record

    def record(self, batch: Batch) -> Record:
        """A full run."""
        found = Record()

        def drive(probe: Probe) -> Any:
            if probe.opens:
                found.outputs.append({})
                found.values.append({})
            output, values = probe.full()
            found.outputs[-1][probe.branch] = output
            found.values[-1][probe.branch] = [v.detach().cpu() for v in values]  # N times a cache
            return output

        self._run(batch, self.steps, drive, _kept(found.guided), _kept(found.states))
        if not len(found.outputs) == len(found.states) == self.steps:
            raise RunError(f"a run of {self.steps} steps called the model in {len(found.outputs)} of them")
        return found

    def _errors(self, batch: Batch, record: Record) -> tuple[np.ndarray, dict[int, torch.Tensor]]:
        """`Measurement.errors`, and one forecast error (B, ...) of each step."""
        n = self.steps
        errors = np.full((n, n, n), np.nan)
        directions: dict[int, torch.Tensor] = {}
        older: list[int | None] = [None] if self.settings.forecast == 0 else list(range(1, self.window + 1))
        for behind in range(1, self.window):  # j - l
            for gap in older:  # l - p
                pairs = {j: sources(j, behind, gap) for j in range(1, n)}
                due = {j: pair for j, pair in pairs.items() if pair and np.isnan(errors[(*pair, j)])}
                for j, e in self._forecast(batch, record, due).items():
                    errors[(*due[j], j)] = float(e.square().mean())
                    directions.setdefault(j, e)
        if self.settings.forecast == 0:
            for l in range(n):
                errors[:l, l] = errors[l, l]  # whatever came before
        return errors, directions

    def _forecast(self, batch: Batch, record: Record, due: dict[int, tuple[int, int]]) -> dict[int, torch.Tensor]:
        """Errors of the guided output at recorded states, of forecasts from the given full steps."""
        found: dict[int, torch.Tensor] = {}
        if not due:
            return found

        def drive(probe: Probe) -> Any:
            j = probe.step
            if j == 0:
                return probe.full()[0]
            if j not in due:
                return record.outputs[j][probe.branch]
            p, l = due[j]
            nodes = sorted({p, l})
            share = weights([float(k) for k in nodes], float(j), self.settings.forecast)
            kept = [record.values[k][probe.branch] for k in nodes[-len(share) :]]
            return probe.forced([_weighted(share, parts).to(probe.sample.device) for parts in zip(*kept)])

        def see(j: int, guided: torch.Tensor) -> torch.Tensor:
            if j in due:
                found[j] = (guided - record.guided[j]).double()
            return guided

        self._run(batch, 1 + len(due), drive, see, lambda j, _: record.states[j])
        return found

    # ------------------------------------------------------------------ what arrives
    def _arriving(
        self, batch: Batch, record: Record, directions: dict[int, torch.Tensor], answering: bool
    ) -> np.ndarray:
        """`Measurement.arriving`, or `direct` where the model is not asked again."""
        found = np.zeros(self.steps)
        for j, direction in sorted(directions.items()):
            found[j] = self._nudged(batch, record, j, direction, answering)
        return found

    def _nudged(self, batch: Batch, record: Record, at: int, direction: torch.Tensor, answering: bool) -> float:
        size = _norms(record.guided[at].double()) / _norms(direction).clamp_min(1e-30)
        nudge = NUDGE * size.reshape(-1, *[1] * (direction.ndim - 1)) * direction
        last: list[torch.Tensor] = []

        def drive(probe: Probe) -> Any:
            if probe.step <= at or not answering:
                return record.outputs[probe.step][probe.branch]
            return probe.full()[0]

        def push(j: int, guided: torch.Tensor) -> torch.Tensor:
            return (guided.double() + nudge).to(guided.dtype) if j == at else guided

        self._run(batch, self.steps - 1 - at if answering else 0, drive, push, _kept(last))
        away = _norms(last[-1].double() - record.states[-1].double())
        return float((away.square() / _norms(nudge).square().clamp_min(1e-60)).mean())


def sources(j: int, behind: int, gap: int | None) -> tuple[int, int] | None:
    """The full steps (p, l) that step j is forecast from, l = j - behind and p = l - gap; None if there are none."""
    l = j - behind
    if l < 0:
        return None
    if gap is None or l == 0:
        return l, l
    return (l - gap, l) if l >= gap else None


def _kept(into: list[torch.Tensor]) -> Callable[[int, torch.Tensor], torch.Tensor]:
    def keep(_: int, x: torch.Tensor) -> torch.Tensor:
        into.append(x.detach().clone())
        return x

    return keep


def _weighted(share: list[float], parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The sum, made in float32 for half precision, as a cache makes it."""
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    return torch.stack([w * v.to(dtype) for w, v in zip(share, parts, strict=True)]).sum(0).to(parts[0].dtype)


def _norms(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).norm(dim=1)
