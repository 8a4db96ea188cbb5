"""Every table of the results, from the numbers in results.json alone.

    python -m study.report               # renews results/*.md and README.md's table of results

Writes OUT/results.md and, where OUT/replication.json stands, OUT/replication.md.  README.md is touched only
when OUT is the committed folder: what stands between <!-- results --> and <!-- /results --> is replaced.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import diversity
from common.errors import UserError
from common.files import atomic_write
from common.flags import Flags, arg, launch
from common.stats import Interval
from study import proxies
from study.claims import ENOUGH_SEEDS, OURS, SMALL
from study.names import (BETA, DIVERSITY, NOISE_OF, POLICIES, QUALITY, SETS, SHIFTED, TRAINED, pick, short)

ROOT = Path(__file__).resolve().parent.parent
MARKERS = "<!-- results -->\n", "<!-- /results -->"
THREE = ("sft", "bon", "ppo")       # the policies of README's table and picture


@dataclass
class Config(Flags):
    out: str = arg("results", "folder with results.json, where the tables are written")


# ----------------------------------------------------------------------------------------- entries and tables
# An estimate is a dict as from common.stats.over_seeds, or None where nothing could be measured.

def table(header, rows):
    return "\n".join(["| " + " | ".join(header) + " |", "|" + " --- |" * len(header),
                      *("| " + " | ".join(row) + " |" for row in rows)])


def sections(*parts):
    return "\n\n".join(parts) + "\n"


def ends(e):
    """(low, high) shown around the mean of an estimate: its 95 % interval over seeds and prompts; with two or
    three seeds, whose intervals are too wide to help a reader, the seeds' range; with one seed (None, None).
    """
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


def signed(e, digits=2):
    return interval(e, digits, "+")


def versus(e):
    """A difference at equal reward, KL or diversity; a star where the other curve does not reach so far."""
    return "" if e is None else signed(e) + ("" if e["inside"] else " \\*")


def over_sets(rows, sets, **wanted):
    """The estimate of a mean over test sets, which have different prompts.  With one set its own."""
    found = [pick(rows, split=s, **wanted) for s in sets]
    if len(found) == 1:
        return found[0]
    per_seed = np.mean([e["per_seed"] for e in found], axis=0)
    mean = float(np.mean([e["mean"] for e in found]))
    if found[0]["low"] is None:
        return {"mean": mean, "low": None, "high": None, "per_seed": per_seed.tolist()}
    # as wide as if all sets shared one error: never too narrow
    half = float(np.mean([e["high"] - e["low"] for e in found])) / 2
    return {"mean": mean, "low": max(0., mean - half), "high": min(1., mean + half),
            "per_seed": per_seed.tolist()}


def noises(results):
    """The kinds of noise that were run: {task: its name}."""
    known = {x["task"] for x in results["win_rate"]}
    return {task: name for task, name in NOISE_OF.items() if task in known}


def three_rows(results):
    """[(name, win rate in distribution, out of it, gold diversity)] of README's policies, estimates."""
    def varied(policy):
        return pick(results["diversity"], task="synthetic", policy=policy, measure="per_input_gold_diversity")

    def wins(policy, sets):
        return over_sets(results["win_rate"], sets, task="synthetic", policy=policy, temperature=QUALITY)
    return [(POLICIES[p], wins(p, SETS[:1]), wins(p, SHIFTED), varied(p)) for p in THREE]


def answer(results):
    """README's table of results."""
    return table(["", "win rate in distribution", "win rate out of it", "gold diversity per input"],
                 [[name, *map(interval, estimates)] for name, *estimates in three_rows(results)])


# ------------------------------------------------------------------------------------------------- results.md

def results_md(results):
    settings, cost = results["settings"], results["cost"]
    seeds = settings["seeds"]
    toy = "  TOY SIZES (--quick): these are not results." if settings["quick"] else ""
    minutes = f"; {cost['processor_seconds'] / 60:.0f} minutes of processor time"
    parts = [sets_part, per_input_part, across_part, claims_part]
    if "frontier" in results:
        parts += [frontier_part, methods_part, kinds_part]
    return sections(
        "# Results",
        f"Commit {results['commit'] or 'unknown'}, recipe {results['recipe']}; seeds {seeds[0]} to "
        f"{seeds[-1]}; {settings['inputs']} prompts a test set, 16 outputs a prompt{minutes}.  "
        "Written by "
        f"`python reproduce.py{' --full' if settings['full'] else ''}`.  {how_to_read(len(seeds))}{toy}",
        "![The answer](figure.png)",
        *(text for part in (*parts, reward_part) for text in part(results)))


def sets_part(results):
    def entry(task, policy, split):
        t = "matched" if policy == "sft_matched" else QUALITY
        return interval(pick(results["win_rate"], task=task, policy=policy, split=split, temperature=t))
    known = {(x["task"], x["policy"]) for x in results["win_rate"]
             if x["temperature"] in (QUALITY, "matched")}
    yield "## Win rate by test set"
    yield ("How often an output has a higher gold reward than the reference, ties halved; temperature "
           f"{QUALITY:g}.  "
           "`test` is in distribution, the other sets are not.  Matched: SFT at the temperature at which it "
           "is as "
           "little varied as PPO.  Oracle: the best of 16 by the gold reward.")
    yield table(["noise", "policy", *map(short, SETS)], [
        [noise, name, *(entry(task, p, s) for s in SETS)] for task, noise in noises(results).items()
        for p, name in POLICIES.items() if (task, p) in known])


def diversity_table(results, kind):
    """kind: per_input or across."""
    found = {(x["task"], x["policy"], x["measure"]): x for x in results["diversity"]}
    measures = [m for m in diversity.COLUMNS if any(key[2] == f"{kind}_{m}" for key in found)]
    return table(["noise", "policy", *(diversity.COLUMNS[m] for m in measures)], [
        [noise, name, *(interval(found.get((task, p, f"{kind}_{m}"))) for m in measures)]
        for task, noise in noises(results).items() for p, name in POLICIES.items()
        if (task, p, f"{kind}_gold_diversity") in found])


def per_input_part(results):
    yield "## Diversity per input"
    yield (f"Of 16 outputs to one prompt, in distribution, temperature {DIVERSITY:g}.  More is more varied, "
           "but of "
           "self-BLEU less is; `gold` compares the facts that outputs state; NLI is by a classifier that "
           "knows them.")
    yield diversity_table(results, "per_input")


def across_part(results):
    yield "## Diversity across inputs"
    yield ("Of one output to each prompt.  Prompts tell different stories, so that `gold` is near 1 for "
           "everybody.")
    yield diversity_table(results, "across")


def claims_part(results):
    yield "## The paper's claims and ours"
    yield ("`agrees`: every interval lies on the side that the claim says (where it says `same`, within "
           f"±{SMALL:g}). "
           "`differs`: one lies on the other side.  `not shown`: neither; `open`: not tested here.  The "
           "paper's claims "
           "are from second-hand readings, not from its PDF.")
    yield table(["source", "claim", "verdict", "measured here", "found"], [
        [c["source"], c["claim"], f"**{c['verdict']}**", c["here"],
         "; ".join(f"{e['of']} {signed(e)}".strip() for e in c["found"])] for c in results["claims"]])


def point_name(x):
    """A point of the frontier in words: PPO, β = 0.1; best of 16."""
    knob, curve = x["knob"], x["curve"]
    symbol = {"SFT": ", T", "best-of-N": ", N"}.get(curve, ", β")
    return curve if knob is None else f"{curve}{symbol} = {knob:g}"


def frontier_part(results):
    columns = {"gold_reward": "gold reward", "wins": "win rate", "gold_diversity": "gold diversity",
               "good_gold_diversity": "gold diversity of good outputs", "reward": "reward"}
    against = {"wins_vs_sft": "win rate - SFT's at equal diversity",
               "kept_vs_bon": "diversity - best-of-N's at equal gold reward",
               "gained_vs_bon": "gold reward - best-of-N's at equal KL",
               "kept_vs_ppo": "diversity - PPO's at equal gold reward"}
    yield "## The frontier: quality against diversity"
    yield ("Every method over its own setting; systematic noise, in distribution, temperature 1 except "
           "SFT's.  The last "
           "four columns compare with a point between those of another curve; \\* where that does not reach "
           "so far and "
           "its end was taken.  KL is in nats from SFT, of best-of-N its bound.")
    yield "![The frontier](frontier.png)"
    yield table(["policy", "KL", "length", *columns.values(), *against.values()], [
        [point_name(x), f"{x['kl']:.2f}", f"{x['length']:.1f}", *(interval(x[m]) for m in columns),
         *(versus(x.get(m)) for m in against)] for x in results["frontier"]])


def methods_part(results):
    names = {files[BETA]: curve for curve, files in TRAINED.items()}
    yield "## The methods out of distribution"
    yield (f"β = {BETA:g}, systematic noise, temperature {QUALITY:g}.  Win rate, then the number of "
           "ungrammatical "
           "clauses in an output, of which fewer is better.")
    yield table(["", "policy", *map(short, SETS)], [
        [title, names.get(p, POLICIES.get(p, p)), *(interval(pick(results["sets"], policy=p, split=s)[key])
                                                    for s in SETS)]
        for key, title in (("wins", "win rate"), ("wins_minus_ppo", "win rate - PPO's"),
                           ("ungrammatical", "ungrammatical clauses"))
        for p in dict.fromkeys(x["policy"] for x in results["sets"])])


def kinds_part(results):
    measures = {**diversity.OF_GOOD, "good": "fraction good", "good_distinct": "different good answers of 16"}
    found = {(x["task"], x["policy"], x["measure"]): x for x in results["diversity"]}
    ks = list(dict.fromkeys(x["k"] for x in results["pass_at_k"]))
    yield "## What kind of diversity is lost"
    yield ("A good output has at least the reference's gold reward.  A loss against SFT is split in two: "
           "SFT's bad "
           "outputs add to its diversity, and the choice among good outputs becomes narrower.  pass@k: how "
           "often one of "
           "k outputs is good.")
    yield table(["noise", "policy", *measures.values()], [
        [noise, POLICIES[p], *(interval(found.get((task, p, m))) for m in measures)]
        for task, noise in noises(results).items() for p in POLICIES if (task, p, "good") in found])
    parts = {"loss": "loss of gold diversity", "errors_removed": "fewer bad outputs",
             "narrowing": "narrower choice of good ones"}
    yield table(["noise", "policy", *parts.values()], [
        [NOISE_OF[x["task"]], POLICIES[x["policy"]], *(signed(x[k]) for k in parts)]
        for x in results["loss"]])
    yield table(["pass@k", *(f"k = {k}" for k in ks)], [
        [POLICIES.get(p) or p.replace("ppo_b", "PPO, β = "),
         *(interval(pick(results["pass_at_k"], policy=p, k=k)["rate"]) for k in ks)]
        for p in dict.fromkeys(x["policy"] for x in results["pass_at_k"])])


def reward_part(results):
    keys = {"accuracy": "labels", "accuracy_gold": "gold reward",
            "longer_wins": "`the longer wins` by labels", "labels_gold": "labels by gold reward"}
    yield "## The reward model, the shift and the measures of diversity"
    yield "How often the reward model ranks two outputs to one prompt as the gold reward does."
    yield table(["noise", "outputs of", *map(short, SETS)], [
        [noise, POLICIES[p], *(interval(pick(results["ranked_rightly"], task=task, policy=p, split=s))
                               for s in SETS)]
        for task, noise in noises(results).items() for p in ("sft", "ppo")])
    yield ("Its accuracy on held-out pairs, by the annotators' labels and by the gold reward; means over "
           "seeds.")
    yield table(["noise", *keys.values()], [[NOISE_OF[x["task"]], *(f"{x[k]:.3f}" for k in keys)]
                                            for x in results["reward_model"]])
    if "shift" not in results:
        return
    yield ("How far each set's prompts lie from train, by the Jensen-Shannon divergence of tokens and a "
           "classifier's "
           "area under the ROC curve; the floor is what chance alone gives.  Advantage: PPO's win rate "
           "minus SFT's.")
    yield "![The advantage against the shift](shift.png)"

    def shifted(e):
        return f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}], floor {e['floor']:.3f}"
    yield table(["test set", "JS divergence, bits", "classifier's AUC", "advantage"], [
        [short(x["split"]), shifted(x["js"]), shifted(x["auc"]), signed(x["advantage"])]
        for x in results["shift"]])
    yield ("Which measure of diversity to believe: rank correlations with gold diversity and with what is "
           "known to "
           "make outputs varied, 1 the best.  study/proxies.py explains the tests.")
    yield "![The measures](proxies.png)"
    yield table(["measure", *proxies.TESTS.values()], [
        [proxies.NAMES[x["measure"]], *(str(Interval(*x[t])) if x.get(t) else "" for t in proxies.TESTS)]
        for x in results["proxies"]])


# -------------------------------------------------------------------------------------------------- the files

def read_results(out):
    path = Path(out) / "results.json"
    if not path.is_file():
        raise UserError(f"--out {out}: no results.json there; `python reproduce.py` writes "
                        "runs/results/results.json")
    return json.loads(path.read_text())


def between_markers(text, new):
    """text with `new` between the two markers.  Raises UserError where they are missing."""
    if not all(marker in text for marker in MARKERS):
        raise UserError("README.md has no lines <!-- results --> and <!-- /results --> for its table")
    before, rest = text.split(MARKERS[0], 1)
    return f"{before}{MARKERS[0]}{new}\n{MARKERS[1]}{rest.split(MARKERS[1], 1)[1]}"


def write(out):
    """Writes the tables of results.json in the folder `out`.  Returns the paths written."""
    results, out = read_results(out), Path(out)
    texts = {out / "results.md": results_md(results)}
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
