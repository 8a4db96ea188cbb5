"""Distances between prompts: by hand, unbiased, with intervals and floors, and as the script prints them."""
import math

import numpy as np
import pytest

from common.tokenizer import build_tokenizer, load_tokenizer
from conftest import call, refused
from study import shift as S
from tasks import synthetic


def prompts(split, n, start=0):
    return [row["prompt"] for row in synthetic.rows(split, n, start=start)]


def count_words(texts):
    """A stand-in for an encoder: (n, 4) counts."""
    return np.array([[text.count(word) for word in (" my ", "also", "then", "i am")] for text in texts])


# -------------------------------------------------------------------------------------------------- distances

def test_distances_by_hand():
    a = np.array([[0., 0.], [1., 0.], [2., 0.], [3., 0.]])
    # a translation by v moves each sorted projection by v . w: the mean over directions of |v . w|
    w = np.random.default_rng(0).standard_normal((2, 128))
    w /= np.linalg.norm(w, axis=0)
    assert S.sliced_wasserstein(a, a + [0., 2.]) == pytest.approx(np.abs(2 * w[1]).mean())
    assert S.sliced_wasserstein(a, a[::-1]) == 0
    assert S.cosine_distance(np.array([[1., 0.]]), np.array([[0., 3.]])) == pytest.approx(1)
    assert S.cosine_distance(a[1:], 5 * a[1:]) == pytest.approx(0)
    assert S.auc(np.array([0., 1.]), np.array([1., 2.])) == pytest.approx((1 + .5 + 1 + 1) / 4)


def test_js_divergence_by_hand():
    """(1, 0) and (1/2, 1/2): their mean is (3/4, 1/4), and their divergences from it are log2(4/3) and
    1/2 log2(2/3) + 1/2."""
    expected = (math.log2(4 / 3) + .5 * math.log2(2 / 3) + .5) / 2
    assert S.js_divergence(np.array([3, 0]), np.array([2, 2])) == pytest.approx(expected)
    assert S.js_divergence(np.array([1, 2]), np.array([2, 4])) == 0
    assert S.js_divergence(np.array([1, 0]), np.array([0, 9])) == 1
    texts = np.array([[1, 0], [2, 0]]), np.array([[1, 1], [1, 1]])
    assert S.token_divergence(*texts) == pytest.approx(expected)


def test_mmd_is_the_unbiased_sum_over_pairs():
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((7, 3)), rng.standard_normal((5, 3)) + 1
    every = [np.sum((x - y) ** 2) for i, x in enumerate([*a, *b]) for y in [*a, *b][i + 1:]]

    def kernel(x, y):
        return math.exp(-np.sum((x - y) ** 2) / np.median(every))

    def within(x):
        return np.mean([kernel(u, v) for i, u in enumerate(x) for j, v in enumerate(x) if i != j])
    across = np.mean([kernel(u, v) for u in a for v in b])
    assert S.mmd2(a, b) == pytest.approx(within(a) + within(b) - 2 * across)
    # unbiased: near 0 on average for one distribution, on either side of it
    found = [S.mmd2(*rng.standard_normal((2, 30, 3))) for _ in range(200)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 200 ** .5 and min(found) < 0


# --------------------------------------------------------------------------------------- intervals and floors

def mean_difference(a, b):
    return b.mean() - a.mean()


def test_half_sample_interval_is_the_bootstraps_for_a_mean():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(400), rng.standard_normal(400) + 1
    value, low, high = S.half_interval(mean_difference, a, b, 2000, rng)
    usual = [rng.choice(b, 400).mean() - rng.choice(a, 400).mean() for _ in range(2000)]
    assert low < value < high and value == pytest.approx(1, abs=.2)
    assert (high - low) / np.ptp(np.percentile(usual, (2.5, 97.5))) == pytest.approx(1, abs=.1)


def test_shift_reports_all_measures_with_intervals_and_floors():
    near, far, other = prompts("test", 80), prompts("ood_distractors7", 80), prompts("validation", 160)
    tokenizer = load_tokenizer(build_tokenizer(other))
    same, away = (S.shift(other, texts, tokenizer, count_words, draws=50, floors=5) for texts in (near, far))
    for m in S.SHIFTS:
        assert away[f"{m}_low"] <= away[m] <= away[f"{m}_high"]
        assert away[f"{m}_low"] > away[f"{m}_floor_high"] and away[m] > same[m]
        assert same[f"{m}_low"] < same[f"{m}_floor_high"]
    assert set(S.shift(other, near, tokenizer, draws=5, floors=2)) == {
        m + end for m in ("js", "auc") for end in ("", "_low", "_high", "_floor", "_floor_high")}


def test_shift_has_a_floor_and_orders_splits():
    train, words, article = prompts("train", 400), prompts("ood_words100", 200), prompts("ood_article", 200)
    tokenizer = load_tokenizer(build_tokenizer(train))
    # few draws: floors are compared here, intervals are not
    far, near, same = (S.shift(train, texts, tokenizer, draws=5)
                       for texts in (article, words, prompts("train", 200, start=400)))
    assert far["js"] > near["js"] > 2 * near["js_floor"] and far["auc"] > .99 and near["auc"] > .8
    assert same["js"] < 2 * same["js_floor"] and abs(same["auc"] - .5) < .1
    with pytest.raises(ValueError, match="at least 8 texts a side"):
        S.shift(train[:4], article, tokenizer)


# ------------------------------------------------------------------------------------------------- the script

def test_script_prints_a_row_for_each_split_but_train(tmp_path):
    got = call("study.shift", "--rows", "20", "--task", "instruct", cwd=tmp_path)
    assert got.returncode == 0, got.stderr
    header, *lines = got.stdout.splitlines()[2:]
    assert header.split() == ["split", "JS", "bits", "AUC"]
    js_bits = {line.split()[0]: float(line.split()[1]) for line in lines}
    assert list(js_bits) == ["pretrain", "validation", "test", "ood_pairs", "ood_then2", "ood_then3"]
    assert js_bits["ood_pairs"] > js_bits["test"] > 0


def test_script_refuses_too_few_rows(tmp_path):
    refused(tmp_path, "study.shift", "--rows", "4", says="--rows 4: at least 16")
    refused(tmp_path, "study.shift", "--data", ".", says="no splits")
