"""Every picture of the study, drawn from the numbers in results.json and reviewers.json alone.

    python -m study.figures              # draws results/figure.png and results/figures/*.png anew

One policy has one colour and one marker everywhere.  The colours are Okabe and Ito's, which colour-blind people can
tell apart.  Bars are 95 % intervals; thin marks are the seeds, one each.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.flags import Common, run
from study import proxies
from study.claims import HOLDS, OPPOSITE
from study.instruct import COMPARED
from study.names import BETAS, DIVERSITY, INSTRUCT_SETS, NOISE, POLICIES, QUALITY, SETS, SHIFTED, pick, ppo_name, short
from study.report import read_numbers

BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00",
                                                "#CC79A7")      # Okabe and Ito; red is their vermilion
DARK = {ORANGE: "#8A5F00"}     # for letters, where the colour is too light
STYLE = {"sft": (BLUE, "o"), "bon": (ORANGE, "s"), "ppo": (RED, "D"), "ppo_gold": (GREEN, "^"), "base": (PURPLE, "v"),
         "oracle": (BLACK, "*")}
OF_NOISE = {"synthetic": (BLUE, "o"), "synthetic-independent": (ORANGE, "s")}
SHOWN = ("sft", "bon", "ppo", "ppo_gold")
GOLD = "gold diversity: mean Jaccard distance of the facts of two outputs"
NEAR = 0.06         # difference in win rate below which two curves count as nearly one


@dataclass
class Config(Common):
    out: str = "results"        # folder with results.json (and reviewers.json), where the pictures are written


# ------------------------------------------------------------------------------------------------- the pieces

def arms(estimates):
    """Estimates -> the (2, n) array of error bars that matplotlib wants."""
    return np.array([[e["mean"] - e["low"] for e in estimates], [e["high"] - e["mean"] for e in estimates]])


def means(estimates):
    return [e["mean"] for e in estimates]


def seed_marks(ax, x, estimates, colour, marker="_", size=5):
    """A thin mark a seed, at x (n,) of n estimates."""
    for at, e in zip(x, estimates):
        ax.plot([at] * len(e["per_seed"]), e["per_seed"], marker, color=colour, ms=size, mew=.6, alpha=.6, ls="none",
                zorder=1)


def curve(ax, x, y, colour, marker, label, line="-", face=None):
    """A line through points that have intervals and seeds in both directions.  x, y: estimates."""
    ax.errorbar(means(x), means(y), xerr=arms(x), yerr=arms(y), fmt=marker, ls=line, ms=5, lw=1.2, elinewidth=.7,
                color=colour, mfc=face or colour, label=label, zorder=3)
    for a, b in zip(x, y):
        ax.plot(a["per_seed"], b["per_seed"], ".", color=colour, ms=2.5, alpha=.45, zorder=1)


def tag(ax, xy, text, colour, offset, **how):
    """A label beside a point, `offset` points away, on a white halo."""
    from matplotlib.patheffects import withStroke
    ax.annotate(text, xy, xytext=offset, textcoords="offset points", fontsize=8.5, color=DARK.get(colour, colour),
                path_effects=[withStroke(linewidth=2.5, foreground="white")], zorder=5, **how)


# ------------------------------------------------------------------------------------------- (a) the frontier

def frontier_curves(results, reviewers):
    """{name: [(label of the point, gold diversity, win rate)]} of SFT, best-of-N and PPO, in distribution with
    systematic noise.  Without --full best-of-N is one point, and fewer betas are known."""
    if reviewers:
        lines = reviewers["frontier"]["frontier"]
        of = {"SFT": [x for x in lines if x["curve"] == "SFT"], "best-of-N": [x for x in lines if x["curve"] == "best-of-N"],
              "PPO": [x for x in lines if x["curve"] == "PPO" and x["temperature"] == DIVERSITY]}
        name = {"SFT": "T = {temperature:g}", "best-of-N": "N = {n}", "PPO": "β = {beta:g}"}
        return {k: [(name[k].format(**x), x["gold_diversity"], x["wins"]) for x in v] for k, v in of.items()}

    def point(label, policy, temperature):
        at = dict(task="synthetic", policy=policy, split="test", temperature=temperature)
        return (label, pick(results["diversity"], **at, measure="per_input_gold_diversity"),
                pick(results["win_rate"], **at))
    sft = sorted(x["temperature"] for x in results["win_rate"] if x["task"] == "synthetic" and x["policy"] == "sft"
                 and x["split"] == "test")
    return {"SFT": [point(f"T = {t:g}", "sft", t) for t in sft], "best-of-N": [point("N = 16", "bon", DIVERSITY)],
            "PPO": [point(f"β = {x['beta']:g}", ppo_name(x["beta"]), DIVERSITY) for x in results["kl_sweep"]]}


def frontier_title(reviewers, curves):
    """What the numbers show of best-of-N against PPO at equal gold diversity."""
    plain = "Quality against diversity"
    if not reviewers:
        return plain
    ppo = [x for x in reviewers["frontier"]["frontier"]
           if x["curve"] == "PPO" and x["temperature"] == DIVERSITY and x["beta"] > 0]
    near = all(abs(x["above_bon"]["mean"]) < NEAR for x in ppo)
    further = max(x["wins"]["mean"] for x in ppo) > max(y["mean"] for _, _, y in curves["best-of-N"])
    if near and further:
        return "Best-of-N and PPO lie nearly on one curve; PPO goes further along it"
    return plain + (": best-of-N and PPO lie nearly on one curve" if near else "")


TAGS = {  # point: where its label stands, in points beside it
    "T = 0.05": (5, -16), "T = 0.2": (5, -16), "T = 1": (-36, -13), "T = 1.3": (-42, -9), "N = 1": (9, 2),
    "N = 4": (9, 2), "N = 16": (9, 4), "N = 64": (-46, -12), "β = 0": (-38, -3), "β = 0.03": (-54, -2),
    "β = 0.1": (-18, 12), "β = 0.3": (9, 5), "β = 1": (10, 4)}


def draw_frontier(ax, results, reviewers):
    curves = frontier_curves(results, reviewers)
    for (name, points), policy in zip(curves.items(), ("sft", "bon", "ppo")):
        colour, marker = STYLE[policy]
        what = {"SFT": "SFT, temperature T", "best-of-N": "best-of-N of SFT, T = 1", "PPO": "PPO, KL coefficient β, T = 1"}
        curve(ax, [x for _, x, _ in points], [y for _, _, y in points], colour, marker, what[name])
        for label, x, y in points:
            if label in TAGS:
                tag(ax, (x["mean"], y["mean"]), label, colour, TAGS[label])
    ax.set(title=frontier_title(reviewers, curves), xlabel="diversity per input (" + GOLD + ")",
           ylabel="quality (win rate against the reference)")
    ax.legend(fontsize=9, frameon=False, loc="lower left")


# -------------------------------------------------------------------- (b) from in to out of distribution

def over_sets(results, task, policy, sets):
    """(mean win rate over test sets, the same seed by seed)"""
    rows = [pick(results["win_rate"], task=task, policy=policy, split=s, temperature=QUALITY) for s in sets]
    return np.mean(means(rows)), np.mean([row["per_seed"] for row in rows], axis=0)


def draw_shifted(ax, results):
    """An arrow a policy and kind of noise, from the win rate in distribution to that on the shifted test sets."""
    for i, policy in enumerate(SHOWN):
        colour, marker = STYLE[policy]
        for j, task in enumerate(NOISE):
            x, face = i + (-.15, .15)[j], (colour, "white")[j]
            ends = [over_sets(results, task, policy, sets) for sets in (SETS[:1], SHIFTED)]
            (home, _), (away, _) = ends
            ax.annotate("", (x, away), (x, home), arrowprops=dict(
                arrowstyle="-|>", color=colour, lw=1.8, ls=("-", (0, (4, 2)))[j], shrinkA=0, shrinkB=0))
            ax.plot(x, home, marker, color=colour, mfc=face, ms=8, zorder=4)
            for value, seeds in ends:
                ax.plot([x] * len(seeds), seeds, "_", color=colour, ms=9, mew=.6, alpha=.7)
                tag(ax, (x, value), f"{value:.2f}", colour, ((-8, 8)[j], 0), va="center", ha=("right", "left")[j])
    for j, noise in enumerate(NOISE.values()):
        ax.plot([], [], "ok", ls=("-", "--")[j], mfc=("black", "white")[j], label=noise)
    ax.set_xticks(range(len(SHOWN)), [POLICIES[p] for p in SHOWN])
    ax.set(title="From in distribution (marker) to out of it (arrowhead)", xlim=(-.6, len(SHOWN) - .4), ylim=(0, 1),
           ylabel=f"win rate against the reference, T = {QUALITY:g}")
    ax.text(.99, .015, f"out of distribution: mean of {len(SHIFTED)} shifted test sets", fontsize=8, color="#555555",
            ha="right", transform=ax.transAxes)
    ax.legend(fontsize=9, frameon=False, loc="upper left")


# --------------------------------------------------------------------- (c) per input and across inputs

def draw_diversity(ax, results):
    at = 0.
    ticks, labels = [], []
    for kind, title in (("per_input", "per input"), ("across", "across inputs")):
        ax.text(at + 1.5, 1.05, title, ha="center", fontsize=10)
        for policy in SHOWN:
            colour, marker = STYLE[policy]
            for j, task in enumerate(NOISE):
                e = pick(results["diversity"], task=task, policy=policy, split="test", temperature=DIVERSITY,
                         measure=f"{kind}_gold_diversity")
                x = at + (-.13, .13)[j]
                ax.errorbar([x], [e["mean"]], yerr=arms([e]), fmt=marker, ms=7, color=colour, mfc=(colour, "white")[j],
                            elinewidth=1, zorder=3)
                seed_marks(ax, [x], [e], colour, size=9)
            ticks.append(at)
            labels.append(POLICIES[policy].replace(" on the gold reward", "\non the\ngold\nreward"))
            at += 1
        at += .6
    ax.axvline(3.8, color="#cccccc", lw=.8)
    ax.set_xticks(ticks, labels)
    for j, noise in enumerate(NOISE.values()):
        ax.plot([], [], "ok", mfc=("black", "white")[j], label=noise)
    ax.set(title="PPO's loss of diversity is per input, not across inputs" if per_input_only(results)
           else "Diversity per input and across inputs", ylim=(0, 1.13), ylabel=f"gold diversity, T = {DIVERSITY:g}")
    ax.legend(fontsize=9, frameon=False, loc="lower right")


def per_input_only(results):
    """Whether the claim that PPO cuts per-input diversity more than across-input holds for both kinds of noise."""
    return all(c["verdict"] == HOLDS for c in results["claims"]
               if c["claim"] == "PPO cuts per-input diversity more than across-input (gold diversity)")


# -------------------------------------------------------------------------------------- (d) the claims

SAID = {  # claim: in a word or two
    "PPO beats SFT in distribution": "PPO beats SFT, in distribution",
    "PPO beats SFT out of distribution": "PPO beats SFT, out of distribution",
    "PPO's advantage over SFT grows with the shift (its gap ID - OOD is smaller)": "its advantage grows with the shift",
    "PPO cuts per-input diversity more than across-input (gold diversity)":
        "more than across inputs (gold), relative loss",
    "PPO cuts per-input diversity more than across-input (EAD)": "more than across inputs (EAD), relative loss",
    "PPO is more than sharpening: it beats SFT at the temperature of equal diversity":
        "PPO beats SFT of equal diversity",
    "the same out of distribution": "the same, out of distribution",
    "PPO beats best-of-16": "PPO beats best-of-16, in distribution",
    "PPO beats best-of-16 out of distribution": "the same, out of distribution",
    "best-of-16 beats SFT": "best-of-16 beats SFT, in distribution"}


def draw_claims(ax, claims):
    """A forest plot: to the right of zero a difference has the sign that the paper says."""
    names = list(dict.fromkeys(c["claim"] for c in claims))
    for c in claims:
        colour, marker = OF_NOISE[c["task"]]
        y = len(names) - names.index(c["claim"]) - (0, .3)[list(NOISE).index(c["task"])]
        e, sign = c["estimate"], c["expected"]
        if "all_low" in e:
            ax.plot((sign * e["all_low"], sign * e["all_high"]), (y, y), lw=.8, color=colour)
        ax.plot((sign * e["low"], sign * e["high"]), (y, y), lw=3.5, alpha=.4, color=colour, solid_capstyle="butt")
        ax.plot(np.multiply(sign, e["per_seed"]), [y] * len(e["per_seed"]), "|", ms=6, mew=.8, color=colour)
        ax.plot(sign * e["mean"], y, "X" if c["verdict"] == OPPOSITE else marker, ms=6, color=colour,
                mfc=colour if c["verdict"] in (HOLDS, OPPOSITE) else "white", zorder=4)
    ax.axvline(0, color="black", lw=.8)
    ax.set_yticks([len(names) - i - .15 for i in range(len(names))], [SAID.get(n, n) for n in names])
    for task, noise in NOISE.items():
        colour, marker = OF_NOISE[task]
        ax.plot([], [], marker, color=colour, label=noise)
    ax.plot([], [], "ok", mfc="white", label="hollow: not shown")
    ax.plot([], [], "Xk", label="cross: the opposite holds")
    ax.set(xlabel="difference, in the direction that the claim says (win rate or diversity)",
           title="The paper's claims", ylim=(.3, len(names) + .5), xlim=(min(-.42, ax.get_xlim()[0]), None))
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
    figure.suptitle(f"SFT, best-of-N and PPO: quality, generalisation and diversity on the synthetic task ({n} seeds; bars: "
                    "95 % intervals over prompts; thin marks: seeds)", fontsize=12)
    return figure


# ----------------------------------------------------------------------------------------- of the reviewers

KIND_STYLE = {"new words": (BLUE, "o"), "more distractors": (RED, "s"), "news format": (GREEN, "^")}


def draw_growth(plt, reviewers):
    """shift.png: the advantage over SFT against the shift, by one measure; a line a kind of shift."""
    found = reviewers["shift"]
    figure = plt.figure(figsize=(13, 9), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    for row, policy in zip(axes, ("ppo", "bon")):
        for ax, (task, noise) in zip(row, NOISE.items()):
            draw_advantage(ax, found, task, policy)
            ax.set_title(f"{POLICIES[policy]} less SFT, {noise}", loc="left")
        row[0].set_ylabel(f"win rate less SFT's, T = {QUALITY:g}")
    for ax in axes[1]:
        ax.set_xlabel("shift of the prompts from train: Jensen-Shannon divergence of tokens, bits (log scale)")
    axes[0, 0].legend(fontsize=9, frameon=False, loc="center right", bbox_to_anchor=(1, .35))
    figure.suptitle("Does the advantage over SFT grow with the shift?  (bars: 95 % intervals; thin marks: seeds; dotted: "
                    "shift that chance alone gives)")
    return figure


def draw_advantage(ax, found, task, policy):
    far, sets = found["shift"][task], found["sets"]
    advantage = dict(zip(sets, found["advantages"][task][policy]))
    lines = {x["kind"]: x["sets"] for x in found["along"] if x["task"] == task} | {"news format": ["test", "ood_article"]}
    for kind, chosen in lines.items():
        colour, marker = KIND_STYLE[kind]
        x, y = [far[s]["js"] for s in chosen], [advantage[s] for s in chosen]
        ax.errorbar(x, means(y), yerr=arms(y), fmt=marker, ls=":" if kind == "news format" else "-", ms=6, lw=1,
                    elinewidth=.8, color=colour, label=kind, zorder=3)
        seed_marks(ax, x, y, colour, size=7)
        # all sets of a kind in one row, at the height of no point
        height = {"new words": .97, "more distractors": .03}.get(kind)
        for s, at in list(zip(chosen, x))[1:] if height else ():
            text = short(s).removeprefix("words").removeprefix("distractors") + (" %" if kind == "new words" else "")
            ax.text(at, height, text, fontsize=8.5, color=colour, ha="center", va="center", transform=ax.get_xaxis_transform())
        if height:
            ax.text(.01, height, f"{kind}:", fontsize=8.5, color=colour, va="center", transform=ax.transAxes)
    ax.plot(far["test"]["js"], advantage["test"]["mean"], "o", ms=9, color=BLACK, label="in distribution", zorder=4)
    ax.axhline(0, color="black", lw=.5)
    ax.axvline(far["test"]["js_floor_high"], .06, .94, color="#888888", ls=":", lw=1)
    ax.set_xscale("log")
    ax.set_xticks((.003, .01, .03, .1, .3), ("0.003", "0.01", "0.03", "0.1", "0.3"))
    ax.minorticks_off()
    ax.margins(y=.12)


def draw_proxies(plt, reviewers):
    """proxies.png: each measure by each test, a dot with its interval; a line at chance."""
    tests = [t for t in reviewers["proxies"]["tests"] if t["measure"] != proxies.GOLD]
    panels = {"between": ("order of policies:\nrank correlation with gold\ndiversity over conditions", 0),
              "within": ("prompts of one policy:\nrank correlation with gold\ndiversity over prompts", 0),
              "across": ("across inputs:\nrank correlation with gold\ndiversity over conditions", 0),
              "temperature": ("rank correlation\nwith temperature", 0),
              "content": ("rank correlation with the\nnumber of prompts mixed", 0),
              "form": ("16 stories measure as more\nvaried than 16 phrasings\nof one: how often", .5)}
    figure = plt.figure(figsize=(15, 4.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True)
    y = np.arange(len(tests))[::-1]
    for ax, (test, (title, chance)) in zip(axes, panels.items()):
        for i, t in zip(y, tests):
            mean, low, high = t[test]
            measured = t["measure"] != "length"
            ax.plot((low, high), (i, i), lw=1.5, color=BLUE if measured else "#888888")
            ax.plot(mean, i, "o" if measured else "s", ms=6, color=BLUE if measured else "#888888")
        ax.axvline(chance, color=RED, ls=":", lw=1.2)
        ax.set(title=title, xlim=(-.55, 1.05) if chance == 0 else (-.02, 1.05))
        ax.title.set_fontsize(9)
        ax.grid(axis="y", color="#eeeeee")
    axes[0].set_yticks(y, [proxies.NAMES[t["measure"]] + (" (no measure of diversity)" if t["measure"] == "length" else "")
                           for t in tests])
    figure.suptitle("Which diversity measure to believe?  1 is right every time, the dotted line is chance; bars: 95 % "
                    "intervals")
    return figure


def draw_frontiers(plt, reviewers):
    """frontier.png: quality against diversity of all families, and what a nat of KL buys."""
    figure = plt.figure(figsize=(15, 6.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_frontier(left, None, reviewers)
    lines = reviewers["frontier"]["frontier"]
    cool = [pick(lines, curve="PPO", beta=b, temperature=QUALITY) for b in BETAS]
    curve(left, [x["gold_diversity"] for x in cool], [x["wins"] for x in cool], RED, "D",
          f"PPO, KL coefficient β, T = {QUALITY:g}", "--", face="white")
    left.legend(fontsize=9, frameon=False, loc="lower left")
    families = {"best-of-N": ([x for x in lines if x["curve"] == "best-of-N"], "s", ":"),
                "PPO, T = 1": ([pick(lines, curve="PPO", beta=b, temperature=DIVERSITY) for b in reversed(BETAS)], "D", "-")}
    for name, (points, marker, style) in families.items():
        x = np.sqrt([p["kl"] for p in points])
        for measure, what, colour in (("reward", "reward model's score", ORANGE), ("gold_reward", "gold reward", GREEN)):
            e = [p[measure] for p in points]
            right.errorbar(x, means(e), yerr=arms(e), fmt=marker, ls=style, ms=5, lw=1.2, elinewidth=.7, color=colour,
                           label=f"{name}: {what}")
            seed_marks(right, x, e, colour)
    beside = {1: (6, -13), .3: (8, -13), .1: (-16, 10), .03: (8, 6), 0: (-46, -2)}     # points
    for x in families["PPO, T = 1"][0]:
        tag(right, (np.sqrt(x["kl"]), x["gold_reward"]["mean"]), f"β = {x['beta']:g}", GREEN, beside.get(x["beta"], (6, 6)))
    right.set(xlabel="square root of KL from SFT, nats (best-of-N: its bound)", ylabel="score of an output",
              title="What a nat of KL buys")
    right.legend(fontsize=9, frameon=False, loc="upper left")
    return figure


def draw_seeds(plt, results):
    """seeds.png: the forest plot by itself."""
    figure = plt.figure(figsize=(11, 9), layout="constrained")
    ax = figure.subplots()
    draw_claims(ax, results["claims"])
    ax.set_title("The paper's claims.  Thick: 95 % over prompts; thin: over seeds and prompts; ticks: seeds")
    return figure


def draw_instruct(plt, reviewers):
    """instruct.png: win rate by test set, composition as the shift."""
    found = reviewers["instruct"]
    figure = plt.figure(figsize=(11, 6), layout="constrained")
    ax, width = figure.subplots(), .13
    for k, (policy, name) in enumerate(COMPARED.items()):
        colour, marker = STYLE[policy]
        e = [found["win_rate"][f"{policy} {s}"] for s in INSTRUCT_SETS]
        x = np.arange(len(e)) + (k - (len(COMPARED) - 1) / 2) * width
        ax.errorbar(x, means(e), yerr=arms(e), fmt=marker, ms=7, elinewidth=1, color=colour, label=name, zorder=3)
        seed_marks(ax, x, e, colour, size=8)
    for i in range(1, len(INSTRUCT_SETS)):
        ax.axvline(i - .5, color="#dddddd", lw=.8)
    ax.set_xticks(range(len(INSTRUCT_SETS)), [f"{title}\nshift: JS {found['shift'][s]['js']:.2f} bits"
                                              for s, title in INSTRUCT_SETS.items()])
    ax.set(ylabel=f"win rate against the reference, T = {QUALITY:g}", ylim=(0, None),
           title="Instructions: fine-tuned on single ones, tested on compositions (bars: 95 % intervals; thin marks: seeds)")
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
        pictures |= {"figures/shift": draw_growth(plt, reviewers), "figures/proxies": draw_proxies(plt, reviewers),
                     "figures/frontier": draw_frontiers(plt, reviewers), "figures/seeds": draw_seeds(plt, results),
                     "figures/instruct": draw_instruct(plt, reviewers)}
    written = [Path(out) / f"{name}.png" for name in pictures]
    for path, figure in zip(written, pictures.values()):
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=110)
        plt.close(figure)
    return written


def main(cfg):
    print("wrote " + ", ".join(map(str, draw_all(cfg.out))))


if __name__ == "__main__":
    run(main, Config, __doc__)
