"""Where the reference data is: $DIFFACCEL_GOLDEN if set, else tests/golden.

A golden test lives in tests/parity/test_golden_<folder>.py and finds its cases in the files, so that other data in the
same form is checked without a change:

    CASES = golden_data.cases("staged", "transition_*.npz")

    @pytest.mark.parametrize("path", CASES, ids=golden_data.name)
    def test_transition(path):
        data = golden_data.load(path)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

VARIABLE = "DIFFACCEL_GOLDEN"


def folder(name: str = "") -> Path:
    """The folder of the reference data, or the one called `name` in it."""
    root = Path(os.environ.get(VARIABLE) or Path(__file__).resolve().parent / "golden")
    path = root / name if name else root
    if not path.is_dir():
        raise FileNotFoundError(f"no reference data in {path}; set {VARIABLE} to a folder in the form of tests/golden")
    return path


def cases(name: str, pattern: str = "*.npz") -> list[Path]:
    """The files of the folder `name` that match `pattern`, sorted; none is an error, not a test that never runs."""
    found = sorted(folder(name).glob(pattern))
    if not found:
        raise FileNotFoundError(f"no file matches {pattern} in {folder(name)}")
    return found


def load(path: Path) -> dict[str, Any]:
    """All arrays of one .npz file, by name."""
    with np.load(path, allow_pickle=False) as data:
        return {key: data[key] for key in data.files}


def name(path: Path) -> str:
    """Test id of a case."""
    return path.stem
