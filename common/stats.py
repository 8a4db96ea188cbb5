"""Every statistic of this code base: bootstrap intervals, rank correlations, the area under a ROC curve.

All intervals are 95 % percentile intervals (Efron and Tibshirani 1993).  The unit that a bootstrap
resamples is the row: pass one number per prompt, not one per output, because outputs of one prompt depend
on each other and the interval would come out too narrow.  Every function starts its random numbers at a
fixed seed, so equal data give equal intervals, and differences of arrays of one shape stay paired.
"""
from typing import NamedTuple

import numpy as np

ENDS = (2.5, 97.5)      # percentiles of a 95 % interval


class Interval(NamedTuple):
    """A value and the ends of its 95 % interval: floats, or arrays (k,) of k values.  f"{interval:.3f}"
    writes "0.420 [0.361, 0.478]"; str() has two digits."""
    mean: float
    low: float
    high: float

    def __format__(self, digits):
        return "{} [{}, {}]".format(*(format(x, digits or ".2f") for x in self))

    def __str__(self):
        return format(self, ".2f")


# ------------------------------------------------------------------------------------------------- bootstraps

def resampled_rows(n, draws, rng):
    """Row numbers (draws, n): each line draws n of n rows with replacement."""
    return rng.integers(0, n, (draws, n))


def interval_of_draws(draws, value):
    """Interval of a statistic from its value and its values on bootstrap draws (draws,).  Draws on which the
    statistic is undefined (nan) are left out; the ends are nan if none remains."""
    draws = np.asarray(draws, dtype=float)
    defined = draws[~np.isnan(draws)]
    low, high = np.percentile(defined if len(defined) else [np.nan], ENDS)
    return Interval(float(value), float(low), float(high))


def bootstrap(values, draws=2000, seed=0):
    """Interval of the mean of values (n,) over its n rows: floats; of values (n, k) column by column: arrays
    (k,).  Raises ValueError on no values."""
    x = np.asarray(values, dtype=float)
    if len(x) == 0:
        raise ValueError("bootstrap: no values")
    rows = resampled_rows(len(x), draws, np.random.default_rng(seed))
    low, high = np.percentile(x[rows].mean(axis=1), ENDS, axis=0)
    found = Interval(x.mean(axis=0), low, high)
    return found if x.ndim > 1 else Interval(*map(float, found))


def bootstrap_statistic(statistic, n, draws=500):
    """Interval of any statistic of n rows.  statistic: function of row numbers (m,), a float or nan.  Its
    value is that on all rows in order."""
    rows = resampled_rows(n, draws, np.random.default_rng(0))
    return interval_of_draws([statistic(r) for r in rows], statistic(np.arange(n)))


def bootstrap_gap(a, b, draws=2000):
    """Interval of mean(a) - mean(b) of two independent samples (n,) and (m,), each resampled by itself."""
    a, b = np.asarray(a), np.asarray(b)
    rng = np.random.default_rng(0)
    means_a, means_b = (x[resampled_rows(len(x), draws, rng)].mean(axis=1) for x in (a, b))
    return interval_of_draws(means_a - means_b, a.mean() - b.mean())


def bootstrap_ratio(sums, draws=1000):
    """Interval of sum(hits) / sum(pairs), where every prompt has several pairs.  sums: (n, 2), hits and pairs
    of each of n prompts; prompts are resampled."""
    sums = np.asarray(sums)
    totals = sums[resampled_rows(len(sums), draws, np.random.default_rng(0))].sum(axis=1)       # (draws, 2)
    hits, pairs = sums.sum(axis=0)
    return interval_of_draws(totals[:, 0] / totals[:, 1], hits / pairs)


def seeds_and_prompts_draws(x, draws=1000):
    """Means of x (seeds, prompts) over bootstrap draws of seeds and of prompts together: (draws,).

    Arrays of one shape get the same draws, so what is computed from several of them stays paired.  Missing
    values (nan) are left out of every mean."""
    rng, known = np.random.default_rng(0), ~np.isnan(x)
    # how often each draw takes each seed and each prompt: (draws, seeds), (draws, prompts)
    seeds, prompts = (rng.multinomial(n, [1 / n] * n, draws) for n in x.shape)
    total, count = (((seeds @ v) * prompts).sum(1) for v in (np.where(known, x, 0), known))
    return total / count


def over_seeds(x):
    """x (seeds, prompts) as a dict of what a table needs: `mean`; `low`, `high`: its interval over the choice
    of prompts; `seed_sd`: standard deviation of the seeds' means, None of one seed; `per_seed`: these means;
    `all_low`, `all_high`: the interval over the choice of both, seeds and prompts resampled together."""
    per_seed, per_prompt = np.nanmean(x, axis=1), np.nanmean(x, axis=0)
    over_prompts = bootstrap(per_prompt[~np.isnan(per_prompt)])
    over_both = interval_of_draws(seeds_and_prompts_draws(x), over_prompts.mean)
    return {**over_prompts._asdict(),
            "seed_sd": float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None,
            "per_seed": [round(float(v), 4) for v in per_seed],
            "all_low": over_both.low, "all_high": over_both.high}


# ---------------------------------------------------------------------------------------- ranks and ROC curve

def ranks(x):
    """Ranks 0, 1, ... of x (n,).  Equal values share the mean of their ranks."""
    x = np.asarray(x, dtype=float)
    _, where, count = np.unique(x, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count + 1) / 2)[where]


def correlation(x, y):
    """Pearson's correlation of x (n,) and y (n,); nan where one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


def spearman(x, y, given=None):
    """Spearman's rank correlation of x (n,) and y (n,); nan where one of them does not vary.  With given (n,)
    the partial one: the linear dependence on the ranks of `given` is taken out of both ranks first."""
    x, y = ranks(x), ranks(y)
    if given is None:
        return correlation(x, y)
    z = ranks(given) - (len(x) - 1) / 2
    return correlation(_residual(x, z), _residual(y, z)) if z.any() else correlation(x, y)


def _residual(v, z):
    """What is left of v (n,) after a least-squares fit on z (n,), whose mean is 0."""
    return v - v.mean() - z * (v @ z) / (z @ z)


def auc(a, b):
    """Area under the ROC curve: the chance that a score of b (m,) exceeds a score of a (n,), ties halved."""
    difference = b[:, None] - a
    return float((difference > 0).mean() + (difference == 0).mean() / 2)
