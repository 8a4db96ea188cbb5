"""Answers to the paper's reviewers: tables, sentences and pictures of what `reproduce.py --full` measured.

Five sections, each a function of the results that returns its two sentences of finding, its tables, its
numbers and how to draw its picture.  A sentence is put together from the numbers: with other numbers it says
something else.  Writes reviewers.md, reviewers.json and figures/<section>.png.

Intervals are 95 %.  Those over seeds and prompts resample both; where a section resamples more, it says so.
"""
import json
from dataclasses import asdict

import numpy as np

import instructions
import proxies
from bon import best_of_n_kl
from reproduce import (COLOURS, NAMES, SPLITS, SWEEP, WORLDS, Results, arms, cell, redrawn, show, summary,
                       table)
from reviewers import BEST_OF, BETAS, GRADED, KEPT
from runtime import write_whole
from splits import SHIFTS

DRAWS = 1000
PRICES = sorted((*SWEEP, *BETAS, 0.1))      # all betas
SHORT = lambda split: split.removeprefix("ood_").removeprefix("graded_")  # noqa: E731


def interval(draws, value):
    """{mean, low, high} of a statistic's value and its bootstrap draws."""
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return {"mean": float(value), "low": float(low), "high": float(high)}


def sign(e, yes, no, open_):
    """One of three phrases: the interval lies above zero, below it, or holds it."""
    return yes if e["low"] > 0 else no if e["high"] < 0 else open_


def signed(e):
    return f"{e['mean']:+.2f} [{e['low']:+.2f}, {e['high']:+.2f}]"


def read(folder, r, world, name):
    """The JSON of one stage, for every seed."""
    return [json.loads((folder / f"seed{s}" / world / f"{name}.json").read_text()) for s in r.seeds]


# ------------------------------------------------------------------------------------- 1. shift as a number

def slope(x, advantages, rng=None, redraw_sets=True):
    """Change of the advantage from the least to the most shifted set, by least squares.  x: (sets,) shifts;
    advantages: one (seeds, prompts) array for each set.  With rng of one bootstrap draw, in which seeds and
    prompts, and with redraw_sets the sets too, are resampled; nan if that leaves one shift only."""
    picks, y = np.arange(len(x)), [a.mean() for a in advantages]
    if rng:
        picks = rng.integers(0, len(x), len(x)) if redraw_sets else picks
        seeds = rng.integers(0, len(advantages[0]), len(advantages[0]))
        y = [a[seeds][:, rng.integers(0, a.shape[1], a.shape[1])].mean() for a in advantages]
    u, v = x[picks], np.array(y)[picks]
    span, u = np.ptp(u), u - u.mean()
    return float(u @ v / (u @ u) * span) if span > 0 else np.nan


KINDS = {   # of shift, by one thing more at a time
    "new words": ["test", *sorted((s for s in (*SPLITS, *GRADED) if "words" in s),
                                  key=lambda s: int(s.split("words")[1]))],
    "more distractors": ["test", *sorted((s for s in (*SPLITS, *GRADED) if "distractors" in s),
                                         key=lambda s: int(s.split("distractors")[1]))]}


def section_shift(folder, r):
    sets, rng = [*SPLITS, *GRADED], np.random.default_rng(0)
    slopes, along, points, far = [], [], {}, {}

    def change(x, advantage, **how):
        return {p: interval([slope(x, a, rng, **how) for _ in range(DRAWS)], slope(x, a))
                for p, a in advantage.items()}
    for world in WORLDS:
        far[world] = json.loads((folder / f"seed{r.seeds[0]}" / world / "shift.json").read_text())
        between = read(folder, r, world, "graded")

        def won(policy, split):
            if split in GRADED:
                return np.array([seed[split][policy] for seed in between])  # noqa: B023
            return r.get(world, policy, split, 0.7, "wins")  # noqa: B023
        advantage = {p: {s: won(p, s) - won("sft", s) for s in sets} for p in ("ppo", "bon")}
        points[world] = {p: [summary(advantage[p][s]) for s in sets] for p in advantage}
        for m in SHIFTS:
            x = np.array([far[world][s][m] for s in sets])
            slopes.append({"world": WORLDS[world], "measure": m, "low": float(x.min()),
                           "high": float(x.max()), "farthest": sets[int(x.argmax())],
                           **change(x, {p: list(a.values()) for p, a in advantage.items()})})
        for kind, chosen in KINDS.items():
            x = np.array([far[world][s]["js"] for s in chosen])
            along.append({"world": WORLDS[world], "kind": kind, "sets": chosen, **change(
                x, {p: [a[s] for s in chosen] for p, a in advantage.items()}, redraw_sets=False)})

    def judged(e):
        return f"{signed(e)}: " + sign(e, "grows", "shrinks", "not shown")
    said = [sign(line["ppo"], "grow", "shrink", "are not shown") for line in slopes]
    here = [sign(line["ppo"], "grows", "shrinks", "is not shown to change") for line in along]
    first, farthest = slopes[0], sorted({SHORT(line["farthest"]) for line in slopes})
    findings = [
        f"From the least to the most shifted of {len(sets)} test sets PPO's advantage over SFT changes "
        f"by {signed(first['ppo'])} and best-of-16's by {signed(first['bon'])} ({first['world']}, shift "
        f"as {SHIFTS[first['measure']]}); of PPO's {len(said)} slopes (five measures, two worlds) "
        + ", ".join(f"{said.count(w)} {w}" for w in ("grow", "shrink", "are not shown"))
        + f", and the measures {'do not agree' if farthest[1:] else 'agree'} on which set is the farthest "
        f"({', '.join(farthest)}).",
        "The paper's 'particularly as the shift grows' becomes, along one kind of shift at a time: "
        + "; ".join(f"{line['kind']}, {line['world']}, the advantage {w}, {signed(line['ppo'])}"
                    for line, w in zip(along, here)) + "."]
    distances = [[SHORT(s),
                  *(f"{d[s][m]:.3f} [{d[s][m + '_low']:.3f}, {d[s][m + '_high']:.3f}]" for m in SHIFTS),
                  *(show(points["world"][p][i]) for p in ("ppo", "bon"))]
                 for d in [far["world"]] for i, s in enumerate(sets)]
    floor = [f"{far['world']['test'][m + '_floor']:.3f}" for m in SHIFTS]

    def draw(figure):
        from matplotlib.ticker import NullFormatter
        axes = figure.subplots(2, 3)
        for line, world in zip(axes, WORLDS):
            for ax, m in zip(line, ("js", "cosine", "wasserstein")):
                x = np.array([far[world][s][m] for s in sets])
                ends = np.array([[far[world][s][f"{m}_{end}"] for s in sets] for end in ("low", "high")])
                spread = np.abs(np.maximum(ends, x / 5) - x)        # a logarithmic axis has no zero
                for p in ("bon", "ppo"):
                    e = points[world][p]
                    ax.errorbar(x, [v["mean"] for v in e], xerr=spread, yerr=arms(e), fmt="o", ms=5, lw=.8,
                                color=COLOURS[p], label=f"{NAMES[p]} - SFT")
                for i, s in enumerate(sets):
                    ax.annotate(SHORT(s), (x[i], points[world]["ppo"][i]["mean"]), fontsize=6,
                                textcoords="offset points", xytext=(4, 4))
                ax.axhline(0, color="black", lw=.5)
                ax.axvline(far[world]["test"][f"{m}_floor_high"], color="#888888", ls=":", lw=1)
                ax.set(xlabel=f"shift of the prompts from train: {SHIFTS[m]}", title=WORLDS[world],
                       xscale="log")
                ax.xaxis.set_minor_formatter(NullFormatter())
            line[0].set_ylabel("win rate less SFT's")
            line[0].legend(fontsize=7, frameon=False)
        figure.suptitle("Does RLHF's advantage grow with the shift?  (dotted: what chance alone gives)")
    return {"title": "1. Shift as a number, and the advantage against it", "findings": findings, "draw": draw,
            "size": (13, 8), "tables": [
                ("Change of the advantage over SFT from the least to the most shifted set, by least squares; "
                 "intervals resample test sets, seeds and prompts.", table(
                     ["world", "measure", "from, to (farthest)", "PPO - SFT", "BoN-16 - SFT"],
                     [[x["world"], SHIFTS[x["measure"]],
                       f"{x['low']:.3f} to {x['high']:.3f} ({SHORT(x['farthest'])})", judged(x["ppo"]),
                       judged(x["bon"])] for x in slopes])),
                ("The same along one kind of shift, by JS bits; intervals resample seeds and prompts.",
                 table(["world", "kind", "sets", "PPO - SFT", "BoN-16 - SFT"],
                       [[x["world"], x["kind"], ", ".join(map(SHORT, x["sets"])), judged(x["ppo"]),
                         judged(x["bon"])] for x in along])),
                ("Each test set's shift from train (500 prompts a side), its interval over texts, and the "
                 "advantages (systematic noise).  Last line: the floor, between halves of train.", table(
                     ["test set", *SHIFTS.values(), "PPO - SFT", "BoN-16 - SFT"],
                     [*distances, ["floor", *floor, "", ""]]))],
            "numbers": {"slopes": slopes, "along": along, "shift": far, "advantages": points, "sets": sets}}


# ------------------------------------------------------------------------------- 2. which measure to believe

def tracks(t):
    """What a measure follows, in words, from one line of `proxies.all_tests`."""
    form = ("phrasing more than content" if t["form"][2] < 0.5 else
            "content more than phrasing" if t["form"][1] > 0.5 else "phrasing as much as content")
    return f"{form} ({t['form'][0]:.2f}); " + ", ".join(f"{what} {t[test][0]:.2f}" for what, test in (
        ("the order of policies", "between"), ("prompts of one policy", "within"),
        ("temperature", "temperature"), ("prompts mixed in", "content")))


def breaks(t):
    """Where a measure fails, in words."""
    policy, temperature, by_measure, by_truth, n = t["breaks"]
    length = t["between_length"][0] - t["between"][0]
    return (f"ranks {policy} at T = {temperature:g} number {by_measure} of {n}, the truth {by_truth}"
            + (f"; length moves it: {length:+.2f} with length fixed" if abs(length) > 0.1 else "")
            + ("; blind across inputs ({:.2f} [{:.2f}, {:.2f}])".format(*t["across"])
               if t["across"][1] <= 0 else ""))


def section_proxies(folder, r):
    found = read(folder, r, "world", "conditions")
    conditions = [c for seed in found for c in seed["conditions"]]
    # (value, low, high), the interval over sets, means over seeds: only the encoder differs between seeds
    form = {m: tuple(np.mean([seed["form"][m] for seed in found], axis=0).tolist()) for m in found[0]["form"]}
    tests = proxies.all_tests(conditions, form)
    measures = {t["measure"]: t for t in tests if t["measure"] not in (proxies.TRUTH, "length")}
    name = proxies.NAMES

    def ranked(test):
        """Measures, the best first by one test."""
        return sorted(measures, key=lambda m: -measures[m][test][0])

    def value(m, test):
        return "{} {:.2f} [{:.2f}, {:.2f}]".format(name[m], *measures[m][test])
    best, *_, worst = ranked("between")
    inside = ranked("within")[0]
    fooled = [name[m] for m in measures if measures[m]["form"][2] < 0.5]
    sound = [name[m] for m in measures if measures[m]["form"][1] > 0.5]
    steepest = max(measures, key=lambda m: abs(np.subtract(*measures[m]["breaks"][2:4])))
    findings = [
        f"Over {measures[best]['breaks'][4]} conditions (policy and temperature, {len(r.seeds)} seeds) "
        f"the true order of policies is given best by {value(best, 'between')} and worst by "
        f"{value(worst, 'between')}, with length held fixed {measures[best]['between_length'][0]:.2f} "
        f"and {measures[worst]['between_length'][0]:.2f}; which prompts of one policy get varied answers "
        f"no measure tells better than {value(inside, 'within')}.",
        "Of one story in 16 phrasings and 16 stories in one phrasing, "
        f"{', '.join(fooled) or 'no measure'} call the phrasings more varied and "
        f"{', '.join(sound) or 'none'} the stories; the largest error on a policy is {name[steepest]}'s, "
        f"which {breaks(measures[steepest]).split(';')[0]}."]

    def draw(figure):
        axes = figure.subplots(2, 4).ravel()
        policies = sorted({c["policy"] for c in conditions})
        colours = dict(zip(policies, ("#ccbb44", "#cc3311", "#ee6677", "#aa3377", "#882255", "#ee8866",
                                      "#228833", "#4477aa")))
        for ax, m in zip(axes, [*measures, "length"]):
            for policy in policies:
                of = [c for c in conditions if c["policy"] == policy]
                ax.plot(*([np.nanmean(c["per_input"][k]) for c in of] for k in (proxies.TRUTH, m)), "o", ms=4,
                        color=colours[policy], alpha=.7, label=policy)
            title = (f"{name[m]}: rank correlation {measures[m]['between'][0]:.2f}" if m in measures
                     else "length (no measure of diversity)")
            ax.set(title=title, xlabel="true diversity of what outputs say")
        axes[-1].axis("off")
        axes[-1].legend(*axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="center")
        figure.suptitle("Each measure against the truth, per input: a point is a policy at one temperature "
                        "and seed")
    return {"title": "2. Which diversity measure to believe", "findings": findings, "draw": draw,
            "size": (14, 7), "tables": [
                ("What each measure tracks (rank correlations) and when it breaks, systematic noise; numbers "
                 "in the next table.",
                 table(["measure", "tracks", "breaks"],
                       [[name[m], tracks(t), breaks(t)] for m, t in measures.items()])),
                ("Rank correlations with the truth: per input over conditions, over the inputs of a "
                 "condition, and across inputs over conditions, each also with length fixed; with "
                 "temperature; with the number of prompts mixed.  Then how often the set with more "
                 "content measures as more varied.  proxies.py explains the tests.",
                 table(["measure", *proxies.TESTS.values()],
                       [[name[t["measure"]], *proxies.cells(t)] for t in tests]))],
            "numbers": {"tests": tests}}


# ------------------------------------------------------------------------ 3. is it RL, or just sharpening?

class Frontier:
    """frontier.json of all seeds: get(key, measure) gives (seeds, prompts), of (policy, temperature)."""

    def __init__(self, seeds):
        self.lines = [{(x["policy"], x["temperature"]): x for x in seed} for seed in seeds]
        self.keys = list(self.lines[0])

    def get(self, key, measure):
        return np.array([seed[key][measure] for seed in self.lines], dtype=float)

    def kl(self, key):
        """Mean over seeds, nats; of best-of-N its bound."""
        if key[0].startswith("bon"):
            return best_of_n_kl(int(key[0][3:]))
        return float(np.mean([seed[key]["kl"] for seed in self.lines]))

    def above(self, key, curve, draws=DRAWS):
        """Win rate of `key` less that of `curve`, a list of keys, at the same true diversity, interpolated:
        {mean, low, high, inside}.  Seeds and prompts are resampled together on both sides; inside: whether
        the curve reaches that diversity, else its nearest end is taken."""
        def difference(diversity, won):     # of `key` first, then of the curve's points
            order = np.argsort(diversity[1:])
            return won[0] - np.interp(diversity[0], diversity[1:][order], won[1:][order])
        x, y = ([self.get(k, m) for k in (key, *curve)] for m in ("semantic", "wins"))
        found = map(difference, *(np.stack([redrawn(v, draws) for v in z], axis=1) for z in (x, y)))
        mean = [np.array([v.mean() for v in z]) for z in (x, y)]
        return interval(list(found), difference(*mean)) | {
            "inside": bool(mean[0][1:].min() <= mean[0][0] <= mean[0][1:].max())}


def section_frontier(folder, r):
    f = Frontier(read(folder, r, "world", "frontier"))
    sft = sorted((k for k in f.keys if k[0] == "sft"), key=lambda k: k[1])
    best = [(f"bon{n}", 1.0) for n in BEST_OF]
    name = lambda beta: "ppo" if beta == 0.1 else f"ppo_b{beta:g}"  # noqa: E731
    priced = {beta: (name(beta), 1.0) for beta in PRICES}
    lines = []
    for title, key in [*((f"PPO, β = {b:g}", priced[b]) for b in PRICES),
                       *((f"PPO, β = {b:g}, T = 0.7", (name(b), 0.7)) for b in PRICES),
                       *((f"best of {n}", (f"bon{n}", 1.0)) for n in BEST_OF),
                       *((f"SFT, T = {k[1]:g}", k) for k in sft)]:
        line = {"policy": title, "kl": f.kl(key)}
        line |= {m: summary(f.get(key, m)) for m in ("reward", "truth", "wins", "semantic")}
        line["above_sft"] = f.above(key, sft) if key[0] != "sft" else None
        line["above_bon"] = f.above(key, best) if key[0].startswith("ppo") else None
        lines.append(line)
    of = {line["policy"]: line for line in lines}
    ppo, free = of["PPO, β = 0.1"], of["PPO, β = 0"]
    by_truth = [of[f"PPO, β = {b:g}"] for b in PRICES]
    peak = max(by_truth, key=lambda x: x["truth"]["mean"])
    top = of[f"best of {BEST_OF[-1]}"]
    drop = summary(f.get(priced[0.0], "truth") - f.get(priced[0.1], "truth"))
    gain = summary(f.get(priced[0.0], "reward") - f.get(priced[0.1], "reward"))
    outside = " (of the curve's nearest end, for it does not reach that diversity)"
    beyond = lambda e: "" if e["inside"] else outside  # noqa: E731
    above_sft, above_bon = (signed(ppo[k]) + beyond(ppo[k]) for k in ("above_sft", "above_bon"))
    words = sign(ppo["above_sft"], "lies above SFT's frontier: RL is more than sharpening",
                 "lies below SFT's frontier", "cannot be told from SFT's frontier")
    over = gain["low"] > 0 > drop["high"]
    findings = [
        f"PPO (β = 0.1, temperature 1) {words}; at equal true diversity its win rate is {above_sft} from "
        f"SFT's at a lower temperature and {above_bon} from best-of-N's, and best-of-{BEST_OF[-1]}'s is "
        f"{signed(top['above_sft'])} from SFT's.",
        f"Best-of-{BEST_OF[-1]} reaches a true score of {top['truth']['mean']:.2f} for at most "
        f"{top['kl']:.1f} nats, PPO its highest of {peak['truth']['mean']:.2f} at "
        f"{peak['policy'].split(', ')[1]} for {peak['kl']:.1f}; without a price on KL ({free['kl']:.1f} "
        f"nats), against β = 0.1, the reward model's score changes by {signed(gain)} and the truth by "
        f"{signed(drop)}: over-optimisation{'' if over else ' is not shown'}."]
    rows = [[x["policy"], f"{x['kl']:.2f}", *(cell(x[m]) for m in ("reward", "truth", "wins", "semantic")),
             *(signed(x[k]) + ("" if x[k]["inside"] else " *") if x[k] else ""
               for k in ("above_sft", "above_bon"))]
            for x in lines]

    def draw(figure):
        left, right = figure.subplots(1, 2)
        curves = ((sft, "SFT over temperatures", COLOURS["sft"], "o-"),
                  (best, f"best-of-N of SFT, N = 1 ... {BEST_OF[-1]}", COLOURS["bon"], "s-"),
                  (list(priced.values()), "PPO over β, temperature 1", COLOURS["ppo"], "D-"),
                  ([(name(b), 0.7) for b in PRICES], "PPO over β, temperature 0.7", "#ee8866", "D--"))
        for keys, label, colour, style in curves:
            x, y = ([summary(f.get(k, m)) for k in keys] for m in ("semantic", "wins"))
            left.errorbar([v["mean"] for v in x], [v["mean"] for v in y], xerr=arms(x), yerr=arms(y),
                          fmt=style, ms=4, lw=1, color=colour, label=label)
        for b, key in priced.items():
            left.annotate(f"β={b:g}", (f.get(key, "semantic").mean(), f.get(key, "wins").mean()), fontsize=7,
                          textcoords="offset points", xytext=(5, -8), color=COLOURS["ppo"])
        left.set(xlabel="true diversity per input", ylabel="win rate against the reference, in distribution",
                 title="Quality against diversity")
        left.legend(fontsize=8, frameon=False)
        for keys, label, marker in ((best, "best-of-N", "s"),
                                    (sorted(priced.values(), key=f.kl), "PPO over β", "D")):
            x = [np.sqrt(f.kl(k)) for k in keys]
            for m, colour in (("reward", "#cc3311"), ("truth", "#228833")):
                e = [summary(f.get(k, m)) for k in keys]
                right.errorbar(x, [v["mean"] for v in e], yerr=arms(e),
                               fmt=f"{marker}{'-' if marker == 'D' else ':'}",
                               ms=4, lw=1, color=colour,
                               label=f"{label}: {'reward model' if m == 'reward' else 'true score'}")
        right.set(xlabel="square root of KL from SFT, nats (best-of-N: its bound)", ylabel="score",
                  title="What a nat of KL buys")
        right.legend(fontsize=8, frameon=False)
        figure.suptitle("Is it RL, or just sharpening?")
    return {"title": "3. Is it RL or just sharpening, and what KL buys", "findings": findings, "draw": draw,
            "size": (13, 6), "tables": [(
                f"Test prompts in distribution, systematic noise.  Best-of-N: {KEPT} independent outputs "
                "a prompt.  The last columns are win rates less SFT's and best-of-N's at equal true "
                "diversity, interpolated, intervals over seeds and prompts; * marks where that curve "
                "does not reach the diversity, and its nearest end was taken.  KL is measured on the "
                "samples, of best-of-N bounded.", table(
                    ["policy", "KL, nats", "reward", "true score", "win rate", "true diversity", "- SFT",
                     "- best-of-N"],
                    rows))],
            "numbers": {"frontier": lines}}


# --------------------------------------------------------------------------------------------- 4. error bars

def section_seeds(folder, r, stated):
    both = [c for c in stated if "all_low" in c["estimate"]]
    wide = [{"low": c["estimate"]["all_low"], "high": c["estimate"]["all_high"]} for c in both]
    changed = [f"{c['claim']}, {c['world']}" for c, w in zip(both, wide)
               if sign(c["estimate"], 1, -1, 0) != sign(w, 1, -1, 0)]
    widths = [(w["high"] - w["low"], c["estimate"]["high"] - c["estimate"]["low"])
              for c, w in zip(both, wide)]
    ratio = np.median([a / b for a, b in widths if b] or [1.])  # no width: all prompts alike, as at toy size
    holds, open_, against = (sum(c["verdict"] == v for c in stated)
                             for v in ("HOLDS", "NOT SHOWN", "DOES NOT HOLD: the opposite"))
    widest = max(both, key=lambda c: c["estimate"]["seed_sd"] or 0)
    findings = [
        f"With {len(r.seeds)} seeds, {holds} of {len(stated)} claims hold with every seed agreeing, "
        f"{open_} are not shown and of {against} the opposite holds; {len(changed) or 'none'} of the "
        f"{len(both)} differences that can be resampled both ways would be judged otherwise if seeds "
        "were drawn as well as prompts"
        + (f" ({'; '.join(changed)})." if changed else "."),
        f"Drawing seeds too widens the interval {ratio:.1f} times in the median claim; seeds differ most "
        f"in `{widest['claim']}` ({widest['world']}), with a standard deviation of "
        f"{widest['estimate']['seed_sd'] or 0:.2f}."]
    rows = [[c["claim"], c["world"], show(c["estimate"]),
             f"[{c['estimate']['all_low']:.2f}, {c['estimate']['all_high']:.2f}]" if c in both else "",
             f"{c['estimate']['seed_sd']:.2f}" if c["estimate"]["seed_sd"] is not None else "",
             ", ".join(f"{v:.2f}" for v in c["estimate"]["per_seed"]), c["verdict"]] for c in stated]

    def draw(figure):
        ax, y = figure.subplots(), np.arange(len(both))[::-1]
        for i, c in zip(y, both):
            e, colour = c["estimate"], "#cc3311" if c["world"] == WORLDS["world"] else "#4477aa"
            ax.plot((e["all_low"], e["all_high"]), (i, i), lw=1, color=colour)
            ax.plot((e["low"], e["high"]), (i, i), lw=4, alpha=.4, color=colour)
            ax.plot(e["per_seed"], [i] * len(e["per_seed"]), "|", ms=8, color=colour)
            ax.plot(e["mean"], i, "o", ms=4, color=colour)
        ax.set_yticks(y, [c["claim"].split(" (its gap")[0] for c in both], fontsize=7)
        ax.axvline(0, color="black", lw=.8)
        ax.set(xlabel="difference in win rate or diversity (red: systematic noise, blue: independent)")
        figure.suptitle("Every claim: thick, over prompts; thin, over seeds and prompts; ticks, seeds")
    return {"title": f"4. Error bars: the headline over {len(r.seeds)} seeds", "findings": findings,
            "draw": draw,
            "size": (10, 8), "tables": [(
                "Seeds vary initialisation, data order and sampling; posts, references and test sets "
                "are the same, so differences are paired by prompt.", table(
                    ["claim", "world", "mean, interval over prompts", "over seeds and prompts", "sd of seeds",
                     "seed by seed", "verdict"], rows))],
            "numbers": {"claims": stated}}


# ------------------------------------------------------------------------------------------- 5. instructions

def section_instruct(folder, r):
    i = Results(folder, r.seeds, ("instruct",))
    sets = [s for s in instructions.SPLITS if s == "test" or s.startswith("ood_")]
    titles = {"test": "single, known pair", "ood_pairs": "single, unseen pair", "ood_then2": "A, then B",
              "ood_then3": "A, then B, then C"}
    policies = {"base": "base model"} | {k: v for k, v in NAMES.items() if k != "sft_matched"}
    win = lambda p, s: i.get("instruct", p, s, 0.7, "wins")  # noqa: E731
    rate = {(p, s): summary(win(p, s)) for p in policies for s in sets}
    less = {(p, s): summary(win(p, s) - win("sft", s)) for p in ("base", "bon", "ppo", "ppo_truth")
            for s in sets}
    vary = {p: {f"{kind}_{m}": summary(i.get("instruct", p, "test", 1.0, f"{kind}_{m}"))
                for kind in ("per_input", "across") for m in ("semantic", "ead", "self_bleu", "embedding")}
            for p in ("sft", "bon", "ppo", "ppo_truth")}
    cut = summary(i.get("instruct", "ppo", "test", 1.0, "per_input_semantic")
                  - i.get("instruct", "sft", "test", 1.0, "per_input_semantic"))
    far = json.loads((folder / f"seed{r.seeds[0]}" / "instruct" / "shift.json").read_text())
    grows = {s: summary(win("ppo", s).mean(1, keepdims=True) - win("sft", s).mean(1, keepdims=True)
                        - (win("ppo", "test") - win("sft", "test")).mean(1, keepdims=True)) for s in sets[1:]}
    able = [titles[s] for s in sets[1:] if rate["base", s]["mean"] > 0.2]
    forgot = {s: signed({"mean": -e["mean"], "low": -e["high"], "high": -e["low"]})
              for s in sets for e in [less["base", s]]}
    back = summary(win("ppo", "ood_then2") - win("base", "ood_then2"))
    ranges = {s: f"[{min(g['per_seed']):+.2f}, {max(g['per_seed']):+.2f}]" for s, g in grows.items()}
    named = lambda values: ", ".join(f"{v} ({titles[s]})" for s, v in values.items())  # noqa: E731
    findings = [
        f"PPO's win rate less SFT's is {named({s: signed(less['ppo', s]) for s in sets})}; seed by seed, its "
        "advantage on a shifted set less that in distribution lies in "
        f"{named(ranges)}"
        f", and PPO's true diversity per input changes by {signed(cut)}.",
        f"The base model, which has met compositions of two, wins above 0.2 on {len(able)} of the "
        f"{len(sets) - 1} shifted sets{' (' + '; '.join(able) + ')' if able else ''}; fine-tuning on "
        f"single instructions changes its win rate by {named(forgot)}, and PPO ends {signed(back)} from "
        f"the base model on `{titles['ood_then2']}`."]

    def draw(figure):
        ax = figure.subplots()
        colours = COLOURS | {"base": "#bbbbbb", "oracle": "#888888"}
        for k, p in enumerate(policies):
            e = [rate[p, s] for s in sets]
            ax.bar(np.arange(len(sets)) + (k - 2.5) * .14, [v["mean"] for v in e], .13, yerr=arms(e),
                   color=colours[p],
                   label=policies[p], error_kw={"lw": .8})
        ax.set_xticks(range(len(sets)), [f"{titles[s]}\nJS {far[s]['js']:.2f} bits" for s in sets])
        ax.set(ylabel="win rate against the reference, temperature 0.7",
               title="Instructions: fine-tuned on single deeds, tested on compositions")
        ax.legend(fontsize=8, ncol=3, frameon=False)
    return {"title": "5. A second task: instructions, and composition as the shift", "findings": findings,
            "draw": draw,
            "size": (10, 5.5), "tables": [
                ("Win rate against the reference, true judge, temperature 0.7.", table(
                    ["policy", *titles.values()],
                    [[policies[p], *(cell(rate[p, s]) for s in sets)] for p in policies])),
                ("Win rate less SFT's.", table(
                    ["policy", *titles.values()],
                    [[policies[p], *(cell(less[p, s]) for s in sets)]
                     for p in ("base", "bon", "ppo", "ppo_truth")])),
                ("Shift of the prompts from train.", table(
                    ["measure", *titles.values(), "floor"],
                    [[SHIFTS[m],
                      *(f"{far[s][m]:.3f} [{far[s][m + '_low']:.3f}, {far[s][m + '_high']:.3f}]"
                        for s in sets),
                      f"{far['test'][m + '_floor']:.3f}"] for m in SHIFTS])),
                ("Diversity on the test set in distribution, temperature 1 (self-BLEU: lower is more "
                 "varied).", table(
                    ["policy", *(f"{m} {kind.replace('_', ' ')}" for kind in ("per_input", "across")
                                 for m in ("semantic", "EAD", "self-BLEU", "embedding"))],
                    [[NAMES[p], *(cell(e) for e in v.values())] for p, v in vary.items()]))],
            "numbers": {"win_rate": {f"{p} {s}": e for (p, s), e in rate.items()},
                        "less_sft": {f"{p} {s}": e for (p, s), e in less.items()}, "diversity": vary,
                        "shift": far,
                        "reward_model": {str(s): i.reward["instruct", s] for s in r.seeds}}}


# ------------------------------------------------------------------------------------------------- the report

def write(cfg, folder, r, stated, out):
    """reviewers.md, reviewers.json and figures/*.png in the folder `out`."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    (out / "figures").mkdir(exist_ok=True)
    toy = "  TOY SIZES (--quick): these are not results." if cfg.quick else ""
    parts = [f"# What the reviewers asked for\n\nWritten by `python reproduce.py --full`, {len(r.seeds)} "
             "seeds.  Every sentence is put together from the numbers by answers.py; intervals are 95 "
             f"%.{toy}"]
    everything = {"settings": asdict(cfg) | {"seeds": r.seeds}}
    sections = {"shift": section_shift(folder, r), "proxies": section_proxies(folder, r),
                "frontier": section_frontier(folder, r), "seeds": section_seeds(folder, r, stated),
                "instruct": section_instruct(folder, r)}
    for name, s in sections.items():
        figure = plt.figure(figsize=s["size"], layout="constrained")
        s["draw"](figure)
        figure.savefig(out / "figures" / f"{name}.png", dpi=110)
        plt.close(figure)
        parts += [f"## {s['title']}", *s["findings"], f"![{s['title']}](figures/{name}.png)",
                  *(f"{caption}\n\n{rows}" for caption, rows in s["tables"])]
        everything[name] = {"findings": s["findings"], **s["numbers"]}
        print(f"\n{s['title']}\n  " + "\n  ".join(s["findings"]))
    write_whole(out / "reviewers.md", ("\n\n".join(parts) + "\n").encode())
    write_whole(out / "reviewers.json", json.dumps(everything, indent=1).encode())
    print(f"\nwrote {out / 'reviewers.md'}, {out / 'reviewers.json'} and {out / 'figures'}")
