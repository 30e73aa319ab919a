"""Quality against model calls on the embedded models: stock schedulers and ours, the same seeds in every row.

    python benchmarks/bench_sweep.py                                                    # a small one, to see it work
    python benchmarks/bench_sweep.py --models tiny-sd --images 2000 --calls 5,8,10,20 --work runs --out docs/results

The folder of --work keeps what is finished: a stopped run goes on with the same command, also by many processes
(torchrun --nproc-per-node P benchmarks/bench_sweep.py ...). With --out, sweep_<model>.md and .json are written there.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from diffaccel import models
from diffaccel.cli import main
from diffaccel.eval.page import cell_values
from diffaccel.eval.report_run import Report, report
from diffaccel.eval.verdicts import number, summaries

# One of ours for all budgets, chosen by bench_error.py; a stock one that is strong on this model.
OURS = {
    "tiny-sd": "deis:order=2:grid=karras:grid_options={'rho': 4.0}",
    "tiny-flow": "ipndm:order=2:grid=mid:grid_options={'w': 0.3}",
    "tiny-pixel": "unipc:order=2:grid=uniform_lambda",
}
MORE = {"tiny-sd": "DEISMultistepScheduler:use_karras_sigmas=true"}  # beside the stock rows that are always there


def run(model: str, args: argparse.Namespace, work: Path) -> Report:
    if args.partial:
        return report(work / model)
    table = f"fitted:artifact={models.fitted(model)}" if args.fitted else None
    ours = ",".join(filter(None, [table or OURS[model], MORE.get(model)]))
    given = ["eval", "sweep", model, "--schedulers", ours]
    given += ["--calls", args.calls, "--images", str(args.images), "--batch", str(args.batch), "--cpu"]
    given += ["--teacher-images", str(args.teacher_images), "--out", str(work / model)]
    if main(given):
        raise SystemExit(f"the sweep of {model} failed")
    return Report.read(work / model)


def page(model: str, args: argparse.Namespace, data: dict[str, Any]) -> str:
    """The report as Markdown."""
    about, where = data["model"], data["environment"]
    fitted = " --fitted" if args.fitted else ""
    lines = [
        f"# Sweep of {model}",
        "",
        f"Measured by `python benchmarks/bench_sweep.py --models {model} --images {args.images} --calls {args.calls}"
        f" --batch {args.batch} --teacher-images {args.teacher_images}{fitted}` with diffusers {where['diffusers']}, "
        f"torch {where['torch']}. {data['images']} images a row, the same seeds and prompts in every row; "
        f"{', '.join(f'{k} {v}' for k, v in about['options'].items()) or 'class labels, no guidance'}. "
        f"{data['fid_label']}, corrected for the bias of few images. Weights {about['weights'][:12]}. Seconds were "
        "measured on a shared machine: only their order of size counts.",
        "",
        *_missing(data),
        *_separation(data),
        "## Verdicts",
        "",
        "Against the best stock row with the same calls, paired image by image, 95 % intervals, Holm's correction.",
        "",
        *(f"- {s['text'].replace('no benefit found', '**no benefit found**')}" for s in summaries(data["verdicts"])),
        "",
        "Each metric:",
        "",
        *(f"- {v['text']}" for v in data["verdicts"]),
        "",
        "## All rows",
        "",
        "| scheduler | calls | images | FID | 95 % | PSNR, dB | SSIM | latent error | CLIP score | s / image |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        v = cell_values(row)
        cells = [number(v[k]) for k in ("psnr", "ssim", "latent", "clip", "seconds")]
        span = f"[{number(v['fid_low'])}, {number(v['fid_high'])}]"
        lines.append(
            f"| {v['name']} | {v['calls']} | {v['images']} | {number(v['fid'])} | {span} | {' | '.join(cells)} |"
        )
    gap = data["teacher_gap"]
    lines += ["", f"The teacher's own error: {gap}." if gap else "", *(f"- {n}" for n in data["notes"])]
    return "\n".join(lines).rstrip() + "\n"


def _missing(data: dict[str, Any]) -> list[str]:
    if not data["missing"]:
        return []
    head = "**Not complete**: rows are made of fewer images than asked for. What the table says is of these images."
    return [head, "", *(f"- {line}" for line in data["missing"]), ""]


def _separation(data: dict[str, Any]) -> list[str]:
    lines = ["## Do the budgets separate?", "", "| scheduler | calls | FID better by | z | PSNR, dB | CLIP score |"]
    lines.append("|---|---|---|---|---|---|")
    for one in data["separation"]:
        cells = []
        for metric in ("fid", "psnr", "clip"):
            d = one[metric]
            cells.append("" if d is None else f"{number(d['better_by'])} [{number(d['low'])}, {number(d['high'])}]")
        z = "" if one["fid"] is None else number(one["fid"]["z"])
        head = f"| {one['name']} | {one['calls']} against {one['against']} | "
        lines.append(f"{head}{cells[0]} | {z} | {cells[1]} | {cells[2]} |")
    return [*lines, ""]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny-sd"], choices=list(OURS))
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--calls", default="5,8")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--teacher-images", type=int, default=16)
    parser.add_argument("--fitted", action="store_true", help="the fitted table that ships in place of ours")
    parser.add_argument("--partial", action="store_true", help="run nothing: write what is in --work")
    parser.add_argument("--work", help="folder of the sweeps (default: a temporary one)")
    parser.add_argument("--out", help="folder for sweep_<model>.md and .json")
    return parser.parse_args()


def bench() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as temporary:
        for model in args.models:
            found = run(model, args, Path(args.work or temporary))
            if args.out and os.environ.get("RANK", "0") == "0":
                out, folder = Path(args.out), models.path(model).parents[1] / "artifacts"
                out.mkdir(parents=True, exist_ok=True)
                name = f"sweep_{'fitted_' if args.fitted else ''}{model}"
                slim = {k: v for k, v in found.data.items() if k != "command"}
                texts = {"md": page(model, args, found.data), "json": json.dumps(slim, indent=1) + "\n"}
                for suffix, text in texts.items():
                    # where the package lies says nothing elsewhere
                    text = text.replace(f"fitted:artifact={folder}{os.sep}", "fitted:artifact=")
                    (out / f"{name}.{suffix}").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    bench()
