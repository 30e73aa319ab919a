"""Which checkpoint is this? The hash of a denoiser's config and weights, kept in artifacts and compared with them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .artifact import Artifact
from .errors import ArtifactError, ArtifactWarning, OptionError
from .plain_tensors import plain_tensors

DENOISERS = ("transformer", "unet", "prior")
PIECE = 4096  # values of each tensor that enter the hash, evenly spread: a model of 12 GB is read in seconds
SAMPLE = 64  # values that are kept, to tell a model in another precision from another model
ADAPTERS = ("lora_", ".processor.", "encoder_hid_proj", "ip_adapter")  # parts of parameter names
ADAPTER_KEYS = ("encoder_hid_dim_type",)  # config keys that loading an adapter changes
EXACT = ("class", "config_sha256", "weights_sha256")  # parts of an identity that must agree
ROUNDING = {"float64": 0.0, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def denoiser_of(pipe: Any) -> Any:
    """The denoiser of a pipeline, or the model itself if it is none.

    Raises:
        OptionError: if the pipeline has no denoiser that we know.
    """
    if not hasattr(pipe, "components"):
        return pipe
    for name in DENOISERS:
        if getattr(pipe, name, None) is not None:
            return getattr(pipe, name)
    raise OptionError(f"{type(pipe).__name__} has none of {', '.join(DENOISERS)}; pass its denoiser itself")


def model_identity(model: Any) -> dict[str, Any]:
    """Class, config, weights and adapters of a denoiser (or of a pipeline's).

    The hash covers names, shapes, dtypes and up to 4096 evenly spread values of every parameter and buffer, read
    where they rest (also from under offloading hooks). Adapters (LoRA, IP-Adapter) do not enter it; those that act
    are listed, with their strengths.

    Returns:
        JSON values: `class`, `config_sha256`, `weights_sha256`, `weights_sample` (64 values), `dtype`, `adapters`.
    """
    model = denoiser_of(model)
    sha, kept, dtypes = hashlib.sha256(), [], set()
    extra: dict[str, Any] = {}
    for name, tensor in sorted(_weights(model)):
        values = _piece(tensor)
        if any(part in name for part in ADAPTERS):
            extra.setdefault(_adapter(name), hashlib.sha256()).update(name.encode() + values.tobytes())
            continue
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        name = name.replace(".base_layer.", ".")  # peft wraps the layers it adapts
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + values.tobytes())
        kept.append(values[len(values) // 2 : len(values) // 2 + 1])
    chosen = np.concatenate(kept) if kept else np.zeros(0)
    found = {name: digest.hexdigest() for name, digest in sorted(extra.items())}
    strengths = adapter_strengths(model)
    at = np.unique(np.linspace(0, max(len(chosen) - 1, 0), SAMPLE).astype(int))[: len(chosen)]
    config = {k: v for k, v in dict(model.config).items() if not k.startswith("_") and k not in ADAPTER_KEYS}
    return {
        "class": type(model).__name__,
        "config_sha256": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
        "weights_sha256": sha.hexdigest(),
        "weights_sample": [float(v) for v in chosen[at]],
        "dtype": "+".join(sorted(dtypes)),
        "adapters": {
            name: f"{sha} at {strengths[name]}" if strengths.get(name) else sha
            for name, sha in found.items()
            if strengths.get(name) != "0"
        },
    }


def adapter_strengths(model: Any) -> dict[str, str]:
    """What each LoRA on a model is multiplied by, "low to high" where layers differ, "0" where it does not act."""
    factors: dict[str, set[float]] = {}
    for layer in model.modules():
        scaling = getattr(layer, "scaling", None)
        if isinstance(scaling, Mapping):
            active = () if layer.disable_adapters else layer.active_adapters
            for name, factor in scaling.items():
                factors.setdefault(name, set()).add(factor if name in active else 0.0)
    return {
        name: f"{min(all_):g}" if min(all_) == max(all_) else f"{min(all_):g} to {max(all_):g}"
        for name, all_ in sorted(factors.items())
    }


def _weights(model: Any) -> Iterator[tuple[str, Any]]:
    """(name, tensor) of every parameter and persistent buffer, those that a hook keeps elsewhere included."""
    for prefix, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        hooks = [hook, *getattr(hook, "hooks", ())]
        away: Any = next((h.weights_map for h in hooks if getattr(h, "weights_map", None) is not None), {})
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        for name, tensor in own.items():
            if name in module._non_persistent_buffers_set or tensor is None:
                continue
            full = f"{prefix}.{name}" if prefix else name
            yield from plain_tensors(full, away[name] if tensor.device.type == "meta" else tensor)


def _piece(tensor: Any) -> np.ndarray:
    """Up to 4096 evenly spread values, float64."""
    flat = tensor.detach().reshape(-1)
    stride = -(-flat.numel() // PIECE) or 1
    return np.asarray(flat[::stride].cpu().double().numpy(), dtype=np.float64)


def _adapter(name: str) -> str:
    """The adapter that a parameter belongs to."""
    if "lora_" not in name:
        return "ip_adapter"
    parts = name.split(".")
    after = parts[next(i for i, part in enumerate(parts) if part.startswith("lora_")) + 1 :]
    return after[0] if len(after) > 1 else "lora"


# ---------------------------------------------------------------------- comparison
def differing(made: Mapping[str, Any], here: Mapping[str, Any], parts: tuple[str, ...] = EXACT) -> str:
    """The first part in which two identities (`model_identity`) differ, or ""."""
    return next((part for part in parts if made[part] != here[part]), "")


def both_sides(made: Mapping[str, Any], here: Mapping[str, Any], part: str) -> str:
    """Two lines of an error message: an artifact's checkpoint and the one in use, with the part that differs."""
    if part == "adapters":
        return f"  artifact: {_names(made[part])}\n  model:    {_names(here[part])}"
    part = "config_sha256" if part == "class" else part
    what = part.split("_")[0]
    return (
        f"  artifact: {made['class']}, {made['dtype']}, {what} {made[part][:12]}\n"
        f"  model:    {here['class']}, {here['dtype']}, {what} {here[part][:12]}"
    )


def check_model(artifact: Artifact, model: Any, *, strict: bool = True) -> None:
    """Compare the checkpoint in use with the one that an artifact was made on.

    Args:
        model: a pipeline or its denoiser.
        strict: other weights are an error; if False, a warning (fine-tunes share most of the statistics).

    Raises:
        ArtifactError: another class or config; other weights if `strict`.

    Warns:
        ArtifactWarning: the same weights in another precision, adapters that the artifact does not know or that are
            missing, other weights if not `strict`.
    """
    made, here = artifact.meta.get("model"), model_identity(model)
    if made is None:
        raise ArtifactError(f"{artifact.file} does not say which checkpoint it was made on; calibrate again")
    part = differing(made, here)
    if part in ("class", "config_sha256"):
        raise ArtifactError(f"{artifact.file} was calibrated on another model.\n{both_sides(made, here, part)}")
    if part and _same_in_other_precision(made, here):
        _warn(f"{artifact.file} was calibrated in {made['dtype']}, the model here is in {here['dtype']}")
    elif part:
        text = f"{artifact.file} was calibrated on other weights.\n{both_sides(made, here, part)}"
        if strict:
            raise ArtifactError(f"{text}\nCalibrate again, or pass strict=False if this is a fine-tune of it.")
        _warn(text)
    if differing(made, here, ("adapters",)):
        _warn(
            f"{artifact.file}: the adapters differ.\n{both_sides(made, here, 'adapters')}\n"
            "The calibrated data may not fit; calibrate with them loaded."
        )


def check_guidance(artifact: Artifact, guidance: float) -> None:
    """Warn if the guidance scale in use differs from the artifact's by more than a factor of 2."""
    made = artifact.meta.get("guidance")
    if made and guidance and not 0.5 <= guidance / made <= 2:
        _warn(f"{artifact.file} was calibrated at guidance {made:g}, this run uses {guidance:g}")


def _same_in_other_precision(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    x, y = np.array(a["weights_sample"]), np.array(b["weights_sample"])
    if a["dtype"] == b["dtype"] or x.shape != y.shape or not {a["dtype"], b["dtype"]} <= set(ROUNDING):
        return False
    limit = max(ROUNDING[a["dtype"]], ROUNDING[b["dtype"]])
    return bool(np.all(np.abs(x - y) <= limit * np.abs(x) + 1e-7))


def _names(adapters: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({sha[:12]}{sha[64:]})" for name, sha in adapters.items()) or "none"


def _warn(text: str) -> None:
    warnings.warn(text, ArtifactWarning, stacklevel=4)
