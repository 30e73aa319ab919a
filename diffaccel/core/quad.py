"""Empirical model statistics (EMS) of DPM-Solver-v3, and the weighted exponential integrals of its steps."""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import OptionError, one_of
from .linear import Coef, as_coef

QUADRATURES = ("exponential", "trapezoid")
TERMS = 4  # powers of (u - lam_s) that are integrated: interpolation of up to four predictions
OVERHANG = 0.02  # of the range of lam: how far outside of it the statistics may be asked for
SMOOTH = 0.16  # largest change of L and S over a cell; Gauss's four points are then exact to 1e-13
KEPT = 256  # steps whose integrals are remembered, for the next set_timesteps

_X, _W = np.polynomial.legendre.leggauss(4)
THETA, WEIGHT = (_X + 1) / 2, _W / 2  # on [0, 1]
# PARTIAL[i, j]: weight of the value at THETA[j] in the integral from 0 to THETA[i]
PARTIAL = np.linalg.solve(
    np.vander(THETA, increasing=True).T, (THETA[:, None] ** np.arange(1, 5) / np.arange(1, 5)).T
).T


@dataclass(frozen=True, slots=True)
class Step:
    """Integrals from lam_s to lam_t, all relative to s, so that no large exponent ever stands alone.

    With `a(u) = (L + S)(u) - (L + S)(s)` and `beta(u) = e^{S_s} (B_u - B_s)`:

    Args:
        dl, ds: `L_t - L_s` and `S_t - S_s`.
        beta: `beta(t)`.
        moments: `E_k = int e^a (u - lam_s)^k / k! du`, k = 0..3.
        drift: `J = int e^a beta du`.
    """

    dl: Coef
    ds: Coef
    beta: Coef
    moments: tuple[Coef, ...]
    drift: Coef


class Ems:
    """The statistics l, s, b of a model along half log-SNR (arXiv:2310.13268, Eq. 5-10); immutable, compared by value.

    Between its nodes l, s and b are linear in lam; beyond its ends, within 2 % of the range, they are constant.

    Args:
        lam: (M + 1,), rising (from noise to data).
        l, s, b: (M + 1, *shape); shape is that of one sample, or broadcasts to it: (C, 1, 1) or ().
        quadrature: "exponential" integrates what lies between the nodes exactly (to 1e-14); "trapezoid" is the
            published code's rule, with an error of `(Dlam)^2/12`.

    Raises:
        OptionError: for shapes that do not belong together, a lam that does not rise, or values that are not finite.
    """

    def __init__(self, lam: Any, l: Any, s: Any, b: Any, quadrature: str = "exponential") -> None:
        self.lam = np.asarray(lam, dtype=np.float64)
        self.l, self.s, self.b = (np.asarray(v, dtype=np.float64) for v in (l, s, b))
        self.quadrature = one_of("quadrature", quadrature, QUADRATURES)
        shapes = [self.lam.shape[:1], *(v.shape[:1] for v in (self.l, self.s, self.b))]
        if (
            self.lam.ndim != 1
            or len(self.lam) < 2
            or len(set(shapes)) > 1
            or not (self.l.shape == self.s.shape == self.b.shape)
        ):
            raise OptionError(
                "statistics need lam (M + 1,) and l, s, b of one shape (M + 1, ...), got "
                + ", ".join(f"{k} {v.shape}" for k, v in self.tensors().items())
            )
        if not np.all(np.diff(self.lam) > 0):
            raise OptionError("statistics: lam must rise from node to node (from noise to data)")
        if not all(np.all(np.isfinite(v)) for v in self.tensors().values()):
            raise OptionError("statistics: lam, l, s and b must be finite")
        self._steps: OrderedDict[tuple[float, float], Step] = OrderedDict()
        self._sizes: dict[tuple[int, ...], Ems] = {}
        self._lock = threading.Lock()

    @classmethod
    def data_prediction(cls, quadrature: str = "exponential") -> Ems:
        """`l = 1, s = b = 0` at every level: DPM-Solver-v3 without statistics is a data-prediction solver."""
        one = np.ones(2)
        return cls(np.array([-1e3, 1e3]), one, 0 * one, 0 * one, quadrature)

    # ------------------------------------------------------------------ a value
    def tensors(self) -> dict[str, np.ndarray]:
        """lam, l, s and b by name."""
        return {"lam": self.lam, "l": self.l, "s": self.s, "b": self.b}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of l, s and b at one node."""
        return self.l.shape[1:]

    @property
    def digest(self) -> str:
        """SHA-256 of the numbers and the quadrature."""
        h = hashlib.sha256(self.quadrature.encode())
        for name, value in self.tensors().items():
            h.update(f"{name}{value.shape}".encode() + np.ascontiguousarray(value, dtype="<f8").tobytes())
        return h.hexdigest()

    def __repr__(self) -> str:
        """Stands for the numbers where options are displayed or written as JSON."""
        shape = "x".join(map(str, self.shape)) or "scalar"
        lams = f"lam {self.lam[0]:.3g}..{self.lam[-1]:.3g}"
        return f"<Ems: {len(self.lam)} nodes, {lams}, {shape}, sha256 {self.digest[:12]}>"

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Ems) and self.digest == other.digest)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> Any:
        return (Ems, (self.lam, self.l, self.s, self.b, self.quadrature))

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Ems:
        return self

    def integrated(self, quadrature: str) -> Ems:
        """The same statistics under another rule."""
        return self if quadrature == self.quadrature else Ems(self.lam, self.l, self.s, self.b, quadrature)

    def resized(self, shape: tuple[int, ...]) -> Ems:
        """The same statistics for samples of another height and width: bilinear between the centres of pixels.

        Remembered; the statistics themselves where they broadcast to such samples.

        Args:
            shape: of one sample, (..., H, W).

        Raises:
            OptionError: statistics without pixels, or of another number of channels or frames.
        """
        if len(self.shape) <= len(shape) and all(
            a in (1, b) for a, b in zip(self.shape[::-1], shape[::-1], strict=False)
        ):
            return self
        if len(self.shape) < 3 or len(shape) != len(self.shape) or shape[:-2] != self.shape[:-2]:
            raise OptionError(
                f"resample='bilinear' interpolates over height and width: statistics of shape {self.shape} cannot "
                f"serve samples of shape {shape}; calibrate with reduce='channel'"
            )
        with self._lock:
            if shape not in self._sizes:
                rows, columns = (_bilinear(n, m) for n, m in zip(self.shape[-2:], shape[-2:], strict=True))
                l, s, b = (rows @ v @ columns.T for v in (self.l, self.s, self.b))
                self._sizes[shape] = Ems(self.lam, l, s, b, self.quadrature)
            return self._sizes[shape]

    # ------------------------------------------------------------------ values
    def need(self, *lams: float) -> None:
        """Raise unless each lam is within the range, or at most 2 % of it outside.

        Raises:
            OptionError: with both ranges.
        """
        low, high = float(self.lam[0]), float(self.lam[-1])
        room, asked = OVERHANG * (high - low) + 1e-9, (min(lams), max(lams))
        if asked[0] < low - room or asked[1] > high + room:
            raise OptionError(
                f"the statistics cover lam in [{low:.4g}, {high:.4g}], the grid has [{asked[0]:.4g}, {asked[1]:.4g}]; "
                "choose a grid inside of it, or calibrate again with lam_range=(low, high)"
            )

    def at(self, lam: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """l, s, b at one lam (shape) or several ((n,) gives (n, *shape))."""
        u = np.asarray(lam, dtype=np.float64)
        i = np.clip(np.searchsorted(self.lam, u, side="right") - 1, 0, len(self.lam) - 2)
        theta = np.clip((u - self.lam[i]) / (self.lam[i + 1] - self.lam[i]), 0.0, 1.0)
        theta = np.reshape(theta, (*u.shape, *[1] * len(self.shape)))
        found = [v[i] + theta * (v[i + 1] - v[i]) for v in (self.l, self.s, self.b)]
        return found[0], found[1], found[2]

    def nearest(self, lam: float) -> float:
        """The lam of the nearest node."""
        return float(self.lam[int(np.argmin(np.abs(self.lam - lam)))])

    # ------------------------------------------------------------------ integrals
    def step(self, start: float, stop: float) -> Step:
        """The integrals from lam = start to lam = stop > start; remembered.

        Raises:
            OptionError: outside the range, see `need`.
        """
        with self._lock:
            found = self._steps.pop((start, stop), None)
        if found is None:
            self.need(start, stop)
            found = self._integrate(start, stop)
        with self._lock:
            self._steps[start, stop] = found
            if len(self._steps) > KEPT:
                self._steps.popitem(last=False)
        return found

    def _edges(self, start: float, stop: float) -> np.ndarray:
        """Ends of the cells: all nodes in between, and more where the integrand changes much from one to the next."""
        edges = np.array([start, *self.lam[(self.lam > start) & (self.lam < stop)], stop])
        if self.quadrature == "trapezoid":
            return edges
        l, s, _ = self.at(edges)
        speed = (np.abs(l) + np.abs(s)).reshape(len(edges), -1).max(1)
        parts = np.ceil(np.maximum(speed[1:], speed[:-1]) * np.diff(edges) / SMOOTH).astype(int)
        cut = [np.linspace(u, v, max(n, 1), endpoint=False) for u, v, n in zip(edges, edges[1:], parts, strict=False)]
        return np.array([*np.concatenate(cut), stop])

    def _integrate(self, start: float, stop: float) -> Step:
        u = self._edges(start, stop)
        l, s, b = self.at(u)
        h = np.diff(u).reshape(-1, *[1] * len(self.shape))
        big_l, big_s = _cumulative(h * (l[:-1] + l[1:]) / 2), _cumulative(h * (s[:-1] + s[1:]) / 2)
        rule = _trapezoid if self.quadrature == "trapezoid" else _gauss
        beta, moments, drift = rule(u - start, h, (l, s, b), big_l, big_s)
        dl, ds = as_coef(big_l[-1]), as_coef(big_s[-1])
        return Step(dl, ds, as_coef(beta), tuple(as_coef(v) for v in moments), as_coef(drift))


def _bilinear(n: int, m: int) -> np.ndarray:
    """(m, n) weights from n to m pixels of the same extent; beyond the outermost centres values are constant."""
    at = np.clip((np.arange(m) + 0.5) * n / m - 0.5, 0, n - 1)
    weights: np.ndarray = np.maximum(0.0, 1 - np.abs(at[:, None] - np.arange(n)))
    return weights


Parts = tuple[np.ndarray, list[np.ndarray], np.ndarray]  # beta at the end, the moments, the drift


def _cumulative(parts: np.ndarray) -> np.ndarray:
    """Sums up to each edge, beginning with 0."""
    return np.concatenate([np.zeros_like(parts[:1]), np.cumsum(parts, axis=0)])


def _power(u: np.ndarray, k: int, like: np.ndarray) -> np.ndarray:
    return (u**k / math.factorial(k)).reshape(-1, *[1] * (like.ndim - 1))


def _trapezoid(u: np.ndarray, h: np.ndarray, lsb: Any, big_l: np.ndarray, big_s: np.ndarray) -> Parts:
    """Every integral by the trapezoidal rule on the edges u (relative to the start), as in the published code."""

    def mean(v: np.ndarray) -> np.ndarray:
        return h * (v[:-1] + v[1:]) / 2

    beta = _cumulative(mean(np.exp(-big_s) * lsb[2]))
    weight = np.exp(big_l + big_s)
    moments = [mean(weight * _power(u, k, weight)).sum(0) for k in range(TERMS)]
    return beta[-1], moments, mean(weight * beta).sum(0)


def _gauss(u: np.ndarray, h: np.ndarray, lsb: Any, big_l: np.ndarray, big_s: np.ndarray) -> Parts:
    """Four Gauss points a cell; L and S are exact there (quadratic in the cell), beta is integrated by collocation."""

    def inside(v: np.ndarray, total: np.ndarray, theta: float) -> np.ndarray:
        return total[:-1] + h * (theta * v[:-1] + theta**2 / 2 * (v[1:] - v[:-1]))

    def linear(v: np.ndarray, theta: float) -> np.ndarray:
        return v[:-1] + theta * (v[1:] - v[:-1])

    l, s, b = lsb
    shift = [inside(s, big_s, float(t)) for t in THETA]
    slope = [np.exp(-shift[i]) * linear(b, float(t)) for i, t in enumerate(THETA)]
    beta = _cumulative(h * _sum(WEIGHT, slope))
    moments, drift = [np.zeros(l.shape[1:]) for _ in range(TERMS)], np.zeros(l.shape[1:])
    for i, t in enumerate(THETA):
        weight = WEIGHT[i] * h * np.exp(inside(l, big_l, float(t)) + shift[i])
        for k in range(TERMS):
            moments[k] = moments[k] + (weight * _power(linear(u, float(t)), k, weight)).sum(0)
        drift = drift + (weight * (beta[:-1] + h * _sum(PARTIAL[i], slope))).sum(0)
    return beta[-1], moments, drift


def _sum(weights: np.ndarray, values: list[np.ndarray]) -> np.ndarray:
    total = weights[0] * values[0]
    for w, v in zip(weights[1:], values[1:], strict=True):
        total = total + w * v
    return total
