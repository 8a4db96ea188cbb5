"""The study on a published model and real text: every stage for several seeds, one table with intervals.

    python replicate.py --task tldr --size gpu                            # from the hub
    python replicate.py --model DIR --data DIR --judge-data DIR --size cpu    # local, hours on 2 cores

Writes OUT/seed-<s>/ (checkpoints, samples, logs), OUT/replication.json and OUT/replication.md.  Killed, it
goes on with the first stage that has not finished.

The judge is a reward model too, trained from the first seed's SFT model on --judge-data's preferences
(another annotator's, or other posts').  Without --judge-data each seed's policies are judged by the next
seed's reward model, which errs more alike.  No policy is judged by the reward model it was trained against.
"""
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import diversity
from generalisation import read_samples, reward_scores, rouge, wins
from runtime import Common, bootstrap, load_checkpoint, require, run, setup, write_whole
from splits import Task, tokenizer

HERE = Path(__file__).parent
SIZES = {  # flags of each stage
    "paper": dict(sft=["--preset", "paper"], reward=["--preset", "paper"], ppo=["--preset", "paper"],
                  bon=["--preset", "paper"]),
    "gpu": dict(sft=["--preset", "small-llama"], reward=["--preset", "small-llama", "--prompts", "20000"],
                ppo=["--preset", "small-llama"],
                bon=["--preset", "paper", "--inputs", "200", "--dtype", "bf16"]),
    "cpu": dict(sft=["--preset", "small-llama", "--rows", "800", "--max-prompt-tokens", "320"],
                reward=["--preset", "small-llama", "--batch", "8"],
                ppo=["--preset", "small-llama", "--steps", "20", "--batch", "32", "--minibatches", "2",
                     "--lr", "1e-4"],
                bon=["--inputs", "30", "--dtype", "bf16", "--batch", "256"]),
}
POLICIES = ("sft", "bon", "ppo")
VOCABULARY = 50257      # V of EAD, the authors'


@dataclass
class Config(Common):
    out: str = "runs/replication"   # folder of everything written
    model: str = "HuggingFaceTB/SmolLM2-135M"   # a hub name or a Hugging Face directory
    judge_data: str = ""        # folder whose preferences train the judge; "": the next seed's reward model
    size: str = "gpu"           # cpu, gpu or paper: flags of every stage, SIZES in this file
    sft: str = ""               # more flags for sft.py, as one string: "--max-new-tokens 64"
    reward: str = ""            # the same for reward.py
    ppo: str = ""               # for ppo.py: "--steps 10"
    bon: str = ""               # for bon.py
    encoder: str = ""           # of the embedding measures, as diversity.py's; "": the base model
    seeds: int = 2              # runs from SFT on; they vary data order and sampling (the base model is one)


def plan(cfg):
    """[(file that a stage leaves when it has finished, its command)], in order."""
    out, stages = Path(cfg.out), []
    sizes = {name: [*flags, *getattr(cfg, name).split()] for name, flags in SIZES[cfg.size].items()}
    common = ["--device", cfg.device, "--threads", str(cfg.threads), "--quiet"]
    task = ["--task", cfg.task] if cfg.task else []
    where = task + (["--data", cfg.data] if cfg.data else [])

    def stage(makes, script, *flags):
        stages.append((makes, [sys.executable, str(HERE / script), *map(str, flags), *common]))
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        here = out / f"seed-{seed}"
        sft, reward, ppo = (here / f"ckpt_{kind}.pt" for kind in ("sft", "reward", "ppo"))
        own = ["--seed", seed, "--out", here]
        stage(sft, "sft.py", "--model", cfg.model, *sizes["sft"], *where, *own)
        stage(reward, "reward.py", "--model", sft, *sizes["reward"], *own)
        stage(ppo, "ppo.py", "--model", sft, "--reward", reward, *sizes["ppo"], *own)
        stage(here / "sampled_sft", "bon.py", "--model", sft, "--reward", reward, *sizes["bon"], *own)
        stage(here / "sampled_ppo", "bon.py", "--model", ppo, *sizes["bon"], *own)
    if cfg.judge_data:
        stage(out / "ckpt_judge.pt", "reward.py", "--model", out / f"seed-{cfg.seed}" / "ckpt_sft.pt",
              *task, "--data", cfg.judge_data, *sizes["reward"], "--seed", cfg.seed + 1000,
              "--out", out / "ckpt_judge.pt")
    return stages


def carry_out(stages):
    """Runs what has not finished yet; a stage's output goes to <its file>.log."""
    for makes, command in stages:
        if makes.exists():
            continue
        makes.parent.mkdir(parents=True, exist_ok=True)
        start, log = time.time(), makes.with_suffix(".log")
        print(f"{makes}: {' '.join(Path(c).name if c.endswith('.py') else c for c in command[1:])}",
              flush=True)
        with open(log, "w") as f:
            status = subprocess.run(command, stdout=f, stderr=subprocess.STDOUT).returncode
        require(status == 0, f"{command[1]} ended with status {status}: "
                f"{(log.read_text().strip().splitlines() or ['no output'])[-1]} (all of it: {log})")
        if makes.suffix != ".pt":
            makes.touch()       # several sample files: a mark that all are there
        print(f"    {time.time() - start:.0f} s", flush=True)


# ------------------------------------------------------------------------------------------------- the tables

def judged(cfg, seed, device):
    """The judge of one seed's policies: a function of sample rows, scores of outputs and references."""
    other = cfg.seed + (seed - cfg.seed + 1) % cfg.seeds
    path = Path(cfg.out) / ("ckpt_judge.pt" if cfg.judge_data else f"seed-{other}/ckpt_reward.pt")
    model, saved = load_checkpoint(path, "reward", "judge", device, cfg.dtype)
    return partial(reward_scores, model=model, enc=tokenizer(saved["tokenizer"]), task=Task(**saved["task"]))


def measure(cfg, device):
    """{(policy, split, measure): (seeds, n) values of n prompts; across-input measures (seeds, K)}."""
    encode, out = diversity.encoder_of(cfg.encoder or cfg.model, device, cfg.dtype), {}
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        here, score = Path(cfg.out) / f"seed-{seed}", judged(cfg, seed, device)
        for policy in POLICIES:
            for path in sorted(here.glob(f"samples_{policy}_*.jsonl")):
                rows, split = read_samples(path), path.stem.removeprefix(f"samples_{policy}_")
                vectors = np.asarray(encode([t for r in rows for t in r["outputs"]])).reshape(
                    len(rows), len(rows[0]["outputs"]), -1)
                found = {"win rate": wins(*score(rows)),
                         "ROUGE-L": [np.mean([rouge(t, r["reference"])["rougeL"] for t in r["outputs"]])
                                     for r in rows],
                         "words": [np.mean([len(t.split()) for t in r["outputs"]]) for r in rows],
                         "unfinished": [1 - np.mean(r["finished"]) for r in rows]}
                varied = diversity.measure_samples(rows, vocabulary=VOCABULARY, embeddings=vectors)
                for scope, names in (("per_input", ("ead", "self_bleu", "embedding")),
                                     ("across", ("ead", "embedding"))):
                    found |= {f"{scope.replace('_', ' ')} {name}": varied[scope][name] for name in names}
                for name, values in found.items():
                    out.setdefault((policy, split, name), []).append(np.asarray(values, dtype=float))
    return {key: np.array(values) for key, values in out.items()}


def summary(values, over_prompts=True):
    """(seeds, n) -> {"mean", "low", "high": 95 % over prompts of their means over seeds, "seeds": each seed's
    mean}.  Across-input values are not of prompts: their interval is the seeds' range."""
    each = values.mean(1)
    mean, low, high = bootstrap(values.mean(0)) if over_prompts else (each.mean(), each.min(), each.max())
    return {"mean": float(mean), "low": float(low), "high": float(high),
            "seeds": [round(float(x), 4) for x in each]}


def tables(cfg, device):
    """Everything measured, as {"values", "differences", "models"}: what replication.json holds."""
    found = measure(cfg, device)
    names = {f"{p} | {s} | {m}": summary(v, not m.startswith("across")) for (p, s, m), v in found.items()}
    differences = {f"{a} - {b} | {s} | {m}": summary(v - found[b, s, m], not m.startswith("across"))
                   for a, b in (("ppo", "sft"), ("bon", "sft"), ("ppo", "bon"))
                   for (p, s, m), v in found.items() if p == a and (b, s, m) in found}
    models, out = {}, Path(cfg.out)
    paths = [out / f"seed-{s}/ckpt_{k}.pt" for s in range(cfg.seed, cfg.seed + cfg.seeds)
             for k in ("reward", "ppo")]
    for path in [*paths, *([out / "ckpt_judge.pt"] if cfg.judge_data else [])]:
        saved = load_checkpoint(path, "lm" if path.name == "ckpt_ppo.pt" else "reward")[1]
        models[str(path.relative_to(out))] = saved["metrics"]
    return {"model": Path(cfg.model).name if Path(cfg.model).is_dir() else cfg.model, "size": cfg.size,
            "seeds": cfg.seeds, "values": names, "differences": differences, "models": models}


def verdict(difference):
    """A difference in words: clear only if the interval over prompts and every seed lie on one side of
    zero."""
    one_side = difference["low"] > 0 or difference["high"] < 0
    agree = len({x > 0 for x in difference["seeds"]}) == 1
    return ("higher" if difference["mean"] > 0 else "lower") if one_side and agree else "not shown"


def markdown(results):
    """The tables as text."""
    splits = sorted({k.split(" | ")[1] for k in results["values"]}, key=lambda s: (s != "test", s))
    cell = lambda x: f"{x['mean']:.3f} [{x['low']:.3f}, {x['high']:.3f}]"  # noqa: E731
    measures = list(dict.fromkeys(k.split(" | ")[2] for k in results["values"]))
    lines = [f"Model {results['model']}, {results['seeds']} seeds; 95 % intervals over prompts (across "
             "inputs: the seeds' range).", "",
             "| measure | split | SFT | best-of-N | PPO | PPO - SFT | BoN - SFT |", "|" + " --- |" * 7]
    for m in measures:
        for s in splits:
            row = [cell(results["values"][f"{p} | {s} | {m}"]) for p in POLICIES]
            for pair in ("ppo - sft", "bon - sft"):
                d = results["differences"][f"{pair} | {s} | {m}"]
                row.append(f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}] {verdict(d)}")
            lines.append(f"| {m} | {s} | " + " | ".join(row) + " |")
    lines += ["", "| model | held-out accuracy | the longer wins | pairs |", "| --- | --- | --- | --- |"]
    for name, m in results["models"].items():
        if "accuracy" in m:
            lines.append(f"| {name} | {m['accuracy']:.3f} [{m['accuracy_low']:.3f}, "
                         f"{m['accuracy_high']:.3f}] | "
                         f"{m['longer_wins']:.3f} | {m['pairs']} |")
    return "\n".join(lines) + "\n"


def main(cfg):
    require(cfg.size in SIZES, f"--size {cfg.size}: choose from {', '.join(SIZES)}")
    require(cfg.seeds >= (1 if cfg.judge_data else 2),
            f"--seeds {cfg.seeds}: without --judge-data the judge is another seed's reward model, so 2 are "
            "needed")
    device, _ = setup(cfg)
    carry_out(plan(cfg))
    results = tables(cfg, device)
    write_whole(Path(cfg.out) / "replication.json", json.dumps(results, indent=1).encode())
    text = markdown(results)
    write_whole(Path(cfg.out) / "replication.md", text.encode())
    print(f"{text}\nwrote {cfg.out}/replication.md and replication.json")


if __name__ == "__main__":
    run(main, Config, __doc__)
