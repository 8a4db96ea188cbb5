"""What the tests use in common: toy checkpoints, a script's command line run in this process, and the slow mark."""
import contextlib
import hashlib
import importlib
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import flags  # noqa: E402
from tasks import synthetic  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs with `python -m pytest -m slow` only")


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [item for item in items if item not in slow]
    config.hook.pytest_deselected(items=slow)


@pytest.fixture(autouse=True)
def seeded():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def refs():
    """Outputs of TRL 1.12, NLTK 3.10.4, rouge-score 0.1.2 and the Vendi score on small inputs; each entry names its
    definition."""
    return json.loads((Path(__file__).parent / "refs.json").read_text())


# ------------------------------------------------------------------------------------- scripts in this process

def call(name, *args, cwd):
    """Runs a script's command line, without the two seconds that a new process takes to start.  Returns returncode,
    stdout, stderr."""
    module, argv = importlib.import_module(name), sys.argv
    out, err = io.StringIO(), io.StringIO()
    sys.argv, status = [f"{name}.py", *map(str, args)], 0
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            flags.launch(module.main, module.Config, module.__doc__, getattr(module, "PRESETS", None))
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        sys.argv = argv
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


def contents(folder):
    return {p: hashlib.md5(p.read_bytes()).hexdigest() for p in Path(folder).rglob("*") if p.is_file()}


def refused(folder, name, *args, says):
    """Exit status 2, one line on stderr that says what is asked for, and no file changed."""
    before = contents(folder)
    got = call(name, *args, cwd=folder)
    assert got.returncode == 2, (args, got.stdout, got.stderr)
    assert len(got.stderr.strip().splitlines()) == 1 and "Traceback" not in got.stderr, got.stderr
    for part in [says] if isinstance(says, str) else says:
        assert part in got.stderr, got.stderr
    assert contents(folder) == before


@contextlib.contextmanager
def held_by_another_process(path):
    """Another process holds the lock file `path`."""
    hold = ("import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); "
            "print('held', flush=True); input()")
    other = subprocess.Popen([sys.executable, "-c", hold, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    yield
    other.communicate(b"\n")


def well_told(split, n):
    """The first n posts of a split whose reference is better than no summary at all, which has a gold reward
    of 0."""
    posts = synthetic.rows(split, 4 * n)
    return [row for row in posts if synthetic.gold_reward(row["prompt"], row["reference"]) > 0][:n]


def json_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ toy checkpoints

@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder with what the four stages write for the synthetic task at toy size."""
    import bon
    import ppo
    import reward
    import sft
    folder = tmp_path_factory.mktemp("work")
    same = dict(quiet=True, threads=1, out=str(folder))
    sft_model, reward_model = str(folder / "ckpt_sft.pt"), str(folder / "ckpt_reward.pt")
    sft.main(sft.Config(rows=400, **same))
    reward.main(reward.Config(model=sft_model, prompts=60, held_out=30, **same))
    ppo.main(ppo.Config(model=sft_model, reward=reward_model, steps=3, batch_size=16, **same))
    bon.main(bon.Config(model=sft_model, reward=reward_model, inputs=6, n=4, **same))
    bon.main(bon.Config(model=str(folder / "ckpt_ppo.pt"), inputs=6, n=4, **same))
    return folder
