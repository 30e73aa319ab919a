"""Does successive halving find what exhaustive search finds? `da.tune`, then every candidate on every image.

    python benchmarks/bench_tune.py --cells tiny-sd:6 tiny-sd:8 tiny-flow:8 --out docs/results

An evaluation is a model call. Exhaustive search runs each candidate of the tuning on each of its S images. Beside the
one tuning, halving is replayed on the recorded errors with the images in other orders, because one order may be lucky.
Writes `tune.json` and `tune.md`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from diffaccel import models
from diffaccel.calibrate.engine import Engine
from diffaccel.pipelines.recipe import Choice, Recipe
from diffaccel.tune.bench import Bench, quiet
from diffaccel.tune.candidates import Asked, gather
from diffaccel.tune.halving import evaluations, halve, rungs, score
from diffaccel.tune.run import tune

REPLAYS = 200
NEAR = 0.05


def everything(name: str, pipe: Any, prompts: list[str], recipe: Recipe, args: argparse.Namespace) -> dict[str, Any]:
    """Errors of every candidate of the tuning on all its images, by the tuning's own runs."""
    calls, call = recipe.choice.calls, {"height": 32, "width": 32} | models.CALL_DEFAULTS.get(name, {})
    engine = Engine(pipe, prompts, guidance=args.guidance, call=call, batch=args.batch, progress=False)
    bench = Bench(engine, args.teacher_steps)
    choices: list[Choice] = gather(["solvers", "rewriters"], Asked(pipe, bench.reading, calls))
    if recipe.choice.artifact is not None:
        choices.append(recipe.choice)
    with quiet():
        bench.learn(args.images, 0)
        start = time.perf_counter()
        errors = np.stack([bench.choice(c, 0, args.images) for c in choices])
    return {"names": [c.name for c in choices], "errors": errors, "seconds": time.perf_counter() - start}


def replayed(errors: np.ndarray) -> tuple[list[float], float]:
    """(winner's score over the best candidate's, for each order of the images; share of evaluations)."""
    count, images = errors.shape
    whole = [score(e) for e in errors]
    rng, found = np.random.default_rng(0), []
    for _ in range(REPLAYS):
        order = rng.permutation(images)
        search = halve(count, images, lambda c, a, b, order=order: errors[c, order[a:b]])
        found.append(whole[search.winner] / min(whole))
    return found, evaluations(rungs(count, images)) / (count * images)


def measured(model: str, calls: int, args: argparse.Namespace) -> dict[str, Any]:
    """One model at one budget: the tuning, exhaustive search, replays."""
    pipe = models.load(model)
    pipe.set_progress_bar_config(disable=True)
    prompts = models.prompts(args.images + args.holdout + 32, seed=11)
    options: dict[str, Any] = {"images": args.images, "holdout": args.holdout, "teacher_steps": args.teacher_steps}
    options |= {"guidance": args.guidance, "batch": args.batch, "progress": False, "height": 32, "width": 32}
    options |= models.CALL_DEFAULTS.get(model, {}) | {"fit": {"moves": args.moves}}
    start = time.perf_counter()
    recipe = tune(pipe, prompts, calls, **options)
    seconds = time.perf_counter() - start
    whole = everything(model, pipe, prompts, recipe, args)
    scores = {name: score(e) for name, e in zip(whole["names"], whole["errors"], strict=True)}
    best = min(scores, key=lambda name: scores[name])
    plain = np.array([e for n, e in zip(whole["names"], whole["errors"], strict=True) if not n.startswith("fitted")])
    with_, share = replayed(whole["errors"])
    without, _ = replayed(plain)
    name = recipe.choice.name
    print(f"{model}, {calls} calls: {name}; exhaustive: {best}", flush=True)
    return {
        "model": model, "calls": calls, "candidates": len(scores), "tuned": name, "tuned error": scores[name],
        "exhaustive": best, "exhaustive error": scores[best], "share": recipe.receipt["search"]["share"],
        "model calls": recipe.receipt["search"]["model calls"],
        "exhaustive model calls": recipe.receipt["search"]["exhaustive search"],
        "seconds": round(seconds, 1), "exhaustive seconds": round(whole["seconds"], 1), "spent": dict(recipe.spent),
        "replays": {"all candidates": with_, "without the fitted table": without, "share": share},
        "receipt": dict(recipe.receipt), "scores": dict(sorted(scores.items(), key=lambda i: i[1])),
    }  # fmt: skip


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        "# Tuning",
        "",
        f"Measured by `python benchmarks/bench_tune.py {report['command']}` with diffusers {report['diffusers']}, "
        f"torch {report['torch']}, at guidance {report['guidance']:g}. {report['images']} images choose, "
        f"{report['holdout']} others judge. Error: relative distance of an image's last latents to those of a teacher "
        f"of {report['teacher_steps']} steps from the same noise; geometric mean over images. An evaluation is a "
        "model call (a guidance pair counts once); teacher and fit, which both kinds of search need, are not counted.",
        "",
        "## Successive halving against exhaustive search",
        "",
        "| model, calls | candidates | tuning | its error | exhaustive | its error | excess | evaluations, share |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        excess = r["tuned error"] / r["exhaustive error"] - 1
        lines.append(
            f"| {r['model']}, {r['calls']} | {r['candidates']} | {r['tuned']} | {r['tuned error']:.4f} | "
            f"{r['exhaustive']} | {r['exhaustive error']:.4f} | {excess:+.1%} | {r['model calls']} of "
            f"{r['exhaustive model calls']}, {r['share']:.1%} |"
        )
    lines += [
        "",
        f"One order of the images may be lucky, so halving was replayed on the recorded errors in {REPLAYS} random "
        "orders; without the fitted table too, which is far ahead of the others where it wins:",
        "",
        f"| model, calls | candidates | within {NEAR:.0%} of the best | median excess | 95th percentile |",
        "|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        for name in ("all candidates", "without the fitted table"):
            e = np.array(r["replays"][name]) - 1
            lines.append(
                f"| {r['model']}, {r['calls']} | {name} | {np.mean(e <= NEAR):.0%} of {len(e)} | {np.median(e):+.1%} | "
                f"{np.quantile(e, 0.95):+.1%} |"
            )
    lines += [
        "",
        "## What the receipts say",
        "",
        "On the images that judge. The best stock scheduler is the best of diffusers' deterministic schedulers on all "
        "their grids, by a search of their own, picked on the very images that judge, which favours it.",
        "",
        "| model, calls | setting | geometric mean | median | worst | tuned / it [95 %] | images improved |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        for key in ("tuned", "plain run", "best stock scheduler"):
            s = r["receipt"][key]
            ratio = s.get("tuned / it [95 %]")
            shown = "" if ratio is None else f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]"
            improved = "" if ratio is None else f"{s['images improved']:.0%}"
            lines.append(
                f"| {r['model']}, {r['calls']} | {key}: {s['name']} | {s['geometric mean']:.4f} | {s['median']:.4f} | "
                f"{s['worst']:.3f} | {shown} | {improved} |"
            )
    lines += ["", *(f"- {r['model']}, {r['calls']} calls: {r['receipt']['verdict']}." for r in report["rows"])]
    own = [r["receipt"]["teacher"]["own error (K against K/2 steps)"] for r in report["rows"]]
    lines.append(f"- The teacher with half its steps is off by {max(own):.2g}.")
    lines += ["", "## Cost", ""]
    lines += [
        f"- {r['model']}, {r['calls']} calls: the tuning took {r['seconds']:.0f} s "
        f"({sum(r['spent']['model calls'].values())} model calls, fit and teacher included); running all "
        f"candidates on all images took {r['exhaustive seconds']:.0f} s more than that."
        for r in report["rows"]
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", nargs="+", default=["tiny-sd:6", "tiny-sd:8", "tiny-flow:8"], metavar="MODEL:CALLS")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--holdout", type=int, default=48)
    parser.add_argument("--teacher-steps", type=int, default=100)
    parser.add_argument("--moves", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", default="docs/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {k: getattr(args, k) for k in ("images", "holdout", "teacher_steps", "guidance")}
    report |= {"diffusers": diffusers.__version__, "torch": torch.__version__, "command": shlex.join(sys.argv[1:])}
    cells = [cell.rsplit(":", 1) for cell in args.cells]
    report["rows"] = [measured(model, int(calls), args) for model, calls in cells]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tune.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / "tune.md").write_text(page(report), encoding="utf-8")
    print(page(report))


if __name__ == "__main__":
    main()
