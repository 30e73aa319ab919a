"""Search DC-Solver's ratios on a checkpoint, then sample with them at the same number of model calls.

python examples/calibrate_dc.py                              # the embedded pipeline, nothing to download
python examples/calibrate_dc.py --model MODEL --prompts prompts.txt --guidance 7.5 --calls 8
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from diffaccel import calibrate, models
from diffaccel.prompts import read_prompts
from diffaccel.schedulers import DCSolverScheduler

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny-sd", help="an embedded model, a hub id, or a folder")
parser.add_argument("--prompts", help="a file of prompts; not needed for embedded models")
parser.add_argument("--guidance", type=float, default=4.0)
parser.add_argument("--calls", type=int, default=6)
parser.add_argument("--grid", default="linspace")
parser.add_argument("--pairs", type=int, default=8, help="images that the ratios are searched on")
parser.add_argument("--held-out", type=int, default=16, help="images that they are validated on")
parser.add_argument("--artifact", default="dc.safetensors")
parser.add_argument("--out", default="compensated.png")
args = parser.parse_args()

embedded = args.model in models.names()
if embedded:
    torch.set_num_threads(1)  # so small that further threads cost more than they give
pipe = models.load(args.model) if embedded else DiffusionPipeline.from_pretrained(args.model)
prompts = models.prompts(args.pairs + args.held_out) if embedded else read_prompts(args.prompts)
call = models.CALL_DEFAULTS.get(args.model, {})

made = calibrate.dc(
    pipe,
    prompts,
    calls=[args.calls],
    guidance=args.guidance,
    grid=args.grid,
    pairs=args.pairs,
    held_out=args.held_out,
    teacher_calls=50,
    call=call,
    out=args.artifact,
)
print(made.receipt)

pipe.scheduler = DCSolverScheduler.from_config(pipe.scheduler.config, artifact=args.artifact, pipe=pipe)
generator = torch.Generator("cpu").manual_seed(0)
options = {"num_inference_steps": args.calls, "guidance_scale": args.guidance, "generator": generator, **call}
pipe(prompts[0], **options).images[0].save(args.out)
print(f"{args.calls} model calls; wrote {args.artifact} and {args.out}")
