"""The stages of the synthetic study: what is trained, sampled and measured for each seed, with the recipe's
numbers.

For each seed a base model is pretrained on posts with mixed reference noise.  Then for each kind of noise,
systematic and independent: SFT, a reward model, PPO, PPO on the gold reward, and best-of-16.  Seeds vary
initialisation, data order and sampling.  Posts, references and test sets are the same for all, so differences
are paired by prompt.

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
from common.files import write_json
from common.flags import Common, setup
from common.samples import read_samples, sample_path
from methods import dpo, grpo
from splits import synthetic_task
from study import frontier, growth, kinds, methods, proxies
from study.measures import encoder_of, measure, sample_files, vocabulary_of
from study.names import (BETA, BETAS, COVERAGE_OF, COVERED, DIVERSITY, ENTROPY, GRADED, INSTRUCT_SPLITS, K2,
                         LEARNING_RATES, METHODS, NOISE_OF, OPT, QUALITY, SETS, SFT_TEMPERATURES, SWEEP,
                         TYPICALITY, method_name, ppo_name)
from study.pipeline import Stage

# of the layers, with the embeddings, in SFT, as in PPO and the other methods (the paper: 0.8, in every
# stage).  Without it SFT pushes the embeddings of all words that it does not meet in one direction, because
# the head is the same matrix.  The reward model trains all layers: it judges better, and its head pushes no
# words
FROZEN = 0.5
LOG_EVERY = 1000        # steps of SFT; each line has a validation loss, which takes as long as ten steps
COLDER = tuple(t for t in SFT_TEMPERATURES if t not in (QUALITY, DIVERSITY))
MORE_TEMPERATURES = (0.4, 1.3)      # of PPO's policies beside 0.7 and 1, with --full; 1.3 of SFT too
SAMPLED = (f"t{QUALITY:g}", f"t{DIVERSITY:g}", "resampled")     # folders of `Trial.sample_all`


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
    instruct_base: tuple = (32768, 3)   # rows and epochs of the base model of the instruction task
    instruct_longer: int = 2    # times the PPO steps there, because PPO on the gold reward still rose
    shift_prompts: int = 500    # prompts a side of the measures of shift
    resampling: tuple = ()      # (draws, floors) of the measures of shift; (): study.shift's own
    content_sets: int = 40      # sets of outputs in the content test of the diversity measures
    quick: bool = False         # toy sizes: a check of the code, not a result
    device: str = "auto"
    dtype: str = "fp32"
    save_every: float = 60.0

    def settings(self):
        return {k: v for k, v in asdict(self).items() if k != "save_every"}


QUICK = Recipe(inputs=12, base_rows=1024, sft_rows=256, prompts=64, held_out=24, ppo_steps=3, batch_size=16,
               pool=32, instruct_base=(1024, 1), shift_prompts=64, resampling=(20, 4), content_sets=10,
               quick=True)


class Trial:
    """One task and one seed: the methods are the work of its stages, on files in the folder `here`."""

    def __init__(self, recipe, seed, folder, task, name="", shape="tiny"):
        self.recipe, self.seed, self.task, self.name, self.shape = recipe, seed, task, name or task, shape
        self.here = Path(folder) / f"seed{seed}" / self.name
        # the two kinds of noise share a base model
        self.base = (self.here.parent if self.name in NOISE_OF else self.here) / "ckpt_base.pt"
        self.same = dict(seed=seed, threads=1, device=recipe.device, dtype=recipe.dtype,
                         save_every=recipe.save_every, quiet=True)

    def checkpoint(self, name):
        return str(self.base if name == "base" else self.here / f"ckpt_{name}.pt")

    # -------- training

    def pretrain(self, task, rows, epochs=1):
        sft.main(sft.Config(task=task, rows=rows, epochs=epochs, shape=self.shape, out=str(self.base),
                            log_every=LOG_EVERY, **self.same))

    def train_sft(self):
        sft.main(sft.Config(model=str(self.base), task=self.task, rows=self.recipe.sft_rows, lr=1.5e-3,
                            freeze=FROZEN, out=self.checkpoint("sft"), log_every=LOG_EVERY, **self.same))

    def train_reward(self, name="reward", typicality=0.0):
        reward.main(reward.Config(model=self.checkpoint("sft"), freeze=0, prompts=self.recipe.prompts,
                                  held_out=self.recipe.held_out, typicality=typicality,
                                  pairs=str(self.here / f"pairs_{name}.jsonl"), out=self.checkpoint(name),
                                  **self.same))

    def train_ppo(self, name, judge="reward", longer=1, beta=BETA, lr=LEARNING_RATES["ppo"], **flags):
        """judge: name of the reward model's checkpoint, or gold."""
        ppo.main(ppo.Config(model=self.checkpoint("sft"),
                            reward="gold" if judge == "gold" else self.checkpoint(judge), kl_coef=beta, lr=lr,
                            steps=longer * self.recipe.ppo_steps, batch_size=self.recipe.batch_size,
                            out=self.checkpoint(name), **flags, **self.same))

    def train_method(self, method, beta, name="", lr=0.):
        """DPO or IPO on the reward model's pairs, RLOO or GRPO against it with as many rollouts as PPO's."""
        out = dict(out=self.checkpoint(name or method_name(method, beta)), lr=lr or LEARNING_RATES[method],
                   model=self.checkpoint("sft"), **self.same)
        if method in dpo.LOSSES:
            dpo.main(dpo.Config(loss=method, beta=beta, prompts=self.recipe.prompts,
                                held_out=self.recipe.held_out,
                                pairs=str(self.here / "pairs_reward.jsonl"), **out))
        else:
            grpo.main(grpo.Config(advantage=method, kl_coef=beta, reward=self.checkpoint("reward"),
                                  steps=self.recipe.ppo_steps, batch_size=self.recipe.batch_size // 8,
                                  **out))

    # -------- sampling

    def sample(self, name, temperature, splits="", folder="", inputs=0, **flags):
        """Sample files of one policy in `folder`, t<temperature> by default; with the flag `reward`
        best-of-16's too."""
        bon.main(bon.Config(model=self.checkpoint(name), task=self.task, splits=splits,
                            temperature=temperature, inputs=inputs or self.recipe.inputs,
                            out=str(self.here / (folder or f"t{temperature:g}")), **flags, **self.same))

    def sample_best_of(self):
        """SFT's outputs and best-of-16's.  Where diversity is measured best-of-16 comes from independent
        samples, and once more, in the folder `resampled`, from one pool, as the authors draw it."""
        scored = dict(reward=self.checkpoint("reward"), pool=self.recipe.pool)
        self.sample("sft", QUALITY, **scored)
        self.sample("sft", DIVERSITY, "test", folder="resampled", **scored)
        self.sample("sft", DIVERSITY, "test", **scored | dict(pool=256, independent=True))

    def sample_all(self, names=("base", "ppo", "ppo_gold")):
        self.sample_best_of()
        for name in names:
            self.sample(name, QUALITY)
            self.sample(name, DIVERSITY, "test")

    def sweep(self, beta):
        """PPO with another KL coefficient, and its samples."""
        self.train_ppo(ppo_name(beta), beta=beta)
        for temperature in (QUALITY, DIVERSITY):
            self.sample(ppo_name(beta), temperature, "test", f"more{temperature:g}")

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
        task = synthetic_task(self.task)
        return float(np.mean([task.gold_diversity(row["outputs"])[0] for row in rows]))

    # -------- with --full

    def graded(self):
        """SFT, best-of-16 and PPO on the test sets between the study's."""
        scored = dict(reward=self.checkpoint("reward"), pool=self.recipe.pool)
        for name, flags in (("sft", scored), ("ppo", {})):
            self.sample(name, QUALITY, ",".join(GRADED), folder="graded", **flags)
        growth.measure_graded(self.here)

    def shift(self, splits):
        draws = dict(zip(("draws", "floors"), self.recipe.resampling))
        growth.measure_shift(self.here, synthetic_task(self.task), splits, self.recipe.shift_prompts, **draws)

    def temperatures(self):
        """SFT and PPO's policies at MORE_TEMPERATURES."""
        for name in ("sft", *map(ppo_name, BETAS)):
            for temperature in MORE_TEMPERATURES:
                if name != "sft" or temperature not in SFT_TEMPERATURES:
                    self.sample(name, temperature, "test", f"more{temperature:g}")

    def method(self, name, train, everywhere=False):
        """Another method: its training and its samples, at the temperature of quality of all test sets if
        `everywhere`, else in distribution."""
        train()
        self.sample(name, QUALITY, "" if everywhere else "test", f"methods{QUALITY:g}")
        self.sample(name, DIVERSITY, "test", f"methods{DIVERSITY:g}")

    def typical(self, a):
        """PPO on annotators who like what is typical."""
        name, judge = method_name("typical", a), method_name("typical", a).replace("ppo", "reward")
        self.train_reward(judge, a)
        self.method(name, partial(self.train_ppo, name, judge=judge))

    def coverage(self):
        for name in COVERAGE_OF:
            self.sample(name, DIVERSITY, "test", folder="many", n=COVERED)
        kinds.measure_coverage(self.here)

    def conditions(self):
        """conditions.json: what study.proxies needs of every sample file on the test prompts."""
        encode, _ = encoder_of(self.checkpoint("sft"))
        vocabulary = vocabulary_of(synthetic_task(self.task))
        found = [proxies.condition(read_samples(path), vocabulary, encode, self.recipe.content_sets)
                 for path in sample_files(self.here)]
        write_json(self.here / "conditions.json",
                   {"conditions": found, "form": proxies.form_test(vocabulary, encode)}, indent=None,
                   allow_nan=True)


# --------------------------------------------------------------------------------------------------- the plan
# Seconds are those of one thread of a 2-core server.

def plan(recipe, seeds, folder, full=False):
    """All stages of the study, with `full` those that answer the paper's reviewers and other methods."""
    stages = []
    for seed in seeds:
        trials = {task: Trial(recipe, seed, folder, task) for task in (*NOISE_OF, "instruct")}
        todo = base_stages(trials["synthetic"]) + [
            line for task in NOISE_OF for line in task_stages(trials[task], f"seed{seed}/base")]
        if full:
            first = seed == seeds[0]        # the shift of the prompts is the same for all seeds
            todo += [line for task in NOISE_OF for line in full_stages(trials[task], first)]
            todo += sweep_stages(trials["synthetic"])
            todo += frontier_stages(trials["synthetic"])
            todo += instruct_stages(trials["instruct"], first)
            todo += opt_stages(Trial(recipe, seed, folder, "synthetic", OPT, "tiny-opt"))
            todo += [line for task in NOISE_OF for line in method_stages(trials[task])]
        stages += todo
    return stages


def in_worker(seed, work):
    """What every stage starts with: one thread, fixed seeds, deterministic algorithms."""
    setup(Common(seed=seed, threads=1))
    work()


def _stage(trial, name, needs, leaves, seconds, work, home=""):
    """A stage of a trial in the folder `home`, its own by default.  needs: names of stages, those in the same
    folder without it; leaves: files and folders there, or patterns of them."""
    home = home or f"seed{trial.seed}/{trial.name}"
    return Stage(f"{home}/{name}", tuple(n if "/" in n else f"{home}/{n}" for n in needs),
                 tuple(f"{home}/{path}" for path in leaves),
                 0.5 + seconds / 30 if trial.recipe.quick else seconds, partial(in_worker, trial.seed, work))


def base_stages(t):
    """The base model that both kinds of noise share."""
    pretrain = partial(t.pretrain, "synthetic-mixed", t.recipe.base_rows)
    return [_stage(t, "base", (), ("ckpt_base.pt",), 140, pretrain, home=f"seed{t.seed}")]


def task_stages(t, base):
    """The study's stages on one task."""
    on_gold = partial(t.train_ppo, "ppo_gold", judge="gold")
    return [_stage(t, "sft", (base,), ("ckpt_sft.pt",), 50, t.train_sft),
            _stage(t, "reward", ("sft",), ("ckpt_reward.pt",), 100, t.train_reward),
            _stage(t, "ppo", ("reward",), ("ckpt_ppo.pt",), 35, partial(t.train_ppo, "ppo")),
            _stage(t, "ppo_gold", ("sft",), ("ckpt_ppo_gold.pt",), 30, on_gold),
            _stage(t, "sample", ("ppo", "ppo_gold"), SAMPLED, 100, t.sample_all),
            _stage(t, "match", ("ppo",), ("matched", *(f"t{x:g}" for x in COLDER)), 16, t.match),
            _stage(t, "measure", ("sample", "match"), ("measures.json",), 25,
                   partial(measure, t.here, t.task))]


def sweep_stages(t):
    return [_stage(t, name, ("reward",), (f"ckpt_{name}.pt", f"more*/samples_{name}_test.jsonl"), 40,
                   partial(t.sweep, beta)) for beta, name in zip(SWEEP, map(ppo_name, SWEEP))]


def full_stages(t, first):
    shift = _stage(t, "shift", ("sft",), ("shift.json",), 40, partial(t.shift, [*SETS, *GRADED]))
    return [_stage(t, "graded", ("ppo",), ("graded.json",), 50, t.graded), *([shift] if first else [])]


def frontier_stages(t):
    sampled = ("temperatures", "sample", "match")
    policies = tuple(map(ppo_name, BETAS))
    best_of = partial(frontier.sample_best_of, t.here, t.seed, t.recipe.inputs)
    more = tuple(f"more{x:g}" for x in MORE_TEMPERATURES)
    return [_stage(t, "temperatures", policies, more, 15, t.temperatures),
            _stage(t, "best_of", ("reward",), ("best_of_*.jsonl",), 55, best_of),
            _stage(t, "frontier", (*sampled, "best_of"), ("frontier.json",), 105,
                   partial(frontier.measure_frontier, t.here)),
            _stage(t, "proxies", sampled, ("conditions.json",), 35, t.conditions),
            _stage(t, "coverage", ("ppo", "ppo_b0.3"), ("coverage.json",), 20, t.coverage)]


def instruct_stages(t, first):
    rows, epochs = t.recipe.instruct_base
    pretrain = partial(t.pretrain, "instruct", rows, epochs)
    train_ppo = partial(t.train_ppo, longer=t.recipe.instruct_longer)
    on_gold = partial(train_ppo, "ppo_gold", judge="gold")
    shift = _stage(t, "shift", ("sft",), ("shift.json",), 10, partial(t.shift, INSTRUCT_SPLITS))
    return [_stage(t, "base", (), ("ckpt_base.pt",), 250, pretrain),
            _stage(t, "sft", ("base",), ("ckpt_sft.pt",), 24, t.train_sft),
            _stage(t, "reward", ("sft",), ("ckpt_reward.pt",), 43, t.train_reward),
            _stage(t, "ppo", ("reward",), ("ckpt_ppo.pt",), 31, partial(train_ppo, "ppo")),
            _stage(t, "ppo_gold", ("sft",), ("ckpt_ppo_gold.pt",), 29, on_gold),
            _stage(t, "sample", ("ppo", "ppo_gold"), SAMPLED, 35, t.sample_all),
            _stage(t, "measure", ("sample",), ("measures.json",), 10,
                   partial(measure, t.here, t.task)),
            *([shift] if first else [])]


def opt_stages(t):
    """The study with systematic noise on a base model of another kind."""
    pretrain = partial(t.pretrain, "synthetic-mixed", t.recipe.base_rows)
    return [_stage(t, "base", (), ("ckpt_base.pt",), 125, pretrain),
            _stage(t, "sft", ("base",), ("ckpt_sft.pt",), 42, t.train_sft),
            _stage(t, "reward", ("sft",), ("ckpt_reward.pt",), 94, t.train_reward),
            _stage(t, "ppo", ("reward",), ("ckpt_ppo.pt",), 30, partial(t.train_ppo, "ppo")),
            _stage(t, "sample", ("ppo",), SAMPLED, 90, partial(t.sample_all, ("base", "ppo"))),
            _stage(t, "measure", ("sample",), ("measures.json",), 10, partial(measure, t.here, t.task))]


def method_stages(t):
    """Other methods: all with systematic noise; of two, with the usual beta, with independent noise too."""
    def stage(name, needs, seconds, work):
        return _stage(t, name, needs, (f"ckpt_{name}.pt", f"methods*/samples_{name}_*.jsonl"), seconds, work)

    def of_method(method, beta):
        name = method_name(method, beta)
        work = partial(t.method, name, partial(t.train_method, method, beta), everywhere=beta == BETA)
        return stage(name, ("reward",), 70 if method in dpo.LOSSES else 25, work)

    def of_ppo(name, **flags):
        return stage(name, ("reward",), 40, partial(t.method, name, partial(t.train_ppo, name, **flags)))
    if t.task != "synthetic":
        stages = [of_method(method, BETA) for method in ("dpo", "rloo")]
    else:
        stages = [of_method(method, beta) for method, betas in METHODS.items() for beta in betas]
        stages += [of_ppo(method_name("entropy", c), ent_coef=c) for c in ENTROPY]
        stages += [of_ppo(method_name("k2_b", b), beta=b, kl_in_reward="k2") for b in K2]
        stages += [stage(method_name("typical", a), ("sft",), 200, partial(t.typical, a)) for a in TYPICALITY]
    done = tuple(stage.name.rpartition("/")[2] for stage in stages)
    return [*stages, _stage(t, "methods", ("sample", *done), ("methods.json",), 90,
                            partial(methods.measure, t.here))]
