"""`StagedScheduler`: a run that changes its resolution inside `step()`, so that pipelines need not know."""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..core.stage_plan import Leg, checked_stages, needs_spectrum, plan_legs
from ..core.stages import FILLS, Size, Spectrum, flow_time, level, stage_size
from ..errors import OptionError, RunError, one_of
from . import presets
from .from_config import grid_of, output_of
from .guards import check_finite, output_for, state_for
from .registration import public
from .resize import RESIZES, Memory, dct, idct, packed, seeds_of, unpacked
from .run import advance
from .staged_run import StagedRun, open_stage, switched
from .table_scheduler import TableScheduler, TableSchedulerOutput

HISTORIES = ("carry", "reset")


@public
class StagedScheduler(SchedulerMixin, ConfigMixin):
    """Runs a `TableScheduler` in stages of different latent sizes; `diffaccel.bottleneck` makes one.

    Args:
        base_config: config of the `TableScheduler` (or a preset of it) that solves each stage.
        stages: dicts with the fields of `diffaccel.Stage`.
        transition: "aligned" (the noisy state is resized, its level follows) or "renoise" (each stage runs to the end
            and the clean latent gets new noise).
        fill: of the new band of aligned transitions: "memory", "white", "matched", "memory_matched".
        history: "carry" past predictions over a transition, or "reset" them; None: carry where it is known to help
            (white and memory fills of samplers that combine x0-predictions).
        spectrum: of the latents: a dict of `Spectrum`, "flux" or "wan2.1"; for matched fills and the delta rule.
        delta, rule: of the delta rule; see `core.stages.switch_time`.
        resize: kernel for the clean latents of "renoise": "spectral" or "bicubic".
        divisor: sizes of small stages are multiples of it.
        packing: whether the pipeline's latents are tokens (FLUX, Qwen-Image); needs the hook of `bottleneck`.

    Raises:
        OptionError: options that make no run, or have no effect.
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        base_config: dict[str, Any] | None = None,
        stages: Sequence[dict[str, Any]] | None = None,
        transition: str = "aligned",
        fill: str = "memory",
        history: str | None = None,
        spectrum: dict[str, Any] | str | None = None,
        delta: float = 0.01,
        rule: str = "missing",
        resize: str = "spectral",
        divisor: int = 1,
        packing: bool = False,
    ) -> None:
        if base_config is None or stages is None:
            raise OptionError("StagedScheduler needs base_config and stages; diffaccel.bottleneck(pipe, ...) makes one")
        self.stages = checked_stages(stages, transition)
        self.spectrum = Spectrum.of(spectrum)
        self._check_options()
        kind = base_config.get("_class_name", "TableScheduler")
        self.base: TableScheduler = getattr(presets, kind, TableScheduler).from_config(dict(base_config))
        self._check_base()
        # Pipelines read keys of the model's own scheduler (base_shift, num_train_timesteps, ...).
        foreign = {k: v for k, v in self.base.config.items() if k not in self.config and not k.startswith("_")}
        self.register_to_config(stages=[s.to_config() for s in self.stages], **foreign)
        self._local = threading.local()

    def _check_options(self) -> None:
        one_of("fill", self.config.fill, FILLS)
        one_of("resize", self.config.resize, RESIZES)
        if self.config.history is not None:
            one_of("history", self.config.history, HISTORIES)
        renoise = self.config.transition == "renoise"
        if renoise and (self.config.fill != "memory" or self.config.history is not None):
            raise OptionError("fill and history have no effect with transition='renoise', which starts each stage anew")
        if not renoise and self.config.resize != "spectral":
            raise OptionError(
                "resize has an effect only with transition='renoise': noisy latents are never interpolated"
            )
        if (self.config.fill.endswith("matched") or needs_spectrum(self.stages, self.config.transition)) and (
            self.spectrum is None
        ):
            raise OptionError(
                f"fill={self.config.fill!r} and stages without t_end need the spectrum of the model's latents: "
                "spectrum='flux', 'wan2.1', or a fit by diffaccel.calibrate.spectrum"
            )
        if self.spectrum is not None and self.spectrum.r2 is not None and self.spectrum.r2 < 0.9:
            raise OptionError(
                f"the spectrum was fitted with R^2 = {self.spectrum.r2:.3f}, below 0.9: these latents follow no power "
                "law, so that matched fills and the delta rule would promise what they cannot keep"
            )

    def _check_base(self) -> None:
        if type(self.base).step is not TableScheduler.step:
            raise OptionError(f"{type(self.base).__name__} has its own step and cannot be run in stages")
        if self.base.config.get("rewrite"):
            raise OptionError("rewriters move levels that the stages have fixed; build the scheduler without rewrite=")
        sampler, options = self.base._sampler()
        if any(sampler.intervals_of(n, **options) != n for n in (2, 3, 8)):
            raise OptionError(
                f"sampler {sampler.name!r} spends several calls on an interval, which a stage cannot split; use "
                "'dpmpp', 'unipc' or another one-call sampler"
            )

    # ------------------------------------------------------------------ a run
    @property
    def run(self) -> StagedRun:
        """This thread's run.

        Raises:
            RunError: before set_timesteps.
        """
        found: StagedRun | None = getattr(self._local, "run", None)
        if found is None:
            raise RunError("no run was begun: call set_timesteps before step")
        return found

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Any = None,
        timesteps: Any = None,
        mu: float | None = None,
    ) -> None:
        """Begin a new run in this thread; arguments as in `TableScheduler`, but the stages decide the levels.

        Raises:
            OptionError: another number of calls than the stages make, a custom list of levels, or stages that do not
                fit the scheduler's grid.
        """
        calls = sum(s.steps for s in self.stages)
        asked = len(sigmas) if num_inference_steps is None and sigmas is not None else num_inference_steps
        if asked != calls:
            raise OptionError(
                f"the stages make {calls} model calls ({' + '.join(str(s.steps) for s in self.stages)}), but "
                f"num_inference_steps is {asked}; call the handle of diffaccel.bottleneck, which passes {calls}"
            )
        if timesteps is not None or (sigmas is not None and not _is_ramp(sigmas)):
            raise OptionError("the stages decide the levels of a staged run: leave sigmas and timesteps out")
        self.base.set_timesteps(calls, device, mu=mu)
        base = self.base._runs.need()
        grid = [flow_time(node.level) for node in base.grid]
        run = StagedRun(base.grid.path, grid, (base.grid[0], base.grid[-1]), base.timesteps, base.sigmas)
        run.legs = self._legs(run, self._nominal())
        run.lay(device or base.timesteps.device)
        run.clock = time.perf_counter()
        self._local.run = run

    def _nominal(self) -> Size:
        """A size with the stages' nominal ratios, until the first step knows the real one."""
        if self.spectrum is not None:
            return self.spectrum.height, self.spectrum.width
        return 1 << 20, 1 << 20

    def _legs(self, run: StagedRun, full: Size) -> list[Leg]:
        c = self.config
        sizes = [stage_size(full, s.scale, c.divisor) for s in self.stages]
        return plan_legs(
            self.stages, sizes, run.grid, flow_time(run.path.first.level), transition=c.transition,
            spectrum=self.spectrum, delta=c.delta, rule=c.rule, spacing=f"the grid {grid_of(self.base.config)[0]!r}",
        )  # fmt: skip

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Only 0: an image to begin from would meet a stage of another size."""
        if begin_index:
            raise OptionError(f"a staged run begins at its first call, not at {begin_index} (img2img is not supported)")

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """As the base scheduler does at the level of the next call."""
        if self.base.config.path != "edm":
            return sample
        return sample * output_of(self.base.config).input_scale(level(self.run.time))

    # ------------------------------------------------------------------ a step
    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One row; after the last row of a stage also the change of size, so that the result has another shape.

        Args:
            generator: of samplers that draw noise; it then also makes the noise of transitions.

        Raises:
            RunError: before set_timesteps, past the end, for a size that is not the stage's.
        """
        run = self.run
        if run.stage == len(run.legs):
            raise RunError(f"this run ({len(run.timesteps)} calls) has ended; call set_timesteps to begin another")
        if run.counter == 0:
            x = self._begin(run, sample)
        else:
            x = self._unpack(run, sample)
        x = x if x.dtype is torch.float64 else state_for(x)
        self._check_size(run, x, "a state")
        self._check_size(run, self._unpack(run, model_output), "an output of the model")
        output = output_for(self._unpack(run, model_output), x)
        if run.run is None:
            run.run = open_stage(run, self.base, self._carries(run), x.device)
        inner = run.run
        x, x0 = advance(inner, inner.rows[run.counter - run.first], x, output, generator)
        watch = self.base.config.check_finite
        if watch == "always" or (watch == "cpu" and x.device.type == "cpu"):
            stage, run.stage = run.stage, len(run.legs)  # a NaN ends the run
            check_finite(x, output, run.counter, len(run.timesteps))
            run.stage = stage
        run.counter += 1
        if run.counter == run.first + run.legs[run.stage].stage.steps:
            x = self._leave(run, x, generator)
        out, x0 = (self._pack(v).to(sample.dtype) for v in (x, x0))
        return TableSchedulerOutput(prev_sample=out, pred_original_sample=x0) if return_dict else (out, x0)

    def _begin(self, run: StagedRun, sample: torch.Tensor) -> torch.Tensor:
        """The first call: the size is known now, and with it every level. Returns the first stage's state."""
        self.resize_to(self._full_size(run, sample))
        run.seeds = seeds_of(sample)
        if self.stages[0].scale == 1:
            return self._unpack(run, sample)
        whole = unpacked(sample, run.full) if self.config.packing and run.full else sample
        run.memory = Memory.of(dct(whole) / self.init_noise_sigma, math.inf)
        run.stored = run.memory.bytes
        return self.shrunk(whole)

    def _full_size(self, run: StagedRun, sample: torch.Tensor) -> Size:
        if not self.config.packing:
            return sample.shape[-2], sample.shape[-1]
        if run.full is None:
            raise RunError(
                "this pipeline's latents are tokens: only the hook of diffaccel.bottleneck(pipe) knows their size; "
                "wrap the loaded pipeline with it"
            )
        return run.full

    def resize_to(self, full: Size) -> None:
        """Lay this thread's run out for latents of this size; until then its levels are those of the nominal ratios."""
        run = self.run
        if run.full != full or not run.laid:
            run.full, run.legs, run.laid = full, self._legs(run, full), True
            run.lay()

    def shrunk(self, x: torch.Tensor) -> torch.Tensor:
        """Full-size start noise (..., H, W) at the size of the first stage: still white, of the same variance."""
        h, w = self.run.legs[0].size
        return idct(dct(x)[..., :h, :w]).to(x.dtype)

    def _check_size(self, run: StagedRun, x: torch.Tensor, what: str) -> None:
        if (x.shape[-2], x.shape[-1]) != run.size:
            raise RunError(
                f"call {run.counter}: stage {run.stage} works at latents of {run.size[0]}x{run.size[1]}, got {what} of "
                f"{x.shape[-2]}x{x.shape[-1]}. A staged scheduler works inside diffaccel.bottleneck(pipe, ...)"
            )

    def _unpack(self, run: StagedRun, x: torch.Tensor) -> torch.Tensor:
        return unpacked(x, run.size) if self.config.packing else x

    def _pack(self, x: torch.Tensor) -> torch.Tensor:
        return packed(x) if self.config.packing else x

    # ------------------------------------------------------------------ between stages
    def _carries(self, run: StagedRun) -> bool:
        """Whether the present stage begins with the predictions of the one before."""
        c = self.config
        possible = c.transition == "aligned" and not run.legs[run.stage].raised and run.history is not None
        if c.history == "carry" and run.stage and not possible:
            raise RunError(
                "history='carry' needs aligned stages and a sampler that combines x0-predictions; use 'reset' here"
            )
        return possible and c.history != "reset" and (c.history == "carry" or not c.fill.endswith("matched"))

    def _leave(self, run: StagedRun, x: torch.Tensor, generator: Any) -> torch.Tensor:
        """After the last row of a stage: the state of the next one."""
        inner = run.run
        assert inner is not None
        run.seconds.append(time.perf_counter() - run.clock)
        if run.stage + 1 < len(run.legs):
            x, done = switched(run, self.config, self.spectrum, x, generator)
            run.switches.append(done)
        else:
            run.memory = None
        combines_x0 = all(c.row.space == "x0" and not c.row.registers for c in inner.rows)
        run.history = list(inner.history) if combines_x0 else None
        run.stage, run.run, run.clock = run.stage + 1, None, time.perf_counter()
        return x

    # ------------------------------------------------------------------ what pipelines and the wrapper read
    @property
    def timesteps(self) -> torch.Tensor:
        """What the model is fed, one entry a call; not monotone where the size grows."""
        run = getattr(self._local, "run", None)
        return self.base.timesteps if run is None else run.timesteps

    @property
    def sigmas(self) -> torch.Tensor:
        """(N + 1,) float32 on the CPU: the level of each call's state, and of the result."""
        run = getattr(self._local, "run", None)
        return self.base.sigmas if run is None else run.sigmas

    @property
    def num_inference_steps(self) -> int:
        """Model calls of a run."""
        return sum(s.steps for s in self.stages)

    @property
    def init_noise_sigma(self) -> float:
        """Of the base: a run begins where its own would."""
        return self.base.init_noise_sigma

    @property
    def step_index(self) -> int | None:
        """The call that comes next; None before set_timesteps."""
        run = getattr(self._local, "run", None)
        return None if run is None else run.counter

    @property
    def begin_index(self) -> int:
        """Always 0."""
        return 0

    def __len__(self) -> int:
        return len(self.base)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        for key, value in self.__dict__.items():
            if key != "_local":
                twin.__dict__[key] = copy.deepcopy(value, memo)
        twin._local = threading.local()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()


def _is_ramp(sigmas: Any) -> bool:
    """Whether these are the levels that flow pipelines pass unasked."""
    values = torch.as_tensor(sigmas, dtype=torch.float64)
    n = len(values)
    return bool(torch.allclose(values, torch.linspace(1, 1 / n, n, dtype=torch.float64), atol=1e-6))
