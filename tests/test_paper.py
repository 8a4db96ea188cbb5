"""The paper's tasks, from local copies of the data sets' schemas and through `datasets`, prompts to the
letter."""
import json
import sys
from types import SimpleNamespace

import datasets
import pytest

import ppo
from common.errors import UserError
from common.tokenizer import build_tokenizer, load_tokenizer
from conftest import refused
from splits import Bundle, PaperTask, task_of
from tasks import paper


def put(folder, name, rows):
    path = folder / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def post(i, words=10, subreddit="relationships"):
    return {"id": f"p{i}", "subreddit": subreddit, "title": f"title {i}", "post": " ".join(["word"] * words),
            "summary": f"summary {i}"}


def compared(i, choice=0, **info):
    return {"info": {"post": f"post {i}", "title": "t", "subreddit": "tifu", "article": None} | info,
            "choice": choice, "summaries": [{"text": " first"}, {"text": " second"}]}


def task_from(name, data=""):
    return PaperTask(name, str(data), 48, 1024)


@pytest.fixture
def local(tmp_path):
    tldr = "summarize_from_feedback_tldr_3_filtered"
    posts = [post(0), post(1, 245), post(2, 246), post(3, subreddit="cats")]
    for split in ("train", "validation", "test"):
        put(tmp_path, f"{tldr}/{split}", posts)
    put(tmp_path, "cnn_dailymail/3.0.0/test", [{"id": "c", "article": "News.", "highlights": "N ."}])
    put(tmp_path, "summarize_from_feedback/comparisons/train",
        [compared(0), compared(1, 1), compared(2, post=None, article="an article")])
    put(tmp_path, "summarize_from_feedback/comparisons/validation", [compared(3)])
    task = {"instruction": "Add.", "input": "1 2", "output": "3"}
    for split in ("sft", "val", "unlabeled"):
        put(tmp_path, f"alpaca_farm/alpaca_instructions/{split}", [task, task | {"input": ""}])
    put(tmp_path, "alpaca_farm/alpaca_human_preference/preference",
        [{"instruction": "Add.", "input": "", "output_1": "3", "output_2": "4", "preference": 2}])
    put(tmp_path, "alpaca-farm-id-test/test", [task])
    put(tmp_path, "alpaca_eval/eval",
        [{"instruction": "Add.", "output": "3", "generator": "g", "dataset": "d"}])
    put(tmp_path, "sequential-instructions/train", [task])
    return tmp_path


def test_summarisation_prompts_and_splits(local):
    task = task_from("tldr", local)
    assert task.splits() == ["train", "validation", "test", "ood_cnn"]
    row = task.rows("train")[0]
    assert row["prompt"] == f"SUBREDDIT: r/relationships\nTITLE: title 0\nPOST: {row['post']}\nTL;DR:"
    assert row["reference"] == "summary 0" and row["id"] == "p0"
    news, = task.rows("ood_cnn")
    assert news["prompt"] == "ARTICLE: News.\nTL;DR:" and news["reference"] == "N ."


def test_short_prompts_are_first_words_and_no_post_is_in_two_sets(local):
    put(local, "cnn_dailymail/3.0.0/test", [{"id": "c", "article": "news " * 60, "highlights": "N ."}])
    task = task_from("tldr-short", local)
    ids = {s: [row["id"] for row in task.rows(s)] for s in task.splits()}
    assert ids == {"train": ["p0", "p2"], "unlabeled": ["p1", "p3"], "validation": ["p0", "p1", "p2", "p3"],
                   "test": ["p0", "p2"], "ood_long": ["p1", "p3"], "ood_cnn": ["c"]}
    words = {s: task.rows(s)[0]["prompt"].count("word") or task.rows(s)[0]["prompt"].count("news") for s in ids}
    assert words == {"train": 10, "unlabeled": 40, "validation": 10, "test": 10, "ood_long": 120, "ood_cnn": 55}
    assert task.preferences() is None and [source.name for source in paper.sources("tldr-short")][3:] == [
        "abisee/cnn_dailymail"]


def test_comparisons_become_preferences_and_articles_are_left_out(local):
    task = task_from("tldr", local)
    assert [(p["chosen"], p["rejected"]) for p in task.preferences()] == [
        ("first", "second"), ("second", "first")]
    assert task.preferences()[0]["prompt"] == "SUBREDDIT: r/tifu\nTITLE: t\nPOST: post 0\nTL;DR:"
    assert len(task.preferences(validation=True)) == 1


@pytest.mark.parametrize("read, row, says", [
    (paper.comparison, compared(0) | {"summaries": [{"text": "a"}, {}]}, "column 'text' of type str"),
    (paper.comparison, compared(0, title=None), "column 'title' of type str is needed"),
    (paper.instruction_row, {"instruction": "Add.", "output": 2}, "column 'output' of type str"),
    (paper.instruction_comparison, {"output_1": "a", "output_2": "b", "preference": "1"},
     "column 'preference' of type int")])
def test_odd_fields_are_named(read, row, says):
    with pytest.raises(UserError, match=says):
        read(row, paper.ALPACA_PREFERENCES)


@pytest.mark.parametrize("name, inside, shifted, outside", [
    ("tldr-length", ["p0", "p1", "p3"], "ood_long", ["p2"]),    # 246 words
    ("tldr-subreddit", ["p0", "p1", "p2"], "ood_subreddit", ["p3"])])
def test_graded_splits_part_the_posts(name, inside, shifted, outside, local):
    task = task_from(name, local)
    assert [r["id"] for r in task.rows("train")] == [r["id"] for r in task.rows("test")] == inside
    assert [r["id"] for r in task.rows(shifted)] == outside


def test_the_sentiment_split_takes_a_classifier(local, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    task = task_from("tldr-sentiment", local)
    with pytest.raises(UserError, match="pip install transformers"):
        task.rows("train")
    monkeypatch.setattr(paper, "sentiments", lambda posts: [True, False, True, False])
    assert [[r["id"] for r in task.rows(split)] for split in ("train", "ood_sentiment")] == [
        ["p0", "p2"], ["p1", "p3"]]


def test_instruction_prompts_and_splits(local):
    task = task_from("alpaca", local)
    with_input, without = task.rows("train")
    assert with_input["prompt"] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
        "### Input:\n1 2\n\n### Response:")
    assert without["prompt"] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nAdd.\n\n### Response:")
    assert paper.instruction_of(with_input["prompt"]) == "Add.\n\n1 2"
    assert paper.instruction_of(without["prompt"]) == "Add."
    assert task.evaluation_splits() == ["test", "ood_alpaca_eval", "ood_sequential"]
    assert all(task.rows(s) for s in task.splits())
    pair, = task.preferences()
    assert (pair["chosen"], pair["rejected"]) == ("4", "3") and task.preferences(validation=True) is None


def test_parquet_copies_in_parts(local):
    folder = local / "cnn_dailymail" / "3.0.0"
    (folder / "test.jsonl").unlink()
    for i in range(2):
        rows = [{"id": f"{i}", "article": f"Article {i}.", "highlights": "H"}]
        datasets.Dataset.from_list(rows).to_parquet(str(folder / f"test-0000{i}-of-00002.parquet"))
    assert [r["id"] for r in task_from("tldr", local).rows("ood_cnn")] == ["0", "1"]
    (folder / "test-00001-of-00002.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        task_from("tldr", local).rows("ood_cnn")


def test_a_missing_column_is_named_with_what_was_found(local):
    put(local, "cnn_dailymail/3.0.0/test", [{"id": "c", "document": "News.", "highlights": "N ."}])
    with pytest.raises(UserError, match=r"cnn_dailymail: column 'article'.*document \(str\)"):
        task_from("tldr", local).rows("ood_cnn")


def test_a_missing_copy_says_where_it_should_lie(local):
    (local / "alpaca_eval" / "eval.jsonl").unlink()
    with pytest.raises(UserError, match="alpaca_eval: no eval.jsonl"):
        task_from("alpaca", local).rows("ood_alpaca_eval")
    # a study asks for it before it trains for hours
    refused(local, "reproduce", "--task", "alpaca", "--data", local, says="alpaca_eval: no eval.jsonl")


def test_the_hub_is_asked_for_the_paper_s_data_sets(monkeypatch):
    """The hub is played by a function.  A branch of parquet files has folders and no configurations."""
    asked = []

    def load_dataset(path, name=None, data_files=None, split=None, revision=None):
        asked.append((path, name or data_files, split, revision))
        if split == "test":
            raise ValueError("Unknown split 'test'.")
        return datasets.Dataset.from_list([{"instruction": "Add.", "input": "", "output": "3"}])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [task_from("alpaca").rows(s)[0]["reference"] for s in ("train", "ood_sequential")] == ["3", "3"]
    assert asked == [
        ("tatsu-lab/alpaca_farm", {"sft": "alpaca_instructions/sft/*.parquet"}, "sft", paper.PARQUET),
        ("UCL-DARK/sequential-instructions", None, "test", None),       # a split may have either name
        ("UCL-DARK/sequential-instructions", None, "train", None)]
    with pytest.raises(UserError, match="not give its split test .ValueError: Unknown split.*--data DIR"):
        task_from("tldr").rows("test")


@pytest.mark.parametrize("name", ["tldr", "alpaca"])
def test_every_source_is_read_in_the_hub_s_layout(name, local, tmp_path_factory, monkeypatch):
    """By the real `datasets`, from a mirror: refs/convert/parquet is folders by configuration and split, of
    which another configuration is a trap; other data sets have files by split, or name them in README.md."""
    mirror = tmp_path_factory.mktemp("mirror")
    for source in paper.sources(name):
        file, rows = mirror / source.name, datasets.Dataset.from_list(source.rows(local))
        found = next(s for s in reversed(source.split) if any(local.glob(f"{file.name}/**/{s}.jsonl")))
        if source.revision == paper.PARQUET:
            for config, some in ((source.config, rows), ("another", datasets.Dataset.from_list([{"x": 1}]))):
                (file / config / found).mkdir(parents=True, exist_ok=True)
                some.to_parquet(str(file / config / found / "0000.parquet"))
        else:
            (file / "data").mkdir(parents=True, exist_ok=True)
            rows.to_parquet(str(file / f"data/{found}-00000-of-00001.parquet"))
            if source.config:
                (file / "README.md").write_text("---\nconfigs:\n" + "".join(
                    f"- config_name: {config}\n  data_files:\n  - split: {found}\n    path: data/{found}-*\n"
                    for config in ("another", source.config)) + "---\n")
    monkeypatch.chdir(mirror)           # a name such as abisee/cnn_dailymail is a folder here
    for split in paper.splits(name):
        assert paper.rows(name, split) == paper.rows(name, split, local)
    for validation in (False, True):
        assert paper.preferences(name, validation) == paper.preferences(name, validation, local)


@pytest.mark.parametrize("answer", [{"output": "3"}, {"output": ""}, {"output": None}, {}])
def test_ppo_s_prompts_need_no_answer(local, answer):
    put(local, "alpaca_farm/alpaca_instructions/unlabeled", [{"instruction": "Add.", "input": "1"} | answer])
    task, tokenizer = task_from("alpaca", local), load_tokenizer(build_tokenizer(["Add . 1 2"]))
    model = SimpleNamespace(config=SimpleNamespace(context=512))
    rows, prompts = ppo.read_prompts(Bundle(model, tokenizer, task, {}), 10)
    assert [row["id"] for row in rows] == ["unlabeled-0"] and len(prompts) == 1
    put(local, "alpaca_farm/alpaca_instructions/sft", [{"instruction": "Add.", "output": ""}])
    with pytest.raises(UserError, match="no rows"):
        task.rows("train")


def test_lengths_follow_flags_then_the_checkpoint_then_the_task(local):
    flags = SimpleNamespace(task="alpaca", data=str(local), max_new_tokens=0, max_prompt_tokens=0)
    task = task_of(flags)
    assert (task.max_new_tokens, task.max_prompt_tokens) == (128, 1024)
    assert task.max_prompt_len(2048) == 1024 and task.max_prompt_len(200) == 72
    with pytest.raises(UserError, match="no room"):
        task.max_prompt_len(128)
    flags.task = flags.data = ""
    saved = {"task": dict(name="alpaca", data=str(local), max_new_tokens=64, max_prompt_tokens=320)}
    assert task_of(flags, saved) == PaperTask("alpaca", str(local), 64, 320)
    flags.max_new_tokens = 32
    assert task_of(flags, saved).max_new_tokens == 32
