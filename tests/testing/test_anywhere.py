"""Runs anywhere: all that can be asked for, those drawn at random, and what is found in them."""

from __future__ import annotations

import math
from itertools import islice, pairwise
from typing import Any

import pytest

from diffaccel.cli import main
from diffaccel.core.node import decay
from diffaccel.errors import OptionError
from diffaccel.samplers.registry import Sampler, get, samplers
from diffaccel.testing.anywhere import FINALS, MOST, Place, check_anywhere, drawn, every, table_of
from diffaccel.testing.certify import certify
from diffaccel.testing.checks import CHECKS
from diffaccel.testing.runs import laid

CASES = [(name, dict(o)) for name, found in samplers().items() for o in found.settings]


def _tender(x: Any, nodes: Any, predict: Any, noise: Any) -> Any:
    """DDIM that overflows in runs of 23 calls only."""
    for s, t in pairwise(nodes):
        x = (t.sigma / s.sigma) * x + t.alpha * (1 - decay(s, t)) * predict(x, s)
        x = 1e200 * x if len(nodes) == 24 else x
    return x


def _refuses(x: Any, nodes: Any, predict: Any, noise: Any) -> Any:
    if len(nodes) % 2:
        raise OptionError("an odd number of calls, please")
    for s, t in pairwise(nodes):
        x = (t.sigma / s.sigma) * x + t.alpha * (1 - decay(s, t)) * predict(x, s)
    return x


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda e: str(e))
def test_every_sampler_is_finite_anywhere(name: str, options: dict[str, Any]) -> None:
    result = check_anywhere(get(name), options, drawn(30, seed=len(str((name, options)))))
    assert result.passed, str(result)


def test_every_run_is_there_once() -> None:
    found = list(every())
    assert len(found) == len(set(found)) == len(laid()) * MOST * 2
    assert {p.calls for p in found} == set(range(1, 51)) and {p.begin for p in found} == {0}
    assert {p.path for p in found} >= {"vp", "edm", "flow", "flow_mu"} and {p.final for p in found} == set(FINALS)


def test_drawn_runs_are_of_the_same_kind_and_repeat() -> None:
    found = list(drawn(400, seed=3))
    assert found == list(drawn(400, seed=3)) != list(drawn(400, seed=4))
    known = set(every())
    assert all(Place(p.path, p.grid, p.calls, p.final, 0) in known and 0 <= p.begin < p.calls for p in found)
    assert 120 < sum(p.begin > 0 for p in found) < 220


def test_a_run_begins_where_it_is_told() -> None:
    place = Place("vp", "linspace", 9, "zero", 4)
    table, whole = (table_of(get("dpmpp"), {}, p) for p in (place, Place("vp", "linspace", 9, "zero", 0)))
    assert table.timesteps == whole.timesteps[4:] and len(table.rows[0].out.p) == 1 < len(whole.rows[4].out.p)


def test_what_is_rare_is_found_and_named() -> None:
    tender = Sampler("tender", _tender, 1)
    assert CHECKS["finite"](tender, {}).passed, "not among the fixed runs"
    result = check_anywhere(tender, {}, (p for p in every() if p.path == "flow"))
    assert not result.passed and math.isinf(result.value) and ", 23 calls, " in result.detail


def test_refusals_are_counted_and_nothing_is_no_pass() -> None:
    refuses = Sampler("refuses", _refuses, 1)
    some = list(islice(every(), 40))  # 1 to 20 calls, two ends
    result = check_anywhere(refuses, {}, some)
    assert result.passed and "; 20 runs, 20 refused" in result.detail
    assert not check_anywhere(refuses, {}, [p for p in some if p.calls % 2 == 0]).passed
    assert not check_anywhere(refuses, {}, []).passed


def test_a_certificate_takes_drawn_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", "ddim", "--cases", "12"]) == 0
    printed = capsys.readouterr().out
    assert "12 of 12 checks passed" in printed and "; 12 runs" in printed
    with pytest.raises(OptionError, match="cases=-1"):
        certify("ddim", cases=-1)
