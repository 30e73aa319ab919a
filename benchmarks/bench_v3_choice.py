"""DPM-Solver-v3 with the setting that its artifact chose for each number of calls, on images that no choice has seen.

    python benchmarks/bench_v3_choice.py --out docs/results --work v3-choice-work

Beside it: the same statistics with the default setting (the checkpoint's own grid, order 2, corrector "plus"), the
sampler without statistics on its own choice, and the best stock setting, which is picked on the reported images.
Writes `v3_choice.md` and `v3_choice.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from bench_calibrated import CALLS, CASES, SEEDS, TEACHER_CALLS, Bench, stock_rows

from diffaccel import calibrate
from diffaccel.artifact import Artifact
from diffaccel.calibrate.ems_choice import default
from diffaccel.calibrate.validate import interval
from diffaccel.core.quad import Ems
from diffaccel.schedulers import DPMSolverV3Scheduler
from diffaccel.schedulers.measured import advice


def artifact(bench: Bench, chosen_on: int, held_out: int) -> Artifact:
    """Statistics and settings for every number of calls, made now unless they are there."""
    out = bench.work / f"choice-{bench.name}-g{bench.guidance:g}.safetensors"
    if out.exists():
        return Artifact.load(out, "ems")
    return calibrate.ems(
        bench.pipe, bench.prompts, guidance=bench.guidance, images=bench.images["calibrate"], nodes=40, calls=CALLS,
        chosen_on=chosen_on, held_out=held_out, batch=32, seed=SEEDS["calibrate"], out=out, call=bench.call,
        progress=False,
    )  # fmt: skip


def report(bench: Bench, made: Artifact) -> list[dict[str, Any]]:
    """A row for each number of calls."""
    config, rows = bench.pipe.scheduler.config, []
    ems = Ems(*(made.tensors[k] for k in ("lam", "l", "s", "b")))
    own = default(bench.config)
    for n in CALLS:
        told = made.receipt[f"{n} calls"]
        e = {
            "chosen": bench.errors(
                "report",
                f"v3 {made.sha256[:12]} as advised",
                lambda: DPMSolverV3Scheduler.from_config(config, artifact=made),
                n,
            ),
            "default": bench.errors(
                "report", f"v3 {made.sha256[:12]} default", lambda: own.scheduler(bench.config, ems), n
            ),
        }
        stock = {r.setting: bench.errors("report", f"stock: {r.setting}", r.make, n) for r in stock_rows(bench)}
        top = min(stock, key=lambda k: stock[k].mean())
        best = advice(made, n)
        words = [best["grid"], *(f"{k}={v}" for k, v in (best["grid_options"] | best["options"]).items())]
        rows.append({
            "model": bench.name, "guidance": bench.guidance, "calls": n, "setting": ", ".join(words),
            "choice": told["with statistics"]["verdict"], "statistics": told["held-out error"]["verdict"],
            "stock": top, "errors": {k: float(v.mean()) for k, v in e.items()} | {"stock": float(stock[top].mean())},
            "minus_default": interval(e["chosen"] - e["default"]), "minus_stock": interval(e["chosen"] - stock[top]),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def shown(change: tuple[float, float, float]) -> str:
    """A difference with its interval."""
    value, low, high = change
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]" + (" **better**" if high < 0 else " worse" if low > 0 else "")


def markdown(rows: list[dict[str, Any]], costs: list[dict[str, Any]], command: str, images: dict[str, int]) -> str:
    """The page of results."""
    lines = [
        "# DPM-Solver-v3: the setting of each number of calls",
        "",
        f"Measured by `{command}` with diffusers {diffusers.__version__}, torch {torch.__version__}. Error: mean over "
        f"{images['report']} images of the relative distance of the final latents to those of a {TEACHER_CALLS}-call "
        "teacher (exact Adams, order 3) from the same noise. Statistics, choice and its validation used other seeds "
        "and prompts; the best stock setting was picked on the images of the table, which favours it. Differences with "
        "their 95 % paired bootstrap intervals. `choice` and `statistics` are the receipt's own verdicts: whether the "
        "chosen setting is better than the default one, and whether the sampler with statistics is better than without "
        "(each with its own choice).",
        "",
        "| model, guidance | calls | setting in the artifact | choice | statistics | error | default | minus default | "
        "best stock | error | minus best stock |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        e = r["errors"]
        lines.append(
            f"| {r['model']}, {r['guidance']:g} | {r['calls']} | {r['setting']} | {r['choice']} | {r['statistics']} | "
            f"{e['chosen']:.4f} | {e['default']:.4f} | {shown(r['minus_default'])} | {r['stock']} | {e['stock']:.4f} | "
            f"{shown(r['minus_stock'])} |"
        )
    better = {k: sum(r[k][2] < 0 for r in rows) for k in ("minus_default", "minus_stock")}
    ratio = np.exp(np.mean([np.log(r["errors"]["chosen"] / r["errors"]["default"]) for r in rows]))
    lines += [
        "",
        f"Better than the default setting in {better['minus_default']} of {len(rows)} rows (error {ratio:.2f} times "
        f"the default's, geometric mean), better than the best stock setting in {better['minus_stock']}.",
        "",
        "| model, guidance | model calls of the calibration | seconds |",
        "|---|---|---|",
        *(f"| {c['model']}, {c['guidance']:g} | {c['calls']} | {c['seconds']:.0f} |" for c in costs),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("v3-choice-work"))
    parser.add_argument("--images", type=int, default=32, help="reported images")
    parser.add_argument("--calibrate", type=int, default=64, help="trajectories for the statistics")
    parser.add_argument("--choose", type=int, default=12, help="images for choosing")
    parser.add_argument("--held-out", type=int, default=24, help="images for the artifact's own verdicts")
    parser.add_argument("--cases", type=int, default=len(CASES))
    parser.add_argument("--out", type=Path, help="folder for v3_choice.json and v3_choice.md")
    args = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    images = {"calibrate": args.calibrate, "choose": args.choose, "report": args.images}
    rows: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    command = f"python benchmarks/bench_v3_choice.py --images {args.images} --calibrate {args.calibrate} --choose "
    command += f"{args.choose} --held-out {args.held_out} --cases {args.cases}"
    for name, guidance in CASES[: args.cases]:
        bench = Bench(name, guidance, args.work, images)
        made = artifact(bench, args.choose, args.held_out)
        rows += report(bench, made)
        costs.append({"model": name, "guidance": guidance} | made.meta["cost"])
        text = markdown(rows, costs, command, images)
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "v3_choice.json").write_text(json.dumps({"command": command, "rows": rows, "costs": costs}))
            (args.out / "v3_choice.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
