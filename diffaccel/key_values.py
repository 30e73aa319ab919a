"""Options of the command line that are written `key=value`."""

from __future__ import annotations

import ast
from typing import Any

from .errors import OptionError


def key_values(texts: list[str], flag: str) -> dict[str, Any]:
    """`key=value` pairs; a value is a Python literal, true, false, null, or else a string."""
    found: dict[str, Any] = {}
    words = {"true": True, "false": False, "null": None, "none": None}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise OptionError(f"{flag} is written key=value, got {text!r}")
        if key in found:
            raise OptionError(f"{flag} {key} is given twice")
        try:
            found[key] = words[value.lower()] if value.lower() in words else ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found
