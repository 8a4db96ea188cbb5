"""Do annotators like what is typical?  How much a language model's probability of a text, its length and its
gold reward decide which of two responses is preferred.

    python -m tools.typicality DATA/preferences.jsonl --model ckpt_sft.pt
    python -m tools.typicality preferences.jsonl --model HuggingFaceTB/SmolLM2-135M --prompts 500

Zhang et al. (2025, arXiv 2510.01171) model a preference as P(y preferred to z) = sigma(u(y) - u(z)), u(y) =
r(y) + alpha log pi(y | x), and find alpha of about .57 on human ratings.  Here log pi is the mean over a
response's tokens, its end included, as in tasks/annotators.py, so alpha is that script's `--typicality`.  A
logistic regression without intercept estimates it, because which of two stands first means nothing.  Prints a
table and writes typicality.json.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch

from common.errors import UserError
from common.files import output_path, read_jsonl, write_json
from common.flags import Common, Count, Natural, arg, launch, setup
from common.samples import text_table
from common.stats import Interval, mean_interval, t_quantile
from model import pack
from reward import read_groups
from splits import draw, load_bundle


@dataclass
class Config(Common):
    files: list = arg(None, 'preference files: lines of {"prompt", "chosen", "rejected"}')
    model: str = arg("ckpt_sft.pt", "language model: a checkpoint, a hub name or a Hugging Face directory")
    prompts: Natural = arg(0, "prompts whose pairs are used, a draw with seed 0; 0: all")
    max_new_tokens: Count = arg(128, "pairs with a longer response are left out")
    batch_size: Count = arg(8, "prompts at once")


# -------------------------------------------------------------------------------------------- the mathematics

def paired_logistic(x, prompts):
    """Coefficients of P(chosen) = sigma(x w), as Intervals clustered by prompt.  x: (n, D), of the chosen
    response minus of the rejected; prompts: (n,), what each pair belongs to.

    Newton's method for the maximum of sum log sigma(x w); the sandwich estimator with a prompt's summed
    gradient, so pairs of one prompt may depend on each other (Liang and Zeger 1986).  Raises UserError where
    no finite maximum exists: some direction is always, or never, preferred."""
    scale = np.sqrt(np.square(x).mean(axis=0))
    if not scale.all():
        raise UserError("a quantity is the same for both responses of every pair: nothing to learn from")
    z, w = x / scale, np.zeros(x.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-(z @ w)))
        inverse = np.linalg.inv(np.einsum("n,nd,ne->de", p * (1 - p), z, z))
        step = inverse @ ((1 - p) @ z)
        w += step / max(1, abs(step).max())
        if (z @ w >= 0).all():
            raise UserError(f"{len(x)} pairs are too few: what is chosen follows these quantities without "
                            "exception, so the coefficients have no limit")
        if abs(step).max() < 1e-9:
            break
    _, of_prompt = np.unique(prompts, return_inverse=True)
    gradient = np.zeros((of_prompt.max() + 1, len(w)))
    np.add.at(gradient, of_prompt, (1 - p)[:, None] * z)
    variance = np.diag(inverse @ gradient.T @ gradient @ inverse)
    half = t_quantile(max(1, len(gradient) - len(w))) * np.sqrt(variance)
    ends = np.stack((w, w - half, w + half), axis=1) / scale[:, None]
    return [Interval(*map(float, row)) for row in ends]


@torch.no_grad()
def differences(model, groups, batch_size):
    """Of all pairs: ({name: (n,) of the chosen minus of the rejected}, (n,) the number of their prompt).  The
    gold reward where every pair carries it."""
    found, prompt_of = [], []
    for i in range(0, len(groups), batch_size):
        part = groups[i:i + batch_size]
        packed = pack([g.prompt for g in part], [g.responses for g in part], model.device)
        mean = (model.log_probs(packed).sum(1) / packed.lengths).tolist()
        length, first = packed.lengths.tolist(), 0
        for j, g in enumerate(part, i):
            for n, (a, b) in enumerate(g.pairs):
                a, b = first + a, first + b
                found.append([mean[a] - mean[b], length[a] - length[b], *g.gaps[n:n + 1]])
                prompt_of.append(j)
            first += len(g.responses)
    with_gold = all(len(g.gaps) == len(g.pairs) for g in groups)
    found = found if with_gold else [values[:2] for values in found]
    names = ("log-probability a token", "tokens", "gold reward")
    return dict(zip(names, np.array(found, dtype=float).T)), np.array(prompt_of)


def regressions(x, prompts):
    """[{name: Interval}]: typicality alone, with length, and with the gold reward, where these differ."""
    typical, *others = [name for name in x if name == "log-probability a token" or x[name].any()]
    which = [[typical]] + [[typical, *others[:n + 1]] for n in range(len(others))]
    return [dict(zip(names, paired_logistic(np.stack([x[name] for name in names], axis=1), prompts)))
            for names in which]


def wins_of(values, prompts):
    """How often the chosen response has more, ties half: an Interval over prompts."""
    hits, n = (np.bincount(prompts, w) for w in (np.sign(values) / 2 + .5, np.ones(len(values))))
    return mean_interval(hits / n)


def main(cfg):
    device, _ = setup(cfg)
    if not cfg.files:
        raise UserError("name a preference file: lines of {'prompt': ..., 'chosen': ..., 'rejected': ...}")
    bundle, path = load_bundle(cfg, device), output_path(cfg.out, "typicality.json")
    needs = dict.fromkeys(("prompt", "chosen", "rejected"), str)
    rows = [row for file in cfg.files for row in read_jsonl(file, needs)]
    groups = draw(read_groups(bundle.tokenizer, rows, bundle.model.config.context - cfg.max_new_tokens,
                              cfg.max_new_tokens), cfg.prompts, "prompts")
    if not groups:
        raise UserError(f"{', '.join(cfg.files)}: no pairs of two different responses of at most "
                        f"{cfg.max_new_tokens} tokens")
    x, prompts = differences(bundle.model, groups, cfg.batch_size)
    results = {"model": cfg.model, "pairs": len(prompts), "prompts": len(groups),
               "regressions": regressions(x, prompts),
               "the more typical wins": wins_of(x["log-probability a token"], prompts),
               "the longer wins": wins_of(x["tokens"], prompts)}
    write_json(path, results)
    print(f"{len(prompts)} pairs on {len(groups)} prompts; the more typical wins "
          f"{results['the more typical wins']:.3f}, the longer {results['the longer wins']:.3f}\n")
    print(text_table(["alpha, of a nat a token", *list(x)[1:]], [
        [f"{found[name]:.3f}" if name in found else "-" for name in x] for found in results["regressions"]]))
    print(f"\nwrote {path}")


if __name__ == "__main__":
    launch(main, Config, __doc__)
