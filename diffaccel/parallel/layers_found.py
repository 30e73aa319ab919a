"""Which layers of a denoiser see more than their own part of the image; which models have no others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ..errors import OptionError, one_of
from .layers import AttentionHook, ConvHook, InletHook, LayerHook, NormHook, OutletHook, Seats


@dataclass(frozen=True)
class Family:
    """A class of denoisers.

    Args:
        sample: its argument that is the noisy image.
        rows: split by rows (UNets), else by tokens.
        outlet: the module whose output is gathered.
        inlet: the module whose output is cut to a rank's tokens; None where the arguments are cut.
        cut: arguments that are cut, all of shape (..., tokens, width).
        text_first: text tokens come before image tokens in joint attention.
    """

    sample: str
    rows: bool
    outlet: str
    inlet: str | None = None
    cut: tuple[str, ...] = ()
    text_first: bool = False


_UNET = Family("sample", True, "conv_out")
FAMILIES = {
    "UNet2DConditionModel": _UNET,
    "UNet2DModel": _UNET,
    "FluxTransformer2DModel": Family(
        "hidden_states",
        False,
        "proj_out",
        cut=("hidden_states", "img_ids", "controlnet_block_samples", "controlnet_single_block_samples"),
        text_first=True,
    ),
    "SD3Transformer2DModel": Family(
        "hidden_states", False, "proj_out", inlet="pos_embed", cut=("block_controlnet_hidden_states",)
    ),
}
# Modules that make something of text, time or reference images, which every rank has whole.
_WHOLE = ("encoder_hid_proj", "image_proj", "time_text_embed", "add_embedding", "position_net")
_ACTIVATIONS = ("SiLU", "GELU", "ReLU", "LeakyReLU", "Mish", "Sigmoid", "Tanh")
_TIME = ("Timesteps", "GaussianFourierProjection", "FluxPosEmbed")
_LOCAL = ("Linear", "LayerNorm", "RMSNorm", "Dropout", "Identity", "Embedding", *_ACTIVATIONS, *_TIME)
_MIXING = ("AdaGroupNorm", "SpatialNorm", "FirDownsample2D", "FirUpsample2D", "KDownsample2D", "KUpsample2D")


def family_of(model: nn.Module) -> Family:
    """The family of a denoiser.

    Raises:
        OptionError: for a class that is not known.
    """
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise OptionError(
            "patch_parallel takes the denoiser as it is, not compiled: messages end a compiled graph at every layer. "
            "Compile its feed-forward blocks instead, before wrapping"
        )
    return FAMILIES[one_of("denoiser for patch_parallel", name, FAMILIES)]


@dataclass
class Layers:
    """The hooks that a denoiser needs.

    Attributes:
        hooks: (name of the module, hook); a module may have two.
        levels: how often the image is halved (UNets).
    """

    hooks: list[tuple[str, LayerHook]] = field(default_factory=list)
    levels: int = 0

    def asking(self) -> list[str]:
        """Layers that exchange something in every call, each once; the outlet is another exchange."""
        return [n for n, h in self.hooks if not isinstance(h, InletHook) and not (isinstance(h, ConvHook) and h.first)]


def layers_of(model: nn.Module, seats: Seats) -> Layers:
    """Hooks for every layer that needs one.

    Raises:
        OptionError: for a module that mixes rows or tokens in a way that is not known.
    """
    family, found = family_of(model), Layers()
    padded = {f"{n}.conv" for n, m in model.named_modules() if isinstance(m, Downsample2D) and m.padding == 0}
    for name, module in _shared_modules(model, family):
        kind = type(module).__name__
        if kind in _MIXING or (isinstance(module, ResnetBlock2D) and _resamples(module)):
            raise _unknown(name, module)
        if isinstance(module, (Attention, AttentionModuleMixin)):
            if not getattr(module, "is_cross_attention", False) or not family.rows:
                found.hooks.append((name, AttentionHook(seats, name)))
        elif any(True for _ in module.children()) or kind in _LOCAL:
            continue
        elif type(module) is nn.Conv2d and family.rows:
            _add_convolution(found, seats, name, module, name in padded)
        elif type(module) is nn.GroupNorm and family.rows:
            found.hooks.append((name, NormHook(seats, name)))
        else:
            raise _unknown(name, module)
    if family.inlet:
        found.hooks.append((family.inlet, InletHook(seats, family.inlet)))
    found.hooks.append((family.outlet, OutletHook(seats, family.outlet)))
    return found


def _shared_modules(model: nn.Module, family: Family) -> Iterator[tuple[str, nn.Module]]:
    whole = (*_WHOLE, family.inlet) if family.inlet else _WHOLE
    for name, module in model.named_modules():
        if name and name.split(".")[0] not in whole:
            yield name, module


def _add_convolution(found: Layers, seats: Seats, name: str, module: nn.Conv2d, padded: bool) -> None:
    """Plan a hook for a convolution that looks beyond its own row."""
    stride, kernel = module.stride[0], module.kernel_size[0]
    if kernel == 1 and stride == 1:
        return
    if stride not in (1, 2) or not isinstance(module.padding, tuple) or module.padding_mode != "zeros":
        raise _unknown(name, module)
    found.levels += stride == 2
    found.hooks.append((name, ConvHook(seats, name, first=name == "conv_in", padded=padded)))


def _resamples(block: ResnetBlock2D) -> bool:
    """Whether a residual block changes the size by other means than modules of its own."""
    changed = [block.upsample if block.up else None, block.downsample if block.down else None]
    return any(m is not None and not isinstance(m, nn.Module) for m in changed)


def _unknown(name: str, module: torch.nn.Module) -> OptionError:
    return OptionError(
        f"{name} is a {type(module).__name__} ({module.extra_repr() or 'no settings'}), which is not known to work on "
        "a part of an image; patch_parallel cannot share this model"
    )
