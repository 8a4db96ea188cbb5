"""Which diversity measure to believe: each against gold diversity, temperature, and known content.

`python reproduce.py --full` runs this.  What should vary is what outputs say.  The paper's measures see words
or vectors instead, so they are proxies.  Four tests rate them.  1 is right every time; chance is 0, but a
half in `form`:

  gold         where gold diversity is known: Spearman's rank correlation with it, over conditions (policy and
               temperature: does the measure order policies rightly?) and over the inputs of one condition
  temperature  rank correlation with the sampling temperature (Tevet and Berant 2021)
  content      after their content test: sets of K outputs to m prompts, m = 1, 2, 4, ..., rank correlation
               with m
  form         the same facts in K phrasings against K different stories in one phrasing: how often the
               stories measure as more varied.  A measure of words alone prefers the phrasings.

Deviation from Tevet and Berant: people write their content sets.  Here the outputs of different prompts are
mixed, because length alone cannot tell these sets apart, and the form test comes from the synthetic task's
grammar.
"""
import json
import random

import numpy as np

import diversity
from common.files import write_json
from common.samples import read_samples
from common.stats import auc_interval, bootstrap_statistic, mean_interval, spearman
from study.measures import encoder_and_vocabulary
from tasks import synthetic

GOLD = "gold_diversity"
MEASURES = {k: diversity.COLUMNS[k]
            for k in ("distinct_n", "ead", "self_bleu", "embedding", "vendi", "length")}
MEASURES["self_bleu"] = "1 - self-BLEU"     # because the others rise with diversity


# ------------------------------------------------------------------------------------------- one sample file

def measure_sets(sets, embeddings, vocabulary):
    """{measure: (S,)} of S sets of K texts.  embeddings: (S, K, D)."""
    found = diversity.lexical_measures(sets, vocabulary=vocabulary)
    return _upward(found | diversity.content_measures(sets, embeddings, synthetic))


def _upward(found):
    """The measures that are tested, all turned so that more is more varied."""
    found = found | {"self_bleu": 1 - found["self_bleu"]}
    return {m: found[m] for m in (*MEASURES, GOLD)}


def content_sets(groups, sets, rng):
    """Sets of K outputs to m prompts, for m = 1, 2, 4, ... up to K: [(m, [(input, output)])] with numbers of
    inputs and of their outputs.  groups: n lists of K outputs; sets: how many for each m."""
    n, k, out, m = len(groups), len(groups[0]), [], 1
    while m <= min(n, k):
        for _ in range(sets):
            inputs = rng.choice(n, m, replace=False)
            out.append((m, [(i, j) for part, i in zip(np.array_split(np.arange(k), m), inputs)
                            for j in rng.choice(k, len(part), replace=False)]))
        m *= 2
    return out


def condition(rows, vocabulary, encode, sets):
    """Everything that the tests need of one sample file, as plain lists: per_input {measure: (n,)}, content
    {m, measure: one value a set}.  encode: function of texts giving (n, D)."""
    groups, embeddings = [row["outputs"] for row in rows], diversity.embed_outputs(rows, encode)
    found = diversity.measure_samples(rows, embeddings, synthetic, vocabulary=vocabulary)["per_input"]
    mixed = content_sets(groups, sets, np.random.default_rng(0))
    content = measure_sets([[groups[i][j] for i, j in chosen] for _, chosen in mixed],
                           np.array([[embeddings[i, j] for i, j in chosen] for _, chosen in mixed]),
                           vocabulary)
    return {**{field: rows[0][field] for field in ("policy", "temperature", "seed")},
            "per_input": {m: x.tolist() for m, x in _upward(found).items()},
            "content": {"m": [m for m, _ in mixed], **{m: x.tolist() for m, x in content.items()}}}


# -------------------------------------------------------------------------------------------------- the tests
# Each gives Intervals.  conditions: as from `condition`.

def gold_test(conditions, measure):
    """Rank correlations of a measure with gold diversity: {test: Interval}.  `between` conditions, of which
    those with one policy and temperature, of different seeds, are drawn together in the bootstrap; and
    `within` one, over its inputs, averaged over the conditions of a group, the interval over groups."""
    names = [(c["policy"], c["temperature"]) for c in conditions]
    groups = [[c["per_input"] for c, own in zip(conditions, names) if own == name]
              for name in sorted(set(names), key=str)]
    means = [np.array([[np.nanmean(c[m]) for m in (measure, GOLD)] for c in group]) for group in groups]
    within = [_known_mean([spearman(c[measure], c[GOLD]) for c in group]).mean for group in groups]
    between = bootstrap_statistic(lambda picks: spearman(*np.concatenate([means[i] for i in picks]).T),
                                  len(groups))
    return {"between": between, "within": _known_mean(within)}


def _known_mean(correlations):
    """The mean of those that exist: a measure that is the same everywhere has no ranks.  An Interval."""
    return mean_interval([x for x in correlations if not np.isnan(x)] or [np.nan])


def temperature_test(conditions, measure):
    """Rank correlation with SFT's temperature, averaged over seeds, bootstrapped over inputs."""
    grids = []      # of each seed: (temperatures,) and (temperatures, inputs)
    for seed in dict.fromkeys(c["seed"] for c in conditions):
        own = [c for c in conditions if (c["policy"], c["seed"]) == ("sft", seed)]
        grids.append((np.array([c["temperature"] for c in own]),
                      np.array([c["per_input"][measure] for c in own])))

    def statistic(picks):
        return float(np.mean([spearman(np.repeat(t, len(picks)), x[:, picks].ravel()) for t, x in grids]))
    return bootstrap_statistic(statistic, grids[0][1].shape[1], 200)


def content_test(conditions, measure):
    """Rank correlation with the number of prompts m, averaged over conditions."""
    return _known_mean([spearman(c["content"]["m"], c["content"][measure]) for c in conditions])


def form_test(vocabulary, encode, sets=100, k=16):
    """{measure: Interval of how often k different stories in one phrasing measure as more varied than one
    story in k phrasings}, gold diversity among them."""
    rng, values = random.Random(0), []
    for write in (synthetic.phrasings, synthetic.stories):
        texts = [write(rng, k) for _ in range(sets)]
        values.append(measure_sets(texts, np.array([encode(t) for t in texts]), vocabulary))
    phrasings, stories = values
    return {m: auc_interval(phrasings[m], stories[m]) for m in phrasings}


def all_tests(conditions, form):
    """[{measure, test: Interval}] for every measure, gold diversity first.  form: as from `form_test`."""
    return [{"measure": m, "temperature": temperature_test(conditions, m), "form": form[m],
             "content": content_test(conditions, m), **(gold_test(conditions, m) if m != GOLD else {})}
            for m in (GOLD, *MEASURES)]


# ------------------------------------------------------------------------------------------ stage and numbers

TESTS = {"between": "orders policies as gold diversity does",
         "within": "orders prompts as gold diversity does", "temperature": "rises with temperature",
         "content": "rises with prompts mixed", "form": "stories above phrasings of one, how often"}
NAMES = MEASURES | {GOLD: "gold diversity"}


def measure(here, sets):
    """conditions.json: `condition` of every sample file on the test prompts, and the form test.  sets: of
    outputs, in the content test."""
    encode, vocabulary = encoder_and_vocabulary(here)
    paths = sorted([*here.glob("t[0-9]*/samples_*_test.jsonl"), *here.glob("more/samples_*_test.jsonl")])
    write_json(here / "conditions.json",
               {"conditions": [condition(read_samples(path), vocabulary, encode, sets) for path in paths],
                "form": form_test(vocabulary, encode)}, indent=None, allow_nan=True)


def numbers(folder, seeds):
    """`all_tests` over the conditions of all seeds.  Of the form test means over seeds, because only the
    encoder differs between them."""
    paths = [folder / f"seed{seed}" / "synthetic" / "conditions.json" for seed in seeds]
    found = [json.loads(path.read_text()) for path in paths]
    form = {m: np.mean([seed["form"][m] for seed in found], axis=0).tolist() for m in found[0]["form"]}
    return all_tests([c for seed in found for c in seed["conditions"]], form)
