"""Whether all ranks, or a folder and a run, mean the same; and if not, where they differ."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from .world import World, WorldError


def plain(value: Any) -> Any:
    """As JSON gives it back, with the names of infinite values and NaN, which JSON lacks ("-Infinity")."""
    return parsed(json.dumps(value))


def parsed(text: str | bytes) -> Any:
    """What JSON text holds; also of files in which Python wrote infinite values bare."""
    return json.loads(text, parse_constant=str)


def same_on_all(world: World, what: str, values: dict[str, Any]) -> None:
    """Raise on every rank if `values` (plain JSON) differ between ranks; the message shows both sides."""
    found = [parsed(v) for v in world.gather(what, json.dumps(values).encode(), timeout=None)]
    for rank, theirs in enumerate(found):
        wrong = differences(found[0], theirs, "rank 0 has", f"rank {rank} has")
        if wrong:
            # every rank sees the same lists, so one report is enough
            raise WorldError(f"the ranks do not agree on the {what}:\n" + "\n".join(wrong), told=world.rank != 0)


def differences(left: Any, right: Any, left_has: str, right_has: str, at: str = "") -> list[str]:
    """A line for each leaf that differs between two JSON values."""
    if isinstance(left, dict) and isinstance(right, dict):
        keys: Iterable[str] = dict.fromkeys([*left, *right])
        return [
            line
            for k in keys
            for line in differences(left.get(k), right.get(k), left_has, right_has, f"{at}.{k}" if at else k)
        ]
    return [] if left == right else [f"  {at}: {left_has} {_short(left)}, {right_has} {_short(right)}"]


def in_both(left: Any, right: Any) -> tuple[Any, Any]:
    """Two JSON values without the keys that only one of them has."""
    if not isinstance(left, dict) or not isinstance(right, dict):
        return left, right
    pairs = {k: in_both(left[k], right[k]) for k in left if k in right}
    return {k: a for k, (a, _) in pairs.items()}, {k: b for k, (_, b) in pairs.items()}


def _short(value: Any, most: int = 120) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else text[:most] + "..."
