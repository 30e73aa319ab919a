"""`diffaccel generate`: images for many prompts and seeds, by one process or many."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .errors import OptionError
from .identity import check_guidance
from .key_values import key_values
from .ranked import run_ranked

if TYPE_CHECKING:
    from .parallel.generate import Report
    from .parallel.world import World

OWN = 16  # images of an embedded model where neither prompts nor seeds are given, as in `diffaccel demo`
EPILOG = """\
Several processes: torchrun --nproc-per-node 4 -m diffaccel generate ... (or accelerate launch -m diffaccel ..., or
srun). The images are the same for any number of processes. Stopped or killed: the same command goes on."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    p = commands.add_parser("generate", help="images for many prompts and seeds, on one or many devices", epilog=EPILOG)
    p.add_argument("model", nargs="?", metavar="MODEL", help="tiny-sd, tiny-flow, tiny-pixel, a folder, or a hub id")
    p.add_argument(
        "--prompts",
        metavar="FILE",
        help=".txt, .csv, .tsv, .json or .jsonl (default: an embedded model's own; a model of classes: all in turn)",
    )
    p.add_argument("--out", metavar="DIR", help="folder to fill; a run that was stopped goes on there")
    p.add_argument("--calls", type=int, metavar="N", help="model calls an image, exactly (a guidance pair counts once)")
    p.add_argument("--seeds", metavar="0-99", help="an image for each; prompts in turn (default: one a prompt, from 0)")
    p.add_argument("--batch", type=int, default=8, metavar="B", help="images in one pass (default 8)")
    p.add_argument("--scheduler", metavar="NAME", help="a sampler, or a scheduler class (default: the checkpoint's)")
    p.add_argument("--artifact", metavar="FILE", help="calibrated data of the scheduler (diffaccel calibrate)")
    p.add_argument("--recipe", metavar="FILE", help="of diffaccel tune: decides the scheduler and --calls")
    p.add_argument("--option", action="append", default=[], metavar="key=value", help="option of the scheduler")
    p.add_argument("--call", action="append", default=[], metavar="key=value", help="argument of the pipeline's call")
    p.add_argument("--guidance", type=float, metavar="G", help="guidance scale (default: the pipeline's)")
    p.add_argument("--height", type=int, metavar="H", help="pixels (default: the pipeline's)")
    p.add_argument("--width", type=int, metavar="W")
    p.add_argument("--dtype", default="float32", help="float32, float16 or bfloat16 (default float32)")
    p.add_argument("--threads", type=int, default=1, metavar="T", help="CPU threads a process (default 1)")
    p.add_argument("--cpu", action="store_true", help="stay on the CPU")
    p.add_argument("--processes", type=int, metavar="P", help="an error if it is another number of processes")
    p.add_argument("--verify", default="fast", help="'fast': finished images by size; 'full': by their pixels")
    p.add_argument("--status", metavar="DIR", help="say what is done, missing and damaged there; 0 if complete, else 1")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0: all images are there; 1: `--status` of an incomplete folder; 2: refused or failed; 3: some images failed, all
    others are there; 130: stopped."""
    if args.status:
        return _status(args)
    needed = ("out",) if args.recipe else ("out", "calls")
    missing = [f"--{k}" for k in needed if getattr(args, k) is None]
    missing = [*([] if args.model else ["MODEL"]), *missing]
    if missing:
        raise OptionError(f"generate needs {', '.join(missing)}; see diffaccel generate --help")

    def job(world: World) -> int:
        from .parallel.generate import FailedImages

        try:
            report = _generate(args, world)
        except FailedImages as error:
            if world.rank == 0:
                print(f"diffaccel: {error}", file=sys.stderr, flush=True)
            return 3
        if world.rank == 0:
            _print(report, args.out)
        return 0

    return run_ranked(job, cpu=args.cpu, threads=args.threads, processes=args.processes)


def _generate(args: argparse.Namespace, world: World) -> Report:
    """Everything that a rank does."""
    import torch

    from . import __version__
    from .parallel.folder import check_verify
    from .parallel.generate import generate, parse_seeds, tasks_for
    from .prompts import read_prompts

    # What is wrong in the command is found before minutes are spent on loading a model.
    check_verify(args.verify)
    seeds = None if args.seeds is None else parse_seeds(args.seeds)
    tasks = None if args.prompts is None else tasks_for(read_prompts(args.prompts), seeds)
    options, call = key_values(args.option, "--option"), call_options(args)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    import diffusers
    import transformers

    from . import drive, models, painter
    from .component_configs import component_configs

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipe = painter.load(args.model, args.dtype)
    if tasks is None:
        tasks = tasks_for(_own_prompts(args.model, pipe, seeds), seeds)
    empty = sum(not task.prompt for task in tasks)
    if empty and world.rank == 0:
        print(f"generate: {empty} of {len(tasks)} images have an empty prompt", file=sys.stderr)
    if args.artifact:
        options |= {"artifact": args.artifact, "pipe": pipe}
    tuned = {}
    if args.recipe:
        tuned = {"recipe": _accelerated(pipe, args)}
    else:
        pipe.scheduler = painter.scheduler_for(pipe.scheduler.config, type(pipe.scheduler), args.scheduler, options)
    if args.artifact and args.guidance is not None:
        check_guidance(pipe.scheduler.artifact, args.guidance)
    call = drive.sized(pipe, models.CALL_DEFAULTS.get(args.model, {}) | call)
    recipe = tuned | {
        "pipeline": type(pipe).__name__,
        "weights": drive.fingerprint(pipe),
        "configs": component_configs(pipe),
        "scheduler": {"class": type(pipe.scheduler).__name__, "config": drive.plain_config(pipe.scheduler)},
        "calls": args.calls,
        "call": call,
        "dtype": args.dtype,
        "device": world.device.type,
        "threads": args.threads if world.device.type == "cpu" else None,
    }
    environment = {"diffaccel": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__}
    if world.device.type == "cuda":
        environment["device"] = torch.cuda.get_device_name(world.device)
    paint = painter.Painter(pipe.to(world.device), args.calls, call, world.check)
    if world.rank == 0:
        chunks = -(-len(tasks) // max(1, args.batch))
        print(
            f"generate: {len(tasks)} images in {chunks} chunks, {args.calls} model calls each, {world.size} "
            f"process{'es' if world.size > 1 else ''} on {world.device.type}",
            file=sys.stderr,
        )
    return generate(
        paint,
        tasks,
        args.out,
        batch=args.batch,
        recipe=recipe,
        environment=environment,
        scheduler=drive.scheduler_name(pipe.scheduler),
        world=world,
        progress=world.rank == 0,
        verify=args.verify,
    )


def _accelerated(pipe: Any, args: argparse.Namespace) -> str:
    """Apply --recipe to the pipeline, and take its number of calls; returns the recipe's checksum."""
    from .pipelines.accelerate import accelerate

    given = [f"--{name}" for name in ("scheduler", "artifact", "option") if getattr(args, name)]
    if given:
        raise OptionError(f"--recipe decides the scheduler and its options: leave out {', '.join(given)}")
    made = accelerate(pipe, args.recipe).recipe
    if "check_finite" in pipe.scheduler.config:  # a NaN is counted image by image; an error would end the whole run
        pipe.scheduler.register_to_config(check_finite="never")
    if args.calls not in (None, made.choice.calls):
        raise OptionError(
            f"{args.recipe} is a recipe for {made.choice.calls} model calls, not for --calls {args.calls}"
        )
    args.calls = made.choice.calls
    if args.guidance is not None:
        check_guidance(made.as_artifact(), args.guidance)
    return made.sha256


def _own_prompts(model: str, pipe: Any, seeds: Sequence[int] | None) -> list[str]:
    """Without --prompts: classes in turn, no more of them than images; of an embedded model a text for each image."""
    from . import models
    from .drive import classes

    number = classes(pipe)
    if number is not None:
        return [str(k) for k in range(number if seeds is None else min(number, len(seeds)))]
    if model in models.names():
        return models.prompts(OWN if seeds is None else len(seeds))
    raise OptionError(f"generate needs --prompts: {type(pipe).__name__} makes images of texts")


def _print(report: Report, out: str) -> None:
    rate = f", {report.made / report.seconds:.2f} images/s" if report.made else ""
    print(
        f"generate: {out} is complete: {report.images} images; {report.made} made now in {report.seconds:.1f} s by "
        f"{report.processes} process{'es' if report.processes > 1 else ''}{rate}"
    )
    for what, found in (("hold a NaN (saved black there)", report.nan), ("are black everywhere", report.black)):
        if found:
            shown = ", ".join(map(str, found[:10])) + (", ..." if len(found) > 10 else "")
            print(f"generate: {len(found)} images {what}: {shown}")


def _status(args: argparse.Namespace) -> int:
    from .parallel.generate import status

    found = status(args.status, verify=args.verify)
    print(
        f"{args.status}: {found['done']} of {found['images']} images done, {len(found['missing'])} missing, "
        f"{len(found['damaged'])} damaged, {len(found['nan'])} with NaN, {len(found['black'])} black"
    )
    if found["failed"]:
        print(f"{args.status}: of the missing, {len(found['failed'])} failed; failed.jsonl says why")
    return 0 if found["done"] == found["images"] else 1


def call_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline's call: of --call, --guidance, --height and --width."""
    found = key_values(args.call, "--call")
    for name, key in (("guidance", "guidance_scale"), ("height", "height"), ("width", "width")):
        value = getattr(args, name)
        if value is None:
            continue
        if key in found:
            raise OptionError(f"--{name} {value} and --call {key}={found[key]} are the same option: give one of them")
        if not math.isfinite(value):
            raise OptionError(f"--{name} is a finite number, got {value}")
        found[key] = value
    return found
