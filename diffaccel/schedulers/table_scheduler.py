"""`TableScheduler`: the diffusers scheduler that runs any registered sampler on any path. The only `step()`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, SupportsIndex

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

from ..artifact import Artifact, check_path
from ..core.current import Announcing
from ..core.table import Table
from ..errors import OptionError, RunError, one_of
from ..identity import check_model
from ..samplers.begin import begin_at
from ..samplers.registry import Sampler
from ..samplers.rewrite import REWRITERS, rewritten
from .artifacts import beside, calibrated_options, entry_of, placed_by
from .compat import COMPATIBLES, NEAREST, merged, saved
from .feed import is_fed
from .from_config import BETA_KEYS, check, output_of, path_of
from .guards import check_finite, first_call, numbers, only_neutral, output_for, state_for
from .measured import measured, where_measured
from .part_options import with_part
from .plan import calls_of, edited, fitting, plan, refuse_nodes, tried
from .policy import POLICIES, policy_of, target_of
from .registration import public, register_library
from .run import PerThread, Run, advance
from .surface import Surface

register_library()


@public
@dataclass
class TableSchedulerOutput(BaseOutput):
    """What `step` returns.

    Args:
        prev_sample: the next state, of the shape and dtype of `sample`.
        pred_original_sample: the x0-prediction that this row used.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor


@public
class TableScheduler(Announcing, Surface, SchedulerMixin, ConfigMixin):
    """A drop-in scheduler: `pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="dpmpp")`.

    `num_inference_steps` is the number of model calls, for every sampler. Use `from_config`, which reads the path
    from the pipeline's own config; the arguments below state a path by hand.

    Args:
        num_train_timesteps: training steps T.
        path: "vp", "flow" or "edm".
        prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction"; None: what most models of the path
            predict ("flow_prediction" for flow, else "epsilon").
        beta_start, beta_end, beta_schedule, trained_betas: VP: the noise schedule (a list of betas is T of them).
        rescale_betas_zero_snr, snr_shift_scale, interpolation, lambda_min_clipped: VP: see `core.path.VP`.
        shift, use_dynamic_shifting, time_shift_type, shift_terminal: flow: see `core.path.Flow`.
        sigma_min, sigma_max, sigma_data, edm_time: EDM: see `core.path.EDM`.
        sampler: a registered sampler (`diffaccel.samplers()`), "dpmpp" if None.
        sampler_options: its options.
        rewrite: rewriters (`da.restart(...)`, ...), one or a list; the order of the list does not matter.
        policy: policies (`da.time_shift(...)`), one or a list.
        artifact: for calibrated samplers: the file that `diffaccel calibrate ...` wrote, or an `Artifact`. The config
            holds its name and checksum, `save_pretrained` puts the file beside the config.
        grid: of `core.grid.GRIDS`; None: what a config states, else vp linspace_open, flow trailing, edm karras. For
            `from_config` also the artifact of `diffaccel calibrate ays`, or its file.
        grid_options: its options.
        final_sigmas_type: "zero" or "sigma_min": where the run ends.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x0 (pixel models).
        clip_sample, clip_sample_range: clamp of x0 (pixel models).
        check_finite: "cpu" looks for NaN after each call where that needs no device synchronisation; "always" on
            every device (slow on a GPU); "never".
        source_class: the scheduler class that the config came from.

    Raises:
        OptionError: an option that is unknown, out of range, or would have no effect.
        PathError: settings that make no path.
    """

    order = 1
    sampler_name: str | None = None  # fixed by presets
    sampler_default = "dpmpp"
    rewriter_name: str | None = None  # presets: a part that is always there, with its options beside the scheduler's
    policy_name: str | None = None
    _compatibles = list(COMPATIBLES)

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        path: str = "vp",
        prediction_type: str | None = None,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float | None = None,
        interpolation: str = "lam",
        lambda_min_clipped: float = -math.inf,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sigma_data: float | None = None,
        edm_time: str = "log",
        sampler: str | None = None,
        sampler_options: dict[str, Any] | None = None,
        rewrite: Sequence[Any] | None = None,
        policy: Sequence[Any] | None = None,
        artifact: str | Artifact | dict[str, str] | None = None,
        grid: str | None = None,
        grid_options: dict[str, Any] | None = None,
        final_sigmas_type: str = "zero",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        check_finite: str = "cpu",
        source_class: str | None = None,
    ) -> None:
        # Every value of ours is meant: none may be dropped as "only a default" when another class is built from it.
        self.register_to_config(_use_default_values=[])
        if trained_betas is not None:
            values = [float(b) for b in trained_betas]
            self.register_to_config(trained_betas=values, num_train_timesteps=len(values))
        if prediction_type is None:
            self.register_to_config(prediction_type="flow_prediction" if path == "flow" else "epsilon")
        if sampler is None:
            self.register_to_config(sampler=self.sampler_name or self.sampler_default)  # so that a config says it all
        parts = with_part(type(self), {}, {"rewrite": rewrite, "policy": policy}, set())
        for key, register in (("rewrite", REWRITERS), ("policy", POLICIES)):
            self.register_to_config(**{key: [part.to_config() for part in register.read(parts[key])] or None})
        self.register_to_config(**saved(self.config))
        self._runs = PerThread()
        self._check()

    def _check(self) -> None:
        """What can be known without a run: a wrong option must not wait for the first one."""
        check(self.config)
        self._artifact, self._filled = None, {}
        found, _ = self._sampler()
        chosen, given = self.config.sampler_options, self.config.artifact
        self._artifact, self._filled = calibrated_options(found, chosen, given, self.config)
        if self._artifact is not None:
            self.register_to_config(artifact=entry_of(self._artifact))
        output_of(self.config)
        policy_of(self.config)
        target_of(self.config)
        one_of("check_finite", self.config.check_finite, ("cpu", "always", "never"))
        tried(self.config, *self._sampler())

    # ------------------------------------------------------------------ building
    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """A scheduler for the model that `config` belongs to.

        Args:
            config: of any diffusers scheduler (`pipe.scheduler.config`), a plain dict, or one of ours.
            return_unused_kwargs: as in diffusers (nothing is ever unused: an unknown option is an error).
            kwargs: arguments of the constructor, and options of the sampler (`order=3`). With `artifact=`, also
                `pipe=` (a pipeline or its denoiser): the artifact must be of this checkpoint; other weights are a
                warning with `strict=False`.

        Raises:
            PathError: if the config does not prove a path; the message lists the keys it saw.
            OptionError: for an unknown option.
            ArtifactError: for a missing artifact, or one that does not fit.
        """
        pipe, strict = kwargs.pop("pipe", None), kwargs.pop("strict", None)
        if not isinstance(config, Mapping):
            raise OptionError(f"from_config needs a config (pipe.scheduler.config), got {type(config).__name__}")
        kwargs, grid = placed_by(with_part(cls, config, kwargs, set(cls._get_init_keys(cls))))
        settings, foreign = merged(cls, config, kwargs)
        made = cls(**settings)
        made.register_to_config(**foreign)
        if not isinstance(config, FrozenDict):  # a config read from a file has no list of defaults; ours then has none
            made._internal_dict = FrozenDict({k: v for k, v in made.config.items() if k != "_use_default_values"})
        if {"grid", "grid_options"} & set(kwargs):
            sampler, options = made._sampler()
            refuse_nodes(sampler, options, "grid")
        if grid is not None:
            check_path(grid, path_of(made.config), made.config.prediction_type)
        belonging = [found for found in (made.artifact, grid) if found is not None]
        for found in belonging if pipe is not None else ():
            check_model(found, pipe, strict=strict is not False)
        if (strict is not None and pipe is None) or (pipe is not None and not belonging):
            raise OptionError("pipe= and strict= are for checking an artifact: pass artifact= and pipe= beside them")
        return (made, {}) if return_unused_kwargs else made

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        """A scheduler that `save_pretrained` wrote, its artifact included; arguments as in diffusers.

        Raises:
            ArtifactError: if the artifact is not beside the config, or was changed.
        """
        config = cls.load_config(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        saved = None if kwargs.get("artifact") is not None else config.get("artifact")
        held = saved and beside(saved, pretrained_model_name_or_path, subfolder, **kwargs)
        made = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        del held  # until here, where the config has found it by its checksum
        return made

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write `scheduler_config.json`, and the artifact beside it; arguments as in diffusers."""
        if self._artifact is not None:
            self._artifact.save(os.path.join(save_directory, self._artifact.file))
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def artifact(self) -> Artifact | None:
        """The calibrated data in use."""
        return self._artifact

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        found = (getattr(diffusers, name, None) for name in cls._compatibles)
        # A class that lacks its library (torchsde) is a stand-in with `_backends`.
        return [c for c in found if c is not None and not getattr(c, "_backends", None)]

    def portable(self) -> SchedulerMixin:
        """A scheduler of the class that the config came from (else of the usual one), for people without diffaccel."""
        kind = getattr(diffusers, self.config.source_class or NEAREST[self.config.path])
        known = kind._get_init_keys(kind) - (set() if self.config.path == "vp" else set(BETA_KEYS))
        kept = {k: v for k, v in self.config.items() if k in known}
        return kind.from_config(kept | {"_class_name": kind.__name__})

    def _sampler(self, calls: int | None = None) -> tuple[Sampler, dict[str, Any]]:
        """The sampler and its options, for a run of `calls` with those that the artifact measured for it."""
        fixed, asked = self.sampler_name, self.config.sampler
        if fixed and asked not in (None, fixed):
            raise OptionError(f"{type(self).__name__} is the sampler {fixed!r}; use TableScheduler for {asked!r}")
        found = rewritten(asked or fixed or self.sampler_default, self.config.rewrite)
        advice = {} if calls is None else measured(self._artifact, found.defaults, self.config, calls)
        return found, found.options({**advice, **(self.config.sampler_options or {}), **self._filled})

    # ------------------------------------------------------------------ a run
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | torch.Tensor | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Begin a new run in this thread.

        Args:
            num_inference_steps: model calls N; may be left out where `sigmas` or `timesteps` are given.
            device: of `self.timesteps`.
            sigmas: one a call (a closing 0 is the end). Flow: in (0, 1], before the shift; else sigma/alpha. They
                take the place of the grid, but for the ramp `linspace(1, 1/N, N)` that flow pipelines pass unasked.
            timesteps: one a call, as the model is fed. On flow paths they mean `sigma = t / num_train_timesteps`,
                without a shift. With `sigmas` beside them, those place the nodes and `timesteps` is what is fed.
            mu: the resolution-dependent shift of flow models with `use_dynamic_shifting`; without effect otherwise
                (FLUX passes it always).

        Raises:
            OptionError: no or contradicting numbers of calls, noise that does not fall, a missing `mu`.
        """
        levels, times = numbers(sigmas, "sigmas"), numbers(timesteps, "timesteps")
        calls = calls_of(num_inference_steps, levels, times)
        run = plan(self.config, *self._sampler(calls), calls, device, levels, times, mu)
        run.notes += where_measured(self._artifact, calls)
        self._aim(run, run.table)
        self._runs.set(run)
        if not run.table.scalar:
            self._compile(run, 0)
            run.prepared = True
        self.announce()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say that the run begins at call `begin_index` (img2img, refiners); the rows are compiled from there.

        Raises:
            RunError: before set_timesteps, or if there is no such call.
        """
        run = self._runs.need()
        if not isinstance(begin_index, SupportsIndex) or not 0 <= index(begin_index) <= len(run):
            raise RunError(f"set_begin_index({begin_index!r}): this run has calls 0..{len(run) - 1}")
        sampler, _ = self._sampler()
        if 0 < begin_index < len(run) and sampler.begin is not None:  # it may refuse, before the model is called
            begin_at(run.table, run.grid, int(begin_index), sampler, run.options)
        run.begin, run.counter, run.history = int(begin_index), None, []

    def step(
        self,
        model_output: torch.Tensor,
        timestep: Any,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> TableSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """One row of the table: the state after this model call.

        Args:
            model_output: of the shape of `sample`, or with twice its channels (learned variance; dropped).
            timestep: read once, at the first call of a run that was not told where it begins.
            sample: the state handed to the model, any shape; edits made to it between calls are kept.
            generator: for samplers that draw noise; a list has one for each image. None: `scheduler.generator`.
            return_dict: an output class, or the tuple (next state, x0-prediction); edit a copy of the latter.
            kwargs: what pipelines pass unasked is accepted at its neutral value; anything else is an error.

        Returns:
            In the dtype of `sample`; the arithmetic is in float32 (float64 if the sample is).

        Raises:
            RunError: before set_timesteps, past the end, for wrong shapes or a NaN (see `check_finite`).
        """
        if kwargs:
            only_neutral(kwargs)
        run = self._runs.get()
        if run is None or run.counter is None:
            run = self._open(timestep, sample)
        i: int = run.counter  # type: ignore[assignment]
        if i >= len(run):
            raise RunError(f"this run ({len(run)} calls) has ended; call set_timesteps to begin another")
        dtype = getattr(sample, "dtype", None)
        x = sample if dtype is torch.float32 or dtype is torch.float64 else state_for(sample)
        output = model_output
        if (
            not isinstance(output, torch.Tensor)
            or output.shape != x.shape
            or output.dtype is not x.dtype
            or output.device != x.device
        ):
            output = output_for(model_output, x)
        if run.history and run.history[0].shape != x.shape:
            run.notes.append(f"call {i}: the state became {tuple(x.shape)}; the history was dropped")
            run = self._ready(run, x)
            self._compile(run, i)
        row = run.rows[i - run.start]
        if row.row.draws and generator is None:
            generator = self._noise_source()
        state, x0 = advance(run, row, x, output, generator)
        if run.shifts is not None:
            draw = run.draws[0] if row.row.draws else None
            state, x0 = run.shifts(i - run.start, x, output, state, x0, draw)
        if run.watch and (x.device.type == "cpu" or run.watch == "always"):
            run.counter = len(run)  # a NaN ends the run: its history holds it by now
            check_finite(state, output, i, len(run))
        run.counter = i + 1
        if dtype is not x.dtype:
            state, x0 = state.to(dtype), x0.to(dtype)
        if not return_dict:
            return state, x0
        if x0 is model_output or (run.history and x0 is run.history[0]):  # edits of it must not reach later rows
            x0 = x0.clone()
        return TableSchedulerOutput(prev_sample=state, pred_original_sample=x0)

    def _open(self, timestep: Any, sample: torch.Tensor) -> Run:
        """The first call of a run: honour edits of `sigmas`, find where it begins, compile."""
        run = self._ready(self._runs.need(), sample)
        start = run.begin if run.begin is not None else first_call(run, timestep)
        run.watch = "" if self.config.check_finite == "never" else self.config.check_finite
        if start < len(run) and not (run.prepared and start == run.start):
            self._compile(run, start)
        run.prepared, run.counter = False, start
        return run

    def _ready(self, run: Run, sample: torch.Tensor) -> Run:
        """The run, or another in its place: on edited `sigmas`, or with calibrated data for samples of this shape."""
        sampler = self._sampler()[0]
        asked = run.checked is not None and not torch.equal(run.checked, run.sigmas)
        made = fitting(edited(run, sampler) if asked else run, sampler, self._artifact, sample)
        if made is not run:
            self._runs.set(made)
        return made

    def _compile(self, run: Run, k: int) -> None:
        run.open_at(k, self._sampler()[0], output_of(self.config), policy_of(self.config))
        if k or run.shifts is None:
            self._aim(run, Table(tuple(c.row for c in run.rows), run.table.sampler))

    def _aim(self, run: Run, table: Table) -> None:
        """Begin the policy that aims rows elsewhere, if there is one."""
        target = target_of(self.config)
        if target is not None:
            run.shifts = target.begin(table, run.grid.path, output_of(self.config), is_fed(self), run.timesteps.device)
