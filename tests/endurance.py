"""What is too long for the suite: kills, hostile checkpoints, fuzzed files, a full disk.

    python tests/endurance.py                    # all four
    python tests/endurance.py fuzz hostile       # some
    python tests/endurance.py --seed 1           # other moments, damages and texts

Prints one line a part with what was tried and what was lost; exit status 1 if anything was.
"""
import argparse
import contextlib
import gzip
import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model as M  # noqa: E402
import splits  # noqa: E402
from common import pretrained, samples  # noqa: E402
from common.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from common.errors import UserError  # noqa: E402
from common.tokenizer import build_tokenizer, load_tokenizer, published_spec  # noqa: E402

STAGES = (
    "sft.py --rows 1600 --log-every 5",
    "reward.py --prompts 200 --held-out 40 --log-every 2",
    "ppo.py --steps 12 --batch-size 32",
    "bon.py --reward ckpt_reward.pt --inputs 20 --n 4 --splits test,ood_article",
    "bon.py --model ckpt_ppo.pt --inputs 20 --n 4 --splits test,ood_article",
)


def start(command, cwd):
    script, *flags = command.split()
    flags += ["--threads", "1", "--save-every", "0", "--quiet"]
    return subprocess.Popen([sys.executable, str(ROOT / script), *flags], cwd=cwd, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def results(folder):
    """Names of all weights, texts of all sample files, metrics without times."""
    times = ("seconds", "tokens_per_second", "peak_mb")
    found = {p.name: torch.load(p, weights_only=True)["weights_hash"] for p in folder.glob("ckpt_*.pt")}
    found |= {p.name: p.read_text() for p in folder.glob("samples_*.jsonl")}
    for path in folder.glob("metrics_*.jsonl"):
        rows = map(json.loads, path.read_text().splitlines())
        found[path.name] = [{k: v for k, v in row.items() if k not in times} for row in rows]
    return found


def run_with_kills(command, cwd, moments):
    """Runs a stage to its end, killing it after each of `moments` seconds it reaches first.  Returns (kills,
    what it said if it failed)."""
    for kills, moment in enumerate([*moments, None]):
        running = start(command, cwd)
        try:
            said = running.communicate(timeout=moment)[1]
            return kills, said if running.returncode else ""
        except subprocess.TimeoutExpired:
            running.kill()
            running.communicate()


def kills(rng, folder, wanted=50):
    """The chain of stages over and over, killed at random moments of every stage, until `wanted` kills have
    happened; each chain must end with what an unbroken one wrote, to the last bit."""
    whole, took = folder / "whole", []
    whole.mkdir()
    for command in STAGES:
        began = time.time()
        assert not run_with_kills(command, whole, [])[1]
        took.append(time.time() - began)
    expected, count, chains, lost, told = results(whole), 0, 0, 0, []
    while count < wanted:
        here = folder / f"chain{chains}"
        here.mkdir()
        for command, seconds in zip(STAGES, took):
            few = min(wanted // len(STAGES), wanted - count)
            n, failed = run_with_kills(command, here, [rng.uniform(0.3, 1) * seconds for _ in range(few)])
            count, lost = count + n, lost + bool(failed)
            told += [failed[-300:]] if failed else []
        lost += results(here) != expected
        chains += 1
    return lost, (f"{count} kills over {chains} chains of {len(STAGES)} stages, stages lost or results "
                  f"differing: {lost} {' '.join(told)}")


class Hostile:
    """Unpickled, it would make a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def hostile(rng, folder):
    """Damaged and hostile checkpoints, each of which load_checkpoint must refuse in one line."""
    good, mark = folder / "ckpt_good.pt", folder / "mark"
    lm, spec = M.GPT(M.GPTConfig(vocab_size=300, n_layer=1)), build_tokenizer(["a b c"])
    save_checkpoint(good, lm, spec, None, {}, {})
    raw, saved = good.read_bytes(), torch.load(good, weights_only=True)
    state, config = saved["state"], saved["config"]

    def torch_file(payload):
        buffer = io.BytesIO()
        torch.save(payload, buffer)
        return buffer.getvalue()

    def turned(entry):
        """The file with one bit of one tensor turned."""
        at = entry.header_offset + 230 + len(entry.filename) + rng.randrange(max(1, entry.file_size - 400))
        return raw[:at] + bytes([raw[at] ^ 64]) + raw[at + 1:]
    tensors = [i for i in zipfile.ZipFile(good).infolist() if "/data/" in i.filename]
    without = [{k: v for k, v in saved.items() if k != key} for key in ("tokenizer", "weights_hash", "config")]
    cases = [raw[:rng.randrange(len(raw))] for _ in range(8)]
    cases += map(turned, rng.sample(tensors, 8))
    cases += [b"", b"PK", rng.randbytes(5000), b"\x00" * len(raw), pickle.dumps(Hostile(mark))]
    cases += map(torch_file, (
        Hostile(mark), saved | {"args": Hostile(mark)}, [1], saved | {"kind": "reward"}, *without,
        saved | {"config": config | {"n_layer": 2}}, saved | {"config": {"d_model": -1}},
        saved | {"state": dict(list(state.items())[:3])},
        saved | {"state": state | {"embed.weight": torch.zeros(2, 2)}}))
    refused, told, path = 0, [], folder / "ckpt_bad.pt"
    for number, case in enumerate(cases):
        path.write_bytes(case)
        try:
            load_checkpoint(path, "lm")
            told.append(f"case {number} was accepted")
        except UserError as error:
            refused += "\n" not in str(error) and str(path) in str(error)
        except Exception as error:
            told.append(f"case {number}: {type(error).__name__}")
    return len(cases) - refused + mark.exists(), (
        f"{len(cases)} damaged or hostile checkpoints, {refused} refused in one line, code run: "
        f"{mark.exists()} {' '.join(told)}")


ODD = ["\x00", "\ud800", "\u2028", "é", "日本", "👩‍👩‍👧", "\U0010ffff", "\\", '"', "\n", "\r", "\t", " ", "",
       "a" * 3000, "<|endoftext|>", "NaN", "null", "-0", "1e999", "[" * 50, "\u202e"]
NO_JSON = [b"", b"{", b"[]", b"\xff\xfe", b"null", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]


def odd_value(rng, depth=0):
    kind = rng.randrange(9)
    if kind < 4:
        return "".join(rng.choice(ODD) for _ in range(rng.randrange(6)))
    if kind == 4:
        return rng.choice([0, -1, 2 ** 80, 1.5, float("nan"), float("inf"), True, None])
    if kind == 5 and depth < 3:
        return [odd_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6 and depth < 3:
        return {str(odd_value(rng, 3)): odd_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return "plain words"


def torn(rng, content, within=None):
    """content with some bytes replaced at a random place."""
    at = rng.randrange(min(within or len(content), len(content)))
    return content[:at] + rng.randbytes(rng.randrange(4)) + content[at + rng.randrange(4):]


def odd_line(rng, good):
    """One line of a file: right, wrong in one field, or not JSON at all."""
    row, kind = dict(good), rng.randrange(8)
    if kind < 3:
        row[rng.choice(list(row))] = odd_value(rng)
    elif kind == 3:
        row.pop(rng.choice(list(row)))
    line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    return torn(rng, line) if kind == 4 else rng.choice([*NO_JSON, line[:-3]]) if kind == 5 else line


def fuzz(rng, folder, wanted=10_000):
    """Odd files through every loader: each is read, and then can be encoded and written, or refused in one
    line."""
    refs = json.loads((ROOT / "tests/refs_published.json").read_text())
    words = json.dumps(refs["tokenizers"]["missing bytes"]["json"])
    tokenizers = [load_tokenizer({"kind": "bpe", "eos": 0, "bos": None, "json": words}),
                load_tokenizer(build_tokenizer(["some words"]))]
    task = splits.Task("folder", str(folder), 8)

    def use(rows):
        for text in (t for row in rows for t in row.values() if isinstance(t, str)):
            for tokenizer in tokenizers:
                splits.decode(tokenizer, splits.encode_response(tokenizer, text, 64))
        (json.dumps(rows, ensure_ascii=False) + "\n").encode()
    # a model directory to damage
    pretrained.export(M.GPT(M.GPTConfig(**M.SHAPES["gpt2"] | dict(n_layer=1, n_head=2, d_model=8, context=8,
                                                                  vocab_size=10))), {"kind": "words"}, folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text())
                                                   | {"eos_token_id": 0}))
    prompts = {"prompt": "p", "reference": "r", "id": "i"}
    sample = prompts | {"outputs": ["a", "b"], "policy": "sft", "split": "test", "finished": [True, True]}
    loaders = {     # file: a right line of it, or its whole right content, and what reads it
        "train.jsonl": (prompts, lambda path: use(task.rows("train"))),
        "preferences.jsonl": ({"prompt": "p", "chosen": "c", "rejected": "d"},
                              lambda path: use(task.preferences())),
        "samples.jsonl": (sample, lambda path: use(samples.read_samples(path))),
        "outputs.json": ({"instruction": "i", "output": "o", "generator": "g"},
                         lambda path: use(samples.read_samples(path))),
        "tokenizer.json": (words.encode(), lambda path: load_tokenizer(published_spec(folder))),
        "model.safetensors": (weights, lambda path: pretrained.from_pretrained(str(folder))),
    }
    read, lost, told = 0, 0, {}
    for _ in range(wanted):
        name = rng.choice(list(loaders))
        (good, load), path = loaders[name], folder / name
        if isinstance(good, bytes):
            content = torn(rng, torn(rng, good, 400), rng.choice([400, None]))
        else:
            lines = [odd_line(rng, good) for _ in range(rng.randrange(1, 4))]
            content = b"[%b]" % b",".join(lines) if name.endswith(".json") else b"\n".join(lines)
        if name.endswith(".jsonl") and rng.random() < .2:
            path, content = folder / (name + ".gz"), gzip.compress(content)
            content = rng.choice([content, content[:rng.randrange(len(content))], gzip.compress(content)])
        path.write_bytes(content)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                load(path)
            read += 1
        except UserError as error:
            if "\n" in str(error).strip():
                lost += 1
                told[name] = f"{name}: more than one line"
        except Exception as error:
            lost += 1
            told[name] = f"{name}: {type(error).__name__}: {str(error)[:100]}"
        path.unlink()
    return lost, (f"{wanted} fuzzed files, {read} read, {wanted - read - lost} refused in one line, "
                  f"tracebacks: {lost} {' | '.join(told.values())}")


def full_disk(rng, folder, wanted=10):
    """A file system that fills up at ten points of a run: one line that names a path, the checkpoint before
    intact."""
    mount, lost, told, finished = folder / "small", 0, [], 0
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", mount]
    if subprocess.run(command, capture_output=True).returncode:
        return 0, "no file system can be mounted here: not tried"
    try:
        assert not run_with_kills("sft.py --rows 200", mount, [])[1]
        ckpt = mount / "ckpt_sft.pt"
        before = ckpt.read_bytes()
        for trial in range(wanted):     # from no room at all to about what the run needs
            (mount / "filler").unlink(missing_ok=True)
            free = shutil.disk_usage(mount).free
            (mount / "filler").write_bytes(bytes(max(0, free - trial * 400_000)))
            running = start("sft.py --rows 400 --log-every 1", mount)
            said = running.communicate()[1].strip()
            if running.returncode == 0:     # there was room after all: the new one is whole
                before, finished = ckpt.read_bytes(), finished + 1
            elif running.returncode != 2 or len(said.splitlines()) != 1 or "_sft." not in said:
                lost += 1
                told.append(said[-300:])
            lost += ckpt.read_bytes() != before
            load_checkpoint(ckpt, "lm")
        return lost, (f"disk filled at {wanted} points ({finished} runs had room enough), checkpoints or "
                      f"clear words lost: {lost} {' '.join(told)}")
    finally:
        subprocess.run(["umount", mount])


PARTS = {"hostile": hostile, "fuzz": fuzz, "disk": full_disk, "kills": kills}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    args, bad = parser.parse_args(), 0
    for part in args.parts:
        began = time.time()
        with tempfile.TemporaryDirectory() as folder:
            lost, words = PARTS[part](random.Random(args.seed), Path(folder))
        print(f"{part}: {words} ({time.time() - began:.0f} s)", flush=True)
        bad += lost
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
