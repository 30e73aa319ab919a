"""UniPC: a multistep predictor and the corrector that uses the next call's prediction, at no extra call."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ..core.node import Node, step
from ..core.path import Nodes
from ..core.phi import exact_weights
from ..errors import OptionError, one_of
from .common import check_order, eps_space, finite, intervals, is_long, lead, order_at, ratios
from .registry import sampler

VARIANTS = ("bh1", "bh2", "exact", "vary_coeff")
SPACES = ("x0", "eps")


class Step(NamedTuple):
    """A predictor step s -> t, kept for the corrector at t: the predictions it saw (newest first) and their weights."""

    s: Node
    t: Node
    past: Sequence[tuple[Node, Any]]
    weights: Sequence[float]


def _order(order: int = 2, corrector: Any = True, **_: Any) -> int:
    return order if corrector is False else order + 1


@sampler(
    "unipc",
    order=_order,
    paper="arXiv:2302.04867, Theorem 3.1, Algorithms 1 (UniC) and 2 (UniP)",
    variants=(
        {"order": 1, "lower_order_final": False},
        {"order": 1, "variant": "exact", "space": "eps", "lower_order_final": False},
        {"order": 2, "lower_order_final": False},
        {"order": 2, "variant": "bh1", "space": "eps", "lower_order_final": False},
        {"order": 2, "variant": "exact", "corrector": False, "lower_order_final": False},
        {"order": 2, "corrector": [0]},
        {"order": 3, "variant": "exact", "corrector": False, "lower_order_final": False},
        {"order": 3, "variant": "bh1", "space": "eps", "corrector": False},
        {"order": 4, "variant": "exact"},
    ),
)
def unipc(
    x: Any,
    nodes: Nodes,
    predict: Any,
    noise: Any,
    *,
    order: int = 2,
    variant: str = "bh2",
    space: str = "x0",
    corrector: bool | Sequence[int] = True,
    lower_order_final: bool = True,
) -> Any:
    """`x_t = lead - c sum_j W_j Dl_j`, `Dl_j = (P_{s-j} - P_s)/r_j`, `sum_j W_j r_j^(i-1) = i! z phi_{i+1}(z)`.

    `(c, z)` is `(alpha_t, -h)` in data space, `(sigma_t, h)` in noise space. The corrector at t adds the prediction at
    t as a point with `r = 1`. It is written as an increment on the state that the model saw, so edits made between
    steps survive. The order of the pair is `order + 1`; the model is not called again after the corrector.

    Args:
        order: of the predictor, 1 to 4 (2 for guided sampling, 3 else).
        variant: "bh1" (`B = z`), "bh2" (`B = e^z - 1`) or "exact". They differ in two places only, because B cancels
            in the linear systems: `W_1 = B/2` in predictors of order 2 and `W_t = B/2` in correctors of order 1.
            "exact" has no such shortcut: it integrates the interpolation polynomial. "vary_coeff" is another name of
            "exact" (the corrector published under that name is of first order).
        space: what is interpolated, "x0" or "eps".
        corrector: True, False, or the steps whose corrector is off (i: the one applied after step i, at node i + 1),
            counted from the node where the run begins. After a step from alpha = 0 it is the trapezoidal rule in
            `u = alpha/sigma`, which is finite there (`e^lam D dlam = D du`): weight 1/2, the limit of bh2's. In noise
            space there is none then, nor after a step longer than `common.LONG`.
        lower_order_final: one order less towards the last nodes (advised below 15 calls).
    """
    return pair(x, nodes, predict, None, order, variant, space, corrector, lower_order_final)


def pair(
    x: Any,
    nodes: Nodes,
    predict: Any,
    settle: Callable[[Node, Any], Any] | None,
    order: int,
    variant: str,
    space: str,
    corrector: bool | Sequence[int],
    lower_order_final: bool,
) -> Any:
    """The loop of `unipc`; `settle(node, P)` gives what is kept of a prediction once the corrector has used it."""
    check_order("unipc", order, 4)
    one_of("variant", variant, VARIANTS)
    one_of("space", space, SPACES)
    off = _skipped(corrector)
    past: list[tuple[Node, Any]] = []
    done: Step | None = None
    start: Any = None  # the prediction at alpha = 0, for the corrector after the step from there
    n = len(nodes) - 1
    for i, s, t in intervals(nodes):
        here = eps_space(s) if space == "eps" else space
        p = predict(x, s, space=here)
        if start is not None:
            x = x + (0.5 * s.alpha) * (p - start)
        elif done is not None:
            x = x + correction(done, p, space, variant)
        start = done = None
        if settle is not None and here == space:
            p = settle(s, p)
        x = lead(x, p, s, t, here)
        corrected = off is not None and i not in off
        if not finite(s) or t.sigma == 0:  # of first order, and no part of the history
            start = p if corrected and space == "x0" and t.sigma > 0 else None
            continue
        past = [(s, p), *past][:order]
        used = past[: order_at(i, n, order, len(past) - 1, lower_final=lower_order_final)]
        weights = predictor(used, s, t, space, variant)
        x = x + increment(used[1:], weights, p)
        if corrected and not (space == "eps" and is_long(s, t)):
            done = Step(s, t, used, weights)
    return x


def _skipped(corrector: Any) -> frozenset[int] | None:
    """Steps without corrector; None if there is none at all."""
    if isinstance(corrector, bool):
        return frozenset() if corrector else None
    listed = tuple(corrector) if isinstance(corrector, Iterable) and not isinstance(corrector, str) else (None,)
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in listed):
        raise OptionError(
            f"sampler 'unipc': corrector must be True, False or a list of step indices (0, 1, ...), got {corrector!r}"
        )
    return frozenset(listed)


def _scale(s: Node, t: Node, space: str) -> tuple[float, float]:
    """(c, z) of the step."""
    return (t.alpha, -step(s, t)) if space == "x0" else (t.sigma, step(s, t))


def _shortcut(z: float, variant: str) -> float:
    return 0.5 * (z if variant == "bh1" else math.expm1(z))


def predictor(past: Sequence[tuple[Node, Any]], s: Node, t: Node, space: str, variant: str) -> list[float]:
    """Weights of `P_j - P_s` in the predicted state, for each past prediction after the newest (which is P_s)."""
    c, z = _scale(s, t, space)
    r = ratios([node for node, _ in past[1:]], s, step(s, t))
    if len(r) == 1 and variant in ("bh1", "bh2"):
        return [-c * _shortcut(z, variant) / r[0]]
    return [-c * float(w) for w in exact_weights([0.0, *r], z)[1:]]


def correction(done: Step, p: Any, space: str, variant: str) -> Any:
    """What the corrector adds to the state predicted by the step `done`, once the prediction p at its end is known."""
    s, t, past, old = done
    c, z = _scale(s, t, space)
    r = ratios([node for node, _ in past[1:]], s, step(s, t))
    if not r and variant in ("bh1", "bh2"):
        new = [-c * _shortcut(z, variant)]
    else:
        new = [-c * float(w) for w in exact_weights([0.0, *r, 1.0], z)[1:]]
    change = [b - a for a, b in zip([*old, 0.0], new, strict=True)]
    return increment([*past[1:], (t, p)], change, past[0][1])


def increment(others: Sequence[tuple[Node, Any]], weights: Sequence[float], base: Any) -> Any:
    """`sum_j w_j (P_j - P_s)`; 0 without others."""
    total: Any = 0.0
    for w, (_, p) in zip(weights, others, strict=True):
        total = total + w * (p - base)
    return total
