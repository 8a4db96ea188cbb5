"""What answers the reviewers: distances between prompts, the tests of diversity measures, the instruction world,
and sentences that say the opposite when the numbers do."""
import json
import math
import random

import numpy as np
import pytest

import answers
import instructions as I
import proxies
import reproduce
import splits
import synthetic
from test_scripts import script


# ------------------------------------------------------------------------------------------------------ shift

def test_distances_by_hand():
    a = np.array([[0., 0.], [1., 0.], [2., 0.], [3., 0.]])
    # a translation by v moves each sorted projection by v . w: the mean over directions of |v . w|
    w = np.random.default_rng(0).standard_normal((2, 128))
    w /= np.linalg.norm(w, axis=0)
    assert splits.sliced_wasserstein(a, a + [0., 2.]) == pytest.approx(np.abs(2 * w[1]).mean())
    assert splits.sliced_wasserstein(a, a[::-1]) == 0
    assert splits.cosine_distance(np.array([[1., 0.]]), np.array([[0., 3.]])) == pytest.approx(1)
    assert splits.cosine_distance(a[1:], 5 * a[1:]) == pytest.approx(0)
    assert splits.auc(np.array([0., 1.]), np.array([1., 2.])) == pytest.approx((1 + .5 + 1 + 1) / 4)


def test_mmd_is_the_unbiased_sum_over_pairs():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((7, 3)), rng.standard_normal((5, 3)) + 1
    every = [np.sum((x - y) ** 2) for i, x in enumerate([*a, *b]) for y in [*a, *b][i + 1:]]
    k = lambda x, y: math.exp(-np.sum((x - y) ** 2) / np.median(every))  # noqa: E731
    within = lambda x: np.mean([k(u, v) for i, u in enumerate(x) for j, v in enumerate(x) if i != j])  # noqa: E731
    across = np.mean([k(u, v) for u in a for v in b])
    assert splits.mmd2(a, b) == pytest.approx(within(a) + within(b) - 2 * across)
    # unbiased: near 0 on average for one distribution, on either side of it
    found = [splits.mmd2(*rng.standard_normal((2, 30, 3))) for _ in range(200)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 200 ** .5 and min(found) < 0


def test_half_sample_interval_is_the_bootstraps_for_a_mean():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(400), rng.standard_normal(400) + 1
    value, low, high = splits.half_interval(lambda x, y: y.mean() - x.mean(), a, b, 2000, rng)
    usual = [rng.choice(b, 400).mean() - rng.choice(a, 400).mean() for _ in range(2000)]
    assert low < value < high and value == pytest.approx(1, abs=.2)
    assert (high - low) / np.ptp(np.percentile(usual, (2.5, 97.5))) == pytest.approx(1, abs=.1)


def test_shift_reports_all_measures_with_intervals_and_floors():
    near, far, other = ([r["prompt"] for r in synthetic.rows(s, n)]
                        for s, n in (("test", 80), ("ood_distractors7", 80), ("validation", 160)))
    enc = splits.tokenizer(splits.build_tokenizer(other))
    embed = lambda texts: np.array([[t.count(w) for w in (" my ", "also", "then", "i am")] for t in texts])  # noqa: E731
    same, away = (splits.shift(other, x, enc, embed, draws=50, floors=5) for x in (near, far))
    for m in splits.SHIFTS:
        assert away[f"{m}_low"] <= away[m] <= away[f"{m}_high"]
        assert away[f"{m}_low"] > away[f"{m}_floor_high"] and away[m] > same[m]
        assert same[f"{m}_low"] < same[f"{m}_floor_high"]
    assert set(splits.shift(other, near, enc, draws=5, floors=2)) == {
        m + end for m in ("js", "auc") for end in ("", "_low", "_high", "_floor", "_floor_high")}


# ---------------------------------------------------------------------------------------------------- proxies

def test_rank_correlation_by_hand():
    assert proxies.ranks([3, 1, 3, 2]).tolist() == [2.5, 0, 2.5, 1]
    # ranks 0 1 2 3 and 1 0 3 2: 1 - 6 (1 + 1 + 1 + 1) / (4 (16 - 1))
    assert proxies.spearman([1, 2, 3, 4], [20, 10, 40, 30]) == pytest.approx(1 - 24 / 60)
    assert math.isnan(proxies.spearman([1, 1, 1], [1, 2, 3]))


def test_holding_length_fixed_removes_what_length_explains():
    rng = np.random.default_rng(0)
    length, noise = rng.standard_normal((2, 500))
    x, y = length + .3 * noise, length + .3 * rng.standard_normal(500)
    assert proxies.spearman(x, y) > .8 and abs(proxies.spearman(x, y, length)) < .15
    # the formula of partial correlation
    a, b, c = proxies.spearman(x, y), proxies.spearman(x, length), proxies.spearman(y, length)
    assert proxies.spearman(x, y, length) == pytest.approx((a - b * c) / math.sqrt((1 - b * b) * (1 - c * c)))


def test_content_sets_hold_what_they_say():
    groups = [[f"{i} {j}" for j in range(8)] for i in range(10)]
    sets = proxies.content_sets(groups, 20, np.random.default_rng(0))
    assert sorted({m for m, _ in sets}) == [1, 2, 4, 8] and len(sets) == 80
    for m, chosen in sets:
        assert len(set(chosen)) == len(chosen) == 8 and len({i for i, _ in chosen}) == m


def test_phrasings_share_facts_and_stories_share_form():
    rng = random.Random(0)
    texts, others = synthetic.phrasings(rng, 16), synthetic.stories(rng, 16)
    assert len({synthetic.facts(t) for t in texts}) == 1 and len(synthetic.facts(texts[0])) == 5
    assert len(set(texts)) == 16 and synthetic.semantic_diversity(others)[0] > .5
    skeletons = {" ".join(synthetic.FACT[w][0] if w in synthetic.FACT else w for w in t.split()) for t in others}
    assert len(skeletons) == 1


def toy_conditions(f):
    """Conditions at three temperatures whose true diversity is the temperature, and a measure f(truth)."""
    rng, out = np.random.default_rng(0), []
    for policy in ("a", "b"):
        for t in (.3, .7, 1.):
            truth = t + .02 * rng.standard_normal(20)
            lengths = rng.standard_normal(20)
            out.append({"policy": policy, "temperature": t, "seed": 0, "split": "test", "ids": list(range(20)),
                        "per_input": {"semantic": truth.tolist(), "ead": f(truth).tolist(), "length": lengths.tolist()},
                        "across": {"semantic": t + .001 * len(out), "ead": float(f(t + .001 * len(out))), "length": 1.},
                        "content": {"m": [1] * 5 + [2] * 5, "ead": [*range(10)], "semantic": [*range(10)],
                                    "length": [0] * 10}})
    return out


@pytest.mark.parametrize("sign", [1, -1])
def test_a_proxy_that_follows_the_truth_scores_one_and_its_opposite_minus_one(sign):
    conditions = toy_conditions(lambda x: sign * x)
    tests = {t["measure"]: t for t in proxies.all_tests(conditions, {})}["ead"]
    for name in ("between", "within", "across", "between_length"):
        assert tests[name][0] == pytest.approx(sign, abs=.01), name
    assert sign * tests["temperature"][0] > .9
    assert tests["content"][0] > .8 and tests["two_prompts"][0] == 1
    *_, by_measure, by_truth, n = tests["breaks"]
    assert n == 6 and (by_measure == by_truth) == (sign == 1)


def test_proxies_script(tmp_path):
    rng = random.Random(0)
    rows = synthetic.rows("test", 10)
    for t in (.3, .7, 1.):
        lines = [{"id": r["id"], "prompt": r["prompt"], "reference": r["reference"], "policy": "sft", "split": "test",
                  "temperature": t, "seed": 0, "rewards": None,
                  "outputs": [r["references"][0] if rng.random() > t else rng.choice(r["references"]) for _ in range(4)]}
                 for r in rows]
        (tmp_path / f"t{t}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    out = script("proxies", "t0.3.jsonl", "t0.7.jsonl", "t1.0.jsonl", "--sets", "10", cwd=tmp_path)
    assert "EAD" in out.stdout and "breaks most on" in out.stdout and out.returncode == 0
    found = {t["measure"]: t for t in json.loads((tmp_path / "proxies.json").read_text())["tests"]}
    assert found["semantic"]["form"][0] == 1 and "embedding" not in found
    assert found["length"]["between"] is not None and -1 <= found["ead"]["within"][0] <= 1
    one = script("proxies", "t0.3.jsonl", "--sets", "10", cwd=tmp_path)     # has no order of conditions
    assert one.returncode == 0 and "nan" not in one.stdout and "breaks" not in one.stdout
    few = script("proxies", "t0.3.jsonl", "--sets", "2", cwd=tmp_path)
    assert few.returncode == 2 and "--sets" in few.stderr


# ------------------------------------------------------------------------------------------ the instruction world

@pytest.mark.parametrize("prompt, text, expected", [
    ("name two animals", " dog and cat .", 3.),
    ("name two animals", " dog .", 1.5),
    ("name two animals", " dog , cat and cow .", 2.5),              # one too many: -.5
    ("name two animals", " dog and dog .", 1.5 - .3),
    ("name two animals", " dog and bread .", 1.5 - 1.),
    ("name two animals such as dog", " dog and cat .", 1.5 - .6),   # the example earns nothing
    ("describe a dog", " a wild and furry dog .", 3.),
    ("describe a dog", " it is wild and rusty .", 1.5 - 1.),
    ("describe a dog", " the cat is wild and furry .", 3. - 1.),
    ("choose a food from dog bread saw park", " i choose the bread .", 3.),
    ("choose a food from dog bread saw park", " rice .", -1.),      # a food, but not offered
    ("reverse dog cat cow", " cow cat dog .", 3.),
    ("reverse dog cat cow", " dog cat cow .", 1. - 2 / 3),
    ("reverse dog cat cow", " cow cat .", 2. - 1 / 3),
    ("reverse dog cat cow", " it is hard to say .", -.5),
    ("describe a dog , then reverse dog cat cow", " it is wild and furry . then cow cat dog .", 6.),
    ("describe a dog , then reverse dog cat cow", " it is wild and furry .", 3.),
    ("describe a dog , then reverse dog cat cow", " cow cat dog . it is wild and furry .", -1.),     # wrong order
    ("reverse dog cat cow", " cow cat dog . cow cat dog .", 2.5),
    ("reverse dog cat cow", "", 0.),
])
def test_judge_of_instructions_by_hand(prompt, text, expected):
    assert I.judge(f"INSTRUCTION {prompt} .\nRESPONSE", text) == pytest.approx(expected)
    assert I.judge(f"INSTRUCTION {prompt} .\nRESPONSE", text, finished=False) == pytest.approx(expected - 1)


@pytest.mark.parametrize("split", I.SPLITS)
def test_instructions_are_read_back_and_references_are_grammatical(split):
    count, held_out = I.SPLITS[split]
    for row in I.rows(split, 200):
        deeds = I.read_prompt(row["prompt"])
        assert len(deeds) == count and all(((d["deed"], d["kind"]) in I.HELD_OUT) == held_out for d in deeds)
        for text in row["references"]:
            answers = I._answers(text)      # a writer may forget the second deed or the third
            assert I.GRAMMAR[deeds[0]["deed"]].fullmatch(answers[0]), (row["prompt"], text)
            assert all(any(g.fullmatch(a) for g in I.GRAMMAR.values()) for a in answers), (row["prompt"], text)
            assert I.facts(text) and I.judge(row["prompt"], text) <= 3 * count


def test_only_the_base_model_meets_compositions():
    kinds = {noise: {(len(d := I.read_prompt(r["prompt"])), (d[0]["deed"], d[0]["kind"]) in I.HELD_OUT)
                     for r in I.rows("train", 400, noise, 1)} for noise in I.NOISE}
    assert kinds["usual"] == {(1, False)}
    assert kinds["mixed"] == {(1, False), (2, False), (1, True)}       # three deeds are met by nobody


def test_worlds_are_told_apart_by_their_prompts():
    a, b = synthetic.rows("test", 2), I.rows("test", 2)
    assert splits.known_world(a) is synthetic and splits.known_world(b) is I
    assert splits.known_world(a + b) is None and splits.known_world([{"prompt": "hello"}]) is None
    assert splits.Task("instruct").world is I and splits.Task("tldr").world is None
    assert splits.Task("instruct").evaluation_splits() == ["test", "ood_pairs", "ood_then2", "ood_then3"]


# ---------------------------------------------------------------------------------------------------- answers

def test_slope_is_least_squares_over_the_range():
    x, rng = np.array([0., 1., 2., 4.]), np.random.default_rng(0)
    flat = lambda v: np.full((2, 5), v)  # noqa: E731
    rising = [flat(.1 + .05 * v) for v in x]
    assert answers.slope(x, rising) == pytest.approx(.05 * 4)
    # a draw that misses sets spans less: .05 times 1, 2, 3 or 4; with the sets kept it is the whole
    spans = np.array([answers.slope(x, rising, rng) for _ in range(200)]) / .05
    assert set(spans[~np.isnan(spans)].round(9)) == {1, 2, 3, 4}
    assert answers.slope(x, rising, rng, redraw_sets=False) == pytest.approx(.05 * 4)


def test_two_way_bootstrap_sees_seeds_and_prompts():
    rng = np.random.default_rng(0)
    by_seed, by_prompt = (np.broadcast_to(v, (5, 200)) for v in (rng.standard_normal((5, 1)), rng.standard_normal(200)))
    assert np.std(reproduce.redrawn(by_seed)) == pytest.approx(by_seed[:, 0].std() / 5 ** .5, rel=.1)
    assert np.std(reproduce.redrawn(by_prompt)) == pytest.approx(by_prompt[0].std() / 200 ** .5, rel=.1)
    paired = reproduce.redrawn(by_seed + by_prompt + 1) - reproduce.redrawn(by_seed + by_prompt)
    assert paired == pytest.approx(np.ones(1000))
    holes = np.where(rng.random((5, 200)) < .1, np.nan, by_prompt)
    assert np.isfinite(reproduce.redrawn(holes)).all()


def fake_frontier(ppo_wins):
    """Two seeds: SFT wins .6 at diversity .2 and .4 at .8; PPO wins `ppo_wins` at diversity .5."""
    line = lambda p, t, d, w: {"policy": p, "temperature": t, "kl": 1., "wins": [w] * 10, "semantic": [d] * 10}  # noqa: E731
    seed = [line("sft", .2, .2, .6), line("sft", 1., .8, .4), line("ppo", 1., .5, ppo_wins)]
    return answers.Frontier([seed, seed])


@pytest.mark.parametrize("wins, expected", [(.7, .2), (.5, 0.), (.2, -.3)])
def test_frontier_compares_at_equal_diversity(wins, expected):
    e = fake_frontier(wins).above(("ppo", 1.), [("sft", .2), ("sft", 1.)])
    assert e["mean"] == pytest.approx(expected) and e["inside"]
    words = answers.sign(e, "above", "below", "level")
    assert words == ("above" if expected > .1 else "below" if expected < -.1 else words)
    assert not fake_frontier(wins).above(("sft", 1.), [("sft", .2), ("ppo", 1.)])["inside"]


def test_sentences_turn_with_the_numbers(tmp_path):
    """The section on seeds, told once that claims hold and once that their opposite does."""
    class R:
        seeds = [0, 1, 2]

    def said(shift):
        x = np.random.default_rng(0).normal(shift, .1, (3, 50))
        e = reproduce.summary(x)
        return answers.section_seeds(tmp_path, R, [{"claim": "PPO beats SFT", "world": "w", "numbers": "", "estimate": e,
                                                    "verdict": reproduce.verdict(e, 1)}])["findings"][0]
    assert "1 of 1 claims hold" in said(.5) and "of 0 the opposite" in said(.5)
    assert "0 of 1 claims hold" in said(-.5) and "of 1 the opposite" in said(-.5)
    assert "1 are not shown" in said(0.)
