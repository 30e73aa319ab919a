"""What several loops share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from ..core.node import Node, decay, step
from ..core.path import Nodes
from ..errors import OptionError


def intervals(nodes: Nodes) -> Iterator[tuple[int, Node, Node]]:
    """(i, start, end) of each interval."""
    for i, (s, t) in enumerate(pairwise(nodes)):
        yield i, s, t


def lead(x: Any, d: Any, s: Node, t: Node, space: str) -> Any:
    """The first-order step s -> t from the prediction d in data ("x0") or noise ("eps") space.

    Data space: `(sigma_t/sigma_s) x + alpha_t (1 - e^-h) D`; noise space: `(alpha_t/alpha_s) x + (sigma_t -
    sigma_s alpha_t/alpha_s) e`. Both are DDIM.
    """
    if space == "x0":
        return (t.sigma / s.sigma) * x + (t.alpha * (1 - decay(s, t))) * d
    return (t.alpha / s.alpha) * x + (t.sigma - s.sigma * (t.alpha / s.alpha)) * d


def order_at(i: int, n: int, order: int, past: int, *, lower_final: bool) -> int:
    """The order of interval i of n: limited by the history, and towards the end if `lower_final`."""
    p = min(order, past + 1)
    return min(p, n - i) if lower_final else p


def check_order(name: str, order: Any, highest: int, lowest: int = 1) -> int:
    """`order` if it is an integer in range; else an error that names the sampler."""
    if isinstance(order, bool) or not isinstance(order, int) or not lowest <= order <= highest:
        raise OptionError(f"sampler {name!r}: order must be an integer from {lowest} to {highest}, got {order!r}")
    return order


def finite(s: Node) -> bool:
    """Whether a node may take part in a polynomial in lam."""
    return math.isfinite(s.lam)


def ratios(past: Sequence[Node], s: Node, h: float) -> list[float]:
    """`r_j = (lam_j - lam_s)/h` of past nodes, newest first (negative numbers)."""
    return [(node.lam - s.lam) / h for node in past]


# In noise space the weight of a prediction made at the end of a step grows as e^h, without bound towards alpha = 0.
LONG = 3.0


def is_long(s: Node, t: Node) -> bool:
    """Whether s -> t is too long in lam to use a prediction made at t in noise space (so it is from alpha = 0)."""
    return step(s, t) > LONG


def eps_space(s: Node) -> str:
    """The space in which a noise-space sampler calls the model at s: data space at alpha = 0, where eps is just x."""
    return "eps" if s.alpha > 0 else "x0"


def weighted(weights: Iterable[float], past: Sequence[tuple[Node, Any]]) -> Any:
    """`sum_j w_j P_j` over (node, prediction) pairs, newest first."""
    total: Any = 0.0
    for w, (_, p) in zip(weights, past, strict=True):
        total = total + float(w) * p
    return total


def most_intervals(cost: int) -> Callable[..., int]:
    """For loops with `cost` calls an interval and one for the step to sigma = 0: intervals that n calls can take."""
    return lambda calls, **_: (calls + 2 * cost - 2) // cost


def spend(nodes: Nodes, cost: int, calls: int | None, name: str) -> list[int]:
    """Calls of each interval: `cost`, but 1 for the step to sigma = 0, less towards the end where `calls` is short.

    Raises:
        OptionError: if `calls` model calls cannot be spent on these nodes.
    """
    counts = [cost if t.sigma > 0 else 1 for t in nodes[1:]]
    if calls is None:
        return counts
    excess = sum(counts) - calls
    if excess < 0 or calls < len(counts):
        raise OptionError(
            f"sampler {name!r} on {len(nodes)} nodes makes {len(counts)} to {sum(counts)} model calls, not {calls}; "
            f"for {calls} calls give it a grid of {(calls + 2 * cost - 2) // cost} intervals"
        )
    for i in reversed(range(len(counts))):
        cut = min(excess, counts[i] - 1)
        counts[i] -= cut
        excess -= cut
    return counts
