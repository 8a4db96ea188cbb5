"""What the study says of the paper and of the kind of diversity that is lost, on numbers made by hand."""
import numpy as np
import pytest

import diversity
from common.stats import over_seeds
from study import claims, kinds, measures, methods, paper
from study.names import DIVERSITY, SETS
from tasks import synthetic


def e(low, high, n_seeds=5):
    return {"low": low, "high": high, "mean": (low + high) / 2, "per_seed": [0.] * n_seeds}


@pytest.mark.parametrize("expected, low, high, said", [
    ("more", .1, .2, "agrees"), ("more", -.2, -.1, "differs"), ("more", -.1, .2, "not shown"),
    ("less", -.2, -.1, "agrees"), ("less", .1, .2, "differs"), ("less", -.1, .2, "not shown"),
    # where the paper sees no difference: within .05, or beyond it
    ("same", -.04, .04, "agrees"), ("same", .01, .04, "agrees"), ("same", -.2, .1, "not shown"),
    ("same", .01, .06, "not shown"), ("same", .06, .2, "differs"), ("same", -.2, -.06, "differs"),
    ("not less", -.04, .3, "agrees"), ("not less", .1, .3, "agrees"), ("not less", -.3, .3, "not shown"),
    ("not less", -.3, -.06, "differs")])
def test_verdicts_on_the_paper_follow_the_numbers(expected, low, high, said):
    assert paper.verdict([(expected, "x", e(low, high))]) == said


def test_one_contradiction_decides_and_agreement_needs_all():
    yes, no, open_ = ("more", "a", e(.1, .2)), ("more", "b", e(-.2, -.1)), ("more", "c", e(-.1, .1))
    assert paper.verdict([yes, yes]) == paper.AGREES
    assert paper.verdict([yes, open_]) == paper.NOT_SHOWN
    assert paper.verdict([yes, open_, no]) == paper.DIFFERS
    assert paper.verdict([]) == paper.OPEN


def test_one_seed_shows_nothing():
    alone = over_seeds(np.array([[.3, .5]]))
    assert {paper.verdict([(expected, "x", alone)]) for expected in ("more", "less", "same", "not less")} == {
        paper.NOT_SHOWN}


def test_agreement_of_two_judges_equals_a_naive_recount():
    rng = np.random.default_rng(0)
    gold, scores = rng.integers(0, 3, (5, 4)).astype(float), rng.integers(0, 3, (5, 4)).astype(float)
    found = measures.agreement(scores, gold)
    for g, s, rate in zip(gold, scores, found):
        hits = [1. if (a - b) * (c - d) > 0 else .5 if c == d else 0.
                for i, (a, c) in enumerate(zip(g, s)) for b, d in zip(g[i + 1:], s[i + 1:]) if a != b]
        assert rate == pytest.approx(np.mean(hits)) if hits else np.isnan(rate)
    assert measures.agreement(gold, gold)[0] == 1 and measures.agreement(-gold, gold)[0] == 0
    assert np.isnan(measures.agreement(gold, np.ones((5, 4)))).all()


def test_methods_are_compared_seed_by_seed_and_prompt_by_prompt():
    """DPO wins .2 less than PPO with each seed, and breaks half a clause an output more; GRPO was sampled in
    distribution alone."""
    def of_seed(shift):
        def everywhere(*values):
            return {split: [v + shift for v in values] for split in SETS}
        return {"wins": {"sft": everywhere(.1, .2), "ppo": everywhere(.5, .7), "dpo_b0.1": everywhere(.4, .4),
                         "grpo_b0.1": {"test": [.5, .5]}},
                "ungrammatical": {"sft": everywhere(0., 0.), "ppo": everywhere(.1, .1),
                                  "dpo_b0.1": everywhere(.5, .7), "grpo_b0.1": {"test": [0., 0.]}}}
    rows = {(x["policy"], x["split"]): x for x in methods.win_rates("synthetic", [of_seed(0.), of_seed(.1)])}
    assert set(rows) == {(policy, split) for policy in ("sft", "ppo", "dpo_b0.1") for split in SETS}
    of_dpo = rows["dpo_b0.1", "test"]
    assert of_dpo["wins"]["per_seed"] == pytest.approx([.4, .5])
    assert of_dpo["less_ppo"]["per_seed"] == pytest.approx([-.2, -.2])
    assert of_dpo["less_sft"]["mean"] == pytest.approx(.25)
    assert of_dpo["ungrammatical"]["mean"] == pytest.approx(.65)
    assert of_dpo["more_ungrammatical"]["per_seed"] == pytest.approx([.5, .5])
    assert rows["ppo", "test"]["less_ppo"]["mean"] == 0


class Fake:
    """Measures of two seeds and three prompts; the last prompt has no good outputs."""
    seeds = (0, 1)
    values = {("sft", "gold_diversity"): [[.6, .5, .9]] * 2, ("ppo", "gold_diversity"): [[.3, .1, .2]] * 2,
              ("sft", "good_gold_diversity"): [[.5, .4, np.nan]] * 2,
              ("ppo", "good_gold_diversity"): [[.25, .2, np.nan]] * 2}

    def get(self, task, policy, split, temperature, measure):
        assert (split, temperature) == ("test", DIVERSITY)
        return np.array(self.values[policy, measure.removeprefix("per_input_")])


def test_a_loss_splits_into_two_parts_that_add_up():
    found = kinds.split_of_loss(Fake(), "synthetic", "ppo")
    loss, errors, narrowing = (found[k]["mean"] for k in ("loss", "errors_removed", "narrowing"))
    assert (loss, narrowing) == pytest.approx((.35, .225)) and loss == pytest.approx(errors + narrowing)
    assert found["inputs"] == 2
    one = diversity.split_of_loss(*(Fake.values[key][0] for key in (
        ("sft", "gold_diversity"), ("ppo", "gold_diversity"), ("sft", "good_gold_diversity"),
        ("ppo", "good_gold_diversity"))))
    assert one["narrowing"].mean == pytest.approx(narrowing) and one["errors_removed"].mean == pytest.approx(errors)


def test_what_each_stage_has_seen_is_counted():
    base, later = claims.seen({"base_rows": 600, "sft_rows": 200, "prompts": 300})
    posts = synthetic.rows("pretrain", 600, references=1)
    assert base["posts"] == 600 and later["posts"] == 300
    assert base["articles"] == sum(r["prompt"].startswith("ARTICLE") for r in posts) / 600 > 0
    assert base["distractors"] == sum(len(synthetic.read_prompt(r["prompt"])[1]["object"]) > 2
                                      for r in posts) / 600 > 0
    assert later["new_words"] == later["articles"] == later["distractors"] == 0 < base["new_words"] < .12
