"""Is it RL, or just sharpening?  Quality against diversity of SFT over temperature, best-of-N over N, PPO
over beta.

`python reproduce.py --full` runs this on the test prompts in distribution, with systematic noise.  SFT at a
lower temperature and best-of-N also trade diversity for quality, without RL.  PPO is more than they are if
its win rate is higher at equal gold diversity.
"""
import json

import numpy as np
import torch

import model as M
from bon import best_of_n_kl, sample_lines
from common.checkpoint import load_checkpoint
from common.files import write_json, write_jsonl
from common.samples import read_samples
from common.stats import of_seeds, over_seeds
from common.tokenizer import load_tokenizer
from generalisation import gold_scores, reward_scores, wins
from reward import score
from splits import Task, encode_prompts, encode_response
from study.names import BEST_OF, BETA, BETAS, DIVERSITY, QUALITY, pick, ppo_name

KEPT = 8                        # independent best-of-N outputs of a prompt


# ------------------------------------------------------------------------------------------------- the stages

def load_with_task(path, kind):
    """(model, tokenizer, task) of a checkpoint."""
    model, saved = load_checkpoint(path, kind)
    return model, load_tokenizer(saved["tokenizer"]), Task(**saved["task"])


def sample_best_of(here, seed, inputs):
    """SFT's best-of-N for N = 1 ... 64 on the test prompts -> best_of_<N>.jsonl: KEPT outputs a prompt, each
    the best of samples of its own, so that they are independent.  One pool serves every N: the first N of
    each part of 64."""
    rng = torch.Generator().manual_seed(seed)
    policy, tokenizer, task = load_with_task(here / "ckpt_sft.pt", "lm")
    reward_model, _ = load_checkpoint(here / "ckpt_reward.pt", "reward")
    rows, largest = task.rows("test", inputs), BEST_OF[-1]
    max_prompt_len = task.max_prompt_len(policy.config.context)
    prompts = encode_prompts(tokenizer, [r["prompt"] for r in rows], max_prompt_len)
    sampled = M.generate(policy, prompts, task.max_new_tokens, n=KEPT * largest, eos=tokenizer.eot_token,
                         rng=rng, batch_size=2048)
    rewards = score(reward_model, prompts, sampled)
    for n in BEST_OF:
        best = [np.reshape(r, (KEPT, largest))[:, :n].argmax(axis=1) for r in rewards]
        picks = [(b + np.arange(KEPT) * largest).tolist() for b in best]
        lines = sample_lines(tokenizer, rows, sampled, rewards, picks, task=task.name, policy=f"bon{n}",
                             split="test", temperature=1.0, seed=seed)
        write_jsonl(here / f"best_of_{n}.jsonl", lines)


@torch.no_grad()
def sampled_kl(policy, ref_policy, tokenizer, task, rows, temperature, batch_size=8):
    """KL(policy at `temperature` || ref_policy at 1) in nats a response, by k1 on the policy's own samples.
    rows: lines of a sample file, whose outputs are encoded again; batch_size: prompts at once."""
    max_prompt_len = task.max_prompt_len(policy.config.context)
    prompts, total, count = encode_prompts(tokenizer, [r["prompt"] for r in rows], max_prompt_len), 0., 0
    ids = [[encode_response(tokenizer, text, task.max_new_tokens, finished)
            for text, finished in zip(row["outputs"], row["finished"])] for row in rows]
    for i in range(0, len(rows), batch_size):
        packed = M.pack(prompts[i:i + batch_size], ids[i:i + batch_size])
        logp = M.log_probs(policy, policy(packed), packed, temperature)
        total += (logp - M.log_probs(ref_policy, ref_policy(packed), packed)).sum().item()
        count += len(packed.lengths)
    return total / count


def measure_frontier(here):
    """Every sample file of the three families -> frontier.json: of each prompt wins, gold reward, reward and
    gold diversity; KL from SFT (none for best-of-N, whose KL has a known bound)."""
    sft, tokenizer, task = load_with_task(here / "ckpt_sft.pt", "lm")
    reward_model, _ = load_checkpoint(here / "ckpt_reward.pt", "reward")
    names, lines = ["sft", "ppo_gold", *_in_order_of_the_study()], []
    sampled = [path for name in names for path in sorted(here.glob(f"t*/samples_{name}_test.jsonl"))]
    for path in sampled + [here / f"best_of_{n}.jsonl" for n in BEST_OF]:
        rows = read_samples(path)
        policy, temperature = rows[0]["policy"], rows[0]["temperature"]
        gold, references = gold_scores(rows)
        kl = None
        if path in sampled:
            model, _ = load_checkpoint(here / f"ckpt_{policy}.pt", "lm")
            kl = sampled_kl(model, sft, tokenizer, task, rows, temperature)
        rewards, _ = reward_scores(rows, reward_model, tokenizer, task)
        lines.append({"policy": policy, "temperature": temperature, "kl": kl,
                      "wins": wins(gold, references).tolist(),
                      "gold_reward": np.mean(gold, axis=1).tolist(),
                      "reward": np.mean(rewards, axis=1).tolist(),
                      "gold_diversity": [task.synthetic.gold_diversity(r["outputs"])[0] for r in rows]})
    write_json(here / "frontier.json", lines, indent=None)


def _in_order_of_the_study():
    return [ppo_name(beta) for beta in (BETA, *(b for b in BETAS if b != BETA))]


# ------------------------------------------------------------------------------------------------ the numbers

class Frontier:
    """frontier.json of all seeds.  A key is (policy, temperature)."""

    def __init__(self, seeds):
        self.lines = [{(x["policy"], x["temperature"]): x for x in seed} for seed in seeds]
        self.keys = list(self.lines[0])

    def get(self, key, measure):
        """(seeds, prompts)"""
        return np.array([seed[key][measure] for seed in self.lines], dtype=float)

    def kl(self, key):
        """Mean over seeds, nats; of best-of-N its bound."""
        if key[0].startswith("bon"):
            return best_of_n_kl(int(key[0].removeprefix("bon")))
        return float(np.mean([seed[key]["kl"] for seed in self.lines]))

    def above(self, key, curve):
        """Win rate of `key` less that of `curve`, a list of keys, at the same gold diversity, interpolated:
        {mean, low, high, inside}.  inside: whether the curve reaches that diversity, else its nearest end is
        taken."""
        # `key` first, then the curve's points: (points, seeds, prompts) each
        diversity, won = (np.array([self.get(k, m) for k in (key, *curve)])
                          for m in ("gold_diversity", "wins"))
        n_seeds, n_prompts = won.shape[1:]

        def difference(seeds, rng):
            prompts = np.arange(n_prompts) if rng is None else rng.integers(0, n_prompts, n_prompts)
            x, y = (v[:, seeds][:, :, prompts].mean(axis=(1, 2)) for v in (diversity, won))
            order = 1 + np.argsort(x[1:])
            return y[0] - np.interp(x[0], x[order], y[order])
        x = diversity.mean(axis=(1, 2))
        return of_seeds(difference, n_seeds, n_prompts) | {"inside": bool(x[1:].min() <= x[0] <= x[1:].max())}


def points(keys):
    """(what a table calls it, which curve it lies on, its key, beta or None) of every point.  keys: of a
    Frontier."""
    sft = sorted((k for k in keys if k[0] == "sft"), key=lambda k: k[1])
    return [*((f"PPO, β = {b:g}", "PPO", (ppo_name(b), DIVERSITY), b) for b in BETAS),
            *((f"PPO, β = {b:g}, T = {QUALITY:g}", "PPO", (ppo_name(b), QUALITY), b) for b in BETAS),
            *((f"best of {n}", "best-of-N", (f"bon{n}", 1.0), None) for n in BEST_OF),
            *((f"SFT, T = {k[1]:g}", "SFT", k, None) for k in sft)]


def numbers(seeds):
    """What reviewers.json holds of this question.  seeds: frontier.json of each."""
    f = Frontier(seeds)
    sft = sorted((k for k in f.keys if k[0] == "sft"), key=lambda k: k[1])
    best = [(f"bon{n}", 1.0) for n in BEST_OF]
    lines = []
    for title, curve, key, beta in points(f.keys):
        lines.append({
            "policy": title, "curve": curve, "temperature": key[1], "beta": beta,
            "n": int(key[0].removeprefix("bon")) if curve == "best-of-N" else None, "kl": f.kl(key),
            **{m: over_seeds(f.get(key, m)) for m in ("reward", "gold_reward")},
            **{m: over_seeds(f.get(key, m), rate=True) for m in ("wins", "gold_diversity")},
            "above_sft": f.above(key, sft) if curve != "SFT" else None,
            "above_bon": f.above(key, best) if curve == "PPO" else None})
    free, usual = (ppo_name(0), DIVERSITY), (ppo_name(BETA), DIVERSITY)
    without = {m: over_seeds(f.get(free, m) - f.get(usual, m)) for m in ("reward", "gold_reward")}
    return {"frontier": lines, "kept": KEPT, "without_kl_penalty": without,
            "highest_gold_reward_of_ppo": highest_gold_reward(lines)}


def highest_gold_reward(lines):
    """Which PPO policy, at the temperature of diversity, has the highest gold reward."""
    at_one = [pick(lines, curve="PPO", beta=b, temperature=DIVERSITY) for b in BETAS]
    return max(at_one, key=lambda line: line["gold_reward"]["mean"])["policy"]


def read_seeds(folder, seeds, task="synthetic"):
    return [json.loads((folder / f"seed{s}" / task / "frontier.json").read_text()) for s in seeds]
