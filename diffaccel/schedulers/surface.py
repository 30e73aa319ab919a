"""The parts of a scheduler that pipelines and people read: noise, attributes, description, copies."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch

from ..core.families import VP
from ..core.grid import native
from ..core.table import Table
from ..errors import OptionError, RunError
from ..samplers.begin import begin_at
from .from_config import grid_of, output_of, path_of
from .guards import first_call, training_steps
from .noising import in_number, node_for, noised, velocity
from .run import PerThread

logger = logging.getLogger(__name__)


class Surface:
    """Everything of `TableScheduler` but its building and its stepping."""

    config: Any
    _runs: PerThread
    _sampler: Any

    # ------------------------------------------------------------------ noise
    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """`alpha x0 + sigma noise` at the level that `timesteps` (one value, or one a sample) means.

        During a run one value is the level of the state just reached; else each value is looked up on the path, so
        that training code gets what it asks for. Shapes and dtype of `original_samples`.
        """
        times = in_number(timesteps, original_samples, noise)
        return noised(original_samples, noise, node_for(self._runs.get(), path_of(self.config), times))

    def scale_noise(
        self, sample: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`add_noise` in the argument order of flow pipelines."""
        if noise is None:
            raise RunError("scale_noise needs the noise: scale_noise(sample, timestep, noise)")
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """The v-prediction target at training timesteps; only VP models are trained on it."""
        if self.config.path != "vp":
            raise RunError(f"get_velocity is for VP models; this path is {self.config.path!r}")
        return velocity(sample, noise, node_for(None, path_of(self.config), in_number(timesteps, sample, noise)))

    @property
    def generator(self) -> torch.Generator | list[torch.Generator] | None:
        """Where this thread's runs draw noise when `step` is given no generator; a list has one for each image.

        Pipelines of flow models (SD3, FLUX, Qwen-Image, Wan, ...) and of DiT pass none: without it a sampler that
        draws noise takes torch's global generator there, and `pipe(generator=...)` decides the first noise only.
        """
        return self._runs.generator

    @generator.setter
    def generator(self, value: torch.Generator | list[torch.Generator] | None) -> None:
        found = value if isinstance(value, list) else [value]
        if value is not None and not all(isinstance(g, torch.Generator) for g in found):
            raise OptionError(f"scheduler.generator is a torch.Generator, a list of them, or None; got {value!r}")
        self._runs.generator = value

    def _noise_source(self) -> Any:
        """`generator`; where there is none, a word on flow paths, whose pipelines keep theirs to themselves."""
        if self.generator is None and self.config.path == "flow" and not self.__dict__.get("_told"):
            self._told = True
            logger.warning(
                "%s draws noise from torch's global generator: step was given none (pipelines of flow models pass none "
                "on). For images that can be made again set scheduler.generator",
                self.config.sampler,
            )
        return self.generator

    # ------------------------------------------------------------------ what pipelines read
    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """What the model is fed: the sample itself, but on EDM paths `sample / sqrt(sigma^2 + sigma_data^2)`."""
        if self.config.path != "edm":
            return sample
        run = self._runs.get()
        if run is None:
            sigma = path_of(self.config).at(float(timestep)).sigma
        else:
            i = next((k for k in (run.counter, run.begin) if k is not None), None)
            i = first_call(run, timestep) if i is None else i
            sigma = run.nodes[min(i, len(run) - 1)].sigma
        return sample * output_of(self.config).input_scale(sigma)

    @property
    def timesteps(self) -> torch.Tensor:
        """What the model is fed, one entry a call, on the user's device; before a run the training steps."""
        run = self._runs.get()
        return training_steps(path_of(self.config)) if run is None else run.timesteps

    @property
    def sigmas(self) -> torch.Tensor:
        """(N + 1,) float32 on the CPU: sigma for flow models, sigma/alpha else. May be edited before the first call."""
        run = self._runs.get()
        if run is not None:
            return run.sigmas
        path = path_of(self.config)
        nodes = [*(path.at(float(t)) for t in training_steps(path)), path.end]
        return torch.tensor([native(node, path) for node in nodes], dtype=torch.float32)

    @sigmas.setter
    def sigmas(self, values: torch.Tensor) -> None:
        run = self._runs.need()
        if run.counter is not None or len(values) != len(run.sigmas):
            raise RunError(f"sigmas can be set between set_timesteps and the first step, {len(run.sigmas)} values")
        run.sigmas = values.detach().to("cpu", torch.float32)

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the state that a run begins with; pipelines multiply their noise by it."""
        if self.config.path != "edm":
            return self._sampler()[0].start
        run = self._runs.get()
        sigma = (path_of(self.config).first if run is None else run.nodes[0]).sigma
        return float((sigma * sigma + 1.0) ** 0.5)

    @property
    def num_inference_steps(self) -> int | None:
        """Model calls of this thread's run; None before set_timesteps."""
        run = self._runs.get()
        return None if run is None else len(run)

    @property
    def begin_index(self) -> int | None:
        """What the pipeline said with set_begin_index."""
        run = self._runs.get()
        return None if run is None else run.begin

    @property
    def step_index(self) -> int | None:
        """The call that comes next; None before the first."""
        run = self._runs.get()
        return None if run is None else run.counter

    @property
    def _step_index(self) -> int | None:
        return self.step_index

    @_step_index.setter
    def _step_index(self, value: Any) -> None:
        raise RunError(
            f"this pipeline sets the scheduler's step counter by hand (to {value}), as Cosmos 1 and LEDITS++ do to "
            "repeat a step; a multistep table cannot follow that. Use the scheduler that the pipeline came with."
        )

    @property
    def fed_timesteps(self) -> torch.Tensor | None:
        """(B,) what the model is to be fed next in place of the grid's timestep, where a policy asks for it."""
        run = self._runs.get()
        return None if run is None or run.shifts is None else run.shifts.fed

    def policy_report(self) -> dict[str, Any] | None:
        """What the policy did in this thread's run (counts, shares); None without one. Reads the device."""
        run = self._runs.get()
        return None if run is None or run.shifts is None else run.shifts.report()

    @property
    def model_outputs(self) -> list[torch.Tensor]:
        """The predictions that later rows will use, newest first; edits of the list reach them."""
        return self._runs.need().history

    @property
    def last_sample(self) -> None:
        """Always None: correctors are increments on the state handed in, there is no hidden copy."""
        return None

    @property
    def alphas_cumprod(self) -> torch.Tensor:
        """(T,) float32, VP paths only."""
        return torch.tensor(self._vp("alphas_cumprod").alphas_cumprod, dtype=torch.float32)

    @property
    def betas(self) -> torch.Tensor:
        """(T,) float32, VP paths only (before any rescaling to zero SNR)."""
        return torch.tensor(self._vp("betas").betas, dtype=torch.float32)

    def _vp(self, name: str) -> VP:
        path = path_of(self.config)
        if not isinstance(path, VP):
            raise AttributeError(f"{type(self).__name__} on a {self.config.path!r} path has no attribute {name!r}")
        return path

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    # ------------------------------------------------------------------ for people
    @property
    def table(self) -> Table:
        """The table of this thread's run, from its first node."""
        return self._runs.need().table

    def table_tensor(self, device: Any = None) -> torch.Tensor:
        """The scalar coefficients as (N, K) float32: a, then b_0 ... b_{depth-1}; for CUDA graphs.

        Raises:
            OptionError: if a row needs more than that (noise, registers, tensor coefficients).
        """
        rows = [r.out for r in self.table.rows]
        if any(not m.scalar or m.m or m.z or m.one for m in rows):
            raise OptionError(f"the table of {self.table.sampler!r} has more than scalar coefficients of predictions")
        depth = self.table.depth
        return torch.tensor([[m.x, *m.p, *[0.0] * (depth - len(m.p))] for m in rows], device=device)

    def explain(self) -> str:
        """The path, the grid and the table of this thread's run, from the call where it begins, a line a row."""
        run = self._runs.need()
        k = run.start if run.counter is not None else run.begin or 0
        table = begin_at(run.table, run.grid, k, self._sampler()[0], run.options) if 0 < k < len(run) else run.table
        grid, options, final = grid_of(self.config)
        what = f"path {self.config.path}, model predicts {self.config.prediction_type}"
        head = f"{what}, grid {grid}{options or ''} to {final}"
        done = [] if run.shifts is None else [run.shifts.describe()]
        return "\n".join([head, table.describe(k), *done, *run.notes])

    # ------------------------------------------------------------------ copies
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        for key, value in self.__dict__.items():
            if key != "_runs":
                twin.__dict__[key] = copy.deepcopy(value, memo)
        twin._runs = PerThread()
        twin._runs.set(copy.deepcopy(self._runs.get(), memo))
        twin._runs.generator = self.generator
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_runs"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._runs = PerThread()
