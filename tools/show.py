"""Look at what was made: outputs of policies side by side, or the curves of a PPO run.

    python -m tools.show samples_*.jsonl                                # what the files hold
    python -m tools.show samples_*.jsonl --prompt 3                     # what each policy wrote to prompt 3
    python -m tools.show samples_*.jsonl --prompt ood_article-7         # the same, by id
    python -m tools.show samples_*.jsonl --prompt all --html page.html  # many prompts, as one page
    python -m tools.show gpt4.json claude.json --prompt 1               # outputs in AlpacaEval's format
    python -m tools.show metrics_ppo.jsonl                              # curves over a healthy and a sick run

Prompts are numbered from 1, through all splits, in the order that the list without --prompt shows.  Policies
meet where their prompts are equal texts.  Equal outputs of a policy are merged and counted ("4 x"), the most
frequent first.  Behind an output stands its gold reward (synthetic tasks), or else the reward in the file.

The curves of a log go to a PNG beside it, and the last values to the screen.
"""
import shutil
import textwrap
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.errors import check
from common.files import atomic_write, read_jsonl
from common.flags import Common, Natural, launch
from common.samples import read_all, study_order
from common.tables import text_table
from splits import synthetic_task
from tools.curves import draw_curves, last_values
from tools.page import page

MOST_PROMPTS = 50       # of --prompt all
NARROWEST = 24          # characters of a column; where columns do not fit, policies stand below each other


@dataclass
class Config(Common):
    files: list = None          # sample files, or one log metrics_*.jsonl
    prompt: str = ""            # a number from 1, an id, several of them with commas, or all; "" lists what
                                # the files hold
    split: str = ""             # prompts of this split only
    outputs: Natural = 0        # outputs of each policy, from the file's start; 0: all
    html: str = ""              # write a page to this file instead of the screen
    png: str = ""               # file of the curves; "": beside the log


# ----------------------------------------------------------------------- what each policy wrote to one prompt

@dataclass
class Output:
    """One text of a policy, and how often it wrote exactly this."""
    text: str
    finished: bool
    score: float | None
    count: int = 1


@dataclass
class Column:
    """What one policy wrote to a prompt: outputs (list of Output) and what their score is called."""
    name: str
    outputs: list
    score_name: str             # "gold reward", "reward", or "" where there is none

    @property
    def n(self):
        return sum(o.count for o in self.outputs)

    def summary(self):
        """Such as "16 outputs, 9 different, mean gold reward 3.42"."""
        text = f"{self.n} output{'s' * (self.n > 1)}"
        if self.n > 1:
            text += f", {len(self.outputs)} different"
        if self.score_name:
            mean = sum(o.score * o.count for o in self.outputs) / self.n
            text += f", mean {self.score_name} {mean:.2f}"
        return text


@dataclass
class Prompt:
    """One prompt, its reference (Output or None), and a Column for each policy that answered it."""
    number: int
    id: str
    split: str
    text: str
    task: str | None
    reference: Output | None
    columns: list


def scores_of(row):
    """(scores of a sample line's outputs, their name): gold rewards if the line's task has one and wrote its
    prompt, or else the line's rewards, or else (list of None, "")."""
    texts = row["outputs"]
    gold = gold_reward(row)
    if gold:
        return [gold(text, finished) for text, finished in zip(texts, row["finished"])], "gold reward"
    rewards = row.get("rewards") or []
    if len(rewards) == len(texts) and all(isinstance(r, (int, float)) for r in rewards):
        return rewards, "reward"
    return [None] * len(texts), ""


def gold_reward(row):
    """A function (text, finished=True) -> gold reward of a response to the row's prompt, or None where the
    row's task has none, or did not write that prompt."""
    module = synthetic_task(row["task"]) if row.get("task") else None
    if module is None:
        return None
    try:
        module.read_prompt(row["prompt"])
    except ValueError:
        return None
    return partial(module.gold_reward, row["prompt"])


def merge(texts, finished, scores):
    """Equal outputs as one Output each, the most frequent first, ties in the order of the file."""
    found = {}
    for text, ended, score in zip(texts, finished, scores):
        key = (text, bool(ended))
        if key in found:
            found[key].count += 1
        else:
            found[key] = Output(text, bool(ended), score)
    return sorted(found.values(), key=lambda o: -o.count)


def collect(runs, most_outputs=0):
    """runs: as from `read_all`.  Returns a list of Prompt, one for each different prompt."""
    by_prompt = {}
    for key, rows in runs.items():
        times = Counter()       # a file may hold one prompt under two ids
        for row in rows:
            times[row["prompt"]] += 1
            by_prompt.setdefault((row["prompt"], times[row["prompt"]]), []).append((key, row))
    return [_prompt(number, found, most_outputs or None)
            for number, found in enumerate(by_prompt.values(), 1)]


def _prompt(number, found, most_outputs):
    """found: [(key of the run, sample line)], all of one prompt."""
    found = sorted(found, key=lambda pair: study_order((*pair[0][:3], "")))
    columns = []
    for name, (_, row) in zip(column_names([key for key, _ in found]), found):
        scores, score_name = scores_of(row)
        shown = slice(most_outputs)
        outputs = merge(row["outputs"][shown], row["finished"][shown], scores[shown])
        columns.append(Column(name, outputs, score_name))
    row = found[0][1]
    reference = None
    if row["reference"].strip():
        gold = gold_reward(row)
        reference = Output(row["reference"], True, gold(row["reference"]) if gold else None)
    return Prompt(number, str(row["id"]), row["split"], row["prompt"], row.get("task"), reference, columns)


def column_names(keys):
    """Names of columns from keys (policy, temperature, seed, split): the policy, and the temperature, seed
    and split where the policy does not say which column it is."""
    names = [[key[0]] for key in keys]
    for i, what in ((1, "temperature "), (2, "seed "), (3, "")):
        values = {key[i] for key in keys}
        ambiguous = len({tuple(name) for name in names}) < len(names)
        if len(values) > 1 and (ambiguous or i == 1):
            names = [[*name, f"{what}{key[i]}"] for name, key in zip(names, keys)]
    return [", ".join(name) for name in names]


def select(prompts, wanted):
    """--prompt -> list of Prompt.  Raises UserError on a number or an id that is not there, and on an id that
    names several prompts."""
    if wanted == "all":
        if len(prompts) > MOST_PROMPTS:
            print(f"the first {MOST_PROMPTS} of {len(prompts)} prompts", flush=True)
        return prompts[:MOST_PROMPTS]
    return [_find(prompts, name.strip()) for name in wanted.split(",")]


def _find(prompts, name):
    if name.isdecimal() and 1 <= int(name) <= len(prompts):
        return prompts[int(name) - 1]
    found = [p for p in prompts if p.id == name]
    check(found, f"--prompt {name}: no such prompt; give an id, or a number from 1 to {len(prompts)}")
    check(len(found) == 1, f"--prompt {name}: {len(found)} prompts have this id; give a number: "
          f"{', '.join(f'{p.number} ({p.split})' for p in found)}")
    return found[0]


# ---------------------------------------------------------------------------------------------- on the screen

def printable(text):
    """text without characters that would steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}"
                   for c in text.expandtabs(4))


def wrap(text, width, first="", rest=""):
    """Lines of at most `width` characters.  Line ends in the text stay."""
    lines = []
    for paragraph in printable(text).strip().split("\n"):
        lines += textwrap.wrap(paragraph, width, initial_indent=rest if lines else first,
                               subsequent_indent=rest) or [""]
    return lines


def output_lines(output, width):
    """Such as "4 x  my sister sold my car . [3.00]", without the count where it is 1."""
    score = "" if output.score is None else f" [{output.score:.2f}]"
    unfinished = "" if output.finished else " [unfinished]"
    count = f"{output.count:2} x  " if output.count > 1 else "      "
    text = output.text.strip() or "(nothing)"
    return wrap(text + score + unfinished, width, count, " " * len(count))


def column_lines(column, width):
    lines = wrap(column.name, width) + wrap(column.summary(), width) + ["-" * width]
    for output in column.outputs:
        lines += output_lines(output, width)
    return lines


def show_prompt(prompt, width):
    """A Prompt as text, `width` characters wide: columns side by side, or below each other where they are too
    narrow."""
    title = f"prompt {prompt.number}: {prompt.id} ({prompt.split})"
    lines = [*wrap(title, width), "", *wrap(prompt.text, width), ""]
    if prompt.reference:
        lines += wrap("reference:", width) + output_lines(prompt.reference, width) + [""]
    gap = 3
    each = (width + gap) // len(prompt.columns) - gap
    if each < NARROWEST:
        for column in prompt.columns:
            lines += [*column_lines(column, width), ""]
        return "\n".join(lines)
    cells = [column_lines(column, each) for column in prompt.columns]
    cells = [c + [""] * (max(map(len, cells)) - len(c)) for c in cells]
    lines += [(" " * gap).join(cell.ljust(each) for cell in row).rstrip() for row in zip(*cells)]
    return "\n".join(lines) + "\n"


def show_files(prompts, width):
    """A list of what the files hold, a line for each split."""
    rows = []
    for split in dict.fromkeys(p.split for p in prompts):
        own = [p for p in prompts if p.split == split]
        prompts_of = Counter(c.name for p in own for c in p.columns)
        names = [name if n == len(own) else f"{name} ({n} of {len(own)} prompts)"
                 for name, n in prompts_of.items()]
        outputs = dict.fromkeys(str(c.n) for p in own for c in p.columns)
        rows.append([f"{own[0].number}-{own[-1].number}", split, own[0].id, own[0].task or "",
                     ", ".join(names), " or ".join(outputs)])
    rows = [[printable(cell) for cell in row] for row in rows]
    return text_table(["prompts", "split", "first id", "task", "policies", "outputs"], rows, 2, width)


# ------------------------------------------------------------------------------------------------------- main

def is_log(path):
    """Whether a file is a log of a training run: its lines have a step and no outputs."""
    check(Path(path).is_file(), f"{path}: no such file")
    if Path(path).suffix == ".json":
        return False
    rows = read_jsonl(path, {})
    return bool(rows) and "step" in rows[0] and "outputs" not in rows[0]


def show_log(path, png, width):
    rows = read_jsonl(path, {"step": int})
    png = Path(png or Path(path).with_suffix(".png"))
    draw_curves(rows, png, Path(path).name)
    print(text_table(*last_values(rows), 1, width))
    print(f"\nwrote {png}")


def main(cfg):
    width = shutil.get_terminal_size((110, 24)).columns
    logs = [path for path in cfg.files or [] if is_log(path)]
    if logs:
        check(len(cfg.files) == 1, f"{logs[0]} is a log: give one log, or sample files")
        return show_log(logs[0], cfg.png, width)
    runs = read_all(cfg.files)
    if cfg.split:
        known = dict.fromkeys(key[3] for key in runs)
        check(cfg.split in known, f"--split {cfg.split}: the files hold {', '.join(known)}")
        runs = {key: rows for key, rows in runs.items() if key[3] == cfg.split}
    prompts = collect(runs, cfg.outputs)
    if not cfg.prompt and not cfg.html:
        print(show_files(prompts, width))
        return print("\n--prompt NUMBER or --prompt ID shows what each policy wrote")
    chosen = select(prompts, cfg.prompt or "all")
    if cfg.html:
        atomic_write(cfg.html, page(chosen, [str(f) for f in cfg.files]).encode())
        return print(f"wrote {cfg.html}: {len(chosen)} prompts")
    print("\n".join(show_prompt(prompt, width) for prompt in chosen))


if __name__ == "__main__":
    launch(main, Config, __doc__)
