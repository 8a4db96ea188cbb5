"""The programs that are run by hand: budget, bench, convert, one_step."""
import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import model as M
from common import fast_linear
from common.checkpoint import save_checkpoint
from common.errors import UserError
from common.tokenizer import load_tokenizer
from tools import bench, budget, convert, growth, one_step


# ----------------------------------------------------------------------------------------------------- budget

@pytest.mark.parametrize("frozen", [0, 2])
def test_budget_is_what_training_holds_and_does(frozen, monkeypatch):
    shape = {**M.SHAPES["opt-125m"], "n_layer": 4, "d_model": 96, "n_head": 4, "vocab_size": 101}
    config = M.GPTConfig(**shape, frozen=frozen)
    model, packed = M.GPT(config), M.pack([[1] * 400], [[[2] * 48]])
    optimizer = torch.optim.Adam(model.trainable())
    M.log_probs(model, model(packed), packed).sum().backward()
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.trainable()),
            *(x for state in optimizer.state.values() for x in state.values() if x.dim())]
    assert budget.memory(config, torch.float32)[0] == sum(x.numel() * x.element_size() for x in held)

    monkeypatch.setattr(fast_linear, "available", lambda: False)    # torch does not count oneDNN's operations
    counter = FlopCounterMode(display=False)
    with counter:
        M.log_probs(model, model(packed), packed).sum().backward()
    done = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    # the last layer computes only keys and values at the prompt
    saved = 400 / 448 * 9 / 12 / (4 - frozen)
    asked = budget.operations(config, 400, 48, epochs=4)[0]
    assert asked * (0.98 - saved) < done < asked        # biases and norms are no products


def test_budget_prints_every_shape(capsys):
    budget.main(budget.Config(ranks=8))
    text = capsys.readouterr().out
    assert all(f"| {name} |" in text for name in M.SHAPES) and "over 8 ranks" in text
    with pytest.raises(UserError, match="--tflops"):
        budget.Config(tflops=0.)
    budget.main(budget.Config(study="opt-125m", tflops=100., price=3.))
    *parts, total = re.findall(r"([\d.]+) h", capsys.readouterr().out)
    assert sum(map(float, parts)) == pytest.approx(float(total), abs=.03) and len(parts) == 4
    with pytest.raises(UserError, match="--study nope: choose from tiny"):
        budget.main(budget.Config(study="nope"))


# ------------------------------------------------------------------------------------------------------ bench

def test_both_sides_of_the_bench_compute_the_same():
    groups = [["a b a . c", "b b c", "a"], ["c c", "a b c d e f g", "d"]]
    for ours, theirs in zip(bench.our_counts(groups[1:]), bench.paper_loops(groups[1:])):
        np.testing.assert_allclose(ours, theirs)
    posts = bench.Posts([[1, 2, 3], [4]], [[[5, 6]], [[7, 8, 9]]])
    model = M.GPT(M.GPTConfig(vocab_size=12, n_layer=1, n_head=2, d_model=8))
    ours, n = bench.packed_loss(model, posts, [0, 1])
    theirs, m = bench.padded_loss(model, posts, [0, 1], 7)
    torch.testing.assert_close(ours, theirs)
    assert n == m == 5


def test_bench_runs_a_row_and_an_iteration(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "peaks", lambda device, dtype: bench.Peaks(1., 1., 1.))      # it takes seconds
    (tmp_path / "texts.jsonl").write_text('{"outputs": ["a b c d e f", "a c a c b d"]}\n' * 2)
    bench.main(bench.Config(rows="diversity", text=str(tmp_path / "texts.jsonl"), repeats=1, threads=1,
                            out=str(tmp_path)))
    row, = (x for x in capsys.readouterr().out.splitlines() if x.startswith("| distinct-n and EAD"))
    assert "2 x 2 outputs" in row and (tmp_path / "bench.json").is_file()
    torch.set_num_threads(1)
    tiny = {**bench.SMALL, "n_layer": 2, "d_model": 16, "n_head": 2, "context": 96}
    iteration = bench.our_iteration(tiny, 0.5, torch.device("cpu"), torch.float32)
    iteration()
    iteration()
    with pytest.raises(UserError, match="--rows nothing"):
        bench.main(bench.Config(rows="nothing"))


def test_ragged_rows_compute_the_same_on_both_sides(monkeypatch):
    tiny = {**bench.SMALL, "n_layer": 2, "d_model": 16, "n_head": 2, "context": 1024}
    monkeypatch.setattr(bench, "GPT2", tiny)
    posts = bench.random_posts(vocabulary=1024)
    monkeypatch.setattr(bench, "random_posts", lambda: posts)
    cfg, device = bench.Config(repeats=1), torch.device("cpu")
    for row in (bench.row_reward_ragged, bench.row_ppo_ragged):
        found, = row(cfg, device)       # the second raises UserError where the sides disagree
        assert found["peers"] > 0 and found["runs"] == 1


def test_growth_is_measured_and_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(growth, "CURVES", {"prompt": (8, 16), "response": (4, 8), "rollouts": (4, 8),
                                           "frozen": (0, 6)})
    monkeypatch.setattr(growth, "SHAPE", growth.SHAPE | dict(d_model=32, n_head=4))
    monkeypatch.setattr(growth, "USUAL", {"prompt": 8, "response": 4, "rollouts": 4, "frozen": 6})
    monkeypatch.setattr(growth, "in_a_process", lambda sizes, cfg: growth.measure_point(
        sizes, 1, torch.float32, torch.device("cpu")))
    monkeypatch.setattr(growth, "peaks", lambda device, dtype: bench.Peaks(1e9, 1e9, 1.))
    growth.main(growth.Config(out=str(tmp_path), repeats=1))
    assert "tokens of a prompt 16: " in capsys.readouterr().out
    assert (tmp_path / "figures/growth.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "growth.json").read_text())
    assert [x["curve"] for x in found["points"]] == [c for c, v in growth.CURVES.items() for _ in v]
    # four times the rollouts are four times the work; attention makes a prompt more than proportional
    of = partial(growth.operations, response=32, frozen=6)
    assert of(prompt=256, rollouts=16) == 4 * of(prompt=256, rollouts=4)
    assert of(prompt=1024, rollouts=4) > 3.5 * of(prompt=256, rollouts=4)
    with pytest.raises(UserError, match="no such file"):
        growth.main(growth.Config(out=str(tmp_path / "none"), draw=True))


def test_bench_runs_are_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "peaks", lambda device, dtype: bench.Peaks(1., 1., 1.))
    ours = [bench.Seconds(2., 3.), bench.Seconds(1., 4.), bench.Seconds(9., 5.)]
    rows = [bench.line("work", ours, [bench.Seconds(4., 2.)], "peer", 3), bench.line("alone", ours, None, "-", 0)]
    monkeypatch.setattr(bench, "ROWS", {"some": lambda cfg, device: iter(rows)})
    assert rows[0]["ratio"] == 2 and rows[0]["by_processor"] == .5 and rows[1]["ratio"] is None     # medians
    same = dict(threads=1, out=str(tmp_path))
    bench.main(bench.Config(**same))
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["ratios"] == {"work; peer": {"ratio": 2., "by_processor": .5}, "alone; -": {}}
    assert last["versions"]["torch"] == torch.__version__ and last["processor"] and last["dtype"] == "fp32"
    (tmp_path / "bench.json").rename(tmp_path / "old.json")
    rows[0] |= {"ratio": 3.}
    del rows[1]
    bench.main(bench.Config(compare=str(tmp_path / "old.json"), **same))
    said = capsys.readouterr().out
    assert "work; peer: ratio 2.00 then, 3.00 now (+50%)" in said and "not measured now: 1 of 2 rows" in said
    for text in ("{}", "[]", "no"):
        (tmp_path / "old.json").write_text(text)
        with pytest.raises(UserError, match="this is no bench.json"):
            bench.main(bench.Config(compare=str(tmp_path / "old.json"), **same))
    with pytest.raises(UserError, match="nowhere.json: No such file"):
        bench.main(bench.Config(compare=str(tmp_path / "nowhere.json"), **same))


# ---------------------------------------------------------------------------------------------------- convert

def test_convert_scores_and_continues_a_text(work, capsys):
    path = str(work / "ckpt_sft.pt")
    convert.main(convert.Config(model=path, prompt="my sister sold my car", new_tokens=4))
    text = capsys.readouterr().out
    assert "4 layers" in text and "\nmy sister sold my car" in text
    nats = float(re.search(r"scores (\d+\.\d+) nats a token over \d+ tokens", text)[1])
    assert 0 < nats < 20


def test_convert_writes_a_hugging_face_directory(tmp_path, capsys):
    shape = dict(vocab_size=300, n_layer=1, n_head=2, d_model=8, context=16, position="learned",
                 norm="layernorm", activation="gelu_tanh", bias=True)
    path, spec = tmp_path / "ckpt_a.pt", {"kind": "words", "pattern": r"\w+", "words": []}
    save_checkpoint(path, M.GPT(M.GPTConfig(**shape)), spec, None, {}, {})
    convert.main(convert.Config(model=str(path), export=str(tmp_path / "out")))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "no Hugging Face form" in capsys.readouterr().out
    with pytest.raises(UserError, match="--new-tokens 16"):
        convert.main(convert.Config(model=str(path), new_tokens=16))


# --------------------------------------------------------------------------------------------------- one step

def test_ranges():
    assert one_step.ranges([0, 1, 2, 5]) == "0–2, 5" and one_step.ranges([]) == ""


def test_a_packed_row_as_a_table():
    """Prompt 5 6, response a = 7 EOS, response b = 8 9 EOS, by hand."""
    tokenizer = load_tokenizer({"kind": "words", "pattern": r"\w+", "words": []})
    eos = tokenizer.eot_token
    packed = M.pack([[5, 6]], [[[7, eos], [8, 9, eos]]])
    cells, n_real = one_step.packed_rows(packed, tokenizer)
    assert n_real == 7
    assert [row[2] for row in cells[:7]] == ["0", "1", "2", "3", "2", "3", "4"]
    assert [row[3] for row in cells[:7]] == ["0", "0–1", "0–2", "0–3", "0–1, 4", "0–1, 4–5", "0–1, 4–6"]
    assert [row[4] for row in cells[:7]] == ["", "0", "1", "2", "3", "4", "5"]
    assert cells[1][5].endswith("(b)") and cells[1][5].count(",") == 1      # the prompt's end predicts both
    assert [row[6] for row in cells[:7]] == ["", "", "", "reward of a", "", "", "reward of b"]
    assert cells[3][5] == cells[6][5] == "" and cells[7][1] == "padding"


def test_one_step_page_adds_up(work, capsys):
    """The page is made, and its first table obeys R_t = -beta KL_t, with the score at the last token."""
    one_step.main(one_step.Config(model=str(work / "ckpt_sft.pt"), reward=str(work / "ckpt_reward.pt"),
                                  step=2, threads=1))
    text = capsys.readouterr().out
    for heading in ("## A step of PPO", "## A pair of the reward model", "## A packed row"):
        assert heading in text
    table = text[text.index("| t | token | mask"):]
    rows = [line.strip("| ").split(" | ") for line in table[:table.index("\n\n")].splitlines()[2:]]
    kl, rewards = ([float(row[i]) for row in rows] for i in (5, 6))
    assert any(kl), "the policy has not moved"
    assert rewards[:-1] == pytest.approx([-0.1 * x for x in kl[:-1]], abs=1.1e-3)
    score = float(re.search(r"score (-?\d+\.\d+)", text)[1])
    assert rewards[-1] == pytest.approx(score - 0.1 * kl[-1], abs=1.5e-3)
    log_ratio = [float(row[3]) - float(row[4]) for row in rows]
    assert kl == pytest.approx(log_ratio, abs=2e-3)
    assert "| padding | 0 | 0.000 |" in text
