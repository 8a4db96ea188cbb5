"""The study on a published model and real text: every stage for several seeds, one table with intervals.

    python replicate.py --task tldr --size gpu                            # from the hub
    python replicate.py --model DIR --data DIR --judge-data DIR --size cpu    # all of it local, hours on 2 cores

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
from pathlib import Path

import numpy as np

import diversity
from generalisation import read_samples, reward_scores, rouge, wins
from pretrained import load_model
from runtime import Common, bootstrap, load_checkpoint, require, run, setup, write_whole
from splits import Task, tokenizer

HERE = Path(__file__).parent
SIZES = {  # flags of each stage
    "paper": dict(sft=["--preset", "paper"], reward=["--preset", "paper"], ppo=["--preset", "paper"],
                  bon=["--preset", "paper"]),
    "gpu": dict(sft=["--preset", "small-llama"], reward=["--preset", "small-llama", "--prompts", "20000"],
                ppo=["--preset", "small-llama"], bon=["--preset", "paper", "--inputs", "200", "--dtype", "bf16"]),
    "cpu": dict(sft=["--preset", "small-llama", "--rows", "800", "--max-prompt-tokens", "320"],
                reward=["--preset", "small-llama", "--batch", "8"],
                ppo=["--preset", "small-llama", "--steps", "20", "--batch", "32", "--minibatches", "2",
                     "--lr", "1e-4"],
                bon=["--inputs", "30", "--dtype", "bf16", "--batch", "256"]),
}
POLICIES = ("sft", "bon", "ppo")


@dataclass
class Config(Common):
    out: str = "runs/replication"   # folder of everything written
    model: str = "HuggingFaceTB/SmolLM2-135M"   # a hub name or a Hugging Face directory
    judge_data: str = ""        # folder whose preferences train the judge; "": the next seed's reward model
    size: str = "gpu"           # cpu, gpu or paper: flags of every stage, SIZES in this file
    extra: str = ""             # more flags for sft.py, as one string: "--max-new-tokens 64"
    seeds: int = 2              # runs from SFT on; they vary data order and sampling (the base model is one)


def plan(cfg):
    """[(file that a stage leaves when it has finished, its command)], in order."""
    sizes, out, stages = SIZES[cfg.size], Path(cfg.out), []
    common = ["--device", cfg.device, "--threads", str(cfg.threads), "--quiet"]
    where = (["--task", cfg.task] if cfg.task else []) + (["--data", cfg.data] if cfg.data else [])

    def stage(makes, script, *flags):
        stages.append((makes, [sys.executable, str(HERE / script), *map(str, flags), *common]))
    for seed in range(cfg.seed, cfg.seed + cfg.seeds):
        here = out / f"seed-{seed}"
        sft, reward, ppo = (here / f"ckpt_{kind}.pt" for kind in ("sft", "reward", "ppo"))
        own = ["--seed", seed, "--out", here]
        stage(sft, "sft.py", "--model", cfg.model, *sizes["sft"], *cfg.extra.split(), *where, *own)
        stage(reward, "reward.py", "--model", sft, *sizes["reward"], *own)
        stage(ppo, "ppo.py", "--model", sft, "--reward", reward, *sizes["ppo"], *own)
        stage(here / "sampled_sft", "bon.py", "--model", sft, "--reward", reward, *sizes["bon"], *own)
        stage(here / "sampled_ppo", "bon.py", "--model", ppo, *sizes["bon"], *own)
    if cfg.judge_data:
        stage(out / "ckpt_judge.pt", "reward.py", "--model", out / f"seed-{cfg.seed}" / "ckpt_sft.pt", "--data",
              cfg.judge_data, *sizes["reward"], "--seed", cfg.seed + 1000, "--out", out / "ckpt_judge.pt")
    return stages


def carry_out(stages):
    """Runs what has not finished yet; a stage's output goes to <its file>.log."""
    for makes, command in stages:
        if makes.exists():
            continue
        makes.parent.mkdir(parents=True, exist_ok=True)
        start, log = time.time(), makes.with_suffix(".log")
        print(f"{makes}: {' '.join(Path(c).name if c.endswith('.py') else c for c in command[1:])}", flush=True)
        with open(log, "w") as f:
            status = subprocess.run(command, stdout=f, stderr=subprocess.STDOUT).returncode
        require(status == 0, f"{command[1]} ended with status {status}: "
                f"{(log.read_text().strip().splitlines() or ['no output'])[-1]} (all of it: {log})")
        if makes.suffix != ".pt":
            makes.touch()       # several sample files: a mark that all are there
        print(f"    {time.time() - start:.0f} s", flush=True)


def main(cfg):
    require(cfg.size in SIZES, f"--size {cfg.size}: choose from {', '.join(SIZES)}")
    require(cfg.seeds >= (1 if cfg.judge_data else 2),
            f"--seeds {cfg.seeds}: without --judge-data the judge is another seed's reward model, so 2 are needed")
    carry_out(plan(cfg))


if __name__ == "__main__":
    run(main, Config, __doc__)
