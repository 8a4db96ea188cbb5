"""Look at what was made: outputs of policies side by side, or the curves of a PPO run.

    python -m tools.show samples_*.jsonl                                # what the files hold
    python -m tools.show samples_*.jsonl --prompt 3                     # what each policy wrote to prompt 3
    python -m tools.show samples_*.jsonl --prompt ood_article-7         # the same, by id
    python -m tools.show gpt4.json claude.json --prompt 1               # outputs in AlpacaEval's format
    python -m tools.show metrics_ppo.jsonl                              # curves over a healthy and a sick run

Prompts are numbered from 1, through all splits, in the order that the list without --prompt shows.  Policies
meet where their prompts are equal texts.  Equal outputs of a policy are merged and counted ("4 x"), the most
frequent first.  After an output stands its gold reward (synthetic tasks), or else the reward in the file.
In outputs to a synthetic task *stars* mark wrong facts, which the post's key story does not state.
The curves of a log go to a PNG in the log's folder.
"""
import re
import shutil
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.files import read_jsonl
from common.flags import Flags, arg, launch
from common.samples import read_all, run_name, study_order, text_table
from splits import synthetic_task
from tools.curves import draw_curves

NARROWEST = 24          # characters of a column, even where that is wider than the terminal


@dataclass
class Config(Flags):
    files: list = arg(None, "sample files, or one log metrics_*.jsonl")
    prompt: str = arg("", "a number from 1, an id, several with commas; '' lists what there is")


# ----------------------------------------------------------------------- what each policy wrote to one prompt

@dataclass
class Output:
    """One text of a policy, and how often it wrote exactly this."""
    text: str
    finished: bool
    score: float | None
    count: int = 1


@dataclass
class Prompt:
    """One prompt, its reference (Output or None), and {policy: (summary, list of Output)} of those that
    answered it."""
    number: int
    id: str
    split: str
    text: str
    task_name: str
    reference: Output | None
    columns: dict


def task_that_wrote(row):
    """The module of the synthetic task that wrote a sample line's prompt, or None."""
    task = synthetic_task(row.get("task"))
    try:
        return task and task.read_prompt(row["prompt"]) and task
    except ValueError:
        return None


def scores_of(row, task):
    """(scores of a sample line's outputs, their name): gold rewards where there are any, or else the line's
    rewards, or else (list of None, "")."""
    if task:
        outputs = zip(row["outputs"], row["finished"])
        return [task.gold_reward(row["prompt"], *output) for output in outputs], "gold reward"
    if row.get("rewards"):
        return row["rewards"], "reward"
    return [None] * len(row["outputs"]), ""


def merge(texts, finished, scores):
    """Equal outputs as one Output each, the most frequent first, ties in the order of the file."""
    merged = {}
    for text, ended, score in zip(texts, finished, scores):
        output = merged.setdefault((text, ended), Output(text, ended, score, 0))
        output.count += 1
    return sorted(merged.values(), key=lambda o: -o.count)


def mark_wrong_facts(text, prompt, task):
    key_story, _ = task.read_prompt(prompt)
    wrong = {(slot, value) for slot, value in task.facts(text) if key_story[slot] != value}
    return re.sub(r"\w+", lambda m: f"*{m[0]}*" if task.FACT.get(m[0]) in wrong else m[0], text)


def make_column(row, task):
    """(a summary such as "16 outputs, 9 different, mean gold reward 3.42", list of Output) of a line."""
    scores, name = scores_of(row, task)
    texts = row["outputs"]
    if task:
        texts = [mark_wrong_facts(text, row["prompt"], task) for text in texts]
    outputs = merge(texts, row["finished"], scores)
    n = sum(o.count for o in outputs)
    summary = f"{n} output{'s' * (n > 1)}" + (f", {len(outputs)} different" if n > 1 else "")
    if name:
        summary += f", mean {name} {sum(o.score * o.count for o in outputs) / n:.2f}"
    return summary, outputs


def collect(runs):
    """runs: as from `read_all`.  Returns a list of Prompt, one for each different prompt."""
    by_prompt = {}
    for key, rows in runs.items():
        times = Counter()       # a file may hold one prompt under two ids
        for row in rows:
            times[row["prompt"]] += 1
            by_prompt.setdefault((row["prompt"], times[row["prompt"]]), []).append((key, row))
    prompts = []
    for number, answers in enumerate(by_prompt.values(), 1):
        answers.sort(key=lambda answer: study_order((*answer[0][:3], "")))
        keys, rows = zip(*answers)
        row, task, reference = rows[0], task_that_wrote(rows[0]), None
        if row["reference"].strip():
            gold = task.gold_reward(row["prompt"], row["reference"]) if task else None
            reference = Output(row["reference"], True, gold)
        columns = [make_column(row, task) for row in rows]
        prompts.append(Prompt(number, str(row["id"]), row["split"], row["prompt"], row.get("task") or "",
                              reference, dict(zip(column_names(keys), columns))))
    return prompts


def column_names(keys):
    """Names of columns from keys (policy, temperature, seed, split): the policy, or all of the key where two
    columns have one policy."""
    names = [key[0] for key in keys]
    return names if len(set(names)) == len(names) else [run_name(key) for key in keys]


def select(prompts, wanted):
    """--prompt -> list of Prompt.  Raises UserError on a number or an id that is not there; an id may
    name prompts of several splits."""
    chosen = []
    for name in map(str.strip, wanted.split(",")):
        same = [p for p in prompts if str(p.number) == name] or [p for p in prompts if p.id == name]
        if not same:
            raise UserError(f"--prompt {name}: no such prompt; give an id, or a number from 1 to "
                            f"{len(prompts)}")
        chosen += same
    return chosen


# ---------------------------------------------------------------------------------------------- on the screen

def wrap(text, width, first="", rest=""):
    """Lines of at most `width` characters, without any that would steer a terminal.  Line ends in the text
    stay."""
    lines = []
    for paragraph in text.expandtabs(4).strip().split("\n"):
        shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in paragraph)
        lines += textwrap.wrap(shown, width, initial_indent=rest if lines else first,
                               subsequent_indent=rest) or [""]
    return lines


def output_lines(output, width):
    """Such as "4 x  my sister sold my car . [3.00]", without the count where it is 1."""
    score = "" if output.score is None else f" [{output.score:.2f}]"
    unfinished = "" if output.finished else " [unfinished]"
    count = f"{output.count:2} x  " if output.count > 1 else "      "
    return wrap((output.text.strip() or "(nothing)") + score + unfinished, width, count, " " * len(count))


def show_prompt(prompt, width):
    """A Prompt as text, `width` characters wide, its columns side by side."""
    title = f"prompt {prompt.number}: {prompt.id} ({prompt.split})"
    lines = [*wrap(title, width), "", *wrap(prompt.text, width), ""]
    if prompt.reference:
        lines += ["reference:", *output_lines(prompt.reference, width), ""]
    gap = 3
    each = max(NARROWEST, (width + gap) // len(prompt.columns) - gap)
    columns = [[*wrap(name, each), *wrap(summary, each), "-" * each,
                *(line for output in outputs for line in output_lines(output, each))]
               for name, (summary, outputs) in prompt.columns.items()]
    height = max(map(len, columns))
    columns = [[line.ljust(each) for line in column + [""] * (height - len(column))] for column in columns]
    return "\n".join([*lines, *((" " * gap).join(row).rstrip() for row in zip(*columns)), ""])


def show_files(prompts, width):
    """A list of what the files hold, a line for each split."""
    rows = []
    for split in dict.fromkeys(p.split for p in prompts):
        own = [p for p in prompts if p.split == split]
        n_of = Counter(name for p in own for name in p.columns)
        names = [name + (f" ({n} of {len(own)} prompts)" if n < len(own) else "") for name, n in n_of.items()]
        row = [f"{own[0].number}-{own[-1].number}", split, own[0].id, own[0].task_name, ", ".join(names)]
        rows.append([" ".join(wrap(cell, 10 ** 6)) for cell in row])
    return text_table(["prompts", "split", "first id", "task", "policies"], rows, 2, width)


# ------------------------------------------------------------------------------------------------------- main

def is_log(path):
    """Whether a file is a log of a training run: its lines have a step and no outputs."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    rows = [] if Path(path).suffix == ".json" else read_jsonl(path, {})
    return bool(rows) and "step" in rows[0] and "outputs" not in rows[0]


def main(cfg):
    width = shutil.get_terminal_size((110, 24)).columns
    logs = [path for path in cfg.files or [] if is_log(path)]
    if logs:
        if len(cfg.files) > 1:
            raise UserError(f"{logs[0]} is a log: give one log, or sample files")
        rows, png = read_jsonl(logs[0], {"step": int}), Path(logs[0]).with_suffix(".png")
        draw_curves(rows, png, Path(logs[0]).name)
        return print(f"wrote {png}")
    runs = read_all(cfg.files)
    prompts = collect(runs)
    if not cfg.prompt:
        print(f"{show_files(prompts, width)}\n\n--prompt NUMBER or --prompt ID shows what each policy wrote")
        return
    print("\n".join(show_prompt(prompt, width) for prompt in select(prompts, cfg.prompt)))


if __name__ == "__main__":
    launch(main, Config, __doc__)
