"""Published weights and tokenizers against transformers.

What transformers 5.23 computes stands in refs_published.json, so these tests need neither it nor a network;
`python tests/test_pretrained.py` writes that file anew where transformers is installed.  There the tests also
load what `export` writes back into transformers."""
import json
import math
import sys
from pathlib import Path

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import model as M
from common import pretrained as P
from common.errors import UserError
from common.tokenizer import character_bytes, load_tokenizer, published_spec, tokenizer_json
from splits import decode, encode_prompts

REFS = Path(__file__).parent / "refs_published.json"
GPT2 = dict(model_type="gpt2", n_embd=24, n_layer=2, n_head=3, n_positions=32, vocab_size=40, n_inner=None,
            activation_function="gelu_new", tie_word_embeddings=True, eos_token_id=39, bos_token_id=39)
OPT = dict(model_type="opt", hidden_size=24, word_embed_proj_dim=24, num_hidden_layers=2, ffn_dim=56,
           num_attention_heads=3, max_position_embeddings=32, vocab_size=40, do_layer_norm_before=True,
           pad_token_id=1, bos_token_id=2, eos_token_id=2)
LLAMA = dict(model_type="llama", hidden_size=24, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=2, intermediate_size=40, max_position_embeddings=64, vocab_size=40,
             rms_norm_eps=1e-5, tie_word_embeddings=False, eos_token_id=39, bos_token_id=38)
STRETCHED = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                 original_max_position_embeddings=16)
CASES = {
    "gpt2": GPT2,
    "gpt2 untied, wider MLP, gelu": GPT2 | dict(tie_word_embeddings=False, n_inner=40,
                                                activation_function="gelu"),
    "opt": OPT,
    "opt without biases, untied": OPT | dict(enable_bias=False, tie_word_embeddings=False),
    "llama, grouped queries, untied": LLAMA,
    "llama tied, theta 1e5": LLAMA | dict(tie_word_embeddings=True, num_key_value_heads=6,
                                          rope_parameters=dict(rope_type="default", rope_theta=1e5)),
    "llama 3's rope scaling": LLAMA | dict(rope_parameters=STRETCHED | dict(rope_theta=5e2)),
    "linear rope scaling": LLAMA | dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)),
    "llama with all biases": LLAMA | dict(attention_bias=True, mlp_bias=True),
    "llama with attention biases only": LLAMA | dict(attention_bias=True),
}
TOKENS = [(7 * i * i + 3 * i + 1) % 37 for i in range(24)]
ODD = ["Hello world, it's 2023!", "  two  spaces\n\n\ttabs\r\n", "naïve café — “quotes” … €100",
       "日本語のテキスト です",
       "emoji 👩‍👩‍👧‍👦 and 🏳️‍🌈", "a\u0300 combining", "x\x04y \x13z", "<|end|> is text", "", " ",
       "1234567 89", "don't WON'T I'LL",
       "\u00a0nbsp\u2003em\u3000full", "٣٤٥ ⅷ ½ ²", "zero\u200bwidth\ufeff", "\U0010ffff \U00050000!?",
       "a" * 50, "\x85\x1c\x1f"]


def value(name, shape):
    """Weights anyone can make: a sine along the elements, its phase from the name."""
    phase = sum(map(ord, name)) % 97
    x = 0.25 * torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + phase)
    near_one = "norm" in name and name.endswith("weight") or ".ln_" in name
    return (x + near_one).float().view(shape)


def write(folder, case, ref, bins=False, shards=1):
    """The directory of one case, as a hub would hold it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(ref["config"]))
    letters = {c: i + 3 for i, c in enumerate("abcdefgh")} | {"ab": 11}
    words = tokenizer_json(letters, ["a b"], [("<|end|>", ref["config"]["eos_token_id"])])
    (folder / "tokenizer.json").write_text(json.dumps(words))
    state = {name: value(name, shape) for name, shape in ref["shapes"].items()}
    kind, ending = ("pytorch_model", "bin") if bins else ("model", "safetensors")
    save = torch.save if bins else (lambda x, path: P.write_safetensors(path, x))
    if shards == 1:
        save(state, folder / f"{kind}.{ending}")
        return folder
    names = sorted(state)
    parts = {f"{kind}-{i + 1:05}-of-{shards:05}.{ending}": names[i::shards] for i in range(shards)}
    for file, part in parts.items():
        save({n: state[n] for n in part}, folder / file)
    (folder / f"{kind}.{ending}.index.json").write_text(
        json.dumps({"weight_map": {n: file for file, part in parts.items() for n in part}}))
    return folder


def logits_of(model, tokens=TOKENS):
    with torch.no_grad():
        return model.head(model(M.plain([tokens])))[0]


@pytest.fixture(scope="module")
def refs():
    return json.loads(REFS.read_text())


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_continuations_equal_transformers(case, refs, tmp_path):
    ref = refs["models"][case]
    model = P.from_pretrained(str(write(tmp_path / "m", case, ref)))
    assert (logits_of(model) - torch.tensor(ref["logits"])).abs().max() < 1e-4
    (out,), = M.generate(model, [TOKENS[:5]], 8, temperature=0)
    assert out == ref["greedy"]


@pytest.mark.parametrize("bins, shards", [(True, 1), (False, 3), (True, 2)])
def test_sharded_files_and_pickled_weights_give_the_same(bins, shards, refs, tmp_path):
    ref = refs["models"]["gpt2"]
    model = P.from_pretrained(str(write(tmp_path, "gpt2", ref, bins, shards)))
    assert (logits_of(model) - torch.tensor(ref["logits"])).abs().max() < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_export_is_read_back_equal(case, refs, tmp_path):
    ref = refs["models"][case]
    model, saved = P.load(str(write(tmp_path / "in", case, ref)))
    assert load_tokenizer(saved["tokenizer"]).encode_ordinary("abba") == [11, 4, 3]
    P.export(model, saved["tokenizer"], tmp_path / "out")
    again, saved_again = P.load(str(tmp_path / "out"))
    assert torch.equal(logits_of(model), logits_of(again))
    assert saved_again["tokenizer"] == saved["tokenizer"]
    transformers = pytest.importorskip("transformers", reason="the rest needs transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        difference = theirs(torch.tensor([TOKENS])).logits[0] - logits_of(again)
    assert difference.abs().max() < 1e-4
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("abba")["input_ids"] == [11, 4, 3]


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(refs, tmp_path):
    folder = write(tmp_path, "gpt2", refs["models"]["gpt2"])
    (folder / "tokenizer.json").write_text(json.dumps(refs["tokenizers"]["bytes"]["json"]))
    with pytest.raises(UserError, match="ids up to 339, its embeddings end at 39"):
        P.load(str(folder))


def test_safetensors_reader_equals_the_library(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.randn(2, 2).bfloat16(),
               "none": torch.zeros(0, 4), "one": torch.tensor(2.5)}
    P.write_safetensors(tmp_path / "ours.safetensors", tensors)
    library.save_file(tensors, tmp_path / "theirs.safetensors")
    ours = P.read_safetensors(tmp_path / "theirs.safetensors")
    theirs = library.load_file(tmp_path / "ours.safetensors")
    for name, x in tensors.items():
        assert torch.equal(ours[name], x) and torch.equal(theirs[name], x) and ours[name].dtype == x.dtype


@pytest.mark.parametrize("damage",
                         ["cut", "header", "offsets", "shape", "pickle", "missing", "extra", "escape"])
def test_damaged_and_hostile_weights_get_one_line(damage, refs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)     # our own reader
    ref = refs["models"]["gpt2"]
    folder = write(tmp_path / "m", "gpt2", ref, shards=2 if damage == "escape" else 1)
    path = folder / "model.safetensors"
    state = {name: value(name, shape) for name, shape in ref["shapes"].items()}
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "header":
        path.write_bytes((2 ** 60).to_bytes(8, "little") + path.read_bytes()[8:])
    elif damage in ("offsets", "shape"):
        raw = path.read_bytes()
        n = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:8 + n])
        entry = header["transformer.wte.weight"]
        entry["data_offsets"][0 if damage == "offsets" else 1] -= 4
        if damage == "shape":
            entry["shape"] = [-40, -24]
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + n:])
    elif damage == "pickle":
        path.unlink()
        torch.save({"x": print}, folder / "pytorch_model.bin")
    elif damage == "missing":
        state.pop("transformer.ln_f.bias")
        P.write_safetensors(path, state)
    elif damage == "extra":
        P.write_safetensors(path, state | {"adapter.weight": torch.zeros(2)})
    elif damage == "escape":
        index = {"weight_map": {"a": "../../passwd"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as error:
        P.from_pretrained(str(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change, words", [
    (dict(model_type="mamba"), "mamba"), (OPT | dict(do_layer_norm_before=False), "opt-350m"),
    (LLAMA | dict(rope_parameters=dict(rope_type="yarn", factor=4.0)), "yarn"),
    (LLAMA | dict(hidden_act="gelu"), "hidden_act"),
    ({k: v for k, v in GPT2.items() if k != "n_head"}, "n_head"),
    (GPT2 | dict(n_head=5), "divide"), (GPT2 | dict(scale_attn_by_inverse_layer_idx=True), "scale_attn")])
def test_variants_that_are_not_implemented_are_named(change, words):
    with pytest.raises(UserError, match=words):
        P.config_of(change)


def test_a_scratch_shape_that_nobody_publishes_is_not_exported(tmp_path):
    with pytest.raises(UserError, match="no published architecture"):
        P.export(M.GPT(M.GPTConfig(vocab_size=40, n_layer=1)), {"kind": "words"}, tmp_path)


def test_neither_file_nor_hub_name(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--model .*not a hub name"):
        P.load("no/such/thing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="without config.json"):
        P.load(str(tmp_path / "empty"))
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: 1 / 0)
    with pytest.raises(UserError, match="hub does not give it"):
        P.load("gpt2-of-nobody")


def test_hub_names_are_fetched_through_huggingface_hub(refs, tmp_path, monkeypatch):
    """The hub's cache is played by a directory; what is asked of it is the real call."""
    import huggingface_hub
    folder, asked = write(tmp_path / "cache", "opt", refs["models"]["opt"], bins=True), []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model, saved = P.load("facebook/opt-125m")
    assert (logits_of(model) - torch.tensor(refs["models"]["opt"]["logits"])).abs().max() < 1e-4
    assert {name for name, _ in asked} == {"facebook/opt-125m"}
    assert ["pytorch_model*.bin"] in [p for _, p in asked]      # there is no safetensors file: asked second


# ------------------------------------------------------------------------------------------------- tokenizers

@pytest.mark.parametrize("kind", ["bytes", "digits", "split", "shuffled ids", "missing bytes"])
def test_token_ids_equal_the_tokenizers_library(kind, refs, tmp_path):
    ref = refs["tokenizers"][kind]
    spec = {"kind": "bpe", "json": json.dumps(ref["json"]), "eos": 0, "bos": None}
    tokenizer = load_tokenizer(spec)
    for text, ids in zip(ODD, ref["ids"], strict=True):
        assert tokenizer.encode_ordinary(text) == ids, text
        if kind != "missing bytes":
            assert tokenizer.decode(ids) == text


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


@pytest.mark.parametrize("change, words", [
    ({"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "Unigram"),
    ({"model": {"type": "BPE", "byte_fallback": True, "vocab": {}, "merges": []}}, "SentencePiece"),
    ({"normalizer": {"type": "NFC"}}, "NFC"), ({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "ByteLevel"),
    ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["b", "c"]]}}, "vocabulary lacks"),
    ({"model": 7}, "damaged")])
def test_tokenizers_that_cannot_be_turned_say_what_works(change, words, refs, tmp_path):
    data = refs["tokenizers"]["bytes"]["json"] | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    with pytest.raises(UserError, match=words):
        load_tokenizer(published_spec(tmp_path))


def test_a_sentencepiece_model_says_what_works(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(UserError, match="SentencePiece's tokenizer.model does not"):
        published_spec(tmp_path)


def test_llama_3_and_opt_begin_prompts_with_their_token(refs, tmp_path):
    data = refs["tokenizers"]["bytes"]["json"]
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}},
                                                         {"Sequence": {"id": "A", "type_id": 0}}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(
        data | {"post_processor": {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    spec = published_spec(tmp_path)
    assert spec["bos"] == 0 and spec["eos"] == 0
    assert encode_prompts(load_tokenizer(spec), ["Hello"], 100)[0][0] == 0


def make():
    """Writes refs_published.json from transformers and tokenizers."""
    import tokenizers as T
    from transformers import AutoConfig, AutoModelForCausalLM
    models = {}
    for case, config in CASES.items():
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).eval().float()
        shapes = {n: list(x.shape) for n, x in theirs.state_dict().items()
                  if n != "lm_head.weight"
                  or not config.get("tie_word_embeddings", config["model_type"] != "llama")}
        theirs.load_state_dict({n: value(n, s) for n, s in shapes.items()}, strict=False)
        with torch.no_grad():
            logits = theirs(torch.tensor([TOKENS])).logits[0]
            greedy = theirs.generate(torch.tensor([TOKENS[:5]]), do_sample=False, max_new_tokens=8,
                                     eos_token_id=None, pad_token_id=0)[0, 5:]
        models[case] = {"config": config, "shapes": shapes, "greedy": greedy.tolist(),
                        "logits": [[round(v, 6) for v in row] for row in logits.tolist()]}
    corpus = [t for t in ODD for _ in range(3)] + ["the low lower lowest newer new wide",
                                                   "it's don't we'll"] * 20
    level, found = T.pre_tokenizers.ByteLevel, {}
    digits = T.pre_tokenizers.Sequence([T.pre_tokenizers.Digits(individual_digits=True),
                                        level(add_prefix_space=False)])
    llama3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
              r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    split = T.pre_tokenizers.Sequence([T.pre_tokenizers.Split(T.Regex(llama3), "isolated"),
                                       level(add_prefix_space=False, use_regex=False)])
    for kind in ("bytes", "digits", "split", "shuffled ids", "missing bytes"):
        tok = T.Tokenizer(T.models.BPE())
        tok.pre_tokenizer = {"digits": digits, "split": split}.get(kind, level(add_prefix_space=False))
        alphabet = sorted(level.alphabet())
        if kind == "missing bytes":     # no control characters, and none of the bytes of high planes
            alphabet = [c for c in alphabet if character_bytes()[c] not in (4, 19, 241, 242, 244)]
        tok.train_from_iterator([t for t in corpus if kind != "missing bytes" or t.isascii()
                                 and t.isprintable()],
                                T.trainers.BpeTrainer(vocab_size=340, special_tokens=["<|end|>"],
                                                      show_progress=False,
                                                      initial_alphabet=alphabet))
        data = json.loads(tok.to_str())
        if kind == "shuffled ids":      # as OPT's: by frequency, not in the order of merging
            vocab = data["model"]["vocab"]
            n = len(vocab)
            data["model"]["vocab"] = {t: (i * 7 + 1) % n if i else 0 for t, i in vocab.items()}
            free = set(range(n)) - set(data["model"]["vocab"].values())
            twice = [t for t in vocab
                     if list(data["model"]["vocab"].values()).count(data["model"]["vocab"][t]) > 1]
            for t, i in zip([t for t in twice if vocab[t]], free):
                data["model"]["vocab"][t] = i
        data["added_tokens"] = [t for t in data["added_tokens"]]
        plain = T.Tokenizer.from_str(json.dumps(data | {"added_tokens": []}))     # text is text
        found[kind] = {"json": data, "ids": [plain.encode(t).ids for t in ODD]}
    REFS.write_text(json.dumps({"models": models, "tokenizers": found}, ensure_ascii=True))
    print(f"wrote {REFS}: {REFS.stat().st_size:,} bytes")


if __name__ == "__main__":
    make()
