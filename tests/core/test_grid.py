"""Grids: every grid on every path and number of calls, the published formulas, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from diffaccel.core.given_nodes import from_sigmas, from_timesteps
from diffaccel.core.grid import AYS, GRIDS, nodes
from diffaccel.core.path import Nodes, Path
from diffaccel.errors import OptionError, PathError
from diffaccel.testing.runs import PATHS, SD_BETAS, accepts

PAIRS = [(p, g) for p in PATHS for g in GRIDS if accepts(PATHS[p], g)]
VP = PATHS["vp"]


def levels(found: Nodes) -> np.ndarray:
    return np.array([n.level for n in found])


# ---------------------------------------------------------------------- every grid
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize(("path", "grid"), PAIRS)
def test_any_number_of_calls_gives_falling_nodes(path: str, grid: str, final: str) -> None:
    for calls in range(1, 51):
        found = nodes(PATHS[path], calls, grid, final=final)
        assert len(found) == calls + 1 and found.path is PATHS[path]
        rise = np.diff(levels(found)[levels(found) < math.inf])
        assert np.all(rise <= 1e-9 * levels(found)[-2])
        assert all(math.isfinite(n.t) for n in found)
        if final == "zero":
            assert (found[-1].alpha, found[-1].sigma) == (1.0, 0.0)
            assert found[-2].sigma > 0
        else:
            assert found[-1].sigma > 0


# Flow paths stretch their grids to an end of their own, and so does a published schedule.
CLOSED = [(p, g) for p, g in PAIRS if GRIDS[g][1] and g != "ays" and PATHS[p].family != "flow"]


@pytest.mark.parametrize(("path", "grid"), CLOSED)
def test_closed_grids_end_at_the_cleanest_node(path: str, grid: str) -> None:
    found = nodes(PATHS[path], 7, grid, final="sigma_min")
    assert found[-1].level == pytest.approx(PATHS[path].last.level, rel=1e-9)


# ---------------------------------------------------------------------- formulas
def test_diffusers_time_spacings() -> None:
    assert [n.t for n in nodes(VP, 10, "trailing")[:-1]] == [999 - 100 * i for i in range(10)]
    assert [n.t for n in nodes(VP, 10, "leading", offset=1)[:-1]] == [901 - 100 * i for i in range(10)]
    assert [n.t for n in nodes(VP, 10, "leading")[:-1]] == [900 - 100 * i for i in range(10)]
    np.testing.assert_array_equal([n.t for n in nodes(VP, 7, "linspace")[:-1]], np.linspace(0, 999, 7).round()[::-1])
    np.testing.assert_array_equal(
        [n.t for n in nodes(VP, 7, "linspace_open")[:-1]], np.linspace(0, 999, 8).round()[:0:-1]
    )


def test_flow_trailing_is_the_published_schedule() -> None:
    sigmas = [n.sigma for n in nodes(Path.flow(), 8, "trailing")[:-1]]
    np.testing.assert_allclose(sigmas, np.linspace(1, 1 / 8, 8), rtol=1e-12)
    shifted = [n.sigma for n in nodes(Path.flow(3.0), 8, "trailing")[:-1]]
    u = np.linspace(1, 1 / 8, 8)
    np.testing.assert_allclose(shifted, 3 * u / (1 + 2 * u), rtol=1e-12)


def test_terminal_shift_stretches_the_last_node() -> None:
    found = nodes(PATHS["flow_terminal"], 8, "trailing")
    assert found[0].sigma == 1 and found[-2].sigma == pytest.approx(0.02, rel=1e-12)


def test_uniform_lambda_is_uniform() -> None:
    lams = [n.lam for n in nodes(VP, 9, "uniform_lambda", final="sigma_min")]
    np.testing.assert_allclose(np.diff(lams), np.diff(lams)[0], rtol=1e-9)
    assert lams[0] == VP.first.lam and lams[-1] == VP.last.lam


def test_uniform_lambda_keeps_pure_noise_first() -> None:
    found = nodes(Path.flow(), 6, "uniform_lambda")
    assert found[0].alpha == 0 and all(n.alpha > 0 for n in found[1:])


@pytest.mark.parametrize("rho", [3.0, 7.0])
def test_karras(rho: float) -> None:
    found = levels(nodes(Path.edm(0.002, 80), 12, "karras", rho=rho)[:-1])
    i = np.arange(12) / 11
    true = (80 ** (1 / rho) + i * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    np.testing.assert_allclose(found, true, rtol=1e-12)


def test_exponential_and_beta() -> None:
    np.testing.assert_allclose(
        np.diff(np.log(levels(nodes(Path.edm(), 9, "exponential")[:-1]))), math.log(0.002 / 80) / 8
    )
    from scipy.stats import beta

    found = [n.sigma for n in nodes(Path.flow(), 9, "beta")[:-1]]
    np.testing.assert_allclose(found, 0.001 + 0.999 * beta.ppf(1 - np.linspace(0, 1, 9), 0.6, 0.6), rtol=1e-9)


def test_grids_stretched_within_a_time_spacing() -> None:
    found = nodes(VP, 10, "karras", within="leading", offset=1)
    assert found[0].level == pytest.approx(VP.at(901).level) and found[-2].level == pytest.approx(VP.at(1).level)


@pytest.mark.parametrize("model", AYS)
def test_ays_at_ten_calls_is_the_published_table(model: str) -> None:
    path = Path.edm(0.002, 1000) if model == "svd" else VP
    found = levels(nodes(path, 10, "ays", model=model)[:-1])
    np.testing.assert_allclose(found[1:], AYS[model][1:], rtol=1e-9)
    assert found[0] <= AYS[model][0]


def test_mid_lies_between_time_and_lam() -> None:
    timed, even = (nodes(VP, 9, g, **o) for g, o in (("linspace", {"rounded": False}), ("uniform_lambda", {})))
    half = nodes(VP, 9, "mid", w=0.5)
    for a, b, m in list(zip(timed, even, half, strict=True))[:-1]:
        assert m.lam == pytest.approx((a.lam + b.lam) / 2, abs=1e-9)


# ---------------------------------------------------------------------- the user's own
def test_own_sigmas_and_timesteps() -> None:
    found = from_sigmas(Path.flow(3.0), [1.0, 0.5, 0.25])
    np.testing.assert_allclose([n.sigma for n in found], [1.0, 0.75, 0.5, 0.0])
    np.testing.assert_allclose([n.sigma for n in from_sigmas(Path.flow(3.0), [1.0, 0.5], warp=False)], [1.0, 0.5, 0.0])
    np.testing.assert_allclose(levels(from_sigmas(VP, [14.0, 3.0, 0.0])), [14.0, 3.0, 0.0])
    assert from_sigmas(VP, [14.0, 3.0], final="sigma_min")[-1].key == VP.last.key
    assert [n.t for n in from_timesteps(VP, [999, 500, 20])][:3] == [999, 500, 20]
    assert from_timesteps(VP, [999, 0], final="sigma_min")[-1].sigma == 0, "at the cleanest node only sigma = 0 is left"


def test_own_nodes_may_repeat() -> None:
    assert len(from_timesteps(VP, [999, 500, 500, 20])) == 5


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nodes(VP, 0), "integer of 1 or more, got 0"),
        (lambda: nodes(VP, True), "integer of 1 or more, got True"),
        (lambda: nodes(VP, 2.0), r"integer of 1 or more, got 2\.0"),  # type: ignore[arg-type]
        (lambda: nodes(VP, 5, "karas"), "unknown grid 'karas'. Did you mean 'karras'"),
        (lambda: nodes(VP, 5, final="end"), "unknown final 'end'"),
        (lambda: nodes(VP, 5, "karras", roh=7), "takes no option 'roh'. Did you mean 'rho'"),
        (lambda: nodes(VP, 5, "karras", sigma_min=3.0, sigma_max=2.0), "0 < sigma_min < sigma_max, got 3 and 2"),
        (lambda: nodes(VP, 1001), "1001 nodes were asked of a path with 1000 training steps"),
        (lambda: nodes(VP, 5, "mid", w=1.5), r"w must lie in \[0, 1\]"),
        (lambda: nodes(VP, 5, "flow_stock"), "'flow_stock' is for flow paths"),
        (lambda: nodes(Path.flow(), 5, "ays"), "not for flow models"),
        (lambda: nodes(VP, 5, "ays", model="sd3"), "unknown Align-Your-Steps table 'sd3'"),
        (lambda: from_sigmas(VP, []), "one or more finite values"),
        (lambda: from_sigmas(VP, [1.0, math.nan]), "one or more finite values"),
        (lambda: from_sigmas(VP, [1.0, 2.0]), "node 0 .* is followed by one with .*sigma/alpha = 2"),
        (lambda: from_sigmas(VP, [1.0, 0.0, 0.0]), "positive, but for one 0 at the end"),
        (lambda: from_sigmas(Path.flow(), [1.5, 0.5]), r"flow sigmas lie in \(0, 1\], got 1\.5"),
        (lambda: from_timesteps(VP, [10, 20]), "noise must fall"),
        (lambda: from_timesteps(VP, []), "timesteps must be one or more"),
    ],
)
def test_bad_input_says_what_is_wrong(make: Callable[[], object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_a_timestep_off_the_path_is_refused() -> None:
    with pytest.raises(PathError, match=r"t = 1000\.0 lies outside"):
        from_timesteps(Path.vp(SD_BETAS), [1000, 500])


# ---------------------------------------------------------------------- a grid for each number of calls
def test_by_calls_is_the_grid_of_the_nearest_number_of_calls() -> None:
    held = {"5": {"grid": "karras", "grid_options": {"rho": 4.0}}, "10": {"grid": "trailing"}, "8": {"grid": "mid"}}
    for calls, name, options in (
        (5, "karras", {"rho": 4.0}),
        (1, "karras", {"rho": 4.0}),
        (6, "karras", {"rho": 4.0}),
        (7, "mid", {}),
        (9, "trailing", {}),
        (50, "trailing", {}),
    ):
        for final in ("zero", "sigma_min"):
            found = nodes(VP, calls, "by_calls", final=final, grids=held)
            assert [n.key for n in found] == [n.key for n in nodes(VP, calls, name, final=final, **options)], calls
    with pytest.raises(OptionError, match="needs grids"):
        nodes(VP, 5, "by_calls")
    with pytest.raises(OptionError, match="unknown grid 'best'"):
        nodes(VP, 5, "by_calls", grids={"5": {"grid": "best"}})
