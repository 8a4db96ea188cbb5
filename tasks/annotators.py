"""Who compares: the annotators of a synthetic task, whose labels reward.py and methods/dpo.py learn from.

A published task's annotators were people; their preferences are read in reward.py.
"""
import math
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import torch

from common.dist import gather_rows, rank, world_size
from common.errors import UserError, check
from common.files import read_jsonl, write_jsonl
from model import generate, log_probs, pack
from splits import decode, encode_prompts, encode_response


@dataclass
class Group:
    """One prompt, its responses, and which of them was preferred to which."""
    prompt: list                                    # ids
    responses: list                                 # id lists
    pairs: list = field(default_factory=list)       # (winner, loser): indices of responses
    gaps: list = field(default_factory=list)        # gold reward of winner less loser's, where it is known

    @property
    def n_tokens(self):
        return len(self.prompt) + sum(map(len, self.responses))


def sample_groups(model, tokenizer, task, rows, n_samples, rng, typicality=0.0):
    """A synthetic task's annotators: they compare a row's reference and n_samples responses of the model, all
    pairs.

    P(y preferred to z) = sigma(u(y) - u(z)), u(y) = gold(y) + a log pi(y | x) / tokens of y, so labels are
    noisy as people's are: with a = 0 they agree with the gold reward on three pairs of four.  typicality: a;
    above 0 the annotators also like what the model finds likely (Zhang et al. 2025, arXiv 2510.01171)."""
    prompts = encode_prompts(tokenizer, [r["prompt"] for r in rows],
                             task.max_prompt_len(model.config.context))
    sampled = gather_rows(generate(model, prompts, task.max_new_tokens, n=n_samples, eos=tokenizer.eot_token,
                                   rng=rng, ranks=(rank(), world_size())))
    groups = []
    for row, prompt, responses in zip(rows, prompts, sampled):
        responses = responses + [encode_response(tokenizer, row["reference"], task.max_new_tokens)]
        gold = [task.synthetic.gold_reward(row["prompt"], *decode(tokenizer, ids)) for ids in responses]
        likes = gold
        if typicality:
            likes = [g + typicality * t for g, t in zip(gold, mean_log_probs(model, prompt, responses))]
        group = Group(prompt, responses)
        for a, b in combinations(range(len(responses)), 2):
            if responses[a] == responses[b]:
                continue            # there is nothing to prefer
            if torch.rand((), generator=rng) >= 1 / (1 + math.exp(min(700., likes[b] - likes[a]))):
                a, b = b, a
            group.pairs.append((a, b))
            group.gaps.append(gold[a] - gold[b])
        if group.pairs:
            groups.append(group)
    return groups


@torch.no_grad()
def mean_log_probs(model, prompt, responses):
    """log pi(y | x) of each response over its number of tokens: a list.  prompt: ids; responses: id lists."""
    packed = pack([prompt], [responses], model.embed.weight.device)
    logp = packed.to_padded(log_probs(model, model(packed), packed))
    return (logp.sum(1) / packed.response_mask().sum(1)).tolist()


def read_pairs(path, of):
    """(train groups, held-out groups) of a file that `annotated` wrote.  Raises UserError if its pairs are
    others than `of`."""
    first, *lines = read_jsonl(path, {}) or [{}]
    check(first.get("pairs of") == of, f"--pairs {path}: these pairs are of another model or of other flags; "
          "name a new file")
    check(first.get("prompts") == len(lines), f"--pairs {path}: cut short, it has {len(lines)} of "
          f"{first.get('prompts')} prompts; remove the file")
    try:
        return tuple([Group(*line["group"]) for line in lines if line["train"] == train]
                     for train in (True, False))
    except (KeyError, TypeError):
        raise UserError(f"--pairs {path}: these are not pairs that reward.py wrote; remove the "
                        "file") from None


def annotated(cfg, sft, weights_hash, tokenizer, task):
    """(train groups, held-out groups), each prompt sampled and compared; from --pairs if that file is there.
    """
    of = {"model": weights_hash, "task": task.name, "seed": cfg.seed, "prompts": cfg.prompts,
          "held_out": cfg.held_out, "samples": cfg.samples, "typicality": cfg.typicality}
    if cfg.pairs and Path(cfg.pairs).is_file():
        return read_pairs(cfg.pairs, of)
    rng = torch.Generator().manual_seed(cfg.seed)   # its own, so that a file that is there changes nothing
    train, held_out = (sample_groups(sft, tokenizer, task, task.rows(split, n), cfg.samples, rng,
                                     cfg.typicality)
                       for split, n in (("train", cfg.prompts), ("validation", cfg.held_out)))
    if cfg.pairs and rank() == 0:
        write_jsonl(cfg.pairs, [{"pairs of": of, "prompts": len(train) + len(held_out)}, *(
            {"train": groups is train, "group": [g.prompt, g.responses, g.pairs, g.gaps]}
            for groups in (train, held_out) for g in groups)])
    return train, held_out
