"""A sampler of your own, and a function written for k-diffusion, as schedulers of a diffusers pipeline.

python examples/own_sampler.py                                  # the embedded pipeline, nothing to download
"""

import argparse
from itertools import pairwise

import torch
from diffusers import DiffusionPipeline

import diffaccel as da
from diffaccel import models
from diffaccel.core.node import decay

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny-sd", help="an embedded model, a hub id, or a folder")
parser.add_argument("--prompt", default="a photo of a red coat on a white background")
parser.add_argument("--calls", type=int, default=8)
parser.add_argument("--out", default="{name}.png")
args = parser.parse_args()


@da.sampler("heavy_ball", order=1, space="x0", paper="a heavy ball on DDIM")
def heavy_ball(x, nodes, predict, noise, *, beta=0.8):
    m = None
    for s, t in pairwise(nodes):
        d = predict(x, s)
        m = d if m is None else beta * d + (1 - beta) * m
        x = (t.sigma / s.sigma) * x + t.alpha * (1 - decay(s, t)) * m
    return x


def sample_euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones([x.shape[0]]))
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


pipe = models.load(args.model) if args.model in models.names() else DiffusionPipeline.from_pretrained(args.model)
config = pipe.scheduler.config
for name, sampler in (("heavy_ball", "heavy_ball"), ("k_diffusion", da.from_k_diffusion(sample_euler))):
    pipe.scheduler = da.TableScheduler.from_config(config, sampler=sampler)
    generator = torch.Generator("cpu").manual_seed(0)
    pipe(args.prompt, num_inference_steps=args.calls, generator=generator).images[0].save(args.out.format(name=name))
    print(f"{name}: {args.calls} model calls; wrote {args.out.format(name=name)}")
print(pipe.scheduler.explain())
