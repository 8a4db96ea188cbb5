"""Each script from end to end at toy size, runs that were killed, and wrong inputs: one line, exit status 2, nothing
overwritten."""
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import bon
import common.dist
import model as M
import ppo
import reward
import sft
import splits
from common import files
from common.checkpoint import load_checkpoint, weights_hash
from common.errors import UserError
from common.loop import Run
from common.tokenizer import build_tokenizer, load_tokenizer
from conftest import ROOT, call, held_by_another_process, json_lines, refused
from common.samples import read_samples
from generalisation import reward_scores
from generate import generate
from published import pretrained
from published.tokenizer import chat_template
from methods import dpo, grpo
from test_pretrained import GPT2, ONE_LABEL, REFS
from test_pretrained import write as write_published
from test_tokenizer import TEMPLATES, chat_directory

STAGES = {  # script: its flags but --model, --reward and --out
    "sft": (sft, dict(rows=32)), "reward": (reward, dict(prompts=24, held_out=8, samples=2, log_every=1)),
    "ppo": (ppo, dict(steps=3, batch_size=8, kl_target=2.0)),
    "bon": (bon, dict(inputs=3, n=2, pool=4, batch_size=4, splits="test", soft=.5)),
    "dpo": (dpo, dict(prompts=24, held_out=8, samples=2, log_every=1)),
    "grpo": (grpo, dict(steps=3, batch_size=4, n=3)),
}


@pytest.fixture(autouse=True)
def few_validation_rows(monkeypatch):
    """Two hundred of them take longer than all else that the toy stages do."""
    validation_loss = sft.validation_loss
    monkeypatch.setattr(sft, "validation_loss", lambda model, examples: validation_loss(model, examples[:8]))


def stage(name, work, out, **flags):
    """Runs a stage of the synthetic task from the session's checkpoints; save_every=0: a state after each
    step."""
    script, fixed = STAGES[name]
    inputs = {"model": str(work / "ckpt_sft.pt")}
    if name in ("ppo", "bon", "grpo"):
        inputs["reward"] = str(work / "ckpt_reward.pt")
    script.main(script.Config(**dict(quiet=True, threads=1, save_every=0., out=str(out)) | inputs | fixed | flags))


# ------------------------------------------------------------------------------------------ what each stage does

def test_sft_learns(work):
    steps = json_lines(work / "metrics_sft.jsonl")
    assert steps[-1]["validation_loss"] < 3.0       # ln 377 = 5.9 before
    _, saved = load_checkpoint(work / "ckpt_sft.pt", "lm")
    assert saved["metrics"]["validation_loss"] == pytest.approx(steps[-1]["validation_loss"], rel=1e-4)


def test_ppo_log_is_flat_complete_and_starts_at_ratio_one(work):
    steps = json_lines(work / "metrics_ppo.jsonl")
    assert len(steps) == 3
    assert {"reward", "gold_reward", "kl", "kl_k3", "ratio", "pg_clipfrac", "v_clipfrac", "entropy", "v_norm", "lr",
            "explained_variance", "eos_rate", "length", "tokens_per_second", "peak_mb", "seconds"} <= set(steps[0])
    # fp32: the same forward pass, before anything was learned
    assert all(abs(s["ratio_first"] - 1) < 1e-5 for s in steps)
    # the policy is the reference at first, and then is not
    assert steps[0]["kl"] == 0 and steps[2]["kl"] != 0


def test_reward_model_is_normalised_on_held_out_responses(work):
    """Folding mean and std into the head gives the held-out scores mean 0 and std 1."""
    model, saved = load_checkpoint(work / "ckpt_reward.pt", "reward")
    prompts, responses = [[5, 6, 7]] * 4, [[[i, i + 1, 300]] for i in range(4)]
    reward.normalise(model, sum(reward.score(model, prompts, responses), []))
    again = torch.tensor(reward.score(model, prompts, responses))
    assert abs(again.mean()) < 1e-4 and abs(again.std(correction=0) - 1) < 1e-4
    assert {"accuracy", "longer_wins", "accuracy_gold"} <= set(saved["metrics"])


def test_scores_do_not_depend_on_batching(work):
    model, _ = load_checkpoint(work / "ckpt_reward.pt", "reward")
    prompts, responses = [[5, 6, 7], [8]], [[[i, 300] for i in range(11)], [[9, 9, 300]] * 2]
    alone = reward.score(model, prompts, responses, batch_size=1, packed_together=1)
    torch.testing.assert_close(sum(reward.score(model, prompts, responses), []), sum(alone, []), atol=1e-5, rtol=0)


def test_sample_files_follow_the_contract_and_the_best_have_more_reward(work):
    rewards = {}
    for policy, scored in (("sft", True), ("bon", True), ("ppo", False)):
        rows = json_lines(work / f"samples_{policy}_test.jsonl")
        assert len(rows) == 6 and {"id", "prompt", "reference", "outputs", "rewards", "policy", "split",
                                   "temperature", "seed", "task"} <= set(rows[0])
        assert all(len(r["outputs"]) == 4 and (r["rewards"] is not None) == scored for r in rows)
        rewards[policy] = scored and sum(sum(r["rewards"]) for r in rows)
    assert rewards["bon"] > rewards["sft"]
    met = json_lines(work / "samples_ppo_test.jsonl")[0]["trained_against"]
    assert met == load_checkpoint(work / "ckpt_reward.pt", "reward")[1]["weights_hash"]


def test_same_seed_same_result_other_seed_other(work, tmp_path):
    for name, seed in (("once", 0), ("again", 0), ("other", 1)):
        stage("ppo", work, tmp_path / f"{name}.pt", seed=seed, steps=1, probe_every=0)
    hashes = [load_checkpoint(tmp_path / f"{name}.pt", "lm")[1]["weights_hash"] for name in ("once", "again", "other")]
    assert hashes[0] == hashes[1] != hashes[2]


def test_frozen_trunk_stays(work, tmp_path):
    stage("ppo", work, tmp_path, steps=1, freeze=0.8, probe_every=0)
    before, after = (load_checkpoint(path, "lm")[0].state_dict()
                     for path in (work / "ckpt_sft.pt", tmp_path / "ckpt_ppo.pt"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "blocks.3.mlp.up.weight" in changed and {name.split(".")[1] for name in changed} <= {"3", "weight"}


@pytest.mark.parametrize("script, flags", [(ppo, dict(batch_size=8)), (grpo, dict(batch_size=8, n=2))])
def test_minibatches_divide_the_batch(script, flags, work, tmp_path, monkeypatch):
    """Two epochs of four steps; with parts of one row, each row is forwarded once an epoch."""
    sizes, steps, loss, step = [], [], script.minibatch_loss, Run.step_optimizer

    def counted(*args):
        ro = next(x for x in args if isinstance(x, ppo.Rollout))
        sizes.append(len(ro.prompts))
        return loss(*args)
    monkeypatch.setattr(script, "minibatch_loss", counted)
    monkeypatch.setattr(Run, "step_optimizer", lambda self, *models: steps.append(len(sizes)) or step(self, *models))
    script.main(script.Config(model=str(work / "ckpt_sft.pt"), reward=str(work / "ckpt_reward.pt"), steps=1, epochs=2,
                              minibatches=4, micro_batch_size=1, out=str(tmp_path), quiet=True, threads=1, **flags))
    assert sizes == [1] * 16 and steps == [2, 4, 6, 8, 10, 12, 14, 16]


def test_a_value_model_of_other_depth_is_frozen_in_the_same_part():
    policy = M.GPT(M.GPTConfig(vocab_size=20, n_layer=4, n_head=2, d_model=8, frozen=3))
    for depth, frozen in ((4, 3), (2, 1), (8, 6)):
        reward_model = M.GPT(M.GPTConfig(vocab_size=20, n_layer=depth, n_head=2, d_model=8), scalar=True)
        assert ppo.make_value_model(policy, reward_model).config.frozen == frozen


def test_gold_reward_and_adaptive_beta(work, tmp_path):
    stage("ppo", work, tmp_path, reward="gold", kl_target=1e-4, kl_horizon=8)
    steps = json_lines(tmp_path / "metrics_ppo.jsonl")
    assert steps[0]["reward"] == steps[0]["gold_reward"]
    # the log has the beta that a step used: the first one's is --kl-coef
    assert steps[0]["beta"] == ppo.Config.kl_coef != steps[2]["beta"]


def test_sft_says_what_a_small_data_set_does(tmp_path, capfd):
    """Five rows from scratch, many times: too few tokens, learned by heart.  And another task's checkpoint
    stays."""
    write(tmp_path / "train.jsonl", [{"prompt": f"Capital of {x * 3}?", "reference": f"It is {x} of {x}."}
                                     for x in "abcde"])
    write(tmp_path / "validation.jsonl", [{"prompt": f"{x}?", "reference": f"no {x} here"} for x in "fghij"])
    same = dict(data=str(tmp_path), quiet=True, threads=1, out=str(tmp_path / "out"), context=96)
    sft.main(sft.Config(**same, epochs=60, log_every=5, lr=1e-2))
    said = capfd.readouterr().out
    best, last = map(float, re.search(r"validation loss rose from (\S+) to (\S+): the model learns", said).groups())
    assert last > best and re.search(r"a model from scratch has read [\d,]+ response tokens: too few", said)
    assert "no test.jsonl, so nothing in distribution" in said
    before = (tmp_path / "out" / "ckpt_sft.pt").read_bytes()
    refused(tmp_path, "sft", "--rows", "8", "--out", "out", says=[f"is of folder {tmp_path}", "--out NAME.pt, keeps it"])
    assert (tmp_path / "out" / "ckpt_sft.pt").read_bytes() == before


def test_the_base_model_knows_the_posts():
    model, saved = load_checkpoint(ROOT / sft.PRESETS["base"]["model"], "lm")
    task, tokenizer = splits.SyntheticTask("synthetic", "", 32, 0), load_tokenizer(saved["tokenizer"])
    rows = sft.encode(tokenizer, task.rows("validation", 8), task, 512, True, "some")
    assert .8 < sft.validation_loss(model, rows) < 1.2 and saved["args"]["out"] == "base.pt"


# ----------------------------------------------------------------------------------------------- a folder of data

def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture
def folder(tmp_path):
    """A --data folder of toy rows: fields of its own, no held-out preferences."""
    text = "the cat sat on the mat and then it left the house again".split()
    rows = [{"prompt": f"POST: {' '.join(text[i % 7:])} {i}\nTL;DR:",
             "reference": " ".join(text[i % 5:i % 5 + 4]), "extra": i} for i in range(40)]
    for name in ("train", "validation", "test", "ood_far"):
        write(tmp_path / f"{name}.jsonl", rows)
    write(tmp_path / "preferences.jsonl",
          [{"prompt": r["prompt"], "chosen": r["reference"], "rejected": "no no no no"} for r in rows])
    return tmp_path


def test_the_stages_run_on_a_folder(folder, work, capfd):
    same = dict(quiet=True, threads=1, out=str(folder))
    sft.main(sft.Config(data=str(folder), epochs=2, max_new_tokens=24, **same))
    assert "40 of 40 prompts of test stand in train too" in capfd.readouterr().out
    models = dict(model=str(folder / "ckpt_sft.pt"), reward=str(folder / "ckpt_reward.pt"))
    reward.main(reward.Config(model=models["model"], epochs=3, **same))
    said = capfd.readouterr().out
    assert "held-out prompts: 4 of 40, drawn with seed 0" in said
    assert "8 held-out responses are too few for the reward's scale" in said
    ppo.main(ppo.Config(steps=1, batch_size=8, **models, **same))
    bon.main(bon.Config(inputs=50, n=2, soft=.1, **models, **same))
    said = capfd.readouterr()
    assert "test has 40 prompts, fewer than --inputs 50" in said.out
    assert "test: soft draws, KL " in said.err + said.out and "with fewer than 16 the draws" in said.err + said.out
    # what bon.py chose by is what a judge reads in the file, but for outputs without an end
    judge, saved = load_checkpoint(folder / "ckpt_reward.pt", "reward")
    rows = read_samples(folder / "samples_sft_test.jsonl")
    scores, _ = reward_scores(rows, judge, load_tokenizer(saved["tokenizer"]), splits.task_from(saved["task"]))
    fixed = [[r if ends else -3. for r, ends in zip(s, row["finished"])] for s, row in zip(scores, rows)]
    assert [row["rewards"] for row in rows] == [pytest.approx(r, abs=1e-4) for r in fixed]
    write(folder / "test.jsonl", [{"prompt": "POST: new\nTL;DR:", "reference": "cat"}])
    bon.main(bon.Config(model=models["model"], n=2, splits="test", policy="again", **same))
    (folder / "samples_again_test.jsonl").unlink()
    assert f"{folder} has changed since {models['model']} was trained: test\n" in capfd.readouterr().out
    assert {p.name for p in folder.glob("samples_*")} == {f"samples_{p}_{s}.jsonl" for p in ("sft", "bon", "soft")
                                                          for s in ("test", "ood_far")}
    assert load_checkpoint(folder / "ckpt_reward.pt", "reward")[1]["metrics"]["accuracy"] > .9
    refused(folder, "ppo", "--model", "ckpt_sft.pt", "--reward", work / "ckpt_reward.pt", says="different tokenizers")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A published reward model of GPT-2's kind: weights that anyone can make, a tokenizer of 340 ids."""
    refs, folder = json.loads(REFS.read_text()), tmp_path_factory.mktemp("published")
    shapes = refs["classifiers"]["gpt2"]["shapes"] | {"transformer.wte.weight": [340, 24],
                                                      "transformer.wpe.weight": [512, 24]}
    config = GPT2 | ONE_LABEL | dict(vocab_size=340, n_positions=512, eos_token_id=339)
    write_published(folder, "", {"config": config, "shapes": shapes})
    (folder / "tokenizer.json").write_text(json.dumps(refs["tokenizers"]["bytes"]["json"]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return folder


def test_published_reward_models_train_choose_and_judge(published, work, tmp_path):
    """Its tokenizer is not the policy's.  What bon.py writes is what a judge reads in the file."""
    common = "--model", work / "ckpt_sft.pt", "--reward", published, "--threads", 1, "--quiet"
    got = call("ppo", *common, "--steps", 2, "--batch-size", 8, "--save-every", 0, cwd=tmp_path)
    assert got.returncode == 0 and "a published model" in got.stdout, got.stderr
    lines = json_lines(tmp_path / "metrics_ppo.jsonl")
    assert len(lines) == 2 and lines[0]["ratio_first"] == 1 and lines[0]["kl"] == pytest.approx(0, abs=1e-5)
    got = call("methods.grpo", *common, "--steps", 2, "--batch-size", 2, "--n", 3, cwd=tmp_path)
    assert got.returncode == 0, got.stderr
    got = call("bon", *common, "--inputs", 4, "--n", 2, "--splits", "test", "--no-eos-score", "none", cwd=tmp_path)
    assert got.returncode == 0, got.stderr
    rows = read_samples(tmp_path / "samples_sft_test.jsonl")
    model, saved = pretrained.load(str(published), kind="reward")
    scores, _ = reward_scores(rows, model, *splits.reading_of(model, saved))
    assert [row["rewards"] for row in rows] == [pytest.approx(r, abs=1e-4) for r in scores]
    assert len({r for row in rows for r in row["rewards"]}) > 4
    got = call("generalisation", *tmp_path.glob("samples_*.jsonl"), "--judge", published, cwd=tmp_path)
    assert got.returncode == 0 and "* trained against, or chosen by, this very judge" in got.stdout, got.stderr
    line, = [x for x in json.loads((tmp_path / "generalisation.json").read_text())["win_rate"]
             if x["policy"] == "sft"]
    assert line["score"][0] == pytest.approx(sum(map(sum, scores)) / 8, abs=1e-5)


def test_a_rollout_has_the_scores_of_a_published_reward_model_s_own_reading(published, work):
    cfg = ppo.Config(model=str(work / "ckpt_sft.pt"), reward=str(published), threads=1, no_eos_score=None)
    models, bundle, _ = ppo.build(cfg, torch.device("cpu"))
    policy, _, value_model, reward_model = models
    assert value_model.shares_trunk_with(policy) and not value_model.head.weight.any()
    rows, prompts = ppo.read_prompts(bundle, 3)
    ro = ppo.rollout(*models, prompts, 8, bundle.tokenizer.eot_token, 1., torch.Generator().manual_seed(0), n=2)
    how = splits.reading_of(reward_model, pretrained.load(str(published), kind="reward")[1])
    outputs = [[splits.decode(bundle.tokenizer, ids) for ids in ro.responses[i:i + 2]] for i in (0, 2, 4)]
    texts = splits.text_ids(reward_model, [row["prompt"] for row in rows], outputs, *how)
    expected = torch.tensor([reward_model.rewards(M.pack([prompt], [[ids]])).item()
                             for prompt, group in zip(*texts) for ids in group])
    assert (ro.score - expected).abs().max() < 1e-5 and expected.std() > .01


def test_a_reward_model_with_a_chat_template_scores_as_transformers(tmp_path):
    """The user's message and the answer in the model's template; an answer that did not end, without its end."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    refs = json.loads(REFS.read_text())
    shapes = refs["classifiers"]["gpt2"]["shapes"] | {"transformer.wte.weight": [346, 24],
                                                      "transformer.wpe.weight": [512, 24]}
    config = GPT2 | ONE_LABEL | dict(vocab_size=346, n_positions=512, eos_token_id=343, pad_token_id=345)
    write_published(tmp_path, "", {"config": config, "shapes": shapes})
    chat_directory(tmp_path, refs["tokenizers"], TEMPLATES["Qwen2.5"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    rows = [{"prompt": "lower", "reference": "low", "outputs": [" newest low", " slow"], "finished": [True, False]},
            {"prompt": "it is newer", "reference": " lowest", "outputs": [" low", " day"], "finished": [True, True]}]
    model, saved = pretrained.load(str(tmp_path), kind="reward")
    scores, references = reward_scores(rows, model, *splits.reading_of(model, saved))
    for row, found, reference in zip(rows, scores, references):
        texts = [*zip(row["outputs"], row["finished"], found), (row["reference"], True, reference[0])]
        for text, finished, score in texts:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": text.strip()}],
                tokenize=True, return_dict=False)
            end = 0 if finished else len(tokenizer.encode("<|stop|>\n", add_special_tokens=False))
            with torch.no_grad():
                expected = theirs(torch.tensor([ids[:len(ids) - end]])).logits.item()
            assert score == pytest.approx(expected, abs=1e-4), text


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A published chat model of GPT-2's kind, with a template like Qwen2.5's."""
    refs, folder = json.loads(REFS.read_text()), tmp_path_factory.mktemp("chat")
    shapes = refs["models"]["gpt2"]["shapes"] | {"transformer.wte.weight": [346, 24],
                                                 "transformer.wpe.weight": [512, 24]}
    config = GPT2 | dict(vocab_size=346, n_positions=512, eos_token_id=343)
    write_published(folder, "", {"config": config, "shapes": shapes})
    chat_directory(folder, refs["tokenizers"], TEMPLATES["Qwen2.5"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_chat_model_goes_through_all_stages(chat_model, published, folder):
    """--chat is given once; what follows reads it in the checkpoint.  Files hold what the user wrote."""
    def run(script, *args):
        got = call(script, *args, "--threads", 1, "--quiet", cwd=folder)
        assert got.returncode == 0, got.stderr
        return got.stdout
    run("sft", "--model", chat_model, "--chat", "--data", folder, "--batch-size", 20, "--log-every", 1)
    assert len(json_lines(folder / "metrics_sft.jsonl")) == 2
    run("reward", "--model", "ckpt_sft.pt", "--batch-size", 20)
    models = "--model", "ckpt_sft.pt", "--reward", "ckpt_reward.pt"
    run("ppo", *models, "--steps", 1, "--batch-size", 8)
    run("methods.grpo", *models, "--steps", 1, "--batch-size", 2, "--n", 2)
    run("methods.dpo", "--model", "ckpt_sft.pt", "--prompts", 8, "--batch-size", 8)
    for name in ("ppo", "grpo", "dpo"):
        assert load_checkpoint(folder / f"ckpt_{name}.pt", "lm")[1]["tokenizer"]["chat"] == TEMPLATES["Qwen2.5"]
    said = run("bon", *models, "--inputs", 4, "--n", 2, "--splits", "test", "--no-eos-score", "none")
    assert "has a chat template" not in said
    rows = read_samples(folder / "samples_sft_test.jsonl")
    assert all(row["prompt"].startswith("POST: ") and "<|" not in row["prompt"] for row in rows)
    # the judge puts the file's prompts through the template, as bon.py did
    judge, saved = load_checkpoint(folder / "ckpt_reward.pt", "reward")
    scores, _ = reward_scores(rows, judge, *splits.reading_of(judge, saved))
    assert [row["rewards"] for row in rows] == [pytest.approx(r, abs=1e-4) for r in scores]
    # a published reward model reads the user's text without the template
    bundle = splits.load_bundle(bon.Config(model=str(folder / "ckpt_sft.pt")), torch.device("cpu"))
    reward_model, _ = splits.load_reward_model(ppo.Config(reward=str(published)), bundle, torch.device("cpu"))
    test_sets = bon.read_test_sets(bundle, "test", 4)
    begin = bundle.tokenizer.chat_ids("")[:3]
    assert all(ids[:3] == begin == [341, *begin[1:]] for ids in test_sets["test"][1])
    prompts, _ = reward_model.reread(test_sets["test"][1], [[]] * 4)
    its_own = load_tokenizer(pretrained.load(str(published), kind="reward")[1]["tokenizer"])
    assert prompts == splits.encode_prompts(its_own, [row["prompt"] for row in rows], 999)
    assert call("tools.convert", "--model", "ckpt_ppo.pt", "--export", "out", cwd=folder).returncode == 0
    assert chat_template(pretrained.load(str(folder / "out"))[1]["tokenizer"]) == TEMPLATES["Qwen2.5"]


def test_what_sft_learns_of_a_chat(chat_model, folder):
    """The template's ids, and a response that follows at once and ends as the model's turns do."""
    cfg = sft.Config(model=str(chat_model), data=str(folder), chat=True, threads=1)
    _, spec, _, (example, *_), *_ = sft.build(cfg, torch.device("cpu"))
    row, tokenizer = json_lines(folder / "train.jsonl")[0], load_tokenizer(spec)
    assert tokenizer.decode(example.prompt) == ("<|start|>system\nBe wise<|stop|>\n<|start|>user\n" + row["prompt"]
                                                + "<|stop|>\n<|start|>assistant\n")
    assert example.responses == [tokenizer.encode_ordinary(row["reference"]) + [343]]
    assert [i for i in example.prompt if i >= 340] == [341, 343, 341, 343, 341]


def test_a_chat_model_without_its_template_is_named(chat_model, published, folder, work):
    common = "--model", chat_model, "--data", folder, "--splits", "test", "--inputs", 2, "--n", 1, "--threads", 1
    said = f"{chat_model} has a chat template: without --chat its prompts are plain text\n"
    assert call("bon", *common, cwd=folder).stdout.count(said) == 1
    assert "chat template" not in call("bon", *common, "--chat", cwd=folder).stdout
    refused(work, "bon", "--chat", says="--chat: ckpt_sft.pt has no chat template")
    refused(work, "sft", "--chat", says="a model from scratch has nothing to freeze and no chat template")


def test_pairs_that_are_one_text_after_cutting_are_dropped_and_counted(capfd):
    """The difference stands after the cut: nothing to learn, and no pair to be right or wrong about."""
    tokenizer = load_tokenizer(build_tokenizer([" one two three four"] * 9))
    rows = [{"prompt": "p", "chosen": "one two three four", "rejected": "one two three one"},
            {"prompt": "p", "chosen": "two one", "rejected": "one two three four"}]
    group, = reward.read_groups(tokenizer, rows, 50, 3, keep_cut=True)
    assert capfd.readouterr().out == ("1 of 2 pairs left out: their two responses are the same\n"
                                      "0 chosen and 1 rejected responses of 1 pairs have no end\n")
    scores = [[0.] * len(group.responses)]
    scores[0][group.pairs[0][0]] = 1.
    assert len(group.pairs) == 1 and reward.accuracy([group], scores)["accuracy"] == 1
    assert reward.read_groups(tokenizer, rows[:1], 50, 3, keep_cut=True) == []


def test_a_group_of_hundreds_is_cut_and_keeps_its_pairs():
    """A list of answers ranked by people, every one against the next, as one row of a batch would not fit."""
    n = 300
    pairs = [(i, (7 * i + 1) % n) for i in range(n) if i != (7 * i + 1) % n]
    group = reward.Group([1], [[i] for i in range(n)], pairs, list(range(len(pairs))))
    parts = reward.cut_group(group)
    assert max(len(part.responses) for part in parts) <= reward.LARGEST < n / 5
    assert [(part.responses[a], part.responses[b]) for part in parts for a, b in part.pairs] == [
        ([a], [b]) for a, b in pairs]
    assert sum((part.gaps for part in parts), []) == group.gaps and {tuple(p.prompt) for p in parts} == {(1,)}
    # one prompt, so no interval, however many groups it is in
    scores = [[0.] * len(part.responses) for part in parts]
    assert reward.accuracy(parts, scores)["accuracy_low"] is None


def test_what_does_not_fit_is_left_out_and_counted(capfd):
    """A cut response would teach not to end.  One that is known not to have ended stays: its label knows it."""
    tokenizer = load_tokenizer(build_tokenizer([" one two three four"] * 9))
    rows = [{"prompt": "p", "chosen": "one two three four", "rejected": "one"},
            {"prompt": "p", "chosen": "two", "rejected": "one two three", "finished": [True, False]}]
    group, = reward.read_groups(tokenizer, rows, 50, 3)
    assert capfd.readouterr().out == (
        "1 of 2 pairs left out: a response is longer than 3 tokens\n"
        "0 chosen and 1 rejected responses of 1 pairs have no end\n")
    assert [ids[-1] == tokenizer.eot_token for ids in group.responses] == [True, False]
    kept, = reward.read_groups(tokenizer, rows[:1], 50, 3, keep_cut=True)
    assert len(kept.pairs) == 1 and "1 chosen and 0 rejected" in capfd.readouterr().out
    assert splits.encode_responses(tokenizer, [["one two three", "one"], ["two three four"]], 3, False) == [
        [splits.encode_response(tokenizer, "one", 3)], []]
    assert capfd.readouterr().out.endswith("2 of 3 responses are longer than 3 tokens: left out (--keep-cut "
                                           "learns them cut)\n")


# -------------------------------------------------------------------------------------------------- wrong inputs

@pytest.mark.parametrize("script, flags, says", [
    ("ppo", "--model nope.pt", ["nope.pt: no such file", "python sft.py"]),
    ("bon", "--reward nope.pt", "`python reward.py --model ckpt_sft.pt` makes one"),
    ("ppo", "--model ckpt_reward.pt", ["kind 'reward'", "'lm'"]),
    ("sft", "--model no/such/model", "--model no/such/model"),
    ("sft", "--context 1 --rows 9", "give a new model a larger --context"),
    ("sft", "--shape nope --rows 9", "--shape nope: choose from tiny"),
    ("sft", "--model ckpt_sft.pt --freeze 1 --rows 9", "leaves no layer to train"),
    ("ppo", "--freeze 1", "all layers of the policy are frozen"),
    ("sft", "--freeze 0.5", "a model from scratch has nothing to freeze"),
    ("sft", "--epochs 0", "error: --epochs 0: it must be an integer of at least 1"),
    ("sft", "--task nope", "--task nope: choose from"),
    ("sft", "--data nowhere", "no such folder"),
    ("sft", "--task synthetic --data .", "makes its own prompts"),
    ("sft", "--batch-size 6 --micro-batch-size 4", "--batch-size 6: it must be a multiple of 4"),
    ("ppo", "--batch-size 9", "--batch-size 9: it must be a multiple of 2"),
    ("methods.grpo", "--minibatches 3", "--batch-size 8: it must be a multiple of 3"),
    ("ppo", "--kl-target 3 --kl-coef 0", "--kl-coef must be above 0"),
    ("ppo", "--kl-target 3 --kl-horizon 10", "at least a batch"),
    ("ppo", "--kl-in-reward k3", "choose from k1, k2"),
    ("methods.dpo", "--typicality -1", "--typicality -1.0"),
    ("bon", "--temperature -1", "0 (greedy), or a number from 0.01"),
    ("bon", "--splits nope", ["'nope'", "ood_article"]),
    ("bon", "--policy a/b", "--policy a/b: it names files"),
    ("bon", "--out x.pt", "name a folder for it"),
])
def test_wrong_input_gets_one_line_and_changes_nothing(script, flags, says, toy):
    refused(toy, script, *flags.split(), says=says)


@pytest.fixture(scope="module")
def toy(work, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    for name in ("ckpt_sft.pt", "ckpt_reward.pt"):
        shutil.copy(work / name, folder)
    return folder


def edited(work, path, change):
    """The SFT checkpoint with its dict changed."""
    saved = torch.load(work / "ckpt_sft.pt", weights_only=True)
    change(saved)
    torch.save(saved, path)


@pytest.mark.parametrize("change, says", [
    (lambda c: c["tokenizer"].update(kind="nope"), "no such tokenizer"),
    (lambda c: c["task"].update(data=-1), "the checkpoint's task is damaged"),
    (lambda c: c["config"].update(n_layer=3), "odd.pt: not a checkpoint of this project, or damaged"),
    (lambda c: c["state"]["embed.weight"].mul_(2), "odd.pt: not a checkpoint of this project, or damaged"),
    (lambda c: c["task"].update(max_new_tokens=512), "leaves no room for a prompt beside 512 new ones")])
def test_checkpoints_whose_fields_are_not_what_they_should_be(change, says, work, tmp_path):
    edited(work, tmp_path / "odd.pt", change)
    refused(tmp_path, "bon", "--model", "odd.pt", says=says)


def test_damaged_and_hostile_checkpoints_are_refused(work, tmp_path):
    good = (work / "ckpt_sft.pt").read_bytes()

    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'owned')!r}, 'w')",))
    torch.save({"kind": "lm", "state": Evil()}, tmp_path / "evil.pt")
    torch.save({"kind": "lm"}, tmp_path / "keys.pt")
    word = good.index(b"guitar")        # one bit of the tokenizer's words: torch reads such a file without a word
    for name, content in (("cut", good[:len(good) // 2]), ("text", b"hello"), ("empty", b""),
                          ("bit", good[:word] + b"e" + good[word + 1:])):
        (tmp_path / f"{name}.pt").write_bytes(content)
    assert torch.load(tmp_path / "bit.pt", weights_only=True)
    for name in ("evil", "keys", "cut", "text", "empty", "bit"):
        refused(tmp_path, "bon", "--model", f"{name}.pt",
                says=[f"{name}.pt", "not a checkpoint of this project, or damaged"])
    assert not (tmp_path / "owned").exists()


def test_the_hash_of_weights_names_their_bytes_and_names():
    x = {"a": torch.arange(4.), "b": torch.zeros(0)}
    assert weights_hash(x) == weights_hash({"b": torch.zeros(0), "a": torch.arange(4.)})
    assert len({weights_hash(y) for y in (x, {"c": x["a"]}, {"a": x["a"] + 1}, {"a": x["a"].double()})}) == 4


def test_a_reward_model_with_a_shorter_context_is_refused(work, tmp_path):
    edited(work, tmp_path / "long.pt", lambda c: c["config"].update(context=1024))
    refused(tmp_path, "bon", "--model", "long.pt", "--reward", work / "ckpt_reward.pt",
            says="its context of 512 is shorter than the policy's 1024")


# ------------------------------------------------------------------------------------------- numbers that are none

def test_numbers_that_are_not_finite_stop_sampling_scoring_and_rollouts(work):
    policy, _ = load_checkpoint(work / "ckpt_sft.pt", "lm")
    reward_model, _ = load_checkpoint(work / "ckpt_reward.pt", "reward")
    reward_model.head.bias.data.fill_(torch.inf)
    with pytest.raises(UserError, match="the reward model's score of a response is not finite"):
        reward.score(reward_model, [[1, 2]], [[[3, 4]]])
    with pytest.raises(UserError, match="rollout: a log-probability, a value or a reward is not finite"):
        ppo.rollout(policy, policy, reward_model, reward_model, [[1, 2]], 3, 0, 1., torch.Generator().manual_seed(0))
    policy.norm.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="sampling: the model's logits are not finite"):
        generate(policy, [[1, 2]], 3)


def test_a_gradient_that_is_not_finite_stops_the_run(work, tmp_path, monkeypatch):
    monkeypatch.setattr(common.dist, "clip_grad_norm", lambda params, limit: torch.tensor(float("inf")))
    (tmp_path / "ckpt_sft.pt").write_text("old")
    with pytest.raises(UserError, match="step 1: the gradient is not finite; lower --lr"):
        stage("sft", work, tmp_path)
    assert (tmp_path / "ckpt_sft.pt").read_text() == "old"


def test_a_result_that_is_not_finite_is_not_saved(work, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "validation_loss", lambda *_: float("nan"))
    with pytest.raises(UserError, match="validation_loss of the trained model is not finite: lower --lr"):
        stage("sft", work, tmp_path, rows=8)
    assert not (tmp_path / "ckpt_sft.pt").exists()


def test_a_policy_that_runs_away_stops_and_explains(work, tmp_path):
    with pytest.raises(UserError, match="run away.*raise --kl-coef"):
        stage("ppo", work, tmp_path, lr=0.05, kl_coef=0., kl_target=0., kl_stop=5.)
    assert not (tmp_path / "ckpt_ppo.pt").exists()


# ------------------------------------------------------------------------------------------------ runs cut short

def written(folder):
    """What a stage wrote: names of weights, sample files, metrics without times."""
    content, drop = {}, ("seconds", "tokens_per_second", "peak_mb")
    for path in sorted(folder.iterdir()):
        if path.suffix == ".pt":
            content[path.name] = torch.load(path, weights_only=True)["weights_hash"]
        else:
            content[path.name] = [{k: v for k, v in row.items() if k not in drop} for row in json_lines(path)]
    return content


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_cut_at_any_step_goes_on_to_the_same_result(name, work, tmp_path, monkeypatch, capfd):
    stage(name, work, tmp_path / "whole")
    assert not list((tmp_path / "whole").glob("*.resume")) and not list((tmp_path / "whole").glob("*.lock"))
    save, cut = Run.save_state, []

    def cut_short(self, step):
        save(self, step)
        if step not in cut:             # at every step once, after the state, before anything else
            cut.append(step)
            raise KeyboardInterrupt
    monkeypatch.setattr(Run, "save_state", cut_short)
    while True:
        try:
            stage(name, work, tmp_path / "cut")
            break
        except KeyboardInterrupt:       # as a kill would leave it: after a line of a step that is done again
            for path in (tmp_path / "cut").glob("metrics_*.jsonl"):
                path.write_text(path.read_text() + '{"step": 9, "lo')
    assert len(cut) >= 3 and written(tmp_path / "cut") == written(tmp_path / "whole")
    assert "going on after step 2" in capfd.readouterr().out


def stopped(name, work, out, monkeypatch, **flags):
    """Runs a stage up to its first state."""
    save = Run.save_state

    def stop(self, step):
        save(self, step)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "save_state", stop)
        stage(name, work, out, **flags)


def test_a_state_of_other_flags_is_kept(work, tmp_path, monkeypatch, capfd):
    stopped("sft", work, tmp_path, monkeypatch)
    stage("sft", work, tmp_path, lr=5e-4)
    assert "other flags or inputs: starting anew, it is now ckpt_sft.resume.old" in capfd.readouterr().out
    # moved back, the run with the old flags goes on from it; smaller parts are no other flags
    (tmp_path / "ckpt_sft.resume.old").rename(tmp_path / "ckpt_sft.resume")
    stage("sft", work, tmp_path, micro_batch_size=2, recompute=True)
    assert "going on after step 1" in capfd.readouterr().out


def test_a_damaged_state_is_no_state(work, tmp_path, monkeypatch):
    stopped("sft", work, tmp_path, monkeypatch)
    good = (tmp_path / "ckpt_sft.resume").read_bytes()
    bit = good.index(b"optimizer")
    for damaged in (b"PK\x03\x04 torn", good[:bit] + b"O" + good[bit + 1:]):
        (tmp_path / "ckpt_sft.resume").write_bytes(damaged)
        with pytest.raises(UserError, match="damaged state .*remove it to start anew"):
            stage("sft", work, tmp_path)


def test_a_run_neither_replaces_its_own_start_nor_shares_its_files(work, tmp_path, monkeypatch):
    shutil.copy(work / "ckpt_sft.pt", tmp_path)
    refused(tmp_path, "sft", "--model", "ckpt_sft.pt", "--rows", "16",
            says=["--model ckpt_sft.pt: the result would replace it", "--out ckpt_sft2.pt"])
    monkeypatch.setattr(files, "LOCK_SECONDS", .3)
    with held_by_another_process(tmp_path / "ckpt_a.lock"):
        refused(tmp_path, "sft", "--model", "ckpt_sft.pt", "--rows", "16", "--out", "ckpt_a.pt",
                says="ckpt_a.lock: another process still writes here")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_the_state_and_say_where(number, work, tmp_path):
    command = [sys.executable, str(ROOT / "ppo.py"), "--model", str(work / "ckpt_sft.pt"), "--reward",
               str(work / "ckpt_reward.pt"), "--steps", "200", "--batch", "8", "--out", str(tmp_path), "--quiet"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "metrics_ppo.jsonl").is_file():
        time.sleep(0.05)
        assert running.poll() is None
    running.send_signal(number)
    assert running.wait(timeout=60) == 128 + number
    said = running.stderr.read()
    assert "ckpt_ppo.resume holds the state" in said and "Traceback" not in said
    assert torch.load(tmp_path / "ckpt_ppo.resume", weights_only=True)["step"] >= 1
