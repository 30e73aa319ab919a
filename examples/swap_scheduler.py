"""Swap the scheduler of any diffusers pipeline, at a fixed number of model calls.

python examples/swap_scheduler.py                                  # the embedded pipeline, nothing to download
python examples/swap_scheduler.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a red fox"
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from diffaccel import models
from diffaccel.schedulers import TableScheduler

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny-sd", help="an embedded model, a hub id, or a folder")
parser.add_argument("--prompt", default="a photo of a red coat on a white background")
parser.add_argument("--sampler", default="unipc")
parser.add_argument("--order", type=int, help="for samplers that have one (default: theirs)")
parser.add_argument("--grid", default=None, help="None: what the checkpoint's config states, else the path's own")
parser.add_argument("--calls", type=int, default=8)
parser.add_argument("--out", default="swapped.png")
args = parser.parse_args()

pipe = models.load(args.model) if args.model in models.names() else DiffusionPipeline.from_pretrained(args.model)
before = type(pipe.scheduler).__name__
given = {name: value for name in ("order", "grid") if (value := getattr(args, name)) is not None}
pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler=args.sampler, **given)
generator = torch.Generator("cpu").manual_seed(0)
image = pipe(args.prompt, num_inference_steps=args.calls, generator=generator).images[0]
image.save(args.out)
print(pipe.scheduler.explain())
print(f"{before} -> {type(pipe.scheduler).__name__}; {args.calls} model calls; wrote {args.out}")
