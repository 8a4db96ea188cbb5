"""The transformer: GPT-2, OPT, LLaMA, Qwen and GPT-NeoX are configurations of one class.  Also what must
exist only once: padding and masks (`pack`), log-probabilities, where a value and where a reward stands.

Letters used in every script: B batch (packed rows), P prompt, T response, S length of a packed row, Q
positions of it that are used, V vocabulary, D width, H heads, G key/value heads, E head width, N samples per
prompt, R responses, M response tokens of a batch, counted one by one.

Three ideas make it fast.

1. Trunk and top.  The paper freezes the embeddings and the first 80 % of the layers.  `model.trunk(packed)`
   runs the frozen part without gradients, `model.top(h, packed)` runs the rest.  Policy, reference, reward
   and value model can use one trunk in memory (`share_trunk`), and PPO runs it once per rollout.  With
   `frozen = 0` the trunk returns the token ids and the top is the whole model: callers stay the same.
2. One prompt, many responses (`pack`).  The responses to one prompt lie after it in one row.  Each sees the
   prompt and itself only, and its positions continue the prompt's.  The numbers equal those of separate rows,
   without a copy of the prompt in each.
3. No output that nobody uses.  `Packed.used` lists the positions that predict or end a response.  The last
   layer computes its output there only (from the prompt's tokens just keys and values); so does the head.
"""
import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


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
    rope_scaling: dict | None = None    # of a context stretched after training, as config.json spells it
    norm_eps: float = 1e-5
    frozen: int = 0             # the embeddings and the first `frozen` layers are the trunk

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.d_ff = self.d_ff or 4 * self.d_model
        if self.position not in ("rope", "learned"):
            raise ValueError(f"GPTConfig.position = {self.position!r}: choose from rope, learned")
        if (not self.d_head and self.d_model % self.n_head) or self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} must divide d_model {self.d_model}, and n_kv_head "
                             f"{self.n_kv_head} must divide n_head")
        self.d_head = self.d_head or self.d_model // self.n_head
        if self.position == "rope" and int(self.d_head * self.rope_part) % 2:
            raise ValueError(f"d_head {self.d_head} x rope_part {self.rope_part} must be even: positions "
                             "turn pairs of numbers")


_GPT2 = dict(position="learned", norm="layernorm", activation="gelu_tanh", bias=True, vocab_size=50257,
             context=1024)
_OPT = dict(position="learned", norm="layernorm", activation="relu", bias=True, vocab_size=50272,
            context=2048)
_LLAMA = dict(position="rope", norm="rmsnorm", activation="swiglu", bias=False)
SHAPES = {  # published shapes, as configurations of the one class below
    "tiny": dict(),             # of LLaMA's kind
    "tiny-opt": dict(_OPT, vocab_size=512, context=512),
    "gpt2": dict(_GPT2, n_layer=12, n_head=12, d_model=768),
    "opt-125m": dict(_OPT, n_layer=12, n_head=12, d_model=768),
    "opt-1.3b": dict(_OPT, n_layer=24, n_head=32, d_model=2048),
    "smollm2-135m": dict(_LLAMA, n_layer=30, n_head=9, n_kv_head=3, d_model=576, d_ff=1536, vocab_size=49152,
                         context=8192, rope_theta=1e5),
    "llama-7b": dict(_LLAMA, n_layer=32, n_head=32, d_model=4096, d_ff=11008, vocab_size=32000, context=2048,
                     tied=False, norm_eps=1e-6),
}


# ------------------------------------------------------------------------------------------------- the layers

def rotate(x, rope):
    """Rotary position embedding (Su et al. 2021).  The two halves of a head are real and imaginary part of
    its rotary pairs: (real, imag) cos + (imag, real) (-sin, sin).

    x: (B, S, H, E); rope: as from `GPT.rope`, each (B, S, 1, 2 x pairs).  Returns (B, S, H, E).  The numbers
    after the first 2 x pairs do not turn (`rope_part`)."""
    cos, sin = rope
    width = cos.shape[-1]
    x, still = x.split((width, x.shape[-1] - width), dim=-1)
    x = x * cos + x.roll(width // 2, -1) * sin
    return torch.cat((x, still), dim=-1) if still.shape[-1] else x


def rope_frequencies(cfg, device=None):
    """Radians by which each rotary pair of a head turns from one position to the next: (pairs,), fp32.

    A stretched context turns its slow pairs `factor` times slower.  "linear" slows all of them (Chen et al.
    2023). "llama3" slows those that turn fewer than low_freq_factor times in the training context, and passes
    linearly to no change at high_freq_factor turns."""
    pairs = int(cfg.d_head * cfg.rope_part) // 2
    frequency = cfg.rope_theta ** -(torch.arange(pairs, device=device, dtype=torch.float32) / pairs)
    s = cfg.rope_scaling
    if not s:
        return frequency
    slow = frequency / s["factor"]
    if s["rope_type"] == "linear":
        return slow
    turns = s["original_max_position_embeddings"] * frequency / (2 * math.pi)   # in the training context
    kept = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
    return slow + (frequency - slow) * kept


class HeadNorm(nn.RMSNorm):
    """RMSNorm of one head's queries or keys, in the weights' type: fp32 where they are trained."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention: H query heads, G key/value heads (G = H: plain multi-head attention)."""

    def __init__(self, cfg):
        super().__init__()
        self.n_head, self.n_kv_head, self.d_head = cfg.n_head, cfg.n_kv_head, cfg.d_head
        self.qkv = nn.Linear(cfg.d_model, (cfg.n_head + 2 * cfg.n_kv_head) * cfg.d_head,
                             bias=cfg.bias or cfg.qkv_bias)
        self.out = nn.Linear(cfg.n_head * cfg.d_head, cfg.d_model, bias=cfg.bias)
        self.norms = cfg.qk_norm
        self.q_norm = HeadNorm(cfg.d_head, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(cfg.d_head, cfg.norm_eps) if cfg.qk_norm else nn.Identity()

    def forward(self, x, rope, mask=None, used=None, cache=None):
        """x: (B, S, D).  rope: as from `GPT.rope`, or None.  Returns (B, S, D), or (B, Q, D) with used.

        mask: (B, 1, S, S), True where a query may look; None: causal.  used: (B, Q) flat indices into B*S,
        the queries that are wanted (then mask is (B, 1, Q, S)).  cache: a LayerCache of generate.py.  The
        first call gives it the prompts' keys and values; then x is (B, N, D), a new token of each sample."""
        B, S, _ = x.shape
        heads = self.qkv(x).view(B, S, -1, self.d_head)                             # (B, S, H + 2G, E)
        qk, v = heads.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=2)
        if self.norms:
            q, k = qk.split((self.n_head, self.n_kv_head), dim=2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)
        if rope is not None:
            qk = rotate(qk, rope)
        q, k = qk.split((self.n_head, self.n_kv_head), dim=2)
        if cache is not None and cache.prefix is not None:
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
        self.up = nn.Linear(cfg.d_model, cfg.d_ff * (2 if self.gated else 1), bias=cfg.bias)
        self.down = nn.Linear(cfg.d_ff, cfg.d_model, bias=cfg.bias)
        self.act = {"relu": F.relu, "gelu": F.gelu, "swiglu": F.silu,
                    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[cfg.activation]

    def forward(self, x):
        if not self.gated:
            return self.down(self.act(self.up(x)))
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


def make_norm(cfg):
    return {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}[cfg.norm](cfg.d_model, eps=cfg.norm_eps)


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
        self.reread = None      # of a published reward model: `splits.load_reward_model`
        self.embed = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.embed_position = nn.Embedding(cfg.context, cfg.d_model) if cfg.position == "learned" else None
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = make_norm(cfg)
        self.head = nn.Linear(cfg.d_model, 1 if scalar else cfg.vocab_size, bias=scalar)
        if cfg.tied and not scalar:
            self.head.weight = self.embed.weight
        self.apply(self._init)
        # GPT-2: two residual writes per layer, so that the sum keeps its variance
        for name, p in self.named_parameters():
            if name.endswith(("attn.out.weight", "mlp.down.weight")):
                nn.init.normal_(p, std=(2 * cfg.n_layer * cfg.d_model) ** -0.5)
        self.freeze()

    def _init(self, module):
        # 1 / sqrt(width): at width 80 five times GPT-2's fixed 0.02, so that attention forms sooner
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.d_model ** -0.5)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @property
    def device(self):
        return self.embed.weight.device

    # -------- trunk and top

    def frozen_modules(self):
        """The trunk: embeddings and the first `config.frozen` layers; nothing where frozen is 0.  An untied
        LM head stays frozen with it (the authors' `freeze_lm_head`).  A tied one is the embedding."""
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
        """List of the parameters that are not frozen."""
        return [p for p in self.parameters() if p.requires_grad]

    def compute_in(self, dtype):
        """Matrix products of the layers in `dtype` (torch.float32 or torch.bfloat16).  Trained layers stay
        fp32 and are cast for each product.  Frozen layers lie in `dtype`.  Embeddings and heads are fp32
        (only sampling casts them).  Returns self."""
        self.compute_dtype = dtype
        return self.freeze()

    def autocast(self):
        return torch.autocast(self.device.type, self.compute_dtype,
                              enabled=self.compute_dtype != torch.float32)

    def trunk(self, packed):
        """What `top` starts from: (B, S, D) after the frozen layers, or the ids (B, S) if none is frozen."""
        if not self.config.frozen:
            return packed.tokens
        with torch.no_grad(), self.autocast():      # no graph to keep, so activations are freed at once
            x = self.embed_tokens(packed.tokens, packed.positions).to(self.compute_dtype)
            return self._layers(x, self.blocks[:self.config.frozen], packed)

    def top(self, h, packed):
        """h from `trunk` (None: run it).  Returns the hidden states that the head needs: (B, Q, D) at
        `packed.used`, or all (B, S, D) of a `plain` batch."""
        h = self.trunk(packed) if h is None else h
        x = h.float() if self.config.frozen else self.embed_tokens(h, packed.positions)
        with self.autocast():
            x = self._layers(x, self.blocks[self.config.frozen:], packed, packed.used)
        return self.norm(x)

    def forward(self, packed):
        """Packed -> hidden states, as `top`."""
        return self.top(None, packed)

    # -------- what the hidden states say.  h: from `trunk`, or None

    def log_probs(self, packed, h=None, temperature=1.0):
        """log pi(token) of every response token: (R, T), zeros after a response's end."""
        logits = self._logits(packed, h, temperature)                       # (M, V)
        return packed.to_grid(gather_last(logits, packed.target) - logits.logsumexp(-1))

    def log_probs_and_entropy(self, packed, h=None, temperature=1.0, learn_entropy=False):
        """`log_probs` and the entropy of each prediction in nats, detached unless learn_entropy: (R, T)."""
        logits = self._logits(packed, h, temperature)                       # (M, V)
        normaliser = logits.logsumexp(-1)
        logp = packed.to_grid(gather_last(logits, packed.target) - normaliser)
        with torch.set_grad_enabled(learn_entropy and torch.is_grad_enabled()):     # else no (M, V) graph
            p = (logits - normaliser[:, None]).exp()
            return logp, packed.to_grid(normaliser - (p * logits).sum(-1))

    def _logits(self, packed, h, temperature):
        """(M, V) at the M predicting positions only, fp32 whatever the layers compute in: bf16 would round a
        logit near 20 by up to a sixteenth, and PPO's log-ratios to noise."""
        logits = self.head(gather(self.top(h, packed), packed.predict_idx).float())
        return logits if temperature == 1 else logits / temperature

    def values(self, packed, h=None):
        """The scalar head before each response token, where the policy predicts it: (R, T)."""
        return packed.to_grid(self.head(gather(self.top(h, packed), packed.predict_idx))[:, 0].float())

    def rewards(self, packed, h=None):
        """The scalar head on each response's last token, which is EOS if the response ended: (R,)."""
        return self.head(gather(self.top(h, packed), packed.last_idx))[:, 0].float()

    # -------- inside

    def embed_tokens(self, tokens, positions):
        x = self.embed(tokens)
        return x if self.embed_position is None else x + self.embed_position(positions)

    def rope(self, positions):
        """positions (B, S) -> what `rotate` takes, (cos, cos) and (-sin, sin), each (B, S, 1, 2 x pairs), or
        None where positions are learned."""
        if self.config.position != "rope":
            return None
        angle = positions[:, :, None, None].float() * rope_frequencies(self.config, positions.device)
        cos, sin = angle.cos().to(self.compute_dtype), angle.sin().to(self.compute_dtype)
        return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)

    def _layers(self, x, blocks, packed, used=None):
        """x (B, S, D) through blocks.  The last one answers at `used` only, where given: (B, Q, D)."""
        if used is not None and not len(blocks):
            return gather(x, used)
        rope = self.rope(packed.positions)
        for i, block in enumerate(blocks):
            args = (x, rope, packed.mask, None)
            if used is not None and i + 1 == len(blocks):
                args = (x, rope, packed.mask_at_used(), used)
            if self.recompute and torch.is_grad_enabled():
                # the backward pass computes the activations inside a layer again instead of keeping them
                x = checkpoint(block, *args, use_reentrant=False)
            else:
                x = block(*args)
        return x

    def with_scalar_head(self):
        """A copy of this model with a scalar head of zeros in place of its own.  A trunk, if there is one,
        lies in memory once for the two."""
        twin = GPT(self.config, scalar=True).to(self.device)
        twin.load_state_dict({k: v for k, v in self.state_dict().items() if not k.startswith("head.")},
                             strict=False)
        nn.init.zeros_(twin.head.weight)
        twin.compute_in(self.compute_dtype)
        share_trunk(self, twin)
        return twin

    def shares_trunk_with(self, other):
        """Whether `other` would compute the same h, because it uses this model's frozen modules."""
        return self.config.frozen == other.config.frozen > 0 and self.embed is other.embed

    def n_params(self):
        return sum(p.numel() for p in self.parameters())


def share_trunk(first, other):
    """Lets `other` use first's frozen modules, so that these lie in memory once.  Returns whether it could:
    only equal weights are shared.  A model trained with another trunk keeps its own, and its own results."""
    k, modules = first.config.frozen, zip(first.frozen_modules(), other.frozen_modules())
    equal = other.config.frozen == k > 0 and all(
        torch.equal(p, q) for a, b in modules for p, q in zip(a.parameters(), b.parameters()))
    if equal:
        other.embed, other.embed_position = first.embed, first.embed_position
        other.blocks = nn.ModuleList([*first.blocks[:k], *other.blocks[k:]])
        if not other.scalar and not first.scalar:
            other.head = first.head     # tied or frozen with the trunk: the same matrix either way
    return equal


def gather(x, idx):
    """x (B, S, ...) at flat indices into B*S, in their shape: idx (B, Q) gives (B, Q, ...)."""
    return x.flatten(0, 1)[idx]


def gather_last(x, idx):
    """x (M, V) at one column idx (M,) of each row: (M,)."""
    return x.gather(1, idx[:, None])[:, 0]


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
    # (B, Q) flat index into B*S of each prompt's last position and all after it; None: every position
    used: torch.Tensor | None
    # (M,) flat index into B*Q of the position whose logits predict each response token
    predict_idx: torch.Tensor
    target: torch.Tensor        # (M,) the token predicted
    response_idx: torch.Tensor  # (M,) which response it belongs to
    token_idx: torch.Tensor     # (M,) its place in that response
    last_idx: torch.Tensor      # (R,) flat index into B*Q of each response's last token
    lengths: torch.Tensor       # (R,) tokens of each response, EOS included

    def to_grid(self, flat):
        """(M,) values, one per response token -> (R, T), zeros after a response's end."""
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


def pack(prompts, responses, device="cpu"):
    """prompts: list of B id lists.  responses: for each prompt a list of id lists.  Returns Packed.  Raises
    ValueError on an empty one: a response's first token needs a position that predicts it."""
    rows, positions, segments, used = [], [], [], []                # one entry a packed row
    predict_idx, target, response_idx, token_idx = [], [], [], []   # one entry a response token
    last_idx, lengths = [], []                                      # one entry a response
    answered = [sum(map(len, group)) for group in responses]        # response tokens of each row
    S = max(len(p) + n for p, n in zip(prompts, answered, strict=True))
    Q = max(answered) + 1
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
