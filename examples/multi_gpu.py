"""One image made by all GPUs together. Start it with one process a GPU; a single process just makes the image.

python examples/multi_gpu.py --model tiny-sd                                   # one process
torchrun --nproc-per-node 2 examples/multi_gpu.py --model tiny-sd --cpu        # two processes, without any GPU
torchrun --nproc-per-node 4 examples/multi_gpu.py --model stabilityai/stable-diffusion-xl-base-1.0 --size 1024
"""

import argparse

import torch
from diffusers import DiffusionPipeline

import diffaccel
from diffaccel import models
from diffaccel.parallel.world import open_world

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny-sd", help="an embedded model, a hub id, or a folder")
parser.add_argument("--mode", default="fresh_halo", choices=["sync", "fresh_halo", "displaced", "partial"])
parser.add_argument("--size", type=int, default=64)
parser.add_argument("--calls", type=int, default=20)
parser.add_argument("--prompt", default="a photo of a red coat on a white background")
parser.add_argument("--out", default="multi_gpu.png")
parser.add_argument("--cpu", action="store_true", help="stay on the CPU even where there are GPUs")
args = parser.parse_args()

with open_world(cpu=args.cpu) as world:
    if args.model in models.PIPELINES:
        pipe = models.load(args.model)
    else:
        pipe = DiffusionPipeline.from_pretrained(args.model, torch_dtype=torch.float16)
    pipe = pipe.to(world.device)
    pipe.set_progress_bar_config(disable=world.rank > 0)
    with diffaccel.patch_parallel(pipe, args.mode, world=world) as shared:
        image = shared(
            args.prompt,
            height=args.size,
            width=args.size,
            num_inference_steps=args.calls,
            generator=torch.Generator("cpu").manual_seed(0),  # the same on every rank
        ).images[0]
        if world.rank == 0:
            image.save(args.out)
            print(shared.explain(args.size, args.size))
            print(shared.report())
            print(f"{args.out}: {image.size[0]} x {image.size[1]}, made by {world.size} process(es)")
