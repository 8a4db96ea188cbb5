"""Ranks and micro-batches change nothing but rounding: 2 gloo processes and parts of a batch against one process."""
import json
import os
import subprocess
import sys

import pytest
import torch

import bon
import generalisation
import model as M
import ppo
import reward
import sft
from common import dist
from conftest import ROOT, json_lines
from methods import dpo, grpo

ODD = {"seconds", "peak_mb", "tokens_per_second"}


def same(one, other, most=1e-5):
    """Metrics of two runs, step by step, to `most` of their size (and five digits is what is written)."""
    assert len(one) == len(other) > 2
    for a, b in zip(one, other):
        for k in a.keys() - ODD:
            # 0.18232 - 0.18231 is a hair above 1e-5 in binary
            assert a[k] == pytest.approx(b[k], rel=2e-5 + most, abs=most + 1e-12), (k, a["step"])


def stages(base):
    """[(script, config, flags)] of all that trains, from one small checkpoint."""
    reward_model = str(base / "ckpt_reward.pt")
    same_model = dict(model=str(base / "ckpt_sft.pt"))
    return [(sft, sft.Config, dict(model=str(base / "ckpt_sft.pt"), rows=96, lr=1e-4, log_every=1)),
            (reward, reward.Config, dict(model=str(base / "ckpt_sft.pt"), prompts=24, held_out=12, log_every=1)),
            (ppo, ppo.Config, dict(model=str(base / "ckpt_sft.pt"), reward=reward_model, steps=3, batch_size=9,
                                   kl_target=3.)),
            (dpo, dpo.Config, dict(**same_model, prompts=24, held_out=17, log_every=1)),
            (grpo, grpo.Config, dict(**same_model, reward=reward_model, steps=3, batch_size=3, n=4))]


def name_of(script):
    return script.__name__.removeprefix("methods.")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small checkpoint of each kind, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("base")
    sft.main(sft.Config(rows=400, out=str(folder), quiet=True, threads=1))
    reward.main(reward.Config(model=str(folder / "ckpt_sft.pt"), prompts=40, held_out=12, out=str(folder), quiet=True,
                              threads=1))
    for script, config, flags in stages(folder):
        script.main(config(**flags, out=str(folder / "one"), quiet=True, threads=1))
    return folder


@pytest.mark.slow
def test_micro_batches_and_recomputed_activations(base, tmp_path):
    for script, config, flags in stages(base):
        script.main(config(**flags, micro_batch_size=2, recompute=True, out=str(tmp_path), quiet=True, threads=1))
        name = f"metrics_{name_of(script)}.jsonl"
        same(json_lines(base / "one" / name), json_lines(tmp_path / name))


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
def test_two_processes(base, tmp_path, more):
    """9 rollouts make the ranks' shares unequal; sharded, every rank has to make as many passes nevertheless.
    DPO and GRPO run sharded only, which is the harder case, because two processes take long to start."""
    for script, config, flags in stages(base)[:None if more else 3]:
        two_processes(script, flags, tmp_path, *more)
        name = f"metrics_{name_of(script)}.jsonl"
        same(json_lines(base / "one" / name), json_lines(tmp_path / name))
        one, two = (torch.load(folder / f"ckpt_{name_of(script)}.pt", weights_only=True)["state"]
                    for folder in (base / "one", tmp_path))
        for k, x in one.items():
            torch.testing.assert_close(two[k], x, atol=1e-4, rtol=1e-4)


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


@pytest.mark.slow
def test_two_processes_sample_and_judge_as_one_does(base, tmp_path):
    bon_flags = dict(model=str(base / "ckpt_sft.pt"), reward=str(base / "ckpt_reward.pt"), splits="test", inputs=5, n=4)
    two_processes(bon, bon_flags, tmp_path)
    bon.main(bon.Config(**bon_flags, out=str(tmp_path / "one"), quiet=True, threads=1))
    for name in ("samples_sft_test.jsonl", "samples_bon_test.jsonl"):
        one, two = json_lines(tmp_path / "one" / name), json_lines(tmp_path / name)
        assert [x["outputs"] for x in one] == [x["outputs"] for x in two]
        for a, b in zip(one, two):
            assert a["rewards"] == pytest.approx(b["rewards"], abs=1e-4)
    # and judge it: generalisation.py shares the reward model's work
    judge = ["--judge", bon_flags["reward"]]
    files = [str(tmp_path / name) for name in ("samples_sft_test.jsonl", "samples_bon_test.jsonl")]
    two_processes(generalisation, {}, tmp_path, *judge, *files)
    generalisation.main(generalisation.Config(files=files, judge=judge[1], out=str(tmp_path / "one"), threads=1))
    one, two = (json.loads((folder / "generalisation.json").read_text()) for folder in (tmp_path / "one", tmp_path))
    assert [x["rate"] for x in one["win_rate"]] == [x["rate"] for x in two["win_rate"]]
    assert [x["score"] for x in one["win_rate"]] == pytest.approx([x["score"] for x in two["win_rate"]], abs=1e-4)


def test_a_share_of_the_samples_is_what_one_process_draws():
    torch.manual_seed(0)
    model = M.GPT(M.GPTConfig(vocab_size=20, n_layer=1, n_head=2, d_model=8, context=32))
    prompts = [[1, 2, 3][:1 + i % 3] for i in range(7)]
    draw = lambda **more: M.generate(model, prompts, 5, n=2, eos=0, rng=torch.Generator().manual_seed(1),  # noqa: E731
                                     **more)
    whole = draw()
    for size in (2, 3, 8):
        for batch_size in (4, 4096):
            for r in range(size):
                assert draw(ranks=(r, size), batch_size=batch_size) == whole[r::size]


def test_parts_cover_the_rows_of_one_process():
    assert dist.micro_batches(list(range(7)), 3) == [([0, 1, 2], 1), ([3, 4, 5], 1), ([6], 1)]
    assert dist.micro_batches([4, 5], 0) == [([4, 5], 1)]
    # another rank needs three passes for five rows
    assert dist.micro_batches([7, 8, 9, 10], 2, 5, [3]) == [([7, 8], 1), ([9, 10], 1), ([3], 0)]
    assert dist.micro_batches([], 0, 1, [3]) == [([3], 0)]
    assert dist.gather_rows([1, 2]) == [1, 2] and dist.my_rows([1, 2]) == [1, 2]
