"""What several loops share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from ..core.node import Node, decay
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
