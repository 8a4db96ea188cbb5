"""A published model's tokenizer, read by the `tokenizers` library.  A checkpoint carries it as plain values:

    {"kind": "bpe", "json": text of tokenizer.json, "eos": id that ends a response, "bos": id that begins
     every prompt, or None, "kept": {file: content that `export` needs},
     with --chat also "chat": text of the chat template, "today": the day that it is told if it asks (so a run
     that goes on tomorrow reads the same prompts), or None}
"""
import re
from datetime import date
from functools import cache

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from common.errors import UserError, first_line
from common.files import loads

NAMED = [f"{name}_token" for name in ("eos", "bos", "unk", "pad", "sep", "cls", "mask")]


class Published:
    """A published tokenizer, with the model's own ids and the members of a tiktoken.Encoding that the scripts
    use.  Text that spells a special token stays text, so no post can end a prompt.

    SentencePiece (LLaMA 2) writes a space before every text.  Here that space is a text's own first one, if
    it has one: the ids of a prompt and those of " response" are together the ids of prompt + " response"."""

    def __init__(self, spec):
        """Raises UserError on a specification that the library cannot read."""
        try:
            self.tokenizer = tokenizer = Tokenizer.from_str(spec["json"])
            tokenizer.encode_special_tokens = True      # as text
            tokenizer.no_truncation()                   # a file may ask for it; prompts are cut elsewhere
            tokenizer.no_padding()
            tokenizer.decoder = tokenizer.decoder or decoders.ByteLevel()
            # LLaMA 2's normalizer makes two spaces of one; a Metaspace adds one only where a text has none
            normalizer = tokenizer.normalizer
            self.doubles_space = normalizer is not None and normalizer.normalize_str("a") != "a"
            self.eot_token, self.bos = spec["eos"], spec["bos"]
            self.ends = tuple(spec.get("ends", [self.eot_token]))
            padding = _content(spec.get("kept", {}).get("tokenizer_config.json", {}).get("pad_token"))
            used = [i for text, i in tokenizer.get_vocab().items() if text != padding]     # never in a text
            self.n_vocab = max([*used, self.eot_token, self.bos or 0]) + 1
            self.letter = self.encode_ordinary("a")
            self.letter_text = tokenizer.decode(self.letter)
            self.chat, self.today = spec.get("chat"), spec.get("today")
            named = spec.get("kept", {}).get("tokenizer_config.json", {})
            self.named = {name: text for name in NAMED if (text := _content(named.get(name))) is not None}
            special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
            longest_first = map(re.escape, sorted(special, key=len, reverse=True))
            self.special = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        except Exception as error:      # the library raises Exception itself
            raise UserError(f"tokenizer.json: damaged, or not for the `tokenizers` library ("
                            f"{first_line(error)})") from None

    def encode_ordinary(self, text):
        text = text[1:] if self.doubles_space and text[:1] == " " else text
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Ids -> text.  Ids that stand for no token (a vocabulary's padding) are left out.  SentencePiece
        drops the space before the first word; a letter goes before it here, so a response keeps its space."""
        text = self.tokenizer.decode([*self.letter, *ids], skip_special_tokens=False)
        return text[len(self.letter_text):]

    def render(self, content, *answer):
        """The text of the chat template around a user's, with the beginning of an answer or a whole one."""
        roles = zip(("user", "assistant"), (content, *answer))
        messages = [{"role": role, "content": x} for role, x in roles]
        try:
            return compiled(self.chat, self.today).render(
                messages=messages, tools=None, documents=None, add_generation_prompt=not answer, **self.named)
        except Exception as error:      # of any kind: a template is a program
            raise UserError(f"--chat: the model's chat template fails ({first_line(error)})") from None

    def chat_ids(self, prompt):
        """Ids of the chat template around a user's prompt, as transformers' apply_chat_template has them.
        Special tokens that the template writes become their ids.  Those that the user spells stay text, so
        no post can end a turn: until the template's are found, a mark stands between their letters."""
        marked, mark = self.marked(prompt)
        return self.marked_ids(self.render(marked), mark)

    def answer_ids(self, answer, finished):
        """Ids of an answer after those of `chat_ids`, with what the template puts around it, as a reward
        model reads it; without the end of the turn if it did not end."""
        marked, mark = self.marked(answer.strip())
        begun, whole = self.render("?"), self.render("?", marked)
        if not whole.startswith(begun):
            raise UserError("the reward model's chat template does not write an answer where it begins one")
        end = "" if finished else self.render("?", mark).rpartition(mark)[2]
        return self.marked_ids(whole[len(begun):].removesuffix(end), mark)

    def marked(self, text):
        """(text with a mark between the letters of each special token that it spells, the mark)."""
        mark = next(c for c in map(chr, range(0xe000, 0xf900)) if c not in text)
        return self.special.sub(lambda found: mark.join(found[0]) + mark, text), mark

    def marked_ids(self, text, mark):
        """Ids of what a template rendered: the special tokens that are not marked are its own."""
        ids = []
        for i, part in enumerate(self.special.split(text)):     # special tokens are at the odd places
            ids += [self.tokenizer.token_to_id(part)] if i % 2 else self.tokenizer.encode(
                part.replace(mark, ""), add_special_tokens=False).ids
        return ids

    def cut_chat_ids(self, prompt, limit):
        """At most `limit` `chat_ids`: the prompt is cut on the left, the template stays.  Raises UserError if
        that is too long by itself."""
        while len(ids := self.chat_ids(prompt)) > limit:
            if not prompt:
                raise UserError(f"--chat: the chat template alone has {len(ids)} tokens, a prompt may have "
                                f"{limit}; lower --max-new-tokens or raise --max-prompt-tokens")
            kept = self.tokenizer.encode(prompt, add_special_tokens=False).offsets[len(ids) - limit:]
            prompt = prompt[max(1, kept[0][0]):] if kept else ""
        return ids


@cache
def compiled(text, today):
    """A chat template as jinja2 runs it, in a sandbox: it is a stranger's program."""
    def refuse(reason):
        raise ValueError(reason)
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                            extensions=["jinja2.ext.loopcontrols"])
    sandbox.globals.update(raise_exception=refuse, strftime_now=today and date.fromisoformat(today).strftime)
    return sandbox.from_string(text)


def chat_template(spec):
    """The chat template that a model came with, of several the default one, or None."""
    kept = spec.get("kept", {})
    text = kept.get("chat_template.jinja") or kept.get("tokenizer_config.json", {}).get("chat_template")
    return {x["name"]: x["template"] for x in text}.get("default") if isinstance(text, list) else text


def with_chat(spec, model):
    """The specification with which prompts go through the chat template of `model`, a name.  Raises UserError
    if it has none."""
    text = spec.get("chat") or chat_template(spec)
    if not text:
        raise UserError(f"--chat: {model} has no chat template, which is chat_template.jinja or "
                        "chat_template in tokenizer_config.json")
    return {"today": str(date.today()) if "strftime_now" in text else None} | spec | {"chat": text}


def published_spec(folder):
    """The specification of the tokenizer in a Hugging Face directory (Path).  Raises UserError on damaged
    files, on variants that are not implemented, and where no file names the end of sequence."""
    config, named = read_json(folder / "config.json"), read_json(folder / "tokenizer_config.json")
    path, chat = folder / "tokenizer.json", folder / "chat_template.jinja"
    if "added_tokens_decoder" not in named:     # a newer file says everything itself
        named |= read_json(folder / "special_tokens_map.json")
    generation = read_json(folder / "generation_config.json")
    kept = {"config.json": config, "generation_config.json": generation, "tokenizer_config.json": named}
    try:
        tokenizer = Tokenizer.from_file(str(path)) if path.is_file() else _from_vocabulary(
            folder, named, config.get("model_type"))
        _complete(tokenizer, named, read_json(folder / "added_tokens.json"))
        eos = _end_of_sequence(folder, named, config, tokenizer)
        letter = tokenizer.encode("a")          # with what begins and ends every text
        if chat.is_file():
            kept["chat_template.jinja"] = chat.read_text(encoding="utf-8")
    except UserError:
        raise
    except Exception as error:                  # odd values of odd types; the library raises Exception itself
        raise UserError(f"{folder}: damaged tokenizer ({first_line(error)})") from None
    begin = letter.ids[:[*letter.special_tokens_mask, 0].index(0)]
    if len(begin) > 1:
        raise UserError(f"{folder}: its tokenizer begins a text with {len(begin)} tokens; one is implemented")
    stops = generation.get("eos_token_id", config.get("eos_token_id"))
    others = [i for i in (stops if isinstance(stops, list) else [stops]) if type(i) is int and i != eos]
    return {"kind": "bpe", "json": tokenizer.to_str(), "eos": eos, "ends": [eos, *others],
            "bos": begin[0] if begin else None, "kept": kept}


def _end_of_sequence(folder, named, config, tokenizer):
    """The id that ends a response: tokenizer_config.json's eos_token, else config.json's eos_token_id, the
    first one where it is a list (Llama 3)."""
    name, eos = _content(named.get("eos_token")), config.get("eos_token_id")
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if name is not None:
        eos = tokenizer.token_to_id(name)
    if type(eos) is not int or eos < 0:
        raise UserError(f"{folder}: neither tokenizer_config.json's eos_token ({name}) nor config.json's "
                        "eos_token_id names an end of sequence that the tokenizer has")
    return eos


def _complete(tokenizer, named, legacy):
    """Adds the tokens that tokenizer_config.json, `named`, or else added_tokens.json, {text: id}, lists, and
    makes special what the first calls so.  As in transformers, add_prefix_space counts for GPT-2's kind."""
    listed = named.get("added_tokens_decoder", {i: {"content": text} for text, i in legacy.items()})
    tokenizer.add_tokens([AddedToken(**listed[i]) for i in sorted(listed, key=int)])
    special = [named.get(name) for name in NAMED]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = named.get(name) or []
        special += more.values() if isinstance(more, dict) else more
    tokenizer.add_special_tokens([name for name in map(_content, special)
                                  if name is not None and tokenizer.token_to_id(name) is not None])
    before, wanted = tokenizer.pre_tokenizer, named.get("add_prefix_space")
    if wanted is not None and isinstance(before, pre_tokenizers.ByteLevel):
        before.add_prefix_space = wanted


def _content(token):
    """The text of a special token, which files spell as a string or as a dict."""
    return token.get("content") if isinstance(token, dict) else token


def _from_vocabulary(folder, named, model_type):
    """A Tokenizer of GPT-2's kind from vocab.json and merges.txt (OPT)."""
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        raise UserError(f"{folder}: no tokenizer.json, and no vocab.json with merges.txt")
    kind = str(named.get("tokenizer_class") or "GPT2Tokenizer").removesuffix("Fast")
    if kind != "GPT2Tokenizer" or model_type not in (None, "gpt2", "opt"):
        raise UserError(f"{folder}: vocab.json and merges.txt do not say how a {kind} of a {model_type} "
                        "model cuts text; save its tokenizer.json beside them")
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if named.get("add_bos_token"):
        bos = _content(named["bos_token"])
        special = [(bos, tokenizer.token_to_id(bos))]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=special)
    return tokenizer


def read_json(path):
    """The dict in a JSON file, empty where there is no file.  Raises UserError on what is no JSON object."""
    try:
        return dict(loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a JSON object ({first_line(error)})") from None
