"""`diffaccel generate` by 1 to 4 forked processes, killed in between, and failing; prints one JSON. No test file."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import accelerate  # noqa: F401 - imported once, before the forks
import torch
from ranks import fork, met, wait

import diffaccel.painter  # noqa: F401 - so are torch, diffusers and transformers
from diffaccel.cli import main
from diffaccel.parallel import world
from diffaccel.testing.pipelines import build

torch.set_num_threads(1)
WORK = Path(sys.argv[1])
IMAGES = 20
PATIENCE = 6.0  # seconds without a sign of a rank, where one is killed
build("sd15").save_pretrained(WORK / "model")
build("dit").save_pretrained(WORK / "classes")
(WORK / "prompts.txt").write_text("a red fox\na blue coat\na green hat\n", encoding="utf-8")


def start(out: str, size: int, *more: str) -> list[int]:
    given = ["generate", str(WORK / "model"), "--prompts", str(WORK / "prompts.txt"), "--out", str(WORK / out), "--cpu"]
    given += ["--calls", "3", "--batch", "2", "--seeds", f"0-{IMAGES - 1}", "--height", "32", "--width", "32", *more]
    return fork(size, lambda: main(given), WORK / f"{out}.log")


def run(out: str, size: int, *more: str) -> list[int]:
    return met(lambda: start(out, size, *more), WORK / f"{out}.log")


def made(out: str) -> int:
    return sum(1 for _ in (WORK / out).glob("*/*.png"))


def killed(out: str, size: int, victims: list[int]) -> list[int]:
    """Kill ranks, in this order, when a quarter of the images is there; the exit codes of all."""
    pids = start(out, size)
    while made(out) < IMAGES // 4:
        time.sleep(0.01)
    for rank in victims:
        os.kill(pids[rank], signal.SIGKILL)
    return wait(pids)


def orphaned(victim: int) -> dict:
    """One of two ranks is killed; then a run of three."""
    out, usual = f"without{victim}", world.open_world
    world.open_world = partial(usual, timeout=PATIENCE)
    try:
        codes = killed(out, 2, [victim])
    finally:
        world.open_world = usual
    found = {"codes": codes, "text": (WORK / f"{out}.log").read_text(), "left": made(out)}
    return found | {"resumed": run(out, 3)}


def failing(size: int) -> list[int]:
    """The fourth of six classes is none."""
    (WORK / "classes.txt").write_text("1\n2\n3\n5000\n4\n5\n", encoding="utf-8")
    given = ["generate", str(WORK / "classes"), "--prompts", str(WORK / "classes.txt"), "--cpu", "--calls", "2"]
    given += ["--batch", "1", "--out", str(WORK / "failing")]
    log = WORK / f"failing{size}.log"
    return met(lambda: fork(size, lambda: main(given), log), log)


found: dict = {f"w{size}": run(f"w{size}", size) for size in (1, 2, 3, 4)}
found["killed"] = killed("broken", 2, [1, 0])
found["killed_again"] = killed("broken2", 3, [0, 2, 1])
found["left_after_kill"] = made("broken")
found["resumed"] = run("broken", 3)
found["resumed_again"] = run("broken2", 1)
found["stranger"] = run("w2", 2, "--guidance", "2.0")
found |= {f"without{victim}": orphaned(victim) for victim in (0, 1)}
found |= {f"failing{size}": failing(size) for size in (2, 1)}
print(json.dumps(found))
