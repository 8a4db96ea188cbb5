"""Win rates, gaps and ROUGE: equal to rouge-score, and to examples worked by hand."""
import json
import os
from itertools import combinations

import numpy as np
import pytest

import diversity
import generalisation as G
from common.errors import UserError
from common.files import write_jsonl
from common.samples import by_prompt
from conftest import call, json_lines, well_told
from tasks import synthetic


def test_rouge_equals_rouge_score(refs):
    for (target, prediction), expected in zip(refs["rouge"]["pairs_target_prediction"],
                                              refs["rouge"]["no_stemmer"]):
        got = G.rouge(prediction, target)
        for name in ("rouge1", "rouge2", "rougeL"):
            assert got[name] == pytest.approx(expected[name]["fmeasure"], abs=1e-9)
    assert G.rouge("", "a b") == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


def test_win_rate_halves_ties():
    """Prompt 1: 2 beats 1, 1 ties: .75.  Prompt 2: loses both: 0."""
    assert G.wins([[2, 1], [0, 0]], [[1], [5]]).tolist() == [.75, 0.]


def test_similarity_to_the_references_as_judge(tmp_path, monkeypatch, capsys):
    """Cosines 1 and .6 of unit vectors, and .25 less without an end.  No rate: nothing is nearer to the
    reference than itself."""
    def encode(texts):
        return np.array([[2., 0.] if text == "same" else [.6, .8] for text in texts])
    rows = [{"id": i, "prompt": f"p{i}", "reference": "same", "outputs": ["same", "other"],
             "finished": [True, bool(i % 2)]} for i in range(4)]
    scores, references = G.similarity_scores(rows, encode)
    assert references is None and np.allclose(scores, [[1, .35], [1, .6]] * 2)
    monkeypatch.setattr(G, "load_encoder", lambda *_, **more: encode)
    for split, some in (("test", rows), ("ood_x", rows[::2])):
        write_jsonl(tmp_path / f"samples_a_{split}.jsonl", [row | {"policy": "a", "split": split} for row in some])
    files = [str(path) for path in tmp_path.glob("*.jsonl")]
    G.main(G.Config(files=files, judge="sbert:x", out=str(tmp_path)))
    of = {x["split"]: x for x in json.loads((tmp_path / "generalisation.json").read_text())["win_rate"]}
    assert of["test"]["rate"] is None and of["test"]["score"][0] == pytest.approx((.675 + .8) / 2)
    assert of["ood_x"]["gap"][0] == pytest.approx((.8 - .675) / 2) and of["test"]["gap"] is None


def test_pass_at_k_is_the_mean_over_all_choices_of_k():
    good = np.array([[1, 0, 0, 1, 0, 0], [0] * 6, [1] * 6], dtype=bool)
    for k in range(1, 7):
        naive = [np.mean([row[list(pick)].any() for pick in combinations(range(6), k)]) for row in good]
        assert G.pass_at_k(good, k) == pytest.approx(naive)
    # 2 of 6 good: 1 - (4 * 3) / (6 * 5)
    assert G.pass_at_k(good, 2).tolist() == pytest.approx([.6, 0, 1])


def samples(path, policy, split, outputs, **more):
    """Lines of 6 prompts.  outputs: function of a row giving texts."""
    write_jsonl(path, [{"id": r["id"], "prompt": r["prompt"], "reference": r["reference"], "policy": policy,
                        "split": split, "temperature": 1.0, "seed": 0, "rewards": None, "task": "synthetic",
                        "outputs": outputs(r)} | more for r in well_told(split, 6)])
    return path


def good(row):
    return [row["reference"]] * 2


def bad(row):
    return [" my cat my cat my cat .", ""]


def test_the_gold_reward_judges_rows_of_synthetic_tasks_only():
    row, = synthetic.rows("test", 1)
    row |= {"outputs": good(row), "finished": [True, False], "task": "synthetic-independent"}
    outputs, references = G.gold_scores([row])
    expected = synthetic.gold_reward(row["prompt"], row["reference"])
    assert references == [[expected]] and outputs[0][0] == expected
    assert outputs[0][1] == synthetic.gold_reward(row["prompt"], row["reference"], False) < expected
    for task in ("tldr", None):
        with pytest.raises(UserError, match="names no synthetic task"):
            G.gold_scores([row | {"task": task}])


def test_tables_fit_and_stand_in_the_order_of_the_study(tmp_path):
    files = [samples(tmp_path / f"{p}_{s}", p, s, good if p == "ppo" else bad)
             for p in ("ppo", "sft", "bon") for s in ("ood_article", "test")]
    got = call("generalisation", *files, cwd=tmp_path)
    assert got.returncode == 0 and max(map(len, got.stdout.splitlines())) <= 110, got.stderr
    first, second = got.stdout.split("head to head")
    assert "judge: gold" in first
    assert [row.split()[:2] for row in first.splitlines()[4:10]] == [
        [s, p] for s in ("test", "ood_article") for p in ("sft", "bon", "ppo")]
    pairs = [("test", "bon", "sft"), ("test", "ppo", "sft"), ("test", "ppo", "bon")]
    rows = [row.split() for row in second.splitlines() if row.startswith("test")]
    assert [(row[0], row[1], row[3]) for row in rows] == pairs
    found = json.loads((tmp_path / "generalisation.json").read_text())
    assert found["judge"] == "gold"
    assert [x["rate"][0] for x in found["win_rate"] if x["split"] == "test"] == [0, 0, .5]
    assert [x["rate"][0] for x in found["head_to_head"] if x["split"] == "test"] == [.5, 1, 1]
    assert found["win_rate"][0]["gap"] is None and found["win_rate"][-1]["gap"][0] == 0
    assert "a run has fewer than 10 prompts" in got.stdout
    of_test = [x for x in found["win_rate"] if x["split"] == "test"]
    assert [[x[f"pass_at_{k}"][0] for k in (1, 2)] for x in of_test] == [[0, 0], [0, 0], [1, 1]]


def test_a_reference_that_rouge_cannot_read_gives_no_number(tmp_path):
    path = samples(tmp_path / "a", "sft", "test", good, reference="一只猫坐在垫子上", task="tldr")
    got = call("generalisation", path, cwd=tmp_path)
    line, = json.loads((tmp_path / "generalisation.json").read_text())["rouge"]
    assert got.returncode == 0 and line["rouge1"] is line["rougeL"] is None


def test_other_tasks_are_judged_by_rouge(tmp_path):
    path = samples(tmp_path / "a", "sft", "test", good, task="tldr")
    got = call("generalisation", path, cwd=tmp_path)
    assert got.returncode == 0 and "ROUGE-L" in got.stdout
    line, = json.loads((tmp_path / "generalisation.json").read_text())["rouge"]
    assert line["rouge1"] == line["rougeL"] == [1, 1, 1]        # copies of the reference
    other = samples(tmp_path / "b", "ppo", "test", lambda row: [row["reference"] + " and more"] * 2, task="tldr")
    assert "head to head: by ROUGE-L, win rate" in call("generalisation", path, other, cwd=tmp_path).stdout
    met, = json.loads((tmp_path / "generalisation.json").read_text())["head_to_head"]
    assert met["against"] == "sft" and met["rate"][0] == 0
    wrong = call("generalisation", path, "--judge", "gold", cwd=tmp_path)
    assert wrong.returncode == 2 and "names no synthetic task" in wrong.stderr


def test_without_references_there_is_no_rate_but_policies_meet(tmp_path):
    files = [samples(tmp_path / p, p, "test", text, reference="")
             for p, text in (("ppo", good), ("sft", bad))]
    got = call("generalisation", *files, cwd=tmp_path)
    assert got.returncode == 0 and "(-: no references)" in got.stdout
    found = json.loads((tmp_path / "generalisation.json").read_text())
    assert [x["rate"] for x in found["win_rate"]] == [None, None]
    assert found["head_to_head"][0]["rate"][0] == 1
    assert call("generalisation", *files, "--judge", "rouge", cwd=tmp_path).returncode == 0
    found = json.loads((tmp_path / "generalisation.json").read_text())
    assert [x["rouge1"] for x in found["rouge"]] == [None, None]


def test_policies_meet_on_equal_prompts_only(tmp_path):
    """Another order changes nothing, prompts that one lacks are counted, one id for two prompts is refused.
    """
    path = samples(tmp_path / "sft", "sft", "test", bad)
    other = samples(tmp_path / "ppo", "ppo", "test", good)
    lines = other.read_text().splitlines()
    other.write_text("\n".join(lines[:0:-1]) + "\n")         # turned round, without the first
    got = call("generalisation", path, other, cwd=tmp_path)
    line, = json.loads((tmp_path / "generalisation.json").read_text())["head_to_head"]
    assert (line["rate"][0], line["prompts"], line["missing"]) == (1, 5, 1)
    path.write_text(path.read_text().splitlines()[0] + "\n")        # the very one that the other lacks
    call("generalisation", path, other, cwd=tmp_path)
    line, = json.loads((tmp_path / "generalisation.json").read_text())["head_to_head"]
    assert (line["rate"], line["prompts"], line["missing"]) == (None, 0, 6)
    samples(tmp_path / "sft", "sft", "test", bad)
    first, second = (json.loads(line)["id"] for line in lines[:2])
    other.write_text(lines[0].replace(f'"{first}"', f'"{second}"') + "\n")
    wrong = call("generalisation", path, other, cwd=tmp_path)
    assert wrong.returncode == 2 and f"the id '{second}' names one prompt in" in wrong.stderr


def test_one_prompt_has_no_interval_and_no_file_is_no_judge(tmp_path):
    path = samples(tmp_path / "sft", "sft", "test", good)
    path.write_text(path.read_text().splitlines()[0] + "\n")
    got = call("generalisation", path, cwd=tmp_path)
    assert "0.500   " in got.stdout and "0.500 [" not in got.stdout and "fewer than 10 prompts:" in got.stdout
    line, = json.loads((tmp_path / "generalisation.json").read_text())["win_rate"]
    assert line["rate"] == [.5, None, None]
    wrong = call("generalisation", path, "--judge", "gpt4", cwd=tmp_path)
    assert wrong.returncode == 2 and "--judge gpt4: no such file or directory, and the hub" in wrong.stderr


def test_a_policy_is_marked_where_it_was_trained_against_its_judge():
    row = {"prompt": "p", "reference": "r", "outputs": ["o"]}
    runs = {("ppo", 1.0, 0, "test"): [row | {"trained_against": "abc", "finished": [True]}],
            ("sft", 1.0, 0, "test"): [row | {"trained_against": None, "finished": [False]}]}
    scores = dict.fromkeys(runs, ([[1.]], [[0.]]))
    both = {key: [row | {"trained_against": row["trained_against"] and ["abc", "xyz"]} for row in rows]
            for key, rows in runs.items()}      # trained against the one, chosen by the other
    for judge in ("abc", "xyz"):
        assert [x["judge_is_trained_against"] for x in G.win_rates(both, scores, judge)] == [True, False]
    lines = G.win_rates(runs, scores, "abc")
    assert [(x["judge_is_trained_against"], x["unfinished"]) for x in lines] == [(True, 0), (False, 1)]
    assert not any(x["judge_is_trained_against"] for x in G.win_rates(runs, scores, None))


# ------------------------------------------------------------------------------------------- at equal length

def judged(theta, phi, longer, rng):
    """(n, K) wins with a probability of the model's form."""
    return rng.random(longer.shape) < 1 / (1 + np.exp(-theta - phi * np.tanh(longer / longer.std())))


def test_length_control_is_a_maximum_of_the_likelihood():
    """Against a grid over both weights, with the prior."""
    rng = np.random.default_rng(0)
    longer = rng.normal(30, 40, (60, 4))
    won = judged(-.5, 1.5, longer, rng)
    found = G.length_controlled(won, longer)
    theta, phi = np.meshgrid(np.linspace(-1.2, .3, 301), np.linspace(.5, 2.5, 101), indexing="ij")
    f = np.tanh(longer / longer.std()).ravel()[:, None, None]
    z = theta[None] + phi[None] * f
    height = (won.ravel()[:, None, None] * z - np.logaddexp(0, z)).sum(0) - (theta ** 2 + phi ** 2) / 18
    best = theta.ravel()[height.argmax()]
    assert found.mean == pytest.approx(1 / (1 + np.exp(-best)), abs=.002)


def test_length_control_takes_away_what_length_gives():
    rng = np.random.default_rng(1)
    longer = rng.normal(60, 60, (400, 2))
    fond = judged(0., 3., longer, rng)              # a judge who sees length and nothing else
    assert fond.mean() > .7 and G.length_controlled(fond, longer).mean == pytest.approx(.5, abs=.06)
    blind = judged(.8, 0., longer, rng)             # one who does not see it
    assert G.length_controlled(blind, longer).mean == pytest.approx(blind.mean(), abs=.03)
    # outputs of equal length: a plain rate, up to the prior
    assert G.length_controlled(blind, 0 * longer).mean == pytest.approx(blind.mean(), abs=.005)
    # judges who follow length every time, and one who prefers every output, give numbers
    always = G.length_controlled(longer > 0, longer)
    assert .3 < always.mean < .7 and G.length_controlled(longer > -1e9, longer).low > .9
    assert G.length_controlled([[1.], ], [[0.]]).low is None
    # all longer than what they meet, by 30 words or by 30 and 31: nothing shows what equal length would bring
    for some in (0 * longer + 30, 30 + (longer > 60), -30 - (longer > 60)):
        assert G.length_controlled(blind, some) is None


def test_interval_at_equal_length_holds_the_truth():
    """19 times in 20, also where the outputs of a prompt have much in common."""
    rng, held, truth = np.random.default_rng(2), 0, 1 / (1 + np.exp(.4))
    for _ in range(200):
        longer = np.repeat(rng.normal(20, 50, (80, 1)), 4, axis=1)
        once = judged(-.4, 1., longer[:, :1], rng)
        _, low, high = G.length_controlled(np.repeat(once, 4, axis=1), longer)
        held += low < truth < high
    assert 180 <= held <= 199


@pytest.mark.parametrize("p", [.9, .97, .99])
def test_interval_at_equal_length_holds_the_truth_near_1(p):
    """Where hardly a prompt is lost the prompts' spread says nothing; 30 of 30 won is not certainty."""
    rng, held = np.random.default_rng(3), 0
    for _ in range(200):
        longer = rng.normal(0, 50, (30, 1))
        _, low, high = G.length_controlled(rng.random((30, 1)) < p, longer)
        held += low < p < high
    assert held >= 180
    assert G.length_controlled(np.ones((30, 1)), rng.normal(0, 50, (30, 1))).low < .95


def test_repeated_prompts_count_once(tmp_path, capfd):
    """The same prompts four times over are no evidence: every interval is that of the prompts once."""
    def mixed(row):
        return [row["reference"], row["reference"] if len(row["prompt"]) % 2 else " my cat .", " my cat ."]
    once = json_lines(samples(tmp_path / "sft", "sft", "test", mixed))
    found = {}
    for times in (1, 4):
        folder = tmp_path / str(times)
        folder.mkdir()
        rows = [row | {"id": f"{copy}-{row['id']}"} for copy in range(times) for row in once]
        write_jsonl(folder / "samples.jsonl", rows)
        G.main(G.Config(files=[str(folder / "samples.jsonl")], out=str(folder)))
        diversity.main(diversity.Config(files=[str(folder / "samples.jsonl")], encoder="", out=str(folder)))
        win, = json.loads((folder / "generalisation.json").read_text())["win_rate"]
        varied, = json.loads((folder / "diversity.json").read_text())["results"]
        found[times] = [*win["rate"], *win["length_controlled"], *win["pass_at_2"], win["prompts"],
                        *varied["per_input_ead"], *varied["per_input_gold_diversity"], *varied["utility"]]
    assert found[4] == pytest.approx(found[1])
    assert f"{4 * len(once)} rows, {len(once)} different prompts" in capfd.readouterr().out


def test_by_prompt_by_hand():
    assert by_prompt(["a", "b", "a", "c"], [1., 2., 3., np.nan]).tolist() == pytest.approx([2., 2., np.nan], nan_ok=True)
    assert by_prompt(["a", "b", "a"], [1., 2., np.nan]).tolist() == [1., 2.]


def test_results_are_written_before_the_tables_that_a_reader_may_cut_off(tmp_path, monkeypatch):
    def cut(*_):
        raise BrokenPipeError
    path = samples(tmp_path / "sft", "sft", "test", good)
    for name, script in (("generalisation", G), ("diversity", diversity)):
        monkeypatch.setattr(script, "print_table", cut)
        monkeypatch.setattr(os, "dup2", lambda *_: None)        # what `launch` does to a closed screen
        assert call(name, path, cwd=tmp_path).returncode == 141
        assert json.loads((tmp_path / f"{name}.json").read_text())
