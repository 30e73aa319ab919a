"""Guidance branches in one batch and in calls of their own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from diffaccel.denoiser.cache import Cache
from diffaccel.denoiser.cache_attach import cached
from diffaccel.testing.pipelines import build

STEPS, GUIDANCE = 14, 7.5
LOW, HIGH = 0.2, 0.35  # thresholds


def loop(parts, batched: bool) -> torch.Tensor:
    """Two images with classifier-free guidance; the branches in one call a step, or in two."""
    model, scheduler, x = parts.transformer, parts.scheduler, parts.noise.clone()
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        if batched:
            texts, pools = (torch.cat(both) for both in zip(*parts.texts, strict=True))
            plain, told = model(torch.cat([x] * 2), texts, pools, t.expand(4)).sample.chunk(2)
        else:
            plain, told = (model(x, text, pool, t.expand(2)).sample for text, pool in parts.texts)
        x = scheduler.step(plain + GUIDANCE * (told - plain), t, x).prev_sample
    return x


@pytest.fixture(scope="module")
def parts():
    pipe = build("sd3")
    config, draw = pipe.transformer.config, torch.Generator().manual_seed(0)
    noise = torch.randn(2, config.in_channels, config.sample_size, config.sample_size, generator=draw)
    noise[1] *= 3
    text = torch.randn(2, 7, config.joint_attention_dim, generator=draw)
    pool = torch.randn(2, config.pooled_projection_dim, generator=draw)
    return SimpleNamespace(
        transformer=pipe.transformer,
        scheduler=pipe.scheduler,
        noise=noise,
        texts=((torch.zeros_like(text), torch.zeros_like(pool)), (5 * text, 5 * pool)),
        do_classifier_free_guidance=True,
    )


def run(parts, settings, batched):
    """The images, and the decisions by branch and image."""
    with torch.no_grad(), cached(parts, settings) as handle:
        found = loop(parts, batched)
        told = handle.report().decisions
    return found, (told["0"] if batched else told["0"] + told["1"])


def gap(a, b):
    return float((a - b).abs().max() / b.abs().max().clamp_min(1))


@pytest.mark.parametrize("settings", [Cache.every(3), Cache.mask([1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 0, 0, 1])],
                         ids=["every", "mask"])  # fmt: skip
def test_steps_known_before_are_those_of_both(parts, settings):
    together, rows = run(parts, settings, True)
    apart, same = run(parts, settings, False)
    assert rows == same and "." in rows[0]
    assert gap(apart, together) < 1e-5


@pytest.mark.parametrize("threshold", [LOW, HIGH])
def test_branches_that_decide_apart_do_the_same_either_way(parts, threshold):
    settings = Cache.first_block(threshold, cfg="separate")
    together, rows = run(parts, settings, True)
    apart, same = run(parts, settings, False)
    assert rows == same and rows[:2] != rows[2:]
    assert gap(apart, together) < 1e-5


@pytest.mark.parametrize("threshold", [LOW, HIGH])
def test_joint_branches_are_full_together(parts, threshold):
    settings = Cache.first_block(threshold)
    _, rows = run(parts, settings, True)
    _, follow = run(parts, settings, False)
    assert rows[:2] == rows[2:] and follow[:2] == follow[2:] and "." in rows[0]
    # one after the other they follow the first branch, which in this case is the one that asks more often
    assert rows == follow
    _, apart = run(parts, Cache.first_block(threshold, cfg="separate"), False)
    assert sum(r.count("F") for r in apart[:2]) > sum(r.count("F") for r in apart[2:])
