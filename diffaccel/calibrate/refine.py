"""Gauss-Newton refinement of a table: all rows and nodes together, towards the teacher's image alone.

Rows that are fitted one after the other bring each state near the teacher's; what the last row cannot mend of the
earlier ones stays. Here every coefficient and every node is changed at once by what the image says, with derivatives
by forward differences, images weighted by the inverse of their squared errors (so that the mean of the errors'
logarithms falls, and a few bad images decide nothing), and a damping that cross-validation chooses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.node import Node
from ..core.path import Nodes
from .fit_guard import Errors, relative
from .fit_rows import BLOCK
from .fit_run import Memo, Runner, Tensors, applied, batches, images_of, student

COEFFICIENT, LAM = 0.02, 0.06  # forward differences: wide, to see past the roughness of a trained network
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
FOLDS = 8  # of the cross-validation
FARTHEST = 0.3  # change of a node's lam in a round
CLOSEST = 0.2  # of the distance of two nodes that is left at least
MEMORY = 1 << 28  # bytes of derivatives that are held at once
LEAST = 0.3  # of the median error: smaller ones weigh no more
GAIN = 0.005  # a round must lower the cross-validated score by this much
RISE = 1.1  # and may not raise the root mean square by more: one is cross-validated, the other fitted


def round_cost(calls: int, order: int, *, moves: bool) -> int:
    """Model calls an input of one round, at most."""
    rows = sum(min(order + 1, i + 2) * (calls - 1 - i) for i in range(calls - 1))
    return calls + rows + moves * calls * (calls - 1) // 2 + len(DAMPINGS) * calls


@dataclass(frozen=True)
class Slopes:
    """Of the images of n inputs: derivatives, and the distance to the teacher's images.

    Args:
        products: (n, P, P) of the derivatives with each other.
        slopes: (n, P) of the derivatives with the distance.
        errors: (n,) relative errors.
        scale: (n,) squared norms of the teacher's images.
    """

    products: np.ndarray
    slopes: np.ndarray
    errors: np.ndarray
    scale: np.ndarray

    def step(self, which: np.ndarray, damping: float) -> np.ndarray:
        """The damped Gauss-Newton step (P,) for these inputs."""
        e = self.errors[which]
        weight = 1 / (np.maximum(e, LEAST * np.median(e)) ** 2 * self.scale[which])
        a = np.tensordot(weight, self.products[which], 1)
        b = weight @ self.slopes[which]
        return -np.linalg.lstsq(a + damping * np.diag(np.diag(a)), b, rcond=1e-12)[0]


@dataclass(frozen=True)
class Scores:
    """Of a round: geometric means of the errors of the inputs.

    Args:
        before: of the table that it began with.
        after: of each fold, after the step of the others.
        damping: of that step.
    """

    before: float
    after: float
    damping: float

    @property
    def better(self) -> bool:
        """Whether the round is kept."""
        return self.after < (1 - GAIN) * self.before

    def told(self) -> dict[str, Any]:
        """For a receipt."""
        before, after = (float(f"{v:.4g}") for v in (self.before, self.after))
        return {"from": before, "to": after if math.isfinite(after) else "farther", "kept": self.better}


@dataclass(frozen=True)
class Refiner:
    """Refines tables of one runner.

    Args:
        runner: of the model; must compute in float32 or better.
        images: the teacher's, by input.
        moves: whether nodes move too.
    """

    runner: Runner
    images: dict[int, np.ndarray]
    moves: bool = True

    def rounds(
        self, most: int, inputs: Sequence[int], nodes: Nodes, w: np.ndarray, memo: Memo
    ) -> tuple[list[tuple[Nodes, np.ndarray]], list[dict[str, Any]]]:
        """Rounds until one is not better.

        Returns:
            (the table (nodes, w) as it was and after each round that is kept; what happened, for a receipt).
        """
        told: list[dict[str, Any]] = []
        tables = [(nodes, w)]
        for k in range(most):

            def compute(nodes: Nodes = nodes, w: np.ndarray = w) -> Tensors:
                there, rows, scores = self.round(inputs, nodes, w)
                keys = np.array([n.key for n in there])
                return {"nodes": keys, "w": rows, "scores": np.array([scores.before, scores.after, scores.damping])}

            found = memo(str(k), compute)
            scores = Scores(*(float(v) for v in found["scores"]))
            told.append(scores.told())
            if not scores.better:
                break
            nodes, w = Nodes([Node(*(float(v) for v in key)) for key in found["nodes"]], nodes.path), found["w"]
            tables.append((nodes, w))
        return tables, told

    # ------------------------------------------------------------------ a round
    def round(self, inputs: Sequence[int], nodes: Nodes, w: np.ndarray) -> tuple[Nodes, np.ndarray, Scores]:
        """One round.

        Args:
            inputs: to fit to; each of the folds judges the step of the others.
            nodes, w: the table, w (N, order + 1, ...) normalised.

        Returns:
            (nodes, w, scores): the table after the step for all inputs, with the damping that cross-validation found
            best; as it was where none helps. One that raises the root mean square error is none.
        """
        slopes = self.slopes(inputs, nodes, w)
        before = Errors("", slopes.errors)
        every = np.arange(len(inputs))
        folds = np.array_split(every, min(FOLDS, len(inputs) // 2))
        after: dict[float, Errors] = {}
        for damping in DAMPINGS:
            tables = [self.moved(nodes, w, slopes.step(np.setdiff1d(every, fold), damping)) for fold in folds]
            found = [self.errors([inputs[int(k)] for k in f], *t) for f, t in zip(folds, tables, strict=True)]
            after[damping] = Errors("", np.concatenate(found))
        sound = {d: e.geometric for d, e in after.items() if e.rmse <= RISE * before.rmse}
        damping = min(sound, key=lambda d: sound[d], default=math.inf)
        scores = Scores(before.geometric, sound.get(damping, math.inf), damping)
        there = self.moved(nodes, w, slopes.step(every, damping)) if scores.better else (nodes, w)
        return *there, scores

    def errors(self, inputs: Sequence[int], nodes: Nodes, w: np.ndarray) -> np.ndarray:
        """Relative errors of the table's images."""
        return relative(images_of(self.runner, inputs, nodes, w), self._wanted(inputs))

    def moved(self, nodes: Nodes, w: np.ndarray, step: np.ndarray) -> tuple[Nodes, np.ndarray]:
        """The table after a step; no node comes nearer to a neighbour than `CLOSEST` of their distance."""
        w, places = w.copy(), _places(w)
        for (i, j), by in zip(places, step, strict=False):
            w[i, j] += by
        if not self.moves:
            return nodes, w
        lams = np.array([*(n.lam for n in nodes[:-1]), nodes.path.last.lam])
        room = np.minimum((1 - CLOSEST) / 2 * np.diff(lams), FARTHEST)
        room[-1] = min(lams[-1] - lams[-2], FARTHEST)
        return _at(nodes, lams[1:-1] + np.clip(step[len(places) :], -room[:-1], room[1:])), w

    # ------------------------------------------------------------------ derivatives
    def slopes(self, inputs: Sequence[int], nodes: Nodes, w: np.ndarray) -> Slopes:
        """Derivatives of the images after every coefficient (of all channels together) and every node's lam."""
        size = 4 * self.images[inputs[0]].size * (len(_places(w)) + len(w))  # bytes of an input's derivatives
        together = max(1, min(self.runner.batch, MEMORY // size))
        found = [self._slopes(part, nodes, w) for part in batches(inputs, together)]
        return Slopes(*(np.concatenate([getattr(s, name) for s in found]) for name in Slopes.__dataclass_fields__))

    def _slopes(self, part: Sequence[int], nodes: Nodes, w: np.ndarray) -> Slopes:
        seen: list[list[np.ndarray]] = []

        def see(i: int, features: list[np.ndarray]) -> bool:
            seen.append(features)
            return True

        image = self._run(part, nodes, w, see)
        columns: list[np.ndarray] = []
        for i, j in _places(w):
            if i + 1 == len(w):
                columns.append(seen[i][j])
                continue
            state = applied(w[i], seen[i]) + COEFFICIENT * seen[i][j]
            changed = self._run(part, nodes, w, begin=(i + 1, state, seen[i][1:]))
            columns.append((changed - image) / COEFFICIENT)
        for i in range(1, len(w)) if self.moves else ():
            lams = np.array([n.lam for n in nodes[1:-1]])
            lams[i - 1] += LAM if lams[i - 1] + LAM < nodes.path.last.lam else -LAM
            changed = self._run(part, _at(nodes, lams), w, begin=(i, seen[i][0], seen[i][2:]))
            columns.append((changed - image) / (lams[i - 1] - nodes[i].lam))
        wanted = self._wanted(part).astype(np.float64)
        products, slopes = _summed(columns, image - wanted)
        return Slopes(products, slopes, relative(image, wanted), np.square(wanted.reshape(len(part), -1)).sum(axis=1))

    def _run(
        self,
        part: Sequence[int],
        nodes: Nodes,
        w: np.ndarray,
        seen: Callable[[int, list[np.ndarray]], bool] = lambda i, features: True,
        begin: tuple[int, np.ndarray, list[np.ndarray]] | None = None,
    ) -> np.ndarray:
        images = student(self.runner, part, nodes, w, seen, begin)
        assert images is not None
        return images

    def _wanted(self, part: Sequence[int]) -> np.ndarray:
        return np.stack([self.images[n] for n in part])


def _summed(columns: Sequence[np.ndarray], distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, P, P) products of P columns (n, ...) with each other, and (n, P) with the distance, in float64."""
    rows = [v.reshape(len(distance), -1) for v in (*columns, distance)]
    total = np.zeros((len(distance), len(rows), len(rows)))
    for start in range(0, rows[0].shape[1], BLOCK):
        block = np.stack([v[:, start : start + BLOCK] for v in rows], axis=1).astype(np.float64)
        total += block @ block.swapaxes(1, 2)
    return total[:, :-1, :-1], total[:, :-1, -1]


def _places(w: np.ndarray) -> list[tuple[int, int]]:
    """The coefficients of a table that features exist for."""
    return [(i, j) for i in range(len(w)) for j in range(min(w.shape[1], i + 2))]


def _at(nodes: Nodes, lams: Sequence[float] | np.ndarray) -> Nodes:
    path = nodes.path
    return Nodes([nodes[0], *(path.at_lam(float(v)) for v in lams), nodes[-1]], path)
