"""What the plots of a report show of a row."""

from __future__ import annotations

import numpy as np
import pytest

from diffaccel.eval import plots
from diffaccel.eval.cells import STOCK, TEACHER, Cell
from diffaccel.eval.rows import Row, Series
from diffaccel.eval.score import interval


def row(name: str, role: str, psnr: np.ndarray, fid: dict) -> Row:
    made = Row(Cell(name, 8, role, 40, name, 8), [{"calls": 8}], {"psnr": Series(np.arange(len(psnr)), psnr)}, {})
    mean = float(psnr[np.isfinite(psnr)].mean())
    made.summary.update({"errors": {"psnr": mean}, "fid": fid, "clip": None, "seconds": "not measured"})
    return made


def test_psnr_has_its_interval() -> None:
    values = np.random.default_rng(0).normal(30, 2, 40)
    mean, below, above = plots._point(row("a", STOCK, np.append(values, np.inf), {"value": 1.0, "low": 0.9}), "psnr")
    low, high = interval(values.mean(), values.std(ddof=1) / 40**0.5)
    assert (mean - below, mean + above) == (pytest.approx(low), pytest.approx(high))
    alone = row("a", STOCK, np.array([30.0]), {})
    assert plots._point(alone, "psnr") == (30.0, 0.0, 0.0)


@pytest.mark.parametrize("low, lines", [(None, 0), (0.4, 1)])
def test_a_teacher_of_too_few_images_has_no_line_in_fid(low: float | None, lines: int) -> None:
    _, new_figure = plots.drawing()
    teacher = row("teacher", TEACHER, np.full(4, 40.0), {"value": 0.5, "low": low, "high": low})
    rows = [teacher, row("a", STOCK, np.full(4, 30.0), {"value": 1.0, "low": 0.9, "high": 1.1})]
    for metric, expected in (("fid", lines), ("psnr", 1)):
        axis = new_figure().subplots()
        plots._panel(axis, rows, metric, "calls")
        assert sum(line.get_label() == "teacher, 8 calls" for line in axis.lines) == expected
