"""Outputs side by side, and the curves of logs."""
import json

import pytest

from common.errors import UserError
from common.files import read_jsonl
from tasks import synthetic
from tools import curves, show

ROWS = synthetic.rows("test", 3, references=1)
PROMPT = ("TITLE my sister with my guitar\n"
          "POST so my sister damaged my guitar . then my cousin sold my camera . is it right to complain ? "
          "i am afraid since xmas .\nTLDR")
EVIL = " <script>alert(1)</script> \x1b[31m & co ."


def write(path, policy, outputs, rows=ROWS, split="test", **more):
    """A sample file with the same outputs to each row.  Returns its path as a string."""
    n = len(outputs)
    path.write_text("".join(json.dumps({
        "id": row["id"], "prompt": row["prompt"], "reference": row["reference"], "outputs": outputs,
        "rewards": None, "finished": [True] * n, "policy": policy, "split": split, "temperature": 1.0,
        "seed": 0, "task": "synthetic", **more}) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    texts = [" i feel sad .", " now angry .", " i feel sad ."]
    return [write(tmp_path / f"{name}.jsonl", name, texts) for name in ("ppo", "zebra", "bon", "base", "sft")]


def screen(capsys, **flags):
    """What the script prints."""
    show.main(show.Config(**flags))
    return capsys.readouterr().out


def test_columns_stand_in_the_order_of_the_study_and_fit(files, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    text = screen(capsys, files=files, prompt="2")
    assert text.startswith(f"prompt 2: {ROWS[1]['id']} (test)") and ROWS[1]["reference"].strip()[:20] in text
    header = next(line for line in text.splitlines() if "zebra" in line)
    assert header.split() == ["base", "sft", "bon", "ppo", "zebra"]
    assert max(map(len, text.splitlines())) <= 160
    monkeypatch.setenv("COLUMNS", "60")         # too narrow for five columns
    text = screen(capsys, files=files, prompt=ROWS[1]["id"])
    assert "-" * show.NARROWEST + "   -" in text


def test_equal_outputs_are_merged_and_carry_their_gold_reward(files, capsys):
    text = screen(capsys, files=files[:1], prompt="1")
    sad = synthetic.gold_reward(ROWS[0]["prompt"], " i feel sad .")
    angry = synthetic.gold_reward(ROWS[0]["prompt"], " now angry .")
    text = text.replace("*", "")
    assert f" 2 x  i feel sad . [{sad:.2f}]" in text and f"      now angry . [{angry:.2f}]" in text
    assert f"3 outputs, 2 different, mean gold reward {(2 * sad + angry) / 3:.2f}" in text


def test_rewards_of_the_file_and_unfinished_outputs(tmp_path, capsys):
    rows = [{"id": "a", "prompt": "why ?", "reference": ""}]
    path = write(tmp_path / "a.jsonl", "ppo", [" because", " so", " so"], rows, task="tldr",
                 rewards=[0.5, -1.25, -1.5], finished=[True, False, True])
    text = screen(capsys, files=[path], prompt="a")
    assert "because [0.50]" in text and "so [-1.25] [unfinished]" in text and "so [-1.50]\n" in text
    assert "mean reward -0.75" in text and "reference" not in text


def test_numbers_and_ids_choose_prompts(tmp_path, capsys):
    other = [{**row, "prompt": row["prompt"].replace("TITLE", "ARTICLE")} for row in ROWS]
    files = [write(tmp_path / "a.jsonl", "sft", [" i feel sad ."]),
             write(tmp_path / "b.jsonl", "sft", [" i feel sad ."], other, split="ood_article"),
             write(tmp_path / "c.jsonl", "ppo", [" i feel sad ."], ROWS[::2])]
    listed = screen(capsys, files=files)
    assert "4-6      ood_article" in listed and "sft, ppo (2 of 3 prompts)" in listed
    assert screen(capsys, files=files, prompt="5").startswith(f"prompt 5: {ROWS[1]['id']} (ood_article)")
    text = screen(capsys, files=files, prompt=ROWS[1]["id"])
    assert "(test)" in text and "(ood_article)" in text
    both = screen(capsys, files=files, prompt="1, 3")
    assert "prompt 1:" in both and "prompt 3:" in both and "prompt 2:" not in both
    for wrong, says in (("7", "1 to 6"), ("nobody", "no such prompt")):
        with pytest.raises(UserError, match=says):
            show.main(show.Config(files=files, prompt=wrong))


def test_columns_are_told_apart_by_temperature_and_seed():
    names = show.column_names([("sft", .7, 0, "test"), ("sft", 1., 0, "test")])
    assert names == ["policy sft, temperature 0.7, seed 0, split test",
                     "policy sft, temperature 1.0, seed 0, split test"]
    assert show.column_names([("a", .7, None, "file1"), ("b", 1., None, "file2")]) == ["a", "b"]


def test_texts_cannot_steer_the_terminal(tmp_path, capsys):
    files = [write(tmp_path / "a.jsonl", "evil\x1b", [EVIL, ""])]
    text = screen(capsys, files=files, prompt="1") + screen(capsys, files=files)
    assert "\x1b" not in text and "<script>" in text and "(nothing)" in text


def test_wrong_facts_stand_between_stars():
    text = "my sis sold my guitar . i feel angry . my boss wallet ."
    marked = show.mark_wrong_facts(text, PROMPT, synthetic)
    # the last clause is not of the grammar: its words state nothing
    assert marked == "my sis *sold* my guitar . i feel *angry* . my boss wallet ."


# ----------------------------------------------------------------------------------------------------- curves

def test_committed_runs_are_a_healthy_and_a_sick_one():
    healthy, sick = (read_jsonl(curves.REFERENCES[name], {"step": int, "kl": float})
                     for name in ("healthy", "sick"))
    for rows in (healthy, sick):
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        assert set(curves.PANELS) <= set(rows[0])
    assert healthy[-1]["kl"] < 10 < 30 < sick[-1]["kl"]
    # over-optimised: more reward than the healthy run has, and less gold reward than the SFT policy
    assert sick[-1]["reward"] > healthy[-1]["reward"]
    assert sick[-1]["gold_reward"] < sick[0]["gold_reward"] < healthy[-1]["gold_reward"]


def test_a_ppo_log_is_drawn_over_them_and_another_one_alone(tmp_path, capsys):
    lines = [{"step": 1, "kl": 0.5, "reward": float("nan")}, {"step": 2, "kl": 0.75, "reward": 2}]
    assert list(curves.panels_of(lines)) == ["reward", "kl"] and set(curves.references_of(lines)) == {
        "healthy", "sick"}
    curves.draw_curves(lines, tmp_path / "ppo.png", "this run")
    assert curves.series(lines, "kl").tolist() == [[1, 2], [0.5, 0.75]]
    log = tmp_path / "metrics_sft.jsonl"
    log.write_text('{"step": 200, "loss": 1.5}\n{"step": 400, "loss": 1.25, "flag": true}\n')
    lines = read_jsonl(log, {"step": int})
    assert list(curves.panels_of(lines)) == ["loss"] and not curves.references_of(lines)
    assert str(log.with_suffix(".png")) in screen(capsys, files=[str(log)])
    assert log.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_files_that_cannot_be_shown_are_refused(files, tmp_path):
    log, empty = tmp_path / "metrics_ppo.jsonl", tmp_path / "empty.jsonl"
    log.write_text('{"step": 1, "kl": 0.5}\n')
    empty.write_text('{"step": 1, "text": "x"}\n')
    for names, says in (([files[0], log], "is a log"), ([empty], "none of its lines holds a number"),
                        (["nothing.jsonl"], "no such file"), ([], "bon.py")):
        with pytest.raises(UserError, match=says):
            show.main(show.Config(files=[str(name) for name in names]))
