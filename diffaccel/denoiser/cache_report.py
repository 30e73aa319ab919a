"""What was measured in a run with a cache."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

from .cache import letters
from .extrapolation_report import Timer

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class CacheReport:
    """One run, as measured. Rows are those of a call: guidance branches and images.

    Attributes:
        policy, level, forecast: the settings.
        steps: of the run so far.
        decisions: branch -> for each row of the batch one letter a call, "F" for full and "." for reused.
        forwards: calls of the denoiser in full, in part (some rows full) and reused.
        changes: relative changes d that `first_block` measured, over rows and steps.
        bytes: of the cached values, at most.
        timers: kind of call -> its spans; "cache" is the cache's own work inside of them.
        parts: hooks that were there, all of which ran.
        notes: what limits the result.
    """

    policy: str
    level: str
    forecast: int
    steps: int = 0
    first: int = 0
    decisions: dict[str, list[str]] = field(default_factory=dict)
    forwards: dict[str, int] = field(default_factory=lambda: {"full": 0, "mixed": 0, "reused": 0})
    changes: list[float] = field(default_factory=list)
    bytes: int = 0
    timers: dict[str, Timer] = field(default_factory=dict)
    parts: int = 0
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def tell(self, branch: str, full: list[int] | None, rows: int) -> None:
        """The decision of one call."""
        told = self.decisions.setdefault(branch, [""] * rows)
        chosen = set(range(rows) if full is None else full)
        self.decisions[branch] = [text + letters([r in chosen]) for r, text in enumerate(told)]
        self.forwards["full" if len(chosen) == rows else "mixed" if chosen else "reused"] += 1

    @property
    def full(self) -> dict[str, list[int]]:
        """Full calls of each row, by branch."""
        return {b: [text.count("F") for text in rows] for b, rows in self.decisions.items()}

    def seconds(self, kind: str) -> float:
        """Seconds in calls of a kind ("full", "mixed", "reused"), or in the cache's own work ("cache")."""
        return self.timers[kind].inside() if kind in self.timers else 0.0

    @property
    def equal_calls(self) -> float | None:
        """Calls of the plain model that take as long as this run did; None before a full call was timed."""
        each = {kind: timer.each() for kind, timer in self.timers.items() if kind != "cache"}
        if not each.get("full"):
            return None
        # medians, because the first call of a process, and calls that something else interrupted, are slow
        total = sum(len(spans) * statistics.median(spans) for spans in each.values())
        branches = sum(self.forwards.values()) / self.steps
        return total / statistics.median(each["full"]) / branches

    @property
    def quantiles(self) -> list[float]:
        """Of `changes`: least, quartiles, largest; empty where nothing was measured."""
        return quantiles(self.changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "policy": self.policy,
            "level": self.level,
            "forecast": self.forecast,
            "steps": self.steps,
            "decisions": self.decisions,
            "full_calls": self.full,
            "forwards": self.forwards,
            "change_quantiles": self.quantiles,
            "bytes": self.bytes,
            "seconds": {kind: self.seconds(kind) for kind in ("full", "mixed", "reused", "cache")},
            "equal_plain_calls": self.equal_calls,
            "parts": self.parts,
            "notes": self.notes,
        }

    def __str__(self) -> str:
        lines = [f"cache {self.policy}, level {self.level}, forecast {self.forecast}: {self.steps} steps"]
        for branch, rows in self.decisions.items():
            for text in dict.fromkeys(rows):
                same = [r for r, other in enumerate(rows) if other == text]
                lines.append(f"  branch {branch}, rows {_span(same)}: {text} ({text.count('F')} full)")
        if self.changes:
            lines.append("  relative change d: " + " ".join(f"{q:.3g}" for q in self.quantiles) + " (quartiles)")
        seconds = ", ".join(f"{kind} {self.seconds(kind):.3f} s" for kind in ("full", "mixed", "reused") if
                            self.forwards[kind])  # fmt: skip
        lines.append(
            f"  {seconds}; of it {self.seconds('cache'):.3f} s for the cache; {self.bytes / 2**20:.1f} MiB kept"
        )
        if self.equal_calls is not None:
            lines.append(f"  to judge it, compare with a plain run of {self.equal_calls:.1f} calls: it costs the same")
        return "\n".join([*lines, *self.notes])


def quantiles(changes: list[float]) -> list[float]:
    """Least, quartiles, largest; empty of nothing."""
    ordered = sorted(changes)
    return [ordered[round(q * (len(ordered) - 1))] for q in SHARES] if ordered else []


def _span(rows: list[int]) -> str:
    if len(rows) > 2 and rows == list(range(rows[0], rows[-1] + 1)):
        return f"{rows[0]}-{rows[-1]}"
    return ", ".join(map(str, rows))
