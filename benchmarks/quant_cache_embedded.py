"""The part of bench_quant_cache.py on the embedded models: runs, errors, FID, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import quant_cache_memory as memory
import torch
from quant_cache_rows import COMPILED, QUANT, Row, rows_of

from diffaccel import calibrate, models
from diffaccel.artifact import Artifact
from diffaccel.calibrate.validate import errors, verdict
from diffaccel.compare import job_for
from diffaccel.denoiser.cache import Cache
from diffaccel.eval import fid, fid_difference

SEED, GUIDANCE, BATCH = 700, 4.0, 32  # calibration has other images
LEARNED = (0.4,)  # full steps of learned masks
WARM = 9  # steps of the run that compiles
FASHION = "tiny-fashion"


class Model:
    """An embedded model under test.

    Args:
        name: of the model.
        images, steps: of each row.
        work: where finished rows and artifacts are kept.
    """

    def __init__(self, name: str, images: int, steps: int, work: Path) -> None:
        self.name, self.steps, self.work = name, steps, work
        self.pipe: Any = models.load(name)
        self.pipe.set_progress_bar_config(disable=True)
        self.own = self.pipe.scheduler
        job = job_for(self.pipe, name, images, SEED, guidance=GUIDANCE)
        self.inputs, self.latents = job.inputs, job.latents
        work.mkdir(parents=True, exist_ok=True)

    # ------------------------------------------------------------------ calibration
    def artifact(self, file: str, **options: Any) -> Artifact:
        """A calibration, made or found."""
        path = self.work / file
        if path.exists():
            return Artifact.load(path, "cache")
        return calibrate.cache(
            self.pipe, models.prompts(256), calls=self.steps, guidance=GUIDANCE, out=path, progress=False,
            call=models.CALL_DEFAULTS.get(self.name), **options,
        )  # fmt: skip

    # ------------------------------------------------------------------ runs
    def call(self, steps: int, first: int = 0, **more: Any) -> torch.Tensor:
        """Last latents of a batch."""
        last = first + BATCH
        given = {k: v[first:last] if isinstance(v, list) else v for k, v in self.inputs.items()}
        with torch.no_grad():
            found: torch.Tensor = self.pipe(
                **given, **more, latents=self.latents[first:last].clone(), num_inference_steps=steps,
                output_type="latent",
            ).images  # fmt: skip
        return found.float()

    def timed(self, row: Row) -> float:
        """CPU seconds of a row's calls alone; what they made is kept."""
        self.pipe.scheduler = self.own if row.scheduler is None else row.scheduler(self.own.config)
        ramp = {"sigmas": np.linspace(1.0, 1 / row.steps, row.steps).tolist()} if row.ramp else {}
        try:
            with row.wrap(self.pipe) as handle:
                if row.compiled:
                    self.call(WARM)
                before = memory.from_here()
                start = time.process_time()
                made = [self.call(row.steps, first, **ramp) for first in range(0, len(self.latents), BATCH)]
                seconds = time.process_time() - start
                row.peak = memory.since(before)
                row.latents = torch.cat(made)
                if row.kind == "ours":
                    report = handle.report().cache  # of the last batch
                    row.full = statistics.mean(n for branch in report.full.values() for n in branch)
                    row.kept = report.bytes / 2**20
        finally:
            if row.scheduler is not None:
                self.pipe.scheduler = self.own
        return seconds

    def measure(self, rows: Sequence[Row], full: Row, rounds: int) -> None:
        """Run every row that is not there yet, a full run before each five of them in each round."""
        for number in range(rounds):
            before = 0.0
            for i, row in enumerate([full, *rows]):
                file = self.work / f"{i:03d}-{number}.pt"
                if file.exists():
                    vars(row).update(torch.load(file, weights_only=True))
                    continue
                if not before:
                    self.call(self.steps)  # the first run of a process is slow
                if not before or i % 5 == 1:
                    before = self.timed(Row(full.name, "full", full.steps))
                if not row.failed:
                    self.once(row, before)
                torch.save(row.result(), file)
                print(f"{self.name}: {row.name}: {row.failed or f'{row.seconds[-1]:.3f}'}", flush=True)

    def once(self, row: Row, before: float) -> None:
        try:
            row.seconds.append(self.timed(row) / before)
        except Exception as error:  # a peer that does not run here is a result
            if row.kind == "ours":
                raise
            row.failed = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
            self.pipe.scheduler = self.own

    def decoded(self, latents: torch.Tensor) -> torch.Tensor:
        """Images in [0, 1]."""
        config, vae = self.pipe.vae.config, self.pipe.vae
        shift = getattr(config, "shift_factor", None) or 0.0
        with torch.no_grad():
            parts = [vae.decode((z / config.scaling_factor + shift).to(vae.dtype)).sample for z in latents.split(BATCH)]
        return (torch.cat(parts).float() / 2 + 0.5).clamp(0, 1)


def model(name: str, images: int, steps: int, rounds: int, work: Path) -> dict[str, Any]:
    """Every row of an embedded model."""
    one = Model(name, images, steps, work)
    budgets = tuple(sorted({round(s * steps) for s in LEARNED}))
    made = one.artifact("cache.safetensors", full=budgets, images=4, select=4, fit=16, held_out=16)
    int8 = one.artifact("cache_w8a8.safetensors", full=(), cache=Cache.every(3, forecast=1), quant=QUANT, thresholds=(),
                        images=1, select=1, fit=16, held_out=16)  # fmt: skip
    rows, full = rows_of(name, one.pipe, steps, made, int8, one.call), Row(f"{steps} steps", "full", steps)
    one.measure(rows, full, rounds)
    return {
        "model": name, "steps": steps, "images": images, "guidance": GUIDANCE,
        "calibration": {**made.meta["cost"], "receipt": dict(made.receipt)},
        "calibration in W8A8": {**int8.meta["cost"], "receipt": dict(int8.receipt)},
        "rows": told(one, rows, full),
    }  # fmt: skip


# ---------------------------------------------------------------------- judged
def told(one: Model, rows: Sequence[Row], full: Row) -> list[dict[str, Any]]:
    """JSON of the rows: errors, FID, and the plain run that takes as long or longer."""
    reference = full.latents
    assert reference is not None
    target, pictures = reference.double().numpy(), one.decoded(reference)
    net = models.features()
    base = seen(net, pictures)
    plain = sorted((r for r in rows if r.kind == "plain"), key=lambda r: r.steps)
    alone = next(r for r in rows if r.name == COMPILED)
    made = []
    for row in [full, *rows]:
        entry: dict[str, Any] = {"name": row.name, "kind": row.kind, "steps": row.steps, "full": row.full}
        made.append(entry)
        if row.failed or row.latents is None:
            entry["failed"] = row.failed
            continue
        e, images = errors(row.latents.double().numpy(), target), one.decoded(row.latents)
        entry |= {
            "time": statistics.median(row.seconds), "error": float(np.nan_to_num(e, nan=1e30).mean()),
            "psnr": psnr(images, pictures), "peak": row.peak, "kept": row.kept, **distance(seen(net, images), base),
        }  # fmt: skip
        # plain steps could be compiled, too
        faster = min(1.0, statistics.median(alone.seconds)) if row.compiled and alone.seconds else 1.0
        rival = next((r for r in plain if faster * statistics.median(r.seconds) >= entry["time"]), None)
        if row.kind in ("ours", "peer") and rival is not None and rival.latents is not None:
            found = verdict(errors(rival.latents.double().numpy(), target), e)
            entry |= {"plain": rival.name, "plain error": found.parent, "verdict": worded(found)}
    best: dict[int, dict[str, Any]] = {}
    for entry in made:
        if entry["kind"] == "stock" and "error" in entry:
            n = int(entry["name"].rsplit(", ", 1)[1].split()[0])
            if n not in best or entry["error"] < best[n]["error"]:
                best[n] = entry
    return [entry for entry in made if entry["kind"] != "stock" or any(entry is b for b in best.values())]


def worded(found: Any) -> str:
    return "beats plain" if found.helps else "plain is better" if found.low > 0 else "no difference"


def seen(net: Any, images: torch.Tensor) -> np.ndarray:
    """Features of images, (n, d)."""
    with torch.no_grad():
        return np.concatenate([net((part * 255).round().to(torch.uint8)).numpy() for part in images.split(BATCH)])


def distance(features: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """FID, and its difference to the full run's with the half width of its 95 % interval."""
    if not np.isfinite(features).all():
        return {}
    change = fid_difference(features, base, FASHION, features=FASHION)
    return {
        "fid": fid(features, FASHION, features=FASHION).value,
        "fid change": change.value,
        "fid +-": 1.96 * change.se,
    }


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over images, dB."""
    mse = (a - b).square().flatten(1).mean(1).clamp_min(1e-12)
    return float((-10 * torch.log10(mse)).mean())
