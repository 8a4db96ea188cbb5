"""Look at what was made: outputs of policies side by side, or the curves of a PPO run.

    python -m tools.show samples_*.jsonl                                # what the files hold
    python -m tools.show samples_*.jsonl --prompt 3                     # what each policy wrote to prompt 3
    python -m tools.show samples_*.jsonl --prompt ood_article-7         # the same, by id
    python -m tools.show samples_*.jsonl --html page.html               # many prompts, as one page
    python -m tools.show gpt4.json claude.json --prompt 1               # outputs in AlpacaEval's format
    python -m tools.show metrics_ppo.jsonl                              # curves over a healthy and a sick run

Prompts are numbered from 1, through all splits, in the order that the list without --prompt shows.  Policies
meet where id and prompt are equal.  Equal outputs of a policy are merged and counted ("4 x"), the most
frequent first.  After an output stands its gold reward (synthetic tasks), or else the reward in the file.
The curves of a log go to a PNG in the log's folder.
"""
import re
import shutil
import textwrap
from collections import Counter, namedtuple
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from pathlib import Path

from common.errors import UserError
from common.files import atomic_write, read_jsonl
from common.flags import Flags, arg, launch
from common.samples import read_all, run_name, text_table
from splits import synthetic_task
from tools.curves import draw_curves

NARROWEST = 24          # characters of a column, even where that is wider than the terminal


@dataclass
class Config(Flags):
    files: list = arg(None, "sample files, or one log metrics_*.jsonl")
    prompt: str = arg("", "a number from 1, or an id; '' lists what there is")
    html: str = arg("", "write a page to this file instead of the screen")


# ----------------------------------------------------------------------- what each policy wrote to one prompt

# one text of a policy, and how often it wrote exactly this; score: a float, or None
Output = namedtuple("Output", "text finished score count")
# row: the first sample line on a prompt; task: the module of its synthetic task, or None; reference: an
# Output or None; columns: {policy: (summary, list of Output)} of those that answered it
Prompt = namedtuple("Prompt", "number row task reference columns")


def make_column(row, task):
    """(a summary such as "different outputs: 9 of 16, mean gold reward 3.42", list of Output) of a sample
    line.  task: the module of its synthetic task, or None."""
    outputs, scores, name = list(zip(row["outputs"], row["finished"])), row.get("rewards"), "reward"
    if task:
        scores, name = [task.gold_reward(row["prompt"], *output) for output in outputs], "gold reward"
    score_of = dict(zip(outputs, scores or ()))
    merged = [Output(*output, score_of.get(output), n) for output, n in Counter(outputs).most_common()]
    mean = f", mean {name} {sum(scores) / len(scores):.2f}" if scores else ""
    return f"different outputs: {len(merged)} of {len(outputs)}{mean}", merged


def collect(runs):
    """{(policy, temperature, seed, split): rows} as from `read_all` -> a list of Prompt."""
    by_prompt, prompts = {}, []
    for key, rows in runs.items():
        for row in rows:
            by_prompt.setdefault((row["prompt"], str(row["id"])), []).append((key, row))
    for number, answers in enumerate(by_prompt.values(), 1):
        keys, rows = zip(*answers)
        names = [policy for policy, *_ in keys]
        if len(set(names)) < len(names):
            names = [run_name(key) for key in keys]
        row, task = rows[0], synthetic_task(rows[0].get("task"))
        try:
            gold = task.gold_reward(row["prompt"], row["reference"]) if task else None
        except ValueError as error:
            raise UserError(f"{error}, though its field task says {row['task']}") from None
        reference = Output(row["reference"], True, gold, 1) if row["reference"].strip() else None
        columns = {name: make_column(row, task) for name, row in zip(names, rows)}
        prompts.append(Prompt(number, row, task, reference, columns))
    return prompts


# ---------------------------------------------------------------------------------------------- on the screen

def wrap(text, width, first="", rest=""):
    """Lines of at most `width` characters.  Line ends in the text stay."""
    lines = []
    for paragraph in text.strip().split("\n"):
        lines += textwrap.wrap(paragraph, width, initial_indent=rest if lines else first,
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
    title = f"prompt {prompt.number}: {prompt.row['id']} ({prompt.row['split']})"
    lines = [*wrap(title, width), "", *wrap(prompt.row["prompt"], width), ""]
    if prompt.reference:
        lines += ["reference:", *output_lines(prompt.reference, width), ""]
    gap = "   "
    each = max(NARROWEST, (width + len(gap)) // len(prompt.columns) - len(gap))
    columns = [[*wrap(name, each), *wrap(summary, each), "-" * each,
                *(line for output in outputs for line in output_lines(output, each))]
               for name, (summary, outputs) in prompt.columns.items()]
    lines += [gap.join(cell.ljust(each) for cell in cells).rstrip()
              for cells in zip_longest(*columns, fillvalue="")]
    return "\n".join([*lines, ""])


def show_files(prompts, width):
    """A list of what the files hold, a line for each split."""
    rows = []
    for split in dict.fromkeys(p.row["split"] for p in prompts):
        own = [p for p in prompts if p.row["split"] == split]
        n_of = Counter(name for p in own for name in p.columns)
        rows.append([f"{own[0].number}-{own[-1].number}", split, own[0].row["id"],
                     ", ".join(f"{name} ({n})" for name, n in n_of.items())])
    return text_table(["prompts", "split", "first id", "policies (prompts)"], rows, 2, width)


# ------------------------------------------------------------------------------------------------ as a page

STYLE = """
body { margin: 0 auto; padding: 1.5rem; max-width: 90rem; font: 15px/1.5 sans-serif; color-scheme: light; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: 0; }
.policies { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); }
li { list-style: none; border-top: 1px solid; padding: .35rem 0; display: grid; gap: .6rem;
  grid-template-columns: 2.3rem 1fr auto; }
ul { padding: 0; }
mark { background: none; color: #0a8a63; }
.distractor { color: #c8501f; text-decoration: line-through; }
.invented { color: #c8501f; text-decoration: line-through double; font-style: italic; }
"""
LEGEND = ('<p>Facts: <mark class="right">of the key story</mark>, <mark class="distractor">of a distractor '
          'story</mark>, <mark class="invented">of no story of the post</mark>. A fact outside of a '
          'grammatical clause stays plain, because it earns nothing. At the right: the gold reward, at most '
          '5.</p>')


def mark_facts(text, prompt, response=True):
    """A text as HTML.  Marked is each word that states a fact: of a response in a grammatical clause, of the
    post itself one of its key story.  prompt: a Prompt."""
    if not prompt.task:
        return escape(text)
    key, distractors = prompt.task.read_prompt(prompt.row["prompt"])
    stated = prompt.task.facts(text) if response else set(key.items())

    def mark(word):
        slot, value = prompt.task.FACT.get(word, (None, None))
        if (slot, value) not in stated:
            return escape(word)
        name = "right" if key[slot] == value else "distractor" if value in distractors[slot] else "invented"
        return f'<mark class="{name}">{escape(word)}</mark>'
    return "".join(map(mark, re.findall(r"\w+|\W+", text)))


def html_list(outputs, prompt):
    items = []
    for text, finished, score, count in outputs:
        shown = (mark_facts(text.strip(), prompt) or "(nothing)") + " [unfinished]" * (not finished)
        items.append(f"<li><b>{f'{count} ×' if count > 1 else ''}</b><pre>{shown}</pre>"
                     f"<span>{'' if score is None else f'{score:.2f}'}</span></li>")
    return f"<ul>{''.join(items)}</ul>"


def html_section(prompt):
    columns = {"reference": ("", [prompt.reference])} if prompt.reference else {}
    policies = "\n".join(f"<div><h3>{escape(name)}</h3><small>{escape(summary)}</small>"
                         f"{html_list(outputs, prompt)}</div>"
                         for name, (summary, outputs) in (columns | prompt.columns).items())
    title = f"Prompt {prompt.number}: {prompt.row['id']} ({prompt.row['split']})"
    text = mark_facts(prompt.row["prompt"], prompt, response=False)
    return (f"<section><h2>{escape(title)}</h2>\n<pre>{text}</pre>\n"
            f'<div class="policies">{policies}</div></section>')


def page(prompts):
    """Prompts as one HTML page, without scripts."""
    legend = LEGEND if any(prompt.task for prompt in prompts) else "<p>At the right: the reward.</p>"
    return ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f"<title>Outputs side by side</title><style>{STYLE}</style></head>\n"
            f"<body><h1>Outputs side by side</h1>\n{legend}\n" + "\n".join(map(html_section, prompts))
            + "</body></html>\n")


# ------------------------------------------------------------------------------------------------------- main

def is_log(path):
    """Whether a file is a log of a training run: its lines have a step and no outputs."""
    rows = read_jsonl(path, {}) if Path(path).is_file() and Path(path).suffix != ".json" else []
    return bool(rows) and "step" in rows[0] and "outputs" not in rows[0]


def say(text):
    """Prints a text without the characters that would steer a terminal."""
    print("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text))


def main(cfg):
    width = shutil.get_terminal_size((110, 24)).columns
    if len(cfg.files or ()) == 1 and is_log(cfg.files[0]):
        path = Path(cfg.files[0])
        draw_curves(read_jsonl(path, {"step": int}), path.with_suffix(".png"), path.name)
        return print(f"wrote {path.with_suffix('.png')}")
    prompts = collect(read_all(cfg.files))
    if not cfg.prompt and not cfg.html:
        return say(f"{show_files(prompts, width)}\n\n--prompt NUMBER or --prompt ID shows the outputs")
    if cfg.prompt:
        n, prompts = len(prompts), [p for p in prompts if cfg.prompt in (str(p.number), str(p.row["id"]))]
        if not prompts:
            raise UserError(f"--prompt {cfg.prompt}: give an id, or a number from 1 to {n}")
    if cfg.html:
        atomic_write(cfg.html, page(prompts).encode())
        return print(f"wrote {cfg.html}: {len(prompts)} prompts")
    say("\n".join(show_prompt(prompt, width) for prompt in prompts))


if __name__ == "__main__":
    launch(main, Config, __doc__)
