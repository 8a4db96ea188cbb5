"""Outputs side by side, on the screen and as a page, and the curves of logs."""
import json
import re

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
    assert f" 2 x  i feel sad . [{sad:.2f}]" in text and f"      now angry . [{angry:.2f}]" in text
    assert f"different outputs: 2 of 3, mean gold reward {(2 * sad + angry) / 3:.2f}" in text


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
    assert "4-6      ood_article" in listed and "sft (3), ppo (2)" in listed
    assert screen(capsys, files=files, prompt="5").startswith(f"prompt 5: {ROWS[1]['id']} (ood_article)")
    text = screen(capsys, files=files, prompt=ROWS[1]["id"])
    assert "(test)" in text and "(ood_article)" in text
    for wrong in "7", "nobody":
        with pytest.raises(UserError, match=f"--prompt {wrong}: .* 1 to 6"):
            show.main(show.Config(files=files, prompt=wrong))


def test_columns_are_told_apart_by_temperature_and_seed():
    prompt, = show.collect({("sft", t, 0, "test"): [ROWS[0] | {"outputs": ["a"], "finished": [True],
                                                               "split": "test"}] for t in (.7, 1.)})
    assert list(prompt.columns) == ["policy sft, temperature 0.7, seed 0, split test",
                                    "policy sft, temperature 1.0, seed 0, split test"]


def test_published_outputs_meet_at_equal_prompts(tmp_path, capsys):
    for name, texts in (("gpt4", ["yes", "no"]), ("claude", ["maybe", "never"])):
        (tmp_path / f"{name}.json").write_text(json.dumps([
            {"instruction": question, "output": text, "generator": name}
            for question, text in zip(("Really?", "Sure?"), texts)]))
    files = [str(tmp_path / "gpt4.json"), str(tmp_path / "claude.json")]
    text = screen(capsys, files=files, prompt="2")
    assert "Sure?" in text and re.search(r"never +no", text)


def test_texts_cannot_steer_the_terminal(tmp_path, capsys):
    files = [write(tmp_path / "a.jsonl", "evil\x1b", [EVIL, ""])]
    text = screen(capsys, files=files, prompt="1") + screen(capsys, files=files)
    assert "\x1b" not in text and "<script>" in text and "(nothing)" in text


# ----------------------------------------------------------------------------------------------------- a page

def test_page_escapes_every_text(tmp_path):
    rows = [{"id": "<i>", "prompt": PROMPT, "reference": EVIL}]
    paths = [write(tmp_path / "a.jsonl", "<b>evil", [EVIL], rows, split="<u>"),
             write(tmp_path / "b.jsonl", "ppo", [EVIL], [{"id": "b", "prompt": EVIL, "reference": ""}], task=None)]
    show.main(show.Config(files=paths, html=str(tmp_path / "page.html")))
    text = (tmp_path / "page.html").read_text()
    for tag in ("<script", "<b>evil", "<i>", "<u>"):
        assert tag not in text
    assert text.count("&lt;script&gt;") == 4 and text.count("<section>") == 2


def test_facts_are_marked_by_what_the_post_says():
    prompt = show.Prompt(1, {"prompt": PROMPT}, synthetic, None, {})
    marked = show.mark_facts("my sis sold my guitar . i feel angry . my boss wallet .", prompt)
    assert re.findall(r'<mark class="(\w+)">(\w+)</mark>', marked) == [
        ("right", "sis"), ("distractor", "sold"), ("right", "guitar"), ("invented", "angry")]
    # the last clause is not of the grammar: its words state nothing
    assert marked.endswith("my boss wallet .")
    assert show.mark_facts(PROMPT, prompt, response=False).count('class="right"') == 8


def test_page_of_another_task_has_no_marks(tmp_path):
    rows = [{"id": 1, "prompt": "why ?", "reference": ""}]
    path = write(tmp_path / "a.jsonl", "ppo", [" my sister"], rows, task="tldr")
    show.main(show.Config(files=[path], prompt="1", html=str(tmp_path / "page.html")))
    assert "<mark" not in (tmp_path / "page.html").read_text()


# ----------------------------------------------------------------------------------------------------- curves

def test_committed_runs_are_a_healthy_and_a_sick_one():
    healthy, sick = (read_jsonl(curves.RUNS / f"ppo_{name}.jsonl", {"step": int, "kl": float})
                     for name in ("healthy", "sick"))
    for rows in (healthy, sick):
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        assert set(curves.PANELS) <= set(rows[0])
    assert healthy[-1]["kl"] < 10 < 30 < sick[-1]["kl"]
    # over-optimised: more reward than the healthy run has, and less gold reward than the SFT policy
    assert sick[-1]["reward"] > healthy[-1]["reward"]
    assert sick[-1]["gold_reward"] < sick[0]["gold_reward"] < healthy[-1]["gold_reward"]


def test_a_ppo_log_is_drawn_over_them_and_another_one_alone(tmp_path, capsys, monkeypatch):
    legends = []
    monkeypatch.setattr("matplotlib.figure.Figure.legend", lambda self, lines, labels, **_: legends.append(labels))
    log, png = tmp_path / "metrics_ppo.jsonl", tmp_path / "metrics_ppo.png"
    log.write_text('{"step": 1, "kl": 0.5, "reward": NaN}\n{"step": 2, "kl": 0.75, "reward": 2}\n')
    assert screen(capsys, files=[str(log)]) == f"wrote {png}\n"
    assert png.read_bytes().startswith(b"\x89PNG")
    log = tmp_path / "metrics_sft.jsonl"
    log.write_text('{"step": 200, "loss": 1.5}\n{"step": 400, "loss": 1.25, "flag": true}\n')
    screen(capsys, files=[str(log)])
    assert log.with_suffix(".png").is_file()
    assert [[label.split(":")[0] for label in labels] for labels in legends] == [
        ["healthy", "sick", "metrics_ppo.jsonl"], ["metrics_sft.jsonl"]]


def test_files_that_cannot_be_shown_are_refused(files, tmp_path):
    log = tmp_path / "metrics_ppo.jsonl"
    log.write_text('{"step": 1, "kl": 0.5}\n')
    foreign = write(tmp_path / "foreign.jsonl", "ppo", ["yes"], [{"id": 1, "prompt": "why ?", "reference": ""}])
    for names, says in (([files[0], log], "metrics_ppo.jsonl, line 1"), (["nothing.jsonl"], "no such file"),
                        ([], "bon.py"), ([foreign], "not a prompt of the synthetic task: 'why .', though")):
        with pytest.raises(UserError, match=says):
            show.main(show.Config(files=[str(name) for name in names]))
