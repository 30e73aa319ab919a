"""`diffaccel calibrate cache` by 1, 2 and 3 forked processes; prints one JSON. No test file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import accelerate  # noqa: F401 - imported once, before the forks
import torch
from ranks import fork, met

import diffaccel.calibrate.cache
import diffaccel.painter  # noqa: F401 - so are torch, diffusers and transformers
from diffaccel.calibrate.cache_runs import Runs
from diffaccel.cli import main

torch.set_num_threads(1)
WORK = Path(sys.argv[1])
SMALL = {"full": 4, "images": 2, "select": 4, "fit": 9, "held_out": 8, "thresholds": (0.1, 0.3), "progress": False}


def timed(self: Runs, batch: object) -> float:
    """The run is made, its time is not looked at: what is compared with a cache would depend on it."""
    REAL(self, batch)
    return 1.0


REAL, Runs._timed = Runs._timed, timed


def run(name: str, size: int, **changes: object) -> list[int]:
    given = ["calibrate", "cache", "tiny-sd", "--guidance", "1", "--calls", "8", "--cpu"]
    given += [f"--set={key}={value}" for key, value in {**SMALL, **changes}.items()]
    out, log = WORK / f"{name}.safetensors", WORK / f"{name}.log"
    return met(lambda: fork(size, lambda: main([*given, "--out", str(out)]), log), log, 300)


found = {f"w{size}": run(f"w{size}", size) for size in (1, 2)}
found["tac"] = run("tac", 2, full=(), compensation="tac", thresholds=())
found["tac alone"] = run("tac alone", 1, full=(), compensation="tac", thresholds=())
found["few"] = run("few", 3)  # two images to measure on
print(json.dumps(found))
