"""How far the prompts of each split lie from train, by five measures, each with an interval and beside its
floor.

    python -m study.shift                            # the synthetic task
    python -m study.shift --data DIR --encoder sbert:all-MiniLM-L6-v2

The measures: Jensen-Shannon divergence of token distributions, AUC of a classifier that tells two samples
apart, and with an encoder three distances of embeddings (cosine of means, sliced Wasserstein, maximum mean
discrepancy). The floor is the same measure between random halves of train: what chance alone gives.

Deviation from the paper: the shift between splits is a number here.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from common.embed import encoder_wanted, load_encoder
from common.errors import check
from common.flags import Common, Count, launch, setup
from common.stats import ENDS, Interval, auc
from common.tables import text_table
from splits import read_splits, task_of, tokenizer_of

SHIFTS = {"js": "JS bits", "auc": "AUC", "cosine": "cosine", "wasserstein": "Wasserstein", "mmd2": "MMD2"}
BOUNDS = {"js": (0, 1), "auc": (0, 1), "cosine": (0, 2), "wasserstein": (0, 2), "mmd2": (-2, 2)}


# -------------------------------------------------------------------------------------------------- distances
# Between two samples of prompts.  All are 0 (AUC: 0.5) for samples of one distribution, up to chance.

def js_divergence(a, b):
    """Jensen-Shannon divergence of two count vectors (V,), in bits: 0 for equal distributions, 1 for disjoint
    ones (Lin 1991)."""
    p, q = a / a.sum(), b / b.sum()
    m = (p + q) / 2
    return float(_kl_bits(p, m) + _kl_bits(q, m)) / 2


def _kl_bits(p, q):
    """Kullback-Leibler divergence of p (V,) from q (V,), in bits; q is positive where p is."""
    return np.sum(p[p > 0] * np.log2(p[p > 0] / q[p > 0]))


def token_divergence(a, b):
    """`js_divergence` of the tokens of all texts together.  a, b: token counts of each text, (n, V), (m,
    V)."""
    return js_divergence(a.sum(0), b.sum(0))


def cosine_distance(a, b):
    """1 - cosine of the mean embeddings.  a, b: (n, D), (m, D)."""
    u, v = a.mean(0), b.mean(0)
    return float(1 - u @ v / (np.linalg.norm(u) * np.linalg.norm(v)))


def sliced_wasserstein(a, b, directions=128):
    """Sliced 1-Wasserstein distance of two samples of one size, (n, D) each, in the embeddings' units: the
    mean over random directions of the distance between sorted projections (Rabin et al. 2011)."""
    w = np.random.default_rng(0).standard_normal((a.shape[1], directions))
    w /= np.linalg.norm(w, axis=0)
    return float(np.abs(np.sort(a @ w, axis=0) - np.sort(b @ w, axis=0)).mean())


def mmd2(a, b):
    """Squared maximum mean discrepancy (Gretton et al. 2012, equation 3).  a, b: (n, D), (m, D).

    The kernel is Gaussian; its width is the median distance of the pooled sample.  The estimate is unbiased,
    so it can fall below 0."""
    x, n, m = np.concatenate((a, b)), len(a), len(b)
    square = (x * x).sum(1)
    d = np.maximum(square[:, None] + square - 2 * x @ x.T, 0)                   # (n + m, n + m)
    k = np.exp(-d / max(np.median(d[np.triu_indices(n + m, 1)]), 1e-12))
    return float(_mean_off_diagonal(k[:n, :n]) + _mean_off_diagonal(k[n:, n:]) - 2 * k[:n, n:].mean())


def _mean_off_diagonal(k):
    """Mean over the pairs of two different rows of a square matrix."""
    return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))


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
    """Interval of statistic(a, b) over the choice of texts.  rng: numpy Generator.

    Each draw takes half of each sample, without replacement.  For a mean this has the variance of the usual
    bootstrap (McCarthy 1969).  A text never meets itself; drawn with replacement it would, and every distance
    between samples would take that for structure.  The draws are centred on the value, because smaller
    samples look farther apart."""
    value, n, m = statistic(a, b), len(a), len(b)
    found = np.array([statistic(a[rng.permutation(n)[:n // 2]], b[rng.permutation(m)[:m // 2]])
                      for _ in range(draws)])
    low, high = np.percentile(found - found.mean(), ENDS) + value
    return Interval(value, float(low), float(high))


def _unchanged(a, b):
    return a, b


def _measure(name, statistic, prepare, x, n, draws, floors, rng):
    """One measure of `shift`, as a dict.  x: (3 n, F), a row for each of 2 n texts and n others.  prepare:
    turns two samples of rows into what statistic compares."""
    found = half_interval(statistic, *prepare(x[:n], x[2 * n:]), draws, rng)
    low, high = np.clip((found.low, found.high), *BOUNDS[name]).tolist()
    halves = [rng.permutation(2 * n) for _ in range(floors)]
    floor = [statistic(*prepare(x[half[:n]], x[half[n:]])) for half in halves]
    return {name: found.mean, f"{name}_low": low, f"{name}_high": high,
            f"{name}_floor": float(np.mean(floor)), f"{name}_floor_high": float(np.percentile(floor, 97.5))}


def shift(texts, others, tokenizer, embed=None, draws=200, floors=20):
    """How far `others` lie from `texts`: each measure with an interval and a floor, the same measure between
    random halves of `texts`.

    embed: function of texts giving (n, D) embeddings, which are put on the unit sphere here, or None.
    Returns a flat dict of <measure>, <measure>_low, _high, _floor (mean over halves) and _floor_high (their
    97.5 %) for js, auc and, with embed, cosine, wasserstein and mmd2.  All samples have one size, half of
    `texts` or all `others`, because most measures grow as samples shrink.  The interval of auc is over the
    held-out texts, for one classifier.  Raises ValueError on fewer than 8 texts a side."""
    n, rng = min(len(texts) // 2, len(others)), np.random.default_rng(0)
    if n < 4 or len(others) < 8:
        raise ValueError(f"shift: at least 8 texts a side are needed, got {len(texts)} and {len(others)}")
    texts = texts[:2 * n] + others[:n]
    counts = np.stack([np.bincount(tokenizer.encode_ordinary(text), minlength=tokenizer.n_vocab)
                       for text in texts])                                      # (3 n, V)
    counts = counts[:, counts.sum(0) > 0]
    measures = [("js", token_divergence, _unchanged, counts), ("auc", auc, classifier_scores, counts)]
    if embed:
        x = np.asarray(embed(texts), dtype=np.float64)                          # (3 n, D)
        x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        measures += [("cosine", cosine_distance, _unchanged, x),
                     ("wasserstein", sliced_wasserstein, _unchanged, x), ("mmd2", mmd2, _unchanged, x)]
    out = {}
    for measure in measures:
        out |= _measure(*measure, n, draws, floors, rng)
    return out


# ------------------------------------------------------------------------------------------------- the script

@dataclass
class Config(Common):
    rows: Count = 500           # rows of each split that are compared
    encoder: str = "ckpt_sft.pt"    # checkpoint or published model whose hidden states embed the prompts, or
                                # sbert:NAME; "" or a missing default: no measures on embeddings


def cell(found, measure):
    """A measure of `shift` as text: value [low, high] / floor."""
    interval = Interval(found[measure], found[f"{measure}_low"], found[f"{measure}_high"])
    return f"{interval:.3f} / {found[f'{measure}_floor']:.3f}"


def main(cfg):
    device, _ = setup(cfg)
    check(cfg.rows >= 16, f"--rows {cfg.rows}: at least 16, because the shift compares halves")
    task = task_of(cfg)
    rows_of = read_splits(task, cfg.rows)
    train = task.rows("train", 2 * cfg.rows)
    check(len(train) >= 8, f"train has {len(train)} rows; at least 8 are needed")
    # of all splits, so that a word is one token where only one of them has it
    tokenizer = tokenizer_of([*train, *(row for rows in rows_of.values() for row in rows)])
    prompts = [row["prompt"] for row in train]
    embed = load_encoder(cfg.encoder, device, cfg.dtype) if encoder_wanted(cfg.encoder) else None
    measures = list(SHIFTS) if embed else ["js", "auc"]
    table = []
    for split, rows in rows_of.items():
        if split != "train" and len(rows) >= 8:
            found = shift(prompts, [row["prompt"] for row in rows], tokenizer, embed)
            table.append([split, *(cell(found, measure) for measure in measures)])
    print("shift of the prompts from train: value [95 % over texts] / floor, between halves of train\n")
    print(text_table(["split", *(SHIFTS[measure] for measure in measures)], table))


if __name__ == "__main__":
    launch(main, Config, __doc__)
