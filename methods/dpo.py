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
import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from common import pretrained
from common.dist import all_reduce, gather_rows, my_rows, param_groups, shard
from common.flags import Common, Count, Frozen, Natural, NonNegative, Positive, launch, setup, use_threads
from common.loop import Run, warmup_cosine
from common.tokenizer import load_tokenizer
from model import full_copy, log_probs, pack, share_trunk
from ppo import check_trainable
from reward import accuracy, comparisons, winners_and_losers
from splits import length_bucketed_batches, task_of


@dataclass
class Config(Common):
    model: str = "ckpt_sft.pt"  # policy to start from, also the reference policy
    loss: Literal["dpo", "ipo"] = "dpo"     # ipo: a bounded target for the margin
    beta: Positive = 0.1        # strength of the pull to the reference policy: in the unit of the reward that
                                # explains the pairs, where PPO's is in standard deviations of the reward
                                # model's scores; of ipo its tau
    prompts: Count = 8000       # prompts with preferences; a folder may hold fewer
    held_out: Count = 500       # prompts of the held-out pairs
    samples: Count = 5          # responses sampled for each prompt in the synthetic task, as in reward.py
    typicality: NonNegative = 0.0   # a: how much its annotators like what is typical, as in reward.py
    pairs: str = ""             # file of the synthetic task's pairs, as in reward.py
    epochs: Count = 1           # passes over the prompts
    batch_size: Count = 8       # prompts a step, each with all its pairs
    micro_batch_size: Natural = 0   # of these, prompts forwarded at once (on each GPU); 0: all
    recompute: bool = False     # compute activations again in the backward pass: less memory, a third more
                                # time
    shard: bool = False         # torchrun: each rank keeps a shard of each trained layer; for large models
    freeze: Frozen = 0.5        # fraction of the layers frozen with the embeddings; -1: as in the checkpoint
    lr: Positive = 5e-4         # peak learning rate, cosine to zero
    warmup: Natural = 50        # steps of linear warm-up, at most a tenth of all
    max_grad_norm: Positive = 1.0   # gradients are scaled down to this norm
    log_every: Count = 100      # steps between log lines
    quiet: bool = False         # no progress bar and no log lines


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
    logp = log_probs(policy, policy.top(h, packed), packed)
    with torch.no_grad():
        ref_logp = log_probs(ref_policy, ref_policy.top(h, packed), packed)
    return packed.to_padded(logp - ref_logp).sum(1)


# --------------------------------------------------------------------------------------------------- training

@torch.no_grad()
def implicit_rewards(policy, ref_policy, groups, device, batch_size=8):
    """The log-ratio of each response, which is its implicit reward over beta: lists as from reward.score."""
    mine, found = my_rows(groups), []
    for i in range(0, len(mine), batch_size):
        part = mine[i:i + batch_size]
        ratios = iter(log_ratios(policy, ref_policy, pack(*zip(*((g.prompt, g.responses) for g in part)),
                                                          device)).tolist())
        found += [[next(ratios) for _ in g.responses] for g in part]
    return gather_rows(found)


def build(cfg, device):
    """(policy, ref_policy, task, train groups, held-out groups, the checkpoint's dict)."""
    policy, saved = pretrained.load(cfg.model, "--model", device, cfg.dtype)
    use_threads(cfg, policy)
    task, tokenizer = task_of(cfg, saved), load_tokenizer(saved["tokenizer"])
    train, held_out = comparisons(cfg, policy, saved["weights_hash"], tokenizer, task)
    if cfg.freeze >= 0:
        policy.freeze(round(cfg.freeze * policy.config.n_layer))
    check_trainable(policy)
    ref_policy = copy.deepcopy(policy).requires_grad_(False)
    share_trunk(policy, ref_policy)
    policy.recompute = cfg.recompute
    if cfg.shard:
        shard(policy, ref_policy)
    return policy, ref_policy, task, train, held_out, saved


def main(cfg):
    device, rng = setup(cfg)
    policy, ref_policy, task, train, held_out, saved = build(cfg, device)
    optimizer = torch.optim.AdamW(param_groups(policy.trainable()), lr=cfg.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=True)
    batches = length_bucketed_batches([g.n_tokens for g in train], cfg.batch_size, cfg.epochs, rng)
    inputs = [saved["weights_hash"], [(g.prompt, g.responses, g.pairs) for g in train]]
    run = Run("dpo", cfg, optimizer, rng, inputs, policy=policy)

    for step in run.steps(len(batches)):
        run.set_lr(warmup_cosine(step, len(batches), cfg.lr, cfg.warmup))
        batch = [train[i] for i in batches[step]]
        n_pairs = sum(len(g.pairs) for g in batch)
        totals = torch.zeros(4)         # loss, accuracy, log-ratio of the chosen and of the rejected
        for part, weight in run.micro_batches(batch):
            packed = pack([g.prompt for g in part], [g.responses for g in part], device)
            ratio = log_ratios(policy, ref_policy, packed)      # (R,), of all responses in the part
            winner, loser = winners_and_losers(part, device)
            loss = weight * LOSSES[cfg.loss](ratio[winner], ratio[loser], cfg.beta, n_pairs)
            loss.backward()
            chosen, rejected = ratio[winner].detach(), ratio[loser].detach()
            totals += torch.stack((loss.detach(), weight * (chosen > rejected).sum() / n_pairs,
                                   weight * chosen.sum() / n_pairs, weight * rejected.sum() / n_pairs)).cpu()
        grad_norm, = run.step_optimizer(policy.trainable(), rows=batches[step])
        if (step + 1) % cfg.log_every == 0 or step + 1 == len(batches):
            names = ("loss", "accuracy", "chosen_log_ratio", "rejected_log_ratio")
            run.log(**dict(zip(names, all_reduce(totals).tolist())), grad_norm=grad_norm)

    full = full_copy(policy), full_copy(ref_policy)     # the ranks have unequal numbers of held-out prompts
    metrics = accuracy(held_out, implicit_rewards(*full, held_out, device))
    run.save(policy, saved["tokenizer"], task, metrics)
    print(f"wrote {run.path}: its implicit reward is right on {metrics['accuracy']:.3f} of "
          f"{metrics['pairs']} held-out pairs; `the longer wins` on {metrics['longer_wins']:.3f}", flush=True)


if __name__ == "__main__":
    launch(main, Config, __doc__)
