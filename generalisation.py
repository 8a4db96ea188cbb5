"""How good samples are: win rates against the reference, head to head, and the loss out of distribution.

    python generalisation.py samples_*.jsonl                                # judge: the gold reward
    python generalisation.py samples_*.jsonl --judge rouge                  # ROUGE-1/2/L with the references
    python generalisation.py samples_*.jsonl --judge ckpt_reward_other.pt   # a reward model of another seed
    python generalisation.py samples_*.jsonl --judge sbert:NAME             # similarity to the references

Prints tables and writes generalisation.json.

Deviations from the paper: the judge is not GPT-4 but the synthetic task's gold reward, or a reward model of
another seed; `python -m tools.chat_judge` asks a language model.  Every rate has a 95 % interval over
prompts, because outputs of one prompt are not independent.
"""
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np

from common.embed import load_encoder, similarity
from common.errors import UserError
from common.files import output_path, write_json
from common.flags import Machine, arg, launch, setup
from common.samples import (KEY, by_prompt, known_task, list_of_hashes, matched, print_table, prompts_of,
                            read_all, run_name)
from common.stats import FEW_PROMPTS, Interval, difference, mean_interval, rate_interval, t_quantile
from published import pretrained
from reward import score
from splits import reading_of, synthetic_task, text_ids

ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


@dataclass
class Config(Machine):
    files: list = arg(None, "sample files")
    judge: str = arg("", "gold, rouge, a reward model, also a published one, or sbert:NAME, a sentence "
                         "encoder; '' is gold for prompts of the synthetic tasks, else rouge")


# -------------------------------------------------------------------------------------------- the mathematics

def wins(scores, opponents):
    """Fraction of pairs won, ties halved: (n,), one rate per prompt.  scores: (n, K) of n prompts' outputs;
    opponents: (n, J).  Every output of a prompt meets every opponent of that prompt: with the reference alone
    the paper's preference versus reference."""
    scores, opponents = np.asarray(scores, dtype=float), np.asarray(opponents, dtype=float)
    margin = scores[:, :, None] - opponents[:, None, :]                             # (n, K, J)
    return ((margin > 0) + 0.5 * (margin == 0)).mean(axis=(1, 2))


def length_controlled(won, longer, prompts=None, prior_sd=3.0):
    """The win rate if outputs were as long as what they meet, as an Interval over prompts.  won: (n, K) in
    [0, 1], K outputs to each of n prompts; longer: (n, K), by how much each is longer; prompts: (n,), what
    they are, if some may be the same.

    log odds of a win = theta + phi tanh(longer / sd of longer); the rate is that of theta (Dubois et al.
    2024, AlpacaEval 2, without the difficulty of its own instructions).  The most probable theta and phi
    under normal priors around 0, finite for judges who always follow length too.  The interval allows for
    what the outputs of one prompt have in common, and is at least as wide as if they had nothing.  None where
    all outputs are longer, or all shorter: nothing shows what equal length would bring."""
    won, longer = np.asarray(won, dtype=float), np.asarray(longer, dtype=float)
    if not longer.min() <= 0 <= longer.max():
        return None
    _, row_of = np.unique(np.arange(len(won)) if prompts is None else prompts, return_inverse=True)
    n, sd = row_of.max() + 1, longer.std()
    weight = (1 / np.bincount(row_of))[row_of]      # a prompt counts once
    x = np.stack((np.ones(won.shape), np.tanh(longer / sd) if sd > 0 else np.zeros(won.shape)), axis=-1)
    weights = np.zeros(2)       # theta, phi
    for _ in range(50):         # Newton's method; concave, so it converges
        p = 1 / (1 + np.exp(-(x @ weights)))                                        # (n, K)
        gradient = np.zeros((n, 2))                                                 # of each prompt
        np.add.at(gradient, row_of, np.einsum("n,nk,nkd->nd", weight, won - p, x))
        hessian = np.einsum("n,nk,nkd,nke->de", weight, p * (1 - p), x, x) + np.eye(2) / prior_sd ** 2
        step = np.linalg.solve(hessian, gradient.sum(axis=0) - weights / prior_sd ** 2)
        weights += step / max(1, abs(step).max() / 2)
        if abs(step).max() < 1e-9:
            break
    inverse = np.linalg.inv(hessian)
    variance = max((inverse @ (gradient.T @ gradient) @ inverse)[0, 0], inverse[0, 0])
    half = t_quantile(max(n - 1, 1)) * math.sqrt(variance)
    mean, low, high = (float(1 / (1 + np.exp(-t))) for t in weights[0] + np.array([0, -half, half]))
    return Interval(mean, low, high) if n > 1 else Interval(mean, None, None)


def pass_at_k(good, k):
    """Chance that at least one of k <= K outputs is good, for each prompt: (n,).  good: (n, K) bool.
    1 - C(K - c, k) / C(K, k) with c good ones of K, which is unbiased (Chen et al. 2021, equation 1)."""
    K = len(good[0])
    return np.array([1 - math.comb(K - c, k) / math.comb(K, k) for c in np.sum(good, axis=1).tolist()])


def rouge_tokens(text):
    """Lower-cased runs of a-z and digits: the tokens of the rouge-score package, without its stemmer."""
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge(text, reference):
    """ROUGE-1, -2 and -L as F-measures in [0, 1] (Lin 2004); zeros if either text is empty."""
    a, b = rouge_tokens(text), rouge_tokens(reference)
    out = {}
    for n in (1, 2):
        grams_a, grams_b = (Counter(zip(*(tokens[i:] for i in range(n)))) for tokens in (a, b))
        out[f"rouge{n}"] = 2 * (grams_a & grams_b).total() / max(1, grams_a.total() + grams_b.total())
    return out | {"rougeL": 2 * _longest_common_subsequence(a, b) / max(1, len(a) + len(b))}


def _longest_common_subsequence(a, b):
    """Length, row by row: length[j] is that of a's tokens so far and b[:j]."""
    length = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, length[j] = length[j], diagonal + 1 if x == y else max(length[j], length[j - 1])
    return length[-1]


# ------------------------------------------------------------------------------------------------- the judges
# A judge is a function of a run's rows: scores of the outputs (n, K), and of the references (n, 1), or None
# where there is nothing to win against them.

def gold_scores(rows):
    """The gold reward of each row's synthetic task as judge.  Raises UserError on rows of other tasks."""
    outputs, references = [], []
    for row in rows:
        task = synthetic_task(row.get("task"))
        if not task:
            raise UserError(f"--judge gold: prompt {row['id']!r} names no synthetic task; use --judge rouge "
                            "or a reward checkpoint")
        try:
            references.append([task.gold_reward(row["prompt"], row["reference"])])
        except ValueError as error:
            raise UserError(f"--judge gold: {error}, though its field task says {row['task']}") from None
        outputs.append([task.gold_reward(row["prompt"], text, finished)
                        for text, finished in zip(row["outputs"], row["finished"])])
    return outputs, references


def reward_scores(rows, model, tokenizer, task, encode=None):
    """A reward model as judge.  An output that did not end is scored at its last token.  The others: as from
    `splits.reading_of`."""
    outputs = [[*zip(row["outputs"], row["finished"]), (row["reference"], True)] for row in rows]
    prompts = [row["prompt"] for row in rows]
    scores = score(model, *text_ids(model, prompts, outputs, tokenizer, task, encode))
    return [s[:-1] for s in scores], [s[-1:] for s in scores]


def similarity_scores(rows, encode):
    """`embed.similarity` to the references as judge.  Nothing is as similar to them as they are."""
    return [similarity(encode, row["reference"], list(zip(row["outputs"], row["finished"])))
            for row in rows], None


def judge_of(cfg, name, device):
    """(judge, its weights_hash or None).  name: gold, sbert:NAME, or the reward model --judge."""
    if name == "gold":
        return gold_scores, None
    if name.startswith("sbert:"):
        return partial(similarity_scores, encode=load_encoder(name, device, flag="--judge")), None
    model, saved = pretrained.load(name, "--judge", device, cfg.dtype, "reward")
    tokenizer, task, encode = reading_of(model, saved)
    return (partial(reward_scores, model=model, tokenizer=tokenizer, task=task, encode=encode),
            saved["weights_hash"])


# ------------------------------------------------------------------------------------------------ the numbers

def win_rates(runs, scores, judge_hash):
    """Lines of the win rate table.  scores: {key of a run: (scores of outputs, of references)}; judge_hash:
    weights_hash of the reward model that judges, or None.  A run that nothing is won against has no rate:
    None.  The gap is of the rates, or of such runs of the scores."""
    means = {key: mean_interval(by_prompt(prompts_of(rows), np.mean(scores[key][0], axis=1)))
             for key, rows in runs.items()}
    rates = {key: rate_interval(by_prompt(prompts_of(rows), wins(*scores[key]))) for key, rows in runs.items()
             if scores[key][1] and all(row["reference"].strip() for row in rows)}
    lines = []
    for key, rows in runs.items():
        found, home = rates if key in rates else means, (*key[:3], "test")
        line = dict(zip(KEY, key)) | {
            "prompts": len(set(prompts_of(rows))), "rate": rates.get(key), "length_controlled": None,
            "gap": difference(found[home], found[key]) if home != key and home in found else None,
            "score": means[key],
            "unfinished": 1 - float(np.mean([f for row in rows for f in row["finished"]])),
            "judge_is_trained_against": any(judge_hash in list_of_hashes(row.get("trained_against"))
                                            for row in rows)}
        if key in rates:
            line |= {"length_controlled": at_equal_length(rows, *scores[key])} | passes(rows, *scores[key])
        lines.append(line)
    return lines


def passes(rows, scores, references):
    """pass_at_k, k = 1, 2, 4, ...: how often one of k outputs at least is as good as the reference."""
    good = np.greater_equal(scores, references)
    return {f"pass_at_{k}": rate_interval(by_prompt(prompts_of(rows), pass_at_k(good, k)))
            for k in (2 ** i for i in range(good.shape[1].bit_length()))}


def at_equal_length(rows, scores, references):
    """`length_controlled` of the outputs against the first reference, by characters."""
    outputs, first = np.asarray(scores, dtype=float), np.asarray(references, dtype=float)[:, :1]
    longer = [[len(text) - len(row["reference"]) for text in row["outputs"]] for row in rows]
    return length_controlled((outputs > first) + 0.5 * (outputs == first), longer,
                             prompts_of(rows))


def head_to_head(runs, scores):
    """Win rate of each policy against every one before it, on the prompts that both have, within a split and
    seed.  All outputs of the one meet all of the other.  `missing`: prompts that one of them lacks."""
    lines = []
    for b, a in combinations(runs, 2):
        if a[2:] == b[2:]:
            both = matched(runs[a], runs[b], (run_name(a), run_name(b)))
            of_a, of_b = [scores[a][0][i] for i, _ in both], [scores[b][0][j] for _, j in both]
            lines.append(dict(zip(KEY, a)) | {
                "against": b[0], "against_temperature": b[1], "prompts": len(both),
                "missing": len(runs[a]) + len(runs[b]) - 2 * len(both),
                "rate": rate_interval(by_prompt(prompts_of(runs[a][i] for i, _ in both), wins(of_a, of_b)))
                if both else None})
    return lines


def rouge_means(runs):
    """(Lines of the ROUGE table: Intervals of the means over prompts, None for a run with a reference that
    has no letter a-z and no digit; lines of `head_to_head` by ROUGE-L between the other runs)."""
    lines, scores = [], {}
    for key, rows in runs.items():
        line = dict(zip(KEY, key)) | {"prompts": len(set(prompts_of(rows)))} | dict.fromkeys(ROUGE)
        if all(rouge_tokens(row["reference"]) for row in rows):
            found = [[rouge(text, row["reference"]) for text in row["outputs"]] for row in rows]
            means = {m: [np.mean([x[m] for x in of_row]) for of_row in found] for m in ROUGE}
            line |= {m: mean_interval(by_prompt(prompts_of(rows), x)) for m, x in means.items()}
            scores[key] = [[x["rougeL"] for x in of_row] for of_row in found], None
        lines.append(line)
    return lines, head_to_head({key: runs[key] for key in scores}, scores)


def main(cfg):
    device, _ = setup(cfg)
    path, runs = output_path(cfg.out, "generalisation.json"), read_all(cfg.files)
    synthetic = all(synthetic_task(known_task(rows)) for rows in runs.values())
    name = cfg.judge or ("gold" if synthetic else "rouge")
    why = "" if cfg.judge or synthetic else ", because not all prompts are of a synthetic task"
    print(f"judge: {name}{why}")
    if name == "rouge":
        lines, wins_by_rouge = rouge_means(runs)
        results = {"judge": name, "rouge": lines, "head_to_head": wins_by_rouge}
        write_json(path, results)       # before the tables, which `| head` may cut
        print_table("ROUGE F-measures against the reference, 95 % intervals over prompts (-: a reference is "
                    "empty)", lines, ROUGE)
    else:
        judge, judge_hash = judge_of(cfg, name, device)
        scores = {key: judge(rows) for key, rows in runs.items()}
        rates = win_rates(runs, scores, judge_hash)
        results = {"judge": name, "win_rate": rates, "head_to_head": head_to_head(runs, scores)}
        write_json(path, results)
        marked = [x | {"policy": x["policy"] + "*" * x["judge_is_trained_against"]} for x in rates]
        print_table("win rate against the reference, ties halved, 95 % intervals over prompts (-: no "
                    "references)", marked, {"rate": "win rate", "length_controlled": "at equal length",
                                            "gap": "gap ID - OOD", "score": "score",
                                            "unfinished": "unfinished"})
        if any(x["judge_is_trained_against"] for x in rates):
            print("\n* trained against, or chosen by, this very judge: not evidence that it is better")
        print_table("pass@k: how often the best of k outputs is at least as good as the reference", rates,
                    {field: f"k = {field[8:]}" for x in rates for field in x if field.startswith("pass_at_")})
    by = "by ROUGE-L, " * (name == "rouge")
    print_table(f"head to head: {by}win rate of the policy against another, on the prompts that both have",
                results["head_to_head"], {"against": "against", "against_temperature": "its T",
                                          "prompts": "prompts", "rate": "win rate"})
    if min(map(len, runs.values())) < FEW_PROMPTS:
        print(f"\na run has fewer than {FEW_PROMPTS} prompts: its intervals say little")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    launch(main, Config, __doc__)
