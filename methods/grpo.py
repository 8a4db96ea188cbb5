"""GRPO and RLOO: policy gradients without a value model, because N responses to one prompt judge each other.

    python -m methods.grpo --model ckpt_sft.pt                       # GRPO against ckpt_reward.pt
    python -m methods.grpo --model ckpt_sft.pt --advantage rloo --out ckpt_rloo.pt      # RLOO
    python -m methods.grpo --model ckpt_sft.pt --reward gold         # the synthetic task's gold reward

Writes ckpt_grpo.pt and metrics_grpo.jsonl: the metrics of ppo.py but those of a value model, and `distinct`,
the fraction of different responses to one prompt.

GRPO (Shao et al. 2024) divides by the group's standard deviation and adds the KL penalty to the loss; RLOO
(Ahmadian et al. 2024) compares with the mean of the others and puts the penalty into the reward, as PPO does.
Deviations: both take PPO's clipped updates, several a rollout, where RLOO's paper takes one step of the plain
policy gradient.  The loss is a mean over the tokens of a minibatch.  RLOO sums over those of a response, and
GRPO averages over them first, which favours long wrong responses (Liu et al. 2025).
"""
import copy
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch

import model as M
from common import pretrained
from common.dist import (all_reduce, gather_rows, mean_over_ranks, my_rows, param_groups, rank, shard,
                         world_size)
from common.errors import check
from common.flags import (Common, Count, Domain, Finite, Frozen, Natural, NonNegative, Positive, Temperature,
                          launch, setup, use_threads)
from common.loop import Run
from common.tokenizer import load_tokenizer
from ppo import (build_judge, check_batch, check_trainable, gold_rewards, kl_estimate, masked_mean,
                 policy_loss, read_prompts, stop_if_broken)
from splits import task_of

Group = Annotated[int, Domain("an integer of at least 2", lambda x: x >= 2)]


@dataclass
class Config(Common):
    model: str = "ckpt_sft.pt"  # policy to start from; also the reference policy, from which KL is measured
    reward: str = "ckpt_reward.pt"  # reward model, or gold: the synthetic task's gold reward
    advantage: Literal["grpo", "rloo"] = "grpo"     # grpo: standardised within the group; rloo: less the
                                                    # mean of the others
    steps: Count = 45           # rollout batches
    batch_size: Count = 8       # prompts a step
    n: Group = 8                # responses to each of them
    epochs: Count = 2           # passes over a rollout batch
    minibatches: Count = 2      # optimizer steps a pass
    micro_batch_size: Natural = 0   # prompts forwarded at once (on each GPU) while learning; 0: a minibatch
    recompute: bool = False     # compute activations again in the backward pass: less memory, a third more
                                # time
    shard: bool = False         # torchrun: each rank keeps a shard of each trained layer; for large models
    freeze: Frozen = 0.5        # fraction of the layers frozen with the embeddings; -1: as in the checkpoint
    lr: Positive = 1e-3         # peak learning rate, linear to zero
    kl_coef: NonNegative = 0.1  # beta: one nat of KL costs this much reward (RLOO), or this much loss (GRPO)
    temperature: Temperature = 1.0  # of rollouts; log-probabilities are taken at the same one
    clip_ratio: Positive = 0.2  # policy ratio kept in 1 -+ this
    max_grad_norm: Positive = 1.0   # gradients are scaled down to this norm
    kl_stop: NonNegative = 200.0    # nats a response; beyond it the policy has run away and the run stops
    no_eos_score: Finite = -3.0     # reward of a response that did not end, in standard deviations
    quiet: bool = False         # no progress bar and no log lines


# -------------------------------------------------------------------------------------------- the mathematics

def grpo_advantages(rewards):
    """(r - mean) / standard deviation within each group (Shao et al. 2024, section 4.1.2).  rewards: (B, N).
    Returns (B, N); a group whose rewards are equal has nothing to learn from: 0."""
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-6)


def rloo_advantages(rewards):
    """r - mean of the N - 1 others of the group (Ahmadian et al. 2024, equation 8).  rewards: (B, N).
    Returns (B, N)."""
    n = rewards.shape[1]
    return (rewards - rewards.mean(dim=1, keepdim=True)) * n / (n - 1)


ADVANTAGES = {"grpo": grpo_advantages, "rloo": rloo_advantages}


# ---------------------------------------------------------------------------------------------- one iteration

class Rollout(NamedTuple):
    """This rank's B prompts with N responses each, and what stays fixed while the policy learns.  Grids are
    (B N, T)."""
    prompts: list               # B id lists
    responses: list             # B lists of N id lists
    mask: torch.Tensor
    logp: torch.Tensor
    ref_logp: torch.Tensor
    score: torch.Tensor         # (B N,) of the reward model; zeros without one
    finished: torch.Tensor      # (B N,) bool


@torch.no_grad()
def rollout(policy, ref_policy, reward_model, prompts, n, max_new_tokens, eos, temperature, rng):
    """Samples n responses to each prompt and scores them.  The prompt is computed once for all of them."""
    sampled = M.generate(policy, prompts, max_new_tokens, n=n, temperature=temperature, eos=eos, rng=rng,
                         ranks=(rank(), world_size()))
    prompts = my_rows(prompts)
    packed = M.pack(prompts, sampled, policy.embed.weight.device)
    logp, ref_logp = (M.log_probs(model, model(packed), packed, temperature)
                      for model in (policy, ref_policy))
    score = torch.zeros(len(prompts) * n, device=logp.device)
    if reward_model:
        score = M.rewards(reward_model, reward_model(packed), packed)
    finished = torch.tensor([r[-1] == eos for group in sampled for r in group], device=logp.device)
    check(all(x.isfinite().all() for x in (logp, ref_logp, score)), "rollout: a log-probability or a reward "
          "is not finite: one of the models is damaged")
    return Rollout(prompts, sampled, packed.response_mask(), packed.to_padded(logp),
                   packed.to_padded(ref_logp), score, finished)


def update(policy, ro, advantages, cfg, rng, run):
    """Several passes of clipped updates over one rollout.  advantages: (B, N).  Returns means over
    minibatches: {"pg_loss", "pg_clipfrac", "entropy", "pg_norm"}."""
    stats, norms, n = [], [], advantages.shape[1]
    lengths = torch.tensor(gather_rows([sum(map(len, group)) for group in ro.responses]))
    for _ in range(cfg.epochs):
        for mb_idx in torch.randperm(len(lengths), generator=rng).tensor_split(cfg.minibatches):
            n_tokens, mb_stats = int(lengths[mb_idx].sum()), torch.zeros(3)
            for idx, weight in run.held_micro_batches(mb_idx.tolist()):
                loss, part_stats = minibatch_loss(policy, ro, advantages, idx, n, n_tokens, cfg)
                (weight * loss).backward()
                mb_stats += weight * part_stats.cpu()
            norms += run.step_optimizer(policy.trainable(), rows=[run.batch[i] for i in mb_idx])
            stats.append(mb_stats)
    means = all_reduce(torch.stack(stats)).mean(0).tolist()
    return dict(zip(("pg_loss", "pg_clipfrac", "entropy"), means)) | {"pg_norm": sum(norms) / len(norms)}


def minibatch_loss(policy, ro, advantages, idx, n, n_tokens, cfg):
    """Loss of the groups idx, a sum over n_tokens, and (loss, fraction clipped, entropy)."""
    mb = M.pack([ro.prompts[i] for i in idx], [ro.responses[i] for i in idx], ro.mask.device)
    logp, entropy = M.log_probs(policy, policy(mb), mb, cfg.temperature, entropy=True)
    logp, mask = mb.to_padded(logp), mb.response_mask()
    rows, T = [i * n + j for i in idx for j in range(n)], mask.shape[1]
    loss, clipfrac = policy_loss(logp, ro.logp[rows, :T], advantages[idx].flatten()[:, None].expand_as(mask),
                                 mask, cfg.clip_ratio, n_tokens)
    if cfg.advantage == "grpo":
        # differentiated here, not part of the reward.  Its gradient is that of KL(ref || policy), so GRPO
        # ends near the optimum of another divergence than PPO and RLOO (tests/test_methods.py)
        k3 = kl_estimate(logp, ro.ref_logp[rows, :T], "k3")
        loss = loss + cfg.kl_coef * masked_mean(k3, mask, n_tokens)
    return loss, torch.stack((loss.detach(), clipfrac, entropy.sum() / n_tokens))


# --------------------------------------------------------------------------------------------------- training

def build(cfg, device):
    """(policy, ref_policy, reward_model, the policy's checkpoint's dict, task, hash of the reward model)."""
    policy, saved = pretrained.load(cfg.model, "--model", device, cfg.dtype)
    use_threads(cfg, policy)
    task = task_of(cfg, saved)
    if cfg.freeze >= 0:
        policy.freeze(round(cfg.freeze * policy.config.n_layer))
    check_trainable(policy)
    ref_policy = copy.deepcopy(policy).requires_grad_(False)
    M.share_trunk(policy, ref_policy)
    reward_model, reward_hash = build_judge(cfg, task, policy, saved["tokenizer"], device)
    policy.recompute = cfg.recompute
    if cfg.shard:
        shard(*[model for model in (policy, ref_policy, reward_model) if model])
    return policy, ref_policy, reward_model, saved, task, reward_hash


def rollout_metrics(ro, score, gold):
    """Means over the responses of all ranks; `distinct` is the mean fraction of different responses to one
    prompt, which falls as the policy collapses."""
    k1, k3 = (mean_over_ranks(kl_estimate(ro.logp, ro.ref_logp, kind).where(ro.mask, 0.).sum(1))
              for kind in ("k1", "k3"))
    distinct = torch.tensor([len(set(map(tuple, group))) / len(group) for group in ro.responses])
    gold = {} if gold is None else {"gold_reward": mean_over_ranks(gold)}
    return {"reward": mean_over_ranks(score), **gold, "kl": k1, "kl_k3": k3,
            "eos_rate": mean_over_ranks(ro.finished), "length": mean_over_ranks(ro.mask.sum(1)),
            "distinct": mean_over_ranks(distinct)}


def main(cfg):
    device, rng = setup(cfg)
    check_batch(cfg.batch_size, cfg.minibatches, "prompts")
    policy, ref_policy, reward_model, saved, task, reward_hash = build(cfg, device)
    tokenizer = load_tokenizer(saved["tokenizer"])
    rows, prompts = read_prompts(task, tokenizer, cfg.steps * cfg.batch_size, policy.config.context)
    optimizer = torch.optim.Adam(param_groups(policy.trainable()), lr=cfg.lr, fused=True)
    run = Run("grpo", cfg, optimizer, rng, [saved["weights_hash"], reward_hash, prompts], policy=policy)

    for step in run.steps(cfg.steps):
        run.set_lr(cfg.lr * (1 - step / cfg.steps))
        batch = run.next_rows(len(prompts), cfg.batch_size)
        # 1. N responses to each prompt
        ro = rollout(policy, ref_policy, reward_model, [prompts[i] for i in batch], cfg.n,
                     task.max_new_tokens, tokenizer.eot_token, cfg.temperature, rng)
        row_of_each = [rows[i] for i in my_rows(batch) for _ in range(cfg.n)]
        gold = gold_rewards(task, tokenizer, row_of_each, sum(ro.responses, []), device)
        score = gold if reward_model is None else torch.where(ro.finished, ro.score, cfg.no_eos_score)
        # 2. advantages within a group; RLOO's rewards bear the KL penalty, GRPO's loss does
        rewards = score
        if cfg.advantage == "rloo":
            kl = kl_estimate(ro.logp, ro.ref_logp).where(ro.mask, 0.).sum(1)
            rewards = score - cfg.kl_coef * kl
        advantages = ADVANTAGES[cfg.advantage](rewards.view(-1, cfg.n))
        # 3. clipped updates
        stats = update(policy, ro, advantages, cfg, rng, run)

        metrics = run.state["metrics"] = rollout_metrics(ro, score, gold)
        run.log(**metrics, **stats)
        stop_if_broken(step, metrics["kl"], cfg.kl_stop, metrics["eos_rate"], run.state, task.max_new_tokens)

    metrics = run.state["metrics"]
    run.save(policy, saved["tokenizer"], task, metrics, trained_against=reward_hash)
    print(f"wrote {run.path}: " + ", ".join(f"{k} {v:.3f}" for k, v in list(metrics.items())[:3]), flush=True)


if __name__ == "__main__":
    launch(main, Config, __doc__)
