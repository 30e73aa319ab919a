"""Frechet distance between Gaussians fitted to two feature sets: pure arithmetic in float64.

    FID = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

With F F^T = S the last trace is the nuclear norm of F1^T F2, because the eigenvalues of S1 S2 are the squared singular
values of F1^T F2. That needs no matrix square root, no complex numbers and no `eps`, and does not fail on singular
covariances. Features are (N, d), rows are samples; covariances are divided by N - 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

Array = np.ndarray | torch.Tensor

# A jackknife of K groups leaves of the bias, as a part of what it removes, at most about _NEXT K/(K - 1) d/N: the next
# term of the series in d/N. Measured with d = 32 and 128, N/d from 2 to 8, spectra that fall as 1/k or slower: about .2
# or less (.16 for most laws). Where the spectrum falls faster, both are small against the noise.
_NEXT = 0.2
_Z95 = 1.959963984540054


def _f64(x: Array) -> torch.Tensor:
    x = torch.as_tensor(x)
    return x.to("cpu", torch.float64) if x.device.type == "mps" else x.to(torch.float64)  # MPS has no float64


def _features(x: Array) -> torch.Tensor:
    x = _f64(x)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"features must be (N, d) with N >= 2, got {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("features contain NaN or infinity")
    return x


@dataclass(frozen=True)
class Statistics:
    """Mean (d,), a factor F (d, k) of the covariance S = F F^T, and the number of samples (None: not known)."""

    mean: torch.Tensor
    factor: torch.Tensor
    n: int | None = None

    @property
    def trace(self) -> torch.Tensor:
        return self.factor.pow(2).sum()

    @property
    def covariance(self) -> torch.Tensor:
        return self.factor @ self.factor.T


def from_features(features: Array) -> Statistics:
    """Statistics of samples. The factor comes from the samples themselves (R of a QR), never from the covariance, so a
    singular covariance keeps all its digits; cost N d min(N, d)."""
    x = _features(features)
    mean = x.mean(0)
    r = torch.linalg.qr(x - mean, mode="r").R  # (min(N, d), d): R^T R = sum of centred outer products
    return Statistics(mean, r.T / (len(x) - 1) ** 0.5, len(x))


def merge(*parts: Statistics) -> Statistics:
    """Statistics of all samples together from those of their parts (shards, processes), equal to the one-pass result
    up to rounding: the factors and the distances of the means (Chan's update) are stacked, never subtracted."""
    counts = [p.n for p in parts if p.n is not None]
    if not parts or len(counts) < len(parts):
        raise ValueError("only statistics that know their number of samples can be merged")
    n = sum(counts)
    mean = torch.stack([p.mean * (k / n) for p, k in zip(parts, counts)]).sum(0)
    rows = [p.factor.T * (k - 1) ** 0.5 for p, k in zip(parts, counts)]
    apart = [((p.mean - mean) * k**0.5)[None] for p, k in zip(parts, counts)]
    r = torch.linalg.qr(torch.cat(rows + apart), mode="r").R
    return Statistics(mean, r.T / (n - 1) ** 0.5, n)


def from_moments(mu: Array, sigma: Array, n: int | None = None) -> Statistics:
    """Statistics of a stored mean (d,) and covariance (d, d), checked: asymmetry or negative eigenvalues mean a corrupt
    file."""
    # a float32 file rounds the zero eigenvalues of a singular matrix to about -1e-7 of the largest
    floor = 1e-8 if torch.as_tensor(sigma).dtype == torch.float64 else 1e-6
    mu, sigma = _f64(mu), _f64(sigma)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"mu must be (d,) and sigma (d, d), got {tuple(mu.shape)} and {tuple(sigma.shape)}")
    scale = sigma.abs().max()
    if not bool(torch.isfinite(sigma).all() and torch.isfinite(mu).all()):
        raise ValueError("corrupt statistics: NaN or infinity in mu or sigma")
    if float((sigma - sigma.T).abs().max()) > 1e-6 * float(scale):
        raise ValueError("corrupt statistics: sigma is not symmetric")
    w, v = torch.linalg.eigh((sigma + sigma.T) / 2)
    if float(w.min()) < -floor * float(w.max().clamp(min=0)):
        raise ValueError(
            f"corrupt statistics: sigma has the eigenvalue {float(w.min()):.3g} (largest {float(w.max()):.3g})"
        )
    return Statistics(mu, v * w.clamp(min=0).sqrt(), n)


def distance(a: Statistics, b: Statistics) -> float:
    """FID. Symmetric; zero for equal statistics up to rounding (it may then be negative by 1e-13 of the traces)."""
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features have different widths: {len(a.mean)} and {len(b.mean)}")
    overlap = torch.linalg.svdvals(a.factor.T @ b.factor).sum()
    return float((a.mean - b.mean).pow(2).sum() + a.trace + b.trace - 2 * overlap)


def fid(a: Array | Statistics, b: Array | Statistics) -> float:
    """FID between feature arrays or statistics."""
    return distance(*(s if isinstance(s, Statistics) else from_features(s) for s in (a, b)))


def influence(features: Array, reference: Statistics) -> torch.Tensor:
    """phi (N,): the influence of each generated sample on FID(features, reference).

    With T the optimal (Monge) map from the generated to the reference Gaussian,
        phi_i = 2 (x_i - m).(m - m_r) + (x_i - m)^T (I - T) (x_i - m) - tr((I - T) S);
    their sum is zero when S is divided by N, which is done here.
    T = F_r (F_r^T S F_r)^(-1/2) F_r^T = F_r U D^-1 U^T F_r^T with the SVD of F^T F_r = . D U^T; directions below 1e-10
    of the largest eigenvalue D^2 are left out (pseudo-inverse).
    """
    x = _features(features)
    n = len(x)
    own = from_features(x)
    factor = own.factor * ((n - 1) / n) ** 0.5
    _, s, vt = torch.linalg.svd(factor.T @ reference.factor, full_matrices=False)
    keep = s**2 > 1e-10 * s[0] ** 2 if len(s) else s > 0
    half = (reference.factor @ vt[keep].T) * s[keep] ** -0.5  # T = half half^T
    centred = x - own.mean
    quadratic = centred.pow(2).sum(1) - (centred @ half).pow(2).sum(1)
    return 2 * centred @ (own.mean - reference.mean) + quadratic - quadratic.mean()


def standard_error(phi: torch.Tensor) -> float:
    """SE of a FID from its influence values: std / sqrt(N)."""
    return float(phi.std() / len(phi) ** 0.5)


def widened(se: float, left: float) -> float:
    """The standard error whose 95 % interval is that of `se`, longer by `left` at both ends."""
    return se + left / _Z95


def groups_for(d: int, n: int) -> int:
    """Groups of a jackknife over n samples of d features: many where they are cheap."""
    return 10 if d <= 256 and n >= 20 else 2


def correct(
    features: Array,
    reference: Array | Statistics,
    groups: int | None = None,
    value: Callable[[Array | Statistics, Array | Statistics], float] = fid,
) -> tuple[float, float]:
    """(FID without its O(1/N) bias, what may be left of the bias).

    The grouped jackknife f - (K - 1)(mean_k f_(-k) - f), K by `groups_for`. Group k holds samples k, k + K, ... With
    reference features (not statistics) group k of both sets is left out together, which removes the bias of the finite
    reference too. The result may be negative.
    """
    x = _features(features)
    y = reference if isinstance(reference, Statistics) else _features(reference)
    smallest = len(x) if isinstance(y, Statistics) else min(len(x), len(y))
    k = groups or groups_for(x.shape[1], smallest)
    if k < 2 or smallest < 2 * k:
        raise ValueError(f"a jackknife of {k} groups needs at least {2 * max(k, 2)} samples, got {smallest}")

    def without(z: torch.Tensor, group: int) -> torch.Tensor:
        return z[torch.arange(len(z), device=z.device) % k != group]

    full = value(x, y)
    left = [value(without(x, g), y if isinstance(y, Statistics) else without(y, g)) for g in range(k)]
    removed = (k - 1) * (sum(left) / k - full)
    return full - removed, _NEXT * k / (k - 1) * x.shape[1] / smallest * abs(removed)


def jackknife(features: Array, reference: Array | Statistics, groups: int | None = None) -> float:
    """The first of `correct`."""
    return correct(features, reference, groups)[0]


def too_few(n: int | None, d: int) -> str:
    """Why no interval of a corrected FID holds, empty where it does: fewer than two samples a feature see too few
    directions."""
    return f"too few images: {n} for {d} features, {2 * d} needed" if n is not None and n < 2 * d else ""


@dataclass(frozen=True)
class Difference:
    """FID(a) - FID(b) of paired samples (same seeds and prompts) against one reference, both corrected for bias, with
    its standard error (NaN where none holds; `warnings` says why)."""

    value: float
    se: float
    warnings: tuple[str, ...] = ()

    @property
    def z(self) -> float:
        if self.se > 0 or math.isnan(self.se):
            return self.value / self.se
        return math.copysign(math.inf, self.value) if self.value else 0.0


def paired(a: Array, b: Array, reference: Statistics) -> Difference:
    """Difference of two FIDs whose samples i share seed and prompt. The SE uses phi_a,i - phi_b,i: what the pairs
    have in common cancels, which two separate intervals cannot see; it is widened by what `correct` may leave."""
    a, b = _features(a), _features(b)
    if len(a) != len(b):
        raise ValueError(f"paired samples must be equally many, got {len(a)} and {len(b)}")
    few = tuple(filter(None, (too_few(n, a.shape[1]) for n in (len(a), reference.n))))
    if few:
        return Difference(fid(a, reference) - fid(b, reference), math.nan, few)
    (x, left_x), (y, left_y) = (correct(z, reference) for z in (a, b))
    se = standard_error(influence(a, reference) - influence(b, reference))
    return Difference(x - y, widened(se, abs(left_x - left_y)))
