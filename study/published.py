"""The study on a published model and real text: every stage for several seeds, one table with intervals.

    python reproduce.py --task tldr --size gpu                                  # from the hub
    python reproduce.py --model DIR --data DIR --judge-data DIR --size cpu      # local, hours on 2 cores

Writes OUT/seed-<s>/ (checkpoints, samples, logs), OUT/replication.json and OUT/replication.md.

The judge is a reward model too, trained from the first seed's SFT model on --judge-data's preferences
(another annotator's, or other posts').  Without --judge-data the next seed's reward model judges each seed's
policies; its errors are more like those of their own reward model.  No policy is judged by the reward model
it was trained against.

Deviation from the paper: its judge is GPT-4.
"""
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import diversity
from common.checkpoint import load_checkpoint
from common.embed import load_encoder
from common.errors import UserError
from common.files import atomic_write, hash_of, write_json
from common.samples import read_samples
from common.stats import over_seeds
from common.tokenizer import load_tokenizer
from generalisation import at_equal_length, reward_scores, rouge, wins
from splits import task_from
from study.claims import ENOUGH_SEEDS
from study.pipeline import ROOT, Stage, run_stages
from study.report import how_to_read, interval, sections, signed, table

SIZES = {  # flags of each stage
    "paper": dict(sft=["--preset", "paper"], reward=["--preset", "paper"], ppo=["--preset", "paper"],
                  bon=["--preset", "paper"]),
    # as chosen on an H100: a reward model of which 80 % are frozen stayed below `the
    # longer wins`, and with a quarter of this rate PPO had hardly moved
    "gpu": dict(sft=["--preset", "small-llama"],
                reward=["--preset", "small-llama", "--prompts", "20000", "--freeze", "0", "--lr", "5e-5",
                        "--epochs", "2", "--micro-batch-size", "8"],
                ppo=["--preset", "small-llama", "--steps", "30", "--batch-size", "256", "--lr", "2e-4",
                     "--micro-batch-size", "32"],
                bon=["--preset", "paper", "--inputs", "200", "--dtype", "bf16"]),
    # the paper's settings on one of its own models; --size gpu takes them for those
    "opt": dict(sft=["--preset", "paper", "--dtype", "bf16"],
                reward=["--preset", "paper", "--dtype", "bf16"], ppo=["--preset", "paper", "--dtype", "bf16"],
                bon=["--preset", "paper", "--dtype", "bf16"]),
    "cpu": dict(sft=["--preset", "small-llama", "--rows", "800", "--max-prompt-tokens", "320"],
                reward=["--preset", "small-llama", "--batch-size", "8"],
                ppo=["--preset", "small-llama", "--steps", "20", "--batch-size", "32", "--minibatches", "2",
                     "--lr", "1e-4"],
                bon=["--inputs", "30", "--dtype", "bf16", "--batch-size", "256"]),
}
# a guess at each stage's seconds with --size cpu, for the first time left; the runner then goes by what it
# sees
SECONDS = dict(sft=900, reward=900, ppo=1800, sampled_sft=1800, sampled_ppo=600, judge=900)
POLICIES = {"sft": "SFT", "bon": "best-of-N", "ppo": "PPO"}
PAIRS = (("ppo", "sft"), ("bon", "sft"), ("ppo", "bon"))
VOCABULARY = 50257      # V of EAD, the authors'
CUT = 20                # words of an output on which diversity is measured once more: length confounds it


def flags_of(size, model):
    """{script: list of flags} of a --size."""
    return SIZES["opt" if size == "gpu" and Path(model).name.startswith("opt-") else size]


class Study(NamedTuple):
    """What is run and measured, and where."""
    out: Path
    model: str              # a hub name or a Hugging Face directory
    task: str
    data: str
    judge_data: str         # folder whose preferences train the judge; "": the next seed's reward model
    size: str
    flags: dict             # {script: list of flags}
    encoder: str            # of the embedding measures
    seeds: range
    device: str
    dtype: str
    threads: int
    jobs: int               # stages side by side, which share a GPU's memory


# --------------------------------------------------------------------------------------------------- the plan

def plan(study):
    """The stages of a Study, in order.  Each script continues by itself what was cut."""
    common = ["--device", study.device, "--threads", str(study.threads), "--quiet"]
    task = ["--task", study.task] if study.task else []
    data = ["--data", study.data] if study.data else []
    inputs, stages = " ".join(map(hash_of, (study.model, study.data, study.judge_data))), []

    def add(name, needs, leaves, script, *flags):
        script_and_flags = [str(ROOT / f"{script}.py"), *study.flags[script], *map(str, flags), *common]
        command = [sys.executable, *script_and_flags]
        stages.append(Stage(name, needs, leaves, SECONDS[name.split("/")[-1]], command, inputs))
    for seed in study.seeds:
        home, here = f"seed-{seed}", study.out / f"seed-{seed}"
        own = ["--seed", seed, "--out", here]
        sft, reward, ppo = (here / f"ckpt_{kind}.pt" for kind in ("sft", "reward", "ppo"))
        add(f"{home}/sft", (), (f"{home}/ckpt_sft.pt",), "sft", "--model", study.model, *task, *data, *own)
        add(f"{home}/reward", (f"{home}/sft",), (f"{home}/ckpt_reward.pt",), "reward", "--model", sft, *own)
        add(f"{home}/ppo", (f"{home}/reward",), (f"{home}/ckpt_ppo.pt",), "ppo", "--model", sft,
            "--reward", reward, *own)
        samples = [f"{home}/samples_{policy}_*.jsonl" for policy in POLICIES]       # of sft, bon and ppo
        add(f"{home}/sampled_sft", (f"{home}/reward",), tuple(samples[:2]), "bon",
            "--model", sft, "--reward", reward, *own)
        add(f"{home}/sampled_ppo", (f"{home}/ppo",), tuple(samples[2:]), "bon", "--model", ppo, *own)
    if study.judge_data:
        first = study.seeds[0]
        add("judge", (f"seed-{first}/sft",), ("ckpt_judge.pt",), "reward",
            "--model", study.out / f"seed-{first}" / "ckpt_sft.pt", *task, "--data", study.judge_data,
            "--seed", first + 1000, "--out", study.out / "ckpt_judge.pt")
    return stages


# ------------------------------------------------------------------------------------------------- measuring

def judge_of(study, seed, device):
    """The judge of one seed's policies: a function of sample rows giving scores of outputs and of
    references."""
    following = study.seeds[(study.seeds.index(seed) + 1) % len(study.seeds)]
    path = study.out / ("ckpt_judge.pt" if study.judge_data else f"seed-{following}/ckpt_reward.pt")
    model, saved = load_checkpoint(path, "reward", "judge", device, study.dtype)
    tokenizer = load_tokenizer(saved["tokenizer"])
    return partial(reward_scores, model=model, tokenizer=tokenizer, task=task_from(saved["task"]))


def measure_file(rows, score, encode):
    """{measure: (n,) values of n prompts, or (K,) across inputs, or one} of one sample file."""
    scores, references = score(rows)
    found = {"win rate": wins(scores, references),
             "win rate at equal length": [at_equal_length(rows, scores, references).mean],
             "ROUGE-L": [np.mean([rouge(t, r["reference"])["rougeL"] for t in r["outputs"]]) for r in rows],
             "words": [np.mean([len(t.split()) for t in r["outputs"]]) for r in rows],
             "unfinished": [1 - np.mean(r["finished"]) for r in rows]}
    for part, cut in (("", rows), (f", first {CUT} words", diversity.first_words(rows, CUT))):
        varied = diversity.measure_samples(cut, diversity.embed_outputs(cut, encode), vocabulary=VOCABULARY)
        for kind, names in (("per_input", ("ead", "self_bleu", "embedding")),
                            ("across", ("ead", "embedding"))):
            found |= {f"{kind.replace('_', ' ')} {name}{part}": varied[kind][name] for name in names}
    return {name: np.asarray(values, dtype=float) for name, values in found.items()}


def measure(study, device):
    """{(policy, split, measure): (seeds, n)}."""
    encode, found = load_encoder(study.encoder or study.model, device, study.dtype), {}
    for seed in study.seeds:
        here, score = study.out / f"seed-{seed}", judge_of(study, seed, device)
        for policy in POLICIES:
            for path in sorted(here.glob(f"samples_{policy}_*.jsonl")):
                split = path.stem.removeprefix(f"samples_{policy}_")
                for name, values in measure_file(read_samples(path), score, encode).items():
                    found.setdefault((policy, split, name), []).append(values)
    return {key: np.array(values) for key, values in found.items()}


def summary(values, measure):
    """(seeds, n) of n prompts -> as `over_seeds`.  Across-input values are not of prompts: one number a
    seed."""
    return over_seeds(values.mean(1, keepdims=True) if measure.startswith("across") else values)


def results_of(study, device):
    """Everything in replication.json."""
    found = measure(study, device)
    differences = {f"{a} - {b} | {split} | {m}": summary(values - found[b, split, m], m) for a, b in PAIRS
                   for (policy, split, m), values in found.items() if policy == a and (b, split, m) in found}
    paths = [study.out / f"seed-{s}/ckpt_{kind}.pt" for s in study.seeds for kind in ("reward", "ppo")]
    paths += [study.out / "ckpt_judge.pt"] if study.judge_data else []
    models = {}
    for path in paths:
        kind = "lm" if path.name == "ckpt_ppo.pt" else "reward"
        models[str(path.relative_to(study.out))] = load_checkpoint(path, kind)[1]["metrics"]
    local = Path(study.model)
    return {"model": local.name if local.is_dir() else study.model, "size": study.size,
            "seeds": len(study.seeds),
            "values": {f"{policy} | {split} | {m}": summary(v, m) for (policy, split, m), v in found.items()},
            "differences": differences, "models": models}


# ------------------------------------------------------------------------------------------------- the tables

def verdict(difference):
    """A difference in words, by its interval over seeds and prompts."""
    if difference is None or len(difference["per_seed"]) < ENOUGH_SEEDS:
        return ""       # so few seeds decide nothing
    low, high = difference["low"], difference["high"]
    return "higher" if low > 0 else "lower" if high < 0 else "not shown"


def markdown(results):
    """replication.md as a string."""
    splits = sorted({key.split(" | ")[1] for key in results["values"]}, key=lambda s: (s != "test", s))
    measures = dict.fromkeys(key.split(" | ")[2] for key in results["values"])
    models = [[name, f"{m['accuracy']:.3f} [{m['accuracy_low']:.3f}, {m['accuracy_high']:.3f}]",
               f"{m['longer_wins']:.3f}", str(m["pairs"])]
              for name, m in results["models"].items() if "accuracy" in m]
    return sections(
        f"Model {results['model']}, {results['seeds']} seeds.  {how_to_read(results['seeds'])}",
        table(["measure", "split", *POLICIES.values(), "PPO - SFT", "best-of-N - SFT"],
              [_row(results, measure, split) for measure in measures for split in splits]),
        table(["model", "held-out accuracy", "the longer wins", "pairs"], models))


def _row(results, measure, split):
    values = [results["values"][f"{p} | {split} | {measure}"] for p in POLICIES]
    minus_sft = [results["differences"][f"{p} - sft | {split} | {measure}"] for p in ("ppo", "bon")]
    return [measure, split, *(interval(v, 3) for v in values),
            *(f"{signed(d, 3)} {verdict(d)}".strip() for d in minus_sft)]


def run_study(study, device):
    """Runs what is not done yet, measures, and writes replication.json and replication.md."""
    if not study.judge_data and len(study.seeds) < 2:
        raise UserError(f"--seeds {len(study.seeds)}: without --judge-data the judge is another seed's "
                        "reward model, so "
                        "2 are needed")
    run_stages(plan(study), study.out, study.jobs)
    results = results_of(study, device)
    write_json(study.out / "replication.json", results)
    text = markdown(results)
    atomic_write(study.out / "replication.md", text.encode())
    print(f"{text}\nwrote {study.out}/replication.md and replication.json")
