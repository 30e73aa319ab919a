"""Prompt files: every form, and errors that name file and line."""

from __future__ import annotations

import json

import pytest

from diffaccel.errors import OptionError
from diffaccel.prompts import read_prompts

TWO = ["a red fox", "a blue coat, new"]
GOOD = {
    "a.txt": "a red fox\n  a blue coat, new \n\n",
    "bom.txt": "\ufeffa red fox\r\na blue coat, new\r\n",
    "b.csv": 'id,Caption\n1,a red fox\n2,"a blue coat, new"\n',
    "c.tsv": "prompt\tid\na red fox\t1\na blue coat, new\t2\n",
    "d.json": json.dumps(["a red fox", {"prompt": "a blue coat, new"}]),
    "coco.json": json.dumps({"annotations": [{"image_id": 3, "caption": t} for t in TWO]}),
    "e.jsonl": '"a red fox"\n{"caption": "a blue coat, new", "n": 1}\n',
}
BAD = {
    "empty.txt": ("", "holds no prompt"),
    "hole.txt": ("one\n\nthree\n", "hole.txt, line 2: the prompt is empty"),
    "hole.csv": ("prompt\na\n  \nb\n", "hole.csv, line 3: the prompt is empty"),
    "column.csv": ("text,id\na,1\n", "no column prompt or caption; it has text, id"),
    "torn.json": ('["a",\n "b"', "torn.json, line 2: no JSON"),
    "shape.json": ('{"prompts": []}', "a list under 'annotations'"),
    "torn.jsonl": ('"a"\n{"prompt": \n', "torn.jsonl, line 2: no JSON"),
    "number.jsonl": ('"a"\n7\n', "number.jsonl, line 2: the prompt has no text under prompt or caption"),
    "null.json": ('["a", {"prompt": null}]', "null.json, entry 2: the prompt has no text"),
    "a.parquet": ("x", "prompts are read from .txt, .csv"),
    "none": ("x", "prompts are read from"),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_form(tmp_path, name):
    (tmp_path / name).write_bytes(GOOD[name].encode())
    assert read_prompts(tmp_path / name) == TWO


@pytest.mark.parametrize("name", BAD)
def test_errors_name_file_and_line(tmp_path, name):
    text, message = BAD[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(OptionError) as error:
        read_prompts(tmp_path / name)
    assert message in str(error.value) and name in str(error.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(OptionError, match=r"nope\.txt: cannot read the prompts: No such file"):
        read_prompts(tmp_path / "nope.txt")
    (tmp_path / "latin.txt").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(OptionError, match="byte 3 is not UTF-8"):
        read_prompts(tmp_path / "latin.txt")


def test_only_newlines_end_a_prompt(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\u2028still one\ntwo\n".encode())
    assert read_prompts(tmp_path / "a.txt") == ["one\u2028still one", "two"]
