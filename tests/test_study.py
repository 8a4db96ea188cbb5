"""The study: its runner, what it says of its numbers, its tables and pictures, and the study of a published
model."""
import copy
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import model as M
import ppo
import reward
import sft
from common import files, pretrained
from common.checkpoint import load_checkpoint
from common.errors import UserError
from common.samples import read_samples
from common.stats import over_seeds
from conftest import ROOT, held_by_another_process, json_lines, refused
from study import claims, figures, frontier, growth, names, pipeline, published, report, stages
from study.frontier import Frontier
from study.pipeline import Stage
from test_pretrained import LLAMA, REFS, value


# ------------------------------------------------------------------------------------------------- the runner

def append(path, text):
    with open(path, "a") as f:
        f.write(text)


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
    assert mark["seconds"] >= 0 and mark["processor_seconds"] >= 0
    assert pipeline.cost(todo, tmp_path)["stages"] == 5
    (tmp_path / "a/far.done").unlink()          # and with it what needs it
    pipeline.run_stages(todo, tmp_path)
    assert (tmp_path / "order").read_text().split()[5:] == ["a/far", "a/end"]


def test_a_mark_counts_only_for_its_command_and_while_its_files_stand(tmp_path):
    (tmp_path / "script.py").write_text("import sys; open(sys.argv[1], 'a').write('x')")
    made = tmp_path / "made"

    def stage(*flags):
        command = [sys.executable, str(tmp_path / "script.py"), str(made), *flags]
        return Stage("s", (), ("made",), 1, command)
    assert pipeline.mark_of(stage(), tmp_path) is None
    pipeline.do_stage(stage(), tmp_path)
    assert pipeline.mark_of(stage(), tmp_path) and made.read_text() == "x"
    assert pipeline.mark_of(stage("--other"), tmp_path) is None
    assert pipeline.mark_of(stage()._replace(inputs="other data"), tmp_path) is None
    made.write_text("")             # cut
    assert pipeline.mark_of(stage(), tmp_path) is None
    made.write_text("x")
    assert pipeline.mark_of(stage(), tmp_path)
    made.unlink()
    assert pipeline.mark_of(stage(), tmp_path) is None


def test_a_stage_leaves_files_by_patterns_and_in_folders(tmp_path):
    (tmp_path / "t1").mkdir()
    for path in ("t1/a.jsonl", "t1/b.jsonl", "samples_sft_x.jsonl", "other"):
        append(tmp_path / path, path)
    stage = Stage("s", (), ("t1", "samples_*.jsonl"), 1, time.time)
    pipeline.do_stage(stage, tmp_path)
    assert pipeline.left_by(stage, tmp_path) == {"t1/a.jsonl": 10, "t1/b.jsonl": 10, "samples_sft_x.jsonl": 19}
    assert pipeline.mark_of(stage, tmp_path)
    (tmp_path / "t1/b.jsonl").unlink()
    assert pipeline.mark_of(stage, tmp_path) is None


def test_two_studies_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", .3)
    with (held_by_another_process(tmp_path / "running.lock"),
          pytest.raises(UserError, match="running.lock: another process still writes here")):
        pipeline.run_stages(toy_stages(tmp_path, "a"), tmp_path)
    pipeline.run_stages(toy_stages(tmp_path, "a"), tmp_path)
    assert (tmp_path / "order").read_text() == "a\n"


def test_a_damaged_mark_is_no_mark_and_what_needs_a_stage_is_done_after_it(tmp_path):
    """Cut between a stage that is done anew and the one behind it, the old mark behind must not count."""
    made = []
    first, second = (pipeline.Stage(name, needs, (), 1., partial(made.append, name))
                     for name, needs in (("first", ()), ("second", ("first",))))
    for stage in (first, second):
        pipeline.do_stage(stage, tmp_path)
    for damage in ("", "{}", "[]", '{"command": null}'):
        (tmp_path / "first.done").write_text(damage)
        assert pipeline.mark_of(first, tmp_path) is None and not pipeline.marks([first, second], tmp_path)
    pipeline.forget(pipeline.marks([first, second], tmp_path), [first, second], tmp_path)
    pipeline.do_stage(first, tmp_path)
    assert list(pipeline.marks([first, second], tmp_path)) == ["first"] and made == ["first", "second", "first"]



def test_a_stage_that_fails_names_its_log(tmp_path):
    (tmp_path / "script.py").write_text("print('no good'); raise SystemExit(3)")
    stage = Stage("s", (), (), 1, [sys.executable, str(tmp_path / "script.py")])
    says = r"^s: script.py ended with status 3: no good \(all of it: .*s\.log\)"
    with pytest.raises(UserError, match=says):
        pipeline.run_stages([stage], tmp_path)
    with pytest.raises(UserError, match="it ended without never"):
        pipeline.do_stage(Stage("t", (), ("never",), 1, time.time), tmp_path)
    with pytest.raises(ValueError, match="b needs a, which must stand before it"):
        pipeline.by_urgency(toy_stages(tmp_path, "b: a", "a"))


def test_processor_time_is_not_wall_time(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(1); sum(range(10**7))"]
    found = pipeline.do_stage(Stage("s", (), (), 1, command), tmp_path)
    assert found["processor_seconds"] > 0.05 and found["seconds"] > found["processor_seconds"] + 0.5


def test_time_left_plays_the_rest_through(tmp_path):
    """Two chains of 3 stages of 10 s on 2 workers: 30 s.  On one worker, 60 s."""
    todo = toy_stages(tmp_path, "a1", "a2: a1", "a3: a2", "b1", "b2: b1", "b3: b2", seconds=10.)
    order = pipeline.by_urgency(todo)
    left = partial(pipeline.time_left, order)
    assert left((), {}, 2, 1.) == 30 and left((), {}, 1, 1.) == 60 and left((), {}, 9, 1.) == 30
    assert left(("a1", "b1"), {"a2": 4.}, 2, 1.) == 20              # b's chain decides
    assert left(("a1", "a2", "a3", "b1"), {"b2": 4.}, 2, 2.) == 16 + 20
    assert left([s.name for s in todo], {}, 2, 1.) == 0
    # an overdue stage is never said to be done
    assert 0 < left(("a1", "a2", "b1", "b2", "b3"), {"a3": 99.}, 2, 1.) <= 1


def test_the_time_left_after_a_resume_goes_by_the_stages_not_by_the_bar(tmp_path):
    """9 of 10 stages were done by an earlier run at double the usual time: one stage is left, 2000 s."""
    todo = toy_stages(tmp_path, *map(str, range(10)), seconds=1000.)
    done = {str(i): {"seconds": 2000.} for i in range(9)}
    pace = pipeline.pace_of(todo, done, {})
    assert pace == pytest.approx(2, abs=.01)
    assert pipeline.time_left(pipeline.by_urgency(todo), done, {}, 2, pace) == pytest.approx(2000, rel=.01)
    assert pipeline.pace_of(todo, {}, {}) == 1
    assert pipeline.pace_of(todo, {}, {"0": 3000.}) == pytest.approx(3, abs=.05)       # overdue already
    assert [pipeline.duration(x) for x in (40, 725, 3900)] == ["40 s", "12 min", "1 h 05 min"]


def test_the_fingerprint_sees_settings_and_code(tmp_path, monkeypatch):
    for name in ("ppo.py", "study/names.py", "tests/test_x.py", "docs/x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(pipeline, "ROOT", tmp_path)
    names_of = [pipeline.fingerprint({"a": 1}), pipeline.fingerprint({"a": 2})]
    (tmp_path / "tests/test_x.py").write_text("2")
    assert pipeline.fingerprint({"a": 1}) == names_of[0]
    for name in ("ppo.py", "study/names.py"):
        (tmp_path / name).write_text("2")
        names_of.append(pipeline.fingerprint({"a": 1}))
    assert len(set(names_of)) == 4


def test_the_plan_of_the_study():
    folder = "runs/x"
    small, full = ([s.name for s in stages.plan(stages.QUICK, (0, 1), folder, also)]
                   for also in (False, True))
    assert set(small) < set(full) and len(full) == len(set(full))
    assert "seed1/synthetic/ppo_b0.3" in set(full) - set(small)
    assert "seed1/synthetic-independent/ppo_b0.3" not in full
    assert "seed0/instruct/shift" in full and "seed1/instruct/shift" not in full
    assert "seed0/synthetic-opt/ppo" in full
    assert {"seed1/synthetic/dpo_b0.3", "seed1/synthetic-independent/rloo_b0.1"} <= set(full)
    pipeline.by_urgency(stages.plan(stages.QUICK, (0, 1), folder, True))    # what a stage needs is in the plan


def test_sft_keeps_what_the_base_model_knows_of_words_it_does_not_meet(tmp_path):
    """Its embeddings and half of its layers are the base model's to the last bit; the reward model trains all."""
    trial = stages.Trial(replace(stages.QUICK, sft_rows=64, prompts=24, held_out=4), 0, tmp_path, "synthetic")
    trial.here.mkdir(parents=True)
    trial.pretrain("synthetic-mixed", 64)
    trial.train_sft()
    trial.train_reward()
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
    assert (tmp_path / "killed/runs/quick/figure.png").stat().st_size > 10_000
    assert "TOY SIZES" in (tmp_path / "killed/runs/quick/results.md").read_text()
    assert [p.name for p in (tmp_path / "killed").iterdir()] == ["runs"]
    said = (tmp_path / "said").read_text()
    assert "say nothing about the paper" in said and "the committed results" not in said


def test_wrong_flags(tmp_path):
    refused(tmp_path, "reproduce", "--inputs", "3", says="--inputs 3: it must be an integer of at least 8")
    refused(tmp_path, "reproduce", "--model", "gpt2", says="needs --task or --data too")
    refused(tmp_path, "reproduce", "--task", "tldr", "--full", says="belong to the synthetic study")


# ------------------------------------------------------------------------------------------------ the numbers

def test_verdicts_follow_the_numbers():
    """The same code must print the opposite if the numbers say so."""
    def e(low, high, n_seeds=5):
        return {"low": low, "high": high, "per_seed": [0.] * n_seeds}
    assert claims.verdict(e(.1, .3), 1) == "HOLDS"
    assert claims.verdict(e(.1, .3), -1) == "DOES NOT HOLD: the opposite"
    assert claims.verdict(e(-.3, -.1), -1) == "HOLDS"
    assert claims.verdict(e(-.1, .3), 1) == "NOT SHOWN"
    assert claims.verdict(e(-.1, .3, 2), 1) == "two seeds do not decide"
    assert claims.verdict(e(.1, .3, 2), 1) == "HOLDS"           # they do if their own interval says so
    assert claims.verdict(e(None, None, 1), 1) == "one seed does not decide"


@pytest.mark.parametrize("mean, verdict",
                         [(.5, claims.HOLDS), (-.5, claims.OPPOSITE), (0., claims.NOT_SHOWN)])
def test_counts_of_verdicts_turn_with_the_numbers(mean, verdict):
    e = over_seeds(np.random.default_rng(0).normal(mean, .1, (4, 50)))
    stated = [{"claim": "PPO beats SFT", "task": "synthetic", "estimate": e, "verdict": claims.verdict(e, 1)}]
    found = claims.seeds_matter(stated)
    every = (claims.HOLDS, claims.NOT_SHOWN, claims.OPPOSITE)
    assert found["verdicts"] == {v: int(v == verdict) for v in every}
    assert found["with_many_prompts"] == 1 and found["seeds_differ_most"]["seed_sd"] == e["seed_sd"]


def test_a_difference_that_the_seeds_make_is_decided_otherwise():
    """Every prompt says +0.1 or -0.05, seed by seed: over prompts that is above zero, over seeds it is
    not."""
    e = over_seeds(np.repeat([[.1], [-.05]], 50, axis=1) + np.random.default_rng(0).normal(0, .01, (2, 50)))
    claim = {"claim": "c", "task": "t"}
    found = claims.seeds_matter([claim | {"estimate": e, "verdict": claims.verdict(e, 1)}])
    assert found["decided_otherwise"] == [claim] and found["times_wider_in_the_median"] > 5


def test_tables_show_ranges_of_few_seeds_and_intervals_of_many():
    few, many = over_seeds(np.array([[.2, .4], [.4, .6]])), over_seeds(np.linspace(0, 1, 10).reshape(5, 2))
    assert report.cell(few) == "0.40 [0.30, 0.50]" and "range" in report.how_to_read(2)
    assert report.cell(many).startswith("0.50 [") and report.cell(many).endswith(f"± {many['seed_sd']:.2f}")
    assert report.ends(many) == (many["low"], many["high"])
    assert report.cell(over_seeds(np.array([[.2, .4]]))) == "0.30"
    assert figures.arms([few, over_seeds(np.array([[.2, .4]]))]) == pytest.approx(np.array([[.1, 0], [.1, 0]]))


def test_reviewers_numbers_count_beside_results_of_the_same_run_only(tmp_path):
    results = {"settings": {"seeds": [0]}, "study": "study-a"}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert report.read_numbers(tmp_path) == (results, None)
    for other, counts in ((results, True), (results | {"study": "study-b"}, False),
                          (results | {"settings": {"seeds": [1]}}, False)):
        (tmp_path / "reviewers.json").write_text(json.dumps(other))
        assert report.read_numbers(tmp_path) == (results, other if counts else None)


def test_slope_is_least_squares_over_the_range():
    x = np.array([0., 1., 2., 4.])
    assert growth.slope(x, .1 + .05 * x) == pytest.approx(.05 * 4)
    assert math.isnan(growth.slope(np.array([1., 1.]), np.array([0., 1.])))
    # all seeds and prompts alike, all sets on the line: no width
    rising = {"ppo": [np.full((3, 5), .1 + .05 * v) for v in x]}
    for of_all_sets in (False, True):
        found = growth.change(x, rising, of_all_sets)["ppo"]
        assert (found["mean"], found["low"], found["high"]) == pytest.approx((.2, .2, .2))


def test_the_slope_s_interval_holds_the_truth_where_one_set_lies_far():
    """Ten near sets and a far one, each off the line by its own; the truth is a slope of 0."""
    rng, x, held = np.random.default_rng(0), np.array([*np.linspace(0, .05, 10), .4]), 0
    for _ in range(100):
        off = rng.normal(0, .1, len(x))
        sets = [np.full((5, 1), y) + rng.normal(0, .02, (5, 1)) for y in off]
        found = growth.change(x, {"ppo": sets})["ppo"]
        held += found["low"] < 0 < found["high"]
    assert held >= 88


def test_slopes_are_counted_by_their_interval():
    def line(low, high, farthest):
        return {"ppo": {"low": low, "high": high}, "bon": {"low": -1, "high": 1}, "farthest": farthest}
    found = growth.counts([line(.1, .2, "b"), line(-.2, -.1, "a"), line(-.1, .1, "b")])
    assert found == {"counts": {"ppo": {"grows": 1, "shrinks": 1, "not shown": 1},
                                "bon": {"grows": 0, "shrinks": 0, "not shown": 3}}, "farthest": ["a", "b"]}


def test_kl_of_samples_is_the_mean_of_their_log_ratios(work):
    """Against one text at a time; a shared trunk changes nothing; a policy is at distance 0 from itself."""
    policy, tokenizer, task = frontier.load_with_task(work / "ckpt_ppo.pt", "lm")
    ref_policy, *_ = frontier.load_with_task(work / "ckpt_sft.pt", "lm")
    rows = read_samples(work / "samples_ppo_test.jsonl")
    frozen = copy.deepcopy(ref_policy).freeze(policy.config.frozen)

    def kl(policy, ref_policy, temperature):
        return frontier.sampled_kl(copy.deepcopy(policy), ref_policy, tokenizer, task, rows, temperature)

    @torch.no_grad()
    def log_prob(model, prompt, response, temperature=1.):
        logits = model.head(model(M.plain([prompt + response])))[0, len(prompt) - 1:-1] / temperature
        return logits.log_softmax(-1)[range(len(response)), response].sum().item()
    texts = [(prompt, response) for prompt, responses in zip(*frontier.encode_samples(tokenizer, task, rows, 512))
             for response in responses]
    assert M.share_trunk(copy.deepcopy(frozen), copy.deepcopy(policy))
    for temperature in (1., .7):
        naive = np.mean([log_prob(policy, *text, temperature) - log_prob(ref_policy, *text) for text in texts])
        assert kl(policy, ref_policy, temperature) == pytest.approx(naive, abs=1e-4)
        assert kl(policy, frozen, temperature) == pytest.approx(naive, abs=1e-4)
    assert kl(ref_policy, ref_policy, 1.) == 0


def fake_frontier(ppo_wins):
    """Two seeds: SFT wins .6 at diversity .2 and .4 at .8; PPO wins `ppo_wins` at diversity .5."""
    def line(policy, temperature, diversity, wins):
        return {"policy": policy, "temperature": temperature, "kl": diversity, "wins": [wins] * 10,
                "gold_diversity": [diversity] * 10}
    seed = [line("sft", .2, .2, .6), line("sft", 1., .8, .4), line("ppo", 1., .5, ppo_wins)]
    return Frontier([seed, seed])


def test_ppo_is_no_peer_where_it_over_optimises():
    reward = {0.: 1., .03: 2., .1: 3., .3: 2.5, 1.: 1.5}
    seed = [{"policy": names.ppo_name(b), "temperature": 1., "gold_reward": [r, r + .1]}
            for b, r in reward.items()]
    assert frontier.ppo_curve(Frontier([seed])) == [("ppo", 1.), ("ppo_b0.3", 1.), ("ppo_b1", 1.)]


@pytest.mark.parametrize("wins, expected", [(.7, .2), (.5, 0.), (.2, -.3)])
def test_frontier_compares_at_equal_diversity(wins, expected):
    e = fake_frontier(wins).beside(("ppo", 1.), [("sft", .2), ("sft", 1.)], "gold_diversity", "wins")
    # SFT's points at the roots .447 and .894 of KL, PPO's at .707: SFT would win .484 there
    by_kl = fake_frontier(wins).beside(("ppo", 1.), [("sft", .2), ("sft", 1.)], "root_kl", "wins")
    assert by_kl["mean"] == pytest.approx(wins - .48377, abs=1e-4)
    near = Frontier([[{"policy": "ppo", "temperature": 1., "kl": -.01, "wins": [wins]}]])
    assert near.get(("ppo", 1.), "root_kl") == 0     # an estimate below 0 is no complex number
    assert e["mean"] == pytest.approx(expected) and e["inside"]
    assert growth.direction(e) == {.2: "grows", -.3: "shrinks"}.get(expected, growth.direction(e))
    assert not fake_frontier(wins).beside(("sft", 1.), [("sft", .2), ("ppo", 1.)], "gold_diversity",
                                          "wins")["inside"]


def test_a_row_is_found_or_missed_loudly():
    rows = [{"a": 1, "b": 2}, {"a": 1, "b": 3}]
    assert names.pick(rows, a=1, b=3) is rows[1]
    for wanted in ({"a": 1}, {"a": 4}):
        with pytest.raises(KeyError, match="rows with"):
            names.pick(rows, **wanted)


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
