"""Which nodes of a run are not called: regular patterns and explicit lists (FSampler)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import OptionError

# history -> calls between skips that keep the history consecutive, which index weights need
ALLOWED = {2: range(2, 7), 3: range(3, 7), 4: range(4, 7)}
NAMES = tuple(f"h{h}/s{k}" for h, ks in ALLOWED.items() for k in ks)
LEAST = 2  # real answers under every extrapolation, so nodes 0 and 1 are always called


@dataclass(frozen=True)
class Regular:
    """`hN/sK`: history N, K calls between skips.

    Args:
        history: points of the predictor.
        between: model calls between two skips.
        protect: (first, last): nodes at both ends of a run that are always called.
    """

    history: int
    between: int
    protect: tuple[int, int] = (2, 2)

    @property
    def name(self) -> str:
        return f"h{self.history}/s{self.between}"

    def due(self, i: int, n: int, real: int) -> bool:
        """Whether node i of a run of n nodes is skipped, `real` answers having been seen before it."""
        first = max(self.protect[0], self.history)
        if not self.protect[0] <= i < n - self.protect[1] or real < self.history or i < first:
            return False
        return (i - first) % (self.between + 1) == self.between

    def skipped(self, n: int) -> list[int]:
        """The nodes of n that are not called."""
        found: list[int] = []
        for i in range(n):
            if self.due(i, n, i - len(found)):
                found.append(i)
        return found

    def nodes_for(self, calls: int) -> int:
        """The largest number of nodes on which the pattern makes exactly `calls` calls (there is one for each)."""
        n = calls
        while n + 1 - len(self.skipped(n + 1)) <= calls:
            n += 1
        return n


@dataclass(frozen=True)
class Explicit:
    """A list of nodes to skip; protected ends do not apply to it.

    Args:
        history: points of the predictor (fewer, where fewer real answers exist).
        listed: nodes in rising order, each 2 or more.
        streak_rule: FSampler's own rule, which drops listed nodes that follow another skip too closely: a counter
            starts at 2 and falls by 1 at every call; a skip needs it at 0 or below, or to continue a streak; the
            first call after a streak sets it to 1. Off: the list is honoured.
    """

    history: int
    listed: tuple[int, ...]
    streak_rule: bool = False

    @property
    def name(self) -> str:
        return f"h{self.history}, " + ", ".join(map(str, self.listed))

    def skipped(self, n: int) -> list[int]:
        """The nodes of n that are not called.

        Raises:
            OptionError: if a listed node is not among them.
        """
        outside = [i for i in self.listed if i >= n]
        if outside and not self.streak_rule:
            raise OptionError(f"skip {self.name!r}: this run has nodes 0..{n - 1}, so node {outside[0]} is none of it")
        return self._streaks(n) if self.streak_rule else list(self.listed)

    def dropped(self, n: int) -> list[int]:
        """Listed nodes that the streak rule calls nevertheless."""
        return [i for i in self.listed if i not in self.skipped(n)]

    def _streaks(self, n: int) -> list[int]:
        found: list[int] = []
        counter, streak = 2, False
        for i in range(n):
            if i in self.listed and (streak or counter <= 0):
                found.append(i)
                streak = True
            else:
                counter = 1 if streak else counter - 1
                streak = False
        return found

    def nodes_for(self, calls: int) -> int:
        """Nodes of a run of `calls` model calls.

        Raises:
            OptionError: if the list names a node that such a run does not have.
        """
        if not self.streak_rule:
            self.skipped(calls + len(self.listed))
            return calls + len(self.listed)
        n = calls
        while n + 1 - len(self.skipped(n + 1)) <= calls:
            n += 1
        return n


Pattern = Regular | Explicit


def parse(
    pattern: str | Sequence[int] | Pattern, protect: tuple[int, int] = (2, 2), *, streak_rule: bool = False
) -> Pattern:
    """A pattern from what users write: "h2/s3", "h3" (= h3/s3), "h3, 5, 9, 12", or a list of nodes.

    Args:
        protect: nodes at the two ends that a regular pattern always calls: 0 or more, 1 or more.
        streak_rule: see `Explicit`.

    Raises:
        OptionError: an unknown pattern (FSampler itself would then silently never skip), a node that has too few
            predecessors, or an option without effect.
    """
    if isinstance(pattern, (Regular, Explicit)):
        return pattern
    text = pattern.strip().lower() if isinstance(pattern, str) else ""
    if re.fullmatch(r"h\d+(/s\d+)?", text):
        points, _, between = text[1:].partition("/s")
        name = f"h{points}/s{between or points}"
        if name not in NAMES:
            raise OptionError(f"unknown skip pattern {pattern!r}; there are {', '.join(NAMES)}")
        if streak_rule:
            raise OptionError(f"streak_rule concerns explicit lists of nodes; it has no effect on {pattern!r}")
        return Regular(int(points), int(between or points), _protect(protect))
    history, given = _listed(text, pattern) if isinstance(pattern, str) else (2, [int(i) for i in pattern])
    listed = sorted(set(given))
    early = [i for i in listed if i < LEAST]
    if streak_rule:
        listed = [i for i in listed if i >= LEAST]
    elif early:
        raise OptionError(f"skip {pattern!r}: node {early[0]} cannot be predicted, for that takes {LEAST} real answers")
    if not listed:
        raise OptionError(f"skip {pattern!r} names no node that could be skipped")
    return Explicit(history, tuple(listed), streak_rule)


def _protect(protect: tuple[int, int]) -> tuple[int, int]:
    first, last = protect
    if first < 0 or last < 1:
        raise OptionError(f"protect = {protect}: the first number is 0 or more, the second 1 or more")
    return int(first), int(last)


def _listed(text: str, pattern: str) -> tuple[int, list[int]]:
    """History and nodes of a text such as "h3, 5, 9 12"; the first hN counts, h4 is the highest, h2 the default."""
    history, listed = 0, list[int]()
    for token in re.split(r"[,\s]+", text):
        if re.fullmatch(r"h\d+", token):
            history = history or min(4, int(token[1:]))
        elif token.isdigit():
            listed.append(int(token))
        elif token:
            raise OptionError(
                f"skip {pattern!r}: {token!r} is neither a node, nor a predictor (h2, h3, h4), nor a pattern "
                f"({', '.join(NAMES)})"
            )
    if history == 1:
        raise OptionError(f"skip {pattern!r}: a predictor takes 2 to 4 answers (h2, h3, h4)")
    return history or 2, listed
