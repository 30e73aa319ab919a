"""Candidates that make N equal calls: samplers x grids, rewriters, calibrated tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..artifact import Artifact
from ..core.pattern import parse
from ..errors import OptionError
from ..pipelines.recipe import Choice
from ..samplers.registry import get
from ..schedulers.from_config import Reading, grid_of
from ..schedulers.measured import advice
from .candidates import Asked, source

Options = Mapping[str, Any]
GRID_KIND = "ays"  # of artifacts that hold nodes for any sampler

# ---------------------------------------------------------------------- samplers x grids
SAMPLERS: tuple[tuple[str, Options], ...] = (
    ("ddim", {}),
    ("dpmpp", {"order": 2}),
    ("dpmpp", {"order": 2, "form": "exact"}),
    ("dpmpp", {"order": 3}),
    ("unipc", {"order": 1}),
    ("unipc", {"order": 2}),
    ("unipc", {"order": 3}),
    ("deis", {"order": 2}),
    ("deis", {"order": 3}),
    ("ipndm", {"order": 2}),
    ("ipndm", {"order": 3}),
    ("ghvb", {"order": 1.5}),
    ("ghvb", {"order": 1.8}),
    ("res_2m", {}),
    ("heun", {}),
    ("dpmpp_2s", {}),
)
Grid = tuple[str, Options]
GRIDS: dict[str, tuple[Grid, ...]] = {
    "vp": (
        ("trailing", {}),
        ("quadratic", {}),
        ("karras", {"rho": 2.5}),
        ("karras", {"rho": 4.0}),
        ("karras", {}),
        ("mid", {"w": 0.15}),
        ("mid", {"w": 0.3}),
        ("uniform_lambda", {}),
        ("ays", {"model": "sd15"}),
        ("ays", {"model": "sdxl"}),
    ),
    "flow": (
        ("trailing", {}),
        ("quadratic", {}),
        ("karras", {"rho": 2.5}),
        ("karras", {"rho": 4.0}),
        ("mid", {"w": 0.15}),
        ("mid", {"w": 0.3}),
        ("uniform_lambda", {}),
        ("beta", {}),
    ),
    "edm": (("karras", {}), ("karras", {"rho": 4.0}), ("karras", {"rho": 2.5}), ("uniform_lambda", {})),
}
REWRITTEN: tuple[tuple[str, Options], ...] = (
    ("dpmpp", {"order": 2}),
    ("unipc", {"order": 2}),
    ("deis", {"order": 2}),
)
REWRITES: tuple[dict[str, Any], ...] = (
    {"name": "contrast", "c": 0.1},
    {"name": "contrast", "c": -0.1},
    {"name": "epsilon_scale", "at_end": 1.005},
    {"name": "epsilon_scale", "at_end": 0.995},
    {"name": "momentum", "beta": 0.9},
    {"name": "skip", "pattern": "h2/s3"},
    {"name": "skip", "pattern": "h3/s3"},
)


def scheduler(
    calls: int,
    sampler: str,
    options: Options,
    grid: Grid,
    *,
    final: str = "zero",
    rewrite: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Choice:
    """A `TableScheduler` as a candidate; everything that decides its nodes is stated. name: None makes one."""
    shown = [*_shown(options), " ".join([grid[0], *_shown(grid[1])]), *([] if final == "zero" else [final])]
    settings: dict[str, Any] = {"sampler": sampler, "sampler_options": dict(options) or None}
    settings |= {"grid": grid[0], "grid_options": dict(grid[1]) or None, "final_sigmas_type": final}
    made = f"{sampler}({', '.join(shown)})"
    if rewrite is not None:
        settings["rewrite"] = [dict(rewrite)]
        more = {k: v for k, v in rewrite.items() if k != "name"}
        made += f" + {rewrite['name']}({', '.join(_shown(more))})"
    return Choice(name or made, "scheduler", settings, calls)


def _shown(options: Options) -> list[str]:
    return [f"{k}={v}" for k, v in options.items()]


def grids(reading: Reading) -> list[tuple[Grid, str]]:
    """Grids to try, each with where it ends: the pipeline's own first."""
    own, options, final = grid_of(reading.settings)
    known = [(grid, "zero") for grid in GRIDS[reading.path.family] if grid != (own, options) or final != "zero"]
    return [((own, options), final), *known]


def two_grids(asked: Asked) -> list[tuple[Grid, str]]:
    """The pipeline's own grid and a Karras grid, with where each ends."""
    own, karras = grids(asked.reading)[0], ("karras", {"rho": 4.0})
    return [own, *([] if own[0] == karras else [(karras, "zero")])]


@source("solvers")
def _solvers(asked: Asked) -> list[Choice]:
    """Samplers x grids."""
    return [
        scheduler(asked.calls, name, options, grid, final=final)
        for name, options in SAMPLERS
        for grid, final in grids(asked.reading)
    ]


@source("rewriters")
def _rewriters(asked: Asked) -> list[Choice]:
    """Rewriters x a few samplers x two grids; patterns that skip nothing in so few calls are left out."""
    places, found = two_grids(asked), []
    for rewrite in REWRITES:
        if rewrite["name"] == "skip" and parse(rewrite["pattern"], (2, 2)).nodes_for(asked.calls) == asked.calls:
            asked.left_out[f"skip({rewrite['pattern']})"] = f"skips nothing in {asked.calls} calls"
            continue
        for name, options in REWRITTEN:
            found += [scheduler(asked.calls, name, options, g, final=f, rewrite=rewrite) for g, f in places]
    return found


# ---------------------------------------------------------------------- calibrated tables
@source("fitted")
def _fitted(asked: Asked) -> list[Choice]:
    """Artifacts: their sampler with the settings that they were calibrated for, or their grid with every sampler."""
    found = []
    for held in asked.tables:
        if asked.calls not in held.meta.get("calls", [asked.calls]):
            asked.left_out[held.file] = f"holds {held.meta['calls']} calls, not {asked.calls}"
            continue
        told = advice(held, asked.calls)
        if "sampler" in told:
            settings = {"sampler": told["sampler"], "sampler_options": told.get("options")}
            placed = ("grid", "grid_options", "final_sigmas_type")
            settings |= {k: told[k] for k in placed if told.get(k) is not None}
            name = f"{told['sampler']}({held.file})"
            found.append(Choice(name, "scheduler", settings, asked.calls, artifact=embedded(held, asked.calls)))
        elif held.kind == GRID_KIND:
            times = held.tensors[f"n{asked.calls}.node"][:, 0].tolist()
            grid = ("listed", {"times": {str(asked.calls): times}})
            found += [
                scheduler(asked.calls, s, o, grid, name=f"{s}({', '.join([*_shown(o), held.file])})")
                for s, o in SAMPLERS
                if get(s).intervals is None  # those that make one call a node
            ]
        else:
            raise OptionError(f"tables: {held.file} is of kind {held.kind!r}, which is no table of a scheduler")
    return found


def embedded(held: Artifact, calls: int) -> Artifact:
    """What a recipe holds of an artifact: of tables those of its budget; no seconds, no model (the recipe's)."""
    tensors, meta = dict(held.tensors), {k: v for k, v in held.meta.items() if k not in ("model", "cost")}
    meta["receipt"] = {k: v for k, v in held.receipt.items() if k not in ("seconds", "cost")}
    mine = {k: v for k, v in tensors.items() if k.startswith(f"n{calls}.")}
    if mine:
        tensors = mine
        meta |= {"calls": [calls], "receipt": {k: v for k, v in held.receipt.items() if k == f"{calls} calls"}}
    return Artifact(held.kind, tensors, meta, held.file)
