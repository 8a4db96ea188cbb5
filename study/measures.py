"""What is measured of one task and seed, measures.json, and the same of all seeds as arrays.

A line of measures.json belongs to one sample file: policy, split, temperature; `wins` and `score`, by the
gold reward; `unfinished`, a fraction; `length`, words; and per prompt, or across prompts, its diversity.
"""
import json
from functools import partial

import numpy as np

import diversity
from common.checkpoint import load_checkpoint
from common.embed import embed
from common.files import write_json
from common.samples import read_samples
from common.stats import over_seeds
from common.tokenizer import load_tokenizer
from generalisation import gold_scores, wins
from splits import synthetic_task
from study.names import DIVERSITY, QUALITY


def vocabulary_of(task):
    """V of EAD in a synthetic task, given as its module: number of different words in the references of its
    test sets."""
    return diversity.reference_vocabulary([task.rows(s, 500) for s in task.SPLITS
                                           if s == "test" or s.startswith("ood_")])


def encoder_of(path):
    """(function of texts giving (n, D) embeddings, tokenizer) of an SFT checkpoint."""
    model, saved = load_checkpoint(path, "lm")
    tokenizer = load_tokenizer(saved["tokenizer"])
    return partial(embed, model, tokenizer), tokenizer


def measure(here, name):
    """Every sample file in the folder `here` of one task and seed -> measures.json.  name: of the synthetic
    task."""
    encode, _ = encoder_of(here / "ckpt_sft.pt")
    task, lines = synthetic_task(name), []
    vocabulary = vocabulary_of(task)
    for path in sorted([*here.glob("t*/samples_*.jsonl"), *here.glob("matched/samples_*.jsonl")]):
        rows = read_samples(path)
        lines += measure_file(rows, task, encode, vocabulary)
    last_steps = {path.stem.removeprefix("metrics_"): json.loads(path.read_text().splitlines()[-1])
                  for path in here.glob("metrics_ppo*.jsonl")}
    accuracy = load_checkpoint(here / "ckpt_reward.pt", "reward")[1]["metrics"]
    found = {"samples": lines, "ppo": last_steps, "reward": accuracy}
    write_json(here / "measures.json", found, indent=None, allow_nan=True)      # outputs without n-grams: nan


def measure_file(rows, task, encode, vocabulary):
    """The lines of one sample file: its own and, of SFT at the temperature of quality, the oracle's.  task:
    module of the synthetic task."""
    key = {field: rows[0][field] for field in ("policy", "split", "temperature")}
    scores, references = gold_scores(rows)
    line = key | {"wins": wins(scores, references).tolist(), "score": float(np.mean(scores)),
                  "unfinished": 1 - float(np.mean([f for r in rows for f in r["finished"]])),
                  "length": float(np.mean([len(diversity.words(t)) for r in rows for t in r["outputs"]]))}
    # all measures where the paper measures diversity, elsewhere the one that is known to be right
    if key["temperature"] == DIVERSITY and key["policy"] in ("sft", "bon", "ppo", "ppo_gold"):
        embeddings = diversity.embed_outputs(rows, encode)
        found = diversity.measure_samples(rows, embeddings, task, vocabulary=vocabulary)
        line |= {f"per_input_{m}": x.tolist() for m, x in found["per_input"].items()}
        line |= {f"across_{m}": [float(x.mean())] for m, x in found["across"].items()}
    else:
        line["per_input_gold_diversity"] = [task.gold_diversity(r["outputs"])[0] for r in rows]
    if key["policy"] != "sft" or key["temperature"] != QUALITY:
        return [line]
    # the best of the 16 outputs by the gold reward: what a perfect reward model would choose
    best = np.max(scores, axis=1, keepdims=True)
    oracle = key | {"policy": "oracle", "wins": wins(best, references).tolist(), "score": float(best.mean())}
    return [oracle, line]


class Measures:
    """measures.json of some tasks and all seeds, asked for by (task, policy, split, temperature)."""

    def __init__(self, folder, seeds, tasks):
        self.seeds, self.tasks, self.lines, self.ppo, self.reward = list(seeds), list(tasks), {}, {}, {}
        for seed in self.seeds:
            for task in self.tasks:
                found = json.loads((folder / f"seed{seed}" / task / "measures.json").read_text())
                self.ppo[task, seed], self.reward[task, seed] = found["ppo"], found["reward"]
                for line in found["samples"]:
                    # each seed has its own matched temperature
                    t = "matched" if line["policy"] == "sft_matched" else line["temperature"]
                    self.lines[task, line["policy"], line["split"], t, seed] = line

    def keys(self):
        """(task, policy, split, temperature), "matched" in place of a number for the policy sft_matched."""
        return [key[:4] for key in self.lines if key[4] == self.seeds[0]]

    def get(self, task, policy, split, temperature, measure):
        """(seeds, n) array of one measure: of n prompts, or one number."""
        temperature = "matched" if policy == "sft_matched" else temperature
        return np.array([np.atleast_1d(self.lines[task, policy, split, temperature, seed][measure])
                         for seed in self.seeds], dtype=float)

    def wins(self, task, policy, *splits):
        """(seeds, prompts) win rates at the temperature of quality, means over test sets."""
        return np.mean([self.get(task, policy, split, QUALITY, "wins") for split in splits], axis=0)

    def estimate(self, task, policy, split, temperature, measure):
        """As `common.stats.over_seeds`."""
        x = self.get(task, policy, split, temperature, measure)
        return over_seeds(x, rate=measure == "wins" or measure.endswith("gold_diversity"))
