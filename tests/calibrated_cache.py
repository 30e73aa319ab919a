"""Artifacts as `calibrate.cache` writes them, with gains made up. No test file."""

from __future__ import annotations

from typing import Any

import hooked_runs as runs
import numpy as np

from diffaccel.artifact import Artifact
from diffaccel.denoiser.cache import Cache, letters
from diffaccel.denoiser.calibrated import key_of
from diffaccel.identity import model_identity

STEPS = 10


def artifact_for(
    pipe: Any,
    case: str,
    cache: Cache,
    gain: float = 1.02,
    learned: bool = False,
    benefit: bool = True,
    quant: Any = None,
) -> Artifact:
    """For a pipeline of `hooked_runs` at 10 steps."""
    level = "deep" if hasattr(pipe, "unet") else "stack"
    full = cache.full_steps(STEPS)
    state: dict[str, Any] = {}

    def see(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        state["x"] = kwargs["latents"]
        return kwargs

    identity = model_identity(pipe)
    runs.run(pipe, case, STEPS, callback_on_step_end=see)
    shape = (STEPS, state["x"].shape[-1] if state["x"].ndim == 3 else state["x"].shape[1])
    run: dict[str, Any] = {
        "decisions": letters(full), "mask": [int(f) for f in full],
        "cache": {**cache.to_dict(), "level": level}, "full": sum(full), "learned": learned, "benefit": benefit,
        "compensated": True,
    }  # fmt: skip
    tensors = {"mu_ref_0": np.full(shape, 0.01), "mu_acc_0": np.zeros(shape), "gain_0": np.full(shape, gain)}
    tensors["gain_0"][2:] = 1.0
    meta = {
        "runs": [run],
        "key": key_of(pipe, pipe.scheduler, tuple(state["x"].shape[1:]), None),
        "model": identity,
        **({k: run[k] for k in ("mask", "cache", "benefit")} if learned else {}),
    }
    return Artifact("cache", tensors, meta)
