"""PNDM (pseudo linear multistep) and iPNDM: Adams-Bashforth with constant weights, carried by DDIM steps."""

from __future__ import annotations

from typing import Any

from ..core.node import Node
from ..core.path import Nodes
from ..core.phi import lagrange_integrals
from .common import check_order, eps_space, intervals, is_long, lead, weighted
from .registry import sampler


def adams_bashforth(r: int, a: float = 0.0, b: float = 1.0) -> Any:
    """Weights on r equidistant values (at 0, -1, ..., 1 - r) that integrate polynomials over [a, b] exactly.

    [0, 1] gives Adams-Bashforth: 1; (3, -1)/2; (23, -16, 5)/12; (55, -59, 37, -9)/24.
    """
    return lagrange_integrals([-float(j) for j in range(r)], a, b)


def pndm_intervals(calls: int, order: int = 4, **_: Any) -> int:
    """One call is the warm-up's, if there are at least two intervals left for the others."""
    return calls - 1 if calls > 2 and order > 1 else calls


@sampler(
    "pndm",
    order=lambda order=4, **_: order,
    space="eps",
    paper="arXiv:2202.09778, Eq. 9, 12 and Algorithm 2; started with improved Euler (PLMS)",
    intervals=pndm_intervals,
    variants=tuple({"order": k} for k in (1, 2, 3)),
    smooth="level",
)
def pndm(x: Any, nodes: Nodes, predict: Any, noise: Any, *, order: int = 4, calls: int | None = None) -> Any:
    """`x_t = DDIM(x_s, sum_j w_j e_j)`, w the Adams-Bashforth weights of equidistant steps.

    The first interval is done with two calls (improved Euler: a trial step, then the mean of both predictions). With
    as many calls as intervals it is done with one, which is `ipndm`. On steps that are not equidistant in sigma/alpha
    the constant weights are of order 2 at most, whatever `order` is.

    Args:
        order: 1 to 4, the number of predictions in use.
        calls: total model calls (None: with the warm-up).
    """
    check_order("pndm", order, 4)
    warm = order > 1 and (calls is None or calls > len(nodes) - 1)
    past: list[tuple[Node, Any]] = []
    for i, s, t in intervals(nodes):
        twice = warm and i == 0 and t.sigma > 0
        # The mean of two x0 is stable where that of two eps is not, and right at alpha = 0, where eps says nothing.
        space = "x0" if twice and is_long(s, t) else eps_space(s)
        mean = p = predict(x, s, space=space)
        if space == "eps":
            past = [(s, p), *past][:order]
        if twice:
            mean = 0.5 * (p + predict(lead(x, p, s, t, space), t, space=space))
        elif space == "eps" and t.sigma > 0:
            mean = weighted(adams_bashforth(len(past)), past)
        x = lead(x, mean, s, t, space)
    return x


@sampler(
    "ipndm",
    order=lambda order=4, **_: order,
    space="eps",
    paper="arXiv:2204.13902, iPNDM: PNDM's multistep part, whose order grows at the start",
    variants=tuple({"order": k} for k in (1, 2, 3)),
    smooth="level",
)
def ipndm(x: Any, nodes: Nodes, predict: Any, noise: Any, *, order: int = 4) -> Any:
    """`pndm` without the extra call: the order grows 1, 2, 3, 4 as predictions become known.

    Args:
        order: 1 to 4, the number of predictions in use.
    """
    return pndm(x, nodes, predict, noise, order=order, calls=len(nodes) - 1)
