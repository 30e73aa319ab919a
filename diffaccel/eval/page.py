"""The report as one HTML file: pictures inlined, nothing fetched, readable on a wide screen and on a phone."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from .verdicts import METRICS, number, summaries

_STYLE = """
:root { --ink: #1d232b; --soft: #5d6873; --line: #dfe3e8; --good: #1a7f37; --bad: #b42318; --band: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 16px; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: .4rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
p, li { max-width: 80ch; } ul { padding-left: 1.2rem; } li { margin: .2rem 0; overflow-wrap: anywhere; }
.soft { color: var(--soft); font-size: .9rem; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.warn { background: #fff8e6; border: 1px solid #f0d48a; border-radius: 6px; padding: .5rem .8rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
.wide > img { display: block; max-width: none; }
table { border-collapse: collapse; font-size: .82rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { background: var(--band); font-weight: 600; vertical-align: bottom; }
td:first-child, th:first-child { text-align: left; position: sticky; left: 0; background: #fff;
  min-width: 9em; max-width: 19em; white-space: normal; overflow-wrap: anywhere; }
th:first-child { background: var(--band); }
tr.group td { background: var(--band); font-weight: 600; text-align: left; }
tr.stock td { color: var(--soft); } tr:last-child td { border-bottom: 0; }
.pair { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.pair img { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; }
code { background: var(--band); padding: .1em .3em; border-radius: 4px; overflow-wrap: anywhere; }
details { margin: .5rem 0; } summary { cursor: pointer; }
@media (max-width: 600px) { body { padding: 10px; font-size: 15px; } h1 { font-size: 1.25rem; }
  th, td { padding: .25rem .45rem; } td:first-child, th:first-child { min-width: 34vw; max-width: 38vw; }
  tr.group td { max-width: none; } }
"""


def page(report: Mapping[str, Any], pictures: Mapping[str, bytes], columns: Sequence[str]) -> str:
    """The whole file. report: what report.json holds. pictures: name -> PNG. columns: prompts of the grid."""
    title = f"{report['model']['name']}: quality against model calls"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p class=soft>{escape(_about(report))}</p>",
        _missing(report),
        "<h2>Verdicts</h2>",
        _verdicts(report["verdicts"]),
        "<h2>Quality</h2>",
        _plots(pictures),
        "<h2>All rows</h2>",
        f"<p class=soft>{escape(_legend(report))}</p>",
        _table(report),
        "<h2>What a call is worth</h2>",
        "<p class=soft>The same scheduler at two budgets, image by image. Positive: more calls are better.</p>",
        _worth(report),
        _grid(pictures, columns),
        "<h2>Notes and warnings</h2>",
        _list([*report["warnings"], *report["notes"]]) or "<p>None.</p>",
        "<h2>How to run this again</h2>",
        _again(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n'
        + "\n".join(p for p in parts if p)
        + "\n</body></html>\n"
    )


def _about(report: Mapping[str, Any]) -> str:
    model, where = report["model"], report["environment"]
    options = ", ".join(f"{k} {v}" for k, v in model["options"].items())
    return (
        f"{model['pipeline']}, {model['dtype']}; {options or 'options as shipped'}. {report['images']} images a row, "
        f"seeds from {model['seed']}, {report['prompts']} prompts, the same in every row. Reference: "
        f"{report['reference'] or 'none'}. {where['device']}, {where['threads']} threads."
    )


def _missing(report: Mapping[str, Any]) -> str:
    if not report["missing"]:
        return ""
    head = "<b>Not complete.</b> These rows are made of fewer images than asked for; the same command goes on."
    return f"<div class=warn>{head}{_list(report['missing'])}</div>"


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _verdicts(verdicts: Sequence[dict[str, Any]]) -> str:
    if not verdicts:
        return "<p>No scheduler to judge: only stock rows, or nothing measured yet.</p>"
    short = ""
    for one in summaries(verdicts):
        said = [_coloured(one["good"], True), escape(one["rest"])]
        short += f"<li>{escape(one['head'])} {'; '.join(x for x in said if x)}.</li>"
    items = []
    for verdict in verdicts:
        equal, saved = verdict.get("equal_calls"), ""
        if verdict["benefit"] and equal and equal > verdict["calls"]:
            saved = f" <span class=soft>(the best stock row needs {equal:g} calls for this)</span>"
        items.append(f"<li>{_coloured(verdict['text'], verdict['benefit'])}{saved}</li>")
    return (
        "<p class=soft>Against the best stock row with the same calls, paired image by image, 95 % intervals, Holm's "
        f"correction over the rows of a metric.</p><ul>{short}</ul>"
        f"<details><summary>Each metric with its interval</summary><ul>{''.join(items)}</ul></details>"
    )


def _coloured(text: str, good: bool) -> str:
    return f"<span class=good>{escape(text)}</span>" if good and text else escape(text)


def _image(data: bytes, text: str) -> str:
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _plots(pictures: Mapping[str, bytes]) -> str:
    names = (("quality_calls.png", "Quality against model calls"), ("quality_seconds.png", "Quality against seconds"))
    shown = [_image(pictures[name], text) for name, text in names if name in pictures]
    return f"<div class=pair>{''.join(shown)}</div>" if shown else "<p>Nothing measured yet.</p>"


def _legend(report: Mapping[str, Any]) -> str:
    floor = report["floor"]
    text = f"FID is {report['fid_label']}, corrected for the bias of few images, with its 95 % interval. "
    if floor:
        text += f"Two halves of the reference against each other: {number(floor['value'])}. "
    if report["teacher_gap"]:
        text += f"The teacher's own error: {report['teacher_gap']}. "
    return text + "Stock rows are grey. Best in each group: bold. bad: images that are black or hold a NaN."


# ---------------------------------------------------------------------- tables
_HEADS = ("scheduler", "calls made", "images", "FID", "PSNR, dB", "SSIM", "latent error", "CLIP score", "R-precision",
          "s / image", "bad")  # fmt: skip
_KEYS = ("fid", "psnr", "ssim", "latent", "clip")


def cell_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a row, flat: for the table and the CSV."""
    fid, clip, errors, seconds = row["fid"] or {}, row["clip"] or {}, row["errors"], row["seconds"]
    timed = seconds if isinstance(seconds, dict) else {}
    measured = {k: errors[k] if isinstance(errors.get(k), float) else None for k in ("psnr", "ssim", "lpips", "latent")}
    return {
        "name": row["name"],
        "role": row["role"],
        "calls": row["calls"],
        "calls_made": row["calls_made"],
        "images": row["images"],
        "images_missing": row["images_missing"],
        "fid": fid.get("value"),
        "fid_low": fid.get("low"),
        "fid_high": fid.get("high"),
        "fid_uncorrected": fid.get("raw"),
        **measured,
        "clip": clip.get("value"),
        "clip_low": clip.get("low"),
        "clip_high": clip.get("high"),
        "r_precision": clip.get("r_precision"),
        "seconds": timed.get("total"),
        "seconds_denoiser": timed.get("denoiser"),
        "bad": len(row["bad"]),
    }


def _table(report: Mapping[str, Any]) -> str:
    rows, body = report["rows"], []
    budgets = sorted({r["calls"] for r in rows if r["role"] in ("stock", "candidate")})
    ends = [r for r in rows if r["role"] in ("teacher", "half teacher")]
    groups = [(f"{n} calls", [r for r in rows if r["calls"] == n and r not in ends]) for n in budgets]
    for head, group in [*groups, ("teacher", ends)]:
        if not group:
            continue
        extra = " (added, to see what fewer calls do)" if group[0]["extra"] else ""
        body.append(f'<tr class=group><td colspan="{len(_HEADS)}">{head}{extra}</td></tr>')
        flat = [cell_values(r) for r in group]
        top = {key: _best(flat, key) for key in _KEYS} if head != "teacher" else {}
        body += [_tr(row, values, top) for row, values in zip(group, flat)]
    heads = "".join(f"<th>{h}</th>" for h in _HEADS)
    return f"<div class=wide><table><thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"


def _best(flat: Sequence[Mapping[str, Any]], key: str) -> float | None:
    known = [v[key] for v in flat if v[key] is not None]
    if len(known) < 2:
        return None
    return max(known) if METRICS[key][1] > 0 else min(known)


def _tr(row: Mapping[str, Any], values: Mapping[str, Any], top: Mapping[str, float | None]) -> str:
    def shown(key: str, text: str) -> str:
        return f"<b>{text}</b>" if values.get(key) is not None and values[key] == top.get(key) else text

    name = escape(f"{row['name']} {row['calls']}" if "teacher" in row["role"] else row["name"])
    if row["impossible"]:
        return f'<tr><td>{name}</td><td colspan="{len(_HEADS) - 1}">cannot make {row["calls"]} calls or fewer</td></tr>'
    made = "" if row["calls_made"] is None else str(row["calls_made"])
    if row["calls_made"] not in (None, row["calls"]):
        made = f'<span class=bad title="asked for {row["calls"]}">{made}</span>'
    count = f"{row['images']}" + (f" of {row['images'] + row['images_missing']}" if row["images_missing"] else "")
    fid = number(values["fid"])
    if values["fid_low"] is not None:
        fid += f" <span class=soft>[{number(values['fid_low'])}, {number(values['fid_high'])}]</span>"
    clip = number(values["clip"])
    bad = f"<span class=bad>{len(row['bad'])}</span>" if row["bad"] else "0"
    why = next((str(row["errors"][k]) for k in ("psnr",) if isinstance(row["errors"].get(k), str)), "")
    errors = [shown(k, number(values[k])) for k in ("psnr", "ssim", "latent")]
    if values["psnr"] is None and why:
        errors = [f'<span class=soft title="{escape(why)}">{escape(why.partition(":")[0])}</span>', *errors[1:]]
    seconds = number(values["seconds"]) if values["seconds"] is not None else ""
    rate = number(values["r_precision"])
    cells = [made, count, shown("fid", fid), *errors, shown("clip", clip), rate, seconds, bad]
    kind = " class=stock" if row["role"] == "stock" else ""
    return f"<tr{kind}><td>{name}</td>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>"


def _worth(report: Mapping[str, Any]) -> str:
    lines = []
    for head, key in (("most against fewest calls", "separation"), ("next fewer calls", "fewer")):
        if report[key]:
            lines.append(f'<tr class=group><td colspan="5">{head}</td></tr>')
        for one in report[key]:
            values = "".join(f"<td>{_difference(one[k])}</td>" for k in ("fid", "psnr", "clip"))
            budgets = f"{one['calls']} against {one['against']}"
            lines.append(f"<tr><td>{escape(one['name'])}</td><td>{budgets}</td>{values}</tr>")
    if not lines:
        return "<p>No scheduler was run at two budgets.</p>"
    heads = "<th>scheduler</th><th>calls</th><th>FID better by</th><th>PSNR better by, dB</th><th>CLIP better by</th>"
    return f"<div class=wide><table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _difference(one: Mapping[str, Any] | None) -> str:
    if one is None or one["better_by"] is None:
        return ""
    if one["low"] is None:
        return f"{number(one['better_by'])} <span class=soft>(too few images for an interval)</span>"
    text = f"{number(one['better_by'])} <span class=soft>[{number(one['low'])}, {number(one['high'])}]</span>"
    return f"<b>{text}</b>" if one["low"] > 0 else text


# ---------------------------------------------------------------------- the rest
def _grid(pictures: Mapping[str, bytes], columns: Sequence[str]) -> str:
    if "grid.png" not in pictures:
        return ""
    prompts = "".join(f"<li>{escape(p)}</li>" for p in columns)
    return (
        "<h2>The same seeds in every row</h2>"
        f"<div class=wide>{_image(pictures['grid.png'], 'Images: a row for each scheduler and budget')}</div>"
        f"<details open><summary>Prompts, left to right</summary><ol>{prompts}</ol></details>"
    )


def _again(report: Mapping[str, Any]) -> str:
    command = f"<p><code>{escape(report['command'])}</code></p>" if report["command"] else ""
    versions = ", ".join(f"{k} {v}" for k, v in report["environment"].items())
    return f"{command}<p class=soft>{escape(versions)}</p>"
