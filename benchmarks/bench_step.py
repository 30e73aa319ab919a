"""Time of `step()` and `set_timesteps()` against diffusers' own schedulers: ratios within one run, one thread.

    python benchmarks/bench_step.py [--rounds 15] [--out docs/results/step.json]

1x4x64x64 float32, 50 calls, no model; CPU seconds. Each figure is the fastest of the rounds, interleaved so that all
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
import numpy as np
import torch

from diffaccel import TableScheduler, epsilon_scale, momentum, restart, samplers, time_shift
from diffaccel.core.quad import Ems

VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CALLS = 50
SHAPE = (1, 4, 64, 64)
LIMITS = {"ddim": 0.65, "dpmpp": 0.35}  # ours over diffusers' DDIM, and over its DPM-Solver++ 2M
V3_LIMIT = 2.0  # DPM-Solver-v3 with statistics by element, whatever its options, over our DPM-Solver++
V3_OPTIONS = ({"order": 2, "corrector": None}, {"order": 3, "corrector": None}, {"order": 3, "corrector": "same"},
              {"order": 3})  # fmt: skip
STATISTICS = {"by element": SHAPE[1:], "by channel": (SHAPE[1], 1, 1), "scalar": ()}


def schedulers() -> dict[str, Any]:
    """The two rivals, and every deterministic sampler of ours."""
    found: dict[str, Any] = {
        "diffusers DDIM": diffusers.DDIMScheduler(**VP, clip_sample=False),
        "diffusers DPM-Solver++ 2M": diffusers.DPMSolverMultistepScheduler(**VP),
    }
    for name, sampler in samplers().items():
        if sampler.stochastic or name == "fitted":  # a fitted table is its artifact's
            continue
        takes = sampler.calibrated
        options = {} if takes is None else {takes.option: sampler.defaults[takes.option]}
        found[f"diffaccel {name}"] = TableScheduler(**VP, sampler=name, sampler_options=options)
    for kind, shape in STATISTICS.items():
        found[f"diffaccel dpm_v3 {kind}"] = TableScheduler(**VP, sampler="dpm_v3", sampler_options=statistics(shape))
    for options in V3_OPTIONS:
        name = "diffaccel dpm_v3 by element, " + ", ".join(f"{k} {v}" for k, v in options.items())
        full = {**statistics(SHAPE[1:]), **options}
        found[name] = TableScheduler(**VP, sampler="dpm_v3", sampler_options=full)
    shift = {"policy": [time_shift(40, 300)]}
    found["diffaccel ddim + time_shift"] = TableScheduler(**VP, sampler="ddim", **shift)
    found["diffaccel ddpm"] = TableScheduler(**VP, sampler="ddpm")
    found["diffaccel ddpm + time_shift"] = TableScheduler(**VP, sampler="ddpm", **shift)
    found["diffaccel dpmpp + restart"] = TableScheduler(**VP, sampler="dpmpp", rewrite=[restart([(4, 2, 0.3, 2.0)])])
    found["diffaccel dpmpp + epsilon_scale"] = TableScheduler(**VP, sampler="dpmpp", rewrite=[epsilon_scale(1.005)])
    found["diffaccel dpmpp + momentum"] = TableScheduler(**VP, sampler="dpmpp", rewrite=[momentum(0.8)])
    found["diffaccel unipc order 3"] = TableScheduler(**VP, sampler="unipc", sampler_options={"order": 3})
    return found


def statistics(shape: tuple[int, ...]) -> dict[str, Any]:
    """Options of dpm_v3 with some statistics of this shape; what they are does not change the time."""
    rng, lam = np.random.default_rng(0), np.linspace(-2.7, 3.6, 61)
    l, s, b = (rng.standard_normal((61, *shape)) for _ in range(3))
    return {"statistics": Ems(lam, 1 + 0.1 * l, 0.3 * s, 0.1 * b)}


def one_step(scheduler: Any) -> float:
    """Seconds a step, over one run."""
    scheduler.set_timesteps(CALLS)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x, outputs = torch.randn(SHAPE), [torch.randn(SHAPE) for _ in range(CALLS)]
    start = time.thread_time()
    for output, t in zip(outputs, scheduler.timesteps, strict=True):
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return (time.thread_time() - start) / CALLS


def one_plan(scheduler: Any) -> float:
    """Seconds of set_timesteps."""
    start = time.thread_time()
    scheduler.set_timesteps(CALLS)
    return time.thread_time() - start


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
    print(f"{'scheduler':52s} {'us/step':>8} {'/ DDIM':>7} {'/ DPM++':>7} {'set_timesteps(50) ms':>21}")
    for name, seconds in steps.items():
        print(f"{name:52s} {1e6 * seconds:8.1f} {seconds / ddim:7.2f} {seconds / dpmpp:7.2f} {1e3 * plans[name]:21.2f}")
    ratios = {k: v / steps["diffaccel dpmpp"] for k, v in steps.items() if "dpm_v3 by element" in k}
    slowest = max(ratios, key=lambda k: ratios[k])
    print(f"slowest DPM-Solver-v3: {slowest}: {ratios[slowest]:.2f} x our DPM-Solver++ (goal {V3_LIMIT})")
    ours = {k: v for k, v in steps.items() if k.startswith("diffaccel") and "dpm_v3 by" not in k}
    worst = max(ours, key=lambda k: ours[k])
    print(
        f"slowest of ours: {worst}: {ours[worst] / ddim:.2f} x DDIM (goal {LIMITS['ddim']}), "
        f"{ours[worst] / dpmpp:.2f} x DPM-Solver++ 2M (goal {LIMITS['dpmpp']})"
    )
    if args.out:
        rows = {n: {"step_us": 1e6 * s, "over_ddim": s / ddim, "over_dpmpp": s / dpmpp, "plan_ms": 1e3 * plans[n]}
                for n, s in steps.items()}  # fmt: skip
        head = {"calls": CALLS, "shape": SHAPE, "torch": torch.__version__}
        args.out.write_text(json.dumps({**head, "v3_over_dpmpp": ratios, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
