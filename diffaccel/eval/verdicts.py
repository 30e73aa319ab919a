"""What a report says in words: only what a paired interval shows.

A row is compared with the best stock row at the same number of calls, image by image (same seed, same prompt). It reads
as a benefit if the 95 % interval of the difference excludes zero on the good side, and still does so after Holm's
correction over all rows that are judged by that metric. Everything else reads "no benefit found".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from . import frechet
from .cells import CANDIDATE, HALF, STOCK, Plan
from .pairs import mean_interval
from .rows import Row
from .score import interval
from .stats_file import Stats

LEVEL = 0.05
NOTHING = "no benefit found"
ALIKE = 1e-3  # relative difference of features, or of errors to the teacher, that rounding explains
# metric -> (series, +1 where more is better, name)
METRICS = {
    "fid": ("features", -1, "FID"),
    "latent": ("latent", -1, "latent error"),
    "psnr": ("psnr", 1, "PSNR to the teacher"),
    "ssim": ("ssim", 1, "SSIM to the teacher"),
    "lpips": ("lpips", -1, "LPIPS to the teacher"),
    "clip": ("clip", 1, "CLIP score"),
}


@dataclass(frozen=True)
class Comparison:
    """How much better a is than b (positive: better), over n common images, with its 95 % interval and z (NaN where
    none holds; why: the reason)."""

    value: float
    low: float
    high: float
    z: float
    n: int
    why: str = ""

    @property
    def p(self) -> float:
        """Two-sided, normal."""
        return math.erfc(abs(self.z) / math.sqrt(2))

    def to_dict(self) -> dict[str, Any]:
        kept = {"better_by": self.value, "low": self.low, "high": self.high, "z": self.z, "n": self.n}
        return {k: v if math.isfinite(v) else None for k, v in kept.items()}


def compare(a: Row, b: Row, metric: str, reference: Stats | None) -> Comparison | None:
    """None where the two have no metric, or fewer than 2 images, in common."""
    series, sign, _ = METRICS[metric]
    if series not in a.series or series not in b.series:
        return None
    both = np.intersect1d(a.series[series].index, b.series[series].index)
    if len(both) < 2:
        return None
    x, y = a.series[series].at(both), b.series[series].at(both)
    if metric == "fid":
        if reference is None:
            return None
        d = frechet.paired(torch.from_numpy(y), torch.from_numpy(x), reference.gaussian)
        return Comparison(d.value, *interval(d.value, d.se), d.z, len(both), "; ".join(d.warnings))
    with np.errstate(invalid="ignore"):  # images equal to the teacher's on both sides: inf - inf
        difference = sign * (x - y)
    kept = difference[np.isfinite(difference)]
    if len(kept) < 2:
        return None
    mean, se = float(kept.mean()), float(kept.std(ddof=1) / len(kept) ** 0.5)
    z = mean / se if se > 0 else 0.0 if mean == 0 else math.copysign(math.inf, mean)
    return Comparison(mean, *mean_interval(kept), z, len(kept))


def value(row: Row, metric: str) -> float | None:
    """The number of a row by which stock rows are ranked."""
    if metric == "fid":
        return (row.summary.get("fid") or {}).get("value")
    if metric == "clip":
        return (row.summary.get("clip") or {}).get("value")
    found = row.summary["errors"].get(metric)
    return found if isinstance(found, float) else None


def best(rows: Sequence[Row], metric: str) -> Row | None:
    """The best of these rows by its own number (which favours it: it is picked on these very images)."""
    sign = METRICS[metric][1]
    known = [(v, row) for row in rows if (v := value(row, metric)) is not None]
    return max(known, key=lambda pair: sign * pair[0])[1] if known else None


def same_images(a: Row, b: Row) -> bool:
    """Whether two rows show the same images up to rounding: by features, else by errors to the teacher."""
    for series in ("features", "latent", "psnr"):
        if series in a.series and series in b.series:
            both = np.intersect1d(a.series[series].index, b.series[series].index)
            x, y = a.series[series].at(both), b.series[series].at(both)
            finite = np.isfinite(x) & np.isfinite(y)
            x, y = np.where(finite, x, 0), np.where(finite, y, 0)
            scale = np.linalg.norm(x - x.mean(0)) if series == "features" else np.linalg.norm(x)
            return bool(np.linalg.norm(x - y) <= ALIKE * scale)
    return False


def verdicts(rows: Sequence[Row], plan: Plan, reference: Stats | None) -> list[dict[str, Any]]:
    """One for each metric, budget and candidate: {"metric", "calls", "name", "rival", "benefit", "text", ...}."""
    found = []
    for metric in METRICS:
        judged = [
            _judge(row, rows, metric, reference)
            for calls in plan.calls
            for row in rows
            if row.cell.role == CANDIDATE and row.cell.calls == calls and not row.cell.extra
        ]
        found += [v for v in _holm(judged) if v is not None]
    return found


def _judge(row: Row, rows: Sequence[Row], metric: str, reference: Stats | None) -> dict[str, Any] | None:
    """A verdict before Holm's correction; None where the metric was not measured."""
    cell, (series, _, title) = row.cell, METRICS[metric]
    found: dict[str, Any] = {"metric": metric, "calls": cell.calls, "name": cell.name, "rival": None, "benefit": False}
    head = f"{cell.calls} calls, {title}, {cell.name}:"
    if row.calls is not None and row.calls > cell.calls:
        return {**found, "text": f"{head} not compared: it made {row.calls} calls"}
    if series not in row.series:
        why = row.why.get(metric)
        return {**found, "text": f"{head} not compared: {why}"} if why and "stochastic" in why else None
    rival = best([r for r in rows if _admitted(r, cell.calls)], metric)
    difference = None if rival is None else compare(row, rival, metric, reference)
    if rival is None or difference is None:
        return {**found, "text": f"{head} not compared: no stock row at these calls has it"}
    found |= {"rival": rival.cell.name, **difference.to_dict()}
    alike = same_images(row, rival)
    if difference.why and not alike:
        return {**found, "text": f"{head} not compared: {difference.why}"}
    found |= {"p": difference.p, "equal_calls": _equal_calls(row, rows, metric)}
    unit = " dB" if metric == "psnr" else ""
    low, high = number(difference.low), number(difference.high)
    if alike:
        found |= {"p": 1.0, "text": f"{head} {NOTHING}: the same images as {rival.cell.name}"}
    elif metric in ("latent", "psnr", "ssim", "lpips") and _converged(row, rows) and _converged(rival, rows):
        found |= {"p": 1.0, "text": f"{head} {NOTHING}: it and {rival.cell.name} are at the teacher's own error"}
    elif difference.low > 0:
        found["benefit"] = True
        found["text"] = f"{head} {number(difference.value)}{unit} better than {rival.cell.name} [{low}, {high}]"
    elif difference.high < 0:
        worse = f"{number(-difference.value)}{unit} worse than {rival.cell.name}"
        found["text"] = f"{head} {NOTHING} ({worse} [{number(-difference.high)}, {number(-difference.low)}])"
    else:
        gap = f"{number(difference.value)}{unit} [{low}, {high}]"
        found["text"] = f"{head} {NOTHING} (against {rival.cell.name} {gap}, which can be chance)"
    return found


def _admitted(row: Row, calls: int) -> bool:
    """Whether a stock row is a fair rival at this budget."""
    return row.cell.role == STOCK and row.cell.calls == calls and (row.calls or calls + 1) <= calls


def _holm(judged: list[dict[str, Any] | None]) -> list[dict[str, Any] | None]:
    """Take back benefits that many comparisons explain (Holm 1979)."""
    tested = sorted((v for v in judged if v is not None and "p" in v), key=lambda v: v["p"])
    worst = 0.0
    for i, verdict in enumerate(tested):
        worst = max(worst, min(1.0, verdict["p"] * (len(tested) - i)))
        verdict["p_holm"] = worst
        if verdict["benefit"] and worst >= LEVEL:
            verdict["benefit"] = False
            head, _, rest = verdict["text"].partition(f"{verdict['name']}: ")
            why = f"over {len(tested)} comparisons the difference can be chance: {rest}"
            verdict["text"] = f"{head}{verdict['name']}: {NOTHING} ({why})"
    return judged


def _converged(row: Row, rows: Sequence[Row]) -> bool:
    """Whether a row is as near to the teacher as the teacher with half its calls is."""
    half = next((r for r in rows if r.cell.role == HALF), None)
    own, limit = (None if r is None else r.summary["errors"].get("psnr") for r in (row, half))
    return isinstance(own, float) and isinstance(limit, float) and own >= limit


def _equal_calls(row: Row, rows: Sequence[Row], metric: str) -> float | None:
    """At how many calls the best stock scheduler reaches the same number, on a line through ln(calls); None outside."""
    sign, target = METRICS[metric][1], value(row, metric)
    stock = [r for r in rows if r.cell.role == STOCK and r.calls]
    curve = []
    for calls in sorted({r.calls for r in stock if r.calls}):
        top = best([r for r in stock if r.calls == calls], metric)
        if top is not None:
            curve.append((math.log(calls), sign * float(value(top, metric) or 0.0)))
    if target is None:
        return None
    for (x0, y0), (x1, y1) in pairwise(curve):
        if min(y0, y1) <= sign * target <= max(y0, y1) and y0 != y1:
            return round(math.exp(x0 + (x1 - x0) * (sign * target - y0) / (y1 - y0)), 1)
    return None


def pairs_of_budgets(rows: Sequence[Row], plan: Plan, reference: Stats | None) -> dict[str, list[dict[str, Any]]]:
    """What calls are worth: each row against the same scheduler with the next fewer calls ("fewer"), and the largest
    budget against the smallest ("separation")."""
    fewer, separation = [], []
    for name in dict.fromkeys(r.cell.name for r in rows if r.cell.role in (STOCK, CANDIDATE)):
        own = sorted((r for r in rows if r.cell.name == name and r.calls), key=lambda r: r.cell.calls)
        fewer += [_worth(b, a, reference) for a, b in pairwise(own)]
        asked = [r for r in own if not r.cell.extra]
        if len(asked) > 1:
            separation.append(_worth(asked[-1], asked[0], reference))
    return {"fewer": fewer, "separation": separation}


def _worth(more: Row, less: Row, reference: Stats | None) -> dict[str, Any]:
    found: dict[str, Any] = {"name": more.cell.name, "calls": more.cell.calls, "against": less.cell.calls}
    for metric in ("fid", "psnr", "clip"):
        difference = compare(more, less, metric, reference)
        found[metric] = None if difference is None else difference.to_dict()
    return found


def summaries(found: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """One sentence for each candidate at each budget: {"text", "head", "good", "rest"}, the first of the others."""
    lines = []
    for calls, name in dict.fromkeys((v["calls"], v["name"]) for v in found):
        own = [v for v in found if (v["calls"], v["name"]) == (calls, name)]
        head = f"{calls} calls, {name}:"
        good = [v["text"].partition(f"{name}: ")[2] + f" in {METRICS[v['metric']][2]}" for v in own if v["benefit"]]
        rest = "; ".join(
            f"{said} in {', '.join(names)}"
            for said, tested in ((NOTHING, True), ("not compared", False))
            if (names := [METRICS[v["metric"]][2] for v in own if not v["benefit"] and ("p" in v) == tested])
        )
        text = f"{head} {'; '.join(filter(None, [*good, rest]))}."
        lines.append({"text": text, "head": head, "good": "; ".join(good), "rest": rest})
    return lines


def number(x: float | None) -> str:
    """Two decimals, or three significant digits of small numbers."""
    if x is None:
        return ""
    return f"{x:.2f}" if abs(x) >= 1 or x == 0 else f"{x:.3g}"
