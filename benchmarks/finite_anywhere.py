"""Every registered sampler and variant on every path, grid, number of calls (1 to 50) and end: is every state finite?

    python benchmarks/finite_anywhere.py [--jobs 2] [--drawn 10000] [--out docs/results/finite.json]

Beside all runs from the first call, `--drawn` runs with random settings, nearly half of which begin at another call.
Hours of CPU; a second call goes on where the first one stopped (finished samplers are in --out).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from diffaccel.samplers.registry import samplers
from diffaccel.testing.anywhere import check_anywhere, drawn, every
from diffaccel.testing.certify import label
from diffaccel.testing.checks import LARGEST
from diffaccel.testing.runs import laid

Case = tuple[str, dict[str, Any]]


def cases() -> Iterator[Case]:
    """(sampler, options): each with its defaults and with each variant."""
    for name, sampler in samplers().items():
        for options in sampler.settings:
            yield name, dict(options)


def measured(count: int, case: Case) -> tuple[str, dict[str, Any]]:
    """(label, what was found), in all runs and in `count` drawn ones."""
    name, options = case
    found = check_anywhere(samplers()[name], options, chain(every(), drawn(count)))
    return label(name, options), {"finite": found.passed, "largest": found.value, "where": found.detail}


def page(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    rows = found["rows"]
    bad = sum(not row["finite"] for row in rows.values())
    lines = [
        "# Is every state finite?",
        "",
        f"Written by `python benchmarks/finite_anywhere.py --drawn {found['drawn']} --out docs/results/finite.json`.",
        "",
        f"Every registered sampler and variant, on all {found['paths and grids']} pairs of a path and a grid, with "
        f"{found['calls']} calls, ending at sigma = 0 or above; and {found['drawn']} runs drawn at random, nearly "
        "half of which begin at another call than the first. Predictions are a function of the state with values in "
        "[-1, 1]. *Largest* is the largest state, in units of hypot(alpha, sigma) (it begins with 2.5); above "
        f"{LARGEST:g} counts as not finite. **{bad} of {len(rows)} fail.**",
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
    head = {"paths and grids": len(laid()), "calls": "1 to 50", "drawn": args.drawn}
    kept = json.loads(args.out.read_text()) if args.out.exists() else {**head, "rows": {}}
    rows: dict[str, Any] = kept.pop("rows")
    if kept != head:
        parser.error(f"{args.out} is of other runs ({kept}, not {head}): name another file, or the same --drawn")
    todo = [case for case in cases() if label(*case) not in rows]
    with multiprocessing.Pool(args.jobs) as pool:
        for name, row in pool.imap_unordered(partial(measured, args.drawn), todo):
            rows[name] = row
            print(
                f"{'ok    ' if row['finite'] else 'FAILED'} {row['largest']:10.3g}  {name}: {row['where']}", flush=True
            )
            args.out.write_text(json.dumps({**head, "rows": dict(sorted(rows.items()))}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(page({**head, "rows": dict(sorted(rows.items()))}))
    bad = [name for name, row in rows.items() if not row["finite"]]
    print(
        f"{len(rows)} samplers and variants, {len(bad)} with a state above the limit" + "".join(f"\n  {b}" for b in bad)
    )


if __name__ == "__main__":
    main()
