"""Sampling and best-of-N: outputs of a policy on each test set, scored by a reward model, the best kept.

    python bon.py --model ckpt_sft.pt --reward ckpt_reward.pt    # samples_sft_*.jsonl and samples_bon_*.jsonl
    python bon.py --model ckpt_ppo.pt                            # samples_ppo_*.jsonl, unscored
    python bon.py --model ckpt_ppo.pt --n 1 --temperature 0      # greedy

A line: {"id", "prompt", "reference", "outputs": [N], "rewards": [N] or null, "policy", "split",
"temperature", "seed"}, and besides "finished": [N], whether each output ended by itself, and
"trained_against", the reward model that chose the outputs or trained the policy.

Best-of-N outputs come from a pool of scored samples of a prompt, as in the authors' code: N are drawn without
replacement and the best is kept, until there are as many as the policy itself has.  Mind what that measures:
of a pool of 64 the best is in a quarter of all draws of 16, so such outputs repeat more than independent
best-of-16 would.  `--pool 256 --independent` cuts the pool into 16 disjoint sixteens instead, at four times
the price.
"""
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import model as M
from parallel import gather, rank, size
from pretrained import load_model
from reward import score
from runtime import Common, Resume, load_checkpoint, require, run, setup, write_jsonl
from splits import decode, encode_prompts, task_of, tokenizer


PRESETS = {"paper": dict(inputs=500, n=16, pool=64, temperature=1.0)}


@dataclass
class Config(Common):
    model: str = "ckpt_sft.pt"  # policy to sample
    reward: str = ""            # reward model that scores, and chooses the best of N; none: plain samples
    policy: str = ""            # its name in files and tables; "" takes ckpt_<name>.pt
    splits: str = ""            # comma-separated; "" is test and every ood_*
    inputs: int = 100           # prompts of each split; the paper's 500
    n: int = 16                 # outputs kept for each prompt (K in the paper), and the N of best-of-N
    pool: int = 0               # scored samples a prompt for best-of-N; 0: 4 x n with --reward, n without
    independent: bool = False   # best-of-N outputs from disjoint parts of the pool, which must hold n x n
    temperature: float = 1.0    # 0 is greedy; the paper measures diversity at 1
    top_k: int = 0              # 0: all tokens
    top_p: float = 1.0          # 1: all tokens
    max_new_tokens: int = 0     # tokens of an output; 0: as the checkpoint's task
    batch: int = 1024           # samples decoded together
    quiet: bool = False         # no progress bar


def best_of_n_kl(n):
    """KL(best-of-n || policy) is at most log n - (n - 1) / n, in nats (Stiennon et al. 2020, appendix G).
    Raises ValueError for n < 1."""
    if n < 1:
        raise ValueError(f"best_of_n_kl: n = {n} must be at least 1")
    return math.log(n) - (n - 1) / n


def best_of_n(rewards, n, k, rng):
    """Indices of k best-of-n outputs from one prompt's pool, rewards (pool,): each the best of n drawn
    without replacement.  (k,)

    Raises ValueError if the pool holds fewer than n."""
    if not 1 <= n <= len(rewards):
        raise ValueError(f"best_of_n: cannot draw {n} of a pool of {len(rewards)}")
    rewards = np.asarray(rewards)
    # the n smallest of one random number per sample are a draw without replacement
    draws = rng.random((k, len(rewards))).argsort(axis=1)[:, :n]
    return draws[np.arange(k), rewards[draws].argmax(axis=1)]


def best_of_n_independent(rewards, n, k):
    """Indices (k,) of the best of each of k disjoint parts of n.  Raises ValueError if the pool, rewards
    (pool,), holds fewer than n x k."""
    if len(rewards) < n * k:
        raise ValueError(f"best_of_n_independent: a pool of {len(rewards)} has no {k} disjoint parts of {n}")
    return np.asarray(rewards)[:n * k].reshape(k, n).argmax(axis=1) + np.arange(k) * n


def sample_file(out, policy, split):
    return Path(out) / f"samples_{policy}_{split}.jsonl"


def sample_line(enc, row, sampled, rewards, picks, more):
    """One line of a sample file: the outputs `picks` of one prompt.  sampled: its id lists; rewards: floats
    or None; more: the fields all lines of the file share."""
    texts, finished = zip(*(decode(enc, sampled[j]) for j in picks))
    return {"id": row["id"], "prompt": row["prompt"], "reference": row["reference"], "outputs": texts,
            "rewards": rewards and [round(rewards[j], 5) for j in picks], "finished": finished, **more}


def main(cfg):
    device, generator = setup(cfg)
    require(cfg.n >= 1, f"--n {cfg.n}: at least one output is needed")
    require(cfg.inputs >= 1 and cfg.batch >= 1,
            f"--inputs {cfg.inputs} and --batch {cfg.batch} must be at least 1")
    require(cfg.temperature >= 0, f"--temperature {cfg.temperature}: it cannot be negative; 0 is greedy")
    require(cfg.top_k >= 0 and 0 < cfg.top_p <= 1,
            f"--top-k {cfg.top_k} must be at least 0, --top-p {cfg.top_p} in (0, 1]")
    pool = cfg.pool or (4 * cfg.n if cfg.reward else cfg.n)
    require(pool >= cfg.n, f"--pool {pool} is smaller than --n {cfg.n}")
    require(not cfg.independent or pool >= cfg.n ** 2,
            f"--independent needs --pool {cfg.n ** 2}, {cfg.n} outputs of {cfg.n} samples each")
    model, saved = load_model(cfg.model, "--model", device, cfg.dtype)
    task, enc = task_of(cfg, saved), tokenizer(saved["tokenizer"])
    reward, against = None, saved["args"].get("trained_against")
    if cfg.reward:
        reward, judged = load_checkpoint(cfg.reward, "reward", "--reward", device, cfg.dtype)
        require(judged["tokenizer"] == saved["tokenizer"],
                f"--reward {cfg.reward} and --model {cfg.model} have different tokenizers: the same ids "
                "would mean different words; train the reward model from this policy's family (python "
                "reward.py --model ...)")
    names = cfg.splits.split(",") if cfg.splits else task.evaluation_splits()
    require(names, f"{task.data}: no test.jsonl and no ood_<name>.jsonl to sample on")
    # all read before anything is written
    every = {split: task.rows(split, cfg.inputs) for split in names}
    policy = cfg.policy or Path(cfg.model).stem.removeprefix("ckpt_")
    room = task.room(model.config.context)
    try:
        Path(cfg.out).mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        require(False, f"--out {cfg.out}: this is a file; sample files need a folder")

    best_name = "bon" if policy == "sft" else f"{policy}-bon"
    rng = np.random.default_rng(cfg.seed)
    ids = [[r["id"] for r in rows] for rows in every.values()]
    inputs = [saved["digest"], judged["digest"] if reward else None, ids]
    resume = Resume(sample_file(cfg.out, policy, "+".join(names)), cfg, inputs, generator)
    resume.every = 0            # a state after each split: it is small
    done, carried = resume.load()
    if done:
        rng.bit_generator.state = carried["rng"]
    bar = tqdm(list(every.items())[done:], desc=f"sample {policy}", disable=cfg.quiet or None)
    for number, (split, rows) in enumerate(bar, done + 1):
        prompts = encode_prompts(enc, [r["prompt"] for r in rows], room, f"{split} prompts")
        sampled = gather(M.generate(model, prompts, task.max_new_tokens, n=pool, temperature=cfg.temperature,
                                    top_k=cfg.top_k, top_p=cfg.top_p, eos=enc.eot_token, generator=generator,
                                    batch_size=cfg.batch, share=(rank(), size())))
        rewards = score(reward, prompts, sampled) if reward else [None] * len(rows)
        own = {"policy": policy, "split": split, "temperature": cfg.temperature, "seed": cfg.seed,
               "trained_against": against}
        write_jsonl(sample_file(cfg.out, policy, split),
                    [sample_line(enc, *row, range(cfg.n), own) for row in zip(rows, sampled, rewards)])
        if reward:
            pick = best_of_n_independent if cfg.independent else partial(best_of_n, rng=rng)
            chosen = own | {"policy": best_name, "trained_against": judged["digest"]}
            write_jsonl(sample_file(cfg.out, best_name, split),
                        [sample_line(enc, row, ids, r, pick(r, cfg.n, cfg.n), chosen)
                         for row, ids, r in zip(rows, sampled, rewards)])
        ended = np.mean([ids[-1] == enc.eot_token for group in sampled for ids in group])
        print(f"{split}: {len(rows)} prompts x {pool} samples of {policy} at temperature "
              f"{cfg.temperature:g}, {1 - ended:.1%} unfinished", flush=True)
        resume.step_done(number, rng=rng.bit_generator.state)
    resume.finish()
    print(f"wrote {sample_file(cfg.out, policy, '*')}", flush=True)
    if reward:
        print(f"wrote {sample_file(cfg.out, best_name, '*')}: KL(best-of-{cfg.n} || {policy}) <= "
              f"{best_of_n_kl(cfg.n):.2f} nats", flush=True)


if __name__ == "__main__":
    run(main, Config, __doc__, PRESETS)
