"""Time of `step()` and `set_timesteps()` against diffusers' own schedulers: ratios within one run, one thread.

    python benchmarks/bench_step.py [--rounds 15] [--out docs/results/step.json]

1x4x64x64 float32, 50 calls, no model. Each figure is the fastest of the rounds, which are interleaved so that all
schedulers see the same machine.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from diffaccel import TableScheduler, samplers

VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CALLS = 50
SHAPE = (1, 4, 64, 64)
LIMITS = {"ddim": 0.65, "dpmpp": 0.35}  # ours over diffusers' DDIM, and over its DPM-Solver++ 2M


def schedulers() -> dict[str, Any]:
    """The two rivals, and every deterministic sampler of ours."""
    found: dict[str, Any] = {
        "diffusers DDIM": diffusers.DDIMScheduler(**VP, clip_sample=False),
        "diffusers DPM-Solver++ 2M": diffusers.DPMSolverMultistepScheduler(**VP),
    }
    for name, sampler in samplers().items():
        if not sampler.stochastic:
            found[f"diffaccel {name}"] = TableScheduler(**VP, sampler=name)
    found["diffaccel unipc order 3"] = TableScheduler(**VP, sampler="unipc", sampler_options={"order": 3})
    return found


def one_step(scheduler: Any) -> float:
    """Seconds a step, over one run."""
    scheduler.set_timesteps(CALLS)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x, outputs = torch.randn(SHAPE), [torch.randn(SHAPE) for _ in range(CALLS)]
    start = time.perf_counter()
    for output, t in zip(outputs, scheduler.timesteps, strict=True):
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return (time.perf_counter() - start) / CALLS


def one_plan(scheduler: Any) -> float:
    """Seconds of set_timesteps."""
    start = time.perf_counter()
    scheduler.set_timesteps(CALLS)
    return time.perf_counter() - start


def fastest(measure: Callable[[Any], float], which: dict[str, Any], rounds: int) -> dict[str, float]:
    """The fastest of `rounds` interleaved rounds, by name."""
    best = dict.fromkeys(which, float("inf"))
    for _ in range(rounds):
        for name, scheduler in which.items():
            best[name] = min(best[name], measure(scheduler))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    which = schedulers()
    steps, plans = fastest(one_step, which, args.rounds), fastest(one_plan, which, args.rounds)
    ddim, dpmpp = steps["diffusers DDIM"], steps["diffusers DPM-Solver++ 2M"]
    print(f"{'scheduler':32s} {'us/step':>8} {'/ DDIM':>7} {'/ DPM++':>7} {'set_timesteps(50) ms':>21}")
    for name, seconds in steps.items():
        print(f"{name:32s} {1e6 * seconds:8.1f} {seconds / ddim:7.2f} {seconds / dpmpp:7.2f} {1e3 * plans[name]:21.2f}")
    ours = {k: v for k, v in steps.items() if k.startswith("diffaccel")}
    worst = max(ours, key=lambda k: ours[k])
    print(
        f"slowest of ours: {worst}: {ours[worst] / ddim:.2f} x DDIM (goal {LIMITS['ddim']}), "
        f"{ours[worst] / dpmpp:.2f} x DPM-Solver++ 2M (goal {LIMITS['dpmpp']})"
    )
    if args.out:
        rows = {n: {"step_us": 1e6 * s, "over_ddim": s / ddim, "over_dpmpp": s / dpmpp, "plan_ms": 1e3 * plans[n]}
                for n, s in steps.items()}  # fmt: skip
        args.out.write_text(
            json.dumps({"calls": CALLS, "shape": SHAPE, "torch": torch.__version__, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
