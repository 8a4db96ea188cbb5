"""Outputs side by side, on the screen and as a page, and the curves of logs."""
import json
import re

import pytest

from common.errors import UserError
from common.files import read_jsonl
from conftest import refused
from tasks import synthetic
from tools import curves, page, show

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


def screen(capsys, width=110, **flags):
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
    monkeypatch.setenv("COLUMNS", "60")         # five columns do not fit: below each other
    text = screen(capsys, files=files, prompt=ROWS[1]["id"])
    assert [line for line in text.splitlines() if line in ("base", "sft", "bon", "ppo", "zebra")] \
        == ["base", "sft", "bon", "ppo", "zebra"]
    assert max(map(len, text.splitlines())) <= 60


def test_equal_outputs_are_merged_and_carry_their_gold_reward(files, capsys):
    text = screen(capsys, files=files[:1], prompt="1")
    sad = synthetic.gold_reward(ROWS[0]["prompt"], " i feel sad .")
    angry = synthetic.gold_reward(ROWS[0]["prompt"], " now angry .")
    assert f" 2 x  i feel sad . [{sad:.2f}]" in text and f"      now angry . [{angry:.2f}]" in text
    assert f"3 outputs, 2 different, mean gold reward {(2 * sad + angry) / 3:.2f}" in text


def test_rewards_of_the_file_and_unfinished_outputs(tmp_path, capsys):
    rows = [{"id": "a", "prompt": "why ?", "reference": ""}]
    path = write(tmp_path / "a.jsonl", "ppo", [" because", " so"], rows, task="tldr", rewards=[0.5, -1.25],
                 finished=[True, False])
    text = screen(capsys, files=[path], prompt="a")
    assert "because [0.50]" in text and "so [-1.25] [unfinished]" in text and "mean reward -0.38" in text
    assert "reference" not in text


def test_an_unfinished_output_is_not_merged_with_a_finished_one():
    outputs = show.merge(["a", "a", "b", "a"], [True, False, True, True], [1., 0., 2., 1.])
    assert [(o.text, o.finished, o.score, o.count) for o in outputs] \
        == [("a", True, 1., 2), ("a", False, 0., 1), ("b", True, 2., 1)]


def test_numbers_and_ids_choose_prompts(tmp_path, capsys):
    other = [{**row, "prompt": row["prompt"].replace("TITLE", "ARTICLE")} for row in ROWS]
    files = [write(tmp_path / "a.jsonl", "sft", [" i feel sad ."]),
             write(tmp_path / "b.jsonl", "sft", [" i feel sad ."], other, split="ood_article")]
    assert "4-6      ood_article" in screen(capsys, files=files)
    assert screen(capsys, files=files, prompt="5").startswith(f"prompt 5: {ROWS[1]['id']} (ood_article)")
    text = screen(capsys, files=files, prompt="1", split="ood_article")
    assert text.startswith(f"prompt 1: {ROWS[0]['id']} (ood_article)")
    both = screen(capsys, files=files, prompt="1, 3")
    assert "prompt 1:" in both and "prompt 3:" in both and "prompt 2:" not in both
    for wrong, says in (("7", "1 to 6"), ("nobody", "no such prompt"),
                        (ROWS[1]["id"], "2 .test., 5 .ood_article.")):
        with pytest.raises(UserError, match=says):
            show.main(show.Config(files=files, prompt=wrong))
    with pytest.raises(UserError, match="test, ood_article"):
        show.main(show.Config(files=files, split="train"))


def test_one_id_for_two_prompts_of_a_split_is_found_by_number(tmp_path):
    other = [{**ROWS[1], "id": ROWS[0]["id"]}]
    files = [write(tmp_path / "a.jsonl", "sft", [" i feel sad ."], ROWS[:1]),
             write(tmp_path / "b.jsonl", "ppo", [" i feel sad ."], other)]
    with pytest.raises(UserError, match="2 prompts have this id; give a number: 1 .test., 2 .test.$"):
        show.main(show.Config(files=files, prompt=ROWS[0]["id"]))


def test_the_list_says_which_policies_lack_prompts(tmp_path, capsys):
    files = [write(tmp_path / "a.jsonl", "sft", [" i feel sad ."], ROWS[::2]),
             write(tmp_path / "b.jsonl", "ppo", [" i feel sad ."], ROWS[::-1])]
    assert "sft (2 of 3 prompts), ppo  " in screen(capsys, files=files)


def test_columns_are_told_apart_by_temperature_and_seed():
    names = show.column_names([("sft", .7, 0, "test"), ("sft", 1., 0, "test"), ("ppo", 1., 0, "test")])
    assert names == ["sft, temperature 0.7", "sft, temperature 1.0", "ppo, temperature 1.0"]
    names = show.column_names([("sft", 1., 0, "test"), ("sft", 1., 1, "test")])
    assert names == ["sft, seed 0", "sft, seed 1"]
    names = show.column_names([("a", None, None, "file1"), ("b", None, None, "file2")])
    assert names == ["a", "b"]


def test_published_outputs_meet_at_equal_prompts(tmp_path, capsys):
    for name, texts in (("gpt4", ["yes", "no"]), ("claude", ["maybe", "never"])):
        (tmp_path / f"{name}.json").write_text(json.dumps([
            {"instruction": question, "output": text, "generator": name}
            for question, text in zip(("Really?", "Sure?"), texts)]))
    files = [str(tmp_path / "gpt4.json"), str(tmp_path / "claude.json")]
    text = screen(capsys, files=files, prompt="2")
    assert "Sure?" in text and re.search(r"never +no", text)


def test_texts_cannot_steer_the_terminal(tmp_path, capsys):
    text = screen(capsys, files=[write(tmp_path / "a.jsonl", "evil\x1b", [EVIL, ""])], prompt="1")
    assert "\x1b" not in text and "<script>" in text and "(nothing)" in text


# ----------------------------------------------------------------------------------------------------- a page

def test_page_escapes_every_text(tmp_path):
    rows = [{"id": "<i>", "prompt": PROMPT, "reference": EVIL}, {"id": "b", "prompt": EVIL, "reference": ""}]
    path = write(tmp_path / "a.jsonl", "<b>evil", [EVIL], rows, split="<u>")
    show.main(show.Config(files=[path], html=str(tmp_path / "page.html")))
    text = (tmp_path / "page.html").read_text()
    for tag in ("<script", "<b>", "<i>", "<u>"):
        assert tag not in text
    assert text.count("&lt;script&gt;") == 4 and "http:" not in text and "https:" not in text
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text


def test_facts_are_marked_by_what_the_post_says():
    marked = page.mark_output(PROMPT, "my sis sold my guitar . i feel angry . my boss wallet .")
    assert re.findall(r'<mark class="(\w+)">(\w+)</mark>', marked) == [
        ("right", "sis"), ("distractor", "sold"), ("right", "guitar"), ("invented", "angry")]
    # the last clause is not of the grammar: its words state nothing
    assert marked.endswith("my boss wallet .")
    assert page.mark_prompt(PROMPT).count('class="right"') == 8
    # without colour: underlined, struck through, struck through twice
    for name, decoration in (("right", "underline"), ("distractor", "line-through"),
                             ("invented", "line-through double")):
        assert re.search(rf"\.{name} {{[^}}]*text-decoration: {decoration};", page.STYLE)


def test_page_of_another_task_has_no_marks(tmp_path):
    rows = [{"id": "a", "prompt": "why ?", "reference": "because"}]
    path = write(tmp_path / "a.jsonl", "ppo", [" my sister"], rows, task="tldr")
    show.main(show.Config(files=[path], prompt="all", html=str(tmp_path / "page.html")))
    assert "<mark" not in (tmp_path / "page.html").read_text()


def test_all_is_limited(tmp_path, capsys):
    rows = [{"id": str(i), "prompt": f"why {i} ?", "reference": ""} for i in range(60)]
    path = write(tmp_path / "a.jsonl", "ppo", [" so"], rows, task="tldr")
    show.main(show.Config(files=[path], prompt="all", html=str(tmp_path / "page.html")))
    assert "the first 50 of 60 prompts" in capsys.readouterr().out
    assert (tmp_path / "page.html").read_text().count("<section>") == 50


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


def test_a_ppo_log_is_drawn_over_them(tmp_path, capsys):
    log = tmp_path / "metrics_ppo.jsonl"
    log.write_text('{"step": 1, "kl": 0.5, "reward": NaN, "beta": 0.1}\n'
                   '{"step": 2, "kl": 0.75, "reward": 2}\n')
    text = screen(capsys, files=[str(log)])
    png = tmp_path / "metrics_ppo.png"
    assert png.read_bytes().startswith(b"\x89PNG") and str(png) in text
    assert re.search(r"KL from the SFT policy +0\.75 ", text) and "healthy" in text and "sick" in text


def test_other_logs_are_drawn_alone(tmp_path, capsys):
    log = tmp_path / "metrics_sft.jsonl"
    log.write_text('{"step": 200, "loss": 1.5}\n{"step": 400, "loss": 1.25}\n')
    text = screen(capsys, files=[str(log)], png=str(tmp_path / "a.png"))
    assert (tmp_path / "a.png").is_file() and "1.25" in text and "sick" not in text


def test_odd_logs_are_drawn_or_refused_in_one_line(tmp_path, capsys):
    log = tmp_path / "metrics_$a$.jsonl"
    odd = {"step": 2, "a_$b": 1, "big": 10 ** 400, "flag": True, "text": "x"}
    log.write_text(f'{{"step": 1}}\n{json.dumps(odd)}\n{{"step": {10 ** 400}, "a_$b": 2}}\n')
    text = screen(capsys, files=[str(log)])
    assert (tmp_path / "metrics_$a$.png").is_file() and "big" not in text and "flag" not in text
    (tmp_path / "empty.jsonl").write_text('{"step": 1, "text": "x"}\n')
    refused(tmp_path, "tools.show", "empty.jsonl", says="empty.jsonl: none of its lines holds a number")


def test_files_of_two_kinds_are_refused(files, tmp_path):
    log = tmp_path / "metrics_ppo.jsonl"
    log.write_text('{"step": 1, "kl": 0.5}\n')
    with pytest.raises(UserError, match="is a log"):
        show.main(show.Config(files=[files[0], str(log)], prompt="1"))
    with pytest.raises(UserError, match="no such file"):
        show.main(show.Config(files=["nothing.jsonl"]))
    with pytest.raises(UserError, match="bon.py"):
        show.main(show.Config())
