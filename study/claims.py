"""Statements about policies as differences between them: their estimates and verdicts, and everything in
results.json.

Some are the paper's claims, more are of this study; paper.py has the paper's row by row.  A claim says which
sign a difference has.  It holds, or its opposite does, if the 95 % interval over the choice of seeds and
prompts (`common.stats.over_seeds`) lies on one side of zero; else it is not shown, or, with fewer than four
seeds, these do not decide.
"""
import numpy as np

from common.stats import over_seeds
from study import key_story, rules
from study.names import DIVERSITY, NOISE_OF, QUALITY, SETS, SHIFTED, short
from tasks import synthetic

HOLDS, NOT_SHOWN, OPPOSITE = "HOLDS", "NOT SHOWN", "DOES NOT HOLD: the opposite"
UNDECIDED = {1: "one seed does not decide", 2: "two seeds do not decide", 3: "three seeds do not decide"}
GOLD = "per_input_gold_diversity"
GROWS = "PPO's advantage over SFT grows with the shift (its gap ID - OOD is smaller)"


def verdict(estimate, expected):
    """Of the claim that a difference has the sign `expected`, +1 or -1.  estimate: as from `over_seeds`."""
    sign = decided(estimate["low"], estimate["high"])
    if sign:
        return HOLDS if sign == expected else OPPOSITE
    return UNDECIDED.get(len(estimate["per_seed"]), NOT_SHOWN)


def decided(low, high):
    """The sign that an interval decides on: +1, -1, or 0 for neither.  One seed has no interval: None."""
    return 0 if low is None else 1 if low > 0 else -1 if high < 0 else 0


def claims(measures):
    """[{claim, task, noise, difference: what the estimate is of, expected: its sign, verdict, estimate,
    details: more numbers}], the same claims for each kind of noise."""
    return [line for task in NOISE_OF for line in claims_of(
        measures, task, (of_generalisation, of_diversity, of_best_of_n, of_sharpening))]


def claims_of(measures, task, kinds):
    """The same for one task.  kinds: some of the functions below."""
    return [{"claim": claim, "task": task, "noise": NOISE_OF.get(task, NOISE_OF["synthetic"]),
             "difference": difference, "expected": expected, "verdict": verdict(estimate, expected),
             "estimate": estimate, "details": details}
            for kind in kinds for claim, expected, difference, estimate, details in kind(measures, task)]


# Each function below lists (claim, sign that it expects, what is measured, estimate, details) on one task.

def of_generalisation(r, task):
    in_words = "win rate, PPO - SFT"
    advantage = {s: r.wins(task, "ppo", s) - r.wins(task, "sft", s) for s in SETS}
    grows = np.mean([advantage[s] for s in SHIFTED], axis=0) - advantage["test"]
    return [("PPO beats SFT in distribution", +1, in_words, over_seeds(advantage["test"]), {}),
            ("PPO beats SFT out of distribution", +1, f"{in_words}, mean over the OOD sets",
             over_seeds(r.wins(task, "ppo", *SHIFTED) - r.wins(task, "sft", *SHIFTED)), {}),
            (GROWS, +1, "advantage OOD - advantage ID", over_seeds(grows),
             {short(s): float(np.mean(a)) for s, a in advantage.items()})]


def advantage_on_other_scales(r, task):
    """What becomes of PPO's advantage over SFT out of distribution, OOD - ID, where it is not a difference of
    win rates: {"ratio": the logarithm of PPO's rate over SFT's, "odds": of the odds}.  Estimates over seeds
    alone."""
    def rate(policy, splits):       # (seeds,), kept off 0 and 1, where neither exists
        return np.clip(r.wins(task, policy, *splits).mean(axis=1), 1e-3, 1 - 1e-3)

    def shifted_less_home(scale):
        ood, home = (scale(rate("ppo", splits)) - scale(rate("sft", splits))
                     for splits in (SHIFTED, SETS[:1]))
        return over_seeds((ood - home)[:, None])
    return {"ratio": shifted_less_home(np.log), "odds": shifted_less_home(lambda x: np.log(x / (1 - x)))}


def of_diversity(r, task):
    def varied(policy, measure):        # (seeds, prompts), or (seeds, 1) across inputs
        return r.get(task, policy, "test", DIVERSITY, measure)

    def lost(kind):                     # (seeds,)
        return 1 - np.nanmean(varied("ppo", kind), 1) / np.nanmean(varied("sft", kind), 1)
    out = []
    for key, what in (("gold_diversity", "gold diversity"), ("ead", "EAD"), ("embedding", "embeddings")):
        cut = varied("ppo", f"per_input_{key}") - varied("sft", f"per_input_{key}")
        out.append((f"PPO cuts per-input diversity ({what})", -1, "PPO - SFT", over_seeds(cut), {}))
    # not by gold diversity: prompts tell different stories, so across inputs whoever reads them is near 1
    per_input, across = lost("per_input_ead"), lost("across_ead_of_as_many")
    return [*out, ("PPO cuts per-input diversity more than across-input (EAD)", +1,
                   "relative loss per input - across inputs, both of 16 outputs",
                   over_seeds((per_input - across)[:, None]),
                   {"per input": float(per_input.mean()), "across inputs": float(across.mean())})]


def of_best_of_n(r, task):
    def varied(policy):
        return r.get(task, policy, "test", DIVERSITY, GOLD)
    return [("best-of-16 beats SFT", +1, "win rate in distribution, best-of-16 - SFT",
             over_seeds(r.wins(task, "bon", "test") - r.wins(task, "sft", "test")), {}),
            ("best-of-16 beats PPO", +1, "win rate in distribution, best-of-16 - PPO",
             over_seeds(r.wins(task, "bon", "test") - r.wins(task, "ppo", "test")), {}),
            ("best-of-16 beats PPO out of distribution", +1, "win rate, best-of-16 - PPO",
             over_seeds(r.wins(task, "bon", *SHIFTED) - r.wins(task, "ppo", *SHIFTED)), {}),
            ("best-of-16 is less varied per input than SFT", -1, "gold diversity, best-of-16 - SFT",
             over_seeds(varied("bon") - varied("sft")), {}),
            ("PPO is less varied per input than best-of-16", -1, "gold diversity, PPO - best-of-16",
             over_seeds(varied("ppo") - varied("bon")), {})]


def of_sharpening(r, task):
    in_words = "PPO - matched SFT"
    return [("PPO is more than sharpening: it beats SFT at the temperature of equal diversity", +1,
             f"win rate in distribution, {in_words}",
             over_seeds(r.wins(task, "ppo", "test") - r.wins(task, "sft_matched", "test")), {}),
            ("out of distribution too, PPO beats SFT at that temperature, matched in distribution", +1,
             f"win rate, {in_words}",
             over_seeds(r.wins(task, "ppo", *SHIFTED) - r.wins(task, "sft_matched", *SHIFTED)), {})]


# --------------------------------------------------------------------------------------- what the tables show

def unfinished(r, task):
    """{split: the largest fraction of samples without an end, over SFT, best-of-16, PPO and seeds}."""
    return {s: float(max(r.get(task, p, s, QUALITY, "unfinished").max() for p in ("sft", "bon", "ppo")))
            for s in SETS}


def matched_temperatures(r, task):
    """Seed by seed, the temperature at which SFT has PPO's gold diversity."""
    return [r.lines[task, "sft_matched", "test", "matched", seed]["temperature"] for seed in r.seeds]


def seen(settings):
    """What the posts of each stage are like: [{split, posts, and the fractions new_words: with a new word,
    articles: in news format, distractors: with more than two}]."""
    n_train, found = max(settings["sft_rows"], settings["prompts"]), []
    for split, n in (("pretrain", settings["base_rows"]), ("train", n_train)):
        prompts = [row["prompt"] for row in synthetic.rows(split, n, references=1)]
        of_posts = {
            "new_words": [bool(synthetic.NEW_WORDS & set(prompt.split())) for prompt in prompts],
            "articles": [prompt.startswith("ARTICLE") for prompt in prompts],
            "distractors": [len(synthetic.read_prompt(prompt)[1]["object"]) > 2 for prompt in prompts]}
        found.append({"split": split, "posts": n} | {kind: float(np.mean(x)) for kind, x in of_posts.items()})
    return found


def results(r, settings, study, cost):
    """Everything in results.json.  study: a name for settings and code."""
    def row(key):
        return dict(zip(("task", "policy", "split", "temperature"), key))
    lines = {key: r.lines[(*key, r.seeds[0])] for key in r.keys()}
    return {"settings": settings | {"seeds": r.seeds}, "study": study, "cost": cost,
            "claims": claims(r),
            "win_rate": [row(key) | r.estimate(*key, "wins") for key in lines],
            "diversity": [row(key) | {"measure": m} | r.estimate(*key, m) for key, line in lines.items()
                          for m in line if m.startswith(("per_input_", "across_"))],
            "reward_model": {f"{task} seed {seed}": found for (task, seed), found in r.reward.items()},
            "seen": seen(settings), "rules": rules.win_rates(settings["inputs"]),
            "reward_by_set": [{"task": task, "policy": policy, "split": split,
                               **over_seeds(r.ranked_rightly(task, policy, split), rate=True)}
                              for task in NOISE_OF for policy in ("sft", "ppo") for split in SETS],
            "key_story": [{"task": task, "split": split,
                           **over_seeds(r.key_scores_higher(task, split), rate=True)}
                          for task in NOISE_OF for split in key_story.SPLITS],
            "advantage_on_other_scales": {task: advantage_on_other_scales(r, task) for task in NOISE_OF},
            "matched_temperature": {task: matched_temperatures(r, task) for task in NOISE_OF},
            "unfinished": {task: unfinished(r, task) for task in NOISE_OF}}


# ------------------------------------------------------------------------------------------------- error bars

def seeds_matter(stated):
    """What the choice of seeds adds to the intervals: counts of verdicts, claims that the choice of prompts
    alone would have decided otherwise, how much narrower the median interval would be, and the claim whose
    seeds differ most.  stated: claims."""
    both = [c for c in stated if c["estimate"]["prompts_low"] is not None]
    changed, ratios = [], []
    for c in both:
        e = c["estimate"]
        if decided(e["low"], e["high"]) != decided(e["prompts_low"], e["prompts_high"]):
            changed.append({"claim": c["claim"], "task": c["task"]})
        if e["low"] is not None and e["prompts_high"] > e["prompts_low"]:   # at toy size prompts may be alike
            ratios.append((e["high"] - e["low"]) / (e["prompts_high"] - e["prompts_low"]))
    widest = max(both, key=lambda c: c["estimate"]["seed_sd"] or 0)
    kinds = dict.fromkeys((HOLDS, NOT_SHOWN, OPPOSITE, *(c["verdict"] for c in stated)))
    return {"verdicts": {v: sum(c["verdict"] == v for c in stated) for v in kinds},
            "with_many_prompts": len(both), "decided_otherwise": changed,
            "times_wider_in_the_median": float(np.median(ratios or [1.])),
            "seeds_differ_most": {"claim": widest["claim"], "task": widest["task"],
                                  "seed_sd": widest["estimate"]["seed_sd"]}}
