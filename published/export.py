"""Writes a language model as a Hugging Face directory: the inverse of published/pretrained.py.

    python -m tools.convert --model ckpt_sft.pt --export DIR    # a directory that transformers loads
"""
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.errors import UserError
from published.pretrained import FAMILIES, MATRIX, regroup, their_names
from published.tokenizer import Published


def export(model, spec, folder):
    """Writes a language model as a Hugging Face directory: config.json, model.safetensors and, if the
    tokenizer is a published one, tokenizer.json with what its directory held beside it.  Returns the file
    names written.  Raises UserError as `scratch_config` does."""
    folder, config, theirs = Path(folder), model.config, {}
    hf = spec["kept"]["config.json"] if spec["kind"] == "bpe" else scratch_config(config)
    hf = hf | {"tie_word_embeddings": config.tied, "dtype": "float32", "torch_dtype": "float32"}
    family = FAMILIES[hf["model_type"]]
    for name, x in model.state_dict().items():
        if name == "head.weight" and config.tied:
            continue
        names = [family.head + ".weight"] if name == "head.weight" else [
            family.prefix + their_name for their_name in their_names(family, name)]
        for their_name, part in zip(names, to_theirs(family, config, name, x), strict=True):
            theirs[their_name] = part.float().cpu().contiguous()
    files = {"config.json": hf}
    if spec["kind"] == "bpe":
        tokenizer, kept = Published(spec), spec["kept"]
        eos, ends = tokenizer.eot_token, hf.get("eos_token_id")
        ends = ends if isinstance(ends, list) and eos in ends else eos      # several ids may end a text
        files = kept | {
            "config.json": {"bos_token_id": tokenizer.bos} | hf | {"eos_token_id": ends},
            "tokenizer.json": spec["json"],
            "tokenizer_config.json": kept["tokenizer_config.json"] | {
                "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.context,
                "eos_token": tokenizer.tokenizer.id_to_token(eos)}}
    files = {name: content for name, content in files.items() if content}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(theirs, folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=1)
        (folder / name).write_text(text, encoding="utf-8")
    return ["model.safetensors", *files]


def to_theirs(family, config, name, x):
    """The inverse of `to_ours`: our parameter x -> their tensors, a list."""
    parts = [x]
    if len(their_names(family, name)) > 1:
        q, kv = config.n_head * config.d_head, config.n_kv_head * config.d_head
        parts = x.split([q, kv, kv] if ".attn.qkv." in name else [config.d_ff, config.d_ff])
    if family.transposed and MATRIX.search(name):
        parts = [p.T for p in parts]
    if family.interleaved and ".attn.qkv." in name:
        parts = [regroup(p, 3, config.n_head) for p in parts]
    if name.startswith("embed_position"):
        parts = [torch.cat((p.new_zeros(family.position_offset, p.shape[1]), p)) for p in parts]
    return parts


def scratch_config(c):
    """config.json, as a dict, of a model from scratch.  Raises UserError on a shape that no published
    architecture has."""
    kind, family = next(((kind, family) for kind, family in FAMILIES.items()
                         if c.activation in family.activations.values()
                         and all(getattr(c, name) == value for name, value in family.fixed.items()
                                 if name not in family.sizes)), ("", None))
    if not family:
        raise UserError(f"no published architecture has position {c.position}, norm {c.norm}, activation "
                        f"{c.activation} and bias {c.bias} together: export works for GPT-2, OPT and LLaMA "
                        "shapes (sft.py --shape)")
    activation = next(theirs for theirs, ours in family.activations.items() if ours == c.activation)
    hf = {"model_type": kind, "architectures": [family.architecture], "vocab_size": c.vocab_size,
          family.activation: activation, "eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
    hf |= {theirs: getattr(c, ours) for ours, theirs in family.sizes.items()}
    if kind == "opt":
        hf["word_embed_proj_dim"] = c.d_model
    if c.position == "rope":        # as transformers 4 and as 5 spells it
        hf |= {"rope_theta": c.rope_theta,
               "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta}}
    return hf
