"""Dynamic compensation as a rewriter of the history."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffaccel.core.grid import nodes as grid_nodes
from diffaccel.core.path import Path
from diffaccel.errors import ArtifactError, OptionError
from diffaccel.samplers.dc import PARENTS, Found, Ratios, compensate
from diffaccel.samplers.registry import get
from diffaccel.testing.problems import four_modes
from diffaccel.testing.runs import PATHS

ratio = st.floats(0.3, 2.0)
SD = PATHS["vp"]


def on(n, path=SD, grid="linspace_open", final="zero"):
    return grid_nodes(path, n, grid, final=final)


@pytest.mark.parametrize("parent", PARENTS)
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_ratios_of_one_change_nothing(parent, n):
    points = on(n)
    plain = get(parent).trace(points)
    assert get(PARENTS[parent]).trace(points, ratios=[1.0] * n) == plain == get(PARENTS[parent]).trace(points)


@settings(max_examples=30, deadline=None)
@given(
    data=st.data(),
    n=st.integers(3, 9),
    k=st.integers(1, 3),
    order=st.integers(1, 3),
    name=st.sampled_from(["dc", "dc_dpmpp"]),
)
def test_the_table_is_the_loop_and_remembers_little(data, n, k, order, name):
    rho = data.draw(st.lists(ratio, min_size=n, max_size=n))
    points = on(n, final="sigma_min")
    options = {"dc_order": k, "order": order, "ratios": rho}
    x = np.random.default_rng(0).standard_normal((3, 2))
    problem = four_modes()
    table = get(name).trace(points, **options)
    seen = []

    def predict(state, node):
        seen.append(state)
        return problem.denoise(state, node)

    end = get(name).run(x, points, predict, **options)
    states = table.apply(x, problem.predict, trajectory=True)
    np.testing.assert_allclose(np.stack([*seen, end]), np.stack(states), rtol=1e-9, atol=1e-9)
    assert table.depth <= max(order, k, 2) + 1 and table.slots <= max(order, k) + 1


@pytest.mark.parametrize("name", PARENTS.values())
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("path", PATHS)
def test_finite_everywhere(name, path, final):
    grids = ["linspace_open", "uniform_lambda", "karras", "mid"]
    for grid in grids:
        for n in (1, 2, 3, 20):
            points = grid_nodes(PATHS[path], n, grid, final=final)
            rho = np.random.default_rng(n).uniform(0.5, 1.5, n).tolist()
            x = points[0].sigma * np.random.default_rng(1).standard_normal((2, 2))
            end = get(name).trace(points, ratios=rho).apply(x, four_modes().predict)
            assert np.isfinite(end).all(), (grid, n)


@pytest.mark.parametrize("at", range(1, 7))
def test_an_edit_between_steps_reaches_the_next_state_by_the_rows_a(at):
    """At given outputs; registers and predictions hold no hidden copy of the state."""
    table = get("dc").trace(on(7), ratios=[1, 1, 1.3, 0.8, 1.2, 0.7, 1.1], order=3)
    outputs = np.random.default_rng(0).standard_normal((7, 4, 2))

    def states(edit):
        calls = iter(range(7))

        def predict(state, node, space):
            i = next(calls)
            state += edit if i == at else 0.0  # in place: what a callback or an inpainting pipeline does
            return outputs[i]

        return table.apply(np.zeros((4, 2)), predict, trajectory=True)

    moved = states(1e-3)[at + 1] - states(0.0)[at + 1]
    np.testing.assert_allclose(moved, 1e-3 * table.rows[at].a, rtol=0, atol=1e-15)


def test_a_start_in_the_middle_keeps_each_nodes_ratio_and_forces_one_where_there_is_no_history():
    points = on(8)
    rho = (1.0, 1.0, 1.3, 0.8, 1.2, 0.7, 1.1, 0.9)
    found = Ratios((Found(tuple(p.lam for p in points), rho),), {})
    options = {"sampler": "dc", **get("unipc").defaults, "dc_order": 2}
    held = Ratios(found.runs, options)
    k = 3
    late = get("dc").trace(points[k:], ratios=held)
    assert late == get("dc").trace(points[k:], ratios=[1.0, 1.0, *rho[k + 2 :]])
    assert get("dc").trace(points, ratios=held) == get("dc").trace(points, ratios=list(rho))


def test_ratios_belong_to_calls_grid_and_options():
    points = on(8)
    options = {"sampler": "dc", **get("unipc").defaults, "dc_order": 2}
    held = Ratios((Found(tuple(p.lam for p in points), (1.0,) * 8, 4.0),), options, where="mine.safetensors")
    with pytest.raises(ArtifactError, match=r"mine.safetensors[\s\S]*artifact: 8 calls[\s\S]*this run: 9 calls"):
        get("dc").trace(on(9), ratios=held)
    with pytest.raises(ArtifactError, match=r"artifact: 8 calls at guidance 4.0, lam .*[\s\S]*this run: 8 calls"):
        get("dc").trace(on(8, grid="uniform_lambda"), ratios=held)
    with pytest.raises(ArtifactError, match=r"order is 2 there and 3 here"):
        get("dc").trace(points, ratios=held, order=3)
    with pytest.raises(ArtifactError, match=r"space is 'x0' there and 'eps' here"):
        get("dc").trace(points, ratios=held, space="eps")
    with pytest.raises(ArtifactError, match=r"dc_order is 2 there and 1 here"):
        get("dc").trace(points, ratios=held, dc_order=1)
    with pytest.raises(ArtifactError, match=r"sampler is 'dc' there and 'dc_dpmpp' here"):
        get("dc_dpmpp").trace(points, ratios=held)
    with pytest.raises(ArtifactError, match="no polynomial"):
        get("dc").trace(points, ratios=held, cpr=True)
    with pytest.raises(ArtifactError, match=r"guidance 7.5"):
        get("dc").trace(points, ratios=held, guidance=7.5)


def test_several_guidance_scales_need_one_to_be_named():
    points = on(5)
    lam = tuple(p.lam for p in points)
    options = {"sampler": "dc", **get("unipc").defaults, "dc_order": 2}
    held = Ratios((Found(lam, (1, 1, 1.2, 1, 1), 1.0), Found(lam, (1, 1, 0.8, 1, 1), 4.0)), options)
    with pytest.raises(ArtifactError, match="guidance= one of 1, 4"):
        get("dc").trace(points, ratios=held)
    assert get("dc").trace(points, ratios=held, guidance=4.0) == get("dc").trace(points, ratios=[1, 1, 0.8, 1, 1])
    with pytest.raises(ArtifactError, match="guidance= one of 1, 4"):
        get("dc").trace(points[1:], ratios=held)  # the tail of either


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": [1.0] * 4}, r"a run of 5 calls needs 5 finite ratios, got 4"),
        ({"ratios": [1.0] * 4 + [float("nan")]}, "5 finite ratios"),
        ({"ratios": "cpr"}, "'none' or a list"),
        ({"ratios": 3}, "'none' or a list"),
        ({"dc_order": 4}, "dc_order must be an integer from 1 to 3, got 4"),
        ({"dc_order": True}, "dc_order must be"),
        ({"cpr": True}, "no effect without an artifact"),
        ({"guidance": 2.0}, "no effect without an artifact"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=message):
        get("dc").trace(on(5), **options)


def test_any_sampler_of_one_call_an_interval_can_be_compensated():
    made = compensate("deis", "dc_deis")
    rho = [1.0, 1.0, 1.2, 0.9, 1.1]
    for path in (SD, Path.flow(3.0)):
        points = on(5, path)
        assert made.trace(points, ratios=rho) != made.trace(points)
        assert made.trace(points) == get("deis").trace(points)
    for wrong in ("heun", "ddpm"):
        with pytest.raises(OptionError, match="one call an interval"):
            compensate(wrong, "x")
