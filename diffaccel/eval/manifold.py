"""Precision and recall of generated images (Kynkaanniemi et al., arXiv:1904.06991)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..errors import OptionError
from .fid_score import label
from .score import Score, interval
from .stats_file import pair, remarks


def _radii(x: torch.Tensor, k: int, block: int) -> torch.Tensor:
    """Distance of each sample to its k-th neighbour among the others (the sample itself is the first of k + 1)."""
    return torch.cat([torch.cdist(part, x).kthvalue(k + 1, dim=1).values for part in x.split(block)])


def coverage(points: torch.Tensor, of: torch.Tensor, k: int = 3, block: int = 1000) -> torch.Tensor:
    """bool (N,): which points lie in a ball around a sample of `of` that reaches to its k-th neighbour."""
    radii = _radii(of, k, block)
    return torch.cat([(torch.cdist(part, of) <= radii).any(1) for part in points.split(block)])


def precision_recall(
    a: Any, b: Any, *, features: Any = None, weights: Any = None, k: int = 3, **reading: Any
) -> tuple[Score, Score]:
    """(precision, recall): the part of images `a` that lies in the manifold of the reference `b`, and the reverse.

    Sources and options as in `fid`; features of both sides are needed. k: neighbours that span a ball. The intervals
    are binomial, with the manifolds taken as given. Both depend on the number of images: compare at equal numbers.
    """
    left, right = pair(a, b, features, weights, reading, kernel=True)
    x, y = left.sample.double(), right.sample.double()
    if min(len(x), len(y)) <= k:
        raise OptionError(f"k = {k} neighbours need more than {k} images on both sides, got {len(x)} and {len(y)}")
    notes, warnings = remarks(left, right)
    if len(x) != len(y):
        notes = (*notes, "both depend on the numbers of images, which are unequal: compare only with the same numbers")
    base = Score(
        0.0,
        0.0,
        0.0,
        0.0,
        len(x),
        len(y),
        str(left.features),
        f"{k} neighbours; binomial interval",
        "",
        notes=notes,
        warnings=warnings,
    )

    def score(name: str, inside: torch.Tensor) -> Score:
        p = float(inside.double().mean())
        low, high = interval(p, (p * (1 - p) / len(inside)) ** 0.5)
        return replace(base, value=p, raw=p, low=low, high=high, label=label(name, base.features))

    return score("precision", coverage(x, y, k)), score("recall", coverage(y, x, k))
