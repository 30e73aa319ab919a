"""Short runs on the user's checkpoint that end in an artifact: `calibrate.ems(pipe, ...)`, `calibrate.dc(pipe, ...)`.

Names are resolved when they are first used; importing this package loads neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from ..errors import OptionError

# public function -> module that defines it
_NAMES = {
    "ems": "ems",
    "dc": "dc",
    "cache": "cache",
    "check": "check",
    "epsilon": "epsilon",
    "gauss": "gauss",
    "spectrum": "spectrum",
    "fit_spectrum": "spectrum",
    "fit": "fit",
    "fit_function": "fit",
    "extend": "fit",
    "ays": "ays",
    "ays_function": "ays",
    "align": "align",
    "align_function": "align",
    "search": "search",
    "search_function": "search",
}

__all__ = [*_NAMES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        try:
            module = importlib.import_module(f"{__name__}.{_NAMES[name]}")
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] != "scipy":
                raise
            raise OptionError(f"calibrate.{name} needs scipy: pip install 'diffaccel[calibrate]'") from None
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """`calibrate.dc` is the function also after somebody has imported the module of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        same = isinstance(value, ModuleType) and name in _NAMES
        super().__setattr__(name, getattr(value, name, value) if same else value)


sys.modules[__name__].__class__ = _Package
