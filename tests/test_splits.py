"""Texts as ids and back, batches of similar lengths, tasks by name, annotators, and the two scripts."""
import random
import re
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import reward
import splits
from common.errors import UserError
from common.files import read_jsonl, write_jsonl
from common.tokenizer import build_tokenizer, load_tokenizer
from conftest import call, refused
from model import GPT, GPTConfig, plain
from tasks import annotators, synthetic


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
    assert splits.encode_response(tokenizer, "", 10) == [*tokenizer.encode_ordinary(" "), tokenizer.eot_token]
    silent = SimpleNamespace(eot_token=7, encode_ordinary=lambda text: [])
    assert splits.encode_response(silent, "x", 10, finished=False) == [7]


def test_a_begin_token_takes_its_room():
    """i[-0:] would be the whole prompt; a begin token alone is one too."""
    letters = SimpleNamespace(bos=9, eot_token=0, encode_ordinary=lambda text: [ord(c) for c in text])
    assert splits.encode_prompts(letters, ["abc"], 3) == [[9, 98, 99]]
    assert splits.encode_prompts(letters, ["abc"], 1) == [[9]]


def test_prompts_are_cut_on_the_left_and_the_cuts_are_printed(tokenizer, capfd):
    short, long = splits.encode_prompts(tokenizer, [" my car", " my sister damaged my car"], 3)
    assert tokenizer.decode(short) == " my car" and tokenizer.decode(long) == " damaged my car"
    assert capfd.readouterr().out == "1 of 2 prompts are longer than 3 tokens: cut on the left\n"
    splits.encode_responses(tokenizer, [[" my car", " my sister"], [" my sister damaged my car"]], 3, True, "texts")
    assert capfd.readouterr().out == "1 of 3 texts are longer than 3 tokens: cut, without an end\n"


def test_batches_are_full_and_of_similar_lengths():
    """203 = 25 x 8 + 3 rows: each epoch leaves out three, which the shuffle chooses anew."""
    lengths = [random.Random(i).randrange(100) for i in range(203)]
    batches = splits.length_bucketed_batches(lengths, 8, 2, torch.Generator().manual_seed(0))
    epochs = [sum(batches[:25], []), sum(batches[25:], [])]
    assert len(batches) == 50 and all(len(batch) == 8 for batch in batches)
    assert all(len(set(rows)) == 200 for rows in epochs) and set(epochs[0]) != set(epochs[1])
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert statistics.mean(spread) < 25         # 78 at random


def test_a_short_batch_is_kept_if_it_is_the_only_one():
    batches = splits.length_bucketed_batches([1, 2, 3], 8, 2, torch.Generator().manual_seed(0))
    assert [sorted(batch) for batch in batches] == [[0, 1, 2]] * 2


# ------------------------------------------------------------------------------------------------------ tasks

def flags(**more):
    return SimpleNamespace(**dict(task="", data="", max_new_tokens=0, max_prompt_tokens=0) | more)


def test_tasks_are_told_by_their_names(tmp_path):
    assert splits.synthetic_task("synthetic") is splits.synthetic_task("synthetic-mixed") is synthetic
    assert splits.synthetic_task("tldr") is splits.synthetic_task(None) is None
    task = splits.task_of(flags())
    assert task == splits.SyntheticTask("synthetic", "", 32, 0) and task.synthetic is synthetic
    assert task.evaluation_splits() == [s for s in synthetic.SPLITS if s == "test" or s.startswith("ood_")]
    folder = splits.task_of(flags(data=str(tmp_path)), {"task": vars(task)})     # flags win
    assert folder == splits.FolderTask("folder", str(tmp_path), 48, 0) and folder.synthetic is None
    for one in (task, folder, splits.task_of(flags(task="alpaca"))):
        again = splits.task_from(vars(one))
        assert again == one and type(again) is type(one)


@pytest.mark.parametrize("wrong, says", [
    (dict(task="instruct"), "--task instruct: choose from"), (dict(task="folder"), "is needed"),
    (dict(task="synthetic", data="."), "takes no --data"), (dict(data="no/folder"), "no such folder")])
def test_wrong_tasks_are_refused(wrong, says):
    with pytest.raises(UserError, match=says):
        splits.task_of(flags(**wrong))


@pytest.mark.parametrize("saved", [{}, {"max_new_tokens": "32"}, {"name": "instruct"}, {"style": "new"}])
def test_a_checkpoint_s_task_of_another_version_is_refused(saved):
    whole = vars(splits.task_of(flags()))
    with pytest.raises(UserError, match="another version of this code; train it anew"):
        splits.task_from(whole | saved if saved else saved)


def test_rows_of_a_synthetic_task_are_its_module_s():
    task, independent = (splits.task_of(flags(task=name)) for name in ("synthetic", "synthetic-independent"))
    assert task.rows("test", 3) == synthetic.rows("test", 3, "systematic")
    assert independent.rows("train", 3, 1) == synthetic.rows("train", 3, "independent", 1)
    assert len(task.rows("test", references=1)) == 1000 and task.preferences() is None
    with pytest.raises(UserError, match="split 'ood_far' is not in task 'synthetic'; it has pretrain, train"):
        task.rows("ood_far")


def test_rows_and_preferences_of_a_folder(tmp_path, capfd):
    (tmp_path / "train.jsonl").write_text('{"prompt": "p", "reference": "r", "id": "a"}\n' * 2
                                          + '{"prompt": "q", "reference": "s", "id": "a#2"}\n')
    (tmp_path / "test.jsonl").write_text('{"prompt": "p", "reference": "r"}\n')
    (tmp_path / "preferences.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b", "gap": 1}\n')
    task = splits.task_of(flags(data=str(tmp_path)))
    # an id that names two rows names none
    assert [row["id"] for row in task.rows("train")] == ["train-0", "train-1", "train-2"]
    assert "several rows have one id; they are numbered instead" in capfd.readouterr().out
    assert task.rows("test") == [{"prompt": "p", "reference": "r", "id": "test-0", "references": ["r"]}]
    assert task.preferences()[0]["gap"] == 1 and task.preferences(validation=True) is None
    with pytest.raises(UserError, match="'validation' is not in task 'folder'; it has train, test; --data"):
        task.rows("validation")
    splits.print_folder(task)
    assert "1 of 1 prompts of test stand in train too" in capfd.readouterr().out
    (tmp_path / "test.jsonl").rename(tmp_path / "ood-two.jsonl")
    splits.print_folder(task)
    said = capfd.readouterr().out
    assert f"{tmp_path}: ood-two.jsonl not read; splits are train.jsonl, " in said and "no test.jsonl" in said
    for path in tmp_path.iterdir():
        path.rename(path.with_suffix(".csv"))
    with pytest.raises(UserError, match=r"csv is no JSONL; this makes some: python -c \"from datasets"):
        task.splits()


def test_some_rows_are_drawn_because_files_are_sorted(tmp_path, capfd):
    (tmp_path / "test.jsonl").write_text("".join(f'{{"prompt": "p{i}", "reference": "r"}}\n' for i in range(100)))
    task = splits.task_of(flags(data=str(tmp_path)))
    some = [row["prompt"] for row in task.rows("test", 20)]
    assert "test.jsonl: 20 of 100, drawn with seed 0" in capfd.readouterr().out
    numbers = [int(prompt[1:]) for prompt in some]
    assert len(set(numbers)) == 20 and numbers == sorted(numbers) and 30 < statistics.mean(numbers) < 70
    assert [row["prompt"] for row in task.rows("test", 20)] == some       # for every policy, and when a run goes on
    assert len(task.rows("test", 100)) == len(task.rows("test")) == 100


def test_a_checkpoint_knows_its_data_from_another_folder(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    saved = {"task": vars(splits.task_of(flags(data="data")))}
    monkeypatch.chdir("/")
    assert splits.task_of(flags(), saved).data == str(tmp_path / "data")


def test_only_files_of_the_right_names_are_splits(tmp_path):
    (tmp_path / "test.jsonl").mkdir()
    for name in ("train.jsonl", "ood_far.jsonl.gz", "ood_far.jsonl.bak", "ood_near.tmp", "validation.json"):
        (tmp_path / name).write_bytes(b"")
    assert splits.FolderTask("folder", str(tmp_path), 48, 0).splits() == ["train", "ood_far"]


# ------------------------------------------------------------------------------------------------- annotators

@pytest.fixture(scope="module")
def bundle(tokenizer):
    """An untrained model whose responses `generate`, below, takes from references."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab))
    return splits.Bundle(model, tokenizer, splits.task_of(flags()), {"weights_hash": "0"})


@pytest.fixture
def samples(monkeypatch, tokenizer, rows):
    """Samples are references of other writers, every fourth cut short.  Returns the list of calls."""
    calls = []

    def generate(model, prompts, max_new_tokens, n, eos, rng, ranks, batch_size):
        calls.append(len(prompts))
        texts = [row["references"][-n:] for row in rows]
        ids = [[splits.encode_response(tokenizer, text, max_new_tokens) for text in group] for group in texts]
        return [[*group[:-1], group[-1][:-3]] if i % 4 == 0 else group for i, group in enumerate(ids)]
    monkeypatch.setattr(annotators, "generate", generate)
    return calls


def asked(folder, **more):
    same = dict(model=str(folder / "ckpt_sft.pt"), prompts=60, held_out=20, samples=3)
    return annotators.Config(**same | more)


def test_preferences_come_back_from_their_file_and_into_groups(tmp_path, bundle, samples, rows):
    (tmp_path / "ckpt_sft.pt").write_bytes(b"")
    made = annotators.preferences(asked(tmp_path), bundle)
    path, = tmp_path.glob("preferences_*.jsonl.gz")
    first, read = path.read_bytes(), annotators.preferences(asked(tmp_path), bundle)
    assert samples == [60, 20] and read == made             # sampled once for each set of prompts
    for other in (dict(seed=1), dict(typicality=1.), dict(samples=2)):
        annotators.preferences(asked(tmp_path, **other), bundle)
    assert len(samples) == 8 and len(list(tmp_path.glob("preferences_*"))) == 4
    path.unlink()
    annotators.preferences(asked(tmp_path), bundle)
    assert path.read_bytes() == first                       # to the byte
    for pairs in made:
        for row in pairs:
            gold = [synthetic.gold_reward(row["prompt"], row[which], ended)
                    for which, ended in zip(("chosen", "rejected"), row["finished"])]
            assert row["gap"] == gold[0] - gold[1]
    groups = reward.read_groups(bundle.tokenizer, made[0], 400, 32)
    assert len(groups) == 60 and sum(len(g.pairs) for g in groups) == len(made[0])      # nothing is lost
    assert sum(r[-1] != bundle.tokenizer.eot_token for g in groups for r in g.responses) >= 60 // 4


def test_labels_are_as_noisy_as_said(bundle, samples, rows, monkeypatch):
    """P(y preferred) = sigma(u(y) - u(z)): the mean of the labels is the mean of these probabilities."""
    pairs = annotators.compare(bundle, rows, 3, torch.Generator().manual_seed(0))
    gaps = torch.tensor([pair["gap"] for pair in pairs])
    expected = torch.sigmoid(gaps.abs()).mean().item()
    assert ((gaps > 0).float() + (gaps == 0) / 2).mean().item() == pytest.approx(expected, abs=.03)
    # log-probabilities that decide all, the reference's being the highest
    monkeypatch.setattr(annotators, "mean_log_probs", lambda model, prompt, responses: range(len(responses)))
    pairs = annotators.compare(bundle, rows[:20], 1, torch.Generator().manual_seed(0), typicality=1e6)
    references = {row["prompt"]: row["reference"] for row in rows}
    assert all(pair["chosen"] == references[pair["prompt"]] for pair in pairs)


def test_a_judge_labels_samples_of_any_task(tmp_path, tokenizer, rows, monkeypatch):
    """Of two words each, the judge knows "good" from "bad", and an output without an end is worse than both:
    at next to no noise every label is the judge's."""
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"p{i}", "reference": "good"} for i in range(6)])
    write_jsonl(tmp_path / "validation.jsonl", [{"prompt": "v", "reference": "good"}])
    bundle = splits.Bundle(GPT(GPTConfig(vocab_size=tokenizer.n_vocab)), tokenizer,
                           splits.FolderTask("folder", str(tmp_path), 48, 0), {})
    ids = [splits.encode_response(tokenizer, text, 48) for text in ("bad", "good")]
    monkeypatch.setattr(annotators, "generate", lambda model, prompts, *_, **more: [
        [ids[0], ids[1], ids[1][:-1]] for _ in prompts])
    monkeypatch.setattr(annotators, "load_encoder", lambda *_, **more: lambda texts: np.array(
        [[1., 0.] if "good" in text else [.9, np.sqrt(.19)] for text in texts]))
    made = annotators.judged(asked(tmp_path, judge="sbert:x", noise=1e-3), bundle, torch.device("cpu"))
    assert [len(pairs) for pairs in made] == [18, 3]
    assert [(x["chosen"].strip(), x["rejected"].strip(), x["finished"]) for x in made[1]] == [
        ("good", "bad", [True, True]), ("bad", "good", [True, False]), ("good", "good", [True, False])]
    assert [x["gap"] for x in made[1]] == pytest.approx([100, 150, 250])
    with pytest.raises(UserError, match="sbert:NAME is needed"):
        annotators.judged(asked(tmp_path, judge="gold"), bundle, torch.device("cpu"))


def test_mean_log_probs_are_means_over_tokens(bundle):
    prompt, responses = [5, 6, 7], [[8, 9], [10, 11, 12, 13]]
    got = annotators.mean_log_probs(bundle.model, prompt, responses)
    for value, ids in zip(got, responses):
        with torch.no_grad():       # each response apart, behind its own copy of the prompt
            logp = bundle.model.head(bundle.model(plain([prompt + ids]))).log_softmax(-1)[0]
        # logits at i predict token i + 1
        expected = statistics.mean(logp[2 + i, x].item() for i, x in enumerate(ids))
        assert value == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------------------------------------ the scripts

def test_the_annotators_files_are_preferences_of_one_s_own(work, tmp_path):
    flags = ["--model", work / "ckpt_sft.pt", "--prompts", 8, "--held-out", 4, "--threads", 1]
    got = call("tasks.annotators", *flags, "--out", tmp_path, cwd=tmp_path)
    assert got.returncode == 0, got.stderr
    said = re.findall(r"wrote \S*/(preferences\w*).jsonl: (\d+) pairs on (\d+) prompts", got.stdout)
    held = {name: read_jsonl(tmp_path / f"{name}.jsonl", {}) for name, *_ in said}
    assert said == [(name, str(len(rows)), n) for (name, rows), n in zip(held.items(), "84", strict=True)]
    task = splits.FolderTask("folder", str(tmp_path), 32, 0)
    assert [task.preferences(), task.preferences(validation=True)] == list(held.values())
    refused(tmp_path, "tasks.annotators", *flags, "--task", "tldr", says="its preferences are people's")


def test_script_prints_lengths_and_examples(tmp_path):
    got = call("splits", cwd=tmp_path)
    assert got.returncode == 0, got.stderr
    found = re.findall(r"--- (\w+): (\d+) words a prompt, (\d+) a reference \(medians of 1000 rows\)", got.stdout)
    words = {split: (int(prompt), int(reference)) for split, prompt, reference in found}
    assert list(words) == list(synthetic.SPLITS)
    assert words["ood_distractors7"][0] > words["test"][0] > words["test"][1] > 5
    row, = synthetic.rows("ood_article", 1)
    assert f"rows)\n{row['prompt']}\n  reference: {row['reference']}" in got.stdout


def test_script_refuses_a_folder_without_splits(tmp_path):
    refused(tmp_path, "splits", "--data", ".", says="no splits; it should hold train.jsonl")
