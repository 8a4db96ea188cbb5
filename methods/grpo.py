"""GRPO and RLOO: policy gradients without a value model, because N responses to one prompt judge each other.

    python -m methods.grpo --model ckpt_sft.pt                       # GRPO against ckpt_reward.pt
    python -m methods.grpo --model ckpt_sft.pt --advantage rloo --out ckpt_rloo.pt      # RLOO
    python -m methods.grpo --model ckpt_sft.pt --reward gold         # the synthetic task's gold reward

Writes ckpt_grpo.pt and metrics_grpo.jsonl: the metrics of ppo.py but those of a value model, and `distinct`,
the fraction of different responses to one prompt, and `alike`, that of groups whose rewards are equal.

GRPO (Shao et al. 2024) divides by the group's standard deviation and adds the KL penalty to the loss; RLOO
(Ahmadian et al. 2024) compares with the mean of the others and puts the penalty into the reward, as PPO does.
Deviations: both take PPO's clipped updates, several a rollout, where RLOO's paper takes one step of the plain
policy gradient.  The loss is a mean over the tokens of a minibatch.  RLOO sums over those of a response, and
GRPO averages over them first, which favours long wrong responses (Liu et al. 2025).
"""
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from common.dist import all_reduce, mean_over_ranks, my_rows, param_groups, shard
from common.flags import Count, Domain, NonNegative, arg, launch, setup
from common.loop import Run, check_batch
from common.tokenizer import ends_of
from ppo import (PolicyFlags, build_reward_model, end_score, gold_rewards, kl_estimate, make_policies,
                 masked_mean, policy_loss, read_prompts, rollout, rollout_metrics, stop_if_broken)
from splits import load_bundle

Group = Annotated[int, Domain("an integer of at least 2", lambda x: x >= 2)]


@dataclass
class Config(PolicyFlags):
    advantage: Literal["grpo", "rloo"] = arg("grpo", "standardised in the group, or minus the others' mean")
    batch_size: Count = arg(8, "prompts a step")
    n: Group = arg(8, "responses to each of them")
    kl_coef: NonNegative = arg(0.1, "beta: what one nat of KL costs, as reward (RLOO) or as loss (GRPO)")


# -------------------------------------------------------------------------------------------- the mathematics

def grpo_advantages(rewards):
    """(r - mean) / standard deviation within each group (Shao et al. 2024, section 4.1.2).  rewards: (B, N).
    Returns (B, N).  A group whose rewards are equal but for rounding has nothing to learn from: 0."""
    r = rewards.double()        # a mean in fp32 leaves rounding, which the division would blow up
    advantages = (r - r.mean(dim=1, keepdim=True)) / (r.std(dim=1, keepdim=True) + 1e-6)
    return torch.where(alike(rewards), 0., advantages).to(rewards.dtype)


def alike(rewards):
    """Which groups of rewards (B, N) differ by rounding only: (B, 1) bool."""
    low, high = rewards.amin(1, keepdim=True), rewards.amax(1, keepdim=True)
    return high - low <= 1e-5 * torch.maximum(high.abs(), low.abs()).clamp(min=1)


def rloo_advantages(rewards):
    """r - mean of the N - 1 others of the group (Ahmadian et al. 2024, equation 8): (B, N) -> (B, N)."""
    n = rewards.shape[1]
    return (rewards - rewards.mean(dim=1, keepdim=True)) * n / (n - 1)


ADVANTAGES = {"grpo": grpo_advantages, "rloo": rloo_advantages}


# ---------------------------------------------------------------------------------------------- one iteration

def update(policy, ro, advantages, cfg, run):
    """Several passes of clipped updates over one rollout.  advantages: (B, N).  Returns means over
    minibatches: {"pg_loss", "pg_clipfrac", "entropy", "pg_norm"}."""
    stats, norms = [], []
    tokens_of = ro.mask.sum(1).view(advantages.shape).sum(1)        # (B,)
    for _ in range(cfg.epochs):
        for mb in torch.arange(len(ro)).chunk(cfg.minibatches):     # as in ppo.update
            n_tokens, mb_stats = int(all_reduce(tokens_of[mb].sum())), torch.zeros(3)
            for idx in mb.split(cfg.micro_batch_size or len(mb)):
                loss, part_stats = minibatch_loss(policy, ro[idx], advantages[idx], n_tokens, cfg)
                loss.backward()
                mb_stats += part_stats.cpu()
            norms += run.step_optimizer(policy)
            stats.append(mb_stats)
    means = all_reduce(torch.stack(stats)).mean(0).tolist()
    return dict(zip(("pg_loss", "pg_clipfrac", "entropy"), means)) | {"pg_norm": sum(norms) / len(norms)}


def minibatch_loss(policy, ro, advantages, n_tokens, cfg):
    """Loss of some groups, a sum over n_tokens, and (loss, fraction clipped, entropy)."""
    logp, entropy = policy.log_probs_and_entropy(ro.packed, ro.h_policy, cfg.temperature)
    advantages = advantages.flatten()[:, None].expand_as(ro.mask)
    loss, clipfrac = policy_loss(logp, ro.logp, advantages, ro.mask, cfg.clip_ratio, n_tokens)
    if cfg.advantage == "grpo":
        # differentiated here, not part of the reward.  Its gradient is that of KL(ref || policy), so GRPO
        # ends near the optimum of another divergence than PPO and RLOO (tests/test_methods.py)
        k3 = kl_estimate(logp, ro.ref_logp, "k3")
        loss = loss + cfg.kl_coef * masked_mean(k3, ro.mask, n_tokens)
    return loss, torch.stack((loss.detach(), clipfrac, entropy.sum() / n_tokens))


# --------------------------------------------------------------------------------------------------- training

def main(cfg):
    device, rng = setup(cfg)
    check_batch(cfg, cfg.minibatches)
    bundle = load_bundle(cfg, device)
    task, eos = bundle.task, ends_of(bundle.tokenizer)
    policy, ref_policy = make_policies(cfg, bundle.model)
    reward_model, reward_hash = build_reward_model(cfg, bundle, device)
    if cfg.shard:
        shard(*[model for model in (policy, ref_policy, reward_model) if model])
    rows, prompts = read_prompts(bundle, cfg.steps * cfg.batch_size)
    optimizer = torch.optim.Adam(param_groups(policy.trainable()), lr=cfg.lr, fused=True)
    run = Run("grpo", cfg, optimizer, rng, inputs=[bundle.saved["weights_hash"], reward_hash, prompts],
              policy=policy)

    for step in run.steps(cfg.steps):
        run.set_lr(cfg.lr * (1 - step / cfg.steps))
        batch = run.next_rows(len(prompts), cfg.batch_size)
        # 1. N responses to each prompt
        ro = rollout(policy, ref_policy, None, reward_model, [prompts[i] for i in batch], task.max_new_tokens,
                     eos, cfg.temperature, rng, cfg.n)
        gold = gold_rewards(bundle, [rows[i] for i in my_rows(batch) for _ in range(cfg.n)], ro.responses)
        score = gold if reward_model is None else end_score(ro.score, ro.finished, cfg.no_eos_score)
        # 2. advantages within a group; RLOO's rewards bear the KL penalty, GRPO's loss does
        penalty = cfg.kl_coef * kl_estimate(ro.logp, ro.ref_logp).where(ro.mask, 0.).sum(1)
        rewards = score - penalty if cfg.advantage == "rloo" else score
        advantages = ADVANTAGES[cfg.advantage](rewards.view(-1, cfg.n))
        # 3. clipped updates
        stats = update(policy, ro, advantages, cfg, run)

        texts = list(map(tuple, ro.responses))
        distinct = torch.tensor([len(set(texts[i:i + cfg.n])) / cfg.n for i in range(0, len(texts), cfg.n)])
        metrics = rollout_metrics(ro, score, gold) | {
            "distinct": mean_over_ranks(distinct), "alike": mean_over_ranks(alike(rewards.view(-1, cfg.n)))}
        run.state["metrics"] = metrics
        run.log(**metrics, **stats)
        stop_if_broken(step, metrics, cfg, run.state, task.max_new_tokens)

    metrics = run.state["metrics"]
    run.save(policy, bundle.saved["tokenizer"], task, metrics, trained_against=reward_hash)
    print(f"wrote {run.path}: " + ", ".join(f"{k} {v:.3f}" for k, v in list(metrics.items())[:3]), flush=True)


if __name__ == "__main__":
    launch(main, Config, __doc__)
