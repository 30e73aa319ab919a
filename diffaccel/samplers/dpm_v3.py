"""DPM-Solver-v3: multistep with statistics of the model (EMS) in place of "the model predicts noise (or data)"."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..core.linear import Coef, Linear, as_coef, fit, is_zero
from ..core.node import Node
from ..core.path import Nodes
from ..core.prediction import Affine
from ..core.quad import Ems, Step
from ..errors import OptionError, one_of
from .common import check_order, finite, intervals, lead, order_at
from .registry import Calibrated, sampler

CORRECTORS = ("same", "plus")
PSEUDO = ("predictor", "corrector")
RESAMPLE = ("bilinear",)
NO_STATISTICS = Ems.data_prediction()  # one, because it remembers its integrals


class Sum(NamedTuple):
    """`sum_j b_j P_j + c`: over predictions, and a constant of one sample's shape."""

    b: Sequence[Coef]
    c: Coef


class Done(NamedTuple):
    """A predictor step s -> t, kept for the corrector at t: what it saw (newest first) and what it added."""

    s: Node
    t: Node
    past: Sequence[tuple[Node, Any]]
    sum: Sum


def _order(order: int = 2, corrector: str | None = "plus", pseudo: Sequence[str] = (), **_: Any) -> int:
    """With pseudo derivatives a step is of order 2 at most; the corrector adds at most one."""
    predicted = min(order, 2) if "predictor" in pseudo else order
    points = order + (corrector == "plus")
    if corrector is None or points == 1:
        return predicted
    return min(predicted + 1, min(points, 2) if "corrector" in pseudo else points)


def snapped(nodes: Nodes, options: Mapping[str, Any]) -> Nodes:
    """With `snap`, the nodes moved to the nearest nodes of the statistics; else the nodes themselves.

    Raises:
        OptionError: if two nodes fall on one, or there are no statistics.
    """
    if not options["snap"]:
        return nodes
    ems = options["statistics"]
    if not isinstance(ems, Ems):
        raise OptionError("sampler 'dpm_v3': snap=True moves the nodes to those of the statistics; there are none")
    moved: list[Node] = []
    for node in nodes:
        lam = ems.nearest(node.lam) if finite(node) and node.sigma > 0 else node.lam
        moved.append(node if abs(lam - node.lam) < 1e-12 or lam == node.lam else nodes.path.at_lam(lam))
    for i, (s, t) in enumerate(pairwise(moved)):
        if s.lam == t.lam:
            raise OptionError(
                f"snap=True puts nodes {i} and {i + 1} (t = {nodes[i].t:g} and {nodes[i + 1].t:g}) on one node of the "
                f"statistics, lam = {s.lam:.4g}; take fewer calls, or snap=False"
            )
    return Nodes(moved, nodes.path)


@sampler(
    "dpm_v3",
    order=_order,
    paper="arXiv:2310.13268, Eq. 11 and Algorithm 1",
    place=snapped,
    calibrated=Calibrated(
        kind="ems",
        option="statistics",
        read=lambda artifact: Ems(*(artifact.tensors[name] for name in ("lam", "l", "s", "b"))),
        command="diffaccel calibrate ems MODEL --out ems.safetensors",
        without='Say statistics="none" to run it without them (l = 1, s = b = 0: a data-prediction solver).',
        tensor="l",
        resample=lambda statistics, shape: statistics.resized(shape),
    ),
    variants=(
        {"order": 2, "corrector": "same", "lower_order_final": False},
        {"order": 2, "pseudo": ["corrector"], "lower_order_final": False},
        {"order": 3, "corrector": "same", "lower_order_final": False},
        {"order": 3, "lower_order_final": False},
    ),
)
def dpm_v3(
    x: Any,
    nodes: Nodes,
    predict: Any,
    noise: Any,
    *,
    order: int = 2,
    corrector: str | None = "plus",
    pseudo: Sequence[str] = (),
    lower_order_final: bool = True,
    corrector_range: Sequence[float] | None = None,
    snap: bool = False,
    quadrature: str = "exponential",
    resample: str | None = None,
    statistics: Ems | str = "none",
) -> Any:
    """`x_t/alpha_t = e^(L_s - L_t) (x_s/alpha_s - sum_k E_k g^(k) - J)`: g is f without what s and b explain.

    What is combined is `-f = (l x - sigma eps)/alpha`; coefficients have the shape of the statistics. A step to
    sigma = 0 or from alpha = 0 is of first order in data space. The corrector is an increment on the state that the
    model saw, so edits made between steps survive; the model is not called again after it.

    Args:
        order: of the predictor, 1 to 3 (2 for guided sampling, 3 else).
        corrector: None, "same" (as many predictions as the predictor, so none for a predictor of order 1) or "plus"
            (one more). The published code's `c_pseudo=True` is "plus" with `pseudo=["corrector"]`.
        pseudo: any of "predictor" and "corrector": take each derivative from as few predictions as it needs.
        lower_order_final: one order less towards the last nodes.
        corrector_range: (lam_min, lam_max) between which the corrector acts; None: everywhere.
        snap: move the nodes to those of the statistics, as the published code does.
        quadrature: "exponential" (exact), or "trapezoid" as the published code.
        resample: None, or "bilinear": statistics by element of an image serve other heights and widths, interpolated.
        statistics: an `Ems` (of `calibrate.ems`), or "none": l = 1, s = b = 0, a data-prediction solver.
    """
    check_order("dpm_v3", order, 3)
    ems = _statistics(statistics, quadrature)
    if resample is not None:
        ems = _resampled(ems, one_of("resample", resample, RESAMPLE), x)
    pseudo = _pseudo(pseudo, corrector)
    low, high = _range(corrector_range, corrector)
    past: list[tuple[Node, Any]] = []
    done: Done | None = None
    n = len(nodes) - 1
    for i, s, t in intervals(nodes):
        if not finite(s) or t.sigma == 0:
            x, done = lead(x, predict(x, s, space="x0"), s, t, "x0"), None
            continue
        p = predict(x, s, space=space(ems, s))
        if done is not None:
            x = plus(x, *correction(done, p, ems, corrector == "plus", "corrector" in pseudo))
        past = [(s, p), *past][:order]
        used = past[: order_at(i, n, order, len(past) - 1, lower_final=lower_order_final)]
        a, added = weights(ems, s, t, [node for node, _ in used], "predictor" in pseudo)
        corrected = corrector == "plus" or (corrector == "same" and len(used) > 1)
        done = Done(s, t, used, added) if corrected and low <= t.lam <= high else None
        x = plus(x * fit(a, x), added, used)
    return x


def _statistics(statistics: Any, quadrature: str) -> Ems:
    if isinstance(statistics, Ems):
        return statistics.integrated(quadrature)
    if statistics != "none":
        raise OptionError(
            "sampler 'dpm_v3': statistics must be an Ems (from calibrate.ems, or an artifact's) or 'none', "
            f"got {statistics!r}"
        )
    if quadrature != "exponential":
        raise OptionError(
            f"sampler 'dpm_v3': quadrature={quadrature!r} integrates on the nodes of the statistics, but statistics "
            "is 'none'"
        )
    return NO_STATISTICS


def _resampled(ems: Ems, how: str, x: Any) -> Ems:
    """Statistics for states like x; a symbol has no shape: whoever traces hands over statistics that fit."""
    if len(ems.shape) < 3 or ems.shape[-2:] == (1, 1):
        raise OptionError(
            f"sampler 'dpm_v3': resample={how!r} would have no effect: statistics of shape {ems.shape} have no pixels"
        )
    return ems if isinstance(x, Linear) else ems.resized(tuple(x.shape[1:]))


def _pseudo(pseudo: Any, corrector: str | None) -> tuple[str, ...]:
    if isinstance(pseudo, str) or not all(v in PSEUDO for v in pseudo):
        raise OptionError(f"sampler 'dpm_v3': pseudo must be a list with any of {list(PSEUDO)}, got {pseudo!r}")
    if corrector is not None:
        one_of("corrector", corrector, CORRECTORS)
    elif "corrector" in pseudo:
        raise OptionError("sampler 'dpm_v3': pseudo has 'corrector', but corrector is None: it would have no effect")
    return tuple(pseudo)


def _range(given: Any, corrector: str | None) -> tuple[float, float]:
    if given is None:
        return -np.inf, np.inf
    if corrector is None or len(given) != 2 or not given[0] < given[1]:
        raise OptionError(
            "sampler 'dpm_v3': corrector_range is (lam_min, lam_max) with lam_min < lam_max, and needs a corrector; "
            f"got {given!r} with corrector={corrector!r}"
        )
    return float(given[0]), float(given[1])


# ---------------------------------------------------------------------- coefficients
def space(ems: Ems, s: Node) -> Affine:
    """Of `(l x - sigma eps)/alpha` at a node: the paper's f (Eq. 8) with its sign changed, so that l = 1 gives x0."""
    ems.need(s.lam)
    l = ems.at(s.lam)[0]
    return Affine(as_coef(l / s.alpha), -s.sigma / s.alpha)


def weights(ems: Ems, s: Node, t: Node, points: Sequence[Node], pseudo: bool) -> tuple[Coef, Sum]:
    """The step s -> t by the interpolation of g at `points` (the first is s; t, or nodes before s).

    Returns:
        the coefficient of x_s, and the sum over the predictions at `points`.
    """
    whole = ems.step(s.lam, t.lam)
    a: Coef = t.alpha * np.exp(-whole.dl)
    slopes = derivatives([node.lam - s.lam for node in points], pseudo)
    b, c = [], -whole.drift
    for (scale, beta), column in zip(_relative(ems, s, points, whole), slopes.T, strict=True):
        w = sum(float(d) * e for d, e in zip(column, whole.moments, strict=False))
        b.append(as_coef(a * w * scale))
        c = c + w * beta
    return as_coef(a / s.alpha), Sum(b, as_coef(a * c))


def _relative(ems: Ems, s: Node, points: Sequence[Node], whole: Step) -> Iterator[tuple[Coef, Coef]]:
    """`e^(S_s - S_j)` and `e^(S_s) (B_j - B_s)` for each point; past nodes come newest first."""
    ds: Coef = 0.0
    beta: Coef = 0.0
    last = s
    for node in points:
        if node is s:
            yield 1.0, 0.0
        elif node.lam > s.lam:
            yield np.exp(-whole.ds), whole.beta
        else:
            between = ems.step(node.lam, last.lam)
            ds, last = ds + between.ds, node
            beta = beta - np.exp(ds) * between.beta
            yield np.exp(ds), beta


def derivatives(d: Sequence[float], pseudo: bool) -> np.ndarray:
    """Weights W (n, n) with `g^(k)(0) = sum_j W[k, j] g(d_j)`, d_0 = 0.

    Full: of the polynomial through all points. Pseudo: the k-th of the one through the first k + 1.
    """
    n = len(d)
    if not pseudo:
        powers = [[v**k / math.factorial(k) for k in range(n)] for v in d]
        return np.linalg.inv(np.array(powers))
    found = np.zeros((n, n))
    for k in range(n):
        for j in range(k + 1):
            found[k, j] = math.factorial(k) / math.prod(d[j] - d[m] for m in range(k + 1) if m != j)
    return found


def plus(x: Any, added: Sum, past: Sequence[tuple[Node, Any]]) -> Any:
    """`x + sum_j b_j P_j + c`, for arrays, tensors or symbols."""
    for b, (_, p) in zip(added.b, past, strict=True):
        x = x + p * fit(b, p)
    return x if is_zero(added.c) else x + fit(added.c, x)


def correction(done: Done, p: Any, ems: Ems, more: bool, pseudo: bool) -> tuple[Sum, list[tuple[Node, Any]]]:
    """What the corrector adds to the state predicted by the step `done`, once the prediction at its end is known."""
    s, t, past, old = done
    used = [past[0], (t, p), *past[1:]][: len(past) + more]
    _, new = weights(ems, s, t, [node for node, _ in used], pseudo)
    change = Sum((*new.b, *(-b for b in old.b)), new.c - old.c)
    return change, [*used, *past]
