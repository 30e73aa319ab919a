"""Where candidates come from. A source is a function of what is asked; anybody can register one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..artifact import Artifact
from ..core.pattern import parse
from ..core.stage_plan import PRESETS
from ..errors import DiffaccelError, OptionError, one_of
from ..pipelines.accelerate import applied
from ..pipelines.recipe import Choice
from ..schedulers.from_config import Reading, grid_of

USUAL = ("solvers", "rewriters", "fitted")
WORK = 1.01  # a candidate whose calls differ in cost may do this much of the work of the plain run

Options = Mapping[str, Any]


@dataclass
class Asked:
    """What a source is told.

    Args:
        pipe: the pipeline, unwrapped.
        reading: of its scheduler's config.
        calls: N.
        tables: artifacts that fit this checkpoint.
        run: runs one image through the pipeline as it now is, with this `num_inference_steps`; for sources that have
            to measure what a candidate costs.
        left_out: candidate -> why a source did not offer it; sources add to it.
    """

    pipe: Any
    reading: Reading
    calls: int
    tables: Sequence[Artifact] = ()
    run: Callable[[int], None] = lambda steps: None
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """Of the path: "vp", "flow" or "edm"."""
        return str(self.reading.path.family)


Source = Callable[[Asked], Iterable[Choice]]
SOURCES: dict[str, Source] = {}


def source(name: str) -> Callable[[Source], Source]:
    """Register a source of candidates under a name: `da.tune(pipe, ..., sources=(..., name))`.

    Raises:
        OptionError: if the name is taken by another function.
    """

    def register(made: Source) -> Source:
        old = SOURCES.get(name)
        if old is not None and (old.__module__, old.__qualname__) != (made.__module__, made.__qualname__):
            raise OptionError(f"a source named {name!r} is registered already, by {old.__module__}")
        SOURCES[name] = made
        return made

    return register


def gather(names: Sequence[str], asked: Asked) -> list[Choice]:
    """The candidates of these sources, in their order; of equal names the first is taken.

    Raises:
        OptionError: an unknown source.
    """
    found: dict[str, Choice] = {}
    for name in names:
        for choice in SOURCES[one_of("source of candidates", name, SOURCES)](asked):
            found.setdefault(choice.name, choice)
    return list(found.values())


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
) -> Choice:
    """A `TableScheduler` as a candidate; everything that decides its nodes is stated."""
    shown = [*_shown(options), " ".join([grid[0], *_shown(grid[1])]), *([] if final == "zero" else [final])]
    settings: dict[str, Any] = {"sampler": sampler, "sampler_options": dict(options) or None}
    settings |= {"grid": grid[0], "grid_options": dict(grid[1]) or None, "final_sigmas_type": final}
    name = f"{sampler}({', '.join(shown)})"
    if rewrite is not None:
        settings["rewrite"] = [dict(rewrite)]
        more = {k: v for k, v in rewrite.items() if k != "name"}
        name += f" + {rewrite['name']}({', '.join(_shown(more))})"
    return Choice(name, "scheduler", settings, calls)


def _shown(options: Options) -> list[str]:
    return [f"{k}={v}" for k, v in options.items()]


def grids(reading: Reading) -> list[tuple[Grid, str]]:
    """Grids to try, each with where it ends: the pipeline's own first."""
    own, options, final = grid_of(reading.settings)
    known = [(grid, "zero") for grid in GRIDS[reading.path.family] if grid != (own, options) or final != "zero"]
    return [((own, options), final), *known]


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
    own = grids(asked.reading)[0]
    places = [own, *[(g, "zero") for g in (("karras", {"rho": 4.0}),) if g != own[0]]]
    found = []
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
    """Artifacts: their sampler, with the settings that they were calibrated for."""
    found = []
    for held in asked.tables:
        if asked.calls not in held.meta.get("calls", [asked.calls]):
            asked.left_out[held.file] = f"holds {held.meta['calls']} calls, not {asked.calls}"
            continue
        advice = held.meta.get("scheduler") or {}
        if "sampler" not in advice:
            raise OptionError(f"tables: {held.file} is of kind {held.kind!r}, which is no table of a scheduler")
        settings = {"sampler": advice["sampler"], "sampler_options": advice.get("options")}
        settings |= {k: advice[k] for k in ("grid", "grid_options", "final_sigmas_type") if advice.get(k) is not None}
        name = f"{advice['sampler']}({held.file})"
        found.append(Choice(name, "scheduler", settings, asked.calls, artifact=embedded(held, asked.calls)))
    return found


def embedded(held: Artifact, calls: int) -> Artifact:
    """What a recipe holds of an artifact: of fitted tables those of its budget; no seconds, no model (the recipe's)."""
    tensors, meta = dict(held.tensors), {k: v for k, v in held.meta.items() if k not in ("model", "cost")}
    if held.kind == "fit":
        tensors = {k: v for k, v in tensors.items() if k.startswith(f"n{calls}.")}
        meta |= {"calls": [calls], "receipt": {k: v for k, v in held.receipt.items() if k == f"{calls} calls"}}
    else:
        meta["receipt"] = {k: v for k, v in held.receipt.items() if k not in ("seconds", "cost")}
    return Artifact(held.kind, tensors, meta, held.file)


# ---------------------------------------------------------------------- at equal work
@source("staged")
def _staged(asked: Asked) -> list[Choice]:
    """Presets of `bottleneck` with as many calls as the work of N full-size ones allows (counted FLOPs)."""
    found = []
    for preset in PRESETS:
        shared = preset.startswith("spectral")  # shares of any number of calls
        try:
            made = _costed(asked, preset, asked.calls if shared else None)
            if shared and made.work is not None:  # the first guess tells what a call costs
                most = int(WORK * asked.calls * asked.calls / made.work)
                made = next((c for n in (most + 1, most) if _fits(asked, c := _costed(asked, preset, n))), made)
        except (DiffaccelError, ValueError, RuntimeError) as error:
            asked.left_out[f"bottleneck({preset})"] = (str(error).splitlines() or [type(error).__name__])[0][:160]
            continue
        if _fits(asked, made):
            found.append(made)
        else:
            asked.left_out[made.name] = f"its work is that of {made.work:.2f} calls, not of {asked.calls}"
    return found


def _fits(asked: Asked, choice: Choice) -> bool:
    return choice.work is not None and choice.work <= WORK * asked.calls


def _costed(asked: Asked, preset: str, calls: int | None) -> Choice:
    """A preset with its number of calls and its work, from a run of one image."""
    settings: dict[str, Any] = {"stages": preset} | ({} if calls is None else {"calls": calls})
    name = f"bottleneck({preset}{'' if calls is None else f', {calls} calls'})"
    with applied(asked.pipe, Choice(name, "bottleneck", settings, 0)) as handle:
        made = int(asked.pipe.scheduler.num_inference_steps)
        asked.run(made)
        work = handle.report().step_equivalents
    if work is None:
        raise OptionError("its work cannot be counted on this model")
    return Choice(name, "bottleneck", settings, made, float(f"{work:.4g}"))
