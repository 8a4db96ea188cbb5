"""The paper's claims row by row, beside the same quantity here, and whether the two agree.

What the paper says is a second-hand reading of arXiv 2310.06452, version 3: nobody here has checked it
against the PDF.  Claims on growing shift are tested in the instruction task, where the paper makes them;
claims on summarisation in the synthetic TL;DR, with both kinds of noise.
"""
from typing import NamedTuple

from common.stats import over_seeds
from study.claims import decided
from study.names import BETA, BETAS, DIVERSITY, K2, NOISE_OF, SETS, SHIFTED

AGREES, DIFFERS, NOT_SHOWN, OPEN = "agrees", "differs", "not shown", "open"
MORE, LESS, SAME, NOT_LESS = "more", "less", "same", "not less"     # what a claim says of a difference
SMALL = 0.05        # differences below this count as none where the paper sees none
INSTRUCTIONS, SUMMARIES = "instructions", "summaries"


class Row(NamedTuple):
    """One claim.  found: [(MORE, LESS, SAME or NOT_LESS, as the claim says; what it is of; estimate)].  How
    much more or less is not tested."""
    section: str
    claim: str
    task: str
    here: str
    found: list


def verdict(found):
    """Differs if one interval contradicts the claim, agrees if all show it, else not shown; open without
    any."""
    said = [_says(expected, e) for expected, _, e in found]
    if not said:
        return OPEN
    return DIFFERS if DIFFERS in said else AGREES if set(said) == {AGREES} else NOT_SHOWN


def _says(expected, e):
    """What one interval says.  `SAME` is shown by an interval within SMALL of zero and contradicted by one
    beyond it; `NOT_LESS` in the same way on one side."""
    low, high = e["low"], e["high"]
    if low is None:
        return NOT_SHOWN
    if expected in (MORE, LESS):
        return {0: NOT_SHOWN, 1: AGREES, -1: DIFFERS}[decided(low, high) * (1 if expected == MORE else -1)]
    if -SMALL < low and (high < SMALL or expected == NOT_LESS):
        return AGREES
    return DIFFERS if high <= -SMALL or (low >= SMALL and expected == SAME) else NOT_SHOWN


def rows(measures, reviewers):
    """All Rows.  reviewers: the parts "frontier" and "instruct" of reviewers.json."""
    return [*of_shift(reviewers["instruct"]), *of_summaries(measures), *of_reward_model(measures),
            *of_diversity(measures), *of_beta(reviewers["frontier"]), *not_tested_here()]


def of_shift(found):
    """What the paper shows with instructions, on one step of shift: here that to two deeds in a row, because
    hardly any policy does three, so that all are alike there.

    Head to head beside win rates against the reference: a policy that does only the first of two deeds can
    hardly win against a reference that does both, so that an advantage at that deed hardly shows."""
    grows, rises = found["ppo_advantage_less_in_distribution"], found["beats_sft_less_in_distribution"]
    return [
        Row("abstract; 6.1, fig. 3", "RLHF generalises better than SFT, the more so the larger the shift: "
            "much better on sequential instructions (one step of shift)", INSTRUCTIONS,
            "PPO - SFT on compositions, and the same less in distribution",
            [(MORE, "PPO - SFT, A, then B", found["less_sft"]["ppo ood_then2"]),
             (MORE, "A, then B, - ID", grows["ood_then2"]),
             (MORE, "head to head, A, then B, - ID", rises["ppo ood_then2"])]),
        Row("6.1, fig. 3", "with a small shift the gaps are equal (section 7: similar, or RLHF's slightly "
            "worse)", INSTRUCTIONS,
            "PPO - SFT: on unseen pairs less the same deeds in distribution",
            [(SAME, "unseen pairs", grows["ood_pairs"])]),
        Row("6.1, fig. 4", "head to head against SFT, RLHF and best-of-16 win about 3.5 points more often "
            "with a small shift", INSTRUCTIONS,
            "win rate against SFT: on unseen pairs less the same deeds in distribution",
            [(MORE, "PPO", rises["ppo ood_pairs"]), (MORE, "best-of-16", rises["bon ood_pairs"])])]


def over_noise(measures, difference):
    """[(what, estimate)] of a difference, a function of the task giving (seeds, n), with each noise."""
    return [(noise, over_seeds(difference(task))) for task, noise in NOISE_OF.items()]


def of_summaries(r):
    def less(a, b, *splits):
        return lambda task: r.wins(task, a, *splits) - r.wins(task, b, *splits)

    def both(expected, a, b):
        return [(expected, f"{where}, {noise}", e) for where, splits in (("ID", SETS[:1]), ("OOD", SHIFTED))
                for noise, e in over_noise(r, less(a, b, *splits))]

    def gap(policy):
        return lambda task: (r.wins(task, policy, *SHIFTED) - r.wins(task, "sft", *SHIFTED)
                             - r.wins(task, policy, "test") + r.wins(task, "sft", "test"))
    return [
        Row("6.1, fig. 2", "best-of-16 beats RLHF, in and out of distribution", SUMMARIES, "PPO - best-of-16",
            both(LESS, "ppo", "bon")),
        Row("6.1, fig. 2", "RLHF beats SFT, in and out of distribution", SUMMARIES, "PPO - SFT",
            both(MORE, "ppo", "sft")),
        Row("6.1, fig. 2", "best-of-16 beats SFT, in and out of distribution", SUMMARIES, "best-of-16 - SFT",
            both(MORE, "bon", "sft")),
        Row("6.1, fig. 2", "the gaps of all three are about equal", SUMMARIES, "advantage over SFT, OOD - ID",
            [(SAME, f"{name}, {noise}", e) for policy, name in (("ppo", "PPO"), ("bon", "best-of-16"))
             for noise, e in over_noise(r, gap(policy))])]


def of_reward_model(r):
    def falls(policy, split):
        return lambda task: r.ranked_rightly(task, policy, split) - r.ranked_rightly(task, policy, "test")
    return [Row("6.1", "the reward model is nearly as accurate out of distribution (.758 TL;DR, .716 "
                "CNN/DM), so it does not cause the drop", SUMMARIES,
                "reward model ranks two SFT outputs as the gold reward does, OOD - ID",
                [(NOT_LESS, f"{split.removeprefix('ood_')}, {noise}", e) for split in SHIFTED
                 for noise, e in over_noise(r, falls("sft", split))])]


def of_diversity(r):
    def less(a, b, measure):
        return lambda task: (r.get(task, a, "test", DIVERSITY, measure)
                             - r.get(task, b, "test", DIVERSITY, measure))

    def found(expected, a, b, measure, name):
        return [(expected, f"{name}, {noise}", e) for noise, e in over_noise(r, less(a, b, measure))]
    return [
        Row("6.2, fig. 5", "per input RLHF is far less varied than SFT by EAD and Sentence-BERT", SUMMARIES,
            "PPO - SFT per input", [*found(LESS, "ppo", "sft", "per_input_ead", "EAD"),
                                    *found(LESS, "ppo", "sft", "per_input_embedding", "embeddings")]),
        Row("6.2, fig. 5", "NLI diversity shows no meaningful difference", SUMMARIES,
            "PPO - SFT per input, by a perfect classifier",
            found(SAME, "ppo", "sft", "per_input_nli", "NLI")),
        Row("6.2, fig. 6", "across inputs RLHF is a little less varied than SFT", SUMMARIES,
            "PPO - SFT across inputs", [*found(LESS, "ppo", "sft", "across_ead", "EAD"),
                                        *found(LESS, "ppo", "sft", "across_embedding", "embeddings")]),
        Row("6.2, fig. 6", "across inputs best-of-16 is as varied as SFT, or more", SUMMARIES,
            "best-of-16 - SFT across inputs",
            [*found(NOT_LESS, "bon", "sft", "across_ead", "EAD"),
             *found(NOT_LESS, "bon", "sft", "across_embedding", "embeddings")])]


def of_beta(found):
    """From the usual beta to the largest one, systematic noise, temperature 1.  Once more with k2 in the
    reward, as in the authors' code, from near its default, 0.05, to the 5 of its README."""
    change, beta = found["larger_beta"], f"β = {max(BETAS):g} less β = {BETA:g}"
    authors, k2 = found["larger_beta_k2"], f"k2 in the reward, β = {max(K2):g} less β = {min(K2):g}"
    return [
        Row("6.3, app. I", "a larger KL coefficient lowers performance", SUMMARIES, f"win rate, {beta}",
            [(LESS, "T = 1", change["wins"]), (LESS, k2, authors["wins"])]),
        Row("6.3, app. I", "a larger KL coefficient lowers diversity per input too", SUMMARIES,
            f"diversity per input, {beta}",
            [(LESS, "EAD", change["ead"]), (LESS, "embeddings", change["embedding"]),
             (LESS, "gold diversity", change["gold_diversity"]),
             *((LESS, f"{name}, {k2}", authors[m]) for m, name in (
                 ("ead", "EAD"), ("embedding", "embeddings"), ("gold_diversity", "gold diversity")))])]


def not_tested_here():
    return [Row("app. J.4", "EAD per input of SFT and RLHF: OPT-125M .81 and .15, OPT-6.7B .79 and .07",
                SUMMARIES, "needs a GPU: reproduce.py --task tldr --model facebook/opt-125m --size gpu", []),
            Row("7", "whether the trade-off is fundamental or a flaw of current methods is left open",
                SUMMARIES, "see which kind of diversity is lost, and the frontier, below", [])]


def numbers(measures, reviewers):
    """[{section, claim, task, here, verdict, found: [{expected, of, ...estimate}]}], those that differ first.
    """
    found = [{"section": row.section, "claim": row.claim, "task": row.task, "here": row.here,
              "verdict": verdict(row.found),
              "found": [{"expected": expected, "of": of, **e} for expected, of, e in row.found]}
             for row in rows(measures, reviewers)]
    order = (DIFFERS, NOT_SHOWN, AGREES, OPEN)
    return sorted(found, key=lambda row: order.index(row["verdict"]))
