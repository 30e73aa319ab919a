"""Embedded, really trained tiny pipelines: everything can be tried and tested without a download.

    pipe = diffaccel.models.load("tiny-sd")              # a stock StableDiffusionPipeline
    images = pipe(models.prompts(4, seed=0), num_inference_steps=20, guidance_scale=4.0).images

Importing this module imports neither torch nor diffusers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import words

if TYPE_CHECKING:
    import torch

    from .nets import FashionFeatures

_WEIGHTS = Path(__file__).parent / "weights"
PIPELINES = ("tiny-sd", "tiny-flow", "tiny-pixel")
# Arguments of a model's call that are best passed always: by default SD3 appends 256 zero tokens to a prompt, which
# makes a call several times dearer. All that is compared must use one value.
CALL_DEFAULTS: dict[str, dict[str, Any]] = {"tiny-flow": {"max_sequence_length": 1}}


def names() -> tuple[str, ...]:
    """Pipelines whose weights are installed."""
    return tuple(name for name in PIPELINES if (_WEIGHTS / name).is_dir())


def path(name: str) -> Path:
    """Folder of a model, for `from_pretrained`; also of the parts `tiny-clip` and `tiny-fashion`."""
    known = (*PIPELINES, "tiny-clip", "tiny-fashion")
    if name not in known:
        raise ValueError(f"no embedded model {name!r}; known: {', '.join(known)}")
    folder = _WEIGHTS / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f"the weights of {name!r} are not installed (no folder {folder.name}/ in the package); "
            "train them with `python -m diffaccel.models.train`"
        )
    return folder


def load(name: str, *, torch_dtype: torch.dtype | None = None, device: str | None = None, **kw: Any):
    """A diffusers pipeline: 'tiny-sd' (StableDiffusionPipeline), 'tiny-flow' (StableDiffusion3Pipeline) or 'tiny-pixel'
    (ClassConditionalPipeline; labels 0..179, see `words.meaning`). float32 on the CPU unless told otherwise; further
    keywords go to `from_pretrained`. Images are 32x32; `height=width=64` works too for the two latent pipelines."""
    if name not in PIPELINES:
        raise ValueError(f"no embedded pipeline {name!r}; known: {', '.join(PIPELINES)}")
    import torch
    from diffusers.pipelines import pipeline_utils

    # diffusers renamed the option; the old name still works there, with a warning at every load
    option = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"
    kw = {option: torch_dtype or torch.float32, "local_files_only": True, **kw}
    if name == "tiny-sd":
        from diffusers import StableDiffusionPipeline as cls

        kw = {"safety_checker": None, "requires_safety_checker": False, **kw}
    elif name == "tiny-flow":
        from diffusers import StableDiffusion3Pipeline as cls

        kw = {"text_encoder_3": None, "tokenizer_3": None, **kw}  # diffusers does not reload these two by itself
    else:
        from .pixel import ClassConditionalPipeline as cls
    pipe = cls.from_pretrained(path(name), **kw)
    return pipe if device is None else pipe.to(device)


def fitted(name: str) -> Path:
    """The artifact of `diffaccel.calibrate.fit` for an embedded model: 5, 6, 8, 10 and 12 calls, guidance 4, 32 pixels.

    Made by `benchmarks/bench_fitted.py`, which measures it on other prompts and noise. For `FittedScheduler`.

    Raises:
        ValueError: if there is none for this model.
    """
    file = Path(__file__).parent / "artifacts" / f"{name}-fit.safetensors"
    if not file.is_file():
        found = sorted(f.stem.removesuffix("-fit") for f in file.parent.glob("*-fit.safetensors"))
        raise ValueError(f"no fitted table ships for {name!r}; there are tables for {', '.join(found)}")
    return file


def reference(size: int = 32) -> dict[str, Any]:
    """Statistics of the 10,000 coloured test images under `features()`: mu (128,), sigma (128, 128), some feature rows
    (float32 numpy), n, and the id of the features. size: 32 or 64."""
    from safetensors import safe_open

    file = path("tiny-fashion") / f"reference-{size}.safetensors"
    if not file.is_file():
        sizes = sorted(int(f.stem.split("-")[1]) for f in file.parent.glob("reference-*.safetensors"))
        raise ValueError(f"no reference statistics for size {size!r}; there are {sizes}")
    with safe_open(file, "np") as f:
        meta = f.metadata()
        arrays = {k: f.get_tensor(k).astype("float32") for k in ("mu", "sigma", "rows")}
    return {**arrays, "n": int(meta["n"]), "features": meta["features"], "size": int(meta["size"])}


def features() -> FashionFeatures:
    """The `tiny-fashion` feature network: uint8 (N, 3, S, S) -> (N, 128). FID on it is no Inception FID."""
    from safetensors.torch import load_file

    from .nets import FashionFeatures

    net = FashionFeatures()
    net.load_state_dict({k: v.float() for k, v in load_file(path("tiny-fashion") / "model.safetensors").items()})
    return net.eval().requires_grad_(False)


def clip() -> tuple[Any, Any]:
    """(CLIPModel, CLIPProcessor) of `tiny-clip`; the processor holds the tokenizer."""
    from transformers import CLIPModel, CLIPProcessor

    folder = path("tiny-clip")
    model = CLIPModel.from_pretrained(folder, local_files_only=True).float().eval().requires_grad_(False)
    return model, CLIPProcessor.from_pretrained(folder, local_files_only=True)


def prompts(n: int, seed: int = 0) -> list[str]:
    """n captions drawn from the 540 that name thing, colour and background."""
    return [words.caption(m, t) for m, t in words.draw(n, seed)]


def labels(n: int, seed: int = 0) -> list[int]:
    """Class labels (0..179) of `tiny-pixel` with the same meanings as `prompts(n, seed)`."""
    return [m for m, _ in words.draw(n, seed)]


def receipt(name: str) -> dict[str, Any]:
    """What was measured when this model (or part; 'tiny-vae' too) was trained."""
    folder = _WEIGHTS / name if name == "tiny-vae" else path(name)
    return json.loads((folder / "receipt.json").read_text(encoding="utf-8"))
