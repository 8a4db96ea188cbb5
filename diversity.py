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
from common.flags import Machine, Natural, arg, launch, setup
from common.samples import KEY, by_prompt, known_task, print_table, prompts_of, read_all, run_name
from common.stats import FEW_PROMPTS, mean_interval, rate_interval
from splits import synthetic_task

MAX_N = 5       # distinct-n and EAD are means over n = 1..5


@dataclass
class Config(Machine):
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
    between words.  Equal words are one string in memory, which keeps counting fast."""
    return list(map(sys.intern, re.findall(r"\w+|[^\w\s]", text)))


def paper_words(text):
    """The authors' tokens: newlines and dots are deleted ("b.\\nc" is "bc"), then single spaces split."""
    return [sys.intern(w) for w in text.replace("\n", "").replace(".", "").split(" ") if w]


TOKENISERS = {"sound": words, "paper": paper_words}


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
    over how many of V kinds C uniform draws, C all n-grams, would give, so that length alone does not lower
    it.  nan if no output has n tokens.  vocabulary: V; for n > 1 the sound choice is (kinds of tokens)^n.
    Raises ValueError for V < 2."""
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

    Orders longer than an output are left out of its mean, so that copies of it are 1 too.  Outputs without
    any token are nan, because 0 would say that they are diverse.  short_as_nltk=True counts each of these
    orders as 0.1 matches of 1, no tokens as 0, as NLTK does.  Raises ValueError on fewer than two outputs."""
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
    the other output has it.  The two largest counts of an n-gram answer for all outputs: the one with the
    largest is held against the second largest, so no pair of outputs is compared."""
    counts, two_largest = [Counter(ngrams(tokens, n)) for tokens in outputs], {}
    for of_output in counts:
        for gram, count in of_output.items():
            largest, second = two_largest.get(gram, (0, 0))
            two_largest[gram] = (count, largest) if count > largest else (largest, max(count, second))
    for of_output in counts:
        yield sum(two_largest[gram][1] if count == two_largest[gram][0] else count
                  for gram, count in of_output.items())


def closest_length(length, lengths):
    """The closest of the other outputs' lengths, the shorter of two equally close.  lengths: Counter."""
    others = (x for x, count in lengths.items() if x != length or count > 1)
    return min(others, key=lambda x: (abs(x - length), x))


def lexical_measures(groups, convention="sound", vocabulary=50257):
    """{measure: (G,)} of G groups of K outputs.  distinct-n and EAD are means over n = 1..MAX_N; self-BLEU is
    there from K = 2 on; length is in tokens."""
    paper, found = convention == "paper", []
    missing = 0. if paper else None         # what an order without n-grams counts as
    for group in groups:
        tokens = tokens_of(group, TOKENISERS[convention])
        counts = {n: ngram_counts(tokens, n) for n in range(1, MAX_N + 1)}
        of_each_n = [ead(c, n, vocabulary if paper else vocabulary ** n) for n, c in counts.items()]
        found.append({"distinct_n": averaged([distinct_n(c, n) for n, c in counts.items()], missing),
                      "ead": averaged(of_each_n, missing)})
        if len(tokens) > 1:
            found[-1]["self_bleu"] = self_bleu(tokens, short_as_nltk=paper)
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
    -1, times the classifier's certainty (Stasaski and Hearst 2022).  points: as from `load_nli`.  Raises
    UserError on points that are not finite."""
    mean = float(np.mean(points(list(permutations(outputs, 2)))))
    if not math.isfinite(mean):
        raise UserError("--nli: the points of a pair are not finite; the classifier's weights are damaged")
    return mean


def per_input(groups, measure):
    """measure of the K outputs of each input: (n,).  groups: n lists (or arrays) of K outputs."""
    return np.array([measure(group) for group in groups])


def across_input(groups, measure):
    """measure of one output of each input, for each of the K choices of that output: (K,).  The paper takes
    the first.  groups: n lists (or arrays) of K outputs."""
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
# A policy may lose diversity because fewer of its outputs are bad, or because the good ones narrow.

def utility_k(classes, utilities, patience=0.8):
    """Utility of k outputs, in order, to a user who looks at the next one with chance `patience` and gains
    from new content only (NoveltyBench, Zhang et al. 2025).  classes: the content of each, such as fact sets.

    (1 - p) / (1 - p^k) sum_i p^(i - 1) [class i is new] u_i"""
    seen, total = set(), 0.
    for i, (c, u) in enumerate(zip(classes, utilities, strict=True)):
        total += patience ** i * u * (c not in seen)
        seen.add(c)
    return (1 - patience) / (1 - patience ** len(classes)) * total


def split_of_loss(all_before, all_after, good_before, good_after):
    """How much of a loss of diversity goes with outputs that are not good ("errors"), and how much is a
    narrower choice among the good ones.  Arrays (n,) of the same n inputs: the diversity of all outputs and
    of the good ones, before and after.

    With e = all - good, what the errors add to diversity, all_before - all_after = (e_before - e_after) +
    (good_before - good_after).  Returns {"loss", "errors_removed", "narrowing"}; nan where one of the two has
    fewer than two good outputs."""
    narrowing = good_before - good_after
    loss = np.where(np.isnan(narrowing), np.nan, all_before - all_after)
    return {"loss": loss, "errors_removed": loss - narrowing, "narrowing": narrowing}


def good_measures(rows, gold):
    """Of one run on a synthetic task: {measure: (n,)} of the outputs whose gold reward is at least the
    reference's.  good: their fraction; good_gold_diversity; good_distinct: different contents among them;
    utility: `utility_k` with the gold reward of a good output and 0 of another.  gold: the task's module."""
    found = []
    for row in rows:
        least = gold.gold_reward(row["prompt"], row["reference"])
        rewards = [gold.gold_reward(row["prompt"], text, finished)
                   for text, finished in zip(row["outputs"], row["finished"])]
        contents = [gold.facts(text) for text in row["outputs"]]
        good = [i for i, r in enumerate(rewards) if r >= least]
        pairs = gold.gold_diversity([row["outputs"][i] for i in good])[0] if len(good) > 1 else math.nan
        found.append({"good": len(good) / len(rewards), "good_gold_diversity": pairs,
                      "good_distinct": len({contents[i] for i in good}),
                      "utility": utility_k(contents, [r * (r >= least) for r in rewards])})
    return {measure: np.array([x[measure] for x in found], dtype=float) for measure in found[0]}


def measure_samples(rows, embeddings=None, gold=None, nli=None, convention="sound", vocabulary=50257):
    """All measures of one sample file: {"per_input": {measure: (n,)}, "across": {measure: (K,)}}.

    embeddings: (n, K, D) array or None; gold: module of a synthetic task or None; nli: as from `load_nli`, or
    None, per input only, because across inputs all is neutral."""
    texts = [row["outputs"] for row in rows]
    found = {"per_input": lexical_measures(texts, convention, vocabulary)
             | content_measures(texts, embeddings, gold),
             "across": lexical_measures(list(zip(*texts)), convention, vocabulary)
             | content_measures(texts, embeddings, gold, across_input)}
    if nli and len(texts[0]) > 1:
        found["per_input"]["nli"] = per_input(texts, lambda outputs: nli_diversity(outputs, nli))
    return found


# ------------------------------------------------------------------------------------------------- the tables

IN_UNIT_INTERVAL = ("distinct_n", "self_bleu", "gold_diversity", "fact_sets", "good")  # ends of names
COLUMNS = {"distinct_n": "distinct", "ead": "EAD", "self_bleu": "self-BLEU", "embedding": "embed",
           "vendi": "Vendi", "nli": "NLI", "gold_diversity": "gold", "fact_sets": "fact sets",
           "length": "length"}
OF_GOOD = {"good": "good", "good_gold_diversity": "gold of good", "good_distinct": "different good",
           "utility": "utility"}
GLOSSARY = """distinct: different n-grams / all; EAD: the same, corrected for length; self-BLEU: likeness of
outputs, so lower is more diverse, of all others higher; embed: 1 - cosine of embeddings; Vendi: effective
number of outputs; gold: share of facts in which two outputs differ; fact sets: different contents / outputs;
length: words; utility: NoveltyBench's, of outputs in their order, of which only new contents count"""


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


def summarise(measure, values, prompts):
    """A measure in diversity.json: of values (n,) per input, of these prompts, the Interval of their mean, of
    values (K,) across inputs (mean, standard deviation or None).  nan is left out; None where all are."""
    x = values if measure.startswith("across_") else by_prompt(prompts, values)
    x = x[~np.isnan(x)]
    if len(x) == 0:
        return None
    if measure.startswith("across_"):
        return float(x.mean()), float(x.std()) if len(x) > 1 else None
    return rate_interval(x) if measure.endswith(IN_UNIT_INTERVAL) else mean_interval(x)


def spread_cell(x):
    numbers = x if isinstance(x, tuple) else (x,)
    return " +- ".join(f"{number:.3f}" for number in numbers if number is not None) or "-"


def in_and_out(lines):
    """The lines of the screen: of each policy that in distribution and one for its other splits, whose values
    are means of theirs, without intervals."""
    policies, shown = {}, []
    for line in lines:
        policies.setdefault((line["policy"], line["temperature"], line["seed"]), []).append(line)
    for of_policy in policies.values():
        others = [line for line in of_policy if line["split"] != "test"]
        shown += [line for line in of_policy if line["split"] == "test"] + others * (len(others) == 1)
        if len(others) > 1:
            known = [m for m, x in others[0].items() if isinstance(x, tuple)
                     and all(line.get(m) for line in others)]
            shown.append(others[0] | {"split": f"mean of {len(others)} others"} | {
                m: float(np.mean([line[m][0] for line in others])) for m in known})
    return sorted(shown, key=lambda line: line["split"] != "test")


def measure_run(key, rows, lexical, encode=None, nli=None, cut=0):
    """A line of diversity.json: all measures of one run, and of how many inputs each is undefined."""
    rows = first_words(rows, cut) if cut else rows
    embeddings = embed_outputs(rows, encode) if encode else None
    gold = None if cut else synthetic_task(known_task(rows))
    found = measure_samples(rows, embeddings, gold, nli, **lexical)
    measures = {f"{kind}_{m}": x for kind, of_kind in found.items() for m, x in of_kind.items()}
    try:
        measures |= good_measures(rows, gold) if gold else {}
    except ValueError as error:
        raise UserError(f"{run_name(key)}: {error}, though its field task says {known_task(rows)}") from None
    undefined = {m: int(np.isnan(x).sum()) for m, x in measures.items() if np.isnan(x).any()}
    line = dict(zip(KEY, key)) | {"inputs": len(rows), "outputs": len(rows[0]["outputs"])}
    line |= {measure: summarise(measure, x, prompts_of(rows)) for measure, x in measures.items()}
    return line | {"undefined": undefined}


def print_results(lines):
    print_table("per input: mean over inputs [95 % interval over inputs]", lines,
                {f"per_input_{m}": title for m, title in COLUMNS.items()})
    print_table("across inputs: mean +- standard deviation over the choice of output", lines,
                {f"across_{m}": title for m, title in COLUMNS.items()}, spread_cell)
    print_table("outputs whose gold reward is at least the reference's", lines, OF_GOOD)


def print_cautions(runs):
    if min(map(len, runs.values())) < FEW_PROMPTS:
        print(f"a run has fewer than {FEW_PROMPTS} inputs: its intervals say little")
    if len({(len(rows), len(rows[0]["outputs"])) for rows in runs.values()}) > 1:
        print("runs differ in size, on which distinct, EAD, self-BLEU, Vendi and fact sets depend")
    empty = sum(not text.strip() for rows in runs.values() for row in rows for text in row["outputs"])
    if empty:
        print(f"{empty} empty outputs have no n-grams and in self-BLEU are unlike all others")


def main(cfg):
    device, _ = setup(cfg)
    path, runs = output_path(cfg.out, "diversity.json"), read_all(cfg.files)
    nli = load_nli(cfg.nli, device) if cfg.nli else None
    task = known_task([row for rows in runs.values() for row in rows])
    encode = load_encoder(cfg.encoder, device, cfg.dtype, task=task)
    if cfg.encoder and encode is None:
        print("no ckpt_sft.pt of these samples' task: no embedding measures; --encoder CHECKPOINT adds them")
    vocabulary = 50257 if cfg.convention == "paper" else reference_vocabulary(runs.values())
    lexical = {"convention": cfg.convention, "vocabulary": vocabulary}
    results = [measure_run(key, rows, lexical, encode, nli, cfg.cut) for key, rows in runs.items()]
    write_json(path, lexical | {"results": results})        # before the tables, which `| head` may cut
    print_results(in_and_out(results))
    print(f"\n{GLOSSARY}\nconvention {cfg.convention}, V = {vocabulary}")
    print_cautions(runs)
    print(f"wrote {path}, with every split")


if __name__ == "__main__":
    launch(main, Config, __doc__)
