"""Measured convergence orders of a sampler's table, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ..core.node import Node
from ..core.path import Nodes, Path
from ..core.table import Table
from ..samplers.registry import Sampler
from .problems import Gaussian, Problem, Windowed, four_modes

COUNTS = (80, 160, 320, 640)  # intervals of the runs; the slope is read at the finest pair above rounding
FLOOR = 1e-11  # errors below it are rounding
SPAN = 2.0  # runs go from lam = -SPAN to lam = SPAN
POINT = (0.3, -0.2)  # the data at both ends of the windowed problem


@dataclass(frozen=True)
class Slope:
    """A measured order: the errors at `counts` intervals, and their slope where it is most reliable."""

    value: float
    counts: tuple[int, ...]
    errors: tuple[float, ...]

    def __str__(self) -> str:
        pairs = ", ".join(f"{n}: {e:.1e}" for n, e in zip(self.counts, self.errors, strict=True))
        return f"slope {self.value:.2f} (error at N intervals: {pairs})"


def uniform(path: Path, n: int, coordinate: str = "lam", span: float = SPAN) -> Nodes:
    """n + 1 nodes from lam = -span to lam = span, uniform in lam or in sigma/alpha ("level")."""
    if coordinate == "lam":
        return Nodes([path.at_lam(float(v)) for v in np.linspace(-span, span, n + 1)], path)
    levels = np.linspace(math.exp(span), math.exp(-span), n + 1)
    return Nodes([path.at_level(float(v)) for v in levels], path)


def ode_slope(
    sampler: Sampler, options: Mapping[str, Any], *, window: bool = True, counts: Sequence[int] = COUNTS
) -> Slope:
    """Order against the exact flow of a mixture of four Gaussians, for deterministic options.

    Args:
        window: measure the full rows alone (see `Windowed`); else the start and the end of the run count as well,
            and methods that begin with a first-order row show order 2 at most.
    """
    problem, x, exact = _reference(sampler.smooth, window)
    errors = []
    for n in counts:
        table = sampler.trace(uniform(Path.edm(), n, sampler.smooth), **options)
        errors.append(rms(table.apply(x, problem.predict) - exact))
    return _slope(counts, errors)


@cache
def _reference(coordinate: str, window: bool) -> tuple[Problem, np.ndarray, np.ndarray]:
    """The problem of `ode_slope`, the first states of its particles and the exact last ones, (24, 2)."""
    start, stop = uniform(Path.edm(), 1)
    problem: Problem = four_modes()
    if window:
        ends = (getattr(start, coordinate), getattr(stop, coordinate))
        problem = Windowed(problem, np.array(POINT), *ends, coordinate)
    x = np.random.default_rng(0).standard_normal((24, 2)) * math.hypot(start.alpha, start.sigma)
    return problem, x, problem.flow(x, start, stop)


def weak_slope(sampler: Sampler, options: Mapping[str, Any]) -> Slope:
    """Order of the final mean and standard deviation for Gaussian data, with the noise averaged exactly."""
    data, last = Gaussian(np.array([0.8]), 0.6), uniform(Path.edm(), 1)[-1]
    errors = []
    for n in COUNTS:
        mean, variance = moments(sampler.trace(uniform(Path.edm(), n, sampler.smooth), **options), data)
        deviation = math.hypot(last.alpha * 0.6, last.sigma)
        errors.append(math.hypot(mean - last.alpha * 0.8, math.sqrt(variance) - deviation))
    return _slope(COUNTS, errors)


def moments(table: Table, data: Gaussian) -> tuple[float, float]:
    """Mean and variance of the last state, exactly, when the first one has the law of one-dimensional `data`.

    A denoiser of Gaussian data is affine, so every state is `u + v x_T + sum_k w_k z_k`; the table is run on the
    coefficients (u, v, w_1, w_2, ...).
    """
    draws = sum(row.draws for row in table.rows)
    basis = np.eye(2 + draws)
    mean, first = float(data.mean[0]), table.rows[0].node
    fresh = iter(basis[2:])

    def predict(x: np.ndarray, node: Node, space: Any) -> np.ndarray:
        # Affine maps act on the coefficients: shifted by the mean, the denoiser is linear.
        centre = Gaussian(np.zeros(1), data.std)
        moved = x - node.alpha * mean * basis[0]
        clean = mean * basis[0] + centre.denoise(moved[:, None], node)[:, 0]
        return _Given(clean).predict(x, node, space)

    last = table.apply(basis[1], predict, lambda _: next(fresh))
    variance = (first.alpha * float(np.asarray(data.std))) ** 2 + first.sigma**2
    return float(last[0] + last[1] * first.alpha * mean), float(last[1] ** 2 * variance + (last[2:] ** 2).sum())


class _Given(Problem):
    """Predictions whose x0 is given."""

    def __init__(self, clean: np.ndarray) -> None:
        self.clean = clean

    def denoise(self, x: np.ndarray, node: Node) -> np.ndarray:
        return self.clean


def rms(x: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(x**2)))


def _slope(counts: Sequence[int], errors: Sequence[float]) -> Slope:
    """The slope at the finest pair of counts whose errors are above rounding; inf if all are rounding."""
    value = math.inf
    for i in range(1, len(counts)):
        if errors[i] > FLOOR:
            value = math.log(errors[i - 1] / errors[i]) / math.log(counts[i] / counts[i - 1])
    return Slope(value, tuple(counts), tuple(errors))
