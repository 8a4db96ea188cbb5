"""One step of PPO, one pair of the reward model and one packed row, token by token: the tables of
docs/one-step.md.

    python -m tools.one_step --model ckpt_sft.pt --policy ckpt_ppo.pt --reward ckpt_reward.pt

Samples from --policy, which has left its reference --model, and takes one step over the whole batch, with
the functions that ppo.py and reward.py train with.  Synthetic task only: the pair needs an annotator.
"""
from dataclasses import dataclass

import torch

import ppo
import reward
from common.checkpoint import load_checkpoint
from common.errors import UserError
from common.flags import Flags, arg, launch, setup
from model import pack
from tasks import annotators


@dataclass
class Config(Flags):
    model: str = arg("ckpt_sft.pt", "the SFT policy, the reference")
    policy: str = arg("ckpt_ppo.pt", "the policy that samples; --model itself has a KL of 0")
    reward: str = arg("ckpt_reward.pt", "the reward model")


def table(header, rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, *rows)]
    return "\n".join([lines[0], "|" + " --- |" * len(header), *lines[1:]])


def token_text(tokenizer, token):
    """A token as a cell of a table, a leading space as a middle dot."""
    if token == tokenizer.eot_token:
        return "**EOS**"
    text = tokenizer.decode([token]).replace(" ", "·").replace("\n", "\\n")
    return f"`{text}`"


def ppo_step(cfg, models, bundle, rng):
    """(rows of the batch, rollout, {column: (B, T) grid}) of one step."""
    policy, _, value_model, _ = models
    rows, prompts = ppo.read_prompts(bundle, cfg.batch_size)
    ro = ppo.rollout(*models, prompts, bundle.task.max_new_tokens, bundle.tokenizer.eot_token,
                     cfg.temperature, rng)
    kl = ppo.kl_estimate(ro.logp, ro.ref_logp)
    score = torch.where(ro.finished, ro.score, cfg.no_eos_score)
    rewards = ppo.token_rewards(score, kl, ro.mask, cfg.kl_coef)
    advantages, returns = ppo.gae(rewards, ro.values, ro.mask, cfg.gamma, cfg.lam)
    whitened = ppo.whiten(advantages, ro.mask)
    optimizer = torch.optim.Adam(policy.trainable() + value_model.trainable(), lr=cfg.lr)
    same = policy, value_model, ro, whitened, returns, int(ro.mask.sum()), cfg
    ppo.minibatch_loss(*same)[0].backward()     # all ratios are 1
    optimizer.step()
    ratio = torch.ones_like(kl).masked_scatter(ro.mask, ppo.minibatch_loss(*same)[2].exp())
    clipped = ratio.clamp(1 - cfg.clip_ratio, 1 + cfg.clip_ratio)
    return rows, ro, {
        "log π": ro.logp, "log π_ref": ro.ref_logp, "KL": kl, "reward": rewards, "value": ro.values,
        "advantage": advantages, "return": returns, "whitened": whitened, "ratio after": ratio,
        "loss after": torch.maximum(-whitened * ratio, -whitened * clipped).where(ro.mask, 0.)}


def ppo_section(rows, ro, grids, tokenizer):
    """The response with the highest score and the one with the lowest, with the start of their padding."""
    lengths, lines = ro.packed.lengths.tolist(), ["## A step of PPO"]
    for j in (int(ro.score.argmax()), int(ro.score.argmin())):
        lines.append(f"```\n{rows[j]['prompt']}\n```")
        tokens = [token_text(tokenizer, token) for token in ro.responses[j]] + ["padding"]
        lines += [f"Score {ro.score[j]:.3f}, KL {grids['KL'][j].sum():.3f} nats:",
                  table(("t", "token", "mask", *grids), [
                      (t, token, int(ro.mask[j, t]), *(f"{grid[j, t]:.3f}" for grid in grids.values()))
                      for t, token in enumerate(tokens[:max(lengths)])])]
    return lines


def pair_section(reward_model, row, group, tokenizer):
    """The scalar head at each token of the two responses, the preferred one first, and the loss."""
    packed = pack([group.prompt], [group.responses], reward_model.device)
    head, r = reward_model.head(reward_model(packed))[0, :, 0], reward_model.rewards(packed)
    lines = ["## A pair of the reward model", f"```\n{row['prompt']}\n```"]
    for name, tokens, last in zip(("a (preferred)", "b"), group.responses, packed.last_idx.tolist()):
        scores = head[last + 1 - len(tokens):last + 1].tolist()
        lines += [f"Response {name}: the last number is the reward", table(("t", "token", "scalar head"), [
            (t, token_text(tokenizer, token), f"{score:.3f}")
            for t, (token, score) in enumerate(zip(tokens, scores))])]
    return [*lines, table(("", ""), [
        ("r(a) − r(b)", f"{r[0]:.3f} − ({r[1]:.3f}) = {r[0] - r[1]:.3f}"),
        ("P(a preferred to b) = σ(r(a) − r(b))", f"{torch.sigmoid(r[0] - r[1]):.3f}"),
        ("loss = −log σ(r(a) − r(b))", f"{reward.bradley_terry_loss(r[:1], r[1:]):.3f}"),
        ("gold reward of a minus that of b", f"{row['gap']:.2f}")])]


def packed_rows(packed, tokenizer):
    """A packed row (B = 1) as lists of cells, one for each place.  All from the tensors of `pack`."""
    def sees(place):        # places 0, 1, 2 and 5 are "0–2, 5"
        seen = packed.mask[0, 0, place].nonzero()[:, 0].tolist()
        starts, ends = ([n for n in seen if n + step not in seen] for step in (-1, 1))
        return ", ".join(f"{a}–{b}" if a < b else f"{a}" for a, b in zip(starts, ends))
    used, predicts = packed.used[0].tolist(), {}
    for idx, target, j in zip(packed.predict_idx, packed.target, packed.response_idx):
        predicts.setdefault(used[idx], []).append(f"{token_text(tokenizer, int(target))} ({'ab'[j]})")
    reward_at = {used[idx]: f"reward of {'ab'[j]}" for j, idx in enumerate(packed.last_idx.tolist())}
    return [[place, token_text(tokenizer, int(token)), int(packed.positions[0, place]), sees(place),
             used.index(place) if place in used else "", ", ".join(predicts.get(place, [])),
             reward_at.get(place, "")] for place, token in enumerate(packed.tokens[0])]


def main(cfg):
    ppo_cfg = ppo.Config(model=cfg.model, reward=cfg.reward, device="cpu")
    device, rng = setup(ppo_cfg)
    models, bundle, _ = ppo.build(ppo_cfg, device)
    if not bundle.task.synthetic or cfg.reward == "gold":
        raise UserError("a synthetic task and a reward model are needed")
    pairs = annotators.compare(bundle, bundle.task.rows("validation", 8), 5, rng)
    row = max(pairs, key=lambda row: row["gap"] / len(row["chosen"] + row["rejected"]) ** 2)    # clear, short
    group, = reward.read_groups(bundle.tokenizer, [row], bundle.task.max_prompt_len(
        bundle.model.config.context), bundle.task.max_new_tokens)
    models[0].load_state_dict(load_checkpoint(cfg.policy, "lm", "--policy", device)[0].state_dict())
    places = packed_rows(pack([group.prompt], [group.responses]), bundle.tokenizer)
    header = "place", "token", "position", "sees the places", "`used`", "predicts", "`last_idx`"
    print("\n\n".join([
        *ppo_section(*ppo_step(ppo_cfg, models, bundle, rng), bundle.tokenizer),
        *pair_section(models[3], row, group, bundle.tokenizer),
        f"## A packed row: S = {len(places)} places, {len(group.prompt)} of the prompt",
        table(header, [*places[:2], ["…", *[""] * 6], *places[len(group.prompt) - 2:]])]))


if __name__ == "__main__":
    launch(main, Config, __doc__)
