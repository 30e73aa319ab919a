"""The power spectrum of a checkpoint's latents, for `bottleneck`: when to change size, and with what noise."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..artifact import Artifact, path_identity
from ..core.path import Path
from ..core.stages import SPECTRA, Spectrum, dct_matrix, frequency, switch_time
from ..errors import OptionError
from ..identity import model_identity
from .engine import Captured, Engine
from .gauss import SAMPLER, config_prediction, one_budget
from .validate import ends

FEWEST, GOOD = 16, 0.9


def fit_spectrum(latents: np.ndarray) -> Spectrum:
    """A power law through the mean power of the latents' DCT coefficients.

    Weighted least squares of `ln P` on `ln w` over radial bins of width 1, w >= 2 cycles per shorter side; a bin's
    weight is its number of coefficients.

    Args:
        latents: (n, ..., H, W), scaled as the denoiser sees them (after `(z - shift) * scaling_factor`); of generated
            or of encoded images.

    Returns:
        with `r2` of the fit.

    Raises:
        OptionError: for fewer than 16 latents, or ones too small for three bins.
    """
    h, w = latents.shape[-2:]
    if len(latents) < FEWEST:
        raise OptionError(f"a spectrum needs {FEWEST} latents or more, got {len(latents)}")
    modes = dct_matrix(h) @ latents.astype(np.float64) @ dct_matrix(w).T
    power = (modes**2).reshape(-1, h, w).mean(0)
    at, bins = frequency((h, w)), np.floor(frequency((h, w))).astype(int)
    chosen = [k for k in range(2, int(min(h, w) / 2) + 1) if np.any(bins == k)]
    if len(chosen) < 3:
        raise OptionError(f"latents of {h}x{w} have {len(chosen)} bins from 2 cycles on; a power law needs 3 or more")
    x = np.log([at[bins == k].mean() for k in chosen])
    y = np.log([power[bins == k].mean() for k in chosen])
    weight = np.array([np.sum(bins == k) for k in chosen], dtype=np.float64)
    slope, offset = np.polyfit(x, y, 1, w=np.sqrt(weight))
    mean = np.average(y, weights=weight)
    left = np.average((y - offset - slope * x) ** 2, weights=weight)
    r2 = 1 - float(left / np.average((y - mean) ** 2, weights=weight))
    return Spectrum(math.exp(offset), -float(slope), h, w, r2)


def spectrum(
    pipe: Any,
    prompts: Sequence[str],
    *,
    images: int = 64,
    calls: int | Sequence[int] = 20,
    guidance: float | None = None,
    call: Mapping[str, Any] | None = None,
    batch: int = 8,
    seed: int = 0,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Artifact:
    """Fit `P(w) = A w^-beta` to the latents that the pipeline generates; `bottleneck(pipe, ..., spectrum=artifact)`.

    Args:
        pipe: text-to-image; left as it was.
        prompts: used in turn.
        images, calls: generated, and the model calls of each.
        guidance, call, batch, seed, out, progress: as for every calibration.

    Returns:
        kind "spectrum": the tensor `law` (A, beta, height, width, R^2). Its receipt says whether the law is good
        enough for the delta rule and matched fills, and when it would go up from half size.
    """
    calls = one_budget("spectrum", calls)
    if images < FEWEST:
        raise OptionError(f"a spectrum needs {FEWEST} latents or more: images is {images}")
    settings = {"kind": "spectrum", "images": images, "calls": calls}
    engine = Engine(pipe, prompts, guidance=guidance, call=call, batch=batch, seed=seed, out=out, settings=settings,
                    progress=progress)  # fmt: skip
    config = pipe.scheduler.config

    def make() -> Captured:
        return Captured.of(config, *SAMPLER)

    with engine.working(images * calls, "spectrum"):
        samples = ends(engine, "samples", engine.batches(0, images), make, calls)
    found = fit_spectrum(_planes(np.asarray(samples), call or {}))
    size = (found.height, found.width)
    half = (found.height // 2, found.width // 2)
    good = (found.r2 or 0.0) >= GOOD
    receipt = {
        "A": found.a,
        "beta": found.beta,
        "R^2": found.r2,
        "latents": f"{images} of {size[0]}x{size[1]}",
        "verdict": "usable" if good else f"R^2 below {GOOD}: no power law; bottleneck refuses it",
        "flow time to go up from half size, delta .01": switch_time(found, half, size),
        "published": {name: f"A = {s.a:.4g}, beta = {s.beta:.4g}, {s.height}x{s.width}" for name, s in SPECTRA.items()},
    }
    made = Artifact(
        "spectrum",
        {"law": np.array([found.a, found.beta, *size, found.r2 or 0.0])},
        {
            "path": path_identity(Path.from_config(config), config_prediction(config)),
            "model": model_identity(pipe),
            "guidance": engine.guidance,
            "seeds": [seed, seed + images],
            "cost": engine.cost,
            "receipt": receipt,
        },
    )
    return engine.finish(made)


def law_of(artifact: Artifact) -> Spectrum:
    """The spectrum in an artifact of that kind."""
    a, beta, height, width, r2 = (float(v) for v in artifact.of_kind("spectrum").tensors["law"])
    return Spectrum(a, beta, int(height), int(width), r2)


def _planes(latents: np.ndarray, call: Mapping[str, Any]) -> np.ndarray:
    """Tokens (n, h/2 * w/2, 4 C) as (n, C, h, w); what has planes already stays."""
    if latents.ndim != 3:
        return latents
    n, tokens, channels = latents.shape
    aspect = call.get("height", 1) / call.get("width", 1)
    h = round(math.sqrt(tokens * aspect))
    if h == 0 or tokens % h:
        raise OptionError(
            f"{tokens} tokens of an image make no rectangle of aspect {aspect:.3f}; pass height and width"
        )
    parts = latents.reshape(n, h, tokens // h, channels // 4, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    return parts.reshape(n, channels // 4, 2 * h, 2 * (tokens // h))
