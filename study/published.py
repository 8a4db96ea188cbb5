"""The study on a published model and real text: every stage for several seeds, one table with intervals.

    python reproduce.py --task tldr --size gpu                                  # from the hub
    python reproduce.py --task tldr-short --judge sbert:all-MiniLM-L6-v2 --size cpu     # hours on 2 cores
    python reproduce.py --model DIR --data DIR --judge-data DIR                 # local files

Writes OUT/seed-<s>/ (checkpoints, samples, logs), OUT/replication.json and OUT/replication.md.

Who judges: with --judge a fixed judge, a sentence encoder that knows the references.  It also labels the
pairs that each seed's reward model learns from, so over-optimisation can be seen.  With --judge-data a reward
model, trained from the first seed's SFT model on these preferences (another annotator's, or other posts').
Else the next seed's reward model judges each seed's policies; its errors are more like those of their own
reward model.  No policy is judged by the reward model it was trained against.

Deviation from the paper: its judge is GPT-4.
"""
import sys
from functools import partial
from pathlib import Path

import numpy as np

import diversity
from common.checkpoint import load_checkpoint
from common.embed import load_encoder
from common.errors import UserError
from common.files import atomic_write, hash_of, write_json
from common.flags import setup
from common.samples import read_samples
from common.stats import Interval, over_seeds
from generalisation import at_equal_length, reward_scores, rouge, wins
from study.measures import load_with_task
from study.pipeline import ROOT, Stage, run_stages
from study.report import how_to_read, interval, sections, table
from tasks import paper

MODULES = {"sft": "sft", "label": "tasks.annotators", "reward": "reward", "ppo": "ppo", "dpo": "methods.dpo",
           "bon": "bon"}
FIRM = 0.2      # beta of a second PPO and of soft best-of-N, where the first PPO has 0.05
SIZES = {  # flags of each script
    "paper": {**dict.fromkeys(("sft", "reward", "ppo", "bon"), "--preset paper --dtype bf16"),
              "dpo": "--freeze 0.8 --lr 3e-5 --dtype bf16", "label": "--dtype bf16"},
    # as chosen on an H100: a reward model of which 80 % are frozen stayed below `the longer wins`, and with a
    # quarter of this rate PPO had hardly moved
    "gpu": dict(sft="--preset small-llama",
                reward="--preset small-llama --prompts 20000 --freeze 0 --lr 5e-5 --epochs 2 "
                       "--micro-batch-size 8",
                ppo="--preset small-llama --steps 30 --batch-size 256 --lr 2e-4 --micro-batch-size 32",
                dpo="--freeze 0.8 --lr 5e-5 --prompts 20000 --micro-batch-size 8 --dtype bf16",
                label="--dtype bf16", bon="--preset paper --inputs 200 --dtype bf16"),
    # bf16 is slower than fp32 on cores without its instructions
    "cpu": dict(sft="--preset small-llama --dtype fp32 --epochs 2 --lr 2e-4 --log-every 1000",
                label="--samples 4",
                reward="--preset small-llama --dtype fp32 --freeze 0 --lr 5e-5 --batch-size 8 --log-every 10",
                ppo="--preset small-llama --dtype fp32 --steps 30 --minibatches 2 --lr 1e-4 --probe-every 0",
                dpo="--freeze 0.8 --lr 5e-5 --log-every 10",
                bon="--inputs 60 --n 8 --pool 64 --independent --batch-size 256"),
}
SECONDS = 1200          # a guess at a stage's with --size cpu, for the first time left
POLICIES = {"sft": "SFT", "bon": "best-of-N", "soft": f"soft best-of-N, beta {FIRM:g}", "ppo": "PPO",
            f"ppo-b{FIRM:g}": f"PPO, beta {FIRM:g}", "dpo": "DPO"}
VOCABULARY = 50257      # V of EAD, the authors'
CUT = 20                # words of an output on which diversity is measured once more: length confounds it


# --------------------------------------------------------------------------------------------------- the plan

def seeds_of(cfg):
    return range(cfg.seed, cfg.seed + cfg.seeds)


def plan(cfg):
    """The stages, in order.  Each script continues by itself what was cut.  cfg: Config of reproduce.py."""
    out, stages = Path(cfg.out), []
    common = ["--device", cfg.device, "--threads", str(cfg.threads)]
    task = [*(["--task", cfg.task] if cfg.task else []), *(["--data", cfg.data] if cfg.data else [])]
    inputs = [hash_of(path) for path in (cfg.model, cfg.data, cfg.judge_data)]

    def add(name, needs, leaves, script, *flags):
        given = f"{SIZES[cfg.size][script]} {getattr(cfg, script, '')}".split() + [*map(str, flags)]
        command = [sys.executable, "-m", MODULES[script], *given, *common]
        command += ["--quiet"] * (script != "label")
        stages.append(Stage(name, needs, leaves, SECONDS, command, " ".join([*given, *inputs])))
    for seed in seeds_of(cfg):
        home, here = f"seed-{seed}", out / f"seed-{seed}"
        own, sft, reward = ["--seed", seed, "--out", here], here / "ckpt_sft.pt", here / "ckpt_reward.pt"
        pairs, learned_from = f"{home}/sft", ["--model", sft]

        def train(policy, needs, script, *flags):
            path = here / f"ckpt_{policy}.pt"
            add(f"{home}/{policy}", (needs,), (f"{home}/{path.name}",), script, *flags, "--seed", seed,
                "--out", path)
            add(f"{home}/sampled_{policy}", (f"{home}/{policy}",), (f"{home}/samples_{policy}_*.jsonl",),
                "bon", "--model", path, *task, *own)
        add(f"{home}/sft", (), (f"{home}/ckpt_sft.pt",), "sft", "--model", cfg.model, *task, *own)
        if cfg.judge:
            add(f"{home}/label", (pairs,), (f"{home}/preferences*.jsonl",), "label", "--model", sft,
                "--judge", cfg.judge, *own)
            pairs, learned_from = f"{home}/label", ["--model", sft, "--data", here]
        add(f"{home}/reward", (pairs,), (f"{home}/ckpt_reward.pt",), "reward", *learned_from, *own)
        against = ["--model", sft, "--reward", reward]
        train("ppo", f"{home}/reward", "ppo", *against)
        add(f"{home}/sampled_sft", (f"{home}/reward",),
            tuple(f"{home}/samples_{policy}_*.jsonl" for policy in ("sft", "bon", "soft")), "bon",
            *against, "--soft", FIRM, *task, *own)
        train("dpo", pairs, "dpo", *learned_from)
        train(f"ppo-b{FIRM:g}", f"{home}/reward", "ppo", *against, "--kl-coef", FIRM)
    if cfg.judge_data:
        add("judge", (f"seed-{cfg.seed}/sft",), ("ckpt_judge.pt",), "reward",
            "--model", out / f"seed-{cfg.seed}" / "ckpt_sft.pt", *task, "--data", cfg.judge_data,
            "--seed", cfg.seed + 1000, "--out", out / "ckpt_judge.pt")
    return stages


# ------------------------------------------------------------------------------------------------- measuring

def judge_of(cfg, seed, device):
    """The judge of one seed's policies: sample rows -> scores of outputs and of references."""
    following = seed + 1 if seed + 1 in seeds_of(cfg) else cfg.seed
    path = Path(cfg.out) / ("ckpt_judge.pt" if cfg.judge_data else f"seed-{following}/ckpt_reward.pt")
    model, tokenizer, task = load_with_task(path, "reward", "judge", device, cfg.dtype)
    return partial(reward_scores, model=model, tokenizer=tokenizer, task=task)


def measure_file(rows, score, encode):
    """{measure: (n,) values of n prompts, or (K,) across inputs, or one} of one sample file."""
    scores, references = score(rows)
    found = {"win rate": wins(scores, references),
             "win rate at equal length": [(at_equal_length(rows, scores, references) or NOT_KNOWN).mean],
             "ROUGE-L": [np.mean([rouge(t, r["reference"])["rougeL"] for t in r["outputs"]]) for r in rows],
             "words": [np.mean([len(t.split()) for t in r["outputs"]]) for r in rows],
             "unfinished": [1 - np.mean(r["finished"]) for r in rows]}
    for part, cut in (("", rows), (f", first {CUT} words", diversity.first_words(rows, CUT))):
        varied = diversity.measure_samples(cut, diversity.embed_outputs(cut, encode), vocabulary=VOCABULARY)
        for kind, names in (("per_input", ("ead", "self_bleu", "embedding")),
                            ("across", ("ead", "embedding"))):
            found |= {f"{kind.replace('_', ' ')} {name}{part}": varied[kind][name] for name in names}
    return {name: np.asarray(values, dtype=float) for name, values in found.items()}


def measure(cfg, device):
    """{(policy, split, measure): (seeds, n)}."""
    encode, found = load_encoder(cfg.encoder or cfg.model, device, cfg.dtype), {}
    for seed in seeds_of(cfg):
        score = judge_of(cfg, seed, device)
        for policy in POLICIES:
            for path in sorted(Path(cfg.out).glob(f"seed-{seed}/samples_{policy}_*.jsonl")):
                split = path.stem.removeprefix(f"samples_{policy}_")
                for name, values in measure_file(read_samples(path), score, encode).items():
                    found.setdefault((policy, split, name), []).append(values)
    return {key: np.array(values) for key, values in found.items()}


def summary(values, measure):
    """(seeds, n) -> as `over_seeds`.  Across-input values are not of prompts: one number a seed."""
    return over_seeds(values.mean(1, keepdims=True) if measure.startswith("across") else values)


def results_of(cfg, device):
    """Everything in replication.json."""
    found, rows = measure(cfg, device), []
    splits = sorted({split for _, split, _ in found}, key=lambda s: (s != "test", s))
    for m in dict.fromkeys(m for *_, m in found):
        for split in splits:
            of = {policy: found[policy, split, m] for policy in POLICIES}
            rows.append({"measure": m, "split": split, **{p: summary(x, m) for p, x in of.items()},
                         **{f"{p}_minus_sft": summary(of[p] - of["sft"], m) for p in ("ppo", "bon")}})
    names = [f"seed-{seed}/ckpt_reward.pt" for seed in seeds_of(cfg)]
    names += ["ckpt_judge.pt"] if cfg.judge_data else []
    models = {name: load_checkpoint(Path(cfg.out) / name, "reward")[1]["metrics"] for name in names}
    return {"model": Path(cfg.model).name if Path(cfg.model).is_dir() else cfg.model, "size": cfg.size,
            "seeds": cfg.seeds, "rows": rows, "models": models}


def markdown(results):
    """replication.md as a string."""
    columns = {**POLICIES, "ppo_minus_sft": "PPO - SFT", "bon_minus_sft": "best-of-N - SFT"}
    return sections(
        f"Model {results['model']}, {results['seeds']} seeds.  {how_to_read(results['seeds'])}",
        table(["measure", "split", *columns.values()], [
            [x["measure"], x["split"], *(interval(x[c], 3, "+" if "minus" in c else "") for c in columns)]
            for x in results["rows"]]),
        table(["model", "held-out accuracy", "the longer wins", "pairs"], [
            [name, f"{m['accuracy']:.3f} [{m['accuracy_low']:.3f}, {m['accuracy_high']:.3f}]",
             f"{m['longer_wins']:.3f}", str(m["pairs"])] for name, m in results["models"].items()]))


def run_study(cfg):
    """Runs what is not done yet, measures, and writes replication.json and replication.md."""
    if not cfg.judge and not cfg.judge_data and cfg.seeds < 2:
        raise UserError(f"--seeds {cfg.seeds}: without --judge or --judge-data the judge is another seed's "
                        "reward model, so 2 are needed")
    device, _ = setup(cfg)
    for source in paper.sources(cfg.task) if cfg.task in paper.TASKS else ():
        source.rows(cfg.data)       # now, or one that cannot be had would stop the study after hours
    out = Path(cfg.out)
    run_stages(plan(cfg), out, cfg.jobs)
    results = results_of(cfg, device)
    write_json(out / "replication.json", results)
    text = markdown(results)
    atomic_write(out / "replication.md", text.encode())
    print(f"{text}\nwrote {out}/replication.md and replication.json")
