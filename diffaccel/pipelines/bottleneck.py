"""Runs that change resolution on unmodified pipelines (Bottleneck Sampling, arXiv:2503.18940, and its successors).

The size changes inside the scheduler's `step()`; a hook on the denoiser rewrites the few arguments that state a size.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks import ModelHook
from torch.utils.flop_counter import FlopCounterMode

from ..artifact import Artifact
from ..calibrate.spectrum import law_of
from ..core.stage_plan import preset
from ..core.stages import Size, Spectrum, Stage, flow_time, step_equivalents
from ..denoiser.contract import Uncopied
from ..errors import OptionError, RunError, one_of
from ..schedulers.resize import packed, unpacked
from ..schedulers.staged import StagedScheduler
from ..schedulers.staged_run import StagedRun
from ..schedulers.table_scheduler import TableScheduler
from .bottleneck_report import StagedReport, StageReport
from .handle import Handle, denoisers, refuse_wrapped

STATES = ("sample", "hidden_states")


@dataclass(frozen=True)
class Layout:
    """How a pipeline's denoiser is told the size.

    Args:
        size_in: the argument that holds the size of packed latents ("img_ids", "img_shapes"); None: the state's shape.
        smallest: the smallest size that the model is known to draw well, as a fraction of its own default size.
    """

    size_in: str | None = None
    smallest: float = 1.0

    @property
    def packing(self) -> bool:
        """Whether latents are tokens."""
        return self.size_in is not None


LAYOUTS = {
    "StableDiffusionPipeline": Layout(),
    "StableDiffusionXLPipeline": Layout(),
    "StableDiffusion3Pipeline": Layout(smallest=0.5),
    "FluxPipeline": Layout("img_ids", 0.25),
    "QwenImagePipeline": Layout("img_shapes"),
    "WanPipeline": Layout(),
}
REFUSED = {
    "denoising_end": "it counts timesteps above a cutoff, which rise again where the size grows",
    "denoising_start": "it counts timesteps below a cutoff, which rise again where the size grows",
    "timesteps": "the stages decide the levels",
    "sigmas": "the stages decide the levels",
    "ip_adapter_image": "its masks have the full size",
}
SMALL = ("error", "warn")


@dataclass
class _Seen:
    """What the hook saw in one run."""

    run: StagedRun
    stage: int = 0
    rewritten: int = 0


@dataclass
class _Costs:
    """FLOPs of one call at each size. Counted when they are asked for: a counted call may round differently.

    Args:
        calls: a call at each size that is still to be counted: the denoiser and its arguments.
        flops: for each image of a call.
    """

    calls: dict[Size, tuple[Any, dict[str, Any], int]] = field(default_factory=dict)
    flops: dict[Size, float | None] = field(default_factory=dict)

    def of(self, size: Size) -> float | None:
        """FLOPs at this size; None where they cannot be counted."""
        if size in self.calls:
            forward, given, images = self.calls.pop(size)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                forward(**given)
            self.flops[size] = counter.get_total_flops() / images or None
        return self.flops.get(size)


# ---------------------------------------------------------------------- the hook
class _SizeHook(Uncopied):
    """Gives the denoiser the size of the present stage, and counts what a call at each size costs."""

    def __init__(self, scheduler: StagedScheduler, layout: Layout, microcond: str, guard: Any, costs: _Costs) -> None:
        super().__init__()
        self.scheduler, self.layout, self.microcond, self.guard = scheduler, layout, microcond, guard
        self.costs = costs

    def seen(self) -> _Seen:
        """Of this thread's run."""
        run = self.scheduler.run
        found = getattr(run, "seen", None)
        if found is None:
            found = run.seen = _Seen(run)  # type: ignore[attr-defined]
        return found

    def new_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward = self.fn_ref.original_forward
        bound = inspect.signature(forward).bind(*args, **kwargs)
        given = dict(bound.arguments)
        given |= given.pop("kwargs", {})
        name = next(n for n in STATES if n in given)
        seen, run = self.seen(), self.scheduler.run
        if run.counter == 0:
            self._first(given, name, run)
        if run.size != run.full:
            seen.rewritten += self._rewrite(given, run)
        if run.stage != seen.stage:
            seen.stage = run.stage
            reset: Any = getattr(module, "_reset_stateful_cache", None)
            if reset is not None:
                reset()  # caches hold hidden states of the other size
        compiled = hasattr(module, "_orig_mod")  # the counter does not see into compiled code
        if not compiled and run.size not in self.costs.flops and run.size not in self.costs.calls:
            self.costs.calls[run.size] = (forward, given, len(given[name]))
        return forward(**given)

    def _first(self, given: dict[str, Any], name: str, run: StagedRun) -> None:
        """The first call knows the size that was asked for, and is itself shrunk if the run begins small."""
        state, shape = given[name], self.layout.size_in
        full = _packed_size(given[shape], shape) if shape else (state.shape[-2], state.shape[-1])
        self.guard(full)
        self.scheduler.resize_to(full)
        if run.legs[0].size != full:
            whole = unpacked(state, full) if shape else state
            small = self.scheduler.shrunk(whole)
            given[name] = packed(small) if shape else small

    def _rewrite(self, given: dict[str, Any], run: StagedRun) -> int:
        """Put the present size into the arguments that state one; 1 if there was any."""
        h, w = run.size
        if self.layout.size_in == "img_ids":
            ids = given["img_ids"]
            grid = torch.zeros(h // 2, w // 2, ids.shape[-1], device=ids.device, dtype=ids.dtype)
            grid[..., 1] += torch.arange(h // 2, device=ids.device, dtype=ids.dtype)[:, None]
            grid[..., 2] += torch.arange(w // 2, device=ids.device, dtype=ids.dtype)
            given["img_ids"] = grid.reshape(-1, ids.shape[-1])
            return 1
        if self.layout.size_in == "img_shapes":
            given["img_shapes"] = [[(1, h // 2, w // 2)] for _ in given["img_shapes"]]
            return 1
        added = given.get("added_cond_kwargs")
        if self.microcond == "target" and added and "time_ids" in added:
            assert run.full is not None
            scale = torch.ones_like(added["time_ids"])
            scale[:, -2:] *= torch.tensor([h / run.full[0], w / run.full[1]], dtype=scale.dtype, device=scale.device)
            given["added_cond_kwargs"] = added | {"time_ids": added["time_ids"] * scale}
            return 1
        return 0


def _packed_size(value: Any, name: str) -> Size:
    """The size of the latents in an argument of the denoiser."""
    if name == "img_ids":
        return 2 * (int(value[..., 1].max()) + 1), 2 * (int(value[..., 2].max()) + 1)
    _, h, w = (
        value[0][0] if isinstance(value[0], (list, tuple)) and isinstance(value[0][0], (list, tuple)) else value[0]
    )
    return 2 * int(h), 2 * int(w)


# ---------------------------------------------------------------------- the handle
class Bottleneck(Handle):
    """Handle of `bottleneck`."""

    def __init__(self, pipe: Any, scheduler: StagedScheduler, layout: Layout, microcond: str, on_small: str) -> None:
        self.scheduler, self.layout, self.on_small, self.costs = scheduler, layout, on_small, _Costs()
        hooks: dict[torch.nn.Module, ModelHook] = {
            module: _SizeHook(scheduler, layout, microcond, self._guard, self.costs)
            for module in denoisers(pipe).values()
        }
        super().__init__(pipe, "bottleneck", scheduler, hooks)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`pipe(...)` with the number of calls that the stages make.

        Raises:
            OptionError: another `num_inference_steps`, or an argument that no staged run can have.
        """
        for name, why in REFUSED.items():
            if kwargs.get(name) is not None:
                raise OptionError(f"bottleneck: {name} is refused: {why}")
        kwargs.setdefault("num_inference_steps", self.scheduler.num_inference_steps)
        return self.pipe(*args, **kwargs)

    def _guard(self, full: Size) -> None:
        """Warn or refuse where a stage is smaller than the model is known to draw."""
        factor, own = _pixels(self.pipe), _own_size(self.pipe)
        low = min(s.scale for s in self.scheduler.stages)
        small, least = min(full) * low * factor, own * self.layout.smallest
        if own and small < least:
            text = (
                f"bottleneck: the smallest stage works at {small:.0f} pixels, below the {least:.0f} that "
                f"{type(self.pipe).__name__} with this checkpoint is known to draw; ask for a larger image, or larger "
                "scales"
            )
            if small < least / 2 and self.on_small == "error":
                raise OptionError(f"{text} (on_small='warn' runs it all the same)")
            warnings.warn(text, stacklevel=2)

    def report(self) -> StagedReport:
        """What was measured in this thread's last run; the first time, a call at each size is counted.

        Raises:
            RunError: before the first run, or if the hook was declared but never engaged.
        """
        run = self.scheduler.run
        seen: _Seen | None = getattr(run, "seen", None)
        if seen is None or run.full is None or not run.counter:
            raise RunError("bottleneck: nothing to report: no run has made a step in this thread")
        small = sum(leg.stage.steps for k, leg in enumerate(run.legs[: run.stage]) if leg.size != run.full)
        if self.layout.packing and seen.rewritten < small:
            raise RunError(f"bottleneck: {small} calls had another size, but the hook rewrote only {seen.rewritten}")
        sigmas, at, stages = [float(s) for s in run.sigmas], 0, []
        for leg, seconds in zip(run.legs, [*run.seconds, *[0.0] * len(run.legs)], strict=False):
            n = leg.stage.steps
            part = tuple(sigmas[at : at + n])
            stages.append(
                StageReport(leg.size, n, tuple(map(float, leg.times)), part, seconds, self.costs.of(leg.size))
            )
            at += n
        work, full = None, self.costs.of(run.full)
        if full and all(s.flops for s in stages):
            work = step_equivalents([s.calls for s in stages], [float(s.flops or 0) for s in stages], full)
        return StagedReport(
            tuple(stages), tuple(run.switches), self.scheduler.config.fill, work, None if work is None else round(work),
            seen.rewritten, run.stored, tuple(run.seeds), run.stage == len(run.legs),
        )  # fmt: skip


def bottleneck(
    pipe: Any,
    stages: str | Sequence[Stage] = "spectral-hlh",
    *,
    calls: int | None = None,
    sampler: str | None = None,
    fill: str = "memory",
    history: str | None = None,
    spectrum: Spectrum | Artifact | str | dict[str, Any] | None = None,
    delta: float = 0.01,
    rule: str = "missing",
    resize: str = "spectral",
    microcond: str = "keep",
    on_small: str = "error",
) -> Bottleneck:
    """Run a pipeline in stages of different resolution, in one call of the unmodified pipeline.

        with da.bottleneck(pipe, "spectral-hlh", calls=25) as h:
            image = h(prompt, height=1024, width=1024).images[0]
        print(h.report())

    Args:
        pipe: a pipeline of `LAYOUTS`. A scheduler of diffusers' own is replaced by the `TableScheduler` of its config.
        stages: a preset (`core.stage_plan.preset`), or a list of `Stage`.
        calls: model calls, for presets that are shares of them (25 if None).
        sampler: of the stages; None: the scheduler's own if it is one of ours, else "dpmpp".
        fill, history, delta, rule, resize: see `StagedScheduler`.
        spectrum: of the latents: an artifact of `calibrate.spectrum` or its file, "flux", "wan2.1", or a `Spectrum`.
        microcond: SDXL's size conditioning in small stages: "keep", or "target" (scales the target size).
        on_small: stages below half of what the model is known to draw: "error" or "warn".

    Raises:
        OptionError: a pipeline, scheduler or option that this cannot run with, and why.
    """
    refuse_wrapped(pipe)
    one_of("on_small", on_small, SMALL)
    one_of("microcond", microcond, ("keep", "target"))
    layout = _layout(pipe)
    if microcond == "target" and type(pipe).__name__ != "StableDiffusionXLPipeline":
        raise OptionError("microcond='target' has an effect only on SDXL")
    transition, named = "aligned", isinstance(stages, str)
    if isinstance(stages, str):
        stages, transition = preset(stages, calls)
    elif calls is not None:
        raise OptionError("calls has no effect with a list of stages, which state their own")
    base = _base(pipe, sampler)
    if named and transition == "aligned":
        stages = _within(stages, base)
    options: dict[str, Any] = {} if transition == "renoise" else {"history": history}
    if fill != "memory" or transition == "aligned":
        options["fill"] = fill
    found = _spectrum(spectrum)
    scheduler = StagedScheduler(
        base_config=dict(base.config) | {"_class_name": type(base).__name__},
        stages=[s.to_config() for s in stages], transition=transition, resize=resize,
        spectrum=None if found is None else vars(found).copy(), delta=delta, rule=rule,
        divisor=_divisor(pipe, layout), packing=layout.packing, **options,
    )  # fmt: skip
    return Bottleneck(pipe, scheduler, layout, microcond, on_small)


def _spectrum(given: Any) -> Spectrum | None:
    if isinstance(given, str) and given.endswith(".safetensors"):
        given = Artifact.load(given, "spectrum")
    return law_of(given) if isinstance(given, Artifact) else Spectrum.of(given)


def _layout(pipe: Any) -> Layout:
    kind = type(pipe).__name__
    if kind not in LAYOUTS:
        raise OptionError(
            f"bottleneck: {kind} is not supported: ControlNet, T2I-Adapter, inpainting, img2img, image-to-video "
            f"hold conditions of the full size, and other classes were not tried. Supported: {', '.join(LAYOUTS)}"
        )
    if kind == "WanPipeline" and pipe.config.get("expand_timesteps"):
        raise OptionError("bottleneck: Wan with expand_timesteps makes a mask of the full size; not supported")
    return LAYOUTS[kind]


def _base(pipe: Any, sampler: str | None) -> TableScheduler:
    """The scheduler that solves each stage."""
    scheduler, more = pipe.scheduler, {} if sampler is None else {"sampler": sampler}
    if isinstance(scheduler, TableScheduler) and not more:
        base = scheduler
    else:
        base = TableScheduler.from_config(scheduler.config, **more)
    for key, why in (
        ("policy", "aims rows at levels of its own"),
        ("artifact", "holds for the levels it was made for"),
    ):
        if base.config.get(key):
            raise OptionError(f"bottleneck: the scheduler's {key} {why}; build it without")
    return base


def _within(stages: Sequence[Stage], base: TableScheduler) -> tuple[Stage, ...]:
    """A preset whose first stage would end above the start of the scheduler's grid (VP, "leading") ends sooner."""
    if base.config.path == "flow" or stages[0].t_end is None:
        return tuple(stages)
    base.set_timesteps(sum(s.steps for s in stages))
    start = flow_time(base._runs.need().nodes[0].level)
    first = stages[0]
    if first.t_end is not None and first.t_end >= start:
        first = Stage(first.scale, first.steps, 0.97 * start, first.t_start, first.shift)
    return (first, *stages[1:])


def _divisor(pipe: Any, layout: Layout) -> int:
    """What the size of a small stage is a multiple of, so that the denoiser needs no padding."""
    if layout.packing:
        return 2
    config: Any = next(iter(denoisers(pipe).values())).config
    blocks, patch = config.get("block_out_channels"), config.get("patch_size")
    if blocks:
        return int(2 ** (len(blocks) - 1))
    return int(max(patch) if isinstance(patch, (tuple, list)) else patch or 1)


def _pixels(pipe: Any) -> int:
    """Pixels for each latent."""
    return int(getattr(pipe, "vae_scale_factor_spatial", None) or pipe.vae_scale_factor)


def _own_size(pipe: Any) -> float:
    """The checkpoint's default size in pixels; 0 where it states none."""
    config: Any = next(iter(denoisers(pipe).values())).config
    size = config.get("sample_size") or getattr(pipe, "default_sample_size", None) or 0
    return float(min(size) if isinstance(size, (tuple, list)) else size) * _pixels(pipe)
