"""Full or reuse, for each row of a call."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..errors import RunError
from .cache import Cache


@dataclass
class Watch:
    """`first_block` on one branch.

    Attributes:
        last: the head's quantity that the next one is compared with, (rows, ...).
        sums: relative change of each row since its last full step.
        run: reused steps in a row, of each row.
        seen: all measured d, for the report.
    """

    last: torch.Tensor | None = None
    sums: list[float] = field(default_factory=list)
    run: list[int] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)


def changes(value: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """`mean|f - f_last| / mean|f_last|` of each row, (rows,), in float32."""
    rows = len(value)
    f, g = value.reshape(rows, -1).float(), last.reshape(rows, -1).float()
    return (f - g).abs().mean(1) / g.abs().mean(1).clamp_min(1e-12)


def decide(
    watch: Watch,
    value: torch.Tensor,
    settings: Cache,
    ready: list[bool],
    groups: list[list[int]],
    step: int,
) -> list[bool]:
    """Rows to run in full, by `Cache.first_block`. Waits for the device once.

    Args:
        watch: of the branch; it goes along.
        value: the head's quantity, (rows, ...).
        settings: of the cache.
        ready: rows that have something to reuse.
        groups: rows that are full where one of them is.
        step: for messages.

    Raises:
        RunError: if the quantity is not finite.
    """
    rows = len(value)
    if watch.last is None or watch.last.shape != value.shape:
        watch.last, watch.sums, watch.run = value, [0.0] * rows, [0] * rows
        return [True] * rows
    found = changes(value, watch.last).tolist()
    if any(d != d or d == float("inf") for d in found):
        raise RunError(f"step {step}: the first block's output ({value.dtype}) is not finite")
    watch.seen += found
    sums = [s + d for s, d in zip(watch.sums, found, strict=True)] if settings.accumulate else found
    full = [
        not there or s >= settings.threshold or n >= settings.max_run
        for there, s, n in zip(ready, sums, watch.run, strict=True)
    ]
    for group in groups:
        if any(full[r] for r in group):
            for r in group:
                full[r] = True
    watch.sums = [0.0 if yes else s for yes, s in zip(full, sums, strict=True)]
    watch.run = [0 if yes else n + 1 for yes, n in zip(full, watch.run, strict=True)]
    if settings.accumulate or all(full):
        watch.last = value
    elif any(full):
        index = torch.tensor([r for r, yes in enumerate(full) if yes], device=value.device)
        watch.last = watch.last.index_copy(0, index, value.index_select(0, index))
    return full
