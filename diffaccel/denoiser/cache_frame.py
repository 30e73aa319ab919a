"""One call of a denoiser under a cache: which rows are full, what their values are, what the others get."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import RunError
from .cache_forecast import History
from .extrapolation_report import Timer


@dataclass
class Frame:
    """What the parts of the model need to know while it runs once.

    Attributes:
        step: of the run.
        rows: of the batch.
        node: where the step lies in the variable of the forecast.
        histories: of this branch, one a section.
        forms: of this branch: what each part returned, one row wide and without values.
        decide: rows to run in full, from the head's quantity f and all rows; None: they are known.
        full: rows to run in full; None: all of them. Valid once `decided`.
        recorded: where full values go in place of the histories.
        forced: what is used in place of forecasts.
        head: what the head returned (`Streams`), and the last block's hidden states, to see that nothing lies between.
        fired: names of the parts that ran.
        watch: measures the cache's own work.
        doubts: (finite or not, step, part) of values on a device that is not waited for.
    """

    step: int
    rows: int
    node: float
    histories: list[History]
    forms: dict[str, Any]
    decide: Callable[[torch.Tensor], list[bool]] | None
    watch: Timer
    full: list[int] | None = None
    recorded: dict[int, list[torch.Tensor]] | None = None
    forced: list[list[torch.Tensor]] | None = None
    head: list[torch.Tensor | None] = field(default_factory=list)
    latest: Any = None
    fired: set[str] = field(default_factory=set)
    doubts: list[tuple[torch.Tensor, int, str]] = field(default_factory=list)

    def set_full(self, chosen: list[bool]) -> None:
        """The decision, one entry a row."""
        self.full = None if all(chosen) else [r for r, yes in enumerate(chosen) if yes]

    @property
    def reused(self) -> list[int] | None:
        """Rows that are left out; None: all of them."""
        if self.full is None:
            return []
        inside = set(self.full)
        return None if not inside else [r for r in range(self.rows) if r not in inside]

    # ------------------------------------------------------------------ values
    def keep(self, section: int, values: list[torch.Tensor], where: str) -> None:
        """Full values of the rows in `full`."""
        self._check(values, where)
        if self.recorded is not None:
            self.recorded[section] = values
        else:
            self.histories[section].push(values, self.node, self.full, self.rows)

    def carried(self, section: int) -> list[torch.Tensor]:
        """Values of the rows that are left out, in their order."""
        if self.forced is not None:
            return self.forced[section]
        return self.histories[section].predict(self.node, self.reused)

    def _check(self, values: list[torch.Tensor], where: str) -> None:
        for value in values:
            fine = value.isfinite().all()
            if fine.device.type != "cpu":
                self.doubts.append((fine, self.step, where))
            elif not fine:
                raise not_finite(self.step, where, value.dtype)


def not_finite(step: int, where: str, dtype: Any) -> RunError:
    """The error of a value that would poison all later steps."""
    return RunError(
        f"step {step}: what {where} computed ({dtype}) is not finite, and a cache would carry it on; run the model in "
        "a wider dtype (bfloat16, float32)"
    )


class Current:
    """The frame of the call that runs in this thread."""

    def __init__(self) -> None:
        self._local = threading.local()

    @property
    def frame(self) -> Frame | None:
        """None outside of a call."""
        return getattr(self._local, "frame", None)

    @frame.setter
    def frame(self, value: Frame | None) -> None:
        self._local.frame = value


# ---------------------------------------------------------------------- trees of tensors
def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in nested tuples and lists, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for part in value for t in tensors_in(part)] if isinstance(value, (tuple, list)) else []


def with_tensors(value: Any, found: list[torch.Tensor]) -> Any:
    """A value of the same form with these tensors in place of its own."""
    left = iter(found)

    def build(part: Any) -> Any:
        if isinstance(part, torch.Tensor):
            return next(left)
        return type(part)(build(p) for p in part) if isinstance(part, (tuple, list)) else part

    return build(value)
