"""`diffaccel generate` by 1, 2, 3 and 4 forked processes, and killed in between; prints one JSON. No test file."""

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

import diffaccel.painter  # noqa: F401 - so are torch, diffusers and transformers
from diffaccel.cli import main
from diffaccel.testing.pipelines import build

torch.set_num_threads(1)
WORK = Path(sys.argv[1])
IMAGES = 20
build("sd15").save_pretrained(WORK / "model")
(WORK / "prompts.txt").write_text("a red fox\na blue coat\na green hat\n", encoding="utf-8")


def start(out: str, size: int, *more: str) -> list[int]:
    given = ["generate", str(WORK / "model"), "--prompts", str(WORK / "prompts.txt"), "--out", str(WORK / out), "--cpu"]
    given += ["--calls", "3", "--batch", "2", "--seeds", f"0-{IMAGES - 1}", "--height", "32", "--width", "32", *more]
    return fork(size, lambda: main(given), WORK / f"{out}.log")


def run(out: str, size: int, *more: str) -> list[int]:
    return met(lambda: start(out, size, *more), WORK / f"{out}.log")


def killed(out: str, size: int, victims: list[int]) -> list[int]:
    """Kill ranks when a quarter of the images is there; the others are then killed too, as torchrun does."""
    pids = start(out, size)
    while sum(1 for _ in (WORK / out).glob("*/*.png")) < IMAGES // 4:
        time.sleep(0.01)
    for rank in [*victims, *(r for r in range(size) if r not in victims)]:
        os.kill(pids[rank], signal.SIGKILL)
    return wait(pids)


found: dict = {f"w{size}": run(f"w{size}", size) for size in (1, 2, 3, 4)}
found["killed"] = killed("broken", 2, [1])
found["killed_again"] = killed("broken2", 3, [0, 2])
found["left_after_kill"] = sum(1 for _ in (WORK / "broken").glob("*/*.png"))
found["resumed"] = run("broken", 3)
found["resumed_again"] = run("broken2", 1)
found["stranger"] = run("w2", 2, "--guidance", "2.0")
print(json.dumps(found))
