"""Sample files: what is written is read back, and each bad file gets one line that names file and place."""
import json

import pytest

from common.errors import UserError
from common.files import write_jsonl
from common.prompts import instruction_prompt
from common.samples import (known_task, matched, read_all, read_runs, read_samples, run_name, run_table, sample_path,
                            study_order, text_table)
from conftest import call

LINE = {"id": "a", "prompt": "POST: a cat\nTL;DR:", "reference": "a cat", "outputs": [" x", " y"], "rewards": [.1, 2.],
        "finished": [True, False], "policy": "sft", "split": "test", "temperature": 1.0, "seed": 0, "task": "tldr",
        "trained_against": None}


def line(**more):
    return LINE | more


def test_what_is_written_is_read_back(tmp_path):
    path = sample_path(tmp_path, "sft", "test")
    assert path == tmp_path / "samples_sft_test.jsonl"
    write_jsonl(path, [line(), line(id="b", rewards=None)])
    first, second = read_samples(path)
    assert first == LINE and second["rewards"] is None and known_task([first, second]) == "tldr"
    assert known_task([first, {"task": "alpaca"}]) is None and known_task([first, {}]) is None
    assert list(read_all([path])) == [("sft", 1.0, 0, "test")]


def test_foreign_files_may_leave_fields_out(tmp_path):
    path = tmp_path / "s.jsonl"
    bare = {k: line()[k] for k in ("prompt", "reference", "outputs", "policy", "split")}
    write_jsonl(path, [bare, bare])
    rows = read_samples(path)
    assert len({r["id"] for r in rows}) == 2 and rows[0]["finished"] == [True, True]
    assert known_task(rows) is None and list(read_all([path])) == [("sft", None, None, "test")]


def test_without_ids_policies_meet_by_prompt_whatever_the_order(tmp_path):
    def bare(prompt, policy):
        row = line(prompt=prompt, policy=policy, outputs=[f"{policy} {prompt}"] * 2)
        return row | {"id": None} if prompt == "b" else {k: v for k, v in row.items() if k != "id"}
    paths = [tmp_path / "x.jsonl", tmp_path / "y.jsonl"]
    for path, prompts in zip(paths, ("aab", "cbaa")):
        write_jsonl(path, [bare(p, path.stem) for p in prompts])
    (_, x), (_, y) = read_all(paths).items()
    pairs = [(x[i]["outputs"][0], y[j]["outputs"][0]) for i, j in matched(x, y, "xy")]
    assert pairs == [("x a", "y a"), ("x a", "y a"), ("x b", "y b")]


@pytest.mark.parametrize("lines, says", [
    ([], "no samples"),
    ([line(), line()], "sample 2: the id 'a' is that of sample 1"),
    ([line(outputs=[])], "sample 1: outputs must be a non-empty list of strings"),
    ([line(outputs=[" x", 3])], "sample 1: outputs must be a non-empty list of strings"),
    ([line(), line(id="b", outputs=[" x"], finished=[True], rewards=None)],
     "sample 2: 1 outputs, the first of policy sft, temperature 1.0, seed 0, split test has 2"),
    ([line(), line(id="b", policy="ppo")], "it holds 2 runs where one is needed"),
    ([line(finished=[True])], "sample 1: finished must be a list of booleans, as long as outputs"),
    ([line(finished=None)], "sample 1: finished must be a list of booleans, as long as outputs"),
    ([line(finished=["false", "true"])], "sample 1: finished must be a list of booleans"),
    ([{k: v for k, v in line().items() if k != "policy"}], "line 1: field 'policy' is missing")])
def test_what_is_wrong_and_where(lines, says, tmp_path):
    path = tmp_path / "s.jsonl"
    write_jsonl(path, lines)
    with pytest.raises(UserError) as error:
        read_samples(path)
    assert says in str(error.value) and "s.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_files_are_refused_twice_and_where_they_are_missing(tmp_path):
    for name in ("a", "b"):
        write_jsonl(tmp_path / name, [line()])
    with pytest.raises(UserError, match="b: policy sft, temperature 1.0, seed 0, split test was already"):
        read_all([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(UserError, match="nope: no such file"):
        read_all([tmp_path / "nope"])
    with pytest.raises(UserError, match="no sample files"):
        read_all([])


def test_a_file_of_several_policies_is_several_runs(tmp_path):
    path = tmp_path / "s.jsonl"
    write_jsonl(path, [line(), line(policy="ppo", outputs=[" z"] * 3, finished=[True] * 3, rewards=None),
                       line(id="b"), line(temperature=.7), line(split="ood_x")])
    runs = read_runs(path)
    assert [(key, len(rows)) for key, rows in runs.items()] == [
        (("sft", 1.0, 0, "test"), 2), (("ppo", 1.0, 0, "test"), 1), (("sft", .7, 0, "test"), 1),
        (("sft", 1.0, 0, "ood_x"), 1)]
    assert run_name(("sft", 1.0, None, "test")) == "policy sft, temperature 1.0, split test"
    assert list(read_all([path])) == [("sft", .7, 0, "test"), ("sft", 1.0, 0, "test"),
                                      ("ppo", 1.0, 0, "test"), ("sft", 1.0, 0, "ood_x")]


def test_one_id_is_one_prompt():
    rows = [{"id": "1", "prompt": "p"}, {"id": "2", "prompt": "q"}]
    assert matched(rows, [{"id": "2", "prompt": "q"}, {"id": 1, "prompt": "p"}], "AB") == [(0, 1), (1, 0)]
    assert matched(rows, [{"id": "3", "prompt": "q"}], "AB") == []
    with pytest.raises(UserError, match="the id '2' names one prompt in A and another in B"):
        matched(rows, [{"id": "2", "prompt": "p"}], "AB")
    assert matched([line()], [line(reference=" ")], "AB") == [(0, 0)]       # an empty reference meets any
    with pytest.raises(UserError, match="the id 'a' names one reference in A and another in B"):
        matched([line()], [line(reference="a dog")], "AB")


def test_tables_show_the_test_set_first_and_the_policies_of_the_study_in_order():
    keys = [(policy, t, 0, split) for split in ("ood_b", "test", "ood_a")
            for policy in ("zeta", "ppo", "base") for t in (1.0, .7)] + [("ppo", None, None, "test")]
    found = sorted(keys, key=study_order)
    assert [k[:2] for k in found[:7]] == [("base", .7), ("base", 1.0), ("ppo", None), ("ppo", .7),
                                          ("ppo", 1.0), ("zeta", .7), ("zeta", 1.0)]
    assert list(dict.fromkeys(k[3] for k in found)) == ["test", "ood_a", "ood_b"]


def test_alpaca_eval_s_outputs_become_sample_lines(tmp_path):
    rows = [{"instruction": "Add.", "output": "3", "generator": "gpt4"},
            {"instruction": "Add.", "input": "1 2", "output": "3", "generator": "gpt4"}]
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(rows))
    first, second = read_samples(path)
    assert first == {"id": first["id"], "prompt": instruction_prompt("Add."), "reference": "",
                     "outputs": ["3"], "policy": "gpt4", "split": "alpaca_eval", "finished": [True]}
    assert "### Input:\n1 2\n\n### Response:" in second["prompt"] and "Input" not in first["prompt"]
    for bad in ('{"instruction": 3}', "[3]", '[{"instruction": "a", "output": "b"}]', "[",
                '{"a": 1}\n{"a": 2}'):
        path.write_text(bad)
        with pytest.raises(UserError, match="AlpacaEval's list"):
            read_samples(path)


def write_lines(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_two_tasks_are_not_put_into_one_table(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, task, split in zip(paths, ("tldr", "folder"), ("test", "ood_b")):
        write_jsonl(path, [line(task=task, split=split)])
    with pytest.raises(UserError, match=r"several tasks cannot be compared: tldr \(policy sft, .*; folder \("):
        read_all(paths)
    write_jsonl(paths[1], [line(task=None, split="ood_b")])      # nothing is known of it
    assert len(read_all(paths)) == 2
    (tmp_path / "ckpt_sft.pt").write_bytes(b"PK")
    with pytest.raises(UserError, match="a checkpoint; `python bon.py --model .*ckpt_sft.pt` writes samples"):
        read_all([tmp_path / "ckpt_sft.pt"])


def test_novelty_bench_s_generations_become_sample_lines(tmp_path):
    row = {"id": "curated-0", "prompt": "Name a tree.", "model": "m", "generations": ["Oak", "Elm"],
           "generation_config": {"stage": "generation"}}
    path = write_lines(tmp_path / "generations.jsonl", [row, row | {"id": "curated-1"}])
    assert read_samples(path)[0] == {"id": "curated-0", "prompt": "Name a tree.", "reference": "", "policy": "m",
                                     "outputs": ["Oak", "Elm"], "split": "novelty_bench", "finished": [True] * 2}
    write_lines(path, [row, row | {"generations": "Oak"}])
    with pytest.raises(UserError, match="line 2: field 'generations'"):
        read_samples(path)
    write_lines(path, [row | {"generations": []}])
    with pytest.raises(UserError, match="outputs must be a non-empty list"):
        read_samples(path)


@pytest.mark.parametrize("arguments", [
    {"gen_args_0": {"arg_0": "Q: 1 + 1?", "arg_1": {"until": ["Q:"]}}}, [["Q: 1 + 1?", {"until": ["Q:"]}]],
    {"gen_args_0": {"arg_0": ["Q: 1 + 1?"]}}])
def test_the_harness_s_samples_become_sample_lines(arguments, tmp_path):
    row = {"doc_id": 7, "doc": {"question": "1 + 1?"}, "target": 2, "arguments": arguments,
           "resps": [["2", "two"]], "filtered_resps": ["2"], "filter": "strict", "exact_match": 1.0}
    path = write_lines(tmp_path / "my__model" / "samples_sums_en_2026-11-30T12-00-00.1.jsonl",
                       [row, row | {"filter": "flexible"}])
    assert read_samples(path) == [{"id": "7", "prompt": "Q: 1 + 1?", "reference": "2", "outputs": ["2", "two"],
                                   "policy": "my__model", "split": "sums_en", "finished": [True] * 2}]
    chosen = {"resps": [[["-0.5", "False"]], [["-1.5", "True"]]]}       # of a task with choices
    for bad in (row | chosen, {"doc_id": 1, "resps": []}, row | {"arguments": "Q"} | {"resps": [1]}):
        write_lines(path, [bad])
        with pytest.raises(UserError, match="answers are texts|non-empty list of strings"):
            read_samples(path)


@pytest.mark.parametrize("script", ["diversity", "generalisation"])
def test_other_people_s_files_are_measured(script, tmp_path):
    novel = [{"id": f"c-{i}", "prompt": f"Name {i}.", "model": "m", "generations": ["Oak", "Elm"]} for i in range(3)]
    sums = [{"doc_id": i, "target": "2", "arguments": {"gen_args_0": {"arg_0": f"Q{i}"}}, "resps": [["2", "3"]]}
            for i in range(3)]
    files = (write_lines(tmp_path / "generations.jsonl", novel),
             write_lines(tmp_path / "n" / "samples_sums_2026-11-30T12-00-00.jsonl", sums))
    got = call(script, *files, "--out", tmp_path, cwd=tmp_path)
    assert got.returncode == 0, got.stderr
    found = json.loads((tmp_path / f"{script}.json").read_text())
    lines = found["results" if script == "diversity" else "rouge"]
    assert [(x["policy"], x["split"]) for x in lines] == [("m", "novelty_bench"), ("n", "sums")]
    if script == "generalisation":      # nothing to be near to; and "2" of "2", "3"
        assert lines[0]["rougeL"] is None and lines[1]["rougeL"][0] == .5
    assert "intervals say little" in got.stdout


# ----------------------------------------------------------------------------------------------------- tables

def test_a_table_is_aligned():
    assert text_table(["a", "bb"], [["ccc", 1], ["d", None]]) == "a    bb\nccc  1\nd    None"


def test_a_wide_table_becomes_blocks_that_repeat_the_labels():
    header = ["policy", "T", *(f"measure {i}" for i in range(7))]
    rows = [["sft", 1.0, *range(7)], ["ppo", .7, *(f"{i}.000 [0.000, 9.999]" for i in range(7))]]
    text = text_table(header, rows, labels=2, width=60)
    blocks = text.split("\n\n")
    assert len(blocks) == 4 and max(map(len, text.splitlines())) <= 60
    assert all(b.splitlines()[1].startswith("sft     1.0") and len(b.splitlines()) == 3 for b in blocks)
    assert [w for b in blocks for w in b.splitlines()[0].split()[2:] if w != "measure"] == [*"0123456"]


def test_a_column_of_equal_seeds_is_left_out():
    lines = [{"policy": p, "split": "test", "temperature": None, "seed": 0} for p in ("sft", "ppo")]
    assert run_table(lines, {"x": [1, 2]}).splitlines() == [
        "split  policy  T  x", "test   sft     -  1", "test   ppo     -  2"]
    assert "seed" in run_table([lines[0], lines[1] | {"seed": 1}], {"x": [1, 2]})
