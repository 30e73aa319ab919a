"""Samplers on arrays, without diffusers: tables, and errors on a problem whose exact answer is known.

python examples/without_diffusers.py
"""

import argparse

import numpy as np

import diffaccel as da
from diffaccel.testing.problems import four_modes

parser = argparse.ArgumentParser()
parser.add_argument("--calls", type=int, nargs="+", default=[8, 16, 32])
args = parser.parse_args()

problem, path = four_modes(), da.Path.edm()  # a mixture of four Gaussians: the exact model and its flow are known
for calls in args.calls:
    nodes = da.nodes(path, calls=calls, grid="karras", final="sigma_min")
    x = np.random.default_rng(0).standard_normal((24, 2)) * nodes[0].sigma
    exact = problem.flow(x, nodes[0], nodes[-1])
    for name, options in (("ddim", {}), ("dpmpp", {"order": 2}), ("unipc", {"order": 3})):
        found = da.sample(problem.denoise, x, name, nodes=nodes, **options)
        print(f"{calls} calls, {name}: root mean square error {np.sqrt(np.mean((found - exact) ** 2)):.2e}")
print(da.trace("dpmpp", da.nodes(path, calls=args.calls[0], grid="karras"), order=2).describe())
