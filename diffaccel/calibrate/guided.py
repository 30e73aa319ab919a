"""Which argument of a pipeline's call is its guidance scale, and the scale that a run really has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..drive import denoiser
from ..errors import OptionError

SCALE, TRUE = "guidance_scale", "true_cfg_scale"
NEGATIVE = ("negative_prompt", "negative_prompt_embeds")


def default(pipe: Any, name: str) -> Any:
    """The default of an argument of the pipeline's call; None if there is none."""
    found = inspect.signature(pipe.__call__).parameters.get(name)
    return None if found is None or found.default is inspect.Parameter.empty else found.default


def scale_name(pipe: Any) -> str:
    """The argument that guides: `true_cfg_scale` where the model has no input for `guidance_scale` (Qwen-Image)."""
    config = getattr(denoiser(pipe), "config", None)
    ignored = getattr(config, "guidance_embeds", None) is False
    return TRUE if ignored and TRUE in inspect.signature(pipe.__call__).parameters else SCALE


def split(pipe: Any, call: Mapping[str, Any], guidance: float | None) -> tuple[dict[str, Any], float | None]:
    """The call without its `guidance_scale`, and the scale that was given, there or as `guidance`.

    Raises:
        OptionError: a scale that is given twice, or is no number.
    """
    rest, named = dict(call), "guidance"
    if SCALE in rest:
        if guidance is not None:
            raise OptionError(f"guidance={guidance!r} and {SCALE}={rest[SCALE]!r} say the same; give one of them")
        guidance, named = rest.pop(SCALE), SCALE
    if guidance is None:
        return rest, None
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float)):
        raise OptionError(f"{named} must be one number, got {guidance!r} (several are of calibrate dc alone)")
    if scale_name(pipe) in rest:
        raise OptionError(
            f"{named}={guidance!r} and {TRUE}={rest[TRUE]!r}: the model of this {type(pipe).__name__} has no input for "
            f"{SCALE}, so that both mean {TRUE}; give one of them"
        )
    return rest, guidance


def guided(pipe: Any, call: Mapping[str, Any], guidance: float | None) -> dict[str, Any]:
    """The call with a scale (None: as it is), and with the negative prompt that `true_cfg_scale` needs to act."""
    if guidance is None:
        return dict(call)
    name = scale_name(pipe)
    needs = name == TRUE and guidance > 1 and not _negative(call)
    return {**call, name: guidance} | ({"negative_prompt": " "} if needs else {})


def scale_of(pipe: Any, call: Mapping[str, Any]) -> Any:
    """The scale that a run with these arguments has; None where the pipeline has none."""
    name = scale_name(pipe)
    return 1.0 if name == TRUE and not _negative(call) else call.get(name, default(pipe, name))


def _negative(call: Mapping[str, Any]) -> bool:
    return any(call.get(name) is not None for name in NEGATIVE)
