"""The largest activations that quantised layers met in a run: what the scales of int8 and fp8 had to cover."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

# the scale of a token is the largest |x| in it over this
MOST = {"w8a8": 127.5, "fp8": 448.0}
MOST_REDUCED = 63.5  # of w8a8 where only half of int8's range can be used
PEAK = "diffaccel_peak"  # a buffer of each layer: it goes along to other devices, and not into state dicts


class Scales:
    """Sees the inputs of layers, without waiting for the device, until `remove()`.

    Args:
        layers: by name.
        most: what a scale divides by.
    """

    def __init__(self, layers: Mapping[str, Any], most: float) -> None:
        self.layers, self.most = layers, most
        self._handles = []
        for layer in layers.values():
            layer.register_buffer(PEAK, torch.zeros((), device=layer.weight.device), persistent=False)
            self._handles.append(layer.register_forward_pre_hook(_see, with_kwargs=True))

    def remove(self) -> None:
        """Leave no trace."""
        for handle, layer in zip(self._handles, self.layers.values(), strict=True):
            handle.remove()
            delattr(layer, PEAK)

    def forget(self) -> None:
        """A new run begins."""
        for layer in self.layers.values():
            getattr(layer, PEAK).zero_()

    def largest(self) -> tuple[float, str]:
        """The largest scale since `forget`, and the layer that needed it; nan where an input was not finite."""
        found = [(float(getattr(layer, PEAK)), name) for name, layer in self.layers.items()]
        broken = [pair for pair in found if pair[0] != pair[0]]
        peak, name = broken[0] if broken else max(found)
        return peak / self.most, name


def _see(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    low, high = torch.aminmax(next(iter((*args, *kwargs.values()))).detach())
    peak = getattr(layer, PEAK)
    peak.copy_(torch.maximum(peak, torch.maximum(-low, high)))
