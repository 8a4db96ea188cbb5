"""How long the work takes that people wait for, on this machine.

    python -m tools.bench                               # a small model
    python -m tools.bench --size gpt2 --device cuda     # GPT-2 small, on a GPU in bf16
    python -m tools.bench --work sft,diversity          # some of the rows

Prints a table.  A row is the median of --repeats runs, after one that does not count.  Models have random
weights and responses fixed lengths, so every machine does the same work.

`of peak` is the arithmetic of the matrix products that the work does (counted by torch), over what one large
matrix product reaches on the same machine.  Sampling has no such number: it waits for memory.
"""
import copy
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import diversity
import model as M
import ppo
import reward
import sft
from common.errors import UserError
from common.flags import ALL_THREADS, DTYPES, Count, Flags, Natural, arg, launch
from common.loop import Run
from common.samples import text_table
from generate import generate

SIZES = {   # name: (configuration, fraction of the layers frozen in PPO)
    "tiny": (M.GPTConfig(**M.SHAPES["tiny"] | {"vocab_size": 512, "context": 512}), 0.5),
    "gpt2": (M.GPTConfig(**M.SHAPES["gpt2"]), 0.8),
}
PROMPT, RESPONSE = 256, 32      # tokens of SFT's and the reward model's rows
PPO_PROMPT, ROLLOUTS = 64, 32   # of a PPO iteration: 2 epochs of 2 minibatches, responses of RESPONSE tokens
NEW_TOKENS = 48                 # of a sample


@dataclass
class Config(Flags):
    work: str = arg("", "comma-separated: sft, reward, ppo, sample, bon, diversity; '': all")
    size: Literal["tiny", "gpt2"] = arg("tiny", "of the models")
    device: Literal["cpu", "cuda"] = arg("cpu", "where they run; cuda: in bf16")
    repeats: Count = arg(5, "runs of each row; the median counts")
    threads: Natural = arg(0, "CPU threads; 0: one for tiny, torch's choice for others")


def random_ids(*shape, vocabulary):
    return np.random.default_rng(0).integers(1, vocabulary, shape).tolist()


def new_model(config, device, dtype, scalar=False):
    torch.manual_seed(0)
    return M.GPT(config, scalar).to(device).compute_in(dtype)


# --------------------------------------------------------------------- the work: (name, function, its tokens)

def training_step(model, loss_of):
    """A function that does one step of AdamW.  loss_of: function without arguments."""
    optimizer = torch.optim.AdamW(model.trainable(), lr=1e-6, fused=True)

    def step():
        optimizer.zero_grad()
        loss_of().backward()
        torch.nn.utils.clip_grad_norm_(model.trainable(), 1.0)
        optimizer.step()
    return step


def sft_work(config, frozen, device, dtype, rows=4):
    model, V = new_model(config, device, dtype), config.vocab_size
    prompts = random_ids(rows, PROMPT, vocabulary=V)
    responses = random_ids(rows, 1, RESPONSE, vocabulary=V)

    def loss():
        return sft.sft_loss(model.log_probs(M.pack(prompts, responses, device)), rows * RESPONSE)
    yield f"SFT step, {rows} rows", training_step(model, loss), rows * (PROMPT + RESPONSE)


def reward_work(config, frozen, device, dtype, rows=4, n=4):
    """A prompt has n responses, and all of their pairs are compared."""
    model, V = new_model(config, device, dtype, scalar=True), config.vocab_size
    prompts = random_ids(rows, PROMPT, vocabulary=V)
    responses = random_ids(rows, n, RESPONSE, vocabulary=V)
    first, second = torch.combinations(torch.arange(n)).T.to(device)

    def loss():
        r = model.rewards(M.pack(prompts, responses, device)).view(rows, n)
        return reward.bradley_terry_loss(r[:, first].flatten(), r[:, second].flatten())
    name = f"reward model step, {rows} prompts x {n} responses"
    yield name, training_step(model, loss), rows * (PROMPT + n * RESPONSE)


def ppo_work(config, frozen, device, dtype):
    policy = new_model(config, device, dtype).freeze(round(frozen * config.n_layer))
    ref_policy, reward_model = copy.deepcopy(policy).requires_grad_(False), policy.with_scalar_head()
    M.share_trunk(policy, ref_policy)
    value_model = ppo.make_value_model(policy, reward_model)
    optimizer = torch.optim.Adam(policy.trainable() + value_model.trainable(), lr=1e-6, fused=True)
    cfg, rng = ppo.Config(quiet=True), torch.Generator().manual_seed(0)
    prompts = random_ids(ROLLOUTS, PPO_PROMPT, vocabulary=config.vocab_size)
    path = Path(tempfile.mkdtemp()) / "ckpt_bench.pt"       # is never written
    run = Run("bench", cfg, optimizer, rng, [], path, policy=policy, value=value_model)

    def sample():
        ro = ppo.rollout(policy, ref_policy, value_model, reward_model, prompts, RESPONSE, None, 1.0, rng)
        rewards = ppo.token_rewards(ro.score, ppo.kl_estimate(ro.logp, ro.ref_logp), ro.mask, cfg.kl_coef)
        advantages, returns = ppo.gae(rewards, ro.values, ro.mask)
        return ro, ppo.whiten(advantages, ro.mask), returns
    tokens, rollout = ROLLOUTS * RESPONSE, sample()
    yield f"PPO rollout, {ROLLOUTS} responses", sample, tokens
    update = partial(ppo.update, policy, value_model, cfg=cfg, run=run)
    yield f"PPO update, {ROLLOUTS} responses", lambda: update(*rollout), tokens
    yield "PPO iteration", lambda: update(*sample()), tokens


def sample_work(config, frozen, device, dtype, n_prompts=64, n=1):
    model, rng = new_model(config, device, dtype), torch.Generator().manual_seed(0)
    prompts = random_ids(n_prompts, PPO_PROMPT, vocabulary=config.vocab_size)
    reward_model = model.with_scalar_head()

    def sample():
        samples = generate(model, prompts, NEW_TOKENS, n=n, rng=rng)
        return reward.score(reward_model, prompts, samples) if n > 1 else samples
    name = "sampling" if n == 1 else f"best-of-{n}"
    yield f"{name}, {n_prompts} prompts", sample, n_prompts * n * NEW_TOKENS


MODEL_WORK = {"sft": sft_work, "reward": reward_work, "ppo": ppo_work, "sample": sample_work,
              "bon": partial(sample_work, n_prompts=4, n=16)}


# ------------------------------------------------------------------------------------------------- measuring

def measure(work, repeats, device=None):
    """Median of the seconds that a function takes, after one run that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device and device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def peak_flops(device, dtype, repeats):
    """Operations a second of one large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / measure(lambda: a @ a, repeats, device)


def model_rows(names, size, device, dtype, repeats):
    """Rows of the work `names` with a model of one size: (work, median s, rate, of peak)."""
    peak = peak_flops(device, dtype, repeats)
    for name in names:
        for what, work, tokens in MODEL_WORK[name](*SIZES[size], device, dtype):
            seconds, of_peak = measure(work, repeats, device), ""
            if "step" in what or "update" in what:
                with FlopCounterMode(display=False) as counter:
                    work()
                of_peak = f"{counter.get_total_flops() / seconds / peak:.0%}"
            yield what, f"{seconds:.4g}", f"{tokens / seconds:,.0f} tokens/s", of_peak


def diversity_rows(repeats):
    ranks = np.random.default_rng(0).zipf(1.3, (500, 16, 30)).clip(max=5000)    # as the words of a text
    seconds = measure(partial(diversity.lexical_measures, ranks.astype(str).tolist()), repeats)
    yield ("all lexical measures, 500 prompts x 16 outputs of 30 words", f"{seconds:.4g}",
           f"{8000 / seconds:,.0f} outputs/s", "")


def main(cfg):
    known = [*MODEL_WORK, "diversity"]
    work = cfg.work.split(",") if cfg.work else known
    if not set(work) <= set(known):
        raise UserError(f"--work {cfg.work}: choose from {', '.join(known)}")
    torch.set_num_threads(cfg.threads or (1 if cfg.size == "tiny" else ALL_THREADS))
    dtype = DTYPES["bf16" if cfg.device == "cuda" else "fp32"]
    names = [name for name in work if name != "diversity"]
    rows = list(model_rows(names, cfg.size, torch.device(cfg.device), dtype, cfg.repeats))
    if "diversity" in work:
        rows += diversity_rows(cfg.repeats)
    print(text_table(["work", "median s", "rate", "of peak"], rows))


if __name__ == "__main__":
    launch(main, Config, __doc__)
