"""A pipeline as the runner of a fit: its own call runs, a private scheduler hands every state and prediction over."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from ..core.grid import nodes as grid_nodes
from ..core.path import Nodes
from ..drive import denoiser, steps_for
from ..errors import ArtifactError, OptionError
from ..schedulers import TableSchedulerOutput
from ..schedulers.from_config import grid_of, read
from .captured import OnNodes, model_config
from .engine import Engine, Tensors
from .fit_run import Step

Make = Callable[[Mapping[str, Any]], Any]  # a scheduler from the config of the pipeline's


class _Enough(BaseException):
    """Leaves a pipeline in the middle of its run; pipelines catch nothing of this kind."""


class Steered(OnNodes):
    """Hands state and x0-prediction of each call to `take`, and returns what that makes."""

    take: Step
    precise = False
    _exact: torch.Tensor | None = None  # the state before it was rounded to the pipeline's dtype

    def step(
        self,
        model_output: Any,
        timestep: Any,
        sample: torch.Tensor,
        generator: Any = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """As `TableScheduler.step`, but for the row."""
        x = sample if sample.dtype is torch.float64 else sample.float()
        exact = self._exact
        if self.precise and exact is not None and torch.equal(exact.to(sample.dtype), sample):
            x = exact
        _, x0 = super().step(model_output, timestep, x, generator, False, **kwargs)
        made = self.take(int(self.step_index or 0) - 1, x.cpu().numpy(), x0.cpu().numpy())
        if made is None:
            raise _Enough
        self._exact = torch.from_numpy(np.ascontiguousarray(made)).to(x.device, x.dtype)
        state = self._exact.to(sample.dtype)
        return TableSchedulerOutput(prev_sample=state, pred_original_sample=x0) if return_dict else (state, x0)


class Piped:
    """The runner of a pipeline. Input i has prompt i (mod their number) and the noise of seed + i.

    Args:
        engine: of the pipeline.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.batch = engine, engine.batch
        self._config = model_config(engine.pipe.scheduler.config)
        self.reading = read(engine.pipe.scheduler.config)
        self.path = self.reading.path

    @property
    def smooth(self) -> bool:
        """See `fit_run.Runner`."""
        return denoiser(self.engine.pipe).dtype in (torch.float32, torch.float64)

    def run(
        self,
        inputs: Sequence[int],
        nodes: Nodes,
        step: Step,
        *,
        begin: np.ndarray | None = None,
        precise: bool = False,
    ) -> None:
        """See `fit_run.Runner`."""
        scheduler = Steered.from_config(self._config, sampler="ddim")
        scheduler.given, scheduler.take, scheduler.precise = nodes, step, precise
        scheduler.own_noise = begin is None
        state = None if begin is None else torch.from_numpy(np.ascontiguousarray(begin))
        with suppress(_Enough):
            self.engine.run(self.engine.group(inputs), scheduler, len(nodes) - 1, state)

    def shape(self) -> tuple[int, ...]:
        """Of one input's state, by a run that is left at its first call."""
        seen: list[tuple[int, ...]] = []
        self.run([0], Nodes([self.path.first, self.path.end], self.path), lambda i, x, d: seen.append(x.shape[1:]))
        return seen[0]

    def rival(
        self,
        inputs: Sequence[int],
        calls: int,
        make: Callable[[Mapping[str, Any]], Any] | None,
        steps: int | None,
        ramp: bool,
    ) -> np.ndarray | None:
        """The last states of runs with another scheduler (the pipeline's own if `make` is None).

        Returns:
            None if that scheduler cannot spend exactly so many calls.
        """
        scheduler = (
            copy.deepcopy(self.engine.pipe.scheduler) if make is None else make(self.engine.pipe.scheduler.config)
        )
        if make is None:
            try:
                steps = steps_for(scheduler, calls)
            except (ArtifactError, OptionError):
                return None
        if steps is None or (ramp and not self.engine.takes("sigmas")):
            return None
        last: list[torch.Tensor] = []
        inner = scheduler.step

        def step(*args: Any, **kwargs: Any) -> Any:
            out = inner(*args, **kwargs)
            last[:] = [out[0] if isinstance(out, tuple) else out.prev_sample]
            return out

        scheduler.step = step
        found, call = [], self.engine.call
        try:
            if ramp:
                self.engine.call = {**call, "sigmas": np.linspace(1.0, 1.0 / steps, steps).tolist()}
            for start in range(0, len(inputs), self.batch):
                self.engine.run(self.engine.group(inputs[start : start + self.batch]), scheduler, steps)
                scheduler.step = step  # the engine's counter takes the instance's attribute away when it is done
                found.append(last[0].float().cpu().numpy())
        finally:
            self.engine.call = call
        return np.concatenate(found)

    def memo(self, name: str, compute: Callable[[], Tensors]) -> Tensors:
        """What `compute` gives, or what a stopped calibration kept of it under this name."""
        kept, mark = self.engine.kept, f"{name}/"
        if kept.notes.get(f"{mark}done"):
            return {k[len(mark) :]: v for k, v in kept.arrays.items() if k.startswith(mark)}
        found = compute()
        kept.arrays |= {mark + k: np.asarray(v) for k, v in found.items()}
        kept.notes[f"{mark}done"] = True
        self.engine.tick()
        return found

    def own_nodes(self, calls: int) -> Nodes | None:
        """The pipeline's own grid; None where it depends on the resolution (mu)."""
        if self.reading.settings.get("use_dynamic_shifting"):
            return None
        grid, options, _ = grid_of(self.reading.settings)
        return grid_nodes(self.path, calls, grid, **options)
