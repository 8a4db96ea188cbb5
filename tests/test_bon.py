"""Best-of-N drawn from a pool."""
import math

import numpy as np
import pytest

import bon
from common.errors import UserError


def test_best_of_n_keeps_the_best_and_follows_the_analytic_law():
    """Of a pool of m distinct rewards, the best of n draws without replacement has rank k with probability
    C(m - k, n - 1) / C(m, n)."""
    rewards, n, draws = np.arange(8.)[::-1], 3, 20_000
    picks = bon.best_of_n(rewards, n, draws, np.random.default_rng(0))
    expected = [math.comb(7 - i, n - 1) / math.comb(8, n) for i in range(8)]
    np.testing.assert_allclose(np.bincount(picks, minlength=8) / draws, expected, atol=.01)
    assert (bon.best_of_n([1., 3., 2.], 3, 5, np.random.default_rng(0)) == 1).all()
    with pytest.raises(ValueError):
        bon.best_of_n([1.], 2, 1, np.random.default_rng(0))


def test_independent_best_of_n_by_hand():
    """The best of each of three pairs: 3, 2 and 9; what stands after n x k is not looked at."""
    assert bon.best_of_n_independent([1., 3., 2., 0., 9., 8., 99.], 2, 3).tolist() == [1, 2, 4]
    with pytest.raises(ValueError, match="a pool of 3 has no 2 disjoint parts of 2"):
        bon.best_of_n_independent([1., 2., 3.], 2, 2)


def test_draws_belong_to_seed_and_prompt():
    rewards = np.random.default_rng(1).random(64).tolist()

    def pick(seed, number):
        return bon.pick_best(bon.Config(seed=seed, n=16), rewards, number).tolist()
    assert pick(0, 3) == pick(0, 3) and len({tuple(pick(seed, i)) for seed in (0, 1) for i in range(8)}) == 16
    assert bon.pick_best(bon.Config(n=8, independent=True), rewards, 0).tolist() == [
        8 * i + int(np.argmax(rewards[8 * i:8 * i + 8])) for i in range(8)]


def test_a_policy_is_called_as_its_checkpoint_is():
    for model, name in (("runs/ckpt_sft.pt", "sft"), ("ckpt_ppo_b0.3.pt", "ppo_b0.3"), ("gpt2", "gpt2"),
                        ("meta-llama/Llama-3.2-1B", "Llama-3.2-1B"), ("models/opt-1.3b/", "opt-1.3b")):
        assert bon.policy_name(bon.Config(model=model)) == name
    assert bon.policy_name(bon.Config(model="gpt2", policy="mine")) == "mine"


def test_a_pool_is_sampled_for_a_reward_model_only_and_that_needs_different_samples():
    for unscored in (dict(pool=64), dict(pool=8), dict(temperature=0.)):
        assert bon.pool_size(bon.Config(**unscored)) == 16
    assert bon.pool_size(bon.Config(reward="r.pt")) == 64 and bon.pool_size(bon.Config(reward="r.pt", pool=20)) == 20
    for wrong, says in ((dict(temperature=0.), "--temperature 0"), (dict(pool=8), "16 samples are needed"),
                        (dict(pool=64, independent=True), "256 samples are needed")):
        with pytest.raises(UserError, match=says):
            bon.pool_size(bon.Config(reward="r.pt", **wrong))


def test_soft_draws_on_a_space_that_can_be_listed():
    """Four responses with chances ref and rewards r: weights, KL and pairs of a pool are those of pi* =
    ref exp(r / beta) / Z, known exactly; small beta is the best of the pool, large beta the reference."""
    ref, r, beta = np.array([.5, .3, .15, .05]), np.array([0., 1., .5, 2.]), .7
    best = ref * np.exp(r / beta) / (ref * np.exp(r / beta)).sum()
    kl, reward = (best * np.log(best / ref)).sum(), (best * r).sum()
    pool = np.random.default_rng(0).choice(4, 200_000, p=ref)
    weights = bon.soft_weights(r[pool], beta)
    assert np.bincount(pool, weights) == pytest.approx(best, abs=.005)
    assert weights @ r[pool] == pytest.approx(reward, abs=.01)
    assert bon.soft_kl(weights) == pytest.approx(kl, abs=.01)
    # the formula in its docstring
    assert bon.soft_kl(weights) == pytest.approx(weights @ r[pool] / beta - np.log(np.exp(r[pool] / beta).mean()))
    assert bon.effective_size(np.full(8, 1 / 8)) == pytest.approx(8) and bon.effective_size(np.eye(3)[0]) == 1
    for independent in (False, True):
        picks, size, kl = bon.soft_best_of_n(r[pool], beta, 2000, np.random.default_rng(1), independent)
        assert type(size) is type(kl) is float      # a state of a run holds them, and reads no numpy objects
        assert np.bincount(pool[picks]) / 2000 == pytest.approx(best, abs=.05)
        assert len(set(picks // 100)) == 2000 or not independent
        assert size == pytest.approx(len(pool) / (2000 if independent else 1) / (best ** 2 / ref).sum(), rel=.1)
    assert pool[bon.soft_best_of_n(r[pool], 1e-3, 50, np.random.default_rng(1))[0]].tolist() == [3] * 50
    assert bon.soft_kl(bon.soft_weights(r[pool], 1e6)) == pytest.approx(0, abs=1e-9)
