"""Many images by any number of processes: the same bytes whatever that number is, and resumable at any point.

Image i depends on the recipe, its prompt, its seed and the chunk that it is computed in. Chunks are consecutive images
of a fixed number, so no batch depends on who computes it. Processes meet once at the start (what is left to do) and
once at the end (all lines are written); between, none waits for another.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import OptionError, RunError
from .agree import same_on_all
from .chunk import ChunkError, painted, saved, usable
from .chunk import Paint as Paint
from .chunk import Painted as Painted
from .chunk import Task as Task
from .chunk import to_pixels as to_pixels
from .folder import Folder, FolderError, Record, check_verify, locked
from .world import SoloWorld, World

MOST = 10_000_000  # images
STALL = 1800.0  # seconds in which a rank must begin a model call


class FailedImages(RunError):
    """Some chunks could not be painted; all others are made and kept.

    Attributes:
        images: indexes of the images that are missing for it.
    """

    def __init__(self, message: str, images: Sequence[int]) -> None:
        super().__init__(message)
        self.images = list(images)


@dataclass(frozen=True)
class Report:
    """The state of a folder after a run.

    Args:
        images: whole images with a line.
        made: of these, made by this run.
        seconds: of this run, from the first chunk to the last of all processes.
        processes: that took part.
        nan: indexes of images that held a NaN (saved black there).
        black: indexes of images that are black everywhere.
    """

    images: int
    made: int
    seconds: float
    processes: int
    nan: list[int]
    black: list[int]


# ---------------------------------------------------------------------- what to make
def parse_seeds(text: str) -> range | list[int]:
    """Seeds written as "0-99", "7" or "0-9,20,30-39" (both ends count).

    Raises:
        OptionError: another form, a range that runs backwards, a seed of 2**63 or more, or too many.
    """
    parts = []
    for part in text.replace(" ", "").split(","):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise OptionError(f"--seeds {text!r}: {part!r} is no seed and no range; write 7, 0-99 or 0-9,20,30-39")
        a, b = int(first), int(last or first)
        if b < a:
            raise OptionError(f"--seeds {text!r}: the range {part} runs backwards; write {b}-{a}")
        if b >= 2**63:
            raise OptionError(f"--seeds {text!r}: seeds are below 2**63, got {b}")
        parts.append(range(a, b + 1))
    number = sum(p.stop - p.start for p in parts)
    if number > MOST:
        raise OptionError(f"--seeds {text!r}: {number} images; a folder holds at most {MOST}")
    return parts[0] if len(parts) == 1 else [s for p in parts for s in p]


def tasks_for(prompts: Sequence[str], seeds: Sequence[int] | None = None) -> list[Task]:
    """One image for each seed; the prompts are used in turn. Without seeds: one image a prompt, seeds 0, 1, 2, ...

    Raises:
        OptionError: no prompt, a prompt that would never be used, or the same image twice.
    """
    if not prompts:
        raise OptionError("there is no prompt")
    chosen = range(len(prompts)) if seeds is None else seeds
    if len(chosen) < len(prompts):
        raise OptionError(
            f"{len(prompts)} prompts but {len(chosen)} seeds: the last {len(prompts) - len(chosen)} prompts would "
            f"never be used. Give a seed for each image (--seeds 0-{len(prompts) - 1}), or fewer prompts"
        )
    made = [Task(i, prompts[i % len(prompts)], seed) for i, seed in enumerate(chosen)]
    first: dict[tuple[str, int], int] = {}
    for task in made:
        twin = first.setdefault((task.prompt, task.seed), task.index)
        if twin != task.index:
            raise OptionError(
                f"images {twin} and {task.index} would be the same: prompt {task.prompt!r} with seed {task.seed}"
            )
    return made


def tasks_digest(tasks: Sequence[Task]) -> dict[str, Any]:
    """What a recipe says of the images to make."""
    text = json.dumps([[t.prompt, t.seed] for t in tasks], ensure_ascii=False)
    first, last = tasks[0], tasks[-1]
    ends = [[first.prompt, first.seed], [last.prompt, last.seed]]
    return {"count": len(tasks), "first_and_last": ends, "sha256": hashlib.sha256(text.encode()).hexdigest()}


# ---------------------------------------------------------------------- making it
def generate(
    paint: Paint,
    tasks: Sequence[Task],
    out: str | Path,
    *,
    batch: int,
    recipe: Mapping[str, Any],
    environment: Mapping[str, Any] | None = None,
    scheduler: str = "",
    world: World | None = None,
    progress: bool = True,
    verify: str = "fast",
) -> Report:
    """Fill `out` with the images of `tasks`; those that are there already are not made again.

    A chunk that `paint` fails at is noted in the folder, and the others are made; the next run tries it again. As
    long as the folder has no image, such an error ends the run at once: it is most likely wrong for every chunk.

    Args:
        paint: makes the images of one chunk; called in every process with different chunks.
        tasks: all images, the same list in every process.
        out: the folder, seen by all processes.
        batch: images a chunk.
        recipe: everything that an image depends on, plain JSON; a folder holds one recipe. `tasks` and `batch` are
            added to it.
        environment: versions and device name; a difference is a warning.
        scheduler: its name for the lines.
        world: this process among the others; alone if None.
        progress: whether rank 0 shows a bar over all ranks' images, and its notes.
        verify: how an image is recognised as there: "fast" (size of the file) or "full" (its pixels).

    Raises:
        FolderError: the folder cannot be used, or belongs to another recipe.
        FailedImages: chunks failed, after everything else was made; the message names them. In every process.
        ChunkError: a chunk failed before the first image; the message names it.
        WorldError: another rank failed or vanished.
    """
    world = world or SoloWorld()
    if batch < 1:
        raise OptionError(f"a chunk has 1 image or more, got batch = {batch}")
    chunks = [tasks[i : i + batch] for i in range(0, len(tasks), batch)]
    whole = {**recipe, "images": tasks_digest(tasks), "batch": batch}
    same_on_all(world, "recipe", whole)
    folder = Folder(out)
    if world.rank != 0:
        return _work(folder, paint, chunks, scheduler, world, None)
    with locked(folder):
        try:
            notes = folder.begin(whole, environment or {})
        except FolderError as error:
            raise FolderError(f"{error}{_first_other(folder, tasks)}") from error
        if progress and notes:
            print("generate: not the environment that this folder was begun in:", *notes, sep="\n", file=sys.stderr)
        folder.sweep()
        kept = {i: r for i, r in folder.records().items() if folder.good(r, check_verify(verify))}
        failed = folder.failures()
        folder.merge(kept)
        todo = [k for k, chunk in enumerate(chunks) if any(t.index not in kept for t in chunk)]
        todo.sort(key=lambda k: k in failed)  # last: some failures end the process that meets them
        return _work(folder, paint, chunks, scheduler, world, todo, progress)


def _first_other(folder: Folder, tasks: Sequence[Task]) -> str:
    """The first image that was made for another prompt or seed, of which a recipe shows only hashes."""
    for i, made in sorted(folder.records().items()):
        task = tasks[i] if i < len(tasks) else None
        if task and (task.prompt, task.seed) != (made.get("prompt"), made.get("seed")):
            return (
                f"\nThe first image that differs is {i}: the folder has prompt {made.get('prompt')!r} with seed "
                f"{made.get('seed')}, this run has {task.prompt!r} with seed {task.seed}."
            )
    return ""


def _work(
    folder: Folder,
    paint: Paint,
    chunks: Sequence[Sequence[Task]],
    scheduler: str,
    world: World,
    todo: list[int] | None,
    progress: bool = False,
) -> Report:
    """This rank's share of the chunks that rank 0 found missing, then the report of all."""
    plan = None if todo is None else json.dumps({"run": f"{time.time_ns():020d}", "todo": todo}).encode()
    start = json.loads(world.broadcast("list of chunks", plan, timeout=None))
    if world.rank and not folder.manifest.exists():
        raise FolderError(f"rank {world.rank} does not see {folder.manifest}: all processes need one shared folder")
    missing = sum(len(chunks[k]) for k in start["todo"])
    total, began = sum(map(len, chunks)), time.monotonic()
    images, failures = (f"{what} of {start['run']}" for what in ("images", "failures"))

    def tell(made: int = 0, failed: int = 0) -> int:
        """Add to what all ranks have made and failed at; images that are there."""
        there = total - missing + world.add(images, made)
        show(there, world.add(failures, failed))
        return there

    with folder.part(start["run"], world.rank) as part, _bar(total, total - missing, progress) as show:
        # dealt by position among what is left: every rank gets its share of a resumed run too
        for k in start["todo"][world.rank :: world.size]:
            world.check()
            try:
                made, seconds = painted(paint, chunks[k], k)
            except ChunkError as error:
                if not tell():  # no image yet: this is most likely wrong for every chunk
                    raise
                part.write([{"chunk": k, "images": [t.index for t in chunks[k]], "error": str(error)}])
                if not usable(world.device):
                    raise
                tell(failed=len(chunks[k]))
            else:
                part.write(saved(folder, made, chunks[k], scheduler, seconds))
                tell(made=len(chunks[k]))
        world.gather("last image", b"", timeout=None, stall=STALL, tick=tell)
        tell()
    found = None
    if world.rank == 0:
        found = json.dumps(_finish(folder, total, missing, time.monotonic() - began, world.size)).encode()
    ended = json.loads(world.broadcast("report", found, timeout=None))
    if "failed" in ended:
        raise FailedImages(ended["message"], ended["failed"])
    return Report(**ended)


def _finish(folder: Folder, total: int, made: int, seconds: float, processes: int) -> dict[str, Any]:
    """Merge the lines of all processes into one file; the report, or what failed."""
    end = time.monotonic() + 10  # shared file systems show other machines' files a little later
    while (lost := _without_a_line(folder, total)) and time.monotonic() < end:
        time.sleep(0.2)
    if lost:
        raise FolderError(
            f"{folder.root}: {len(lost)} of {total} images have no line although every process finished; "
            "the folder is not shared by all of them, or was changed. Run the same command again"
        )
    records, failures = folder.records(), folder.failures()
    folder.merge(records, failures)
    folder.end()
    if failures:
        failed = [i for i in range(total) if i not in records]
        return {"failed": failed, "message": _failure(folder, total, failed, failures)}
    flaws = {kind: [i for i, r in sorted(records.items()) if r.get("flaw") == kind] for kind in ("nan", "black")}
    return asdict(Report(len(records), made, seconds, processes, flaws["nan"], flaws["black"]))


def _without_a_line(folder: Folder, total: int) -> list[int]:
    known = set(folder.records()).union(*(f["images"] for f in folder.failures().values()))
    return [i for i in range(total) if i not in known]


def _failure(folder: Folder, total: int, failed: Sequence[int], failures: Mapping[int, Record], most: int = 10) -> str:
    shown = [f"  {failures[k]['error']}" for k in sorted(failures)[:most]]
    more = [f"  and {len(failures) - most} chunks more, see {folder.failed}"] if len(failures) > most else []
    first = f"{folder.root}: {len(failed)} of {total} images failed; the other {total - len(failed)} are there:"
    return "\n".join([first, *shown, *more, "Run the same command again to try the failed ones again."])


def status(out: str | Path, *, verify: str = "fast") -> dict[str, Any]:
    """What is in a folder: {"images", "done", "missing", "failed", "damaged", "nan", "black"}, all but the first two
    lists of indexes. `failed` are those of `missing` that the last run could not paint.

    Raises:
        FolderError: no folder of `generate`.
    """
    folder = Folder(out)
    count = int(folder.read()["recipe"]["images"]["count"])
    records = {i: r for i, r in folder.records().items() if i < count}
    damaged = sorted(i for i, r in records.items() if not folder.good(r, check_verify(verify)))
    flaws = {kind: sorted(i for i, r in records.items() if r.get("flaw") == kind) for kind in ("nan", "black")}
    missing = [i for i in range(count) if i not in records]
    failed = {i for f in folder.failures().values() for i in f["images"]}
    return {
        "images": count,
        "done": count - len(missing) - len(damaged),
        "missing": missing,
        "failed": [i for i in missing if i in failed],
        "damaged": damaged,
    } | flaws


# ---------------------------------------------------------------------- progress
@contextmanager
def _bar(total: int, before: int, show: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar over all images; what it yields is told how many are there, and how many failed in this run."""
    if not show:
        yield lambda there, failed: None
        return
    from tqdm import tqdm

    with tqdm(total=total, initial=before, unit="image", desc="generate") as bar:

        def update(there: int, failed: int) -> None:
            if failed:
                bar.set_postfix(failed=failed, refresh=False)
            bar.update(there - bar.n)

        yield update
