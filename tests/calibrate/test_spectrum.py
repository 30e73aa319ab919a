"""The spectrum of latents: the fit finds a known law, refuses what has none, and reaches `bottleneck`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import diffaccel as da
from diffaccel import calibrate, models
from diffaccel.calibrate.spectrum import _planes, fit_spectrum, law_of
from diffaccel.core.stages import Spectrum, dct_matrix
from diffaccel.errors import ArtifactError, OptionError
from diffaccel.schedulers.resize import packed
from diffaccel.testing import pipelines as tiny


def field(law, size, n, seed=0):
    """Latents (n, 4, H, W) of a Gaussian field with this power."""
    z = np.random.default_rng(seed).standard_normal((n, 4, *size)) * np.sqrt(law.power(size))
    return dct_matrix(size[0]).T @ z @ dct_matrix(size[1])


@pytest.mark.parametrize("size", [(32, 32), (48, 40)])
def test_the_fit_finds_the_law(size):
    law = Spectrum(50.0, 1.9, *size)
    found = fit_spectrum(field(law, size, 200))
    assert found.beta == pytest.approx(1.9, abs=0.03) and found.r2 > 0.99
    np.testing.assert_allclose(found.at(np.arange(2, 16), size), law.at(np.arange(2, 16), size), rtol=0.05)


def test_noise_has_no_law():
    found = fit_spectrum(np.random.default_rng(0).standard_normal((64, 4, 32, 32)))
    assert found.r2 < 0.9
    with pytest.raises(OptionError, match=r"R.2 = .*, below"):
        da.bottleneck(tiny.build("sd3"), "spectral-hlh", spectrum=found)


def test_refusals():
    with pytest.raises(OptionError, match="16 latents or more"):
        fit_spectrum(np.zeros((3, 4, 32, 32)))
    with pytest.raises(OptionError, match="needs 3 or more"):
        fit_spectrum(np.ones((20, 4, 6, 6)))


def test_tokens_become_planes():
    x = np.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = packed(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(_planes(tokens, {"height": 32, "width": 48}), x)
    with pytest.raises(OptionError, match="make no rectangle"):
        _planes(np.zeros((2, 7, 12)), {})


def test_from_a_pipeline_to_a_run(tmp_path):
    pipe = models.load("tiny-sd")
    pipe.set_progress_bar_config(disable=True)
    file = tmp_path / "spectrum.safetensors"
    made = calibrate.spectrum(pipe, models.prompts(16), images=16, calls=3, out=file, progress=False)
    law = law_of(made)
    assert made.receipt["A"] == pytest.approx(law.a) and law.height == law.width == 8
    with pytest.raises(ArtifactError, match="'spectrum' is needed"):
        law_of(type(made)("gauss", {}))
    stages = [da.Stage(1, 1, t_end=0.8), da.Stage(0.5, 1, t_end=0.5), da.Stage(1, 2)]
    if law.r2 >= 0.9:
        with da.bottleneck(pipe, stages, spectrum=str(file), fill="white", on_small="warn") as h:
            h("a bag", output_type="latent")
            assert h.report().switches[1].missing is not None
    else:
        with pytest.raises(OptionError, match=r"R.2 = .*, below"):
            da.bottleneck(pipe, stages, spectrum=str(file), on_small="warn")
