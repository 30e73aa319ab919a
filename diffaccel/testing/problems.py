"""Analytic problems: data laws whose exact denoiser, and so whose exact sampling ODE, is known. numpy, float64.

States have any leading shape and the data's dimension last; nodes may lie on any path, ends included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.node import Node
from ..core.prediction import Prediction, Space, convert


class Problem:
    """A data law. Subclasses define `denoise` (and `noise`, if it must be known at sigma = 0)."""

    def denoise(self, x: np.ndarray, node: Node) -> np.ndarray:
        """`E[x0 | x]` for states x (..., d) at a node."""
        raise NotImplementedError

    def noise(self, x: np.ndarray, node: Node) -> np.ndarray:
        """`E[eps | x]`, (..., d)."""
        return (x - node.alpha * self.denoise(x, node)) / node.sigma

    def predict(self, x: np.ndarray, node: Node, space: Space = "x0") -> np.ndarray:
        """The exact prediction in any space: what `Table.apply` asks for."""
        if space == "eps":
            return self.noise(x, node)
        out: np.ndarray = convert(Prediction(self.denoise(x, node)), space, x, node)
        return out

    def flow(self, x: np.ndarray, s: Node, t: Node, tol: float = 1e-13) -> np.ndarray:
        """The exact state at t of the probability-flow ODE that passes through x (..., d) at s, in either direction.

        In the angle `theta = atan2(sigma, alpha)` and the state `u = x/hypot(alpha, sigma)` the ODE is
        `du/dtheta = cos(theta) eps - sin(theta) x0`, smooth from pure noise to pure data.
        """

        def slope(theta: float, u: np.ndarray) -> np.ndarray:
            node = Node(0.0, max(math.cos(theta), 0.0), max(math.sin(theta), 0.0))
            return node.alpha * self.noise(u, node) - node.sigma * self.denoise(u, node)

        start, stop = math.atan2(s.sigma, s.alpha), math.atan2(t.sigma, t.alpha)
        u = solve(slope, np.asarray(x, dtype=np.float64) / math.hypot(s.alpha, s.sigma), start, stop, tol)
        return u * math.hypot(t.alpha, t.sigma)


@dataclass(frozen=True, eq=False)
class Gaussian(Problem):
    """Data `N(mean, diag(std^2))`; `mean` (d,), `std` (d,) or a number. `std = 0` is one point.

    The denoiser is linear in x, and the ODE's flow map has a closed form.
    """

    mean: np.ndarray
    std: np.ndarray | float = 1.0

    def _variance(self, node: Node) -> Any:
        return (node.alpha * np.asarray(self.std)) ** 2 + node.sigma**2

    def denoise(self, x: np.ndarray, node: Node) -> np.ndarray:
        gain = node.alpha * np.asarray(self.std) ** 2 / self._variance(node)
        out: np.ndarray = self.mean + gain * (x - node.alpha * self.mean)
        return out

    def noise(self, x: np.ndarray, node: Node) -> np.ndarray:
        out: np.ndarray = node.sigma * (x - node.alpha * self.mean) / self._variance(node)
        return out

    def flow(self, x: np.ndarray, s: Node, t: Node, tol: float = 0.0) -> np.ndarray:
        ratio = np.sqrt(self._variance(t) / self._variance(s))
        out: np.ndarray = t.alpha * self.mean + ratio * (x - s.alpha * self.mean)
        return out


def point_mass(point: Any) -> Gaussian:
    """Data that is always `point` (d,): every consistent sampler is exact on it."""
    return Gaussian(np.asarray(point, dtype=np.float64), 0.0)


@dataclass(frozen=True, eq=False)
class Mixture(Problem):
    """A mixture of K Gaussians with diagonal covariances.

    Args:
        weights: (K,), positive; they are normalised.
        means: (K, d).
        stds: (K,) or (K, d), positive.
    """

    weights: np.ndarray
    means: np.ndarray
    stds: np.ndarray

    def _posterior(self, x: np.ndarray, node: Node) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Responsibilities (..., K, 1), distances `x - alpha m_k` (..., K, d), variances (K, d or 1)."""
        stds = np.asarray(self.stds, dtype=np.float64)
        stds = stds[:, None] if stds.ndim == 1 else stds
        variance = (node.alpha * stds) ** 2 + node.sigma**2
        away = x[..., None, :] - node.alpha * self.means
        log = np.log(self.weights) - 0.5 * (away**2 / variance + np.log(variance)).sum(-1)
        part = np.exp(log - log.max(-1, keepdims=True))
        return (part / part.sum(-1, keepdims=True))[..., None], away, variance

    def denoise(self, x: np.ndarray, node: Node) -> np.ndarray:
        share, away, variance = self._posterior(x, node)
        stds = np.asarray(self.stds, dtype=np.float64)
        gain = node.alpha * (stds[:, None] if stds.ndim == 1 else stds) ** 2 / variance
        out: np.ndarray = (share * (self.means + gain * away)).sum(-2)
        return out

    def noise(self, x: np.ndarray, node: Node) -> np.ndarray:
        share, away, variance = self._posterior(x, node)
        out: np.ndarray = node.sigma * (share * away / variance).sum(-2)
        return out

    def draw(self, rng: np.random.Generator, n: int, node: Node | None = None) -> np.ndarray:
        """(n, d) samples of the data, or of its marginal at a node."""
        means = np.asarray(self.means, dtype=np.float64)
        stds = np.broadcast_to(np.asarray(self.stds).reshape(len(means), -1), means.shape)
        which = rng.choice(len(means), n, p=self.weights / np.sum(self.weights))
        x0 = means[which] + stds[which] * rng.standard_normal((n, means.shape[1]))
        return x0 if node is None else node.alpha * x0 + node.sigma * rng.standard_normal(x0.shape)


@dataclass(frozen=True, eq=False)
class Windowed(Problem):
    """`inner` in the middle of a run, one point at both ends: `D = c + w (D_inner - c)`, w a smooth bump.

    Every sampler is exact on one point, so a method's start (rows without history) and its lower-order end cost
    nothing here, on any grid: what is left is the order of its full rows.

    Args:
        inner: the problem in the middle.
        point: (d,), the point at the ends.
        start, stop: where the run begins and ends, in the coordinate.
        coordinate: "lam" or "level" (sigma/alpha).
        edge: fraction of the run at each end where w is exactly 0.
    """

    inner: Problem
    point: np.ndarray
    start: float
    stop: float
    coordinate: str = "lam"
    edge: float = 0.15

    def weight(self, node: Node) -> float:
        """w at a node: 0 at both ends, 1 in the middle, 6 times continuously differentiable."""
        u = (getattr(node, self.coordinate) - self.start) / (self.stop - self.start)
        return smooth_step((min(u, 1 - u) - self.edge) / (0.5 - self.edge))

    def denoise(self, x: np.ndarray, node: Node) -> np.ndarray:
        w = self.weight(node)
        if w == 0:
            return np.broadcast_to(self.point, x.shape) + 0.0 * x
        return self.point + w * (self.inner.denoise(x, node) - self.point)


def smooth_step(u: float, m: int = 6) -> float:
    """0 below 0, 1 above 1, between them the polynomial of degree 2m + 1 that is flat to order m at both ends."""
    if u <= 0 or u >= 1:
        return float(u > 0)
    total = sum(math.comb(m + k, k) * math.comb(2 * m + 1, m - k) * (-u) ** k for k in range(m + 1))
    return total * u ** (m + 1)


def four_modes() -> Mixture:
    """The standard problem of the checks: four modes of unequal weight and width in the plane."""
    means = np.array([[1.1, 0.3], [-0.8, 0.9], [-0.4, -1.0], [0.7, -0.9]])
    return Mixture(np.array([0.4, 0.3, 0.2, 0.1]), means, np.array([[0.5, 0.4], [0.4, 0.6], [0.5, 0.5], [0.6, 0.4]]))


# ---------------------------------------------------------------------- an integrator for references
STAGES = (2, 4, 6, 8, 10, 12, 14)


def solve(slope: Any, y: np.ndarray, start: float, stop: float, tol: float = 1e-13) -> np.ndarray:
    """`y(stop)` of `dy/dt = slope(t, y)`: extrapolated midpoint steps (Gragg, Bulirsch, Stoer), halved where needed.

    Args:
        tol: largest difference of the two best extrapolations, a step, relative to `max(1, |y|)`.
    """
    t, h, least = start, stop - start, abs(stop - start) * 1e-6
    while abs(stop - t) > 1e-15 * max(1.0, abs(stop)):
        h = math.copysign(min(abs(h), abs(stop - t)), stop - t)
        best, gap = _extrapolate(slope, y, t, h)
        if gap > tol * max(1.0, float(np.max(np.abs(best)))) and abs(h) > least:
            h /= 2
            continue
        t, y, h = t + h, best, 1.5 * h
    return y


def _extrapolate(slope: Any, y: np.ndarray, t: float, h: float) -> tuple[np.ndarray, float]:
    """One step of size h: the highest extrapolation, and its distance to the second highest."""
    rows: list[list[np.ndarray]] = []
    for j, n in enumerate(STAGES):
        row = [_midpoint(slope, y, t, h, n)]
        for k in range(j):
            ratio = (n / STAGES[j - 1 - k]) ** 2
            row.append(row[k] + (row[k] - rows[j - 1][k]) / (ratio - 1))
        rows.append(row)
    return rows[-1][-1], float(np.max(np.abs(rows[-1][-1] - rows[-1][-2]), initial=0.0))


def _midpoint(slope: Any, y: np.ndarray, t: float, h: float, n: int) -> np.ndarray:
    d = h / n
    old, new = y, y + d * slope(t, y)
    for i in range(1, n):
        old, new = new, old + 2 * d * slope(t + i * d, new)
    return new
