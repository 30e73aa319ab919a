"""`diffaccel tune MODEL --calls N --out recipe.json`. Imports nothing heavy until it runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..calibrate.command import add_model
from ..errors import OptionError

if TYPE_CHECKING:
    from ..parallel.protocol import World

EPILOG = """\
The recipe is applied by `with diffaccel.accelerate(pipe, "recipe.json") as h: h(prompt)`, or by `diffaccel generate
MODEL --recipe recipe.json ...`. Any other option of diffaccel.tune is passed with --set name=value. Stopped: the same
command goes on from OUT.partial."""
PASSED = ("images", "holdout", "teacher_steps", "guidance")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    p = commands.add_parser("tune", help="search the best way to run your checkpoint at N model calls", epilog=EPILOG)
    add_model(p, batch=16)
    p.add_argument("--calls", type=int, required=True, metavar="N", help="model calls an image")
    p.add_argument("--out", required=True, metavar="FILE", help="the recipe to write (.json)")
    p.add_argument("--guidance", type=float, metavar="G", help="guidance scale (default: the pipeline's)")
    p.add_argument("--images", type=int, metavar="S", help="images by which candidates are compared (default 48)")
    p.add_argument("--holdout", type=int, metavar="H", help="further images, which only judge (default 48)")
    p.add_argument("--teacher-steps", type=int, metavar="K", help="steps of the teacher (default 100)")
    p.add_argument(
        "--with",
        nargs="+",
        default=[],
        dest="more",
        metavar="SOURCE",
        help="further candidates, at equal work: staged, cache",
    )
    p.add_argument("--table", action="append", default=[], metavar="FILE", help="an artifact that competes, too")
    p.add_argument("--no-fit", action="store_true", help="fit no table")
    p.add_argument("--set", action="append", default=[], metavar="name=value", help="option of diffaccel.tune")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0: the recipe is written; 2: refused or failed; 130: stopped."""
    from ..artifact import Receipt
    from ..ranked import run_ranked

    def job(world: World) -> int:
        if world.size > 1:
            raise OptionError(f"tune runs in one process, not in {world.size}")
        made = _tune(args, world)
        print(f"wrote {args.out}: {made.choice.name}\n{made.receipt}\n{Receipt(made.spent)}")
        return 0

    return run_ranked(job, cpu=args.cpu, threads=args.threads)


def _tune(args: argparse.Namespace, world: World) -> Any:
    from ..calibrate.command import prepared, settings
    from .candidates import USUAL
    from .run import tune

    options = settings(args.set, {"calls": "--calls N", "tables": "--table FILE"})
    options |= {name: getattr(args, name) for name in PASSED if getattr(args, name) is not None}
    if args.more:
        options["sources"] = (*USUAL, *args.more)
    if args.no_fit:
        options["fit"] = False
    pipe, prompts, call = prepared(args, world)
    return tune(
        pipe, prompts, args.calls, tables=args.table, batch=args.batch, seed=args.seed, out=args.out, **options, **call
    )
