"""Positions on a path in which a policy counts: training steps, or half log-SNR."""

from __future__ import annotations

import math

import numpy as np

from ..core.families import VP
from ..core.node import Node
from ..core.path import Path


class Steps:
    """Levels of the training steps of a discrete VP path; a position is a training step."""

    def __init__(self, path: VP) -> None:
        bar = np.asarray(path.alphas_cumprod)
        self.alpha, self.sigma = np.sqrt(bar), np.sqrt(1 - bar)
        self.path = path

    def position(self, node: Node) -> float:
        return node.t

    def window(self, center: float, half: float) -> np.ndarray:
        """The candidates: training steps within `half` of the target."""
        lo, hi = max(0, int(math.ceil(center - half))), min(len(self.alpha) - 1, int(math.floor(center + half)))
        return np.arange(lo, hi + 1)

    def levels(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.alpha[at], self.sigma[at]


class Levels:
    """Half log-SNR as the position, on any path; candidates are a fine grid of it."""

    COUNT = 129

    def __init__(self, path: Path) -> None:
        self.path = path

    def position(self, node: Node) -> float:
        return -node.lam

    def window(self, center: float, half: float) -> np.ndarray:
        least, most = -self.path.last.lam, -self.path.first.lam
        return np.linspace(max(least, center - half), min(most, center + half), self.COUNT if half > 0 else 1)

    def levels(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        nodes = [self.path.at_lam(-float(v)) for v in at]
        return np.array([n.alpha for n in nodes]), np.array([n.sigma for n in nodes])
