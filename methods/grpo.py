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
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

import model as M
from common.dist import all_reduce, mean_over_ranks, my_rows, param_groups, rank, shard, world_size
from common.errors import UserError
from common.flags import (Count, Domain, Finite, Frozen, NonNegative, Positive, Temperature, TrainFlags, arg,
                          launch, setup)
from common.loop import Run, check_batch
from generate import generate
from ppo import (build_reward_model, gold_rewards, kl_estimate, make_policies, masked_mean, policy_loss,
                 read_prompts, stop_if_broken)
from splits import load_bundle

Group = Annotated[int, Domain("an integer of at least 2", lambda x: x >= 2)]


@dataclass
class Config(TrainFlags):
    model: str = arg("ckpt_sft.pt", "policy to start from; also the reference policy, from which KL is "
                                    "measured")
    reward: str = arg("ckpt_reward.pt", "reward model, or gold: the synthetic task's gold reward")
    advantage: Literal["grpo", "rloo"] = arg("grpo", "grpo: standardised within the group; rloo: minus the "
                                                     "mean of the others")
    steps: Count = arg(45, "rollout batches")
    batch_size: Count = arg(8, "prompts a step")
    n: Group = arg(8, "responses to each of them")
    epochs: Count = arg(2, "passes over a rollout batch")
    minibatches: Count = arg(2, "optimizer steps a pass")
    freeze: Frozen = arg(0.5, "fraction of the layers frozen with the embeddings; -1: as in the checkpoint")
    lr: Positive = arg(1e-3, "peak learning rate, linear to zero")
    kl_coef: NonNegative = arg(0.1, "beta: one nat of KL costs this much reward (RLOO), or this much loss "
                                    "(GRPO)")
    temperature: Temperature = arg(1.0, "of rollouts; log-probabilities are taken at the same one")
    clip_ratio: Positive = arg(0.2, "policy ratio kept in 1 -+ this")
    kl_stop: NonNegative = arg(200.0, "nats a response, at which the policy has run away and the run stops")
    no_eos_score: Finite = arg(-3.0, "reward of a response that did not end, in standard deviations")


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

@dataclass
class Rollout:
    """This rank's B prompts with N responses each, and what stays fixed while the policy learns.  Grids are
    (B N, T)."""
    prompts: list               # B id lists
    responses: list             # B lists of N id lists
    packed: M.Packed            # each prompt with its N responses
    mask: torch.Tensor
    logp: torch.Tensor
    ref_logp: torch.Tensor
    score: torch.Tensor         # (B N,) of the reward model; zeros without one
    finished: torch.Tensor      # (B N,) bool

    def __getitem__(self, idx):
        """The prompts idx (n,) with their responses, and what lies after the longest of these cut off."""
        prompts, responses = ([rows[i] for i in idx] for rows in (self.prompts, self.responses))
        packed, n = M.pack(prompts, responses, self.mask.device), len(self.responses[0])
        rows, T = (idx[:, None] * n + torch.arange(n)).flatten(), int(packed.lengths.max())
        grids = (x[rows, :T] for x in (self.mask, self.logp, self.ref_logp))
        return Rollout(prompts, responses, packed, *grids, self.score[rows], self.finished[rows])


@torch.no_grad()
def rollout(policy, ref_policy, reward_model, prompts, n, max_new_tokens, eos, temperature, rng):
    """Samples n responses to each prompt and scores them.  The prompt is computed once for all of them."""
    sampled = generate(policy, prompts, max_new_tokens, n=n, temperature=temperature, eos=eos, rng=rng,
                       ranks=(rank(), world_size()))
    prompts = my_rows(prompts)
    packed = M.pack(prompts, sampled, policy.device)
    logp, ref_logp = (model.log_probs(packed, None, temperature) for model in (policy, ref_policy))
    score = reward_model.rewards(packed) if reward_model else torch.zeros_like(logp[:, 0])
    finished = torch.tensor([r[-1] == eos for group in sampled for r in group], device=policy.device)
    if not all(x.isfinite().all() for x in (logp, ref_logp, score)):
        raise UserError("rollout: a log-probability or a reward is not finite: one of the models is damaged")
    return Rollout(prompts, sampled, packed, packed.response_mask(), logp, ref_logp, score, finished)


def update(policy, ro, advantages, cfg, run):
    """Several passes of clipped updates over one rollout.  advantages: (B, N).  Returns means over
    minibatches: {"pg_loss", "pg_clipfrac", "entropy", "pg_norm"}."""
    stats, norms = [], []
    tokens_of = ro.mask.sum(1).view(advantages.shape).sum(1)        # (B,)
    for _ in range(cfg.epochs):
        for mb in torch.arange(len(advantages)).chunk(cfg.minibatches):     # as in ppo.update
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
    logp, entropy = policy.log_probs_and_entropy(ro.packed, None, cfg.temperature)
    advantages = advantages.flatten()[:, None].expand_as(ro.mask)
    loss, clipfrac = policy_loss(logp, ro.logp, advantages, ro.mask, cfg.clip_ratio, n_tokens)
    if cfg.advantage == "grpo":
        # differentiated here, not part of the reward.  Its gradient is that of KL(ref || policy), so GRPO
        # ends near the optimum of another divergence than PPO and RLOO (tests/test_methods.py)
        k3 = kl_estimate(logp, ro.ref_logp, "k3")
        loss = loss + cfg.kl_coef * masked_mean(k3, ro.mask, n_tokens)
    return loss, torch.stack((loss.detach(), clipfrac, entropy.sum() / n_tokens))


# --------------------------------------------------------------------------------------------------- training

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
    check_batch(cfg, cfg.minibatches)
    bundle = load_bundle(cfg, device)
    task, eos = bundle.task, bundle.tokenizer.eot_token
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
        ro = rollout(policy, ref_policy, reward_model, [prompts[i] for i in batch], cfg.n,
                     task.max_new_tokens, eos, cfg.temperature, rng)
        row_of_each = [rows[i] for i in my_rows(batch) for _ in range(cfg.n)]
        gold = gold_rewards(bundle, row_of_each, sum(ro.responses, []))
        score = gold if reward_model is None else torch.where(ro.finished, ro.score, cfg.no_eos_score)
        # 2. advantages within a group; RLOO's rewards bear the KL penalty, GRPO's loss does
        rewards = score
        if cfg.advantage == "rloo":
            kl = kl_estimate(ro.logp, ro.ref_logp).where(ro.mask, 0.).sum(1)
            rewards = score - cfg.kl_coef * kl
        advantages = ADVANTAGES[cfg.advantage](rewards.view(-1, cfg.n))
        # 3. clipped updates
        stats = update(policy, ro, advantages, cfg, run)

        metrics = run.state["metrics"] = rollout_metrics(ro, score, gold)
        run.log(**metrics, **stats)
        stop_if_broken(step, metrics["kl"], cfg.kl_stop, metrics["eos_rate"], run.state, task.max_new_tokens)

    metrics = run.state["metrics"]
    run.save(policy, bundle.saved["tokenizer"], task, metrics, trained_against=reward_hash)
    print(f"wrote {run.path}: " + ", ".join(f"{k} {v:.3f}" for k, v in list(metrics.items())[:3]), flush=True)


if __name__ == "__main__":
    launch(main, Config, __doc__)
