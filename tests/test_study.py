"""The study: its runner, its plan, and what it says of its numbers."""
import copy
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import model as M
from common import files
from common.checkpoint import load_checkpoint
from common.errors import UserError
from common.samples import read_samples
from common.stats import over_seeds
from conftest import ROOT, held_by_another_process, refused
from splits import encode_prompts, encode_response
from study import claims, frontier, measures, pipeline, stages
from study.pipeline import Stage


# ------------------------------------------------------------------------------------------------- the runner

def append(path, text):
    with open(path, "a") as f:
        f.write(text)


class InThisProcess:
    """A pool of processes, without the seconds that a new one takes to start."""

    def __init__(self, *args):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def submit(self, function, *args):
        future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(pipeline, "ProcessPoolExecutor", InThisProcess)


def toy_stages(folder, *edges, seconds=1.):
    """Stages that write their name into folder/order.  edges: "name" or "name: what it needs"."""
    out = []
    for edge in edges:
        name, _, needs = edge.partition(": ")
        work = partial(append, folder / "order", f"{name}\n")
        out.append(Stage(name, tuple(needs.split()), (), seconds, work))
    return out


def test_stages_run_once_each_after_what_they_need_and_are_skipped_later(tmp_path):
    todo = toy_stages(tmp_path, "a/base", "a/far: a/base", "a/end: a/far", "b", "c: a/base b")
    pipeline.run_stages(todo, tmp_path, jobs=2)
    order = (tmp_path / "order").read_text().split()
    assert sorted(order) == sorted(stage.name for stage in todo)
    assert all(order.index(need) < order.index(stage.name) for stage in todo for need in stage.needs)
    mark = json.loads((tmp_path / "a/end.done").read_text())
    assert mark["seconds"] >= 0 and mark["processor_seconds"] >= 0 and "commit" in mark
    assert pipeline.origin(todo, tmp_path)["cost"]["stages"] == 5


def test_what_needs_a_stage_is_done_after_it_anew(tmp_path, here):
    todo = toy_stages(tmp_path, "a", "b: a", "c: b", "d")
    pipeline.run_stages(todo, tmp_path)
    (tmp_path / "b.done").unlink()              # and with it c's
    pipeline.run_stages(todo, tmp_path)
    assert (tmp_path / "order").read_text().split()[4:] == ["b", "c"]
    (tmp_path / "a").mkdir()
    pipeline.run_stages(todo, tmp_path, anew=True)
    assert (tmp_path / "order").read_text().split() == ["a", "b", "c", "d"] and not (tmp_path / "a").exists()


def test_a_resumed_run_says_whose_code_its_stages_are_of(tmp_path, capsys, monkeypatch, here):
    todo = toy_stages(tmp_path, "a", "b: a")
    pipeline.run_stages(todo[:1], tmp_path)
    pipeline.run_stages(todo[:1], tmp_path)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(pipeline, "commit", lambda: "fedcba9876")
    pipeline.run_stages(todo, tmp_path)
    said = capsys.readouterr().out
    assert "1 of 2 stages" in said and "this is fedcba9876" in said and "--anew" in said
    assert (tmp_path / "order").read_text().split() == ["a", "b"]        # and it keeps them all the same
    of_a = str(pipeline.mark_of(todo[0], tmp_path)["commit"])
    assert pipeline.origin(todo, tmp_path)["commit"] == ", ".join(sorted([of_a, "fedcba9876"]))


def test_a_mark_counts_only_for_its_inputs_and_while_its_files_stand(tmp_path):
    (tmp_path / "script.py").write_text("import sys; open(sys.argv[1], 'a').write('x')")
    made = tmp_path / "made"

    stage = Stage("s", (), ("made",), 1, [sys.executable, str(tmp_path / "script.py"), str(made)], "--flag data")
    assert pipeline.mark_of(stage, tmp_path) is None
    pipeline.do_stage(stage, tmp_path, "c")
    assert pipeline.mark_of(stage, tmp_path)["commit"] == "c" and made.read_text() == "x"
    assert pipeline.mark_of(stage._replace(inputs="--other data"), tmp_path) is None
    made.write_text("")             # cut
    assert pipeline.mark_of(stage, tmp_path) is None
    made.write_text("x")
    assert pipeline.mark_of(stage, tmp_path)
    made.unlink()
    assert pipeline.mark_of(stage, tmp_path) is None


def test_a_stage_leaves_files_by_patterns_and_in_folders(tmp_path):
    (tmp_path / "t1").mkdir()
    for path in ("t1/a.jsonl", "t1/b.jsonl", "samples_sft_x.jsonl", "other"):
        append(tmp_path / path, path)
    stage = Stage("s", (), ("t1/*", "samples_*.jsonl"), 1, time.time)
    mark = pipeline.do_stage(stage, tmp_path, None)
    assert mark["left"] == {"t1/a.jsonl": 10, "t1/b.jsonl": 10, "samples_sft_x.jsonl": 19}
    assert pipeline.mark_of(stage, tmp_path)
    (tmp_path / "t1/b.jsonl").unlink()
    assert pipeline.mark_of(stage, tmp_path) is None


def test_two_studies_do_not_share_a_folder(tmp_path, monkeypatch, here):
    monkeypatch.setattr(files, "LOCK_SECONDS", .3)
    with (held_by_another_process(tmp_path / "running.lock"),
          pytest.raises(UserError, match="running.lock: another process still writes here")):
        pipeline.run_stages(toy_stages(tmp_path, "a"), tmp_path)
    pipeline.run_stages(toy_stages(tmp_path, "a"), tmp_path)
    assert (tmp_path / "order").read_text() == "a\n"


def test_a_damaged_mark_is_no_mark_and_neither_is_that_of_what_needs_its_stage(tmp_path, here):
    todo = toy_stages(tmp_path, "first", "second: first")
    pipeline.run_stages(todo, tmp_path)
    for damage in ("", "{}", "[]", '{"left": null}'):
        (tmp_path / "first.done").write_text(damage)
        assert pipeline.mark_of(todo[0], tmp_path) is None and not pipeline.marks(todo, tmp_path)
    # a run that is cut after the first is done anew: the old mark of the second must not count
    cut = Stage("second", ("first",), (), 1., partial(append, tmp_path, "no file"))
    with pytest.raises(UserError, match="second: "):
        pipeline.run_stages([todo[0], cut], tmp_path)
    pipeline.run_stages(todo, tmp_path)
    assert (tmp_path / "order").read_text().split() == ["first", "second", "first", "second"]


def test_a_stage_that_fails_names_its_log(tmp_path, here):
    (tmp_path / "script.py").write_text("print('no good'); raise SystemExit(3)")
    stage = Stage("s", (), (), 1, [sys.executable, str(tmp_path / "script.py")])
    says = r"^s: ended with status 3: no good \(all of it: .*s\.log\)"
    with pytest.raises(UserError, match=says):
        pipeline.run_stages([stage], tmp_path)
    with pytest.raises(UserError, match="it ended without never"):
        pipeline.do_stage(Stage("t", (), ("never",), 1, time.time), tmp_path, None)


def test_processor_time_is_not_wall_time(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(1); sum(range(10**7))"]
    found = pipeline.do_stage(Stage("s", (), (), 1, command), tmp_path, None)
    assert found["processor_seconds"] > 0.05 and found["seconds"] > found["processor_seconds"] + 0.5


@pytest.mark.slow
def test_a_worker_stops_when_its_parent_is_killed(tmp_path):
    """Or it would race the run that resumes."""
    code = ("import sys, time; from functools import partial; from study.pipeline import Stage, run_stages\n"
            "if __name__ == '__main__':\n"
            "    run_stages([Stage('s', (), (), 1, [sys.executable, '-c', sys.argv[2]])], sys.argv[1])\n")
    (tmp_path / "parent.py").write_text(code)
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py"), str(tmp_path), child],
                              env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < until
        time.sleep(.1)
    pid = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    while time.monotonic() < until:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        time.sleep(.1)
    else:
        pytest.fail("the stage still runs")


# --------------------------------------------------------------------------------------------------- the plan

def test_the_plan_of_the_study():
    small, full = (stages.plan(stages.Recipe(), range(20, 25), "runs/x", also) for also in (False, True))
    of_small, of_full = ([stage.name for stage in plan] for plan in (small, full))
    for i, stage in enumerate(full):    # what a stage needs stands before it
        assert set(stage.needs) <= set(of_full[:i])
    assert set(of_small) < set(of_full) and len(of_full) == len(set(of_full))
    assert not [name for name in of_small if "independent" in name]
    assert {"seed21/synthetic/ppo_b0.3", "seed24/synthetic/dpo_b0.3", "seed22/synthetic-independent/ppo"
            } <= set(of_full) - set(of_small)
    assert not [name for name in of_full if "independent" in name and "ppo_" in name]
    assert "seed20/synthetic/shift" in of_full and "seed21/synthetic/shift" not in of_full
    # what --full and the default run may cost, in seconds of one thread of a Zen 4
    assert sum(stage.seconds for stage in full) <= 200 * 60
    assert sum(stage.seconds for stage in small) * 2 / 5 / 2 <= 10 * 60


@pytest.mark.slow
def test_sft_keeps_what_the_base_model_knows_of_words_it_does_not_meet(tmp_path):
    """Its embeddings and half of its layers are the base model's to the last bit; the reward model trains
    all."""
    recipe = replace(stages.QUICK, base_rows=64, sft_rows=64, prompts=24, held_out=4)
    trial = stages.Trial(recipe, 0, tmp_path, "synthetic")
    trial.here.mkdir(parents=True)
    for train in (trial.pretrain, trial.train_sft, trial.train_reward):
        train()
    (base, _), (policy, _) = (load_checkpoint(trial.checkpoint(name), "lm", name) for name in ("base", "sft"))
    reward_model, _ = load_checkpoint(trial.checkpoint("reward"), "reward", "reward")

    def changed(model):
        kept = base.state_dict()
        return {name for name, p in model.state_dict().items()
                if not name.startswith("head") and not torch.equal(p, kept[name])}
    assert {name.split(".")[1] for name in changed(policy) if name.startswith("blocks")} == {"2", "3"}
    assert "embed.weight" not in changed(policy) and "embed.weight" in changed(reward_model)
    assert reward_model.config.frozen == 0 and policy.config.frozen == 2


@pytest.mark.slow
def test_a_killed_study_goes_on_to_the_same_results(tmp_path):
    def start(name):
        out = open(tmp_path / "said", "a")
        (tmp_path / name).mkdir(exist_ok=True)
        command = [sys.executable, str(ROOT / "reproduce.py"), "--quick", "--seeds", "1"]
        return subprocess.Popen(command, stdout=out, stderr=out, cwd=tmp_path / name)
    unbroken, killed = start("unbroken"), start("killed")
    marks = partial((tmp_path / "killed").rglob, "*.done")
    while len(list(marks())) < 4:
        time.sleep(.2)
        assert killed.poll() is None, (tmp_path / "said").read_text()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    done = {p: p.stat().st_mtime_ns for p in marks()}
    again = start("killed")
    for process in (unbroken, again):
        assert process.wait(timeout=900) == 0, (tmp_path / "said").read_text()
    assert all(p.stat().st_mtime_ns == t for p, t in done.items())       # what was done was not done again
    first, second = (json.loads((tmp_path / name / "runs/quick/results.json").read_text())
                     for name in ("unbroken", "killed"))
    n_stages = len(stages.plan(stages.QUICK, (0,), ""))
    assert first.pop("cost")["stages"] == second.pop("cost")["stages"] == n_stages
    assert json.dumps(first) == json.dumps(second)          # text, because nan is not nan
    assert [p.name for p in (tmp_path / "killed").iterdir()] == ["runs"]


def test_wrong_flags(tmp_path):
    refused(tmp_path, "reproduce", "--inputs", "3", says="--inputs 3: it must be an integer of at least 8")
    refused(tmp_path, "reproduce", "--model", "gpt2", says="needs --task or --data")
    refused(tmp_path, "reproduce", "--task", "tldr", "--full", says="belong to the synthetic study")
    refused(tmp_path, "reproduce", "--quick", "--out", ROOT / "results", says="would replace the committed")


# ------------------------------------------------------------------------------------------------ the numbers

def estimate(low, high, n_seeds=5):
    return {"low": low, "high": high, "per_seed": [0.] * n_seeds}


@pytest.mark.parametrize("expected, low, high, verdict", [
    ("more", .1, .3, "agrees"), ("more", -.3, -.1, "differs"), ("more", -.1, .3, "not shown"),
    ("less", .1, .3, "differs"), ("less", -.3, -.1, "agrees"), ("less", -.1, .3, "not shown"),
    ("same", -.04, .04, "agrees"), ("same", .06, .3, "differs"), ("same", -.3, -.06, "differs"),
    ("same", -.1, .04, "not shown"), ("same", .01, .3, "not shown"),
    ("not less", -.04, .3, "agrees"), ("not less", .06, .3, "agrees"), ("not less", -.3, -.06, "differs"),
    ("not less", -.1, .3, "not shown")])
def test_verdicts_follow_the_numbers(expected, low, high, verdict):
    """The same code must say the opposite if the numbers do, and nothing of few seeds."""
    assert claims.verdict([(expected, "", estimate(low, high))]) == verdict
    assert claims.verdict([(expected, "", estimate(low, high, 3))]) == "not shown"
    assert claims.verdict([(expected, "", estimate(None, None, 1))]) == "not shown"


def test_a_claim_of_several_differences():
    agrees, differs, neither = (("more", "", estimate(*ends)) for ends in ((.1, .2), (-.2, -.1), (-.1, .1)))
    assert claims.verdict([]) == "open"
    assert claims.verdict([agrees, agrees]) == "agrees" and claims.verdict([agrees, neither]) == "not shown"
    assert claims.verdict([agrees, neither, differs]) == "differs"
    assert claims.verdict([agrees, ("more", "", None)]) == "not shown"      # nothing could be measured


class ToyMeasures(measures.Measures):
    """Five seeds of 20 prompts.  Every number of a policy is its level, minus .1 out of distribution, with
    noise of the seed."""
    tasks, seeds = ("synthetic",), range(5)

    def __init__(self, levels):
        self.levels, self.lines = levels, {}

    def get(self, task, policy, split, temperature, measure):
        noise = np.random.default_rng(len(policy)).normal(0, .005, (5, 20))
        return self.levels[policy] - .1 * (split != "test") + noise

    def ranked_rightly(self, task, policy, split):
        return self.get(task, policy, split, None, None)


@pytest.mark.parametrize("ppo, wins, loses", [(.8, "agrees", "differs"), (.3, "differs", "agrees")])
def test_claims_turn_with_the_numbers(ppo, wins, loses):
    levels = {"sft": .5, "sft_matched": .5, "bon": .6, "ppo": ppo}
    beta = {key: {m: over_seeds(np.full((5, 20), .1)) for m in ("wins", "ead", "embedding", "gold_diversity")}
            for key in ("larger", "larger, k2")}
    beta["no penalty"] = {m: over_seeds(np.full((5, 20), x))
                          for m, x in (("reward", .3), ("gold_reward", ppo - .5))}
    rows = {row["claim"]: row for row in claims.claims(ToyMeasures(levels), beta)}

    def said(start):
        row, = (row for claim, row in rows.items() if claim.startswith(start))
        return row["verdict"]
    assert said("RLHF beats SFT") == wins and said("best-of-16 beats RLHF") == loses
    assert said("best-of-16 beats SFT") == "agrees" and said("PPO is more than sharpening") == wins
    assert said("per input RLHF is far less") == said("PPO loses gold diversity") == loses
    assert said("the generalisation gaps") == "agrees" and said("NLI diversity") == "differs"
    assert said("the reward model is nearly") == "differs"
    assert said("a larger KL coefficient lowers diversity") == "differs"
    assert said("without a KL penalty PPO over-optimises") == loses
    assert {row["verdict"] for row in rows.values() if "instructions" in row["claim"]} == {"open"}
    without = {row["claim"]: row for row in claims.claims(ToyMeasures(levels))}
    assert without["a larger KL coefficient lowers performance"]["verdict"] == "open"


def test_agreement_counts_pairs_ranked_alike():
    """Of three pairs: one alike, one tied by the scores, one the other way; gold ties are left out."""
    gold, scores = [[1., 2., 3.], [1., 1., 1.], [1., 1., 2.]], [[1., 1., 0.], [1., 2., 3.], [0., 5., 9.]]
    found = measures.agreement(scores, gold)
    assert found[[0, 2]] == pytest.approx([(.5 + 0 + 0) / 3, 1]) and np.isnan(found[1])


# ----------------------------------------------------------------------------------------------- the frontier

def test_kl_of_samples_is_the_mean_of_their_log_ratios(work):
    """Against one text at a time; a shared trunk changes nothing; a policy is at distance 0 from itself."""
    policy, tokenizer, task = measures.load_with_task(work / "ckpt_ppo.pt", "lm")
    ref_policy, *_ = measures.load_with_task(work / "ckpt_sft.pt", "lm")
    rows = read_samples(work / "samples_ppo_test.jsonl")
    frozen = copy.deepcopy(ref_policy).freeze(policy.config.frozen)

    def kl(policy, ref_policy, temperature):
        return frontier.sampled_kl(copy.deepcopy(policy), ref_policy, tokenizer, task, rows, temperature)

    @torch.no_grad()
    def log_prob(model, prompt, response, temperature=1.):
        logits = model.head(model(M.plain([prompt + response])))[0, len(prompt) - 1:-1] / temperature
        return logits.log_softmax(-1)[range(len(response)), response].sum().item()
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows], task.max_prompt_len(512))
    texts = [(prompt, encode_response(tokenizer, text, task.max_new_tokens, finished))
             for prompt, row in zip(prompts, rows) for text, finished in zip(row["outputs"], row["finished"])]
    for temperature in (1., .7):
        naive = np.mean([log_prob(policy, *text, temperature) - log_prob(ref_policy, *text) for text in texts])
        assert kl(policy, ref_policy, temperature) == pytest.approx(naive, abs=1e-4)
        assert kl(policy, frozen, temperature) == pytest.approx(naive, abs=1e-4)
    assert kl(ref_policy, ref_policy, 1.) == 0


@pytest.mark.parametrize("wins, expected", [(.7, .2), (.5, 0.), (.2, -.3)])
def test_the_frontier_compares_at_equal_diversity(wins, expected):
    """Two seeds: SFT wins .6 at diversity .2 and .4 at .8; PPO wins `wins` at diversity .5."""
    def line(curve, knob, diversity, wins):
        return {"curve": curve, "knob": knob, "kl": diversity, "wins": [wins] * 10,
                "gold_diversity": [diversity] * 10}
    lines = [line("SFT", .2, .2, .6), line("SFT", 1., .8, .4), line("PPO", .1, .5, wins)]
    cold, warm, ppo = frontier.points_of([{"points": lines}] * 2).values()
    e = frontier.vs(ppo, [cold, warm], "gold_diversity", "wins")
    assert e["mean"] == pytest.approx(expected) and e["inside"]
    # SFT's points at the roots .447 and .894 of KL, PPO's at .707: SFT would win .484 there
    by_kl = frontier.vs(ppo, [cold, warm], "root_kl", "wins")
    assert by_kl["mean"] == pytest.approx(wins - .48377, abs=1e-4)
    assert not frontier.vs(warm, [cold, ppo], "gold_diversity", "wins")["inside"]
    near, = frontier.points_of([{"points": [line("PPO", .1, -.01, wins)]}]).values()
    assert (near["root_kl"] == 0).all()         # an estimate below 0 is no complex number


def test_ppo_is_no_peer_where_it_over_optimises():
    points = [{"gold_reward": np.array([r, r + .1])} for r in (1., 2., 3., 2.5, 1.5)]
    assert frontier.up_from_best(points) == points[2:]


def test_every_point_has_a_stage_that_samples_it():
    """The plan of --full leaves the sample file of every point of the frontier."""
    left = {path for stage in stages.plan(stages.QUICK, (0,), "", True) for path in stage.leaves}
    for curve, _, policy, folder in frontier.points():
        path = f"seed0/synthetic/{folder}"
        assert f"{path}/*" in left or f"{path}/samples_{policy}_test.jsonl" in left, (curve, policy)
    assert len({(curve, knob) for curve, knob, *_ in frontier.points()}) == len(frontier.points())
