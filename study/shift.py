"""How far the prompts of each split lie from train: Jensen-Shannon divergence of their tokens, and how well a
classifier tells them apart, each with an interval and beside its floor.  `shift` takes texts of any task.

The floor is the same measure between random halves of train: what chance alone gives.

Deviation from the paper: the shift between splits is a number here.
"""
import json

import numpy as np
import torch
import torch.nn.functional as F

from common.files import write_json
from common.stats import ENDS, auc, over_seeds
from study.measures import load_with_task
from study.names import SETS
from tasks import synthetic

DRAWS, FLOORS = 200, 20     # of resampling: for the interval, for the floor


# -------------------------------------------------------------------------------------------------- distances
# Between two samples of prompts: 0, and AUC 0.5, for samples of one distribution, up to chance.

def js_divergence(a, b):
    """Jensen-Shannon divergence of the tokens of all texts together, in bits: 0 for equal distributions, 1
    for disjoint ones (Lin 1991).  a, b: token counts of each text, (n, V), (m, V)."""
    p, q = a.sum(axis=0) / a.sum(), b.sum(axis=0) / b.sum()
    m = (p + q) / 2
    return float(_kl_bits(p, m) + _kl_bits(q, m)) / 2


def _kl_bits(p, q):
    """Kullback-Leibler divergence of p (V,) from q (V,), in bits; q is positive where p is."""
    return np.sum(p[p > 0] * np.log2(p[p > 0] / q[p > 0]))


def classifier_scores(a, b, ridge=1e-2, steps=200):
    """Held-out scores of a linear classifier of two samples' texts: (n/2,), (m/2,).  Their `auc` says how
    well it tells the samples apart: 0.5 not at all, 1 always.

    a, b: token counts of each text, (n, V), (m, V).  Logistic regression on log counts, trained on the even
    rows, tested on the odd ones."""
    x = torch.tensor(np.log1p(np.concatenate((a[::2], b[::2]))), dtype=torch.float32)
    y = torch.cat((torch.zeros(len(a[::2])), torch.ones(len(b[::2]))))
    w, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS((w, bias), max_iter=steps, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        out = F.binary_cross_entropy_with_logits(x @ w + bias, y) + ridge * w.square().sum()
        out.backward()
        return out
    optimizer.step(loss)
    w = w.detach().numpy()
    return np.log1p(a[1::2]) @ w, np.log1p(b[1::2]) @ w


# --------------------------------------------------------------------------------------- intervals and floors

def half_interval(statistic, a, b, draws, rng):
    """(value, low, high) of statistic(a, b) over the choice of texts.  rng: numpy Generator.

    Each draw takes half of each sample, without replacement.  For a mean this has the variance of the usual
    bootstrap (McCarthy 1969).  A text never meets itself; drawn with replacement it would, and every distance
    between samples would take that for structure.  The draws are centred on the value, because smaller
    samples look farther apart."""
    value, n, m = statistic(a, b), len(a), len(b)
    found = np.array([statistic(a[rng.permutation(n)[:n // 2]], b[rng.permutation(m)[:m // 2]])
                      for _ in range(draws)])
    low, high = np.percentile(found - found.mean(), ENDS) + value
    return value, float(low), float(high)


def _measure(statistic, prepare, x, n, rng):
    """One measure of `shift`: {"value", "low", "high", "floor"}.  x: (3 n, V), token counts of 2 n texts and
    n others. prepare: turns two samples of rows into what statistic compares."""
    value, low, high = half_interval(statistic, *prepare(x[:n], x[2 * n:]), DRAWS, rng)
    halves = [rng.permutation(2 * n) for _ in range(FLOORS)]
    floor = np.mean([statistic(*prepare(x[half[:n]], x[half[n:]])) for half in halves])
    return {"value": value, "low": max(0., low), "high": min(1., high), "floor": float(floor)}


def shift(texts, others, tokenizer):
    """How far `others` lie from `texts`: {"js", "auc": {"value", "low", "high", "floor"}}, the floor between
    random halves of `texts`.

    All samples have one size, half of `texts` or all `others`, because divergence grows as samples shrink.
    The interval of auc is over the held-out texts, for one classifier.  Raises ValueError on fewer than 8
    texts a side."""
    n, rng = min(len(texts) // 2, len(others)), np.random.default_rng(0)
    if n < 4 or len(others) < 8:
        raise ValueError(f"shift: at least 8 texts a side are needed, got {len(texts)} and {len(others)}")
    counts = np.stack([np.bincount(tokenizer.encode_ordinary(text), minlength=tokenizer.n_vocab)
                       for text in texts[:2 * n] + others[:n]])                 # (3 n, V)
    counts = counts[:, counts.sum(0) > 0]
    return {"js": _measure(js_divergence, lambda a, b: (a, b), counts, n, rng),
            "auc": _measure(auc, classifier_scores, counts, n, rng)}


def measure(here, n):
    """shift.json: {test set: `shift` of its prompts from train}.  The SFT model's tokenizer, the base
    model's, has every word as one token.  n: prompts a side."""
    _, tokenizer, _ = load_with_task(here / "ckpt_sft.pt", "lm")
    prompts = [row["prompt"] for row in synthetic.rows("train", 2 * n, references=1)]
    write_json(here / "shift.json", {split: shift(prompts, [row["prompt"] for row in synthetic.rows(
        split, n, references=1)], tokenizer) for split in SETS})


def numbers(measures, folder):
    """What results.json holds of this question: [{split, js, auc, advantage: PPO's win rate minus SFT's}]."""
    far = json.loads((folder / f"seed{measures.seeds[0]}" / "synthetic" / "shift.json").read_text())
    return [{"split": split, **far[split],
             "advantage": over_seeds(measures.wins_minus("synthetic", "ppo", "sft", split))}
            for split in SETS]
