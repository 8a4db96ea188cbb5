"""Proximal policy optimisation with a KL penalty: raise the reward, stay near the SFT policy.

    python ppo.py --model ckpt_sft.pt                    # against ckpt_reward.pt
    python ppo.py --model ckpt_sft.pt --reward gold      # against the synthetic task's gold reward: a ceiling
    python ppo.py --model ckpt_sft.pt --kl-coef 0        # no penalty: KL grows and grows; with more steps the
                                                         # gold reward falls again

Writes ckpt_ppo.pt and metrics_ppo.jsonl; docs/logs.md says what to look at, docs/one-step.md shows one step.

Deviations from the paper: a tiny model learns at a larger rate, with beta 0.1, fewer steps of 2 epochs and
half its layers frozen; the value model is a second network that starts from the reward model; advantages are
whitened over response tokens only (the authors' code includes padding); the penalty in the reward is k1
(theirs: k2); the score of a response that did not end is the fixed `--no-eos-score`.
"""
import copy
import time
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

import model as M
from common.dist import (all_gather, all_reduce, gather_rows, mean_over_ranks, my_rows, param_groups, rank,
                         shard, world_size)
from common.errors import UserError
from common.flags import (Count, Fraction, Frozen, Natural, NonNegative, OrNone, Positive, Temperature,
                          TrainFlags, arg, launch, setup)
from common.loop import Run, check_batch
from common.tokenizer import ends_of
from generate import generate, ids_of
from splits import decode, encode_prompts, load_bundle, load_reward_model

_SMALL = dict(freeze=0.8, lr=2e-5, steps=200, minibatches=4, kl_coef=0.05, dtype="bf16")
_PAPER = dict(freeze=0.8, epochs=4, minibatches=1)
PRESETS = {"paper": dict(lr=1.5e-5, batch_size=256, steps=750, kl_coef=0.05, **_PAPER),    # its tables 2-4
           # the command of their README; their code's default for beta is 0.05
           "authors": dict(lr=1.5e-6, batch_size=16, steps=500, kl_coef=5.0, kl_in_reward="k2", vf_coef=0.2,
                           **_PAPER),
           **dict.fromkeys(("small-gpt2", "small-opt", "small-llama"), _SMALL)}


@dataclass
class PolicyFlags(TrainFlags):
    """What methods/grpo.py shares with this script."""
    model: str = arg("ckpt_sft.pt", "policy to start from, and the reference policy of the KL penalty")
    reward: str = arg("ckpt_reward.pt", "reward model, also a published one, or gold: the synthetic task's "
                                       "gold reward")
    steps: Count = arg(45, "rollout batches")
    epochs: Count = arg(2, "passes over a rollout batch; the paper's 4")
    minibatches: Count = arg(2, "optimizer steps a pass")
    freeze: Frozen = arg(0.5, "fraction of the layers frozen with the embeddings; -1: the checkpoint's own")
    lr: Positive = arg(1e-3, "peak learning rate, linear to zero; the paper's 1.5e-5 is for large models")
    temperature: Temperature = arg(1.0, "of rollouts; log-probabilities are taken at the same one")
    clip_ratio: Positive = arg(0.2, "policy ratio kept in 1 -+ this")
    kl_stop: NonNegative = arg(200.0, "nats a response at which a runaway policy ends the run; 0: never")
    no_eos_score: OrNone = arg(-3.0, "reward of a response that did not end, in standard deviations; none: "
                                     "the reward model's, for tasks without ends")


@dataclass
class Config(PolicyFlags):
    batch_size: Count = arg(64, "rollouts a step, one a prompt; prompts come again if there are too few")
    kl_coef: NonNegative = arg(0.1, "beta: what one nat of KL costs, in standard deviations of the reward")
    kl_in_reward: Literal["k1", "k2"] = arg("k1", "estimator of that KL; k2, the authors', moves the optimum")
    kl_target: NonNegative = arg(0.0, "nats a response; above 0 beta adapts towards it")
    kl_horizon: Count = arg(2000, "responses over which beta adapts, at least a batch: more is slower")
    gamma: Fraction = arg(1.0, "discount")
    lam: Fraction = arg(0.95, "GAE's lambda")
    clip_value: Positive = arg(0.2, "value kept within this of its old prediction")
    vf_coef: NonNegative = arg(0.1, "weight of the value loss")
    ent_coef: NonNegative = arg(0.0, "weight of the entropy bonus, per nat a token")
    probe_every: Natural = arg(5, "steps between looks at the diversity per input; 0: never")


# -------------------------------------------------------------------------------------------- the mathematics
# All on grids (B, T) of response tokens with mask (B, T), True on the response, EOS included.  What lies
# after a response's end is never read: it is selected away, not multiplied by 0, which would keep a NaN.

def kl_estimate(logp, ref_logp, kind="k1"):
    """Per-token estimates of KL(policy || reference) from samples of the policy.  logp, ref_logp: (B, T).
    Returns (B, T), nats.

    With x = logp - ref_logp: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x (Schulman 2020).  k1 and k3 are
    unbiased; k1 of a sample can be negative, k3 never is.  Raises ValueError on another kind.

    All three are for looking at; into the reward belongs k1, because an unbiased value need not give an
    unbiased gradient.  The policy gradient treats the penalty as a constant, and then only k1's gradient is
    that of beta KL(policy || reference).  k3's is the gradient of KL(policy || reference) less that of
    KL(reference || policy): the two cancel near the reference, and the policy ends far from the optimum of
    E[r] - beta KL (tests/test_optimum.py measures how far).  k2 ends as far from it: its gradient is that of
    E[k2] less that of KL(policy || reference)."""
    x = logp - ref_logp
    if kind == "k1":
        return x
    if kind == "k2":
        return x.square() / 2
    if kind == "k3":
        return torch.expm1(-x) + x
    raise ValueError(f"kl_estimate: kind {kind!r}; choose from k1, k2, k3")


def end_score(score, finished, no_eos_score):
    """score (B,), but the fixed no_eos_score (None: score) where the response did not end."""
    return score if no_eos_score is None else torch.where(finished, score, no_eos_score)


def token_rewards(score, kl, mask, kl_coef):
    """R_t = -beta kl_t + [t = last] r(x, y).  score: (B,); kl, mask: (B, T).  Returns (B, T)."""
    rewards = torch.where(mask, -kl_coef * kl, 0.)
    last = mask.sum(1) - 1              # EOS, if the response ended: the position that the reward model reads
    rewards[torch.arange(len(score), device=score.device), last] += score
    return rewards


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2016, equation 16).  rewards, values, mask: (B, T).
    The value model predicts what is still to come, so what is left is a token's own doing: else an easy
    prompt would praise every token.

    delta_t = R_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1}, V and A zero behind the end.
    Returns (advantages, returns), each (B, T), zero outside the mask; returns = advantages + values."""
    rewards, values = rewards.where(mask, 0.), values.where(mask, 0.)
    advantages, next_advantage, next_value = torch.zeros_like(values), 0., 0.
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0.)
        advantages[:, t], next_value = next_advantage, values[:, t]
    return advantages, advantages + values


def masked_mean(x, mask, n_tokens=None):
    """Mean of x (B, T) where mask (B, T) is True; with n_tokens the sum over that many, so that the means of
    parts add up to the mean of a batch.  Selects, so that not even a NaN behind the end can leak in."""
    inside = x[mask]
    return inside.sum() / (n_tokens or len(inside))


def whiten(x, mask):
    """x (B, T) with mean 0 and unbiased variance 1 over the masked tokens of all ranks, 0 elsewhere: one
    learning rate then suits rewards of any scale."""
    inside = all_gather(x[mask])
    mean, variance = inside.mean(), inside.var() if len(inside) > 1 else x.new_ones(())
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), 0.)


def policy_loss(logp, old_logp, advantages, mask, clip=0.2, n_tokens=None):
    """Clipped surrogate, -E min(rho A, clip(rho, 1 -+ eps) A), over response tokens (Schulman et al. 2017,
    equation 7).  Outside the clip the gradient is zero, so several updates on one batch stay near the policy
    that sampled it.

    All (B, T); n_tokens as in `masked_mean`.  Returns (loss, fraction of tokens where the clip binds)."""
    ratio = (logp - old_logp).exp()
    unclipped, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return (masked_mean(torch.maximum(unclipped, clipped), mask, n_tokens),
            masked_mean((clipped > unclipped).float(), mask, n_tokens))


def value_loss(values, old_values, returns, mask, clip=0.2, n_tokens=None):
    """Half the squared error: the larger one of the prediction and of the prediction held within `clip` of
    the old.

    All (B, T); n_tokens as in `masked_mean`.  Returns (loss, fraction of tokens where the clip binds)."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    unclipped, clipped = (values - returns).square(), (near - returns).square()
    loss = 0.5 * masked_mean(torch.maximum(unclipped, clipped), mask, n_tokens)
    return loss, masked_mean((clipped > unclipped).float(), mask, n_tokens)


def adapted_beta(beta, kl, cfg):
    """Proportional controller of beta (Ziegler et al. 2019, section 2.2): it grows while kl, the mean KL of a
    batch's responses in nats, is above the target.  With target 0 beta stays as it is."""
    if not cfg.kl_target:
        return beta
    error = min(max(kl / cfg.kl_target - 1, -0.2), 0.2)
    return beta * (1 + error * cfg.batch_size / cfg.kl_horizon)


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) over response tokens of all ranks: 1 perfect, 0 no better than
    the mean, below 0 worse.  It is 0 where returns vary by rounding only: there is nothing to explain."""
    y, error = all_gather(returns[mask]), all_gather((returns - values)[mask])
    varies = len(y) > 1 and y.var() > 1e-10 * y.square().mean()
    return float(1 - error.var() / y.var()) if varies else 0.


# ---------------------------------------------------------------------------------------------- one iteration

@dataclass
class Rollout:
    """This rank's prompts, n responses to each (PPO: one), and everything that stays fixed while the policy
    learns from them.  R = B n responses; grids are (R, T)."""
    prompts: list               # B id lists
    responses: list             # R id lists
    packed: M.Packed            # each prompt with its responses
    h_policy: torch.Tensor      # the policy's trunk output, computed once
    h_value: torch.Tensor       # the value model's
    mask: torch.Tensor
    logp: torch.Tensor
    sampled_logp: torch.Tensor  # the sampler's own log-probabilities: another rounding than logp in bf16
    ref_logp: torch.Tensor
    values: torch.Tensor        # zeros without a value model
    score: torch.Tensor         # (R,) of the reward model; zeros without one
    finished: torch.Tensor      # (R,) bool, ended with EOS

    def __len__(self):
        return len(self.prompts)

    def __getitem__(self, idx):
        """The prompts idx with their responses, and what lies after the longest of these cut off."""
        n = len(self.responses) // len(self.prompts)
        rows = (idx[:, None] * n + torch.arange(n)).flatten()
        prompts, responses = [self.prompts[i] for i in idx], [self.responses[i] for i in rows]
        packed = M.pack(prompts, [responses[i:i + n] for i in range(0, len(rows), n)], self.mask.device)
        S, T = packed.tokens.shape[1], int(packed.lengths.max())
        h = (x[idx, :S] for x in (self.h_policy, self.h_value))
        grids = (x[rows, :T] for x in (self.mask, self.logp, self.sampled_logp, self.ref_logp, self.values))
        return Rollout(prompts, responses, packed, *h, *grids, self.score[rows], self.finished[rows])


@torch.no_grad()
def rollout(policy, ref_policy, value_model, reward_model, prompts, max_new_tokens, eos, temperature, rng,
            n=1):
    """Samples n responses to each of this rank's prompts and scores them.  prompts: those of all ranks;
    value_model, reward_model: GPT or None."""
    sampled_logp = []
    sampled = generate(policy, prompts, max_new_tokens, n, temperature, eos=eos, rng=rng,
                       ranks=(rank(), world_size()), logp=sampled_logp)
    prompts, responses = my_rows(prompts), [response for group in sampled for response in group]
    packed = M.pack(prompts, sampled, policy.device)
    h = policy.trunk(packed)                    # frozen layers run once for all models that share them

    def trunk(model):
        return h if model.shares_trunk_with(policy) else model.trunk(packed)
    # log-probabilities come from a forward pass, not from the sampler, so that the first update's ratio is 1
    logp = policy.log_probs(packed, h, temperature)
    ref_logp = ref_policy.log_probs(packed, trunk(ref_policy), temperature)
    h_value = trunk(value_model) if value_model else h
    values = value_model.values(packed, h_value) if value_model else torch.zeros_like(logp)
    score = torch.zeros_like(logp[:, 0])
    if reward_model and reward_model.reread:        # published: it reads the texts, by its own tokenizer
        score = reward_model.rewards(M.pack(*reward_model.reread(prompts, sampled), h.device))
    elif reward_model:
        score = reward_model.rewards(packed, trunk(reward_model))
    finished = torch.tensor([r[-1] in ids_of(eos) for r in responses], device=h.device)
    if not all(x.isfinite().all() for x in (logp, ref_logp, values, score)):
        raise UserError("rollout: a log-probability, a value or a reward is not finite: one of the models is "
                        "damaged")
    mask = packed.response_mask()
    sampled_logp = packed.to_grid(torch.tensor(sampled_logp, device=h.device))
    return Rollout(prompts, responses, packed, h, h_value, mask, logp, sampled_logp, ref_logp, values, score,
                   finished)


STATS = ("pg_loss", "v_loss", "pg_clipfrac", "v_clipfrac", "entropy", "ratio", "update_kl")


def update(policy, value_model, ro, advantages, returns, cfg, run):
    """Several passes of clipped updates over one rollout.  Returns means over minibatches: STATS, gradient
    norms, and ratio_first, 1 + the largest |ratio - 1| of the first, when nothing is learned yet."""
    stats, norms, ratio_off = [], [], torch.zeros(())
    for _ in range(cfg.epochs):
        # equal slices of the batch, whose prompts were drawn in random order; every rank has a part of each
        for mb in torch.arange(len(ro)).chunk(cfg.minibatches):
            n_tokens, mb_stats = int(all_reduce(ro.mask[mb].sum())), torch.zeros(len(STATS))
            for idx in mb.split(cfg.micro_batch_size or len(mb)):
                loss, part_stats, log_ratio = minibatch_loss(policy, value_model, ro[idx], advantages[idx],
                                                             returns[idx], n_tokens, cfg)
                loss.backward()
                mb_stats += part_stats.cpu()
                if not stats:
                    ratio_off = torch.maximum(ratio_off, log_ratio.expm1().abs().max().cpu())
            # sums gradients over ranks, clips them and takes the optimizer's step.  Each model is clipped by
            # itself, because the value model's gradient is larger and would shrink the policy's
            norms.append(run.step_optimizer(policy, value_model))
            stats.append(mb_stats)
    means = all_reduce(torch.stack(stats)).mean(0).tolist()
    pg_norm, v_norm = torch.tensor(norms).mean(0).tolist()
    ratio_first = 1 + all_reduce(ratio_off, "max").item()
    return dict(zip(STATS, means)) | {"ratio_first": ratio_first, "pg_norm": pg_norm, "v_norm": v_norm}


def minibatch_loss(policy, value_model, ro, advantages, returns, n_tokens, cfg):
    """Policy and value loss of the rollouts ro, each a sum divided by n_tokens.  advantages, returns: their
    rows.  Returns (loss, STATS (7,), log-ratios (M,))."""
    advantages, returns = (x[:, :ro.mask.shape[1]] for x in (advantages, returns))
    logp, entropy = policy.log_probs_and_entropy(ro.packed, ro.h_policy, cfg.temperature, cfg.ent_coef > 0)
    values = value_model.values(ro.packed, ro.h_value)
    pg_loss, pg_clipfrac = policy_loss(logp, ro.logp, advantages, ro.mask, cfg.clip_ratio, n_tokens)
    v_loss, v_clipfrac = value_loss(values, ro.values, returns, ro.mask, cfg.clip_value, n_tokens)
    entropy, log_ratio = entropy.sum() / n_tokens, (logp - ro.logp).detach()
    update_kl = kl_estimate(ro.logp, logp.detach(), "k3")       # KL(old || new)
    stats = torch.stack((pg_loss, v_loss, pg_clipfrac, v_clipfrac, entropy,
                         masked_mean(log_ratio.exp(), ro.mask, n_tokens),
                         masked_mean(update_kl, ro.mask, n_tokens)))
    return pg_loss + cfg.vf_coef * v_loss - cfg.ent_coef * entropy, stats.detach(), log_ratio[ro.mask]


# -------------------------------------------------------------------------------------------- the four models

def build_reward_model(cfg, bundle, device):
    """--reward -> (the reward model, hash of its weights), or (None, "gold") for the gold reward."""
    if cfg.reward == "gold":
        if not bundle.task.synthetic:
            raise UserError("--reward gold: only synthetic tasks have a gold reward")
        return None, "gold"
    reward_model, weights_hash = load_reward_model(cfg, bundle, device)
    M.share_trunk(bundle.model, reward_model)   # frozen parts that are equal lie in memory once
    return reward_model.requires_grad_(False), weights_hash


def make_value_model(policy, reward_model):
    """A second network, because value updates must not move the reward.  It starts from the reward model, or
    without one, or with a published one, from the policy, and as large a part of it is frozen as of that."""
    if reward_model is None or reward_model.reread:
        return policy.with_scalar_head()
    frozen = policy.config.frozen * reward_model.config.n_layer // policy.config.n_layer
    value_model = copy.deepcopy(reward_model).freeze(frozen)
    M.share_trunk(policy, value_model)
    return value_model


def make_policies(cfg, policy):
    """(policy, reference policy), the layers frozen as --freeze says.  Raises UserError if all are."""
    if cfg.freeze >= 0:
        policy.freeze(round(cfg.freeze * policy.config.n_layer))
    if policy.config.frozen == policy.config.n_layer:
        raise UserError("all layers of the policy are frozen: there is nothing to train; give a lower "
                        "--freeze")
    ref_policy = copy.deepcopy(policy).requires_grad_(False)
    M.share_trunk(policy, ref_policy)
    policy.recompute = cfg.recompute
    return policy, ref_policy


def build(cfg, device):
    """((policy, ref_policy, value_model, reward_model), the policy's Bundle, the reward model's hash)."""
    bundle = load_bundle(cfg, device)
    policy, ref_policy = make_policies(cfg, bundle.model)
    reward_model, reward_hash = build_reward_model(cfg, bundle, device)
    value_model = make_value_model(policy, reward_model)
    value_model.recompute = cfg.recompute
    models = policy, ref_policy, value_model, reward_model
    if cfg.shard:
        shard(*[model for model in models if model])
    return models, bundle, reward_hash


def read_prompts(bundle, n):
    """At most n rows to sample responses to, and their prompts' ids."""
    task = bundle.task
    split = "unlabeled" if "unlabeled" in task.splits() else "train"    # AlpacaFarm has prompts for PPO alone
    rows = task.rows(split, min(n, 100_000), references=1)      # all of them are tokenised at the start
    return rows, encode_prompts(bundle.tokenizer, [r["prompt"] for r in rows],
                                task.max_prompt_len(bundle.model.config.context))


# --------------------------------------------------------------------------------------------------- training

def gold_rewards(bundle, rows, responses):
    """(B,) gold rewards of this rank's responses to rows, or None where the task has none."""
    if not bundle.task.synthetic:
        return None
    return torch.tensor([bundle.task.synthetic.gold_reward(row["prompt"], *decode(bundle.tokenizer, ids))
                         for row, ids in zip(rows, responses)], device=bundle.model.device)


def probe(policy, prompts, max_new_tokens, eos, cfg):
    """Diversity per input, seen while the policy collapses: different n-grams / all n-grams of 8 responses to
    one prompt, mean over n = 1..5 and 8 prompts.  Its own random numbers, so looking changes nothing."""
    sampled = gather_rows(generate(
        policy, prompts[:8], max_new_tokens, n=8, temperature=cfg.temperature, eos=eos,
        rng=torch.Generator().manual_seed(cfg.seed), ranks=(rank(), world_size())))
    grams = [[tuple(ids[i:i + n]) for ids in responses for i in range(len(ids) - n + 1)]
             for responses in sampled for n in range(1, 6)]
    shares = [len(set(some)) / len(some) for some in grams if some]
    return sum(shares) / len(shares)


def rollout_metrics(ro, score, gold):
    """Means over the responses of all ranks."""
    k1, k3 = (mean_over_ranks(kl_estimate(ro.logp, ro.ref_logp, kind).where(ro.mask, 0.).sum(1))
              for kind in ("k1", "k3"))
    gold = {} if gold is None else {"gold_reward": mean_over_ranks(gold)}
    gap = mean_over_ranks((ro.logp - ro.sampled_logp)[ro.mask])
    if abs(gap) > 0.01:
        tqdm.write(f"sampled tokens are {-gap:.3f} nats likelier to the sampler than to the scorer: --dtype "
                   "fp32 removes what bf16 rounds")
    return {"reward": mean_over_ranks(score), **gold, "kl": k1, "kl_k3": k3, "sampler_gap": gap,
            "eos_rate": mean_over_ranks(ro.finished), "length": mean_over_ranks(ro.mask.sum(1))}


def stop_if_broken(step, metrics, cfg, state, max_new_tokens):
    """Raises UserError when the policy has run away from its reference, or when responses no longer end."""
    if 0 < cfg.kl_stop < metrics["kl"]:
        raise UserError(f"step {step + 1}: the policy has run away, {metrics['kl']:.0f} nats a response from "
                        "its reference (--kl-stop); raise --kl-coef or lower --lr. No checkpoint was written")
    ends = metrics["eos_rate"] >= 0.02 or cfg.no_eos_score is None
    state["endless_steps"] = 0 if ends else state.get("endless_steps", 0) + 1
    if state["endless_steps"] == 20:
        raise UserError(f"step {step + 1}: for 20 steps hardly a response has ended within {max_new_tokens} "
                        "tokens: the reward model likes length, or --model never learned to stop.  Where no "
                        "text ends: --no-eos-score none")


def main(cfg):
    device, rng = setup(cfg)
    check_batch(cfg, cfg.minibatches)
    if cfg.kl_target and not (cfg.kl_coef and cfg.batch_size <= cfg.kl_horizon):
        raise UserError("--kl-target multiplies beta: --kl-coef must be above 0, and --kl-horizon at least "
                        "a batch")
    models, bundle, reward_hash = build(cfg, device)
    (policy, _, value_model, reward_model), task, eos = models, bundle.task, ends_of(bundle.tokenizer)
    rows, prompts = read_prompts(bundle, cfg.steps * cfg.batch_size)
    trained = param_groups(policy.trainable() + value_model.trainable())
    optimizer = torch.optim.Adam(trained, lr=cfg.lr, fused=True)
    run = Run("ppo", cfg, optimizer, rng, inputs=[bundle.saved["weights_hash"], reward_hash, prompts],
              policy=policy, value=value_model)

    for step in run.steps(cfg.steps):       # also saves the state that a killed run goes on from
        run.set_lr(cfg.lr * (1 - step / cfg.steps))
        start, batch = time.monotonic(), run.next_rows(len(prompts), cfg.batch_size)
        beta = run.state.get("beta", cfg.kl_coef)
        # 1. sample; everything that the update compares with is fixed here
        ro = rollout(*models, [prompts[i] for i in batch], task.max_new_tokens, eos, cfg.temperature, rng)
        gold = gold_rewards(bundle, [rows[i] for i in my_rows(batch)], ro.responses)
        # a response that did not end gets a fixed score; the gold reward has its own penalty
        score = gold if reward_model is None else end_score(ro.score, ro.finished, cfg.no_eos_score)
        # 2. the score at the last token, a KL penalty at every token
        kl = kl_estimate(ro.logp, ro.ref_logp, cfg.kl_in_reward)
        rewards = token_rewards(score, kl, ro.mask, beta)
        # 3. advantages
        advantages, returns = gae(rewards, ro.values, ro.mask, cfg.gamma, cfg.lam)
        # 4. several epochs of clipped updates
        stats = update(policy, value_model, ro, whiten(advantages, ro.mask), returns, cfg, run)

        metrics, seconds = rollout_metrics(ro, score, gold), time.monotonic() - start
        metrics["explained_variance"] = explained_variance(ro.values, returns, ro.mask)
        if cfg.probe_every and (step % cfg.probe_every == 0 or step + 1 == cfg.steps):
            run.state["diversity"] = probe(policy, prompts, task.max_new_tokens, eos, cfg)
        metrics |= {"diversity": run.state["diversity"]} if cfg.probe_every else {}
        run.log(**metrics, beta=beta, **stats,
                tokens_per_second=metrics["length"] * cfg.batch_size / seconds)
        run.state |= {"metrics": metrics, "beta": adapted_beta(beta, metrics["kl"], cfg)}
        stop_if_broken(step, metrics, cfg, run.state, task.max_new_tokens)

    metrics = run.state["metrics"]
    run.save(policy, bundle.saved["tokenizer"], task, metrics, trained_against=reward_hash)
    print(f"wrote {run.path}: " + ", ".join(f"{k} {v:.3f}" for k, v in list(metrics.items())[:3]), flush=True)
    print(f"next: python bon.py --model {run.path}", flush=True)


if __name__ == "__main__":
    launch(main, Config, __doc__, PRESETS)
