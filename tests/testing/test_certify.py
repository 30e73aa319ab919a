"""Checks and certificates tell a good sampler from a bad one."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest

from diffaccel.cli import main
from diffaccel.core.node import decay
from diffaccel.errors import OptionError
from diffaccel.samplers.registry import Sampler
from diffaccel.testing.certify import certify, find
from diffaccel.testing.checks import CHECKS, Result


def _good(x: Any, nodes: Any, predict: Any, noise: Any, *, scale: float = 1.0) -> Any:
    for s, t in pairwise(nodes):
        d = predict(x, s)
        x = (t.sigma / s.sigma) * x + scale * t.alpha * (1 - decay(s, t)) * d
    return x


def _grows_t(x: Any, nodes: Any, predict: Any, noise: Any) -> Any:
    """Not path invariant, and wrong: the size of a step depends on what the model is fed."""
    for s, t in pairwise(nodes):
        d = predict(x, s)
        x = (t.sigma / s.sigma) * x + t.alpha * (1 - decay(s, t)) * (1 + 0.1 * s.t) * d
    return x


def _noisy(x: Any, nodes: Any, predict: Any, noise: Any) -> Any:
    """Adds noise without taking as much away."""
    for s, t in pairwise(nodes):
        d = predict(x, s)
        x = (t.sigma / s.sigma) * x + t.alpha * (1 - decay(s, t)) * d + 0.01 * t.sigma * noise()
    return x


def _twice(x: Any, nodes: Any, predict: Any, noise: Any) -> Any:
    """Spends a second call on every interval without saying so."""
    for s, t in pairwise(nodes):
        d = predict(x, s)
        x = (t.sigma / s.sigma) * x + t.alpha * (1 - decay(s, t)) * (0.5 * d + 0.5 * predict(1.0 * x, s))
    return x


def _branches(x: Any, nodes: Any, predict: Any, noise: Any) -> Any:
    return x if x > 0 else predict(x, nodes[0])


GOOD = Sampler("good", _good, 1)


def failed(sampler: Sampler, **options: Any) -> set[str]:
    return {name for name, check in CHECKS.items() if not check(sampler, options).passed}


def test_a_good_sampler_passes_everything() -> None:
    assert failed(GOOD) == set()


@pytest.mark.parametrize(
    ("sampler", "must"),
    [
        (Sampler("twice the order", _good, 2), {"order", "start"}),
        (Sampler("fed time", _grows_t, 1), {"point_mass", "path_invariance", "order"}),
        (Sampler("too much noise", _noisy, 1), {"point_mass", "order"}),
        (Sampler("two calls", _twice, 1), {"calls", "functional"}),
        (Sampler("branches", _branches, 1), set(CHECKS)),
    ],
    ids=lambda e: e.name if isinstance(e, Sampler) else "",
)
def test_a_bad_sampler_fails_where_it_should(sampler: Sampler, must: set[str]) -> None:
    assert must <= failed(sampler)


def test_an_option_can_break_a_sampler() -> None:
    assert {"point_mass", "order"} <= failed(GOOD, scale=1.01)


def test_a_failure_inside_a_check_is_its_result() -> None:
    result = CHECKS["point_mass"](Sampler("branches", _branches, 1), {})
    assert isinstance(result, Result) and "TraceError: the loop branches" in str(result)


def test_certificate_of_a_multistep_method() -> None:
    found = certify("dpmpp", {"order": 2})
    assert found.passed and found.measured == pytest.approx(2.0, abs=0.1) and found.declared == 2
    assert (found.depth, found.registers, found.draws) == (2, 0, 0)
    assert "dpmpp_2m_sde(eta=0.0)" in found.same
    assert found.calls == ((1, 1), (5, 5), (10, 10))


def test_equality_classes() -> None:
    from diffaccel.testing.certify import equal_methods

    assert "ddpm" in equal_methods(find("ddim"), {"eta": 1.0})
    assert "ddpm" not in equal_methods(find("ddim"), {"eta": 0.5})
    assert "dpmpp(order=1)" in equal_methods(GOOD, {}), "one method, whatever the loop or the space of its rows"
    assert equal_methods(GOOD, {"scale": 1.01}) == ()


def test_find_takes_names_loops_and_samplers() -> None:
    assert find("heun").name == "heun"
    assert find("diffaccel.samplers.ddim:ddpm").name == "ddpm"
    assert find(f"{__name__}:GOOD") is GOOD if __name__ in sys.modules else True


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("heum", "Did you mean 'heun'"),
        ("no.such.module:f", "cannot certify 'no.such.module:f'"),
        ("diffaccel.samplers.ddim:nothing", "has no attribute 'nothing'"),
        ("diffaccel.samplers.ddim:ancestral", "is not registered: put @diffaccel.sampler"),
    ],
)
def test_what_cannot_be_certified(target: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        find(target)


def test_main_prints_and_its_status_tells(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", "ddim", "eta=0.5"]) == 0
    printed = capsys.readouterr().out
    assert "sampler          ddim(eta=0.5)" in printed and "11 of 11 checks passed" in printed
    assert main(["certify", "ddim", "eta=2"]) == 2
    assert "eta must lie in [0, 1]" in capsys.readouterr().err


def test_main_reports_failures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from diffaccel.samplers import registry

    monkeypatch.setitem(registry.REGISTRY, "wrong", Sampler("wrong", _grows_t, 1))
    assert main(["certify", "wrong"]) == 1
    assert "FAILED  point_mass" in capsys.readouterr().out


def test_importing_testing_costs_no_torch() -> None:
    code = "import sys, diffaccel.testing as t; t.four_modes, t.CHECKS, t.Certificate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
