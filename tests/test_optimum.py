"""PPO on a space of responses so small that every one can be listed: does it find the policy that maximises
J = E[r] - beta KL(policy || ref_policy), which is known?

With rewards r(y) the optimum is pi*(y) = ref(y) exp(r(y) / beta) / Z, and J(pi*) = beta log Z (Korbak et
al. 2022).  The rollouts, rewards, advantages and updates are those of ppo.py.
"""
import copy
import itertools

import numpy as np
import pytest
import torch

import bon
import model as M
import ppo
from common.dist import param_groups
from common.loop import Run
from study import optimum
from tasks import synthetic

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


# ------------------------------------------------------------------------- the optimum without training (study/)

def test_pools_give_the_reward_kl_and_diversity_of_the_optimum():
    """Of every response of three tokens, with random rewards: against pi* computed from its definition."""
    listed = responses(3)
    ref_logp, rewards = log_probs_of(reference(), listed), torch.randn(len(listed), dtype=torch.float64)
    best = (ref_logp + rewards / BETA - best_objective(ref_logp, rewards) / BETA).exp().numpy()
    distance = optimum.jaccard_distances([frozenset(enumerate(y)) for y in listed])
    assert best.sum() == pytest.approx(1)
    pool = np.random.default_rng(0).choice(len(listed), 100_000, p=ref_logp.exp().numpy() / ref_logp.exp().sum().item())
    w = bon.soft_weights(rewards.numpy()[pool], BETA)
    assert w @ rewards.numpy()[pool] == pytest.approx(best @ rewards.numpy(), abs=.02)
    assert bon.soft_kl(w) == pytest.approx(best @ (np.log(best) - ref_logp.numpy()), abs=.02)
    assert optimum.mean_of_pairs(w, pool, distance) == pytest.approx(best @ distance @ best, abs=.005)


def test_pairs_of_equal_weight_are_the_task_s_gold_diversity():
    """Without a text's pair with itself: texts that repeat count, one text alone has no pair."""
    texts = [row["reference"] for row in synthetic.rows("test", 8)] * 2
    numbers = {facts: i for i, facts in enumerate(dict.fromkeys(map(synthetic.facts, texts)))}
    content = np.array([numbers[synthetic.facts(text)] for text in texts])
    distance = optimum.jaccard_distances(list(numbers))
    assert optimum.mean_of_pairs(np.full(16, 1 / 16), content, distance) == pytest.approx(
        synthetic.gold_diversity(texts)[0], abs=1e-6)
    assert np.isnan(optimum.mean_of_pairs(np.eye(16)[0], content, distance))


def test_shares_by_hand():
    """SFT .6; the optimum loses .2 and the policy .4 on average: half.  No loss, no share."""
    rng = np.random.default_rng(0)
    sft, best, trained = ({m: x + rng.normal(0, .01, (5, 20)) for m in optimum.SHARED} for x in (.6, .4, .2))
    found = optimum.shares(sft, best, trained)["gold_diversity"]
    assert found["lost"]["mean"] == pytest.approx(.4, abs=.01) and found["asked"]["mean"] == pytest.approx(.2, abs=.01)
    assert found["share"]["mean"] == pytest.approx(.5, abs=.02) and found["share"]["low"] < .5 < found["share"]["high"]
    assert optimum.shares(sft, best, sft)["gold_diversity"]["share"] is None
