"""The programs that are run by hand: bench, one_step, convert."""
import json
import re

import pytest
import torch

import model as M
from common.errors import UserError
from common.tokenizer import load_tokenizer
from tools import bench, convert, one_step

WORDS = {"kind": "words", "pattern": r"\w+", "words": []}


# ------------------------------------------------------------------------------------------------------ bench

@pytest.fixture
def toy(monkeypatch):
    shape = dict(M.SHAPES["tiny"], vocab_size=40, context=512, n_layer=2, n_head=2, d_model=8)
    monkeypatch.setattr(bench, "SIZES", {"toy": (M.GPTConfig(**shape), 0.5)})
    monkeypatch.setattr(bench, "LEXICAL", {"growth": [(10, 10), (640, 640)]})


@pytest.mark.slow
@pytest.mark.parametrize("work, names", [
    ("ppo,growth", ("PPO rollout", "PPO update", "PPO iteration", "640 outputs")),
    ("sft,sample,bon", ("SFT step", "sampling", "best-of-16"))])
def test_bench_writes_and_prints_its_rows(work, names, toy, tmp_path, capsys):
    bench.main(bench.Config(work=work, repeats=1, out=str(tmp_path / "new")))
    speed = json.loads((tmp_path / "new" / "speed.json").read_text())
    assert set(speed) == {"machine", "torch", "date", "rows"} and speed["torch"] == torch.__version__
    for row in speed["rows"]:
        assert {"work", "size", "median_s", "rate", "unit"} <= set(row) and row["rate"] > 0
    for name in names:
        assert any(name in row["work"] for row in speed["rows"]), name
    assert len(re.findall(r" s +[\d,]+ (?:tokens|outputs)/s", capsys.readouterr().out)) == len(speed["rows"])
    with pytest.raises(UserError, match="--work nothing: choose from sft"):
        bench.main(bench.Config(work="nothing"))


# ---------------------------------------------------------------------------------------------------- convert

def test_convert_scores_and_continues_a_text(work, capsys):
    path = str(work / "ckpt_sft.pt")
    convert.main(convert.Config(model=path, prompt="my sister sold my car", new_tokens=4))
    text = capsys.readouterr().out
    assert "4 layers" in text and "\nmy sister sold my car" in text
    nats = float(re.search(r"scores (\d+\.\d+) nats a token over \d+ tokens", text)[1])
    assert 0 < nats < 20


def test_convert_refuses_a_model_from_scratch(work, tmp_path):
    with pytest.raises(UserError, match="began as published ones"):
        convert.main(convert.Config(model=str(work / "ckpt_sft.pt"), export=str(tmp_path / "out")))


# --------------------------------------------------------------------------------------------------- one step

def test_a_packed_row_as_a_table():
    """Prompt 5 6, response a = 7 EOS, response b = 8 9 EOS, by hand."""
    tokenizer = load_tokenizer(WORDS)
    eos = tokenizer.eot_token
    rows = one_step.packed_rows(M.pack([[5, 6]], [[[7, eos], [8, 9, eos]]]), tokenizer)
    assert [row[2] for row in rows] == [0, 1, 2, 3, 2, 3, 4]
    assert [row[3] for row in rows] == ["0", "0–1", "0–2", "0–3", "0–1, 4", "0–1, 4–5", "0–1, 4–6"]
    assert [row[4] for row in rows] == ["", 0, 1, 2, 3, 4, 5]
    assert rows[1][5].endswith("(b)") and rows[1][5].count(",") == 1        # the prompt's end predicts both
    assert [row[6] for row in rows] == ["", "", "", "reward of a", "", "", "reward of b"]
    assert rows[3][5] == rows[6][5] == ""


def test_one_step_adds_up(work, capsys):
    """R_t = -beta KL_t, with the score at the last token; and the rewards of the pair give its loss."""
    one_step.main(one_step.Config(**{name: str(work / f"ckpt_{kind}.pt") for name, kind in (
        ("model", "sft"), ("policy", "ppo"), ("reward", "reward"))}))
    text = capsys.readouterr().out
    table = text[text.index("| t | token | mask"):]
    rows = [line.strip("| ").split(" | ") for line in table[:table.index("\n\n")].splitlines()[2:]]
    rows = [row for row in rows if row[2] == "1"]
    kl, rewards = ([float(row[i]) for row in rows] for i in (5, 6))
    assert any(kl), "the policy has not moved"
    assert any(row[-1] != "1.000" for row in rows), "the step has changed nothing"
    score = float(re.search(r"Score (-?\d+\.\d+)", text)[1])
    assert rewards == pytest.approx([-0.1 * x for x in kl[:-1]] + [score - 0.1 * kl[-1]], abs=1.5e-3)
    assert kl == pytest.approx([float(row[3]) - float(row[4]) for row in rows], abs=2e-3)
    assert "| padding | 0 | 0.000 |" in text
    a, b = map(float, re.search(r"r\(b\) \| (\S+) − \((\S+)\) =", text).groups())
    loss = float(re.search(r"loss = −log σ\(r\(a\) − r\(b\)\) \| ([\d.]+)", text)[1])
    assert loss == pytest.approx(torch.nn.functional.softplus(torch.tensor(b - a)).item(), abs=2e-3)
