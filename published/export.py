"""Writes a language model as a Hugging Face directory: the inverse of published/pretrained.py."""
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.errors import UserError
from published.pretrained import FAMILIES, MATRIX, regroup, their_names
from published.tokenizer import Published


def export(model, spec, folder):
    """Writes model.safetensors and the files that a published model came with.  Returns the names written.
    Raises UserError on a model from scratch."""
    if spec["kind"] != "bpe":
        raise UserError(f"--export writes models that began as published ones; the tokenizer of this one, of "
                        f"kind {spec['kind']}, has no Hugging Face form")
    folder, config, kept, theirs = Path(folder), model.config, spec["kept"], {}
    family = FAMILIES[kept["config.json"]["model_type"]]
    for name, x in model.state_dict().items():
        if name == "head.weight" and config.tied:
            continue
        names = [family.head + ".weight"] if name == "head.weight" else [
            family.prefix + their_name for their_name in their_names(family, name)]
        for their_name, part in zip(names, to_theirs(family, config, name, x), strict=True):
            theirs[their_name] = part.float().cpu().contiguous()
    tokenizer, ends = Published(spec), kept["config.json"].get("eos_token_id")
    eos = tokenizer.eot_token
    # all linear layers have one, zeros where there were none
    biases = dict(attention_bias=True, mlp_bias=True) if config.bias and config.position == "rope" else {}
    files = kept | {
        "config.json": {"bos_token_id": tokenizer.bos} | kept["config.json"] | {
            "eos_token_id": ends if isinstance(ends, list) else eos, "tie_word_embeddings": config.tied,
            "dtype": "float32", "torch_dtype": "float32"} | biases,
        "tokenizer.json": spec["json"],
        "tokenizer_config.json": kept["tokenizer_config.json"] | {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.context,
            "eos_token": tokenizer.tokenizer.id_to_token(eos)}}
    files = dict(filter(all, files.items()))        # a directory may have come without some of them
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
