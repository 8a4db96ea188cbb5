"""Direct preference optimisation: learn from the annotators' pairs, without a reward model or sampling.

    python -m methods.dpo --model ckpt_sft.pt                # DPO on the pairs that reward.py learns from
    python -m methods.dpo --model ckpt_sft.pt --loss ipo --out ckpt_ipo.pt      # IPO
    python -m methods.dpo --model ckpt_sft.pt --data DIR     # preferences.jsonl of your own

Writes ckpt_dpo.pt and metrics_dpo.jsonl.  `python bon.py --model ckpt_dpo.pt` samples it.

DPO's optimum is PPO's: the policy that maximises E[r] - beta KL(policy || ref_policy), with the reward that
explains the pairs best.  But it learns from texts that another policy wrote, and its beta is not in PPO's
unit, because PPO's reward model is scaled to standard deviation 1.  Not in the paper, which compares SFT,
best-of-N and PPO.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from common.dist import all_reduce, full_copy, gather_rows, my_rows, param_groups, shard
from common.flags import Frozen, Positive, arg, launch, setup
from common.loop import Run, check_batch, warmup_cosine
from ppo import make_policies
from reward import PairFlags, accuracy, comparisons, pack_groups, winners_and_losers
from splits import length_bucketed_batches, load_bundle


@dataclass
class Config(PairFlags):
    model: str = arg("ckpt_sft.pt", "policy to start from, also the reference policy")
    loss: Literal["dpo", "ipo"] = arg("dpo", "ipo: a bounded target for the margin")
    beta: Positive = arg(0.1, "pull to the reference policy (of ipo its tau); its unit is not that of PPO's")
    freeze: Frozen = arg(0.5, "fraction of the layers frozen with the embeddings; -1: the checkpoint's own")
    lr: Positive = arg(5e-4, "peak learning rate, cosine to zero")


# -------------------------------------------------------------------------------------------- the mathematics
# chosen, rejected: (B,) log pi(y | x) - log ref(y | x) of the responses, summed over their tokens; n_pairs:
# of the whole batch, if these are a part of it.

def dpo_loss(chosen, rejected, beta, n_pairs=None):
    """-log sigma(beta (chosen - rejected)), averaged over pairs (Rafailov et al. 2023, equation 7)."""
    return -F.logsigmoid(beta * (chosen - rejected)).sum() / (n_pairs or len(chosen))


def ipo_loss(chosen, rejected, beta, n_pairs=None):
    """(chosen - rejected - 1 / (2 beta))^2, averaged over pairs (Azar et al. 2024, equation 17, tau = beta):
    a preference that is always the same cannot drive the policy away without bound.  The log-ratios are of
    whole responses, as in the paper; some libraries divide them by the length."""
    return (chosen - rejected - 1 / (2 * beta)).square().sum() / (n_pairs or len(chosen))


LOSSES = {"dpo": dpo_loss, "ipo": ipo_loss}


def log_ratios(policy, ref_policy, packed):
    """log pi(y | x) - log ref(y | x) of every response: (R,).  The two policies share the frozen trunk."""
    h = policy.trunk(packed)
    with torch.no_grad():
        ref_logp = ref_policy.log_probs(packed, h)
    return (policy.log_probs(packed, h) - ref_logp).sum(1)


# --------------------------------------------------------------------------------------------------- training

@torch.no_grad()
def implicit_rewards(policy, ref_policy, groups, batch_size=8):
    """The log-ratio of each response, which is its implicit reward over beta: lists as from reward.score."""
    mine, found = my_rows(groups), []
    for i in range(0, len(mine), batch_size):
        part = mine[i:i + batch_size]
        ratios = iter(log_ratios(policy, ref_policy, pack_groups(part, policy.device)).tolist())
        found += [[next(ratios) for _ in g.responses] for g in part]
    return gather_rows(found)


def main(cfg):
    device, rng = setup(cfg)
    check_batch(cfg)
    bundle = load_bundle(cfg, device)
    train, held_out = comparisons(cfg, bundle)
    policy, ref_policy = make_policies(cfg, bundle.model)
    if cfg.shard:
        shard(policy, ref_policy)
    optimizer = torch.optim.AdamW(param_groups(policy.trainable()), lr=cfg.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=True)
    batches = length_bucketed_batches([g.n_tokens for g in train], cfg.batch_size, cfg.epochs, rng)
    run = Run("dpo", cfg, optimizer, rng, [bundle.saved["weights_hash"], train], policy=policy)

    for step in run.steps(len(batches)):
        run.set_lr(warmup_cosine(step, len(batches), cfg.lr, cfg.warmup))
        batch = [train[i] for i in batches[step]]
        n_pairs = sum(len(g.pairs) for g in batch)
        totals = torch.zeros(4)         # loss, accuracy, log-ratio of the chosen and of the rejected
        for part in run.micro_batches(batch):
            ratio = log_ratios(policy, ref_policy, pack_groups(part, device))   # (R,), of all responses
            chosen, rejected = (ratio[rows] for rows in winners_and_losers(part, device))
            loss = LOSSES[cfg.loss](chosen, rejected, cfg.beta, n_pairs)
            loss.backward()
            sums = torch.stack(((chosen > rejected).sum(), chosen.sum(), rejected.sum())) / n_pairs
            totals += torch.stack((loss, *sums)).detach().cpu()
        grad_norm, = run.step_optimizer(policy)
        if (step + 1) % cfg.log_every == 0 or step + 1 == len(batches):
            names = ("loss", "accuracy", "chosen_log_ratio", "rejected_log_ratio")
            run.log(**dict(zip(names, all_reduce(totals).tolist())), grad_norm=grad_norm)

    full = full_copy(policy), full_copy(ref_policy)     # the ranks have unequal numbers of held-out prompts
    metrics = accuracy(held_out, implicit_rewards(*full, held_out))
    run.save(policy, bundle.saved["tokenizer"], bundle.task, metrics)
    print(f"wrote {run.path}: its implicit reward is right on {metrics['accuracy']:.3f} of "
          f"{metrics['pairs']} held-out pairs; `the longer wins` on {metrics['longer_wins']:.3f}", flush=True)


if __name__ == "__main__":
    launch(main, Config, __doc__)
