"""Prompt files: every form, and errors that name file and line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from diffaccel import eval as metrics
from diffaccel.errors import OptionError
from diffaccel.prompts import read_prompts

TWO = ["a red fox", "a blue coat, new"]
COCO = [(7, TWO[1]), (3, TWO[0]), (7, "another caption of image 7")]
GOOD = {
    "a.txt": "a red fox\n  a blue coat, new \n\n",
    "bom.txt": "\ufeffa red fox\r\na blue coat, new\r\n",
    "b.csv": 'id,Caption\n1,a red fox\n2,"a blue coat, new"\n',
    "c.tsv": "prompt\tid\na red fox\t1\na blue coat, new\t2\n",
    "d.json": json.dumps(["a red fox", {"prompt": "a blue coat, new"}]),
    "coco.json": json.dumps({"annotations": [{"image_id": i, "caption": t} for i, t in COCO]}),
    "e.jsonl": '"a red fox"\n{"caption": "a blue coat, new", "n": 1}\n',
}
# an empty prompt is a prompt, wherever it stands but at the end of a text
HOLES = {
    "hole.txt": "one\n\nthree\n\n",
    "hole.csv": "prompt\none\n  \nthree\n",
    "hole.json": '["one", "", "three"]',
    "hole.jsonl": '"one"\n{"prompt": ""}\n"three"\n',
}
BAD = {
    "empty.txt": ("", "holds no prompts"),
    "short.csv": ("id,prompt\n1,a\n2\n", "short.csv, line 3: neither a string nor an object with prompt"),
    "comma.csv": ("prompt\na fox\na red fox, new\n", "comma.csv, line 3: more fields than columns (1 too many)"),
    "quote.csv": ('prompt\na\n"b\nc\n', "quote.csv, line 3: a quote is opened and never closed"),
    "after.csv": ('prompt\na\n"b" c\n', "after.csv, line 3: ',' expected after"),
    "head.tsv": ('"prompt\na\n', "head.tsv, line 1: a quote is opened"),
    "column.csv": ("text,id\na,1\n", "line 1: no column prompt or caption; it has text, id"),
    "torn.json": ('["a",\n "b"', "torn.json, line 2: no JSON"),
    "shape.json": ('{"prompts": []}', "a list under 'annotations'"),
    "coco.json": ('{"annotations": [{"caption": "a"}]}', "annotation 1: COCO captions have a whole number"),
    "coco2.json": ('{"annotations": [{"image_id": 1}]}', "annotation 1: neither a string"),
    "torn.jsonl": ('"a"\n{"prompt": \n', "torn.jsonl, line 2: no JSON"),
    "gap.jsonl": ('"a"\n\n"b"\n', "gap.jsonl, line 2: no JSON"),
    "number.jsonl": ('"a"\n7\n', "number.jsonl, line 2: neither a string nor an object"),
    "half.jsonl": ('"a"\n"b \\ud800"\n', "half.jsonl, line 2: holds a half of a surrogate pair"),
    "null.json": ('["a", {"prompt": null}]', "null.json, entry 2: neither a string"),
    "a.parquet": ("x", "prompts are read from .txt, .csv"),
    "none": ("x", "prompts are read from"),
}


@pytest.mark.parametrize("name", GOOD)
def test_every_form(tmp_path, name):
    (tmp_path / name).write_bytes(GOOD[name].encode())
    assert read_prompts(tmp_path / name) == TWO == metrics.read_prompts(str(tmp_path / name))


@pytest.mark.parametrize("name", HOLES)
def test_empty_prompts_are_kept(tmp_path, name):
    (tmp_path / name).write_text(HOLES[name], encoding="utf-8")
    assert read_prompts(tmp_path / name) == ["one", "", "three"]


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
    (tmp_path / "latin.txt").write_bytes("tea\ncafé\n".encode("latin-1"))
    with pytest.raises(OptionError, match=r"latin\.txt, line 2: byte 0xe9 is not UTF-8"):
        read_prompts(tmp_path / "latin.txt")


def test_only_newlines_end_a_prompt(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\u2028still\x0cone\ntwo\n".encode())
    assert read_prompts(tmp_path / "a.txt") == ["one\u2028still\x0cone", "two"]


def test_lists():
    assert read_prompts([" a ", ""]) == ["a", ""]
    with pytest.raises(OptionError, match="the list of prompts holds no prompts"):
        read_prompts([])
    with pytest.raises(OptionError, match="the list of prompts, prompt 1: neither a string"):
        read_prompts(["a", 3.0])
    with pytest.raises(OptionError, match="the list of prompts, prompt 0: neither a string"):
        read_prompts([True])
    assert read_prompts([3, np.int64(7)]) == ["3", "7"]  # classes
