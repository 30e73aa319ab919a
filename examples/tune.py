"""Find the best way to run a checkpoint at N model calls, and run the pipeline with it.

python examples/tune.py                                            # the embedded pipeline: a minute or two on one core
python examples/tune.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts prompts.txt --size 512
"""

import argparse

import torch
from diffusers import DiffusionPipeline

import diffaccel as da
from diffaccel import models
from diffaccel.prompts import read_prompts

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny-sd", help="an embedded model, a hub id, or a folder")
parser.add_argument("--prompts", help="a file; 96 prompts like the ones that you will use")
parser.add_argument("--calls", type=int, default=8)
parser.add_argument("--guidance", type=float, default=4.0)
parser.add_argument("--size", type=int, default=32)
parser.add_argument("--images", type=int, default=32, help="that choose, and as many others that judge")
parser.add_argument("--out", default="recipe.json")
args = parser.parse_args()

torch.set_num_threads(1)
embedded = args.model in models.names()
pipe = models.load(args.model) if embedded else DiffusionPipeline.from_pretrained(args.model)
pipe.set_progress_bar_config(disable=True)
prompts = read_prompts(args.prompts) if args.prompts else models.prompts(96)
call = {"height": args.size, "width": args.size, **models.CALL_DEFAULTS.get(args.model, {})}

# A table fitted to the checkpoint competes: the one that ships with an embedded model, else one that is fitted now.
tables = [models.fitted(args.model)] if embedded else []

recipe = da.tune(
    pipe, prompts, args.calls, images=args.images, holdout=args.images, tables=tables, fit=not tables,
    guidance=args.guidance, out=args.out, **call,
)  # fmt: skip
print(recipe.receipt)

with da.accelerate(pipe, args.out) as h:
    generator = torch.Generator("cpu").manual_seed(1234)
    h(prompts[0], guidance_scale=args.guidance, generator=generator, **call).images[0].save("tuned.png")
    print(h.report())
print(f"wrote {args.out} and tuned.png")
