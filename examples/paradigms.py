"""Several steps of one image in one batch (ParaDiGMS): fewer, larger batches, and the same image to within a tolerance.

python examples/paradigms.py                                  # the embedded pipeline, nothing to download
python examples/paradigms.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a red fox" --window 16
"""

import argparse

import torch
from diffusers import DiffusionPipeline

import diffaccel as da
from diffaccel import models

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny-sd", help="an embedded model, a hub id, or a folder")
parser.add_argument("--prompt", default="a photo of a red coat on a white background")
parser.add_argument("--sampler", default="ddim")
parser.add_argument("--calls", type=int, default=50, help="rows: below 40 or so there is little to gain")
parser.add_argument("--window", type=int, default=16, help="rows in a batch")
parser.add_argument("--tol", type=float, default=0.1)
parser.add_argument("--out", default="paradigms.png")
args = parser.parse_args()

pipe = models.load(args.model) if args.model in models.names() else DiffusionPipeline.from_pretrained(args.model)
pipe.scheduler = da.TableScheduler.from_config(pipe.scheduler.config, sampler=args.sampler)
call = {"num_inference_steps": args.calls, "output_type": "latent"} | models.CALL_DEFAULTS.get(args.model, {})


def generator():
    return torch.Generator("cpu").manual_seed(0)


plain = pipe(args.prompt, generator=generator(), **call).images
with da.paradigms(pipe, window=args.window, tol=args.tol) as h:
    latents = h(args.prompt, generator=generator(), **call).images
    print(h.report())
    h(args.prompt, generator=generator(), **call | {"output_type": "pil"}).images[0].save(args.out)
error = (latents - plain).norm() / plain.norm()
print(f"relative distance to the sequential run: {float(error):.4f}; wrote {args.out}")
