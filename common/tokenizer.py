"""Every tokenizer, behind one function: `load_tokenizer(spec)`.

A specification is a dict of plain values that checkpoints carry.  There are three kinds:

    {"kind": "words", "pattern": ..., "words": [...]}           bytes, and the frequent words of a data set
    {"kind": "tiktoken", "name": "gpt2"}                        an encoding that tiktoken knows by name
    {"kind": "bpe", "json": ..., "eos": id, "bos": id or None}  byte-level BPE of a published model

What comes back has `encode_ordinary(text)` -> ids, `decode(ids)` -> text, `eot_token` (the id that ends a
response) and `n_vocab`.  A published tokenizer also has `bos`, the id that begins every prompt, or None. """
import json
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import regex            # comes with tiktoken, which uses the same syntax
import tiktoken

from common.errors import UserError, check
from common.files import loads

# how GPT-2 cuts text before merging; Hugging Face's ByteLevel(use_regex) cuts the same way
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# the same after each digit was cut off by itself (Digits before ByteLevel: SmolLM2, StarCoder)
PIECES_DIGITS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""
WORKS = "byte-level BPE tokenizers work (GPT-2, OPT, SmolLM2, Llama 3)"


def build_tokenizer(texts, n_words=4096):
    """A tokenizer for models from scratch, as a specification.  Every byte is a token, so every text can be
    written; the n_words most frequent pieces of the texts are tokens too.

    The words are sorted, so equal texts give equal ids."""
    count = Counter(piece for text in texts for piece in regex.findall(PIECES, text)
                    if len(piece.encode()) > 1)
    by_frequency = sorted(count.items(), key=lambda item: (-item[1], item[0]))
    return {"kind": "words", "pattern": PIECES, "words": sorted(word for word, _ in by_frequency[:n_words])}


def load_tokenizer(spec):
    """A specification -> tiktoken.Encoding or Published.

    Raises UserError if tiktoken cannot provide a named encoding (it downloads the files at first use), or if
    a published tokenizer is damaged or of a kind that tiktoken cannot run."""
    if spec["kind"] == "words":
        return _load_words(spec["words"], spec["pattern"])
    if spec["kind"] == "bpe":
        return _load_published(spec)
    try:
        return tiktoken.get_encoding(spec["name"])
    except Exception as error:      # unknown name, or no network: tiktoken and requests raise many kinds
        raise UserError(f"tokenizer {spec['name']!r}: tiktoken cannot provide it ({type(error).__name__}); "
                        "without a network, set TIKTOKEN_CACHE_DIR to a folder with its files, or use "
                        "--tokenizer words") from None


def _load_words(words, pattern):
    # tiktoken looks up a complete piece before it merges anything, so a word needs a rank and no merges
    ranks = {bytes([i]): i for i in range(256)} | {word.encode(): 256 + i for i, word in enumerate(words)}
    return tiktoken.Encoding("words", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": len(ranks)})


# ------------------------------------------------------------------------------- published: the specification

def published_spec(folder):
    """The specification of the tokenizer in a Hugging Face directory (Path).  Raises UserError on kinds that
    tiktoken cannot run, on damaged files, and where no file names the end of sequence."""
    text, named = _tokenizer_text(folder), _named_special_tokens(folder)
    config = read_json_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    parsed = _parse(text, str(folder))
    ids = parsed["vocab"] | parsed["special"]
    eos = config.get("eos_token_id")
    eos = ids.get(named.get("eos_token"), eos[0] if isinstance(eos, list) else eos)     # Llama 3 has a list
    check(isinstance(eos, int), f"{folder}: neither tokenizer_config.json nor config.json names an end of "
          "sequence (eos_token, eos_token_id)")
    bos = parsed["bos"]
    if bos is None and named.get("add_bos_token"):
        bos = named.get("bos_token")
    return {"kind": "bpe", "json": text, "eos": eos, "bos": ids.get(bos)}


def _tokenizer_text(folder):
    """The text of tokenizer.json, written from vocab.json and merges.txt where only these are there (OPT)."""
    if (folder / "tokenizer.json").is_file():
        return read_text(folder / "tokenizer.json")
    check((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file(),
          f"{folder}: no tokenizer.json, and no vocab.json with merges.txt; {WORKS}, SentencePiece's "
          "tokenizer.model does not")
    lines = read_text(folder / "merges.txt").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    return json.dumps(tokenizer_json(read_json_object(folder / "vocab.json"), merges))


def _named_special_tokens(folder):
    """{"eos_token": text, "bos_token": text, "add_bos_token": True}, as far as the directory names them.  The
    later file wins."""
    named = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            for key, value in read_json_object(folder / name).items():
                if key in ("eos_token", "bos_token", "add_bos_token") and value:
                    named[key] = value["content"] if isinstance(value, dict) else value
    return named


def tokenizer_json(vocab, merges, special=()):
    """A complete tokenizer.json of GPT-2's kind, as the tokenizers library reads it.  vocab: {token: id};
    merges: ["a b"]; special: [(text, id)].  Returns a dict."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for text, i in special]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
             "merges": merges}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": byte_level, "post_processor": None, "decoder": byte_level, "model": model}


def read_text(path):
    """The text of a UTF-8 file (Path).  Raises UserError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from None


def read_json_object(path):
    """The dict that a JSON file (Path) holds.  Raises UserError if it holds none."""
    try:
        found = loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    check(isinstance(found, dict), f"{path}: a JSON object is needed")
    return found


# ---------------------------------------------------------------------------------- published: tokenizer.json

def _parse(text, where="tokenizer.json"):
    """The text of a tokenizer.json -> {"vocab": {token: id}, "merges": [(left, right)], "special": {text:
    id}, "pattern": regex that cuts text, "bos": text of the token that begins every text, or None}.

    Raises UserError that says what cannot be turned into a tiktoken Encoding."""
    try:
        data = loads(text)
        model = data["model"]
        _check_kind(model, data.get("normalizer"), where)
        return {"vocab": model["vocab"],
                "merges": [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]],
                "special": {token["content"]: token["id"] for token in data.get("added_tokens", [])},
                "pattern": _cutting_pattern(data["pre_tokenizer"], where),
                "bos": _first_token(data.get("post_processor"))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: damaged tokenizer ({type(error).__name__}: {error})") from None


def _check_kind(model, normalizer, where):
    kind = model.get("type", "BPE")
    named = "SentencePiece-like BPE" if kind == "BPE" else kind
    check(kind == "BPE" and not model.get("byte_fallback"),
          f"{where}: a {named} tokenizer cannot be turned into a tiktoken Encoding; {WORKS}")
    check(not normalizer, f"{where}: it changes text before cutting it ({(normalizer or {}).get('type')}), "
          f"which is not implemented; {WORKS}")


def _cutting_pattern(pre_tokenizer, where):
    """The regular expression that cuts text before merging."""
    steps = pre_tokenizer or {}
    steps = steps.get("pretokenizers", [steps])
    kinds, first, byte_level = [step.get("type") for step in steps], steps[0], steps[-1]
    named = " + ".join(map(str, kinds))
    check(kinds[-1] == "ByteLevel" and not byte_level.get("add_prefix_space"),
          f"{where}: pre-tokenizer {named} is not implemented; {WORKS}")
    if byte_level.get("use_regex", True):
        if kinds == ["ByteLevel"]:
            return PIECES
        if kinds == ["Digits", "ByteLevel"] and first.get("individual_digits"):
            return PIECES_DIGITS
    elif kinds == ["Split", "ByteLevel"] and "Regex" in first["pattern"]:
        # in both, the matches of the expression are the pieces, as they are in tiktoken
        if (first.get("behavior"), bool(first.get("invert"))) in (("Isolated", False), ("Removed", True)):
            return first["pattern"]["Regex"]
    raise UserError(f"{where}: pre-tokenizer {named} with these options is not implemented; {WORKS}")


def _first_token(post_processor):
    """The text of the special token that a post-processor puts before every text, or None."""
    if not post_processor:
        return None
    if post_processor["type"] == "Sequence":
        found = map(_first_token, post_processor["processors"])
        return next((token for token in found if token is not None), None)
    if post_processor["type"] != "TemplateProcessing" or not post_processor["single"]:
        return None
    return post_processor["single"][0].get("SpecialToken", {}).get("id")


# --------------------------------------------------------------------------------- published: run by tiktoken

@dataclass
class Published:
    """A published tokenizer, run by tiktoken, with the model's own ids.  It has the members of a
    tiktoken.Encoding that the scripts use.  Text that spells a special token stays text, so no post can end a
    prompt."""
    core: tiktoken.Encoding         # its tokens are ranks: the order of merging
    ids: np.ndarray                 # (ranks,) the model's id of each rank; -1 for a byte that the model lacks
    special: dict                   # text: id
    eot_token: int                  # ends a response
    bos: int | None                 # begins every prompt
    pattern: str                    # cuts text before merging
    lacks: frozenset                # bytes without an id; they are dropped, as Hugging Face drops them
    rank: dict = field(init=False)  # id: rank

    def __post_init__(self):
        self.rank = {int(i): r for r, i in enumerate(self.ids) if i >= 0}

    @property
    def n_vocab(self):
        return int(max(self.ids.max(), *self.special.values(), self.eot_token)) + 1

    def encode_ordinary(self, text):
        if self.lacks and not self.lacks.isdisjoint(text.encode("utf-8", "replace")):
            ranks = self._encode_known_bytes(text)
        else:
            ranks = self.core.encode_ordinary(text)
        return self.ids[ranks].tolist() if ranks else []

    def _encode_known_bytes(self, text):
        """Ranks of a text without the bytes that have no id.  The text is cut into pieces first, because
        Hugging Face drops the bytes after the cut."""
        ranks = []
        for piece in regex.findall(self.pattern, text):
            kept = bytes(b for b in piece.encode("utf-8", "replace") if b not in self.lacks)
            if kept:
                ranks += self.core._encode_single_piece(kept)
        return ranks

    def decode(self, ids):
        """Ids -> text.  Ids that stand for no token (a vocabulary's padding) are left out."""
        names = {i: text.encode() for text, i in self.special.items()}
        pieces = (names[i] if i in names else self.core.decode_single_token_bytes(self.rank[i])
                  for i in ids if i in names or i in self.rank)
        return b"".join(pieces).decode("utf-8", "replace")


def _load_published(spec):
    """A specification of kind "bpe" -> Published.

    tiktoken merges the two neighbours whose joined bytes have the lowest rank.  Hugging Face merges the first
    pair of its list that applies.  They agree if each merge's result gets a rank, in the order of the
    list."""
    parsed = _parse(spec["json"])
    vocab = {token: i for token, i in parsed["vocab"].items() if token not in parsed["special"]}
    ranks, ids = _ranks(vocab, parsed["merges"])
    core = tiktoken.Encoding("published", pat_str=parsed["pattern"], mergeable_ranks=ranks, special_tokens={})
    # a special token may stand in the vocabulary only (OPT)
    special = parsed["special"] | {token: i for token, i in vocab.items() if i in (spec["eos"], spec["bos"])}
    return Published(core, ids, special, spec["eos"], spec["bos"], parsed["pattern"],
                     frozenset(b for b in range(256) if ids[b] < 0))


def _ranks(vocab, merges):
    """({bytes: rank}, the vocabulary's id of each rank): all bytes first, then the results of the merges in
    their order, then the vocabulary's other tokens, which tiktoken finds as complete pieces."""
    byte_of = character_bytes()
    try:
        ranks = {bytes([b]): b for b in range(256)}
        for left, right in merges:
            ranks.setdefault(bytes(byte_of[c] for c in left + right), len(ranks))
    except KeyError as character:
        raise UserError(f"tokenizer.json: {character} is no byte-level character") from None
    id_of = {bytes(byte_of[c] for c in token): i for token, i in vocab.items()
             if all(c in byte_of for c in token)}
    for token in sorted(id_of, key=id_of.get):
        ranks.setdefault(token, len(ranks))
    ids = np.array([id_of.get(token, -1) for token in ranks])
    check((ids[256:] >= 0).all(), "tokenizer.json: a merge makes a token that the vocabulary lacks")
    return ranks, ids


def character_bytes():
    """{character: byte} of byte-level BPE.  A byte that prints is written as itself, the other bytes as the
    characters from 256 on, in their order."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printed]
    return {chr(b): b for b in printed} | {chr(256 + i): b for i, b in enumerate(others)}
