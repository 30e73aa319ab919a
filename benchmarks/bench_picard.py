"""Picard iteration: what a sweep should hold fixed, and whether it beats the same sampler at fewer steps.

    python benchmarks/bench_picard.py --out docs/results

1. An analytic mixture: sweeps and calls that each rule needs to come within the same distance of the sequential run.
2. The embedded pipelines: sweeps, calls and seconds of `da.paradigms`, and the error to a many-step teacher, beside
   sequential runs whose number of calls is the number of sweeps: equal latency if a batch took as long as one row.

Writes `picard.json` and `picard.md`.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffaccel import compare, models, paradigms, trace
from diffaccel.compare import Candidate, Job, Outcome
from diffaccel.core.grid import nodes as grid_nodes
from diffaccel.parallel.picard import picard
from diffaccel.schedulers import TableScheduler
from diffaccel.testing.problems import Mixture
from diffaccel.testing.runs import PATHS

TOLERANCES = tuple(10 ** (-k / 4) for k in range(2, 25))
TARGETS = (1e-2, 1e-3, 1e-4)
# The settings of diffusers that did best at 10 to 20 calls in bench_error.py
STOCK = ("DPM++-2 trailing zero", "DPM++-2 karras", "UniPC-2 karras", "DEIS-2 karras", "flow Euler beta",
         "DPM++-2 flow zero", "UniPC-2 flow zero")  # fmt: skip
RULES: dict[str, dict[str, Any]] = {
    "official sum": {"rule": "official"}, "v": {"space": "v"}, "flow": {"space": "flow"}, "x0": {"space": "x0"},
    "eps": {"space": "eps"}, "v, one row first": {"space": "v", "opening": 1},
}  # fmt: skip


# ---------------------------------------------------------------------- 1. the mixture
def mixture() -> Mixture:
    """Three modes in 48 dimensions, as in the reference data of the tests."""
    k, j = np.arange(3), np.arange(1, 49)
    return Mixture(k + 1.0, 0.8 * np.sin(1.3 * (k[:, None] + 1) * j + 0.7 * k[:, None]), 0.25 + 0.1 * k)


def mixture_rows(sampler: str, path: str, rows: int, window: int, samples: int) -> list[dict[str, Any]]:
    """Sweeps and calls of each rule at the loosest tolerance that reaches each target, one sample at a time."""
    law, table = mixture(), trace(sampler, grid_nodes(PATHS[path], rows, "trailing"))
    first = table.nodes[0]
    found: dict[tuple[str, float], list[tuple[int, int]]] = {}
    for seed in range(samples):
        x = np.random.default_rng(seed).standard_normal((1, 48)) * math.hypot(first.alpha, first.sigma)

        def draws(seed: int = seed) -> Any:
            rng = np.random.default_rng(10_000 + seed)
            return lambda state: rng.standard_normal(state.shape)

        exact = table.apply(x, law.predict, draws())
        for name, options in RULES.items():
            left = list(TARGETS)
            for tol in TOLERANCES:
                out, work = picard(
                    table, x, lambda *a: [law.predict(*r) for r in zip(*a, strict=True)], draws(),
                    window=window, tol=tol, **options,
                )  # fmt: skip
                error = float(np.sqrt(np.mean((out - exact) ** 2)))
                while left and error <= left[0]:
                    found.setdefault((name, left.pop(0)), []).append((len(work.sweeps), work.calls))
    what = {"sampler": sampler, "path": path, "rows": rows, "window": window}
    return [
        what | {"rule": rule, "error": target, "sweeps": float(np.mean([s for s, _ in runs])),
                "calls": float(np.mean([c for _, c in runs])), "runs": len(runs)}
        for (rule, target), runs in found.items()
    ]  # fmt: skip


# ---------------------------------------------------------------------- 2. embedded pipelines
def table_scheduler(sampler: str, **more: Any) -> Candidate:
    """One of ours, on the trailing grid."""
    return compare.ours(sampler, "trailing", **more)


def stock_best(pipe: Any, calls: int, job: Job, target: Outcome) -> tuple[str, float]:
    """diffusers' best setting of STOCK at a number of calls, picked on these very images (which favours it)."""
    found = []
    for candidate in (c for c in compare.stock(pipe.scheduler.config) if c.name in STOCK):
        outcome = compare.run(pipe, candidate, calls, job)
        assert outcome is not None
        found.append((candidate.name, median(outcome, target)))
    return min(found, key=lambda b: b[1])


def median(outcome: Outcome, target: Outcome) -> float:
    """Median relative error over images."""
    return float(compare.errors(outcome, target).median())


def in_parallel(pipe: Any, sampler: str, rows: int, job: Job, **options: Any) -> tuple[Outcome, Any]:
    """A run under `paradigms`, and its report."""
    before = pipe.scheduler
    pipe.scheduler = TableScheduler.from_config(before.config, sampler=sampler, grid="trailing")
    try:
        with paradigms(pipe, **options) as h, torch.no_grad():
            found = h(**job.inputs, latents=job.latents.clone(), num_inference_steps=rows, output_type="latent").images
            report = h.report()
    finally:
        pipe.scheduler = before
    return Outcome(found.float(), report.calls, report.seconds), report


def pipeline_rows(name: str, images: int, sampler: str, rows: int, window: int) -> list[dict[str, Any]]:
    """paradigms at several tolerances; each beside sequential runs of as many calls as it took sweeps."""
    pipe = models.load(name)
    pipe.set_progress_bar_config(disable=True)
    job = compare.job_for(pipe, name, images, seed=300)
    teacher = compare.teacher(pipe.scheduler.config)
    target = compare.generate(pipe, teacher.make(pipe.scheduler.config), 200, job, ramp=teacher.ramp)
    plain = compare.run(pipe, table_scheduler(sampler), rows, job)
    assert plain is not None
    one_by_one = in_parallel(pipe, sampler, rows, job, window=1)[1].seconds
    found = []
    for rule, space in (("scan", "v"), ("scan", "flow"), ("official", None)):
        for tol in (0.3, 0.1, 0.03):
            outcome, report = in_parallel(pipe, sampler, rows, job, window=window, tol=tol, rule=rule, space=space)
            n = report.sweeps
            same = compare.run(pipe, table_scheduler(sampler), n, job)
            second = compare.run(pipe, table_scheduler("dpmpp", order=2), n, job)
            assert same is not None and second is not None
            stock, stock_error = stock_best(pipe, n, job, target) if rule == "scan" and space == "v" else ("", math.nan)
            found.append({
                "model": name, "sampler": sampler, "rows": rows, "window": window, "images": images,
                "rule": space or "official sum", "tol": tol, "sweeps": n, "calls": report.calls,
                "to_sequential": median(outcome, plain), "to_teacher": median(outcome, target),
                "sequential_to_teacher": median(plain, target),
                "same_sampler_with_that_many_calls": median(same, target),
                "dpmpp2_with_that_many_calls": median(second, target),
                "best_stock": stock, "best_stock_with_that_many_calls": stock_error,
                "seconds": report.seconds, "seconds_scan": report.seconds_scan,
                "over_sequential_seconds": report.seconds / one_by_one,
                "predicted_seconds_16_devices_over_1": report.predicted(16) / report.predicted(1) * report.calls / rows,
            })  # fmt: skip
            print({k: v for k, v in found[-1].items() if k in ("model", "rule", "tol", "sweeps", "calls")}, flush=True)
    return found


# ---------------------------------------------------------------------- report
def markdown(report: dict[str, Any]) -> str:
    """Both tables."""
    lines = [
        "# Picard iteration (ParaDiGMS)",
        "",
        f"Measured by `{report['command']}` with torch {report['torch']}.",
        "",
    ]
    lines += ["## An analytic mixture: sweeps (calls) to come within an error of the sequential run", ""]
    rules = list(RULES)
    lines += ["| sampler, path | rows | window | error | " + " | ".join(rules) + " |", "|---" * (4 + len(rules)) + "|"]
    runs: dict[tuple[Any, ...], dict[str, str]] = {}
    for r in report["mixture"]:
        key = (f"{r['sampler']}, {r['path']}", r["rows"], r["window"], f"{r['error']:.0e}")
        runs.setdefault(key, {})[r["rule"]] = f"{r['sweeps']:.1f} ({r['calls']:.0f})"
    for key, cells in runs.items():
        lines.append("| " + " | ".join([*map(str, key), *(cells.get(rule, "not reached") for rule in rules)]) + " |")
    lines += [
        "", "## Embedded pipelines: one image's rows in a batch, against fewer steps one after the other", "",
        "Errors: median relative distance of the final latents. The last three columns spend as many calls, one after "
        "the other, as `paradigms` took sweeps. Seconds in the denoiser on one CPU core (one row keeps it busy) over "
        "those of the run with `window=1`.",
        "",
        "| model, sampler | held fixed | tol | rows | sweeps | calls | seconds / sequential | to the sequential run | "
        "to the teacher | sequential to the teacher | same sampler, calls = sweeps | dpmpp order 2, calls = sweeps | "
        "best stock, calls = sweeps |",
        "|---" * 13 + "|",
    ]  # fmt: skip
    for r in report["pipelines"]:
        stock = r["best_stock_with_that_many_calls"]
        shown = f"{stock:.4f} ({r['best_stock']})" if math.isfinite(stock) else ""
        lines.append(
            f"| {r['model']}, {r['sampler']} | {r['rule']} | {r['tol']} | {r['rows']} | {r['sweeps']} | {r['calls']} | "
            f"{r['over_sequential_seconds']:.2f} | {r['to_sequential']:.4f} | {r['to_teacher']:.4f} | "
            f"{r['sequential_to_teacher']:.4f} | {r['same_sampler_with_that_many_calls']:.4f} | "
            f"{r['dpmpp2_with_that_many_calls']:.4f} | {shown} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["tiny-sd", "tiny-flow"])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8, help="of the mixture")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"command": "python benchmarks/bench_picard.py", "torch": torch.__version__}
    settings = [("ddim", "vp", 25, 25), ("ddim", "vp", 50, 10), ("ddim", "vp", 100, 20), ("ddpm", "vp", 50, 10),
                ("dpmpp", "vp", 50, 10), ("ddim", "flow_shift3", 50, 10), ("ddpm", "vp", 200, 40)]  # fmt: skip
    report["mixture"] = [row for s in settings for row in mixture_rows(*s, args.samples)]
    print("mixture done", flush=True)
    report["pipelines"] = [row for m in args.models for row in pipeline_rows(m, args.images, "ddim", 50, 16)]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "picard.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "picard.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
