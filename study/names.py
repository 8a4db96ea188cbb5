"""What the study compares, and what its tables and pictures call it."""
from tasks import synthetic

# of the references: the second with --full alone
NOISE_OF = {"synthetic": "systematic noise", "synthetic-independent": "independent noise"}
POLICIES = {"base": "base model", "sft": "SFT", "sft_matched": "SFT, matched temperature",
            "bon": "best-of-16", "bon_resampled": "best-of-16, the authors' resampling", "ppo": "PPO",
            "ppo_gold": "PPO on the gold reward"}

# test sets, the one in distribution first
SETS = ["test", *(s for s in synthetic.SPLITS if s.startswith("ood_"))]
SHIFTED = SETS[1:]

SFT_TEMPERATURES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
QUALITY, DIVERSITY = 0.7, 1.0       # temperatures at which win rates and diversity are measured, the paper's
BETA = 0.1                          # the KL coefficient of `ppo`
BETAS = (0.0, 0.03, 0.1, 0.3, 1.0)  # with --full
K2 = (0.1, 1.0, 5.0)    # of PPO with k2 in the reward, as in the authors' code, whose README has beta 5
METHODS = {"dpo": (0.1, 0.3, 1.0), "ipo": (0.1,), "rloo": (0.1, 0.3), "grpo": (0.03, 0.1, 0.3)}
# chosen on validation prompts, with seeds that no result is reported of; PPO keeps the rate of the frozen
# recipe, which came out .02 in gold reward below the best of three
LEARNING_RATES = {"ppo": 1e-3, "dpo": 5e-4, "ipo": 5e-4, "rloo": 3e-3, "grpo": 1e-3}
OPTIMUM_BETAS = (0.1, 0.2, 0.3, 0.5, 1.0, 3.0)  # of the policy that maximises the objective itself
NO_EOS_SCORE = -3.      # of an output that did not end, as in ppo.py and bon.py
BEST_OF = (1, 2, 4, 8, 16, 32, 64)
PASS_AT = BEST_OF
PASS_AT_OF = ("base", "sft", "ppo", "ppo_b0.3")         # policies whose pass@k is measured

# every trained policy over its beta: {what a table calls it: {beta: its name in files}}
TRAINED = {"PPO": {b: "ppo" if b == BETA else f"ppo_b{b:g}" for b in BETAS},
           "PPO, k2 in the reward": {b: f"ppo_k2_b{b:g}" for b in K2},
           **{method.upper(): {b: f"{method}_b{b:g}" for b in betas} for method, betas in METHODS.items()}}
# one policy of each method at the usual beta, sampled on all test sets
ON_ALL_SETS = [names[BETA] for names in TRAINED.values()]


def short(split):
    return split.removeprefix("ood_")
