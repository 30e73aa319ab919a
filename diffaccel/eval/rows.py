"""The rows of a report: what is known of each cell, from its finished blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from . import clip as clip_metric
from .cells import TEACHER, Block, Cell, Plan, Store
from .features import clip_model
from .fid_score import fid
from .measure import Meter, overlap, pair_slug, slug
from .pairs import COLUMNS, Paired
from .score import Score, interval
from .stats_file import Stats

STOCHASTIC = "stochastic: the same seed is not the same image"


@dataclass(frozen=True)
class Series:
    """Values of images: index (n,), values (n, ...)."""

    index: np.ndarray
    values: np.ndarray

    @staticmethod
    def join(parts: list[tuple[int, np.ndarray]]) -> Series | None:
        """From (first image, values of it and the following ones)."""
        if not parts:
            return None
        index = np.concatenate([np.arange(first, first + len(v)) for first, v in parts])
        return Series(index, np.concatenate([v for _, v in parts]))

    def at(self, index: np.ndarray) -> np.ndarray:
        """Values of these images, all of which it has."""
        return self.values[np.searchsorted(self.index, index)]


@dataclass(frozen=True)
class Row:
    """A cell with what its finished blocks hold.

    counted: one for each finished block. series: features, clip (score of each image), and errors to the teacher:
    psnr, ssim, lpips, latent. why: metric -> why it is not there. summary: for the report, plain JSON.
    """

    cell: Cell
    counted: list[dict[str, Any]]
    series: dict[str, Series]
    why: dict[str, str]
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def calls(self) -> int | None:
        """Model calls, counted."""
        return self.counted[0]["calls"] if self.counted else None


def rows(store: Store, plan: Plan, meter: Meter, reference: Stats | None) -> list[Row]:
    """A row for each cell, in the plan's order."""
    texts = _texts(plan, meter)
    devices: set[str] = set()
    found = [_load(store, plan, meter, cell, texts) for cell in plan.cells]
    for row in found:
        devices |= {c["device"] for c in row.counted}
    for row in found:
        row.summary.update(_summary(row, plan, reference, devices))
    return found


def _load(store: Store, plan: Plan, meter: Meter, cell: Cell, texts: Mapping[str, Any] | None) -> Row:
    done = [b for b in cell.blocks(plan.block) if store.done(cell, b)]
    counted = [store.counted(cell, b) for b in done]
    row = Row(cell, counted, {}, {})
    for metric, id in (("features", meter.features), ("clip", meter.clip)):
        if id is not None:
            kind = slug(id)
            parts = [(b.first, store.read(cell, b, kind)["values"]) for b in done if store.done(cell, b, kind)]
            joined = Series.join(parts)
            if joined is not None:
                row.series[metric] = joined
    if texts is not None and "clip" in row.series:
        row.summary.update(_clip(row, plan, texts))
    _add_errors(store, plan, row, done)
    return row


def _texts(plan: Plan, meter: Meter) -> dict[str, Any] | None:
    """Embeddings of the different prompts, and which of them image i has."""
    if meter.clip is None:
        return None
    net, processor = clip_model(meter.clip.removeprefix("clip:").removesuffix("@pil-bicubic"))
    number = {p: i for i, p in enumerate(dict.fromkeys(plan.prompts))}
    embeddings, truncated = clip_metric.embed_text(net, processor, list(number))
    own = np.array([number[p] for p in plan.prompts])
    return {"embeddings": embeddings, "own": own, "truncated": truncated}


def _clip(row: Row, plan: Plan, texts: Mapping[str, Any]) -> dict[str, Any]:
    """CLIP score and R-precision; the series becomes the score of each image."""
    series = row.series["clip"]
    own = texts["own"][series.index % len(plan.prompts)]
    image = torch.from_numpy(series.values)
    scores = clip_metric.pair_scores(image, texts["embeddings"][torch.from_numpy(own)]).double().numpy()
    row.series["clip"] = Series(series.index, scores)
    mean, se = float(scores.mean()), float(scores.std(ddof=1) / len(scores) ** 0.5)
    low, high = interval(mean, se)
    first = None
    if len(texts["embeddings"]) > 1:
        first = float(clip_metric.r_precision(image, texts["embeddings"], own).double().mean())
    found = {"value": mean, "low": low, "high": high, "n": len(scores), "r_precision": first}
    return {"clip": {**found, "truncated": texts["truncated"]}}


def _add_errors(store: Store, plan: Plan, row: Row, done: list[Block]) -> None:
    """Errors to the teacher, or why there are none."""
    teacher = plan.of_role(TEACHER)
    if teacher is None or row.cell == teacher:
        reason = "no teacher" if teacher is None else "is the teacher"
        row.why.update(dict.fromkeys(COLUMNS, reason))
        return
    if any(c["noisy"] for c in row.counted):
        row.why.update(dict.fromkeys(COLUMNS, STOCHASTIC))
        return
    parts: dict[str, list[tuple[int, np.ndarray]]] = {}
    for block in done:
        theirs = overlap(store, plan, teacher, block)
        if theirs is not None and store.done(row.cell, block, pair_slug(teacher, theirs)):
            read = store.read(row.cell, block, pair_slug(teacher, theirs))
            row.why.update(json.loads(str(read.pop("missing"))))
            for name, values in read.items():
                parts.setdefault(name, []).append((block.first, values))
    for name, several in parts.items():
        joined = Series.join(several)
        if joined is not None:
            row.series[name] = joined
    if not parts:
        row.why.update(dict.fromkeys(COLUMNS, "not measured yet"))


# ---------------------------------------------------------------------- numbers
def _summary(row: Row, plan: Plan, reference: Stats | None, devices: set[str]) -> dict[str, Any]:
    """Everything that is printed of a row, plain JSON."""
    cell = row.cell
    images = sum(len(b) for b in cell.blocks(plan.block)) if cell.steps is not None else 0
    made = sum(c["images"] for c in row.counted)
    found: dict[str, Any] = {
        "name": cell.name,
        "calls": cell.calls,
        "calls_made": row.calls,
        "role": cell.role,
        "extra": cell.extra,
        "images": made,
        "images_missing": images - made,
        "impossible": cell.steps is None,
        "stochastic": any(c["noisy"] for c in row.counted),
        "bad": sorted(i for c in row.counted for i in c["bad"]),
        "duplicates": made - len({d for c in row.counted for d in c["digests"]}),
        "seconds": _seconds(row, devices),
        "fid": None,
        "clip": row.summary.get("clip"),
        "errors": _errors(row),
        "scheduler": cell.scheduler,
    }
    if reference is not None and plan.features is not None and "features" in row.series:
        found["fid"] = _fid(row.series["features"].values, plan.features, reference)
    return found


def _fid(values: np.ndarray, features: str, reference: Stats) -> dict[str, Any]:
    if len(values) < 2:
        return {"value": None, "n": len(values)}
    made = Stats("these images", features, len(values), torch.from_numpy(values), jpeg=0)
    score: Score = fid(made, reference)
    kept = score.to_dict()
    return {k: kept[k] for k in ("value", "low", "high", "raw", "label", "estimator", "features", "warnings")} | {
        "n": len(values)
    }


def _errors(row: Row) -> dict[str, Any]:
    columns = {k: row.series[k].values for k in COLUMNS if k in row.series}
    if not columns:
        return dict(row.why)
    psnr = columns["psnr"]
    found = Paired(len(psnr), int(np.isinf(psnr).sum()), columns, row.why).summary()
    if "latent" in columns:
        found["latent"] = float(columns["latent"].mean())
    return found


def _seconds(row: Row, devices: set[str]) -> dict[str, Any] | str:
    """Per image: median over blocks, but a process's first (it warms up); or why not."""
    if len(devices) > 1:
        return f"measured on different machines: {', '.join(sorted(devices))}"
    if not row.counted:
        return "not measured yet"
    warm = [c for c in row.counted if not c["first"]]
    used = warm or row.counted
    return {
        "total": float(np.median([c["seconds"] for c in used])),
        "denoiser": float(np.median([c["inside"] for c in used])),
        "blocks": len(used),
        "warm": bool(warm),
    }
