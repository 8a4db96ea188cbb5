"""How good samples are: win rates against the reference, head to head, and the loss out of distribution.

    python generalisation.py samples_*.jsonl                                # judge: the embedded task's truth
    python generalisation.py samples_*.jsonl --judge rouge                  # ROUGE-1/2/L with the references
    python generalisation.py samples_*.jsonl --judge ckpt_reward_other.pt   # a reward model of another seed

Prints tables and writes generalisation.json.

Deviations from the paper: the judge is not GPT-4 but the world's truth, or a reward model of another seed; a
policy is never judged by the model it was trained against without a label saying so.  Every rate has a 95 %
interval, bootstrapped over prompts, for outputs of one prompt are not independent.
"""
import json
import re
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from paper import instruction_prompt
from reward import score
from runtime import (Common, Fault, bootstrap, load_checkpoint, loads, out_file, read_jsonl, require, run,
                     setup, write_whole)
from splits import encode_prompts, encode_response, known_world, task_of, tokenizer, world_of


@dataclass
class Config(Common):
    files: list = None          # sample files
    judge: str = ""             # truth, rouge, or a checkpoint of kind reward; "" is truth for the embedded
                                # task's prompts, else rouge


# -------------------------------------------------------------------------------------------- the mathematics

def wins(scores, opponents):
    """Share of pairs won, ties halved.  scores: (n, K) of n prompts' outputs; opponents: (n, J).  Every
    output of a prompt meets every opponent of that prompt.  Returns (n,), one rate per prompt."""
    scores, opponents = np.asarray(scores, dtype=float), np.asarray(opponents, dtype=float)
    difference = scores[:, :, None] - opponents[:, None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean(axis=(1, 2))


def win_rate(scores, opponents, draws=2000):
    """Win rate and its 95 % interval, bootstrapped over prompts: (rate, low, high).  Arguments as in `wins`.

    (paper, section 5: preference versus reference, with J = 1)"""
    return tuple(float(x) for x in bootstrap(wins(scores, opponents), draws))


def generalisation_gap(in_distribution, out_of_distribution, draws=2000):
    """ID rate less OOD rate with a 95 % interval: the two sets of prompts are resampled apart.  Arguments:
    (n,) and (m,) rates per prompt."""
    a, b = np.asarray(in_distribution), np.asarray(out_of_distribution)
    rng = np.random.default_rng(0)
    draw = lambda x: x[rng.integers(0, len(x), (draws, len(x)))].mean(1)  # noqa: E731
    low, high = np.percentile(draw(a) - draw(b), (2.5, 97.5))
    return float(a.mean() - b.mean()), float(low), float(high)


def rouge_tokens(text):
    """Lower-cased runs of letters a-z and digits: the tokens of the rouge-score package, without its
    stemmer."""
    return re.findall(r"[a-z0-9]+", text.lower())


def _f(overlap, candidate, reference):
    return 2 * overlap / (candidate + reference) if candidate and reference else 0.


def rouge(text, reference):
    """ROUGE-1, ROUGE-2 and ROUGE-L as F-measures in [0, 1] (Lin 2004): {"rouge1", "rouge2", "rougeL"}; zeros
    if either is empty."""
    a, b = rouge_tokens(text), rouge_tokens(reference)
    out = {}
    for n in (1, 2):
        grams = [Counter(zip(*(t[i:] for i in range(n)))) for t in (a, b)]
        out[f"rouge{n}"] = _f((grams[0] & grams[1]).total(), grams[0].total(), grams[1].total())
    return out | {"rougeL": _f(_longest_common_subsequence(a, b), len(a), len(b))}


def _longest_common_subsequence(a, b):
    """Length, row by row: length[j] is that of a's tokens so far and b[:j]."""
    length = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, length[j] = length[j], diagonal + 1 if x == y else max(length[j], length[j - 1])
    return length[-1]


# ------------------------------------------------------------------------------------------------- the judges

def read_alpaca_eval(path):
    """AlpacaEval's model_outputs, [{"instruction", "output", "generator"}], as sample lines with one output
    and no reference: how published models' outputs are measured."""
    try:
        rows = loads(Path(path).read_bytes())
    except ValueError as error:
        raise Fault(f"{path}: not JSON ({error})") from None
    needs = ("instruction", "output", "generator")
    require(isinstance(rows, list)
            and all(isinstance(r, dict) and all(isinstance(r.get(k), str) for k in needs)
                                           for r in rows),
            f"{path}: a .json file must be AlpacaEval's list of objects with the strings {', '.join(needs)}")
    return [{"id": f"{i}", "prompt": instruction_prompt(r["instruction"], r.get("input") or ""),
             "reference": "", "outputs": [r["output"]], "policy": r["generator"], "split": Path(path).stem}
            for i, r in enumerate(rows)]


def read_samples(path):
    """Lines of a sample file, or AlpacaEval's .json.  Raises Fault, naming file and line, on one that is no
    sample."""
    needs = {"prompt": str, "reference": str, "outputs": list, "policy": str, "split": str}
    rows = read_alpaca_eval(path) if Path(path).suffix == ".json" else read_jsonl(path, needs)
    require(rows, f"{path}: no samples; python bon.py writes them")
    for number, row in enumerate(rows, 1):
        require(row["outputs"] and all(isinstance(t, str) for t in row["outputs"]),
                f"{path}, line {number}: outputs must be a non-empty list of strings")
        row.setdefault("finished", [True] * len(row["outputs"]))
        row.setdefault("id", f"line {number}")
    k, lines = len(rows[0]["outputs"]), {}
    for number, row in enumerate(rows, 1):
        first = lines.setdefault(str(row["id"]), number)
        require(first == number,
                f"{path}, line {number}: the id {row['id']!r} is that of line {first} already")
        require(isinstance(row["finished"], list) and len(row["finished"]) == len(row["outputs"]),
                f"{path}, line {number}: finished must be a list, as long as outputs")
        require(len(row["outputs"]) == k,
                f"{path}, line {number}: {len(row['outputs'])} outputs, line 1 has {k}")
    return rows


def read_all(paths):
    """Sample files -> {(policy, temperature, seed, split): rows}.  Raises Fault on none, or on two files of
    one key."""
    require(paths,
            "no sample files given; python bon.py --model ckpt_sft.pt --reward ckpt_reward.pt writes "
            "samples_*.jsonl")
    runs = {}
    for path in paths:
        require(Path(path).is_file(), f"{path}: no such file; python bon.py writes sample files")
        rows = read_samples(path)
        key = (rows[0]["policy"], rows[0].get("temperature"), rows[0].get("seed"), rows[0]["split"])
        require(key not in runs,
                f"{path}: policy {key[0]}, temperature {key[1]}, seed {key[2]}, split {key[3]} was already "
                "read from another file")
        runs[key] = rows
    return runs


def truth_scores(rows):
    """The world's judge: (scores (n, K), scores of the references (n, 1)).  Raises Fault on prompts that are
    not the world's."""
    try:
        return ([[world_of(r["prompt"]).judge(r["prompt"], t, f) for t, f in zip(r["outputs"], r["finished"])]
                 for r in rows],
                [[world_of(r["prompt"]).judge(r["prompt"], r["reference"])] for r in rows])
    except ValueError as error:
        raise Fault(f"--judge truth: {error}; use --judge rouge or a reward checkpoint") from None


def reward_scores(rows, model, enc, task):
    """A reward model as judge, over outputs and references alike: (scores (n, K), (n, 1)).  An output that
    did not end is read where it stops."""
    prompts = encode_prompts(enc, [r["prompt"] for r in rows], task.room(model.config.context))
    limit = task.max_new_tokens
    ids = [[encode_response(enc, t, limit, f) for t, f in zip(r["outputs"], r["finished"])]
           + [encode_response(enc, r["reference"], limit)] for r in rows]
    scores = score(model, prompts, ids)
    return [s[:-1] for s in scores], [s[-1:] for s in scores]


def choose_judge(cfg, runs, device):
    """--judge -> (name, function of rows giving scores of outputs and references, or None for ROUGE, and the
    digest of the reward model that judges, or None)."""
    ours = all(known_world(rows) for rows in runs.values())
    name = cfg.judge or ("truth" if ours else "rouge")
    if name in ("truth", "rouge"):
        return name, truth_scores if name == "truth" else None, None
    model, saved = load_checkpoint(name, "reward", "--judge", device, cfg.dtype)
    enc, task = tokenizer(saved["tokenizer"]), task_of(cfg, saved)
    return name, lambda rows: reward_scores(rows, model, enc, task), saved["digest"]


# ------------------------------------------------------------------------------------------------ the tables

WIDTHS = (14, 5, 18, 22, 8, 22, 10)


def _row(*cells):
    print("  ".join(f"{cell!s:<{w}}" if i < 3 else f"{cell:>{w}}"
                    for i, (cell, w) in enumerate(zip(cells, WIDTHS))).rstrip())


def _interval(values):
    return "{:.3f} [{:.3f}, {:.3f}]".format(*values)


def main(cfg):
    device, _ = setup(cfg)
    runs = read_all(cfg.files)
    name, judge, against = choose_judge(cfg, runs, device)
    if judge is None:
        return report_rouge(runs, cfg)
    scores = {key: judge(rows) for key, rows in runs.items()}
    per_prompt = {key: wins(*pair) for key, pair in scores.items()}
    results = {"judge": name, "win_rate": [], "head_to_head": []}

    print(f"judge: {name}.  Win rate against the reference, ties halved, 95 % intervals over prompts.\n")
    _row("policy", "temp", "split", "win rate", "score", "gap ID - OOD", "unfinished")
    for key, rows in sorted(runs.items(), key=str):
        policy, temperature, seed, split = key
        trained = against is not None and any(r.get("trained_against") == against for r in rows)
        rate = tuple(map(float, bootstrap(per_prompt[key])))
        home = per_prompt.get((policy, temperature, seed, "test"))
        gap = generalisation_gap(home, per_prompt[key]) if home is not None and split != "test" else None
        open_end = 1 - np.mean([f for r in rows for f in r["finished"]])
        _row(policy + ("*" if trained else ""), temperature, split, _interval(rate),
             f"{np.mean(scores[key][0]):.2f}", _interval(gap) if gap else "", f"{open_end:.1%}")
        results["win_rate"].append(dict(zip(("policy", "temperature", "seed", "split"), key), rate=rate[0],
                                        low=rate[1], high=rate[2], gap=gap,
                                        score=float(np.mean(scores[key][0])),
                                        judge_is_trained_against=trained))
    if any(r["judge_is_trained_against"] for r in results["win_rate"]):
        print("\n* trained against, or chosen by, this very judge: not evidence that it is better")
    report_seeds(per_prompt)
    results["head_to_head"] = report_head_to_head(runs, scores)
    _write(cfg, results)


def report_seeds(per_prompt):
    """Spread over seeds, where sample files of several are given."""
    groups = {}
    for (policy, temperature, _, split), rates in per_prompt.items():
        groups.setdefault((policy, temperature, split), []).append(rates.mean())
    if any(len(v) > 1 for v in groups.values()):
        print("\nover seeds: mean and standard deviation of the win rate")
        for key, means in sorted(groups.items(), key=str):
            if len(means) > 1:
                _row(*key, f"{np.mean(means):.3f} +- {np.std(means, ddof=1):.3f}", f"{len(means)} seeds")


def report_head_to_head(runs, scores):
    """Every pair of policies on the prompts they share, all outputs of one against all of the other."""
    lines = []
    for a, b in combinations(sorted(runs, key=str), 2):
        if a[2:] != b[2:]:
            continue        # another seed or split
        where = {row["id"]: i for i, row in enumerate(runs[b])}
        both = [(i, where[row["id"]]) for i, row in enumerate(runs[a]) if row["id"] in where]
        if both:
            rate = win_rate([scores[a][0][i] for i, _ in both], [scores[b][0][j] for _, j in both])
            lines.append({"policy": a[0], "temperature": a[1], "against": b[0], "against_temperature": b[1],
                          "split": a[3], "seed": a[2],
                          "prompts": len(both), "rate": rate[0], "low": rate[1], "high": rate[2]})
    if lines:
        print("\nhead to head")
    for x in lines:
        _row(f"{x['policy']} > {x['against']}", x["temperature"], x["split"],
             _interval((x["rate"], x["low"], x["high"])))
    return lines


def report_rouge(runs, cfg):
    print("ROUGE F-measures against the reference, 95 % intervals over prompts.\n")
    results = {"judge": "rouge", "rouge": []}
    for key, rows in sorted(runs.items(), key=str):
        means = [[np.mean([rouge(t, r["reference"])[m] for t in r["outputs"]])
                  for m in ("rouge1", "rouge2", "rougeL")] for r in rows]
        mean, low, high = bootstrap(means)
        print(f"{key[0]:12} {key[1]!s:5} {key[3]:18}",
              *(f"{m} {_interval(x)}" for m, *x in zip(("R-1", "R-2", "R-L"), mean, low, high)))
        results["rouge"].append(dict(zip(("policy", "temperature", "seed", "split"), key)) | {
            m: tuple(map(float, x)) for m, *x in zip(("rouge1", "rouge2", "rougeL"), mean, low, high)})
    _write(cfg, results)


def _write(cfg, results):
    path = out_file(cfg.out, "generalisation.json")
    write_whole(path, json.dumps(results, indent=1).encode())
    print(f"\nwrote {path}")


if __name__ == "__main__":
    run(main, Config, __doc__)
