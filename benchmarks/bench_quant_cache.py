"""Quantisation and caches against plain runs of equal seconds, diffusers' caches, cache-dit and torchao alone.

    python benchmarks/bench_quant_cache.py --out docs/results --jobs 2    # the whole page; 25 minutes on two cores
    python benchmarks/bench_quant_cache.py --out check --images 32 --sections tiny-sd

Embedded models: end to end, error to the run with all steps, FID, memory. A DiT of real width (random weights): time
and error of the output only, eager and compiled. Each section runs in a process of its own with one thread; every time
is CPU seconds, relative to full runs of the same round. What is finished stays in `--work`, where the same command goes
on after a stop. cache-dit takes part where it is installed (`pip install cache-dit`); a peer that cannot run is listed
with its error.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from quant_cache_page import markdown

SECTIONS = ("tiny-flow", "tiny-sd", "wide")  # the longest first
PACKAGES = ("torch", "diffusers", "torchao", "cache-dit")


def section(name: str, args: argparse.Namespace, work: Path) -> None:
    """Measure a section in this process, and leave its JSON in the working folder."""
    import diffusers
    import torch

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    if name == "wide":
        from quant_cache_wide import wide

        found = wide()
    else:
        from quant_cache_embedded import model

        found = model(name, args.images, args.steps, args.rounds, work / name)
    (work / f"{name}.json").write_text(json.dumps(found))


def started(name: str, args: argparse.Namespace, work: Path) -> str:
    """A section in a process of its own, if it is not there yet; what went wrong, or ""."""
    if not (work / f"{name}.json").exists():
        own = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        code = subprocess.run([sys.executable, *sys.argv, "--only", name], env={**os.environ, **own}, check=False)
        if code.returncode:
            return f"{name} ended with code {code.returncode}"
    write(args.out, work)
    return ""


def write(out: Path, work: Path) -> None:
    """The page of the sections that are there."""
    found = {n: json.loads((work / f"{n}.json").read_text()) for n in SECTIONS if (work / f"{n}.json").exists()}
    result: dict[str, Any] = {"versions": {}, "embedded": [found[n] for n in ("tiny-sd", "tiny-flow") if n in found]}
    for package in PACKAGES:
        try:
            result["versions"][package] = version(package)
        except PackageNotFoundError:
            result["versions"][package] = "absent"
    result |= {"wide": found["wide"]} if "wide" in found else {}
    out.mkdir(parents=True, exist_ok=True)
    (out / "quant_cache.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "quant_cache.md").write_text(markdown(result))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, default=Path("quant-cache-work"))
    parser.add_argument("--images", type=int, default=128, help="of each row, in batches of 32 (default 128)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="sections at a time, one core each")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--only", choices=SECTIONS, help=argparse.SUPPRESS)  # a section in this very process
    args = parser.parse_args()
    work = args.work / f"{args.images}-{args.steps}-{args.rounds}"  # rows of other settings do not mix
    work.mkdir(parents=True, exist_ok=True)
    if args.only:
        section(args.only, args, work)
        return 0
    with ThreadPoolExecutor(args.jobs) as pool:
        failed = [text for text in pool.map(lambda name: started(name, args, work), args.sections) if text]
    print("\n".join(failed) or f"wrote {args.out / 'quant_cache.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
