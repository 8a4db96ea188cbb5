"""Ranks and micro-batches change nothing but rounding: parts of a batch, and 2 gloo processes, against one process."""
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import model as M
import ppo
import reward
import sft
from common import dist
from common.errors import UserError
from common.loop import Run, check_batch
from conftest import ROOT, json_lines
from generate import generate
from methods import dpo, grpo

TIMES = {"seconds", "peak_mb", "tokens_per_second"}


def small_model(**more):
    torch.manual_seed(0)
    return M.GPT(M.GPTConfig(vocab_size=20, n_layer=2, n_head=2, d_model=8, context=32, **more))


# ------------------------------------------------------------------------------------ ranks, one after the other

@pytest.fixture
def ranks(monkeypatch):
    """ranks(n) yields once as each of n ranks, in this process."""
    def each(n):
        monkeypatch.setattr(dist, "world_size", lambda: n)
        for r in range(n):
            monkeypatch.setattr(dist, "rank", lambda r=r: r)
            yield r
    return each


def parts_of(batch, size):
    """The micro-batches of this rank, without the rest of a Run."""
    return Run.micro_batches(SimpleNamespace(cfg=SimpleNamespace(micro_batch_size=size)), batch)


@pytest.mark.parametrize("n_ranks, size", [(1, 0), (1, 4), (2, 0), (2, 3), (3, 2), (4, 1)])
def test_parts_of_all_ranks_are_the_batch_and_all_make_equally_many_passes(n_ranks, size, ranks):
    batch, parts = list(range(12)), []
    for _ in ranks(n_ranks):
        check_batch(SimpleNamespace(batch_size=12, micro_batch_size=size))
        parts.append(parts_of(batch, size))
    assert sorted(row for of_rank in parts for part in of_rank for row in part) == batch
    assert len(set(map(len, parts))) == 1 and {len(part) for of_rank in parts for part in of_rank} == {
        size or 12 // n_ranks}


def test_a_batch_that_does_not_divide_is_refused(ranks):
    for _ in ranks(2):
        for batch_size, micro, minibatches in ((9, 0, 1), (6, 2, 1), (8, 2, 4)):
            with pytest.raises(UserError, match=f"--batch-size {batch_size}: it must be a multiple of .* 2 ranks"):
                check_batch(SimpleNamespace(batch_size=batch_size, micro_batch_size=micro), minibatches)


def groups(rng):
    """Eight prompts with two to four responses each and all their pairs."""
    def ids(most):
        return torch.randint(20, (int(torch.randint(1, most, (), generator=rng)),), generator=rng).tolist()
    for i in range(8):
        responses = [ids(6) for _ in range(2 + i % 3)]
        yield reward.Group(ids(5), responses, [(a, b) for a in range(len(responses)) for b in range(a)], [])


def losses(name):
    """(model, loss of some Groups as a part of a batch of them, count of the batch's terms) of a script."""
    model = small_model()
    if name == "sft":
        return (model, lambda part, n: sft.sft_loss(model.log_probs(dpo.pack_groups(part, "cpu")), n),
                lambda batch: sum(len(r) for g in batch for r in g.responses))
    model = model.with_scalar_head() if name == "reward" else model
    torch.nn.init.normal_(model.head.weight)
    ref_policy = small_model()

    def loss(part, n):
        packed = dpo.pack_groups(part, "cpu")
        r = model.rewards(packed) if name == "reward" else dpo.log_ratios(model, ref_policy, packed)
        winner, loser = reward.winners_and_losers(part, "cpu")
        if name == "reward":
            return reward.bradley_terry_loss(r[winner], r[loser], n)
        return dpo.LOSSES[name](r[winner], r[loser], .1, n)
    return model, loss, lambda batch: sum(len(g.pairs) for g in batch)


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ipo"])
@pytest.mark.parametrize("n_ranks, size", [(1, 2), (2, 0), (4, 1)])
def test_gradients_of_ranks_and_parts_add_up_to_the_batch_s(name, n_ranks, size, ranks):
    """A loss is a sum over a part divided by the count of the whole batch: then nothing needs a weight."""
    model, loss, count = losses(name)
    batch = list(groups(torch.Generator().manual_seed(1)))
    loss(batch, count(batch)).backward()
    whole = [p.grad.clone() for p in model.trainable()]
    model.zero_grad()
    for _ in ranks(n_ranks):
        for part in parts_of(batch, size):
            loss(part, count(batch)).backward()
    assert max(g.abs().max() for g in whole) > 1e-3
    torch.testing.assert_close([p.grad for p in model.trainable()], whole, atol=1e-5, rtol=1e-4)


def test_rows_that_ranks_hold_go_back_into_their_order(ranks):
    rows, mine = list("abcdef"), []
    for _ in ranks(3):
        mine.append(dist.my_rows(rows))
    assert mine == [["a", "d"], ["b", "e"], ["c", "f"]]
    # PPO's minibatches are neighbours: those that the ranks hold make up neighbours of the batch
    parts = [[[of_rank[i] for i in mb] for mb in torch.arange(2).chunk(2)] for of_rank in mine]
    assert [sorted(sum(together, [])) for together in zip(*parts)] == [["a", "b", "c"], ["d", "e", "f"]]


def test_a_share_of_the_samples_is_what_one_process_draws():
    model, prompts = small_model(), [[1, 2, 3][:1 + i % 3] for i in range(7)]

    def draw(**more):
        return generate(model, prompts, 5, n=2, eos=0, rng=torch.Generator().manual_seed(1), **more)
    whole = draw()
    for size in (2, 3, 8):
        for batch_size in (4, 4096):
            for r in range(size):
                assert draw(ranks=(r, size), batch_size=batch_size) == whole[r::size]


# ------------------------------------------------------------------------------------------------- two processes

def same(one, other, most=1e-5):
    """Metrics of two runs, step by step, to `most` of their size (and five digits is what is written)."""
    assert len(one) == len(other) > 2
    for a, b in zip(one, other):
        for k in a.keys() - TIMES:
            # 0.18232 - 0.18231 is a hair above 1e-5 in binary
            assert a[k] == pytest.approx(b[k], rel=2e-5 + most, abs=most + 1e-12), (k, a["step"])


def stages(work):
    """[(script, flags)] of all that trains."""
    policy = dict(model=str(work / "ckpt_sft.pt"))
    both, pairs = policy | dict(reward=str(work / "ckpt_reward.pt")), dict(prompts=24, samples=2, log_every=1)
    return [(sft, policy | dict(rows=32, lr=1e-4, log_every=1)), (reward, policy | pairs | dict(held_out=12)),
            (ppo, both | dict(steps=3, batch_size=8, kl_target=3.)), (dpo, policy | pairs | dict(held_out=17)),
            (grpo, both | dict(steps=3, batch_size=8, n=2))]


def name_of(script):
    return script.__name__.removeprefix("methods.")


@pytest.fixture(scope="module")
def one(work, tmp_path_factory):
    """What one process makes of all that trains."""
    folder = tmp_path_factory.mktemp("one")
    for script, flags in stages(work):
        script.main(script.Config(**flags, out=str(folder), quiet=True, threads=1))
    return folder


@pytest.mark.slow
def test_micro_batches_and_recomputed_activations(work, one, tmp_path):
    for script, flags in stages(work):
        script.main(script.Config(**flags, micro_batch_size=2, recompute=True, out=str(tmp_path), quiet=True,
                                  threads=1))
        name = f"metrics_{name_of(script)}.jsonl"
        same(json_lines(one / name), json_lines(tmp_path / name))


def two_processes(script, flags, out, *more):
    """Runs script under torchrun with 2 ranks."""
    given = [x for k, v in flags.items() for x in ("--" + k.replace("_", "-"), str(v))]
    torchrun("-m", "--", script.__name__, *given, "--out", out, "--threads", 1, "--device", "cpu", *more)


def torchrun(*args):
    """Runs 2 ranks.  Returns what they print."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *map(str, args)],
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--shard", "--micro-batch-size", "2")])
def test_two_processes(work, one, tmp_path, more):
    """DPO and GRPO run sharded only, which is the harder case, because two processes take long to start."""
    for script, flags in stages(work)[:None if more else 3]:
        two_processes(script, flags, tmp_path, *more)
        name = f"metrics_{name_of(script)}.jsonl"
        same(json_lines(one / name), json_lines(tmp_path / name))
        alone, two = (torch.load(folder / f"ckpt_{name_of(script)}.pt", weights_only=True)["state"]
                      for folder in (one, tmp_path))
        torch.testing.assert_close(two, alone, atol=1e-4, rtol=1e-4)


AFTER_A_FORWARD_PASS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import model as M
from common import dist
dist.start(torch.device("cpu"))
model = M.GPT(M.GPTConfig(vocab_size=20, n_layer=3, n_head=2, d_model=8, frozen=1))
dist.shard(model)
with torch.no_grad():
    model(M.pack([[1, 2]], [[[3, 4]]]))
line = f"sharded: {[all(map(dist.is_sharded, block.parameters())) for block in model.blocks]}\\n"
print(line, end="")      # one write: the other process prints too
dist.stop()
"""


@pytest.mark.slow
def test_a_sharded_layer_is_freed_after_a_forward_pass_without_a_backward_one(tmp_path):
    """Else the reference policy's layers would lie whole on every rank from the first rollout on."""
    (tmp_path / "script.py").write_text(AFTER_A_FORWARD_PASS)
    assert torchrun(tmp_path / "script.py", ROOT).count("sharded: [False, True, True]") == 2
