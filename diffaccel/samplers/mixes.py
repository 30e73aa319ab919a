"""Arithmetic of the combinations that rows are made of, for rewriters that edit tables."""

from __future__ import annotations

from collections.abc import Mapping

from ..core.linear import Coef, is_zero
from ..core.table import Mix


def times(mix: Mix, factor: Coef) -> Mix:
    """`factor * mix`."""
    if is_zero(factor):
        return Mix()
    m, z = (tuple((k, c * factor) for k, c in entry) for entry in (mix.m, mix.z))
    return Mix(mix.x * factor, tuple(c * factor for c in mix.p), m, z, mix.one * factor)


def plus(a: Mix, b: Mix) -> Mix:
    """`a + b`."""
    depth = max(len(a.p), len(b.p))
    p = [_at(a.p, j) + _at(b.p, j) for j in range(depth)]
    return Mix(a.x + b.x, tuple(p), _merged(a.m, b.m), _merged(a.z, b.z), a.one + b.one)


def reduced(mix: Mix, registers: Mapping[int, Mix]) -> Mix:
    """`mix` with the new values of registers replaced by their definitions, which use old values."""
    found = Mix(mix.x, mix.p, tuple((k, c) for k, c in mix.m if k not in registers), mix.z, mix.one)
    for k, c in mix.m:
        if k in registers:
            found = plus(found, times(registers[k], c))
    return found


def _at(values: tuple[Coef, ...], j: int) -> Coef:
    return values[j] if j < len(values) else 0.0


def _merged(a: tuple[tuple[int, Coef], ...], b: tuple[tuple[int, Coef], ...]) -> tuple[tuple[int, Coef], ...]:
    total: dict[int, Coef] = dict(a)
    for k, c in b:
        total[k] = total.get(k, 0.0) + c
    return tuple((k, c) for k, c in sorted(total.items()) if not is_zero(c))
