"""Policies: what is decided during a run, for each image by itself.

Two of them act on the x0-prediction and are settings of diffusers (thresholding, clipping). The others are registered
with `@policy(name, stage=...)` as functions of their options; what they return has
`begin(table, path, output, fed, device)`, which gives the state of one run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import OptionError
from ..samplers.parts import Register, refuse_clashes
from ..samplers.rewrite import REWRITERS
from ..samplers.rewrite import read as read_rewrites

STAGES = ("target",)
POLICIES = Register("policy", STAGES, subject=False)
policy = POLICIES

Policy = Callable[[torch.Tensor], torch.Tensor]


def clip(limit: float) -> Policy:
    """Clamp x0 to [-limit, limit] (`clip_sample`); for pixel models."""
    if not limit > 0:
        raise OptionError(f"clip_sample_range must be positive, got {limit}")

    def apply(x0: torch.Tensor) -> torch.Tensor:
        return x0.clamp(-limit, limit)

    return apply


def dynamic_threshold(ratio: float, largest: float) -> Policy:
    """Imagen's dynamic thresholding (arXiv:2205.11487, section 2.3), image by image.

    Args:
        ratio: the quantile of |x0| of one image that becomes its range, in (0, 1].
        largest: upper bound of that range (its lower bound is 1).
    """
    if not (0 < ratio <= 1 and largest >= 1):
        raise OptionError(
            f"thresholding needs dynamic_thresholding_ratio in (0, 1] and sample_max_value of 1 or more, "
            f"got {ratio} and {largest}"
        )

    def apply(x0: torch.Tensor) -> torch.Tensor:
        flat = x0.flatten(1)
        range_ = torch.quantile(flat.abs(), ratio, dim=1, keepdim=True).clamp(1.0, largest)
        return (flat.clamp(-range_, range_) / range_).view_as(x0)

    return apply


def policy_of(settings: Mapping[str, Any]) -> Policy | None:
    """The policy that a scheduler's config asks for (`thresholding`, else `clip_sample`), or None.

    Raises:
        OptionError: if both are asked for; diffusers ignores the second one in silence.
    """
    if settings["thresholding"] and settings["clip_sample"]:
        raise OptionError("thresholding and clip_sample are both on; choose one (thresholding clips, too)")
    if settings["thresholding"]:
        return dynamic_threshold(settings["dynamic_thresholding_ratio"], settings["sample_max_value"])
    return clip(settings["clip_sample_range"]) if settings["clip_sample"] else None


def target_of(settings: Mapping[str, Any]) -> Any:
    """The policy of a scheduler's config that aims rows elsewhere, or None.

    Raises:
        OptionError: for unknown policies or options, more than one, or one that a rewriter of the config excludes.
    """
    parts = POLICIES.read(settings.get("policy"))
    refuse_clashes([*((REWRITERS, p) for p in read_rewrites(settings.get("rewrite"))), *((POLICIES, p) for p in parts)])
    if len(parts) > 1:
        raise OptionError(f"policies {', '.join(str(p) for p in parts)} both aim rows elsewhere; choose one")
    return POLICIES.kinds[parts[0].name].make(**parts[0].options) if parts else None
