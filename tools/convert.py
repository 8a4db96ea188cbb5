"""Look at a published model, score a text with it, write a checkpoint as a Hugging Face directory, or bring
preference files as others write them into this project's form.

    python -m tools.convert --model gpt2 --prompt "Paris is"     # sizes, the text's score, how it continues
    python -m tools.convert --model ckpt_sft.pt --export DIR     # a directory that transformers loads
    python -m tools.convert train.jsonl.gz --export DATA/preferences.jsonl

The last line reads JSON lines, or one JSON list, of
    {"chosen", "rejected"}              texts with one beginning, as HH-RLHF; or lists of messages
    {"prompt", "chosen", "rejected"}    any of the three a text or a list of messages
    {"prompt", "completion"}            also question or instruction with response, output or answer
    {"messages"}                        a conversation, whose last answer is the reference
and writes lines of {"prompt", "chosen", "rejected"}, or of {"prompt", "reference"}.  Messages become a text
as in HH-RLHF: "\\n\\nHuman: ...\\n\\nAssistant:".
"""
import json
from collections import Counter
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path

import torch

from common.errors import UserError
from common.files import loads, read_jsonl, write_jsonl
from common.flags import Common, Count, arg, launch, setup
from common.prompts import instruction_prompt
from common.tokenizer import load_tokenizer
from generate import generate
from model import pack
from published import pretrained
from published.export import export
from splits import decode, encode_prompts


@dataclass
class Config(Common):
    files: list = arg(None, "preferences or answers to convert; none: look at --model")
    model: str = arg("gpt2", "a hub name, a Hugging Face directory, or a checkpoint of kind lm")
    export: str = arg("", 'directory to write the model to, or .jsonl file to write FILES to; "": look only')
    prompt: str = arg("The quick brown fox jumps over the lazy dog.", "text to score and then to continue")
    new_tokens: Count = arg(32, "of the continuation")


# ---------------------------------------------------------------------- preference files as others write them

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
SPEAKERS = {"user": HUMAN, "human": HUMAN, "prompter": HUMAN, "assistant": ASSISTANT, "gpt": ASSISTANT,
            "system": ""}
PROMPTS = ("prompt", "question", "query")
ANSWERS = ("reference", "completion", "response", "output", "answer", "summary", "messages", "conversations")


class Dropped(Exception):
    """Why a row cannot be converted.  Rows are counted by this reason."""


def turns(messages):
    """Messages [{"role", "content"}] (or "from", "value") as [(speaker, text)].  Raises Dropped."""
    out = []
    for message in messages:
        message = message if isinstance(message, dict) else {}
        role, content = (message.get(a, message.get(b)) for a, b in (("role", "from"), ("content", "value")))
        if not isinstance(content, str) or str(role) not in SPEAKERS:
            raise Dropped(f"a message of role {role!r} with content of type {type(content).__name__}")
        out.append((SPEAKERS[role], content))
    return out


def text_of(messages):
    """Turns as a dialogue like HH-RLHF's."""
    return "".join(f"{speaker} {content}" if speaker else content for speaker, content in messages)


def prompt_and_answer(prompt, answer):
    """A prompt (text, messages or None) and an answer (text or messages, which may repeat the prompt's) ->
    two texts.  Raises Dropped where the answer is no answer, or there is no prompt."""
    if isinstance(answer, list):
        if isinstance(prompt, list) and answer[:len(prompt)] != prompt:
            answer = prompt + answer
        *before, (speaker, last) = turns(answer) or [("", "")]
        if speaker != ASSISTANT:
            raise Dropped("messages that do not end with the assistant's")
        if before or prompt is None:
            prompt = text_of(before) + ASSISTANT
        answer = last
    elif isinstance(prompt, list):
        prompt = text_of(turns(prompt)) + ASSISTANT
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise Dropped("no prompt, or an answer that is neither a text nor messages")
    return prompt, answer.removeprefix(prompt).strip()


def common_beginning(chosen, rejected):
    """Two texts that begin alike -> (prompt, chosen, rejected).  The prompt ends with the last "Assistant:"
    that both have, or else with their last common line.  Raises Dropped where dialogues part earlier."""
    begin = commonprefix([chosen, rejected])
    place = begin.rfind(ASSISTANT) + len(ASSISTANT) if ASSISTANT in begin else begin.rfind("\n") + 1
    if not begin[:place].strip():
        raise Dropped("no prompt, and no line that both texts begin with")
    if any(HUMAN in text[place:] for text in (chosen, rejected)):
        raise Dropped("dialogues that differ before their last answer")
    return begin[:place], chosen[place:].strip(), rejected[place:].strip()


def convert_row(row):
    """A row as others write it -> ours: {"prompt", "chosen", "rejected"} or {"prompt", "reference"}, with
    its id if it has one.  Raises Dropped."""
    kept = {"id": row["id"]} if isinstance(row.get("id"), str | int) else {}
    prompt = next((row[name] for name in PROMPTS if name in row), None)
    if prompt is None and isinstance(row.get("instruction"), str):
        prompt = instruction_prompt(row["instruction"], str(row.get("input") or ""))
    if "chosen" in row and "rejected" in row:
        return kept | preference(prompt, row["chosen"], row["rejected"])
    answer = next((row[name] for name in ANSWERS if name in row), None)
    if answer is None:
        raise Dropped(f"fields {', '.join(row) or 'none'}: no answer among them")
    prompt, answer = prompt_and_answer(prompt, answer)
    return kept | {"prompt": prompt, "reference": answer}


def preference(prompt, chosen, rejected):
    """{"prompt", "chosen", "rejected"} of a pair of texts or dialogues.  Raises Dropped."""
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = common_beginning(chosen, rejected)
    (prompt, chosen), (other, rejected) = (prompt_and_answer(prompt, x) for x in (chosen, rejected))
    if other != prompt:
        raise Dropped("dialogues that differ before their last answer")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def read_rows(path):
    """The rows of a .jsonl or .jsonl.gz file, or of a .json file with one list.  Raises UserError."""
    if path.suffix != ".json":
        return read_jsonl(path, {})
    try:
        rows = loads(path.read_bytes())
        return [{**row} for row in rows]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a JSON list of objects ({error}); .jsonl files are read too") from None


def convert_files(paths, out):
    """Converts files and writes one.  Prints what was dropped and why."""
    if not out.endswith(".jsonl"):
        raise UserError(f"--export {out or 'FILE.jsonl'}: name a .jsonl file for the converted rows, "
                        "preferences.jsonl or train.jsonl of a folder for --data")
    rows, dropped = [], Counter()
    for row in (row for path in paths for row in read_rows(Path(path))):
        try:
            rows.append(convert_row(row))
        except Dropped as reason:
            dropped[str(reason)] += 1
    for reason, n in dropped.items():
        print(f"{n} rows dropped: {reason}")
    if len({"chosen" in row for row in rows}) != 1:
        raise UserError(f"{', '.join(paths)}: no row could be converted, or rows of two kinds (pairs and "
                        "single answers), which need a file each")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(out, rows)
    print(f"wrote {out}: {len(rows)} rows of {', '.join(rows[0])}; the first:\n{json.dumps(rows[0])[:400]}")


# ------------------------------------------------------------------------------------------------- the script

@torch.no_grad()
def nats_per_token(model, ids):
    """Mean of -log pi(token) over a text's tokens but the first, which nothing predicts.  ids: a list."""
    return -model.log_probs(pack([ids[:1]], [[ids[1:]]], model.device)).mean().item()


def main(cfg):
    if cfg.files:
        return convert_files(cfg.files, cfg.export)
    device, _ = setup(cfg)
    model, saved = pretrained.load(cfg.model, device=device, dtype=cfg.dtype)
    tokenizer, c = load_tokenizer(saved["tokenizer"]), model.config
    print(f"{cfg.model}: {model.n_params():,} parameters, {c.n_layer} layers, width {c.d_model}, {c.n_head} "
          f"heads ({c.n_kv_head} of keys and values), context {c.context}, vocabulary {c.vocab_size} "
          f"(tokenizer {tokenizer.n_vocab}), end of sequence {tokenizer.eot_token}")
    if cfg.export:
        print(f"wrote {cfg.export}: {', '.join(export(model, saved['tokenizer'], cfg.export))}")
        if saved["tokenizer"]["kind"] != "bpe":
            print(f"a tokenizer of kind {saved['tokenizer']['kind']} has no Hugging Face form: not written")
        return
    if c.context <= cfg.new_tokens:
        raise UserError(f"--new-tokens {cfg.new_tokens}: the context of {c.context} leaves no place for a "
                        "prompt")
    ids, = encode_prompts(tokenizer, [cfg.prompt], c.context - cfg.new_tokens)
    if len(ids) > 1:
        print(f"--prompt scores {nats_per_token(model, ids):.4f} nats a token over {len(ids) - 1} tokens, "
              "and continues:")
    (response,), = generate(model, [ids], cfg.new_tokens, temperature=0, eos=tokenizer.eot_token)
    print(cfg.prompt + decode(tokenizer, response)[0])


if __name__ == "__main__":
    launch(main, Config, __doc__)
