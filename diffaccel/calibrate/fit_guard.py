"""Whether a fitted table may be used: held-out inputs, paired against the analytic tables and the present scheduler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .validate import errors, interval

OUTLIERS = 0.1  # share of inputs that may be worse than the baseline before a warning
WORST = 1.5  # how much worse the worst input may be


@dataclass(frozen=True)
class Errors:
    """Relative errors to the teacher's images of one table or scheduler, (n,)."""

    name: str
    values: np.ndarray

    @property
    def geometric(self) -> float:
        """The geometric mean, which says what happens to the typical image."""
        return float(np.exp(np.mean(np.log(np.clip(self.values, 1e-30, 1e30)))))

    @property
    def rmse(self) -> float:
        """Root of the mean square, which a few bad images decide."""
        return float(np.sqrt(np.mean(np.minimum(self.values, 1e30) ** 2)))

    def summary(self) -> dict[str, Any]:
        """For the receipt."""
        numbers = {"rmse": self.rmse, "median": float(np.median(self.values)), "worst": float(self.values.max())}
        return {"name": self.name} | {k: float(f"{min(v, 1e30):.4g}") for k, v in numbers.items()}


def relative(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`|z - z*| / |z*|` of each image, (n,) float64; not finite counts as infinity."""
    with np.errstate(over="ignore", invalid="ignore"):
        error = errors(found, wanted)
    return np.where(np.isfinite(error), error, np.inf)


def paired(fitted: np.ndarray, base: np.ndarray) -> tuple[float, float, float]:
    """Geometric mean of the paired ratios of errors, and its 95 % bootstrap interval over inputs."""
    logs = np.log(np.clip(fitted, 1e-30, 1e30)) - np.log(np.clip(base, 1e-30, 1e30))
    mean, low, high = np.exp(interval(logs))
    return float(mean), float(low), float(high)


@dataclass(frozen=True)
class Judgement:
    """What the held-out inputs say.

    Args:
        accepted: the fitted table is better than every baseline.
        base: the best baseline.
        ratio, low, high: geometric mean of the paired ratios to it, with its 95 % interval.
        improved: share of inputs that are nearer to the teacher than with the baseline.
        notes: why it was refused, and warnings.
    """

    accepted: bool
    base: Errors
    ratio: float
    low: float
    high: float
    improved: float
    notes: tuple[str, ...]


def judge(fitted: Errors, bases: list[Errors], calibration: float) -> Judgement:
    """The guard.

    A fitted table is accepted if every error is finite, the geometric mean of its paired ratios to the best baseline
    (by geometric mean) is below 1 with its interval, and its root mean square error is not above the baseline's.

    Args:
        bases: of the analytic tables and the present scheduler.
        calibration: root mean square error of the fitted table on the inputs that it was fitted to.
    """
    base = min(bases, key=lambda e: e.geometric)
    ratio, low, high = paired(fitted.values, base.values)
    improved = float(np.mean(fitted.values < base.values))
    refused, warned = [], []
    if not np.all(np.isfinite(fitted.values)):
        refused.append("some images are not finite")
    if high >= 1:
        refused.append(f"no benefit found: the ratio to {base.name} is {ratio:.3f} [{low:.3f}, {high:.3f}]")
    if fitted.rmse > base.rmse:
        refused.append(f"its root mean square error is {fitted.rmse:.4g}, that of {base.name} {base.rmse:.4g}")
    if 1 - improved > OUTLIERS or fitted.values.max() > WORST * base.values.max():
        warned.append(
            f"outliers: {1 - improved:.0%} of the images are worse than with {base.name}, the worst error is "
            f"{fitted.values.max():.3g} against {base.values.max():.3g}"
        )
    if fitted.rmse > 1.5 * calibration:
        warned.append(
            f"few or unrepresentative inputs: the held-out error {fitted.rmse:.4g} is more than 1.5 times the "
            f"calibration error {calibration:.4g}"
        )
    return Judgement(not refused, base, ratio, low, high, improved, (*refused, *warned))


def report_of(
    found: Judgement, mine: Errors, calibration: float, analytics: list[Errors], others: list[Errors]
) -> dict[str, Any]:
    """The receipt of one budget."""
    present, stock = others[:1], others[1:]
    report: dict[str, Any] = {
        "verdict": mine.name if found.accepted else "analytic: " + "; ".join(found.notes),
        "held-out": mine.summary() | {"images": len(mine.values)},
        "calibration rmse": float(f"{calibration:.4g}"),
        "best baseline": found.base.name,
        "ratio to it [95 %]": [round(v, 4) for v in (found.ratio, found.low, found.high)],
        "images improved": round(found.improved, 4),
        "baselines": [e.summary() for e in (*analytics, *present)],
    }
    if stock:
        best = min(stock, key=lambda e: float(np.median(e.values)))
        ratio = float(np.median(mine.values) / np.median(best.values))
        improved = float(np.mean(mine.values < best.values))
        report["best stock scheduler"] = best.summary() | {
            "tried": len(stock),
            f"{mine.name} / stock, medians": float(f"{ratio:.4g}"),
            "images improved": round(improved, 4),
        }
    if found.accepted and found.notes:
        report["warnings"] = list(found.notes)
    return report
