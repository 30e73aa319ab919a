"""Recipes as files: what comes back is what was written, and everything else is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diffaccel import models
from diffaccel.artifact import Artifact, Receipt
from diffaccel.errors import ArtifactError
from diffaccel.pipelines.recipe import Choice, Recipe
from diffaccel.tune.sources import embedded

MODEL = {"class": "UNet2DConditionModel", "config_sha256": "a", "weights_sha256": "b", "weights_sample": [0.1]}
MADE_ON = {
    "pipeline": "StableDiffusionPipeline",
    "model": {**MODEL, "dtype": "float32", "adapters": {}},
    "path": {"family": "vp", "prediction_type": "epsilon", "table_sha256": "c", "lam_range": [-2.0, 4.0]},
    "guidance": 4.0,
    "shape": [8, 8, 8],
    "call": {},
}


def recipe(artifact=None, **changes):
    settings_ = {"sampler": "dpmpp", "sampler_options": {"order": 2}, "grid": "karras", "grid_options": {"rho": 4.0}}
    choice = Choice("dpmpp(order=2, karras rho=4.0)", "scheduler", settings_, 8, artifact=artifact)
    given_ = {"receipt": Receipt({"verdict": "better", "helps": True, "calls": 8}), "spent": {"seconds": 1.5}}
    return Recipe(choice, MADE_ON, **(given_ | changes))


@given(arrays(np.float64, st.integers(1, 40), elements=st.floats(allow_nan=False, allow_infinity=False)))
@settings(max_examples=60, deadline=None)
def test_every_float64_comes_back_bit_for_bit(values):
    held = Artifact("fit", {"n8.w": values.reshape(-1, 1)}, {"calls": [8]})
    back = Recipe.from_json(recipe(held).to_json()).choice.artifact
    assert back.tensors["n8.w"].dtype == np.float64 and back.tensors["n8.w"].shape == (len(values), 1)
    assert back.tensors["n8.w"].tobytes() == values.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_other_numbers_come_back_too(dtype):
    values = (np.random.default_rng(0).normal(size=(3, 2, 1)) * 1e3).astype(dtype)
    held = Artifact("dc", {"a": values, "none": np.zeros((0, 2))}, {})
    back = Recipe.from_json(recipe(held).to_json()).choice.artifact
    assert back == held and back.tensors["a"].dtype == dtype


def test_a_table_of_an_embedded_model_comes_back(tmp_path):
    """Of an artifact of five budgets the recipe holds one, and all of its numbers."""
    held = Artifact.load(models.fitted("tiny-sd"))
    made = recipe(embedded(held, 8))
    made.save(tmp_path / "r.json")
    back = Recipe.load(tmp_path / "r.json").choice.artifact
    assert set(back.tensors) == {"n8.node", "n8.w", "n8.start"} and back.meta["calls"] == [8]
    for name, array in back.tensors.items():
        assert array.tobytes() == held.tensors[name].tobytes()
    assert "cost" not in back.meta and "seconds" not in json.dumps(back.meta["receipt"])
    assert (tmp_path / "r.json").stat().st_size < 100_000


def test_a_file_comes_back_whole_and_seconds_are_no_part_of_it(tmp_path):
    made = recipe()
    made.save(tmp_path / "r.json")
    back = Recipe.load(tmp_path / "r.json")
    assert back == made and hash(back) == hash(made) and back.to_json() == made.to_json()
    assert back.file == "r.json" and dict(back.spent) == {"seconds": 1.5}
    assert recipe(spent={"seconds": 99.0}) == made
    assert recipe(receipt=Receipt({"verdict": "worse"})) != made


def damaged(text):
    """(what was done, new text, message)."""
    whole = json.loads(text)
    yield "cut", text[:-40], "r.json is damaged or no recipe: line"
    yield "empty", "", "is damaged or no recipe: line 1"
    yield "list", "[1, 2]", "is JSON, but no recipe of diffaccel"
    yield "other kind", json.dumps(whole | {"kind": "fit"}), "is JSON, but no recipe of diffaccel"
    yield (
        "format",
        json.dumps(whole | {"format": 2, "library_version": "9.9"}),
        "format 2, written by diffaccel 9.9",
    )
    yield "missing", json.dumps({k: v for k, v in whole.items() if k != "made_on"}), "is damaged: it has no made_on"
    yield "number", text.replace('"rho": 4.0', '"rho": 4.5'), "was changed after it was written"
    yield "receipt", text.replace('"better"', '"much better"'), "was changed after it was written"
    yield "sign", text.replace("0.25", "-0.25"), "was changed after it was written"


def test_damage_is_named(tmp_path):
    made, path = recipe(Artifact("fit", {"n8.w": np.array([[0.25]])}, {"calls": [8]})), tmp_path / "r.json"
    made.save(path)
    text = path.read_text()
    for what, changed, message in damaged(text):
        assert changed != text, what
        path.write_text(changed)
        with pytest.raises(ArtifactError, match=message):
            Recipe.load(path)
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ArtifactError, match="it is not text"):
        Recipe.load(path)
    with pytest.raises(ArtifactError, match="there is no recipe"):
        Recipe.load(tmp_path / "none.json")


def test_a_choice_that_cannot_be_read_is_named():
    """Also where the checksum fits: a file written by hand."""
    from diffaccel.pipelines.recipe import _checksum

    whole = json.loads(recipe(Artifact("fit", {"n8.w": np.ones((2, 2))}, {"calls": [8]})).to_json())
    for change in ({"values": "1.0 x 1.0 1.0"}, {"shape": [3, 3]}, {"dtype": "object"}):
        broken = json.loads(json.dumps(whole))
        broken["choice"]["artifact"]["tensors"]["n8.w"] |= change
        broken["sha256"] = _checksum({k: broken[k] for k in ("choice", "made_on", "receipt")})
        with pytest.raises(ArtifactError, match="is damaged: its choice cannot be read"):
            Recipe.from_json(json.dumps(broken))


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(ArtifactError, match="holds JSON values"):
        recipe(receipt=Receipt({"verdict": float("nan")})).save("unused.json")
    with pytest.raises(ArtifactError, match=r"n8.w is complex128; a recipe holds"):
        recipe(Artifact("fit", {"n8.w": np.ones(2, complex)}, {"calls": [8]})).to_json()
    with pytest.raises(ArtifactError, match="holds 200001 numbers"):
        recipe(Artifact("ems", {"l": np.zeros(200_001)}, {})).to_json()
