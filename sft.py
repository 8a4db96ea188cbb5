"""Supervised fine-tuning: teach a language model the references of a task.

    python sft.py --preset base                      # synthetic task, from tasks/base.pt: half a minute
    python sft.py                                    # synthetic task, from scratch: minutes on a CPU core
    python sft.py --data DIR                         # your own JSONL files, from scratch
    python sft.py --model ckpt_sft.pt --freeze 0.8   # go on from a checkpoint, 80 % of the layers frozen
    python sft.py --preset small-llama --task tldr   # a published model on one of the paper's tasks

Writes ckpt_sft.pt and metrics_sft.jsonl.

Deviations from the paper: the synthetic task starts from scratch, so this is pretraining and fine-tuning in
one, with a larger learning rate and nothing frozen.  A model from scratch reads the task's split `pretrain`,
where it has one: it holds what a published model has met and fine-tuning never shows.  All references of a
post are learned in one packed row.  AdamW has no weight decay.
"""
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from common.checkpoint import load_checkpoint
from common.dist import all_reduce, my_rows, param_groups, shard, world_size
from common.errors import UserError
from common.files import output_path
from common.flags import (DTYPES, Count, Fraction, Natural, Positive, TrainFlags, arg, launch, setup,
                          use_threads)
from common.loop import Run, check_batch, warmup_cosine
from common.tokenizer import build_tokenizer, load_tokenizer
from model import GPT, SHAPES, GPTConfig, pack
from splits import (encode_prompts, encode_responses, length_bucketed_batches, load_bundle, print_folder,
                    task_of)

_SMALL = dict(freeze=0.8, lr=1e-4, batch_size=16, references=1, dtype="bf16")   # fit one 24 GB GPU
PRESETS = {"base": dict(model="tasks/base.pt", task="synthetic", freeze=0.5, lr=1.5e-3, rows=3072),
           "paper": dict(freeze=0.8, lr=3e-5, batch_size=128, epochs=1, references=1),     # its tables 2-4
           "authors": dict(freeze=0.8, lr=3e-5, batch_size=16, epochs=1, references=1),    # their commands
           "small-gpt2": dict(model="gpt2", **_SMALL), "small-opt": dict(model="facebook/opt-125m", **_SMALL),
           "small-llama": dict(model="HuggingFaceTB/SmolLM2-135M", **_SMALL)}


@dataclass
class Config(TrainFlags):
    model: str = arg("scratch", "scratch, a checkpoint, a hub name (gpt2) or a Hugging Face directory")
    rows: Natural = arg(0, "train rows used; 0: all")
    references: Count = arg(4, "references a prompt has in the synthetic task")
    lr: Positive = arg(2.5e-3, "peak learning rate, cosine to zero; the paper fine-tunes at 3e-5")
    warmup: Natural = arg(100, "steps of linear warm-up, at most a tenth of all")
    freeze: Fraction = arg(0.0, "fraction of the layers frozen with the embeddings; the paper's 0.8")
    tokenizer: str = arg("words", "of a model from scratch: words (bytes, train's words) or tiktoken's name")
    n_words: Natural = arg(4096, "words in that vocabulary")
    shape: Literal[*SHAPES] = arg("tiny", "of a model from scratch")
    context: Count = arg(512, "of a model from scratch: positions; longer prompts are cut on the left")
    max_new_tokens: Natural = arg(0, "tokens of a response; 0: the task's own")
    max_prompt_tokens: Natural = arg(0, "tokens of a prompt, cut on the left; 0: the task's own")
    log_every: Count = arg(200, "steps between log lines")
    keep_cut: bool = arg(False, "learn references longer than --max-new-tokens too, cut, without an end; "
                                "else they are left out, because they teach not to end")


FEW_TOKENS = 200_000    # from scratch; the synthetic task's 423 words take a million


def sft_loss(logp, n_tokens):
    """Cross-entropy of the response tokens, EOS included: -mean log pi(y_t | x, y_<t).
    logp: (R, T), zeros after a response's end; n_tokens: response tokens of the whole batch."""
    return -logp.sum() / n_tokens


# --------------------------------------------------------------------------------------------- model and data

class Example(NamedTuple):
    """One prompt with its references, as token ids."""
    prompt: list
    responses: list

    def n_response_tokens(self):
        return sum(map(len, self.responses))


def encode(tokenizer, rows, task, context, keep_cut, what):
    """Rows of a task -> Examples that fit the context.  A row whose references are all too long has none."""
    prompts = encode_prompts(tokenizer, [r["prompt"] for r in rows], task.max_prompt_len(context),
                             f"{what} prompts")
    responses = encode_responses(tokenizer, [r["references"] for r in rows], task.max_new_tokens,
                                 keep_cut, f"{what} references")
    examples = [Example(*ids) for ids in zip(prompts, responses) if ids[1]]
    if not examples:
        raise UserError(f"no {what} reference fits {task.max_new_tokens} tokens; raise --max-new-tokens")
    return examples


def from_scratch(cfg, train):
    """A new model and its tokenizer's specification, built from the train rows if need be."""
    spec = {"kind": "tiktoken", "name": cfg.tokenizer}
    if cfg.tokenizer == "words":    # 5,000 rows are enough to see every frequent word
        texts = [t for r in train[:5000] for t in (r["prompt"], *(" " + x.lstrip() for x in r["references"]))]
        spec = build_tokenizer(texts, cfg.n_words)
    shape = SHAPES[cfg.shape] | {"vocab_size": load_tokenizer(spec).n_vocab, "context": cfg.context}
    return GPT(GPTConfig(**shape)), spec


def build(cfg, device):
    """Everything a run starts from: (model, its tokenizer's specification, task, train and validation
    Examples, hash of the model started from, share of the train references that are left out)."""
    if cfg.model == "scratch":
        if cfg.freeze or cfg.chat:
            raise UserError("--freeze, --chat: a model from scratch has nothing to freeze and no chat "
                            "template; they need --model")
        task, weights_hash = task_of(cfg), None
    else:
        model, _, task, saved = load_bundle(cfg, device)
        spec, weights_hash = saved["tokenizer"], saved["weights_hash"]
    split = "pretrain" if cfg.model == "scratch" and "pretrain" in task.splits() else "train"
    train = task.rows(split, cfg.rows or None, cfg.references)
    validation = task.rows("validation", 200, cfg.references)
    print_folder(task)
    if cfg.model == "scratch":
        model, spec = from_scratch(cfg, train)
        use_threads(cfg, model.to(device).compute_in(DTYPES[cfg.dtype]))
    model.freeze(round(cfg.freeze * model.config.n_layer))
    if model.config.frozen == model.config.n_layer:
        raise UserError(f"--freeze {cfg.freeze:g} leaves no layer to train; lower it")
    model.recompute = cfg.recompute
    tokenizer, context = load_tokenizer(spec), model.config.context
    n_references = sum(len(row["references"]) for row in train)
    train = encode(tokenizer, train, task, context, cfg.keep_cut, "train")
    validation = encode(tokenizer, validation, task, context, cfg.keep_cut, "validation")
    left_out = 1 - sum(len(example.responses) for example in train) / n_references
    return model, spec, task, train, validation, weights_hash, left_out


@torch.no_grad()
def validation_loss(model, examples, rows_at_once=50):
    """Nats a response token."""
    examples = my_rows(examples[:len(examples) // world_size() * world_size()])     # as many on each rank
    total = torch.zeros(2, dtype=torch.float64)     # negative log-likelihood, tokens
    for i in range(0, len(examples), rows_at_once):
        packed = pack(*zip(*examples[i:i + rows_at_once]), model.device)
        total += torch.tensor([-model.log_probs(packed).sum().item(), len(packed.target)])
    nll, n_tokens = all_reduce(total).tolist()
    return nll / n_tokens


# --------------------------------------------------------------------------------------------------- training

def check_out(path, task):
    """Raises UserError if a checkpoint of another task or folder would be replaced."""
    try:
        old = load_checkpoint(path, "lm")[1]["task"]
    except UserError:       # there is none
        return
    if (old["name"], old["data"]) != (task.name, task.data):
        raise UserError(f"{path} is of {' '.join(filter(None, (old['name'], old['data'])))} and would be "
                        "replaced; --out FOLDER, or --out NAME.pt, keeps it")


def print_warnings(cfg, metrics, best):
    """What a small data set does: too few tokens for a model from scratch, and overfitting.  best: the lowest
    validation loss of the run."""
    if cfg.model == "scratch" and metrics["response_tokens"] < FEW_TOKENS:
        print(f"a model from scratch has read {metrics['response_tokens']:,} response tokens: too few for "
              "sentences that mean anything; small data need a published model: --model "
              "HuggingFaceTB/SmolLM2-135M --freeze 0.8 --lr 1e-4", flush=True)
    if metrics["validation_loss"] > 1.02 * best:
        print(f"the validation loss rose from {best:.4f} to {metrics['validation_loss']:.4f}: the model "
              "learns its rows by heart; fewer --epochs, or more rows", flush=True)


def main(cfg):
    device, rng = setup(cfg)
    check_batch(cfg)
    model, spec, task, train, validation, model_hash, left_out = build(cfg, device)
    if cfg.shard:
        shard(model)
    optimizer = torch.optim.AdamW(param_groups(model.trainable()), lr=cfg.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=True)
    n_tokens_of = [len(e.prompt) + e.n_response_tokens() for e in train]
    batches = length_bucketed_batches(n_tokens_of, cfg.batch_size, cfg.epochs, rng)
    check_out(output_path(cfg.out, "ckpt_sft.pt"), task)
    run = Run("sft", cfg, optimizer, rng, inputs=[model_hash, spec, train], model=model)

    for step in run.steps(len(batches)):
        run.set_lr(warmup_cosine(step, len(batches), cfg.lr, cfg.warmup))
        batch = [train[i] for i in batches[step]]
        n_tokens = sum(e.n_response_tokens() for e in batch)
        batch_loss = torch.zeros(1)
        for part in run.micro_batches(batch):
            packed = pack(*zip(*part), device)
            # summed over the part, divided by the count of the batch: parts and ranks add up to one gradient
            loss = sft_loss(model.log_probs(packed), n_tokens)
            loss.backward()
            batch_loss += loss.item()
        grad_norm, = run.step_optimizer(model)

        response_tokens = run.state["response_tokens"] = run.state.get("response_tokens", 0) + n_tokens
        if (step + 1) % cfg.log_every == 0 or step + 1 == len(batches):
            run.state["validation_loss"] = validation_loss(model, validation)
            run.state["best"] = min(run.state["validation_loss"], run.state.get("best", math.inf))
            run.log(loss=all_reduce(batch_loss).item(), grad_norm=grad_norm, response_tokens=response_tokens,
                    validation_loss=run.state["validation_loss"])

    metrics = {name: run.state[name] for name in ("validation_loss", "response_tokens")}
    run.save(model, spec, task, metrics | {"steps": len(batches), "references_left_out": left_out})
    print(f"wrote {run.path}: {model.n_params():,} parameters, validation loss "
          f"{metrics['validation_loss']:.4f} nats/token"
          + f"; {left_out:.1%} of the references are too long and left out" * (left_out > 0), flush=True)
    print_warnings(cfg, metrics, run.state["best"])
    print(f"next: python reward.py --model {run.path}", flush=True)


if __name__ == "__main__":
    launch(main, Config, __doc__, PRESETS)
