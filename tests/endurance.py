"""What is too long for the suite: the chain of stages, killed at random moments of every stage.  Each chain must end
with what an unbroken one wrote, to the last bit.

    python tests/endurance.py            # 50 kills
    python tests/endurance.py 10         # fewer

Prints what was tried and what was lost; exit status 1 if anything was.
"""
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from conftest import ROOT, json_lines

STAGES = ("sft --rows 1600 --log-every 5", "reward --prompts 200 --held-out 40 --log-every 2",
          "ppo --steps 12 --batch-size 32", "methods.grpo --steps 6",
          "bon --reward ckpt_reward.pt --inputs 20 --n 4 --splits test,ood_article",
          "bon --model ckpt_ppo.pt --inputs 20 --n 4 --splits test,ood_article")


def results(folder):
    """Names of all weights, texts of all sample files, metrics without times."""
    times = ("seconds", "tokens_per_second", "peak_mb")
    content = {p.name: torch.load(p, weights_only=True)["weights_hash"] for p in folder.glob("ckpt_*.pt")}
    content |= {p.name: p.read_text() for p in folder.glob("samples_*.jsonl")}
    return content | {p.name: [{k: v for k, v in row.items() if k not in times} for row in json_lines(p)]
                      for p in folder.glob("metrics_*.jsonl")}


def run_with_kills(stage, folder, moments):
    """Runs a stage to its end, killing it after each of `moments` seconds that it reaches first.  Returns (kills,
    list of what it said if it failed)."""
    command = [sys.executable, "-m", *stage.split(), "--threads", "1", "--save-every", "0", "--quiet"]
    for kills, moment in enumerate([*moments, None]):
        running = subprocess.Popen(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            said = running.communicate(timeout=moment)[1]
            return kills, [said[-300:]] if running.returncode else []
        except subprocess.TimeoutExpired:
            running.kill()
            running.communicate()


def main(wanted=50):
    rng, count, chains, lost, took = random.Random(0), 0, 0, [], []
    with tempfile.TemporaryDirectory() as folder:
        (whole := Path(folder) / "whole").mkdir()
        for stage in STAGES:
            began = time.time()
            lost += run_with_kills(stage, whole, [])[1]
            took.append(time.time() - began)
        while count < wanted and not lost:
            (here := Path(folder) / f"chain{chains}").mkdir()
            for stage, seconds in zip(STAGES, took):
                moments = [rng.uniform(.3, 1) * seconds for _ in range(-(-wanted // len(STAGES)))]
                kills, failed = run_with_kills(stage, here, moments)
                count, lost = count + kills, lost + failed
            lost += ["results differ"] * (results(here) != results(whole))
            chains += 1
    print(f"{count} kills over {chains} chains of {len(STAGES)} stages; lost: {lost or 'nothing'}")
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
