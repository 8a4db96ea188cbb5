"""One step of PPO, one pair of the reward model and one packed row, token by token: a page of tables.

    python -m tools.one_step --model ckpt_sft.pt --reward ckpt_reward.pt > docs/one-step.md

Takes the steps of `python ppo.py` with its default settings, and shows the last of --step steps, so that the
policy has left its reference.  All numbers come from the functions that ppo.py, reward.py and model.py train
with.  Synthetic tasks only, because the pair needs an annotator.
"""
import contextlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import model as M
import ppo
import reward
from common.errors import check
from common.flags import Common, Count, launch, setup
from common.loop import Run
from splits import decode
from tasks import annotators


@dataclass
class Config(Common):
    model: str = "ckpt_sft.pt"  # the SFT policy
    reward: str = "ckpt_reward.pt"  # the reward model
    step: Count = 10            # step of PPO that is shown


# ----------------------------------------------------------------------------------------------- the PPO step

@dataclass
class Step:
    """Everything of one PPO step.  Grids are (B, T)."""
    texts: list                 # B prompts
    ro: ppo.Rollout
    score: torch.Tensor         # (B,)
    kl: torch.Tensor
    rewards: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    whitened: torch.Tensor
    ratio: torch.Tensor         # of the policy after the update to the policy that sampled
    stats: dict                 # as `ppo.update` returns them


def ppo_steps(cfg, models, tokenizer, task, n_steps, rng, folder):
    """Takes n_steps steps as ppo.main does.  cfg: ppo.Config; folder: for the files of an interrupted run.
    Returns the last one, a Step."""
    policy, _, value_model, reward_model = models
    rows, prompts = ppo.read_prompts(task, tokenizer, cfg.steps * cfg.batch_size, policy.config.context)
    optimizer = torch.optim.Adam(policy.trainable() + value_model.trainable(), lr=cfg.lr, fused=True)
    loop = Run("ppo", cfg, optimizer, rng, inputs=[], path=Path(folder) / "ckpt_ppo.pt", policy=policy,
               value=value_model)
    for step in loop.steps(n_steps):
        loop.set_lr(cfg.lr * (1 - step / cfg.steps))
        batch = loop.next_rows(len(prompts), cfg.batch_size)
        ro = ppo.rollout(*models, [prompts[i] for i in batch], task.max_new_tokens, tokenizer.eot_token,
                         cfg.temperature, rng)
        score = torch.where(ro.finished, ro.score, cfg.no_eos_score)
        kl = ppo.kl_estimate(ro.logp, ro.ref_logp)
        rewards = ppo.token_rewards(score, kl, ro.mask, cfg.kl_coef)
        advantages, returns = ppo.gae(rewards, ro.values, ro.mask, cfg.gamma, cfg.lam)
        whitened = ppo.whiten(advantages, ro.mask)
        stats = ppo.update(policy, value_model, ro, whitened, returns, cfg, rng, loop)
    ratio = (log_probs_now(policy, ro, cfg.temperature) - ro.logp).exp()
    texts = [rows[i]["prompt"] for i in batch]
    return Step(texts, ro, score, kl, rewards, advantages, returns, whitened, ratio, stats)


@torch.no_grad()
def log_probs_now(policy, ro, temperature):
    """log pi of a rollout's responses under the policy as it is now: (B, T)."""
    packed = ro.pack(list(range(len(ro.responses))))
    hidden = policy.top(policy.trunk(packed), packed)
    return packed.to_padded(M.log_probs(policy, hidden, packed, temperature))


def two_responses(ro):
    """Numbers of two responses of a batch: the first of 12 to 16 tokens that ended, or else the longest, and
    the shortest of all."""
    lengths = ro.mask.sum(1).tolist()
    middle = [i for i, n in enumerate(lengths) if 12 <= n <= 16 and ro.finished[i]]
    return (middle or [lengths.index(max(lengths))])[0], lengths.index(min(lengths))


# ----------------------------------------------------------------------------------------------------- tables

def table(header, rows):
    """A Markdown table.  header, rows: lists of strings."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(header), *lines[1:]])


def number(x):
    """Three digits, and no minus before a zero."""
    return f"{float(x):.3f}".replace("-0.000", "0.000")


def token_text(tokenizer, token):
    """A token as a cell of a table, a leading space as a middle dot."""
    if token == tokenizer.eot_token:
        return "**EOS**"
    text = tokenizer.decode([token]).replace(" ", "·").replace("\n", "\\n").replace("|", "\\|")
    return f"`{text}`"


def ranges(numbers):
    """[0, 1, 2, 5] -> "0–2, 5"."""
    found = []
    for n in numbers:
        if found and found[-1][1] == n - 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ", ".join(f"{a}–{b}" if a < b else f"{a}" for a, b in found)


COLUMNS = ("t", "token", "mask", "log π", "log π_ref", "KL", "reward", "value", "advantage", "return",
           "whitened", "ratio after")


def response_table(step, i, n_rows, tokenizer):
    """Response i of the batch, n_rows places of its row in the grids: its tokens, then the padding."""
    ro, rows = step.ro, []
    grids = (ro.logp, ro.ref_logp, step.kl, step.rewards, ro.values, step.advantages, step.returns,
             step.whitened)
    for t in range(n_rows):
        inside = bool(ro.mask[i, t])
        token = token_text(tokenizer, ro.responses[i][t]) if inside else "padding"
        numbers = [number(grid[i, t]) for grid in grids]
        rows.append([f"{t}", token, f"{int(inside)}", *numbers, f"{step.ratio[i, t]:.4f}"])
    return table(COLUMNS, rows)


def pair_table(head, packed, j, responses, tokenizer):
    """Response j of a pair, with the output of the scalar head at each of its tokens.  head: (B*Q,)."""
    n, last = len(responses[j]), int(packed.last_idx[j])
    rows = []
    for t, token in enumerate(responses[j]):
        value = f"{head[last - n + 1 + t].item():.3f}"
        rows.append([f"{t}", token_text(tokenizer, token), f"**{value}**" if t == n - 1 else value,
                     "← the reward" if t == n - 1 else ""])
    return table(("t", "token", "scalar head", ""), rows)


def packed_rows(packed, tokenizer):
    """A packed row (B = 1) as lists of cells, one for each place: place, token, position, what it sees, its
    number in `used`, what it predicts, which reward stands there.  All from the tensors of `pack`."""
    n_places, used = packed.tokens.shape[1], packed.used[0].tolist()
    target_of = {}
    for idx, target, j in zip(packed.predict_idx, packed.target, packed.response_idx):
        target_of.setdefault(used[idx], []).append(f"{token_text(tokenizer, int(target))} ({'ab'[j]})")
    reward_of = {used[idx]: f"reward of {'ab'[j]}" for j, idx in enumerate(packed.last_idx.tolist())}
    n_real = max(reward_of) + 1
    cells = []
    for place in range(n_places):
        token = int(packed.tokens[0, place])
        sees = packed.mask[0, 0, place].nonzero()[:, 0].tolist()
        cells.append([f"{place}", token_text(tokenizer, token) if place < n_real else "padding",
                      f"{int(packed.positions[0, place])}", ranges(sees),
                      f"{used.index(place)}" if place in used else "", ", ".join(target_of.get(place, [])),
                      reward_of.get(place, "")])
    return cells, n_real


def packed_table(packed, prompt_length, tokenizer):
    """The table of a packed row, most of the prompt and of the padding left out."""
    header = ("place", "token", "position", "sees the places", "`used`", "predicts", "`last_idx`")
    cells, n_real = packed_rows(packed, tokenizer)
    gap = [["…", *[""] * (len(header) - 1)]]
    rows = cells[:2] + gap + cells[prompt_length - 2:n_real + 1]
    return table(header, rows + gap if len(cells) > n_real + 1 else rows)


# ------------------------------------------------------------------------------------------------------- page

def intro(cfg):
    return f"""# One step, token by token

Three things that a reader of the code has to picture: what one step of PPO computes for each token, where the
reward model's score stands, and how two responses lie in one row. Every number is from a real run on the
synthetic task: `python sft.py`, `python reward.py` and {cfg.step - 1} steps of `python ppo.py` stand behind
step {cfg.step}, which is shown. A command made the page, tables and numbers included:

```
python -m tools.one_step --model ckpt_sft.pt --reward ckpt_reward.pt > docs/one-step.md
```

A middle dot in a token is a space. EOS is the token that ends a response. Numbers are rounded, so the last
digit of a sum may be off by one.
"""


def ppo_section(cfg, step, tokenizer, task):
    """cfg: ppo.Config."""
    i, j = two_responses(step.ro)
    n = int(step.ro.mask[i].sum())
    return f"""## A step of PPO

To the prompt

```
{step.texts[i]}
```

the policy wrote these tokens, a response with a gold reward of {gold(task, step, i, tokenizer):.2f}:

{response_table(step, i, n, tokenizer)}

What the columns are, with β = {cfg.kl_coef:g}, γ = {cfg.gamma:g} and λ = {cfg.lam:g}:

- **log π** and **log π_ref** are the log-probabilities of the token under the policy that sampled it and
  under the SFT policy, in nats. Their difference is the **KL** of the token (estimator k1). It may be
  negative at one token; its sum over the response is {step.kl[i].sum().item():.3f} nats.
- **reward** is −β · KL at every token.
  {score_text(cfg, step, i)}
- **value** is the sum of rewards that the value model expects from here on. It stands at the position that
  predicts the token, so it does not know the token yet.
- **advantage** comes from GAE, from the last token backwards.
{gae_text(cfg, step, i, n)}
- **return** = advantage + value: the target of the value model.
- **whitened** is the advantage, shifted and scaled so that all response tokens of the batch have mean 0 and
  variance 1. The policy loss uses it.
- **ratio after** is π_new / π of the token after the update ({cfg.epochs} epochs of {cfg.minibatches}
  minibatches). Before the first minibatch it is 1 everywhere (`ratio_first` is
  {step.stats['ratio_first']:.4f}). A positive whitened advantage pushes it above 1, a negative one below. All
  tokens move the same weights, so not every token obeys. A ratio that has left
  [{1 - cfg.clip_ratio:g}, {1 + cfg.clip_ratio:g}] in that direction is pushed no further: this was so for
  {step.stats['pg_clipfrac']:.1%} of the tokens (`pg_clipfrac`).

{padding_text(step, j, tokenizer)}"""


def gold(task, step, i, tokenizer):
    """Gold reward of response i."""
    return task.synthetic.gold_reward(step.texts[i], *decode(tokenizer, step.ro.responses[i]))


def score_text(cfg, step, i):
    """Where the score lands."""
    score, last = step.score[i].item(), int(step.ro.mask[i].sum()) - 1
    penalty = cfg.kl_coef * step.kl[i, last].item()
    if not step.ro.finished[i]:
        return (f"The response did not end, so the fixed score {score:.3f} (`--no-eos-score`)\n"
                "  is added at its last token.")
    return (f"The reward model's score {score:.3f} is added at EOS, and nowhere else:\n  {score:.3f} − "
            f"{cfg.kl_coef:g} · ({step.kl[i, last].item():.3f}) = {score - penalty:.3f}.")


def gae_text(cfg, step, i, n):
    """The last two advantages as arithmetic."""
    r, v, a = (grid[i, :n].tolist() for grid in (step.rewards, step.ro.values, step.advantages))
    lines = [f"  - t = {n - 1}: A = r − V = {r[-1]:.3f} − ({v[-1]:.3f}) = {a[-1]:.3f}."]
    if n > 1:
        lines.append(f"  - t = {n - 2}: A = r + γ V(next) − V + γ λ A(next) =\n"
                     f"    {r[-2]:.3f} + {cfg.gamma:g} · ({v[-1]:.3f}) − ({v[-2]:.3f}) + "
                     f"{cfg.gamma * cfg.lam:g} · ({a[-1]:.3f}) = {a[-2]:.3f}.")
    return "\n".join(lines)


def padding_text(step, j, tokenizer):
    n, width = int(step.ro.mask[j].sum()), step.ro.mask.shape[1]
    shown = min(n + 3, width)
    end = "EOS" if step.ro.finished[j] else "its last token"
    return f"""The shortest response of the same batch has {n} tokens. All rows of the grids have T = {width}
places, as many as the longest response has tokens. The first {shown} places of its row:

{response_table(step, j, shown, tokenizer)}

Behind {end} the mask is 0 and every grid holds 0 (the ratio is e^0 = 1). Losses and means are sums over the
places where the mask is 1, divided by the number of these places. The mask comes from the lengths, never from
token values: EOS has mask 1, so the policy learns to stop.
"""


def pair_section(reward_model, group, text, tokenizer):
    """group: a reward.Group with one pair, the preferred response first."""
    packed = M.pack([group.prompt], [group.responses], reward_model.embed.weight.device)
    with torch.no_grad():
        hidden = reward_model(packed)
        head = reward_model.head(hidden)[0, :, 0]
        r = M.rewards(reward_model, hidden, packed)
        loss = reward.bradley_terry_loss(r[:1], r[1:])
    margin = (r[0] - r[1]).item()
    return f"""## A pair of the reward model

The reward model is the SFT model with a scalar head in place of the language model's. The annotator of the
synthetic task preferred response a to response b as answers to

```
{text}
```

Response a (preferred):

{pair_table(head, packed, 0, group.responses, tokenizer)}

Response b:

{pair_table(head, packed, 1, group.responses, tokenizer)}

The tables apply the head to every token. Training applies it to the last one alone, which is EOS, because
only there the model has seen the response to its end (`Packed.last_idx`, `model.rewards`).

| | |
| --- | --- |
| r(a) − r(b) | {r[0]:.3f} − ({r[1]:.3f}) = {margin:.3f} |
| P(a preferred to b) = σ(r(a) − r(b)) | {torch.sigmoid(r[0] - r[1]):.3f} |
| loss = −log σ(r(a) − r(b)) | {loss:.3f} |
| gold reward of a less that of b | {group.gaps[0]:.2f} |
"""


def packed_section(group, tokenizer):
    packed = M.pack([group.prompt], [group.responses])
    P, Q, S = len(group.prompt), packed.used.shape[1], packed.tokens.shape[1]
    return f"""## A packed row

The pair above goes through the model in one row: the prompt ({P} tokens), response a, response b, padding up
to S = {S}. The prompt is computed once. This is what `model.pack` builds:

{packed_table(packed, P, tokenizer)}

- **position** continues the prompt's for both responses: b starts at {P}, as a does.
- **sees the places**: a token of b sees the prompt and b, never a. So both get the numbers that they would
  get alone.
- **`used`** numbers the places whose hidden states are needed: the last token of the prompt and everything
  behind it, {Q} with some padding, whose output nothing reads. The last layer computes its output there only,
  from the keys and values of all places. The head runs at `predict_idx` or `last_idx` alone.
- **predicts**: logits at a place predict the next token. The last token of the prompt predicts the first
  token of a and that of b. EOS predicts nothing. `Packed.predict_idx` lists these places by their number in
  `used`, one entry a response token. A shift by one would not do: the token before the first token of b
  belongs to a.
- **`last_idx`**: the reward of a response stands at its last token.
"""


def a_pair(sft, tokenizer, task, rng):
    """(a reward.Group with one pair, the preferred response first; the prompt's text).  Of the pairs of the
    first validation posts it is the shortest whose gold rewards differ by more than 1, if any do."""
    rows = task.rows("validation", 8)
    texts = {tuple(tokenizer.encode_ordinary(row["prompt"])): row["prompt"] for row in rows}
    groups = annotators.sample_groups(sft, tokenizer, task, rows, 5, rng)
    pairs = [(gap <= 1, sum(len(g.responses[k]) for k in pair), n, pair, gap)
             for n, g in enumerate(groups) for pair, gap in zip(g.pairs, g.gaps)]
    check(pairs, "--model: all of its responses to one prompt are equal; there is no pair to show")
    _, _, n, (winner, loser), gap = min(pairs)
    responses = [groups[n].responses[winner], groups[n].responses[loser]]
    group = reward.Group(groups[n].prompt, responses, [(0, 1)], [gap])
    return group, texts[tuple(group.prompt)]


def main(cfg):
    device, rng = setup(cfg)
    check(cfg.reward != "gold", "--reward gold: the page shows a reward model; give a checkpoint")
    ppo_cfg = ppo.Config(model=cfg.model, reward=cfg.reward, task=cfg.task, seed=cfg.seed,
                         threads=cfg.threads, dtype=cfg.dtype, quiet=True)
    check(cfg.step <= ppo_cfg.steps, f"--step {cfg.step}: a run has {ppo_cfg.steps} steps")
    # what the scripts print is no part of the page
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        models, tokenizer, _, task, _ = ppo.build(ppo_cfg, device)
        check(task.synthetic, f"--model {cfg.model}: its task is not synthetic")
        group, text = a_pair(models[1], tokenizer, task, torch.Generator().manual_seed(cfg.seed))
        step = ppo_steps(ppo_cfg, models, tokenizer, task, cfg.step, rng, folder)
    sections = [intro(cfg), ppo_section(ppo_cfg, step, tokenizer, task),
                pair_section(models[3], group, text, tokenizer), packed_section(group, tokenizer)]
    print("\n".join(sections))


if __name__ == "__main__":
    launch(main, Config, __doc__)
