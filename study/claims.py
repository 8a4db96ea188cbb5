"""What the study claims, the paper's claims beside our own statements, and everything in results.json.

A claim says which way a difference goes.  Its verdict is the numbers' alone: `agrees` if every 95 % interval
over the choice of seeds and prompts (`common.stats.over_seeds`) shows what the claim says, `differs` if one
shows the opposite, else `not shown`, as always with fewer than four seeds; `open` if nothing here tests it.

What the paper says is a second-hand reading of arXiv 2310.06452, version 3: nobody here has checked it
against the PDF.  Only the direction is tested, not how much.
"""
import numpy as np

from common.stats import over_seeds
from study import frontier, proxies, shift
from study.measures import Measures
from study.names import BETA, BETAS, DIVERSITY, K2, NOISE_OF, POLICIES, QUALITY, SETS, SHIFTED, short

AGREES, DIFFERS, NOT_SHOWN, OPEN = "agrees", "differs", "not shown", "open"
MORE, LESS, SAME, NOT_LESS = "more", "less", "same", "not less"         # what a claim says of a difference
SMALL = 0.05            # differences below this count as none where a claim says that there is none
ENOUGH_SEEDS = 4        # for a verdict
OURS = "ours"           # the section of a statement that is not the paper's
FULL, GPU = "python reproduce.py --full", "--task alpaca on a GPU"


def verdict(expected, e):
    """What one interval says of a claim.  e: estimate as from `over_seeds`.  `SAME` is shown by an interval
    within SMALL of zero and contradicted by one beyond it; `NOT_LESS` in the same way on one side."""
    low, high = e["low"], e["high"]
    if low is None or len(e["per_seed"]) < ENOUGH_SEEDS:
        return NOT_SHOWN
    if expected == LESS:
        expected, low, high = MORE, -high, -low
    if expected == MORE:
        return AGREES if low > 0 else DIFFERS if high < 0 else NOT_SHOWN
    if -SMALL < low and (high < SMALL or expected == NOT_LESS):
        return AGREES
    return DIFFERS if high <= -SMALL or (low >= SMALL and expected == SAME) else NOT_SHOWN


def row(section, claim, here, found):
    """One claim: {"section" of the paper or OURS, "claim", "here": the quantity that tests it, or what would,
    "verdict", "found": [{"expected", "of", "verdict", and the estimate}]}.  found: [(expected, of,
    estimate)]."""
    lines = [{"expected": expected, "of": of, "verdict": verdict(expected, e), **e}
             for expected, of, e in found if e]        # at toy size there may be nothing to measure
    said = {line["verdict"] for line in lines}
    whole = OPEN if not said else DIFFERS if DIFFERS in said else AGREES if said == {AGREES} else NOT_SHOWN
    return {"section": section, "claim": claim, "here": here, "verdict": whole, "found": lines}


def claims(r, beta=None):
    """All rows.  r: Measures; beta: as from `frontier.numbers`, with --full."""
    return [*of_instructions(), *of_win_rates(r), *of_reward_model(r), *of_diversity(r), *of_beta(beta),
            *not_tested_here(), *of_sharpening(r), *of_good_outputs(r)]


def over_noise(r, expected, of, estimate):
    """[(expected, of, estimate)] for each kind of noise that was run.  estimate: function of a task."""
    return [(expected, ", ".join(filter(None, (of, NOISE_OF[task]))), estimate(task)) for task in r.tasks]


# ------------------------------------------------------------------------------------------------- the claims

def of_instructions():
    return [row("abstract; 6.1, fig. 3", "RLHF generalises better than SFT, the more so the larger the "
                "shift: much better on sequential instructions", GPU, []),
            row("6.1, fig. 3", "with a small shift the gaps are equal", GPU, []),
            row("6.1, fig. 4", "head to head against SFT, RLHF and best-of-16 win about 3.5 points more "
                "often with a small shift", GPU, [])]


def of_win_rates(r):
    def both(expected, a, b):
        return [line for where, splits in (("ID", SETS[:1]), ("OOD", SHIFTED))
                for line in over_noise(r, expected, where, lambda task: r.minus(task, a, b, *splits))]

    def gap(policy):
        return lambda task: over_seeds(r.wins(task, policy, *SHIFTED) - r.wins(task, "sft", *SHIFTED)
                                       - r.wins(task, policy, "test") + r.wins(task, "sft", "test"))
    return [row("6.1, fig. 2", "best-of-16 beats RLHF, in and out of distribution",
                "win rate, PPO - best-of-16", both(LESS, "ppo", "bon")),
            row("6.1, fig. 2", "RLHF beats SFT, in and out of distribution", "win rate, PPO - SFT",
                both(MORE, "ppo", "sft")),
            row("6.1, fig. 2", "best-of-16 beats SFT, in and out of distribution",
                "win rate, best-of-16 - SFT", both(MORE, "bon", "sft")),
            row("6.1, fig. 2", "the generalisation gaps of all three are about equal",
                "advantage over SFT, OOD - ID", [*over_noise(r, SAME, "PPO", gap("ppo")),
                                                 *over_noise(r, SAME, "best-of-16", gap("bon"))]),
            row(OURS, "PPO's advantage over SFT grows with the shift", "advantage over SFT, OOD - ID",
                over_noise(r, MORE, "", gap("ppo")))]


def of_reward_model(r):
    def falls(split):
        return lambda task: over_seeds(r.ranked_rightly(task, "sft", split)
                                       - r.ranked_rightly(task, "sft", "test"))
    return [row("6.1", "the reward model is nearly as accurate out of distribution (.758 TL;DR, .716 CNN/DM), "
                "so it does not cause the drop",
                "how often it ranks two SFT outputs as the gold reward does, OOD - ID",
                [line for split in SHIFTED for line in over_noise(r, NOT_LESS, short(split), falls(split))])]


def of_diversity(r):
    def found(expected, a, b, measure, of):
        return over_noise(r, expected, of, lambda task: over_seeds(r.varied(task, a, measure)
                                                                   - r.varied(task, b, measure)))

    def lost(task, measure):        # (seeds, 1), as a fraction of SFT's
        ppo, sft = (np.nanmean(r.varied(task, p, measure), 1, keepdims=True) for p in ("ppo", "sft"))
        return 1 - ppo / sft
    gold = "per_input_gold_diversity"
    return [row("6.2, fig. 5", "per input RLHF is far less diverse than SFT by EAD and Sentence-BERT",
                "PPO - SFT per input", [*found(LESS, "ppo", "sft", "per_input_ead", "EAD"),
                                        *found(LESS, "ppo", "sft", "per_input_embedding", "embeddings")]),
            row("6.2, fig. 5", "NLI diversity shows no meaningful difference",
                "PPO - SFT per input, by a perfect classifier",
                found(SAME, "ppo", "sft", "per_input_nli", "NLI")),
            row("6.2, fig. 6", "across inputs RLHF is a little less diverse than SFT",
                "PPO - SFT across inputs",
                [*found(LESS, "ppo", "sft", "across_ead", "EAD"),
                 *found(LESS, "ppo", "sft", "across_embedding", "embeddings")]),
            row("6.2, fig. 6", "across inputs best-of-16 is as diverse as SFT, or more",
                "best-of-16 - SFT across inputs",
                [*found(NOT_LESS, "bon", "sft", "across_ead", "EAD"),
                 *found(NOT_LESS, "bon", "sft", "across_embedding", "embeddings")]),
            row(OURS, "PPO loses gold diversity per input", "PPO - SFT", found(LESS, "ppo", "sft", gold, "")),
            row(OURS, "best-of-16 has less gold diversity per input than SFT", "best-of-16 - SFT",
                found(LESS, "bon", "sft", gold, "")),
            row(OURS, "PPO has less gold diversity per input than best-of-16", "PPO - best-of-16",
                found(LESS, "ppo", "bon", gold, "")),
            # not by gold diversity: prompts tell different stories, so across inputs every policy is near 1
            row(OURS, "PPO loses more diversity per input than across inputs",
                "fraction of SFT's EAD that is lost, per input - across, both of 16 outputs",
                over_noise(r, MORE, "", lambda task: over_seeds(lost(task, "per_input_ead")
                                                                - lost(task, "across_ead_of_as_many"))))]


def of_beta(found):
    """From the usual beta to the largest one, systematic noise, temperature 1.  Once more with k2 in the
    reward, as in the authors' code, from near its default, 0.05, to the 5 of its README."""
    wins, varied, free = [], [], []
    if found:
        names = {"ead": "EAD", "embedding": "embeddings", "gold_diversity": "gold diversity"}
        runs = {f"β = {BETAS[-1]:g} - {BETA:g}": found["larger"],
                f"k2 in the reward, β = {K2[-1]:g} - {K2[0]:g}": found["larger, k2"]}
        wins = [(LESS, of, run["wins"]) for of, run in runs.items()]
        varied = [(LESS, f"{name}, {of}", run[m]) for of, run in runs.items() for m, name in names.items()]
        free = [(MORE, "reward", found["no penalty"]["reward"]),
                (LESS, "gold reward", found["no penalty"]["gold_reward"])]
    return [row("6.3, app. I", "a stronger KL penalty lowers performance",
                "win rate" if found else FULL, wins),
            row("6.3, app. I", "a stronger KL penalty lowers diversity per input too",
                "diversity per input" if found else FULL, varied),
            row(OURS, "without a KL penalty PPO over-optimises: more reward, less gold reward",
                f"β = 0 - {BETA:g}" if found else FULL, free)]


def not_tested_here():
    return [row("app. J.4", "EAD per input of SFT and RLHF: OPT-125M .81 and .15, OPT-6.7B .79 and .07",
                "--task tldr --model facebook/opt-125m on a GPU", []),
            row("7", "whether the trade-off is fundamental or a flaw of current methods is left open",
                "the frontier of all methods", [])]


def of_sharpening(r):
    def beyond(*splits):
        return lambda task: r.minus(task, "ppo", "sft_matched", *splits)
    return [row(OURS, "PPO is more than sharpening: it beats SFT at the temperature of equal gold diversity",
                "win rate, PPO - matched SFT",
                [*over_noise(r, MORE, "ID", beyond("test")), *over_noise(r, MORE, "OOD", beyond(*SHIFTED))])]


def of_good_outputs(r):
    return [row(OURS, "PPO loses diversity among good outputs too",
                "gold diversity of good outputs, SFT - PPO",
                over_noise(r, MORE, "", lambda task: split_of_loss(r, task, "ppo")["narrowing"]))]


# ----------------------------------------------------------------------------------------------- results.json

def split_of_loss(r, task, policy):
    """`diversity.split_of_loss` of a policy's gold diversity from SFT's, over seeds and prompts: {"loss",
    "errors_removed", "narrowing": estimates, "inputs": the mean number of prompts that enter}."""
    loss, narrowing = (r.varied(task, "sft", m) - r.varied(task, policy, m)
                       for m in ("per_input_gold_diversity", "good_gold_diversity"))
    loss, known = np.where(np.isnan(narrowing), np.nan, loss), ~np.isnan(narrowing)
    return {"loss": over_seeds(loss), "errors_removed": over_seeds(loss - narrowing),
            "narrowing": over_seeds(narrowing), "inputs": float(known.sum(axis=1).mean())}


def kinds(r):
    """Which diversity is lost, that of good outputs or of others: {"good": [{task, policy, measure,
    estimate}], "split": [{task, policy, and `split_of_loss`}]}."""
    measures = ("good", "per_input_gold_diversity", "good_gold_diversity", "good_distinct", "utility")
    where = [(task, policy) for task in r.tasks for policy in POLICIES
             if (task, policy, "test", DIVERSITY) in r.keys()]
    return {"good": [{"task": task, "policy": policy, "measure": m,
                      "estimate": r.estimate(task, policy, "test", DIVERSITY, m)}
                     for task, policy in where for m in measures],
            "split": [{"task": task, "policy": policy} | split_of_loss(r, task, policy)
                      for task, policy in where if policy not in ("sft", "base")]}


def unfinished(r, task):
    """{split: the largest fraction of samples without an end, over SFT, best-of-16, PPO and seeds}."""
    return {s: float(max(r.get(task, p, s, QUALITY, "unfinished").max() for p in ("sft", "bon", "ppo")))
            for s in SETS}


def results(folder, seeds, full=False):
    """Everything that results.json holds of the numbers.  folder: of the stages."""
    r = Measures(folder, seeds, NOISE_OF if full else ["synthetic"])
    more = frontier.numbers(folder, seeds) if full else {}

    def lines(measures):
        """[{task, policy, split, temperature, measure, and the estimate}] of every sample file."""
        names = ("task", "policy", "split", "temperature", "measure")
        return [dict(zip(names, (*key, m))) | r.estimate(*key, m)
                for key in r.keys() for m in r.lines[(*key, r.seeds[0])] if m.startswith(measures)]
    matched = {task: [r.lines[task, "sft_matched", "test", "matched", s]["temperature"] for s in r.seeds]
               for task in r.tasks}
    by_set = [{"task": task, "policy": policy, "split": split}
              | over_seeds(r.ranked_rightly(task, policy, split), rate=True)
              for task in r.tasks for policy in ("sft", "ppo") for split in SETS]
    if full:
        more |= {"shift": shift.numbers(r, folder), "proxies": proxies.numbers(folder, seeds)}
    return {"claims": claims(r, more.get("beta")), "win_rate": lines(("wins", "beats_sft")),
            "diversity": lines(("per_input_", "across_")),
            "reward_model": [{"task": t, "seed": s} | found for (t, s), found in r.reward.items()],
            "reward_model_by_set": by_set, "matched_temperature": matched,
            "unfinished": {task: unfinished(r, task) for task in r.tasks}, "kinds": kinds(r), **more}
