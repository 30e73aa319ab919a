"""Reads the path of a model from the config of any diffusers scheduler, or refuses with the keys that it saw.

Nothing is guessed: the rows below are tried in order and the first that the config proves decides. A key that the
config's class merely filled in from its defaults counts as the value of that class, never as a statement.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.path import Path
from ..errors import OptionError, PathError, no_leftover, one_of
from .grid_choice import grid_settings
from .origins import REFUSED, REFUSED_KEYS, Seen
from .settings import FAMILIES, PREDICTIONS, check, grid_of, output_of, path_of

__all__ = ["KEYS", "Reading", "check", "grid_of", "output_of", "path_of", "read"]

BETA_KEYS = ("beta_start", "beta_end", "beta_schedule", "trained_betas")
PATH_KEYS = (
    *("path", "num_train_timesteps", "prediction_type", *BETA_KEYS, "rescale_betas_zero_snr", "snr_shift_scale"),
    *("interpolation", "lambda_min_clipped", "shift", "use_dynamic_shifting", "time_shift_type", "shift_terminal"),
    *("flow_reversed", "sigma_min", "sigma_max", "sigma_data", "edm_time"),
)
POLICY_KEYS = {
    "thresholding": {"dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0},
    "clip_sample": {"clip_sample_range": 1.0},
}
KEYS = (
    *(*PATH_KEYS, "grid", "grid_options", "final_sigmas_type", "source_class"),
    *(key for switch, more in POLICY_KEYS.items() for key in (switch, *more)),
)
# Keys of diffusers that are a choice of the user's, and ours for the same.
OURS_FOR = {
    "timestep_spacing": "grid='trailing', 'leading' or 'linspace'",
    "steps_offset": "grid='leading', grid_options={'offset': ...}",
    "use_karras_sigmas": "grid='karras'",
    "use_exponential_sigmas": "grid='exponential'",
    "use_beta_sigmas": "grid='beta'",
    "use_lu_lambdas": "grid='uniform_lambda'",
    "flow_shift": "shift=...",
    "use_flow_sigmas": "path='flow', prediction_type='flow_prediction'",
    "set_alpha_to_one": "final_sigmas_type='zero' or 'sigma_min'",
    "mu": "set_timesteps(..., mu=...): it belongs to a run",
}
# Switches of flow models that are refused.
NOT_YET = {
    "invert_sigmas": "the model is fed 1 - sigma and predicts data - noise, which is not supported yet",
    "flow_reversed": "reversed flow (invert_sigmas) is not supported yet",
    "stochastic_sampling": "the row x = (1-s) x0 + s z is not supported yet; for a plain run drop the key",
}
# beta schedules that do not use beta_start and beta_end
ENDLESS = ("squaredcos_cap_v2", "laplace", "exp")


@dataclass(frozen=True)
class Reading:
    """What a config proves.

    Args:
        settings: arguments of `TableScheduler`, plain JSON values.
        rule: the row that decided, for messages.
    """

    settings: dict[str, Any]
    rule: str

    @property
    def path(self) -> Path:
        """The path of these settings, without a run's `mu`."""
        return path_of(self.settings)


def read(config: Any, **kwargs: Any) -> Reading:
    """Decide the path of the model that a scheduler config belongs to.

    Args:
        config: a config of any diffusers scheduler or of ours, a plain dict, or a scheduler.
        kwargs: the user's own keys (`KEYS`); they win over the config.

    Raises:
        PathError: nothing is proved, or keys contradict each other; the message lists what was seen.
        OptionError: a kwarg that is none of `KEYS`, or two grids at once.
    """
    for key in kwargs:
        if key in OURS_FOR:
            raise OptionError(f"{key!r} is diffusers' name; here it is {OURS_FOR[key]}")
    no_leftover("the reader of scheduler configs", kwargs, KEYS)
    seen = Seen.of(config, kwargs)
    for row in ROWS:
        reading = row(seen)
        if reading is not None:
            _all_used(seen, reading.settings)
            return reading
    raise seen.refuse("row 10", "no row of the decision table is met", _missing(seen))


def _all_used(seen: Seen, settings: Mapping[str, Any]) -> None:
    """Raise for a key of the user's that has no effect on the path that was read."""
    unused = {k for k in seen.chosen if k not in settings and seen.explicit[k] is not None}
    if settings.get("use_dynamic_shifting"):
        unused |= seen.chosen & {"shift"}
    if unused:
        raise OptionError(
            f"{', '.join(sorted(unused))} would have no effect: the path is {settings['path']!r}, with "
            + ", ".join(f"{k}={v!r}" for k, v in settings.items() if k in PATH_KEYS[1:] and k != "trained_betas")
        )


# ---------------------------------------------------------------------- the rows, in order
def _stated(seen: Seen) -> Reading | None:
    """Row 0: the path is named, by the user or by a config of ours."""
    if "path" in seen.chosen:
        one_of("path", seen.explicit["path"], FAMILIES)
    family = seen.explicit.get("path")
    if family not in FAMILIES:
        return None
    # a config of ours means every value that it holds
    seen.known = {**seen.known, **seen.present, **seen.explicit}
    seen.known.setdefault("num_train_timesteps", 1000)
    rule = f"row 0: path={family!r} is stated"
    if family == "vp":
        return _vp(seen, rule)
    if family == "flow":
        return _flow(seen, rule)
    missing = tuple(k for k in ("sigma_min", "sigma_max", "sigma_data") if seen.get(k) is None)
    if missing:
        raise seen.refuse("row 0", "path='edm' is stated without its range", missing)
    return _edm(seen, rule, "log")


def _refused(seen: Seen) -> None:
    """Row 1: classes whose model has no path of ours."""
    name = seen.origin if seen.origin in REFUSED else None
    if name is None:
        name = next((n for keys, n in REFUSED_KEYS if all(k in seen.present for k in keys)), None)
    if name is None and seen.get("prediction_type") == "trigflow":
        name = "SCMScheduler"
    if name is not None:
        raise seen.refuse("row 1", f"{name}: {REFUSED[name]}")


def _flow_row(seen: Seen) -> Reading | None:
    """Row 2: flow matching, by class, by prediction type, or by a shift without betas."""
    if seen.about is not None and seen.about.family == "flow":
        return _flow(seen, f"row 2: {seen.origin}")
    if seen.get("prediction_type") == "flow_prediction":
        return _flow(seen, "row 2: prediction_type flow_prediction")
    if not (seen.says("shift") or seen.says("base_shift")):
        return None
    other = tuple(k for k in (*BETA_KEYS, "sigma_data") if seen.says(k))
    if other:
        raise seen.refuse("row 3", f"a shift of flow models stands beside {', '.join(other)}: two keys contradict")
    return _flow(seen, "row 2: shift without betas")


def _contradiction(seen: Seen) -> None:
    """Row 3: flow sigmas for a model that does not predict flow."""
    if seen.on("use_flow_sigmas"):
        kind = seen.get("prediction_type", "not stated")
        raise seen.refuse(
            "row 3",
            f"use_flow_sigmas is true but prediction_type is {kind}: two keys contradict (diffusers would use flow "
            "sigmas with another model's formulas)",
            hint="from_config(config, prediction_type='flow_prediction') if the model predicts noise - data, else "
            "path='vp' with its betas",
        )


def _edm_rows(seen: Seen) -> Reading | None:
    """Rows 4 and 5: EDM classes; without the class their keys do not tell which time the model is fed."""
    if seen.about is not None and seen.about.family == "edm":
        row = "row 4" if seen.about.time == "log" else "row 5"
        return _edm(seen, f"{row}: {seen.origin}", seen.about.time)
    return None


def _continuous(seen: Seen) -> Reading | None:
    """Row 6: Stable Video Diffusion's EulerDiscrete, an EDM model with sigma_data 1; its betas mean nothing."""
    if not (seen.get("timestep_type") == "continuous" and seen.get("prediction_type") == "v_prediction"):
        return None
    missing = tuple(k for k in ("sigma_min", "sigma_max") if not seen.says(k))
    if missing:
        raise seen.refuse(
            "row 6", "timestep_type continuous with v_prediction is an EDM model of unknown range", missing
        )
    seen.known.setdefault("sigma_data", 1.0)
    return _edm(seen, "row 6: timestep_type continuous, v_prediction", "log")


def _edm_keys_alone(seen: Seen) -> None:
    """Still rows 4 and 5: keys of an EDM model in a config of another class, or of none."""
    found = tuple(k for k in ("sigma_data", "sigma_schedule") if seen.says(k))
    if found:
        raise seen.refuse(
            "rows 4 and 5",
            f"{', '.join(found)} belong to an EDM model, but only the class tells what its model is fed",
            ("_class_name",),
            "from_config(config, path='edm', edm_time='log') for EDMEuler and EDMDPMSolver checkpoints, "
            "edm_time='atan' for Stable Audio",
        )


def _vp_rows(seen: Seen) -> Reading | None:
    """Rows 7 to 9: variance preserving, from a list of betas or from a named schedule."""
    if _trained(seen) is not None:
        return _vp(seen, "row 7: trained_betas")
    schedule = seen.get("beta_schedule")
    if schedule is None:
        return None
    if schedule not in ENDLESS and (seen.get("beta_start") is None or seen.get("beta_end") is None):
        return None
    row = "row 9: beta_schedule alone" if seen.get("beta_start") is None else "row 8: betas"
    return _vp(seen, f"{row} ({schedule})")


ROWS: tuple[Callable[[Seen], Reading | None], ...] = (
    *(_stated, _refused, _flow_row, _contradiction, _edm_rows, _continuous, _edm_keys_alone, _vp_rows),
)


def _missing(seen: Seen) -> tuple[str, ...]:
    keys = ("_class_name", "beta_schedule", "beta_start", "beta_end", "prediction_type", "num_train_timesteps")
    return tuple(k for k in keys if (seen.origin if k == "_class_name" else seen.get(k)) is None)


# ---------------------------------------------------------------------- settings of each family
def _steps(seen: Seen) -> int | None:
    value = seen.number("num_train_timesteps")
    if value is not None and value != int(value):
        raise PathError(f"num_train_timesteps must be a whole number, got {value!r}")
    return None if value is None else int(value)


def _common(seen: Seen, family: str, rule: str, steps: int | None) -> dict[str, Any]:
    """What every path has: T, what the model predicts, and the policies that somebody asked for."""
    kind = seen.get("prediction_type")
    missing = tuple(k for k, v in (("prediction_type", kind), ("num_train_timesteps", steps)) if v is None)
    if missing:
        raise seen.refuse(rule, "nothing says what the model predicts, or on how many steps it was trained", missing)
    if kind not in PREDICTIONS[family]:
        wanted = " or ".join(PREDICTIONS[family])
        raise seen.refuse(rule, f"prediction_type {kind!r} does not belong to a {family} path (needs {wanted})")
    found: dict[str, Any] = {"path": family, "num_train_timesteps": steps, "prediction_type": kind}
    for switch, more in POLICY_KEYS.items():
        if switch in seen.explicit:
            found[switch] = seen.on(switch)
            if found[switch]:
                found.update({key: seen.number(key, value) for key, value in more.items()})
    if found.get("thresholding") and "clip_sample" not in seen.chosen:
        found.pop("clip_sample_range", None)
        found["clip_sample"] = False  # beside thresholding diffusers never clips (DeepFloyd IF's config has both)
    if seen.origin is not None:
        found["source_class"] = seen.origin
    return found


def _checked(seen: Seen, rule: str, found: dict[str, Any]) -> Reading:
    """The reading, if its settings make a path."""
    try:
        check(found)
    except PathError as error:
        raise seen.refuse(rule, str(error).rstrip(".")) from None
    return Reading(found, rule)


def _trained(seen: Seen) -> list[float] | None:
    """The list of betas (a list, an array or a tensor), unless the user states other betas."""
    if seen.chosen & set(BETA_KEYS[:3]) and "trained_betas" not in seen.chosen:
        return None
    values = seen.get("trained_betas")
    values = values.tolist() if hasattr(values, "tolist") else values
    return None if values is None else [float(b) for b in values]


def _vp(seen: Seen, rule: str) -> Reading:
    """Settings of a VP path."""
    trained, steps = _trained(seen), _steps(seen)
    if trained is not None:
        if seen.says("num_train_timesteps") and steps != len(trained):
            raise seen.refuse(rule, f"num_train_timesteps is {steps}, but trained_betas has {len(trained)} values")
        steps = len(trained)
    found = _common(seen, "vp", rule, steps)
    schedule, about = seen.get("beta_schedule"), seen.about
    if trained is not None:
        found["trained_betas"] = trained
    else:
        needs = ("beta_schedule",) if schedule in ENDLESS else BETA_KEYS[:3]
        missing = tuple(k for k in needs if seen.get(k) is None)
        if missing:
            raise seen.refuse(rule, "the betas are not known", missing)
        if about is not None and about.family == "vp" and schedule not in about.schedules:
            raise seen.refuse(rule, f"{seen.origin} has no beta_schedule {schedule!r}")
        found["beta_schedule"] = one_of("beta_schedule", schedule, (*ENDLESS, "linear", "scaled_linear", "sigmoid"))
        found.update({k: seen.number(k) for k in BETA_KEYS[:2] if seen.get(k) is not None})
    found["rescale_betas_zero_snr"] = seen.on("rescale_betas_zero_snr")
    if seen.get("snr_shift_scale") is not None:
        found["snr_shift_scale"] = seen.number("snr_shift_scale")
    linear = about is not None and about.spacing == "euler" and seen.get("interpolation_type", "linear") == "linear"
    found["interpolation"] = seen.get("interpolation", "sigma" if linear else "lam")
    found["lambda_min_clipped"] = seen.number("lambda_min_clipped", -math.inf)
    found.update(grid_settings(seen, "vp"))
    reading = _checked(seen, rule, found)
    if found["rescale_betas_zero_snr"] and found["grid"] == "leading":
        warnings.warn(
            "this model was trained to start at pure noise (rescale_betas_zero_snr), but timestep_spacing 'leading' "
            "never feeds it the last training step; use grid='trailing'",
            stacklevel=4,
        )
    return reading


def _flow(seen: Seen, rule: str) -> Reading:
    """Settings of a flow path."""
    for switch, why in NOT_YET.items():
        if seen.get(switch):
            raise seen.refuse(rule, f"{switch} is true: {why}")
    if "prediction_type" not in seen.explicit:
        seen.known["prediction_type"] = "flow_prediction"
    found = _common(seen, "flow", rule, _steps(seen))
    own, other = ("flow_shift", "shift") if seen.about and seen.about.family == "vp" else ("shift", "flow_shift")
    own = "shift" if "shift" in seen.chosen or rule.startswith("row 0") else own
    key = other if seen.says(other) and not seen.says(own) else own
    found["shift"], found["flow_reversed"] = seen.number(key, 1.0), False
    found["use_dynamic_shifting"] = seen.on("use_dynamic_shifting")
    found["time_shift_type"] = seen.get("time_shift_type", "exponential")
    if seen.get("shift_terminal"):  # diffusers reads 0 as none, too
        found["shift_terminal"] = seen.number("shift_terminal")
    found.update(grid_settings(seen, "flow"))
    return _checked(seen, rule, found)


def _edm(seen: Seen, rule: str, time: str) -> Reading:
    """Settings of a variance-exploding path with EDM's preconditioning."""
    found = _common(seen, "edm", rule, _steps(seen) or 1000)
    found.update({k: seen.number(k) for k in ("sigma_min", "sigma_max", "sigma_data")})
    found["edm_time"] = seen.get("edm_time", time)
    found.update(grid_settings(seen, "edm"))
    return _checked(seen, rule, found)
