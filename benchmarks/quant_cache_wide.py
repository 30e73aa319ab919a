"""The part of bench_quant_cache.py on a DiT of real width (DiT-XL's 16 heads of 72) with random weights."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import quant_cache_memory as memory
import quant_cache_peers as peers
import torch
import torch._inductor.config as inductor
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from quant_cache_peers import alone, ours
from torch._dynamo.utils import counters

import diffaccel as da
from diffaccel.calibrate.watched import watched
from diffaccel.denoiser.cache import Cache
from diffaccel.denoiser.quant import quantise
from diffaccel.testing.pipelines import build

LAYERS, STEPS, ROWS, ROUNDS = 6, 10, 1, 1
PLAIN = (4, 5, 6, 7, 8)


def pipeline() -> DiTPipeline:
    """Latents of 32 x 32, 256 tokens."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=4, num_layers=LAYERS,
        sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    small: Any = build("dit")
    pipe = DiTPipeline(transformer=transformer.eval().requires_grad_(False), vae=small.vae,
                       scheduler=DDIMScheduler(num_train_timesteps=1000), id2label=None)  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wide() -> dict[str, Any]:
    """Rows: time relative to full float runs, eager, of the same round, and error of the last state to them."""
    pipe = pipeline()
    params = sum(p.numel() for p in pipe.transformer.parameters())

    def call(steps: int = STEPS) -> tuple[float, torch.Tensor]:
        states: list[torch.Tensor] = []

        def keep(_: int, x: torch.Tensor) -> torch.Tensor:
            states.append(x)
            return x

        own = pipe.scheduler
        pipe.scheduler = watched(own, state=keep)
        try:
            start = time.process_time()
            with torch.no_grad():
                pipe(class_labels=list(range(ROWS)), guidance_scale=1.0, num_inference_steps=steps,
                     generator=[torch.Generator().manual_seed(i) for i in range(ROWS)], output_type="np")  # fmt: skip
            return time.process_time() - start, states[-1]
        finally:
            pipe.scheduler = own

    rows: list[dict[str, Any]] = []
    everything = sorted(candidates(pipe), key=lambda row: "compiled" in row[0])  # compilation is not timed
    full, reference = call()
    for k, (name, wrap, steps) in enumerate(everything):
        full = call()[0] if k % 5 == 0 else full
        row: dict[str, Any] = {"name": name, "seconds": []}
        rows.append(row)
        try:
            with wrap(pipe) as handle:
                if "compiled" in name:
                    call(steps)
                before = memory.from_here()
                row["error"], row["seconds"] = measured(call, steps, reference)
                row["peak"] = memory.since(before)
                if hasattr(handle, "report") and handle.report().cache is not None:
                    report = handle.report().cache
                    row["full"] = report.forwards["full"]
                    row["calls as long as this"] = report.equal_calls
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
            continue
        row["time"] = min(row.pop("seconds")) / full
        print(f"wide: {name}: time {row['time']:.3f}, error {row['error']:.4f}", flush=True)
    return {
        "parameters": params, "layers": LAYERS, "width": 1152, "tokens": 256, "rows in a batch": ROWS, "steps": STEPS,
        "rows": rows, "one call": one_call(pipe), "cached step": cached_step(pipe, call),
    }  # fmt: skip


def measured(call: Callable[[int], Any], steps: int, reference: torch.Tensor) -> tuple[float, list[float]]:
    seconds, last = [], reference
    for _ in range(ROUNDS):
        own, last = call(steps)
        seconds.append(own)
    return float((last - reference).norm() / reference.norm()), seconds


def candidates(pipe: Any) -> list[tuple[str, Callable[[Any], Any], int]]:
    """(name, context, steps)."""

    def plain(pipe: Any) -> Any:
        return contextlib.nullcontext()

    three, learned_like = Cache.every(3, forecast=1), Cache.every(2, forecast=1)
    return [
        *((f"{n} steps", plain, n) for n in PLAIN),
        ("float, blocks compiled", alone(None, True), STEPS),
        ("torchao W8A8 alone", alone("w8a8", False), STEPS),
        ("torchao W8A8 alone, blocks compiled", alone("w8a8", True), STEPS),
        ("every(3), forecast 0", ours(cache=Cache.every(3, forecast=0)), STEPS),
        ("every(3), forecast 1", ours(cache=three), STEPS),
        ("every(2), forecast 1", ours(cache=learned_like), STEPS),
        ("every(3), forecast 1, compiled", ours(True, cache=three), STEPS),
        ("every(3), forecast 1, W8A8", ours(cache=three, quant="w8a8"), STEPS),
        ("every(3), forecast 1, W8A8, compiled", ours(True, cache=three, quant="w8a8"), STEPS),
        ("first_block(0.1), forecast 1", ours(cache=Cache.first_block(0.1, forecast=1)), STEPS),
        ("diffusers FirstBlockCache 0.1", peers.first_block(0.1), STEPS),
        ("diffusers TaylorSeer 3, order 1", peers.taylor_seer(3, 1), STEPS),
        ("diffusers PAB 2", peers.pyramid(2), STEPS),
        ("cache-dit DBCache F1 0.1", peers.cache_dit_peer(0.1, STEPS, False), STEPS),
        ("cache-dit DBCache F1 0.1 + TaylorSeer", peers.cache_dit_peer(0.1, STEPS, True), STEPS),
    ]  # fmt: skip


# ---------------------------------------------------------------------- one call
def one_call(pipe: Any) -> dict[str, Any]:
    """Single calls of variants, each interleaved with float eager: median ratio, and the error of the output.

    Tuned: products of matrices chosen by measurement, weights packed once (`max-autotune`, inductor's `freezing`).
    """
    x = torch.randn(ROWS, 4, 32, 32, generator=torch.Generator().manual_seed(5))
    given = {"timestep": torch.full((ROWS,), 500), "class_labels": torch.arange(ROWS)}
    tuned = {"mode": "max-autotune-no-cudagraphs"}
    found = {}
    for name, mode, compiled in (
        ("float compiled", None, {}), ("W8", "w8", None), ("W8A8", "w8a8", None), ("W8A8 compiled", "w8a8", {}),
        ("float compiled, tuned", None, tuned), ("W8A8 compiled, tuned", "w8a8", tuned),
    ):  # fmt: skip
        torch._dynamo.reset()  # compiled code of all variants together would pass the limit of recompilations
        variant = copy.deepcopy(pipe.transformer)
        if mode is not None:
            quantise(variant, mode)
        if compiled is not None:
            for block in variant.transformer_blocks:
                block.compile(**compiled)
        with inductor.patch(freezing=compiled is tuned):
            found[name] = beside(pipe.transformer, variant, lambda model: model(x, **given).sample)
    return found


@torch.no_grad()
def beside(plain: Any, variant: Any, call: Callable[[Any], torch.Tensor]) -> dict[str, float]:
    """How many times faster a variant is than the plain model, call by call, and how far from its output."""
    reference, output = call(plain), call(variant)
    ratios = []
    for _ in range(7):
        start = time.process_time()
        call(plain)
        between = time.process_time()
        call(variant)
        ratios.append((between - start) / (time.process_time() - between))
    error = float((output - reference).norm() / reference.norm())
    return {"faster": statistics.median(ratios), "error": error}


def cached_step(pipe: Any, call: Callable[..., Any]) -> dict[str, float]:
    """What a reused step saves, relative to the block calls that it leaves out; graph breaks of compiled blocks."""
    # CPU seconds of each call
    blocks, plain, cached, compiled = ([], [], [], [])  # type: tuple[list[float], ...]
    cache = Cache.every(2, 1, 0, forecast=1)  # full at 0, 1, 3, 5, ...; reused at 2, 4, ...
    with clocked(pipe.transformer.transformer_blocks[1:], blocks), clocked([pipe.transformer], plain):
        call()
    with da.quant_cache(pipe, cache=cache), clocked([pipe.transformer], cached):
        call()
    counters.clear()
    with da.quant_cache(pipe, cache=cache) as h, clocked([pipe.transformer], compiled):
        h.compile()
        call()
    out = [sum(blocks[i : i + LAYERS - 1]) for i in range(0, len(blocks), LAYERS - 1)]
    full, reused, left_out = (statistics.median(v) for v in (plain, cached[2::2], out))
    return {
        "full step of the plain model, seconds": full,
        "full step with the cache, seconds": statistics.median(cached[1::2]),
        "reused step, seconds": reused,
        "blocks that it leaves out, seconds": left_out,
        "saved / left out": (full - reused) / left_out,
        "graph breaks of compiled blocks": float(sum(counters["graph_break"].values())),
    }


@contextlib.contextmanager
def clocked(modules: Any, into: list[float]) -> Iterator[None]:
    """CPU seconds of each call of the modules."""
    begun: list[float] = []
    handles: list[Any] = []
    for module in modules:
        handles.append(module.register_forward_pre_hook(lambda *_: begun.append(time.process_time())))
        handles.append(module.register_forward_hook(lambda *_: into.append(time.process_time() - begun.pop())))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
