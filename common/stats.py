"""Every statistic of this code base: intervals of means, rates and differences, rank correlations, ROC area.

All are 95 % intervals; tests/test_stats.py simulates how often they hold the true value.  Pass one number per
prompt, not one per output, because outputs of one prompt depend on each other and the interval would come out
too narrow.  Every bootstrap starts its random numbers at a fixed seed, so equal data give equal intervals.
"""
import math
from typing import NamedTuple

import numpy as np

ENDS = (2.5, 97.5)      # percentiles of a 95 % interval
FEW_PROMPTS = 10        # with fewer, an interval says little


class Interval(NamedTuple):
    """A value and the ends of its 95 % interval, or None.  f"{interval:.3f}" is "0.420 [0.361, 0.478]"."""
    mean: float
    low: float | None
    high: float | None

    def __format__(self, digits=".2f"):
        mean, *ends = (format(x, digits) for x in self if x is not None)
        return f"{mean} [{', '.join(ends)}]" if ends else mean

    __str__ = __format__


# ----------------------------------------------------------------------------------------- means over prompts

def t_quantile(freedom):
    """The 97.5 % quantile of Student's t with `freedom` >= 1 degrees of freedom, to four digits.  With t =
    sqrt(freedom) tan(a), the angle a has a density proportional to cos(a)^(freedom - 1)."""
    angle = np.linspace(0, min(np.pi / 2, 40 / math.sqrt(freedom)), 10_001)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate(([0], np.cumsum((density[1:] + density[:-1]) / 2)))
    return float(math.sqrt(freedom) * math.tan(np.interp(0.95, mass / mass[-1], angle)))


def mean_interval(values):
    """Interval of the mean of values (n,): Student's t.  Without ends if n is 1."""
    x = np.asarray(values, dtype=float)
    mean = float(x.mean())
    if len(x) == 1:
        return Interval(mean, None, None)
    half = t_quantile(len(x) - 1) * float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(mean, mean - half, mean + half)


def rate_interval(values):
    """Interval of the mean of values (n,) in [0, 1], such as the win rates of n prompts.  It stays in [0, 1]
    and has a width at the ends too.  Without ends if n is 1.

    Wilson's score interval (1927) with the effective number of prompts (Dean and Pagano 2015) and Student's
    t.  A prompt's mean of several outputs varies less than one outcome of 0 or 1, so it counts for more.  How
    much less is estimated from the values and half a prompt with one outcome, because a few prompts may be
    alike by chance."""
    x = np.asarray(values, dtype=float)
    n, p = len(x), float(x.mean())
    if n == 1:
        return Interval(p, None, None)
    varies = (((x - p) ** 2).sum() + p * (1 - p) / 2) / (n - 0.5)
    return _wilson(p, varies / n, n)


def _wilson(p, variance, n):
    """Wilson's score interval of a rate p with that variance, but at least n outcomes of 0 or 1."""
    binary = p * (1 - p)
    effective = max(n, binary / variance) if variance > 0 else n
    w = t_quantile(n - 1) ** 2 / effective
    half = math.sqrt(w * (binary + w / 4))
    return Interval(p, max(0., (p + w / 2 - half) / (1 + w)), min(1., (p + w / 2 + half) / (1 + w)))


def difference(a, b):
    """Interval of a - b of two independent Intervals, such as rates on two sets of prompts (Newcombe 1998,
    method 10).  Without ends if one of them has none."""
    d = a.mean - b.mean
    if a.low is None or b.low is None:
        return Interval(d, None, None)
    return Interval(d, d - math.hypot(a.mean - a.low, b.high - b.mean),
                    d + math.hypot(a.high - a.mean, b.mean - b.low))


# ------------------------------------------------------------------------------------------ seeds and prompts

def over_seeds(x, rate=False):
    """x (seeds, prompts), the same prompts for every seed, as a dict of what a table needs.  rate: x lies
    between 0 and 1, and so do the ends of its interval.

    `mean`; `low`, `high`: its interval over the choice of seeds and of prompts, as `seeds_and_prompts`, None
    with one seed; `per_seed`: the seeds' means, of which `mean` is the mean.  A value that is missing (nan)
    is left out of its seed's mean, and its prompt out of what prompts add to the interval; so is a seed
    without any value.  Without any value at all: None."""
    x = x[~np.isnan(x).all(axis=1)]
    x = x[:, ~np.isnan(x).all(axis=0)]
    if x.size == 0:
        return None
    per_seed, half = np.nanmean(x, axis=1), None
    if len(per_seed) > 1:
        complete = x[:, ~np.isnan(x).any(axis=0)]
        half = seeds_and_prompts(per_seed, _variance_by_prompts(complete), complete.shape[1])
    estimate = _estimate(float(per_seed.mean()), half, rate)
    return estimate | {"per_seed": [round(float(v), 4) for v in per_seed]}


def _estimate(mean, half, rate=False):
    low, high = (None, None) if half is None else (float(mean - half), float(mean + half))
    if rate and half is not None:
        low, high = max(0., low), min(1., high)
    return {"mean": mean, "low": low, "high": high}


def _variance_by_prompts(x):
    """What the choice of prompts adds to the variance of the mean of x (seeds, prompts): the excess of the
    prompts' mean square over that of the rest, in a two-way table without replication (Searle, Casella and
    McCulloch 1992, section 4.3)."""
    seeds, prompts = x.shape
    if prompts < 2:
        return 0.
    of_prompt = x.mean(axis=0)
    rest = x - x.mean(axis=1, keepdims=True) - of_prompt + x.mean()
    noise = (rest ** 2).sum() / ((seeds - 1) * (prompts - 1))
    return max(0., of_prompt.var(ddof=1) - noise / seeds) / prompts


def seeds_and_prompts(per_seed, variance_by_prompts, n_prompts):
    """Half the width of the interval of a mean over seeds (S,), S >= 2, to which the choice of n_prompts
    prompts adds variance.  Student's t on the seeds' means; or, where that is wider, t on both variances
    together, with Satterthwaite's (1946) degrees of freedom.  The first alone ignores the prompts, and the
    second alone is too narrow where two seeds are alike by chance."""
    by_seeds, freedom = per_seed.var(ddof=1) / len(per_seed), len(per_seed) - 1
    half, both = t_quantile(freedom) * math.sqrt(by_seeds), by_seeds + variance_by_prompts
    if not variance_by_prompts:
        return half
    shared = both ** 2 / (by_seeds ** 2 / freedom + variance_by_prompts ** 2 / (n_prompts - 1))
    return max(half, t_quantile(shared) * math.sqrt(both))


def of_seeds(statistic, n_seeds, n_drawn, draws=500):
    """Interval of a statistic over the choice of seeds and of what else was drawn, such as prompts or test
    sets: {"mean", "low", "high"}, the ends None with one seed.

    statistic(seeds, rng): its value from these seeds (an array of numbers), with rng of one bootstrap draw of
    the rest, with None of all of it.  n_drawn: how many prompts or sets there are.  What seeds add is known
    from the jackknife's pseudo-values (Tukey 1958), which of a mean are the seeds' own values; what the rest
    adds, from the bootstrap.  Both enter `seeds_and_prompts`."""
    seeds, rng, half = np.arange(n_seeds), np.random.default_rng(0), None
    value = float(statistic(seeds, None))
    if n_seeds > 1:
        without = np.array([statistic(np.delete(seeds, i), None) for i in seeds])
        of_draws = np.array([statistic(seeds, rng) for _ in range(draws)])
        pseudo_values = n_seeds * value - (n_seeds - 1) * without
        half = seeds_and_prompts(pseudo_values, float(np.nanvar(of_draws)), n_drawn)
    return _estimate(value, half)


# ------------------------------------------------------------------------------------------------- bootstraps

def bootstrap_statistic(statistic, n, draws=500):
    """Interval of any statistic of n rows: percentiles of its values on n rows drawn with replacement (Efron
    and Tibshirani 1993).  statistic: function of row numbers (n,), a float.  Draws on which it is undefined
    (nan) are left out; without ends if none remains, or if n is 1."""
    rows, value = np.random.default_rng(0).integers(0, n, (draws, n)), float(statistic(np.arange(n)))
    of_draws = np.array([statistic(r) for r in rows])
    if n == 1 or np.isnan(of_draws).all():
        return Interval(value, None, None)
    return Interval(value, *map(float, np.nanpercentile(of_draws, ENDS)))


# ---------------------------------------------------------------------------------------- ranks and ROC curve

def ranks(x):
    """Ranks 0, 1, ... of x (n,).  Equal values share the mean of their ranks."""
    x = np.asarray(x, dtype=float)
    _, where, count = np.unique(x, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count + 1) / 2)[where]


def spearman(x, y):
    """Spearman's rank correlation of x (n,) and y (n,); nan where one of them does not vary."""
    x, y = (r - r.mean() for r in (ranks(x), ranks(y)))
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else math.nan


def auc(a, b):
    """Area under the ROC curve: the chance that a score of b (m,) exceeds a score of a (n,), ties halved."""
    return float(_wins(a, b).mean())


def auc_interval(a, b):
    """`auc` with its interval, which has a width at 0 and 1 too: Wilson's score interval with the variance of
    DeLong et al. (1988), over the choice of a and of b.  Without ends if one of them is one score."""
    won = _wins(a, b)
    if min(won.shape) < 2:
        return Interval(float(won.mean()), None, None)
    of_b, of_a = won.mean(axis=1), won.mean(axis=0)
    variance = of_b.var(ddof=1) / len(of_b) + of_a.var(ddof=1) / len(of_a)
    return _wilson(float(won.mean()), variance, min(won.shape))


def _wins(a, b):
    """(m, n): 1 where a score of b exceeds one of a, 1/2 where they tie."""
    difference = np.asarray(b)[:, None] - np.asarray(a)
    return (difference > 0) + (difference == 0) / 2
