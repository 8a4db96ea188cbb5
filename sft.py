"""Supervised fine-tuning: teach a language model the references of a task.

    python sft.py                                    # embedded task, from scratch: 2 minutes on 2 CPU cores
    python sft.py --data DIR                         # your own JSONL files, from scratch
    python sft.py --model ckpt_sft.pt --freeze 0.8   # go on from a checkpoint, 80 % of the layers frozen
    python sft.py --preset small-llama --task tldr   # a published model on one of the paper's tasks

Writes ckpt_sft.pt and metrics_sft.jsonl.

Deviations from the paper: the embedded task starts from scratch, so this is pretraining and fine-tuning in
one, with a larger learning rate and nothing frozen; all references of a post are learned in one packed row;
AdamW without weight decay.
"""
import math
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

import model as M
from parallel import add_gradients, by_kind, clip_gradients, parts, shard, total
from pretrained import load_model
from runtime import (DTYPES, Common, Metrics, Resume, Steady, out_file, peak_memory, require, run,
                     save_checkpoint, setup)
from splits import batches, build_tokenizer, encode_prompts, encode_responses, task_of, tokenizer


_SMALL = dict(freeze=0.8, lr=1e-4, batch=16, references=1, dtype="bf16")     # fit one 24 GB GPU
PRESETS = {"paper": dict(freeze=0.8, lr=3e-5, batch=16, epochs=1, references=1),
           "small-gpt2": dict(model="gpt2", **_SMALL), "small-opt": dict(model="facebook/opt-125m", **_SMALL),
           "small-llama": dict(model="HuggingFaceTB/SmolLM2-135M", **_SMALL)}


@dataclass
class Config(Common):
    model: str = "scratch"      # scratch, a checkpoint of kind lm, a hub name (gpt2) or a Hugging Face
                                # directory
    rows: int = 0               # train rows used; 0: all
    epochs: int = 1             # passes over them
    batch: int = 8              # prompts a step, each with all its references
    micro: int = 0              # of these, prompts forwarded at once (on each GPU); 0: all
    recompute: bool = False     # compute activations again in the backward pass: less memory, a third more
                                # time
    shard: bool = False         # torchrun: a rank keeps its share of each trained layer; for models that do
                                # not fit
    references: int = 4         # references a prompt has in the embedded task
    lr: float = 2.5e-3          # peak learning rate, cosine to zero; the paper fine-tunes at 3e-5
    warmup: int = 100           # steps of linear warm-up
    clip: float = 1.0           # gradient norm
    freeze: float = 0.0         # fraction of the layers frozen with the embeddings; the paper's 0.8 needs a
                                # pretrained model
    tokenizer: str = "words"    # of a model from scratch: words (bytes and frequent words of train) or a
                                # tiktoken name (gpt2)
    n_words: int = 4096         # words in that vocabulary
    shape: str = "tiny"         # of a model from scratch; `python model.py` lists them
    context: int = 512          # of a model from scratch: positions; longer prompts are cut on the left
    max_new_tokens: int = 0     # tokens of a response; 0: the task's own
    max_prompt_tokens: int = 0  # tokens of a prompt, cut on the left; 0: the task's own
    log_every: int = 200        # steps between log lines
    quiet: bool = False         # no progress bar and no log lines


def sft_loss(logp, tokens=None):
    """Cross-entropy of the response tokens, EOS included, the prompt's masked out: -mean log pi(y_t | x,
    y_<t).  logp: (M,); tokens: of the whole batch, if logp is of a part of it.  (paper, section 4)"""
    return -logp.sum() / (tokens or len(logp))


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, then cosine to zero."""
    warmup = min(warmup, steps // 10 + 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def from_scratch(cfg, train):
    """(a new model of --shape, its tokenizer's specification)."""
    spec = {"kind": "tiktoken", "name": cfg.tokenizer}
    if cfg.tokenizer == "words":    # 5,000 rows are enough to see every frequent word
        texts = [t for r in train[:5000] for t in (r["prompt"], *(" " + x.lstrip() for x in r["references"]))]
        spec = build_tokenizer(texts, cfg.n_words)
    require(cfg.shape in M.SHAPES, f"--shape {cfg.shape}: choose from {', '.join(M.SHAPES)}")
    config = M.GPTConfig(**{**M.SHAPES[cfg.shape], "vocab_size": tokenizer(spec).n_vocab,
                            "context": cfg.context})
    return M.GPT(config), spec


@torch.no_grad()
def validation_loss(model, prompts, responses, batch, device):
    loss = torch.zeros(2, dtype=torch.float64)       # sum, tokens
    for part, weight in parts(range(len(prompts)), batch):
        packed = M.pack([prompts[i] for i in part], [responses[i] for i in part], device)
        logp = M.log_probs(model, model(packed), packed)
        loss += weight * torch.tensor([-logp.sum().item(), len(logp)])
    return (loss := total(loss))[0].item() / loss[1].item()


def main(cfg):
    device, generator = setup(cfg)
    require(0 <= cfg.freeze <= 1 and cfg.batch >= 1 and cfg.epochs >= 1 and cfg.references >= 1
            and cfg.lr > 0 and cfg.micro >= 0,
            f"--freeze {cfg.freeze} must lie in [0, 1], --micro {cfg.micro} be at least 0, --batch "
            f"{cfg.batch}, --epochs {cfg.epochs} and "
            f"--references {cfg.references} be at least 1, --lr {cfg.lr} be above 0")
    require(cfg.rows >= 0, f"--rows {cfg.rows} must be at least 0, which is all")
    model, saved = None, None
    if cfg.model != "scratch":
        model, saved = load_model(cfg.model, "--model", device, cfg.dtype)
    task = task_of(cfg, saved)
    out = out_file(cfg.out, "ckpt_sft.pt")
    train = task.rows("train", cfg.rows or None, cfg.references)
    held_out = task.rows("validation", 200, cfg.references)

    require(cfg.freeze == 0 or model,
            "--freeze: a model from scratch has nothing to freeze; it needs --model CHECKPOINT")
    model, spec = (model, saved["tokenizer"]) if model else from_scratch(cfg, train)
    model.to(device).compute_in(DTYPES[cfg.dtype]).freeze(round(cfg.freeze * model.config.n_layer))
    model.recompute = cfg.recompute
    enc, room = tokenizer(spec), task.room(model.config.context)

    def encode(rows, what):
        prompts = encode_prompts(enc, [r["prompt"] for r in rows], room, what)
        return prompts, encode_responses(enc, [r["references"] for r in rows], task.max_new_tokens,
                                         what.replace("prompts", "responses"))
    prompts, responses = encode(train, "train prompts")
    v_prompts, v_responses = encode(held_out, "validation prompts")

    if cfg.shard:
        shard(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    require(weights, "--freeze 1 leaves nothing to train")
    optimiser = torch.optim.AdamW(by_kind(weights), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    lengths = [len(p) + sum(map(len, rs)) for p, rs in zip(prompts, responses)]
    todo = batches(lengths, cfg.batch, cfg.epochs, generator)
    inputs = [saved and saved["digest"], spec, prompts, responses]
    resume = Resume(out, cfg, inputs, generator, optimiser, model=model)
    start, carried = resume.load()
    steps, tokens = len(todo), carried.get("tokens", 0)
    log, steady = Metrics(out, cfg.quiet, start), Steady()
    for step in tqdm(range(start, steps), "sft", initial=start, total=steps, disable=cfg.quiet or None):
        mb = todo[step]
        mb_tokens, mb_loss = sum(len(r) for i in mb for r in responses[i]), torch.zeros(1)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, cfg.lr, cfg.warmup)
        optimiser.zero_grad()
        for part, weight in parts(mb, cfg.micro):
            packed = M.pack([prompts[i] for i in part], [responses[i] for i in part], device)
            loss = weight * sft_loss(M.log_probs(model, model(packed), packed), mb_tokens)
            loss.backward()
            mb_loss += loss.item()
        add_gradients(weights)
        norm = clip_gradients(weights, cfg.clip)
        if steady(norm.item(), step + 1, [train[i]["id"] for i in mb]):
            optimiser.step()
        tokens += mb_tokens
        if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
            log.log(step=step + 1, loss=total(mb_loss).item(), lr=optimiser.param_groups[0]["lr"],
                    grad_norm=norm.item(), response_tokens=tokens,
                    validation_loss=validation_loss(model, v_prompts, v_responses, 50, device),
                    peak_mb=round(peak_memory(device)))
        resume.step_done(step + 1, tokens=tokens)
    metrics = {"validation_loss": validation_loss(model, v_prompts, v_responses, 50, device), "steps": steps,
               "response_tokens": tokens}
    model = M.whole(model)
    save_checkpoint(out, model, spec, asdict(task), asdict(cfg), metrics)
    resume.finish()
    print(f"wrote {out}: {model.n_params():,} parameters, validation loss {metrics['validation_loss']:.4f} "
          "nats/token", flush=True)


if __name__ == "__main__":
    run(main, Config, __doc__, PRESETS)
