"""Statistics of DPM-Solver-v3 (EMS) measured on a checkpoint (arXiv:2310.13268, Appendix C.1.1), and validated."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..artifact import Artifact, path_identity
from ..core.grid import finite_first
from ..core.path import Path
from ..core.quad import Ems
from ..drive import denoiser
from ..errors import OptionError, one_of
from ..identity import model_identity
from ..parallel.protocol import World
from ..schedulers import TableScheduler
from ..schedulers.settings import path_of
from .ems_choice import TEACHER, TEACHER_GRID, expected, validated
from .ems_probe import METHODS, ForwardProbe, Probe, TrajectoryProbe, choose_method, duals, stat_nodes
from .ems_stats import REDUCE, Tensors, fitted, merged
from .engine import Batch, Captured, Engine
from .validate import FEWEST, STOCK

POINTS = ("trajectory", "forward")
LARGE = 64 * 2**20  # bytes of an artifact above which statistics are kept by channel
CLEAN_CALLS = 20  # of the runs that make the images for points="forward"


@dataclass(frozen=True)
class Measurement:
    """How the statistics are measured; see `ems` for the fields."""

    nodes: int
    images: int
    reduce: str
    points: str
    method: str
    delta: float | None
    smooth_space: float | None
    smooth_lam: float
    ridge: float


def ems(
    pipe: Any,
    prompts: Sequence[str],
    *,
    guidance: float | None = None,
    calls: Sequence[int] = (5, 8, 10),
    images: int = 128,
    nodes: int = 60,
    reduce: str = "auto",
    points: str = "trajectory",
    method: str = "auto",
    delta: float | None = None,
    lam_range: tuple[float, float] | None = None,
    smooth_space: float | None = None,
    smooth_lam: float = 0.0,
    ridge: float | None = None,
    chosen_on: int = 16,
    held_out: int = 32,
    teacher_calls: int = 64,
    call: Mapping[str, Any] | None = None,
    batch: int = 16,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    world: World | None = None,
) -> Artifact:
    """Measure the statistics of DPM-Solver-v3 on the user's checkpoint.

    For each number of calls a grid and a solver are chosen for them on other noise, and the same choice is made for
    the sampler without statistics; the two are then compared on noise that neither has seen. Where the paired interval
    of the errors does not lie below zero, the receipt says "no benefit found". So it does of a choice that is not
    better, by the same rule, than the checkpoint's grid with the sampler's default options; where its mean error there
    is higher, the default stays.

    Args:
        pipe: a diffusers pipeline; its own call is what runs.
        prompts: used in turn.
        guidance: scale; None: the pipeline's own.
        calls: numbers of model calls to choose settings for and to validate at; a run of another number takes the
            settings of the nearest.
        images: trajectories (or clean images) that the statistics are taken over.
        nodes: intervals of the statistics along lam.
        reduce: "element" (one value a pixel and channel: one size of image only), "channel", "scalar" (any size), or
            "auto": "element" while the artifact stays below 64 MB.
        points: "trajectory": the model's own trajectories, guidance included; "forward": independent points around
            images that the pipeline makes, where the model is called without guidance (the paper's choice).
        method: derivatives by the state by "jvp" (forward-mode differentiation) or "difference" (a second call);
            "auto": differences, but for half precision jvp where the model supports it.
        delta: size of the difference in units of the state's, sqrt(alpha^2 + sigma^2); None: 0.01, 0.1 in half
            precision.
        lam_range: of half log-SNR; None: the whole training range.
        smooth_space: standard deviation in pixels of a Gaussian over l and the moments; None: a twentieth of the
            shorter side, at most 1.5, where statistics are by element of an image. smooth_lam: the same in nodes.
        ridge: added to the variance of f, relative to that of the noise prediction; None: 100 times the square of the
            rounding of the model's dtype.
        chosen_on: images for the choice. held_out: images for the validation.
        teacher_calls: of the teacher (exact Adams, order 3).
        call: further arguments of the pipeline's call.
        batch: images in one pass.
        seed: of the first image.
        out: where the artifact is written; a stopped calibration goes on from `OUT.partial`.
        progress: show a bar.
        world: this process among others.

    Raises:
        OptionError: an unknown option, too few images, statistics that are too noisy to use, or a model that
            method="jvp" does not work on.
    """
    one_of("points", points, POINTS)
    one_of("method", method, (*METHODS, "auto"))
    one_of("reduce", reduce, (*REDUCE, "auto"))
    processes = 1 if world is None else world.size
    few = min(images, chosen_on) < max(2, processes) or held_out < max(FEWEST, processes)
    if few or nodes < 2 or not calls or min(calls) < 1:
        raise OptionError(
            f"ems needs 2 nodes, 2 images and chosen_on, {FEWEST} held_out (one of each for a process), and calls: got "
            f"images={images}, chosen_on={chosen_on}, held_out={held_out}, nodes={nodes}, calls={list(calls)}"
        )
    config = TableScheduler.from_config(pipe.scheduler.config).config
    path, dtype = path_of(config), denoiser(pipe).dtype
    lams = _lams(path, nodes, lam_range)
    ridge = 100 * torch.finfo(dtype).eps ** 2 if ridge is None else ridge
    asked = Measurement(nodes, images, reduce, points, method, delta, smooth_space, smooth_lam, ridge)
    settings = {"kind": "ems", "calls": list(calls), "chosen_on": chosen_on, "held_out": held_out, **vars(asked)}
    settings |= {"teacher": teacher_calls, "lam": [float(lams[0]), float(lams[-1])], "model": model_identity(pipe)}
    engine = Engine(
        pipe, prompts, guidance=guidance, call=call, batch=batch, seed=seed, out=out, settings=settings,
        progress=progress, world=world,
    )  # fmt: skip
    with engine.working(_expected(asked, calls, chosen_on, held_out, teacher_calls), "calibrate ems"):
        how, why, shape = _prepared(engine, config, lams, asked)
        found = _measured(engine, config, lams, how)
        fit = fitted(lams, found, smooth_space=how.smooth_space or 0.0, smooth_lam=smooth_lam, ridge=ridge)
        tensors: Tensors = {k: v if k == "lam" else v.astype(np.float32) for k, v in fit.ems.tensors().items()}
        statistics = Ems(tensors["lam"], tensors["l"], tensors["s"], tensors["b"])
        parts = images, chosen_on, held_out
        by_calls, receipt = validated(engine, config, statistics, calls, parts, teacher_calls)
        cost = engine.cost
    first = seed + images
    meta = {
        "options": dict(vars(how)) | {"method_because": why, "outliers": fit.outliers},
        "scheduler": {"sampler": "dpm_v3", "by_calls": by_calls},
        "path": path_identity(path, config["prediction_type"]),
        "model": settings["model"],
        "guidance": engine.guidance,
        "shape": list(shape),
        "calls": list(calls),
        "seeds": {
            "calibration": [seed, first - 1],
            "choice": [first, first + chosen_on - 1],
            "held_out": [first + chosen_on, first + chosen_on + held_out - 1],
        },
        "torch": torch.__version__,
        "cost": cost,
        "receipt": receipt | {"standard error of l": fit.l_error, "cost": cost},
    }
    made = Artifact("ems", tensors, meta)
    return engine.finish(made)


def _lams(path: Path, nodes: int, given: tuple[float, float] | None) -> np.ndarray:
    low, high = (finite_first(path).lam, path.last.lam) if given is None else given
    widest = (finite_first(path).lam - 1e-9, path.last.lam + 1e-9)
    if not widest[0] <= low < high <= widest[1]:
        raise OptionError(
            f"lam_range must be rising and lie in the model's training range [{widest[0]:.4g}, {widest[1]:.4g}], got "
            f"({low:.4g}, {high:.4g})"
        )
    return np.linspace(low, high, nodes + 1)


def _expected(how: Measurement, calls: Sequence[int], chosen_on: int, held_out: int, teacher: int) -> int:
    """About how many model calls of images all of it takes."""
    visits = (2 if how.points == "trajectory" else 3) * (how.nodes + 1)
    made = how.images * (visits + (CLEAN_CALLS if how.points == "forward" else 0))
    made += chosen_on * (teacher + expected(calls))
    return made + held_out * (teacher + (4 + len(STOCK) // 2) * sum(calls))


# ---------------------------------------------------------------------- measuring
def _prepared(
    engine: Engine, config: Mapping[str, Any], lams: np.ndarray, asked: Measurement
) -> tuple[Measurement, str, tuple[int, ...]]:
    """The measurement with "auto" decided, why the method was taken, and the shape of one sample."""
    known = engine.kept.notes.get("prepared")
    if known is None:
        one = Batch(0, tuple(engine.prompts[:1]), (engine.seed,))
        nodes, _ = stat_nodes(path_of(config), lams)
        shape = tuple(engine.output(one, nodes[0], None, config)[0].shape[1:])
        size = 4 * 3 * len(lams) * math.prod(shape)
        reduce = ("element" if size <= LARGE else "channel") if asked.reduce == "auto" else asked.reduce
        wanted = asked.method
        if wanted == "auto" and denoiser(engine.pipe).dtype in (torch.float32, torch.float64):
            method, why = "difference", "in this precision differences are as good, and cheaper"
        else:
            short = lams[len(lams) // 2 :][:3]
            method, why = choose_method(wanted, lambda m: _trajectory(engine, one, config, short, m, reduce, None))
        known = {"shape": list(shape), "reduce": reduce, "method": method, "why": why}
        engine.kept.notes["prepared"] = known
    shape = tuple(known["shape"])
    smooth = asked.smooth_space
    if smooth is None:
        smooth = min(1.5, min(shape[-2:]) / 20) if known["reduce"] == "element" and len(shape) > 2 else 0.0
    decided = {"reduce": known["reduce"], "method": known["method"], "smooth_space": smooth}
    return Measurement(**{**vars(asked), **decided}), known["why"], shape


def _measured(engine: Engine, config: Mapping[str, Any], lams: np.ndarray, how: Measurement) -> Tensors:
    batches = engine.batches(0, how.images)

    def work(batch: Batch) -> Tensors:
        take = _trajectory if how.points == "trajectory" else _forward
        return take(engine, batch, config, lams, how.method, how.reduce, how.delta)

    return engine.accumulate("moments", batches, work, merged)


def _trajectory(
    engine: Engine, batch: Batch, config: Any, lams: np.ndarray, method: str, reduce: str, delta: float | None
) -> Tensors:
    """Moments of one batch at the points of its own trajectories."""
    nodes, skip = stat_nodes(path_of(config), lams)
    probe = TrajectoryProbe.probing(config, nodes, batch.seeds, method=method, reduce=reduce, delta=delta)
    return _run(engine, batch, probe.begin(skip, lams), method)


def _forward(
    engine: Engine, batch: Batch, config: Any, lams: np.ndarray, method: str, reduce: str, delta: float | None
) -> Tensors:
    """Moments of one batch at independent points around images that the pipeline makes with its guidance."""
    teacher = Captured.of(config, TEACHER[0], TEACHER[1], **TEACHER_GRID)
    clean = engine.run(batch, teacher, CLEAN_CALLS).detach()
    nodes, _ = stat_nodes(path_of(config), lams)
    probe = ForwardProbe.probing(
        config, nodes, batch.seeds, method=method, reduce=reduce, delta=delta, own_noise=False
    ).begin(clean, batch.seeds, lams)
    before = engine.guidance, engine.call
    try:
        if _guided_by_two_passes(engine.pipe):
            engine.guide(1.0)
        return _run(engine, batch, probe, method, probe.first())
    finally:
        engine.guidance, engine.call = before


def _guided_by_two_passes(pipe: Any) -> bool:
    """Whether `guidance_scale` is classifier-free guidance, not an input of the model (FLUX)."""
    takes = "guidance_scale" in inspect.signature(pipe.__call__).parameters
    return takes and not getattr(denoiser(pipe).config, "guidance_embeds", False)


def _run(engine: Engine, batch: Batch, probe: Probe, method: str, latents: torch.Tensor | None = None) -> Tensors:
    with duals(denoiser(engine.pipe)) if method == "jvp" else nullcontext():
        engine.run(batch, probe, 1, latents)
    return probe.moments
