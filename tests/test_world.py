"""The embedded world: every reference parses, the judge is worked by hand, noise and splits are what they
say."""
import random
import statistics

import pytest

import splits
import synthetic as W

PROMPT = ("TITLE my neighbor with my ring\nPOST so my ring was washed by my neighbor . should i confront ? "
          "then my teacher dropped my piano . "
          "i am jealous since monday . people want to sue .\nTLDR")


def test_judge_by_hand():
    """Key: neighbor, wash, ring, confront, jealous (.5), monday (.5).  Distractors: teacher, drop, piano,
    sue."""
    key, others = W.read_prompt(PROMPT)
    assert key == {"who": "neighbor", "event": "washed", "object": "ring", "ask": "confront",
                   "feeling": "jealous", "time": "monday"}
    assert others["who"] == {"teacher"} and others["ask"] == {"sue"} and others["feeling"] == set()
    judge = lambda text, finished=True: pytest.approx(W.judge(PROMPT, text, finished))  # noqa: E731
    assert judge(" my neighbor washed my ring .") == 3
    assert judge(" monday my neighbor washed my ring , i feel jealous and should i confront .") == 5
    assert judge(" my neighbor washed my ring .", False) == 2                        # unfinished: -1
    assert judge(" my neighbor sold my ring .") == 1                                 # 2 - 1: a wrong value
    assert judge(" my neighbor washed my ring . also my teacher dropped my piano .") == 3 - .6
    assert judge(" my neighbor washed my ring . trouble with my neighbor .") == 3 - .3      # said twice
    # a list of words is no clause
    assert judge(" neighbor washed ring monday jealous confront .") == -.5
    assert judge("") == 0
    # 5 + 18 pieces: 5 over 18; 5 repetitions
    long = " my neighbor washed my ring" + " , now jealous" * 6
    assert judge(long) == 3.5 - 5 * .3 - .08 * 5


@pytest.mark.parametrize("text",
                         ["", "\x00\n\t", "..,,!!", "and and and", "TLDR TITLE POST", "ça va 🙂 " * 50,
                          "my " * 2000, " my my WHO EVENT"])
def test_judge_reads_any_text(text):
    assert W.judge(PROMPT, text) <= 0 and W.facts(text) == frozenset()


@pytest.mark.parametrize("text", ["", "hello", "TITLE x\nPOST y\nTLDR", "SUBREDDIT: r/x\nTL;DR:"])
def test_other_prompts_are_refused(text):
    with pytest.raises(ValueError, match="not a prompt of the embedded world"):
        W.judge(text, "x")


@pytest.mark.parametrize("noise", W.NOISE)
def test_every_reference_parses_cleanly(noise):
    for split in W.SPLITS:
        for row in W.rows(split, 150, noise):
            W.read_prompt(row["prompt"])
            for text in row["references"]:
                for clause in W._clauses(W._pieces(text)):
                    assert W._skeleton(clause) in W.GRAMMAR, (text, clause)


def test_grammar_words_are_no_facts():
    forms = [*W.GRAMMAR, *(f for style in (W.POST, W.ARTICLE) for group in style.values() for f in group)]
    assert not {w for form in forms for w in form.split() if not w.isupper()} & set(W.FACT)
    # no word in two roles
    assert sum(len(f) for forms in W.SURFACES.values() for f in forms.values()) == len(W.FACT)


def test_both_noises_err_as_often_and_only_one_is_shared():
    rates = {}
    for noise in ("systematic", "independent"):
        rows = W.rows("validation", 1000, noise)
        keys = [W.read_prompt(r["prompt"]) for r in rows]
        distracted = [[any(v in others[s] and v != key[s] for s, v in W.facts(t)) for t in r["references"]]
                      for r, (key, others) in zip(rows, keys)]
        wrong = [any(v != key[s] and v not in others[s] for s, v in W.facts(t)) for r,
                 (key, others) in zip(rows, keys) for t in r["references"]]
        rates[noise] = (statistics.mean(map(statistics.mean, distracted)), statistics.mean(wrong),
                        statistics.mean(len(set(d)) == 1 for d in distracted))
    (d1, w1, shared1), (d2, w2, shared2) = rates["systematic"], rates["independent"]
    assert abs(d1 - d2) < .03 and abs(w1 - w2) < .03 and .5 < d1 < .6
    # four references of a post agree on the distractor: .9^4 + .1^4, .55^4 + .45^4
    assert shared1 > .6 and shared2 < .2


def test_held_out_words_are_held_out():
    story = lambda row: W.read_prompt(row["prompt"])[0]  # noqa: E731
    held = lambda row: [story(row)[s] in W.HELD_OUT[s] for s in W.STORY]  # noqa: E731
    assert not any(any(held(r)) for split in ("test", "validation", "ood_article", "ood_distractors7")
                   for r in W.rows(split, 200))
    assert all(all(held(r)) for r in W.rows("ood_words100", 200))
    assert .4 < statistics.mean(x for r in W.rows("ood_words50", 200) for x in held(r)) < .6
    assert .03 < statistics.mean(all(held(r)) for r in W.rows("train", 1000)) < .09


def test_a_row_is_the_same_whatever_is_asked_beside_it():
    assert W.rows("test", 5)[3] == W.rows("test", 1, start=3)[0]
    assert W.rows("test", 3) == W.rows("test", 3) and W.rows("test", 3) != W.rows("validation", 3)


def test_semantic_diversity_by_hand():
    """{who, event, object} and {who}: intersection 1 of 3."""
    a, b = " my neighbor washed my ring .", " trouble with my neighbor ."
    assert W.semantic_diversity([a, b]) == (pytest.approx(2 / 3), 1.)
    assert W.semantic_diversity([a, a, a, a]) == (0., .25)
    assert W.semantic_diversity(["", "!"]) == (0., .5)


def test_tokenizer_roundtrip_and_words_are_one_token():
    rows = W.rows("train", 200)
    enc = splits.tokenizer(splits.build_tokenizer([t for r in rows for t in (r["prompt"], *r["references"])]))
    for text in [rows[0]["prompt"], "ça va 🙂 \x00 <|endoftext|> nope", ""]:
        assert enc.decode(enc.encode_ordinary(text)) == text
    assert len(enc.encode_ordinary(" my sister damaged my car .")) == 6
    ids = splits.encode_response(enc, "my sister", 10)
    assert ids[-1] == enc.eot_token and splits.decode(enc, ids) == (" my sister", True)
    # cut: no EOS
    assert splits.decode(enc, splits.encode_response(enc, "my sister", 1)) == (" my", False)


def test_shift_has_a_floor_and_orders_splits():
    train, words, article = ([r["prompt"] for r in W.rows(split, n)] for split, n in
                             (("train", 400), ("ood_words100", 200), ("ood_article", 200)))
    enc = splits.tokenizer(splits.build_tokenizer(train))
    far, near, same = (splits.shift(train, x, enc)
                       for x in (article, words, [r["prompt"] for r in W.rows("train", 200, start=400)]))
    assert far["js"] > near["js"] > 2 * near["js_floor"] and far["auc"] > .99 and near["auc"] > .8
    assert same["js"] < 2 * same["js_floor"] and abs(same["auc"] - .5) < .1
    with pytest.raises(ValueError):
        splits.shift(train[:4], article, enc)


def test_batches_are_a_partition_of_similar_lengths():
    import torch
    lengths = [random.Random(i).randrange(100) for i in range(203)]
    out = splits.batches(lengths, 8, 2, torch.Generator().manual_seed(0))
    assert sorted(i for b in out for i in b) == sorted([*range(203)] * 2)
    # 78 at random
    assert statistics.mean(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in out) < 25
