"""What is too long for the suite: the chain of stages, killed at random moments of every stage, until 50 kills have
happened.  Each chain must end with what an unbroken one wrote, to the last bit.

    python tests/endurance.py [--kills 50] [--seed 1]

Prints what was tried and what was lost; exit status 1 if anything was.
"""
import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("sft.py --rows 1600 --log-every 5", "reward.py --prompts 200 --held-out 40 --log-every 2",
          "ppo.py --steps 12 --batch-size 32", "-m methods.grpo --steps 6",
          "bon.py --reward ckpt_reward.pt --inputs 20 --n 4 --splits test,ood_article",
          "bon.py --model ckpt_ppo.pt --inputs 20 --n 4 --splits test,ood_article")


def results(folder):
    """Names of all weights, texts of all sample files, metrics without times."""
    times = ("seconds", "tokens_per_second", "peak_mb")
    content = {p.name: torch.load(p, weights_only=True)["weights_hash"] for p in folder.glob("ckpt_*.pt")}
    content |= {p.name: p.read_text() for p in folder.glob("samples_*.jsonl")}
    for path in folder.glob("metrics_*.jsonl"):
        rows = map(json.loads, path.read_text().splitlines())
        content[path.name] = [{k: v for k, v in row.items() if k not in times} for row in rows]
    return content


def run_with_kills(command, cwd, moments):
    """Runs a stage to its end, killing it after each of `moments` seconds that it reaches first.  Returns (kills,
    what it said if it failed)."""
    flags = [*command.split(), "--out", str(cwd), "--threads", "1", "--save-every", "0", "--quiet"]
    flags = [str(cwd / flag) if flag.startswith("ckpt_") else flag for flag in flags]
    if "--model" not in flags and not command.startswith("sft.py"):
        flags += ["--model", str(cwd / "ckpt_sft.pt")]
    if command.startswith(("ppo.py", "-m methods.grpo")):
        flags += ["--reward", str(cwd / "ckpt_reward.pt")]
    for kills, moment in enumerate([*moments, None]):
        running = subprocess.Popen([sys.executable, *flags], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                   text=True)
        try:
            said = running.communicate(timeout=moment)[1]
            return kills, said if running.returncode else ""
        except subprocess.TimeoutExpired:
            running.kill()
            running.communicate()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, count, chains, lost, took = random.Random(args.seed), 0, 0, [], []
    with tempfile.TemporaryDirectory() as folder:
        (whole := Path(folder) / "whole").mkdir()
        for command in STAGES:
            began = time.time()
            lost += filter(None, [run_with_kills(command, whole, [])[1]])
            took.append(time.time() - began)
        while count < args.kills and not lost:
            (here := Path(folder) / f"chain{chains}").mkdir()
            for command, seconds in zip(STAGES, took):
                few = min(max(1, args.kills // len(STAGES)), args.kills - count)
                kills, failed = run_with_kills(command, here, [rng.uniform(.3, 1) * seconds for _ in range(few)])
                count, lost = count + kills, lost + [failed[-300:]] * bool(failed)
            lost += ["results differ"] * (results(here) != results(whole))
            chains += 1
    print(f"{count} kills over {chains} chains of {len(STAGES)} stages; lost: {lost or 'nothing'}")
    sys.exit(bool(lost))


if __name__ == "__main__":
    main()
