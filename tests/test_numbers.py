"""The README and docs/ against the results files and the code: numbers, commands, flags, functions and links.

Sentences there are written by hand.  A number in them names its source in a comment (tests/quotes.py explains
how), so a new run of the study that changes a number fails here until somebody has read the sentence again.
"""
import dataclasses
import importlib
import re

import pytest
from conftest import ROOT
from quotes import COMMENT, bare_decimals, block_before, complaint, plain, quotes, read_source, section

from study.report import signed

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
# where every decimal number needs a source; None: on the page as a whole
COVERED = [("README.md", "What it shows"), ("docs/results.md", None), ("docs/reviewers.md", None),
           ("docs/logs.md", None)]
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.S | re.M)
# python ppo.py ..., python -m tools.show ..., torchrun --nproc_per_node=8 -- ppo.py ...: module, script, flags
COMMAND = re.compile(r"(?:python3?|torchrun) +(?:-\S+ +)*?(?:-m +([\w.]+)|(\S+\.py))([^|;&#`\n]*)")


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_quoted_numbers_stand_in_the_results(name):
    sources, wrong = {}, []
    for quote in quotes(text_of(name)):
        if quote.source not in sources and "." in quote.source:
            sources[quote.source] = read_source(ROOT / quote.source)
        if problem := complaint(quote, sources.get(quote.source)):
            wrong.append(f"{name}:{quote.line}: {problem}")
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("name,title", COVERED)
def test_every_decimal_number_names_its_source(name, title):
    page = text_of(name) if title is None else section(text_of(name), title)
    page, sourced = FENCE.sub("", page), quotes(page)
    without = []
    for block in blocks(page):
        covered = [q.text for q in sourced if q.block in block]
        without += [f"{x} in: {block[:90]}" for x in bare_decimals(block, covered)]
    assert not without, "\n" + "\n".join(without)


def blocks(page):
    """Every paragraph, list and table of a page, as a comment behind it sees it."""
    ends = [m.start() for m in re.finditer(r"\n[ ]*\n|\Z", COMMENT.sub("", page))]
    return [b for b in dict.fromkeys(block_before(COMMENT.sub("", page)[:end]) for end in ends) if b]


def test_the_table_of_claims_is_that_of_the_results():
    """README's rows are those of results/reviewers.md in short: same order, section and verdict, and every
    interval is one of the row's, with systematic noise where there are two kinds and none is named."""
    lines = section(text_of("README.md"), "The paper's claims beside ours").split("\n")
    shown = [[plain(cell) for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("| ")]
    paper = read_source(ROOT / "results/reviewers.json")["paper"]
    for row, (where, _, _, difference, verdict) in zip(paper, shown[2:], strict=False):
        estimates = {signed(e) for e in row["found"]
                     if "independent" not in e["of"] or "independent" in difference}
        intervals = re.findall(r"[-+][\d.]+ \[[^\]]*\]", difference)
        assert (row["section"].endswith(where), row["verdict"]) == (True, verdict), where
        assert set(intervals) <= estimates and (intervals or not estimates), (where, intervals, estimates)
    assert len(shown) - 2 == len(paper) - 1     # that it is open whether the trade-off is fundamental


def test_the_checker_sees_what_is_wrong():
    data = {"wins": [{"policy": "sft", "mean": .4162, "low": .36, "high": .48, "seed_sd": .03},
                     {"policy": "ppo", "mean": .9061, "low": .88, "high": .93, "seed_sd": .06}],
            "gap": {"a 1": -.118, "a 2": -.122}}

    def problems(text, comment):
        page = f"before 1.1\n\n- {text}\n  <!-- x.json {comment} -->\n\nafter 2.2"
        return [complaint(quote, data) for quote in quotes(page)]

    assert problems("PPO 0.91 [0.88, 0.93]", "wins: 0.91 [0.88, 0.93] = policy=ppo") == [""]
    assert problems("42 %, 0.91 ± 0.06", "wins: 42 % = policy=sft; 0.91 ± 0.06 = policy=ppo") == ["", ""]
    assert problems("falls by 0.12", ": 0.12 = minus gap.a*")[0].endswith("2 values there")
    assert problems("falls by 0.118, by .12", 'gap: 0.118 = minus "a 1"; .12 = minus "a 2"') == ["", ""]
    assert problems("falls by 0.118", ': 0.118 = minus "gap.a 1"') == [""]
    assert problems("on average −0.12", ": -0.12 = mean gap.*") == [""]
    assert problems("PPO 0.92", "wins: 0.92 = policy=ppo")[0].startswith("'0.92': x.json has 0.9061")
    assert "does not stand" in problems("PPO 0.913", "wins: 0.91 = policy=ppo")[0]
    assert "does not stand" in problems("PPO 0.9", "wins: 1.1 = policy=ppo")[0]      # but in the one before
    assert problems("PPO .91, +0.9", "wins: .91 = policy=ppo; +0.9 = policy=ppo") == ["", ""]
    assert problems("one 0.5", "wins: 0.5 = policy=bon")[0].endswith("0 values there")
    assert bare_decimals(plain("0.42 [0.36, 0.48] and 0.5, `0.1`, 2.13.0"), ["0.42 [0.36, 0.48]"]) == ["0.5"]


# --------------------------------------------------------------------------------- commands, functions, links

@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = re.sub(r"<!--.*?-->", "", FENCE.sub("", text_of(name)), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", page):
        if re.match(r"\w+://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", target.read_text()), re.M)
            assert anchor in map(anchor_of, headings), f"{name}: {link}"


def anchor_of(heading):
    """GitHub's name for a heading: lower case, no punctuation, dashes for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def commands(page):
    """(module, flags) of every command that runs a script of this project, and of every stage that
    reproduce.py is given flags for: --ppo "--steps 10"."""
    def flags_in(text):
        return re.findall(r"(?<!\S)--([a-z][\w-]*)", text)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", page))]
    code = "\n".join([*FENCE.findall(page), *spans])
    for match in COMMAND.finditer(code.replace("\\\n", " ")):
        module, script, rest = match.groups()
        name = module or script.removesuffix(".py").replace("/", ".")
        if name != "pytest":
            for stage, given in re.findall(r'--(sft|reward|ppo|bon) "([^"]*)"', rest):
                yield stage, flags_in(given)
            yield name, flags_in(re.sub(r'"[^"]*"', "", rest))


@pytest.mark.parametrize("name", PAGES)
def test_commands_name_scripts_and_flags_that_exist(name):
    for module, flags in commands(text_of(name)):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), f"{name}: python {module}"
        config = getattr(importlib.import_module(module), "Config", None)
        if config:
            known = {f.name.replace("_", "-") for f in dataclasses.fields(config)} | {"help", "preset"}
            unknown = {f for f in flags if f.removeprefix("no-") not in known}
            assert not unknown, f"{name}: {module} has no {unknown}"


@pytest.mark.parametrize("name", PAGES)
def test_functions_beside_equations_exist(name):
    for rows in re.findall(r"^\| equation \| function \|\n(.*?)(?=^[^|]|\Z)", text_of(name), re.S | re.M):
        for module, function in re.findall(r"`([\w.]+)\.(\w+)`", rows):
            assert hasattr(importlib.import_module(module), function), f"{name}: {module}.{function}"


def test_line_counts_of_the_reading_order():
    """The README's line counts are right to a sixth: they tell how long a file takes to read."""
    rows = re.findall(r"\| \[[^\]]+\]\((\S+\.py)\) \| (\d+) \|", text_of("README.md"))
    assert len(rows) > 10
    for path, lines in rows:
        real = text_of(path).count("\n")
        assert abs(int(lines) - real) <= real / 6, f"{path}: {lines} in the README, {real} lines"
