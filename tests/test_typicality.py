"""How much annotators like what is typical, estimated from their pairs."""
import json

import numpy as np
import pytest
import torch

from common.errors import UserError
from conftest import call, refused
from model import GPT, GPTConfig
from reward import Group
from tasks.annotators import mean_log_probs
from tools import typicality as T


def pairs_of(rng, weights, n, per_prompt):
    """(x, prompts) of pairs that annotators with these coefficients compare: x is of the chosen minus of the
    other.  A prompt's pairs have something in common."""
    x = np.repeat(rng.normal(size=(n // per_prompt, len(weights))), per_prompt, 0) + rng.normal(size=(n, len(weights)))
    chosen = rng.random(n) < 1 / (1 + np.exp(-x @ weights))
    return np.where(chosen[:, None], x, -x), np.repeat(np.arange(n // per_prompt), per_prompt)


def test_the_interval_holds_the_coefficients():
    """19 times in 20, each, with four pairs a prompt."""
    rng, truth, held = np.random.default_rng(0), np.array([.6, -.2, 0.]), np.zeros(3)
    for _ in range(200):
        found = T.paired_logistic(*pairs_of(rng, truth, 400, 4))
        held += [low < w < high for w, (_, low, high) in zip(truth, found)]
    assert (held >= 178).all() and (held <= 199).all()


def test_a_maximum_of_the_likelihood_whatever_the_unit():
    """At the maximum the gradient is 0; tokens instead of hundreds of tokens change the unit alone."""
    x, prompts = pairs_of(np.random.default_rng(1), np.array([.5, .3]), 300, 1)
    w = np.array([e.mean for e in T.paired_logistic(x, prompts)])
    assert (1 - 1 / (1 + np.exp(-x @ w))) @ x == pytest.approx([0, 0], abs=1e-6)
    scaled = T.paired_logistic(x * [1, 100], prompts)
    assert [e.mean for e in scaled] == pytest.approx(w / [1, 100])
    # pairs four times over are no evidence: the interval stays
    again = T.paired_logistic(np.tile(x, (4, 1)), np.tile(prompts, 4))
    assert again[0] == pytest.approx(T.paired_logistic(x, prompts)[0], rel=.02)


def test_what_has_no_estimate_is_refused():
    with pytest.raises(UserError, match="without exception"):
        T.paired_logistic(np.array([[1.], [2.], [.5]]), np.arange(3))
    with pytest.raises(UserError, match="the same for both"):
        T.paired_logistic(np.zeros((3, 1)), np.arange(3))


def test_differences_are_the_annotators_own():
    """The mean log-probability is tasks/annotators.py's, so --typicality a comes back as alpha."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=20, n_layer=1, n_head=2, d_model=16, context=32))
    groups = [Group([1, 2], [[3, 4, 0], [5, 0], [6, 7, 8, 0]], [(0, 1), (2, 0)], [.5, -1.]),
              Group([9], [[3, 0], [4, 4]], [(1, 0)], [2.])]
    x, prompts = T.differences(model, groups, 2)
    expected = []
    for group in groups:
        typical = mean_log_probs(model, group.prompt, group.responses)
        expected += [typical[a] - typical[b] for a, b in group.pairs]
    assert x["log-probability a token"] == pytest.approx(expected, abs=1e-6)
    assert x["tokens"].tolist() == [1, 1, 0] and x["gold reward"].tolist() == [.5, -1, 2]
    assert prompts.tolist() == [0, 0, 1]
    assert T.wins_of(x["tokens"], prompts).mean == pytest.approx((1 + .5) / 2)
    # pairs of which some have no gold reward, and pairs of equal length
    some = [groups[0], groups[1]._replace(gaps=[])]
    assert list(T.differences(model, some, 2)[0]) == ["log-probability a token", "tokens"]
    x = {"log-probability a token": np.array([1., -.5, 2.]), "tokens": np.zeros(3)}
    alone, = T.regressions(x, np.arange(3))
    assert list(alone) == ["log-probability a token"]


def test_the_tool(work):
    """On the toy annotators' pairs; without a file, and without a pair that fits, one line."""
    file = work / "typical" / "preferences.jsonl"
    call("tasks.annotators", "--model", work / "ckpt_sft.pt", "--prompts", 30, "--held-out", 2, "--out", file.parent, cwd=work)
    done = call("tools.typicality", file, "--model", work / "ckpt_sft.pt", "--out", file.parent, cwd=work)
    results = json.loads((file.parent / "typicality.json").read_text())
    assert done.returncode == 0 and f"{results['pairs']} pairs on {results['prompts']} prompts" in done.stdout
    assert [list(found) for found in results["regressions"]][-1] == ["log-probability a token", "tokens", "gold reward"]
    refused(work, "tools.typicality", says="name a preference file")
    refused(work, "tools.typicality", file, "--model", "ckpt_sft.pt", "--max-new-tokens", 1, says="pairs are too few")
