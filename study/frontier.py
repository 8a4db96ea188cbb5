"""Is it RL, or just sharpening, and which method keeps diversity?  Quality against diversity of every method
over its own knob: SFT over temperature, best-of-N over N, PPO, DPO, IPO, RLOO and GRPO over beta.

`python reproduce.py --full` runs this on the test prompts in distribution, with systematic noise.  SFT at a
lower temperature and best-of-N also trade diversity for quality, without RL.  A method is more than they are
if its win rate is higher at equal gold diversity.
"""
import json
from functools import partial

import numpy as np
import torch

import model as M
from bon import best_of_n_kl, sample_lines
from common.checkpoint import load_checkpoint
from common.files import write_json, write_jsonl
from common.samples import read_samples
from common.stats import of_seeds, over_seeds
from common.tokenizer import load_tokenizer
from diversity import (embed_outputs, embedding_diversity, good_measures, lexical_measures, per_input, words)
from generalisation import gold_scores, reward_scores, wins
from reward import score
from splits import Task, encode_prompts, encode_response
from study.measures import encoder_of, sample_files, vocabulary_of
from study.names import (BEST_OF, BETA, BETAS, DIVERSITY, ENTROPY, K2, METHODS, QUALITY, TYPICALITY,
                         method_name, ppo_name)

SAMPLED = ("base", "sft", "ppo_gold", *map(ppo_name, BETAS))    # policies whose sample files are read
OF_METHODS = (*(method_name(method, beta) for method, betas in METHODS.items() for beta in betas),
              *(method_name("entropy", c) for c in ENTROPY), *(method_name("typical", a) for a in TYPICALITY),
              *(method_name("k2_b", beta) for beta in K2))
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


def encode_samples(tokenizer, task, rows, context):
    """Lines of a sample file -> (their prompts' ids, their outputs' ids: a list of lists)."""
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows], task.max_prompt_len(context))
    return prompts, [[encode_response(tokenizer, text, task.max_new_tokens, finished)
                      for text, finished in zip(row["outputs"], row["finished"])] for row in rows]


@torch.no_grad()
def sampled_kl(policy, ref_policy, tokenizer, task, rows, temperature, batch_size=8):
    """KL(policy at `temperature` || ref_policy at 1) in nats a response, by k1 on the policy's own samples.
    rows: lines of a sample file, whose outputs are encoded again; batch_size: prompts at once.  A frozen
    trunk that both models share runs once."""
    (prompts, ids), total, count = encode_samples(tokenizer, task, rows, policy.config.context), 0., 0
    shared = M.share_trunk(ref_policy, policy)
    for i in range(0, len(rows), batch_size):
        packed = M.pack(prompts[i:i + batch_size], ids[i:i + batch_size])
        h = policy.trunk(packed)
        logp = M.log_probs(policy, policy.top(h, packed), packed, temperature)
        hidden = ref_policy.top(h, packed) if shared else ref_policy(packed)
        total += (logp - M.log_probs(ref_policy, hidden, packed)).sum().item()
        count += len(packed.lengths)
    return total / count


def measure_frontier(here):
    """The sample files of SFT, PPO and best-of-N on the test prompts -> frontier.json: `measure_files`."""
    paths = [path for name in SAMPLED for path in sample_files(here, name)]
    paths += [here / f"best_of_{n}.jsonl" for n in BEST_OF]
    # nan where fewer than two outputs are good
    write_json(here / "frontier.json", measure_files(here, paths), indent=None, allow_nan=True)


def measure_files(here, paths):
    """Lines of frontier.json, one a sample file: of each prompt wins, gold reward, reward, diversity, and
    what `diversity.good_measures` has of the good outputs; KL from SFT (none for best-of-N, whose KL has a
    known bound)."""
    sft, tokenizer, task = load_with_task(here / "ckpt_sft.pt", "lm")
    reward_model, _ = load_checkpoint(here / "ckpt_reward.pt", "reward")
    lines, vocabulary, encode = [], vocabulary_of(task.synthetic), encoder_of(here / "ckpt_sft.pt")[0]
    for path in paths:
        rows = read_samples(path)
        policy, temperature = rows[0]["policy"], rows[0]["temperature"]
        gold, references = gold_scores(rows)
        kl = None
        if not policy.startswith("bon"):
            model, _ = load_checkpoint(checkpoint_of(here, policy), "lm")
            kl = sampled_kl(model, sft, tokenizer, task, rows, temperature)
        rewards, _ = reward_scores(rows, reward_model, tokenizer, task)
        # of as many outputs as best-of-N has, because different answers among more are more.  EAD is of all,
        # so do not compare a policy's with best-of-N's
        of_good = good_measures([{k: v[:KEPT] if k in ("outputs", "finished") else v for k, v in row.items()}
                                 for row in rows], task.synthetic)
        lines.append({"policy": policy, "temperature": temperature, "kl": kl,
                      "length": float(np.mean([len(words(t)) for row in rows for t in row["outputs"]])),
                      "wins": wins(gold, references).tolist(),
                      "gold_reward": np.mean(gold, axis=1).tolist(),
                      "reward": np.mean(rewards, axis=1).tolist(),
                      "ead": lexical_measures([list(map(words, row["outputs"])) for row in rows],
                                              vocabulary=vocabulary)["ead"].tolist(),
                      "gold_diversity": [task.synthetic.gold_diversity(r["outputs"])[0] for r in rows],
                      **{measure: x.tolist() for measure, x in of_good.items()}})
        if temperature == DIVERSITY and policy.startswith("ppo"):       # what the paper says of beta
            lines[-1]["embedding"] = per_input(embed_outputs(rows, encode), embedding_diversity).tolist()
    return lines


def checkpoint_of(here, policy):
    """The path of a policy's checkpoint; a base model serves both kinds of noise."""
    return (here.parent if policy == "base" else here) / f"ckpt_{policy}.pt"


# ------------------------------------------------------------------------------------------------ the numbers

class Frontier:
    """frontier.json of all seeds.  A key is (policy, temperature)."""

    def __init__(self, seeds):
        self.lines = [{(x["policy"], x["temperature"]): x for x in seed} for seed in seeds]
        self.keys = list(self.lines[0])

    def get(self, key, measure):
        """(seeds, prompts).  root_kl is one number a policy, repeated for every prompt."""
        if measure == "root_kl":        # an estimate of a KL near 0 may lie below it
            return np.array([[max(0., self.kl_of(seed, key)) ** .5] * len(seed[key]["wins"])
                             for seed in self.lines])
        return np.array([seed[key][measure] for seed in self.lines], dtype=float)

    @staticmethod
    def kl_of(seed, key):
        """Nats a response from SFT; of best-of-N its bound."""
        if key[0].startswith("bon"):
            return best_of_n_kl(int(key[0].removeprefix("bon")))
        return seed[key]["kl"]

    def kl(self, key):
        """Mean over seeds, nats."""
        return float(np.mean([self.kl_of(seed, key) for seed in self.lines]))

    def beside(self, key, curve, x, y):
        """Measure y of `key` less that of `curve`, a list of keys, where the curve has the same x,
        interpolated: {mean, low, high, inside}.  inside: whether the curve reaches that x, else its nearest
        end is taken.  None where a seed has no value of a point."""
        # `key` first, then the curve's points: (points, seeds, prompts) each
        xs, ys = (np.array([self.get(k, m) for k in (key, *curve)]) for m in (x, y))
        n_seeds, n_prompts = ys.shape[1:]

        def difference(seeds, rng):
            prompts = np.arange(n_prompts) if rng is None else rng.integers(0, n_prompts, n_prompts)
            at, height = (np.nanmean(v[:, seeds][:, :, prompts], axis=(1, 2)) for v in (xs, ys))
            order = 1 + np.argsort(at[1:])
            return height[0] - np.interp(at[0], at[order], height[order])
        if np.isnan(xs).all(axis=2).any() or np.isnan(ys).all(axis=2).any():
            return None
        at = np.nanmean(xs, axis=(1, 2))
        return of_seeds(difference, n_seeds, n_prompts) | {
            "inside": bool(at[1:].min() <= at[0] <= at[1:].max())}


def points(keys):
    """(what a table calls it, which curve it lies on, its key, its knob or None) of every point.  keys: of a
    Frontier."""
    sft = sorted((k for k in keys if k[0] == "sft"), key=lambda k: k[1])
    knobs = {"PPO": ("β", ppo_name, BETAS),
             "PPO, entropy bonus": ("c", partial(method_name, "entropy"), ENTROPY),
             "PPO, typical annotators": ("a", partial(method_name, "typical"), TYPICALITY),
             "PPO, k2 in the reward": ("β", partial(method_name, "k2_b"), K2),
             **{method.upper(): ("β", partial(method_name, method), betas)
                for method, betas in METHODS.items()}}
    of_knobs = [(f"{curve}, {knob} = {x:g}" + ("" if t == DIVERSITY else f", T = {t:g}"), curve,
                 (name_of(x), t), x) for curve, (knob, name_of, values) in knobs.items()
                for t in (DIVERSITY, QUALITY) for x in values if (name_of(x), t) in keys]
    return [("base model", "base", ("base", DIVERSITY), None), *of_knobs,
            *((f"best of {n}", "best-of-N", (f"bon{n}", 1.0), None) for n in BEST_OF),
            *((f"SFT, T = {k[1]:g}", "SFT", k, None) for k in sft)]


IN_UNIT_INTERVAL = ("wins", "gold_diversity", "good", "good_gold_diversity")    # between 0 and 1
MEANS_OF = ("ead", "reward", "gold_reward", "good_distinct", "utility")


def ppo_curve(f):
    """PPO's points of a Frontier, from the beta of the highest gold reward up: with a smaller one it
    over-optimises, and has less reward and less diversity."""
    keys = [(ppo_name(b), DIVERSITY) for b in BETAS]
    return keys[int(np.argmax([f.get(key, "gold_reward").mean() for key in keys])):]


def numbers(seeds):
    """What reviewers.json holds of this question.  seeds: frontier.json of each."""
    f = Frontier(seeds)
    sft = sorted((k for k in f.keys if k[0] == "sft"), key=lambda k: k[1])
    best, ppo, lines = [(f"bon{n}", 1.0) for n in BEST_OF], ppo_curve(f), []
    for title, curve, key, knob in points(f.keys):
        line = {"policy": title, "curve": curve, "temperature": key[1], "knob": knob,
                "n": int(key[0].removeprefix("bon")) if curve == "best-of-N" else None, "kl": f.kl(key),
                "length": float(np.mean([seed[key]["length"] for seed in f.lines])),
                **{m: over_seeds(f.get(key, m)) for m in MEANS_OF},
                **{m: over_seeds(f.get(key, m), rate=True) for m in IN_UNIT_INTERVAL}}
        if curve.startswith("PPO") and key[1] == DIVERSITY:
            line["embedding"] = over_seeds(f.get(key, "embedding"))
        if curve != "SFT":
            line["above_sft"] = f.beside(key, sft, "gold_diversity", "wins")
        if curve not in ("SFT", "best-of-N"):
            line["above_bon"] = f.beside(key, best, "gold_diversity", "wins")
            # who keeps more at equal gold reward, who gains more at equal KL
            line["kept_beside_bon"] = f.beside(key, best, "gold_reward", "gold_diversity")
            line["good_kept_beside_bon"] = f.beside(key, best, "gold_reward", "good_gold_diversity")
            line["distinct_kept_beside_bon"] = f.beside(key, best, "gold_reward", "good_distinct")
            # over its root, in which reward is nearly straight (Gao et al. 2022)
            line["gained_beside_bon"] = f.beside(key, best, "root_kl", "gold_reward")
        if curve not in ("SFT", "best-of-N", "PPO", "base"):
            line["kept_beside_ppo"] = f.beside(key, ppo, "gold_reward", "gold_diversity")
            line["gained_beside_ppo"] = f.beside(key, ppo, "root_kl", "gold_reward")
        if curve != "SFT":      # paired by seed and prompt
            for other in ("ppo", "bon16"):
                line[f"less_{other}"] = {m: over_seeds(f.get(key, m) - f.get((other, DIVERSITY), m))
                                         for m in ("gold_reward", "gold_diversity", "good_distinct")}
        lines.append(line)

    def less(a, b, measures):
        return {m: over_seeds(f.get((a, DIVERSITY), m) - f.get((b, DIVERSITY), m)) for m in measures}
    of_beta, k2 = ("wins", "ead", "embedding", "gold_diversity"), partial(method_name, "k2_b")
    return {"frontier": lines, "kept": KEPT,
            "without_kl_penalty": less(ppo_name(0), ppo_name(BETA), ("reward", "gold_reward")),
            "larger_beta": less(ppo_name(BETAS[-1]), ppo_name(BETA), of_beta),
            "larger_beta_k2": less(k2(K2[-1]), k2(K2[0]), of_beta)}


def read_seeds(folder, seeds, task="synthetic"):
    """frontier.json of each seed, with the lines of the other methods."""
    found = []
    for seed in seeds:
        here = folder / f"seed{seed}" / task
        lines, others = (json.loads((here / f"{name}.json").read_text()) for name in ("frontier", "methods"))
        found.append(lines + others["frontier"])
    return found
