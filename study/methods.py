"""Which method keeps diversity, and what becomes of it out of distribution?

`python reproduce.py --full` runs this.  study/frontier.py has every method over its knob in
distribution.  Here are the test sets out of distribution, each at the usual beta; and who ranks outputs
rightly there, the reward model or DPO's implicit reward.
"""
import json

import numpy as np

from common.checkpoint import load_checkpoint
from common.files import write_json
from common.samples import read_samples
from common.stats import over_seeds
from common.tokenizer import load_tokenizer
from generalisation import gold_scores, reward_scores, wins
from methods.dpo import implicit_rewards
from splits import Task
from study.frontier import OF_METHODS, encode_samples, measure_files
from study.measures import agreement, sample_files
from study.names import BETA, NOISE_OF, QUALITY, SETS, method_name
from tasks import synthetic
from tasks.annotators import Group

JUDGED = ("sft", "ppo", method_name("dpo", BETA))       # policies whose outputs the judges rank
JUDGES = {"reward": "reward model", "dpo": "DPO's implicit reward"}


# ------------------------------------------------------------------------------------------------- the stages

def measure(here):
    """The sample files of one task and seed -> methods.json: {"wins", "ungrammatical": clauses an output
    outside the grammar: {policy: {split: (prompts,)}}, "ranked_rightly": {judge: {policy: {split:
    (prompts,)}}}, "frontier": as `frontier.measure_files`}."""
    found = {"wins": {}, "ungrammatical": {}, "ranked_rightly": {}}
    paths = [*here.glob(f"methods{QUALITY:g}/samples_*.jsonl"),
             *(here / f"t{QUALITY:g}" / f"samples_{name}_{split}.jsonl" for name in ("sft", "ppo")
               for split in SETS)]
    judges = load_judges(here)
    for path in sorted(paths):
        rows = read_samples(path)
        policy, split = rows[0]["policy"], rows[0]["split"]
        gold, references = gold_scores(rows)
        found["wins"].setdefault(policy, {})[split] = wins(gold, references).tolist()
        found["ungrammatical"].setdefault(policy, {})[split] = [
            float(np.mean([synthetic.ungrammatical(text) for text in row["outputs"]])) for row in rows]
        for judge, rewards_of in judges.items() if policy in JUDGED else ():
            of_judge = found["ranked_rightly"].setdefault(judge, {}).setdefault(policy, {})
            of_judge[split] = agreement(rewards_of(rows), gold).tolist()
    paths = [path for name in OF_METHODS for path in sample_files(here, name, ("methods",))]
    found["frontier"] = measure_files(here, paths)
    # nan where fewer than two outputs are good
    write_json(here / "methods.json", found, indent=None, allow_nan=True)


def load_judges(here):
    """{judge: function of sample rows giving n lists of K rewards}."""
    reward_model, saved = load_checkpoint(here / "ckpt_reward.pt", "reward")
    tokenizer, task = load_tokenizer(saved["tokenizer"]), Task(**saved["task"])
    policy, ref_policy = (load_checkpoint(here / f"ckpt_{name}.pt", "lm")[0]
                          for name in (method_name("dpo", BETA), "sft"))
    ref_policy.freeze(policy.config.frozen)     # the trunk that DPO left as it was serves both

    def implicit(rows):
        groups = [Group(*ids) for ids in zip(*encode_samples(tokenizer, task, rows, policy.config.context))]
        return implicit_rewards(policy, ref_policy, groups, policy.embed.weight.device)
    return {"reward": lambda rows: reward_scores(rows, reward_model, tokenizer, task)[0], "dpo": implicit}


# ------------------------------------------------------------------------------------------------ the numbers

def numbers(folder, seeds):
    """What reviewers.json holds of this question."""
    of_task = {task: [json.loads((folder / f"seed{s}" / task / "methods.json").read_text()) for s in seeds]
               for task in NOISE_OF}
    return {"wins": [row for task, found in of_task.items() for row in win_rates(task, found)],
            "ranked_rightly": [{"task": task, "judge": judge, "policy": policy, "split": split,
                                **over_seeds(np.array([seed["ranked_rightly"][judge][policy][split]
                                                       for seed in found], dtype=float), rate=True)}
                               for task, found in of_task.items() for judge in JUDGES for policy in JUDGED
                               for split in SETS]}


def win_rates(task, found):
    """[{task, policy, split, wins, less_sft, less_ppo, ungrammatical, more_ungrammatical: than PPO's}] of the
    policies that were sampled on all test sets.  found: methods.json of each seed."""
    rows = []
    for policy, of_split in found[0]["wins"].items():
        for split in SETS if len(of_split) == len(SETS) else ():
            won, of_sft, of_ppo = (np.array([seed["wins"][name][split] for seed in found])
                                   for name in (policy, "sft", "ppo"))
            broken, of_ppo_broken = (np.array([seed["ungrammatical"][name][split] for seed in found])
                                     for name in (policy, "ppo"))
            rows.append({"task": task, "policy": policy, "split": split, "wins": over_seeds(won, rate=True),
                         "less_sft": over_seeds(won - of_sft), "less_ppo": over_seeds(won - of_ppo),
                         "ungrammatical": over_seeds(broken),
                         "more_ungrammatical": over_seeds(broken - of_ppo_broken)})
    return rows
