"""Feature networks behind one small protocol, and the features of a source of images.

| name | what |
|---|---|
| `inception-v3:clean` (default), `:tf`, `:torch`, `:torchmetrics` | FID's Inception, pool3, with the named resize |
| `clip:<model>` | image embedding of a CLIPModel: a hub id, a folder, or `tiny-clip` |
| `dino:<model>` | class token of a DINO or DINOv2 model of transformers, with its processor: a hub id or a folder |
| `tiny-fashion` | the embedded network; its FID is no Inception FID |
| a callable with an `id` | uint8 (N, 3, H, W) -> (N, d) |
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import OptionError, one_of
from . import inception
from .images import Images
from .resize import RESIZERS

DEFAULT = "inception-v3:clean"
# how these resize: their processors, in PIL (the published CMMD code does it without antialias)
_RESIZE = {"clip": "@pil-bicubic", "dino": "@pil"}
_IN_MEMORY = 1 << 30  # bytes of features above which they go to a file


@dataclass(frozen=True)
class Features:
    """A feature network.

    id: its name with the resize in it, written in every score. dim: width d (None: known after the first batch).
    prepare: uint8 (H, W, 3) array -> one input of the net; this is where resizing lives. net: batch -> (N, d).
    module: what is moved to the device, where `net` itself is no module.
    """

    id: str
    dim: int | None
    prepare: Callable[[np.ndarray], torch.Tensor]
    net: Callable[[torch.Tensor], torch.Tensor]
    module: torch.nn.Module | None = None

    @property
    def is_inception(self) -> bool:
        return self.id.startswith("inception-v3:")


def canonical(name: str) -> str:
    """The id that a network of this name has."""
    kind, _, model = name.partition(":")
    resize = _RESIZE.get(kind, "") if model else ""
    return name if name.endswith(resize) else name + resize


def get(features: Any = None, weights: Any = None) -> Features:
    """A feature network by name, `Features`, or a callable with an `id`. weights: file for Inception."""
    if isinstance(features, Features):
        return features
    if features is None or isinstance(features, str):
        # the variable is read here, so that the cache notices when it changes
        file = weights or os.environ.get(inception.VARIABLE)
        return _by_name(canonical(features or DEFAULT), str(file) if file else None)
    if callable(features):
        id = getattr(features, "id", None)
        if not isinstance(id, str) or not id:
            raise OptionError(
                f"{type(features).__name__} needs an attribute `id` (a string that names the network and its resize): "
                "a score that does not say its features cannot be compared"
            )
        return Features(id, _width(features), _channels_first, features)
    raise OptionError(f"features must be a name, Features, or a callable with an id; got {type(features).__name__}")


def _width(net: Any) -> int | None:
    width = getattr(net, "num_features", None)
    return None if width is None else int(width)


def _channels_first(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 0)))


@functools.lru_cache(maxsize=4)
def _by_name(name: str, weights: str | None) -> Features:
    kind, _, rest = name.partition(":")
    if kind == "inception-v3":
        one_of("resize of inception-v3", rest, RESIZERS)
        return Features(name, 2048, functools.partial(_inception_input, rest), inception.load(weights))
    if kind == "clip" and rest:
        return clip_features(name, *clip_model(rest.removesuffix(_RESIZE[kind])))
    if kind == "dino" and rest:
        return _dino(name, rest.removesuffix(_RESIZE[kind]))
    if name == "tiny-fashion":
        try:
            net = embedded().features()
        except FileNotFoundError as error:
            raise OptionError(str(error)) from None
        return Features(name, _width(net), _channels_first, net)
    names = [f"inception-v3:{r}" for r in RESIZERS] + ["clip:<model>", "dino:<model>", "tiny-fashion"]
    raise OptionError(f"unknown features {name!r}; known: {', '.join(names)}, or a callable with an id")


def _inception_input(resize: str, image: np.ndarray) -> torch.Tensor:
    x = RESIZERS[resize](image, inception.SIZE)
    return 2 * x / 255 - 1 if resize == "torch" else (x - 128) / 128


def embedded() -> Any:
    """`diffaccel.models`, by name at run time: eval depends on no other room, and the embedded networks are just one
    more place where weights come from."""
    return importlib.import_module(f"{__package__.rpartition('.')[0]}.models")


@functools.lru_cache(maxsize=2)
def clip_model(model: str) -> tuple[Any, Any]:
    """(CLIPModel, CLIPProcessor) of `tiny-clip`, a folder or a hub id, in evaluation mode."""
    from transformers import CLIPModel, CLIPProcessor

    try:
        if model == "tiny-clip":
            net, processor = embedded().clip()
        else:
            net = CLIPModel.from_pretrained(model).float().eval().requires_grad_(False)
            processor = CLIPProcessor.from_pretrained(model)
        processor.image_processor = in_pil(processor.image_processor)
        return net, processor
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot load the CLIP model {model!r}: {str(error)[:300]}") from None


def projected(output: Any) -> torch.Tensor:
    """The embedding: transformers >= 5 returns an output object with it in `pooler_output`, 4 a tensor."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def in_pil(processor: Any) -> Any:
    """The image processor with the same settings in PIL: where torchvision is installed transformers resizes with that,
    and the numbers would depend on what else is installed."""
    import transformers

    name = type(processor).__name__.removesuffix("Fast").removesuffix("Pil")
    cls = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)  # transformers 5, or 4
    return processor if isinstance(processor, cls) else cls.from_dict(processor.to_dict())


def processed(processor: Any, image: np.ndarray) -> torch.Tensor:
    """An image processor's output from uint8: it rescales by 1/255 itself, a float image would be divided twice."""
    return processor(image, return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]


def clip_features(id: str, net: Any, processor: Any) -> Features:
    """The image half of a CLIPModel."""

    def embed(pixels: torch.Tensor) -> torch.Tensor:
        return projected(net.get_image_features(pixel_values=pixels))

    return Features(
        id, int(net.config.projection_dim), functools.partial(processed, processor.image_processor), embed, net
    )


def _dino(id: str, model: str) -> Features:
    from transformers import AutoImageProcessor, AutoModel

    try:
        net = AutoModel.from_pretrained(model).float().eval().requires_grad_(False)
        processor = in_pil(AutoImageProcessor.from_pretrained(model))
    except (OSError, ValueError) as error:
        raise OptionError(f"cannot load the DINO model {model!r}: {str(error)[:300]}") from None

    def embed(pixels: torch.Tensor) -> torch.Tensor:
        return net(pixel_values=pixels).last_hidden_state[:, 0]

    return Features(id, int(net.config.hidden_size), functools.partial(processed, processor), embed, net)


@dataclass(frozen=True)
class Extracted:
    """Features (N, d) of all images, in order, with what was seen on the way. sizes: (height, width) -> count."""

    values: torch.Tensor
    sizes: dict[tuple[int, int], int]
    duplicates: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


@torch.no_grad()
def extract(
    images: Images,
    features: Features,
    *,
    batch: int = 64,
    device: str = "cpu",
    workers: int = 0,
    expected: int | None = None,
    progress: bool = False,
) -> Extracted:
    """Features of all images, float32 (float64 where the net gives that); above 1 GiB they lie in a temporary file.

    expected: how many images there should be (prompts or seeds); fewer is a warning in the score.
    """
    if batch < 1:
        raise OptionError(f"batch is 1 image or more, got {batch}")
    _check_device(device)
    for module in (features.net, features.module):
        if isinstance(module, torch.nn.Module):
            module.to(device)
    store: np.ndarray | None = None
    sizes: Counter[tuple[int, int]] = Counter()
    digests: set[bytes] = set()
    done = 0
    batches: Any = images.batches(batch, workers)
    if progress:
        from tqdm import tqdm

        batches = tqdm(batches, total=-(-len(images) // batch), desc=features.id, unit="batch")
    for group in batches:
        sizes.update(x.shape[:2] for x in group)
        digests.update(hashlib.sha1(repr(x.shape).encode() + x.tobytes()).digest() for x in group)
        out = _run(features, group, device)
        if store is None:
            store = _allocate((len(images), out.shape[1]), out.dtype)
        store[done : done + len(group)] = out
        done += len(group)
    assert store is not None  # Images is never empty
    duplicates = len(images) - len(digests)
    return Extracted(torch.from_numpy(store), dict(sizes), duplicates, *_remarks(images, sizes, duplicates, expected))


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises the latter where it was built without CUDA
        said = (str(error).strip().splitlines() or [""])[0]
        raise OptionError(f"device {device!r} cannot be used here: {said}") from None


def _run(features: Features, group: list[np.ndarray], device: str) -> np.ndarray:
    inputs = [features.prepare(x) for x in group]
    if len({x.shape for x in inputs}) > 1:
        shapes = sorted({x.shape[:2] for x in group})
        raise OptionError(
            f"{features.id} takes images of one size, the source mixes {', '.join(f'{h}x{w}' for h, w in shapes)}; "
            "bring them to one size first, or use features that resize (inception-v3:clean, clip:...)"
        )
    out = features.net(torch.stack(inputs).to(device))
    if out.ndim != 2 or len(out) != len(group):
        raise OptionError(f"{features.id} must give (N, d) for {len(group)} images, it gave {tuple(out.shape)}")
    return (out if out.dtype == torch.float64 else out.float()).cpu().numpy()


def _allocate(shape: tuple[int, int], dtype: Any) -> np.ndarray:
    if np.dtype(dtype).itemsize * shape[0] * shape[1] <= _IN_MEMORY:
        return np.empty(shape, dtype)
    with tempfile.NamedTemporaryFile(prefix="diffaccel-features-") as file:  # lives as long as the mapping
        return np.memmap(file, dtype, "w+", shape=shape)


def _remarks(
    images: Images, sizes: Counter[tuple[int, int]], duplicates: int, expected: int | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    notes, warnings = [], []
    if len(sizes) > 1:
        common = ", ".join(f"{n} of {h}x{w}" for (h, w), n in sizes.most_common(3))
        notes.append(f"{images.id}: {len(sizes)} image sizes ({common}{', ...' if len(sizes) > 3 else ''})")
    if duplicates > 0.01 * len(images):
        warnings.append(f"{images.id}: {duplicates} of {len(images)} images are duplicates")
    if images.skipped:
        warnings.append(f"{images.id}: {len(images.skipped)} unreadable images skipped, first: {images.skipped[0]}")
    if expected is not None and len(images) < expected:
        warnings.append(f"{images.id}: {len(images)} images where {expected} were expected")
    return tuple(notes), tuple(warnings)
