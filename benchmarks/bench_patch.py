"""What late messages between devices cost in quality, on the embedded models, with p ranks emulated in one process.

    python benchmarks/bench_patch.py --out docs/results

Every image has a seed and a prompt of its own. Error: root mean square difference of latents to a many-call run of one
process ("teacher") and to the run of equal calls in one process, in units of the teacher's standard deviation. The
baseline "fewer calls" is what one device could do in the time that p devices would take if sharing were free: N/p
calls, rounded up. Writes `patch_parallel.json` and `.md`. No seconds: p ranks in one process are not p devices.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler

import diffaccel
from diffaccel import models
from diffaccel.parallel.world_emulated import EmulatedWorld

TEACHER_CALLS = 200
SAME = "to_same_calls"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "displaced": ("displaced", {}),
    "partial": ("partial", {}),
    "fresh_halo": ("fresh_halo", {}),
    "fresh_halo, not extrapolated": ("fresh_halo", {"extrapolate": False}),
    "fresh_halo after 2 calls": ("fresh_halo", {"warmup": 2}),
}


def loaded(name: str) -> Any:
    """An embedded pipeline with a stock scheduler that does well on it."""
    pipe = models.load(name)
    pipe.set_progress_bar_config(disable=True)
    if name == "tiny-sd":
        config = {**pipe.scheduler.config, "timestep_spacing": "trailing"}
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(config)
    return pipe


def latents(pipe: Any, name: str, size: int, calls: int, images: int, call: Any = None) -> torch.Tensor:
    """(images, channels, height, width), one seed and one prompt each."""
    generators = [torch.Generator("cpu").manual_seed(1000 + i) for i in range(images)]
    return (call or pipe)(
        models.prompts(images, seed=7),
        height=size,
        width=size,
        num_inference_steps=calls,
        guidance_scale=4.0,
        generator=generators,
        output_type="latent",
        **models.CALL_DEFAULTS.get(name, {}),
    ).images.float()


def errors(x: torch.Tensor, target: torch.Tensor, unit: float) -> dict[str, float]:
    """Mean over images of the root mean square difference, and the standard error of that mean."""
    each = (x - target).square().flatten(1).mean(1).sqrt() / unit
    return {"mean": float(each.mean()), "standard_error": float(each.std() / math.sqrt(len(each)))}


def seam(x: torch.Tensor, same: torch.Tensor, ranks: int) -> float | None:
    """Error in the two rows at each border over the error elsewhere; None where there is no elsewhere."""
    square = (x - same).square().mean((0, 1, 3))
    rows = len(square)
    border = torch.zeros(rows, dtype=torch.bool)
    for r in range(1, ranks):
        border[r * rows // ranks - 1 : r * rows // ranks + 1] = True
    if border.all() or square[~border].mean() == 0:
        return None
    return float((square[border].mean() / square[~border].mean()).sqrt())


def cell(pipe: Any, name: str, size: int, calls: int, ranks: int, images: int, plain: dict[int, Any]) -> dict[str, Any]:
    """All variants at one number of calls and ranks; `plain` has the runs of one process by calls."""
    teacher, same, few = plain[TEACHER_CALLS], plain[calls], -(-calls // ranks)
    unit = float(teacher.std())
    found: dict[str, Any] = {
        "one process": {"calls": calls, "to_teacher": errors(same, teacher, unit)},
        "fewer calls": {
            "calls": few,
            "to_teacher": errors(plain[few], teacher, unit),
            "to_same_calls": errors(plain[few], same, unit),
        },
    }
    for variant, (mode, options) in VARIANTS.items():
        world = EmulatedWorld(ranks)
        with diffaccel.patch_parallel(pipe, mode, guidance="patches", world=world, **options) as h:
            x = latents(pipe, name, size, calls, images, h)
            report = h.report()
        found[variant] = {
            "calls": report.calls,
            "late": report.late,
            "to_teacher": errors(x, teacher, unit),
            "to_same_calls": errors(x, same, unit),
            "seam": seam(x, same, ranks),
            "megabytes_a_call": sum(sum(t.bytes.values()) for t in world.traffics) / ranks / report.calls / 1e6,
        }
    return found


def measured(args: argparse.Namespace, cells: list[dict[str, Any]], save: Callable[[], None]) -> None:
    """Add every cell that is not there yet; says what it does, and saves after each."""
    known = {(c["model"], c["size"], c["calls"], c["ranks"]) for c in cells}
    for size, name in product(args.sizes, args.models):
        wanted = [(n, p) for n, p in product(args.calls, args.ranks) if (name, size, n, p) not in known]
        if not wanted:
            continue
        pipe, start = loaded(name), time.monotonic()
        counts = {TEACHER_CALLS, *(n for n, _ in wanted), *(-(-n // p) for n, p in wanted)}
        plain = {n: latents(pipe, name, size, n, args.images) for n in sorted(counts)}
        for calls, ranks in wanted:
            found = cell(pipe, name, size, calls, ranks, args.images, plain)
            cells.append({"model": name, "size": size, "calls": calls, "ranks": ranks, "variants": found})
            save()
            print(f"{name} {size} px, {calls} calls, p = {ranks}: {time.monotonic() - start:.0f} s", flush=True)


# ---------------------------------------------------------------------- the page
def page(result: dict[str, Any]) -> str:
    """The results as a page."""
    cells = result["cells"]
    lines = [
        "# Late messages between devices: quality",
        "",
        f"Measured by `python benchmarks/bench_patch.py` (diffaccel {result['diffaccel']}, diffusers "
        f"{result['diffusers']}, torch {result['torch']}): {result['images']} images, each with its own seed and "
        f"prompt, guidance 4. Error to a run of {TEACHER_CALLS} calls in one process, in units of its standard "
        "deviation: mean over images ± standard error. "
        "In brackets the error to the run of equal calls in one process. tiny-sd (UNet) with DPM++ 2M on trailing "
        "timesteps, tiny-flow (transformer) with flow-matching Euler, both the schedulers of diffusers.",
        "",
        "*fewer calls*: N/p calls, rounded up, on one device: what the time of p devices would buy there if sharing "
        "were free. `displaced` and `partial` begin with 5 synchronous calls, `fresh_halo` with 4. These are small "
        "latents (8 x 8 at 32 px, 16 x 16 at 64 px), and so the hard end: bands of 2 to 8 rows.",
        "",
    ]
    columns = ["one process", "fewer calls", *VARIANTS]
    for model, size in dict.fromkeys((c["model"], c["size"]) for c in cells):
        lines += [f"## {model}, {size} px", "", "| N | p | " + " | ".join(columns) + " |"]
        lines += ["|---|---|" + "---|" * len(columns)]
        for c in cells:
            if (c["model"], c["size"]) == (model, size):
                shown = " | ".join(_shown(c["variants"][name]) for name in columns)
                lines.append(f"| {c['calls']} | {c['ranks']} | {shown} |")
        lines.append("")
    return "\n".join([*lines, *_verdict(cells), "", *_traffic(cells), ""])


def _shown(variant: dict[str, Any]) -> str:
    error = variant["to_teacher"]
    text = f"{error['mean']:.4f} ± {error['standard_error']:.4f}"
    return f"{text} ({variant['to_same_calls']['mean']:.4f})" if "to_same_calls" in variant else text


def _verdict(cells: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Against fewer calls",
        "",
        "Cells in which the error to the teacher is lower than with fewer calls:",
        "",
    ]
    for name in VARIANTS:
        lost = [c for c in cells if not _error(c, name) < _error(c, "fewer calls")]
        where = "; ".join(f"{c['model']} {c['size']} px N={c['calls']} p={c['ranks']}" for c in lost)
        lines.append(f"- `{name}`: {len(cells) - len(lost)} of {len(cells)}" + (f"; not: {where}" if lost else ""))
    pairs = [(_error(c, "fresh_halo", SAME), _error(c, "fresh_halo, not extrapolated", SAME)) for c in cells]
    nearer = sum(a < b for a, b in pairs)
    lines.append(f"- extrapolation brings `fresh_halo` nearer to the run of equal calls in {nearer} of {len(cells)}")
    return lines


def _error(c: dict[str, Any], name: str, to: str = "to_teacher") -> float:
    return float(c["variants"][name][to]["mean"])


def _traffic(cells: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Traffic and seams",
        "",
        "N = 20. MB: received by a rank in a call, mean over ranks and calls, warm-up included. Seam: error to the run "
        "of equal calls in the two rows at each border between patches, over that elsewhere.",
        "",
        "| model | px | p | " + " | ".join(f"{name}: MB, seam" for name in VARIANTS) + " |",
        "|---|---|---|" + "---|" * len(VARIANTS),
    ]
    for c in cells:
        if c["calls"] == 20:
            found = [c["variants"][name] for name in VARIANTS]
            seams = ["-" if v["seam"] is None else f"{v['seam']:.2f}" for v in found]
            shown = " | ".join(f"{v['megabytes_a_call']:.3f}, {s}" for v, s in zip(found, seams, strict=True))
            lines.append(f"| {c['model']} | {c['size']} | {c['ranks']} | {shown} |")
    return lines


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["tiny-sd", "tiny-flow"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--calls", nargs="+", type=int, default=[10, 20, 50])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument(
        "--resume", action="store_true", help="keep the cells of an interrupted run of the same setting"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    versions = {"diffaccel": diffaccel.__version__, "diffusers": diffusers.__version__, "torch": torch.__version__}

    file = args.out / "patch_parallel.json"
    cells = json.loads(file.read_text("utf-8"))["cells"] if args.resume else []

    def save() -> None:
        result = {**versions, "images": args.images, "cells": cells}
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        file.with_suffix(".md").write_text(page(result), encoding="utf-8")

    measured(args, cells, save)


if __name__ == "__main__":
    main()
