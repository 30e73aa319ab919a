"""A run that changes resolution: full, half, full, in one call of the stock pipeline, beside a plain run of equal work.

python examples/bottleneck.py                                  # the embedded pipeline, nothing to download
python examples/bottleneck.py --model black-forest-labs/FLUX.1-dev --prompt "a red fox" --size 1024
"""

import argparse
import time

import torch
from diffusers import DiffusionPipeline

import diffaccel as da
from diffaccel import models

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny-sd", help="an embedded model, a hub id, or a folder")
parser.add_argument("--prompt", default="a photo of a red coat on a white background")
parser.add_argument("--stages", default="spectral-hlh", help="a preset; in your own code also a list of da.Stage")
parser.add_argument("--size", type=int, default=64)
parser.add_argument("--out", default="bottleneck.png")
args = parser.parse_args()

pipe = models.load(args.model) if args.model in models.names() else DiffusionPipeline.from_pretrained(args.model)
call = {"height": args.size, "width": args.size} | models.CALL_DEFAULTS.get(args.model, {})


def timed(run, **more):
    start = time.perf_counter()
    image = run(args.prompt, generator=torch.Generator("cpu").manual_seed(0), **call, **more).images[0]
    return image, time.perf_counter() - start


with da.bottleneck(pipe, args.stages, on_small="warn") as h:
    image, seconds = timed(h)
    report = h.report()
image.save(args.out)
pipe.scheduler = da.TableScheduler.from_config(pipe.scheduler.config)
_, plain = timed(pipe, num_inference_steps=report.plain_calls)
print(report)
print(f"staged: {seconds:.2f} s; plain, {report.plain_calls} calls: {plain:.2f} s; wrote {args.out}")
