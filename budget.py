"""What training takes, by arithmetic: memory of weights, gradients and optimiser, and time, for each stage
and published shape.

    python budget.py                             # an H200: 989 TFLOP/s in bf16, of which 40 %, and 4.8 TB/s
    python budget.py --tflops 100 --tbytes 1.5   # a device that keeps up 100 TFLOP/s and reads 1.5 TB/s
    python budget.py --ranks 8                   # the first column's trained layers over 8 devices (--shard)

Nothing here is measured: bench.py does that.  Left out: activations (they grow with --batch or --micro),
attention's own arithmetic (a hundredth of the matrix products' at these lengths), and waiting.
"""
from dataclasses import dataclass, replace

import torch

from model import GPT, SHAPES, GPTConfig
from runtime import Common, require, run


@dataclass
class Config(Common):
    tflops: float = 400.0       # operations a second that matrix products keep up, in units of 1e12
    tbytes: float = 4.8         # memory read in a second, in units of 1e12 bytes
    ranks: int = 1              # devices that trained layers are spread over
    prompt: int = 400           # tokens; TL;DR's posts
    response: int = 48          # tokens
    batch: int = 64             # rollouts sampled together
    epochs: int = 4             # of PPO over a rollout


def sizes(config, dtype):
    """({part: number of weights}, bytes that the frozen ones take).  Parts: frozen, layers (trained), rest
    (trained embeddings, norm and head); and, counted apart from these, head and blocks (all layers)."""
    with torch.device("meta"):
        model = GPT(config).compute_in(dtype)
    count = lambda weights: sum(p.numel() for p in weights)  # noqa: E731
    frozen = [p for p in model.parameters() if not p.requires_grad]
    layers = count(model.blocks[config.frozen:].parameters())
    return {"frozen": count(frozen), "layers": layers,
            "rest": count(model.parameters()) - count(frozen) - layers, "head": model.head.weight.numel(),
            "blocks": count(model.blocks.parameters())}, sum(p.numel() * p.element_size() for p in frozen)


def memory(config, dtype, ranks=1):
    """Bytes on a device of (SFT or reward model, PPO).

    A trained weight takes 16: itself, its gradient and Adam's two moments, fp32.  PPO trains a policy and a
    value network, keeps a reference's and a reward model's tops, and makes a copy of the policy to sample
    from where it computes in bf16 or is spread over ranks.  The trunk lies in memory once."""
    n, frozen = sizes(config, dtype)
    trained = n["layers"] / ranks + n["rest"]
    copied = dtype.itemsize * (n["layers"] + n["rest"]) if ranks > 1 or dtype != torch.float32 else 0
    return frozen + 16 * trained, frozen + (2 * 16 + 2 * 4) * trained + copied


def operations(config, cfg):
    """Floating-point operations of (an SFT example, a pair of the reward model, a PPO rollout).

    Two for each weight and token forward, four backward where weights are trained.  A pair's responses share
    their prompt.  A rollout: prompt and response are read once to sample, once through the trunk and four
    tops (policy, reference, value, reward), and `epochs` times forward and backward through two tops."""
    n, _ = sizes(config, torch.float32)
    tokens, top, trunk = cfg.prompt + cfg.response, n["layers"], n["blocks"] - n["layers"]
    head = 2 * n["head"] * cfg.response
    return (2 * tokens * (trunk + 3 * top) + 3 * head,
            2 * (tokens + cfg.response) * (trunk + 3 * top),
            2 * tokens * (trunk + top) + head + 2 * tokens * (trunk + 4 * top) + 2 * head
            + cfg.epochs * (2 * tokens * 2 * 3 * top + 3 * head))


def seconds(config, cfg):
    """Of 1,000 (SFT examples, pairs, PPO rollouts).  Each token sampled reads all weights (bf16), once for
    the whole batch."""
    sft, pair, rollout = (1000 * x / (cfg.tflops * 1e12) for x in operations(config, cfg))
    n, _ = sizes(config, torch.float32)
    reads = 1000 / cfg.batch * cfg.response * 2 * (n["blocks"] + n["head"]) / (cfg.tbytes * 1e12)
    return sft, pair, rollout + reads


def main(cfg):
    require(min(cfg.tflops, cfg.tbytes) > 0 and min(cfg.ranks, cfg.prompt, cfg.response, cfg.batch,
                                                    cfg.epochs) >= 1,
            "--tflops and --tbytes must be above 0, the others at least 1")
    over = f", over {cfg.ranks} ranks" if cfg.ranks > 1 else ""
    print("bf16 with fp32 masters.  GB, without activations: SFT or reward model / PPO.  Seconds for 1,000: "
          "SFT examples / preference pairs / PPO rollouts, "
          f"at {cfg.tflops:g} TFLOP/s and {cfg.tbytes:g} TB/s, prompts of {cfg.prompt} and responses of "
          f"{cfg.response} tokens.  Computed, not measured.\n\n"
          f"| model | parameters | GB, all trained{over} | GB, 80 % frozen | s, all trained | "
          "s, 80 % frozen |\n" + "| --- " * 6 + "|")
    for name, shape in SHAPES.items():
        full = GPTConfig(**shape)
        part = replace(full, frozen=round(0.8 * full.n_layer))
        with torch.device("meta"):
            n = GPT(full).n_params()
        cells = [" / ".join(f"{x / 1e9:.2f}" for x in memory(config, torch.bfloat16, ranks))
                 for config, ranks in ((full, cfg.ranks), (part, 1))]
        cells += [" / ".join(f"{x:,.0f}" if x >= 10 else f"{x:.2g}" for x in seconds(config, cfg))
                  for config in (full, part)]
        print(f"| {name} | {n:,} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    run(main, Config, __doc__)
