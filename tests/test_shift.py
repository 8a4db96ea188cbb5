"""How far prompts lie apart: by hand, with intervals and floors."""
import math

import numpy as np
import pytest

from common.tokenizer import build_tokenizer, load_tokenizer
from study import shift as S
from tasks import synthetic


def prompts(split, n, start=0):
    return [row["prompt"] for row in synthetic.rows(split, n, start=start, references=1)]


def test_js_divergence_by_hand():
    """(1, 0) and (1/2, 1/2): their mean is (3/4, 1/4), and their divergences from it are log2(4/3) and
    1/2 log2(2/3) + 1/2."""
    expected = (math.log2(4 / 3) + .5 * math.log2(2 / 3) + .5) / 2
    assert S.js_divergence(np.array([[1, 0], [2, 0]]), np.array([[1, 1], [1, 1]])) == pytest.approx(expected)
    assert S.js_divergence(np.array([[1, 2]]), np.array([[2, 4]])) == 0
    assert S.js_divergence(np.array([[1, 0]]), np.array([[0, 9]])) == 1


def test_the_classifier_is_tested_on_other_texts_than_it_learns_from():
    rng = np.random.default_rng(0)
    a, b = rng.poisson(1., (2, 60, 40))         # one distribution: nothing to tell apart
    assert abs(S.auc(*S.classifier_scores(a, b)) - .5) < .15
    assert S.auc(*S.classifier_scores(a, b + 3 * np.eye(1, 40, dtype=int))) > .8    # one word far more often
    scores = S.classifier_scores(a, b)
    assert len(scores[0]) == len(scores[1]) == 30


def test_half_sample_interval_is_the_bootstraps_for_a_mean():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(400), rng.standard_normal(400) + 1
    value, low, high = S.half_interval(lambda x, y: y.mean() - x.mean(), a, b, 2000, rng)
    usual = [rng.choice(b, 400).mean() - rng.choice(a, 400).mean() for _ in range(2000)]
    assert low < value < high and value == pytest.approx(1, abs=.2)
    assert (high - low) / np.ptp(np.percentile(usual, (2.5, 97.5))) == pytest.approx(1, abs=.1)


def test_shift_has_an_interval_and_a_floor_and_orders_splits(monkeypatch):
    monkeypatch.setattr(S, "DRAWS", 20)
    monkeypatch.setattr(S, "FLOORS", 5)
    train = prompts("train", 200)
    tokenizer = load_tokenizer(build_tokenizer(train))
    far, near, same = (S.shift(train, texts, tokenizer) for texts in (
        prompts("ood_article", 100), prompts("ood_words100", 100), prompts("train", 100, start=200)))
    for found in (far, near, same):
        for measure in found.values():
            assert measure["low"] <= measure["value"] <= measure["high"]
    assert far["js"]["value"] > near["js"]["value"] > 2 * near["js"]["floor"]
    assert far["auc"]["value"] > .99 and near["auc"]["value"] > .7
    assert same["js"]["value"] < 2 * same["js"]["floor"] and abs(same["auc"]["value"] - .5) < .15
    with pytest.raises(ValueError, match="at least 8 texts a side"):
        S.shift(train[:4], train, tokenizer)
