"""Sampling and best-of-N: outputs of a policy on each test set, scored by a reward model, the best kept.

    python bon.py --model ckpt_sft.pt --reward ckpt_reward.pt    # samples_sft_*.jsonl and samples_bon_*.jsonl
    python bon.py --model ckpt_ppo.pt                            # samples_ppo_*.jsonl, unscored
    python bon.py --model ckpt_ppo.pt --n 1 --temperature 0      # greedy

common/samples.py describes the lines of a sample file.

Best-of-N outputs come from a pool of scored samples of a prompt, as in the authors' code: N are drawn without
replacement and the best is kept, until there are as many as the policy itself has.  This resampling repeats
texts: the best of a pool of 64 is in a quarter of all draws of 16.  `--pool 256 --independent` cuts the pool
into 16 disjoint sixteens instead, at four times the price. """
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from common import pretrained
from common.checkpoint import load_checkpoint
from common.dist import gather_rows, rank, world_size
from common.errors import check
from common.files import write_jsonl
from common.flags import Common, Count, Mass, Natural, NonNegative, run, setup
from common.loop import Run
from common.samples import sample_line, sample_path
from common.tokenizer import load_tokenizer
from model import generate
from reward import score
from splits import decode, encode_prompts, task_of

PRESETS = {"paper": dict(inputs=500, n=16, pool=64, temperature=1.0)}


@dataclass
class Config(Common):
    model: str = "ckpt_sft.pt"  # policy to sample
    reward: str = ""            # reward model that scores, and chooses the best of N; none: plain samples
    policy: str = ""            # its name in files and tables; "" takes ckpt_<name>.pt
    splits: str = ""            # comma-separated; "" is test and every ood_*
    inputs: Count = 100         # prompts of each split; the paper's 500
    n: Count = 16               # outputs kept for each prompt (K in the paper), and the N of best-of-N
    pool: Natural = 0           # scored samples a prompt for best-of-N; 0: 4 x n with --reward, n without
    independent: bool = False   # best-of-N outputs from disjoint parts of the pool, which must hold n x n
    temperature: NonNegative = 1.0  # 0 is greedy; the paper measures diversity at 1
    top_k: Natural = 0          # 0: all tokens
    top_p: Mass = 1.0           # 1: all tokens
    max_new_tokens: Natural = 0     # tokens of an output; 0: as the checkpoint's task
    batch_size: Count = 1024    # samples decoded together
    quiet: bool = False         # no progress bar


def best_of_n_kl(n):
    """KL(best-of-n || policy) is at most log n - (n - 1) / n, in nats (Stiennon et al. 2020, appendix G).
    Raises ValueError for n < 1."""
    if n < 1:
        raise ValueError(f"best_of_n_kl: n = {n} must be at least 1")
    return math.log(n) - (n - 1) / n


def best_of_n(rewards, n, k, rng):
    """Indices (k,) of k best-of-n outputs from one prompt's pool, rewards (pool,): each the best of n drawn
    without replacement.  rng: numpy's.  Raises ValueError if the pool holds fewer than n."""
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


# --------------------------------------------------------------------------------------------------- sampling

def load_reward_model(name, policy_name, spec, device, dtype):
    """--reward -> (reward model, hash of its weights), or (None, None) for ""."""
    if not name:
        return None, None
    reward_model, saved = load_checkpoint(name, "reward", "--reward", device, dtype)
    check(saved["tokenizer"] == spec, f"--reward {name} and --model {policy_name} have different tokenizers: "
          "the same ids would mean different words; train the reward model from this policy's family (python "
          "reward.py --model ...)")
    return reward_model, saved["weights_hash"]


def pool_size(cfg):
    """Samples a prompt.  Raises UserError if the best-of-N outputs cannot be drawn from so many."""
    pool = cfg.pool or (4 * cfg.n if cfg.reward else cfg.n)
    check(pool >= cfg.n, f"--pool {pool} is smaller than --n {cfg.n}")
    check(not cfg.independent or pool >= cfg.n ** 2,
          f"--independent needs --pool {cfg.n ** 2}, {cfg.n} outputs of {cfg.n} samples each")
    return pool


def sample_folder(out):
    """Makes --out."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        check(False, f"--out {out}: this is a file; sample files need a folder")


def read_splits(task, names, n):
    """{split: its first n rows}.  names: comma-separated; "" is test and every ood_*."""
    splits = names.split(",") if names else task.evaluation_splits()
    check(splits, f"{task.data}: no test.jsonl and no ood_<name>.jsonl to sample on")
    return {split: task.rows(split, n) for split in splits}


def write_samples(path, tokenizer, rows, sampled, rewards, picks, **fields):
    """A sample file with the outputs `picks` of each prompt.  sampled: for each row its id lists; rewards:
    for each row its floats, or None; picks: for each row the numbers of the outputs kept; fields: of every
    line."""
    lines = []
    for row, ids, r, kept in zip(rows, sampled, rewards, picks):
        texts, finished = zip(*(decode(tokenizer, ids[j]) for j in kept))
        lines.append(sample_line(row, texts, finished, r and [r[j] for j in kept], **fields))
    write_jsonl(path, lines)


def main(cfg):
    device, rng = setup(cfg)
    pool = pool_size(cfg)
    model, saved = pretrained.load(cfg.model, "--model", device, cfg.dtype)
    task, tokenizer = task_of(cfg, saved), load_tokenizer(saved["tokenizer"])
    max_prompt_len = task.max_prompt_len(model.config.context)
    reward_model, reward_hash = load_reward_model(cfg.reward, cfg.model, saved["tokenizer"], device,
                                                  cfg.dtype)
    splits = read_splits(task, cfg.splits, cfg.inputs)      # all of them, before anything is written
    policy = cfg.policy or Path(cfg.model).stem.removeprefix("ckpt_")
    best_policy = "bon" if policy == "sft" else f"{policy}-bon"
    sample_folder(cfg.out)
    inputs = [saved["weights_hash"], reward_hash, [[r["id"] for r in rows] for rows in splits.values()]]
    run = Run(f"sample {policy}", replace(cfg, save_every=0.), None, rng, inputs,
              path=sample_path(cfg.out, policy, "+".join(splits)))          # a state after each split
    numpy_rng = np.random.default_rng(cfg.seed)
    numpy_rng.bit_generator.state = run.state.get("numpy_rng", numpy_rng.bit_generator.state)

    for step in run.steps(len(splits)):
        split, rows = list(splits.items())[step]
        prompts = encode_prompts(tokenizer, [r["prompt"] for r in rows], max_prompt_len, f"{split} prompts")
        sampled = gather_rows(generate(
            model, prompts, task.max_new_tokens, n=pool, temperature=cfg.temperature, top_k=cfg.top_k,
            top_p=cfg.top_p, eos=tokenizer.eot_token, rng=rng, batch_size=cfg.batch_size,
            ranks=(rank(), world_size())))
        rewards = score(reward_model, prompts, sampled) if reward_model else [None] * len(rows)
        fields = {"task": task.name, "split": split, "temperature": cfg.temperature, "seed": cfg.seed}
        write_samples(sample_path(cfg.out, policy, split), tokenizer, rows, sampled, rewards,
                      [range(cfg.n)] * len(rows), **fields, policy=policy,
                      trained_against=saved["args"].get("trained_against"))
        if reward_model:
            pick = best_of_n_independent if cfg.independent else partial(best_of_n, rng=numpy_rng)
            write_samples(sample_path(cfg.out, best_policy, split), tokenizer, rows, sampled, rewards,
                          [pick(r, cfg.n, cfg.n) for r in rewards], **fields, policy=best_policy,
                          trained_against=reward_hash)
        run.state["numpy_rng"] = numpy_rng.bit_generator.state
        finished = np.mean([ids[-1] == tokenizer.eot_token for samples in sampled for ids in samples])
        print(f"{split}: {len(rows)} prompts x {pool} samples of {policy} at temperature "
              f"{cfg.temperature:g}, {1 - finished:.1%} unfinished", flush=True)

    run.finish()
    print(f"wrote {sample_path(cfg.out, policy, '*')}", flush=True)
    if reward_model:
        print(f"wrote {sample_path(cfg.out, best_policy, '*')}: KL(best-of-{cfg.n} || {policy}) <= "
              f"{best_of_n_kl(cfg.n):.2f} nats", flush=True)


if __name__ == "__main__":
    run(main, Config, __doc__, PRESETS)
