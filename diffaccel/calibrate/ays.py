"""`calibrate.ays`: Align Your Steps on a checkpoint, by dynamic programming on the exact bound of its own images."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..artifact import Artifact, path_identity
from ..core.node import Node, decay
from ..core.path import Nodes, Path
from ..errors import OptionError
from .fit_core import Fitting, Plan
from .fit_guard import Errors, paired, relative
from .fit_run import Functional, Runner, analytic, batches
from .fit_setup import artifact_of, budgets, prepared
from .grid import chain, choose, snapped

KIND = "ays"
BLOCK = 1 << 16  # elements that are turned into float64 at once
UNTIL = (None, 0.05, 0.1, 0.2, 0.3, 0.5)  # ends of the bound that are tried
OTHERS = ("time", "quadratic", "lam")  # grids beside the pipeline's own
WARNING = (
    "for stochastic samplers (dpmpp_2m_sde, ddpm, er_sde): the bound is that of the reverse SDE. For ODE samplers such "
    "as dpmpp it is no criterion, and this grid may be worse than the pipeline's own: see the receipt"
)


def ays(
    pipe: Any,
    prompts: str | os.PathLike[str] | Sequence[str] | None = None,
    calls: int | Sequence[int] = 10,
    *,
    samples: int = 16,
    holdout: int = 16,
    images: Any = None,
    until: float | str | None = "auto",
    seed: int = 0,
    teacher_steps: int = 100,
    rivals: str | None = "usual",
    guidance: float | None = None,
    batch: int = 8,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **call: Any,
) -> Artifact:
    """Nodes that minimise the KL bound of Align Your Steps (arXiv:2404.14507) for this checkpoint.

    The bound of a first-order sampler of the reverse SDE is
    `sum_i Int_{lam_i}^{lam_(i+1)} e^(2 lam) E|D(x_lam) - D(x_(lam_i))|^2 dlam`, with x_lam along forward noising paths
    of images. One such path is drawn for each image, on the teacher's nodes, at one model call a node; the distances
    between all pairs of predictions along it give the bound of every grid on these nodes (trapezoidal rule), and
    dynamic programming gives the least. The published method draws intervals at random and searches by hand.

    It optimises the samples' law under stochastic samplers, not the distance to an ODE's image; the receipt shows both
    on inputs that it was not found on: the bound; the distance to a many-step run of the SDE along the same Brownian
    path; and DPM-Solver++ 2M on this grid against the many-step ODE image, beside stock schedulers.

    Args:
        pipe, prompts, calls, samples, holdout, seed, teacher_steps, rivals, guidance, batch, out, progress, call: as
            of `calibrate.fit`.
        images: latents to noise, (samples + holdout, ...), as the pipeline scales them, in the order of the inputs;
            None: the many-step images of the pipeline itself.
        until: level (sigma/alpha) at which the bound ends; the last call is above it. None: the cleanest level of the
            training path, towards which the bound weighs ever more, whether or not it can be seen in images. "auto":
            the one of `UNTIL` with which the SDE's error on the first `samples` inputs is least, for each budget.

    Returns:
        artifact of kind "ays": `TableScheduler.from_config(config, sampler="dpmpp_2m_sde", grid=artifact)`. Where the
        SDE's error does not fall it holds the pipeline's own grid (uniform in time if that depends on the resolution),
        and the receipt says "no benefit found".

    Raises:
        OptionError: no prompts, numbers out of range, a pipeline that cannot be driven.
        RunError: outputs that are not finite.

    Warns:
        ArtifactWarning: always: what the grid is for.
    """
    plan = Plan(budgets(calls), samples, holdout, teacher_steps, rivals=rivals or "none")
    _check(until)
    how: dict[str, Any] = {"guidance": guidance, "call": call, "batch": batch, "seed": seed, "out": out}
    told = _json(plan, until, "given" if images is not None else "the pipeline's own")
    setup = prepared(KIND, pipe, prompts, plan, told, progress=progress, **how)
    made = setup.made
    given = None if images is None else _given(images, samples + holdout, setup.shape)
    planned = 1 + (2 * teacher_steps + 3) * (samples + holdout) + (teacher_steps + 1) * (holdout + samples)
    planned += sum(n * (samples * (1 + len(UNTIL)) + holdout * (len(OTHERS) + 5 + setup.rivals)) for n in plan.calls)
    with setup.engine.working(planned, KIND, f"\nays: {WARNING}"):
        tables = _all(made, given, until, seed)
    return setup.engine.finish(artifact_of(KIND, told, tables, {"warning": WARNING}, setup.meta(), out, None))


def ays_function(
    predict: Callable[[np.ndarray, Node], np.ndarray],
    path: Path,
    noise: np.ndarray,
    calls: int | Sequence[int] = 10,
    *,
    samples: int = 16,
    images: np.ndarray | None = None,
    until: float | str | None = "auto",
    seed: int = 0,
    teacher_steps: int = 100,
    batch: int = 1 << 30,
) -> Artifact:
    """`ays` for a plain function; the arguments are those of `fit_function`, `images` (len(noise), ...) as of `ays`."""
    noise = np.asarray(noise)
    plan = Plan(budgets(calls), samples, len(noise) - samples, teacher_steps, rivals="none")
    made = Fitting(Functional(predict, path, noise, batch), plan)
    tables = _all(made, None if images is None else np.asarray(images), until, seed)
    meta = {"path": path_identity(path, "sample"), "shape": list(noise.shape[1:])}
    told = _json(plan, until, "given" if images is not None else "the model's own")
    return artifact_of(KIND, told, tables, {"warning": WARNING}, meta, None, None)


# ---------------------------------------------------------------------- the bound
def distances(runner: Runner, inputs: Sequence[int], nodes: Nodes, images: np.ndarray, seed: int) -> np.ndarray:
    """(B, K + 1, K + 1) mean `|D_i - D_j|^2` of each input along one forward noising path.

    The path is drawn from its noisiest node on, which has the same law: its noise part e obeys
    `e_j = r e_i + sqrt(1 - r^2) z`, r the ratio of sigma/alpha. The pipeline begins with noise of its own, so its first
    call is not used.

    Args:
        inputs: at most `runner.batch` of them.
        nodes: K + 1 and the end.
        images: (B, ...), in their order.
        seed: of the paths; input n has its own.
    """
    draws = [np.random.default_rng([seed, n, 0]) for n in inputs]
    found: list[np.ndarray] = []
    noise = images

    def step(i: int, x: np.ndarray, d: np.ndarray) -> np.ndarray | None:
        nonlocal noise
        if i > 0:
            found.append(d.reshape(len(d), -1))
        if i + 1 == len(nodes):
            return d
        z = np.stack([g.standard_normal(x.shape[1:]) for g in draws])
        r = 0.0 if i == 0 else decay(nodes[i - 1], nodes[i])
        noise = r * noise + math.sqrt(1 - r * r) * z
        made: np.ndarray = nodes[i].alpha * images + nodes[i].sigma * noise
        return made.astype(x.dtype)

    runner.run(inputs, Nodes([nodes[0], *nodes], nodes.path), step)
    return _apart(found)


def _apart(predictions: Sequence[np.ndarray]) -> np.ndarray:
    """(B, m, m) mean squared distances of m predictions (B, d)."""
    b, d = predictions[0].shape
    total = np.zeros((b, len(predictions), len(predictions)))
    for start in range(0, d, BLOCK):
        part = np.stack([p[:, start : start + BLOCK] for p in predictions], axis=1).astype(np.float64)
        part = part - part[:, -1:]  # the products of small differences keep their digits
        total += part @ part.swapaxes(1, 2)
    own = np.einsum("bii->bi", total)
    return np.maximum(own[:, :, None] + own[:, None, :] - 2 * total, 0.0) / d


def bounds(apart: np.ndarray, nodes: Sequence[Node]) -> np.ndarray:
    """(..., K, K + 1): the bound's part of a step from node i to node j; inf unless i < j.

    `e^(2 lam) dlam = d(alpha^2/(2 sigma^2))`, which is 0 at pure noise.

    Args:
        apart: (..., K + 1, K + 1) of `distances`.
        nodes: K + 1.
    """
    s = np.array([0.5 * (n.alpha / n.sigma) ** 2 for n in nodes])
    k = len(s) - 1
    found = np.full((*apart.shape[:-2], k, k + 1), np.inf)
    for i in range(k):
        f = apart[..., i, i:]
        found[..., i, i + 1 :] = np.cumsum(0.5 * (f[..., 1:] + f[..., :-1]) * np.diff(s[i:]), axis=-1)
    return found


def of_grid(costs: np.ndarray, chosen: Sequence[int], last: int) -> np.ndarray:
    """(...) the bound of a grid up to place `last`, from `bounds`."""
    pairs = [(i, min(j, last)) for i, j in zip(chosen, [*chosen[1:], last], strict=True) if i < last]
    return np.sum([costs[..., i, j] for i, j in pairs], axis=0)


# ---------------------------------------------------------------------- the SDE
def sde(runner: Runner, inputs: Sequence[int], nodes: Nodes, chosen: Sequence[int], seed: int) -> np.ndarray:
    """Images of the first-order solver of the SDE (DPM-Solver++) on some of `nodes`, along each input's Brownian path.

    Whatever the nodes, an input's path is the same: the noise of a step is what the steps of all nodes between would
    have added, `sum_k e^-(lam_j - lam_(k+1)) sqrt(1 - e^(-2 h_k)) z_k`.
    """
    draws = [np.random.default_rng([seed, n, 1]) for n in inputs]
    last: list[np.ndarray] = []
    places = list(chosen)

    def step(i: int, x: np.ndarray, d: np.ndarray) -> np.ndarray:
        last[:] = [d]
        if i + 1 == len(places):
            return d
        s, t = nodes[places[i]], nodes[places[i + 1]]
        fresh = 0.0 * x
        for k in range(places[i], places[i + 1]):
            z = np.stack([g.standard_normal(x.shape[1:]) for g in draws])
            e = decay(nodes[k], nodes[k + 1])
            fresh = e * fresh + math.sqrt(1 - e * e) * z
        e = decay(s, t)
        made = (t.sigma / s.sigma) * e * x + t.alpha * (1 - e * e) * d + t.sigma * fresh
        return made.astype(x.dtype)

    runner.run(inputs, Nodes([*(nodes[k] for k in places), nodes[-1]], nodes.path), step)
    return last[0]


# ---------------------------------------------------------------------- parts
def _json(plan: Plan, until: float | str | None, images: str) -> dict[str, Any]:
    told = {k: getattr(plan, k) for k in ("samples", "holdout", "teacher_steps", "rivals")}
    return {"calls": list(plan.calls), "images": images, "until": until, **told}


def _given(images: Any, count: int, shape: tuple[int, ...]) -> np.ndarray:
    found = np.asarray(images.detach().cpu().float() if hasattr(images, "detach") else images)
    if found.shape != (count, *shape):
        raise OptionError(f"images must be latents of shape {(count, *shape)}, one for each input, got {found.shape}")
    return found


@dataclass(frozen=True)
class Grid:
    """The nodes of one budget, (N, 3), and what was measured of them."""

    node: np.ndarray
    report: dict[str, Any]

    def tensors(self, calls: int) -> dict[str, np.ndarray]:
        """For the artifact."""
        return {f"n{calls}.node": self.node}


def _last(nodes: Nodes, until: float | None, calls: int) -> int:
    """The place at which the bound ends."""
    levels = np.array([n.level for n in nodes[:-1]])
    if until is not None and not levels[-1] <= until < levels[0]:
        raise OptionError(f"until must be a level from {levels[-1]:.4g} to below {levels[0]:.4g}, got {until!r}")
    found = len(levels) - 1 if until is None else int(np.argmax(levels <= until))
    if found < calls:
        raise OptionError(f"until = {until}: the teacher has {found} nodes above it, too few for {calls} calls")
    return found


def _check(until: float | str | None) -> None:
    if until not in (None, "auto") and (isinstance(until, bool) or not isinstance(until, (int, float))):
        raise OptionError(f"until must be a level (sigma/alpha), None or 'auto', got {until!r}")


def _ends(until: float | str | None, nodes: Nodes, calls: int) -> dict[str, int]:
    """The ends of the bound that are tried, in the receipt's words."""
    _check(until)
    if not isinstance(until, str):
        return {str(until): _last(nodes, until, calls)}
    found = {}
    for level in UNTIL:
        with suppress(OptionError):  # this path does not reach so far, or has too few nodes above
            found[str(level)] = _last(nodes, level, calls)
    return found


class _Job:
    """What all budgets share."""

    def __init__(self, made: Fitting, images: np.ndarray | None, until: float | str | None, seed: int) -> None:
        self.made, self.seed, self.images = made, seed, images
        self.nodes = made.teacher.nodes
        self.ends = {calls: _ends(until, self.nodes, calls) for calls in made.plan.calls}
        made.keeps = False
        made.learn()
        self.fitted, self.held = (self._apart(part) for part in (made.inputs, made.held))
        self._exact: dict[int, np.ndarray] = {}

    def _apart(self, inputs: list[int]) -> np.ndarray:
        """`bounds` of each input."""
        parts = []
        for group in batches(inputs, self.made.runner.batch):

            def compute(group: list[int] = group) -> dict[str, np.ndarray]:
                own = [self.made.teacher.images[n] for n in group] if self.images is None else self.images[group]
                return {"apart": distances(self.made.runner, group, self.nodes, np.stack(list(own)), self.seed)}

            parts.append(self.made.memo(f"apart/{group[0]}", compute)["apart"])
        return bounds(np.concatenate(parts), self.nodes[:-1])

    def chosen(self, calls: int) -> tuple[str, list[int], dict[str, float]]:
        """(end of the bound, nodes, SDE's error on the fitted inputs with each end)."""
        costs = self.fitted.mean(axis=0)
        grids = {name: chain(costs[:k, : k + 1], calls) for name, k in self.ends[calls].items()}
        if len(grids) == 1:
            return (*next(iter(grids.items())), {})
        scores = {name: self.error(name, found, self.made.inputs).geometric for name, found in grids.items()}
        best = min(scores, key=lambda name: scores[name])
        return best, grids[best], scores

    def error(self, name: str, chosen: Sequence[int], inputs: list[int]) -> Errors:
        """Of the SDE's images on these nodes, against those on all nodes."""
        first = inputs[0]
        if first not in self._exact:
            self._exact[first] = self._images(range(self.made.teacher.gram.size), inputs)
        return Errors(name, relative(self._images(chosen, inputs), self._exact[first]))

    def _images(self, chosen: Sequence[int], inputs: list[int]) -> np.ndarray:
        parts = []
        for group in batches(inputs, self.made.runner.batch):

            def compute(group: list[int] = group) -> dict[str, np.ndarray]:
                return {"x": sde(self.made.runner, group, self.nodes, chosen, self.seed)}

            parts.append(self.made.memo(f"sde/{'-'.join(map(str, chosen))}/{group[0]}", compute)["x"])
        return np.concatenate(parts)


def _all(made: Fitting, images: np.ndarray | None, until: float | str | None, seed: int) -> dict[int, Grid]:
    job = _Job(made, images, until, seed)
    return {calls: _placed(job, calls) for calls in made.plan.calls}


def _placed(job: _Job, calls: int) -> Grid:
    made, nodes = job.made, job.nodes
    until, chosen, scores = job.chosen(calls)
    own = made.own(calls)
    base = None if own is None else snapped(own[:-1], nodes[:-1])
    grids: dict[str, list[int] | None] = {"the pipeline's grid": base}
    grids |= {name: choose(name, made.teacher.gram, nodes, calls, None) for name in OTHERS}
    tried = {"AYS": chosen} | {name: found for name, found in grids.items() if found is not None}
    bound = {name: of_grid(job.held, found, job.ends[calls][until]) for name, found in tried.items()}
    error = {name: job.error(name, found, made.held) for name, found in tried.items()}
    against = next(name for name in tried if name != "AYS")
    ratio = [round(v, 4) for v in paired(error["AYS"].values, error[against].values)]
    gain = [round(v, 4) for v in paired(bound["AYS"], bound[against])]
    helps = ratio[2] < 1
    placed = made.teacher.at(chosen)
    ode, _ = made.judged("AYS + DPM++ 2M", calls, placed, analytic(placed, 2), made.usual(calls, 2) or {
        f"DPM++ 2M, {against}": (made.teacher.at(tried[against]), analytic(made.teacher.at(tried[against]), 2))
    })  # fmt: skip
    report: dict[str, Any] = {
        "verdict": "helps stochastic samplers" if helps else f"no benefit found: it holds {against}",
        "base grid": against,
        "the bound ends at sigma/alpha": until if until != "None" else float(f"{nodes[-2].level:.3g}"),
        **({"SDE error on the fitted inputs, by end": scores} if scores else {}),
        "first-order SDE, same Brownian path, held-out [ratio to the base, 95 %]": ratio,
        "SDE errors": [e.summary() for e in error.values()],
        "bound on held-out images [ratio to the base, 95 %]": gain,
        "mean bounds": {name: float(f"{v.mean():.4g}") for name, v in bound.items()},
        "sigma/alpha": [float(f"{n.level:.4g}") if n.alpha else "inf" for n in placed[:-1]],
        "as a grid of an ODE sampler": ode,
    }  # fmt: skip
    kept = placed if helps else own if own is not None else made.teacher.at(tried[against])
    return Grid(np.array([n.key for n in kept[:-1]]), report)
