"""Look at a published model, score a text with it, write a checkpoint that began as one as a Hugging Face
directory, or bring preference files as others write them into this project's form.

    python -m tools.convert --model gpt2 --prompt "Paris is"     # sizes, the text's score, how it continues
    python -m tools.convert --model ckpt_sft.pt --export DIR     # a directory that transformers loads
    python -m tools.convert train.jsonl.gz --export DATA/preferences.jsonl

The last line reads JSON lines of
    {"chosen", "rejected"}              texts with one beginning, as HH-RLHF; or lists of messages
    {"prompt", "chosen", "rejected"}    texts, or lists of messages
    {"prompt", "completion"}            also question or instruction with response, output or answer
    {"messages"}                        a conversation, whose last answer is the reference
and writes lines of {"prompt", "chosen", "rejected"}, or of {"prompt", "reference"}.  Messages become a text
as in HH-RLHF: "\\n\\nHuman: ...\\n\\nAssistant:".
"""
import json
import re
from collections import Counter
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path

from common.errors import UserError
from common.files import read_jsonl, write_jsonl
from common.flags import Count, Machine, arg, launch, setup
from common.prompts import instruction_prompt
from common.tokenizer import ends_of, load_tokenizer
from generate import generate
from model import pack
from published import pretrained
from published.export import export
from splits import decode, encode_prompts


@dataclass
class Config(Machine):
    files: list = arg(None, "preferences or answers to convert; none: look at --model")
    model: str = arg("gpt2", "a hub name, a Hugging Face directory, or a checkpoint of kind lm")
    export: str = arg("", 'directory to write the model to, or .jsonl file to write FILES to; "": look only')
    prompt: str = arg("The quick brown fox jumps over the lazy dog.", "text to score and then to continue")
    new_tokens: Count = arg(32, "of the continuation, at most half of the context")


# ---------------------------------------------------------------------- preference files as others write them

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
SPEAKERS = {"user": HUMAN, "human": HUMAN, "prompter": HUMAN, "assistant": ASSISTANT, "gpt": ASSISTANT,
            "system": ""}
PROMPTS = ("prompt", "question", "query")
ANSWERS = ("reference", "completion", "response", "output", "answer", "summary", "messages", "conversations")


def turns(messages):
    """Messages [{"role", "content"}] (or "from", "value") as [(speaker, text)]."""
    out = []
    for message in messages:
        message = message if isinstance(message, dict) else {}
        role, content = (message.get(a, message.get(b)) for a, b in (("role", "from"), ("content", "value")))
        if not isinstance(content, str) or str(role) not in SPEAKERS:
            raise UserError(f"a message of role {role!r} with content of type {type(content).__name__}")
        out.append((SPEAKERS[role], content))
    return out


def prompt_and_answer(prompt, answer):
    """A prompt (text, messages or None) and an answer (text, or messages that may repeat it) -> two texts."""
    if isinstance(answer, list):
        if isinstance(prompt, list) and answer[:len(prompt)] != prompt:
            answer = prompt + answer
        *before, (speaker, answer) = turns(answer) or [("", "")]
        if speaker != ASSISTANT:
            raise UserError("messages that do not end with the assistant's")
        if before or not isinstance(prompt, str):       # a dialogue as in HH-RLHF, up to its last answer
            prompt = "".join(f"{who} {said}" if who else said for who, said in before) + ASSISTANT
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise UserError("no prompt, or an answer that is neither a text nor messages")
    return prompt, answer


def without_prompt(prompt, answers):
    """(prompt, answers without it, whether it was taken off).  It is where all answers begin with the whole
    prompt and a turn follows, for "Hi there!" is an answer to "Hi".  The indentation of code stays."""
    rests = [answer.removeprefix(prompt) for answer in answers]
    turn = re.search(r"[:\n] *$", prompt) or all(rest.startswith("\n") for rest in rests)
    repeated = bool(turn and all(answer.startswith(prompt) for answer in answers))
    if repeated and all(rest.startswith(ASSISTANT) for rest in rests):
        prompt, rests = prompt + ASSISTANT, [rest.removeprefix(ASSISTANT) for rest in rests]
    answers = rests if repeated else answers
    return prompt, [re.sub(r"^\n*( (?! ))?", "", answer.rstrip()) for answer in answers], repeated


def common_beginning(chosen, rejected):
    """Two texts that begin alike -> their prompt.  It ends with the last "Assistant:" that both have, or else
    with their last common line."""
    begin = commonprefix([chosen, rejected])
    place = begin.rfind(ASSISTANT) + len(ASSISTANT) if ASSISTANT in begin else begin.rfind("\n") + 1
    if not begin[:place].strip():
        raise UserError("no prompt, and no line that both texts begin with")
    if any(HUMAN in text[place:] for text in (chosen, rejected)):
        raise UserError("dialogues that differ before their last answer")
    return begin[:place]


def convert_row(row):
    """A row as others write it -> (ours: {"prompt", "chosen", "rejected"} or {"prompt", "reference"}, whether
    its answers repeated its prompt).  Raises UserError that says why it cannot be."""
    prompt = next((row[name] for name in PROMPTS if name in row), None)
    if prompt is None and "instruction" in row:
        prompt = instruction_prompt(row["instruction"], row.get("input") or "")
    if "chosen" in row and "rejected" in row:
        return convert_pair(prompt, row["chosen"], row["rejected"])
    answer = next((row[name] for name in ANSWERS if name in row), None)
    if answer is None:
        raise UserError(f"fields {', '.join(row) or 'none'}: no answer among them")
    prompt, answer = prompt_and_answer(prompt, answer)
    prompt, (answer,), repeated = without_prompt(prompt, [answer])
    return {"prompt": prompt, "reference": answer}, repeated


def convert_pair(prompt, chosen, rejected):
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt = common_beginning(chosen, rejected)
    (prompt, chosen), (other, rejected) = (prompt_and_answer(prompt, x) for x in (chosen, rejected))
    if other != prompt:
        raise UserError("dialogues that differ before their last answer")
    prompt, (chosen, rejected), repeated = without_prompt(prompt, [chosen, rejected])
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}, repeated


def convert_files(paths, out):
    """Converts files and writes one.  Prints what was dropped and why."""
    if not out.endswith(".jsonl"):
        raise UserError(f"--export {out or 'FILE.jsonl'}: name a .jsonl file for the converted rows, "
                        "preferences.jsonl or train.jsonl of a folder for --data")
    rows, dropped, n_repeated = [], Counter(), 0
    for row in (row for path in paths for row in read_jsonl(path, {})):
        try:
            row, repeated = convert_row(row)
            rows.append(row)
            n_repeated += repeated
        except UserError as reason:
            dropped[str(reason)] += 1
    if n_repeated:
        print(f"{n_repeated} rows repeated their prompt in their answers: taken off")
    for reason, n in dropped.items():
        print(f"{n} rows dropped: {reason}")
    if len({"chosen" in row for row in rows}) != 1:
        raise UserError(f"{', '.join(paths)}: no row could be converted, or rows of two kinds (pairs and "
                        "single answers), which need a file each")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(out, rows)
    print(f"wrote {out}: {len(rows)} rows of {', '.join(rows[0])}; the first:\n{json.dumps(rows[0])[:400]}")


# ------------------------------------------------------------------------------------------------- the script

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
        return
    n_new = min(cfg.new_tokens, c.context // 2)
    ids, = encode_prompts(tokenizer, [cfg.prompt], c.context - n_new)
    if len(ids) > 1:
        log_probs = model.log_probs(pack([ids[:1]], [[ids[1:]]], device))       # nothing predicts the first
        print(f"--prompt scores {-log_probs.mean():.4f} nats a token over {len(ids) - 1} tokens, and "
              "continues:")
    (response,), = generate(model, [ids], n_new, temperature=0, eos=ends_of(tokenizer))
    print(cfg.prompt + decode(tokenizer, response)[0])


if __name__ == "__main__":
    launch(main, Config, __doc__)
