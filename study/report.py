"""results.md and reviewers.md: tables of the numbers in results.json and reviewers.json, and nothing else.

    python -m study.report               # prints both anew from the JSON files in results/
"""
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import diversity
from common.files import atomic_write
from common.flags import Common, run
from common.stats import Interval
from study import proxies
from study.growth import direction
from study.instruct import BESIDE_SFT, COMPARED, VARIED
from study.names import DIVERSITY, INSTRUCT_SETS, NOISE, POLICIES, QUALITY, SETS, pick, short
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
    return format(Interval(e["mean"], *ends(e)), f".{digits}f")


def signed(e, digits=2):
    return format(Interval(e["mean"], *ends(e)), f"+.{digits}f")


def spread(e):
    """The standard deviation over seeds, where there are enough of them."""
    return f" ± {e['seed_sd']:.2f}" if len(e["per_seed"]) >= ENOUGH_SEEDS else ""


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
    sweep = table(["beta", "reward", "gold reward", "KL, nats", "length", "win rate ID",
                   "gold diversity per input"], map(sweep_row, results["kl_sweep"]))
    claims = table(["claim", "noise", "verdict", "difference", "estimate", "more"],
                   map(claim_row, results["claims"]))
    return sections(
        "# Results",
        f"{len(settings['seeds'])} seeds, {settings['inputs']} prompts a test set, 16 outputs a prompt.  "
        f"{how_to_read(len(settings['seeds']))}  Written by `python reproduce.py`.  "
        + took(results["cost"]) + (TOY if settings["quick"] else ""),
        *(part for task in NOISE for part in of_task(results, task)),
        "## The KL coefficient (systematic noise)",
        "Reward, gold reward, KL, length: at the last PPO step.  Win rate at temperature 0.7, gold diversity "
        "at 1.",
        sweep,
        "## What of the paper's claims holds in these runs",
        "A claim holds, or its opposite does, if the 95 % interval of the difference over the choice of "
        "seeds and prompts lies on one side of zero (common/stats.py, over_seeds).  Else it is not shown; "
        "fewer than four seeds do not decide.",
        claims)


def of_task(results, task):
    """The paragraphs and tables of one kind of noise."""
    matched = ", ".join(f"{t:.2f}" for t in results["matched_temperature"][task])
    return [f"## {NOISE[task].capitalize()}",
            "Win rate against the reference by the gold reward, temperature 0.7",
            win_table(results, task),
            f"Matched temperature, seed by seed: {matched}.  Ceilings: PPO on the gold reward, and the best "
            "of 16 SFT samples by the gold reward (oracle).",
            "Diversity per input, temperature 1, ID test set (self-BLEU: lower is more varied)",
            diversity_table(results, task, "per_input", cell),
            "Diversity across inputs, temperature 1, ID test set (self-BLEU: lower is more varied)",
            diversity_table(results, task, "across", lambda e: f"{e['mean']:.2f}{spread(e)}"),
            accuracy(results, task), open_ends(results["unfinished"][task])]


def win_table(results, task):
    def rate(policy, split):
        t = "matched" if policy == "sft_matched" else QUALITY
        return cell(pick(results["win_rate"], task=task, policy=policy, split=split, temperature=t))
    return table(["policy", *map(short, SETS)],
                 [[name, *(rate(policy, s) for s in SETS)] for policy, name in POLICIES.items()])


def diversity_table(results, task, kind, show):
    """kind: per_input or across; show: function of an estimate."""
    def estimate(policy, measure):
        return pick(results["diversity"], task=task, policy=policy, split="test", temperature=DIVERSITY,
                    measure=measure)
    columns = [m for m in diversity.COLUMNS if m not in ("length", "nli")]
    rows = [[POLICIES[p], *(show(estimate(p, f"{kind}_{m}")) for m in columns),
             f"{estimate(p, 'per_input_length')['mean']:.1f}"] for p in ("sft", "bon", "ppo", "ppo_gold")]
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
        ["gold rewards more than 1 apart", *(f"{x:.3f}" for x in far_apart), "", ""]])).rstrip()


def open_ends(unfinished):
    worst = max(unfinished, key=unfinished.get)
    return ("Samples of SFT, best-of-16 and PPO that did not end, temperature 0.7: at most "
            f"{unfinished['test']:.1%} in distribution, {unfinished[worst]:.1%} on {worst}.")


def sweep_row(x):
    return [f"{x['beta']:g}", f"{x['reward']:.2f}", f"{x['gold_reward']:.2f}", f"{x['kl']:.2f}",
            f"{x['length']:.1f}", cell(x["win"]), cell(x["diversity"])]


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


def of_growth(found):
    def changes(x):
        return [f"{signed(x[p])}: {direction(x[p])}" for p in ("ppo", "bon")]

    def ends(x):
        return f"{x['low']:.3f} to {x['high']:.3f} ({short(x['farthest'])})"
    by_measure = [[x["noise"], SHIFTS[x["measure"]], ends(x), *changes(x)] for x in found["slopes"]]
    by_kind = [[x["noise"], x["kind"], ", ".join(map(short, x["sets"])), *changes(x)] for x in found["along"]]
    count = [[POLICIES[p], *(str(n) for n in found["counts"][p].values())] for p in ("ppo", "bon")]
    policies = ["PPO - SFT", "best-of-16 - SFT"]
    return ["Change of the advantage over SFT from the least to the most shifted set, by least squares; "
            "intervals over the choice of seeds, prompts and test sets.",
            table(["noise", "measure", "from, to (farthest)", *policies], by_measure),
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
             beside(x["above_sft"]), beside(x["above_bon"])] for x in found["frontier"]]
    free = found["without_kl_penalty"]
    return [f"Test prompts in distribution, systematic noise.  Best-of-N: {found['kept']} independent "
            "outputs a prompt.  PPO at temperature 1 where none is named.  The last columns are win rates "
            "less SFT's and best-of-N's at equal gold diversity, interpolated, intervals over seeds and "
            "prompts; * marks where that curve does not reach the diversity, and its nearest end was taken.  "
            "KL is measured on the samples, of best-of-N bounded.",
            table(["policy", "KL, nats", *columns.values(), "- SFT", "- best-of-N"], rows),
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
            f"; {c['claim']}, {NOISE[c['task']]}" for c in changed)],
        ["interval, times wider than over prompts alone, median",
         f"{found['times_wider_in_the_median']:.1f}"],
        ["largest standard deviation over seeds",
         f"{widest['seed_sd'] or 0:.2f}: {widest['claim']}, {NOISE[widest['task']]}"]]
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
    varied = [[POLICIES[p], *map(cell, found["diversity"][p].values())] for p in VARIED]
    return ["Win rate against the reference by the gold reward, temperature 0.7.",
            table(header, rows("win_rate", COMPARED)),
            "Win rate less SFT's.", table(header, rows("less_sft", BESIDE_SFT)),
            "Differences of PPO.", table(header, differences_of_ppo(found)),
            "Shift of the prompts from train.", table(["measure", *header[1:], "floor"], shifts),
            "Diversity on the test set in distribution, temperature 1 (self-BLEU: lower is more varied).  "
            f"PPO - SFT, gold diversity per input: {signed(found['ppo_cuts_gold_diversity'])}.",
            table(["policy", *kinds], varied)]


def differences_of_ppo(found):
    """From the base model, on the sets where that is known; and of its advantage over SFT from that in
    distribution."""
    less_base, less_home = found["ppo_less_base"], found["ppo_advantage_less_in_distribution"]
    return [["PPO - base model", *(signed(less_base[s]) if s in less_base else "" for s in INSTRUCT_SETS)],
            ["PPO - SFT less the same in distribution", "", *map(signed, less_home.values())]]


# -------------------------------------------------------------------------------------------------- the files

def read_numbers(out):
    """(results.json, reviewers.json or None) of the folder `out`.  The second counts only for the same seeds
    and sizes."""
    results, path = json.loads((Path(out) / "results.json").read_text()), Path(out) / "reviewers.json"
    reviewers = json.loads(path.read_text()) if path.is_file() else None
    return results, reviewers if reviewers and reviewers["settings"] == results["settings"] else None


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
    run(main, Config, __doc__)
