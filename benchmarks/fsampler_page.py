"""The page of `bench_fsampler.py`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

MIDPOINT = "2M (midpoint form, as in DPM-Solver++)"


def median(r: dict[str, Any]) -> float:
    """Median error of a row; infinity if it failed."""
    return float(np.median(r["errors"])) if r["errors"] else math.inf


def markdown(full: dict[str, Any]) -> str:
    """The page for the documentation."""
    lines = [
        "# FSampler at equal model calls",
        "",
        f"Measured by `{full['command']}` with diffusers {full['diffusers']}, torch {full['torch']}, one CPU thread. "
        f"Error: median over images of the relative distance of the final latents to those of a stock second-order "
        f"solver at {full['teacher_calls']} calls, from the same noise. All methods of a row make the same number of "
        "model calls; FSampler's patterns (h2/s2 unless named) run on the larger number of nodes that this allows.",
    ]
    for name, report in full["models"].items():
        lines += model_lines(name, report)
    lines += mixture_lines(full["mixtures"]) + time_lines(full["time"])
    return "\n".join(lines) + "\n"


def model_lines(name: str, report: dict[str, Any]) -> list[str]:
    budgets = sorted({r["calls"] for r in report["rows"]})
    lines = ["", f"## {name}", "", f"{report['images']} images, guidance 4. "]
    lines[-1] += f"The teacher with half its calls is off by {report['teacher_gap']:.4f}."
    lines += ["", f"| grid | method | {' | '.join(f'{n} calls' for n in budgets)} |", "|---" * (len(budgets) + 2) + "|"]
    by: dict[tuple[str, str], dict[int, float]] = {}
    for r in report["rows"]:
        by.setdefault((r["grid"], r["method"]), {})[r["calls"]] = median(r)
    best = {n: min((v[n], k[1]) for k, v in by.items() if k[0] == "stock" and n in v) for n in budgets}
    for (grid, method), values in by.items():
        if grid != "stock":
            cells = [f"{values.get(n, math.inf):.4f}".replace("inf", "does not run") for n in budgets]
            lines.append(f"| {grid} | {method} | {' | '.join(cells)} |")
    lines.append(
        f"| stock | best of diffusers' own, picked afterwards | {' | '.join(cell(best[n]) for n in budgets)} |"
    )
    failed = sorted({r["failed"] for r in report["rows"] if "failed" in r})
    if failed:
        lines += ["", f"ZEUS does not run on this model: {'; '.join(failed)}."]
    lines += ["", *verdicts(by, best, budgets), "", "The hook's adaptive gate on the stock first-order scheduler:", ""]
    lines += ["| steps, tol | calls an image (mean, min, max) | adaptive | Euler, mean calls | 2M, mean calls | |"]
    lines += ["|---|---|---|---|---|---|"]
    for a in report["adaptive"]:
        c = a["calls"]
        verdict = "**no benefit found**" if a["adaptive"] >= min(a["Euler"], a["2M"]) else "better than both"
        lines.append(
            f"| {a['steps']}, {a['tol']} | {c['mean']:.1f}, {c['min']}, {c['max']} | {a['adaptive']:.4f} | "
            f"{a['Euler']:.4f} | {a['2M']:.4f} | {verdict} |"
        )
    return lines


def cell(best: tuple[float, str]) -> str:
    return f"{best[0]:.4f} ({best[1]})"


def verdicts(by: Any, best: Any, budgets: list[int]) -> list[str]:
    """FSampler with its defaults over each control, at each budget."""
    controls = ("Euler", "2M", MIDPOINT, "2M on the kept nodes")
    lines = ["FSampler (x0, lam) over its controls (below 1: better):", ""]
    lines += [f"| grid | control | {' | '.join(f'{n} calls' for n in budgets)} | |", "|---" * (len(budgets) + 3) + "|"]
    for grid in dict.fromkeys(k[0] for k in by if k[1] == "Euler"):
        ours = by[grid, "FSampler (x0, lam)"]
        ran = {k: v for k, v in by.items() if all(math.isfinite(v.get(n, math.inf)) for n in budgets)}
        peers = {name: values for (kind, name), values in ran.items() if kind == "ZEUS"}
        rest = {"best stock": {n: best[n][0] for n in budgets}, **peers}
        for control in (*controls, *rest):
            other = rest[control] if control in rest else by[grid, control]
            ratios = [ours[n] / other[n] for n in budgets]
            wins = sum(r < 1 for r in ratios)
            verdict = f"better at {wins} of {len(ratios)}" if wins else "**no benefit found**"
            lines.append(f"| {grid} | {control} | {' | '.join(f'{r:.2f}' for r in ratios)} | {verdict} |")
    return lines


def mixture_lines(rows: list[dict[str, Any]]) -> list[str]:
    names = ["FSampler adaptive", "adaptive_nodes", "2M, plain grid", "2M, one grid of that density"]
    lines = [
        "",
        "## adaptive_nodes (experimental)",
        "",
        "Root mean square error to the exact flow, mean over 4 mixtures of 3 modes in 6 dimensions, 48 starts each. "
        "The controls get the mean number of calls, rounded up. The last column is 2M on one grid for all starts, "
        "made of quantiles of the nodes that 48 other starts chose.",
        "",
        f"| path, nodes, tol | mean calls | {' | '.join(names)} | |",
        "|---" * (len(names) + 3) + "|",
    ]
    for r in rows:
        controls = [r["2M, plain grid"], r["2M, one grid of that density"]]
        gain = min(controls) / r["adaptive_nodes"]
        verdict = f"{gain:.2f}x below the better control" if gain > 1 else "**no benefit found**"
        cells = " | ".join(f"{r[n]:.4f}" for n in names)
        lines.append(f"| {r['path']}, {r['nodes']}, {r['tol']} | {r['calls']:.1f} | {cells} | {verdict} |")
    return lines


def time_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "## Time of the hook",
        "",
        "1x4x64x64 float32, medians. The preset `FSamplerScheduler` has no hook.",
        "",
    ]
    lines += ["| scheduler | added to a real call | a skip |", "|---|---|---|"]
    for name, t in found.items():
        if name != "unet":
            lines.append(f"| {name} | {1e6 * t['real']:.0f} us | {1e6 * t['skip']:.0f} us |")
    if "unet" in found:
        worst = max(max(t.values()) for name, t in found.items() if name != "unet")
        lines += [
            "",
            f"One call of a UNet of the size of SD 1.5: {found['unet']:.2f} s. The largest of these is "
            f"{100 * worst / found['unet']:.4f} % of it (goal: at most 1 %).",
        ]
    return lines
