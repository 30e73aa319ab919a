"""Data that is held for some numbers of calls, asked for at another."""

from __future__ import annotations

import math
from collections.abc import Iterable


def nearest_calls(held: Iterable[str | int], calls: int) -> str:
    """The number of calls of `held` whose ratio to `calls` is nearest to 1; of two, the larger."""
    return str(min(map(int, held), key=lambda k: (abs(math.log(k / calls)), -k)))
