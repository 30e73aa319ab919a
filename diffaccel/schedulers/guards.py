"""What `step` and `set_timesteps` accept from pipelines, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..core.families import VP
from ..core.path import Path
from ..errors import OptionError, RunError
from .run import Run

# Arguments that some pipelines pass unasked; any other value than these would have no effect.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "eta": (None, 0, 0.0),
    "use_clipped_model_output": (None, False),
    "variance_noise": (None,),
    "per_token_timesteps": (None,),
    "s_churn": (None, 0, 0.0),
    "s_tmin": (None, 0, 0.0),
    "s_tmax": (None, float("inf")),
    "s_noise": (None, 1, 1.0),
}


def numbers(values: Any, what: str) -> list[float] | None:
    """The user's list, array or tensor of numbers as a list.

    Raises:
        OptionError: if it is anything else.
    """
    if values is None:
        return None
    try:
        return [float(v) for v in (values.tolist() if hasattr(values, "tolist") else values)]
    except (TypeError, ValueError):
        raise OptionError(f"{what} must be a one-dimensional list of numbers, got {values!r}") from None


def training_steps(path: Path) -> torch.Tensor:
    if isinstance(path, VP):
        return torch.arange(len(path.betas) - 1, -1, -1)
    return torch.linspace(path.first.t, path.last.t, 1000)


def first_call(run: Run, timestep: Any) -> int:
    """Where a run begins that was not told: the position of the first timestep that it is given.

    Pipelines hand in an element of `timesteps`: its place in memory tells the position without reading the value.
    """
    known = run.timesteps
    if isinstance(timestep, torch.Tensor) and timestep.ndim == 0 and timestep.device == known.device:
        start = known.untyped_storage().data_ptr()
        if start and timestep.untyped_storage().data_ptr() == start:
            return int(timestep.storage_offset() - known.storage_offset())
    try:
        value = float(timestep)
    except (TypeError, ValueError, RuntimeError):
        raise RunError(f"the first step of a run needs one timestep, a number; got {timestep!r}") from None
    near = (run.cpu_timesteps.double() - value).abs() <= 1e-5 * max(1.0, abs(value))
    if not near.any():
        raise RunError(
            f"the first step of this run was given timestep {value:g}, which is none of its timesteps "
            f"{[round(t, 3) for t in run.cpu_timesteps.tolist()]}"
        )
    at = int(near.nonzero()[0])
    while at and at + 1 < len(run) and near[at + 1] and not run.table.rows[at].opens:
        at += 1  # both calls of a Heun step are fed one timestep: a run begins at the one that opens an interval
    return at


def output_for(output: Any, x: torch.Tensor) -> torch.Tensor:
    """The prediction in the dtype and place of the state, without a learned variance."""
    _real(output, "the model's output")
    if output.shape != x.shape:
        if output.ndim == x.ndim >= 2 and output.shape[1] == 2 * x.shape[1]:
            output = output[:, : x.shape[1]]
        if output.shape != x.shape:
            raise RunError(
                f"the model's output has shape {tuple(output.shape)} and the sample {tuple(x.shape)}; they must be "
                "equal, or the output may have twice the channels (learned variance)"
            )
    return output.to(x)


def state_for(sample: Any) -> torch.Tensor:
    """The state in float32, for samples of another real dtype than float32 and float64."""
    return _real(sample, "the sample").float()


def _real(value: Any, what: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value
    kind = str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
    raise RunError(f"step needs {what} as a real tensor of floating-point numbers, got {kind}")


def check_finite(state: torch.Tensor, output: torch.Tensor, i: int, n: int) -> None:
    """A NaN in the state; the sum is the cheapest way to find one."""
    if math.isfinite(state.sum().item()) or torch.isfinite(state).all():
        return
    where = "the model's output" if not torch.isfinite(output).all() else "the state"
    raise RunError(
        f"call {i} of {n}: {where} holds NaN or infinity. Half-precision overflow and a wrong prediction_type are the "
        "usual causes. check_finite='never' runs on regardless."
    )


def only_neutral(kwargs: Mapping[str, Any]) -> None:
    for name, value in kwargs.items():
        if name not in NEUTRAL:
            raise OptionError(f"step takes no argument {name!r}; it takes model_output, timestep, sample, generator")
        if isinstance(value, torch.Tensor) or value not in NEUTRAL[name]:
            shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            raise OptionError(
                f"step was given {name}={shown}, which would have no effect: stochasticity and clipping are "
                "settings of the sampler (from_config(..., eta=...), clip_sample=...), not arguments of step"
            )
