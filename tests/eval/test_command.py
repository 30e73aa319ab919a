"""`diffaccel eval ...`, on folders, without the embedded weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from eval_nets import coloured, tiny_clip
from PIL import Image

from diffaccel import cli
from diffaccel.eval import clip_score, cmmd, fid, kid


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders a/ and b/, a CLIP folder clip/, prompts.txt."""
    root = tmp_path_factory.mktemp("command")
    for name, seed in (("a", 1), ("b", 2)):
        (root / name).mkdir()
        for i, x in enumerate(coloured(24, seed, size=32, shift=10 * seed)):
            Image.fromarray(x).save(root / name / f"{i}.png")
    (root / "tokenizer").mkdir()
    model, processor = tiny_clip(root / "tokenizer")
    model.save_pretrained(root / "clip")
    processor.save_pretrained(root / "clip")
    (root / "prompts.txt").write_text("red coat\nblue bag\nshoe\n")
    return root


def run(*words: object) -> int:
    return cli.main(["eval", *map(str, words)])


def test_scores(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The printed line and the JSON are those of the functions."""
    a, b, features = place / "a", place / "b", f"clip:{place / 'clip'}"
    for name, metric in (("fid", fid), ("kid", kid), ("cmmd", cmmd)):
        assert run(name, a, b, "--features", features, "--json", place / "s.json") == 0
        want = metric(a, b, features=features)
        assert capsys.readouterr().out.splitlines()[0] == want.line
        assert json.loads((place / "s.json").read_text())["value"] == pytest.approx(want.value, rel=1e-9)
    assert run("fid", a, b, "--features", features, "--paper") == 0
    assert "uncorrected" not in capsys.readouterr().out


def test_clip(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("clip", place / "a", place / "prompts.txt", "--model", place / "clip") == 0
    out = capsys.readouterr().out
    assert out.startswith(clip_score(place / "a", place / "prompts.txt", model=str(place / "clip")).line)
    assert "R-precision" in out and "prompts: 3" in out
    with_broken = place / "with_broken"
    shutil.copytree(place / "a", with_broken)
    (with_broken / "3.png").write_bytes(b"no image")
    words = ("clip", with_broken, place / "prompts.txt", "--model", place / "clip", "--unreadable", "skip")
    assert run(*words) == 0
    assert "1 unreadable images skipped, first: 3.png" in capsys.readouterr().out


def test_stats(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features = f"clip:{place / 'clip'}"
    assert run("stats", place / "b", "--out", place / "b.npz", "--features", features, "--keep-features") == 0
    assert f"wrote {place / 'b.npz'}: 24 images" in capsys.readouterr().out
    with np.load(place / "b.npz") as data:
        assert data["feats"].shape == (24, 24)
    assert run("kid", place / "a", place / "b.npz") == 0  # the file tells its features
    assert capsys.readouterr().out.splitlines()[0] == kid(place / "a", place / "b", features=features).line


def test_refusals_are_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DIFFACCEL_INCEPTION", raising=False)
    clip = ("--features", f"clip:{place / 'clip'}")
    cases = {
        ("fid", place / "a", place / "absent"): "no file or folder",
        ("fid", place / "a", place / "b", "--features", "dino"): "unknown features 'dino'",
        ("fid", place / "a", place / "b", "--weights", place / "no.pth"): "no Inception weights at",
        ("cmmd", place / "a", place / "b", "--features", "inception-v3:tf", "--weights", "no.pth"): "weights at no.pth",
        ("clip", place / "a", place / "absent.txt", "--model", place / "clip"): "cannot read the prompts",
        ("stats", place / "a", "--out", place / "s.npz", "--unreadable", "ignore"): "unknown unreadable",
        ("stats", place / "a", "--out", place / "prompts.txt" / "s.npz", *clip): "prompts.txt is no folder",
        ("stats", place / "a", "--out", place / "s.txt"): "statistics are written as .npz",
        ("fid", place / "a", place / "b", "--json", place): "give a file's name",
        ("clip", place / "a", place / "prompts.txt", "--json", place / "no" / "s.json"): "give a file's name",
        ("fid", place / "a", place / "b", *clip, "--json", "/dev/full"): "cannot write --json /dev/full: No space left",
        ("kid", place / "a", place / "b", *clip, "--subsets", "0"): "subsets is 1 or more, got 0",
        ("fid", place / "a", place / "b", *clip, "--device", "foo"): "device 'foo' cannot be used here",
        ("fid", place / "a", place / "b", *clip, "--batch", "0"): "batch is 1 image or more, got 0",
        ("fid", place / "a", place / "b", *clip, "--batch", "-3"): "batch is 1 image or more, got -3",
    }
    for words, message in cases.items():
        assert run(*words) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("diffaccel: ") and message in error
