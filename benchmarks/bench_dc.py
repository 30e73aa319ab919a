"""DC-Solver on the embedded models: ratios searched on one set of seeds, errors to a teacher on another.

    python benchmarks/bench_dc.py --out docs/results --work dc-artifacts [--objective final]

Writes `dc.md` and `dc.json` (`dc_final.md`, `dc_final.json` for the other objective); the artifacts stay in `--work`,
where a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import diffusers
import torch

from diffaccel import calibrate, models
from diffaccel.artifact import Artifact
from diffaccel.calibrate.dc import held_out_teacher, nodes_of
from diffaccel.calibrate.dc_search import OBJECTIVES
from diffaccel.calibrate.engine import Engine
from diffaccel.calibrate.validate import best_stock
from diffaccel.schedulers import TableScheduler

CALLS = (5, 6, 8, 10)
Case = tuple[str, float, str | None, dict[str, float]]
# model, guidance, grid of the student, its options: the checkpoint's own grid (trailing for both), and UniPC's best
# from 8 calls on in error_to_teacher.md
CASES: tuple[Case, ...] = (
    ("tiny-sd", 4.0, "karras", {"rho": 4.0}),
    ("tiny-flow", 4.0, "mid", {"w": 0.3}),
    ("tiny-sd", 1.0, "karras", {"rho": 4.0}),
    ("tiny-sd", 4.0, None, {}),
    ("tiny-flow", 4.0, None, {}),
    ("tiny-sd", 1.0, None, {}),
)


def calibrated(case: Case, work: Path, pairs: int, held_out: int, objective: str) -> Artifact:
    """The artifact of a case, made now unless it is there."""
    name, guidance, grid, options = case
    what = "" if objective == "trajectory" else f"-{objective}"
    out = work / f"{name}-g{guidance:g}{what}-{grid or 'own'}.safetensors"
    if out.exists():
        return Artifact.load(out, "dc")
    pipe = models.load(name)
    return calibrate.dc(
        pipe, models.prompts(pairs + held_out, 300), calls=CALLS, guidance=guidance, grid=grid, grid_options=options,
        pairs=pairs, held_out=held_out, teacher_calls=64, batch=16, seed=3000, out=out,
        objective=objective, call=models.CALL_DEFAULTS.get(name, {}),
    )  # fmt: skip


def stock_errors(case: Case, work: Path, pairs: int, held_out: int) -> dict[str, Any]:
    """Best of all deterministic settings of diffusers' own schedulers that do well on these models, by calls."""
    name, guidance, *_ = case
    file = work / f"{name}-g{guidance:g}-stock.json"
    if not file.exists():
        pipe = models.load(name)
        config = TableScheduler.from_config(pipe.scheduler.config).config
        prompts, call = models.prompts(pairs + held_out, 300), models.CALL_DEFAULTS.get(name, {})
        engine = Engine(pipe, prompts, guidance=guidance, call=call, batch=16, seed=3000, progress=False)
        nodes, _ = nodes_of(engine, config, max(CALLS))
        held, last = held_out_teacher(engine, "teacher", config, nodes, pairs, held_out, 64)
        found = {str(n): best_stock(engine, f"stock/{n}", held, last, n, pipe.scheduler.config) for n in CALLS}
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def rows(case: Case, made: Artifact, stock: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a number of calls."""
    name, guidance, grid, options = case
    shown = f"{grid} {' '.join(f'{k}={v:g}' for k, v in options.items())}".strip() if grid else "the checkpoint's"
    found = []
    for n in CALLS:
        receipt = made.receipt[f"{n} calls, guidance {guidance:g}"]
        found.append(
            {
                "model": name,
                "guidance": guidance,
                "grid": shown,
                "calls": n,
                **receipt,
                "best stock scheduler": stock[str(n)],
            }
        )
    return found


def markdown(table: list[dict[str, Any]], costs: list[dict[str, Any]], command: str, objective: str) -> str:
    """The page of results."""
    lines = [
        "# DC-Solver" + ("" if objective == "trajectory" else f", objective {objective}"),
        "",
        f"Measured by `{command}` with diffusers {diffusers.__version__}, torch {torch.__version__}. Ratios were "
        "searched on some seeds and prompts; the errors are those of others: the mean over images of the relative "
        "distance of the final latents to a teacher's (exact Adams of order 3, about 64 calls) from the same noise. "
        "UniPC-2 without and with ratios, on the same grid; the interval is a paired bootstrap of the difference. The "
        "best stock scheduler is the best of "
        f"{' or '.join(str(k) for k in sorted({r['best stock scheduler']['tried'] for r in table}))} settings of "
        "diffusers' own (those that do best in [the comparison of all](error_to_teacher.md)), picked on these very "
        "images, which favours it. An artifact keeps ratios of 1 where the verdict is 'no benefit found'.",
        "",
        "| model, guidance | grid | calls | UniPC-2 | with ratios | difference [95 %] | verdict | best stock | error |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        e, s = row["held-out error"], row["best stock scheduler"]
        lines.append(
            f"| {row['model']}, {row['guidance']:g} | {row['grid']} | {row['calls']} | {e['parent']:.4f} | "
            f"{e['calibrated']:.4f} | {e['difference']:+.4f} [{e['low']:+.4f}, {e['high']:+.4f}] | {e['verdict']} | "
            f"{s['scheduler']} | {s['error']:.4f} |"
        )
    helped = sum(r["held-out error"]["verdict"] == "helps" for r in table)
    won = sum(r["held-out error"]["calibrated"] < r["best stock scheduler"]["error"] for r in table)
    lines += [
        "",
        f"{helped} of {len(table)} rows improve on their parent with an interval below zero; in {won} of {len(table)} "
        "the error with ratios is below that of the best stock setting.",
        "",
        "| model, guidance | grid | model calls of the calibration | seconds |",
        "|---|---|---|---|",
        *(f"| {c['model']}, {c['guidance']:g} | {c['grid']} | {c['calls']} | {c['seconds']:.0f} |" for c in costs),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("dc-artifacts"))
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--held-out", type=int, default=32)
    parser.add_argument("--cases", type=int, default=len(CASES), help="how many of the cases")
    parser.add_argument("--only", default="", metavar="NAME", help="cases whose MODEL-gGUIDANCE-GRID begins with it")
    parser.add_argument("--objective", default="trajectory", choices=OBJECTIVES)
    parser.add_argument("--out", type=Path, help="folder for dc.json and dc.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    table: list[dict[str, Any]] = []
    costs: list[dict[str, Any]] = []
    for case in [c for c in CASES[: args.cases] if f"{c[0]}-g{c[1]:g}-{c[2] or 'own'}".startswith(args.only)]:
        made = calibrated(case, args.work, args.pairs, args.held_out, args.objective)
        found = rows(case, made, stock_errors(case, args.work, args.pairs, args.held_out))
        table += found
        costs.append({k: found[0][k] for k in ("model", "guidance", "grid")} | made.meta["cost"])
        print(f"{case}: {made.receipt['result']}", flush=True)
    command = f"python benchmarks/bench_dc.py --pairs {args.pairs} --held-out {args.held_out}"
    stem = "dc"
    if args.objective != "trajectory":
        command, stem = f"{command} --objective {args.objective} --only {args.only}", f"dc_{args.objective}"
    text = markdown(table, costs, command, args.objective)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{stem}.json").write_text(json.dumps({"command": command, "rows": table, "costs": costs}))
        (args.out / f"{stem}.md").write_text(text)


if __name__ == "__main__":
    main()
