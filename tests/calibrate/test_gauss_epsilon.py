"""calibrate.gauss and calibrate.epsilon on a small pipeline, and their arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

import diffaccel as da
from diffaccel import calibrate, models
from diffaccel.artifact import Artifact
from diffaccel.calibrate.epsilon import RANGE, secant
from diffaccel.errors import OptionError

CALL = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def pipe():
    found = models.load("tiny-sd")
    found.set_progress_bar_config(disable=True)
    return found


def test_gauss(pipe, tmp_path):
    file = tmp_path / "gauss.safetensors"
    made = calibrate.gauss(pipe, models.prompts(1), images=16, rank=4, calls=3, reference=6, held_out=8,
                           guidance=1.0, call=CALL, batch=8, out=file, progress=False)  # fmt: skip
    assert Artifact.load(file, "gauss") == made
    shape = tuple(made.meta["shape"])
    assert made.tensors["mean"].shape == (1, *shape) and made.tensors["axes"].shape == (4, *shape)
    axes = made.tensors["axes"].reshape(4, -1)
    np.testing.assert_allclose(axes @ axes.T, np.eye(4), atol=1e-8)
    errors = list(made.receipt["median relative error by level"].values())
    assert len(errors) == 5 and errors == sorted(errors)  # farther is worse
    assert made.meta["cost"]["calls"] == 16 * 3 + 8 * 6
    skip = made.meta["options"]["skip_to"]
    assert skip is None or min(errors) < 0.01
    with da.teleport(pipe, made, skip_to=5.0) as h:
        found = h(models.prompts(2), num_inference_steps=2, guidance_scale=1.0, output_type="latent", **CALL).images
    assert found.isfinite().all() and h.report().calls == 2


def test_epsilon(pipe, tmp_path):
    few = {"calls": 4, "images": 8, "held_out": 16, "teacher_calls": 12, "batch": 8, "progress": False}
    file = tmp_path / "e.safetensors"
    made = calibrate.epsilon(pipe, models.prompts(8), below=10.0, guidance=1.0, call=CALL, out=file, **few)
    options = made.meta["options"]
    assert options["below"] == 10.0 and RANGE[0] <= options["at_end"] <= RANGE[1]
    receipt = made.receipt
    helps = [receipt[name]["verdict"] == "helps" for name in ("moment", "norm")]
    assert ("no benefit found" in receipt["chosen"]) == (not any(helps)) == (options["at_end"] == 1.0)
    scheduler = da.TableScheduler.from_config(
        pipe.scheduler.config, sampler="ddim", rewrite=[da.epsilon_scale(**options)]
    )
    scheduler.set_timesteps(4)


def test_the_secant():
    assert secant(lambda v: 3 * (v - 1.013)) == pytest.approx(1.013, abs=1e-5)
    assert secant(lambda v: np.log(v / 0.99) + (v - 0.99) ** 2) == pytest.approx(0.99, abs=1e-4)
    assert secant(lambda v: v - 3.0) == RANGE[1]  # no root within reach: the best end
    assert secant(lambda v: 1.0) in (1.0, 1.002)


def test_refused_settings(pipe):
    with pytest.raises(OptionError, match="8 images"):
        calibrate.gauss(pipe, ["a"], images=4)
    with pytest.raises(OptionError, match="8 images"):
        calibrate.epsilon(pipe, ["a"], images=2)
    with pytest.raises(OptionError, match="draws noise"):
        calibrate.epsilon(pipe, ["a"], sampler="ddpm", images=8, held_out=8, teacher_calls=1, call=CALL, progress=False)
