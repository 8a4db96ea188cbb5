"""The mathematics of SFT, the reward model and PPO: worked by hand, equal to TRL's, gradients checked in
fp64."""
import math

import pytest
import torch

import bon
import model as M
import ppo
import reward
import sft
from common.loop import warmup_cosine

t64 = lambda x: torch.tensor(x, dtype=torch.float64)  # noqa: E731


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64), t64(b), atol=tolerance, rtol=0)


@pytest.fixture
def inputs(refs):
    x = {k: t64(v) if isinstance(v, list) else v for k, v in refs["ppo_inputs"].items()}
    x["mask"] = x["mask"].bool()
    return x


def test_gae_by_hand():
    """One response of two tokens, then padding.  gamma = 1, lam = .5, V = (1, 2), r = (0, 3).
    delta_1 = 3 - 2 = 1;  delta_0 = 0 + 2 - 1 = 1;  A_1 = 1;  A_0 = 1 + .5 * 1 = 1.5;  returns = (2.5, 3)."""
    advantages, returns = ppo.gae(t64([[0., 3., 9.]]), t64([[1., 2., 7.]]),
                                  torch.tensor([[True, True, False]]), gamma=1.0, lam=0.5)
    close(advantages, [[1.5, 1., 0.]])
    close(returns, [[2.5, 3., 0.]])


def test_score_lands_on_the_last_token_of_the_response():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    got = ppo.token_rewards(t64([5., 7.]), t64([[1., 2., 3.], [4., 9., 9.]]), mask, kl_coef=0.1)
    close(got, [[-.1, -.2, 4.7], [6.6, 0., 0.]])


def test_kl_estimators(refs, inputs):
    for kind in ("k1", "k2", "k3"):
        close(ppo.kl_estimate(inputs["old_logprobs"], inputs["ref_logprobs"], kind), refs["kl"][kind])
    with pytest.raises(ValueError):
        ppo.kl_estimate(t64([[0.]]), t64([[0.]]), "k4")


def test_k1_and_k3_are_unbiased_k3_never_negative():
    p, q = t64([.7, .2, .1]), t64([.4, .4, .2])
    exact = (p * (p / q).log()).sum()
    k1, k3 = (ppo.kl_estimate(p.log(), q.log(), kind) for kind in ("k1", "k3"))
    close((p * k1).sum(), float(exact), 1e-12)
    close((p * k3).sum(), float(exact), 1e-12)
    assert (k3 >= 0).all() and (k1 < 0).any()


def test_rewards_gae_and_whitening_equal_trl(refs, inputs):
    kl = ppo.kl_estimate(inputs["old_logprobs"], inputs["ref_logprobs"])
    rewards = ppo.token_rewards(inputs["scores"], kl, inputs["mask"], inputs["kl_coef"])
    close(rewards * inputs["mask"], (t64(refs["rewards"]["rewards"]) * inputs["mask"]).tolist())
    advantages, returns = ppo.gae(rewards, inputs["values"], inputs["mask"], inputs["gamma"], inputs["lam"])
    close(advantages, (t64(refs["gae"]["advantages_raw"]) * inputs["mask"]).tolist())
    close(returns, (t64(refs["gae"]["returns"]) * inputs["mask"]).tolist())
    close(ppo.gae(rewards, inputs["values"], inputs["mask"], 1.0, inputs["lam"])[0],
          (t64(refs["gae"]["gamma1"]["advantages_raw"]) * inputs["mask"]).tolist())
    close(ppo.whiten(advantages, inputs["mask"]),
          (t64(refs["gae"]["advantages_whitened"]) * inputs["mask"]).tolist())
    # deviation: TRL whitens padding too, ours is 0 there
    w, mask = refs["whiten"], t64(refs["whiten"]["mask"])
    close(ppo.whiten(t64(w["x"]), mask.bool()), (t64(w["trl112_masked_whiten"]) * mask).tolist())
    # the paper's own code has no mask: everywhere, and at the last column
    everything = torch.ones_like(mask).bool()
    close(ppo.whiten(t64(w["x"]), everything), w["paper_whiten_unmasked"])


def test_policy_and_value_loss_equal_trl_with_gradients(refs, inputs):
    r = refs["ppo_loss_masked"]
    logp, v = inputs["new_logprobs"].clone().requires_grad_(), inputs["vpred"].clone().requires_grad_()
    pg, pg_clipfrac = ppo.policy_loss(logp, inputs["old_logprobs"], t64(r["advantages"]), inputs["mask"],
                                     inputs["cliprange"])
    vf, v_clipfrac = ppo.value_loss(v, t64(r["values"]), t64(r["returns"]), inputs["mask"],
                                   inputs["cliprange_value"])
    close(pg.detach(), r["pg_loss"])
    close(vf.detach(), r["vf_loss"])
    close(pg_clipfrac, r["pg_clipfrac"])
    close(v_clipfrac, r["vf_clipfrac"])
    (pg + inputs["vf_coef"] * vf).backward()
    close(logp.grad, r["grad_new_logprobs"])
    close(v.grad, r["grad_vpred"])


def test_padding_cannot_leak_not_even_nan(inputs):
    nan = torch.where(inputs["mask"], inputs["new_logprobs"], torch.nan)
    clean = ppo.policy_loss(inputs["new_logprobs"], inputs["old_logprobs"], inputs["values"],
                            inputs["mask"])[0]
    assert ppo.policy_loss(nan, inputs["old_logprobs"], inputs["values"], inputs["mask"])[0] == clean


def test_what_lies_behind_the_end_is_never_read():
    """NaN behind the end of each response changes no reward, advantage, return or mean."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    clean = torch.tensor([[1., 2., 0.], [3., 4., 5.]])
    dirty = clean.where(mask, torch.nan)
    score = torch.tensor([7., 8.])
    assert torch.equal(ppo.token_rewards(score, dirty, mask, .5), ppo.token_rewards(score, clean, mask, .5))
    for got, expected in zip(ppo.gae(dirty, dirty, mask), ppo.gae(clean, clean, mask)):
        assert torch.equal(got, expected) and (got[~mask] == 0).all()
    assert torch.equal(ppo.whiten(dirty, mask), ppo.whiten(clean, mask))
    assert ppo.masked_mean(dirty, mask) == 3
    assert ppo.explained_variance(dirty, clean, mask) == 1


def test_explained_variance_by_hand():
    mask = torch.ones(1, 4, dtype=torch.bool)
    returns = torch.tensor([[0., 1., 2., 3.]])
    assert ppo.explained_variance(returns, returns, mask) == 1
    assert ppo.explained_variance(torch.full((1, 4), 1.5), returns, mask) == pytest.approx(0)
    assert ppo.explained_variance(3 - returns, returns, mask) == pytest.approx(1 - 4)   # error 2 x too far
    # returns that are one number, or vary by rounding alone, leave nothing to explain
    for same in (torch.full((1, 4), 3.7), torch.full((1, 4), 3.7) + torch.tensor([0, 2.4e-7, 0, 2.4e-7])):
        assert ppo.explained_variance(returns, same, mask) == 0


def test_gradients_in_fp64():
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(3, 4, dtype=torch.float64, generator=g) * .3 for _ in range(4)]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    free = x[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a: ppo.policy_loss(a, x[1], x[2], mask)[0], (free,))
    assert torch.autograd.gradcheck(lambda a: ppo.value_loss(a, x[1], x[2], mask)[0], (free,))
    assert torch.autograd.gradcheck(lambda a: ppo.kl_estimate(a, x[1], "k3").sum(), (free,))
    assert torch.autograd.gradcheck(lambda a: reward.bradley_terry_loss(a[0], a[1]), (free,))
    assert torch.autograd.gradcheck(lambda a: sft.sft_loss(a.log_softmax(-1)[:, :1], 3), (free,))


def test_adaptive_kl_equals_reference(refs):
    for case in refs["adaptive_kl"]:
        beta = case["init"]
        for (kl, n), expected in zip(case["steps"], case["values"], strict=True):
            cfg = ppo.Config(kl_target=case["target"], batch_size=n, kl_horizon=case["horizon"])
            beta = ppo.adapted_beta(beta, kl, cfg)
            close(beta, expected, 1e-9)


def test_bradley_terry(refs):
    r = refs["bradley_terry"]
    close(reward.bradley_terry_loss(t64(r["chosen"]), t64(r["rejected"])), r["loss"])
    close(reward.bradley_terry_loss(t64([1.]), t64([1.])), math.log(2))


def test_log_probs_and_entropy_equal_trl(refs):
    r = refs["selective_log_softmax"]
    logits, index = t64(r["logits"]), torch.tensor(r["index"])
    B, T, V = logits.shape
    packed = M.pack([[0]] * B, [[row.tolist()] for row in index])
    model = M.GPT(M.GPTConfig(vocab_size=V))
    # hidden states are the logits; position t of row b predicts index[b, t]
    model.top = lambda h, packed: torch.cat((logits, logits[:, -1:]), dim=1)
    model.head = torch.nn.Identity()
    logp, entropy = model.log_probs_and_entropy(packed)
    close(logp, r["out"], 1e-5)
    close(entropy, r["entropy"], 1e-5)
    assert torch.equal(logp, model.log_probs(packed))


def test_best_of_n_kl(refs):
    for n, kl in refs["best_of_n_kl"].items():
        close(bon.best_of_n_kl(int(n)), kl, 1e-12)
    with pytest.raises(ValueError):
        bon.best_of_n_kl(0)


def test_schedule_warms_up_and_ends_at_zero():
    rates = [warmup_cosine(i, 1000, 1.0, 100) for i in range(1001)]
    assert [rates[i] for i in (0, 100, 550, 1000)] == pytest.approx([.01, 1., .5, 0.])
