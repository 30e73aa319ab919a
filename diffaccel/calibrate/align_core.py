"""Fed timesteps: the model is told another t at each call, the state keeps its level. Knows no pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..core.node import Node
from ..core.path import Nodes
from .fit_core import Fitting
from .fit_guard import Errors
from .fit_run import batches, student

STEP = 0.05  # of the differences, in units of a node's gap
DAMPING = 1e-3  # Levenberg's, at first
TRIES = 3  # times that a step is damped ten times more before a round is given up


class Aligning:
    """The fed timesteps of one table, fitted to the images of the teacher.

    The parameters are shifts in units of a node's gap (the mean distance in t of its neighbours).

    Args:
        made: teacher and inputs.
        nodes: of the table, with their end.
        w: its normalised rows.
        reach: largest shift.
    """

    def __init__(self, made: Fitting, nodes: Nodes, w: np.ndarray, reach: float) -> None:
        self.made, self.nodes, self.w, self.reach = made, nodes, w, reach
        self.name = f"align/{len(w)}/{'-'.join(f'{n.t:.6g}' for n in nodes[:-1])}"
        self.units = gaps([node.t for node in nodes])

    def at(self, shifts: np.ndarray) -> Nodes:
        """The nodes with what the model is fed there."""
        path = self.nodes.path
        low, high = sorted((path.first.t, path.last.t))
        fed = [min(max(n.t + float(d), low), high) for n, d in zip(self.nodes, shifts * self.units, strict=False)]
        moved = [Node(t, n.alpha, n.sigma) for t, n in zip(fed, self.nodes, strict=False)]
        return Nodes([*moved, self.nodes[-1]], path)

    @property
    def halves(self) -> tuple[list[int], list[int]]:
        """The inputs that steps are computed on in turn."""
        half = len(self.made.inputs) // 2
        return self.made.inputs[:half], self.made.inputs[half:]

    def fitted(self, shifts: np.ndarray) -> float:
        """Geometric mean of the errors of both halves."""
        return Errors("", np.concatenate([self.errors(shifts, part).values for part in self.halves])).geometric

    def errors(self, shifts: np.ndarray, inputs: Sequence[int]) -> Errors:
        """Relative errors of the images."""
        name = f"{self.name}/{shifts.tobytes().hex()}/{inputs[0]}-{inputs[-1]}"
        return self.made.errors(name, self.at(shifts), self.w, inputs)

    def equations(self, shifts: np.ndarray, inputs: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(J'J, J'r) of the residuals, each image's divided by its size: a step lowers the mean log error.

        J is by differences; batches add up.
        """
        n = len(shifts)
        path = self.nodes.path
        low, high = sorted((path.first.t, path.last.t))

        def compute() -> dict[str, np.ndarray]:
            total = np.zeros((n, n + 1))
            for group in batches(inputs, self.made.runner.batch):
                target = np.stack([self.made.teacher.images[k] for k in group]).astype(np.float64)
                base = self._images(shifts, group)
                size = np.linalg.norm((base - target).reshape(len(group), -1), axis=1)
                columns = []
                for i in range(n):
                    inside = low <= self.nodes[i].t + (shifts[i] + STEP) * self.units[i] <= high
                    step = STEP if inside else -STEP
                    moved = self._images(shifts + step * np.eye(n)[i], group)
                    columns.append((moved - base) / step)
                rows = np.stack([*columns, base - target], axis=1).reshape(len(group), n + 1, -1)
                rows = rows / np.maximum(size, 1e-300)[:, None, None]
                total += np.einsum("bid,bjd->ij", rows[:, :n], rows)
            return {"total": total}

        name = f"{self.name}/J{shifts.tobytes().hex()}/{inputs[0]}-{inputs[-1]}"
        found = self.made.memo(name, compute)["total"]
        return found[:, :n], found[:, n]

    def _images(self, shifts: np.ndarray, group: Sequence[int]) -> np.ndarray:
        made = student(self.made.runner, group, self.at(shifts), self.w)
        assert made is not None
        return made.astype(np.float64)

    def _moved(self, shifts: np.ndarray, a: np.ndarray, b: np.ndarray, damping: float) -> np.ndarray:
        """One step within reach; what it would carry beyond stays at the limit, and the others are solved anew."""
        free, tried = np.ones(len(b), bool), shifts
        while free.any():
            step = np.zeros(len(b))
            step[free] = solved(
                a[np.ix_(free, free)], b[free] + a[np.ix_(free, ~free)] @ (tried - shifts)[~free], damping
            )
            wanted = np.where(free, shifts + step, tried)
            tried = np.clip(wanted, -self.reach, self.reach)
            if np.array_equal(tried, wanted):
                break
            free &= tried == wanted
        return tried

    def run(self, rounds: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Gauss-Newton steps with Levenberg's damping.

        Each is computed on one half of the inputs, in turn, and kept only if the error of both halves falls.

        Returns:
            (shifts, what each kept round did).
        """
        parts = self.halves
        shifts, damping, refused = np.zeros(len(self.w)), DAMPING, 0
        best = [self.errors(shifts, part).geometric for part in parts]
        told: list[dict[str, Any]] = []
        for k in range(rounds):
            a, b = self.equations(shifts, parts[k % 2])
            found = None
            for _ in range(TRIES + 1):
                tried = self._moved(shifts, a, b, damping)
                values = [self.errors(tried, part).geometric for part in parts]
                if all(new < old for new, old in zip(values, best, strict=True)):
                    found = (tried, values)
                    break
                damping *= 10
            if found is None:
                refused += 1
                if refused == 2:  # neither half gives a step that helps the other
                    break
                continue
            (shifts, best), damping, refused = found, max(damping / 10, 1e-9), 0
            told.append({"fitted half": float(f"{best[k % 2]:.4g}"), "other half": float(f"{best[1 - k % 2]:.4g}")})
        return shifts, told


def gaps(t: Sequence[float]) -> np.ndarray:
    """The mean distance of each t (but the last) to its neighbours."""
    between = [abs(a - b) for a, b in pairwise(t)]
    return np.array([between[0], *((a + b) / 2 for a, b in pairwise(between))])


def solved(a: np.ndarray, b: np.ndarray, damping: float) -> np.ndarray:
    """`-(A + damping diag A)^-1 b`; 0 for a parameter that changes nothing."""
    diagonal = np.diag(a).copy()
    dead = diagonal <= 1e-14 * max(float(diagonal.max()), 1e-300)
    diagonal[dead] = 1.0
    matrix = a + np.diag(damping * diagonal) + np.diag(dead.astype(float))
    return np.where(dead, 0.0, -np.linalg.solve(matrix, b))


def cost(calls: int, samples: int, rounds: int) -> int:
    """Model calls of one budget, at most."""
    half = -(-samples // 2)
    return calls * (samples + rounds * (half * (calls + 1) + samples * (TRIES + 1)))
