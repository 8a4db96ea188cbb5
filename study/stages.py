"""The stages of the synthetic study: what is trained, sampled and measured for each seed, with the recipe's
numbers.

For each seed a base model is pretrained on posts with mixed reference noise.  Then, with systematic noise:
SFT, a reward model, PPO, PPO on the gold reward, and best-of-16.  With --full the same with independent
noise, and with systematic noise PPO over its KL coefficient, other methods, and what the frontier, the test
of the diversity measures and pass@k need.  Seeds vary initialisation, data order and sampling.  Posts,
references and test sets are the same for all, so differences are paired by prompt.

Deviations from the paper: its two tasks are replaced by the synthetic one and its GPT-4 judge by the gold
reward; SFT is also sampled at the temperature that gives it PPO's per-input diversity, to tell learning from
sharpening.
"""
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

import bon
import ppo
import reward
import sft
from common.flags import Common, setup
from common.samples import read_samples, sample_path
from methods import dpo, grpo
from splits import synthetic_task
from study import frontier, measures, optimum, proxies, shift
from study.names import (BETA, BEST_OF, DIVERSITY, LEARNING_RATES, METHODS, ON_ALL_SETS, PASS_AT, PASS_AT_OF,
                         QUALITY, SFT_TEMPERATURES, TRAINED)
from study.pipeline import Stage

# of the stages below: raise it when a change of code changes what a stage leaves
RECIPE = 2
# of the layers, with the embeddings, in SFT, as in PPO and the other methods (the paper: 0.8, in every
# stage). Without it SFT pushes the embeddings of all words that it does not meet in one direction, because
# the head is the same matrix.  The reward model trains all layers: it judges better, and its head pushes no
# words
FROZEN = 0.5
LOG_EVERY = 1000        # steps of SFT; each line has a validation loss, which takes as long as ten steps
COLDER = tuple(t for t in SFT_TEMPERATURES if t not in (QUALITY, DIVERSITY))


@dataclass(frozen=True)
class Recipe:
    """The sizes of a study, on which its results depend, and save_every."""
    inputs: int = 100           # prompts of each test set
    base_rows: int = 24576      # posts that the base model is pretrained on
    sft_rows: int = 8192        # posts of SFT for each kind of noise
    prompts: int = 8000         # prompts with preferences
    held_out: int = 500         # prompts of the reward model's held-out pairs
    ppo_steps: int = 45         # rollout batches of PPO
    batch_size: int = 64        # rollouts of a batch
    pool: int = 64              # scored samples a prompt for best-of-16
    shift_prompts: int = 500    # prompts a side of the measures of shift
    optimum_pool: int = 8192    # samples a prompt that stand for the optimum's
    content_sets: int = 40      # sets of outputs in the content test of the diversity measures
    quick: bool = False         # toy sizes: a check of the code, not a result
    device: str = "auto"
    dtype: str = "fp32"
    save_every: float = 60.0

    def settings(self):
        return {k: v for k, v in asdict(self).items() if k != "save_every"}


QUICK = Recipe(inputs=12, base_rows=1024, sft_rows=256, prompts=64, held_out=24, ppo_steps=3, batch_size=16,
               pool=32, shift_prompts=64, optimum_pool=512, content_sets=10, quick=True)


class Trial:
    """One task and one seed: the methods are the work of its stages, on files in the folder `here`."""

    def __init__(self, recipe, seed, folder, task):
        self.recipe, self.seed, self.task = recipe, seed, task
        self.here = Path(folder) / f"seed{seed}" / task
        self.same = dict(seed=seed, threads=1, device=recipe.device, dtype=recipe.dtype,
                         save_every=recipe.save_every, quiet=True)

    def checkpoint(self, name):
        """The path of a policy's checkpoint.  The two kinds of noise share a base model."""
        return str((self.here.parent if name == "base" else self.here) / f"ckpt_{name}.pt")

    # -------- training

    def pretrain(self):
        sft.main(sft.Config(task="synthetic-mixed", rows=self.recipe.base_rows, out=self.checkpoint("base"),
                            log_every=LOG_EVERY, **self.same))

    def train_sft(self):
        sft.main(sft.Config(model=self.checkpoint("base"), task=self.task, rows=self.recipe.sft_rows,
                            lr=1.5e-3, freeze=FROZEN, out=self.checkpoint("sft"), log_every=LOG_EVERY,
                            **self.same))

    def train_reward(self):
        reward.main(reward.Config(model=self.checkpoint("sft"), freeze=0, prompts=self.recipe.prompts,
                                  held_out=self.recipe.held_out, out=self.checkpoint("reward"), **self.same))

    def train_ppo(self, name="ppo", beta=BETA, **flags):
        flags = dict(reward=self.checkpoint("reward")) | flags
        ppo.main(ppo.Config(model=self.checkpoint("sft"), kl_coef=beta, lr=LEARNING_RATES["ppo"],
                            steps=self.recipe.ppo_steps, batch_size=self.recipe.batch_size,
                            out=self.checkpoint(name), **flags, **self.same))

    def train_method(self, name, method, beta):
        """DPO or IPO on the reward model's pairs, RLOO or GRPO against it with as many rollouts as PPO's."""
        out = dict(out=self.checkpoint(name), lr=LEARNING_RATES[method], model=self.checkpoint("sft"),
                   **self.same)
        if method in dpo.LOSSES:
            dpo.main(dpo.Config(loss=method, beta=beta, prompts=self.recipe.prompts,
                                held_out=self.recipe.held_out, **out))
        else:
            grpo.main(grpo.Config(advantage=method, kl_coef=beta, reward=self.checkpoint("reward"),
                                  steps=self.recipe.ppo_steps, batch_size=self.recipe.batch_size // 8, **out))

    # -------- sampling

    def sample(self, name, temperature, splits="", folder="", inputs=0, **flags):
        """Sample files of a policy in `folder` (t<temperature>); with the flag `reward` best-of-16's too."""
        bon.main(bon.Config(model=self.checkpoint(name), task=self.task, splits=splits,
                            temperature=temperature, inputs=inputs or self.recipe.inputs,
                            out=str(self.here / (folder or f"t{temperature:g}")), **flags, **self.same))

    def sample_all(self):
        """SFT, best-of-16 and PPO everywhere.  Where diversity is measured best-of-16 comes from independent
        samples, and, in the folder `resampled`, from one pool, as the authors draw it."""
        scored = dict(reward=self.checkpoint("reward"), pool=self.recipe.pool)
        self.sample("sft", QUALITY, **scored)
        self.sample("sft", DIVERSITY, "test", **scored | dict(pool=256, independent=True))
        names = ["ppo"]
        if self.task == "synthetic":
            self.sample("sft", DIVERSITY, "test", folder="resampled", **scored)
            names += ["base", "ppo_gold"]
        for name in names:
            self.sample(name, QUALITY)
            self.sample(name, DIVERSITY, "test")

    def train_and_sample(self, name, train):
        """A policy of --full: training, samples where diversity is measured, or on all sets (ON_ALL_SETS)."""
        train()
        self.sample(name, DIVERSITY, "test", folder="more")
        if name in ON_ALL_SETS:
            self.sample(name, QUALITY, folder="all_sets")

    def match(self):
        """SFT over temperatures, and SFT at the temperature that gives it PPO's gold diversity per input at
        the temperature of quality, on validation prompts."""
        for temperature in COLDER:
            self.sample("sft", temperature, "test")
        wanted = self.validation_diversity("ppo", QUALITY)
        # diversity grows with temperature, from 0 of greedy decoding; maximum.accumulate guards np.interp
        # against noise between neighbours
        curve = np.maximum.accumulate([0., *(self.validation_diversity("sft", t) for t in SFT_TEMPERATURES)])
        temperature = round(float(np.interp(wanted, curve, (0., *SFT_TEMPERATURES))), 3)
        self.sample("sft", temperature, folder="matched", policy="sft_matched")

    def validation_diversity(self, name, temperature):
        folder = f"match{temperature:g}"
        self.sample(name, temperature, "validation", folder=folder, inputs=min(60, self.recipe.inputs))
        rows = read_samples(sample_path(self.here / folder, name, "validation"))
        return float(np.mean([synthetic_task(self.task).gold_diversity(row["outputs"])[0] for row in rows]))

    def sample_many(self):
        for name in PASS_AT_OF:
            self.sample(name, DIVERSITY, "test", folder="many", n=PASS_AT[-1])
        frontier.measure_pass_at_k(self.here)


# --------------------------------------------------------------------------------------------------- the plan
# Seconds are those of one thread of a 2-core server (Zen 4).

def plan(recipe, seeds, folder, full=False):
    """All stages of the study, with `full` both kinds of noise, other methods and other measures."""
    stages = []
    for seed in seeds:
        trial = Trial(recipe, seed, folder, "synthetic")
        stages += [_stage(trial, f"seed{seed}/base", (), (f"seed{seed}/ckpt_base.pt",), 140, trial.pretrain)]
        stages += core_stages(trial)
        if full:
            stages += core_stages(Trial(recipe, seed, folder, "synthetic-independent"))
            stages += full_stages(trial, with_shift=seed == seeds[0])
    return stages


def in_worker(seed, work):
    """What every stage starts with: one thread, fixed seeds, deterministic algorithms."""
    setup(Common(seed=seed, threads=1))
    work()


def _stage(trial, name, needs, leaves, seconds, work):
    """A Stage.  Names, needs and leaves without a folder lie in the trial's own."""
    home = f"seed{trial.seed}/{trial.task}"

    def path(x):
        return x if x.startswith("seed") else f"{home}/{x}"
    return Stage(path(name), tuple(map(path, needs)), tuple(map(path, leaves)),
                 0.5 + seconds / 30 if trial.recipe.quick else seconds, partial(in_worker, trial.seed, work))


def core_stages(t):
    """SFT, reward model, PPO, best-of-16 and measures.  PPO on the gold reward: systematic noise alone."""
    gold = ["ppo_gold"] if t.task == "synthetic" else []
    on_gold = [_stage(t, name, ("sft",), ("ckpt_ppo_gold.pt",), 30,
                      partial(t.train_ppo, name, reward="gold")) for name in gold]
    sampled = f"t{QUALITY:g}/*", f"t{DIVERSITY:g}/*"
    return [_stage(t, "sft", (f"seed{t.seed}/base",), ("ckpt_sft.pt",), 50, t.train_sft),
            _stage(t, "reward", ("sft",), ("ckpt_reward.pt",), 100, t.train_reward),
            _stage(t, "ppo", ("reward",), ("ckpt_ppo.pt",), 35, t.train_ppo), *on_gold,
            _stage(t, "sample", ("ppo", *gold), sampled, 100 if gold else 75, t.sample_all),
            _stage(t, "match", ("ppo",), ("matched/*", *(f"t{x:g}/*" for x in COLDER)), 16, t.match),
            _stage(t, "measure", ("sample", "match"), ("measures.json",), 25,
                   partial(measures.measure, t.here, t.task))]


def full_stages(t, with_shift):
    """PPO over its KL coefficient, other methods, and the measures of --full."""
    def stage(name, seconds, train):
        leaves = f"ckpt_{name}.pt", f"more/samples_{name}_test.jsonl"
        return _stage(t, name, ("reward",), leaves, seconds, partial(t.train_and_sample, name, train))
    trained = {name: (40, partial(t.train_ppo, name, beta=b))
               for b, name in TRAINED["PPO"].items() if b != BETA}
    trained |= {name: (40, partial(t.train_ppo, name, beta=b, kl_in_reward="k2"))
                for b, name in TRAINED["PPO, k2 in the reward"].items()}
    trained |= {name: (70 if m in dpo.LOSSES else 25, partial(t.train_method, name, m, b))
                for m in METHODS for b, name in TRAINED[m.upper()].items()}
    best_of = partial(frontier.sample_best_of, t.here, t.seed, t.recipe.inputs)
    far = _stage(t, "shift", ("sft",), ("shift.json",), 10,
                 partial(shift.measure, t.here, t.recipe.shift_prompts))
    drawn = tuple(f"best_of/samples_bon{n}_test.jsonl" for n in BEST_OF)
    return [*(stage(name, *of_name) for name, of_name in trained.items()), *([far] * with_shift),
            _stage(t, "best_of", ("reward",), drawn, 55, best_of),
            _stage(t, "optimum", ("reward",), ("optimum.json",), 500,
                   partial(optimum.measure, t.here, t.seed, t.recipe.inputs, t.recipe.optimum_pool)),
            _stage(t, "frontier", ("sample", "match", "best_of", "optimum", *trained), ("frontier.json",),
                   100, partial(frontier.measure, t.here)),
            _stage(t, "proxies", ("sample", "match", *trained), ("conditions.json",), 35,
                   partial(proxies.measure, t.here, t.recipe.content_sets)),
            _stage(t, "pass_at_k", PASS_AT_OF[2:], ("pass_at_k.json",), 20, t.sample_many)]
