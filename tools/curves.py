"""Curves of a training log, and for PPO's log the curves of a healthy and of a sick run behind them.

tools/show.py draws them.  The two runs are logs of the synthetic task, results/runs/*.jsonl.  docs/logs.md
says what to look at, and which commands made them.
"""
import math
from pathlib import Path

from common.files import read_jsonl

RUNS = Path(__file__).resolve().parent.parent / "results" / "runs"
STYLES = {  # the two runs ppo_<name>.jsonl: how they are drawn
    "healthy": dict(color="#0072B2", linestyle="-", label="healthy: python ppo.py"),
    "sick": dict(color="#D55E00", linestyle="--", label="sick: no KL penalty, lr and steps doubled")}

PANELS = {  # key of a PPO log: (what it is, its unit, how it looks in a healthy run)
    "reward": ("reward", "standard deviations", "rises, then levels off"),
    "gold_reward": ("gold reward", "points", "rises with the reward"),
    "kl": ("KL from the SFT policy", "nats a response", "rises, then settles"),
    "entropy": ("entropy of the policy", "nats a token", "falls slowly"),
    "eos_rate": ("responses that end", "fraction", "stays near 1"),
    "length": ("response length", "tokens", "stays near the references'"),
    "explained_variance": ("explained variance of the value model", "1: perfect, 0: none", "rises above 0"),
    "ratio_first": ("largest policy ratio before the first update", "new / old probability", "is 1"),
    "pg_clipfrac": ("tokens whose policy ratio is clipped", "fraction", "stays under a few hundredths"),
    "diversity": ("diversity per input", "different n-grams / all", "falls slowly"),
    "pg_norm": ("gradient norm of the policy", "norm before clipping", "stays of one size"),
    "v_loss": ("value loss", "squared reward", "falls"),
}
COLUMNS = 4             # of panels


def series(rows, key):
    """Steps and values of one key; lines without it are left out."""
    return zip(*((row["step"], row[key]) for row in rows if type(row.get(key)) in (int, float)))


def draw_curves(rows, path, name):
    """Draws a log's curves into `path`, a PNG.  rows: lines of the log; name: of its curve in the legend.
    PPO's log has PANELS; that of another script has every number, and no run beside it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if type(value) in (int, float))
    panels = {k: (k.replace("_", " "), "", "") for k in keys if k not in ("step", "seconds")}
    references = {}
    if "kl" in keys:
        panels = {k: panel for k, panel in PANELS.items() if k in keys}
        references = {name: read_jsonl(RUNS / f"ppo_{name}.jsonl", {"step": int}) for name in STYLES}
    n_rows = math.ceil(len(panels) / COLUMNS)
    size = 4.1 * COLUMNS, 2.9 * n_rows + 0.45
    figure, axes = plt.subplots(n_rows, COLUMNS, figsize=size, squeeze=False, layout="constrained")
    for axis, (key, (what, unit, healthy)) in zip(axes.flat, panels.items()):
        for reference, lines in references.items():
            axis.plot(*series(lines, key), linewidth=1.3, alpha=0.8, **STYLES[reference])
        axis.plot(*series(rows, key), label=name, color="black", linewidth=1.8, marker="o" * (len(rows) == 1))
        axis.set_title(what + (f"\nhealthy: {healthy}" if healthy else ""), fontsize=10)
        axis.set(ylabel=unit, xlabel="step")
        if key == "eos_rate":       # or a dip to 0.97 would look like a fall
            axis.set_ylim(-0.03, 1.03)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
