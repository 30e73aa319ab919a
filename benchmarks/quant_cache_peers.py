"""What the quantisation and cache benchmarks wrap a pipeline in: ours, torchao alone, and the caches of others.

All but ours work on a copy of the denoiser that is thrown away afterwards. diffusers' hooks keep their state by the
name of a context, which SD3's and DiT's pipelines never enter: it is set here.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import diffusers.hooks as hooks
import torch
from diffusers.hooks.hooks import CacheContext, _set_cache_context

import diffaccel as da
from diffaccel.denoiser.quant import quantise

Wrap = Callable[[Any], Any]  # pipeline -> context manager; the pipeline is called once in it


@contextlib.contextmanager
def twin(pipe: Any) -> Iterator[torch.nn.Module]:
    """A copy of the denoiser in its place."""
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    own = getattr(pipe, name)
    setattr(pipe, name, copy.deepcopy(own))
    try:
        yield getattr(pipe, name)
    finally:
        setattr(pipe, name, own)


def ours(compiled: bool = False, **settings: Any) -> Wrap:
    """`quant_cache` with these settings."""

    @contextlib.contextmanager
    def wrap(pipe: Any) -> Iterator[Any]:
        with da.quant_cache(pipe, **settings) as handle:
            if compiled:
                handle.compile()
            yield handle

    return wrap


def alone(quant: da.Quant | str | None, compiled: bool) -> Wrap:
    """torchao, or compiled blocks, without a cache."""

    @contextlib.contextmanager
    def wrap(pipe: Any) -> Iterator[None]:
        with twin(pipe) as model:
            if quant is not None:
                quantise(model, quant)
            if compiled:
                if hasattr(model, "down_blocks"):
                    parts = [*model.down_blocks, model.mid_block, *model.up_blocks]
                else:
                    parts = [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())]
                for part in parts:
                    part.compile()
            yield

    return wrap


def diffusers_peer(make: Callable[[Any, Callable[[], float]], Any], apply: Callable[..., None]) -> Wrap:
    """A cache of diffusers; `make(pipe, current timestep)` is its config."""

    @contextlib.contextmanager
    def wrap(pipe: Any) -> Iterator[None]:
        with twin(pipe) as model:
            fed = {"t": 1000.0}

            def note(_: Any, args: Any, kwargs: Any) -> None:
                t = float(kwargs["timestep"].reshape(-1)[0])
                fed["t"] = 1000 * t if t <= 1 else t  # FLUX is fed t / 1000

            model.register_forward_pre_hook(note, with_kwargs=True)
            apply(model, make(pipe, lambda: fed["t"]))
            _set_cache_context(model, CacheContext("bench"))
            yield

    return wrap


def first_block(threshold: float) -> Wrap:
    return diffusers_peer(
        lambda pipe, t: hooks.FirstBlockCacheConfig(threshold=threshold), hooks.apply_first_block_cache
    )


def taylor_seer(interval: int, order: int) -> Wrap:
    def make(pipe: Any, t: Any) -> Any:
        return hooks.TaylorSeerCacheConfig(
            cache_interval=interval, disable_cache_before_step=3, max_order=order, taylor_factors_dtype=torch.float32
        )

    return diffusers_peer(make, hooks.apply_taylorseer_cache)


def pyramid(skip: int) -> Wrap:
    def make(pipe: Any, t: Callable[[], float]) -> Any:
        return hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=skip, current_timestep_callback=lambda: int(t())
        )

    return diffusers_peer(make, hooks.apply_pyramid_attention_broadcast)


def faster() -> Wrap:
    def make(pipe: Any, t: Callable[[], float]) -> Any:
        return hooks.FasterCacheConfig(
            tensor_format="BCHW",
            current_timestep_callback=lambda: int(t()),
            attention_weight_callback=lambda _: 0.3,
        )

    return diffusers_peer(make, hooks.apply_faster_cache)


def mag_ratios(pipe: Any, steps: int, call: Callable[[], Any]) -> list[float]:
    """MagCache's own calibration: one run that prints its ratios."""

    def make(pipe: Any, t: Any) -> Any:
        return hooks.MagCacheConfig(calibrate=True, num_inference_steps=steps)

    told = io.StringIO()
    with contextlib.redirect_stdout(told), diffusers_peer(make, hooks.apply_mag_cache)(pipe):
        call()
    line = next(text for text in told.getvalue().splitlines() if text[:2] == "[1")
    return [float(v) for v in line.strip()[1:-1].split(",")]


def mag(threshold: float, steps: int, ratios: list[float]) -> Wrap:
    def make(pipe: Any, t: Any) -> Any:
        return hooks.MagCacheConfig(threshold=threshold, num_inference_steps=steps, mag_ratios=ratios)

    return diffusers_peer(make, hooks.apply_mag_cache)


def cache_dit_peer(threshold: float, steps: int, taylor: bool, blocks: int = 1) -> Wrap:
    """DBCache of cache-dit, with or without its TaylorSeer calibrator. (Its default needs 9 blocks or more.)"""

    @contextlib.contextmanager
    def wrap(pipe: Any) -> Iterator[None]:
        import cache_dit

        with twin(pipe) as model:
            config = cache_dit.DBCacheConfig(
                Fn_compute_blocks=blocks, Bn_compute_blocks=0, max_warmup_steps=3, residual_diff_threshold=threshold,
                num_inference_steps=steps,
            )  # fmt: skip
            more = {"calibrator_config": cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1)} if taylor else {}
            # SD3's blocks return (encoder, hidden), DiT's hidden alone
            pattern = cache_dit.ForwardPattern.Pattern_1 if hasattr(model, "context_embedder") else None
            adapter = cache_dit.BlockAdapter(
                transformer=model, blocks=model.transformer_blocks,
                forward_pattern=pattern or cache_dit.ForwardPattern.Pattern_3, check_forward_pattern=False,
            )  # fmt: skip
            with contextlib.redirect_stdout(io.StringIO()):
                cache_dit.enable_cache(adapter, cache_config=config, **more)
            yield  # it patches the copy alone

    return wrap
