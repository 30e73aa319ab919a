"""The wheel holds everything that runs, and stays small; importing the package is cheap."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 20_000_000  # bytes


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel made from a copy, so that the build leaves nothing in the checkout; needs no network."""
    work = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, work)
    shutil.copytree(ROOT / "diffaccel", work / "diffaccel", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", str(work / "out"), str(work)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((work / "out").glob("diffaccel-*.whl"))


@pytest.mark.slow
def test_wheel_is_complete_and_small(wheel):
    assert wheel.stat().st_size < LIMIT
    inside = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "diffaccel"
    wanted = [*package.rglob("*.py"), package / "py.typed"]
    wanted += [path for path in (package / "models" / "weights").rglob("*") if path.is_file()]
    missing = {str(path.relative_to(ROOT).as_posix()) for path in wanted} - inside
    assert not missing
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert not any(name.startswith("tests") for name in inside)


@pytest.mark.slow
def test_wheel_declares_its_command_and_licence(wheel):
    archive = zipfile.ZipFile(wheel)
    info = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    assert "diffaccel = diffaccel.cli:main" in info["entry_points.txt"]
    assert "License-Expression: Apache-2.0" in info["METADATA"]
    assert "Requires-Python: >=3.10" in info["METADATA"]


def test_importing_the_package_loads_neither_torch_nor_diffusers():
    code = "import sys, diffaccel; print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_versions_agree():
    import diffaccel

    declared = next(line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version"))
    assert declared == f'version = "{diffaccel.__version__}"'
