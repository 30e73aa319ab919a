"""FID with its bias removed and its interval, from images, statistics or features; the arithmetic is `frechet.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..errors import OptionError
from . import frechet
from .score import Score, interval
from .stats_file import GIVEN, Stats, pair, remarks

_POINTS = 15  # sizes of FID_infinity
_SAME = 1e-6  # of the trace: a FID of this size is that of the same images


def label(metric: str, features: str) -> str:
    """The metric's name, qualified where the features are not Inception's."""
    if features.startswith("inception-v3:"):
        return metric
    return f"{metric} ({features} features, not Inception)" if features != GIVEN else f"{metric} (given features)"


def fid(
    a: Any,
    b: Any,
    *,
    features: Any = None,
    weights: Any = None,
    paper: bool = False,
    extrapolate: bool = False,
    groups: int | None = None,
    **reading: Any,
) -> Score:
    """FID of images `a` against the reference `b`.

    a, b: what `open_images` reads, a file of statistics, `stats(...)`, "tiny-fashion" (the embedded reference), or
      features (N, d).
    features: a name (see `features.py`), `Features`, or a callable with an id; default: those of the statistics file,
      else inception-v3:clean. weights: file of Inception weights.
    paper: the plain value as the value, no correction. extrapolate: FID_infinity (arXiv:1911.07023), for comparison
      with papers that print it. groups: K of the jackknife.
    reading: alpha, unreadable, batch, device, workers, expected, progress.
    The interval is 95 %, by the influence function; with features on both sides it covers the sampling of both, with
    statistics as reference these count as exact. Never a bootstrap: it would add the whole bias once more. It is
    longer by what the correction may leave of the bias (see `frechet.correct`), which is much for few images. There is
    none (NaN, with a warning) where it does not hold: for fewer than two images a feature, and where the corrected
    value, which may be negative and is given as it is, is below zero beyond it.
    """
    if paper and extrapolate:
        raise OptionError("paper=True and extrapolate=True contradict each other: one is the plain value")
    left, right = pair(a, b, features, weights, reading)
    raw = frechet.distance(left.gaussian, right.gaussian)
    notes, warnings = (list(x) for x in remarks(left, right))
    if right.values is None:
        many = "an unknown number of" if right.n is None else str(right.n)
        notes.append(f"{right.name}: statistics of {many} images, taken as exact; the bias that it has itself stays")
    value, how, bias = raw, "plain", 0.0
    if extrapolate:
        value, how = _infinity(left, right), f"FID_infinity, {_POINTS} sizes"
        notes.append("the interval leaves out the noise of the extrapolation itself")
    elif not paper:
        value, how, bias = _corrected(left, right, groups, raw, warnings)
    low, high = interval(value, frechet.widened(_standard_error(left, right), bias))
    doubts = _few(left, right)
    if raw < _SAME * float(left.gaussian.trace):
        value, how = raw, "plain"
        doubts.append("both sides have the same statistics: do they hold the same images?")
    elif high < 0:
        doubts.append("the value is below zero beyond its interval: do the two sides share images?")
    if doubts:
        low = high = float("nan")
        warnings += doubts
    return Score(
        value,
        low,
        high,
        raw,
        left.n,
        right.n,
        str(left.features),
        f"{how}; {'no interval' if np.isnan(low) else 'interval by the influence function'}",
        label("FID", str(left.features)),
        notes=tuple(notes),
        warnings=tuple(warnings),
    )


def _corrected(a: Stats, b: Stats, groups: int | None, raw: float, warnings: list[str]) -> tuple[float, str, float]:
    """Jackknife over the side(s) with features: (value, how, what may be left of the bias)."""
    x, y = (a, b) if a.values is not None else (b, a)
    if x.values is None:
        warnings.append("both sides are statistics: no bias correction and no interval")
        return raw, "plain", 0.0
    few = len(x.values) if y.values is None else min(len(x.values), len(y.values))
    k = groups or frechet.groups_for(x.width, few)
    if few < 2 * k:
        warnings.append(f"{few} images are too few for a jackknife of {k} groups: the bias is not corrected")
        return raw, "plain", 0.0
    value, left = frechet.correct(x.values, y.gaussian if y.values is None else y.values, k)
    return value, f"jackknife, {k} groups", left


def _few(a: Stats, b: Stats) -> list[str]:
    """A warning for each side with too few images."""
    return [
        f"{side.name}: {text}: bias dominates this number, corrected or not, and no interval holds; give more images, "
        "or use KID, which has no bias"
        for side in (a, b)
        if (text := frechet.too_few(side.n, a.width))
    ]


def _standard_error(a: Stats, b: Stats) -> float:
    parts = [
        frechet.standard_error(frechet.influence(x.values, y.gaussian))
        for x, y in ((a, b), (b, a))
        if x.values is not None
    ]
    return float(np.hypot.reduce(parts)) if parts else float("nan")


def _infinity(a: Stats, b: Stats) -> float:
    """The intercept of a straight line through FID against 1/N, N from min(5000, N/4) to all (random subsets)."""
    if a.values is None:
        raise OptionError("extrapolate=True needs the images or features of the first side, not statistics")
    n = len(a.values)
    if n < 4 * _POINTS:
        raise OptionError(f"extrapolate=True needs at least {4 * _POINTS} images, got {n}")
    rng = np.random.default_rng(0)
    sizes = np.linspace(min(5000, n // 4), n, _POINTS).round().astype(int)
    values = [
        frechet.distance(frechet.from_features(a.values[torch.from_numpy(rng.permutation(n)[:k])]), b.gaussian)
        for k in sizes
    ]
    return float(np.polyfit(1 / sizes, values, 1)[1])


def fid_difference(
    a: Any, b: Any, reference: Any, *, features: Any = None, weights: Any = None, **reading: Any
) -> frechet.Difference:
    """FID(a) - FID(b) of images that share seeds and prompts, both corrected for bias, with its standard error and z.

    The paired influence values see what two intervals cannot: most of the sampling noise is common and cancels. For too
    few images no interval holds (see `fid`): the plain difference, NaN for the others, and why in `warnings`.
    """
    left, right = pair(a, reference, features, weights, reading)
    other, _ = pair(b, right, features, weights, reading)
    if left.values is None or other.values is None:
        raise OptionError("a paired difference needs the images or features of both sides, not statistics")
    try:
        return frechet.paired(left.values, other.values, right.gaussian)
    except ValueError as error:
        raise OptionError(str(error)) from None
