"""Statistics of DPM-Solver-v3: derivatives by differences of several sizes against forward-mode differentiation.

    python benchmarks/bench_ems.py --out docs/results

Each line is one pass of an embedded model over the same trajectories, without the choice and the validation.
Writes `ems.md` and `ems.json`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from diffaccel import models
from diffaccel.calibrate.engine import Engine
from diffaccel.core.grid import finite_first
from diffaccel.schedulers import TableScheduler
from diffaccel.schedulers.settings import path_of

CASES = (("tiny-sd", 4.0), ("tiny-flow", 4.0))
DELTAS = {"float32": (0.003, 0.01, 0.03, 0.1, 0.3), "bfloat16": (0.03, 0.1, 0.3)}


def measured(engine: Engine, nodes: int, method: str, delta: float | None) -> tuple[np.ndarray, float]:
    """(l of each node and element, CPU seconds) over the engine's first batch."""
    config = TableScheduler.from_config(engine.pipe.scheduler.config).config
    path = path_of(config)
    lams = np.linspace(finite_first(path).lam, path.last.lam, nodes + 1)
    take = importlib.import_module("diffaccel.calibrate.ems")._trajectory
    start = time.process_time()
    found = take(engine, engine.batches(0, engine.batch)[0], config, lams, method, "element", delta)
    return found["l"], time.process_time() - start


def rows(name: str, guidance: float, images: int, nodes: int) -> list[dict[str, Any]]:
    """One model: root mean square distance of l to that of jvp in float32, relative to the spread of l."""
    found: list[dict[str, Any]] = []
    truth: np.ndarray | None = None
    for dtype, deltas in DELTAS.items():
        pipe = models.load(name, torch_dtype=getattr(torch, dtype))
        call = {"height": 32, "width": 32, **models.CALL_DEFAULTS.get(name, {})}
        engine = Engine(pipe, models.prompts(images, 3), guidance=guidance, call=call, batch=images, progress=False)
        for method, delta in (("jvp", None), *(("difference", d) for d in deltas)):
            l, seconds = measured(engine, nodes, method, delta)
            truth = l if truth is None else truth
            error = float(np.sqrt(np.mean((l - truth) ** 2)) / np.sqrt(np.mean(truth**2)))
            found.append({"model": name, "guidance": guidance, "dtype": dtype, "method": method, "delta": delta,
                          "error": error, "bias": float(np.mean(l - truth)), "cpu_seconds": seconds})  # fmt: skip
            print(found[-1], flush=True)
    return found


def markdown(table: list[dict[str, Any]], command: str, images: int, nodes: int) -> str:
    """The page of results."""
    lines = [
        "# Statistics of DPM-Solver-v3: derivatives",
        "",
        f"Measured by `{command}` with diffusers {diffusers.__version__}, torch {torch.__version__}: {images} guided "
        f"trajectories, {nodes + 1} levels, the same signs. Error: root mean square distance of l, before it is "
        "averaged over images, to that of forward-mode differentiation in float32, relative to the size of l. delta is "
        "in units of the state's size.",
        "",
        "| model, guidance | dtype | method | delta | error of l | mean of the error | CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in table:
        lines.append(
            f"| {r['model']}, {r['guidance']:g} | {r['dtype']} | {r['method']} | {r['delta'] or ''} | "
            f"{100 * r['error']:.2f} % | {r['bias']:+.5f} | {r['cpu_seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=12)
    parser.add_argument("--out", type=Path, help="folder for ems.json and ems.md")
    args = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    table = [row for name, guidance in CASES for row in rows(name, guidance, args.images, args.nodes)]
    command = f"python benchmarks/bench_ems.py --images {args.images} --nodes {args.nodes}"
    text = markdown(table, command, args.images, args.nodes)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "ems.json").write_text(json.dumps({"command": command, "rows": table}))
        (args.out / "ems.md").write_text(text)


if __name__ == "__main__":
    main()
