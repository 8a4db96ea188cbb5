"""The paper's tasks: where their rows come from, and the prompts made of them.

    python splits.py --task tldr                      # from the hub, through `datasets`; needs a network once
    python splits.py --task alpaca --data DIR         # the same data sets from local copies

Local copies lie at DIR/<data set's name without its owner>/<split>.jsonl, .jsonl.gz or .parquet, or one
folder deeper under the configuration's name, with the hub's fields.

    tldr             TL;DR posts; out of distribution: CNN/DailyMail articles
    tldr-length      posts of at most 245 words; out of distribution: longer ones
    tldr-subreddit   posts of r/relationships; out of distribution: all others
    tldr-sentiment   posts that a classifier calls positive; out of distribution: the negative ones
    tldr-short       title and first words of a post, for small machines; a judge in the place of people
                     (tasks/annotators.py); out of distribution: more words of other posts, and the first
                     words of articles
    alpaca           AlpacaFarm; out of distribution: AlpacaEval (near), Sequential Instructions (far)

Deviations from the paper: which side of the sentiment split is in distribution, and by which classifier, is
our choice; so is r/relationships, one of five subreddits that the authors' code can take.  The authors drew
subsets with replacement; here every row counts once.
"""
import re
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, first_line
from common.files import read_jsonl
from common.prompts import instruction_prompt

PARQUET = "refs/convert/parquet"    # a branch that the hub makes of data sets that were loading scripts
LENGTH_LIMIT = 245                  # words of a post
SUBREDDIT = "relationships"
FIRST_WORDS = {"ood_long": 120, "ood_cnn": 55}      # of a post or article in tldr-short; elsewhere 40
SENTIMENT_MODEL = "distilbert/distilbert-base-uncased-finetuned-sst-2-english"


# ------------------------------------------------------------------------------------------------ the sources

@dataclass(frozen=True)
class Source:
    """One split of one data set."""
    name: str                       # owner/name
    split: tuple                    # names it may have; the first that exists is taken
    config: str = ""
    revision: str | None = None

    def rows(self, data=""):
        """All rows as dicts, of local copies under `data` or of the hub.  Raises UserError without any."""
        if data:
            return self._local(Path(data))
        from datasets import load_dataset       # slow to import, and only needed here
        for split in self.split:
            what = dict(name=self.config or None)
            if self.revision == PARQUET:        # plain folders, which have no configurations
                what = dict(data_files={split: f"{self.config}/{split}/*.parquet"})
            try:
                return load_dataset(self.name, **what, split=split, revision=self.revision).to_list()
            except Exception as error:  # no network, renamed, gated: datasets and the hub raise many kinds
                says = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{self.name}: the hub does not give its split {' or '.join(self.split)} ({says}); "
                        f"--data DIR reads local copies from DIR/{self.name.split('/')[1]}/{self.split[0]}"
                        ".jsonl or .parquet")

    def _local(self, data):
        folder = data / self.name.split("/")[1]
        found = (sorted(where.glob(split + kind)) for where in (folder / self.config, folder)
                 for split in self.split for kind in (".jsonl", ".jsonl.gz", ".parquet", "-*.parquet"))
        files = next(filter(None, found), None)         # one, or the hub's numbered parts
        if not files:
            raise UserError(f"{folder}: no {self.split[0]}.jsonl, .jsonl.gz or .parquet; it should hold that "
                            f"split of {self.name}")
        if files[0].suffix != ".parquet":
            return read_jsonl(files[0], {})
        from datasets import load_dataset
        try:
            return load_dataset("parquet", data_files=list(map(str, files)), split="train").to_list()
        except Exception as error:
            raise UserError(f"{files[0]}: cannot be read as parquet ({type(error).__name__})") from None


_TLDR = "vwxyzjn/summarize_from_feedback_tldr_3_filtered"
_FARM = "tatsu-lab/alpaca_farm"
TLDR = {s: Source(_TLDR, (s,)) for s in ("train", "validation", "test")}
CNN = Source("abisee/cnn_dailymail", ("test",), "3.0.0")
COMPARISONS = {s: Source("openai/summarize_from_feedback", (s,), "comparisons", PARQUET)
               for s in ("train", "validation")}
ALPACA = {"train": Source(_FARM, ("sft",), "alpaca_instructions", PARQUET),
          "validation": Source(_FARM, ("val",), "alpaca_instructions", PARQUET),
          "unlabeled": Source(_FARM, ("unlabeled",), "alpaca_instructions", PARQUET),
          "test": Source("UCL-DARK/alpaca-farm-id-test", ("test", "train")),
          "ood_alpaca_eval": Source("tatsu-lab/alpaca_eval", ("eval", "test"), "alpaca_eval", PARQUET),
          "ood_sequential": Source("UCL-DARK/sequential-instructions", ("test", "train"))}
ALPACA_PREFERENCES = Source(_FARM, ("preference",), "alpaca_human_preference", PARQUET)

TASKS = {  # name: its out-of-distribution splits
    "tldr": ["ood_cnn"], "tldr-length": ["ood_long"], "tldr-subreddit": ["ood_subreddit"],
    "tldr-sentiment": ["ood_sentiment"], "tldr-short": ["ood_long", "ood_cnn"],
    "alpaca": ["ood_alpaca_eval", "ood_sequential"]}


def sources(task):
    """What a task reads.  A study asks for all of it before it trains."""
    if task == "alpaca":
        return [*ALPACA.values(), ALPACA_PREFERENCES]
    return [*TLDR.values(), *([] if task == "tldr-short" else COMPARISONS.values()),
            *([CNN] if "ood_cnn" in TASKS[task] else [])]


def splits(task):
    """Names of a task's splits.  `unlabeled` has prompts for PPO, with or without answers."""
    unlabeled = ["unlabeled"] if task in ("tldr-short", "alpaca") else []
    return ["train", "validation", "test", *TASKS[task], *unlabeled]


# ------------------------------------------------------------------------------------------------ the prompts

def field(row, name, source, kind=str):
    """row[name].  Raises UserError that names the columns found, if it is missing or of another type."""
    if not isinstance(row.get(name), kind):
        found = ", ".join(f"{k} ({type(v).__name__})" for k, v in row.items())
        raise UserError(f"{source.name}: column {name!r} of type {kind.__name__} is needed; found {found}")
    return row[name]


def tldr_prompt(row, source):
    subreddit, title, post = (field(row, name, source) for name in ("subreddit", "title", "post"))
    return f"SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR:"


def alpaca_prompt(row, source):
    return instruction_prompt(field(row, "instruction", source), row.get("input") or "")


def instruction_of(prompt):
    """What a prompt asks, without the frame around it, as a judge has to see it."""
    frame = r"### Instruction:\n(.*?)(?:\n\n### Input:\n(.*))?\n\n### Response:\s*$"
    if found := re.search(frame, prompt, re.S):
        return "\n\n".join(filter(None, found.groups()))
    return re.sub(r"\s*TL;DR:\s*$", "", prompt)


# --------------------------------------------------------------------------------------------------- the rows

def instruction_row(row, source):
    answer = next((name for name in ("output", "reference", "response") if name in row), "output")
    return {"prompt": alpaca_prompt(row, source), "reference": field(row, answer, source)}


def post_row(row, source):
    return {"id": str(row.get("id", "")), "prompt": tldr_prompt(row, source),
            "reference": field(row, "summary", source).strip(), "subreddit": row["subreddit"],
            "post": row["post"]}


def article_row(row, name):
    return {"id": str(row.get("id", name)), "reference": field(row, "highlights", CNN),
            "prompt": f"ARTICLE: {field(row, 'article', CNN)}\nTL;DR:"}


def short_rows(split, data):
    """Rows of `tldr-short`.  Every other post of train is unlabeled, every other one of test in ood_long."""
    source = TLDR[{"unlabeled": "train", "ood_long": "test"}.get(split, split)] if split != "ood_cnn" else CNN
    text, found = "article" if source is CNN else "post", source.rows(data)
    if source.split[0] in ("train", "test") and source is not CNN:
        found = found[split in ("unlabeled", "ood_long")::2]
    begun = [row | {text: " ".join(field(row, text, source).split()[:FIRST_WORDS.get(split, 40)])}
             for row in found]
    return [article_row(row, f"{split}-{i}") if source is CNN else post_row(row, source)
            for i, row in enumerate(begun)]


def sentiments(posts, batch_size=64):
    """Whether a classifier calls each post positive: list of bool.  Raises UserError without transformers."""
    try:
        from transformers import pipeline
    except ImportError:
        raise UserError("task tldr-sentiment needs a classifier: pip install transformers") from None
    classify = pipeline("sentiment-analysis", SENTIMENT_MODEL, truncation=True)
    return [out["label"] == "POSITIVE" for out in classify(posts, batch_size=batch_size)]


def in_distribution(task, rows):
    """Which rows, with their `post` and `subreddit`, lie on the training side: list of bool."""
    if task == "tldr-length":
        return [len(r["post"].split(" ")) <= LENGTH_LIMIT for r in rows]
    if task == "tldr-subreddit":
        return [r["subreddit"] == SUBREDDIT for r in rows]
    if task == "tldr-sentiment":
        return sentiments([r["post"] for r in rows])
    return [True] * len(rows)


def rows(task, split, data=""):
    """All rows of a task's split: dicts with id, prompt, reference and metadata.  Raises UserError on a
    source that cannot be had or lacks a column."""
    if task == "alpaca":
        source = ALPACA[split]
        found = source.rows(data)
        if split == "unlabeled":        # PPO needs no answers
            found = [row | {"output": row.get("output") or ""} for row in found]
        return [{"id": f"{split}-{i}"} | instruction_row(row, source) for i, row in enumerate(found)]
    if task == "tldr-short":
        return short_rows(split, data)
    if split == "ood_cnn":
        return [article_row(row, f"{split}-{i}") for i, row in enumerate(CNN.rows(data))]
    inside = not split.startswith("ood_")
    source = TLDR[split if inside else "test"]
    posts = [post_row(row, source) for row in source.rows(data)]
    return [row for row, found in zip(posts, in_distribution(task, posts)) if found == inside]


# -------------------------------------------------------------------------------------------- the preferences

def comparison(row, source):
    """A human comparison of two summaries -> a preference row, or None where they are of an article."""
    info, pair = field(row, "info", source, dict), field(row, "summaries", source, list)
    choice = field(row, "choice", source, int)
    if not info.get("post"):
        return None
    texts = [field(summary, "text", source).strip() for summary in pair]
    return {"prompt": tldr_prompt(info, source), "chosen": texts[choice], "rejected": texts[1 - choice],
            "post": info["post"], "subreddit": info["subreddit"]}


def instruction_comparison(row, source):
    """A human comparison of two responses -> a preference row, or None where neither is preferred."""
    pair = [field(row, name, source) for name in ("output_1", "output_2")]
    better = field(row, "preference", source, int)
    if better in (1, 2):
        chosen, rejected = pair[better - 1], pair[2 - better]
        return {"prompt": alpaca_prompt(row, source), "chosen": chosen, "rejected": rejected}
    return None


def preferences(task, validation=False, data=""):
    """Preference rows of a task: dicts with prompt, chosen, rejected.  None where it has none of that kind:
    AlpacaFarm's are one split, without validation; of first words nobody has any."""
    if task == "tldr-short" or task == "alpaca" and validation:
        return None
    if task == "alpaca":
        source, read = ALPACA_PREFERENCES, instruction_comparison
    else:
        source, read = COMPARISONS["validation" if validation else "train"], comparison
    found = [row for row in (read(row, source) for row in source.rows(data)) if row]
    return [row for row, inside in zip(found, in_distribution(task, found)) if inside]
