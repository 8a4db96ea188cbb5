"""The study's tables, pictures, and the study of a published model."""
import json
import shutil

import numpy as np
import pytest
import torch

import ppo
import reward
import sft
from common.checkpoint import load_checkpoint
from common.errors import UserError
from common.stats import over_seeds
from conftest import ROOT, json_lines
from published import pretrained
from study import figures, published, report
from test_pretrained import LLAMA, REFS, value


def test_tables_show_ranges_of_few_seeds_and_intervals_of_many():
    few, many = over_seeds(np.array([[.2, .4], [.4, .6]])), over_seeds(np.linspace(0, 1, 10).reshape(5, 2))
    assert report.cell(few) == "0.40 [0.30, 0.50]" and "range" in report.how_to_read(2)
    assert report.cell(many).startswith("0.50 [") and report.cell(many).endswith(f"± {many['seed_sd']:.2f}")
    assert report.ends(many) == (many["low"], many["high"])
    assert report.cell(over_seeds(np.array([[.2, .4]]))) == "0.30"
    assert figures.arms([few, over_seeds(np.array([[.2, .4]]))]) == pytest.approx(np.array([[.1, 0], [.1, 0]]))


# ---------------------------------------------------------------------------------------- tables and pictures

def test_markdown():
    assert report.table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    e = {"mean": .12345, "low": -.1, "high": .2, "seed_sd": .03, "per_seed": [0.] * 4}
    assert report.signed(e) == "+0.12 [-0.10, +0.20]" and report.cell(e) == "0.12 [-0.10, 0.20] ± 0.03"
    older = {"seconds": 3540, "processor_seconds": None}
    assert report.took(older) == "Its stages took 59 minutes, added up."
    assert report.took({"seconds": 60, "processor_seconds": 120}) == (
        "Its stages took 1 minutes, added up, and 2 minutes of processor time.")


def test_the_committed_tables_are_those_of_the_committed_numbers(tmp_path):
    for name in ("results.json", "reviewers.json"):
        shutil.copy(ROOT / "results" / name, tmp_path)
    for path in report.write_tables(tmp_path):
        assert path.read_text() == (ROOT / "results" / path.name).read_text(), path.name


def test_numbers_of_other_seeds_are_not_mixed(tmp_path):
    for name in ("results.json", "reviewers.json"):
        found = json.loads((ROOT / "results" / name).read_text())
        found["settings"]["seeds"] = [0] if name == "results.json" else [0, 1]
        (tmp_path / name).write_text(json.dumps(found))
    assert [p.name for p in report.write_tables(tmp_path)] == ["results.md"]


def test_pictures_are_drawn_from_the_numbers_alone(tmp_path):
    shutil.copy(ROOT / "results" / "results.json", tmp_path)
    assert [p.name for p in figures.draw_all(tmp_path)] == ["figure.png"]
    shutil.copy(ROOT / "results" / "reviewers.json", tmp_path)
    drawn = {p.name: p for p in figures.draw_all(tmp_path)}
    every = ("figure", "shift", "proxies", "frontier", "seeds", "instruct", "kinds")
    assert set(drawn) >= {f"{name}.png" for name in every}
    assert all(p.stat().st_size > 20_000 for p in drawn.values())


def test_the_frontiers_title_says_what_the_numbers_show():
    def title(above, ppo_wins):
        lines = [{"curve": "PPO", "temperature": 1., "knob": .1, "above_bon": {"mean": above},
                  "wins": {"mean": ppo_wins}}]
        curves = {"best-of-N": [("N = 64", {"mean": .4}, {"mean": .8})]}
        return figures.frontier_title({"frontier": {"frontier": lines}}, curves)
    assert "nearly on one curve; PPO goes further" in title(.02, .9)
    assert title(.02, .7).endswith("best-of-N and PPO (β > 0) lie nearly on one curve")
    assert title(.3, .9) == "Quality against diversity"


# ---------------------------------------------------------------------------- the study of a published model

@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A directory as a hub would hold it, with weights for the 340 tokens of its tokenizer."""
    folder = tmp_path_factory.mktemp("published")
    refs = json.loads(REFS.read_text())
    shapes = refs["models"]["llama, grouped queries, untied"]["shapes"]
    vocab, with_vocab = 340, ("model.embed_tokens.weight", "lm_head.weight")
    state = {n: value(n, [vocab if d == 40 and n in with_vocab else d for d in s]) for n, s in shapes.items()}
    pretrained.write_safetensors(folder / "model.safetensors", state)
    (folder / "config.json").write_text(json.dumps(LLAMA | dict(vocab_size=vocab, eos_token_id=0)))
    (folder / "tokenizer.json").write_text(json.dumps(refs["tokenizers"]["bytes"]["json"]))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"Say {i}:", "reference": f"it's {i}"} for i in range(24)]
    pairs = [{"prompt": r["prompt"], "chosen": r["reference"], "rejected": "no no no"} for r in rows]
    for name, lines in (("train", rows), ("validation", rows[:4]), ("test", rows[4:8]),
                        ("ood_far", rows[8:12]), ("preferences", pairs)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return path


TOY = dict(sft=["--batch-size", "8", "--max-new-tokens", "8"], reward=["--batch-size", "8"],
           ppo=["--steps", "1", "--batch-size", "8"], bon=["--inputs", "3", "--n", "2", "--pool", "4"])


def toy_study(out, model, data, seeds=1, judge_data=None):
    judge_data = str(data if judge_data is None else judge_data)
    return published.Study(out, str(model), "", str(data), judge_data, "toy", TOY, "", range(seeds), "cpu",
                           "fp32", 2, 1)


def test_the_plan_of_a_published_model(tmp_path):
    plan = {s.name: s for s in published.plan(toy_study(tmp_path, "m", "d", seeds=2))}
    assert list(plan) == [f"seed-{s}/{stage}" for s in (0, 1)
                          for stage in ("sft", "reward", "ppo", "sampled_sft", "sampled_ppo")] + ["judge"]
    assert plan["seed-1/ppo"].needs == ("seed-1/reward",) and plan["judge"].needs == ("seed-0/sft",)
    command = plan["seed-1/ppo"].work
    assert command[1] == str(ROOT / "ppo.py") and command[command.index("--seed") + 1] == "1"
    assert command[command.index("--reward") + 1] == str(tmp_path / "seed-1/ckpt_reward.pt")
    assert "judge" not in {s.name for s in published.plan(toy_study(tmp_path, "m", "d", judge_data=""))}
    before = published.plan(toy_study(tmp_path, "m", tmp_path))[0].inputs
    (tmp_path / "test.jsonl").write_text("{}\n")
    assert published.plan(toy_study(tmp_path, "m", tmp_path))[0].inputs != before       # changed data
    with pytest.raises(UserError, match="2 are needed"):
        published.run_study(toy_study(tmp_path, "m", "d", judge_data=""), torch.device("cpu"))


def test_the_stages_from_a_published_model_in_bf16(model, data, tmp_path):
    same = dict(quiet=True, threads=2, out=str(tmp_path), dtype="bf16")
    ckpt_sft, ckpt_reward = str(tmp_path / "ckpt_sft.pt"), str(tmp_path / "ckpt_reward.pt")
    sft.main(sft.Config(model=str(model), data=str(data), freeze=0.5, batch_size=8, max_new_tokens=8,
                        max_prompt_tokens=16, **same))
    reward.main(reward.Config(model=ckpt_sft, prompts=20, held_out=4, **same))
    ppo.main(ppo.Config(model=ckpt_sft, reward=ckpt_reward, steps=2, batch_size=8, **same))
    policy, saved = load_checkpoint(tmp_path / "ckpt_ppo.pt", "lm")
    assert saved["task"]["max_prompt_tokens"] == 16 and saved["tokenizer"]["kind"] == "bpe"
    start = pretrained.from_pretrained(str(model))
    assert policy.config.frozen == 1
    assert not torch.equal(policy.blocks[1].mlp.up.weight, start.blocks[1].mlp.up.weight)
    # frozen layers are the published ones, rounded to bf16 and nothing else
    assert torch.equal(policy.blocks[0].mlp.up.weight, start.blocks[0].mlp.up.weight.bfloat16().float())
    log = json_lines(tmp_path / "metrics_ppo.jsonl")
    assert log[0]["ratio_first"] == pytest.approx(1, abs=1e-3) and log[0]["kl"] == 0


@pytest.mark.slow
def test_the_study_of_a_published_model_and_its_tables(model, data, tmp_path, capfd):
    study = toy_study(tmp_path, model, data)
    published.run_study(study, torch.device("cpu"))
    results = json.loads((tmp_path / "replication.json").read_text())
    assert {k.split(" | ")[0] for k in results["values"]} == {"sft", "bon", "ppo"}
    assert {k.split(" | ")[1] for k in results["values"]} == {"test", "ood_far"}
    assert set(results["models"]) == {"seed-0/ckpt_reward.pt", "seed-0/ckpt_ppo.pt", "ckpt_judge.pt"}
    text = (tmp_path / "replication.md").read_text()
    assert text in capfd.readouterr().out and "| win rate | test |" in text and "longer wins" in text
    assert "| win rate at equal length | ood_far |" in text and "| per input ead, first 20 words | test |" in text
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")}
    published.run_study(study, torch.device("cpu"))         # finished stages are not run again
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")} == before


def test_differences_in_words():
    clear = dict(mean=.2, low=.1, high=.3, per_seed=[.1, .3])
    assert published.verdict(clear) == "higher"
    assert published.verdict(dict(mean=-.2, low=-.3, high=-.1, per_seed=[-.1, -.3])) == "lower"
    assert published.verdict(clear | dict(low=-.1)) == "two seeds do not decide"
    assert published.verdict(clear | dict(low=-.1, per_seed=[.1] * 4)) == "not shown"
    s = published.summary(np.array([[0., 1., 1.], [1., 1., 0.]]), "win rate")
    assert s["mean"] == pytest.approx(2 / 3) and s["low"] <= s["mean"] <= s["high"]
    assert s["per_seed"] == [.6667, .6667]
    across = published.summary(np.array([[.1, .3], [.5, .7]]), "across ead")
    assert across["per_seed"] == [.2, .6] and across["prompts_low"] is None


def test_a_table_of_a_published_model():
    e = {"mean": .5, "low": .4, "high": .6, "per_seed": [.4, .6]}
    splits = ("ood_far", "test")
    found = {f"{p} | {s} | win rate": e for p in published.POLICIES for s in splits}
    differences = {f"{p} - sft | {s} | win rate": e for p in ("ppo", "bon") for s in splits}
    accuracy = dict(accuracy=.6, accuracy_low=.5, accuracy_high=.7, longer_wins=.5, pairs=9)
    models = {"seed-0/ckpt_reward.pt": accuracy, "seed-0/ckpt_ppo.pt": {}}
    text = published.markdown({"model": "m", "seeds": 2, "values": found, "differences": differences,
                               "models": models})
    first = next(line for line in text.splitlines() if line.startswith("| win rate"))
    assert first.startswith("| win rate | test | 0.500 [0.400, 0.600] |")
    assert "+0.500 [+0.400, +0.600] higher" in first
    assert "| seed-0/ckpt_reward.pt | 0.600 [0.500, 0.700] | 0.500 | 9 |" in text and "ckpt_ppo" not in text


def test_the_papers_values_stand_beside_those_of_its_models(tmp_path):
    """--size gpu of an OPT model takes the paper's settings, and the table its values."""
    assert published.flags_of("gpu", "facebook/opt-125m")["ppo"] == ["--preset", "paper", "--dtype", "bf16"]
    assert published.flags_of("gpu", "gpt2") == published.SIZES["gpu"]
    assert published.flags_of("gpu", "/models/opt-1.3b") == published.SIZES["opt"]
    assert published.flags_of("cpu", "facebook/opt-125m") == published.SIZES["cpu"]
    e = over_seeds(np.full((2, 3), .5))
    names = ("sft", "bon", "ppo")
    results = {"model": "facebook/opt-125m", "seeds": 2, "models": {},
               "values": {f"{p} | test | per input ead": e for p in names},
               "differences": {f"{p} - sft | test | per input ead": e for p in ("ppo", "bon")}}
    assert "| per input ead | 0.81 |  | 0.15 | 0.50 [0.50, 0.50] |" in published.markdown(results)
    assert "appendix" not in published.markdown(results | {"model": "gpt2"})
