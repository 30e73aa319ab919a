"""Gaussian teleportation around a real pipeline: where it starts, what it costs, what it refuses."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

import diffaccel as da
from diffaccel import TableScheduler
from diffaccel.artifact import Artifact, path_identity
from diffaccel.compare import counted
from diffaccel.core.gauss import GaussLaw
from diffaccel.errors import ArtifactError, OptionError, RunError
from diffaccel.identity import model_identity
from diffaccel.pipelines.teleport import late_nodes
from diffaccel.schedulers.from_config import path_of
from diffaccel.testing.pipelines import build, call_kwargs

KINDS = ["sd15", "sd3"]


def call(kind, **more):
    kept = {k: v for k, v in call_kwargs(kind).items() if k not in ("num_inference_steps", "generator", "latents")}
    return kept | {"output_type": "latent", "num_inference_steps": 5} | more


def shape_of(pipe, kind):
    return tuple(pipe(**call(kind, num_inference_steps=1)).images.shape[1:])


def made(pipe, kind, skip_to=4.0, path=None):
    """An artifact that says: a law of mean 0.5, two axes, and the rest."""
    shape = shape_of(pipe, kind)
    d = int(np.prod(shape))
    axes = np.linalg.qr(np.random.default_rng(0).standard_normal((d, 2)))[0].T
    ours = TableScheduler.from_config(pipe.scheduler.config)
    tensors = {"mean": np.full((1, *shape), 0.5), "axes": axes.reshape(2, *shape)}
    tensors |= {"variances": np.array([2.0, 1.0]), "rest": np.array([0.3])}
    meta = {
        "path": path_identity(path or path_of(ours.config), ours.config.prediction_type),
        "model": model_identity(pipe),
        "shape": list(shape),
        "options": {"skip_to": skip_to},
        "receipt": {"median relative error by level": {}},
    }
    return Artifact("gauss", tensors, meta)


@pytest.fixture(scope="module", params=KINDS)
def wrapped(request):
    pipe = build(request.param)
    pipe.set_progress_bar_config(disable=True)
    return request.param, pipe, made(pipe, request.param)


def test_the_first_call_sees_the_teleported_state(wrapped):
    kind, pipe, artifact = wrapped
    seen = []
    hook = da.teleport(pipe, artifact)
    shape = tuple(artifact.meta["shape"])
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(3))
    denoiser = getattr(pipe, "unet", None) or pipe.transformer

    def see(module, args, kwargs):
        x = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        seen.append(x[:1].clone())

    with hook as h:
        watch = denoiser.register_forward_pre_hook(see, with_kwargs=True)
        with counted(pipe) as count:
            h(**call(kind), latents=noise)
        watch.remove()
        law = GaussLaw(
            np.full(noise[0].numel(), 0.5),
            artifact.tensors["axes"].reshape(2, -1),
            artifact.tensors["variances"],
            float(artifact.tensors["rest"][0]),
        )
        path = path_of(pipe.scheduler.config)
        there = law.flow(noise.flatten(1).double(), path.first, path.at_level(4.0)).view_as(noise)
        torch.testing.assert_close(seen[0].double(), there, rtol=0, atol=1e-5)
        report = h.report()
        assert count.calls == report.calls == 5 and report.level == 4.0 and report.replaced >= 1
        nodes = pipe.scheduler.table.nodes
        assert nodes[0].level == pytest.approx(4.0) and len(nodes) == 6
        assert all(b.level < a.level for a, b in pairwise(nodes))


def test_the_pipeline_is_as_it_was_afterwards(wrapped):
    kind, pipe, artifact = wrapped
    given = {"generator": torch.Generator().manual_seed(1)}
    before = pipe(**call(kind, **given)).images
    scheduler = pipe.scheduler
    with da.teleport(pipe, artifact, skip_to=2.0) as h:
        a = h(**call(kind, generator=torch.Generator().manual_seed(1))).images
        b = h(**call(kind, generator=torch.Generator().manual_seed(1))).images
        assert torch.equal(a, b)
        with pytest.raises(RunError, match="call the handle"):
            pipe(**call(kind))
    assert pipe.scheduler is scheduler
    given["generator"].manual_seed(1)
    assert torch.equal(pipe(**call(kind, **given)).images, before)
    assert not torch.allclose(a, before, atol=1e-3)
    with pytest.raises(RunError, match="removed"):
        h(**call(kind))


def test_each_image_has_its_own_generator(wrapped):
    kind, pipe, artifact = wrapped
    with da.teleport(pipe, artifact) as h:
        prompts = call(kind)
        prompts["prompt"] = ["a", "b"]
        for k in ("prompt_embeds", "negative_prompt_embeds"):
            prompts.pop(k, None)
        both = h(**prompts, generator=[torch.Generator().manual_seed(i) for i in (4, 5)]).images
        one = h(**prompts | {"prompt": ["b"]}, generator=[torch.Generator().manual_seed(5)]).images
    torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-4)


def test_refusals(wrapped):
    kind, pipe, artifact = wrapped
    other = made(pipe, kind, skip_to=None)
    with pytest.raises(ArtifactError, match="advises no skip"):
        da.teleport(pipe, other)
    with pytest.raises(OptionError, match="skip_to must lie between"):
        da.teleport(pipe, artifact, skip_to=1e-9)
    with pytest.raises(ArtifactError, match="kind 'gauss'"):
        da.teleport(pipe, Artifact("dc", {}, {}))
    with pytest.raises(ArtifactError, match="another path"):
        da.teleport(pipe, made(pipe, kind, path=da.Path.edm()))
    with da.teleport(pipe, artifact) as h:
        with pytest.raises(ArtifactError, match="was calibrated for samples of shape"):
            h(**call(kind), latents=torch.zeros(1, 1, 2, 2))
        with pytest.raises(OptionError):
            da.teleport(pipe, artifact)


@pytest.mark.parametrize("grid", ["trailing", "karras", "linspace_open", "uniform_lambda"])
@pytest.mark.parametrize("intervals", [1, 2, 7, 30])
def test_late_nodes(grid, intervals):
    scheduler = TableScheduler(grid=grid)
    path = path_of(scheduler.config)
    for level in (9.0, 2.0, 0.5):
        nodes, above = late_nodes(path, level, intervals, scheduler.config)
        assert len(nodes) == intervals + 1 and nodes[-1].sigma == 0
        assert nodes[0].level == pytest.approx(level) and above >= 0
        assert all(b.level < a.level for a, b in pairwise(nodes))
