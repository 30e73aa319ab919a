"""Images for many prompts on all GPUs, with a pipeline of your own. The same images from any number of processes.

python examples/multi_gpu_generate.py                                          # one process, the embedded pipeline
torchrun --nproc-per-node 4 examples/multi_gpu_generate.py --model stable-diffusion-v1-5/stable-diffusion-v1-5
"""

import argparse

from diffaccel.component_configs import component_configs
from diffaccel.drive import fingerprint, plain_config
from diffaccel.painter import Painter, load
from diffaccel.parallel.generate import generate, tasks_for
from diffaccel.parallel.world import open_world
from diffaccel.schedulers import TableScheduler

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny-sd", help="an embedded model, a hub id, or a folder")
parser.add_argument("--images", type=int, default=16)
parser.add_argument("--calls", type=int, default=8)
parser.add_argument("--out", default="generated")
args = parser.parse_args()

with open_world() as world:
    pipe = load(args.model)  # any change to the pipeline goes here
    pipe.scheduler = TableScheduler.from_config(pipe.scheduler.config, sampler="unipc", order=3)
    # Everything that an image depends on: a folder that was begun with another recipe is refused.
    recipe = {"weights": fingerprint(pipe), "scheduler": plain_config(pipe.scheduler), "calls": args.calls}
    recipe |= {"configs": component_configs(pipe), "guidance": 4.0}
    paint = Painter(pipe.to(world.device), args.calls, {"guidance_scale": recipe["guidance"]}, on_call=world.check)
    prompts = ["a photo of a red coat on a white background", "a photo of a blue bag on a black background"]
    tasks = tasks_for(prompts, range(args.images))
    report = generate(paint, tasks, args.out, batch=8, recipe=recipe, world=world, progress=world.rank == 0)
    if world.rank == 0:
        print(f"{report.images} images in {args.out}, {report.made} made now by {report.processes} process(es)")
