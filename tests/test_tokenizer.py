"""Published tokenizers against the tokenizers library, whose ids stand in refs_published.json; the words kind
is tested in test_splits.py."""
import json
import random
import sys
from pathlib import Path

import pytest

if __name__ != "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from common import tokenizer as T
from common.errors import UserError
from common.tokenizer import character_bytes, load_tokenizer, published_spec, tokenizer_json
from splits import decode, encode_prompts

REFS = Path(__file__).parent / "refs_published.json"
ODD = ["Hello world, it's 2023!", "  two  spaces\n\n\ttabs\r\n", "naïve café — “quotes” … €100",
       "日本語のテキスト です",
       "emoji 👩‍👩‍👧‍👦 and 🏳️‍🌈", "a\u0300 combining", "x\x04y \x13z", "<|end|> is text", "", " ",
       "1234567 89", "don't WON'T I'LL",
       "\u00a0nbsp\u2003em\u3000full", "٣٤٥ ⅷ ½ ²", "zero\u200bwidth\ufeff", "\U0010ffff \U00050000!?",
       "a" * 50, "\x85\x1c\x1f",
       "<think>so</think> <|end|><think", "def f(x):\n        return  x\n    \n", "abc abcab bca aabbcc cab",
       "\u1100\u1161\u11a8 a\u0327\u0301 \u2126 \u212b", "x<tool><tools>y <tool"]


@pytest.fixture(scope="module")
def refs():
    return json.loads(REFS.read_text())["tokenizers"]


KINDS = ["bytes", "digits", "split", "shuffled ids", "missing bytes", "added tokens", "pythia", "qwen",
         "ignore merges", "whole pieces out of reach", "merge order", "random merges", "gaps"]


def load(data, eos=0, bos=None):
    return load_tokenizer({"kind": "bpe", "json": json.dumps(data), "eos": eos, "bos": bos})


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_equal_the_tokenizers_library(kind, refs):
    ref = refs[kind]
    tokenizer = load(ref["json"], eos=ref["eos"])
    for text, ids in zip(ODD + ref["texts"], ref["ids"], strict=True):
        assert tokenizer.encode_ordinary(text) == ids, text
        if not tokenizer.lacks:
            assert tokenizer.decode(ids) == tokenizer.normalise(text)


def test_bpe_by_hand(tmp_path):
    """Merges l+o, lo+w, e+r in this order: "lower" is l o w e r -> lo w e r -> low e r -> low er, and the
    ids are the vocabulary's, which are not in the order of merging."""
    vocab = {c: i for i, c in enumerate("werlo")} | {"er": 5, "low": 6, "lo": 7}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {"</s>": 8}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nl o\nlo w\ne r\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"eos_token": {"content": "</s>"}, "bos_token": "</s>", "add_bos_token": True}))
    spec = published_spec(tmp_path)
    tokenizer = load_tokenizer(spec)
    assert (spec["eos"], spec["bos"], tokenizer.n_vocab) == (8, 8, 9)
    assert tokenizer.encode_ordinary("lower") == [6, 5] and tokenizer.encode_ordinary("owl") == [4, 0, 3]
    assert tokenizer.decode([6, 5, 8, 999]) == "lower</s>"            # 999: a vocabulary's padding
    # begins with </s>, cut behind it
    assert encode_prompts(tokenizer, ["lower" * 5], 4) == [[8, 5, 6, 5]]
    assert decode(tokenizer, [6, 5, 8]) == ("lower", True)


def test_merges_by_hand(refs):
    """The list (b, c), (a, b), (ab, c): "abc" is a b c -> a bc, and nothing merges a with bc."""
    vocab = refs["merge order"]["json"]["model"]["vocab"]
    assert load(refs["merge order"]["json"]).encode_ordinary("abc") == [vocab["a"], vocab["bc"]]
    assert T.merge("aaaa", {("a", "a"): 1, ("aa", "a"): 0}) == ["aaa", "a"]     # a new pair may come first


def test_added_tokens_by_hand(refs):
    tokenizer = load(refs["added tokens"]["json"])
    assert tokenizer.encode_ordinary("<think>") == [340] and len(tokenizer.encode_ordinary("<|end|>")) > 1
    assert tokenizer.encode_ordinary("<tools>") == [343]                    # the longest
    assert tokenizer.decode([340, 0]) == "<think><|end|>" and tokenizer.n_vocab == 345


def directory(folder, data, **files):
    """A directory with tokenizer.json and other JSON files, named without their ending."""
    folder.mkdir(exist_ok=True)
    for name, content in (files | {"tokenizer": data}).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_other_files_add_tokens_and_make_them_special(refs, tmp_path):
    data, think = refs["bytes"]["json"], T._added("<think>", 340, special=False)
    config = {"eos_token": "<|end|>", "added_tokens_decoder": {
        "0": data["added_tokens"][0], "340": {k: v for k, v in think.items() if k != "id"}}}
    spec = published_spec(directory(tmp_path / "a", data, tokenizer_config=config))
    assert load_tokenizer(spec).encode_ordinary("<think>") == [340]
    legacy = dict(tokenizer_config={"eos_token": "<|end|>"}, added_tokens={"<think>": 340})
    spec = published_spec(directory(tmp_path / "b", data, **legacy))
    assert load_tokenizer(spec).encode_ordinary("<think>") == [340]
    config["additional_special_tokens"] = ["<think>"]
    tokenizer = load_tokenizer(published_spec(directory(tmp_path / "a", data, tokenizer_config=config)))
    assert len(tokenizer.encode_ordinary("<think>")) > 1 and tokenizer.special["<think>"] == 340
    # an older tokenizer_config.json is overruled by special_tokens_map.json, as in transformers
    spec = published_spec(directory(tmp_path / "b", data, tokenizer_config={"eos_token": "!"},
                                    special_tokens_map={"eos_token": {"content": "<|end|>"}}))
    assert spec["eos"] == 0


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def steps(*steps):
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}


def pattern(text, **options):
    return steps(SPLIT | {"pattern": {"Regex": text}} | options, LEVEL)


def model(**fields):
    return lambda data: {"model": data["model"] | fields}


def template(*parts):
    kinds = {"bos": {"SpecialToken": {"id": "<|end|>", "type_id": 0}},
             "text": {"Sequence": {"id": "A", "type_id": 0}}}
    special = {"<|end|>": {"id": "<|end|>", "ids": [0], "tokens": ["<|end|>"]}}
    return {"post_processor": {"type": "TemplateProcessing", "single": [kinds[p] for p in parts], "pair": [],
                               "special_tokens": special}}


REFUSED = [
    ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "Unigram"),
    (model(byte_fallback=True), "SentencePiece"),
    ({"normalizer": {"type": "NFKC"}}, "NFKC"),
    ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}},
     "Lowercase"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "ByteLevel"),
    ({"pre_tokenizer": None}, "pre-tokenizer None"),
    (steps(), "pre-tokenizer without steps"),
    (steps({"type": "Punctuation", "behavior": "Isolated"}, LEVEL), "Punctuation"),
    (pattern("(unclosed"), r"'\(unclosed' that cuts text cannot be read \(missing \)"),
    (pattern(r"\p{NoSuchThing}+"), "cannot be read"),
    (pattern(r"\h+"), "has '.*h', which is not implemented"),
    (pattern(r"\p{N}{1,3}+"), "has '3}.', which"),
    (pattern("(?m:.)"), "which is not implemented"),
    (pattern("a", behavior="MergedWithNext"), "with these options"),
    (pattern("[a-z]+", behavior="Removed", invert=True), "does not write back the text it read"),
    (model(vocab={"<|end|>": 0, "a": 1}, merges=[["b", "c"]]), "vocabulary lacks"),
    (lambda data: {"model": data["model"] | {"vocab": data["model"]["vocab"] | {"a": 5, "b": 5}}},
     "does not write back the text it read"),
    (model(dropout=0.1), "dropout"), (model(continuing_subword_prefix="##"), "continuing_subword_prefix"),
    (model(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    (model(unk_token="<|end|>", merges=[], vocab={"<|end|>": 0, "a": 1}), "stands for many texts"),
    ({"decoder": {"type": "Metaspace"}}, "decoder Metaspace"),
    ({"post_processor": {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}},
     "RobertaProcessing"),
    (template("text", "bos"), "only one token before"),
    (template("bos", "bos", "text"), "only one token before"),
    (lambda data: {"added_tokens": data["added_tokens"] + [T._added("<x>", 350, special=False)]},
     "'<x>' has the id 350, and transformers gives it 340"),
    (lambda data: {"added_tokens": data["added_tokens"] + [
        T._added("<x>", 340, special=False) | {"rstrip": True}]}, "'<x>' has rstrip"),
    ({"model": 7}, "damaged"), ({"model": {"type": "BPE", "vocab": [], "merges": []}}, "damaged"),
    (model(merges=[["a"]]), "no pair of tokens"), (model(merges=[["a", 1]]), "no pair of tokens"),
    (model(vocab={"<|end|>": 0, "a": "x"}), "an id is no number")]


@pytest.mark.parametrize("change, words", REFUSED, ids=range(len(REFUSED)))
def test_tokenizers_that_cannot_be_read_right_say_what_works(change, words, refs, tmp_path):
    data = refs["bytes"]["json"]
    data = data | (change(data) if callable(change) else change)
    folder = directory(tmp_path / "m", data, config={"eos_token_id": 0})
    with pytest.raises(UserError, match=words) as error:
        load_tokenizer(published_spec(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("named, words", [
    ({"eos_token": "<nowhere>"}, "eos_token '<nowhere>' has no id"),
    ({"add_eos_token": True}, "add_eos_token"), ({"add_prefix_space": True}, "add_prefix_space"),
    ({"split_special_tokens": True}, "split_special_tokens"),
    ({"auto_map": {"AutoTokenizer": "x.Y"}}, "auto_map"), ({"eos_token": "a"}, "is part of texts too")])
def test_fields_of_tokenizer_config_that_are_refused(named, words, refs, tmp_path):
    folder = directory(tmp_path / "m", refs["bytes"]["json"], tokenizer_config=named,
                       config={"eos_token_id": 0})
    with pytest.raises(UserError, match=words):
        published_spec(folder)


def test_what_is_not_followed_is_said_in_one_line_each(refs, tmp_path, capsys):
    folder = directory(tmp_path / "m", refs["missing bytes"]["json"], config={"eos_token_id": 0},
                       generation_config={"eos_token_id": [0, 7], "temperature": 0.6, "top_p": 1.0,
                                          "repetition_penalty": 1.1, "do_sample": True, "novelty": 3},
                       tokenizer_config={"eos_token": "<|end|>", "bos_token": "<|end|>",
                                         "add_bos_token": True})
    published_spec(folder)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 5 and all(str(folder) in line for line in said)
    assert "asks for temperature 0.6, repetition_penalty 1.1: nothing here follows it" in said[0]
    assert "not known here and are not read: novelty 3" in said[1]
    assert "add_bos_token True, tokenizer.json does otherwise" in said[2]
    assert "no ids for 5 of 256 bytes" in said[3] and "ends responses with 7 too; here only 0" in said[4]


def test_a_million_spaces_are_cut_or_refused(refs):
    text = " " * 1_100_000 + "a"
    tokenizer = load(refs["bytes"]["json"])
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text
    words = load_tokenizer(T.build_tokenizer(["a word"]))
    with pytest.raises(UserError, match="1,100,001 characters has more than 500,000 white-space characters"):
        words.encode_ordinary(text)
    assert words.decode(words.encode_ordinary("b" * 600_000)) == "b" * 600_000


@pytest.mark.parametrize("model_type, named, words", [
    ("qwen2", {}, "of a qwen2 model"), ("gpt2", {"tokenizer_class": "Qwen2Tokenizer"}, "a Qwen2Tokenizer")])
def test_a_vocabulary_alone_is_gpt_2_s_kind_only(model_type, named, words, tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "eos_token_id": 0}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    with pytest.raises(UserError, match=words):
        published_spec(tmp_path)


def test_a_sentencepiece_model_says_what_works(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(UserError, match="SentencePiece's tokenizer.model does not"):
        published_spec(tmp_path)


def test_llama_3_and_opt_begin_prompts_with_their_token(refs, tmp_path):
    data = refs["bytes"]["json"]
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}},
                                                         {"Sequence": {"id": "A", "type_id": 0}}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(
        data | {"post_processor": {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    spec = published_spec(tmp_path)
    assert spec["bos"] == 0 and spec["eos"] == 0
    assert encode_prompts(load_tokenizer(spec), ["Hello"], 100)[0][0] == 0




def random_merges(rng, letters, n):
    """(vocabulary, merges) that no training makes: pairs in any order, several that make one token."""
    tokens, merges = list(letters), []
    for _ in range(n):
        merges.append(f"{rng.choice(tokens)} {rng.choice(tokens)}")
        tokens.append(merges[-1].replace(" ", ""))
    rng.shuffle(merges)
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges


def trained(H, kind, patterns):
    """A tokenizer.json as a dict, trained by the tokenizers library (H)."""
    corpus = [t for t in ODD[:18] for _ in range(3)] + ["the low lower lowest newer new wide",
                                                        "it's don't we'll"] * 20
    level, isolated = H.pre_tokenizers.ByteLevel, H.pre_tokenizers.Split
    steps = {"digits": [H.pre_tokenizers.Digits(individual_digits=True), level(add_prefix_space=False)]}
    for name, pattern in patterns.items():
        steps[name] = [isolated(H.Regex(pattern), "isolated"), level(add_prefix_space=False, use_regex=False)]
    tok = H.Tokenizer(H.models.BPE())
    tok.pre_tokenizer = (H.pre_tokenizers.Sequence(steps[kind]) if kind in steps
                         else level(add_prefix_space=False))
    alphabet = sorted(level.alphabet())
    if kind == "missing bytes":     # no control characters, and none of the bytes of high planes
        alphabet = [c for c in alphabet if character_bytes()[c] not in (4, 19, 241, 242, 244)]
    texts = [t for t in corpus if kind != "missing bytes" or t.isascii() and t.isprintable()]
    tok.train_from_iterator(texts, H.trainers.BpeTrainer(vocab_size=340, special_tokens=["<|end|>"],
                                                         show_progress=False, initial_alphabet=alphabet))
    return json.loads(tok.to_str())


def shuffle_ids(data):
    """Ids by frequency, as OPT's, not in the order of merging."""
    vocab = data["model"]["vocab"]
    n = len(vocab)
    new = {t: (i * 7 + 1) % n if i else 0 for t, i in vocab.items()}
    free = set(range(n)) - set(new.values())
    twice = [t for t in vocab if list(new.values()).count(new[t]) > 1]
    new |= dict(zip([t for t in twice if vocab[t]], free))
    data["model"]["vocab"] = new


def make_tokenizers():
    """{kind: {"json", "eos", "texts", "ids"}} from the tokenizers library, with special tokens as text."""
    import tokenizers as H
    ending = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    start = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    patterns = {"split": start + r"|\p{N}{1,3}" + ending, "qwen": start + r"|\p{N}" + ending}
    data = {kind: trained(H, kind, patterns)
            for kind in ("bytes", "digits", "split", "shuffled ids", "missing bytes", "qwen")}
    shuffle_ids(data["shuffled ids"])
    data["qwen"]["normalizer"] = {"type": "NFC"}
    for kind in ("added tokens", "pythia", "ignore merges", "whole pieces out of reach", "gaps"):
        data[kind] = json.loads(json.dumps(data["bytes"]))
    for i, name in enumerate(("<think>", "</think>", "<tool>", "<tools>", "x<")):
        token = T._added(name, 340 + i, special=False) | {"normalized": name == "x<"}
        data["added tokens"]["added_tokens"].append(token)
        data["qwen"]["added_tokens"].append(token)
    data["pythia"]["normalizer"] = {"type": "NFC"}
    data["pythia"]["added_tokens"] += [T._added("<|padding|>", 340, special=True)] + [
        T._added(" " * n, 339 + n, special=False) for n in range(2, 9)]
    for kind, ignore in (("ignore merges", True), ("whole pieces out of reach", False)):
        model = data[kind]["model"]
        model["ignore_merges"] = ignore
        model["vocab"] |= {"Hello": 340, "\u0120world": 341, "abc": 342, "\u0120combining": 343}
    data["gaps"]["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "[a-m]+"}, "behavior": "Isolated", "invert": False},
        {"type": "Split", "pattern": {"String": "o"}, "behavior": "Isolated", "invert": True},
        data["bytes"]["pre_tokenizer"]]}
    data["merge order"] = tokenizer_json({c: i for i, c in enumerate(["<|end|>", *"abc", "bc", "ab", "abc"])},
                                         ["b c", "a b", "ab c"], [("<|end|>", 0)])
    rng = random.Random(0)
    vocab, merges = random_merges(rng, "abcd\u0120", 150)
    vocab["<|end|>"] = len(vocab)
    data["random merges"] = tokenizer_json(vocab, merges, [("<|end|>", vocab["<|end|>"])])
    data["random merges"]["pre_tokenizer"]["use_regex"] = False
    texts = {"random merges": ["".join(rng.choices("abcd ", k=rng.choice([5, 20, 80]))) for _ in range(60)]}
    found = {}
    for kind in KINDS:
        tok = H.Tokenizer.from_str(json.dumps(data[kind]))
        tok.encode_special_tokens = True
        eos, more = data[kind]["added_tokens"][0]["id"], texts.get(kind, [])
        found[kind] = {"json": data[kind], "eos": eos, "texts": more,
                       "ids": [tok.encode(t, add_special_tokens=False).ids for t in ODD + more]}
    return found
