"""What the paper's reviewers asked for: the runs and measurements that `python reproduce.py --full` adds.

    python reproduce.py --full           # runs them, resumable, and writes reviewers.md, .json and figures

Five questions, each a section of answers.py, which turns these files into tables, sentences and pictures:

  shift      how far is each test set from train, as a number, and does RLHF's advantage grow with it?
  proxies    which diversity measure tracks what outputs say?
  frontier   is PPO more than SFT at a lower temperature, or best-of-N; and what does a nat of KL buy?
  seeds      the study's claims over five seeds, with intervals over seeds and prompts together
  instruct   the same study in a second world, whose shift is composition

Stages run after the study's in the chains of reproduce.py, and write JSON under runs/study-*/seed<k>/.
"""
import json
from functools import partial

import numpy as np
import torch

import instructions
import model as M
import proxies
import synthetic
from bon import sample_line
from diversity import embed
from generalisation import read_samples, reward_scores, truth_scores, wins
from reproduce import SPLITS, SWEEP, Steps, measure, words_of
from reward import score
from runtime import load_checkpoint, write_jsonl, write_whole
from splits import Task, build_tokenizer, encode_prompts, encode_response, shift, tokenizer

GRADED = [s for s in synthetic.SPLITS if s.startswith("graded_")]   # between the study's test sets
BETAS = (0.03, 1.0)             # prices of KL beside the study's 0, 0.1 and 0.3
TEMPERATURES = (0.4, 1.3)       # of PPO's policies beside 0.7 and 1; 1.3 of SFT too
BEST_OF = (1, 2, 4, 8, 16, 32, 64)
KEPT = 8                        # independent best-of-N outputs of a prompt
SLOW = 2                        # times the study's PPO steps in `instruct`: PPO on the truth was still rising


def chains(cfg, seed, folder, steps):
    """{chain: stages} to be put behind the study's, as `reproduce.chains` lists them.  steps: {world:
    Steps}."""
    s, first = steps["world"], seed == cfg.seed
    out = {world: [("graded", 20, partial(graded, w))] for world, w in steps.items()}
    out["world"] += [(f"ppo_b{beta:g}", 30, partial(s.sweep_beta, beta)) for beta in BETAS]
    out["world"] += [("temperatures", 40, partial(temperatures, s)), ("best_of", 110, partial(best_of, s)),
                     ("frontier", 120, partial(frontier, s)), ("proxies", 70, partial(conditions, s))]
    if first:       # prompts are the same for all seeds
        for world, w in steps.items():
            out[world] += [("shift", 70, partial(shifts, w, synthetic, [*SPLITS, *GRADED]))]
    i = Steps(cfg, seed, folder, "instruct")
    i.base = i.ckpt("base")
    epochs = {} if cfg.quick else {"rows": 32768, "epochs": 3}
    out["instruct"] = [
        ("base", 150, partial(i.pretrain, "instruct-mixed", **epochs)), ("sft", 13, i.train_sft),
        ("reward", 30, i.train_reward), ("ppo", 20, partial(i.train_ppo, "ppo", longer=SLOW)),
        ("ppo_truth", 18, partial(i.train_ppo, "ppo_truth", against="truth", longer=SLOW)),
        ("sample", 20, partial(sample_instruct, i)), ("measure", 10, partial(measure, i.here, instructions))]
    if first:
        out["instruct"] += [("shift", 20, partial(shifts, i, instructions, [
            s for s in instructions.SPLITS if s != "train"]))]
    return out


def graded(s):
    """SFT, best-of-16 and PPO on the test sets between the study's."""
    for name in ("sft", "ppo"):
        s.sample(name, 0.7, ",".join(GRADED), scored=name == "sft", folder="graded")
    out = {}
    for path in sorted((s.here / "graded").glob("samples_*.jsonl")):
        rows = read_samples(path)
        out.setdefault(rows[0]["split"], {})[rows[0]["policy"]] = wins(*truth_scores(rows)).tolist()
    write_whole(s.here / "graded.json", json.dumps(out).encode())


def sample_instruct(s):
    s.sample_all()
    s.sample("base", 0.7)


def shifts(s, world, names):
    """shift.json: {split: as `splits.shift`} of prompts from train, embedded by this world's SFT model."""
    model, saved = load_checkpoint(s.ckpt("sft"), "lm")
    enc, n = tokenizer(saved["tokenizer"]), 64 if s.cfg.quick else 500
    train = world.rows("train", 2 * n)
    counted = tokenizer(build_tokenizer([t for r in train for t in (r["prompt"], *r["references"])]))
    draws = dict(draws=20, floors=4) if s.cfg.quick else {}
    found = {name: shift([r["prompt"] for r in train], [r["prompt"] for r in world.rows(name, n)], counted,
                         lambda texts: embed(model, enc, texts), **draws) for name in names}
    write_whole(s.here / "shift.json", json.dumps(found).encode())


def ppo_names():
    return ["ppo", *(f"ppo_b{beta:g}" for beta in (*SWEEP, *BETAS))]


def temperatures(s):
    """PPO's policies, and SFT, at the temperatures between which the study did not look."""
    for name in ("sft", *ppo_names()):
        for t in TEMPERATURES:
            if name != "sft" or t == 1.3:
                s.sample(name, t, "test")


def best_of(s):
    """SFT's best-of-N for N = 1 ... 64 on the test prompts: KEPT outputs a prompt, each the best of samples
    of its own, so that they are independent.  One pool serves every N: the first N of each part of 64."""
    generator = torch.Generator().manual_seed(s.same["seed"])
    model, saved = load_checkpoint(s.ckpt("sft"), "lm")
    judge, _ = load_checkpoint(s.ckpt("reward"), "reward")
    enc, task = tokenizer(saved["tokenizer"]), Task(**saved["task"])
    rows, largest = task.rows("test", s.cfg.inputs), BEST_OF[-1]
    prompts = encode_prompts(enc, [r["prompt"] for r in rows], task.room(model.config.context))
    sampled = M.generate(model, prompts, task.max_new_tokens, n=KEPT * largest, eos=enc.eot_token,
                         generator=generator, batch_size=2048)
    rewards = score(judge, prompts, sampled)
    for n in BEST_OF:
        lines = []
        for row, ids, r in zip(rows, sampled, rewards):
            parts = np.array(r).reshape(KEPT, largest)[:, :n]
            picks = (parts.argmax(axis=1) + np.arange(KEPT) * largest).tolist()
            lines.append(sample_line(enc, row, ids, r, picks, {"policy": f"bon{n}", "split": "test",
                                                               "temperature": 1.0, "seed": s.same["seed"]}))
        write_jsonl(s.here / f"best_of_{n}.jsonl", lines)


@torch.no_grad()
def sampled_kl(policy, reference, enc, task, rows, temperature, batch=8):
    """KL(policy at `temperature` || reference at 1) in nats a response, by k1 on the policy's own samples.
    rows:
    lines of a sample file, whose outputs are encoded again."""
    prompts, total, count = encode_prompts(enc, [r["prompt"] for r in rows],
                                           task.room(policy.config.context)), 0., 0
    ids = [[encode_response(enc, t, task.max_new_tokens, f) for t, f in zip(r["outputs"], r["finished"])]
           for r in rows]
    for i in range(0, len(rows), batch):
        packed = M.pack(prompts[i:i + batch], ids[i:i + batch])
        logp = M.log_probs(policy, policy(packed), packed, temperature)
        total += (logp - M.log_probs(reference, reference(packed), packed)).sum().item()
        count += len(packed.lengths)
    return total / count


def frontier(s):
    """frontier.json: for SFT over temperatures, PPO over beta and temperatures, and best-of-N over N, on the
    test prompts: wins, truth, reward and true diversity of each prompt, and KL from SFT (none for best-of-N,
    whose KL is known)."""
    sft, saved = load_checkpoint(s.ckpt("sft"), "lm")
    judge, _ = load_checkpoint(s.ckpt("reward"), "reward")
    enc, task, out = tokenizer(saved["tokenizer"]), Task(**saved["task"]), []
    names = ["sft", "ppo_truth", *ppo_names()]
    paths = [p for name in names for p in sorted(s.here.glob(f"t*/samples_{name}_test.jsonl"))]
    for path in (*paths, *(s.here / f"best_of_{n}.jsonl" for n in BEST_OF)):
        rows = read_samples(path)
        policy, t = rows[0]["policy"], rows[0]["temperature"]
        truth, references = truth_scores(rows)
        kl = None if path.parent == s.here else sampled_kl(
            load_checkpoint(s.ckpt(policy), "lm")[0], sft, enc, task, rows, t)
        out.append({"policy": policy, "temperature": t, "kl": kl, "wins": wins(truth, references).tolist(),
                    "truth": np.mean(truth, axis=1).tolist(),
                    "reward": np.mean(reward_scores(rows, judge, enc, task)[0], axis=1).tolist(),
                    "semantic": [synthetic.semantic_diversity(r["outputs"])[0] for r in rows]})
    write_whole(s.here / "frontier.json", json.dumps(out).encode())


def conditions(s):
    """conditions.json: what proxies.py needs of every sample file on the test prompts."""
    model, saved = load_checkpoint(s.ckpt("sft"), "lm")
    enc, vocabulary = tokenizer(saved["tokenizer"]), words_of(synthetic)
    encode = partial(embed, model, enc)
    found = [proxies.condition(read_samples(p), vocabulary, encode, 10 if s.cfg.quick else 40)
             for p in sorted(s.here.glob("t*/samples_*_test.jsonl"))]
    write_whole(s.here / "conditions.json", json.dumps(
        {"conditions": found, "form": proxies.form_test(vocabulary, encode)}).encode())
