"""Units of work for all processes of a sweep: each takes the next as soon as it is free, so that none waits long."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..parallel.generate import STALL
from ..parallel.world import World
from .cells import Block, Cell

Unit = tuple[Cell, Block]


def take_turns(
    units: Sequence[Unit],
    missing: Callable[[Cell, Block], bool],
    work: Callable[[Cell, Block], None],
    cost: Callable[[Cell, Block], int],
    world: World,
    *,
    name: str,
    unit: str,
    progress: bool,
) -> int:
    """Do the units that rank 0 finds missing; how many there were. Returns when all ranks are done.

    Args:
        units: the same list in every process.
        missing: asked by rank 0 alone.
        work: done by one rank for each missing unit.
        cost: of a unit, for the bar.
        world: this process among the others.
        name, unit: of the bar that rank 0 shows if `progress`.
    """
    show = progress and world.rank == 0
    todo = [i for i, u in enumerate(units) if missing(*u)] if world.rank == 0 else None
    told = None if todo is None else json.dumps({"run": time.time_ns(), "todo": todo}).encode()
    start = json.loads(world.broadcast(f"what to {name}", told, timeout=None))
    left = [units[i] for i in start["todo"]]
    ticket, done = f"{name}/{start['run']}/next", f"{name}/{start['run']}/done"
    with _bar(sum(cost(*u) for u in left), name, unit, show) as update:
        while (turn := world.add(ticket, 1)) <= len(left):
            work(*left[turn - 1])
            update(world.add(done, cost(*left[turn - 1])))
        world.gather(f"end of {name}", b"", timeout=None, stall=STALL, tick=lambda: update(world.add(done, 0)))
        update(world.add(done, 0))
    return len(left)


@contextmanager
def _bar(total: int, what: str, unit: str, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar; what it yields is told how much all processes have done in this run."""
    if not (show and total):
        yield lambda done: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=what, unit=unit, unit_scale=True) as bar:

        def update(done: int) -> None:
            bar.update(done - bar.n)

        yield update
