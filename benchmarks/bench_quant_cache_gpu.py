"""Quantisation and caches on a GPU: DiT-XL and FLUX in size, random weights, bf16 and fp8, against others' caches.

    python benchmarks/bench_quant_cache_gpu.py --out results_gpu [--models dit flux] [--rounds 3]
    python benchmarks/bench_quant_cache_gpu.py --tiny --out check           # the same on small models, anywhere

Random weights: seconds, memory and what the runs compute otherwise; no quality. FLUX needs 80 GB (24 GB of weights,
and copies for peers). cache-dit takes part where it is installed. Seconds are medians, each after a run that warms up
(and compiles), with the GPU synchronised; errors are relative, of the last latents to the plain run of all steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import quant_cache_peers as peers
import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from quant_cache_peers import alone, ours

from diffaccel.calibrate.watched import watched
from diffaccel.denoiser.cache import Cache
from diffaccel.denoiser.quant import Quant
from diffaccel.testing.pipelines import build

Call = Callable[[int], torch.Tensor]
STEPS = {"dit": 50, "flux": 28}
PLAIN = (0.3, 0.4, 0.5, 0.6, 0.8)  # shares of the steps


# ---------------------------------------------------------------------- models
def dit(device: str, dtype: torch.dtype, tiny: bool) -> tuple[Any, Call]:
    """DiT-XL/2 at 512 pixels: 28 blocks, width 1152, 1024 tokens."""
    heads, layers = (4, 3) if tiny else (16, 28)
    transformer = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=72 if not tiny else 64, in_channels=4, out_channels=4,
        num_layers=layers, sample_size=16 if tiny else 64, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae: Any = build("dit").vae
    pipe = DiTPipeline(transformer=ready(transformer, device, dtype), vae=vae.to(device, dtype),
                       scheduler=DDIMScheduler(), id2label=None)  # fmt: skip

    def call(steps: int) -> torch.Tensor:
        generator = [torch.Generator().manual_seed(i) for i in range(2)]
        return last_state(pipe, lambda: pipe(class_labels=[1, 2], guidance_scale=4.0, num_inference_steps=steps,
                                             generator=generator, output_type="np"))  # fmt: skip

    return pipe, call


def flux(device: str, dtype: torch.dtype, tiny: bool) -> tuple[Any, Call]:
    """FLUX.1-dev at 1024 pixels: 19 + 38 blocks, width 3072, 4096 + 512 tokens."""
    config: dict[str, Any] = {"guidance_embeds": True}
    if tiny:
        config |= {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 4, "attention_head_dim": 64}
        config |= {"joint_attention_dim": 64, "pooled_projection_dim": 32, "axes_dims_rope": (16, 24, 24)}
        config |= {"in_channels": 16}
    transformer = FluxTransformer2DModel(**config)
    small: Any = build("flux")
    pipe = FluxPipeline(
        transformer=ready(transformer, device, dtype), vae=small.vae, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )  # fmt: skip
    pipe.vae_scale_factor = 8
    generator = torch.Generator().manual_seed(0)
    pooled, joint = transformer.config.pooled_projection_dim, transformer.config.joint_attention_dim
    given = {
        "prompt_embeds": torch.randn((1, 16 if tiny else 512, joint), generator=generator).to(device, dtype),
        "pooled_prompt_embeds": torch.randn((1, pooled), generator=generator).to(device, dtype),
        "height": 64 if tiny else 1024,
        "width": 64 if tiny else 1024,
    }

    def call(steps: int) -> torch.Tensor:
        return last_state(pipe, lambda: pipe(**given, num_inference_steps=steps, output_type="latent",
                                             generator=torch.Generator().manual_seed(1)))  # fmt: skip

    return pipe, call


def ready(model: torch.nn.Module, device: str, dtype: torch.dtype) -> Any:
    return model.eval().requires_grad_(False).to(device, dtype)


def last_state(pipe: Any, run: Callable[[], Any]) -> torch.Tensor:
    states: list[torch.Tensor] = []

    def keep(_: int, x: torch.Tensor) -> torch.Tensor:
        states.append(x)
        return x

    own = pipe.scheduler
    if isinstance(own, DDIMScheduler | FlowMatchEulerDiscreteScheduler):
        pipe.scheduler = watched(own, state=keep)
    try:
        with torch.no_grad():
            run()
    finally:
        pipe.scheduler = own
    return states[-1].float()


# ---------------------------------------------------------------------- rows
def candidates(steps: int, quants: list[Quant]) -> list[tuple[str, peers.Wrap, int]]:
    """(name, context, steps)."""
    plain = [(f"{n} steps", lambda pipe: contextlib.nullcontext(), n) for n in (round(s * steps) for s in PLAIN)]
    rows: list[tuple[str, peers.Wrap, int]] = [*plain, ("blocks compiled", alone(None, True), steps)]
    caches = [Cache.every(3, forecast=0), Cache.every(3, forecast=1), Cache.every(2, forecast=1)]
    caches += [Cache.first_block(t, forecast=1) for t in (0.05, 0.1, 0.2)]
    rows += [(f"{c.name}, forecast {c.forecast}", ours(cache=c), steps) for c in caches]
    rows.append(("every(3), forecast 1, compiled", ours(True, cache=caches[1]), steps))
    for quant in quants:
        rows += [
            (f"{quant.mode} alone, compiled", alone(quant, True), steps),
            (f"every(3), forecast 1, {quant.mode}, compiled", ours(True, cache=caches[1], quant=quant), steps),
        ]
    rows += [(f"diffusers FirstBlockCache {t}", peers.first_block(t), steps) for t in (0.05, 0.1, 0.2)]
    rows += [(f"diffusers TaylorSeer 3, order {m}", peers.taylor_seer(3, m), steps) for m in (0, 1)]
    rows.append(("diffusers PAB 2", peers.pyramid(2), steps))
    for t in (0.08, 0.15):
        rows.append((f"cache-dit DBCache F1 {t}", peers.cache_dit_peer(t, steps, False), steps))
        rows.append((f"cache-dit DBCache F1 {t} + TaylorSeer", peers.cache_dit_peer(t, steps, True), steps))
    return rows


def measured(call: Call, steps: int, rounds: int, device: str) -> tuple[float, float, torch.Tensor]:
    """(median seconds, peak GiB, last state)."""
    seconds = []
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for k in range(rounds + 1):
        sync(device)
        start = time.perf_counter()
        last = call(steps)
        sync(device)
        if k:
            seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
    return statistics.median(seconds), peak, last


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def model(name: str, device: str, tiny: bool, rounds: int) -> dict[str, Any]:
    """All rows of a model."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    pipe, call = {"dit": dit, "flux": flux}[name](device, dtype, tiny)
    pipe.set_progress_bar_config(disable=True)
    steps = 10 if tiny else STEPS[name]
    modes = ["w8a8"] if device != "cuda" else ["w8a8", "fp8"]
    full, peak, reference = measured(call, steps, rounds, device)
    rows = [{"name": f"{steps} steps", "seconds": full, "faster": 1.0, "GiB": peak, "error": 0.0}]
    for label, wrap, n in candidates(steps, [Quant(mode) for mode in modes]):
        row: dict[str, Any] = {"name": label}
        rows.append(row)
        try:
            with wrap(pipe):
                seconds, peak, last = measured(call, n, rounds, device)
            error = float((last - reference).norm() / reference.norm())
            row |= {"seconds": seconds, "faster": full / seconds, "GiB": peak, "error": error}
        except Exception as error:  # a peer that does not run here is a result
            row["failed"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        print(name, row, flush=True)
    parameters = sum(p.numel() for p in pipe.transformer.parameters())
    return {"model": name, "parameters": parameters, "steps": steps, "dtype": str(dtype), "rows": rows}


def page(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [f"# Quantisation and caches on {result['device']}\n", f"torch {torch.__version__}; random weights.\n"]
    for found in result["models"]:
        size = f"{found['parameters'] / 1e6:.0f} M parameters, {found['steps']} steps, {found['dtype']}"
        lines += [
            f"## {found['model']}: {size}\n",
            "| | seconds | times faster | peak GiB | error |",
            "|---|---|---|---|---|",
        ]
        for row in found["rows"]:
            if "failed" in row:
                lines.append(f"| {row['name']} | | | | does not run: {row['failed']} |")
            else:
                told = f"{row['seconds']:.3f} | {row['faster']:.2f} | {row['GiB']:.1f} | {row['error']:.4f}"
                lines.append(f"| {row['name']} | {told} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["dit", "flux"], choices=["dit", "flux"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="small models on any device, to see that it runs")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        raise SystemExit("no CUDA GPU here; --tiny runs small models on the CPU")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    diffusers.utils.logging.set_verbosity_error()
    name = torch.cuda.get_device_name() if device == "cuda" else "the CPU (small models, no result)"
    result = {"device": name, "models": [model(m, device, args.tiny, args.rounds) for m in args.models]}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quant_cache_gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "quant_cache_gpu.md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
