"""Does a sampler stay finite wherever a user may put it? All runs that can be asked for, or some drawn at random."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ..core.table import Table
from ..errors import DiffaccelError, OptionError
from ..samplers.begin import begin_at
from ..samplers.registry import Sampler
from .checks import LARGEST, Result, growth, worst
from .runs import PATHS, Options, laid, run_nodes, traced

MOST = 50  # model calls of a run
FINALS = ("zero", "sigma_min")


@dataclass(frozen=True)
class Place:
    """A run: path, grid, model calls, end, and the row at which it begins."""

    path: str
    grid: str
    calls: int
    final: str
    begin: int

    def __str__(self) -> str:
        return f"{self.path}, {self.grid}, {self.calls} calls, final {self.final}, begun at call {self.begin}"


def every() -> Iterator[Place]:
    """Every path, grid, number of calls of 1 to 50 and end, from the first call."""
    for (path, grid), calls, final in itertools.product(laid(), range(1, MOST + 1), FINALS):
        yield Place(path, grid, calls, final, 0)


def drawn(cases: int, seed: int = 0) -> Iterator[Place]:
    """`cases` runs, drawn evenly from those of `every`; nearly half of them begin at another call than the first."""
    rng, choice = np.random.default_rng(seed), laid()
    for _ in range(cases):
        path, grid = choice[rng.integers(len(choice))]
        calls = int(rng.integers(1, MOST + 1))
        begin = int(rng.integers(calls)) if rng.random() < 0.5 else 0
        yield Place(path, grid, calls, FINALS[rng.integers(2)], begin)


def table_of(sampler: Sampler, options: Options, place: Place) -> Table:
    """The rows that a scheduler would run there."""
    where = PATHS[place.path], place.calls, place.grid, place.final
    table = traced(sampler, options, *where)
    if not place.begin:
        return table
    nodes = run_nodes(sampler, options, *where)  # the very ones that the table was traced on
    return begin_at(table, nodes, place.begin, sampler, sampler.options(dict(options)))


def check_anywhere(sampler: Sampler, options: Options, places: Iterable[Place]) -> Result:
    """The largest state over these runs, in units of `hypot(alpha, sigma)`, for predictions in [-1, 1].

    What a sampler refuses as an option (a begin in the middle of what it cannot divide) is counted, not failed.
    """
    refused = made = 0

    def found() -> Iterator[tuple[float, str]]:
        nonlocal refused, made
        yield 0.0, "nowhere"
        for place in places:
            try:
                table = table_of(sampler, options, place)
            except OptionError:
                refused += 1
                continue
            except DiffaccelError as error:
                yield math.inf, f"{place}: {error}"
                continue
            made += 1
            yield growth(table), str(place)

    most = worst("finite_anywhere", LARGEST, found())
    told = f"{most.detail}; {made} runs" + (f", {refused} refused" if refused else "")
    return Result(most.name, most.passed and made > 0, most.value, most.limit, told)
