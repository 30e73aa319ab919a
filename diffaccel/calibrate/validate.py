"""Whether calibrated data helps: against its uncalibrated parent on held-out noise, by a paired interval.

Every calibration ends here: what does not lower the error by an interval that excludes zero is "no benefit found".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from diffusers.utils import logging

from ..compare import stock
from ..errors import DiffaccelError, OptionError
from .engine import Batch, Engine, joined

DRAWS = 2000
FEWEST = 8  # images of an interval
# Settings of diffusers' own schedulers that are tried beside; the best of them is picked on the held-out noise itself,
# which favours it.
STOCK = (
    "DPM++-2 linspace zero",
    "DPM++-2 linspace sigma_min",
    "DPM++-2 trailing zero",
    "DPM++-2 trailing sigma_min",
    "DPM++-2 karras",
    "DPM++-2 lu",
    "UniPC-2 linspace sigma_min",
    "UniPC-2 karras",
    "DEIS-2 linspace zero",
    "DEIS-2 karras",
    "flow Euler, explicit sigmas",
    "flow Euler beta",
    "DPM++-2 flow zero",
    "UniPC-2 flow zero",
    "DEIS-2 flow zero",
)


@dataclass(frozen=True)
class Verdict:
    """Held-out errors of a sampler with and without its calibrated data.

    Args:
        images: how many pairs.
        parent, calibrated: mean relative error |z - z*|/|z*| to the teacher.
        parent_median, calibrated_median: medians of the same.
        difference: mean of calibrated - parent, image by image.
        low, high: its 95 % bootstrap interval over images.
    """

    images: int
    parent: float
    calibrated: float
    parent_median: float
    calibrated_median: float
    difference: float
    low: float
    high: float

    @property
    def helps(self) -> bool:
        """Whether the error falls, and the interval excludes zero."""
        return self.high < 0

    def __str__(self) -> str:
        interval = f"{self.difference:+.4f}, 95 % [{self.low:+.4f}, {self.high:+.4f}]"
        change = f"{self.parent:.4f} -> {self.calibrated:.4f} ({interval})"
        return f"{change} on {self.images} held-out images" + ("" if self.helps else ": no benefit found")

    def to_json(self) -> dict[str, Any]:
        """For the receipt."""
        return dict(vars(self)) | {"verdict": "helps" if self.helps else "no benefit found"}


def verdict(parent: Sequence[float] | np.ndarray, calibrated: Sequence[float] | np.ndarray) -> Verdict:
    """Compare errors of the same images, (n,) each (`finite` ones)."""
    a, b = finite(parent), finite(calibrated)
    if a.shape != b.shape or len(a) < FEWEST:
        raise OptionError(f"a verdict needs {FEWEST} pairs of errors or more, got {len(a)} and {len(b)}")
    means, medians = (float(a.mean()), float(b.mean())), (float(np.median(a)), float(np.median(b)))
    return Verdict(len(a), *means, *medians, *interval(b - a))


def finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Errors with 1e30 where they are not finite: a run that diverged cannot win, and JSON can tell of it."""
    return np.nan_to_num(np.asarray(values, np.float64), nan=1e30, posinf=1e30)


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean of values (n,) and its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def errors(states: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Relative error of each image, (n,), from states (n, ...)."""
    z, target = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (states, teacher))
    return np.linalg.norm(z - target, axis=1) / np.linalg.norm(target, axis=1)


def ends(
    engine: Engine, name: str, batches: Sequence[Batch], make: Callable[[], Any], steps: int, **call: Any
) -> np.ndarray:
    """The last states of runs with a scheduler, (n, ...) float64, in the order of this process's batches.

    Args:
        name: of this piece of work, for going on after a stop.
        make: a new scheduler.
        steps: `num_inference_steps`.
        call: further arguments of the pipeline's call.
    """

    def work(batch: Batch) -> dict[str, np.ndarray]:
        return {"z": engine.run(batch, make(), steps, **call).detach().double().cpu().numpy()}

    return engine.accumulate(name, batches, work, joined, gather=False)["z"]


def run_errors(
    engine: Engine,
    name: str,
    batches: Sequence[Batch],
    make: Callable[[], Any],
    steps: int,
    teacher: np.ndarray,
    **call: Any,
) -> np.ndarray:
    """Relative errors of runs, (n,), of this process's images; arguments as in `ends`. No states are kept.

    Args:
        teacher: last states of this process's images, (n, ...).
    """
    stops = np.cumsum([len(b) for b in batches])
    mine = {b.index: slice(stop - len(b), stop) for b, stop in zip(batches, stops, strict=True)}

    def work(batch: Batch) -> dict[str, np.ndarray]:
        states = engine.run(batch, make(), steps, **call).detach().double().cpu().numpy()
        return {"e": errors(states, teacher[mine[batch.index]])}

    return engine.accumulate(name, batches, work, joined, gather=False)["e"]


def over_processes(engine: Engine, name: str, values: np.ndarray) -> np.ndarray:
    """Numbers of all processes' images, in rank order."""
    parts = engine.world.gather(name, np.ascontiguousarray(values, np.float64).tobytes(), timeout=None)
    return np.concatenate([np.frombuffer(part) for part in parts])


def best_stock(
    engine: Engine, name: str, batches: Sequence[Batch], teacher: np.ndarray, calls: int, config: Mapping[str, Any]
) -> dict[str, Any]:
    """The best of a few settings of diffusers' own schedulers at the same calls, picked on the same images.

    Returns:
        {"scheduler", "error", "median", "tried"}, and "failed": {setting: why} if some could not run.
    """
    found: list[tuple[float, float, str]] = []
    failed: dict[str, str] = {}
    told = logging.get_verbosity()
    logging.set_verbosity_error()  # each of them would list the config keys that it does not know
    try:
        ramps = engine.takes("sigmas")  # Wan's call does not
        for candidate in (c for c in stock(config) if c.name in STOCK and (ramps or not c.ramp)):
            more = {"sigmas": np.linspace(1.0, 1 / calls, calls).tolist()} if candidate.ramp else {}
            tag, make = f"{name}/{candidate.name}", partial(candidate.make, config)
            own = np.zeros(0)
            try:
                own = run_errors(engine, tag, batches, make, calls, teacher, **more)
            except DiffaccelError:
                raise
            except (ValueError, IndexError, RuntimeError, ImportError) as error:  # this setting cannot run here
                failed[candidate.name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
            parts = engine.world.gather(f"{tag}/errors", own.tobytes(), timeout=None)
            if not all(parts):  # a process that went on alone would wait for ever
                failed.setdefault(candidate.name, "failed on another process")
                continue
            e = finite(np.concatenate([np.frombuffer(part) for part in parts]))
            found.append((float(e.mean()), float(np.median(e)), candidate.name))
    finally:
        logging.set_verbosity(told)
    best = min(found, default=(None, None, None))
    result = {**dict(zip(("error", "median", "scheduler"), best, strict=True)), "tried": len(found)}
    return result | ({"failed": failed} if failed else {})
