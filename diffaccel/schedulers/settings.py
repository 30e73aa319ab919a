"""From normalized settings (of a `Reading`, or the config of a `TableScheduler`) to path, output and grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from ..core.families import betas
from ..core.grid import GRIDS
from ..core.path import Path
from ..core.prediction import Output
from ..errors import DiffaccelError, OptionError, PathError, one_of

FAMILIES = ("vp", "flow", "edm")
PREDICTIONS = {
    "vp": ("epsilon", "v_prediction", "sample"),
    "flow": ("flow_prediction",),
    "edm": ("epsilon", "v_prediction"),
}
SWITCHES = ("thresholding", "clip_sample", "rescale_betas_zero_snr", "use_dynamic_shifting")


def check(settings: Mapping[str, Any]) -> None:
    """Raise if settings make no path, name no grid, or contradict each other."""
    family = one_of("path", settings.get("path"), FAMILIES)
    kind = settings.get("prediction_type")
    if kind not in PREDICTIONS[family]:
        wanted = " or ".join(PREDICTIONS[family])
        raise PathError(f"prediction_type {kind!r} does not belong to a {family} path; it needs {wanted}")
    if settings.get("grid") is not None:
        one_of("grid", settings["grid"], GRIDS)
    for name in SWITCHES:
        if settings.get(name) not in (None, False, True):
            raise OptionError(f"{name} must be true or false, got {settings[name]!r}")
    one_of("final_sigmas_type", settings.get("final_sigmas_type", "zero"), ("zero", "sigma_min"))
    if family == "vp" and settings.get("rescale_betas_zero_snr") and kind == "epsilon":
        raise PathError(
            "rescale_betas_zero_snr is true and prediction_type is epsilon: at the first step there is no signal, so a "
            "noise prediction says nothing of the image: zero SNR needs v_prediction or sample."
        )
    path_of(settings)


def path_of(settings: Mapping[str, Any], *, mu: float | None = None) -> Path:
    """The path of normalized settings.

    Args:
        settings: of a `Reading`, or the config of a `TableScheduler`.
        mu: the resolution-dependent shift of a run, used with `use_dynamic_shifting` only. Without it such a path is
            unshifted: its nodes are right (a node does not depend on the shift), its time-uniform grids are not.

    Raises:
        PathError: settings that make no path.
    """
    try:
        return _path_of(settings.get, mu)
    except DiffaccelError:
        raise
    except (TypeError, ValueError) as error:
        known = {k: settings.get(k) for k in NUMBERS[settings["path"]]} | ({} if mu is None else {"mu": mu})
        raise PathError(f"a {settings['path']!r} path cannot be made of {known}: {error}") from error


NUMBERS = {
    "vp": ("num_train_timesteps", "beta_start", "beta_end"),
    "flow": ("num_train_timesteps", "shift", "shift_terminal"),
    "edm": ("sigma_min", "sigma_max", "sigma_data"),
}


def _path_of(get: Callable[[str], Any], mu: float | None) -> Path:
    if get("path") == "edm":
        missing = [k for k in ("sigma_min", "sigma_max", "sigma_data") if get(k) is None]
        if missing:
            raise PathError(f"path='edm' needs {', '.join(missing)}")
        return Path.edm(get("sigma_min"), get("sigma_max"), sigma_data=get("sigma_data"), time=get("edm_time") or "log")
    steps = get("num_train_timesteps")
    if get("path") == "flow":
        dynamic = get("use_dynamic_shifting")
        return Path.flow(
            # diffusers does not use a static shift beside a dynamic one
            1.0 if dynamic else get("shift"),
            train_steps=steps,
            mu=mu if dynamic else None,
            shift_type=get("time_shift_type") or "exponential",
            terminal=get("shift_terminal"),
        )
    trained = get("trained_betas")
    schedule = (get("beta_schedule"), get("beta_start") or 0.0, get("beta_end") or 0.0, steps)
    return _vp(
        schedule if trained is None else tuple(trained),
        bool(get("rescale_betas_zero_snr")),
        get("snr_shift_scale"),
        get("interpolation") or "lam",
        get("lambda_min_clipped"),
    )


@lru_cache(maxsize=32)  # inpainting asks for the path at every step, and its tables take a millisecond
def _vp(
    values: tuple[Any, ...], zero_snr: bool, snr_shift: float | None, interpolation: str, lowest: float | None
) -> Path:
    """A VP path from its betas, or from the arguments of `betas`; paths are immutable, so one serves everybody."""
    numbers = betas(*values) if values and isinstance(values[0], str) else values
    path = Path.vp(numbers, zero_snr=zero_snr, snr_shift=snr_shift, interpolation=interpolation)
    return path if lowest is None or lowest == -math.inf else _clipped(path.alphas_cumprod, lowest, interpolation)


def _clipped(acp: np.ndarray, lowest: float, interpolation: str) -> Path:
    """The VP path without the training steps below half log-SNR `lowest` (`lambda_min_clipped`)."""
    with np.errstate(divide="ignore"):
        keep = int(np.sum(0.5 * (np.log(acp) - np.log1p(-acp)) >= lowest))
    if keep < 2:
        raise PathError(f"lambda_min_clipped = {lowest} leaves {keep} of {len(acp)} training steps")
    kept = acp[:keep]
    return Path.vp(1 - kept / np.concatenate([[1.0], kept[:-1]]), interpolation=interpolation)


def output_of(settings: Mapping[str, Any]) -> Output:
    """What the model's raw output is."""
    kind = settings["prediction_type"]
    if settings["path"] == "edm":
        return Output("edm_eps" if kind == "epsilon" else "edm_v", float(settings["sigma_data"]))
    return Output.of(kind)


def grid_of(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any], str]:
    """Grid name, options and end for a run of which only the number of calls is given."""
    default = {"vp": "linspace_open", "flow": "trailing", "edm": "karras"}[settings["path"]]
    options = dict(settings.get("grid_options") or {})
    return settings.get("grid") or default, options, settings.get("final_sigmas_type") or "zero"
