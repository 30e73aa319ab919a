"""Measure the statistics of DPM-Solver-v3 on a checkpoint, then sample with them.

python examples/calibrate_ems.py                             # the embedded pipeline, nothing to download
python examples/calibrate_ems.py --model MODEL --prompts prompts.txt --guidance 7.5 --calls 8 --images 256 --nodes 120
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from diffaccel import calibrate, models
from diffaccel.prompts import read_prompts
from diffaccel.schedulers import DPMSolverV3Scheduler

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny-sd", help="an embedded model, a hub id, or a folder")
parser.add_argument("--prompts", help="a file of prompts; not needed for embedded models")
parser.add_argument("--guidance", type=float, default=4.0)
parser.add_argument("--calls", type=int, default=8)
parser.add_argument("--images", type=int, default=32, help="trajectories that the statistics are taken over")
parser.add_argument("--nodes", type=int, default=30, help="levels at which they are taken")
parser.add_argument("--chosen-on", type=int, default=4, help="images that grid and solver are chosen on")
parser.add_argument("--held-out", type=int, default=16, help="images that they are validated on")
parser.add_argument("--artifact", default="ems.safetensors")
parser.add_argument("--out", default="v3.png")
args = parser.parse_args()

embedded = args.model in models.names()
pipe = models.load(args.model) if embedded else DiffusionPipeline.from_pretrained(args.model)
prompts = models.prompts(256) if embedded else read_prompts(args.prompts)
call = models.CALL_DEFAULTS.get(args.model, {})

made = calibrate.ems(
    pipe,
    prompts,
    guidance=args.guidance,
    calls=[args.calls],
    images=args.images,
    nodes=args.nodes,
    chosen_on=args.chosen_on,
    held_out=args.held_out,
    call=call,
    out=args.artifact,
)
print(made.receipt)

pipe.scheduler = DPMSolverV3Scheduler.from_config(pipe.scheduler.config, artifact=args.artifact, pipe=pipe)
generator = torch.Generator("cpu").manual_seed(0)
options = {"num_inference_steps": args.calls, "guidance_scale": args.guidance, "generator": generator, **call}
pipe(prompts[0], **options).images[0].save(args.out)
print(f"{args.calls} model calls; wrote {args.artifact} and {args.out}")
