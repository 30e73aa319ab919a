"""Samplers as plain loops, a family a file. Importing this package registers all of them.

The package can be called: `diffaccel.samplers()` gives every registered sampler by name.
"""

import sys
from types import ModuleType

from . import (  # noqa: F401
    align,
    boost,
    contrast,
    cps,
    dc,
    ddim,
    deis,
    dpm_v3,
    dpmpp,
    epsilon_scale,
    er_sde,
    fitted,
    ghvb,
    heun,
    lms,
    momentum,
    pndm,
    res_2m,
    restart,
    sde,
    singlestep,
    skip,
    unipc,
    usf,
)
from .registry import Sampler
from .registry import samplers as _samplers


class _Callable(ModuleType):
    def __call__(self) -> dict[str, Sampler]:
        return _samplers()


sys.modules[__name__].__class__ = _Callable
