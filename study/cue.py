"""Does a reward model know which story of a post counts, or only which words are held out?

    python -m study.cue --reward ckpt_reward.pt

Held-out words stand in no key story of `train`, but in the distractors of three quarters of its posts
(tasks/synthetic.py).  So "this word is held out" tells a distractor.  For posts with one distractor the
reward model scores the key story and the distractor in the same phrasing.  The table has how often the key
story scores higher: 0.5 is a coin.
"""
from dataclasses import dataclass

import numpy as np

from common.checkpoint import load_checkpoint
from common.errors import check
from common.flags import Common, Count, launch, setup
from common.tables import text_table
from common.tokenizer import load_tokenizer
from reward import score
from splits import encode_prompts, encode_responses, task_of
from tasks import synthetic

SPLITS = ("test", "ood_words100")


@dataclass
class Config(Common):
    reward: str = "ckpt_reward.pt"  # reward model of a synthetic task of posts
    posts: Count = 500              # posts with one distractor of each test set


def pairs(split, n):
    """Up to n posts with one distractor: [(prompt, key story, distractor, how many words of the distractor
    are held out)], both stories as summaries in the same phrasing."""
    found = []
    for row in synthetic.rows(split, 4 * n, references=1):
        key, others = synthetic.read_prompt(row["prompt"])
        if all(len(others[slot]) == 1 for slot in synthetic.STORY):
            other = {slot: min(others[slot]) for slot in synthetic.STORY}
            held_out = sum(other[slot] in synthetic.HELD_OUT[slot] for slot in synthetic.STORY)
            texts = [" my {who} {event} my {object} .".format(**story) for story in (key, other)]
            found.append((row["prompt"], *texts, held_out))
    return found[:n]


def main(cfg):
    device, _ = setup(cfg)
    model, saved = load_checkpoint(cfg.reward, "reward", "--reward", device, cfg.dtype)
    task, tokenizer = task_of(cfg, saved), load_tokenizer(saved["tokenizer"])
    check(task.synthetic is synthetic,
          f"--reward {cfg.reward}: its task is {task.name}, and not one of posts")
    table = []
    for split in SPLITS:
        prompts, key, other, held_out = zip(*pairs(split, cfg.posts))
        ids = encode_prompts(tokenizer, prompts, task.max_prompt_len(model.config.context))
        responses = encode_responses(tokenizer, zip(key, other), task.max_new_tokens)
        scores = np.array(score(model, ids, responses))
        higher, cue = scores[:, 0] > scores[:, 1], np.array(held_out) > 0
        table.append([split, *(f"{higher[part].mean():.2f} of {part.sum()}" if part.any() else "-"
                               for part in (~cue, cue))])
    print("how often the key story scores higher than the distractor\n")
    print(text_table(["posts", "no held-out word in the distractor", "with one"], table, labels=1))


if __name__ == "__main__":
    launch(main, Config, __doc__)
