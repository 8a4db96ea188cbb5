"""PPO on a space of responses so small that every one can be listed: does it find the policy that maximises
J = E[r] - beta KL(policy || ref_policy), which is known?

With rewards r(y) the optimum is pi*(y) = ref(y) exp(r(y) / beta) / Z, and J(pi*) = beta log Z (Korbak et
al. 2022).  The rollouts, rewards, advantages and updates are those of ppo.py.
"""
import copy
import itertools

import pytest
import torch

import model as M
import ppo
from common.dist import param_groups
from common.loop import Run

VOCABULARY = 3
PROMPT = [2]
BETA = 0.5


def responses(n_tokens):
    """Every response of n_tokens tokens, as id lists."""
    return [list(ids) for ids in itertools.product(range(VOCABULARY), repeat=n_tokens)]


def log_probs_of(policy, listed):
    """log pi(y | PROMPT) of each listed response: (R,), fp64."""
    packed = M.pack([PROMPT], [listed])
    with torch.no_grad():
        return policy.log_probs(packed).sum(1).double()


def objective(logp, ref_logp, rewards):
    """J of a policy, exactly.  All (R,)."""
    return float((logp.exp() * (rewards - BETA * (logp - ref_logp))).sum())


def best_objective(ref_logp, rewards):
    """J of the optimum, beta log sum ref exp(r / beta)."""
    return float(BETA * torch.logsumexp(ref_logp + rewards / BETA, 0))


def way(policy, ref_policy, listed, rewards):
    """(how far `policy` has come from the reference, 0, to the optimum, 1, in J; KL to the reference, nats)."""
    logp, ref_logp = (log_probs_of(model, listed) for model in (policy, ref_policy))
    start, end = objective(ref_logp, ref_logp, rewards), best_objective(ref_logp, rewards)
    kl = float((logp.exp() * (logp - ref_logp)).sum())
    return (objective(logp, ref_logp, rewards) - start) / (end - start), kl


def reference():
    """A small random policy that gives every response a chance.  Positions are learned: with rotary ones, a
    token repeated looks like the token alone."""
    torch.manual_seed(0)
    policy = M.GPT(M.GPTConfig(vocab_size=VOCABULARY, n_layer=2, n_head=2, d_model=32, context=8,
                               position="learned", tied=False))
    policy.head.weight.data.mul_(0.5)
    return policy


def train(kind, n_tokens, steps, out):
    """PPO with the estimator `kind` as the penalty in the reward.  Returns as `way`."""
    policy = reference()
    ref_policy, value_model = copy.deepcopy(policy).requires_grad_(False), policy.with_scalar_head()
    listed, rng = responses(n_tokens), torch.Generator().manual_seed(0)
    rewards = torch.randn(len(listed), generator=rng, dtype=torch.float64)
    reward_of = {tuple(y): float(r) for y, r in zip(listed, rewards)}
    cfg = ppo.Config(steps=steps, batch_size=128, vf_coef=0.5, clip_value=10., out=str(out), quiet=True)
    optimizer = torch.optim.Adam(param_groups(policy.trainable() + value_model.trainable()))
    run = Run("ppo", cfg, optimizer, rng, [], policy=policy, value=value_model)
    for step in run.steps(steps):
        run.set_lr(3e-3 * (1 - step / steps))
        ro = ppo.rollout(policy, ref_policy, value_model, None, [PROMPT] * cfg.batch_size, n_tokens, None, 1.,
                         rng)
        score = torch.tensor([reward_of[tuple(y)] for y in ro.responses])
        penalty = ppo.kl_estimate(ro.logp, ro.ref_logp, kind)
        token_rewards = ppo.token_rewards(score, penalty, ro.mask, BETA)
        advantages, returns = ppo.gae(token_rewards, ro.values, ro.mask)
        ppo.update(policy, value_model, ro, ppo.whiten(advantages, ro.mask), returns, cfg, run)
    return way(policy, ref_policy, listed, rewards)


def test_the_optimum_by_hand():
    """Two responses, equally likely under the reference, rewards 1 and 0, beta 1/2: Z = (e^2 + 1) / 2."""
    ref_logp, rewards = torch.tensor([.5, .5]).double().log(), torch.tensor([1., 0.]).double()
    z = (torch.tensor(2.).exp() + 1) / 2
    assert best_objective(ref_logp, rewards) == pytest.approx(float(z.log() / 2))
    optimum = ref_logp + rewards / BETA - z.log()
    assert objective(optimum, ref_logp, rewards) == pytest.approx(best_objective(ref_logp, rewards))
    assert objective(ref_logp, ref_logp, rewards) == .5


@pytest.mark.parametrize("n_tokens, steps", [(1, 20), pytest.param(3, 60, marks=pytest.mark.slow)])
def test_ppo_finds_the_optimum(n_tokens, steps, tmp_path):
    fraction, _ = train("k1", n_tokens, steps, tmp_path)
    assert fraction >= .98


@pytest.mark.slow
def test_k2_and_k3_in_the_reward_lead_elsewhere(tmp_path):
    """Their values estimate KL, but their score-function gradients are not the gradient of KL (kl_estimate
    explains it): they come .67 of the way, at twice the KL, where k1 comes .999."""
    fraction, kl = train("k1", 3, 100, tmp_path / "k1")
    assert fraction >= .98
    for kind in ("k2", "k3"):
        other, kl_other = train(kind, 3, 100, tmp_path / kind)
        assert other < .8 and kl_other > 1.5 * kl
