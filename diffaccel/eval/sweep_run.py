"""`sweep`: quality against model calls and seconds, for several schedulers on the same seeds and prompts."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..component_configs import component_configs
from ..drive import Driver, classes, fingerprint
from ..errors import DiffaccelError, OptionError, RunError
from ..parallel.agree import same_on_all
from ..parallel.folder import locked
from ..parallel.generate import to_pixels
from ..parallel.world import SoloWorld, World
from ..prompts import read_prompts
from . import clip as clip_metric
from .cells import CANDIDATE, HALF, STOCK, TEACHER, Block, Cell, Plan, Store, cell_folder
from .measure import Meter, reference_name, save_reference
from .plots import drawing
from .report_run import Report, write_report
from .rivals import Setting, rivals
from .rivals import teacher as stock_teacher
from .turns import take_turns


def sweep(
    pipe: Any,
    schedulers: Mapping[str, Any],
    calls: Sequence[int],
    prompts: str | Path | Sequence[str] | None = None,
    reference: Any = None,
    out: str | Path = "report",
    *,
    images: int = 1000,
    block: int = 256,
    batch: int = 64,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    features: Any = None,
    weights: Any = None,
    clip: str | None = clip_metric.DEFAULT,
    stock: bool | Sequence[str] = True,
    teacher: Any = None,
    teacher_calls: int = 100,
    teacher_images: int = 512,
    name: str | None = None,
    command: str = "",
    world: World | None = None,
    progress: bool = True,
) -> Report:
    """Run schedulers at several numbers of model calls, and write the report to `out`.

    Always there besides `schedulers`: the pipeline's own, the second-order solvers of diffusers that its path admits,
    fewer calls than the smallest budget, and a teacher. Blocks that `out` holds already are not made again; a run that
    was stopped goes on with the same call, by any number of processes.

    Args:
        pipe: a diffusers pipeline; its scheduler is put back afterwards.
        schedulers: name -> scheduler object. One of diffusers' own classes counts as stock.
        calls: budgets of model calls (a guidance pair counts once).
        prompts: a file or a list; image i has prompt i mod P. None for a class-conditional pipeline: its classes.
        reference: for FID, whatever `fid` takes; None: no FID.
        out: the folder, seen by all processes.
        images: of each cell (a scheduler at a budget). Image i has the seed `seed + i`.
        block: images that are one unit of work. batch: images in one pass, a part of a block; both change images by
            rounding, so they are part of what an image depends on.
        options: further arguments of the pipeline's call (guidance_scale, height, ...).
        features, weights: the feature network of FID; default: the reference's.
        clip: model of the CLIP score; None: no CLIP score. Without text prompts there is none.
        stock: which schedulers of diffusers are added: True: all; names ("own", "DPM++ 2M", "UniPC", "flow Euler with
            all sigmas"); False: none, and then no verdict.
        teacher: a deterministic scheduler; default: diffusers' second-order solver.
        teacher_calls: its budget (and half of it, to see its own error). 0: no teacher, no paired errors.
        teacher_images: the first so many images are compared with it.
        name: of the model, for the title. command: how to run this again, for the report.
        world: this process among the others (`open_world()`); alone if None.
        progress: whether rank 0 shows a bar and its notes.

    Raises:
        OptionError: what is wrong in the arguments, before the first image.
        RunError: a batch failed; the message names it.
    """
    drawing()  # what the report needs is missed before hours are spent
    device = torch.device(pipe.device)
    world = world or SoloWorld(device)
    driver = Driver(pipe, options or {}, world.check)
    texts = driver.key == "prompt"
    given = _prompts(pipe, prompts, texts)
    _check(calls, images, block, batch, teacher_calls, teacher_images)
    if not 0 <= seed <= 2**63 - images:
        raise OptionError(f"seeds are 0 or more and below 2**63, got {seed} for the first of {images} images")
    settings, notes = _settings(pipe, schedulers, stock, driver.takes_sigmas)
    last = stock_teacher(pipe.scheduler) if teacher is None else Setting("teacher", teacher)
    meter = Meter.open(reference, features, weights, clip if texts else None, str(device))
    if not texts:
        notes.append("class labels instead of texts: no CLIP score")
    elif clip is None:
        notes.append("CLIP score was not asked for")
    recipe = {
        "pipeline": type(pipe).__name__,
        "weights": fingerprint(pipe),
        "options": driver.options,
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "device": device.type,
        "seed": seed,
        "block": block,
        "batch": batch,
        "prompts": given,
    }
    wanted = _cells(settings, last, sorted(set(calls)), images, teacher_calls, min(teacher_images, images), recipe)
    store = Store(out)
    with _alone(store, world):
        # all of a reference is read for its name: by one process
        own_name = json.dumps(reference_name(reference, meter)).encode() if world.rank == 0 else None
        plan = Plan(
            recipe={
                **{k: v for k, v in recipe.items() if k != "prompts"},
                "name": name or type(pipe).__name__,
                "configs": component_configs(pipe),
            },
            prompts=given,
            texts=texts,
            images=images,
            block=block,
            batch=batch,
            calls=sorted(set(calls)),
            cells=[cell for cell, _ in wanted],
            reference=json.loads(world.broadcast("reference", own_name, timeout=None)),
            features=meter.features,
            clip=meter.clip,
            notes=notes,
            environment=environment(device),
            command=command,
        )
        same_on_all(world, "sweep", json.loads(json.dumps(asdict(plan))))
        if world.rank == 0:
            store.begin(plan)
            save_reference(plan.reference, meter, store)
        chosen = {cell.folder: setting for cell, setting in wanted}
        own = pipe.scheduler
        try:
            _paint_all(store, plan, chosen, driver, world, progress)
        finally:
            pipe.scheduler = own
        meter.measure_all(store, plan, world, progress)
        written = write_report(store, plan, meter) if world.rank == 0 else None
        world.broadcast("report", b"", timeout=None)
    return written or Report.read(store.root)


def _prompts(pipe: Any, prompts: Any, texts: bool) -> list[str]:
    if prompts is not None:
        if not isinstance(prompts, (str, Path)):
            prompts = list(prompts) if texts else [str(p) for p in prompts]
        return read_prompts(prompts)
    number = classes(pipe)
    if number is None:
        raise OptionError(f"{type(pipe).__name__} makes images of texts: give prompts (a file or a list)")
    return [str(k) for k in range(number)]


def _check(calls: Sequence[int], images: int, block: int, batch: int, teacher_calls: int, teacher_images: int) -> None:
    if not calls or min(calls) < 1:
        raise OptionError(f"calls are budgets of 1 model call or more, got {list(calls)}")
    if teacher_calls and teacher_calls < 2 * max(calls):
        raise OptionError(f"a teacher of {teacher_calls} calls is none for {max(calls)} calls: give twice that, or 0")
    for what, value in (("images", images), ("block", block), ("batch", batch), ("teacher_images", teacher_images)):
        least = 2 if what == "images" else 1
        if value < least:
            raise OptionError(f"{what} is {least} or more, got {value}")
    if block % batch:
        raise OptionError(f"a block of {block} images cannot be made in batches of {batch}")


def _settings(
    pipe: Any, schedulers: Mapping[str, Any], stock: bool | Sequence[str], takes_sigmas: bool
) -> tuple[list[Setting], list[str]]:
    found, notes = rivals(pipe.scheduler, takes_sigmas, stock)
    for name, scheduler in schedulers.items():
        if name in {s.name for s in found} or name == "teacher":
            raise OptionError(f"a scheduler cannot be called {name!r}: that row is in every sweep")
        if not hasattr(scheduler, "set_timesteps"):
            raise OptionError(f"{name}: a scheduler object is needed, got {type(scheduler).__name__}")
        found.append(Setting(name, scheduler))
    if not found:
        raise OptionError("nothing to sweep: no schedulers, and stock=False")
    return found, notes


def _cells(
    settings: Sequence[Setting],
    teacher: Setting,
    calls: Sequence[int],
    images: int,
    teacher_calls: int,
    teacher_images: int,
    recipe: Mapping[str, Any],
) -> list[tuple[Cell, Setting]]:
    """All cells; each setting also at fewer calls than the smallest budget, to see what a call is worth there."""
    found = []

    def add(setting: Setting, budget: int, role: str, count: int, extra: bool = False) -> None:
        folder = cell_folder(setting.name, budget, {**recipe, "calls": budget, "scheduler": setting.recipe})
        steps = setting.steps(budget)
        if not (extra and steps is None):
            cell = Cell(setting.name, budget, role, count, folder, steps, extra, setting.recipe)
            found.append((cell, setting))

    if teacher_calls:
        add(teacher, teacher_calls, TEACHER, teacher_images)
        add(teacher, teacher_calls // 2, HALF, teacher_images)
    fewer = round(0.75 * calls[0])
    for setting in settings:
        role = STOCK if setting.stock else CANDIDATE
        if 0 < fewer < calls[0]:
            add(setting, fewer, role, images, extra=True)
        for budget in calls:
            add(setting, budget, role, images)
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, and what the seconds were measured on."""
    import diffusers

    from .. import __version__

    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "diffaccel": __version__,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": chip,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@contextmanager
def _alone(store: Store, world: World) -> Iterator[None]:
    """Rank 0 keeps a second sweep out of the folder."""
    if world.rank:
        yield
        return
    with locked(store.folder):
        yield


# ---------------------------------------------------------------------- painting
def _paint_all(
    store: Store, plan: Plan, settings: Mapping[str, Setting], driver: Driver, world: World, progress: bool
) -> None:
    """The blocks that are missing. Block after block, each for all cells: what a stopped run leaves can be compared."""
    units = [(c, b) for c in plan.cells for b in c.blocks(plan.block)]
    units.sort(key=lambda unit: unit[1].first)
    mine, show = count(), progress and world.rank == 0
    left = [u for u in units if not store.done(*u)] if show else []

    def work(cell: Cell, block: Block) -> None:
        first = next(mine) == 0
        arrays = paint(driver, settings[cell.folder], cell, plan, block, first)
        store.write(cell, block, arrays)
        if first and show:
            _say_how_long(json.loads(str(arrays["counted"])), arrays, left, world.size)

    if show:
        here = f"{len(units) - len(left)} of them are there already"
        print(f"sweep: {len(plan.cells)} cells, {len(units)} blocks, {here}", file=sys.stderr)
    take_turns(
        units,
        lambda cell, block: not store.done(cell, block),
        work,
        lambda cell, block: cell.calls * len(block),
        world,
        name="paint",
        unit="call",
        progress=progress,
    )


def _say_how_long(counted: Mapping[str, Any], arrays: Mapping[str, Any], left: Sequence[Any], processes: int) -> None:
    """After the first block: about what the rest takes."""
    images, calls = (sum(f(c, b) for c, b in left) for f in (lambda c, b: len(b), lambda c, b: c.calls * len(b)))
    minutes = counted["seconds"] / counted["calls"] * calls / processes / 60
    bytes_ = sum(a.nbytes for a in arrays.values()) / counted["images"] * images
    print(f"sweep: about {minutes:.1f} minutes and {bytes_ / 1e6:.0f} MB, judged by the first block", file=sys.stderr)


def paint(driver: Driver, setting: Setting, cell: Cell, plan: Plan, block: Block, first: bool) -> dict[str, Any]:
    """Make a block. first: whether it is this process's first, whose seconds are not to be trusted."""
    driver.pipe.scheduler = setting.scheduler
    steps = cell.steps or 0  # never 0: a cell that cannot be made has no blocks
    made, pixels, flaws = [], [], []
    more = {"sigmas": np.linspace(1.0, 1.0 / steps, steps).tolist()} if setting.ramp else {}
    for start in range(block.first, block.last + 1, plan.batch):
        numbers = range(start, min(start + plan.batch, block.last + 1))
        generators = [torch.Generator("cpu").manual_seed(plan.recipe["seed"] + i) for i in numbers]
        try:
            run = driver([plan.prompt(i) for i in numbers], generators, steps, latents=True, **more)
        except DiffaccelError:
            raise
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0]
            raise RunError(
                f"{cell.label}, images {numbers[0]} to {numbers[-1]}: {type(error).__name__}: {text}"
            ) from error
        made.append(run)
        for image in run.images:
            one, flaw = to_pixels(image)
            pixels.append(one)
            flaws.append(flaw)
    if len({run.calls for run in made}) > 1:
        raise RunError(f"{cell.label}: the number of calls changes from batch to batch: {[run.calls for run in made]}")
    counted = {
        "calls": made[0].calls,
        "images": len(block),
        "digests": [hashlib.sha1(p.tobytes()).hexdigest()[:16] for p in pixels],
        "seconds": sum(run.seconds for run in made) / len(block),
        "inside": sum(run.inside for run in made) / len(block),
        "noisy": any(run.noisy for run in made),
        "first": first,
        **environment(torch.device(driver.pipe.device)),
        "bad": [block.first + i for i, flaw in enumerate(flaws) if flaw],
    }
    arrays = {"images": np.stack(pixels), "counted": np.array(json.dumps(counted))}
    states = [run.latents for run in made]
    if all(s is not None for s in states):
        arrays["latents"] = torch.cat([s for s in states if s is not None]).numpy()
    return arrays
