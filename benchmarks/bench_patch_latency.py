"""Seconds and error of one image on 2 to 8 GPUs, against one GPU at equal calls and at equal time.

    torchrun --nproc-per-node 4 benchmarks/bench_patch_latency.py --model stabilityai/stable-diffusion-xl-base-1.0 \
        --size 1024 --calls 50 --out docs/results

One rank a GPU (NCCL). Rank 0 alone measures one GPU first, then all ranks together each mode. Error: root mean square
difference of latents to a run of 4 N calls on one GPU. "Equal time" is one GPU with as many calls as fit into the time
of the mode: what patches must beat. With `--cpu` it runs on gloo processes, whose seconds say nothing about GPUs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import diffaccel
from diffaccel import models
from diffaccel.parallel.protocol import World
from diffaccel.parallel.world import open_world

PROMPT = "a photo of a red coat on a white background"


def loaded(name: str, world: World) -> Any:
    """The pipeline on this rank's device."""
    if name in models.PIPELINES:
        pipe = models.load(name)
    else:
        pipe = DiffusionPipeline.from_pretrained(name, torch_dtype=torch.float16)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(world.device)


def latents(pipe: Any, calls: int, args: argparse.Namespace) -> torch.Tensor:
    """One image, without its decoding."""
    generator = torch.Generator("cpu").manual_seed(0)
    kwargs = {"height": args.size, "width": args.size, "generator": generator, "output_type": "latent"}
    kwargs |= models.CALL_DEFAULTS.get(args.model, {})
    return pipe(PROMPT, num_inference_steps=calls, **kwargs).images.float().cpu()


def timed(pipe: Any, calls: int, args: argparse.Namespace) -> tuple[torch.Tensor, float]:
    """Latents, and the median seconds of `repeat` runs after one that warms up."""
    x, seconds = latents(pipe, calls, args), []
    for _ in range(args.repeat):
        start = time.perf_counter()
        latents(pipe, calls, args)  # `.cpu()` waits for the device
        seconds.append(time.perf_counter() - start)
    return x, statistics.median(seconds)


def error(x: torch.Tensor, target: torch.Tensor) -> float:
    """Root mean square difference, in units of the target's standard deviation."""
    return float((x - target).square().mean().sqrt() / target.std())


def measure(world: World, args: argparse.Namespace) -> dict[str, Any]:
    """One device on rank 0, then every mode on all ranks."""
    pipe, found = loaded(args.model, world), {}
    teacher, plain, alone = None, None, 0.0
    if world.rank == 0:
        teacher = latents(pipe, 4 * args.calls, args)
        plain, alone = timed(pipe, args.calls, args)
        found["one device"] = {"calls": args.calls, "seconds": alone, "error": error(plain, teacher)}
    world.barrier("one device measured", timeout=None)
    for mode in args.modes:
        with diffaccel.patch_parallel(pipe, mode, guidance=args.guidance, world=world) as shared:
            x, seconds = timed(shared, args.calls, args)
            report = shared.report()
        if world.rank == 0:
            assert teacher is not None and plain is not None
            calls = max(1, round(args.calls * seconds / alone))
            found[mode] = {
                "calls": args.calls,
                "seconds": seconds,
                "speed_up": alone / seconds,
                "error": error(x, teacher),
                "error_to_one_device": error(x, plain),
                "megabytes": {kind: n / 1e6 for kind, n in report.bytes.items()},
                "one device in equal time": {"calls": calls, "error": error(latents(pipe, calls, args), teacher)},
            }
            print(f"{mode}: {json.dumps(found[mode])}", flush=True)
        world.barrier(f"{mode} measured", timeout=None)
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-sd")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--modes", nargs="+", default=["sync", "fresh_halo", "displaced", "partial"])
    parser.add_argument("--guidance", default="auto", choices=["auto", "split", "patches"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with open_world(cpu=args.cpu) as world:
        found = measure(world, args)
        if world.rank == 0:
            name = torch.cuda.get_device_name() if world.device.type == "cuda" else world.device.type
            setting = {k: str(v) if k == "out" else v for k, v in vars(args).items()}
            result = {"ranks": world.size, "device": name, **setting, "results": found}
            args.out.mkdir(parents=True, exist_ok=True)
            file = args.out / f"patch_latency_{Path(args.model).name}_{args.size}_{world.size}.json"
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
