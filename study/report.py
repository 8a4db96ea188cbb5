"""results.md and reviewers.md: tables of the numbers in results.json and reviewers.json, and nothing else.

    python -m study.report               # prints both anew from the JSON files in results/
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import diversity
from common.files import atomic_write
from common.flags import Common, launch
from common.stats import Interval
from study import frontier, key_story, methods, paper, proxies
from study.claims import GROWS
from study.growth import direction
from study.instruct import BESIDE_SFT, COMPARED
from study.kinds import KS
from study.names import (BETAS, COVERAGE_OF, DIVERSITY, INSTRUCT_SETS, K2, NOISE_OF, POLICIES, QUALITY, SETS,
                         VARIED, pick, short)
from study.rules import RULES
from study.shift import SHIFTS

TOY = "  TOY SIZES (--quick): these are not results."
ENOUGH_SEEDS = 4        # for an interval over seeds in a table


@dataclass
class Config(Common):
    out: str = "results"        # folder with results.json (and reviewers.json), where the tables are written


# ------------------------------------------------------------------------------------------- cells and tables

def table(header, rows):
    return "\n".join(["| " + " | ".join(header) + " |", "|" + " --- |" * len(header),
                      *("| " + " | ".join(row) + " |" for row in rows)])


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
        return ("An entry is the mean over seeds, its 95 % interval over the choice of seeds and prompts, "
                "and the standard deviation over seeds.")
    if n_seeds > 1:
        return f"An entry is the mean over {n_seeds} seeds and their range: so few seeds decide little."
    return "An entry is the value of one seed, which decides nothing."


def interval(e, digits=2):
    if e is None:
        return "-"      # nothing to measure
    return format(Interval(e["mean"], *ends(e)), f".{digits}f")


def signed(e, digits=2):
    if e is None:
        return "-"
    return format(Interval(e["mean"], *ends(e)), f"+.{digits}f")


def spread(e):
    """The standard deviation over seeds, where there are enough of them."""
    return f" ± {e['seed_sd']:.2f}" if e and len(e["per_seed"]) >= ENOUGH_SEEDS else ""


def cell(e):
    """An estimate: mean, `ends`, standard deviation over seeds."""
    return interval(e) + spread(e)


def of_shift(far, measure):
    """A measure of shift with its interval."""
    return f"{far[measure]:.3f} [{far[f'{measure}_low']:.3f}, {far[f'{measure}_high']:.3f}]"


def sections(*parts):
    return "\n\n".join(parts) + "\n"


def took(cost):
    """A sentence on what the stages took.  A number that was not measured is None."""
    known = [(cost["seconds"], "minutes, added up"), (cost["processor_seconds"], "minutes of processor time")]
    said = [f"{x / 60:.0f} {what}" for x, what in known if x is not None]
    return f"Its stages took {', and '.join(said)}."


# ------------------------------------------------------------------------------------------------- results.md

def results_md(results):
    settings = results["settings"]
    claims = table(["claim", "noise", "verdict", "difference", "estimate", "more"],
                   map(claim_row, results["claims"]))
    return sections(
        "# Results",
        f"{len(settings['seeds'])} seeds, {settings['inputs']} prompts a test set, 16 outputs a prompt.  "
        f"{how_to_read(len(settings['seeds']))}  Written by `python reproduce.py`.  "
        + took(results["cost"]) + (TOY if settings["quick"] else ""),
        "## What each stage has seen",
        table(["posts", "used", "new words", "news format", "more than two distractors"],
              [[x["split"], f"{x['posts']:,}", *(f"{x[k]:.1%}" for k in ("new_words", "articles",
                                                                        "distractors"))]
               for x in results["seen"]]),
        "The base model alone learns from `pretrain`, SFT, reward model and PPO from `train`.",
        *(part for task in NOISE_OF for part in of_task(results, task)),
        "## Which of our statements hold in these runs",
        "The paper's own claims stand row by row in reviewers.md.  A statement holds, or its opposite does, "
        "if the 95 % interval of the difference over the choice of seeds and prompts lies on one side of "
        "zero (common/stats.py, over_seeds).  Else it is not shown; fewer than four seeds do not decide.",
        claims,
        "What becomes of PPO's advantage over SFT out of distribution depends on the scale.  Out of "
        "distribution less in distribution; the last two intervals are over seeds alone:",
        table(["noise", "difference of win rates", "log of their ratio", "log of the ratio of their odds"],
              [[NOISE_OF[task], signed(pick(results["claims"], task=task, claim=GROWS)["estimate"]),
                signed(scales["ratio"]), signed(scales["odds"])]
               for task, scales in results["advantage_on_other_scales"].items()]))


def of_task(results, task):
    """The paragraphs and tables of one kind of noise."""
    matched = ", ".join(f"{t:.2f}" for t in results["matched_temperature"][task])
    return [f"## {NOISE_OF[task].capitalize()}",
            "Win rate against the reference by the gold reward, temperature 0.7",
            win_table(results, task),
            "Best-of-16's win rate is that of the authors' resampling, whose mean is that of independent "
            f"samples.  Matched temperature, seed by seed: {matched}.  Ceilings: PPO on the gold reward, and "
            "the best of 16 SFT samples by the gold reward (oracle).  Two rules that need no model mark the "
            "scale: what the title names, with time, feeling and question, but nothing of what happened; and "
            "every story of the post.",
            "Diversity per input, temperature 1, ID test set (self-BLEU: lower is more varied; NLI: by a "
            "classifier that knows the facts)",
            diversity_table(results, task, "per_input", cell),
            "Diversity across inputs, temperature 1, ID test set (self-BLEU: lower is more varied)",
            diversity_table(results, task, "across", lambda e: f"{e['mean']:.2f}{spread(e)}"),
            accuracy(results, task), open_ends(results["unfinished"][task])]


def win_table(results, task):
    def rate(policy, split):
        t = "matched" if policy == "sft_matched" else QUALITY
        return cell(pick(results["win_rate"], task=task, policy=policy, split=split, temperature=t))

    def of_rule(rule, split):
        return f"{pick(results['rules'], rule=rule, task=task, split=split)['rate']:.2f}"
    return table(["policy", *map(short, SETS)], [
        *([name, *(rate(policy, s) for s in SETS)] for policy, name in POLICIES.items()),
        *([f"rule: {rule}", *(of_rule(rule, s) for s in SETS)] for rule in RULES)])


def diversity_table(results, task, kind, show):
    """kind: per_input or across; show: function of an estimate."""
    def estimate(policy, measure):
        return pick(results["diversity"], task=task, policy=policy, split="test", temperature=DIVERSITY,
                    measure=measure)
    columns = [m for m in diversity.COLUMNS if m != "length" and (m != "nli" or kind == "per_input")]
    rows = [[name, *(show(estimate(p, f"{kind}_{m}")) for m in columns),
             f"{estimate(p, 'per_input_length')['mean']:.1f}"] for p, name in VARIED.items()]
    return table(["policy", *(diversity.COLUMNS[m] for m in columns), "length"], rows)


def accuracy(results, task):
    seeds = [found for key, found in results["reward_model"].items() if key.startswith(f"{task} seed")]
    mean = {key: np.mean([seed[key] for seed in seeds]) for key in seeds[0]}
    header = ["pairs", "reward model, labels", "reward model, gold reward", "`the longer wins`, labels",
              "labels, gold reward"]
    all_pairs = [mean[k] for k in ("accuracy", "accuracy_gold", "longer_wins", "labels_gold")]
    far_apart = [mean[k] for k in ("accuracy_gap1", "accuracy_gap1_gold")]
    return sections("How often two agree on held-out pairs, means over seeds", table(header, [
        ["all", *(f"{x:.3f}" for x in all_pairs)],
        ["gold rewards more than 1 apart", *(f"{x:.3f}" for x in far_apart), "", ""]]),
        "How often the reward model ranks two outputs to one prompt as the gold reward does",
        table(["outputs of", *map(short, SETS)],
              [[POLICIES[p], *(cell(pick(results["reward_by_set"], task=task, policy=p, split=s))
                               for s in SETS)] for p in ("sft", "ppo")]),
        "How often the reward model scores the key story of a post above its distractor in the same phrasing",
        table([*map(short, key_story.SPLITS)], [[cell(pick(results["key_story"], task=task, split=s))
                                                 for s in key_story.SPLITS]])
    ).rstrip()


def open_ends(unfinished):
    worst = max(unfinished, key=unfinished.get)
    return ("Samples of SFT, best-of-16 and PPO that did not end, temperature 0.7: at most "
            f"{unfinished['test']:.1%} in distribution, {unfinished[worst]:.1%} on {worst}.")


def claim_row(c):
    details = ", ".join(f"{name} {value:+.2f}" for name, value in c["details"].items())
    return [c["claim"], c["noise"], c["verdict"], c["difference"], interval(c["estimate"]), details]


# ----------------------------------------------------------------------------------------------- reviewers.md

def reviewers_md(results, reviewers):
    settings = reviewers["settings"]
    n = len(settings["seeds"])
    return sections(
        "# What the reviewers asked for",
        f"Written by `python reproduce.py --full`, {n} seeds.  {how_to_read(n)}  "
        + took(reviewers["cost"]) + (TOY if settings["quick"] else ""),
        "## The paper's claims", *of_paper(reviewers["paper"]),
        "## Our statements on a base model of OPT's kind", *of_opt(results["claims"], reviewers["opt"]),
        "## What kind of diversity is lost", picture("kinds"), *of_kinds(reviewers["kinds"]),
        "## Which method keeps diversity", picture("methods"), *of_methods(reviewers),
        "## 1. Shift as a number, and the advantage against it", picture("shift"),
        *of_growth(reviewers["shift"]),
        "## 2. Which diversity measure to believe", picture("proxies"),
        *of_proxies(reviewers["proxies"]["tests"]),
        "## 3. Is it RL or just sharpening, and what KL buys", picture("frontier"),
        *of_frontier(reviewers["frontier"]),
        f"## 4. Error bars: the claims over {n} seeds", picture("seeds"),
        *of_seeds(results["claims"], reviewers["seeds"]),
        "## 5. A second task: instructions, and composition as the shift", picture("instruct"),
        *of_instruct(reviewers["instruct"]))


def picture(name):
    return f"![{name}](figures/{name}.png)"


def of_paper(rows):
    """The table of the paper's claims, those that differ first."""
    lines = [[row["section"], row["claim"], row["task"], row["here"],
              "; ".join(f"{e['of']} {signed(e)}" for e in row["found"]), row["verdict"]] for row in rows]
    return ["What the paper says is a second-hand reading that nobody here has checked against the PDF.  "
            "Verdict: `agrees` if every interval shows what the paper says, `differs` if one shows something "
            f"else, else `not shown`.  Where the paper sees no difference an interval within "
            f"±{paper.SMALL:g} agrees.  Only the direction is tested, not how much.  Intervals are over the "
            "choice of seeds and prompts, across inputs over that of seeds.  The paper does not report "
            "diversity in instruction following, because length confounds it; section 5 below has it with "
            "the lengths.",
            table(["section", "the paper", "task here", "quantity here", "found", "verdict"], lines)]


def of_opt(of_llama, of_opt):
    """Each claim on both base models, systematic noise."""
    rows = []
    for c in of_opt:
        same = pick(of_llama, claim=c["claim"], task="synthetic")
        rows.append([c["claim"], c["difference"], *(x for e in (same, c) for x in (
            signed(e["estimate"]), e["verdict"]))])
    return ["The base model of the other tables is of LLaMA's kind (rotary positions, RMSNorm, no biases); "
            "this one has learned positions, LayerNorm and biases.  Size, data and settings are the same.",
            table(["claim", "difference", "LLaMA's kind", "verdict", "OPT's kind", "verdict"], rows)]


def of_kinds(found):
    def measured(task, policy, measure):
        return cell(pick(found["good"], task=task, policy=policy, measure=measure)["estimate"])
    columns = {"good": "fraction good", "per_input_gold_diversity": "gold diversity, all",
               "good_gold_diversity": "gold diversity, good", "good_distinct": "different good answers of 16",
               "utility": "utility"}
    rows = [[NOISE_OF[task], name, *(measured(task, p, m) for m in columns)]
            for task in NOISE_OF for p, name in VARIED.items()]
    losses = [[NOISE_OF[x["task"]], POLICIES[x["policy"]], *(signed(x[k]) for k in (
        "loss", "errors_removed", "narrowing")), f"{x['inputs']:.0f}"] for x in found["split"]]
    names = {p: POLICIES.get(p) or f"PPO, β = {p.removeprefix('ppo_b')}" for p in COVERAGE_OF}
    coverage = [[names[p], *(interval(pick(found["coverage"], policy=p, k=k)) for k in KS)]
                for p in COVERAGE_OF]
    less = [[names[p], *(signed(pick(found["coverage_less_sft"], policy=p, k=k)) for k in KS)]
            for p in COVERAGE_OF if p != "sft"]
    ks = [f"k = {k}" for k in KS]
    return ["Temperature 1, in distribution.  Good: a gold reward at least the reference's.  Utility: "
            "NoveltyBench's, with the gold reward of good outputs.",
            table(["noise", "policy", *columns.values()], rows),
            "The loss of gold diversity beside SFT, on prompts where both policies have two good outputs, as "
            "the sum of what outputs below the reference added to it and of a narrower choice of good "
            "outputs.",
            table(["noise", "policy", "loss", "below the reference", "narrowing", "prompts"], losses),
            "Coverage: how often the best of k outputs is good; systematic noise, 64 outputs a prompt.",
            table(["policy", *ks], coverage), "The same less SFT's.", table(["policy", *ks], less)]


def of_methods(reviewers):
    def beside(x, key):
        return "" if x.get(key) is None else signed(x[key]) + ("" if x[key]["inside"] else " *")
    lines = [x for x in reviewers["frontier"]["frontier"] if x["temperature"] == DIVERSITY
             and x["curve"] not in ("SFT", "base")]
    columns = {"gold_reward": "gold reward", "wins": "win rate", "gold_diversity": "gold diversity",
               "good_gold_diversity": "gold diversity, good",
               "good_distinct": f"different good answers of {frontier.KEPT}"}
    against = {"kept_beside_bon": "diversity at equal gold reward, - best-of-N",
               "good_kept_beside_bon": "the same, good outputs",
               "gained_beside_bon": "gold reward at equal KL, - best-of-N",
               "kept_beside_ppo": "diversity at equal gold reward, - PPO",
               "gained_beside_ppo": "gold reward at equal KL, - PPO"}
    rows = [[x["policy"], f"{x['kl']:.2f}", *(cell(x[m]) for m in columns), f"{x['length']:.1f}",
             *(beside(x, key) for key in against)] for x in lines]
    paired = ("gold_reward", "gold_diversity", "good_distinct")
    return ["Systematic noise, in distribution, temperature 1.  The last columns interpolate along best-of-N "
            "over N and PPO over β, from the β of the highest gold reward up, and along the root of KL; * "
            "marks where that curve does not reach so far, and its nearest end was taken.",
            table(["method", "KL, nats", *columns.values(), "length", *against.values()], rows),
            "The same less PPO (β = 0.1) and less best-of-16, paired by seed and prompt.  Of so many "
            "differences one in twenty misses zero by chance.",
            table(["method", *(f"{columns[m]}, - {name}" for name in ("PPO", "best-of-16") for m in paired)],
                  [[x["policy"], *(signed(x[f"less_{other}"][m]) for other in ("ppo", "bon16")
                                   for m in paired)] for x in lines]),
            *of_methods_by_set(reviewers["methods"])]


def of_methods_by_set(found):
    names = list(dict.fromkeys((x["task"], x["policy"]) for x in found["wins"]))

    def over_sets(show, key, leave_out=()):
        return table(["noise", "policy", *map(short, SETS)], [
            [NOISE_OF[task], policy, *(show(pick(found["wins"], task=task, policy=policy, split=s)[key])
                                       for s in SETS)]
            for task, policy in names if policy not in leave_out])

    ranked = [[NOISE_OF[task], judge, policy, *(interval(pick(
        found["ranked_rightly"], task=task, judge=name, policy=policy, split=s)) for s in SETS)]
        for task in NOISE_OF for name, judge in methods.JUDGES.items() for policy in methods.JUDGED]
    return ["Win rate on all test sets, temperature 0.7, β = 0.1.", over_sets(cell, "wins"),
            "The same less PPO's.", over_sets(signed, "less_ppo", leave_out=["ppo"]),
            "Clauses outside the grammar, an output.", over_sets(cell, "ungrammatical"),
            "How often two judges rank two outputs to one prompt as the gold reward does, by whose outputs "
            "they are.", table(["noise", "judge", "outputs of", *map(short, SETS)], ranked)]


def of_growth(found):
    def changes(x):
        return [f"{signed(x[p])}: {direction(x[p])}" for p in ("ppo", "bon")]

    def ends(x):
        return f"{x['low']:.3f} to {x['high']:.3f} ({short(x['farthest'])})"
    by_measure = [[x["noise"], SHIFTS[x["measure"]], ends(x), f"{x['leverage']:.2f}", *changes(x)]
                  for x in found["slopes"]]
    by_kind = [[x["noise"], x["kind"], ", ".join(map(short, x["sets"])), *changes(x)] for x in found["along"]]
    count = [[POLICIES[p], *(str(n) for n in found["counts"][p].values())] for p in ("ppo", "bon")]
    policies = ["PPO - SFT", "best-of-16 - SFT"]
    return ["Change of the advantage over SFT from the least to the most shifted set, by least squares; "
            "intervals over the choice of seeds, prompts and test sets.  Leverage: how much of the line the "
            "farthest set decides by itself; near 1 the slope compares that set with all others.",
            table(["noise", "measure", "from, to (farthest)", "leverage", *policies], by_measure),
            "How many of these slopes grow, shrink or are not shown.",
            table(["policy", *found["counts"]["ppo"]], count),
            "The same along one kind of shift, by JS bits; intervals over the choice of seeds and prompts.",
            table(["noise", "kind", "sets", *policies], by_kind),
            "Each test set's shift from train (500 prompts a side), its interval over texts, and the "
            "advantages (systematic noise).  Last line: the floor, between halves of train.",
            table(["test set", *SHIFTS.values(), *policies], rows_of_sets(found))]


def rows_of_sets(found, task="synthetic"):
    far, advantage = found["shift"][task], found["advantages"][task]
    rows = []
    for i, split in enumerate(found["sets"]):
        shifts = [of_shift(far[split], m) for m in SHIFTS]
        rows.append([short(split), *shifts, *(interval(advantage[p][i]) for p in ("ppo", "bon"))])
    return [*rows, ["floor", *(f"{far['test'][f'{m}_floor']:.3f}" for m in SHIFTS), "", ""]]


def of_proxies(tests):
    measures = [t for t in tests if t["measure"] not in (proxies.GOLD, "length")]
    return ["Where each measure ranks a policy farthest from its place by gold diversity (1: the most "
            "varied), and how fixing length moves its rank correlation over conditions; systematic noise.",
            table(["measure", "policy", "temperature", "place by the measure", "place by gold diversity",
                   "of", "with length fixed"], map(break_row, measures)),
            "Rank correlations with gold diversity: per input over conditions, over the inputs of a "
            "condition, and across inputs over conditions, each also with length fixed; with temperature; "
            "with the number of prompts mixed.  Then how often the set with more content measures as more "
            "varied.  study/proxies.py explains the tests.",
            table(["measure", *proxies.TESTS.values()],
                  [[proxies.NAMES[t["measure"]], *proxies.cells(t)] for t in tests])]


def break_row(t):
    policy, temperature, by_measure, by_gold, n = t["breaks"]
    length = t["between_length"][0] - t["between"][0]
    return [proxies.NAMES[t["measure"]], policy, f"{temperature:g}", str(by_measure), str(by_gold), str(n),
            f"{length:+.2f}"]


def of_frontier(found):
    def beside(e):
        return "" if e is None else signed(e) + ("" if e["inside"] else " *")
    columns = {"reward": "reward", "gold_reward": "gold reward", "wins": "win rate",
               "gold_diversity": "gold diversity"}
    rows = [[x["policy"], f"{x['kl']:.2f}", *(cell(x[m]) for m in columns),
             beside(x.get("above_sft")), beside(x.get("above_bon"))] for x in found["frontier"]]
    free = found["without_kl_penalty"]
    varied = {"gold_diversity": "gold diversity", "ead": "EAD", "embedding": "embeddings",
              "good_distinct": f"different good answers of {frontier.KEPT}"}
    sweep, k2 = ([pick(found["frontier"], curve=curve, knob=b, temperature=DIVERSITY) for b in betas]
                 for curve, betas in (("PPO", BETAS), ("PPO, k2 in the reward", K2)))

    def of_beta(x):
        return [f"{x['knob']:g}", f"{x['kl']:.2f}", cell(x["wins"]), *(cell(x[m]) for m in varied)]
    return [f"Test prompts in distribution, systematic noise.  Best-of-N: {found['kept']} independent "
            "outputs a prompt.  PPO at temperature 1 where none is named.  The last columns are win rates "
            "less SFT's and best-of-N's at equal gold diversity, interpolated, intervals over seeds and "
            "prompts; * marks where that curve does not reach the diversity, and its nearest end was taken.  "
            "KL is measured on the samples, of best-of-N bounded.",
            table(["policy", "KL, nats", *columns.values(), "- SFT", "- best-of-N"], rows),
            "PPO over the KL coefficient, temperature 1.",
            table(["β", "KL, nats", "win rate", *varied.values()], map(of_beta, sweep)),
            "The same with k2 in the reward, as in the authors' code.",
            table(["β", "KL, nats", "win rate", *varied.values()], map(of_beta, k2)),
            "Over-optimisation: PPO with β = 0 less PPO with β = 0.1, temperature 1.",
            table(["reward", "gold reward"], [[signed(free["reward"]), signed(free["gold_reward"])]])]


def seed_row(c):
    e = c["estimate"]
    return [c["claim"], c["noise"], format(Interval(e["mean"], e["low"], e["high"])),
            format(Interval(e["mean"], e["prompts_low"], e["prompts_high"])),
            "" if e["seed_sd"] is None else f"{e['seed_sd']:.2f}",
            ", ".join(f"{v:.2f}" for v in e["per_seed"]), c["verdict"]]


def of_seeds(stated, found):
    widest, changed = found["seeds_differ_most"], found["decided_otherwise"]
    counts = [[verdict, str(n)] for verdict, n in found["verdicts"].items()] + [
        ["of one number a prompt", str(found["with_many_prompts"])],
        ["of these, decided otherwise over prompts alone", str(len(changed)) + "".join(
            f"; {c['claim']}, {NOISE_OF[c['task']]}" for c in changed)],
        ["interval, times wider than over prompts alone, median",
         f"{found['times_wider_in_the_median']:.1f}"],
        ["largest standard deviation over seeds",
         f"{widest['seed_sd'] or 0:.2f}: {widest['claim']}, {NOISE_OF[widest['task']]}"]]
    return ["Seeds vary initialisation, data order and sampling; posts, references and test sets are the "
            "same, so differences are paired by prompt.",
            table(["claim", "noise", "mean, interval over seeds and prompts", "over prompts alone",
                   "sd of seeds",
                   "seed by seed", "verdict"], map(seed_row, stated)),
            table(["of the claims", "number"], counts)]


def of_instruct(found):
    def rows(key, policies):
        return [[COMPARED[p], *(cell(found[key][f"{p} {s}"]) for s in INSTRUCT_SETS)] for p in policies]
    header, far = ["policy", *INSTRUCT_SETS.values()], found["shift"]
    shifts = [[name, *(of_shift(far[s], m) for s in INSTRUCT_SETS), f"{far['test'][f'{m}_floor']:.3f}"]
              for m, name in SHIFTS.items()]
    measures = ("gold", "EAD", "self-BLEU", "embedding")
    kinds = [f"{m} {kind}" for kind in ("per input", "across") for m in measures]
    varied = [[name, *map(cell, found["diversity"][p].values()), f"{found['length'][p]:.1f}"]
              for p, name in VARIED.items()]
    return ["Win rate against the reference by the gold reward, temperature 0.7.",
            table(header, rows("win_rate", COMPARED)),
            "Win rate less SFT's.", table(header, rows("less_sft", BESIDE_SFT)),
            "Differences of PPO.", table(header, differences_of_ppo(found)),
            "Shift of the prompts from train.", table(["measure", *header[1:], "floor"], shifts),
            "Diversity on the test set in distribution, temperature 1 (self-BLEU: lower is more varied).  "
            f"PPO - SFT, gold diversity per input: {signed(found['ppo_cuts_gold_diversity'])}.",
            table(["policy", *kinds, "length"], varied),
            "Head to head against SFT, temperature 0.7.",
            table(header, [[POLICIES[p], *(cell(found["beats_sft"][f"{p} {s}"]) for s in INSTRUCT_SETS)]
                           for p in ("bon", "ppo")])]


def differences_of_ppo(found):
    """From the base model, on the sets where that is known; and of its advantage over SFT from that in
    distribution."""
    less_base, less_home = found["ppo_less_base"], found["ppo_advantage_less_in_distribution"]
    return [["PPO - base model", *(signed(less_base[s]) if s in less_base else "" for s in INSTRUCT_SETS)],
            ["PPO - SFT less the same in distribution", "", *map(signed, less_home.values())]]


# -------------------------------------------------------------------------------------------------- the files

def read_numbers(out):
    """(results.json, reviewers.json or None) of the folder `out`.  The second counts only for the same seeds,
    sizes and code."""
    results, path = json.loads((Path(out) / "results.json").read_text()), Path(out) / "reviewers.json"
    reviewers = json.loads(path.read_text()) if path.is_file() else {}
    same = all(reviewers.get(key) == results.get(key) for key in ("settings", "study"))
    return results, reviewers if reviewers and same else None


def write_tables(out):
    """Prints the tables of the JSON files in the folder `out`.  Returns the paths written."""
    results, reviewers = read_numbers(out)
    texts = {"results.md": results_md(results)}
    if reviewers:
        texts["reviewers.md"] = reviewers_md(results, reviewers)
    for name, text in texts.items():
        atomic_write(Path(out) / name, text.encode())
    return [Path(out) / name for name in texts]


def main(cfg):
    print("wrote " + ", ".join(map(str, write_tables(cfg.out))))


if __name__ == "__main__":
    launch(main, Config, __doc__)
