"""`diffaccel demo`: the main job, on a really trained pipeline that ships in the wheel."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image, ImageDraw

from . import compare, models
from .artifact import Artifact
from .compare import Candidate, Job, Outcome
from .schedulers import FittedScheduler

# For 8 calls, chosen by benchmarks/bench_error.py on its seed for choosing, not on the demo's.
CHOICE: dict[str, dict[str, Any]] = {
    "tiny-sd": {"sampler": "deis", "order": 2, "grid": "karras", "grid_options": {"rho": 4.0}},
    "tiny-flow": {"sampler": "ghvb", "order": 1.8, "grid": "mid", "grid_options": {"w": 0.3}},
    "tiny-pixel": {"sampler": "unipc", "order": 2, "grid": "uniform_lambda"},
}
TEACHER_CALLS = 200
STOCK_CALLS = 50


def demo(
    name: str = "tiny-sd", *, calls: int = 8, images: int = 16, guidance: float = 4.0, out: str = "demo", seed: int = 0
) -> dict[str, Any]:
    """Compare schedulers from the same noise; print the table, write `report.json` and `grid.png` to `out`.

    Rows: the pipeline's own scheduler at 50 calls and at `calls`, every deterministic scheduler of diffusers at
    `calls` (the best of them is shown; it is picked on these very images, which favours it), ours at `calls`, and the
    table that was fitted to this checkpoint on other prompts and noise, where one ships for these calls.

    Args:
        name: an embedded model.
        calls: the budget of model calls.
        images: how many, 2 or more (each has its own prompt and noise).
        guidance: classifier-free guidance scale ("tiny-pixel" has none).
        out: folder to write to.
        seed: of prompts and noise.

    Returns:
        What `report.json` holds.
    """
    diffusers.utils.logging.set_verbosity_error()  # the rivals' own warnings, 83 settings of them
    pipe = models.load(name)
    pipe.set_progress_bar_config(disable=True)
    job = compare.job_for(pipe, name, images, seed, guidance=guidance)
    config = pipe.scheduler.config
    own = Candidate(
        f"{type(pipe.scheduler).__name__} (as shipped)", True, lambda c: type(pipe.scheduler).from_config(c)
    )
    mine = compare.ours(**CHOICE[name])
    print(f"{name}: {images} images, each with its own prompt and noise; guidance {guidance:g}")
    target = compare.run(pipe, compare.teacher(config), TEACHER_CALLS, job)
    half = compare.run(pipe, compare.teacher(config), TEACHER_CALLS // 2, job)
    if target is None or half is None:
        raise RuntimeError("the teacher cannot spend its calls")
    rivals = _outcomes(pipe, compare.stock(config), calls, job)
    best = min(rivals, key=lambda e: float(compare.errors(e[1], target).median()))
    shown = [
        (own, STOCK_CALLS, compare.run(pipe, own, STOCK_CALLS, job)),
        (own, calls, compare.run(pipe, own, calls, job)),
        (best[0], calls, best[1]),
        (mine, calls, compare.run(pipe, mine, calls, job)),
    ]
    table = _fitted(name, calls)
    if table is not None:
        shown.append((table, calls, compare.run(pipe, table, calls, job)))
    rows = [_row(c, o, target) for c, _, o in shown if o is not None]
    gap = float(compare.errors(half, target).median())
    _print(rows, gap, len(rivals), images)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "model": name, "images": images, "seed": seed, "guidance": guidance, "rows": rows, "rivals": len(rivals),
        "teacher": {"scheduler": compare.teacher(config).name, "calls": TEACHER_CALLS, "gap_to_half": gap},
        "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    pictures = [_pictures(pipe, o) for _, _, o in shown if o is not None] + [_pictures(pipe, target)]
    titles = [f"{r['calls']} calls: {r['scheduler']}" for r in rows] + [f"{TEACHER_CALLS} calls: teacher"]
    _grid(pictures, titles, folder / "grid.png")
    print(f"wrote {folder / 'report.json'} and {folder / 'grid.png'}")
    return report


def _fitted(name: str, calls: int) -> Candidate | None:
    """`FittedScheduler` with the table that ships for an embedded model; None if there is none for these calls."""
    try:
        artifact = Artifact.load(models.fitted(name))
    except ValueError:
        return None
    if calls not in artifact.meta["calls"]:
        return None
    spent = f"fitted in {artifact.meta['cost']['calls']} calls on other prompts and noise"
    return Candidate(
        f"diffaccel fitted ({spent})", False, lambda config: FittedScheduler.from_config(config, artifact=artifact)
    )


def _outcomes(pipe: Any, candidates: Sequence[Candidate], calls: int, job: Job) -> list[tuple[Candidate, Outcome]]:
    """Every candidate that can spend exactly these calls and does not fail."""
    found = []
    for candidate in candidates:
        try:
            outcome = compare.run(pipe, candidate, calls, job)
        except (ImportError, ValueError, IndexError) as error:  # a stock scheduler that lacks scipy, or breaks here
            print(f"  left out: {candidate.name}: {type(error).__name__}: {str(error).splitlines()[0][:80]}")
            continue
        if outcome is not None:
            found.append((candidate, outcome))
    return found


def _row(candidate: Candidate, outcome: Outcome, target: Outcome) -> dict[str, Any]:
    e = compare.errors(outcome, target)
    return {
        "scheduler": candidate.name,
        "stock": candidate.stock,
        "calls": outcome.calls,
        "seconds": outcome.seconds,
        "median_error": float(e.median()),
        "rms_error": float(e.square().mean().sqrt()),
        "worst_error": float(e.max()),
    }


def _print(rows: Sequence[dict[str, Any]], gap: float, rivals: int, images: int) -> None:
    wide = max(len(r["scheduler"]) for r in rows)
    print(f"\n{'scheduler':{wide}}  calls  seconds  error: median     rms   worst")
    for r in rows:
        print(
            f"{r['scheduler']:{wide}}  {r['calls']:5d}  {r['seconds']:7.2f}  {r['median_error']:13.4f} "
            f"{r['rms_error']:7.4f} {r['worst_error']:7.4f}"
        )
    print(
        f"\nerror: |z - z*|/|z*| of the final latents to a teacher of {TEACHER_CALLS} calls, {images} seeds "
        f"(the teacher with half its calls: {gap:.4f}).\n"
        f"Row 3 is the best of {rivals} settings of diffusers' schedulers, picked on these images."
    )
    stock = rows[2]["median_error"]
    for row in rows[3:]:
        mine = row["median_error"]
        if mine < stock:
            text = f"{stock / mine:.2f} times nearer to the teacher than row 3 (medians)"
        else:
            text = f"no benefit found: row 3 is {mine / stock:.2f} times nearer"
        print(f"{row['scheduler']}: {text}.")


def _pictures(pipe: Any, outcome: Outcome) -> np.ndarray:
    """(B, H, W, 3) uint8, by the pipeline's own VAE."""
    z = outcome.latents
    if getattr(pipe, "vae", None) is not None:
        c = pipe.vae.config
        with torch.no_grad():
            z = pipe.vae.decode(z / c.scaling_factor + (c.shift_factor or 0.0)).sample
    pixels = ((z / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1)
    return pixels.expand(*pixels.shape[:-1], 3).numpy()


def _grid(pictures: Sequence[np.ndarray], titles: Sequence[str], file: Path, zoom: int = 2, most: int = 16) -> None:
    """Rows = schedulers, columns = the same seeds."""
    size = pictures[0].shape[1] * zoom
    text = 16
    sheet = Image.new("RGB", (size * min(most, len(pictures[0])), (size + text) * len(pictures)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (row, title) in enumerate(zip(pictures, titles, strict=True)):
        draw.text((4, i * (size + text) + 2), title, fill="black")
        for j, pixels in enumerate(row[:most]):
            tile = Image.fromarray(pixels).resize((size, size), Image.Resampling.NEAREST)
            sheet.paste(tile, (j * size, i * (size + text) + text))
    sheet.save(file)
