"""Which modules of a denoiser a cache stands between, and how their inputs and outputs are read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS, _ATTENTION_CLASSES, _FEEDFORWARD_CLASSES
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.attention import BasicTransformerBlock

from ..errors import OptionError
from .contract import Arguments

UNETS = (UNet2DModel, UNet2DConditionModel)
SUBLAYERS: tuple[Any, ...] = (*_ATTENTION_CLASSES, *_FEEDFORWARD_CLASSES)


class Streams:
    """The hidden states (and those of the text, where they run along) in arguments and output of a block.

    Raises:
        OptionError: for a block that neither diffusers knows nor takes and returns one tensor of hidden states.
    """

    def __init__(self, block: torch.nn.Module) -> None:
        arguments = Arguments(block).names
        self.hidden, self.text = "hidden_states", "encoder_hidden_states"
        self.at, self.text_at = 0, None
        known = _registered(block)
        if known is not None:
            self.hidden = known.hidden_states_argument_name
            self.text = getattr(known, "encoder_hidden_states_argument_name", self.text)  # since diffusers 0.41
            self.at, self.text_at = known.return_hidden_states_index, known.return_encoder_hidden_states_index
        if self.hidden not in arguments:
            self.hidden = arguments[0]
        if self.text_at is not None and self.text not in arguments:
            raise OptionError(f"the block {type(block).__name__}({', '.join(arguments)}) takes no {self.text}")

    def given(self, bound: dict[str, Any]) -> list[torch.Tensor | None]:
        """[hidden, text] of the arguments; the second is None where the text does not run along."""
        return [bound[self.hidden], None if self.text_at is None else bound[self.text]]

    def returned(self, output: Any, where: str) -> list[torch.Tensor | None]:
        """[hidden, text] of the output.

        Raises:
            OptionError: for an output of another form.
        """
        if isinstance(output, torch.Tensor) and self.text_at is None:
            return [output, None]
        parts = 1 if self.text_at is None else 2
        if not isinstance(output, tuple) or len(output) != parts or not isinstance(output[self.at], torch.Tensor):
            raise OptionError(f"{where} returns a {type(output).__name__} that is not known; use level='sublayer'")
        return [output[self.at], None if self.text_at is None else output[self.text_at]]

    def form(self, hidden: Any, text: Any, as_tuple: bool) -> Any:
        """The output of a block with these streams."""
        if not as_tuple:
            return hidden
        if self.text_at is None:
            return (hidden,)
        return (hidden, text) if self.at == 0 else (text, hidden)


def _registered(block: torch.nn.Module) -> Any:
    """What diffusers knows of a block, or None."""
    try:
        return TransformerBlockRegistry.get(type(block))
    except ValueError:
        return None


@dataclass
class Layout:
    """Where a cache acts in a denoiser.

    Attributes:
        level: "stack", "sublayer" or "deep".
        head: the module that always runs, from whose output `first_block` decides.
        sections: modules that are left out together, by name, in the order in which they run; what the last one
            returns is kept.
    """

    level: str
    head: tuple[str, torch.nn.Module]
    sections: list[list[tuple[str, torch.nn.Module]]] = field(default_factory=list)

    @property
    def parts(self) -> list[tuple[str, torch.nn.Module]]:
        """All modules that are left out."""
        return [part for section in self.sections for part in section]


def refuse_compiled(model: torch.nn.Module, layout: Layout) -> None:
    """Raise if a part, or what holds it, was compiled in place: decisions would be compiled in, or gone past.

    Raises:
        OptionError: naming the module.
    """
    compiled = [name for name, m in model.named_modules() if getattr(m, "_compiled_call_impl", None) is not None]
    names = [layout.head[0], *(name for name, _ in layout.parts)]
    for inside in compiled:
        if any(name == inside or name.startswith(f"{inside}." if inside else "") for name in names):
            raise OptionError(
                f"{inside or 'the denoiser'} is compiled, and the cache's decisions would be compiled in or gone past; "
                "put the cache on before anything is compiled, and call the handle's compile()"
            )


def layout_of(model: torch.nn.Module, level: str | None, dynamic: bool) -> Layout:
    """Where a cache of this level acts.

    Args:
        model: the denoiser.
        level: as in `Cache`.
        dynamic: whether the head decides; it is then never left out.

    Raises:
        OptionError: a model without the parts that the level needs; it lists what was found.
    """
    if isinstance(model, UNETS):
        level = level or "deep"
        if level == "stack":
            raise OptionError("level='stack' is of transformers; a UNet has level='deep' or 'sublayer'")
        deep = _deep(model)
        return deep if level == "deep" else _sublayers(model, deep.head, dynamic)
    level = level or "stack"
    if level == "deep":
        raise OptionError(f"level='deep' is of UNets; {type(model).__name__} has level='stack' or 'sublayer'")
    blocks = _blocks(model)
    if level == "sublayer":
        return _sublayers(model, blocks[0], dynamic)
    kinds = {type(block): block for _, block in blocks}
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    if len({Streams(block).text_at is None for _, block in blocks}) > 1:
        raise OptionError(
            f"some blocks of {type(model).__name__} return the text's hidden states apart and others do not "
            f"({names}); use level='sublayer'"
        )
    if len(kinds) > 1 and not all(map(_registered, kinds.values())):
        raise OptionError(
            f"{type(model).__name__} has blocks of several kinds ({names}), and this version of diffusers does not say "
            "what they return; use level='sublayer'"
        )
    return Layout("stack", blocks[0], [blocks[1:]])


def _blocks(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    found = [
        (f"{name}.{i}", block)
        for name, child in model.named_children()
        if name in _ALL_TRANSFORMER_BLOCK_IDENTIFIERS and isinstance(child, torch.nn.ModuleList)
        for i, block in enumerate(child)
    ]
    if len(found) < 2:
        have = ", ".join(f"{name}: {type(child).__name__}" for name, child in model.named_children())
        raise OptionError(
            "a cache needs two transformer blocks or more, in "
            f"{' or '.join(sorted(_ALL_TRANSFORMER_BLOCK_IDENTIFIERS))}; {type(model).__name__} has {have}"
        )
    return found


def _deep(model: Any) -> Layout:
    downs, ups = list(model.down_blocks), list(model.up_blocks)
    if len(downs) < 2 or len(ups) < 2:
        raise OptionError(
            f"level='deep' keeps the first and last level of a UNet; this one has {len(downs)} and {len(ups)} blocks"
        )
    inner = [(f"down_blocks.{i}", block) for i, block in enumerate(downs)][1:]
    inner += [("mid_block", model.mid_block)] if model.mid_block is not None else []
    inner += [(f"up_blocks.{i}", block) for i, block in enumerate(ups)][:-1]
    return Layout("deep", ("down_blocks.0", downs[0]), [inner])


def _sublayers(model: torch.nn.Module, head: tuple[str, torch.nn.Module], dynamic: bool) -> Layout:
    """Each attention and feed-forward of the transformer blocks, wherever they are."""
    names: dict[str, torch.nn.Module] = {}
    if isinstance(model, UNETS):
        names = {name: part for name, part in model.named_modules() if isinstance(part, BasicTransformerBlock)}
    else:
        names = dict(_blocks(model))
    found = [
        (f"{name}.{inner}", part)
        for name, block in names.items()
        if not (dynamic and (name == head[0] or name.startswith(head[0] + ".")))
        for inner, part in block.named_modules()
        if inner and isinstance(part, SUBLAYERS)
    ]
    if not found:
        have = ", ".join(sorted({type(block).__name__ for block in names.values()})) or "no transformer block"
        raise OptionError(f"level='sublayer' found no attention or feed-forward of a known class; found: {have}")
    return Layout("sublayer", head, [[part] for part in found])
