"""Is my scheduler worth it? Quality against model calls on the same seeds, beside diffusers' own schedulers.

python examples/sweep.py                                                  # tiny-sd, nothing to download
torchrun --nproc-per-node 4 examples/sweep.py --images 2000               # the same report, sooner
"""

import argparse

from diffaccel import models
from diffaccel.eval import sweep
from diffaccel.parallel.world import open_world
from diffaccel.schedulers import TableScheduler

parser = argparse.ArgumentParser()
parser.add_argument("--images", type=int, default=32)
parser.add_argument("--calls", type=int, nargs="+", default=[5, 8])
parser.add_argument("--out", default="report")
args = parser.parse_args()

with open_world(cpu=True) as world:
    pipe = models.load("tiny-sd")  # any diffusers pipeline
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    report = sweep(
        pipe,
        schedulers={"deis": TableScheduler.from_config(config, sampler="deis", grid="karras")},
        calls=args.calls,
        prompts=models.prompts(args.images),
        reference="tiny-fashion",  # a folder of real images, or a file of statistics
        out=args.out,
        images=args.images,
        options={"guidance_scale": 4.0},
        clip="tiny-clip",
        teacher_images=args.images // 2,
        name="tiny-sd",
        world=world,
    )
    if world.rank == 0:
        print(report)
