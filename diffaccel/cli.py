"""The command line: `diffaccel demo | samplers | certify | generate | calibrate | tune | eval`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .calibrate.command import add_parser as add_calibrate
from .errors import DiffaccelError
from .eval import command as eval_command
from .generate_command import add_parser as add_generate
from .key_values import key_values
from .sweep_command import add_parser as add_sweep
from .tune.command import add_parser as add_tune


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it succeeded, 2 with one line on standard error if diffaccel refused."""
    parser = argparse.ArgumentParser(prog="diffaccel", description="Fewer model calls for diffusion pipelines.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    listed = commands.add_parser("samplers", help="list the samplers, their orders, options and papers")
    listed.set_defaults(run=lambda a: _samplers())
    certify = commands.add_parser("certify", help="certificate of a sampler: measured order, memory, exactness")
    certify.add_argument("sampler", help="a registered name, or module:function of a loop")
    certify.add_argument("options", nargs="*", metavar="key=value", help="options of the sampler")
    certify.add_argument("--cases", type=int, default=0, help="also so many runs drawn at random (default 0)")
    certify.set_defaults(run=_certify)
    add_generate(commands)
    add_calibrate(commands)
    add_tune(commands)
    add_sweep(eval_command.add(commands))
    args = parser.parse_args(argv)
    try:
        return int(args.run(args) or 0)
    except DiffaccelError as error:
        print(f"diffaccel: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `diffaccel samplers | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser("demo", help="the embedded pipeline: stock schedulers and ours from the same noise")
    demo.add_argument("--model", default="tiny-sd", help="an embedded model (default tiny-sd)")
    demo.add_argument("--calls", type=int, default=8, help="budget of model calls (default 8)")
    demo.add_argument("--images", type=int, default=16, help="how many images (default 16)")
    demo.add_argument("--guidance", type=float, default=4.0, help="guidance scale (default 4)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--out", default="demo", help="folder for report.json and grid.png (default demo/)")
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    import torch

    from .demo import demo

    torch.set_num_threads(1)  # the models are so small that further threads cost more than they give
    demo(args.model, calls=args.calls, images=args.images, guidance=args.guidance, out=args.out, seed=args.seed)
    return 0


def _samplers() -> int:
    from .samplers.registry import samplers

    for name, found in samplers().items():
        options = ", ".join(f"{k}={v!r}" for k, v in found.defaults.items())
        order = found.order_of()
        kind = "stochastic" if found.stochastic else "deterministic"
        about = f"order {order:g}, space {found.space_of(found.defaults)}, {kind}"
        print(f"{name:14s} {about}; {found.paper}\n{'':14s} options: {options or 'none'}")
    return 0


def _certify(args: argparse.Namespace) -> int:
    from .testing.certify import certify, find

    certificate = certify(find(args.sampler), key_values(args.options, "an option"), args.cases)
    print(certificate)
    return 0 if certificate.passed else 1
