"""What was measured in a run with extrapolated answers."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Report:
    """One run, as measured.

    Attributes:
        pattern: what was asked for.
        first: the step at which the run began.
        nodes: steps of the run so far.
        skipped: for each image the steps that were not called; one entry for all where images are not told apart.
        forwards: how often the model itself was run (guidance branches and parts of a batch count singly).
        refusals: how often a skip was refused, by reason, over images and steps. "protected", "history", "anchor",
            "max_consecutive" are rules; "tolerance" is the gate; the others are rejected predictions.
        seconds_model, seconds_outside: inside the model, and from the first to the last call outside of it.
        together: whether the images of a batch were skipped together only, although each was decided by itself.
        notes: what limits the result.
    """

    pattern: str
    nodes: int = 0
    skipped: list[list[int]] = field(default_factory=list)
    forwards: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    timer: Timer | None = None
    first: int = 0
    together: bool = False

    def sized(self, images: int) -> None:
        """Make room for the steps of so many images."""
        if not self.skipped or len(self.skipped) == 1 < images:
            self.skipped = [list(self.skipped[0]) if self.skipped else [] for _ in range(images)]

    @property
    def latest(self) -> int:
        """The latest step."""
        return self.first + self.nodes - 1

    @property
    def calls(self) -> list[int]:
        """Model calls of each image (a guidance pair counts once)."""
        return [self.nodes - len(steps) for steps in self.skipped]

    @property
    def saved(self) -> list[int]:
        """Model calls that each image was spared."""
        return [len(steps) for steps in self.skipped]

    @property
    def seconds_model(self) -> float:
        """Seconds inside the model."""
        return self.timer.inside() if self.timer else 0.0

    @property
    def seconds_outside(self) -> float:
        """Seconds from the first to the last call, without those inside the model."""
        return max(0.0, self.timer.total() - self.timer.inside()) if self.timer else 0.0

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "pattern": self.pattern,
            "nodes": self.nodes,
            "calls": self.calls,
            "saved": self.saved,
            "skipped": self.skipped,
            "forwards": self.forwards,
            "refusals": dict(self.refusals),
            "seconds_model": self.seconds_model,
            "seconds_outside": self.seconds_outside,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        calls = self.calls or [0]
        mean = sum(calls) / len(calls)
        spread = f"{mean:.1f} (min {min(calls)}, max {max(calls)})" if len(set(calls)) > 1 else str(calls[0])
        refused = ", ".join(f"{k} {v}" for k, v in sorted(self.refusals.items())) or "none"
        lines = [
            f"extrapolate {self.pattern}: {self.nodes} nodes, {spread} model calls an image; skipped "
            f"{self.skipped[0] if len(set(map(tuple, self.skipped))) == 1 else self.skipped}",
            f"refused: {refused}; {self.forwards} forwards, {self.seconds_model:.3f} s in the model, "
            f"{self.seconds_outside:.3f} s outside",
            f"to judge it, compare with the same scheduler and with a second-order sampler at {round(mean)} calls",
        ]
        return "\n".join([*lines, *self.notes])


class Timer:
    """Seconds inside and around the calls of a model; on CUDA by events, which are read only when asked for."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.spans: list[tuple[Any, Any]] = []
        self.first: Any = None
        self.last: Any = None

    def now(self) -> Any:
        """A point in time."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def call(self) -> None:
        """A call of the hook begins."""
        self.first = self.now() if self.first is None else self.first

    def inside(self) -> float:
        """Seconds in the model."""
        return sum(self.each())

    def each(self) -> list[float]:
        """Seconds of each span."""
        return [self._between(a, b) for a, b in self.spans]

    def total(self) -> float:
        """Seconds from the first to the last call."""
        return 0.0 if self.first is None or self.last is None else self._between(self.first, self.last)

    def _between(self, start: Any, stop: Any) -> float:
        if not self.cuda:
            return float(stop - start)
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1000
