"""Candidates whose calls differ in cost, at the work of N plain ones: stages of resolution, caches.

Work is counted in FLOPs, so that the same tuning offers the same candidates; seconds are measured at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from ..core.stage_plan import PRESETS
from ..denoiser.cache import Cache
from ..denoiser.cache_hook import refuse_wide
from ..drive import denoiser
from ..errors import DiffaccelError, OptionError
from ..pipelines.applied import applied
from ..pipelines.recipe import Choice
from .candidates import Asked, source
from .sources import REWRITTEN, scheduler, two_grids

WORK = 1.01  # of the work of the plain run


@source("staged")
def _staged(asked: Asked) -> list[Choice]:
    """Presets of `bottleneck` with as many calls as the work of N full-size ones allows (counted FLOPs)."""
    found = []
    for preset in PRESETS:
        shared = preset.startswith("spectral")  # shares of any number of calls
        try:
            made = _costed(asked, preset, asked.calls if shared else None)
            if shared and made.work is not None:  # the first guess tells what a call costs
                most = int(WORK * asked.calls * asked.calls / made.work)
                made = next((c for n in (most + 1, most) if _fits(asked, c := _costed(asked, preset, n))), made)
        except (DiffaccelError, ValueError, RuntimeError) as error:
            asked.left_out[f"bottleneck({preset})"] = (str(error).splitlines() or [type(error).__name__])[0][:160]
            continue
        if _fits(asked, made):
            found.append(made)
        else:
            asked.left_out[made.name] = f"its work is that of {made.work:.2f} calls, not of {asked.calls}"
    return found


def _fits(asked: Asked, choice: Choice) -> bool:
    return choice.work is not None and choice.work <= WORK * asked.calls


def _costed(asked: Asked, preset: str, calls: int | None) -> Choice:
    """A preset with its number of calls and its work, from a run of one image."""
    settings: dict[str, Any] = {"stages": preset} | ({} if calls is None else {"calls": calls})
    name = f"bottleneck({preset}{'' if calls is None else f', {calls} calls'})"
    with applied(asked.pipe, Choice(name, "bottleneck", settings, 0)) as handle:
        made = int(asked.pipe.scheduler.num_inference_steps)
        asked.run(made)
        work = handle.report().step_equivalents
    if work is None:
        raise OptionError("its work cannot be counted on this model")
    return Choice(name, "bottleneck", settings, made, float(f"{work:.4g}"))


CACHES = (
    Cache.every(2, forecast=0),
    Cache.every(2, forecast=1),
    Cache.every(3, forecast=0),
    Cache.every(3, forecast=1),
)


@source("cache")
def _cached(asked: Asked) -> list[Choice]:
    """Caches x a few samplers x two grids, with as many steps as the work of N full ones allows (counted FLOPs)."""
    reused: dict[str, float] = {}  # level of a cache -> work of a reused step
    found = []
    for cache in CACHES:
        name = f"{cache.name}, forecast={cache.forecast}"
        try:
            share = reused.get(str(cache.level))
            if share is None:
                share = reused[str(cache.level)] = _reused(asked, cache)
        except (DiffaccelError, ValueError, RuntimeError) as error:
            asked.left_out[f"cache {name}"] = (str(error).splitlines() or [type(error).__name__])[0][:160]
            continue
        steps, work = _most_steps(cache, asked.calls, share)
        if steps == asked.calls:
            asked.left_out[f"cache {name}"] = f"saves too little for one step more than {asked.calls}"
            continue
        try:
            refuse_wide(cache, steps)
        except OptionError as error:
            asked.left_out[f"cache {name}"] = str(error)[:160]
            continue
        for sampler, options in REWRITTEN:
            for grid, final in two_grids(asked):
                plain = scheduler(steps, sampler, options, grid, final=final)
                settings = {"scheduler": dict(plain.settings), "cache": cache.to_dict()}
                found.append(Choice(f"{plain.name}, {steps} steps, cache {name}", "cached", settings, steps, work))
    return found


def _reused(asked: Asked, cache: Cache) -> float:
    """Work of a reused step, in full ones, by counting the FLOPs of two runs of one image."""
    steps = cache.warmup + 2 * cache.interval + cache.tail
    settings = {"sampler": "ddim", "sampler_options": None}
    with applied(asked.pipe, Choice("", "scheduler", settings, steps)):
        full = flops(asked.pipe, lambda: asked.run(steps)) / steps
    with applied(asked.pipe, Choice("", "cached", {"scheduler": settings, "cache": cache.to_dict()}, steps)):
        with_cache = flops(asked.pipe, lambda: asked.run(steps)) / full
    kept = sum(cache.full_steps(steps))
    return (with_cache - kept) / (steps - kept)


def _most_steps(cache: Cache, calls: int, share: float) -> tuple[int, float]:
    """The largest number of steps whose work is that of `calls` full ones, and that work."""
    best = (calls, float(calls))
    for steps in range(calls + 1, 4 * calls + 1):
        full = sum(cache.full_steps(steps))
        work = full + share * (steps - full)
        if work <= WORK * calls:
            best = (steps, float(f"{work:.4g}"))
    return best


def flops(pipe: Any, run: Callable[[], Any]) -> int:
    """FLOPs inside of the denoiser in a run, counted by torch (matrix products, convolutions, attention).

    Raises:
        OptionError: nothing could be counted (a compiled model).
    """
    counted: list[int] = []
    counter: list[FlopCounterMode] = []

    def before(*_: Any) -> None:
        counter.append(FlopCounterMode(display=False))
        counter[-1].__enter__()

    def after(*_: Any) -> None:
        made = counter.pop()
        made.__exit__(None, None, None)
        counted.append(made.get_total_flops())

    network = denoiser(pipe)
    hooks = [network.register_forward_pre_hook(before), network.register_forward_hook(after, always_call=True)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    if not sum(counted):
        raise OptionError("the work of a call cannot be counted on this model")
    return sum(counted)
