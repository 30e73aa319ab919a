"""The table: text forms, equality, arrays as coefficients, registers, apply."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from diffaccel.core.node import Node
from diffaccel.core.prediction import Affine
from diffaccel.core.table import Mix, Row, Table
from diffaccel.errors import OptionError, RunError

A, B, C = Node(900.0, 0.1, 0.9), Node(500.0, 0.5, 0.5), Node(100.0, 0.9, 0.1)
U = np.array([0.5, -1.0, 2.0])


def full() -> Table:
    """Two rows that use everything: lags, a register, old noise, a constant, arrays, an affine space, a fed time."""
    first = Row(A, B, "x0", Mix(0.5, (0.25,), ((0, 0.125),), ((0, 2.0),)), 901.5, ((0, Mix(p=(1.0,))),), 1)
    update = Mix(p=(0.5,), m=((0, 0.5),))
    last = Row(
        B, C, Affine(U, 2.0), Mix(U, (0.1, 0.2), ((0, 0.3),), ((0, 0.4), (1, 0.5)), U / 4), 500.0, ((0, update),), 1
    )
    return Table((first, replace(last, opens=False)), "full", {"order": 2, "form": "exact"})


def test_apply_is_the_sum_that_the_rows_say() -> None:
    x = np.array([[1.0, 2.0, 3.0], [-1.0, 0.0, 1.0]])
    p, z = [x + 1, x - 2], [0 * x + 0.7, 0 * x - 0.2]
    calls: list[tuple[float, float, Any]] = []

    def predict(state: np.ndarray, node: Node, space: Any) -> np.ndarray:
        calls.append((node.t, node.sigma, space))
        return p[len(calls) - 1]

    fresh = iter(z)
    states = full().apply(x, predict, lambda _: next(fresh), trajectory=True)
    m0 = p[0]
    x1 = 0.5 * x + 0.25 * p[0] + 0.125 * m0 + 2.0 * z[0]
    m1 = 0.5 * p[1] + 0.5 * m0
    x2 = U * x1 + 0.1 * p[1] + 0.2 * p[0] + 0.3 * m1 + 0.4 * z[1] + 0.5 * z[0] + U / 4
    np.testing.assert_allclose(states[1], x1, rtol=1e-14)
    np.testing.assert_allclose(states[2], x2, rtol=1e-14)
    assert [(t, s) for t, s, _ in calls] == [(901.5, 0.9), (500.0, 0.5)] and calls[1][2] == full().rows[1].space
    again = full().apply(x, lambda s, n, _: p[int(n.t < 600)], _twice(z))
    np.testing.assert_array_equal(again, states[2])


def _twice(z: list[np.ndarray]) -> Any:
    fresh = iter(z)
    return lambda _: next(fresh)


def test_tensors_and_arrays_agree() -> None:
    x = np.array([[1.0, 2.0, 3.0]])
    want = full().apply(x, lambda s, n, sp: 0.5 * s, lambda s: 0 * s + 1)
    got = full().apply(torch.tensor(x), lambda s, n, sp: 0.5 * s, lambda s: 0 * s + 1)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-14)
    half = full().apply(torch.tensor(x, dtype=torch.float32), lambda s, n, sp: 0.5 * s, lambda s: 0 * s + 1)
    assert half.dtype == torch.float32


def test_simultaneous_registers_read_old_values() -> None:
    swap = (0, Mix(m=((1, 1.0),))), (1, Mix(m=((0, 1.0),)))
    rows = (
        Row(A, B, "x0", Mix(1.0), 900.0, ((0, Mix(x=1.0)), (1, Mix(p=(1.0,))))),
        Row(B, C, "x0", Mix(m=((0, 1.0), (1, 10.0))), 500.0, swap),
    )
    out = Table(rows).apply(np.array([2.0]), lambda x, n, s: 0 * x + 3.0)
    assert out == 3.0 + 10 * 2.0


def test_sizes() -> None:
    table = full()
    assert (len(table), table.depth, table.slots, table.noise_depth, table.stochastic) == (2, 2, 1, 2, True)
    assert table.timesteps == [901.5, 500.0]
    assert [n.key for n in table.nodes] == [A.key, B.key, C.key]
    assert not table.rows[1].out.scalar and table.rows[0].out.scalar
    empty = Table(())
    assert (len(empty), empty.depth, empty.nodes, empty.stochastic) == (0, 1, [], False)


@pytest.mark.parametrize(
    "again",
    [lambda t: Table.from_json(t.to_json()), lambda t: pickle.loads(pickle.dumps(t)), copy.deepcopy, copy.copy],
    ids=["json", "pickle", "deepcopy", "copy"],
)
def test_every_copy_is_equal_bit_for_bit(again: Any) -> None:
    table = full()
    made = again(table)
    assert made == table and hash(made) == hash(table) and made.to_json() == table.to_json()
    assert (made.sampler, made.options) == (table.sampler, table.options)
    x = np.array([[0.1, 0.2, 0.3]])
    run = [t.apply(x, lambda s, n, sp: np.sin(s), lambda s: s * 0 + 0.3) for t in (made, table)]
    np.testing.assert_array_equal(*run)


def test_floats_keep_every_bit_in_json() -> None:
    odd = [0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, 1 / 3]
    table = Table((Row(A, B, "eps", Mix(odd[0], tuple(odd)), 900.0),))
    assert Table.from_json(table.to_json()).rows[0].out.p == tuple(odd)


def _change(table: Table, **fields: Any) -> Table:
    return replace(table, rows=(table.rows[0], replace(table.rows[1], **fields)))


@pytest.mark.parametrize(
    "fields",
    [
        {"node": Node(500.0, 0.5, 0.5000001)},
        {"next": Node(100.1, 0.9, 0.1)},
        {"space": "x0"},
        {"space": Affine(U, 2.5)},
        {"out": Mix(U)},
        {"t": 499.0},
        {"registers": ()},
        {"draws": 2},
        {"opens": True},
    ],
    ids=lambda f: "-".join(f),
)
def test_every_field_counts_in_equality(fields: dict[str, Any]) -> None:
    changed = _change(full(), **fields)
    assert changed != full() and hash(changed) != hash(full())
    assert Table.from_json(changed.to_json()) == changed


def test_names_do_not_count_in_equality() -> None:
    assert replace(full(), sampler="other", options={}) == full()
    assert full() != full().to_json() and full() != Table(full().rows[:1])


def test_describe_shows_every_row() -> None:
    text = full().describe()
    lines = text.splitlines()
    assert lines[0] == "full(order=2, form='exact'): 2 calls" and len(lines) == 5
    assert "901.5000" in lines[2] and "0.125*m0" in lines[2] and "<3>" in lines[3] and "affine" in lines[3]
    assert lines[4] == "end: alpha = 0.9, sigma = 0.1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "not a diffaccel table: JSONDecodeError"),
        ("{}", "not a diffaccel table: KeyError 'format'"),
        ("[]", "not a diffaccel table: TypeError"),
        (json.dumps({"format": 99}), "has format 99; this version reads format 1"),
        (json.dumps({"format": 1, "sampler": "x", "options": {}, "rows": [{}]}), "not a diffaccel table: KeyError"),
    ],
)
def test_text_that_is_no_table_is_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Table.from_json(text)


def test_a_table_that_draws_needs_noise() -> None:
    with pytest.raises(RunError, match="'full' draws noise: pass noise="):
        full().apply(np.ones((1, 3)), lambda x, n, s: x)
