"""Symbolic combinations: the arithmetic, and everything that no table can hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffaccel.core.linear import ONE, Linear, as_coef, carry
from diffaccel.errors import TraceError

X, P = ("x", 0), ("p", 0)
number = st.floats(-10, 10).filter(lambda v: abs(v) > 1e-3)


def pair() -> tuple[Linear, Linear]:
    return Linear({X: 1.0}), Linear({P: 1.0})


@given(number, number, number)
def test_arithmetic_is_that_of_vectors(a: float, b: float, c: float) -> None:
    x, p = pair()
    got = c - (a * x - p * b) / c + (+x) - (-p)
    want = {X: 1 - a / c, P: 1 + b / c, ONE: c}
    for key, value in want.items():
        assert got.terms.get(key, 0.0) == pytest.approx(value, abs=1e-12)
    assert set(got.terms) <= set(want)
    assert x.terms == {X: 1.0} and p.terms == {P: 1.0}, "operands stay as they were"


def test_what_cancels_leaves_no_term() -> None:
    x, p = pair()
    assert (0.1 * x + 0.2 * x - 0.3 * x + p).terms == {P: 1.0}
    assert (x * 0.0).terms == {}
    assert (x + np.array([1.0, -1.0]) * p - p * np.array([1.0, -1.0])).terms == {X: 1.0}


def test_numbers_of_every_library_are_floats() -> None:
    x, _ = pair()
    for two in (2, 2.0, np.float32(2), np.float64(2), np.array(2.0), np.array([2]), torch.tensor(2.0), True + 1):
        for product in (two * x, x * two, x + (two - 1) * x):
            assert product.terms == {X: 2.0} and type(product.terms[X]) is float
    assert (x / np.float32(4)).terms == {X: 0.25}


def test_arrays_stay_arrays() -> None:
    x, _ = pair()
    u = np.arange(1.0, 4.0)
    for product in (u * x, x * u, torch.tensor(u) * x):
        np.testing.assert_array_equal(product.terms[X], u)
    np.testing.assert_array_equal((x + u).terms[ONE], u)


def test_torch_functions_reach_the_arithmetic() -> None:
    x, p = pair()
    assert torch.lerp(x, p, 0.25).terms == {X: 0.75, P: 0.25}
    assert torch.add(x, p, alpha=2.0).terms == {X: 1.0, P: 2.0}
    assert torch.sub(x, p, alpha=2.0).terms == {X: 1.0, P: -2.0}
    assert (torch.tensor(3.0) - x).terms == {ONE: 3.0, X: -1.0}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, p: x * p, "multiplies two traced values"),
        (lambda x, p: x / p, "divides by a traced value"),
        (lambda x, p: x / 0.0, "divides a traced value by zero"),
        (lambda x, p: x / np.array([1.0, 0.0]), "divides a traced value by zero"),
        (lambda x, p: x**2, "raises a traced value to a power"),
        (lambda x, p: 1 if x > 0 else 0, "branches on a traced value"),
        (lambda x, p: x <= p, "branches on a traced value"),
        (lambda x, p: bool(x), "branches on a traced value"),
        (lambda x, p: max(x, p), "branches on a traced value"),
        (lambda x, p: float(x), "branches on a traced value"),
        (lambda x, p: len(x), "branches on a traced value"),
        (lambda x, p: list(x), "branches on a traced value"),
        (lambda x, p: x.shape, r"asks for `\.shape`"),
        (lambda x, p: x.mean(), r"asks for `\.mean`"),
        (lambda x, p: torch.clamp(x, -1, 1), "torch.clamp"),
        (lambda x, p: torch.exp(x), "torch.exp"),
        (lambda x, p: x * math.inf, "infinite or NaN"),
        (lambda x, p: x + math.nan, "infinite or NaN"),
        (lambda x, p: x * np.array([1.0, np.inf]), "infinite or NaN"),
        (lambda x, p: x * "2", "type str has no place"),
        (lambda x, p: x * 1j, "type complex has no place"),
    ],
)
def test_what_no_table_can_hold_fails_with_its_reason(wrong: Callable[..., Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        wrong(*pair())


def test_a_numpy_function_of_a_traced_value_fails() -> None:
    x, _ = pair()
    with pytest.raises(TypeError):
        np.exp(x)


def test_equality_is_identity() -> None:
    x, _ = pair()
    assert x == x and x != Linear({X: 1.0}) and x in [x]


def test_substitute() -> None:
    x, p = pair()
    assert (2.0 * x + p).substitute(X, 3.0 * p).terms == {P: 7.0}
    assert p.substitute(X, x).terms == {P: 1.0}


def test_carry_leaves_numbers_alone() -> None:
    value = np.ones(3)
    assert carry(value) is value and carry(1.5) == 1.5


def test_as_coef_detaches_tensors() -> None:
    assert as_coef(torch.tensor(1.5, requires_grad=True)) == 1.5
