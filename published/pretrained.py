"""Reads published weights: GPT-2, OPT, LLaMA, Qwen and GPT-NeoX (Pythia).  published/export.py writes them.

    python sft.py --model gpt2          # a hub name or a directory; no checkpoint is needed
    python ppo.py --reward NAME         # a sequence classifier with one label as reward model

A directory holds config.json, the weights (model.safetensors or pytorch_model.bin, sharded or not) and the
tokenizer (tokenizer.json, or vocab.json and merges.txt).  huggingface_hub fetches a hub name.
"""
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from common.checkpoint import load_checkpoint, weights_hash
from common.errors import UserError, first_line
from common.flags import DTYPES, check_memory
from model import GPT, GPTConfig
from published.tokenizer import Published, published_spec, read_json


# ----------------------------------------------------------------------------------------------- the families

@dataclass
class Family:
    """What one architecture calls the fields and the parameters of our class, and how it lays these out."""
    sizes: dict                 # a field of GPTConfig: theirs
    fixed: dict                 # fields that differ from GPTConfig's defaults, or that config.json may lack
    activations: dict           # their names: ours; the default first
    prefix: str                 # of every parameter's name but the head's
    names: dict                 # our module: theirs, in the order in which our matrix stacks them
    layer: str = "layers.{}."   # what stands before the names of a layer
    activation: str = "hidden_act"
    head: str = "lm_head"
    transposed: bool = False    # GPT-2 keeps the matrices of linear layers as (in, out)
    interleaved: bool = False   # GPT-NeoX stacks the queries, keys and values of each head, head by head
    position_offset: int = 0    # rows of the position table before position 0; in OPT a legacy of its padding


SIZES = dict(n_layer="num_hidden_layers", n_head="num_attention_heads", d_model="hidden_size",
             d_ff="intermediate_size", context="max_position_embeddings")
GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu"}
LAYERNORM = dict(norm="layernorm", norm_eps=1e-5, bias=True)
RMSNORM = dict(position="rope", rope_part=1.0, n_kv_head=0, d_head=0, norm_eps=1e-6)
LLAMA = dict(
    sizes=SIZES | dict(n_kv_head="num_key_value_heads", d_head="head_dim", norm_eps="rms_norm_eps"),
    activations={"silu": "swiglu"}, prefix="model.",
    names={"embed": ["embed_tokens"], "norm": ["norm"],
           "norm1": ["input_layernorm"], "norm2": ["post_attention_layernorm"],
           "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
           "attn.q_norm": ["self_attn.q_norm"], "attn.k_norm": ["self_attn.k_norm"],
           "attn.out": ["self_attn.o_proj"], "mlp.up": ["mlp.gate_proj", "mlp.up_proj"],
           "mlp.down": ["mlp.down_proj"]})
FAMILIES = {
    "opt": Family(
        SIZES | dict(d_ff="ffn_dim", bias="enable_bias"),
        LAYERNORM | dict(position="learned"), {"relu": "relu"} | GELU, "model.decoder.",
        {"embed": ["embed_tokens"], "embed_position": ["embed_positions"], "norm": ["final_layer_norm"],
         "norm1": ["self_attn_layer_norm"], "norm2": ["final_layer_norm"],
         "attn.qkv": LLAMA["names"]["attn.qkv"], "attn.out": ["self_attn.out_proj"],
         "mlp.up": ["fc1"], "mlp.down": ["fc2"]},
        activation="activation_function", position_offset=2),
    "gpt2": Family(
        dict(n_layer="n_layer", n_head="n_head", d_model="n_embd", d_ff="n_inner",
             context="n_positions", norm_eps="layer_norm_epsilon"),
        LAYERNORM | dict(position="learned", d_ff=0), GELU | {"relu": "relu"}, "transformer.",
        {"embed": ["wte"], "embed_position": ["wpe"], "norm": ["ln_f"], "norm1": ["ln_1"], "norm2": ["ln_2"],
         "attn.qkv": ["attn.c_attn"], "attn.out": ["attn.c_proj"],
         "mlp.up": ["mlp.c_fc"], "mlp.down": ["mlp.c_proj"]},
        layer="h.{}.", activation="activation_function", transposed=True),
    "gpt_neox": Family(
        SIZES | dict(norm_eps="layer_norm_eps", parallel="use_parallel_residual"),
        LAYERNORM | dict(position="rope", parallel=True, rope_part=0.25),
        {"gelu": "gelu", "relu": "relu"} | GELU, "gpt_neox.",
        {"embed": ["embed_in"], "norm": ["final_layer_norm"],
         "norm1": ["input_layernorm"], "norm2": ["post_attention_layernorm"],
         "attn.qkv": ["attention.query_key_value"], "attn.out": ["attention.dense"],
         "mlp.up": ["mlp.dense_h_to_4h"], "mlp.down": ["mlp.dense_4h_to_h"]},
        head="embed_out", interleaved=True),
    "llama": Family(fixed=RMSNORM, **LLAMA),
    "qwen2": Family(fixed=RMSNORM | dict(qkv_bias=True), **LLAMA),
    "qwen3": Family(fixed=RMSNORM | dict(qk_norm=True, d_head=128), **LLAMA),
}


# ------------------------------------------------------------------------------------------------ in, and out

WEIGHTS = "model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin"


def load(name, flag="--model", device="cpu", dtype="fp32", kind="lm"):
    """A checkpoint, a Hugging Face directory or a hub name -> (GPT, a checkpoint's dict without its weights).
    kind: lm or reward.  Raises UserError as `load_checkpoint` and `from_pretrained` do."""
    if name.endswith(".pt") or Path(name).is_file():
        return load_checkpoint(name, kind, flag, device, dtype)
    try:
        folder = find(name)
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{folder}: a LoRA adapter (adapter_config.json) is not read; merge it into its "
                            "base model first, as peft's merge_and_unload does")
        model, spec = from_pretrained(folder, kind == "reward"), published_spec(folder)
        size, used = model.config.vocab_size, Published(spec).n_vocab
        if used > size:
            raise UserError(f"{name}: its tokenizer has ids up to {used - 1}, its embeddings end at "
                            f"{size - 1}")
    except UserError as error:
        raise UserError(f"{flag} {error}") from None
    saved = dict(kind=kind, config=asdict(model.config), tokenizer=spec, task=None, args={}, metrics={},
                 weights_hash=weights_hash(model.state_dict()))     # not its name: a folder may change
    return model.to(device).compute_in(DTYPES[dtype]), saved


def find(name):
    """A directory, or the local copy of a hub name -> Path.  Raises UserError if neither is to be had."""
    if Path(name).is_dir():
        return Path(name)
    try:
        from huggingface_hub import snapshot_download       # takes a second
        # one kind of weights: hubs often hold the same ones three times
        for kind in WEIGHTS:
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "merges.txt", kind]))
            if any(folder.glob(kind)):
                break
        return folder
    except Exception as error:      # no network, no such repository, a gated one, ...
        raise UserError(f"{name}: no such file or directory, and the hub does not give it "
                        f"({type(error).__name__}: {first_line(error)})") from None


def from_pretrained(folder, scalar=False):
    """The language model, or with scalar the reward model, in a Hugging Face directory as our class, fp32,
    nothing frozen.  Raises UserError on what is not implemented, missing or damaged."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: a directory without config.json is no published model; it should hold "
                        "config.json, the weights and the tokenizer")
    hf = {name: x for name, x in read_json(folder / "config.json").items() if x is not None}
    if scalar:
        hf["tie_word_embeddings"] = False       # no LM head is there to be tied
    family, model = model_of(hf, scalar)
    check_memory(model.n_params(), 4, f"{folder}")
    config, theirs, state = model.config, read_weights(folder), {}
    settle_head(folder, family, config, theirs, scalar)
    try:
        for name, x in model.state_dict().items():
            if without_bias(hf, name):
                state[name] = torch.zeros(x.shape)
            elif name != "head.weight" or not config.tied:
                parts = [theirs.pop(their_name).float() for their_name in their_names(family, name, scalar)]
                state[name] = to_ours(family, config, name, parts)
        if theirs:
            raise ValueError(f"no place for {', '.join(sorted(theirs)[:5])}")
        model.load_state_dict(state, assign=True, strict=not config.tied)       # compares the shapes
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: weights missing, too many or not of the shape that config.json says "
                        f"({' '.join(str(error).split())[:400]})") from None
    if config.tied:
        model.head.weight = model.embed.weight
    return model.freeze(0)


def settle_head(folder, family, config, theirs, scalar):
    """Changes config.tied and theirs, {name: tensor}, as the file's head asks.  Raises UserError on a
    classifier without exactly one label."""
    if scalar:
        n_labels = len(theirs.get("score.weight", ()))
        if n_labels != 1:
            raise UserError(f"{folder}: no reward model, which has score.weight with one label; this one has "
                            f"{n_labels or 'none'}")
        theirs.setdefault("score.bias", torch.zeros(1))     # transformers' heads have none
    elif config.tied and "lm_head.weight" in theirs:    # the one matrix by either name, or two that differ
        embed = theirs.setdefault(*their_names(family, "embed.weight"), theirs["lm_head.weight"])
        config.tied = torch.equal(embed, theirs["lm_head.weight"])
        if config.tied:
            del theirs["lm_head.weight"]


def without_bias(hf, name):
    """Whether config.json says that a linear layer has no bias: in our class all have one, or none has."""
    part = re.search(r"\.(attn|mlp)\.\w+\.bias$", name)
    says = {"attn": "attention_bias", "mlp": "mlp_bias"}
    return part and not hf.get(says[part[1]], hf["model_type"] != "llama")


def read_weights(folder):
    """{name: tensor} of a directory's weights, without the buffers of old files and without the names'
    prefixes, which come and go between versions of one model, and with one name for the head.  Raises
    UserError if there are none or they are damaged."""
    files = next(filter(None, (sorted(folder.glob(kind)) for kind in WEIGHTS)), [])
    if not files:
        raise UserError(f"{folder}: no model.safetensors and no pytorch_model.bin, sharded or not")
    weights = {}
    for path in files:
        try:        # torch.load reads weights only, so it refuses a pickle that would run code
            found = load_file(path) if path.suffix == ".safetensors" else torch.load(
                path, map_location="cpu", weights_only=True)
            for name, x in found.items():
                if not re.search(r"\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$", name):
                    # and what torch.compile and DataParallel put before all of them
                    name = re.sub(r"^(_orig_mod\.|module\.)*", "", name)
                    name = re.sub(r"^(transformer\.|model\.decoder\.|decoder\.|model\.|gpt_neox\.)", "", name)
                    weights[name.replace("embed_out.", "lm_head.")] = x.detach()
        except Exception as error:  # a damaged file makes the readers raise many kinds
            raise UserError(f"{path}: damaged, or not plain weights ({first_line(error)})") from None
    return weights


# ------------------------------------------------------------------------------- parameters: names and layout

def their_names(family, name, scalar=False):
    """One of our parameters -> their names, without prefix, in the order in which ours stacks them."""
    module, kind = name.rsplit(".", 1)
    if module == "head":
        return [("score." if scalar else "lm_head.") + kind]
    layer, part = re.match(r"(?:blocks\.(\d+)\.)?(.+)", module).groups()
    before = family.layer.format(layer) if layer else ""
    return [f"{before}{theirs}.{kind}" for theirs in family.names[part]]


MATRIX = re.compile(r"(attn|mlp)\.\w+\.weight")      # of a linear layer


def to_ours(family, config, name, parts):
    """Their tensors of our parameter `name` -> ours, one tensor."""
    if family.transposed and MATRIX.search(name):
        parts = [p.T for p in parts]
    if family.interleaved and ".attn.qkv." in name:
        parts = [regroup(p, config.n_head, 3) for p in parts]
    if name.startswith("embed_position"):
        parts = [p[family.position_offset:] for p in parts]
    return torch.cat(parts).contiguous()


def regroup(x, outer, inner):
    """Rows of x (outer * inner * E, ...) in the order inner, outer, E."""
    return x.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)


# ------------------------------------------------------------------------------------------------ config.json

# fields that change what a model computes, and of which one value is implemented
ONLY = {"quantization_config": None, "auto_map": None, "pruned_heads": {}, "per_layer_config": {},
        "add_cross_attention": False, "is_encoder_decoder": False, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "do_layer_norm_before": True,
        "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True, "use_sliding_window": False}
READ = """model_type vocab_size tie_word_embeddings attention_bias mlp_bias rope_theta rope_scaling
    rope_parameters rotary_pct rotary_emb_base eos_token_id layer_types partial_rotary_factor
    word_embed_proj_dim"""
KNOWN = {*ONLY, *READ.split(), *SIZES.values()}
KNOWN |= {name for family in FAMILIES.values() for name in (family.activation, *family.sizes.values())}
HARMLESS = re.compile(      # of training, of other heads, or without effect where nothing slides
    r"\w*(dropout|pdrop|layerdrop)|init\w*|(bos|pad|unk)_token_id|(torch_)?dtype|summary_\w+|_name_or_path|"
    "architectures|transformers_version|tokenizer_class|use_cache|n_ctx|prefix|pretraining_tp|num_labels|"
    "id2label|label2id|problem_type|reorder_and_upcast_attn|task_specific_params|sliding_window|"
    "max_window_layers")
ROPE = {    # type of rope scaling: its numbers
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def model_of(hf, scalar=False):
    """config.json as a dict -> (Family, GPT of its shape on the meta device, without weights).  Raises
    UserError on an architecture, or a variant of one, that is not implemented."""
    # how positions turn: transformers 4 calls it rope_scaling, 5 rope_parameters
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    try:
        refuse_variants(hf, rope)
        family = FAMILIES[hf["model_type"]]
        if hf["model_type"] == "gpt2":          # which has two names for each
            hf = {family.sizes[ours]: hf[theirs] for ours, theirs in SIZES.items() if theirs in hf} | hf
        ours = family.fixed | {name: hf[theirs] for name, theirs in family.sizes.items()
                               if theirs in hf or name not in family.fixed}
        if ours["position"] == "rope":
            scaling = rope.get("rope_type", rope.get("type", "default"))
            numbers = {"rope_type": scaling} | {name: float(rope[name]) for name in ROPE[scaling]}
            theta = rope.get("rope_theta", hf.get("rotary_emb_base", hf.get("rope_theta", 10000.)))
            part = rope.get("partial_rotary_factor", hf.get("rotary_pct", ours["rope_part"]))
            ours |= dict(rope_theta=float(theta), rope_part=float(part),
                         rope_scaling=None if scaling == "default" else numbers)
        if hf["model_type"] == "llama":
            ours["bias"] = bool(hf.get("attention_bias") or hf.get("mlp_bias"))
        tied = hf.get("tie_word_embeddings", hf["model_type"] in ("gpt2", "opt"))
        default = next(iter(family.activations))
        ours["activation"] = family.activations[hf.get(family.activation, default)]
        with torch.device("meta"):
            return family, GPT(GPTConfig(vocab_size=hf["vocab_size"], tied=bool(tied), **ours), scalar)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"config.json: a field is missing or odd ({first_line(error)})") from None


def refuse_variants(hf, rope):
    """Raises UserError on a value that is not implemented.  Prints the names of fields that are not known."""
    kind = hf["model_type"]
    can = {name: [value] for name, value in ONLY.items()} | {
        "model_type": [*FAMILIES], "rope_type": [*ROPE], "type": [*ROPE],
        "word_embed_proj_dim": [hf.get("hidden_size")],     # of another width: opt-350m
        "layer_types": [["full_attention"] * len(hf.get("layer_types", ()))]}
    if kind == "qwen3":
        can["attention_bias"] = [False]
    if kind != "gpt_neox":
        can["partial_rotary_factor"] = [1]
    if kind in [*FAMILIES]:
        can[FAMILIES[kind].activation] = [*FAMILIES[kind].activations]
    for name, value in (rope | hf).items():
        if name in can and value not in can[name]:
            raise UserError(f"config.json: {name} = {str(value)[:60]} is not implemented, only "
                            f"{', '.join(map(str, can[name]))}")
    if unknown := [name for name in hf if name not in KNOWN and not HARMLESS.fullmatch(name)]:
        print(f"config.json: fields not known here and not read: {', '.join(sorted(unknown))}", flush=True)
