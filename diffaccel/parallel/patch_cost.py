"""What patch parallelism costs: bytes and messages of a call, memory, and a model of the time; computed, not measured.

The shapes come from one forward of the model on the meta device, the counts from formulas; `World.traffic` counts what
a run really received, and both must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .layers import AttentionHook, ConvHook, NormHook, Seats
from .layers_found import family_of, layers_of
from .patch_arguments import arguments, image_tokens
from .patch_settings import LATE, Settings
from .plan import Bands, Group, Ranges, halo, part


@dataclass(frozen=True)
class Layer:
    """One layer that exchanges.

    Attributes:
        kind: "attn", "conv" or "gn".
        name: of the module.
        tokens: image tokens of the whole image (attn).
        width: inner width of keys (attn), input channels times columns (conv), groups (gn).
        rows: that are needed from above and from below (conv).
    """

    kind: str
    name: str
    width: int
    tokens: int = 0
    rows: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Costs:
    """Of one call, with one rank a device.

    Attributes:
        bytes: received by each rank, by kind, in a call after the warm-up.
        sync_bytes: the same in a synchronous call.
        published: what DistriFusion's authors' code receives: whole patches, both borders of every rank to all.
        messages: received by rank 0 in a call after the warm-up.
        waits: exchanges in such a call whose end the layer waits for.
        memory: bytes of keys and values of other ranks that a rank holds from call to call, the most of all ranks.
        ulysses: bytes that diffusers' context parallelism would receive in attention (transformers), mean over ranks.
    """

    bytes: list[dict[str, int]]
    sync_bytes: list[dict[str, int]]
    published: list[dict[str, int]]
    messages: int
    waits: dict[str, int]
    memory: int
    ulysses: int | None

    def seconds(self, call: float, *, ranks: int, bandwidth: float, latency: float, late: frozenset[str]) -> float:
        """A model, not a measurement: computing is shared evenly, late messages hide behind it, the others do not.

        Args:
            call: seconds of a call on one device.
            ranks: that share an image.
            bandwidth: bytes a second between two devices.
            latency: seconds of a message that carries nothing.
            late: kinds that nobody waits for.
        """
        worst = max(self.bytes, key=lambda kinds: sum(kinds.values()))
        hidden = sum(n for kind, n in worst.items() if kind in late) / bandwidth
        open_bytes = sum(n for kind, n in worst.items() if kind not in late)
        return max(call / ranks, hidden) + open_bytes / bandwidth + latency * sum(self.waits.values())


def survey(model: torch.nn.Module, height: int, width: int, batch: int = 1, text: int = 77) -> list[Layer]:
    """The layers that exchange, in the order in which they are called, for a latent of this size."""
    with torch.device("meta"):
        clone = type(model).from_config(model.config)  # type: ignore[attr-defined]
    found: list[Layer] = []
    image = image_tokens(model, height, width)

    def watch(name: str, hook: Any) -> Callable[..., None]:
        def seen(module: Any, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            if isinstance(hook, AttentionHook):
                tokens = image or (x.shape[2] * x.shape[3] if x.ndim == 4 else x.shape[1])
                found.append(Layer("attn", name, module.to_k.out_features, tokens))
            elif isinstance(hook, NormHook):
                found.append(Layer("gn", name, module.num_groups))
            elif isinstance(hook, ConvHook) and not hook.first:
                kernel, stride, padding, dilation = (
                    v[0] for v in (module.kernel_size, module.stride, module.padding, module.dilation)
                )
                found.append(Layer("conv", name, x.shape[1] * x.shape[3], 0, halo(kernel, stride, padding, dilation)))

        return seen

    for name, hook in layers_of(clone, Seats()).hooks:
        clone.get_submodule(name).register_forward_pre_hook(watch(name, hook), with_kwargs=True)
    with torch.no_grad():
        clone(**arguments(clone, height, width, batch, text, "meta"))
    return found


def costs(
    model: torch.nn.Module, height: int, width: int, ranks: int, settings: Settings, *, batch: int = 1, text: int = 77
) -> Costs:
    """Costs of a call of `batch` images (guidance doubles them) with a latent of this size, shared by `ranks`.

    Raises:
        OptionError: if the image cannot be shared so, or the model is not known.
    """
    halves = 2 if settings.guidance != "patches" and batch % 2 == 0 and ranks % 2 == 0 else 1
    group = Group(0, ranks, halves)
    layers = survey(model, height, width, 1, text)
    split = _split(model, height, width, group.patches)
    e, b, p = next(model.parameters()).element_size(), batch // halves, group.patches
    ratio = settings.ratio if settings.mode == "partial" else None
    whole = b * _numel(model, height, width) * e  # of an output of this group

    def total(rank: int, ratio: float | None) -> dict[str, int]:
        found = {"attn": 0, "conv": 0, "gn": 0, "out": whole - whole * _share(split, rank) // _size(split)}
        if p == 1:
            found["out"] = 0
        for layer in layers if p > 1 else []:
            found[layer.kind] += _bytes(layer, split, rank, b, e, ratio)
        found["out"] += whole * (halves - 1)
        return {kind: n for kind, n in found.items() if n}

    def published(rank: int) -> dict[str, int]:
        found = total(rank, None)
        conv = sum(2 * max(layer.rows) * b * layer.width * e * (p - 1) for layer in layers if layer.kind == "conv")
        norm = sum(2 * b * layer.width * e * (p - 1) for layer in layers if layer.kind == "gn")
        return {**found, **({"conv": conv, "gn": norm} if conv and p > 1 else {})}

    def held(rank: int) -> int:
        if "attn" not in LATE[settings.mode] or p == 1:
            return 0
        times = 2 if settings.extrapolate else 1
        return times * sum(_bytes(x, split, rank, b, e, ratio) for x in layers if x.kind == "attn")

    late = LATE[settings.mode]
    waits = {kind: sum(x.kind == kind for x in layers) for kind in ("attn", "conv", "gn") if kind not in late}
    keys = sum(x.tokens * x.width for x in layers if x.kind == "attn")
    return Costs(
        bytes=[total(r, ratio) for r in range(p)],
        sync_bytes=[total(r, None) for r in range(p)],
        published=[published(r) for r in range(p)],
        messages=sum(_messages(x, split, ratio) for x in layers if p > 1) + (p - 1) + (halves - 1),
        waits={**{k: n for k, n in waits.items() if n and p > 1}, "out": (p > 1) + (halves > 1)},
        memory=max(held(r) for r in range(p)),
        ulysses=4 * b * e * keys * (p - 1) // p**2 if isinstance(split, Ranges) and p > 1 else None,
    )


# ---------------------------------------------------------------------- one layer
def _bytes(layer: Layer, split: Bands | Ranges, rank: int, b: int, e: int, ratio: float | None) -> int:
    p = split.ranks
    if layer.kind == "gn":
        return 12 * b * layer.width * (p - 1)  # mean, variance and count in float32
    if layer.kind == "conv":
        top, bottom = layer.rows
        return b * layer.width * e * (top * (rank > 0) + bottom * (rank < p - 1))
    counts = _counts(layer, split)
    if ratio is None:
        tokens = sum(n for q, n in enumerate(counts) if q != rank)
    else:
        tokens = sum(part(counts[q], ratio) for q in (rank - 1, rank + 1) if 0 <= q < p)
    return 2 * b * layer.width * e * tokens


def _counts(layer: Layer, split: Bands | Ranges) -> list[int]:
    if isinstance(split, Ranges):
        return split.tokens(0, 0)
    sizes = [split.size(k) for k in range(split.levels + 1)]
    level = next(k for k, (h, w) in enumerate(sizes) if h * w == layer.tokens)
    return [(b - a) * sizes[level][1] for a, b in (split.rows(r, level) for r in range(split.ranks))]


def _messages(layer: Layer, split: Bands | Ranges, ratio: float | None) -> int:
    """That rank 0 receives."""
    if layer.kind == "conv":
        return int(layer.rows[1] > 0)
    return 1 if layer.kind == "attn" and ratio is not None else split.ranks - 1


# ---------------------------------------------------------------------- the whole image
def _split(model: Any, height: int, width: int, ranks: int) -> Bands | Ranges:
    if not family_of(model).rows:
        return Ranges(image_tokens(model, height, width), ranks)
    return Bands(height, width, layers_of(model, Seats()).levels, ranks)


def _numel(model: Any, height: int, width: int) -> int:
    """Numbers in what the outlet gives for one image."""
    if family_of(model).rows:
        return int(model.config.out_channels * height * width)
    return int(image_tokens(model, height, width) * model.proj_out.out_features)


def _share(split: Bands | Ranges, rank: int) -> int:
    a, b = split.rows(rank) if isinstance(split, Bands) else split.range(rank)
    return b - a


def _size(split: Bands | Ranges) -> int:
    return split.height if isinstance(split, Bands) else split.total
