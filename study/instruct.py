"""The same study in a second synthetic task, instructions, whose shift is composition.

`python reproduce.py --full` runs this.  The base model has met compositions of two instructions; fine-tuning
sees single instructions only; the test sets hold unseen pairs and compositions.
"""
import json

from common.stats import over_seeds
from study.measures import Measures
from study.names import DIVERSITY, INSTRUCT_SETS, POLICIES, QUALITY, VARIED
from tasks import instructions

TASK = "instruct"
COMPARED = {k: v for k, v in POLICIES.items() if k != "sft_matched"}
BESIDE_SFT = ("base", "bon", "ppo", "ppo_gold")
MEASURES = ("gold_diversity", "ead", "self_bleu", "embedding")


def deeds_of_pairs(n):
    """Which of the first n prompts of `test` ask for a deed that unseen pairs ask for: their numbers."""
    wanted = {deed for deed, _ in instructions.HELD_OUT}
    asked = [instructions.read_prompt(row["prompt"])[0]["deed"]
             for row in instructions.rows("test", n, references=1)]
    return [i for i, deed in enumerate(asked) if deed in wanted]


def numbers(folder, seeds):
    """What reviewers.json holds of this question."""
    i = Measures(folder, seeds, [TASK])

    def won(policy, split):
        return i.get(TASK, policy, split, QUALITY, "wins")

    def less(policy, split, other="sft"):
        return won(policy, split) - won(other, split)

    def varied(policy, measure):
        return i.get(TASK, policy, "test", DIVERSITY, measure)

    def less_at_home(found, split):
        """found("test"), (seeds, prompts), subtracted from found(split); unseen pairs, none of which is to
        choose, are compared with the prompts of `test` that do not ask to choose."""
        away, home = found(split), found("test")
        if split == "ood_pairs":
            home = home[:, deeds_of_pairs(home.shape[1])]
            away = away[:, :home.shape[1]]
        return over_seeds(away - home)

    shifted = list(INSTRUCT_SETS)[1:]
    return {"win_rate": {f"{p} {s}": over_seeds(won(p, s), rate=True)
                         for p in COMPARED for s in INSTRUCT_SETS},
            "less_sft": {f"{p} {s}": over_seeds(less(p, s)) for p in BESIDE_SFT for s in INSTRUCT_SETS},
            "diversity": {p: {f"{kind}_{m}": over_seeds(varied(p, f"{kind}_{m}"))
                              for kind in ("per_input", "across") for m in MEASURES} for p in VARIED},
            "beats_sft": {f"{p} {s}": i.estimate(TASK, p, s, QUALITY, "beats_sft")
                          for p in ("bon", "ppo") for s in INSTRUCT_SETS},
            "beats_sft_less_in_distribution": {
                f"{p} {s}": less_at_home(lambda split: i.get(TASK, p, split, QUALITY, "beats_sft"), s)
                for p in ("bon", "ppo") for s in shifted},
            "length": {p: float(varied(p, "per_input_length").mean()) for p in VARIED},
            "ppo_cuts_gold_diversity": over_seeds(varied("ppo", "per_input_gold_diversity")
                                                  - varied("sft", "per_input_gold_diversity")),
            "ppo_advantage_less_in_distribution": {
                s: less_at_home(lambda split: less("ppo", split), s) for s in shifted},
            "ppo_less_base": {s: over_seeds(less("ppo", s, "base")) for s in INSTRUCT_SETS},
            "shift": json.loads((folder / f"seed{i.seeds[0]}" / TASK / "shift.json").read_text())}
