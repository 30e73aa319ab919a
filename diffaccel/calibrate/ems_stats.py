"""Streaming statistics of DPM-Solver-v3: moments of points at each node, merged exactly, and l, s, b from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.quad import Ems
from ..errors import OptionError, one_of

Tensors = dict[str, np.ndarray]
REDUCE = ("element", "channel", "scalar")
# A point is (y, e, d): y = x/alpha, e = exp(-lam) eps, d = exp(-lam) d(eps)/d(lam) along the ODE. f and f' are linear
# in them (with l and dl/dlam, known only at the end), so their moments follow from those of the three.
PAIRS = ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2))
STIFF = 20.0  # |s| times a large step beyond which a dimension counts as an outlier
LARGE_STEP = 0.2  # of the range of lam: a step of a run of five calls
MOST_OUTLIERS = 0.01


def kept_axes(shape: Sequence[int], reduce: str) -> tuple[int, ...]:
    """Axes of a sample that keep their size: all, the channel's (first of an image or video, last of tokens), none."""
    one_of("reduce", reduce, REDUCE)
    if reduce == "element":
        return tuple(range(len(shape)))
    if reduce == "scalar":
        return ()
    return (0,) if len(shape) >= 3 else (len(shape) - 1,)


def reduced_shape(shape: Sequence[int], reduce: str) -> tuple[int, ...]:
    """Of the statistics of a sample of this shape: (C, H, W), (C, 1, 1) or ()."""
    kept = kept_axes(shape, reduce)
    return () if not kept else tuple(n if i in kept else 1 for i, n in enumerate(shape))


def moments_of(l: Any, points: Sequence[Any], reduce: str) -> Tensors:
    """Moments of the points of one batch at one node.

    Args:
        l: (B, *shape) float64 tensor, `sigma v (J v)` of each point.
        points: y, e, d, each (B, *shape) float64.
        reduce: what is pooled: the elements of a pooled axis count as further points.

    Returns:
        n (points pooled into one entry), l and l_m2 (*kept), mean (3, *kept), m2 (6, *kept): centred sums.
    """
    shape, kept = l.shape[1:], kept_axes(l.shape[1:], reduce)
    axes = (0, *(i + 1 for i in range(len(shape)) if i not in kept))
    n = math.prod(l.shape[i] for i in axes)
    target = reduced_shape(shape, reduce)

    def total(v: Any) -> np.ndarray:
        return v.sum(axes).cpu().numpy().reshape(target)

    def centred(v: Any) -> tuple[np.ndarray, Any]:
        mean = v.mean(axes, keepdim=True)
        return mean.cpu().numpy().reshape(target), v - mean

    l_mean, l_off = centred(l)
    pairs = [centred(p) for p in points]
    mean = np.stack([p[0] for p in pairs])
    m2 = np.stack([total(pairs[i][1] * pairs[j][1]) for i, j in PAIRS])
    return {"n": np.array(float(n)), "l": l_mean, "l_m2": total(l_off * l_off), "mean": mean, "m2": m2}


def stacked(nodes: Sequence[Tensors]) -> Tensors:
    """Moments of all nodes: each entry with the nodes first."""
    return {key: np.stack([np.asarray(node[key]) for node in nodes]) for key in nodes[0]}


def merged(a: Tensors, b: Tensors) -> Tensors:
    """Moments of the union of two disjoint sets of points (Chan, Golub, LeVeque 1979)."""

    def wide(n: np.ndarray, like: np.ndarray) -> np.ndarray:
        return n.reshape(n.shape + (1,) * (like.ndim - n.ndim))

    n = a["n"] + b["n"]
    share, both = b["n"] / n, a["n"] * b["n"] / n
    off, l_off = b["mean"] - a["mean"], b["l"] - a["l"]
    cross = np.stack([off[:, i] * off[:, j] for i, j in PAIRS], axis=1)
    return {
        "n": n,
        "l": a["l"] + wide(share, l_off) * l_off,
        "l_m2": a["l_m2"] + b["l_m2"] + wide(both, l_off) * l_off**2,
        "mean": a["mean"] + wide(share, off) * off,
        "m2": a["m2"] + b["m2"] + wide(both, cross) * cross,
    }


@dataclass(frozen=True)
class Fit:
    """l, s, b, and what was seen on the way.

    Args:
        ems: the statistics.
        outliers: share of (node, dimension) with `|s| h > 20` for a step of a fifth of the range.
        l_error: root mean square standard error of l.
    """

    ems: Ems
    outliers: float
    l_error: float


def fitted(
    lam: np.ndarray, found: Tensors, *, smooth_space: float = 0.0, smooth_lam: float = 0.0, ridge: float = 1e-12
) -> Fit:
    """l, s, b by least squares, for each dimension: `f' ~ s f + b` (arXiv:2310.13268, Eq. 7 and 10).

    Moments are smoothed, never quotients.

    Args:
        lam: (M + 1,) the nodes.
        found: moments, `stacked`.
        smooth_space: standard deviation, in pixels, of a Gaussian over the last two axes.
        smooth_lam: the same over nodes.
        ridge: added to var f, relative to the variance of exp(-lam) eps; a dimension without variance gets s = 0.

    Raises:
        OptionError: nothing to smooth, or more than 1 % outliers.
    """
    n = found["n"].reshape(-1, *[1] * (found["l"].ndim - 1))
    smooth = _smoother(found["l"].shape, smooth_space, smooth_lam)
    l = smooth(found["l"])
    slope = np.gradient(l, lam, axis=0, edge_order=2 if len(lam) > 2 else 1)
    yy, ye, yd, ee, ed, _ = (found["m2"][:, k] / n for k in range(len(PAIRS)))
    y, e, d = (found["mean"][:, k] for k in range(3))
    var = smooth(ee - 2 * l * ye + l**2 * yy)
    cov = smooth((l - 1) * ee + ed - slope * ye - l * ((l - 1) * ye + yd - slope * yy))
    mean, mean_slope = smooth(e - l * y), smooth((l - 1) * e + d - slope * y)
    floor = ridge * ee
    s = np.where(var + floor > 0, cov / np.where(var + floor > 0, var + floor, 1.0), 0.0)
    outliers = float(np.mean(np.abs(s) * LARGE_STEP * (lam[-1] - lam[0]) > STIFF))
    if outliers > MOST_OUTLIERS:
        raise OptionError(
            f"{100 * outliers:.1f} % of the statistics s are too large to step with (|s| h > {STIFF:g}): too few "
            "images for this many dimensions; take more images, smooth_space, or reduce='channel'"
        )
    error = float(np.sqrt(np.mean(found["l_m2"] / n / np.maximum(n - 1, 1))))
    return Fit(Ems(lam, l, s, mean_slope - s * mean), outliers, error)


def _smoother(shape: Sequence[int], space: float, nodes: float) -> Any:
    if space < 0 or nodes < 0:
        raise OptionError(f"smooth_space and smooth_lam must be 0 or more, got {space} and {nodes}")
    if space and (len(shape) < 4 or max(shape[-2:]) == 1):
        raise OptionError(
            f"smooth_space={space:g} smooths over the pixels of images; statistics of shape {tuple(shape[1:])} "
            "have none"
        )
    sigma = [nodes, *[0.0] * (len(shape) - 1)]
    if space:
        sigma[-2:] = [space, space]

    def smooth(v: np.ndarray) -> np.ndarray:
        if not any(sigma):
            return v
        from scipy.ndimage import gaussian_filter

        out: np.ndarray = gaussian_filter(v, sigma, mode="nearest")
        return out

    return smooth
