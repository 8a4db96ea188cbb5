"""The synthetic study from start to end: run what is not done yet, then print numbers, tables and
pictures."""
from pathlib import Path

from common.files import write_json
from study import claims, figures, reviewers
from study.measures import Measures
from study.names import NOISE
from study.pipeline import cost, fingerprint, run_stages
from study.report import interval, write_tables
from study.stages import plan


def run_study(recipe, seeds, runs, out, full, jobs):
    """Stages leave their files in runs/study-<hash of settings and code>, results go to the folder `out`."""
    kind, settings = ("quick" if recipe.quick else "study"), recipe.settings()
    folder, out = Path(runs) / f"{kind}-{fingerprint(settings)}", Path(out)
    for path in (folder, out):
        path.mkdir(parents=True, exist_ok=True)
    run_stages(plan(recipe, seeds, folder, full), folder, jobs)
    measures = Measures(folder, seeds, NOISE)
    results = claims.results(measures, settings, cost(plan(recipe, seeds, folder), folder))
    write_json(out / "results.json", results)
    if full:
        of_all = cost(plan(recipe, seeds, folder, full), folder)
        numbers = reviewers.numbers(measures, folder, settings, of_all, results["claims"])
        write_json(out / "reviewers.json", numbers)
    written = write_tables(out) + figures.draw_all(out)
    for c in results["claims"]:
        print(f"{c['verdict']:28} {c['claim']} ({c['noise']}): {c['difference']} {interval(c['estimate'])}")
    print(f"wrote {', '.join(str(path) for path in written)}")
