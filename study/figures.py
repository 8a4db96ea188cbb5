"""The four pictures of the results, drawn from the numbers in results.json alone.

    python -m study.figures              # draws results/*.png anew

figure.png is the answer; frontier.png, proxies.png and shift.png need `reproduce.py --full`.  One policy has
one colour and one marker everywhere.  The colours are Okabe and Ito's, which colour-blind people can tell
apart.  Bars are 95 % intervals over seeds and prompts, or with fewer than four seeds the seeds' range.
"""
from pathlib import Path
from textwrap import fill

import numpy as np

from common.flags import launch
from study import proxies
from study.claims import ENOUGH_SEEDS
from study.names import BETA, QUALITY, SHIFTED, short
from study.report import Config, ends, read_results, symbol, three_rows

BLACK, GREY, ORANGE, GREEN = "#000000", "#888888", "#E69F00", "#009E73"
BLUE, RED, PURPLE, SKY = "#0072B2", "#D55E00", "#CC79A7", "#56B4E9"    # red is Okabe and Ito's vermilion
DARK = {ORANGE: "#8A5F00"}      # for letters, where the colour is too light
STYLE = {"SFT": (BLUE, "o"), "best-of-16": (ORANGE, "s"), "best-of-N": (ORANGE, "s"), "PPO": (RED, "D"),
         "PPO, k2 in the reward": (SKY, "p"), "DPO": (GREEN, "^"), "IPO": (GREEN, "v"), "RLOO": (PURPLE, "P"),
         "GRPO": (BLACK, "X"), "optimum": (GREY, "*")}


# ------------------------------------------------------------------------------------------------- the pieces

def arms(estimates):
    """The (2, n) array of error bars that matplotlib wants; no length where an estimate has no ends."""
    lengths = []
    for e in estimates:
        low, high = ends(e)
        lengths.append((0, 0) if low is None else (e["mean"] - low, high - e["mean"]))
    return np.maximum(np.array(lengths).T, 0)       # the seeds' means are rounded


def bars(results):
    """What the error bars are, in words."""
    return "95 % intervals" if len(results["settings"]["seeds"]) >= ENOUGH_SEEDS else "range of the seeds"


def curve(ax, x, y, name, size=6, **how):
    """Estimates y against estimates x, with intervals in both directions, in the style of a method."""
    colour, marker = STYLE[name]
    ax.errorbar([e["mean"] for e in x], [e["mean"] for e in y], xerr=arms(x), yerr=arms(y), marker=marker,
                ms=size, lw=1.3, elinewidth=.7, color=colour, zorder=3, **how)


def tag(ax, x, y, text, colour, offset, size=9, **how):
    """A label `offset` points away from a point, on a white halo."""
    from matplotlib.patheffects import withStroke
    halo = [withStroke(linewidth=2.5, foreground="white")]
    ax.annotate(text, (x, y), xytext=offset, textcoords="offset points", fontsize=size, zorder=5,
                color=DARK.get(colour, colour), path_effects=halo, **how)


# ----------------------------------------------------------------------------------------------- the pictures

def draw_answer(figure, results):
    """figure.png: quality against diversity of SFT, best-of-16 and PPO, and how much is left out of
    distribution: from the marker to the arrowhead."""
    ax = figure.subplots()
    for name, home, away, varied in three_rows(results):
        colour, marker = STYLE[name]
        x = varied["mean"]
        curve(ax, [varied], [home], name, 11, ls="none")
        ax.annotate("", (x + .012, away["mean"]), (x + .012, home["mean"]), zorder=4, arrowprops=dict(
            arrowstyle="-|>", color=colour, lw=2, shrinkA=0, shrinkB=0))
        tag(ax, x, home["mean"], f"{name}  {home['mean']:.2f}", colour, (10, 8), 13, weight="bold")
        tag(ax, x + .012, away["mean"], f"{away['mean']:.2f}", colour, (8, -4), 11)
    ax.set(xlabel="diversity of outputs to one prompt (gold diversity)   more varied →",
           ylabel="win rate against the reference   better →", xlim=(.2, .75), ylim=(0, 1))
    ax.set_title(f"Marker: in distribution.  Arrowhead: mean of {len(SHIFTED)} shifted test sets.  Bars: "
                 f"{bars(results)}", fontsize=10, loc="left")


LABELS = {  # point of the frontier: where its label stands, in points beside it
    ("PPO", 0.0): (8, -10), ("PPO", 0.03): (-52, -12), ("PPO", 0.1): (8, 8), ("PPO", 0.3): (8, 2),
    ("PPO", 1.0): (9, 2), ("DPO", 0.1): (-42, 8), ("DPO", 0.3): (7, 8), ("GRPO", 0.03): (-58, -10),
    ("SFT", 0.05): (-4, 9), ("SFT", 0.2): (-14, 9), ("SFT", 0.7): (-24, 9), ("SFT", 1.0): (8, -3),
    ("best-of-N", 1): (-44, -14), ("optimum", 0.1): (-44, 6), ("optimum", 0.3): (8, 4),
    ("optimum", 1.0): (8, 4), ("PPO, k2 in the reward", 5.0): (-44, -12)}


def draw_frontier(figure, results):
    """frontier.png: gold reward against gold diversity of every method over its own setting."""
    ax = figure.subplots()
    for name in STYLE:
        points = sorted((x for x in results["frontier"] if x["curve"] == name and x["gold_diversity"]
                         and x["gold_reward"]), key=lambda x: x["knob"])
        if not points:
            continue
        curve(ax, [x["gold_diversity"] for x in points], [x["gold_reward"] for x in points], name,
              label=f"{name}, over {symbol(name)}")
        for x in points:
            if (name, x["knob"]) in LABELS:
                tag(ax, x["gold_diversity"]["mean"], x["gold_reward"]["mean"],
                    f"{symbol(name)} = {x['knob']:g}", STYLE[name][0], LABELS[name, x["knob"]])
    ax.set(xlabel="gold diversity per input   more varied →", ylabel="gold reward   better →")
    ax.set_title(f"Every method over its own setting (bars: {bars(results)})", fontsize=11, loc="left")
    ax.legend(title="T: temperature", fontsize=9, frameon=False, loc="lower left", ncols=2)


def draw_proxies(figure, results):
    """proxies.png: each measure of diversity by each test, a dot with its interval; a line at chance."""
    lines = [x for x in results["proxies"] if x["measure"] != proxies.GOLD]
    axes, places = figure.subplots(1, len(proxies.TESTS), sharey=True), np.arange(len(lines))[::-1]
    for ax, (test, title) in zip(axes, proxies.TESTS.items()):
        chance = .5 if test == "form" else 0
        for y, x in zip(places, lines):
            mean, low, high = x[test]
            colour, marker = (GREY, "s") if x["measure"] == "length" else (BLUE, "o")
            if low is not None:
                ax.plot((low, high), (y, y), lw=1.5, color=colour)
            ax.plot(mean, y, marker, ms=6, color=colour)
        ax.axvline(chance, color=RED, ls=":", lw=1.2)
        ax.set_title(fill(title, 17), fontsize=9.5)
        ax.set_xlim(-.05 if chance else -1.1, 1.1)     # all that a rate or a correlation can be
        ax.set_xticks((0, .5, 1) if chance else (-1, 0, 1))
        ax.grid(axis="y", color="#eeeeee")
    axes[0].set_yticks(places, [proxies.NAMES[x["measure"]] for x in lines])
    figure.suptitle("Which diversity measure to believe?  Rank correlations: 1 is best, dotted is chance",
                    fontsize=11)


def draw_shift(figure, results):
    """shift.png: PPO's advantage over SFT against the shift of each test set."""
    ax = figure.subplots()
    for x in results["shift"]:
        at, e = x["js"]["value"], x["advantage"]
        ax.errorbar(at, e["mean"], yerr=arms([e]), marker="o", ms=8, color=BLUE, elinewidth=1)
        tag(ax, at, e["mean"], short(x["split"]), BLUE, (8, 6))
    ax.axhline(0, color=BLACK, lw=.6)
    ax.axvline(results["shift"][0]["js"]["floor"], color=GREY, ls=":", lw=1)
    ax.set_xscale("log")
    ax.set_xlim(.0009, .9)
    ax.set(xlabel="shift of the prompts from train: Jensen-Shannon divergence of tokens, bits (log scale)",
           ylabel=f"win rate minus SFT's, T = {QUALITY:g}")
    ax.set_title(f"PPO's advantage over SFT, β = {BETA:g} (bars: {bars(results)}; dotted: shift by chance)",
                 fontsize=10.5, loc="left")


# -------------------------------------------------------------------------------------------------- the files

def draw_all(out):
    """Draws the pictures of results.json in the folder `out`.  Returns the paths written."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    results = read_results(out)
    written = []
    for name, needs, draw, size in (("figure", "win_rate", draw_answer, (8, 5)),
                                    ("frontier", "frontier", draw_frontier, (9, 6.5)),
                                    ("proxies", "proxies", draw_proxies, (10, 4.2)),
                                    ("shift", "shift", draw_shift, (8, 4.5))):
        if needs in results:
            figure = plt.figure(figsize=size, layout="constrained")
            draw(figure, results)
            written.append(Path(out) / f"{name}.png")
            figure.savefig(written[-1], dpi=110)
            plt.close(figure)
    return written


def main(cfg):
    print("wrote " + ", ".join(map(str, draw_all(cfg.out))))


if __name__ == "__main__":
    launch(main, Config, __doc__)
