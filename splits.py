"""The data: tasks, tokenizers, in- and out-of-distribution splits, and how far each split lies from train.

    python splits.py                                 # the embedded task
    python splits.py --task tldr                     # the paper's own tasks: paper.py
    python splits.py --data DIR                      # your own: train/validation/test/ood_<name>.jsonl(.gz)

A line of a split is {"prompt", "reference"}; of preferences.jsonl and preferences_validation.jsonl {"prompt",
"chosen", "rejected"}.  Other fields are kept as metadata.  Prompts are used as they stand; a response is a
space and the text, then EOS (the paper's TL;DR format).

Deviation from the paper: the shift between splits is a number here (Jensen-Shannon divergence of token
distributions, and how well a classifier tells the two apart), each beside its floor: the same measure between
two halves of train.
"""
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex            # comes with tiktoken, which uses the same engine
import tiktoken
import torch
import torch.nn.functional as F

import paper
import synthetic
from pretrained import PIECES, encoding
from runtime import Common, Fault, read_jsonl, require, run

# task name: noise of its references
WORLDS = {"world": "systematic", "world-independent": "independent", "world-mixed": "mixed"}
# tokens of a response: 48 is the paper's for summaries
MAX_NEW_TOKENS = {**dict.fromkeys(WORLDS, 32), "folder": 48, **dict.fromkeys(paper.TASKS, 48), "alpaca": 128}
MAX_PROMPT_TOKENS = 1024    # of the paper's tasks; longer prompts are cut on the left


# ------------------------------------------------------------------------------------------------- tokenizers

def build_tokenizer(texts, n_words=4096):
    """A tokenizer for models from scratch: all bytes, so every text can be written, and the texts' frequent
    pieces as single tokens.

    Returns the specification that `tokenizer` reads and checkpoints carry: plain strings, sorted, so equal
    texts give equal ids."""
    count = Counter(piece for text in texts for piece in regex.findall(PIECES, text)
                    if len(piece.encode()) > 1)
    words = sorted(word for word, _ in sorted(count.items(), key=lambda kv: (-kv[1], kv[0]))[:n_words])
    return {"kind": "words", "pattern": PIECES, "words": words}


def tokenizer(spec):
    """A specification -> tiktoken.Encoding.  tiktoken looks a whole piece up before it merges, so a rank is
    all a word needs.

    Raises Fault if tiktoken cannot provide a named encoding (its files are downloaded at first use)."""
    if spec["kind"] == "words":
        ranks = {bytes([i]): i for i in range(256)} | {w.encode(): 256 + i for i,
                                                       w in enumerate(spec["words"])}
        return tiktoken.Encoding("words", pat_str=spec["pattern"], mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": len(ranks)})
    if spec["kind"] == "bpe":
        return encoding(spec)
    try:
        return tiktoken.get_encoding(spec["name"])
    except Exception as error:      # unknown name, or no network: tiktoken and requests raise many kinds
        raise Fault(f"tokenizer {spec['name']!r}: tiktoken cannot provide it ({type(error).__name__}); with "
                    "no network, set TIKTOKEN_CACHE_DIR to a folder with its files, or use --tokenizer "
                    "words") from None


def encode_response(enc, text, limit, finished=True):
    """Ids of a response, EOS last; cut at `limit` ids, and then without EOS, for it did not end there.  Never
    empty: no text at all is EOS, finished or not."""
    ids = enc.encode_ordinary(text if text[:1].isspace() else " " + text)
    return (ids + [enc.eot_token] if finished or not ids else ids)[:limit]


def encode_responses(enc, groups, limit, what="responses"):
    """Ids of groups of texts, as lists of lists.  Says how many were cut at `limit`."""
    ids = [[encode_response(enc, text, limit) for text in group] for group in groups]
    cut, total = sum(r[-1] != enc.eot_token for group in ids for r in group), sum(map(len, ids))
    if cut:
        print(f"{cut} of {total} {what} are longer than {limit} tokens: cut, and then without an end",
              flush=True)
    return ids


def encode_prompts(enc, prompts, limit, what="prompts"):
    """Ids of each prompt, the last `limit` of them: a summary's cue stands at the end.  A published tokenizer
    may begin every prompt with a token of its own, which stays.  Says how many were cut."""
    begin = [] if getattr(enc, "bos", None) is None else [enc.bos]
    ids, room = [enc.encode_ordinary(p) for p in prompts], limit - len(begin)
    cut = sum(len(i) > room for i in ids)
    if cut:
        print(f"{cut} of {len(ids)} {what} are longer than {limit} tokens: cut on the left", flush=True)
    return [begin + i[-room:] for i in ids]


def batches(lengths, size, epochs, generator):
    """Random batches of rows of similar length, for little padding: each epoch is shuffled, cut into pools of
    8 batches, each pool sorted by length and cut, and the batches shuffled again.  lengths: tokens of each
    row.  Returns lists of row numbers."""
    out = []
    for _ in range(epochs):
        order, part = torch.randperm(len(lengths), generator=generator).tolist(), []
        for i in range(0, len(order), 8 * size):
            pool = sorted(order[i:i + 8 * size], key=lambda j: lengths[j])
            part += [pool[j:j + size] for j in range(0, len(pool), size)]
        out += [part[i] for i in torch.randperm(len(part), generator=generator).tolist()]
    return out


def decode(enc, ids):
    """Response ids -> (text, finished).  EOS ends a response and is not part of its text."""
    finished = bool(ids) and ids[-1] == enc.eot_token
    return enc.decode(ids[:-1] if finished else ids), finished


# ------------------------------------------------------------------------------------------------------ tasks

@dataclass
class Task:
    """Where rows come from.  Checkpoints carry it as a dict, so `--model ckpt_sft.pt` is enough for the next
    stage."""
    name: str = "world"
    data: str = ""
    max_new_tokens: int = 32
    max_prompt_tokens: int = 0  # 0: as many as the context leaves

    @property
    def noise(self):
        return WORLDS.get(self.name)

    def room(self, context):
        """Tokens a prompt may have beside a response.  Raises Fault if there are none."""
        left = context - self.max_new_tokens
        require(left > 0,
                f"a context of {context} leaves no room for a prompt beside {self.max_new_tokens} new "
                "tokens; lower --max-new-tokens")
        return min(left, self.max_prompt_tokens or left)

    def splits(self):
        """Names of the splits: train, validation, test, ood_*."""
        if self.noise:
            return list(synthetic.SPLITS)
        if self.name in paper.TASKS:
            return paper.splits(self.name)
        found = {p.name.removesuffix(".gz").removesuffix(".jsonl") for p in Path(self.data).glob("*.jsonl*")}
        shifted = sorted(s for s in found if s.startswith("ood_"))
        return [s for s in ("train", "validation", "test") if s in found] + shifted

    def evaluation_splits(self):
        return [s for s in self.splits() if s == "test" or s.startswith("ood_")]

    def _file(self, name):
        for ending in (".jsonl", ".jsonl.gz"):
            if (path := Path(self.data) / (name + ending)).is_file():
                return path

    def rows(self, split, limit=None, references=4):
        """Up to `limit` rows of a split, from its start.  Raises Fault on an unknown, missing, empty or
        damaged one."""
        require(split in self.splits(),
                f"split {split!r} is not in task {self.name!r}{' at ' + self.data if self.data else ''}; it "
                f"has {', '.join(self.splits()) or 'none'}")
        if self.noise:
            whole = synthetic.SIZES.get(split, 1000)
            return synthetic.rows(split, min(whole, limit or whole), self.noise, references)
        if self.name in paper.TASKS:
            path, rows = f"task {self.name}, {split}", paper.rows(self.name, split, self.data)
        else:
            path = self._file(split)
            rows = read_jsonl(path, {"prompt": str, "reference": str})
        rows = _non_empty(path, rows, ("prompt", "reference"))
        seen, twice = Counter(), 0
        for i, row in enumerate(rows):
            name = str(row.get("id", f"{split}-{i}"))
            seen[name] += 1
            twice += seen[name] > 1     # policies are compared by id: it must name one row
            row["id"] = name if seen[name] == 1 else f"{name}#{seen[name]}"
            row["references"] = [row["reference"]]
        if twice:
            print(f"{path}: {twice} rows have an id that an earlier row has; they are now ID#2, ID#3, ...",
                  flush=True)
        return rows[:limit]

    def preferences(self, validation=False):
        """Preference rows, or None where there are none (the embedded task makes its own in reward.py)."""
        if self.name in paper.TASKS:
            rows = paper.preferences(self.name, validation, self.data)
            return rows and _non_empty(f"task {self.name}, preferences", rows, ("chosen", "rejected"))
        path = None if self.noise else self._file("preferences_validation" if validation else "preferences")
        if path is None:
            return None
        needs = ("prompt", "chosen", "rejected")
        return _non_empty(path, read_jsonl(path, dict.fromkeys(needs, str)), needs)


def _non_empty(path, rows, fields):
    full = [row for row in rows if all(row[f].strip() for f in fields)]
    if len(full) < len(rows):
        print(f"{path}: {len(rows) - len(full)} of {len(rows)} rows dropped, one of {', '.join(fields)} is "
              "empty", flush=True)
    require(full, f"{path}: no rows; a line is {{{', '.join(f'{f!r}: ...' for f in fields)}}}")
    return full


def task_of(cfg, saved=None):
    """The task that flags and checkpoint (its dict, or None) name together: flags win.  Raises Fault on an
    unknown one."""
    base = Task(**saved["task"]) if saved and saved["task"] else Task()
    name = cfg.task or ("folder" if cfg.data else base.name)
    require(name in MAX_NEW_TOKENS, f"--task {name}: choose from {', '.join(MAX_NEW_TOKENS)}")
    same = bool(saved and saved["task"]) and name == base.name
    data = cfg.data or (base.data if same else "")
    require(name != "folder" or data, "--task folder: --data DIR is needed")
    require(not data or Path(data).is_dir(),
            f"--data {data}: no such folder; it should hold train.jsonl, validation.jsonl, test.jsonl, "
            "ood_<name>.jsonl")
    require(name not in WORLDS or not cfg.data,
            f"--task {name} takes no --data: its posts are made by synthetic.py")
    new, prompt = (base.max_new_tokens, base.max_prompt_tokens) if same else (
        MAX_NEW_TOKENS[name], MAX_PROMPT_TOKENS if name in paper.TASKS else 0)
    return Task(name, str(data), getattr(cfg, "max_new_tokens", 0) or new,
                getattr(cfg, "max_prompt_tokens", 0) or prompt)


# ------------------------------------------------------------------------------------------------------ shift

def js_divergence(a, b):
    """Jensen-Shannon divergence of two count vectors (V,), in bits: 0 for equal distributions, 1 for disjoint
    ones (Lin 1991)."""
    p, q = a / a.sum(), b / b.sum()
    m = (p + q) / 2
    kl = lambda x: np.sum(x[x > 0] * np.log2(x[x > 0] / m[x > 0]))  # noqa: E731
    return float(kl(p) + kl(q)) / 2


def classifier_auc(a, b, ridge=1e-2, steps=200):
    """How well a linear classifier tells two samples apart: held-out area under the ROC curve, 0.5 not at
    all, 1 always.

    a, b: (n, V) token counts of each text.  Logistic regression on log counts, trained on the even rows,
    tested on the odd ones."""
    x = torch.tensor(np.log1p(np.concatenate((a, b))), dtype=torch.float32)
    y = torch.cat((torch.zeros(len(a)), torch.ones(len(b))))
    train = torch.arange(len(x)) % 2 == 0
    w, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.LBFGS((w, bias), max_iter=steps, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        out = F.binary_cross_entropy_with_logits(x[train] @ w + bias, y[train]) + ridge * w.square().sum()
        out.backward()
        return out
    optimiser.step(loss)
    score, label = (x[~train] @ w).detach().numpy(), y[~train].numpy()
    # Mann-Whitney: P(a positive scores above a negative), ties halved
    difference = score[label == 1][:, None] - score[label == 0]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def shift(texts, others, enc):
    """How far `others` lie from `texts`, and the floor: the same between two halves of `texts`.

    Returns {"js", "js_floor", "auc", "auc_floor"}: Jensen-Shannon divergence in bits, classifier AUC.  Both
    samples are cut to one size, a half of `texts`, for either measure grows as samples shrink.  Raises
    ValueError on fewer than 8 texts on a side."""
    n = min(len(texts) // 2, len(others))
    if n < 4 or len(others) < 8:
        raise ValueError(f"shift: at least 8 texts a side are needed, got {len(texts)} and {len(others)}")
    count = lambda sample: np.stack([np.bincount(enc.encode_ordinary(t), minlength=enc.n_vocab)
                                     for t in sample])  # noqa: E731
    first, second, third = count(texts[:n]), count(texts[n:2 * n]), count(others[:n])
    used = (first + second + third).sum(0) > 0
    first, second, third = first[:, used], second[:, used], third[:, used]
    return {"js": js_divergence(first.sum(0), third.sum(0)),
            "js_floor": js_divergence(first.sum(0), second.sum(0)),
            "auc": classifier_auc(first, third), "auc_floor": classifier_auc(first, second)}


@dataclass
class Config(Common):
    rows: int = 500             # rows of each split looked at


def main(cfg):
    task = task_of(cfg)
    require(cfg.rows >= 16, f"--rows {cfg.rows}: at least 16, for the shift compares halves")
    require(task.splits(),
            f"--data {task.data}: no splits; it should hold train.jsonl, validation.jsonl, test.jsonl, "
            "ood_<name>.jsonl")
    train = task.rows("train", 2 * cfg.rows)
    enc = tokenizer(build_tokenizer([t for r in train for t in (r["prompt"], *r["references"])]))
    print(f"task {task.name}{' ' + task.data if task.data else ''}, vocabulary {enc.n_vocab}\n\n{'split':18} "
          f"{'rows':>6} {'prompt tokens':>14} {'reference':>10} {'JS bits':>8} {'floor':>6} {'AUC':>5} "
          f"{'floor':>6}")
    for split in task.splits():
        rows = task.rows(split, cfg.rows)
        whole = len(rows) if len(rows) < cfg.rows else len(task.rows(split))
        prompt, reference = (np.median([len(enc.encode_ordinary(r[k])) for r in rows])
                             for k in ("prompt", "reference"))
        line = f"{split:18} {whole:6} {prompt:14.0f} {reference:10.0f}"
        if split != "train" and len(rows) >= 8 and len(train) >= 8:
            far = shift([r["prompt"] for r in train], [r["prompt"] for r in rows], enc)
            line += f" {far['js']:8.4f} {far['js_floor']:6.4f} {far['auc']:5.2f} {far['auc_floor']:6.2f}"
        print(line)
    for split in task.splits():
        row = task.rows(split, 1)[0]
        print(f"\n--- {split}\n{row['prompt'][-600:]}\n  reference: {row['reference'][:300]}")


if __name__ == "__main__":
    run(main, Config, __doc__)
