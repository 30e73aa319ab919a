"""Grids: how the nodes of a run are chosen on a path."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..errors import OptionError, no_leftover, one_of
from .families import VP, Flow
from .held import nearest_calls
from .node import Node
from .path import Nodes, Path

# A grid gives n nodes from the noisiest to the cleanest; `closed` ones include `path.last`.
Points = Callable[..., list[Node]]
GRIDS: dict[str, tuple[Points, bool]] = {}

# Published Align-Your-Steps schedules of ten calls (arXiv:2404.14507, project page): sigma / alpha.
AYS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034),
}


def grid(name: str, *, closed: bool = True) -> Callable[[Points], Points]:
    """Register `points(path, n, **options)`; `closed=False` where the last point is not the cleanest training node."""

    def register(points: Points) -> Points:
        GRIDS[name] = (points, closed)
        return points

    return register


def nodes(path: Path, calls: int, grid: str = "linspace_open", *, final: str = "zero", **options: Any) -> Nodes:
    """The nodes of a run: `calls` nodes at which a one-call-an-interval sampler calls the model, and the end.

    Args:
        path: where the nodes lie.
        calls: intervals, 1 or more.
        grid: a name of `GRIDS`.
        final: "zero" ends at sigma = 0, after a call at the cleanest node of the grid; "sigma_min" ends at the
            cleanest training node, where the model is not called.
        options: of the grid (an unknown one is an error).

    Returns:
        `calls + 1` nodes in falling order of noise.

    Raises:
        OptionError: unknown grid or option, `calls < 1`, or more calls than the path has distinct levels.
    """
    points, closed = GRIDS[one_of("grid", grid, GRIDS)]
    one_of("final", final, ("zero", "sigma_min"))
    if not isinstance(calls, (int, np.integer)) or isinstance(calls, bool) or calls < 1:
        raise OptionError(f"the number of model calls must be an integer of 1 or more, got {calls!r}")
    code = points.__code__
    no_leftover(f"grid {grid!r}", options, code.co_varnames[2 : code.co_argcount + code.co_kwonlyargcount])
    n = int(calls)
    if grid == "by_calls" and options.get("grids"):
        chosen = options["grids"][nearest_calls(options["grids"], n)]
        return nodes(path, n, chosen["grid"], final=final, **(chosen.get("grid_options") or {}))
    if final == "zero":
        found = points(path, n, **options)[:n] + [path.end]
    elif closed:
        found = points(path, n + 1, **options)
    else:
        found = points(path, n, **options)[:n] + [path.last]
    return checked(found, path, f"grid {grid!r} with {calls} calls")


def checked(found: Sequence[Node], path: Path, where: str) -> Nodes:
    """`Nodes`, after the check that noise never rises along them.

    Raises:
        OptionError: naming the two nodes where it does.
    """
    for i, (s, t) in enumerate(pairwise(found)):
        if t.level > s.level * (1 + 1e-9):
            raise OptionError(
                f"{where}: noise must fall from node to node, but node {i} (t = {s.t:g}, sigma/alpha = {s.level:g}) is "
                f"followed by one with t = {t.t:g}, sigma/alpha = {t.level:g}"
            )
    return Nodes(found, path)


# ---------------------------------------------------------------------- helpers
def native(node: Node, path: Path) -> float:
    """What diffusers calls sigma (Karras, exponential, beta grids are spaced in it): flow sigma, else sigma/alpha."""
    return node.sigma if isinstance(path, Flow) else node.level


def _at_native(path: Path, sigma: float) -> Node:
    return path.at(path.train_steps * sigma) if isinstance(path, Flow) else path.at_level(sigma)


def finite_first(path: Path) -> Node:
    """The noisiest training node that has a finite lam (one training step in, if the first is pure noise)."""
    if path.first.alpha > 0:
        return path.first
    return path.at(path.warp(path.first.t - 1))


def _within(path: Path, n: int, spacing: str | None, offset: int) -> tuple[float | None, float | None]:
    """Native sigmas of the cleanest and the noisiest of n points spaced in time; None, None for the whole path.

    diffusers' Euler family and FlowMatchEuler stretch their Karras, exponential and beta grids between these.
    """
    if spacing is None:
        return None, None
    known: dict[str, Points] = {"leading": _leading, "trailing": _trailing, "flow_stock": _flow_stock}
    options = {"offset": offset} if spacing == "leading" else {}
    found = known[one_of("spacing `within`", spacing, known)](path, n, **options)
    return native(found[-1], path), native(found[0], path)


def _span(
    path: Path,
    sigma_min: float | None,
    sigma_max: float | None,
    inner: tuple[float | None, float | None] = (None, None),
) -> tuple[float, float]:
    """Native sigmas from noisy to clean: the user's own, else those of `inner`, else the path's."""
    sigma_min = inner[0] if sigma_min is None else sigma_min
    sigma_max = inner[1] if sigma_max is None else sigma_max
    high = native(path.first, path) if path.first.alpha > 0 or isinstance(path, Flow) else finite_first(path).level
    high = high if sigma_max is None else sigma_max
    low = native(path.last, path) if sigma_min is None else sigma_min
    if not 0 < low <= high or (low == high and inner[0] is None):  # one spaced point is its own two ends
        raise OptionError(f"a grid needs 0 < sigma_min < sigma_max, got {low:g} and {high:g}")
    return high, low


def _ramp(n: int) -> np.ndarray:
    return np.linspace(0.0, 1.0, n) if n > 1 else np.zeros(1)


def stretched(path: Flow, ts: Sequence[float]) -> list[Node]:
    """Nodes at the times `ts`, stretched so that the last one is the path's terminal sigma, if it has one."""
    if path.terminal is not None and len(ts) > 1:
        scale = (1 - ts[-1] / path.train_steps) / (1 - path.terminal)
        ts = [path.train_steps * (1 - (1 - t / path.train_steps) / scale) for t in ts]
    return [path.at(t) for t in ts]


def _timed(path: Path, times: Iterable[float]) -> list[Node]:
    """Nodes at uniform times (unshifted)."""
    if isinstance(path, Flow):
        return stretched(path, [path.warp(u) for u in times])
    return [path.at(float(t)) for t in times]


def _times(path: Path) -> tuple[float, float]:
    """First and last training time, unshifted."""
    return path.first.t, (1.0 if isinstance(path, Flow) else path.last.t)


def _steps(path: Path, n: int, where: str) -> int | None:
    """Training steps of a discrete path (None if time is continuous); refuses more points than steps."""
    if not isinstance(path, VP):
        return None
    if n > len(path.betas):
        raise OptionError(f"{where}: {n} nodes were asked of a path with {len(path.betas)} training steps")
    return len(path.betas)


# ---------------------------------------------------------------------- uniform in time
@grid("linspace")
def _linspace(path: Path, n: int, *, rounded: bool = True) -> list[Node]:
    """`n` times from the first to the last, both included (DDIM, Euler)."""
    hi, lo = _times(path)
    ts = np.linspace(lo, hi, n)[::-1] if n > 1 else np.array([hi])  # counted from below, as diffusers rounds ties
    return _timed(path, np.round(ts) if _steps(path, n, "linspace") and rounded else ts)


@grid("linspace_open", closed=False)
def _linspace_open(path: Path, n: int, *, rounded: bool = True) -> list[Node]:
    """The first `n` of n + 1 uniform times (DPM-Solver++, UniPC, DEIS): the last call is a whole step from the end."""
    hi, lo = _times(path)
    ts = np.linspace(lo, hi, n + 1)[:0:-1]
    return _timed(path, np.round(ts) if _steps(path, n, "linspace_open") and rounded else ts)


@grid("trailing", closed=False)
def _trailing(path: Path, n: int) -> list[Node]:
    """Uniform times counted from the noisy end (arXiv:2305.08891, Table 2); for flow models `linspace(1, 1/n, n)`."""
    steps = _steps(path, n, "trailing")
    hi, lo = _times(path)
    if steps:
        # arange, as in diffusers, rounds ties like it; for some n (61, T = 1000) it gives one time too many
        return _timed(path, np.round(np.arange(steps, 0, -steps / n)[:n]) - 1)
    base = 0.0 if isinstance(path, Flow) else lo
    return _timed(path, hi + (base - hi) * np.arange(n) / n)


@grid("leading", closed=False)
def _leading(path: Path, n: int, *, offset: int = 0, open_end: bool = False) -> list[Node]:
    """Uniform times counted from the clean end. `open_end` is DPM-Solver++'s form, which counts one more interval."""
    steps, m = _steps(path, n, "leading"), n + 1 if open_end else n
    first = m - n
    if steps:
        ts = np.arange(first, m)[::-1] * (steps // m) + offset
        return _timed(path, np.minimum(ts, steps - 1))
    hi, lo = _times(path)
    return _timed(path, lo + (hi - lo) * np.arange(first, m)[::-1] / m)


@grid("quadratic")
def _quadratic(path: Path, n: int) -> list[Node]:
    """Times uniform in their square root (arXiv:2010.02502, Appendix D.3), denser at the clean end."""
    hi, lo = _times(path)
    return _timed(path, lo + (hi - lo) * (1 - _ramp(n)) ** 2)


def _only_flow(path: Path, name: str) -> Flow:
    if not isinstance(path, Flow):
        raise OptionError(f"grid {name!r} is for flow paths, this one is {path.family!r}")
    return path


@grid("flow_stock")
def _flow_stock(path: Path, n: int) -> list[Node]:
    """FlowMatchEulerDiscreteScheduler without explicit sigmas: uniform between the shifted ends, shifted again."""
    path = _only_flow(path, "flow_stock")
    k = path.shift
    lowest = path.train_steps * (k / path.train_steps) / (1 + (k - 1) / path.train_steps)
    ts = path.train_steps + (lowest - path.train_steps) * _ramp(n)
    return stretched(path, [path.warp(t) for t in ts])


@grid("flow_dpmpp", closed=False)
def _flow_dpmpp(path: Path, n: int) -> list[Node]:
    """DPMSolverMultistep's flow sigmas: uniform from 1 - 1/T, not from 1 (UniPC's are `linspace_open`)."""
    path = _only_flow(path, "flow_dpmpp")
    return _timed(path, (path.train_steps - 1) * (1 - np.arange(n) / n))


# ---------------------------------------------------------------------- uniform in a function of sigma
@grid("uniform_lambda")
def _uniform_lambda(
    path: Path, n: int, *, sigma_min: float | None = None, sigma_max: float | None = None
) -> list[Node]:
    """Uniform in lam, the "logSNR" grid of DPM-Solver; a first node with alpha = 0 stays first."""
    if sigma_min is None and sigma_max is None:
        start, stop = finite_first(path), path.last
    else:
        start, stop = (_at_native(path, s) for s in _span(path, sigma_min, sigma_max))
        start = finite_first(path) if start.alpha == 0 else start
    found = [path.at_lam(v) for v in start.lam + (stop.lam - start.lam) * _ramp(n)]
    found[0] = path.first if sigma_max is None else start
    if n > 1:
        found[-1] = stop
    return found


@grid("karras")
def _karras(
    path: Path,
    n: int,
    *,
    rho: float = 7.0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    within: str | None = None,
    offset: int = 0,
) -> list[Node]:
    """`sigma^(1/rho)` uniform (arXiv:2206.00364, Eq. 5), on the whole path or `within` the ends of a time spacing."""
    if not rho > 0:
        raise OptionError(f"grid 'karras': rho must be above 0, got {rho!r}")
    high, low = _span(path, sigma_min, sigma_max, _within(path, n, within, offset))
    root = high ** (1 / rho) + (low ** (1 / rho) - high ** (1 / rho)) * _ramp(n)
    return _ends(path, root**rho, high, low)


@grid("exponential")
def _exponential(
    path: Path,
    n: int,
    *,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    within: str | None = None,
    offset: int = 0,
) -> list[Node]:
    """Uniform in ln(sigma); the same as uniform_lambda except on flow paths, where sigma is not sigma/alpha."""
    high, low = _span(path, sigma_min, sigma_max, _within(path, n, within, offset))
    return _ends(path, np.exp(math.log(high) + (math.log(low) - math.log(high)) * _ramp(n)), high, low)


@grid("beta")
def _beta(
    path: Path,
    n: int,
    *,
    alpha: float = 0.6,
    beta: float = 0.6,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    within: str | None = None,
    offset: int = 0,
) -> list[Node]:
    """Quantiles of a Beta(alpha, beta) law over sigma (arXiv:2407.12173)."""
    try:
        from scipy.stats import beta as law
    except ImportError as error:
        raise OptionError("grid 'beta' needs scipy (quantiles of the beta law): pip install scipy") from error
    high, low = _span(path, sigma_min, sigma_max, _within(path, n, within, offset))
    return _ends(path, low + (high - low) * law.ppf(1 - _ramp(n), alpha, beta), high, low)


def _ends(path: Path, sigmas: np.ndarray, high: float, low: float) -> list[Node]:
    """Nodes at native sigmas, with the two ends free of rounding."""
    values = [high, *(float(s) for s in sigmas[1:-1]), low][: len(sigmas)]
    return [_at_native(path, s) for s in values]


@grid("mid")
def _mid(path: Path, n: int, *, w: float = 0.5) -> list[Node]:
    """`lam = (1 - w) * (time-uniform) + w * (lam-uniform)`, node by node."""
    if not 0 <= w <= 1:
        raise OptionError(f"grid 'mid': w must lie in [0, 1], got {w}")
    timed, even = _linspace(path, n, rounded=False), _uniform_lambda(path, n)
    pairs = list(zip(timed, even, strict=True))
    return [path.first, *(path.at_lam((1 - w) * a.lam + w * b.lam) for a, b in pairs[1:])]


@grid("ays")
def _ays(path: Path, n: int, *, model: str = "sd15") -> list[Node]:
    """The published Align-Your-Steps schedule of `model`, log-linearly interpolated when n is not 10."""
    table = np.log(AYS[one_of("Align-Your-Steps table", model, AYS)])
    if isinstance(path, Flow):
        raise OptionError("grid 'ays': the published tables are for SD 1.5, SDXL and SVD, not for flow models")
    levels = np.exp(np.interp(_ramp(n), np.linspace(0, 1, len(table)), table))
    first = finite_first(path)
    return [first if level > first.level else path.at_level(float(level)) for level in levels]


@grid("listed", closed=False)
def _listed(path: Path, n: int, *, times: Mapping[str, Sequence[float]] | Sequence[float] | None = None) -> list[Node]:
    """The user's own `times`, as the model is fed (no shift is applied): a list, or one for each number of calls.

    `calibrate.ays` finds such grids; `TableScheduler.from_config(..., grid="ays.safetensors")` reads them.
    """
    held = {str(len(times)): times} if isinstance(times, Sequence) else times
    if not held:
        raise OptionError("grid 'listed' needs times: one number a call, or {number of calls: such a list}")
    if str(n) not in held:
        known = ", ".join(sorted(map(str, held), key=int))
        raise OptionError(f"grid 'listed' holds times for {known} calls, not {n}; ask for one of these, or find more")
    return [path.at(float(t)) for t in held[str(n)]]


@grid("by_calls")
def _by_calls(path: Path, n: int, *, grids: Mapping[str, Mapping[str, Any]] | None = None) -> list[Node]:
    """Another grid for each number of calls: `grids[calls] = {"grid": name, "grid_options": {...}}`, or the nearest."""
    raise OptionError("grid 'by_calls' needs grids: {number of calls: {'grid': a name, 'grid_options': its options}}")
