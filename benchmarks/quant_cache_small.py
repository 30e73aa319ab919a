"""The small comparisons of docs/quant_cache.md: few steps, guidance branches together or apart, bytes kept.

    python benchmarks/quant_cache_small.py

Errors: mean over images of |z - z*| / |z*| to the latents of the same scheduler's run with all steps from the same
noise. Full: model calls in full, mean over rows; a reused step costs something, too.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

import diffaccel as da
from diffaccel import models
from diffaccel.compare import job_for

SEED = 700


class Runs:
    """Runs of an embedded model beside its own run with all steps."""

    def __init__(self, name: str, images: int, steps: int, guidance: float) -> None:
        self.pipe: Any = models.load(name)
        self.pipe.set_progress_bar_config(disable=True)
        self.job, self.steps = job_for(self.pipe, name, images, SEED, guidance=guidance), steps
        self.full = self.call(self.pipe, steps)

    def call(self, run: Any, steps: int) -> torch.Tensor:
        """Last latents."""
        found: torch.Tensor = run(
            **self.job.inputs, latents=self.job.latents.clone(), num_inference_steps=steps, output_type="latent"
        ).images
        return found.flatten(1).double()

    def error(self, z: torch.Tensor) -> float:
        """To the run with all steps."""
        return float(((z - self.full).norm(dim=1) / self.full.norm(dim=1)).mean())

    def plain(self, steps: int) -> str:
        """A run with fewer steps."""
        return f"{self.error(self.call(self.pipe, steps)):.4f}"

    def cached(self, cache: da.Cache) -> str:
        """A run with a cache, and its full calls."""
        with da.quant_cache(self.pipe, cache=cache) as handle:
            error = self.error(self.call(handle, self.steps))
            rows = [row for branch in handle.report().cache.decisions.values() for row in branch]
        return f"{error:.4f} ({sum(row.count('F') for row in rows) / len(rows):.1f} full)"


def main() -> None:
    """Print everything."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("8 steps, 16 images, guidance 4")
    for name in ("tiny-sd", "tiny-flow"):
        runs = Runs(name, 16, 8, 4.0)
        print(f"  {name}: every(2) {runs.cached(da.Cache.every(2))}", end="; ")
        print("plain,", ", ".join(f"{n} steps {runs.plain(n)}" for n in (6, 7)), flush=True)
    print("30 steps, 16 images, guidance 7.5, first_block, forecast 1: guidance branches joint; separate")
    for name, thresholds in (("tiny-flow", (0.06, 0.12, 0.20, 0.30)), ("tiny-sd", (0.06, 0.12))):
        runs = Runs(name, 16, 30, 7.5)
        for threshold in thresholds:
            cells = [runs.cached(da.Cache.first_block(threshold, cfg=cfg)) for cfg in ("joint", "separate")]
            print(f"  {name}, {threshold}: {'; '.join(cells)}", flush=True)
        print(f"  {name}:", ", ".join(f"every({n}) {runs.cached(da.Cache.every(n))}" for n in (2, 3, 4)), end="")
        print("; plain,", ", ".join(f"{n} steps {runs.plain(n)}" for n in (17, 13)), flush=True)
    print("bytes kept, tiny-flow, 32 images")
    runs = Runs("tiny-flow", 32, 2, 4.0)
    for level in ("stack", "sublayer"):
        with da.quant_cache(runs.pipe, cache=da.Cache.every(3, level=level)) as handle:
            kept = handle.memory(**runs.job.inputs, latents=runs.job.latents.clone(), num_inference_steps=20)
            print(f"  {level}: {kept}", flush=True)


if __name__ == "__main__":
    main()
