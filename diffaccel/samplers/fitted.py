"""Tables of a checkpoint: rows that were fitted, searched or aligned on it (`calibrate.fit`, `search`, `align`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.linear import Coef, as_coef, fit
from ..core.node import Node
from ..core.path import Nodes
from ..errors import ArtifactError, OptionError
from .dpmpp import dpmpp
from .registry import Calibrated, Options, sampler

KINDS = ("fit", "search", "align")  # of artifacts that hold tables
SAME = 1e-9  # of t, alpha and sigma, relative


@dataclass(frozen=True, eq=False)
class Rows:
    """The fitted rows of one budget of N calls, for the normalised state `u = x/hypot(alpha, sigma)`.

    Row i is `u_{i+1} = w[i, 0] u_i + sum_j w[i, 1 + j] D_{i-j}`, D the x0-predictions.

    Args:
        node: (N, 3) float64: t, alpha, sigma of each call. The run ends at alpha = 1, sigma = 0.
        w: (N, order + 1, *s): numbers, or arrays that broadcast to one sample (s = (C, 1, 1): one for each channel).
        start: (N, order - 1, order + 1, *s): for a run that begins at call k, `start[k + j, j]` is its row j.
    """

    node: np.ndarray
    w: np.ndarray
    start: np.ndarray

    def __len__(self) -> int:
        return len(self.node)

    @property
    def order(self) -> int:
        """How many predictions a row combines, at most."""
        return self.w.shape[1] - 1

    def nodes(self, end: Node) -> list[Node]:
        """The N nodes, and `end`."""
        return [*(Node(*(float(v) for v in row)) for row in self.node), end]

    def holds(self, nodes: Sequence[Node]) -> bool:
        """Whether `nodes` (with their end) are these, or the last of these."""
        n = len(nodes) - 1
        if not 1 <= n <= len(self) or nodes[-1].sigma != 0:
            return False
        return bool(np.allclose([node.key for node in nodes[:-1]], self.node[-n:], rtol=SAME, atol=1e-12))

    def row(self, i: int, past: int) -> tuple[Coef, list[Coef]]:
        """(a, [b_0, b_1, ...]) for states as they are, of call i with `past` earlier predictions at hand."""
        full = min(self.order, i + 1)
        w = self.w[i] if past + 1 >= full else self.start[i, past]
        here = math.hypot(self.node[i, 1], self.node[i, 2])
        there = math.hypot(self.node[i + 1, 1], self.node[i + 1, 2]) if i + 1 < len(self) else 1.0
        return as_coef(w[0] * there / here), [as_coef(v * there) for v in w[1 : min(full, past + 1) + 1]]


@dataclass(frozen=True, eq=False)
class Tables:
    """Fitted rows of several budgets of one checkpoint.

    Args:
        budgets: number of calls -> rows.
        where, kind: the artifact's name and kind, for messages.
    """

    budgets: dict[int, Rows]
    where: str = "tables"
    kind: str = "fit"

    def __str__(self) -> str:
        return f"{self.where} ({', '.join(map(str, sorted(self.budgets)))} calls)"

    @classmethod
    def of(cls, artifact: Any) -> Tables:
        """From an artifact of one of `KINDS`."""
        tensors = artifact.tensors
        found = {n: Rows(*(tensors[f"n{n}.{name}"] for name in ("node", "w", "start"))) for n in artifact.meta["calls"]}
        return cls(found, artifact.file, artifact.kind)

    def rows(self, calls: int) -> Rows:
        """The rows for this many calls.

        Raises:
            ArtifactError: if there are none.
        """
        if calls not in self.budgets:
            held = ", ".join(map(str, sorted(self.budgets)))
            more = "calibrate.extend(artifact, pipe, prompts, " if self.kind == "fit" else f"calibrate.{self.kind}("
            raise ArtifactError(
                f"{self.where} holds tables for {held} calls, not {calls}. Choose one of them, or make one with "
                f"diffaccel.{more}..., calls={calls})"
            )
        return self.budgets[calls]

    def on(self, nodes: Nodes) -> Rows:
        """The rows whose nodes these are, or end with these.

        Raises:
            ArtifactError: if there are none: rows belong to their nodes.
        """
        found = [rows for rows in self.budgets.values() if rows.holds(nodes)]
        if not found:
            shown = ", ".join(f"{node.t:.5g}" for node in nodes[:-1])
            held = "\n".join(
                f"  {n} calls: t = {', '.join(f'{t:.5g}' for t in rows.node[:, 0])}" for n, rows in self.budgets.items()
            )
            raise ArtifactError(
                f"{self.where} holds no table on the nodes of this run.\n{held}\n  this run: t = {shown}\nThe nodes "
                "belong to the artifact: leave the grid, sigmas and timesteps to it."
            )
        return min(found, key=len)


def placed(nodes: Nodes, options: Options) -> Nodes:
    """The artifact's nodes for as many calls; the last nodes of one of its tables stay."""
    tables = options["tables"]
    if tables is None or any(rows.holds(nodes) for rows in _checked(tables).budgets.values()):
        return nodes
    return Nodes(tables.rows(len(nodes) - 1).nodes(nodes.path.end), nodes.path)


def _checked(tables: Any) -> Tables:
    if not isinstance(tables, Tables):
        raise OptionError(f"sampler 'fitted': tables must be those of an artifact, got {tables!r}; pass artifact=FILE")
    return tables


@sampler(
    "fitted",
    order=2,
    paper="rows fitted to the checkpoint; without them DPM-Solver++ 2M (arXiv:2211.01095)",
    place=placed,
    calibrated=Calibrated(
        kind=KINDS,
        option="tables",
        read=Tables.of,
        command="diffaccel calibrate fit MODEL --calls 5 8 --prompts FILE --out fit.safetensors",
        without="Without one, take sampler='dpmpp', which fitted tables start from.",
        nodes=True,
    ),
)
def fitted(x: Any, nodes: Nodes, predict: Any, noise: Any, *, tables: Tables | None = None) -> Any:
    """`x_t = a x_s + sum_j b_j D_j`, a and b_j by ridge regression on the checkpoint's own trajectories.

    A fitted table has no order of convergence: it belongs to its nodes and to its number of calls. A run that begins
    in the middle uses rows that were fitted with less history.

    Args:
        tables: of `calibrate.fit`, `calibrate.search` or `calibrate.align`; None is DPM-Solver++ 2M.
    """
    if tables is None:
        return dpmpp(x, nodes, predict, noise)
    rows = _checked(tables).on(nodes)
    past: list[Any] = []
    first = len(rows) - (len(nodes) - 1)
    for j, s in enumerate(nodes[:-1]):
        past = [predict(x, s), *past][: rows.order]
        a, b = rows.row(first + j, len(past) - 1)
        x = x * fit(a, x)
        for coefficient, d in zip(b, past, strict=True):
            x = x + d * fit(coefficient, d)
    return x
