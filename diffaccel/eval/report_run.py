"""`report`: from the folder of a sweep, finished or not, to index.html, report.json, report.csv and the pictures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OptionError
from ..parallel.agree import plain
from ..parallel.folder import locked
from ..parallel.world import SoloWorld
from . import plots
from .cells import CANDIDATE, HALF, Plan, Store
from .fid_score import fid, label
from .measure import Meter, read_reference
from .page import cell_values, page
from .rows import Row, rows
from .stats_file import Stats
from .verdicts import number, pairs_of_budgets, verdicts

SCHEMA = 1


@dataclass(frozen=True)
class Report:
    """What a sweep found. folder: where it is; data: what report.json holds."""

    folder: Path
    data: dict[str, Any]

    @staticmethod
    def read(folder: str | Path) -> Report:
        """Raises OptionError where there is none."""
        path = Path(folder) / "report.json"
        try:
            return Report(Path(folder), json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise OptionError(f"no report in {folder}: {error}") from None

    @property
    def page(self) -> Path:
        return self.folder / "index.html"

    @property
    def missing(self) -> list[str]:
        """What a partial run lacks, a line for each row."""
        return list(self.data["missing"])

    @property
    def verdicts(self) -> list[str]:
        """What was found, a sentence for each metric, budget and scheduler."""
        return [v["text"] for v in self.data["verdicts"]]

    def row(self, name: str, calls: int) -> dict[str, Any]:
        """A row by its scheduler and calls."""
        for row in self.data["rows"]:
            if (row["name"], row["calls"]) == (name, calls):
                return dict(row)
        known = ", ".join(f"{r['name']} {r['calls']}" for r in self.data["rows"])
        raise OptionError(f"no row {name!r} with {calls} calls; there are {known}")

    def __str__(self) -> str:
        """The table, then the verdicts."""
        keys = ("fid", "psnr", "latent", "clip", "seconds")
        lines = ["".join(f"{h:>10s}" if i else f"{h:32s}" for i, h in enumerate(("scheduler", "calls", *keys)))]
        for row in self.data["rows"]:
            flat = cell_values(row)
            numbers = "".join(f"{number(flat[k]) or '-':>10s}" for k in keys)
            lines.append(f"{row['name'][:31]:32s}{row['calls']:>10d}{numbers}")
        missing = [f"missing: {m}" for m in self.missing]
        return "\n".join([*lines, *missing, *self.verdicts, f"report: {self.page}"])


def report(out: str | Path, *, features: Any = None, weights: Any = None, device: str = "cpu") -> Report:
    """Make the report of a sweep again, or of a part that was stopped: it says what is missing.

    Args:
        out: the folder of the sweep.
        features, weights: the feature network, where the sweep was given one that has no name.
        device: that measures blocks which were made but not measured yet.
    """
    store = Store(out)
    plan = store.plan()
    named = plan.features if features is None else features
    clip = None if plan.clip is None else plan.clip.removeprefix("clip:").removesuffix("@pil-bicubic")
    meter = Meter.open(read_reference(plan, store), None if plan.reference is None else named, weights, clip, device)
    with locked(store.folder):
        meter.measure_all(store, plan, SoloWorld(device), progress=False)
        return write_report(store, plan, meter)


def write_report(store: Store, plan: Plan, meter: Meter) -> Report:
    """Everything from what is in the folder."""
    reference = read_reference(plan, store)
    found = rows(store, plan, meter, reference)
    data = _data(plan, found, reference)
    pictures = {
        f"quality_{against}.png": drawn
        for against in ("calls", "seconds")
        if (drawn := plots.curves(found, against, data["fid_label"])) is not None
    }
    sheet = plots.grid(store, plan, found)
    if sheet is not None:
        pictures["grid.png"] = sheet[0]
    files = {
        "report.json": json.dumps(plain(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "report.csv": _csv(data["rows"]),
        "index.html": page(data, pictures, sheet[1] if sheet else []),
    }
    with store.folder.writing():
        for name, picture in pictures.items():
            store.folder.replace(store.root / name, picture)
        for name, text in files.items():
            store.folder.replace(store.root / name, text.encode())
    return Report(store.root, data)


def _data(plan: Plan, found: Sequence[Row], reference: Stats | None) -> dict[str, Any]:
    keys = ("name", "pipeline", "weights", "options", "dtype", "device", "seed", "block", "batch")
    return {
        "schema": SCHEMA,
        "model": {k: plan.recipe[k] for k in keys},
        "images": plan.images,
        "prompts": len(plan.prompts),
        "calls": plan.calls,
        "reference": None if plan.reference is None else Path(plan.reference).name,
        "features": plan.features,
        "fid_label": label("FID", plan.features or ""),
        "clip_model": plan.clip,
        "floor": _floor(reference, plan.features),
        "teacher_gap": _gap(found),
        "verdicts": verdicts(found, plan, reference),
        "rows": [row.summary for row in found],
        **pairs_of_budgets(found, plan, reference),
        "missing": _missing(found),
        "warnings": _warnings(plan, found),
        "notes": plan.notes,
        "environment": plan.environment,
        "command": plan.command,
    }


def _floor(reference: Stats | None, features: str | None) -> dict[str, Any] | None:
    """FID of two halves of the reference, where its features are known: what no sampler can beat."""
    values = None if reference is None else reference.values if reference.values is not None else reference.rows
    if values is None or features is None or len(values) < 4:
        return None
    half = len(values) // 2
    two = [Stats("half of the reference", features, half, v) for v in (values[:half], values[half : 2 * half])]
    score = fid(*two).to_dict()
    return {k: score[k] for k in ("value", "low", "high", "raw")} | {"n": half}


def _gap(found: Sequence[Row]) -> str:
    """The teacher with half its calls against the teacher, as text; empty where there is none."""
    half = next((r for r in found if r.cell.role == HALF), None)
    errors = {} if half is None else half.summary["errors"]
    if half is None or not isinstance(errors.get("psnr"), float):
        return ""
    latent = f", latent error {number(errors['latent'])}" if isinstance(errors.get("latent"), float) else ""
    return f"PSNR {number(errors['psnr'])} dB{latent} between its {half.cell.calls} and {2 * half.cell.calls} calls"


def _missing(found: Sequence[Row]) -> list[str]:
    lines = []
    for row in found:
        made, lacking = row.summary["images"], row.summary["images_missing"]
        if row.cell.steps is not None and lacking:
            lines.append(f"{row.cell.label}: {made} of {made + lacking} images")
    return lines


def _warnings(plan: Plan, found: Sequence[Row]) -> list[str]:
    lines = []
    empty = sum(not p for p in plan.prompts)
    if empty:
        lines.append(f"{empty} of {len(plan.prompts)} prompts are empty")
    cut = max(((row.summary["clip"] or {}).get("truncated", 0) for row in found), default=0)
    if cut:
        lines.append(f"{cut} different prompts are longer than the CLIP model reads: their ends do not count")
    doubts = [row.summary["fid"].get("warnings", ()) for row in found if row.summary["fid"]]
    shared = [w for w in dict.fromkeys(doubts[0]) if all(w in d for d in doubts)] if doubts else []
    lines += [f"FID of all rows: {w}" for w in shared]
    for row in found:
        name, own = row.cell.label, row.summary
        if row.cell.steps is None:
            lines.append(f"{name}: this scheduler cannot make so few calls")
        elif row.calls not in (None, row.cell.calls):
            lines.append(f"{name}: {row.calls} calls were counted at the model")
        if own["bad"]:
            lines.append(f"{name}: {len(own['bad'])} images are black or hold a NaN, first: {own['bad'][0]}")
        if own["duplicates"] > 0.01 * max(own["images"], 1):
            lines.append(f"{name}: {own['duplicates']} of {own['images']} images are duplicates")
        lines += [f"{name}: {warning}" for warning in (own["fid"] or {}).get("warnings", ()) if warning not in shared]
    for key in ("diffaccel", "diffusers", "torch"):
        versions = {c[key] for row in found for c in row.counted if key in c}
        if len(versions) > 1:
            lines.append(f"blocks were made with different versions of {key}: {', '.join(sorted(versions))}")
    seconds = [r.summary["seconds"] for r in found]
    lines += sorted({s for s in seconds if isinstance(s, str) and "machines" in s})
    if any(isinstance(s, dict) and not s["warm"] for s in seconds):
        lines.append("some seconds are of a process's first block, which warms up: give more images or smaller blocks")
    if not any(r.cell.role == CANDIDATE for r in found):
        lines.append("there is no scheduler to judge: all rows are diffusers' own")
    return lines


def _csv(found: Sequence[dict[str, Any]]) -> str:
    held = io.StringIO()
    flat = [cell_values(row) for row in found]
    writer = csv.DictWriter(held, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return held.getvalue()
