"""FSampler at equal model calls: against the same sampler, 2M, 2M on the kept nodes, diffusers' schedulers and ZEUS.

    python benchmarks/bench_fsampler.py --out docs/results [--zeus FOLDER] [--images 12] [--no-unet]

Three parts: error to a many-call teacher on the embedded models; adaptive choice of nodes on Gaussian mixtures with an
exact answer; time of the hook, against one call of a UNet of the size of SD 1.5 (float32, CPU, one thread). FOLDER
is a checkout of github.com/Ting-Justin-Jiang/ZEUS; a copy of it is made to run on the CPU ("cuda" -> "cpu").
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import zeus_peer
from fsampler_page import MIDPOINT, markdown

import diffaccel as da
from diffaccel import compare, models
from diffaccel.compare import Candidate, Job, Outcome
from diffaccel.core.extrapolation import Predictor
from diffaccel.core.extrapolation_policy import Extrapolating, Gate
from diffaccel.core.grid import nodes as grid_nodes
from diffaccel.core.path import Nodes
from diffaccel.samplers.adaptive_nodes import adaptive_nodes
from diffaccel.samplers.registry import get
from diffaccel.schedulers import FSamplerScheduler, TableScheduler
from diffaccel.testing.problems import Mixture

CALLS = (6, 8, 10, 15, 20)
GRIDS = {"tiny-sd": ("trailing", "karras"), "tiny-flow": ("trailing", "karras")}
TEACHER_CALLS = 200
SEED = 300
EXACT = {"order": 2, "form": "exact"}


# ---------------------------------------------------------------------- embedded models
def preset(name: str, grid: str, **options: Any) -> Candidate:
    """`FSamplerScheduler` with these options."""

    def make(config: Mapping[str, Any]) -> Any:
        return FSamplerScheduler.from_config(config, grid=grid, **options)

    return Candidate(name, False, make)


def rivals(grid: str) -> list[Candidate]:
    """FSampler and its controls on one grid, from the second on FSampler's settings."""

    def kept(config: Mapping[str, Any]) -> Any:
        rewrite = [da.skip("h2/s2", quantity="x0", coordinate="lam")]
        return TableScheduler.from_config(config, sampler="dpmpp", grid=grid, rewrite=rewrite, **EXACT)

    return [
        Candidate("Euler", False, compare.ours("ddim", grid).make),
        Candidate("2M", False, compare.ours("dpmpp", grid, **EXACT).make),
        Candidate(MIDPOINT, False, compare.ours("dpmpp", grid, order=2).make),
        Candidate("2M on the kept nodes", False, kept),
        preset("FSampler (x0, lam)", grid),
        preset("FSampler official", grid, official=True),
        preset("FSampler official simple", grid, official="simple"),
        preset("FSampler h3/s3 (x0, lam)", grid, skip="h3/s3"),
    ]


def row(name: str, outcome: Outcome | None, target: Outcome, calls: int, **more: Any) -> dict[str, Any]:
    """One line of the result."""
    e = [] if outcome is None else [round(float(v), 6) for v in compare.errors(outcome, target)]
    return {"method": name, "calls": calls, "errors": e, **more}


def model_part(name: str, images: int, budgets: tuple[int, ...], zeus: Path | None) -> dict[str, Any]:
    """All rows of one model."""
    pipe = loaded(name)
    job, config = compare.job_for(pipe, name, images, SEED), pipe.scheduler.config
    target = compare.run(pipe, compare.teacher(config), TEACHER_CALLS, job)
    half = compare.run(pipe, compare.teacher(config), TEACHER_CALLS // 2, job)
    assert target is not None and half is not None
    rows = []
    for calls in budgets:
        start = time.perf_counter()
        for grid in GRIDS[name]:
            rows += [row(c.name, compare.run(pipe, c, calls, job), target, calls, grid=grid) for c in rivals(grid)]
        rows += stock_rows(pipe, job, target, calls)
        if zeus is not None:
            rows += zeus_rows(name, job, target, calls, zeus)
        print(f"{name}: {calls} calls in {time.perf_counter() - start:.0f} s", flush=True)
    gap = float(compare.errors(half, target).median())
    return {"images": images, "teacher_gap": gap, "rows": rows, "adaptive": adaptive_rows(pipe, name, job, target)}


def loaded(name: str) -> Any:
    """A fresh embedded pipeline."""
    pipe = models.load(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_rows(pipe: Any, job: Job, target: Outcome, calls: int) -> list[dict[str, Any]]:
    """Every deterministic scheduler of diffusers."""
    rows = []
    for candidate in compare.stock(pipe.scheduler.config):
        try:
            outcome = compare.run(pipe, candidate, calls, job)
        except (ImportError, ValueError, IndexError, RuntimeError):
            continue
        if outcome is not None:
            rows.append(row(candidate.name, outcome, target, calls, grid="stock"))
    return rows


def zeus_rows(name: str, job: Job, target: Outcome, calls: int, folder: Path) -> list[dict[str, Any]]:
    """The public peer, on the schedulers and models that it patches."""
    rows = []
    kinds = ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler") if name == "tiny-sd" else (None,)
    for kind in kinds:
        label = f"ZEUS on {kind or 'the own scheduler'}"
        try:
            outcome, steps = zeus_peer.run(loaded(name), kind, calls, job, folder)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
            rows.append(row(label, None, target, calls, grid="ZEUS", failed=reason))
            continue
        rows.append(row(label, outcome, target, calls, grid="ZEUS", steps=steps))
    return rows


def adaptive_rows(pipe: Any, name: str, job: Job, target: Outcome) -> list[dict[str, Any]]:
    """The hook's adaptive gate on the stock first-order scheduler; Euler and 2M at the mean number of calls."""
    rows = []
    euler = "EulerDiscreteScheduler" if name == "tiny-sd" else "FlowMatchEulerDiscreteScheduler"
    make = getattr(diffusers, euler).from_config
    for steps, tol in ((20, 0.10), (30, 0.10), (30, 0.01)):
        scheduler = make(pipe.scheduler.config)
        with da.extrapolate(pipe, "adaptive", tol=tol) as handle:
            outcome = compare.generate(pipe, scheduler, steps, job, ramp=name != "tiny-sd")
        report = handle.report()
        mean = round(statistics.mean(report.calls))
        own = compare.generate(pipe, make(pipe.scheduler.config), mean, job, ramp=name != "tiny-sd")
        second = compare.run(pipe, compare.ours("dpmpp", GRIDS[name][0], **EXACT), mean, job)
        assert second is not None
        found = {"adaptive": outcome, "Euler": own, "2M": second}
        medians = {k: float(compare.errors(o, target).median()) for k, o in found.items()}
        calls = {"mean": statistics.mean(report.calls), "min": min(report.calls), "max": max(report.calls)}
        rows.append({"steps": steps, "tol": tol, "calls": calls, "at": mean, **medians, "notes": report.notes})
    return rows


# ---------------------------------------------------------------------- mixtures
def mixture(seed: int) -> Mixture:
    """The mixture of the reference data: 3 modes in 6 dimensions."""
    k, d = np.arange(3)[:, None], np.arange(6)
    return Mixture((k[:, 0] + 1) / 6, 1.5 * np.sin(1.7 * (k + 1) * (d + 1) + seed), 0.2 + 0.15 * np.arange(3))


MIXTURES = [("flow", 20, 0.003), ("flow", 30, 0.003), ("flow", 50, 0.001), ("edm", 20, 0.003), ("edm", 50, 0.001)]


def mixture_part(starts: int = 48) -> list[dict[str, Any]]:
    """Adaptive nodes against their controls, root mean square error to the exact flow, mean over 4 mixtures."""
    return [mixture_row(kind, n, tol, starts) for kind, n, tol in MIXTURES]


def mixture_row(kind: str, n: int, tol: float, starts: int) -> dict[str, Any]:
    path = da.Path.flow(3.0) if kind == "flow" else da.Path.edm(0.03, 14.6)
    grid = "trailing" if kind == "flow" else "karras"
    nodes = grid_nodes(path, n, grid)
    found: dict[str, list[float]] = {}
    calls = []
    for seed in range(4):
        problem, rng = mixture(seed), np.random.default_rng(seed)
        x, other = (nodes[0].sigma * rng.standard_normal((starts, 6)) for _ in range(2))
        exact = problem.flow(x, nodes[0], nodes[-1], 1e-9)
        run = adaptive_nodes(problem.denoise, x, nodes, tol=tol)
        budget = math.ceil(statistics.mean(run.calls))
        calls.append(statistics.mean(run.calls))
        common = density_grid(adaptive_nodes(problem.denoise, other, nodes, tol=tol).nodes, nodes, budget)
        states = {
            "adaptive_nodes": run.x,
            "FSampler adaptive": np.concatenate([gated(problem, x[b : b + 1], nodes, tol) for b in range(starts)]),
            "2M, plain grid": get("dpmpp").run(x, grid_nodes(path, budget, grid), problem.denoise, **EXACT),
            "2M, one grid of that density": get("dpmpp").run(x, common, problem.denoise, **EXACT),
        }
        for name, y in states.items():
            found.setdefault(name, []).append(float(np.sqrt(((y - exact) ** 2).mean())))
    return {"path": kind, "nodes": n, "tol": tol, "calls": statistics.mean(calls)} | {
        name: statistics.mean(errors) for name, errors in found.items()
    }


def gated(problem: Mixture, x: np.ndarray, nodes: Nodes, tol: float) -> np.ndarray:
    """FSampler's own adaptive run: Euler, with predicted answers in place."""
    predict = Extrapolating(problem.denoise, nodes, None, Gate(tol), Predictor(3, "x0", "sigma"))
    out: np.ndarray = get("ddim").run(x, nodes, predict)
    return out


def density_grid(chosen: list[list[int]], nodes: Nodes, calls: int) -> Nodes:
    """One grid for all: quantiles of the nodes that other starts chose."""
    pooled = np.sort([i for one in chosen for i in one])
    picks = np.quantile(pooled, (np.arange(calls) + 0.5) / calls)
    picks[0] = 0
    lams = np.array([node.lam for node in nodes[:-1]])
    finite = np.isfinite(lams)
    body = [nodes.path.at_lam(float(v)) for v in np.interp(picks[1:], np.arange(len(lams))[finite], lams[finite])]
    kept = [nodes[0]]
    for node in body:
        if node.level < kept[-1].level * (1 - 1e-9):
            kept.append(node)
    return Nodes([*kept, nodes[-1]], nodes.path)


# ---------------------------------------------------------------------- time of the hook
class Null(torch.nn.Module):
    """A denoiser that costs nothing."""

    def forward(self, sample: torch.Tensor, timestep: Any, encoder_hidden_states: Any = None, return_dict: bool = True):
        return (sample,)


class Holder:
    """What the hook asks of a pipeline."""

    do_classifier_free_guidance = False

    def __init__(self, unet: torch.nn.Module, scheduler: Any) -> None:
        self.unet, self.scheduler = unet, scheduler


def hook_seconds(make: Callable[[], Any], rounds: int = 20) -> dict[str, float]:
    """Median seconds that the hook adds to a real call, and that a skip takes; 1x4x64x64, 60 steps."""
    pipe, x = Holder(Null(), make()), torch.randn(1, 4, 64, 64)
    spent: dict[str, list[float]] = {"plain": [], "real": [], "skip": []}
    for hooked in (False, True):
        handle = da.extrapolate(pipe, "h2/s2") if hooked else None
        for _ in range(rounds):
            pipe.scheduler.set_timesteps(60)
            pipe.scheduler.set_begin_index(0)
            for t in pipe.scheduler.timesteps:
                before = handle.report().forwards if handle and handle._latest else 0
                start = time.perf_counter()
                y = pipe.unet(x, t, return_dict=False)[0]
                seconds = time.perf_counter() - start
                kind = "plain" if handle is None else ("real" if handle.report().forwards != before else "skip")
                spent[kind].append(seconds)
                pipe.scheduler.step(y, t, x)
        if handle:
            handle.remove()
    plain = statistics.median(spent["plain"])
    return {"real": statistics.median(spent["real"]) - plain, "skip": statistics.median(spent["skip"])}


def unet_seconds() -> float:
    """Seconds of one call of a UNet of the size of SD 1.5, float32, after one to warm up; the faster of two."""
    model = diffusers.UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
    ).eval()
    x, text = torch.randn(1, 4, 64, 64), torch.randn(1, 77, 768)
    found = []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            model(x, 500, text)
            found.append(time.perf_counter() - start)
    return min(found[1:])


def time_part(unet: bool) -> dict[str, Any]:
    """Overheads of the hook and of the preset."""
    vp = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
    found: dict[str, Any] = {"TableScheduler": hook_seconds(lambda: TableScheduler(**vp, sampler="ddim"))}
    found["EulerDiscreteScheduler"] = hook_seconds(lambda: diffusers.EulerDiscreteScheduler(**vp))
    if unet:
        found["unet"] = unet_seconds()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(GRIDS))
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--calls", type=int, nargs="+", default=list(CALLS))
    parser.add_argument("--zeus", type=Path, help="a checkout of ZEUS")
    parser.add_argument("--no-unet", action="store_true", help="leave out the real-size UNet (3.5 GB, a minute)")
    parser.add_argument("--out", type=Path, help="folder for fsampler.json and .md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    command = f"python benchmarks/bench_fsampler.py --images {args.images}" + (" --zeus ZEUS" if args.zeus else "")
    full: dict[str, Any] = {"command": command, "diffusers": diffusers.__version__, "torch": torch.__version__}
    full["teacher_calls"] = TEACHER_CALLS
    full["time"] = time_part(not args.no_unet)
    full["mixtures"] = mixture_part()
    full["models"] = {n: model_part(n, args.images, tuple(args.calls), args.zeus) for n in args.models}
    text = markdown(full)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "fsampler.json").write_text(json.dumps(full))
        (args.out / "fsampler.md").write_text(text)


if __name__ == "__main__":
    main()
