"""The study from start to end, over seeds: results.json, results.md and figures.

    python reproduce.py                  # 2 seeds of the synthetic task, systematic noise
    python reproduce.py --quick          # every stage at toy size in a minute: a check only
    python reproduce.py --full           # 5 seeds, both kinds of noise, other methods, other measures
    python reproduce.py --full --out results        # the same, in place of the committed results
    python reproduce.py --task tldr --size gpu      # the same on a published model and real text

Everything goes to runs/, results to runs/results, toy ones to runs/quick.  A run killed at any moment goes on
where it stopped.  The stages of the synthetic study stand in study/stages.py, those of a published model in
study/published.py, each with its deviations from the paper.
"""
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from common.errors import UserError
from common.files import write_json
from common.flags import Common, Count, Domain, Natural, Seed, arg, launch
from study import claims, figures, frontier, proxies, published, report, shift
from study.measures import Measures, tables
from study.names import NOISE_OF
from study.pipeline import ROOT, jobs_that_fit, origin, run_stages
from study.stages import QUICK, RECIPE, Recipe, plan

Rows = Annotated[int, Domain("an integer of at least 8", lambda x: x >= 8)]


@dataclass
class Config(Common):
    out: str = arg("", "folder of the results; '' is runs/results, with --quick runs/quick.  For a published "
                       "model folder of everything written; '' is runs/replication")
    seed: Seed = arg(20, "of the first run; nothing was chosen on seeds 20 to 24")
    seeds: Count = arg(2, "runs, with seeds --seed, --seed + 1, ...; at least 5 with --full")
    full: bool = arg(False, "also independent noise, other methods and measures")
    jobs: Natural = arg(0, "stages side by side, one thread each; 0: as many as cores and memory allow, of a "
                           "published model 1")
    quick: bool = arg(False, "toy sizes: a check of the code, not a result")
    plan: bool = arg(False, "of a published model: print stages, hours and memory, and run none")
    anew: bool = arg(False, "start over, instead of going on with the stages that stand")
    inputs: Rows = arg(100, "prompts of each test set")
    model: str = arg("HuggingFaceTB/SmolLM2-135M", "with --task or --data: a hub name or a Hugging Face "
                                                   "directory")
    judge: str = arg("", "sbert:NAME: similarity to the references, by which policies are judged, and of "
                         "tldr-short pairs labelled; '': the next seed's reward model")
    size: Literal["cpu", "gpu", "paper"] = arg("gpu", "flags of every stage, SIZES in study/published.py")
    sft: str = arg("", "more flags for sft.py, as one string: '--max-new-tokens 64'")
    label: str = arg("", "the same for tasks/annotators.py, with --judge")
    reward: str = arg("", "for reward.py")
    ppo: str = arg("", "for ppo.py: '--steps 10'")
    dpo: str = arg("", "for methods/dpo.py")
    bon: str = arg("", "for bon.py")
    encoder: str = arg("", "of the embedding measures, as diversity.py's; '': the published model")


def results_of(folder, recipe, seeds, full, stages):
    """Everything in results.json, from what the stages left in a folder."""
    measures, more = Measures(folder, seeds, NOISE_OF if full else list(NOISE_OF)[:1]), {}
    if full:
        more = frontier.numbers(folder, seeds) | {"shift": shift.numbers(measures, folder),
                                                  "proxies": proxies.numbers(folder, seeds)}
    return {"settings": recipe.settings() | {"seeds": list(seeds), "full": full}, "recipe": RECIPE,
            **origin(stages, folder), "claims": claims.claims(measures, more.get("beta")), **tables(measures),
            **more}


def run_synthetic(cfg):
    recipe = replace(QUICK if cfg.quick else Recipe(inputs=cfg.inputs), device=cfg.device, dtype=cfg.dtype,
                     save_every=cfg.save_every)
    seeds = range(cfg.seed, cfg.seed + (max(cfg.seeds, 2 if cfg.quick else 5) if cfg.full else cfg.seeds))
    out = Path(cfg.out or ("runs/quick" if cfg.quick else "runs/results"))
    if cfg.quick and out.resolve() == ROOT / "results":
        raise UserError(f"--quick --out {cfg.out}: toy numbers would replace the committed results; name "
                        "another folder")
    name = hashlib.sha256(json.dumps(recipe.settings(), sort_keys=True).encode()).hexdigest()[:8]
    folder = Path("runs") / f"{'quick' if cfg.quick else 'study'}-v{RECIPE}-{name}"
    stages = plan(recipe, seeds, folder, cfg.full)
    run_stages(stages, folder, cfg.jobs or jobs_that_fit(), cfg.anew)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "results.json", results_of(folder, recipe, seeds, cfg.full, stages))
    written = [out / "results.json", *report.write(out), *figures.draw_all(out)]
    if not cfg.quick:
        print("\n".join(report.on_screen(out)))
    print(f"wrote {', '.join(str(path) for path in written)}")
    if cfg.quick:
        print(f"Checked: all {len(stages)} stages ran to their end, and tables and pictures were written.  "
              "Toy numbers say nothing about the paper")


def main(cfg):
    if (cfg.task or cfg.data) and (cfg.full or cfg.quick):
        raise UserError("--full and --quick belong to the synthetic study, which runs without --task and "
                        "--data")
    if cfg.task or cfg.data:
        published.run_study(replace(cfg, out=cfg.out or "runs/replication", jobs=cfg.jobs or 1))
    elif cfg.model != Config.model or cfg.judge or cfg.plan:
        raise UserError("--model, --judge and --plan: the study of a published model needs --task or --data")
    else:
        run_synthetic(cfg)


if __name__ == "__main__":
    launch(main, Config, __doc__)
