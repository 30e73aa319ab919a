"""Quantisation and caches against plain runs of equal seconds, diffusers' caches, cache-dit and torchao alone.

    python benchmarks/bench_quant_cache.py --out docs/results [--images 12] [--steps 20] [--rounds 1] [--no-wide]

Embedded models: end to end, error to the run with all steps. A DiT of real width (random weights): time and error of
the output only, eager and compiled. Every time is CPU seconds of
the one thread, relative to full runs of the same round. cache-dit takes part where it
is installed (`pip install cache-dit`); a peer that cannot run is listed with its error.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import quant_cache_peers as peers
import torch
import torchao
from quant_cache_page import markdown
from quant_cache_wide import wide

import diffaccel as da
from diffaccel import calibrate, models
from diffaccel.calibrate.validate import STOCK, errors, verdict
from diffaccel.compare import job_for, stock
from diffaccel.denoiser.cache import Cache

SEED = 700  # of the images; calibration has others
GUIDANCE = 4.0
PLAIN = (0.25, 0.3, 0.36, 0.43, 0.5, 0.57, 0.64, 0.72, 0.8, 0.9)  # shares of the steps, for the curve of plain runs
STOCK_AT = (0.36, 0.5, 0.64)
LEARNED = (0.4,)


@dataclass
class Row:
    """One way to run.

    Attributes:
        name, kind: for the table; kind is "plain", "stock", "peer" or "ours".
        wrap: pipeline -> context manager around the call.
        steps: of the run.
        scheduler: makes another scheduler from the config, or None; `ramp`: it needs explicit sigmas.
        seconds: relative to full runs of the same round.
    """

    name: str
    kind: str
    wrap: Callable[[Any], Any]
    steps: int
    scheduler: Callable[[Any], Any] | None = None
    ramp: bool = False
    seconds: list[float] = field(default_factory=list)
    latents: torch.Tensor | None = None
    full: int | None = None
    failed: str = ""


def nothing(pipe: Any) -> Any:
    return contextlib.nullcontext()


def ours(**settings: Any) -> Callable[[Any], Any]:
    return lambda pipe: da.quant_cache(pipe, **settings)


# ---------------------------------------------------------------------- one model
def rows_of(name: str, pipe: Any, steps: int, art: Any, call: Callable[..., Any]) -> list[Row]:
    """All rows of a model."""
    made = [Row(f"{n} steps", "plain", nothing, n) for n in sorted({round(s * steps) for s in PLAIN})]
    for n in sorted({round(s * steps) for s in STOCK_AT}):
        for candidate in (c for c in stock(pipe.scheduler.config) if c.name in STOCK):
            own = candidate.steps(n)
            if own is not None:
                made.append(Row(f"{candidate.name}, {n} calls", "stock", nothing, own, candidate.make, candidate.ramp))
    caches = [Cache.every(n, forecast=m) for n in (2, 3, 4) for m in (0, 1, 2)]
    caches += [Cache.every(3, 1, 0, forecast=0)]  # FORA, DeepCache
    made += [Row(f"{c.name}, forecast {c.forecast}", "ours", ours(cache=c), steps) for c in caches]
    for t in (0.05, 0.1, 0.2):
        for m in (0, 1):
            cache = Cache.first_block(t, forecast=m)
            made.append(Row(f"{cache.name}, forecast {m}", "ours", ours(cache=cache), steps))
    for run in art.meta["runs"]:
        kept = "with" if run["compensated"] else "without (no benefit of)"
        cache = Cache.from_dict(run["cache"])
        label = f"learned mask, {run['full']} full" if run["learned"] else cache.name
        made.append(Row(f"{label}, forecast 1, {kept} VC", "ours", ours(cache=cache, artifact=art), steps))
    if name != "tiny-flow":
        return made
    made += [Row(f"FirstBlockCache {t}", "peer", peers.first_block(t), steps) for t in (0.05, 0.1, 0.2)]
    made += [
        Row(f"TaylorSeer {n}, order {m}", "peer", peers.taylor_seer(n, m), steps) for n in (2, 3, 4) for m in (0, 1)
    ]
    made += [Row(f"PAB {n}", "peer", peers.pyramid(n), steps) for n in (2, 3)]
    made.append(Row("FasterCache", "peer", peers.faster(), steps))
    ratios = peers.mag_ratios(pipe, steps, lambda: call(steps))
    made += [Row(f"MagCache {t}, calibrated", "peer", peers.mag(t, steps, ratios), steps) for t in (0.03, 0.06, 0.2)]
    for t in (0.05, 0.1, 0.2):
        made.append(Row(f"cache-dit DBCache F1 {t}", "peer", peers.cache_dit_peer(t, steps, False), steps))
    made.append(Row("cache-dit DBCache F1 0.1 + TaylorSeer", "peer", peers.cache_dit_peer(0.1, steps, True), steps))
    return made


def model(name: str, images: int, steps: int, rounds: int) -> dict[str, Any]:
    """Every row of an embedded model."""
    pipe = models.load(name)
    pipe.set_progress_bar_config(disable=True)
    extra = models.CALL_DEFAULTS.get(name, {})
    start = time.perf_counter()
    budgets = tuple(sorted({round(s * steps) for s in LEARNED}))
    art = calibrate.cache(pipe, models.prompts(256), calls=steps, full=budgets, guidance=GUIDANCE, images=4, select=4,
                          fit=16, held_out=16, call=extra, progress=False)  # fmt: skip
    spent = time.perf_counter() - start
    job = job_for(pipe, name, images, SEED, guidance=GUIDANCE)
    own = pipe.scheduler

    def call(n: int, **more: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = pipe(
                **job.inputs, **more, latents=job.latents.clone(), num_inference_steps=n, output_type="latent"
            ).images
        return found.float()

    full = Row(f"{steps} steps", "full", nothing, steps)
    rows = rows_of(name, pipe, steps, art, call)
    for _ in range(rounds):
        timed_round(pipe, own, call, full, rows)
    reference = full.latents
    assert reference is not None
    print(f"{name}: {len(rows)} rows, {sum(bool(r.failed) for r in rows)} failed", flush=True)
    return {
        "model": name,
        "steps": steps,
        "images": images,
        "guidance": GUIDANCE,
        "calibration": {"seconds": spent, "calls": art.meta["cost"]["calls"], "receipt": dict(art.receipt)},
        "rows": told(pipe, rows, reference),
    }


def timed_round(pipe: Any, own: Any, call: Callable[..., Any], full: Row, rows: Sequence[Row]) -> None:
    """Run every row once, a full run before each five of them."""
    before = 0.0
    for i, row in enumerate(rows):
        if i % 5 == 0:
            before = timed(pipe, own, call, full)
        if not row.failed:
            try:
                row.seconds.append(timed(pipe, own, call, row) / before)
            except Exception as error:  # a peer that does not run here is a result
                if row.kind == "ours":
                    raise
                row.failed = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
                pipe.scheduler = own


def timed(pipe: Any, own: Any, call: Callable[..., Any], row: Row) -> float:
    """Seconds of the call alone; what it made is kept."""
    pipe.scheduler = own if row.scheduler is None else row.scheduler(own.config)
    ramp = {"sigmas": np.linspace(1.0, 1 / row.steps, row.steps).tolist()} if row.ramp else {}
    try:
        with row.wrap(pipe) as handle:
            start = time.process_time()
            row.latents = call(row.steps, **ramp)
            seconds = time.process_time() - start
            if row.kind == "ours":
                counts = handle.report().cache.full
                row.full = round(statistics.mean(n for branch in counts.values() for n in branch))
    finally:
        if pipe.scheduler is not own and row.scheduler is not None:
            pipe.scheduler = own
    return seconds


# ---------------------------------------------------------------------- judged
def told(pipe: Any, rows: Sequence[Row], reference: torch.Tensor) -> list[dict[str, Any]]:
    """JSON of the rows: errors, and the plain run that takes as long or longer."""
    target, pictures = reference.double().numpy(), decoded(pipe, reference)
    plain = sorted((r for r in rows if r.kind == "plain"), key=lambda r: r.steps)
    made = []
    for row in rows:
        entry: dict[str, Any] = {"name": row.name, "kind": row.kind, "steps": row.steps, "full": row.full}
        made.append(entry)
        if row.failed or row.latents is None:
            entry["failed"] = row.failed
            continue
        e = errors(row.latents.double().numpy(), target)
        entry |= {
            "time": statistics.median(row.seconds),
            "error": float(np.nan_to_num(e, nan=1e30).mean()),
            "psnr": psnr(decoded(pipe, row.latents), pictures),
        }
        if row.kind in ("ours", "peer"):
            rival = next((r for r in plain if statistics.median(r.seconds) >= entry["time"]), None)
            if rival is not None and rival.latents is not None:
                found = verdict(errors(rival.latents.double().numpy(), target), e)
                worse = found.low > 0
                entry |= {
                    "plain": rival.name,
                    "plain error": found.parent,
                    "verdict": "beats plain" if found.helps else "plain is better" if worse else "no difference",
                }
    best: dict[int, dict[str, Any]] = {}
    for entry in made:
        if entry["kind"] == "stock" and "error" in entry:
            n = int(entry["name"].rsplit(", ", 1)[1].split()[0])
            if n not in best or entry["error"] < best[n]["error"]:
                best[n] = entry
    return [entry for entry in made if entry["kind"] != "stock" or entry in best.values()]


def decoded(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1]."""
    config = pipe.vae.config
    with torch.no_grad():
        z = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        image: torch.Tensor = pipe.vae.decode(z.to(pipe.vae.dtype)).sample
    return (image.float() / 2 + 0.5).clamp(0, 1)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over images, dB."""
    mse = (a - b).square().flatten(1).mean(1).clamp_min(1e-12)
    return float((-10 * torch.log10(mse)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--no-wide", action="store_true", help="leave out the transformer of real width")
    parser.add_argument("--no-embedded", action="store_true", help="the transformer of real width alone")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    names = () if args.no_embedded else ("tiny-sd", "tiny-flow")
    result: dict[str, Any] = {
        "embedded": [],
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__, "torchao": torchao.__version__},
    }
    with contextlib.suppress(ImportError):
        import cache_dit

        result["versions"]["cache-dit"] = cache_dit.__version__
    args.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        result["embedded"].append(model(name, args.images, args.steps, args.rounds))
        write(args.out, result)
    if not args.no_wide:
        result["wide"] = wide()
        write(args.out, result)
    print(f"wrote {args.out / 'quant_cache.md'}")


def write(out: Path, result: dict[str, Any]) -> None:
    """What is there so far."""
    (out / "quant_cache.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "quant_cache.md").write_text(markdown(result))


if __name__ == "__main__":
    main()
