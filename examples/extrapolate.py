"""Predict some of the model's answers instead of computing them: with a hook on any pipeline, and without one.

python examples/extrapolate.py                                     # the embedded pipeline, nothing to download
python examples/extrapolate.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --skip adaptive --steps 30
"""

import argparse

import torch
from diffusers import DiffusionPipeline

import diffaccel as da
from diffaccel import models
from diffaccel.schedulers import FSamplerScheduler

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny-flow", help="an embedded model, a hub id, or a folder")
parser.add_argument("--prompt", default="a photo of a red coat on a white background")
parser.add_argument("--skip", default="h2/s2", help='"h2/s3", explicit steps "h3, 5, 9", or "adaptive"')
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", default="extrapolated.png")
args = parser.parse_args()

pipe = models.load(args.model) if args.model in models.names() else DiffusionPipeline.from_pretrained(args.model)


def run(steps: int):
    generator = torch.Generator("cpu").manual_seed(0)
    return pipe(args.prompt, num_inference_steps=steps, generator=generator).images[0]


# Any scheduler that makes one call a step; here FlowMatchEuler or Euler in place of the pipeline's own.
if "Flow" not in type(pipe.scheduler).__name__:
    from diffusers import EulerDiscreteScheduler

    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
with da.extrapolate(pipe, args.skip) as handle:
    run(args.steps).save(args.out)
print(handle.report())

# Patterns that are known before the run need no hook: this scheduler counts model calls, not steps.
if args.skip != "adaptive":
    pipe.scheduler = FSamplerScheduler.from_config(pipe.scheduler.config, skip=args.skip)
    calls = handle.report().calls[0]
    run(calls)
    print(f"FSamplerScheduler: {calls} model calls on {pipe.scheduler.nodes} nodes")
print(f"wrote {args.out}")
