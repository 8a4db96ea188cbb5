"""Which method keeps diversity?  Quality against diversity of every method over its own knob: SFT over
temperature, best-of-N over N, PPO, DPO, IPO, RLOO and GRPO over beta.

`python reproduce.py --full` runs this on the test prompts in distribution, with systematic noise.  SFT at a
lower temperature and best-of-N also trade diversity for quality, without RL.  A method is more than they are
if its win rate is higher at equal gold diversity.  What becomes of each method out of distribution, and what
kind of diversity it loses, stand beside it.
"""
import json

import numpy as np
import torch

import model as M
from bon import best_of_n_kl, sample_lines, score_texts
from common.checkpoint import load_checkpoint
from common.files import write_json, write_jsonl
from common.samples import read_samples, sample_path
from common.stats import of_seeds, over_seeds
from common.tokenizer import ends_of
from diversity import embed_outputs, embedding_diversity, good_measures, lexical_measures, per_input, words
from generalisation import gold_scores, pass_at_k, reward_scores, wins
from generate import generate
from splits import decode, encode_prompts, encode_response
from study import optimum
from study.measures import encoder_and_vocabulary, load_with_task
from study.names import (BEST_OF, BETA, BETAS, DIVERSITY, K2, NO_EOS_SCORE, ON_ALL_SETS, PASS_AT, PASS_AT_OF,
                         QUALITY, SETS, SFT_TEMPERATURES, TRAINED)
from tasks import synthetic

KEPT = 8                        # independent best-of-N outputs of a prompt
BEST, SFT, OPTIMUM = "best-of-N", "SFT", "optimum"      # curves of the frontier; the others are TRAINED's


# ------------------------------------------------------------------------------------------------- the stages

def sample_best_of(here, seed, inputs):
    """SFT's best-of-N for N = 1 ... 64 on the test prompts -> best_of/: KEPT outputs a prompt, each the best
    of samples of its own, so that they are independent.  One pool serves every N: the first N of each 64."""
    policy, tokenizer, task = load_with_task(here / "ckpt_sft.pt", "lm")
    reward_model, _ = load_checkpoint(here / "ckpt_reward.pt", "reward")
    rows, largest = task.rows("test", inputs), BEST_OF[-1]
    max_prompt_len = task.max_prompt_len(policy.config.context)
    prompts = encode_prompts(tokenizer, [r["prompt"] for r in rows], max_prompt_len)
    sampled = generate(policy, prompts, task.max_new_tokens, n=KEPT * largest, eos=ends_of(tokenizer),
                       rng=torch.Generator().manual_seed(seed), batch_size=2048)
    outputs = [[decode(tokenizer, ids) for ids in group] for group in sampled]
    rewards = score_texts(reward_model, tokenizer, prompts, outputs, task.max_new_tokens, NO_EOS_SCORE)
    (here / "best_of").mkdir(exist_ok=True)
    for n in BEST_OF:
        best = [np.reshape(r, (KEPT, largest))[:, :n].argmax(axis=1) for r in rewards]
        picks = [(b + np.arange(KEPT) * largest).tolist() for b in best]
        lines = sample_lines(rows, outputs, rewards, picks, task=task.name, policy=f"bon{n}",
                             split="test", temperature=DIVERSITY, seed=seed)
        write_jsonl(sample_path(here / "best_of", f"bon{n}", "test"), lines)


def points():
    """[(curve, knob, policy's name in files, folder of its samples)] of every point of the frontier."""
    core = f"t{DIVERSITY:g}"
    return [("base model", None, "base", core), ("PPO on the gold reward", None, "ppo_gold", core),
            *((SFT, t, "sft", f"t{t:g}") for t in SFT_TEMPERATURES),
            *((BEST, n, f"bon{n}", "best_of") for n in BEST_OF),
            *((curve, beta, name, core if name == "ppo" else "more")
              for curve, names in TRAINED.items() for beta, name in names.items())]


def measure(here):
    """frontier.json: `points`, one line for each of `points`, and `sets` of ON_ALL_SETS: {policy: {split:
    {"wins", "ungrammatical": clauses an output outside the grammar}}}, (prompts,) each."""
    sft, tokenizer, task = load_with_task(here / "ckpt_sft.pt", "lm")
    reward_model, _ = load_checkpoint(here / "ckpt_reward.pt", "reward")
    (encode, vocabulary), lines, sets = encoder_and_vocabulary(here), [], {}
    for curve, knob, policy, folder in points():
        rows = read_samples(sample_path(here / folder, policy, "test"))
        line = {"curve": curve, "knob": knob} | measure_point(rows, reward_model, tokenizer, task, vocabulary)
        if curve == BEST:
            line["kl"] = best_of_n_kl(knob)
        else:
            path = (here.parent if policy == "base" else here) / f"ckpt_{policy}.pt"
            model, _ = load_checkpoint(path, "lm")
            line["kl"] = sampled_kl(model, sft, tokenizer, task, rows, rows[0]["temperature"])
        if curve.startswith("PPO"):         # what the paper says of beta
            line["embedding"] = per_input(embed_outputs(rows, encode), embedding_diversity).tolist()
        lines.append(line)
    lines += [{"curve": OPTIMUM} | point for point in optimum.points(here)]
    for policy in ("sft", *ON_ALL_SETS):
        folder = here / (f"t{QUALITY:g}" if policy in ("sft", "ppo") else "all_sets")
        sets[policy] = {split: measure_set(read_samples(sample_path(folder, policy, split)))
                        for split in SETS}
    write_json(here / "frontier.json", {"points": lines, "sets": sets}, indent=None, allow_nan=True)


def measure_point(rows, reward_model, tokenizer, task, vocabulary):
    """One line of frontier.json: of each prompt wins, gold reward, reward, diversity, and what
    `diversity.good_measures` has of the good ones among KEPT outputs."""
    gold, references = gold_scores(rows)
    rewards, _ = reward_scores(rows, reward_model, tokenizer, task)
    # of as many outputs as best-of-N has, because different answers among more are more.  EAD is of all
    few = [row | {field: row[field][:KEPT] for field in ("outputs", "finished")} for row in rows]
    ead = lexical_measures([row["outputs"] for row in rows], vocabulary=vocabulary)["ead"]
    return {"length": float(np.mean([len(words(t)) for row in rows for t in row["outputs"]])),
            "wins": wins(gold, references).tolist(), "gold_reward": np.mean(gold, axis=1).tolist(),
            "reward": np.mean(rewards, axis=1).tolist(), "ead": ead.tolist(),
            "gold_diversity": [task.synthetic.gold_diversity(row["outputs"])[0] for row in rows],
            **{measure: x.tolist() for measure, x in good_measures(few, task.synthetic).items()}}


def measure_set(rows):
    broken = [np.mean([synthetic.ungrammatical(text) for text in row["outputs"]]) for row in rows]
    return {"wins": wins(*gold_scores(rows)).tolist(), "ungrammatical": list(map(float, broken))}


@torch.no_grad()
def sampled_kl(policy, ref_policy, tokenizer, task, rows, temperature, batch_size=8):
    """KL(policy at `temperature` || ref_policy at 1) in nats a response, by k1 on the policy's own samples.
    rows: lines of a sample file, whose outputs are encoded again; batch_size: prompts at once."""
    max_prompt_len = task.max_prompt_len(policy.config.context)
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows], max_prompt_len)
    ids = [[encode_response(tokenizer, text, task.max_new_tokens, finished)
            for text, finished in zip(row["outputs"], row["finished"])] for row in rows]
    M.share_trunk(ref_policy, policy)
    total, count = 0., 0
    for i in range(0, len(rows), batch_size):
        packed = M.pack(prompts[i:i + batch_size], ids[i:i + batch_size])
        h = policy.trunk(packed)
        ref_logp = ref_policy.log_probs(packed, h if policy.shares_trunk_with(ref_policy) else None)
        total += (policy.log_probs(packed, h, temperature) - ref_logp).sum().item()
        count += len(packed.lengths)
    return total / count


def measure_pass_at_k(here):
    """The sample files in here/many -> pass_at_k.json: {policy: {k: (prompts,)}}."""
    found = {}
    for policy in PASS_AT_OF:
        rows = read_samples(sample_path(here / "many", policy, "test"))
        gold, references = map(np.asarray, gold_scores(rows))
        found[policy] = {str(k): pass_at_k(gold >= references, k).tolist() for k in PASS_AT}
    write_json(here / "pass_at_k.json", found, indent=None)


# ------------------------------------------------------------------------------------------------ the numbers

RATES = ("wins", "gold_diversity", "good", "good_gold_diversity")       # between 0 and 1
MEANS = ("ead", "reward", "gold_reward", "good_distinct", "utility")


def points_of(seeds):
    """frontier.json of all seeds: {(curve, knob): {measure: (seeds, prompts), or (seeds,) of kl and length}}.
    root_kl is one number a policy, repeated for every prompt."""
    lines, points = [{(x["curve"], x["knob"]): x for x in seed["points"]} for seed in seeds], {}
    for key, first in lines[0].items():
        point = {m: np.array([seed[key][m] for seed in lines]) for m in first if m not in ("curve", "knob")}
        if key[0] == OPTIMUM and not optimum.enough(point):
            continue
        # an estimate of a KL near 0 may lie below it
        root_kl = [[max(0., kl) ** .5] * point["wins"].shape[1] for kl in point["kl"].tolist()]
        points[key] = point | {"root_kl": np.array(root_kl)}
    return points


def vs(point, others, x, y):
    """Measure y of a point minus that of a curve through other points where it has the same x, interpolated:
    {mean, low, high, inside}.  inside: whether the curve reaches that x, else its nearest end is taken.  None
    where a seed has no value of a point."""
    # the point first, then the curve's: (points, seeds, prompts) each
    xs, ys = (np.array([p[m] for p in (point, *others)]) for m in (x, y))
    n_seeds, n_prompts = ys.shape[1:]

    def difference(seeds, rng):
        prompts = np.arange(n_prompts) if rng is None else rng.integers(0, n_prompts, n_prompts)
        at, height = (np.nanmean(v[:, seeds][:, :, prompts], axis=(1, 2)) for v in (xs, ys))
        order = 1 + np.argsort(at[1:])
        return height[0] - np.interp(at[0], at[order], height[order])
    if np.isnan(xs).all(axis=2).any() or np.isnan(ys).all(axis=2).any():
        return None
    at = np.nanmean(xs, axis=(1, 2))
    inside = bool(at[1:].min() <= at[0] <= at[1:].max())
    return of_seeds(difference, n_seeds, n_prompts) | {"inside": inside}


def point_numbers(points, curve, knob):
    """One point of the frontier in results.json."""
    point = points[curve, knob]
    sft, best, ppo, most = ([p for key, p in points.items() if key[0] == name]
                            for name in (SFT, BEST, "PPO", OPTIMUM))
    line = {"curve": curve, "knob": knob, "kl": float(np.mean(point["kl"])),
            "length": float(np.mean(point["length"])),
            **{m: over_seeds(point[m], rate=m in RATES) for m in (*MEANS, *RATES)}}
    if curve != SFT:
        line["wins_vs_sft"] = vs(point, sft, "gold_diversity", "wins")
    if curve not in (SFT, BEST):        # who keeps more at equal gold reward, who gains more at equal KL
        line["kept_vs_bon"] = vs(point, best, "gold_reward", "gold_diversity")
        line["good_kept_vs_bon"] = vs(point, best, "gold_reward", "good_gold_diversity")
        # over the root of KL, in which reward is nearly straight (Gao et al. 2022)
        line["gained_vs_bon"] = vs(point, best, "root_kl", "gold_reward")
    if most and curve in (*TRAINED, BEST):      # beta means the same in PPO and RLOO alone, KL everywhere
        line["kept_vs_optimum"] = vs(point, most, "root_kl", "gold_diversity")
        line["gained_vs_optimum"] = vs(point, most, "root_kl", "gold_reward")
    if curve in TRAINED and curve != "PPO":
        line["kept_vs_ppo"] = vs(point, up_from_best(ppo), "gold_reward", "gold_diversity")
    return line


def up_from_best(ppo):
    """PPO's points from the beta of the highest gold reward up: with a smaller one it over-optimises, and has
    less reward and less diversity."""
    return ppo[int(np.argmax([point["gold_reward"].mean() for point in ppo])):]


def numbers(folder, seeds):
    """What results.json holds of this question: `frontier`; `optimum` and `shares`: what the objective itself
    asks for; `beta`: what another KL coefficient changes,
    `sets`: the methods on all test sets, `pass_at_k`."""
    read = [{name: json.loads((folder / f"seed{seed}" / "synthetic" / f"{name}.json").read_text())
             for name in ("frontier", "pass_at_k")} for seed in seeds]
    points = points_of([seed["frontier"] for seed in read])

    def change(curve, beta, other, *measures):
        return {m: over_seeds(points[curve, beta][m] - points[curve, other][m]) for m in measures}
    of_beta = "wins", "ead", "embedding", "gold_diversity"
    same_beta = [(curve, beta) for curve in ("PPO", "RLOO") for beta in TRAINED[curve]
                 if (OPTIMUM, beta) in points]
    return {"frontier": [point_numbers(points, *key) for key in points],
            "optimum": optimum.numbers(folder, seeds),
            "shares": [{"curve": curve, "beta": beta} | optimum.shares(
                points[SFT, DIVERSITY], points[OPTIMUM, beta], points[curve, beta])
                for curve, beta in same_beta],
            "beta": {"no penalty": change("PPO", 0., BETA, "reward", "gold_reward"),
                     "larger": change("PPO", BETAS[-1], BETA, *of_beta),
                     "larger, k2": change("PPO, k2 in the reward", K2[-1], K2[0], *of_beta)},
            "sets": set_numbers([seed["frontier"]["sets"] for seed in read]),
            "pass_at_k": pass_numbers([seed["pass_at_k"] for seed in read])}


def set_numbers(seeds):
    """[{policy, split, wins, wins minus PPO's, ungrammatical}]."""
    def get(policy, split, measure):
        return np.array([seed[policy][split][measure] for seed in seeds])
    return [{"policy": policy, "split": split, "wins": over_seeds(get(policy, split, "wins"), rate=True),
             "wins_minus_ppo": over_seeds(get(policy, split, "wins") - get("ppo", split, "wins")),
             "ungrammatical": over_seeds(get(policy, split, "ungrammatical"))}
            for policy in seeds[0] for split in SETS]


def pass_numbers(seeds):
    """[{policy, k, rate}]."""
    return [{"policy": policy, "k": k,
             "rate": over_seeds(np.array([seed[policy][str(k)] for seed in seeds]), rate=True)}
            for policy in PASS_AT_OF for k in PASS_AT]
