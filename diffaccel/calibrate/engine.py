"""The engine of every calibration: a pipeline runs by its own call, a scheduler of ours sees and steers it.

No pipeline's loop is written again here, so whatever the pipeline does (guidance, packed latents, ControlNet,
adapters, offloading, half precision) is in what is captured: the model output as it reaches `scheduler.step`.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialize

from ..artifact import Artifact
from ..core.node import Node
from ..core.path import Nodes, Path
from ..denoiser.contract import refuse_wrapped
from ..drive import Driver, asked, denoiser, noise_of
from ..errors import OptionError, RunError
from ..parallel.protocol import SoloWorld, World
from ..schedulers.guards import output_for
from .captured import Captured as Captured
from .checkpoint import Checkpoint
from .checkpoint import Tensors as Tensors
from .guided import guided, scale_of, split


@dataclass(frozen=True)
class Batch:
    """Images that run together: each has a prompt and the seed of its noise."""

    index: int
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.seeds)


class Engine:
    """Runs one pipeline for a calibration.

    Args:
        pipe: text-to-image or class-conditional; it is left as it was.
        prompts: used in turn (class numbers for class-conditional models).
        guidance: scale, passed on as `guidance_scale` (`true_cfg_scale` where the model has no input for that); None
            leaves the pipeline's own.
        call: further arguments of the pipeline's call.
        batch: images in one pass.
        seed: of the first image; image i has seed + i.
        out: of the artifact; the state of a stopped calibration lies beside it (`OUT.partial`). None keeps none.
        settings: what the result depends on beside the above (JSON), to tell stopped calibrations apart.
        progress: show a bar.
        world: this process among others; each takes its share of the batches.

    Raises:
        OptionError: a pipeline that cannot be driven, is wrapped, or has a cache enabled; guidance given twice.

    Attributes:
        own: arguments of the pipeline's call without the guidance scale.
        call: all of them.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        *,
        guidance: float | None = None,
        call: Mapping[str, Any] | None = None,
        batch: int = 8,
        seed: int = 0,
        out: str | os.PathLike[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        progress: bool = True,
        world: World | None = None,
    ) -> None:
        if not prompts or batch < 1:
            raise OptionError(f"a calibration needs a prompt and a batch of 1 or more, got {len(prompts)} and {batch}")
        self.pipe, self.prompts, self.batch, self.seed = pipe, list(prompts), batch, seed
        self.own, self.guidance = split(pipe, call or {}, guidance)
        self.call = guided(pipe, self.own, self.guidance)
        self._key = Driver(pipe, self.call).key
        if not self.takes("latents"):
            raise OptionError(f"{type(pipe).__name__} takes no latents=, so no state can be handed to it")
        refuse_wrapped(denoiser(pipe))
        if getattr(denoiser(pipe), "is_cache_enabled", False):
            raise OptionError("the denoiser has a cache enabled, which repeats old outputs; call disable_cache() first")
        self.world = world or SoloWorld()
        own = {"prompts": self.prompts, "call": {k: str(v) for k, v in self.call.items()}, "batch": batch, "seed": seed}
        rank = f".{self.world.rank}of{self.world.size}" if self.world.size > 1 else ""
        partial = None if out is None else f"{os.fspath(out)}.partial{rank}"
        self.kept = Checkpoint(partial, own | dict(settings or {}))
        self._out = out
        self.calls = int(self.kept.notes.get("calls", 0))
        self._before = float(self.kept.notes.get("seconds", 0.0))
        self._start = time.monotonic()
        self._progress = progress and self.world.rank == 0
        self._bar: Any = None
        self._untimed: tuple[int, str, int, float] | None = None  # planned calls, of what, calls made and time then

    def takes(self, argument: str) -> bool:
        """Whether the pipeline's call has an argument of this name."""
        return argument in inspect.signature(self.pipe.__call__).parameters

    def guide(self, guidance: float | None) -> None:
        """Run with another guidance scale from here on; None: the pipeline's own."""
        self.guidance, self.call = guidance, guided(self.pipe, self.own, guidance)

    @property
    def scale(self) -> Any:
        """The guidance scale that the runs have, the pipeline's own included."""
        return scale_of(self.pipe, self.call)

    # ------------------------------------------------------------------ cost
    @property
    def seconds(self) -> float:
        """Spent so far, a stopped calibration's included."""
        return self._before + time.monotonic() - self._start

    @property
    def cost(self) -> dict[str, Any]:
        """Model calls of all images of all processes (a guidance pair counts once), and seconds of this one."""
        counts = self.world.gather("model calls", str(self.calls).encode())
        return {"calls": sum(map(int, counts)), "seconds": round(self.seconds, 1)}

    def tick(self) -> None:
        """Between pieces of work: write the state now and then, hear of other processes."""
        self.world.check()
        self.kept.notes |= {"calls": self.calls, "seconds": self.seconds}
        self.kept.tick()

    @contextmanager
    def working(self, expected: int, what: str, note: str | None = "", *, bound: str = "at most") -> Iterator[None]:
        """A bar over `expected` model calls of this process; what is finished is kept if the work is interrupted.

        The calls are printed before the first one, with `note` (None: the caller says them), the minutes after the
        first run. `bound`: what `expected` is.
        """
        from tqdm import tqdm

        if self._progress and note is not None:
            print(f"{what}: {bound} {expected} model calls ({expected / 50:.0f} images at 50 calls){note}", flush=True)
            self._untimed = expected, what, self.calls, time.monotonic()
        with tqdm(total=expected, initial=self.calls, unit="call", desc=what, disable=not self._progress) as bar:
            self._bar = bar
            try:
                yield
            except BaseException:
                if self.kept.arrays or set(self.kept.notes) - {"calls", "seconds"}:  # else nothing was finished
                    self.kept.notes |= {"calls": self.calls, "seconds": self.seconds}
                    self.kept.save()
                raise
            finally:
                self._bar = self._untimed = None

    def _say_minutes(self) -> None:
        """After the first run: the time that all of it will take."""
        if self._untimed is not None:
            expected, what, before, start = self._untimed
            each = (time.monotonic() - start) / max(1, self.calls - before)
            self._bar.write(f"{what}: about {each * max(0, expected - self.calls) / 60:.1f} minutes, by the first run")
            self._untimed = None

    def finish(self, made: Artifact) -> Artifact:
        """Save the artifact where one was asked for (rank 0), and forget the state of the stopped calibration."""
        if self._out is not None and self.world.rank == 0:
            made.save(self._out)
        self.kept.remove()
        return made

    # ------------------------------------------------------------------ batches
    def batches(self, first: int, count: int) -> list[Batch]:
        """This process's share of the batches of images first..first + count - 1.

        They are smaller where there would be too few for all processes.
        """
        size = max(1, min(self.batch, count // self.world.size))
        numbers = [range(i, min(i + size, first + count)) for i in range(first, first + count, size)]
        made = [self.group(part, k) for k, part in enumerate(numbers)]
        return made[self.world.rank :: self.world.size]

    def group(self, images: Iterable[int], index: int = 0) -> Batch:
        """A batch of these images: image i has prompt i (mod their number) and the noise of seed + i."""
        numbers = list(images)
        prompts = tuple(self.prompts[i % len(self.prompts)] for i in numbers)
        return Batch(index, prompts, tuple(self.seed + i for i in numbers))

    def accumulate(
        self,
        name: str,
        batches: Sequence[Batch],
        work: Callable[[Batch], Tensors],
        merge: Callable[[Tensors, Tensors], Tensors],
        *,
        gather: bool = True,
    ) -> Tensors:
        """`merge(merge(work(batch 0), work(batch 1)), ...)`, going on where a stopped calibration was.

        Args:
            name: of this piece of work; its state is kept under it.
            work: statistics of one batch.
            merge: of the statistics of two disjoint sets of images.
            gather: also merge over the processes (in rank order); otherwise each keeps its own.
        """
        done = int(self.kept.notes.get(f"{name}/done", 0))
        mark = f"{name}/"
        state: Tensors | None = {k[len(mark) :]: v for k, v in self.kept.arrays.items() if k.startswith(mark)} or None
        for k, batch in enumerate(batches):
            if k < done:
                continue
            piece = work(batch)
            state = piece if state is None else merge(state, piece)
            self.kept.arrays |= {mark + key: np.asarray(value) for key, value in state.items()}
            self.kept.notes[f"{name}/done"] = k + 1
            self.tick()
        if not gather or self.world.size == 1:
            if state is None:
                raise RunError(f"{name}: process {self.world.rank} has no batch; use fewer processes or more images")
            return state
        plain = {key: np.array(value, order="C") for key, value in (state or {}).items()}  # as safetensors needs it
        pieces = self.world.gather(name, serialize(plain), timeout=None)
        states = [found for piece in pieces if (found := parse(piece))]
        total = states[0]
        for other in states[1:]:
            total = merge(total, other)
        return total

    # ------------------------------------------------------------------ running the pipeline
    def run(
        self, batch: Batch, scheduler: Any, steps: int, latents: torch.Tensor | None = None, **call: Any
    ) -> torch.Tensor:
        """One run of the pipeline's own call with another scheduler; the pipeline's is put back afterwards.

        Args:
            batch: prompts and seeds.
            scheduler: any; a `TableScheduler` or one with its interface.
            steps: `num_inference_steps`.
            latents: (B, ...) the state to begin with instead of noise from the seeds, as the model is handed it.
            call: further arguments of the pipeline's call, for this run.

        Returns:
            what the pipeline returns as latents: the last state.
        """
        pipe, before = self.pipe, self.pipe.scheduler
        bar = dict(getattr(pipe, "_progress_bar_config", {}))
        if latents is not None:
            call["latents"] = latents.to(self.device, denoiser(pipe).dtype)
        generators = [torch.Generator("cpu").manual_seed(s) for s in batch.seeds]
        count = _Count(scheduler, self._called(len(batch)))
        pipe.scheduler = scheduler
        pipe.set_progress_bar_config(disable=True)
        try:
            with count, noise_of(generators, scheduler, self.device), torch.no_grad():
                found = pipe(
                    **asked(self._key, batch.prompts, {**self.call, **call}),
                    generator=generators,
                    num_inference_steps=steps,
                    output_type="latent",
                )
        finally:
            pipe.scheduler = before
            pipe._progress_bar_config = bar
        self._say_minutes()
        result: torch.Tensor = found[0] if isinstance(found, tuple) else next(iter(found.values()))
        return result

    @property
    def device(self) -> torch.device:
        """Where the pipeline's state lives (also under offloading)."""
        return torch.device(getattr(self.pipe, "_execution_device", None) or self.pipe.device)

    def _called(self, images: int) -> Callable[[], None]:
        def called() -> None:
            self.calls += images
            if self._bar is not None:
                self._bar.update(images)

        return called

    def output(
        self, batch: Batch, node: Node, x: torch.Tensor | None, config: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One model call at a node, by a run of one call.

        Args:
            batch: prompts and seeds.
            node: of the path of `config`.
            x: the state there, (B, ...); None: the pipeline's start noise, which must belong there.
            config: of the pipeline's scheduler.

        Returns:
            (the state as the model saw it, the model's output), both (B, ...) float64 on the CPU.
        """
        seen: list[torch.Tensor] = []

        def see(i: int, sample: torch.Tensor, output: torch.Tensor, state: torch.Tensor) -> None:
            seen.extend(t.detach().double().cpu() for t in (sample, output_for(output, sample)))

        nodes = Nodes([node, Node(node.t, 1.0, 0.0)], Path.from_config(config))
        self.run(batch, Captured.of(config, "ddim", see=see, nodes=nodes, own_noise=x is None), 1, x)
        return seen[0], seen[1]


def joined(a: Tensors, b: Tensors) -> Tensors:
    """The arrays of two batches, one after the other: `merge` of what is kept for each image."""
    return {key: np.concatenate([a[key], b[key]]) for key in a}


class _Count:
    """Calls `called` at each step of a scheduler: one model call, whatever guidance does in it."""

    def __init__(self, scheduler: Any, called: Callable[[], None]) -> None:
        self.scheduler, self.called = scheduler, called

    def __enter__(self) -> None:
        step, self.own = self.scheduler.step, vars(self.scheduler).get("step")

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.called()
            return step(*args, **kwargs)

        self.scheduler.step = counted

    def __exit__(self, *_: object) -> None:
        if self.own is None:
            del self.scheduler.step
        else:  # somebody else's (`watched`), which the next run needs
            self.scheduler.step = self.own
