"""Diversity and generalisation: equal to NLTK, rouge-score and the Vendi score, to slow definitions, and to
examples worked by hand."""
import math
import sys
from collections import Counter

import numpy as np
import pytest

import bon
import diversity as D
import generalisation as G
import reward
from runtime import Fault, bootstrap


def test_distinct_and_ead_by_hand():
    """`a b a` and `a b`: 5 words, 2 kinds; bigrams ab, ba, ab: 3, 2 kinds.  EAD with V = 10, C = 5: 2 / (10
    (1 - .9^5)) = .4884"""
    outputs = ["a b a", "a b"]
    assert D.distinct_n(outputs, 1) == 2 / 5 and D.distinct_n(outputs, 2) == 2 / 3
    assert D.ead(outputs, 1, 10) == pytest.approx(2 / (10 * (1 - .9 ** 5)))
    assert math.isnan(D.distinct_n(outputs, 4)) and math.isnan(D.ead(outputs, 4, 10 ** 4))
    assert D.averaged(lambda n: D.distinct_n(outputs, n), 5) == pytest.approx((2 / 5 + 2 / 3 + 1) / 3)
    assert D.averaged(lambda n: D.distinct_n(outputs, n), 5,
                      missing=0.) == pytest.approx((2 / 5 + 2 / 3 + 1) / 5)
    assert D.ngram_entropy(["a b", "a c"], 1) == pytest.approx(1.5)     # 1/2, 1/4, 1/4


@pytest.mark.parametrize("convention", ["sound", "paper"])
def test_a_file_counted_at_once_equals_its_sets_one_by_one(convention):
    """Repeats, outputs without a word, outputs shorter than n, a group without any."""
    rng, one_by_one = np.random.default_rng(0), D.measures(convention, vocabulary=7)
    tokenise, missing, kinds = D.conventions(convention, 7)
    groups = [[" ".join(rng.choice(list("abc. "), rng.integers(0, 12))) for _ in range(4)] for _ in range(30)]
    groups[3] = ["", " ", "", ""]
    tokens = [[tokenise(t) for t in g] for g in groups]
    found = D.distinct_and_ead(tokens, 5, kinds, missing)
    for name in ("distinct_n", "ead"):
        assert found[name] == pytest.approx([one_by_one[name](g) for g in groups], nan_ok=True, abs=1e-12)
    unique, total = D.count_ngrams(tokens, 3)
    pooled = [t for g in tokens for t in g]
    assert unique[1, -1] / total[1, -1] == D.distinct_n(pooled, 2) and total[:, 3].tolist() == [0, 0, 0]


def test_ead_tends_to_distinct_n_for_large_vocabularies():
    """U / C in the limit; the naive 1 - ((V - 1) / V)^C would be 0 / 0 here."""
    outputs = ["one two three two", "two three four"]
    assert D.ead(outputs, 2, 10 ** 40) == pytest.approx(D.distinct_n(outputs, 2))


def test_paper_convention_glues_and_counts_as_the_authors_do():
    assert D.paper_words("a b.\nc d") == ["a", "bc", "d"] and D.paper_words("v 3.5 is") == ["v", "35", "is"]
    paper = D.measures("paper")
    assert paper["distinct_n"](["a b.\nc d", "a b. c d"]) == pytest.approx(0.7428571428571429)
    assert paper["ead"](["a b.\nc d", "a b. c d"]) == pytest.approx(0.7428776095250699, abs=1e-9)
    assert paper["distinct_n"](["a", "b c"]) == pytest.approx(.4)


def test_self_bleu_equals_nltk(refs):
    r = refs["self_bleu"]
    for n in range(1, 5):
        got = D.self_bleu(r["sentences"], max_n=n, tokenise=str.split, each=True)
        np.testing.assert_allclose(got, r[f"sentence_method1_bleu{n}"], atol=1e-9)
        assert D.self_bleu(r["sentences"], max_n=n,
                           tokenise=str.split) == pytest.approx(r[f"sentence_method1_bleu{n}_mean"], abs=1e-9)
    assert D.self_bleu(["a b c d e f"] * 2) == pytest.approx(1)
    with pytest.raises(ValueError):
        D.self_bleu(["alone"])


def slow_self_bleu(outputs, max_n=4):
    """The definition: clip against the maximum over every other output, for every output."""
    total = 0.
    for i, hypothesis in enumerate(outputs):
        others, log_p, first = outputs[:i] + outputs[i + 1:], 0., 0
        for n in range(1, max_n + 1):
            count = Counter(D.ngrams(hypothesis, n))
            best = Counter()
            for other in others:
                best |= Counter(D.ngrams(other, n))
            match = (count & best).total()
            first = match if n == 1 else first
            log_p += math.log((match or .1) / max(1, count.total())) / max_n
        closest = min((len(o) for o in others), key=lambda r: (abs(r - len(hypothesis)), r))
        total += 0 if not first else math.exp(log_p + min(0., 1 - closest / len(hypothesis)))
    return total / len(outputs)


def test_linear_self_bleu_is_the_definition():
    rng = np.random.default_rng(0)
    for _ in range(20):
        outputs = [[str(w) for w in rng.integers(0, 12, rng.integers(1, 15))] for _ in range(12)]
        assert D.self_bleu(outputs) == pytest.approx(slow_self_bleu(outputs), abs=1e-12)


def test_embedding_diversity_is_the_mean_over_pairs(refs):
    x = np.array(refs["vendi"]["X"])
    assert D.embedding_diversity(x) == pytest.approx(refs["vendi"]["mean_pairwise_cosine_distance"], abs=1e-9)
    x = np.random.default_rng(0).normal(size=(9, 4))
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [1 - u[i] @ u[j] for i in range(9) for j in range(i)]
    assert D.embedding_diversity(x) == pytest.approx(np.mean(pairs))
    assert D.embedding_diversity([[1, 0], [1, 0]]) == pytest.approx(0)


def test_vendi_equals_reference(refs):
    v = refs["vendi"]
    x = np.array(v["X"])
    assert D.vendi_score(x) == pytest.approx(v["score_X_q1"], abs=1e-6)
    u = D.unit(x)
    for q, expected in v["score_K"].items():
        assert D.vendi_of_kernel(u @ u.T, float(q)) == pytest.approx(expected, abs=1e-6)
        # through the smaller, dual matrix
        assert D.vendi_score(x, float(q)) == pytest.approx(expected, abs=1e-6)
    assert D.vendi_score(np.eye(4)) == pytest.approx(4) and D.vendi_score(np.ones((4, 2))) == pytest.approx(1)


def test_per_input_and_across_by_hand():
    """Two inputs with two outputs: per input looks along a row, across inputs down a column."""
    groups = [["a a", "a a"], ["b b", "c c"]]
    distinct = lambda x: D.distinct_n(x, 1)  # noqa: E731
    assert D.per_input(groups, distinct).tolist() == [1 / 4, 2 / 4]
    assert D.across_input(groups, distinct).tolist() == [2 / 4, 2 / 4]


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
    rate, low, high = G.win_rate([[2, 1], [0, 0]], [[1], [5]])
    assert rate == .375 and low == 0 and high == .75
    assert G.generalisation_gap([1, 1, 1], [0, 0]) == (1, 1, 1)


def test_bootstrap_interval_covers():
    """A 95 % interval of the mean of 60 numbers holds the true mean in about 95 of 100 draws (percentile: a
    little less)."""
    rng = np.random.default_rng(0)
    covered = np.mean([low <= .3 <= high for _, low,
                       high in (bootstrap(rng.random(60) < .3, 500) for _ in range(400))])
    assert .90 <= covered <= .98
    with pytest.raises(ValueError):
        bootstrap([])


def test_best_of_n_keeps_the_best_and_follows_the_analytic_law():
    """Of a pool of m distinct rewards, the best of n draws without replacement has rank k with probability
    C(m - k, n - 1) / C(m, n)."""
    rewards, n, draws = np.arange(8.)[::-1], 3, 20_000
    picks = bon.best_of_n(rewards, n, draws, np.random.default_rng(0))
    expected = [math.comb(7 - i, n - 1) / math.comb(8, n) for i in range(8)]
    np.testing.assert_allclose(np.bincount(picks, minlength=8) / draws, expected, atol=.01)
    assert (bon.best_of_n([1., 3., 2.], 3, 5, np.random.default_rng(0)) == 1).all()
    assert bon.best_of_n_independent([1., 3., 2., 0.], 2, 2).tolist() == [1, 2]
    with pytest.raises(ValueError):
        bon.best_of_n([1.], 2, 1, np.random.default_rng(0))


def test_reward_accuracy_by_hand():
    """Group 1: one pair right, one wrong; group 2: a tie.  (1 + 0 + .5) / 3.  Responses 0 are longer: wins 2
    of 3."""
    groups = [reward.Group([1], [[1, 1], [1]], [(0, 1), (1, 0)], [2., -.5]),
              reward.Group([1], [[1, 1], [1]], [(0, 1)], [-2.])]
    got = reward.accuracy(groups, [[1., 0.], [0., 0.]])
    assert got["pairs"] == 3 and got["accuracy"] == pytest.approx(.5)
    assert got["longer_wins"] == pytest.approx(2 / 3)
    assert got["accuracy_gap1"] == pytest.approx(.75)           # the pairs with gaps 2 and -2: right, tied
    # the second label contradicts the truth: winning it is losing there
    assert got["accuracy_truth"] == pytest.approx((1 + 1 + .5) / 3)


def test_nli_diversity_by_hand():
    """Three outputs, six ordered pairs: a and b contradict each other with certainty .8 both ways, a entails
    c with .6, all else is neutral: (.8 + .8 - .6) / 6."""
    said = {("a", "b"): .8, ("b", "a"): .8, ("a", "c"): -.6}
    points = lambda pairs: np.array([said.get(p, 0.) for p in pairs])  # noqa: E731
    assert D.nli_diversity(["a", "b", "c"], points) == pytest.approx(1 / 6)
    with pytest.raises(ValueError, match="two outputs"):
        D.nli_diversity(["a"], points)


def test_nli_points_follow_the_labels_of_a_classifier(tmp_path):
    transformers = pytest.importorskip("transformers")
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "maybe"]))
    transformers.BertTokenizerFast(vocab_file=str(vocab)).save_pretrained(tmp_path)
    config = dict(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                  intermediate_size=16)
    for labels, wrong in ((["contradiction", "neutral", "entailment"], False), (["a", "b", "c"], True)):
        names = dict(enumerate(labels))
        model = transformers.BertForSequenceClassification(transformers.BertConfig(
            **config, id2label=names, label2id={v: k for k, v in names.items()})).eval()
        model.save_pretrained(tmp_path)
        if wrong:
            with pytest.raises(Fault, match="its labels are A, B, C"):
                D.nli_of(str(tmp_path), "cpu")
            continue
        pairs = [("yes", "no"), ("no", "maybe yes"), ("maybe", "yes")]
        ids = transformers.AutoTokenizer.from_pretrained(tmp_path)
        expected = []
        for pair in pairs:
            p = model(**ids(*pair, return_tensors="pt")).logits.softmax(-1)[0].detach()
            expected.append(float(p.max()) * (1, 0, -1)[int(p.argmax())])
        assert D.nli_of(str(tmp_path), "cpu", batch=2)(pairs) == pytest.approx(expected, abs=1e-5)


def test_measures_that_need_a_package_say_which(monkeypatch):
    for package, call in (("sentence_transformers", lambda: D.encoder_of("sbert:x", "cpu")),
                          ("transformers", lambda: D.nli_of("x", "cpu"))):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(Fault, match="pip install"):
            call()


def test_half_spread_estimates_the_spread_of_the_whole():
    """Texts of one random word each: the mean word length over 400 of them has standard deviation s / 20."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 20, 400)
    rows = [{"outputs": ["x" * n]} for n in lengths]
    got = D.half_spread(rows, None, lambda r,
                        v: {"across": {"m": [np.mean([len(x["outputs"][0]) for x in r])]}}, draws=400)
    assert got["m"] == pytest.approx(lengths.std() / 20, rel=.15)
