"""One resumable runner for every study: stages as data, done side by side, with one progress bar and the time
left.

A stage is done once its mark <name>.done stands.  A run killed at any moment goes on where it stopped: the
same command skips the stages that are done, and a training stage that was cut continues from its own saved
state.
"""
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from common.errors import UserError, first_line
from common.files import lock, write_json

ROOT = Path(__file__).resolve().parent.parent
GB_A_STAGE = 2          # memory that a stage of the synthetic study takes


class Stage(NamedTuple):
    name: str               # and the path of its mark and its log: <folder>/<name>.done, <folder>/<name>.log
    needs: tuple            # names of the stages that must be done before
    leaves: tuple           # patterns of paths in <folder>, of which files must stand afterwards
    seconds: float          # what it usually takes
    work: object            # a function without arguments, or a command: list of strings
    inputs: str = ""        # its flags, and a name for what it reads besides what other stages leave


def commit():
    """The commit of this code, with "+changes" where files differ from it; None outside git."""
    command = ["git", "-C", ROOT, "describe", "--always", "--exclude=*", "--abbrev=10", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def jobs_that_fit():
    """Stages side by side: as many as there are cores and memory for."""
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return max(1, min(os.cpu_count() or 1, int(gigabytes / GB_A_STAGE)))


# ----------------------------------------------------------------------------------------------- what is done

def mark_of(stage, folder):
    """What `do_stage` wrote of a stage, or None.  A mark counts for the same inputs only, and while every
    file stands, as long as it was, that the stage left."""
    try:
        mark = json.loads((Path(folder) / f"{stage.name}.done").read_text())
        stands = all((Path(folder) / path).stat().st_size == size for path, size in mark["left"].items())
        return mark if stands and mark["inputs"] == stage.inputs else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):      # not there, cut, or of other code
        return None


def marks(stages, folder):
    """{name: mark} of the stages that are done.  A stage counts only if those that it needs count too."""
    done = {}
    for stage in stages:        # what a stage needs stands before it
        mark = mark_of(stage, folder)
        if mark and all(name in done for name in stage.needs):
            done[stage.name] = mark
    return done


def origin(stages, folder):
    """{"commit": those of the code that made the stages, "cost": {"stages": their number, "seconds" that
    passed while they ran, one after another or side by side, "processor_seconds"}}."""
    done = marks(stages, folder).values()
    cost = {key: round(sum(mark[key] for mark in done), 1) for key in ("seconds", "processor_seconds")}
    return {"commit": ", ".join(sorted({str(mark["commit"]) for mark in done})),
            "cost": {"stages": len(done), **cost}}


# ------------------------------------------------------------------------------------------------- the runner

def run_stages(stages, folder, jobs=1, anew=False):
    """Does what is not done yet, `jobs` stages at a time, each in a worker process.  anew: starts over, in an
    empty folder.  Raises UserError if one fails; what runs beside it is finished first."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with lock(Path(folder) / "running.lock"):
        if anew:        # under the lock, so that no other run loses its files
            for path in Path(folder).iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "running.lock":
                    path.unlink()
        done, here = marks(stages, folder), commit()
        others = {str(mark["commit"]) for mark in done.values()} - {str(here)}
        if others:
            print(f"{folder}: {len(done)} of {len(stages)} stages stand, some of commit "
                  f"{', '.join(sorted(others))}; this is {here}.  --anew starts over", flush=True)
        for stage in stages:        # else a mark would count again once what its stage needs is done anew
            if stage.name not in done:
                Path(folder, f"{stage.name}.done").unlink(missing_ok=True)
        _run(stages, done, folder, jobs, here)


def _run(stages, done, folder, jobs, here):
    running, usual = {}, {stage.name: stage.seconds for stage in stages}        # {future: stage}
    # the bar counts the usual seconds of finished stages, and its time left is of the pace since the start; a
    # log file gets a line now and then, a terminal sees it move
    bar = tqdm(total=sum(usual.values()), smoothing=0, miniters=0, initial=sum(usual[name] for name in done),
               mininterval=0.5 if sys.stderr.isatty() else 60,
               bar_format="{percentage:3.0f}% |{bar:20}| {elapsed} passed, about {remaining} left{postfix}")
    with bar, ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker) as pool:
        while len(done) < len(stages):
            busy = {stage.name for stage in running.values()}
            ready = [stage for stage in stages if stage.name not in done and stage.name not in busy
                     and all(name in done for name in stage.needs)]
            for stage in ready[:jobs - len(running)]:
                running[pool.submit(do_stage, stage, folder, here)] = stage
            bar.set_postfix_str(", ".join(stage.name for stage in running.values()), refresh=False)
            bar.update(0)
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                stage = running.pop(future)
                try:
                    done[stage.name] = future.result()
                except Exception as error:
                    log = Path(folder) / f"{stage.name}.log"
                    raise UserError(f"{stage.name}: {first_line(error)} (all of it: {log})") from error
                bar.update(stage.seconds)


# ---------------------------------------------------------------------------------------- in a worker process

_command = None         # the running command of this worker


def do_stage(stage, folder, here):
    """One stage; returns its mark.  here: the commit.  Raises UserError where it did not leave its files."""
    path = Path(folder) / stage.name
    path.parent.mkdir(parents=True, exist_ok=True)
    start, processor = time.monotonic(), sum(os.times()[:4])        # of commands that it ran, too
    with open(f"{path}.log", "a") as log:
        (_call if callable(stage.work) else _run_command)(stage.work, log)
    left = {pattern: sorted(Path(folder).glob(pattern)) for pattern in stage.leaves}
    missing = [pattern for pattern, files in left.items() if not files]
    if missing:
        raise UserError(f"it ended without {', '.join(missing)}")
    mark = {"seconds": round(time.monotonic() - start, 2),
            "processor_seconds": round(sum(os.times()[:4]) - processor, 2), "inputs": stage.inputs,
            "commit": here, "left": {str(file.relative_to(folder)): file.stat().st_size
                                     for files in left.values() for file in files}}
    write_json(f"{path}.done", mark)
    return mark


def _call(function, log):
    # Ctrl-C reaches all processes of a terminal: a training stage saves its state, anything else stops
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with contextlib.redirect_stdout(log):
            function()
    except Exception:
        traceback.print_exc(file=log)
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def _run_command(command, log):
    """Raises UserError with the command's last line if it fails."""
    global _command
    start = log.tell()      # after what an earlier run wrote
    here = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    _command = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | here)
    status = _command.wait()
    said = Path(log.name).read_bytes()[start:].decode(errors="replace")
    if status:
        last = (said.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"ended with status {status}: {last}")


def _start_worker():
    """Ctrl-C is for the stage that runs, not for a worker that waits.  And a worker whose parent was killed
    must stop, or it would race the run that resumes."""
    signal.signal(signal.SIGINT, lambda *_: None)       # a handler, because commands would inherit SIG_IGN
    threading.Thread(target=_watch_parent, daemon=True).start()


def _watch_parent():
    parent_process().join()
    if _command:
        _command.terminate()        # which makes a training script save its state
    os._exit(1)
