"""Runs a function as several ranks: forks of one small process, so that torch is imported once. No test file."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


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
            code = job()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return found


def wait(pids: list[int], seconds: float = 60.0) -> list[int]:
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
