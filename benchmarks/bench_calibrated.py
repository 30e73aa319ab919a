"""Calibrated multistep samplers on the embedded models: distance to a teacher (and FID), on their own and best grids.

    python benchmarks/bench_calibrated.py --out docs/results --work calibrated-work [--dc DC-ARTIFACTS] [--fid 500]

Statistics are measured on some seeds, grids and solvers are chosen on others (for each number of calls), errors are
reported on a third set. Only the best stock setting is picked on the reported images, which favours it. Writes
`calibrated.md` and `calibrated.json`; what is done stays in `--work`, where a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from diffaccel import calibrate, compare, models
from diffaccel.artifact import Artifact
from diffaccel.calibrate.ems_choice import GRIDS, SOLVERS
from diffaccel.calibrate.engine import Batch, Captured, Engine
from diffaccel.calibrate.validate import errors, interval
from diffaccel.core.quad import Ems
from diffaccel.eval import frechet
from diffaccel.schedulers import TableScheduler

CALLS = (5, 6, 8, 10)
CASES = (("tiny-sd", 4.0), ("tiny-sd", 1.0), ("tiny-flow", 4.0))
TEACHER_CALLS = 64
SEEDS = {"calibrate": 5000, "choose": 7000, "report": 8000, "fid": 20000}
PLAIN: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "DPM-Solver++ 2M": (("dpmpp", {"order": 2}),),
    "DPM-Solver++ 3M": (("dpmpp", {"order": 3}),),
    "UniPC-2": (("unipc", {"order": 2}),),
    "DEIS-2": (("deis", {"order": 2}),),
}
STOCK = (
    "DPM++-2 linspace zero",
    "DPM++-2 trailing zero",
    "DPM++-2 trailing sigma_min",
    "DPM++-2 karras",
    "DPM++-2 lu",
    "UniPC-2 linspace zero",
    "UniPC-2 trailing zero",
    "UniPC-2 karras",
    "DEIS-2 trailing zero",
    "DEIS-2 karras",
    "DEIS-2 exponential",
    "DPM++-2 flow zero",
    "UniPC-2 flow zero",
    "DEIS-2 flow zero",
    "flow Euler (as shipped)",
)


@dataclass
class Bench:
    """One model at one guidance; errors by setting, kept in a file."""

    name: str
    guidance: float
    work: Path
    images: dict[str, int]
    known: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pipe = models.load(self.name)
        self.prompts = models.prompts(512, 17)
        self.call = {"height": 32, "width": 32, **models.CALL_DEFAULTS.get(self.name, {})}
        self.engine = Engine(self.pipe, self.prompts, guidance=self.guidance, call=self.call, progress=False)
        self.config = TableScheduler.from_config(self.pipe.scheduler.config).config
        self.file = self.work / f"{self.name}-g{self.guidance:g}.json"
        if self.file.exists():
            self.known = json.loads(self.file.read_text())
        self.targets: dict[str, np.ndarray] = {}

    def batch(self, part: str, first: int = 0, count: int | None = None) -> Batch:
        """Images of one of the sets."""
        n = self.images[part] if count is None else count
        numbers = range(first, first + n)
        prompts = tuple(self.prompts[(SEEDS[part] + i) % len(self.prompts)] for i in numbers)
        return Batch(0, prompts, tuple(SEEDS[part] + i for i in numbers))

    def target(self, part: str) -> np.ndarray:
        """The teacher's last states."""
        if part not in self.targets:
            file = self.work / f"{self.name}-g{self.guidance:g}-{part}.npy"
            if not file.exists():
                teacher = Captured.of(
                    self.config, "dpmpp", {"order": 3, "form": "exact"}, grid="mid", grid_options={"w": 0.5}
                )
                np.save(file, self.engine.run(self.batch(part), teacher, TEACHER_CALLS).double().cpu().numpy())
            self.targets[part] = np.load(file)
        return self.targets[part]

    def errors(self, part: str, label: str, make: Any, calls: int, steps: int | None = None) -> np.ndarray:
        """Of each image, (n,); measured once."""
        key = f"{part}/{calls}/{label}"
        if key not in self.known:
            states = self.engine.run(self.batch(part), make(), steps or calls).double().cpu().numpy()
            self.known[key] = errors(states, self.target(part)).tolist()
            self.file.write_text(json.dumps(self.known))
        return np.nan_to_num(np.array(self.known[key]), nan=1e30)

    def statistics(self) -> Artifact:
        """The artifact of `calibrate.ems`, made now unless it is there."""
        out = self.work / f"ems-{self.name}-g{self.guidance:g}.safetensors"
        if out.exists():
            return Artifact.load(out, "ems")
        return calibrate.ems(
            self.pipe, self.prompts, guidance=self.guidance, images=self.images["calibrate"], nodes=40, calls=(5, 8),
            chosen_on=8, held_out=16, batch=32, seed=SEEDS["calibrate"], out=out, call=self.call, progress=False,
        )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One scheduler of the table: `make(n)` builds it for n calls."""

    label: str
    setting: str
    make: Any
    steps: Any = None


def shown(grid: dict[str, Any], options: dict[str, Any]) -> str:
    """A setting in words."""
    words = [grid.get("grid", "its own grid"), *(f"{k}={v}" for k, v in grid.get("grid_options", {}).items())]
    return ", ".join([*words, *(f"{k}={v}" for k, v in options.items())])


def ours(bench: Bench, sampler: str, options: dict[str, Any], grid: dict[str, Any]) -> Any:
    """A maker of our schedulers."""
    return lambda n=0: Captured.of(bench.config, sampler, options, **grid)


def best(bench: Bench, label: str, sampler: str, options: list[dict[str, Any]], n: int) -> tuple[Any, Any]:
    """(grid, options) with the lowest mean error at n calls on the images for choosing."""
    found = []
    for grid in GRIDS:
        for option in options:
            words = f"{label}: {shown(grid, {k: v for k, v in option.items() if k != 'statistics'})}"
            e = bench.errors("choose", words, ours(bench, sampler, option, grid), n)
            found.append((float(e.mean()), len(found), grid, option))
    return min(found, key=lambda f: f[:2])[2:]


def rows_of(bench: Bench, made: Artifact, dc: Path | None, n: int) -> list[Row]:
    """All schedulers of ours for one model at n calls."""
    rows = []
    for label, ((sampler, options),) in PLAIN.items():
        rows.append(Row(label, "its own grid", ours(bench, sampler, options, {})))
        grid, _ = best(bench, label, sampler, [options], n)
        rows.append(Row(label, shown(grid, {}), ours(bench, sampler, options, grid)))
    ems = Ems(*(made.tensors[k] for k in ("lam", "l", "s", "b")))
    for label, statistics in (("DPM-Solver-v3", ems), ("the same, without statistics", "none")):
        full = [{**o, "statistics": statistics} for o in SOLVERS]
        grid, options = best(bench, label, "dpm_v3", full, n)
        plain = {k: v for k, v in options.items() if k != "statistics"}
        rows.append(Row(label, shown({}, SOLVERS[1]), ours(bench, "dpm_v3", full[1], {})))
        rows.append(Row(label, shown(grid, plain), ours(bench, "dpm_v3", options, grid)))
    for file in sorted(dc.glob(f"{bench.name}-g{bench.guidance:g}-*.safetensors")) if dc else ():
        artifact = Artifact.load(file, "dc")
        where = file.stem.rsplit("-", 1)[1]
        config = bench.pipe.scheduler.config

        def make(n: int = 0, artifact: Artifact = artifact, config: Any = config) -> Any:
            return TableScheduler.from_config(config, artifact=artifact)

        rows.append(Row("DC-Solver (UniPC-2)", where if where != "own" else "its own grid", make))
    return rows


def stock_rows(bench: Bench) -> list[Row]:
    """Schedulers of diffusers itself."""
    config = bench.pipe.scheduler.config
    found = [c for c in compare.stock(config) if c.name in STOCK]
    return [Row("stock", c.name, lambda n=0, c=c: c.make(config)) for c in found if not c.ramp]


def report(bench: Bench, dc: Path | None, fid: int) -> dict[str, Any]:
    """Everything of one model at one guidance."""
    made = bench.statistics()
    stock, table = stock_rows(bench), []
    for n in CALLS:
        mine = rows_of(bench, made, dc, n)
        found = {}
        for r in [*mine, *stock]:
            found[r.label, r.setting] = bench.errors("report", f"{r.label}: {r.setting}", r.make, n)
        top = min((k for k in found if k[0] == "stock"), key=lambda k: found[k].mean())
        for key, e in found.items():
            if key[0] == "stock" and key != top:
                continue
            change = interval(e - found[top])
            table.append({
                "calls": n, "method": key[0], "setting": key[1], "mean": float(e.mean()), "median": float(np.median(e)),
                "rmse": float(np.sqrt((e**2).mean())), "minus_stock": change,
            })  # fmt: skip
        print(bench.name, bench.guidance, n, "calls done", flush=True)
    scores = fids(bench, made, dc, table, fid) if fid else []
    return {
        "model": bench.name, "guidance": bench.guidance, "images": bench.images, "table": table, "fid": scores,
        "receipt": made.receipt, "cost": made.meta["cost"],
    }  # fmt: skip


def fids(bench: Bench, made: Artifact, dc: Path | None, table: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """FID (features of tiny-fashion) at each number of calls: the best stock setting, and ours on their best grids."""
    reference = models.reference(32)
    target = frechet.from_moments(reference["mu"], reference["sigma"], reference["n"])
    net, scores = models.features(), []
    for calls in CALLS:
        top = next(r["setting"] for r in table if r["calls"] == calls and r["method"] == "stock")
        kept = [r for r in rows_of(bench, made, dc, calls) if not r.setting.startswith("its own")]
        kept += [r for r in stock_rows(bench) if r.setting == top]
        found = {}
        for row in kept:
            key = f"fid/{calls}/{n}/{row.label}: {row.setting}"
            found[row] = _features(bench, row, calls, n, net, key)
        base = next(f for r, f in found.items() if r.label == "stock")
        for row, features in found.items():
            score = {"calls": calls, "method": row.label, "setting": row.setting, "images": n}
            score["fid"] = frechet.fid(features, target)
            if row.label != "stock":
                change = frechet.paired(features, base, target)
                score["minus_stock"] = f"{change.value:+.2f} +- {1.96 * change.se:.2f}"
            scores.append(score)
    return scores


def _features(bench: Bench, row: Row, calls: int, n: int, net: Any, key: str) -> np.ndarray:
    """Features of n images, (n, 128); kept."""
    file = bench.work / (key.replace("/", "_").replace(" ", "_")[:150] + f"-{bench.name}-g{bench.guidance:g}.npy")
    if file.exists():
        return np.load(file)
    vae, found = bench.pipe.vae, []
    for first in range(0, n, 32):
        z = bench.engine.run(bench.batch("fid", first, min(32, n - first)), row.make(), calls)
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        with torch.no_grad():
            images = vae.decode(z / vae.config.scaling_factor + shift).sample
            pixels = ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
            found.append(net(pixels).numpy())
    np.save(file, np.concatenate(found))
    return np.concatenate(found)


def markdown(reports: list[dict[str, Any]], command: str) -> str:
    """The page of results."""
    lines = [
        "# Calibrated multistep samplers",
        "",
        f"Measured by `{command}` with diffusers {diffusers.__version__}, torch {torch.__version__}. Error: relative "
        f"distance of an image's final latents to those of a {TEACHER_CALLS}-call teacher (exact Adams, order 3) from "
        "the same noise. Statistics (DPM-Solver-v3) and ratios (DC-Solver) were calibrated, and grids and solvers "
        "chosen for each number of calls, on other seeds; the best stock setting was picked on the images of the "
        "table, which favours it. Difference: mean error minus that of the best stock setting, with its 95 % paired "
        "bootstrap interval.",
    ]
    for r in reports:
        lines += ["", f"## {r['model']}, guidance {r['guidance']:g}", ""]
        lines += [
            f"{r['images']['report']} images. Statistics: {r['images']['calibrate']} trajectories; the calibration "
            f"with its choice and validation made {r['cost']['calls']} model calls. Its own verdict: "
            f"{r['receipt']['result']}.",
        ]
        for n in CALLS:
            lines += ["", f"### {n} calls", "", "| method | setting | median | mean | RMSE | mean minus best stock |"]
            lines += ["|---|---|---|---|---|---|"]
            for row in sorted((t for t in r["table"] if t["calls"] == n), key=lambda t: t["mean"]):
                change, low, high = row["minus_stock"]
                mark = "" if row["method"] == "stock" else f"{change:+.4f} [{low:+.4f}, {high:+.4f}]"
                verdict = " **better**" if high < 0 and mark else ""
                lines.append(
                    f"| {row['method']} | {row['setting']} | {row['median']:.4f} | {row['mean']:.4f} | "
                    f"{row['rmse']:.4f} | {mark}{verdict} |"
                )
        if r["fid"]:
            lines += ["", f"FID of the features of tiny-fashion, {r['fid'][0]['images']} images (not Inception):", ""]
            lines += ["| calls | method | setting | FID | minus best stock |", "|---|---|---|---|---|"]
            for s in sorted(r["fid"], key=lambda s: (s["calls"], s["fid"])):
                lines.append(
                    f"| {s['calls']} | {s['method']} | {s['setting']} | {s['fid']:.2f} | {s.get('minus_stock', '')} |"
                )
    return "\n".join(lines) + "\n" + summary(reports)


def summary(reports: list[dict[str, Any]]) -> str:
    """What the tables show, counted."""
    lines = ["", "## What this shows", ""]
    for label in ("DPM-Solver-v3", "DC-Solver (UniPC-2)"):
        cases = better = 0
        against: list[float] = []
        for r in reports:
            for n in CALLS:
                at = [t for t in r["table"] if t["calls"] == n]
                best_own = min((t for t in at if t["method"] == label), key=lambda t: t["mean"], default=None)
                stock = next(t for t in at if t["method"] == "stock")
                if best_own is not None:
                    cases += 1
                    better += best_own["minus_stock"][2] < 0
                    against.append(best_own["mean"] / stock["mean"])
        if cases:
            ratio = math.exp(float(np.mean(np.log(against))))
            lines.append(
                f"- {label}: better than the best stock setting, with an interval below zero, in {better} of {cases} "
                f"cases; its mean error is {ratio:.2f} times that of the best stock setting (geometric mean)."
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("calibrated-work"))
    parser.add_argument("--images", type=int, default=24, help="reported images")
    parser.add_argument("--choose", type=int, default=8, help="images for choosing grids")
    parser.add_argument("--calibrate", type=int, default=64, help="trajectories for the statistics")
    parser.add_argument("--fid", type=int, default=0, help="images for FID (0: none)")
    parser.add_argument("--dc", type=Path, help="folder of DC-Solver artifacts made by bench_dc.py")
    parser.add_argument("--cases", type=int, default=len(CASES))
    parser.add_argument("--out", type=Path, help="folder for calibrated.json and calibrated.md")
    args = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    images = {"calibrate": args.calibrate, "choose": args.choose, "report": args.images}
    reports = [report(Bench(name, g, args.work, images), args.dc, args.fid) for name, g in CASES[: args.cases]]
    command = f"python benchmarks/bench_calibrated.py --images {args.images} --choose {args.choose} --calibrate "
    command += f"{args.calibrate} --fid {args.fid} --cases {args.cases}" + (" --dc DC-ARTIFACTS" if args.dc else "")
    text = markdown(reports, command)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "calibrated.json").write_text(json.dumps({"command": command, "reports": reports}))
        (args.out / "calibrated.md").write_text(text)


if __name__ == "__main__":
    main()
