"""The search for the best way to run a checkpoint at a number of model calls: `da.tune(pipe, prompts, calls=8)`.

The package can be called. Its names are resolved when they are first used; importing it loads neither torch nor
diffusers.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_NAMES = {
    "tune": "run",
    "Asked": "candidates",
    "scheduler": "sources",
    "source": "candidates",
    "SOURCES": "run",
}

__all__ = [*_NAMES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tune(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
