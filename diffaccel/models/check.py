"""Acceptance of the trained models: does a step budget show in the metric, are the images right?

Cells (scheduler x calls x guidance) share seeds and prompts, so differences are paired. Images are kept in blocks under
OUT/check, named by the hash of the weights: a second call continues, and a larger --images extends what is there.
FID here is FID (tiny-fashion features, not Inception).
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .. import models
from ..eval import frechet
from . import data, encoders, words

GUIDANCE = 4.0
HARD_GUIDANCE = 7.5  # the default of Stable Diffusion: few calls suffer most
BLOCK = 100  # images generated together
SEED = 20_000  # image i starts from torch.Generator seed SEED + i
GRID_CALLS = (3, 5, 8, 20, 100)


@dataclass(frozen=True)
class Cell:
    """One row of the table. scheduler: 'stock' (as shipped), 'explicit' (flow: sigmas 1..1/n, none wasted), 'dpm'."""

    calls: int
    guidance: float = GUIDANCE
    scheduler: str = "stock"
    size: int = 32

    @property
    def name(self) -> str:
        return f"{self.scheduler}-{self.calls}-g{self.guidance:g}-{self.size}"


def main_cell(model: str, calls: int, size: int = 32) -> Cell:
    """The row of the criteria: guidance 4, flow Euler with explicit sigmas; `tiny-pixel` has no guidance."""
    return Cell(
        calls, 1.0 if model == "tiny-pixel" else GUIDANCE, "explicit" if model == "tiny-flow" else "stock", size
    )


def cells(model: str) -> list[Cell]:
    """What is measured at 32 pixels; the costly teacher comes last."""
    main = main_cell(model, 5)
    rows = [main_cell(model, n) for n in (3, 5, 10, 20)] + [replace(main, calls=n, scheduler="dpm") for n in (5, 20)]
    if model == "tiny-flow":
        rows += [replace(main, calls=n, scheduler="stock") for n in (3, 5)]
    if model != "tiny-pixel":
        rows += [replace(main_cell(model, n), guidance=HARD_GUIDANCE) for n in (5, 20)]
        rows.append(replace(main_cell(model, 20), guidance=1.0))
    return [*rows, main_cell(model, 100)]


def _digest(folder: Path) -> str:
    h = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        h.update(file.read_bytes())
    return h.hexdigest()[:10]


def _with_scheduler(model: str, pipe, kind: str):
    """A pipeline that shares the networks and has the scheduler of the cell."""
    from diffusers import DPMSolverMultistepScheduler

    if kind != "dpm":
        return pipe
    config = pipe.scheduler.config
    if model == "tiny-flow":
        scheduler = DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=1.0, prediction_type="flow_prediction", final_sigmas_type="zero"
        )
    else:
        scheduler = DPMSolverMultistepScheduler.from_config(config, final_sigmas_type="zero")
    return type(pipe)(
        **{**pipe.components, "scheduler": scheduler},
        **({"requires_safety_checker": False} if model == "tiny-sd" else {}),
    )


@torch.no_grad()
def generate(model: str, pipe, cell: Cell, first: int, count: int) -> torch.Tensor:
    """Images first .. first + count - 1 of a cell, uint8 (count, 3, S, S)."""
    pairs = words.draw(first + count, seed=0)[first:]
    channels, side = (3, cell.size) if model == "tiny-pixel" else (8, cell.size // 4)
    noise = torch.stack(
        [
            torch.randn(channels, side, side, generator=torch.Generator().manual_seed(SEED + first + i))
            for i in range(count)
        ]
    )
    options = {"num_inference_steps": cell.calls, "latents": noise, "output_type": "latent"}
    if cell.scheduler == "explicit":
        options["sigmas"] = np.linspace(1.0, 1 / cell.calls, cell.calls)
    if model == "tiny-pixel":
        x = pipe([m for m, _ in pairs], **options).images
        return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    options |= models.CALL_DEFAULTS.get(model, {})
    prompts = [words.caption(m, t) for m, t in pairs]
    z = pipe(prompts, guidance_scale=cell.guidance, height=cell.size, width=cell.size, **options).images
    return encoders.decode(pipe.vae, z)


def cell_images(model: str, pipe, cell: Cell, n: int, store: Path) -> torch.Tensor:
    """n images of a cell, from the store where they are."""
    store.mkdir(parents=True, exist_ok=True)
    own = _with_scheduler(model, pipe, cell.scheduler)
    own.set_progress_bar_config(disable=True)
    blocks, begin, made = [], time.time(), 0
    for first in range(0, n, BLOCK):
        file = store / f"{cell.name}-{first:05d}.npy"
        if not file.exists():
            np.save(file.with_suffix(".partial.npy"), generate(model, own, cell, first, BLOCK).numpy())
            file.with_suffix(".partial.npy").rename(file)
            made += BLOCK
        blocks.append(torch.from_numpy(np.load(file)))
    if made:
        print(f"{model} {cell.name}: {made} images in {time.time() - begin:.0f} s", flush=True)
    return torch.cat(blocks)[:n]


class Meter:
    """The instruments: features, heads, CLIP, reference statistics of one size."""

    def __init__(self, size: int = 32) -> None:
        self.features = models.features()
        self.clip, self.processor = models.clip()
        r = models.reference(size)
        self.reference = frechet.from_moments(r["mu"], r["sigma"], r["n"])

    @torch.no_grad()
    def clip_score(self, images: torch.Tensor, meaning: torch.Tensor) -> tuple[float, float]:
        """Mean and SE of 100 cos(image, full caption)."""
        tokens = self.processor.tokenizer(
            [words.caption(m, 0) for m in range(words.N_MEANINGS)],
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        )
        text = F.normalize(encoders._tensor(self.clip.get_text_features(**tokens)), dim=-1)
        image = torch.cat(
            [
                encoders._tensor(
                    self.clip.get_image_features(
                        pixel_values=self.processor.image_processor(list(x), return_tensors="pt")["pixel_values"]
                    )
                )
                for x in images.split(500)
            ]
        )
        score = 100 * (F.normalize(image, dim=-1) * text[meaning]).sum(1)
        return round(float(score.mean()), 2), round(float(score.std() / len(score) ** 0.5), 2)

    @torch.no_grad()
    def measure(self, images: torch.Tensor, meaning: torch.Tensor) -> dict:
        f = encoders.features(self.features, images)
        phi = frechet.influence(f, self.reference)
        truth = torch.tensor([words.parts(int(m)) for m in meaning]).T
        right = {
            k: round(float((logits.argmax(1) == t).float().mean()), 4)
            for k, logits, t in zip(("thing", "colour", "background"), self.features.heads(f), truth)
        }
        score, se = self.clip_score(images, meaning)
        return {
            "n": len(images),
            "fid": round(frechet.fid(f, self.reference), 4),
            "fid_se": round(frechet.standard_error(phi), 4),
            "fid_jackknife": round(frechet.jackknife(f, self.reference), 4),
            "clip_score": score,
            "clip_se": se,
            **right,
            "_features": f,
        }


def floors(meter: Meter, pipe, train: data.Split, test: data.Split, n: int, size: int) -> dict:
    """FID of n real training images, and (where there is a VAE) of its round trip of n test images."""
    g = torch.Generator().manual_seed(99)
    real = data.draw(train, n, g, size, torch.randperm(len(train.labels), generator=g)[:n])
    rows = {"real": meter.measure(real.images, real.meaning)}
    vae = getattr(pipe, "vae", None)
    if vae is not None:
        batch = data.reference(test, size)
        x = batch.images[:n]
        back = encoders.decode(vae, encoders.encode(vae, x))
        rows["vae_round_trip"] = meter.measure(back, batch.meaning[:n])
        rows["vae_round_trip"]["psnr_db"] = round(float(encoders.psnr(back, x).mean()), 2)
    for row in rows.values():
        row.pop("_features")
    return rows


def _difference(rows: dict, reference: frechet.Statistics, a: str, b: str, first: int = 0) -> dict:
    """Paired FID difference over the images, from number `first` on, that both rows have."""
    n = min(rows[a]["n"], rows[b]["n"])
    d = frechet.paired(rows[a]["_features"][first:n], rows[b]["_features"][first:n], reference)
    return {
        "a": a,
        "b": b,
        "n": n - first,
        "fid_a_minus_b": round(d.value, 4),
        "se": round(d.se, 4),
        "z": round(d.z, 2),
    }


def _to_converged(rows: dict, key: dict[int, str]) -> dict:
    """Step budgets by FID to the model's own images of 100 calls, of other seeds.

    FID to the data also sees what guidance does to the law of the images, which few calls do less of; this sees the
    solver alone. The first half of the seeds is the reference, the second half is measured.
    """
    half = min(rows[key[100]]["n"], rows[key[20]]["n"] // 2)
    reference = frechet.from_features(rows[key[100]]["_features"][:half])
    return {
        "converged_3_against_20_calls": {**_difference(rows, reference, key[3], key[20], half), "wanted": "z > 10"},
        "converged_5_against_20_calls": {**_difference(rows, reference, key[5], key[20], half), "wanted": "z > 3"},
    }


def _criteria(model: str, rows: dict, meter: Meter, real: dict) -> dict:
    key = {n: main_cell(model, n).name for n in (3, 5, 20, 100)}
    out = {
        "a_3_against_100_calls": {**_difference(rows, meter.reference, key[3], key[100]), "wanted": "z > 10"},
        "b_5_against_20_calls": {**_difference(rows, meter.reference, key[5], key[20]), "wanted": "z > 3"},
        **_to_converged(rows, key),
    }
    for item in out.values():
        item["passed"] = item["z"] > float(item["wanted"].removeprefix("z > "))
    few, many = (replace(main_cell(model, n), scheduler="dpm").name for n in (5, 20))
    out["b_dpm_solver_for_information"] = _difference(rows, meter.reference, few, many)
    if model != "tiny-pixel":
        few, many = (replace(main_cell(model, n), guidance=HARD_GUIDANCE).name for n in (5, 20))
        out["b_hard_guidance_for_information"] = _difference(rows, meter.reference, few, many)
    score = rows[key[20]]["clip_score"]
    low = None if model == "tiny-pixel" else rows[replace(main_cell(model, 20), guidance=1.0).name]["clip_score"]
    out["c_clip_score"] = {
        "value": score,
        "guidance_1": low,
        "true_images": real["clip_score"],
        "wanted": "above guidance 1 and at least 80 % of the true images'",
        "passed": score >= 0.8 * real["clip_score"] and (low is None or score > low),
    }
    for k in ("colour", "background"):
        out[f"d_{k}_right"] = {
            "value": rows[key[20]][k],
            "wanted": ">= 0.95 at 20 calls",
            "passed": rows[key[20]][k] >= 0.95,
        }
    return out


def grid(model: str, pipe, file: Path, size: int = 32, zoom: int = 2) -> list[str]:
    """PNG: rows = 8 prompts, columns = calls of GRID_CALLS. Returns the prompts."""
    from PIL import Image

    columns = [generate(model, pipe, main_cell(model, n, size), 0, 8) for n in GRID_CALLS]
    sheet = torch.cat([torch.cat(list(c), 1) for c in columns], 2).permute(1, 2, 0).numpy()
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(sheet)
    image.resize((image.width * zoom * 32 // size, image.height * zoom * 32 // size), Image.Resampling.NEAREST).save(
        file, optimize=True
    )
    return models.prompts(8, 0)


def _measure_size(
    name: str, pipe, size: int, n: int, n_teacher: int, store: Path, splits: tuple[data.Split, data.Split]
) -> dict:
    """All rows of one image size; the last, with the most calls, is the teacher of the others."""
    meter = Meter(size)
    meaning = torch.tensor([m for m, _ in words.draw(n, 0)])
    todo = cells(name) if size == 32 else [main_cell(name, k, 64) for k in (5, 20)]
    best = todo[-1]
    images = {cell: cell_images(name, pipe, cell, n_teacher if cell == best else n, store) for cell in todo}
    rows = {cell.name: meter.measure(images[cell], meaning[: len(images[cell])]) for cell in todo}
    for cell in todo[:-1]:
        if cell.guidance == best.guidance:
            p = encoders.psnr(images[cell][:n_teacher], images[best])
            rows[cell.name][f"psnr_to_{best.calls}_calls_db"] = round(float(p[p.isfinite()].mean()), 2)
    result: dict = {"floors": floors(meter, pipe, *splits, n, size)}
    if size == 32:
        result["criteria"] = _criteria(name, rows, meter, result["floors"]["real"])
    else:
        few, many = rows
        result["b_5_against_20_calls"] = _difference(rows, meter.reference, few, many)
    return {**result, "rows": {k: {a: b for a, b in r.items() if a != "_features"} for k, r in rows.items()}}


def check(out: Path, data_dir: str, names: list[str], n: int, n_large: int = 0, n_teacher: int | None = None) -> dict:
    """Measure `names` in OUT/weights on n images a cell, n_teacher in the cell of 100 calls (default: n too),
    n_large of 64 pixels; writes OUT/check/<name>.json and grids."""
    splits = data.load(data_dir, "train"), data.load(data_dir, "test")
    models._WEIGHTS = out / "weights"  # the models to be checked are not shipped yet
    results = {}
    for name in names:
        begin, digest = time.time(), _digest(models.path(name))
        pipe = models.load(name)
        pipe.set_progress_bar_config(disable=True)
        result: dict = {
            "model": name,
            "weights": digest,
            "seed": SEED,
            "guidance": main_cell(name, 3).guidance,
            "features": "tiny-fashion (not Inception)",
            "grid_prompts": grid(name, pipe, out / "check" / f"{name}.png"),
        }
        for size, count in ((32, n), (64, 0 if name == "tiny-pixel" else n_large)):
            if count:
                result[f"size_{size}"] = _measure_size(
                    name, pipe, size, count, min(count, n_teacher or n), out / "check" / f"{name}-{digest}", splits
                )
        if "size_64" in result:
            grid(name, pipe, out / "check" / f"{name}-64.png", 64)
        result["seconds"] = round(time.time() - begin)
        result["threads"] = torch.get_num_threads()
        (out / "check" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(result["size_32"]["criteria"], indent=1), flush=True)
        results[name] = result
    return results
