"""Between our config and those of diffusers' own scheduler classes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..errors import OptionError
from ..samplers.parts import plain
from ..samplers.registry import REGISTRY, Sampler, get, same_definition
from . import from_config as reader
from .artifacts import advised
from .origins import ORIGINS

# Classes whose config keys may live beside ours; a config of ours builds each of them.
COMPATIBLES = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
NEAREST = {
    "vp": "DPMSolverMultistepScheduler",
    "flow": "FlowMatchEulerDiscreteScheduler",
    "edm": "EDMDPMSolverMultistepScheduler",
}
# constructor arguments that choose the run, and all that do not concern the path
CHOICES = ("sampler", "sampler_options", "artifact", "rewrite", "policy")
OURS = (*CHOICES, "check_finite")


def merged(cls: Any, config: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(arguments of the constructor, foreign keys to keep) for `cls.from_config(config, **given)`.

    Raises:
        OptionError: an option that neither the constructor nor the sampler takes.
        PathError: the config proves no path.
    """
    given = advised(given, cls.sampler_name)
    names = set(cls._get_init_keys(cls)) - {"self"}
    ours = {k: v for k, v in given.items() if k in OURS}
    to_path = {k: v for k, v in given.items() if k in names and k not in OURS}
    loose = {k: v for k, v in given.items() if k not in names}
    # A config of ours may hold keys of another family; they rest where they are, unless the user changes the path.
    resting = {k: v for k, v in config.items() if k in names} if "path" in config and not to_path else {}
    settings = resting | reader.read(config, **to_path).settings | _sampler_settings(cls, config, ours, loose, names)
    if "path" in config and "grid" in config and config.get("_class_name") not in ORIGINS:
        # a config of ours states its grid, or that the path's own is meant: its foreign keys (`timestep_spacing`, often
        # a mere default of the class that the model came with) do not speak again
        settings |= {k: config.get(k) for k in ("grid", "grid_options") if not {k, "grid"} & set(to_path)}
    for name in ("check_finite", "rewrite", "policy"):
        if name in ours or name in config:
            settings[name] = ours.get(name, config.get(name))
    if "source_class" in config:  # a config of ours: it knows where it came from, or that nobody knows
        settings["source_class"] = config["source_class"]
    settings["grid_options"] = settings.get("grid_options") or None
    kept = ("_class_name", "_diffusers_version")
    foreign = {k: v for k, v in config.items() if k in kept or (k not in names and not k.startswith("_"))}
    return _complete(cls, settings), foreign | ({"_class_name": cls.__name__} if "_class_name" in foreign else {})


def saved(config: Mapping[str, Any]) -> dict[str, Any]:
    """`sampler` and the options in a config as its file will hold them; a sampler of the user's own is registered.

    Raises:
        OptionError: an option that cannot be saved, or a sampler whose name another one has.
    """
    found: dict[str, Any] = {}
    name = config["sampler"]
    if isinstance(name, Sampler):
        known = REGISTRY.get(name.name)
        if known is not None and known is not name and not same_definition(known, name):
            raise OptionError(
                f"sampler={name.name!r}: another sampler is registered under this name; rename yours with "
                "from_k_diffusion(fn, name=...) or dataclasses.replace(sampler, name=...)"
            )
        REGISTRY[name.name] = name
        found["sampler"] = name = name.name
    chosen, takes = config["sampler_options"], get(name).calibrated
    if chosen is not None:
        data = {} if takes is None or takes.option not in chosen else {takes.option: chosen[takes.option]}
        rest = chosen if not data else {k: v for k, v in chosen.items() if k not in data}
        found["sampler_options"] = plain(f"sampler {name!r}", rest) | data
    if config["grid_options"] is not None:
        found["grid_options"] = plain(f"grid {config['grid']!r}", config["grid_options"])
    return found


def _sampler_settings(
    cls: Any, config: Mapping[str, Any], ours: Mapping[str, Any], loose: dict[str, Any], names: set[str]
) -> dict[str, Any]:
    """The sampler and its options: the user's, else those of a config of ours for the same sampler."""
    name = ours.get("sampler") or cls.sampler_name or config.get("sampler")
    before, known = get(config.get("sampler") or "dpmpp"), get(name or cls.sampler_default)
    unknown = sorted(set(loose) - set(known.defaults))
    if unknown:
        if unknown[0] in reader.OURS_FOR:
            raise OptionError(f"{unknown[0]!r} is diffusers' name; here it is {reader.OURS_FOR[unknown[0]]}")
        raise OptionError(
            f"{cls.__name__} takes no option {unknown[0]!r}. Sampler {known.name!r} takes: "
            f"{', '.join(sorted(known.defaults)) or 'none'}. The scheduler takes: {', '.join(sorted(names))}."
        )
    kept = config.get("sampler_options") if before is known and "sampler_options" not in ours else None
    stated = ours.get("sampler_options") or {}
    if not isinstance(stated, Mapping):
        raise OptionError(f"sampler_options is a dict of options of {known.name!r}, got {stated!r}")
    options = {**(kept or {}), **stated, **loose}
    # the artifact of a config of ours goes with the sampler, and gives way to the option that it would fill in
    filled = known.calibrated is not None and known.calibrated.option in options
    artifact = ours.get("artifact", config.get("artifact") if before is known and not filled else None)
    return {"sampler": name or known.name, "sampler_options": options or None, "artifact": artifact}


def _complete(cls: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Every argument of the constructor, so that none counts as a default that another class may drop."""
    defaults = {p.name: p.default for p in inspect.signature(cls.__init__).parameters.values() if p.name != "self"}
    return defaults | {k: v for k, v in settings.items() if k in defaults}
