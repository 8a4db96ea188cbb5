"""The study from start to end, over seeds: results.md, results.json and pictures.

    python reproduce.py                  # 2 seeds of the synthetic task: 10 minutes on 2 cores
    python reproduce.py --quick          # every stage at toy size in a minute: a check only
    python reproduce.py --full           # 5 seeds, both kinds of noise, other methods, 80 minutes
    python reproduce.py --full --out results        # the same, in place of the committed results
    python reproduce.py --task tldr --size gpu      # the same on a published model and real text

Stages go to runs/study-v<recipe>-<settings>, results to runs/results, toy ones to runs/quick.  A run killed at
any moment goes on where it stopped; study/pipeline.py says how.

The stages of the synthetic study stand in study/stages.py, those of a published model in study/published.py,
each with its deviations from the paper.
"""
import hashlib
import json
import shutil
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from common.errors import UserError
from common.files import lock, write_json
from common.flags import Common, Count, Domain, Natural, Seed, arg, launch, setup
from common.samples import WIDTH
from common.stats import Interval
from study import claims, figures, published, report
from study.pipeline import ROOT, commit, cost, jobs_that_fit, run_stages
from study.stages import QUICK, RECIPE, Recipe, plan

Rows = Annotated[int, Domain("an integer of at least 8", lambda x: x >= 8)]


@dataclass
class Config(Common):
    out: str = arg("", "folder of the results; '' is runs/results, with --quick runs/quick.  For a published "
                       "model folder of everything written; '' is runs/replication")
    seed: Seed = arg(20, "of the first run; nothing was chosen on seeds 20 to 24")
    seeds: Count = arg(2, "runs, with seeds --seed, --seed + 1, ...; at least 5 with --full")
    full: bool = arg(False, "also independent noise, other methods, the shift, and tests of the measures")
    jobs: Natural = arg(0, "stages side by side; 0: as many as cores and memory allow, 1 of a published model")
    anew: bool = arg(False, "start over, without the stages that an earlier run left")
    quick: bool = arg(False, "toy sizes: a check of the code, not a result")
    inputs: Rows = arg(100, "prompts of each test set")
    base_rows: Rows = arg(24576, "posts that the base model is pretrained on")
    sft_rows: Rows = arg(8192, "posts of SFT for each kind of noise")
    prompts: Rows = arg(8000, "prompts with preferences")
    ppo_steps: Count = arg(45, "rollout batches of PPO")
    model: str = arg("HuggingFaceTB/SmolLM2-135M",
                     "with --task or --data: a hub name or a Hugging Face directory")
    judge_data: str = arg("", "folder whose preferences train the judge; '': the next seed's reward model")
    size: Literal["cpu", "gpu", "paper"] = arg(
        "gpu", "flags of every stage, SIZES in study/published.py; gpu of an opt- model: the paper's")
    sft: str = arg("", "more flags for sft.py, as one string: '--max-new-tokens 64'")
    reward: str = arg("", "the same for reward.py")
    ppo: str = arg("", "for ppo.py: '--steps 10'")
    bon: str = arg("", "for bon.py")
    encoder: str = arg("", "of the embedding measures, as diversity.py's; '': the published model")


# ----------------------------------------------------------------------------------------- the synthetic task

def folder_of(recipe):
    """Where the stages of a recipe lie: its settings and the recipe's version decide, not the code."""
    settings = hashlib.sha256(json.dumps(recipe.settings(), sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / f"{'quick' if recipe.quick else 'study'}-v{RECIPE}-{settings}"


def run_synthetic(cfg):
    n_seeds = max(cfg.seeds, 2 if cfg.quick else 5) if cfg.full else cfg.seeds
    sizes = Recipe(cfg.inputs, cfg.base_rows, cfg.sft_rows, cfg.prompts, ppo_steps=cfg.ppo_steps)
    recipe = replace(QUICK if cfg.quick else sizes, device=cfg.device, dtype=cfg.dtype,
                     save_every=cfg.save_every)
    seeds, folder = range(cfg.seed, cfg.seed + n_seeds), folder_of(recipe)
    out = Path(cfg.out or ("runs/quick" if cfg.quick else "runs/results"))
    if cfg.quick and out.resolve() == ROOT / "results":
        raise UserError(f"--quick --out {cfg.out}: toy numbers would replace the committed results; "
                        "name another folder")
    for path in (folder, out):
        path.mkdir(parents=True, exist_ok=True)
    if cfg.anew:
        with lock(folder / "running.lock"):
            shutil.rmtree(folder)
    stages = plan(recipe, seeds, folder, cfg.full)
    run_stages(stages, folder, cfg.jobs or jobs_that_fit())
    results = {"settings": recipe.settings() | {"seeds": list(seeds), "full": cfg.full}, "recipe": RECIPE,
               "commit": commit(), "cost": cost(stages, folder), **claims.results(folder, seeds, cfg.full)}
    write_json(out / "results.json", results)
    written = [str(path.relative_to(out)) for path in report.write_tables(out) + figures.draw_all(out)]
    print("\n".join([*(checked(stages) if cfg.quick else verdicts(results["claims"])),
                     *fit(f"wrote to {out}: results.json, {', '.join(written)}", 4)]))


def fit(text, indent):
    """Lines that fit a screen; all but the first start with `indent` spaces."""
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)


def verdicts(rows):
    """Lines for the screen: each claim's verdict and, below it, the differences that it rests on."""
    lines = []
    for c in rows:
        source = "our statement" if c["section"] == claims.OURS else f"paper, {c['section']}"
        lines += fit(f"{c['verdict']:10} {c['claim']} ({source})", 11)
        found = "; ".join(f"{e['of']} {Interval(e['mean'], e['low'], e['high']):+.2f}" for e in c["found"])
        lines += fit(f"{'':11}{c['here']}: {found}" if found else f"{'':11}needs: {c['here']}", 11)
    return lines


def checked(stages):
    return [f"checked: {len(stages)} stages at toy size, and tables and pictures of what they left",
            "toy numbers decide nothing; python reproduce.py makes real ones"]


# ------------------------------------------------------------------------------------------ a published model

def run_published(cfg):
    if cfg.full or cfg.quick:
        raise UserError("--full and --quick belong to the synthetic study, without --task and --data")
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
    elif cfg.model != Config.model or cfg.judge_data:
        raise UserError("--model and --judge-data: the study of a published model needs --task or --data too")
    else:
        run_synthetic(cfg)


if __name__ == "__main__":
    launch(main, Config, __doc__)
