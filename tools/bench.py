"""How long the work takes that people wait for, on this machine.

    python -m tools.bench                               # every row: a quarter of an hour on two cores
    python -m tools.bench --work sft,diversity          # some of them

Prints its rows and writes them to results/speed.json.  A row is the median of --repeats runs; models run once
more before, which does not count.  They have random weights and responses of fixed lengths, so every machine
does the same work.  Where there is a GPU, gpt2 runs there too, in bf16.
"""
import datetime
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import diversity
import model as M
import ppo
import reward
import sft
from common.errors import UserError
from common.files import output_path, write_json
from common.flags import ALL_THREADS, DTYPES, Count, Flags, arg, launch
from common.loop import Run
from generate import generate

SIZES = {   # name: (configuration, fraction of the layers frozen in PPO)
    "tiny": (M.GPTConfig(**M.SHAPES["tiny"] | {"vocab_size": 512, "context": 512}), 0.5),
    "gpt2": (M.GPTConfig(**M.SHAPES["gpt2"]), 0.8),
}
PROMPT, RESPONSE = 256, 32      # tokens of SFT's rows
PPO_PROMPT, ROLLOUTS = 64, 32   # of a PPO iteration: 2 epochs of 2 minibatches, responses of RESPONSE tokens
NEW_TOKENS = 48                 # of a sample
LEXICAL = {     # (outputs, of them in one set).  growth: measures that are linear have the same rate in both
    "diversity": [(8000, 16)],
    "growth": [(1000, 1000), (64000, 64000), (1000, 16), (64000, 16)],
}


@dataclass
class Config(Flags):
    work: str = arg("", "comma-separated: sft, ppo, sample, bon, diversity, growth; '': all")
    repeats: Count = arg(5, "runs of each row; the median counts")
    out: str = arg("results", "folder of speed.json")


def random_ids(*shape, vocabulary):
    return np.random.default_rng(0).integers(1, vocabulary, shape).tolist()


def new_model(config, device, dtype):
    torch.manual_seed(0)
    return M.GPT(config).to(device).compute_in(dtype)


# --------------------------------------------------------------------- the work: (name, function, its tokens)

def sft_work(config, frozen, device, dtype, rows=4):
    model = new_model(config, device, dtype)
    optimizer = torch.optim.AdamW(model.trainable(), lr=1e-6, fused=True)
    prompts = random_ids(rows, PROMPT, vocabulary=config.vocab_size)
    responses = random_ids(rows, 1, RESPONSE, vocabulary=config.vocab_size)

    def step():
        optimizer.zero_grad()
        sft.sft_loss(model.log_probs(M.pack(prompts, responses, device)), rows * RESPONSE).backward()
        torch.nn.utils.clip_grad_norm_(model.trainable(), 1.0)
        optimizer.step()
    yield f"SFT step, {rows} rows", step, rows * (PROMPT + RESPONSE)


def ppo_work(config, frozen, device, dtype):
    cfg, rng = ppo.Config(freeze=frozen, quiet=True), torch.Generator().manual_seed(0)
    policy, ref_policy = ppo.make_policies(cfg, new_model(config, device, dtype))
    reward_model = policy.with_scalar_head()
    value_model = ppo.make_value_model(policy, reward_model)
    optimizer = torch.optim.Adam(policy.trainable() + value_model.trainable(), lr=1e-6, fused=True)
    prompts = random_ids(ROLLOUTS, PPO_PROMPT, vocabulary=config.vocab_size)

    def sample():
        ro = ppo.rollout(policy, ref_policy, value_model, reward_model, prompts, RESPONSE, None, 1.0, rng)
        rewards = ppo.token_rewards(ro.score, ppo.kl_estimate(ro.logp, ro.ref_logp), ro.mask, cfg.kl_coef)
        advantages, returns = ppo.gae(rewards, ro.values, ro.mask)
        return ro, ppo.whiten(advantages, ro.mask), returns
    tokens, rollout = ROLLOUTS * RESPONSE, sample()
    yield f"PPO rollout, {ROLLOUTS} responses", sample, tokens
    with tempfile.TemporaryDirectory() as folder:       # of a log that stays empty
        run = Run("bench", cfg, optimizer, rng, [], Path(folder) / "ckpt_bench.pt", policy=policy)
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


MODEL_WORK = {"sft": sft_work, "ppo": ppo_work, "sample": sample_work,
              "bon": partial(sample_work, n_prompts=4, n=16)}


# ------------------------------------------------------------------------------------------------- measuring

def measured(name, size, work, amount, unit, repeats, device=torch.device("cpu")):
    """A row: the median of the seconds that work() takes, and how many of a unit it does in one."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    return {"work": name, "size": size, "median_s": median, "rate": amount / median, "unit": f"{unit}/s"}


def model_rows(names, size, device, dtype, repeats):
    """Rows of the work `names` with a model of one size."""
    config, frozen = SIZES[size]
    where = size if device.type == "cpu" else f"{size}, {torch.cuda.get_device_name(device)}, bf16"
    for name in names:
        for what, work, tokens in MODEL_WORK[name](config, frozen, device, dtype):
            work()      # this run does not count
            yield measured(what, where, work, tokens, "tokens", repeats, device)


def lexical_row(n, in_a_set, repeats):
    """All lexical measures of n outputs, some words more frequent than others, as in a text (Zipf).  Those of
    64,000 are measured once, because they take minutes."""
    ids = np.random.default_rng(0).zipf(1.3, (n, 30)).clip(max=5000)
    texts = [[f"w{i}" for i in row] for row in ids]
    sets = [texts[i:i + in_a_set] for i in range(0, n, in_a_set)]
    return measured(f"lexical measures, {n:,} outputs in sets of {in_a_set:,}", "30 words each",
                    partial(diversity.lexical_measures, sets), n, "outputs", 1 if n > 8000 else repeats)


def all_rows(cfg):
    known = [*MODEL_WORK, *LEXICAL]
    work = cfg.work.split(",") if cfg.work else known
    if not set(work) <= set(known):
        raise UserError(f"--work {cfg.work}: choose from {', '.join(known)}")
    names = [name for name in work if name in MODEL_WORK]
    for size in SIZES:
        torch.set_num_threads(1 if size == "tiny" else ALL_THREADS)     # as common.flags.use_threads has it
        yield from model_rows(names, size, torch.device("cpu"), DTYPES["fp32"], cfg.repeats)
        if size == "gpt2" and torch.cuda.is_available():
            yield from model_rows(names, size, torch.device("cuda"), DTYPES["bf16"], cfg.repeats)
    for n, in_a_set in (shape for name in work for shape in LEXICAL.get(name, ())):
        yield lexical_row(n, in_a_set, cfg.repeats)


def machine():
    """The processor's name, on Linux, and the number of cores."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {ALL_THREADS} cores"


def main(cfg):
    path, rows = output_path(cfg.out, "speed.json"), []
    for row in all_rows(cfg):
        rows.append(row)
        print(f"{row['work']:52} {row['size']:26}"
              f"{row['median_s']:9.4g} s {row['rate']:11,.0f} {row['unit']}", flush=True)
    write_json(path, {"machine": machine(), "torch": torch.__version__,
                      "date": datetime.date.today().isoformat(), "rows": rows})
    print(f"wrote {path}")


if __name__ == "__main__":
    launch(main, Config, __doc__)
