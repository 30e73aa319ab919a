"""Which grid a config asks for, in the form that its own class gives to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.grid import GRIDS
from ..errors import OptionError, PathError, one_of
from .origins import Seen

SWITCHES = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "uniform_lambda",
}


def grid_settings(seen: Seen, family: str) -> dict[str, Any]:
    """`grid` (None: none was asked for), `grid_options`, `final_sigmas_type`.

    The user's grid comes first, then one that our own config holds, then the switches and the spacing that the config
    states.
    """
    given = seen.explicit.get("grid_options") or {}
    if not isinstance(given, Mapping):
        raise OptionError(f"grid_options is a dict of options of the grid, got {given!r}")
    final = one_of("final_sigmas_type", seen.explicit.get("final_sigmas_type") or "zero", ("zero", "sigma_min"))
    if seen.says("grid"):
        name = one_of("grid", seen.explicit["grid"], GRIDS)
        # the options in a config belong to the config's grid, not to one that the user names now
        own = "grid" in seen.chosen and "grid_options" not in seen.chosen
        options = {} if own else dict(given)
    else:
        found, options = _asked(seen, family)
        name = found or ""
        options = {**options, **given}
    return {"grid": name or None, "grid_options": options, "final_sigmas_type": final}


def _asked(seen: Seen, family: str) -> tuple[str | None, dict[str, Any]]:
    on = [key for key in SWITCHES if seen.on(key)]
    if len(on) > 1:
        raise OptionError(
            f"{' and '.join(on)} are both true; a run has one grid, so state it: grid={SWITCHES[on[0]]!r}"
        )
    if family == "edm":
        return _edm(seen, on)
    if on:
        name = SWITCHES[on[0]]
        return name, ({} if name == "uniform_lambda" else _range(seen, family))
    return _spaced(seen) if family == "vp" else (None, {})


def _edm(seen: Seen, on: list[str]) -> tuple[str, dict[str, Any]]:
    """`sigma_schedule` of the EDM classes, or the switch of EulerDiscrete."""
    schedule = seen.get("sigma_schedule", SWITCHES[on[0]] if on else "karras")
    if schedule not in ("karras", "exponential", "beta"):
        raise PathError(f"sigma_schedule {schedule!r} is not known; use grid=...")
    return schedule, ({"rho": seen.number("rho", 7.0)} if schedule == "karras" else {})


def _range(seen: Seen, family: str) -> dict[str, Any]:
    """Where a Karras, exponential or beta grid begins and ends: the Euler family and flow take the spaced times."""
    if family == "flow":
        return {"within": "trailing"}
    options: dict[str, Any] = {k: seen.number(k) for k in ("sigma_min", "sigma_max") if seen.says(k)}
    spacing = seen.explicit.get("timestep_spacing")
    if seen.about is not None and seen.about.spacing == "euler" and spacing in ("leading", "trailing"):
        options["within"] = spacing
        if spacing == "leading" and seen.says("steps_offset"):
            options["offset"] = int(seen.explicit["steps_offset"])
    return options


def _spaced(seen: Seen) -> tuple[str | None, dict[str, Any]]:
    """An explicit `timestep_spacing`, as the config's class means it (the forms differ)."""
    spacing = seen.explicit.get("timestep_spacing")
    form = seen.about.spacing if seen.about is not None else "ddim"
    if spacing is None:
        return None, {}
    if spacing == "trailing":
        return "trailing", {}
    if spacing == "linspace":
        name = "linspace_open" if form == "dpm" else "linspace"
        return name, ({"rounded": False} if form == "euler" else {})
    if spacing == "leading":
        options: dict[str, Any] = {"open_end": True} if form == "dpm" else {}
        if seen.says("steps_offset") and int(seen.explicit["steps_offset"]):
            options["offset"] = int(seen.explicit["steps_offset"])
        return "leading", options
    raise PathError(f"timestep_spacing {spacing!r} is none of 'leading', 'linspace', 'trailing'; use grid=...")
