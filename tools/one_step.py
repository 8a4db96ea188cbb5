"""One step of PPO, one pair of the reward model and one packed row, token by token: the tables of
docs/one-step.md.

    python -m tools.one_step --model ckpt_sft.pt --reward ckpt_reward.pt

Takes the steps of `python ppo.py` with its default settings, and shows the last of --step steps, so that the
policy has left its reference.  All numbers come from the functions that ppo.py, reward.py and model.py train
with.  Synthetic task only, because the pair needs an annotator.
"""
import contextlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import ppo
import reward
from common.errors import UserError
from common.flags import Count, Flags, Seed, Natural, arg, launch, setup
from common.loop import Run
from model import pack
from splits import decode
from tasks import annotators


@dataclass
class Config(Flags):
    model: str = arg("ckpt_sft.pt", "the SFT policy")
    reward: str = arg("ckpt_reward.pt", "the reward model")
    step: Count = arg(10, "step of PPO that is shown")
    seed: Seed = arg(0, "as of ppo.py")
    threads: Natural = arg(0, "CPU threads; 0: one for a small model, torch's choice for others")


# ------------------------------------------------------------------------------------------------ Markdown

def table(header, rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, *rows)]
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


# ----------------------------------------------------------------------------------------------- the PPO step

def ppo_step(cfg, models, bundle, n_steps, rng):
    """Takes n_steps steps as ppo.main does.  Returns (text of each prompt, rollout, {column: (B, T) grid},
    statistics of the update) of the last one."""
    policy, _, value_model, _ = models
    rows, prompts = ppo.read_prompts(bundle, cfg.steps * cfg.batch_size)
    optimizer = torch.optim.Adam(policy.trainable() + value_model.trainable(), lr=cfg.lr, fused=True)
    with tempfile.TemporaryDirectory() as folder:       # for the state of an interrupted run
        run = Run("ppo", cfg, optimizer, rng, [], Path(folder) / "ckpt_ppo.pt", policy=policy,
                  value=value_model)
        for step in run.steps(n_steps):
            run.set_lr(cfg.lr * (1 - step / cfg.steps))
            batch = run.next_rows(len(prompts), cfg.batch_size)
            ro = ppo.rollout(*models, [prompts[i] for i in batch], bundle.task.max_new_tokens,
                             bundle.tokenizer.eot_token, cfg.temperature, rng)
            kl = ppo.kl_estimate(ro.logp, ro.ref_logp)
            score = torch.where(ro.finished, ro.score, cfg.no_eos_score)
            rewards = ppo.token_rewards(score, kl, ro.mask, cfg.kl_coef)
            advantages, returns = ppo.gae(rewards, ro.values, ro.mask, cfg.gamma, cfg.lam)
            whitened = ppo.whiten(advantages, ro.mask)
            stats = ppo.update(policy, value_model, ro, whitened, returns, cfg, run)
    with torch.no_grad():
        ratio = (policy.log_probs(ro.packed, ro.h_policy, cfg.temperature) - ro.logp).exp()
    return [rows[i]["prompt"] for i in batch], ro, {
        "log π": ro.logp, "log π_ref": ro.ref_logp, "KL": kl, "reward": rewards, "value": ro.values,
        "advantage": advantages, "return": returns, "whitened": whitened, "ratio after": ratio}, stats


def response_table(ro, grids, i, n_places, tokenizer):
    """The first n_places of response i's row in the grids: its tokens, then the padding."""
    rows = []
    for t in range(n_places):
        inside = bool(ro.mask[i, t])
        token = token_text(tokenizer, ro.responses[i][t]) if inside else "padding"
        rows.append([t, token, int(inside), *(number(grid[i, t]) for grid in grids.values())])
    return table(("t", "token", "mask", *grids), rows)


def ppo_section(cfg, bundle, texts, ro, grids, stats):
    """A response of 12 to 16 tokens that ended (or else the longest), with the arithmetic of its last two
    tokens, and the shortest response with its padding."""
    lengths = ro.packed.lengths.tolist()
    middle = [i for i, n in enumerate(lengths) if 12 <= n <= 16 and ro.finished[i]]
    i, shortest = (middle or [lengths.index(max(lengths))])[0], lengths.index(min(lengths))
    n = lengths[i]
    kl, r, v, a = (grids[name][i, :n].tolist() for name in ("KL", "reward", "value", "advantage"))
    gold = bundle.task.synthetic.gold_reward(texts[i], *decode(bundle.tokenizer, ro.responses[i]))
    score = ro.score[i].item() if ro.finished[i] else cfg.no_eos_score
    sums = [f"- KL of the response: {sum(kl):.3f} nats",
            f"- reward at t = {n - 1}: {score:.3f} − {cfg.kl_coef:g} · ({kl[-1]:.3f}) = {r[-1]:.3f}",
            f"- advantage at t = {n - 1}: r − V = {r[-1]:.3f} − ({v[-1]:.3f}) = {a[-1]:.3f}"]
    if n > 1:
        sums.append(f"- advantage at t = {n - 2}: r + γ V(next) − V + γ λ A(next) = {number(r[-2])} + "
                    f"{cfg.gamma:g} · ({v[-1]:.3f}) − ({v[-2]:.3f}) + {cfg.gamma * cfg.lam:g} · "
                    f"({a[-1]:.3f}) = {a[-2]:.3f}")
    sums.append(f"- ratio_first {stats['ratio_first']:.4f}, pg_clipfrac {stats['pg_clipfrac']:.1%}")
    shown = min(min(lengths) + 3, max(lengths))
    return [f"## A step of PPO: a response with a gold reward of {gold:.2f}", f"```\n{texts[i]}\n```",
            response_table(ro, grids, i, n, bundle.tokenizer), "\n".join(sums),
            f"### The shortest response of the batch, of {min(lengths)} tokens; T = {max(lengths)}",
            response_table(ro, grids, shortest, shown, bundle.tokenizer)]


# ------------------------------------------------------------------------ a pair, and the row that it lies in

def a_pair(cfg, bundle):
    """(a preference row, its reward.Group).  Of the pairs of eight validation posts it is the shortest whose
    gold rewards differ by more than 1, if any do."""
    rng, task = torch.Generator().manual_seed(cfg.seed), bundle.task
    rows = annotators.compare(bundle, task.rows("validation", 8), 5, rng)
    if not rows:
        raise UserError("--model: all of its responses to one prompt are equal; there is no pair to show")
    row = min(rows, key=lambda row: (row["gap"] <= 1, len(row["chosen"] + row["rejected"])))
    limits = task.max_prompt_len(bundle.model.config.context), task.max_new_tokens
    group, = reward.read_groups(bundle.tokenizer, [row], *limits)
    return row, group


@torch.no_grad()
def pair_section(reward_model, row, group, tokenizer):
    """The scalar head at each token of the two responses, the preferred one first, and the loss."""
    packed = pack([group.prompt], [group.responses], reward_model.device)
    head, r = reward_model.head(reward_model(packed))[0, :, 0], reward_model.rewards(packed)
    lines = ["## A pair of the reward model", f"```\n{row['prompt']}\n```"]
    for name, tokens, last in zip(("a (preferred)", "b"), group.responses, packed.last_idx.tolist()):
        cells = [[t, token_text(tokenizer, token), number(head[last + 1 - len(tokens) + t]), ""]
                 for t, token in enumerate(tokens)]
        cells[-1][2:] = f"**{cells[-1][2]}**", "← the reward"
        lines += [f"Response {name}:", table(("t", "token", "scalar head", ""), cells)]
    chance = torch.sigmoid(r[0] - r[1])
    return [*lines, table(("", ""), [
        ("r(a) − r(b)", f"{r[0]:.3f} − ({r[1]:.3f}) = {r[0] - r[1]:.3f}"),
        ("P(a preferred to b) = σ(r(a) − r(b))", number(chance)),
        ("loss = −log σ(r(a) − r(b))", number(reward.bradley_terry_loss(r[:1], r[1:]))),
        ("gold reward of a minus that of b", f"{row['gap']:.2f}")])]


def ranges(numbers):
    """[0, 1, 2, 5] -> "0–2, 5"."""
    found = []
    for n in numbers:
        if found and found[-1][1] == n - 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ", ".join(f"{a}–{b}" if a < b else f"{a}" for a, b in found)


def packed_rows(packed, tokenizer):
    """A packed row (B = 1) as lists of cells, one for each place.  All from the tensors of `pack`."""
    used, predicts = packed.used[0].tolist(), {}
    for idx, target, j in zip(packed.predict_idx, packed.target, packed.response_idx):
        predicts.setdefault(used[idx], []).append(f"{token_text(tokenizer, int(target))} ({'ab'[j]})")
    reward_at = {used[idx]: f"reward of {'ab'[j]}" for j, idx in enumerate(packed.last_idx.tolist())}
    return [[place, token_text(tokenizer, int(token)), int(packed.positions[0, place]),
             ranges(packed.mask[0, 0, place].nonzero()[:, 0].tolist()),
             used.index(place) if place in used else "", ", ".join(predicts.get(place, [])),
             reward_at.get(place, "")] for place, token in enumerate(packed.tokens[0])]


def packed_section(group, tokenizer):
    """The row of the pair, most of the prompt left out."""
    packed = pack([group.prompt], [group.responses])
    (P, Q, S), header = (len(group.prompt), packed.used.shape[1], packed.tokens.shape[1]), (
        "place", "token", "position", "sees the places", "`used`", "predicts", "`last_idx`")
    rows = packed_rows(packed, tokenizer)
    return [f"## A packed row: S = {S} places, {P} of the prompt, {Q} used",
            table(header, [*rows[:2], ["…", *[""] * 6], *rows[P - 2:]])]


def main(cfg):
    if cfg.reward == "gold":
        raise UserError("--reward gold: a reward model is shown here; give a checkpoint")
    ppo_cfg = ppo.Config(model=cfg.model, reward=cfg.reward, seed=cfg.seed, threads=cfg.threads, device="cpu",
                         quiet=True)
    if cfg.step > ppo_cfg.steps:
        raise UserError(f"--step {cfg.step}: a run has {ppo_cfg.steps} steps")
    device, rng = setup(ppo_cfg)
    with contextlib.redirect_stdout(sys.stderr):        # what the scripts print is none of the tables
        models, bundle, _ = ppo.build(ppo_cfg, device)
        if not bundle.task.synthetic:
            raise UserError(f"--model {cfg.model}: its task is not synthetic")
        row, group = a_pair(cfg, bundle)
        step = ppo_step(ppo_cfg, models, bundle, cfg.step, rng)
    tokenizer = bundle.tokenizer
    print("\n\n".join([*ppo_section(ppo_cfg, bundle, *step), *pair_section(models[3], row, group, tokenizer),
                       *packed_section(group, tokenizer)]))


if __name__ == "__main__":
    launch(main, Config, __doc__)
