"""The study on a published model and real text: every stage for several seeds, one table with intervals.

    python reproduce.py --task tldr --size gpu                                  # from the hub
    python reproduce.py --task tldr-short --judge sbert:all-MiniLM-L6-v2 --size cpu     # hours on 2 cores
    python reproduce.py --model DIR --data DIR                                  # local files

Writes OUT/seed-<s>/ (checkpoints, samples, logs), OUT/replication.json and OUT/replication.md.

Who judges: with --judge a fixed judge, a sentence encoder that knows the references.  Where nobody has
compared anything (tldr-short) it also labels the pairs that the reward model learns from.  Without it the
next seed's reward model judges each seed's policies; its errors are more like those of their own reward
model.  No policy is judged by the reward model it was trained against.

Deviation from the paper: its judge is GPT-4.
"""
import os
import shlex
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

import diversity
from common.checkpoint import load_checkpoint
from common.embed import UNFINISHED, load_encoder
from common.errors import UserError
from common.files import atomic_write, hash_of, read_jsonl, write_json
from common.flags import setup
from common.samples import read_samples
from common.stats import Interval, difference, mean_interval, over_seeds
from generalisation import reward_scores, rouge, similarity_scores, wins
from published import pretrained
from study.measures import agreement, load_with_task
from study.pipeline import ROOT, Stage, run_stages
from study.report import sections, table
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
                ppo="--preset small-llama --dtype fp32 --steps 40 --batch-size 32 --minibatches 2 --lr 1e-4 "
                    "--probe-every 0",
                dpo="--freeze 0.8 --lr 5e-5 --log-every 10",
                bon="--inputs 48 --n 8 --pool 64 --independent --batch-size 256"),
}
SECONDS = {  # of a stage: measured on two Zen 3 cores (SmolLM2-135M), on an H100, or guessed
    "cpu": dict(sft=800, label=800, reward=1500, ppo=5400, dpo=1500, bon=1800),
    "gpu": dict(sft=80, label=60, reward=80, ppo=140, dpo=80, bon=120),
    "paper": dict.fromkeys(MODULES, 3600)}
BYTES = 42      # of PPO for each parameter: weights, gradients, Adam's moments, four models
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
    inputs = [hash_of(path) for path in (cfg.model, cfg.data)]

    def add(name, needs, leaves, script, *flags):
        given = f"{SIZES[cfg.size][script]} {getattr(cfg, script)}".split() + [*map(str, flags)]
        command = [sys.executable, "-m", MODULES[script], *given, *common]
        command += ["--quiet"] * (script != "label")
        stages.append(Stage(name, needs, leaves, SECONDS[cfg.size][script], command,
                            " ".join([*given, *inputs])))
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
        if cfg.task == "tldr-short":
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
    return stages


def described(cfg, device):
    """What --plan prints: the stages of a seed with their hours, and the memory, without running any."""
    n, stages = pretrained.load(cfg.model)[0].n_params(), plan(cfg)
    there, largest = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), n * BYTES
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    lines = [f"{stage.name}, about {stage.seconds / 60:.0f} minutes: python {shlex.join(stage.work[1:])}"
             for stage in stages[:len(stages) // cfg.seeds]]
    hours = sum(stage.seconds for stage in stages) / 3600
    lines.append(f"and so for {cfg.seeds} seeds: about {hours:.1f} hours on the machine that SECONDS names "
                 "in study/published.py")
    lines.append(f"{cfg.model}: {n:,} parameters.  PPO with nothing frozen takes {largest / 2**30:.1f} GB, "
                 f"and activations more; {device} has {there / 2**30:.1f} GB"
                 + ": too few, see docs/published-models.md" * (largest > there))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------- measuring

def judge_of(cfg, seed, device):
    """The judge of one seed's policies: sample rows -> scores of outputs and of references (or None)."""
    if cfg.judge:
        return partial(similarity_scores, encode=load_encoder(cfg.judge, device, flag="--judge"))
    following = seed + 1 if seed + 1 in seeds_of(cfg) else cfg.seed
    path = Path(cfg.out) / f"seed-{following}/ckpt_reward.pt"
    model, tokenizer, task = load_with_task(path, "reward", "judge", device, cfg.dtype)
    return partial(reward_scores, model=model, tokenizer=tokenizer, task=task)


def measure_file(rows, scores, references, encoders):
    """{measure: (n,) values of n prompts, or (K,) across inputs} of one sample file.  scores, references: the
    judge's; encoders: {name: function of texts}."""
    words = np.array([[len(text.split()) for text in r["outputs"]] for r in rows])
    found = {"judge's score": np.mean(scores, axis=1)}
    if references:
        found["win rate"] = wins(scores, references)
    else:
        unfinished = 1. - np.array([r["finished"] for r in rows])
        found["similarity alone"] = (scores + UNFINISHED * unfinished).mean(axis=1)
    if rows[0]["policy"] == "sft":
        found |= {"reward model agrees with the judge": agreement([r["rewards"] for r in rows], scores),
                  "`the longer wins` agrees with it": agreement(words, scores)}
    found |= {"ROUGE-L": [np.mean([rouge(t, r["reference"])["rougeL"] for t in r["outputs"]]) for r in rows],
              "words": words.mean(1), "unfinished": [1 - np.mean(r["finished"]) for r in rows]}
    for part, cut in (("", rows), (f", first {CUT} words", diversity.first_words(rows, CUT))):
        for name, encode in encoders.items():
            embeddings = diversity.embed_outputs(cut, encode)
            varied = diversity.measure_samples(cut, embeddings, vocabulary=VOCABULARY)
            found |= {f"per input {m}{part}": varied["per_input"][m] for m in ("ead", "self_bleu")}
            found[f"per input embedding, {name}{part}"] = varied["per_input"]["embedding"]
            if not part:
                found |= {"across ead": varied["across"]["ead"],
                          f"across embedding, {name}": varied["across"]["embedding"]}
    return {name: np.asarray(values, dtype=float) for name, values in found.items()}


def measure(cfg, device):
    """{(policy, split, measure): (seeds, n)}."""
    encoders, found = {"model": load_encoder(cfg.encoder or cfg.model, device, cfg.dtype)}, {}
    if cfg.judge:
        encoders["sentence encoder"] = load_encoder(cfg.judge, device)
    for seed in seeds_of(cfg):
        judge, of_sft = judge_of(cfg, seed, device), {}
        for policy in POLICIES:         # SFT is the first
            for path in sorted(Path(cfg.out).glob(f"seed-{seed}/samples_{policy}_*.jsonl")):
                split, rows = path.stem.removeprefix(f"samples_{policy}_"), read_samples(path)
                scores, references = judge(rows)
                measured = measure_file(rows, scores, references, encoders)
                of_sft.setdefault(split, scores)
                measured["wins against SFT"] = wins(scores, of_sft[split])
                for name, values in measured.items():
                    found.setdefault((policy, split, name), []).append(values)
    return {key: np.array(values) for key, values in found.items()}


def summary(values, measure):
    """Interval of values (seeds, n): with three seeds or more over seeds and prompts, else over prompts.
    Across-input values are not of prompts: one number a seed."""
    if measure.startswith("across"):
        values = values.mean(1, keepdims=True)
    if len(values) >= 3:
        return Interval(*map(over_seeds(values).get, ("mean", "low", "high")))
    return mean_interval(np.nanmean(values, axis=0))


def training(out, seed):
    """{policy trained by PPO: what its log begins and ends with}, means over five steps."""
    found = {}
    for policy in (p for p in POLICIES if p.startswith("ppo")):
        log = read_jsonl(Path(out) / f"seed-{seed}/metrics_{policy}.jsonl", {})
        found[policy] = {f"{name}, {where}": float(np.mean([step[name] for step in part]))
                         for name in ("reward", "kl", "length", "eos_rate")
                         for where, part in (("first", log[:5]), ("last", log[-5:]))}
    return found


def row_of(found, m, split):
    """Means of a measure on a split, and differences to SFT on the same prompts.  found: as of `measure`."""
    of = {policy: found[policy, split, m] for policy in POLICIES if (policy, split, m) in found}
    return {"measure": m, "split": split, **{p: summary(x, m) for p, x in of.items()},
            "minus_sft": {p: summary(x - of["sft"], m) for p, x in of.items() if p != "sft"}}


def results_of(cfg, device):
    """Everything in replication.json."""
    found = measure(cfg, device)
    splits = sorted({split for _, split, _ in found}, key=lambda s: (s != "test", s))
    rows = [row_of(found, m, split) for m in dict.fromkeys(m for *_, m in found) for split in splits]
    score = {x["split"]: x for x in rows if x["measure"] == "judge's score"}
    gaps = [{"split": split, **{p: difference(score["test"][p], score[split][p]) for p in POLICIES}}
            for split in splits[1:]]
    names = [f"seed-{seed}/ckpt_reward.pt" for seed in seeds_of(cfg)]
    models = {name: load_checkpoint(Path(cfg.out) / name, "reward")[1]["metrics"] for name in names}
    return {"model": Path(cfg.model).name if Path(cfg.model).is_dir() else cfg.model, "size": cfg.size,
            "seeds": cfg.seeds, "rows": rows, "gaps": gaps, "models": models,
            "training": [training(cfg.out, seed) for seed in seeds_of(cfg)]}


def markdown(results):
    """replication.md as a string."""
    def cells(row, digits):
        return [format(Interval(*row[p]), digits) if row.get(p) else "-" for p in POLICIES]
    policies = list(POLICIES.values())
    over = "seeds and prompts" if results["seeds"] >= 3 else "prompts, for these seeds alone"
    means = [[x["measure"], x["split"], *cells(x, ".3f")] for x in results["rows"]]
    differences = [[x["measure"], x["split"], *cells(x["minus_sft"], "+.3f")[1:]] for x in results["rows"]
                   if x["measure"].startswith(("judge", "simil", "win rate", "ROUGE", "per input"))]
    logs = [(str(i), p, x) for i, of in enumerate(results["training"]) for p, x in of.items()]
    return sections(
        f"Model {results['model']}, {results['seeds']} seeds.  Brackets are 95 % intervals over {over}.",
        table(["measure", "split", *policies], means),
        "Minus SFT, on the same prompts:", table(["measure", "split", *policies[1:]], differences),
        "The judge's score in distribution minus out of it:",
        table(["split", *policies], [[x["split"], *cells(x, "+.3f")] for x in results["gaps"]]),
        "PPO, means of its first and last five steps:",
        table(["run", "policy", *logs[0][2]], [[i, POLICIES[p], *(f"{v:.2f}" for v in x.values())]
                                               for i, p, x in logs]),
        table(["model", "held-out accuracy", "the longer wins", "pairs"], [
            [name, f"{m['accuracy']:.3f} [{m['accuracy_low']:.3f}, {m['accuracy_high']:.3f}]",
             f"{m['longer_wins']:.3f}", str(m["pairs"])] for name, m in results["models"].items()]))


def run_study(cfg):
    """Runs what is not done yet, measures, and writes replication.json and replication.md."""
    if not cfg.judge and cfg.task == "tldr-short":
        raise UserError("--task tldr-short: nobody has compared its texts; --judge sbert:NAME does")
    if not cfg.judge and cfg.seeds < 2:
        raise UserError(f"--seeds {cfg.seeds}: without --judge the judge is another seed's reward model, so "
                        "2 are needed")
    device, _ = setup(cfg)
    for source in paper.sources(cfg.task) if cfg.task in paper.TASKS else ():
        source.rows(cfg.data)       # now, or one that cannot be had would stop the study after hours
    out = Path(cfg.out)
    if cfg.plan:
        print(described(cfg, device))
        return
    run_stages(plan(cfg), out, cfg.jobs)
    results = results_of(cfg, device)
    write_json(out / "replication.json", results)
    text = markdown(results)
    atomic_write(out / "replication.md", text.encode())
    print(f"{text}\nwrote {out}/replication.md and replication.json")
