"""Artifacts: what a file must be to be read, and what must agree before it is used."""

from __future__ import annotations

import json
import os

import diffusers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

import diffaccel as da
from diffaccel import artifact as module
from diffaccel import models
from diffaccel.artifact import Artifact, check_path, check_shape, path_identity
from diffaccel.core.path import Path
from diffaccel.errors import ArtifactError

VP = Path.vp(np.linspace(1e-4, 0.02, 1000))


def made(**meta):
    tensors = {"lam": np.linspace(-1, 1, 5), "l": np.ones((5, 4, 1, 1), np.float32), "n": np.array(3)}
    return Artifact("ems", tensors, {"path": path_identity(VP, "epsilon"), "receipt": {"seconds": 1.5}} | meta)


arrays = hnp.arrays(
    st.sampled_from([np.float64, np.float32, np.int64]),
    hnp.array_shapes(min_dims=0, max_dims=3, max_side=4),
    elements=st.integers(-99, 99),
)


@settings(max_examples=25, deadline=None)
@given(tensors=st.dictionaries(st.text("abcxyz_", min_size=1, max_size=5), arrays, max_size=4))
def test_what_is_saved_is_loaded(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("a") / "x.safetensors"
    saved = Artifact("dc", tensors, {"options": {"order": 2, "none": None}})
    saved.save(path)
    loaded = Artifact.load(path, "dc")
    assert loaded == saved and loaded.meta == saved.meta and loaded.file == "x.safetensors"
    for name, values in tensors.items():
        np.testing.assert_array_equal(loaded.tensors[name], values)
        assert loaded.tensors[name].dtype == values.dtype and loaded.tensors[name].shape == values.shape


def test_it_cannot_be_changed():
    source = np.zeros(3)
    a = Artifact("ems", {"l": source})
    with pytest.raises(ValueError, match="read-only"):
        a.tensors["l"][0] = 1
    before = a.sha256
    source[0] = 1
    assert Artifact("ems", a.tensors).sha256 == before


def test_every_truncation_is_refused(tmp_path):
    path = made().save(tmp_path / "a.safetensors")
    data = path.read_bytes()
    for n in (0, 4, 8, 40, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:n])
        with pytest.raises(ArtifactError, match="truncated"):
            Artifact.load(path)


def test_a_changed_value_is_noticed(tmp_path):
    path = made().save(tmp_path / "a.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="checksum"):
        Artifact.load(path)


def test_foreign_wrong_old_and_missing_files(tmp_path, monkeypatch):
    weights = tmp_path / "weights.safetensors"
    save_file({"w": np.ones(3)}, weights)
    with pytest.raises(ArtifactError, match="no artifact of diffaccel"):
        Artifact.load(weights)
    save_file({"w": np.ones(3)}, weights, metadata={module.KEY: json.dumps([1])})
    with pytest.raises(ArtifactError, match="no artifact of diffaccel"):
        Artifact.load(weights)
    path = made().save(tmp_path / "a.safetensors")
    with pytest.raises(ArtifactError, match=r"kind 'ems'; 'dc' is needed"):
        Artifact.load(path, "dc")
    with pytest.raises(ArtifactError, match="there is no artifact"):
        Artifact.load(tmp_path / "none.safetensors")
    monkeypatch.setattr(module, "FORMAT", 2)
    with pytest.raises(ArtifactError, match=r"format 1 .*reads format 2"):
        Artifact.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = made().save(tmp_path / "a.safetensors")
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        made(seeds=[1]).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


def test_metadata_that_json_cannot_hold():
    for bad in (float("nan"), np.ones(2), {1, 2}):
        with pytest.raises(ArtifactError, match="JSON"):
            Artifact("ems", {}, {"x": bad})


def test_the_receipt_prints_what_was_measured():
    text = str(made(receipt={"valid": {"with": 0.123456, "without": 0.2}, "calls": 300}).receipt)
    assert text == "valid:\n  with: 0.1235\n  without: 0.2\ncalls: 300"


OTHERS = {
    "betas": (Path.vp(np.linspace(1e-4, 0.021, 1000)), "epsilon"),
    "prediction": (VP, "v_prediction"),
    "family": (Path.flow(), "flow_prediction"),
    "edm": (Path.edm(), "epsilon"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_path_is_refused_with_both_sides(name):
    path, kind = OTHERS[name]
    check_path(made(), VP, "epsilon")
    with pytest.raises(ArtifactError) as caught:
        check_path(made(), path, kind)
    assert "vp, epsilon" in str(caught.value) and f"{path.family}, {kind}" in str(caught.value)


def test_the_shift_of_a_flow_path_and_the_range_of_an_edm_path_are_no_other_path():
    flow = Artifact("ems", {}, {"path": path_identity(Path.flow(3.0), "flow_prediction")})
    check_path(flow, Path.flow(1.0, mu=0.7), "flow_prediction")
    edm = Artifact("ems", {}, {"path": path_identity(Path.edm(0.002, 80.0), "epsilon")})
    check_path(edm, Path.edm(0.01, 50.0), "epsilon")


def test_what_a_scheduler_has_between_training_steps_is_no_other_path():
    between = Path.vp(VP.betas, interpolation="sigma")
    assert path_identity(between, "epsilon") == path_identity(VP, "epsilon")
    check_path(made(), between, "epsilon")
    older = Artifact("ems", {}, {"path": module._identity(between, "epsilon")})  # as earlier versions wrote it
    assert older.meta["path"] != path_identity(between, "epsilon")
    for path in (VP, between):
        check_path(older, path, "epsilon")
    with pytest.raises(ArtifactError, match="another path"):
        check_path(older, OTHERS["betas"][0], "epsilon")


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler"])
def test_an_embedded_artifact_serves_every_scheduler_of_its_checkpoint(kind):
    pipe = models.load("tiny-sd")
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config)
    da.FittedScheduler.from_config(pipe.scheduler.config, artifact=models.fitted("tiny-sd"), pipe=pipe)


def test_shapes():
    check_shape(made(), "l", (4, 8, 8))
    with pytest.raises(ArtifactError, match=r"\(4, 1, 1\).*\(3, 8, 8\)"):
        check_shape(made(), "l", (3, 8, 8))
    element = Artifact("ems", {"l": np.ones((5, 4, 8, 8))})
    with pytest.raises(ArtifactError, match="reduce='channel'"):
        check_shape(element, "l", (4, 16, 16))
