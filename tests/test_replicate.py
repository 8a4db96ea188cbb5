"""The study on a published model, at toy size: a LLaMA directory with a byte-level BPE tokenizer, real files
throughout."""
import json

import pytest
import torch

import ppo
import replicate
import reward
import runtime
import sft
from test_pretrained import LLAMA, REFS, value
import pretrained


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A directory as a hub would hold it, with weights for the 340 tokens of its tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    refs = json.loads(REFS.read_text())
    shapes = refs["models"]["llama, grouped queries, untied"]["shapes"]
    vocab = 340
    state = {n: value(n,
                      [vocab if d == 40 and n in ("model.embed_tokens.weight", "lm_head.weight") else d
                       for d in s])
             for n, s in shapes.items()}
    pretrained.write_safetensors(folder / "model.safetensors", state)
    (folder / "config.json").write_text(json.dumps(LLAMA | dict(vocab_size=vocab, eos_token_id=0)))
    (folder / "tokenizer.json").write_text(json.dumps(refs["tokenizers"]["bytes"]["json"]))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"Say {i}:", "reference": f"it's {i}"} for i in range(24)]
    pairs = [{"prompt": r["prompt"], "chosen": r["reference"], "rejected": "no no no"} for r in rows]
    for name, lines in (("train", rows), ("validation", rows[:4]), ("test", rows[4:8]),
                        ("ood_far", rows[8:12]),
                        ("preferences", pairs)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return path


def test_the_stages_from_a_published_model_in_bf16(published, folder, tmp_path):
    same = dict(quiet=True, threads=2, out=str(tmp_path), dtype="bf16")
    sft.main(sft.Config(model=str(published), data=str(folder), freeze=0.5, batch=8, max_new_tokens=8,
                        max_prompt_tokens=16, **same))
    reward.main(reward.Config(model=str(tmp_path / "ckpt_sft.pt"), prompts=20, held_out=4, **same))
    ppo.main(ppo.Config(model=str(tmp_path / "ckpt_sft.pt"), reward=str(tmp_path / "ckpt_reward.pt"), steps=2,
                        batch=8,
                        **same))
    model, saved = runtime.load_checkpoint(tmp_path / "ckpt_ppo.pt", "lm")
    assert saved["task"]["max_prompt_tokens"] == 16 and saved["tokenizer"]["kind"] == "bpe"
    start = pretrained.from_pretrained(str(published))
    assert model.config.frozen == 1 and not torch.equal(model.blocks[1].mlp.up.weight,
                                                        start.blocks[1].mlp.up.weight)
    # frozen layers are the published ones, rounded to bf16 and nothing else
    assert torch.equal(model.blocks[0].mlp.up.weight, start.blocks[0].mlp.up.weight.bfloat16().float())
    log = [json.loads(line) for line in (tmp_path / "metrics_ppo.jsonl").read_text().splitlines()]
    assert log[0]["ratio_first"] == pytest.approx(1, abs=1e-3) and log[0]["kl"] == 0


def test_the_whole_replication_and_its_tables(published, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(replicate.SIZES, "toy", dict(
        sft=["--batch", "8", "--max-new-tokens", "8"], reward=["--batch", "8"],
        ppo=["--steps", "1", "--batch", "8"],
        bon=["--inputs", "3", "--n", "2", "--pool", "4"]))
    cfg = replicate.Config(model=str(published), data=str(folder), judge_data=str(folder), size="toy",
                           seeds=1, threads=2,
                           out=str(tmp_path))
    replicate.main(cfg)
    results = json.loads((tmp_path / "replication.json").read_text())
    assert {k.split(" | ")[0] for k in results["values"]} == {"sft", "bon", "ppo"}
    assert {k.split(" | ")[1] for k in results["values"]} == {"test", "ood_far"}
    assert set(results["models"]) == {"seed-0/ckpt_reward.pt", "seed-0/ckpt_ppo.pt", "ckpt_judge.pt"}
    text = (tmp_path / "replication.md").read_text()
    assert text in capfd.readouterr().out and "| win rate | test |" in text and "longer wins" in text
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")}
    replicate.main(cfg)         # finished stages are not run again
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")} == before


def test_differences_in_words():
    clear = dict(mean=.2, low=.1, high=.3, seeds=[.1, .3])
    assert replicate.verdict(clear) == "higher"
    assert replicate.verdict(dict(mean=-.2, low=-.3, high=-.1, seeds=[-.1, -.3])) == "lower"
    assert replicate.verdict(clear | dict(low=-.1)) == replicate.verdict(clear
                                                                         | dict(seeds=[-.1,
                                                                                       .5])) == "not shown"
    import numpy as np
    s = replicate.summary(np.array([[0., 1., 1.], [1., 1., 0.]]))
    assert s["mean"] == pytest.approx(2 / 3) and s["seeds"] == [0.6667,
                                                                0.6667] and s["low"] <= s["mean"] <= s["high"]


def test_a_failed_stage_says_where_its_output_is(published, tmp_path):
    cfg = replicate.Config(model=str(published), data=str(tmp_path), judge_data=str(tmp_path), size="cpu",
                           seeds=1,
                           out=str(tmp_path / "out"))
    with pytest.raises(runtime.Fault, match=r"sft.py ended with status 2: error: .*ckpt_sft.log"):
        replicate.main(cfg)
