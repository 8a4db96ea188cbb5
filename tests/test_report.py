"""The tables, the pictures and the study of a published model, from numbers that are made up or committed."""
import json
from pathlib import Path

import numpy as np
import pytest

import reproduce
from common.errors import UserError
from common.stats import mean_interval, over_seeds
from study import figures, published, report
from test_pretrained import REFS
from test_pretrained import write as write_published

ROOT = Path(__file__).resolve().parent.parent
FEW, MANY = over_seeds(np.array([[.2, .4], [.4, .6]])), over_seeds(np.array([[.2, .4], [.4, .6]] * 2))


def committed():
    """The committed numbers, or a skip while they are of another schema."""
    path = ROOT / "results" / "results.json"
    if not path.is_file() or '"split": "ood"' not in path.read_text():
        pytest.skip("results/results.json is of an older schema")
    return path.read_bytes()


def test_a_table_is_markdown():
    assert report.table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_an_entry_has_an_interval_only_where_seeds_are_enough():
    """With two seeds the range, with one nothing."""
    assert report.interval(FEW) == "0.40 [0.30, 0.50]" and "range" in report.how_to_read(2)
    assert report.ends(MANY) == (MANY["low"], MANY["high"])
    assert report.interval(over_seeds(np.array([[.2, .4]]))) == "0.30" and report.interval(None) == "-"
    assert report.signed(FEW) == "+0.40 [+0.30, +0.50]"
    assert report.versus(FEW | {"inside": False}).endswith("\\*") and report.versus(None) == ""


def test_only_what_stands_between_the_markers_is_replaced():
    text = "one\n<!-- results -->\nold\n<!-- /results -->\ntwo\n"
    new = report.between_markers(text, "| new |")
    assert new == "one\n<!-- results -->\n| new |\n<!-- /results -->\ntwo\n"
    assert report.between_markers(new, "| new |") == new


def test_a_folder_without_numbers_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no results.json"):
        report.write(tmp_path)


@pytest.mark.slow
def test_tables_and_pictures_come_from_the_numbers_alone(tmp_path):
    """README is left alone when another folder is written, and the default study has one picture."""
    (tmp_path / "results.json").write_bytes(committed())
    before = (ROOT / "README.md").read_bytes()
    assert [p.name for p in report.write(tmp_path)] == ["results.md"]
    assert (ROOT / "README.md").read_bytes() == before
    results = json.loads((tmp_path / "results.json").read_text())
    for key in ("frontier", "shift", "proxies", "beta", "sets", "pass_at_k"):
        results.pop(key, None)
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert "## The frontier" not in report.results_md(results)
    drawn = figures.draw_all(tmp_path)
    assert [p.name for p in drawn] == ["figure.png"] and drawn[0].stat().st_size > 10_000


def test_the_committed_tables_are_those_of_the_committed_numbers():
    results = json.loads(committed())
    assert (ROOT / "results" / "results.md").read_text() == report.results_md(results)
    assert report.answer(results) in (ROOT / "README.md").read_text()


def test_error_bars_have_no_length_without_ends():
    one_seed = over_seeds(np.array([[.2, .4]]))
    assert figures.arms([FEW, one_seed]) == pytest.approx(np.array([[.1, 0], [.1, 0]]))


# ----------------------------------------------------------------------------- the study of a published model

def study(out, seeds=2, **more):
    return reproduce.Config(**dict(out=str(out), seed=0, seeds=seeds, model="m", data="d", size="cpu",
                                   ppo="--steps 9") | more)


def test_the_plan_of_a_published_model(tmp_path):
    plan = {s.name: s for s in published.plan(study(tmp_path))}
    assert list(plan) == [f"seed-{s}/{stage}" for s in (0, 1)
                          for stage in ("sft", "reward", "ppo", "sampled_ppo", "sampled_sft", "dpo",
                                        "sampled_dpo", "ppo-b0.2", "sampled_ppo-b0.2")]
    assert plan["seed-1/ppo"].needs == ("seed-1/reward",)
    command = plan["seed-1/ppo"].work
    assert command[command.index("--reward") + 1] == str(tmp_path / "seed-1/ckpt_reward.pt")
    assert command[command.index("--model") - 2:command.index("--model")] == ["--steps", "9"]
    labelled = {s.name: s for s in published.plan(study(tmp_path, task="tldr-short", judge="sbert:x"))}
    for learner in ("reward", "dpo"):       # what the judge labelled
        command = labelled[f"seed-1/{learner}"].work
        assert command[command.index("--data") + 1] == str(tmp_path / "seed-1")
        assert labelled[f"seed-1/{learner}"].needs == ("seed-1/label",)
    with pytest.raises(UserError, match="2 are needed"):
        published.run_study(study(tmp_path, seeds=1))
    with pytest.raises(UserError, match="--judge sbert:NAME does"):
        published.run_study(study(tmp_path, task="tldr-short"))


def test_a_study_says_what_it_would_do(tmp_path, capsys):
    write_published(tmp_path / "model", "", json.loads(REFS.read_text())["models"]["gpt2"])
    published.run_study(study(tmp_path / "out", model=str(tmp_path / "model"), plan=True))
    said = capsys.readouterr().out
    assert "seed-0/ppo, about 90 minutes: python -m ppo --preset small-llama" in said and "--steps 9" in said
    assert "and so for 2 seeds" in said and " parameters.  PPO with" in said and "too few" not in said
    assert not (tmp_path / "out").exists()


def test_the_table_of_a_published_model():
    accuracy = dict(accuracy=.6, accuracy_low=.5, accuracy_high=.7, longer_wins=.5, pairs=9)
    e = [.5, .4, .6]
    row = {"measure": "ROUGE-L", "split": "test", "sft": e, "ppo": e, "minus_sft": {"ppo": e}}
    text = published.markdown({"model": "gpt2", "seeds": 2, "models": {"seed-0/ckpt_reward.pt": accuracy},
                               "rows": [row], "gaps": [{"split": "ood_x", "dpo": [.1, None, None]}],
                               "training": [{"ppo": {"kl, last": 3.}}]})
    assert "| ROUGE-L | test | 0.500 [0.400, 0.600] | - | - | 0.500 [0.400, 0.600] | - | - |" in text
    assert "| ROUGE-L | test | - | - | +0.500 [+0.400, +0.600] | - | - |" in text
    assert "| ood_x | - | - | - | - | - | +0.100 |" in text and "| 0 | PPO | 3.00 |" in text
    assert "| seed-0/ckpt_reward.pt | 0.600 [0.500, 0.700] | 0.500 | 9 |" in text


def test_what_is_measured_of_a_published_model():
    two = np.array([[.1, .3], [.5, .7]])
    assert published.summary(two, "words") == mean_interval([.3, .5])   # over prompts
    assert published.summary(two, "across ead") == mean_interval([.4])
    three = published.summary(np.array([[.1, .3], [.5, .7], [.3, .2]]), "words")
    assert three.mean == pytest.approx(.35) and three.high - three.mean > 4 * np.std([.2, .6, .25]) / 3 ** .5
    # orders: of three outputs one pair is turned round; a tie; nothing to order
    scores = [[1, 2, 3], [1, 1, 3], [1, 2, 3]]
    found = published.agreement(scores, [[2, 1, 3], [1, 2, 3], [5, 5, 5]])
    assert found[:2] == pytest.approx([2 / 3, 2.5 / 3]) and np.isnan(found[2])


def test_the_table_of_speed():
    rows = [{"work": "w", "size": "1M", "median_s": .5, "rate": 2e3, "unit": "x/s"}]
    text = report.speed_md({"machine": "m", "torch": "2", "date": "today", "rows": rows})
    assert "| w | 1M | 0.5 | 2,000 x/s |" in text
