"""The learning rate of each method, chosen with the same effort: LEARNING_RATES in study/names.py.

    python -m study.tuning               # three rates a method, two seeds, validation prompts: 15 minutes

Each method trains at beta 0.1 with three learning rates.  The one with the highest gold reward on validation
prompts, at temperature 1, mean over seeds, is chosen.  The seeds are those of no reported result, and no test
prompt is looked at.  Beta itself is not chosen: the study shows every method over its betas.
"""
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from common.files import write_json
from common.flags import Common, Count, Seed, launch
from common.samples import read_samples, sample_path
from common.tables import text_table
from generalisation import gold_scores
from study.names import BETA, DIVERSITY
from study.pipeline import Stage, fingerprint, run_stages
from study.stages import QUICK, Recipe, Trial, in_worker

TRIED = {"ppo": (3e-4, 1e-3, 3e-3), "dpo": (1.5e-4, 5e-4, 1.5e-3), "ipo": (1.5e-4, 5e-4, 1.5e-3),
         "rloo": (3e-4, 1e-3, 3e-3), "grpo": (3e-4, 1e-3, 3e-3)}


@dataclass
class Config(Common):
    seed: Seed = 100            # of the first run
    seeds: Count = 2            # runs, with seeds --seed, --seed + 1, ...
    inputs: Count = 100         # validation prompts
    jobs: Count = 2             # stages side by side, one thread each
    quick: bool = False         # toy sizes: a check of the code


def try_rate(trial, method, lr, inputs):
    """One training run and its samples of validation prompts."""
    name = f"{method}_lr{lr:g}"
    if method == "ppo":
        trial.train_ppo(name, lr=lr)
    else:
        trial.train_method(method, BETA, name, lr)
    trial.sample(name, DIVERSITY, "validation", inputs=inputs)


def plan(recipe, seeds, folder, inputs):
    stages = []
    for seed in seeds:
        t, home = Trial(recipe, seed, folder, "synthetic"), f"seed{seed}/synthetic"
        todo = [("base", "", 139, partial(t.pretrain, "synthetic-mixed", recipe.base_rows)),
                ("sft", "base", 30, t.train_sft), ("reward", "sft", 65, t.train_reward),
                *((f"{method}_lr{lr:g}", "reward", 45, partial(try_rate, t, method, lr, inputs))
                  for method, rates in TRIED.items() for lr in rates)]
        stages += [Stage(f"{home}/{name}", (f"{home}/{needs}",) if needs else (), (), seconds,
                         partial(in_worker, seed, work)) for name, needs, seconds, work in todo]
    return stages


def found(folder, seeds):
    """{beta, seeds, tried: [{method, lr, gold_reward: of each seed, mean}], chosen: {method: lr}}."""
    lines = []
    for method, rates in TRIED.items():
        for lr in rates:
            rewards = []
            for seed in seeds:
                here = Path(folder) / f"seed{seed}" / "synthetic"
                rows = read_samples(sample_path(here / f"t{DIVERSITY:g}", f"{method}_lr{lr:g}", "validation"))
                rewards.append(float(np.mean(gold_scores(rows)[0])))
            lines.append({"method": method, "lr": lr, "gold_reward": rewards,
                          "mean": float(np.mean(rewards))})
    best = {method: max((x for x in lines if x["method"] == method), key=lambda x: x["mean"])["lr"]
            for method in TRIED}
    return {"beta": BETA, "seeds": list(seeds), "tried": lines, "chosen": best}


def main(cfg):
    recipe, seeds = QUICK if cfg.quick else Recipe(), range(cfg.seed, cfg.seed + cfg.seeds)
    folder = Path("runs") / f"tuning-{fingerprint(recipe.settings())}"
    folder.mkdir(parents=True, exist_ok=True)
    run_stages(plan(recipe, seeds, folder, cfg.inputs), folder, cfg.jobs)
    results = found(folder, seeds)
    print(text_table(["method", "lr", "gold reward, seed by seed", "mean", ""],
                     [[x["method"], f"{x['lr']:g}", ", ".join(f"{r:.2f}" for r in x["gold_reward"]),
                       f"{x['mean']:.2f}",
                       "chosen" * (results["chosen"][x["method"]] == x["lr"])] for x in results["tried"]],
                     labels=1))
    write_json(folder / "tuning.json", results)
    print(f"wrote {folder / 'tuning.json'}")


if __name__ == "__main__":
    launch(main, Config, __doc__)
