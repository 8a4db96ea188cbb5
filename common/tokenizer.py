"""Tokenizers, as plain values that checkpoints carry.  There are three kinds:

    {"kind": "words", "pattern": ..., "words": [...]}           bytes, and the frequent words of a data set
    {"kind": "tiktoken", "name": "gpt2"}                        an encoding that tiktoken knows by name
    {"kind": "bpe", "json": ..., "eos": id, "bos": id or None,  byte-level BPE of a published model
     "kept": {file: content}}                                   what only `export` needs

What comes back has `encode_ordinary(text)` -> ids, `decode(ids)` -> text, `eot_token` (the id that ends a
response) and `n_vocab`.  A published tokenizer also has `bos`, the id that begins every prompt, or None.
"""
import heapq
import json
import unicodedata
from collections import ChainMap, Counter
from dataclasses import dataclass

import regex            # comes with tiktoken; it has the properties of characters that tokenizers cut by
import tiktoken

from common import published_fields as fields
from common.errors import UserError, check, first_line
from common.files import loads

# how GPT-2 cuts text before merging; Hugging Face's ByteLevel(use_regex) cuts the same way
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
WORKS = "byte-level BPE tokenizers work (GPT-2, OPT, Pythia, SmolLM2, Llama 3, Qwen)"
LONGEST_BLANK = 500_000     # white-space characters in a row; tiktoken's engine panics at a million


def build_tokenizer(texts, n_words=4096):
    """A tokenizer for models from scratch, as a specification.  Every byte is a token, so every text can be
    written; the n_words most frequent pieces of the texts are tokens too.

    The words are sorted, so equal texts give equal ids."""
    count = Counter(piece for text in texts for piece in regex.findall(PIECES, text)
                    if len(piece.encode()) > 1)
    by_frequency = sorted(count.items(), key=lambda item: (-item[1], item[0]))
    return {"kind": "words", "pattern": PIECES, "words": sorted(word for word, _ in by_frequency[:n_words])}


def same_ids(spec, other):
    """Whether two specifications give equal ids to equal texts.  What only `export` needs does not count."""
    return all(spec.get(key) == other.get(key) for key in {*spec, *other} - {"kept"})


def load_tokenizer(spec):
    """A specification -> tiktoken.Encoding or Published.

    Raises UserError if tiktoken cannot provide a named encoding (it downloads the files at first use), or if
    a published tokenizer is damaged or of a kind that is not implemented."""
    if spec.get("kind") == "words":
        return _load_words(spec["words"], spec["pattern"])
    if spec.get("kind") == "bpe":
        return _load_published(spec)
    known = tiktoken.list_encoding_names()
    check(spec.get("kind") == "tiktoken" and spec.get("name") in known, f"--tokenizer {spec.get('name')}: no "
          f"such tokenizer; use words or one of {', '.join(known)}")
    try:
        named = tiktoken.get_encoding(spec["name"])
    except Exception as error:      # unknown name, or no network: tiktoken and requests raise many kinds
        raise UserError(f"tokenizer {spec['name']!r}: tiktoken cannot provide it ({type(error).__name__}); "
                        "without a network, set TIKTOKEN_CACHE_DIR to a folder with its files, or use "
                        "--tokenizer words") from None
    encoding = Encoding.__new__(Encoding)
    encoding.__dict__.update(vars(named))
    return encoding


class Encoding(tiktoken.Encoding):
    """tiktoken's Encoding, which raises UserError where its engine would panic."""

    def encode_ordinary(self, text):
        if len(text) >= LONGEST_BLANK:
            check(not regex.search(rf"\s{{{LONGEST_BLANK}}}", text),
                  f"a text of {len(text):,} characters has more than {LONGEST_BLANK:,} white-space "
                  f"characters in a row, more than tiktoken can cut: remove them; it begins {text[:30]!r}")
        return super().encode_ordinary(text)


def _load_words(words, pattern):
    # tiktoken looks up a complete piece before it merges anything, so a word needs a rank and no merges
    ranks = {bytes([i]): i for i in range(256)} | {word.encode(): 256 + i for i, word in enumerate(words)}
    try:
        return Encoding("words", pat_str=pattern, mergeable_ranks=ranks,
                        special_tokens={"<|endoftext|>": len(ranks)})
    except ValueError as error:
        raise UserError(f"tokenizer: its pattern {pattern!r} cannot be read ({first_line(error)})") from None


# ------------------------------------------------------------------------------- published: the specification

def published_spec(folder):
    """The specification of the tokenizer in a Hugging Face directory (Path).  Prints what the directory asks
    for and nothing here follows.  Raises UserError on kinds that are not implemented, on damaged files, where
    no file names the end of sequence, and on a tokenizer that cannot write back what it read."""
    config, generation = _object_at(folder / "config.json"), _object_at(folder / "generation_config.json")
    named = _tokenizer_config(folder)
    for name, found, table in (("tokenizer_config.json", named, fields.TOKENIZER_CONFIG),
                               ("generation_config.json", generation, fields.GENERATION)):
        fields.report(f"{folder}/{name}", *fields.check_fields(f"{folder}/{name}", found, table))
    text, parsed = _tokenizer_text(folder, named, config.get("model_type"))
    ids = parsed["vocab"] | {token["content"]: token["id"] for token in parsed["added"]}
    spec = {"kind": "bpe", "json": text, "eos": _end_of_sequence(folder, named, config, ids),
            "bos": parsed["bos"], "kept": _kept(folder, config, named, generation)}
    tokenizer = load_tokenizer(spec)
    if tokenizer.lacks:
        print(f"{folder}: the tokenizer has no ids for {len(tokenizer.lacks)} of 256 bytes and leaves them "
              "out, as transformers does", flush=True)
    _report_stops(folder, spec["eos"], generation.get("eos_token_id", config.get("eos_token_id")))
    return spec


def _end_of_sequence(folder, named, config, ids):
    """The id that ends a response: tokenizer_config.json's eos_token, else config.json's eos_token_id, the
    first one where it is a list (Llama 3)."""
    name = _content(named.get("eos_token"))
    if name is not None:
        check(isinstance(name, str) and name in ids,
              f"{folder}: tokenizer_config.json's eos_token {name!r} has no id")
        return ids[name]
    eos = config.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    check(isinstance(eos, int), f"{folder}: neither tokenizer_config.json nor config.json names an end of "
          "sequence (eos_token, eos_token_id)")
    return eos


def _report_stops(folder, eos, named):
    others = [i for i in (named if isinstance(named, list) else [named]) if i not in (eos, None)]
    if others:
        print(f"{folder}: its configuration ends responses with {', '.join(map(str, others))} too; here only "
              f"{eos}, the tokenizer's end of sequence, ends one", flush=True)


def _tokenizer_config(folder):
    """tokenizer_config.json, with special_tokens_map.json as transformers merges it: a newer
    tokenizer_config.json, which lists its added tokens, says everything itself."""
    named = _object_at(folder / "tokenizer_config.json")
    if "added_tokens_decoder" in named:
        return named
    return named | _object_at(folder / "special_tokens_map.json")


def _tokenizer_text(folder, named, model_type):
    """(the text of tokenizer.json, what `_parse` makes of it).  It is written from vocab.json and merges.txt
    where only these are there (OPT), and completed by the tokens that other files add."""
    text, data = None, None
    if (folder / "tokenizer.json").is_file():
        text, data = read_text(folder / "tokenizer.json"), read_json_object(folder / "tokenizer.json")
    else:
        data = _from_vocabulary(folder, named, model_type)
    try:
        added = _added_tokens(data, named, _object_at(folder / "added_tokens.json"))
        if text is None or added != data.get("added_tokens", []):
            text = json.dumps(data | {"added_tokens": added}, ensure_ascii=False)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: damaged tokenizer ({type(error).__name__}: {error})") from None
    parsed = _parse(data | {"added_tokens": added}, str(folder))
    for part, found, table in (("", data, fields.TOKENIZER), (", model", data["model"], fields.BPE),
                               (", added_tokens", dict(ChainMap(*added)), fields.ADDED_TOKEN)):
        where = f"{folder}/tokenizer.json{part}"
        fields.report(where, *fields.check_fields(where, found, table))
    says = named.get("add_bos_token")
    if says is not None and bool(says) != (parsed["bos"] is not None):
        print(f"{folder}: tokenizer_config.json has add_bos_token {says}, tokenizer.json does otherwise and "
              "is followed, as in transformers 5", flush=True)
    return text, parsed


def _from_vocabulary(folder, named, model_type):
    """A tokenizer.json of GPT-2's kind, as a dict, from vocab.json and merges.txt."""
    check((folder / "vocab.json").is_file() and (folder / "merges.txt").is_file(),
          f"{folder}: no tokenizer.json, and no vocab.json with merges.txt; {WORKS}, SentencePiece's "
          "tokenizer.model does not")
    kind = str(named.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    check(kind == "GPT2Tokenizer" and model_type in (None, "gpt2", "opt"),
          f"{folder}: vocab.json and merges.txt do not say how a {kind} of a {model_type} model cuts text; "
          "save its tokenizer.json beside them")
    lines = read_text(folder / "merges.txt").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    vocab, bos = read_json_object(folder / "vocab.json"), _content(named.get("bos_token"))
    if not named.get("add_bos_token") or bos is None:
        return tokenizer_json(vocab, merges)
    check(isinstance(bos, str) and bos in vocab,
          f"{folder}: tokenizer_config.json's bos_token {bos!r} has no id in vocab.json")
    return tokenizer_json(vocab, merges, bos=(bos, vocab[bos]))


def _added_tokens(data, named, legacy):
    """tokenizer.json's added tokens, completed as transformers does.  data: tokenizer.json; named:
    tokenizer_config.json; legacy: added_tokens.json, {text: id}.  Returns dicts, sorted by id."""
    tokens = {token["content"]: token for token in data.get("added_tokens") or []}
    for i, token in (named.get("added_tokens_decoder") or {}).items():
        tokens[token["content"]] = {"id": int(i)} | token
    if "added_tokens_decoder" not in named:
        for content, i in legacy.items():
            tokens.setdefault(content, _added(content, i, special=False))
    vocab = data["model"]["vocab"]
    for content in _special_names(named):
        if content in tokens:
            tokens[content] = tokens[content] | {"special": True}
        elif content in vocab:
            tokens[content] = _added(content, vocab[content], special=True)
    return sorted(tokens.values(), key=lambda token: token["id"])


def _special_names(named):
    """The texts that tokenizer_config.json calls special tokens."""
    found = [named.get(f"{name}_token") for name in ("eos", "bos", "unk", "pad", "sep", "cls", "mask")]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = named.get(name) or []
        found += more.values() if isinstance(more, dict) else more
    return [_content(token) for token in found if token is not None]


def _content(token):
    """The text of a special token, which files spell as a string or as a dict."""
    return token.get("content") if isinstance(token, dict) else token


def _added(content, i, special):
    return {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": not special, "special": special}


def _kept(folder, config, named, generation):
    """What `export` writes back and nothing else needs: {file: content}."""
    anew = {name for name, field in fields.TOKENIZER_CONFIG.items() if field.verdict == "harmless"}
    anew |= {"eos_token", "tokenizer_class"}        # export writes them itself
    found = {"config.json": fields.kept(config, fields.CONFIG.get(str(config.get("model_type")), {})),
             "generation_config.json": generation,
             "tokenizer_config.json": {name: value for name, value in named.items()
                                       if name not in anew and value is not None}}
    if isinstance(config.get("eos_token_id"), list):
        found["config.json"]["eos_token_id"] = config["eos_token_id"]
    if (folder / "chat_template.jinja").is_file():
        found["chat_template.jinja"] = read_text(folder / "chat_template.jinja")
    return {name: content for name, content in found.items() if content}


def tokenizer_json(vocab, merges, special=(), bos=None):
    """A complete tokenizer.json of GPT-2's kind, as the tokenizers library reads it.  vocab: {token: id};
    merges: ["a b"]; special: [(text, id)]; bos: (text, id) of a token before every text.  Returns a dict."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    template = bos and {
        "type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": bos[0], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {bos[0]: {"id": bos[0], "ids": [bos[1]], "tokens": [bos[0]]}}}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
             "merges": merges}
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [_added(text, i, special=True) for text, i in special], "normalizer": None,
            "pre_tokenizer": byte_level, "post_processor": template, "decoder": byte_level, "model": model}


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


def _object_at(path):
    """The dict in a JSON file that may be absent: then an empty one."""
    return read_json_object(path) if path.is_file() else {}


# ---------------------------------------------------------------------------------- published: tokenizer.json

def _parse(data, where="tokenizer.json"):
    """tokenizer.json as a dict -> {"vocab": {token: id}, "merges": [(left, right)], "added": [dict], "cuts":
    [(compiled pattern, whether text between its matches counts)], "normal_form": "NFC" or None,
    "ignore_merges": bool, "bos": id of the token that begins every text, or None}.

    Raises UserError that says what is not implemented or damaged."""
    try:
        model, added = data["model"], data.get("added_tokens") or []
        _check_kind(data, model, where)
        ids = model["vocab"] | {token["content"]: token["id"] for token in added}
        check(all(type(i) is int and i >= 0 for i in ids.values()), f"{where}: an id is no number")
        _check_added(added, model["vocab"], where)
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
        check(all(len(pair) == 2 and type(pair[0]) is type(pair[1]) is str for pair in merges),
              f"{where}: a merge is no pair of tokens")
        return {"vocab": model["vocab"], "added": added, "cuts": _cuts(data.get("pre_tokenizer"), where),
                "merges": merges,
                "normal_form": _normal_form(data.get("normalizer"), where),
                "ignore_merges": bool(model.get("ignore_merges")),
                "bos": _first_token(data.get("post_processor"), ids, where)}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: damaged tokenizer ({type(error).__name__}: {error})") from None


def _check_kind(data, model, where):
    kind = model.get("type", "BPE")
    named = "SentencePiece-like BPE" if kind == "BPE" else kind
    check(kind == "BPE" and not model.get("byte_fallback"),
          f"{where}: a {named} tokenizer is not implemented; {WORKS}")
    decoder = data.get("decoder") or {"type": "ByteLevel"}
    check(decoder["type"] == "ByteLevel", f"{where}: decoder {decoder['type']} is not implemented; {WORKS}")
    check(model.get("unk_token") is None or BYTE.keys() <= model["vocab"].keys(),
          f"{where}: bytes without an id become {model.get('unk_token')!r}, which stands for many texts: "
          "not implemented")


def _check_added(added, vocab, where):
    """An added token must have the id that transformers gives it, and swallow no text if it is not
    special."""
    free = len(vocab)
    for token in added:
        name, i = token["content"], token["id"]
        check(isinstance(name, str) and name, f"{where}: an added token has no text")
        theirs = vocab.get(name, free)
        check(i == theirs,
              f"{where}: added token {name!r} has the id {i}, and transformers gives it {theirs}")
        free = max(free, i + 1)
        found = [option for option in ("lstrip", "rstrip", "single_word") if token.get(option)]
        check(token.get("special") or not found,
              f"{where}: added token {name!r} has {' and '.join(found)}, which is not implemented for a "
              "token that is not special")


def _normal_form(normalizer, where):
    """The Unicode normal form that text is brought into before it is cut, or None."""
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    kinds = {step["type"] for step in steps}
    check(kinds <= {"NFC"}, f"{where}: it changes text before cutting it ({', '.join(sorted(kinds))}), which "
          f"is not implemented; {WORKS}")
    return "NFC" if kinds else None


def _cuts(pre_tokenizer, where):
    """What cuts a text into pieces, one after the other: [(compiled pattern, whether the text between its
    matches counts)].  An empty list leaves the text whole."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    kinds = [(step or {}).get("type") for step in steps]
    named = " + ".join(map(str, kinds)) or "without steps"
    check(kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"),
          f"{where}: pre-tokenizer {named} is not implemented; {WORKS}")
    cuts = [_cut_of(step, f"{where}: pre-tokenizer {named}") for step in steps[:-1]]
    if steps[-1].get("use_regex", True):
        cuts.append((PIECES, True))
    return [(_compiled(pattern, where), gaps) for pattern, gaps in cuts]


def _cut_of(step, where):
    """(pattern, whether the text between its matches counts) of one step of a pre-tokenizer."""
    if step["type"] == "Digits":
        return (r"\p{N}" if step.get("individual_digits") else r"\p{N}+"), True
    if step["type"] == "Split":
        kind, pattern = next(iter(step["pattern"].items()))
        pattern = regex.escape(pattern) if kind == "String" else pattern
        if step["behavior"] == "Isolated":
            return pattern, True
        if (step["behavior"], bool(step.get("invert"))) == ("Removed", True):
            return pattern, False
    raise UserError(f"{where} with these options is not implemented; {WORKS}")


# what Oniguruma, which tokenizers are written for, reads otherwise than Python's regex module
OTHERWISE = r"\\[hHRXKGyYNOZzwWbB]|&&|\[:|[\d,]\}\+|\(\?[^i:=!<>]|\(\?i[^:)]"


def _compiled(pattern, where):
    found = pattern != PIECES and regex.search(OTHERWISE, pattern)
    check(not found, f"{where}: the pattern {pattern!r} that cuts text has {found and found[0]!r}, which is "
          "not implemented")
    try:
        return regex.compile(pattern, regex.MULTILINE)
    except (regex.error, RecursionError, OverflowError) as error:
        raise UserError(f"{where}: the pattern {pattern!r} that cuts text cannot be read "
                        f"({first_line(error)})") from None


def _first_token(post_processor, ids, where):
    """The id of the token that a post-processor puts before every text, or None."""
    steps = (post_processor or {}).get("processors", [post_processor] if post_processor else [])
    first = None
    for step in steps:
        check(step["type"] in ("ByteLevel", "TemplateProcessing"),
              f"{where}: post-processor {step['type']} is not implemented")
        parts = step.get("single") or []
        kinds = [next(iter(part)) for part in parts]
        check(kinds in ([], ["Sequence"], ["SpecialToken", "Sequence"]),
              f"{where}: the post-processor writes {' '.join(kinds)}: only one token before a text is "
              "implemented")
        if len(kinds) == 2:
            name = parts[0]["SpecialToken"]["id"]
            found = step.get("special_tokens", {}).get(name, {}).get("ids", [ids.get(name)])
            check(len(found) == 1 and type(found[0]) is int and first is None,
                  f"{where}: the post-processor's token {name!r} has no single id")
            first = found[0]
    return first


# ------------------------------------------------------------------------------ published: byte-pair encoding

@dataclass
class Published:
    """A published tokenizer, with the model's own ids.  It has the members of a tiktoken.Encoding that the
    scripts use.  Text that spells a special token stays text, so no post can end a prompt.  tiktoken cannot
    run these: it merges any two neighbours that make a token, and some vocabularies list which may."""
    vocab: dict             # {token: id} without special tokens; a token is written in byte-level characters
    ranks: dict             # {(left, right): place in the list of merges}
    added: list             # added tokens as in tokenizer.json, special ones among them
    cuts: list              # as from `_cuts`
    normal_form: str | None
    ignore_merges: bool     # a piece that is a token is not merged
    eot_token: int          # ends a response
    bos: int | None         # begins every prompt

    def __post_init__(self):
        self.known = {}     # {piece: ids}: most pieces of a text come again and again
        self.token_of = {i: token for token, i in self.vocab.items()}
        self.added_ids = {token["content"]: token["id"] for token in self.added}
        self.names = {i: name for name, i in self.added_ids.items()}
        self.special = {token["content"]: token["id"] for token in self.added if token.get("special")}
        self.n_vocab = max([*self.token_of, *self.names, self.eot_token, self.bos or 0]) + 1
        # bytes without an id are dropped, as Hugging Face drops them
        self.lacks = frozenset(byte for character, byte in BYTE.items() if character not in self.vocab)
        self.before, self.behind = (self._finder(normalized) for normalized in (False, True))

    def _finder(self, normalized):
        """A pattern that finds added tokens, the longest first: those that are looked for before or behind
        the normalisation.  None where all of them are special."""
        tokens = [token for token in self.added if bool(token.get("normalized")) == normalized]
        if all(token.get("special") for token in tokens):
            return None
        names = sorted((token["content"] for token in tokens), key=len, reverse=True)
        return regex.compile("|".join(map(regex.escape, names)))

    def _split_off(self, finder, text):
        """Cuts added tokens out of a text: yields (text, None) or (None, id).  A special one stays text."""
        end = 0
        for match in finder.finditer(text) if finder else ():
            if match[0] not in self.special:
                yield text[end:match.start()], None
                yield None, self.added_ids[match[0]]
                end = match.end()
        yield text[end:], None

    def normalise(self, text):
        """The text that a text's ids stand for: in the normal form, by the Unicode version of this Python."""
        # half a surrogate pair has no UTF-8
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return unicodedata.normalize(self.normal_form, text) if self.normal_form else text

    def _parts(self, text):
        """A text without its added tokens, normalised, and these: yields (text, None) or (None, id)."""
        for part, token in self._split_off(self.before, text):
            if token is None:
                yield from self._split_off(self.behind, self.normalise(part))
            else:
                yield None, token

    def encode_ordinary(self, text):
        ids = []
        for part, token in self._parts(text):
            if token is not None:
                ids.append(token)
                continue
            for piece in self._pieces(part):
                ids += self.known.get(piece) or self._encode_piece(piece)
        return ids

    def _pieces(self, text):
        pieces = [text]
        for pattern, gaps in self.cuts:
            pieces = [part for piece in pieces for part in cut(pattern, piece, gaps)]
        return pieces

    def _encode_piece(self, piece):
        characters = [CHARACTER[byte] for byte in piece.encode()]
        whole = "".join(characters)
        if self.ignore_merges and whole in self.vocab:
            ids = [self.vocab[whole]]
        else:
            known = [character for character in characters if character in self.vocab]
            ids = [self.vocab[token] for token in merge(known, self.ranks)]
        if len(piece) < 64 and len(self.known) < 2 ** 18:
            self.known[piece] = ids
        return ids

    def decode(self, ids):
        """Ids -> text.  Ids that stand for no token (a vocabulary's padding) are left out."""
        return b"".join(map(self._bytes_of, ids)).decode("utf-8", "replace")

    def _bytes_of(self, i):
        if i in self.names:
            return self.names[i].encode()
        return bytes(BYTE[c] for c in self.token_of.get(i, ""))


def cut(pattern, text, gaps):
    """The matches of a compiled pattern in a text, and with `gaps` what lies between them, in order."""
    pieces = [match[0] for match in pattern.finditer(text)] if pattern.groups else pattern.findall(text)
    if not gaps or sum(map(len, pieces)) == len(text):      # most patterns leave no gaps
        return pieces
    pieces, end = [], 0
    for match in pattern.finditer(text):
        pieces += [text[end:match.start()], match[0]]
        end = match.end()
    return [piece for piece in (*pieces, text[end:]) if piece]


def merge(tokens, ranks):
    """Byte-pair encoding (Sennrich et al. 2016): of all neighbours the pair that stands first in the list of
    merges becomes one token, the left one of equals, until no pair is in the list.

    tokens: list of str; ranks: {(left, right): place in the list}.  Returns a list.  A queue makes it
    n log n, because some pieces are long."""
    tokens, n = list(tokens), len(tokens)
    behind, before = list(range(1, n + 1)), list(range(-1, n - 1))      # places of the neighbours
    queue = [(ranks[pair], i) for i, pair in enumerate(zip(tokens, tokens[1:])) if pair in ranks]
    heapq.heapify(queue)
    while queue:
        rank, left = heapq.heappop(queue)
        right = behind[left]
        if right == n or ranks.get((tokens[left], tokens[right])) != rank:
            continue                                                    # one of the two has been merged since
        tokens[left], tokens[right] = tokens[left] + tokens[right], None
        behind[left] = behind[right]
        if behind[left] < n:
            before[behind[left]] = left
        for i, j in ((before[left], left), (left, behind[left])):       # the pairs with its neighbours
            if i >= 0 and j < n and (tokens[i], tokens[j]) in ranks:
                heapq.heappush(queue, (ranks[tokens[i], tokens[j]], i))
    return [token for token in tokens if token is not None]


def character_bytes():
    """{character: byte} of byte-level BPE.  A byte that prints is written as itself, the other bytes as the
    characters from 256 on, in their order."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printed]
    return {chr(b): b for b in printed} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE = character_bytes()
CHARACTER = {byte: character for character, byte in BYTE.items()}
# what a tokenizer must be able to write back: all characters to U+0250, every 37th behind, and some that join
ODD_PAGE = "".join(map(chr, [*range(0x250), *range(0x300, 0xd800, 37), *range(0xe000, 0x110000, 4099)])) + (
    "e\u0301 \u1100\u1161 \U0001f469\u200d\U0001f467 \ufeff\u200b  two  spaces\n\n\ttabs\r\n "
    "I'll 1234567 89 ")


def _load_published(spec):
    """A specification of kind "bpe" -> Published.  Raises UserError on a tokenizer that cannot write back a
    page of odd text, but for the bytes that it has no ids for."""
    parsed = _parse(loads(spec["json"]))
    special = {token["content"] for token in parsed["added"] if token.get("special")}
    # a special token may stand in the vocabulary only (OPT)
    ends = {token: i for token, i in parsed["vocab"].items()
            if i in (spec["eos"], spec["bos"]) and token not in special}
    outside = special | ends.keys()
    both = parsed["vocab"].keys() & outside & (BYTE.keys() | {"".join(pair) for pair in parsed["merges"]})
    check(not both, f"tokenizer.json: {', '.join(both)}: a special token that is part of texts too")
    vocab = {token: i for token, i in parsed["vocab"].items()
             if token not in outside and BYTE.keys() >= set(token)}
    ranks = {}
    for rank, pair in enumerate(parsed["merges"]):
        check(all(part in vocab for part in (*pair, "".join(pair))),
              f"tokenizer.json: merge {pair} makes, or needs, a token that the vocabulary lacks")
        ranks[pair] = rank
    added = parsed["added"] + [_added(*end, special=True) for end in ends.items()]
    tokenizer = Published(vocab, ranks, added, parsed["cuts"], parsed["normal_form"], parsed["ignore_merges"],
                          spec["eos"], spec["bos"])
    _check_round_trip(tokenizer)
    return tokenizer


def _check_round_trip(tokenizer):
    known = bytes(b for b in tokenizer.normalise(ODD_PAGE).encode() if b not in tokenizer.lacks)
    wanted, got = known.decode("utf-8", "replace"), tokenizer.decode(tokenizer.encode_ordinary(ODD_PAGE))
    if got != wanted:
        place = next((i for i, (a, b) in enumerate(zip(got, wanted)) if a != b), min(len(got), len(wanted)))
        raise UserError("tokenizer.json: it does not write back the text it read: "
                        f"{wanted[place:place + 9]!r} became {got[place:place + 9]!r}")
