"""Every registered sampler, with its defaults and each of its variants, goes through every check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from diffaccel.core.table import Mix, Row, Table
from diffaccel.samplers.registry import Sampler, samplers
from diffaccel.testing.checks import CHECKS, draws
from diffaccel.testing.runs import PATHS, point_mass_error, traced, unroll

# Settings that users choose and that are no variant of their sampler.
CHOSEN: dict[str, tuple[dict[str, Any], ...]] = {
    "deis": ({"order": 4, "lower_order_final": False},),
    "ghvb": ({"order": 2.7},),
    "heun": ({"s_churn": 4.0, "s_tmin": 0.05, "s_tmax": 50.0}, {"s_churn": 20.0}),
    "unipc": ({"order": 3}, {"order": 3, "variant": "bh1"}, {"order": 3, "space": "eps"}),
}
CASES = [(s, o) for s in samplers().values() for o in (*s.settings, *CHOSEN.get(s.name, ()))]
IDS = [f"{s.name}-{'-'.join(f'{k}={v}' for k, v in options.items()) or 'default'}" for s, options in CASES]
each_case = pytest.mark.parametrize(("sampler", "options"), CASES, ids=IDS)


@pytest.mark.parametrize("name", CHECKS)
@each_case
def test_check(sampler: Sampler, options: dict[str, Any], name: str) -> None:
    result = CHECKS[name](sampler, options)
    assert result.passed, str(result)


# ---------------------------------------------------------------------- the checks notice what they are there for
def coefficients(table: Table) -> Iterator[tuple[str, Callable[[float], Table]]]:
    """(label, table with that coefficient times a factor) for every nonzero coefficient."""
    for i, row in enumerate(table.rows):
        for where, mix, put in _mixes(row):
            for label, change in _terms(mix):

                def changed(f: float, i: int = i, put: Any = put, change: Any = change) -> Table:
                    return replace(table, rows=(*table.rows[:i], put(change(f)), *table.rows[i + 1 :]))

                yield f"row {i}, {where} {label}", changed


def _mixes(row: Row) -> Iterator[tuple[str, Mix, Callable[[Mix], Row]]]:
    yield "state", row.out, lambda m: replace(row, out=m)
    for k, (slot, mix) in enumerate(row.registers):
        before, after = row.registers[:k], row.registers[k + 1 :]

        def put(m: Mix, before: Any = before, slot: int = slot, after: Any = after) -> Row:
            return replace(row, registers=(*before, (slot, m), *after))

        yield f"register {slot}", mix, put


def _terms(mix: Mix) -> Iterator[tuple[str, Callable[[float], Mix]]]:
    if mix.x:
        yield "x", lambda f: replace(mix, x=f * mix.x)
    for j, c in enumerate(mix.p):
        if c:
            yield f"p[{j}]", lambda f, j=j, c=c: replace(mix, p=(*mix.p[:j], f * c, *mix.p[j + 1 :]))
    for name in ("m", "z"):
        pairs = getattr(mix, name)
        for j, (key, c) in enumerate(pairs):
            yield (
                f"{name}[{key}]",
                lambda f, n=name, v=pairs, j=j, k=key, c=c: replace(mix, **{n: (*v[:j], (k, f * c), *v[j + 1 :])}),
            )


@each_case
def test_every_coefficient_counts(sampler: Sampler, options: dict[str, Any]) -> None:
    """One coefficient of the wrong sign, or 0.1 % off, anywhere in a table is found on data that is one point."""
    table = traced(sampler, options, PATHS["vp"], 6, "linspace_open", "sigma_min")
    right = unroll(table)
    assert point_mass_error(table) < 1e-9
    tried = 0
    for label, changed in coefficients(table):
        for factor in (-1.0, 1.001):
            wrong = changed(factor)
            # The law of a draw is symmetric; a register may be written once more than it is read.
            if (factor == -1 and " z[" in label) or np.array_equal(unroll(wrong), right):
                continue
            tried += 1
            assert point_mass_error(wrong) > 1e-7, f"{label} times {factor} goes unnoticed"
    assert tried >= 2 * len(table)


class Mutant:
    """A sampler whose tables are changed."""

    def __init__(self, sampler: Sampler, change: Callable[[Table], Table]) -> None:
        self._sampler, self._change = sampler, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def trace(self, *args: Any, **options: Any) -> Table:
        return self._change(self._sampler.trace(*args, **options))


def shifted(table: Table) -> Table:
    """A tenth of each row's weight on the last prediction is moved to the current one: still exact on one point."""

    def shift(row: Row) -> Row:
        p = row.out.p
        if len(p) < 2:
            return row
        return replace(row, out=replace(row.out, p=(p[0] + 0.1 * p[1], 0.9 * p[1], *p[2:])))

    return replace(table, rows=tuple(shift(r) for r in table.rows))


HIGHER = [
    pytest.param(s, o, id=i)
    for (s, o), i in zip(CASES, IDS, strict=True)
    if s.order_of(**o) >= 2 and any(len(r.out.p) > 1 for r in traced(s, o, PATHS["edm"], 9, "karras").rows)
]


@pytest.mark.parametrize(("sampler", "options"), HIGHER)
def test_order_notices_wrong_history_weights(sampler: Sampler, options: dict[str, Any]) -> None:
    mutant: Any = Mutant(sampler, shifted)
    result = CHECKS["order"](mutant, options)
    assert not result.passed, f"declared {sampler.order_of(**options)}: {result}"
    assert result.value < 1.5, str(result)


def test_cases_cover_both_kinds() -> None:
    kinds = {draws(sampler, options) for sampler, options in CASES}
    assert kinds == {True, False}
    assert len(HIGHER) >= 10
