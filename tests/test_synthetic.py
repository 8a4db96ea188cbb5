"""The synthetic task: every reference parses, gold rewards are worked by hand, noise and splits are what they
say."""
import random
import re
import statistics
from collections import Counter

import pytest

import diversity
from conftest import call, refused
from study import key_story, rules
from tasks import synthetic

PROMPT = ("TITLE my neighbor with my ring\nPOST so my ring was washed by my neighbor . should i confront ? "
          "then my teacher dropped my piano . "
          "i am jealous since monday . people want to sue .\nTLDR")


def reward(text, finished=True):
    return pytest.approx(synthetic.gold_reward(PROMPT, text, finished))


def test_gold_reward_by_hand():
    """Key: neighbor, wash, ring, confront, jealous (.5), monday (.5).  Distractors: teacher, drop, piano,
    sue."""
    key, others = synthetic.read_prompt(PROMPT)
    assert key == {"who": "neighbor", "event": "washed", "object": "ring", "ask": "confront",
                   "feeling": "jealous", "time": "monday"}
    assert others["who"] == {"teacher"} and others["ask"] == {"sue"} and others["feeling"] == set()
    assert reward(" my neighbor washed my ring .") == 3
    assert reward(" monday my neighbor washed my ring , i feel jealous and should i confront .") == 5
    assert reward(" my neighbor washed my ring .", False) == 2                        # unfinished: -1
    assert reward(" my neighbor sold my ring .") == 1                                 # 2 - 1: a wrong value
    assert reward(" my neighbor washed my ring . also my teacher dropped my piano .") == 3 - .6
    assert reward(" my neighbor washed my ring . trouble with my neighbor .") == 3 - .3      # said twice
    # a list of words is no clause
    assert reward(" neighbor washed ring monday jealous confront .") == -.5
    assert reward("") == 0
    # 5 + 18 pieces: 5 over 18; 5 repetitions
    long = " my neighbor washed my ring" + " , now jealous" * 6
    assert reward(long) == 3.5 - 5 * .3 - .08 * 5


@pytest.mark.parametrize("text",
                         ["", "\x00\n\t", "..,,!!", "and and and", "TLDR TITLE POST", "ça va 🙂 " * 50,
                          "my " * 2000, " my my WHO EVENT"])
def test_any_text_has_a_gold_reward(text):
    assert synthetic.gold_reward(PROMPT, text) <= 0 and synthetic.facts(text) == frozenset()


@pytest.mark.parametrize("text", ["", "hello", "TITLE x\nPOST y\nTLDR", "SUBREDDIT: r/x\nTL;DR:"])
def test_other_prompts_are_refused(text):
    with pytest.raises(ValueError, match="not a prompt of the synthetic task"):
        synthetic.gold_reward(text, "x")


@pytest.mark.parametrize("noise", synthetic.NOISE)
def test_every_reference_parses_cleanly(noise):
    for split in synthetic.SPLITS:
        for row in synthetic.rows(split, 150, noise):
            synthetic.read_prompt(row["prompt"])
            for text in row["references"]:
                for clause in synthetic._clauses(synthetic._pieces(text)):
                    assert synthetic._skeleton(clause) in synthetic.GRAMMAR, (text, clause)


def test_grammar_words_are_no_facts():
    styles = (synthetic.POST, synthetic.ARTICLE)
    forms = [*synthetic.GRAMMAR, *(form for style in styles for group in style.values() for form in group)]
    assert not {w for form in forms for w in form.split() if not w.isupper()} & set(synthetic.FACT)
    # no word in two roles
    assert sum(len(f) for forms in synthetic.SURFACES.values() for f in forms.values()) == len(synthetic.FACT)


def test_both_noises_err_as_often_and_only_one_is_shared():
    rates = {}
    for noise in ("systematic", "independent"):
        rows = synthetic.rows("validation", 1000, noise)
        keys = [synthetic.read_prompt(r["prompt"]) for r in rows]
        distracted = [[any(v in others[s] and v != key[s] for s, v in synthetic.facts(t))
                       for t in r["references"]] for r, (key, others) in zip(rows, keys)]
        wrong = [any(v != key[s] and v not in others[s] for s, v in synthetic.facts(t))
                 for r, (key, others) in zip(rows, keys) for t in r["references"]]
        rates[noise] = (statistics.mean(map(statistics.mean, distracted)), statistics.mean(wrong),
                        statistics.mean(len(set(d)) == 1 for d in distracted))
    (d1, w1, shared1), (d2, w2, shared2) = rates["systematic"], rates["independent"]
    assert abs(d1 - d2) < .03 and abs(w1 - w2) < .03 and .5 < d1 < .6
    # four references of a post agree on the distractor: .9^4 + .1^4, .55^4 + .45^4
    assert shared1 > .6 and shared2 < .2


def test_held_out_words_are_held_out():
    def held(row):
        key, _ = synthetic.read_prompt(row["prompt"])
        return [key[slot] in synthetic.HELD_OUT[slot] for slot in synthetic.STORY]
    assert not any(any(held(r)) for split in ("test", "validation", "ood_article", "ood_distractors7")
                   for r in synthetic.rows(split, 200))
    assert all(all(held(r)) for r in synthetic.rows("ood_words100", 200))
    assert .4 < statistics.mean(x for r in synthetic.rows("ood_words50", 200) for x in held(r)) < .6
    assert .03 < statistics.mean(all(held(r)) for r in synthetic.rows("pretrain", 1000)) < .09


def words_of(row):
    """The facts of a post and of its references, those of distractors and errors too."""
    key, others = synthetic.read_prompt(row["prompt"])
    told = {*key.items(), *((slot, value) for slot, values in others.items() for value in values)}
    return told.union(*map(synthetic.facts, row["references"]))


@pytest.mark.parametrize("noise", ["systematic", "independent"])
def test_held_out_words_and_news_are_the_base_models_alone(noise):
    """SFT, reward model and PPO learn from `train`, which has neither, not even in distractors or errors: else
    "held out" would tell a distractor."""
    rows = synthetic.rows("train", 3000, noise)
    held_out = {(slot, value) for slot, values in synthetic.HELD_OUT.items() for value in values}
    assert not held_out & set().union(*map(words_of, rows))
    assert not any(r["prompt"].startswith("ARTICLE") for r in rows)
    assert any(r["prompt"].startswith("ARTICLE") for r in synthetic.rows("pretrain", 400, references=1))
    assert held_out <= set().union(*map(words_of, synthetic.rows("pretrain", 2000, noise)))


def test_a_base_model_has_met_each_kind_of_shift_apart_from_the_others():
    """News of seen words and of new ones, keys half new, many distractors: no shift stands for another."""
    found = Counter()
    for row in synthetic.rows("pretrain", 6000, references=1):
        key, others = synthetic.read_prompt(row["prompt"])
        new = sum(key[slot] in synthetic.HELD_OUT[slot] for slot in synthetic.STORY)
        found[row["prompt"].startswith("ARTICLE"), new, len(others["object"]) > 2] += 1
    assert all(found[news, new, False] > 15 for news in (True, False) for new in range(4))
    assert all(found[news, 0, True] > 40 for news in (True, False))


def test_copying_pays_as_much_from_news_as_from_a_post():
    for split in ("test", "ood_article"):
        for row in synthetic.rows(split, 200, references=1):
            key, others = synthetic.read_prompt(row["prompt"])
            sentences = re.split(r"[.?]", row["prompt"].partition("POST ")[2].removesuffix("TLDR"))
            told = [s for s in sentences if s.strip() and "people" not in s
                    and synthetic.facts(s) <= set(key.items())]
            too_long = max(0, len(synthetic._pieces(" . ".join(told))) - synthetic.FREE_WORDS)
            paid = 5 - synthetic.PENALTY["word_too_many"] * too_long
            assert synthetic.gold_reward(row["prompt"], " . ".join(told)) == pytest.approx(paid)


@pytest.mark.parametrize("split, n", [("test", 0), ("ood_words100", 1), ("ood_distractors7", 0)])
def test_words_do_not_tell_the_key_story(split, n):
    """Distractors have as many held-out words as the key story."""
    for row in synthetic.rows(split, 300, references=1):
        for story in synthetic.read_prompt(row["prompt"]):
            values = {(slot, v) for slot in synthetic.STORY
                      for v in ([story[slot]] if isinstance(story[slot], str) else story[slot])}
            assert {v in synthetic.HELD_OUT[slot] for slot, v in values} == {bool(n)}


@pytest.mark.parametrize("noise", ["systematic", "independent"])
def test_writers_err_as_often_whatever_the_words(noise):
    def wrong(held_out):
        rng, found = random.Random(0), []
        for _ in range(20_000):
            key = synthetic._story(rng, held_out)
            said = synthetic._said(rng, key, noise)
            found += [said[slot] != key[slot] for slot in synthetic.STORY if slot in said]
            # a wrong word is of the right one's kind
            assert all((said[slot] in synthetic.HELD_OUT[slot]) == bool(held_out) for slot in synthetic.STORY
                       if slot in said)
        return statistics.mean(found)
    assert wrong(0.) == pytest.approx(.06, abs=.005) and wrong(1.) == pytest.approx(.06, abs=.005)


def test_test_posts_have_numbers_that_no_choice_has_seen():
    first = synthetic.FIRST_UNSEEN
    for split in synthetic.SPLITS:
        learned = split in ("pretrain", "train", "validation")
        assert synthetic.rows(split, 2)[1]["id"] == f"{split}-{1 if learned else first + 1}"


def test_a_perfect_nli_classifier_by_hand():
    whole, part = " my neighbor washed my ring .", " trouble with my neighbor ."
    other, mood = " my boss washed my ring .", " i feel angry ."
    pairs = [(whole, part), (part, whole), (whole, other), (whole, mood), (whole, whole), (mood, "nothing")]
    assert synthetic.nli_points(pairs) == [-1, 0, 1, 0, -1, -1]
    assert diversity.nli_diversity([whole, part, other], synthetic.nli_points) == pytest.approx((-1 + 4) / 6)


def test_a_row_is_the_same_whatever_is_asked_beside_it():
    assert synthetic.rows("test", 5)[3] == synthetic.rows("test", 1, start=3)[0]
    assert synthetic.rows("test", 3) == synthetic.rows("test", 3) != synthetic.rows("validation", 3)


def test_gold_diversity_by_hand():
    """{who, event, object} and {who}: intersection 1 of 3."""
    a, b = " my neighbor washed my ring .", " trouble with my neighbor ."
    assert synthetic.gold_diversity([a, b]) == (pytest.approx(2 / 3), 1.)
    assert synthetic.gold_diversity([a, a, a, a]) == (0., .25)
    assert synthetic.gold_diversity(["", "!"]) == (0., .5)


def test_the_key_story_is_scored_against_a_distractor(work, tmp_path):
    assert key_story.SPLITS == ["test", "ood_article", "ood_words50", "ood_words100"]
    for split in key_story.SPLITS:
        found = key_story.both_stories(split, 100)
        assert len(found) == 100
        for prompt, key, other in found:
            assert synthetic.gold_reward(prompt, key) == 3 and synthetic.gold_reward(prompt, other) < 0
    got = call("study.key_story", "--reward", work / "ckpt_reward.pt", "--posts", "40", cwd=tmp_path)
    assert got.returncode == 0 and "ood_words100" in got.stdout and " 40" in got.stdout, got.stderr
    refused(tmp_path, "study.key_story", "--reward", work / "ckpt_sft.pt", says="ckpt_sft.pt")


def test_rules_mark_the_scale_of_win_rates():
    texts = {rule: write(PROMPT) for rule, write in rules.RULES.items()}
    assert texts == {"title": " monday my neighbor with my ring , now jealous , maybe i should confront .",
                     "everything": " neighbor washed ring and teacher dropped piano ."}
    # 1 + 1 + 1 + .5 + .5; 3 - .6
    assert [synthetic.gold_reward(PROMPT, text) for text in texts.values()] == pytest.approx([4, 2.4])
    found = {(x["rule"], x["split"]): x["rate"] for x in rules.win_rates(60) if x["task"] == "synthetic"}
    assert found["title", "test"] > .85 and found["everything", "ood_distractors7"] < .1
