"""The embedded networks and reference through the public functions."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from diffaccel import models
from diffaccel.errors import OptionError
from diffaccel.eval import clip_score, fid, frechet, kid, stats_file
from diffaccel.eval.features import projected

X = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_fid_against_the_embedded_reference() -> None:
    """The features are those of the reference; the number is labelled as what it is."""
    score = fid(X, "tiny-fashion")
    r = models.reference()
    want = frechet.fid(models.features()(X), frechet.from_moments(r["mu"], r["sigma"]))
    assert score.raw == pytest.approx(want, rel=1e-6)
    assert score.label == "FID (tiny-fashion features, not Inception)" and score.n_b == r["n"]
    assert score.features == "tiny-fashion" and not any("differ" in w for w in score.warnings)


def test_kid_uses_the_stored_rows() -> None:
    assert kid(X, "tiny-fashion").n_b == len(models.reference()["rows"])


def test_rows_are_of_the_law_of_the_reference() -> None:
    """Real rows against the whole reference: far below any other images."""
    rows = models.reference()["rows"]
    assert fid(rows, "tiny-fashion", features="tiny-fashion").value < 0.05 * fid(X, "tiny-fashion").value


def test_sizes_must_match() -> None:
    score = fid(X, "tiny-fashion:64")
    assert any("tiny-fashion does not resize, and the sizes differ: 32x32 against 64x64" in w for w in score.warnings)
    with pytest.raises(OptionError, match="no reference statistics for size 48"):
        stats_file.reference("tiny-fashion:48")


@pytest.mark.filterwarnings("ignore:`max_length` is ignored")  # torchmetrics asks the tokenizer for that
def test_clip_score_equals_torchmetrics() -> None:
    """Acceptance 7, on the embedded CLIP: torchmetrics' update function through a model whose get_*_features give
    tensors (it fails with the output objects of transformers 5)."""
    update = importlib.import_module("torchmetrics.functional.multimodal.clip_score")._clip_score_update
    net, processor = models.clip()

    class Thin(torch.nn.Module):
        config = net.config

        def get_image_features(self, *a, **k):
            return projected(net.get_image_features(*a, **k))

        def get_text_features(self, *a, **k):
            return projected(net.get_text_features(*a, **k))

    prompts = models.prompts(30)
    want, _ = update(list(X), prompts, Thin(), processor)
    assert clip_score(X, prompts, model="tiny-clip").value == pytest.approx(float(want.mean()), rel=1e-5, abs=1e-5)


def test_clip_score_tells_captions_apart() -> None:
    """Flat images in the colour of a garment on a background are nearer to captions with that colour."""
    image = np.full((2, 32, 32, 3), 245, np.uint8)
    image[0, 4:28, 8:24], image[1, 4:28, 8:24] = (200, 30, 40), (40, 80, 200)
    captions = ["a photo of a red dress on a white background", "a photo of a blue dress on a white background"]
    right = clip_score(image, captions, model="tiny-clip")
    wrong = clip_score(image, captions[::-1], model="tiny-clip")
    assert right.value > wrong.value and right.details["R-precision"] == 1
