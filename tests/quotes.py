"""Numbers quoted in a Markdown page, and the places in the results files that they come from.

A comment stands behind a paragraph, list or table, or indented inside a list's item.  It names a file and a
list in it, then each quote:

    PPO wins 0.91 [0.88, 0.93] of its comparisons, SFT 0.42.
    <!-- results/results.json win_rate task=synthetic split=test temperature=0.7:
      0.91 [0.88, 0.93] = policy=ppo; 0.42 = policy=sft -->

A place is a dotted path, then filters `key=value`, then a dotted path inside what the filters found.  What
stands before the colon is put in front of every place of the comment.  `*` and `?` match within a path or a
filter; quotation marks hold words with spaces together.  A place that is not exactly one value is an error,
unless its first word combines several: `mean`, `count`, `least`, `most`.  `minus` turns the sign.

A quote is written as in the text: `0.91`, `+0.37`, `-0.12`, `58 %`, `0.37 [0.36, 0.39]`, `0.32 ± 0.22`,
`[0.36, 0.39]`, `0.29 to 0.90` (the least and the largest seed), or the words of a verdict such as `holds`.  It
has as many decimals as its writer wants.  A place may end at an interval, or at a row with an "estimate".

Two other kinds of files serve as sources: the lines of a log are the list `log`; the rows of a Markdown file's
tables are the list `tables`, with `section`, the heading above, as one more column.

Two more sources check only that the quote stands in the text: `paper`, a number that others report, and
`setting`, a number that somebody chose.
"""
import json
import re
import shlex
from fnmatch import fnmatchcase
from typing import NamedTuple

NUMBER = r"[-+]?(?:\d[\d,]*)?\.?\d+"
COMMENT = re.compile(r"<!--(.*?)-->", re.S)
UNCHECKED = ("paper", "setting")
COMBINE = ("mean", "count", "least", "most", "minus")


class Quote(NamedTuple):
    text: str       # as it stands in the page
    source: str     # file, or one of UNCHECKED
    place: str      # where in the file
    block: str      # the paragraph, bullet or table that the comment stands behind
    line: int       # of the comment


def plain(text):
    """Text with ASCII signs and single spaces, so that a quote is found across a line's end."""
    return " ".join(text.replace("−", "-").replace("\u2009", " ").replace("**", "").split())


def block_before(text, item=False):
    """The last block of Markdown in `text`, back to a blank line: a paragraph, a table or a whole list.

    item: only the last item of a list, which is what an indented comment stands in."""
    block = []
    for line in reversed(COMMENT.sub("", text).rstrip().split("\n")):
        if not line.strip():
            break
        block.append(line)
        if item and re.match(r"\s*([-*]|\d+\.) ", line):
            break
    return plain("\n".join(reversed(block)))


def entries(body):
    """The parts of a comment between semicolons, those inside quotation marks kept together."""
    return [e.strip() for e in re.findall(r'(?:"[^"]*"|[^;"])+', " ".join(body.split())) if e.strip()]


def quotes(page):
    """Every Quote of a page.  Comments that name no source (`file.json ...:`, `paper:`, `setting:`) are left
    out."""
    found = []
    for comment in COMMENT.finditer(page):
        head, colon, body = comment[1].strip().partition(":")
        source, _, prefix = " ".join(head.split()).partition(" ")
        if not colon or not (source in UNCHECKED or source.endswith((".json", ".jsonl", ".md"))):
            continue
        before = page[:comment.start()]
        block, line = block_before(before, item=before.endswith(" ")), before.count("\n") + 1
        for entry in entries(body):
            text, _, place = entry.partition(" = ")
            combine, _, rest = place.partition(" ")
            words = (combine, prefix, rest) if combine in COMBINE else (prefix, place)
            found.append(Quote(plain(text), source, " ".join(filter(None, words)), block, line))
    return found


# ------------------------------------------------------------------------------------------------- looking up

def read_source(path):
    """A results file as nested dicts and lists: JSON as it is, a log as {"log": [line, ...]}, Markdown as
    {"tables": [row, ...]}."""
    if path.suffix == ".json":
        return json.loads(path.read_text())
    if path.suffix == ".jsonl":
        return {"log": [json.loads(line) for line in path.read_text().splitlines()]}
    rows, section, header = [], "", None
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            section, header = line.lstrip("# "), None
        elif not line.startswith("|"):
            header = None
        elif header is None:
            header = [c.strip() for c in line.strip("|").split("|")]
        elif not set(line) <= set("|- :"):
            cells = [c.strip() for c in line.strip("|").split("|")]
            rows.append({"section": section, **dict(zip(header, map(cell, cells)))})
    return {"tables": rows}


def cell(text):
    """A table's cell: `0.41 [0.31, 0.51] ...` as an interval, a number as a number, else its text."""
    numbers = [float(x.replace(",", "")) for x in re.findall(NUMBER, plain(text))]
    if re.match(rf"{NUMBER} \[{NUMBER}, {NUMBER}\]", plain(text)):
        return dict(zip(("mean", "low", "high"), numbers))
    return numbers[0] if re.fullmatch(NUMBER, plain(text)) else text


def step(value, key):
    """The values one key further: a dict's by name or pattern, a list's by position or all by `*`."""
    if isinstance(value, dict):
        return [value[key]] if key in value else [v for k, v in value.items() if fnmatchcase(k, key)]
    if isinstance(value, list):
        return value if key == "*" else [value[int(key)]] if key.isdigit() and int(key) < len(value) else []
    return []


def follow(values, path):
    for key in path.split("."):
        values = [v for value in values for v in step(value, key)]
    return values


def equal(value, wanted):
    if isinstance(value, (int, float)) and re.fullmatch(NUMBER, wanted):
        return float(value) == float(wanted)
    return fnmatchcase(str(value), wanted)


def look_up(data, place):
    """The value at `place`.  Raises ValueError if it is not exactly one."""
    words = shlex.split(place)
    combine = words.pop(0) if words[0] in COMBINE else ""
    values = follow([data], words[0])
    for word in words[1:]:
        key, equals, wanted = word.partition("=")
        if equals:
            rows = [r for v in values for r in (v if isinstance(v, list) else [v])]
            values = [r for r in rows if isinstance(r, dict) and key in r and equal(r[key], wanted)]
        else:
            values = follow(values, word)
    if combine == "count":
        return len(values)
    if combine in ("mean", "least", "most") and values:
        return {"mean": sum(values) / len(values), "least": min(values), "most": max(values)}[combine]
    if len(values) != 1:
        raise ValueError(f"{len(values)} values there")
    value = values[0].get("estimate", values[0]) if isinstance(values[0], dict) else values[0]
    return turned(value) if combine == "minus" else value


def turned(value):
    """A number or an interval with the other sign."""
    if isinstance(value, dict):
        ends = {"low": -value["high"], "high": -value["low"]} if "low" in value else {}
        return {"mean": -value["mean"], **ends, "per_seed": [-x for x in value.get("per_seed", ())]}
    return -value


# -------------------------------------------------------------------------------------------------- comparing

def parts(text, value):
    """The numbers that a quote of this form should show, in order."""
    if isinstance(value, list) and len(value) == 3:
        value = dict(zip(("mean", "low", "high"), value))
    if not isinstance(value, dict):
        value = {"mean": value}     # a bare number
    form = re.sub(NUMBER, "#", text)
    if form == "# to #":
        return [min(value["per_seed"]), max(value["per_seed"])]
    names = {"#": ["mean"], "# %": ["mean"], "#%": ["mean"], "# [#, #]": ["mean", "low", "high"],
             "[#, #]": ["low", "high"], "# ± #": ["mean", "seed_sd"],
             "# [#, #] ± #": ["mean", "low", "high", "seed_sd"]}
    if form not in names:
        raise ValueError(f"no quote has the form {form}")
    return [value[name] for name in names[form]]


def written(number, like):
    """A number with the decimals and the sign of the text `like`."""
    decimals = len(like.partition(".")[2])
    text = f"{number:{'+' if like[0] == '+' else ''},.{decimals}f}"
    return text.replace("-", "") if not re.search("[1-9]", text) else text


def same(like, number):
    """Whether the text `like` is this number, written with as many decimals."""
    bare = like if re.search("[1-9]", like) else like.lstrip("+-")
    return written(number, bare).replace(",", "").lstrip("0") == bare.replace(",", "").lstrip("0")


def complaint(quote, data):
    """What is wrong with a quote, in words; "" if nothing.  data: the source as read_source returns it."""
    if not found_in(quote.text, quote.block):
        return f"{quote.text!r} does not stand in the paragraph before the comment: {quote.block[:80]!r}"
    if quote.source in UNCHECKED:
        return ""
    try:
        value = look_up(data, quote.place)
        if isinstance(value, str):
            agree = quote.text.lower() in value.lower()
            return "" if agree else f"{quote.text!r}: {quote.source} says {value!r}"
        wanted = [x * (100 if "%" in quote.text else 1) for x in parts(quote.text, value)]
    except (ValueError, KeyError, TypeError) as error:
        return f"{quote.text} = {quote.place}: {error}"
    shown = re.findall(NUMBER, quote.text)
    if all(map(same, shown, wanted)):
        return ""
    return f"{quote.text!r}: {quote.source} has {', '.join(f'{x:.4g}' for x in wanted)} at {quote.place}"


def found_in(text, block):
    """Whether the quote stands in the block as a number of its own, not inside a longer one."""
    return bool(re.search(rf"(?<![\d.+-]){re.escape(text)}(?!\d|\.\d)", block, re.I))


def bare_decimals(block, covered):
    """Decimal numbers of a block that no quote covers.  Code, links and comments are not looked at."""
    text = plain(COMMENT.sub(" ", block))
    text = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text)
    for quote in sorted(map(plain, covered), key=len, reverse=True):
        text = re.sub(rf"(?<![\d.+-]){re.escape(quote)}(?!\d|\.\d)", " ", text, flags=re.I)
    return re.findall(r"(?<![\w.])[-+]?\d*\.\d+(?![\w.]*\.\d)", text)


def section(page, title):
    """The text of one `## title` section."""
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.S | re.M)
    if not match:
        raise ValueError(f"no section {title!r}")
    return match[1]
