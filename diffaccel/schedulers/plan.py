"""From a scheduler's settings and what the pipeline asks for to a `Run`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..artifact import Artifact
from ..core.families import Flow
from ..core.given_nodes import from_sigmas, from_timesteps
from ..core.grid import checked, native
from ..core.grid import nodes as grid_nodes
from ..core.node import Node
from ..core.path import Nodes, Path
from ..errors import OptionError
from ..samplers.registry import Sampler
from .artifacts import options_on
from .from_config import grid_of, path_of
from .run import Run

MU = (
    "this model's grid depends on the resolution (use_dynamic_shifting): set_timesteps needs mu, which pipelines "
    "compute from base_image_seq_len, max_image_seq_len, base_shift and max_shift of the config. If your pipeline does "
    "not pass mu to this scheduler, build it with use_dynamic_shifting=False, shift=math.exp(mu)"
)


TRIED = 12  # calls of a trial: more than any sampler's history, and even


def plan(
    settings: Mapping[str, Any],
    sampler: Sampler,
    options: dict[str, Any],
    calls: int,
    device: Any,
    sigmas: Sequence[float] | None,
    timesteps: Sequence[float] | None,
    mu: float | None,
) -> Run:
    """A new run; the arguments are those of `TableScheduler.set_timesteps`, `calls` that of `calls_of`."""
    dynamic = settings["path"] == "flow" and settings["use_dynamic_shifting"]
    if dynamic and mu is None:
        raise OptionError(MU)
    path = path_of(settings, mu=_number(mu, "mu") if dynamic else None)
    grid, grid_options, final = grid_of(settings)
    n = sampler.intervals_of(calls, **options)
    traced: int | None = calls
    if timesteps is None and (sigmas is None or _is_default_ramp(path, sigmas)):
        nodes = grid_nodes(path, n, grid, final=final, **grid_options)
    else:
        refuse_nodes(sampler, options, "sigmas" if timesteps is None else "timesteps")
        nodes = _given(path, min(n, calls), calls, sigmas, timesteps, final)
        traced = calls if n <= calls else None  # a sampler that skips: these are its nodes, it calls fewer
    run = run_on(nodes, sampler, options, traced, device)
    if n != calls and (timesteps is not None or traced is None):
        run.notes.append(
            f"{sampler.name} makes {calls} calls on {n} intervals: its nodes lie on the curve through the values given"
        )
    return run


def _number(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise OptionError(f"{what} must be a number, got {value!r}") from None


def tried(settings: Mapping[str, Any], sampler: Sampler, options: dict[str, Any]) -> None:
    """Lay a grid of some calls and trace a run on the path's own, so that wrong options of either show at once.

    Not for calibrated samplers, rewriters and lists, which may be made for one number of calls.

    Raises:
        OptionError: an option that the grid or the sampler's loop refuses.
    """
    if settings["path"] == "vp" and settings["num_train_timesteps"] <= TRIED:
        return
    path = path_of(settings, mu=1.0)
    name, grid_options, final = grid_of(settings)
    if (settings["grid"] or grid_options) and name not in ("listed", "by_calls"):
        grid_nodes(path, TRIED, name, final=final, **grid_options)
    asked = settings["sampler_options"] or {}
    listed = any(isinstance(value, (list, tuple, dict)) for value in asked.values())
    if not asked or listed or sampler.calibrated is not None or sampler.rewrites:
        return
    grid, _, final = grid_of({**settings, "grid": None, "grid_options": None})
    nodes = grid_nodes(path, sampler.intervals_of(TRIED, **options), grid, final=final)
    sampler.trace(sampler.placed(nodes, options), TRIED, **options)


def run_on(nodes: Nodes, sampler: Sampler, options: dict[str, Any], calls: int | None, device: Any) -> Run:
    """A run on these nodes."""
    nodes = sampler.placed(nodes, options)
    table = sampler.trace(nodes, calls, **options)
    fed = [row.t for row in table.rows]
    whole = nodes.path.family == "vp" and all(t == int(t) for t in fed)
    cpu = torch.tensor([int(t) for t in fed] if whole else fed, dtype=torch.int64 if whole else torch.float32)
    levels = table.nodes
    sigmas = torch.tensor([native(node, nodes.path) for node in levels], dtype=torch.float32)
    run = Run(table, levels, nodes, cpu if device is None else cpu.to(device), sigmas, cpu, options)
    run.checked = sigmas.clone()
    return run


def refuse_nodes(sampler: Sampler, options: Mapping[str, Any], what: str) -> None:
    """Raise if the sampler's artifact decides the nodes, so that `what` would have no effect."""
    takes = sampler.calibrated
    if takes is not None and takes.nodes and options.get(takes.option) is not None:
        raise OptionError(
            f"{what}: the nodes of sampler {sampler.name!r} belong to its artifact; leave them out, and give only the "
            "number of calls"
        )


def again(run: Run, nodes: Nodes, sampler: Sampler, options: dict[str, Any], note: str) -> Run:
    """The run on other nodes or with other options."""
    made = run_on(nodes, sampler, options, len(run), run.timesteps.device)
    made.begin, made.counter, made.notes, made.watch = run.begin, run.counter, [*run.notes, note], run.watch
    return made


def edited(run: Run, sampler: Sampler) -> Run:
    """The run again, on the values that somebody wrote into `scheduler.sigmas` after set_timesteps."""
    refuse_nodes(sampler, run.options, "edits of scheduler.sigmas")
    path, values = run.grid.path, [float(s) for s in run.sigmas]
    if len(run.grid) != len(values):
        raise OptionError(
            f"scheduler.sigmas was edited, but sampler {run.table.sampler!r} spends several calls on an interval and "
            "its sigmas are not its grid; pass sigmas= to set_timesteps"
        )
    old = [float(s) for s in run.checked] if run.checked is not None else values
    # A value copied from another place (Cosmos 2: the last but one) means that node, not its float32 rounding.
    known = dict(zip(old, run.grid, strict=True))
    copied = (replace(known[v]) if v in known else _at(path, v) for v in values)
    found = [n if v == o else c for n, v, o, c in zip(run.grid, values, old, copied, strict=True)]
    nodes = checked(found, path, "edited sigmas")
    return again(run, nodes, sampler, run.options, "sigmas were edited after set_timesteps; compiled again")


def fitting(run: Run, sampler: Sampler, artifact: Artifact | None, sample: torch.Tensor) -> Run:
    """The run itself, or again with calibrated data for samples of this shape.

    Raises:
        ArtifactError: if the data is of another shape.
    """
    shape = tuple(sample.shape[1:])
    options = options_on(sampler, artifact, run.options, shape)
    if options is run.options:
        return run
    return again(run, run.grid, sampler, options, f"calibrated data was resampled to samples of {shape}")


def _at(path: Path, sigma: float) -> Node:
    if sigma == 0:
        return path.end
    return path.at(path.train_steps * sigma) if isinstance(path, Flow) else path.at_level(sigma)


def calls_of(calls: int | None, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None) -> int:
    """The number of model calls that the arguments agree on."""
    sizes = {}
    if sigmas is not None:
        sizes["sigmas"] = len(sigmas) - (len(sigmas) > 1 and sigmas[-1] == 0)
    if timesteps is not None:
        sizes["timesteps"] = len(timesteps)
    if calls is not None:
        sizes["num_inference_steps"] = calls
    if not sizes:
        raise OptionError("set_timesteps needs num_inference_steps, sigmas or timesteps")
    if len(set(sizes.values())) > 1:
        raise OptionError(f"the numbers of model calls disagree: {sizes} (a closing 0 in sigmas is not a call)")
    found = next(iter(sizes.values()))
    if isinstance(found, bool) or not isinstance(found, (int, np.integer)) or found < 1:
        raise OptionError(f"the number of model calls must be an integer of 1 or more, got {found!r}")
    return int(found)


def _is_default_ramp(path: Path, sigmas: Sequence[float]) -> bool:
    """Whether these are the sigmas that flow pipelines pass unasked; the scheduler's own grid then decides."""
    n = len(sigmas)
    return isinstance(path, Flow) and bool(np.allclose(sigmas, np.linspace(1.0, 1 / n, n), atol=1e-6))


def _given(
    path: Path,
    n: int,
    calls: int,
    sigmas: Sequence[float] | None,
    timesteps: Sequence[float] | None,
    final: str,
) -> Nodes:
    """Nodes from the user's own lists."""
    if sigmas is None:
        return from_timesteps(path, _thin(list(timesteps or []), n, calls), final=final)
    closing = [0.0] if len(sigmas) > calls else []
    found = from_sigmas(path, _thin(list(sigmas)[:calls], n, calls) + closing, final=final)
    if timesteps is None:
        return found
    if n != calls:
        raise OptionError("sigmas and timesteps together need a sampler that makes one call an interval")
    fed = [Node(float(t), s.alpha, s.sigma) for t, s in zip(timesteps, found, strict=False)]
    return Nodes([*fed, found[-1]], path)


def _thin(values: list[float], n: int, calls: int) -> list[float]:
    """The same curve at n nodes, for samplers that spend several calls on an interval."""
    if n == calls:
        return [float(v) for v in values]
    return [float(v) for v in np.interp(np.arange(n) * (calls / n), np.arange(calls), values)]
