"""What runs candidates: the same images for all, and how far each ends from a many-step teacher."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging

from ..calibrate.captured import Captured
from ..calibrate.engine import Batch, Engine
from ..calibrate.fit_guard import relative
from ..calibrate.fit_pipe import Piped
from ..calibrate.grid import teacher_nodes
from ..compare import Candidate, counted
from ..compare import stock as stock_candidates
from ..core.path import Nodes
from ..drive import denoiser, steps_for
from ..errors import DiffaccelError, RunError
from ..pipelines.applied import applied
from ..pipelines.recipe import Choice

FAILS = (DiffaccelError, ValueError, IndexError, RuntimeError, TypeError, ImportError)  # of one setting, not of the run
TEACHER = {"order": 2}
# make(): (scheduler, steps, further arguments of the call)
Run = Callable[[], tuple[Any, int, dict[str, Any]]]


class Bench:
    """Images 0..S + H - 1 of an engine, their teacher, and the runs of candidates on them.

    Args:
        engine: of the pipeline.
        steps: K of the teacher, DPM-Solver++ 2M on K + 1 nodes uniform in lam.
        tells: print the time that is left after the first batch.
    """

    def __init__(self, engine: Engine, steps: int, *, tells: bool = False) -> None:
        self.engine, self.steps, self.tells = engine, steps, tells
        self.piped = Piped(engine)
        self.reading, self.memo = self.piped.reading, self.piped.memo
        self.config = engine.pipe.scheduler.config
        self.shape: tuple[int, ...] = ()  # of one state, as the denoiser sees it
        self.teacher = np.zeros(0)
        self.failed: dict[str, str] = {}

    # ------------------------------------------------------------------ teacher
    def learn(self, images: int, planned: int) -> None:
        """Run the teacher on images 0..images - 1."""
        nodes = teacher_nodes(self.piped.path, self.steps)
        parts = []
        for batch in self.engine.batches(0, images):
            parts.append(self.memo(f"teacher/{batch.seeds[0]}", partial(self._taught, batch, nodes)))
            self._tell(planned)
        self.teacher = np.concatenate([part["z"] for part in parts])
        self.shape = tuple(int(n) for n in parts[0]["shape"])

    def gap(self, images: int = 2) -> float:
        """How far a teacher of K/2 steps lands from it: geometric mean over images."""
        nodes = teacher_nodes(self.piped.path, self.steps // 2)
        batch = self.engine.batches(0, images)[0]
        found = self.memo("gap", lambda: self._taught(batch, nodes))["z"]
        return float(np.exp(np.log(relative(found, self.teacher[: len(found)]) + 1e-30).mean()))

    def _taught(self, batch: Batch, nodes: Nodes) -> dict[str, np.ndarray]:
        scheduler = Captured.of(self.config, "dpmpp", TEACHER, nodes=nodes)
        seen: list[tuple[int, ...]] = []

        def see(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
            if not seen and isinstance(state, torch.Tensor):
                seen.append(tuple(state.shape[1:]))

        hook = denoiser(self.engine.pipe).register_forward_pre_hook(see, with_kwargs=True)
        try:
            z = _plain(self.engine.run(batch, scheduler, len(nodes) - 1))
        finally:
            hook.remove()
        if not np.isfinite(z).all():
            raise RunError("the teacher's images are not finite; if the model runs in float16, tune in bfloat16")
        return {"z": z, "shape": np.array(seen[0] if seen else (), dtype=np.int64)}

    def _tell(self, planned: int) -> None:
        """After the first batch: the time that all of it will take."""
        if self.tells and self.engine.calls:
            minutes = self.engine.seconds / self.engine.calls * max(0, planned - self.engine.calls) / 60
            print(f"tune: about {minutes:.1f} minutes more, by the first batch", flush=True)
        self.tells = False

    # ------------------------------------------------------------------ candidates
    def choice(self, choice: Choice, first: int, stop: int) -> np.ndarray:
        """Relative errors |z - z*|/|z*| of a candidate on images first..stop - 1, (stop - first,)."""
        return self._errors(choice.name, first, stop, lambda batch: self._chosen(choice, batch))

    def _chosen(self, choice: Choice, batch: Batch) -> np.ndarray:
        pipe = self.engine.pipe
        with applied(pipe, choice), counted(pipe) as count:
            z = _plain(self.engine.run(batch, pipe.scheduler, choice.calls))
        if count.calls != choice.calls:
            raise RunError(f"{choice.name} states {choice.calls} model calls and made {count.calls}")
        return z

    def rival(self, name: str, calls: int, make: Run, first: int, stop: int) -> np.ndarray:
        """The same for a scheduler that is none of ours."""

        def run(batch: Batch) -> np.ndarray:
            scheduler, steps, more = make()
            with counted(self.engine.pipe) as count:
                z = _plain(self.engine.run(batch, scheduler, steps, **more))
            if count.calls != calls:
                raise RunError(f"it was asked for {calls} model calls and made {count.calls}")
            return z

        return self._errors(name, first, stop, run)

    def _errors(self, name: str, first: int, stop: int, run: Callable[[Batch], np.ndarray]) -> np.ndarray:
        def compute() -> dict[str, np.ndarray]:
            try:
                states = np.concatenate([run(batch) for batch in self.engine.batches(first, stop - first)])
            except FAILS as error:
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                return {"e": np.full(stop - first, np.inf), "why": np.frombuffer(_line(error).encode(), np.uint8)}
            return {"e": relative(states, self.teacher[first:stop])}

        found = self.memo(f"{name}/{first}-{stop}", compute)
        if "why" in found:
            self.failed[name] = bytes(found["why"]).decode()
        return found["e"]

    # ------------------------------------------------------------------ rivals
    def plain(self, calls: int) -> Run:
        """The pipeline's present scheduler.

        Raises:
            OptionError: it cannot make so many calls.
        """
        scheduler = self.engine.pipe.scheduler
        steps = steps_for(scheduler, calls)
        return lambda: (copy.deepcopy(scheduler), steps, {})

    def stock(self, calls: int) -> list[tuple[str, Run]]:
        """Every deterministic scheduler of diffusers that takes this path, on all its grids."""
        ramps = self.engine.takes("sigmas")
        found: list[tuple[str, Run]] = []
        for candidate in stock_candidates(self.config):
            steps = candidate.steps(calls)
            if steps is not None and (ramps or not candidate.ramp):
                found.append((candidate.name, _maker(candidate, self.config, steps)))
        return found

    def seconds(self, runs: Mapping[str, Callable[[Batch], Any]]) -> dict[str, float]:
        """Seconds an image of each, the faster of two turns."""
        batch = self.engine.batches(0, self.engine.batch)[0]
        found: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(2):
            for name, run in runs.items():
                start = time.perf_counter()
                run(batch)
                found[name].append((time.perf_counter() - start) / len(batch))
        return {name: float(f"{min(values):.3g}") for name, values in found.items()}


def _maker(candidate: Candidate, config: Mapping[str, Any], steps: int) -> Run:
    more = {"sigmas": np.linspace(1.0, 1.0 / steps, steps).tolist()} if candidate.ramp else {}
    return lambda: (candidate.make(config), steps, more)


def _plain(z: torch.Tensor) -> np.ndarray:
    """(n, ...) float32, or float64 if it is."""
    z = z.detach().cpu()
    found: np.ndarray = (z if z.dtype is torch.float64 else z.float()).numpy()
    return found


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


@contextmanager
def quiet() -> Any:
    """diffusers' schedulers list the config keys that they do not know, each time one is built."""
    told = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(told)
