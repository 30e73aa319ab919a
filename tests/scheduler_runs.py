"""Schedulers on every path, a cheap model and a plain loop, for the tests of `tests/schedulers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from diffaccel.samplers.registry import samplers
from diffaccel.schedulers import TableScheduler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
PATHS: dict[str, dict[str, Any]] = {
    "sd15": SD,
    "zero_snr": {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "grid": "trailing"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    "flow": {"path": "flow", "prediction_type": "flow_prediction", "shift": 3.0},
    "edm": {"path": "edm", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "prediction_type": "epsilon"},
}


def cases(*, stochastic: bool | None = None, variants: bool = True) -> list[tuple[str, dict[str, Any]]]:
    """(sampler, options): every registered sampler with its defaults and the variants that its author checks.

    Args:
        stochastic: only those that draw noise, or only those that do not; None: all.
        variants: also the options beside the defaults.
    """
    found = []
    for name, sampler in samplers().items():
        for options in sampler.settings if variants else ({},):
            if stochastic is None or _draws(name, options) == stochastic:
                found.append((name, uncalibrated(name) | dict(options)))
    return found


def _draws(name: str, options: Mapping[str, Any]) -> bool:
    scheduler = make("sd15", name, **options)
    scheduler.set_timesteps(8)
    return scheduler.table.stochastic


def label(value: Any) -> str | None:
    """Test ids of sampler options: `order=3,form=exact`."""
    return ",".join(f"{k}={v}" for k, v in value.items()) or "default" if isinstance(value, dict) else None


def uncalibrated(sampler: str | None) -> dict[str, Any]:
    """The option that says that a calibrated sampler is meant without calibration; {} for others."""
    known = samplers()[sampler or "dpmpp"]
    return {} if known.calibrated is None else {known.calibrated.option: known.defaults[known.calibrated.option]}


def make(path: str = "sd15", sampler: str = "dpmpp", settings: Mapping[str, Any] | None = None, **options: Any) -> Any:
    """A `TableScheduler` on one of `PATHS`; `settings` are of the scheduler, `options` of the sampler.

    Calibrated samplers are run without calibration unless the options say otherwise.
    """
    options = uncalibrated(sampler) | options
    return TableScheduler(**{**PATHS[path], **(settings or {})}, sampler=sampler, sampler_options=options)


def model(x: torch.Tensor, t: Any) -> torch.Tensor:
    """A bounded function of state and time, each element by itself: cheap, smooth, and it means nothing."""
    return torch.tanh(0.7 * x + torch.as_tensor(t).to(x) / 1500)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal, the same for the same seed."""
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loop(
    scheduler: Any,
    x: torch.Tensor,
    begin: int = 0,
    *,
    predict: Callable[[torch.Tensor, Any], torch.Tensor] = model,
    edit: Callable[[int, torch.Tensor], torch.Tensor] = lambda i, x: x,
    **kwargs: Any,
) -> torch.Tensor:
    """The loop of a pipeline after set_timesteps: from call `begin` on, with `edit(i, state)` after call i."""
    for i, t in enumerate(scheduler.timesteps[begin:], start=begin):
        output = predict(scheduler.scale_model_input(x, t), t)
        x = edit(i, scheduler.step(output, t, x, return_dict=False, **kwargs)[0])
    return x


def sampled(scheduler: Any, x: torch.Tensor, calls: int, **kwargs: Any) -> torch.Tensor:
    """A whole run of `calls` model calls from the state x."""
    scheduler.set_timesteps(calls)
    return loop(scheduler, x, **kwargs)
