"""The pictures of a report: quality against calls and seconds, and a grid of images with the same seeds per column."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors import OptionError
from .cells import STOCK, TEACHER, Plan, Store
from .rows import Row
from .score import interval

_PANELS = (("fid", "FID", "lower is better"), ("psnr", "PSNR to the teacher, dB", "higher is better"),
           ("clip", "CLIP score", "higher is better"))  # fmt: skip
_GREYS = (("#6b6b6b", "-"), ("#8c8c8c", "--"), ("#6b6b6b", ":"), ("#a8a8a8", "-."))  # stock: colour and line
_COLOURS = ("#c0392b", "#2471a3", "#1e8449", "#b7950b", "#7d3c98", "#ba4a00", "#117a65", "#5b2c6f")
_MARKS = "osD^vP*X"
_COLUMNS = 8  # images of a grid
_LEGEND = 56  # letters of a name that fit below a plot


def _point(row: Row, metric: str) -> tuple[float, float, float] | None:
    """(value, below, above) of a row."""
    if metric == "psnr":
        found = row.summary["errors"].get("psnr")
        half = _half_width(row.series["psnr"].values) if isinstance(found, float) else 0.0
        return (found, half, half) if isinstance(found, float) else None
    score = row.summary.get(metric)
    if not score or score["value"] is None:
        return None
    low, high = (score["value"] if score[k] is None else score[k] for k in ("low", "high"))
    return score["value"], score["value"] - low, high - score["value"]


def _half_width(values: np.ndarray) -> float:
    """Of the 95 % interval of the mean over images that are not equal to the teacher's."""
    kept = values[np.isfinite(values)]
    return interval(0.0, float(kept.std(ddof=1) / len(kept) ** 0.5))[1] if len(kept) > 1 else 0.0


def _place(row: Row, against: str) -> float | None:
    if against == "calls":
        return row.calls
    seconds = row.summary["seconds"]
    return seconds["total"] if isinstance(seconds, dict) else None


def drawing() -> tuple[Any, Any]:
    """Canvas and figure of matplotlib. Raises OptionError where it is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("the plots of a report need matplotlib: pip install diffaccel[eval]") from error
    return FigureCanvasAgg, Figure


def curves(rows: Sequence[Row], against: str, fid_label: str) -> bytes | None:
    """PNG of quality against "calls" or "seconds"; None if there is nothing to show.

    Stock schedulers are grey, the teacher is a dashed line (in FID only where its images suffice for an interval), bars
    are 95 % intervals.
    """
    canvas, new_figure = drawing()
    shown = [p for p in _PANELS if any(_point(r, p[0]) and _place(r, against) for r in rows)]
    if not shown:
        return None
    figure = new_figure(figsize=(4.8, 2.6 * len(shown) + 1.0), dpi=150, layout="constrained")
    canvas(figure)
    axes = np.atleast_1d(figure.subplots(len(shown), 1))
    for axis, (metric, title, hint) in zip(axes, shown):
        _panel(axis, rows, metric, against)
        axis.set_title(f"{fid_label if metric == 'fid' else title}: {hint}", fontsize=8.5, loc="left")
    axes[-1].set_xlabel("model calls an image" if against == "calls" else "seconds an image, measured", fontsize=9)
    handles, labels = axes[0].get_legend_handles_labels()
    labels = [x if len(x) <= _LEGEND else f"{x[: _LEGEND - 3]}..." for x in labels]
    columns = 1 if max(map(len, labels)) > _LEGEND // 2 else 2
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    held = io.BytesIO()
    figure.savefig(held, format="png", metadata={"Software": None})
    return held.getvalue()


def _panel(axis: Any, rows: Sequence[Row], metric: str, against: str) -> None:
    names = list(dict.fromkeys(r.cell.name for r in rows if r.cell.role not in (TEACHER, "half teacher")))
    colours, greys, ticks = cycle(_COLOURS), cycle(_GREYS), set()
    for i, name in enumerate(names):
        own = sorted((r for r in rows if r.cell.name == name), key=lambda r: r.cell.calls)
        points = [(x, *p) for r in own if (x := _place(r, against)) and (p := _point(r, metric))]
        stock = own[0].cell.role == STOCK
        colour, line = next(greys) if stock else (next(colours), "-")
        if not points:
            axis.plot([], [], color=colour, linestyle=line, marker=_MARKS[i % len(_MARKS)], label=name)
            continue
        places, values, below, above = map(list, zip(*points))
        ticks |= set(places)
        style = {"color": colour, "linestyle": line, "marker": _MARKS[i % len(_MARKS)], "markersize": 4.5, "capsize": 2}
        style |= {"linewidth": 1.0, "zorder": 1} if stock else {"linewidth": 1.8, "zorder": 2}
        axis.errorbar(places, values, yerr=[below, above], label=name, **style)
    teacher = next((r for r in rows if r.cell.role == TEACHER), None)
    point = None if teacher is None or _biased(teacher, metric) else _point(teacher, metric)
    if teacher is not None and point is not None:
        label = f"teacher, {teacher.cell.calls} calls"
        axis.axhline(point[0], color="#333333", linestyle="--", linewidth=1, label=label, zorder=0)
    axis.set_xscale("log")
    if against == "calls" and ticks:
        axis.set_xticks(sorted(ticks), [f"{t:g}" for t in sorted(ticks)])
        axis.minorticks_off()
    if against == "seconds":
        for which in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            which(lambda x, _: f"{x:.2g}")
        axis.tick_params(axis="x", which="both", labelsize=7, labelrotation=35)
    axis.grid(True, color="#e6e6e6", linewidth=0.6)
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _biased(row: Row, metric: str) -> bool:
    """Whether the bias of few images dominates a number: a teacher has fewer than the rows, and would look worse."""
    return metric == "fid" and (row.summary["fid"] or {}).get("low") is None


# ---------------------------------------------------------------------- the grid
def grid(store: Store, plan: Plan, rows: Sequence[Row]) -> tuple[bytes, list[str]] | None:
    """(PNG, prompts of its columns): a row for each cell, a column for each of the first 8 images."""
    count = min(_COLUMNS, plan.images, plan.block)
    found = []
    for row in rows:
        blocks = row.cell.blocks(plan.block)
        if blocks and store.done(row.cell, blocks[0]) and len(blocks[0]) >= count:
            images = store.read(row.cell, blocks[0], only=("images",))["images"][:count]
            found.append((f"{row.cell.name}\n{row.cell.calls} calls", images))
    if not found:
        return None
    side = _side(found[0][1].shape[1])
    left, gap = 210, 4
    sheet = Image.new("RGB", (left + count * (side + gap), len(found) * (side + gap)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (label, images) in enumerate(found):
        top = i * (side + gap)
        draw.multiline_text((2, top + side // 2), _fit(label, draw, font, left - 8), "#222222", font, anchor="lm")
        for j, image in enumerate(images):
            sheet.paste(_thumb(image, side), (left + j * (side + gap), top))
    held = io.BytesIO()
    sheet.save(held, "png", optimize=True)
    return held.getvalue(), [plan.prompt(j) for j in range(count)]


def _side(height: int) -> int:
    """Pixels of a thumbnail: small images are enlarged by a whole factor, large ones made smaller."""
    return height * (64 // height) if height <= 64 else min(height, 128)


def _thumb(image: np.ndarray, side: int) -> Image.Image:
    shown = Image.fromarray(image)
    method = Image.Resampling.NEAREST if side >= image.shape[0] else Image.Resampling.LANCZOS
    shown.thumbnail((side, side), method)
    return shown if shown.height == side or side < image.shape[0] else shown.resize((side, side), method)


def _fit(label: str, draw: Any, font: Any, width: int) -> str:
    """Cut lines that are too long."""
    lines = []
    for line in label.split("\n"):
        while len(line) > 4 and draw.textlength(line, font=font) > width:
            line = line[:-4] + "..."
        lines.append(line)
    return "\n".join(lines)
