"""The paper's claims row by row, beside the same quantity here, and whether the two agree.

What the paper says is a second-hand reading of arXiv 2310.06452, version 3: nobody here has checked it
against the PDF.  Claims on growing shift are tested in the instruction task, where the paper makes them;
claims on summarisation in the synthetic TL;DR, with both kinds of noise.
"""
from typing import NamedTuple

import numpy as np

from common.stats import over_seeds
from study.claims import decided
from study.names import BETA, DIVERSITY, NOISE, SETS, SHIFTED

AGREES, DIFFERS, NOT_SHOWN = "agrees", "differs", "not shown"
SMALL = 0.05        # a difference that the paper calls none agrees with one whose interval lies within this
INSTRUCTIONS, SUMMARIES = "instructions", "summaries"


class Row(NamedTuple):
    """One claim.  found: [(sign that the paper's claim gives the difference: +1, -1 or 0 for none; what it is
    of; estimate)]."""
    section: str
    claim: str
    task: str
    here: str
    found: list


def verdict(found):
    """Differs if one interval contradicts the claim, agrees if all show it, else not shown."""
    said = [_says(expected, e) for expected, _, e in found]
    return DIFFERS if DIFFERS in said else AGREES if set(said) == {AGREES} else NOT_SHOWN


def _says(expected, e):
    sign = decided(e["low"], e["high"])
    if expected == 0 and sign == 0 and e["low"] is not None and -SMALL < e["low"] and e["high"] < SMALL:
        return AGREES
    if sign == 0:
        return NOT_SHOWN
    # a difference where the paper has none contradicts it unless it is small throughout
    if expected == 0:
        return AGREES if max(abs(e["low"]), abs(e["high"])) < SMALL else DIFFERS
    return AGREES if sign == expected else DIFFERS


def rows(measures, reviewers):
    """All Rows.  reviewers: the parts "frontier" and "instruct" of reviewers.json."""
    return [*of_shift(reviewers["instruct"]), *of_summaries(measures), *of_reward_model(measures),
            *of_diversity(measures), *of_beta(reviewers["frontier"]["frontier"])]


def of_shift(found):
    """What the paper shows with instructions."""
    grows, rises = found["ppo_advantage_less_in_distribution"], found["beats_sft_less_in_distribution"]
    return [
        Row("abstract; 6.1, fig. 3", "RLHF generalises better than SFT, the more so the larger the shift: "
            "much better on sequential instructions", INSTRUCTIONS,
            "PPO - SFT: on compositions less in distribution",
            [(+1, "A, then B", grows["ood_then2"]), (+1, "A, then B, then C", grows["ood_then3"])]),
        Row("6.1, fig. 3; 7", "with a small shift the gaps are equal", INSTRUCTIONS,
            "PPO - SFT: on unseen pairs less in distribution", [(0, "unseen pairs", grows["ood_pairs"])]),
        Row("6.1, fig. 4", "head to head against SFT, RLHF and best-of-16 win about 3.5 points more often "
            "with a small shift", INSTRUCTIONS, "win rate against SFT: on unseen pairs less in distribution",
            [(+1, "PPO", rises["ppo ood_pairs"]), (+1, "best-of-16", rises["bon ood_pairs"])])]


def over_noise(measures, difference):
    """[(what, estimate)] of a difference, a function of the task giving (seeds, n), with each noise."""
    return [(noise, over_seeds(difference(task))) for task, noise in NOISE.items()]


def of_summaries(r):
    def less(a, b, *splits):
        return lambda task: r.wins(task, a, *splits) - r.wins(task, b, *splits)

    def both(sign, a, b):
        return [(sign, f"{where}, {noise}", e) for where, splits in (("ID", SETS[:1]), ("OOD", SHIFTED))
                for noise, e in over_noise(r, less(a, b, *splits))]

    def gap(policy):
        return lambda task: (r.wins(task, policy, *SHIFTED) - r.wins(task, "sft", *SHIFTED)
                             - r.wins(task, policy, "test") + r.wins(task, "sft", "test"))
    return [
        Row("6.1, fig. 2", "best-of-16 beats RLHF, in and out of distribution", SUMMARIES, "PPO - best-of-16",
            both(-1, "ppo", "bon")),
        Row("6.1, fig. 2", "RLHF beats SFT, in and out of distribution", SUMMARIES, "PPO - SFT",
            both(+1, "ppo", "sft")),
        Row("6.1, fig. 2", "best-of-16 beats SFT, in and out of distribution", SUMMARIES, "best-of-16 - SFT",
            both(+1, "bon", "sft")),
        Row("6.1, fig. 2", "the gaps of all three are about equal", SUMMARIES, "advantage over SFT, OOD - ID",
            [(0, f"{name}, {noise}", e) for policy, name in (("ppo", "PPO"), ("bon", "best-of-16"))
             for noise, e in over_noise(r, gap(policy))])]


def of_reward_model(r):
    def falls(policy, split):
        return lambda task: r.ranked_rightly(task, policy, split) - r.ranked_rightly(task, policy, "test")
    return [Row("6.1", "the reward model is nearly as accurate out of distribution (.758 TL;DR, .716 CNN/DM), "
                "so it does not cause the drop", SUMMARIES,
                "reward model ranks two SFT outputs as the gold reward does, OOD - ID",
                [(0, f"{split.removeprefix('ood_')}, {noise}", e) for split in SHIFTED
                 for noise, e in over_noise(r, falls("sft", split))])]


def of_diversity(r):
    def less(a, b, measure):
        return lambda task: (r.get(task, a, "test", DIVERSITY, measure)
                             - r.get(task, b, "test", DIVERSITY, measure))

    def found(sign, a, b, measure, name):
        return [(sign, f"{name}, {noise}", e) for noise, e in over_noise(r, less(a, b, measure))]
    return [
        Row("6.2, fig. 5", "per input RLHF is far less varied than SFT by EAD and Sentence-BERT", SUMMARIES,
            "PPO - SFT per input", [*found(-1, "ppo", "sft", "per_input_ead", "EAD"),
                                    *found(-1, "ppo", "sft", "per_input_embedding", "embeddings")]),
        Row("6.2, fig. 5", "NLI diversity shows no meaningful difference", SUMMARIES,
            "PPO - SFT per input, by a perfect classifier", found(0, "ppo", "sft", "per_input_nli", "NLI")),
        Row("6.2, fig. 6", "across inputs RLHF is a little less varied than SFT", SUMMARIES,
            "PPO - SFT across inputs", found(-1, "ppo", "sft", "across_ead", "EAD")),
        Row("6.2, fig. 6", "across inputs best-of-16 is as varied as SFT, or more", SUMMARIES,
            "best-of-16 - SFT across inputs", found(0, "bon", "sft", "across_ead", "EAD"))]


def of_beta(lines):
    """From the usual beta to the largest one, systematic noise, temperature 1."""
    def points(measure):
        return [(x["knob"], x[measure]) for x in lines if x["curve"] == "PPO" and x["knob"] >= BETA
                and x["temperature"] == DIVERSITY]

    def change(measure):
        ordered = [np.array(e["per_seed"]) for _, e in sorted(points(measure), key=lambda p: p[0])]
        return over_seeds((ordered[-1] - ordered[0])[:, None])
    ends = [knob for knob, _ in sorted(points("wins"), key=lambda p: p[0])]
    return [
        Row("6.3, app. I", "a larger KL coefficient lowers performance", SUMMARIES,
            f"win rate, β = {ends[-1]:g} less β = {ends[0]:g}", [(-1, "T = 1", change("wins"))]),
        Row("6.3, app. I", "a larger KL coefficient lowers diversity per input too", SUMMARIES,
            f"diversity per input, β = {ends[-1]:g} less β = {ends[0]:g}",
            [(-1, "EAD", change("ead")), (-1, "embeddings", change("embedding")),
             (-1, "gold diversity", change("gold_diversity"))])]


def numbers(measures, reviewers):
    """[{section, claim, task, here, verdict, found: [{expected, of, ...estimate}]}], those that differ first.
    """
    found = [{"section": row.section, "claim": row.claim, "task": row.task, "here": row.here,
              "verdict": verdict(row.found),
              "found": [{"expected": expected, "of": of, **e} for expected, of, e in row.found]}
             for row in rows(measures, reviewers)]
    order = (DIFFERS, NOT_SHOWN, AGREES)
    return sorted(found, key=lambda row: order.index(row["verdict"]))
