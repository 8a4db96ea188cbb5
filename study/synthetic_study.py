"""The synthetic study from start to end: run what is not done yet, then print numbers, tables and
pictures."""
from pathlib import Path

from common.files import write_json
from common.stats import Interval
from study import claims, compare, figures, reviewers
from study.compare import fit
from study.measures import Measures
from study.names import NOISE_OF
from study.pipeline import cost, fingerprint, run_stages
from study.report import write_tables
from study.stages import plan

TOY = "toy sizes: the verdicts below say nothing about the paper"


def run_study(recipe, seeds, runs, out, full, jobs):
    """Stages leave their files in runs/study-<hash of settings and code>, results go to the folder `out`."""
    kind, settings = ("quick" if recipe.quick else "study"), recipe.settings()
    folder, out = Path(runs) / f"{kind}-{fingerprint(settings)}", Path(out)
    for path in (folder, out):
        path.mkdir(parents=True, exist_ok=True)
    run_stages(plan(recipe, seeds, folder, full), folder, jobs)
    measures = Measures(folder, seeds, NOISE_OF)
    results = claims.results(measures, settings, folder.name, cost(plan(recipe, seeds, folder), folder))
    said = on_screen(results)       # before the new results may replace the committed ones
    write_json(out / "results.json", results)
    if full:
        of_all = cost(plan(recipe, seeds, folder, full), folder)
        numbers = reviewers.numbers(measures, folder, settings, of_all, results["claims"])
        write_json(out / "reviewers.json", numbers)
    drawn = [str(path.relative_to(out)) for path in write_tables(out) + figures.draw_all(out)]
    written = ["results.json", *(["reviewers.json"] if full else []), *drawn]
    print("\n".join([*said, *fit(f"wrote to {out}: {', '.join(written)}", 4)]))


def on_screen(results):
    """Lines for the screen: the verdicts and, unless the sizes are toy ones, how the results differ from the
    committed ones."""
    if results["settings"]["quick"]:
        return [TOY, *verdicts(results)]
    return [*verdicts(results), *compare.with_committed(results)]


def verdicts(results):
    """Verdict, estimate and claim, one list for each kind of noise."""
    lines = []
    for task, noise in NOISE_OF.items():
        lines.append(f"{noise}: verdict, difference [95 % interval], claim")
        for c in results["claims"]:
            if c["task"] == task:
                e = c["estimate"]
                difference = format(Interval(e["mean"], e["low"], e["high"]), "+.2f")
                lines += fit(f"  {c['verdict']:27} {difference:20} {c['claim']}", 51)
    return lines
