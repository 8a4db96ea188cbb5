"""The same scripts on real posts and instructions, from folders built outside the repository; skipped where
the texts are absent."""
import gzip
import json
import os
from pathlib import Path

import pytest

import bon
import diversity
import generalisation
import ppo
import reward
import sft
from conftest import ROOT

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
        return f"SUBREDDIT: r/{r['subreddit']}\nTITLE: {r['title']}\nPOST: {r['post']}\nTL;DR:"
    for split, name in (("train", "train"), ("valid", "validation"), ("test", "test")):
        write(folder, name,
              [{"id": r["id"], "prompt": prompt(r), "reference": r["summary"]} for r in posts
               if r["split"] == split])
    write(folder, "ood_news",
          [{"prompt": f"ARTICLE: {r['document']}\nTL;DR:", "reference": r["summary"]}
           for r in lines("summ/cnn_dailymail_subset.jsonl.gz")])
    judged = [r for r in posts if r["gpt4_preferred"]]

    def pick(r, won):
        return r["model_summary"] if (r["gpt4_preferred"] == "ours") == won else r["summary"]
    write(folder, "preferences",
          [{"prompt": prompt(r), "chosen": pick(r, True), "rejected": pick(r, False)} for r in judged])
    return "ood_news"


def instructions(folder):
    head = ("Below is an instruction that describes a task{}. Write a response that appropriately completes "
            "the request.\n\n### Instruction:\n{}\n\n")

    def prompt(r):
        given = f"### Input:\n{r['input']}\n\n" if r.get("input") else ""
        return head.format(", paired with an input that provides further context" if given else "",
                           r["instruction"]) + given + "### Response:"
    rows = [{"prompt": prompt(r), "reference": r["output"]}
            for r in lines("instruct/llamafactory_alpaca_en_999.jsonl.gz")]
    write(folder, "train", rows[:800])
    write(folder, "validation", rows[800:900])
    write(folder, "test", rows[900:])
    write(folder, "ood_user",
          [{"prompt": prompt(r), "reference": r["output"]}
           for r in lines("instruct/user_oriented_252.jsonl.gz")])
    write(folder, "ood_sequential",
          [{"prompt": prompt(r), "reference": r["output"]}
           for r in lines("instruct/sequential_seed_42.jsonl")])
    pairs = lines("prefs/alpacafarm_gpt4_claude_pairs.jsonl.gz")[:600]
    write(folder, "preferences",
          [{"prompt": prompt(r), "chosen": r["chosen"], "rejected": r["rejected"]} for r in pairs])
    return "ood_user"


@pytest.mark.parametrize("build", [tldr, instructions])
def test_the_whole_chain_on_real_text(build, tmp_path, capfd):
    far = build(tmp_path)
    same = dict(quiet=True, threads=2, out=str(tmp_path))
    sft.main(sft.Config(data=str(tmp_path), rows=64, context=256, n_words=1000, **same))
    reward.main(reward.Config(model=str(tmp_path / "ckpt_sft.pt"), prompts=64, held_out=32, **same))
    ppo.main(ppo.Config(model=str(tmp_path / "ckpt_sft.pt"), reward=str(tmp_path / "ckpt_reward.pt"), steps=1,
                        batch=8, **same))
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
