"""Files as they come: each bad one gets one line that names file and place; nothing is lost in silence."""
import gzip
import json

import pytest

import splits
from common import files
from common.errors import UserError
from common.samples import read_samples
from common.tokenizer import build_tokenizer, load_tokenizer

GOOD = {"prompt": "POST: a cat\nTL;DR:", "reference": "a cat"}


@pytest.fixture
def folder(tmp_path):
    def write(content, name="train.jsonl"):
        (tmp_path / name).write_bytes(content)
        return splits.Task("folder", str(tmp_path))
    return write


def line(**more):
    return json.dumps(GOOD | more).encode() + b"\n"


@pytest.mark.parametrize("content, says", [
    (line() + b'{"prompt": "\xff\xfe", "reference": "x"}\n', "line 2: not UTF-8 text (byte 0xff at 12)"),
    (line() + b"\x00\x00\x00\n", "line 2: not UTF-8 text"),
    (line() + b'{"prompt": "torn', "line 2: not JSON"),
    (line() + b"[1]\n", "line 2: a JSON object is needed, this is a list"),
    (line(reference=7), "line 1: field 'reference' must be of type str, it is int"),
    (line(reference=None), "it is NoneType"),
    (b'{"prompt": "p"}\n', "line 1: field 'reference' is missing; fields found: prompt"),
    ('{"prompt": "p", "reference": "r"}\n'.encode("utf-16"), "line 1: not UTF-8 text but UTF-16"),
    (b"prompt,reference\na,b\n", "line 1: this looks like CSV"),
    (b'[\n{"prompt": "p", "reference": "r"}\n]\n', "line 1: not JSON in one line; a .jsonl file"),
    (b'{\n "prompt": "p"\n}\n', "line 1: not JSON in one line; a .jsonl file"),
    (gzip.compress(line(), mtime=0), "line 1: a gzip file; its name must end in .jsonl.gz"),
    (b"version https://git-lfs.github.com\n", "line 1: not JSON (Expecting value: line 1 column 1 (char 0)); the line "
     "begins 'version https://git-lfs"),
    (b"[" * 10**6, "nested too deep"), (b'{"a": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
    (b"", "no rows"), (b"\n\n \n", "no rows"), (line(prompt=" ", reference=""), "no rows")])
def test_what_is_wrong_and_where(content, says, folder):
    task = folder(content or b"\n")
    with pytest.raises(UserError) as error:
        task.rows("train")
    assert says in str(error.value) and "train.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_a_line_without_end_is_cut_by_a_limit(folder, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_LINE", 10_000)
    task = folder(line() + b'{"prompt": "' + b"a" * 10**6)
    with pytest.raises(UserError, match="line 2: longer than 10000 bytes"):
        task.rows("train")


@pytest.mark.parametrize("damage", [lambda z: z[:-9], gzip.compress, lambda z: z[:20] + b"x" + z[21:],
                                    lambda z: b"\x1f\x8b" + z, lambda z: b"plain"])
def test_damaged_and_nested_gzip(damage, folder):
    task = folder(damage(gzip.compress(line() * 200)), "train.jsonl.gz")
    with pytest.raises(UserError, match="train.jsonl.gz"):
        task.rows("train")


def test_what_is_dropped_or_renamed_is_counted(folder, capfd):
    task = folder(line(id="a") + line(reference=" ") + line(id="a") + line(id=3) + line(id=["odd"]) + line())
    assert [r["id"] for r in task.rows("train")] == ["a", "a#2", "3", "['odd']", "train-4"]
    said = capfd.readouterr().out
    assert "1 of 6 rows dropped" in said and "1 rows have an id that an earlier row has" in said
    task = folder(line(id="a") + line(id="a") + line(id="a#2") + line(id="a"))
    assert [r["id"] for r in task.rows("train")] == ["a", "a#3", "a#2", "a#4"]


def test_odd_text_survives_to_the_tokenizer_and_back(folder):
    odd = ["\x00", "\u2028", "e\u0301", "👩‍👩‍👧", "\U0010ffff", "a\rb", "\u202e"]
    row, = folder(line(prompt="".join(odd))).rows("train")
    tokenizer = load_tokenizer(build_tokenizer(["a cat"]))
    assert tokenizer.decode(tokenizer.encode_ordinary(row["prompt"])) == "".join(odd)
    row, = folder(rb'{"prompt": "half \ud800 pair", "reference": "x"}' + b"\n").rows("train")
    assert row["prompt"] == "half ? pair"       # no UTF-8 can hold it


def test_sample_files_with_one_id_twice_are_refused(tmp_path):
    row = GOOD | {"id": "a", "outputs": ["x"], "policy": "sft", "split": "test"}
    (tmp_path / "s.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match="line 2: the id 'a' is that of line 1"):
        read_samples(tmp_path / "s.jsonl")


def test_any_bytes_are_read_or_refused(tmp_path):
    hypothesis = pytest.importorskip("hypothesis", reason="pip install hypothesis")
    from hypothesis import strategies as st
    leaf = st.none() | st.booleans() | st.floats() | st.integers() | st.text()
    value = st.recursive(leaf, st.lists, max_leaves=4)
    fields = st.sampled_from(["prompt", "reference", "id", "outputs", "policy", "split"])
    rows = st.dictionaries(fields, value).map(lambda row: json.dumps(row).encode())
    task = splits.Task("folder", str(tmp_path))

    @hypothesis.settings(max_examples=300, deadline=None)
    @hypothesis.given(st.lists(st.binary() | rows | st.just(line().strip()), max_size=4))
    def check(lines):
        (tmp_path / "train.jsonl").write_bytes(b"\n".join(lines))
        try:
            kept = task.rows("train")
            assert all(isinstance(r["prompt"], str) and r["reference"].strip() for r in kept)
            assert len({r["id"] for r in kept}) == len(kept)
        except UserError as error:
            assert "\n" not in str(error).strip()
    check()
