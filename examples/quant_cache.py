"""Reuse work inside the denoiser at some steps: what it costs, and what a plain run of the same cost gives.

python examples/quant_cache.py                                      # the embedded pipeline, nothing to download
python examples/quant_cache.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --quant w8a8 --steps 50
"""

import argparse

import torch
from diffusers import DiffusionPipeline

import diffaccel as da
from diffaccel import models

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny-flow", help="an embedded model, a hub id, or a folder")
parser.add_argument("--prompt", default="a photo of a red coat on a white background")
parser.add_argument("--steps", type=int, default=30)
parser.add_argument("--interval", type=int, default=3, help="full calls at every so many steps")
parser.add_argument("--forecast", type=int, default=1, help="order of the forecast; 0: reuse as it is")
parser.add_argument("--quant", default=None, help="w8a8 (float32 on a CPU, or CUDA), fp8 (CUDA); needs torchao")
parser.add_argument("--artifact", default=None, help="of `diffaccel calibrate cache`: variance compensation")
parser.add_argument("--out", default="cached.png")
args = parser.parse_args()

pipe = models.load(args.model) if args.model in models.names() else DiffusionPipeline.from_pretrained(args.model)
if type(pipe.scheduler).__name__ == "PNDMScheduler":  # it repeats timesteps, which hooks cannot follow
    from diffusers import DDIMScheduler

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)


def latents(steps: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    return pipe(args.prompt, num_inference_steps=steps, generator=generator, output_type="latent")[0]


full = latents(args.steps)
cache = da.Cache.every(args.interval, forecast=args.forecast)
with da.quant_cache(pipe, cache=cache, quant=args.quant, artifact=args.artifact) as handle:
    print(f"the cache will keep {handle.memory(args.prompt, num_inference_steps=args.steps) / 2**20:.1f} MiB")
    cached = latents(args.steps)
    print(handle.report())
    generator = torch.Generator("cpu").manual_seed(0)
    handle(args.prompt, num_inference_steps=args.steps, generator=generator).images[0].save(args.out)


def error(x: torch.Tensor) -> float:
    return float((x - full).square().mean().sqrt() / full.square().mean().sqrt())


full_calls = sum(cache.full_steps(args.steps))
print(f"root mean square error of the latents to {args.steps} full steps")
print(f"  cached, {full_calls} full calls: {error(cached):.4f}")
for calls in sorted({full_calls, min(args.steps, round(1.3 * full_calls))}):
    print(f"  plain, {calls} calls: {error(latents(calls)):.4f}")
print(f"wrote {args.out}")
