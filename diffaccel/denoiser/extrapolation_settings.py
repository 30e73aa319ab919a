"""The options of `diffaccel.extrapolate`, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.extrapolation import COORDINATES, QUANTITIES
from ..core.extrapolation_policy import Gate
from ..core.pattern import Pattern, Regular, parse
from ..errors import OptionError, one_of

Skip = str | Sequence[int] | Callable[[int, int], bool] | None


@dataclass(frozen=True)
class Settings:
    """What a hook does.

    Attributes:
        name: for reports.
        pattern: which steps are skipped; None where the gate or the callable decides.
        gate: decides where it is given.
        rule: `rule(step, nodes)` decides where it is given.
        history: points of the predictor.
        quantity: "output", or a quantity that the output is converted to.
        coordinate: None: "sigma" where the noise levels are known, else "index".
        per_image: whether the gate decides for each image by itself.
        beta: of the stabiliser, or None.
        gradient: FSampler's gradient estimation.
        validate: whether predictions are looked at before they are used; None: where that needs no device to be waited
            for.
        max_ratio: largest norm of a prediction relative to that of the last real answer.
    """

    name: str
    pattern: Pattern | None = None
    gate: Gate | None = None
    rule: Callable[[int, int], bool] | None = None
    history: int = 2
    quantity: str = "output"
    coordinate: str | None = None
    per_image: bool = True
    beta: float | None = None
    gradient: bool = False
    validate: bool | None = None
    max_ratio: float = 50.0


def settings(
    skip: Skip,
    *,
    quantity: str,
    coordinate: str | None,
    protect: Sequence[int] | None,
    tol: float | None,
    anchor: int | None,
    max_consecutive: int | None,
    gate: str | None,
    stabilizer: str | None,
    beta: float | None,
    gradient: bool,
    history: int | None,
    streak_rule: bool,
    validate: bool | None,
    max_ratio: float,
) -> Settings:
    """`Settings` from the options of `extrapolate`; see there.

    Raises:
        OptionError: an option that is unknown, out of range, or without effect on `skip`.
    """
    one_of("quantity", quantity, ("output", *QUANTITIES))
    if coordinate is not None:
        one_of("coordinate", coordinate, COORDINATES)
    if stabilizer is not None:
        one_of("stabilizer", stabilizer, ("ema",))
    adaptive = isinstance(skip, str) and skip.strip().lower() == "adaptive"
    _no_effect(
        skip,
        adaptive,
        {"tol": tol, "anchor": anchor, "max_consecutive": max_consecutive, "gate": gate},
        "of the adaptive gate",
    )
    if beta is not None and stabilizer is None:
        raise OptionError("beta belongs to stabilizer='ema', which is not on")
    if skip is None:
        given = {"protect": protect, "stabilizer": stabilizer, "history": history, "gradient": gradient or None}
        _no_effect(skip, False, given, "of skips, and there are none")
    common: dict[str, Any] = {
        "quantity": quantity,
        "coordinate": coordinate,
        "beta": (0.999 if beta is None else float(beta)) if stabilizer else None,
        "gradient": gradient,
        "validate": validate,
        "max_ratio": float(max_ratio),
    }
    if adaptive:
        _no_effect(skip, False, {"history": history, "streak_rule": streak_rule or None}, "of lists and callables")
        made = _gate(tol, anchor, max_consecutive, protect)
        per_image = one_of("gate", gate or "image", ("image", "batch")) == "image"
        return Settings("adaptive", gate=made, history=3, per_image=per_image, **common)
    if skip is None or callable(skip):
        _no_effect(
            skip, False, {"protect": protect if skip else None, "streak_rule": streak_rule or None}, "of patterns"
        )
        return Settings("no skips" if skip is None else "callable", rule=skip, history=_history(history), **common)
    pattern = parse(skip, tuple(protect or (2, 2)), streak_rule=streak_rule)  # type: ignore[arg-type]
    if protect is not None and not isinstance(pattern, Regular):
        raise OptionError(f"protect has no effect on the explicit nodes {pattern.name!r}")
    if history is not None and isinstance(skip, str):
        raise OptionError(f"history has no effect on {skip!r}, which names its predictor itself")
    points = pattern.history if history is None else _history(history)
    return Settings(pattern.name, pattern=pattern, history=points, **common)


def _gate(tol: float | None, anchor: int | None, most: int | None, protect: Sequence[int] | None) -> Gate:
    first, last = protect or (2, 2)
    default = Gate()
    return Gate(
        default.tol if tol is None else float(tol),
        default.anchor if anchor is None else int(anchor),
        default.max_consecutive if most is None else int(most),
        (int(first), int(last)),
    )


def _history(history: int | None) -> int:
    if history is not None and history not in (2, 3, 4):
        raise OptionError(f"a predictor goes through 2 to 4 answers, not {history!r}")
    return history or 2


def _no_effect(skip: Any, ok: bool, given: dict[str, Any], what: str) -> None:
    set_ = [name for name, value in given.items() if value is not None]
    if set_ and not ok:
        raise OptionError(f"extrapolate(skip={skip!r}): {set_[0]} is an option {what}; it would have no effect here")
