"""Experimental: FSampler's gate chooses the nodes of each image, the sampler stays exact.

A skip with a matching predictor leaves a node out of a multistep run. So here the gate only selects nodes, and every
interval is stepped by exact 2M (exponential Adams-Bashforth) through the two latest real predictions of its image: no
predicted value is kept. Functional only: a table is decided before the run, and this is decided during it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.extrapolation import gate_error
from ..core.extrapolation_policy import Count, Gate, Memory
from ..core.grid import native
from ..core.node import Node, decay, step
from ..core.path import Nodes
from ..core.prediction import convert
from ..core.trace import first_order
from ..errors import OptionError
from .common import intervals


@dataclass(frozen=True)
class AdaptiveRun:
    """What `adaptive_nodes` gives.

    Attributes:
        x: (B, ...) states at the last node.
        nodes: for each image the indices of the nodes at which the model was called.
    """

    x: Any
    nodes: list[list[int]]

    @property
    def calls(self) -> list[int]:
        """Model calls of each image."""
        return [len(chosen) for chosen in self.nodes]


def adaptive_nodes(
    model: Callable[[Any, Node], Any],
    x: Any,
    nodes: Nodes,
    *,
    tol: float = 0.003,
    anchor: int = 4,
    max_consecutive: int = 4,
    protect: Sequence[int] = (2, 2),
) -> AdaptiveRun:
    """Exact 2M on nodes that are chosen for each image during the run.

    Args:
        model: `model(x, node)` gives a `Prediction`, or x0, for those images of the batch that need it.
        x: (B, ...) states at `nodes[0]`, array or tensor.
        nodes: from which the gate chooses; a run with `tol` near 0 calls the model at each.
        tol, anchor, max_consecutive, protect: of the gate, which compares predictions of x0 by 3 and by 2 points in
            sigma; see `core.extrapolation_policy.Gate`.

    Raises:
        OptionError: gate options out of range.
    """
    if len(x) < 1:
        raise OptionError("adaptive_nodes needs a batch of 1 or more")
    gate = Gate(tol, anchor, max_consecutive, (int(protect[0]), int(protect[1])))
    images = [_Image() for _ in range(len(x))]
    for i, s, t in intervals(nodes):
        called = [b for b, image in enumerate(images) if not image.skips(gate, i, x[b], nodes)]
        if called:
            answers = convert(model(x[called], s), "x0", x[called], s)
            for k, b in enumerate(called):
                images[b].learn(i, s, answers[k], nodes)
        x = x + 0  # a copy: the caller's states stay as they are
        for b, image in enumerate(images):
            image.count.note(b not in called)
            x[b] = image.stepped(x[b], s, t)
    return AdaptiveRun(x, [image.nodes for image in images])


class _Image:
    """One image of the batch: its real predictions of x0, newest first."""

    def __init__(self) -> None:
        self.memory, self.count = Memory(), Count()
        self.nodes: list[int] = []
        self.latest: list[tuple[float, Any]] = []  # (lam, x0) of the two latest

    def skips(self, gate: Gate, i: int, x: Any, nodes: Nodes) -> bool:
        if gate.refusal(i, len(nodes) - 1, self.count) or len(self.memory.past) < 3:
            return False
        position = native(nodes[i], nodes.path)
        high, low = (self.memory.raw(order, position) for order in (3, 2))
        a, b = first_order(nodes[i], nodes[i + 1])
        return bool(gate_error(high, low, x, (float(a), float(b))) <= gate.tol)

    def learn(self, i: int, node: Node, x0: Any, nodes: Nodes) -> None:
        self.nodes.append(i)
        if math.isfinite(native(node, nodes.path)):
            self.memory.add(native(node, nodes.path), x0)
        # a prediction at alpha = 0 has no place in lam: it serves its own interval only
        self.latest = [(node.lam, x0), *(e for e in self.latest if math.isfinite(e[0]))][:2]

    def stepped(self, x: Any, s: Node, t: Node) -> Any:
        """`x_t = (sigma_t/sigma_s) x + alpha_t ((1 - e^-h) D_s + (h - 1 + e^-h) D')`, D the line in lam."""
        lam, x0 = self.latest[0]
        keep = t.sigma / s.sigma
        gain = 1 - decay(s, t)
        if len(self.latest) < 2 or t.sigma == 0 or not math.isfinite(lam):
            return keep * x + (t.alpha * gain) * x0
        older, old = self.latest[1]
        slope = (x0 - old) / (lam - older)
        at = x0 + (s.lam - lam) * slope
        return keep * x + t.alpha * (gain * at + (step(s, t) - gain) * slope)
