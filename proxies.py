"""Which diversity measure to believe: each against the truth, against temperature, and against known content.

    python proxies.py samples_*.jsonl        # of several temperatures, policies, seeds, from bon.py
    python proxies.py t*/samples_sft_test.jsonl --encoder sbert:all-MiniLM-L6-v2

Prints tables and writes proxies.json.  The paper's measures are proxies: what outputs say is what should be
varied, and they see words or vectors.  Four tests; 1 is right every time, and 0 (in `content` and `form`, a
half) is chance:

  truth        in the embedded worlds, where it is known: Spearman's rank correlation with semantic diversity,
               over conditions (policy and temperature: does the measure order policies rightly?) and over the
               inputs of one condition, each also with mean length held fixed
  temperature  rank correlation with the sampling temperature (Tevet and Berant 2021)
  content      after their content test: sets of K outputs to m prompts, m = 1, 2, 4, ..., rank correlation
               with m; and how often a set of two prompts' outputs measures as more varied than one prompt's
  form         the same facts in K phrasings against K different stories in one phrasing: how often the
               stories measure as more varied.  A measure of words alone prefers the phrasings.

Deviation from Tevet and Berant: their content sets are written by people; here content is varied by mixing
the outputs of different prompts, which length alone cannot tell, and the form test by the embedded world's
grammar.
"""
import json
import random
from dataclasses import dataclass

import numpy as np

import diversity
import synthetic
from generalisation import read_all
from runtime import Common, bootstrap, out_file, require, run, setup, write_whole
from splits import auc, known_world

MEASURES = {k: diversity.COLUMNS[k]
            for k in ("distinct_n", "ead", "self_bleu", "entropy", "embedding", "vendi", "length")}
MEASURES["self_bleu"] = "1 - self-BLEU"     # the others rise with diversity
TRUTH = "semantic"


@dataclass
class Config(Common):
    files: list = None          # sample files
    encoder: str = "ckpt_sft.pt"    # as of diversity.py: a checkpoint, a published model or sbert:NAME
    sets: int = 100             # sets of each kind in the content and form tests


# -------------------------------------------------------------------------------------------- the mathematics

def ranks(x):
    """Ranks 0, 1, ... of x (n,), equal values sharing the mean of theirs."""
    x = np.asarray(x, dtype=float)
    _, where, count = np.unique(x, return_inverse=True, return_counts=True)
    return (count.cumsum() - (count + 1) / 2)[where]


def correlation(x, y):
    """Pearson's, of (n,) and (n,); nan where one of them does not vary."""
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else float("nan")


def spearman(x, y, given=None):
    """Spearman's rank correlation of x and y, (n,) each; with given (n,) the partial one, in which the ranks'
    linear dependence on those of `given` is taken out of both."""
    x, y = ranks(x), ranks(y)
    if given is None:
        return correlation(x, y)
    z = ranks(given) - (len(x) - 1) / 2
    if not z.any():
        return correlation(x, y)
    left = lambda v: v - v.mean() - z * (v @ z) / (z @ z)  # noqa: E731
    return correlation(left(x), left(y))


def resampled(statistic, n, draws=500):
    """(value, low, high): statistic of row numbers, on all n rows and over bootstrap draws of them."""
    rng = np.random.default_rng(0)
    found = np.array([statistic(rng.integers(0, n, n)) for _ in range(draws)])
    known = found[~np.isnan(found)]         # a draw of one value only has no ranks
    low, high = np.percentile(known if len(known) else [np.nan], (2.5, 97.5))
    return statistic(np.arange(n)), float(low), float(high)


# ------------------------------------------------------------------------------------------- one sample file

def of_set(texts, vectors, lexical, world=None):
    """{measure: value} of one set of outputs.  vectors: (K, D) or None."""
    words = [diversity.words(t) for t in texts]
    out = {m: lexical[m](words) for m in MEASURES if m in lexical}
    if vectors is not None:
        out |= {"embedding": diversity.embedding_diversity(vectors), "vendi": diversity.vendi_score(vectors)}
    if world:
        out[TRUTH] = world.semantic_diversity(texts)[0]
    return upward(out)


def upward(found):
    """Measures of one set, all turned so that more is more varied."""
    return found | {"self_bleu": 1 - found["self_bleu"]}


def content_sets(groups, sets, rng):
    """Sets of K outputs to m prompts, for m = 1, 2, 4, ... up to K: [(m, [(input, output)])] with numbers of
    inputs and of their outputs."""
    n, k, out, m = len(groups), len(groups[0]), [], 1
    while m <= min(n, k):
        for _ in range(sets):
            inputs = rng.choice(n, m, replace=False)
            out.append((m, [(i, j) for part, i in zip(np.array_split(np.arange(k), m), inputs)
                            for j in rng.choice(k, len(part), replace=False)]))
        m *= 2
    return out


def condition(rows, vocabulary, encode=None, sets=100):
    """Everything the tests need of one sample file, as plain lists: per_input {measure: (n,)}, across
    {measure: its mean}, content {m, measure: one value a set}."""
    groups, world, lexical = [r["outputs"] for r in rows], known_world(rows), diversity.measures(
        vocabulary=vocabulary)
    vectors = None
    if encode:
        vectors = np.asarray(encode([t for g in groups for t in g])).reshape(len(groups), len(groups[0]), -1)
    found = diversity.measure_samples(rows, vocabulary=vocabulary, embeddings=vectors, world=world)
    kept = [m for m in (*MEASURES, TRUTH) if m in found["per_input"]]
    of_all = {kind: upward({m: found[kind][m] for m in kept}) for kind in ("per_input", "across")}
    mixed = content_sets(groups, sets, np.random.default_rng(0))
    content = [of_set([groups[i][j] for i, j in chosen],
                      None if vectors is None else np.stack([vectors[i, j] for i, j in chosen]),
                      lexical, world) for _, chosen in mixed]
    return {"policy": rows[0]["policy"], "temperature": rows[0].get("temperature"),
            "seed": rows[0].get("seed"), "split": rows[0]["split"], "ids": [r["id"] for r in rows],
            "per_input": {m: np.asarray(v).tolist() for m, v in of_all["per_input"].items()},
            "across": {m: float(np.mean(v)) for m, v in of_all["across"].items()},
            "content": {"m": [m for m, _ in mixed], **{k: [c[k] for c in content] for k in content[0]}}}


# -------------------------------------------------------------------------------------------------- the tests

def truth_test(conditions, measure):
    """Rank correlations of a measure with the truth: {test: (value, low, high)}.  Conditions with one policy
    and temperature, of different seeds, are drawn together in the bootstrap.  None of fewer than three: they
    have no order to speak of."""
    names = sorted({(c["policy"], c["temperature"]) for c in conditions}, key=str)
    members = [[c for c in conditions if (c["policy"], c["temperature"]) == name] for name in names]
    if len(names) < 3:
        return {}

    def between(kind, given):
        # (conditions of one name, 3) means of the measure, the truth and length
        means = [np.array([[np.nanmean(c[kind][m]) for m in (measure, TRUTH, "length")] for c in group])
                 for group in members]

        def statistic(picks):
            x, y, z = np.concatenate([means[i] for i in picks]).T
            return spearman(x, y, z if given else None)
        return resampled(statistic, len(names))

    def within(given):
        rows = [np.nanmean([spearman(*(c["per_input"][m] for m in (measure, TRUTH)),
                                     c["per_input"]["length"] if given else None) for c in group])
                for group in members]
        return tuple(map(float, bootstrap([r for r in rows if not np.isnan(r)] or [np.nan])))
    out = {"between": between("per_input", False), "within": within(False),
           "across": between("across", False)}
    if measure != "length":
        out |= {"between_length": between("per_input", True), "within_length": within(True),
                "across_length": between("across", True)}
    return out


def breaks(conditions, measure):
    """Where a measure orders conditions least as the truth does: (policy, temperature, its rank by the
    measure, its rank by the truth, conditions), 1 the most varied.  Seeds are averaged."""
    names = sorted({(c["policy"], c["temperature"]) for c in conditions}, key=str)
    score = {m: np.array([np.mean([np.nanmean(c["per_input"][m]) for c in conditions
                                   if (c["policy"], c["temperature"]) == name]) for name in names])
             for m in (measure, TRUTH)}
    by_measure, by_truth = (len(names) - ranks(score[m]) for m in (measure, TRUTH))
    worst = int(np.argmax(np.abs(by_measure - by_truth)))
    return (*names[worst], int(by_measure[worst]), int(by_truth[worst]), len(names))


def temperature_test(conditions, measure):
    """Rank correlation of a measure with the temperature, over (temperature, input), averaged over policies
    and seeds with three temperatures or more: (value, low, high), bootstrapped over inputs; None without
    any."""
    groups = {}
    for c in conditions:
        if measure in c["per_input"] and isinstance(c["temperature"], (int, float)):
            groups.setdefault((c["policy"], c["seed"], c["split"]), []).append(c)
    ladders = [g for g in groups.values() if len(g) > 2 and len({tuple(c["ids"]) for c in g}) == 1]
    if not ladders:
        return None
    grids = [(np.array([c["temperature"] for c in g]), np.array([c["per_input"][measure] for c in g]))
             for g in ladders]
    n = min(x.shape[1] for _, x in grids)

    def statistic(picks):
        return float(np.mean([spearman(np.repeat(t, len(picks)), x[:, picks].ravel()) for t, x in grids]))
    return resampled(statistic, n, 200)


def content_test(conditions, measure):
    """(rank correlation with the number of prompts m, how often two prompts' outputs measure as more varied
    than one's), each (value, low, high), averaged over conditions and bootstrapped over them; of one
    condition, over sets."""
    def both(c, picks):
        m, x = np.array(c["content"]["m"])[picks], np.array(c["content"][measure])[picks]
        return spearman(m, x), auc(x[m == 1], x[m == 2])
    chosen = [c for c in conditions if measure in c["content"] and 2 in c["content"]["m"]]
    if not chosen:
        return None
    if len(chosen) == 1:
        n = len(chosen[0]["content"]["m"])
        return tuple(resampled(lambda picks, i=i: both(chosen[0], picks)[i], n, 200) for i in (0, 1))
    values = np.array([both(c, np.arange(len(c["content"]["m"]))) for c in chosen])
    mean, low, high = bootstrap(values)
    return tuple(zip(mean.tolist(), low.tolist(), high.tolist()))


def form_test(vocabulary, encode=None, sets=100, k=16):
    """{measure: (how often different stories in one phrasing measure as more varied than one story in k
    phrasings, low, high)}, the truth's own among them."""
    rng, lexical = random.Random(0), diversity.measures(vocabulary=vocabulary)
    found = {"form": [], "content": []}
    for kind, write in (("form", synthetic.phrasings), ("content", synthetic.stories)):
        for _ in range(sets):
            texts = write(rng, k)
            found[kind].append(of_set(texts, encode(texts) if encode else None, lexical, synthetic))
    values = {m: [np.array([x[m] for x in found[kind]]) for kind in ("form", "content")]
              for m in found["form"][0]}
    return {m: resampled(lambda picks, a=a, b=b: auc(a[picks], b[picks]), sets, 200)
            for m, (a, b) in values.items()}


def all_tests(conditions, form):
    """[{measure, test: (value, low, high) or None}] for every measure of the conditions, the truth first."""
    world = all(TRUTH in c["per_input"] for c in conditions)
    found = [m for m in (TRUTH, *MEASURES) if all(m in c["per_input"] for c in conditions)]
    out = []
    for m in found:
        line = {"measure": m, "temperature": temperature_test(conditions, m), "form": form.get(m)}
        line |= dict(zip(("content", "two_prompts"), content_test(conditions, m) or (None, None)))
        if world and m != TRUTH:
            if known := truth_test(conditions, m):
                line |= known | {"breaks": breaks(conditions, m)}
        out.append(line)
    return out


# ------------------------------------------------------------------------------------------------- the tables

TESTS = {"between": "conditions", "between_length": "length fixed", "within": "inputs",
         "within_length": "length fixed", "across": "across inputs", "across_length": "length fixed",
         "temperature": "temperature", "content": "content", "two_prompts": "2 prompts > 1", "form": "form"}
NAMES = MEASURES | {TRUTH: "the truth"}


def cells(line):
    """One line of `all_tests` as strings, in the order of TESTS."""
    return [f"{line[t][0]:.2f} [{line[t][1]:.2f}, {line[t][2]:.2f}]" if line.get(t) else "" for t in TESTS]


def main(cfg):
    device, _ = setup(cfg)
    require(cfg.sets >= 10, f"--sets {cfg.sets}: at least 10 for an interval")
    runs, encode = read_all(cfg.files), None
    for key, rows in runs.items():
        require(len(rows[0]["outputs"]) >= 4 and len(rows) >= 8,
                f"policy {key[0]}, split {key[3]}: {len(rows)} prompts with {len(rows[0]['outputs'])} "
                "outputs each; at least 8 prompts with 4 are needed (python bon.py --n 16)")
    if diversity.encoder_wanted(cfg.encoder):
        encode = diversity.encoder_of(cfg.encoder, device, cfg.dtype)
    else:
        print("no ckpt_sft.pt here: no embedding measures; --encoder CHECKPOINT adds them")
    vocabulary = diversity.reference_vocabulary(runs.values())
    conditions = [condition(rows, vocabulary, encode, cfg.sets) for rows in runs.values()]
    lines = all_tests(conditions, form_test(vocabulary, encode, cfg.sets))
    for line in lines:
        print(f"\n{NAMES[line['measure']]}")
        for (test, title), cell in zip(TESTS.items(), cells(line)):
            if cell:
                print(f"  {test:15} {title:14} {cell}")
        if "breaks" in line:
            policy, temperature, by_measure, by_truth, n = line["breaks"]
            print(f"  breaks most on {policy} at temperature {temperature}: number {by_measure} of {n} by "
                  f"it, {by_truth} by the truth")
    path = out_file(cfg.out, "proxies.json")
    write_whole(path,
                json.dumps({"vocabulary": vocabulary, "tests": lines, "conditions": conditions}).encode())
    print(f"\nwrote {path}")


if __name__ == "__main__":
    run(main, Config, __doc__)
