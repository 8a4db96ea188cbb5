"""The reward model's held-out accuracy."""
import re

import pytest

import reward


def test_reward_accuracy_by_hand():
    """Group 1: one pair right, one wrong; group 2: a tie.  (1 + 0 + .5) / 3.  Responses 0 are longer: wins 2
    of 3."""
    groups = [reward.Group([1], [[1, 1], [1]], [(0, 1), (1, 0)], [2., -.5]),
              reward.Group([1], [[1, 1], [1]], [(0, 1)], [-2.])]
    got = reward.accuracy(groups, [[1., 0.], [0., 0.]])
    assert got["pairs"] == 3 and got["accuracy"] == pytest.approx(.5)
    assert got["longer_wins"] == pytest.approx(2 / 3)
    # the second label contradicts the gold reward: winning it is losing there
    assert got["accuracy_gold"] == pytest.approx((1 + 1 + .5) / 3)
    # pairs of which some have no gold reward
    some = [groups[0], groups[1]._replace(gaps=[])]
    assert reward.accuracy(some, [[1., 0.], [0., 0.]]).keys() == got.keys() - {"accuracy_gold", "labels_gold"}


def test_one_held_out_prompt_has_an_accuracy_and_no_interval(work, tmp_path, capfd):
    reward.main(reward.Config(model=str(work / "ckpt_sft.pt"), prompts=10, held_out=1, out=str(tmp_path), quiet=True,
                              threads=1))
    said = re.search(r"it ranks (.*) of \d+ held-out pairs", capfd.readouterr().out)[1]
    assert re.fullmatch(r"[01]\.\d\d\d", said)
