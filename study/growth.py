"""Does RLHF's advantage over SFT grow with the shift?  The advantage of each test set against its distance
from train.

`python reproduce.py --full` runs this: test sets between the study's (--splits graded_*), five measures of
shift, and a least-squares line through advantage against shift, over all test sets and along one kind of
shift at a time.
"""
import json

import numpy as np

from common.files import write_json
from common.samples import read_samples
from common.stats import of_seeds, over_seeds
from generalisation import gold_scores, wins
from study.claims import decided
from study.measures import encoder_of
from study.names import GRADED, NOISE_OF, QUALITY, SETS
from study.shift import SHIFTS, shift


def _by_number(kind):
    return sorted((s for s in (*SETS, *GRADED) if kind in s), key=lambda s: int(s.split(kind)[1]))


KINDS = {"new words": ["test", *_by_number("words")],               # of shift, by one thing more at a time
         "more distractors": ["test", *_by_number("distractors")]}


# ------------------------------------------------------------------------------------------------- the stages

def measure_graded(here):
    """Win rates of the sample files in here/graded -> graded.json: {split: {policy: (prompts,)}}."""
    found = {}
    for path in sorted((here / "graded").glob("samples_*.jsonl")):
        rows = read_samples(path)
        found.setdefault(rows[0]["split"], {})[rows[0]["policy"]] = wins(*gold_scores(rows)).tolist()
    write_json(here / "graded.json", found, indent=None)


def measure_shift(here, task, splits, n, **draws):
    """How far the prompts of each split lie from train -> shift.json: {split: as `study.shift.shift`}.  The
    SFT model in the folder `here` embeds them; its tokenizer, the base model's, has every word as one token.
    task: module of the synthetic task; n: prompts a side; draws: numbers of resampling."""
    encode, tokenizer = encoder_of(here / "ckpt_sft.pt")
    prompts = [row["prompt"] for row in task.rows("train", 2 * n)]
    found = {split: shift(prompts, [row["prompt"] for row in task.rows(split, n)], tokenizer, encode, **draws)
             for split in splits}
    write_json(here / "shift.json", found, indent=None)


# ------------------------------------------------------------------------------------------------ the numbers

def slope(x, y):
    """Change of y (sets,) from the least to the most shifted set, by least squares.  x: (sets,) shifts; nan
    if they are all the same."""
    span, u = np.ptp(x), x - x.mean()
    return float(u @ y / (u @ u) * span) if span > 0 else np.nan


def leverages(x):
    """(sets,) how much of the line through (x, y) each set decides by itself; at 1 the line meets it."""
    u = x - x.mean()
    return 1 / len(x) + u ** 2 / (u @ u)


def other_sets(x, y, rng):
    """y (sets,) of test sets that lie as far from the line through (x, y) as these do: a bootstrap of the
    residuals, each divided by what its own leverage takes from it (Davison and Hinkley 1997, section 6.2).
    The shifts x stay: one set lies far from all others, and a draw of sets without it would measure another
    line."""
    u = x - x.mean()
    line = y.mean() + u * (u @ y / (u @ u))
    residuals = (y - line) / np.sqrt(1 - leverages(x))
    return line + rng.choice(residuals - residuals.mean(), len(x))


def change(x, advantage, of_all_sets=True):
    """{policy: {mean, low, high} of the slope, over the choice of seeds and of test sets, or, without
    of_all_sets, of seeds and prompts of these very sets}.  x: (sets,) shifts; advantage: {policy: one (seeds,
    prompts) array for each set}."""
    def of_policy(arrays):
        def statistic(seeds, rng):
            y = np.array([a[seeds].mean() for a in arrays])
            if rng and of_all_sets:     # a residual holds what the choice of prompts adds, too
                y = other_sets(x, y, rng)
            elif rng:
                y = np.array([a[seeds][:, rng.integers(0, a.shape[1], a.shape[1])].mean() for a in arrays])
            return slope(x, y)
        n_seeds, n_prompts = arrays[0].shape
        return of_seeds(statistic, n_seeds, len(x) if of_all_sets else n_prompts)
    return {policy: of_policy(arrays) for policy, arrays in advantage.items()}


def direction(e):
    """What an interval shows of a change."""
    return {1: "grows", -1: "shrinks", 0: "not shown"}[decided(e["low"], e["high"])]


def advantages(measures, folder, task):
    """{policy: {split: (seeds, prompts) win rate less SFT's}} on all test sets."""
    graded = [json.loads((folder / f"seed{s}" / task / "graded.json").read_text()) for s in measures.seeds]

    def won(policy, split):
        if split in GRADED:
            return np.array([seed[split][policy] for seed in graded])
        return measures.get(task, policy, split, QUALITY, "wins")
    return {p: {s: won(p, s) - won("sft", s) for s in (*SETS, *GRADED)} for p in ("ppo", "bon")}


def numbers(measures, folder):
    """What reviewers.json holds of this question."""
    sets = [*SETS, *GRADED]
    slopes, along, points, far = [], [], {}, {}
    for task, noise in NOISE_OF.items():
        far[task] = json.loads((folder / f"seed{measures.seeds[0]}" / task / "shift.json").read_text())
        advantage = advantages(measures, folder, task)
        points[task] = {p: [over_seeds(of_set[s]) for s in sets] for p, of_set in advantage.items()}
        for m in SHIFTS:
            x = np.array([far[task][s][m] for s in sets])
            of_all = {p: list(of_set.values()) for p, of_set in advantage.items()}
            slopes.append({"task": task, "noise": noise, "measure": m, "low": float(x.min()),
                           "high": float(x.max()), "farthest": sets[int(x.argmax())],
                           "leverage": float(leverages(x).max()), **change(x, of_all)})
        for kind, chosen in KINDS.items():
            x = np.array([far[task][s]["js"] for s in chosen])
            of_kind = {p: [of_set[s] for s in chosen] for p, of_set in advantage.items()}
            along.append({"task": task, "noise": noise, "kind": kind, "sets": chosen,
                          **change(x, of_kind, of_all_sets=False)})
    return {"slopes": slopes, "along": along, "shift": far, "advantages": points, "sets": sets,
            **counts(slopes)}


def counts(slopes):
    """How many of a policy's slopes grow, shrink or are not shown, and the sets that some measure calls the
    farthest."""
    said = {p: [direction(line[p]) for line in slopes] for p in ("ppo", "bon")}
    return {"counts": {p: {word: words.count(word) for word in ("grows", "shrinks", "not shown")}
                       for p, words in said.items()},
            "farthest": sorted({line["farthest"] for line in slopes})}
