"""Published weights, in and out: GPT-2, OPT, LLaMA, Qwen and GPT-NeoX (Pythia) as Hugging Face directories.

    python sft.py --model gpt2                          # a hub name or a directory; no checkpoint is needed
    python -m tools.convert --model ckpt_sft.pt --export DIR    # writes a directory that transformers loads

A directory holds config.json, the weights (model.safetensors or pytorch_model.bin, sharded or not) and the
tokenizer (tokenizer.json, or vocab.json and merges.txt).  huggingface_hub, which comes with `datasets`,
fetches a hub name. Weights are held in fp32.

Families differ from our one class in two things.  `FAMILIES` says what they call a parameter and how they lay
it out. `config_of` and `hf_config` say how config.json spells a choice.  published_fields.py says what every
field of a directory means here.
"""
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from common import published_fields as fields
from common.checkpoint import load_checkpoint, typed, weights_hash
from common.errors import UserError, check, first_line
from common.flags import DTYPES, check_memory
from common.tokenizer import load_tokenizer, published_spec, read_json_object
from model import GPT, GPTConfig


# ------------------------------------------------------------------------------------------------ in, and out

def load(name, flag="--model", device="cpu", dtype="fp32"):
    """A language model from a checkpoint, a Hugging Face directory or a hub name: (GPT, what a checkpoint
    carries besides weights).  Raises UserError as `load_checkpoint` and `from_pretrained` do."""
    check(name, f"{flag} is empty: name a checkpoint (ckpt_sft.pt), a hub name (gpt2) or a Hugging Face "
          "directory")
    if name.endswith(".pt") or Path(name).is_file():
        return load_checkpoint(name, "lm", flag, device, dtype)
    try:
        folder = find(name)
        model, spec = from_pretrained(folder), published_spec(folder)
        size, used = model.config.vocab_size, load_tokenizer(spec).n_vocab
        check(used <= size,
              f"{name}: its tokenizer has ids up to {used - 1}, its embeddings end at {size - 1}")
    except UserError as error:
        raise UserError(f"{flag} {error}") from None
    saved = dict(kind="lm", config=asdict(model.config), tokenizer=spec, task=None, args={}, metrics={},
                 weights_hash=weights_hash(model.state_dict()))     # not its name: a folder may change
    return model.to(device).compute_in(DTYPES[dtype]), saved


def from_pretrained(name_or_dir):
    """A published language model as our class, fp32, nothing frozen.  Prints fields of config.json that
    nothing here follows.  Raises UserError on what is not implemented, missing or damaged."""
    folder = find(name_or_dir)
    hf = read_json_object(folder / "config.json")
    kind, config = config_of(hf)
    fields.report(f"{folder}/config.json", *check_config(kind, hf))
    family = FAMILIES[kind]
    theirs = without_prefixes(read_weights(folder))
    config = settle_tied(folder, family, config, theirs)
    with torch.device("meta"):          # shapes only: the weights come from the file
        model = GPT(config)
    check_memory(model.n_params(), 4, f"{folder}")
    shapes = {name: x.shape for name, x in model.state_dict().items()
              if name != "head.weight" or not config.tied}
    zero = zero_biases(kind, config, hf, shapes)
    state = {}
    for name, shape in shapes.items():
        if name in zero:
            state[name] = torch.zeros(shape)
            continue
        names = their_names(family, name)
        missing = [n for n in names if n not in theirs]
        check(not missing, f"{folder}: the weights lack {', '.join(missing)}")
        state[name] = to_ours(family, config, name, [theirs.pop(n).float() for n in names])
        check(state[name].shape == shape, f"{folder}: {', '.join(names)} make a {name} of shape "
              f"{tuple(state[name].shape)}, config.json says {tuple(shape)}")
    check(not theirs, f"{folder}: weights that a {kind} of this configuration has no place for: "
          f"{', '.join(sorted(theirs)[:5])}")
    if config.tied:
        state["head.weight"] = state["embed.weight"]
    model.load_state_dict(state, assign=True)
    if config.tied:
        model.head.weight = model.embed.weight      # they were assigned apart; make them one matrix again
    return model.freeze(0)


def settle_tied(folder, family, config, theirs):
    """What the weights `theirs` say about a head that config.json ties to the embedding.  A file may hold the
    one matrix under either name.  Two that differ are not tied, as in transformers.  Returns the GPTConfig,
    and leaves in `theirs` what it needs."""
    embed = family.top["embed"] + ".weight"
    if not config.tied or "lm_head.weight" not in theirs:
        return config
    head = theirs.pop("lm_head.weight")
    if torch.equal(theirs.setdefault(embed, head), head):
        return config
    print(f"{folder}: config.json ties the LM head to the embedding, and the file holds two matrices that "
          "differ: they are not tied, as in transformers", flush=True)
    theirs["lm_head.weight"] = head
    return replace(config, tied=False)


def export(model, spec, folder):
    """Writes a language model as a Hugging Face directory: config.json, model.safetensors and, if the
    tokenizer is a published one, tokenizer.json with what its directory held beside it.  Returns the file
    names written.  Raises UserError as `hf_config` does."""
    folder, config = Path(folder), model.config
    tokenizer = load_tokenizer(spec) if spec["kind"] == "bpe" else None
    kept, named = spec.get("kept", {}), {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
    if tokenizer:
        named |= {"bos_token_id": tokenizer.bos} | kept.get("config.json", {})
        named["eos_token_id"] = _with_eos(named["eos_token_id"], tokenizer.eot_token)
    kind, hf = hf_config(config)
    family, theirs = FAMILIES[kind], {}
    for name, x in model.state_dict().items():
        if name == "head.weight" and config.tied:
            continue
        names = [family.head + ".weight"] if name == "head.weight" else [
            family.prefix + their_name for their_name in their_names(family, name)]
        for their_name, part in zip(names, to_theirs(family, config, name, x), strict=True):
            theirs[their_name] = part.float()
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", theirs)
    (folder / "config.json").write_text(json.dumps(named | hf, indent=1))
    written = ["config.json", "model.safetensors"]
    return written + (_write_tokenizer(folder, spec["json"], kept, tokenizer, config) if tokenizer else [])


def _with_eos(named, eos):
    """The ids that end a text, as the directory named them, if eos is one of them."""
    return named if isinstance(named, list) and eos in named else eos


def _write_tokenizer(folder, text, kept, tokenizer, config):
    """Writes tokenizer.json and tokenizer_config.json of a Published tokenizer, and the files that were kept
    for it.  Returns their names."""
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.context,
             "eos_token": tokenizer.names.get(tokenizer.eot_token)}
    contents = {"tokenizer.json": text,
                "tokenizer_config.json": json.dumps(kept.get("tokenizer_config.json", {}) | names, indent=1)}
    if "generation_config.json" in kept:
        generation = kept["generation_config.json"]
        eos = _with_eos(generation.get("eos_token_id"), tokenizer.eot_token)
        contents["generation_config.json"] = json.dumps(generation | {"eos_token_id": eos}, indent=1)
    if "chat_template.jinja" in kept:
        contents["chat_template.jinja"] = kept["chat_template.jinja"]
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
    return list(contents)


def find(name_or_dir):
    """A directory, or the local copy of a hub name, fetched if it is not there -> Path.  Raises UserError if
    neither is to be had."""
    if Path(name_or_dir).is_dir():
        check((Path(name_or_dir) / "config.json").is_file(),
              f"{name_or_dir}: a directory without config.json is no published model; it should hold "
              "config.json, the weights and the tokenizer")
        return Path(name_or_dir)
    check(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_dir),
          f"{name_or_dir}: no such file or directory, and not a hub name (owner/name)")
    from huggingface_hub import snapshot_download
    try:
        folder = Path(snapshot_download(name_or_dir, allow_patterns=["*.json", "*.jinja", "merges.txt"]))
        # one kind of weights: hubs often hold the same ones three times
        for pattern in ("model*.safetensors", "pytorch_model*.bin"):
            folder = Path(snapshot_download(name_or_dir, allow_patterns=[pattern]))
            if any(folder.glob(pattern)):
                break
        return folder
    except Exception as error:      # no network, no such repository, a gated one, ...
        raise UserError(f"{name_or_dir}: no such file or directory, and the hub does not give it "
                        f"({type(error).__name__}: {first_line(error)})") from None


# ------------------------------------------------------------------------------- parameters: names and layout

@dataclass
class Family:
    """What one architecture calls the parameters of our class, and how it lays them out."""
    prefix: str                 # of every name but the head's
    top: dict                   # our module: theirs
    layer: str                  # what stands before the names of layer {}
    parts: dict                 # our module: theirs, in the order in which our matrix stacks them
    head: str = "lm_head"
    transposed: bool = False    # GPT-2 keeps the matrices of linear layers as (in, out)
    interleaved: bool = False   # GPT-NeoX stacks the queries, keys and values of each head, head by head
    position_offset: int = 0    # rows of the position table before position 0; in OPT a legacy of its padding


FAMILIES = {
    "gpt2": Family("transformer.", {"embed": "wte", "embed_position": "wpe", "norm": "ln_f"}, "h.{}.",
                   {"norm1": ["ln_1"], "norm2": ["ln_2"], "attn.qkv": ["attn.c_attn"],
                    "attn.out": ["attn.c_proj"], "mlp.up": ["mlp.c_fc"], "mlp.down": ["mlp.c_proj"]},
                   transposed=True),
    "opt": Family("model.decoder.",
                  {"embed": "embed_tokens", "embed_position": "embed_positions", "norm": "final_layer_norm"},
                  "layers.{}.",
                  {"norm1": ["self_attn_layer_norm"], "norm2": ["final_layer_norm"],
                   "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                   "attn.out": ["self_attn.out_proj"], "mlp.up": ["fc1"], "mlp.down": ["fc2"]},
                  position_offset=2),
    "llama": Family("model.", {"embed": "embed_tokens", "norm": "norm"}, "layers.{}.",
                    {"norm1": ["input_layernorm"], "norm2": ["post_attention_layernorm"],
                     "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                     "attn.out": ["self_attn.o_proj"], "mlp.up": ["mlp.gate_proj", "mlp.up_proj"],
                     "mlp.down": ["mlp.down_proj"],
                     "attn.q_norm": ["self_attn.q_norm"], "attn.k_norm": ["self_attn.k_norm"]}),
    "gpt_neox": Family("gpt_neox.", {"embed": "embed_in", "norm": "final_layer_norm"}, "layers.{}.",
                       {"norm1": ["input_layernorm"], "norm2": ["post_attention_layernorm"],
                        "attn.qkv": ["attention.query_key_value"], "attn.out": ["attention.dense"],
                        "mlp.up": ["mlp.dense_h_to_4h"], "mlp.down": ["mlp.dense_4h_to_h"]},
                       head="embed_out", interleaved=True),
}
FAMILIES |= {"qwen2": FAMILIES["llama"], "qwen3": FAMILIES["llama"]}
# buffers that old files carry beside their parameters
BUFFERS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")


def their_names(family, name):
    """The name of one of our parameters -> their names, without prefix, in the order in which ours stacks
    them."""
    module, kind = name.rsplit(".", 1)
    if module == "head":
        return ["lm_head." + kind]
    if found := re.match(r"blocks\.(\d+)\.(.+)", module):
        return [f"{family.layer.format(found[1])}{part}.{kind}" for part in family.parts[found[2]]]
    return [f"{family.top[module]}.{kind}"]


def without_prefixes(weights):
    """{name: tensor} of a file without buffers and without the names' prefixes, which come and go between
    versions of one model, and with one name for the head."""
    return {re.sub(r"^(transformer\.|model\.decoder\.|decoder\.|model\.|gpt_neox\.)", "", name)
            .replace("embed_out.", "lm_head."): x for name, x in weights.items() if not BUFFERS.search(name)}


def to_ours(family, config, name, parts):
    """Their tensors of our parameter `name` -> ours, one tensor."""
    if family.transposed and _is_matrix_of_a_layer(name):
        parts = [p.T for p in parts]
    if family.interleaved and ".attn.qkv." in name:
        parts = [_regroup(p, config.n_head, 3) for p in parts]
    if name.startswith("embed_position"):
        parts = [p[family.position_offset:] for p in parts]
    return torch.cat(parts).contiguous()


def to_theirs(family, config, name, x):
    """The inverse of `to_ours`: our parameter x -> their tensors, a list."""
    parts = [x]
    if len(their_names(family, name)) > 1:
        q, kv = config.n_head * config.d_head, config.n_kv_head * config.d_head
        parts = x.split([q, kv, kv] if ".attn.qkv." in name else [config.d_ff, config.d_ff])
    if family.transposed and _is_matrix_of_a_layer(name):
        parts = [p.T for p in parts]
    if family.interleaved and ".attn.qkv." in name:
        parts = [_regroup(p, 3, config.n_head) for p in parts]
    if name.startswith("embed_position"):
        parts = [torch.cat((p.new_zeros(family.position_offset, p.shape[1]), p)) for p in parts]
    return parts


def _regroup(x, outer, inner):
    """Rows of x (outer * inner * E, ...) in the order inner, outer, E.  A wrong number of rows stays as it
    is: the check of shapes names it."""
    if len(x) % (outer * inner):
        return x
    return x.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)


def _is_matrix_of_a_layer(name):
    return re.search(r"(attn|mlp)\.\w+\.weight", name)


def zero_biases(kind, config, hf, names):
    """Those of our parameters `names` that the model lacks and that are zero in our class: a LLaMA may have
    biases in its attention only or in its MLPs only, a GPT-NeoX in its MLPs only, and our class has all or
    none."""
    if kind not in ("llama", "gpt_neox") or not config.bias:
        return set()
    has = {".attn.": hf.get("attention_bias", kind == "gpt_neox"),
           ".mlp.": hf.get("mlp_bias", False) or kind == "gpt_neox"}
    lacking = [part for part, there in has.items() if not there]
    return {name for name in names if name.endswith(".bias") and any(part in name for part in lacking)}


# ------------------------------------------------------------------------------------------------ config.json

def config_of(hf):
    """config.json as a dict -> (family name, GPTConfig).  Raises UserError on an architecture, or a variant
    of one, that is not implemented."""
    kind = hf.get("model_type")
    check(isinstance(kind, str) and kind in READERS,
          f"config.json: model_type {kind!r} is not implemented; {', '.join(READERS)} are")
    try:
        check_config(kind, hf)
        hf = {name: value for name, value in hf.items() if value is not None}       # null is the default
        shared = dict(vocab_size=hf["vocab_size"],
                      tied=hf.get("tie_word_embeddings", kind in ("gpt2", "opt")))
        return kind, typed(GPTConfig(**shared, **READERS[kind](hf)))
    except KeyError as missing:
        raise UserError(f"config.json: {missing} is missing, which a {kind} model needs") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"config.json: {error}") from None


def check_config(kind, hf):
    """Compares config.json with the tables of fields, as `published_fields.check_fields` does."""
    noted, unknown = fields.check_fields("config.json", hf, fields.CONFIG[kind])
    if "rope_scaling" in fields.CONFIG[kind]:
        unknown += fields.check_fields("config.json", _rope_of(hf), fields.ROPE)[1]
    for name in hf.get("architectures") or []:
        check(re.search(r"(ForCausalLM|LMHeadModel|Model)$", name),
              f"config.json: architectures = {name}, a model with another head than a language model's")
    return noted, unknown


def _read_gpt2(hf):
    other_names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                   "max_position_embeddings": "n_positions"}
    hf = {ours: hf[theirs] for theirs, ours in other_names.items() if theirs in hf} | hf
    return dict(n_layer=hf["n_layer"], n_head=hf["n_head"], d_model=hf["n_embd"], d_ff=hf.get("n_inner", 0),
                context=hf["n_positions"], position="learned", norm="layernorm", bias=True,
                norm_eps=hf.get("layer_norm_epsilon", 1e-5),
                activation=_activation(hf.get("activation_function", "gelu_new")))


def _read_opt(hf):
    check(hf.get("word_embed_proj_dim", hf["hidden_size"]) == hf["hidden_size"],
          f"config.json: word_embed_proj_dim = {hf.get('word_embed_proj_dim')} (embeddings of another width, "
          "as in opt-350m) is not implemented")
    return dict(n_layer=hf["num_hidden_layers"], n_head=hf["num_attention_heads"], d_model=hf["hidden_size"],
                d_ff=hf["ffn_dim"], context=hf["max_position_embeddings"], position="learned",
                norm="layernorm", bias=hf.get("enable_bias", True),
                activation=_activation(hf.get("activation_function", "relu")))


def _read_llama(hf):
    check(hf.get("hidden_act", "silu") == "silu",
          f"config.json: hidden_act = {hf.get('hidden_act')!r} is not implemented, only 'silu' is")
    theta, scaling, _ = _read_rope(hf)
    return dict(n_layer=hf["num_hidden_layers"], n_head=hf["num_attention_heads"],
                n_kv_head=hf.get("num_key_value_heads", 0), d_model=hf["hidden_size"],
                d_head=hf.get("head_dim", 0), d_ff=hf["intermediate_size"],
                context=hf["max_position_embeddings"], position="rope", norm="rmsnorm", activation="swiglu",
                bias=hf.get("attention_bias", False) or hf.get("mlp_bias", False),
                norm_eps=hf.get("rms_norm_eps", 1e-6), rope_theta=theta, rope_scaling=scaling)


def _read_qwen2(hf):
    others = set(hf.get("layer_types", ())) - {"full_attention"}
    check(not others, f"config.json: layer_types {', '.join(map(str, others))} are not implemented")
    return _read_llama(hf) | dict(bias=False, qkv_bias=True)


def _read_qwen3(hf):
    return _read_qwen2(hf) | dict(qkv_bias=False, qk_norm=True, d_head=hf.get("head_dim", 128))


def _read_gpt_neox(hf):
    theta, scaling, part = _read_rope(hf, hf.get("rotary_emb_base", 10000.), hf.get("rotary_pct", 0.25))
    return dict(n_layer=hf["num_hidden_layers"], n_head=hf["num_attention_heads"], d_model=hf["hidden_size"],
                d_ff=hf["intermediate_size"], context=hf["max_position_embeddings"], position="rope",
                norm="layernorm", activation=_activation(hf.get("hidden_act", "gelu")), bias=True,
                parallel=hf.get("use_parallel_residual", True), norm_eps=hf.get("layer_norm_eps", 1e-5),
                rope_theta=theta, rope_scaling=scaling, rope_part=part)


READERS = {"gpt2": _read_gpt2, "opt": _read_opt, "llama": _read_llama, "qwen2": _read_qwen2,
           "qwen3": _read_qwen3, "gpt_neox": _read_gpt_neox}


def _activation(name):
    known = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
             "gelu": "gelu", "relu": "relu"}
    check(name in known, f"config.json: activation {name!r} is not implemented; {', '.join(known)} are")
    return known[name]


ROPE_SCALING = {  # type: its numbers
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def _rope_of(hf):
    """The object that says how positions turn: transformers 4 calls it rope_scaling, 5 rope_parameters."""
    return hf.get("rope_scaling") or hf.get("rope_parameters") or {}


def _read_rope(hf, theta=10000., part=1.0):
    """(theta, scaling of GPTConfig, the part of a head that turns).  theta, part: the defaults."""
    rope = _rope_of(hf)
    theta = float(rope.get("rope_theta", hf.get("rope_theta", theta)))
    part = float(rope.get("partial_rotary_factor", part))
    check(part == 1 or hf["model_type"] == "gpt_neox",
          f"config.json: partial_rotary_factor = {part} is not implemented in this family")
    kind = rope.get("rope_type", rope.get("type", "default"))
    check(kind in ("default", *ROPE_SCALING), f"config.json: rope scaling of type {kind!r} is not "
          "implemented; default, linear and llama3 are")
    if kind == "default":
        return theta, None, part
    return theta, {"rope_type": kind} | {name: float(rope[name]) for name in ROPE_SCALING[kind]}, part


def hf_config(config):
    """Our configuration as config.json of the family that can hold it: (family name, dict).  Raises UserError
    on a shape that no published architecture has."""
    c = config
    shared = dict(vocab_size=c.vocab_size, tie_word_embeddings=c.tied, dtype="float32")
    kind = _family_of(c)
    check(kind, f"no published architecture has position {c.position}, norm {c.norm}, activation "
          f"{c.activation} and bias {c.bias} together: export works for GPT-2, OPT, LLaMA, Qwen and GPT-NeoX "
          "shapes (sft.py --shape)")
    return kind, shared | {"gpt2": _write_gpt2, "opt": _write_opt, "gpt_neox": _write_gpt_neox,
                           "llama": _write_llama, "qwen2": _write_qwen2, "qwen3": _write_qwen3}[kind](c)


def _family_of(c):
    """The family that can hold a configuration, or None."""
    if (c.position, c.norm, c.activation, c.rope_part, c.parallel) == ("rope", "rmsnorm", "swiglu", 1, False):
        kinds = {(False, False): "llama", (True, False): "qwen2", (False, True): "qwen3"}
        kind = kinds.get((c.qkv_bias, c.qk_norm))
        return kind if kind == "llama" or not c.bias else None
    plain = c.activation != "swiglu" and c.n_kv_head == c.n_head and c.n_head * c.d_head == c.d_model
    if not plain or c.norm != "layernorm" or c.qkv_bias or c.qk_norm:
        return None
    if c.position == "rope":
        return "gpt_neox" if c.bias else None
    if c.activation == "relu" and c.norm_eps == 1e-5 and not c.parallel:
        return "opt"
    return "gpt2" if c.bias and not c.parallel else None


ACTIVATION = {"gelu_tanh": "gelu_new"}      # ours: theirs, where the names differ


def _write_gpt2(c):
    return dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], n_embd=c.d_model, n_layer=c.n_layer,
                n_head=c.n_head, n_inner=c.d_ff, n_positions=c.context,
                activation_function=ACTIVATION.get(c.activation, c.activation), layer_norm_epsilon=c.norm_eps)


def _write_opt(c):
    return dict(model_type="opt", architectures=["OPTForCausalLM"], hidden_size=c.d_model,
                word_embed_proj_dim=c.d_model, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
                ffn_dim=c.d_ff, max_position_embeddings=c.context, activation_function="relu",
                do_layer_norm_before=True, enable_bias=c.bias, dropout=0.0)


def _rope_parameters(c):
    return (c.rope_scaling or {"rope_type": "default"}) | {"rope_theta": c.rope_theta}


def _write_llama(c):
    return dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=c.d_model,
                num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
                head_dim=c.d_head, intermediate_size=c.d_ff, max_position_embeddings=c.context,
                hidden_act="silu", rms_norm_eps=c.norm_eps, attention_bias=c.bias, mlp_bias=c.bias,
                rope_theta=c.rope_theta, rope_scaling=c.rope_scaling, rope_parameters=_rope_parameters(c))


def _write_qwen2(c):
    return _write_llama(c) | dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"],
                                  use_sliding_window=False)


def _write_qwen3(c):
    return _write_qwen2(c) | dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"])


def _write_gpt_neox(c):
    return dict(model_type="gpt_neox", architectures=["GPTNeoXForCausalLM"], hidden_size=c.d_model,
                num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, intermediate_size=c.d_ff,
                max_position_embeddings=c.context, hidden_act=ACTIVATION.get(c.activation, c.activation),
                use_parallel_residual=c.parallel, layer_norm_eps=c.norm_eps, attention_bias=True,
                hidden_dropout=0.0, attention_dropout=0.0, rotary_pct=c.rope_part,
                rotary_emb_base=c.rope_theta, rope_scaling=c.rope_scaling,
                rope_parameters=_rope_parameters(c) | {"partial_rotary_factor": c.rope_part})


# ----------------------------------------------------------------------------------------------- weight files

STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: eight bytes with the length of a JSON header, the header, raw
    bytes. Tensors are views of the mapped file.  Raises ValueError where header and file disagree."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    if not header:
        return {}
    data = np.memmap(path, dtype=np.uint8, mode="c", offset=8 + length)
    return {name: _view(data, name, STORED[entry["dtype"]], entry["shape"], *entry["data_offsets"])
            for name, entry in header.items()}


def _view(data, name, dtype, shape, start, end):
    """The tensor that bytes start to end of data hold."""
    count = math.prod(shape)
    if not 0 <= start <= end <= len(data) or end - start != count * dtype.itemsize:
        raise ValueError(f"{name}: bytes {start} to {end} do not hold a {dtype} of shape {shape}")
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start).view(shape)


def write_safetensors(path, tensors):
    """The inverse of `read_safetensors`."""
    names, header, place = {v: k for k, v in STORED.items()}, {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        size = x.numel() * x.element_size()
        header[name] = {"dtype": names[x.dtype], "shape": list(x.shape),
                        "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)     # so that the data start at a multiple of 8
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            f.write(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def read_weights(folder):
    """{name: tensor} of a directory's weights.  Raises UserError if there are none or they are damaged.
    torch.load reads weights only, so it refuses a pickle that would run code."""
    weights = {}
    for name in _weight_files(folder):
        path = folder / name
        check(path.is_file(), f"{path}: a shard is missing")
        try:
            weights |= _read_file(path)
        except Exception as error:  # a damaged file makes the readers raise many kinds
            raise UserError(f"{path}: damaged, or not plain weights ({first_line(error)})") from None
    return weights


def _weight_files(folder):
    """Names of the files that hold a directory's weights: one file, or the shards that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = sorted(set(read_json_object(index).get("weight_map", {}).values()))
            check(files and all(Path(f).name == f for f in files),
                  f"{index}: weight_map must name files of this directory")
            return files
    raise UserError(f"{folder}: no model.safetensors and no pytorch_model.bin, sharded or not")


def _read_file(path):
    if path.suffix == ".bin":
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    try:
        from safetensors.torch import load_file     # checks faster, where it is installed
    except ImportError:
        return read_safetensors(path)
    return load_file(path)
