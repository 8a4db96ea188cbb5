"""How varied samples are: per input (outputs of one prompt) and across inputs (one output of each prompt).

    python diversity.py samples_*.jsonl                        # embeddings from ckpt_sft.pt, if it is there
    python diversity.py samples_*.jsonl --convention paper     # the authors' tokens, counts and vocabulary
    python diversity.py samples_*.jsonl --encoder sbert:all-MiniLM-L6-v2 --nli roberta-large-mnli

Prints tables and writes diversity.json.  Most measures move with the length of the outputs, so their mean
length stands in the same table.

Deviations from the paper, in the default convention `sound`: punctuation is a token and no words are glued;
n-gram orders longer than every output are left out instead of counting as 0, and so are, in self-BLEU, those
longer than the output; EAD's vocabulary for n-grams is V^n, because EAD exceeds 1 for large pools with V at
every n.  Embeddings are the mean-pooled last layer of the project's own SFT model.
"""
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import chain, permutations
from typing import Literal

import numpy as np

from common.embed import load_encoder, load_nli
from common.errors import UserError
from common.files import output_path, write_json
from common.flags import Common, Natural, arg, launch, setup
from common.samples import KEY, interval_cell, known_task, read_all, run_name, run_table
from common.stats import FEW_PROMPTS, mean_interval, rate_interval
from splits import synthetic_task

MAX_N = 5       # distinct-n and EAD are means over n = 1..5


@dataclass
class Config(Common):
    files: list = arg(None, "sample files")
    encoder: str = arg("ckpt_sft.pt", "checkpoint or published model whose hidden states embed the outputs, "
                                      "or sbert:NAME; '' or a missing default: no embeddings")
    nli: str = arg("", "a published classifier of entailment for NLI diversity (the paper's: "
                       "roberta-large-mnli); '': none")
    cut: Natural = arg(0, "measure the first CUT words of each output, so that long ones are equally long; "
                          "0: all.  No gold measures then: half a text states other facts")
    convention: Literal["sound", "paper"] = arg("sound", "paper: the authors' tokens and counts, and V = "
                                                         "50,257 in EAD, not the number of words in the "
                                                         "references")


# ----------------------------------------------------------------------------------------------------- tokens

def words(text):
    """Runs of letters and digits, and each punctuation mark: the sound tokens, for scripts that put spaces
    between words.  Equal words are one string in memory (intern), which keeps counting fast."""
    return list(map(sys.intern, re.findall(r"\w+|[^\w\s]", text)))


def paper_words(text):
    """The authors' tokens: newlines and dots are deleted (gluing what they part: "b.\\nc" is "bc"), then
    single spaces split."""
    return [sys.intern(w) for w in text.replace("\n", "").replace(".", "").split(" ") if w]


def reference_vocabulary(runs):
    """Number of different words in the references: a V for EAD that does not depend on the policies compared;
    in the outputs, where there are no references; at least 2."""
    known = {w for rows in runs for row in rows for w in words(row["reference"])}
    if len(known) < 2:
        known = {w for rows in runs for row in rows for text in row["outputs"] for w in words(text)}
    return max(2, len(known))


# ------------------------------------------------------------------------------------------- lexical measures
# outputs: a list of strings or of token lists.  N-grams never cross from one output into the next.

def tokens_of(outputs, tokenise):
    return [tokenise(o) if isinstance(o, str) else o for o in outputs]


def ngrams(tokens, n):
    """The n-grams of one output, as tuples, in order; none if it is shorter than n."""
    return zip(*(tokens[i:] for i in range(n)))


def ngram_counts(outputs, n, tokenise=words):
    """How often each n-gram occurs in all outputs together: a Counter.  A Counter is returned as it is."""
    if isinstance(outputs, Counter):
        return outputs
    return Counter(chain.from_iterable(ngrams(tokens, n) for tokens in tokens_of(outputs, tokenise)))


def distinct_n(outputs, n, tokenise=words):
    """Different n-grams / all n-grams (Li et al. 2016), in [0, 1]; nan if no output has n tokens."""
    counts = ngram_counts(outputs, n, tokenise)
    return len(counts) / counts.total() if counts else math.nan


def ead(outputs, n, vocabulary, tokenise=words):
    """Expectation-adjusted distinct-n, U / (V (1 - ((V - 1) / V)^C)) (Liu et al. 2022): U different n-grams
    over how many of V kinds C uniform draws would give, so that length alone does not lower it.  C: all
    n-grams.  nan if no output has n tokens.  vocabulary: V >= 2, kinds of n-grams; for n > 1 the sound choice
    is (kinds of tokens)^n.  Raises ValueError for V < 2."""
    if vocabulary < 2:
        raise ValueError(f"ead: a vocabulary of {vocabulary}; at least 2 kinds are needed")
    counts = ngram_counts(outputs, n, tokenise)
    # expm1 and log1p: exact for V^5 too, where 1 - 1/V rounds to 1
    expected = -vocabulary * math.expm1(counts.total() * math.log1p(-1 / vocabulary))
    return len(counts) / expected if counts else math.nan


def averaged(values, missing=None):
    """Mean over n-gram orders.  Orders without n-grams (nan) are left out, or count as `missing`; nan where
    no order has any."""
    known = [missing if math.isnan(v) else v for v in values if missing is not None or not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def self_bleu(outputs, max_n=4, tokenise=words, short_as_nltk=False):
    """Mean BLEU of each output against all the others (Zhu et al. 2018): 1 for copies, near 0 for strangers.
    Smoothed: an order without a match counts as 0.1 matches (Chen and Cherry 2014, method 1).

    An output of fewer than max_n tokens has no n-grams of the largest orders.  They are left out of its mean,
    so that copies of it are 1 too.  Outputs without any token are nan, because 0 would say that they are
    diverse.  short_as_nltk=True counts each of the missing orders as 0.1 matches of 1, and outputs without
    tokens as 0, as NLTK's sentence_bleu does; copies of two tokens are then 0.316.  Raises
    ValueError on fewer than two outputs."""
    outputs = tokens_of(outputs, tokenise)
    if len(outputs) < 2:
        raise ValueError("self_bleu: at least two outputs are needed")
    if not any(outputs) and not short_as_nltk:
        return math.nan
    lengths = Counter(map(len, outputs))
    log_bleu = [min(0., 1 - closest_length(len(o), lengths) / len(o)) if o else 0. for o in outputs]
    for n in range(1, max_n + 1):
        for i, (tokens, matches) in enumerate(zip(outputs, clipped_matches(outputs, n))):
            orders = max_n if short_as_nltk else min(max_n, len(tokens))
            if n == 1 and not matches:
                log_bleu[i] = -math.inf     # as NLTK: without one common word the score is 0
            elif n <= orders:
                log_bleu[i] += math.log((matches or 0.1) / max(1, len(tokens) - n + 1)) / orders
    return sum(map(math.exp, log_bleu)) / len(outputs)


def clipped_matches(outputs, n):
    """Yields for each output how many of its n-grams another output has too, each counted at most as often as
    the other output has it.  The two largest counts of an n-gram in one output answer for all outputs: that
    which has the largest is held against the second largest, so no pair of outputs is compared."""
    largest, second = {}, {}
    for tokens in outputs:
        for gram, count in Counter(ngrams(tokens, n)).items():
            most = largest.setdefault(gram, 0)
            if count > most:
                largest[gram], count = count, most
            if count:
                second[gram] = max(count, second.get(gram, 0))
    for tokens in outputs:      # counted once more, because keeping the counts of a large pool is slower
        counts = Counter(ngrams(tokens, n))
        yield sum(count if count < largest[gram] else second.get(gram, 0) for gram, count in counts.items())


def closest_length(length, lengths):
    """The closest of the other outputs' lengths, the shorter of two equally close.  lengths: Counter."""
    if lengths[length] > 1:
        return length
    return min((x for x in lengths if x != length), key=lambda x: (abs(x - length), x))


def conventions(convention, vocabulary):
    """(tokeniser, value of an order without n-grams or None, function of n giving V of n-grams)."""
    if convention == "paper":
        return paper_words, 0., lambda n: vocabulary
    return words, None, lambda n: vocabulary ** n


def lexical_measures(groups, convention="sound", vocabulary=50257):
    """{measure: (G,)} of G groups of K outputs.  distinct-n and EAD are means over n = 1..MAX_N; self-BLEU is
    there from K = 2 on; length is in tokens."""
    tokenise, missing, kinds = conventions(convention, vocabulary)
    found = []
    for group in groups:
        tokens = tokens_of(group, tokenise)
        counts = {n: ngram_counts(tokens, n) for n in range(1, MAX_N + 1)}
        found.append({"distinct_n": averaged([distinct_n(c, n) for n, c in counts.items()], missing),
                      "ead": averaged([ead(c, n, kinds(n)) for n, c in counts.items()], missing)})
        if len(tokens) > 1:
            found[-1]["self_bleu"] = self_bleu(tokens, short_as_nltk=convention == "paper")
        found[-1]["length"] = sum(map(len, tokens)) / len(tokens)
    return {measure: np.array([x[measure] for x in found]) for measure in found[0]}


# ---------------------------------------------------------------------------------------- measures of content

def unit_vectors(embeddings):
    x = np.asarray(embeddings, dtype=np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def embedding_diversity(embeddings):
    """One minus the mean pairwise cosine of n >= 2 embeddings (n, D).  Over pairs the cosines sum to
    (|sum u|^2 - sum |u|^2) / 2, u the unit vectors: linear in n.  Raises ValueError on fewer than two."""
    u = unit_vectors(embeddings)
    n, total = len(u), u.sum(axis=0)
    if n < 2:
        raise ValueError("embedding_diversity: at least two embeddings are needed")
    return float(1 - (total @ total - (u * u).sum()) / (n * (n - 1)))


def vendi_score(embeddings):
    """Effective number of different outputs: exp of the Shannon entropy of the eigenvalues of K / n, K the
    cosines of embeddings (n, D) (Friedman and Dieng 2023).  Between 1, all alike, and n, all orthogonal.  The
    smaller of K (n, n) and its dual (D, D) is decomposed: they have the same eigenvalues above 0."""
    u = unit_vectors(embeddings)
    gram = u @ u.T if len(u) <= u.shape[1] else u.T @ u
    p = np.linalg.eigvalsh(gram / len(u))
    p = p[p > 1e-12]
    return float(np.exp(-(p * np.log(p)).sum()))


def nli_diversity(outputs, points):
    """Mean over ordered pairs of what the second says of the first: contradiction +1, neutral 0, entailment
    -1, times the classifier's certainty (Stasaski and Hearst 2022).  points: function of [(premise,
    hypothesis)] giving (n,), as from `load_nli`.  Raises UserError on points that are not finite."""
    mean = float(np.mean(points(list(permutations(outputs, 2)))))
    if not math.isfinite(mean):
        raise UserError("--nli: the points of a pair are not finite; the classifier's weights are damaged")
    return mean


def per_input(groups, measure):
    """measure of the K outputs of each input: (n,).  groups: n lists (or arrays) of K outputs.  Its mean is
    the paper's per-input diversity."""
    return np.array([measure(group) for group in groups])


def across_input(groups, measure):
    """measure of one output of each input, for each of the K choices of that output: (K,).  The paper takes
    the first; the mean of all uses the data once more.  groups: n lists (or arrays) of K outputs."""
    return per_input(list(zip(*groups)), measure)


def content_measures(groups, embeddings=None, gold=None, over=per_input):
    """{measure: (n,) or (K,)} of what n groups of K outputs say, over `per_input` or `across_input`; nothing
    where a set has less than two.  groups: lists of texts; embeddings: (n, K, D) array or None; gold: module
    of a synthetic task, which reads the facts, or None."""
    found = {}
    if len(groups[0] if over is per_input else groups) < 2:
        return found
    if embeddings is not None:
        found |= {"embedding": over(embeddings, embedding_diversity), "vendi": over(embeddings, vendi_score)}
    if gold:
        pairs = over(groups, gold.gold_diversity)
        found |= {"gold_diversity": pairs[:, 0], "fact_sets": pairs[:, 1]}
    return found


# -------------------------------------------------------------------- what kind of diversity, of what is good
# A policy may lose diversity because fewer of its outputs are bad, or because the good ones narrow.  Both
# need to know which outputs are good: a bool each, such as "its reward is at least the reference's".

def utility_k(classes, utilities, patience=0.8):
    """Utility of k outputs, in order, to a user who looks at the next one with chance `patience` and gains
    from new content only (NoveltyBench, Zhang et al. 2025).  classes: the content of each, such as fact sets.

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
    narrower choice among the good ones.  Arrays (n,) of the same n inputs: the diversity of all outputs and
    of the good ones, before and after.

    With e = all - good, what the errors add to diversity, all_before - all_after = (e_before - e_after) +
    (good_before - good_after) on every input.  Returns {"loss", "errors_removed", "narrowing"}, arrays; nan
    on an input where one of the two has fewer than two good outputs."""
    before, after, good_before, good_after = (np.asarray(x, dtype=float) for x in (
        all_before, all_after, good_before, good_after))
    narrowing = good_before - good_after
    loss = np.where(np.isnan(narrowing), np.nan, before - after)
    return {"loss": loss, "errors_removed": loss - narrowing, "narrowing": narrowing}


def good_measures(rows, gold):
    """Of one run on a synthetic task: {measure: (n,)} of the outputs whose gold reward is at least the
    reference's.  good: their fraction; good_gold_diversity; good_distinct: different contents among them;
    utility: `utility_k` with the gold reward of a good output and 0 of another.  gold: the task's module.
    Raises ValueError on a prompt of another task."""
    found = {name: [] for name in ("good", "good_gold_diversity", "good_distinct", "utility")}
    for row in rows:
        least = gold.gold_reward(row["prompt"], row["reference"])
        rewards = [gold.gold_reward(row["prompt"], text, finished)
                   for text, finished in zip(row["outputs"], row["finished"])]
        good, contents = [r >= least for r in rewards], [gold.facts(text) for text in row["outputs"]]
        found["good"].append(np.mean(good))
        found["good_gold_diversity"].append(
            among_good(row["outputs"], good, lambda texts: gold.gold_diversity(texts)[0]))
        found["good_distinct"].append(len({c for c, is_good in zip(contents, good) if is_good}))
        found["utility"].append(utility_k(contents, [r * g for r, g in zip(rewards, good)]))
    return {name: np.array(values, dtype=float) for name, values in found.items()}


def measure_samples(rows, embeddings=None, gold=None, nli=None, convention="sound", **lexical):
    """All measures of one sample file: {"per_input": {measure: (n,)}, "across": {measure: (K,)}}.

    embeddings: (n, K, D) array or None; gold: module of a synthetic task or None; nli: as from `load_nli`, or
    None, per input only (across inputs all is neutral); lexical: the vocabulary."""
    texts, tokenise = [row["outputs"] for row in rows], conventions(convention, 0)[0]
    tokens = [tokens_of(outputs, tokenise) for outputs in texts]
    found = {"per_input": lexical_measures(tokens, convention, **lexical)
             | content_measures(texts, embeddings, gold),
             "across": lexical_measures(list(zip(*tokens)), convention, **lexical)
             | content_measures(texts, embeddings, gold, across_input)}
    if nli and len(texts[0]) > 1:
        found["per_input"]["nli"] = per_input(texts, lambda outputs: nli_diversity(outputs, nli))
    return found


# ------------------------------------------------------------------------------------------------- the tables

IN_UNIT_INTERVAL = ("distinct_n", "self_bleu", "gold_diversity", "fact_sets", "good", "good_gold_diversity")
COLUMNS = {"distinct_n": "distinct", "ead": "EAD", "self_bleu": "self-BLEU", "embedding": "embed",
           "vendi": "Vendi", "nli": "NLI", "gold_diversity": "gold", "fact_sets": "fact sets",
           "length": "length"}
OF_GOOD = {"good": "good", "good_gold_diversity": "gold of good", "good_distinct": "different good",
           "utility": "utility"}


def first_words(rows, n):
    """Rows whose outputs hold only their first n words, with the white space before and between these."""
    start = re.compile(rf"(?:\s*\S+){{0,{n}}}")
    return [row | {"outputs": [start.match(text)[0] for text in row["outputs"]]} for row in rows]


def embed_outputs(rows, encode):
    """Embeddings of all outputs of one run: (n, K, D).  Raises UserError on one that is not finite."""
    embeddings = np.asarray(encode([text for row in rows for text in row["outputs"]]))
    if not np.isfinite(embeddings).all():
        raise UserError("--encoder: an embedding is not finite; the encoder's weights are damaged, or bf16 "
                        "is too coarse for them (--dtype fp32)")
    return embeddings.reshape(len(rows), len(rows[0]["outputs"]), -1)


def mean_of_defined(measure, values):
    """Interval of the mean of a measure's values (n,) that are not nan; None where all are."""
    defined = values[~np.isnan(values)]
    if len(defined) == 0:
        return None
    return rate_interval(defined) if measure in IN_UNIT_INTERVAL else mean_interval(defined)


def summarise(found):
    """The result of `measure_samples` as {"per_input_<measure>": Interval, "across_<measure>": (mean,
    standard deviation over the choice of output)}; None where no input has the measure."""
    out = {f"per_input_{m}": mean_of_defined(m, x) for m, x in found["per_input"].items()}
    for measure, x in found["across"].items():
        x = x[~np.isnan(x)]
        spread = float(x.std()) if len(x) > 1 else None
        out[f"across_{measure}"] = (float(x.mean()), spread) if len(x) else None
    return out


def spread_cell(x):
    return "-" if x is None else f"{x[0]:.3f}" + ("" if x[1] is None else f" +- {x[1]:.3f}")


def print_tables(results):
    """results: lines of diversity.json."""
    for kind, title, cell in (
            ("per_input", "per input: mean over inputs [95 % interval over inputs]", interval_cell),
            ("across", "across inputs: mean +- standard deviation over the choice of output", spread_cell)):
        known = [m for m in COLUMNS if any(f"{kind}_{m}" in line for line in results)]
        print(f"\n{title}")
        print(run_table(results, {COLUMNS[m]: [cell(x.get(f"{kind}_{m}")) for x in results] for m in known}))
    good = [line for line in results if "among_good" in line]
    if good:
        print("\noutputs whose gold reward is at least the reference's; utility: NoveltyBench's")
        print(run_table(good, {title: [interval_cell(line["among_good"][m]) for line in good]
                               for m, title in OF_GOOD.items()}))


def print_cautions(results, runs):
    """What the tables cannot say.  results: lines of diversity.json; runs: as from `read_all`."""
    if min(map(len, runs.values())) < FEW_PROMPTS:
        print(f"\na run has fewer than {FEW_PROMPTS} inputs: its intervals say little")
    if len({(line["inputs"], line["outputs"]) for line in results}) > 1:
        print("\nruns differ in size, on which distinct, EAD, self-BLEU, Vendi and fact sets depend")
    empty = sum(not text.strip() for rows in runs.values() for row in rows for text in row["outputs"])
    if empty:
        print(f"\n{empty} empty outputs have no n-grams and in self-BLEU are unlike all others")


def measure_run(key, rows, lexical, encode=None, nli=None, cut=0):
    """A line of diversity.json: all measures of one run, and how many inputs do not have one."""
    rows = first_words(rows, cut) if cut else rows
    embeddings = embed_outputs(rows, encode) if encode else None
    gold = None if cut else synthetic_task(known_task(rows))
    found = measure_samples(rows, embeddings, gold, nli, **lexical)
    try:
        good = good_measures(rows, gold) if gold else {}
    except ValueError as error:
        raise UserError(f"{run_name(key)}: {error}, though its field task says {known_task(rows)}") from None
    missing = {m: int(np.isnan(x).sum()) for m, x in (found["per_input"] | good).items()}
    line = dict(zip(KEY, key)) | {"inputs": len(rows), "outputs": len(rows[0]["outputs"])} | summarise(found)
    line["undefined"] = {m: count for m, count in missing.items() if count}
    if gold:
        line["among_good"] = {m: mean_of_defined(m, x) for m, x in good.items()}
    return line


def main(cfg):
    device, _ = setup(cfg)
    path, runs = output_path(cfg.out, "diversity.json"), read_all(cfg.files)
    nli = load_nli(cfg.nli, device) if cfg.nli else None
    encode = load_encoder(cfg.encoder, device, cfg.dtype)
    if cfg.encoder and encode is None:
        print("no ckpt_sft.pt here: no embedding measures; --encoder CHECKPOINT adds them")
    vocabulary = 50257 if cfg.convention == "paper" else reference_vocabulary(runs.values())
    lexical = {"convention": cfg.convention, "vocabulary": vocabulary}
    results = [measure_run(key, rows, lexical, encode, nli, cfg.cut) for key, rows in runs.items()]
    print(f"convention {cfg.convention}, V = {vocabulary}.  Lower self-BLEU is more diverse; for all others, "
          "higher.")
    print_tables(results)
    print_cautions(results, runs)
    write_json(path, lexical | {"results": results})
    print(f"\nwrote {path}")


if __name__ == "__main__":
    launch(main, Config, __doc__)
