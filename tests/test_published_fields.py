"""The tables of fields: complete against transformers' classes, and every verdict tried on the reader."""
import json
from pathlib import Path

import pytest

from common import pretrained as P
from common import published_fields as fields
from common.errors import UserError
from common.tokenizer import _added, load_tokenizer, published_spec
from test_pretrained import CASES, REFS, STRETCHED
from test_tokenizer import directory

TABLES = {**{f"config.json of {kind}": table for kind, table in fields.CONFIG.items()},
          "generation_config.json": fields.GENERATION, "tokenizer_config.json": fields.TOKENIZER_CONFIG,
          "tokenizer.json": fields.TOKENIZER, "tokenizer.json, model": fields.BPE,
          "tokenizer.json, added_tokens": fields.ADDED_TOKEN, "rope_parameters": fields.ROPE}
# what transformers 5 and 4 write into a tokenizer's files
TOKENIZER_FILES = {
    "tokenizer_config.json": "add_bos_token add_eos_token add_prefix_space added_tokens_decoder backend "
    "additional_special_tokens bos_token chat_template clean_up_tokenization_spaces eos_token errors "
    "extra_special_tokens is_local legacy local_files_only mask_token max_length model_input_names model_max_length name_or_path pad_token "
    "pad_token_type_id pad_to_multiple_of padding_side processor_class sep_token cls_token sp_model_kwargs "
    "spaces_between_special_tokens special_tokens_map_file split_special_tokens stride tokenizer_class "
    "tokenizer_file trim_offsets truncation_side truncation_strategy unk_token use_default_system_prompt "
    "vocab_file",
    "tokenizer.json": "version truncation padding added_tokens normalizer pre_tokenizer post_processor "
    "decoder model",
    "tokenizer.json, model": "type dropout unk_token continuing_subword_prefix end_of_word_suffix fuse_unk "
    "byte_fallback ignore_merges vocab merges",
    "tokenizer.json, added_tokens": "id content single_word lstrip rstrip normalized special"}
ODD_VALUES = [7, 0.5, True, False, "relu", "odd", [3], {"a": 1}, ["LlamaForSequenceClassification"],
              ["sliding_attention"], {"rope_type": "linear", "factor": 3.0}]


@pytest.fixture(scope="module")
def refs():
    return json.loads(REFS.read_text())


def of(verdict, table):
    return [name for name, field in table.items() if field.verdict == verdict]


def config_bases(kind):
    return [config for config in CASES.values() if config["model_type"] == kind]


def outcome(config):
    """What the reader makes of a config.json, or the words with which it refuses it."""
    try:
        return P.config_of(config)
    except UserError as error:
        return str(error)


# -------------------------------------------------------------------------------------------------- complete

def test_every_field_has_a_verdict_and_a_reason():
    assert set(fields.CONFIG) == set(P.READERS) == set(P.FAMILIES)
    for table in TABLES.values():
        for name, field in table.items():
            assert field.verdict in ("used", "only", "noted", "kept", "harmless"), name
            assert len(field.reason) > 5, name


@pytest.mark.parametrize("kind", [*fields.CONFIG, "generation"])
def test_every_field_that_transformers_writes_is_in_the_table(kind, refs):
    table = fields.GENERATION if kind == "generation" else fields.CONFIG[kind]
    assert not set(refs["fields"][kind]) - set(table)


@pytest.mark.parametrize("file", TOKENIZER_FILES)
def test_every_field_of_a_tokenizer_is_in_the_table(file):
    assert not set(TOKENIZER_FILES[file].split()) - set(TABLES[file])


def test_the_lists_are_those_of_the_transformers_that_is_installed():
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    for kind, table in fields.CONFIG.items():
        assert not set(transformers.AutoConfig.for_model(kind).to_dict()) - set(table)
    assert not set(transformers.GenerationConfig().to_dict()) - set(fields.GENERATION)


# ---------------------------------------------------------------------------------- config.json, each verdict

@pytest.mark.parametrize("kind", fields.CONFIG)
def test_a_used_field_of_config_changes_the_model_or_is_refused(kind):
    for name in of("used", fields.CONFIG[kind]):
        # the tokenizer's (test_tokenizer.py), and the weights' (CASES: biases in MLPs only)
        if name == "eos_token_id" or (kind, name) == ("gpt_neox", "attention_bias"):
            continue
        assert any(outcome(base | {name: value}) != outcome(base)
                   for base in config_bases(kind) for value in ODD_VALUES), name


@pytest.mark.parametrize("kind", fields.CONFIG)
def test_a_harmless_or_kept_field_of_config_changes_nothing(kind):
    base = config_bases(kind)[0]
    for verdict in ("harmless", "kept", "noted"):
        for name in of(verdict, fields.CONFIG[kind]):
            for value in ODD_VALUES:
                assert outcome(base | {name: value}) == outcome(base), name
    assert outcome(base | dict.fromkeys(fields.CONFIG[kind].keys() - base.keys())) == outcome(base)     # null


@pytest.mark.parametrize("kind", fields.CONFIG)
def test_a_field_with_one_implemented_value_is_refused_by_name(kind):
    base = config_bases(kind)[0]
    for name in of("only", fields.CONFIG[kind]):
        field = fields.CONFIG[kind][name]
        for value in field.values:
            assert outcome(base | {name: value}) == outcome(base), name
        with pytest.raises(UserError, match=f"config.json: {name} = 'odd' .* is not implemented"):
            P.config_of(base | {name: "odd"})


def test_fields_of_rope_scaling():
    llama, neox = CASES["llama, grouped queries, untied"], CASES["gpt_neox"]
    bases = [(llama, STRETCHED | dict(rope_theta=1e4)), (llama, dict(type="linear", factor=2.0)),
             (neox, dict(rope_type="default", partial_rotary_factor=0.25))]
    for name in of("used", fields.ROPE):
        assert any(outcome(config | {"rope_scaling": rope | {name: value}}) !=
                   outcome(config | {"rope_scaling": rope})
                   for config, rope in bases for value in (3.0, "odd", 0.5)), name
    for name in of("harmless", fields.ROPE):
        for config, rope in bases:
            plain = outcome(config | {"rope_scaling": rope})
            assert outcome(config | {"rope_scaling": rope | {name: 3.0}}) == plain


def test_quantised_weights_are_refused_by_name():
    with pytest.raises(UserError, match="quantization_config = .*fewer bits"):
        P.config_of(CASES["qwen2"] | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    with pytest.raises(UserError, match="LlamaForSequenceClassification, a model with another head"):
        P.config_of(CASES["qwen2"] | {"architectures": ["LlamaForSequenceClassification"]})


def test_an_unknown_field_is_told_and_loads():
    config, gpt2 = CASES["llama, grouped queries, untied"], CASES["gpt2"]
    strange = config | {"logit_scale": 0.5, "nothing": None}
    assert outcome(strange) == outcome(config)
    assert P.check_config("llama", strange) == ([], ["logit_scale 0.5"])
    assert P.check_config("llama", config | {"temperature": 0.5, "top_k": 50}) == (["temperature 0.5"], [])
    assert P.check_config("gpt2", gpt2 | {"rope_scaling": {"odd": 3}}) == ([], ["rope_scaling {'odd': 3}"])


# ---------------------------------------------------------------------- the tokenizer's files, each verdict

def spec_of(refs, folder, **changed):
    """The specification of a directory with the files `changed`, and the ids of a text."""
    data = refs["tokenizers"]["added tokens"]["json"] | changed.pop("tokenizer", {})
    named = {"eos_token": "<|end|>"} | changed.pop("tokenizer_config", {})
    directory(folder, data, tokenizer_config=named, config={"eos_token_id": 5}, **changed)
    try:
        spec = published_spec(folder)
    except UserError as error:
        return str(error), None, None
    tokenizer, text = load_tokenizer(spec), "<think> an A\u0300 the lower <tool> whole day"
    return spec, tokenizer.encode_ordinary(text), tokenizer.decode([340, 343, 9])


USED_IN_TOKENIZER_CONFIG = {    # field: what shows that it is read
    "eos_token": "<think>", "bos_token": None, "add_bos_token": None, "tokenizer_class": None,
    "added_tokens_decoder": {"345": _added("day", 345, special=False)},
    "additional_special_tokens": ["<think>"],
    "extra_special_tokens": {"a": "<think>"}, **dict.fromkeys(
        ("unk_token", "pad_token", "sep_token", "cls_token", "mask_token"), "<think>")}


def test_fields_of_tokenizer_config(refs, tmp_path):
    plain = spec_of(refs, tmp_path)
    assert set(USED_IN_TOKENIZER_CONFIG) == set(of("used", fields.TOKENIZER_CONFIG))
    for name, value in USED_IN_TOKENIZER_CONFIG.items():
        if value is not None:       # the others need a directory without tokenizer.json: test_bpe_by_hand
            spec, ids, _ = spec_of(refs, tmp_path, tokenizer_config={name: value})
            assert ids != plain[1] or spec["eos"] != plain[0]["eos"], name
    for name in of("kept", fields.TOKENIZER_CONFIG):
        spec, *same = spec_of(refs, tmp_path, tokenizer_config={name: "odd"})
        assert same == [*plain[1:]], name
        assert spec["kept"]["tokenizer_config.json"][name] == "odd", name
    for name in of("harmless", fields.TOKENIZER_CONFIG):
        assert spec_of(refs, tmp_path, tokenizer_config={name: "odd"}) == plain, name
    for name in of("only", fields.TOKENIZER_CONFIG):
        said, _, _ = spec_of(refs, tmp_path, tokenizer_config={name: "odd"})
        assert f"{name} = 'odd'" in said and "not implemented" in said


def test_fields_of_generation_config(refs, tmp_path, capsys):
    plain = spec_of(refs, tmp_path)
    for name in fields.GENERATION:
        verdict = fields.GENERATION[name].verdict
        spec, *same = spec_of(refs, tmp_path, generation_config={name: 3})
        assert same == [*plain[1:]] and spec["kept"]["generation_config.json"] == {name: 3}, name
        said = capsys.readouterr().out
        assert (f"asks for {name} 3" in said) == (verdict == "noted"), name
        for value in fields.GENERATION[name].values:
            spec_of(refs, tmp_path, generation_config={name: value})
            assert "asks for" not in capsys.readouterr().out
    assert not of("harmless", fields.GENERATION) and not of("only", fields.GENERATION)


USED_IN_TOKENIZER = {"added_tokens": [_added("<|end|>", 0, special=True)], "normalizer": {"type": "NFC"},
                     "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True},
                     "post_processor": {"type": "BertProcessing"}, "decoder": {"type": "WordPiece"},
                     "model": 5}
USED_IN_BPE = {"type": "Unigram", "vocab": {"<|end|>": 0}, "merges": [], "ignore_merges": True,
               "unk_token": "<|end|>"}


def test_fields_of_tokenizer_json(refs, tmp_path):
    data = refs["tokenizers"]["added tokens"]["json"]
    added = [token | {"id": token["id"] + (token["id"] > 0)} for token in data["added_tokens"]]
    vocab = data["model"]["vocab"] | {"\u0120whole": 340}
    data = data | {"model": data["model"] | {"vocab": vocab}, "added_tokens": added}
    plain = spec_of(refs, tmp_path, tokenizer=data)
    assert set(USED_IN_TOKENIZER) == set(of("used", fields.TOKENIZER))
    for name, value in USED_IN_TOKENIZER.items():
        assert spec_of(refs, tmp_path, tokenizer=data | {name: value})[1] != plain[1], name
    for name in of("harmless", fields.TOKENIZER):
        assert spec_of(refs, tmp_path, tokenizer=data | {name: {"max_length": 1}})[1:] == plain[1:], name
    assert set(USED_IN_BPE) == set(of("used", fields.BPE))
    for name, value in USED_IN_BPE.items():
        if name == "unk_token":         # refused where a byte has no id: test_tokenizer.py
            continue
        model = {"model": data["model"] | {name: value}}
        assert spec_of(refs, tmp_path, tokenizer=data | model)[1] != plain[1], name
    for name in of("harmless", fields.BPE):
        model = {"model": data["model"] | {name: True}}
        assert spec_of(refs, tmp_path, tokenizer=data | model)[1:] == plain[1:], name
    for name in of("only", fields.BPE):
        said, _, _ = spec_of(refs, tmp_path, tokenizer=data | {"model": data["model"] | {name: "odd"}})
        assert "not implemented" in said, name


def test_the_size_of_the_tables():
    """How many fields have a verdict; docs/published-models.md names the number."""
    distinct = {(file.split(" of ")[0], name) for file, table in TABLES.items() for name in table}
    text = (Path(__file__).parent.parent / "docs" / "published-models.md").read_text()
    assert f"{len(distinct)} fields" in text
