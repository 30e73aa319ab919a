"""Every registered sampler and variant on every path, grid, number of calls (1 to 50) and end: is every state finite?

    python benchmarks/finite_anywhere.py [--jobs 2] [--drawn 10000] [--out docs/results/finite.json]

Beside all runs from the first call, `--drawn` runs with random settings, half of which begin at another call. Hours of
CPU; a second call goes on where the first one stopped (finished samplers are in --out).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from diffaccel.samplers.registry import samplers
from diffaccel.testing.anywhere import check_anywhere, drawn, every, laid
from diffaccel.testing.checks import LARGEST

Case = tuple[str, dict[str, Any], int]


def cases(count: int) -> Iterator[Case]:
    """(sampler, options, drawn runs): each with its defaults and with each variant."""
    for name, sampler in samplers().items():
        for options in ({}, *sampler.variants):
            yield name, dict(options), count


def label(case: Case) -> str:
    return f"{case[0]} {case[1]}" if case[1] else case[0]


def measured(case: Case) -> tuple[str, dict[str, Any]]:
    """(label, what was found)."""
    name, options, count = case
    found = check_anywhere(samplers()[name], options, chain(every(), drawn(count)))
    return label(case), {"finite": found.passed, "largest": found.value, "where": found.detail}


def page(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = found["rows"]
    bad = sum(not row["finite"] for row in rows.values())
    lines = [
        "# Is every state finite?",
        "",
        "Written by `python benchmarks/finite_anywhere.py --out docs/results/finite.json`.",
        "",
        f"Every registered sampler and variant, on all {found['paths and grids']} pairs of a path and a grid, with "
        f"{found['calls']} calls, ending at sigma = 0 or above; and {found['drawn']} runs drawn at random, half of "
        "which begin at another call than the first. Predictions are a function of the state with values in [-1, 1]. "
        f"*Largest* is the largest state, in units of hypot(alpha, sigma) (it begins with 2.5); above {LARGEST:g} "
        f"counts as not finite. **{bad} of {len(rows)} fail.**",
        "",
        "| sampler | largest | where; runs |",
        "|---|---|---|",
        *(f"| `{name}` | {row['largest']:.3g} | {row['where']} |" for name, row in rows.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--drawn", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("finite.json"))
    args = parser.parse_args()
    rows: dict[str, Any] = json.loads(args.out.read_text())["rows"] if args.out.exists() else {}
    head = {"paths and grids": len(laid()), "calls": "1 to 50", "drawn": args.drawn}
    todo = [case for case in cases(args.drawn) if label(case) not in rows]
    with multiprocessing.Pool(args.jobs) as pool:
        for name, row in pool.imap_unordered(measured, todo):
            rows[name] = row
            print(
                f"{'ok    ' if row['finite'] else 'FAILED'} {row['largest']:10.3g}  {name}: {row['where']}", flush=True
            )
            args.out.write_text(json.dumps({**head, "rows": dict(sorted(rows.items()))}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(page(json.loads(args.out.read_text())))
    bad = [name for name, row in rows.items() if not row["finite"]]
    print(
        f"{len(rows)} samplers and variants, {len(bad)} with a state above the limit" + "".join(f"\n  {b}" for b in bad)
    )


if __name__ == "__main__":
    main()
