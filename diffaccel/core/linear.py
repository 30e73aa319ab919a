"""Symbolic linear combinations: what a sampler loop computes with while it is traced."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from ..errors import TraceError

Coef = float | np.ndarray  # an array has the shape of one sample, or broadcasts to it
Symbol = tuple[str, int]  # ("x", call), ("p", call), ("z", draw), ("m", version), ("1", 0)
ONE: Symbol = ("1", 0)
CANCELS = 1e-14  # a sum this much smaller than its parts is rounding: it must not deepen the history


def is_zero(c: Coef) -> bool:
    """Whether a coefficient is exactly zero everywhere."""
    return not np.any(c) if isinstance(c, np.ndarray) else c == 0.0


def _add(a: Coef, b: Coef) -> Coef:
    total = a + b
    small = np.abs(total) <= CANCELS * np.maximum(np.abs(a), np.abs(b)) if _arrays(a, b) else _cancels(total, a, b)
    return 0.0 if np.all(small) else total


def _arrays(a: Coef, b: Coef) -> bool:
    return isinstance(a, np.ndarray) or isinstance(b, np.ndarray)


def _cancels(total: Any, a: Any, b: Any) -> bool:
    return bool(abs(total) <= CANCELS * max(abs(a), abs(b)))


def as_coef(value: Any) -> Coef:
    """A Python float for anything scalar (numpy, 0-d or 1-element tensors), a float64 array otherwise.

    Raises:
        TraceError: if the value is not a finite real number or array.
    """
    if isinstance(value, (int, float)):
        out: Coef = float(value)
    else:
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
        if array.dtype.kind not in "biuf":
            raise TraceError(f"a coefficient of type {type(value).__name__} has no place in a table")
        out = float(array.reshape(())) if array.size == 1 else array.astype(np.float64)
    if not (math.isfinite(out) if isinstance(out, float) else np.all(np.isfinite(out))):
        raise TraceError("a coefficient became infinite or NaN; a step at alpha = 0 or sigma = 0 needs its own rule")
    return out


def fit(c: Coef, like: Any) -> Any:
    """A coefficient in the array family of `like`: an array becomes a tensor beside a tensor, all else stays."""
    if not isinstance(c, np.ndarray) or isinstance(like, (np.ndarray, Linear)):
        return c
    return like.new_tensor(c) if hasattr(like, "new_tensor") else c


class Linear:
    """A linear combination of symbols. Supports + - and multiplication or division by numbers, nothing else."""

    __slots__ = ("owner", "terms")
    __array_ufunc__ = None  # numpy scalars and arrays on the left hand over to __rmul__ etc.
    __array_priority__ = 1000

    def __init__(self, terms: dict[Symbol, Coef], owner: Any = None) -> None:
        self.terms = terms
        self.owner = owner

    # ------------------------------------------------------------------ arithmetic
    def _plus(self, other: Any, sign: float) -> Linear:
        added = other.terms if isinstance(other, Linear) else {ONE: as_coef(other)}
        terms = dict(self.terms)
        for key, c in added.items():
            total = _add(terms[key], sign * c) if key in terms else sign * c
            if is_zero(total):
                terms.pop(key, None)
            else:
                terms[key] = total
        return Linear(terms, self.owner)

    def __add__(self, other: Any) -> Linear:
        return self._plus(other, 1.0)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Linear:
        return self._plus(other, -1.0)

    def __rsub__(self, other: Any) -> Linear:
        return (self * -1.0)._plus(other, 1.0)

    def __neg__(self) -> Linear:
        return self * -1.0

    def __pos__(self) -> Linear:
        return self

    def __mul__(self, factor: Any) -> Linear:
        if isinstance(factor, Linear):
            raise TraceError("the loop multiplies two traced values; a table holds only linear combinations")
        f = factor if type(factor) is float and math.isfinite(factor) else as_coef(factor)
        return Linear({} if is_zero(f) else {k: c * f for k, c in self.terms.items()}, self.owner)

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> Linear:
        if isinstance(factor, Linear):
            raise TraceError("the loop divides by a traced value; a table holds only linear combinations")
        f = as_coef(factor)
        if np.any(np.asarray(f) == 0):
            raise TraceError("the loop divides a traced value by zero")
        return Linear({k: c / f for k, c in self.terms.items()}, self.owner)

    def substitute(self, symbol: Symbol, value: Linear) -> Linear:
        """This combination with `symbol` replaced by `value`."""
        if symbol not in self.terms:
            return self
        rest = Linear({k: c for k, c in self.terms.items() if k != symbol}, self.owner)
        return rest + value * self.terms[symbol]

    # ------------------------------------------------------------------ what cannot be traced, with the reason
    def _refuse(self, *_: Any) -> NoReturn:
        raise TraceError(
            "the loop branches on a traced value (its sign, size or truth); a table is decided before the run. "
            "Decide from the nodes instead, or write this part as a policy."
        )

    __bool__ = __lt__ = __le__ = __gt__ = __ge__ = __float__ = __int__ = __len__ = __iter__ = _refuse

    def __eq__(self, other: object) -> bool:
        return self is other  # `x is old` and containers work; by-value comparison is refused through `==` on terms

    __hash__ = object.__hash__

    def __pow__(self, _: Any) -> Linear:
        raise TraceError("the loop raises a traced value to a power; a table holds only linear combinations")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise TraceError(f"the loop asks for `.{name}` of a traced value, which has no shape, dtype or content")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Let tensors on the left (`sigma * x`) and torch.lerp reach the arithmetic above."""
        name = getattr(func, "__name__", str(func)).strip("_")
        rules: dict[str, Callable[..., Any]] = {
            "add": lambda a, b, alpha=1: a + b * alpha,
            "radd": lambda a, b: b + a,
            "sub": lambda a, b, alpha=1: a - b * alpha,
            "rsub": lambda a, b, alpha=1: b - a * alpha,
            "mul": lambda a, b: b * a if isinstance(b, Linear) else a * b,
            "rmul": lambda a, b: b * a if isinstance(b, Linear) else a * b,
            "div": lambda a, b: a / b,
            "truediv": lambda a, b: a / b,
            "true_divide": lambda a, b: a / b,
            "lerp": lambda a, b, w: a + (b - a) * w,
        }
        if name not in rules:
            raise TraceError(f"the loop calls torch.{name} on a traced value; a table holds only linear combinations")
        args = tuple(a if isinstance(a, Linear) or not hasattr(a, "detach") else as_coef(a) for a in args)
        return rules[name](*args, **(kwargs or {}))


def carry(value: Any) -> Any:
    """Mark a running value (a momentum, an average) to be kept as one register instead of N stored predictions.

    With numbers or tensors it returns `value` unchanged.
    """
    return value.owner.carry(value) if isinstance(value, Linear) and value.owner is not None else value
