"""README.md and docs/: listed numbers agree with their sources; links, commands and functions exist."""
import importlib
import json
import re
import tomllib

import pytest
from conftest import ROOT

DOCS = sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", *DOCS]
NUMBERS = [(page, entry) for page, entries in tomllib.loads((ROOT / "tests/numbers.toml").read_text()).items()
           for entry in entries]


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def value_at(data, path):
    """path: "a/key=x,key=y/b", where key=x,key=y picks the one entry of a list that has these fields."""
    for step in path.split("/"):
        wanted = dict(pair.split("=") for pair in step.split(",")) if isinstance(data, list) else {}
        [data] = [x for x in data if wanted.items() <= {k: str(v) for k, v in x.items()}.items()] if wanted \
            else [data[step]]
    return data


def agrees(text, value):
    """Whether the first number of a text is the value, to the digits written.  "42 %" is .42."""
    sign, digits, percent = re.search(r"([-−]?)(\d*\.?\d+)( ?%)?", text.replace(",", "")).groups()
    shown = round(value * (100 if percent else 1), len(digits.partition(".")[2]))
    return float(digits) * (-1 if sign else 1) == shown


@pytest.mark.parametrize("page,entry", NUMBERS, ids=lambda x: x if isinstance(x, str) else x["text"])
def test_a_number_stands_on_its_page_and_agrees_with_its_source(page, entry):
    assert entry["text"] in " ".join(text_of(page).split())
    if "at" in entry:
        source = text_of(entry["file"])
        lines = entry["file"].endswith(".jsonl") and [json.loads(line) for line in source.splitlines()]
        assert agrees(entry["text"], value_at(lines or json.loads(source), entry["at"]))
    elif "file" in entry:
        assert entry["text"] in text_of(entry["file"])


def test_pages_and_numbers_written_by_hand_are_few():
    assert len(DOCS) == 8 and sum(len(text_of(page).split()) for page in DOCS) <= 10_000
    assert all(sum(page == p for p, _ in NUMBERS) <= 10 + 2 * (page == "README.md") for page in PAGES)


def test_the_table_of_logs_shows_the_logs():
    rows = re.findall(r"^\| (run|healthy|sick|) ?\| (\w+) \| (.*) \|$", text_of("docs/logs.md"), re.M)
    _, _, names = rows.pop(0)
    for new_run, step, cells in rows:
        if new_run:
            log = [json.loads(line) for line in text_of(f"results/runs/ppo_{new_run}.jsonl").splitlines()]
        for cell, name in zip(cells.split(" | "), names.split(" | "), strict=True):
            assert agrees(cell, value_at(log, f"step={step}/{name}"))


@pytest.mark.parametrize("name", PAGES)
def test_links_commands_and_functions_exist(name):
    page = text_of(name)
    assert re.findall("<!--.{,15}", page) == ["<!-- results -->", "<!-- /results -->"] * (name == "README.md")
    for link, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", page):
        target = (ROOT / name).parent / link if link else ROOT / name
        assert target.exists(), link
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M) if anchor else [""]
        assert anchor in [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings], anchor
    for module, function in re.findall(r"\| `(\w+)\.(\w+)` \|$", page, re.M):
        assert f"def {function}(" in text_of(f"{module}.py"), function
    for module, rest in re.findall(r"python (?:-m )?(?!pytest)([\w./]+)([^`|#\n]*)", page):
        script = importlib.import_module(module.removesuffix(".py").replace("/", "."))
        for flag in re.findall(r"(?<!\S)--([a-z][\w-]*)", re.sub('".*?"', "", rest)):
            name = flag.replace("-", "_").removeprefix("no_")
            assert flag == "preset" or name in script.Config.__dataclass_fields__, (module, flag)


def test_line_counts_of_the_reading_order():
    for path, lines in re.findall(r"\| \[[^\]]+\]\((\S+\.py)\) \| (\d+) \|", text_of("README.md")):
        assert abs(int(lines) - text_of(path).count("\n")) <= text_of(path).count("\n") / 10, path
