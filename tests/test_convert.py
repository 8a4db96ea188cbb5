"""Preference files as others write them, turned into ours by tools/convert.py."""
import json

import pytest

from common.errors import UserError
from common.prompts import instruction_prompt
from conftest import json_lines, refused
from tools import convert

TALK = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"
USER, BOT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
WORSE = {"role": "assistant", "content": "No idea."}
PAIR = {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": "Because.", "rejected": "No idea."}
REFERENCE = {"prompt": PAIR["prompt"], "reference": "Because."}


@pytest.mark.parametrize("row, ours", [
    # HH-RLHF: the last "Assistant:" that both have ends the prompt, though the answers begin alike
    ({"chosen": TALK + " It is so. A", "rejected": TALK + " It is so. B"},
     {"prompt": TALK, "chosen": "It is so. A", "rejected": "It is so. B"}),
    # no speakers: the last common line
    ({"chosen": "TL;DR of this\nshort", "rejected": "TL;DR of this\nsh"},
     {"prompt": "TL;DR of this\n", "chosen": "short", "rejected": "sh"}),
    # lists of messages: with the prompt inside, beside (as a text or as messages), and in other spelling
    ({"chosen": [USER, BOT], "rejected": [USER, WORSE]}, PAIR),
    ({"prompt": "Why?", "chosen": [USER, BOT], "rejected": [USER, WORSE], "score_chosen": 8}, PAIR),
    ({"prompt": [USER], "chosen": [BOT], "rejected": [WORSE]}, PAIR),
    ({"chosen": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}],
      "rejected": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "No idea."}]}, PAIR),
    ({"prompt": [{"role": "system", "content": "Be brief."}, USER], "chosen": [BOT], "rejected": [WORSE]},
     PAIR | {"prompt": "Be brief." + PAIR["prompt"]}),
    ({"prompt": [USER, BOT, USER], "chosen": [BOT], "rejected": [WORSE]},
     PAIR | {"prompt": PAIR["prompt"] + " Because." + PAIR["prompt"]}),
    # answers that repeat their prompt, and ours as it is
    ({"prompt": "P:", "chosen": "P: a", "rejected": "P: b", "id": 3},
     {"prompt": "P:", "chosen": "a", "rejected": "b"}),
    (PAIR, PAIR),
    ({"prompt": "\n\nHuman: Why?", "chosen": PAIR["prompt"] + " Because.", "rejected": PAIR["prompt"] + " No idea."},
     PAIR),
    # an answer that begins with the prompt's words is an answer, as is one of which one side repeats it
    ({"prompt": "Hi", "chosen": "Hi there!", "rejected": "Hi."},
     {"prompt": "Hi", "chosen": "Hi there!", "rejected": "Hi."}),
    ({"prompt": "P:", "chosen": "P: a", "rejected": "b"},
     {"prompt": "P:", "chosen": "P: a", "rejected": "b"}),
    ({"prompt": "Hi", "completion": "Hi there!"}, {"prompt": "Hi", "reference": "Hi there!"}),
    # code
    ({"prompt": "def f():\n", "completion": "def f():\n    return 1\n"},
     {"prompt": "def f():\n", "reference": "    return 1"}),
    # single answers
    ({"prompt": "P:", "completion": " a"}, {"prompt": "P:", "reference": "a"}),
    ({"prompt": [USER], "completion": [BOT]}, REFERENCE), ({"messages": [USER, BOT]}, REFERENCE),
    ({"question": "P:", "answer": "a"}, {"prompt": "P:", "reference": "a"}),
    ({"instruction": "Add.", "input": "1 1", "output": "2"},
     {"prompt": instruction_prompt("Add.", "1 1"), "reference": "2"})])
def test_rows_as_others_write_them(row, ours):
    assert convert.convert_row(row)[0] == ours


@pytest.mark.parametrize("row, why", [
    ({"chosen": "One thing", "rejected": "Another"}, "no line that both"),
    ({"chosen": TALK + " a", "rejected": TALK.replace("Hello", "Go") + " b"}, "before their last answer"),
    ({"chosen": [USER, BOT], "rejected": [BOT, USER, WORSE]}, "before their last answer"),
    ({"chosen": [BOT, USER], "rejected": [USER, WORSE]}, "do not end with the assistant's"),
    ({"messages": [{"role": "tool", "content": "x"}, BOT]}, "role 'tool'"),
    ({"prompt": [USER], "completion": [{"role": "assistant", "content": ["x"]}]}, "content of type list"),
    ({"prompt": [5], "completion": [BOT]}, "a message of role None"),
    ({"prompt": [USER], "completion": "a"}, "neither a text nor messages"),
    ({"messages": []}, "do not end with the assistant's"),
    ({"prompt": "P", "completion": 3}, "neither a text nor messages"),
    ({"text": "a"}, "fields text: no answer"),
    ({"completion": "a"}, "no prompt")])
def test_rows_that_are_dropped_say_why(row, why):
    with pytest.raises(UserError, match=why):
        convert.convert_row(row)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_files_are_converted_into_one(tmp_path, capsys):
    rows = [{"chosen": TALK + f" good {i}", "rejected": TALK + f" bad {i}"} for i in range(3)]
    out = tmp_path / "new" / "preferences.jsonl"
    files = [write(tmp_path / "hh.jsonl", rows + [{"text": "x"}]), write(tmp_path / "own.jsonl", [
        {"prompt": "P:", "chosen": "P: a", "rejected": "P: b"}]), write(tmp_path / "pair.jsonl", [PAIR])]
    convert.main(convert.Config(files=files, export=str(out)))
    said = capsys.readouterr().out
    assert "1 rows dropped: fields text: no answer among them" in said
    assert "\n4 rows repeated their prompt" in "\n" + said
    assert [row["chosen"] for row in json_lines(out)] == ["good 0", "good 1", "good 2", "a", "Because."]


def test_files_that_cannot_be_converted_get_one_line(tmp_path):
    pairs = write(tmp_path / "pairs.jsonl", [PAIR])
    single = write(tmp_path / "single.jsonl", [{"prompt": "P", "completion": "a"}])
    (tmp_path / "list.json").write_text(json.dumps([PAIR]))
    (tmp_path / "a.csv").write_text("prompt,chosen\n")
    for args, says in (((pairs, single, "--export", "x.jsonl"), "rows of two kinds (pairs and single"),
                       ((pairs,), "--export FILE.jsonl: name a .jsonl file"),
                       ((pairs, "--export", "DIR"), "--export DIR: name a .jsonl file"),
                       ((write(tmp_path / "t.jsonl", [{"a": "b"}]), "--export", "x.jsonl"), "no row could"),
                       ((tmp_path / "list.json", "--export", "x.jsonl"), "line 1: a JSON object is needed"),
                       ((tmp_path / "a.csv", "--export", "x.jsonl"), "a.csv, line 1: not JSON"),
                       ((tmp_path / "none.jsonl", "--export", "x.jsonl"), "none.jsonl")):
        refused(tmp_path, "tools.convert", *args, says=says)
