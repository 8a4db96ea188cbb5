"""Intervals cover what they promise, rank statistics worked by hand."""
import json
import math

import numpy as np
import pytest

from common.stats import (Interval, auc, bootstrap, bootstrap_gap, bootstrap_ratio, bootstrap_statistic,
                          interval_of_draws, over_seeds, ranks, seeds_and_prompts_draws, spearman)


def test_bootstrap_interval_covers():
    """A 95 % interval of the mean of 60 numbers holds the true mean in about 95 of 100 draws (percentile: a
    little less)."""
    rng = np.random.default_rng(0)
    found = [bootstrap(rng.random(60) < .3, 500) for _ in range(400)]
    assert .90 <= np.mean([e.low <= .3 <= e.high for e in found]) <= .98
    with pytest.raises(ValueError):
        bootstrap([])


def test_an_interval_reads_as_text_and_json():
    e = bootstrap([.25, .25])
    assert e == (.25, .25, .25) and str(e) == "0.25 [0.25, 0.25]" and f"{e:+.3f}" == "+0.250 [+0.250, +0.250]"
    assert json.loads(json.dumps({"x": e})) == {"x": [.25, .25, .25]}


def test_columns_are_bootstrapped_together():
    """Each column as by itself, and the difference of two equal ones has no width."""
    x = np.random.default_rng(0).random((50, 2))
    both = bootstrap(x)
    for i in (0, 1):
        assert [e[i] for e in both] == pytest.approx(bootstrap(x[:, i]), abs=1e-12)
    assert bootstrap(x[:, 0] - x[:, 0]) == (0, 0, 0)


def test_the_bootstrap_of_any_statistic_is_that_of_the_mean():
    x = np.random.default_rng(1).random(40)
    found = bootstrap_statistic(lambda rows: x[rows].mean(), 40, 2000)
    assert found == pytest.approx(bootstrap(x), abs=1e-12)


def test_undefined_draws_are_left_out():
    assert interval_of_draws([1., np.nan, 1.], 2) == (2, 1, 1)
    value, low, high = interval_of_draws([np.nan], .5)
    assert value == .5 and math.isnan(low) and math.isnan(high)


def test_gap_resamples_both_sides():
    """The variance of a difference of independent means is the sum of theirs."""
    assert bootstrap_gap([1, 1, 1], [0, 0]) == (1, 1, 1)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal(200), 3 * rng.standard_normal(300)
    value, low, high = bootstrap_gap(a, b, 20_000)
    deviation = math.sqrt(a.var() / 200 + b.var() / 300)
    assert value == pytest.approx(a.mean() - b.mean())
    assert (high - low) / (2 * 1.96 * deviation) == pytest.approx(1, abs=.05)


def test_ratio_weights_prompts_by_their_pairs():
    """Prompt 1: 3 of 4 pairs; prompt 2: 0 of 1.  3 / 5; draws of one prompt only give 3 / 4 and 0."""
    assert bootstrap_ratio([(3, 4), (0, 1)]) == (.6, 0, .75)
    # with equal numbers of pairs it is the bootstrap of the mean
    hits = np.random.default_rng(0).integers(0, 5, 30)
    assert bootstrap_ratio([(h, 4) for h in hits], 2000) == pytest.approx(bootstrap(hits / 4), abs=1e-12)


def test_two_way_bootstrap_sees_seeds_and_prompts():
    rng = np.random.default_rng(0)
    by_seed, by_prompt = (np.broadcast_to(v, (5, 200))
                          for v in (rng.standard_normal((5, 1)), rng.standard_normal(200)))
    draws = seeds_and_prompts_draws
    assert np.std(draws(by_seed)) == pytest.approx(by_seed[:, 0].std() / 5 ** .5, rel=.1)
    assert np.std(draws(by_prompt)) == pytest.approx(by_prompt[0].std() / 200 ** .5, rel=.1)
    assert draws(by_seed + by_prompt + 1) - draws(by_seed + by_prompt) == pytest.approx(np.ones(1000))
    holes = np.where(rng.random((5, 200)) < .1, np.nan, by_prompt)
    assert np.isfinite(draws(holes)).all()


def test_over_seeds_tells_both_spreads():
    """Two seeds that differ by 1 everywhere: no width over prompts, all the width over seeds."""
    x = np.array([[1.] * 20, [2.] * 20])
    e = over_seeds(x)
    assert (e["mean"], e["low"], e["high"], e["per_seed"]) == (1.5, 1.5, 1.5, [1., 2.])
    assert e["seed_sd"] == pytest.approx(.5 ** .5) and (e["all_low"], e["all_high"]) == (1, 2)
    assert over_seeds(x[:1])["seed_sd"] is None
    x[0, 3] = np.nan                    # a prompt that one seed lacks counts by the other
    assert over_seeds(x)["mean"] == pytest.approx((19 * 1.5 + 2) / 20)


def test_rank_correlation_by_hand():
    assert ranks([3, 1, 3, 2]).tolist() == [2.5, 0, 2.5, 1]
    # ranks 0 1 2 3 and 1 0 3 2: 1 - 6 (1 + 1 + 1 + 1) / (4 (16 - 1))
    assert spearman([1, 2, 3, 4], [20, 10, 40, 30]) == pytest.approx(1 - 24 / 60)
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def test_holding_a_variable_fixed_removes_what_it_explains():
    rng = np.random.default_rng(0)
    length, noise = rng.standard_normal((2, 500))
    x, y = length + .3 * noise, length + .3 * rng.standard_normal(500)
    assert spearman(x, y) > .8 and abs(spearman(x, y, length)) < .15
    # the formula of partial correlation
    a, b, c = spearman(x, y), spearman(x, length), spearman(y, length)
    assert spearman(x, y, length) == pytest.approx((a - b * c) / math.sqrt((1 - b * b) * (1 - c * c)))
    assert spearman(x, y, np.ones(500)) == spearman(x, y)


def test_auc_halves_ties():
    """Pairs (0, 1), (0, 2), (1, 1), (1, 2): won, won, tied, won."""
    assert auc(np.array([0., 1.]), np.array([1., 2.])) == (1 + 1 + .5 + 1) / 4
    assert isinstance(bootstrap([1., 2.]), Interval)
