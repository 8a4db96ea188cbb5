"""Intervals cover what they promise, rank statistics worked by hand."""
import json
import math

import numpy as np
import pytest

from common.stats import (Interval, auc, auc_interval, bootstrap_statistic, difference, mean_interval, of_seeds,
                          over_seeds, ranks, rate_interval, spearman, t_quantile)


def coverage(intervals, true):
    return np.mean([low <= true <= high for _, low, high in intervals])


# ----------------------------------------------------------------------------------------- means over prompts

def test_student_s_t_is_that_of_the_tables():
    for freedom, value in ((1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622), (29, 2.0452), (99, 1.9842),
                           (10_000, 1.9602), (10 ** 8, 1.95996)):
        assert t_quantile(freedom) == pytest.approx(value, abs=2e-4)
    assert 4.3027 < t_quantile(1.5) < 12.7062


def test_an_interval_reads_as_text_and_json():
    e = Interval(.25, .2, .3)
    assert str(e) == "0.25 [0.20, 0.30]" and f"{e:+.3f}" == "+0.250 [+0.200, +0.300]"
    assert json.loads(json.dumps({"x": e})) == {"x": [.25, .2, .3]}
    assert str(Interval(0., 0., 1.)) == "0.00 [0.00, 1.00]"
    assert f"{Interval(.25, None, None):.3f}" == "0.250"       # one number has no interval


def test_a_mean_by_hand():
    """1, 2, 3: mean 2, standard error 1 / sqrt(3), t of 2 degrees of freedom 4.303."""
    mean, low, high = mean_interval([1, 2, 3])
    assert mean == 2 and (high - 2, 2 - low) == pytest.approx([4.30265 / 3 ** .5] * 2, abs=1e-4)
    assert mean_interval([.4]) == (.4, None, None)


def test_a_rate_by_hand():
    """All of 30 prompts won: by Wilson's formula the low end is n / (n + t^2), not 1."""
    t2 = t_quantile(29) ** 2
    assert rate_interval([1.] * 30) == (1, pytest.approx(30 / (30 + t2)), pytest.approx(1))
    assert rate_interval([0.] * 30) == (0, pytest.approx(0), pytest.approx(t2 / (30 + t2)))
    # 0 or 1 a prompt: Wilson's own interval of 12 in 20
    p, w = .6, t_quantile(19) ** 2 / 20
    half = math.sqrt(w * (p * (1 - p) + w / 4)) / (1 + w)
    mean, low, high = rate_interval([1.] * 12 + [0.] * 8)
    assert (mean, low, high) == pytest.approx((p, (p + w / 2) / (1 + w) - half, (p + w / 2) / (1 + w) + half))
    assert rate_interval([.7]) == (.7, None, None)


@pytest.mark.parametrize("prompts", [30, 100])
@pytest.mark.parametrize("spread", [2, 10, 50])
def test_rates_near_the_end_are_covered(prompts, spread):
    """Win rates of 16 outputs around .9; percentiles of a bootstrap hold the true one in .90 of the cases at
    30 prompts and spread 2, and an end at 1 has no width there."""
    rng = np.random.default_rng(prompts + spread)
    rates = rng.beta(.9 * spread, .1 * spread, (600, prompts))
    found = [rate_interval(x) for x in rng.binomial(16, rates) / 16]
    assert .92 <= coverage(found, .9) <= .985
    assert all(0 <= low <= high <= 1 for _, low, high in found)


def test_differences_of_rates():
    """Newcombe's own example: 56 of 70 less 48 of 80 is .2 [.0524, .3339] (his method 10, at 1.96)."""
    a, b = Interval(.8, .6919, .8772), Interval(.6, .4904, .7003)       # Wilson's intervals of the two
    assert difference(a, b) == pytest.approx((.2, .0524, .3339), abs=2e-3)
    assert difference(a, Interval(.5, None, None)) == (pytest.approx(.3), None, None)


# ----------------------------------------------------------------------------------------- seeds and prompts

@pytest.mark.parametrize("sd", [.05, .15])
@pytest.mark.parametrize("seeds", [2, 5])
@pytest.mark.parametrize("prompts", [30, 100])
def test_intervals_over_seeds_and_prompts_cover(sd, seeds, prompts):
    """Normal effects of seeds (sd), prompts (.3) and both together (.3), true mean 0: the interval holds it
    in .93 to .98 of the draws, and more often than that over prompts alone."""
    rng, found = np.random.default_rng(seeds * prompts), []
    for _ in range(400):
        x = (sd * rng.standard_normal((seeds, 1)) + .3 * rng.standard_normal((1, prompts))
             + .3 * rng.standard_normal((seeds, prompts)))
        e = over_seeds(x)
        found.append(((e["mean"], e["low"], e["high"]), mean_interval(x.mean(axis=0))))
    covered, over_prompts = (coverage(of_kind, 0) for of_kind in zip(*found))
    assert .925 <= covered <= .99 and over_prompts < covered


def test_over_seeds_by_hand():
    """Two seeds that differ by 1 everywhere: t of 1 degree of freedom times a standard error of 1/2."""
    x = np.array([[1.] * 20, [2.] * 20])
    e = over_seeds(x)
    assert (e["mean"], e["per_seed"]) == (1.5, [1., 2.]) and e["high"] - 1.5 == pytest.approx(12.7062 / 2, abs=1e-3)
    one = over_seeds(x[:1])
    assert one["mean"] == 1 and one["low"] is one["high"] is None
    across = over_seeds(np.array([[.1], [.2], [.3]]))       # one number a seed
    assert across["high"] - .2 == pytest.approx(4.30265 * .1 / 3 ** .5, abs=1e-4)
    rate = over_seeds(np.array([[.9] * 9, [1.] * 9]), rate=True)    # .95 +- 12.7 x .05
    assert (rate["low"], rate["high"]) == (pytest.approx(.95 - 12.7062 * .05, abs=1e-4), 1)
    x[0, 3] = np.nan                    # a prompt that one seed lacks: the mean stays that of the seeds' means
    assert over_seeds(x)["mean"] == pytest.approx(1.5)
    n = np.nan
    e = over_seeds(np.array([[.9, .8, n, n], [.9, .8, .1, n], [.9, .8, n, .2]]))
    assert e["per_seed"] == [.85, .6, .6333] and e["mean"] == pytest.approx((.85 + .6 + 1.9 / 3) / 3)


def test_prompts_widen_what_alike_seeds_leave_narrow():
    """Seeds that agree to the last digit, prompts that differ: the interval is that over prompts."""
    prompts = np.random.default_rng(0).standard_normal(50)
    e = over_seeds(np.stack([prompts] * 3))
    assert (e["low"], e["high"]) == pytest.approx(mean_interval(prompts)[1:], rel=1e-3)


def test_other_statistics_of_seeds_are_those_of_the_mean_where_it_is_one():
    x = np.random.default_rng(1).standard_normal((4, 1)) + .2 * np.random.default_rng(2).random((4, 200))

    def mean(seeds, rng):
        prompts = np.arange(200) if rng is None else rng.integers(0, 200, 200)
        return x[seeds][:, prompts].mean()
    e, usual = of_seeds(mean, 4, 200), over_seeds(x)
    assert (e["mean"], e["low"], e["high"]) == pytest.approx([usual[k] for k in ("mean", "low", "high")],
                                                             rel=1e-3)
    assert of_seeds(lambda seeds, rng: 3., 1, 10) == {"mean": 3, "low": None, "high": None}


# ------------------------------------------------------------------------------------------------- bootstraps

def test_the_bootstrap_of_a_mean_is_nearly_student_s():
    x = np.random.default_rng(1).random(400)
    found = bootstrap_statistic(lambda rows: x[rows].mean(), 400, 4000)
    assert found == pytest.approx(mean_interval(x), abs=4e-3)
    # draws on which it is undefined are left out
    assert bootstrap_statistic(lambda rows: 1. if len(set(rows)) > 1 else math.nan, 2) == (1, 1, 1)
    assert bootstrap_statistic(lambda rows: math.nan, 2)[1:] == (None, None)


def test_a_ratio_weights_prompts_by_their_pairs():
    """Prompt 1: 3 of 4 pairs; prompt 2: 0 of 1.  3 / 5; draws of one prompt only give 3 / 4 and 0."""
    sums = np.array([(3, 4), (0, 1)])
    assert bootstrap_statistic(lambda rows: np.divide(*sums[rows].sum(axis=0)), 2) == (.6, 0, .75)


# ---------------------------------------------------------------------------------------- ranks and ROC curve

def test_rank_correlation_by_hand():
    assert ranks([3, 1, 3, 2]).tolist() == [2.5, 0, 2.5, 1]
    # ranks 0 1 2 3 and 1 0 3 2: 1 - 6 (1 + 1 + 1 + 1) / (4 (16 - 1))
    assert spearman([1, 2, 3, 4], [20, 10, 40, 30]) == pytest.approx(1 - 24 / 60)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_auc_halves_ties():
    """Pairs (0, 1), (0, 2), (1, 1), (1, 2): won, won, tied, won."""
    assert auc(np.array([0., 1.]), np.array([1., 2.])) == (1 + 1 + .5 + 1) / 4


def test_an_area_has_an_interval_at_its_end_too_and_covers():
    apart = auc_interval(np.arange(50.), np.arange(50.) + 100)
    assert apart == (1, pytest.approx(50 / (50 + t_quantile(49) ** 2)), pytest.approx(1))
    rng, true = np.random.default_rng(0), .9213503964748574     # of two normals 2 apart: Phi(sqrt 2)
    found = [auc_interval(rng.standard_normal(40), rng.standard_normal(60) + 2) for _ in range(400)]
    assert .92 <= coverage(found, true) <= .985


def test_one_prompt_or_one_score_has_no_interval():
    assert bootstrap_statistic(len, 1) == (1., None, None)
    assert auc_interval([1.], [2., 3.]) == (1., None, None)
