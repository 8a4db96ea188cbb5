"""A published model's tokenizer, read by the `tokenizers` library.  A checkpoint carries it as plain values:

    {"kind": "bpe", "json": text of tokenizer.json, "eos": id that ends a response, "bos": id that begins every
     prompt, or None, "kept": {file: content} that only `export` needs}
"""
import json
from itertools import takewhile

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from common.errors import UserError, first_line
from common.files import loads


class Published:
    """A published tokenizer, with the model's own ids.  It has the members of a tiktoken.Encoding that the scripts use.
    Text that spells a special token stays text, so no post can end a prompt.

    SentencePiece (LLaMA 2) writes a space before every text.  Here that space is a text's own first one, if it has
    one: a prompt's ids and those of " response" are together the ids of prompt + " response"."""

    def __init__(self, spec):
        """Raises UserError on a specification that the library cannot read."""
        try:
            self.tokenizer = tokenizer = Tokenizer.from_str(spec["json"])
            tokenizer.encode_special_tokens = True      # as text
            tokenizer.no_truncation()                   # a file may ask for it; prompts are cut elsewhere
            tokenizer.no_padding()
            tokenizer.decoder = tokenizer.decoder or decoders.ByteLevel()
            # LLaMA 2's normalizer makes two spaces of one; a Metaspace adds one only where a text has none
            self.doubles_space = bool(tokenizer.normalizer) and tokenizer.normalizer.normalize_str("a") != "a"
            self.eot_token, self.bos = spec["eos"], spec["bos"]
            self.n_vocab = max([*tokenizer.get_vocab().values(), self.eot_token, self.bos or 0]) + 1
            self.before = self.encode_ordinary("a")
            self.before_text = tokenizer.decode(self.before)
        except Exception as error:      # the library raises Exception itself
            raise UserError(f"tokenizer.json: damaged, or not for the `tokenizers` library ({first_line(error)})"
                            ) from None

    def encode_ordinary(self, text):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")   # half a pair has no UTF-8
        text = text[1:] if self.doubles_space and text[:1] == " " else text
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Ids -> text.  Ids that stand for no token (a vocabulary's padding) are left out.  SentencePiece's decoder
        drops the space before the first word, so a letter stands before it here: a response keeps its space."""
        return self.tokenizer.decode([*self.before, *ids], skip_special_tokens=False)[len(self.before_text):]


def published_spec(folder):
    """The specification of the tokenizer in a Hugging Face directory (Path).  Raises UserError on damaged files, and
    where no file names the end of sequence."""
    config, named = _object_at(folder / "config.json"), _object_at(folder / "tokenizer_config.json")
    generation = _object_at(folder / "generation_config.json")
    if "added_tokens_decoder" not in named:     # a newer file says everything itself
        named |= _object_at(folder / "special_tokens_map.json")
    try:
        text = _tokenizer_text(folder, named, config.get("model_type"))
        tokenizer = Tokenizer.from_str(text)
        begin = tokenizer.encode("a")
        begin = [i for i, _ in takewhile(lambda pair: pair[1], zip(begin.ids, begin.special_tokens_mask))]
    except UserError:
        raise
    except Exception as error:          # odd values of odd types, and what the library raises
        raise UserError(f"{folder}: damaged tokenizer ({type(error).__name__}: {first_line(error)})") from None
    if len(begin) > 1:
        raise UserError(f"{folder}: its tokenizer begins a text with {len(begin)} tokens; one is implemented")
    kept = {"config.json": config, "generation_config.json": generation,
            "tokenizer_config.json": {name: value for name, value in named.items()
                                      if name not in ("eos_token", "tokenizer_class", "model_max_length")}}
    if (folder / "chat_template.jinja").is_file():
        kept["chat_template.jinja"] = read_text(folder / "chat_template.jinja")
    eos = _end_of_sequence(folder, named, config, tokenizer)
    stops = generation.get("eos_token_id", config.get("eos_token_id"))
    if others := set(stops if isinstance(stops, list) else [stops]) - {eos, None}:
        print(f"{folder}: its configuration ends responses with {', '.join(map(str, others))} too; here only {eos}, "
              "the tokenizer's end of sequence, ends one", flush=True)
    return {"kind": "bpe", "json": text, "eos": eos, "bos": begin[0] if begin else None,
            "kept": {file: content for file, content in kept.items() if content}}


def _end_of_sequence(folder, named, config, tokenizer):
    """The id that ends a response: tokenizer_config.json's eos_token, else config.json's eos_token_id, the first one
    where it is a list (Llama 3)."""
    name, eos = _content(named.get("eos_token")), config.get("eos_token_id")
    if isinstance(name, str):
        if tokenizer.token_to_id(name) is None:
            raise UserError(f"{folder}: tokenizer_config.json's eos_token {name!r} has no id")
        return tokenizer.token_to_id(name)
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if type(eos) is not int or eos < 0:
        raise UserError(f"{folder}: neither tokenizer_config.json nor config.json names an end of sequence "
                        "(eos_token, eos_token_id)")
    return eos


def _tokenizer_text(folder, named, model_type):
    """The text of tokenizer.json, written from vocab.json and merges.txt where only these are there (OPT), and
    completed by what other files say."""
    if (folder / "tokenizer.json").is_file():
        text = read_text(folder / "tokenizer.json")
    else:
        text = _from_vocabulary(folder, named, model_type)
    data = loads(text)
    vocab = Tokenizer.from_str(text).get_vocab()
    completed = data | {"added_tokens": _added_tokens(data.get("added_tokens") or [], named, vocab,
                                                      _object_at(folder / "added_tokens.json"))}
    if (data.get("pre_tokenizer") or {}).get("type") == "ByteLevel" and "add_prefix_space" in named:
        completed["pre_tokenizer"] = data["pre_tokenizer"] | {"add_prefix_space": bool(named["add_prefix_space"])}
    return text if completed == data else json.dumps(completed, ensure_ascii=False)


def _added_tokens(found, named, vocab, legacy):
    """tokenizer.json's added tokens, completed as transformers does.  named: tokenizer_config.json; vocab: {token: id};
    legacy: added_tokens.json, {text: id}.  Returns dicts, sorted by id."""
    tokens = {token["content"]: token for token in found}
    for i, token in (named.get("added_tokens_decoder") or {}).items():
        tokens[token["content"]] = {"id": int(i)} | token
    if "added_tokens_decoder" not in named:
        tokens = {content: added_token(content, i) for content, i in legacy.items()} | tokens
    special = [named.get(f"{name}_token") for name in ("eos", "bos", "unk", "pad", "sep", "cls", "mask")]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = named.get(name) or []
        special += more.values() if isinstance(more, dict) else more
    for content in map(_content, special):
        if content in tokens:
            tokens[content] = tokens[content] | {"special": True}
        elif content in vocab:
            tokens[content] = added_token(content, vocab[content], special=True)
    return sorted(tokens.values(), key=lambda token: token["id"])


def _content(token):
    """The text of a special token, which files spell as a string or as a dict."""
    return token.get("content") if isinstance(token, dict) else token


def added_token(content, i, special=False):
    """An entry of tokenizer.json's added_tokens."""
    return {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": not special, "special": special}


def _from_vocabulary(folder, named, model_type):
    """A tokenizer.json of GPT-2's kind, as text, from vocab.json and merges.txt."""
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        raise UserError(f"{folder}: no tokenizer.json, and no vocab.json with merges.txt; transformers writes one of "
                        "SentencePiece's tokenizer.model: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)")
    kind = str(named.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if kind != "GPT2Tokenizer" or model_type not in (None, "gpt2", "opt"):
        raise UserError(f"{folder}: vocab.json and merges.txt do not say how a {kind} of a {model_type} model cuts "
                        "text; save its tokenizer.json beside them")
    lines = read_text(folder / "merges.txt").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    bos = _content(named.get("bos_token")) if named.get("add_bos_token") else None
    return byte_level(read_json_object(folder / "vocab.json"), merges, bos).to_str()


def byte_level(vocab, merges, bos=None):
    """A Tokenizer of GPT-2's kind.  vocab: {token: id}; merges: [(left, right)]; bos: a token before every text."""
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocab[bos])])
    return tokenizer


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
    if not isinstance(found, dict):
        raise UserError(f"{path}: a JSON object is needed")
    return found


def _object_at(path):
    """The dict in a JSON file that may be absent: then an empty one."""
    return read_json_object(path) if path.is_file() else {}
