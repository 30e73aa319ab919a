"""CLIP score and R-precision of images and their prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import no_leftover, one_of
from ..prompts import read_prompts
from .features import canonical, clip_features, clip_model, extract, projected
from .images import Images, open_images
from .score import Score, interval

DEFAULT = "openai/clip-vit-base-patch16"
HESSEL_PREFIX = "A photo depicts "
_READING = ("alpha", "unreadable", "batch", "device", "workers", "expected", "progress")


def pair_scores(image: torch.Tensor, text: torch.Tensor, variant: str = "cosine") -> torch.Tensor:
    """Per pair, from embeddings (N, d) of any length: 100 cos ("cosine"; no logit scale, not clamped), or
    2.5 max(cos, 0) ("hessel", arXiv:2104.08718)."""
    cos = (F.normalize(image, dim=-1) * F.normalize(text, dim=-1)).sum(-1)
    return 2.5 * cos.clamp(min=0) if variant == "hessel" else 100 * cos


@torch.no_grad()
def embed_text(net: Any, processor: Any, prompts: Sequence[str], batch: int = 256) -> tuple[torch.Tensor, int]:
    """(embeddings (P, d), how many prompts were truncated).

    The tokenizer truncates, so that the end token stays: CLIP reads its embedding there, and with cut `input_ids` every
    long prompt gets the same embedding. The attention mask is passed, so padding does not matter.
    """
    tokenizer = processor.tokenizer
    limit = int(net.config.text_config.max_position_embeddings)
    device = next(net.parameters()).device
    lengths = [len(ids) for ids in tokenizer(list(prompts), verbose=False)["input_ids"]]
    out = []
    for i in range(0, len(prompts), batch):
        tokens = tokenizer(
            list(prompts[i : i + batch]), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        named = {k: tokens[k].to(device) for k in ("input_ids", "attention_mask")}
        out.append(projected(net.get_text_features(**named)).float().cpu())
    return torch.cat(out), sum(n > limit for n in lengths)


def r_precision(image: torch.Tensor, texts: torch.Tensor, own: np.ndarray, others: int = 99) -> torch.Tensor:
    """bool (N,): whether the own prompt is nearer to image i than each of `others` different prompts.

    texts (P, d): embeddings of different prompts, own (N,): index of each image's prompt. The draw depends on N and P
    only, so rows of a comparison see the same distractors. A tie counts as a miss.
    """
    image, texts = F.normalize(image, dim=-1), F.normalize(texts, dim=-1)
    count = min(others, len(texts) - 1)
    rng = np.random.default_rng(0)
    first = torch.empty(len(image), dtype=torch.bool)
    for i, j in enumerate(own):
        drawn = rng.choice(len(texts) - 1, count, replace=False)
        cos = texts[torch.from_numpy(drawn + (drawn >= j))] @ image[i]
        first[i] = bool((texts[j] @ image[i] > cos).all())
    return first


def clip_score(
    images: Any,
    prompts: str | Path | Sequence[str],
    *,
    model: Any = DEFAULT,
    variant: str = "cosine",
    distractors: int = 99,
    **reading: Any,
) -> Score:
    """Mean CLIP score of images and prompts; image i belongs to prompt i mod P.

    images: what `open_images` reads. prompts: a file or a list (see `read_prompts`). model: a hub id, a folder,
    "tiny-clip" (embedded), or (CLIPModel, CLIPProcessor); values of different models are not comparable. variant:
    "cosine" (100 cos) or "hessel" (2.5 max(cos, 0), prompts prefixed with "A photo depicts "). details: R-precision
    against so many other prompts (it does not saturate, as the score does), truncated and empty prompts.
    reading: alpha, unreadable ("skip": the others keep their prompts), batch, device, workers, expected (default: one
    image a prompt), progress.
    """
    one_of("variant", variant, ("cosine", "hessel"))
    no_leftover("clip_score", reading, _READING)
    opening = {k: reading.pop(k) for k in ("alpha", "unreadable") if k in reading}
    source = open_images(images, expected=reading.get("expected"), **opening)
    given = read_prompts(prompts)
    net, processor = clip_model(model) if isinstance(model, str) else model
    id = canonical(f"clip:{model if isinstance(model, str) else getattr(net, 'name_or_path', '') or 'given model'}")
    got = extract(source, clip_features(id, net, processor), **{"expected": len(given), **reading})
    number = {p: i for i, p in enumerate(dict.fromkeys(given))}
    unique = list(number)
    own = np.array([number[p] for p in given])[np.asarray(source.numbers) % len(given)]
    prefix = HESSEL_PREFIX if variant == "hessel" else ""
    text, truncated = embed_text(net, processor, [prefix + p for p in unique])
    values = pair_scores(got.values, text[torch.from_numpy(own)], variant).double()
    mean = float(values.mean())
    se = float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")
    low, high = interval(mean, se)
    return Score(
        mean,
        low,
        high,
        mean,
        len(source),
        0,
        id,
        "mean over pairs; interval by its standard error",
        "CLIP score" if variant == "cosine" else "CLIP score (Hessel: 2.5 max(cos, 0))",
        notes=(*got.notes, *_size_notes(got.sizes, net)),
        warnings=(*got.warnings, *_other_prompts(source, given)),
        details={
            **_r_precision_details(got.values, text, own, distractors),
            "prompts": len(given),
            "prompts truncated": truncated,
            "empty prompts": sum(not p.strip() for p in given),
        },
    )


def _other_prompts(images: Images, given: Sequence[str]) -> list[str]:
    """A warning where a folder of `generate` was made from other prompts."""
    made = zip(images.numbers, images.prompts or (), strict=False)
    other = [(i, p) for i, p in made if p is not None and p != given[i % len(given)]]
    if not other:
        return []
    i, prompt = other[0]
    return [
        f"{len(other)} of {len(images)} images were made from other prompts than the given ones; first: image {i} from "
        f"{prompt!r}, scored with {given[i % len(given)]!r}"
    ]


def _r_precision_details(image: torch.Tensor, text: torch.Tensor, own: np.ndarray, others: int) -> dict[str, Any]:
    if len(text) < 2:
        return {"R-precision": "not defined: all prompts are the same"}
    first = r_precision(image, text, own, others).double()
    p = float(first.mean())
    return {
        "R-precision": p,
        "R-precision se": float((p * (1 - p) / len(first)) ** 0.5),
        "R-precision distractors": min(others, len(text) - 1),
    }


def _size_notes(sizes: dict[tuple[int, int], int], net: Any) -> list[str]:
    side = int(net.config.vision_config.image_size)
    cut = sum(n for (h, w), n in sizes.items() if h != w)
    small = sum(n for (h, w), n in sizes.items() if min(h, w) < side)
    notes = [f"{cut} images are not square: only their centre is scored"] if cut else []
    return notes + ([f"{small} images are smaller than the {side} pixels of the model: enlarged"] if small else [])
