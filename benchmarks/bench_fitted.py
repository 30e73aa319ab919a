"""Fitted tables against the best of diffusers' schedulers on all their grids, at equal calls, from the same noise.

    python benchmarks/bench_fitted.py --models tiny-sd tiny-flow --guidance 4 1 --out docs/results

Fits on its own prompts and noise. Judges on other noise and prompts: 48 images of each of two seeds. Every stock
setting that can make exactly that many calls is screened on 16 of those very images; those that are among the best by
median or by RMSE run on all of them, and the best is picked after the fact, which favours it. Writes `fitted.json` and
`fitted.md`; a result that is in the first already is not measured again. The artifacts, the teacher's images and the
errors of the stock settings stay in --work and are taken from there.

    python benchmarks/bench_fitted.py --name fitted_defaults --samples 16 --moves 16 --refine 3

The same for the fit that `calibrate.fit` makes when it is told nothing.

    python benchmarks/bench_fitted.py --transfer

Takes the artifacts of the first guidance scale, which the command above left in --work, and runs them at other
guidance scales, in half precision and at another size, each against its own teacher and the best stock settings there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from diffaccel import calibrate, compare, models
from diffaccel.artifact import Artifact
from diffaccel.compare import Candidate, Job

CALLS = (5, 6, 8, 10, 12)
SEEDS = (300, 400)
FIT_SEED = 50_000
TEACHER_STEPS = 100  # of the fit
TEACHER_CALLS = 401  # of the judge
SCREENED, FINALISTS = 16, 8  # images of the first seed on which all run; best by median, and by RMSE, that run on all
BARS = {  # ratios to the best stock setting: median, RMSE; share of images improved
    5: (0.5, 0.8, 0.0), 6: (0.42, 0.8, 0.9), 8: (0.4, 0.6, 0.9), 10: (0.35, 0.6, 0.9), 12: (0.35, 0.6, 0.9),
}  # fmt: skip


def fitted(artifact: Artifact) -> Candidate:
    """A fitted table as a candidate."""
    from diffaccel.schedulers import FittedScheduler

    return Candidate("fitted", False, lambda config: FittedScheduler.from_config(config, artifact=artifact))


def errors(pipe: Any, candidate: Candidate, calls: int, jobs: Sequence[Job], targets: Sequence[Any]) -> np.ndarray:
    """Relative errors of all images; empty if the candidate cannot make so many calls."""
    found = []
    for job, target in zip(jobs, targets, strict=True):
        try:
            outcome = compare.run(pipe, candidate, calls, job)
        except (ImportError, ValueError, IndexError, RuntimeError):
            return np.zeros(0)
        if outcome is None:
            return np.zeros(0)
        found.append(compare.errors(outcome, target).numpy())
    return np.concatenate(found)


def few(job: Job, n: int) -> Job:
    """The first n images of a job."""
    inputs = {k: v[:n] if isinstance(v, list) else v for k, v in job.inputs.items()}
    return Job(inputs, job.latents[:n])


@dataclass
class Judge:
    """What one model at one guidance scale is judged by.

    Args:
        pipe, jobs, targets: the pipeline, its inputs, the teacher's images.
        gap: median distance of diffusers' own solver at as many calls.
        stock: by number of calls, how many settings there were, and the errors of the best ones on all images.
    """

    pipe: Any
    jobs: list[Job]
    targets: list[compare.Outcome]
    gap: float
    stock: dict[str, dict[str, Any]]


def rivals(pipe: Any, calls: int, jobs: Sequence[Job], targets: Sequence[compare.Outcome]) -> dict[str, Any]:
    """Errors of the best stock settings on all images: those in front on some of them."""
    small, goal = few(jobs[0], SCREENED), compare.Outcome(targets[0].latents[:SCREENED], TEACHER_CALLS, 0.0)
    screened = {c: errors(pipe, c, calls, [small], [goal]) for c in compare.stock(pipe.scheduler.config)}
    screened = {c: e for c, e in screened.items() if len(e)}
    finals = {c for of in (np.median, rms) for c in sorted(screened, key=lambda c: of(screened[c]))[:FINALISTS]}
    found = {c.name: errors(pipe, c, calls, jobs, targets) for c in screened if c in finals}
    return {"screened": len(screened), "stock": {n: [round(float(v), 6) for v in e] for n, e in found.items()}}


def judge(name: str, guidance: float, images: int, folder: Path) -> Judge:
    """The judge of one model, its numbers from `folder` if they are there."""
    pipe = models.load(name)
    pipe.set_progress_bar_config(disable=True)
    jobs = [compare.job_for(pipe, name, images, seed, guidance=guidance) for seed in SEEDS]
    file = folder / f"judge-{name}-{guidance:g}-{images}.pt"
    if not file.exists():
        teacher = compare.ours("dpmpp", "uniform_lambda", order=2)
        targets = [compare.run(pipe, teacher, TEACHER_CALLS, job) for job in jobs]
        other = compare.run(pipe, compare.teacher(pipe.scheduler.config), TEACHER_CALLS, few(jobs[0], SCREENED))
        near = compare.Outcome(targets[0].latents[:SCREENED], TEACHER_CALLS, 0.0)
        stock = {str(calls): rivals(pipe, calls, jobs, targets) for calls in CALLS}
        gap = float(compare.errors(other, near).median())
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"targets": [t.latents for t in targets], "gap": gap, "stock": stock}, file)
    held = torch.load(file)
    return Judge(
        pipe, jobs, [compare.Outcome(z, TEACHER_CALLS, 0.0) for z in held["targets"]], held["gap"], held["stock"]
    )


def bound(
    pipe: Any, artifact: Artifact, calls: int, jobs: Sequence[Job], targets: Sequence[compare.Outcome]
) -> list[float]:
    """Errors of each image's own best combination of its noise and all predictions of the fitted run.

    It is found with the teacher's image in hand: no coefficients for these calls can bring the image nearer.
    """
    found: list[float] = []
    for job, target in zip(jobs, targets, strict=True):
        scheduler = fitted(artifact).make(pipe.scheduler.config)
        kept, step = [job.latents], scheduler.step

        def keep(*args: Any, kept: list[torch.Tensor] = kept, step: Any = step, **options: Any) -> Any:
            made = step(*args, **options)
            kept.append(made[1])
            return made

        scheduler.step = keep
        compare.generate(pipe, scheduler, calls, job)
        features = torch.stack([v.flatten(1) for v in kept], dim=2).double()
        wanted = target.latents.flatten(1).double()
        left = wanted - (features @ torch.linalg.lstsq(features, wanted[..., None]).solution)[..., 0]
        found += [round(float(v), 6) for v in left.norm(dim=1) / wanted.norm(dim=1)]
    return found


def setting(name: str, guidance: float, args: argparse.Namespace) -> dict[str, Any]:
    """One model at one guidance scale."""
    start = time.perf_counter()
    by = judge(name, guidance, args.images, args.work)
    used = {prompt for job in by.jobs for prompt in job.inputs["prompt"]}
    prompts = [p for p in dict.fromkeys(models.prompts(2000, FIT_SEED)) if p not in used][: args.samples + 8]
    options = {"height": 32, "width": 32, "seed": FIT_SEED, "guidance": guidance, "batch": args.samples}
    options |= {k: getattr(args, k) for k in ("samples", "moves", "refine", "order")}
    options |= {"grids": ("dp2", "gits"), "teacher_steps": TEACHER_STEPS, "holdout": 8, "rivals": "none"}
    out = args.work / f"{args.name}-{name}-{guidance:g}.safetensors"
    options |= {"progress": False, "out": out} | models.CALL_DEFAULTS.get(name, {})
    artifact = Artifact.load(out, "fit") if out.exists() else calibrate.fit(by.pipe, prompts, CALLS, **options)
    report: dict[str, Any] = {"cost": artifact.meta["cost"], "receipt": artifact.meta["receipt"], "budgets": {}}
    report |= {"teacher_gap": by.gap, "bounds": {}}
    for calls in CALLS:
        mine = errors(by.pipe, fitted(artifact), calls, by.jobs, by.targets)
        found = by.stock[str(calls)] | {"fitted": [round(float(v), 6) for v in mine]}
        report["budgets"][str(calls)] = found
        report["bounds"][str(calls)] = bound(by.pipe, artifact, calls, by.jobs, by.targets)
        line = summary(found)
        print(f"{name} {guidance:g}, {calls}: median {line['median'][0]:.3f}, RMSE {line['rmse'][0]:.3f}", flush=True)
    report["seconds"] = round(time.perf_counter() - start, 1)
    return report


TRANSFER_CALLS = 8
TRANSFERS: dict[str, dict[str, Any]] = {
    "as fitted": {}, "guidance 1": {"guidance": 1.0}, "guidance 2.5": {"guidance": 2.5},
    "guidance 7": {"guidance": 7.0}, "bfloat16": {"dtype": torch.bfloat16}, "64 x 64 pixels": {"size": 64},
}  # fmt: skip


def transfer(name: str, guidance: float, images: int, folder: Path) -> dict[str, Any]:
    """One artifact under other conditions than those of its fit; images are those of the first seed."""
    artifact = Artifact.load(folder / f"fitted-{name}-{guidance:g}.safetensors", "fit")
    found = {}
    for what, change in TRANSFERS.items():
        pipe = models.load(name, torch_dtype=change.get("dtype"))
        pipe.set_progress_bar_config(disable=True)
        scale, size = change.get("guidance", guidance), change.get("size", 32)
        job = compare.job_for(pipe, name, images, SEEDS[0], guidance=scale, size=size)
        exact = models.load(name)
        exact.set_progress_bar_config(disable=True)
        target = compare.run(exact, compare.ours("dpmpp", "uniform_lambda", order=2), TEACHER_CALLS, job)
        job = Job(job.inputs, job.latents.to(pipe.dtype))
        mine = errors(pipe, fitted(artifact), TRANSFER_CALLS, [job], [target])
        found[what] = rivals(pipe, TRANSFER_CALLS, [job], [target]) | {"fitted": [round(float(v), 6) for v in mine]}
        print(f"{name} {what}: {summary(found[what])['median']}", flush=True)
    return found


# ---------------------------------------------------------------------- numbers
def summary(budget: dict[str, Any]) -> dict[str, Any]:
    """Fitted against the best stock setting, by median and by RMSE: values, ratios with 95 % intervals over images."""
    errors = {name: np.array(e) for name, e in budget["stock"].items()}
    name = min(errors, key=lambda n: np.median(errors[n]))
    stock, lowest = errors[name], min(errors.values(), key=rms)
    mine = np.array(budget["fitted"])
    draws = np.random.default_rng(0).integers(0, len(mine), (2000, len(mine)))
    rows: dict[str, Any] = {"stock": name}
    for key, of, base in (("median", np.median, stock), ("rmse", rms, lowest)):
        low, high = np.quantile([of(mine[d]) / of(base[d]) for d in draws], (0.025, 0.975))
        rows[key] = (float(of(mine) / of(base)), float(low), float(high))
    better = mine < stock
    low, high = np.quantile(better[draws].mean(axis=1), (0.025, 0.975))
    rows["improved"] = (float(better.mean()), float(low), float(high))
    rows["values"] = (float(np.median(stock)), float(np.median(mine)), rms(lowest), rms(mine))
    rows["worst"] = (float(stock.max()), float(mine.max()))
    return rows


def rms(e: np.ndarray) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(e))))


def _ratio(found: tuple[float, float, float], bar: float | None = None, above: bool = False) -> str:
    text = f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]"
    return text if bar is None else f"{text} {'met' if (found[0] >= bar) == above or found[0] == bar else 'not met'}"


def page(results: dict[str, Any], args: argparse.Namespace) -> str:
    """The Markdown page."""
    lines = [
        "# Fitted tables against the best of diffusers",
        "",
        f"Measured by `python benchmarks/bench_fitted.py` with diffusers {diffusers.__version__}, torch "
        f"{torch.__version__}. Error: relative distance of an image's final latents to a teacher's (DPM-Solver++ 2M, "
        f"{TEACHER_CALLS} calls, uniform in lam) from the same noise, on {args.images} images of each of {len(SEEDS)} "
        f"seeds; noise and prompts unseen by the fit, which had {args.samples} inputs, rows of order {args.order}, "
        f"{args.moves} moves and at most {args.refine} rounds of refinement. Best stock: of every deterministic "
        f"scheduler of diffusers on all its grids, screened on {SCREENED} of the images; the best {FINALISTS} by "
        "median and by RMSE run on all, and the best by median (RMSE: by RMSE) is picked, which favours it. Intervals: "
        "95 %, paired bootstrap over images. In brackets beside a ratio: its interval. `met`: the project's bar for "
        "that number of calls. Bound: the median error of each image's own best combination of its noise and all "
        "predictions of the fitted run, "
        "found with the teacher's image in hand; no coefficients for these calls can bring the images nearer.",
        "",
    ]
    for key, report in results.items():
        cost = report["cost"]
        lines += [
            f"## {key.replace(' ', ', guidance ')}",
            "",
            f"One fit of all budgets took {cost['calls']} model calls and {cost['seconds']:.0f} s on one CPU thread "
            f"of a shared machine. The teacher lies {report['teacher_gap']:.1e} (median) from diffusers' own DPM++ 2M "
            f"(Karras, or its flow form) at {TEACHER_CALLS} calls.",
            "",
            "| calls | best stock | median stock, fitted | ratio | bound | RMSE stock, fitted | ratio | "
            "images improved | worst stock, fitted |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for calls, budget in report["budgets"].items():
            row, bars = summary(budget), BARS[int(calls)]
            m0, m1, r0, r1 = row["values"]
            improved = _ratio(row["improved"], bars[2] or None, above=True)
            cells = [calls, f"{row['stock']} (of {budget['screened']})", f"{m0:.4f}, {m1:.4f}"]
            cells += [_ratio(row["median"], bars[0]), f"{np.median(report['bounds'][calls]):.4f}"]
            cells += [f"{r0:.4f}, {r1:.4f}", _ratio(row["rmse"], bars[1]), improved]
            cells += [f"{row['worst'][0]:.3f}, {row['worst'][1]:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def transfer_page(results: dict[str, Any], guidance: float, images: int) -> str:
    """The Markdown page of `--transfer`."""
    lines = [
        "# Fitted tables under other conditions than those of their fit",
        "",
        f"Measured by `python benchmarks/bench_fitted.py --transfer`: {TRANSFER_CALLS} calls, tables fitted at "
        f"guidance {guidance:g}, float32, 32 x 32 pixels; {images} images. Each row has its own teacher (float32) and "
        "its own best stock setting. Ratios: fitted / best stock, with 95 % intervals.",
        "",
        "| model | condition | best stock | ratio of medians | ratio of RMSE | images improved |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in results.items():
        for what, found in rows.items():
            row = summary(found)
            cells = [name, what, row["stock"], _ratio(row["median"]), _ratio(row["rmse"]), _ratio(row["improved"])]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["tiny-sd", "tiny-flow"])
    parser.add_argument("--guidance", nargs="+", type=float, default=[4.0, 1.0])
    parser.add_argument("--images", type=int, default=48, help="of each of two seeds")
    parser.add_argument("--samples", type=int, default=48, help="inputs of the fit")
    parser.add_argument("--moves", type=int, default=8)
    parser.add_argument("--refine", type=int, default=6, help="rounds at most")
    parser.add_argument("--order", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--name", default="fitted", help="of the files there (with --transfer: fitted_transfer)")
    parser.add_argument("--work", type=Path, default=Path("fitted-artifacts"), help="for artifacts and partial fits")
    parser.add_argument("--transfer", action="store_true", help="under other conditions; keeps other models' rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    file = args.out / f"{args.name}.json"
    results = json.loads(file.read_text())["results"] if file.exists() else {}
    if args.transfer:
        rows = args.out / "fitted_transfer.json"
        moved = json.loads(rows.read_text())["results"] if rows.exists() else {}
        moved |= {name: transfer(name, args.guidance[0], args.images, args.work) for name in args.models}
        rows.write_text(json.dumps({"calls": TRANSFER_CALLS, "results": moved}) + "\n")
        (args.out / "fitted_transfer.md").write_text(transfer_page(moved, args.guidance[0], args.images))
        return
    how = {k: getattr(args, k) for k in ("moves", "refine", "order")}
    for guidance in args.guidance:
        for name in args.models:
            key = f"{name} {guidance:g}"
            if key not in results:
                results[key] = setting(name, guidance, args)
            text = {"images": args.images, "seeds": SEEDS, "samples": args.samples, **how, "results": results}
            args.out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(text) + "\n")
            file.with_suffix(".md").write_text(page(results, args))


if __name__ == "__main__":
    main()
