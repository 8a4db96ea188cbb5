"""Speed as ratios: each piece of work done here and by a peer, in one run on one machine, medians of
alternating runs.

    python bench.py                                # every row; peers that are not installed are skipped
    python bench.py --rows sft,reward,diversity    # some of them
    python bench.py --text FILE                    # the lexical measures on lines of {"outputs": [...]}
    python bench.py --dtype bf16                   # both sides' layers in bf16
    pip install --no-deps trl==1.12.0 accelerate nltk && pip install transformers       # the peers

Writes bench.json and prints a table.  Models have random weights, and responses fixed lengths, so that both
sides do the same work: no side gains by stopping early.  `of peak` is the arithmetic done (2 x parameters x
tokens forward, twice that backward) over what a large matrix product reaches on this machine; `of bandwidth`
the weights read (once for each token a batch samples) over what copying a large tensor reaches.

What makes the difference: the trunk that is frozen runs once and lies in memory once; a prompt is read once
for its samples, and its responses share its row; logits and log-probabilities are computed where they are
needed; rows are padded to their own batch; diversity is linear in the text.  On AMD's processors also that
fp32 products are oneDNN's, here only (model.py, `OneDNN`): where the two products printed first differ, so
much of a ratio is due to it.
"""
import copy
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import diversity
import model as M
import ppo
import reward
import sft
from runtime import DTYPES, Common, out_file, peak_memory, read_jsonl, require, run, setup, write_whole

SMALL = dict(vocab_size=1024, n_layer=4, n_head=4, d_model=128, context=256, position="learned",
             # 1.06 million parameters, in GPT-2's shape
             norm="layernorm", activation="gelu_tanh", bias=True)
GPT2 = M.SHAPES["gpt2"]
MODELS = {"1M": SMALL, "GPT-2 small": GPT2}
PROMPT, RESPONSE, ROLLOUTS = 64, 32, 32             # of a PPO iteration; 4 epochs of 4 minibatches


@dataclass
class Config(Common):
    rows: str = ""              # comma-separated: ppo, ppo_gpt2, memory, sampling, best_of, sft, reward,
                                # diversity, self_bleu, growth; "" all
    repeats: int = 5            # runs of each side, alternating; the median counts
    text: str = ""              # .jsonl(.gz) with lists "outputs" for the lexical measures; "" makes Zipfian
                                # text
    side: str = ""              # internal: one side of the memory row, in a process of its own


def timed(work, device):
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def race(sides, repeats, device):
    """{name: [seconds]} of functions run in turn, after one run each that does not count."""
    for work in sides.values():
        work()
    found = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            found[name].append(timed(work, device))
    return found


def line(work, ours, peer, name, asked, tokens=0, flops=0, read=0, note=""):
    """One row of the table.  ours, peer: seconds of each run (peer None: not installed)."""
    a = float(np.median(ours))
    b = float(np.median(peer)) if peer else None
    return {"work": work, "ours": a, "peer": name, "peers": b, "ratio": b / a if b else None, "asked": asked,
            "tokens_per_second": tokens / a if tokens else None,
            "flops_per_second": flops / a if flops else None,
            "bytes_per_second": read / a if read else None,
            "runs": len(ours), "spread": [min(ours), max(ours)], "note": note}


def peaks(device, dtype):
    """(operations a second of a large matrix product as torch does it by default, as model.py does it, bytes
    a second of copying): what work is measured against."""
    n = 8192 if device.type == "cuda" else 2048
    a, layer = torch.randn(n, n, device=device, dtype=dtype), M.Linear(n, n, bias=False).to(device, dtype)
    big = torch.empty(2 ** 28, dtype=torch.uint8, device=device)
    with torch.no_grad():
        sides = {"torch": lambda: a @ a, "ours": lambda: layer(a), "copy": lambda: big.clone()}
        found = race(sides, 5, device)
    seconds = {k: float(np.median(v)) for k, v in found.items()}
    return 2 * n ** 3 / seconds["torch"], 2 * n ** 3 / seconds["ours"], 2 * len(big) / seconds["copy"]


def installed(*names):
    missing = [n for n in names if importlib.util.find_spec(n) is None]
    if missing:
        print(f"  not installed, skipped: {', '.join(missing)}", flush=True)
    return not missing


def prompts_of(n, length, vocabulary, seed=0):
    return torch.randint(1, vocabulary, (n, length), generator=torch.Generator().manual_seed(seed)).tolist()


# ------------------------------------------------------------------------------------------ PPO, and TRL's

def our_iteration(shape, freeze, device, dtype):
    """A function that does one PPO iteration with a separate value network: rollout, scores, 16 updates."""
    torch.manual_seed(0)
    policy = M.GPT(M.GPTConfig(**shape)).to(device).compute_in(dtype).freeze(round(freeze * shape["n_layer"]))
    reference = copy.deepcopy(policy).requires_grad_(False)
    judge = policy.with_scalar_head()
    value = copy.deepcopy(judge)
    M.share_trunk(policy, reference, judge, value)
    weights = [[p for p in m.parameters() if p.requires_grad] for m in (policy, value)]
    optimiser = torch.optim.Adam([p for w in weights for p in w], lr=1e-6, fused=True)
    cfg = SimpleNamespace(epochs=4, minibatches=4, micro=0, temperature=1.0, clip_ratio=.2, clip_value=.2,
                          vf_coef=.1,
                          clip=1.0)
    prompts, generator = prompts_of(ROLLOUTS, PROMPT, shape["vocab_size"]), torch.Generator().manual_seed(0)

    def iteration():
        ro = ppo.rollout(policy, reference, value, judge, prompts, RESPONSE, None, 1.0, generator)
        rewards = ppo.token_rewards(ro.score, ppo.kl_estimate(ro.logp, ro.ref_logp), ro.mask, 0.05)
        advantages, returns = ppo.gae(rewards, ro.values, ro.mask)
        ppo.update(policy, value, optimiser, weights, ro, ppo.whiten(advantages, ro.mask), returns, cfg,
                   generator, lambda norm, rows: True)
    return iteration


def hugging_face(shape, cls="GPT2LMHeadModel", **more):
    import transformers
    config = transformers.GPT2Config(
        vocab_size=shape["vocab_size"], n_positions=shape["context"], n_embd=shape["d_model"],
        n_layer=shape["n_layer"], n_head=shape["n_head"], bos_token_id=0, eos_token_id=0, pad_token_id=0,
        attn_pdrop=0., embd_pdrop=0., resid_pdrop=0., **more)
    return getattr(transformers, cls)(config).eval()


def trl_iteration(shape, freeze, device, dtype):
    """A function that does n iterations of TRL's PPOTrainer and returns the seconds of each but the first."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import datasets
    import tokenizers
    import transformers
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    transformers.logging.set_verbosity_error()
    words = {f"w{i}": i for i in range(shape["vocab_size"])}
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w1")), pad_token="w0",
        eos_token="w0", padding_side="left")
    rows = datasets.Dataset.from_dict({"input_ids": prompts_of(ROLLOUTS, PROMPT, shape["vocab_size"])})

    def iterations(n):
        torch.manual_seed(0)
        policy, reference = (hugging_face(shape) for _ in range(2))
        value, judge = (hugging_face(shape, "GPT2ForSequenceClassification", num_labels=1) for _ in range(2))
        for m in (policy, value) if freeze else ():
            m.transformer.wte.requires_grad_(False)
            m.transformer.wpe.requires_grad_(False)
            m.transformer.h[:round(freeze * shape["n_layer"])].requires_grad_(False)
        starts = []

        def collate(batch):
            starts.append(time.perf_counter())
            return {"input_ids": torch.tensor([b["input_ids"] for b in batch])}
        args = PPOConfig(output_dir="/tmp/trl", per_device_train_batch_size=ROLLOUTS,
                         gradient_accumulation_steps=1,
                         num_mini_batches=4, num_ppo_epochs=4, total_episodes=ROLLOUTS * (n + 2),
                         response_length=RESPONSE, local_rollout_forward_batch_size=ROLLOUTS, temperature=1.0,
                         num_sample_generations=0, report_to=[], save_strategy="no", logging_steps=10 ** 9,
                         use_cpu=device.type == "cpu", bf16=dtype == torch.bfloat16, learning_rate=1e-6,
                         disable_tqdm=True)
        PPOTrainer(args, tok, policy, reference, judge, rows, value, data_collator=collate).train()
        # the loader fetches one batch ahead: what lies between two fetches is one iteration
        return np.diff(starts)[-n:].tolist()
    return iterations


def ppo_rows(name, asked, cfg, device):
    shape, dtype, known = MODELS[name], DTYPES[cfg.dtype], {}
    peers = installed("trl", "transformers", "accelerate")
    fwd = 2 * M.GPT(M.GPTConfig(**shape)).n_params() * ROLLOUTS * (PROMPT + RESPONSE)
    for freeze, need in asked.items():
        iteration = our_iteration(shape, freeze, device, dtype)
        iteration()
        ours = [timed(iteration, device) for _ in range(cfg.repeats)]
        # sampling, four networks forward, then 4 epochs of two forward and backward
        flops = fwd * (5 + 4 * 2 * 3) if not freeze else 0
        for theirs, least in need.items():
            if peers and theirs not in known:
                known[theirs] = quiet(trl_iteration(shape, theirs, device, dtype), cfg.repeats)
            times = known.get(theirs)
            yield line(f"PPO iteration, {name}, "
                       f"{'all layers trained' if not freeze else f'{freeze:.0%} frozen, shared'}",
                       ours, times, "TRL 1.12" + (f", {theirs:.0%} frozen" if theirs else ", all trained"),
                       least,
                       tokens=ROLLOUTS * RESPONSE, flops=flops)


def quiet(function, *args):
    """A peer's chatter goes nowhere."""
    with open(os.devnull, "w") as nowhere:
        out, sys.stdout = sys.stdout, nowhere
        try:
            return function(*args)
        finally:
            sys.stdout = out


def row_ppo(cfg, device):
    yield from ppo_rows("1M", {0.: {0.: 2}, 0.8: {0.8: 5, 0.: 10}}, cfg, device)


def row_ppo_gpt2(cfg, device):
    yield from ppo_rows("GPT-2 small", {0.: {0.: 2}, 0.8: {0.8: 5, 0.: 10}}, cfg, device)


def row_memory(cfg, device):
    """Peak memory of a process that does two iterations of GPT-2 small (Linux, or a GPU)."""
    def peak(side):
        done = subprocess.run([sys.executable, __file__, "--side", side, "--device", str(device), "--dtype",
                               cfg.dtype, "--threads", str(cfg.threads)], capture_output=True, text=True)
        require(done.returncode == 0, f"bench.py --side {side}: {done.stderr[-300:]}")
        return float(done.stdout.split()[-1])
    theirs = peak("trl") if installed("trl", "transformers", "accelerate") else None
    for side, least, what in (("frozen", 3, "80% frozen, shared"), ("full", 0, "all layers trained")):
        ours = peak(side)
        yield {"work": f"peak memory of a PPO iteration, GPT-2 small, {what}", "ours": ours,
               "peer": "TRL 1.12",
               "peers": theirs, "ratio": theirs and theirs / ours, "asked": least, "unit": "MB", "runs": 1,
               "note": ""}


def one_side(cfg, device):
    if cfg.side == "trl":
        quiet(trl_iteration(GPT2, 0., device, DTYPES[cfg.dtype]), 1)
    else:
        iteration = our_iteration(GPT2, 0.8 if cfg.side == "frozen" else 0., device, DTYPES[cfg.dtype])
        iteration()
        iteration()
    if device.type == "cuda":
        return print(peak_memory(device))
    # not getrusage: its maximum is handed down from the process that started this one
    high = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    print(int(high.split()[1]) / 2 ** 10)


# --------------------------------------------------------------------------------------------------- sampling

def sampling(name, n_prompts, n, asked, cfg, device, new=48):
    """Both sides sample n responses of `new` tokens to each of n_prompts prompts."""
    shape, dtype = MODELS[name], DTYPES[cfg.dtype]
    torch.manual_seed(0)
    model = M.GPT(M.GPTConfig(**shape)).to(device).compute_in(dtype).eval()
    prompts = prompts_of(n_prompts, PROMPT, shape["vocab_size"])
    generator = torch.Generator().manual_seed(0)
    sides = {"ours": lambda: M.generate(model, prompts, new, n=n, generator=generator)}
    if installed("transformers"):
        theirs, ids = hugging_face(shape).to(device, dtype), torch.tensor(prompts, device=device)
        ask = dict(do_sample=True, top_k=0, min_new_tokens=new, max_new_tokens=new, num_return_sequences=n,
                   attention_mask=torch.ones_like(ids), pad_token_id=0)
        sides["theirs"] = torch.no_grad()(lambda: theirs.generate(ids, **ask))
    found = race(sides, cfg.repeats, device)
    tokens = n_prompts * n * new
    return line(f"{'sampling' if n == 1 else f'best-of-{n}'}, {name}, {n_prompts} prompts x {n}, {new} new "
                "tokens",
                found["ours"], found.get("theirs"), "transformers generate", asked, tokens,
                # the prompts' tokens need no head
                2 * (model.n_params() * tokens + sum(p.numel() for p in model.blocks.parameters())
                     * n_prompts * PROMPT),
                read=new * model.n_params() * dtype.itemsize)


def row_sampling(cfg, device):
    yield sampling("1M", 64, 1, 3, cfg, device)
    yield sampling("GPT-2 small", 64, 1, 2, cfg, device)


def row_best_of(cfg, device):
    yield sampling("GPT-2 small", 4, 16, 3, cfg, device)


# -------------------------------------------------------------------------------------- SFT and reward steps

def row_sft(cfg, device):
    """Posts and summaries with the lengths of TL;DR: (prompt, response) tokens, medians 348 and 31."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(348), .45, 256), 80, 900).astype(int)
    prompts = [rng.integers(1, 50257, n).tolist() for n in lengths]
    answers = [[rng.integers(1, 50257, n).tolist()]
               for n in np.clip(rng.lognormal(np.log(31), .35, 256), 8, 60).astype(int)]
    torch.manual_seed(0)
    model = M.GPT(M.GPTConfig(**GPT2)).to(device).compute_in(DTYPES[cfg.dtype])
    weights = list(model.parameters())
    optimiser = torch.optim.AdamW(weights, lr=1e-6, fused=True)
    from splits import batches
    size = 4
    whole = [len(p) + len(a[0]) for p, a in zip(prompts, answers)]
    sorted_batches = iter(batches(whole, size, 1, torch.Generator().manual_seed(0)))
    shuffled = iter(torch.randperm(256, generator=torch.Generator().manual_seed(0)).split(size))
    count = {"ours": [], "block": [], "batch": []}

    def step(loss):
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()

    def ours():
        mb = next(sorted_batches)
        packed = M.pack([prompts[i] for i in mb], [answers[i] for i in mb], device)
        count["ours"].append(len(packed.target))
        step(sft.sft_loss(M.log_probs(model, model(packed), packed)))

    def padded(to):
        """As nanoGPT does it: logits everywhere, loss masked, rows padded to the block (here: the longest
        post) or, kinder, to the longest of a shuffled batch."""
        mb = next(shuffled).tolist()
        width = max(whole) if to == "block" else max(whole[i] for i in mb)
        y = torch.full((size, width), -100)
        for k, i in enumerate(mb):
            y[k, len(prompts[i]) - 1:whole[i] - 1] = torch.tensor(answers[i][0])
        count[to].append(int((y >= 0).sum()))
        x = M.plain([(prompts[i] + answers[i][0] + [0] * width)[:width] for i in mb], device)
        step(F.cross_entropy(model.head(model(x)).flatten(0, 1), y.flatten().to(device), ignore_index=-100))
    # steps differ in size: seconds a response token, over the same number of steps each
    sides = {"ours": ours, "block": lambda: padded("block"), "batch": lambda: padded("batch")}
    found = race(sides, cfg.repeats, device)
    seconds = {k: [t / c for t, c in zip(found[k], count[k][1:])] for k in found}
    for to in ("block", "batch"):
        yield line("SFT step, GPT-2 small, posts of TL;DR's lengths: a response token", seconds["ours"],
                   seconds[to], f"nanoGPT-style step, all logits, padded to the {to}", 1.5, tokens=1)


def row_reward(cfg, device):
    """Eight prompts of 256 tokens with 4 responses of 32: six pairs each."""
    torch.manual_seed(0)
    config = M.GPTConfig(**{**SMALL, "context": 512})
    model = M.GPT(config, scalar=True).to(device).compute_in(DTYPES[cfg.dtype])
    prompts, rng = prompts_of(8, 256, 1024), np.random.default_rng(0)
    answers = [[rng.integers(1, 1024, 32).tolist() for _ in range(4)] for _ in prompts]
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    winner, loser = (torch.tensor([4 * p + pair[k] for p in range(8) for pair in pairs], device=device)
                     for k in (0, 1))

    def ours():
        packed = M.pack(prompts, answers, device)
        r = M.rewards(model, model(packed), packed)
        reward.bradley_terry_loss(r[winner], r[loser]).backward()

    def by_sides():
        """One forward for the preferred sides of all pairs, one for the others."""
        sides = []
        for k in (0, 1):
            packed = M.pack([p for p in prompts for _ in pairs],
                            [[a[pair[k]]] for a in answers for pair in pairs], device)
            sides.append(M.rewards(model, model(packed), packed))
        reward.bradley_terry_loss(*sides).backward()
    found = race({"ours": ours, "theirs": by_sides}, cfg.repeats, device)
    yield line("reward model step, 1M, 4 responses a prompt, all pairs", found["ours"], found["theirs"],
               "one forward for each side of the pairs", 2)


# -------------------------------------------------------------------------------------------------- diversity

def texts_of(cfg):
    """500 lists of 16 outputs: from --text, or Zipfian."""
    if cfg.text:
        return [r["outputs"] for r in read_jsonl(cfg.text, {"outputs": list})]
    rng = np.random.default_rng(0)
    return [[" ".join(f"w{k}" for k in np.minimum(rng.zipf(1.3, rng.integers(20, 50)), 5000))
             for _ in range(16)]
            for _ in range(500)]


def paper_loops(groups):
    """distinct-n and EAD for n = 1..5 in the paper's conventions, per input and pooled, as plain loops."""
    def both(outputs):
        out = []
        for n in range(1, 6):
            grams = []
            for text in outputs:
                tokens = [w for w in text.replace("\n", "").replace(".", "").split(" ") if w]
                for i in range(len(tokens) - n + 1):
                    grams.append(" ".join(tokens[i:i + n]))
            unique, total, V = len(set(grams)), len(grams), 50257
            out.append((unique / total, unique / (V * (1 - ((V - 1) / V) ** total))))
        return np.mean(out, axis=0)
    return [both(g) for g in groups], both([t for g in groups for t in g])


def our_counts(groups):
    tokens = [[diversity.paper_words(t) for t in g] for g in groups]
    unique, total = diversity.count_ngrams(tokens)
    ead = unique / diversity.expected_unique(total, 50257)
    both = np.stack(((unique / total).mean(0), ead.mean(0)), axis=1)     # (groups + 1, 2)
    return both[:-1], both[-1]


def row_diversity(cfg, device):
    groups = texts_of(cfg)
    require(all(np.allclose(a, b, rtol=1e-6) for a, b in zip(our_counts(groups), paper_loops(groups))),
            "the two sides disagree")
    found = race({"ours": lambda: our_counts(groups), "theirs": lambda: paper_loops(groups)}, cfg.repeats,
                 device)
    yield line(f"distinct-n and EAD, n = 1..5, per input and pooled, {len(groups)} x {len(groups[0])} "
               "outputs",
               found["ours"], found["theirs"], "the paper's conventions in plain loops", 5)


def row_self_bleu(cfg, device):
    groups = [[diversity.words(t) for t in g] for g in texts_of(cfg)]
    flat = [t for g in groups for t in g]

    def theirs(outputs):
        from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
        method = SmoothingFunction().method1
        return float(np.mean([sentence_bleu(outputs[:i] + outputs[i + 1:], o, smoothing_function=method)
                              for i, o in enumerate(outputs)]))
    peer = installed("nltk")
    for what, sets, asked, repeats in (("per input", groups, 50, cfg.repeats),
                                       ("across 500", [flat[:500]], 0, cfg.repeats),
                                       ("across 2,000", [flat[:2000]], 500, 1)):
        ours = [timed(lambda: diversity.self_bleus(sets), device) for _ in range(cfg.repeats)]  # noqa: B023
        times, values = None, []
        if peer:
            times = [timed(lambda: values.append([theirs(g) for g in sets]), device)  # noqa: B023
                     for _ in range(repeats)]
            require(np.allclose(values[0], [diversity.self_bleu(g) for g in sets], atol=1e-6),
                    "self-BLEU differs from NLTK's")
        yield line(f"self-BLEU-4 {what}, {sum(map(len, sets)):,} outputs", ours, times, "NLTK", asked,
                   note="" if repeats > 1 else "the peer ran once")


def row_growth(cfg, device):
    """Seconds an output at 64,000 outputs over those at 1,000: 1 is linear."""
    rng = np.random.default_rng(0)
    words = [f"w{k}" for k in range(5000)]
    texts = [[words[k] for k in row] for row in np.minimum(rng.zipf(1.3, (64000, 30)), 5000) - 1]
    vectors = rng.standard_normal((64000, 384))
    for what, work, x in (("self-BLEU", diversity.self_bleu, texts),
                          ("embedding diversity", diversity.embedding_diversity, vectors)):
        # small sets in turn through all 64,000: one set again and again would sit in the cache
        found = race({n: lambda n=n: [work(x[i:i + n]) for i in range(0, 64000, n)]  # noqa: B023
                      for n in (1000, 64000)}, cfg.repeats, device)
        a, b = (float(np.median(found[n])) / 64000 for n in (1000, 64000))
        yield {"work": f"growth of {what}, 1,000 to 64,000 outputs", "ours": b, "peer": "at 1,000",
               "peers": a,
               "ratio": a / b, "asked": 1 / 1.3, "runs": cfg.repeats, "unit": "s an output", "note": ""}


ROWS = {name.removeprefix("row_"): f for name, f in list(globals().items()) if name.startswith("row_")}


def show(x, peak, bandwidth):
    unit = x.get("unit", "s")
    rate = x.get("tokens_per_second")

    def form(v):
        if v is None:
            return "not installed"
        return f"{v:,.0f} MB" if unit == "MB" else f"{1e6 * v:.2f} µs" if v < 1e-3 else f"{v:.3f} s"
    share, read = x.get("flops_per_second"), x.get("bytes_per_second")
    return [x["work"], form(x["ours"]), x["peer"], form(x["peers"]),
            f"{x['ratio']:.2f}" if x["ratio"] else "", f"{x['asked']:.2g}" if x["asked"] else "",
            f"{rate:,.0f}" if rate else "", f"{share / peak:.0%}" if share else "",
            f"{read / bandwidth:.0%}" if read else "", x["note"]]


def main(cfg):
    device, _ = setup(cfg)
    if cfg.side:
        return one_side(cfg, device)
    names = cfg.rows.split(",") if cfg.rows else list(ROWS)
    require(all(n in ROWS for n in names), f"--rows {cfg.rows}: choose from {', '.join(ROWS)}")
    require(cfg.repeats >= 1, f"--repeats {cfg.repeats} must be at least 1")
    torch.use_deterministic_algorithms(False)      # as the peers run
    default, peak, bandwidth = peaks(device, DTYPES[cfg.dtype])
    print(f"{torch.get_num_threads()} threads, device {device}.  A large {cfg.dtype} matrix product: "
          f"{default / 1e9:,.0f} GFLOP/s as torch does it, {peak / 1e9:,.0f} as model.py does; copying: "
          f"{bandwidth / 1e9:,.0f} GB/s\n")
    print("| work | ours | peer | peer's | ratio | asked | tokens/s | of peak | of bandwidth | |\n|"
          + " --- |" * 10, flush=True)
    lines = []
    for name in names:
        for x in ROWS[name](cfg, device):
            lines.append({"row": name, **x})
            print("| " + " | ".join(show(x, peak, bandwidth)) + " |", flush=True)
    path = out_file(cfg.out, "bench.json")
    found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": str(device),
             "dtype": cfg.dtype, "default_flops": default, "peak_flops": peak, "bandwidth": bandwidth,
             "rows": lines}
    write_whole(path, json.dumps(found, indent=1).encode())
    print(f"\nwrote {path}")


if __name__ == "__main__":
    run(main, Config, __doc__)
