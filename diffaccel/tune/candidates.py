"""Where candidates come from. A source is a function of what is asked; anybody can register one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..artifact import Artifact
from ..errors import OptionError, one_of
from ..pipelines.recipe import Choice
from ..schedulers.from_config import Reading

USUAL = ("solvers", "rewriters", "fitted")


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
