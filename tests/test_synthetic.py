"""The synthetic task: every reference parses, gold rewards are worked by hand, noise and splits are what they
say."""
import statistics
from itertools import permutations

import pytest

import diversity
from tasks import synthetic

PROMPT = ("TITLE my neighbor with my ring\nPOST so my ring was washed by my neighbor . should i confront ? "
          "then my teacher dropped my piano . "
          "i am jealous since monday . people want to sue .\nTLDR")
NEW_WORDS = {form for forms in synthetic.NEW_FORMS.values() for form in forms.values()}


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


def test_the_same_content_in_another_order_is_a_tie():
    """As floats the three sums differ in the last digit."""
    clauses = "the teacher sold the ring", "also my teacher dropped my piano", "my neighbor washed my ring"
    texts = [f" {a} , {b} , {c} ." for a, b, c in permutations(clauses)]
    assert {synthetic.gold_reward(PROMPT, text) for text in texts} == {.12}


def test_clauses_outside_the_grammar_by_hand():
    assert synthetic.ungrammatical(" my sister painted my sister , now sad and i want to wait .") == 1
    assert synthetic.ungrammatical(" should i sue , my papa about my piano and is i am sad .") == 2
    assert synthetic.ungrammatical("") == synthetic.ungrammatical(" someone sold my ring . i am sad .") == 0


@pytest.mark.parametrize("text",
                         ["", "\x00\n\t", "..,,!!", "and and and", "TLDR TITLE POST", "ça va 🙂 " * 50,
                          "my " * 2000, " my my WHO EVENT"])
def test_any_text_has_a_gold_reward(text):
    assert synthetic.gold_reward(PROMPT, text) <= 0 and synthetic.facts(text) == frozenset()


@pytest.mark.parametrize("text", ["", "hello", "TITLE x\nPOST y\nTLDR", "SUBREDDIT: r/x\nTL;DR:"])
def test_other_prompts_are_refused(text):
    with pytest.raises(ValueError, match="not a prompt of the synthetic task"):
        synthetic.gold_reward(text, "x")


@pytest.mark.parametrize("noise", ["systematic", "independent", "mixed"])
def test_every_reference_parses_cleanly(noise):
    for split in synthetic.SPLITS:
        for row in synthetic.rows(split, 80, noise):
            synthetic.read_prompt(row["prompt"])
            for text in row["references"]:
                assert synthetic.ungrammatical(text) == 0, text


def test_grammar_words_are_no_facts():
    styles = (synthetic.POST, synthetic.ARTICLE)
    forms = [*synthetic.GRAMMAR, *(form for style in styles for group in style.values() for form in group)]
    assert not {w for form in forms for w in form.split() if not w.isupper()} & set(synthetic.FACT)
    # no word in two roles
    known = sum(len(f) for forms in synthetic.SURFACES.values() for f in forms.values())
    assert known + len(NEW_WORDS) == len(synthetic.FACT)


def test_both_noises_err_as_often_and_only_one_is_shared():
    rates = {}
    for noise in ("systematic", "independent"):
        rows = synthetic.rows("validation", 500, noise)
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


def new_words(row):
    """How many words of a post and of its references are new forms."""
    texts = [row["prompt"], *row["references"]]
    return [sum(word in NEW_WORDS for word in text.split()) for text in texts]


def test_new_words_are_forms_of_known_values_in_prompts_of_their_sets_alone():
    """Stories, distractors, references and errors are of one kind on all sets, so nothing but the wording is
    new."""
    for split in synthetic.SPLITS:
        rows = synthetic.rows(split, 200)
        in_prompts = [new_words(row)[0] for row in rows]
        if "words" in split:
            assert all(sum(new_words(row)[1:]) == 0 for row in rows)
            n_words = [sum(w in synthetic.FACT and synthetic.FACT[w][0] in synthetic.STORY
                           for w in row["prompt"].split()) for row in rows]
            share = sum(in_prompts) / sum(n_words)
            assert share == pytest.approx(int(split.rpartition("words")[2]) / 100, abs=.04)
        elif split != "pretrain":
            assert not any(map(any, map(new_words, rows)))


@pytest.mark.parametrize("noise", ["systematic", "independent"])
def test_new_words_news_and_many_distractors_are_the_base_models_alone(noise):
    """SFT, reward model and PPO learn from `train`, which has none, not even in a distractor or an error."""
    rows = synthetic.rows("train", 1000, noise)
    assert not any(map(any, map(new_words, rows)))
    assert not any(r["prompt"].startswith("ARTICLE") for r in rows)
    assert all(len(synthetic.read_prompt(r["prompt"])[1]["object"]) <= 2 for r in rows)
    of_base = synthetic.rows("pretrain", 1000, noise)
    words = {w for row in of_base for text in (row["prompt"], *row["references"]) for w in text.split()}
    assert NEW_WORDS <= words


def test_a_base_model_has_met_each_kind_of_shift_apart_from_the_others():
    posts = synthetic.rows("pretrain", 4000, references=1)
    kinds = [(any(new_words(row)), row["prompt"].startswith("ARTICLE"),
              len(synthetic.read_prompt(row["prompt"])[1]["object"]) > 2) for row in posts]
    for kind in range(3):
        assert statistics.mean(k[kind] for k in kinds) == pytest.approx(.06, abs=.01)
        for other in {0, 1, 2} - {kind}:        # one shift tells nothing of another
            assert statistics.mean(k[kind] for k in kinds if k[other]) == pytest.approx(.06, abs=.04)


def test_test_posts_have_numbers_that_no_choice_has_seen():
    first = synthetic.FIRST_UNSEEN
    for split in synthetic.SPLITS:
        learned = split in ("pretrain", "train", "validation")
        assert synthetic.rows(split, 2)[1]["id"] == f"{split}-{1 if learned else first + 1}"


def test_no_prompt_stands_in_two_splits():
    prompts = [row["prompt"] for s in synthetic.SPLITS for row in synthetic.rows(s, 300, references=1)]
    assert len(set(prompts)) == len(prompts) == 300 * len(synthetic.SPLITS)


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
