"""Search of DC-Solver's ratios on a checkpoint (arXiv:2409.03755), without autograd and without a gradient's memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from ..artifact import Artifact, path_identity
from ..core.node import Node
from ..core.path import Nodes
from ..core.prediction import pair
from ..core.table import Table
from ..errors import OptionError, one_of
from ..identity import model_identity
from ..parallel.protocol import World
from ..samplers.dc import PARENTS
from ..samplers.registry import get
from ..schedulers import TableScheduler
from ..schedulers.settings import output_of
from .cpr import fit_cpr
from .engine import Batch, Captured, Engine
from .validate import FEWEST, best_stock, ends, errors, over_processes, verdict

BOUNDS = (0.3, 2.0)
TOLERANCE = 1e-2
EVALUATIONS = 12
GAIN = 0.99  # a ratio must bring the calibration loss below this share of what 1 gives

Raw = tuple[torch.Tensor, torch.Tensor]  # (state as the model saw it, its output)


@dataclass
class Student:
    """The sampler that is calibrated, on its nodes; replays runs whose model outputs are known.

    Args:
        name: of the compensated sampler.
        parent: its parent.
        options: complete options of the parent.
        k: `dc_order`.
        config: of a scheduler of ours for the pipeline, with its grid.
        nodes: N + 1.
    """

    name: str
    parent: str
    options: dict[str, Any]
    k: int
    config: Mapping[str, Any]
    nodes: Nodes
    _open: Nodes = field(init=False)

    def __post_init__(self) -> None:
        # The corrector at the last call is looked at on its own, which a step to sigma = 0 would hide (a = 0).
        last, end = self.nodes[-2:]
        opened = Node(end.t, last.alpha, 0.5 * last.sigma) if end.sigma == 0 else end
        self._open = Nodes([*self.nodes[:-1], opened], self.nodes.path)

    def __len__(self) -> int:
        return len(self.nodes) - 1

    def table(self, rho: Sequence[float], nodes: Nodes | None = None, **changed: Any) -> Table:
        """With these ratios (missing ones are 1)."""
        full = [*rho, *[1.0] * (len(self) - len(rho))]
        return get(self.name).trace(nodes or self.nodes, **{**self.options, **changed}, dc_order=self.k, ratios=full)

    def state(self, table: Table, raws: Sequence[Raw], upto: int) -> torch.Tensor:
        """The state at node `upto`, from the outputs of the calls before."""
        known, output = iter(raws), output_of(self.config)

        def predict(_: torch.Tensor, node: Node, space: Any) -> Any:
            seen, raw = next(known)
            u, w = pair(output, space, node)
            return u * seen + w * raw

        state: torch.Tensor = Table(table.rows[:upto]).apply(raws[0][0], predict)
        return state

    def corrects(self, j: int) -> bool:
        """Whether there is a corrector at node j."""
        how = self.options.get("corrector", False)
        return bool(how is True or (how is not False and j - 1 not in how)) and 0 < j < len(self)

    def corrected(self, rho: Sequence[float], raws: Sequence[Raw], x: torch.Tensor) -> torch.Tensor:
        """The state at node `len(raws) - 1` after its corrector, from x before it."""
        j = len(raws) - 1
        if not self.corrects(j):
            return x
        how = self.options["corrector"]
        off = [*([] if how is True else how), j - 1]
        with_, without = self.table(rho, self._open), self.table(rho, self._open, corrector=off)
        change = self.state(with_, raws, j + 1) - self.state(without, raws, j + 1)
        return x + change / float(with_.rows[j].a)

    def scheduler(self, rho: Sequence[float] | None) -> Captured:
        """For the pipeline: with ratios, or the parent."""
        if rho is None:
            return Captured.of(self.config, self.parent, self.options)
        extra = {"dc_order": self.k, "ratios": list(rho)}
        return Captured.of(self.config, self.name, {**self.options, **extra})


def refined(nodes: Nodes, calls: int) -> tuple[Nodes, list[int]]:
    """About `calls` intervals that contain `nodes`, uniform in lam within each of theirs, and where those are.

    From alpha = 0, where lam is infinite, they are uniform in t; to sigma = 0 they go to the end of the training range.
    """
    path, found, at = nodes.path, [nodes[0]], [0]
    each = max(1, round(calls / (len(nodes) - 1)))
    for s, t in pairwise(nodes):
        shares = np.arange(1, each) / each
        if s.alpha == 0:
            inner = [path.at(float(s.t + r * (t.t - s.t))) for r in shares]
        else:
            stop = t.lam if t.sigma > 0 else max(path.last.lam if path.last.sigma > 0 else s.lam + 3.0, s.lam + 0.5)
            inner = [path.at_lam(float(s.lam + r * (stop - s.lam))) for r in shares]
        found += [*inner, t]
        at.append(len(found) - 1)
    return Nodes(found, path), at


# ---------------------------------------------------------------------- pieces of work
TEACHER = {"order": 3, "form": "exact"}


def teacher_states(engine: Engine, tag: str, batches: Sequence[Batch], student: Student, calls: int) -> np.ndarray:
    """The teacher's states at the student's nodes, (n, N + 1, ...) float32."""
    nodes, at = refined(student.nodes, calls)
    place = {node: k for k, node in enumerate(at)}

    def work(batch: Batch) -> dict[str, np.ndarray]:
        kept: list[np.ndarray] = [np.zeros(0)] * len(at)

        def see(i: int, sample: torch.Tensor, output: torch.Tensor, state: torch.Tensor) -> None:
            if i in place:
                kept[place[i]] = sample.detach().float().cpu().numpy()
            kept[-1] = state.detach().float().cpu().numpy() if i + 2 == len(nodes) else kept[-1]

        engine.run(batch, Captured.of(student.config, "dpmpp", TEACHER, see=see, nodes=nodes), len(nodes) - 1)
        return {"x": np.stack(kept, axis=1)}

    return engine.accumulate(tag, batches, work, _joined, gather=False)["x"]


def _joined(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: np.concatenate([a[key], b[key]]) for key in a}


class Search:
    """The greedy search of one run's ratios, node by node.

    At node i the ratio minimises the squared distance to the teacher of the state at node i + 1 after its corrector
    (the end of the run for the last node), by bounded Brent, at most 12 evaluations.

    Args:
        engine: of the calibration.
        tag: name of this run, for going on after a stop.
        student: the sampler.
        batches: calibration images of this process.
        teacher: their `teacher_states`, (n, N + 1, ...).
    """

    def __init__(
        self, engine: Engine, tag: str, student: Student, batches: Sequence[Batch], teacher: np.ndarray
    ) -> None:
        self.engine, self.tag, self.student, self.batches = engine, tag, student, batches
        edges = np.cumsum([0, *map(len, batches)])
        self.targets = [torch.tensor(teacher[a:b], dtype=torch.float64) for a, b in pairwise(edges)]
        self.losses: dict[str, float] = engine.kept.notes.setdefault(f"{tag}/losses", {})

    def ratios(self) -> list[float]:
        """The N ratios."""
        student = self.student
        rho: list[float] = []
        raws = [[self._call(k, 0, None)] for k in range(len(self.batches))]
        for i in range(len(student)):
            value = 1.0 if i < student.k else self._best(i, rho, raws)
            rho.append(value)
            if i + 1 < len(student):
                for k, own in enumerate(raws):
                    own.append(self._call(k, i + 1, student.state(student.table(rho), own, i + 1)))
        self.ends = [student.state(student.table(rho), own, len(student)) for own in raws]
        return rho

    def _best(self, i: int, rho: list[float], raws: list[list[Raw]]) -> float:
        def loss(value: float) -> float:
            return self._loss(i, [*rho, float(value)], raws)

        plain = loss(1.0)
        limits = {"xatol": TOLERANCE, "maxiter": EVALUATIONS - 1}
        found = minimize_scalar(loss, bounds=BOUNDS, method="bounded", options=limits)
        return float(found.x) if found.fun < GAIN * plain else 1.0

    def _loss(self, i: int, rho: list[float], raws: list[list[Raw]]) -> float:
        key = f"{i}/{rho[-1].hex()}"
        if key not in self.losses:
            parts = [self._distance(k, i, rho, own) for k, own in enumerate(raws)]
            mine = np.sum(np.array(parts), axis=0) if parts else np.zeros(2)
            sums = [np.frombuffer(p) for p in self.engine.world.gather("loss", mine.tobytes(), timeout=None)]
            squares, count = np.sum(sums, axis=0)
            self.losses[key] = float(squares / count)
            self.engine.tick()
        return self.losses[key]

    def _distance(self, k: int, i: int, rho: list[float], raws: list[Raw]) -> tuple[float, float]:
        """(sum of squares, count) of one batch."""
        student, target = self.student, self.targets[k][:, i + 1]
        x = student.state(student.table(rho), raws, i + 1)
        if student.corrects(i + 1):
            raw = self.engine.output(self.batches[k], student.nodes[i + 1], x, student.config)
            x = student.corrected(rho, [*raws, raw], x)
        return float((x - target).square().sum()), float(x.numel())

    def _call(self, k: int, i: int, x: torch.Tensor | None) -> Raw:
        """The call at node i of the run with the ratios found; kept for going on after a stop."""
        name = f"{self.tag}/call/{i}/{k}"
        arrays = self.engine.kept.arrays
        if f"{name}/x" not in arrays:
            seen, raw = self.engine.output(self.batches[k], self.student.nodes[i], x, self.student.config)
            arrays[f"{name}/x"], arrays[f"{name}/o"] = seen.numpy(), raw.numpy()
            self.engine.tick()
        return torch.from_numpy(arrays[f"{name}/x"].copy()), torch.from_numpy(arrays[f"{name}/o"].copy())


# ---------------------------------------------------------------------- the calibration
def dc(
    pipe: Any,
    prompts: Sequence[str],
    *,
    calls: Sequence[int] = (5, 8, 10),
    guidance: float | Sequence[float] | None = None,
    sampler: str = "unipc",
    dc_order: int = 2,
    grid: str | None = None,
    grid_options: Mapping[str, Any] | None = None,
    final_sigmas_type: str | None = None,
    pairs: int = 16,
    held_out: int = 32,
    teacher_calls: int = 100,
    call: Mapping[str, Any] | None = None,
    batch: int = 8,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    world: World | None = None,
    **options: Any,
) -> Artifact:
    """Search the ratios of DC-Solver on the user's checkpoint.

    Every ratio list is validated on other noise and prompts against the sampler without it; where the paired interval
    of the errors does not lie below zero, the artifact holds ratios of 1 and says "no benefit found".

    Args:
        pipe: a diffusers pipeline; its own call is what runs.
        prompts: used in turn.
        calls: numbers of model calls N to search for.
        guidance: scale, or several; None: the pipeline's own.
        sampler: the parent: "unipc", "dpmpp" or "ddim".
        dc_order: K.
        grid, grid_options, final_sigmas_type: as in `TableScheduler`; ratios belong to one grid.
        pairs: calibration images. held_out: images for validation.
        teacher_calls: of the teacher (exact Adams, order 3), about.
        call: further arguments of the pipeline's call.
        batch: images in one pass.
        seed: of the first image.
        out: where the artifact is written; a stopped calibration goes on from `OUT.partial`.
        options: of the parent.

    Raises:
        OptionError: an unknown sampler or option, or too few images.
    """
    name = PARENTS[one_of("sampler", sampler, PARENTS)]
    parent = get(sampler)
    complete = parent.options(options)
    scales = list(guidance) if isinstance(guidance, Sequence) else [guidance]
    if pairs < 2 or held_out < FEWEST or not calls or min(calls) < dc_order + 1:
        raise OptionError(
            f"dc needs 2 pairs, {FEWEST} held_out images (the interval is over them) and more calls than dc_order = "
            f"{dc_order}, or more: got pairs={pairs}, held_out={held_out}, calls={list(calls)}"
        )
    chosen = {"grid": grid, "grid_options": dict(grid_options or {}) or None, "final_sigmas_type": final_sigmas_type}
    placed = {key: value for key, value in chosen.items() if value is not None}
    config = TableScheduler.from_config(pipe.scheduler.config, sampler=sampler, **options, **placed).config
    settings: dict[str, Any] = {
        "kind": "dc",
        "calls": list(calls),
        "scales": scales,
        "sampler": sampler,
        "options": complete,
    }
    settings |= {"dc_order": dc_order, "pairs": pairs, "held_out": held_out, "teacher": teacher_calls, **placed}
    settings["model"] = model_identity(pipe)
    engine = Engine(
        pipe, prompts, call=call, batch=batch, seed=seed, out=out, settings=settings, progress=progress, world=world
    )
    runs: list[dict[str, Any]] = []
    tensors: dict[str, np.ndarray] = {}
    expected = _expected(calls, len(scales), pairs, held_out, teacher_calls, dc_order) // engine.world.size
    with engine.working(expected, "calibrate dc"):
        for scale in scales:
            engine.guide(scale)
            for n in calls:
                nodes, shape = _nodes(engine, config, n)
                student = Student(name, sampler, complete, dc_order, config, nodes)
                rho, run = _run(engine, student, scale, pairs, held_out, teacher_calls)
                j = len(runs)
                tensors[f"ratios_{j}"] = np.array(rho)
                tensors[f"t_{j}"] = np.array([node.t for node in nodes[:-1]])
                tensors[f"lam_{j}"] = np.array([node.lam for node in nodes])
                runs.append(run)
        cost = engine.cost
    cpr = fit_cpr([(run["calls"], run["guidance"], tensors[f"ratios_{j}"]) for j, run in enumerate(runs)])
    helped = sum(run["helps"] for run in runs)
    told = {key: config[key] for key in ("grid", "grid_options", "final_sigmas_type") if config[key] is not None}
    meta: dict[str, Any] = {
        "runs": [{key: run[key] for key in ("calls", "guidance", "helps")} for run in runs],
        "options": {"sampler": name, **complete, "dc_order": dc_order},
        "scheduler": {"sampler": name, "options": {**complete, "dc_order": dc_order}, **told},
        "path": path_identity(nodes.path, config["prediction_type"]),
        "model": settings["model"],
        "guidance": scales[0] if len(scales) == 1 else None,
        "shape": shape,
        "calls": list(calls),
        "seeds": {"calibration": [seed, seed + pairs - 1], "held_out": [seed + pairs, seed + pairs + held_out - 1]},
        "torch": torch.__version__,
        "cost": cost,
        "box": cpr and cpr.box,
        "receipt": {
            "result": f"{helped} of {len(runs)} runs improved on held-out noise" if helped else "no benefit found",
            **{_label(run["calls"], run["guidance"]): run["receipt"] for run in runs},
            **({"polynomial": cpr.receipt} if cpr else {}),
            "model calls": cost["calls"],
            "seconds": cost["seconds"],
        },
    }
    made = Artifact("dc", tensors | ({"cpr": cpr.coef} if cpr else {}), meta, os.path.basename(out or ""))
    if out is not None and engine.world.rank == 0:
        made.save(out)
    engine.kept.remove()
    return made


def _label(calls: int, guidance: float | None) -> str:
    return f"{calls} calls" + ("" if guidance is None else f", guidance {guidance:g}")


def _expected(calls: Sequence[int], scales: int, pairs: int, held_out: int, teacher: int, k: int) -> int:
    """Model calls, about; the bar's length."""
    searched = sum(pairs * (teacher + 2 * n + EVALUATIONS * max(0, n - 1 - k)) for n in calls)
    return scales * (searched + held_out * (teacher + sum(10 * n for n in calls)))


class _Enough(Exception):
    """Ends a pipeline's run after the call that was wanted."""


def _nodes(engine: Engine, config: Mapping[str, Any], calls: int) -> tuple[Nodes, list[int]]:
    """The nodes that the pipeline makes at this number of calls (a resolution may shift them), and a sample's shape."""
    shape: list[int] = []

    def stop(i: int, sample: torch.Tensor, output: torch.Tensor, state: torch.Tensor) -> None:
        shape.extend(sample.shape[1:])
        raise _Enough

    scheduler = Captured.of(config, "ddim", see=stop)
    with suppress(_Enough):
        engine.run(Batch(0, (engine.prompts[0],), (engine.seed,)), scheduler, calls)
    return scheduler.nodes, shape


def _run(
    engine: Engine, student: Student, guidance: float | None, pairs: int, held_out: int, teacher_calls: int
) -> tuple[list[float], dict[str, Any]]:
    """Search and validation of one number of calls: the ratios to ship, and what is known of them."""
    n, tag = len(student), f"g{guidance}/N{len(student)}"
    batches, held = engine.batches(0, pairs), engine.batches(pairs, held_out)
    teacher = teacher_states(engine, f"{tag}/teacher", batches, student, teacher_calls)
    search = Search(engine, tag, student, batches, teacher)
    rho = search.ratios()
    target = teacher[:, -1]
    with_ = over_processes(engine, f"{tag}/train", errors(np.concatenate([z.numpy() for z in search.ends]), target))
    plain = ends(engine, f"{tag}/train/parent", batches, lambda: student.scheduler(None), n)
    without = over_processes(engine, f"{tag}/train/plain", errors(plain, target))

    nodes, _ = refined(student.nodes, teacher_calls)
    last = ends(
        engine,
        f"{tag}/valid/teacher",
        held,
        lambda: Captured.of(student.config, "dpmpp", TEACHER, nodes=nodes),
        len(nodes) - 1,
    )
    pair_ = [
        over_processes(engine, f"{tag}/{what}/errors", errors(ends(engine, f"{tag}/{what}", held, make, n), last))
        for what, make in (
            ("valid/parent", lambda: student.scheduler(None)),
            ("valid/compensated", lambda: student.scheduler(rho)),
        )
    ]
    found = verdict(*pair_)
    receipt: dict[str, Any] = {
        "searched ratios": [round(r, 4) for r in rho],
        "calibration error": {"parent": float(without.mean()), "compensated": float(with_.mean())},
        "held-out error": found.to_json(),
        "best stock scheduler": best_stock(engine, f"{tag}/stock", held, last, n, engine.pipe.scheduler.config),
    }
    helps = found.helps and any(r != 1 for r in rho)
    return rho if helps else [1.0] * n, {"calls": n, "guidance": guidance, "helps": helps, "receipt": receipt}
