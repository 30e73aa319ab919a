"""Runs ZEUS (github.com/Ting-Justin-Jiang/ZEUS) from a checkout, on the CPU; nothing of it is in this repository."""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import io
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import diffusers
import torch

from diffaccel import compare

FIRST, DENOMINATOR, SKIPPED = 3, 3, (0, 1)  # ZEUS's own sparsity: two of three steps, from the fourth on


def calls_of(steps: int) -> int:
    """Model calls of a run of so many steps; checked against what the model sees."""
    return steps - sum(i % DENOMINATOR in SKIPPED for i in range(FIRST, steps - 2))


def steps_for(calls: int) -> int | None:
    """The largest number of steps with exactly so many calls."""
    return max((n for n in range(calls, 4 * calls) if calls_of(n) == calls), default=None)


@functools.cache
def patch_module(folder: Path) -> Any:
    """`zeus.patch`, from a copy of the checkout in which "cuda" reads "cpu"."""
    copy = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, copy, True)
    shutil.copytree(folder / "zeus", copy / "zeus")
    for file in (copy / "zeus").glob("*.py"):
        file.write_text(file.read_text().replace("'cuda'", "'cpu'").replace('"cuda"', '"cpu"'))
    sys.path.insert(0, str(copy))
    return importlib.import_module("zeus.patch")


def run(pipe: Any, kind: str | None, calls: int, job: compare.Job, folder: Path) -> tuple[compare.Outcome, int]:
    """One run of a fresh pipeline under ZEUS (it changes the classes of model and scheduler for good).

    Args:
        kind: a scheduler class of diffusers, None for the pipeline's own.

    Raises:
        ValueError: if no number of steps makes so many calls.
    """
    steps = steps_for(calls)
    if steps is None:
        raise ValueError(f"no number of steps makes {calls} calls")
    if kind is not None:
        pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config)
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    count = [0]
    first = model.conv_in if hasattr(model, "conv_in") else model.pos_embed
    first.register_forward_pre_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        patch_module(folder).apply_patch(
            pipe, acc_range=(FIRST, steps - 2), interp_mode="psi", caching_mode="reuse_interp", denominator=DENOMINATOR,
            modular=SKIPPED,
        )  # fmt: skip
        start = time.perf_counter()
        latents = pipe(
            **job.inputs, latents=job.latents.clone(), num_inference_steps=steps, output_type="latent"
        ).images
        seconds = time.perf_counter() - start
    if count[0] != calls:
        raise ValueError(f"{steps} steps made {count[0]} calls, not {calls}")
    return compare.Outcome(latents.float(), count[0], seconds), steps
