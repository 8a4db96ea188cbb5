"""Every picture of the study, drawn from the numbers in results.json and reviewers.json alone.

    python -m study.figures              # draws results/figure.png and results/figures/*.png anew

One policy has one colour and one marker everywhere.  The colours are Okabe and Ito's, which colour-blind
people can tell apart.  Bars are 95 % intervals over seeds and prompts, or
with fewer than four seeds the seeds' range; thin marks are the seeds, one each.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.flags import Common, launch
from study import proxies
from study.claims import GROWS, HOLDS, OPPOSITE
from study.instruct import COMPARED
from study.names import (BETA, BETAS, DIVERSITY, INSTRUCT_SETS, NOISE_OF, POLICIES, QUALITY, SETS, SHIFTED,
                         pick, short)
from study.report import ENOUGH_SEEDS, ends, read_numbers

BLACK, GREY, ORANGE, GREEN = "#000000", "#888888", "#E69F00", "#009E73"
BLUE, RED, PURPLE, SKY = "#0072B2", "#D55E00", "#CC79A7", "#56B4E9"    # red is Okabe and Ito's vermilion
DARK = {ORANGE: "#8A5F00"}      # for letters, where the colour is too light
STYLE = {"sft": (BLUE, "o"), "bon": (ORANGE, "s"), "ppo": (RED, "D"), "ppo_gold": (GREEN, "^"),
         "base": (PURPLE, "v"), "oracle": (BLACK, "*")}
SHOWN = ("base", "sft", "bon", "ppo", "ppo_gold")
# the kinds of noise: filled markers and solid lines, or hollow markers and dashed lines; in (d) a colour each
FILLED = {"synthetic": True, "synthetic-independent": False}
NOISE_STYLE = {"synthetic": (BLUE, "o"), "synthetic-independent": (ORANGE, "s")}
GOLD = "gold diversity: mean Jaccard distance of the facts of two outputs"
NEAR = 0.06         # difference in win rate below which two curves count as nearly one


@dataclass
class Config(Common):
    out: str = "results"        # folder with results.json (and reviewers.json), where pictures are written


# ------------------------------------------------------------------------------------------------- the pieces
# An estimate is a dict with mean, low, high and per_seed.

def means(estimates):
    return [e["mean"] for e in estimates]


def arms(estimates):
    """The (2, n) array of error bars that matplotlib wants; no length where an estimate has no ends."""
    lengths = []
    for e in estimates:
        low, high = ends(e)
        lengths.append((0, 0) if low is None else (e["mean"] - low, high - e["mean"]))
    return np.maximum(np.array(lengths).T, 0)       # the seeds' means are rounded


def bars(n_seeds):
    """What the error bars are, in words."""
    return "95 % intervals" if n_seeds >= ENOUGH_SEEDS else "range of the seeds"


def face(colour, task):
    return colour if FILLED[task] else "white"


def points(ax, x, y, colour, marker, size=7, line="none", hollow=False, label=None):
    """Estimates y at x (n,), with intervals and a thin mark a seed."""
    ax.errorbar(x, means(y), yerr=arms(y), fmt=marker, ls=line, ms=size, lw=1.2, elinewidth=.9, color=colour,
                mfc="white" if hollow else colour, label=label, zorder=3)
    for at, e in zip(x, y):
        seed_marks(ax, at, e["per_seed"], colour)


def seed_marks(ax, x, values, colour, size=8):
    ax.plot([x] * len(values), values, "_", color=colour, ms=size, mew=.6, alpha=.6, zorder=1)


def curve(ax, x, y, colour, marker, label, hollow=False):
    """A line through estimates x and y, with intervals and a dot a seed in both directions."""
    ax.errorbar(means(x), means(y), xerr=arms(x), yerr=arms(y), fmt=marker, ls="--" if hollow else "-", ms=5,
                lw=1.2, elinewidth=.7, color=colour, mfc="white" if hollow else colour, label=label, zorder=3)
    for a, b in zip(x, y):
        if len(a["per_seed"]) == len(b["per_seed"]):    # at toy size a seed may have no value
            ax.plot(a["per_seed"], b["per_seed"], ".", color=colour, ms=2.5, alpha=.45, zorder=1)


def tag(ax, xy, text, colour, offset, **how):
    """A label beside a point, `offset` points away, on a white halo."""
    from matplotlib.patheffects import withStroke
    halo = [withStroke(linewidth=2.5, foreground="white")]
    ax.annotate(text, xy, xytext=offset, textcoords="offset points", fontsize=8.5,
                color=DARK.get(colour, colour), path_effects=halo, zorder=5, **how)


def noise_legend(ax, where, line="none"):
    for task, noise in NOISE_OF.items():
        style = line if line == "none" or FILLED[task] else "--"
        ax.plot([], [], "o", ls=style, color=BLACK, mfc=face(BLACK, task), label=noise)
    ax.legend(fontsize=9, frameon=False, loc=where)


# ------------------------------------------------------------------------------------------- (a) the frontier

CURVES = {"SFT": ("sft", "SFT, temperature T"), "best-of-N": ("bon", "best-of-N of SFT, T = 1"),
          "PPO": ("ppo", "PPO, KL coefficient β, T = 1")}
TAGS = {  # point: where its label stands, in points beside it
    "T = 0.05": (5, -16), "T = 0.2": (5, -16), "T = 1": (-36, -13), "T = 1.3": (-42, -9), "N = 1": (9, 2),
    "N = 4": (9, 2), "N = 16": (9, 4), "N = 64": (-46, -12), "β = 0": (-34, -14), "β = 0.03": (-56, -14),
    "β = 0.1": (-18, 12), "β = 0.3": (9, 5), "β = 1": (10, 4)}


def curves_of_reviewers(lines):
    """{curve: [(label of the point, gold diversity, win rate)]}, all at temperature 1 but SFT."""
    label = {"SFT": "T = {temperature:g}", "best-of-N": "N = {n}", "PPO": "β = {knob:g}"}
    return {name: [(label[name].format(**x), x["gold_diversity"], x["wins"]) for x in lines
                   if x["curve"] == name and (name == "SFT" or x["temperature"] == DIVERSITY)]
            for name in CURVES}


def curves_of_results(results):
    """The same without --full: best-of-N is one point, and so is PPO."""
    def point(label, policy, temperature):
        at = dict(task="synthetic", policy=policy, split="test", temperature=temperature)
        varied = pick(results["diversity"], **at, measure="per_input_gold_diversity")
        return label, varied, pick(results["win_rate"], **at)
    temperatures = sorted(x["temperature"] for x in results["win_rate"]
                          if (x["task"], x["policy"], x["split"]) == ("synthetic", "sft", "test"))
    return {"SFT": [point(f"T = {t:g}", "sft", t) for t in temperatures],
            "best-of-N": [point("N = 16", "bon", DIVERSITY)],
            "PPO": [point(f"β = {BETA:g}", "ppo", DIVERSITY)]}


def frontier_title(reviewers, curves):
    """What the numbers show of best-of-N against PPO at equal gold diversity."""
    plain = "Quality against diversity"
    if not reviewers:
        return plain
    ppo = [x for x in reviewers["frontier"]["frontier"]
           if x["curve"] == "PPO" and x["temperature"] == DIVERSITY and x["knob"] > 0]
    if not all(abs(x["above_bon"]["mean"]) < NEAR for x in ppo):
        return plain
    further = max(x["wins"]["mean"] for x in ppo) > max(y["mean"] for _, _, y in curves["best-of-N"])
    nearly = "est-of-N and PPO (β > 0) lie nearly on one curve"
    return f"B{nearly}; PPO goes further along it" if further else f"{plain}: b{nearly}"


def draw_frontier(ax, results, reviewers):
    """In distribution, systematic noise."""
    lines = reviewers and reviewers["frontier"]["frontier"]
    curves = curves_of_reviewers(lines) if reviewers else curves_of_results(results)
    for name, (policy, label) in CURVES.items():
        colour, marker = STYLE[policy]
        labels, x, y = zip(*curves[name])
        curve(ax, x, y, colour, marker, label)
        for text, at, height in zip(labels, x, y):
            if text in TAGS:
                tag(ax, (at["mean"], height["mean"]), text, colour, TAGS[text])
    ax.set(title=frontier_title(reviewers, curves), xlabel=f"diversity per input ({GOLD})",
           ylabel="quality (win rate against the reference)")
    ax.set_ylim(min(.2, ax.get_ylim()[0]), auto=True)       # room for the legend; more curves may follow
    ax.legend(fontsize=9, frameon=False, loc="lower left")


# ----------------------------------------------------------------------- (b) from in to out of distribution

def over_sets(results, task, policy, sets):
    """(mean win rate over test sets, the same seed by seed)"""
    rows = [pick(results["win_rate"], task=task, policy=policy, split=s, temperature=QUALITY) for s in sets]
    return np.mean(means(rows)), np.mean([row["per_seed"] for row in rows], axis=0)


def draw_arrow(ax, results, task, policy, x):
    """From the win rate in distribution to the mean of the shifted test sets."""
    colour, marker = STYLE[policy]
    ends = [over_sets(results, task, policy, sets) for sets in (SETS[:1], SHIFTED)]
    (home, _), (away, _) = ends
    style = dict(arrowstyle="-|>", color=colour, lw=1.8, ls="-" if FILLED[task] else (0, (4, 2)), shrinkA=0,
                 shrinkB=0)
    ax.annotate("", (x, away), (x, home), arrowprops=style)
    ax.plot(x, home, marker, color=colour, mfc=face(colour, task), ms=8, zorder=4)
    offset, side = ((-8, 0), "right") if FILLED[task] else ((8, 0), "left")
    for value, seeds in ends:
        seed_marks(ax, x, seeds, colour)
        tag(ax, (x, value), f"{value:.2f}", colour, offset, va="center", ha=side)


def draw_shifted(ax, results):
    for i, policy in enumerate(SHOWN):
        for task, beside in zip(NOISE_OF, (-.15, .15)):
            draw_arrow(ax, results, task, policy, i + beside)
    ax.set_xticks(range(len(SHOWN)), [POLICIES[p] for p in SHOWN])
    ax.set(title="From in distribution (marker) to out of it (arrowhead)", xlim=(-.6, len(SHOWN) - .4),
           ylim=(0, 1), ylabel=f"win rate against the reference, T = {QUALITY:g}")
    ax.text(.99, .015, f"out of distribution: mean of {len(SHIFTED)} shifted test sets", fontsize=8.5,
            color="#555555", ha="right", transform=ax.transAxes)
    noise_legend(ax, "upper left", "-")


# --------------------------------------------------------------------------- (c) per input and across inputs

def draw_diversity(ax, results):
    kinds, gap = {"per_input": "per input", "across": "across inputs"}, .6
    ticks = {}      # {place: policy}
    for group, (kind, title) in enumerate(kinds.items()):
        start = group * (len(SHOWN) + gap)
        ax.text(start + (len(SHOWN) - 1) / 2, 1.05, title, ha="center")
        for i, policy in enumerate(SHOWN):
            name = POLICIES[policy].replace(" on the gold reward", "\non the\ngold\nreward")
            ticks[start + i] = name.replace("base model", "base\nmodel")
            for task, beside in zip(NOISE_OF, (-.13, .13)):
                e = pick(results["diversity"], task=task, policy=policy, split="test", temperature=DIVERSITY,
                         measure=f"{kind}_gold_diversity")
                points(ax, [start + i + beside], [e], *STYLE[policy], hollow=not FILLED[task])
    ax.axvline(len(SHOWN) - .5 + gap / 2, color="#cccccc", lw=.8)
    ax.set_xticks(list(ticks), ticks.values())
    ax.set(title="Diversity per input and across inputs", ylim=(0, 1.13),
           ylabel=f"gold diversity, T = {DIVERSITY:g}")
    noise_legend(ax, "lower right")


# --------------------------------------------------------------------------------------------- (d) the claims

SAID = {  # claim: in a word or two, for an axis
    "PPO beats SFT in distribution": "PPO beats SFT, in distribution",
    "PPO beats SFT out of distribution": "PPO beats SFT, out of distribution",
    GROWS: "its advantage grows with the shift",
    "PPO cuts per-input diversity more than across-input (EAD)":
        "more than across inputs (EAD), relative loss",
    "best-of-16 beats SFT": "best-of-16 beats SFT, in distribution",
    "best-of-16 beats PPO": "best-of-16 beats PPO, in distribution",
    "best-of-16 beats PPO out of distribution": "the same, out of distribution",
    "PPO is more than sharpening: it beats SFT at the temperature of equal diversity":
        "PPO beats SFT of equal diversity",
    "out of distribution too, PPO beats SFT at that temperature, matched in distribution":
        "the same, out of distribution"}


def draw_claim(ax, c, y):
    """One line of the forest plot: to the right of zero the difference has the sign that the claim says."""
    (colour, marker), e, sign = NOISE_STYLE[c["task"]], c["estimate"], c["expected"]
    low, high = ends(e)
    if low is not None:
        ax.plot((sign * low, sign * high), (y, y), lw=3.5, alpha=.4, color=colour, solid_capstyle="butt")
    ax.plot(np.multiply(sign, e["per_seed"]), [y] * len(e["per_seed"]), "|", ms=6, mew=.8, color=colour)
    shown = c["verdict"] in (HOLDS, OPPOSITE)
    ax.plot(sign * e["mean"], y, "X" if c["verdict"] == OPPOSITE else marker, ms=6, color=colour,
            mfc=colour if shown else "white", zorder=4)


def draw_claims(ax, claims):
    names = list(dict.fromkeys(c["claim"] for c in claims))
    for c in claims:
        draw_claim(ax, c, len(names) - names.index(c["claim"]) - .3 * list(NOISE_OF).index(c["task"]))
    ax.axvline(0, color=BLACK, lw=.8)
    ax.set_yticks([len(names) - i - .15 for i in range(len(names))], [SAID.get(n, n) for n in names])
    for task, noise in NOISE_OF.items():
        colour, marker = NOISE_STYLE[task]
        ax.plot([], [], marker, color=colour, label=noise)
    ax.plot([], [], "ok", mfc="white", label="hollow: not decided")
    ax.plot([], [], "Xk", label="cross: the opposite holds")
    ax.set(title="The statements tested here", xlim=(min(-.42, ax.get_xlim()[0]), None),
           ylim=(.3, len(names) + .5),
           xlabel="difference, in the direction that the claim says (win rate or diversity)")
    ax.legend(fontsize=9, frameon=False, loc="lower left")


def draw_answer(plt, results, reviewers):
    """figure.png: the answer at a glance."""
    figure = plt.figure(figsize=(16, 12), layout="constrained")
    top, bottom = figure.subfigures(2, 1, hspace=.03)       # each row has widths of its own
    axes = [*top.subplots(1, 2, width_ratios=(1.15, 1)), *bottom.subplots(1, 2)]
    draw_frontier(axes[0], results, reviewers)
    draw_shifted(axes[1], results)
    draw_diversity(axes[2], results)
    draw_claims(axes[3], results["claims"])
    for ax, letter in zip(axes, "abcd"):
        ax.set_title(f"({letter}) {ax.get_title()}", loc="left")
        ax.set_title("")
    n = len(results["settings"]["seeds"])
    figure.suptitle("SFT, best-of-N and PPO: quality, generalisation and diversity on the synthetic task "
                    f"({n} seeds; bars: {bars(n)}; thin marks: seeds)", fontsize=12)
    return figure


# ------------------------------------------------------------------------------------------- of the reviewers

KINDS = {  # kind of shift: its colour, its marker, and how high in a picture its test sets are named
    "new words": (BLUE, "o", .97), "more distractors": (RED, "s", .03), "news format": (GREEN, "^", None)}


def draw_growth(plt, reviewers):
    """shift.png: the advantage over SFT against the shift, by one measure; a line a kind of shift."""
    figure = plt.figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for row, policy in zip(axes, ("ppo", "bon")):
        for ax, (task, noise) in zip(row, NOISE_OF.items()):
            draw_advantage(ax, reviewers["shift"], task, policy)
            ax.set_title(f"{POLICIES[policy]} less SFT, {noise}", loc="left")
        row[0].set_ylabel(f"win rate less SFT's, T = {QUALITY:g}")
    for ax in axes[1]:
        ax.set_xlabel("shift of the prompts from train: Jensen-Shannon divergence of tokens, bits, log scale")
    axes[0, 0].legend(fontsize=9, frameon=False, loc="lower right", bbox_to_anchor=(1, .1))
    n = len(reviewers["settings"]["seeds"])
    figure.suptitle(f"Does the advantage over SFT grow with the shift?  (bars: {bars(n)}; thin marks: seeds; "
                    "dotted: shift that chance alone gives)")
    return figure


def draw_advantage(ax, found, task, policy):
    far, advantage = found["shift"][task], dict(zip(found["sets"], found["advantages"][task][policy]))
    lines = {x["kind"]: x["sets"] for x in found["along"] if x["task"] == task}
    for kind, sets in (lines | {"news format": ["test", "ood_article"]}).items():
        colour, marker, height = KINDS[kind]
        x, y = [far[s]["js"] for s in sets], [advantage[s] for s in sets]
        points(ax, x, y, colour, marker, 6, ":" if kind == "news format" else "-", label=kind)
        if height:
            name_sets(ax, kind, sets[1:], x[1:], colour, height)
    ax.plot(far["test"]["js"], advantage["test"]["mean"], "o", ms=9, color=BLACK, label="in distribution",
            zorder=4)
    ax.axhline(0, color=BLACK, lw=.5)
    ax.axvline(far["test"]["js_floor_high"], .06, .94, color=GREY, ls=":", lw=1)
    ax.set_xscale("log")
    ax.set_xticks((.003, .01, .03, .1, .3), ("0.003", "0.01", "0.03", "0.1", "0.3"))
    ax.minorticks_off()
    ax.margins(y=.12)


def name_sets(ax, kind, sets, x, colour, height):
    """The test sets of one kind in a row above or below all points, where no label can cover another."""
    how = dict(fontsize=8.5, color=colour, va="center")
    ax.text(.01, height, f"{kind}:", transform=ax.transAxes, **how)
    for split, at in zip(sets, x):
        number = short(split).removeprefix("words").removeprefix("distractors")
        text = f"{number} %" if kind == "new words" else number
        ax.text(at, height, text, ha="center", transform=ax.get_xaxis_transform(), **how)


PROXY_TESTS = {  # test: (what it asks, chance)
    "between": ("order of policies:\nrank correlation with gold\ndiversity over conditions", 0),
    "within": ("prompts of one policy:\nrank correlation with gold\ndiversity over prompts", 0),
    "across": ("across inputs:\nrank correlation with gold\ndiversity over conditions", 0),
    "temperature": ("rank correlation\nwith temperature", 0),
    "content": ("rank correlation with the\nnumber of prompts mixed", 0),
    "form": ("16 stories measure as more\nvaried than 16 phrasings\nof one: how often", .5)}


def draw_proxies(plt, reviewers):
    """proxies.png: each measure by each test, a dot with its interval; a line at chance."""
    tests = [t for t in reviewers["proxies"]["tests"] if t["measure"] != proxies.GOLD]
    figure = plt.figure(figsize=(15, 4.8), layout="constrained")
    axes = figure.subplots(1, len(PROXY_TESTS), sharey=True)
    places = np.arange(len(tests))[::-1]
    for ax, (test, (title, chance)) in zip(axes, PROXY_TESTS.items()):
        for y, t in zip(places, tests):
            mean, low, high = t[test]
            colour, marker = (GREY, "s") if t["measure"] == "length" else (BLUE, "o")
            if low is not None:
                ax.plot((low, high), (y, y), lw=1.5, color=colour)
            ax.plot(mean, y, marker, ms=6, color=colour)
        ax.axvline(chance, color=RED, ls=":", lw=1.2)
        ax.set_title(title, fontsize=9)
        ax.set_xlim((-.02 if chance else -1.05), 1.05)     # all that a rate or a correlation can be
        ax.grid(axis="y", color="#eeeeee")
    names = [proxies.NAMES[t["measure"]] for t in tests]
    axes[0].set_yticks(places, [f"{n} (no measure of diversity)" if n == "length" else n for n in names])
    figure.suptitle("Which diversity measure to believe?  1 is right every time, the dotted line is chance; "
                    "bars: 95 % intervals")
    return figure


def draw_frontiers(plt, reviewers):
    """frontier.png: quality against diversity of all families, and what a nat of KL buys."""
    figure = plt.figure(figsize=(15, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines = reviewers["frontier"]["frontier"]
    draw_frontier(left, None, reviewers)
    cool = [pick(lines, curve="PPO", knob=b, temperature=QUALITY) for b in BETAS]
    curve(left, [x["gold_diversity"] for x in cool], [x["wins"] for x in cool], *STYLE["ppo"],
          f"PPO, KL coefficient β, T = {QUALITY:g}", hollow=True)
    left.legend(fontsize=9, frameon=False, loc="lower left")
    draw_price(right, lines)
    return figure


def draw_price(ax, lines):
    """Reward and gold reward against KL from SFT, of best-of-N and of PPO at temperature 1."""
    ppo = [pick(lines, curve="PPO", knob=b, temperature=DIVERSITY) for b in reversed(BETAS)]
    best = [x for x in lines if x["curve"] == "best-of-N"]
    for measure, what, colour in (("reward", "reward model's score", ORANGE),
                                  ("gold_reward", "gold reward", GREEN)):
        for name, family, marker, line in (("best-of-N", best, "s", ":"), ("PPO, T = 1", ppo, "D", "-")):
            x = np.sqrt([p["kl"] for p in family])
            points(ax, x, [p[measure] for p in family], colour, marker, 5, line, label=f"{name}: {what}")
    beside = {1: (6, -13), .3: (8, -13), .1: (-16, 10), .03: (8, 6), 0: (-46, -2)}     # points
    for x in ppo:
        at = (np.sqrt(x["kl"]), x["gold_reward"]["mean"])
        tag(ax, at, f"β = {x['knob']:g}", GREEN, beside.get(x["knob"], (6, 6)))
    ax.set(title="What a nat of KL buys", ylabel="score of an output",
           xlabel="square root of KL from SFT, nats (best-of-N: its bound)")
    ax.legend(fontsize=9, frameon=False, loc="upper left")


def draw_kinds(plt, reviewers):
    """kinds.png: how a loss of diversity splits, how many different good answers are left, coverage."""
    found, n = reviewers["kinds"], len(reviewers["settings"]["seeds"])
    figure = plt.figure(figsize=(17, 5.6), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(1.1, 1.2, 1.2))
    draw_split(axes[0], found["split"])
    draw_good(axes[1], found["good"])
    draw_coverage(axes[2], found["coverage"])
    figure.suptitle(f"What kind of diversity is lost, in distribution, T = {DIVERSITY:g}  (bars: {bars(n)}; "
                    "thin marks: seeds)")
    return figure


def draw_split(ax, lines):
    """Each policy's loss of gold diversity beside SFT, a bar of two parts that add up to the black mark."""
    for i, x in enumerate(lines):
        if x["loss"] is None:
            continue
        errors, narrowing = x["errors_removed"]["mean"], x["narrowing"]["mean"]
        ax.bar(i, narrowing, width=.6, color=RED,
               label=None if i else "narrowing of outputs as good as the reference")
        ax.bar(i, errors, bottom=narrowing if errors * narrowing > 0 else 0, width=.6, color=BLUE,
               label=None if i else "fewer outputs below the reference")
        points(ax, [i], [x["loss"]], BLACK, "_", 12, label=None if i else "loss")
    ax.set_xticks(range(len(lines)), [POLICIES[x["policy"]].replace(" on the gold reward", "\non gold") + "\n"
                                      + NOISE_OF[x["task"]].split()[0] for x in lines], fontsize=8.5)
    ax.axhline(0, color=BLACK, lw=.8)
    ax.set(title="Loss of gold diversity beside SFT", ylabel="gold diversity")
    ax.legend(fontsize=9, frameon=False, loc="upper left")


def draw_good(ax, lines):
    """How many different good answers 16 outputs hold, against the fraction of outputs that are good."""
    for policy in ("base", "sft", "bon", "ppo", "ppo_gold"):
        for task in NOISE_OF:
            x, y = (pick(lines, task=task, policy=policy, measure=m)["estimate"]
                    for m in ("good", "good_distinct"))
            curve(ax, [x], [y], *STYLE[policy], POLICIES[policy] if FILLED[task] else None,
                  hollow=not FILLED[task])
    ax.set(title="Different good answers among 16 outputs", xlabel="fraction of outputs that are good",
           ylabel="different good answers", ylim=(0, None))
    noise_legend(ax, "best")


COVERING = {"base": (PURPLE, "v", "base model"), "sft": (BLUE, "o", "SFT"), "ppo": (RED, "D", "PPO"),
            "ppo_b0.3": (BLACK, "s", "PPO, β = 0.3")}


def draw_coverage(ax, lines):
    for policy, (colour, marker, name) in COVERING.items():
        of_policy = [x for x in lines if x["policy"] == policy]
        points(ax, [x["k"] for x in of_policy], of_policy, colour, marker, 5, "-", label=name)
    ax.set_xscale("log", base=2)
    ks = [x["k"] for x in lines if x["policy"] == "sft"]
    ax.set_xticks(ks, map(str, ks))
    ax.set(title="Coverage: is the best of k outputs good?", xlabel="k outputs, systematic noise",
           ylabel="rate of prompts", ylim=(None, 1.02))
    ax.legend(fontsize=9, frameon=False, loc="lower right")


METHOD_STYLE = {"PPO": (RED, "D"), "best-of-N": (ORANGE, "s"), "SFT": (BLUE, "o"), "DPO": (GREEN, "^"),
                "IPO": (GREEN, "v"), "RLOO": (PURPLE, "P"), "GRPO": (BLACK, "X"),
                "PPO, entropy bonus": (GREY, "d"), "PPO, typical annotators": (GREY, "h"),
                "PPO, k2 in the reward": (SKY, "p")}


def draw_methods(plt, reviewers):
    """methods.png: every method over its own knob, gold reward against gold diversity, of all outputs and of
    good ones."""
    figure = plt.figure(figsize=(15, 6.5), layout="constrained")
    axes, lines = figure.subplots(1, 2, sharey=True), reviewers["frontier"]["frontier"]
    kinds = {"gold_diversity": "gold diversity per input, all outputs",
             "good_gold_diversity": "gold diversity per input, good outputs only"}
    for ax, (measure, title) in zip(axes, kinds.items()):
        for name, (colour, marker) in METHOD_STYLE.items():
            of_curve = [x for x in lines if x["curve"] == name
                        and (name == "SFT" or x["temperature"] == DIVERSITY)]
            of_curve = [x for x in of_curve if x[measure]]
            curve(ax, [x[measure] for x in of_curve], [x["gold_reward"] for x in of_curve], colour, marker,
                  name)
        ax.set(xlabel=title, ylabel="gold reward" if ax is axes[0] else "")
    axes[0].legend(fontsize=9, frameon=False, loc="lower left")
    n = len(reviewers["settings"]["seeds"])
    figure.suptitle("Which method keeps diversity?  Each over its own knob: temperature, N, β, bonus, "
                    f"typicality (bars: {bars(n)})")
    return figure


def draw_seeds(plt, results):
    """seeds.png: the forest plot by itself."""
    figure = plt.figure(figsize=(11, 9), layout="constrained")
    ax = figure.subplots()
    draw_claims(ax, results["claims"])
    n = len(results["settings"]["seeds"])
    ax.set_title(f"The statements tested here (bars: {bars(n)}; ticks: seeds)")
    return figure


def draw_instruct(plt, reviewers):
    """instruct.png: win rate by test set, composition as the shift."""
    found = reviewers["instruct"]
    figure = plt.figure(figsize=(11, 6), layout="constrained")
    ax, sets = figure.subplots(), np.arange(len(INSTRUCT_SETS))
    for k, (policy, name) in enumerate(COMPARED.items()):
        e = [found["win_rate"][f"{policy} {s}"] for s in INSTRUCT_SETS]
        points(ax, sets + .13 * (k - (len(COMPARED) - 1) / 2), e, *STYLE[policy], label=name)
    for i in sets[1:]:
        ax.axvline(i - .5, color="#dddddd", lw=.8)
    ax.set_xticks(sets, [f"{title}\nshift: JS {found['shift'][s]['js']:.2f} bits"
                         for s, title in INSTRUCT_SETS.items()])
    ax.set(ylabel=f"win rate against the reference, T = {QUALITY:g}", ylim=(0, None),
           title="Instructions: fine-tuned on single ones, tested on compositions (bars: "
                 f"{bars(len(reviewers['settings']['seeds']))}; thin marks: seeds)")
    ax.title.set_fontsize(10.5)
    ax.legend(fontsize=9, frameon=False)
    return figure


# -------------------------------------------------------------------------------------------------- the files

def draw_all(out):
    """Draws every picture of the JSON files in the folder `out`.  Returns the paths written."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    results, reviewers = read_numbers(out)
    pictures = {"figure": draw_answer(plt, results, reviewers)}
    if reviewers:
        pictures |= {"figures/shift": draw_growth(plt, reviewers),
                     "figures/proxies": draw_proxies(plt, reviewers),
                     "figures/frontier": draw_frontiers(plt, reviewers),
                     "figures/seeds": draw_seeds(plt, results),
                     "figures/instruct": draw_instruct(plt, reviewers),
                     "figures/kinds": draw_kinds(plt, reviewers),
                     "figures/methods": draw_methods(plt, reviewers)}
    written = [Path(out) / f"{name}.png" for name in pictures]
    for path, figure in zip(written, pictures.values()):
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=110)
        plt.close(figure)
    return written


def main(cfg):
    print("wrote " + ", ".join(map(str, draw_all(cfg.out))))


if __name__ == "__main__":
    launch(main, Config, __doc__)
