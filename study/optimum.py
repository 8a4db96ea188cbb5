"""Objective or optimiser?  What becomes of reward and diversity under the policy that maximises E[r] - beta
KL itself, with the reward model's r: pi* ~ pi_SFT exp(r / beta).  PPO is an attempt to learn it.

pi* needs no training: large pools of SFT's samples, with weights exp(r / beta), stand for its samples
(bon.soft_weights).  The means below are over a whole pool with these weights, those of pairs over all pairs
of two samples, and nothing is drawn.  They tell little where few samples carry the weight, so a beta whose
effective sample size is too small is left out (bon.FEW), and a table shows how the numbers move as pools
grow.
"""
import json

import numpy as np
import torch

from bon import FEW, effective_size, score_texts, soft_kl, soft_weights
from common.checkpoint import load_checkpoint
from common.files import write_json
from common.stats import of_seeds, over_seeds
from common.tokenizer import ends_of
from diversity import words
from generate import generate
from splits import decode, encode_prompts
from study.measures import load_with_task
from study.names import NO_EOS_SCORE, OPTIMUM_BETAS

PARTS = (8, 4, 2, 1)    # the pool's first 1/8, 1/4, ...: how the numbers move as it grows
SHARED = {"gold_diversity": "gold diversity", "good_gold_diversity": "gold diversity of good outputs"}


# -------------------------------------------------------------------------------------------------- the stage

def measure(here, seed, inputs, pool):
    """Pools of SFT's samples on the test prompts -> optimum.json: [{"knob": beta, "pool", measure:
    (prompts,)}], for each part of the pool and each beta."""
    policy, tokenizer, task = load_with_task(here / "ckpt_sft.pt", "lm")
    reward_model, _ = load_checkpoint(here / "ckpt_reward.pt", "reward")
    rows, rng, of_prompts = task.rows("test", inputs), torch.Generator().manual_seed(seed), []
    max_prompt_len = task.max_prompt_len(policy.config.context)
    prompts = encode_prompts(tokenizer, [r["prompt"] for r in rows], max_prompt_len)
    for row, prompt in zip(rows, prompts):
        ids, = generate(policy, [prompt], task.max_new_tokens, n=pool, eos=ends_of(tokenizer), rng=rng,
                        batch_size=2048)
        outputs = [decode(tokenizer, y) for y in ids]
        rewards, = score_texts(reward_model, tokenizer, [prompt], [outputs], task.max_new_tokens,
                               NO_EOS_SCORE)
        of_prompts.append(measure_pool(row, outputs, np.array(rewards), task.synthetic))
    lines = [{"knob": beta, "pool": pool // part}
             | {m: [float(of[part, beta][m]) for of in of_prompts] for m in first}
             for (part, beta), first in of_prompts[0].items()]
    write_json(here / "optimum.json", lines, indent=None, allow_nan=True)


def measure_pool(row, outputs, rewards, gold):
    """{(part, beta): {measure: float}} of pi* on one prompt.  outputs: the pool's (text, finished); rewards:
    (N,); gold: the synthetic task's module."""
    least = gold.gold_reward(row["prompt"], row["reference"])
    of_gold = np.array([gold.gold_reward(row["prompt"], *output) for output in outputs])
    length = np.array([len(words(text)) for text, _ in outputs])
    number, content = {}, []            # of each different content; of each output
    for text, _ in outputs:
        content.append(number.setdefault(gold.facts(text), len(number)))
    content, apart, found = np.array(content), jaccard_distances(list(number)), {}
    for part in PARTS:
        n = len(outputs) // part
        good = of_gold[:n] >= least
        for beta in OPTIMUM_BETAS:
            w = soft_weights(rewards[:n], beta)
            found[part, beta] = {
                "size": effective_size(w), "kl": soft_kl(w), "reward": w @ rewards[:n],
                "gold_reward": w @ of_gold[:n], "length": w @ length[:n], "good": w @ good,
                "wins": w @ ((of_gold[:n] > least) + good) / 2,
                "gold_diversity": mean_of_pairs(w, content[:n], apart),
                "good_gold_diversity": mean_of_pairs(w * good, content[:n], apart)}
    return found


def jaccard_distances(sets):
    """(C, C) distances of C sets of facts, as in the task's gold diversity: 0 for two empty ones."""
    place = {fact: i for i, fact in enumerate(sorted(set().union(*sets)))}
    has = np.zeros((len(sets), len(place)), np.float32)
    for row, facts in zip(has, sets):
        row[[place[fact] for fact in facts]] = 1
    both = has @ has.T
    union = has.sum(1)[:, None] + has.sum(1) - both
    return np.where(union > 0, 1 - both / np.maximum(union, 1), 0)


def mean_of_pairs(weights, content, distance):
    """Weighted mean distance over all pairs of two samples: weights (N,) >= 0; content (N,) into distance
    (C, C).  nan where fewer than two have weight."""
    w = np.bincount(content, weights, len(distance))
    pairs = weights.sum() ** 2 - np.square(weights).sum()       # without a sample's pair with itself
    return float(w @ (distance @ w) / pairs) if pairs > 1e-12 else np.nan


# ------------------------------------------------------------------------------------------------ the numbers

def points(here):
    """optimum.json's lines of the largest pool, as points of the frontier; measures of outputs that would
    have to be drawn are nan."""
    lines = json.loads((here / "optimum.json").read_text())
    whole = [line for line in lines if line["pool"] == max(x["pool"] for x in lines)]
    return [line | {"kl": float(np.mean(line["kl"])), "length": float(np.mean(line["length"])),
                    **dict.fromkeys(("ead", "good_distinct", "utility"), [np.nan] * len(line["wins"]))}
            for line in whole]


def numbers(folder, seeds):
    """[{beta, pool, size: median over prompts and seeds, kl and other measures}], for each pool."""
    paths = [folder / f"seed{seed}" / "synthetic" / "optimum.json" for seed in seeds]
    of_seed = [json.loads(path.read_text()) for path in paths]
    return [{"beta": first["knob"], "pool": first["pool"],
             "size": float(np.median([lines[i]["size"] for lines in of_seed])),
             **{m: over_seeds(np.array([lines[i][m] for lines in of_seed]))
                for m in ("kl", "reward", "gold_reward", *SHARED)}} for i, first in enumerate(of_seed[0])]


def enough(point):
    """Whether enough samples carry the weight of a point of the frontier."""
    return np.median(point["size"]) > FEW


def shares(sft, optimum, trained):
    """How much of a policy's loss of diversity its objective asks for: {measure: {"lost": SFT's minus the
    policy's, "asked": SFT's minus the optimum's at the same beta, "share": asked / lost, None where no
    loss is shown}}.  Points of the frontier, whose measures are (seeds, prompts)."""
    found = {}
    for measure in SHARED:
        a, b, c = (point[measure] for point in (sft, optimum, trained))

        def share(seeds, rng):
            prompts = np.arange(a.shape[1]) if rng is None else rng.integers(0, a.shape[1], a.shape[1])
            before, best, after = (np.nanmean(x[seeds][:, prompts]) for x in (a, b, c))
            return (before - best) / (before - after)
        lost = over_seeds(a - c)
        found[measure] = {"lost": lost, "asked": over_seeds(a - b),
                          "share": of_seeds(share, *a.shape) if (lost["low"] or 0) > 0 else None}
    return found
