"""What a sweep runs: settings of schedulers, those of diffusers that are always among them, and the teacher."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers

from ..drive import calls_near, plain_config
from ..errors import OptionError, one_of

RAMP = "flow Euler with all sigmas"


@dataclass(frozen=True)
class Setting:
    """A scheduler with its name in the report.

    ramp: pass `sigmas=linspace(1, 1/n, n)`, without which flow-matching Euler spends its last call on nothing.
    """

    name: str
    scheduler: Any
    ramp: bool = False

    @property
    def stock(self) -> bool:
        """Whether it is one of diffusers' own."""
        return type(self.scheduler).__module__.partition(".")[0] == "diffusers"

    @property
    def recipe(self) -> dict[str, Any]:
        """All that its images depend on, plain JSON."""
        kind, config = type(self.scheduler), plain_config(self.scheduler)
        found = {"class": kind.__name__, "config": config, "ramp": self.ramp}
        if kind.__module__.partition(".")[0] not in ("diffusers", "diffaccel"):
            found["source"] = _source(kind)  # a class that is being worked on: its version says nothing
        return found

    def steps(self, calls: int) -> int | None:
        """`num_inference_steps` that makes `calls` model calls, or the most calls below (what was made is counted in
        the run); None if there is none."""
        near = calls_near(self.scheduler, calls)
        if near is None:
            return calls
        fits = {made: steps for steps, made in near.items() if made <= calls}
        return fits[max(fits)] if fits else None


def _source(kind: type) -> str | None:
    """Hash of a class's code; None where Python does not know it (a notebook's, sometimes)."""
    try:
        return hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()[:12]
    except (OSError, TypeError):
        return None


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config is of a flow-matching model."""
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        return True
    return "FlowMatch" in str(config.get("_class_name", "")) or ("shift" in config and "beta_start" not in config)


def _vp(config: Mapping[str, Any]) -> dict[str, Callable[[], Any]]:
    return {
        "DPM++ 2M": lambda: diffusers.DPMSolverMultistepScheduler.from_config(
            config, solver_order=2, timestep_spacing="trailing", final_sigmas_type="zero"
        ),
        "UniPC": lambda: diffusers.UniPCMultistepScheduler.from_config(config, solver_order=2, use_karras_sigmas=True),
    }


def _flow(config: Mapping[str, Any]) -> dict[str, Callable[[], Any]]:
    flow: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "solver_order": 2}
    flow["flow_shift"] = config.get("shift", config.get("flow_shift", 1.0))
    return {
        "DPM++ 2M": lambda: diffusers.DPMSolverMultistepScheduler.from_config(config, final_sigmas_type="zero", **flow),
        "UniPC": lambda: diffusers.UniPCMultistepScheduler.from_config(config, **flow),
    }


def rivals(scheduler: Any, takes_sigmas: bool, stock: bool | Sequence[str]) -> tuple[list[Setting], list[str]]:
    """The stock settings of a sweep, and a note for each that is not there.

    scheduler: the pipeline's own. takes_sigmas: whether its call takes `sigmas`. stock: False: none; names: these.
    """
    config = scheduler.config
    made: dict[str, Callable[[], Any]] = {f"{type(scheduler).__name__} (own)": lambda: scheduler}
    flow = is_flow(config)
    if flow and takes_sigmas and type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":
        made[RAMP] = lambda: scheduler
    made |= _flow(config) if flow else _vp(config)
    short = {"own" if n.endswith("(own)") else n: n for n in made}
    chosen = set(made) if stock is True else {short[one_of("stock scheduler", n, short)] for n in stock or ()}
    left = [n for n in made if n not in chosen]
    notes = [f"stock schedulers left out on request: {', '.join(left)}"] if left else []
    found = []
    for name in (n for n in made if n in chosen):
        try:
            found.append(Setting(name, made[name](), ramp=name == RAMP))
        except Exception as error:  # whatever diffusers says of a config that this class cannot read
            notes.append(f"{name} is left out: {str(error).splitlines()[0]}")
    return found, notes


def teacher(scheduler: Any) -> Setting:
    """diffusers' second-order solver, to be run at many calls; on a Karras grid, where it converges fastest."""
    config = scheduler.config
    try:
        made = _flow(config)["DPM++ 2M"]() if is_flow(config) else diffusers.DPMSolverMultistepScheduler.from_config(
            config, solver_order=2, use_karras_sigmas=True, final_sigmas_type="zero"
        )  # fmt: skip
    except Exception as error:
        text = str(error).splitlines()[0]
        raise OptionError(f"no teacher can be made of {type(scheduler).__name__}: {text}; pass teacher=...") from error
    return Setting("teacher", made)
