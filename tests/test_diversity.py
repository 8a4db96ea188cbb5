"""Measures of diversity: equal to NLTK and the Vendi score, to slow definitions, and to examples worked by
hand."""
import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

import diversity as D
import model as M
from common.embed import embed, load_nli
from common.errors import UserError
from common.files import write_jsonl
from conftest import call, json_lines, well_told
from tasks import synthetic


# ------------------------------------------------------------------------------------------- lexical measures

def test_distinct_and_ead_by_hand():
    """`a b a` and `a b`: 5 words, 2 kinds; bigrams ab, ba, ab: 3, 2 kinds.  EAD with V = 10, C = 5: 2 / (10
    (1 - .9^5)) = .4884"""
    outputs = ["a b a", "a b"]
    assert D.distinct_n(outputs, 1) == 2 / 5 and D.distinct_n(outputs, 2) == 2 / 3
    assert D.ead(outputs, 1, 10) == pytest.approx(2 / (10 * (1 - .9 ** 5)))
    assert math.isnan(D.distinct_n(outputs, 4)) and math.isnan(D.ead(outputs, 4, 10 ** 4))
    each = [D.distinct_n(outputs, n) for n in range(1, 6)]
    assert D.averaged(each) == pytest.approx((2 / 5 + 2 / 3 + 1) / 3)
    assert D.averaged(each, missing=0.) == pytest.approx((2 / 5 + 2 / 3 + 1) / 5)
    assert D.ngram_counts(outputs, 2) == {("a", "b"): 2, ("b", "a"): 1}         # none crosses two outputs


def slow_measures(tokens, max_n, kinds, missing):
    """(distinct-n, EAD) of one group, averaged over n, by their definitions."""
    found = []
    for n in range(1, max_n + 1):
        grams = [tuple(t[i:i + n]) for t in tokens for i in range(len(t) - n + 1)]
        unique, total = len(set(grams)), len(grams)
        if total:
            found.append((unique / total, unique / (kinds(n) * (1 - ((kinds(n) - 1) / kinds(n)) ** total))))
        elif missing is not None:
            found.append((missing,) * 2)
    return np.mean(found, axis=0) if found else [math.nan] * 2


@pytest.mark.parametrize("convention", ["sound", "paper"])
def test_lexical_measures_are_their_definitions(convention):
    """Repeats, outputs without a word, outputs shorter than n, a group without any."""
    rng = np.random.default_rng(0)
    tokenise, missing, kinds = {"sound": (D.words, None, lambda n: 7 ** n),
                                "paper": (D.paper_words, 0., lambda n: 7)}[convention]
    groups = [[" ".join(rng.choice(list("abc. "), rng.integers(0, 12))) for _ in range(4)] for _ in range(30)]
    groups[3] = ["", " ", "", ""]
    tokens = [[tokenise(t) for t in g] for g in groups]
    found = D.lexical_measures(tokens, convention, vocabulary=7)
    slow = np.array([slow_measures(g, 5, kinds, missing) for g in tokens]).T
    for name, expected in zip(("distinct_n", "ead"), slow):
        assert found[name] == pytest.approx(expected, nan_ok=True, abs=1e-12), name
    of_texts = D.lexical_measures(groups, convention, vocabulary=7)
    assert all((of_texts[name] == pytest.approx(x, nan_ok=True)) for name, x in found.items())


def test_ead_tends_to_distinct_n_for_large_vocabularies():
    """U / C in the limit; the naive 1 - ((V - 1) / V)^C would be 0 / 0 here."""
    outputs = ["one two three two", "two three four"]
    assert D.ead(outputs, 2, 10 ** 40) == pytest.approx(D.distinct_n(outputs, 2))


def test_paper_convention_glues_and_counts_as_the_authors_do():
    assert D.paper_words("a b.\nc d") == ["a", "bc", "d"] and D.paper_words("v 3.5 is") == ["v", "35", "is"]

    def paper(*texts):
        return D.lexical_measures([[D.paper_words(t) for t in texts]], "paper")
    assert paper("a b.\nc d", "a b. c d")["distinct_n"] == pytest.approx(0.7428571428571429)
    assert paper("a b.\nc d", "a b. c d")["ead"] == pytest.approx(0.7428776095250699, abs=1e-9)
    assert paper("a", "b c")["distinct_n"] == pytest.approx(.4)


def test_self_bleu_equals_nltk(refs):
    r = refs["self_bleu"]
    for n in range(1, 5):
        nltk = dict(max_n=n, tokenise=str.split, short_as_nltk=True)
        mean = r[f"sentence_method1_bleu{n}_mean"]
        assert D.self_bleu(r["sentences"], **nltk) == pytest.approx(mean, abs=1e-9)
    assert D.self_bleu(["a b c d e f"] * 2) == pytest.approx(1)


def slow_self_bleu(outputs, short_as_nltk, max_n=4):
    """The definition: clip against the maximum over every other output, for every output."""
    total = 0.
    for i, hypothesis in enumerate(outputs):
        others, log_p, first = outputs[:i] + outputs[i + 1:], 0., 0
        orders = max_n if short_as_nltk else min(max_n, len(hypothesis))
        for n in range(1, orders + 1):
            grams = [Counter(zip(*(o[j:] for j in range(n)))) for o in (hypothesis, *others)]
            best = Counter()
            for other in grams[1:]:
                best |= other
            match = (grams[0] & best).total()
            first = match if n == 1 else first
            log_p += math.log((match or .1) / max(1, grams[0].total())) / orders
        closest = min((len(o) for o in others), key=lambda r: (abs(r - len(hypothesis)), r))
        total += 0 if not first else math.exp(log_p + min(0., 1 - closest / len(hypothesis)))
    return total / len(outputs)


def test_linear_self_bleu_is_the_definition():
    rng = np.random.default_rng(0)
    groups = [[[str(w) for w in rng.integers(0, 12, rng.integers(1, 15))] for _ in range(12)]
              for _ in range(20)]
    for short_as_nltk, convention in ((True, "paper"), (False, "sound")):
        slow = [slow_self_bleu(outputs, short_as_nltk) for outputs in groups]
        assert [D.self_bleu(outputs, short_as_nltk=short_as_nltk) for outputs in groups] == pytest.approx(
            slow, abs=1e-12)
        assert D.lexical_measures(groups, convention)["self_bleu"] == pytest.approx(slow, abs=1e-12)


def test_short_copies_are_copies():
    """Two tokens have no 3-grams: NLTK counts these orders as 0.1 matches, (1 * 1 * .1 * .1)^(1/4)."""
    assert D.self_bleu(["a b"] * 3) == D.self_bleu(["a"] * 2) == pytest.approx(1)
    assert D.self_bleu(["a b"] * 3, short_as_nltk=True) == pytest.approx(.01 ** .25)
    assert D.self_bleu(["a b", "c d"]) == 0


def test_outputs_without_a_token_are_neither_copies_nor_strangers():
    """In the sound convention; NLTK says 0, which reads as the most diverse."""
    assert math.isnan(D.self_bleu(["", " "])) and D.self_bleu(["", " "], short_as_nltk=True) == 0
    groups = [[[], []], [["a"], ["a"]], [[], ["a"]]]
    assert D.lexical_measures(groups)["self_bleu"] == pytest.approx([math.nan, 1, 0], nan_ok=True)
    assert D.lexical_measures(groups, "paper")["self_bleu"] == pytest.approx([0, .1 ** .75, 0])


# ---------------------------------------------------------------------------------------- measures of content

def test_embedding_diversity_is_the_mean_over_pairs(refs):
    x = np.array(refs["vendi"]["X"])
    assert D.embedding_diversity(x) == pytest.approx(refs["vendi"]["mean_pairwise_cosine_distance"], abs=1e-9)
    x = np.random.default_rng(0).normal(size=(9, 4))
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [1 - u[i] @ u[j] for i in range(9) for j in range(i)]
    assert D.embedding_diversity(x) == pytest.approx(np.mean(pairs))
    assert D.embedding_diversity([[1, 0], [1, 0]]) == pytest.approx(0)


def test_vendi_equals_reference(refs):
    v = refs["vendi"]
    x = np.array(v["X"])
    assert D.vendi_score(x) == pytest.approx(v["score_X_q1"], abs=1e-6)
    assert v["score_K"]["1"] == pytest.approx(v["score_X_q1"], abs=1e-6)
    twice = np.concatenate((x, x))      # more rows than columns: through the smaller, dual matrix
    assert D.vendi_score(twice) == pytest.approx(D.vendi_score(x))
    assert D.vendi_score(np.eye(4)) == pytest.approx(4) and D.vendi_score(np.ones((4, 2))) == pytest.approx(1)


def test_nli_diversity_by_hand():
    """Three outputs, six ordered pairs: a and b contradict each other with certainty .8 both ways, a entails
    c with .6, all else is neutral: (.8 + .8 - .6) / 6."""
    said = {("a", "b"): .8, ("b", "a"): .8, ("a", "c"): -.6}

    def points(pairs):
        return np.array([said.get(p, 0.) for p in pairs])
    assert D.nli_diversity(["a", "b", "c"], points) == pytest.approx(1 / 6)


def test_nli_points_follow_the_labels_of_a_classifier(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "maybe"]))
    transformers.BertTokenizerFast(vocab_file=str(vocab)).save_pretrained(tmp_path)
    config = dict(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                  intermediate_size=16)
    for labels, wrong in ((["contradiction", "neutral", "entailment"], False), (["a", "b", "c"], True)):
        names = dict(enumerate(labels))
        model = transformers.BertForSequenceClassification(transformers.BertConfig(
            **config, id2label=names, label2id={v: k for k, v in names.items()})).eval()
        model.save_pretrained(tmp_path)
        if wrong:
            with pytest.raises(UserError, match="its labels are A, B, C"):
                load_nli(str(tmp_path), "cpu")
            continue
        pairs = [("yes", "no"), ("no", "maybe yes"), ("maybe", "yes")]
        ids = transformers.AutoTokenizer.from_pretrained(tmp_path)
        expected = []
        for pair in pairs:
            p = model(**ids(*pair, return_tensors="pt")).logits.softmax(-1)[0].detach()
            expected.append(float(p.max()) * (1, 0, -1)[int(p.argmax())])
        assert load_nli(str(tmp_path), "cpu")(pairs * 30) == pytest.approx(expected * 30, abs=1e-5)


def test_texts_that_an_encoder_does_not_read_to_their_end_are_counted(capfd):
    """Two texts that differ behind the context have one embedding."""
    letters = SimpleNamespace(eot_token=0, encode_ordinary=lambda text: [ord(c) - 96 for c in text])
    model = M.GPT(M.GPTConfig(vocab_size=27, n_layer=1, n_head=2, d_model=8, context=4))
    a, b, short = embed(model, letters, ["abcdx", "abcdy", "abc"])
    assert (a == b).all() and "2 of 3 texts are longer than the 4 tokens" in capfd.readouterr().out


# ----------------------------------------------------------------------------------- per input, across inputs

def test_per_input_and_across_by_hand():
    """Two inputs with two outputs: per input looks along a row, across inputs down a column."""
    rows = [{"outputs": ["a a", "a a"]}, {"outputs": ["b b", "c c"]}]
    found = D.measure_samples(rows)
    # of words and of pairs of words, longer n-grams there are none: (1/4 + 1/2) / 2 and (2/4 + 2/2) / 2
    assert found["per_input"]["distinct_n"].tolist() == [3 / 8, 3 / 4]
    assert found["across"]["distinct_n"].tolist() == [3 / 4, 3 / 4]


@pytest.mark.parametrize("k", [1, 3])
def test_all_measures_of_a_file_are_those_of_its_sets(k):
    """measure_samples against every measure asked for a row, or a column, by itself."""
    rows = [r | {"outputs": [t + " ok" * i for i, t in enumerate(r["references"][:k])]}
            for r in synthetic.rows("test", 6)]
    vectors = np.random.default_rng(0).standard_normal((6, k, 5)).astype(np.float32)
    found = D.measure_samples(rows, vectors, synthetic, vocabulary=50,
                              nli=lambda pairs: np.array([len(a) for a, _ in pairs]))
    texts = [r["outputs"] for r in rows]
    by_hand = {
        "distinct_n": lambda x: D.averaged([D.distinct_n(x, n) for n in range(1, 6)]),
        "ead": lambda x: D.averaged([D.ead(x, n, 50 ** n) for n in range(1, 6)]),
        "length": lambda x: np.mean([len(D.words(t)) for t in x]),
        "self_bleu": D.self_bleu,
        "gold_diversity": lambda x: synthetic.gold_diversity(x)[0],
        "fact_sets": lambda x: synthetic.gold_diversity(x)[1]}
    alone = {"distinct_n", "ead", "length"}      # need one output only
    assert set(found["per_input"]) == (alone if k == 1 else {*by_hand, "embedding", "vendi", "nli"})
    assert set(found["across"]) == {*by_hand, "embedding", "vendi"}
    for kind, arrange in (("per_input", D.per_input), ("across", lambda x, m: D.per_input(list(zip(*x)), m))):
        for name, values in found[kind].items():
            if name in by_hand:
                assert values == pytest.approx(arrange(texts, by_hand[name]), abs=1e-12), (kind, name)
        for name, measure in (("embedding", D.embedding_diversity), ("vendi", D.vendi_score)):
            if name in found[kind]:
                assert found[kind][name] == pytest.approx(arrange(vectors, lambda x: measure(np.stack(x))))


# ------------------------------------------------------------------------------------- what kind of diversity

def test_utility_by_hand():
    """Patience 1/2, k = 3: (1/2) / (1 - 1/8) = 4/7; the second repeats the first and adds nothing."""
    assert D.utility_k(["a", "a", "b"], [1, 5, 8], .5) == pytest.approx(4 / 7 * (1 + 8 / 4))
    # outputs that are all new and alike in utility are worth just that
    assert D.utility_k(list("abcd"), [3] * 4) == pytest.approx(3)
    # copies are worth the first one's share of attention
    assert D.utility_k(["a"] * 16, [1] * 16) == pytest.approx(.2 / (1 - .8 ** 16))


def test_a_loss_is_errors_removed_and_narrowing_and_nothing_else():
    """Input 1: diversity .6 to .3, of the good ones .4 to .3: .2 by errors removed, .1 by narrowing.  Input 3
    has too few good outputs."""
    found = D.split_of_loss(*np.array([[.6, .5, .9], [.3, .5, .1], [.4, .2, np.nan], [.3, .4, .1]]))
    assert found["loss"][:2] == pytest.approx([.3, 0.]) and np.isnan([x[2] for x in found.values()]).all()
    assert found["narrowing"][:2] == pytest.approx([.1, -.2])
    assert found["errors_removed"][:2] == pytest.approx([.2, .2])


def test_what_is_good_is_at_least_the_reference():
    row, = well_told("test", 1)
    twice = row["reference"]
    row |= {"outputs": [twice, " my cat .", twice, ""], "finished": [True] * 4}
    found = {k: x[0] for k, x in D.good_measures([row], synthetic).items()}
    assert found["good"] == .5 and found["good_distinct"] == 1 and found["good_gold_diversity"] == 0
    reward = synthetic.gold_reward(row["prompt"], twice)
    assert found["utility"] == pytest.approx(.2 / (1 - .8 ** 4) * reward)
    row["finished"] = [False] * 4       # an output without an end is not as good
    found = {k: x[0] for k, x in D.good_measures([row], synthetic).items()}
    assert found["good"] == 0 and math.isnan(found["good_gold_diversity"])      # of fewer than two outputs


# ------------------------------------------------------------------------------------------------- the script

def samples(path, policy, split, k=4, task="synthetic", n=6):
    rows = well_told(split, n)
    write_jsonl(path, [{"id": r["id"], "prompt": r["prompt"], "reference": r["reference"], "policy": policy,
                        "split": split, "temperature": 1.0, "seed": 0, "rewards": None, "task": task,
                        "outputs": [r["references"][(i * j) % 4] for j in range(k)]}
                       for i, r in enumerate(rows)])
    return path


def test_tables_fit_and_stand_in_the_order_of_the_study(tmp_path):
    files = [samples(tmp_path / f"{p}_{s}.jsonl", p, s) for p in ("ppo", "sft", "another", "bon", "base")
             for s in ("ood_article", "test")]
    got = call("diversity", *files, "--encoder", "", cwd=tmp_path)
    assert got.returncode == 0 and max(map(len, got.stdout.splitlines())) <= 110
    table = got.stdout.split("over inputs]\n")[1].split("\n\n")[0].splitlines()
    assert table[0].split() == ["split", "policy", "T", "distinct", "EAD", "self-BLEU"]
    assert [row.split()[:2] for row in table[1:]] == [[split, policy] for split in ("test", "ood_article")
                                                     for policy in ("base", "sft", "bon", "ppo", "another")]
    assert "gold" in got.stdout
    results = json.loads((tmp_path / "diversity.json").read_text())["results"]
    assert len(results) == 10 and len(results[0]["per_input_gold_diversity"]) == 3
    assert "outputs whose gold reward is at least" in got.stdout and len(results[0]["utility"]) == 3


def test_other_tasks_and_single_outputs_are_measured_without_what_they_lack(tmp_path):
    one = samples(tmp_path / "one.jsonl", "sft", "test", k=1, task="tldr")
    got = call("diversity", one, "--encoder", "", "--convention", "paper", "--cut", "3", cwd=tmp_path)
    assert got.returncode == 0 and "gold" not in got.stdout.split("\ndistinct:")[0] and "nan" not in got.stdout, got.stderr
    line, = json.loads((tmp_path / "diversity.json").read_text())["results"]
    assert "per_input_self_bleu" not in line
    assert line["across_self_bleu"][0] > 0 and line["across_self_bleu"][1] is None
    wrong = call("diversity", one, "--convention", "mine", cwd=tmp_path)
    assert wrong.returncode == 2 and "--convention mine: choose from sound, paper" in wrong.stderr


def strict(path):
    """JSON as the standard has it: without NaN."""
    def refuse(constant):
        raise AssertionError(constant)
    return json.loads(path.read_text(), parse_constant=refuse)


def test_what_is_not_there_becomes_no_number(tmp_path):
    path = samples(tmp_path / "s.jsonl", "sft", "test", task="tldr")
    rows = json_lines(path)
    for row in rows[1:]:
        row["outputs"] = [""] * 4
    write_jsonl(path, rows)
    got = call("diversity", path, "--encoder", "", cwd=tmp_path)
    assert got.returncode == 0, got.stderr
    assert "nan" not in got.stdout
    line, = strict(tmp_path / "diversity.json")["results"]
    assert line["undefined"]["per_input_ead"] == 5 and line["per_input_ead"][1:] == [None, None]
    write_jsonl(path, [row | {"outputs": [""] * 4} for row in rows])
    got = call("diversity", path, "--encoder", "", cwd=tmp_path)
    table = got.stdout.split("over inputs]\n")[1].splitlines()
    assert table[1].split() == ["test", "sft", "1.0", "-", "-", "-", "0.000", "[0.000,", "0.000]"]
    line, = strict(tmp_path / "diversity.json")["results"]
    assert line["per_input_self_bleu"] is line["across_ead"] is None and line["undefined"]["per_input_ead"] == 6


def test_what_cannot_be_compared_is_said(tmp_path):
    """Few prompts, runs of different size, empty outputs."""
    files = [samples(tmp_path / f"{name}.jsonl", name, "test", k) for name, k in (("sft", 4), ("ppo", 3))]
    rows = json_lines(files[0])
    write_jsonl(files[0], [row | {"outputs": ["", *row["outputs"][1:]]} for row in rows])
    said = call("diversity", *files, "--encoder", "", cwd=tmp_path).stdout
    assert "a run has fewer than 10 inputs" in said
    assert "runs differ in size" in said and "6 empty outputs" in said
    said = call("diversity", files[1], "--encoder", "", cwd=tmp_path).stdout
    assert "runs differ in size" not in said and "empty outputs" not in said


def test_a_cut_leaves_white_space_and_no_gold_measures(tmp_path):
    assert D.first_words([{"outputs": [" a\nb  c d", "e", ""]}], 3) == [{"outputs": [" a\nb  c", "e", ""]}]
    path = samples(tmp_path / "s.jsonl", "sft", "test")
    for cut, has_gold in ((0, True), (4, False)):
        got = call("diversity", path, "--encoder", "", "--cut", cut, cwd=tmp_path)
        line, = strict(tmp_path / "diversity.json")["results"]
        assert got.returncode == 0
        assert ("utility" in line) == ("per_input_gold_diversity" in line) == has_gold


def test_a_prompt_that_is_not_of_its_task_is_said_in_one_line(tmp_path):
    path = samples(tmp_path / "s.jsonl", "sft", "test")
    write_jsonl(path, [row | {"prompt": "POST: a cat"} for row in json_lines(path)])
    for script, *more in (("diversity", "--encoder", ""), ("generalisation",)):
        got = call(script, path, *more, cwd=tmp_path)
        assert got.returncode == 2 and "not a prompt of the synthetic task" in got.stderr, script
        assert len(got.stderr.strip().splitlines()) == 1 and "task says synthetic" in got.stderr


def test_v_is_that_of_the_references_or_of_the_outputs():
    rows = [{"reference": "a b . a", "outputs": ["c"]}]
    assert D.reference_vocabulary([rows, rows]) == 3
    assert D.reference_vocabulary([[{"reference": "", "outputs": ["a b c d", "a e"]}]]) == 5


def test_what_cannot_be_measured_is_refused_and_becomes_no_number():
    for refused in (lambda: D.self_bleu(["my car"]), lambda: D.embedding_diversity([[1., 0.]]),
                    lambda: D.ead(["my car", "my dog"], 1, 1)):
        with pytest.raises(ValueError, match="at least"):
            refused()
    rows = [{"outputs": ["my car", "my dog"]}]
    assert D.embed_outputs(rows, lambda texts: [[1., 0.]] * len(texts)).shape == (1, 2, 2)
    with pytest.raises(UserError, match="not finite"):
        D.embed_outputs(rows, lambda texts: [[math.nan, 0.]] * len(texts))
    with pytest.raises(UserError, match="not finite"):
        D.nli_diversity(["my car", "my dog"], lambda pairs: [math.nan] * len(pairs))


def test_the_default_encoder_is_of_the_samples_task(work, tmp_path):
    """What lies there of another task embeds nothing."""
    path = tmp_path / "samples_a_test.jsonl"
    rows = [{"id": i, "prompt": f"p{i}", "reference": "r", "outputs": ["a b", "c d"], "policy": "a", "split": "test"}
            for i in range(3)]
    for task, embeds in (("tldr", False), (None, True)):
        write_jsonl(path, [row | {"task": task} for row in rows])
        got = call("diversity", path, "--out", tmp_path, cwd=work)
        assert got.returncode == 0, got.stderr
        line, = json.loads((tmp_path / "diversity.json").read_text())["results"]
        assert ("per_input_embedding" in line) == embeds, got.stderr
        assert ("ckpt_sft.pt is of task synthetic, the samples of tldr" in got.stdout) == (not embeds)


def test_the_screen_has_means_of_the_shifted_sets():
    lines = [dict(policy=p, temperature=1., seed=0, split=s, per_input_ead=(x, 0., 1.), per_input_nli=None)
             for p, s, x in (("a", "test", .5), ("a", "ood_x", .2), ("a", "ood_y", .4), ("b", "test", .7),
                             ("b", "ood_x", .1))]
    shown = D.in_and_out(lines)
    assert [(x["policy"], x["split"]) for x in shown] == [("a", "test"), ("b", "test"), ("a", "mean of 2 others"),
                                                          ("b", "ood_x")]
    assert shown[2]["per_input_ead"] == pytest.approx(.3) and shown[2]["per_input_nli"] is None
    assert D.spread_cell(shown[2]["per_input_ead"]) == "0.300" and shown[3] is lines[4]
