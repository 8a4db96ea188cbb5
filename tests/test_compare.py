"""Two runs side by side, and where reproduce.py writes: by hand on small results files."""
import json
from pathlib import Path

import pytest

import reproduce
from common.errors import UserError
from conftest import ROOT, call, refused
from study import compare, synthetic_study
from study.names import NOISE_OF

CLAIMS = ("PPO beats SFT in distribution", "best-of-16 beats PPO", "best-of-16 beats SFT")


def estimate(mean, half):
    ends = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "low": ends[0], "high": ends[1]}


def toy_results(seeds=(0, 1), verdicts=("HOLDS", "HOLDS", "HOLDS"), ppo=.9, half=.05, **settings):
    """results.json with three claims on systematic noise and the numbers that are compared."""
    claims = [{"claim": c, "task": "synthetic", "noise": NOISE_OF["synthetic"], "verdict": v}
              for c, v in zip(CLAIMS, verdicts)]
    rows = [dict(task=task, policy=policy, split="test") for task in NOISE_OF for policy in compare.COMPARED]
    wins = [row | {"temperature": .7} | estimate(ppo if row["policy"] == "ppo" else .4, half) for row in rows]
    varied = [row | {"temperature": 1., "measure": "per_input_gold_diversity"} | estimate(.5, half)
              for row in rows]
    return {"settings": {"inputs": 100, "instruct_base": [32768, 3]} | settings | {"seeds": list(seeds)},
            "claims": claims, "win_rate": wins, "diversity": varied}


def lines_of(here, there):
    return compare.of_runs(compare.outcome(here), compare.outcome(there))


def test_equal_runs_agree_in_everything():
    lines = lines_of(toy_results(), toy_results())
    assert lines[:3] == [
        "  the same seeds: 0, 1", "  the same recipe",
        "  verdicts of 3 claims: 3 agree, 0 differ, 0 wait for more seeds in one of the runs"]
    assert lines[-1] == "  12 of 12 values there lie inside the interval here"
    assert len(lines) == 3 + 1 + 6 + 1 and not any("outside" in line for line in lines)


def test_verdicts_that_differ_are_counted_and_named():
    here = toy_results(verdicts=("HOLDS", "NOT SHOWN", "two seeds do not decide"))
    lines = lines_of(here, toy_results())
    assert lines[2:5] == [
        "  verdicts of 3 claims: 1 agree, 1 differ, 1 wait for more seeds in one of the runs",
        "  there HOLDS; here NOT SHOWN", "    best-of-16 beats PPO (systematic noise)"]
    assert "there -> here" in lines[5]          # what waits for seeds is not listed
    assert lines_of(toy_results(), here)[3] == "  there NOT SHOWN; here HOLDS"
    here["claims"].pop()
    assert lines_of(here, toy_results())[2:4] == [
        "  verdicts of 2 claims: 1 agree, 1 differ, 0 wait for more seeds in one of the runs",
        "  claims that only one of the two runs has: 1"]


def test_values_outside_the_interval_here_are_marked():
    """PPO wins .90 there and .80 +- .05 here, for both kinds of noise: 2 of 12 numbers moved."""
    lines = lines_of(toy_results(ppo=.8), toy_results(ppo=.9))
    assert lines[-1] == "  10 of 12 values there lie inside the interval here"
    moved = [line for line in lines if "outside" in line]
    assert [line.split(",")[0].strip() for line in moved] == ["PPO", "PPO"]
    assert "0.90 -> 0.80 [0.75, 0.85] outside" in moved[0] and "0.50 -> 0.50 [0.45, 0.55] inside" in moved[0]


def test_one_seed_has_no_interval_to_lie_in():
    lines = lines_of(toy_results(seeds=[0], ppo=.8, half=None), toy_results())
    assert "  2 seeds there, 1 here" in lines and not any("side" in line for line in lines)
    assert lines[-1] == "  the values here are of one seed and have no interval"


def test_other_seeds_and_other_recipes_are_said():
    here = toy_results(seeds=[0, 1], inputs=12, quick=True)
    lines = lines_of(here, toy_results(seeds=range(5)))
    assert lines[0] == "  5 seeds there, 2 here"
    assert lines[1] == "  the recipes differ: inputs 100 there, 12 here; quick missing there, true here"
    assert lines_of(here, toy_results(seeds=[2, 3]))[0] == "  seeds 2, 3 there, 0, 1 here"
    assert lines_of(toy_results(seeds=[0, 1]), toy_results(seeds=[0]))[0] == "  1 seed there, 2 here"
    in_memory = toy_results(instruct_base=(32768, 3))       # a tuple before it is written, a list afterwards
    assert lines_of(in_memory, toy_results())[1] == "  the same recipe"


@pytest.mark.parametrize("content, says", [
    (None, "No such file"), (b"", "not the results"), (b'{"settings": {"seeds"', "not the results"),
    (b"\xff\xfe\xfa", "not the results"), (b"[1, 2]", "not the results"),
    (b'{"settings": 3}', "not the results"),
    (b'{"settings": {"seeds": []}, "claims": []}', "KeyError"),
    (json.dumps(toy_results() | {"win_rate": []}).encode(), "0 rows with"),
    (json.dumps(toy_results() | {"claims": [{"claim": "c"}]}).encode(), "KeyError: 'noise'"),
    (json.dumps(toy_results()).replace('"mean": 0.9', '"mean": null').encode(), "not the results"),
    (json.dumps(toy_results()).replace('"high": 0.55', '"high": null').encode(), "not the results")])
def test_missing_or_damaged_committed_results_are_one_line(tmp_path, monkeypatch, content, says):
    path = tmp_path / "results.json"
    monkeypatch.setattr(compare, "COMMITTED", path)
    if content is not None:
        path.write_bytes(content)
    line, = compare.with_committed(toy_results())
    assert line.startswith(f"not compared with the committed results: {path}: ") and says in line
    with pytest.raises(UserError, match=says):
        compare.read(path)


def test_a_directory_in_place_of_the_committed_results_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "COMMITTED", tmp_path)
    assert "Is a directory" in compare.with_committed(toy_results())[0]


def test_a_run_beside_the_committed_results(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "COMMITTED", tmp_path / "results.json")
    compare.COMMITTED.write_text(json.dumps(toy_results(seeds=range(5))))
    lines = compare.with_committed(toy_results())
    assert lines[:2] == ["this run (here) beside the committed results (there)", "  5 seeds there, 2 here"]


def test_two_files_by_hand(tmp_path):
    for name, found in (("a.json", toy_results(ppo=.8)), ("b.json", toy_results(ppo=.9))):
        (tmp_path / name).write_text(json.dumps(found))
    got = call("study.compare", "a.json", "b.json", cwd=tmp_path)
    assert got.returncode == 0 and got.stdout.startswith("a.json (here) beside b.json (there)\n")
    assert "0.90 -> 0.80 [0.75, 0.85] outside" in got.stdout and "10 of 12" in got.stdout
    refused(tmp_path, "study.compare", "a.json", says="1 files named; two are compared")
    refused(tmp_path, "study.compare", says="0 files named; two are compared")
    refused(tmp_path, "study.compare", "a.json", "c.json", says="c.json: No such file")


# ---------------------------------------------------------------------- what reproduce.py writes and prints

def committed():
    return json.loads((ROOT / "results" / "results.json").read_text())


def test_lines_on_screen_fit():
    found = committed()
    longest = [c | {"verdict": "DOES NOT HOLD: the opposite"} for c in found["claims"]]
    opposite = found | {"claims": longest, "settings": found["settings"] | {"seeds": [0], "device": "cpu"}}
    lines = [*synthetic_study.verdicts(found), *synthetic_study.verdicts(opposite),
             *compare.with_committed(found), *compare.with_committed(opposite)]
    assert all(len(line) <= 110 for line in lines)
    shown = " ".join(" ".join(lines).split())
    assert all(c["claim"] in shown for c in found["claims"])


def test_toy_verdicts_are_marked_and_not_compared():
    found = committed()
    toy = found | {"settings": found["settings"] | {"quick": True}}
    lines, real = synthetic_study.on_screen(toy), synthetic_study.on_screen(found)
    assert lines == [synthetic_study.TOY, *synthetic_study.verdicts(toy)]
    assert "toy sizes: the verdicts below say nothing" in lines[0]
    assert not any("committed" in line for line in lines)
    assert synthetic_study.TOY not in real and f"verdicts of {len(found['claims'])} claims" in "\n".join(real)


def folders(monkeypatch, **flags):
    """The folder of stages and that of results that reproduce.py hands to the study."""
    seen = []

    def run_study(recipe, seeds, runs, out, full, jobs):
        seen.append((Path(runs), Path(out)))
    monkeypatch.setattr(synthetic_study, "run_study", run_study)
    reproduce.main(reproduce.Config(**flags))
    return seen[0]


def test_results_change_on_request_only(monkeypatch):
    runs = Path("runs")
    assert folders(monkeypatch) == (runs, runs / "results")
    assert folders(monkeypatch, full=True) == (runs, runs / "results")
    assert folders(monkeypatch, quick=True) == (runs, runs / "quick")
    assert folders(monkeypatch, out="results") == (runs, Path("results"))


def test_toy_numbers_do_not_replace_the_committed_results(tmp_path):
    refused(tmp_path, "reproduce", "--quick", "--out", ROOT / "results", says="toy numbers would replace")
