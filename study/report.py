"""Every table of the results, from the numbers in results.json alone.

    python -m study.report               # renews results/*.md and README.md's table of results

Writes OUT/results.md and, where OUT/speed.json stands, OUT/speed.md.  README.md is touched only
when OUT is the committed folder: what stands between <!-- results --> and <!-- /results --> is replaced.
"""
import json
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import diversity
from bon import FEW
from common.errors import UserError
from common.files import atomic_write
from common.flags import Flags, arg, launch
from common.stats import Interval
from study import proxies
from study.claims import ENOUGH_SEEDS, OURS, SMALL
from study.names import BETA, DIVERSITY, NOISE_OF, POLICIES, QUALITY, SETS, TRAINED, short
from study.optimum import SHARED
from study.pipeline import ROOT

START, END = "<!-- results -->\n", "<!-- /results -->"


@dataclass
class Config(Flags):
    out: str = arg("results", "folder with results.json, where tables and pictures are written")


# ----------------------------------------------------------------------------------------- entries and tables
# An estimate is a dict as from common.stats.over_seeds, or None where nothing could be measured.

def table(header, rows):
    return "\n".join(["| " + " | ".join(header) + " |", "|" + " --- |" * len(header),
                      *("| " + " | ".join(row) + " |" for row in rows)])


def sections(*parts):
    return "\n\n".join(parts) + "\n"


def ends(e):
    """(low, high) around the mean of an estimate: its 95 % interval over seeds and prompts; with two or three
    seeds, whose intervals are too wide to help, the seeds' range; with one seed (None, None)."""
    seeds = e.get("per_seed")
    if seeds is None or len(seeds) >= ENOUGH_SEEDS:
        return e["low"], e["high"]
    return (min(seeds), max(seeds)) if len(seeds) > 1 else (None, None)


def how_to_read(n_seeds):
    """The sentence that says what `ends` are."""
    if n_seeds >= ENOUGH_SEEDS:
        return "Brackets are 95 % intervals over seeds and prompts."
    if n_seeds > 1:
        return f"Brackets are the range of {n_seeds} seeds: so few decide little."
    return "Values of one seed, which decides nothing."


def interval(e, digits=2, sign=""):
    return "-" if e is None else format(Interval(e["mean"], *ends(e)), f"{sign}.{digits}f")


def signed(e):
    return interval(e, sign="+")


def versus(e):
    """A difference at equal reward, KL or diversity; a star where the other curve does not reach so far."""
    return "" if e is None else signed(e) + ("" if e["inside"] else " \\*")


def symbol(curve):
    """Of what a curve of the frontier runs over."""
    return {"SFT": "T", "best-of-N": "N"}.get(curve, "β")


def by(rows, *fields):
    """{the values of some fields: row}."""
    return {tuple(row[field] for field in fields): row for row in rows}


def three_rows(results):
    """[(name, win rate in distribution, out of it, gold diversity)] of README's policies, estimates."""
    wins = by(results["win_rate"], "task", "policy", "split", "temperature")
    varied = by(results["diversity"], "task", "policy", "measure")
    return [(POLICIES[p], wins["synthetic", p, "test", QUALITY], wins["synthetic", p, "ood", QUALITY],
             varied["synthetic", p, "per_input_gold_diversity"]) for p in ("sft", "bon", "ppo")]


def answer(results):
    """README's table of results."""
    return table(["", "win rate in distribution", "win rate out of it", "gold diversity per input"],
                 [[name, *map(interval, estimates)] for name, *estimates in three_rows(results)])


# ------------------------------------------------------------------------------------------------- results.md

def results_md(results):
    settings, seeds = results["settings"], results["settings"]["seeds"]
    toy = "  TOY SIZES (--quick): these are not results." if settings["quick"] else ""
    parts = [sets_part, diversity_part, claims_part]
    if "frontier" in results:
        parts += [frontier_part, optimum_part, methods_part, kinds_part]
    parts += [reward_part] + [shift_part] * ("shift" in results)
    texts, number = [text for part in parts for text in part(results)], count(1)
    texts = [f"## {next(number)}. {text[3:]}" if text.startswith("## ") else text for text in texts]
    return sections(
        "# Results",
        f"Commit {results['commit']}, recipe {results['recipe']}; seeds {seeds[0]} to "
        f"{seeds[-1]}; {settings['inputs']} prompts a test set, 16 outputs a prompt; "
        f"{results['cost']['processor_seconds'] / 60:.0f} minutes of processor time.  Written by "
        f"`python reproduce.py{' --full' if settings['full'] else ''}`.  {how_to_read(len(seeds))}{toy}",
        "![The answer](figure.png)", *texts)


def by_noise_and_policy(found, header, keys):
    """A table with a row for each kind of noise and policy that has the first key.  found: {(task, policy,
    key): estimate}; header: of the columns; keys: theirs."""
    return table(["noise", "policy", *header], [
        [noise, name, *(interval(found.get((task, p, key))) for key in keys)]
        for task, noise in NOISE_OF.items() for p, name in POLICIES.items() if (task, p, keys[0]) in found])


def sets_part(results):
    yield "## Win rate by test set"
    yield (f"How often an output has a higher gold reward than the reference, ties halved; temperature "
           f"{QUALITY:g}.  `test` is in distribution, the other sets are not, and `ood` is their mean.  "
           "Matched: SFT at the temperature at which it is as little varied as PPO.")
    rows = [x for x in results["win_rate"] if x["temperature"] in (QUALITY, "matched")]
    splits = [*SETS, "ood"]
    yield by_noise_and_policy(by(rows, "task", "policy", "split"), map(short, splits), splits)


def diversity_part(results):
    found = by(results["diversity"], "task", "policy", "measure")
    yield "## Diversity per input and across inputs"
    yield (f"Of 16 outputs to one prompt, then of one output to each prompt; in distribution, temperature "
           f"{DIVERSITY:g}.  More is more varied, but of self-BLEU less is; `gold` compares the facts that "
           "outputs state; NLI is by a classifier that knows them.")
    for kind in ("per_input", "across"):
        measures = [m for m in diversity.COLUMNS if any(key[2] == f"{kind}_{m}" for key in found)]
        yield by_noise_and_policy(found, [diversity.COLUMNS[m] for m in measures],
                                  [f"{kind}_{m}" for m in measures])


def claims_part(results):
    yield "## The paper's claims and ours"
    yield (f"`agrees`: every interval lies on the side that the claim says (where it says `same`, within "
           f"±{SMALL:g}). `differs`: one lies on the other side.  `not shown`: neither; `open`: not tested "
           "here.  The paper's claims are from second-hand readings, not from its PDF.")
    yield table(["source", "claim", "verdict", "measured here", "found"], [
        [c["source"], c["claim"], f"**{c['verdict']}**", c["here"],
         "; ".join(f"{e['of']} {signed(e)}".strip() for e in c["found"])] for c in results["claims"]])


def frontier_part(results):
    def name(x):
        return x["curve"] if x["knob"] is None else f"{x['curve']}, {symbol(x['curve'])} = {x['knob']:g}"
    columns = {"gold_reward": "gold reward", "wins": "win rate", "gold_diversity": "gold diversity",
               "good_gold_diversity": "gold diversity of good outputs", "reward": "reward"}
    against = {"wins_vs_sft": "win rate - SFT's at equal diversity",
               "kept_vs_bon": "diversity - best-of-N's at equal gold reward",
               "gained_vs_bon": "gold reward - best-of-N's at equal KL",
               "kept_vs_ppo": "diversity - PPO's at equal gold reward",
               "kept_vs_optimum": "diversity - the optimum's at equal KL",
               "gained_vs_optimum": "gold reward - the optimum's at equal KL"}
    yield "## The frontier: quality against diversity"
    yield ("Systematic noise, in distribution, temperature 1 except SFT's.  The last columns compare "
           "with a point between those of another curve; \\* where that does not reach so far and its end "
           "was taken.  KL is in nats from SFT, of best-of-N its bound.")
    yield "![The frontier](frontier.png)"
    yield table(["policy", "KL", "length", *columns.values(), *against.values()], [
        [name(x), f"{x['kl']:.2f}", f"{x['length']:.1f}", *(interval(x[m]) for m in columns),
         *(versus(x.get(m)) for m in against)] for x in results["frontier"]])


def optimum_part(results):
    yield "## What the objective itself asks for"
    yield ("The optimum of E[r] - β KL, with the reward model's r: SFT's samples with weights exp(r / β).  "
           f"Pools whose effective sample size is at most {FEW} (median over prompts) say too little and are "
           "left out of the frontier; rows of one β show how the numbers move as pools grow.")
    columns = {"kl": "KL", "reward": "reward", "gold_reward": "gold reward", **SHARED}
    yield table(["β", "pool", "effective size", *columns.values()], [
        [f"{x['beta']:g}", f"{x['pool']:,}", f"{x['size']:,.0f}", *(interval(x[m]) for m in columns)]
        for x in results["optimum"]])
    yield ("How much of a method's loss of diversity against SFT the optimum at the same β loses too "
           "(`asked`), where β means the same; for the others the frontier compares at equal KL.  -: no "
           "loss is shown.")
    yield table(["method", "β", "of", "lost", "asked", "asked / lost"], [
        [x["curve"], f"{x['beta']:g}", title, signed(x[m]["lost"]), signed(x[m]["asked"]),
         interval(x[m]["share"])] for x in results["shares"] for m, title in SHARED.items()])


def methods_part(results):
    names = POLICIES | {files[BETA]: curve for curve, files in TRAINED.items()}
    rows = by(results["sets"], "policy", "split")
    titles = {"wins": "win rate", "wins_minus_ppo": "win rate - PPO's",
              "ungrammatical": "ungrammatical clauses"}
    yield "## The methods out of distribution"
    yield (f"β = {BETA:g}, systematic noise, temperature {QUALITY:g}.  Win rate, then the number of "
           "ungrammatical clauses in an output, of which fewer is better.")
    yield table(["", "policy", *map(short, SETS)], [
        [title, names[p], *(interval(rows[p, s][key]) for s in SETS)]
        for key, title in titles.items() for p in dict.fromkeys(p for p, _ in rows)])


def kinds_part(results):
    measures = {"good": "fraction good", "good_distinct": "different good answers of 16", **diversity.OF_GOOD}
    parts = {"loss": "loss of gold diversity", "errors_removed": "fewer bad outputs",
             "narrowing": "narrower choice of good ones"}
    passed = by(results["pass_at_k"], "policy", "k")
    ks = list(dict.fromkeys(k for _, k in passed))
    yield "## What kind of diversity is lost"
    yield ("A good output has at least the reference's gold reward.  A loss against SFT is split in two: "
           "SFT's bad outputs add to its diversity, and the choice among good outputs becomes narrower.  "
           "pass@k: how often one of k outputs is good.")
    yield by_noise_and_policy(by(results["diversity"], "task", "policy", "measure"), measures.values(),
                              list(measures))
    yield table(["noise", "policy", *parts.values()], [
        [NOISE_OF[x["task"]], POLICIES[x["policy"]], *(signed(x[k]) for k in parts)]
        for x in results["loss"]])
    yield table(["pass@k", *(f"k = {k}" for k in ks)], [
        [POLICIES.get(p) or p.replace("ppo_b", "PPO, β = "), *(interval(passed[p, k]["rate"]) for k in ks)]
        for p in dict.fromkeys(p for p, _ in passed)])


def reward_part(results):
    yield "## The reward model"
    yield "How often it ranks two outputs to one prompt as the gold reward does."
    yield by_noise_and_policy(by(results["ranked_rightly"], "task", "policy", "split"), map(short, SETS),
                              SETS)


def shift_part(results):
    def shifted(e):
        return f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}], floor {e['floor']:.3f}"
    yield "## The shift and the measures of diversity"
    yield ("How far each set's prompts lie from train, by the Jensen-Shannon divergence of tokens and a "
           "classifier's area under the ROC curve; the floor is what chance alone gives.  Advantage: PPO's "
           "win rate minus SFT's.")
    yield "![The advantage against the shift](shift.png)"
    yield table(["test set", "JS divergence, bits", "classifier's AUC", "advantage"], [
        [short(x["split"]), shifted(x["js"]), shifted(x["auc"]), signed(x["advantage"])]
        for x in results["shift"]])
    yield ("Which measure of diversity to believe: rank correlations with gold diversity and with what is "
           "known to make outputs varied, 1 the best.  study/proxies.py explains the tests.")
    yield "![The measures](proxies.png)"
    yield table(["measure", *proxies.TESTS.values()], [
        [proxies.NAMES[x["measure"]], *(str(Interval(*x[t])) if x.get(t) else "" for t in proxies.TESTS)]
        for x in results["proxies"]])


def speed_md(results):
    """speed.md, from what tools/bench.py measured."""
    made = f"`python -m tools.bench` on {results['machine']}, torch {results['torch']}, {results['date']}."
    return sections("# Speed", made, table(["work", "size", "median, s", "rate"], [
        [x["work"], x["size"], f"{x['median_s']:.4g}", f"{x['rate']:,.0f} {x['unit']}"]
        for x in results["rows"]]))


# -------------------------------------------------------------------------------------------------- the files

def read_results(out):
    path = Path(out) / "results.json"
    if not path.is_file():
        raise UserError(f"--out {out}: no results.json there; `python reproduce.py` writes "
                        "runs/results/results.json")
    return json.loads(path.read_text())


def between_markers(text, new):
    """text with `new` between the two markers."""
    before, rest = text.split(START)
    return f"{before}{START}{new}\n{END}{rest.split(END)[1]}"


def write(out):
    """Writes the tables of results.json in the folder `out`.  Returns the paths written."""
    results, out = read_results(out), Path(out)
    texts, speed = {out / "results.md": results_md(results)}, out / "speed.json"
    if speed.is_file():
        texts[out / "speed.md"] = speed_md(json.loads(speed.read_text()))
    if out.resolve() == ROOT / "results":
        readme = ROOT / "README.md"
        texts[readme] = between_markers(readme.read_text(), answer(results))
    for path, text in texts.items():
        atomic_write(path, text.encode())
    return list(texts)


def on_screen(out):
    """The lines that reproduce.py ends with: README's table, and one verdict a claim."""
    results = read_results(out)
    whose = {True: "ours", False: "paper"}
    return [answer(results), "", *(f"{c['verdict']:10} {whose[c['source'] == OURS]}: {c['claim']}"
                                   for c in results["claims"])]


def main(cfg):
    print("wrote " + ", ".join(map(str, write(cfg.out))))


if __name__ == "__main__":
    launch(main, Config, __doc__)
