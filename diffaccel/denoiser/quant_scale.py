"""The largest activations that quantised layers met in a run: what the scales of int8 and fp8 had to cover."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

# the scale of a token is the largest |x| in it over this
MOST = {"w8a8": 127.5, "fp8": 448.0}
MOST_REDUCED = 63.5  # of w8a8 where only half of int8's range can be used
PEAK = "diffaccel_peak"  # a buffer of each layer: it goes along to other devices, and not into state dicts


def watch(module: torch.nn.Module, layers: Iterable[str]) -> list[Any]:
    """Begin to see the inputs of layers; the handles end it (see `unwatch`). No waiting for the device."""
    handles = []
    for name in layers:
        layer: Any = module.get_submodule(name)
        layer.register_buffer(PEAK, torch.zeros((), device=layer.weight.device), persistent=False)
        handles.append(layer.register_forward_pre_hook(_see, with_kwargs=True))
    return handles


def unwatch(module: torch.nn.Module, layers: Iterable[str], handles: Iterable[Any]) -> None:
    """Leave no trace."""
    for handle in handles:
        handle.remove()
    for name in layers:
        delattr(module.get_submodule(name), PEAK)


def forget(module: torch.nn.Module, layers: Iterable[str]) -> None:
    """A new run begins."""
    for name in layers:
        getattr(module.get_submodule(name), PEAK).zero_()


def largest(module: torch.nn.Module, layers: Iterable[str]) -> tuple[float, str]:
    """The largest |x| since `forget`, and the layer that met it; nan where an input was not finite."""
    found = [(getattr(module.get_submodule(name), PEAK).cpu(), name) for name in layers]
    worst = [(float(peak), name) for peak, name in found if not peak.isfinite()]
    return worst[0] if worst else max((float(peak), name) for peak, name in found)


def _see(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = next(iter((*args, *kwargs.values()))).detach()
    peak = getattr(layer, PEAK)
    peak.copy_(torch.maximum(peak, x.abs().amax()))
