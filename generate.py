"""Sampling: a prompt is computed once for its N samples, keys and values are kept, finished samples are
dropped.

    from generate import generate
    responses = generate(model, prompts, max_new_tokens=32, n=16, eos=ends_of(tokenizer), rng=rng)

A sample's random numbers belong to its prompt, its number and its step.  So neither the batch, nor samples
that finish early, nor the number of GPUs changes what is sampled.

Letters: B prompts, N samples of each, P tokens of the longest prompt, T tokens of a response, t own tokens so
far, H heads, G key/value heads, E head width, V vocabulary.
"""
import math

import torch

from common.cuda_graph import recorded
from common.dist import full_copy
from common.errors import UserError
from model import plain


class Grid:
    """The B x N samples that are decoded together, and what all layers must know of them.

    On a GPU each step reads all the room that a sample may fill (`fixed`), behind a mask.  Then all steps are
    the same operations on the same addresses, and a recorded step can be replayed.  On a CPU a step reads
    what is there, which is less work."""

    def __init__(self, lengths, n, width, steps, fixed):
        """lengths: (B,) of the prompts.  n: N.  width: P.  steps: tokens a sample may have."""
        B, device = len(lengths), lengths.device
        self.lengths, self.n, self.width, self.steps, self.fixed = lengths, n, width, steps, fixed
        self.prompt = torch.arange(B, device=device)                    # (B,) prompts that are left,
        self.sample = torch.arange(n, device=device).repeat(B, 1)       # (B, N) and samples of each
        self.tokens = torch.zeros_like(self.sample)                     # (B, N) the last token of each
        self.alive = torch.ones_like(self.sample, dtype=torch.bool)     # (B, N) False once it has ended
        self.t = 0                                                      # own tokens in the cache
        # the place of the last token: a tensor, because a recorded step would keep a number as it was
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        # (B, P + steps): where no sample may look, after a prompt's end and beyond its own tokens
        self.blocked = torch.arange(width + steps, device=device) >= lengths[:, None]
        self.blocked[:, width:] = True

    @property
    def n_read(self):
        """Own tokens that a step reads of each sample."""
        return self.steps if self.fixed else self.t

    def keep(self, rows, columns):
        """Drops samples.  rows: (B',) prompts kept; columns: (B', N') samples kept of each."""
        at = rows[:, None], columns
        self.tokens, self.alive, self.sample = self.tokens[at], self.alive[at], self.sample[at]
        self.prompt, self.lengths, self.blocked = self.prompt[rows], self.lengths[rows], self.blocked[rows]


class LayerCache:
    """Keys and values of one layer: a prefix for each prompt, shared by its N samples, and each one's own."""

    def __init__(self, grid):
        self.grid = grid
        self.prefix = None      # k and v of the prompts, each (B, G, P, E)
        self.own = None         # k and v of the samples, each (B, N, G, steps, E)

    def start(self, k, v):
        """The prompts' keys and values, each (B, P, G, E)."""
        B, _, G, E = k.shape
        self.prefix = [x.transpose(1, 2).contiguous() for x in (k, v)]
        # zeros: what is masked has weight 0, and 0 times what memory held may be nan
        self.own = [x.new_zeros(B, self.grid.n, G, self.grid.steps, E) for x in (k, v)]

    def attend(self, q, k, v):
        """One new token for each of B x N samples.  q (B, N, H, E), k and v (B, N, G, E) -> (B, N, H, E).

        A query attends to its prompt's shared prefix and to its own tokens in one softmax, which is exactly
        what N separate rows compute."""
        for own, new in zip(self.own, (k, v)):
            own.index_copy_(3, self.grid.at, new[:, :, :, None])
        (k0, v0), (k1, v1) = self.prefix, [own[:, :, :, :self.grid.n_read] for own in self.own]
        B, N, H, E = q.shape
        G, P = k0.shape[1:3]
        q = q.reshape(B, N, G, H // G, E) / math.sqrt(E)
        past = q.transpose(1, 2).reshape(B, G, -1, E) @ k0.transpose(2, 3)              # (B, G, N x H/G, P)
        recent = q @ k1.transpose(3, 4)                                                 # (B, N, G, H/G, t)
        scores = torch.cat((past.view(B, G, N, H // G, P), recent.transpose(1, 2)), dim=-1)
        scores.masked_fill_(self.grid.blocked[:, None, None, None, :P + self.grid.n_read], float("-inf"))
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
        w0, w1 = weights.split((P, self.grid.n_read), dim=-1)
        from_prefix = (w0.reshape(B, G, -1, P) @ v0).view(B, G, N, H // G, E).transpose(1, 2)
        from_own = w1.transpose(1, 2) @ v1                                              # (B, N, G, H/G, E)
        return (from_prefix + from_own).reshape(B, N, H, E)

    def keep(self, rows, columns):
        """Drops samples, as `Grid.keep`."""
        self.prefix = [x[rows] for x in self.prefix]
        self.own = [x[rows[:, None], columns] for x in self.own]


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
    """(token, its log-probability) from each row of logits (..., V), by inverting its distribution function
    at uniform (...) in [0, 1).  temperature 0 is greedy."""
    if temperature == 0:
        return logits.argmax(-1), torch.zeros_like(uniform)
    p = filter_logits(logits / temperature, top_k, top_p).softmax(-1)
    mass = p.double().cumsum(-1)        # double: a vocabulary of 50,000 has tails that fp32 sums lose
    token = torch.searchsorted(mass, uniform[..., None].double() * mass[..., -1:], right=True)[..., 0]
    token = token.clamp(max=logits.shape[-1] - 1)
    return token, p.gather(-1, token[..., None])[..., 0].log()


@torch.no_grad()
def generate(model, prompts, max_new_tokens, n=1, temperature=1.0, top_k=0, top_p=1.0, eos=None, rng=None,
             batch_size=4096, ranks=(0, 1), fixed=None, logp=None):
    """Samples n responses to each prompt.

    prompts: list of id lists, none empty.  Returns for each prompt a list of n id lists of at most
    max_new_tokens ids.  eos: an id, some, or None; a response ends with the first of them that is drawn, and
    keeps it.  rng: torch.Generator on the CPU (None: torch's own).  batch_size: samples decoded together.
    ranks: (rank, world_size); this process samples and returns only prompts rank, rank + world_size, ...,
    with the tokens that one process would draw.  fixed: as in `Grid`; None: on a GPU.  logp: a list, to which
    the log-probabilities of all tokens are appended, response after response.  Raises ValueError for
    arguments out of range and for a prompt that leaves no room in the context."""
    if n < 1 or max_new_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"generate: n {n} and max_new_tokens {max_new_tokens} must be at least 1, "
                         f"temperature {temperature} and top_k {top_k} at least 0, top_p {top_p} in (0, 1]")
    room = model.config.context - max_new_tokens
    for i, prompt in enumerate(prompts):
        if not 0 < len(prompt) <= room:
            raise ValueError(f"generate: prompt {i} has {len(prompt)} tokens; 1 to {room} fit beside "
                             f"{max_new_tokens} new ones in a context of {model.config.context}")
    rank, world_size = ranks
    fixed = model.device.type == "cuda" if fixed is None else fixed
    model = full_copy(model, model.compute_dtype)       # cast, and fetched from other ranks, once a call
    ends = torch.tensor(ids_of(eos), dtype=torch.long, device=model.device)
    responses, group_size = [], max(1, batch_size // n) * world_size
    for i in range(0, len(prompts), group_size):
        # prompt-major: the same however prompts are grouped and spread over ranks
        uniform = torch.rand(len(prompts[i:i + group_size]), n, max_new_tokens, generator=rng)
        mine = prompts[i + rank:i + group_size:world_size]      # i is a multiple of world_size
        if mine:
            ids = _generate_group(model, mine, uniform[rank::world_size].to(model.device), temperature, top_k,
                                  top_p, ends, fixed, logp)
            responses += [[[i for i in row if i >= 0] for row in rows] for rows in ids.tolist()]
    return responses


def _prefill(model, prompts, n, steps, fixed):
    """Runs the prompts once: (logits (B, 1, V) at each prompt's end, a cache for each layer, Grid)."""
    batch = plain(prompts, model.device)
    lengths = torch.tensor([len(p) for p in prompts], device=model.device)
    grid = Grid(lengths, n, batch.tokens.shape[1], steps, fixed)
    caches = [LayerCache(grid) for _ in model.blocks]
    # the next token follows from the last position of each prompt alone
    end = (grid.prompt * grid.width + lengths - 1)[:, None]                             # (B, 1)
    inside = (batch.positions < lengths[:, None])[:, None, None]
    return _logits(model, batch.tokens, batch.positions, caches, inside, end), caches, grid


def _decode(model, caches, grid):
    """The last token of each sample through all layers.  Returns the logits of the next one, (B, N, V)."""
    grid.t += 1
    grid.blocked.index_fill_(1, grid.width + grid.at, False)
    position = (grid.lengths[:, None] + grid.at).expand_as(grid.tokens)
    return _logits(model, grid.tokens, position, caches)


def _logits(model, tokens, positions, caches, mask=None, used=None):
    """(B, N, V), each layer in the precision of `GPT.trunk` and `GPT.top`, norm and head in fp32, so that
    what is sampled is what is scored.  mask, used: of the last layer."""
    x, rope, frozen = model.embed_tokens(tokens, positions), model.rope(positions), model.config.frozen
    x = x.to(model.compute_dtype) if frozen else x
    with model.autocast():
        for i, (block, cache) in enumerate(zip(model.blocks, caches), 1):
            x = block(x, rope, *((mask, used) if i == len(caches) else (None, None)), cache)
            x = x.float() if i == frozen else x
    return model.head(model.norm(x))


def ids_of(eos):
    """None, one id or some of them -> a list."""
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _generate_group(model, prompts, uniform, temperature, top_k, top_p, ends, fixed, logp):
    """`generate` for one group of prompts.  uniform: (B, N, steps).  Returns ids of that shape, -1 behind a
    response's end.  The grid shrinks as samples finish."""
    B, n, steps = uniform.shape
    logits, caches, grid = _prefill(model, prompts, n, steps, fixed)
    result = torch.full((B, n, steps), -1, dtype=torch.long, device=model.device)
    log_probs = torch.zeros((B, n, steps), device=model.device)
    finite = torch.ones((), dtype=torch.bool, device=model.device)

    def draw(logits):           # the next token of each sample, from (B, N, V)
        finite.logical_and_(logits.sum().isfinite())
        here = grid.prompt[:, None], grid.sample, grid.at
        new, log_probs[here] = sample_token(logits, uniform[here], temperature, top_k, top_p)
        result[here] = torch.where(grid.alive, new, -1)
        grid.tokens.copy_(new)
        grid.alive &= (new[..., None] != ends).all(-1)

    def step():                 # one more token
        logits = _decode(model, caches, grid)
        grid.at += 1
        draw(logits)

    draw(logits.expand(-1, n, -1))
    # on a GPU a look at what has finished makes the CPU wait, and a smaller grid costs a new record
    look_every, worth, run = (8, 0.5, None) if fixed else (1, 0.8, step)
    for t in range(1, steps):
        if t % look_every == 0 or t == 1:
            if not grid.alive.any():
                break
            if kept := _unfinished(grid.alive, worth):
                for each in (grid, *caches):
                    each.keep(*kept)
                run = None if fixed else step
        run = run or recorded(step, model.device)
        run()
    if not finite:
        raise UserError("sampling: the model's logits are not finite: damaged weights, or bf16 is too coarse "
                        "for them (--dtype fp32)")
    if logp is not None:
        logp += log_probs[result >= 0].tolist()
    return result


def _unfinished(alive, worth):
    """The smallest grid that holds all unfinished samples: (rows (B',), columns (B', N')), or None while it
    is larger than `worth` of this one.  alive: (B, N)."""
    unfinished = alive.sum(1)
    rows = (unfinished > 0).nonzero()[:, 0]
    width = int(unfinished.max())
    if len(rows) * width > worth * alive.numel():
        return None
    return rows, alive[rows].sort(dim=1, descending=True, stable=True).indices[:, :width]
