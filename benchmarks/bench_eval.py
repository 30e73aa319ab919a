"""FID arithmetic against scipy's matrix square root and torchmetrics' eigenvalues: ratios within one run, one thread.

    python benchmarks/bench_eval.py [--width 768] [--rounds 2] [--out docs/results/eval_speed.json]

Random features with a falling spectrum. Seconds are CPU seconds of the one thread, the fastest of the rounds, which are
interleaved so that all methods see the same machine. Errors are against the value from features, which is exact to
1e-15 (tests/parity).
--width 2048 is Inception's; the ratios grow with it.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torchmetrics.image.fid import _compute_fid

from diffaccel.eval import fid, frechet, stats_file

SWEEP = 8  # rows that share one reference


def samples(n: int, d: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return (rng.standard_normal((n, d)) * np.arange(1, d + 1) ** -0.5 + 0.1 * seed) @ mix


def sqrtm(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    """As in pytorch-fid and clean-fid."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # singular matrices
        root = scipy.linalg.sqrtm(a[1] @ b[1]).real
    return float(((a[0] - b[0]) ** 2).sum() + np.trace(a[1]) + np.trace(b[1]) - 2 * np.trace(root))


def eigenvalues(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> float:
    """As in torchmetrics and torch-fidelity."""
    return float(_compute_fid(*(torch.from_numpy(x) for x in (*a, *b))))


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0), np.cov(x.T)


def best(methods: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Fastest CPU seconds and the value of each method."""
    seconds, values = dict.fromkeys(methods, float("inf")), {}
    for _ in range(rounds):
        for name, method in methods.items():
            start = time.process_time()
            values[name] = method()
            seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds, values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--images", type=int, default=0, help="few images (default: half the width)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out")
    args = parser.parse_args()
    torch.set_num_threads(1)
    d = args.width
    few = samples(args.images or d // 2, d, 0)
    many, reference = samples(3 * d, d, 0), samples(3 * d, d, 1)
    of_many, of_reference = moments(many), moments(reference)
    report: dict[str, Any] = {"width": d, "few": len(few), "many": len(many), "rounds": args.rounds, "threads": 1}

    def show(title: str, methods: dict[str, Callable[[], Any]], truth: float | None = None) -> None:
        seconds, values = best(methods, args.rounds)
        first = next(iter(seconds))
        print(
            f"{title}\n"
            + "".join(
                f"  {k:46s} {v:8.3f} s  {v / seconds[first]:6.2f}x"
                + (f"  error {abs(values[k] - truth) / truth:.0e}\n" if truth is not None else "\n")
                for k, v in seconds.items()
            )
        )
        report[title] = {
            k: {"seconds": v, "ratio": v / seconds[first]}
            | ({"error": abs(values[k] - truth) / truth} if truth is not None else {})
            for k, v in seconds.items()
        }

    show(
        f"FID from statistics, {len(many)} images",
        {
            "diffaccel, nuclear norm": lambda: frechet.fid(
                frechet.from_moments(*of_many), frechet.from_moments(*of_reference)
            ),
            "torchmetrics, eigenvalues": lambda: eigenvalues(of_many, of_reference),
            "scipy sqrtm": lambda: sqrtm(of_many, of_reference),
        },
        frechet.fid(many, reference),
    )
    known = frechet.from_features(reference[: len(few)])
    of_known = moments(reference[: len(few)])
    show(
        f"FID from {len(few)} features (fewer than the width)",
        {
            "diffaccel, QR and singular values": lambda: frechet.fid(few, known),
            "torchmetrics, eigenvalues": lambda: eigenvalues(moments(few), of_known),
            "scipy sqrtm": lambda: sqrtm(moments(few), of_known),
        },
        frechet.fid(few, known),
    )
    ready = stats_file.Stats("reference", "x", len(reference), moments=of_reference)
    _ = ready.gaussian
    show(
        f"Correction and interval, {len(few)} features against statistics",
        {
            "plain FID": lambda: frechet.fid(few, ready.gaussian),
            "with interval": lambda: fid(few, ready, features="x", paper=True),
            "with interval and correction": lambda: fid(few, ready, features="x"),
        },
    )
    rows = [few + 0.01 * i for i in range(SWEEP)]
    show(
        f"A sweep of {SWEEP} rows against one reference",
        {
            "reference factor computed once": lambda: [
                frechet.fid(x, s.gaussian) for s in [_fresh(of_reference)] for x in rows
            ],
            "computed for every row": lambda: [frechet.fid(x, _fresh(of_reference).gaussian) for x in rows],
        },
    )
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _fresh(m: tuple[np.ndarray, np.ndarray]) -> stats_file.Stats:
    return stats_file.Stats("reference", "x", None, moments=m)


if __name__ == "__main__":
    main()
