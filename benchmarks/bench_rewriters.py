"""Rewriters and policies against the sampler that they change, at equal model calls, on the embedded models.

    python benchmarks/bench_rewriters.py --models tiny-sd tiny-flow --images 160 --out docs/results

For each method: FID (embedded features, bias corrected, 95 % interval), its paired difference to the parent sampler on
the same prompts and noise, and, for deterministic methods, the relative distance of the final latents to a many-step
teacher (median, and the ratio to the parent's with a paired bootstrap interval). Without classifier-free guidance,
because FID compares with the data. Writes `rewriters.json` and `rewriters.md`; what is done already is not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch

import diffaccel as da
from diffaccel import calibrate, compare, models
from diffaccel.artifact import Artifact
from diffaccel.eval import fid, fid_difference

CALLS = (8, 12, 20, 40)
BATCH = 40
SEED = 300
TEACHER_CALLS, TEACHER_IMAGES = 100, 80


@dataclass(frozen=True)
class Method:
    """A scheduler setting; `parent` is the name of what it is compared with ("" for a parent)."""

    name: str
    parent: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    calls: tuple[int, ...] = CALLS
    skip_to: float | None = None  # teleported to this level

    def scheduler(self, config: Mapping[str, Any]) -> Any:
        return da.TableScheduler.from_config(config, **self.options)


def methods(name: str, variance: float) -> list[Method]:
    """What is compared on a model; `variance` is that of its clean latents, image by image."""
    first: dict[str, Any] = {"sampler": "ddim", "grid": "trailing"}
    second: dict[str, Any] = {"sampler": "dpmpp", "grid": "trailing"}
    small = [(3, 1, 0.3, 2.0)]
    if name == "tiny-flow":
        shifts = {"window_lam": 0.2, "cutoff_lam": 1.0}
    else:
        shifts = {"window": 40, "cutoff": 300}
    corrected = shifts | {"clock": "corrected", "data_variance": variance}
    return [
        Method("ddim", "", first),
        Method("ddim + epsilon_scale 1.005 below level 10", "ddim",
               first | {"rewrite": [da.epsilon_scale(1.005, below=10.0)]}),
        Method("ddim + time_shift (official clock)", "ddim", first | {"policy": [da.time_shift(**shifts)]}),
        Method("ddim + time_shift (corrected clock)", "ddim", first | {"policy": [da.time_shift(**corrected)]}),
        Method("dpmpp", "", second),
        Method("dpmpp + restart (auto)", "dpmpp", second | {"rewrite": [da.restart()]}, (20, 40)),
        Method("dpmpp + restart (3, 1, .3, 2)", "dpmpp", second | {"rewrite": [da.restart(small)]}),
        Method("dpmpp + momentum .8", "dpmpp", second | {"rewrite": [da.momentum(0.8)]}),
        Method("dpmpp + contrast .1", "dpmpp", second | {"rewrite": [da.contrast(0.1)]}),
        Method("dpmpp + teleport to level 6", "dpmpp", second, skip_to=6.0),
        Method("dpmpp + teleport to level 3", "dpmpp", second, skip_to=3.0),
    ]  # fmt: skip


# ---------------------------------------------------------------------- running
def jobs(pipe: Any, name: str, images: int) -> list[compare.Job]:
    """The images in batches; guidance 1 is none."""
    whole = compare.job_for(pipe, name, images, SEED, guidance=1.0)
    found = []
    for i in range(0, images, BATCH):
        part = slice(i, i + BATCH)
        inputs = {k: v[part] if isinstance(v, list) else v for k, v in whole.inputs.items()}
        found.append(compare.Job(inputs, whole.latents[part]))
    return found


def teleported(pipe: Any, scheduler: Any, law: Any, level: float, calls: int, work: list[compare.Job]) -> torch.Tensor:
    """As `latents`, from the level on."""
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        with da.teleport(pipe, law, skip_to=level) as h, compare.counted(pipe) as count:
            more = {"num_inference_steps": calls, "output_type": "latent"}
            found = [h(**job.inputs, latents=job.latents.clone(), **more).images for job in work]
    finally:
        pipe.scheduler = before
    if count.calls != calls * len(work):
        raise RuntimeError(f"{count.calls} model calls for {calls} in {len(work)} batches")
    return torch.cat(found).float()


def law_of(pipe: Any, work: list[compare.Job], file: Path) -> Any:
    """The Gaussian law of the model's samples, on other seeds."""
    if not file.exists():
        call = {k: v for k, v in work[0].inputs.items() if k not in ("prompt", "guidance_scale")}
        calibrate.gauss(pipe, models.prompts(128, SEED + 1), images=128, calls=12, guidance=1.0, call=call, batch=BATCH,
                        seed=10**6, out=file, progress=False)  # fmt: skip
    return Artifact.load(file, "gauss")


def latents(pipe: Any, scheduler: Any, calls: int, work: list[compare.Job]) -> torch.Tensor:
    """(B, ...) final latents; the calls are counted at the model."""
    found = []
    for k, job in enumerate(work):
        seeded = compare.Job({**job.inputs, "generator": torch.Generator().manual_seed(SEED + k)}, job.latents)
        outcome = compare.generate(pipe, scheduler, calls, seeded)
        if outcome.calls != calls:
            raise RuntimeError(f"{outcome.calls} model calls for {calls}")
        found.append(outcome.latents)
    return torch.cat(found)


@torch.no_grad()
def features_of(pipe: Any, z: torch.Tensor, net: Any) -> torch.Tensor:
    """(B, 128) features of the decoded images."""
    z = z / pipe.vae.config.scaling_factor + (getattr(pipe.vae.config, "shift_factor", None) or 0.0)
    images = torch.cat([pipe.vae.decode(part, return_dict=False)[0] for part in z.split(BATCH)])
    pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return net(pixels).double()


def one_model(name: str, images: int, store: Path, most: int = CALLS[-1]) -> dict[str, Any]:
    """All cells of a model, from the store where they are there."""
    pipe = models.load(name)
    pipe.set_progress_bar_config(disable=True)
    config, work, net = pipe.scheduler.config, jobs(pipe, name, images), models.features()
    teacher = compare.teacher(config)
    short = jobs(pipe, name, min(images, TEACHER_IMAGES))
    key = f"{images}-{models.receipt(name).get('digest', '')}"
    target = kept(store / f"{name}-teacher-{key}.pt", lambda: latents(pipe, teacher.make(config), TEACHER_CALLS, short))
    variance = float(target.flatten(1).var(dim=1).mean())
    half = kept(store / f"{name}-half-{key}.pt", lambda: latents(pipe, teacher.make(config), TEACHER_CALLS // 2, short))
    report: dict[str, Any] = {"images": images, "variance": variance, "cells": []}
    report["teacher_gap"] = float(distance(half, target).median())
    law = law_of(pipe, work, store / f"{name}-gauss.safetensors")
    report["gauss"] = law.meta["receipt"]
    budgets = [n for n in CALLS if n <= most]
    found: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
    for calls in budgets:
        for method in methods(name, variance):
            if calls not in method.calls:
                continue
            scheduler = method.scheduler(config)
            file = store / f"{name}-{method.name}-{calls}-{key}.pt".replace(" ", "_").replace("/", "_")
            if method.skip_to is None:
                z = kept(file, lambda s=scheduler, n=calls: latents(pipe, s, n, work))
            else:
                z = kept(file, lambda s=scheduler, n=calls, to=method.skip_to: teleported(pipe, s, law, to, n, work))
            found[method.name, calls] = (z, features_of(pipe, z, net))
            cell = measured(method, calls, found, target, bool(scheduler_stochastic(method, config, calls)))
            if "policy" in method.options:
                cell["policy"] = scheduler.policy_report()
            report["cells"].append(cell)
            print(f"{name} {calls:3d} {method.name:44s} FID {cell['fid']:7.2f}", flush=True)
    return report


def scheduler_stochastic(method: Method, config: Mapping[str, Any], calls: int) -> bool:
    made = method.scheduler(config)
    made.set_timesteps(calls)
    return made.table.stochastic


def kept(file: Path, make: Any) -> torch.Tensor:
    if not file.exists():
        torch.save(make(), file)
    return torch.load(file)


# ---------------------------------------------------------------------- measuring
def distance(z: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Relative distance of each image's latents to the teacher's."""
    z, target = z[: len(target)].double().flatten(1), target.double().flatten(1)
    return (z - target).norm(dim=1) / target.norm(dim=1)


def measured(method: Method, calls: int, found: Any, target: torch.Tensor, stochastic: bool) -> dict[str, Any]:
    """FID, difference to the parent, paired error."""
    z, features = found[method.name, calls]
    score = fid(features.numpy(), "tiny-fashion", features="tiny-fashion")
    cell: dict[str, Any] = {"method": method.name, "parent": method.parent, "calls": calls, "fid": score.value}
    cell |= {"fid_low": score.low, "fid_high": score.high, "finite": bool(torch.isfinite(z).all())}
    error = distance(z, target)
    if not stochastic:
        cell["error"] = float(error.median())
    if method.parent:
        other, other_features = found[method.parent, calls]
        d = fid_difference(features.numpy(), other_features.numpy(), "tiny-fashion", features="tiny-fashion")
        cell["difference"] = [d.value, d.value - 1.96 * d.se, d.value + 1.96 * d.se]
        if not stochastic:
            cell["ratio"] = ratio(error, distance(other, target))
    return cell


def ratio(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """Median error over the parent's, with a paired bootstrap interval."""
    draws = torch.randint(len(a), (2000, len(a)), generator=torch.Generator().manual_seed(0))
    many = a[draws].median(dim=1).values / b[draws].median(dim=1).values
    low, high = torch.quantile(many, torch.tensor([0.025, 0.975], dtype=many.dtype)).tolist()
    return [float(a.median() / b.median()), low, high]


def verdict(interval: list[float] | None, none: float) -> str:
    """ "better", "worse" or "no benefit found" by whether the interval holds `none`."""
    if interval is None:
        return "-"
    return "better" if interval[2] < none else "worse" if interval[1] > none else "no benefit found"


def markdown(full: Mapping[str, Any]) -> str:
    lines = [
        "# Rewriters and policies",
        "",
        f"Measured by `{full['command']}` with diffusers {full['diffusers']}, torch {full['torch']}. No guidance. FID "
        "with the embedded features against the test images, bias corrected, in brackets its 95 % interval; the "
        "difference is to the parent sampler at the same calls, prompts and noise (paired interval; below 0 is "
        f"better). Error: relative distance of the final latents to {TEACHER_CALLS} calls of a stock second-order "
        "solver, median, and over the parent's (paired bootstrap). Methods that draw noise leave the teacher's path by "
        "design and have no error. Latents of the first "
        f"{TEACHER_IMAGES} images. Each verdict is one of many in the table: some 'better' and 'worse' are chance.",
    ]
    for name, report in full["models"].items():
        lines += ["", f"## {name}", "", f"{report['images']} images; the teacher with half its calls is off by "
                  f"{report['teacher_gap']:.4f}.", "",
                  "| calls | method | FID | FID - parent's | verdict | error | error / parent's | verdict |",
                  "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for c in report["cells"]:
            d, r = c.get("difference"), c.get("ratio")
            cells = [str(c["calls"]), c["method"], f"{c['fid']:.1f} [{c['fid_low']:.1f}, {c['fid_high']:.1f}]"]
            cells += [f"{d[0]:+.2f} [{d[1]:+.2f}, {d[2]:+.2f}]" if d else "-", verdict(d, 0.0)]
            cells += [f"{c['error']:.4f}" if "error" in c else "-"]
            cells += [f"{r[0]:.2f} [{r[1]:.2f}, {r[2]:.2f}]" if r else "-", verdict(r, 1.0)]
            lines.append(f"| {' | '.join(cells)} |")
        shares = [(c["calls"], c["method"], c["policy"]) for c in report["cells"] if c.get("policy")]
        if report.get("gauss"):
            to = report["gauss"]["skip_to"]
            kept = to if isinstance(to, str) else f"a skip to level {to:.3g} stays below the bound"
            lines += ["", f"`calibrate gauss`: {kept}."]
        if shares:
            lines += ["", "Time-Shift, last batch: " + "; ".join(
                f"{m}, {n} calls: {100 * p['edge_share']:.0f} % of the decisions at the window's edge"
                for n, m, p in shares) + "."]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny-sd", "tiny-flow"])
    parser.add_argument("--images", type=int, default=160)
    parser.add_argument("--most", type=int, default=CALLS[-1], help="largest number of calls")
    parser.add_argument("--store", type=Path, default=Path(tempfile.gettempdir()) / "bench-rewriters")
    parser.add_argument("--out", type=Path, help="folder for rewriters.json and .md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    args.store.mkdir(exist_ok=True)
    found = {name: one_model(name, args.images, args.store, args.most) for name in args.models}
    command = f"python benchmarks/bench_rewriters.py --models {' '.join(args.models)} --images {args.images}"
    command += f" --most {args.most}" if args.most != CALLS[-1] else ""
    full = {"command": command, "diffusers": diffusers.__version__, "torch": torch.__version__, "models": found}
    print(markdown(full))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "rewriters.json").write_text(json.dumps(full))
        (args.out / "rewriters.md").write_text(markdown(full))


if __name__ == "__main__":
    main()
