"""Sampling and best-of-N: outputs of a policy on each test set, scored by a reward model, the best kept.

    python bon.py --model ckpt_sft.pt --reward ckpt_reward.pt    # samples_sft_*.jsonl and samples_bon_*.jsonl
    python bon.py --model ckpt_ppo.pt                            # samples_ppo_*.jsonl, unscored
    python bon.py --model ckpt_ppo.pt --n 1 --temperature 0      # greedy
    python bon.py --model ckpt_sft.pt --reward ckpt_reward.pt --pool 4096 --soft 0.3

common/samples.py describes the lines of a sample file.

Best-of-N outputs come from a pool of scored samples of a prompt: N are drawn without replacement and the best
is kept, until there are as many as the policy itself has.  The authors' code does so for diversity.  This
resampling repeats texts: the best of a pool of 64 is in a quarter of all draws of 16.  `--pool 256
--independent` cuts the pool into 16 disjoint sixteens instead, at four times the price.

`--soft BETA` draws from the pool with weights exp(reward / BETA).  As pools grow these become samples of the
policy that maximises E[reward] - BETA KL(policy || SFT), which PPO is trained for: with BETA = 0.1 a pool of
thousands is needed.
"""
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

from common.dist import gather_rows, rank, world_size
from common.errors import UserError
from common.files import output_path, write_jsonl
from common.flags import Common, Count, Domain, Mass, Natural, NonNegative, OrNone, arg, launch, setup
from common.loop import Run
from common.samples import list_of_hashes, sample_path
from common.tokenizer import ends_of
from generate import generate
from published.tokenizer import chat_template
from reward import score
from splits import decode, encode_prompts, encode_response, load_bundle, load_reward_model

OrGreedy = Annotated[float, Domain("0 (greedy), or a number from 0.01 to 100",
                                   lambda x: x == 0 or 0.01 <= x <= 100)]
FEW = 16        # effective samples
_PAPER = dict(inputs=500, n=16, pool=64, temperature=1.0)
PRESETS = {"paper": _PAPER, "authors": _PAPER}


@dataclass
class Config(Common):
    model: str = arg("ckpt_sft.pt", "policy to sample")
    reward: str = arg("", "reward model, also a published one, that scores and chooses the best of N; none: "
                          "plain samples")
    policy: str = arg("", "its name in files and tables; '' takes ckpt_<name>.pt")
    splits: str = arg("", "comma-separated; '' is test and every ood_*")
    inputs: Count = arg(100, "prompts of each split; the paper's 500")
    n: Count = arg(16, "outputs kept for each prompt (K in the paper), and the N of best-of-N")
    pool: Natural = arg(0, "scored samples a prompt for best-of-N; 0: 4 x n.  Without --reward: just n")
    independent: bool = arg(False, "best-of-N outputs from disjoint parts of the pool, which must hold n x n")
    soft: NonNegative = arg(0.0, "beta: also n outputs drawn from the pool (--independent: each from a part "
                                 "of pool / n) with weights exp(reward / beta); 0: none")
    no_eos_score: OrNone = arg(-3.0, "reward of an output that did not end, as ppo.py's; none: the model's")
    chat: bool = arg(False, "prompts go through the published model's chat template; checkpoints remember it")
    temperature: OrGreedy = arg(1.0, "0 is greedy; the paper measures diversity at 1")
    top_k: Natural = arg(0, "0: all tokens")
    top_p: Mass = arg(1.0, "1: all tokens")
    max_new_tokens: Natural = arg(0, "tokens of an output; 0: as the checkpoint's task")
    batch_size: Count = arg(1024, "samples decoded together")
    quiet: bool = arg(False, "no progress bar")


def best_of_n_kl(n):
    """KL(best-of-n || policy) is at most log n - (n - 1) / n, in nats (equality: Stiennon et al. 2020,
    appendix G; the bound: Beirami et al. 2024, arXiv 2401.01879).  Raises ValueError for n < 1."""
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


def soft_weights(rewards, beta):
    """Weights (N,), of sum 1, with which N samples of a reference policy stand for samples of the optimum of
    E[r] - beta KL(policy || reference), pi*(y) = reference(y) exp(r(y) / beta) / Z (Korbak et al. 2022).
    rewards: (N,).  beta -> 0 is the best of N, beta -> infinity the reference."""
    w = np.exp((np.asarray(rewards) - np.max(rewards)) / beta)
    return w / w.sum()


def effective_size(weights):
    """How many samples of equal weight tell as much as these (Kong 1992): 1 / sum w^2, from 1 to N."""
    return float(1 / np.square(weights).sum())


def soft_kl(weights):
    """KL(pi* || reference) in nats by the samples' weights (N,): E_w[r] / beta - log mean exp(r / beta),
    which is sum w log(N w).  At most log N: too small where the effective size is."""
    w = weights[weights > 0]
    return float((w * np.log(len(weights) * w)).sum())


def soft_best_of_n(rewards, beta, k, rng, independent=False):
    """(indices (k,) of k outputs drawn by `soft_weights` from one prompt's pool, effective size, KL).
    independent: each from a k-th of the pool of its own, and size and KL are their means."""
    parts = np.split(np.arange(len(rewards) // k * k), k) if independent else [np.arange(len(rewards))] * k
    weights = [soft_weights(np.asarray(rewards)[part], beta) for part in parts]
    picks = np.array([rng.choice(part, p=w) for part, w in zip(parts, weights)])
    return picks, *(float(np.mean([measure(w) for w in weights])) for measure in (effective_size, soft_kl))


# --------------------------------------------------------------------------------------------------- sampling

def pool_size(cfg):
    """Samples a prompt.  Raises UserError if the best-of-N outputs cannot be drawn from so many."""
    pool, needed = cfg.pool or 4 * cfg.n, cfg.n ** 2 if cfg.independent else cfg.n
    if not cfg.reward:
        if cfg.soft:
            raise UserError("--soft: the weights of its draws are of a reward model; name it with --reward")
        return cfg.n
    if cfg.temperature == 0:
        raise UserError("--temperature 0: all samples of a prompt are the same, so there is no best of N; "
                        "leave out --reward")
    if pool < needed:
        raise UserError(f"--pool {pool} is too small: {needed} samples are needed for {cfg.n} outputs")
    return pool


def policy_name(cfg):
    """--policy, or what --model is called.  Raises UserError on a name that no file can have."""
    name = cfg.policy or Path(cfg.model).name.removesuffix(".pt").removeprefix("ckpt_")
    if not name or "/" in name or name.startswith("."):
        raise UserError(f"--policy {name}: it names files (samples_<name>_<split>.jsonl), so without / or a "
                        "leading dot")
    return name


def build(cfg, device):
    """(the policy's Bundle, reward model or None, {policy whose samples are written: hashes of the reward
    models that it has met}), the policy itself first and then, if there is a reward model, its best of N and
    with --soft its soft best of N."""
    bundle, policy = load_bundle(cfg, device), policy_name(cfg)
    if bundle.saved["task"] is None and not cfg.chat and chat_template(bundle.saved["tokenizer"]):
        print(f"{cfg.model} has a chat template: without --chat its prompts are plain text", flush=True)
    trained = bundle.saved["args"].get("trained_against")
    if not cfg.reward:
        return bundle, None, {policy: trained}
    reward_model, weights_hash = load_reward_model(cfg, bundle, device)
    chosen = [name if policy == "sft" else f"{policy}-{name}" for name in ["bon"] + ["soft"] * (cfg.soft > 0)]
    met = [*list_of_hashes(trained), weights_hash]
    return bundle, reward_model, {policy: trained, **dict.fromkeys(chosen, met)}


def read_test_sets(bundle, names, n):
    """{split: (its first n rows, the ids of their prompts)}.  names: comma-separated; "" is test and every
    ood_*.  Prints which splits have fewer."""
    task, test_sets = bundle.task, {}
    splits = [name.strip() for name in names.split(",")] if names else task.evaluation_splits()
    if not splits:
        raise UserError(f"--data {task.data}: no test.jsonl and no ood_<name>.jsonl to sample on")
    max_prompt_len = task.max_prompt_len(bundle.model.config.context)
    for split in splits:
        rows = task.rows(split, n)
        if len(rows) < n:
            print(f"{split} has {len(rows)} prompts, fewer than --inputs {n}: all are sampled", flush=True)
        test_sets[split] = rows, encode_prompts(bundle.tokenizer, [row["prompt"] for row in rows],
                                                max_prompt_len, f"{split} prompts")
    return test_sets


def pick_best(cfg, rewards, number):
    """Numbers of the n best-of-n outputs of one prompt.  rewards (pool,); number: of the prompt in its split.
    The draws belong to the prompt, so that a run that goes on makes the same."""
    if cfg.independent:
        return best_of_n_independent(rewards, cfg.n, cfg.n)
    return best_of_n(rewards, cfg.n, cfg.n, np.random.default_rng((cfg.seed, number)))


def score_texts(model, tokenizer, prompts, outputs, limit, no_eos_score):
    """Rewards of outputs, lists of (text, finished) for each of the prompts (id lists): of the texts, cut at
    `limit` tokens, as a reader of the file scores them.  What did not end gets the fixed no_eos_score (None:
    it does not), or the best of N would be what never ends."""
    rewards = score(model, prompts, [[encode_response(tokenizer, text, limit, finished)
                                      for text, finished in group] for group in outputs])
    return [[r if finished or no_eos_score is None else no_eos_score
             for r, (_, finished) in zip(*of_prompt)] for of_prompt in zip(rewards, outputs)]


def pick(cfg, rewards, start, sizes):
    """For each prompt the numbers of the best-of-n outputs, and with --soft those of the soft draws, whose
    (effective size, KL) are added to the list `sizes`.  rewards: of each prompt's pool; start: the number of
    the first prompt in its split."""
    picks = [[pick_best(cfg, r, start + i) for i, r in enumerate(rewards)]]
    if cfg.soft:
        drawn = [soft_best_of_n(r, cfg.soft, cfg.n, np.random.default_rng((cfg.seed, start + i, 1)),
                                cfg.independent) for i, r in enumerate(rewards)]
        picks.append([kept for kept, *_ in drawn])
        sizes.extend(size_and_kl for _, *size_and_kl in drawn)
    return picks


def sample_lines(rows, outputs, rewards, picks, **fields):
    """Lines of a sample file.  For each row outputs has (text, finished) pairs, rewards floats or None, and
    picks the numbers of the outputs kept; fields: of every line."""
    lines = []
    for row, pairs, r, kept in zip(rows, outputs, rewards, picks):
        texts, finished = map(list, zip(*(pairs[j] for j in kept)))
        lines.append({"id": row["id"], "prompt": row["prompt"], "reference": row["reference"],
                      "outputs": texts, "rewards": r and [round(r[j], 5) for j in kept],
                      "finished": finished, **fields})
    return lines


def write_split(out, split, lines_of, soft):
    """Writes the sample files of one split.  lines_of: {policy: its lines}; soft: of each prompt (effective
    size, KL) of the soft draws."""
    for policy, lines in lines_of.items():
        write_jsonl(sample_path(out, policy, split), lines)
        unfinished = 1 - np.mean([line["finished"] for line in lines])
        tqdm.write(f"{split}: {policy}, {len(lines)} prompts, {unfinished:.1%} of the outputs are unfinished")
    if soft:
        (size, kl), least = np.mean(soft, axis=0), np.median(soft, axis=0)[0]
        tqdm.write(f"{split}: soft draws, KL {kl:.2f} nats, from {size:.0f} effective samples (median "
                   f"{least:.0f})")
        if least < FEW:
            tqdm.write(f"with fewer than {FEW} the draws are nearer to the best of N than to the optimum: "
                       "raise --pool or --soft")


def main(cfg):
    device, rng = setup(cfg)
    pool = pool_size(cfg)
    bundle, reward_model, against = build(cfg, device)
    policy, *chosen = against
    test_sets = read_test_sets(bundle, cfg.splits, cfg.inputs)
    per_step = max(1, cfg.batch_size // pool) * world_size()        # prompts
    parts = [(split, i) for split, (rows, _) in test_sets.items() for i in range(0, len(rows), per_step)]
    file = sample_path("", policy, "+".join(test_sets)[:99]).name   # a file's name has at most 255 bytes
    run = Run(f"sample {policy}", replace(cfg, save_every=0.), None, rng,       # a state after each step
              [bundle.saved["weights_hash"], against, per_step, test_sets], path=output_path(cfg.out, file))

    for step in run.steps(len(parts)):
        split, start = parts[step]
        rows, prompts = (of_split[start:start + per_step] for of_split in test_sets[split])
        sampled = gather_rows(generate(
            bundle.model, prompts, bundle.task.max_new_tokens, pool, cfg.temperature, cfg.top_k, cfg.top_p,
            ends_of(bundle.tokenizer), rng, cfg.batch_size, ranks=(rank(), world_size())))
        outputs = [[decode(bundle.tokenizer, ids) for ids in group] for group in sampled]
        rewards, picks_of = [None] * len(rows), {policy: [range(cfg.n)] * len(rows)}
        if reward_model:
            rewards = score_texts(reward_model, bundle.tokenizer, prompts, outputs,
                                  bundle.task.max_new_tokens, cfg.no_eos_score)
            picks_of |= zip(chosen, pick(cfg, rewards, start, run.state.setdefault("soft", [])))
        lines_of = run.state.setdefault("lines", {})        # of this split, by policy
        for name, picks in picks_of.items():
            lines_of.setdefault(name, []).extend(sample_lines(
                rows, outputs, rewards, picks, task=bundle.task.name, split=split,
                temperature=cfg.temperature, seed=cfg.seed, policy=name, trained_against=against[name]))
        if start + per_step >= len(test_sets[split][0]):
            write_split(cfg.out, split, run.state.pop("lines"), run.state.pop("soft", []))

    run.finish()
    print("wrote " + " and ".join(str(sample_path(cfg.out, name, "*")) for name in against), flush=True)
    if reward_model:
        print(f"KL(best-of-{cfg.n} || {policy}) <= {best_of_n_kl(cfg.n):.2f} nats", flush=True)
    print(f"next: python generalisation.py {Path(cfg.out) / 'samples_*.jsonl'}, and diversity.py", flush=True)


if __name__ == "__main__":
    launch(main, Config, __doc__, PRESETS)
