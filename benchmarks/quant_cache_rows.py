"""The rows of bench_quant_cache.py on an embedded model: plain runs, stock schedulers, peers, ours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import quant_cache_peers as peers
import torch
from quant_cache_peers import alone, ours

import diffaccel as da
from diffaccel.artifact import Artifact
from diffaccel.calibrate.validate import STOCK
from diffaccel.compare import stock
from diffaccel.denoiser.cache import Cache

PLAIN = (0.25, 0.3, 0.36, 0.43, 0.5, 0.57, 0.64, 0.72, 0.8, 0.9)  # shares of the steps, for the curve of plain runs
STOCK_AT = (0.36, 0.5, 0.64)
COMPILED = "float, blocks compiled"
QUANT = da.Quant("w8a8", min_features=64)  # the embedded models are narrow


@dataclass
class Row:
    """One way to run, and what came of it.

    Attributes:
        name, kind: for the table; kind is "plain", "stock", "peer" or "ours".
        steps: of the run.
        wrap: pipeline -> context manager around the calls.
        scheduler: makes another scheduler from the config, or None; `ramp`: it needs explicit sigmas.
        compiled: a short run before the timed one compiles.
        seconds: relative to full runs of the same round.
        latents: (images, ...) last states.
        full: full calls of a row of the batch.
        peak, kept: MiB at most above what there was before the call, and of the cache.
    """

    name: str
    kind: str
    steps: int
    wrap: Callable[[Any], Any] = lambda pipe: contextlib.nullcontext()
    scheduler: Callable[[Any], Any] | None = None
    ramp: bool = False
    compiled: bool = False
    seconds: list[float] = field(default_factory=list)
    latents: torch.Tensor | None = None
    full: float | None = None
    peak: float | None = None
    kept: float | None = None
    failed: str = ""

    def result(self) -> dict[str, Any]:
        """What is kept of it on disk."""
        return {k: getattr(self, k) for k in ("seconds", "latents", "full", "peak", "kept", "failed")}


# ---------------------------------------------------------------------- lists
def rows_of(name: str, pipe: Any, steps: int, made: Artifact, int8: Artifact, call: Callable[[int], Any]) -> list[Row]:
    """All rows of a model.

    Args:
        made, int8: calibrated in float and in W8A8.
        call: a short run of the pipeline, for what peers calibrate.
    """
    rows = [Row(f"{n} steps", "plain", n) for n in sorted({round(s * steps) for s in PLAIN})]
    rows += _stock(pipe, steps)
    for cache in [Cache.every(n, forecast=m) for n in (2, 3, 4) for m in (0, 1, 2)] + [
        Cache.every(3, 1, 0, forecast=0)
    ]:
        rows.append(Row(f"{cache.name}, forecast {cache.forecast}", "ours", steps, ours(cache=cache)))
    for t in (0.05, 0.1, 0.2):
        for m in (0, 1):
            cache = Cache.first_block(t, forecast=m)
            rows.append(Row(f"{cache.name}, forecast {m}", "ours", steps, ours(cache=cache)))
    rows += _calibrated(made, steps) + _calibrated(int8, steps, QUANT)
    three = Cache.every(3, forecast=1)
    rows.append(Row(f"{three.name}, forecast 1, W8A8", "ours", steps, ours(cache=three, quant=QUANT)))
    for label, quant in (("", None), (", W8A8", QUANT)):
        wrap = ours(True, cache=three, quant=quant)
        rows.append(Row(f"{three.name}, forecast 1{label}, compiled", "ours", steps, wrap, compiled=True))
    rows.append(Row("torchao W8A8 alone", "peer", steps, alone(QUANT, False)))
    rows.append(Row(COMPILED, "peer", steps, alone(None, True), compiled=True))
    rows.append(Row("torchao W8A8 alone, blocks compiled", "peer", steps, alone(QUANT, True), compiled=True))
    return rows + (_peers(pipe, steps, call) if name == "tiny-flow" else [])


def _stock(pipe: Any, steps: int) -> list[Row]:
    rows = []
    for n in sorted({round(s * steps) for s in STOCK_AT}):
        for candidate in (c for c in stock(pipe.scheduler.config) if c.name in STOCK):
            own = candidate.steps(n)
            if own is not None:
                label = f"{candidate.name}, {n} calls"
                rows.append(Row(label, "stock", own, scheduler=candidate.make, ramp=candidate.ramp))
    return rows


def _calibrated(made: Artifact, steps: int, quant: da.Quant | None = None) -> list[Row]:
    rows = []
    for run in made.meta["runs"]:
        kept = "with" if run["compensated"] else "without (no benefit of)"
        cache = Cache.from_dict(run["cache"])
        label = f"learned mask, {run['full']} full" if run["learned"] else cache.name
        label += ", forecast 1" + (", W8A8" if quant else "")
        rows.append(Row(f"{label}, {kept} VC", "ours", steps, ours(cache=cache, artifact=made, quant=quant)))
    return rows


def _peers(pipe: Any, steps: int, call: Callable[[int], Any]) -> list[Row]:
    """Caches of diffusers and cache-dit. (They know no UNet.)"""
    made = {f"FirstBlockCache {t}": peers.first_block(t) for t in (0.05, 0.1, 0.2)}
    made |= {f"TaylorSeer {n}, order {m}": peers.taylor_seer(n, m) for n in (2, 3, 4) for m in (0, 1)}
    made |= {f"PAB {n}": peers.pyramid(n) for n in (2, 3)}
    made["FasterCache"] = peers.faster()
    ratios = peers.mag_ratios(pipe, steps, lambda: call(steps))
    made |= {f"MagCache {t}, calibrated": peers.mag(t, steps, ratios) for t in (0.03, 0.06, 0.2)}
    made |= {f"cache-dit DBCache F1 {t}": peers.cache_dit_peer(t, steps, False) for t in (0.05, 0.1, 0.2)}
    made["cache-dit DBCache F1 0.1 + TaylorSeer"] = peers.cache_dit_peer(0.1, steps, True)
    return [Row(name, "peer", steps, wrap) for name, wrap in made.items()]
