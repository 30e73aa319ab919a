"""What every calibration that ends in a table begins with: inputs, teacher, stock schedulers to measure beside."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Protocol

import numpy as np

from ..artifact import Artifact, path_identity
from ..compare import stock
from ..errors import ArtifactWarning, OptionError
from ..identity import model_identity
from ..prompts import read_prompts
from .engine import Engine
from .fit_core import Fitted, Fitting, Plan
from .fit_guard import Errors, relative
from .fit_pipe import Piped
from .validate import STOCK


@dataclass(frozen=True)
class Setup:
    """A pipeline that is ready to be fitted to.

    Args:
        engine, runner: of the pipeline.
        made: teacher, inputs and guard.
        shape: of one input's state.
        rivals: how many stock schedulers are measured beside, the present one not counted.
    """

    engine: Engine
    runner: Piped
    made: Fitting
    shape: tuple[int, ...]
    rivals: int

    def meta(self) -> dict[str, Any]:
        """What an artifact says of its pipeline; to be asked at the end, for the cost."""
        engine, plan = self.engine, self.made.plan
        call = {k: v for k, v in engine.call.items() if k != "guidance_scale"}
        return {
            "path": path_identity(self.runner.path, self.runner.reading.settings["prediction_type"]),
            "model": model_identity(engine.pipe),
            "guidance": engine.scale,
            "shape": list(self.shape),
            "seeds": [engine.seed, engine.seed + plan.samples + plan.holdout],
            "call": {k: str(v) for k, v in call.items()},
            "arguments": {k: v for k, v in engine.call.items() if _plain(v)},
            "cost": engine.cost,
        }


def prepared(
    kind: str,
    pipe: Any,
    prompts: str | os.PathLike[str] | Sequence[str] | None,
    plan: Plan,
    settings: Mapping[str, Any],
    *,
    guidance: float | None,
    call: Mapping[str, Any],
    batch: int,
    seed: int,
    out: str | os.PathLike[str] | None,
    progress: bool,
) -> Setup:
    """Read the prompts, drive the pipeline to its first call, and make everything else.

    Args:
        settings: JSON, what the result depends on beside the pipeline and its call.

    Raises:
        OptionError: no prompts, or a pipeline that cannot be driven.
    """
    if prompts is None:
        raise OptionError(
            f"{kind} needs prompts: 16 or more like those that you will use, a list or a file (one a line)"
        )
    named = read_prompts(FilePath(prompts) if isinstance(prompts, os.PathLike) else prompts)
    told = {"kind": kind, "plan": settings, "model": model_identity(pipe)["weights_sha256"]}
    engine = Engine(
        pipe, named, guidance=guidance, call=call, batch=batch, seed=seed, out=out, settings=told, progress=progress
    )
    runner = Piped(engine)
    tried = _rivals(pipe, plan.rivals)
    made = Fitting(runner, plan, own=runner.own_nodes, memo=runner.memo, rivals=_measure(runner, tried))
    return Setup(engine, runner, made, runner.shape(), len(tried))


def budgets(calls: int | Sequence[int]) -> tuple[int, ...]:
    """Numbers of calls, each once, rising."""
    return (calls,) if isinstance(calls, int) else tuple(sorted(set(calls)))


def _plain(value: Any) -> bool:
    """Whether JSON gives it back as it is."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError):
        return False


def _rivals(pipe: Any, which: str) -> list[Any]:
    if which == "none":
        return []
    found = stock(pipe.scheduler.config)
    return found if which == "all" else [c for c in found if c.name in STOCK]


def _measure(runner: Piped, tried: list[Any]) -> Callable[..., list[Errors]]:
    """Errors of the pipeline's present scheduler (first, if it can spend so many calls) and of others."""

    def measured(inputs: Sequence[int], calls: int, images: dict[int, np.ndarray]) -> list[Errors]:
        wanted = np.stack([images[n] for n in inputs])
        name = f"the pipeline's {type(runner.engine.pipe.scheduler).__name__}"
        runs: list[tuple[str, Any, int | None, bool]] = [(name, None, None, False)]
        runs += [(c.name, c.make, c.steps(calls), c.ramp) for c in tried]
        found = []
        for name, make, steps, ramp in runs:

            def compute(make: Any = make, steps: Any = steps, ramp: Any = ramp) -> dict[str, np.ndarray]:
                try:
                    states = runner.rival(inputs, calls, make, steps, ramp)
                except (ValueError, IndexError, RuntimeError, ImportError):  # it cannot run this path or this number
                    states = None
                return {"e": np.zeros(0) if states is None else relative(states, wanted)}

            errors = runner.memo(f"rivals/{calls}/{name}", compute)["e"]
            if len(errors):
                found.append(Errors(name, errors))
            elif make is None:
                found.append(Errors(f"{name} (cannot make {calls} calls)", np.full(len(inputs), np.inf)))
        return found

    return measured


# ---------------------------------------------------------------------- the end
class Made(Protocol):
    """What was found for one budget."""

    @property
    def report(self) -> dict[str, Any]:
        """For the receipt."""

    def tensors(self, calls: int) -> dict[str, np.ndarray]:
        """For the artifact."""


def teacher_of(made: Fitting, tables: Mapping[int, Fitted]) -> dict[str, Any]:
    """What the receipt says of the teacher, with a warning where it is not converged."""
    gap = made.gap()
    least = min(t.report["held-out"]["rmse"] for t in tables.values())
    common: dict[str, Any] = {"teacher's own error (K against K/2 steps)": float(f"{gap:.3g}")}
    if gap > least / 3:
        common["warning"] = (
            f"the teacher is not converged: with half its steps it lands {gap:.3g} away, and the least held-out error "
            f"is {least:.3g}; take more teacher_steps"
        )
    return common


def artifact_of(
    kind: str,
    options: Mapping[str, Any],
    tables: Mapping[int, Made],
    common: Mapping[str, Any],
    meta: Mapping[str, Any],
    out: str | os.PathLike[str] | None = None,
    sampler: str | None = "fitted",
) -> Artifact:
    """The artifact of tables, run by `sampler`; what its receipt warns of is also a warning."""
    receipt: dict[str, Any] = {f"{n} calls": table.report for n, table in tables.items()} | dict(common)
    if "cost" in meta:
        receipt["cost"] = meta["cost"]
    told = [(f"{kind}, {where}", text) for where, entry in receipt.items() if isinstance(entry, dict)
            for text in entry.get("warnings", ())]  # fmt: skip
    for where, text in [*told, *([(kind, common["warning"])] if "warning" in common else [])]:
        warnings.warn(f"{where}: {text}", ArtifactWarning, stacklevel=3)
    tensors: dict[str, np.ndarray] = {}
    for n, table in tables.items():
        tensors |= table.tensors(n)
    fixed: dict[str, Any] = {"calls": sorted(tables), "options": dict(options), "receipt": receipt}
    fixed |= {} if sampler is None else {"scheduler": {"sampler": sampler}}
    return Artifact(kind, tensors, fixed | dict(meta), "" if out is None else FilePath(out).name)
