"""Rewriters: sampler -> sampler, decided before the run.

A rewriter is a function `f(sampler, **options) -> Sampler`, registered with `@rewriter(name, stage=...)`. It may

- put another loop in place of the sampler's (`with_loop`), which calls the old one: for changes of the nodes,
- append an edit of the finished table (`Sampler.edits`): for changes of the rows.

Whatever order the user lists, they act in the order of `STAGES`: start maps, the path of nodes, predictions,
increments, what the model is fed. The number of model calls stays what was asked for: a rewriter that spends calls of
its own, or saves some, changes `Sampler.intervals`, the number of intervals of the grid that the calls can take.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..core.path import Nodes
from ..core.table import Table
from ..core.trace import Loop
from .parts import Part, Register, refuse_clashes
from .registry import Sampler, get

STAGES = ("start", "path", "prediction", "increment", "fed")
INNER = ("path",)  # their loops are wrapped first, so that a start map acts on the whole run
REWRITERS = Register("rewriter", STAGES)


def rewriter(
    name: str, *, stage: str, rank: int = 0, clashes: Mapping[str, str] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Part]]:
    """Register a rewriter: a function `f(sampler, **options) -> Sampler` that changes a table before the run.

    The decorated name then takes the options alone and makes an entry of `rewrite=[...]`. Options must be JSON values.

        @da.rewriter("keep_level", stage="fed")
        def keep_level(sampler, least: float = 20.0): ...

        da.TableScheduler(sampler="unipc", rewrite=[keep_level(least=30.0)])

    Args:
        name: as configs hold it.
        stage: when it acts, whatever order users list: "start", "path", "prediction", "increment" or "fed".
        rank: its place among others of its stage; the lowest acts first.
        clashes: rewriters and policies that it cannot be combined with, and why.

    Raises:
        OptionError: an unknown stage, or a name that another function has taken.
    """
    return REWRITERS(name, stage=stage, rank=rank, clashes=clashes)


def read(rewrites: Any) -> list[Part]:
    """The rewriters that a user or a config lists (None, one, or many), in the order in which they act.

    Raises:
        OptionError: an unknown rewriter or option, or one that is listed twice.
    """
    importlib.import_module("diffaccel.samplers")
    return REWRITERS.read(rewrites)


def rewritten(sampler: str | Sampler, rewrites: Any) -> Sampler:
    """The sampler with the rewriters applied.

    Args:
        sampler: a registered name, or a sampler.
        rewrites: `da.restart(...)`, `{"name": "restart", ...}`, a list of these, or None.

    Raises:
        OptionError: unknown rewriters or options, two that exclude each other, or one that the sampler cannot take.
    """
    found, parts = get(sampler), read(rewrites)
    refuse_clashes([(REWRITERS, part) for part in parts])
    name = " + ".join([found.name, *map(str, parts)])
    for part in sorted(parts, key=lambda p: REWRITERS.kinds[p.name].stage not in INNER):
        found = REWRITERS.kinds[part.name].make(found, **part.options)
    return replace(found, name=name, rewrites=tuple(p.name for p in parts)) if parts else found


def with_loop(sampler: Sampler, loop: Loop, *, calls: bool, **changes: Any) -> Sampler:
    """The sampler with another loop that takes the same options.

    Args:
        loop: `loop(x, nodes, predict, noise, **options)`; with `calls` it is also given `calls=`, the total number of
            model calls (or None).
        changes: other fields of `Sampler`.
    """

    def renamed(x: Any, nodes: Nodes, predict: Any, noise: Any, **options: Any) -> Any:
        return loop(x, nodes, predict, noise, **options)

    old = [p for p in inspect.signature(sampler.loop).parameters.values() if p.name != "calls"]
    extra = [inspect.Parameter("calls", inspect.Parameter.KEYWORD_ONLY, default=None)] if calls else []
    renamed.__signature__ = inspect.Signature([*old, *extra])  # type: ignore[attr-defined]
    return replace(sampler, loop=renamed, **changes)


def with_edit(sampler: Sampler, edit: Callable[[Table, Nodes], Table]) -> Sampler:
    """The sampler whose finished tables go through `edit(table, nodes)`."""
    return replace(sampler, edits=(*sampler.edits, edit))


def cost_of(sampler: Sampler, intervals: int, options: Any) -> int:
    """Model calls that the sampler makes on a run of `intervals` intervals that ends before sigma = 0."""
    from ..core.path import Path

    path = Path.edm(0.01, 10.0)
    nodes = Nodes([path.at_lam(-1.0 + 2.0 * i / intervals) for i in range(intervals + 1)], path)
    return len(sampler.trace(nodes, **options))


def listed() -> Sequence[str]:
    """The names of the registered rewriters."""
    importlib.import_module("diffaccel.samplers")
    return sorted(REWRITERS.kinds)
