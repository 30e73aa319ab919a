"""Staged resolution against plain runs of equal work, on the embedded models at 64 pixels (stages at 64 and 32).

    python benchmarks/bench_bottleneck.py --out docs/results

Every schedule stands beside plain runs with `round(step_equivalents)` calls: the same solver, and stock ones.
Error: relative distance of the final latents to a many-call run from the same noise. FID: with the embedded features.
The second is for schedules that leave the many-call picture by design. Writes `bottleneck.json` and `bottleneck.md`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffaccel import Stage, bottleneck, compare, models
from diffaccel.compare import Candidate, Job
from diffaccel.eval import frechet

SIZE, BATCH, TEACHER_CALLS, SEED = 64, 16, 50, 400
STOCK = ("DPM++-2 trailing zero", "UniPC-2 karras", "DPM++-2 flow zero", "UniPC-2 flow zero")
HLH = "spectral-hlh"
LATE = [Stage(0.5, 12, t_end=0.5, shift=3), Stage(1, 13)]
STAGED: dict[str, tuple[Any, dict[str, Any]]] = {
    "spectral-hlh, memory": (HLH, {}),
    "spectral-hlh, white": (HLH, {"fill": "white"}),
    "half to .7, then full, memory": ([Stage(0.5, 12, t_end=0.7), Stage(1, 13)], {}),
    "half to .5, then full, memory": (LATE, {}),
    "bottleneck-3x": ("bottleneck-3x", {}),
    "few-8, memory": ("few-8", {}),
}
PLAIN_SAMPLER = ("dpmpp", {"order": 2})


class Model:
    """An embedded pipeline, its prompts and noise, and what its many-call run makes."""

    def __init__(self, name: str, images: int) -> None:
        self.name, self.pipe = name, models.load(name)
        self.pipe.set_progress_bar_config(disable=True)
        whole = compare.job_for(self.pipe, name, images, SEED, size=SIZE)
        cuts = range(0, images, BATCH)
        self.jobs = [Job(_cut(whole.inputs, i), whole.latents[i : i + BATCH]) for i in cuts]
        reference = models.reference(SIZE)
        mu, sigma = (torch.as_tensor(reference[k]).double() for k in ("mu", "sigma"))
        self.reference, self.net = frechet.from_moments(mu, sigma, reference["n"]), models.features()
        teacher = compare.teacher(self.pipe.scheduler.config)
        self.target = self.latents(lambda job: self.plain(teacher, TEACHER_CALLS, job))[0]

    def latents(self, run: Callable[[Job], torch.Tensor]) -> tuple[torch.Tensor, float]:
        """Final latents of all images, and seconds."""
        start = time.perf_counter()
        found = torch.cat([run(job) for job in self.jobs])
        return found, time.perf_counter() - start

    def plain(self, candidate: Candidate, calls: int, job: Job) -> torch.Tensor:
        """A run at full size."""
        outcome = compare.run(self.pipe, candidate, calls, job)
        assert outcome is not None
        return outcome.latents

    def features(self, latents: torch.Tensor) -> torch.Tensor:
        """Of the decoded images."""
        vae, found = self.pipe.vae, []
        with torch.no_grad():
            for part in latents.split(BATCH):
                z = part / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
                pixels = (vae.decode(z).sample.clamp(-1, 1) + 1) * 127.5
                found.append(self.net(pixels.round().to(torch.uint8)))
        return torch.cat(found)

    def row(self, name: str, calls: float, latents: torch.Tensor, seconds: float, **more: Any) -> dict[str, Any]:
        """Error and FID of a set of images."""
        z, t = latents.double().flatten(1), self.target.double().flatten(1)
        error = ((z - t).norm(dim=1) / t.norm(dim=1)).median()
        features = self.features(latents)
        made = {"name": name, "calls": calls, "error": float(error), "fid": frechet.fid(features, self.reference)}
        return made | {"seconds": seconds, "features": features} | more


def _cut(inputs: Any, i: int) -> dict[str, Any]:
    return {k: v[i : i + BATCH] if isinstance(v, list) else v for k, v in inputs.items()}


def measured(model: Model) -> list[dict[str, Any]]:
    """All schedules of one model, each with its plain rivals."""
    rows, plain = [], {}
    same = compare.ours(PLAIN_SAMPLER[0], "trailing", **PLAIN_SAMPLER[1])
    stock = [c for c in compare.stock(model.pipe.scheduler.config) if c.name in STOCK]

    def rivals(calls: int) -> list[dict[str, Any]]:
        if calls not in plain:
            found = []
            for candidate in (same, *stock):
                latents, seconds = model.latents(lambda job, c=candidate: model.plain(c, calls, job))
                found.append(model.row(candidate.name, calls, latents, seconds))
            plain[calls] = found
        return plain[calls]

    for name, (stages, options) in STAGED.items():
        before = model.pipe.scheduler
        model.pipe.scheduler = same.make(before.config)
        with bottleneck(model.pipe, stages, on_small="warn", **options) as h:
            latents, seconds = model.latents(
                lambda job, h=h: h(**job.inputs, latents=job.latents.clone(), output_type="latent").images
            )
            report = h.report()
        model.pipe.scheduler = before
        made = model.row(name, report.calls, latents, seconds, work=report.step_equivalents)
        equal = rivals(int(report.plain_calls or 0))
        nearest, best = min(equal, key=lambda r: r["error"]), min(equal, key=lambda r: r["fid"])
        gap = frechet.paired(made["features"], best["features"], model.reference)
        made |= {
            "plain_calls": report.plain_calls, "plain": _shown(equal[0]), "nearest": _shown(nearest),
            "best_fid": _shown(best), "fid_gap": gap.value, "fid_gap_se": gap.se,
        }  # fmt: skip
        rows.append(made)
        print(model.name, {k: v for k, v in made.items() if k not in ("features", "nearest", "best_fid")}, flush=True)
    full = rivals(25)
    rows += [r | {"name": f"plain {r['name']}"} for r in full]
    return [{k: v for k, v in r.items() if k != "features"} for r in rows]


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != "features"}


def markdown(report: dict[str, Any]) -> str:
    """A table for each model."""
    lines = ["# Staged resolution", "", f"Measured by `{report['command']}`, torch {report['torch']}; {SIZE} pixels, "]
    lines[-1] += (
        f"{report['images']} images, solver dpmpp order 2 in the stages. Work is counted FLOPs in calls at full size. "
        "Error: median relative distance of the final latents to a stock second-order run of "
        f"{TEACHER_CALLS} calls from the same noise. FID: embedded features, {report['images']} images, biased upwards "
        "alike in all rows; the gap is to the plain run of equal work with the lowest FID, with 1.96 standard errors."
    )
    for name, rows in report["models"].items():
        staged = [r for r in rows if "work" in r]
        lines += ["", f"## {name}", "",
                  "| schedule | calls | work | seconds | error | FID | plain calls of equal work | "
                  "error, same solver | error, nearest plain | FID, same solver | lowest plain FID | FID gap |",
                  "|---" * 12 + "|"]  # fmt: skip
        for r in staged:
            gap, width = r["fid_gap"], 1.96 * r["fid_gap_se"]
            verdict = "" if gap + width < 0 else " **no benefit found**"
            lines.append(
                f"| {r['name']} | {r['calls']} | {r['work']:.1f} | {r['seconds']:.1f} | {r['error']:.3f} | "
                f"{r['fid']:.2f} | {r['plain_calls']} ({r['plain']['seconds']:.1f} s) | {r['plain']['error']:.3f} | "
                f"{r['nearest']['error']:.3f} ({r['nearest']['name']}) | {r['plain']['fid']:.2f} | "
                f"{r['best_fid']['fid']:.2f} ({r['best_fid']['name']}) | {gap:+.2f} ± {width:.2f}{verdict} |"
            )
        lines += ["", "| plain, 25 calls | seconds | error | FID |", "|---|---|---|---|"]
        lines += [
            f"| {r['name']} | {r['seconds']:.1f} | {r['error']:.3f} | {r['fid']:.2f} |" for r in rows if "work" not in r
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["tiny-sd", "tiny-flow"])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    command = f"python benchmarks/bench_bottleneck.py --images {args.images}"
    report = {"command": command, "torch": torch.__version__, "images": args.images, "models": {}}
    for name in args.models:
        report["models"][name] = measured(Model(name, args.images))
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "bottleneck.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.out / "bottleneck.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
