"""The paper's tasks: where their rows come from, and the prompts made of them.

    python splits.py --task tldr                      # from the hub, through `datasets`; needs a network once
    python splits.py --task alpaca --data DIR         # the same data sets from local copies

Local copies lie at DIR/<data set's name without its owner>/<split>.jsonl, .jsonl.gz or .parquet, or one
folder deeper under the configuration's name, with the hub's fields.

    tldr             TL;DR posts; out of distribution: CNN/DailyMail articles
    tldr-length      posts of at most 245 words; out of distribution: longer ones
    tldr-subreddit   five subreddits about relationships and the like; out of distribution: all others
    tldr-sentiment   posts that a classifier calls positive; out of distribution: the negative ones
    alpaca           AlpacaFarm; out of distribution: AlpacaEval (near), Sequential Instructions (far)

Deviations from the paper: which side of the sentiment split is in distribution, and by which classifier, is
our choice; the authors drew subsets with replacement, here every row counts once.
"""
import re
from dataclasses import dataclass
from pathlib import Path

from runtime import Fault, first_line, read_jsonl, require

PARQUET = "refs/convert/parquet"    # a branch that the hub makes of data sets that were loading scripts
LENGTH_LIMIT = 245                  # words of a post
SUBREDDITS = ("relationships", "relationship_advice", "AskReddit", "tifu", "dating_advice")
SENTIMENT_MODEL = "distilbert/distilbert-base-uncased-finetuned-sst-2-english"


# ------------------------------------------------------------------------------------------------ the sources

@dataclass(frozen=True)
class Source:
    """One split of one data set."""
    name: str                       # owner/name
    split: tuple                    # names it may have, the first that exists is taken
    config: str | None = None
    revision: str | None = None

    def rows(self, data=""):
        """All rows as dicts, from local copies under `data` or from the hub.  Raises Fault if neither has
        it."""
        if data:
            return self._local(Path(data))
        from datasets import get_dataset_split_names, load_dataset      # slow to import, needed only here
        try:
            found = get_dataset_split_names(self.name, self.config, revision=self.revision)
            split = next((s for s in self.split if s in found), found[0] if len(found) == 1 else None)
            require(split, f"{self.name}: none of the splits {', '.join(self.split)} in {', '.join(found)}")
            return load_dataset(self.name, self.config, split=split, revision=self.revision).to_list()
        except Fault:
            raise
        except Exception as error:      # no network, renamed, gated: datasets and the hub raise many kinds
            raise Fault(f"{self.name}: the hub does not give it ({type(error).__name__}: "
                        f"{first_line(error)}); --data DIR reads local copies from "
                        f"DIR/{self.short}/{self.split[0]}.jsonl or .parquet") from None

    @property
    def short(self):
        return self.name.split("/")[1]

    def _local(self, data):
        folders = [data / self.short / self.config] if self.config else []
        for folder in (*folders, data / self.short):
            for split in self.split:
                for ending in (".jsonl", ".jsonl.gz"):
                    if (folder / (split + ending)).is_file():
                        return read_jsonl(folder / (split + ending), {})
                # one file, or the hub's numbered parts
                parts = [*folder.glob(f"{split}.parquet"), *folder.glob(f"{split}-*.parquet")]
                if parts:
                    return self._parquet(sorted(map(str, parts)))
        raise Fault(f"{data / self.short}: no {self.split[0]}.jsonl, .jsonl.gz or .parquet; it should hold "
                    f"that split of {self.name}")

    @staticmethod
    def _parquet(parts):
        from datasets import load_dataset
        try:
            return load_dataset("parquet", data_files=parts, split="train").to_list()
        except Exception as error:
            raise Fault(f"{parts[0]}: cannot be read as parquet ({type(error).__name__})") from None


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

TASKS = {"tldr": "cnn", "tldr-length": "long", "tldr-subreddit": "subreddit", "tldr-sentiment": "sentiment",
         "alpaca": ""}              # name: its shifted split


def splits(task):
    """Names of a task's splits.  `unlabeled` has prompts for PPO."""
    if task == "alpaca":
        return ["train", "validation", "test", "ood_alpaca_eval", "ood_sequential", "unlabeled"]
    return ["train", "validation", "test", f"ood_{TASKS[task]}"]


# ------------------------------------------------------------------------------------------------ the prompts

def tldr_prompt(subreddit, title, post):
    return f"SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR:"


def article_prompt(article):
    return f"ARTICLE: {article}\nTL;DR:"


def instruction_prompt(instruction, given=""):
    """The Alpaca prompt, with and without input."""
    head = ("Below is an instruction that describes a task{}. Write a response that appropriately completes "
            "the request.")
    if given:
        head = head.format(", paired with an input that provides further context")
        return f"{head}\n\n### Instruction:\n{instruction}\n\n### Input:\n{given}\n\n### Response:"
    return f"{head.format('')}\n\n### Instruction:\n{instruction}\n\n### Response:"


def instruction_of(prompt):
    """What a prompt asks, without the frame that the functions above put around it: for judges."""
    if found := re.search(r"### Instruction:\n(.*?)(?:\n\n### Input:\n(.*))?\n\n### Response:\s*$", prompt,
                          re.S):
        return "\n\n".join(filter(None, found.groups()))
    return re.sub(r"\s*TL;DR:\s*$", "", prompt)


# --------------------------------------------------------------------------------------------------- the rows

def field(row, name, source, kind=str):
    """row[name], or a Fault that names the columns found."""
    require(isinstance(row.get(name), kind),
            f"{source.name}: column {name!r} of type {kind.__name__} is needed; "
            f"found {', '.join(f'{k} ({type(v).__name__})' for k, v in row.items())}")
    return row[name]


def instruction_row(row, source):
    """A row with an instruction, an input or none, and its answer."""
    for answer in ("output", "reference", "response"):
        if answer in row:
            break
    return {"prompt": instruction_prompt(field(row, "instruction", source), row.get("input") or ""),
            "reference": field(row, answer, source), "instruction": row["instruction"],
            "input": row.get("input") or ""}


def post_row(row, source):
    subreddit, title, post = (field(row, k, source) for k in ("subreddit", "title", "post"))
    return {"id": str(row.get("id", "")), "prompt": tldr_prompt(subreddit, title, post),
            "reference": field(row, "summary", source).strip(), "subreddit": subreddit, "post": post} | (
                {"sentiment": row["sentiment"]} if "sentiment" in row else {})


def sentiments(posts, batch=64):
    """Whether a classifier calls each post positive: list of bool.  Raises Fault where transformers is not
    installed."""
    try:
        from transformers import pipeline
    except ImportError:
        raise Fault("task tldr-sentiment needs a classifier: pip install transformers, or give rows a "
                    "boolean column `sentiment`, true where positive") from None
    classify = pipeline("sentiment-analysis", SENTIMENT_MODEL, truncation=True)
    return [out["label"] == "POSITIVE" for out in classify(posts, batch_size=batch)]


def in_distribution(task, rows):
    """Which posts lie on the training side of a graded split: list of bool.  rows: dicts with `post` and
    `subreddit`."""
    if task == "tldr-length":
        return [len(r["post"].split(" ")) <= LENGTH_LIMIT for r in rows]
    if task == "tldr-subreddit":
        return [r["subreddit"] in SUBREDDITS for r in rows]
    if task == "tldr-sentiment":
        if all(isinstance(r.get("sentiment"), bool) for r in rows):
            return [r["sentiment"] for r in rows]
        return sentiments([r["post"] for r in rows])
    return [True] * len(rows)


def rows(task, split, data=""):
    """All rows of a task's split: dicts with id, prompt, reference and metadata.  Raises Fault on a source
    that cannot be had or lacks a column."""
    if task == "alpaca":
        source = ALPACA[split]
        return [{"id": f"{split}-{i}"} | instruction_row(r, source) for i, r in enumerate(source.rows(data))]
    if split == "ood_cnn":
        return [{"id": str(r.get("id", f"{split}-{i}")), "prompt": article_prompt(field(r, "article", CNN)),
                 "reference": field(r, "highlights", CNN)} for i, r in enumerate(CNN.rows(data))]
    side = not split.startswith("ood_")
    source = TLDR[split if side else "test"]
    posts = [post_row(r, source) for r in source.rows(data)]
    return [r for r, inside in zip(posts, in_distribution(task, posts)) if inside == side]


def comparison(row, source):
    """A human comparison of two summaries of one post -> a preference row, or None for an article's (the data
    set holds both)."""
    columns = ("info", dict), ("summaries", list), ("choice", int)
    info, pair, choice = (field(row, k, source, t) for k, t in columns)
    if not info.get("post"):
        return None
    require(len(pair) == 2 and choice in (0, 1),
            f"{source.name}: two summaries and a choice of 0 or 1 are needed")
    texts = [s["text"].strip() for s in pair]
    return {"prompt": tldr_prompt(info["subreddit"], info["title"], info["post"]), "chosen": texts[choice],
            "rejected": texts[1 - choice], "post": info["post"], "subreddit": info["subreddit"]}


def preferences(task, validation=False, data=""):
    """Preference rows of a task, or None where it has none of that kind (AlpacaFarm's are one split)."""
    if task == "alpaca":
        if validation:
            return None
        out, source = [], ALPACA_PREFERENCES
        for row in source.rows(data):
            first, second, better = (field(row, k, source, t)
                                     for k, t in (("output_1", str), ("output_2", str), ("preference", int)))
            if better in (1, 2):
                chosen, rejected = (first, second) if better == 1 else (second, first)
                out.append({"prompt": instruction_prompt(field(row, "instruction", source),
                                                         row.get("input") or ""),
                            "chosen": chosen, "rejected": rejected})
        return out
    source = COMPARISONS["validation" if validation else "train"]
    out = [p for p in (comparison(r, source) for r in source.rows(data)) if p]
    return [p for p, inside in zip(out, in_distribution(task, out)) if inside]
