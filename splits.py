"""The data that stages read: tasks, their in- and out-of-distribution splits, and texts as token ids.

    python splits.py                    # the synthetic task: lengths and examples
    python splits.py --task tldr        # the paper's own tasks: tasks/paper.py
    python splits.py --data DIR         # your own: train/validation/test/ood_<name>.jsonl(.gz)

A line of a split is {"prompt", "reference"}; a line of preferences.jsonl and of preferences_validation.jsonl
is {"prompt", "chosen", "rejected"}.  Other fields are kept as metadata.  Prompts are used as they stand.  A
response is a space, the text and EOS (the paper's TL;DR format).  With --chat a prompt goes through the
model's chat template, and its response has no space.
"""
import random
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.errors import UserError
from common.files import read_jsonl
from common.flags import Common as Config
from common.flags import launch, setup, use_threads
from common.tokenizer import ends_of, load_tokenizer, same_ids
from model import GPT
from published import pretrained
from published.tokenizer import chat_template, with_chat
from tasks import paper, synthetic

NOISE = {"synthetic": "systematic", "synthetic-independent": "independent", "synthetic-mixed": "mixed"}
# tokens of a response: 48 is the paper's for summaries
MAX_NEW_TOKENS = {**dict.fromkeys(NOISE, 32), "folder": 48, **dict.fromkeys(paper.TASKS, 48),
                  "tldr-short": 40, "alpaca": 128}
MAX_PROMPT_TOKENS = 1024    # of the paper's tasks; longer prompts are cut on the left
FILES = "train.jsonl, validation.jsonl, test.jsonl, ood_<name>.jsonl"


# --------------------------------------------------------------------------------------------- texts as ids

def encode_prompts(tokenizer, prompts, limit, what="prompts"):
    """Ids of each prompt, at most `limit` of them, the last ones: a summary's cue stands at the end.  A
    published tokenizer may begin every prompt with a token of its own, or put it into a chat template; these
    stay.  Prints the cuts."""
    chat = getattr(tokenizer, "chat", None)
    begin = [] if chat or getattr(tokenizer, "bos", None) is None else [tokenizer.bos]
    ids = [tokenizer.chat_ids(text) if chat else begin + tokenizer.encode_ordinary(text) for text in prompts]
    long = [i for i, row in enumerate(ids) if len(row) > limit]
    for i in long:
        ids[i] = tokenizer.cut_chat_ids(prompts[i], limit) if chat else begin + ids[i][
            len(ids[i]) - limit + len(begin):]
    if long:
        print(f"{len(long)} of {len(ids)} {what} are longer than {limit} tokens: cut on the left", flush=True)
    return ids


def prompt_text(tokenizer, ids):
    """Ids of a prompt -> its text, without the token that begins it and without the chat template."""
    if not getattr(tokenizer, "chat", None):
        return tokenizer.decode(ids[getattr(tokenizer, "bos", None) is not None:])
    before, _, after = tokenizer.decode(tokenizer.chat_ids("\ue000")).partition("\ue000")
    return tokenizer.decode(ids).removeprefix(before).removesuffix(after)


def encode_response(tokenizer, text, limit, finished=True):
    """Ids of a response, at most `limit` of them, with EOS as the last.  A response that is cut has no EOS,
    because it did not end there.  Never empty: no text at all is EOS, finished or not."""
    if getattr(tokenizer, "chat", None):
        ids = tokenizer.encode_ordinary(text.removeprefix(" "))
    else:
        ids = tokenizer.encode_ordinary(text if text[:1].isspace() else " " + text)
    return (ids + [tokenizer.eot_token] if finished or not ids else ids)[:limit]


def encode_responses(tokenizer, groups, limit, keep_cut, what="responses"):
    """Ids of groups of texts, as lists of lists.  Those of more than `limit` tokens are left out, because
    they would teach not to end; keep_cut: they stay, cut.  Prints how many."""
    ids = [[encode_response(tokenizer, text, limit) for text in group] for group in groups]
    fit = [[response for response in group if response[-1] == tokenizer.eot_token] for group in ids]
    total, n_fit = (sum(map(len, some)) for some in (ids, fit))
    if n_fit < total:
        print(f"{total - n_fit} of {total} {what} are longer than {limit} tokens: "
              + ("cut, without an end" if keep_cut else "left out (--keep-cut learns them cut)"), flush=True)
    return ids if keep_cut else fit


def decode(tokenizer, ids):
    """Response ids -> (text, finished).  What ends a response is not part of its text."""
    finished = bool(ids) and ids[-1] in ends_of(tokenizer)
    return tokenizer.decode(ids[:-1] if finished else ids), finished


def length_bucketed_batches(lengths, batch_size, epochs, rng):
    """Random batches of rows of similar length, so that there is little padding: lists of row numbers.

    Each epoch is shuffled and cut into pools of 8 batches; each pool is sorted by length and cut into
    batches; then the batches are shuffled.  Rows that do not fill a batch are left out, unless they are the
    only one.  lengths: tokens of each row; rng: torch.Generator."""
    batches, pool_size = [], 8 * batch_size
    n_used = len(lengths) // batch_size * batch_size or len(lengths)
    for _ in range(epochs):
        order, of_epoch = torch.randperm(len(lengths), generator=rng).tolist()[:n_used], []
        for i in range(0, n_used, pool_size):
            pool = sorted(order[i:i + pool_size], key=lambda row: lengths[row])
            of_epoch += [pool[j:j + batch_size] for j in range(0, len(pool), batch_size)]
        batches += [of_epoch[i] for i in torch.randperm(len(of_epoch), generator=rng).tolist()]
    return batches


# ---------------------------------------------------------------------------------------------------- tasks

@dataclass
class Task:
    """Where rows come from.  Checkpoints carry it as a dict, so `--model ckpt_sft.pt` is enough for the next
    stage.

    Each kind of task has splits(), the names of its splits; rows(split, limit, references), up to `limit`
    rows from the split's start, dicts with id, prompt, reference and references; and preferences(validation),
    preference rows, or None where there are none."""
    name: str
    data: str
    max_new_tokens: int
    max_prompt_tokens: int      # 0: as many as the context leaves

    synthetic = None            # the module that writes a synthetic task's texts and knows their gold reward

    def max_prompt_len(self, context):
        """Tokens that a prompt may have beside a response.  Raises UserError if there are none."""
        left = context - self.max_new_tokens
        if left < 1:
            raise UserError(f"a context of {context} tokens leaves no room for a prompt beside "
                            f"{self.max_new_tokens} new ones: give a new model a larger --context, or lower "
                            "--max-new-tokens (a flag of sft.py and bon.py)")
        return min(left, self.max_prompt_tokens or left)

    def evaluation_splits(self):
        return [s for s in self.splits() if s == "test" or s.startswith("ood_")]

    def sizes(self):
        """{name: bytes} of the user's files that a run may read, by which a checkpoint knows them again."""
        return {}

    def check_data(self):
        if self.synthetic and self.data:
            raise UserError(f"--task {self.name} takes no --data: it makes its own prompts")
        if self.name == "folder" and not self.data:
            raise UserError("--task folder: --data DIR is needed")
        if self.data and not Path(self.data).is_dir():
            raise UserError(f"--data {self.data}: no such folder; it should hold {FILES}")

    def check_split(self, split):
        if split not in self.splits():
            raise UserError(f"split {split!r} is not in task {self.name!r}; it has "
                            f"{', '.join(self.splits()) or 'none'}"
                            + f"; --data {self.data} should hold {FILES}" * (self.name == "folder"))


class SyntheticTask(Task):
    synthetic = synthetic

    def splits(self):
        return list(synthetic.SPLITS)

    def rows(self, split, limit=None, references=4):
        self.check_split(split)
        size = synthetic.SIZES.get(split, 1000)
        return synthetic.rows(split, min(size, limit or size), NOISE[self.name], references)

    def preferences(self, validation=False):
        return None             # made by tasks/annotators.py


class PaperTask(Task):
    def splits(self):
        return paper.splits(self.name)

    def rows(self, split, limit=None, references=1):
        self.check_split(split)
        rows = paper.rows(self.name, split, self.data)
        return _as_rows(f"task {self.name}, {split}", split, rows, limit)

    def preferences(self, validation=False):
        rows = paper.preferences(self.name, validation, self.data)
        return rows and _non_empty(f"task {self.name}, preferences", rows, ("chosen", "rejected"))


class FolderTask(Task):
    def files(self):
        """{name of a split or of preferences: its file}."""
        paths = sorted(Path(self.data).iterdir(), reverse=True)
        if paths and all(path.suffix in (".csv", ".tsv") for path in paths):
            raise UserError(f"--data {self.data}: {paths[0].name} is no JSONL; this makes some: python -c \""
                            "from datasets import load_dataset as d; d('csv', data_files='train.csv')"
                            "['train'].to_json('train.jsonl')\"")
        return {path.name.removesuffix(".gz").removesuffix(".jsonl"): path for path in paths
                if path.name.endswith((".jsonl", ".jsonl.gz")) and path.is_file()}

    def sizes(self):
        names = (*self.splits(), "unlabeled", "preferences", "preferences_validation")
        return {name: path.stat().st_size for name, path in self.files().items() if name in names}

    def splits(self):
        names = self.files()
        return [s for s in ("train", "validation", "test") if s in names] + sorted(
            s for s in names if s.startswith("ood_"))

    def rows(self, split, limit=None, references=1):
        self.check_split(split)
        path = self.files()[split]
        return _as_rows(path, split, _read(path, ("prompt", "reference")), limit)

    def preferences(self, validation=False):
        path = self.files().get("preferences_validation" if validation else "preferences")
        needs = ("prompt", "chosen", "rejected")
        return path and _non_empty(path, _read(path, needs), needs)


def synthetic_task(name):
    """The module of a synthetic task, with gold_reward, facts and gold_diversity; None of any other."""
    return synthetic if name in NOISE else None


def print_folder(task):
    """Prints what a folder of data lacks, which of its files are not read, and how many prompts of its other
    splits stand in train too."""
    if task.name != "folder":
        return
    unread = [path.name for name, path in task.files().items() if name not in task.sizes()]
    if unread:
        print(f"{task.data}: {', '.join(unread)} not read; splits are {FILES}", flush=True)
    if "test" not in task.splits():
        print(f"{task.data}: no test.jsonl, so nothing in distribution will be measured", flush=True)
    train = {row["prompt"] for row in task.rows("train")}
    for split in task.splits():
        rows = task.rows(split)
        known = sum(row["prompt"] in train for row in rows)
        if known and split != "train":
            print(f"{task.data}: {known} of {len(rows)} prompts of {split} stand in train too: a policy has "
                  "learned them", flush=True)


def _read(path, needs):
    """Rows with these fields.  Raises UserError, which names what converts other people's files."""
    try:
        return read_jsonl(path, dict.fromkeys(needs, str))
    except UserError as error:
        if ": field " not in str(error):
            raise
        raise UserError(f"{error}; `python -m tools.convert {path} --export FILE.jsonl` makes these fields "
                        "of message lists, of completions and of texts that hold their prompt (HH-RLHF)"
                        ) from None


def _as_rows(source, split, rows, limit):
    """`limit` rows with text, ids that name one row each, and `references`.  source: for messages."""
    needs = ("prompt",) if split == "unlabeled" else ("prompt", "reference")    # PPO needs no answers
    rows = _non_empty(source, rows, needs)
    numbers = [f"{split}-{i}" for i in range(len(rows))]
    ids = [number if row.get("id") is None else str(row["id"]) for row, number in zip(rows, numbers)]
    if len(set(ids)) < len(ids):        # policies are compared by id
        print(f"{source}: several rows have one id; they are numbered instead", flush=True)
        ids = numbers
    rows = [row | {"id": name, "references": [row["reference"]]} for row, name in zip(rows, ids)]
    return draw(rows, limit, source)


def draw(rows, n, what):
    """n of the rows (0 or None: all), in their order, because files are often sorted.  The same for everyone
    who asks for as many of as many.  Prints how many."""
    if not n or n >= len(rows):
        return rows
    print(f"{what}: {n} of {len(rows)}, drawn with seed 0", flush=True)
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), n))]


def _non_empty(source, rows, needs):
    """Rows with text in all fields.  Prints how many have none."""
    full = [row for row in rows if all(row[field].strip() for field in needs)]
    if len(full) < len(rows):
        print(f"{source}: {len(rows) - len(full)} of {len(rows)} rows dropped: {' or '.join(needs)} is empty",
              flush=True)
    if not full:
        raise UserError(f"{source}: no rows; a line is {{{', '.join(f'{field!r}: ...' for field in needs)}}}")
    return full


KINDS = {**dict.fromkeys(NOISE, SyntheticTask), **dict.fromkeys(paper.TASKS, PaperTask), "folder": FolderTask}


def task_from(saved):
    """The task of a checkpoint's dict.  Raises UserError on fields that are not a task's."""
    right = {field.name: field.type for field in fields(Task)}
    if {name: type(value) for name, value in saved.items()} != right or saved["name"] not in KINDS:
        raise UserError("the checkpoint's task is damaged, or of another version of this code; train it anew")
    return KINDS[saved["name"]](**saved)


def task_of(cfg, saved=None):
    """The task that flags and checkpoint (its dict, or None) name together: flags win.  Raises UserError on
    an unknown one, and on one whose data are not there."""
    task = task_from(saved["task"]) if saved and saved["task"] else SyntheticTask("synthetic", "", 32, 0)
    name = cfg.task or ("folder" if cfg.data else task.name)
    if name not in KINDS:
        raise UserError(f"--task {name}: choose from {', '.join(KINDS)}")
    if task.name != name:
        task = KINDS[name](name, "", MAX_NEW_TOKENS[name], MAX_PROMPT_TOKENS if name in paper.TASKS else 0)
    given = {field: getattr(cfg, field, 0) for field in ("max_new_tokens", "max_prompt_tokens")}
    given["data"] = cfg.data and str(Path(cfg.data).resolve())      # the next stage may run in another folder
    task = replace(task, **{field: value for field, value in given.items() if value})
    task.check_data()
    return task


class Bundle(NamedTuple):
    """What every stage after the first starts from."""
    model: GPT
    tokenizer: object
    task: Task
    saved: dict         # the checkpoint without its weights; `tokenizer` is a specification here


def load_bundle(cfg, device):
    """The Bundle of the language model cfg.model.  Raises UserError as `pretrained.load` and `task_of` do."""
    model, saved = pretrained.load(cfg.model, "--model", device, cfg.dtype)
    if getattr(cfg, "chat", False):
        saved["tokenizer"] = with_chat(saved["tokenizer"], cfg.model)
    use_threads(cfg, model)
    task, sizes = task_of(cfg, saved), saved["args"].get("data_sizes", {})
    other = [name for name, size in sizes.items() if task.sizes().get(name) != size]
    if other and not cfg.data:          # given anew, it is meant
        print(f"{task.data} has changed since {cfg.model} was trained: {', '.join(other)}", flush=True)
    return Bundle(model, load_tokenizer(saved["tokenizer"]), task, saved)


def load_reward_model(cfg, bundle, device):
    """(the reward model --reward, hash of its weights).  bundle: the policy's.  A published one reads texts:
    its `reread` turns the policy's ids, prompts and responses as in `reward.score`, into its own.  Raises
    UserError if a checkpoint cannot read what the policy writes."""
    model, saved = pretrained.load(cfg.reward, "--reward", device, cfg.dtype, "reward")
    tokenizer, policy = bundle.tokenizer, bundle.model.config
    if saved["task"] is None:
        how = reading_of(model, saved)
        model.reread = lambda prompts, responses: text_ids(
            model, [prompt_text(tokenizer, ids) for ids in prompts],
            [[decode(tokenizer, ids) for ids in group] for group in responses], *how)
        print(f"--reward {cfg.reward}: a published model.  It reads prompt and response as text, in its chat "
              "template if it has one; --kl-coef and --no-eos-score are in the unit of its scores, whose "
              "spread bon.py's samples show", flush=True)
    elif not same_ids(saved["tokenizer"], bundle.saved["tokenizer"]):
        raise UserError(f"--reward {cfg.reward} and --model {cfg.model} have different tokenizers; train the "
                        "reward model from this policy's family (python reward.py --model ...)")
    elif model.config.context < policy.context:
        raise UserError(f"--reward {cfg.reward}: its context of {model.config.context} is shorter than the "
                        f"policy's {policy.context}")
    return model, saved["weights_hash"]


def reading_of(model, saved):
    """How a reward model reads texts: (its tokenizer, the task with the lengths it reads, and of a published
    one how it turns a response into ids, else None).  saved: its checkpoint's dict.  Of a published one's
    context a quarter is for the response.  With a chat template it reads a user's message and an answer.
    transformers reads the score at the last token that is not padding: a model that pads with its end of
    sequence has never been asked there, and reads its texts without an end."""
    spec = saved["tokenizer"]
    if saved["task"] is not None:
        return load_tokenizer(spec), task_from(saved["task"]), None
    tokenizer = load_tokenizer(with_chat(spec, "") if chat_template(spec) else spec)
    reads_end = spec["kept"]["config.json"].get("pad_token_id") != spec["eos"]
    limit = model.config.context // 4

    def encode(text, finished):
        if tokenizer.chat:
            return tokenizer.answer_ids(text, finished)[:limit]
        return encode_response(tokenizer, text, limit, finished and reads_end)
    return tokenizer, FolderTask("folder", "", limit, 0), encode


def text_ids(model, prompts, outputs, tokenizer, task, encode=None):
    """Texts -> (prompts, responses) for `reward.score`.  outputs: for each prompt (text, finished) pairs;
    tokenizer, task, encode: as of `reading_of`.
    Texts longer than those that the reward model was trained on are cut."""
    encode = encode or partial(encode_response, tokenizer, limit=task.max_new_tokens)
    responses = [[encode(text, finished=finished) for text, finished in group] for group in outputs]
    return encode_prompts(tokenizer, prompts, task.max_prompt_len(model.config.context)), responses


# ------------------------------------------------------------------------------------------------- the script

def main(cfg):
    setup(cfg)
    task = task_of(cfg)
    if not task.splits():
        raise UserError(f"--data {task.data}: no splits; it should hold {FILES}")
    for split in task.splits():
        rows = task.rows(split, 1000)
        prompt, reference = (np.median([len(row[field].split()) for row in rows])
                             for field in ("prompt", "reference"))
        print(f"\n--- {split}: {prompt:.0f} words a prompt, {reference:.0f} a reference (medians of "
              f"{len(rows)} rows)\n{rows[0]['prompt'][-600:]}\n  reference: {rows[0]['reference'][:300]}")


if __name__ == "__main__":
    launch(main, Config, __doc__)
