"""Cascade polynomial regression: ratios of DC-Solver between the numbers of calls and scales that were searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
from scipy.optimize import lsq_linear

from ..samplers.dc import cpr_ratio

RIDGE = 1e-3
CENTER = {"y": 0.5, "g": 0.6, "n": 0.2}
POWERS = {"y": 4, "g": 3, "n": 3}  # terms 1, v, v^2, ...


@dataclass(frozen=True)
class CPR:
    """A fitted polynomial.

    Args:
        coef: (4, 3, 3), for `samplers.dc.cpr_ratio`.
        box: of the runs it was fitted to: {"calls": [low, high], "guidance": [low, high]}.
        receipt: how far it is from the ratios it was fitted to.
    """

    coef: np.ndarray
    box: dict[str, list[float]]
    receipt: dict[str, Any]


def fit_cpr(runs: Sequence[tuple[int, float | None, np.ndarray]], ridge: float = RIDGE) -> CPR | None:
    """Ridge regression of `rho(i/N, guidance, N)` on centred variables; the published form is ill-conditioned.

    Args:
        runs: (calls, guidance, (calls,) ratios). No guidance counts as 1.
        ridge: weight of the squared coefficients, in units of one ratio's squared error.

    Returns:
        None for fewer than two numbers of calls: there is nothing between them.
    """
    points = [(i, n, 1.0 if g is None else g, float(r[i - 1])) for n, g, r in runs for i in range(3, n + 1)]
    if len({n for n, _, _ in runs}) < 2 or not points:
        return None
    rows = np.array([_terms(i / n, g / 12, n / 50) for i, n, g, _ in points])
    wanted = np.array([rho - 1.0 for *_, rho in points])  # shrunk towards no compensation
    size = rows.shape[1]
    system = np.concatenate([rows, np.sqrt(ridge) * np.eye(size)])
    fitted = lsq_linear(system, np.concatenate([wanted, np.zeros(size)])).x.reshape(*POWERS.values())
    fitted[0, 0, 0] += 1.0
    coef = _published(fitted)
    misses = [cpr_ratio(coef, i, n, g) - rho for i, n, g, rho in points]
    counts, scales = [n for n, _, _ in runs], [1.0 if g is None else float(g) for _, g, _ in runs]
    box = {"calls": [float(min(counts)), float(max(counts))], "guidance": [min(scales), max(scales)]}
    worst = max(abs(m) for m in misses)
    told = {"root mean square miss": float(np.sqrt(np.mean(np.square(misses)))), "largest miss": float(worst)}
    return CPR(coef, box, {"fitted to ratios": len(points), **told, "validated": "no: only the searched runs are"})


def _terms(y: float, g: float, n: float) -> np.ndarray:
    parts = [[(v - CENTER[k]) ** p for p in range(POWERS[k])] for k, v in (("y", y), ("g", g), ("n", n))]
    return np.einsum("k,a,b->kab", *map(np.array, parts)).ravel()


def _published(centred: np.ndarray) -> np.ndarray:
    """Coefficients of powers of y (rising), g and n (falling), from those of centred powers (rising)."""
    y, g, n = (_expand(CENTER[k], POWERS[k]) for k in ("y", "g", "n"))
    return np.einsum("kab,ky,ag,bn->ygn", centred, y, g, n)[:, ::-1, ::-1].copy()


def _expand(center: float, terms: int) -> np.ndarray:
    """(p, q): coefficient of v^q in (v - center)^p."""
    return np.array(
        [[comb(p, q) * (-center) ** (p - q) if q <= p else 0.0 for q in range(terms)] for p in range(terms)]
    )
