"""Successive halving on paired inputs: many candidates see few images, few candidates see all of them.

The sequential form of Jamieson and Talwalkar (arXiv:1502.07943), with images as the resource: every candidate that is
left at a rung is run on the same further images, and what it did on earlier ones is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..calibrate.validate import finite
from ..errors import OptionError

# errors of a candidate on images first..stop - 1, (stop - first,); not finite where a run failed
Measure = Callable[[int, int, int], np.ndarray]


@dataclass(frozen=True)
class Rung:
    """One comparison.

    Args:
        candidates: how many are compared.
        images: how many images each has seen by then.
    """

    candidates: int
    images: int


def rungs(candidates: int, images: int, *, eta: int = 3, cuts: int = 3, least: int = 2) -> list[Rung]:
    """The plan: after each rung but the last, the best of every `eta` go on to `eta` times as many images.

    Args:
        candidates: C.
        images: S, which the last rung has seen.
        cuts: rungs before the last.
        least: images of the first rung, at least (one image says little), and candidates of the last.

    Returns:
        at least one rung; the last has seen all images.
    """
    if candidates < 1 or images < 1:
        raise OptionError(f"a search needs a candidate and an image or more, got {candidates} and {images}")
    found: list[Rung] = []
    for k in range(cuts + 1):
        seen = images if k == cuts else min(images, max(least, math.ceil(images / eta ** (cuts - k))))
        if found and seen <= found[-1].images:
            continue
        left = max(min(least, candidates), math.ceil(candidates / eta ** len(found)))
        found.append(Rung(left, seen))
    return found


def evaluations(plan: Sequence[Rung]) -> int:
    """Runs of a candidate on an image that a plan makes."""
    before = [0, *(r.images for r in plan)]
    return sum(r.candidates * (r.images - b) for r, b in zip(plan, before, strict=False))


def score(errors: np.ndarray) -> float:
    """Geometric mean over images, (n,) -> number: a few images that end elsewhere do not decide it.

    A run that failed or diverged counts as 1e30.
    """
    return float(np.exp(np.log(np.clip(finite(errors), 1e-30, 1e30)).mean()))


@dataclass(frozen=True)
class Search:
    """What a search found.

    Args:
        plan: its rungs.
        ranked: candidates that saw all images, best first.
        errors: candidate -> its errors on the images that it has seen.
        eliminated: candidate -> the rung (from 0) after which it was dropped.
    """

    plan: tuple[Rung, ...]
    ranked: tuple[int, ...]
    errors: dict[int, np.ndarray]
    eliminated: dict[int, int]

    @property
    def winner(self) -> int:
        """The best candidate."""
        return self.ranked[0]


def halve(candidates: int, images: int, measure: Measure, plan: Sequence[Rung] | None = None) -> Search:
    """Run the plan.

    Args:
        candidates: C; they are numbered from 0, and of equal ones the first wins.
        images: S.
        measure: runs a candidate on further images.
        plan: None: `rungs(candidates, images)`.
    """
    plan = rungs(candidates, images) if plan is None else list(plan)
    left, seen = list(range(candidates)), 0
    errors: dict[int, np.ndarray] = {c: np.zeros(0) for c in left}
    eliminated: dict[int, int] = {}
    for k, rung in enumerate(plan):
        for c in left:
            errors[c] = np.concatenate([errors[c], measure(c, seen, rung.images)])
        seen = rung.images
        left.sort(key=lambda c: (score(errors[c]), c))
        keep = plan[k + 1].candidates if k + 1 < len(plan) else len(left)
        eliminated |= dict.fromkeys(left[keep:], k)
        left = left[:keep]
    return Search(tuple(plan), tuple(left), errors, eliminated)
