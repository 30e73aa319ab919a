"""The page of bench_quant_cache.py."""

from __future__ import annotations

from typing import Any

INTRO = """# Quantisation and denoiser caches

Written by `benchmarks/bench_quant_cache.py`, one CPU thread a section; both sides of every ratio are of the same run.
Versions: {versions}.

**time**: CPU seconds of the whole call relative to runs with all steps in the same round (median over rounds).
**error**: mean of |z - z*| / |z*| to the latents of the run with all steps, same noise. **plain of equal time**: the
run with fewer steps of the same scheduler that takes as long or longer, and its error; the verdict is a paired 95 %
bootstrap interval over images (for compiled rows the plain runs count as faster by what compiling alone gains).
**FID (tiny-fashion)**: features of the embedded network, comparable with no published number; in brackets
its change from the run with all steps and the half width of the 95 % interval of this change.
**memory**: MiB of the process at most above what there was before the call, and of it what the cache keeps; the
allocator's reuse makes the first vary by some 5 MiB from call to call.
"""


def markdown(result: dict[str, Any]) -> str:
    """All tables."""
    versions = ", ".join(f"{k} {v}" for k, v in result["versions"].items())
    parts = [INTRO.format(versions=versions)]
    parts += [embedded(found) for found in result["embedded"]]
    if "wide" in result:
        parts.append(wide(result["wide"]))
    return "\n".join(parts)


def embedded(found: dict[str, Any]) -> str:
    """Tables of one model."""
    cost = found["calibration"]
    lines = [
        f"\n## {found['model']}: {found['steps']} steps, guidance {found['guidance']:g}, {found['images']} images\n",
        summary(found["rows"]),
        f"\nCalibration (masks and variance compensation together): {cost['calls']} model calls of an image, "
        f"{cost['seconds']:.0f} s. Receipt: {cost['receipt']['result']}. The same in W8A8, `every(3)` alone: "
        f"{found['calibration in W8A8']['receipt']['result']}.\n",
        "| | full steps | time | error | PSNR, dB | FID (tiny-fashion) | memory | plain of equal time | its error | "
        "verdict |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    titles = {
        "full": "all steps",
        "plain": "fewer steps",
        "stock": "best stock scheduler at its calls",
        "ours": "diffaccel",
        "peer": "peers",
    }
    for kind, title in titles.items():
        lines.append(f"| **{title}** | | | | | | | | | |")
        rows = [row for row in found["rows"] if row["kind"] == kind]
        lines += [line(row) for row in sorted(rows, key=lambda r: r.get("time", 9.0))]
    return "\n".join(lines) + "\n"


def line(row: dict[str, Any]) -> str:
    if row.get("failed"):
        return f"| {row['name']} | | | does not run: {row['failed']} | | | | | | |"
    full = "" if row["full"] is None else f"{row['full']:.3g}"
    tail = f"{row['plain']} | {row['plain error']:.4f} | {row['verdict']}" if "plain" in row else " | | "
    middle = f"{row['time']:.2f} | {row['error']:.4f} | {row['psnr']:.1f} | {score(row)} | {memory(row)}"
    return f"| {row['name']} | {full} | {middle} | {tail} |"


def score(row: dict[str, Any]) -> str:
    """FID."""
    if "fid" not in row:
        return "not finite"
    change = "" if row["kind"] == "full" else f" ({row['fid change']:+.2f} ± {row['fid +-']:.2f})"
    return f"{row['fid']:.2f}{change}"


def memory(row: dict[str, Any]) -> str:
    """MiB."""
    if row["peak"] is None:
        return ""
    return f"{row['peak']:.0f}" + ("" if row["kept"] is None else f" ({row['kept']:.1f})")


def summary(rows: list[dict[str, Any]]) -> str:
    """How many of whose rows beat plain runs."""
    told = []
    for kind, who in (("ours", "diffaccel's"), ("peer", "the peers'")):
        judged = [row for row in rows if row["kind"] == kind and "verdict" in row]
        if judged:
            count = {v: sum(row["verdict"] == v for row in judged) for v in ("beats plain", "plain is better")}
            told.append(
                f"Of {who} {len(judged)} rows {count['beats plain']} beat plain runs of equal time, "
                f"{count['plain is better']} are worse."
            )
    return " ".join(told)


def wide(found: dict[str, Any]) -> str:
    """Tables of the transformer of real width."""
    lines = [
        f"\n## DiT, width {found['width']}, {found['layers']} blocks, {found['parameters'] / 1e6:.0f} M parameters, "
        f"{found['tokens']} tokens, random weights\n",
        f"{found['steps']} DDIM steps, {found['rows in a batch']} images, no guidance. Errors of random weights rank "
        "nothing; they show what a run computes otherwise (0: the cache reused nothing).\n",
        "| | full steps | time | error | memory, MiB |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        if "failed" in row:
            lines.append(f"| {row['name']} | | | does not run: {row['failed']} | |")
        else:
            peak = "" if row["peak"] is None else f"{row['peak']:.0f}"
            lines.append(f"| {row['name']} | {row.get('full', '')} | {row['time']:.2f} | {row['error']:.4f} | {peak} |")
    lines += ["\n| one call | times faster than float, eager | error of the output |", "|---|---|---|"]
    lines += [f"| {name} | {v['faster']:.2f} | {v['error']:.4f} |" for name, v in found["one call"].items()]
    lines += ["\n| a reused step (level stack, eager) | |", "|---|---|"]
    lines += [f"| {name} | {value:.4g} |" for name, value in found["cached step"].items()]
    return "\n".join(lines) + "\n"
