"""The runs of a fit: the teacher, rows solved on the student's own states, and how far a table lands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..core.path import Nodes, Path
from ..errors import RunError
from ..samplers.registry import get
from .fit_rows import Gram, moments, normalised, ridge_solve, scale, solved, spread

# step(i, x, d): the state x and x0-prediction d of call i, (B, ...); returns the next state, or None to end the run.
Step = Callable[[int, np.ndarray, np.ndarray], "np.ndarray | None"]
Tensors = dict[str, np.ndarray]
Memo = Callable[[str, Callable[[], Tensors]], Tensors]  # keeps pieces of work by name, for going on after a stop
Target = Callable[[int, Sequence[int]], np.ndarray]  # target(i, inputs): normalised states that row i should give


class Runner(Protocol):
    """Whatever can run the denoiser from the noise of numbered inputs."""

    path: Path
    batch: int

    @property
    def smooth(self) -> bool:
        """Whether the model computes in float32 or better, which forward differences need."""

    def run(
        self,
        inputs: Sequence[int],
        nodes: Nodes,
        step: Step,
        *,
        begin: np.ndarray | None = None,
        precise: bool = False,
    ) -> None:
        """Call the model at `nodes[:-1]`, from `hypot(alpha, sigma) * noise`, with `step` in place of a scheduler.

        Args:
            inputs: at most `batch` of them.
            begin: their states at `nodes[0]`, instead of noise.
            precise: keep the state in float32 between calls where the pipeline itself rounds it to half precision.
        """


@dataclass
class Functional:
    """A runner of a plain function.

    Args:
        predict: `predict(x, node)` gives the x0-prediction, for x (B, ...).
        path: of the model.
        noise: (S, ...) standard normal.
    """

    predict: Callable[[np.ndarray, Any], np.ndarray]
    path: Path
    noise: np.ndarray
    batch: int = 1 << 30
    smooth: bool = True

    def run(
        self,
        inputs: Sequence[int],
        nodes: Nodes,
        step: Step,
        *,
        begin: np.ndarray | None = None,
        precise: bool = False,
    ) -> None:
        x: np.ndarray | None = self.noise[list(inputs)] * scale(nodes[0]) if begin is None else begin
        for i, node in enumerate(nodes[:-1]):
            assert x is not None
            x = step(i, x, np.asarray(self.predict(x, node)))
            if x is None:
                return


@dataclass
class Teacher:
    """What the teacher's runs left.

    Args:
        nodes: K + 1 nodes and the end.
        gram: of the states and predictions of the inputs for fitting.
        images: input -> its image.
        states: (node, input) -> normalised state, for inputs whose states were kept.
    """

    nodes: Nodes
    gram: Gram
    images: dict[int, np.ndarray] = field(default_factory=dict)
    states: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    def target(self, chosen: Sequence[int]) -> Target:
        """For a student at these nodes: the teacher's state at the next one, and its image for the last row."""

        def at(i: int, inputs: Sequence[int]) -> np.ndarray:
            if i + 1 == len(chosen):
                return np.stack([self.images[n] for n in inputs])
            return np.stack([self.states[chosen[i + 1], n] for n in inputs])

        return at

    def at(self, chosen: Sequence[int]) -> Nodes:
        """The nodes of a student."""
        return Nodes([*(self.nodes[k] for k in chosen), self.nodes[-1]], self.nodes.path)


def batches(inputs: Sequence[int], size: int) -> list[list[int]]:
    """The inputs in groups of at most `size`."""
    return [list(inputs[i : i + size]) for i in range(0, len(inputs), size)]


def teach(runner: Runner, inputs: Sequence[int], teacher: Teacher, *, gram: bool, keep: Sequence[int]) -> None:
    """Run DPM-Solver++ 2M on the teacher's nodes; what is asked for is added to `teacher`.

    Args:
        gram: whether the states enter the Gram matrix.
        keep: nodes at which the states are kept.
    """
    nodes, kept = teacher.nodes, set(keep)
    rows = get("dpmpp").trace(nodes).rows
    for group in batches(inputs, runner.batch):
        states: list[np.ndarray] = []
        predictions: list[np.ndarray] = []

        def step(
            i: int,
            x: np.ndarray,
            d: np.ndarray,
            group: Any = group,
            states: Any = states,
            predictions: Any = predictions,
        ) -> np.ndarray:
            _check(i, d, len(nodes) - 1)
            states.append(x / scale(nodes[i]))
            predictions.append(d)
            if i in kept:
                teacher.states.update({(i, n): states[-1][j] for j, n in enumerate(group)})
            if not gram:
                del states[:-1], predictions[:-2]
            out = rows[i].out
            return sum((b * p for b, p in zip(out.p, reversed(predictions), strict=False)), out.x * x)

        runner.run(group, nodes, step, precise=True)
        teacher.images.update({n: predictions[-1][j] for j, n in enumerate(group)})
        if gram:
            teacher.gram.add(states, predictions)


def _check(i: int, d: np.ndarray, calls: int) -> None:
    bad = ~np.isfinite(d.reshape(len(d), -1)).all(axis=1)
    if bad.any():
        raise RunError(
            f"the model's output is not finite at call {i} of {calls}, for input(s) {np.flatnonzero(bad).tolist()} of "
            f"the batch ({d.dtype}); if the model runs in float16, calibrate in bfloat16 or float32"
        )


# ---------------------------------------------------------------------- the student
Seen = Callable[[int, list[np.ndarray]], bool]  # seen(i, features) before row i is applied; False ends the run


def student(
    runner: Runner,
    inputs: Sequence[int],
    nodes: Nodes,
    w: np.ndarray,
    seen: Seen = lambda i, features: True,
    begin: tuple[int, np.ndarray, Sequence[np.ndarray]] | None = None,
) -> np.ndarray | None:
    """Run normalised rows w (N, order + 1, ...) for one batch.

    Args:
        seen: sees `[u_i, D_i, D_{i-1}, ...]`, and may still change `w[i]`.
        begin: (i, u_i, [D_{i-1}, D_{i-2}, ...]): run rows i to the last from there, instead of all from noise.

    Returns:
        the images, or None if `seen` ended the run.
    """
    first, state, before = begin or (0, None, ())
    past = list(before)
    result: list[np.ndarray] = []
    order, calls = w.shape[1] - 1, len(nodes) - 1

    def step(k: int, x: np.ndarray, d: np.ndarray) -> np.ndarray | None:
        i = first + k
        _check(i, d, calls)
        past.insert(0, d)
        del past[order:]
        features = [x / scale(nodes[i]), *past]
        if not seen(i, features):
            return None
        u = applied(w[i], features)
        result[:] = [u]
        return u * scale(nodes[i + 1])

    start = None if state is None else state * scale(nodes[first])
    runner.run(inputs, Nodes(nodes[first:], nodes.path), step, begin=start)
    return result[0] if len(result) and len(past) else None


def applied(row: np.ndarray, features: Sequence[np.ndarray]) -> np.ndarray:
    """What a row makes of its features; coefficients without a feature are left out."""
    return np.asarray(sum(np.asarray(c, f.dtype) * f for c, f in zip(row, features, strict=False)))


def images_of(runner: Runner, inputs: Sequence[int], nodes: Nodes, w: np.ndarray) -> np.ndarray:
    """`student` of any number of inputs."""
    found = [student(runner, group, nodes, w) for group in batches(inputs, runner.batch)]
    assert all(made is not None for made in found)
    return np.concatenate(found)  # type: ignore[arg-type]


def fit_rows(
    runner: Runner,
    inputs: Sequence[int],
    nodes: Nodes,
    target: Target,
    *,
    order: int = 3,
    ridge: float = 1e-4,
    groups: tuple[int, ...] = (),
) -> np.ndarray:
    """Rows for these nodes, each solved on the states that the rows before it really give.

    One pass of N calls if the inputs are one batch; else N passes, the i-th of i calls, which give the same rows.

    Args:
        order: predictions that a row combines.
        ridge: of the pull to DPM-Solver++ 2M.
        groups: () for numbers, or a shape that broadcasts to one sample's: a coefficient for each entry.

    Returns:
        (N, order + 1, *groups) for normalised states.
    """
    parts = batches(inputs, runner.batch)
    if len(parts) == 1:
        return fit_once(runner, inputs, nodes, target, order=order, ridge=ridge, groups=groups)[0]
    base = analytic(nodes, order)
    w = spread(base, groups)
    for i in range(len(nodes) - 1):
        found: list[np.ndarray] = []
        for part in parts:

            def until(k: int, features: list[np.ndarray], i: int = i, part: Any = part, found: Any = found) -> bool:
                if k == i:
                    found.append(len(part) * moments(features, target(i, part), groups))
                return k < i

            student(runner, part, nodes, w, until)
        products = np.sum(found, axis=0) / len(inputs)
        m = products.shape[1]
        w[i, :m] = solved(products, ridge, base[i, :m], groups)
    return w


def fit_once(
    runner: Runner,
    inputs: Sequence[int],
    nodes: Nodes,
    target: Target,
    *,
    order: int,
    ridge: float,
    groups: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray]:
    """`fit_rows` for inputs of one batch, in one pass; also the images that it ends with."""
    base = analytic(nodes, order)
    w = spread(base, groups)

    def seen(i: int, features: list[np.ndarray]) -> bool:
        m = len(features)
        w[i, :m] = solved(moments(features, target(i, inputs), groups), ridge, base[i, :m], groups)
        return True

    images = student(runner, inputs, nodes, w, seen)
    assert images is not None
    return w, images


def analytic(nodes: Nodes, order: int) -> np.ndarray:
    """DPM-Solver++ 2M (first order where `order` is 1) as normalised rows."""
    return normalised(get("dpmpp").trace(nodes, order=min(order, 2)), order)


def start_rows(gram: Gram, nodes: Nodes, chosen: Sequence[int] | None, order: int, ridge: float) -> np.ndarray:
    """(N, order - 1, order + 1) numbers: rows with less history than a whole run has, from the Gram matrix.

    Args:
        chosen: the nodes' places among the teacher's; None: analytic rows.
    """
    n = len(nodes) - 1
    found = np.zeros((n, order - 1, order + 1))
    for i in range(n):
        for past in range(order - 1):
            first = max(i - past, 0)
            base = analytic(nodes[first:], order)[i - first]
            m = i - first + 2
            if chosen is not None:
                f = [chosen[i], *(gram.d(chosen[i - j]) for j in range(m - 1))]
                end = gram.target if i + 1 == n else chosen[i + 1]
                g = gram.products
                base[:m] = ridge_solve(g[np.ix_(f, f)], g[f, end], ridge, base[:m])
            found[i, past] = base
    return found
