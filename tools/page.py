"""Outputs side by side as one HTML page, without scripts, readable in dark mode and without colour.

    python -m tools.show samples_*.jsonl --prompt all --html page.html      # runs this

Where the task is the synthetic one, every fact that a text states is marked: right, if the post's key story
states it too; of a distractor story; or of no story of the post.
"""
from html import escape

import regex            # comes with tiktoken

from splits import synthetic_task
from tasks import synthetic

STYLE = """
:root { color-scheme: light dark;
  --text: #1b1b1b; --soft: #5c5c5c; --page: #fbfbf9; --card: #ffffff; --line: #d8d8d2;
  --right: #0a6b4f; --right-back: #d9f2e6; --wrong: #a02d0b; --wrong-back: #fde3d8; }
@media (prefers-color-scheme: dark) { :root {
  --text: #e8e8e4; --soft: #a3a39c; --page: #161617; --card: #1f2021; --line: #3a3b3c;
  --right: #7fe0b8; --right-back: #123b2d; --wrong: #ffa687; --wrong-back: #4a2013; } }
body { margin: 0 auto; padding: 1.5rem; max-width: 90rem; background: var(--page); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 0 0 .6rem; }
h3 { font-size: 1rem; margin: 0; }
p { margin: .3rem 0; } .title { margin-top: .8rem; font-weight: 700; }
.soft { color: var(--soft); font-size: .85rem; }
section { border-top: 2px solid var(--line); margin-top: 1.6rem; padding-top: 1rem; }
.prompt, .policy { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .6rem .8rem; }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; overflow-y: auto; }
.policies { display: grid; gap: .8rem; margin-top: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); }
ul { list-style: none; margin: .4rem 0 0; padding: 0; }
li { border-top: 1px solid var(--line); padding: .35rem 0; display: grid; gap: .6rem;
  grid-template-columns: 1fr auto; }
.counted li { grid-template-columns: 2.3rem 1fr auto; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.count, .score { color: var(--soft); font-variant-numeric: tabular-nums; white-space: nowrap; }
.count { text-align: right; font-weight: 700; color: var(--text); }
mark { border-radius: 3px; padding: 0 .12em; text-decoration-thickness: 1px; }
.right { color: var(--right); background: var(--right-back); text-decoration: underline; }
.distractor { color: var(--wrong); background: var(--wrong-back); text-decoration: line-through; }
.invented { color: var(--wrong); background: var(--wrong-back); text-decoration: line-through double;
  font-style: italic; }
.open { color: var(--wrong); white-space: nowrap; font-size: .85rem; }
"""
LEGEND = ('<p>Facts of the prompt and of the outputs: '
          '<mark class="right">right</mark>, the key story states it; '
          '<mark class="distractor">of a distractor</mark>, another story of the post states it; '
          '<mark class="invented">invented</mark>, no story of the post states it. A fact outside of a '
          'grammatical clause stays plain, because it earns nothing.</p>')


# -------------------------------------------------------------------------------------------- facts in a text

def verdict(fact, key, distractors):
    """What a fact (slot, value) is to a post whose key story has `key` {slot: value} and whose other stories
    have `distractors` {slot: set of values}: "right", "distractor" or "invented"."""
    slot, value = fact
    if key[slot] == value:
        return "right"
    return "distractor" if value in distractors[slot] else "invented"


def mark_output(prompt, text):
    """A response to a post as HTML, the facts that it states marked.  A word outside of a clause of the
    grammar states nothing."""
    key, distractors = synthetic.read_prompt(prompt)
    stated = synthetic.facts(text)
    return _mark(text, lambda fact: verdict(fact, key, distractors) if fact in stated else None)


def mark_prompt(prompt):
    """A post as HTML, the facts of its key story marked."""
    key, _ = synthetic.read_prompt(prompt)
    return _mark(prompt, lambda fact: "right" if key[fact[0]] == fact[1] else None)


def _mark(text, class_of):
    """Escapes a text, and puts every word that is a fact into <mark class=...>, where class_of(fact) gives
    one."""
    out = []
    for piece in regex.findall(r"\w+|\W+", text):
        fact = synthetic.FACT.get(piece)
        name = class_of(fact) if fact else None
        out.append(f'<mark class="{name}">{escape(piece)}</mark>' if name else escape(piece))
    return "".join(out)


def is_marked(prompt):
    """Whether a Prompt's facts can be marked: it is a post of the synthetic task."""
    if not prompt.task or synthetic_task(prompt.task) is not synthetic:
        return False
    try:
        synthetic.read_prompt(prompt.text)
    except ValueError:
        return False
    return True


# --------------------------------------------------------------------------------------------------- the page

def page(prompts, files):
    """A page of Prompts as a string.  files: names of the files that they come from."""
    sources = ", ".join(files) if len(files) < 5 else f"{len(files)} files"
    legend = LEGEND if any(map(is_marked, prompts)) else ""
    body = "\n".join(map(_section, prompts))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Outputs side by side</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Outputs side by side</h1>
{legend}
<p class="soft">Equal outputs of a policy are merged and counted, the most frequent first.
Made by tools/show.py from {escape(sources)}.</p>
{body}
</body>
</html>
"""


def _section(prompt):
    marked = is_marked(prompt)
    text = mark_prompt(prompt.text) if marked else escape(prompt.text)
    reference = ""
    if prompt.reference:
        item = _item(prompt.reference, prompt.text, marked)
        reference = f'<p class="title">Reference</p><ul>{item}</ul>'
    columns = "\n".join(_column(column, prompt.text, marked) for column in prompt.columns)
    return f"""<section>
<h2>Prompt {prompt.number}: {escape(prompt.id)} <span class="soft">({escape(prompt.split)})</span></h2>
<div class="prompt">{text}</div>
{reference}
<div class="policies">
{columns}
</div>
</section>"""


def _column(column, prompt, marked):
    counted = any(output.count > 1 for output in column.outputs)
    items = "\n".join(_item(output, prompt, marked, counted) for output in column.outputs)
    return f"""<div class="policy">
<h3>{escape(column.name)}</h3>
<p class="soft">{escape(column.summary())}</p>
<ul{' class="counted"' * counted}>
{items}
</ul>
</div>"""


def _item(output, prompt, marked, counted=False):
    text = output.text.strip()
    shown = mark_output(prompt, text) if marked else escape(text)
    if not text:
        shown = '<span class="soft">(nothing)</span>'
    if not output.finished:
        shown += ' <span class="open">[unfinished]</span>'
    count = f'<span class="count">{f"{output.count} ×" if output.count > 1 else ""}</span>' if counted else ""
    score = "" if output.score is None else f"{output.score:.2f}"
    return f'<li>{count}<span class="text">{shown}</span><span class="score">{score}</span></li>'
