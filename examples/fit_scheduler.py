"""Fit a table to a checkpoint, save it, and run the pipeline with it.

python examples/fit_scheduler.py                                   # the embedded pipeline: a minute on one core
python examples/fit_scheduler.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts prompts.txt --size 512
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from diffaccel import calibrate, models
from diffaccel.prompts import read_prompts
from diffaccel.schedulers import FittedScheduler

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny-sd", help="an embedded model, a hub id, or a folder")
parser.add_argument("--prompts", help="a file; 48 prompts like the ones that you will use")
parser.add_argument("--calls", type=int, default=6)
parser.add_argument("--guidance", type=float, default=4.0)
parser.add_argument("--size", type=int, default=32)
parser.add_argument("--moves", type=int, default=4, help="how many changes of nodes are tried (fit's default: 16)")
parser.add_argument("--refine", type=int, default=1, help="rounds of refinement (fit's default: 3)")
parser.add_argument("--out", default="fitted.safetensors")
args = parser.parse_args()

torch.set_num_threads(1)
embedded = args.model in models.names()
pipe = models.load(args.model) if embedded else DiffusionPipeline.from_pretrained(args.model)
pipe.set_progress_bar_config(disable=True)
prompts = read_prompts(args.prompts) if args.prompts else models.prompts(24)
small = {"samples": 8, "holdout": 16, "teacher_steps": 40, "grids": ("dp2", "gits")} if embedded else {}
call = {"height": args.size, "width": args.size, **models.CALL_DEFAULTS.get(args.model, {})}

artifact = calibrate.fit(
    pipe,
    prompts,
    args.calls,
    guidance=args.guidance,
    moves=args.moves,
    refine=args.refine,
    out=args.out,
    **small,
    **call,
)
print(artifact.receipt)

pipe.scheduler = FittedScheduler.from_config(pipe.scheduler.config, artifact=args.out, pipe=pipe)
generator = torch.Generator("cpu").manual_seed(1234)
image = pipe(
    prompts[0], num_inference_steps=args.calls, guidance_scale=args.guidance, generator=generator, **call
).images[0]
image.save("fitted.png")
print(pipe.scheduler.explain())
print(f"wrote {args.out} and fitted.png")
