"""Scenarios of tests/parallel/test_world.py, run in one process that forks; prints one JSON object. No test file."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import accelerate  # noqa: F401 - imported once, before the forks
import numpy as np
from ranks import say, timed

import diffaccel.parallel.generate
from diffaccel.errors import RunError
from diffaccel.parallel.agree import same_on_all
from diffaccel.parallel.folder import Folder, FolderError
from diffaccel.parallel.generate import Painted, generate, tasks_for
from diffaccel.parallel.world import WorldError, open_world

WORK = Path(sys.argv[1])
diffaccel.parallel.generate.STALL = 3.0


def messages() -> int:
    world = open_world(cpu=True, timeout=20)
    seen = world.gather("names", f"rank {world.rank}".encode())
    assert seen == [f"rank {r}".encode() for r in range(world.size)]
    assert world.broadcast("word", b"hello" if world.rank == 0 else None) == b"hello"
    world.add("images", world.rank + 1)
    world.barrier("counted")
    assert world.add("images", 0) == sum(range(1, world.size + 1))
    same_on_all(world, "recipe", {"a": {"b": 1}})
    world.close()
    return 0


def disagree() -> int:
    world = open_world(cpu=True, timeout=20)
    try:
        same_on_all(world, "recipe", {"calls": 5 + world.rank, "same": 1})
    except WorldError as error:
        if not error.told:
            say(str(error))
        return 2
    finally:
        world.close()
    return 0


def _paint_then(act) -> int:
    world = open_world(cpu=True, timeout=5)

    def paint(tasks):
        time.sleep(0.05)
        act(world, tasks)
        return Painted(np.full((len(tasks), 4, 4, 3), 0.5), 1)

    try:
        generate(
            paint,
            tasks_for([f"p{i}" for i in range(40)]),
            WORK / act.__name__,
            batch=2,
            recipe={},
            world=world,
            progress=False,
        )
    except Exception as error:
        told = isinstance(error, WorldError) and error.told
        if world.abort(str(error)) and not told:
            say(f"REPORT rank {world.rank}: {error}")
        return 2
    finally:
        world.close()
    return 0


def _full(folder, index, pixels):
    raise FolderError("the disk is full")


def raises(world, tasks) -> None:
    if world.rank == 1 and tasks[0].index > 8:
        Folder.save = _full


def host_raises(world, tasks) -> None:
    if world.rank == 0 and tasks[0].index > 8:
        Folder.save = _full


def fails(world, tasks) -> None:
    if world.rank == 1 and tasks[0].index == 32:
        raise RunError("the model broke")


def dies(world, tasks) -> None:
    if world.rank == 1 and tasks[0].index > 8:
        os.kill(os.getpid(), signal.SIGKILL)


def hangs(world, tasks) -> None:
    if world.rank == 1 and tasks[0].index > 8:
        time.sleep(10)  # its heartbeat goes on


print(
    json.dumps(
        {
            "messages": timed(3, messages, WORK / "messages.log"),
            "disagree": timed(3, disagree, WORK / "disagree.log"),
            "raises": timed(3, lambda: _paint_then(raises), WORK / "raises.log"),
            "host_raises": timed(2, lambda: _paint_then(host_raises), WORK / "host_raises.log"),
            "fails": timed(3, lambda: _paint_then(fails), WORK / "fails.log"),
            "dies": timed(3, lambda: _paint_then(dies), WORK / "dies.log"),
            "hangs": timed(2, lambda: _paint_then(hangs), WORK / "hangs.log"),
        }
    )
)
