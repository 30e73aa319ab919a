"""An image is the same alone and in a batch, whatever its mates are; under the first-block cache of diffusers not."""

from __future__ import annotations

import cached_runs as runs
import pytest
import torch
from diffusers import FirstBlockCacheConfig

from diffaccel.denoiser.cache import Cache
from diffaccel.denoiser.cache_attach import cached
from diffaccel.testing.pipelines import denoiser

each_case = pytest.mark.parametrize("case", list(runs.BATCHES))
CLOSE = 1e-5
# The random UNet without text amplifies rounding: its images differ by up to 2e-5 without any cache.
LOOSE = {"ddpm": 6e-5}


def gaps(pipe, case, together, settings) -> tuple[list[float], list]:
    """Of each image, alone against in the batch; and the reports of the runs alone."""
    found, reports = [], []
    for k in range(3):
        with cached(pipe, settings) as handle:
            found.append(runs.gap(runs.batch(pipe, case, (k,)), together[k : k + 1]))
            reports.append(handle.report())
    return found, reports


def mixed(pipe, case, **how) -> tuple[Cache, torch.Tensor, object]:
    """A threshold at which the images of a batch decide differently, and the run."""
    with cached(pipe, Cache.first_block(0.99, **how)) as handle:
        runs.batch(pipe, case, (0, 1, 2))
        least, low, middle, high, _ = handle.report().quantiles
    for threshold in (1.5 * middle, middle, 1.2 * high, low, 2 * least):
        settings = Cache.first_block(min(threshold, 0.99), **how)
        with cached(pipe, settings) as handle:
            together = runs.batch(pipe, case, (0, 1, 2))
            report = handle.report()
        if report.forwards["mixed"] >= 3:
            return settings, together, report
    raise AssertionError(f"no threshold of {case} gives mixed decisions: the test would prove nothing")


@each_case
@pytest.mark.parametrize("settings", [Cache.every(3), Cache.mask([1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1], forecast=0)],
                         ids=["every", "mask"])  # fmt: skip
def test_policies_known_before_the_run(case, settings):
    pipe = runs.made(case)
    plain = runs.batch(pipe, case, (0, 1, 2))
    with cached(pipe, settings):
        together = runs.batch(pipe, case, (0, 1, 2))
    assert runs.gap(together, plain) > 1e-4  # something was reused
    found, _ = gaps(pipe, case, together, settings)
    assert max(found) <= LOOSE.get(case, CLOSE)


@each_case
@pytest.mark.parametrize("cfg", ["joint", "separate"])
def test_rows_that_decide_by_themselves(case, cfg):
    pipe = runs.made(case)
    if (case, cfg) == ("sd3", "joint"):
        cfg = "separate"  # its images agree in all joint decisions
    settings, together, report = mixed(pipe, case, cfg=cfg, accumulate=cfg == "joint")
    found, alone = gaps(pipe, case, together, settings)
    assert max(found) <= LOOSE.get(case, CLOSE)
    assert report.forwards["mixed"] >= 3
    for k in range(3):  # the decisions themselves are those of the image alone
        for branch, rows in alone[k].decisions.items():
            assert rows == report.decisions[branch][k::3]


@pytest.mark.parametrize("case", ["flux", "sd15"])
def test_rows_decide_with_sublayers_too(case):
    pipe = runs.made(case)
    settings, together, _ = mixed(pipe, case, level="sublayer")
    found, _ = gaps(pipe, case, together, settings)
    assert max(found) <= CLOSE


@pytest.mark.parametrize("case", ["flux", "qwen"])
def test_the_first_block_cache_of_diffusers_fails_this_test(case):
    pipe = runs.made(case)
    model = denoiser(pipe)

    def run(images):
        model.enable_cache(FirstBlockCacheConfig(threshold=0.3))
        try:
            return runs.batch(pipe, case, images)
        finally:
            model.disable_cache()

    together = run((0, 1, 2))
    found = [runs.gap(run((k,)), together[k : k + 1]) for k in range(3)]
    assert max(found) > 10 * CLOSE


@pytest.mark.parametrize("case", ["sd3", "dit", "sd15"])
def test_both_guidance_branches_of_an_image_decide_together(case):
    pipe = runs.made(case)
    threshold = {"sd3": 0.3, "dit": 0.2, "sd15": 0.35}[case]
    with cached(pipe, Cache.first_block(threshold)) as handle:
        runs.batch(pipe, case, (0, 1, 2))
        joint = handle.report().decisions["0"]
    assert len(joint) == 6 and joint[:3] == joint[3:]
    with cached(pipe, Cache.first_block(threshold / 1.5, cfg="separate")) as handle:
        runs.batch(pipe, case, (0, 1, 2))
        rows = handle.report().decisions["0"]
    assert case == "sd15" or rows[:3] != rows[3:]


@pytest.mark.parametrize("case", ["flux-cfg", "qwen", "wan"])
def test_branches_that_are_called_in_turn_follow_the_first(case):
    pipe = runs.made(case)
    threshold = {"flux-cfg": 0.45, "qwen": 0.5, "wan": 0.12}[case]
    with cached(pipe, Cache.first_block(threshold)) as handle:
        runs.batch(pipe, case, (0, 1, 2))
        found = handle.report().decisions
    assert found["cond"] == found["uncond"]
    assert any("." in row for row in found["cond"])
