"""What a tensor is made of, where it is not a plain one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def plain_tensors(name: str, tensor: Any) -> Iterator[tuple[str, Any]]:
    """The tensor, or those inside one that is quantised (torchao), which answers few operations itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(f"{name}.{inner}", getattr(tensor, inner))
