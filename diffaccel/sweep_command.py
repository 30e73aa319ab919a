"""`diffaccel eval sweep`: quality against model calls, for schedulers by name."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from typing import TYPE_CHECKING, Any

from .errors import OptionError
from .generate_command import call_options
from .key_values import key_values
from .ranked import run_ranked

if TYPE_CHECKING:
    from .parallel.world import World

EPILOG = """\
A scheduler is a sampler (diffaccel samplers), a class of diffaccel, or one of diffusers, with its options:
deis:order=2:grid=karras,DPMSolverMultistepScheduler:use_karras_sigmas=true. Several processes: torchrun
--nproc-per-node 4 -m diffaccel eval sweep ...; stopped or killed: the same command goes on."""


def add_parser(metrics: Any) -> None:
    """Add the command to those of `diffaccel eval`."""
    p = metrics.add_parser("sweep", help="schedulers over budgets of model calls: table, plots, report", epilog=EPILOG)
    p.add_argument("model", metavar="MODEL", help="tiny-sd, tiny-flow, tiny-pixel, a folder, or a hub id")
    p.add_argument("--schedulers", default="", metavar="A,B", help="besides the stock ones, which are always there")
    p.add_argument("--stock", metavar="A,B", help="only these of the stock ones: own, 'DPM++ 2M', UniPC, ... or none")
    p.add_argument("--calls", required=True, metavar="5,8,10,20", help="budgets of model calls")
    p.add_argument("--out", required=True, metavar="DIR", help="folder of the report; a run that was stopped goes on")
    p.add_argument("--prompts", metavar="FILE", help="image i has prompt i mod P (default: an embedded model's own)")
    p.add_argument("--reference", metavar="B", help="for FID: images or statistics (default: an embedded model's own)")
    p.add_argument("--images", type=int, default=1000, metavar="N", help="of each row (default 1000)")
    p.add_argument("--seed", type=int, default=0, help="image i has the seed SEED + i (default 0)")
    p.add_argument("--batch", type=int, default=64, metavar="B", help="images in one pass (default 64)")
    p.add_argument("--block", type=int, metavar="K", help="images that are one unit of work (default about 256)")
    p.add_argument("--guidance", type=float, metavar="G", help="guidance scale (embedded models: 4)")
    p.add_argument("--height", type=int, metavar="H")
    p.add_argument("--width", type=int, metavar="W")
    p.add_argument("--call", action="append", default=[], metavar="key=value", help="argument of the pipeline's call")
    p.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16 (default float32)")
    p.add_argument("--features", help="feature network of FID (default: the reference's, else inception-v3:clean)")
    p.add_argument("--weights", help="file of Inception weights (default $DIFFACCEL_INCEPTION)")
    p.add_argument("--clip", metavar="M", help="model of the CLIP score, or none (default: CLIP ViT-B/16)")
    p.add_argument("--teacher-calls", type=int, default=100, metavar="N", help="0: no teacher (default 100)")
    p.add_argument("--teacher-images", type=int, default=512, metavar="N", help="compared with it (default 512)")
    p.add_argument("--threads", type=int, default=1, metavar="T", help="CPU threads a process (default 1)")
    p.add_argument("--cpu", action="store_true", help="stay on the CPU")
    p.add_argument("--processes", type=int, metavar="P", help="an error if it is another number of processes")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0: the report is there; 2: refused or failed; 130: stopped."""
    budgets = parse_calls(args.calls)
    named = parse_schedulers(args.schedulers)

    def job(world: World) -> int:
        found = _sweep(args, budgets, named, world)
        if world.rank == 0:
            print(found)
        return 0

    return run_ranked(job, cpu=args.cpu, threads=args.threads, processes=args.processes)


def parse_calls(text: str) -> list[int]:
    """Budgets written as "5,8,10,20"."""
    parts = text.replace(" ", "").split(",")
    if not all(p.isdecimal() and int(p) for p in parts):
        raise OptionError(f"--calls {text!r}: budgets are written 5,8,10,20")
    return [int(p) for p in parts]


def parse_schedulers(text: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """What is written as "deis:order=2,UniPCMultistepScheduler" -> {as written: (name, options)}."""
    found = {}
    for part in re.split(r",(?=\s*[A-Za-z])", text) if text.strip() else []:
        name, *options = re.split(r":(?=\w+=)", part.strip())
        if not name:
            raise OptionError(f"--schedulers {text!r}: a name is missing; write deis:order=2,unipc")
        if part.strip() in found:
            raise OptionError(f"--schedulers: {part.strip()} is given twice")
        found[part.strip()] = (name, key_values(options, f"--schedulers {name}:"))
    return found


def _stock(text: str | None) -> bool | list[str]:
    return True if text is None else [] if text == "none" else [part.strip() for part in text.split(",")]


def _sweep(
    args: argparse.Namespace, budgets: list[int], named: dict[str, tuple[str, dict[str, Any]]], world: World
) -> Any:
    """Everything that a rank does."""
    from .prompts import read_prompts

    # What is wrong in the command is found before minutes are spent on loading a model.
    prompts = None if args.prompts is None else read_prompts(args.prompts)
    call = call_options(args)
    for name, least in (("images", 2), ("batch", 1)):
        if getattr(args, name) < least:
            raise OptionError(f"--{name} is {least} or more, got {getattr(args, name)}")
    import diffusers
    import torch
    import transformers

    from . import models, painter
    from .eval import clip as clip_metric
    from .eval import sweep

    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    pipe = painter.load(args.model, args.dtype)
    reference, clip = args.reference, args.clip or clip_metric.DEFAULT
    if args.model in models.names():
        reference, clip = reference or "tiny-fashion", args.clip or "tiny-clip"
        call = models.CALL_DEFAULTS.get(args.model, {}) | ({} if args.model == "tiny-pixel" else SHOWN) | call
        if prompts is None:
            drawn = models.labels if args.model == "tiny-pixel" else models.prompts
            prompts = [str(p) for p in drawn(args.images, args.seed)]
    config = pipe.scheduler.config
    schedulers = {
        shown: painter.scheduler_for(config, type(pipe.scheduler), name, options)
        for shown, (name, options) in named.items()
    }
    return sweep(
        pipe.to(world.device),
        schedulers,
        budgets,
        prompts,
        reference,
        args.out,
        images=args.images,
        block=args.batch * max(1, round(256 / args.batch)) if args.block is None else args.block,
        batch=args.batch,
        seed=args.seed,
        options=call,
        stock=_stock(args.stock),
        features=args.features,
        weights=args.weights,
        clip=None if clip == "none" else clip,
        teacher_calls=args.teacher_calls,
        teacher_images=args.teacher_images,
        name=args.model,
        command=shlex.join(["diffaccel", *sys.argv[1:]]),
        world=world,
    )


SHOWN = {"guidance_scale": 4.0}  # at which the embedded models are best
