"""Who compares: annotators, whose labels reward.py and methods/dpo.py learn from.

    python -m tasks.annotators --model ckpt_sft.pt --out DIR                                # synthetic task
    python -m tasks.annotators --model ckpt_sft.pt --out DIR --judge sbert:all-MiniLM-L6-v2     # any other

Of the synthetic task they know the gold reward.  Of any other with references, such as your own data, a
fixed judge takes their place: how similar a response is to its prompt's reference, by a sentence encoder.

Writes DIR/preferences.jsonl and DIR/preferences_validation.jsonl, rows of the format that own data have:
{"prompt", "chosen", "rejected"}, and with them which of the two ended (`finished`) and their difference in
gold reward, or in the judge's score in units of --noise (`gap`).  `reward.py --data DIR` reads them.  Without
such files reward.py and methods/dpo.py ask the synthetic task's annotators themselves and keep the rows
beside the checkpoint, in preferences_<key>.jsonl.gz.  The key names the checkpoint and the flags, so that a
file is never read for other ones.
"""
import gzip
import hashlib
import json
import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from common.dist import gather_rows, rank, world_size
from common.embed import load_encoder, similarity
from common.errors import UserError
from common.files import atomic_write, output_path, read_jsonl, write_jsonl
from common.flags import Common, Count, NonNegative, Positive, arg, launch, setup
from common.tokenizer import ends_of
from generate import generate
from model import pack
from splits import decode, encode_prompts, encode_response, load_bundle


@dataclass
class Config(Common):
    model: str = arg("ckpt_sft.pt", "checkpoint whose samples are compared")
    prompts: Count = arg(8000, "prompts with preferences")
    held_out: Count = arg(500, "prompts of the held-out preferences")
    samples: Count = arg(5, "responses sampled for each prompt; they and the reference are compared")
    typicality: NonNegative = arg(0.0, "a: how much the annotators like what is typical")
    judge: str = arg("", "sbert:NAME, the encoder by which responses are similar to the reference; '': the "
                         "synthetic task's gold reward")
    noise: Positive = arg(0.1, "with --judge: difference in score at which 73 % of the labels are right")


def preferences(cfg, bundle):
    """(rows to learn from, held-out rows), lists of dicts, from the file beside the checkpoint, which is made
    if it is missing.  cfg: has Config's fields; bundle: of a synthetic task."""
    key = [bundle.saved["weights_hash"], vars(bundle.task), cfg.seed, cfg.prompts, cfg.held_out,
           cfg.samples, cfg.typicality]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:10]
    folder = Path(cfg.model).parent if Path(cfg.model).is_file() else Path()    # a published model has none
    path = folder / f"preferences_{name}.jsonl.gz"
    if all(gather_rows([path.is_file()])):      # or ranks would wait for others that do not sample
        rows = read_jsonl(path, {"prompt": str, "chosen": str, "rejected": str, "split": str})
    else:
        rng = torch.Generator().manual_seed(cfg.seed)   # its own: a file that is there changes nothing
        rows = [{"split": split} | row for split, n in (("train", cfg.prompts), ("validation", cfg.held_out))
                for row in compare(bundle, bundle.task.rows(split, n), cfg.samples, rng, cfg.typicality)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        atomic_write(path, gzip.compress(lines.encode(), compresslevel=1, mtime=0))
        print(f"wrote {path}: {len(rows)} pairs that the annotators compared", flush=True)
    return [[row for row in rows if row["split"] == split] for split in ("train", "validation")]


def judged(cfg, bundle, device):
    """As `preferences`, by the judge, of prompts that SFT did not learn where the task has such."""
    encode = load_encoder(cfg.judge, device, flag="--judge")
    if not encode or not cfg.judge.startswith("sbert:"):
        raise UserError(f"--judge {cfg.judge}: sbert:NAME is needed, a sentence encoder")
    rng, task = torch.Generator().manual_seed(cfg.seed), bundle.task
    learn = "unlabeled" if "unlabeled" in task.splits() else "train"
    return [compare(bundle, task.rows(split, n), cfg.samples, rng, cfg.typicality,
                    lambda row, texts: [s / cfg.noise for s in similarity(encode, row["reference"], texts)])
            for split, n in ((learn, cfg.prompts), ("validation", cfg.held_out))]


def compare(bundle, rows, n_samples, rng, typicality=0.0, judge=None):
    """Preference rows: annotators compare n_samples responses of the model, all pairs, and without a judge
    the reference with them.

    P(y preferred to z) = sigma(u(y) - u(z)), u(y) = gold(y) + a log pi(y | x) / tokens of y, so labels are
    noisy as people's are: with a = 0 they agree with the gold reward on three pairs of four.  typicality: a;
    above 0 the annotators also like what the model finds likely (Zhang et al. 2025, arXiv 2510.01171).
    judge: a row and its (text, finished) pairs -> scores in the place of gold."""
    model, tokenizer, task, _ = bundle
    max_prompt_len = task.max_prompt_len(model.config.context)
    prompts = encode_prompts(tokenizer, [r["prompt"] for r in rows], max_prompt_len)
    sampled = gather_rows(generate(model, prompts, task.max_new_tokens, n=n_samples, eos=ends_of(tokenizer),
                                   rng=rng, ranks=(rank(), world_size()), batch_size=512 if judge else 4096))
    pairs = []
    for row, prompt, responses in zip(rows, prompts, sampled):
        if not judge:
            responses = responses + [encode_response(tokenizer, row["reference"], task.max_new_tokens)]
        texts = [decode(tokenizer, ids) for ids in responses]       # (text, finished)
        gold = judge(row, texts) if judge else [task.synthetic.gold_reward(row["prompt"], *text)
                                                for text in texts]
        typical = mean_log_probs(model, prompt, responses) if typicality else [0.] * len(gold)
        utility = [g + typicality * t for g, t in zip(gold, typical)]
        for a, b in combinations(range(len(responses)), 2):
            if responses[a] == responses[b]:        # there is nothing to prefer
                continue
            if torch.rand((), generator=rng) >= 1 / (1 + math.exp(min(700., utility[b] - utility[a]))):
                a, b = b, a
            pairs.append({"prompt": row["prompt"], "chosen": texts[a][0], "rejected": texts[b][0],
                          "finished": [texts[a][1], texts[b][1]], "gap": gold[a] - gold[b]})
    return pairs


@torch.no_grad()
def mean_log_probs(model, prompt, responses):
    """log pi(y | x) of each response over its number of tokens: a list.  prompt: ids; responses: id lists."""
    packed = pack([prompt], [responses], model.device)
    return (model.log_probs(packed).sum(1) / packed.lengths).tolist()


def main(cfg):
    device, _ = setup(cfg)
    bundle = load_bundle(cfg, device)
    if not cfg.judge and not bundle.task.synthetic:
        raise UserError(f"--task {bundle.task.name}: its preferences are people's, or those of a --judge")
    made = judged(cfg, bundle, device) if cfg.judge else preferences(cfg, bundle)
    for name, rows in zip(("preferences", "preferences_validation"), made):
        path, prompts = output_path(cfg.out, f"{name}.jsonl"), {row["prompt"] for row in rows}
        write_jsonl(path, rows)
        print(f"wrote {path}: {len(rows)} pairs on {len(prompts)} prompts", flush=True)


if __name__ == "__main__":
    launch(main, Config, __doc__)
