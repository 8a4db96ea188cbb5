"""The same study in a second synthetic task, instructions, whose shift is composition.

`python reproduce.py --full` runs this.  The base model has met compositions of two instructions; fine-tuning
sees single instructions only; the test sets hold unseen pairs and compositions.
"""
import json

from common.stats import over_seeds
from study.measures import Measures
from study.names import DIVERSITY, INSTRUCT_SETS, POLICIES, QUALITY, VARIED

TASK = "instruct"
COMPARED = {k: v for k, v in POLICIES.items() if k != "sft_matched"}
BESIDE_SFT = ("base", "bon", "ppo", "ppo_gold")
MEASURES = ("gold_diversity", "ead", "self_bleu", "embedding")


def numbers(folder, seeds):
    """What reviewers.json holds of this question."""
    i = Measures(folder, seeds, [TASK])

    def won(policy, split):
        return i.get(TASK, policy, split, QUALITY, "wins")

    def less(policy, split, other="sft"):
        return won(policy, split) - won(other, split)

    def varied(policy, measure):
        return i.get(TASK, policy, "test", DIVERSITY, measure)

    shifted, home = list(INSTRUCT_SETS)[1:], less("ppo", "test")
    return {"win_rate": {f"{p} {s}": over_seeds(won(p, s), rate=True)
                         for p in COMPARED for s in INSTRUCT_SETS},
            "less_sft": {f"{p} {s}": over_seeds(less(p, s)) for p in BESIDE_SFT for s in INSTRUCT_SETS},
            "diversity": {p: {f"{kind}_{m}": over_seeds(varied(p, f"{kind}_{m}"))
                              for kind in ("per_input", "across") for m in MEASURES} for p in VARIED},
            "beats_sft": {f"{p} {s}": i.estimate(TASK, p, s, QUALITY, "beats_sft")
                          for p in ("bon", "ppo") for s in INSTRUCT_SETS},
            "beats_sft_less_in_distribution": {f"{p} {s}": over_seeds(
                i.get(TASK, p, s, QUALITY, "beats_sft") - i.get(TASK, p, "test", QUALITY, "beats_sft"))
                for p in ("bon", "ppo") for s in shifted},
            "length": {p: float(varied(p, "per_input_length").mean()) for p in VARIED},
            "ppo_cuts_gold_diversity": over_seeds(varied("ppo", "per_input_gold_diversity")
                                                  - varied("sft", "per_input_gold_diversity")),
            "ppo_advantage_less_in_distribution": {
                s: over_seeds(less("ppo", s) - home) for s in shifted},
            "ppo_less_base": {s: over_seeds(less("ppo", s, "base")) for s in INSTRUCT_SETS},
            "shift": json.loads((folder / f"seed{i.seeds[0]}" / TASK / "shift.json").read_text())}
