"""Files as they come: each bad one gets one line that names file and place; nothing is lost in silence."""
import gzip
import json
import math

import pytest

from common import files
from common.errors import UserError
from common.tokenizer import build_tokenizer, load_tokenizer
from splits import FolderTask

GOOD = {"prompt": "POST: a cat\nTL;DR:", "reference": "a cat"}


@pytest.fixture
def folder(tmp_path):
    def write(content, name="train.jsonl"):
        (tmp_path / name).write_bytes(content)
        return FolderTask("folder", str(tmp_path), 48, 0)
    return write


def line(**more):
    return json.dumps(GOOD | more).encode() + b"\n"


@pytest.mark.parametrize("content, says", [
    (line() + b'{"prompt": "\xff\xfe", "reference": "x"}\n', "line 2: not JSON ('utf-8' codec can't decode byte 0xff"),
    (line() + b'{"prompt": "torn', "line 2: not JSON"),
    (line() + b"[1]\n", "line 2: a JSON object is needed, this is a list"),
    (line(reference=7), "line 1: field 'reference' must be of type str, it is int"),
    (b'\n{"prompt": "p"}\n', "line 2: field 'reference' is missing; fields found: prompt"),
    (b"prompt,reference\na,b\n", "a .jsonl file has one JSON object a line, and this one begins 'prompt,reference'"),
    (b'[\n{"prompt": "p", "reference": "r"}\n]\n', "line 1: not JSON"),
    (gzip.compress(line(), mtime=0), "line 1: not "), (b"[" * 10**5, "line 1: not JSON"),
    ('{"prompt": "p", "reference": "r"}\n'.encode("utf-16"), "line 1: not "),
    (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    (b"\n\n \n", "no rows"), (line(prompt=" ", reference=""), "no rows")])
def test_what_is_wrong_and_where(content, says, folder):
    with pytest.raises(UserError) as error:
        folder(content).rows("train")
    assert says in str(error.value) and "train.jsonl" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [lambda z: z[:-9], gzip.compress, lambda z: z[:20] + b"x" + z[21:],
                                    lambda z: b"\x1f\x8b" + z, lambda z: b"plain"])
def test_damaged_and_nested_gzip(damage, folder):
    task = folder(damage(gzip.compress(line() * 200)), "train.jsonl.gz")
    with pytest.raises(UserError, match="train.jsonl.gz"):
        task.rows("train")


def test_what_is_dropped_or_renamed_is_counted(folder, capfd):
    task = folder(line(id="a") + line(reference=" ") + line(id="a") + line(id=3) + line())
    assert [r["id"] for r in task.rows("train")] == ["train-0", "train-1", "train-2", "train-3"]
    said = capfd.readouterr().out
    assert "1 of 5 rows dropped" in said and "several rows have one id" in said


def test_odd_text_survives_to_the_tokenizer_and_back(folder):
    odd = ["\x00", "\u2028", "e\u0301", "👩‍👩‍👧", "\U0010ffff", "a\rb", "\u202e"]
    row, = folder(line(prompt="".join(odd))).rows("train")
    tokenizer = load_tokenizer(build_tokenizer(["a cat"]))
    assert tokenizer.decode(tokenizer.encode_ordinary(row["prompt"])) == "".join(odd)
    row, = folder(rb'{"prompt": "half \ud800 pair \ud83d\ude00", "reference": "x"}' + b"\n").rows("train")
    assert row["prompt"] == "half ? pair 😀"       # no UTF-8 can hold the half


# ------------------------------------------------------------------------------------------------ what is written

def test_writes_are_whole_or_not_at_all(tmp_path, monkeypatch):
    files.atomic_write(tmp_path / "x", b"old")
    (tmp_path / "x.123.tmp").write_bytes(b"of a run that was killed while it wrote")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        files.atomic_write(tmp_path / "x", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() == b"old"


def test_numbers_that_json_cannot_spell_are_not_written(tmp_path):
    with pytest.raises(UserError, match="a number to be written is not finite; nothing was written"):
        files.write_json(tmp_path / "x.json", {"a": [math.nan]})
    assert not list(tmp_path.iterdir())
    files.write_json(tmp_path / "x.json", {"a": math.inf}, allow_nan=True)
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": math.inf}


def test_out_names_a_folder_or_a_checkpoint(tmp_path):
    assert files.output_path(str(tmp_path / "new"), "ckpt_sft.pt") == tmp_path / "new/ckpt_sft.pt"
    assert files.output_path(str(tmp_path / "a.pt"), "ckpt_sft.pt") == tmp_path / "a.pt"
    with pytest.raises(UserError, match="this script writes x.json; name a folder"):
        files.output_path(str(tmp_path / "a.pt"), "x.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):      # common.flags.launch makes one line of it
        files.output_path(str(tmp_path / "file/below"), "x.json")
