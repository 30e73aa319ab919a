"""Which steps to run in full: the shortest path over measured errors, and the candidates that it is compared with.

Step j between full steps l and the next costs `E[p, l, j]`: the error that it causes at the end of the run, as its own
error, forecast from the full steps p < l, times how much of it arrives there. Such costs do not add up exactly, so the
path is a proposal; real runs decide (`calibrate.cache`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..denoiser.cache import letters as letters
from ..errors import OptionError

Mask = tuple[int, ...]


@dataclass(frozen=True)
class Schedule:
    """A mask (1: full) and the sum of its costs."""

    mask: Mask
    cost: float


def shortest(cost: np.ndarray, budget: int, window: int = 5) -> Schedule:
    """The cheapest mask with exactly `budget` full steps, the first among them; see `shortest_few`."""
    return shortest_few(cost, budget, window, 1)[0]


def shortest_few(cost: np.ndarray, budget: int, window: int = 5, count: int = 4) -> list[Schedule]:
    """The cheapest masks with exactly `budget` full steps, the first among them.

    Args:
        cost: (N, N, N), `cost[p, l, j]` of step j where l is the last full step before it and p the one before that;
            `cost[l, l, j]` where there is none (l = 0). What was not measured is inf.
        budget: full steps.
        window: largest distance of neighbouring full steps (and of the last one to the end).
        count: of masks, at most.

    Returns:
        the cheapest first.

    Raises:
        OptionError: a budget that the window, or what was measured, cannot meet.
    """
    n = len(cost)
    if not 1 <= budget <= n or budget * window < n:
        raise OptionError(f"{budget} full steps at most {window} apart do not cover {n} steps")
    gaps = np.full((n, n, n + 1), np.inf)  # gaps[p, l, k]: steps l+1..k-1
    for p in range(n):
        for l in range(p, n):
            if p < l or l == 0:
                reach = min(l + window, n)
                gaps[p, l, l + 1 : reach + 1] = np.concatenate([[0.0], np.cumsum(cost[p, l, l + 1 : reach])])
    # paths[p, l]: the cheapest ways (cost, full steps) with the last two full steps p and l
    paths: dict[tuple[int, int], list[tuple[float, tuple[int, ...]]]] = {(0, 0): [(0.0, (0,))]}
    for _ in range(budget - 1):
        longer: dict[tuple[int, int], list[tuple[float, tuple[int, ...]]]] = {}
        for (p, l), ways in paths.items():
            for k in range(l + 1, min(l + window, n - 1) + 1):
                if math.isfinite(gap := gaps[p, l, k]):
                    longer.setdefault((l, k), []).extend((c + gap, (*steps, k)) for c, steps in ways)
        paths = {state: sorted(ways)[:count] for state, ways in longer.items()}
    ends = [
        (c + gaps[p, l, n], steps)
        for (p, l), ways in paths.items()
        if l + window >= n
        for c, steps in ways
        if math.isfinite(gaps[p, l, n])
    ]
    if not ends:
        raise OptionError(f"no schedule of {budget} of {n} full steps at most {window} apart was measured")
    return [Schedule(_mask(steps, n), c) for c, steps in sorted(ends)[:count]]


def intervals(steps: int, budget: int) -> dict[Mask, tuple[int, int, int]]:
    """Every mask `every(n, warmup, tail)` with exactly `budget` full steps: mask -> (n, warmup, tail)."""
    found: dict[Mask, tuple[int, int, int]] = {}
    for n in range(1, steps + 1):
        for warmup in range(1, budget + 1):
            for tail in range(budget + 1):
                mask = every(steps, n, warmup, tail)
                if sum(mask) == budget:
                    found.setdefault(mask, (n, warmup, tail))
    return found


def every(steps: int, n: int, warmup: int, tail: int) -> Mask:
    """1 iff `i < warmup or (i - warmup) % n == 0 or i >= steps - tail`."""
    return tuple(int(i < warmup or (i - warmup) % n == 0 or i >= steps - tail) for i in range(steps))


def neighbours(mask: Mask) -> Iterator[Mask]:
    """Masks with one full step (not the first) moved by one."""
    for i in range(1, len(mask)):
        for to in (i - 1, i + 1):
            if mask[i] and 1 <= to < len(mask) and not mask[to]:
                moved = list(mask)
                moved[i], moved[to] = 0, 1
                yield tuple(moved)


def _mask(steps: tuple[int, ...], n: int) -> Mask:
    return tuple(int(i in steps) for i in range(n))
