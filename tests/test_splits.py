"""Texts as ids and back, batches of similar lengths, tasks by name, and what `python splits.py` prints."""
import random
import statistics

import pytest
import torch

import splits
from common.errors import UserError
from common.tokenizer import build_tokenizer, load_tokenizer
from conftest import call, refused
from tasks import instructions, synthetic


@pytest.fixture(scope="module")
def rows():
    return synthetic.rows("train", 200)


@pytest.fixture(scope="module")
def tokenizer(rows):
    texts = [text for row in rows for text in (row["prompt"], *row["references"])]
    return load_tokenizer(build_tokenizer(texts))


# ----------------------------------------------------------------------------------------------- texts as ids

def test_tokenizer_roundtrip_and_words_are_one_token(rows, tokenizer):
    for text in [rows[0]["prompt"], "ça va 🙂 \x00 <|endoftext|> nope", ""]:
        assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    assert len(tokenizer.encode_ordinary(" my sister damaged my car .")) == 6


def test_a_response_has_eos_unless_it_is_cut(tokenizer):
    ids = splits.encode_response(tokenizer, "my sister", 10)
    assert ids[-1] == tokenizer.eot_token and splits.decode(tokenizer, ids) == (" my sister", True)
    cut = splits.encode_response(tokenizer, "my sister", 1)
    assert splits.decode(tokenizer, cut) == (" my", False)
    unfinished = splits.encode_response(tokenizer, " my sister", 10, finished=False)
    assert unfinished == ids[:-1] and splits.decode(tokenizer, unfinished) == (" my sister", False)


def test_no_text_is_a_space_or_at_least_eos(tokenizer):
    """The text "" gets the space before every response; a response without any ids becomes EOS."""
    space = tokenizer.encode_ordinary(" ")
    assert splits.encode_response(tokenizer, "", 10) == space + [tokenizer.eot_token]

    class Silent:
        eot_token = 7

        def encode_ordinary(self, text):
            return []
    assert splits.encode_response(Silent(), "x", 10, finished=False) == [7]


class Begins:
    """A tokenizer of letters whose texts begin with token 9; it has none for "?"."""
    bos, eot_token = 9, 0

    def encode_ordinary(self, text):
        return [ord(c) for c in text if c != "?"]


def test_a_begin_token_takes_its_room_and_some_is_left():
    """i[-0:] would be the whole prompt."""
    assert splits.encode_prompts(Begins(), ["abc"], 3) == [[9, 98, 99]]
    with pytest.raises(UserError, match="may have 1 tokens, and the tokenizer begins each with one of its own"):
        splits.encode_prompts(Begins(), ["abc"], 1)
    # a begin token alone is a prompt; without one there is nothing to predict from
    assert splits.encode_prompts(Begins(), ["??"], 3) == [[9]]
    without = Begins()
    without.bos = None
    with pytest.raises(UserError, match=r"prompts: the tokenizer has no tokens for '\?\?'"):
        splits.encode_prompts(without, ["??"], 3)


def test_prompts_are_cut_on_the_left_and_the_cuts_are_printed(tokenizer, capfd):
    short, long = splits.encode_prompts(tokenizer, [" my car", " my sister damaged my car"], 3)
    assert tokenizer.decode(short) == " my car" and tokenizer.decode(long) == " damaged my car"
    assert capfd.readouterr().out == "1 of 2 prompts are longer than 3 tokens: cut on the left\n"
    splits.encode_responses(tokenizer, [[" my car", " my sister"], [" my sister damaged my car"]], 3, "texts")
    assert capfd.readouterr().out == "1 of 3 texts are longer than 3 tokens: cut, and then without an end\n"


def test_batches_are_a_partition_of_similar_lengths():
    lengths = [random.Random(i).randrange(100) for i in range(203)]
    batches = splits.length_bucketed_batches(lengths, 8, 2, torch.Generator().manual_seed(0))
    assert sorted(i for batch in batches for i in batch) == sorted([*range(203)] * 2)
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert statistics.mean(spread) < 25         # 78 at random


# ------------------------------------------------------------------------------------------------------ tasks

def test_tasks_are_told_by_their_names():
    assert splits.synthetic_task("synthetic") is splits.synthetic_task("synthetic-mixed") is synthetic
    assert splits.synthetic_task("instruct") is instructions
    assert splits.synthetic_task("tldr") is None and splits.synthetic_task(None) is None
    assert splits.Task("instruct").synthetic is instructions and splits.Task("tldr").synthetic is None
    assert splits.Task("instruct").evaluation_splits() == ["test", "ood_pairs", "ood_then2", "ood_then3"]


def test_rows_of_a_synthetic_task_are_its_module_s():
    assert splits.Task("synthetic").rows("test", 3) == synthetic.rows("test", 3, "systematic")
    assert splits.Task("synthetic-independent").rows("test", 3) == synthetic.rows("test", 3, "independent")
    assert splits.Task("instruct").rows("train", 3, 1) == instructions.rows("train", 3, references=1)
    assert len(splits.Task("synthetic").rows("test")) == 1000
    assert splits.Task("synthetic").preferences() is None


# ------------------------------------------------------------------------------------------------- the script

def test_script_prints_rows_lengths_and_examples(tmp_path):
    got = call("splits", "--rows", "20", cwd=tmp_path)
    assert got.returncode == 0 and got.stdout.startswith("task synthetic, vocabulary ")
    lines = got.stdout.splitlines()[3:3 + len(synthetic.SPLITS)]
    table = {name: cells for name, *cells in map(str.split, lines)}
    assert list(table) == list(synthetic.SPLITS)
    assert table["train"][0] == "32768" and table["test"][0] == "1000"
    assert int(table["ood_distractors7"][1]) > int(table["test"][1]) > int(table["test"][2]) > 5
    for split in synthetic.SPLITS:
        row, = synthetic.rows(split, 1)
        assert f"--- {split}\n{row['prompt']}\n  reference: {row['reference']}" in got.stdout


def test_only_files_of_the_right_names_are_splits(tmp_path):
    (tmp_path / "test.jsonl").mkdir()
    for name in ("train.jsonl", "ood_far.jsonl.gz", "ood_far.jsonl.bak", "ood_near.jsonl.tmp", "validation.json"):
        (tmp_path / name).write_bytes(b"")
    assert splits.Task("folder", str(tmp_path)).splits() == ["train", "ood_far"]


def test_script_refuses_a_folder_without_splits(tmp_path):
    refused(tmp_path, "splits", "--data", ".", says="no splits; it should hold train.jsonl")
    refused(tmp_path, "splits", "--rows", "0", says="--rows 0")
