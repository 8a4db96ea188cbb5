"""The instruction task: gold rewards are worked by hand, prompts are read back, splits are what they say."""
import random
from collections import Counter

import pytest

from tasks import instructions


@pytest.mark.parametrize("prompt, text, expected", [
    ("name two animals", " dog and cat .", 3.),
    ("name two animals", " dog .", 1.5),
    ("name two animals", " dog , cat and cow .", 2.5),              # one too many: -.5
    ("name two animals", " dog and dog .", 1.5 - .3),
    ("name two animals", " dog and bread .", 1.5 - 1.),
    ("name two animals such as dog", " dog and cat .", 1.5 - .6),   # the example earns nothing
    ("describe a dog", " a wild and furry dog .", 3.),
    ("describe a dog", " it is wild and rusty .", 1.5 - 1.),
    ("describe a dog", " the cat is wild and furry .", 3. - 1.),
    ("choose a food from dog bread saw park", " i choose the bread .", 3.),
    ("choose a food from dog bread saw park", " rice .", -1.),      # a food, but not offered
    ("reverse dog cat cow", " cow cat dog .", 3.),
    ("reverse dog cat cow", " dog cat cow .", 1. - 2 / 3),
    ("reverse dog cat cow", " cow cat .", 2. - 1 / 3),
    ("reverse dog cat cow", " it is hard to say .", -.5),
    ("describe a dog , then reverse dog cat cow", " it is wild and furry . then cow cat dog .", 6.),
    ("describe a dog , then reverse dog cat cow", " it is wild and furry and then cow cat dog .", 6.),
    ("describe a dog , then reverse dog cat cow", " it is wild and furry . and then cow cat dog .", 6.),
    ("describe a dog , then reverse dog cat cow", " it is wild and furry .", 3.),
    # in the wrong order
    ("describe a dog , then reverse dog cat cow", " cow cat dog . it is wild and furry .", -1.),
    ("reverse dog cat cow", " cow cat dog . cow cat dog .", 2.5),
    ("reverse dog cat cow", "", 0.),
])
def test_gold_reward_by_hand(prompt, text, expected):
    prompt = f"INSTRUCTION {prompt} .\nRESPONSE"
    assert instructions.gold_reward(prompt, text) == pytest.approx(expected)
    assert instructions.gold_reward(prompt, text, finished=False) == pytest.approx(expected - 1)


@pytest.mark.parametrize("split", [s for s in instructions.SPLITS if s != "pretrain"])
def test_instructions_are_read_back_and_references_are_grammatical(split):
    count, held_out = instructions.SPLITS[split]
    for row in instructions.rows(split, 200):
        deeds = instructions.read_prompt(row["prompt"])
        assert len(deeds) == count
        assert all(((d["deed"], d["kind"]) in instructions.HELD_OUT) == held_out for d in deeds)
        for text in row["references"]:
            answers = instructions._answers(text)      # a writer may forget the second deed or the third
            grammar = instructions.GRAMMAR
            assert grammar[deeds[0]["deed"]].fullmatch(answers[0]), (row["prompt"], text)
            assert all(any(g.fullmatch(a) for g in grammar.values()) for a in answers), (row["prompt"], text)
            assert instructions.facts(text) and instructions.gold_reward(row["prompt"], text) <= 3 * count


def test_no_word_tells_that_it_is_wrong():
    """What fine-tuning never sees with a deed stands in no reference's error either, and choosing, whose lists
    hold wrong things of all kinds, has no unseen kind."""
    assert "choose" not in {deed for deed, _ in instructions.HELD_OUT}
    described = set()
    for row in instructions.rows("train", 4000):
        deed, = instructions.read_prompt(row["prompt"])
        said = {word for text in row["references"] for _, word in instructions.facts(text)}
        if deed["deed"] == "name":
            assert not said & set(instructions.KINDS["tool"])
        elif deed["deed"] == "describe":
            described |= said
    assert instructions.QUALITIES["job"] < described        # nor is a right word of an unseen pair unknown


def test_a_writer_errs_as_often_on_unseen_pairs():
    """Of choices and of what is said of a thing 8 % are wrong, of what is named less: examples take places."""
    for split in ("test", "ood_pairs"):
        wrong, said = Counter(), Counter()
        for row in instructions.rows(split, 300, references=20):
            asked, = instructions.read_prompt(row["prompt"])
            for text in row["references"]:
                for slot, word in instructions.facts(text):
                    deed = asked["deed"]
                    if deed in ("describe", "choose", "name") and slot != "order" and (
                            deed != "describe" or slot == "quality"):
                        said[deed] += 1
                        right = (word in instructions.QUALITIES[asked["kind"]] if deed == "describe"
                                 else slot == asked["kind"])
                        wrong[deed] += not right
        assert said["describe"] > 1000 and said["name"] > 1000
        assert wrong["describe"] / said["describe"] == pytest.approx(.08, abs=.02)
        assert wrong["name"] / said["name"] == pytest.approx(.07, abs=.02)
        assert split == "ood_pairs" or wrong["choose"] / said["choose"] == pytest.approx(.08, abs=.02)


def test_no_prompt_of_a_test_set_is_learned_from():
    learned = {split: {row["prompt"] for row in instructions.rows(split, 8192, references=1)}
               for split in ("pretrain", "train", "validation")}
    for split in instructions.SPLITS:
        if split.startswith(("test", "ood_")):
            prompts = {row["prompt"] for row in instructions.rows(split, instructions.TESTED, references=1)}
            assert not prompts & learned["train"] and len(prompts) == instructions.TESTED
            if split == "test":
                assert not prompts & (learned["pretrain"] | learned["validation"])


def test_what_is_kept_for_tests_changes_no_frequencies():
    def contents(prompts):
        return Counter((deed["deed"], deed["kind"], *instructions._content((deed,))[0])
                       for prompt in prompts for deed in instructions.read_prompt(prompt))
    rng = random.Random(0)
    drawn = contents(instructions._instruction(rng, instructions._pairs(rng, "train"))[0] for _ in range(8000))
    train = contents(row["prompt"] for row in instructions.rows("train", 8000, references=1))
    assert set(train) == set(drawn)
    # counts of a Poisson process; the square root of each has a standard deviation of a half
    assert all(abs(train[c] ** .5 - drawn[c] ** .5) < 4 * .5 * 2 ** .5 for c in drawn)


def test_a_number_names_an_instruction_wherever_rows_start():
    for split in instructions.SPLITS:
        assert instructions.rows(split, 60)[50:] == instructions.rows(split, 10, start=50)


def test_a_writer_who_forgets_a_deed_forgets_those_behind_it():
    """Else the answer behind a gap would be scored against the wrong deed."""
    deeds, rng = instructions.read_prompt("INSTRUCTION reverse dog cat cow , then describe a dog , then choose "
                                          "a food from dog bread saw park .\nRESPONSE"), random.Random(0)
    answered = Counter()
    for _ in range(4000):
        answers = instructions._answers(instructions.reference(rng, deeds))
        answered[len(answers)] += 1
        assert all(instructions.GRAMMAR[deed["deed"]].fullmatch(a) for deed, a in zip(deeds, answers))
    assert answered[3] / 4000 == pytest.approx(.85 ** 2, abs=.02) and answered[1] / 4000 == pytest.approx(.15, abs=.02)


def test_only_the_base_model_meets_compositions():
    kinds = {}
    for split in ("pretrain", "train"):
        asked = [instructions.read_prompt(row["prompt"]) for row in instructions.rows(split, 400, references=1)]
        kinds[split] = {(len(deeds), (deeds[0]["deed"], deeds[0]["kind"]) in instructions.HELD_OUT)
                        for deeds in asked}
    assert kinds["train"] == {(1, False)}
    assert kinds["pretrain"] == {(1, False), (2, False), (1, True)}       # three deeds stand in no train set
