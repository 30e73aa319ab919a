"""Runs that change resolution: sizes, levels, when to switch, and what a switch loses. numpy.

All in `y = x/alpha = x0 + rho*eps`, `rho = sigma/alpha`; `tau = rho/(1 + rho)` is the flow time of a level on any path.
D is the orthonormal two-dimensional DCT-II over the last two axes: white noise has unit variance in each of its
coefficients at every size, and an image resized without a change of its amplitude has its shared coefficients
multiplied by `r = sqrt(H'W'/(HW))`. So the state of another size has the shared block times r and the level
`rho' = r rho`, exactly: the signal is kept and the noise stays white. Every step in lam stays the same, as lam moves by
the constant -ln r.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import OptionError, one_of

Size = tuple[int, int]
RULES = ("missing", "speed")
FILLS = ("white", "memory", "matched", "memory_matched")


@dataclass(frozen=True)
class Stage:
    """A part of a run at one resolution.

    Args:
        scale: linear size relative to the requested one, in (0, 1]; the last stage must be 1.
        steps: model calls.
        t_end: flow time `rho/(1 + rho)` where the stage stops; None: the delta rule, or 0 for the last stage and for
            stages that are renoised.
        t_start: flow time where it begins; None: aligned with the end of the stage before. A later one adds noise.
        shift: spacing inside the stage, `t = s u/(1 + (s - 1) u)` for uniform u; None: as on the scheduler's own grid.

    Raises:
        OptionError: a value out of range.
    """

    scale: float
    steps: int
    t_end: float | None = None
    t_start: float | None = None
    shift: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.scale <= 1:
            raise OptionError(f"Stage.scale must lie in (0, 1], got {self.scale}")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise OptionError(f"Stage.steps is the number of model calls, 1 or more; got {self.steps!r}")
        for name in ("t_end", "t_start"):
            t = getattr(self, name)
            if t is not None and not 0 <= t <= 1:
                raise OptionError(f"Stage.{name} is a flow time rho/(1 + rho) in [0, 1], got {t}")
        if self.shift is not None and not 0 < self.shift < math.inf:
            raise OptionError(f"Stage.shift must be positive, got {self.shift}")

    def to_config(self) -> dict[str, Any]:
        """As a plain dict."""
        return asdict(self)


# ---------------------------------------------------------------------- levels
def flow_time(rho: float) -> float:
    """`tau = rho/(1 + rho)`; 1 at infinity."""
    return 1.0 if rho == math.inf else rho / (1 + rho)


def level(tau: float) -> float:
    """The inverse of `flow_time`."""
    return math.inf if tau >= 1 else tau / (1 - tau)


def ratio(low: Size, high: Size) -> float:
    """`r = sqrt(H'W'/(HW))` of the change of size from `low` to `high`, in either direction."""
    return math.sqrt(high[0] * high[1] / (low[0] * low[1]))


def shifted_times(start: float, end: float, n: int, shift: float) -> np.ndarray:
    """n + 1 flow times from `start` to `end`, uniform in u where `t = s u/(1 + (s - 1) u)`; the ends are exact."""
    u = np.linspace(start / (shift - (shift - 1) * start), end / (shift - (shift - 1) * end), n + 1)
    return _ends(shift * u / (1 + (shift - 1) * u), start, end)


def grid_times(grid: Sequence[float], start: float, end: float, n: int) -> np.ndarray:
    """n + 1 flow times from `start` to `end`, spaced as `grid` (falling flow times, linear between them) is there."""
    taus, at = np.asarray(grid, dtype=np.float64), np.linspace(0.0, 1.0, len(grid))
    u = np.interp([-start, -end], -taus, at)
    return _ends(np.interp(np.linspace(u[0], u[1], n + 1), at, taus), start, end)


def _ends(times: np.ndarray, start: float, end: float) -> np.ndarray:
    times[0], times[-1] = start, end
    return times


# ---------------------------------------------------------------------- sizes
def stage_size(full: Size, scale: float, divisor: int) -> Size:
    """The size of a stage: `full` at scale 1, else the nearest multiples of `divisor`, at least one of them.

    Raises:
        OptionError: if rounding changes the aspect by more than 5 %, with the sizes near by that work.
    """
    if scale == 1:
        return full
    found = _rounded(full, scale, divisor)
    if _skew(full, found) > 0.05:
        near = [(h, w) for h in _near(full[0], divisor) for w in _near(full[1], divisor)]
        fine = [s for s in near if _skew(s, _rounded(s, scale, divisor)) <= 0.05]
        fine.sort(key=lambda s: abs(s[0] - full[0]) + abs(s[1] - full[1]))
        raise OptionError(
            f"a latent of {full[0]}x{full[1]} at scale {scale} rounds to {found[0]}x{found[1]} (multiples of "
            f"{divisor}), another aspect by {_skew(full, found):.0%}. Latent sizes near by that work: "
            + (", ".join(f"{h}x{w}" for h, w in fine[:4]) or "none")
        )
    return found


def _rounded(full: Size, scale: float, divisor: int) -> Size:
    h, w = (max(1, round(n * scale / divisor)) * divisor for n in full)
    return h, w


def _near(n: int, divisor: int) -> list[int]:
    return [m for m in range(n - 2 * divisor, n + 2 * divisor + 1) if m >= divisor]


def _skew(full: Size, low: Size) -> float:
    return abs(math.log(low[0] / low[1] * full[1] / full[0]))


# ---------------------------------------------------------------------- the transform
@functools.lru_cache(maxsize=64)
def dct_matrix(n: int) -> np.ndarray:
    """The orthonormal DCT-II of n points, (n, n) float64: `C @ x`. Do not write into it."""
    k, j = np.arange(n)[:, None], np.arange(n)
    c = np.sqrt(2 / n) * np.cos(np.pi * (2 * j + 1) * k / (2 * n))
    c[0] /= math.sqrt(2)
    c.setflags(write=False)
    return c


# ---------------------------------------------------------------------- the spectrum
@dataclass(frozen=True)
class Spectrum:
    """Mean power of the latents' DCT coefficients, `P(w) = A w^-beta`, w in cycles per shorter side.

    Args:
        a, beta: of the fit, for latents of `height` x `width`.
        r2: of the fit in `ln P` on `ln w`; None where it is not known.
    """

    a: float
    beta: float
    height: int
    width: int
    r2: float | None = None

    def power(self, size: Size) -> np.ndarray:
        """P of each DCT coefficient of a latent of this size, (H, W) float64."""
        h, w = size
        return self.at(frequency(size), size) if h and w else np.zeros(size)

    def at(self, w: Any, size: Size) -> Any:
        """P at frequencies w for a latent of this size: power for each coefficient grows with the number of them."""
        return self.a * size[0] * size[1] / (self.height * self.width) * np.maximum(w, 0.5) ** -self.beta

    @classmethod
    def of(cls, given: Spectrum | str | dict[str, Any] | None) -> Spectrum | None:
        """From a name of `SPECTRA`, a dict of the arguments, or what is one already.

        Raises:
            OptionError: for an unknown name.
        """
        if isinstance(given, str):
            return SPECTRA[one_of("spectrum", given, SPECTRA)]
        return cls(**given) if isinstance(given, dict) else given


# Published constants of two autoencoders at 128x128 latents (howardhx/speed, configs.yaml).
SPECTRA = {
    "flux": Spectrum(203.615097, 1.915461, 128, 128),
    "wan2.1": Spectrum(219.484718, 2.422687, 128, 128),
}


def frequency(size: Size) -> np.ndarray:
    """Radial frequency of each DCT coefficient, in cycles per shorter side, (H, W)."""
    h, w = size
    i, j = np.arange(h)[:, None] * min(h, w) / h, np.arange(w) * min(h, w) / w
    out: np.ndarray = 0.5 * np.sqrt(i**2 + j**2)
    return out


# ---------------------------------------------------------------------- what a transition loses
def new_band(size: Size, low: Size) -> np.ndarray:
    """Which coefficients of a latent of `size` one of `low` does not have, (H, W) bool."""
    mask = np.ones(size, dtype=bool)
    mask[: low[0], : low[1]] = False
    return mask


def missing(power: np.ndarray, low: Size, rho: float) -> tuple[float, float]:
    """What is lost by filling the new band with white noise of level rho, for a Gaussian field and an exact solver.

    A mode of power P begins with variance rho^2 in place of P + rho^2, and ends with `P (1 - e)`, e = P/(P + rho^2).

    Args:
        power: of the field's DCT modes at the larger size, (H, W).
        low: the smaller size.
        rho: level after the transition.

    Returns:
        the missing fraction of the new band's power, and the squared Wasserstein distance for each element.
    """
    p = power[new_band(power.shape, low)]
    if not p.size:
        return 0.0, 0.0
    e = p / (p + rho * rho)
    return float((p * e).sum() / p.sum()), float((p * (1 - np.sqrt(1 - e)) ** 2).sum() / power.size)


def switch_time(spectrum: Spectrum, low: Size, high: Size, delta: float = 0.01, rule: str = "missing") -> float:
    """When to go up: flow time before the transition from `low` to `high`.

    Args:
        delta: "missing": the largest fraction of the new band's power that may be lost; the time is the latest with
            no more. "speed": delta of arXiv:2605.18736, Eq. 9-10, which compares the power at the low size's highest
            frequency with the noise.

    Raises:
        OptionError: delta out of range, or an unknown rule.
    """
    one_of("rule", rule, RULES)
    if not 0 < delta < 1:
        raise OptionError(f"delta must lie in (0, 1), got {delta}")
    if rule == "speed":
        p = float(spectrum.at(math.sqrt(low[0] * low[1] / (high[0] * high[1])) * min(high) / 2, high))
        if p * (1 + p - delta) <= delta * 1e-12:
            raise OptionError(f"rule='speed': the spectrum has no power at the low size's highest frequency (P = {p})")
        return 1 / (1 + math.sqrt(delta / (p * (1 + p - delta))))
    power, r = spectrum.power(high), ratio(low, high)
    small, large = math.log(1e-8), math.log(1e8)
    while large - small > 1e-14 * max(1.0, abs(small)):
        middle = 0.5 * (small + large)
        if middle in (small, large):
            break
        if missing(power, low, math.exp(middle))[0] > delta:
            small = middle
        else:
            large = middle
    return flow_time(math.exp(large) / r)


# ---------------------------------------------------------------------- cost and presets
def transformer_flops(blocks: int, width: int, tokens: int) -> float:
    """FLOPs of one call of a diffusion transformer, `blocks (24 d^2 L + 4 L^2 d)`, L image and text tokens."""
    return blocks * (24.0 * width * width * tokens + 4.0 * tokens * tokens * width)


def step_equivalents(calls: Sequence[int], costs: Sequence[float], full: float) -> float:
    """Work of a run in calls at full size: `sum n_k F_k/F_full`."""
    return float(sum(n * f for n, f in zip(calls, costs, strict=True)) / full)


def shares(calls: int, parts: Sequence[float]) -> list[int]:
    """`calls` in proportion to `parts`, by largest remainder, each at least 1.

    Raises:
        OptionError: if there are fewer calls than parts.
    """
    if calls < len(parts):
        raise OptionError(f"{len(parts)} stages need at least {len(parts)} calls, got {calls}")
    exact = np.asarray(parts) / sum(parts) * calls
    counts = np.maximum(1, np.floor(exact).astype(int))
    while counts.sum() < calls:
        counts[int(np.argmax(exact - counts))] += 1
    while counts.sum() > calls:
        counts[int(np.argmax(np.where(counts > 1, counts - exact, -np.inf)))] -= 1
    return [int(c) for c in counts]
