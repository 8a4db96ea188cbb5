"""The whole study in order, over seeds: results.md, results.json and figure.png.

    python reproduce.py                  # 2 seeds side by side, a thread each: a quarter of an hour, 2 cores
    python reproduce.py --quick          # every stage at toy size in a minute, into runs/quick: a check only
    python reproduce.py --seeds 5        # more seeds
    python reproduce.py --full           # 5 seeds, and reviewers.py: what the paper's reviewers asked, an
    hour

A run killed at any moment goes on where it stopped: each stage is done once its mark stands in
runs/study-<hash of settings and code>/.

For each seed: a base model is pretrained on posts with mixed reference noise; then in each of the two worlds
(systematic and independent noise) SFT, a reward model, PPO, PPO on the true reward, and best-of-16; in the
first also PPO at other prices of KL.  Seeds vary initialisation, data order and sampling; posts, references
and test sets are the same for all, so that differences are paired by prompt.

Deviations from the paper: its two tasks are replaced by the embedded one and its GPT-4 judge by the world's
truth; generalisation is sampled at temperature 0.7, diversity at 1; SFT is also sampled at the temperature
that gives it PPO's per-input diversity, to tell learning from sharpening.
"""
import contextlib
import hashlib
import json
import os
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

import bon
import diversity
import ppo
import reward
import sft
import synthetic
from generalisation import read_samples, truth_scores, wins
from runtime import Common, Fault, bootstrap, load_checkpoint, require, run, setup, write_whole
from splits import tokenizer

WORLDS = {"world": "systematic noise", "world-independent": "independent noise"}
SPLITS = ["test"] + [s for s in synthetic.SPLITS if s.startswith("ood_")]
GRID = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)    # temperatures of SFT
SWEEP = (0.0, 0.3)                                  # betas beside the default 0.1
TITLES = {"ood_article": "news\nformat", "ood_words50": "half the\nwords new",
          "ood_words100": "all story\nwords new", "ood_distractors4": "4 distractor\nstories",
          "ood_distractors7": "7 distractor\nstories"}
NAMES = {"sft": "SFT", "sft_matched": "SFT, matched temperature", "bon": "BoN-16", "ppo": "PPO",
         "ppo_truth": "PPO on the true reward", "oracle": "oracle best-of-16"}


@dataclass
class Config(Common):
    seeds: int = 2              # runs, with seeds --seed, --seed + 1, ...; 5 with --full
    full: bool = False          # also the sections of reviewers.py
    jobs: int = 2               # runs side by side, one thread each
    quick: bool = False         # toy sizes, into runs/quick
    inputs: int = 100           # prompts of each test set
    base_rows: int = 24576      # posts the base model is pretrained on
    sft_rows: int = 8192        # posts of SFT in each world
    prompts: int = 8000         # prompts with preferences
    ppo_steps: int = 45         # rollout batches of PPO


# ------------------------------------------------------------------------------------------------- the stages

class Steps:
    """What is done in one world for one seed, on files in the folder `here`; the numbers of the recipe."""

    def __init__(self, cfg, seed, folder, world):
        self.cfg, self.world, self.here = cfg, world, Path(folder) / f"seed{seed}" / world
        self.base = str(Path(folder) / f"seed{seed}" / "ckpt_base.pt")
        self.same = dict(seed=seed, threads=1, device=cfg.device, dtype=cfg.dtype, save_every=cfg.save_every,
                         quiet=True)
        self.held_out, self.batch, self.pool = (24, 16, 32) if cfg.quick else (500, 64, 64)

    def ckpt(self, name):
        return str(self.here / f"ckpt_{name}.pt")

    def pretrain(self, task, **more):
        sft.main(sft.Config(task=task, out=self.base, **{"rows": self.cfg.base_rows, **more}, **self.same))

    def train_sft(self):
        sft.main(sft.Config(model=self.base, task=self.world, rows=self.cfg.sft_rows, lr=1.5e-3,
                            out=self.ckpt("sft"), **self.same))

    def train_reward(self):
        reward.main(reward.Config(model=self.ckpt("sft"), prompts=self.cfg.prompts, held_out=self.held_out,
                                  out=self.ckpt("reward"), **self.same))

    def train_ppo(self, name, beta=0.1, against=None, longer=1):
        ppo.main(ppo.Config(model=self.ckpt("sft"), reward=against or self.ckpt("reward"), kl_coef=beta,
                            steps=longer * self.cfg.ppo_steps, batch=self.batch, out=self.ckpt(name),
                            **self.same))

    def sample(self, name, temperature, splits="", scored=False, folder=None, **more):
        """Sample files of one policy in `folder`, t<temperature> by default; scored: best-of-16's too."""
        out = self.here / (folder or f"t{temperature:g}")
        bon.main(bon.Config(model=self.ckpt(name), reward=self.ckpt("reward") if scored else "",
                            pool=self.pool if scored else 0, splits=splits, temperature=temperature,
                            out=str(out), **{"inputs": self.cfg.inputs, **more}, **self.same))

    def sample_all(self):
        for name in ("sft", "ppo", "ppo_truth"):
            self.sample(name, 0.7, scored=name == "sft")
            self.sample(name, 1.0, "test", scored=name == "sft")

    def sweep_beta(self, beta):
        name = f"ppo_b{beta:g}"
        self.train_ppo(name, beta)
        self.sample(name, 0.7, "test")
        self.sample(name, 1.0, "test")

    def match(self):
        """SFT over temperatures, and SFT at the temperature that gives it PPO's per-input diversity (the true
        one, at 0.7, on validation prompts)."""
        for temperature in GRID:
            if temperature not in (0.7, 1.0):
                self.sample("sft", temperature, "test")
        found = {}
        for name, grid in (("sft", GRID), ("ppo", (0.7,))):
            for t in grid:
                self.sample(name, t, "validation", folder=f"match{t:g}", inputs=min(60, self.cfg.inputs))
                rows = read_samples(self.here / f"match{t:g}" / f"samples_{name}_validation.jsonl")
                found[name, t] = float(np.mean([synthetic.semantic_diversity(r["outputs"])[0] for r in rows]))
        # diversity grows with temperature, from 0 for greedy decoding; maximum.accumulate guards np.interp
        # against noise between neighbours
        curve = np.maximum.accumulate([0., *(found["sft", t] for t in GRID)])
        temperature = round(float(np.interp(found["ppo", 0.7], curve, (0., *GRID))), 3)
        self.sample("sft", temperature, folder="matched", policy="sft_matched")


def chains(cfg, seed, folder):
    """{chain: [(stage, seconds it takes about, function)]} of one seed.  Stages of a chain run in order, in a
    process of their own; every chain but `base` starts when `base` is done, or at once if it has its own.
    Functions write files under folder / seed<k>."""
    steps = {world: Steps(cfg, seed, folder, world) for world in WORLDS}
    out = {"base": [("base", 139, partial(steps["world"].pretrain, "world-mixed"))]}
    for world, s in steps.items():
        out[world] = [("sft", 30, s.train_sft), ("reward", 65, s.train_reward),
                      ("ppo", 28, partial(s.train_ppo, "ppo")),
                      ("ppo_truth", 25, partial(s.train_ppo, "ppo_truth", against="truth")),
                      ("sample", 40, s.sample_all), ("match", 16, s.match)]
        if world == "world":
            out[world] += [(f"ppo_b{beta:g}", 30, partial(s.sweep_beta, beta)) for beta in SWEEP]
        out[world].append(("measure", 20, partial(measure, s.here)))
    if cfg.full:
        import reviewers        # which builds on this file
        for name, more in reviewers.chains(cfg, seed, folder, steps).items():
            out[name] = out.get(name, []) + more
    return out


def words_of(world):
    """V of EAD in a world: kinds of words in the references of its test sets."""
    return diversity.reference_vocabulary([world.rows(s, 500) for s in world.SPLITS
                                           if s == "test" or s.startswith("ood_")])


def measure(here, world=synthetic):
    """Every sample file under one world's folder -> measures.json: per-prompt win rates, and each diversity
    measure."""
    model, saved = load_checkpoint(here / "ckpt_sft.pt", "lm")
    enc, vocabulary, out = tokenizer(saved["tokenizer"]), words_of(world), []
    for path in sorted([*here.glob("t*/samples_*.jsonl"), *here.glob("matched/samples_*.jsonl")]):
        rows = read_samples(path)
        policy, split, temperature = rows[0]["policy"], rows[0]["split"], rows[0]["temperature"]
        scores, references = truth_scores(rows)
        line = {"policy": policy, "split": split, "temperature": temperature,
                "wins": wins(scores, references).tolist(),
                "score": float(np.mean(scores)),
                "unfinished": 1 - float(np.mean([f for r in rows for f in r["finished"]])),
                "length": float(np.mean([len(diversity.words(t)) for r in rows for t in r["outputs"]]))}
        # the best of these 16 by the truth: what a perfect reward model could choose
        if policy == "sft" and temperature == 0.7:
            out.append({"policy": "oracle", "split": split, "temperature": 0.7,
                        "wins": wins(np.max(scores, axis=1, keepdims=True), references).tolist(),
                        "score": float(np.max(scores, axis=1).mean())})
        # the full set of measures where the paper measures diversity
        if temperature == 1.0 and policy in ("sft", "bon", "ppo", "ppo_truth"):
            vectors = diversity.embed(model, enc, [t for r in rows for t in r["outputs"]])
            vectors = vectors.reshape(len(rows), len(rows[0]["outputs"]), -1)
            found = diversity.measure_samples(rows, vocabulary=vocabulary, embeddings=vectors, world=world)
            line |= {f"per_input_{k}": v.tolist() for k, v in found["per_input"].items()}
            line |= {f"across_{k}": [float(v.mean())] for k, v in found["across"].items()}
        else:
            line["per_input_semantic"] = [world.semantic_diversity(r["outputs"])[0] for r in rows]
        out.append(line)
    kl = {p.stem.removeprefix("metrics_"): json.loads(p.read_text().splitlines()[-1])
          for p in here.glob("metrics_ppo*.jsonl")}
    accuracy = load_checkpoint(here / "ckpt_reward.pt", "reward")[1]["metrics"]
    write_whole(here / "measures.json", json.dumps({"samples": out, "ppo": kl, "reward": accuracy}).encode())


def die_with_parent():
    """A worker whose parent was killed must stop, or it would race the run that resumes."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def run_chain(cfg, seed, chain, folder):
    """The stages of one chain that are not done yet, in a process of its own."""
    die_with_parent()
    home = Path(folder) / f"seed{seed}" / chain
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "log.txt", "a") as log, contextlib.redirect_stdout(log):
        setup(Config(seed=seed, threads=1))
        for name, _, function in chains(cfg, seed, folder)[chain]:
            done = home / f"{name}.done"
            if done.exists():
                continue
            start = time.time()
            try:
                function()
            except Exception:
                traceback.print_exc(file=log)
                raise
            write_whole(done, f"{time.time() - start:.1f}\n".encode())


def run_all(cfg, folder):
    """Runs the chains of all seeds side by side with a progress bar; the time left follows from the stages'
    usual shares."""
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    plan = {(s, chain, name): weight for s in seeds for chain, todo in chains(cfg, s, folder).items()
            for name, weight, _ in todo}
    finished = lambda: {k for k in plan
                        if (folder / f"seed{k[0]}" / k[1] / f"{k[2]}.done").exists()}  # noqa: E731
    # all bases first, then the chains that stand on them, the longest first
    order = list(dict.fromkeys((s, chain) for s, chain, _ in plan))
    length = {c: sum(w for k, w in plan.items() if k[:2] == c) for c in order}
    order.sort(key=lambda c: (c[1] != "base", -length[c]))
    look = "{percentage:3.0f}% |{bar:20}| {elapsed} passed, {remaining} left{postfix}"
    with (tqdm(total=sum(plan.values()), initial=sum(plan[k] for k in finished()), bar_format=look) as bar,
          ProcessPoolExecutor(cfg.jobs, mp_context=get_context("spawn")) as pool):
        jobs = {}
        while len(jobs) < len(order) or not all(j.done() for j in jobs.values()):
            for seed, chain in order:
                stands = chain == "base" or (seed, "base") in jobs and jobs[seed, "base"].done()
                if (seed, chain) not in jobs and stands:
                    jobs[seed, chain] = pool.submit(run_chain, cfg, seed, chain, folder)
            time.sleep(0.5)
            done = finished()
            bar.n = sum(plan[k] for k in done)
            now = [next((f"{k[2]} ({k[0]}, {k[1]})" for k in plan if k[:2] == c and k not in done), "")
                   for c, job in jobs.items() if job.running() and (folder / f"seed{c[0]}" / c[1]).is_dir()]
            bar.set_postfix_str(", ".join(x for x in now if x), refresh=False)
            bar.refresh()
            for job in jobs.values():
                if job.done() and job.exception():
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise Fault(f"{job.exception()} (see log.txt under {folder})") from job.exception()
        bar.n = bar.total


# ----------------------------------------------------------------------------------------------- the findings

class Results:
    """Measures of all seeds, asked by (world, policy, split, temperature)."""

    def __init__(self, folder, seeds, worlds=WORLDS):
        self.seeds, self.data, self.ppo, self.reward = list(seeds), {}, {}, {}
        for seed in self.seeds:
            for world in worlds:
                found = json.loads((folder / f"seed{seed}" / world / "measures.json").read_text())
                self.ppo[world, seed], self.reward[world, seed] = found["ppo"], found["reward"]
                for line in found["samples"]:
                    temperature = "matched" if line["policy"] == "sft_matched" else line["temperature"]
                    self.data[world, line["policy"], line["split"], temperature, seed] = line

    def get(self, world, policy, split, temperature, key):
        """(seeds, n) array of one measure."""
        temperature = "matched" if policy == "sft_matched" else temperature
        return np.array([np.atleast_1d(self.data[world, policy, split, temperature, s][key])
                         for s in self.seeds], dtype=float)

    def estimate(self, world, policy, split, temperature, key):
        """{mean, low, high, seed_sd, per_seed}: the seeds' mean per prompt, bootstrapped over prompts, and
        the spread over seeds."""
        return summary(self.get(world, policy, split, temperature, key))


def redrawn(x, draws=1000):
    """Means of x (seeds, prompts) over bootstrap draws of seeds and of prompts: (draws,).  Arrays of one
    shape get the same draws, so that what is computed from several stays paired."""
    rng, known = np.random.default_rng(0), ~np.isnan(x)
    seeds, prompts = (rng.multinomial(n, [1 / n] * n, draws) for n in x.shape)      # how often each is drawn
    total, count = (((seeds @ v) * prompts).sum(1) for v in (np.where(known, x, 0), known))
    return total / count


def summary(x):
    """x: (seeds, prompts) -> {mean, low, high, seed_sd, per_seed, all_low, all_high}.  The interval low, high
    covers the choice of prompts, seed_sd that of the seed, all_low, all_high both: seeds and prompts are
    resampled together."""
    per_seed = np.nanmean(x, axis=1)
    sd = float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None
    per_prompt = np.nanmean(x, axis=0)
    mean, low, high = bootstrap(per_prompt[~np.isnan(per_prompt)])
    both = np.percentile(redrawn(x), (2.5, 97.5))
    return {"mean": float(mean), "low": float(low), "high": float(high), "seed_sd": sd,
            "per_seed": [round(float(v), 4) for v in per_seed],
            "all_low": float(both[0]), "all_high": float(both[1])}


def verdict(estimate, expected):
    """A claim that a difference has the sign `expected` (+1 or -1): it holds or is contradicted if the
    interval over prompts lies on one side of zero and every seed agrees; otherwise these runs do not
    decide."""
    low, high = sorted((expected * estimate["low"], expected * estimate["high"]))
    seeds = [expected * v for v in estimate["per_seed"]]
    if low > 0 and min(seeds) > 0:
        return "HOLDS"
    if high < 0 and max(seeds) < 0:
        return "DOES NOT HOLD: the opposite"
    return "NOT SHOWN"


def show(e, digits=2):
    return f"{e['mean']:.{digits}f} [{e['low']:.{digits}f}, {e['high']:.{digits}f}]"


def claims(r):
    """Each of the paper's claims in each world: {claim, world, verdict, numbers (in words), estimate}."""
    return [claim for world in WORLDS for claim in claims_in(r, world)]


def claims_in(r, world):
    """The claims in one world, every one computed from the results."""
    out, away = [], SPLITS[1:]

    def win(policy, *splits):       # (seeds, prompts): win rate against the reference, mean over test sets
        return np.mean([r.get(world, policy, s, 0.7, "wins") for s in splits], axis=0)

    def vary(policy, measure):      # (seeds, prompts), or (seeds, 1) across inputs
        return r.get(world, policy, "test", 1.0, measure)

    def state(claim, estimate, expected, words):
        out.append({"claim": claim, "world": WORLDS[world], "verdict": verdict(estimate, expected),
                    "numbers": words.format(show(estimate)), "estimate": estimate})

    state("PPO beats SFT in distribution", summary(win("ppo", "test") - win("sft", "test")), 1,
          "win rate PPO - SFT {}")
    state("PPO beats SFT out of distribution", summary(win("ppo", *away) - win("sft", *away)), 1,
          "mean over the OOD sets, win rate PPO - SFT {}")
    advantage = {s: win("ppo", s) - win("sft", s) for s in SPLITS}
    by_set = ", ".join(f"{s.removeprefix('ood_')} {np.mean(a):+.2f}" for s, a in advantage.items())
    state("PPO's advantage over SFT grows with the shift (its gap ID - OOD is smaller)",
          summary(np.mean([advantage[s] for s in away], axis=0) - advantage["test"]), 1,
          f"advantage OOD - advantage ID {{}}; by set: {by_set}")
    for key, what in (("semantic", "true facts"), ("ead", "EAD"), ("embedding", "embeddings")):
        state(f"PPO cuts per-input diversity ({what})",
              summary(vary("ppo", f"per_input_{key}") - vary("sft", f"per_input_{key}")), -1, "PPO - SFT {}")
    for key, what in (("semantic", "true facts"), ("ead", "EAD")):
        per, across = (1 - np.nanmean(vary("ppo", name), 1) / np.nanmean(vary("sft", name), 1)
                       for name in (f"per_input_{key}", f"across_{key}"))
        d = per - across            # one number a seed: the interval is the range of the seeds
        estimate = {"mean": float(d.mean()), "low": float(d.min()), "high": float(d.max()),
                    "seed_sd": None, "per_seed": d.tolist()}
        state(f"PPO cuts per-input diversity more than across-input ({what})", estimate, 1,
              f"relative loss per input {per.mean():.0%}, across inputs {across.mean():.0%}; difference "
              "(range over seeds) {}")
    state("best-of-16 beats SFT", summary(win("bon", "test") - win("sft", "test")), 1,
          "in distribution, BoN - SFT {}")
    state("PPO beats best-of-16", summary(win("ppo", "test") - win("bon", "test")), 1,
          "in distribution, PPO - BoN {}")
    state("PPO beats best-of-16 out of distribution", summary(win("ppo", *away) - win("bon", *away)), 1,
          "PPO - BoN {}")
    state("best-of-16 is less varied per input than SFT",
          summary(vary("bon", "per_input_semantic") - vary("sft", "per_input_semantic")), -1,
          "BoN - SFT, true facts {}")
    state("PPO is less varied per input than best-of-16",
          summary(vary("ppo", "per_input_semantic") - vary("bon", "per_input_semantic")), -1,
          "PPO - BoN, true facts {}")
    state("PPO is more than sharpening: it beats SFT at the temperature of equal diversity",
          summary(win("ppo", "test") - win("sft_matched", "test")), 1,
          "in distribution, PPO - matched SFT {}")
    state("the same out of distribution", summary(win("ppo", *away) - win("sft_matched", *away)), 1,
          "PPO - matched SFT {}")
    return out


def table(header, rows):
    return "\n".join(["| " + " | ".join(header) + " |", "|" + " --- |" * len(header),
                      *("| " + " | ".join(row) + " |" for row in rows)])


def sweep(r):
    """[(beta, reward, truth, KL, win rate, diversity)] of PPO in the first world, means over seeds."""
    out = []
    for beta in sorted((*SWEEP, 0.1)):
        name = "ppo" if beta == 0.1 else f"ppo_b{beta:g}"
        logged = [r.ppo["world", s][name] for s in r.seeds]
        mean = lambda key: float(np.mean([x[key] for x in logged]))  # noqa: E731, B023
        out.append({"beta": beta, "reward": mean("reward"), "truth": mean("truth"), "kl": mean("kl"),
                    "length": mean("length"), "eos_rate": mean("eos_rate"),
                    "win": r.estimate("world", name, "test", 0.7, "wins"),
                    "diversity": r.estimate("world", name, "test", 1.0, "per_input_semantic")})
    return out


def cell(e, interval=True):
    """An estimate as a table shows it: mean, interval over prompts, standard deviation over seeds."""
    return (show(e) if interval else f"{e['mean']:.2f}") + (f" ± {e['seed_sd']:.2f}"
                                                            if e["seed_sd"] is not None else "")


def report(r, cfg, stated, swept, seconds):
    """results.md as a string."""
    prompts = r.get("world", "sft", "test", 0.7, "wins").shape[1]
    toy = "  TOY SIZES (--quick): these are not results." if cfg.quick else ""
    parts = [f"# Results\n\n{len(r.seeds)} seeds, {prompts} prompts a test set, 16 outputs a prompt.  An "
             "entry is the mean over seeds with a 95 % interval, bootstrapped over prompts, then the "
             "standard deviation over seeds.  Written by `python reproduce.py`; its stages took "
             f"{seconds / 60:.0f} CPU-minutes.{toy}",
             *(part for world in WORLDS for part in report_world(r, world)),
             "## The price of KL (systematic noise)",
             table(["beta", "reward", "true score", "KL, nats", "length", "win rate ID",
                    "per-input true diversity"],
                   [[f"{x['beta']:g}", f"{x['reward']:.2f}", f"{x['truth']:.2f}", f"{x['kl']:.2f}",
                     f"{x['length']:.1f}", cell(x["win"]), cell(x["diversity"])] for x in swept]),
             "## What of the paper's claims holds in these runs",
             "A claim holds, or its opposite does, if the interval lies on one side of zero and every "
             "seed agrees; else it is not shown.",
             table(["claim", "world", "verdict", "numbers"],
                   [[c["claim"], c["world"], c["verdict"], c["numbers"]] for c in stated])]
    return "\n\n".join(parts) + "\n"


def report_world(r, world):
    """The paragraphs and tables of one world."""
    yield f"## World with {WORLDS[world]}\n\nWin rate against the reference, true judge, temperature 0.7"
    yield table(["policy", *(s.removeprefix("ood_") for s in SPLITS)],
                [[name, *(cell(r.estimate(world, policy, s, 0.7, "wins")) for s in SPLITS)]
                 for policy, name in NAMES.items()])
    matched = [f"{r.data[world, 'sft_matched', 'test', 'matched', s]['temperature']:.2f}" for s in r.seeds]
    yield (f"Matched temperature, seed by seed: {', '.join(matched)}.  Ceilings: PPO on the true reward, and "
           "the best of 16 SFT samples by the truth.")
    columns = [k for k in diversity.COLUMNS if k not in ("length", "nli")]
    for kind, title in (("per_input", "per input"), ("across", "across inputs")):
        yield f"Diversity {title}, temperature 1, ID test set (self-BLEU: lower is more varied)"
        yield table(["policy", *(diversity.COLUMNS[k] for k in columns), "length"],
                    [[NAMES[p], *(cell(r.estimate(world, p, "test", 1.0, f"{kind}_{k}"), kind == "per_input")
                                  for k in columns), f"{np.mean(r.get(world, p, 'test', 1.0, 'length')):.1f}"]
                     for p in ("sft", "bon", "ppo", "ppo_truth")])
    mean = {k: np.mean([r.reward[world, s][k] for s in r.seeds]) for k in r.reward[world, r.seeds[0]]}
    unfinished = {s: max(r.get(world, p, s, 0.7, "unfinished").max() for p in ("sft", "bon", "ppo"))
                  for s in SPLITS}
    worst = max(unfinished, key=unfinished.get)
    yield (f"Reward model on held-out pairs: agrees with the labels on {mean['accuracy']:.3f}, with the "
           f"truth on {mean['accuracy_truth']:.3f}; where the true gap exceeds 1, on "
           f"{mean['accuracy_gap1']:.3f} and {mean['accuracy_gap1_truth']:.3f}.  `The longer wins` "
           f"agrees with the labels on {mean['longer_wins']:.3f}, the labels with the truth on "
           f"{mean['labels_truth']:.3f}.  Unfinished samples of SFT, BoN and PPO at temperature 0.7: at "
           f"most {unfinished['test']:.1%} in distribution, {unfinished[worst]:.1%} on {worst}.")


# ------------------------------------------------------------------------------------------------- the figure

COLOURS = {"sft": "#4477aa", "sft_matched": "#66ccee", "bon": "#ccbb44", "ppo": "#cc3311",
           "ppo_truth": "#228833"}


def arms(estimates):
    """Estimates -> the (2, n) array of error bars that matplotlib wants."""
    return np.array([[e["mean"] - e["low"] for e in estimates], [e["high"] - e["mean"] for e in estimates]])


def draw_trade_off(ax, r, world):
    """Win rate against per-input diversity: policies as points, SFT over temperatures as a line."""
    line = [[r.estimate(world, "sft", "test", t, key)["mean"] for t in GRID]
            for key in ("per_input_semantic", "wins")]
    ax.plot(*line, "-", color=COLOURS["sft"], lw=1.2, alpha=.7)
    for t, x, y in zip(GRID, *line):
        if t in (0.2, 0.4, 0.7, 1.0):
            ax.annotate(f"T={t:g}", (x, y), textcoords="offset points", xytext=(4, -11), fontsize=7,
                        color=COLOURS["sft"])
    for policy in ("sft", "bon", "ppo", "ppo_truth"):
        for splits, face in ((SPLITS[:1], COLOURS[policy]), (SPLITS[1:], "white")):
            x, y = (summary(np.mean([r.get(world, policy, s, 0.7, key) for s in splits], axis=0))
                    for key in ("per_input_semantic", "wins"))
            ax.errorbar(x["mean"], y["mean"], xerr=arms([x]), yerr=arms([y]), fmt="o", ms=8, lw=1, mfc=face,
                        color=COLOURS[policy], label=NAMES[policy] if face != "white" else None)
    oracle = r.estimate(world, "oracle", "test", 0.7, "wins")["mean"]
    ax.axhline(oracle, color="#888888", ls=":", lw=1)
    ax.text(0.99, oracle, "oracle best-of-16, in distribution", fontsize=7, color="#666666", va="bottom",
            ha="right",
            transform=ax.get_yaxis_transform())
    ax.plot([], [], "o", color="black", label="filled: in distribution, temperature 0.7")
    ax.plot([], [], "o", color="black", mfc="white", label="hollow: mean of the five shifted test sets")
    ax.plot([], [], "-", color=COLOURS["sft"], label="SFT over temperatures T, in distribution")
    ax.legend(fontsize=7, loc="lower left", frameon=False)
    ax.set(title=f"Quality against diversity: {WORLDS[world]} in the references", ylim=(0, 1.02),
           xlabel="diversity per input: mean Jaccard distance of the facts stated by 16 outputs",
           ylabel="win rate against the reference (true judge)")


def draw_test_sets(ax, r):
    """Win rate by test set in the first world."""
    for i, policy in enumerate(COLOURS):
        e = [r.estimate("world", policy, s, 0.7, "wins") for s in SPLITS]
        ax.bar(np.arange(len(SPLITS)) + (i - 2) * 0.15, [v["mean"] for v in e], 0.14, yerr=arms(e),
               ecolor="black",
               error_kw={"lw": .8}, color=COLOURS[policy], label=NAMES[policy])
    ax.axhline(.5, color="black", lw=.5, ls=":")
    ax.set_xticks(range(len(SPLITS)), ["in\ndistribution", *(TITLES[s] for s in SPLITS[1:])], fontsize=8)
    ax.set(title="Generalisation by test set (systematic noise)", ylabel="win rate against the reference",
           ylim=(0, 1.25))
    ax.legend(fontsize=7, ncol=3, loc="upper center", frameon=False)


def draw_price(ax, swept):
    """Reward, truth and diversity over beta."""
    x = range(len(swept))
    for key, name, colour in (("reward", "reward model's score", "#cc3311"),
                              ("truth", "true score", "#228833")):
        ax.plot(x, [s[key] for s in swept], "o-", color=colour, label=f"{name} (left axis)")
    ax.set_xticks(x, [f"β = {s['beta']:g}\nKL {s['kl']:.1f} nats" for s in swept])
    ax.set(title="The price of KL in PPO (systematic noise)", ylabel="score at the last PPO step")
    twin, e = ax.twinx(), [s["diversity"] for s in swept]
    twin.spines["right"].set_visible(True)
    twin.errorbar(x, [v["mean"] for v in e], yerr=arms(e), fmt="s--", color="#4477aa",
                  label="diversity per input (right axis)")
    twin.set(ylabel="diversity per input, temperature 1", ylim=(0, None))
    for side in (ax, twin):         # room for the legend
        low, high = side.get_ylim()
        side.set_ylim(low, high + 0.25 * (high - low))
    legends = zip(ax.get_legend_handles_labels(), twin.get_legend_handles_labels())
    ax.legend(*(left + right for left, right in legends), fontsize=7, frameon=False, loc="upper center")


def draw(r, swept, path):
    """figure.png: quality against diversity in both worlds, win rates by test set, the price of KL."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 2, figsize=(12, 9.5))
    for ax, world in zip(axes[0], WORLDS):
        draw_trade_off(ax, r, world)
    draw_test_sets(axes[1, 0], r)
    draw_price(axes[1, 1], swept)
    figure.suptitle(f"Quality and diversity of SFT, best-of-16 and PPO: {len(r.seeds)} seeds, 95 % intervals "
                    "over prompts", fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def fingerprint(cfg):
    """Of settings and code: a changed study starts anew, an unchanged one goes on."""
    leave = ("out", "jobs", "seeds", "seed", "full", "threads", "save_every")
    keep = {k: v for k, v in asdict(cfg).items() if k not in leave}
    code = b"".join((Path(__file__).parent / f"{name}.py").read_bytes() for name in
                    ("model", "synthetic", "instructions", "pretrained", "paper", "splits", "runtime", "sft",
                     "reward", "ppo", "bon", "generalisation", "diversity", "proxies", "reproduce",
                     "reviewers"))
    return hashlib.sha256(json.dumps(keep, sort_keys=True).encode() + code).hexdigest()[:10]


def main(cfg):
    require(not cfg.task and not cfg.data,
            "reproduce.py runs the embedded task; for your own data run the scripts one by one (README, "
            "the pipeline)")
    require(min(cfg.seeds, cfg.jobs, cfg.ppo_steps) >= 1
            and min(cfg.inputs, cfg.base_rows, cfg.sft_rows, cfg.prompts) >= 8,
            "--seeds, --jobs and --ppo-steps must be at least 1, --inputs, --base-rows, --sft-rows and "
            "--prompts at least 8")
    if cfg.full:
        cfg.seeds = max(cfg.seeds, 2 if cfg.quick else 5)
    if cfg.quick:
        cfg.inputs, cfg.base_rows, cfg.sft_rows, cfg.prompts, cfg.ppo_steps = 12, 1024, 256, 64, 3
    out = Path(cfg.out) / "runs" / "quick" if cfg.quick else Path(cfg.out)
    folder = Path(cfg.out) / "runs" / f"{'quick' if cfg.quick else 'study'}-{fingerprint(cfg)}"
    folder.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    run_all(cfg, folder)
    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    r = Results(folder, seeds)
    stated, swept = claims(r), sweep(r)
    seconds = sum(float((folder / f"seed{s}" / chain / f"{name}.done").read_text()) for s in seeds
                  for chain, todo in chains(replace(cfg, full=False), s, folder).items() for name, *_ in todo)
    everything = {"settings": asdict(cfg) | {"seeds": list(seeds)}, "claims": stated, "kl_sweep": swept,
                  "win_rate": [{"world": w, "policy": p, "split": s, "temperature": t,
                                **summary(np.array([r.data[w, p, s, t, k]["wins"] for k in seeds]))}
                               for w, p, s, t, k in r.data if k == r.seeds[0]],
                  "diversity": [{"world": w, "policy": p, "split": s, "temperature": t, "measure": m,
                                 **r.estimate(w, p, s, t, m)}
                                for (w, p, s, t, k), line in r.data.items() if k == r.seeds[0]
                                for m in line if m.startswith(("per_input_", "across_"))],
                  "reward_model": {f"{w} seed {s}": v for (w, s), v in r.reward.items()}}
    write_whole(out / "results.json", json.dumps(everything, indent=1).encode())
    write_whole(out / "results.md", report(r, cfg, stated, swept, seconds).encode())
    draw(r, swept, out / "figure.png")
    for c in stated:
        print(f"{c['verdict']:28} {c['claim']} ({c['world']}): {c['numbers']}")
    print(f"wrote {out / 'results.md'}, {out / 'results.json'} and {out / 'figure.png'}")
    if cfg.full:
        import answers          # which builds on this file
        answers.write(cfg, folder, r, stated, out)


if __name__ == "__main__":
    run(main, Config, __doc__)
