"""The families of paths: variance preserving, EDM (variance exploding), flow matching; and named beta schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import OptionError, PathError, one_of
from .node import Node
from .path import Path


@dataclass(frozen=True)
class VP(Path):
    """Variance preserving with T training steps, t in [0, T - 1]; between them lam is linear in t.

    Args:
        betas: T values in (0, 1).
        zero_snr: rescale so that alpha = 0 at the last step (arXiv:2305.08891, Algorithm 1).
        snr_shift: CogVideoX's `snr_shift_scale` k: `acp <- acp / (k + (1 - k) acp)`.
        interpolation: "lam" or "sigma" (sigma/alpha linear in t, as in diffusers' Euler family).

    Raises:
        PathError: if a beta is outside (0, 1), or there are fewer than 2.
    """

    betas: tuple[float, ...]
    zero_snr: bool = False
    snr_shift: float | None = None
    interpolation: str = "lam"
    family: ClassVar[str] = "vp"

    def __post_init__(self) -> None:
        one_of("interpolation", self.interpolation, ("lam", "sigma"))
        betas = np.asarray(self.betas, dtype=np.float64)
        if len(betas) < 2 or not np.all((betas > 0) & (betas < 1)):
            bad = [float(b) for b in betas[~((betas > 0) & (betas < 1))][:3]]
            raise PathError(f"a VP path needs 2 or more betas in (0, 1); got {len(betas)}, out of range: {bad}")
        log_acp = np.cumsum(np.log1p(-betas))
        acp, rest = np.exp(log_acp), -np.expm1(log_acp)
        if self.snr_shift is not None:
            bottom = self.snr_shift + (1 - self.snr_shift) * acp
            acp, rest = acp / bottom, self.snr_shift * rest / bottom
        if self.zero_snr:
            root = np.sqrt(acp)
            root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
            acp = root**2
            rest = 1.0 - acp
        with np.errstate(divide="ignore"):
            lam = 0.5 * (np.log(acp) - np.log(rest))
        for name, value in (("_alpha", np.sqrt(acp)), ("_sigma", np.sqrt(rest)), ("_lam", lam), ("_acp", acp)):
            object.__setattr__(self, name, value)
        for name, value in (("_first", self.at(len(betas) - 1)), ("_last", self.at(0))):
            object.__setattr__(self, name, value)

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """(T,) float64, squared alphas of the training steps."""
        return self._acp  # type: ignore[attr-defined]

    @property
    def first(self) -> Node:
        return self._first  # type: ignore[attr-defined]

    @property
    def last(self) -> Node:
        return self._last  # type: ignore[attr-defined]

    def at(self, t: float) -> Node:
        alpha, sigma, lam = self._alpha, self._sigma, self._lam  # type: ignore[attr-defined]
        top = len(alpha) - 1
        if not -1e-6 <= t <= top + 1e-6:
            raise PathError(f"t = {t} lies outside the training steps 0..{top} of this VP path")
        i = min(max(int(math.floor(t)), 0), top - 1)
        f = min(max(t - i, 0.0), 1.0)
        if f in (0.0, 1.0):
            return Node(float(t), float(alpha[i + int(f)]), float(sigma[i + int(f)]))
        if lam[i + 1] == -math.inf:  # the last cell of a zero-SNR path: lam has no value there, alpha has
            a = (1 - f) * float(alpha[i])
            return Node(float(t), a, math.sqrt((1 - a) * (1 + a)))
        if self.interpolation == "lam":
            return Node(float(t), *_vp((1 - f) * lam[i] + f * lam[i + 1]))
        level = (1 - f) * sigma[i] / alpha[i] + f * sigma[i + 1] / alpha[i + 1]
        return Node(float(t), *_vp(-math.log(level)))

    def at_lam(self, lam: float) -> Node:
        table = self._lam  # type: ignore[attr-defined]
        alpha, sigma = _vp(lam)
        if lam >= table[0]:
            return Node(0.0, alpha, sigma)
        if table[-1] == -math.inf and lam < table[-2]:
            return Node(len(table) - 1 - alpha / float(self._alpha[-2]), alpha, sigma)  # type: ignore[attr-defined]
        if lam <= table[-1]:
            return Node(float(len(table) - 1), alpha, sigma)
        i = int(np.searchsorted(-table, -lam, side="right")) - 1
        f = (lam - table[i]) / (table[i + 1] - table[i])
        return Node(i + float(f), alpha, sigma)


def _vp(lam: float) -> tuple[float, float]:
    """alpha and sigma of a VP node, without cancellation at either end."""
    if lam >= 0:
        e = math.exp(-2 * lam)
        alpha = 1 / math.sqrt(1 + e)
        return alpha, alpha * math.exp(-lam)
    e = math.exp(2 * lam)
    sigma = 1 / math.sqrt(1 + e)
    return sigma * math.exp(lam), sigma


@dataclass(frozen=True)
class VPContinuous(Path):
    """Variance preserving with a continuous time; build it with `Path.vp_linear` or `Path.cosine`."""

    schedule: str
    p: float
    q: float
    t_min: float
    t_max: float
    family: ClassVar[str] = "vp"

    def __post_init__(self) -> None:
        one_of("schedule", self.schedule, ("linear", "cosine"))
        if not 0 < self.t_min < self.t_max <= 1:
            raise PathError(f"a continuous VP path needs 0 < t_min < t_max <= 1, got {self.t_min}, {self.t_max}")

    @property
    def first(self) -> Node:
        return self.at(self.t_max)

    @property
    def last(self) -> Node:
        return self.at(self.t_min)

    def _log_alpha(self, t: float) -> float:
        if self.schedule == "linear":
            return -(self.q - self.p) * t * t / 4 - self.p * t / 2
        start = math.log(math.cos(self.p / (1 + self.p) * math.pi / 2))
        return math.log(math.cos((t + self.p) / (1 + self.p) * math.pi / 2)) - start

    def at(self, t: float) -> Node:
        if not 0 < t <= self.t_max + 1e-9:
            raise PathError(f"t = {t} lies outside (0, {self.t_max}] of this continuous VP path")
        log_alpha = self._log_alpha(t)
        return Node(float(t), math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha)))

    def at_lam(self, lam: float) -> Node:
        alpha, sigma = _vp(lam)
        log_alpha = -0.5 * math.log1p(math.exp(-2 * lam)) if lam > -20 else lam - 0.5 * math.log1p(math.exp(2 * lam))
        if self.schedule == "linear":
            c = -4 * (self.q - self.p) * log_alpha
            t = -4 * log_alpha / (math.sqrt(self.p**2 + c) + self.p)
        else:
            start = math.log(math.cos(self.p / (1 + self.p) * math.pi / 2))
            t = math.acos(min(1.0, math.exp(log_alpha + start))) * 2 * (1 + self.p) / math.pi - self.p
        return Node(min(max(t, 0.0), self.t_max), alpha, sigma)


@dataclass(frozen=True)
class EDM(Path):
    """Variance exploding: alpha = 1 at every node.

    Args:
        sigma_min, sigma_max: training range.
        sigma_data: standard deviation of the data, for the preconditioning.
        time: what the model is fed: "log" `ln(sigma)/4` (EDM, Stable Video Diffusion), "atan" `2 atan(sigma)/pi`
            (Stable Audio), "sigma" sigma itself.
    """

    sigma_min: float
    sigma_max: float
    sigma_data: float = 0.5
    time: str = "log"
    family: ClassVar[str] = "edm"

    def __post_init__(self) -> None:
        one_of("time", self.time, ("log", "atan", "sigma"))
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise PathError(f"an EDM path needs 0 < sigma_min < sigma_max, got {self.sigma_min}, {self.sigma_max}")

    @property
    def first(self) -> Node:
        return Node(self._t(self.sigma_max), 1.0, self.sigma_max)

    @property
    def last(self) -> Node:
        return Node(self._t(self.sigma_min), 1.0, self.sigma_min)

    def _t(self, sigma: float) -> float:
        if self.time == "log":
            return math.log(sigma) / 4
        return 2 * math.atan(sigma) / math.pi if self.time == "atan" else sigma

    def at(self, t: float) -> Node:
        if self.time == "log":
            sigma = math.exp(4 * t)
        else:
            sigma = math.tan(t * math.pi / 2) if self.time == "atan" else t
        if not 0 < sigma < math.inf:
            raise PathError(f"t = {t} gives sigma = {sigma}, which no EDM node has")
        return Node(float(t), 1.0, float(sigma))

    def at_lam(self, lam: float) -> Node:
        sigma = math.exp(-lam)
        return Node(self._t(sigma), 1.0, sigma)


@dataclass(frozen=True)
class Flow(Path):
    """Flow matching (rectified flow): alpha = 1 - sigma, the model is fed `train_steps * sigma`.

    The shift places the nodes of time-uniform grids (`warp`); a node itself does not depend on it.

    Args:
        shift: static shift k: `sigma = k u / (1 + (k - 1) u)`.
        train_steps: scale of t.
        mu: resolution-dependent shift; where given it takes the place of `shift`.
        shift_type: "exponential" `e^mu / (e^mu + 1/u - 1)` or "linear" `mu / (mu + 1/u - 1)`.
        terminal: `shift_terminal`: where the last node of a time-uniform grid is stretched to.
    """

    shift: float = 1.0
    train_steps: int = 1000
    mu: float | None = None
    shift_type: str = "exponential"
    terminal: float | None = None
    family: ClassVar[str] = "flow"

    def __post_init__(self) -> None:
        one_of("time_shift_type", self.shift_type, ("exponential", "linear"))
        if not (0 < self.shift < math.inf):
            raise PathError(f"a flow path needs a positive shift, got {self.shift}")
        if self.terminal is not None and not 0 < self.terminal < 1:
            raise PathError(f"shift_terminal must lie in (0, 1), got {self.terminal}")
        if self.train_steps < 2:
            raise OptionError(f"num_train_timesteps must be 2 or more, got {self.train_steps}")

    @property
    def factor(self) -> float:
        """The k of `k u / (1 + (k - 1) u)`: all three shifts are of this form."""
        if self.mu is None:
            return self.shift
        factor = math.exp(self.mu) if self.shift_type == "exponential" else self.mu
        if factor <= 0:
            raise PathError(f"a linear shift needs mu > 0, got {self.mu}")
        return factor

    def warp(self, u: float) -> float:
        k, v = self.factor, u / self.train_steps
        return self.train_steps * k * v / (1 + (k - 1) * v)

    def unwarp(self, t: float) -> float:
        """The inverse of `warp`."""
        k, v = self.factor, t / self.train_steps
        return self.train_steps * v / (k - (k - 1) * v)

    @property
    def first(self) -> Node:
        return Node(float(self.train_steps), 0.0, 1.0)

    @property
    def last(self) -> Node:
        return self.at(self.warp(1.0))

    @property
    def end(self) -> Node:
        return Node(0.0, 1.0, 0.0)

    def at(self, t: float) -> Node:
        sigma = t / self.train_steps
        if not 0 <= sigma <= 1 + 1e-9:
            raise PathError(f"t = {t} lies outside 0..{self.train_steps} of this flow path")
        return Node(float(t), max(0.0, 1.0 - sigma), min(1.0, sigma))

    def at_lam(self, lam: float) -> Node:
        alpha, sigma = 1 / (1 + math.exp(-lam)), 1 / (1 + math.exp(lam))
        return Node(self.train_steps * sigma, alpha, sigma)


def betas(schedule: str, start: float, end: float, steps: int) -> np.ndarray:
    """The betas of a named schedule, (steps,) float64, as diffusers defines them.

    Args:
        schedule: "linear", "scaled_linear" (linear in sqrt(beta)), "squaredcos_cap_v2" (2102.09672), "sigmoid"
            (GeoDiff), "laplace", "exp"; `start` and `end` are used by the first two and by "sigmoid".
    """
    names = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp")
    one_of("beta_schedule", schedule, names)
    if schedule == "linear":
        return np.linspace(start, end, steps)
    if schedule == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, steps) ** 2
    if schedule == "sigmoid":
        return 1 / (1 + np.exp(-np.linspace(-6, 6, steps))) * (end - start) + start

    def bar(t: float) -> float:
        if schedule == "squaredcos_cap_v2":
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        if schedule == "exp":
            return math.exp(-12.0 * t)
        lam = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
        snr = math.exp(lam)
        return math.sqrt(snr / (1 + snr))

    return np.array([min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999) for i in range(steps)])
