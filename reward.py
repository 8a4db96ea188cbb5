"""Reward model: a scalar on a response's last token, trained on which of two responses is preferred.

    python reward.py --model ckpt_sft.pt             # embedded task: samples pairs, labels them with noise
    python reward.py --model ckpt_sft.pt --data DIR  # preferences.jsonl: {"prompt", "chosen", "rejected"}

Writes ckpt_reward.pt and metrics_reward.jsonl.

Deviations from the paper: all pairs of one prompt's responses are compared from one forward pass, the
responses packed behind the prompt; the learning rate is that of a tiny model.  As in the paper it starts from
the SFT model and is shifted and scaled to mean 0, std 1 on held-out responses afterwards; here that is folded
into the head's weight and bias, so nothing downstream has to know.
"""
import math
from dataclasses import asdict, dataclass, field
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import model as M
from parallel import add_gradients, by_kind, clip_gradients, gather, mine, parts, rank, shard, size, total
from pretrained import load_model
from runtime import (Common, Metrics, Resume, Steady, out_file, peak_memory, require, run, save_checkpoint,
                     setup)
from splits import batches, decode, encode_prompts, encode_response, encode_responses, task_of, tokenizer


_SMALL = dict(freeze=0.8, lr=1e-4, batch=16, dtype="bf16")
PRESETS = {"paper": dict(freeze=0.8, lr=1e-5, batch=8, epochs=1, prompts=10**6),
           **dict.fromkeys(("small-gpt2", "small-opt", "small-llama"), _SMALL)}


@dataclass
class Config(Common):
    model: str = "ckpt_sft.pt"  # checkpoint to start from, and in the embedded task to sample from
    prompts: int = 8000         # prompts with preferences; a folder may hold fewer
    held_out: int = 500         # prompts of the held-out pairs
    samples: int = 5            # responses sampled for each prompt in the embedded task, compared with each
                                # other and the reference
    epochs: int = 1             # passes over the prompts
    batch: int = 8              # prompts a step, each with all its pairs
    micro: int = 0              # of these, prompts forwarded at once (on each GPU); 0: all
    recompute: bool = False     # compute activations again in the backward pass: less memory, a third more
                                # time
    shard: bool = False         # torchrun: a rank keeps its share of each trained layer; for models that do
                                # not fit
    freeze: float = -1.0        # fraction of the layers frozen with the embeddings; below 0: as in the
                                # checkpoint.  The paper's 0.8
    lr: float = 1e-3            # peak learning rate, cosine to zero; the paper uses 1e-5
    warmup: int = 50            # steps of linear warm-up
    clip: float = 1.0           # gradient norm
    log_every: int = 100        # steps between log lines
    quiet: bool = False         # no progress bar and no log lines


def bradley_terry_loss(chosen, rejected, pairs=None):
    """-log sigma(r_chosen - r_rejected), averaged over pairs.  chosen, rejected: (B,) rewards; pairs: of the
    whole batch, if these are a part of it.  (paper, section 4; Stiennon et al. 2020)"""
    return -F.logsigmoid(chosen - rejected).sum() / (pairs or len(chosen))


@dataclass
class Group:
    """One prompt, its responses, and which beat which."""
    prompt: list                                    # ids
    responses: list                                 # id lists
    pairs: list = field(default_factory=list)       # (winner, loser): indices of responses
    gaps: list = field(default_factory=list)        # true score of winner less loser's, where the truth is
                                                    # known


def sample_groups(model, enc, task, rows, samples, generator):
    """An embedded task's annotators: rows' references and `samples` responses of the model, every pair
    labelled at random by P(a preferred to b) = sigma(truth(a) - truth(b)), so that labels are noisy as
    people's are (they agree with the truth on 3 of 4)."""
    prompts = [enc.encode_ordinary(r["prompt"]) for r in rows]
    sampled = gather(M.generate(model, prompts, task.max_new_tokens, n=samples, eos=enc.eot_token,
                                generator=generator, share=(rank(), size())))
    groups = []
    for row, prompt, responses in zip(rows, prompts, sampled):
        responses = responses + [encode_response(enc, row["reference"], task.max_new_tokens)]
        truth = [task.world.judge(row["prompt"], *decode(enc, ids)) for ids in responses]
        group = Group(prompt, responses)
        for a, b in combinations(range(len(responses)), 2):
            if responses[a] == responses[b]:
                continue            # nothing to prefer
            if torch.rand((), generator=generator) >= 1 / (1 + math.exp(truth[b] - truth[a])):
                a, b = b, a
            group.pairs.append((a, b))
            group.gaps.append(truth[a] - truth[b])
        if group.pairs:
            groups.append(group)
    return groups


def read_groups(enc, rows, room, max_new_tokens):
    """Preference rows -> groups: rows with one prompt share it, so a response is read once however many pairs
    it is in."""
    by_prompt = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    texts = [list(dict.fromkeys(t for row in pairs for t in (row["chosen"], row["rejected"])))
             for pairs in by_prompt.values()]
    prompts = encode_prompts(enc, list(by_prompt), room, "preference prompts")
    responses = encode_responses(enc, texts, max_new_tokens, "preferred and rejected responses")
    groups = []
    for ids, answers, known, pairs in zip(prompts, responses, texts, by_prompt.values()):
        compared = [(known.index(r["chosen"]), known.index(r["rejected"])) for r in pairs
                    if r["chosen"] != r["rejected"]]
        if compared:
            groups.append(Group(ids, answers, compared))
    return groups


def comparisons(cfg, sft, enc, task, generator):
    """(train groups, held-out groups) of a task.  A folder without held-out preferences gives the last tenth
    of its prompts: of its prompts, not of its pairs, for pairs of one prompt would leak."""
    if task.world:
        return tuple(sample_groups(sft, enc, task, task.rows(split, n), cfg.samples, generator)
                     for split, n in (("train", cfg.prompts), ("validation", cfg.held_out)))
    rows, held_out_rows = task.preferences(), task.preferences(validation=True)
    require(rows, f"{task.data}: no preferences.jsonl; its lines are "
            "{'prompt': ..., 'chosen': ..., 'rejected': ...}")
    room = task.room(sft.config.context)
    train = read_groups(enc, rows, room, task.max_new_tokens)
    held_out = read_groups(enc, held_out_rows or [], room, task.max_new_tokens)
    if not held_out:
        cut = max(1, len(train) // 10)
        train, held_out = train[:-cut], train[-cut:]
        print(f"no preferences_validation.jsonl: the last {cut} prompts of preferences.jsonl are held out",
              flush=True)
    require(train and held_out, f"{task.data}: no pairs of two different responses to train and to test on")
    return train[:cfg.prompts], held_out[:cfg.held_out]


def score(model, prompts, responses, **sizes):
    """Reward of each response.  prompts: id lists; responses: for each prompt a list of id lists.  Returns
    lists of floats of that shape.  The prompts are shared among the ranks; sizes as in `score_here`."""
    return gather(score_here(model, mine(prompts), mine(responses), **sizes))


@torch.no_grad()
def score_here(model, prompts, responses, batch=32, together=8):
    """`score` in one process.

    together: responses packed behind one copy of their prompt; beyond about 8, attention over the longer row
    costs more than the prompt saves. batch: responses in one forward pass, about."""
    device, flat = model.embed.weight.device, []
    parts = [(prompt, group[i:i + together]) for prompt, group in zip(prompts, responses, strict=True)
             for i in range(0, len(group), together)]
    step = max(1, batch // together)
    for i in range(0, len(parts), step):
        packed = M.pack(*zip(*parts[i:i + step]), device)
        flat += M.rewards(model, model(packed), packed).tolist()
    scores = iter(flat)
    return [[next(scores) for _ in group] for group in responses]


def accuracy(groups, scores):
    """How often the higher score wins, against labels and, where known, the truth; ties count half.  scores:
    as from `score`.

    Returns a flat dict; intervals are bootstrapped over prompts (pairs of one prompt depend on each
    other)."""
    right = lambda difference: float(np.sign(difference) / 2 + .5)  # noqa: E731
    per_prompt, longer, large, truth = [], [], [], []
    for group, s in zip(groups, scores):
        hits = [right(s[a] - s[b]) for a, b in group.pairs]
        per_prompt.append((sum(hits), len(hits)))
        longer += [right(len(group.responses[a]) - len(group.responses[b])) for a, b in group.pairs]
        for hit, gap in zip(hits, group.gaps):
            if gap:
                truth.append(hit if gap > 0 else 1 - hit)
            if abs(gap) > 1:
                large.append((hit, hit if gap > 0 else 1 - hit))
    sums = np.array(per_prompt)
    picks = np.random.default_rng(0).integers(0, len(sums), (1000, len(sums)))
    draws = sums[picks].sum(1)
    low, high = np.percentile(draws[:, 0] / draws[:, 1], (2.5, 97.5))
    out = {"accuracy": sums[:, 0].sum() / sums[:, 1].sum(), "accuracy_low": low, "accuracy_high": high,
           "longer_wins": np.mean(longer),
           "pairs": int(sums[:, 1].sum())}
    if truth:
        agree = [right(gap) for g in groups for gap in g.gaps]
        out |= {"accuracy_truth": np.mean(truth), "labels_truth": np.mean(agree)}
    if large:
        out |= {"accuracy_gap1": np.mean([a for a, _ in large]),
                "accuracy_gap1_truth": np.mean([b for _, b in large])}
    return {k: v if isinstance(v, int) else float(v) for k, v in out.items()}


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up, then cosine to zero."""
    warmup = min(warmup, steps // 10 + 1)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def normalise(model, scores):
    """Folds (r - mean) / std over scores (any number of floats) into the head, so that these get mean 0, std
    1.  Returns (mean, std)."""
    mean, std = float(np.mean(scores)), float(np.std(scores))
    require(std > 0,
            "the reward model gives every held-out response the same score: it has learned nothing; train "
            "longer or raise --lr")
    with torch.no_grad():
        model.head.weight.div_(std)
        model.head.bias.sub_(mean).div_(std)
    return mean, std


def main(cfg):
    device, generator = setup(cfg)
    require(min(cfg.prompts, cfg.held_out, cfg.samples, cfg.epochs, cfg.batch) >= 1 and cfg.lr > 0
            and cfg.micro >= 0,
            "--prompts, --held-out, --samples, --epochs and --batch must be at least 1, --lr above 0, "
            "--micro at least 0")
    sft, saved = load_model(cfg.model, "--model", device, cfg.dtype)
    task, enc, out = task_of(cfg, saved), tokenizer(saved["tokenizer"]), out_file(cfg.out, "ckpt_reward.pt")
    train, held_out = comparisons(cfg, sft, enc, task, generator)
    require(cfg.freeze <= 1, f"--freeze {cfg.freeze} must be at most 1")
    if cfg.freeze >= 0:
        sft.freeze(round(cfg.freeze * sft.config.n_layer))
    model = sft.with_scalar_head()
    model.recompute = cfg.recompute
    if cfg.shard:
        shard(model)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(by_kind(weights), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    lengths = [len(g.prompt) + sum(map(len, g.responses)) for g in train]
    todo = batches(lengths, cfg.batch, cfg.epochs, generator)
    inputs = [saved["digest"], [(g.prompt, g.responses, g.pairs) for g in train]]
    resume = Resume(out, cfg, inputs, generator, optimiser, model=model)
    start, _ = resume.load()
    steps, log, steady = len(todo), Metrics(out, cfg.quiet, start), Steady()
    for step in tqdm(range(start, steps), "reward", initial=start, total=steps, disable=cfg.quiet or None):
        mb_pairs, seen = sum(len(train[i].pairs) for i in todo[step]), torch.zeros(3)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, cfg.lr, cfg.warmup)
        optimiser.zero_grad()
        for part, weight in parts(todo[step], cfg.micro):
            mb = [train[i] for i in part]
            packed = M.pack([g.prompt for g in mb], [g.responses for g in mb], device)
            r = M.rewards(model, model(packed), packed)                             # (R,), all of the part
            first = np.cumsum([0] + [len(g.responses) for g in mb])
            winner, loser = torch.tensor([(s + a, s + b) for s, g in zip(first, mb) for a, b in g.pairs],
                                         device=device).T
            loss = weight * bradley_terry_loss(r[winner], r[loser], mb_pairs)
            loss.backward()
            margin = weight * (r[winner] - r[loser]).detach()
            seen += torch.stack((loss.detach(), (margin > 0).sum() / mb_pairs, margin.sum() / mb_pairs)).cpu()
        add_gradients(weights)
        norm = clip_gradients(weights, cfg.clip)
        if steady(norm.item(), step + 1, todo[step]):
            optimiser.step()
        if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
            log.log(step=step + 1, **dict(zip(("loss", "accuracy", "margin"), total(seen).tolist())),
                    lr=optimiser.param_groups[0]["lr"],
                    grad_norm=norm.item(), peak_mb=round(peak_memory(device)))
        resume.step_done(step + 1)

    model = M.whole(model)
    scores = score(model, [g.prompt for g in held_out], [g.responses for g in held_out])
    metrics = accuracy(held_out, scores)
    metrics["mean_before"], metrics["std_before"] = normalise(model, [s for group in scores for s in group])
    save_checkpoint(out, model, saved["tokenizer"], asdict(task), asdict(cfg), metrics)
    resume.finish()
    print(f"wrote {out}: held-out accuracy {metrics['accuracy']:.3f} [{metrics['accuracy_low']:.3f}, "
          f"{metrics['accuracy_high']:.3f}] on {metrics['pairs']} pairs; `the longer wins` "
          f"{metrics['longer_wins']:.3f}", flush=True)
    if "accuracy_truth" in metrics:
        print(f"labels agree with the truth on {metrics['labels_truth']:.3f}, the model with the truth on "
              f"{metrics['accuracy_truth']:.3f}", flush=True)
    if "accuracy_gap1" in metrics:
        print(f"where the true gap exceeds 1: {metrics['accuracy_gap1']:.3f} with the labels, "
              f"{metrics['accuracy_gap1_truth']:.3f} with the truth", flush=True)


if __name__ == "__main__":
    run(main, Config, __doc__, PRESETS)
