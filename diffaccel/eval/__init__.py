"""Images in, numbers out; knows nothing of samplers. Importing this package is cheap: names load when first used.

    from diffaccel.eval import fid
    print(fid("generated/", "reference.npz"))

Files are not called like the functions in them: importing a submodule `fid` would put the module in the function's
place.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "Features": "features",
    "Images": "images",
    "Score": "score",
    "clip_score": "clip",
    "cmmd": "kernel",
    "fid": "fid_score",
    "fid_difference": "fid_score",
    "kid": "kernel",
    "open_images": "images",
    "paired": "pairs",
    "paired_difference": "pairs",
    "precision_recall": "manifold",
    "read_prompts": ".prompts",
    "report": "report_run",
    "stats": "stats_file",
    "sweep": "sweep_run",
}

__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
