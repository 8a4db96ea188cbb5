"""How varied samples are: per input (outputs of one prompt) and across inputs (one output of each prompt).

    python diversity.py samples_*.jsonl                        # embeddings from ckpt_sft.pt, if it is there
    python diversity.py samples_*.jsonl --convention paper     # the authors' tokens, counts and vocabulary
    python diversity.py samples_*.jsonl --encoder sbert:all-MiniLM-L6-v2 --nli roberta-large-mnli

Prints tables and writes diversity.json.  The mean length stands beside the measures, because most of them
move with it.

Deviations from the paper, in the default convention `sound`: punctuation is a token and no words are glued;
n-gram orders longer than every output are left out instead of counting as 0, and so are, in self-BLEU, those
longer than the output; EAD's vocabulary for n-grams is V^n, because EAD exceeds 1 for large pools with V at
every n.  Embeddings are the mean-pooled last layer of
the project's own SFT model.  The paper's Sentence-BERT and NLI measures need
`pip install sentence-transformers`, which brings transformers.
"""
import math
import re
import textwrap
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Annotated, Literal

import numpy as np

from common.embed import encoder_wanted, load_encoder, load_nli
from common.errors import UserError, check
from common.files import output_path, write_json
from common.flags import Common, Domain, Natural, launch, setup
from common.ngrams import clipped_matches, count_ngrams, group_of_text, ngram_ids
from common.samples import KEY, NAMES, known_task, names_of, read_all, run_name, short_name
from common.stats import FEW_PROMPTS, Interval, mean_interval, rate_interval
from common.tables import WIDTH, text_table
from splits import synthetic_task

Orders = Annotated[int, Domain("an integer from 1 to 20", lambda x: 1 <= x <= 20)]
Kinds = Annotated[int, Domain("0, or an integer from 2 to a million", lambda x: x == 0 or 2 <= x <= 10**6)]


@dataclass
class Config(Common):
    files: list = None          # sample files
    encoder: str = "ckpt_sft.pt"    # checkpoint or published model whose hidden states embed the outputs, or
                                    # sbert:NAME; "" or a missing default: no embeddings
    nli: str = ""               # a published classifier of entailment for NLI diversity (the paper's:
                                # roberta-large-mnli); "": none
    cut: Natural = 0            # words of each output that are measured, from its start, so that outputs of
                                # at least so many are equally long; 0: all.  With a cut there are no gold
                                # measures: half a text states other facts
    convention: Literal["sound", "paper"] = "sound"     # paper: the authors' tokens and counts, V = 50,257
    max_n: Orders = 5           # distinct-n, EAD and entropy are means over n = 1..max_n
    vocabulary: Kinds = 0       # V of EAD; 0: number of different words in all references read (in all
                                # outputs, where there are no references); 50,257 with --convention paper


# ----------------------------------------------------------------------------------------------------- tokens

def words(text):
    """Runs of letters and digits, and each punctuation mark: the sound tokens.  For scripts that put spaces
    between words and have no combining marks, such as Latin, Greek and Cyrillic."""
    return re.findall(r"\w+|[^\w\s]", text)


def paper_words(text):
    """The authors' tokens: newlines and dots are deleted (gluing what they part: "b.\\nc" is "bc"), then
    single spaces split."""
    return [w for w in text.replace("\n", "").replace(".", "").split(" ") if w]


def conventions(convention, vocabulary):
    """(function of a text giving its tokens, value of an order without n-grams or None, function of n giving
    the vocabulary of n-grams)."""
    if convention == "paper":
        return paper_words, 0., lambda n: vocabulary
    return words, None, lambda n: vocabulary ** n


def reference_vocabulary(runs):
    """Number of different words in the references: a V for EAD that does not depend on the policies compared.
    0 where there are no references."""
    return len({w for rows in runs for row in rows for w in words(row["reference"])})


def output_vocabulary(runs):
    """Number of different words in the outputs, at least 2: V of EAD where there are no references."""
    return max(2, len({w for rows in runs for row in rows for text in row["outputs"] for w in words(text)}))


# ------------------------------------------------------------------------------------------- lexical measures
# outputs: a list of strings or of token lists.  N-grams never cross from one output into the next.

def distinct_n(outputs, n, tokenise=words):
    """Different n-grams / all n-grams (Li et al. 2016), in [0, 1]; nan if no output has n tokens."""
    unique, total = _unique_and_total(outputs, n, tokenise)
    return unique / total if total else math.nan


def ead(outputs, n, vocabulary, tokenise=words):
    """Expectation-adjusted distinct-n, U / (V (1 - ((V - 1) / V)^C)) (Liu et al. 2022): U different n-grams
    over how many of V kinds C uniform draws would give, so that length alone does not lower it.  C: all
    n-grams.  nan if no output has n tokens.

    vocabulary: V, kinds of n-grams; for n > 1 the sound choice is (kinds of tokens)^n.  Raises ValueError for
    vocabulary < 2."""
    if vocabulary < 2:
        raise ValueError(f"ead: a vocabulary of {vocabulary}; at least 2 kinds are needed")
    unique, total = _unique_and_total(outputs, n, tokenise)
    return float(unique / expected_unique(total, vocabulary)) if total else math.nan


def expected_unique(total, vocabulary):
    """V (1 - ((V - 1) / V)^C): how many of V kinds C = total (a number or an array) uniform draws give.  This
    is exact for V^5 too, where 1 - 1/V rounds to 1."""
    return -float(vocabulary) * np.expm1(np.asarray(total) * math.log1p(-1 / vocabulary))


def averaged(values, missing=None):
    """Mean over n-gram orders, the first axis of values (max_n,) or (max_n, G).  Orders without n-grams (nan)
    are left out, or count as `missing`; nan where no order has any."""
    values = np.asarray(values, dtype=float)
    values = values if missing is None else np.where(np.isnan(values), missing, values)
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):     # 0 / 0: no order has n-grams
        mean = np.where(known, values, 0).sum(0) / known.sum(0)
    return mean if mean.ndim else float(mean)


def _unique_and_total(outputs, n, tokenise):
    unique, total = count_ngrams([_tokens(outputs, tokenise)], n)
    return float(unique[-1, 0]), float(total[-1, 0])


def _tokens(outputs, tokenise):
    return [tokenise(o) if isinstance(o, str) else o for o in outputs]


def ngram_entropy(outputs, n, tokenise=words):
    """Shannon entropy of the outputs' n-gram distribution, bits; nan if there are none."""
    grams = Counter(gram for tokens in _tokens(outputs, tokenise)
                    for gram in zip(*(tokens[i:] for i in range(n))))
    if not grams:
        return math.nan
    p = np.array(list(grams.values()), dtype=float) / grams.total()
    return float(-(p * np.log2(p)).sum()) + 0.


def self_bleu(outputs, max_n=4, tokenise=words, short_as_nltk=False):
    """Mean BLEU of each output against all the others (Zhu et al. 2018): 1 for copies, near 0 for strangers.
    Smoothed: an order without a match counts as 0.1 matches (Chen and Cherry 2014, method 1).  nan if no
    output has a token, and short_as_nltk: as in `self_bleus`.  Raises ValueError on fewer than two outputs.
    """
    return float(self_bleus([_tokens(outputs, tokenise)], max_n, short_as_nltk).mean())


def self_bleus(groups, max_n=4, short_as_nltk=False):
    """BLEU of each output against the others of its group: (outputs,), groups laid end to end.  groups: lists
    of outputs, each a list of tokens.

    An output of fewer than max_n tokens has no n-grams of the largest orders.  They are left out of its mean,
    so that copies of it are 1 too.  A group without any token is nan, because 0 would say that it is diverse.
    short_as_nltk=True counts each of the missing orders as 0.1 matches of 1, and a group without tokens as 0,
    as NLTK's sentence_bleu does, up to rounding; copies of two tokens are then 0.316.  Raises ValueError on a
    group of fewer than two, and on strings."""
    _refuse_strings(groups)
    if min(map(len, groups)) < 2:
        raise ValueError("self_bleu: at least two outputs are needed")
    outputs, group = [tokens for g in groups for tokens in g], group_of_text(groups)
    lengths = np.array([len(tokens) for tokens in outputs])
    orders = np.full(len(outputs), max_n) if short_as_nltk else lengths.clip(1, max_n)
    log_precision, any_word = np.zeros(len(outputs)), None
    for n, (owner, gram) in enumerate(ngram_ids(outputs, max_n), 1):
        match = clipped_matches(owner, gram, group)
        precision = np.where(match > 0, match, 0.1) / np.maximum(1, lengths - n + 1)
        log_precision += np.where(n <= orders, np.log(precision) / orders, 0.)
        any_word = match > 0 if n == 1 else any_word
    brevity = np.concatenate([_log_brevity([len(t) for t in g]) for g in groups])
    # NLTK: without one common word the score is 0, whatever the smoothing
    bleu = np.where(any_word, np.exp(log_precision + brevity), 0.)
    if not short_as_nltk:
        bleu[np.bincount(group, lengths)[group] == 0] = math.nan
    return bleu


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


def _refuse_strings(groups):
    """Raises ValueError where an output is a string, whose letters would count as tokens."""
    if any(isinstance(output, str) for group in groups for output in group):
        raise ValueError("outputs must be lists of tokens, as from `words`, not strings")


def lexical_measures(groups, convention="sound", max_n=5, vocabulary=50257):
    """{measure: (G,)} of G groups of K outputs, each a list of tokens.  distinct-n, EAD and entropy are means
    over n = 1..max_n; self-BLEU is there from K = 2 on; length is in tokens.  A measure is nan for a group
    that does not have it.  Raises ValueError on strings."""
    _refuse_strings(groups)
    _, missing, kinds = conventions(convention, vocabulary)
    orders = range(1, max_n + 1)
    unique, total = (counts[:, :-1] for counts in count_ngrams(groups, max_n))
    total[total == 0] = np.nan
    expected = [expected_unique(total[n - 1], kinds(n)) for n in orders]
    found = {"distinct_n": averaged(unique / total, missing), "ead": averaged(unique / expected, missing)}
    if len(groups[0]) > 1:
        nltk = convention == "paper"
        found["self_bleu"] = self_bleus(groups, short_as_nltk=nltk).reshape(len(groups), -1).mean(1)
    found["entropy"] = averaged([[ngram_entropy(g, n) for g in groups] for n in orders], missing)
    found["length"] = np.array([sum(map(len, g)) / len(g) for g in groups])
    return found


# ---------------------------------------------------------------------------------------- measures of content

def embedding_diversity(embeddings):
    """One minus the mean pairwise cosine of n embeddings (n, D).  Over pairs the cosines sum to (|sum u|^2 -
    n) / 2, u the unit vectors: linear in n.  Raises ValueError on fewer than two."""
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


def vendi_score(embeddings):
    """Effective number of different outputs: exp of the Shannon entropy of the eigenvalues of K / n, K the
    cosines (Friedman and Dieng 2023).

    embeddings: (n, D).  Between 1, all alike, and n, all orthogonal.  The smaller of K (n, n) and its dual
    (D, D) is decomposed, because they have the same eigenvalues above 0."""
    x = np.asarray(embeddings, dtype=np.float64)
    u = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    gram = u @ u.T if len(u) <= u.shape[1] else u.T @ u
    p = np.linalg.eigvalsh(gram / len(u))
    p = p[p > 1e-12]
    return float(np.exp(-(p * np.log(p)).sum()))


def nli_diversity(outputs, points):
    """Mean over ordered pairs of what the second says of the first: contradiction +1, neutral 0, entailment
    -1, times the classifier's certainty (Stasaski and Hearst 2022).  points: function of
    [(premise, hypothesis)] giving (n,), as from `load_nli`.  Raises ValueError on fewer than two outputs, and
    UserError on points that are not finite."""
    if len(outputs) < 2:
        raise ValueError("nli_diversity: at least two outputs are needed")
    found = np.asarray(points(list(permutations(outputs, 2))))
    check(np.isfinite(found).all(), "--nli: the points of a pair are not finite; the classifier's weights "
          f"are damaged; the first output to that prompt begins {outputs[0][:40]!r}")
    return float(found.mean())


def content_measures(groups, embeddings=None, gold=None):
    """{measure: (G,)} of what G groups of K outputs say; nothing below K = 2.  groups: lists of texts;
    embeddings: (G, K, D) array or None; gold: module of a synthetic task, which reads the facts, or None."""
    found = {}
    if len(groups[0]) > 1 and embeddings is not None:
        found |= {"embedding": per_input(embeddings, embedding_diversity),
                  "vendi": per_input(embeddings, vendi_score)}
    if len(groups[0]) > 1 and gold:
        pairs = per_input(groups, gold.gold_diversity)
        found |= {"gold_diversity": pairs[:, 0], "fact_sets": pairs[:, 1]}
    return found


# -------------------------------------------------------------------- what kind of diversity, of what is good
# A policy may lose diversity because fewer of its outputs are bad, or because the good ones narrow.  Both
# need to know which outputs are good: a bool each, such as "its reward is at least the reference's".

def distinct_k(classes):
    """Number of different outputs among k, by their classes of equal content, such as fact sets
    (NoveltyBench, Zhang et al. 2025)."""
    return len(set(classes))


def utility_k(classes, utilities, patience=0.8):
    """Utility of k outputs, in order, to a user who looks at the next one with chance `patience` and gains
    from new content only (NoveltyBench, Zhang et al. 2025):

    (1 - p) / (1 - p^k) sum_i p^(i - 1) [class i is new] u_i, in the unit of the utilities."""
    seen, total = set(), 0.
    for i, (c, u) in enumerate(zip(classes, utilities, strict=True)):
        total += patience ** i * u * (c not in seen)
        seen.add(c)
    return (1 - patience) / (1 - patience ** len(classes)) * total


def among_good(outputs, good, measure):
    """measure of the good outputs of one input; nan for fewer than two of them."""
    kept = [output for output, is_good in zip(outputs, good, strict=True) if is_good]
    return measure(kept) if len(kept) > 1 else math.nan


def split_of_loss(all_before, all_after, good_before, good_after):
    """How much of a loss of diversity goes with outputs that are not good ("errors"), and how much is a
    narrower choice among the good ones.

    All (n,), of the same n inputs: the diversity of all outputs and of the good ones, before and after.  With
    e = all - good, what the errors add to diversity, all_before - all_after = (e_before - e_after) +
    (good_before - good_after) on every input.  Returns {"errors_removed", "narrowing", "loss"}, Intervals
    over the inputs where both policies have two good outputs, and "inputs", their number; None without
    any."""
    before, after, good_before, good_after = (np.asarray(x, dtype=float) for x in (
        all_before, all_after, good_before, good_after))
    known = ~np.isnan(good_before + good_after)
    if not known.any():
        return None
    loss, narrowing = (before - after)[known], (good_before - good_after)[known]
    return {"errors_removed": mean_interval(loss - narrowing), "narrowing": mean_interval(narrowing),
            "loss": mean_interval(loss), "inputs": int(known.sum())}


def good_measures(rows, gold):
    """Of one run on a synthetic task: {measure: (n,)} of the outputs whose gold reward is at least the
    reference's.  good: their fraction; good_gold_diversity; good_distinct: different contents among them;
    utility: `utility_k` with the gold reward of a good output, which is negative where the reference's is
    too, and 0 of another.  gold: the task's module.  Raises ValueError on a prompt of another task."""
    found = {name: [] for name in ("good", "good_gold_diversity", "good_distinct", "utility")}
    for row in rows:
        least = gold.gold_reward(row["prompt"], row["reference"])
        rewards = [gold.gold_reward(row["prompt"], text, finished)
                   for text, finished in zip(row["outputs"], row["finished"])]
        good, contents = [r >= least for r in rewards], [gold.facts(text) for text in row["outputs"]]
        found["good"].append(np.mean(good))
        found["good_gold_diversity"].append(
            among_good(row["outputs"], good, lambda texts: gold.gold_diversity(texts)[0]))
        found["good_distinct"].append(distinct_k([c for c, is_good in zip(contents, good) if is_good]))
        found["utility"].append(utility_k(contents, [r * g for r, g in zip(rewards, good)]))
    return {name: np.array(values, dtype=float) for name, values in found.items()}


# ----------------------------------------------------------------------------------- per input, across inputs

def per_input(groups, measure):
    """measure of the K outputs of each input: (n,).  groups: n lists (or arrays) of K outputs.  Its mean is
    the paper's per-input diversity."""
    return np.array([measure(group) for group in groups])


def across_input(groups, measure):
    """measure of one output of each input, for each of the K choices of that output: (K,).  The paper takes
    the first; the mean of all uses the data once more.  groups: n lists (or arrays) of K outputs."""
    return per_input(zip(*groups), measure)


def measure_samples(rows, embeddings=None, gold=None, nli=None, convention="sound", max_n=5,
                    vocabulary=50257):
    """All measures of one sample file: {"per_input": {measure: (n,)}, "across": {measure: (K,)}}.

    embeddings: (n, K, D) array or None; gold: module of a synthetic task or None; nli: as from `load_nli`, or
    None, for the outputs of one input only (across inputs all is neutral).  A measure that needs two outputs
    is left out where there are fewer."""
    texts = [row["outputs"] for row in rows]
    tokenise = conventions(convention, vocabulary)[0]
    tokens = [[tokenise(text) for text in group] for group in texts]
    lexical = partial(lexical_measures, convention=convention, max_n=max_n, vocabulary=vocabulary)
    columns = None if embeddings is None else np.ascontiguousarray(embeddings.swapaxes(0, 1))   # (K, n, D)
    out = {"per_input": lexical(tokens) | content_measures(texts, embeddings, gold),
           "across": lexical(list(zip(*tokens))) | content_measures(list(zip(*texts)), columns, gold)}
    if nli and len(texts[0]) > 1:
        out["per_input"]["nli"] = per_input(texts, partial(nli_diversity, points=nli))
    return out


def half_spread(rows, embeddings, measured, draws=20, seed=0):
    """{measure: standard deviation of its across-input value} for files with one output an input: over random
    halves of the inputs, whose spread estimates that of all inputs.  measured: function of (rows,
    embeddings)."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(draws):
        half = rng.permutation(len(rows))[:max(2, len(rows) // 2)]
        of_half = measured([rows[i] for i in half], None if embeddings is None else embeddings[half])
        found.append(of_half["across"])
    values = {m: [f[m][0] for f in found if not np.isnan(f[m][0])] for m in found[0]}
    return {m: float(np.std(x, ddof=1)) for m, x in values.items() if len(x) > 1}


# ------------------------------------------------------------------------------------------------- the tables

# measures in [0, 1]
IN_UNIT_INTERVAL = ("distinct_n", "self_bleu", "gold_diversity", "fact_sets", "good", "good_gold_diversity")
COLUMNS = {"distinct_n": "distinct", "ead": "EAD", "self_bleu": "self-BLEU", "embedding": "embed",
           "vendi": "Vendi", "nli": "NLI", "entropy": "entropy", "gold_diversity": "gold",
           "fact_sets": "fact sets", "length": "length"}
OF_GOOD = {"good": "good", "good_gold_diversity": "gold of good", "good_distinct": "different good",
           "utility": "utility"}
LEGEND = """convention {}, n = 1..{}, V = {}.  Lower self-BLEU is more diverse; for all others, higher.
per input: mean over inputs [95 % interval over inputs]
across inputs: mean +- standard deviation over the choice of output (of one: over halves of the inputs)"""


def first_words(rows, n):
    """Rows whose outputs hold only their first n words, and the white space before and between these."""
    start = re.compile(rf"(?:\s*\S+){{0,{n}}}")
    return [row | {"outputs": [start.match(text)[0] for text in row["outputs"]]} for row in rows]


def embed_outputs(rows, encode):
    """Embeddings of all outputs of one run: (n, K, D).  Raises UserError on one that is not finite, and on
    one of zeros, which has no direction."""
    embeddings = np.asarray(encode([text for row in rows for text in row["outputs"]]))
    embeddings = embeddings.reshape(len(rows), len(rows[0]["outputs"]), -1)
    damaged = np.argwhere(~np.isfinite(embeddings).all(axis=2) | ~embeddings.any(axis=2))
    if len(damaged):
        i, k = damaged[0]
        raise UserError(f"--encoder: the embedding of output {k + 1} of policy {rows[i]['policy']} to prompt "
                        f"{rows[i]['id']!r} is not finite, or zero; the encoder's weights are damaged, or "
                        "bf16 is too coarse for them (--dtype fp32)")
    return embeddings


def mean_of_defined(measure, values):
    """Interval of the mean of a measure's values (n,) that are not nan; None where all are."""
    defined = values[~np.isnan(values)]
    if len(defined) == 0:
        return None
    return rate_interval(defined) if measure in IN_UNIT_INTERVAL else mean_interval(defined)


def mean_and_spread(values):
    """(mean, standard deviation) of the values (K,) that are not nan; None where all are.  One value has no
    spread: None."""
    defined = values[~np.isnan(values)]
    if len(defined) == 0:
        return None
    return float(defined.mean()), float(defined.std()) if len(defined) > 1 else None


def summarise(found, spread):
    """The result of `measure_samples` as {"per_input_<measure>": Interval, "across_<measure>": (mean,
    spread)}.  A measure that no input has is None.  spread: {measure: spread of the across-input mean}, where
    it is not that over the choice of output."""
    out = {f"per_input_{m}": mean_of_defined(m, x) for m, x in found["per_input"].items()}
    for measure, x in found["across"].items():
        mean = mean_and_spread(x)
        out[f"across_{measure}"] = (mean[0], spread[measure]) if mean and measure in spread else mean
    return out


def undefined(values):
    """{measure: number of inputs that do not have it}, such as empty outputs, which have no n-grams.  values:
    {measure: (n,)}."""
    missing = {m: int(np.isnan(x).sum()) for m, x in values.items()}
    return {m: n for m, n in missing.items() if n}


def interval_cell(x):
    return "-" if x is None else f"{Interval(*x):.3f}"


def spread_cell(x):
    if x is None:
        return "-"
    mean, spread = x
    return f"{mean:.3f}" if spread is None else f"{mean:.3f} +- {spread:.3f}"


def print_tables(results):
    """The tables of one split.  results: lines of diversity.json."""
    for kind, title, cell in (("per_input", "per input", interval_cell),
                              ("across", "across inputs", spread_cell)):
        known = [m for m in COLUMNS if any(f"{kind}_{m}" in line for line in results)]
        rows = [[*names_of(line)[1:], *(cell(line.get(f"{kind}_{m}")) for m in known)] for line in results]
        print(f"\n{title}")
        print(text_table([*NAMES[1:], *(COLUMNS[m] for m in known)], rows, labels=3))


def print_good(results):
    """The table of what is good, where the task says so."""
    rows = [[*names_of(line), *(interval_cell(line["among_good"][m]) for m in OF_GOOD),
             line["undefined"].get("good_gold_diversity", 0)] for line in results if "among_good" in line]
    if rows:
        print("\namong outputs whose gold reward is at least the reference's, per input: their fraction; the "
              "gold\ndiversity of two or more of them; how many different contents; NoveltyBench's utility;\n"
              "left out: inputs with fewer than two of them, which have no gold diversity")
        print(text_table([*NAMES, *OF_GOOD.values(), "left out"], rows, labels=4))


# characters of scripts without spaces between words: Thai to Khmer, Japanese, Chinese
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")


def cautions(line, rows):
    """What the tables cannot say of one run, a sentence each.  line: of diversity.json; rows: of the run."""
    found, missing = [], {COLUMNS[m]: n for m, n in line["undefined"].items() if m in COLUMNS}
    for n in sorted(set(missing.values())):
        names = [name for name, of_name in missing.items() if of_name == n]
        found.append(f"{', '.join(names)} leave{'s' * (len(names) == 1)} out {n} of {len(rows)} inputs, "
                     "whose outputs are empty or too short")
    texts = [text for row in rows for text in row["outputs"]]
    empty = sum(not text.strip() for text in texts)
    if empty:
        found.append(f"{empty} of {len(texts)} outputs are empty: distinct, EAD and entropy are of the "
                     "others, and self-BLEU counts an empty one as unlike all")
    if any(map(UNSPACED.search, texts)):
        found.append("some outputs are in a script without spaces between words: a token is a whole phrase "
                     "there, and distinct, EAD, self-BLEU and entropy say little")
    if any(line.get(key) and line[key][0] > 1 for key in ("per_input_ead", "across_ead")):
        found.append("EAD is above 1, because the outputs repeat n-grams less often than random draws of "
                     "that many kinds do")
    return found


def size_of(line):
    return f"{line['inputs']} inputs x {line['outputs']} outputs"


def print_unequal_sizes(results):
    """Prints which runs of one split cannot be compared by every measure.  results: lines of
    diversity.json."""
    for split in dict.fromkeys(line["split"] for line in results):
        policies = {}       # {size: policies}
        for line in results:
            if line["split"] == split:
                policies.setdefault(size_of(line), []).append(short_name(line["policy"]))
        if len(policies) > 1:
            sizes = "; ".join(f"{', '.join(names)}: {size}" for size, names in policies.items())
            print("\n" + textwrap.fill(
                f"{short_name(split)}: runs differ in size ({sizes}). Distinct, EAD, self-BLEU, Vendi, "
                "entropy and fact sets depend on it: compare runs of one size by these", WIDTH))


def print_cautions(results, runs):
    """Prints `cautions` of every run.  results: lines of diversity.json; runs: as from `read_all`."""
    fewest = min(len(rows) for rows in runs.values())
    if fewest < FEW_PROMPTS:
        print(f"\na run has only {fewest} input{'s' * (fewest > 1)}: its intervals say little")
    for line in results:
        key = tuple(line[field] for field in KEY)
        for caution in cautions(line, runs[key]):
            print("\n" + textwrap.fill(f"{run_name(key)}: {caution}", WIDTH))


def measures_of_good(key, rows, gold):
    """`good_measures` of one run.  Raises UserError, which names the run, on a prompt of another task."""
    try:
        return good_measures(rows, gold)
    except ValueError as error:
        raise UserError(f"{run_name(key)}: {error}; leave out the field task, or name the right one"
                        ) from None


def vocabulary_for(cfg, runs):
    """V of EAD; prints where it comes from if it was not given."""
    if cfg.vocabulary or cfg.convention == "paper":
        return cfg.vocabulary or 50257
    known = reference_vocabulary(runs)
    print(f"V of EAD: the different words in the {'references' if known >= 2 else 'outputs'} of all files "
          "read; --vocabulary V makes EAD\ncomparable with that of other files")
    return known if known >= 2 else output_vocabulary(runs)


def main(cfg):
    device, _ = setup(cfg)
    path, runs = output_path(cfg.out, "diversity.json"), read_all(cfg.files)
    nli = load_nli(cfg.nli, device) if cfg.nli else None
    encode = load_encoder(cfg.encoder, device, cfg.dtype) if encoder_wanted(cfg.encoder) else None
    if cfg.encoder and encode is None:
        print("no ckpt_sft.pt here: no embedding measures; --encoder CHECKPOINT adds them")
    vocabulary = vocabulary_for(cfg, runs.values())
    print(LEGEND.format(cfg.convention, cfg.max_n, vocabulary))
    results = []
    for key, rows in runs.items():
        rows = first_words(rows, cfg.cut) if cfg.cut else rows
        embeddings = embed_outputs(rows, encode) if encode else None
        task = None if cfg.cut else synthetic_task(known_task(rows))
        measured = partial(measure_samples, gold=task, nli=nli, convention=cfg.convention, max_n=cfg.max_n,
                           vocabulary=vocabulary)
        n, k = len(rows), len(rows[0]["outputs"])
        spread = half_spread(rows, embeddings, measured) if k == 1 and n > 3 else {}
        found = measured(rows, embeddings)
        of_good = measures_of_good(key, rows, task) if task else {}
        line = dict(zip(KEY, key)) | {"inputs": n, "outputs": k} | summarise(found, spread)
        line["undefined"] = undefined(found["per_input"] | of_good)
        if task:
            line["among_good"] = {m: mean_of_defined(m, x) for m, x in of_good.items()}
        results.append(line)
    for split in dict.fromkeys(line["split"] for line in results):
        of_split = [line for line in results if line["split"] == split]
        print(f"\n--- {short_name(split)}: {', '.join(dict.fromkeys(map(size_of, of_split)))}")
        print_tables(of_split)
    print_good(results)
    print_unequal_sizes(results)
    print_cautions(results, runs)
    write_json(path, {"convention": cfg.convention, "max_n": cfg.max_n, "vocabulary": vocabulary,
                      "results": results})
    print(f"\nwrote {path}")


if __name__ == "__main__":
    launch(main, Config, __doc__)
