"""Search a solver for a checkpoint, align what the model is fed with it, and run the pipeline with the result.

python examples/search_scheduler.py                              # the embedded pipeline: some minutes on one core
python examples/search_scheduler.py --ays                        # also a grid for stochastic samplers
python examples/search_scheduler.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts prompts.txt --size 512
"""

import argparse

import torch
from diffusers import DiffusionPipeline

from diffaccel import calibrate, models
from diffaccel.prompts import read_prompts
from diffaccel.schedulers import FittedScheduler, TableScheduler

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny-sd", help="an embedded model, a hub id, or a folder")
parser.add_argument("--prompts", help="a file; 48 prompts like the ones that you will use")
parser.add_argument("--calls", type=int, default=6)
parser.add_argument("--guidance", type=float, default=4.0)
parser.add_argument("--size", type=int, default=32)
parser.add_argument("--trials", type=int, default=12, help="changes that are tried on runs (search's default: 60)")
parser.add_argument("--ays", action="store_true", help="Align Your Steps, for a stochastic sampler")
parser.add_argument("--out", default="searched.safetensors")
args = parser.parse_args()

torch.set_num_threads(1)
embedded = args.model in models.names()
pipe = models.load(args.model) if embedded else DiffusionPipeline.from_pretrained(args.model)
pipe.set_progress_bar_config(disable=True)
config = pipe.scheduler.config
prompts = read_prompts(args.prompts) if args.prompts else models.prompts(24)
common = {"guidance": args.guidance, "height": args.size, "width": args.size}
common |= {"samples": 4, "holdout": 8, "teacher_steps": 40, "rivals": None} if embedded else {}
common |= models.CALL_DEFAULTS.get(args.model, {})

searched = calibrate.search(pipe, prompts, args.calls, trials=args.trials, **common)
print(searched.receipt)
aligned = calibrate.align(pipe, prompts, args.calls, base=searched, rounds=2, out=args.out, **common)
print(aligned.receipt)

pipe.scheduler = FittedScheduler.from_config(config, artifact=args.out, pipe=pipe)
call = {k: v for k, v in common.items() if k not in ("guidance", "samples", "holdout", "teacher_steps", "rivals")}
call |= {"num_inference_steps": args.calls, "guidance_scale": args.guidance}
pipe(prompts[0], generator=torch.Generator("cpu").manual_seed(1234), **call).images[0].save("searched.png")
print(pipe.scheduler.explain())

if args.ays:
    grid = calibrate.ays(pipe, prompts, args.calls, **common)
    print(grid.receipt)
    pipe.scheduler = TableScheduler.from_config(config, sampler="dpmpp_2m_sde", grid=grid, pipe=pipe)
    pipe(prompts[0], generator=torch.Generator("cpu").manual_seed(1234), **call).images[0].save("ays.png")
print(f"wrote {args.out} and searched.png")
