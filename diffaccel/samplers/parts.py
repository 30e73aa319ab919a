"""Named parts of a run with options that survive JSON: rewriters (before the run) and policies (during it)."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from ..errors import OptionError, no_leftover, one_of


@dataclass(frozen=True)
class Part:
    """A rewriter or policy with its options, as users list it and as a config holds it.

    Args:
        name: as registered.
        options: those that were given; plain JSON values.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.options.items())})"

    def to_config(self) -> dict[str, Any]:
        """The form in which a scheduler's config holds it."""
        return {"name": self.name, **self.options}


@dataclass(frozen=True)
class Kind:
    """What is registered under a name.

    Args:
        name: as users type it.
        make: a function of the options, or of a subject (what is rewritten) and the options.
        subject: whether there is a subject.
        stage: where it stands in the fixed order.
        rank: its place within the stage.
        clashes: other parts (rewriters or policies) that it cannot be combined with, and why.
    """

    name: str
    make: Callable[..., Any]
    stage: str
    rank: int = 0
    clashes: Mapping[str, str] = field(default_factory=dict)
    subject: bool = True

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """The options."""
        return list(inspect.signature(self.make).parameters.values())[self.subject :]


class Register:
    """The register of one sort of parts.

    Args:
        what: "rewriter" or "policy", for messages.
        stages: the fixed order in which parts act, whatever order the user lists.
        subject: whether the functions take what is rewritten before their options.
    """

    def __init__(self, what: str, stages: Sequence[str], *, subject: bool = True) -> None:
        self.what, self.stages, self.subject = what, tuple(stages), subject
        self.kinds: dict[str, Kind] = {}

    def __call__(
        self, name: str, *, stage: str, rank: int = 0, clashes: Mapping[str, str] | None = None
    ) -> Callable[[Callable[..., Any]], Callable[..., Part]]:
        """Register a function; the decorated name then makes a `Part` from the options.

        Raises:
            OptionError: if the name is taken by another function.
        """
        one_of(f"stage of {self.what} {name!r}", stage, self.stages)

        def register(make: Callable[..., Any]) -> Callable[..., Part]:
            old = self.kinds.get(name)
            place = (make.__module__, make.__qualname__)
            if old is not None and (old.make.__module__, old.make.__qualname__) != place:
                raise OptionError(f"a {self.what} named {name!r} is registered already, by {old.make.__module__}")
            kind = self.kinds[name] = Kind(name, make, stage, rank, dict(clashes or {}), self.subject)
            signature = inspect.Signature(kind.parameters, return_annotation=Part)

            @functools.wraps(make)
            def part(*args: Any, **options: Any) -> Part:
                try:
                    bound = signature.bind(*args, **options)
                except TypeError as error:
                    raise OptionError(f"{self.what} {name!r}: {error}; it takes {signature}") from None
                return Part(name, self._plain(name, bound.arguments))

            part.__signature__ = signature  # type: ignore[attr-defined]
            return part

        return register

    def read(self, given: Any) -> list[Part]:
        """What a user or a config lists, in the fixed order.

        Raises:
            OptionError: an unknown name or option, or a part that is listed twice.
        """
        if given is None:
            return []
        listed = [given] if isinstance(given, (Part, Mapping, str)) else list(given)
        parts = sorted((self._read(entry) for entry in listed), key=self._place)
        for a, b in pairwise(parts):
            if a.name == b.name:
                raise OptionError(f"{self.what} {a.name!r} is listed twice: {a} and {b}")
        return parts

    def _read(self, entry: Any) -> Part:
        if isinstance(entry, str):
            entry = Part(entry)
        if isinstance(entry, Mapping) and "name" in entry:
            entry = Part(str(entry["name"]), {k: v for k, v in entry.items() if k != "name"})
        if not isinstance(entry, Part):
            raise OptionError(f"{entry!r} is no {self.what}; use one of {', '.join(sorted(self.kinds))}")
        one_of(self.what, entry.name, self.kinds)
        parameters = self.kinds[entry.name].parameters
        no_leftover(f"{self.what} {entry.name!r}", entry.options, [p.name for p in parameters])
        missing = [p.name for p in parameters if p.default is p.empty and p.name not in entry.options]
        if missing:
            raise OptionError(f"{self.what} {entry.name!r} needs {', '.join(missing)}")
        return Part(entry.name, self._plain(entry.name, entry.options))

    def _plain(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        return plain(f"{self.what} {name!r}", options)

    def _place(self, part: Part) -> tuple[int, int, str]:
        kind = self.kinds[part.name]
        return self.stages.index(kind.stage), kind.rank, part.name


def plain(what: str, options: Any) -> dict[str, Any]:
    """Options as JSON reads them back, so that what is saved equals what was given; arrays and tensors become lists.

    Raises:
        OptionError: if they are no dict, or one cannot be saved.
    """
    if not isinstance(options, Mapping):
        raise OptionError(f"{what}: options are a dict, got {options!r}")
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(options), default=_listed))
    except (TypeError, ValueError) as error:
        raise OptionError(f"{what}: an option cannot be saved: {error}") from None
    return found


def _listed(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def refuse_clashes(parts: Sequence[tuple[Register, Part]]) -> None:
    """Raise if two parts (of any register) exclude each other.

    Raises:
        OptionError: with both names and the reason.
    """
    for register, part in parts:
        for _, other in parts:
            reason = register.kinds[part.name].clashes.get(other.name)
            if other is not part and reason is not None:
                raise OptionError(f"{part.name!r} cannot be combined with {other.name!r}: {reason}")
