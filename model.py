"""The transformer: GPT-2, OPT, LLaMA, Qwen and GPT-NeoX are configurations of one class.  Also what must
exist only once: padding and masks (`pack`), log-probabilities (`log_probs`), where a reward stands
(`rewards`), sampling (`generate`).

    python model.py          # the shapes and their sizes (tools/budget.py: what training takes)

Letters used in every script: B batch (packed rows), P prompt, T response, S length of a packed row, Q
positions of it that are used, V vocabulary, D width, H heads, G key/value heads, E head width, N samples per
prompt, R responses, M response tokens of a batch, counted one by one.

Three ideas make it fast.

1. Trunk and top.  The paper freezes the embeddings and the first 80 % of the layers.  `model.trunk(batch)`
   runs the frozen part without gradients, `model.top(h, batch)` runs the rest.  Policy, reference, reward and
   value model can use one trunk in memory (`share_trunk`), and PPO runs it once per rollout.  With
   `frozen = 0` the trunk returns the token ids and the top is the whole model, so callers stay the same.
2. One prompt, many responses (`pack`).  The responses to one prompt lie behind it in one row.  Each sees the
   prompt and itself only, and its positions continue the prompt's.  The numbers equal those of separate rows,
   without a copy of the prompt in each.
3. No output that nobody uses.  `Packed.used` lists the positions that predict or end a response.  The last
   layer computes its output there only (from the prompt's tokens just keys and values), and so does the head.

On a GPU sampling also replays a recorded step (`recorded`), because Python is slower than its kernels.
"""
import math
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common.dist import unshard
from common.errors import check
from common.fast_linear import Linear


@dataclass
class GPTConfig:
    """One transformer.  The defaults are the synthetic task's model: small enough for two CPU cores."""
    vocab_size: int = 512
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 0          # 0: as many as n_head; fewer is grouped-query attention
    d_model: int = 80
    d_head: int = 0             # 0: d_model / n_head
    d_ff: int = 0               # 0: 4 x d_model
    context: int = 512          # positions the model may use; a hard limit for learned ones
    position: str = "rope"      # rope or learned
    norm: str = "rmsnorm"       # rmsnorm or layernorm
    activation: str = "relu"    # relu, gelu, gelu_tanh (GPT-2) or swiglu (LLaMA)
    bias: bool = False          # biases in every linear layer (GPT-2, OPT, GPT-NeoX) or in none (LLaMA)
    qkv_bias: bool = False      # biases of queries, keys and values alone (Qwen2)
    qk_norm: bool = False       # each head's queries and keys are normalised (Qwen3)
    parallel: bool = False      # attention and MLP of a layer read the same input (GPT-NeoX)
    tied: bool = True           # the LM head is the token embedding
    rope_theta: float = 10000.0
    rope_part: float = 1.0      # the part of each head that turns with its position (GPT-NeoX: 0.25)
    rope_scaling: dict | None = None    # of a context stretched after training, as config.json spells it:
                                        # {"rope_type": "linear" or "llama3", "factor": ..., ...}
    norm_eps: float = 1e-5
    frozen: int = 0             # the embeddings and the first `frozen` layers are the trunk

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.d_ff = self.d_ff or 4 * self.d_model
        for name, known in (("position", ("rope", "learned")), ("norm", ("rmsnorm", "layernorm")),
                            ("activation", ("relu", "gelu", "gelu_tanh", "swiglu"))):
            if getattr(self, name) not in known:
                raise ValueError(f"GPTConfig.{name} = {getattr(self, name)!r}: choose from "
                                 f"{', '.join(known)}")
        if (not self.d_head and self.d_model % self.n_head) or self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must divide d_model {self.d_model}, and n_kv_head "
                             f"{self.n_kv_head} must divide n_head")
        self.d_head = self.d_head or self.d_model // self.n_head
        if self.position == "rope" and int(self.d_head * self.rope_part) % 2:
            raise ValueError(f"d_head {self.d_head} x rope_part {self.rope_part} must be even: positions "
                             "turn pairs of numbers")
        if not 0 <= self.frozen <= self.n_layer:
            raise ValueError(f"frozen = {self.frozen}: a model of {self.n_layer} layers can freeze 0 to "
                             f"{self.n_layer}")


_GPT2 = dict(position="learned", norm="layernorm", activation="gelu_tanh", bias=True, vocab_size=50257,
             context=1024)
_OPT = dict(position="learned", norm="layernorm", activation="relu", bias=True, vocab_size=50272,
            context=2048)
_LLAMA = dict(position="rope", norm="rmsnorm", activation="swiglu", bias=False)
SHAPES = {  # published shapes, as configurations of the one class below
    "tiny": dict(),             # of LLaMA's kind
    "tiny-opt": dict(_OPT, vocab_size=512, context=512),
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
    """Rotary position embedding (Su et al. 2021), the two halves of a head as real and imaginary part: (real,
    imag) cos + (imag, real) (-sin, sin).

    x: (B, S, H, E); rope: as from `GPT.rope`, each (B, S, 1, 2 x planes).  Returns (B, S, H, E).  What lies
    behind the 2 x planes numbers that turn stays as it is (`rope_part`)."""
    cos, sin = rope
    width = cos.shape[-1]
    x, still = x.split((width, x.shape[-1] - width), dim=-1)
    x = x * cos + x.roll(width // 2, -1) * sin
    return torch.cat((x, still), dim=-1) if still.shape[-1] else x


def rope_frequencies(cfg, device=None):
    """Radians by which each plane of a head turns from one position to the next: (E/2,), fp32; fewer where
    only a part of a head turns.  A plane is one pair of a real and an imaginary part.

    A stretched context turns its slow planes `factor` times slower.  "linear" slows all of them (Chen et al.
    2023).  "llama3" slows those that turn fewer than low_freq_factor times in the training context, and
    passes linearly to no change at high_freq_factor turns."""
    planes = int(cfg.d_head * cfg.rope_part) // 2
    frequency = cfg.rope_theta ** -(torch.arange(planes, device=device, dtype=torch.float32) / planes)
    s = cfg.rope_scaling
    if not s:
        return frequency
    slow = frequency / s["factor"]
    if s["rope_type"] == "linear":
        return slow
    turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)   # in the training context
    kept = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    return slow + (frequency - slow) * kept


def gather(x, idx):
    """x (B, S, ...) at flat indices into B*S, in their shape: idx (B, Q) gives (B, Q, ...)."""
    return x.flatten(0, 1)[idx]


class HeadNorm(nn.RMSNorm):
    """RMSNorm of one head's queries or keys, in the weights' type: fp32 where they are trained."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention: H query heads, G key/value heads (G = H: plain multi-head attention)."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.n_kv_head, self.d_head = cfg.n_head, cfg.n_kv_head, cfg.d_head
        self.qkv = Linear(cfg.d_model, (cfg.n_head + 2 * cfg.n_kv_head) * cfg.d_head,
                          bias=cfg.bias or cfg.qkv_bias)
        self.out = Linear(cfg.n_head * cfg.d_head, cfg.d_model, bias=cfg.bias)
        self.norms = cfg.qk_norm
        self.q_norm = HeadNorm(cfg.d_head, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(cfg.d_head, cfg.norm_eps) if cfg.qk_norm else nn.Identity()

    def forward(self, x, rope, mask=None, used=None, cache=None):
        """x: (B, S, D).  rope: as from `GPT.rope`, or None.  Returns (B, S, D), or (B, Q, D) with used.

        mask: (B, 1, S, S), True where a query may look; None: causal.  used: (B, Q) flat indices into B*S,
        the queries that are wanted (then mask is (B, 1, Q, S)).  cache: a LayerCache.  At the first call it
        takes the prompts' keys and values.  At later calls x is (B, N, D), one new token of each sample."""
        B, S, _ = x.shape
        heads = self.qkv(x).view(B, S, -1, self.d_head)                             # (B, S, H + 2G, E)
        qk, v = heads.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=2)
        if self.norms:
            q, k = qk.split((self.n_head, self.n_kv_head), dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        if rope is not None:
            qk = rotate(qk, rope)
        q, k = qk.split((self.n_head, self.n_kv_head), dim=2)
        if cache is not None and cache.holds_prompts:
            return self.out(cache.attend(q, k, v).flatten(2))
        if cache is not None:
            cache.start(k, v)
        if used is not None:
            q = gather(q, used)                                                     # (B, Q, H, E)
        if self.n_kv_head < self.n_head:
            group = self.n_head // self.n_kv_head
            k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
        # rows are padded on the right, where no query of a real token looks: then causal is enough
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                           attn_mask=mask, is_causal=mask is None)  # (B, H, Q, E)
        return self.out(y.transpose(1, 2).flatten(2))


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


def make_norm(cfg):
    return (nn.RMSNorm if cfg.norm == "rmsnorm" else nn.LayerNorm)(cfg.d_model, eps=cfg.norm_eps)


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.parallel = cfg.parallel
        self.norm1, self.norm2 = make_norm(cfg), make_norm(cfg)
        self.attn, self.mlp = Attention(cfg), MLP(cfg)

    def forward(self, x, rope, mask=None, used=None, cache=None):
        """x: (B, S, D) -> (B, S, D), or (B, Q, D) at `used`.  Arguments as in `Attention.forward`."""
        y = self.attn(self.norm1(x), rope, mask, used, cache)   # pre-norm: all families but OPT-350m
        x = x if used is None else gather(x, used)
        if self.parallel:
            return x + y + self.mlp(self.norm2(x))
        x = y + x
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder-only transformer with an LM head, or, with scalar=True, with one number per position (reward
    and value models)."""

    def __init__(self, config, scalar=False):
        super().__init__()
        cfg = self.config = config
        self.scalar, self.compute_dtype, self.recompute = scalar, torch.float32, False
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.embed_position = nn.Embedding(cfg.context, cfg.d_model) if cfg.position == "learned" else None
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = make_norm(cfg)
        # the head's rows are response tokens, whose number changes at each step: under a hundred thousand
        # weights, oneDNN's kernel for each number costs more than it saves
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

        An untied LM head stays frozen with it (the authors' `freeze_lm_head`).  A tied one is the embedding.
        """
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
        self.blocks[:self.config.frozen].to(self.compute_dtype)     # never updated: no fp32 master is needed
        return self

    def trainable(self):
        """The parameters that are not frozen, a list."""
        return [p for p in self.parameters() if p.requires_grad]

    def compute_in(self, dtype):
        """Matrix products of the layers in `dtype` (torch.float32 or torch.bfloat16).  Trained layers stay
        fp32 and are cast for each product.  Frozen layers lie in `dtype`.  Embeddings and heads are fp32
        (only sampling casts them).  Returns self."""
        self.compute_dtype = dtype
        return self.freeze()

    def autocast(self):
        return torch.autocast(self.embed.weight.device.type, self.compute_dtype,
                              enabled=self.compute_dtype != torch.float32)

    def trunk(self, batch):
        """batch: Packed.  Returns what `top` starts from: (B, S, D) behind the frozen layers, or the ids (B,
        S) where nothing is frozen."""
        if not self.config.frozen:
            return batch.tokens
        # frozen: no graph to keep, so its activations are freed at once
        with torch.no_grad(), self.autocast():
            x = self._embed(batch.tokens, batch.positions).to(self.compute_dtype)
            return self._layers(x, self.blocks[:self.config.frozen], batch)

    def top(self, h, batch):
        """h from `trunk`.  Returns the hidden states that the head needs: (B, Q, D) at `batch.used`, or all
        (B, S, D) of a `plain` batch."""
        x = h.float() if self.config.frozen else self._embed(h, batch.positions)
        with self.autocast():
            x = self._layers(x, self.blocks[self.config.frozen:], batch, batch.used)
        return self.norm(x)

    def forward(self, batch):
        """Packed -> hidden states (B, Q, D), or (B, S, D) of a `plain` batch.  Apply `head` only where it is
        needed: see `log_probs` and `rewards`."""
        return self.top(self.trunk(batch), batch)

    def _embed(self, tokens, positions):
        x = self.embed(tokens)
        return x if self.embed_position is None else x + self.embed_position(positions)

    def rope(self, positions):
        """positions (B, S) -> what `rotate` takes, (cos, cos) and (-sin, sin), each (B, S, 1, 2 x planes), or
        None where positions are learned."""
        if self.config.position != "rope":
            return None
        angle = positions[:, :, None, None].float() * rope_frequencies(self.config, positions.device)
        cos, sin = angle.cos().to(self.compute_dtype), angle.sin().to(self.compute_dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def _layers(self, x, blocks, batch, used=None):
        """x (B, S, D) through blocks.  The last one answers at `used` only, where given: (B, Q, D)."""
        if used is not None and not len(blocks):
            return gather(x, used)
        rope = self.rope(batch.positions)
        for i, block in enumerate(blocks):
            args = (x, rope, batch.mask, None)
            if used is not None and i + 1 == len(blocks):
                args = (x, rope, batch.mask_at_used(), used)
            if self.recompute and torch.is_grad_enabled():
                # the backward pass computes the activations inside a layer again instead of keeping them
                x = checkpoint(block, *args, use_reentrant=False)
            else:
                x = block(*args)
        return x

    def with_scalar_head(self):
        """A copy of this model with a fresh scalar head in place of its own (zeros: the first prediction is
        0).  A trunk, if there is one, lies in memory once for the two."""
        twin = GPT(self.config, scalar=True).to(self.embed.weight.device)
        twin.load_state_dict({k: v for k, v in self.state_dict().items() if not k.startswith("head.")},
                             strict=False)
        nn.init.zeros_(twin.head.weight)
        twin.compute_in(self.compute_dtype)
        share_trunk(self, twin)
        return twin

    def n_params(self):
        return sum(p.numel() for p in self.parameters())


def full_copy(model, dtype=None):
    """The model with all weights in dtype (None: as they are) and none of them sharded over ranks (all ranks
    must call).  The copy uses the same tensors where nothing changes.  It is the model itself if nothing
    does."""
    weights = model.state_dict()
    found = {k: unshard(p).to(dtype or p.dtype) for k, p in weights.items()}
    if all(found[k] is p for k, p in weights.items()):
        return model
    with torch.device("meta"):
        twin = GPT(model.config, model.scalar)
    twin.load_state_dict(found, assign=True)
    if twin.config.tied and not twin.scalar:
        twin.head.weight = twin.embed.weight
    twin.compute_dtype = model.compute_dtype
    return twin


def share_trunk(first, other):
    """Lets `other` use first's frozen modules, so that these lie in memory once.  Returns whether it could.

    Only equal weights are shared.  A model trained with another trunk keeps its own, and its own results."""
    k, modules = first.config.frozen, zip(first.frozen_modules(), other.frozen_modules())
    equal = other.config.frozen == k > 0 and all(
        torch.equal(p, q) for a, b in modules for p, q in zip(a.parameters(), b.parameters()))
    if equal:
        other.embed, other.embed_position = first.embed, first.embed_position
        other.blocks = nn.ModuleList([*first.blocks[:k], *other.blocks[k:]])
        if not other.scalar and not first.scalar:
            other.head = first.head     # tied or frozen with the trunk: the same matrix either way
    return equal


# -------------------------------------------------------------- padding, masks, and which position means what

@dataclass
class Packed:
    """Prompts with their responses, as tensors.  Built by `pack`; every mask here comes from lengths, never
    from token values.  Two responses, a and b, to one prompt:

        row          p0 p1 p2 a0 a1 a2 b0 b1 pad    the last token of a response is EOS
        position      0  1  2  3  4  5  3  4        both continue the prompt
        mask                                        b0 sees p0 p1 p2 b0, but not a
        used               p2 a0 a1 a2 b0 b1 pad    where hidden states are needed at all
        predict_idx  p2 a0 a1 p2 b0                 of a0 a1 a2 b0 b1: logits at i predict token i + 1, so a
                                                    response starts at its prompt's end
        last_idx     a2 b1                          the reward of a response stands at its EOS
    """
    tokens: torch.Tensor        # (B, S) ids, padded with 0 on the right
    positions: torch.Tensor     # (B, S)
    # (B, 1, S, S) True where a query may look; None: plain causal, where every row has one response
    mask: torch.Tensor | None
    # (B, Q) flat index into B*S of each prompt's last position and all behind it; None: every position
    used: torch.Tensor | None
    # (M,) flat index into B*Q of the position whose logits predict each response token
    predict_idx: torch.Tensor
    target: torch.Tensor        # (M,) the token predicted
    response_idx: torch.Tensor  # (M,) which response it belongs to
    token_idx: torch.Tensor     # (M,) its place in that response
    last_idx: torch.Tensor      # (R,) flat index into B*Q of each response's last token
    lengths: torch.Tensor       # (R,) tokens of each response, EOS included

    def to_padded(self, flat):
        """(M,) values, one per response token -> (R, T), zeros behind a response's end."""
        out = flat.new_zeros(len(self.lengths), int(self.lengths.max()))
        return out.index_put((self.response_idx, self.token_idx), flat)

    def response_mask(self):
        """(R, T) bool: True on the tokens of each response."""
        return torch.arange(int(self.lengths.max()), device=self.lengths.device) < self.lengths[:, None]

    def mask_at_used(self):
        """(B, 1, Q, S): where the queries at `used` may look."""
        S = self.tokens.shape[1]
        if self.mask is None:
            visible = torch.arange(S, device=self.used.device) <= (self.used % S)[..., None]
        else:
            visible = gather(self.mask[:, 0], self.used)
        return visible[:, None]


def _round_up(n, multiple):
    return -(-n // multiple) * multiple


def pack(prompts, responses, device="cpu"):
    """prompts: list of B id lists, none empty.  responses: for each prompt a list of id lists, none empty.
    Returns Packed.

    Raises ValueError on an empty prompt or response: the first token of a response needs a position that
    predicts it."""
    rows, positions, segments, used = [], [], [], []                # one entry a packed row
    predict_idx, target, response_idx, token_idx = [], [], [], []   # one entry a response token
    last_idx, lengths = [], []                                      # one entry a response
    behind = [sum(map(len, group)) for group in responses]          # response tokens of each row
    # few shapes, and round ones: kernels are built (oneDNN, torch.compile) or chosen (cuBLAS) for each
    S = _round_up(max(len(p) + n for p, n in zip(prompts, behind, strict=True)), 16)
    Q = _round_up(max(behind) + 1, 8)
    for b, (prompt, group) in enumerate(zip(prompts, responses)):
        if not prompt or not all(group):
            raise ValueError(f"pack: prompt {b} or one of its responses is empty")
        row, position, segment = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        used.append([b * S + min(len(prompt) - 1 + i, S - 1) for i in range(Q)])
        for j, tokens in enumerate(group):
            n = len(tokens)
            start = b * Q + len(row) - len(prompt) + 1              # of its first token, in B*Q
            predict_idx += [b * Q, *range(start, start + n - 1)]
            target += tokens
            response_idx += [len(lengths)] * n
            token_idx += range(n)
            last_idx.append(start + n - 1)
            lengths.append(n)
            row += tokens
            position += range(len(prompt), len(prompt) + n)
            segment += [j + 1] * n
        pad = S - len(row)
        rows.append(row + [0] * pad)
        positions.append(position + [0] * pad)
        segments.append(segment + [-1] * pad)
    mask = _packed_mask(segments, device) if any(len(group) > 1 for group in responses) else None
    columns = (used, predict_idx, target, response_idx, token_idx, last_idx, lengths)
    rows, positions, *columns = (torch.tensor(x, dtype=torch.long, device=device)
                                 for x in (rows, positions, *columns))
    return Packed(rows, positions, mask, *columns)


def _packed_mask(segments, device):
    """segments: B lists of S numbers: 0 on the prompt, 1, 2, ... on its responses, -1 on padding.  Returns
    (B, 1, S, S): a token sees what stands before it in the prompt and in its own response."""
    segment = torch.tensor(segments, device=device)
    S = segment.shape[1]
    causal = torch.ones(S, S, dtype=torch.bool, device=device).tril()
    return (causal & ((segment[:, None] == 0) | (segment[:, None] == segment[:, :, None])))[:, None]


def plain(rows, device="cpu"):
    """Texts without responses, for their hidden states at every position.  rows: list of B id lists.  Returns
    Packed with tokens (B, S) and positions only."""
    S = max(map(len, rows))
    tokens = torch.tensor([list(row) + [0] * (S - len(row)) for row in rows], device=device)
    return Packed(tokens, torch.arange(S, device=device).expand_as(tokens), *[None] * 8)


def log_probs(model, hidden, batch, temperature=1.0, entropy=False, learn_entropy=False):
    """log pi(token) of every response token: (M,).  With entropy=True also the entropy of each prediction:
    (M,), in nats, without a gradient unless learn_entropy.

    hidden: (B, Q, D) from model(batch).  The head runs at the M predicting positions only, which on a long
    prompt is most of the saving.  Logits are fp32 whatever the layers compute in, because bf16 would round a
    logit near 20 by up to a sixteenth, and PPO's log-ratios to noise."""
    logits = model.head(gather(hidden, batch.predict_idx).float())      # (M, V)
    if temperature != 1:
        logits = logits / temperature
    normaliser = logits.logsumexp(-1)
    logp = logits.gather(1, batch.target[:, None])[:, 0] - normaliser
    if not entropy:
        return logp
    with torch.set_grad_enabled(learn_entropy and torch.is_grad_enabled()):     # else no graph over (M, V)
        p = (logits - normaliser[:, None]).exp()
        return logp, normaliser - (p * logits).sum(-1)


def values(model, hidden, batch):
    """The scalar head before each response token, where the policy predicts it: (M,).  hidden: (B, Q, D)."""
    return model.head(gather(hidden, batch.predict_idx))[:, 0].float()


def rewards(model, hidden, batch):
    """The scalar head on each response's last token: (R,).  hidden: (B, Q, D).  EOS is part of a response, so
    the reward stands there."""
    return model.head(gather(hidden, batch.last_idx))[:, 0].float()


# --------------------------------------------------------------------------------------------------- sampling

class Grid:
    """The cells that are decoded together, N samples of each of B prompts, and what all layers must know of
    them.

    With `fixed` each step reads all the room that a cell may fill, behind a mask, and finds its place in a
    tensor.  Then all steps are the same operations on the same addresses, which a GPU can replay
    (`recorded`).  Without, a step reads what is there, which is less work."""

    def __init__(self, lengths, n, width, steps, fixed):
        """lengths: (B,) of the prompts.  n: samples a prompt.  width: P, of the longest prompt.  steps:
        tokens a sample may have."""
        B, device = len(lengths), lengths.device
        self.lengths, self.n, self.width, self.steps, self.fixed = lengths, n, width, steps, fixed
        self.prompt = torch.arange(B, device=device)                    # (B,) which prompts the cells hold,
        self.sample = torch.arange(n, device=device).repeat(B, 1)       # (B, N) and which sample of it
        self.tokens = torch.zeros_like(self.sample)                     # (B, N) the last token of each cell
        self.alive = torch.ones_like(self.sample, dtype=torch.bool)     # (B, N) cells that have not ended
        self.t = 0                                      # own tokens in the cache, unless steps are recorded
        # place of the last token among them: a tensor, because a record would keep a number as it was
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        # (B, P + steps): what no cell may look at, behind a prompt's end and, if fixed, beyond its own tokens
        self.blocked = torch.arange(width + steps, device=device) >= lengths[:, None]
        self.blocked[:, width:] = fixed

    def keep(self, rows, columns):
        """Drops cells.  rows: (B',) of the prompts kept; columns: (B', N') of the samples kept of each."""
        cells = rows[:, None], columns
        self.tokens, self.alive, self.sample = (x[cells] for x in (self.tokens, self.alive, self.sample))
        self.prompt, self.lengths, self.blocked = (x[rows] for x in (self.prompt, self.lengths, self.blocked))


def weighted_sum(w, v):
    """w (B, N, G, 1, t) @ v (B, N, G, t, E), where v lies token by token in memory: (B, N, G, 1, E).  By four
    running sums, which round less than one."""
    x = v.permute(3, 0, 1, 2, 4) * w[:, :, :, 0].permute(3, 0, 1, 2).contiguous()[..., None]
    whole = len(x) // 4 * 4
    sums = x[:whole].unflatten(0, (-1, 4)).sum(0)           # (4, B, N, G, E)
    for late in x[whole:]:
        sums[0] += late
    return sums.sum(0).unsqueeze(3)


class LayerCache:
    """Keys and values of one layer while sampling: a prefix for each prompt, which its N samples share, and
    each sample's own tokens."""

    def __init__(self, grid, by_sum):
        """by_sum: whether own tokens are read by products and sums, not by matrix products.  With one query a
        key head, these have one row each, which is slow on a CPU."""
        self.grid, self.by_sum = grid, by_sum
        self.prefix = None                  # k and v of the prompts, each (B, G, P, E)
        self.own = None                     # k and v of the samples, each (B, N, G, steps, E)

    @property
    def holds_prompts(self):
        return self.prefix is not None

    @property
    def n_read(self):
        """Own tokens that a step reads of each sample."""
        return self.grid.steps if self.grid.fixed else self.grid.t

    def start(self, k, v):
        """The prompts' keys and values, each (B, P, G, E)."""
        B, _, G, E = k.shape
        self.prefix = [x.transpose(1, 2).contiguous() for x in (k, v)]  # or each token's product would copy
        self.own = [self._room(B, self.grid.n, G, self.grid.steps, E, like=x) for x in (k, v)]

    def _room(self, B, N, G, steps, E, like):
        # zeros where all of it is read: what is masked has weight 0, and 0 times what memory held may be nan
        new = like.new_zeros if self.grid.fixed else like.new_empty
        if self.by_sum:     # token by token: products over all samples and heads run through memory in order
            return new(steps, B, N, G, E).permute(1, 2, 3, 0, 4)
        return new(B, N, G, steps, E)

    def append(self, k, v):
        """The new token of each sample.  k, v: (B, N, G, E).  Returns the own keys and values to read, each
        (B, N, G, t, E)."""
        for own, new in zip(self.own, (k, v)):
            if self.grid.fixed:
                own.index_copy_(3, self.grid.at, new[:, :, :, None])
            else:
                own[:, :, :, self.n_read - 1] = new
        return [own[:, :, :, :self.n_read] for own in self.own]

    def attend(self, q, k, v):
        """One new token for each of B x N samples.  q: (B, N, H, E); k, v: (B, N, G, E).  Returns (B, N, H,
        E).

        A query attends to its prompt's shared prefix and to its own tokens in one softmax: exactly what N
        separate rows compute."""
        B, N, H, E = q.shape
        (k0, v0), (k1, v1) = self.prefix, self.append(k, v)
        G, P = k0.shape[1:3]
        q = q.reshape(B, N, G, H // G, E) / math.sqrt(E)
        past = q.transpose(1, 2).reshape(B, G, -1, E) @ k0.transpose(2, 3)               # (B, G, N x H/G, P)
        recent = (q * k1).sum(-1).unsqueeze(3) if self.by_sum else q @ k1.transpose(3, 4)   # (B,N,G,H/G,t)
        scores = torch.cat((past.view(B, G, N, H // G, P), recent.transpose(1, 2)), dim=-1)
        scores.masked_fill_(self.grid.blocked[:, None, None, None, :P + self.n_read], float("-inf"))
        w0, w1 = scores.softmax(-1, dtype=torch.float32).to(q.dtype).split((P, self.n_read), dim=-1)
        of_prefix = (w0.reshape(B, G, -1, P) @ v0).view(B, G, N, H // G, E).transpose(1, 2)
        w1 = w1.transpose(1, 2)                                                          # (B, N, G, H/G, t)
        of_own = weighted_sum(w1, v1) if self.by_sum else w1 @ v1                        # (B, N, G, H/G, E)
        return (of_prefix + of_own).reshape(B, N, H, E)

    def keep(self, rows, columns):
        """Drops cells, as `Grid.keep`."""
        cells = (rows[:, None] * self.own[0].shape[1] + columns).flatten()      # (B' x N',)
        if len(rows) < len(self.prefix[0]):
            self.prefix = [x[rows] for x in self.prefix]
        for i, x in enumerate(self.own):
            x = x.flatten(0, 1)
            kept = torch.empty_like(x[:len(cells)])     # in the same order of memory
            torch.index_select(x[:, :, :self.n_read], 0, cells, out=kept[:, :, :self.n_read])
            self.own[i] = kept.unflatten(0, columns.shape)


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


def sample_token(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """One token from each row of logits (..., V), by inverting its distribution function at uniform (...) in
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
def generate(model, prompts, max_new_tokens, n=1, temperature=1.0, top_k=0, top_p=1.0, eos=None, rng=None,
             batch_size=4096, ranks=(0, 1), fixed=None):
    """Samples n responses to each prompt.

    prompts: list of id lists, of any lengths, none empty.  Returns for each prompt a list of n id lists of at
    most max_new_tokens ids; a response that ended has its `eos` as last id.  rng: torch.Generator on the CPU
    (None: torch's own).  The draws belong to (prompt, sample, step), so neither batch_size nor rows that
    finish early change a result.  batch_size: samples decoded together.  ranks: (rank, world_size) of this
    process; it samples and returns only prompts rank, rank + world_size, ..., with the tokens that one
    process would draw.  fixed: whether each step reads the whole cache, behind a mask, so that shapes stay
    and a GPU can replay a recorded step; None: on a GPU.  Raises ValueError for n < 1, max_new_tokens < 1, a
    negative temperature, top_k < 0, top_p outside (0, 1], or a prompt that leaves no room in the context."""
    if n < 1 or max_new_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"generate: n {n} and max_new_tokens {max_new_tokens} must be at least 1, "
                         f"temperature {temperature} and top_k {top_k} at least 0, top_p {top_p} in (0, 1]")
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= model.config.context - max_new_tokens:
            raise ValueError(f"generate: prompt {i} has {len(prompt)} tokens; 1 to "
                             f"{model.config.context - max_new_tokens} fit beside {max_new_tokens} new ones "
                             f"in a context of {model.config.context}")
    rank, world_size = ranks
    fixed = model.embed.weight.device.type == "cuda" if fixed is None else fixed
    # cast to the compute type and fetched from other ranks once, not at each token
    model = full_copy(model, model.compute_dtype)
    out, group_size = [], max(1, batch_size // n) * world_size
    for i in range(0, len(prompts), group_size):
        # prompt-major: the same however prompts are grouped and spread over ranks
        uniform = torch.rand(len(prompts[i:i + group_size]), n, max_new_tokens, generator=rng)
        mine = prompts[i + rank:i + group_size:world_size]      # i is a multiple of world_size
        if mine:
            out += _generate_group(model, mine, uniform[rank::world_size], temperature, top_k, top_p, eos,
                                   fixed)
    return out


def _prefill(model, prompts, n, steps, fixed):
    """Runs the prompts once and fills a cache for each layer.  Returns (logits: (B, 1, V) at each prompt's
    end, caches, Grid)."""
    device = model.embed.weight.device
    batch = plain(prompts, device)
    tokens, positions = batch.tokens, batch.positions                               # each (B, P)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    grid = Grid(lengths, n, tokens.shape[1], steps, fixed)
    by_sum = model.config.n_kv_head == model.config.n_head and device.type == "cpu"
    caches = [LayerCache(grid, by_sum) for _ in model.blocks]
    x, rope = model._embed(tokens, positions), model.rope(positions)
    for block, cache in zip(model.blocks[:-1], caches):
        x = block(x, rope, cache=cache)
    # the next token follows from the last position of each prompt alone
    end = (torch.arange(len(prompts), device=device) * tokens.shape[1] + lengths - 1)[:, None]      # (B, 1)
    inside = (positions < lengths[:, None])[:, None, None]
    x = model.blocks[-1](x, rope, inside, end, caches[-1])
    return model.head(model.norm(x)), caches, grid


def _decode(model, caches, grid):
    """The last token of each cell through all layers.  Returns logits of the next one, (B, N, V)."""
    grid.t += 1
    if grid.fixed:
        grid.blocked.index_fill_(1, grid.width + grid.at, False)
    position = (grid.lengths[:, None] + grid.at).expand_as(grid.tokens)
    x, rope = model._embed(grid.tokens, position), model.rope(position)
    for block, cache in zip(model.blocks, caches):
        x = block(x, rope, cache=cache)
    return model.head(model.norm(x))


@cache
def _recording_stream(device):
    """One for all records: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


def recorded(step, device):
    """step, a function without arguments, as a CUDA graph: its kernels, recorded once, are launched together.
    Returns a function without arguments.

    A small model's step is hundreds of kernels of some microseconds, and launching them one by one takes
    longer than they do.  Whatever changes from call to call must lie in tensors that stay where they are."""
    graph, stream = torch.cuda.CUDAGraph(), _recording_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):     # which makes its device the current one
        graph.capture_begin()
        step()                          # recorded, not done
        graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay


def _generate_group(model, prompts, uniform, temperature, top_k, top_p, eos, fixed):
    """`generate` for one group of prompts.  uniform: (B, N, steps).  The grid shrinks as samples finish."""
    (B, n, steps), device = uniform.shape, model.embed.weight.device
    uniform = uniform.to(device)
    logits, caches, grid = _prefill(model, prompts, n, steps, fixed)
    result = torch.full((B, n, steps), -1, dtype=torch.long, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)

    def draw(logits):
        """The next token of each cell, from logits (B, N, V)."""
        finite.logical_and_(logits.sum().isfinite())
        here = grid.prompt[:, None], grid.sample, grid.at
        new = sample_token(logits, uniform[here], temperature, top_k, top_p)
        result[here] = torch.where(grid.alive, new, -1)
        grid.tokens.copy_(new)
        if eos is not None:
            grid.alive &= new != eos

    def step():
        """One more token for each cell."""
        logits = _decode(model, caches, grid)
        grid.at += 1
        draw(logits)

    draw(logits.expand(-1, n, -1))
    # to look at what has finished, the CPU waits for the GPU; a smaller grid costs a copy of the cache and,
    # on a GPU, a new record
    look_every, worth, run = (8, 0.5, None) if fixed else (1, 0.8, step)
    for t in range(1, steps):
        if t % look_every == 0 or t == 1:
            if not grid.alive.any():
                break
            if kept := _unfinished_cells(grid.alive, worth):
                for each in (grid, *caches):
                    each.keep(*kept)
                run = None
        if run is None:
            run = recorded(step, device) if fixed and device.type == "cuda" else step
        run()
    check(finite, "sampling: the model's logits are not finite: its weights are damaged, or bf16 is too "
          "coarse for them (--dtype fp32)")
    return [[[i for i in ids if i >= 0] for ids in samples] for samples in result.tolist()]


def _unfinished_cells(alive, worth):
    """The smallest grid that holds all unfinished samples: (rows (B',), columns (B', N')), or None while it
    is larger than `worth` of this one.  alive: (B, N)."""
    unfinished = alive.sum(1)
    rows = (unfinished > 0).nonzero()[:, 0]
    width = int(unfinished.max())
    if len(rows) * width > worth * alive.numel():
        return None
    return rows, alive[rows].sort(dim=1, descending=True, stable=True).indices[:, :width]


if __name__ == "__main__":
    print("shape             parameters  layers  heads  kv  width  position  norm       activation")
    for name, shape in SHAPES.items():
        c = GPTConfig(**shape)
        with torch.device("meta"):      # sizes without memory
            size = GPT(c).n_params()
        print(f"{name:14} {size:13,}  {c.n_layer:6}  {c.n_head:5}  {c.n_kv_head:2}  {c.d_model:5}  "
              f"{c.position:8}  {c.norm:9}  {c.activation}")
