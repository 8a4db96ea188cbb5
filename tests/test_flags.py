"""Flags: every field of every script has a domain, which is checked wherever a Config is built."""
import dataclasses
import importlib
import math
import subprocess
import sys
from typing import Annotated, Literal, get_args, get_origin

import pytest

from common import flags
from common.errors import UserError
from conftest import ROOT, refused

SCRIPTS = ("sft", "reward", "ppo", "bon", "splits", "generalisation", "diversity", "reproduce", "study.report",
           "methods.dpo", "methods.grpo", "tools.bench", "tools.chat_judge", "tools.convert", "tools.show")
BAD = {int: (-10 ** 30, -2), float: (math.nan, math.inf, -math.inf, -2.),
       flags.number_or_none: (math.nan, math.inf, -math.inf)}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_number_has_a_domain_that_refuses_what_it_cannot_mean(name):
    config = importlib.import_module(name).Config
    for field in dataclasses.fields(config):
        kind = get_origin(field.type)
        assert field.type not in (int, float), f"{name}: --{field.name} accepts every number"
        flag = flags.flag_of(field.name)
        if kind is Literal:
            with pytest.raises(UserError, match=f"{flag} nonsense: choose from {get_args(field.type)[0]}"):
                config(**{field.name: "nonsense"})
        elif kind is Annotated:
            for value in BAD[get_args(field.type)[0]]:
                if not get_args(field.type)[1].holds(value):
                    with pytest.raises(UserError, match=f"{flag} {value}: it must be "):
                        config(**{field.name: value})
            # at least the numbers that are none
            assert not get_args(field.type)[1].holds(BAD[get_args(field.type)[0]][0]), field.name


def test_domains_by_hand():
    accepts = {flags.Count: (1, 10 ** 9), flags.Natural: (0, 1), flags.Seed: (0, 2 ** 63 - 1),
               flags.Positive: (1e-9, 1e9), flags.NonNegative: (0., 1e9), flags.Fraction: (0., 1.),
               flags.Mass: (1e-9, 1.),
               flags.Temperature: (.01, 100.), flags.Frozen: (-1., 0., 1.), flags.OrNone: (-3., 0., None)}
    refuses = {flags.Count: (0, -1), flags.Natural: (-1,), flags.Seed: (-1, 2 ** 63), flags.Positive: (0., math.nan),
               flags.NonNegative: (-1e-9, math.inf), flags.Fraction: (-.1, 1.1, math.nan), flags.Mass: (0., 1.1),
               flags.Temperature: (0., .009, 101., math.nan),
               flags.Frozen: (-.5, 1.1, math.nan), flags.OrNone: (math.nan, math.inf)}
    for kind, values in accepts.items():
        assert all(get_args(kind)[1].holds(v) for v in values)
    for kind, values in refuses.items():
        assert not any(get_args(kind)[1].holds(v) for v in values)


WRONG = [  # script, flag, value
    ("sft", "--log-every", "0"), ("reproduce", "--seed", "-1"), ("sft", "--seed", "99999999999999999999"),
    ("bon", "--max-new-tokens", "-3"), ("ppo", "--gamma", "nan"),
    ("ppo", "--kl-coef", "inf"), ("ppo", "--lam", "5"), ("sft", "--lr", "1e400"), ("bon", "--temperature", "1e-40"),
    ("methods.grpo", "--temperature", "0")]


def test_ranks_that_no_torchrun_started_get_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(tmp_path, "sft", says="WORLD_SIZE is set, but not by torchrun")


def test_wrong_values_get_one_line_that_names_flag_and_domain(tmp_path):
    for name, flag, value in WRONG:
        refused(tmp_path, name, flag, value, says=[f"error: {flag} ", ": it must be "])
    refused(tmp_path, "ppo", "--max-new-tokens", "-1", says="unrecognized arguments: --max-new-tokens")
    for mistyped in ("--kl-coeff", "--kl_coef"):
        refused(tmp_path, "ppo", mistyped, "1", says="did you mean --kl-coef?")
    refused(tmp_path, "sft", "--out", "x.pth", says="--out x.pth: the name of a checkpoint ends in .pt")


@dataclasses.dataclass
class Toy(flags.Common):
    steps: flags.Count = flags.arg(3, "how many")
    kind: Literal["a", "b"] = flags.arg("a", "which one, of two")
    wide: bool = flags.arg(False, "or narrow")


def test_parsing_presets_and_help(capsys):
    assert flags.parse(Toy, "doc", ["--steps", "5", "--wide"]) == Toy(steps=5, wide=True)
    presets = {"large": dict(steps=9, kind="b")}
    assert flags.parse(Toy, "doc", ["--preset", "large"], presets) == Toy(steps=9, kind="b")
    assert flags.parse(Toy, "doc", ["--preset", "large", "--steps", "2"], presets) == Toy(steps=2, kind="b")
    with pytest.raises(SystemExit):
        flags.parse(Toy, "doc", ["--help"])
    text = capsys.readouterr().out
    assert text.index("--steps") < text.index("--seed") and "which one, of two" in " ".join(text.split())


def test_a_start_is_deterministic_and_imports_no_compiler():
    """torch's compiler takes two seconds to import, and no script uses it."""
    code = ("import sys, torch; from common.flags import Common, setup; setup(Common(device='cpu')); "
            "print(torch.are_deterministic_algorithms_enabled(), 'torch._inductor' in sys.modules)")
    got = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert got.stdout.split() == ["True", "False"], got.stderr


def test_a_reader_that_has_had_enough_is_no_error(lines=10_000):
    """`python diversity.py ... | head` ends without a word."""
    code = ("from common.flags import Common, launch\n"
            f"launch(lambda cfg: [print('x' * 80) for _ in range({lines})], Common, 'doc')")
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as run:
        run.stdout.close()
        assert (run.stderr.read(), run.wait()) == (b"", 141)


@pytest.mark.parametrize("device", ["cuda:1", "cuda", "mps", "meta", "xla", "cuda:-1"])
def test_devices_that_are_not_here(device):
    if device == "cuda" and __import__("torch").cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(UserError, match=f"--device {device}: "):
        flags.setup(Toy(device=device))
