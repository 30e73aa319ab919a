"""Restart, epsilon scaling and Time-Shift on any diffusers pipeline, at the same number of model calls.

python examples/restart.py                                         # the embedded pipeline, nothing to download
python examples/restart.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a red fox" --calls 30
"""

import argparse

import torch
from diffusers import DiffusionPipeline

import diffaccel as da
from diffaccel import models

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny-sd", help="an embedded model, a hub id, or a folder")
parser.add_argument("--prompt", default="a photo of a red coat on a white background")
parser.add_argument("--calls", type=int, default=20)
parser.add_argument("--out", default="restart-{name}.png", help="with {name}")
args = parser.parse_args()

pipe = models.load(args.model) if args.model in models.names() else DiffusionPipeline.from_pretrained(args.model)
config = pipe.scheduler.config
schedulers = {
    "plain": da.TableScheduler.from_config(config, sampler="dpmpp"),
    "restart": da.TableScheduler.from_config(config, sampler="dpmpp", rewrite=[da.restart([(3, 1, 0.5, 3.0)])]),
    "scaled": da.EpsilonScalingScheduler.from_config(config, sampler="ddim", at_end=1.005, below=10.0),
}
if schedulers["plain"].config.path == "vp":  # windows in training steps are for such models
    schedulers["shifted"] = da.TimeShiftScheduler.from_config(config, window=40, cutoff=300)
for name, scheduler in schedulers.items():
    pipe.scheduler = scheduler
    generator = torch.Generator("cpu").manual_seed(0)
    image = pipe(args.prompt, num_inference_steps=args.calls, generator=generator).images[0]
    file = args.out.format(name=name)
    image.save(file)
    ups = sum(b.level > a.level for a, b in zip(scheduler.table.nodes, scheduler.table.nodes[1:], strict=False))
    print(f"{name}: {len(scheduler.timesteps)} model calls, {ups} jumps up in noise; wrote {file}")
    if scheduler.policy_report() is not None:
        print(scheduler.explain().splitlines()[-1])
