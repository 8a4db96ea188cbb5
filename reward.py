"""Reward model: a scalar on a response's last token, trained on which of two responses is preferred.

    python reward.py --model ckpt_sft.pt             # synthetic task: samples pairs, labels them with noise
    python reward.py --model ckpt_sft.pt --data DIR  # preferences.jsonl: {"prompt", "chosen", "rejected"}

Writes ckpt_reward.pt and metrics_reward.jsonl.

Deviations from the paper: the responses of one prompt are packed behind it, and all their pairs are compared
from one forward pass; the learning rate is that of a tiny model.  As in the paper the reward model starts
from the SFT model, and its outputs are shifted and scaled to mean 0 and standard deviation 1 on held-out
responses.  Here the shift and the scale are folded into the head's weight and bias, so nothing downstream has
to know them.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from common import pretrained
from common.dist import all_reduce, gather_rows, my_rows, param_groups, shard
from common.errors import UserError, check
from common.flags import Common, Count, Frozen, Natural, NonNegative, Positive, launch, setup, use_threads
from common.loop import Run
from common.stats import Interval, bootstrap_ratio
from common.tokenizer import load_tokenizer
from model import full_copy, pack, rewards
from splits import encode_prompts, encode_responses, length_bucketed_batches, task_of
from tasks.annotators import Group, annotated

_SMALL = dict(freeze=0.8, lr=1e-4, batch_size=16, dtype="bf16")
PRESETS = {"paper": dict(freeze=0.8, lr=3e-5, batch_size=64, epochs=1, prompts=10**6),     # its tables 2-4
           "authors": dict(freeze=0.8, lr=1e-5, batch_size=8, epochs=1, prompts=10**6),    # their commands
           **dict.fromkeys(("small-gpt2", "small-opt", "small-llama"), _SMALL)}


@dataclass
class Config(Common):
    model: str = "ckpt_sft.pt"  # checkpoint to start from, and in the synthetic task to sample from
    prompts: Count = 8000       # prompts with preferences; a folder may hold fewer
    held_out: Count = 500       # prompts of the held-out pairs
    samples: Count = 5          # responses sampled for each prompt in the synthetic task, compared with each
                                # other and with the reference
    typicality: NonNegative = 0.0   # a: how much the synthetic task's annotators like what is typical
    pairs: str = ""             # file of the synthetic task's pairs, read if it is there, else written:
                                # sampled once for reward.py and methods/dpo.py
    epochs: Count = 1           # passes over the prompts
    batch_size: Count = 8       # prompts a step, each with all its pairs
    micro_batch_size: Natural = 0   # of these, prompts forwarded at once (on each GPU); 0: all
    recompute: bool = False     # compute activations again in the backward pass: less memory, a third more
                                # time
    shard: bool = False         # torchrun: each rank keeps a shard of each trained layer; for large models
    freeze: Frozen = -1.0       # fraction of the layers frozen with the embeddings; -1: as in the checkpoint.
                                # The paper's 0.8
    lr: Positive = 1e-3         # peak learning rate, cosine to zero; the paper uses 3e-5
    warmup: Natural = 50        # steps of linear warm-up, at most a tenth of all
    max_grad_norm: Positive = 1.0   # gradients are scaled down to this norm
    log_every: Count = 100      # steps between log lines
    quiet: bool = False         # no progress bar and no log lines


def bradley_terry_loss(chosen, rejected, n_pairs=None):
    """-log sigma(r_chosen - r_rejected), averaged over pairs.

    chosen, rejected: (B,) rewards; n_pairs: of the whole batch, if these are a part of it.  (Stiennon et
    al. 2020)"""
    return -F.logsigmoid(chosen - rejected).sum() / (n_pairs or len(chosen))


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, then cosine to zero."""
    warmup = min(warmup, steps // 10 + 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ------------------------------------------------------------------------------------------------ comparisons

def read_groups(tokenizer, rows, max_prompt_len, max_new_tokens):
    """Preference rows -> groups.  Rows with one prompt form one group, so a response is read once however
    many pairs it is in."""
    by_prompt = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    texts = [list(dict.fromkeys(t for row in pairs for t in (row["chosen"], row["rejected"])))
             for pairs in by_prompt.values()]
    prompts = encode_prompts(tokenizer, list(by_prompt), max_prompt_len, "preference prompts")
    responses = encode_responses(tokenizer, texts, max_new_tokens, "preferred and rejected responses")
    groups, n_equal = [], 0
    for prompt, answers, known, pairs in zip(prompts, responses, texts, by_prompt.values()):
        pairs = [(known.index(r["chosen"]), known.index(r["rejected"])) for r in pairs]
        different = [(a, b) for a, b in pairs if answers[a] != answers[b]]
        n_equal += len(pairs) - len(different)
        if different:
            groups.append(Group(prompt, answers, different))
    if n_equal:
        print(f"{n_equal} of {len(rows)} pairs dropped: their two responses are the same "
              f"{max_new_tokens} tokens", flush=True)
    return groups


def print_known_prompts(rows, held_out_rows):
    """Prints how many held-out prompts are learned from too."""
    known = {row["prompt"] for row in rows} & {row["prompt"] for row in held_out_rows}
    if known:
        print(f"{len(known)} prompts with held-out preferences have preferences to learn from too: the "
              "held-out accuracy is flattering", flush=True)


def comparisons(cfg, sft, weights_hash, tokenizer, task):
    """(train groups, held-out groups) of a task.  A folder without held-out preferences gives the last tenth
    of its prompts: of its prompts, not of its pairs, because pairs of one prompt would leak."""
    check(task.synthetic or not (cfg.typicality or cfg.pairs), "--typicality and --pairs: only a synthetic "
          "task's annotators are made here; these preferences are read as they are")
    if task.synthetic:
        return annotated(cfg, sft, weights_hash, tokenizer, task)
    rows, held_out_rows = task.preferences(), task.preferences(validation=True)
    if not rows:
        raise UserError(f"--data {task.data}: no preferences.jsonl, whose lines are {{'prompt': ..., "
                        f"'chosen': ..., 'rejected': ...}}; {task.found()}")
    print_known_prompts(rows, held_out_rows or [])
    limits = task.max_prompt_len(sft.config.context), task.max_new_tokens
    train = read_groups(tokenizer, rows, *limits)
    held_out = read_groups(tokenizer, held_out_rows or [], *limits)
    if not held_out_rows:
        n = max(1, len(train) // 10)
        train, held_out = train[:-n], train[-n:]
        print(f"no preferences_validation.jsonl: nothing is learned from the last {n} prompts of "
              f"preferences.jsonl, {min(n, cfg.held_out)} of which are tested on", flush=True)
    check(train and held_out, f"{task.data}: no pairs of two different responses to train and to test on")
    return train[:cfg.prompts], held_out[:cfg.held_out]


# ------------------------------------------------------------------------------------------- what it is worth

def score(model, prompts, responses, **sizes):
    """Reward of each response.  prompts: id lists; responses: for each prompt a list of id lists.  Returns
    lists of floats of that shape.  The ranks divide the prompts among them; sizes as in
    `score_on_this_rank`."""
    return gather_rows(score_on_this_rank(model, my_rows(prompts), my_rows(responses), **sizes))


@torch.no_grad()
def score_on_this_rank(model, prompts, responses, batch_size=0, packed_together=8):
    """`score` in one process.

    packed_together: responses packed behind one copy of their prompt; beyond about 8, attention over the
    longer row costs more than the prompt saves.  batch_size: responses in one forward pass, at most; 0:
    32 on a CPU, 256 on a GPU."""
    device, flat = model.embed.weight.device, []
    batch_size = batch_size or (256 if device.type == "cuda" else 32)
    parts = [(prompt, group[i:i + packed_together]) for prompt, group in zip(prompts, responses, strict=True)
             for i in range(0, len(group), packed_together)]
    step = max(1, batch_size // packed_together)
    for i in range(0, len(parts), step):
        packed = pack(*zip(*parts[i:i + step]), device)
        r = rewards(model, model(packed), packed)
        check(r.isfinite().all(), "the reward model's score of a response is not finite: its weights are "
              "damaged, or bf16 is too coarse for them (--dtype fp32)")
        flat += r.tolist()
    scores = iter(flat)
    return [[next(scores) for _ in group] for group in responses]


def points(difference):
    """1 for a positive difference, 0 for a negative one, a half for a tie."""
    return float(np.sign(difference) / 2 + .5)


def accuracy(groups, scores):
    """How often the higher score wins, against labels and, where known, the gold reward; ties count half.
    Pairs of equal gold reward count half in `labels_gold` and are left out of `accuracy_gold`.  scores: as
    from `score`.

    Returns a flat dict.  Its interval is bootstrapped over prompts, because pairs of one prompt depend on
    each other."""
    per_prompt, all_hits, longer, large_gap, gold = [], [], [], [], []
    for group, s in zip(groups, scores):
        hits = [points(s[a] - s[b]) for a, b in group.pairs]
        per_prompt.append((sum(hits), len(hits)))
        all_hits += hits
        longer += [points(len(group.responses[a]) - len(group.responses[b])) for a, b in group.pairs]
        for hit, gap in zip(hits, group.gaps):
            against_gold = hit if gap > 0 else 1 - hit
            if gap:
                gold.append(against_gold)
            if abs(gap) > 1:
                large_gap.append((hit, against_gold))
    mean, low, high = bootstrap_ratio(per_prompt)
    out = {"accuracy": mean, "accuracy_low": low, "accuracy_high": high, "longer_wins": np.mean(longer),
           "pairs": sum(n for _, n in per_prompt)}
    if 0 in longer:
        out["accuracy_shorter_won"] = np.mean(np.array(all_hits)[np.array(longer) == 0])
    if gold:
        agree = [points(gap) for g in groups for gap in g.gaps]
        out |= {"accuracy_gold": np.mean(gold), "labels_gold": np.mean(agree)}
    if large_gap:
        out |= {"accuracy_gap1": np.mean([a for a, _ in large_gap]),
                "accuracy_gap1_gold": np.mean([b for _, b in large_gap])}
    return {k: v if isinstance(v, int | None) else float(v) for k, v in out.items()}


def normalise(model, scores):
    """Folds (r - mean) / std over scores (any number of floats) into the head, so that these get mean 0 and
    standard deviation 1.  Returns (mean, std)."""
    mean, std = float(np.mean(scores)), float(np.std(scores))
    check(std > 0, "the reward model gives every held-out response the same score: it has learned nothing; "
          "train longer or raise --lr")
    with torch.no_grad():
        model.head.weight.div_(std)
        model.head.bias.sub_(mean).div_(std)
    return mean, std


# --------------------------------------------------------------------------------------------------- training

def winners_and_losers(groups, device):
    """Two (n_pairs,) index tensors into the groups' responses, laid end to end."""
    first = np.cumsum([0] + [len(g.responses) for g in groups])
    return torch.tensor([(start + a, start + b) for start, g in zip(first, groups) for a, b in g.pairs],
                        device=device).T


def main(cfg):
    device, rng = setup(cfg)
    sft, saved = pretrained.load(cfg.model, "--model", device, cfg.dtype)
    use_threads(cfg, sft)
    task, tokenizer = task_of(cfg, saved), load_tokenizer(saved["tokenizer"])
    train, held_out = comparisons(cfg, sft, saved["weights_hash"], tokenizer, task)
    print(f"{len(train)} prompts with pairs to learn from, {len(held_out)} held out", flush=True)
    if cfg.freeze >= 0:
        sft.freeze(round(cfg.freeze * sft.config.n_layer))
    model = sft.with_scalar_head()
    model.recompute = cfg.recompute
    if cfg.shard:
        shard(model)
    optimizer = torch.optim.AdamW(param_groups(model.trainable()), lr=cfg.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=True)
    batches = length_bucketed_batches([g.n_tokens for g in train], cfg.batch_size, cfg.epochs, rng)
    inputs = [saved["weights_hash"], [(g.prompt, g.responses, g.pairs) for g in train]]
    run = Run("reward", cfg, optimizer, rng, inputs, model=model)

    for step in run.steps(len(batches)):
        run.set_lr(learning_rate(step, len(batches), cfg.lr, cfg.warmup))
        batch = [train[i] for i in batches[step]]
        n_pairs = sum(len(g.pairs) for g in batch)
        totals = torch.zeros(3)         # loss, accuracy, margin
        for part, weight in run.micro_batches(batch):
            packed = pack([g.prompt for g in part], [g.responses for g in part], device)
            r = rewards(model, model(packed), packed)           # (R,), of all responses in the part
            winner, loser = winners_and_losers(part, device)
            loss = weight * bradley_terry_loss(r[winner], r[loser], n_pairs)
            loss.backward()
            margin = weight * (r[winner] - r[loser]).detach()
            totals += torch.stack((loss.detach(), (margin > 0).sum() / n_pairs, margin.sum() / n_pairs)).cpu()
        grad_norm, = run.step_optimizer(model.trainable(), rows=batches[step])
        if (step + 1) % cfg.log_every == 0 or step + 1 == len(batches):
            totals = dict(zip(("loss", "accuracy", "margin"), all_reduce(totals).tolist()))
            run.log(**totals, grad_norm=grad_norm)

    model = full_copy(model)
    scores = score(model, [g.prompt for g in held_out], [g.responses for g in held_out])
    metrics = accuracy(held_out, scores)
    metrics["mean_before"], metrics["std_before"] = normalise(model, [s for group in scores for s in group])
    run.save(model, saved["tokenizer"], task, metrics)
    report(run.path, metrics)


def report(path, m):
    """Prints what the reward model is worth.  m: the metrics of its checkpoint."""
    accuracy = Interval(m["accuracy"], m["accuracy_low"], m["accuracy_high"])
    print(f"wrote {path}: held-out accuracy {accuracy:.3f} on {m['pairs']} pairs; `the longer wins` "
          f"{m['longer_wins']:.3f}", flush=True)
    if "accuracy_gold" in m:
        print(f"the gold reward agrees with the labels on {m['labels_gold']:.3f} of the pairs, with the "
              f"model on {m['accuracy_gold']:.3f}", flush=True)
    if "accuracy_gap1" in m:
        print(f"where the gold rewards differ by more than 1: {m['accuracy_gap1']:.3f} with the labels, "
              f"{m['accuracy_gap1_gold']:.3f} with the gold reward", flush=True)


if __name__ == "__main__":
    launch(main, Config, __doc__, PRESETS)
