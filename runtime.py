"""What teaches nothing about RLHF: flags, devices, seeds, files, log lines.

Every script is a dataclass `Config` and a function `main(cfg)`; `run(main, Config, __doc__)` turns the fields
into flags, whose help is the comment behind each field, and turns a `Fault` (a mistake in the input) into one
line and exit status 2.
"""
import argparse
import dataclasses
import glob
import gzip
import hashlib
import inspect
import io
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import parallel
from model import GPT, GPTConfig


class Fault(Exception):
    """Something the user can mend: says what is wrong, where, and what to do.  Printed as one line, exit
    status 2."""


@dataclass
class Common:
    task: str = ""              # world (default), world-independent, world-mixed, instruct, instruct-mixed,
                                # folder, tldr, tldr-length, tldr-subreddit, tldr-sentiment or alpaca; ""
                                # takes the checkpoint's
    data: str = ""              # folder of train/validation/test/ood_*.jsonl (and preferences.jsonl), or of
                                # local copies of the paper's data sets; "" takes the checkpoint's
    seed: int = 0               # varies initialisation, data order and sampling; never the data
    out: str = "."              # folder of the files written, or a file name ending in .pt
    device: str = "auto"        # auto, cpu, cuda, cuda:1, ...
    dtype: str = "fp32"         # of matrix products: fp32, or bf16 (trained weights and their optimiser stay
                                # fp32)
    threads: int = 0            # CPU threads; 0 leaves torch's choice
    save_every: float = 60.0    # seconds between the states that a killed run goes on from; 0: after each
                                # step


def help_of(config):
    """{field: the comment behind it and on the comment lines below}, over a dataclass and its bases."""
    texts, field = {}, None
    for cls in reversed(config.__mro__):
        for line in inspect.getsource(cls).splitlines() if dataclasses.is_dataclass(cls) else ():
            if found := re.match(r"\s+(\w+): .*?#\s*(.+)$", line):
                field = found[1]
                texts[field] = found[2].replace("%", "%%")
            elif field in texts and (more := re.match(r"\s{8,}#\s*(.+)$", line)):
                texts[field] += " " + more[1].replace("%", "%%")
    return texts


class _Parser(argparse.ArgumentParser):
    """argparse prints its whole usage with an error; a mistake in a flag gets one line like any other."""

    def error(self, message):
        self.exit(2, f"error: {message}; {self.prog} --help names every flag\n")


def parse(config, doc, argv=None, presets=None):
    """Command line -> config.  Flags are the field names with dashes; booleans take --flag and --no-flag.
    presets: {name: {field: value}}; --preset NAME puts these in place of the defaults, and flags still
    win."""
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    texts = help_of(config)
    if presets:
        known = "; ".join(f"{name}: {' '.join(f'{k}={v}' for k, v in preset.items())}"
                          for name, preset in presets.items())
        parser.add_argument("--preset", choices=presets, help=f"other defaults: {known}")
    for f in dataclasses.fields(config):
        if f.name == "files":
            parser.add_argument("files", nargs="*", help=texts["files"])
            continue
        flag, text = "--" + f.name.replace("_", "-"), f"{texts[f.name]} (default: {f.default!r})"
        if f.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=f.default, help=text)
        else:
            parser.add_argument(flag, type=f.type, default=f.default, metavar=f.type.__name__.upper(),
                                help=text)
    if presets:
        preset = parser.parse_known_args(argv)[0].preset
        parser.set_defaults(**presets.get(preset, {}))
    given = vars(parser.parse_args(argv))
    given.pop("preset", None)
    return config(**given)


def run(main, config, doc, presets=None):
    """The last line of every script."""
    try:
        main(parse(config, doc, presets=presets))
    except Fault as fault:
        sys.exit(_say(f"error: {fault}", 2))
    except OSError as fault:        # a full disk, a folder that cannot be written: the path is in the message
        sys.exit(_say(f"error: {fault}", 2))
    except Interrupted as stop:
        sys.exit(_say(str(stop), 128 + stop.args[0]))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted", 130))
    finally:
        parallel.stop()


def _say(line, status):
    print(line, file=sys.stderr)
    return status


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def first_line(error):
    """What an exception says, in one line that fits a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def require(condition, message):
    if not condition:
        raise Fault(message)


def setup(cfg):
    """Device and seeds.  Returns (torch.device, a CPU generator for sampling and data order)."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    require(cfg.device != "cuda" or torch.cuda.is_available(),
            "--device cuda: torch sees no GPU here; use --device cpu")
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto"
                              else cfg.device)
    except RuntimeError:
        raise Fault(f"--device {cfg.device}: no such device; use auto, cpu, cuda or cuda:N") from None
    device = parallel.start(device)
    if parallel.rank():
        sys.stdout, cfg.quiet = open(os.devnull, "w"), True     # rank 0 speaks for all
    require(cfg.dtype in DTYPES, f"--dtype {cfg.dtype}: choose from {', '.join(DTYPES)}")
    require(cfg.dtype == "fp32" or device.type != "cuda" or torch.cuda.is_bf16_supported(),
            "--dtype bf16: this GPU has none; use fp32")
    # threads add up the gradients of one position in any order; on a CPU a fixed one costs next to nothing
    torch.use_deterministic_algorithms(device.type == "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False
    random.seed(cfg.seed)
    np.random.seed(cfg.seed % 2**32)
    torch.manual_seed(cfg.seed)
    return device, torch.Generator().manual_seed(cfg.seed)


# ------------------------------------------------------------------------------------------------------ files

def out_file(out, default):
    """--out FILE.pt names the file, anything else the folder for `default`.  The folder is made.  Returns a
    Path."""
    path = Path(out) if out.endswith(".pt") else Path(out) / default
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Fault(f"--out {out}: cannot make the folder {path.parent} ({error.strerror})") from None
    return path


def write_whole(path, payload):
    """Writes bytes so that `path` is afterwards either the old file or the new one, never half of it.  Of
    several ranks the first writes."""
    if parallel.rank():
        return
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):    # by a run killed while writing
        left.unlink(missing_ok=True)
    try:
        with open(temporary, "wb") as f:
            f.write(payload)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Fault(f"{path}: cannot be written ({error.strerror}); what stood there before is "
                    "untouched") from None


def name_of(state):
    """A name for weights, {name: tensor}: a hash of their bytes."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        if state[name].numel():
            digest.update(state[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def save_checkpoint(path, model, tokenizer, task, args, metrics):
    """One file, enough to continue from: kind, config, tokenizer, task, arguments, weights.

    The name of the weights (a hash) goes along: samples remember which reward model their policy was trained
    against."""
    state = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    buffer = io.BytesIO()
    torch.save(dict(kind="reward" if model.scalar else "lm", config=dataclasses.asdict(model.config),
                    tokenizer=tokenizer, task=task,
                    args=args, metrics=metrics, digest=name_of(state), state=state), buffer)
    write_whole(path, buffer.getvalue())


class Interrupted(Exception):
    """SIGINT or SIGTERM, after the state was saved.  Arguments: signal number, the state's path, steps
    done."""

    def __str__(self):
        _, path, step = self.args
        return f"interrupted after step {step}: {path} holds the state, the same command goes on from there"


def whole(state):
    """Nested dicts and lists with their tensors on the CPU, shares of a tensor put together by all ranks."""
    if isinstance(state, dict):
        return {k: whole(v) for k, v in state.items()}
    if isinstance(state, list):
        return [whole(v) for v in state]
    return parallel.whole(state).cpu() if isinstance(state, torch.Tensor) else state


class Resume:
    """The state of a run on disk: killed at any moment, the same command goes on to the same result.

    Saved between steps, every --save-every seconds and on SIGINT or SIGTERM: the weights that are trained,
    the optimiser, the generators, and what else the loop carries from step to step.  A state counts only for
    the flags and inputs it was made with; which threads and device computed it does not count, but equal to
    the last bit is only what ran on equal ones.

    out: the checkpoint's path; inputs: anything JSON that names what is learned from; models: GPTs by
    name."""

    def __init__(self, out, cfg, inputs, generator, optimiser=None, **models):
        self.path, self.every = Path(out).with_suffix(".resume"), cfg.save_every
        self.generator, self.optimiser, self.models = generator, optimiser, models
        flags = {k: v for k, v in dataclasses.asdict(cfg).items()
                 if k not in ("out", "quiet", "device", "threads", "save_every")}
        name = json.dumps([flags, inputs], sort_keys=True, default=str)
        self.name, self.saved, self.signal = hashlib.sha256(name.encode()).hexdigest(), time.time(), 0
        self.before = {}            # handlers, to be put back
        if threading.current_thread() is threading.main_thread():
            self.before = {n: signal.signal(n, self._ask) for n in (signal.SIGINT, signal.SIGTERM)}

    def _ask(self, number, frame):
        if self.signal:             # asked twice: at once
            raise KeyboardInterrupt
        self.signal = number

    def load(self):
        """(steps done, what the loop carried) of an earlier run; (0, {}) if there was none.  Raises Fault on
        a damaged state."""
        if not self.path.is_file():
            return 0, {}
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
            if state["name"] != self.name:
                print(f"{self.path} is of other flags or inputs: starting anew", flush=True)
                return 0, {}
            for name, model in self.models.items():
                weights = dict(model.named_parameters())
                model.load_state_dict({k: parallel.share_like(x, weights[k])
                                       for k, x in state["models"][name].items()}, strict=False)
            if self.optimiser:
                weights = [p for group in self.optimiser.param_groups for p in group["params"]]
                moments = {i: {k: parallel.share_like(x, weights[i]) if x.dim() else x for k, x in of.items()}
                           for i, of in state["optimiser"]["state"].items()}
                self.optimiser.load_state_dict(state["optimiser"] | {"state": moments})
            self.generator.set_state(state["generator"])
        except Exception as error:      # whatever a damaged file makes torch raise
            raise Fault(f"{self.path}: a damaged state ({type(error).__name__}); remove it to start "
                        "anew") from None
        print(f"{self.path}: going on after step {state['step']}", flush=True)
        return state["step"], state["carried"]

    def step_done(self, step, **carried):
        """To be called between steps.  Saves when it is time; raises Interrupted if a signal asked for it."""
        # all ranks must agree: rank 0's clock counts, and anyone's signal
        due = parallel.rank() == 0 and time.time() - self.saved >= self.every
        due, self.signal = parallel.total(torch.tensor([int(due), self.signal]), "max").tolist()
        if not self.signal and not due:
            return
        buffer = io.BytesIO()
        state = {"name": self.name, "step": step, "carried": carried,
                 "generator": self.generator.get_state(),
                 "optimiser": self.optimiser and self.optimiser.state_dict(),
                 "models": {n: {k: p.detach() for k, p in m.named_parameters() if p.requires_grad}
                            for n, m in self.models.items()}}
        torch.save(whole(state), buffer)
        write_whole(self.path, buffer.getvalue())
        self.saved = time.time()
        if self.signal:
            raise Interrupted(self.signal, self.path, step)

    def finish(self):
        """The result is written: the state has served, and signals mean again what they did."""
        self.path.unlink(missing_ok=True)
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Steady:
    """Says whether a step may be taken: a gradient that is not finite is skipped and told, and after `limit`
    in a row the run stops."""

    def __init__(self, limit=10):
        self.limit, self.bad = limit, 0

    def __call__(self, norm, step, rows):
        """norm: gradient norm; rows: numbers of the batch's rows.  Raises Fault at the limit."""
        if math.isfinite(norm):
            self.bad = 0
            return True
        self.bad += 1
        print(f"step {step}: the gradient is not finite, skipped; rows {', '.join(map(str, rows))}",
              flush=True)
        require(self.bad < self.limit, f"step {step}: {self.limit} gradients in a row were not finite; lower "
                "--lr. No checkpoint was written, what stood there before is untouched")
        return False


MADE_BY = {"ckpt_sft.pt": "python sft.py", "ckpt_reward.pt": "python reward.py --model ckpt_sft.pt",
           "ckpt_ppo.pt": "python ppo.py --model ckpt_sft.pt"}


def load_checkpoint(path, kind, flag="--model", device="cpu", dtype="fp32"):
    """Returns (GPT, the checkpoint's dict without its weights).  Raises Fault on a missing, damaged, hostile
    or wrong file.

    Weights only: a pickle that would run code is refused by torch.load."""
    path = Path(path)
    if not path.is_file():
        made = MADE_BY.get(path.name) or {"lm": MADE_BY["ckpt_sft.pt"],
                                          "reward": MADE_BY["ckpt_reward.pt"]}[kind]
        raise Fault(f"{flag} {path}: no such file; `{made}` makes one")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found, config = saved["kind"], GPTConfig(**saved["config"])
        require(found == kind,
                f"{flag} {path}: this is a checkpoint of kind {found!r}, {kind!r} is needed here")
        model = GPT(config, scalar=kind == "reward")
        state = saved.pop("state")
        require(name_of(state) == saved["digest"],
                f"{flag} {path}: damaged: its weights are not those that were saved")
        model.load_state_dict(state)
        for key in ("tokenizer", "task", "args", "metrics"):
            saved[key]
    except Fault:
        raise
    except Exception as error:  # whatever a damaged file makes torch raise, the user needs the same line
        raise Fault(f"{flag} {path}: not a checkpoint of this project, or damaged ({type(error).__name__}: "
                    f"{first_line(error)})") from None
    return model.to(device).compute_in(DTYPES[dtype]), saved


LONGEST_LINE = 2 ** 26      # bytes; a file without line ends must not fill the memory


def loads(text):
    """json.loads with one kind of error, ValueError, and of strings that can be written again."""
    try:
        return _mend(json.loads(text))
    except RecursionError:
        raise ValueError("brackets nested too deep") from None


def _mend(x):
    """Half a surrogate pair, which JSON can spell and UTF-8 cannot, becomes a question mark."""
    if isinstance(x, str):
        return x.encode("utf-8", "replace").decode() if not x.isascii() else x
    if isinstance(x, list):
        return [_mend(v) for v in x]
    return {_mend(k): _mend(v) for k, v in x.items()} if isinstance(x, dict) else x


def read_jsonl(path, needs):
    """Lines of a .jsonl or .jsonl.gz file as dicts.  needs: {field: type}.  Raises Fault naming file and
    line."""
    rows, path = [], Path(path)
    opened = gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")
    try:
        with opened as f:
            for number, line in enumerate(iter(lambda: f.readline(LONGEST_LINE), b""), 1):
                require(len(line) < LONGEST_LINE, f"{path}, line {number}: longer than {LONGEST_LINE} bytes")
                if not line.strip():
                    continue
                try:
                    row = loads(line)
                except ValueError as error:     # bad UTF-8 is one too
                    raise Fault(f"{path}, line {number}: not JSON ({error})") from None
                require(isinstance(row, dict),
                        f"{path}, line {number}: a JSON object is needed, this is a {type(row).__name__}")
                for field, kind in needs.items():
                    require(field in row,
                            f"{path}, line {number}: field {field!r} is missing; fields found: "
                            f"{', '.join(row) or 'none'}")
                    require(isinstance(row[field], kind),
                            f"{path}, line {number}: field {field!r} must be of type {kind.__name__}, it is "
                            f"{type(row[field]).__name__}")
                rows.append(row)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise Fault(f"{path}: the gzip file is damaged ({error})") from None
    return rows


def write_jsonl(path, rows):
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


class Metrics:
    """One flat dict a step: printed, and appended to <checkpoint's name>.jsonl with `metrics` for `ckpt`.

    A run starts its file anew, one that goes on after step `after` keeps the lines up to there; a torn last
    line is dropped.  With quiet=True only the file is written."""

    def __init__(self, checkpoint, quiet=False, after=0):
        path = Path(checkpoint)
        self.path = path.with_name(path.stem.replace("ckpt_", "metrics_", 1) + ".jsonl")
        kept = self._lines(after) if after and self.path.is_file() else []
        write_whole(self.path, b"".join(line for line, _ in kept))
        self.file, self.quiet = open(os.devnull if parallel.rank() else self.path, "a"), quiet
        self.start = time.time() - (kept[-1][1]["seconds"] if kept else 0)

    def _lines(self, after):
        """[(line, parsed)] of the steps up to `after`."""
        kept = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                row = json.loads(line)
                if row["step"] <= after and line.endswith(b"\n"):
                    kept.append((line, row))
            except (ValueError, KeyError, TypeError):
                print(f"{self.path}: a torn line is dropped", flush=True)
        return kept

    def log(self, show=True, **row):
        row = {k: float(f"{v:.5g}") if isinstance(v, float) and math.isfinite(v) else v for k,
               v in row.items()}
        row["seconds"] = round(time.time() - self.start, 2)
        try:
            print(json.dumps(row), file=self.file, flush=True)
        except OSError as error:
            raise Fault(f"{self.path}: cannot be written ({error.strerror})") from None
        if show and not self.quiet:
            print("  ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
                  flush=True)


def peak_memory(device):
    """Peak memory of this process in MB: the GPU's if one is used, else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource     # absent on Windows, and only needed here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# -------------------------------------------------------------------------------------------------- intervals

def bootstrap(values, draws=2000, seed=0):
    """Mean of values (n,) or (n, k) over the first axis with a 95 % percentile interval over that axis:
    (mean, low, high).

    The unit resampled is the row: pass one number per prompt, not per output, or the interval is too narrow
    (outputs of one prompt depend on each other).  Raises ValueError on no values."""
    x = np.asarray(values, dtype=float)
    if len(x) == 0:
        raise ValueError("bootstrap: no values")
    picks = np.random.default_rng(seed).integers(0, len(x), (draws, len(x)))
    low, high = np.percentile(x[picks].mean(axis=1), (2.5, 97.5), axis=0)
    return x.mean(axis=0), low, high
