"""Ranks as threads of one process: what they gather is real, nothing is launched."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from diffaccel.parallel.protocol import SoloWorld


class ThreadWorld(SoloWorld):
    """Rank `rank` of `size`; all hold the same `table` and `meeting`. Ranks that gather different things fail."""

    def __init__(self, rank: int, size: int, table: dict[int, tuple[str, bytes]], meeting: threading.Barrier) -> None:
        super().__init__()
        self.rank, self.size, self.table, self.meeting = rank, size, table, meeting

    def gather(self, name: str, payload: bytes, **_: Any) -> list[bytes]:
        self.table[self.rank] = (name, payload)
        self.meeting.wait(30)
        said = [self.table[r] for r in range(self.size)]
        self.meeting.wait(30)
        assert {n for n, _ in said} == {name}, said
        return [p for _, p in said]


def as_ranks(size: int, job: Callable[[ThreadWorld], Any]) -> list[Any]:
    """`job(world)` of every rank, at the same time; what they return."""
    table: dict[int, tuple[str, bytes]] = {}
    meeting = threading.Barrier(size)

    def run(rank: int) -> Any:
        try:
            return job(ThreadWorld(rank, size, table, meeting))
        except BaseException:
            meeting.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
