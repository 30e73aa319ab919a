"""A command run by one process or by many: one report of an error, whoever meets it first."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import DiffaccelError, OptionError

if TYPE_CHECKING:
    from .parallel.world import World


def run_ranked(job: Callable[[World], int], *, cpu: bool, threads: int, processes: int | None = None) -> int:
    """The exit code of a command: that of `job`; 2: refused or failed; 130: stopped by Ctrl-C.

    Args:
        job: everything that a rank does.
        cpu: stay on the CPU.
        threads: CPU threads of each process.
        processes: how many there should be, if that is to be checked.
    """
    if threads < 1:
        raise OptionError(f"--threads is 1 or more, got {threads}")
    from .parallel.world import WorldError, open_world

    try:
        world = open_world(cpu=cpu, threads=threads)
    except WorldError as error:
        if error.told:
            return 2
        raise
    try:
        if processes is not None and processes != world.size:
            raise OptionError(
                f"--processes {processes} was asked for but {world.size} run; `accelerate launch --cpu "
                "--num_processes P` starts one: use torchrun --nproc-per-node P"
            )
        return job(world)
    except KeyboardInterrupt:
        if world.rank == 0:
            print("\ndiffaccel: stopped; what is finished is kept, the same command goes on", file=sys.stderr)
        return 130
    except Exception as error:
        told = isinstance(error, WorldError) and error.told
        if world.size == 1:
            raise
        if world.abort(_first_lines(error)) and not told:  # one report in all: by the rank that failed first
            if not isinstance(error, DiffaccelError):
                traceback.print_exc()
            print(f"diffaccel: rank {world.rank} of {world.size}: {_first_lines(error)}", file=sys.stderr, flush=True)
        return 2
    finally:
        world.close()


def _first_lines(error: BaseException, most: int = 12) -> str:
    text = str(error) if isinstance(error, DiffaccelError) else f"{type(error).__name__}: {error}"
    return "\n".join(text.splitlines()[:most])
