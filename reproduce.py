"""The study from start to end, over seeds: results.md, results.json and figure.png.

    python reproduce.py                  # 2 seeds of the synthetic task: 16 minutes on 2 cores
    python reproduce.py --quick          # every stage at toy size in a minute: a check only
    python reproduce.py --full           # 5 seeds, what the reviewers asked for, other methods: 130 minutes
    python reproduce.py --full --out results        # the same, in place of the committed results
    python reproduce.py --task tldr --size gpu      # the same on a published model and real text

Everything goes to runs/, results to runs/results, toy ones to runs/quick.  At its end a run is compared with
the committed results/results.json (study/compare.py).  A run killed at any moment goes on where it stopped;
study/pipeline.py says how.

The stages of the synthetic study stand in study/stages.py, those of a published model in study/published.py,
each with its deviations from the paper.
"""
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from common.errors import check
from common.flags import Common, Count, Domain, Natural, Seed, launch, setup
from study import published, synthetic_study
from study.compare import COMMITTED
from study.stages import QUICK, Recipe

Rows = Annotated[int, Domain("an integer of at least 8", lambda x: x >= 8)]


@dataclass
class Config(Common):
    out: str = ""               # folder of the results; "" is runs/results, with --quick runs/quick.  For a
                                # published model folder of everything written; "" is runs/replication
    seed: Seed = 20             # of the first run; nothing was chosen on seeds 20 to 24
    seeds: Count = 2            # runs, with seeds --seed, --seed + 1, ...; at least 5 with --full
    full: bool = False          # also what the paper's reviewers asked for, and other methods than PPO
    jobs: Natural = 0           # stages side by side; 0: 2 of the synthetic task, one thread each, and 1 of a
                                # published model
    quick: bool = False         # toy sizes: a check of the code, not a result
    inputs: Rows = 100          # prompts of each test set
    base_rows: Rows = 24576     # posts that the base model is pretrained on
    sft_rows: Rows = 8192       # posts of SFT for each kind of noise
    prompts: Rows = 8000        # prompts with preferences
    ppo_steps: Count = 45       # rollout batches of PPO
    model: str = "HuggingFaceTB/SmolLM2-135M"   # with --task or --data: a hub name or a Hugging Face
                                # directory
    judge_data: str = ""        # folder whose preferences train the judge; "": the next seed's reward model
    size: Literal["cpu", "gpu", "paper"] = "gpu"    # flags of every stage, SIZES in study/published.py; gpu
                                                    # of an opt- model: the paper's
    sft: str = ""               # more flags for sft.py, as one string: "--max-new-tokens 64"
    reward: str = ""            # the same for reward.py
    ppo: str = ""               # for ppo.py: "--steps 10"
    bon: str = ""               # for bon.py
    encoder: str = ""           # of the embedding measures, as diversity.py's; "": the published model


def run_synthetic(cfg):
    n_seeds = max(cfg.seeds, 2 if cfg.quick else 5) if cfg.full else cfg.seeds
    sizes = Recipe(cfg.inputs, cfg.base_rows, cfg.sft_rows, cfg.prompts, ppo_steps=cfg.ppo_steps)
    recipe = replace(QUICK if cfg.quick else sizes, device=cfg.device, dtype=cfg.dtype,
                     save_every=cfg.save_every)
    out = Path(cfg.out or ("runs/quick" if cfg.quick else "runs/results"))
    check(not cfg.quick or out.resolve() != COMMITTED.parent,
          f"--quick --out {cfg.out}: toy numbers would replace the committed results; name another folder")
    synthetic_study.run_study(recipe, range(cfg.seed, cfg.seed + n_seeds), "runs", out, cfg.full,
                              cfg.jobs or 2)


def run_published(cfg):
    check(not (cfg.full or cfg.quick),
          "--full and --quick belong to the synthetic study, which runs without --task and --data")
    flags = {name: [*given, *getattr(cfg, name).split()]
             for name, given in published.flags_of(cfg.size, cfg.model).items()}
    study = published.Study(
        out=Path(cfg.out or "runs/replication"), model=cfg.model, task=cfg.task, data=cfg.data,
        judge_data=cfg.judge_data, size=cfg.size, flags=flags, encoder=cfg.encoder,
        seeds=range(cfg.seed, cfg.seed + cfg.seeds), device=cfg.device, dtype=cfg.dtype, threads=cfg.threads,
        jobs=cfg.jobs or 1)
    device, _ = setup(cfg)
    published.run_study(study, device)


def main(cfg):
    if cfg.task or cfg.data:
        run_published(cfg)
    else:
        check(cfg.model == Config.model and not cfg.judge_data,
              "--model and --judge-data: the study of a published model needs --task or --data too")
        run_synthetic(cfg)


if __name__ == "__main__":
    launch(main, Config, __doc__)
