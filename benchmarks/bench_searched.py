"""Searched, aligned and AYS tables beside fitted ones and the best of diffusers' schedulers, at equal calls.

    python benchmarks/bench_searched.py --out docs/results

Everything is calibrated on prompts and noise of its own (few inputs and trials: the numbers of the table's head) and
judged on two other seeds. Best stock: `bench_fitted.py` screened every deterministic scheduler of diffusers on all its
grids on images of these seeds; the settings that it left in `fitted.json` run on all images here, and the better of
them is taken: picked after the fact, which favours it. Writes `searched.json` and `searched.md`; a model that is in
`searched.json` already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from bench_fitted import errors, fitted, rms

from diffaccel import calibrate, compare, models
from diffaccel.artifact import Artifact
from diffaccel.calibrate.fit_core import Plan
from diffaccel.calibrate.fit_setup import prepared
from diffaccel.calibrate.grid import choose
from diffaccel.compare import Candidate
from diffaccel.errors import ArtifactWarning

CALLS = (5, 8, 12)
SEEDS = (300, 400)
OWN_SEED = 60_000
GUIDANCE = 4.0
TEACHER_CALLS = 61
SAMPLES, HOLDOUT, TRIALS, ROUNDS = 8, 8, 12, 2
BOTH = (5, 8)  # calls at which the searched table is also aligned


def levels(config: Any, entries: list[Any]) -> list[float]:
    """t of levels as a receipt prints them."""
    path = compare.read(config).path
    return [path.first.t if v == "inf" else path.at_level(float(v)).t for v in entries]


def with_grid(name: str, times: dict[str, list[float]]) -> Candidate:
    """DPM-Solver++ 2M on listed times."""
    made = compare.ours("dpmpp", "listed", grid_options={"times": times}, order=2)
    return Candidate(name, False, made.make)


def calibrated(pipe: Any, name: str, prompts: list[str]) -> dict[str, Artifact]:
    """The artifacts."""
    common: dict[str, Any] = {"height": 32, "width": 32, "guidance": GUIDANCE, "seed": OWN_SEED, "batch": SAMPLES}
    common |= {"teacher_steps": TEACHER_CALLS - 1, "rivals": None, "progress": False}
    common |= models.CALL_DEFAULTS.get(name, {})
    small = {"samples": SAMPLES, "holdout": HOLDOUT}
    made: dict[str, Artifact] = {}
    for what, make in (
        ("ays", lambda: calibrate.ays(pipe, prompts, CALLS, **small, **common)),
        ("align", lambda: calibrate.align(pipe, prompts, CALLS, rounds=ROUNDS, **small, **common)),
        ("search", lambda: calibrate.search(pipe, prompts, CALLS, trials=TRIALS, **small, **common)),
        ("search + align", lambda: calibrate.align(
            pipe, prompts, BOTH, base=made["search"], rounds=ROUNDS, **small, **common)),
    ):  # fmt: skip
        start = time.perf_counter()
        made[what] = make()
        print(f"{name}: {what} in {time.perf_counter() - start:.0f} s, {made[what].meta['cost']}", flush=True)
    return made


def grids(pipe: Any, name: str, prompts: list[str], ays: Artifact) -> dict[str, Candidate]:
    """DPM-Solver++ 2M on grids found by dynamic programming."""
    call = {"height": 32, "width": 32, **models.CALL_DEFAULTS.get(name, {})}
    plan = Plan(CALLS, samples=4, holdout=4, teacher_steps=TEACHER_CALLS - 1, rivals="none")
    setup = prepared(
        "grids", pipe, prompts, plan, {}, guidance=GUIDANCE, call=call, batch=SAMPLES, seed=OWN_SEED, out=None,
        progress=False,
    )  # fmt: skip
    setup.made.keeps = False
    setup.made.learn()
    teacher, times = setup.made.teacher, {}
    for grid in ("gits", "dp2"):
        times[grid] = {str(n): [teacher.nodes[k].t for k in choose(grid, teacher.gram, teacher.nodes, n, None)]
                       for n in CALLS}  # fmt: skip
    config = pipe.scheduler.config
    times["ays"] = {str(n): levels(config, ays.receipt[f"{n} calls"]["sigma/alpha"]) for n in CALLS}
    shown = {"gits": "GITS grid + 2M", "dp2": "DP grid + 2M", "ays": "AYS grid + 2M"}
    return {shown[k]: with_grid(shown[k], t) for k, t in times.items()}


def fitted_again(name: str, images: int, budgets: dict[str, Any]) -> None:
    """Measure the rows of the shipped table anew, beside stored ones; a stored row is run too and must come out."""
    pipe = models.load(name)
    pipe.set_progress_bar_config(disable=True)
    jobs = [compare.job_for(pipe, name, images, seed, guidance=GUIDANCE) for seed in SEEDS]
    targets = [compare.run(pipe, compare.ours("dpmpp", "uniform_lambda", order=2), TEACHER_CALLS, job) for job in jobs]
    known = "DPM++ 2M, default grid"
    shipped = fitted(Artifact.load(models.fitted(name)))
    for calls, found in budgets.items():
        control = errors(pipe, compare.ours("dpmpp", order=2), int(calls), jobs, targets)
        off = float(np.max(np.abs(control / np.array(found[known]) - 1)))
        if off > 0.01:
            raise SystemExit(f"{name}, {calls} calls: the stored row {known!r} is off by {off:.1%}; measure all anew")
        found["fitted (shipped)"] = [round(float(v), 6) for v in errors(pipe, shipped, int(calls), jobs, targets)]
        print(f"{name} {calls}: {np.median(found['fitted (shipped)']):.4f}, {known} off by {off:.1e}", flush=True)


def measured(name: str, images: int, finalists: dict[str, Any]) -> dict[str, Any]:
    """All rows of one model; `finalists` as `fitted.json` holds them."""
    pipe = models.load(name)
    pipe.set_progress_bar_config(disable=True)
    start = time.perf_counter()
    jobs = [compare.job_for(pipe, name, images, seed, guidance=GUIDANCE) for seed in SEEDS]
    used = {prompt for job in jobs for prompt in job.inputs["prompt"]}
    prompts = [p for p in dict.fromkeys(models.prompts(2000, OWN_SEED)) if p not in used][:32]
    made = calibrated(pipe, name, prompts)
    teacher = compare.ours("dpmpp", "uniform_lambda", order=2)
    targets = [compare.run(pipe, teacher, TEACHER_CALLS, job) for job in jobs]
    rows = {"DPM++ 2M, default grid": compare.ours("dpmpp", order=2), **grids(pipe, name, prompts, made["ays"])}
    rows |= {what: fitted(made[what]) for what in ("align", "search", "search + align")}
    rows["fitted (shipped)"] = fitted(Artifact.load(models.fitted(name)))
    budgets: dict[str, Any] = {}
    for calls in CALLS:
        best = [c for c in compare.stock(pipe.scheduler.config) if c.name in finalists[str(calls)]["stock"]]
        found = {f"stock: {c.name}": errors(pipe, c, calls, jobs, targets) for c in best}
        able = {what: c for what, c in rows.items() if what not in made or calls in made[what].meta["calls"]}
        found |= {what: errors(pipe, c, calls, jobs, targets) for what, c in able.items()}
        budgets[str(calls)] = {k: [round(float(v), 6) for v in e] for k, e in found.items()}
        print(f"{name} {calls}: " + ", ".join(f"{k} {np.median(e):.4f}" for k, e in found.items()), flush=True)
    receipts = {what: artifact.meta["receipt"] for what, artifact in made.items()}
    return {"budgets": budgets, "receipts": receipts, "seconds": round(time.perf_counter() - start, 1)}


# ---------------------------------------------------------------------- the page
def ratio(mine: np.ndarray, base: np.ndarray) -> tuple[float, float, float]:
    """Of medians, with its 95 % interval (paired bootstrap over images)."""
    draws = np.random.default_rng(0).integers(0, len(mine), (2000, len(mine)))
    low, high = np.quantile(np.median(mine[draws], axis=1) / np.median(base[draws], axis=1), (0.025, 0.975))
    return float(np.median(mine) / np.median(base)), float(low), float(high)


def said(receipts: dict[str, Any], what: str, calls: str) -> str:
    """The receipt's own verdict, shortly."""
    if f"{calls} calls" not in receipts.get(what, {}):
        return ""
    verdict = receipts[what][f"{calls} calls"]["verdict"]
    return "helps" if verdict in ("aligned", "searched") else "no benefit found"


def page(results: dict[str, Any], images: int) -> str:
    """Markdown."""
    how = Artifact.load(models.fitted(next(iter(results)))).meta["options"]
    lines = [
        "# Searched, aligned and AYS tables beside fitted ones and the best of diffusers",
        "",
        f"Measured by `python benchmarks/bench_searched.py` with diffusers {diffusers.__version__}, torch "
        f"{torch.__version__}. Error: relative distance of an image's final latents to a teacher's (DPM-Solver++ 2M, "
        f"{TEACHER_CALLS} calls, uniform in lam) from the same noise; guidance {GUIDANCE:g}; {images} images of each "
        f"of {len(SEEDS)} seeds, noise and prompts unseen by all calibrations. These were given {SAMPLES} inputs, "
        f"{HOLDOUT} held-out ones, {TRIALS} trials (search), {ROUNDS} rounds (align); the fitted table is the one "
        f"that ships with the model ({how['samples']} inputs, order {how['order']}, up to {how['refine']} rounds of "
        "refinement; its rows are of a later run, with `--fitted-again`). "
        "Best stock: of every deterministic scheduler of diffusers on all its "
        "grids, the settings that `bench_fitted.py` found best on images of these seeds, picked by median after the "
        "fact. "
        "`ratio`: of medians to it, with its 95 % paired bootstrap interval over images.",
        "",
    ]
    for name, report in results.items():
        lines += [f"## {name}", ""]
        spent = {what: r["cost"] for what, r in report["receipts"].items()}
        costs = [f"{what} {c['calls']} calls, {c['seconds']:.0f} s" for what, c in spent.items()]
        lines += [f"Cost, all budgets, one thread of a loaded machine: {'; '.join(costs)}.", ""]
        lines += ["| calls | table | median | ratio to best stock | RMSE | worst | images improved | its own receipt |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        for calls, found in report["budgets"].items():
            held = {k: np.array(v) for k, v in found.items()}
            best = min((k for k in held if k.startswith("stock")), key=lambda k: np.median(held[k]))
            for what, e in held.items():
                if what.startswith("stock") and what != best:
                    continue
                shown = "" if what == best else "{:.2f} [{:.2f}, {:.2f}]".format(*ratio(e, held[best]))
                better = "" if what == best else f"{np.mean(e < held[best]):.0%}"
                cells = [calls, what, f"{np.median(e):.4f}", shown, f"{rms(e):.4f}", f"{e.max():.3f}", better]
                lines.append(f"| {' | '.join([*cells, said(report['receipts'], what, calls)])} |")
        lines += [
            "",
            "AYS under a stochastic sampler: errors of the first-order SDE solver to its own many-step run along the "
            f"same Brownian path, medians on {HOLDOUT} held-out inputs.",
            "",
            "| calls | AYS | the pipeline's grid | uniform in time | quadratic | uniform in lam | "
            "AYS / pipeline's, 95 % | the bound ends at | verdict |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for calls in CALLS:
            r = report["receipts"]["ays"][f"{calls} calls"]
            medians = {e["name"]: e["median"] for e in r["SDE errors"]}
            columns = ("AYS", "the pipeline's grid", "time", "quadratic", "lam")
            cells = [f"{medians[k]:.3f}" if k in medians else "-" for k in columns]
            key = next(k for k in r if k.startswith("first-order SDE"))
            cells += ["{:.2f} [{:.2f}, {:.2f}]".format(*r[key]), str(r["the bound ends at sigma/alpha"])]
            lines.append(f"| {calls} | {' | '.join(cells)} | {r['verdict']} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["tiny-sd", "tiny-flow"])
    parser.add_argument("--images", type=int, default=8, help="of each of two seeds")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--fitted", type=Path, default=Path("docs/results/fitted.json"), help="of bench_fitted.py")
    parser.add_argument("--fitted-again", action="store_true", help="only the rows of the shipped table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ArtifactWarning)
    file = args.out / "searched.json"
    results = json.loads(file.read_text())["results"] if file.exists() else {}
    stock = json.loads(args.fitted.read_text())["results"]
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        if name not in results:
            results[name] = measured(name, args.images, stock[f"{name} {GUIDANCE:g}"]["budgets"])
        elif args.fitted_again:
            fitted_again(name, args.images, results[name]["budgets"])
        file.write_text(json.dumps({"images": args.images, "seeds": SEEDS, "results": results}) + "\n")
        (args.out / "searched.md").write_text(page(results, args.images))


if __name__ == "__main__":
    main()
