"""The paper's claims and ours, row by row, beside the same quantity here, with one verdict.

What the paper says is a second-hand reading of arXiv 2310.06452, version 3: nobody here has checked it
against the PDF. Its claims on summarisation are tested in the synthetic task.  Its claims on instruction
following, where the advantage of RLHF grows with the shift, wait for a GPU.

A row says which sign some differences have.  It agrees if every 95 % interval over the choice of seeds and
prompts (`common.stats.over_seeds`) lies on the side that the claim says, differs if one lies on the other
side, and else is not shown.  So few seeds as three decide nothing.
"""
import math

import numpy as np

from common.stats import over_seeds
from study.names import BETA, BETAS, K2, NOISE_OF, SETS, SHIFTED, short

AGREES, DIFFERS, NOT_SHOWN, OPEN = "agrees", "differs", "not shown", "open"
MORE, LESS, SAME, NOT_LESS = "more", "less", "same", "not less"     # what a claim says of a difference
SMALL = 0.05        # differences below this count as none where a claim sees none
BETWEEN = {MORE: (0, math.inf), LESS: (-math.inf, 0), SAME: (-SMALL, SMALL), NOT_LESS: (-SMALL, math.inf)}
ENOUGH_SEEDS = 4
OURS = "ours"


# A row is (source: the paper's section, or OURS; claim; what is measured here; found), with found a list of
# (MORE, LESS, SAME or NOT_LESS, as the claim says; what it is of; estimate).  How much more or less is not
# tested.

def verdict(found):
    """Differs if one interval contradicts the claim, agrees if all show it, else not shown; or open."""
    said = {_says(expected, e) for expected, _, e in found}
    if not said:
        return OPEN
    return DIFFERS if DIFFERS in said else AGREES if said == {AGREES} else NOT_SHOWN


def _says(expected, e):
    """What one interval says."""
    if e is None or e["low"] is None or len(e["per_seed"]) < ENOUGH_SEEDS:
        return NOT_SHOWN
    least, most = BETWEEN[expected]
    if least < e["low"] and e["high"] < most:
        return AGREES
    return DIFFERS if e["high"] < least or e["low"] > most else NOT_SHOWN


def claims(measures, of_beta=None):
    """[{source, claim, here, verdict, found: [{expected, of, estimate}]}]: the paper's rows, those that
    differ first, then ours.  of_beta: `beta` of study/frontier.py's numbers, or None."""
    rows = [*paper_rows(measures), *beta_rows(of_beta), *open_rows(), *our_rows(measures, of_beta)]
    lines = [{"source": source, "claim": claim, "here": here, "verdict": verdict(found),
              "found": [{"expected": expected, "of": of, **e} for expected, of, e in found if e]}
             for source, claim, here, found in rows]
    order = (DIFFERS, NOT_SHOWN, AGREES, OPEN)
    return sorted(lines, key=lambda row: (row["source"] == OURS, order.index(row["verdict"])))


def over_noise(r, expected, differences):
    """What was found, for a row, with each kind of noise that was run.  differences: {what it is of: function
    of a task giving (seeds, n)}."""
    return [(expected, ", ".join(filter(None, (of, NOISE_OF[task]))), over_seeds(difference(task)))
            for of, difference in differences.items() for task in r.tasks]


def paper_rows(r):
    def wins(expected, a, b):       # a minus b
        return over_noise(r, expected, {
            "in distribution": lambda task: r.wins_minus(task, a, b, *SETS[:1]),
            "out of it": lambda task: r.wins_minus(task, a, b, *SHIFTED)})

    def varied(expected, a, b, kind, **names):
        return over_noise(r, expected, {name: lambda task, m=m: r.varied_minus(task, a, b, f"{kind}_{m}")
                                        for m, name in names.items()})

    def falls(split):
        return lambda task: r.ranked_rightly(task, "sft", split) - r.ranked_rightly(task, "sft", "test")
    both = {"ead": "EAD", "embedding": "embeddings"}
    gaps = {name: lambda task, p=policy: growth(r, task, p)
            for policy, name in (("ppo", "PPO"), ("bon", "best-of-16"))}
    return [
        ("6.1, fig. 2", "best-of-16 beats RLHF, in and out of distribution", "PPO - best-of-16",
         wins(LESS, "ppo", "bon")),
        ("6.1, fig. 2", "RLHF beats SFT, in and out of distribution", "PPO - SFT",
         wins(MORE, "ppo", "sft")),
        ("6.1, fig. 2", "best-of-16 beats SFT, in and out of distribution", "best-of-16 - SFT",
         wins(MORE, "bon", "sft")),
        ("6.1, fig. 2", "the generalisation gaps of all three are about equal",
         "advantage over SFT, OOD - ID", over_noise(r, SAME, gaps)),
        ("6.1",
         "the reward model is nearly as accurate out of distribution, so it does not cause the drop",
         "reward model ranks two SFT outputs as the gold reward does, OOD - ID",
         over_noise(r, NOT_LESS, {short(split): falls(split) for split in SHIFTED})),
        ("6.2, fig. 5", "per input RLHF is far less varied than SFT by EAD and Sentence-BERT",
         "PPO - SFT per input", varied(LESS, "ppo", "sft", "per_input", **both)),
        ("6.2, fig. 5", "NLI diversity shows no meaningful difference",
         "PPO - SFT per input, by a perfect classifier",
         varied(SAME, "ppo", "sft", "per_input", nli="NLI")),
        ("6.2, fig. 6", "across inputs RLHF is a little less varied than SFT", "PPO - SFT across inputs",
         varied(LESS, "ppo", "sft", "across", **both)),
        ("6.2, fig. 6", "across inputs best-of-16 is as varied as SFT, or more",
         "best-of-16 - SFT across inputs", varied(NOT_LESS, "bon", "sft", "across", **both))]


def growth(r, task, policy):
    """(seeds, prompts): a policy's advantage over SFT in win rate, OOD minus ID."""
    return r.wins_minus(task, policy, "sft", *SHIFTED) - r.wins_minus(task, policy, "sft", *SETS[:1])


def beta_rows(found):
    """From the usual beta to the largest one, systematic noise, temperature 1.  Once more with k2 in the
    reward, as in the authors' code, from near its default, 0.05, to the 5 of its README."""
    steps = {"larger": f"k1, {BETA:g} to {BETAS[-1]:g}", "larger, k2": f"k2, {K2[0]:g} to {K2[-1]:g}"}

    def rows(**names):
        return [(LESS, f"{name}, {step}", found[key][m]) for key, step in steps.items()
                for m, name in names.items()] if found else []
    return [("6.3, app. I", "a larger KL coefficient lowers performance", "change of the win rate, T = 1",
             rows(wins="win rate")),
            ("6.3, app. I", "a larger KL coefficient lowers diversity per input too",
             "change of diversity per input",
             rows(ead="EAD", embedding="embeddings", gold_diversity="gold diversity"))]


def open_rows():
    on_gpu = "open: reproduce.py --task alpaca on a GPU"
    return [("abstract; 6.1, fig. 3", "RLHF generalises better than SFT, the more so the larger the shift "
                                      "(instructions)", on_gpu, []),
            ("6.1, fig. 3", "with a small shift the gaps are equal (instructions)", on_gpu, []),
            ("6.1, fig. 4", "head to head against SFT, RLHF and best-of-16 win more often with a small shift "
                            "(instructions)", on_gpu, []),
            ("app. J.4", "EAD per input of SFT and RLHF: OPT-125M .81 and .15, OPT-6.7B .79 and .07",
             "open: reproduce.py --task tldr --model facebook/opt-125m --size paper on a GPU", []),
            ("7", "whether the trade-off is fundamental or a flaw of current methods is left open",
             "see the frontier, and which kind of diversity is lost", [])]


def our_rows(r, of_beta):
    def ours(claim, expected, here, difference, of=""):
        return OURS, claim, here, over_noise(r, expected, {of: difference})

    def varied(a, b, measure="per_input_gold_diversity"):
        return lambda task: r.varied_minus(task, a, b, measure)

    def beyond_sharpening(*splits):
        return lambda task: r.wins_minus(task, "ppo", "sft_matched", *splits)

    def lost(task, measure):        # (seeds,) what part of SFT's diversity PPO loses
        after, before = (np.nanmean(r.varied(task, p, measure), 1) for p in ("ppo", "sft"))
        return 1 - after / before
    no_penalty = of_beta["no penalty"] if of_beta else {}
    return [
        ours("PPO's advantage over SFT grows with the shift", MORE, "advantage in win rate, OOD - ID",
             lambda task: growth(r, task, "ppo")),
        ours("PPO loses gold diversity per input", LESS, "PPO - SFT", varied("ppo", "sft")),
        ours("PPO loses more diversity per input than across inputs", MORE,
             "relative loss of EAD per input - across inputs, both of 16 outputs",
             lambda task: (lost(task, "per_input_ead") - lost(task, "across_ead_of_as_many"))[:, None]),
        ours("PPO narrows the choice among good outputs", MORE, "loss of gold diversity among good outputs",
             lambda task: r.loss(task, "ppo")["narrowing"]),
        ours("PPO finds more different good answers than SFT", MORE,
             "different good answers of 16, PPO - SFT", varied("ppo", "sft", "good_distinct")),
        ours("best-of-16 finds more different good answers than SFT", MORE,
             "different good answers of 16, best-of-16 - SFT", varied("bon", "sft", "good_distinct")),
        ours("best-of-16 is less varied per input than SFT", LESS, "gold diversity, best-of-16 - SFT",
             varied("bon", "sft")),
        ours("PPO is less varied per input than best-of-16", LESS, "gold diversity, PPO - best-of-16",
             varied("ppo", "bon")),
        ours("PPO is more than sharpening: it beats SFT at the temperature of equal diversity", MORE,
             "win rate, PPO - matched SFT", beyond_sharpening("test"), "in distribution"),
        ours("out of distribution too", MORE, "win rate, PPO - matched SFT", beyond_sharpening(*SHIFTED),
             "out of it"),
        (OURS, "without a KL penalty PPO over-optimises: reward up, gold reward down",
         f"PPO, beta 0 - {BETA:g}", [(MORE if m == "reward" else LESS, m.replace("_", " "), e)
                                     for m, e in no_penalty.items()])]
