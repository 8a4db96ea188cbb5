"""What is measured of one task and seed, measures.json, and the same of all seeds as arrays.

A line of measures.json belongs to one sample file: policy, split, temperature; of each prompt `wins` against
the reference, by the gold reward; and per prompt, or across prompts, its diversity.
"""
import json
from functools import partial
from itertools import product

import numpy as np

import diversity
from common.checkpoint import load_checkpoint
from common.embed import embed
from common.files import write_json
from common.samples import read_samples, sample_path
from common.stats import over_seeds
from common.tokenizer import load_tokenizer
from generalisation import gold_scores, reward_scores, wins
from splits import synthetic_task, task_from
from study.names import DIVERSITY, QUALITY, SETS, SHIFTED
from tasks import synthetic


def load_with_task(path, kind, *how):
    """(model, tokenizer, task) of a checkpoint.  how: as in `load_checkpoint`."""
    model, saved = load_checkpoint(path, kind, *how)
    return model, load_tokenizer(saved["tokenizer"]), task_from(saved["task"])


def encoder_and_vocabulary(here):
    """(The SFT model in a folder as a function of texts giving (n, D) embeddings; V of EAD, the number of
    different words in the references of the test sets)."""
    model, tokenizer, _ = load_with_task(here / "ckpt_sft.pt", "lm")
    vocabulary = diversity.reference_vocabulary([synthetic.rows(split, 500) for split in SETS])
    return partial(embed, model, tokenizer), vocabulary


def measure(here, name):
    """Every sample file of the core in the folder `here` of one task and seed -> measures.json.  name: of the
    synthetic task."""
    encode, vocabulary = encoder_and_vocabulary(here)
    task, lines = synthetic_task(name), []
    for path in sorted([*here.glob("t[0-9]*/samples_*.jsonl"), *here.glob("matched/samples_*.jsonl"),
                        *here.glob("resampled/samples_bon_*.jsonl")]):
        rows = read_samples(path)
        if path.parent.name == "resampled":
            rows = [row | {"policy": "bon_resampled"} for row in rows]
        lines.append(measure_file(rows, task, encode, vocabulary))
    found = {"samples": lines, "reward_by_set": measure_reward_model(here)}
    write_json(here / "measures.json", found, indent=None, allow_nan=True)      # outputs without n-grams: nan


def measure_reward_model(here):
    """{policy: {split: `agreement` of the reward model with the gold reward}} of SFT, which it was trained
    on, and of PPO, which was trained against it."""
    model, tokenizer, task = load_with_task(here / "ckpt_reward.pt", "reward")
    by_set = {}
    for policy in ("sft", "ppo"):
        for split in task.evaluation_splits():
            rows = read_samples(sample_path(here / f"t{QUALITY:g}", policy, split))
            scores, _ = reward_scores(rows, model, tokenizer, task)
            by_set.setdefault(policy, {})[split] = agreement(scores, gold_scores(rows)[0]).tolist()
    return by_set


def agreement(scores, gold):
    """How often two scorers, (n, K) each, rank two outputs to one prompt alike: (n,).  Pairs of equal gold
    reward are left out, ties of the other count half; nan for a prompt without a pair."""
    first, second = np.triu_indices(np.shape(gold)[1], 1)
    by_gold, by_score = (np.sign(x[:, first] - x[:, second]) for x in map(np.asarray, (gold, scores)))
    hits, pairs = (by_gold * by_score / 2 + .5) * (by_gold != 0), (by_gold != 0).sum(axis=1)
    return np.where(pairs, hits.sum(axis=1) / np.maximum(pairs, 1), np.nan)


def measure_file(rows, task, encode, vocabulary):
    """The line of one sample file.  task: module of the synthetic task."""
    line = {field: rows[0][field] for field in ("policy", "split", "temperature")}
    line["wins"] = wins(*gold_scores(rows)).tolist()
    # all measures where the paper measures diversity, elsewhere the one that is known to be right
    if line["temperature"] == DIVERSITY:
        found = diversity.measure_samples(rows, diversity.embed_outputs(rows, encode), task, task.nli_points,
                                          vocabulary=vocabulary)
        line |= {f"per_input_{m}": x.tolist() for m, x in found["per_input"].items()}
        line |= {f"across_{m}": [float(x.mean())] for m, x in found["across"].items()}
        line["across_ead_of_as_many"] = [ead_of_as_many(rows, vocabulary)]
        line |= {m: x.tolist() for m, x in diversity.good_measures(rows, task).items()}
    else:
        line["per_input_gold_diversity"] = [task.gold_diversity(r["outputs"])[0] for r in rows]
    return line


def ead_of_as_many(rows, vocabulary):
    """EAD across inputs over as many outputs as EAD per input has, K, because it depends on their number: the
    mean over disjoint sets of K prompts with one output each."""
    k = len(rows[0]["outputs"])
    order = np.random.default_rng(0).permutation(len(rows))
    sets = [order[i:i + k] for i in range(0, max(1, len(rows) - k + 1), k)]
    pools = [[rows[i]["outputs"][j] for i in chosen] for chosen in sets for j in range(k)]
    return float(np.mean(diversity.lexical_measures(pools, vocabulary=vocabulary)["ead"]))


class Measures:
    """measures.json of some tasks and all seeds, asked for by (task, policy, split, temperature)."""

    def __init__(self, folder, seeds, tasks):
        self.seeds, self.tasks = list(seeds), list(tasks)
        self.lines, self.reward_by_set = {}, {}
        for seed in self.seeds:
            for task in self.tasks:
                found = json.loads((folder / f"seed{seed}" / task / "measures.json").read_text())
                self.reward_by_set[task, seed] = found["reward_by_set"]
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

    def wins_minus(self, task, policy, other, *splits):
        """(seeds, prompts): a policy's win rates minus another's."""
        return self.wins(task, policy, *splits) - self.wins(task, other, *splits)

    def varied(self, task, policy, measure):
        """(seeds, prompts) of a measure where the paper measures diversity; (seeds, 1) across inputs."""
        return self.get(task, policy, "test", DIVERSITY, measure)

    def varied_minus(self, task, policy, other, measure):
        return self.varied(task, policy, measure) - self.varied(task, other, measure)

    def loss(self, task, policy):
        """`diversity.split_of_loss` of a policy beside SFT: {part: (seeds, prompts)}."""
        measures = "per_input_gold_diversity", "good_gold_diversity"
        return diversity.split_of_loss(*(self.varied(task, p, m) for m in measures for p in ("sft", policy)))

    def ranked_rightly(self, task, policy, split):
        """(seeds, prompts): how often the reward model ranks two outputs as the gold reward does."""
        return np.array([self.reward_by_set[task, seed][policy][split] for seed in self.seeds], dtype=float)

    def estimate(self, task, policy, split, temperature, measure):
        """As `common.stats.over_seeds`."""
        rate = measure in ("wins", "good") or measure.endswith("gold_diversity")
        return over_seeds(self.get(task, policy, split, temperature, measure), rate)


def known(found, *fields):
    """{values of fields: estimate} as rows of results.json, without what could not be measured at all."""
    return [dict(zip(fields, key)) | estimate for key, estimate in found.items() if estimate]


def win_rates(r):
    """Rows {task, policy, split, temperature} of every sample file, and of the mean over the sets out of
    distribution, split "ood", at the temperature of quality."""
    found = {key: r.estimate(*key, "wins") for key in r.keys()}
    for task, policy, split, temperature in r.keys():
        if split == SHIFTED[0] and temperature in (QUALITY, "matched"):
            found[task, policy, "ood", temperature] = over_seeds(r.wins(task, policy, *SHIFTED), rate=True)
    return known(found, "task", "policy", "split", "temperature")


def diversities(r):
    """Rows {task, policy, split, temperature, measure} where the paper measures diversity."""
    kinds = "per_input_", "across_", "good", "utility"
    found = {(*key, m): r.estimate(*key, m) for key in r.keys() if key[2:] == ("test", DIVERSITY)
             for m in r.lines[*key, r.seeds[0]] if m.startswith(kinds)}
    return known(found, "task", "policy", "split", "temperature", "measure")


def tables(r):
    """What results.json holds of the core, estimates as from `common.stats.over_seeds`.  r: Measures."""
    ranked = {key: over_seeds(r.ranked_rightly(*key), rate=True)
              for key in product(r.tasks, ("sft", "ppo"), SETS)}
    return {"win_rate": win_rates(r), "diversity": diversities(r),
            "loss": [{"task": task, "policy": policy,
                      **{part: over_seeds(x) for part, x in r.loss(task, policy).items()}}
                     for task in r.tasks for policy in ("bon", "ppo")],
            "ranked_rightly": known(ranked, "task", "policy", "split")}
