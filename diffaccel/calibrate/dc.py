"""Search of DC-Solver's ratios on a checkpoint (arXiv:2409.03755), without autograd and without a gradient's memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from ..artifact import Artifact, path_identity
from ..core.path import Nodes
from ..errors import OptionError, one_of
from ..identity import model_identity
from ..parallel.protocol import World
from ..samplers.dc import PARENTS
from ..samplers.registry import get
from ..schedulers import TableScheduler
from .captured import Captured
from .cpr import fit_cpr
from .dc_search import BOUNDS, EVALUATIONS, OBJECTIVES, TEACHER, TOLERANCE, Search, Student, refined, teacher_states
from .engine import Batch, Engine
from .validate import FEWEST, STOCK, best_stock, ends, errors, finite, over_processes, run_errors, verdict


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
    bounds: tuple[float, float] = BOUNDS,
    objective: str = "trajectory",
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
        bounds: of a ratio.
        objective: "trajectory": each ratio brings the next state nearer to the teacher's; "final": a second sweep then
            brings the last state nearer, at most 13 (N - 2)(N - 3)/2 more calls a pair with `dc_order` 2.
        call: further arguments of the pipeline's call.
        batch: images in one pass.
        seed: of the first image.
        out: where the artifact is written; a stopped calibration goes on from `OUT.partial`.
        options: of the parent.

    Raises:
        OptionError: an unknown sampler or option, or too few images.
    """
    if not (len(bounds) == 2 and bounds[0] < 1 < bounds[1]):
        raise OptionError(f"bounds are two numbers around 1, got {bounds!r}")
    one_of("objective", objective, OBJECTIVES)
    name = PARENTS[one_of("sampler", sampler, PARENTS)]
    parent = get(sampler)
    complete = parent.options(options)
    scales: list[float | None] = list(guidance) if isinstance(guidance, Sequence) else [guidance]
    processes = 1 if world is None else world.size
    few = pairs < max(2, processes) or held_out < max(FEWEST, processes)
    if few or not calls or min(calls) < dc_order + 1:
        raise OptionError(
            f"dc needs 2 pairs, {FEWEST} held_out images (the interval is over them; one of each for a process) and "
            f"more calls than dc_order = {dc_order}, or more: got pairs={pairs}, held_out={held_out}, "
            f"calls={list(calls)}, {processes} process(es)"
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
    settings |= {"bounds": list(bounds), "objective": objective}
    settings["model"] = model_identity(pipe)
    engine = Engine(
        pipe, prompts, guidance=scales[0], call=call, batch=batch, seed=seed, out=out, settings=settings,
        progress=progress, world=world,
    )  # fmt: skip
    scales[0] = engine.guidance  # it may have been given as an argument of the call
    runs: list[dict[str, Any]] = []
    tensors: dict[str, np.ndarray] = {}
    expected = _expected(calls, len(scales), pairs, held_out, teacher_calls, dc_order, objective)
    with engine.working(expected // engine.world.size, "calibrate dc"):
        for scale in scales:
            engine.guide(scale)
            finest, _ = nodes_of(engine, config, max(calls))
            held = held_out_teacher(engine, f"g{scale}/valid/teacher", config, finest, pairs, held_out, teacher_calls)
            for n in calls:
                nodes, shape = nodes_of(engine, config, n)
                student = Student(name, sampler, complete, dc_order, config, nodes)
                rho, run = _run(engine, student, scale, pairs, teacher_calls, (bounds, objective), held)
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
        "objective": objective,
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
    return engine.finish(made)


def _label(calls: int, guidance: float | None) -> str:
    return f"{calls} calls" + ("" if guidance is None else f", guidance {guidance:g}")


def _expected(
    calls: Sequence[int], scales: int, pairs: int, held_out: int, teacher: int, k: int, objective: str
) -> int:
    """Model calls, about; the bar's length."""
    searched = sum(pairs * (teacher + 2 * n + EVALUATIONS * max(0, n - 1 - k)) for n in calls)
    if objective == "final":
        searched += sum(pairs * (EVALUATIONS + 1) * sum(range(max(0, n - k))) for n in calls)
    return scales * (searched + held_out * (teacher + sum((2 + len(STOCK) // 2) * n for n in calls)))


class _Enough(Exception):
    """Ends a pipeline's run after the call that was wanted."""


def nodes_of(engine: Engine, config: Mapping[str, Any], calls: int) -> tuple[Nodes, list[int]]:
    """The nodes that the pipeline makes at this number of calls (a resolution may shift them), and a sample's shape."""
    shape: list[int] = []

    def stop(i: int, sample: torch.Tensor, output: torch.Tensor, state: torch.Tensor) -> None:
        shape.extend(sample.shape[1:])
        raise _Enough

    scheduler = Captured.of(config, "ddim", see=stop)
    with suppress(_Enough):
        engine.run(Batch(0, (engine.prompts[0],), (engine.seed,)), scheduler, calls)
    return scheduler.nodes, shape


Held = tuple[list[Batch], np.ndarray]  # held-out batches of this process, and their teacher's last states


def held_out_teacher(
    engine: Engine, tag: str, config: Mapping[str, Any], nodes: Nodes, first: int, count: int, calls: int
) -> Held:
    """Images first..first + count - 1 with the teacher's last states; one teacher serves every number of calls."""
    batches, (fine, _) = engine.batches(first, count), refined(nodes, calls)

    def make() -> Captured:
        return Captured.of(config, "dpmpp", TEACHER, nodes=fine)

    return batches, ends(engine, tag, batches, make, len(fine) - 1)


def _run(
    engine: Engine,
    student: Student,
    guidance: float | None,
    pairs: int,
    teacher_calls: int,
    how: tuple[tuple[float, float], str],
    held_out: Held,
) -> tuple[list[float], dict[str, Any]]:
    """Search (`how`: bounds and objective) and validation of one number of calls: the ratios to ship, what is known."""
    n, tag = len(student), f"g{guidance}/N{len(student)}"
    batches, (held, last) = engine.batches(0, pairs), held_out
    teacher = teacher_states(engine, f"{tag}/teacher", batches, student, teacher_calls)
    search = Search(engine, tag, student, batches, teacher, *how)
    rho = search.ratios()
    target = teacher[:, -1]
    with_ = over_processes(engine, f"{tag}/train", errors(np.concatenate([z.numpy() for z in search.ends]), target))
    plain = run_errors(engine, f"{tag}/train/parent", batches, lambda: student.scheduler(None), n, target)
    without = over_processes(engine, f"{tag}/train/plain", plain)

    pair_ = [
        over_processes(engine, f"{tag}/{what}/errors", run_errors(engine, f"{tag}/{what}", held, make, n, last))
        for what, make in (
            ("valid/parent", lambda: student.scheduler(None)),
            ("valid/compensated", lambda: student.scheduler(rho)),
        )
    ]
    found = verdict(*pair_)
    receipt: dict[str, Any] = {
        "searched ratios": [round(r, 4) for r in rho],
        "of these at a bound": sum(min(abs(r - b) for b in how[0]) < 2 * TOLERANCE for r in rho),
        "calibration error": {"parent": float(finite(without).mean()), "compensated": float(finite(with_).mean())},
        "held-out error": found.to_json(),
        "best stock scheduler": best_stock(engine, f"{tag}/stock", held, last, n, engine.pipe.scheduler.config),
    }
    helps = found.helps and any(r != 1 for r in rho)
    return rho if helps else [1.0] * n, {"calls": n, "guidance": guidance, "helps": helps, "receipt": receipt}
