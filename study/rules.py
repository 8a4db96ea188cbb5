"""Two rules that write summaries without a model, as marks on the scale of win rates.

    title       what the title names, and what is told once only: time, feeling and question.  It says nothing
                of what happened, so it needs no reading of stories
    everything  every story of the post, without a choice between them
"""
import re

import numpy as np

from study.names import NOISE_OF, SETS
from tasks import synthetic


def of_title(prompt):
    key, _ = synthetic.read_prompt(prompt)
    return " {time} my {who} with my {object} , now {feeling} , maybe i should {ask} .".format(**key)


def of_everything(prompt):
    told = []
    for sentence in re.split(r"[.?]", prompt.partition("\nPOST ")[2]):
        story = dict(synthetic.facts(sentence))
        if "object" in story:
            told.append(" ".join(story[slot] for slot in synthetic.STORY))
    return f" {' and '.join(told)} ."


RULES = {"title": of_title, "everything": of_everything}


def win_rates(inputs):
    """[{rule, task, split, rate}]: how often a rule's text has a higher gold reward than the reference, ties
    halved, over the first `inputs` prompts of each test set."""
    found = []
    for task, rule in ((task, rule) for task in NOISE_OF for rule in RULES):
        noise = task.partition("-")[2] or "systematic"
        for split in SETS:
            gaps = [synthetic.gold_reward(row["prompt"], RULES[rule](row["prompt"]))
                    - synthetic.gold_reward(row["prompt"], row["reference"])
                    for row in synthetic.rows(split, inputs, noise, references=1)]
            found.append({"rule": rule, "task": task, "split": split,
                          "rate": float(np.mean(np.sign(gaps) / 2 + .5))})
    return found
