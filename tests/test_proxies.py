"""The tests of diversity measures: a proxy that follows gold diversity passes them, one that opposes it
fails."""
import json
import random

import numpy as np
import pytest

from study import proxies
from tasks import synthetic


def test_content_sets_hold_what_they_say():
    groups = [[f"{i} {j}" for j in range(8)] for i in range(10)]
    sets = proxies.content_sets(groups, 20, np.random.default_rng(0))
    assert sorted({m for m, _ in sets}) == [1, 2, 4, 8] and len(sets) == 80
    for m, chosen in sets:
        assert len(set(chosen)) == len(chosen) == 8 and len({i for i, _ in chosen}) == m


def test_phrasings_share_facts_and_stories_share_form():
    rng = random.Random(0)
    texts, others = synthetic.phrasings(rng, 16), synthetic.stories(rng, 16)
    assert len({synthetic.facts(t) for t in texts}) == 1 and len(synthetic.facts(texts[0])) == 5
    assert len(set(texts)) == 16 and synthetic.gold_diversity(others)[0] > .5
    skeletons = {" ".join(synthetic.FACT[w][0] if w in synthetic.FACT else w for w in t.split())
                 for t in others}
    assert len(skeletons) == 1


def toy_conditions(f):
    """Conditions at three temperatures whose gold diversity is the temperature, and a measure f(gold)."""
    rng, out = np.random.default_rng(0), []
    for policy in ("sft", "ppo"):
        for t in (.3, .7, 1.):
            gold = t + .02 * rng.standard_normal(20)
            out.append({"policy": policy, "temperature": t, "seed": 0,
                        "per_input": {"gold_diversity": gold.tolist(), "ead": f(gold).tolist(),
                                      "length": rng.standard_normal(20).tolist()},
                        "content": {"m": [1] * 5 + [2] * 5, "ead": [*range(10)], "length": [0] * 10}})
    return out


@pytest.mark.parametrize("sign", [1, -1])
def test_a_proxy_that_follows_gold_diversity_scores_one_and_its_opposite_minus_one(sign):
    conditions = toy_conditions(lambda x: sign * x)
    tests = proxies.gold_test(conditions, "ead")
    for name in ("between", "within"):
        assert tests[name].mean == pytest.approx(sign, abs=.01), name
    assert sign * proxies.temperature_test(conditions, "ead").mean > .9
    content = proxies.content_test(conditions, "ead").mean
    assert content > .8
    conditions[0]["content"]["ead"] = [1.] * 10
    assert proxies.content_test(conditions, "ead").mean == content      # what does not vary has no ranks


def count_words(texts):
    """A stand-in for an encoder."""
    return np.array([[t.count(w) for w in (" my ", "was", ".")] for t in texts], dtype=float)


def sample_rows(n, temperature=1., seed=0):
    """Of each prompt four references; colder, more often the first one."""
    rng = random.Random(seed)
    return [{"id": r["id"], "prompt": r["prompt"], "reference": r["reference"], "policy": "sft",
             "split": "test", "temperature": temperature, "seed": seed, "task": "synthetic",
             "outputs": [r["references"][0] if rng.random() > temperature else rng.choice(r["references"])
                         for _ in range(4)]} for r in synthetic.rows("test", n)]


def test_a_condition_measures_its_sets():
    """Against every set measured by itself."""
    rows = sample_rows(5)
    found = proxies.condition(rows, 100, count_words, 3)
    assert set(found["per_input"]) == {*proxies.MEASURES, proxies.GOLD}
    assert found["content"]["m"] == [1] * 3 + [2] * 3 + [4] * 3
    sets = proxies.content_sets([r["outputs"] for r in rows], 3, np.random.default_rng(0))
    for i, (_, chosen) in enumerate(sets):
        texts = [rows[a]["outputs"][b] for a, b in chosen]
        for m, (value,) in proxies.measure_sets([texts], count_words(texts)[None], 100).items():
            assert found["content"][m][i] == pytest.approx(value, abs=1e-12), m


@pytest.mark.slow
def test_all_tests_of_real_conditions():
    conditions = [proxies.condition(sample_rows(10, t, seed), 100, count_words, 10)
                  for t in (.3, .7, 1.) for seed in (0, 1)]
    tests = {t["measure"]: t for t in proxies.all_tests(conditions, proxies.form_test(100, count_words, 10, 4))}
    assert set(tests) == {proxies.GOLD, *proxies.MEASURES}
    assert tests["gold_diversity"]["form"][0] == 1          # stories differ in what they say, phrasings do not
    assert tests["gold_diversity"]["temperature"].mean > 0 and "between" not in tests["gold_diversity"]
    assert tests["ead"]["between"].mean > .5 and -1 <= tests["ead"]["within"].mean <= 1
    json.dumps(list(tests.values()))
