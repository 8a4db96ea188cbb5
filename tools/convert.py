"""Look at a published model, score a text with it, or write a checkpoint as a Hugging Face directory.

    python -m tools.convert --model gpt2 --prompt "Paris is"     # sizes, the text's score, how it continues
    python -m tools.convert --model ckpt_sft.pt --export DIR     # a directory that transformers loads
"""
from dataclasses import dataclass

import torch

from common import pretrained
from common.errors import check
from common.flags import Common, Count, run, setup
from common.tokenizer import load_tokenizer
from model import generate, log_probs, pack
from splits import decode, encode_prompts


@dataclass
class Config(Common):
    model: str = "gpt2"         # a hub name, a Hugging Face directory, or a checkpoint of kind lm
    export: str = ""            # directory to write the model to; "": look at it only
    prompt: str = "The quick brown fox jumps over the lazy dog."     # text to score, and to continue greedily
    new_tokens: Count = 32      # of the continuation


def describe(name, model, tokenizer):
    """A model's sizes in one line."""
    c = model.config
    return (f"{name}: {model.n_params():,} parameters, {c.n_layer} layers, width {c.d_model}, "
            f"{c.n_head} heads ({c.n_kv_head} of keys and values), context {c.context}, "
            f"vocabulary {c.vocab_size} (tokenizer {tokenizer.n_vocab}), end of sequence "
            f"{tokenizer.eot_token}")


@torch.no_grad()
def nats_per_token(model, ids):
    """Mean of -log pi(token) over a text's tokens but the first, which nothing predicts.  ids: list of at
    least two."""
    packed = pack([ids[:1]], [[ids[1:]]], model.embed.weight.device)
    return -log_probs(model, model(packed), packed).mean().item()


def main(cfg):
    device, _ = setup(cfg)
    model, saved = pretrained.load(cfg.model, device=device, dtype=cfg.dtype)
    tokenizer = load_tokenizer(saved["tokenizer"])
    print(describe(cfg.model, model, tokenizer))
    if cfg.export:
        print(f"wrote {cfg.export}: {', '.join(pretrained.export(model, saved['tokenizer'], cfg.export))}")
        if saved["tokenizer"]["kind"] != "bpe":
            print(f"a tokenizer of kind {saved['tokenizer']['kind']} has no Hugging Face form: not written")
        return
    room = model.config.context - cfg.new_tokens
    check(room > 0, f"--new-tokens {cfg.new_tokens}: the context of {model.config.context} leaves no place "
          "for a prompt")
    ids, = encode_prompts(tokenizer, [cfg.prompt], room)
    check(ids, "--prompt: the text has no tokens")
    if len(ids) > 1:
        print(f"--prompt scores {nats_per_token(model, ids):.4f} nats a token over {len(ids) - 1} tokens, "
              "and continues:")
    (response,), = generate(model, [ids], cfg.new_tokens, temperature=0, eos=tokenizer.eot_token)
    print(cfg.prompt + decode(tokenizer, response)[0])


if __name__ == "__main__":
    run(main, Config, __doc__)
