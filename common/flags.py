"""A dataclass becomes the flags of a script: each field's comment is its help text, each field's type its
domain.

Every script is a dataclass `Config` and a function `main(cfg)`.  `launch(main, Config, __doc__)` parses the
command line.  It turns a UserError into one line and exit status 2.  A field's type says which values make
sense (`Count`, `Positive`, `Fraction`, ...), and Config checks them when it is built, so a main holds no
range checks.
"""
import argparse
import ctypes
import dataclasses
import inspect
import math
import os
import platform
import random
import re
import resource
import select
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import numpy as np
import torch

from common import dist
from common.errors import UserError, check


# -------------------------------------------------------------------------------------------- types of flags

@dataclass(frozen=True)
class Domain:
    """Which values of a type a flag accepts: `says` in words, `holds` as a function."""
    says: str
    holds: object


Count = Annotated[int, Domain("an integer of at least 1", lambda x: x >= 1)]
Natural = Annotated[int, Domain("an integer of at least 0", lambda x: x >= 0)]
Threads = Annotated[int, Domain("an integer from 0 to 1024", lambda x: 0 <= x <= 1024)]
Seed = Annotated[int, Domain("an integer from 0 to 2^63 - 1", lambda x: 0 <= x < 2 ** 63)]
Positive = Annotated[float, Domain("a finite number above 0", lambda x: 0 < x < math.inf)]
NonNegative = Annotated[float, Domain("a finite number of at least 0", lambda x: 0 <= x < math.inf)]
Fraction = Annotated[float, Domain("a number from 0 to 1", lambda x: 0 <= x <= 1)]
Mass = Annotated[float, Domain("a number above 0 and at most 1", lambda x: 0 < x <= 1)]
Frozen = Annotated[float, Domain("a number from 0 to 1, or -1 for the checkpoint's own",
                                 lambda x: x == -1 or 0 <= x <= 1)]
Finite = Annotated[float, Domain("a finite number", math.isfinite)]
# below 0.01, logits divided by the temperature overflow and every sample would be the last token
Temperature = Annotated[float, Domain("a number from 0.01 to 100", lambda x: 0.01 <= x <= 100)]


def flag_of(name):
    return "--" + name.replace("_", "-")


def check_domain(field, value):
    """Raises UserError if the value of a dataclass field lies outside the field's type."""
    if get_origin(field.type) is Literal:
        known = get_args(field.type)
        check(value in known, f"{flag_of(field.name)} {value}: choose from {', '.join(known)}")
    if get_origin(field.type) is Annotated:
        _, domain = get_args(field.type)
        check(domain.holds(value), f"{flag_of(field.name)} {value}: it must be {domain.says}")


@dataclass
class Common:
    task: str = ""              # synthetic (default), synthetic-independent, synthetic-mixed, instruct,
                                # folder, tldr, tldr-length, tldr-subreddit, tldr-sentiment or alpaca; ""
                                # takes the checkpoint's
    data: str = ""              # folder of train/validation/test/ood_*.jsonl (and preferences.jsonl), or of
                                # local copies of the paper's data sets; "" takes the checkpoint's
    seed: Seed = 0              # varies initialisation, data order and sampling; never the data
    out: str = "."              # folder of the files written; of a training script also a file name that
                                # ends in .pt
    device: str = "auto"        # auto, cpu, cuda, cuda:1, ...
    dtype: Literal["fp32", "bf16"] = "fp32"     # of matrix products; trained weights and their optimizer stay
                                                # fp32
    threads: Threads = 0        # CPU threads; 0: one for a small model, torch's choice for others
    save_every: NonNegative = 60.0      # seconds between the states that a killed run continues from; 0:
                                        # after each step

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_domain(field, getattr(self, field.name))


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SMALL_MODEL = 2_000_000                 # parameters, below which one CPU thread is the better choice
ALL_THREADS = torch.get_num_threads()   # torch's choice, one for each core


# ------------------------------------------------------------------------------------------- the command line

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
    """argparse prints its whole usage with an error.  A mistake in a flag gets one line like any other."""

    def error(self, message):
        self.exit(2, f"error: {message}; {self.prog} --help names every flag\n")


def _add_flag(group, field, text):
    flag, text = flag_of(field.name), f"{text} (default: {field.default!r})"
    if field.type is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=text)
    elif get_origin(field.type) is Literal:
        group.add_argument(flag, default=field.default, metavar="|".join(get_args(field.type)), help=text)
    else:
        kind = get_args(field.type)[0] if get_origin(field.type) is Annotated else field.type
        group.add_argument(flag, type=kind, default=field.default, metavar=kind.__name__.upper(), help=text)


def parse(config, doc, argv=None, presets=None):
    """Command line -> config.  Flags are the field names with dashes.  Booleans take --flag and --no-flag.

    presets: {name: {field: value}}.  --preset NAME puts these in place of the defaults, and flags still
    win."""
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    own, shared = parser.add_argument_group("this script"), parser.add_argument_group("every script")
    texts, common = help_of(config), {f.name for f in dataclasses.fields(Common)}
    if presets:
        known = "; ".join(f"{name}: {' '.join(f'{k}={v}' for k, v in preset.items())}"
                          for name, preset in presets.items())
        own.add_argument("--preset", choices=presets, help=f"other defaults: {known}")
    own_first = sorted(dataclasses.fields(config), key=lambda field: field.name in common)
    for field in own_first:
        if field.name == "files":
            parser.add_argument("files", nargs="*", help=texts["files"])
        else:
            _add_flag(shared if field.name in common else own, field, texts[field.name])
    if presets:
        preset = parser.parse_known_args(argv)[0].preset
        parser.set_defaults(**presets.get(preset, {}))
    given = vars(parser.parse_args(argv))
    given.pop("preset", None)
    return config(**given)


class Interrupted(Exception):
    """SIGINT or SIGTERM, after the state was saved.  Arguments: signal number, the state's path, steps
    done."""

    def __str__(self):
        _, path, step = self.args
        return (f"interrupted after step {step}: {path} holds the state; the same command continues from "
                "there")


def launch(main, config, doc, presets=None):
    """The last line of every script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # texts of all languages, on a screen that may not know them
            stream.reconfigure(errors="backslashreplace")
    try:
        main(parse(config, doc, presets=presets))
        print(end="", flush=True)       # a full disk or a closed pipe shows here, not after the end
    except BrokenPipeError as error:
        sys.exit(141 if _reader_left() else _say(f"error: {error}", 2))     # a shell's status for SIGPIPE
    except (UserError, OSError) as error:   # OSError: a full disk, a folder without permission
        sys.exit(_say(f"error: {error}", 2))
    except (RuntimeError, MemoryError) as error:    # torch.OutOfMemoryError is a RuntimeError
        if not _out_of_memory(error):
            raise
        asked = re.search(r"ried to allocate ([\d.]+ \w+)", str(error))
        found = f" when {asked[1]} more were needed" if asked else ""
        sys.exit(_say(f"error: memory ran out{found}; lower --micro-batch-size (rows forwarded at once) or "
                      "--batch-size, or choose a smaller model; docs/scaling.md says more", 2))
    except Interrupted as stop:
        sys.exit(_say(str(stop), 128 + stop.args[0]))
    except KeyboardInterrupt:
        sys.exit(_say("interrupted", 130))
    finally:
        dist.stop()


def _reader_left():
    """Whether whoever reads what is printed, such as `head`, has had enough."""
    screen = select.poll()
    screen.register(1, 0)           # asks for nothing but whether the other end is closed
    left = bool(screen.poll(0))
    if left:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)    # what is still to be written goes nowhere
    return left


def _out_of_memory(error):
    said = ("can't allocate memory", "bad_alloc")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(x in str(error) for x in said)


def _say(line, status):
    print(line, file=sys.stderr)
    return status


# ------------------------------------------------------------------------------------------ device and seeds

def setup(cfg):
    """Device and seeds of a run.  Returns (torch.device, rng: a CPU torch.Generator for sampling and data
    order)."""
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device = dist.start(_device(cfg.device))
    if device.type == "cpu":
        limit_memory()
        keep_freed_memory()
    if dist.rank():
        sys.stdout, cfg.quiet = open(os.devnull, "w"), True     # rank 0 speaks for all
    check(cfg.dtype == "fp32" or device.type != "cuda" or torch.cuda.is_bf16_supported(),
          "--dtype bf16: this GPU does not have it; use fp32")
    # threads add up the gradients of one position in any order; a fixed order costs next to nothing on a CPU
    # (not by use_deterministic_algorithms, which first imports torch's compiler: two seconds)
    torch.set_deterministic_debug_mode("error" if device.type == "cpu" else "default")
    torch.utils.deterministic.fill_uninitialized_memory = False
    random.seed(cfg.seed)
    np.random.seed(cfg.seed % 2**32)
    torch.manual_seed(cfg.seed)
    return device, torch.Generator().manual_seed(cfg.seed)


def use_threads(cfg, *models):
    """Sets the number of CPU threads: --threads, or what suits the largest of the models, and prints it.

    The operations of a small model are so short that two threads mostly wait for each other.  On two idle
    cores the tiny model gains a quarter by the second thread.  With one core busy, two threads took 201 s for
    200 steps of sft.py, and one thread 19 s for 600."""
    size = max(model.n_params() for model in models)
    n = cfg.threads or (1 if size < SMALL_MODEL else ALL_THREADS)
    torch.set_num_threads(n)
    if models[0].embed.weight.device.type == "cpu":
        print(f"{size:,} parameters, {n} CPU thread{'s' * (n > 1)} (--threads)", flush=True)


def check_memory(n_params, bytes_each, what):
    """Raises UserError if n_params parameters of bytes_each bytes cannot fit the free memory, before the
    machine tries.  what: the model, in words."""
    needed, free = n_params * bytes_each, free_memory()
    check(needed < free, f"{what}: {n_params:,} parameters take {needed / 2**30:.1f} GB, and this machine "
          f"has {free / 2**30:.1f} GB free; choose a smaller model (python -m tools.budget lists what they "
          "take)")


def free_memory():
    """Bytes that a process can still take: free memory and swap, but no more than a container's limit.  All
    of the memory where the system does not say what is free (macOS)."""
    limit, meminfo = Path("/sys/fs/cgroup/memory.max"), Path("/proc/meminfo")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if meminfo.is_file():
        kilobytes = dict(re.findall(r"(\w+): +(\d+)", meminfo.read_text()))
        free = 1024 * (int(kilobytes["MemAvailable"]) + int(kilobytes["SwapFree"]))
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    return free if allowed == "max" else min(free, int(allowed))


def limit_memory():
    """Lets an allocation beyond the free memory fail, so that `launch` can say so.  Without a limit Linux
    kills the process, or another one, without a word."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        in_use = int(statm.read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = in_use + free_memory()
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard < 0 else min(wanted, hard), hard))


def keep_freed_memory():
    """Lets glibc keep what large tensors free, up to 256 MB, for the next ones.  Usually it gives such memory
    back, and the system clears it anew, page by page, for each operation."""
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3     # of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**28)
        libc.mallopt(M_MMAP_THRESHOLD, 2**26)


def _device(name):
    """--device -> torch.device.  Raises UserError on one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = re.fullmatch(r"cpu|cuda(:\d+)?", name)
    check(known, f"--device {name}: no such device; use auto, cpu, cuda or cuda:N")
    if name.startswith("cuda"):
        n, index = torch.cuda.device_count(), int((known[1] or ":0")[1:])
        check(index < n, f"--device {name}: torch sees {n} GPUs here; use "
              f"{'cpu' if n == 0 else f'cuda:0 to cuda:{n - 1} or cpu'}")
    return torch.device(name)
