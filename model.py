"""The transformer: GPT-2, OPT and LLaMA shapes as configurations of one class, and what must exist just once:
padding and masks (`pack`), log-probabilities (`log_probs`), where a reward is read off (`rewards`), sampling
(`generate`).

    python model.py                      # the shapes and their sizes; budget.py says what training them takes

Letters used in every script: B batch (packed rows), P prompt, T response, S = a packed row's length, Q
positions of it that are read, V vocabulary, D width, H heads, G key/value heads, E head width, N samples per
prompt, R responses, M response tokens of a batch, counted one by one.

Three ideas carry the speed.

1. Trunk and top.  The paper freezes the embeddings and the first 80 % of the layers.  `model.trunk(batch)`
   runs the frozen part without gradients, `model.top(h, batch)` the rest.  Policy, reference, reward and
   value model can share one trunk in memory (`share_trunk`), and PPO runs it once per rollout.  With
   `frozen = 0` the trunk is the identity on token ids and the top is the whole model: callers stay the same.
2. Prompt once, responses many (`pack`).  K responses to one prompt lie in one row behind it; each sees the
   prompt and itself only, and positions restart behind the prompt.  Same numbers as K separate rows, without
   K copies of the prompt.
3. Nothing that nobody reads.  What predicts or ends a response is `Packed.read`; the last layer computes its
   output there only (of a prompt just the keys and values), and the head follows it.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import parallel


@dataclass
class GPTConfig:
    """One transformer.  The defaults are the embedded task's model: small enough for two CPU cores."""
    vocab_size: int = 512
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 0          # 0: as many as n_head; fewer is grouped-query attention
    d_model: int = 80
    d_ff: int = 0               # 0: 4 x d_model
    context: int = 512          # positions the model may use; a hard limit for learned ones
    position: str = "rope"      # rope or learned
    norm: str = "rmsnorm"       # rmsnorm or layernorm
    activation: str = "relu"    # relu, gelu, gelu_tanh (GPT-2) or swiglu (LLaMA)
    bias: bool = False          # biases in every linear layer (GPT-2, OPT) or in none (LLaMA)
    tied: bool = True           # the LM head is the token embedding
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None    # of a context stretched after training, as config.json spells it:
                                        # {"rope_type": "linear" or "llama3", "factor": ..., ...}
    norm_eps: float = 1e-5
    frozen: int = 0             # the first `frozen` layers and the embeddings are the trunk

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.d_ff = self.d_ff or 4 * self.d_model
        for name, known in (("position", ("rope", "learned")), ("norm", ("rmsnorm", "layernorm")),
                            ("activation", ("relu", "gelu", "gelu_tanh", "swiglu"))):
            if getattr(self, name) not in known:
                raise ValueError(f"GPTConfig.{name} = {getattr(self, name)!r}: choose from "
                                 f"{', '.join(known)}")
        if self.d_model % self.n_head or self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must divide d_model {self.d_model}, and n_kv_head "
                             f"{self.n_kv_head} n_head")
        if not 0 <= self.frozen <= self.n_layer:
            raise ValueError(f"frozen = {self.frozen}: a model of {self.n_layer} layers can freeze 0 to "
                             f"{self.n_layer}")


_GPT2 = dict(position="learned", norm="layernorm", activation="gelu_tanh", bias=True, vocab_size=50257,
             context=1024)
_OPT = dict(position="learned", norm="layernorm", activation="relu", bias=True, vocab_size=50272,
            context=2048)
_LLAMA = dict(position="rope", norm="rmsnorm", activation="swiglu", bias=False)
SHAPES = {  # published shapes, as configurations of the one class below
    "tiny": dict(),
    "gpt2": dict(_GPT2, n_layer=12, n_head=12, d_model=768),
    "gpt2-medium": dict(_GPT2, n_layer=24, n_head=16, d_model=1024),
    "opt-125m": dict(_OPT, n_layer=12, n_head=12, d_model=768),
    "opt-1.3b": dict(_OPT, n_layer=24, n_head=32, d_model=2048),
    "smollm2-135m": dict(_LLAMA, n_layer=30, n_head=9, n_kv_head=3, d_model=576, d_ff=1536, vocab_size=49152,
                         context=8192, rope_theta=1e5),
    "llama-7b": dict(_LLAMA, n_layer=32, n_head=32, d_model=4096, d_ff=11008, vocab_size=32000, context=2048,
                     tied=False, norm_eps=1e-6),
}


# ------------------------------------------------------------------------------------------------- the layers

def rotate(x, rope):
    """Rotary position embedding (Su et al. 2021), the two halves of a head as real and imaginary part.

    x: (B, H, S, E); rope: (cos, sin), each (B, 1, S, E/2).  Returns (B, H, S, E)."""
    cos, sin = rope
    real, imag = x.chunk(2, dim=-1)
    return torch.cat((real * cos - imag * sin, imag * cos + real * sin), dim=-1)


def rope_frequencies(cfg, device=None):
    """Radians a position of each of the E/2 planes of a head: (E/2,), fp32.

    A stretched context turns its slow planes `factor` times slower: all of them ("linear", Chen et al. 2023),
    or, as Llama 3 does, those whose wavelength the training context held fewer than low_freq_factor times,
    with a linear passage up to high_freq_factor times."""
    half = cfg.d_model // cfg.n_head // 2
    frequency = cfg.rope_theta ** -(torch.arange(half, device=device, dtype=torch.float32) / half)
    s = cfg.rope_scaling
    if not s:
        return frequency
    slow = frequency / s["factor"]
    if s["rope_type"] == "linear":
        return slow
    turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)   # in the training context
    kept = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    return slow + (frequency - slow) * kept


class OneDNN(torch.autograd.Function):
    """x w' + b in fp32 on a CPU by oneDNN: x (..., K), w (N, K), b (N,) or None -> (..., N).

    torch's default there is MKL, which on AMD's processors uses half the width of the vector units (195
    against 430 GFLOP/s on two Zen 5 cores); torch ships oneDNN beside it, but calls it for bf16 only.  Its
    price is a millisecond or two for each new shape, which `pack` keeps few."""

    @staticmethod
    def product(a, b, bias=None):
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return OneDNN.product(x, w, b)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad
        rows, g_rows = x.flatten(0, -2), g.flatten(0, -2)
        grad_w = None
        if need_w:      # the narrow factor first is up to 1.7 times faster
            grad_w = (OneDNN.product(rows.t(), g_rows.t()).t() if x.shape[-1] < g.shape[-1] else
                      OneDNN.product(g_rows.t(), rows.t()))
        return OneDNN.product(g, w.t()) if need_x else None, grad_w, g_rows.sum(0) if need_b else None


class Linear(nn.Linear):
    """nn.Linear, by oneDNN where that is the faster half of torch: fp32 on a CPU whose other half is MKL."""

    def forward(self, x):
        if (x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32
                and torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()
                and not torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling()):
            linear = OneDNN.apply if torch.is_grad_enabled() else OneDNN.product    # a few µs less
            return linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)


def take(x, read):
    """x (B, S, ...) at the flat indices read (B, Q) into B*S: (B, Q, ...)."""
    return x.flatten(0, 1)[read]


class Attention(nn.Module):
    """Projections of grouped-query attention.  Where a query may look is the caller's business (`attend`):
    one causal row, a packed row, or a cache."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.n_kv_head, self.head = cfg.n_head, cfg.n_kv_head, cfg.d_model // cfg.n_head
        self.qkv = Linear(cfg.d_model, (cfg.n_head + 2 * cfg.n_kv_head) * self.head, bias=cfg.bias)
        self.out = Linear(cfg.d_model, cfg.d_model, bias=cfg.bias)

    def forward(self, x, rope, attend):
        B, S, _ = x.shape
        heads = self.qkv(x).view(B, S, -1, self.head).transpose(1, 2)              # (B, H + 2G, S, E)
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gated = cfg.activation == "swiglu"
        # SwiGLU: [gate; up] in one matrix
        self.up = Linear(cfg.d_model, cfg.d_ff * (2 if self.gated else 1), bias=cfg.bias)
        self.down = Linear(cfg.d_ff, cfg.d_model, bias=cfg.bias)
        self.act = {"relu": F.relu, "gelu": F.gelu, "swiglu": F.silu,
                    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[cfg.activation]

    def forward(self, x):
        if not self.gated:
            return self.down(self.act(self.up(x)))
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm1, self.norm2 = make_norm(cfg), make_norm(cfg)
        self.attn, self.mlp = Attention(cfg), MLP(cfg)

    def forward(self, x, rope, attend, read=None):
        """x: (B, S, D).  read: (B, Q) flat indices into B*S; then `attend` answers at these positions only,
        and so does the layer: (B, Q, D)."""
        y = self.attn(self.norm1(x), rope, attend)          # pre-norm: GPT-2, OPT (but 350m) and LLaMA
        x = y + (x if read is None else take(x, read))
        return x + self.mlp(self.norm2(x))


def make_norm(cfg):
    return (nn.RMSNorm if cfg.norm == "rmsnorm" else nn.LayerNorm)(cfg.d_model, eps=cfg.norm_eps)


class GPT(nn.Module):
    """A decoder-only transformer with an LM head, or, with scalar=True, one number per position (reward and
    value models)."""

    def __init__(self, config, scalar=False):
        super().__init__()
        cfg = self.config = config
        self.scalar, self.compute, self.recompute = scalar, torch.float32, False
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.embed_position = nn.Embedding(cfg.context, cfg.d_model) if cfg.position == "learned" else None
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = make_norm(cfg)
        # the head's rows are response tokens, another number at each step: under a hundred thousand weights,
        # oneDNN's kernel for each would cost more than it saves
        large = not scalar and cfg.vocab_size * cfg.d_model > 100_000
        self.head = (Linear if large else nn.Linear)(
            cfg.d_model, 1 if scalar else cfg.vocab_size, bias=scalar)
        if cfg.tied and not scalar:
            self.head.weight = self.embed.weight
        self.apply(self._init)
        # GPT-2: two residual writes per layer, so that the sum keeps its variance
        for name, p in self.named_parameters():
            if name.endswith(("attn.out.weight", "mlp.down.weight")):
                nn.init.normal_(p, std=(2 * cfg.n_layer * cfg.d_model) ** -0.5)
        self.freeze()

    def _init(self, module):
        # 1 / sqrt(width), not GPT-2's fixed 0.02, which is five times smaller at width 80: attention forms
        # sooner (validation loss after 2,560 steps at width 96: 0.99 instead of 1.06)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.d_model ** -0.5)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    # -------- trunk and top

    def frozen_modules(self):
        """The trunk: embeddings and the first `config.frozen` layers; nothing where frozen is 0.

        An untied LM head stays frozen with it (the paper's `freeze_lm_head`; a tied one is the embedding)."""
        k = self.config.frozen
        if not k:
            return []
        positions = [self.embed_position] if self.embed_position else []
        head = [] if self.scalar or self.config.tied else [self.head]
        return [self.embed, *positions, *self.blocks[:k], *head]

    def freeze(self, frozen=None):
        """Freezes the first `frozen` layers (default: as the config says); 0 thaws all.  Returns self."""
        if frozen is not None:
            self.config = replace(self.config, frozen=frozen)
        self.requires_grad_(True).float()
        for module in self.frozen_modules():
            module.requires_grad_(False)
        self.blocks[:self.config.frozen].to(self.compute)   # never updated: they need no fp32 master
        return self

    def compute_in(self, dtype):
        """Matrix products of the layers in `dtype` (torch.float32 or torch.bfloat16).  Layers that are
        trained stay fp32 and are cast on the way, frozen ones lie in `dtype`; embeddings and heads are fp32.
        Returns self."""
        self.compute = dtype
        return self.freeze()

    def autocast(self):
        return torch.autocast(self.embed.weight.device.type, self.compute,
                              enabled=self.compute != torch.float32)

    def for_sampling(self):
        """This model with all weights in its compute type and whole: cast, and fetched from other ranks,
        once, not at each token."""
        return whole(self, self.compute)

    def trunk(self, batch):
        """batch: Packed.  Returns what `top` starts from: (B, S, D) behind the frozen layers, or, nothing
        frozen, the ids (B, S)."""
        if not self.config.frozen:
            return batch.tokens
        # frozen: no graph to keep, so its activations are freed at once
        with torch.no_grad(), self.autocast():
            x = self._embed(batch.tokens, batch.positions).to(self.compute)
            return self._layers(x, self.blocks[:self.config.frozen], batch)

    def top(self, h, batch):
        """h from `trunk`.  Returns the hidden states that the head reads, (B, Q, D) at `batch.read`."""
        x = h.float() if self.config.frozen else self._embed(h, batch.positions)
        with self.autocast():
            x = self._layers(x, self.blocks[self.config.frozen:], batch, batch.read)
        return self.norm(x)

    def forward(self, batch):
        """Packed -> hidden states (B, Q, D), or (B, S, D) of a `plain` batch.  Apply `head` only where it is
        needed: see `log_probs` and `rewards`."""
        return self.top(self.trunk(batch), batch)

    def _embed(self, tokens, positions):
        x = self.embed(tokens)
        return x if self.embed_position is None else x + self.embed_position(positions)

    def rope(self, positions):
        """positions (B, S) -> (cos, sin), each (B, 1, S, E/2), or None where positions are learned."""
        if self.config.position != "rope":
            return None
        angle = positions[:, None, :, None].float() * rope_frequencies(self.config, positions.device)
        return angle.cos().to(self.compute), angle.sin().to(self.compute)

    def _layers(self, x, blocks, batch, read=None):
        """x (B, S, D) through blocks; the last one answers at `read` only, where given: (B, Q, D)."""
        rope, group = self.rope(batch.positions), self.config.n_head // self.config.n_kv_head

        # rows are padded on the right, where no query of a real token can look: causal is enough
        def attend(q, k, v, mask=batch.mask):
            if group > 1:
                k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

        def attend_at_read(q, k, v):
            return attend(take(q.transpose(1, 2), read).transpose(1, 2), k, v, batch.mask_at_read())
        if read is not None and not len(blocks):
            return take(x, read)
        for i, block in enumerate(blocks):
            last = read is not None and i + 1 == len(blocks)
            args = (x, rope, attend_at_read, read) if last else (x, rope, attend)
            if self.recompute and torch.is_grad_enabled():
                # activations inside a layer are computed again in the backward pass instead of kept
                x = checkpoint(block, *args, use_reentrant=False)
            else:
                x = block(*args)
        return x

    def with_scalar_head(self):
        """A copy of this model with a fresh scalar head (zeros: the first prediction is 0) in place of its
        own; the trunk is shared."""
        twin = GPT(self.config, scalar=True).to(self.embed.weight.device)
        twin.load_state_dict({k: v for k, v in self.state_dict().items() if not k.startswith("head.")},
                             strict=False)
        nn.init.zeros_(twin.head.weight)
        twin.compute_in(self.compute)
        share_trunk(self, twin)
        return twin

    @staticmethod
    def from_pretrained(name_or_dir):
        """A published GPT-2, OPT or LLaMA model, from a hub name or a Hugging Face directory (pretrained.py,
        which raises Fault on what it cannot read)."""
        from pretrained import from_pretrained      # which builds on this file
        return from_pretrained(name_or_dir)

    def n_params(self):
        return sum(p.numel() for p in self.parameters())


def whole(model, dtype=None):
    """model with all weights in dtype (None: as they are), and none spread over the ranks (all must ask).
    What needs no change is shared with it; the model itself, if nothing does."""
    weights = {k: p.detach() for k, p in model.state_dict().items()}
    found = {k: parallel.whole(p).to(dtype or p.dtype) for k, p in weights.items()}
    if all(found[k] is p for k, p in weights.items()):
        return model
    with torch.device("meta"):
        twin = GPT(model.config, model.scalar)
    twin.load_state_dict(found, assign=True)
    if twin.config.tied and not twin.scalar:
        twin.head.weight = twin.embed.weight
    twin.compute = model.compute
    return twin


def share_trunk(first, *others):
    """Lets `others` use first's frozen modules, so that they lie in memory once.  Returns True if all could.

    Only equal weights are shared: a model trained with another trunk keeps its own, and its own results."""
    shared = first.config.frozen > 0
    for other in others:
        if other.config.frozen != first.config.frozen or not first.config.frozen:
            shared = False
            continue
        pairs = list(zip(first.frozen_modules(), other.frozen_modules()))
        if not all(torch.equal(p, q) for a, b in pairs for p, q in zip(a.parameters(), b.parameters())):
            shared = False
            continue
        k = first.config.frozen
        other.embed, other.embed_position = first.embed, first.embed_position
        other.blocks = nn.ModuleList([*first.blocks[:k], *other.blocks[k:]])
        if not other.scalar and not first.scalar:
            other.head = first.head     # tied or frozen with the trunk: the same matrix either way
    return shared


# ------------------------------------------------------------------ padding, masks and what is read off where

@dataclass
class Packed:
    """Prompts with their responses, as tensors.  Built by `pack`; every mask here comes from lengths, never
    from token values.  Two responses, a and b, to one prompt:

        row        p0 p1 p2 a0 a1 a2 b0 b1 pad      the last token of a response is EOS
        position    0  1  2  3  4  5  3  4          both continue the prompt
        mask                                        b0 sees p0 p1 p2 b0, but not a
        read             p2 a0 a1 a2 b0 b1 pad      where hidden states are wanted at all
        source     p2 a0 a1 p2 b0                   of a0 a1 a2 b0 b1: logits at i predict token i + 1, so a
                                                    response starts at its prompt's end
        last       a2 b1                            the reward model reads a response at its EOS
    """
    tokens: torch.Tensor        # (B, S) ids, padded with 0 on the right
    positions: torch.Tensor     # (B, S)
    # (B, 1, S, S) True where a query may look; None: plain causal, for rows of one response each
    mask: torch.Tensor | None
    # (B, Q) flat index into B*S of each prompt's last position and all behind it; None: every position
    read: torch.Tensor | None
    # (M,) flat index into B*Q of the position whose logits predict each response token
    source: torch.Tensor
    target: torch.Tensor        # (M,) the token predicted
    response: torch.Tensor      # (M,) which response it belongs to
    step: torch.Tensor          # (M,) its place in that response
    last: torch.Tensor          # (R,) flat index into B*Q of each response's last token
    lengths: torch.Tensor       # (R,) tokens of each response, EOS included

    def grid(self, flat):
        """(M,) values, one per response token -> (R, T), zeros behind a response's end."""
        out = flat.new_zeros(len(self.lengths), int(self.lengths.max()))
        return out.index_put((self.response, self.step), flat)

    def valid(self):
        """(R, T) bool: True on the tokens of each response."""
        return torch.arange(int(self.lengths.max()), device=self.lengths.device) < self.lengths[:, None]

    def mask_at_read(self):
        """(B, 1, Q, S): where the queries at `read` may look."""
        S = self.tokens.shape[1]
        if self.mask is None:
            seen = torch.arange(S, device=self.read.device) <= (self.read % S)[..., None]
        else:
            seen = take(self.mask[:, 0], self.read)
        return seen[:, None]

    def select(self, rows):
        """The batch of `rows` (B',) only, in that order.  For batches of one response a row, as PPO's:
        response r lies in row r."""
        S, Q, new = self.tokens.shape[1], self.read.shape[1], torch.arange(len(rows), device=rows.device)
        place = torch.full_like(self.lengths, -1)
        place[rows] = new
        keep = place[self.response] >= 0
        response = place[self.response[keep]]
        return Packed(self.tokens[rows], self.positions[rows], None if self.mask is None else self.mask[rows],
                      self.read[rows] % S + new[:, None] * S, self.source[keep] % Q + response * Q,
                      self.target[keep], response, self.step[keep], self.last[rows] % Q + new * Q,
                      self.lengths[rows])


def pack(prompts, responses, device="cpu"):
    """prompts: list of B id lists, none empty.  responses: for each prompt a list of id lists, none empty.
    Returns Packed.

    Raises ValueError on an empty prompt or response: the first token of a response needs a position that
    predicts it."""
    rows, read, source, target, response, step, last, lengths = [], [], [], [], [], [], [], []
    behind = [sum(map(len, group)) for group in responses]      # each prompt, in its row
    S = max(len(p) + n for p, n in zip(prompts, behind, strict=True))
    # few shapes, and round ones: kernels are built (oneDNN, torch.compile) or chosen (cuBLAS) for each
    S, Q = -(-S // 16) * 16, -(-(max(behind) + 1) // 8) * 8
    positions, segments, r = [], [], 0
    for b, (prompt, group) in enumerate(zip(prompts, responses)):
        if not prompt or not all(group):
            raise ValueError(f"pack: prompt {b} or one of its responses is empty")
        row, place, segment = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        read.append([b * S + min(len(prompt) - 1 + i, S - 1) for i in range(Q)])
        for j, tokens in enumerate(group):
            start = b * Q + len(row) - len(prompt) + 1
            source += [b * Q, *range(start, start + len(tokens) - 1)]
            target += tokens
            response += [r] * len(tokens)
            step += range(len(tokens))
            last.append(start + len(tokens) - 1)
            lengths.append(len(tokens))
            row += tokens
            place += range(len(prompt), len(prompt) + len(tokens))
            segment += [j + 1] * len(tokens)
            r += 1
        pad = S - len(row)
        rows.append(row + [0] * pad)
        positions.append(place + [0] * pad)
        segments.append(segment + [-1] * pad)
    mask = None
    if any(len(group) > 1 for group in responses):
        seg = torch.tensor(segments, device=device)
        causal = torch.ones(S, S, dtype=torch.bool, device=device).tril()
        mask = causal & ((seg[:, None] == 0) | (seg[:, None] == seg[:, :, None]))   # (B, query, key)
        mask = mask[:, None]                                                        # (B, 1, query, key)
    as_tensor = lambda x: torch.tensor(x, dtype=torch.long, device=device)  # noqa: E731
    return Packed(as_tensor(rows), as_tensor(positions), mask,
                  *map(as_tensor, (read, source, target, response, step, last, lengths)))


def plain(rows, device="cpu"):
    """Texts without responses, for their hidden states at every position.  rows: list of B id lists.  Returns
    Packed, of which only tokens (B, S) and positions are there."""
    S = max(map(len, rows))
    tokens = torch.tensor([list(row) + [0] * (S - len(row)) for row in rows], device=device)
    return Packed(tokens, torch.arange(S, device=device).expand_as(tokens), *[None] * 8)


def log_probs(model, hidden, batch, temperature=1.0, entropy=False):
    """log pi(token) of every response token: (M,).  With entropy=True also the entropy of each prediction:
    (M,), in nats.

    hidden: (B, Q, D) from model(batch).  The head runs at the M predicting positions only: on a long prompt
    that is most of the saving.  Logits are fp32 whatever the layers compute in: bf16 would round one near 20
    to a sixteenth, and PPO's log-ratios to noise."""
    logits = model.head(hidden.flatten(0, 1)[batch.source].float())                                 # (M, V)
    if temperature != 1:
        logits = logits / temperature
    normaliser = logits.logsumexp(-1)
    chosen = logits.gather(1, batch.target[:, None])[:, 0] - normaliser
    if not entropy:
        return chosen
    with torch.no_grad():       # a log line, not a loss: no graph over (M, V)
        p = (logits - normaliser[:, None]).exp()
        return chosen, normaliser - (p * logits).sum(-1)


def values(model, hidden, batch):
    """The scalar head before each response token, where the policy predicts it: (M,).  hidden: (B, Q, D)."""
    return model.head(hidden.flatten(0, 1)[batch.source])[:, 0].float()


def rewards(model, hidden, batch):
    """The scalar head on each response's last token: (R,).  hidden: (B, Q, D).  EOS is part of a response, so
    that is where it stands."""
    return model.head(hidden.flatten(0, 1)[batch.last])[:, 0].float()


# --------------------------------------------------------------------------------------------------- sampling

class Cache:
    """Keys and values while sampling: one prefix per prompt, shared by its N samples, and each sample's own
    tokens.

    prefix: per layer (k, v), each (B, G, P, E) and contiguous, or every token's product would copy it.  own:
    per layer (k, v), each (B, G, N, T, E), filled up to `t`."""

    def __init__(self, lengths):
        self.prefix, self.own, self.t = [], [], 0
        P = int(lengths.max())
        self.hidden = torch.arange(P, device=lengths.device) >= lengths[:, None]     # (B, P) True on padding

    def allocate(self, n, steps):
        for k, _ in self.prefix:
            B, G, _, E = k.shape
            self.own.append([k.new_empty(B, G, n, steps, E) for _ in range(2)])     # read up to t only

    def attend(self, layer, q, k, v):
        """One new token for each of B x N samples.  q: (B, H, N, E); k, v: (B, G, N, E).  Returns (B, H, N,
        E).

        A query attends over its prompt's shared prefix and its own tokens in one softmax: exactly what N
        separate rows compute."""
        B, H, N, E = q.shape
        G = k.shape[1]
        (k0, v0), (k1, v1) = self.prefix[layer], self.own[layer]
        k1[:, :, :, self.t], v1[:, :, :, self.t] = k, v
        k1, v1 = k1[:, :, :, :self.t + 1], v1[:, :, :, :self.t + 1]                  # (B, G, N, t, E)
        P = k0.shape[2]
        q = q.reshape(B, G, H // G, N, E).transpose(2, 3) / math.sqrt(E)             # (B, G, N, H/G, E)
        past = q.reshape(B, G, -1, E) @ k0.transpose(2, 3)                           # (B, G, N*H/G, P)
        past = past.masked_fill(self.hidden[:, None, None], float("-inf")).view(B, G, N, H // G, P)
        if H == G:      # one query a key head: a product and a sum beat a batched matrix product of one row
            recent = (q * k1).sum(-1).unsqueeze(3)                                   # (B, G, N, 1, t)
        else:
            recent = q @ k1.transpose(3, 4)                                          # (B, G, N, H/G, t)
        weights = torch.cat((past, recent), dim=-1).softmax(-1, dtype=torch.float32).to(q.dtype)
        w0, w1 = weights.split((P, self.t + 1), dim=-1)
        out = (w0.reshape(B, G, -1, P) @ v0).view(B, G, N, H // G, E)
        out = out + ((w1.transpose(3, 4) * v1).sum(3, keepdim=True) if H == G else w1 @ v1)
        return out.transpose(2, 3).reshape(B, H, N, E)

    def keep(self, prompts, samples):
        """Drops finished work.  prompts: (B',) indices of prompts kept; samples: (B', N') indices of samples
        kept for each."""
        self.hidden = self.hidden[prompts]
        self.prefix = [[x[prompts] for x in pair] for pair in self.prefix]
        for pair in self.own:
            for i, x in enumerate(pair):
                fresh = x.new_empty(len(prompts), x.shape[1], samples.shape[1], *x.shape[3:])
                # advanced indices around a slice come out in front: (B', N', G, t, E)
                fresh[:, :, :, :self.t] = x[:, :, :, :self.t][prompts[:, None], :, samples].transpose(1, 2)
                pair[i] = fresh


def filter_logits(logits, top_k=0, top_p=1.0):
    """logits (..., V) with all but the top_k largest, and all outside the smallest set of mass top_p
    (Holtzman et al. 2020), at -inf."""
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], float("-inf"))
    if top_p < 1:
        ordered, index = logits.softmax(-1).sort(dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p      # the token that crosses top_p stays
        logits = logits.masked_fill(beyond.gather(-1, index.argsort(-1)), float("-inf"))
    return logits


def choose(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """One token from each row of logits (..., V) by inverting its distribution function at uniform (...) in
    [0, 1).

    One random number a token, handed in, makes a sample independent of what else is in the batch.
    temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(-1)
    p = filter_logits(logits.float() / temperature, top_k, top_p).softmax(-1)
    mass = p.double().cumsum(-1)        # double: a vocabulary of 50,000 has tails that fp32 sums lose
    token = torch.searchsorted(mass, uniform[..., None].double() * mass[..., -1:], right=True)[..., 0]
    return token.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, n=1, temperature=1.0, top_k=0, top_p=1.0, eos=None,
             generator=None, batch_size=4096, share=(0, 1)):
    """Samples n responses to each prompt.

    prompts: list of id lists, of any lengths, none empty.  Returns for each prompt a list of n id lists of at
    most max_new_tokens ids; one that ended carries its `eos` as last id.  generator: torch.Generator on the
    CPU (None: torch's own); the draws belong to (prompt, sample, step), so neither batch_size nor rows that
    finish early change a result.  batch_size: samples decoded together.  share: (rank, size) of this process;
    only prompts rank, rank + size, ... are sampled and returned, as they would be in one process.  Raises
    ValueError for n < 1, max_new_tokens < 1, a negative temperature, top_k < 0, top_p outside (0, 1], or a
    prompt that leaves no room in the context."""
    if n < 1 or max_new_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"generate: n {n} and max_new_tokens {max_new_tokens} must be at least 1, "
                         f"temperature {temperature} and top_k {top_k} at least 0, top_p {top_p} in (0, 1]")
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= model.config.context - max_new_tokens:
            raise ValueError(f"generate: prompt {i} has {len(prompt)} tokens; 1 to "
                             f"{model.config.context - max_new_tokens} fit beside {max_new_tokens} new ones "
                             f"in a context of {model.config.context}")
    rank, size = share
    model, out, group = model.for_sampling(), [], max(1, batch_size // n) * size
    for i in range(0, len(prompts), group):
        # prompt-major: the same however prompts are grouped and shared
        uniform = torch.rand(len(prompts[i:i + group]), n, max_new_tokens, generator=generator)
        part = prompts[i + rank:i + group:size]     # i is a multiple of size
        if part:
            out += _decode(model, part, max_new_tokens, n, uniform[rank::size], temperature, top_k, top_p,
                           eos)
    return out


def _decode(model, prompts, steps, n, uniform, temperature, top_k, top_p, eos):
    """`generate` for one group of prompts.  uniform: (B, N, steps).  The B x N grid of samples shrinks as
    they finish: `prompt` and `sample` say which ones its cells hold."""
    device, cfg = model.embed.weight.device, model.config
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    tokens = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, prompt in zip(tokens, prompts):
        row[:len(prompt)] = torch.tensor(prompt)
    tokens, uniform = tokens.to(device), uniform.to(device)
    positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
    cache = Cache(lengths)
    group = cfg.n_head // cfg.n_kv_head

    # what comes next is read off the last position of each prompt
    last = (torch.arange(len(prompts), device=device) * tokens.shape[1] + lengths - 1)[:, None]     # (B, 1)

    def prefill(q, k, v, **where):
        cache.prefix.append((k.contiguous(), v.contiguous()))
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        return F.scaled_dot_product_attention(q, k, v, **where)

    def prefill_causal(q, k, v):    # padding on the right is never looked at by a real token
        return prefill(q, k, v, is_causal=True)

    def prefill_last(q, k, v):
        q = take(q.transpose(1, 2), last).transpose(1, 2)
        return prefill(q, k, v, attn_mask=~cache.hidden[:, None, None])
    x, rope = model._embed(tokens, positions), model.rope(positions)
    for block in model.blocks[:-1]:
        x = block(x, rope, prefill_causal)
    x = model.blocks[-1](x, rope, prefill_last, last)                               # (B, 1, D)
    cache.allocate(n, steps)

    result = torch.full((len(prompts), n, steps), -1, dtype=torch.long, device=device)
    prompt = torch.arange(len(prompts), device=device)                              # (B,)
    sample = torch.arange(n, device=device).expand(len(prompts), n)                 # (B, N)
    alive = torch.ones(len(prompts), n, dtype=torch.bool, device=device)
    for t in range(steps):
        logits = model.head(model.norm(x)).expand(-1, alive.shape[1], -1)           # (B, N, V)
        new = choose(logits, uniform[prompt[:, None], sample, t], temperature, top_k, top_p)
        result[prompt[:, None], sample, t] = torch.where(alive, new, -1)
        if eos is not None:
            alive = alive & (new != eos)
            widest = alive.sum(1)
            area = int((widest > 0).sum()) * int(widest.max())
            if area == 0:
                break
            if area <= 0.8 * alive.numel():     # copying the cache pays once a fifth of the grid has finished
                rows = (widest > 0).nonzero()[:, 0]
                cols = alive[rows].sort(dim=1, descending=True, stable=True).indices[:, :int(widest.max())]
                cache.keep(rows, cols)
                pick = rows[:, None], cols
                new, alive, sample, prompt = new[pick], alive[pick], sample[pick], prompt[rows]
        if t + 1 == steps:
            break
        # (B, N) position of the token just drawn
        at = (lengths[prompt][:, None] + t).expand_as(new)
        x, rope = model._embed(new, at), model.rope(at)
        for layer, block in enumerate(model.blocks):
            x = block(x, rope, lambda q, k, v, layer=layer: cache.attend(layer, q, k, v))
        cache.t += 1
    return [[[i for i in one if i >= 0] for one in group] for group in result.tolist()]


if __name__ == "__main__":
    print("shape             parameters  layers  heads  kv  width  position  norm       activation")
    for name, shape in SHAPES.items():
        c = GPTConfig(**shape)
        with torch.device("meta"):      # sizes without memory
            size = GPT(c).n_params()
        print(f"{name:14} {size:13,}  {c.n_layer:6}  {c.n_head:5}  {c.n_kv_head:2}  {c.d_model:5}  "
              f"{c.position:8}  {c.norm:9}  {c.activation}")
