"""The arguments and outputs of a denoiser: cut, joined, compared; and hooks of diffusers put on and taken off."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook

from .layers import Post
from .mail import About
from .plan import Group


# ---------------------------------------------------------------------- arguments
def each(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`value` with every tensor in it changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: each(v, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(each(v, change) for v in value)
    return value


def halved(arguments: dict[str, Any], sample: torch.Tensor, group: Group) -> dict[str, Any]:
    batch, size = len(sample), len(sample) // group.halves
    mine = slice(group.half * size, (group.half + 1) * size)

    def half(x: torch.Tensor) -> torch.Tensor:
        return x[mine] if x.ndim and len(x) == batch else x

    return {k: v if k in ("img_ids", "txt_ids") else each(v, half) for k, v in arguments.items()}


def joined(output: Any, group: Group, post: Post, call: int) -> Any:
    """The outputs of both halves of the batch, in the form of `output`."""
    values = output if isinstance(output, tuple) else (output.sample,)
    x = values[0].contiguous()
    about, others = About("out", "guidance", call), [r for r in group.others() if r != group.rank]
    parts: list[Any] = [x if r in others else None for r in range(group.world)]
    shapes: list[Any] = [tuple(x.shape) if r in others else None for r in range(group.world)]
    got = post.world.send(about, parts, shapes, x).wait()
    got[group.rank] = x
    whole = torch.cat([y for y in (got[r] for r in group.others()) if y is not None])
    return (whole, *values[1:]) if isinstance(output, tuple) else type(output)(sample=whole)


def shapes_of(arguments: dict[str, Any]) -> list[Any]:
    return [tuple(v.shape) for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.ndim > 1]


def number(timestep: Any) -> float:
    return float(timestep.reshape(-1)[0]) if isinstance(timestep, torch.Tensor) else float(timestep)


def step_ratio(times: list[float]) -> float | None:
    """The last step over the one before; None where there are no two."""
    if len(times) < 3 or times[-2] == times[-3]:
        return None
    return (times[-1] - times[-2]) / (times[-2] - times[-3])


def digest(value: Any) -> Any:
    """Something short that is equal where the value is."""
    found: list[bytes] = []

    def read(x: torch.Tensor) -> torch.Tensor:
        found.append(f"{tuple(x.shape)}{x.dtype}".encode())
        if not x.is_meta:
            flat = x.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1)  # also of an expanded one
            found.append(flat.view(torch.uint8).numpy().tobytes())
        return x

    plain = each(value, read)
    if not found:
        return repr(plain)[:60]
    return hashlib.sha256(b"".join(found)).hexdigest()[:16]


# ---------------------------------------------------------------------- hooks of diffusers
def register(module: torch.nn.Module, hook: ModelHook, name: str) -> None:
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)


def unregister(module: torch.nn.Module, name: str) -> None:
    """Take a hook off, and leave no trace if it was the only one."""
    registry: Any = module._diffusers_hook
    registry.remove_hook(name, recurse=False)
    if not registry.hooks:
        del module._diffusers_hook
        vars(module).pop("forward", None)
