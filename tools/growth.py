"""How time and memory of a PPO step grow, beside what arithmetic says.

    python -m tools.growth               # measures (10 minutes on two cores), then draws
    python -m tools.growth --draw        # draws results/figures/growth.png from results/growth.json anew

One of four sizes changes at a time: tokens of the prompt, tokens of the response, rollouts, layers frozen.
The model has 8 layers of width 256 (7.1 million parameters) with random weights; responses have a fixed
length.  A step samples the rollouts, scores them and learns from them in 4 epochs of 4 minibatches.

Each point is a process of its own, because memory is its peak: the median of some steps after one that does
not count, and the peak less what a process holds before it makes the model.
"""
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.errors import check
from common.files import output_path, write_json
from common.flags import DTYPES, Common, Count, launch, setup
from model import GPTConfig
from tools import budget
from tools.bench import EPOCHS, MINIBATCHES, ROOT, medians, our_iteration, peak, peaks, processor, timed

SHAPE = dict(vocab_size=1024, n_layer=8, n_head=8, d_model=256, context=2048, position="learned",
             norm="layernorm", activation="gelu_tanh", bias=True)
USUAL = {"prompt": 256, "response": 32, "rollouts": 16, "frozen": 6}    # the point that all curves share
CURVES = {"prompt": (64, 128, 256, 512, 1024), "response": (8, 16, 32, 64, 128, 256),
          "rollouts": (4, 8, 16, 32, 64), "frozen": (0, 2, 4, 6, 7)}
TITLES = {"prompt": "tokens of a prompt", "response": "tokens of a response", "rollouts": "rollouts a step",
          "frozen": "layers frozen, of 8"}


@dataclass
class Config(Common):
    out: str = "results"        # folder of growth.json and figures/growth.png
    repeats: Count = 3          # steps of a point; the median counts
    draw: bool = False          # measure nothing
    point: str = ""             # internal: one point as JSON, in a process of its own


# ------------------------------------------------------------------------------------------------ arithmetic

def operations(prompt, response, rollouts, frozen):
    """Floating-point operations of a step: those of matrix products with weights, as tools/budget.py has
    them, and of attention, which that leaves out.

    A token attends to what stands before it: 4 D operations for each of S / 2 positions and layer, forward;
    twice that backward."""
    config, S = replace(GPTConfig(**SHAPE), frozen=frozen), prompt + response
    products = budget.operations(config, prompt, response, EPOCHS)[2]
    top, trunk = config.n_layer - frozen, frozen
    layers = (trunk + top) + (trunk + 4 * top) + EPOCHS * 2 * 3 * top     # sampled, scored, learned from
    return rollouts * (products + layers * 2 * config.d_model * S * S)


def bytes_held(prompt, response, rollouts, frozen):
    """Bytes at the peak, the larger of two moments: learning from a minibatch, and starting to sample.

    Learning keeps of each token and trained layer 9 D + 2 F numbers for the backward pass (input and output
    of two norms, queries, keys, values, output of attention twice, residual; input and output of the
    activation), of two models.  Sampling reads all prompts, one layer at a time, which holds as much of each
    token, and fills the cache: 2 D a token and layer."""
    config, S = replace(GPTConfig(**SHAPE), frozen=frozen), prompt + response
    a_token = 4 * (9 * config.d_model + 2 * config.d_ff)        # of one layer
    learning = 2 * (config.n_layer - frozen) * a_token * S * rollouts / MINIBATCHES
    sampling = (a_token * prompt + 4 * 2 * config.d_model * config.n_layer * S) * rollouts
    return budget.memory(config, torch.float32)[1] + max(learning, sampling)


# ------------------------------------------------------------------------------------------------- measuring

def measure_point(sizes, repeats, dtype, device):
    """{"seconds", "processor_seconds", "megabytes"} of one point, in this process."""
    before = peak(device)
    iteration = our_iteration(SHAPE, sizes["frozen"] / SHAPE["n_layer"], device, dtype, sizes["prompt"],
                              sizes["response"], sizes["rollouts"])
    iteration()
    took = medians([timed(iteration, device) for _ in range(repeats)])
    return {"seconds": took.wall, "processor_seconds": took.processor, "megabytes": peak(device) - before}


def in_a_process(sizes, cfg):
    """`measure_point` in a process of its own."""
    command = [sys.executable, "-m", "tools.growth", "--point", json.dumps(sizes), "--device", cfg.device,
               "--repeats", str(cfg.repeats), "--dtype", cfg.dtype, "--threads", str(cfg.threads)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    check(done.returncode == 0, f"tools.growth {sizes}: {done.stderr[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(cfg, device):
    """growth.json: {"peak_flops", "processor", "device", "dtype", "threads", "points": [{"curve", sizes,
    seconds, processor_seconds, megabytes, operations, bytes}]}."""
    points = []
    for curve, values in CURVES.items():
        for value in values:
            sizes = USUAL | {curve: value}
            line = {"curve": curve, **sizes, **in_a_process(sizes, cfg), "operations": operations(**sizes),
                    "bytes": bytes_held(**sizes)}
            print(f"{TITLES[curve]} {value}: {line['seconds']:.2f} s, {line['megabytes']:,.0f} MB; by "
                  f"arithmetic {line['operations'] / 1e9:,.0f} GFLOP, {line['bytes'] / 2 ** 20:,.0f} MB",
                  flush=True)
            points.append(line)
    return {"peak_flops": peaks(device, DTYPES[cfg.dtype]).flops, "processor": processor(),
            "device": str(device), "dtype": cfg.dtype, "threads": torch.get_num_threads(), "points": points}


# --------------------------------------------------------------------------------------------------- drawing

def draw(found, path):
    """growth.png: seconds and megabytes over each size, measured and computed."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure = plt.figure(figsize=(16, 7), layout="constrained")
    axes, rate = figure.subplots(2, 4, sharey="row"), usual_rate(found)
    for column, curve in zip(axes.T, CURVES):
        lines = [x for x in found["points"] if x["curve"] == curve]
        x = [line[curve] for line in lines]
        for ax, measured, computed in (
                (column[0], [p["seconds"] for p in lines], [p["operations"] / rate for p in lines]),
                (column[1], [p["megabytes"] for p in lines], [p["bytes"] / 2 ** 20 for p in lines])):
            ax.plot(x, computed, ":", color="#D55E00", lw=2, label="computed")
            ax.plot(x, measured, "o-", color="#0072B2", label="measured")
            ax.set_ylim(0, None)
            if curve != "frozen":
                ax.set_xscale("log", base=2)
                ax.set_xticks(x, map(str, x))
            ax.spines[["top", "right"]].set_visible(False)
        column[1].set_xlabel(TITLES[curve])
    axes[0, 0].set_ylabel("seconds a step")
    axes[1, 0].set_ylabel("MB beside an empty process")
    axes[0, 0].legend(frameon=False)
    usual = ", ".join(f"{TITLES[k]}: {v}" for k, v in USUAL.items())
    figure.suptitle(f"How a PPO step grows  ({usual}, where not varied)\ncomputed seconds: operations at "
                    f"{rate / 1e9:.0f} GFLOP/s, {rate / found['peak_flops']:.0%} of this machine's peak")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def usual_rate(found):
    """Operations a second at the point that all curves share, the mean over the curves."""
    usual = [x for x in found["points"] if all(x[k] == v for k, v in USUAL.items())]
    return sum(x["operations"] for x in usual) / sum(x["seconds"] for x in usual)


def main(cfg):
    device, _ = setup(cfg)
    torch.set_deterministic_debug_mode("default")  # as in tools/bench.py
    if cfg.point:
        return print(json.dumps(measure_point(json.loads(cfg.point), cfg.repeats, DTYPES[cfg.dtype], device)))
    path = output_path(cfg.out, "growth.json")      # before minutes of measuring
    check(not cfg.draw or path.is_file(), f"{path}: no such file; python -m tools.growth measures it")
    if not cfg.draw:
        write_json(path, measure(cfg, device))
    figure = Path(cfg.out) / "figures/growth.png"
    draw(json.loads(path.read_text()), figure)
    print(f"wrote {path}, {figure}")


if __name__ == "__main__":
    launch(main, Config, __doc__)
