"""What diffusers' scheduler classes do with their keys, and what a config says of itself."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import diffusers.schedulers
from diffusers import SchedulerMixin

from ..errors import OptionError, PathError

BASIC = ("linear", "scaled_linear", "squaredcos_cap_v2")


@dataclass(frozen=True)
class Origin:
    """A scheduler class of diffusers whose path is known.

    Args:
        family: "vp", "flow" or "edm".
        spacing: the form of its `timestep_spacing`: "ddim", "euler" (times not rounded, Karras between the spaced
            ends) or "dpm" (one more interval than calls).
        schedules: values of `beta_schedule` that it implements.
        time: of EDM classes, what the model is fed.
    """

    family: str
    spacing: str = "ddim"
    schedules: tuple[str, ...] = BASIC
    time: str = "log"


_EULER, _DPM, _FLOW = Origin("vp", "euler"), Origin("vp", "dpm"), Origin("flow")
_DDPM = Origin("vp", schedules=(*BASIC, "sigmoid", "laplace"))

ORIGINS: dict[str, Origin] = {
    "CogVideoXDDIMScheduler": Origin("vp"),
    "CogVideoXDPMScheduler": Origin("vp"),
    "DDIMParallelScheduler": Origin("vp"),
    "DDIMScheduler": Origin("vp"),
    "DDPMParallelScheduler": _DDPM,
    "DDPMScheduler": _DDPM,
    "LCMScheduler": Origin("vp"),
    "PNDMScheduler": Origin("vp"),
    "TCDScheduler": Origin("vp"),
    "UnCLIPScheduler": Origin("vp", schedules=("squaredcos_cap_v2",)),
    "DPMSolverSDEScheduler": _EULER,
    "EulerAncestralDiscreteScheduler": _EULER,
    "EulerDiscreteScheduler": _EULER,
    "HeunDiscreteScheduler": Origin("vp", "euler", schedules=(*BASIC, "exp")),
    "KDPM2AncestralDiscreteScheduler": _EULER,
    "KDPM2DiscreteScheduler": _EULER,
    "LMSDiscreteScheduler": _EULER,
    "DEISMultistepScheduler": _DPM,
    "DPMSolverMultistepScheduler": _DPM,
    "DPMSolverSinglestepScheduler": _DPM,
    "SASolverScheduler": _DPM,
    "UniPCMultistepScheduler": _DPM,
    "FlowMapEulerDiscreteScheduler": _FLOW,
    "FlowMatchEulerDiscreteScheduler": _FLOW,
    "FlowMatchHeunDiscreteScheduler": _FLOW,
    "FlowMatchLCMScheduler": _FLOW,
    "LTXEulerAncestralRFScheduler": _FLOW,
    "EDMDPMSolverMultistepScheduler": Origin("edm"),
    "EDMEulerScheduler": Origin("edm"),
    "CosineDPMSolverMultistepScheduler": Origin("edm", time="atan"),
}

USUAL = ("FlowMatchHeunDiscreteScheduler", "CogVideoXDDIMScheduler", "LCMScheduler", "KDPM2DiscreteScheduler")

_DISCRETE = "it denoises discrete tokens, which have no Gaussian path"
_DISTILLED = "its model is distilled for its own sampler"
REFUSED: dict[str, str] = {
    "AmusedScheduler": _DISCRETE,
    "BlockRefinementScheduler": _DISCRETE,
    "DiscreteDDIMScheduler": _DISCRETE,
    "EntropyBoundScheduler": _DISCRETE,
    "VQDiffusionScheduler": _DISCRETE,
    "CMStochasticIterativeScheduler": _DISTILLED + " (consistency model)",
    "ConsistencyDecoderScheduler": _DISTILLED + " (consistency decoder, two fixed steps)",
    "DDPMWuerstchenScheduler": "its time is continuous and its path is rescaled by `scaler`",
    "DDIMInverseScheduler": "it runs from data to noise",
    "DPMSolverMultistepInverseScheduler": "it runs from data to noise",
    "HeliosDMDScheduler": _DISTILLED + " (resolution stages)",
    "HeliosScheduler": "its path has jumps between resolution stages",
    "IPNDMScheduler": "its path (sin, cos of a uniform time) is none of vp, flow, edm",
    "KarrasVeScheduler": "its model takes the raw sigma without preconditioning",
    "MiniMaxH3Scheduler": "its model is fed 1 - sigma and predicts data - noise (a reversed flow)",
    "PiflowScheduler": _DISTILLED + " (policy outputs)",
    "RFD4ProteinaScheduler": "its state is a protein backbone with its own noise schedule",
    "RePaintScheduler": "it resamples known regions by a schedule of its own; use the checkpoint's DDIM or DDPM config",
    "SCMScheduler": _DISTILLED + " (trigflow)",
    "ScoreSdeVeScheduler": "its score model has no preconditioning and needs its Langevin corrector",
    "ScoreSdeVpScheduler": "its time is continuous in (0, 1]; no checkpoint config states what the model is fed",
}
# Keys that prove such a class when its name is lost.
REFUSED_KEYS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("mask_token_id",), "AmusedScheduler"),
    (("num_vec_classes",), "VQDiffusionScheduler"),
    (("block_length",), "BlockRefinementScheduler"),
    (("entropy_bound",), "EntropyBoundScheduler"),
    (("corrector_k", "corrector_selection"), "DiscreteDDIMScheduler"),
    (("snr", "correct_steps"), "ScoreSdeVeScheduler"),
    (("beta_min", "beta_max"), "ScoreSdeVpScheduler"),
    (("scaler", "s"), "DDPMWuerstchenScheduler"),
    (("rho", "clip_denoised"), "CMStochasticIterativeScheduler"),
    (("stages", "gamma"), "HeliosScheduler"),
    (("n_grid",), "PiflowScheduler"),
    (("schedule_mode", "noise_mode"), "RFD4ProteinaScheduler"),
    (("s_churn", "s_min"), "KarrasVeScheduler"),
)


@functools.cache
def defaults(name: str | None) -> dict[str, Any]:
    """The default arguments of a diffusers scheduler that is listed here; empty for any other name."""
    if name not in ORIGINS and name not in REFUSED:
        return {}
    cls = getattr(diffusers, str(name), None) or getattr(diffusers.schedulers, str(name), None)
    if cls is None:
        return {}
    found = inspect.signature(cls.__init__).parameters.values()
    return {p.name: p.default for p in found if p.default is not inspect.Parameter.empty}


def _same(value: Any, default: Any) -> bool:
    """Whether a config's value is the default (arrays and tensors never are)."""
    return isinstance(value, (bool, int, float, str, list, type(None))) and bool(value == default)


def infer(config: Mapping[str, Any]) -> str | None:
    """The class that built a live config without `_class_name`, as that of `DDIMScheduler()`.

    Such a config holds every argument of its class, and lists those that were left at their defaults: the class is the
    one with the most arguments, and then with the most of these defaults, if no class of another kind has as many.
    """
    listed = config.get("_use_default_values")
    if not listed:
        return None
    fits: dict[str, tuple[int, int]] = {}
    for name in (*ORIGINS, *REFUSED):
        known = defaults(name)
        if known.keys() <= config.keys() and known.keys() >= set(listed):
            # a few values may have been registered anew since
            fits[name] = (len(known), sum(_same(config[k], known[k]) for k in listed))
    # of classes with the same arguments and defaults (DDIM, DDIMParallel) the usual one, else the plainest name
    best = sorted((n for n, fit in fits.items() if fit == max(fits.values())), key=lambda n: (n not in USUAL, len(n)))
    return best[0] if best and len({ORIGINS.get(name) for name in best}) == 1 else None


@dataclass
class Seen:
    """The keys of a config, with what is known of each.

    Args:
        origin: class that the checkpoint came with (None: unknown).
        explicit: values that somebody stated, the user's own first; never None except where the user said so.
        known: `explicit`, and the defaults of the origin.
        present: every value of the config.
    """

    origin: str | None
    explicit: dict[str, Any]
    known: dict[str, Any]
    present: dict[str, Any] = field(default_factory=dict)
    chosen: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: Any, chosen: Mapping[str, Any]) -> Seen:
        """Sort the keys of a config, a dict or a scheduler; `chosen` are the user's."""
        name = None
        if isinstance(config, SchedulerMixin):
            name, config = type(config).__name__, config.config
        if not isinstance(config, Mapping):
            raise PathError(f"a scheduler config is a dict or a scheduler, got {type(config).__name__}")
        name = name or config.get("_class_name") or infer(config)
        listed, own = set(config.get("_use_default_values") or ()), defaults(name)
        # A listed key whose value is not the default was registered later, by a pipeline or by the user.
        stated = {
            k: v
            for k, v in config.items()
            if not k.startswith("_") and v is not None and (k not in listed or (k in own and not _same(v, own[k])))
        }
        origin = chosen.get("source_class") or config.get("source_class") or name
        explicit = {**stated, **chosen}
        present = {k: v for k, v in config.items() if not k.startswith("_") and v is not None}
        return cls(origin, explicit, {**defaults(origin), **explicit}, present, frozenset(chosen))

    @property
    def about(self) -> Origin | None:
        """What is known of the origin."""
        return ORIGINS.get(self.origin or "")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, from the user, the config or the origin's defaults."""
        value = self.known.get(key)
        return default if value is None else value

    def says(self, key: str) -> bool:
        """Whether the key is stated, with a value."""
        return self.explicit.get(key) is not None

    def on(self, key: str) -> bool:
        """Whether a switch is explicitly on."""
        value = self.explicit.get(key, False)
        if isinstance(value, str):
            raise OptionError(f"{key} must be true or false, got {value!r}")
        return bool(value)

    def number(self, key: str, default: Any = None) -> float | None:
        """A finite or infinite number under a key."""
        value = self.get(key, default)
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isnan(number):
            raise PathError(f"{key} must be a number, got {value!r}")
        return number

    def refuse(self, row: str, why: str, missing: tuple[str, ...] = (), hint: str = "") -> PathError:
        """The error that says what was seen and how to state the path by hand."""
        filled = sorted(k for k in self.present if k not in self.explicit)
        return PathError(
            f"this config proves no noise path ({row}): {why}.\n"
            f"  class: {self.origin or 'not stated'}\n"
            f"  keys stated: {', '.join(sorted(self.explicit)) or 'none'}\n"
            + (f"  keys at their defaults: {', '.join(filled)}\n" if filled else "")
            + (f"  keys missing: {', '.join(missing)}\n" if missing else "")
            + "  To state the path by hand: "
            + (hint or BY_HAND)
        )


BY_HAND = (
    "from_config(config, path='vp', beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012, "
    "num_train_timesteps=1000, prediction_type='epsilon'), or path='flow', shift=3.0, or path='edm', sigma_min=0.002, "
    "sigma_max=80.0, sigma_data=0.5, prediction_type='epsilon'; TableScheduler(...) takes the same keys."
)
