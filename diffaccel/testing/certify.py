"""The certificate of one sampler: what it is, measured, and every check. `diffaccel certify module:function`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DiffaccelError, OptionError
from ..samplers.registry import REGISTRY, Sampler, get, samplers
from .anywhere import check_anywhere, drawn
from .checks import CHECKS, Result
from .runs import PATHS, run_nodes, unroll

SAME = 1e-10


@dataclass(frozen=True)
class Certificate:
    """What `certify` measured.

    Args:
        sampler: name, with options.
        declared: order that the sampler declares.
        measured: order that was measured (weak order if it draws noise).
        calls: (model calls asked, intervals of the grid that they make) for a few counts.
        depth: predictions kept, the current one included.
        registers: running values kept.
        draws: noise draws kept (0: deterministic).
        same: other registered samplers (with options) that are the same method.
        results: of all checks.
    """

    sampler: str
    declared: float
    measured: float
    calls: tuple[tuple[int, int], ...]
    depth: int
    registers: int
    draws: int
    same: tuple[str, ...]
    results: tuple[Result, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(r.passed for r in self.results)

    def __str__(self) -> str:
        noise = f", {self.draws} draw(s) of noise" if self.draws else ", deterministic"
        counts = ", ".join(f"{n} calls: {k} interval(s)" for n, k in self.calls)
        lines = [
            f"sampler          {self.sampler}",
            f"order            {self.measured:.2f} measured, {self.declared:g} declared",
            f"memory           {self.depth} prediction(s), {self.registers} register(s){noise}",
            f"model calls      {counts}",
            f"same method as   {', '.join(self.same) or 'no other registered sampler'}",
            "",
            *(f"  {'ok    ' if r.passed else 'FAILED'}  {r.name:<16} {_evidence(r)}" for r in self.results),
            "",
            f"{sum(r.passed for r in self.results)} of {len(self.results)} checks passed",
        ]
        return "\n".join(lines)


def _evidence(result: Result) -> str:
    return f"{result.value:.3g} (limit {result.limit:.3g}) {result.detail}".rstrip()


def certify(sampler: str | Sampler, options: Mapping[str, Any] | None = None, cases: int = 0) -> Certificate:
    """Run every check on a registered name or a `Sampler`, with these options.

    Args:
        sampler, options: what is checked.
        cases: runs drawn at random beside the fixed ones (path, grid, 1 to 50 calls, end, first call): see
            `anywhere.drawn`.

    Raises:
        OptionError: if the name or an option is unknown, or the sampler cannot make a table; cases < 0.
    """
    if cases < 0:
        raise OptionError(f"cases={cases}: a number of runs, 0 or more")
    made, given = get(sampler), dict(options or {})
    table = made.trace(run_nodes(made, given, PATHS["vp"], 20, "linspace_open"), 20, **given)
    results = tuple(check(made, given) for check in CHECKS.values())
    if cases:
        results += (check_anywhere(made, given, drawn(cases)),)
    return Certificate(
        label(made.name, given),
        made.order_of(**given),
        next(r.value for r in results if r.name == "order"),
        tuple((n, made.intervals_of(n, **given)) for n in (1, 5, 10)),
        table.depth,
        table.slots,
        table.noise_depth,
        equal_methods(made, given),
        results,
    )


def equal_methods(sampler: Sampler, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Registered samplers, with their defaults or a variant, whose states are the same combinations on a standard run.

    The run has 12 steps of changing size from pure noise to sigma = 0; predictions are compared in data space.
    """
    mine, own = _standard(sampler, options), sampler.options(options)
    same = []
    for other in samplers().values():
        for given in other.settings:
            try:
                theirs = _standard(other, given)
            except DiffaccelError:  # somebody's plug-in that does not trace: its own certificate says so
                continue
            if other.name == sampler.name and other.options(given) == own:
                continue
            if mine.shape == theirs.shape and float(np.max(np.abs(mine - theirs))) < SAME:
                same.append(label(other.name, given))
    return tuple(same)


def _standard(sampler: Sampler, options: Mapping[str, Any]) -> np.ndarray:
    return unroll(sampler.trace(run_nodes(sampler, options, PATHS["flow_shift3"], 12, "linspace_open"), 12, **options))


def label(name: str, options: Mapping[str, Any]) -> str:
    """A sampler with options, as the tables of the documentation name it."""
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in options.items())})" if options else name


# ---------------------------------------------------------------------- command line
def find(target: str) -> Sampler:
    """The sampler called `target`: a registered name, or `module:object` with a registered loop or a `Sampler`.

    Raises:
        OptionError: if there is none.
    """
    module, colon, name = target.partition(":")
    if not colon:
        return get(target)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"cannot certify {target!r}: {error}") from error
    if isinstance(found, Sampler):
        return found
    for made in REGISTRY.values():
        if made.loop is found:
            return made
    raise OptionError(
        f"{target!r} is a {type(found).__name__} that is not registered: put @diffaccel.sampler(name, order=...) "
        "above the loop, or name a Sampler"
    )
