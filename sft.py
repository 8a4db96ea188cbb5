"""Supervised fine-tuning: teach a language model the references of a task.

    python sft.py                                    # synthetic task, from scratch: 3 minutes on a CPU core
    python sft.py --data DIR                         # your own JSONL files, from scratch
    python sft.py --model ckpt_sft.pt --freeze 0.8   # go on from a checkpoint, 80 % of the layers frozen
    python sft.py --preset small-llama --task tldr   # a published model on one of the paper's tasks

Writes ckpt_sft.pt and metrics_sft.jsonl.

Deviations from the paper: the synthetic task starts from scratch, so this is pretraining and fine-tuning in
one, with a larger learning rate and nothing frozen.  A model from scratch reads the task's split `pretrain`,
where it has one: it holds what a published model has met and fine-tuning never shows.  All references of a
post are learned in one packed row.  AdamW has no weight decay.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch

from common import pretrained
from common.dist import all_reduce, micro_batches, my_rows, param_groups, shard, world_size
from common.errors import check
from common.flags import (DTYPES, Common, Count, Fraction, Natural, Positive, check_memory, flag_of, launch,
                          setup, use_threads)
from common.loop import Run, warmup_cosine
from common.tokenizer import build_tokenizer, load_tokenizer
from model import GPT, SHAPES, GPTConfig, log_probs, pack
from splits import encode_prompts, encode_responses, length_bucketed_batches, print_overlap, task_of

_SMALL = dict(freeze=0.8, lr=1e-4, batch_size=16, references=1, dtype="bf16")   # fit one 24 GB GPU
PRESETS = {"paper": dict(freeze=0.8, lr=3e-5, batch_size=128, epochs=1, references=1),     # its tables 2-4
           "authors": dict(freeze=0.8, lr=3e-5, batch_size=16, epochs=1, references=1),    # their commands
           "small-gpt2": dict(model="gpt2", **_SMALL), "small-opt": dict(model="facebook/opt-125m", **_SMALL),
           "small-llama": dict(model="HuggingFaceTB/SmolLM2-135M", **_SMALL)}


@dataclass
class Config(Common):
    model: str = "scratch"      # scratch, a checkpoint of kind lm, a hub name (gpt2) or a Hugging Face
                                # directory
    rows: Natural = 0           # train rows used; 0: all
    epochs: Count = 1           # passes over them
    batch_size: Count = 8       # prompts a step, each with all its references
    micro_batch_size: Natural = 0   # of these, prompts forwarded at once (on each GPU); 0: all
    recompute: bool = False     # compute activations again in the backward pass: less memory, a third more
                                # time
    shard: bool = False         # torchrun: each rank keeps a shard of each trained layer; for large models
    references: Count = 4       # references a prompt has in the synthetic task
    lr: Positive = 2.5e-3       # peak learning rate, cosine to zero; the paper fine-tunes at 3e-5
    warmup: Natural = 100       # steps of linear warm-up, at most a tenth of all
    max_grad_norm: Positive = 1.0   # gradients are scaled down to this norm
    freeze: Fraction = 0.0      # fraction of the layers frozen with the embeddings; the paper's 0.8 needs a
                                # pretrained model
    tokenizer: str = "words"    # of a model from scratch: words (bytes and frequent words of train) or a
                                # tiktoken name (gpt2)
    n_words: Natural = 4096     # words in that vocabulary
    shape: str = "tiny"         # of a model from scratch; `python model.py` lists them
    context: Count = 512        # of a model from scratch: positions; longer prompts are cut on the left
    max_new_tokens: Natural = 0     # tokens of a response; 0: the task's own
    max_prompt_tokens: Natural = 0  # tokens of a prompt, cut on the left; 0: the task's own
    log_every: Count = 200      # steps between log lines
    quiet: bool = False         # no progress bar and no log lines


def sft_loss(logp, n_tokens=None):
    """Cross-entropy of the response tokens, EOS included, the prompt's masked out: -mean log pi(y_t | x,
    y_<t).

    logp: (M,); n_tokens: of the whole batch, if logp is of a part of it."""
    return -logp.sum() / (n_tokens or len(logp))


# --------------------------------------------------------------------------------------------- model and data

class Example(NamedTuple):
    """One prompt with its references, as token ids."""
    id: str
    prompt: list
    responses: list

    @property
    def n_tokens(self):
        return len(self.prompt) + sum(map(len, self.responses))


def encode(tokenizer, rows, task, context, what):
    """Rows of a task -> Examples that fit the context."""
    prompts = encode_prompts(tokenizer, [r["prompt"] for r in rows], task.max_prompt_len(context),
                             f"{what} prompts")
    responses = encode_responses(tokenizer, [r["references"] for r in rows], task.max_new_tokens,
                                 f"{what} responses")
    return [Example(row["id"], *ids) for row, *ids in zip(rows, prompts, responses)]


def from_scratch(shape, context, tokenizer, n_words, train, device):
    """A new model of a named shape and its tokenizer's specification, built from the train rows if need
    be."""
    spec = {"kind": "tiktoken", "name": tokenizer}
    if tokenizer == "words":    # 5,000 rows are enough to see every frequent word
        texts = [t for r in train[:5000] for t in (r["prompt"], *(" " + x.lstrip() for x in r["references"]))]
        spec = build_tokenizer(texts, n_words)
    check(shape in SHAPES, f"--shape {shape}: choose from {', '.join(SHAPES)}")
    config = GPTConfig(**{**SHAPES[shape], "vocab_size": load_tokenizer(spec).n_vocab, "context": context})
    with torch.device("meta"):      # its size, without its memory
        n_params = GPT(config).n_params()
    # on a CPU a weight, its gradient and AdamW's two moments; elsewhere the weights that start here
    check_memory(n_params, 16 if device.type == "cpu" else 4, f"--shape {shape}")
    return GPT(config), spec


def build(cfg, device):
    """Everything a run starts from: (model, its tokenizer's specification, task, train and validation
    Examples, hash of the model started from)."""
    model = saved = None
    if cfg.model != "scratch":
        model, saved = pretrained.load(cfg.model, "--model", device, cfg.dtype)
        given = [flag_of(f) for f in ("tokenizer", "n_words", "shape", "context")
                 if getattr(cfg, f) != getattr(Config, f)]
        check(not given, f"{', '.join(given)}: of a model from scratch, and --model {cfg.model} has its own")
    check(model or cfg.freeze == 0,
          "--freeze: a model from scratch has nothing to freeze; it needs --model CHECKPOINT")
    task = task_of(cfg, saved)
    split = "pretrain" if model is None and "pretrain" in task.splits() else "train"
    train = task.rows(split, cfg.rows or None, cfg.references)
    validation = task.rows("validation", 200, cfg.references)
    print_overlap(task)
    if len(train) < cfg.rows:
        print(f"{split} has {len(train)} rows, fewer than --rows {cfg.rows}: all are used", flush=True)
    if model:
        spec = saved["tokenizer"]
    else:
        model, spec = from_scratch(cfg.shape, cfg.context, cfg.tokenizer, cfg.n_words, train, device)
    model.to(device).compute_in(DTYPES[cfg.dtype]).freeze(round(cfg.freeze * model.config.n_layer))
    check(model.config.frozen < model.config.n_layer,
          f"--freeze {cfg.freeze:g} leaves no layer to train; lower it")
    use_threads(cfg, model)
    model.recompute = cfg.recompute
    tokenizer, context = load_tokenizer(spec), model.config.context
    train = encode(tokenizer, train, task, context, "train")
    validation = encode(tokenizer, validation, task, context, "validation")
    return model, spec, task, train, validation, saved and saved["weights_hash"]


@torch.no_grad()
def validation_loss(model, examples, device):
    """Nats a response token."""
    total = torch.zeros(2, dtype=torch.float64)     # negative log-likelihood, tokens
    per_rank = -(-len(examples) // world_size())
    for part, weight in micro_batches(my_rows(examples), 50, per_rank, examples[:1]):
        packed = pack([e.prompt for e in part], [e.responses for e in part], device)
        logp = log_probs(model, model(packed), packed)
        total += weight * torch.tensor([-logp.sum().item(), len(logp)])
    nll, n_tokens = all_reduce(total).tolist()
    return nll / n_tokens


# --------------------------------------------------------------------------------------------------- training

def main(cfg):
    device, rng = setup(cfg)
    model, spec, task, train, validation, model_hash = build(cfg, device)
    if cfg.shard:
        shard(model)
    optimizer = torch.optim.AdamW(param_groups(model.trainable()), lr=cfg.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=True)
    batches = length_bucketed_batches([e.n_tokens for e in train], cfg.batch_size, cfg.epochs, rng)
    run = Run("sft", cfg, optimizer, rng, inputs=[model_hash, spec, train], model=model)

    for step in run.steps(len(batches)):
        run.set_lr(warmup_cosine(step, len(batches), cfg.lr, cfg.warmup))
        batch = [train[i] for i in batches[step]]
        n_tokens = sum(len(r) for e in batch for r in e.responses)
        batch_loss = torch.zeros(1)
        for part, weight in run.micro_batches(batch):
            packed = pack([e.prompt for e in part], [e.responses for e in part], device)
            # summed over the part, divided by the count of the batch: parts and ranks add up to one gradient
            loss = weight * sft_loss(log_probs(model, model(packed), packed), n_tokens)
            loss.backward()
            batch_loss += loss.item()
        grad_norm, = run.step_optimizer(model.trainable(), rows=[e.id for e in batch])

        response_tokens = run.state["response_tokens"] = run.state.get("response_tokens", 0) + n_tokens
        if (step + 1) % cfg.log_every == 0 or step + 1 == len(batches):
            run.state["validation_loss"] = validation_loss(model, validation, device)
            run.log(loss=all_reduce(batch_loss).item(), grad_norm=grad_norm, response_tokens=response_tokens,
                    validation_loss=run.state["validation_loss"])

    metrics = {name: run.state[name] for name in ("validation_loss", "response_tokens")}
    run.save(model, spec, task, metrics | {"steps": len(batches)})
    print(f"wrote {run.path}: {model.n_params():,} parameters, validation loss "
          f"{metrics['validation_loss']:.4f} nats/token", flush=True)


if __name__ == "__main__":
    launch(main, Config, __doc__, PRESETS)
