"""Published weights and tokenizers, in and out: GPT-2, OPT and the LLaMA family as Hugging Face directories.

    python sft.py --model gpt2                            # a hub name or a directory: no checkpoint needed
    python pretrained.py --model HuggingFaceTB/SmolLM2-135M --prompt "Paris is"     # look at one
    python pretrained.py --model ckpt_sft.pt --export DIR     # a directory that transformers loads

A directory holds config.json, the weights (model.safetensors or pytorch_model.bin, sharded or not) and the
tokenizer (tokenizer.json, or vocab.json and merges.txt).  A hub name is fetched by huggingface_hub, which
comes with `datasets`.  Weights are held in fp32.

Two things differ between families and this project's one class, and both are tables here: what a parameter is
called (`FAMILIES`), and how the configuration spells a choice (`config_of`).
"""
import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import regex            # comes with tiktoken, which uses the same syntax
import tiktoken
import torch

import model as M
from runtime import DTYPES, Common, Fault, first_line, load_checkpoint, loads, require, run, setup

# how GPT-2 cuts text before merging; HF's ByteLevel(use_regex) is the same
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# the same after each digit was cut off by itself (Digits before ByteLevel: SmolLM2, StarCoder)
PIECES_DIGITS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""


# ------------------------------------------------------------------------------------------- names and shapes

@dataclass
class Family:
    """What one architecture calls the parameters of our class."""
    prefix: str                 # of every name but the head's
    top: dict                   # our module: theirs
    layer: str                  # what stands before the names of layer {}
    parts: dict                 # our module: theirs, in the order in which they are stacked in our matrix
    transposed: bool = False    # GPT-2 keeps its linear layers as (in, out)


FAMILIES = {
    "gpt2": Family("transformer.", {"embed": "wte", "embed_position": "wpe", "norm": "ln_f"}, "h.{}.",
                   {"norm1": ["ln_1"], "norm2": ["ln_2"], "attn.qkv": ["attn.c_attn"],
                    "attn.out": ["attn.c_proj"], "mlp.up": ["mlp.c_fc"], "mlp.down": ["mlp.c_proj"]}, True),
    "opt": Family("model.decoder.",
                  {"embed": "embed_tokens", "embed_position": "embed_positions", "norm": "final_layer_norm"},
                  "layers.{}.",
                  {"norm1": ["self_attn_layer_norm"], "norm2": ["final_layer_norm"],
                   "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                   "attn.out": ["self_attn.out_proj"], "mlp.up": ["fc1"], "mlp.down": ["fc2"]}),
    "llama": Family("model.", {"embed": "embed_tokens", "norm": "norm"}, "layers.{}.",
                    {"norm1": ["input_layernorm"], "norm2": ["post_attention_layernorm"],
                     "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
                     "attn.out": ["self_attn.o_proj"], "mlp.up": ["mlp.gate_proj", "mlp.up_proj"],
                     "mlp.down": ["mlp.down_proj"]}),
}
OPT_OFFSET = 2      # rows of OPT's position table before position 0, a legacy of its padding
# buffers that old files carry beside their parameters
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")


def their_names(family, ours):
    """The name of one of our parameters -> their names, without prefix, in the order they are stacked."""
    module, kind = ours.rsplit(".", 1)
    if module == "head":
        return ["lm_head." + kind]
    if found := re.match(r"blocks\.(\d+)\.(.+)", module):
        return [f"{family.layer.format(found[1])}{part}.{kind}" for part in family.parts[found[2]]]
    return [f"{family.top[module]}.{kind}"]


def config_of(hf):
    """config.json as a dict -> (family name, GPTConfig).  Raises Fault on an architecture, or a variant of
    one, that is not implemented."""
    kind = hf.get("model_type")
    require(kind in FAMILIES, f"config.json: model_type {kind!r} is not implemented; "
            f"{', '.join(FAMILIES)} are")

    def only(name, needed, meaning):
        require(hf.get(name, needed) == needed, f"config.json: {name} = {hf.get(name)!r} ({meaning}) is not "
                f"implemented, only {needed!r} is")
    try:
        common = dict(vocab_size=hf["vocab_size"], tied=hf.get("tie_word_embeddings", kind != "llama"))
        if kind == "gpt2":
            only("scale_attn_weights", True, "unscaled attention")
            only("scale_attn_by_inverse_layer_idx", False, "attention scaled by layer")
            only("add_cross_attention", False, "an encoder's states")
            config = dict(n_layer=hf["n_layer"], n_head=hf["n_head"], d_model=hf["n_embd"],
                          d_ff=hf.get("n_inner") or 0, context=hf["n_positions"], position="learned",
                          norm="layernorm", bias=True, norm_eps=hf.get("layer_norm_epsilon", 1e-5),
                          activation=_activation(hf.get("activation_function", "gelu_new")))
        elif kind == "opt":
            only("do_layer_norm_before", True, "layers normalised behind, as in opt-350m")
            only("word_embed_proj_dim", hf["hidden_size"], "embeddings of another width, as in opt-350m")
            only("_remove_final_layer_norm", False, "no final norm")
            only("layer_norm_elementwise_affine", True, "norms without weights")
            config = dict(n_layer=hf["num_hidden_layers"], n_head=hf["num_attention_heads"],
                          d_model=hf["hidden_size"], d_ff=hf["ffn_dim"],
                          context=hf["max_position_embeddings"], position="learned", norm="layernorm",
                          bias=hf.get("enable_bias", True),
                          activation=_activation(hf.get("activation_function", "relu")))
        else:
            only("hidden_act", "silu", "another activation")
            only("head_dim", hf["hidden_size"] // hf["num_attention_heads"], "heads of another width")
            theta, scaling = _rope(hf)
            config = dict(n_layer=hf["num_hidden_layers"], n_head=hf["num_attention_heads"],
                          n_kv_head=hf.get("num_key_value_heads") or 0, d_model=hf["hidden_size"],
                          d_ff=hf["intermediate_size"], context=hf["max_position_embeddings"],
                          position="rope", norm="rmsnorm", activation="swiglu",
                          bias=hf.get("attention_bias", False) or hf.get("mlp_bias", False),
                          norm_eps=hf.get("rms_norm_eps", 1e-6), rope_theta=theta, rope_scaling=scaling)
        return kind, M.GPTConfig(**common, **config)
    except KeyError as missing:
        raise Fault(f"config.json: {missing} is missing, which a {kind} model needs") from None
    except (TypeError, ValueError) as error:
        raise Fault(f"config.json: {error}") from None


def _activation(name):
    known = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
    require(name in known, f"config.json: activation {name!r} is not implemented; {', '.join(known)} are")
    return known[name]


def _rope(hf):
    """(theta, scaling for GPTConfig), in the spelling of transformers 4 (rope_scaling) or 5
    (rope_parameters)."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10000.)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    require(kind in ("default", "linear", "llama3"),
            f"config.json: rope scaling of type {kind!r} is not implemented; default, linear and llama3 are")
    names = {"default": (), "linear": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
    return theta, {"rope_type": kind} | {k: float(rope[k]) for k in names[kind]} if names[kind] else None


# ----------------------------------------------------------------------------------------------- weight files

STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: eight bytes with the length of a JSON header, the header, raw
    bytes.  Tensors are views of the mapped file.  Raises ValueError where header and file disagree."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    data, out = np.memmap(path, dtype=np.uint8, mode="c", offset=8 + length) if header else None, {}
    for name, entry in header.items():
        dtype, shape, (start, end) = STORED[entry["dtype"]], entry["shape"], entry["data_offsets"]
        count = math.prod(shape)
        if not 0 <= start <= end <= len(data) or end - start != count * dtype.itemsize:
            raise ValueError(f"{name}: bytes {start} to {end} do not hold a {dtype} of shape {shape}")
        out[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=start).view(shape) if count \
            else torch.empty(shape, dtype=dtype)
    return out


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
    """{name: tensor} of a directory's weights.  Raises Fault if there are none or they are damaged; pickles
    are read with weights only."""
    for whole, index in (("model.safetensors", "model.safetensors.index.json"),
                         ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if (folder / whole).is_file():
            files = [whole]
        elif (folder / index).is_file():
            files = sorted(set(_json(folder / index).get("weight_map", {}).values()))
            require(files and all(Path(f).name == f for f in files),
                    f"{folder / index}: weight_map must name files of this directory")
        else:
            continue
        out = {}
        for name in files:
            path = folder / name
            require(path.is_file(), f"{path}: a shard is missing")
            try:
                out |= _read_file(path)
            except Exception as error:  # a damaged file makes the readers raise many kinds
                raise Fault(f"{path}: damaged, or not plain weights ({first_line(error)})") from None
        return out
    raise Fault(f"{folder}: no model.safetensors and no pytorch_model.bin, sharded or not")


def _read_file(path):
    if path.suffix == ".bin":
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    try:
        from safetensors.torch import load_file     # faster checks, where it is installed
    except ImportError:
        return read_safetensors(path)
    return load_file(path)


def _text(path):
    try:
        return path.read_text(encoding="utf-8")
    except (ValueError, OSError) as error:
        raise Fault(f"{path}: cannot be read as text ({error})") from None


def _json(path):
    try:
        out = loads(_text(path))
    except ValueError as error:
        raise Fault(f"{path}: cannot be read as JSON ({error})") from None
    require(isinstance(out, dict), f"{path}: a JSON object is needed")
    return out


# ---------------------------------------------------------------------------------------------- in, and out

def find(name_or_dir):
    """A directory, or a hub name's local copy (fetched if need be) -> Path.  Raises Fault if neither is to be
    had."""
    if Path(name_or_dir).is_dir():
        require((Path(name_or_dir) / "config.json").is_file(),
                f"{name_or_dir}: a directory without config.json is no published model")
        return Path(name_or_dir)
    require(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name_or_dir),
            f"{name_or_dir}: no such file or directory, and not a hub name (owner/name)")
    from huggingface_hub import snapshot_download
    try:
        folder = Path(snapshot_download(name_or_dir, allow_patterns=["*.json", "merges.txt"]))
        # one kind of weights: hubs often hold the same ones three times
        for pattern in ("model*.safetensors", "pytorch_model*.bin"):
            folder = Path(snapshot_download(name_or_dir, allow_patterns=[pattern]))
            if any(folder.glob(pattern)):
                break
        return folder
    except Exception as error:      # no network, no such repository, a gated one, ...
        raise Fault(f"{name_or_dir}: no such file or directory, and the hub does not give it "
                    f"({type(error).__name__}: {first_line(error)})") from None


def from_pretrained(name_or_dir):
    """A published language model as our class, fp32, nothing frozen.  Raises Fault on what is not
    implemented, missing or damaged."""
    folder = find(name_or_dir)
    hf = _json(folder / "config.json")
    kind, config = config_of(hf)
    family, found = FAMILIES[kind], {}
    for name, x in read_weights(folder).items():
        if not BUFFERS.search(name):    # prefixes come and go between versions of one model
            found[re.sub(r"^(transformer\.|model\.decoder\.|decoder\.|model\.)", "", name)] = x
    with torch.device("meta"):          # shapes only: the weights come from the file
        model = M.GPT(config)
    # of the two kinds of biases a LLaMA may have just one; in our class the other is then zero
    zero = [part for part, flag in (("attn", "attention_bias"), ("mlp", "mlp_bias"))
            if kind == "llama" and config.bias and not hf.get(flag, False)]
    state = {}
    for ours, like in model.state_dict().items():
        if ours.endswith(".bias") and any(f".{part}." in ours for part in zero):
            state[ours] = torch.zeros(like.shape)
            continue
        if ours == "head.weight" and config.tied:
            found.pop("lm_head.weight", None)
            continue
        names = their_names(family, ours)
        missing = [n for n in names if n not in found]
        require(not missing, f"{folder}: the weights lack {', '.join(missing)}")
        parts = [found.pop(n).float() for n in names]
        if family.transposed and re.search(r"(attn|mlp)\.\w+\.weight", ours):
            parts = [p.T for p in parts]
        if kind == "opt" and ours.startswith("embed_position"):
            parts = [p[OPT_OFFSET:] for p in parts]
        state[ours] = torch.cat(parts).contiguous()
        require(state[ours].shape == like.shape, f"{folder}: {', '.join(names)} make a {ours} of shape "
                f"{tuple(state[ours].shape)}, config.json says {tuple(like.shape)}")
    require(not found, f"{folder}: weights that a {kind} of this configuration has no place for: "
            f"{', '.join(sorted(found)[:5])}")
    if config.tied:
        state["head.weight"] = state["embed.weight"]
    model.load_state_dict(state, assign=True)
    if config.tied:
        model.head.weight = model.embed.weight      # assigned apart; one matrix again
    return model.freeze(0)


def load_model(name, flag="--model", device="cpu", dtype="fp32"):
    """A language model from a checkpoint, a directory or a hub name: (GPT, what a checkpoint carries besides
    weights).  Raises Fault as `load_checkpoint` and `from_pretrained` do."""
    if name.endswith(".pt") or Path(name).is_file():
        return load_checkpoint(name, "lm", flag, device, dtype)
    try:
        model, spec = from_pretrained(name), tokenizer_of(find(name))
        size, used = model.config.vocab_size, encoding(spec).n_vocab
        require(used <= size,
                f"{name}: its tokenizer has ids up to {used - 1}, its embeddings end at {size - 1}")
    except Fault as fault:
        raise Fault(f"{flag} {fault}") from None
    saved = dict(kind="lm", config=asdict(model.config), tokenizer=spec, task=None, args={}, metrics={},
                 digest=name)
    return model.to(device).compute_in(DTYPES[dtype]), saved


def hf_config(config, eos=None, bos=None):
    """Our configuration as config.json of the family that can hold it: (family name, dict).  Raises Fault on
    a shape that no published architecture has."""
    c = config
    shape = (c.position, c.norm, c.activation == "swiglu")
    common = dict(vocab_size=c.vocab_size, tie_word_embeddings=c.tied, eos_token_id=eos, bos_token_id=bos,
                  dtype="float32")
    if shape == ("rope", "rmsnorm", True):
        scaling = c.rope_scaling or {"rope_type": "default"}
        return "llama", dict(common, model_type="llama", architectures=["LlamaForCausalLM"],
                             hidden_size=c.d_model, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
                             num_key_value_heads=c.n_kv_head, head_dim=c.d_model // c.n_head,
                             intermediate_size=c.d_ff, max_position_embeddings=c.context, hidden_act="silu",
                             rms_norm_eps=c.norm_eps, attention_bias=c.bias, mlp_bias=c.bias,
                             rope_theta=c.rope_theta, rope_scaling=c.rope_scaling,
                             rope_parameters=scaling | {"rope_theta": c.rope_theta})
    if shape == ("learned", "layernorm", False) and c.n_kv_head == c.n_head:
        if c.activation == "relu" and c.norm_eps == 1e-5:
            return "opt", dict(common, model_type="opt", architectures=["OPTForCausalLM"],
                               hidden_size=c.d_model, word_embed_proj_dim=c.d_model,
                               num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, ffn_dim=c.d_ff,
                               max_position_embeddings=c.context, activation_function="relu",
                               do_layer_norm_before=True, enable_bias=c.bias, dropout=0.0)
        if c.bias:
            name = {"gelu_tanh": "gelu_new"}.get(c.activation, c.activation)
            return "gpt2", dict(common, model_type="gpt2", architectures=["GPT2LMHeadModel"],
                                n_embd=c.d_model,
                                n_layer=c.n_layer, n_head=c.n_head, n_inner=c.d_ff, n_positions=c.context,
                                activation_function=name, layer_norm_epsilon=c.norm_eps)
    raise Fault(f"no published architecture has position {c.position}, norm {c.norm}, activation "
                f"{c.activation} and bias {c.bias} together: export works for GPT-2, OPT and LLaMA shapes "
                "(sft.py --shape)")


def export(model, spec, folder):
    """Writes a language model as a Hugging Face directory: config.json, model.safetensors and, where it came
    from one, tokenizer.json.  Returns the file names written.  Raises Fault as `hf_config` does."""
    folder = Path(folder)
    enc = encoding(spec) if spec["kind"] == "bpe" else None
    kind, hf = hf_config(model.config, *((enc.eot_token, enc.bos) if enc else ()))
    family, out = FAMILIES[kind], {}
    c, head = model.config, model.config.d_model // model.config.n_head
    sizes = {"attn.qkv": [c.n_head * head, c.n_kv_head * head, c.n_kv_head * head],
             "mlp.up": [c.d_ff, c.d_ff]}
    for ours, x in model.state_dict().items():
        if ours == "head.weight" and c.tied:
            continue
        names = their_names(family, ours)
        parts = x.split(sizes[ours.split(".", 2)[2].rsplit(".", 1)[0]]) if len(names) > 1 else [x]
        if family.transposed and re.search(r"(attn|mlp)\.\w+\.weight", ours):
            parts = [p.T for p in parts]
        if kind == "opt" and ours.startswith("embed_position"):
            parts = [torch.cat((p.new_zeros(OPT_OFFSET, p.shape[1]), p)) for p in parts]
        for name, part in zip(names, parts):
            prefix = "" if name.startswith("lm_head") else family.prefix
            out[prefix + name] = part.float()
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", out)
    (folder / "config.json").write_text(json.dumps(hf, indent=1))
    written = ["config.json", "model.safetensors"]
    if enc:
        (folder / "tokenizer.json").write_text(spec["json"], encoding="utf-8")
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": c.context}
        names |= {f"{what}_token": text for text, i in enc.special.items()
                  for what, id in (("eos", enc.eot_token), ("bos", enc.bos)) if i == id}
        (folder / "tokenizer_config.json").write_text(json.dumps(names, indent=1))
        written += ["tokenizer.json", "tokenizer_config.json"]
    return written


# ------------------------------------------------------------------------------------------------- tokenizers

def tokenizer_of(folder):
    """The specification of a directory's tokenizer, which checkpoints carry: {"kind": "bpe", "json": the text
    of tokenizer.json, "eos": id, "bos": id that begins every prompt, or None}.  Raises Fault on kinds that
    tiktoken cannot run."""
    if (folder / "tokenizer.json").is_file():
        text = _text(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        merges = _text(folder / "merges.txt").splitlines()      # OPT's form
        text = json.dumps(tokenizer_json(_json(folder / "vocab.json"),
                                         [m for m in merges if m and not m.startswith("#version")]))
    else:
        raise Fault(f"{folder}: no tokenizer.json, and no vocab.json with merges.txt; byte-level BPE "
                    "tokenizers work (GPT-2, OPT, SmolLM2, Llama 3), SentencePiece's tokenizer.model "
                    "does not")
    named = {}      # "eos_token" and "bos_token", as text; later files win
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            named |= {k: v["content"] if isinstance(v, dict) else v for k, v in _json(folder / name).items()
                      if k in ("eos_token", "bos_token", "add_bos_token") and v}
    hf = _json(folder / "config.json") if (folder / "config.json").is_file() else {}
    spec = {"kind": "bpe", "json": text, "eos": None, "bos": None}
    parsed = _parse(spec, str(folder))
    ids = parsed["vocab"] | parsed["special"]
    eos = hf.get("eos_token_id")        # Llama 3's is a list
    eos = ids.get(named.get("eos_token"), eos[0] if isinstance(eos, list) else eos)
    require(isinstance(eos, int), f"{folder}: neither tokenizer_config.json nor config.json names an end of "
            "sequence (eos_token, eos_token_id)")
    begins = parsed["begins"] if parsed["begins"] is not None else \
        named.get("bos_token") if named.get("add_bos_token") else None
    return spec | {"eos": eos, "bos": ids.get(begins)}


def tokenizer_json(vocab, merges, special=()):
    """tokenizer.json of GPT-2's kind, whole, as the tokenizers library reads it.  vocab: {token: id}; merges:
    ["a b"]; special: [(text, id)]."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for text, i in special]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level,
            "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                      "merges": merges}}


def _parse(spec, where="tokenizer.json"):
    """tokenizer.json -> {"vocab", "merges", "special", "pattern", "begins"}, or a Fault that says what cannot
    be turned into a tiktoken Encoding."""
    works = "byte-level BPE tokenizers work (GPT-2, OPT, SmolLM2, Llama 3)"
    try:
        data = loads(spec["json"])
        kind, model = data["model"].get("type", "BPE"), data["model"]
        require(kind == "BPE" and not model.get("byte_fallback"),
                f"{where}: a {'SentencePiece-like BPE' if kind == 'BPE' else kind} tokenizer cannot be "
                f"turned into a tiktoken Encoding; {works}")
        require(not data.get("normalizer"), f"{where}: it changes text before cutting it "
                f"({(data.get('normalizer') or {}).get('type')}), which is not implemented; {works}")
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        return {"vocab": model["vocab"], "merges": merges, "pattern": _pattern(data, where, works),
                "special": {t["content"]: t["id"] for t in data.get("added_tokens", [])},
                "begins": _begins(data.get("post_processor"))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Fault(f"{where}: damaged tokenizer ({type(error).__name__}: {error})") from None


def _pattern(data, where, works):
    """The regular expression that cuts text, from the pre-tokenizer."""
    steps = data["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [s.get("type") for s in steps]
    byte_level = steps[-1]
    require(kinds[-1] == "ByteLevel" and not byte_level.get("add_prefix_space"),
            f"{where}: pre-tokenizer {' + '.join(map(str, kinds))} is not implemented; {works}")
    if kinds == ["ByteLevel"] and byte_level.get("use_regex", True):
        return PIECES
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") \
            and byte_level.get("use_regex", True):
        return PIECES_DIGITS
    if kinds == ["Split", "ByteLevel"] and not byte_level.get("use_regex", True):
        behaviour = steps[0].get("behavior"), bool(steps[0].get("invert"))
        if "Regex" in steps[0]["pattern"] and behaviour in (("Isolated", False), ("Removed", True)):
            return steps[0]["pattern"]["Regex"]
    raise Fault(f"{where}: pre-tokenizer {' + '.join(map(str, kinds))} with these options is not "
                f"implemented; {works}")


def _begins(post):
    """The special token that a post-processor puts before every text, or None."""
    if not post:
        return None
    if post["type"] == "Sequence":
        return next((b for b in map(_begins, post["processors"]) if b is not None), None)
    first = post["single"][0] if post["type"] == "TemplateProcessing" and post["single"] else {}
    return first.get("SpecialToken", {}).get("id")


def _byte_names():
    """{character: byte}: byte-level BPE writes a byte that prints as itself, the others as characters from
    256 on."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printed]
    return {chr(b): b for b in printed} | {chr(256 + i): b for i, b in enumerate(others)}


@dataclass
class Published:
    """A published tokenizer, run by tiktoken, with the model's own ids.  It answers to what the scripts ask
    of a tiktoken.Encoding.  Text that spells a special token is text: no post can end a prompt."""
    core: tiktoken.Encoding         # its tokens are ranks: the order of merging
    ids: np.ndarray                 # (ranks,) the model's id of each; -1 for a byte that the model lacks
    special: dict                   # text: id
    eot_token: int                  # the end of a response
    bos: int | None                 # begins every prompt
    pattern: str
    lacks: frozenset                # bytes without an id, which are dropped, as Hugging Face does
    rank: dict = field(init=False)

    def __post_init__(self):
        self.rank = {int(i): r for r, i in enumerate(self.ids) if i >= 0}

    @property
    def n_vocab(self):
        return int(max(self.ids.max(), *self.special.values(), self.eot_token)) + 1

    def encode_ordinary(self, text):
        if self.lacks and not self.lacks.isdisjoint(text.encode("utf-8", "replace")):
            pieces = (bytes(b for b in p.encode("utf-8", "replace") if b not in self.lacks)
                      for p in regex.findall(self.pattern, text))
            ranks = [r for p in pieces if p for r in self.core._encode_single_piece(p)]
        else:
            ranks = self.core.encode_ordinary(text)
        return self.ids[ranks].tolist() if ranks else []

    def decode(self, ids):
        """Ids -> text; ids that stand for no token (a vocabulary's padding) are left out."""
        names = {i: t.encode() for t, i in self.special.items()}
        pieces = (names[i] if i in names else self.core.decode_single_token_bytes(self.rank[i])
                  for i in ids if i in names or i in self.rank)
        return b"".join(pieces).decode("utf-8", "replace")


def encoding(spec):
    """A specification of kind "bpe" -> Published.

    tiktoken merges the neighbours whose joined bytes have the lowest rank; Hugging Face merges the first pair
    of its list.  With a rank for each merge's result, in the list's order, both do the same."""
    parsed, byte = _parse(spec), _byte_names()
    vocab = {t: i for t, i in parsed["vocab"].items() if t not in parsed["special"]}
    as_bytes = lambda token: bytes(byte[c] for c in token)  # noqa: E731
    try:
        ranks = {bytes([b]): b for b in range(256)}
        for left, right in parsed["merges"]:
            ranks.setdefault(as_bytes(left + right), len(ranks))
        names = {as_bytes(t): i for t, i in vocab.items() if all(c in byte for c in t)}
    except KeyError as character:
        raise Fault(f"tokenizer.json: {character} is no byte-level character") from None
    for token in sorted(names, key=names.get):      # tokens that no merge makes are found whole
        ranks.setdefault(token, len(ranks))
    ids = np.array([names.get(token, -1) for token in ranks])
    require((ids[256:] >= 0).all(), "tokenizer.json: a merge makes a token that the vocabulary lacks")
    core = tiktoken.Encoding("published", pat_str=parsed["pattern"], mergeable_ranks=ranks, special_tokens={})
    # a special token may be written in the vocabulary only (OPT)
    special = parsed["special"] | {t: i for t, i in vocab.items() if i in (spec["eos"], spec["bos"])}
    return Published(core, ids, special, spec["eos"], spec["bos"], parsed["pattern"],
                     frozenset(b for b in range(256) if ids[b] < 0))


# ------------------------------------------------------------------------------------------------- the script

@dataclass
class Config(Common):
    model: str = "gpt2"         # a hub name, a directory, or a checkpoint of kind lm
    export: str = ""            # directory to write it to; "": look at it only
    prompt: str = "The quick brown fox jumps over the lazy dog."     # text to score, and to continue greedily
    new_tokens: int = 32        # of the continuation


def main(cfg):
    from splits import encode_prompts, tokenizer    # which build on this file
    device, _ = setup(cfg)
    model, saved = load_model(cfg.model, device=device, dtype=cfg.dtype)
    c, enc = model.config, tokenizer(saved["tokenizer"])
    print(f"{cfg.model}: {model.n_params():,} parameters, {c.n_layer} layers, width {c.d_model}, {c.n_head} "
          f"heads ({c.n_kv_head} of keys and values), context {c.context}, vocabulary {c.vocab_size} "
          f"(tokenizer {enc.n_vocab}), end of sequence {enc.eot_token}")
    if cfg.export:
        print(f"wrote {cfg.export}: {', '.join(export(model, saved['tokenizer'], cfg.export))}")
        if saved["tokenizer"]["kind"] != "bpe":
            print(f"a tokenizer of kind {saved['tokenizer']['kind']} has no Hugging Face form: not written")
        return
    ids, = encode_prompts(enc, [cfg.prompt], c.context - cfg.new_tokens)
    if len(ids) > 1:
        packed = M.pack([ids[:1]], [[ids[1:]]], device)
        with torch.no_grad():
            nats = -M.log_probs(model, model(packed), packed).mean()
        print(f"--prompt scores {nats:.4f} nats a token over {len(ids) - 1} tokens, and goes on:")
    (out,), = M.generate(model, [ids], cfg.new_tokens, temperature=0, eos=enc.eot_token)
    print(cfg.prompt + enc.decode([i for i in out if i != enc.eot_token]))


if __name__ == "__main__":
    run(main, Config, __doc__)
