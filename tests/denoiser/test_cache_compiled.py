"""Caches and compiled code, and the way in for calibration."""

from __future__ import annotations

import hooked_runs as runs
import pytest
import torch
from cached_runs import gap
from torch._dynamo.utils import counters

import diffaccel as da
from diffaccel.denoiser.cache import Cache
from diffaccel.denoiser.cache_attach import attach_cache, cached
from diffaccel.errors import OptionError
from diffaccel.testing.pipelines import denoiser


# ---------------------------------------------------------------------- compiled code
@pytest.mark.parametrize("case", ["flux", "sd15"])
@pytest.mark.parametrize("settings", [Cache.every(3), Cache.first_block(0.35)], ids=["every", "first_block"])
def test_decisions_break_no_graph(case, settings):
    pipe = runs.made(case)
    torch._dynamo.reset()
    counters.clear()
    with cached(pipe, settings) as handle:
        eager = runs.run(pipe, case, 10)
        handle.compile(backend="eager", fullgraph=True)
        compiled = runs.run(pipe, case, 10)
        assert handle.report().forwards["reused"] > 0
    assert torch.equal(eager, compiled)
    assert not counters["graph_break"]
    parts = 2 if case == "flux" else 3 + (settings.kind == "first_block")
    assert counters["stats"]["unique_graphs"] == parts  # once each: no step and no decision is compiled in
    assert runs.clean(denoiser(pipe))
    torch._dynamo.reset()


def test_quantised_blocks_compile_without_breaks_and_their_scales_are_seen():
    pipe = runs.made("flux")
    torch._dynamo.reset()
    counters.clear()
    with da.quant_cache(pipe, cache=Cache.every(3), quant=da.Quant("w8a8", min_features=16)) as h:
        eager = runs.run(pipe, "flux", 10)
        scale = h.report().scales["transformer"]
        h.compile(backend="eager", fullgraph=True)
        assert gap(runs.run(pipe, "flux", 10), eager) < 1e-5
        assert h.report().scales["transformer"] == (pytest.approx(scale[0]), scale[1])
        runs.run(pipe, "flux", 10, guidance_scale=30.0)
        assert h.report().scales["transformer"][0] != pytest.approx(scale[0])  # compiled code goes on seeing them
    assert not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize("level", ["stack", "sublayer"])
def test_blocks_compiled_by_others_are_refused(level):
    pipe, settings = runs.made("flux"), Cache.every(3, level=level)
    with cached(pipe, settings):
        pipe.transformer.compile_repeated_blocks(backend="eager")
        with pytest.raises(OptionError, match=r"transformer_blocks.0 is compiled.* the handle's compile\(\)"):
            runs.run(pipe, "flux", 10)
    with pytest.raises(OptionError, match=r"transformer_blocks.0 is compiled"):
        attach_cache(pipe, settings)
    pipe = runs.made("flux")
    pipe.transformer.compile(backend="eager")
    with pytest.raises(OptionError, match="the denoiser is compiled"):
        attach_cache(pipe, settings)
    pipe = runs.made("flux")
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(OptionError, match="compiled as a whole"):
        attach_cache(pipe, settings)


def test_compiled_layers_inside_of_a_part_stay_compiled():
    pipe = runs.made("sd15")
    with cached(pipe, Cache.every(3)):
        expected = runs.run(pipe, "sd15", 10)
    pipe.unet.compile_repeated_blocks(backend="eager")
    with cached(pipe, Cache.every(3)):
        assert torch.equal(runs.run(pipe, "sd15", 10), expected)
    torch._dynamo.reset()


# ---------------------------------------------------------------------- calibration's way in
@pytest.mark.parametrize("case", ["flux-cfg", "sd3", "sd15"])
@pytest.mark.parametrize("level", [None, "sublayer"])
def test_forcing_the_true_values_gives_the_true_output(case, level):
    pipe = runs.made(case)
    before = runs.run(pipe, case, 4)
    seen = []

    def drive(probe):
        output, values = probe.full()
        forced = probe.forced(values)
        moved = probe.forced([value + torch.randn_like(value) for value in values])
        a, b, c = (v[0] if isinstance(v, tuple) else v for v in (output, forced, moved))
        seen.append((probe.step, probe.branch, gap(a, b), gap(a, c)))
        return output

    with cached(pipe, Cache.every(3, level=level), drive):
        assert torch.equal(runs.run(pipe, case, 4), before)
    assert len(seen) == 4 * runs.CASES[case][3]
    assert max(same for *_, same, _ in seen) < 1e-6 < min(other for *_, other in seen)
