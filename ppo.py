"""Proximal policy optimisation with a KL penalty: raise the reward, stay near the SFT policy.

    python ppo.py --model ckpt_sft.pt                    # against ckpt_reward.pt
    python ppo.py --model ckpt_sft.pt --reward gold      # against the synthetic task's gold reward: a ceiling
    python ppo.py --model ckpt_sft.pt --kl-coef 0        # no penalty: KL grows; trained on, the gold reward
                                                         # rises and then falls

Writes ckpt_ppo.pt and metrics_ppo.jsonl.  What to look at: `kl` should settle, not run away; `ratio_first` is
1; `reward` and, where it is known, `gold_reward` rise together until the policy over-optimises; `eos_rate`
stays near 1 and `length` near the references'.

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

import model as M
from common import pretrained
from common.checkpoint import load_checkpoint
from common.dist import (all_gather, all_reduce, gather_rows, mean_over_ranks, my_rows, param_groups, rank,
                         shard, world_size)
from common.errors import check
from common.flags import (Common, Count, Finite, Fraction, Frozen, Natural, NonNegative, Positive,
                          Temperature, launch, setup, use_threads)
from common.loop import Run
from common.ngrams import count_ngrams
from common.tokenizer import load_tokenizer, same_ids
from splits import decode, encode_prompts, task_of

_SMALL = dict(freeze=0.8, lr=2e-5, steps=200, minibatches=4, kl_coef=0.05, dtype="bf16")
_PAPER = dict(freeze=0.8, epochs=4, minibatches=1)
PRESETS = {"paper": dict(lr=1.5e-5, batch_size=256, steps=750, kl_coef=0.05, **_PAPER),    # its tables 2-4
           # the command of their README; their code's default for beta is 0.05
           "authors": dict(lr=1.5e-6, batch_size=16, steps=500, kl_coef=5.0, kl_in_reward="k2", vf_coef=0.2,
                           **_PAPER),
           **dict.fromkeys(("small-gpt2", "small-opt", "small-llama"), _SMALL)}


@dataclass
class Config(Common):
    model: str = "ckpt_sft.pt"  # policy to start from; also the reference policy, from which KL is measured
    reward: str = "ckpt_reward.pt"  # reward model, or gold: the synthetic task's gold reward
    steps: Count = 45           # rollout batches
    batch_size: Count = 64      # rollouts a step, one a prompt; prompts come again if there are fewer than
                                # steps x batch_size
    epochs: Count = 2           # passes over a rollout batch; the paper's 4
    minibatches: Count = 2      # optimizer steps a pass
    micro_batch_size: Natural = 0   # rollouts forwarded at once (on each GPU) while learning; 0: a minibatch
    recompute: bool = False     # compute activations again in the backward pass: less memory, a third more
                                # time
    shard: bool = False         # torchrun: each rank keeps a shard of each trained layer; for large models
    freeze: Frozen = 0.5        # fraction of the layers frozen with the embeddings; -1: as in the checkpoint.
                                # The paper's 0.8
    lr: Positive = 1e-3         # peak learning rate, linear to zero; the paper's 1.5e-5 is for billions of
                                # parameters
    kl_coef: NonNegative = 0.1  # beta: one nat of KL costs this much reward (in standard deviations of the
                                # reward model's scores); the paper's 0.05
    kl_in_reward: Literal["k1", "k2"] = "k1"    # estimator of that KL; k2, which the authors' code has, leads
                                    # to another optimum (see kl_estimate)
    kl_target: NonNegative = 0.0    # nats a response; above 0 beta adapts towards it
    kl_horizon: Count = 2000    # responses over which beta adapts, at least a batch: more is slower; a short
                                # run needs fewer
    temperature: Temperature = 1.0  # of rollouts; log-probabilities are taken at the same one.  A greedy
                                    # policy, 0, has no gradient
    gamma: Fraction = 1.0       # discount
    lam: Fraction = 0.95        # GAE's lambda
    clip_ratio: Positive = 0.2  # policy ratio kept in 1 -+ this
    clip_value: Positive = 0.2  # value kept within this of its old prediction
    vf_coef: NonNegative = 0.1  # weight of the value loss
    ent_coef: NonNegative = 0.0     # weight of the entropy bonus, per nat a token
    max_grad_norm: Positive = 1.0   # gradients are scaled down to this norm, policy's and value model's each
    kl_stop: NonNegative = 200.0    # nats a response; beyond it the policy has run away and the run stops; 0:
                                    # never
    no_eos_score: Finite = -3.0     # reward of a response that did not end, in standard deviations
    probe_every: Natural = 5    # steps between looks at the diversity of 8 responses to each of 8 prompts; 0:
                                # never
    quiet: bool = False         # no progress bar and no log lines


# -------------------------------------------------------------------------------------------- the mathematics
# All on grids (B, T) of response tokens with mask (B, T), True on the response, EOS included.  What lies
# behind a response's end is never read: it is selected away, not multiplied by 0, which would keep a NaN.

def kl_estimate(logp, ref_logp, kind="k1"):
    """Per-token estimates of KL(policy || reference) from samples of the policy.  logp, ref_logp: (B, T).
    Returns (B, T), nats.

    With x = logp - ref_logp: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x (Schulman 2020).  k1 and k3 are
    unbiased; k1 of a sample can be negative, k3 never is.  Raises ValueError on another kind.

    All three are for looking at; into the reward belongs k1, because an unbiased value need not give an
    unbiased gradient.  The policy gradient treats the penalty as a constant, and then only k1's gradient is
    that of beta KL(policy || reference).  k3's is the gradient of KL(policy || reference) less that of
    KL(reference || policy): the two cancel near the reference, and the policy ends far from the optimum of
    E[r] - beta KL (tests/test_optimum.py measures how far)."""
    x = logp - ref_logp
    if kind == "k1":
        return x
    if kind == "k2":
        return x.square() / 2
    if kind == "k3":
        return torch.expm1(-x) + x
    raise ValueError(f"kl_estimate: kind {kind!r}; choose from k1, k2, k3")


def token_rewards(score, kl, mask, kl_coef):
    """R_t = -beta kl_t + [t = last] r(x, y).  score: (B,); kl, mask: (B, T).  Returns (B, T)."""
    rewards = torch.where(mask, -kl_coef * kl, 0.)
    last = mask.sum(1) - 1              # EOS, if the response ended: the position that the reward model reads
    rewards[torch.arange(len(score), device=score.device), last] += score
    return rewards


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2016, equation 16).  rewards, values, mask: (B, T).

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
    """x (B, T) with mean 0 and variance 1 over the masked tokens of all ranks, 0 elsewhere.  Unbiased
    variance."""
    inside = all_gather(x[mask])
    mean, variance = inside.mean(), inside.var() if len(inside) > 1 else x.new_ones(())
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), 0.)


def policy_loss(logp, old_logp, advantages, mask, clip=0.2, n_tokens=None):
    """Clipped surrogate, -E min(rho A, clip(rho, 1 -+ eps) A), over response tokens (Schulman et al. 2017,
    equation 7).

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


class AdaptiveKL:
    """Proportional controller of beta (Ziegler et al. 2019, section 2.2): beta grows while KL is above the
    target. With target 0 beta stays as it is."""

    def __init__(self, init, target, horizon):
        self.value, self.target, self.horizon = init, target, horizon

    def update(self, kl, n):
        """kl: mean KL of n responses, nats.  Returns the new beta."""
        if self.target:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * n / self.horizon
        return self.value


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) over response tokens of all ranks: 1 perfect, 0 no better than
    the mean, below 0 worse.  It is 0 where returns vary by rounding only: there is nothing to explain."""
    y, error = all_gather(returns[mask]), all_gather((returns - values)[mask])
    varies = len(y) > 1 and y.var() > 1e-10 * y.square().mean()
    return float(1 - error.var() / y.var()) if varies else 0.


# ---------------------------------------------------------------------------------------------- one iteration

@dataclass
class Rollout:
    """This rank's responses, and everything that stays fixed while the policy learns from them.  Grids are
    (B, T)."""
    prompts: list               # B id lists
    responses: list             # B id lists
    h_policy: torch.Tensor      # the policy's trunk output, computed once
    h_value: torch.Tensor       # the value model's
    mask: torch.Tensor
    logp: torch.Tensor
    ref_logp: torch.Tensor
    values: torch.Tensor
    score: torch.Tensor         # (B,) of the reward model; zeros without one
    finished: torch.Tensor      # (B,) bool, ended with EOS

    def pack(self, idx):
        """The rollouts idx (a list) as Packed: each prompt with its one response."""
        return M.pack([self.prompts[i] for i in idx], [[self.responses[i]] for i in idx], self.mask.device)


@torch.no_grad()
def rollout(policy, ref_policy, value_model, reward_model, prompts, max_new_tokens, eos, temperature, rng):
    """Samples one response to each of this rank's prompts and scores it.  prompts: those of all ranks;
    reward_model: GPT or None."""
    sampled = M.generate(policy, prompts, max_new_tokens, temperature=temperature, eos=eos, rng=rng,
                       ranks=(rank(), world_size()))
    prompts, responses = my_rows(prompts), [response for response, in sampled]
    packed = M.pack(prompts, sampled, policy.embed.weight.device)
    h = policy.trunk(packed)

    def trunk(other):           # a shared trunk runs once
        return h if other.embed is policy.embed else other.trunk(packed)
    h_value = trunk(value_model)
    # log-probabilities come from a forward pass, not from the sampler, so that the first update's ratio is 1
    logp = M.log_probs(policy, policy.top(h, packed), packed, temperature)
    ref_logp = M.log_probs(ref_policy, ref_policy.top(trunk(ref_policy), packed), packed, temperature)
    v = M.values(value_model, value_model.top(h_value, packed), packed)
    score = torch.zeros(len(responses), device=h.device)
    if reward_model:
        score = M.rewards(reward_model, reward_model.top(trunk(reward_model), packed), packed)
    finished = torch.tensor([r[-1] == eos for r in responses], device=h.device)
    check(all(x.isfinite().all() for x in (logp, ref_logp, v, score)), "rollout: a log-probability, a value "
          "or a reward is not finite: one of the four models is damaged")
    return Rollout(prompts, responses, h, h_value, packed.response_mask(), packed.to_padded(logp),
                   packed.to_padded(ref_logp), packed.to_padded(v), score, finished)


STATS = ("pg_loss", "v_loss", "pg_clipfrac", "v_clipfrac", "entropy", "ratio", "update_kl")


def update(policy, value_model, ro, advantages, returns, cfg, rng, run):
    """Several passes of clipped updates over one rollout.  Returns the means over minibatches of STATS, the
    gradient norms, and ratio_first: 1 + the largest |ratio - 1| of the first minibatch, when nothing is
    learned yet."""
    stats, norms, ratio_off = [], [], torch.zeros(())
    lengths = torch.tensor(gather_rows([len(r) for r in ro.responses]))     # of all ranks' rollouts
    for _ in range(cfg.epochs):
        # a partition: minibatches do not overlap
        for mb_idx in torch.randperm(len(lengths), generator=rng).tensor_split(cfg.minibatches):
            n_tokens, mb_stats = int(lengths[mb_idx].sum()), torch.zeros(len(STATS))
            for idx, weight in run.held_micro_batches(mb_idx.tolist()):
                loss, part_stats, change = minibatch_loss(policy, value_model, ro, advantages, returns, idx,
                                                          n_tokens, cfg)
                (weight * loss).backward()
                mb_stats += weight * part_stats.cpu()
                if not stats:
                    ratio_off = torch.maximum(ratio_off, change.expm1().abs().max().cpu())
            # the gradients are scaled down apart: the value model's is larger and would shrink the policy's
            norms.append(run.step_optimizer(policy.trainable(), value_model.trainable(),
                                            rows=[run.batch[i] for i in mb_idx]))
            stats.append(mb_stats)
    means = all_reduce(torch.stack(stats)).mean(0).tolist()
    pg_norm, v_norm = torch.tensor(norms).mean(0).tolist()
    ratio_first = 1 + all_reduce(ratio_off, "max").item()
    return dict(zip(STATS, means)) | {"ratio_first": ratio_first, "pg_norm": pg_norm, "v_norm": v_norm}


def minibatch_loss(policy, value_model, ro, advantages, returns, idx, n_tokens, cfg):
    """Policy and value loss of the rollouts idx, sums over n_tokens.  Returns (loss, STATS (7,), log-ratios
    (M,))."""
    mb = ro.pack(idx)
    S, T = mb.tokens.shape[1], int(mb.lengths.max())
    hidden = policy.top(ro.h_policy[idx, :S], mb)
    logp, entropy = M.log_probs(policy, hidden, mb, cfg.temperature, entropy=True,
                                learn_entropy=cfg.ent_coef > 0)
    entropy = entropy.sum() / n_tokens
    v = M.values(value_model, value_model.top(ro.h_value[idx, :S], mb), mb)
    logp, v, mask = mb.to_padded(logp), mb.to_padded(v), mb.response_mask()
    old_logp, old_v = ro.logp[idx, :T], ro.values[idx, :T]
    pg_loss, pg_clipfrac = policy_loss(logp, old_logp, advantages[idx, :T], mask, cfg.clip_ratio, n_tokens)
    v_loss, v_clipfrac = value_loss(v, old_v, returns[idx, :T], mask, cfg.clip_value, n_tokens)
    change = (logp - old_logp).detach()
    # KL(old || new): the samples are the old policy's, so x is its log-probability less the new one's
    update_kl = kl_estimate(-change, torch.zeros_like(change), "k3")
    stats = torch.stack((pg_loss, v_loss, pg_clipfrac, v_clipfrac, entropy,
                         masked_mean(change.exp(), mask, n_tokens), masked_mean(update_kl, mask, n_tokens)))
    return pg_loss + cfg.vf_coef * v_loss - cfg.ent_coef * entropy, stats.detach(), change[mask]


# -------------------------------------------------------------------------------------------- the four models

def load_reward_model(name, policy_name, spec, policy, device, dtype):
    """--reward -> (reward model, or None for the gold reward; hash of its weights, or "gold")."""
    if name == "gold":
        return None, "gold"
    reward_model, saved = load_checkpoint(name, "reward", "--reward", device, dtype)
    check(same_ids(saved["tokenizer"], spec), f"--reward {name} and --model {policy_name} have different "
          "tokenizers: the same ids would mean different words; train the reward model from this policy's "
          "family (python reward.py --model ...)")
    check(reward_model.config.context >= policy.config.context, f"--reward {name}: its context of "
          f"{reward_model.config.context} is shorter than the policy's {policy.config.context}")
    M.share_trunk(policy, reward_model)     # frozen parts that are equal lie in memory once
    return reward_model.requires_grad_(False), saved["weights_hash"]


def make_value_model(policy, reward_model):
    """A second network, because value updates must not move the reward.  It starts from the reward model, or
    without one from the policy, and as large a part of it is frozen as of the policy."""
    if reward_model is None:
        return policy.with_scalar_head()
    frozen = policy.config.frozen * reward_model.config.n_layer // policy.config.n_layer
    value_model = copy.deepcopy(reward_model).freeze(frozen)
    M.share_trunk(policy, value_model)
    return value_model


def build(cfg, device):
    """((policy, ref_policy, value_model, reward_model), tokenizer, its specification, task, (hash of the
    policy's weights, of the reward model's))."""
    policy, saved = pretrained.load(cfg.model, "--model", device, cfg.dtype)
    use_threads(cfg, policy)
    task, spec = task_of(cfg, saved), saved["tokenizer"]
    check(cfg.reward != "gold" or task.synthetic, "--reward gold: only synthetic tasks have a gold reward")
    if cfg.freeze >= 0:
        policy.freeze(round(cfg.freeze * policy.config.n_layer))
    check_trainable(policy)
    ref_policy = copy.deepcopy(policy).requires_grad_(False)
    M.share_trunk(policy, ref_policy)
    reward_model, reward_hash = load_reward_model(cfg.reward, cfg.model, spec, policy, device, cfg.dtype)
    value_model = make_value_model(policy, reward_model)
    policy.recompute = value_model.recompute = cfg.recompute
    models = policy, ref_policy, value_model, reward_model
    if cfg.shard:
        shard(*[model for model in models if model])
    return models, load_tokenizer(spec), spec, task, (saved["weights_hash"], reward_hash)


def check_trainable(policy):
    """Raises UserError if all layers are frozen: its last norm would learn, and nothing else."""
    check(policy.config.frozen < policy.config.n_layer, "all layers of the policy are frozen: there is "
          "nothing to train; give a lower --freeze")


def check_batch(batch_size, minibatches, what):
    """Raises UserError if a batch of so many of `what` cannot be cut into minibatches and among ranks."""
    check(minibatches <= batch_size, f"--minibatches {minibatches}: a batch of {batch_size} {what} "
          "(--batch-size) cannot be cut into so many")
    check(world_size() <= batch_size, f"--batch-size {batch_size}: fewer {what} than the {world_size()} "
          "processes that share them")


MAX_PROMPTS = 100_000       # all of them are tokenised at the start


def read_prompts(task, tokenizer, n, context):
    """Rows to sample responses to, at most n and MAX_PROMPTS, and their prompts' ids."""
    # AlpacaFarm has prompts for PPO alone
    split = "unlabeled" if "unlabeled" in task.splits() else "train"
    rows = task.rows(split, min(n, MAX_PROMPTS), references=1)
    return rows, encode_prompts(tokenizer, [r["prompt"] for r in rows], task.max_prompt_len(context))


# --------------------------------------------------------------------------------------------------- training

def gold_rewards(task, tokenizer, rows, responses, device):
    """(B,) gold rewards of this rank's responses to rows, or None where the task has none."""
    if not task.synthetic:
        return None
    return torch.tensor([task.synthetic.gold_reward(row["prompt"], *decode(tokenizer, ids))
                         for row, ids in zip(rows, responses)], device=device)


PROBES = 8      # prompts, and responses to each of them


def probe(policy, prompts, max_new_tokens, eos, cfg):
    """Diversity per input, seen while the policy collapses: distinct-n of the responses to one prompt, mean
    over n = 1..5 and over the same few prompts.  Random numbers of its own, so that looking changes nothing.
    """
    sampled = gather_rows(M.generate(
        policy, prompts[:PROBES], max_new_tokens, n=PROBES, temperature=cfg.temperature, eos=eos,
        rng=torch.Generator().manual_seed(cfg.seed), ranks=(rank(), world_size())))
    unique, total = (counts[:, :-1] for counts in count_ngrams(sampled))    # the last one is of all prompts
    return float((unique[total > 0] / total[total > 0]).mean())


def rollout_metrics(ro, score, gold, returns):
    """Means over the responses of all ranks."""
    k1, k3 = (mean_over_ranks(kl_estimate(ro.logp, ro.ref_logp, kind).where(ro.mask, 0.).sum(1))
              for kind in ("k1", "k3"))
    gold = {} if gold is None else {"gold_reward": mean_over_ranks(gold)}
    return {"reward": mean_over_ranks(score), **gold, "kl": k1, "kl_k3": k3,
            "explained_variance": explained_variance(ro.values, returns, ro.mask),
            "eos_rate": mean_over_ranks(ro.finished), "length": mean_over_ranks(ro.mask.sum(1))}


def stop_if_broken(step, kl, kl_stop, eos_rate, state, max_new_tokens):
    """Raises UserError when the policy has run away from its reference, or when responses no longer end."""
    check(not 0 < kl_stop < kl, f"step {step + 1}: the policy has run away, {kl:.0f} nats a response from "
          f"its reference (--kl-stop {kl_stop:g}); raise --kl-coef or lower --lr. No checkpoint was written")
    state["endless_steps"] = state.get("endless_steps", 0) + 1 if eos_rate < 0.02 else 0
    check(state["endless_steps"] < 20, f"step {step + 1}: for 20 steps hardly a response has ended within "
          f"{max_new_tokens} tokens: the reward model likes length, or --model never learned to stop. No "
          "checkpoint was written")


def main(cfg):
    device, rng = setup(cfg)
    check_batch(cfg.batch_size, cfg.minibatches, "rollouts")
    check(not cfg.kl_target or cfg.batch_size <= cfg.kl_horizon, f"--kl-horizon {cfg.kl_horizon}: it must be "
          f"at least the {cfg.batch_size} rollouts of a step (--batch-size)")
    check(not cfg.kl_target or cfg.kl_coef, "--kl-target: it multiplies beta, so --kl-coef must be above 0")
    models, tokenizer, spec, task, hashes = build(cfg, device)
    policy, ref_policy, value_model, reward_model = models
    rows, prompts = read_prompts(task, tokenizer, cfg.steps * cfg.batch_size, policy.config.context)
    optimizer = torch.optim.Adam(param_groups(policy.trainable() + value_model.trainable()), lr=cfg.lr,
                                 fused=True)
    run = Run("ppo", cfg, optimizer, rng, inputs=[*hashes, prompts], policy=policy, value=value_model)
    beta = AdaptiveKL(run.state.get("beta", cfg.kl_coef), cfg.kl_target, cfg.kl_horizon)

    for step in run.steps(cfg.steps):
        run.set_lr(cfg.lr * (1 - step / cfg.steps))
        start, batch = time.monotonic(), run.next_rows(len(prompts), cfg.batch_size)
        # 1. sample; everything that the update compares with is fixed here
        ro = rollout(*models, [prompts[i] for i in batch], task.max_new_tokens, tokenizer.eot_token,
                     cfg.temperature, rng)
        gold = gold_rewards(task, tokenizer, [rows[i] for i in my_rows(batch)], ro.responses, device)
        # a response that did not end gets a fixed score; the gold reward has its own penalty
        score = gold if reward_model is None else torch.where(ro.finished, ro.score, cfg.no_eos_score)
        # 2. the score at the last token, a KL penalty at every token
        rewards = token_rewards(score, kl_estimate(ro.logp, ro.ref_logp, cfg.kl_in_reward), ro.mask,
                                beta.value)
        # 3. advantages
        advantages, returns = gae(rewards, ro.values, ro.mask, cfg.gamma, cfg.lam)
        # 4. several epochs of clipped updates
        stats = update(policy, value_model, ro, whiten(advantages, ro.mask), returns, cfg, rng, run)

        metrics, seconds = rollout_metrics(ro, score, gold, returns), time.monotonic() - start
        if cfg.probe_every and (step % cfg.probe_every == 0 or step + 1 == cfg.steps):
            run.state["diversity"] = probe(policy, prompts, task.max_new_tokens, tokenizer.eot_token, cfg)
        metrics |= {"diversity": run.state["diversity"]} if cfg.probe_every else {}
        run.log(**metrics, beta=beta.value, **stats,
                tokens_per_second=metrics["length"] * cfg.batch_size / seconds)
        beta.update(metrics["kl"], cfg.batch_size)      # of the next step
        run.state |= {"beta": beta.value, "metrics": metrics}
        stop_if_broken(step, metrics["kl"], cfg.kl_stop, metrics["eos_rate"], run.state, task.max_new_tokens)

    metrics = run.state["metrics"]
    run.save(policy, spec, task, metrics, trained_against=hashes[1])
    print(f"wrote {run.path}: " + ", ".join(f"{k} {v:.3f}" for k, v in list(metrics.items())[:3]), flush=True)


if __name__ == "__main__":
    launch(main, Config, __doc__, PRESETS)
