"""A dataclass becomes the flags of a script: a field's type is its domain, `arg(default, help)` the rest.

Every script is a dataclass `Config`, which checks its values when it is built, and a function `main(cfg)`.
`launch(main, Config, __doc__)` parses the command line and turns a UserError into one line and exit status 2.
"""
import argparse
import dataclasses
import difflib
import math
import os
import sys
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple, get_args, get_origin

import torch

from common import dist
from common.errors import UserError


# --------------------------------------------------------------------------------------------- types of flags

class Domain(NamedTuple):
    """Which values of a type a flag accepts: `says` in words, `holds` as a function."""
    says: str
    holds: object


def number_or_none(text):
    return None if text in (None, "none") else float(text)


Count = Annotated[int, Domain("an integer of at least 1", lambda x: x >= 1)]
Natural = Annotated[int, Domain("an integer of at least 0", lambda x: x >= 0)]
Seed = Annotated[int, Domain("an integer from 0 to 2^63 - 1", lambda x: 0 <= x < 2 ** 63)]
Positive = Annotated[float, Domain("a finite number above 0", lambda x: 0 < x < math.inf)]
NonNegative = Annotated[float, Domain("a finite number of at least 0", lambda x: 0 <= x < math.inf)]
Fraction = Annotated[float, Domain("a number from 0 to 1", lambda x: 0 <= x <= 1)]
Mass = Annotated[float, Domain("a number above 0 and at most 1", lambda x: 0 < x <= 1)]
Frozen = Annotated[float, Domain("a number from 0 to 1, or -1 for the checkpoint's own",
                                 lambda x: x == -1 or 0 <= x <= 1)]
OrNone = Annotated[number_or_none, Domain("a finite number, or none",
                                          lambda x: x is None or math.isfinite(x))]
# below 0.01, logits divided by the temperature overflow and every sample would be the last token
Temperature = Annotated[float, Domain("a number from 0.01 to 100", lambda x: 0.01 <= x <= 100)]


def arg(default, help):
    """A field of a Config: its default and its help text."""
    return dataclasses.field(default=default, metadata={"help": help})


def flag_of(name):
    return "--" + name.replace("_", "-")


class Flags:
    """What every Config inherits.  Raises UserError if a value lies outside its field's type."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, (kind, *more) = getattr(self, field.name), get_args(field.type) or (None,)
            if get_origin(field.type) is Literal and value not in (kind, *more):
                raise UserError(f"{flag_of(field.name)} {value}: choose from {', '.join((kind, *more))}")
            if get_origin(field.type) is Annotated and not more[0].holds(value):
                raise UserError(f"{flag_of(field.name)} {value}: it must be {more[0].says}")


@dataclass
class Machine(Flags):
    out: str = arg(".", "folder of the files written; of a training script also a file name that ends in .pt")
    device: str = arg("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["fp32", "bf16"] = arg("fp32", "of matrix products; trained weights stay fp32")
    threads: Natural = arg(0, "CPU threads; 0: one for a small model, torch's choice for others")


@dataclass
class Common(Machine):
    task: str = arg("", "synthetic (default), synthetic-independent, synthetic-mixed, folder, tldr, "
                        "tldr-length, tldr-subreddit, tldr-sentiment, tldr-short or alpaca; '' takes the "
                        "checkpoint's")
    data: str = arg("", "folder of train/validation/test/ood_*.jsonl (and preferences.jsonl), or of local "
                        "copies of the paper's data sets; '' takes the checkpoint's")
    seed: Seed = arg(0, "varies initialisation, data order and sampling; never the data")
    save_every: NonNegative = arg(60.0, "seconds between the states of which a killed run goes on")


@dataclass
class TrainFlags(Common):
    batch_size: Count = arg(8, "prompts a step")
    epochs: Count = arg(1, "passes over the data")
    micro_batch_size: Natural = arg(0, "rows of a step that are forwarded at once (on each GPU); 0: all")
    recompute: bool = arg(False, "compute activations again in the backward pass: less memory, more time")
    shard: bool = arg(False, "torchrun: each rank keeps a shard of each trained layer; for large models")
    max_grad_norm: Positive = arg(1.0, "gradients are scaled down to this norm")
    chat: bool = arg(False, "prompts go through the published model's chat template; checkpoints remember it")
    quiet: bool = arg(False, "no progress bar and no log lines")


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL_MODEL = 2_000_000                 # parameters, below which one CPU thread is the better choice
ALL_THREADS = torch.get_num_threads()   # torch's choice, one for each core


# ------------------------------------------------------------------------------------------- the command line

class _Parser(argparse.ArgumentParser):
    """argparse prints its whole usage with an error.  A mistake in a flag gets one line like any other."""

    def error(self, message):
        flag = message.partition(": --")[2].split(" ")[0].replace("_", "-")
        near = difflib.get_close_matches(f"--{flag}", self._option_string_actions, 1) if flag else []
        meant = "".join(f"did you mean {name}? " for name in near)
        self.exit(2, f"error: {message}; {meant}{self.prog} --help names every flag\n")


def _add_flag(group, field):
    flag, text = flag_of(field.name), f"{field.metadata['help']} (default: {field.default!r})"
    text = text.replace("%", "%%")      # argparse formats it
    kind = get_args(field.type)[0] if get_origin(field.type) is Annotated else field.type
    if field.name == "files":
        group.add_argument("files", nargs="*", help=field.metadata["help"])
    elif kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
    elif get_origin(kind) is Literal:
        group.add_argument(flag, metavar="|".join(get_args(kind)), help=text)
    else:
        group.add_argument(flag, type=kind, metavar=kind.__name__.upper(), help=text)


def parse(config, doc, argv=None, presets=None):
    """Command line -> config.  presets: {name: {field: value}}, other defaults; flags still win."""
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                     argument_default=argparse.SUPPRESS)        # only flags that are given
    own, shared = parser.add_argument_group("this script"), parser.add_argument_group("every script")
    if presets:
        own.add_argument("--preset", choices=presets, help=f"other defaults: {presets}")
    own_first = sorted(dataclasses.fields(config), key=lambda f: f.name in TrainFlags.__dataclass_fields__)
    for field in own_first:
        _add_flag(shared if field.name in Common.__dataclass_fields__ else own, field)
    given = vars(parser.parse_args(argv))
    preset = presets[given.pop("preset")] if "preset" in given else {}
    return config(**preset | given)


def launch(main, config, doc, presets=None):
    """The last line of every script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # texts of all languages, on a screen that may not know them
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main(parse(config, doc, presets=presets))
        return
    except BrokenPipeError:             # whoever reads what is printed, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)                   # a shell's status for SIGPIPE
    except (UserError, OSError) as error:       # OSError: a full disk, a folder without permission
        status, said = 2, f"error: {error}"
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):      # torch says it in many ways
            raise
        status, said = 2, ("error: memory ran out; lower --micro-batch-size (rows forwarded at once) or "
                           "choose a smaller model; docs/published-models.md says more")
    except KeyboardInterrupt:
        status, said = 130, "interrupted"
    finally:
        dist.stop()
    print(said, file=sys.stderr)
    sys.exit(status)


# ------------------------------------------------------------------------------------------- device and seeds

def setup(cfg):
    """Device and seeds of a run: (torch.device, a CPU torch.Generator for sampling and data order)."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device = dist.start(_device(cfg.device))
    if dist.rank():
        sys.stdout, cfg.quiet = open(os.devnull, "w"), True     # rank 0 speaks for all
    # threads add up gradients in any order; a fixed one costs next to nothing on a CPU
    # (not by use_deterministic_algorithms, which first imports torch's compiler: two seconds)
    torch.set_deterministic_debug_mode("error" if device.type == "cpu" else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False
    seed = getattr(cfg, "seed", 0)      # measures have none
    torch.manual_seed(seed)
    return device, torch.Generator().manual_seed(seed)


def use_threads(cfg, model):
    """Sets the number of CPU threads.  In a small model two threads mostly wait for each other."""
    torch.set_num_threads(cfg.threads or (1 if model.n_params() < SMALL_MODEL else ALL_THREADS))


def check_memory(n_params, bytes_each, what):
    """Raises UserError if n_params parameters of bytes_each bytes cannot fit this machine."""
    needed, there = n_params * bytes_each, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(f"{what}: {n_params:,} parameters take {needed / 2**30:.1f} GB, and this machine has "
                        f"{there / 2**30:.1f} GB; choose a smaller model")


def _device(name):
    """--device -> torch.device.  Raises UserError on one that is not here."""
    n = torch.cuda.device_count()
    here = [*["cuda"][:n], "cpu", *(f"cuda:{i}" for i in range(n))]
    if name not in ("auto", *here):
        raise UserError(f"--device {name}: torch sees {n} GPUs here; use auto, {', '.join(here)}")
    return torch.device(here[0] if name == "auto" else name)
