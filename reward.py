"""Reward model: a scalar on a response's last token, trained on which of two responses is preferred.

    python reward.py --model ckpt_sft.pt             # synthetic task: samples pairs, labels them with noise
    python reward.py --model ckpt_sft.pt --data DIR  # preferences.jsonl: {"prompt", "chosen", "rejected"}

Writes ckpt_reward.pt and metrics_reward.jsonl.

Deviations from the paper: the responses of one prompt are packed after it, and all their pairs are compared
from one forward pass; the learning rate is that of a tiny model.  As in the paper the reward model starts
from the SFT model, and its outputs are shifted and scaled to mean 0 and standard deviation 1 on held-out
responses.  Here the shift and the scale are folded into the head's weight and bias, so nothing downstream has
to know them.
"""
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common.dist import all_reduce, full_copy, gather_rows, my_rows, param_groups, shard
from common.errors import UserError
from common.flags import Count, Frozen, Natural, NonNegative, Positive, TrainFlags, arg, launch, setup
from common.loop import Run, check_batch, warmup_cosine
from common.stats import Interval, bootstrap_statistic
from model import pack
from splits import draw, encode_prompts, encode_response, length_bucketed_batches, load_bundle
from tasks import annotators

_SMALL = dict(freeze=0.8, lr=1e-4, batch_size=16, dtype="bf16")
PRESETS = {"paper": dict(freeze=0.8, lr=3e-5, batch_size=64, epochs=1, prompts=10**6),     # its tables 2-4
           "authors": dict(freeze=0.8, lr=1e-5, batch_size=8, epochs=1, prompts=10**6),    # their commands
           **dict.fromkeys(("small-gpt2", "small-opt", "small-llama"), _SMALL)}


ENOUGH = 200    # responses, from which the reward's mean and standard deviation are taken
LARGEST = 16    # responses that are packed after one copy of their prompt


@dataclass
class PairFlags(TrainFlags):
    """What methods/dpo.py shares with this script."""
    prompts: Count = arg(8000, "prompts with preferences; a folder may hold fewer")
    held_out: Count = arg(500, "prompts of the held-out pairs")
    keep_cut: bool = arg(False, "learn pairs with a response longer than --max-new-tokens too, cut, without "
                                "an end; else they are left out")
    samples: Count = arg(5, "responses to each prompt that the synthetic task's annotators compare")
    typicality: NonNegative = arg(0.0, "a: how much the synthetic task's annotators like what is typical")
    warmup: Natural = arg(50, "steps of linear warm-up, at most a tenth of all")
    log_every: Count = arg(100, "steps between log lines")


@dataclass
class Config(PairFlags):
    model: str = arg("ckpt_sft.pt", "checkpoint to start from, and in the synthetic task to sample from")
    freeze: Frozen = arg(-1.0, "fraction of the layers frozen with the embeddings; -1: the checkpoint's own")
    lr: Positive = arg(1e-3, "peak learning rate, cosine to zero; the paper uses 3e-5")


def bradley_terry_loss(chosen, rejected, n_pairs=None):
    """-log sigma(r_chosen - r_rejected), averaged over pairs (Stiennon et al. 2020).  chosen, rejected: (B,)
    rewards; n_pairs: of the whole batch, if these are a part of it."""
    return -F.logsigmoid(chosen - rejected).sum() / (n_pairs or len(chosen))


# ------------------------------------------------------------------------------------------------ comparisons

class Group(NamedTuple):
    """One prompt, its responses, and which of them was preferred to which."""
    prompt: list        # ids
    responses: list     # id lists
    pairs: list         # (winner, loser): places in responses
    gaps: list          # of each pair the winner's gold reward minus the loser's; empty where it is not known

    @property
    def n_tokens(self):
        return len(self.prompt) + sum(map(len, self.responses))


def read_groups(tokenizer, rows, max_prompt_len, max_new_tokens, keep_cut=False):
    """Preference rows -> Groups.  Rows with one prompt form one group, so a response is read once however
    many pairs it is in.  Pairs with a response of more than max_new_tokens are left out unless keep_cut.
    Prints how many pairs are left out, and how many of the others' responses have no end."""
    by_prompt = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    prompts = encode_prompts(tokenizer, list(by_prompt), max_prompt_len, "preference prompts")
    encode = partial(encode_response, tokenizer, limit=max_new_tokens)
    counts = Counter()
    groups = [make_group(prompt, of_prompt, encode, tokenizer.eot_token, keep_cut, counts)
              for prompt, of_prompt in zip(prompts, by_prompt.values())]
    for what, why in (("long", f"a response is longer than {max_new_tokens} tokens"),
                      ("same", "their two responses are the same")):
        if counts[what]:
            print(f"{counts[what]} of {len(rows)} pairs left out: {why}", flush=True)
    if counts["chosen"] or counts["rejected"]:
        print(f"{counts['chosen']} chosen and {counts['rejected']} rejected responses of {counts['kept']} "
              "pairs have no end", flush=True)
    return [group for group in groups if group.pairs]


def make_group(prompt, rows, encode, eos, keep_cut, counts):
    """The Group of one prompt (ids).  encode: text, finished -> ids.  Adds to counts: pairs left out (`long`,
    `same`) and `kept`, and of these the `chosen` and `rejected` responses without an end."""
    group, place = Group(prompt, [], [], []), {}        # place: {(text, finished): where in responses}
    for row in rows:
        both = list(zip((row["chosen"], row["rejected"]), row.get("finished", (True, True))))
        ids = [encode(text, finished=finished) for text, finished in both]
        endless = [response[-1] != eos for response in ids]
        if not keep_cut and any(finished and no_end for (_, finished), no_end in zip(both, endless)):
            counts["long"] += 1
            continue
        for key, response in zip(both, ids):
            if key not in place:
                place[key] = len(place)
                group.responses.append(response)
        if ids[0] == ids[1]:
            counts["same"] += 1
            continue
        group.pairs.append((place[both[0]], place[both[1]]))
        group.gaps.extend([row["gap"]] if "gap" in row else [])
        counts.update(kept=1, chosen=int(endless[0]), rejected=int(endless[1]))
    return group


def cut_group(group):
    """[group], or one of many responses as several of at most LARGEST, since a group is one packed row."""
    if len(group.responses) <= LARGEST:
        return [group]
    parts, n = [], LARGEST // 2     # pairs of a part
    for i in range(0, len(group.pairs), n):
        pairs = group.pairs[i:i + n]
        used = sorted({response for pair in pairs for response in pair})
        parts.append(Group(group.prompt, [group.responses[j] for j in used],
                           [(used.index(a), used.index(b)) for a, b in pairs], group.gaps[i:i + n]))
    return parts


def preference_rows(cfg, bundle):
    """(rows to learn from, held-out rows or None): from a synthetic task's annotators, or from files."""
    task = bundle.task
    if task.synthetic:
        return annotators.preferences(cfg, bundle)
    if cfg.typicality:
        raise UserError("--typicality: only a synthetic task has annotators whose taste can be set")
    rows = task.preferences()
    if not rows:
        raise UserError(f"--data {task.data}: no preferences.jsonl, whose lines are "
                        "{'prompt': ..., 'chosen': ..., 'rejected': ...}")
    return rows, task.preferences(validation=True)


def comparisons(cfg, bundle):
    """(train Groups, held-out Groups) of a task.  Without a file of held-out preferences a tenth of the
    prompts is drawn: of the prompts, not of the pairs, because pairs of one prompt would leak."""
    task, tokenizer = bundle.task, bundle.tokenizer
    rows, held_out_rows = preference_rows(cfg, bundle)
    known = {row["prompt"] for row in rows} & {row["prompt"] for row in held_out_rows or []}
    if known:
        print(f"{len(known)} prompts with held-out preferences have preferences to learn from too: the "
              "held-out accuracy is flattering", flush=True)
    limits = task.max_prompt_len(bundle.model.config.context), task.max_new_tokens
    # samples of the policy did fit, though a few of their texts are more tokens when they are read again
    keep_cut = cfg.keep_cut or bool(task.synthetic)
    train, held_out = (read_groups(tokenizer, some, *limits, keep_cut)
                       for some in (rows, held_out_rows or []))
    if not held_out_rows:
        held_out = draw(train, max(1, len(train) // 10), "no preferences_validation.jsonl, held-out prompts")
        drawn = set(map(id, held_out))
        train = [group for group in train if id(group) not in drawn]
    if not train or not held_out:
        raise UserError(f"{task.data}: no pairs of two different responses that fit "
                        f"{task.max_new_tokens} tokens, to train and to test on; --keep-cut cuts longer ones")
    train, held_out = (draw(groups, n, what) for groups, n, what in (
        (train, cfg.prompts, "prompts to learn from"), (held_out, cfg.held_out, "held-out prompts")))
    return sum(map(cut_group, train), []), sum(map(cut_group, held_out), [])


# ------------------------------------------------------------------------------------------- what it is worth

@torch.no_grad()
def score(model, prompts, responses, batch_size=0, packed_together=8):
    """Reward of each response.  prompts: id lists; responses: for each prompt a list of id lists.  Returns
    lists of floats of that shape.  The ranks divide the prompts among them.

    packed_together: responses packed after one copy of their prompt; with more than about 8, attention over
    the longer row costs more than the prompt saves.  batch_size: responses at once; 0: 32 (GPU: 256)."""
    if model.reread:
        prompts, responses = model.reread(prompts, responses)
    flat, mine = [], my_rows(responses)
    batch_size = batch_size or (256 if model.device.type == "cuda" else 32)
    parts = [(prompt, group[i:i + packed_together])
             for prompt, group in zip(my_rows(prompts), mine, strict=True)
             for i in range(0, len(group), packed_together)]
    step = max(1, batch_size // packed_together)
    for i in range(0, len(parts), step):
        r = model.rewards(pack(*zip(*parts[i:i + step]), model.device))
        if not r.isfinite().all():
            raise UserError("the reward model's score of a response is not finite: its weights are damaged, "
                            "or bf16 is too coarse for them (--dtype fp32)")
        flat += r.tolist()
    scores = iter(flat)
    return gather_rows([[next(scores) for _ in group] for group in mine])


def accuracy(groups, scores):
    """A flat dict of how often the higher score wins, by labels and, where known, gold reward; ties half.
    Pairs of equal gold reward count half in `labels_gold` and are left out of `accuracy_gold`.  scores: as
    from `score`.  The interval is over prompts, because pairs of one prompt depend on each other."""
    number = {}         # of each different prompt: a prompt with many responses is several groups
    of_pair = [(number.setdefault(tuple(group.prompt), len(number)), s[a] - s[b],
                len(group.responses[a]) - len(group.responses[b]))
               for group, s in zip(groups, scores) for a, b in group.pairs]
    prompt, margins, more_tokens = map(np.array, zip(*of_pair))
    hits, longer = (np.sign(x) / 2 + .5 for x in (margins, more_tokens))        # a tie is half a hit
    sums = np.stack((np.bincount(prompt, hits), np.bincount(prompt)), axis=1)
    mean, low, high = bootstrap_statistic(lambda rows: np.divide(*sums[rows].sum(axis=0)), len(sums), 1000)
    found = {"accuracy": mean, "accuracy_low": low, "accuracy_high": high, "longer_wins": longer.mean(),
             "pairs": len(hits)}
    gaps = np.array([gap for group in groups for gap in group.gaps])
    if len(gaps) == len(hits) and gaps.any():       # where every pair carries one
        against_gold = np.where(gaps > 0, hits, 1 - hits)
        found |= {"accuracy_gold": against_gold[gaps != 0].mean(),
                  "labels_gold": (np.sign(gaps) / 2 + .5).mean()}
    return {k: v if isinstance(v, int | None) else float(v) for k, v in found.items()}


def enough(model, scores, train):
    """The scores, floats, with those of training responses where they are too few for the reward's scale."""
    if len(scores) >= ENOUGH:
        return scores
    more = train[:ENOUGH]
    print(f"{len(scores)} held-out responses are too few for the reward's scale, in whose unit beta is: "
          f"those of {len(more)} training prompts are taken too", flush=True)
    return scores + sum(score(model, [g.prompt for g in more], [g.responses for g in more]), [])


def normalise(model, scores):
    """Folds (r - mean) / std over scores (any number of floats) into the head, so that these get mean 0 and
    standard deviation 1.  Returns (mean, std)."""
    mean, std = float(np.mean(scores)), float(np.std(scores))
    if std == 0:
        raise UserError("the reward model gives every held-out response the same score: it has learned "
                        "nothing; train longer or raise --lr")
    with torch.no_grad():
        model.head.weight.div_(std)
        model.head.bias.sub_(mean).div_(std)
    return mean, std


# --------------------------------------------------------------------------------------------------- training

def pack_groups(groups, device):
    return pack([g.prompt for g in groups], [g.responses for g in groups], device)


def winners_and_losers(groups, device):
    """Two (n_pairs,) index tensors into the groups' responses, laid end to end."""
    first = np.cumsum([0] + [len(g.responses) for g in groups])
    return torch.tensor([(start + a, start + b) for start, g in zip(first, groups) for a, b in g.pairs],
                        device=device).T


def main(cfg):
    device, rng = setup(cfg)
    check_batch(cfg)
    bundle = load_bundle(cfg, device)
    train, held_out = comparisons(cfg, bundle)
    print(f"{len(train)} prompts with pairs to learn from, {len(held_out)} held out", flush=True)
    if cfg.freeze >= 0:
        bundle.model.freeze(round(cfg.freeze * bundle.model.config.n_layer))
    model = bundle.model.with_scalar_head()
    model.recompute = cfg.recompute
    if cfg.shard:
        shard(model)
    optimizer = torch.optim.AdamW(param_groups(model.trainable()), lr=cfg.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=True)
    batches = length_bucketed_batches([g.n_tokens for g in train], cfg.batch_size, cfg.epochs, rng)
    run = Run("reward", cfg, optimizer, rng, inputs=[bundle.saved["weights_hash"], train], model=model)

    for step in run.steps(len(batches)):
        run.set_lr(warmup_cosine(step, len(batches), cfg.lr, cfg.warmup))
        batch = [train[i] for i in batches[step]]
        n_pairs = sum(len(g.pairs) for g in batch)
        totals = torch.zeros(3)         # loss, accuracy, margin
        for part in run.micro_batches(batch):
            r = model.rewards(pack_groups(part, device))        # (R,), of all responses in the part
            winner, loser = winners_and_losers(part, device)
            loss = bradley_terry_loss(r[winner], r[loser], n_pairs)
            loss.backward()
            margin = (r[winner] - r[loser]).detach()
            totals += torch.stack((loss.detach(), (margin > 0).sum() / n_pairs, margin.sum() / n_pairs)).cpu()
        grad_norm, = run.step_optimizer(model)
        if (step + 1) % cfg.log_every == 0 or step + 1 == len(batches):
            totals = dict(zip(("loss", "accuracy", "margin"), all_reduce(totals).tolist()))
            run.log(**totals, grad_norm=grad_norm)

    model = full_copy(model)
    scores = score(model, [g.prompt for g in held_out], [g.responses for g in held_out])
    metrics = accuracy(held_out, scores)
    metrics["mean_before"], metrics["std_before"] = normalise(model, enough(model, sum(scores, []), train))
    run.save(model, bundle.saved["tokenizer"], bundle.task, metrics)
    ranked = Interval(metrics["accuracy"], metrics["accuracy_low"], metrics["accuracy_high"])
    print(f"wrote {run.path}: it ranks {ranked:.3f} of {metrics['pairs']} held-out pairs as their labels do; "
          f"`the longer wins` {metrics['longer_wins']:.3f}", flush=True)
    if "accuracy_gold" in metrics:      # labels are noisy
        print(f"it ranks {metrics['accuracy_gold']:.3f} of them as the gold reward does, with which "
              f"{metrics['labels_gold']:.3f} of the labels agree", flush=True)
    print(f"next: python ppo.py --model {cfg.model} --reward {run.path}", flush=True)


if __name__ == "__main__":
    launch(main, Config, __doc__, PRESETS)
