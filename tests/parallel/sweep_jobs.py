"""`diffaccel eval sweep` by 1 and 2 forked processes, and killed in between; prints one JSON. No test file."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import accelerate  # noqa: F401 - imported once, before the forks
import torch
from ranks import fork, met, wait

import diffaccel.eval.report_run
import diffaccel.painter  # noqa: F401 - so are torch, diffusers and transformers
from diffaccel.cli import main

torch.set_num_threads(1)
WORK = Path(sys.argv[1])
BLOCKS = 2 + 3 * 2 * 4  # of the teachers; of three stock schedulers and one of ours at 2 and 3 calls, 3 blocks


def start(out: str, size: int, *more: str) -> list[int]:
    given = ["eval", "sweep", "tiny-sd", "--schedulers", "dpmpp:order=2", "--calls", "3", "--images", "12", "--cpu"]
    given += ["--batch", "4", "--block", "4", "--teacher-calls", "8", "--teacher-images", "4"]
    return fork(size, lambda: main([*given, "--out", str(WORK / out), *more]), WORK / f"{out}.log")


def painted(out: str) -> int:
    return sum(p.stem.count(".") == 0 for p in (WORK / out).glob("cells/*/*.npz"))


def run(out: str, size: int, *more: str) -> list[int]:
    return met(lambda: start(out, size, *more), WORK / f"{out}.log", 300)


def killed(out: str, size: int) -> list[int]:
    """Kill rank 1 when a quarter of the blocks is there; rank 0 then ends too, as torchrun sees to it."""
    pids = start(out, size)
    while painted(out) < BLOCKS // 4:
        time.sleep(0.01)
    for pid in reversed(pids):
        os.kill(pid, signal.SIGKILL)
    return wait(pids)


found: dict = {f"w{size}": run(f"w{size}", size) for size in (1, 2)}
found["killed"] = killed("broken", 2)
found["left_after_kill"] = painted("broken")
found["resumed"] = run("broken", 1)
found["stranger"] = run("bad", 2, "--reference", "nowhere")
print(json.dumps(found))
