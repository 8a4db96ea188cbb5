"""Sample files, in and out: outputs of a policy on the prompts of one test set, one prompt a line.

A line is a JSON object:

    id               names the prompt; policies are compared on equal ids; absent: made of the prompt
    prompt, reference
    outputs          N texts
    rewards          N scores of a reward model (a fixed one for outputs that did not end), or null
    finished         N booleans: whether each output ended by itself; absent: all did
    task             name of the task that the prompts come from ("synthetic", "tldr", ...); may be absent
    policy, split    names
    temperature, seed    of sampling, of the run; may be absent
    trained_against  weights_hash of the reward model that trained the policy or chose the outputs, or a list

Lines with one policy, split, temperature and seed are a run.  bon.py writes one file a run.  Read as well:
    AlpacaEval's .json files, a list of {"instruction", "output", "generator"}
    NoveltyBench's generations.jsonl, lines of {"id", "prompt", "model", "generations"}
    lm-evaluation-harness's samples_<task>_<date>.jsonl, of tasks whose answers are texts
"""
import hashlib
import re
from collections import Counter
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import loads, read_jsonl
from common.prompts import instruction_prompt
from common.stats import Interval

NEEDED = {"prompt": str, "reference": str, "outputs": list, "policy": str, "split": str}
KEY = ("policy", "temperature", "seed", "split")    # of a run: the fields that name a sample file
POLICIES = ("base", "sft", "sft_matched", "bon", "ppo", "ppo_gold")     # in the order of the study's tables


def sample_path(out, policy, split):
    return Path(out) / f"samples_{policy}_{split}.jsonl"


def read_samples(path):
    """Lines of a file that holds one run, as from `read_runs`.  Raises UserError on a file of several."""
    runs = read_runs(path)
    if len(runs) > 1:
        raise UserError(f"{path}: it holds {len(runs)} runs where one is needed; put each into its own file")
    return next(iter(runs.values()))


def read_runs(path):
    """A sample file, ours or another's -> {(policy, temperature, seed, split): its lines}, dicts with at
    least id, prompt, reference, outputs, finished, policy and split.  A UserError names file and sample."""
    rows = read_alpaca_eval(path) if Path(path).suffix == ".json" else read_lines(path)
    runs, first, times = {}, {}, Counter()      # first: {(key, id): number of the sample}
    for number, row in enumerate(rows, 1):
        where = f"{path}, sample {number}"
        outputs = row["outputs"]
        if not isinstance(outputs, list) or not {str} == set(map(type, outputs)):
            raise UserError(f"{where}: outputs must be a non-empty list of strings")
        finished = row.setdefault("finished", [True] * len(outputs))    # the word "false" would count as true
        if [type(x) for x in finished or ()] != [bool] * len(outputs):
            raise UserError(f"{where}: finished must be a list of booleans, as long as outputs")
        key = tuple(row.get(field) for field in KEY)
        run = runs.setdefault(key, [])
        if row.get("id") is None:       # made of the prompt, so that policies meet in whatever order
            times[key, row["prompt"]] += 1
            named = f"{times[key, row['prompt']]} {row['prompt']}"
            row["id"] = hashlib.sha256(named.encode()).hexdigest()[:12]
        if run and len(outputs) != len(run[0]["outputs"]):
            raise UserError(f"{where}: {len(outputs)} outputs, the first of {run_name(key)} has "
                            f"{len(run[0]['outputs'])}")
        seen = first.setdefault((key, str(row["id"])), number)
        if seen != number:
            raise UserError(f"{where}: the id {row['id']!r} is that of sample {seen} already")
        run.append(row)
    if not runs:
        raise UserError(f"{path}: no samples; python bon.py writes them")
    return runs


def read_lines(path):
    """Sample lines of a .jsonl file, of NoveltyBench's or of lm-evaluation-harness's, without references or
    with its targets.  The harness repeats a line for each of its filters: those of the first are taken."""
    rows = read_jsonl(path, {})
    first = rows[0] if rows else {}
    if {"generations", "model"} <= first.keys():
        return [{"id": row["id"], "prompt": row["prompt"], "reference": "", "outputs": row["generations"],
                 "policy": row["model"], "split": "novelty_bench"}
                for row in read_jsonl(path, {"id": str, "prompt": str, "generations": list, "model": str})]
    if {"doc_id", "resps"} <= first.keys():
        task = re.fullmatch(r"samples_(.+?)(_\d{4}-\d\d-\d\d.*)?\.jsonl(\.gz)?", Path(path).name)
        try:
            return [{"id": str(row["doc_id"]), "prompt": harness_prompt(row["arguments"]),
                     "reference": str(row["target"]), "outputs": row["resps"][0],
                     "policy": Path(path).resolve().parent.name, "split": task[1] if task else "harness"}
                    for row in rows if row.get("filter") == first.get("filter")]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError):
            raise UserError(f"{path}: not lm-evaluation-harness's samples of a task whose answers are texts "
                            "(output_type: generate_until)") from None
    return read_jsonl(path, NEEDED)


def harness_prompt(arguments):
    """The text of {"gen_args_0": {"arg_0": text}}, or of older files' [[text, settings]]; of a chat model the
    text is its messages as JSON, in a list."""
    prompt = arguments["gen_args_0"]["arg_0"] if isinstance(arguments, dict) else arguments[0][0]
    return prompt if isinstance(prompt, str) else "".join(prompt)


def read_alpaca_eval(path):
    """AlpacaEval's model_outputs as sample lines with one output, an empty reference and no id."""
    try:
        return [{"prompt": instruction_prompt(row["instruction"], row.get("input") or ""), "reference": "",
                 "outputs": [row["output"]], "policy": row["generator"], "split": "alpaca_eval"}
                for row in loads(Path(path).read_bytes())]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: a .json file must be AlpacaEval's list of objects with instruction, output "
                        "and generator; one JSON object a line makes a .jsonl file") from None


def read_all(paths):
    """Sample files -> {(policy, temperature, seed, split): rows}, in the order of `study_order`.  Raises
    UserError on files of several tasks: no judge and no order of test sets holds for both."""
    if not paths:
        raise UserError("no sample files given; python bon.py writes samples_*.jsonl")
    runs = {}
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; python bon.py writes sample files")
        if Path(path).suffix == ".pt":
            raise UserError(f"{path}: a checkpoint; `python bon.py --model {path}` writes samples of it")
        for key, rows in read_runs(path).items():
            if key in runs:
                raise UserError(f"{path}: {run_name(key)} was already read from another file")
            runs[key], n_prompts = rows, len(set(prompts_of(rows)))
            if n_prompts < len(rows):
                print(f"{path}: {len(rows)} rows, {n_prompts} different prompts: intervals are over these")
    tasks = {str(row["task"]): run_name(key) for key, rows in runs.items() for row in rows if row.get("task")}
    if len(tasks) > 1:
        raise UserError("samples of several tasks cannot be compared: " + "; ".join(
            f"{task} ({run})" for task, run in tasks.items()))
    return {key: runs[key] for key in sorted(runs, key=study_order)}


def matched(rows, others, names):
    """Row numbers [(i, j)] of the prompts that both have, in the order of rows.  Prompts meet by id.  names:
    of the two, in words.  Raises UserError where one id names two prompts or two references."""
    place = {str(row["id"]): j for j, row in enumerate(others)}
    pairs = [(i, place[str(row["id"])]) for i, row in enumerate(rows) if str(row["id"]) in place]
    for i, j in pairs:
        for field in ("prompt", "reference"):
            a, b = rows[i].get(field, ""), others[j].get(field, "")
            if a != b and (field == "prompt" or a.strip() and b.strip()):
                raise UserError(f"the id {rows[i]['id']!r} names one {field} in {names[0]} and another in "
                                f"{names[1]}: they come from different data and cannot be compared")
    return pairs


def prompts_of(rows):
    return [row["prompt"] for row in rows]


def by_prompt(prompts, values):
    """(n,) values of n rows -> (m,) of their m different prompts, means over the rows of each.  Rows of one
    prompt depend on each other: an interval over them would be too narrow.  nan is left out."""
    number = {}         # of each prompt, in the order of rows
    group = np.array([number.setdefault(prompt, len(number)) for prompt in prompts])
    values = np.asarray(values, dtype=float)
    if len(number) == len(group):
        return values
    count = np.bincount(group, ~np.isnan(values))
    return np.bincount(group, np.nan_to_num(values)) / np.where(count > 0, count, np.nan)


def known_task(rows):
    """The name of the task that all rows carry, or None."""
    names = {row.get("task") for row in rows}
    return names.pop() if len(names) == 1 else None


def list_of_hashes(hashes):
    """The field trained_against, as a list of weights_hashes."""
    return [hashes] if isinstance(hashes, str) else hashes or []


# ----------------------------------------------------------------------------------------------------- tables

def study_order(key):
    """Sorts (policy, temperature, seed, split) as tables show them: the test set first, and in each split the
    policies of the study in its order."""
    policy, temperature, seed, split = key
    place = POLICIES.index(policy) if policy in POLICIES else len(POLICIES)
    return split != "test", split, place, policy, *(-1 if x is None else x for x in (temperature, seed))


def run_name(key):
    """(policy, temperature, seed, split) in words."""
    return ", ".join(f"{what} {x}" for what, x in zip(KEY, key) if x is not None)


def interval_cell(x):
    """A cell of an Interval, of a list of its three numbers, or of another value; "-" where there is none."""
    if isinstance(x, (tuple, list)):
        return "-" if x[0] is None else f"{Interval(*x):.3f}"
    return "-" if x is None else f"{x:.3f}" if isinstance(x, float) else x


def print_table(title, lines, columns, cell=interval_cell):
    """Prints a table of runs, or nothing without columns.  lines: dicts with the fields KEY; columns: {field:
    header}.  A field that no line has, or of which all have 0, is left out."""
    known = {header: [cell(x.get(field)) for x in lines] for field, header in columns.items()
             if any(x.get(field, 0.) != 0. for x in lines)}
    if known:
        print(f"\n{title}\n{run_table(lines, known)}")


def run_table(lines, columns):
    """Table of runs.  lines: dicts with the fields KEY; columns: {header: a cell for each line}."""
    names = {field.replace("temperature", "T"): ["-" if x[field] is None else x[field] for x in lines]
             for field in ("split", "policy", "temperature", "seed")}
    if len(set(names["seed"])) == 1:
        del names["seed"]
    return text_table([*names, *columns], zip(*names.values(), *columns.values()), labels=len(names))


def text_table(header, rows, labels=1, width=110):
    """A table as a string.  header, rows: lists of cells of any type.  The first `labels` columns name a row.
    Columns that do not fit into `width` characters follow in blocks below, which repeat the labels."""
    columns = [[str(cell) for cell in column] for column in zip(header, *rows)]
    columns = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    blocks = []
    for column in columns[labels:]:
        if not blocks or sum(2 + len(c[0]) for c in (*blocks[-1], column)) > width + 2:
            blocks.append(columns[:labels])
        blocks[-1].append(column)
    return "\n\n".join("\n".join("  ".join(row).rstrip() for row in zip(*block)) for block in blocks)
