"""Schedulers of diffusers and configs of published pipelines, for the tests of `from_config` and of grids."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers.schedulers
import numpy as np
import pytest
from diffusers import SchedulerMixin

CONFIGS = Path(__file__).parent / "schedulers" / "configs"
LATENT = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ARGUMENTS = {
    "AmusedScheduler": dict(mask_token_id=8),
    "VQDiffusionScheduler": dict(num_vec_classes=8),
    "RFD4ProteinaScheduler": dict(schedule_mode="log", noise_mode="tan", tsr_k=1.0, tsr_sigma=1.0),
}


def every_class() -> list[str]:
    """The names of the scheduler classes that diffusers exports."""
    found = ((name, getattr(diffusers.schedulers, name)) for name in dir(diffusers.schedulers))
    return [n for n, c in found if inspect.isclass(c) and issubclass(c, SchedulerMixin) and c is not SchedulerMixin]


def build(name: str, **more: Any) -> Any:
    """A scheduler with its default arguments, and `more`."""
    try:
        return getattr(diffusers.schedulers, name)(**ARGUMENTS.get(name, {}), **more)
    except ImportError as error:
        pytest.skip(f"{name} cannot be built here: {error}")


def config(name: str) -> dict[str, Any]:
    """A published pipeline's scheduler config."""
    return json.loads((CONFIGS / f"{name}.json").read_text())


def table_of(scheduler: Any) -> np.ndarray:
    """alphas_cumprod as the class computes it (float32)."""
    return np.asarray(scheduler.alphas_cumprod, dtype=np.float64)
