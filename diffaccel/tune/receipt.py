"""What a tuning says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..calibrate.fit_guard import paired
from ..calibrate.validate import finite
from ..pipelines.recipe import Choice
from .halving import Search, evaluations, score

SHOWN = 5  # of the candidates that saw all images
CONVERGED = 1 / 3  # of the winner's error, which the teacher's own must lie below


def _short(value: float) -> float:
    return float(f"{min(value, 1e30):.4g}")


def summary(name: str, errors: np.ndarray) -> dict[str, Any]:
    """Errors of one setting on the held-out images."""
    e = finite(errors)
    with np.errstate(over="ignore"):
        rmse = float(np.sqrt(np.mean(e**2)))
    numbers = {"geometric mean": score(e), "median": float(np.median(e)), "rmse": rmse, "worst": float(e.max())}
    return {"name": name} | {k: _short(v) for k, v in numbers.items()}


def against(winner: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """The winner against another setting, image by image: geometric mean of the ratios of errors, with its interval."""
    ratio = [round(v, 4) for v in paired(winner, other)]
    return {"tuned / it [95 %]": ratio, "images improved": round(float(np.mean(winner < other)), 4)}


def receipt_of(
    calls: int,
    choices: Sequence[Choice],
    found: Search,
    winner: Choice,
    errors: np.ndarray,
    present: np.ndarray | None,
    stock: Sequence[tuple[str, np.ndarray]],
    *,
    plain: str,
    rivals: int,
    left_out: Mapping[str, str],
    gap: float,
    teacher: int,
) -> dict[str, Any]:
    """The receipt; deterministic.

    Args:
        errors: of the winner on the held-out images, (H,); `present` and `stock` on the same.
        present: of the pipeline's present scheduler, or None.
        stock: the best of diffusers' settings by a search of their own; the best on these very images is shown.
        plain: class of the present scheduler.
        rivals: how many stock settings were searched.
        left_out: candidate -> why it has no errors.
        gap: the teacher's own error.
        teacher: its steps.
    """
    receipt: dict[str, Any] = {"verdict": "", "helps": False, "calls": calls, "held-out images": len(errors)}
    receipt["tuned"] = summary(winner.name, errors)
    beaten: dict[str, bool] = {}
    if present is not None:
        what = f"the pipeline's {plain}"
        receipt["plain run"] = summary(what, present) | against(errors, present)
        beaten[what] = _beats(receipt["plain run"])
    if stock:
        name, best = min(stock, key=lambda item: score(item[1]))
        receipt["best stock scheduler"] = summary(name, best) | against(errors, best) | {"tried": rivals}
        beaten[f"the best stock scheduler ({name})"] = _beats(receipt["best stock scheduler"])
    else:
        receipt["best stock scheduler"] = "not measured"
    receipt["helps"] = bool(beaten) and all(beaten.values()) and bool(np.isfinite(errors).all())
    receipt["verdict"] = _verdict(beaten, bool(np.isfinite(errors).all()))
    images = found.plan[-1].images
    spent, whole = evaluations(found.plan) * calls, len(choices) * images * calls
    receipt["search"] = {
        "candidates": len(choices),
        "rungs (candidates, images)": [[r.candidates, r.images] for r in found.plan],
        "model calls": spent,
        "exhaustive search": whole,
        "share": _short(spent / whole),
        "best": [[choices[c].name, _short(score(found.errors[c]))] for c in found.ranked[:SHOWN]],
    }
    receipt["teacher"] = {"steps": teacher, "own error (K against K/2 steps)": float(f"{gap:.3g}")}
    if gap > CONVERGED * score(errors):
        receipt["teacher"]["warning"] = "it is not converged beside such small errors; take more teacher_steps"
    if left_out:
        receipt["left out"] = dict(sorted(left_out.items()))
    return receipt


def _beats(entry: Mapping[str, Any]) -> bool:
    return bool(entry["tuned / it [95 %]"][2] < 1)


def _verdict(beaten: Mapping[str, bool], finite: bool) -> str:
    if not finite:
        return "no benefit found: some of its images are not finite"
    if not beaten:
        return "nothing to compare with was measured"
    if all(beaten.values()):
        return f"better than {' and '.join(beaten)}"
    lost = " or ".join(name for name, won in beaten.items() if not won)
    won = [name for name, wins in beaten.items() if wins]
    return f"no benefit found against {lost}" + (f"; better than {' and '.join(won)}" if won else "")
