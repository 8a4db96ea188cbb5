"""Does a reward model know which story of a post counts?

    python -m study.key_story --reward ckpt_reward.pt

For posts with one distractor the reward model scores the key story and the distractor in the same phrasing,
so nothing but the post tells them apart.  The table has how often the key story scores higher: 0.5 is a coin.
"""
from dataclasses import dataclass

import numpy as np

from common.checkpoint import load_checkpoint
from common.errors import check
from common.flags import Common, Count, launch, setup
from common.stats import rate_interval
from common.tables import text_table
from common.tokenizer import load_tokenizer
from reward import score
from splits import encode_prompts, encode_responses, task_of
from tasks import synthetic

POSTS = 500         # of each test set
# the sets of posts with one distractor or two
SPLITS = [name for name, (distractors, *_) in synthetic.SPLITS.items()
          if name.startswith(("test", "ood_")) and 1 in distractors]


@dataclass
class Config(Common):
    reward: str = "ckpt_reward.pt"  # reward model of a synthetic task of posts
    posts: Count = POSTS            # posts with one distractor of each test set


def both_stories(split, n):
    """Up to n posts with one distractor: [(prompt, key story, distractor)], both as summaries in the same
    phrasing."""
    found = []
    for row in synthetic.rows(split, 4 * n, references=1):
        key, others = synthetic.read_prompt(row["prompt"])
        if all(len(others[slot]) == 1 for slot in synthetic.STORY):
            other = {slot: min(others[slot]) for slot in synthetic.STORY}
            found.append((row["prompt"], *(" my {who} {event} my {object} .".format(**story)
                                           for story in (key, other))))
    return found[:n]


def key_scores_higher(model, tokenizer, task, split, n=POSTS):
    """For up to n posts of a split: 1 where the reward model scores the key story above the distractor, 0
    where below, a half for a tie."""
    prompts, key, other = zip(*both_stories(split, n))
    ids = encode_prompts(tokenizer, prompts, task.max_prompt_len(model.config.context))
    responses = encode_responses(tokenizer, zip(key, other), task.max_new_tokens)
    scores = np.array(score(model, ids, responses))
    return np.sign(scores[:, 0] - scores[:, 1]) / 2 + .5


def main(cfg):
    device, _ = setup(cfg)
    model, saved = load_checkpoint(cfg.reward, "reward", "--reward", device, cfg.dtype)
    task, tokenizer = task_of(cfg, saved), load_tokenizer(saved["tokenizer"])
    check(task.synthetic is synthetic,
          f"--reward {cfg.reward}: its task is {task.name}, and not one of posts")
    table = []
    for split in SPLITS:
        higher = key_scores_higher(model, tokenizer, task, split, cfg.posts)
        table.append([split, f"{rate_interval(higher):.2f}", len(higher)])
    print("how often the key story scores higher than the distractor [95 % interval over posts]\n")
    print(text_table(["posts", "key story higher", "number"], table, labels=1))


if __name__ == "__main__":
    launch(main, Config, __doc__)
