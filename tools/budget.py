"""What training takes, by arithmetic: memory of weights, gradients and optimizer, and time, of each shape.

    python -m tools.budget                             # an H200: 989 TFLOP/s in bf16, of which 40 %; 4.8 TB/s
    python -m tools.budget --tflops 100 --tbytes 1.5   # a device that keeps up 100 TFLOP/s, reads 1.5 TB/s
    python -m tools.budget --ranks 8                   # the first column's trained layers over 8 devices
    python -m tools.budget --study opt-125m --price 2  # hours and dollars of the paper's TL;DR study

Nothing here is measured; tools/bench.py measures.  Left out are activations (they grow with --batch-size or
--micro-batch-size), the arithmetic of attention itself (a hundredth of the matrix products' at these
lengths), and waiting.
"""
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from common.errors import check
from common.flags import Common, Count, NonNegative, Positive, launch
from model import GPT, SHAPES, GPTConfig


@dataclass
class Config(Common):
    tflops: Positive = 400.0    # operations a second that matrix products keep up, in units of 1e12
    tbytes: Positive = 4.8      # memory read in a second, in units of 1e12 bytes
    ranks: Count = 1            # devices that trained layers are spread over
    prompt: Count = 400         # tokens; TL;DR's posts
    response: Count = 48        # tokens
    batch_size: Count = 64      # rollouts sampled together
    epochs: Count = 4           # of PPO over a rollout
    study: str = ""             # a shape of the table: what one seed of the paper's study takes
    price: NonNegative = 0.0    # dollars an hour of the device


class Sizes(NamedTuple):
    """Numbers of weights.  frozen, layers (trained) and rest (trained embeddings, norm and head) add up to
    the model; head and blocks (all layers) are counted apart from these."""
    frozen: int
    layers: int
    rest: int
    head: int
    blocks: int
    frozen_bytes: int


def count(weights):
    return sum(p.numel() for p in weights)


def sizes(config, dtype):
    """Sizes of a GPTConfig whose layers compute in dtype."""
    with torch.device("meta"):
        model = GPT(config).compute_in(dtype)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    layers = count(model.blocks[config.frozen:].parameters())
    return Sizes(frozen=count(frozen), layers=layers, rest=count(model.parameters()) - count(frozen) - layers,
                 head=model.head.weight.numel(), blocks=count(model.blocks.parameters()),
                 frozen_bytes=sum(p.numel() * p.element_size() for p in frozen))


def memory(config, dtype, ranks=1):
    """Bytes on a device of (SFT or reward model, PPO).

    A trained weight takes 16: itself, its gradient and Adam's two moments, fp32.  PPO trains a policy and a
    value model, and keeps the tops of the reference policy and of the reward model.  It makes a copy of the
    policy to sample from where the policy computes in bf16 or is sharded over ranks.  The trunk lies in
    memory once."""
    n = sizes(config, dtype)
    trained = n.layers / ranks + n.rest
    copied = dtype.itemsize * (n.layers + n.rest) if ranks > 1 or dtype != torch.float32 else 0
    return n.frozen_bytes + 16 * trained, n.frozen_bytes + (2 * 16 + 2 * 4) * trained + copied


def operations(config, prompt, response, epochs):
    """Floating-point operations of (an SFT example, a pair of the reward model, a PPO rollout).

    Two for each weight and token forward, four backward where weights are trained.  The two responses of a
    pair share their prompt.  A rollout goes once through the policy to be sampled, once through the trunk and
    four tops (policy, reference policy, value model, reward model), and `epochs` times forward and backward
    through two tops."""
    n = sizes(config, torch.float32)
    tokens, top, trunk = prompt + response, n.layers, n.blocks - n.layers
    head = 2 * n.head * response
    sft = 2 * tokens * (trunk + 3 * top) + 3 * head
    pair = 2 * (tokens + response) * (trunk + 3 * top)
    sampling = 2 * tokens * (trunk + top) + head
    scoring = 2 * tokens * (trunk + 4 * top) + 2 * head
    learning = epochs * (2 * tokens * 2 * 3 * top + 3 * head)
    return sft, pair, sampling + scoring + learning


def seconds(config, cfg):
    """Of 1,000 (SFT examples, pairs, PPO rollouts).  Each token sampled reads all weights (bf16), once for
    the whole batch."""
    sft, pair, rollout = (1000 * x / (cfg.tflops * 1e12)
                          for x in operations(config, cfg.prompt, cfg.response, cfg.epochs))
    n = sizes(config, torch.float32)
    bytes_read = 1000 / cfg.batch_size * cfg.response * 2 * (n.blocks + n.head)
    return sft, pair, rollout + bytes_read / (cfg.tbytes * 1e12)


def table_row(name, shape, cfg):
    """A line of the table: parameters, memory all trained and 80 % frozen, seconds likewise."""
    full = GPTConfig(**shape)
    frozen = replace(full, frozen=round(0.8 * full.n_layer))
    with torch.device("meta"):
        n = GPT(full).n_params()
    cells = [name, f"{n:,}"]
    for config, ranks in ((full, cfg.ranks), (frozen, 1)):
        cells.append(" / ".join(f"{x / 1e9:.2f}" for x in memory(config, torch.bfloat16, ranks)))
    for config in (full, frozen):
        cells.append(" / ".join(f"{x:,.0f}" if x >= 10 else f"{x:.2g}" for x in seconds(config, cfg)))
    return "| " + " | ".join(cells) + " |"


STUDY = {  # the paper's TL;DR study with the presets `paper`: work of one seed
    "SFT examples": 116_722, "preference pairs": 92_858, "PPO rollouts": 750 * 256,
    # 500 prompts of TL;DR and of CNN/DailyMail: 16 of PPO's, 64 scored ones of SFT's
    "samples": 2 * 500 * (16 + 64)}


def print_study(name, cfg):
    """Hours, memory and price of one seed, 80 % frozen."""
    config = GPTConfig(**SHAPES[name])
    config = replace(config, frozen=round(0.8 * config.n_layer))
    sft, pair, rollout = (x / 3.6e6 for x in seconds(config, cfg))      # hours of one
    n = sizes(config, torch.float32)
    sample = 2 * (cfg.prompt + cfg.response) * n.blocks / (cfg.tflops * 1e12) / 3600     # and read, below
    reading = cfg.response * 2 * (n.blocks + n.head) / cfg.batch_size / (cfg.tbytes * 1e12) / 3600
    hours = {work: count * each for (work, count), each in zip(STUDY.items(), (
        sft, pair, rollout, sample + reading))}
    largest = max(memory(config, torch.bfloat16)) / 1e9
    print(f"{name}, 80 % frozen, one seed of the paper's TL;DR study at {cfg.tflops:g} TFLOP/s and "
          f"{cfg.tbytes:g} TB/s.  Computed, not measured.\n")
    for work, x in hours.items():
        print(f"{STUDY[work]:>9,} {work:18} {x:7.2f} h")
    total = sum(hours.values())
    price = f", {total * cfg.price:.2f} dollars" if cfg.price else ""
    print(f"{'':9} {'together':18} {total:7.2f} h{price}; {largest:.1f} GB beside activations")


def main(cfg):
    if cfg.study:
        check(cfg.study in SHAPES, f"--study {cfg.study}: choose from {', '.join(SHAPES)}")
        return print_study(cfg.study, cfg)
    over = f", over {cfg.ranks} ranks" if cfg.ranks > 1 else ""
    print("bf16 with fp32 masters.  GB, without activations: SFT or reward model / PPO.  Seconds for 1,000: "
          "SFT examples / preference pairs / PPO rollouts, "
          f"at {cfg.tflops:g} TFLOP/s and {cfg.tbytes:g} TB/s, prompts of {cfg.prompt} and responses of "
          f"{cfg.response} tokens.  Computed, not measured.\n\n"
          f"| model | parameters | GB, all trained{over} | GB, 80 % frozen | s, all trained | "
          "s, 80 % frozen |\n" + "| --- " * 6 + "|")
    for name, shape in SHAPES.items():
        print(table_row(name, shape, cfg))


if __name__ == "__main__":
    launch(main, Config, __doc__)
