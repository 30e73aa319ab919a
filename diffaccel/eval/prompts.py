"""Prompt files: one order, kept; image i uses prompt i mod P."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import OptionError

_COLUMNS = ("prompt", "caption")


def read_prompts(source: str | Path | Sequence[str]) -> list[str]:
    """Prompts of a list or a file: .txt one a line; .csv and .tsv with a column prompt or caption; .json a list of
    strings, or COCO captions (the first caption of each image_id, ordered by id); .jsonl strings or objects with prompt
    or caption. An empty prompt inside a file is kept. Raises OptionError with the line."""
    if not isinstance(source, (str, Path)):
        prompts = list(source)
        if bad := [i for i, p in enumerate(prompts) if not isinstance(p, str)]:
            raise OptionError(f"prompt {bad[0]} is {type(prompts[bad[0]]).__name__}, not a string")
    else:
        prompts = _read(Path(source))
    if not prompts:
        raise OptionError(f"no prompts in {source if isinstance(source, (str, Path)) else 'the list'}")
    return prompts


def _read(path: Path) -> list[str]:
    readers = {".txt": _lines, ".csv": _table, ".tsv": _table, ".json": _json, ".jsonl": _json_lines}
    if path.suffix.lower() not in readers:
        raise OptionError(f"prompts are read from {' '.join(readers)}, got {path}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise OptionError(f"cannot read prompts from {path}: {error.strerror}") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise OptionError(f"{path}, line {line}: not UTF-8 (byte {data[error.start]:#04x})") from None
    return readers[path.suffix.lower()](path, text)


def _lines(path: Path, text: str) -> list[str]:
    # not splitlines: that also splits at characters that may stand inside a prompt (form feed, U+2028)
    lines = [line.rstrip("\r") for line in text.split("\n")]
    return lines[:-1] if not lines[-1] else lines


def _table(path: Path, text: str) -> list[str]:
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    names = list(rows.fieldnames or ())
    column = next((c for c in _COLUMNS if c in names), None)
    if column is None:
        raise OptionError(f"{path}, line 1: needs a column prompt or caption, it has {', '.join(names) or 'none'}")
    out = []
    for row in rows:
        if row[column] is None:
            raise OptionError(f"{path}, line {rows.line_num}: no value in column {column}")
        out.append(row[column])
    return out


def _json(path: Path, text: str) -> list[str]:
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise OptionError(f"{path}, line {error.lineno}: {error.msg}") from None
    if isinstance(data, list) and all(isinstance(x, str) for x in data):
        return data
    if isinstance(data, dict) and isinstance(data.get("annotations"), list):
        first: dict[Any, str] = {}
        for one in data["annotations"]:
            first.setdefault(one["image_id"], one["caption"])
        return [first[k] for k in sorted(first)]
    raise OptionError(f"{path}: neither a list of strings nor COCO captions (annotations[].caption)")


def _json_lines(path: Path, text: str) -> list[str]:
    out = []
    for number, line in enumerate(_lines(path, text), 1):
        try:
            one = json.loads(line)
        except json.JSONDecodeError as error:
            raise OptionError(f"{path}, line {number}: {error.msg}") from None
        found = next((one[c] for c in _COLUMNS if c in one), None) if isinstance(one, dict) else one
        if not isinstance(found, str):
            raise OptionError(f"{path}, line {number}: neither a string nor an object with prompt or caption")
        out.append(found)
    return out
