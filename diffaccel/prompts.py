"""Prompts from a file: .txt, .csv, .tsv, .json (a list, or COCO captions), .jsonl. Errors name file and line.

One order, kept; image i has prompt i mod P, wherever prompts are used.
"""

from __future__ import annotations

import csv
import io
import json
import numbers
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .errors import OptionError

COLUMNS = ("prompt", "caption")
_Entries = Iterable[tuple[str, Any]]  # (place in the file, entry)


def read_prompts(source: str | Path | Sequence[str | int]) -> list[str]:
    """The prompts of a list or a file, in its order.

    An empty prompt inside a file counts as a prompt (what a model does without one is worth measuring); blank lines at
    the end of a file are none.

    Args:
        source: a list of strings (or of class numbers), or a file by its ending. `.txt`: one a line. `.csv`, `.tsv`: a
            column `prompt` or `caption`. `.jsonl`: a string, or an object with such a key, a line. `.json`: a list of
            those, or COCO captions (the first caption of each `image_id`, ordered by id).

    Raises:
        OptionError: the file cannot be read, holds no prompt, or an entry has none.
    """
    if not isinstance(source, (str, Path)):
        entries: _Entries = [(f"prompt {i}", _class_number(entry)) for i, entry in enumerate(source)]
        name = "the list of prompts"
    else:
        entries, name = _entries(Path(source)), str(source)
    found = []
    for place, entry in entries:
        prompt = _prompt(entry)
        if prompt is None:
            raise OptionError(f"{name}, {place}: neither a string nor an object with {' or '.join(COLUMNS)}")
        if any("\ud800" <= c <= "\udfff" for c in prompt):
            raise OptionError(f"{name}, {place}: holds a half of a surrogate pair, which is no character: {prompt!a}")
        found.append(prompt.strip())
    if not found:
        raise OptionError(f"{name} holds no prompts")
    return found


def _entries(path: Path) -> _Entries:
    readers = {".txt": _txt, ".csv": _table, ".tsv": _table, ".json": _json, ".jsonl": _jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise OptionError(f"{path}: prompts are read from {', '.join(readers)} files, not {path.suffix or 'this'!r}")
    try:
        data = path.read_bytes()
        return reader(path, data.decode("utf-8-sig"))
    except OSError as error:
        raise OptionError(f"{path}: cannot read the prompts: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise OptionError(
            f"{path}, line {line}: byte {data[error.start]:#04x} is not UTF-8; save the file as UTF-8"
        ) from error


def _class_number(entry: Any) -> Any:
    """A whole number as text, which is what class-conditional pipelines are run by here."""
    whole = isinstance(entry, numbers.Integral) and not isinstance(entry, bool)
    return str(int(entry)) if whole else entry


def _prompt(entry: Any) -> str | None:
    """The text of a string, or of an object with a key `prompt` or `caption`."""
    if isinstance(entry, dict):
        entry = next((entry[k] for k in COLUMNS if k in entry), None)
    return entry if isinstance(entry, str) else None


def _lines(text: str) -> list[tuple[str, str]]:
    """(place, line). Only newlines end a line: prompts may hold characters (form feeds, U+2028) that `splitlines`
    would break at."""
    lines = text.replace("\r\n", "\n").rstrip().split("\n") if text.strip() else []
    return [(f"line {i}", line) for i, line in enumerate(lines, 1)]


def _txt(path: Path, text: str) -> _Entries:
    return _lines(text)


def _jsonl(path: Path, text: str) -> _Entries:
    for place, line in _lines(text):
        try:
            yield place, json.loads(line)
        except json.JSONDecodeError as error:
            raise OptionError(f"{path}, {place}: no JSON: {error.msg} (column {error.colno})") from error


def _json(path: Path, text: str) -> _Entries:
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise OptionError(f"{path}, line {error.lineno}: no JSON: {error.msg} (column {error.colno})") from error
    if isinstance(whole, dict) and isinstance(whole.get("annotations"), list):
        return _coco(path, whole["annotations"])
    if not isinstance(whole, list):
        raise OptionError(f"{path}: expected a list of prompts, or COCO captions with a list under 'annotations'")
    return [(f"entry {i}", entry) for i, entry in enumerate(whole, 1)]


def _coco(path: Path, annotations: list[Any]) -> _Entries:
    first: dict[int, tuple[str, Any]] = {}
    for i, one in enumerate(annotations, 1):
        if not isinstance(one, dict) or not isinstance(one.get("image_id"), int):
            raise OptionError(f"{path}, annotation {i}: COCO captions have a whole number under image_id")
        first.setdefault(one["image_id"], (f"annotation {i}", one))
    return [first[k] for k in sorted(first)]


def _table(path: Path, text: str) -> _Entries:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = {(n or "").strip().lower(): n for n in rows.fieldnames or ()}
        column = next((names[k] for k in COLUMNS if k in names), None)
        if column is None:
            raise OptionError(f"{path}, line 1: no column {' or '.join(COLUMNS)}; it has {', '.join(names) or 'none'}")
        for row in rows:
            if None in row:  # DictReader keeps what has no column there
                raise OptionError(
                    f"{path}, line {rows.line_num}: more fields than columns ({len(row[None])} too many); put a prompt "
                    f"that holds {delimiter!r} in double quotes"
                )
            yield f"line {rows.line_num}", {"prompt": row[column]}  # None where the row is too short
    except csv.Error as error:
        what = "a quote is opened and never closed" if "unexpected end of data" in str(error) else error
        # the reader counts a line once it is read: this is the first one of what could not be
        raise OptionError(f"{path}, line {rows.line_num + 1}: {what}") from error
