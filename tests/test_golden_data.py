"""The reference data is complete, readable without pickle, and can be replaced by another folder."""

from __future__ import annotations

import golden_data
import pytest

FOLDERS = ("eval", "fsampler", "quant_cache", "rewriters_and_policies", "solvers_calibrated_official", "staged")


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_has_readme_and_readable_arrays(name):
    assert (golden_data.folder(name) / "README.md").is_file()
    for path in golden_data.cases(name):
        assert golden_data.load(path), path


def test_environment_variable_replaces_the_folder(tmp_path, monkeypatch):
    (tmp_path / "staged").mkdir()
    monkeypatch.setenv(golden_data.VARIABLE, str(tmp_path))
    assert golden_data.folder("staged") == tmp_path / "staged"
    with pytest.raises(FileNotFoundError, match="DIFFACCEL_GOLDEN"):
        golden_data.folder("eval")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        golden_data.cases("staged")
