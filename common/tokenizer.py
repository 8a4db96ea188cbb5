"""Tokenizers, as plain values that checkpoints carry.  There are three kinds:

    {"kind": "words", "pattern": ..., "words": [...]}           bytes, and the frequent words of a data set
    {"kind": "tiktoken", "name": "gpt2"}                        an encoding that tiktoken knows by name
    {"kind": "bpe", "json": ..., "eos": id, "bos": id or None}  a published model's: published/tokenizer.py

What comes back has `encode_ordinary(text)` -> ids, `decode(ids)` -> text, `eot_token` (the id that ends a
response) and `n_vocab`.  A published tokenizer also has `bos`, the id that begins every prompt, or None,
`ends`, all ids that may end a response (`ends_of`), and `chat`, the chat template of its prompts, or None.
"""
from collections import Counter

import regex            # comes with tiktoken, which cuts text by the same kind of pattern
import tiktoken

from common.errors import UserError
from published.tokenizer import Published

# how GPT-2 cuts text before merging
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def build_tokenizer(texts, n_words=4096):
    """A tokenizer for models from scratch, as a specification.  Every byte is a token, so every text can be
    written; the n_words most frequent pieces of the texts are tokens too.

    The words are sorted, so equal texts give equal ids."""
    pieces = (piece for text in texts for piece in regex.findall(PIECES, text))
    count = Counter(piece for piece in pieces if len(piece.encode()) > 1)
    by_frequency = sorted(count.items(), key=lambda item: (-item[1], item[0]))
    return {"kind": "words", "pattern": PIECES, "words": sorted(word for word, _ in by_frequency[:n_words])}


def ends_of(tokenizer):
    """The ids that end a response: chat models often have two.  A response is written with `eot_token`."""
    return getattr(tokenizer, "ends", (tokenizer.eot_token,))


def same_ids(spec, other):
    """Whether two specifications give equal ids to equal texts.  What only `export` needs does not count, nor
    does the day that a chat template is told."""
    return all(spec.get(key) == other.get(key) for key in {*spec, *other} - {"kept", "today"})


def load_tokenizer(spec):
    """A specification -> tiktoken.Encoding or Published.  Raises UserError if tiktoken cannot provide a named
    encoding (it downloads the files at first use)."""
    kind, name = spec.get("kind"), spec.get("name")
    if kind == "words":
        # tiktoken looks up a complete piece before it merges anything, so a word needs a rank and no merges
        ranks = {bytes([i]): i for i in range(256)}
        ranks |= {word.encode(): 256 + i for i, word in enumerate(spec["words"])}
        return tiktoken.Encoding("words", pat_str=spec["pattern"], mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": len(ranks)})
    if kind == "bpe":
        return Published(spec)
    known = tiktoken.list_encoding_names()
    if kind != "tiktoken" or name not in known:
        raise UserError(f"--tokenizer {name}: no such tokenizer; use words or one of {', '.join(known)}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:      # no network: tiktoken and requests raise many kinds
        raise UserError(f"tokenizer {name!r}: tiktoken cannot provide it ({type(error).__name__}); without a "
                        "network, set TIKTOKEN_CACHE_DIR to a folder with its files, or use --tokenizer words"
                        ) from None
