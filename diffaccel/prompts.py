"""Prompts from a file: .txt, .csv, .tsv, .json (a list, or COCO captions), .jsonl. Errors name file and line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import OptionError

COLUMNS = ("prompt", "caption")


def read_prompts(file: str | Path) -> list[str]:
    """The prompts of a file, in its order; none is skipped.

    Args:
        file: by its ending. `.txt`: one a line. `.csv`, `.tsv`: a column `prompt` or `caption`. `.jsonl`: a string, or
            an object with such a key, a line. `.json`: a list of those, or COCO captions (`{"annotations": [...]}`).

    Raises:
        OptionError: the file cannot be read, holds no prompt, or an entry is empty or of another form.
    """
    path = Path(file)
    readers = {".txt": _txt, ".csv": _table, ".tsv": _table, ".json": _json, ".jsonl": _jsonl}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise OptionError(f"{path}: prompts are read from {', '.join(readers)} files, not {path.suffix or 'this'!r}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise OptionError(f"{path}: cannot read the prompts: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    found = []
    for place, entry in reader(path, text):
        prompt = _prompt(entry)
        if prompt is None or not prompt.strip():
            problem = "is empty" if isinstance(prompt, str) else f"has no text under {' or '.join(COLUMNS)}"
            raise OptionError(f"{path}, {place}: the prompt {problem}; remove the entry or fill it in")
        found.append(prompt.strip())
    if not found:
        raise OptionError(f"{path} holds no prompt")
    return found


def _prompt(entry: Any) -> str | None:
    """The text of a string, or of an object with a key `prompt` or `caption`."""
    if isinstance(entry, dict):
        entry = next((entry[k] for k in COLUMNS if k in entry), None)
    return entry if isinstance(entry, str) else None


def _lines(text: str) -> list[tuple[str, str]]:
    """(place, line); blank lines at the end of a file are no entries. Only newlines end a line: prompts may hold
    characters (form feeds, U+2028) that `splitlines` would break at."""
    lines = text.replace("\r\n", "\n").rstrip().split("\n") if text.strip() else []
    return [(f"line {i}", line) for i, line in enumerate(lines, 1)]


def _txt(path: Path, text: str) -> Iterable[tuple[str, Any]]:
    return _lines(text)


def _jsonl(path: Path, text: str) -> Iterable[tuple[str, Any]]:
    for place, line in _lines(text):
        try:
            yield place, json.loads(line) if line.strip() else ""
        except json.JSONDecodeError as error:
            raise OptionError(f"{path}, {place}: no JSON: {error.msg} (column {error.colno})") from error


def _json(path: Path, text: str) -> Iterable[tuple[str, Any]]:
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise OptionError(f"{path}, line {error.lineno}: no JSON: {error.msg} (column {error.colno})") from error
    entries = whole.get("annotations") if isinstance(whole, dict) else whole
    if not isinstance(entries, list):
        raise OptionError(f"{path}: expected a list of prompts, or COCO captions with a list under 'annotations'")
    return [(f"entry {i}", entry) for i, entry in enumerate(entries, 1)]


def _table(path: Path, text: str) -> Iterable[tuple[str, Any]]:
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    try:
        names = {(n or "").strip().lower(): n for n in rows.fieldnames or ()}
        column = next((names[k] for k in COLUMNS if k in names), None)
        if column is None:
            raise OptionError(f"{path}, line 1: no column {' or '.join(COLUMNS)}; it has {', '.join(names) or 'none'}")
        for row in rows:
            yield f"line {rows.line_num}", {"prompt": row[column] or ""}
    except csv.Error as error:
        raise OptionError(f"{path}, line {rows.line_num}: {error}") from error
