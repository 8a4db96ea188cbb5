"""The same scripts on real posts and instructions, from folders built outside the repository; skipped where
the texts are absent."""
import gzip
import json
import os
import shutil
from pathlib import Path

import pytest
import tiktoken

import bon
import diversity
import generalisation
import ppo
import reward
import sft
from common.prompts import instruction_prompt
from common.tokenizer import load_tokenizer
from conftest import ROOT
from published.tokenizer import published_spec
from tasks.paper import TLDR, tldr_prompt
from test_tokenizer import ODD

REAL = Path(os.environ.get("REAL_DATA", ROOT.parent / "shared" / "real"))
pytestmark = pytest.mark.skipif(not REAL.is_dir(),
                                reason=f"no real texts at {REAL}; REAL_DATA=DIR names another folder")


def lines(name):
    path = REAL / name
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def write(folder, name, rows):
    with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def tldr(folder):
    posts = lines("summ/tldr_openai_format.jsonl.gz")

    def prompt(r):
        return tldr_prompt(r, TLDR["train"])

    def pick(r, won):
        return r["model_summary"] if (r["gpt4_preferred"] == "ours") == won else r["summary"]
    for split, name in (("train", "train"), ("valid", "validation"), ("test", "test")):
        write(folder, name, [{"id": r["id"], "prompt": prompt(r), "reference": r["summary"]} for r in posts
                             if r["split"] == split])
    write(folder, "ood_news", [{"prompt": f"ARTICLE: {r['document']}\nTL;DR:", "reference": r["summary"]}
                               for r in lines("summ/cnn_dailymail_subset.jsonl.gz")])
    write(folder, "preferences", [{"prompt": prompt(r), "chosen": pick(r, True), "rejected": pick(r, False)}
                                  for r in posts if r["gpt4_preferred"]])
    return "ood_news"


def instructions(folder):
    def prompt(r):
        return instruction_prompt(r["instruction"], r.get("input") or "")
    rows = lines("instruct/llamafactory_alpaca_en_999.jsonl.gz")
    for name, part in (("train", rows[:800]), ("validation", rows[800:900]), ("test", rows[900:]),
                       ("ood_user", lines("instruct/user_oriented_252.jsonl.gz")),
                       ("ood_sequential", lines("instruct/sequential_seed_42.jsonl"))):
        write(folder, name, [{"prompt": prompt(r), "reference": r["output"]} for r in part])
    pairs = lines("prefs/alpacafarm_gpt4_claude_pairs.jsonl.gz")[:600]
    write(folder, "preferences", [{"prompt": prompt(r), "chosen": r["chosen"], "rejected": r["rejected"]}
                                  for r in pairs])
    return "ood_user"


@pytest.mark.slow
@pytest.mark.parametrize("build", [tldr, instructions])
def test_the_whole_chain_on_real_text(build, tmp_path, capfd):
    far = build(tmp_path)
    same = dict(quiet=True, threads=1, out=str(tmp_path))
    sft.main(sft.Config(data=str(tmp_path), rows=32, context=256, n_words=1000, **same))
    reward.main(reward.Config(model=str(tmp_path / "ckpt_sft.pt"), prompts=16, held_out=16, **same))
    ppo.main(ppo.Config(model=str(tmp_path / "ckpt_sft.pt"), reward=str(tmp_path / "ckpt_reward.pt"), steps=1,
                        batch_size=8, **same))
    for name, scored in (("sft", str(tmp_path / "ckpt_reward.pt")), ("ppo", "")):
        bon.main(bon.Config(model=str(tmp_path / f"ckpt_{name}.pt"), reward=scored, inputs=4, n=2, **same))
    files = [str(p) for p in sorted(tmp_path.glob("samples_*.jsonl"))]
    generalisation.main(generalisation.Config(files=files, out=str(tmp_path)))
    diversity.main(diversity.Config(files=files, encoder=str(tmp_path / "ckpt_sft.pt"), out=str(tmp_path)))
    said = capfd.readouterr().out
    assert "cut on the left" in said        # these prompts are longer than a context of 256
    judged = json.loads((tmp_path / "generalisation.json").read_text())["rouge"]
    assert {r["split"] for r in judged} >= {"test", far}
    measured = json.loads((tmp_path / "diversity.json").read_text())["results"]
    assert {r["policy"] for r in measured} == {"sft", "bon", "ppo"}


def test_gpt2_s_published_files_give_tiktoken_s_ids(tmp_path, monkeypatch):
    """The vocabulary and merges that OpenAI published, read as a Hugging Face directory."""
    cache = tmp_path / "cache"
    # a mismatch would be deleted
    shutil.copytree(REAL / "tiktoken_cache", cache, copy_function=shutil.copyfile)
    cache.chmod(0o755)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
    for path in cache.iterdir():
        shutil.copyfile(path, tmp_path / ("vocab.json" if path.read_bytes()[:1] == b"{" else "merges.txt"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 50256}')
    ours, theirs = load_tokenizer(published_spec(tmp_path)), tiktoken.get_encoding("gpt2")
    texts = [r["post"] for r in lines("summ/tldr_openai_format.jsonl.gz")[:600]]
    texts += [r["document"] for r in lines("summ/cnn_dailymail_subset.jsonl.gz")[:400]] + ODD
    assert ours.eot_token == theirs.eot_token and ours.n_vocab == theirs.n_vocab
    for text in texts:
        ids = ours.encode_ordinary(text)
        assert ids == theirs.encode_ordinary(text) and ours.decode(ids) == text
