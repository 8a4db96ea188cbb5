"""What kind of diversity is lost: that of bad outputs, or that of good ones?

`python reproduce.py --full` runs this in distribution, at temperature 1.  A policy with fewer bad outputs is
less varied too, so its loss is split: what SFT's bad outputs added to its diversity, and how much less varied
the good ones are.  Good: of a gold reward at least the reference's.  Then how many different good answers
there are among 16, and coverage: whether the best of k outputs is good.
"""
import json

import numpy as np

from common.files import write_json
from common.samples import read_samples
from common.stats import over_seeds
from generalisation import coverage_at_k, gold_scores
from study.names import COVERAGE_OF, DIVERSITY, NOISE_OF, VARIED

KS = (1, 2, 4, 8, 16, 32, 64)
MEASURES = ("good", "per_input_gold_diversity", "good_gold_diversity", "good_distinct", "utility")


def measure_coverage(here):
    """The sample files in here/many -> coverage.json: {policy: {k: (prompts,)}}."""
    found = {}
    for path in sorted((here / "many").glob("samples_*_test.jsonl")):
        rows = read_samples(path)
        gold, references = map(np.asarray, gold_scores(rows))
        found[rows[0]["policy"]] = {str(k): coverage_at_k(gold >= references, k).tolist() for k in KS}
    write_json(here / "coverage.json", found, indent=None)


def split_of_loss(r, task, policy):
    """A policy's loss of diversity beside SFT as {"loss", "errors_removed", "narrowing", "inputs"}: estimates
    over seeds and prompts, of which the last two add up to the loss exactly, and the mean number of prompts
    where both policies have two good outputs, which alone enter.  As `diversity.split_of_loss`."""
    loss, narrowing = (r.get(task, "sft", "test", DIVERSITY, m) - r.get(task, policy, "test", DIVERSITY, m)
                       for m in ("per_input_gold_diversity", "good_gold_diversity"))
    loss = np.where(np.isnan(narrowing), np.nan, loss)
    inputs = float((~np.isnan(narrowing)).sum(axis=1).mean())
    return {"loss": over_seeds(loss), "errors_removed": over_seeds(loss - narrowing),
            "narrowing": over_seeds(narrowing), "inputs": inputs}


def numbers(r, folder):
    """What reviewers.json holds of this question.  r: Measures of both kinds of noise."""
    seeds = [json.loads((folder / f"seed{s}" / "synthetic" / "coverage.json").read_text()) for s in r.seeds]

    def covered(policy, k):
        return np.array([seed[policy][str(k)] for seed in seeds])
    return {"good": [{"task": task, "policy": p, "measure": m,
                      "estimate": r.estimate(task, p, "test", DIVERSITY, m)}
                     for task in NOISE_OF for p in VARIED for m in MEASURES],
            "good_less_sft": [{"task": task, "policy": p, **over_seeds(
                r.get(task, p, "test", DIVERSITY, "good_distinct")
                - r.get(task, "sft", "test", DIVERSITY, "good_distinct"))}
                for task in NOISE_OF for p in ("bon", "ppo", "ppo_gold")],
            "split": [{"task": task, "policy": p, **split_of_loss(r, task, p)}
                      for task in NOISE_OF for p in ("bon", "ppo", "ppo_gold")],
            "coverage": [{"policy": p, "k": k, **over_seeds(covered(p, k), rate=True)}
                         for p in COVERAGE_OF for k in KS],
            "coverage_less_sft": [{"policy": p, "k": k, **over_seeds(covered(p, k) - covered("sft", k))}
                                  for p in COVERAGE_OF if p != "sft" for k in KS]}
