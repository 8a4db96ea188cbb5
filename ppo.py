"""Proximal policy optimisation with a KL penalty: raise the reward, stay near the SFT policy.

    python ppo.py --model ckpt_sft.pt                        # against ckpt_reward.pt
    python ppo.py --model ckpt_sft.pt --reward truth         # against the embedded task's judge: a ceiling
    python ppo.py --model ckpt_sft.pt --kl-coef 0            # no penalty: reward rises, truth falls

Writes ckpt_ppo.pt and metrics_ppo.jsonl.  What to look at: `kl` should settle, not run away; `ratio_first` is
1; `reward` and, where known, `truth` rise together until the policy over-optimises; `eos_rate` stays near 1
and `length` near the references'.

Deviations from the paper: a tiny model learns at a larger rate, with beta 0.1 and half its layers frozen; the
value network is a second network that starts from the reward model; advantages are whitened over response
tokens only (the authors' code includes padding), and minibatches do not overlap (theirs do); the score of a
response that did not end is the fixed `--no-eos-score`.
"""
import copy
import time
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

import model as M
from parallel import (add_gradients, by_kind, clip_gradients, everyone, gather, mine, passes, rank, shard,
                      size, total)
from pretrained import load_model
from runtime import (Common, Metrics, Resume, Steady, load_checkpoint, out_file, peak_memory, require, run,
                     save_checkpoint, setup)
from splits import decode, encode_prompts, task_of, tokenizer


_SMALL = dict(freeze=0.8, lr=2e-5, steps=200, minibatches=4, kl_coef=0.05, dtype="bf16")
PRESETS = {"paper": dict(freeze=0.8, lr=1.5e-6, epochs=4, minibatches=4, kl_coef=0.05, steps=1800),
           **dict.fromkeys(("small-gpt2", "small-opt", "small-llama"), _SMALL)}


@dataclass
class Config(Common):
    model: str = "ckpt_sft.pt"  # policy to start from; also the reference the KL is measured against
    reward: str = "ckpt_reward.pt"  # reward model, or truth: the embedded task's judge
    steps: int = 45             # rollout batches
    batch: int = 64             # rollouts a step, each of another prompt
    epochs: int = 2             # passes over a rollout batch; the paper's 4
    minibatches: int = 2        # optimiser steps a pass
    micro: int = 0              # rollouts forwarded at once (on each GPU) while learning; 0: a minibatch
    recompute: bool = False     # compute activations again in the backward pass: less memory, a third more
                                # time
    shard: bool = False         # torchrun: a rank keeps its share of each trained layer; for models that do
                                # not fit
    freeze: float = 0.5         # fraction of the layers frozen with the embeddings; below 0: as in the
                                # checkpoint.  The paper's 0.8
    lr: float = 1e-3            # peak learning rate, linear to zero; the paper's 1.5e-6 is for billions of
                                # parameters
    kl_coef: float = 0.1        # beta, the price of one nat of KL in units of reward (standard deviations);
                                # the paper's 0.05
    kl_kind: str = "k1"         # estimator in the reward: k1 (log-ratio), k2 (half its square) or k3 (low
                                # variance)
    kl_target: float = 0.0      # nats a response; above 0 beta adapts towards it
    kl_horizon: int = 2000      # responses over which beta adapts
    temperature: float = 1.0    # of rollouts; log-probabilities are taken at the same one
    gamma: float = 1.0          # discount
    lam: float = 0.95           # GAE's lambda
    clip_ratio: float = 0.2     # policy ratio kept in 1 -+ this
    clip_value: float = 0.2     # value kept within this of its old prediction
    vf_coef: float = 0.1        # weight of the value loss
    clip: float = 1.0           # gradient norm, policy and value network each
    kl_stop: float = 200.0      # nats a response; beyond it the policy has run away and the run stops; 0:
                                # never
    no_eos_score: float = -3.0  # reward of a response that did not end, in standard deviations
    quiet: bool = False         # no progress bar and no log lines


# -------------------------------------------------------------------------------------------- the mathematics
# All on grids (B, T) of response tokens with mask (B, T), True on the response, EOS included; what lies
# behind it is never read.

def kl_estimate(logp, ref_logp, kind="k1"):
    """Per-token estimates of KL(policy || reference) from samples of the policy.  logp, ref_logp: (B, T).
    Returns (B, T), nats.

    With x = logp - ref_logp: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x (Schulman 2020).  k1 and k3 are
    unbiased; k1 of a sample can be negative, k3 never is.  Raises ValueError on another kind."""
    x = logp - ref_logp
    if kind == "k1":
        return x
    if kind == "k2":
        return x.square() / 2
    if kind == "k3":
        return torch.expm1(-x) + x
    raise ValueError(f"kl_estimate: kind {kind!r}; choose from k1, k2, k3")


def token_rewards(score, kl, mask, kl_coef):
    """R_t = -beta kl_t + [t = last] R(x, y).  score: (B,); kl, mask: (B, T).  Returns (B, T).  (paper,
    section 4)"""
    rewards = -kl_coef * kl * mask
    last = mask.sum(1) - 1              # EOS, where it ended: the position the reward model read
    rewards[torch.arange(len(score), device=score.device), last] += score
    return rewards


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2016, equation 16).  rewards, values, mask: (B, T).

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1}, V and A zero behind the end.
    Returns (advantages, returns), each (B, T), zero outside the mask; returns = advantages + values."""
    mask = mask.to(values.dtype)
    rewards, values = rewards * mask, values * mask
    advantages, ahead, next_value = torch.zeros_like(values), 0., 0.
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        ahead = (delta + gamma * lam * ahead) * mask[:, t]
        advantages[:, t], next_value = ahead, values[:, t]
    return advantages, advantages + values


def masked_mean(x, mask, tokens=None):
    """Mean of x (B, T) where mask (B, T) is True; with `tokens` the sum over that many: the share of a part
    in the mean of a whole.  Selects, so that not even a NaN behind the end can leak in."""
    inside = x[mask.bool()]
    return inside.sum() / (tokens or len(inside))


def whiten(x, mask, shift_mean=True):
    """x (B, T) with mean 0 (or its own, shift_mean=False) and variance 1 over the masked tokens (of all
    ranks), 0 elsewhere.  Unbiased variance."""
    inside = everyone(x[mask.bool()])
    mean, variance = inside.mean(), inside.var() if len(inside) > 1 else x.new_ones(())
    return ((x - mean) * torch.rsqrt(variance + 1e-8) + (0 if shift_mean else mean)) * mask


def policy_loss(logp, old_logp, advantages, mask, clip=0.2, tokens=None):
    """Clipped surrogate, -E min(rho A, clip(rho, 1 -+ eps) A), over response tokens (Schulman et al. 2017,
    equation 7).

    All (B, T); tokens as in `masked_mean`.  Returns (loss, share of tokens where the clip binds)."""
    ratio = (logp - old_logp).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return (masked_mean(torch.maximum(plain, clipped), mask, tokens),
            masked_mean((clipped > plain).float(), mask, tokens))


def value_loss(values, old_values, returns, mask, clip=0.2, tokens=None):
    """Half the squared error, the worse of the plain and of the prediction held within `clip` of the old one.

    All (B, T); tokens as in `masked_mean`.  Returns (loss, share of tokens where the clip binds)."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    plain, clipped = (values - returns).square(), (near - returns).square()
    loss = 0.5 * masked_mean(torch.maximum(plain, clipped), mask, tokens)
    return loss, masked_mean((clipped > plain).float(), mask, tokens)


class AdaptiveKL:
    """Proportional controller of beta (Ziegler et al. 2019, section 2.2): beta grows while KL is above the
    target."""

    def __init__(self, init, target, horizon):
        self.value, self.target, self.horizon = init, target, horizon

    def update(self, kl, n):
        """kl: mean KL of n responses, nats."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n / self.horizon
        return self.value


# ---------------------------------------------------------------------------------------------- one iteration

@dataclass
class Rollout:
    """What one batch of responses needs to be learned from.  Grids are (B, T); each h is a trunk's output,
    computed once."""
    packed: M.Packed
    h_policy: torch.Tensor
    h_value: torch.Tensor
    mask: torch.Tensor
    logp: torch.Tensor
    ref_logp: torch.Tensor
    values: torch.Tensor
    score: torch.Tensor         # (B,) of the reward model; zeros without one
    finished: torch.Tensor      # (B,) bool, ended with EOS
    responses: list             # B id lists


@torch.no_grad()
def rollout(policy, reference, value, reward, prompts, max_new_tokens, eos, temperature, generator):
    """Samples one response to each of this rank's prompts and reads everything that stays fixed while it is
    learned from.  prompts: those of all ranks; reward: GPT or None."""
    sampled = M.generate(policy, prompts, max_new_tokens, temperature=temperature, eos=eos,
                         generator=generator, share=(rank(), size()))
    responses = [one for one, in sampled]
    packed = M.pack(mine(prompts), sampled, policy.embed.weight.device)
    h = policy.trunk(packed)
    # a shared trunk runs once
    trunk = lambda other: h if other.embed is policy.embed else other.trunk(packed)  # noqa: E731
    h_value = trunk(value)
    # log-probabilities come from a forward pass, not from the sampler: the first update's ratio is then 1
    logp = packed.grid(M.log_probs(policy, policy.top(h, packed), packed, temperature))
    ref_logp = packed.grid(M.log_probs(reference, reference.top(trunk(reference), packed), packed,
                                       temperature))
    values = packed.grid(M.values(value, value.top(h_value, packed), packed))
    score = torch.zeros(len(responses), device=h.device)
    if reward:
        score = M.rewards(reward, reward.top(trunk(reward), packed), packed)
    finished = torch.tensor([r[-1] == eos for r in responses], device=h.device)
    return Rollout(packed, h, h_value, packed.valid(), logp, ref_logp, values, score, finished, responses)


SEEN = ("pg_loss", "v_loss", "pg_clipped", "v_clipped", "entropy", "ratio", "update_kl")


def update(policy, value, optimiser, weights, ro, advantages, returns, cfg, generator, may_step):
    """Several passes of clipped updates over one rollout.  may_step: function of (gradient norm, rows),
    whether to take a step.  Returns the means of what was seen on the way, as a dict of floats."""
    seen, norms, first_off = [], [], torch.zeros((), device=ro.mask.device)
    # of all rollouts: number i is rank i % size's
    lengths = torch.tensor(gather(ro.packed.lengths.tolist()))
    for _ in range(cfg.epochs):
        # a partition: no overlap
        for mb_rows in torch.randperm(len(lengths), generator=generator).chunk(cfg.minibatches):
            own = (mb_rows[mb_rows % size() == rank()] // size()).to(ro.mask.device)
            mb_tokens, mb_seen = int(lengths[mb_rows].sum()), torch.zeros(len(SEEN), device=own.device)
            optimiser.zero_grad()
            most = int((mb_rows % size()).bincount().max())
            for rows, weight in passes(own, most, cfg.micro, own.new_zeros(1)):
                mb = ro.packed.select(rows)
                T = int(mb.lengths.max())
                grid = lambda x: x[rows, :T]  # noqa: E731, B023
                logp, entropy = M.log_probs(policy, policy.top(ro.h_policy[rows], mb), mb, cfg.temperature,
                                            entropy=True)
                logp, v = mb.grid(logp), mb.grid(M.values(value, value.top(ro.h_value[rows], mb), mb))
                mask = mb.valid()
                pg_loss, pg_clipped = policy_loss(logp, grid(ro.logp), grid(advantages), mask, cfg.clip_ratio,
                                                  mb_tokens)
                v_loss, v_clipped = value_loss(v, grid(ro.values), grid(returns), mask, cfg.clip_value,
                                               mb_tokens)
                (weight * (pg_loss + cfg.vf_coef * v_loss)).backward()
                change = (logp - grid(ro.logp)).detach()
                moved = kl_estimate(-change, torch.zeros_like(change), "k3")
                part = (pg_loss, v_loss, pg_clipped, v_clipped, entropy.sum() / mb_tokens,
                        masked_mean(change.exp(), mask, mb_tokens), masked_mean(moved, mask, mb_tokens))
                mb_seen += weight * torch.stack(part).detach()
                if not seen:    # the first minibatch, when nothing is learned yet
                    first_off = torch.maximum(first_off, (change.exp()[mask] - 1).abs().max())
            add_gradients([p for group in weights for p in group])
            # clipped apart: the value loss is the larger one, and would otherwise eat the policy's step
            pg_norm, v_norm = (clip_gradients(w, cfg.clip) for w in weights)
            if may_step((pg_norm + v_norm).item(), mb_rows.tolist()):
                optimiser.step()
            seen.append(mb_seen)
            norms.append(torch.stack((pg_norm, v_norm)))
    means = total(torch.stack(seen)).mean(0).tolist()
    pg_norm, v_norm = torch.stack(norms).mean(0).tolist()
    # 1 + the largest |ratio - 1| of the first minibatch's tokens
    return dict(zip(SEEN, means)) | {"ratio_first": 1 + total(first_off, "max").item(), "pg_norm": pg_norm,
                                     "v_norm": v_norm}


def explained_variance(values, returns, mask):
    """1 - Var(returns - values) / Var(returns) over response tokens (of all ranks): 1 perfect, 0 no better
    than the mean, below 0 worse."""
    y, e = everyone(returns[mask]), everyone((returns - values)[mask])
    return float(1 - e.var() / y.var()) if len(y) > 1 and y.var() > 0 else 0.


def load_reward(cfg, spec, policy, device):
    """--reward -> (reward model or None for the truth, a value network that starts from it, or from the
    policy, its name)."""
    if cfg.reward == "truth":
        return None, policy.with_scalar_head(), "truth"
    reward, saved = load_checkpoint(cfg.reward, "reward", "--reward", device, cfg.dtype)
    require(saved["tokenizer"] == spec,
            f"--reward {cfg.reward} and --model {cfg.model} have different tokenizers: the same ids would "
            "mean different words; train the reward model from this policy's family (python reward.py "
            "--model ...)")
    require(reward.config.context >= policy.config.context, f"--reward {cfg.reward}: its context of "
            f"{reward.config.context} is shorter than the policy's {policy.config.context}")
    # a second network: value updates must not move the reward
    value = copy.deepcopy(reward).freeze(policy.config.frozen)
    M.share_trunk(policy, reward, value)            # frozen parts that are equal lie in memory once
    return reward.requires_grad_(False), value, saved["digest"]


def main(cfg):
    device, generator = setup(cfg)
    require(min(cfg.steps, cfg.batch, cfg.epochs, cfg.minibatches) >= 1 and cfg.lr > 0,
            "--steps, --batch, --epochs and --minibatches must be at least 1, --lr above 0")
    require(cfg.minibatches <= cfg.batch and size() <= cfg.batch and cfg.micro >= 0,
            f"--minibatches {cfg.minibatches} and the {size()} processes must not exceed --batch "
            f"{cfg.batch}, "
            f"--micro {cfg.micro} must be at least 0")
    require(cfg.temperature > 0,
            f"--temperature {cfg.temperature}: rollouts need one above 0, a greedy policy has no gradient")
    require(cfg.kl_kind in ("k1", "k2", "k3"), f"--kl-kind {cfg.kl_kind}: choose from k1, k2, k3")
    require(cfg.kl_coef >= 0 and cfg.kl_target >= 0, "--kl-coef and --kl-target must be at least 0")
    policy, saved = load_model(cfg.model, "--model", device, cfg.dtype)
    task, enc, out = task_of(cfg, saved), tokenizer(saved["tokenizer"]), out_file(cfg.out, "ckpt_ppo.pt")
    require(cfg.reward != "truth" or task.world,
            "--reward truth: only embedded tasks have a judge that knows the truth")
    require(cfg.freeze <= 1, f"--freeze {cfg.freeze} must be at most 1")
    if cfg.freeze >= 0:
        policy.freeze(round(cfg.freeze * policy.config.n_layer))
    reference = copy.deepcopy(policy).requires_grad_(False)
    M.share_trunk(policy, reference)
    reward, value, reward_name = load_reward(cfg, saved["tokenizer"], policy, device)

    split = "unlabeled" if "unlabeled" in task.splits() else "train"
    rows = task.rows(split, min(cfg.steps * cfg.batch, 100_000), references=1)
    prompts = encode_prompts(enc, [r["prompt"] for r in rows], task.room(policy.config.context))
    policy.recompute = value.recompute = cfg.recompute
    if cfg.shard:
        shard(*[model for model in (policy, reference, value, reward) if model])
    weights = [[p for p in model.parameters() if p.requires_grad] for model in (policy, value)]
    require(all(weights), "all layers of the policy are frozen: nothing to train")
    optimiser = torch.optim.Adam(by_kind([p for group in weights for p in group]), lr=cfg.lr, fused=True)
    inputs = [saved["digest"], reward_name, prompts]
    resume = Resume(out, cfg, inputs, generator, optimiser, policy=policy, value=value)
    done, carried = resume.load()
    beta = AdaptiveKL(carried.get("beta", cfg.kl_coef), cfg.kl_target, cfg.kl_horizon)
    order = carried.get("order", [])    # of prompts; shuffled anew each time they run out
    metrics, endless = carried.get("metrics"), carried.get("endless", 0)
    log, steady = Metrics(out, cfg.quiet, done), Steady()

    for step in tqdm(range(done, cfg.steps), "ppo", initial=done, total=cfg.steps, disable=cfg.quiet or None):
        start = time.time()
        while len(order) < cfg.batch:
            order += torch.randperm(len(prompts), generator=generator).tolist()
        picks, order = order[:cfg.batch], order[cfg.batch:]
        ro = rollout(policy, reference, value, reward, [prompts[i] for i in picks], task.max_new_tokens,
                     enc.eot_token, cfg.temperature, generator)

        truth = None
        if task.world:
            truth = torch.tensor([task.world.judge(rows[i]["prompt"], *decode(enc, ids))
                                  for i, ids in zip(mine(picks), ro.responses)], device=device)
        # the judge prices an open end itself
        score = truth if reward is None else torch.where(ro.finished, ro.score, cfg.no_eos_score)
        kl = kl_estimate(ro.logp, ro.ref_logp, cfg.kl_kind)
        rewards = token_rewards(score, kl, ro.mask, beta.value)
        advantages, returns = gae(rewards, ro.values, ro.mask, cfg.gamma, cfg.lam)
        for group in optimiser.param_groups:
            group["lr"] = cfg.lr * (1 - step / cfg.steps)
        may_step = lambda norm, mb: steady(norm, step + 1, [rows[picks[i]]["id"] for i in mb])  # noqa
        seen = update(policy, value, optimiser, weights, ro, whiten(advantages, ro.mask), returns, cfg,
                      generator, may_step)

        mean = lambda x: everyone(x).float().mean().item()  # noqa: E731  of (B,), over all ranks
        k1, k3 = (mean((kl_estimate(ro.logp, ro.ref_logp, kind) * ro.mask).sum(1)) for kind in ("k1", "k3"))
        if cfg.kl_target:
            beta.update(k1, cfg.batch)
        metrics = {"reward": mean(score), **({} if truth is None else {"truth": mean(truth)}), "kl": k1}
        length, eos_rate = mean(ro.packed.lengths), mean(ro.finished)
        log.log(step=step + 1, **metrics, kl_k3=k3, beta=beta.value, **seen,
                explained_variance=explained_variance(ro.values, returns, ro.mask), eos_rate=eos_rate,
                length=length, lr=optimiser.param_groups[0]["lr"],
                tokens_per_second=length * cfg.batch / (time.time() - start),
                peak_mb=round(peak_memory(device)))
        require(not 0 < cfg.kl_stop < k1, f"step {step + 1}: the policy has run away, {k1:.0f} nats a "
                f"response from its reference (--kl-stop {cfg.kl_stop:g}); raise --kl-coef or lower --lr. No "
                "checkpoint was written")
        endless = endless + 1 if eos_rate < 0.02 else 0
        require(endless < 20, f"step {step + 1}: for 20 steps hardly a response has ended within "
                f"{task.max_new_tokens} tokens: the reward model likes length, or --model never learned to "
                "stop. No checkpoint was written")
        resume.step_done(step + 1, order=order, beta=beta.value, metrics=metrics, endless=endless)
    policy = M.whole(policy)
    save_checkpoint(out, policy, saved["tokenizer"], asdict(task),
                    asdict(cfg) | {"trained_against": reward_name}, metrics)
    resume.finish()
    print(f"wrote {out}: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items()), flush=True)


if __name__ == "__main__":
    run(main, Config, __doc__, PRESETS)
