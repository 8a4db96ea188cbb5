"""What the study compares, and what its tables and pictures call it."""
from tasks import instructions, synthetic

# of the references
NOISE_OF = {"synthetic": "systematic noise", "synthetic-independent": "independent noise"}
POLICIES = {"base": "base model", "sft": "SFT", "sft_matched": "SFT, matched temperature",
            "bon": "best-of-16", "ppo": "PPO", "ppo_gold": "PPO on the gold reward",
            "oracle": "oracle best-of-16"}
# of which diversity is measured.  Best-of-16: independent outputs, and as the authors draw them
VARIED = {"base": "base model", "sft": "SFT", "bon": "best-of-16",
          "bon_resampled": "best-of-16, the authors' resampling", "ppo": "PPO",
          "ppo_gold": "PPO on the gold reward"}

# test sets, the one in distribution first
SETS = ["test", *(s for s in synthetic.SPLITS if s.startswith("ood_"))]
SHIFTED = SETS[1:]
GRADED = [s for s in synthetic.SPLITS if s.startswith("graded_")]      # test sets between the study's
INSTRUCT_SETS = {"test": "single, known pair", "ood_pairs": "single, unseen pair", "ood_then2": "A, then B",
                 "ood_then3": "A, then B, then C"}
INSTRUCT_SPLITS = [s for s in instructions.SPLITS if s not in ("pretrain", "train")]

SFT_TEMPERATURES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
QUALITY, DIVERSITY = 0.7, 1.0       # temperatures at which win rates and diversity are measured, the paper's
OPT = "synthetic-opt"               # systematic noise on a base model of OPT's kind, with --full
BETA = 0.1                          # the KL coefficient of `ppo`
SWEEP = (0.0, 0.03, 0.3, 1.0)       # the others, with --full
BETAS = sorted((*SWEEP, BETA))
BEST_OF = (1, 2, 4, 8, 16, 32, 64)
# other methods with --full, each over its own knob: beta, or in ppo.py the weight of the entropy bonus;
# and PPO on annotators who like what is typical
METHODS = {"dpo": (0.1, 0.3, 1.0), "ipo": (0.1,), "rloo": (0.1, 0.3), "grpo": (0.03, 0.1, 0.3)}
ENTROPY, TYPICALITY = (0.1,), (5.0,)
K2 = (0.1, 1.0, 5.0)    # betas of PPO with k2 in the reward, as in the authors' code, whose README has beta 5
# learning rates that study/tuning.py chose on validation prompts, with seeds that no result is reported of;
# PPO keeps the rate of the frozen recipe, which came out .02 in gold reward below the best of three
LEARNING_RATES = {"ppo": 1e-3, "dpo": 5e-4, "ipo": 5e-4, "rloo": 3e-3, "grpo": 1e-3}
COVERED = 64        # outputs a prompt of coverage at k, for these policies
COVERAGE_OF = ("base", "sft", "ppo", "ppo_b0.3")


def ppo_name(beta):
    """What PPO with KL coefficient beta is called in files."""
    return "ppo" if beta == BETA else f"ppo_b{beta:g}"


def method_name(method, knob):
    """The same of another method: dpo_b0.1, ppo_entropy0.03, ppo_typical2, ppo_k2_b5."""
    return f"{method}_b{knob:g}" if method in METHODS else f"ppo_{method}{knob:g}"


def short(split):
    return split.removeprefix("ood_").removeprefix("graded_")


def pick(rows, **wanted):
    """The one row of a list of dicts whose fields are as wanted.  Raises KeyError if there is not exactly
    one."""
    found = [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]
    if len(found) != 1:
        raise KeyError(f"{len(found)} rows with {wanted}")
    return found[0]
