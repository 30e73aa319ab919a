"""Static int8 ranges (what TAP chooses states for) beside the ranges of each token that `quant=` uses.

    python benchmarks/bench_quant_ranges.py --out docs/results [--images 48] [--count 256] [--seeds 3]

Static: one range a layer for all tokens, seen on `count` recorded states (input, time, condition) of a run with a
cache, by torchao's static int8. States are chosen in four ways. Errors on embedded models: of the output at states of
other images, and of the last latents of whole runs, both relative to float. Time: a DiT of real width, single calls
interleaved with float.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torchao
from quant_cache_peers import twin
from quant_cache_wide import beside, pipeline
from torchao import quantization as ao
from torchao.quantization.quant_primitives import MappingType

from diffaccel import models
from diffaccel.calibrate.tap import stratified, tap
from diffaccel.calibrate.validate import errors
from diffaccel.compare import job_for
from diffaccel.denoiser.cache import Cache
from diffaccel.denoiser.cache_attach import cached
from diffaccel.denoiser.quant import Quant, quantise

STEPS, GUIDANCE, BATCH = 20, 4.0, 16
NARROW = 64  # least inputs of a layer: the embedded models are narrow
Pool = list[dict[str, Any]]  # arguments of model calls, one row each


# ---------------------------------------------------------------------- states
def recorded(pipe: Any, name: str, images: int, seed: int, cache: Cache | None) -> tuple[Pool, np.ndarray]:
    """Rows that the model is asked in whole runs, and the step of each."""
    model = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    pool: Pool = []
    steps: list[int] = []
    calls = 0

    def see(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal calls
        given = dict(kwargs) | ({"sample": args[0], "timestep": args[1]} if args else {})
        rows = len(given["sample"] if "sample" in given else given["hidden_states"])
        for r in range(rows):
            pool.append({k: one_row(v, r, rows) for k, v in given.items() if v is not None})
            steps.append(calls % STEPS)
        calls += 1

    handle = model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        with contextlib.nullcontext() if cache is None else cached(pipe, cache):
            for start in range(0, images, BATCH):
                run(pipe, name, min(BATCH, images - start), seed + start)
    finally:
        handle.remove()
    return pool, np.array(steps)


def one_row(value: Any, row: int, rows: int) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value[row : row + 1].clone() if value.ndim and len(value) == rows else value.reshape(-1)[:1].clone()


def asked(model: Any, rows: Pool) -> torch.Tensor:
    """The model's outputs at recorded rows."""
    found = []
    for start in range(0, len(rows), 2 * BATCH):
        part = rows[start : start + 2 * BATCH]
        given = {k: torch.cat([r[k] for r in part]) if torch.is_tensor(v) else v for k, v in part[0].items()}
        given["return_dict"] = False
        with torch.no_grad():
            found.append(model(**given)[0])
    return torch.cat(found)


def run(pipe: Any, name: str, images: int, seed: int) -> np.ndarray:
    """Last latents."""
    job = job_for(pipe, name, images, seed, guidance=GUIDANCE)
    with torch.no_grad():
        z = pipe(**job.inputs, latents=job.latents.clone(), num_inference_steps=STEPS, output_type="latent").images
    return np.asarray(z.double().numpy())


# ---------------------------------------------------------------------- ranges
def ranges(model: Any, layers: list[str], rows: Pool) -> dict[str, tuple[float, float, int]]:
    """Smallest and largest input of each layer over some rows, and the input's dimensions."""
    found: dict[str, tuple[float, float, int]] = {}

    def see(name: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...]) -> None:
            low, high = (float(v) for v in torch.aminmax(args[0]))
            before = found.get(name, (low, high, 0))
            found[name] = (min(low, before[0]), max(high, before[1]), args[0].ndim)

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(see(name)) for name in layers]
    asked(model, rows)
    for handle in handles:
        handle.remove()
    return found


def make_static(model: Any, found: dict[str, tuple[float, float, int]], symmetric: bool) -> None:
    """Int8 weights a channel, and activations of one range a layer, in place."""
    for layer, (low, high, ndim) in found.items():
        shape = (1,) * ndim
        if symmetric:
            more: dict[str, Any] = {"act_quant_scale": torch.full(shape, max(-low, high) / 127.5)}
        else:
            low, high = min(low, 0.0), max(high, 0.0)
            scale = (high - low) / 255
            zero = torch.full(shape, int(np.clip(-128 - round(low / scale), -128, 127)), dtype=torch.int8)
            more = {"act_quant_scale": torch.full(shape, scale), "act_quant_zero_point": zero}
            more["act_mapping_type"] = MappingType.ASYMMETRIC
        config = ao.Int8StaticActivationInt8WeightConfig(granularity=[ao.PerTensor(), ao.PerRow()], **more)
        ao.quantize_(model, config, filter_fn=lambda _, name, layer=layer: name == layer)


def choices(pool: Pool, steps: np.ndarray, count: int, seed: int) -> dict[str, np.ndarray]:
    """Ways to choose states."""
    x = np.stack([(r["sample"] if "sample" in r else r["hidden_states"]).numpy().ravel() for r in pool])
    rng = np.random.default_rng(seed)
    return {
        "first (one end of the run)": np.argsort(steps, kind="stable")[:count],
        "uniform": rng.choice(len(pool), count, replace=False),
        "stratified over time": stratified(steps, count, seed),
        "TAP": tap(x, steps, count, seed=seed),
    }


# ---------------------------------------------------------------------- one model
@contextlib.contextmanager
def changed(pipe: Any, change: Callable[[Any], Any]) -> Iterator[Any]:
    """The pipeline with a copy of its denoiser, quantised by `change`."""
    with twin(pipe) as model:
        change(model)
        yield model


def embedded(name: str, images: int, count: int, seeds: int) -> dict[str, Any]:
    """Errors of each way."""
    pipe: Any = models.load(name)
    pipe.set_progress_bar_config(disable=True)
    own = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    settings = Quant("w8a8", min_features=NARROW)
    layers = quantise(copy.deepcopy(own), settings).layers
    pool, steps = recorded(pipe, name, images, 2000, Cache.every(3))
    held, held_steps = recorded(pipe, name, BATCH, 3000, None)
    held = [held[i] for i in stratified(held_steps, min(256, len(held)))]
    target, latents = asked(own, held), run(pipe, name, BATCH, 4000)

    def measured(change: Callable[[Any], Any]) -> dict[str, float]:
        with changed(pipe, change) as model:
            one = float((asked(model, held) - target).norm() / target.norm())
            return {"call": one, "run": float(errors(run(pipe, name, BATCH, 4000), latents).mean())}

    rows = [
        {
            "name": "a range for each token, at run time (`quant=`)",
            **spread([measured(lambda m: quantise(m, settings))]),
        }
    ]
    for symmetric in (False, True):
        found: dict[str, list[dict[str, float]]] = {}
        used: dict[str, int] = {}
        for seed in range(seeds):
            for way, chosen in choices(pool, steps, count, seed).items():
                if seed and way.startswith("first"):
                    continue
                seen = ranges(own, layers, [pool[i] for i in chosen])
                found.setdefault(way, []).append(measured(partial(make_static, found=seen, symmetric=symmetric)))
                used[way] = len(chosen)
                print(f"{name}: {'symmetric' if symmetric else 'asymmetric'}, {way}: {found[way][-1]}", flush=True)
        kind = "static, symmetric" if symmetric else "static, asymmetric"
        rows += [{"name": f"{kind}, {way}", "states": used[way], **spread(all_)} for way, all_ in found.items()]
    return {"model": name, "layers": len(layers), "pool": len(pool), "rows": rows}


def spread(found: list[dict[str, float]]) -> dict[str, Any]:
    """Means over seeds, and the smallest and largest."""
    made: dict[str, Any] = {"seeds": len(found)}
    for key in ("call", "run"):
        values = [f[key] for f in found]
        made |= {key: float(np.mean(values)), f"{key} from": min(values), f"{key} to": max(values)}
    return made


# ---------------------------------------------------------------------- time
def timed() -> list[dict[str, Any]]:
    """Single calls of a DiT of real width; both kinds of ranges, eager and with compiled blocks."""
    model = pipeline().transformer
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(5))
    given = {"timestep": torch.full((1,), 500), "class_labels": torch.arange(1)}
    layers = quantise(copy.deepcopy(model), "w8a8").layers
    seen = ranges(model, layers, [{"hidden_states": x, **given}])
    ways: dict[str, Callable[[Any], Any]] = {
        "a range for each token (`quant=`)": lambda m: quantise(m, "w8a8"),
        "static, symmetric": lambda m: make_static(m, seen, True),
        "static, asymmetric": lambda m: make_static(m, seen, False),
    }
    rows = []
    for compiled in (False, True):
        for name, change in ways.items():
            torch._dynamo.reset()
            variant = copy.deepcopy(model)
            change(variant)
            if compiled:
                for block in variant.transformer_blocks:
                    block.compile()
            found = beside(model, variant, lambda m: m(x, **given).sample)
            rows.append({"name": f"{name}{', compiled' if compiled else ''}", **found})
            print(rows[-1], flush=True)
    return rows


# ---------------------------------------------------------------------- page
INTRO = """# Static int8 ranges, and the states to take them from

Written by `benchmarks/bench_quant_ranges.py` (torch {torch}, torchao {torchao}). Static ranges are those of {count}
states of {images} images, recorded in runs of {steps} steps with `Cache.every(3)` at guidance {guidance:g}; errors are
relative to float: of one call, at states of 16 other images, and of the last latents of 16 whole runs. Brackets: least
and most over seeds of the choice.
"""


def markdown(result: dict[str, Any]) -> str:
    """All tables."""
    parts = [INTRO.format(**result["settings"])]
    for found in result["embedded"]:
        parts.append(
            f"\n## {found['model']}: {found['layers']} layers\n\n"
            "| ranges of activations | states | error of a call | error of a run |\n|---|---|---|---|"
        )
        parts += [
            f"| {r['name']} | {r.get('states', '')} | {cell(r, 'call')} | {cell(r, 'run')} |" for r in found["rows"]
        ]
    parts.append(
        "\n## Time: a DiT of width 1152, 256 tokens, random weights, one CPU thread\n\n"
        "| ranges of activations | times faster than float, eager | error of a call |\n|---|---|---|"
    )
    parts += [f"| {r['name']} | {r['faster']:.2f} | {r['error']:.4f} |" for r in result["time"]]
    return "\n".join(parts) + "\n"


def cell(row: dict[str, Any], key: str) -> str:
    text = f"{row[key]:.4f}"
    return text if row["seeds"] == 1 else f"{text} [{row[f'{key} from']:.4f}, {row[f'{key} to']:.4f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    settings = {"torch": torch.__version__, "torchao": torchao.__version__, "count": args.count, "images": args.images}
    result = {
        "settings": settings | {"steps": STEPS, "guidance": GUIDANCE},
        "embedded": [embedded(name, args.images, args.count, args.seeds) for name in ("tiny-sd", "tiny-flow")],
        "time": timed(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quant_ranges.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "quant_ranges.md").write_text(markdown(result))
    print(f"wrote {args.out / 'quant_ranges.md'}")


if __name__ == "__main__":
    main()
