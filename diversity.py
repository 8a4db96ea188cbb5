"""How varied samples are: per input (outputs of one prompt) and across inputs (one output of each prompt).

    python diversity.py samples_*.jsonl                        # embeddings from ckpt_sft.pt, if it is there
    python diversity.py samples_*.jsonl --convention paper     # the authors' tokens, counts and vocabulary
    python diversity.py samples_*.jsonl --encoder sbert:all-MiniLM-L6-v2 --nli roberta-large-mnli

Prints tables and writes diversity.json.  Mean length stands beside every figure: most measures move with it.

The measures are linear in the text: self-BLEU against all other outputs needs only the two largest counts of
each n-gram, and the mean pairwise cosine follows from the sum of the unit vectors.

Deviations from the paper, in the `sound` convention, which is the default: punctuation is a token and nothing
is glued; n-gram orders longer than every output are left out instead of counting as 0; EAD's vocabulary for
n-grams is V^n (with V at every n, it exceeds 1 for large pools).  Embeddings are the mean-pooled last layer
of the project's own SFT model; the paper's Sentence-BERT and NLI measures need
`pip install sentence-transformers`, which brings transformers.
"""
import json
import math
import re
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import torch

import model as M
from generalisation import read_all
from pretrained import load_model
from runtime import Common, Fault, bootstrap, out_file, require, run, setup, write_whole
from splits import known_world, tokenizer


@dataclass
class Config(Common):
    files: list = None          # sample files
    encoder: str = "ckpt_sft.pt"    # checkpoint or published model whose hidden states embed the outputs, or
                                    # sbert:NAME; "" or a missing default: no embeddings
    nli: str = ""               # a published classifier of entailment for NLI diversity (the paper's:
                                # roberta-large-mnli); "": none
    cut: int = 0                # words of each output that are measured, from its start, so that lengths are
                                # equal; 0: all
    convention: str = "sound"   # sound, or paper: the authors' tokens and counts, V = 50,257
    max_n: int = 5              # distinct-n, EAD and entropy are means over n = 1..max_n
    vocabulary: int = 0         # V of EAD; 0: words in all references read (sound), 50,257 (paper)


# ----------------------------------------------------------------------------------------------------- tokens

def words(text):
    """Runs of letters and digits, and each punctuation mark: the sound tokens."""
    return re.findall(r"\w+|[^\w\s]", text)


def paper_words(text):
    """The authors' tokens: newlines and dots are deleted (gluing what they part: "b.\\nc" is "bc"), then
    single spaces split."""
    return [w for w in text.replace("\n", "").replace(".", "").split(" ") if w]


def ngrams(tokens, n):
    return zip(*(tokens[i:] for i in range(n)))


def _tokens(outputs, tokenise):
    return [tokenise(o) if isinstance(o, str) else o for o in outputs]


# ------------------------------------------------------------------------------------------- lexical measures
# outputs: a list of strings or of token lists.  N-grams never cross from one output into the next.

def _unique_and_all(outputs, n):
    unique, total = set(), 0
    for tokens in outputs:
        unique.update(ngrams(tokens, n))
        total += max(0, len(tokens) - n + 1)
    return len(unique), total


def distinct_n(outputs, n, tokenise=words):
    """Different n-grams / all n-grams (Li et al. 2016), in [0, 1]; nan if no output has n tokens."""
    unique, total = _unique_and_all(_tokens(outputs, tokenise), n)
    return unique / total if total else math.nan


def ead(outputs, n, vocabulary, tokenise=words):
    """Expectation-adjusted distinct-n, U / (V (1 - ((V - 1) / V)^C)): different n-grams over how many C
    uniform draws of V kinds would give, so that length alone does not lower it (Liu et al. 2022).  nan if no
    output has n tokens.

    vocabulary: V, kinds of n-grams; for n > 1 the sound choice is (kinds of tokens)^n.  Raises ValueError for
    vocabulary < 2."""
    if vocabulary < 2:
        raise ValueError(f"ead: a vocabulary of {vocabulary}; at least 2 kinds are needed")
    unique, total = _unique_and_all(_tokens(outputs, tokenise), n)
    return float(unique / expected_unique(total, vocabulary)) if total else math.nan


def expected_unique(total, vocabulary):
    """V (1 - ((V - 1) / V)^C): how many kinds C = total (a number or an array) uniform draws of V kinds give.
    Exact for V^5 too, where 1 - 1/V rounds to 1."""
    return -float(vocabulary) * np.expm1(np.asarray(total) * math.log1p(-1 / vocabulary))


def averaged(measure, max_n=5, missing=None):
    """Mean of measure(n), a number or an array, over n = 1..max_n.  Orders without n-grams (nan) are left
    out, or count as `missing`."""
    values = np.array([measure(n) for n in range(1, max_n + 1)], dtype=float)
    values = values if missing is None else np.where(np.isnan(values), missing, values)
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):     # 0 / 0: no order has n-grams
        mean = np.where(known, values, 0).sum(0) / known.sum(0)
    return mean if mean.ndim else float(mean)


def ngram_numbers(outputs, max_n):
    """For n = 1..max_n the n-grams of all outputs (token lists) in order, as two int arrays: which output
    each stands in, and its number, equal for equal n-grams.

    Words become numbers, and an n-gram the pair of the (n - 1)-gram that starts where it does and its last
    word, numbered anew by a sort: what is counted below is counted for a whole file at once."""
    flat = [w for tokens in outputs for w in tokens]
    number = {w: i for i, w in enumerate(dict.fromkeys(flat))}
    words = np.fromiter(map(number.__getitem__, flat), np.int64, len(flat))
    lengths = np.array([len(tokens) for tokens in outputs], dtype=np.int64)
    owner = np.repeat(np.arange(len(outputs)), lengths)
    left = np.repeat(lengths.cumsum(), lengths) - np.arange(len(words))     # words from here to the end
    grams = words.copy()                                                    # the n-gram that starts here
    for n in range(1, max_n + 1):
        start = np.flatnonzero(left >= n)
        if n > 1:
            longer = grams[start] * len(number) + words[start + n - 1]
            _, grams[start] = np.unique(longer, return_inverse=True)
        yield owner[start], grams[start]


def group_numbers(groups):
    """The group of each output, groups laid end to end: (outputs,)."""
    return np.repeat(np.arange(len(groups)), [len(g) for g in groups])


def count_ngrams(groups, max_n=5):
    """Different and all n-grams of each of G groups of outputs, and last of all groups together: two float
    arrays (max_n, G + 1), row n - 1 for n; what `distinct_n` and `ead` divide.  groups: lists of outputs,
    each a list of tokens."""
    group, size, unique, total = group_numbers(groups), len(groups), [], []
    for owner, gram in ngram_numbers([tokens for g in groups for tokens in g], max_n):
        code = np.sort(gram * size + group[owner])
        code = code[np.diff(code, prepend=-1) > 0]          # one for each group an n-gram is in
        unique.append([*np.bincount(code % size, minlength=size),
                       np.count_nonzero(np.diff(code // size, prepend=-1))])
        total.append([*np.bincount(group[owner], minlength=size), len(gram)])
    return np.array(unique, dtype=float), np.array(total, dtype=float)


def distinct_and_ead(groups, max_n, kinds, missing=None):
    """{"distinct_n", "ead"} of each of G groups, averaged over n: (G,) arrays equal to the functions above.
    kinds: function of n, the vocabulary of n-grams."""
    unique, total = count_ngrams(groups, max_n)
    total[total == 0] = np.nan
    return {"distinct_n": averaged(lambda n: (unique / total)[n - 1, :-1], max_n, missing),
            "ead": averaged(lambda n: unique[n - 1, :-1] / expected_unique(total[n - 1, :-1], kinds(n)),
                            max_n, missing)}


def ngram_entropy(outputs, n, tokenise=words):
    """Shannon entropy of the outputs' n-gram distribution, bits; nan if there are none."""
    counts = np.array(list(Counter(g for tokens in _tokens(outputs, tokenise)
                                   for g in ngrams(tokens, n)).values()), dtype=float)
    if not len(counts):
        return math.nan
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum()) + 0.


def self_bleu(outputs, max_n=4, tokenise=words, each=False):
    """Mean BLEU of each output against all the others (Zhu et al. 2018): 1 for copies, near 0 for strangers.
    Equal to NLTK's sentence_bleu with smoothing method 1 (an order without a match counts as 0.1), to
    rounding.  each=True: the list of BLEUs.  Raises ValueError on fewer than two outputs."""
    bleu = self_bleus([_tokens(outputs, tokenise)], max_n)
    return bleu.tolist() if each else float(bleu.mean())


def self_bleus(groups, max_n=4):
    """BLEU of each output against the others of its group: (outputs,), groups laid end to end.  groups: lists
    of outputs, each a list of tokens.  Raises ValueError on a group of fewer than two.

    Linear in the tokens but for sorting: the reference count of an n-gram is its largest count in another
    output, so the largest count, whose it is, and the second largest answer for every output."""
    if min(map(len, groups)) < 2:
        raise ValueError("self_bleu: at least two outputs are needed")
    outputs, group = [tokens for g in groups for tokens in g], group_numbers(groups)
    lengths = np.array([len(tokens) for tokens in outputs])
    log_precision, any_word = np.zeros(len(outputs)), None
    for n, (owner, gram) in enumerate(ngram_numbers(outputs, max_n), 1):
        code = np.sort(gram * len(outputs) + owner)
        first = np.flatnonzero(np.diff(code, prepend=-1))
        count = np.diff(first, append=len(code))            # of an n-gram in an output, for each such pair
        gram, owner = np.divmod(code[first], len(outputs))
        # an n-gram in a group; these lie together, for groups follow each other as their outputs do
        kind = np.diff(gram * len(groups) + group[owner], prepend=-1) != 0
        start = np.flatnonzero(kind)
        kind = kind.cumsum() - 1                            # numbered
        largest = np.maximum.reduceat(count, start)[kind]
        # the first that has the largest count is held against the second largest, or none
        top = np.flatnonzero(count == largest)
        top = top[np.diff(kind[top], prepend=-1) > 0]
        others = count.copy()
        others[top] = 0
        reference = largest
        reference[top] = np.maximum.reduceat(others, start)
        match = np.bincount(owner, np.minimum(count, reference), minlength=len(outputs))
        log_precision += np.log(np.where(match > 0, match, 0.1) / np.maximum(1, lengths - n + 1)) / max_n
        any_word = match > 0 if n == 1 else any_word
    brevity = np.concatenate([_log_brevity([len(t) for t in g]) for g in groups])
    # NLTK: without one common word the score is 0, whatever the smoothing
    return np.where(any_word, np.exp(log_precision + brevity), 0.)


def _log_brevity(lengths):
    """min(0, 1 - r / c) of each output: c its length, r the closest length among the others, the shorter of
    two equally close."""
    count = Counter(lengths)
    ordered, out = sorted(count), []
    for c in lengths:
        if count[c] > 1 or c == 0:
            out.append(0.)          # an empty output matches nothing: its score is 0 anyway
            continue
        i = bisect_left(ordered, c)
        others = ordered[max(0, i - 1):i] + ordered[i + 1:i + 2]
        r = min(others, key=lambda r: (abs(r - c), r))
        out.append(min(0., 1 - r / c))
    return np.array(out)


# ----------------------------------------------------------------------------------------- embedding measures

def unit(embeddings):
    x = np.asarray(embeddings, dtype=np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def embedding_diversity(embeddings):
    """One minus the mean pairwise cosine of n embeddings (n, D).  Over pairs the cosines sum to (|sum u|^2 -
    n) / 2, u the unit vectors: linear in n.

    Raises ValueError on fewer than two."""
    x = np.asarray(embeddings, dtype=np.float64)
    n = len(x)
    if n < 2:
        raise ValueError("embedding_diversity: at least two embeddings are needed")
    total, ones, rows = np.zeros(x.shape[1]), 0, 4096
    for part in (x[i:i + rows] for i in range(0, n, rows)):     # while it lies in the cache: no copy of x
        norm = np.sqrt(np.einsum("nd,nd->n", part, part))
        total += (1 / np.maximum(norm, 1e-12)) @ part
        ones += np.count_nonzero(norm > 1e-12)      # u . u = 1, but of a zero vector 0
    return float(1 - (total @ total - ones) / (n * (n - 1)))


def vendi_score(embeddings, q=1.0):
    """Effective number of different outputs: exp of the order-q entropy of the eigenvalues of K / n, K the
    cosines (Friedman and Dieng 2023).

    embeddings: (n, D).  Between 1, all alike, and n, all orthogonal.  The smaller of K (n, n) and its dual
    (D, D) is decomposed: same eigenvalues."""
    u = unit(embeddings)
    gram = u @ u.T if len(u) <= u.shape[1] else u.T @ u
    return vendi_of_kernel(gram, q, len(u))


def vendi_of_kernel(kernel, q=1.0, n=None):
    """The same from a similarity matrix (n, n) with ones on its diagonal, or its dual with n given."""
    p = np.linalg.eigvalsh(np.asarray(kernel, dtype=np.float64) / (n or len(kernel)))
    p = p[p > 1e-12]
    if q == 1:
        return float(np.exp(-(p * np.log(p)).sum()))
    if math.isinf(q):
        return float(1 / p.max())
    return float(np.exp(np.log((p ** q).sum()) / (1 - q)))


@torch.no_grad()
def embed(model, enc, texts, batch=256):
    """Mean-pooled last hidden states of each text by itself: (n, D) array.  An empty text is embedded as
    EOS."""
    out, device = [], model.embed.weight.device
    ids = [enc.encode_ordinary(t)[:model.config.context] or [enc.eot_token] for t in texts]
    for i in range(0, len(ids), batch):
        part = ids[i:i + batch]
        hidden = model(M.plain(part, device))                                       # (B, S, D)
        lengths = torch.tensor([len(x) for x in part], device=device)
        mask = torch.arange(hidden.shape[1], device=device) < lengths[:, None]
        out.append(((hidden * mask[:, :, None]).sum(1) / lengths[:, None]).float().cpu().numpy())
    return np.concatenate(out)


def encoder_wanted(name):
    """Whether --encoder asks for one: "" does not, nor the default where it is missing."""
    return name and (name != "ckpt_sft.pt" or Path(name).is_file())


def encoder_of(name, device, dtype="fp32"):
    """--encoder -> function of texts giving (n, D).  Raises Fault if it cannot be had."""
    if not name.startswith("sbert:"):
        model, saved = load_model(name, "--encoder", device, dtype)
        return partial(embed, model, tokenizer(saved["tokenizer"]))
    name = name.removeprefix("sbert:")
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise Fault("--encoder sbert: Sentence-BERT needs `pip install sentence-transformers`") from None
    try:
        return SentenceTransformer(name, device=str(device)).encode
    except Exception as error:      # no network, no such model, ...
        raise Fault(f"--encoder sbert:{name}: cannot be loaded ({type(error).__name__})") from None


# ---------------------------------------------------------------------------------------------- NLI diversity

NLI_POINTS = {"CONTRADICTION": 1., "NEUTRAL": 0., "ENTAILMENT": -1.}


def nli_diversity(outputs, points):
    """Mean over ordered pairs of what the second says of the first: contradiction +1, neutral 0, entailment
    -1, times the classifier's certainty (paper, appendix; Stasaski and Hearst 2022).  points: function of
    [(premise, hypothesis)] giving (n,), as from `nli_of`.  Raises ValueError on fewer than two outputs."""
    if len(outputs) < 2:
        raise ValueError("nli_diversity: at least two outputs are needed")
    return float(np.mean(points(list(permutations(outputs, 2)))))


def nli_of(name, device, batch=64):
    """--nli -> function of [(premise, hypothesis)] giving the points (n,) of each pair's likeliest label,
    times its probability, as the authors do.  Raises Fault if it cannot be had, or has other labels."""
    try:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError:
        raise Fault("--nli: NLI diversity needs `pip install transformers`") from None
    try:
        tok = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name).to(device).eval()
    except Exception as error:      # no network, no such model, ...
        raise Fault(f"--nli {name}: cannot be loaded ({type(error).__name__})") from None
    labels = [model.config.id2label[i].upper() for i in range(model.config.num_labels)]
    require(set(labels) == set(NLI_POINTS),
            f"--nli {name}: its labels are {', '.join(labels)}; contradiction, neutral "
            "and entailment are needed")
    weight = torch.tensor([NLI_POINTS[x] for x in labels], device=device)

    @torch.no_grad()
    def points(pairs):
        out = []
        for i in range(0, len(pairs), batch):
            first, second = map(list, zip(*pairs[i:i + batch]))
            p, label = model(**tok(first, second, padding=True, truncation=True, max_length=512,
                                   return_tensors="pt").to(device)).logits.softmax(-1).max(-1)
            out.append((p * weight[label]).cpu().numpy())
        return np.concatenate(out)
    return points


# ----------------------------------------------------------------------------------- per input, across inputs

def per_input(groups, measure):
    """measure of the K outputs of each input: (n,).  groups: n lists (or arrays) of K outputs.  Its mean is
    the paper's per-input diversity."""
    return np.array([measure(group) for group in groups])


def across_input(groups, measure):
    """measure of one output of each input, for each of the K choices of that output: (K,).  The paper takes
    the first; the mean of all uses the data once more.  groups: n lists (or arrays) of K outputs."""
    return np.array([measure(column) for column in zip(*groups)])


def conventions(convention, vocabulary):
    """(function of a text giving its tokens, value of a missing order or None, function of n giving V)."""
    if convention == "paper":
        return paper_words, 0., lambda n: vocabulary
    return words, None, lambda n: vocabulary ** n


def measures(convention="sound", max_n=5, vocabulary=50257):
    """{name: function of a list of outputs} of the lexical measures."""
    tokenise, missing, kinds = conventions(convention, vocabulary)
    return {
        "distinct_n": lambda x: averaged(lambda n: distinct_n(x, n, tokenise), max_n, missing),
        "ead": lambda x: averaged(lambda n: ead(x, n, kinds(n), tokenise), max_n, missing),
        "self_bleu": lambda x: self_bleu(x, tokenise=tokenise),
        "entropy": lambda x: averaged(lambda n: ngram_entropy(x, n, tokenise), max_n, missing),
        "length": lambda x: sum(map(len, x)) / len(x),
    }


def measure_samples(rows, convention="sound", max_n=5, vocabulary=50257, embeddings=None, world=None,
                    nli=None):
    """All measures of one sample file.  embeddings: (n, K, D) array or None; nli: as from `nli_of`, or None,
    for the outputs of one input only (across inputs all is neutral).  Returns {"per_input": {measure:
    (n,)}, "across": {measure: (K,)}}; a measure that needs two outputs is left out where there are not so
    many."""
    lexical = measures(convention, max_n, vocabulary)
    tokenise, missing, kinds = conventions(convention, vocabulary)
    groups = [[tokenise(t) for t in row["outputs"]] for row in rows]     # once for all measures
    out = {}
    for name, arrange, size in (("per_input", per_input, len(groups[0])),
                                ("across", across_input, len(groups))):
        sets = groups if name == "per_input" else list(zip(*groups))
        once = distinct_and_ead(sets, max_n, kinds, missing)
        if size > 1:
            once["self_bleu"] = self_bleus(sets).reshape(len(sets), size).mean(1)
        out[name] = {k: once[k] if k in once else arrange(groups, m) for k, m in lexical.items()
                     if size > 1 or k != "self_bleu"}
        if size > 1 and embeddings is not None:
            out[name] |= {"embedding": arrange(embeddings, lambda x: embedding_diversity(np.stack(x))),
                          "vendi": arrange(embeddings, lambda x: vendi_score(np.stack(x)))}
        if size > 1 and world:
            pairs = arrange([row["outputs"] for row in rows], world.semantic_diversity)
            out[name] |= {"semantic": pairs[:, 0], "fact_sets": pairs[:, 1]}
    if nli and len(groups[0]) > 1:
        out["per_input"]["nli"] = per_input([row["outputs"] for row in rows], lambda x: nli_diversity(x, nli))
    return out


def half_spread(rows, vectors, measured, draws=20, seed=0):
    """{measure: standard deviation of its across-input value} for files with one output an input: over random
    halves of the inputs, whose spread estimates that of the whole.  measured: function of (rows, vectors)."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        pick = rng.permutation(len(rows))[:max(2, len(rows) // 2)]
        found.append(measured([rows[i] for i in pick], None if vectors is None else vectors[pick])["across"])
    return {m: float(np.std([f[m][0] for f in found], ddof=1)) for m in found[0]}


COLUMNS = {"distinct_n": "distinct", "ead": "EAD", "self_bleu": "self-BLEU", "embedding": "embed",
           "vendi": "Vendi", "nli": "NLI", "entropy": "entropy", "semantic": "semantic",
           "fact_sets": "fact sets",
           "length": "length"}


def reference_vocabulary(every):
    """Kinds of words in the references: a V for EAD that does not depend on the policies compared."""
    return max(2, len({w for rows in every for row in rows for w in words(row["reference"])}))


def main(cfg):
    device, _ = setup(cfg)
    require(cfg.convention in ("sound", "paper"), f"--convention {cfg.convention}: choose sound or paper")
    require(cfg.max_n >= 1 and cfg.vocabulary >= 0,
            f"--max-n {cfg.max_n} must be at least 1, --vocabulary {cfg.vocabulary} at least 0")
    runs, encode = read_all(cfg.files), None
    nli = nli_of(cfg.nli, device) if cfg.nli else None
    if encoder_wanted(cfg.encoder):
        encode = encoder_of(cfg.encoder, device, cfg.dtype)
    else:
        print("no ckpt_sft.pt here: no embedding measures; --encoder CHECKPOINT adds them")
    vocabulary = cfg.vocabulary or (50257 if cfg.convention == "paper"
                                    else reference_vocabulary(runs.values()))
    if cfg.cut:
        for rows in runs.values():
            for row in rows:
                row["outputs"] = [" ".join(t.split()[:cfg.cut]) for t in row["outputs"]]
    print(f"convention {cfg.convention}, n = 1..{cfg.max_n}, V = {vocabulary}.  self-BLEU: lower is more "
          "diverse; every other: higher is.\nper input: mean over inputs [95 %, bootstrapped over inputs]; "
          "across inputs: mean +- standard deviation over the choice of output (of one "
          "output: over halves of the inputs)\n")
    results = []
    for key, rows in sorted(runs.items(), key=str):
        world = known_world(rows)
        k, vectors = len(rows[0]["outputs"]), None
        if encode:
            vectors = np.asarray(encode([t for row in rows for t in row["outputs"]]))
            vectors = vectors.reshape(len(rows), k, -1)
        measured = partial(measure_samples, convention=cfg.convention, max_n=cfg.max_n, vocabulary=vocabulary,
                           world=world, nli=nli)
        found = measured(rows, embeddings=vectors)
        spread = {}
        if k == 1 and len(rows) > 3:
            spread = half_spread(rows, vectors, lambda r, v: measured(r, embeddings=v))
        policy, temperature, seed, split = key
        print(f"{policy}, temperature {temperature}, {split}, {len(rows)} inputs x {k} outputs")
        line = dict(zip(("policy", "temperature", "seed", "split"), key))
        for name, values in found.items():
            cells = []
            for m in (m for m in COLUMNS if m in values):
                v = values[m][~np.isnan(values[m])]
                if not len(v):
                    continue
                if name == "per_input":
                    mean, low, high = map(float, bootstrap(v))
                    cells.append(f"{COLUMNS[m]} {mean:.3f} [{low:.3f}, {high:.3f}]")
                    line[f"per_input_{m}"] = (mean, low, high)
                else:
                    off = spread.get(m, float(v.std()))
                    cells.append(f"{COLUMNS[m]} {v.mean():.3f} +- {off:.3f}")
                    line[f"across_{m}"] = (float(v.mean()), off)
            print(f"  {'per input' if name == 'per_input' else 'across   '}  " + "  ".join(cells))
        results.append(line)
    path = out_file(cfg.out, "diversity.json")
    write_whole(path,
                json.dumps({"convention": cfg.convention, "max_n": cfg.max_n, "vocabulary": vocabulary,
                            "results": results}, indent=1).encode())
    print(f"\nwrote {path}")


if __name__ == "__main__":
    run(main, Config, __doc__)
