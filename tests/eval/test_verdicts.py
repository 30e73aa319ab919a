"""What a report may say: on rows with known numbers, without a pipeline."""

from __future__ import annotations

import math
import zlib
from itertools import pairwise

import numpy as np
import pytest
import torch

from diffaccel.eval import frechet, page
from diffaccel.eval.cells import CANDIDATE, HALF, STOCK, Cell, Plan
from diffaccel.eval.rows import STOCHASTIC, Row, Series
from diffaccel.eval.stats_file import Stats
from diffaccel.eval.verdicts import compare, pairs_of_budgets, same_images, summaries, verdicts

N, D = 400, 6
RNG = np.random.default_rng(0)
BASE = RNG.normal(size=(N, D))
REFERENCE = Stats("reference", "f", 4000, values=torch.from_numpy(np.random.default_rng(1).normal(size=(4000, D))))
PLAN = Plan({}, ["a"], True, N, N, N, [8], [], "r", "f", None, [], {}, "")


def row(name: str, calls: int, *, shift=0.0, psnr=30.0, noise=0.0, made=None, role=CANDIDATE, extra=False, n=N, **more):
    """A row whose FID grows with `shift` and whose mean PSNR is `psnr`; noise of its own: `noise`."""
    own = np.random.default_rng(zlib.crc32(f"{name} {calls}".encode()))
    values = BASE[:n] + shift + noise * own.normal(size=(n, D))
    index = np.arange(n)
    spread = own.normal(size=n)
    series = {"features": Series(index, values), "psnr": Series(index, psnr + spread - spread.mean())}
    cell = Cell(name, calls, role, N, name, calls, extra)
    made_row = Row(cell, [{"calls": made or calls}], {**series, **more.get("series", {})}, more.get("why", {}))
    fid = {"value": frechet.jackknife(values, REFERENCE.gaussian)}
    made_row.summary.update({"fid": fid, "errors": {"psnr": float(series["psnr"].values.mean())}, "clip": None})
    return made_row


def judged(*rows: Row, calls=(8,)) -> dict:
    plan = Plan(**{**vars(PLAN), "calls": list(calls)})
    return {(v["metric"], v["name"], v["calls"]): v for v in verdicts(rows, plan, REFERENCE)}


def test_a_real_benefit_is_told_with_its_interval():
    found = judged(row("ours", 8, psnr=33), row("a", 8, shift=0.5, role=STOCK), row("b", 8, shift=0.9, role=STOCK))
    fid = found["fid", "ours", 8]
    assert fid["benefit"] and fid["rival"] == "a" and 0 < fid["low"] < fid["better_by"] < fid["high"]
    assert fid["text"].startswith("8 calls, FID, ours: 1.") and "better than a [" in fid["text"]
    psnr = found["psnr", "ours", 8]
    assert psnr["benefit"] and abs(psnr["better_by"] - 3) < 0.3 and "dB better than" in psnr["text"]
    text = summaries(list(found.values()))[0]
    assert text["rest"] == "" and text["good"].count("better than") == 2


def test_the_best_stock_row_is_the_rival_and_only_at_these_calls():
    rows = [
        row("ours", 8),
        row("a", 8, shift=0.4, role=STOCK),
        row("a", 20, role=STOCK),
        row("b", 8, shift=0.2, role=STOCK),
    ]
    assert judged(*rows)["fid", "ours", 8]["rival"] == "b"


def test_worse_and_unclear_rows_are_no_benefit():
    found = judged(row("ours", 8, shift=0.5, psnr=28), row("a", 8, role=STOCK))
    assert not any(v["benefit"] for v in found.values())
    assert (
        "no benefit found (" in found["fid", "ours", 8]["text"] and " worse than a [" in found["fid", "ours", 8]["text"]
    )
    unclear = judged(row("ours", 8, noise=0.3), row("a", 8, noise=0.3, role=STOCK))["psnr", "ours", 8]
    assert unclear["low"] < 0 < unclear["high"] and "which can be chance" in unclear["text"]


def test_the_same_images_up_to_rounding_are_no_benefit():
    """A difference of rounding can be significant: the interval of 0.0001 dB may exclude zero."""
    stock = row("a", 8, role=STOCK)
    copy = row("copy", 8)
    copy.series["psnr"] = Series(stock.series["psnr"].index, stock.series["psnr"].values + 1e-4)
    copy.series["features"] = Series(stock.series["features"].index, stock.series["features"].values * (1 + 1e-6))
    found = judged(copy, stock)
    assert compare(copy, stock, "psnr", None).low > 0
    assert all(v["text"].endswith("no benefit found: the same images as a") for v in found.values())
    assert not same_images(row("x", 8, noise=0.01), stock)


def test_many_rows_are_corrected():
    """Rows that differ by chance alone: without Holm's correction some of 60 would read as a benefit."""
    stock = row("a", 8, role=STOCK, psnr=30)
    rows = [row(f"r{i}", 8, noise=0.2, psnr=30 + 0.003 * i) for i in range(60)]  # up to 2.5 standard errors
    found = [v for v in judged(*rows, stock).values() if v["metric"] == "psnr"]
    assert len(found) == 60 and any(v["low"] > 0 for v in found)
    assert not any(v["benefit"] for v in found)
    assert any("over 60 comparisons the difference can be chance" in v["text"] for v in found)
    order = sorted(found, key=lambda v: v["p"])
    assert order[0]["p_holm"] == pytest.approx(min(1, 60 * order[0]["p"]))
    assert all(a["p_holm"] <= b["p_holm"] for a, b in pairwise(order))


def test_rows_at_the_teachers_own_error_are_alike():
    half = row("teacher", 50, role=HALF, psnr=40)
    found = judged(row("ours", 8, psnr=48, noise=0.1), row("a", 8, psnr=44, noise=0.1, role=STOCK), half)
    assert "no benefit found: it and a are at the teacher's own error" in found["psnr", "ours", 8]["text"]
    near = judged(row("ours", 8, psnr=48, noise=0.1), row("a", 8, psnr=30, noise=0.1, role=STOCK), half)
    assert near["psnr", "ours", 8]["benefit"]


def test_more_calls_than_asked_for_are_not_compared():
    found = judged(row("ours", 8, made=9), row("a", 8, shift=1, role=STOCK))
    assert (
        found["fid", "ours", 8]["text"].endswith("not compared: it made 9 calls") and "p" not in found["fid", "ours", 8]
    )
    rival = judged(row("ours", 8), row("heun", 8, made=9, role=STOCK), row("a", 8, shift=1, role=STOCK))
    assert rival["fid", "ours", 8]["rival"] == "a"


def test_why_a_metric_is_not_there():
    mine = row("ours", 8, why={"psnr": STOCHASTIC})
    del mine.series["psnr"]
    found = judged(mine, row("a", 8, role=STOCK))
    assert "not compared: stochastic" in found["psnr", "ours", 8]["text"] and ("clip", "ours", 8) not in found


def test_calls_saved_by_interpolation():
    stock = [row("a", n, psnr=p, role=STOCK) for n, p in ((5, 20), (10, 30), (20, 40))]
    found = judged(*stock, row("ours", 8, psnr=35), row("a", 8, psnr=27, role=STOCK))["psnr", "ours", 8]
    assert found["equal_calls"] == pytest.approx(10 * math.sqrt(2), rel=0.02)
    assert judged(*stock, row("ours", 5, psnr=45), calls=(5,))["psnr", "ours", 5]["equal_calls"] is None


def test_partial_rows_are_compared_on_what_both_have():
    few, all_ = row("ours", 8, n=100), row("a", 8, shift=0.5, role=STOCK)
    found = compare(few, all_, "fid", REFERENCE)
    assert found.n == 100 and found.low > 0
    apart = Series(np.arange(N, N + 50), BASE[:50])
    assert compare(Row(few.cell, few.counted, {"features": apart}, {}), all_, "fid", REFERENCE) is None


def test_what_a_call_is_worth():
    rows = [row("a", n, shift=s, role=STOCK, extra=n == 4) for n, s in ((4, 0.9), (5, 0.6), (20, 0.1))]
    found = pairs_of_budgets(rows, PLAN, REFERENCE)
    assert [(w["calls"], w["against"]) for w in found["fewer"]] == [(5, 4), (20, 5)]
    assert [(w["calls"], w["against"]) for w in found["separation"]] == [(20, 5)]
    assert found["separation"][0]["fid"]["low"] > 0 and found["separation"][0]["clip"] is None


def test_too_few_images_are_no_verdict():
    """10 images, 6 features. The same images are still the same, and other metrics are judged."""
    rows = [row("ours", 8, n=10, psnr=33), row("a", 8, shift=0.9, role=STOCK, n=10)]
    found = judged(*rows)
    fid = found["fid", "ours", 8]
    assert fid["text"] == "8 calls, FID, ours: not compared: too few images: 10 for 6 features, 12 needed"
    assert (
        not fid["benefit"] and fid["low"] is fid["z"] is None and "p" not in fid and found["psnr", "ours", 8]["benefit"]
    )
    assert summaries(list(found.values()))[0]["rest"] == "not compared in FID"
    copy = row("copy", 8, n=10)
    copy.series.update(rows[1].series)
    assert judged(copy, rows[1])["fid", "copy", 8]["text"].endswith("the same images as a")
    worth = pairs_of_budgets([row("a", n, role=STOCK, n=10) for n in (5, 20)], PLAN, REFERENCE)["separation"][0]["fid"]
    assert worth["low"] is None and "too few images for an interval" in page._difference(worth)


@pytest.mark.parametrize("n", [64, 260, 1000])
def test_too_little_spread_is_no_benefit(n):
    """Its bias is smaller than that of the right law, and the plain FID with it."""
    spread = np.arange(1, 129) ** -0.25
    reference = Stats("r", "f", 50000, moments=(np.zeros(128), np.diag(spread**2)))
    right = np.random.default_rng(0).standard_normal((n, 128)) * spread
    rows = []
    for name, values, role in (("ours", 0.93 * right, CANDIDATE), ("a", right, STOCK)):
        made = Row(Cell(name, 8, role, n, name, 8), [{"calls": 8}], {"features": Series(np.arange(n), values)}, {})
        made.summary.update(
            {"fid": {"value": frechet.jackknife(values, reference.gaussian)}, "errors": {}, "clip": None}
        )
        rows.append(made)
    assert frechet.fid(0.93 * right, reference.gaussian) < frechet.fid(right, reference.gaussian) or n == 1000
    (found,) = verdicts(rows, PLAN, reference)
    assert not found["benefit"] and ("too few images" in found["text"]) == (n < 256)
