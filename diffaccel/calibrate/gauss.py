"""The Gaussian law of a checkpoint's latents, and how far down in noise it replaces model calls."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..artifact import Artifact, path_identity
from ..core.gauss import GaussLaw, fitted
from ..core.node import Node
from ..core.path import Path
from ..errors import OptionError
from ..identity import model_identity
from .engine import Batch, Captured, Engine
from .validate import ends

SAMPLER: tuple[str, dict[str, Any]] = ("dpmpp", {"order": 2})
FEWEST = 8


def gauss(
    pipe: Any,
    prompts: Sequence[str],
    *,
    images: int = 256,
    rank: int = 64,
    calls: int | Sequence[int] = 20,
    reference: int = 60,
    held_out: int = 16,
    tolerance: float = 0.01,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    batch: int = 8,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Artifact:
    """Mean, leading axes and variances of the pipeline's own samples, for `diffaccel.teleport`.

    Then the exact flow of that law is compared with the real run from the same noise, on images of other seeds: the
    largest skip whose median relative error stays below `tolerance` is the one that the artifact advises. With prompts
    and guidance the law stands for a conditional one, so that skip may be small, or none.

    Args:
        pipe: text-to-image or class-conditional; left as it was.
        prompts: used in turn.
        images, calls: samples that the law is made of, and the model calls of each.
        rank: axes kept; all other directions have one variance.
        reference: model calls of the run that skips are measured against.
        held_out: images of that run.
        tolerance: of the state, relative.
        guidance, call, batch, seed, out, progress: as for every calibration.

    Returns:
        kind "gauss": `mean` (1, *shape), `axes` (k, *shape), `variances` (k,), `rest` (1,); `options["skip_to"]` is a
        level (sigma/alpha), or None if no skip was good enough.
    """
    if images < FEWEST or held_out < FEWEST or not 0 < tolerance < 1:
        raise OptionError(f"calibrate gauss needs {FEWEST} images and {FEWEST} held-out ones or more, and a tolerance")
    calls = one_budget("gauss", calls)
    settings = {"kind": "gauss", "images": images, "rank": rank, "calls": calls, "reference": reference}
    engine = Engine(pipe, prompts, guidance=guidance, call=call, batch=batch, seed=seed, out=out, settings=settings,
                    progress=progress)  # fmt: skip
    config = pipe.scheduler.config
    work, checks = engine.batches(0, images), engine.batches(images, held_out)

    def make() -> Captured:
        return Captured.of(config, *SAMPLER)

    with engine.working(images * calls + held_out * reference, "gauss"):
        samples = ends(engine, "samples", work, make, calls)
        shape = samples.shape[1:]
        law = fitted(samples.reshape(len(samples), -1), rank)
        errors = _errors(engine, law, checks, config, reference)
    good = [(level, e) for level, e, _ in errors if e < tolerance]
    skip = min(good, key=lambda entry: entry[0])[0] if good else None
    path = Path.from_config(config)
    receipt = {
        "skip_to": skip if skip is not None else f"none: no skip stays below {tolerance:g}",
        "reference calls saved": sum(level > skip for level, _, _ in errors) + 1 if skip is not None else 0,
        "share of variance in the axes": float(law.variances.sum() / _total(law, shape)),
        "median relative error by level": {f"{level:.4g}": e for level, e, _ in errors},
        "of the state left as it is": {f"{level:.4g}": e for level, _, e in errors},
    }
    made = Artifact(
        "gauss",
        {
            "mean": law.mean.reshape(1, *shape),
            "axes": law.axes.reshape(-1, *shape),
            "variances": law.variances,
            "rest": np.array([law.rest]),
        },
        {
            "path": path_identity(path, config_prediction(config)),
            "model": model_identity(pipe),
            "guidance": engine.guidance,
            "shape": list(shape),
            "options": {"skip_to": skip},
            "seeds": [seed, seed + images + held_out],
            "cost": engine.cost,
            "receipt": receipt,
        },
    )
    return engine.finish(made)


def one_budget(kind: str, calls: int | Sequence[int]) -> int:
    """A number of model calls, or the only one of a list (the command line gives lists)."""
    listed = [calls] if isinstance(calls, int) else list(calls)
    if len(listed) != 1 or isinstance(listed[0], bool) or listed[0] < 1:
        raise OptionError(f"calibrate {kind} takes one number of calls of 1 or more, got {calls!r}")
    return int(listed[0])


def config_prediction(config: Mapping[str, Any]) -> str:
    """The prediction type, as our config of this path says it."""
    return str(Captured.of(config, *SAMPLER).config.prediction_type)


def _total(law: GaussLaw, shape: tuple[int, ...]) -> float:
    return float(law.variances.sum() + law.rest * (math.prod(shape) - len(law.variances)))


def _errors(
    engine: Engine, law: GaussLaw, checks: Sequence[Batch], config: Mapping[str, Any], calls: int
) -> list[tuple[float, float, float]]:
    """(level, median relative error of the teleported state, that of the start noise scaled to it) at each node."""
    found: dict[int, list[tuple[float, float]]] = {}
    nodes: list[Node] = []
    for batch in checks:
        states: list[torch.Tensor] = []

        def see(i: int, x: torch.Tensor, output: torch.Tensor, state: torch.Tensor, kept: Any = states) -> None:
            kept.append(x.detach().double().cpu().flatten(1))

        scheduler = Captured.of(config, *SAMPLER, see=see)
        engine.run(batch, scheduler, calls)
        nodes = list(scheduler.nodes)
        for j in range(1, calls):
            there = law.flow(states[0], nodes[0], nodes[j])
            alone = states[0] * math.hypot(nodes[j].alpha, nodes[j].sigma) / math.hypot(nodes[0].alpha, nodes[0].sigma)
            size = states[j].norm(dim=1)
            pairs = zip(*((v - states[j]).norm(dim=1).div(size).tolist() for v in (there, alone)), strict=True)
            found.setdefault(j, []).extend(pairs)
    return [
        (nodes[j].level, float(np.median([a for a, _ in pairs])), float(np.median([b for _, b in pairs])))
        for j, pairs in sorted(found.items())
    ]
