"""The data: tasks, tokenizers, in- and out-of-distribution splits, and how far each split lies from train.

    python splits.py                                 # the embedded task
    python splits.py --task tldr                     # the paper's own tasks: paper.py
    python splits.py --data DIR                      # your own: train/validation/test/ood_<name>.jsonl(.gz)

A line of a split is {"prompt", "reference"}; of preferences.jsonl and preferences_validation.jsonl {"prompt",
"chosen", "rejected"}.  Other fields are kept as metadata.  Prompts are used as they stand; a response is a
space and the text, then EOS (the paper's TL;DR format).

Deviation from the paper: the shift between splits is a number here, by five measures (token distributions, a
classifier, and with an encoder three distances of embeddings), each with an interval and beside its floor:
the same measure between halves of train.
"""
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex            # comes with tiktoken, which uses the same engine
import tiktoken
import torch
import torch.nn.functional as F

import instructions
import paper
import synthetic
from pretrained import PIECES, encoding
from runtime import Common, Fault, read_jsonl, require, run, setup

# embedded tasks, each a world with a known truth: (its module, noise of its references)
WORLDS = {"world": (synthetic, "systematic"), "world-independent": (synthetic, "independent"),
          "world-mixed": (synthetic, "mixed"),
          "instruct": (instructions, "usual"), "instruct-mixed": (instructions, "mixed")}
# tokens of a response: 48 is the paper's for summaries
MAX_NEW_TOKENS = {**dict.fromkeys(WORLDS, 32), "instruct": 48, "instruct-mixed": 48, "folder": 48,
                  **dict.fromkeys(paper.TASKS, 48), "alpaca": 128}
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

def world_of(prompt):
    """The embedded world that wrote a prompt: a module with rows, judge, facts and semantic_diversity.
    Raises ValueError on a prompt of none."""
    world = instructions if prompt.startswith("INSTRUCTION ") else synthetic
    world.read_prompt(prompt)
    return world


def known_world(rows):
    """The world that wrote all rows' prompts, or None."""
    try:
        worlds = {world_of(row["prompt"]) for row in rows}
    except ValueError:
        return None
    return worlds.pop() if len(worlds) == 1 else None


@dataclass
class Task:
    """Where rows come from.  Checkpoints carry it as a dict, so `--model ckpt_sft.pt` is enough for the next
    stage."""
    name: str = "world"
    data: str = ""
    max_new_tokens: int = 32
    max_prompt_tokens: int = 0  # 0: as many as the context leaves

    @property
    def world(self):
        """The module of an embedded task, with the truth in it; None of any other."""
        return WORLDS.get(self.name, (None,))[0]

    def room(self, context):
        """Tokens a prompt may have beside a response.  Raises Fault if there are none."""
        left = context - self.max_new_tokens
        require(left > 0,
                f"a context of {context} leaves no room for a prompt beside {self.max_new_tokens} new "
                "tokens; lower --max-new-tokens")
        return min(left, self.max_prompt_tokens or left)

    def splits(self):
        """Names of the splits: train, validation, test, ood_*."""
        if self.world:
            return list(self.world.SPLITS)
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
        if self.world:
            whole = self.world.SIZES.get(split, 1000)
            return self.world.rows(split, min(whole, limit or whole), WORLDS[self.name][1], references)
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
        path = None if self.world else self._file("preferences_validation" if validation else "preferences")
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
            f"--task {name} takes no --data: it makes its own prompts")
    new, prompt = (base.max_new_tokens, base.max_prompt_tokens) if same else (
        MAX_NEW_TOKENS[name], MAX_PROMPT_TOKENS if name in paper.TASKS else 0)
    return Task(name, str(data), getattr(cfg, "max_new_tokens", 0) or new,
                getattr(cfg, "max_prompt_tokens", 0) or prompt)


# ------------------------------------------------------------------------------------------------------ shift
# Distances between two samples of prompts, all 0 (AUC: 0.5) for one distribution, up to chance.

def js_divergence(a, b):
    """Jensen-Shannon divergence of two count vectors (V,), in bits: 0 for equal distributions, 1 for disjoint
    ones (Lin 1991)."""
    p, q = a / a.sum(), b / b.sum()
    m = (p + q) / 2
    kl = lambda x: np.sum(x[x > 0] * np.log2(x[x > 0] / m[x > 0]))  # noqa: E731
    return float(kl(p) + kl(q)) / 2


def cosine_distance(a, b):
    """1 - cosine of the mean embeddings.  a, b: (n, D), (m, D)."""
    u, v = a.mean(0), b.mean(0)
    return float(1 - u @ v / (np.linalg.norm(u) * np.linalg.norm(v)))


def sliced_wasserstein(a, b, directions=128):
    """Sliced 1-Wasserstein distance of two samples of one size, (n, D) each, in the embeddings' units: the
    mean over random directions of the distance between sorted projections (Rabin et al. 2011)."""
    w = np.random.default_rng(0).standard_normal((a.shape[1], directions))
    w /= np.linalg.norm(w, axis=0)
    return float(np.abs(np.sort(a @ w, axis=0) - np.sort(b @ w, axis=0)).mean())


def mmd2(a, b):
    """Squared maximum mean discrepancy, unbiased, so it can fall below 0 (Gretton et al. 2012, equation 3).
    a, b: (n, D), (m, D).  Gaussian kernel, its width the median distance of the pooled sample."""
    x, n, m = np.concatenate((a, b)), len(a), len(b)
    square = (x * x).sum(1)
    d = np.maximum(square[:, None] + square - 2 * x @ x.T, 0)
    k = np.exp(-d / max(np.median(d[np.triu_indices(n + m, 1)]), 1e-12))
    within = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))  # noqa: E731
    return float(within(k[:n, :n]) + within(k[n:, n:]) - 2 * k[:n, n:].mean())


def auc(a, b):
    """Area under the ROC curve: the chance that a score of b (m,) exceeds one of a (n,), ties halved."""
    difference = b[:, None] - a
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def classifier_scores(a, b, ridge=1e-2, steps=200):
    """Held-out scores of a linear classifier of two samples' texts: (n/2,), (m/2,).  Their `auc` says how
    well it tells the samples apart: 0.5 not at all, 1 always.

    a, b: (n, V), (m, V) token counts of each text.  Logistic regression on log counts, trained on the even
    rows, tested on the odd ones."""
    x = torch.tensor(np.log1p(np.concatenate((a[::2], b[::2]))), dtype=torch.float32)
    y = torch.cat((torch.zeros(len(a[::2])), torch.ones(len(b[::2]))))
    w, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
    optimiser = torch.optim.LBFGS((w, bias), max_iter=steps, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        out = F.binary_cross_entropy_with_logits(x @ w + bias, y) + ridge * w.square().sum()
        out.backward()
        return out
    optimiser.step(loss)
    w = w.detach().numpy()
    return np.log1p(a[1::2]) @ w, np.log1p(b[1::2]) @ w


SHIFTS = {"js": "JS bits", "auc": "AUC", "cosine": "cosine", "wasserstein": "Wasserstein", "mmd2": "MMD2"}
BOUNDS = {"js": (0, 1), "auc": (0, 1), "cosine": (0, 2), "wasserstein": (0, 2), "mmd2": (-2, 2)}


def half_interval(statistic, a, b, draws, rng):
    """(value, low, high) of statistic(a, b) with a 95 % interval over the choice of texts.

    Bootstrapped by halves, drawn without replacement: for a mean that has the variance of the usual bootstrap
    (McCarthy 1969), and a text never meets itself, which all distances between samples would take for
    structure.  The draws are centred on the value, for a smaller sample looks farther away."""
    value, n, m = statistic(a, b), len(a), len(b)
    found = np.array([statistic(a[rng.permutation(n)[:n // 2]], b[rng.permutation(m)[:m // 2]])
                      for _ in range(draws)])
    low, high = np.percentile(found - found.mean(), (2.5, 97.5)) + value
    return value, float(low), float(high)


def shift(texts, others, enc, embed=None, draws=200, floors=20):
    """How far `others` lie from `texts`, each measure with an interval and a floor: the same measure between
    random halves of `texts`.

    embed: function of texts giving (n, D) embeddings, put on the unit sphere here, or None.  Returns a flat
    dict of <measure>, <measure>_low, _high, _floor (mean over halves) and _floor_high (their 97.5 %) for js
    (Jensen-Shannon divergence of token distributions, bits), auc (two-sample classifier) and, with embed,
    cosine, wasserstein and mmd2.  All samples are of one size, half of `texts` or all `others`, for most
    measures grow as samples shrink.  AUC's interval is that of the held-out texts, for one classifier.
    Raises ValueError on fewer than 8 texts on a side."""
    n, rng = min(len(texts) // 2, len(others)), np.random.default_rng(0)
    if n < 4 or len(others) < 8:
        raise ValueError(f"shift: at least 8 texts a side are needed, got {len(texts)} and {len(others)}")
    texts, others = texts[:2 * n], others[:n]
    counts = np.stack([np.bincount(enc.encode_ordinary(t), minlength=enc.n_vocab) for t in texts + others])
    counts = counts[:, counts.sum(0) > 0]
    together = lambda a, b: js_divergence(a.sum(0), b.sum(0))  # noqa: E731
    todo = {"js": (together, counts, None), "auc": (auc, counts, classifier_scores)}
    if embed:
        x = np.asarray(embed(texts + others), dtype=np.float64)
        x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        todo |= {name: (f, x, None) for name, f in (("cosine", cosine_distance),
                                                    ("wasserstein", sliced_wasserstein), ("mmd2", mmd2))}
    out = {}
    for name, (statistic, x, prepare) in todo.items():
        seen = lambda a, b: prepare(a, b) if prepare else (a, b)  # noqa: E731, B023
        out[name], *ends = half_interval(statistic, *seen(x[:n], x[2 * n:]), draws, rng)
        out[f"{name}_low"], out[f"{name}_high"] = np.clip(ends, *BOUNDS[name]).tolist()
        halves = [rng.permutation(2 * n) for _ in range(floors)]
        floor = [statistic(*seen(x[h[:n]], x[h[n:]])) for h in halves]
        out[f"{name}_floor"] = float(np.mean(floor))
        out[f"{name}_floor_high"] = float(np.percentile(floor, 97.5))
    return out


@dataclass
class Config(Common):
    rows: int = 500             # rows of each split looked at
    encoder: str = "ckpt_sft.pt"    # checkpoint or published model whose hidden states embed the prompts, or
                                # sbert:NAME; "" or a missing default: no measures on embeddings


def main(cfg):
    from diversity import encoder_of, encoder_wanted       # which build on this file
    task, (device, _) = task_of(cfg), setup(cfg)
    require(cfg.rows >= 16, f"--rows {cfg.rows}: at least 16, for the shift compares halves")
    require(task.splits(),
            f"--data {task.data}: no splits; it should hold train.jsonl, validation.jsonl, test.jsonl, "
            "ood_<name>.jsonl")
    embed = encoder_of(cfg.encoder, device, cfg.dtype) if encoder_wanted(cfg.encoder) else None
    train = task.rows("train", 2 * cfg.rows)
    enc = tokenizer(build_tokenizer([t for r in train for t in (r["prompt"], *r["references"])]))
    print(f"task {task.name}{' ' + task.data if task.data else ''}, vocabulary {enc.n_vocab}\n\n{'split':19} "
          f"{'rows':>6} {'prompt tokens':>14} {'reference':>10}")
    read = {split: task.rows(split, cfg.rows) for split in task.splits()}
    for split, rows in read.items():
        whole = len(rows) if len(rows) < cfg.rows else len(task.rows(split))
        prompt, reference = (np.median([len(enc.encode_ordinary(r[k])) for r in rows])
                             for k in ("prompt", "reference"))
        print(f"{split:19} {whole:6} {prompt:14.0f} {reference:10.0f}")
    if len(train) >= 8:
        print("\nshift of the prompts from train: value [95 % over texts], and behind the stroke the floor, "
              "between "
              "halves of train")
        for split, rows in read.items():
            if split == "train" or len(rows) < 8:
                continue
            far = shift([r["prompt"] for r in train], [r["prompt"] for r in rows], enc, embed)
            print(f"{split:19}", *(f" {title} {far[m]:.3f} [{far[m + '_low']:.3f}, {far[m + '_high']:.3f}] / "
                                   f"{far[m + '_floor']:.3f}" for m, title in SHIFTS.items() if m in far))
    for split, rows in read.items():
        print(f"\n--- {split}\n{rows[0]['prompt'][-600:]}\n  reference: {rows[0]['reference'][:300]}")


if __name__ == "__main__":
    run(main, Config, __doc__)
