"""The data that stages read: tasks, their in- and out-of-distribution splits, and texts as token ids.

    python splits.py                                 # the synthetic task: rows, lengths, examples
    python splits.py --task tldr                     # the paper's own tasks: tasks/paper.py
    python splits.py --data DIR                      # your own: train/validation/test/ood_<name>.jsonl(.gz)

A line of a split is {"prompt", "reference"}; a line of preferences.jsonl and of preferences_validation.jsonl
is {"prompt", "chosen", "rejected"}.  Other fields are kept as metadata.  Prompts are used as they stand.  A
response is a space, the text and EOS (the paper's TL;DR format).  `python -m study.shift` measures how far
each split lies from train.
"""
import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError, check
from common.files import read_jsonl
from common.flags import Common, Count, launch, setup
from common.tokenizer import build_tokenizer, load_tokenizer
from tasks import instructions, paper, synthetic

SYNTHETIC = {  # task: (the module that writes its texts and knows their gold reward, noise of its references)
    "synthetic": (synthetic, "systematic"), "synthetic-independent": (synthetic, "independent"),
    "synthetic-mixed": (synthetic, "mixed"),
    "instruct": (instructions, "usual")}
# tokens of a response: 48 is the paper's for summaries
MAX_NEW_TOKENS = {**dict.fromkeys(SYNTHETIC, 32), "instruct": 48, "folder": 48,
                  **dict.fromkeys(paper.TASKS, 48), "alpaca": 128}
MAX_PROMPT_TOKENS = 1024    # of the paper's tasks; longer prompts are cut on the left
FILES = "train.jsonl, validation.jsonl, test.jsonl, ood_<name>.jsonl"


# ----------------------------------------------------------------------------------------------- texts as ids

def encode_prompts(tokenizer, prompts, limit, what="prompts"):
    """Ids of each prompt, at most `limit` of them, the last ones: a summary's cue stands at the end.  A
    published tokenizer may begin every prompt with a token of its own, which stays.  Prints how many prompts
    were cut."""
    begin = [] if getattr(tokenizer, "bos", None) is None else [tokenizer.bos]
    ids, left = [tokenizer.encode_ordinary(prompt) for prompt in prompts], limit - len(begin)
    check(left > 0, f"{what} may have {limit} tokens, and the tokenizer begins each with one of its own: no "
          "room is left; raise --max-prompt-tokens or lower --max-new-tokens (flags of sft.py)")
    for prompt, row in zip(prompts, ids):
        check(begin + row, f"{what}: the tokenizer has no tokens for {prompt[:40]!r}")
    cut = sum(len(row) > left for row in ids)
    if cut:
        print(f"{cut} of {len(ids)} {what} are longer than {limit} tokens: cut on the left", flush=True)
    return [begin + row[-left:] for row in ids]


def encode_response(tokenizer, text, limit, finished=True):
    """Ids of a response, at most `limit` of them, with EOS as the last.  A response that is cut has no EOS,
    because it did not end there.  Never empty: no text at all is EOS, finished or not."""
    ids = tokenizer.encode_ordinary(text if text[:1].isspace() else " " + text)
    return (ids + [tokenizer.eot_token] if finished or not ids else ids)[:limit]


def encode_responses(tokenizer, groups, limit, what="responses"):
    """Ids of groups of texts, as lists of lists.  Prints how many texts were cut at `limit` tokens."""
    ids = [[encode_response(tokenizer, text, limit) for text in group] for group in groups]
    cut = sum(response[-1] != tokenizer.eot_token for group in ids for response in group)
    if cut:
        print(f"{cut} of {sum(map(len, ids))} {what} are longer than {limit} tokens: cut, and then without "
              "an end", flush=True)
    return ids


def decode(tokenizer, ids):
    """Response ids -> (text, finished).  EOS ends a response and is not part of its text."""
    finished = bool(ids) and ids[-1] == tokenizer.eot_token
    return tokenizer.decode(ids[:-1] if finished else ids), finished


def length_bucketed_batches(lengths, batch_size, epochs, rng):
    """Random batches of rows of similar length, so that there is little padding: lists of row numbers.

    Each epoch is shuffled and cut into pools of 8 batches; each pool is sorted by length and cut into
    batches; then the batches are shuffled.  lengths: tokens of each row; rng: torch.Generator."""
    batches, pool_size = [], 8 * batch_size
    for _ in range(epochs):
        order, of_epoch = torch.randperm(len(lengths), generator=rng).tolist(), []
        for i in range(0, len(order), pool_size):
            pool = sorted(order[i:i + pool_size], key=lambda row: lengths[row])
            of_epoch += [pool[j:j + batch_size] for j in range(0, len(pool), batch_size)]
        batches += [of_epoch[i] for i in torch.randperm(len(of_epoch), generator=rng).tolist()]
    return batches


# ------------------------------------------------------------------------------------------------------ tasks

def synthetic_task(name):
    """The module of a synthetic task, with rows, gold_reward, facts and gold_diversity; None of any other
    task."""
    return SYNTHETIC.get(name, (None,))[0]


@dataclass
class Task:
    """Where rows come from.  Checkpoints carry it as a dict, so `--model ckpt_sft.pt` is enough for the next
    stage."""
    name: str = "synthetic"
    data: str = ""
    max_new_tokens: int = 32
    max_prompt_tokens: int = 0  # 0: as many as the context leaves

    @property
    def synthetic(self):
        return synthetic_task(self.name)

    def max_prompt_len(self, context):
        """Tokens that a prompt may have beside a response.  Raises UserError if there are none."""
        left = context - self.max_new_tokens
        check(left > 0, f"a context of {context} tokens leaves no room for a prompt beside "
              f"{self.max_new_tokens} new ones: " + (
                  "give a new model a larger --context" if context <= MAX_NEW_TOKENS[self.name]
                  else "lower --max-new-tokens (a flag of sft.py and bon.py)"))
        return min(left, self.max_prompt_tokens or left)

    def splits(self):
        """Names of the splits: train, validation, test, ood_*.  A synthetic task has `pretrain` too."""
        if self.synthetic:
            return list(self.synthetic.SPLITS)
        if self.name in paper.TASKS:
            return paper.splits(self.name)
        found = {p.name.removesuffix(".gz").removesuffix(".jsonl") for p in Path(self.data).iterdir()
                 if p.name.endswith((".jsonl", ".jsonl.gz")) and p.is_file()}
        return [s for s in ("train", "validation", "test") if s in found] + sorted(
            s for s in found if s.startswith("ood_"))

    def evaluation_splits(self):
        return [s for s in self.splits() if s == "test" or s.startswith("ood_")]

    def rows(self, split, limit=None, references=4):
        """Up to `limit` rows of a split, from its start: dicts with id, prompt, reference and references.
        Raises UserError on an unknown, missing, empty or damaged split."""
        check(split in self.splits(), f"split {split!r} is not in task {self.name!r}; it has "
              f"{', '.join(self.splits())}" if self.name != "folder" else
              f"--data {self.data}: {split}.jsonl is missing; wanted are {FILES}; {self.found()}")
        if self.synthetic:
            size, noise = self.synthetic.SIZES.get(split, 1000), SYNTHETIC[self.name][1]
            return self.synthetic.rows(split, min(size, limit or size), noise, references)
        if self.name in paper.TASKS:
            source, rows = f"task {self.name}, {split}", paper.rows(self.name, split, self.data)
        else:
            source = self._file(split)
            rows = _read(source, ("prompt", "reference"))
        # prompts for PPO need no answers
        rows = _non_empty(source, rows, ("prompt",) if split == "unlabeled" else ("prompt", "reference"))
        _make_ids_unique(source, split, rows)
        return [row | {"references": [row["reference"]]} for row in rows[:limit]]

    def preferences(self, validation=False):
        """Preference rows, or None where there are none (a synthetic task's are made in reward.py)."""
        needs = ("prompt", "chosen", "rejected")
        if self.name in paper.TASKS:
            rows = paper.preferences(self.name, validation, self.data)
            return rows and _non_empty(f"task {self.name}, preferences", rows, needs[1:])
        name = "preferences_validation" if validation else "preferences"
        path = None if self.synthetic else self._file(name)
        return path and _non_empty(path, _read(path, needs), needs)

    def _file(self, name):
        """The file of a split or of preferences, or None.  Raises UserError if there are two of them."""
        paths = [Path(self.data) / (name + ending) for ending in (".jsonl", ".jsonl.gz")]
        paths = [path for path in paths if path.is_file()]
        check(len(paths) < 2, f"--data {self.data}: both {name}.jsonl and {name}.jsonl.gz are there; remove "
              "the one that is not to be read")
        return paths[0] if paths else None

    def found(self):
        """What the folder holds, in words, for messages."""
        names = sorted(p.name for p in Path(self.data).iterdir())
        if not names:
            return "the folder is empty"
        return f"there are {', '.join(names[:8])}{', ...' * (len(names) > 8)}"


def print_overlap(task):
    """Prints how many prompts of other splits of a folder stand in train too, where a policy has learned
    them."""
    if task.name != "folder":
        return
    train = {row["prompt"] for row in _read(task._file("train"), ("prompt", "reference"))}
    for split in task.splits():
        if split != "train":
            rows = _read(task._file(split), ("prompt", "reference"))
            known = sum(row["prompt"] in train for row in rows)
            if known:
                print(f"{task.data}: {known} of {len(rows)} prompts of {split} stand in train too: a policy "
                      "has learned them", flush=True)


def _read(path, fields):
    """Rows with these fields.  Raises UserError, which names what converts other people's files."""
    try:
        return read_jsonl(path, dict.fromkeys(fields, str))
    except UserError as error:
        hint = (f"; `python -m tools.convert {path} --export FILE.jsonl` makes these fields of message "
                "lists, of completions and of texts that hold their prompt (HH-RLHF)")
        raise UserError(f"{error}{hint if ': field ' in str(error) else ''}") from None


def _non_empty(source, rows, fields):
    """Rows with text in all fields.  Prints how many have none.  source: names the rows in messages."""
    full = [row for row in rows if all(row[f].strip() for f in fields)]
    if len(full) < len(rows):
        print(f"{source}: {len(rows) - len(full)} of {len(rows)} rows dropped, one of {', '.join(fields)} is "
              "empty", flush=True)
    check(full, f"{source}: no rows; a line is {{{', '.join(f'{f!r}: ...' for f in fields)}}}")
    return full


def _make_ids_unique(source, split, rows):
    """Gives every row an id that names it alone, because policies are compared by id."""
    names = [f"{split}-{i}" if row.get("id") is None else str(row["id"]) for i, row in enumerate(rows)]
    taken, times, repeated = set(names), Counter(), 0
    for row, name in zip(rows, names):
        times[name] += 1
        row["id"] = name
        while times[name] > 1 and row["id"] in taken:       # a file may have both a#2 and a second a
            row["id"] = f"{name}#{times[name]}"
            times[name] += row["id"] in taken
        repeated += row["id"] != name
        taken.add(row["id"])
    if repeated:
        print(f"{source}: {repeated} rows have an id that an earlier row has; they are now ID#2, ID#3, ...",
              flush=True)


def _task_in(saved):
    """The Task of a checkpoint's dict.  Raises UserError on fields that are not a Task's."""
    try:
        task = Task(**saved["task"])
    except TypeError as error:
        raise UserError(f"the checkpoint's task is of another version of this code ({error}); train it "
                        "anew") from None
    wrong = [field.name for field in dataclasses.fields(Task)
             if type(getattr(task, field.name)) is not type(field.default)]
    check(not wrong, f"the checkpoint's task is damaged: {', '.join(wrong)}; train it anew")
    return task


def task_of(cfg, saved=None):
    """The task that flags and checkpoint (its dict, or None) name together: flags win.  Raises UserError on
    an unknown one, and on one whose data are not there."""
    base = _task_in(saved) if saved and saved["task"] else None
    name = cfg.task or ("folder" if cfg.data else (base or Task()).name)
    check(name in MAX_NEW_TOKENS, f"--task {name}: choose from {', '.join(MAX_NEW_TOKENS)}")
    if base is None or name != base.name:
        base = Task(name, "", MAX_NEW_TOKENS[name], MAX_PROMPT_TOKENS if name in paper.TASKS else 0)
    data = cfg.data or base.data
    check(name != "folder" or data, "--task folder: --data DIR is needed")
    check(not data or Path(data).is_dir(), f"--data {data}: no such folder; it should hold {FILES}")
    check(name not in SYNTHETIC or not cfg.data, f"--task {name} takes no --data: it makes its own prompts")
    return Task(name, str(data), getattr(cfg, "max_new_tokens", 0) or base.max_new_tokens,
                getattr(cfg, "max_prompt_tokens", 0) or base.max_prompt_tokens)


# ------------------------------------------------------------------------------------------------- the script

@dataclass
class Config(Common):
    rows: Count = 500           # rows of each split whose lengths are counted


def read_splits(task, limit):
    """{split: its first `limit` rows} of every split.  Raises UserError where there are none."""
    check(task.splits(), f"--data {task.data}: no splits; it should hold {FILES}; {task.found()}")
    return {split: task.rows(split, limit) for split in task.splits()}


def tokenizer_of(rows):
    """A word tokenizer built from rows of train."""
    texts = [text for row in rows for text in (row["prompt"], *row["references"])]
    return load_tokenizer(build_tokenizer(texts))


def main(cfg):
    setup(cfg)
    task = task_of(cfg)
    rows_of = read_splits(task, cfg.rows)
    tokenizer = tokenizer_of(task.rows("train", 2 * cfg.rows))
    print(f"task {task.name}{' ' + task.data if task.data else ''}, vocabulary {tokenizer.n_vocab}\n")
    print(f"{'split':19} {'rows':>6} {'prompt tokens':>14} {'reference':>10}")
    for split, rows in rows_of.items():
        n = len(rows) if len(rows) < cfg.rows else len(task.rows(split, references=1))
        prompt, reference = (np.median([len(tokenizer.encode_ordinary(row[field])) for row in rows])
                             for field in ("prompt", "reference"))
        print(f"{split:19} {n:6} {prompt:14.0f} {reference:10.0f}")
    for split, rows in rows_of.items():
        print(f"\n--- {split}\n{rows[0]['prompt'][-600:]}\n  reference: {rows[0]['reference'][:300]}")


if __name__ == "__main__":
    launch(main, Config, __doc__)
