"""Gaussian teleportation: all model calls below a noise level, what is above it in closed form.

python examples/teleport.py                     # the embedded pipeline: calibrates on 32 images of one prompt first
"""

import argparse

import torch

import diffaccel as da
from diffaccel import calibrate, models

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="tiny-sd", help="an embedded model")
parser.add_argument("--calls", type=int, default=6)
parser.add_argument("--level", type=float, default=8.0, help="sigma/alpha where the model takes over")
parser.add_argument("--artifact", default="gauss.safetensors")
parser.add_argument("--out", default="teleported.png")
args = parser.parse_args()

pipe = models.load(args.model)
size = {"height": 32, "width": 32} | models.CALL_DEFAULTS.get(args.model, {})
prompt = models.prompts(1)
art = calibrate.gauss(pipe, prompt, images=32, calls=6, reference=20, held_out=8, call=size, out=args.artifact)
print(art.receipt)
with da.teleport(pipe, args.artifact, skip_to=args.level) as h:
    generator = torch.Generator("cpu").manual_seed(0)
    h(prompt, num_inference_steps=args.calls, generator=generator, **size).images[0].save(args.out)
    print(h.report(), "wrote", args.out)
