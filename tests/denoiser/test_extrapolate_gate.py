"""The adaptive gate of `extrapolate` on unmodified pipelines: its rules, and images that do not know their batch."""

from __future__ import annotations

import itertools

import hooked_runs as runs
import pytest
import torch

import diffaccel as da
from diffaccel.denoiser.extrapolation_hook import ExtrapolationHook
from diffaccel.testing.pipelines import call_kwargs, denoiser

each_case = pytest.mark.parametrize("case", list(runs.CASES))


def gap(a, b):
    return float((a - b).abs().max() / (1 + b.abs().max()))


# ---------------------------------------------------------------------- the adaptive gate
@pytest.mark.parametrize("case", ["sd15", "flux-cfg", "wan"])
def test_adaptive_runs_obey_their_rules(case):
    pipe = runs.made(case)
    with da.extrapolate(pipe, "adaptive", tol=1e9, anchor=3, max_consecutive=2) as handle:
        runs.run(pipe, case)
    # protected 0 1 12 13; 2 has too little history; 5 8 11: two skips before, or an anchor
    assert handle.report().skipped == [[3, 4, 6, 7, 9, 10]]
    with da.extrapolate(pipe, "adaptive", tol=1e-9) as handle:
        runs.run(pipe, case)
    assert handle.report().skipped == [[]]
    assert handle.report().refusals == {"protected": 4, "history": 1, "anchor": 2, "tolerance": 7}


def pairs_skip_together(case="wan", tol=0.02):
    pipe = runs.made(case)
    model = denoiser(pipe)
    found = []
    with runs.counted(model) as seen, da.extrapolate(pipe, "adaptive", tol=tol, anchor=0) as handle:
        runs.run(pipe, case, callback_on_step_end=lambda p, i, t, k: found.append(len(seen)) or {}, guidance_scale=9.0)
    assert any(handle.report().saved) and handle.report().refusals["tolerance"]
    assert all(b - a in (0, 2) for a, b in itertools.pairwise([0, *found]))


def batch(case, count, tol, only=None, **options):
    """Images and decisions of a batch of `count` (or of one of it), each with noise of its own."""
    pipe = runs.made(case)
    chosen = range(count) if only is None else [only]
    generators = [torch.Generator().manual_seed(50 + i) for i in chosen]
    prompts = [["a red fox", "two black cats on a mat", "snow", "the sea at night"][i % 4] for i in chosen]
    changes = {"prompt": prompts, "generator": generators}
    if "negative_prompt" in call_kwargs(runs.CASES[case][0]) or case == "flux-cfg":
        changes["negative_prompt"] = ["" for _ in chosen]
    with runs.counted(denoiser(pipe)) as seen, da.extrapolate(pipe, "adaptive", tol=tol, anchor=0, **options) as handle:
        images = runs.run(pipe, case, **changes)
    return images, handle.report(), sum(seen.rows)


# tolerances at which the images of these batches differ in their decisions
BATCHES = {"sd15": 0.002, "sdxl": 0.002, "sd3": 0.01, "flux-cfg": 0.05, "qwen": 0.01, "wan": 0.05}


@pytest.mark.parametrize("case", list(BATCHES))
def test_an_image_does_not_depend_on_its_batch(case):
    together, report, rows = batch(case, 4, BATCHES[case])
    assert len({tuple(steps) for steps in report.skipped}) > 1  # else this test would show nothing
    assert rows == 2 * sum(report.calls)  # both guidance branches, of the images that need it and no others
    for i in range(4):
        alone, own, _ = batch(case, 4, BATCHES[case], only=i)
        assert own.skipped == [report.skipped[i]]
        assert gap(together[i : i + 1], alone) < 1e-5


def test_the_batch_gate_depends_on_batch_mates():
    together, report, _ = batch("sd15", 4, BATCHES["sd15"], gate="batch")
    alone = [batch("sd15", 4, BATCHES["sd15"], only=i, gate="batch") for i in range(4)]
    assert len(report.skipped) == 1
    assert any(own.skipped != report.skipped for _, own, _ in alone)
    assert max(gap(together[i : i + 1], image) for i, (image, _, _) in enumerate(alone)) > 1e-5


def test_pairs_skip_together():
    for tol in (0.1, 0.05, 0.02, 0.01):
        pairs_skip_together(tol=tol)


def test_a_decision_for_each_branch_is_noticed(monkeypatch):
    """Mutation: each branch decides from its own history; the tests above must turn red."""
    true = ExtrapolationHook._understood

    def alone(self, args, kwargs):
        call = true(self, args, kwargs)
        call.opens = True
        call.run.previous = (call.branch,) if call.step > call.run.first else ()
        return call

    monkeypatch.setattr(ExtrapolationHook, "_understood", alone)
    with pytest.raises(AssertionError):
        test_pairs_skip_together()
