"""Speed as ratios: each piece of work done here and by a peer, in one run on one machine, medians of
alternating runs.

    python -m tools.bench                                # every row; peers that are not installed are skipped
    python -m tools.bench --rows sft,reward,diversity    # some of them
    python -m tools.bench --compare old/bench.json       # and what has changed since an earlier run
    python -m tools.bench --text FILE                    # the lexical measures on lines of {"outputs": [...]}
    python -m tools.bench --dtype bf16                   # both sides' layers in bf16
    pip install --no-deps trl==1.12.0 accelerate nltk && pip install transformers       # the peers

Writes bench.json, prints a table and, as the last line, the ratios as JSON.  `ratio` is of wall time, `by
processor` of the processor time of all threads, which other work on the machine disturbs less.  Models have
random weights, and responses fixed lengths.  So both sides do the same work, and no side gains by stopping
early.  `of peak` is the arithmetic done (2 x parameters x tokens forward, twice that backward) over what a
large matrix product reaches on this machine.  `of bandwidth` is the weights read (once for each token a batch
samples) over what copying a large tensor reaches.

What makes the difference: the frozen trunk runs once and lies in memory once; a prompt is computed once for
its samples, and its responses share its row; logits and log-probabilities are computed where they are needed;
rows are padded to their own batch; diversity is linear in the text.  On AMD's processors the fp32 products
are oneDNN's here (common/fast_linear.py) and MKL's in the peers: where the two products printed first differ,
so much of a ratio is due to that.
"""
import contextlib
import copy
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import diversity
import model as M
import ppo
import reward
import sft
from common.errors import UserError, check
from common.fast_linear import Linear
from common.files import loads, output_path, read_jsonl, write_json
from common.flags import DTYPES, Common, Count, launch, setup
from common.loop import Run, peak_memory
from common.ngrams import count_ngrams
from splits import length_bucketed_batches
from tools import budget

ROOT = Path(__file__).resolve().parent.parent
TRL = "1.12"        # the last release with PPO
SMALL = dict(vocab_size=1024, n_layer=4, n_head=4, d_model=128, context=256, position="learned",
             # 1.06 million parameters, in GPT-2's shape
             norm="layernorm", activation="gelu_tanh", bias=True)
GPT2 = M.SHAPES["gpt2"]
MODELS = {"1M": SMALL, "GPT-2 small": GPT2}
PROMPT, RESPONSE, ROLLOUTS, EPOCHS, MINIBATCHES = 64, 32, 32, 4, 4     # of a PPO iteration


@dataclass
class Config(Common):
    rows: str = ""              # comma-separated: ppo_full, ppo, ppo_gpt2_full, ppo_gpt2, update, memory,
                                # sampling, sampling_gpt2, best_of, decode, sft, reward, reward_ragged,
                                # ppo_ragged, diversity, self_bleu, growth; "" all
    repeats: Count = 5          # runs of each side, alternating; the median counts
    compare: str = ""           # bench.json of an earlier run
    text: str = ""              # .jsonl(.gz) with lists "outputs" for the lexical measures; "" makes Zipfian
                                # text
    side: Literal["", "trl", "frozen", "full"] = ""     # internal: one side of the memory row, in a process
                                                        # of its own


class Seconds(NamedTuple):
    """Of one piece of work: what passed, and what the process's threads were busy for."""
    wall: float
    processor: float

    def __truediv__(self, n):
        return Seconds(self.wall / n, self.processor / n)

    def __sub__(self, other):
        return Seconds(self.wall - other.wall, self.processor - other.processor)


def now():
    return Seconds(time.perf_counter(), time.process_time())


def timed(work, device):
    start = now()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now() - start


def medians(runs):
    """Seconds: the median of each kind of time."""
    return Seconds(*(float(np.median(column)) for column in zip(*runs)))


def race(sides, repeats, device):
    """{name: [Seconds]} of functions run in turn, after one run each that does not count."""
    for work in sides.values():
        work()
    found = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            found[name].append(timed(work, device))
    return found


def line(work, ours, peer, name, asked, tokens=0, flops=0, bytes_read=0, note=""):
    """One row of the table.  ours, peer: Seconds of each run (peer None: not installed)."""
    a, b = medians(ours), medians(peer) if peer else None
    walls = [seconds.wall for seconds in ours]
    return {"work": work, "ours": a.wall, "peer": name, "peers": b and b.wall,
            "ratio": b and b.wall / a.wall, "by_processor": b and b.processor / a.processor, "asked": asked,
            "tokens_per_second": tokens / a.wall if tokens else None,
            "flops_per_second": flops / a.wall if flops else None,
            "bytes_per_second": bytes_read / a.wall if bytes_read else None,
            "runs": len(ours), "spread": [min(walls), max(walls)], "note": note}


class Peaks(NamedTuple):
    """What work is measured against: operations a second of a large matrix product as torch does it by
    default and as this project does it, and bytes a second of copying."""
    default_flops: float
    flops: float
    bandwidth: float


def peaks(device, dtype):
    n = 8192 if device.type == "cuda" else 2048
    a, layer = torch.randn(n, n, device=device, dtype=dtype), Linear(n, n, bias=False).to(device, dtype)
    big = torch.empty(2 ** 28, dtype=torch.uint8, device=device)
    with torch.no_grad():
        sides = {"torch": lambda: a @ a, "ours": lambda: layer(a), "copy": lambda: big.clone()}
        found = race(sides, 5, device)
    seconds = {k: medians(v).wall for k, v in found.items()}
    return Peaks(2 * n ** 3 / seconds["torch"], 2 * n ** 3 / seconds["ours"], 2 * len(big) / seconds["copy"])


def installed(*names):
    missing = [n for n in names if importlib.util.find_spec(n) is None]
    if missing:
        print(f"  not installed, skipped: {', '.join(missing)}", flush=True)
    return not missing


def quiet(function, *args):
    """Calls a function whose chatter nobody needs."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return function(*args)


def random_prompts(n, length, vocabulary, seed=0):
    return torch.randint(1, vocabulary, (n, length), generator=torch.Generator().manual_seed(seed)).tolist()


# --------------------------------------------------------------------------------------------- PPO, and TRL's

def our_ppo(shape, freeze, device, dtype, prompt=PROMPT, response=RESPONSE, rollouts=ROLLOUTS, epochs=EPOCHS,
            minibatches=MINIBATCHES):
    """Two functions, the halves of a PPO iteration with a separate value model.  `sample()` returns rollouts,
    whitened advantages and returns; `learn(*those)` does epochs x minibatches updates.  prompt, response:
    tokens."""
    torch.manual_seed(0)
    policy = M.GPT(M.GPTConfig(**shape)).to(device).compute_in(dtype).freeze(round(freeze * shape["n_layer"]))
    ref_policy = copy.deepcopy(policy).requires_grad_(False)
    reward_model = policy.with_scalar_head()
    value_model = copy.deepcopy(reward_model)
    for other in (ref_policy, reward_model, value_model):
        M.share_trunk(policy, other)
    optimizer = torch.optim.Adam(policy.trainable() + value_model.trainable(), lr=1e-6, fused=True)
    cfg = ppo.Config(epochs=epochs, minibatches=minibatches, quiet=True)
    prompts, rng = random_prompts(rollouts, prompt, shape["vocab_size"]), torch.Generator().manual_seed(0)
    folder = tempfile.TemporaryDirectory()      # of a log that stays empty; goes with the function returned
    loop = Run("bench", cfg, optimizer, rng, inputs=[], path=Path(folder.name) / "ckpt_bench.pt",
               policy=policy, value=value_model)

    def sample(folder=folder):
        batch = loop.next_rows(rollouts, rollouts)
        ro = ppo.rollout(policy, ref_policy, value_model, reward_model, [prompts[i] for i in batch], response,
                         eos=None, temperature=1.0, rng=rng)
        rewards = ppo.token_rewards(ro.score, ppo.kl_estimate(ro.logp, ro.ref_logp), ro.mask, 0.05)
        advantages, returns = ppo.gae(rewards, ro.values, ro.mask)
        return ro, ppo.whiten(advantages, ro.mask), returns

    def learn(ro, advantages, returns):
        ppo.update(policy, value_model, ro, advantages, returns, cfg, rng, loop)
    return sample, learn


def our_iteration(*args):
    """A function that does one PPO iteration.  args: as of `our_ppo`."""
    sample, learn = our_ppo(*args)
    return lambda: learn(*sample())


def hugging_face(shape, cls="GPT2LMHeadModel", **more):
    import transformers
    config = transformers.GPT2Config(
        vocab_size=shape["vocab_size"], n_positions=shape["context"], n_embd=shape["d_model"],
        n_layer=shape["n_layer"], n_head=shape["n_head"], bos_token_id=0, eos_token_id=0, pad_token_id=0,
        attn_pdrop=0., embd_pdrop=0., resid_pdrop=0., **more)
    return getattr(transformers, cls)(config).eval()


def trl_models(shape, freeze):
    """(policy, reference policy, value model, reward model) as TRL's PPOTrainer takes them."""
    policy, ref_policy = (hugging_face(shape) for _ in range(2))
    value_model, reward_model = (hugging_face(shape, "GPT2ForSequenceClassification", num_labels=1)
                                 for _ in range(2))
    for m in (policy, value_model) if freeze else ():
        m.transformer.wte.requires_grad_(False)
        m.transformer.wpe.requires_grad_(False)
        m.transformer.h[:round(freeze * shape["n_layer"])].requires_grad_(False)
    return policy, ref_policy, value_model, reward_model


def trl_iteration(shape, freeze, device, dtype):
    """A function of (n, between) that does n iterations of TRL's PPOTrainer, calls `between` after each, and
    returns the Seconds of each but the first, without those of `between`."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import datasets
    import tokenizers
    import transformers
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    transformers.logging.set_verbosity_error()
    words = {f"w{i}": i for i in range(shape["vocab_size"])}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w1")), pad_token="w0",
        eos_token="w0", padding_side="left")
    rows = datasets.Dataset.from_dict({"input_ids": random_prompts(ROLLOUTS, PROMPT, shape["vocab_size"])})

    def iterations(n, between=lambda: None):
        torch.manual_seed(0)
        policy, ref_policy, value_model, reward_model = trl_models(shape, freeze)
        ends, starts = [], []       # of its iterations: the loader fetches one batch ahead

        def collate(batch):
            ends.append(now())
            between()
            starts.append(now())
            return {"input_ids": torch.tensor([b["input_ids"] for b in batch])}
        args = PPOConfig(output_dir=tempfile.gettempdir() + "/trl", per_device_train_batch_size=ROLLOUTS,
                         gradient_accumulation_steps=1, num_mini_batches=MINIBATCHES, num_ppo_epochs=EPOCHS,
                         total_episodes=ROLLOUTS * (n + 2), response_length=RESPONSE,
                         local_rollout_forward_batch_size=ROLLOUTS, temperature=1.0, learning_rate=1e-6,
                         use_cpu=device.type == "cpu", bf16=dtype == torch.bfloat16, num_sample_generations=0,
                         report_to=[], save_strategy="no", logging_steps=10 ** 9, disable_tqdm=True)
        PPOTrainer(args, tokenizer, policy, ref_policy, reward_model, rows, value_model,
                   data_collator=collate).train()
        # the time from one fetch to the next is one iteration
        return [end - start for start, end in zip(starts, ends[1:])][-n:]
    return iterations


def ppo_rows(name, asked, cfg, device):
    """asked: {fraction frozen here: {fraction frozen at the peer: ratio asked for}}.  Our iterations run
    between the peer's."""
    shape, dtype = MODELS[name], DTYPES[cfg.dtype]
    peers = installed("trl", "transformers", "accelerate")
    for freeze, theirs, least in ((a, b, x) for a, of_a in asked.items() for b, x in of_a.items()):
        iteration, ours, peer = our_iteration(shape, freeze, device, dtype), [], None
        iteration()

        def between(iteration=iteration, ours=ours):
            ours.append(timed(iteration, device))
        if peers:
            peer = quiet(trl_iteration(shape, theirs, device, dtype), cfg.repeats, between)
        else:
            for _ in range(cfg.repeats):
                between()
        config = M.GPTConfig(**shape, frozen=round(freeze * shape["n_layer"]))
        flops = ROLLOUTS * budget.operations(config, PROMPT, RESPONSE, EPOCHS)[2]
        what = "all layers trained" if not freeze else f"{freeze:.0%} frozen, shared"
        name_of_peer = f"TRL {TRL}, " + (f"{theirs:.0%} frozen" if theirs else "all trained")
        yield line(f"PPO iteration, {name}, {what}", ours[-cfg.repeats:], peer, name_of_peer, least,
                   tokens=ROLLOUTS * RESPONSE, flops=flops)


def row_ppo_full(cfg, device):
    yield from ppo_rows("1M", {0.: {0.: 2}}, cfg, device)


def row_ppo(cfg, device):
    yield from ppo_rows("1M", {0.8: {0.8: 5, 0.: 10}}, cfg, device)


def row_ppo_gpt2_full(cfg, device):
    yield from ppo_rows("GPT-2 small", {0.: {0.: 2}}, cfg, device)


def row_ppo_gpt2(cfg, device):
    yield from ppo_rows("GPT-2 small", {0.8: {0.8: 5, 0.: 10}}, cfg, device)


def row_update(cfg, device, prompt=448, response=64, rollouts=64):
    """PPO's updates alone, GPT-2 small, all layers trained: one epoch of two minibatches.  Its arithmetic:
    three times the forward pass of two models, the policy's head at the response's tokens only."""
    sample, learn = our_ppo(GPT2, 0., device, DTYPES[cfg.dtype], prompt, response, rollouts, 1, 2)
    found = race({"ours": partial(learn, *sample())}, cfg.repeats, device)
    blocks = sum(p.numel() for p in M.GPT(M.GPTConfig(**GPT2)).blocks.parameters())
    head = GPT2["vocab_size"] * GPT2["d_model"]
    flops = 3 * 2 * rollouts * (2 * blocks * (prompt + response) + head * response)
    yield line(f"PPO updates, GPT-2 small, all trained, {rollouts} rollouts of {prompt} + {response} tokens",
               found["ours"], None, "", 0, tokens=rollouts * response, flops=flops)


def row_memory(cfg, device):
    """Peak memory of a process that does two iterations of GPT-2 small (Linux, or a GPU)."""
    def peak_of(side):
        done = subprocess.run([sys.executable, "-m", "tools.bench", "--side", side, "--device", str(device),
                               "--dtype", cfg.dtype, "--threads", str(cfg.threads)], cwd=ROOT,
                              capture_output=True, text=True)
        check(done.returncode == 0, f"tools.bench --side {side}: {done.stderr[-300:]}")
        return float(done.stdout.split()[-1])
    theirs = peak_of("trl") if installed("trl", "transformers", "accelerate") else None
    for side, least, what in (("frozen", 3, "80% frozen, shared"), ("full", 0, "all layers trained")):
        ours = peak_of(side)
        yield {"work": f"peak memory of a PPO iteration, GPT-2 small, {what}", "ours": ours,
               "peer": f"TRL {TRL}", "peers": theirs, "ratio": theirs and theirs / ours, "asked": least,
               "unit": "MB", "runs": 1, "note": ""}


def one_side(side, dtype, device):
    """Two iterations of GPT-2 small, and the peak memory of this process in MB on the screen."""
    if side == "trl":
        quiet(trl_iteration(GPT2, 0., device, dtype), 1)
    else:
        iteration = our_iteration(GPT2, 0.8 if side == "frozen" else 0., device, dtype)
        iteration()
        iteration()
    print(peak(device))


def peak(device):
    """Peak memory of this process so far, MB (Linux, or a GPU)."""
    if device.type == "cuda":
        return peak_memory(device)
    # not getrusage, because a process inherits its maximum from the one that started it
    high = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(high.split()[1]) / 2 ** 10


# --------------------------------------------------------------------------------------------------- sampling

def sampling(name, n_prompts, n, asked, cfg, device, new=48):
    """Both sides sample n responses of `new` tokens to each of n_prompts prompts."""
    shape, dtype = MODELS[name], DTYPES[cfg.dtype]
    torch.manual_seed(0)
    model = M.GPT(M.GPTConfig(**shape)).to(device).compute_in(dtype).eval()
    prompts, rng = random_prompts(n_prompts, PROMPT, shape["vocab_size"]), torch.Generator().manual_seed(0)
    sides = {"ours": lambda: M.generate(model, prompts, new, n=n, rng=rng)}
    if installed("transformers"):
        theirs, ids = hugging_face(shape).to(device, dtype), torch.tensor(prompts, device=device)
        ask = dict(do_sample=True, top_k=0, min_new_tokens=new, max_new_tokens=new, num_return_sequences=n,
                   attention_mask=torch.ones_like(ids), pad_token_id=0)
        sides["theirs"] = torch.no_grad()(lambda: theirs.generate(ids, **ask))
    found = race(sides, cfg.repeats, device)
    tokens = n_prompts * n * new
    # the prompts' tokens need no head
    blocks = sum(p.numel() for p in model.blocks.parameters())
    flops = 2 * (model.n_params() * tokens + blocks * n_prompts * PROMPT)
    what = "sampling" if n == 1 else f"best-of-{n}"
    return line(f"{what}, {name}, {n_prompts} prompts x {n}, {new} new tokens", found["ours"],
                found.get("theirs"), "transformers generate", asked, tokens, flops,
                bytes_read=new * model.n_params() * dtype.itemsize)


def row_sampling(cfg, device):
    yield sampling("1M", 64, 1, 3, cfg, device)


def row_sampling_gpt2(cfg, device):
    yield sampling("GPT-2 small", 64, 1, 2, cfg, device)


def row_best_of(cfg, device):
    yield sampling("GPT-2 small", 4, 16, 3, cfg, device)


def row_decode(cfg, device, prompt=128, new=128):
    """On a GPU: one token after another for a batch, by a recorded step and by kernels launched one by one.
    Each step reads all weights, and of each sample the keys and values of its prompt and of its own room."""
    if device.type != "cuda":
        print("  decode: a step is recorded on a GPU only", flush=True)
        return
    shape, dtype = GPT2, DTYPES[cfg.dtype]
    torch.manual_seed(0)
    model = M.GPT(M.GPTConfig(**shape)).to(device).compute_in(dtype).eval()
    for batch in (64, 256, 1024):
        prompts = random_prompts(batch, prompt, shape["vocab_size"])

        def decode(fixed, prompts=prompts):
            M.generate(model, prompts, new, rng=torch.Generator().manual_seed(0), fixed=fixed)
        found = race({"recorded": partial(decode, True), "launched": partial(decode, False)}, cfg.repeats,
                     device)
        cache = 2 * shape["n_layer"] * shape["d_model"] * (prompt + new) * batch
        yield line(f"decoding, GPT-2 small, {batch} prompts of {prompt}, {new} new tokens", found["recorded"],
                   found["launched"], "kernels launched one by one", 0, tokens=batch * new,
                   flops=2 * model.n_params() * batch * new,
                   bytes_read=new * (model.n_params() + cache) * dtype.itemsize)


# --------------------------------------------------------------------------------------- SFT and reward steps

class Posts(NamedTuple):
    """Prompts and responses with the lengths of TL;DR: (prompt, response) tokens, medians 348 and 31."""
    prompts: list               # id lists
    responses: list             # for each prompt a list of one id list

    @property
    def lengths(self):
        return [len(p) + len(r[0]) for p, r in zip(self.prompts, self.responses)]


def random_posts(n=256, vocabulary=50257):
    rng = np.random.default_rng(0)
    prompt_lengths = np.clip(rng.lognormal(np.log(348), .45, n), 80, 900).astype(int)
    prompts = [rng.integers(1, vocabulary, k).tolist() for k in prompt_lengths]
    response_lengths = np.clip(rng.lognormal(np.log(31), .35, n), 8, 60).astype(int)
    return Posts(prompts, [[rng.integers(1, vocabulary, k).tolist()] for k in response_lengths])


def packed_loss(model, posts, idx):
    """The SFT loss of the posts idx as this project computes it.  Returns (loss, response tokens)."""
    packed = M.pack([posts.prompts[i] for i in idx], [posts.responses[i] for i in idx],
                    model.embed.weight.device)
    return sft.sft_loss(M.log_probs(model, model(packed), packed)), len(packed.target)


def padded_loss(model, posts, idx, width):
    """The same as nanoGPT does it: rows padded to `width`, logits everywhere, the loss masked."""
    device, targets = model.embed.weight.device, torch.full((len(idx), width), -100)
    rows = [posts.prompts[i] + posts.responses[i][0] for i in idx]
    for target, row, i in zip(targets, rows, idx):      # logits at a position predict the next token
        target[len(posts.prompts[i]) - 1:len(row) - 1] = torch.tensor(posts.responses[i][0])
    x = M.plain([(row + [0] * width)[:width] for row in rows], device)
    loss = F.cross_entropy(model.head(model(x)).flatten(0, 1), targets.flatten().to(device))
    return loss, int((targets >= 0).sum())


def row_sft(cfg, device, size=4):
    posts = random_posts()
    lengths = posts.lengths
    torch.manual_seed(0)
    model = M.GPT(M.GPTConfig(**GPT2)).to(device).compute_in(DTYPES[cfg.dtype])
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-6, fused=True)
    bucketed = iter(length_bucketed_batches(lengths, size, 1, torch.Generator().manual_seed(0)))
    shuffled = iter(torch.randperm(256, generator=torch.Generator().manual_seed(0)).split(size))
    counts = {"ours": [], "block": [], "batch": []}

    def step(side, loss_and_count):
        loss, n_tokens = loss_and_count
        counts[side].append(n_tokens)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    def ours():
        step("ours", packed_loss(model, posts, next(bucketed)))

    def padded_to_block():      # the longest post
        step("block", padded_loss(model, posts, next(shuffled).tolist(), max(lengths)))

    def padded_to_batch():      # kinder: the longest of a shuffled batch
        idx = next(shuffled).tolist()
        step("batch", padded_loss(model, posts, idx, max(lengths[i] for i in idx)))
    found = race({"ours": ours, "block": padded_to_block, "batch": padded_to_batch}, cfg.repeats, device)
    # steps differ in size: seconds a response token, over the same number of steps each; the first did not
    # count
    seconds = {k: [t / n for t, n in zip(found[k], counts[k][1:])] for k in found}
    for to in ("block", "batch"):
        yield line("SFT step, GPT-2 small, posts of TL;DR's lengths: a response token", seconds["ours"],
                   seconds[to], f"nanoGPT-style step, all logits, padded to the {to}", 1.5, tokens=1)


def row_reward(cfg, device):
    """Eight prompts of 256 tokens with 4 responses of 32: six pairs each."""
    torch.manual_seed(0)
    config = M.GPTConfig(**{**SMALL, "context": 512})
    model = M.GPT(config, scalar=True).to(device).compute_in(DTYPES[cfg.dtype])
    prompts, rng = random_prompts(8, 256, 1024), np.random.default_rng(0)
    responses = [[rng.integers(1, 1024, 32).tolist() for _ in range(4)] for _ in prompts]
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    winner, loser = (torch.tensor([4 * p + pair[k] for p in range(8) for pair in pairs], device=device)
                     for k in (0, 1))

    def ours():
        packed = M.pack(prompts, responses, device)
        r = M.rewards(model, model(packed), packed)
        reward.bradley_terry_loss(r[winner], r[loser]).backward()

    def by_sides():
        """One forward for the preferred sides of all pairs, one for the others."""
        sides = []
        for k in (0, 1):
            packed = M.pack([p for p in prompts for _ in pairs],
                            [[group[pair[k]]] for group in responses for pair in pairs], device)
            sides.append(M.rewards(model, model(packed), packed))
        reward.bradley_terry_loss(*sides).backward()
    found = race({"ours": ours, "theirs": by_sides}, cfg.repeats, device)
    yield line("reward model step, 1M, 4 responses a prompt, all pairs", found["ours"], found["theirs"],
               "one forward for each side of the pairs", 2)


def packed_rewards(model, posts, pairs, idx):
    """Rewards of both responses to each of the posts idx, as this project computes them: (2 x posts,)."""
    packed = M.pack([posts.prompts[i] for i in idx], [pairs[i] for i in idx], model.embed.weight.device)
    return M.rewards(model, model(packed), packed)


def padded_rewards(model, posts, pairs, idx):
    """The same from a row for each response, padded to the longest."""
    rows = [posts.prompts[i] + response for i in idx for response in pairs[i]]
    x = M.plain(rows, model.embed.weight.device)
    return model.head(model(x))[range(len(rows)), [len(row) - 1 for row in rows], 0]


def row_reward_ragged(cfg, device, size=4):
    """One pair on each of TL;DR's posts: its two responses behind one prompt, posts of like lengths together,
    against a row for each response, padded to the longest of a shuffled batch."""
    posts, rng = random_posts(), np.random.default_rng(1)
    pairs = [[r, rng.permutation(r).tolist()] for r, in posts.responses]
    torch.manual_seed(0)
    model = M.GPT(M.GPTConfig(**GPT2), scalar=True).to(device).compute_in(DTYPES[cfg.dtype])
    bucketed = length_bucketed_batches(posts.lengths, size, 1, torch.Generator().manual_seed(0))
    shuffled = torch.randperm(256, generator=torch.Generator().manual_seed(0)).split(size)
    todo = {"ours": iter(bucketed), "theirs": iter(shuffled)}
    counts = {"ours": [], "theirs": []}

    def learn(side, rewards_of):
        idx = [int(i) for i in next(todo[side])]
        counts[side].append(sum(len(posts.responses[i][0]) for i in idx))
        model.zero_grad()
        r = rewards_of(model, posts, pairs, idx)
        reward.bradley_terry_loss(r[0::2], r[1::2]).backward()
    found = race({"ours": partial(learn, "ours", packed_rewards),
                  "theirs": partial(learn, "theirs", padded_rewards)}, cfg.repeats, device)
    seconds = {k: [t / n for t, n in zip(found[k], counts[k][1:])] for k in found}
    yield line("reward model step, GPT-2 small, pairs on posts of TL;DR's lengths: a response token",
               seconds["ours"], seconds["theirs"], "a row for each response, padded to the batch", 0,
               tokens=1)


class Targets(NamedTuple):
    """What PPO compares with on a minibatch of posts.  Grids are (B, T)."""
    mask: torch.Tensor          # True on the response
    logp: torch.Tensor          # old log-probabilities, near those of 50,257 words
    zeros: torch.Tensor         # old values and returns


def targets_of(posts, idx, device):
    lengths = torch.tensor([len(posts.responses[i][0]) for i in idx])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).to(device)
    return Targets(mask, torch.full(mask.shape, -10., device=device), torch.zeros(mask.shape, device=device))


def packed_ppo_loss(policy, value_model, posts, idx):
    """PPO's loss on the posts idx as this project computes it, with advantages of 1."""
    prompts, responses = [posts.prompts[i] for i in idx], [posts.responses[i][0] for i in idx]
    packed = M.pack(prompts, [[r] for r in responses], policy.embed.weight.device)
    mask, logp, zeros = targets_of(posts, idx, policy.embed.weight.device)
    ro = ppo.Rollout(prompts, responses, policy.trunk(packed), value_model.trunk(packed), mask, logp, logp,
                     zeros, zeros[:, 0], mask[:, 0])
    rows, n_tokens = list(range(len(idx))), int(mask.sum())
    return ppo.minibatch_loss(policy, value_model, ro, zeros + 1, zeros, rows, n_tokens, ppo.Config())[0]


def padded_ppo_loss(policy, value_model, posts, idx):
    """The same from logits and values at every position of rows padded to the longest."""
    device = policy.embed.weight.device
    mask, old_logp, zeros = targets_of(posts, idx, device)
    rows = [posts.prompts[i] + posts.responses[i][0] for i in idx]
    x = M.plain(rows, device)
    all_logp, v = policy.head(policy(x)).log_softmax(-1), value_model.head(value_model(x))[..., 0]
    # the position that predicts token t of each response
    at = torch.tensor([[min(len(posts.prompts[i]) - 1 + t, len(row) - 2) for t in range(mask.shape[1])]
                       for i, row in zip(idx, rows)], device=device)
    tokens = x.tokens.gather(1, at + 1)[..., None]
    logp = all_logp.gather(1, at[..., None].expand(-1, -1, all_logp.shape[-1])).gather(2, tokens)[..., 0]
    pg_loss, _ = ppo.policy_loss(logp, old_logp, zeros + 1, mask)
    v_loss, _ = ppo.value_loss(v.gather(1, at), zeros, zeros, mask)
    return pg_loss + ppo.Config.vf_coef * v_loss


def row_ppo_ragged(cfg, device, size=4):
    """PPO's loss and gradient on a minibatch of TL;DR's posts, all layers trained, against logits and values
    everywhere on rows padded to the same minibatch, which is shuffled on both sides."""
    posts = random_posts()
    torch.manual_seed(0)
    policy = M.GPT(M.GPTConfig(**GPT2)).to(device).compute_in(DTYPES[cfg.dtype])
    value_model = policy.with_scalar_head()
    minibatches = torch.randperm(256, generator=torch.Generator().manual_seed(0)).split(size)
    todo = {side: iter(minibatches) for side in ("ours", "theirs")}
    losses, counts = {"ours": [], "theirs": []}, []

    def learn(side, loss_of):
        idx = next(todo[side]).tolist()
        counts.append(sum(len(posts.responses[i][0]) for i in idx))
        for model in (policy, value_model):
            model.zero_grad()
        loss = loss_of(policy, value_model, posts, idx)
        loss.backward()
        losses[side].append(loss.item())
    found = race({"ours": partial(learn, "ours", packed_ppo_loss),
                  "theirs": partial(learn, "theirs", padded_ppo_loss)}, cfg.repeats, device)
    check(np.allclose(losses["ours"], losses["theirs"], rtol=1e-3), "the two sides disagree")
    yield line("PPO update, GPT-2 small, posts of TL;DR's lengths, all trained", found["ours"],
               found["theirs"], "all logits, padded to the same minibatch", 0, tokens=float(np.mean(counts)))


# -------------------------------------------------------------------------------------------------- diversity

def texts_of(path):
    """500 lists of 16 outputs: from a file, or Zipfian where path is ""."""
    if path:
        return [r["outputs"] for r in read_jsonl(path, {"outputs": list})]
    rng = np.random.default_rng(0)
    return [[" ".join(f"w{k}" for k in np.minimum(rng.zipf(1.3, rng.integers(20, 50)), 5000))
             for _ in range(16)]
            for _ in range(500)]


def loop_counts(outputs):
    """distinct-n and EAD for n = 1..5 in the paper's conventions, as plain loops: (5, 2)."""
    out = []
    for n in range(1, 6):
        grams = []
        for text in outputs:
            tokens = [w for w in text.replace("\n", "").replace(".", "").split(" ") if w]
            for i in range(len(tokens) - n + 1):
                grams.append(" ".join(tokens[i:i + n]))
        unique, total, V = len(set(grams)), len(grams), 50257
        out.append((unique / total, unique / (V * (1 - ((V - 1) / V) ** total))))
    return out


def paper_loops(groups):
    """Means over n = 1..5 of distinct-n and EAD, per input (groups, 2) and pooled (2,)."""
    pooled = [text for group in groups for text in group]
    return np.array([np.mean(loop_counts(g), axis=0) for g in groups]), np.mean(loop_counts(pooled), axis=0)


def our_counts(groups):
    """The same."""
    unique, total = count_ngrams([[diversity.paper_words(t) for t in g] for g in groups])
    ead = unique / diversity.expected_unique(total, 50257)
    both = np.stack(((unique / total).mean(0), ead.mean(0)), axis=1)     # (groups + 1, 2)
    return both[:-1], both[-1]


def row_diversity(cfg, device):
    groups = texts_of(cfg.text)
    check(all(np.allclose(a, b, rtol=1e-6) for a, b in zip(our_counts(groups), paper_loops(groups))),
          "the two sides disagree")
    found = race({"ours": partial(our_counts, groups), "theirs": partial(paper_loops, groups)}, cfg.repeats,
                 device)
    size = f"{len(groups)} x {len(groups[0])} outputs"
    yield line(f"distinct-n and EAD, n = 1..5, per input and pooled, {size}", found["ours"], found["theirs"],
               "the paper's conventions in plain loops", 5)


def nltk_self_bleu(outputs):
    """Mean BLEU-4 of each output against all others, by NLTK."""
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
    smoothing = SmoothingFunction().method1
    return float(np.mean([sentence_bleu(outputs[:i] + outputs[i + 1:], output, smoothing_function=smoothing)
                          for i, output in enumerate(outputs)]))


def self_bleu_row(what, groups, asked, repeats, peer_repeats, peer, device):
    """Both sides in turn; where the peer runs once only, ours runs more often after it."""
    ours, theirs, values = [], [] if peer else None, []
    for i in range(repeats):
        if peer and i < peer_repeats:
            theirs.append(timed(lambda: values.append([nltk_self_bleu(g) for g in groups]), device))
        ours.append(timed(lambda: diversity.self_bleus(groups, short_as_nltk=True), device))
    if peer:
        check(np.allclose(values[0], [diversity.self_bleu(g, short_as_nltk=True) for g in groups], atol=1e-6),
              "self-BLEU differs from NLTK's")
    return line(f"self-BLEU-4 {what}, {sum(map(len, groups)):,} outputs", ours, theirs, "NLTK", asked,
                note="" if peer_repeats > 1 else "the peer ran once")


def row_self_bleu(cfg, device):
    groups = [[diversity.words(t) for t in g] for g in texts_of(cfg.text)]
    pooled, peer = [t for g in groups for t in g], installed("nltk")
    for what, sets, asked, peer_repeats in (("per input", groups, 50, cfg.repeats),
                                            ("across 500", [pooled[:500]], 0, cfg.repeats),
                                            ("across 2,000", [pooled[:2000]], 500, 1)):
        yield self_bleu_row(what, sets, asked, cfg.repeats, peer_repeats, peer, device)


def row_growth(cfg, device):
    """Seconds an output at 64,000 outputs over those at 1,000: 1 is linear, and the ratio is to be at most
    what is asked for."""
    rng = np.random.default_rng(0)
    words = [f"w{k}" for k in range(5000)]
    texts = [[words[k] for k in row] for row in np.minimum(rng.zipf(1.3, (64000, 30)), 5000) - 1]
    vectors = rng.standard_normal((64000, 384))
    for what, measure, x in (("self-BLEU", diversity.self_bleu, texts),
                             ("embedding diversity", diversity.embedding_diversity, vectors)):
        # small sets in turn through all 64,000: one set again and again would stay in the cache
        def in_sets_of(n, measure=measure, x=x):
            return [measure(x[i:i + n]) for i in range(0, 64000, n)]
        found = race({n: partial(in_sets_of, n) for n in (1000, 64000)}, cfg.repeats, device)
        small, large = (medians(found[n]) / 64000 for n in (1000, 64000))
        yield {"work": f"growth of {what}, 1,000 to 64,000 outputs", "ours": large.wall, "peer": "at 1,000",
               "peers": small.wall, "ratio": large.wall / small.wall,
               "by_processor": large.processor / small.processor, "asked": 1.2, "runs": cfg.repeats,
               "unit": "s an output", "note": "at most"}


# -------------------------------------------------------------------------------------------------- the table

ROWS = {"ppo_full": row_ppo_full, "ppo": row_ppo, "ppo_gpt2_full": row_ppo_gpt2_full,
        "ppo_gpt2": row_ppo_gpt2, "update": row_update, "memory": row_memory, "sampling": row_sampling,
        "sampling_gpt2": row_sampling_gpt2, "best_of": row_best_of, "decode": row_decode, "sft": row_sft,
        "reward": row_reward, "reward_ragged": row_reward_ragged, "ppo_ragged": row_ppo_ragged,
        "diversity": row_diversity, "self_bleu": row_self_bleu, "growth": row_growth}
HEADER = ("work", "ours", "peer", "peer's", "ratio", "by processor", "asked", "tokens/s", "of peak",
          "of bandwidth", "")


def amount(value, unit):
    """Such as "0.123 s", "4.56 µs", "789 MB"."""
    if value is None:
        return "not installed"
    if unit == "MB":
        return f"{value:,.0f} MB"
    return f"{1e6 * value:.2f} µs" if value < 1e-3 else f"{value:.3f} s"


def cells(row, peak):
    """A row's cells, in the order of HEADER."""
    def optional(value, form):
        return format(value, form) if value else ""
    unit, flops, read = row.get("unit", "s"), row.get("flops_per_second"), row.get("bytes_per_second")
    return [row["work"], amount(row["ours"], unit), row["peer"], amount(row["peers"], unit),
            optional(row["ratio"], ".2f"), optional(row.get("by_processor"), ".2f"),
            optional(row["asked"], ".2g"),
            optional(row.get("tokens_per_second"), ",.0f"), optional(flops and flops / peak.flops, ".0%"),
            optional(read and read / peak.bandwidth, ".0%"), row["note"]]


def short_of(results):
    """What the last line says of a run: {"versions", "processor", "dtype", "ratios": {work and peer: {ratio,
    by_processor, of_peak, of_bandwidth}}}, without what a row does not have."""
    def of(row):
        found = {"ratio": row["ratio"], "by_processor": row.get("by_processor"),
                 "of_peak": row.get("flops_per_second") and row["flops_per_second"] / results["peak_flops"],
                 "of_bandwidth": row.get("bytes_per_second")
                 and row["bytes_per_second"] / results["bandwidth"]}
        return {k: round(v, 3) for k, v in found.items() if v}
    return {k: results[k] for k in ("versions", "processor", "threads", "device", "dtype")} | {
        "ratios": {f"{row['work']}; {row['peer']}": of(row) for row in results["rows"]}}


def changes(old, new):
    """Lines on what differs between two runs: versions and machine, then each ratio that both have."""
    a, b = short_of(old), short_of(new)
    lines = [f"{k}: {a[k]} then, {b[k]} now" for k in a if k != "ratios" and a[k] != b[k]]
    for work, found in b["ratios"].items():
        before = a["ratios"].get(work, {})
        lines += [f"{work}: {kind} {before[kind]:.2f} then, {value:.2f} now ({value / before[kind] - 1:+.0%})"
                  for kind, value in found.items() if kind in before]
    missing = [work for work in a["ratios"] if work not in b["ratios"]]
    return lines + ([f"not measured now: {len(missing)} of {len(a['ratios'])} rows"] if missing else [])


def read_results(path):
    """The bench.json of an earlier run.  Raises UserError on another file."""
    try:
        results = loads(Path(path).read_bytes())
        short_of(results)
    except OSError as error:
        raise UserError(f"--compare {path}: {error.strerror}") from None
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"--compare {path}: this is no bench.json of this version") from None
    return results


def versions():
    """Of torch and of the peers that are installed."""
    return {"torch": torch.__version__} | {name: metadata.version(name) for name in (
        "trl", "transformers", "nltk") if importlib.util.find_spec(name)}


def processor():
    """Its name, on Linux."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    return next(names, platform.machine())


def main(cfg):
    device, _ = setup(cfg)
    dtype = DTYPES[cfg.dtype]
    if cfg.side:
        return one_side(cfg.side, dtype, device)
    old = cfg.compare and read_results(cfg.compare)
    names = cfg.rows.split(",") if cfg.rows else list(ROWS)
    check(all(n in ROWS for n in names), f"--rows {cfg.rows}: choose from {', '.join(ROWS)}")
    torch.set_deterministic_debug_mode("default")  # as the peers run
    peak = peaks(device, dtype)
    print(f"{torch.get_num_threads()} threads, device {device}.  A large {cfg.dtype} matrix product: "
          f"{peak.default_flops / 1e9:,.0f} GFLOP/s as torch does it, {peak.flops / 1e9:,.0f} as this "
          f"project does it; copying: {peak.bandwidth / 1e9:,.0f} GB/s\n")
    print("| " + " | ".join(HEADER) + " |\n|" + " --- |" * len(HEADER), flush=True)
    rows = []
    for name in names:
        for row in ROWS[name](cfg, device):
            rows.append({"row": name, **row})
            print("| " + " | ".join(cells(row, peak)) + " |", flush=True)
    path = output_path(cfg.out, "bench.json")
    results = {"versions": versions(), "processor": processor(), "threads": torch.get_num_threads(),
               "device": str(device), "dtype": cfg.dtype, "default_flops": peak.default_flops,
               "peak_flops": peak.flops, "bandwidth": peak.bandwidth, "rows": rows}
    write_json(path, results)
    print("\n".join(["", *(changes(old, results) if old else ()), f"wrote {path}"]))
    print(json.dumps(short_of(results)))


if __name__ == "__main__":
    launch(main, Config, __doc__)
