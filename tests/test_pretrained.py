"""Published weights against transformers.

What transformers 5.24 computes stands in refs_published.json, so these tests need neither it nor a network;
`python tests/test_pretrained.py` writes that file anew where transformers is installed.  There the tests also
load what `export` writes back into transformers."""
import json
import math
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers as H
import torch
from safetensors.torch import load_file, save_file

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import model as M
import reward
import splits
from common.checkpoint import save_checkpoint
from common.errors import UserError
from common.tokenizer import build_tokenizer, load_tokenizer, same_ids
from generate import generate
from published import pretrained as P
from published.export import export
from splits import encode_prompts, encode_response
from test_tokenizer import make_tokenizers

REFS = Path(__file__).parent / "refs_published.json"
GPT2 = dict(model_type="gpt2", n_embd=24, n_layer=2, n_head=3, n_positions=32, vocab_size=40, n_inner=None,
            activation_function="gelu_new", tie_word_embeddings=True, eos_token_id=39, bos_token_id=39)
OPT = dict(model_type="opt", hidden_size=24, word_embed_proj_dim=24, num_hidden_layers=2, ffn_dim=56,
           num_attention_heads=3, max_position_embeddings=32, vocab_size=40, do_layer_norm_before=True,
           pad_token_id=1, bos_token_id=2, eos_token_id=2)
LLAMA = dict(model_type="llama", hidden_size=24, num_hidden_layers=2, num_attention_heads=6,
             num_key_value_heads=2, intermediate_size=40, max_position_embeddings=64, vocab_size=40,
             rms_norm_eps=1e-5, tie_word_embeddings=False, eos_token_id=39, bos_token_id=38)
QWEN2 = LLAMA | dict(model_type="qwen2", rope_theta=1e6, use_sliding_window=False, sliding_window=16,
                     max_window_layers=1)
QWEN3 = QWEN2 | dict(model_type="qwen3", head_dim=8, attention_bias=False)
NEOX = dict(model_type="gpt_neox", hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=56, max_position_embeddings=64, vocab_size=40, hidden_act="gelu",
            rotary_pct=0.25, rotary_emb_base=10000, use_parallel_residual=True, layer_norm_eps=1e-5,
            tie_word_embeddings=False, bos_token_id=39, eos_token_id=39)
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
    "llama with heads of width 6": LLAMA | dict(head_dim=6),
    "llama with fields that are null": LLAMA | dict(head_dim=None, num_key_value_heads=None,
                                                    rope_scaling=None),
    "gpt2 with other names of its sizes": {
        k: v for k, v in GPT2.items() if k not in ("n_embd", "n_layer", "n_head", "n_positions")} | dict(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, max_position_embeddings=32),
    "gpt2 tied, two matrices in the file": GPT2,
    "llama tied, the head alone in the file": LLAMA | dict(tie_word_embeddings=True),
    "qwen2": QWEN2,
    "qwen2 tied, rope scaling": QWEN2 | dict(tie_word_embeddings=True,
                                             rope_scaling=dict(type="linear", factor=2.0)),
    "qwen3": QWEN3,
    "qwen3 tied, one key head": QWEN3 | dict(tie_word_embeddings=True, num_key_value_heads=1),
    "gpt_neox": NEOX,
    "gpt_neox sequential, half turning": NEOX | dict(
        use_parallel_residual=False, hidden_act="gelu_fast", rope_parameters=dict(
            rope_type="default", rope_theta=5e3, partial_rotary_factor=0.5)),
    "gpt_neox tied, biases in MLPs only": NEOX | dict(attention_bias=False, tie_word_embeddings=True),
}
# what a file holds beside the embedding where config.json ties the head to it
HEADS = {"gpt2 tied, two matrices in the file": ["transformer.wte.weight", "lm_head.weight"],
         "llama tied, the head alone in the file": ["lm_head.weight"]}
# reward models: one label, and a padding token that no text holds, or that is the end of sequence
ONE_LABEL = dict(id2label={"0": "LABEL_0"}, label2id={"LABEL_0": 0}, pad_token_id=1)
CLASSIFIERS = {config["model_type"]: config | ONE_LABEL for config in (GPT2, OPT, LLAMA, QWEN2, QWEN3, NEOX)}
CLASSIFIERS |= {f"{name} padded with its end": CLASSIFIERS[name] | dict(pad_token_id=39)
                for name in ("gpt2", "llama")}
READ = {"abba cab": [(" a", True), (" bad cab", True), (" abbab", False)], "g": [(" hgf ed", True), (" b", False)]}
TOKENS = [(7 * i * i + 3 * i + 1) % 37 for i in range(24)]


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
    eos = ref["config"]["eos_token_id"]
    letters = {c: i + 3 for i, c in enumerate("abcdefgh")} | {"ab": 11, "Ġ": 12, "<|end|>": eos}
    tokenizer = H.Tokenizer(H.models.BPE(vocab=letters, merges=[("a", "b")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = H.pre_tokenizers.ByteLevel(False), H.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    state = {name: value(name, shape) for name, shape in ref["shapes"].items()}
    kind, ending = ("pytorch_model", "bin") if bins else ("model", "safetensors")
    save = partial(torch.save, _use_new_zipfile_serialization=bins is True) if bins else save_file
    if shards == 1:
        save(state, folder / f"{kind}.{ending}")
        return folder
    names = sorted(state)
    parts = {f"{kind}-{i + 1:05}-of-{shards:05}.{ending}": names[i::shards] for i in range(shards)}
    for file, part in parts.items():
        save({n: state[n] for n in part}, folder / file)
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
    (out,), = generate(model, [TOKENS[:5]], 8, temperature=0)
    assert out == ref["greedy"]


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_scores_of_classifiers_equal_transformers(case, refs, tmp_path, capsys):
    """Read as texts by a judge, and from the ids of a policy with another tokenizer."""
    ref = refs["classifiers"][case]
    model, saved = P.load(str(write(tmp_path, case, ref)), "--judge", kind="reward")
    assert not capsys.readouterr().out and not model.config.frozen and not model.reread
    expected = torch.tensor(ref["scores"])
    assert expected.std() > .02
    how = splits.reading_of(model, saved)
    scores = reward.score(model, *splits.text_ids(model, list(READ), list(READ.values()), *how))
    assert [len(of_prompt) for of_prompt in scores] == [3, 2]
    assert (torch.tensor(sum(scores, [])) - expected).abs().max() < 1e-4

    spec = build_tokenizer(["abba cab", " bad"])        # the policy's
    policy, words = M.GPT(M.GPTConfig(vocab_size=300, n_layer=1)), load_tokenizer(spec)
    words.bos = 2                                       # a token before every prompt
    bundle = SimpleNamespace(model=policy, tokenizer=words, saved={"tokenizer": spec})
    model, hashed = splits.load_reward_model(SimpleNamespace(reward=str(tmp_path), model="p", dtype="fp32"),
                                             bundle, "cpu")
    assert hashed == saved["weights_hash"] and "in the unit of its scores" in capsys.readouterr().out
    prompts = encode_prompts(words, list(READ), 99)
    responses = [[encode_response(words, text, 99, end) for text, end in group] for group in READ.values()]
    assert (torch.tensor(sum(reward.score(model, prompts, responses), [])) - expected).abs().max() < 1e-4


def test_a_score_s_bias_is_added(refs, tmp_path):
    ref = refs["classifiers"]["llama"]
    plain, biased = (P.from_pretrained(write(tmp_path / str(i), "", ref | {"shapes": ref["shapes"] | more}), True)
                     for i, more in enumerate(({}, {"score.bias": [1]})))
    packed = M.pack([TOKENS[:5]], [[TOKENS[5:9]]])
    assert (biased.rewards(packed) - plain.rewards(packed)).item() == pytest.approx(value("score.bias", [1]).item())


@pytest.mark.parametrize("rows, says", [(None, "this one has none"), (2, "this one has 2")])
def test_a_classifier_of_another_number_of_labels_is_refused(rows, says, refs, tmp_path):
    ref = refs["classifiers"]["opt"] if rows else refs["models"]["opt"]
    shapes = ref["shapes"] | ({"score.weight": [rows, 24]} if rows else {})
    with pytest.raises(UserError, match=f"^--reward .*: no reward model, .* one label; {says}$"):
        P.load(str(write(tmp_path, "", ref | {"shapes": shapes})), "--reward", kind="reward")


@pytest.mark.parametrize("bins, shards", [(True, 1), (False, 3), (True, 2), ("of old torch", 1)])
def test_sharded_files_and_pickled_weights_give_the_same(bins, shards, refs, tmp_path):
    ref = refs["models"]["gpt2"]
    model = P.from_pretrained(str(write(tmp_path, "gpt2", ref, bins, shards)))
    assert (logits_of(model) - torch.tensor(ref["logits"])).abs().max() < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_export_is_read_back_equal(case, refs, tmp_path):
    ref = refs["models"][case]
    model, saved = P.load(str(write(tmp_path / "in", case, ref)))
    assert load_tokenizer(saved["tokenizer"]).encode_ordinary("abba") == [11, 4, 3]
    export(model, saved["tokenizer"], tmp_path / "out")
    again, saved_again = P.load(str(tmp_path / "out"))
    assert torch.equal(logits_of(model), logits_of(again))
    assert same_ids(saved_again["tokenizer"], saved["tokenizer"])
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        difference = theirs(torch.tensor([TOKENS])).logits[0] - logits_of(again)
    assert difference.abs().max() < 1e-4
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("abba")["input_ids"] == [11, 4, 3]


def test_a_head_beside_a_tied_embedding_is_the_file_s(refs, tmp_path, capsys):
    case = "gpt2 tied, two matrices in the file"
    apart = P.from_pretrained(str(write(tmp_path / "apart", case, refs["models"][case])))
    assert not apart.config.tied
    assert not torch.equal(apart.head.weight, apart.embed.weight)
    case = "llama tied, the head alone in the file"
    one = P.from_pretrained(str(write(tmp_path / "one", case, refs["models"][case])))
    assert one.config.tied and one.head.weight is one.embed.weight and not capsys.readouterr().out
    # both, and equal: pytorch_model.bin of a tied model
    state = {n: value(n, s) for n, s in refs["models"]["gpt2"]["shapes"].items()}
    folder = write(tmp_path / "both", "gpt2", refs["models"]["gpt2"])
    state["lm_head.weight"] = state["transformer.wte.weight"]
    save_file({n: x.clone() for n, x in state.items()}, folder / "model.safetensors")
    assert P.from_pretrained(str(folder)).config.tied


def test_a_fused_qkv_of_another_size_is_named(refs, tmp_path):
    ref = refs["models"]["gpt_neox"]
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    folder = write(tmp_path, "gpt_neox", ref | {"shapes": ref["shapes"] | {name: [90, 32]}})
    with pytest.raises(UserError, match="not of the shape that config.json says .*qkv.weight.*90, 32"):
        P.from_pretrained(str(folder))


TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def test_export_keeps_what_the_directory_held(refs, tmp_path):
    folder = write(tmp_path / "in", "qwen2", refs["models"]["qwen2"])
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": 7, "eos_token_id": [39, 6]}
    named = {"pad_token": "<|end|>", "padding_side": "left", "bos_token": None,
             "tokenizer_class": "Qwen2Tokenizer"}
    generation = {"eos_token_id": [39, 6], "pad_token_id": 7, "repetition_penalty": 1.05, "top_p": 0.8}
    for name, content in (("config", config), ("tokenizer_config", named), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    model, saved = P.load(str(folder))
    # through a checkpoint, as the stages do
    save_checkpoint(tmp_path / "c.pt", model, saved["tokenizer"], None, {}, {})
    model, saved_in_checkpoint = P.load(str(tmp_path / "c.pt"))
    assert saved_in_checkpoint["tokenizer"] == saved["tokenizer"]
    out = tmp_path / "out"
    assert set(export(model, saved_in_checkpoint["tokenizer"], out)) == {p.name for p in out.iterdir()}
    written = json.loads((out / "config.json").read_text())
    assert (written["pad_token_id"], written["eos_token_id"], written["bos_token_id"]) == (7, [39, 6], 38)
    assert json.loads((out / "generation_config.json").read_text()) == generation
    again = json.loads((out / "tokenizer_config.json").read_text())
    assert (again["pad_token"], again["padding_side"], again["eos_token"]) == ("<|end|>", "left", "<|end|>")
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
    assert same_ids(P.load(str(out))[1]["tokenizer"], saved["tokenizer"])
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    assert (theirs.pad_token, theirs.padding_side, theirs.chat_template) == ("<|end|>", "left", TEMPLATE)
    assert theirs.apply_chat_template([{"role": "user", "content": "abba"}], tokenize=False) == "abba"
    generating = transformers.AutoModelForCausalLM.from_pretrained(out).generation_config
    assert (generating.eos_token_id, generating.pad_token_id, generating.top_p) == ([39, 6], 7, 0.8)


def test_opt_s_begin_token_survives_export(refs, tmp_path):
    folder = write(tmp_path / "in", "opt", refs["models"]["opt"])
    (folder / "tokenizer.json").unlink()
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2} | {c: i + 3 for i, c in enumerate("abcdefgh")} | {"ab": 11}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "add_bos_token": True}))
    model, saved = P.load(str(folder))
    tokenizer = load_tokenizer(saved["tokenizer"])
    assert (tokenizer.bos, tokenizer.encode_ordinary("abba")) == (2, [11, 4, 3])
    export(model, saved["tokenizer"], tmp_path / "out")
    assert same_ids(P.load(str(tmp_path / "out"))[1]["tokenizer"], saved["tokenizer"])
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    for directory in (folder, tmp_path / "out"):
        assert transformers.AutoTokenizer.from_pretrained(directory)("abba")["input_ids"] == [2, 11, 4, 3]


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(refs, tmp_path):
    folder = write(tmp_path, "gpt2", refs["models"]["gpt2"])
    (folder / "tokenizer.json").write_text(json.dumps(refs["tokenizers"]["bytes"]["json"]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    with pytest.raises(UserError, match="ids up to 339, its embeddings end at 39"):
        P.load(str(folder))


def test_a_padding_token_behind_the_embeddings_is_no_fault(refs, tmp_path):
    """People add [PAD] without resizing; no text holds it.  As another token it would be one."""
    folder = write(tmp_path, "gpt2", refs["models"]["gpt2"])
    before = P.load(str(folder))[1]["tokenizer"]
    for named in ({"pad_token": "[PAD]"}, {"mask_token": "[PAD]"}):
        file = json.loads(before["json"])
        file["model"]["vocab"]["[PAD]"] = 40
        file["added_tokens"].append({"id": 40, "content": "[PAD]", "special": True, "single_word": False,
                                     "lstrip": False, "rstrip": False, "normalized": False})
        (folder / "tokenizer.json").write_text(json.dumps(file))
        config = before["kept"]["tokenizer_config.json"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config | named))
        if "pad_token" in named:
            saved = P.load(str(folder))[1]
            assert 40 not in load_tokenizer(saved["tokenizer"]).encode_ordinary("a[PAD]")
        else:
            with pytest.raises(UserError, match="ids up to 40, its embeddings end at 39"):
                P.load(str(folder))


@pytest.mark.parametrize("damage", ["cut", "header", "pickle", "numbers", "missing", "extra"])
def test_damaged_and_hostile_weights_get_one_line(damage, refs, tmp_path):
    ref = refs["models"]["gpt2"]
    folder = write(tmp_path / "m", "gpt2", ref)
    path = folder / "model.safetensors"
    state = {name: value(name, shape) for name, shape in ref["shapes"].items()}
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "header":
        path.write_bytes((2 ** 60).to_bytes(8, "little") + path.read_bytes()[8:])
    elif damage == "pickle":
        path.unlink()
        torch.save({"x": print}, folder / "pytorch_model.bin")
    elif damage == "numbers":
        path.unlink()
        torch.save({"transformer.wte.weight": 5}, folder / "pytorch_model.bin")
    elif damage == "missing":
        state.pop("transformer.ln_f.bias")
        save_file(state, path)
    elif damage == "extra":
        save_file(state | {"adapter.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError) as error:
        P.from_pretrained(str(folder))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change, words", [
    (dict(model_type="mamba"), "mamba"), (QWEN2 | dict(quantization_config={"bits": 4}), "quantization"),
    (QWEN3 | dict(attention_bias=True), "attention_bias = True"),
    (GPT2 | dict(n_layer="x"), "missing or odd"),
    (QWEN2 | dict(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    (OPT | dict(do_layer_norm_before=False), "do_layer_norm_before"),
    (LLAMA | dict(rope_parameters=dict(rope_type="yarn", factor=4.0)), "yarn"),
    (LLAMA | dict(hidden_act="gelu"), "hidden_act"),
    ({k: v for k, v in GPT2.items() if k != "n_head"}, "n_head"),
    (GPT2 | dict(n_head=5), "divide"), (GPT2 | dict(scale_attn_by_inverse_layer_idx=True), "scale_attn")])
def test_variants_that_are_not_implemented_are_named(change, words):
    with pytest.raises(UserError, match=words):
        P.model_of({name: x for name, x in change.items() if x is not None})


def test_fields_that_are_not_known_are_named(refs, tmp_path, capsys):
    ref = refs["models"]["llama, grouped queries, untied"]
    strange = {"logit_scale": 0.5, "nothing": None, "use_cache": True}
    P.from_pretrained(str(write(tmp_path, "", ref | {"config": ref["config"] | strange})))
    assert capsys.readouterr().out == "config.json: fields not known here and not read: logit_scale\n"


def test_a_model_from_scratch_is_not_exported(tmp_path):
    with pytest.raises(UserError, match="began as published ones"):
        export(M.GPT(M.GPTConfig(vocab_size=40, n_layer=1)), {"kind": "words"}, tmp_path)


def test_names_of_compiled_and_parallel_modules_are_read(refs, tmp_path):
    """torch.compile and DataParallel put their own names before all others, in either order."""
    folder = write(tmp_path, "gpt2", refs["models"]["gpt2"])
    weights = load_file(folder / "model.safetensors")
    save_file({f"module._orig_mod.{name}": x for name, x in weights.items()}, folder / "model.safetensors")
    logits = logits_of(P.load(str(folder))[0])
    assert (logits - torch.tensor(refs["models"]["gpt2"]["logits"])).abs().max() < 1e-4


def test_weights_in_torch_s_old_format_are_read(refs, tmp_path):
    """Not a zip file: as torch wrote them before 1.6."""
    folder = write(tmp_path, "gpt2", refs["models"]["gpt2"], bins="old")
    logits = logits_of(P.load(str(folder))[0])
    assert (logits - torch.tensor(refs["models"]["gpt2"]["logits"])).abs().max() < 1e-4


def test_neither_file_nor_hub_name(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--model no/such/thing: no such file or directory"):
        P.load("no/such/thing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="without config.json"):
        P.load(str(tmp_path / "empty"))
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="a LoRA adapter .* is not read; merge it"):
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
    assert ["pytorch_model.bin"] == asked[-1][1][-1:]       # there is no safetensors file: asked last


def padded_scores(theirs, rows, pad, left):
    """transformers' scores of rows of ids in one batch, padded on one side: (R,)."""
    width = max(map(len, rows))
    blanks = [[pad] * (width - len(row)) for row in rows]
    ids = torch.tensor([blank + row if left else row + blank for row, blank in zip(rows, blanks)])
    real = torch.tensor([[0] * len(b) + [1] * len(row) if left else [1] * len(row) + [0] * len(b)
                         for row, b in zip(rows, blanks)])
    with torch.no_grad():       # GPT-2 counts positions over padding unless told
        return theirs(ids, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp(min=0)).logits[:, 0]


def make():
    """Writes refs_published.json anew from transformers and tokenizers."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    models, classifiers = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for case, config in CASES.items():
            made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
            published = {"lm_head.weight": "embed_out.weight"} if config["model_type"] == "gpt_neox" else {}
            tied = config.get("tie_word_embeddings", config["model_type"] in ("gpt2", "opt"))
            shapes = {published.get(n, n): list(x.shape) for n, x in made.state_dict().items()
                      if n != "lm_head.weight" or not tied}
            if case in HEADS:
                embed = next(n for n in shapes if n.endswith(("wte.weight", "embed_tokens.weight")))
                shapes |= dict.fromkeys(HEADS[case], shapes.pop(embed))
            models[case] = {"config": config, "shapes": shapes}
            path = write(Path(folder) / str(len(models)), case, models[case])
            theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            with torch.no_grad():
                logits = theirs(torch.tensor([TOKENS])).logits[0]
                greedy = theirs.generate(torch.tensor([TOKENS[:5]]), do_sample=False, max_new_tokens=8,
                                         eos_token_id=None, pad_token_id=0)[0, 5:]
            models[case] |= {"greedy": greedy.tolist(),
                             "logits": [[round(v, 6) for v in row] for row in logits.tolist()]}
        for case, config in CLASSIFIERS.items():
            made = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**config))
            classifiers[case] = {"config": config, "shapes": {n: list(x.shape) for n, x in made.state_dict().items()}}
            path = write(Path(folder) / case, case, classifiers[case])
            theirs = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
            tokenizer, pad, eos = AutoTokenizer.from_pretrained(path), config["pad_token_id"], config["eos_token_id"]
            rows = [tokenizer(prompt + text)["input_ids"] + [eos] * end
                    for prompt, group in READ.items() for text, end in group]
            scores = [padded_scores(theirs, rows, pad, left) for left in (False, True)]
            assert (scores[0] - scores[1]).abs().max() < 1e-5, case
            classifiers[case]["scores"] = [round(v, 6) for v in scores[0].tolist()]
    tokenizers = make_tokenizers(json.loads(REFS.read_text())["tokenizers"])
    REFS.write_text(json.dumps({"models": models, "classifiers": classifiers, "tokenizers": tokenizers}))
    print(f"wrote {REFS}: {REFS.stat().st_size:,} bytes")


if __name__ == "__main__":
    make()
