"""Run: what every training loop needs around its steps, so that the script shows only the algorithm.

A Run never calls the model and has no hooks: the forward pass, the loss and `.backward()` stand in the
script.  Killed at any moment, the same command continues to the same result.  A state counts only for the
flags and inputs that it was made with.  Threads, device and micro-batches do not count, but only a run with
the same ones is equal to the last bit.
"""
import hashlib
import json
import math
import os
import resource
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from common import dist
from common.checkpoint import load_state, save_checkpoint, save_state
from common.errors import UserError
from common.files import lock, output_path, write_jsonl

# flags that change no result, or nothing but rounding
NO_EFFECT = ("out", "quiet", "device", "threads", "save_every", "micro_batch_size", "recompute")
# metrics that stand in the file but not on the screen, where a line has to fit
FILE_ONLY = {"kl_k3", "sampler_gap", "entropy", "explained_variance", "pg_loss", "v_loss", "v_clipfrac",
             "ratio", "update_kl", "pg_norm", "v_norm", "lr", "peak_mb", "tokens_per_second"}


def warmup_cosine(step, steps, peak, warmup):
    """The learning rate of a step: linear warm-up, at most over a tenth of all steps, then cosine to zero."""
    warmup = min(warmup, steps // 10 + 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def check_batch(cfg, minibatches=1):
    """Raises UserError unless --batch-size divides by ranks x --micro-batch-size x minibatches: then every
    rank makes equally many passes, and no result depends on the number of ranks."""
    divisor = dist.world_size() * (cfg.micro_batch_size or 1) * minibatches
    if cfg.batch_size % divisor:
        raise UserError(f"--batch-size {cfg.batch_size}: it must be a multiple of {divisor}, which is "
                        f"{dist.world_size()} ranks x --micro-batch-size x {minibatches} minibatches")


class Run:
    """name: sft, reward, ppo, ... names ckpt_<name>.pt, metrics_<name>.jsonl and the progress bar.  rng: the
    torch.Generator that the loop draws from.  inputs: anything JSON that names what is learned from.  models:
    the GPTs that are trained, by name.  `state` holds plain values that survive an interruption."""

    def __init__(self, name, cfg, optimizer, rng, inputs, path=None, **models):
        self.cfg, self.name, self.optimizer, self.rng, self.models = cfg, name, optimizer, rng, models
        self.path = path or output_path(cfg.out, f"ckpt_{name}.pt")
        # killed between the result and the end, the run would start from its own result and train twice
        if Path(cfg.model).resolve() == self.path.resolve():
            raise UserError(f"--model {cfg.model}: the result would replace it; name another file, as --out "
                            f"{self.path.with_stem(self.path.stem + '2')}")
        # never just train.jsonl: --out DATA/train.pt would replace the data
        self.log_path = self.path.with_name(f"metrics_{self.path.stem.removeprefix('ckpt_')}.jsonl")
        self.state_path, self.lock_path = self.path.with_suffix(".resume"), self.path.with_suffix(".lock")
        self.lock = lock(self.lock_path) if dist.rank() == 0 else None
        flags = {k: v for k, v in asdict(cfg).items() if k not in NO_EFFECT}
        named = json.dumps([flags, inputs], sort_keys=True, default=str)
        self.inputs_hash = hashlib.sha256(named.encode()).hexdigest()
        self.step, self.state, self.columns = 0, {}, []
        if self.state_path.is_file():
            self._continue()
        self.began = time.monotonic() - (self.state["log"][-1]["seconds"] if self.state.get("log") else 0)

    def _continue(self):
        saved = load_state(self.state_path, self.inputs_hash, self.rng, self.optimizer, self.models)
        dist.all_reduce(torch.zeros(1))         # all ranks have read it
        if saved:
            self.step, self.state = saved
            print(f"{self.state_path}: going on after step {self.step}")
            if "log" in self.state:             # without the lines of steps that are done again
                write_jsonl(self.log_path, self.state["log"])
            return
        old = self.state_path.with_suffix(".resume.old")    # kept: a mistyped flag should cost no hours
        print(f"{self.state_path} is of other flags or inputs: starting anew, it is now {old.name}")
        if dist.rank() == 0:
            os.replace(self.state_path, old)

    def steps(self, total):
        """Yields the numbers of the steps that are not done yet, 0 ... total - 1.  Between steps it saves the
        state every --save-every seconds, and on SIGINT or SIGTERM, which then end the process."""
        saved_at, signals = time.monotonic(), []

        def remember(number, frame):
            if signals:
                raise KeyboardInterrupt
            signals.append(number)
            os.write(2, b"stops after this step and saves the state; signal again to stop at once\n")
        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for step in tqdm(range(self.step, total), self.name, initial=self.step, total=total,
                             disable=self.cfg.quiet or None):
                self.step = step
                yield step
                # all ranks must agree: rank 0's clock counts, and anyone's signal
                due = dist.rank() == 0 and time.monotonic() - saved_at >= self.cfg.save_every
                due, number = dist.all_reduce(torch.tensor([int(due), sum(signals)]), "max").tolist()
                if due or number:
                    self.save_state(step + 1)
                    saved_at = time.monotonic()
                if number:
                    tqdm.write(f"interrupted after step {step + 1}: {self.state_path} holds the state; the "
                               "same command continues from there", file=sys.stderr)
                    sys.exit(128 + number)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def save_state(self, step):
        save_state(self.state_path, self.inputs_hash, step, self.state, self.rng, self.optimizer, self.models)

    def next_rows(self, n_rows, batch_size):
        """The row numbers of the next batch: all rows in random order, shuffled again when they run out."""
        order = self.state.setdefault("order", [])
        while len(order) < batch_size:
            order += torch.randperm(n_rows, generator=self.rng).tolist()
        batch, self.state["order"] = order[:batch_size], order[batch_size:]
        return batch

    def micro_batches(self, batch):
        """This rank's rows of a batch (a list), --micro-batch-size at a time."""
        mine = dist.my_rows(batch)
        size = self.cfg.micro_batch_size or len(mine)
        return [mine[i:i + size] for i in range(0, len(mine), size)]

    def set_lr(self, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def step_optimizer(self, *models):
        """Sums the gradients over ranks, clips each model's to --max-grad-norm, takes a step and clears them.
        Returns the list of gradient norms before clipping.  Raises UserError if one is not finite."""
        params_of = [model.trainable() for model in models]
        dist.sum_gradients([p for params in params_of for p in params])
        norms = [dist.clip_grad_norm(params, self.cfg.max_grad_norm).item() for params in params_of]
        if not math.isfinite(sum(norms)):
            raise UserError(f"step {self.step + 1}: the gradient is not finite; lower --lr. No checkpoint "
                            "was written")
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norms

    def log(self, **metrics):
        """A line of the metrics file and, but for FILE_ONLY, of a table on the screen."""
        row = {"step": self.step + 1, **metrics, "lr": self.optimizer.param_groups[0]["lr"],
               "peak_mb": round(peak_memory(next(iter(self.models.values())).device)),
               "seconds": round(time.monotonic() - self.began, 2)}
        row = {k: float(f"{v:.5g}") if isinstance(v, float) and k != "seconds" else v for k, v in row.items()}
        self.state.setdefault("log", []).append(row)
        write_jsonl(self.log_path, self.state["log"])       # whole, so a run that goes on leaves no torn line
        if self.cfg.quiet:
            return
        shown = {name: v for name, v in row.items() if name not in FILE_ONLY}
        if list(shown) != self.columns:
            self.columns = list(shown)
            tqdm.write(" ".join(name.rjust(7) for name in shown))
        cells = {name: f"{v:.4f}" if isinstance(v, float) else str(v) for name, v in shown.items()}
        tqdm.write(" ".join(cell.rjust(max(len(name), 7)) for name, cell in cells.items()))

    def save(self, model, spec, task, metrics, **args):
        """Writes the checkpoint.  spec: of the tokenizer; metrics: {name: number or None}; args: to remember,
        with the flags.  Raises UserError if a metric is not finite."""
        for name, value in metrics.items():
            if value is not None and not math.isfinite(value):
                raise UserError(f"{name} of the trained model is not finite: lower --lr. No checkpoint was "
                                "written")
        args = asdict(self.cfg) | {"data_sizes": task.sizes()} | args
        save_checkpoint(self.path, dist.full_copy(model), spec, vars(task), args, metrics)
        self.finish()

    def finish(self):
        """The result is written, so the state is no longer needed."""
        if dist.rank() == 0:
            self.state_path.unlink(missing_ok=True)
            self.lock_path.unlink(missing_ok=True)


def peak_memory(device):
    """Peak memory of this process in MB: the GPU's if one is used, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
