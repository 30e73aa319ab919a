"""Denoisers that cannot be quantised, or gain nothing by it."""

from __future__ import annotations

import torch

from ..errors import OptionError
from .contract import hooks_of


def is_quantised(module: torch.nn.Module) -> str:
    """How a model is quantised already, by whomever, or ""."""
    method = getattr(module, "quantization_method", None) or getattr(module, "hf_quantizer", None)
    if method is not None:
        return str(getattr(method, "value", None) or type(method).__name__)
    for name, parameter in module.named_parameters():
        if type(parameter) is not torch.nn.Parameter and type(parameter.data) is not torch.Tensor:
            return f"{name} is a {type(parameter.data).__name__}"
    for name, part in module.named_modules():
        kind = type(part)
        if any(library in kind.__module__ for library in ("bitsandbytes", "nunchaku", "gguf", "quanto")):
            return f"{name} is a {kind.__module__.split('.')[0]} {kind.__name__}"
    return ""


def refuse(module: torch.nn.Module, mode: str) -> None:
    """Raise `OptionError` where a model cannot be quantised so, or would be slower than it is."""
    already = is_quantised(module)
    if already:
        raise OptionError(
            f"this denoiser is quantised already ({already}); leave out quant= (caches and compensation work on it as "
            "it is), or load the model in float"
        )
    if getattr(module, "_hf_peft_config_loaded", False):
        raise OptionError("this denoiser has adapters: call pipe.fuse_lora() and pipe.unload_lora_weights() first")
    hooked = [name for name, _ in hooks_of(module)]
    if hooked or hasattr(module, "_hf_hook"):
        raise OptionError(
            f"this denoiser has hooks ({hooked[0] if hooked else 'of accelerate: offloading'}); quantise first, then "
            "hook or offload"
        )
    compiled = [part for part in module.modules() if getattr(part, "_compiled_call_impl", None) is not None]
    if compiled or hasattr(module, "_orig_mod"):
        raise OptionError("this denoiser is compiled; quantise first, then compile")
    weight = next(module.parameters())
    if weight.is_meta:
        raise OptionError("this denoiser has no weights yet (meta device); load them first")
    _refuse_device(mode, weight.device, weight.dtype)


def _refuse_device(mode: str, device: torch.device, dtype: torch.dtype) -> None:
    """Where a mode cannot run, or would be slower than what is there."""
    if device.type == "cuda":
        have = torch.cuda.get_device_capability(device)
        needed = (8, 9) if mode == "fp8" else (8, 0)
        if have < needed:
            raise OptionError(f"{mode} needs CUDA capability {needed[0]}.{needed[1]}, this GPU has {have[0]}.{have[1]}")
        if mode == "fp8" and dtype is not torch.bfloat16:
            raise OptionError(f"fp8 needs bfloat16 weights, these are {short(dtype)}: pipe.to(torch.bfloat16) first")
    elif mode == "fp8":
        raise OptionError(f"fp8 needs a CUDA GPU of capability 8.9 or newer, this model is on {device.type}; use w8a8")
    elif mode == "w8a8" and dtype is not torch.float32:
        raise OptionError(
            f"w8a8 is slower than {short(dtype)} on the {device.type}; keep {short(dtype)} without quant=, or use "
            "float32 with w8a8"
        )


def short(dtype: torch.dtype) -> str:
    """Its name, without `torch.`."""
    return str(dtype).removeprefix("torch.")
