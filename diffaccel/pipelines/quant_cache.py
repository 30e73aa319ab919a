"""`diffaccel.quant_cache`: quantisation, denoiser cache and variance compensation on one pipeline, in this order."""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from typing import Any

import torch

from ..artifact import Artifact
from ..denoiser.after_step import with_action
from ..denoiser.cache import Cache
from ..denoiser.cache_attach import Attached, attach_cache
from ..denoiser.cache_report import CacheReport
from ..denoiser.calibrated import Calibrated, Passes, key_of
from ..denoiser.compensate import Compensation
from ..denoiser.contract import PREFIX, denoisers, mark, unmark
from ..denoiser.quant import Quant, Quantised, quantise
from ..errors import ArtifactError, OptionError, RunError
from ..identity import adapter_strengths, model_identity
from ..schedulers.fsampler import FSamplerScheduler
from .handle import refuse_stateful, refuse_wrapped

NAME = "quant_cache"


@dataclass(frozen=True)
class QuantCacheReport:
    """What was measured in a run; see its parts.

    Attributes:
        cache: the cache's own report; None without one.
        quantised: denoiser -> which layers were quantised and which were not.
        scales: denoiser -> largest scale of a quantised activation (the step between two of its values), and the
            layer that needed it.
        gains: smallest and largest gain of the variance compensation; None without one.
        compensated: steps that were corrected.
    """

    cache: CacheReport | None
    quantised: dict[str, str]
    scales: dict[str, tuple[float, str]]
    gains: tuple[float, float] | None
    compensated: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "cache": None if self.cache is None else self.cache.to_dict(),
            "quantised": self.quantised,
            "largest_activation_scale": self.scales,
            "gains": self.gains,
            "compensated": self.compensated,
        }

    def __str__(self) -> str:
        lines = [] if self.cache is None else [str(self.cache)]
        lines += [f"{name} {text}" for name, text in self.quantised.items()]
        lines += [f"{name} largest scale of an activation {s:.4g}, in {at}" for name, (s, at) in self.scales.items()]
        if self.gains is not None:
            low, high = self.gains
            lines.append(f"variance compensation after {self.compensated} steps, gains {low:.4g} to {high:.4g}")
        return "\n".join(lines)


class QuantCache:
    """A pipeline under quantisation and cache: a context manager, and callable in its place; see `quant_cache`."""

    def __init__(self, pipe: Any, cache: Cache | None, quant: Quant | None, calibrated: Calibrated | None) -> None:
        self.pipe = pipe
        self._quantised: dict[str, Quantised] = {}
        self._cache: Attached | None = None
        self._original: Any = None
        self._scheduler: Any = None
        self._calibrated = calibrated
        self._compensation: Compensation | None = None
        self._adapters: list[str] = []
        self._local = threading.local()
        self._passes: Passes | None = None
        self._last: QuantCacheReport | None = None  # kept by `remove`
        self._removed = False
        try:
            self._apply(cache, quant)
        except BaseException:
            self.remove()
            raise

    def _apply(self, cache: Cache | None, quant: Quant | None) -> None:
        """Quantise, hook, compensate: hooks would hide layers from quantisation, and its error is compensated."""
        models = denoisers(self.pipe)
        if self._calibrated is not None:
            self._calibrated.check_identity(model_identity(self.pipe))
        if quant is not None:
            for name, model in models.items():
                self._quantised[name] = done = quantise(model, quant)
                done.run_of = lambda: self.pipe.scheduler.timesteps
        if cache is not None:
            self._cache = attach_cache(self.pipe, cache)
        for done in self._quantised.values():
            mark(done.module, PREFIX + NAME)
        if self._calibrated is not None and cache is not None and self._cache is not None:
            number = self._calibrated.run(cache, self._cache.level)
            self._compensation = self._calibrated.compensation(number)
            self._adapters = _adapters(self.pipe)
            self._original = self.pipe.scheduler
            self._scheduler = self.pipe.scheduler = with_action(self._original, self._after_step)
            self._passes = Passes(self.pipe)

    # ------------------------------------------------------------------ use
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`pipe(...)`."""
        self._refuse_removed()
        return self.pipe(*args, **kwargs)

    def memory(self, *args: Any, **kwargs: Any) -> int:
        """Bytes that `pipe(*args, **kwargs)` would keep in its cache at most, told before anything is kept.

        The pipeline begins that run and stops after its first step; nothing is cached. No other thread may use the
        pipeline meanwhile.

        Raises:
            OptionError: without a cache.
            RunError: after `remove`.
        """
        self._refuse_removed()
        if self._cache is None:
            raise OptionError("there is no cache, so nothing is kept; memory() is of quant_cache(pipe, cache=...)")
        return self._cache.memory(lambda: self.pipe(*args, **kwargs))

    def compile(self, **options: Any) -> None:
        """Compile the parts that the cache runs or leaves out, each by itself; its decisions stay outside.

        Calls on some rows of a batch have other batch sizes: each new one compiles again, until torch makes the batch
        a variable (`dynamic=True` does so at once).

        Args:
            options: of `torch.compile`.

        Raises:
            OptionError: without a cache; compile the pipeline as ever, then (`compile_repeated_blocks`).
            RunError: after `remove`.
        """
        self._refuse_removed()
        if self._cache is None:
            raise OptionError(
                "there is no cache to keep out of compiled code; use the model's compile_repeated_blocks()"
            )
        self._cache.compile(**options)

    def report(self) -> QuantCacheReport:
        """What was measured in this thread's last run; after `remove`, in the last one of the thread that removed it.

        Raises:
            RunError: if there was none.
        """
        if self._last is not None:
            return self._last
        if self._removed:
            raise RunError("no run was made before this wrapper was removed, so nothing was measured")
        return QuantCacheReport(
            None if self._cache is None else self._cache.report(),
            {name: str(done) for name, done in self._quantised.items()},
            {name: done.scale for name, done in self._quantised.items() if done.scale is not None},
            None if self._compensation is None else self._compensation.range,
            getattr(self._local, "steps", 0),
        )

    # ------------------------------------------------------------------ undo
    def remove(self) -> None:
        """Undo, the last first: the pipeline is what it was. Removing twice is fine.

        With `Quant(..., keep_float=False)` the denoiser stays quantised: its float weights are gone.

        Raises:
            RunError: if somebody put another scheduler, a hook or offloading over ours; nothing is undone then.
        """
        undoable = [done for done in self._quantised.values() if done.quant.keep_float]
        if self._scheduler is not None and self.pipe.scheduler is not self._scheduler:
            raise RunError(
                f"{NAME}: pipe.scheduler was replaced by a {type(self.pipe.scheduler).__name__} while variance "
                "compensation was on; put it back, or remove the wrapper before changing the scheduler"
            )
        if self._cache is not None:
            self._cache.check_removable()
        for done in undoable:
            done.check_undoable()
        if not self._removed:
            with contextlib.suppress(RunError):  # no run was made
                self._last = self.report()
            self._removed = True
        if self._scheduler is not None:
            self.pipe.scheduler = self._original
            self._scheduler = self._original = None
        if self._passes is not None:
            self._passes.remove()
        if self._cache is not None:
            self._cache.remove()
            self._cache = None
        for done in self._quantised.values():
            unmark(done.module)
        for done in undoable:
            done.undo()
        self._quantised = {}

    def __enter__(self) -> QuantCache:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()

    def _refuse_removed(self) -> None:
        if self._removed:
            raise RunError("this wrapper was removed; call quant_cache() again")

    # ------------------------------------------------------------------ after each step
    def _after_step(self, step: int, x: torch.Tensor, scheduler: Any) -> torch.Tensor:
        passes = 0 if self._passes is None else self._passes.taken()
        if getattr(self._local, "timesteps", None) is not scheduler.timesteps:
            assert self._calibrated is not None
            now = _adapters(self.pipe)
            if now != self._adapters:
                raise ArtifactError(
                    f"{self._calibrated.artifact.file} was calibrated with other adapters: {self._adapters or 'none'} "
                    f"when the wrapper was put on, here {now or 'none'}. Calibrate with them, or leave artifact= out"
                )
            recipe = next(iter(self._quantised.values())).recipe if self._quantised else None
            self._calibrated.check(key_of(self.pipe, scheduler, tuple(x.shape[1:]), recipe, passes))
            self._local.timesteps, self._local.steps = scheduler.timesteps, 0
        if self._compensation is None:
            return x
        self._local.steps += 1
        return self._compensation.apply(step, x)


def _adapters(pipe: Any) -> list[str]:
    """The LoRA that act on the denoisers, with their strengths, and those that are fused."""
    found = [f"{name} (fused)" for name in getattr(pipe, "fused_loras", ())]
    for model in denoisers(pipe).values():
        found += [f"{name} at {how}" for name, how in adapter_strengths(model).items() if how != "0"]
    return sorted(found)


def quant_cache(
    pipe: Any,
    cache: Cache | None = None,
    quant: Quant | str | None = None,
    artifact: Artifact | str | os.PathLike[str] | None = None,
) -> QuantCache:
    """Reuse work inside the denoiser, run the rest in int8 or fp8, and correct the drift of both (Q&C, 2503.02508).

        with da.quant_cache(pipe, cache=da.Cache.every(3, forecast=1), quant="w8a8", artifact=F) as h:
            image = h(prompt, num_inference_steps=50).images[0]
            print(h.report())

    Args:
        pipe: a pipeline of diffusers, UNet or transformer, with any scheduler that makes one call a step.
        cache: see `Cache`.
        quant: "w8a8", "w8", "fp8", or `Quant(...)`.
        artifact: of `diffaccel.calibrate.cache`: its variance compensation is applied after each step. It must fit
            the checkpoint, scheduler, steps, grid, guidance, size, cache and quantisation.

    Returns:
        A handle: a context manager, callable as the pipeline, with `.report()`, `.compile()` and `.remove()`.

    Raises:
        OptionError: nothing to do; a pipeline that is wrapped already, has another cache, extrapolates its outputs, or
            has no parts that the cache knows.
        ArtifactError: an artifact of another checkpoint, or not of these settings.
    """
    if not hasattr(pipe, "scheduler"):
        raise OptionError(f"{NAME} needs a pipeline, with its scheduler and its denoiser, got a {type(pipe).__name__}")
    if cache is not None and not isinstance(cache, Cache):
        raise OptionError(
            f"cache={cache!r} is no Cache; Cache.every(3), Cache.mask([...]), Cache.first_block(0.1), ..."
        )
    chosen = Quant.of(quant)
    if cache is None and chosen is None:
        raise OptionError("quant_cache does nothing without cache= and quant=")
    if cache is not None and cache.artifact is not None and artifact is None:
        artifact = cache.artifact
    if artifact is not None and cache is None:
        raise OptionError("artifact= belongs to a cache: give cache=, too (Cache.learned(artifact) uses its mask)")
    refuse_wrapped(pipe)
    refuse_stateful(pipe, NAME, "two caches of one model do not compose")
    if isinstance(pipe.scheduler, FSamplerScheduler):
        raise OptionError(
            f"{NAME}: the scheduler predicts the model's outputs (FSamplerScheduler), and a cache predicts parts of "
            "them: two extrapolations of the same call do not compose; use another scheduler"
        )
    return QuantCache(pipe, cache, chosen, None if artifact is None else Calibrated.load(artifact))
