"""Each script end to end at toy size, resuming, and every wrong input of the scripts: one line, exit status 2, nothing
overwritten."""
import dataclasses
import gzip
import importlib
import json
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
from common import files, flags
from common.checkpoint import load_checkpoint
from common.errors import UserError
from common.loop import Run
from common.tokenizer import build_tokenizer, load_tokenizer, same_ids
from conftest import ROOT, call, held_by_another_process, json_lines, refused
from methods import dpo, grpo
from tasks import annotators


def test_sft_learns(work):
    steps = json_lines(work / "metrics_sft.jsonl")
    assert steps[-1]["validation_loss"] < 3.0       # ln 377 = 5.9 before
    _, saved = load_checkpoint(work / "ckpt_sft.pt", "lm")
    assert saved["metrics"]["validation_loss"] == pytest.approx(steps[-1]["validation_loss"], rel=1e-4)


def test_ppo_log_is_flat_complete_and_starts_at_ratio_one(work):
    steps = json_lines(work / "metrics_ppo.jsonl")
    assert len(steps) == 3
    assert {"reward", "gold_reward", "kl", "kl_k3", "ratio", "pg_clipfrac", "v_clipfrac", "entropy",
            "explained_variance", "eos_rate", "length",
            "tokens_per_second", "peak_mb"} <= set(steps[0])
    # fp32: the same forward pass, before anything was learned
    assert all(abs(s["ratio_first"] - 1) < 1e-5 for s in steps)
    # the policy is the reference at first, and then is not
    assert steps[0]["kl"] == 0 and steps[2]["kl"] != 0


def test_reward_model_is_normalised_on_held_out_responses(work):
    """Folding mean and std into the head gives the held-out scores mean 0 and std 1."""
    model, saved = load_checkpoint(work / "ckpt_reward.pt", "reward")
    prompts, responses = [[5, 6, 7]] * 4, [[[i, i + 1, 300]] for i in range(4)]
    scores = [s for group in reward.score(model, prompts, responses) for s in group]
    reward.normalise(model, scores)
    again = torch.tensor(reward.score(model, prompts, responses))
    assert abs(again.mean()) < 1e-4 and abs(again.std(correction=0) - 1) < 1e-4
    assert {"accuracy", "accuracy_gap1", "longer_wins", "accuracy_gold"} <= set(saved["metrics"])


def test_scores_do_not_depend_on_batching(work):
    model, _ = load_checkpoint(work / "ckpt_reward.pt", "reward")
    prompts, responses = [[5, 6, 7], [8]], [[[i, 300] for i in range(11)], [[9, 9, 300]] * 2]
    torch.testing.assert_close(sum(reward.score(model, prompts, responses), []),
                               sum(reward.score(model, prompts, responses, batch_size=1, packed_together=1), []),
                               atol=1e-5, rtol=0)


def test_sample_files_follow_the_contract(work):
    for policy, scored in (("sft", True), ("bon", True), ("ppo", False)):
        rows = json_lines(work / f"samples_{policy}_test.jsonl")
        assert len(rows) == 6 and {"id", "prompt", "reference", "outputs", "rewards", "policy", "split",
                                   "temperature", "seed", "task"} <= set(rows[0])
        assert all(len(r["outputs"]) == 4 and (r["rewards"] is None or len(r["rewards"]) == 4)
                   and (r["rewards"] is not None) == scored for r in rows)
    sft_rows, bon_rows = (sum(sum(json.loads(x)["rewards"])
                              for x in (work / f"samples_{p}_test.jsonl").read_text().splitlines())
                              for p in ("sft", "bon"))
    assert bon_rows > sft_rows


def test_measurements_read_what_the_stages_wrote(work):
    files = sorted(work.glob("samples_*_test.jsonl")) + sorted(work.glob("samples_*_ood_article.jsonl"))
    got = call("generalisation", *files, "--out", work, cwd=work)
    assert got.returncode == 0 and "head to head" in got.stdout, got.stderr
    assert len(json.loads((work / "generalisation.json").read_text())["win_rate"]) == 6
    for judge in ("rouge", work / "ckpt_reward.pt"):
        got = call("generalisation", *files, "--judge", judge, "--out", work, cwd=work)
        assert got.returncode == 0, got.stderr
    # labelled: judged by the model trained against
    assert "bon*" in got.stdout and "ppo*" in got.stdout and "sft*" not in got.stdout
    got = call("diversity", *files, cwd=work)
    assert got.returncode == 0 and "gold" in got.stdout and "Vendi" in got.stdout, got.stderr
    assert call("diversity", *files, "--convention", "paper", "--encoder", "", cwd=work).returncode == 0


def test_same_seed_same_result_other_seed_other(work, tmp_path):
    once, again, other = (work / "ckpt_ppo.pt", tmp_path / "again.pt", tmp_path / "other.pt")
    for path, seed in ((again, 0), (other, 1)):
        ppo.main(ppo.Config(model=str(work / "ckpt_sft.pt"), reward=str(work / "ckpt_reward.pt"), steps=3,
                            batch_size=16, out=str(path), seed=seed, quiet=True, threads=1))
    hashes = [load_checkpoint(p, "lm")[1]["weights_hash"] for p in (once, again, other)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_log_replaces_no_data(work, tmp_path):
    (tmp_path / "train.jsonl").write_text("data")
    stage("reward", work, tmp_path / "train.pt")
    assert (tmp_path / "train.jsonl").read_text() == "data" and json_lines(tmp_path / "metrics_train.jsonl")


def test_frozen_trunk_stays_and_is_shared(work, tmp_path):
    model, _ = load_checkpoint(work / "ckpt_sft.pt", "lm")
    ppo.main(ppo.Config(model=str(work / "ckpt_sft.pt"), reward=str(work / "ckpt_reward.pt"), steps=1,
                        batch_size=8, freeze=0.8, out=str(tmp_path), quiet=True, threads=1))
    tuned, _ = load_checkpoint(tmp_path / "ckpt_ppo.pt", "lm")
    same = {n: torch.equal(a, b) for (n, a),
            (_, b) in zip(model.named_parameters(), tuned.named_parameters())}
    assert same["embed.weight"] and same["blocks.2.mlp.up.weight"] and not same["blocks.3.mlp.up.weight"]


@pytest.mark.parametrize("script, flags", [(ppo, dict(batch_size=6)), (grpo, dict(batch_size=6, n=2))])
def test_a_pass_has_as_many_optimizer_steps_as_minibatches(script, flags, work, tmp_path, monkeypatch):
    """Six rollouts in four parts: 2 + 2 + 1 + 1, not three parts of two."""
    rows_of_step, step = [], Run.step_optimizer

    def counted(self, *params, rows):
        rows_of_step.append(len(rows))
        return step(self, *params, rows=rows)
    monkeypatch.setattr(Run, "step_optimizer", counted)
    script.main(script.Config(model=str(work / "ckpt_sft.pt"), reward=str(work / "ckpt_reward.pt"), steps=1, epochs=1,
                              minibatches=4, out=str(tmp_path), quiet=True, threads=1, **flags))
    assert rows_of_step == [2, 2, 1, 1]


def test_a_value_model_of_other_depth_is_frozen_in_the_same_part():
    policy = M.GPT(M.GPTConfig(vocab_size=20, n_layer=4, n_head=2, d_model=8, frozen=3))
    for depth, frozen in ((4, 3), (2, 1), (8, 6)):
        reward_model = M.GPT(M.GPTConfig(vocab_size=20, n_layer=depth, n_head=2, d_model=8), scalar=True)
        assert ppo.make_value_model(policy, reward_model).config.frozen == frozen


def test_a_run_that_ran_out_of_memory_goes_on_in_smaller_parts(work, tmp_path, monkeypatch, capfd):
    save, cut = Run.save_state, []

    def cut_short(self, step):
        save(self, step)
        if not cut:
            cut.append(step)
            raise KeyboardInterrupt
    monkeypatch.setattr(Run, "save_state", cut_short)
    with pytest.raises(KeyboardInterrupt):
        stage("reward", work, tmp_path)
    capfd.readouterr()
    stage("reward", work, tmp_path, micro_batch_size=2, recompute=True)
    assert "going on after step 1" in capfd.readouterr().out


def test_gold_reward_and_adaptive_beta(work, tmp_path):
    ppo.main(ppo.Config(model=str(work / "ckpt_sft.pt"), reward="gold", kl_target=1e-4, kl_horizon=8,
                        steps=3, batch_size=8, out=str(tmp_path), quiet=True,
                        threads=1))
    steps = json_lines(tmp_path / "metrics_ppo.jsonl")
    assert steps[0]["reward"] == steps[0]["gold_reward"]
    # the log has the beta that a step used: the first one's is --kl-coef
    assert steps[0]["beta"] == ppo.Config.kl_coef != steps[2]["beta"]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


@pytest.fixture
def folder(tmp_path):
    """A --data folder of toy rows, real schema: other fields, no validation preferences."""
    text = "the cat sat on the mat and then it left the house again".split()
    rows = [{"prompt": f"POST: {' '.join(text[i % 7:])} {i}\nTL;DR:",
             "reference": " ".join(text[i % 5:i % 5 + 4]), "extra": i} for i in range(40)]
    for name in ("train", "validation", "test", "ood_far"):
        write(tmp_path / f"{name}.jsonl", rows)
    write(tmp_path / "preferences.jsonl",
          [{"prompt": r["prompt"], "chosen": r["reference"], "rejected": "no no no no"} for r in rows])
    return tmp_path


def test_the_four_stages_run_on_a_folder(folder, capfd):
    same = dict(quiet=True, threads=1, out=str(folder))
    sft.main(sft.Config(data=str(folder), epochs=4, max_new_tokens=12, **same))
    reward.main(reward.Config(model=str(folder / "ckpt_sft.pt"), epochs=3, **same))
    assert "held out" in capfd.readouterr().out
    ppo.main(ppo.Config(model=str(folder / "ckpt_sft.pt"), reward=str(folder / "ckpt_reward.pt"), steps=2,
                        batch_size=8, **same))
    bon.main(bon.Config(model=str(folder / "ckpt_sft.pt"), reward=str(folder / "ckpt_reward.pt"), inputs=5,
                        n=3, **same))
    assert {p.name for p in folder.glob("samples_*")} == {f"samples_{p}_{s}.jsonl" for p in ("sft", "bon")
                                                          for s in ("test", "ood_far")}
    got = call("generalisation", *folder.glob("samples_*"), cwd=folder)
    # no synthetic prompts: the judge falls back, and says so
    assert got.returncode == 0 and "ROUGE" in got.stdout, got.stderr
    assert load_checkpoint(folder / "ckpt_reward.pt", "reward")[1]["metrics"]["accuracy"] > .9


def test_wrong_input(work, tmp_path_factory):
    w = tmp_path_factory.mktemp("wrong")
    for name in ("ckpt_sft.pt", "ckpt_reward.pt"):
        shutil.copy(work / name, w)
    shutil.copy(work / "samples_sft_test.jsonl", w)
    refused(w, "ppo", "--model", "nope.pt", says=["nope.pt", "python sft.py"])
    refused(w, "sft", "--model", "no/such/model", says=["--model no/such/model", "not a hub name"])
    refused(w, "sft", "--model", ".", says="without config.json")
    for name in ("sft", "reward", "ppo", "bon"):
        refused(w, name, "--model", "", says="--model is empty: name a checkpoint")
    refused(w, "sft", "--context", "1", says="room for a prompt beside 32 new ones: give a new model a larger")
    refused(w, "sft", "--context", "99", "--max-new-tokens", "99", says="new ones: lower --max-new-tokens")
    refused(w, "sft", "--shape", "llama-7b", "--rows", "9", says=["--shape llama-7b: ", "parameters take ", "smaller"])
    refused(w, "ppo", "--kl-horizon", "10", "--kl-target", "3",
            says=["--kl-horizon 10: it must be at least the 64 rollouts"])
    refused(w, "ppo", "--kl-target", "3", "--kl-coef", "0", says="--kl-target: it multiplies beta, so --kl-coef")
    refused(w, "ppo", "--minibatches", "65", says="--minibatches 65: a batch of 64 rollouts")
    refused(w, "methods.grpo", "--minibatches", "9", says="--minibatches 9: a batch of 8 prompts")
    for name in ("ppo", "methods.grpo"):
        refused(w, name, "--reward", "", says="--reward is empty: name a checkpoint")
    for name in ("sft", "ppo", "methods.dpo", "methods.grpo"):
        few = {"sft": ["--rows", "9"], "methods.dpo": ["--prompts", "2", "--held-out", "2", "--samples", "1"]}
        refused(w, name, "--model", "ckpt_sft.pt", "--freeze", "1", *few.get(name, []), says="freeze")
    refused(w, "sft", "--model", "ckpt_sft.pt", "--context", "64", "--shape", "gpt2",
            says="--shape, --context: of a model from scratch, and --model ckpt_sft.pt has its own")
    refused(w, "sft", "--rows", "9", "--tokenizer", "nope", says=["--tokenizer nope: no such", "words", "gpt2"])
    refused(w, "bon", "--independent", "--pool", "256", says="--independent is about best-of-N")
    for name in ("a/b", "../x", ".x"):
        refused(w, "bon", "--policy", name, says=f"--policy {name}: it names files")
    refused(w, "sft", "--epochs", "0", says="error: --epochs 0: it must be an integer of at least 1")
    refused(w, "sft", "--preset", "nope", says=["'nope'", "small-llama"])
    refused(w, "sft", "--dtype", "fp8", says=["--dtype fp8", "bf16"])
    refused(w, "sft", "--task", "tldr", "--data", ".", says=["tldr_3_filtered", "train.jsonl"])
    refused(w, "tools.chat_judge", "samples_sft_test.jsonl", says="OPENAI_API_KEY is not set")
    refused(w, "reproduce", "--task", "tldr", "--size", "huge", says=["--size huge", "gpu"])
    refused(w, "reproduce", "--task", "tldr", "--seeds", "1", says="2 are needed")
    refused(w, "bon", "--reward", "nope.pt", says="python reward.py --model ckpt_sft.pt")
    refused(w, "ppo", "--model", "ckpt_reward.pt", says=["kind 'reward'", "'lm'"])
    refused(w, "bon", "--n", "0", says="--n 0")
    refused(w, "bon", "--temperature", "-1", says="0 (greedy), or a number from 0.01")
    refused(w, "bon", "--splits", "nope", says=["'nope'", "ood_article"])
    refused(w, "ppo", "--temperature", "0", says="a number from 0.01 to 100")
    refused(w, "ppo", "--kl-in-reward", "k3", says="--kl-in-reward")
    refused(w, "sft", "--task", "nope", says="--task nope")
    refused(w, "bon", "--temprature", "1", says=["--temprature", "bon.py --help"])
    refused(w, "bon", "--n", "many", says="invalid int value: 'many'")
    refused(w, "sft", "--data", "nowhere", says="no such folder")
    refused(w, "generalisation", says="no sample files")
    refused(w, "generalisation", "samples_sft_test.jsonl", "samples_sft_test.jsonl", says="already read")
    refused(w, "diversity", "nope.jsonl", says="no such file")


def test_wrong_data(folder):
    good = (folder / "train.jsonl").read_text()
    for broken, says in (("{\n", "line 41: not JSON in one line"),
                         ('{"prompt": "x"}\n', "line 41: field 'reference' is missing"),
                         ('[1]\n', "line 41: a JSON object"),
                         ('{"prompt": "x", "reference": 3}\n',
                          "line 41: field 'reference' must be of type str")):
        (folder / "train.jsonl").write_text(good + broken)
        refused(folder, "sft", "--data", folder, says=["train.jsonl", says])
    (folder / "train.jsonl").write_bytes(good.encode() + b'{"prompt": "\xff"}\n')
    refused(folder, "sft", "--data", folder, says="line 41: not UTF-8 text (byte 0xff")
    damaged = bytearray(gzip.compress(good.encode() * 20))
    damaged[20] ^= 0x55
    (folder / "train.jsonl").unlink()
    for content in (bytes(damaged), gzip.compress(good.encode())[:-9], b"no gzip at all"):
        (folder / "train.jsonl.gz").write_bytes(content)
        refused(folder, "sft", "--data", folder, says=["train.jsonl.gz", "damaged"])
    (folder / "train.jsonl.gz").unlink()
    (folder / "train.jsonl").write_text("")
    refused(folder, "sft", "--data", folder, says="train.jsonl: no rows")
    (folder / "train.jsonl").unlink()
    refused(folder, "sft", "--data", folder, says=["train.jsonl is missing; wanted are train.jsonl, valid",
                                                   "there are ood_far.jsonl, preferences.jsonl, test.jsonl"])
    for path in folder.iterdir():
        path.unlink()
    refused(folder, "sft", "--data", folder, says="train.jsonl is missing; wanted are")
    (folder / "train.csv").write_text("prompt,reference\n")
    refused(folder, "sft", "--data", folder, says="there are train.csv")
    (folder / "train.jsonl").write_text(good)
    refused(folder, "sft", "--data", folder, says=["validation.jsonl is missing", "train.csv, train.jsonl"])
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(good.encode()))
    refused(folder, "sft", "--data", folder, says="both train.jsonl and train.jsonl.gz are there; remove")


def test_every_script_says_what_a_folder_lacks_and_what_it_holds(work, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.csv").write_text("prompt,reference\n")
    model = work / "ckpt_sft.pt"
    for name, lacks in (("sft", "train.jsonl is missing"), ("ppo", "train.jsonl is missing"),
                        ("methods.grpo", "train.jsonl is missing"), ("reward", "no preferences.jsonl"),
                        ("methods.dpo", "no preferences.jsonl"), ("bon", "no test.jsonl and no ood_<name>.jsonl"),
                        ("splits", "no splits")):
        needs = [] if name == "splits" else ["--model", model]
        needs += ["--reward", work / "ckpt_reward.pt"] if name in ("ppo", "methods.grpo") else []
        refused(tmp_path, name, *needs, "--data", "data", says=["--data data: ", lacks, "there are train.csv"])


def test_prompts_of_train_in_another_split_are_counted(folder, capfd):
    rows = json_lines(folder / "train.jsonl")
    write(folder / "test.jsonl", [*rows[:3], rows[0] | {"prompt": "POST: another\nTL;DR:"}])
    write(folder / "ood_far.jsonl", [rows[0] | {"prompt": "POST: far\nTL;DR:"}])
    sft.main(sft.Config(data=str(folder), quiet=True, threads=1, out=str(folder)))
    said = capfd.readouterr().out
    assert "3 of 4 prompts of test stand in train too" in said and "40 of 40 prompts of validation" in said
    assert "ood_far" not in said


def test_splits_may_have_spaces_and_fewer_prompts_than_asked_for_are_said(work, tmp_path):
    got = call("bon", "--model", work / "ckpt_sft.pt", "--splits", "test, ood_words50", "--inputs", "2", "--n",
               "2", "--quiet", cwd=tmp_path)
    assert got.returncode == 0 and len(json_lines(tmp_path / "samples_sft_ood_words50.jsonl")) == 2
    splits = bon.read_test_sets(bon.task_of(bon.Config()), "test", 5000)
    assert len(splits["test"]) == 1000


def edited(work, path, change):
    """The SFT checkpoint with its dict changed."""
    saved = torch.load(work / "ckpt_sft.pt", weights_only=True)
    change(saved)
    torch.save(saved, path)
    return path


@pytest.mark.parametrize("change, says", [
    (lambda c: c.update(args=None), "damaged: its args"),
    (lambda c: c.update(tokenizer=[]), "damaged: its tokenizer"),
    (lambda c: c["tokenizer"].clear(), "--tokenizer None: no such tokenizer"),
    (lambda c: c["tokenizer"].update(pattern="("), "its pattern '(' cannot be read"),
    (lambda c: c["task"].update(data=-1), "the checkpoint's task is damaged: data"),
    (lambda c: c["config"].update(norm_eps={}), "odd.pt: not a checkpoint of this project, or damaged"),
    (lambda c: c["config"].update(rope_scaling=-1), "odd.pt: not a checkpoint of this project, or damaged"),
    (lambda c: c["task"].update(later=1), "task is of another version of this code"),
    (lambda c: c["task"].update(name="nope"), "--task nope: choose from")])
def test_checkpoints_whose_fields_are_not_what_they_should_be(change, says, work, tmp_path):
    edited(work, tmp_path / "odd.pt", change)
    refused(tmp_path, "bon", "--model", "odd.pt", says=says)


def test_no_room_for_a_prompt_is_said_by_every_stage(work, tmp_path):
    edited(work, tmp_path / "full.pt", lambda c: c["task"].update(max_new_tokens=512))
    for name in ("reward", "ppo", "bon", "methods.dpo", "methods.grpo"):
        reward_model = ["--reward", work / "ckpt_reward.pt"] if name in ("ppo", "methods.grpo") else []
        refused(tmp_path, name, "--model", "full.pt", *reward_model,
                says="leaves no room for a prompt beside 512 new ones: lower --max-new-tokens (a flag of sft.py")


def test_prompts_of_the_synthetic_task_are_cut_for_annotators_too(work, tmp_path, capfd):
    model, saved = load_checkpoint(work / "ckpt_sft.pt", "lm")
    model.config.context = 48
    task, tokenizer = bon.task_of(reward.Config(), saved), load_tokenizer(saved["tokenizer"])
    groups = annotators.sample_groups(model, tokenizer, task, task.rows("train", 4), 2, torch.Generator().manual_seed(0))
    assert groups and all(len(group.prompt) <= 48 - task.max_new_tokens for group in groups)
    assert "cut on the left" in capfd.readouterr().out


def test_annotators_who_like_what_is_typical(work):
    """With a dial turned up far the likelier response a token is preferred, whatever the gold reward says."""
    model, saved = load_checkpoint(work / "ckpt_sft.pt", "lm")
    task, tokenizer = bon.task_of(reward.Config(), saved), load_tokenizer(saved["tokenizer"])

    def liked(a):
        groups = annotators.sample_groups(model, tokenizer, task, task.rows("train", 6), 3,
                                      torch.Generator().manual_seed(0), a)
        typical = [annotators.mean_log_probs(model, g.prompt, g.responses) for g in groups]
        return [t[winner] > t[loser] for g, t in zip(groups, typical) for winner, loser in g.pairs]
    assert all(liked(1e4)) and .2 < sum(liked(0.)) / len(liked(0.)) < .8
    packed = M.pack([[5, 6]], [[[7, 8, 9]]])
    logp = M.log_probs(model, model(packed), packed).mean().item()
    assert annotators.mean_log_probs(model, [5, 6], [[7, 8, 9]]) == pytest.approx([logp])


def test_pairs_are_sampled_once_and_change_nothing(work, tmp_path):
    flags = ("--model", work / "ckpt_sft.pt", "--prompts", "20", "--held-out", "8", "--samples", "2", "--quiet")
    pairs = ("--pairs", tmp_path / "pairs.jsonl")
    logs = []
    for out, more in (("plain", ()), ("writes", pairs), ("reads", pairs)):
        assert call("reward", *flags, *more, "--out", tmp_path / f"ckpt_{out}.pt", cwd=tmp_path).returncode == 0
        step = json_lines(tmp_path / f"metrics_{out}.jsonl")[-1]
        logs.append({k: v for k, v in step.items() if k not in ("seconds", "peak_mb")})
    assert logs[0] == logs[1] == logs[2]
    refused(tmp_path, "reward", *flags, *pairs, "--seed", "1", says="pairs are of another model or of other flags")
    whole = (tmp_path / "pairs.jsonl").read_text()
    (tmp_path / "pairs.jsonl").write_text("".join(whole.splitlines(keepends=True)[:-1]))
    refused(tmp_path, "reward", *flags, *pairs, says=["pairs.jsonl: cut short", "of 28 prompts"])
    (tmp_path / "pairs.jsonl").write_text(whole.replace("group", "grope"))
    refused(tmp_path, "methods.dpo", *flags, *pairs, says="pairs.jsonl: these are not pairs that reward.py wrote")


def test_a_reward_model_with_a_shorter_context_is_refused(work, tmp_path):
    edited(work, tmp_path / "long.pt", lambda c: c["config"].update(context=1024))
    for name in ("ppo", "bon", "methods.grpo"):
        refused(tmp_path, name, "--model", "long.pt", "--reward", work / "ckpt_reward.pt",
                says="its context of 512 is shorter than the policy's 1024")


def test_held_out_prompts_that_are_learned_from_are_counted(folder, capfd):
    shutil.copy(folder / "preferences.jsonl", folder / "preferences_validation.jsonl")
    sft.main(sft.Config(data=str(folder), quiet=True, threads=1, out=str(folder)))
    config = reward.Config(model=str(folder / "ckpt_sft.pt"), quiet=True, threads=1, out=str(folder))
    reward.main(config)
    said = capfd.readouterr().out
    assert "40 prompts with held-out preferences have preferences to learn from too" in said
    assert "40 prompts with pairs to learn from, 40 held out" in said and "no preferences_validation" not in said
    (folder / "preferences_validation.jsonl").unlink()
    reward.main(dataclasses.replace(config, held_out=3))
    said = capfd.readouterr().out
    assert "nothing is learned from the last 4 prompts of preferences.jsonl, 3 of which are tested on" in said
    assert "36 prompts with pairs to learn from, 3 held out" in said


def test_an_allocation_beyond_the_free_memory_fails_instead_of_the_machine(monkeypatch):
    resource = flags.resource
    if not flags.Path("/proc/self/statm").is_file():
        pytest.skip("Linux only: elsewhere the system says nothing about free memory")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    monkeypatch.setattr(flags, "free_memory", lambda: 2 ** 28)
    try:
        flags.limit_memory()
        with pytest.raises((RuntimeError, MemoryError)) as error:
            torch.empty(2 ** 30, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    assert flags._out_of_memory(error.value)


def test_memory_that_is_not_there_is_named_before_and_after(capfd, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="m: 1,000,000,000,000 parameters take 3725.3 GB, and this machine has .* free"):
        flags.check_memory(10 ** 12, 4, "m")
    flags.check_memory(10, 4, "m")
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
                  RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: x")):
        def out_of_memory(*_, raised=error, **__):
            raise raised
        monkeypatch.setattr(sft, "main", out_of_memory)
        got = call("sft", cwd=tmp_path)
        assert got.returncode == 2 and "lower --micro-batch-size" in got.stderr and got.stderr.count("\n") == 1


def test_pairs_that_are_one_text_after_cutting_are_dropped_and_counted(capfd):
    """The difference stands behind the cut: nothing to learn, and no pair to be right or wrong about."""
    tokenizer = load_tokenizer(build_tokenizer(["one two three four"] * 9))
    rows = [{"prompt": "p", "chosen": "one two three four", "rejected": "one two three one"},
            {"prompt": "p", "chosen": "two one", "rejected": "one two three four"}]
    group, = reward.read_groups(tokenizer, rows, 50, 3)
    assert "1 of 2 pairs dropped: their two responses are the same 3 tokens" in capfd.readouterr().out
    winner, loser = group.pairs[0]
    scores = [[0.] * len(group.responses)]
    scores[0][winner] = 1.
    assert len(group.pairs) == 1 and reward.accuracy([group], scores)["accuracy"] == 1
    assert reward.read_groups(tokenizer, rows[:1], 50, 3) == []


def test_numbers_that_are_not_finite_stop_sampling_scoring_and_rollouts(work):
    policy, _ = load_checkpoint(work / "ckpt_sft.pt", "lm")
    judge, _ = load_checkpoint(work / "ckpt_reward.pt", "reward")
    judge.head.bias.data.fill_(torch.inf)
    with pytest.raises(UserError, match="the reward model's score of a response is not finite"):
        reward.score(judge, [[1, 2]], [[[3, 4]]])
    with pytest.raises(UserError, match="rollout: a log-probability, a value or a reward is not finite"):
        ppo.rollout(policy, policy, judge, judge, [[1, 2]], 3, 0, 1., torch.Generator().manual_seed(0))
    policy.norm.weight.data.fill_(torch.nan)
    with pytest.raises(UserError, match="sampling: the model's logits are not finite"):
        M.generate(policy, [[1, 2]], 3)


def test_a_run_without_a_step_writes_nothing(work, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "sft_loss", lambda logp, n: logp.sum() * torch.nan)
    with pytest.raises(UserError, match="no step was taken|were not finite"):
        sft.main(sft.Config(model=str(work / "ckpt_sft.pt"), rows=24, quiet=True, threads=1, out=str(tmp_path)))
    assert not (tmp_path / "ckpt_sft.pt").exists()


def test_a_run_that_fails_before_its_first_line_leaves_the_old_log(work, tmp_path, monkeypatch):
    (tmp_path / "metrics_sft.jsonl").write_text('{"step": 1, "loss": 7.0, "seconds": 1.0}\n')

    def fails(*_):
        raise UserError("stop")
    monkeypatch.setattr(sft, "sft_loss", fails)
    with pytest.raises(UserError, match="stop"):
        sft.main(sft.Config(model=str(work / "ckpt_sft.pt"), rows=24, quiet=True, threads=1, out=str(tmp_path)))
    assert json_lines(tmp_path / "metrics_sft.jsonl")[0]["loss"] == 7


def test_a_result_that_is_not_finite_is_not_saved(work, tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "validation_loss", lambda *_: float("nan"))
    with pytest.raises(UserError, match="validation_loss of the trained model is not finite: lower --lr"):
        sft.main(sft.Config(model=str(work / "ckpt_sft.pt"), rows=24, quiet=True, threads=1, out=str(tmp_path)))
    assert not (tmp_path / "ckpt_sft.pt").exists()


def test_where_no_bar_is_drawn_the_time_left_is_said_early(work, tmp_path, capfd):
    sft.main(sft.Config(model=str(work / "ckpt_sft.pt"), rows=160, threads=1, out=str(tmp_path)))
    said = [line for line in capfd.readouterr().out.splitlines() if line.endswith(" left")]
    assert len(said) == 2 and said[0].startswith("sft: step 1 of 20 after ") and "step 10 of 20" in said[1]


def test_the_log_s_table_fits_a_terminal(work, tmp_path, capfd):
    ppo.main(ppo.Config(model=str(work / "ckpt_sft.pt"), reward=str(work / "ckpt_reward.pt"), steps=2,
                        batch_size=8, threads=1, out=str(tmp_path)))
    lines = [line for line in capfd.readouterr().out.splitlines() if "eos_rate" in line or line[:6].strip().isdigit()]
    assert lines[0].split()[:3] == ["step", "reward", "gold_reward"] and len(lines) == 3
    assert max(map(len, lines)) <= 110 and lines[1].split()[0] == "1" and "beta" in lines[0].split()
    assert len(set(map(len, lines))) == 1 and "1.0000" in lines[1].split()     # in columns; ratio_first
    assert "v_norm" in json_lines(tmp_path / "metrics_ppo.jsonl")[0]


def test_a_chat_template_makes_no_other_tokenizer():
    spec = {"kind": "bpe", "json": "x", "eos": 1, "bos": None, "kept": {"chat_template": "a"}}
    assert same_ids(spec, spec | {"kept": {}}) and same_ids(spec, {k: v for k, v in spec.items() if k != "kept"})
    assert not same_ids(spec, spec | {"bos": 0})


def test_different_tokenizers_are_refused(work, folder):
    sft.main(sft.Config(data=str(folder), quiet=True, threads=1, out=str(folder)))
    for name, flag in (("ppo", "--model"), ("bon", "--model")):
        refused(folder, name, flag, "ckpt_sft.pt", "--reward", work / "ckpt_reward.pt",
                says="different tokenizers")


def test_long_prompts_are_cut_on_the_left_and_counted(folder, capfd):
    rows = json_lines(folder / "train.jsonl")
    rows[3]["prompt"] = "far " * 300 + rows[3]["prompt"]
    write(folder / "train.jsonl", rows)
    sft.main(sft.Config(data=str(folder), context=64, max_new_tokens=16, quiet=True, threads=1,
                        out=str(folder)))
    assert "1 of 40 train prompts are longer than 48 tokens: cut on the left" in capfd.readouterr().out


def test_damaged_and_hostile_checkpoints_are_refused(work, tmp_path):
    good = (work / "ckpt_sft.pt").read_bytes()

    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'owned')!r}, 'w')",))
    torch.save({"kind": "lm", "state": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "cut.pt").write_bytes(good[:len(good) // 2])
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"kind": "lm"}, tmp_path / "keys.pt")
    for name in ("evil", "cut", "text", "empty", "keys"):
        refused(tmp_path, "bon", "--model", f"{name}.pt",
                says=[f"{name}.pt", "not a checkpoint of this project, or damaged"])
    assert not (tmp_path / "owned").exists()
    # one bit of the tokenizer's words: torch reads such a file without a word
    word = good.index(b"guitar")
    (tmp_path / "bit.pt").write_bytes(good[:word] + b"e" + good[word + 1:])
    assert torch.load(tmp_path / "bit.pt", weights_only=True)
    refused(tmp_path, "bon", "--model", "bit.pt", says=["bit.pt", "or damaged"])


def test_a_run_neither_replaces_its_own_start_nor_shares_its_files(work, tmp_path, monkeypatch):
    shutil.copy(work / "ckpt_ppo.pt", tmp_path)
    own = ["--model", "ckpt_ppo.pt", "--reward", work / "ckpt_reward.pt"]
    refused(tmp_path, "ppo", *own, says=["--model ckpt_ppo.pt: the result would replace it", "--out ckpt_ppo2.pt"])
    monkeypatch.setattr(files, "LOCK_SECONDS", .3)
    with held_by_another_process(tmp_path / "ckpt_sft.lock"):
        refused(tmp_path, "sft", "--rows", "160", says="ckpt_sft.lock: another process still writes here")
    stage("sft", work, tmp_path)
    assert not (tmp_path / "ckpt_sft.lock").exists()


def test_writes_are_whole_or_not_at_all(tmp_path, monkeypatch):
    files.atomic_write(tmp_path / "x", b"old")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        files.atomic_write(tmp_path / "x", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() == b"old"


@pytest.mark.parametrize("name",
                         ["sft", "reward", "ppo", "bon", "generalisation", "diversity", "splits", "reproduce",
                          "study.shift", "study.proxies", "methods.dpo", "methods.grpo", "tools.convert",
                          "tools.chat_judge", "tools.bench", "tools.budget", "tools.show"])
def test_help_names_every_flag_with_its_meaning(name, tmp_path):
    got = call(name, "--help", cwd=tmp_path)
    assert got.returncode == 0 and not list(tmp_path.iterdir())
    for flag in ("--task", "--data", "--seed", "--out", "--device"):
        assert flag in got.stdout
    config = importlib.import_module(name).Config
    assert set(config.__dataclass_fields__) <= set(flags.help_of(config)), "a field without a help comment"


STAGES = {  # script: its flags but --model, --reward and --out
    "sft": (sft, dict(rows=160, context=256)), "reward": (reward, dict(prompts=24, held_out=8, log_every=1)),
    "ppo": (ppo, dict(steps=4, batch_size=8, kl_target=2.0)), "bon": (bon, dict(inputs=2, n=2, pool=4)),
    "dpo": (dpo, dict(prompts=24, held_out=8, log_every=1)),
    "grpo": (grpo, dict(steps=4, batch_size=4, n=3)),
}


def stage(name, work, out, **flags):
    """Runs a stage of the synthetic task from the session's checkpoints; save_every=0: a state after each
    step."""
    script, fixed = STAGES[name]
    inputs = {} if name == "sft" else {"model": str(work / "ckpt_sft.pt")}
    if name in ("ppo", "bon", "grpo"):
        inputs["reward"] = str(work / "ckpt_reward.pt")
    script.main(script.Config(quiet=True, threads=1, save_every=0., out=str(out), **inputs, **fixed | flags))


def written(folder):
    """What a stage wrote: names of weights, sample files, metrics without times."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".pt":
            found[path.name] = torch.load(path, weights_only=True)["weights_hash"]
        else:
            drop = ("seconds", "tokens_per_second", "peak_mb")
            found[path.name] = [{k: v for k, v in json.loads(line).items() if k not in drop}
                                for line in path.read_text().splitlines()]
    return found


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_cut_at_any_step_goes_on_to_the_same_result(name, work, tmp_path, monkeypatch, capfd):
    stage(name, work, tmp_path / "whole")
    assert not list((tmp_path / "whole").glob("*.resume"))
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
        except KeyboardInterrupt:       # as a kill would leave it: with a torn line behind the last
            for path in (tmp_path / "cut").glob("metrics_*.jsonl"):
                with open(path, "a") as f:
                    f.write('{"step": 1, "lo')
    assert len(cut) >= 3 and written(tmp_path / "cut") == written(tmp_path / "whole")
    assert "going on after step 2" in capfd.readouterr().out


def test_a_state_of_other_flags_or_a_damaged_one(work, tmp_path, monkeypatch, capfd):
    real = Run.save_state

    def stop(self, step):
        real(self, step)
        raise KeyboardInterrupt
    for _ in range(2):
        monkeypatch.setattr(Run, "save_state", stop)
        with pytest.raises(KeyboardInterrupt):
            stage("ppo", work, tmp_path)
    monkeypatch.setattr(Run, "save_state", real)
    stage("ppo", work, tmp_path, lr=5e-4)
    assert "other flags or inputs: starting anew, it becomes ckpt_ppo.resume.old" in capfd.readouterr().out
    # moved back, the run with the old flags goes on from it
    (tmp_path / "ckpt_ppo.resume.old").rename(tmp_path / "ckpt_ppo.resume")
    stage("ppo", work, tmp_path)
    assert "going on after step 2" in capfd.readouterr().out
    monkeypatch.setattr(Run, "save_state", stop)
    with pytest.raises(KeyboardInterrupt):
        stage("ppo", work, tmp_path)
    monkeypatch.setattr(Run, "save_state", real)
    good, before = ((tmp_path / f"ckpt_ppo.{kind}").read_bytes() for kind in ("resume", "pt"))
    bit = good.index(b"steps_taken")
    for damaged in (b"PK\x03\x04 torn", good[:bit] + b"S" + good[bit + 1:]):
        (tmp_path / "ckpt_ppo.resume").write_bytes(damaged)
        with pytest.raises(UserError, match="damaged state .*remove it to start anew"):
            stage("ppo", work, tmp_path)
    assert (tmp_path / "ckpt_ppo.pt").read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_the_state_and_say_where(number, work, tmp_path):
    command = [sys.executable, str(ROOT / "ppo.py"), "--model", str(work / "ckpt_sft.pt"), "--reward",
               str(work / "ckpt_reward.pt"), "--steps", "200", "--batch", "8", "--out", str(tmp_path),
               "--quiet"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "metrics_ppo.jsonl"
    while not log.is_file() or not log.stat().st_size:
        time.sleep(0.05)
        assert running.poll() is None
    running.send_signal(number)
    assert running.wait(timeout=60) == 128 + number
    said = running.stderr.read()
    assert "ckpt_ppo.resume holds the state" in said and "Traceback" not in said
    assert torch.load(tmp_path / "ckpt_ppo.resume", weights_only=True)["step"] >= 1


def test_gradients_that_are_not_finite_are_skipped_then_stop_the_run(work, tmp_path, monkeypatch, capfd):
    real, calls = common.dist.clip_grad_norm, []

    def sick(weights, limit):
        calls.append(1)
        return torch.tensor(float("nan")) if len(calls) == 2 else real(weights, limit)
    monkeypatch.setattr(common.dist, "clip_grad_norm", sick)
    stage("sft", work, tmp_path / "once")
    assert "step 2: the gradient is not finite, skipped; rows" in capfd.readouterr().out
    monkeypatch.setattr(common.dist, "clip_grad_norm", lambda w, limit: torch.tensor(float("inf")))
    with pytest.raises(UserError, match="10 gradients in a row"):
        stage("sft", work, tmp_path / "always")
    assert not (tmp_path / "always/ckpt_sft.pt").exists()


def test_a_policy_that_runs_away_stops_and_explains(work, tmp_path):
    with pytest.raises(UserError, match="run away.*raise --kl-coef"):
        stage("ppo", work, tmp_path, lr=0.05, kl_coef=0., kl_target=0., kl_stop=5.)
    assert not (tmp_path / "ckpt_ppo.pt").exists()
