"""The errors that this package raises on purpose. Each says what is wrong, where, why, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DiffaccelError(Exception):
    """Base class: catch this to catch everything that diffaccel refuses."""


class OptionError(DiffaccelError, ValueError):
    """An option that is unknown, out of range, contradicts another, or would have no effect."""


class PathError(DiffaccelError, ValueError):
    """A config or a node that does not prove (or lie on) a Gaussian path."""


class TraceError(DiffaccelError, TypeError):
    """A sampler loop did something with a traced value that no table can hold."""


class RunError(DiffaccelError, RuntimeError):
    """The scheduler was driven in an order, or with values, that no run can have."""


class ArtifactError(DiffaccelError, ValueError):
    """A file that is no artifact, or an artifact of another checkpoint, path, shape or number of calls."""


class ArtifactWarning(UserWarning):
    """An artifact that may not fit: adapters it does not know, another guidance scale, other weights by request."""


def one_of(what: str, value: object, known: Iterable[str]) -> str:
    """Return `value` if it is among `known`; else raise `OptionError` with the nearest names."""
    names = sorted(known)
    if value in names:
        return str(value)
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise OptionError(f"unknown {what} {value!r}.{hint} Known: {', '.join(names)}.")


def no_leftover(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise `OptionError` if `given` names an option that `where` does not take."""
    accepted = sorted(known)
    for name in given:
        if name not in accepted:
            near = difflib.get_close_matches(name, accepted, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise OptionError(f"{where} takes no option {name!r}.{hint} It takes: {', '.join(accepted) or 'none'}.")
