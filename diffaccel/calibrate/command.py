"""`diffaccel calibrate KIND MODEL --out FILE`, see `KINDS`. Imports nothing heavy until a command runs."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, no_leftover

if TYPE_CHECKING:
    from ..artifact import Artifact
    from ..parallel.protocol import World

KINDS = {
    "cache": "skip masks and variance compensation of a denoiser cache (quant_cache)",
    "dc": "DC-Solver: ratios of dynamic compensation for UniPC, DPM-Solver++ or DDIM",
    "ems": "DPM-Solver-v3: empirical model statistics",
    "fit": "a table fitted to the checkpoint's own many-step trajectories, for each number of calls",
    "search": "order, space, corrector and node of each call, searched for each number of calls",
    "ays": "Align Your Steps: a grid for stochastic samplers, for each number of calls",
    "align": "what the model is fed as t at each call, for each number of calls",
    "gauss": "mean and axes of the latents, for Gaussian teleportation",
    "epsilon": "the constant of epsilon scaling",
    "spectrum": "the power spectrum of the latents, for runs that change resolution",
}
# Options that are not passed with --set, and how they are written.
OWN = {"pipe": "MODEL", "prompts": "--prompts FILE", "out": "--out FILE", "batch": "--batch B", "seed": "--seed N"} | {
    "call": "--call key=value",
    "world": "torchrun --nproc-per-node P",
}
EPILOG = """\
Any option of diffaccel.calibrate.KIND is passed with --set name=value, such as --set pairs=32 or --set order=3.
Stopped: the same command goes on from OUT.partial. Several processes: torchrun --nproc-per-node P -m diffaccel ..."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser("calibrate", help="short runs on your checkpoint that end in an artifact")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, text in KINDS.items():
        p = kinds.add_parser(kind, help=text, epilog=EPILOG)
        add_model(p)
        p.add_argument("--out", required=True, metavar="FILE", help="the artifact to write (.safetensors)")
        p.add_argument("--guidance", type=float, nargs="+", metavar="G", help="scale (dc: or several)")
        p.add_argument("--set", action="append", default=[], metavar="name=value", help="option of the calibration")
        p.add_argument("--calls", type=int, nargs="+", metavar="N", help="numbers of model calls")
        if kind == "dc":
            p.add_argument("--sampler", metavar="NAME", help="unipc (default), dpmpp or ddim")
            p.add_argument("--grid", metavar="NAME", help="where the nodes are placed (default: the checkpoint's)")
            p.add_argument(
                "--objective", metavar="NAME", help="trajectory (default), or final: then the last state, too"
            )
        p.set_defaults(run=run)


def add_model(p: argparse.ArgumentParser, batch: int = 8) -> None:
    """The arguments that say which model runs on which prompts, and how."""
    p.add_argument("model", metavar="MODEL", help="tiny-sd, tiny-flow, tiny-pixel, a folder, or a hub id")
    p.add_argument("--prompts", metavar="FILE", help=".txt, .csv, .tsv, .json or .jsonl; used in turn")
    p.add_argument("--call", action="append", default=[], metavar="key=value", help="of the pipeline's call")
    p.add_argument("--batch", type=int, default=batch, metavar="B", help=f"images in one pass (default {batch})")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16 (default float32)")
    p.add_argument("--offload", choices=("none", "model", "sequential"), default="none", help="of diffusers")
    p.add_argument("--threads", type=int, default=1, metavar="T", help="CPU threads a process (default 1)")
    p.add_argument("--cpu", action="store_true", help="stay on the CPU")


def run(args: argparse.Namespace) -> int:
    """0: the artifact is written; 2: refused or failed; 130: stopped."""
    from ..ranked import run_ranked

    def job(world: World) -> int:
        made = _calibrate(args, world)
        if world.rank == 0:
            print(f"wrote {args.out}\n{made.receipt}")
        return 0

    return run_ranked(job, cpu=args.cpu, threads=args.threads)


def _calibrate(args: argparse.Namespace, world: World) -> Artifact:
    """Everything that a rank does."""
    from .. import calibrate

    function = getattr(calibrate, args.kind)
    known = inspect.signature(function).parameters
    options = settings(args.set)
    for name in ("calls", "sampler", "grid", "objective"):
        if getattr(args, name, None) is not None:
            options[name] = getattr(args, name)
    if len(args.guidance or ()) > 1 and args.kind != "dc":
        raise OptionError(f"--guidance takes several scales for dc alone; calibrate {args.kind} takes one at a time")
    if args.guidance is not None:
        options["guidance"] = args.guidance if len(args.guidance) > 1 else args.guidance[0]
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        no_leftover(f"calibrate {args.kind}", options, set(known) - {"pipe", "prompts", "out", "batch", "seed"})
    if world.size > 1:
        if "world" not in known:
            raise OptionError(f"calibrate {args.kind} runs in one process, not in {world.size}")
        options["world"] = world
    pipe, prompts, call = prepared(args, world)
    options |= {"call": call} if "call" in known and known["call"].kind is not inspect.Parameter.VAR_KEYWORD else call
    made: Artifact = function(pipe, prompts, out=args.out, batch=args.batch, seed=args.seed, **options)
    return made


def settings(texts: list[str], more: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The options of `--set`.

    Args:
        more: further options that have an argument of their own: name -> how it is written.

    Raises:
        OptionError: an option that has an argument of its own.
    """
    from ..key_values import key_values

    found = key_values(texts, "--set")
    for name, written in {**OWN, **(more or {})}.items():
        if name in found:
            raise OptionError(f"--set {name}=... has an argument of its own: give {written}")
    return found


def prepared(args: argparse.Namespace, world: World) -> tuple[Any, list[str], dict[str, Any]]:
    """The pipeline in its place, its prompts, and further arguments of its call, as `add_model`'s arguments say."""
    import diffusers
    import transformers

    from .. import models, painter
    from ..key_values import key_values
    from ..prompts import read_prompts

    call = models.CALL_DEFAULTS.get(args.model, {}) | key_values(args.call, "--call")
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipe = painter.load(args.model, args.dtype)
    prompts = read_prompts(args.prompts) if args.prompts else _own_prompts(args.model, pipe)
    if args.offload == "model":
        pipe.enable_model_cpu_offload(device=world.device)
    elif args.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=world.device)
    else:
        pipe.to(world.device)
    return pipe, prompts, call


def _own_prompts(model: str, pipe: Any) -> list[str]:
    """For embedded models, and models of classes: their own."""
    from .. import models
    from ..drive import classes

    count = classes(pipe)
    if count is not None:
        return [str(i) for i in range(count)]
    if model in models.names():
        return models.prompts(256)
    raise OptionError("--prompts FILE is needed: prompts like the ones that the model will be used with")
