"""diffaccel: fewer model calls for the diffusion pipelines that you already have.

Importing this package loads neither torch nor diffusers; names are resolved when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> module that defines it
_NAMES = {
    "Cache": "denoiser.cache",
    "Node": "core.node",
    "Nodes": "core.path",
    "Path": "core.path",
    "Prediction": "core.prediction",
    "Table": "core.table",
    "accelerate": "pipelines.accelerate",
    "align": "samplers.align",
    "boost_and_skip": "samplers.boost",
    "Quant": "denoiser.quant",
    "Spectrum": "core.stages",
    "Stage": "core.stages",
    "bottleneck": "pipelines.bottleneck",
    "carry": "core.linear",
    "contrast": "samplers.contrast",
    "epsilon_scale": "samplers.epsilon_scale",
    "from_k_diffusion": "samplers.kdiffusion",
    "iadb": "core.path",
    "momentum": "samplers.momentum",
    "nodes": "api",
    "paradigms": "pipelines.picard",
    "patch_parallel": "pipelines.patch_parallel",
    "sample": "api",
    "time_shift": "schedulers.time_shift",
    "feed_timesteps": "schedulers.feed",
    "teleport": "pipelines.teleport",
    "trace": "api",
    "extrapolate": "denoiser.extrapolate",
    "quant_cache": "pipelines.quant_cache",
    "restart": "samplers.restart",
    "skip": "samplers.skip",
    "rewriter": "samplers.rewrite",
    "sampler": "samplers.registry",
}
# two are callable: `diffaccel.samplers()` lists them, `diffaccel.tune(...)` searches
_SUBPACKAGES = ("calibrate", "eval", "models", "samplers", "schedulers", "tune")
_SCHEDULERS = (
    "CPSScheduler",
    "DCSolverScheduler",
    "DPMSolverV3Scheduler",
    "EpsilonScalingScheduler",
    "FittedScheduler",
    "FSamplerScheduler",
    "GHVBScheduler",
    "RestartScheduler",
    "StagedScheduler",
    "TableScheduler",
    "TableSchedulerOutput",
    "TimeShiftScheduler",
    "UniPCScheduler",
)
_DIFFUSERS = ("SchedulerMixin", "ModelMixin", "DiffusionPipeline")  # diffusers looks these up on our module

__all__ = ["__version__", *_NAMES, *_SUBPACKAGES, *_SCHEDULERS]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _SCHEDULERS:
        return getattr(importlib.import_module(f"{__name__}.schedulers"), name)
    if name in _DIFFUSERS:
        return getattr(importlib.import_module("diffusers"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
