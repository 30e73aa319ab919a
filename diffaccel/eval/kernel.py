"""KID and CMMD: squared maximum mean discrepancies, unbiased by default, with standard errors. float64, in blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import OptionError, one_of
from .fid_score import label
from .score import Score, interval
from .stats_file import pair, remarks

Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
CMMD_FEATURES = "clip:openai/clip-vit-large-patch14-336"


def polynomial(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """KID's kernel (arXiv:1801.01401): (x.y / d + 1)^3."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """CMMD's kernel (arXiv:2401.09603), exp(-|x - y|^2 / (2 10^2)), minus 1: constants cancel in an MMD, and the small
    rest keeps its digits."""
    squared = x.pow(2).sum(1)[:, None] + y.pow(2).sum(1) - 2 * x @ y.T
    return torch.expm1(-squared.clamp(min=0) / 200)


@dataclass(frozen=True)
class Discrepancy:
    """MMD^2 without (`unbiased`) and with (`biased`) the diagonal, and the standard error of the former."""

    unbiased: float
    biased: float
    se: float


def _sums(x: torch.Tensor, y: torch.Tensor, kernel: Kernel, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of k(x_i, y_j) over j (n,) and over i (m,)."""
    rows, columns = x.new_zeros(len(x)), x.new_zeros(len(y))
    for i in range(0, len(x), block):
        for j in range(0, len(y), block):
            k = kernel(x[i : i + block], y[j : j + block])
            rows[i : i + block] += k.sum(1)
            columns[j : j + block] += k.sum(0)
    return rows, columns


def mmd(x: Any, y: Any, kernel: Kernel = polynomial, block: int = 1000) -> Discrepancy:
    """Squared MMD between features (n, d) and (m, d), over all pairs.

    unbiased: sum_{i != j} k(x_i, x_j) / (n (n - 1)) + the same for y - 2 mean k(x_i, y_j).
    se^2 = 4 var(h) / n + 4 var(g) / m, with h_i = mean_{j != i} k(x_i, x_j) - mean_j k(x_i, y_j), g likewise.
    """
    x, y = (torch.as_tensor(z).to("cpu", torch.float64) for z in (x, y))
    n, m = len(x), len(y)
    if x.shape[1:] != y.shape[1:]:
        raise OptionError(f"an MMD needs two feature sets of one width, got {tuple(x.shape)} and {tuple(y.shape)}")
    if min(n, m) < 2:
        raise OptionError(f"KID and CMMD need at least 2 images on each side, got {n} and {m}")
    if not bool(torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise OptionError("an MMD needs finite features; these contain NaN or infinity: is the feature network whole?")
    xx, yy = _sums(x, x, kernel, block)[0], _sums(y, y, kernel, block)[0]
    xy, yx = _sums(x, y, kernel, block)
    own_x, own_y = (torch.cat([kernel(part, part).diagonal() for part in z.split(100)]) for z in (x, y))
    h = (xx - own_x) / (n - 1) - xy / m
    g = (yy - own_y) / (m - 1) - yx / n
    return Discrepancy(
        float(h.mean() + g.mean()),
        float(xx.sum() / n**2 + yy.sum() / m**2 - 2 * xy.sum() / (n * m)),
        float((4 * h.var() / n + 4 * g.var() / m).sqrt()),
    )


def subset_values(x: Any, y: Any, subsets: int, size: int, seed: int = 2020) -> np.ndarray:
    """KID of random subsets with torch-fidelity's draws: RandomState(seed), first set then second, per subset."""
    if min(len(x), len(y)) < size:
        raise OptionError(f"subsets of {size} need as many images on both sides, got {len(x)} and {len(y)}")
    rng = np.random.RandomState(seed)
    draws = [[rng.choice(len(z), size, replace=False) for z in (x, y)] for _ in range(subsets)]
    return np.array([mmd(x[i], y[j]).unbiased for i, j in draws])


def kid(
    a: Any,
    b: Any,
    *,
    features: Any = None,
    weights: Any = None,
    subsets: int | None = None,
    subset_size: int = 1000,
    seed: int = 2020,
    **reading: Any,
) -> Score:
    """KID (arXiv:1801.01401) of `a` against `b`, sources and options as in `fid`; printed times 1000.

    Unbiased, over all pairs, with its standard error; negative values are normal near zero. subsets: instead the mean
    over so many random subsets of subset_size, as torch-fidelity prints it; the interval is still that of all pairs,
    since the spread over subsets is no standard error of anything.
    """
    for what, least, given in (("subsets", 1, subsets), ("subset_size", 2, subset_size)):
        if given is not None and given < least:
            raise OptionError(f"{what} is {least} or more, got {given}")
    left, right = pair(a, b, features, weights, reading, kernel=True)
    all_pairs = mmd(left.sample, right.sample)
    value, how, details = all_pairs.unbiased, "unbiased, all pairs", {}
    if subsets is not None:
        values = subset_values(left.sample, right.sample, subsets, subset_size, seed)
        value, how = float(values.mean()), f"mean of {subsets} subsets of {subset_size}, seed {seed}"
        details = {"spread over subsets x1000": float(1000 * values.std())}
    return _score(left, right, value, value, all_pairs.se, how, label("KID x1000", str(left.features)), 1000.0, details)


def cmmd(
    a: Any,
    b: Any,
    *,
    features: Any = CMMD_FEATURES,
    weights: Any = None,
    estimator: str = "unbiased",
    **reading: Any,
) -> Score:
    """CMMD (arXiv:2401.09603): 1000 MMD^2 of unit-norm CLIP embeddings under a wide Gaussian kernel.

    estimator: "unbiased", or "biased": with the diagonal, as in the published code. The kernel is almost linear on the
    unit sphere, so CMMD is close to 10 |mean x - mean y|^2 and sees little but the mean embedding.
    """
    one_of("estimator", estimator, ("unbiased", "biased"))
    left, right = pair(a, b, features, weights, reading, kernel=True)
    x, y = (torch.nn.functional.normalize(s.sample.double(), dim=1) for s in (left, right))
    got = mmd(x, y, gaussian)
    value = 1000 * (got.unbiased if estimator == "unbiased" else got.biased)
    how = f"{estimator}, all pairs"
    return _score(left, right, value, 1000 * got.biased, 1000 * got.se, how, f"CMMD ({estimator})", 1.0, {})


def _score(
    left: Any, right: Any, value: float, raw: float, se: float, how: str, name: str, scale: float, details: dict
) -> Score:
    low, high = interval(value, se)
    notes, warnings = remarks(left, right)
    return Score(
        value,
        low,
        high,
        raw,
        len(left.sample),
        len(right.sample),
        str(left.features),
        f"{how}; interval by the standard error of all pairs",
        name,
        scale,
        notes,
        warnings,
        details,
    )
