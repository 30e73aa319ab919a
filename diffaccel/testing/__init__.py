"""What tests of samplers, schedulers and wrappers import, ours and those of plug-in authors."""

from __future__ import annotations

import importlib
from typing import Any

# public name -> module that defines it; resolved when first used, so that importing this package costs nothing
_NAMES = {
    "Gaussian": "problems",
    "Mixture": "problems",
    "Problem": "problems",
    "Windowed": "problems",
    "four_modes": "problems",
    "point_mass": "problems",
    "CHECKS": "checks",
    "Result": "checks",
    "PATHS": "runs",
    "unroll": "runs",
    "ode_slope": "convergence",
    "weak_slope": "convergence",
    "Certificate": "certify",
}

__all__ = [*_NAMES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
