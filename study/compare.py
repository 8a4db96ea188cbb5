"""Two runs of the synthetic study side by side: which verdicts agree, and how far the main numbers moved.

    python -m study.compare A.json B.json       # two results.json: A is "here", B is "there"

`python reproduce.py` prints the same at its end, with the committed results/results.json as "there".
"""
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.errors import UserError, check, first_line
from common.files import loads
from common.flags import Common, launch
from common.stats import Interval
from study.claims import GOLD, UNDECIDED
from study.names import DIVERSITY, NOISE_OF, POLICIES, QUALITY, pick
from study.pipeline import ROOT

COMMITTED = ROOT / "results" / "results.json"
COMPARED = ("sft", "bon", "ppo")
WIDTH = 110         # columns of a line on screen


@dataclass
class Config(Common):
    files: list = None          # two results.json files, "here" and "there"


class Outcome(NamedTuple):
    """What is compared of one results.json."""
    seeds: list
    recipe: dict            # {setting: its value as JSON}, all settings but the seeds
    verdicts: dict          # {(claim, noise): verdict}
    numbers: dict           # {(policy, noise): (Interval of its win rate, Interval of its gold diversity)}


# ------------------------------------------------------------------------------------------------- the files

def read(path):
    """The Outcome of a results.json.  Raises UserError if it cannot be read or holds something else."""
    try:
        return outcome(loads(Path(path).read_bytes()))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; python reproduce.py writes such a file") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: these are not the results of a study ({type(error).__name__}: "
                        f"{first_line(error)})") from None


def outcome(results):
    """The Outcome of everything in a results.json."""
    settings = dict(results["settings"])
    seeds = list(settings.pop("seeds"))
    verdicts = {(str(c["claim"]), str(c["noise"])): str(c["verdict"]) for c in results["claims"]}
    numbers = {(policy, noise): main_numbers(results, policy, task)
               for task, noise in NOISE_OF.items() for policy in COMPARED}
    # as JSON, in which a tuple of a run and the list of a file are equal
    recipe = {name: json.dumps(value) for name, value in settings.items()}
    return Outcome(seeds, recipe, verdicts, numbers)


def main_numbers(results, policy, task):
    """(win rate, gold diversity per input) of a policy on the test set in distribution: two Intervals."""
    where = dict(task=task, policy=policy, split="test")
    return (interval_of(pick(results["win_rate"], **where, temperature=QUALITY)),
            interval_of(pick(results["diversity"], **where, temperature=DIVERSITY, measure=GOLD)))


def interval_of(e):
    """The Interval of an estimate, without ends where it has none, as with one seed."""
    if e["low"] is None:
        return Interval(float(e["mean"]), None, None)
    return Interval(float(e["mean"]), float(e["low"]), float(e["high"]))


# ------------------------------------------------------------------------------------------------- the lines

def fit(text, indent):
    """Lines of at most WIDTH columns; all but the first start with `indent` spaces."""
    return textwrap.wrap(text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)


def of_runs(here, there):
    """The lines that compare two Outcomes."""
    lines = [seeds_in_words(here.seeds, there.seeds), recipes_in_words(here.recipe, there.recipe),
             *of_verdicts(here.verdicts, there.verdicts), *of_numbers(here.numbers, there.numbers)]
    return [part for line in lines for part in fit(f"  {line}", 6)]


def seeds_in_words(here, there):
    if len(here) != len(there):
        return f"{len(there)} seed{'s' * (len(there) != 1)} there, {len(here)} here"
    if here != there:
        return f"seeds {', '.join(map(str, there))} there, {', '.join(map(str, here))} here"
    return f"the same seeds: {', '.join(map(str, here))}"


def recipes_in_words(here, there):
    different = [f"{name} {there.get(name, 'missing')} there, {here.get(name, 'missing')} here"
                 for name in {**there, **here} if here.get(name) != there.get(name)]
    return f"the recipes differ: {'; '.join(different)}" if different else "the same recipe"


def of_verdicts(here, there):
    """How many verdicts agree, and the claims of those that do not, one list for each pair of verdicts.  A
    verdict that waits for more seeds contradicts none, so its claim is counted only."""
    both = [claim for claim in here if claim in there]
    changed = [claim for claim in both if here[claim] != there[claim]]
    waiting = [claim for claim in changed if {here[claim], there[claim]} & set(UNDECIDED.values())]
    lines = [f"verdicts of {len(both)} claims: {len(both) - len(changed)} agree, "
             f"{len(changed) - len(waiting)} differ, {len(waiting)} wait for more seeds in one of the runs"]
    alone = here.keys() ^ there.keys()
    if alone:
        lines.append(f"claims that only one of the two runs has: {len(alone)}")
    by_pair = {}        # {(verdict there, verdict here): claims}
    for claim in changed:
        if claim not in waiting:
            by_pair.setdefault((there[claim], here[claim]), []).append(claim)
    for (before, now), claims in by_pair.items():
        lines += [f"there {before}; here {now}", *(f"  {claim} ({noise})" for claim, noise in claims)]
    return lines


def of_numbers(here, there):
    """A table of the main numbers: there, here with its interval, and whether the value there lies inside."""
    lines = [f"{'there -> here [95 % interval]':30} {'win rate in distribution':36} gold diversity per input"]
    for policy, noise in here:
        cells = [moved(*pair) for pair in zip(here[policy, noise], there[policy, noise])]
        lines.append(f"{f'{POLICIES[policy]}, {noise}':30} {cells[0]:36} {cells[1]}")
    pairs = [pair for key in here for pair in zip(here[key], there[key]) if pair[0].low is not None]
    if not pairs:
        return [*lines, "the values here are of one seed and have no interval"]
    inside = sum(place(*pair) == "inside" for pair in pairs)
    return [*lines, f"{inside} of {len(pairs)} values there lie inside the interval here"]


def moved(here, there):
    return f"{there.mean:.2f} -> {here} {place(here, there)}".rstrip()


def place(here, there):
    """Where the value there lies beside the interval here; "" if that has no ends."""
    if here.low is None:
        return ""
    return "inside" if here.low <= there.mean <= here.high else "outside"


def with_committed(results):
    """The lines that compare the results of a run with the committed ones; one line if these cannot be
    read."""
    try:
        there = read(COMMITTED)
    except UserError as error:
        return [f"not compared with the committed results: {error}"]
    return ["this run (here) beside the committed results (there)", *of_runs(outcome(results), there)]


def main(cfg):
    check(len(cfg.files) == 2, f"{len(cfg.files)} files named; two are compared: "
          "python -m study.compare A.json B.json")
    here, there = cfg.files
    print("\n".join([*fit(f"{here} (here) beside {there} (there)", 6), *of_runs(read(here), read(there))]))


if __name__ == "__main__":
    launch(main, Config, __doc__)
