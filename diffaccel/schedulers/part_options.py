"""Named schedulers that are a rewriter or a policy: their options stand beside the scheduler's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import OptionError
from ..samplers.parts import Part, Register
from ..samplers.rewrite import REWRITERS, read
from .policy import POLICIES


def with_part(cls: Any, config: Mapping[str, Any], given: dict[str, Any], own: set[str]) -> dict[str, Any]:
    """`given` with the options of the class's rewriter or policy put into `rewrite=` or `policy=`.

    Args:
        cls: a scheduler class with `rewriter_name` or `policy_name`, or neither.
        config: what the scheduler is built from; one of ours may hold the part already.
        given: the arguments of `from_config`.
        own: names of the scheduler's own arguments, which come first.

    Raises:
        OptionError: if the part's options are missing.
    """
    read(None)  # so that all rewriters are registered
    for key, name, register in (("rewrite", cls.rewriter_name, REWRITERS), ("policy", cls.policy_name, POLICIES)):
        if name:
            given = _with(key, name, register, config, given, own)
    return given


def _with(
    key: str, name: str, register: Register, config: Mapping[str, Any], given: dict[str, Any], own: set[str]
) -> dict[str, Any]:
    listed = register.read(given.get(key, config.get(key)))
    names = [p.name for p in register.kinds[name].parameters]
    options = {k: v for k, v in given.items() if k in names and k not in own}
    there = next((part for part in listed if part.name == name), None)
    if options and there is not None and key in given:
        raise OptionError(f"{name!r} is given twice: as {key}=[{there}] and by {', '.join(options)}")
    made = Part(name, {**(there.options if there is not None else {}), **options})
    others = [part for part in listed if part.name != name]
    rest = {k: v for k, v in given.items() if k not in options}
    return {**rest, key: [part.to_config() for part in register.read([*others, made])]}
