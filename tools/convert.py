"""Look at a published model, score a text with it, write a checkpoint as a Hugging Face directory, or bring
preference files as others write them into this project's form.

    python -m tools.convert --model gpt2 --prompt "Paris is"     # sizes, the text's score, how it continues
    python -m tools.convert --model ckpt_sft.pt --export DIR     # a directory that transformers loads
    python -m tools.convert train.jsonl.gz --export DATA/preferences.jsonl

The last line reads JSON lines, or one JSON list, of
    {"chosen", "rejected"}              texts with one beginning, as HH-RLHF; or lists of messages
    {"prompt", "chosen", "rejected"}    any of the three a text or a list of messages
    {"prompt", "completion"}            also question or instruction with response, output or answer
    {"prompt", "completion", "label"}   true (1) and false (0) answers to one prompt become pairs
    {"messages"}                        a conversation, whose last answer is the reference
and writes lines of {"prompt", "chosen", "rejected"}, or of {"prompt", "reference"}.  Messages become a text
as in HH-RLHF: "\\n\\nHuman: ...\\n\\nAssistant:".
"""
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path

import torch

from common import pretrained
from common.errors import UserError, check
from common.files import loads, read_jsonl, write_jsonl
from common.flags import Common, Count, launch, setup
from common.samples import instruction_prompt
from common.tokenizer import load_tokenizer
from model import generate, log_probs, pack
from splits import decode, encode_prompts


@dataclass
class Config(Common):
    files: list = None          # preferences or answers to convert; none: look at --model
    model: str = "gpt2"         # a hub name, a Hugging Face directory, or a checkpoint of kind lm
    export: str = ""            # directory to write the model to, or .jsonl file to write FILES to; "": look
                                # at the model only
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


# ---------------------------------------------------------------------- preference files as others write them

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
SPEAKERS = {"user": HUMAN, "human": HUMAN, "prompter": HUMAN, "assistant": ASSISTANT, "gpt": ASSISTANT}
ASSISTANTS = [name for name, speaker in SPEAKERS.items() if speaker == ASSISTANT]
PROMPTS = ("prompt", "question", "query", "instruction")
ANSWERS = ("reference", "completion", "response", "output", "answer", "summary", "messages", "conversations")


class Dropped(Exception):
    """Why a row cannot be converted.  Rows are counted by this reason."""


def text_of(messages):
    """Messages [{"role", "content"}] (or "from", "value") as a dialogue like HH-RLHF's.  Raises Dropped."""
    out = ""
    for message in messages:
        if not isinstance(message, dict):
            raise Dropped(f"a message of type {type(message).__name__}")
        role, content = (message.get(a, message.get(b)) for a, b in (("role", "from"), ("content", "value")))
        if not isinstance(content, str) or role not in (*SPEAKERS, "system"):
            raise Dropped(f"a message of role {role!r} with content of type {type(content).__name__}")
        out += content if role == "system" else f"{SPEAKERS[role]} {content}"
    return out


def prompt_and_answer(prompt, answer):
    """A prompt (text, messages or None) and an answer (text or messages, which may repeat the prompt's) ->
    two texts.  Raises Dropped where the answer is no answer, or there is no prompt."""
    if isinstance(answer, list):
        if isinstance(prompt, list) and answer[:len(prompt)] != prompt:
            answer = prompt + answer
        *before, last = [m for m in answer if isinstance(m, dict)] or [{}]
        if last.get("role", last.get("from")) not in ASSISTANTS:
            raise Dropped("messages that do not end with the assistant's")
        if before or prompt is None:
            prompt = before
        answer = text_of([last]).removeprefix(ASSISTANT)
    if isinstance(prompt, list):
        prompt = text_of(prompt) + ASSISTANT
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise Dropped("no prompt, or an answer that is neither a text nor messages")
    return prompt, answer.removeprefix(prompt).strip()


def common_beginning(chosen, rejected):
    """Two texts that begin alike -> (prompt, chosen, rejected).  The prompt ends behind the last "Assistant:"
    that both have, or else with their last common line.  Raises Dropped where dialogues part earlier."""
    begin = commonprefix([chosen, rejected])
    place = begin.rfind(ASSISTANT) + len(ASSISTANT) if ASSISTANT in begin else begin.rfind("\n") + 1
    if not begin[:place].strip():
        raise Dropped("no prompt, and no line that both texts begin with")
    if any(HUMAN in text[place:] for text in (chosen, rejected)):
        raise Dropped("dialogues that differ before their last answer")
    return begin[:place], chosen[place:].strip(), rejected[place:].strip()


def prompt_of(row):
    """The prompt of a row: a text, messages or None.  Raises Dropped on an input that is no text."""
    if isinstance(row.get("instruction"), str) and "prompt" not in row:
        given = row.get("input") or ""
        if not isinstance(given, str):
            raise Dropped(f"an input of type {type(given).__name__}")
        return instruction_prompt(row["instruction"], given)
    return next((row[name] for name in PROMPTS if name in row), None)


def convert_row(row):
    """A row as others write it -> ours: {"prompt", "chosen", "rejected"} or {"prompt", "reference"}, with its
    id and label if it has them.  Raises Dropped."""
    kept = {"id": row["id"]} if isinstance(row.get("id"), str | int) else {}
    if row.get("label") is not None:
        if row["label"] not in (0, 1):      # which True and False are too
            raise Dropped("a label that is neither true (1) nor false (0)")
        kept["label"] = bool(row["label"])
    prompt = prompt_of(row)
    if "chosen" in row and "rejected" in row:
        if prompt is None and isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
            prompt, chosen, rejected = common_beginning(row["chosen"], row["rejected"])
        else:
            prompt, chosen = prompt_and_answer(prompt, row["chosen"])
            other, rejected = prompt_and_answer(prompt_of(row), row["rejected"])
            if other != prompt:
                raise Dropped("dialogues that differ before their last answer")
        return kept | {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    answer = next((row[name] for name in ANSWERS if name in row), None)
    if answer is None:
        raise Dropped(f"fields {', '.join(row) or 'none'}: no answer among them")
    prompt, answer = prompt_and_answer(prompt, answer)
    return kept | {"prompt": prompt, "reference": answer}


def pairs_of_labels(rows):
    """Rows with a label, true or false -> pairs of a right and a wrong answer to one prompt, in order.
    Returns (pairs, answers without a partner)."""
    answers = defaultdict(lambda: ([], []))         # prompt: (right, wrong)
    for row in rows:
        answers[row["prompt"]][not row["label"]].append(row["reference"])
    pairs = [{"prompt": prompt, "chosen": good, "rejected": bad}
             for prompt, (right, wrong) in answers.items() for good, bad in zip(right, wrong)]
    return pairs, len(rows) - 2 * len(pairs)


def read_rows(path):
    """The rows of a .jsonl, .jsonl.gz or .json file, the last a list.  Raises UserError on other files."""
    check(path.name.endswith((".jsonl", ".jsonl.gz", ".json")),
          f"{path}: .jsonl, .jsonl.gz and .json are read; datasets.load_dataset(...).to_json(FILE) writes "
          "one")
    if path.suffix != ".json":
        return read_jsonl(path, {})
    try:
        rows = loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    check(isinstance(rows, list) and all(isinstance(row, dict) for row in rows),
          f"{path}: a list of objects is needed")
    return rows


def convert_files(paths, out):
    """Converts files and writes one.  Prints what was dropped and why."""
    check(out.endswith(".jsonl"), f"--export {out or 'FILE.jsonl'}: name a .jsonl file for the converted "
          "rows, preferences.jsonl or train.jsonl of a folder for --data")
    rows, dropped = [], Counter()
    for path in map(Path, paths):
        for row in read_rows(path):
            try:
                rows.append(convert_row(row))
            except Dropped as reason:
                dropped[str(reason)] += 1
    kinds = {"pair" if "chosen" in row else "labelled" if "label" in row else "answer" for row in rows}
    check(len(kinds) < 2, f"{', '.join(paths)}: rows of several kinds ({', '.join(sorted(kinds))}): convert "
          "them apart")
    if kinds == {"labelled"}:
        rows, alone = pairs_of_labels(rows)
        dropped.update({"an answer without one of the other label to its prompt": alone} if alone else {})
    for reason, n in dropped.items():
        print(f"{n} rows dropped: {reason}")
    check(rows, f"{', '.join(paths)}: no row could be converted ({'; '.join(dropped) or 'no rows'})")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(out, rows)
    print(f"wrote {out}: {len(rows)} rows of {', '.join(rows[0])}; the first:\n{json.dumps(rows[0])[:400]}")


# ------------------------------------------------------------------------------------------------- the script

def main(cfg):
    if cfg.files:
        return convert_files(cfg.files, cfg.export)
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
    launch(main, Config, __doc__)
