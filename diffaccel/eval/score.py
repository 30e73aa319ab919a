"""What every metric returns: a number, its interval, and everything needed to compare it with another."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Score:
    """A metric.

    value: the estimate (bias-corrected where the estimator says so); low, high: its 95 % interval; raw: the plain value
    that papers print; n_a, n_b: images on each side (None: not known; n_b 0: there is one side); features: id of the
    network with its resize; estimator: how value and interval were made. label: what is printed before the number.
    scale: the printed numbers are the stored ones times this. details: further numbers of the metric. warnings: what
    makes it doubtful.
    """

    value: float
    low: float
    high: float
    raw: float
    n_a: int | None
    n_b: int | None
    features: str
    estimator: str
    label: str
    scale: float = 1.0
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """One line: "FID 12.41 [12.02, 12.80], 10000 vs 50000 images, inception-v3, clean resize"."""
        value, low, high, raw = (_digits(self.scale * x) for x in (self.value, self.low, self.high, self.raw))
        plain = f" (uncorrected {raw})" if abs(self.raw - self.value) > 0.01 * abs(self.raw) else ""
        within = "(no interval)" if math.isnan(self.low) else f"[{low}, {high}]"
        a, b = (n or "unknown number of" for n in (self.n_a, self.n_b))
        many = f"{a} images" if self.n_b == 0 else f"{a} vs {b} images"
        name, _, resize = (
            self.features.partition(":") if self.features.startswith("inception") else (self.features,) * 3
        )
        where = f"{name}, {resize} resize" if resize != name else name
        return f"{self.label} {value} {within}{plain}, {many}, {where}"

    def __str__(self) -> str:
        """The line, then details, notes and warnings, one a line."""
        details = [f"  {k}: {_digits(v) if isinstance(v, float) else v}" for k, v in self.details.items()]
        return "\n".join(
            [
                self.line,
                *details,
                *(f"  note: {x}" for x in self.notes),
                *(f"  warning: {x}" for x in self.warnings),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what is not known (NaN) is None."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}


def _digits(x: float) -> str:
    """Two decimals, or three significant digits of small numbers."""
    return f"{x:.2f}" if abs(x) >= 1 or x == 0 else f"{x:.3g}"


def interval(value: float, se: float) -> tuple[float, float]:
    """95 % normal interval."""
    return value - _Z95 * se, value + _Z95 * se
