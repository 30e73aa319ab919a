"""Runs a function as several ranks: forks of one small process, so that torch is imported once. No test file."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

# Ranks that start at the very same time meet too early for torch: where three programs ran, about one first connection
# in twenty to the store that rank 0 was just opening stayed unanswered until the time-out, and none after this pause.
LATER = 0.3


def free_port() -> int:
    """A free port, not of those that systems give to connections: one of these may be taken before it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port


def fork(size: int, job: Callable[[], int], log: Path) -> list[int]:
    """Start `job` in `size` processes with torchrun's variables; their ids. Their output goes to `log`."""
    port, found = str(free_port()), []
    for rank in range(size):
        pid = os.fork()
        if pid:
            found.append(pid)
            continue
        code = 99
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            time.sleep(LATER if rank else 0.0)
            code = job()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return found


def say(text: str) -> None:
    """A line of the log, in one piece: others write there too, and some of them parts of lines."""
    os.write(1, f"\n{' | '.join(text.splitlines())}\n".encode())


def met(start: Callable[[], list[int]], log: Path, seconds: float = 90.0) -> list[int]:
    """Exit codes of ranks that met (see `LATER`): others are started again."""
    for _ in range(4):
        log.unlink(missing_ok=True)
        codes = wait(start(), seconds)
        if "could not meet the others" not in log.read_text():
            break
    return codes


def timed(size: int, job: Callable[[], int], log: Path) -> dict:
    """Exit codes, output and seconds of a job."""
    began = 0.0

    def start() -> list[int]:
        nonlocal began
        began = time.monotonic()
        return fork(size, job, log)

    codes = met(start, log)
    return {"codes": codes, "text": log.read_text(), "seconds": time.monotonic() - began}


def wait(pids: list[int], seconds: float = 90.0) -> list[int]:
    """Exit codes (-9 for a killed process); a process that does not end in time fails the test."""
    end, codes = time.monotonic() + seconds, {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise TimeoutError(f"hung: only {codes} of {pids} ended in {seconds} s")
        time.sleep(0.02)
    return [codes[pid] for pid in pids]
