"""Certificates of all registered samplers, as the page `docs/samplers.md`: measured orders, memory, papers.

python benchmarks/bench_orders.py [--out docs/samplers.md]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from diffaccel.samplers.registry import samplers
from diffaccel.testing.certify import Certificate, certify

HEAD = """# Samplers

Written by `python benchmarks/bench_orders.py --out docs/samplers.md`: every number was measured in that run.

*Order* is the slope of the error on a mixture of Gaussians with exact scores, in float64, where the sampler's full
rows are measured alone (starting rows of lower order would hide them); for samplers that draw noise it is the weak
order. *Keeps* is the number of predictions that a run holds (the current one included), + registers.
*Same method* names registered samplers whose states are equal on a run of 12 uneven steps.

| sampler | order declared | order measured | intervals at 8 calls | keeps | checks passed | same method |
|---|---|---|---|---|---|---|
"""


def line(found: Certificate, eight: int) -> str:
    """One row of the table."""
    keeps = str(found.depth) + (f" + {found.registers}" if found.registers else "")
    noise = ", noise" if found.draws else ""
    passed = f"{sum(r.passed for r in found.results)} of {len(found.results)}"
    return (
        f"| `{found.sampler}`{noise} | {found.declared:g} | {found.measured:.2f} | {eight} | {keeps} | {passed} | "
        f"{', '.join(f'`{s}`' for s in found.same) or '-'} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines, failed = [], 0
    for sampler in samplers().values():
        for options in sampler.settings:
            found = certify(sampler, options)
            failed += not found.passed
            lines.append(line(found, sampler.intervals_of(8, **options)))
            print(lines[-1], flush=True)
    papers = [
        f"- `{s.name}`: {s.paper}. Options: {', '.join(f'`{k}={v!r}`' for k, v in s.defaults.items()) or 'none'}."
        for s in samplers().values()
    ]
    text = HEAD + "\n".join(lines) + "\n\n## Papers and options\n\n" + "\n".join(papers) + "\n"
    if args.out:
        args.out.write_text(text)
    print(f"{failed} of {len(lines)} settings failed a check")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
