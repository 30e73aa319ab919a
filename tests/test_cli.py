"""The command line: what it prints, and what it says when it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import diffaccel
from diffaccel import cli, demo

ROOT = Path(diffaccel.__file__).parent.parent


def test_samplers_are_listed_with_order_options_and_paper(capsys):
    assert cli.main(["samplers"]) == 0
    printed = capsys.readouterr().out
    for name, sampler in diffaccel.samplers().items():
        assert f"\n{name} " in f"\n{printed}"
        assert sampler.paper in printed


def test_certify_prints_a_certificate_and_passes_options(capsys):
    assert cli.main(["certify", "dpmpp", "order=1"]) == 0
    printed = capsys.readouterr().out
    assert "dpmpp(order=1)" in printed
    assert "1 declared" in printed


def test_certify_of_an_unknown_sampler_names_the_nearest(capsys):
    assert cli.main(["certify", "unipx"]) == 2
    assert "unipc" in capsys.readouterr().err


def test_an_unknown_embedded_model_is_refused(capsys):
    with pytest.raises(ValueError, match="tiny-sd"):
        cli.main(["demo", "--model", "tiny"])


def test_an_unknown_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["dream"])
    assert stopped.value.code == 2
    assert "demo" in capsys.readouterr().err


def test_a_reader_that_stops_early_is_no_error():
    command = f"{sys.executable} -m diffaccel samplers | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_the_demo_reports_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "TEACHER_CALLS", 40)
    monkeypatch.setattr(demo, "STOCK_CALLS", 20)
    kept = {"DDIM trailing", "DPM++-2 karras", "PNDM leading"}
    every = demo.compare.stock
    monkeypatch.setattr(demo.compare, "stock", lambda config: [c for c in every(config) if c.name in kept])
    assert cli.main(["demo", "--images", "2", "--calls", "5", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["calls"] for row in report["rows"]] == [20, 5, 5, 5, 5]
    assert [row["stock"] for row in report["rows"]] == [True, True, True, False, False]
    assert report["rivals"] == 3
    best, *ours = report["rows"][2:]
    printed = capsys.readouterr().out
    for row in ours:
        verdict = "times nearer to the teacher" if row["median_error"] < best["median_error"] else "no benefit found"
        assert f"{row['median_error']:.4f}" in printed
        assert any(line.startswith(row["scheduler"]) and verdict in line for line in printed.splitlines())
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (2 * 64, 6 * 80)
        assert len(np.unique(np.asarray(grid)[16:80, :64])) > 10


def test_the_demo_has_no_fitted_row_for_other_numbers_of_calls():
    assert demo._fitted("tiny-sd", 8) is not None
    assert demo._fitted("tiny-sd", 7) is None and demo._fitted("tiny-pixel", 8) is None
