"""The transformer: cached = uncached, ragged = one by one, packed = apart, trunk + top = whole."""
import copy
from dataclasses import replace

import pytest
import torch

import generate as G
import model as M
from common.dist import full_copy
from generate import generate

SMALL = dict(n_layer=3, d_model=48, vocab_size=97, context=64)
SHAPES = {
    "gpt2": dict(M.SHAPES["gpt2"], **SMALL, n_head=4),
    "opt": dict(M.SHAPES["opt-125m"], **SMALL, n_head=4),
    # untied, grouped queries
    "llama": dict(M.SHAPES["llama-7b"], **SMALL, n_head=6, n_kv_head=2, d_ff=80),
    # heads wider than the model, normalised
    "qwen3": dict(M.SHAPES["llama-7b"], **SMALL, n_head=6, n_kv_head=2, d_ff=80, d_head=10, qk_norm=True),
    # parallel layers, a quarter of each head turns
    "gpt_neox": dict(SMALL, norm="layernorm", activation="gelu", bias=True, parallel=True, rope_part=0.25,
                     n_head=3, tied=False),
    "tiny": dict(SMALL),
}
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [12, 13, 14, 15]]
EOS = 5


@pytest.fixture(params=SHAPES)
def model(request):
    return M.GPT(M.GPTConfig(**SHAPES[request.param])).requires_grad_(False)


def uncached(model, prompt, uniform, temperature, **kw):
    """One sample, the whole sequence anew for each token."""
    ids = []
    for u in uniform:
        hidden = model(M.plain([prompt + ids]))
        ids.append(int(G.sample_token(model.head(hidden[0, len(prompt) + len(ids) - 1]), u, temperature, **kw)[0]))
        if ids[-1] == EOS:
            break
    return ids


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("temperature, kw", [(0, {}), (1.0, {}), (0.7, {"top_k": 9}), (1.3, {"top_p": 0.8})])
def test_cached_generation_is_uncached_generation(model, temperature, kw, fixed):
    out = generate(model, PROMPTS, 10, n=3, temperature=temperature, eos=EOS,
                     rng=torch.Generator().manual_seed(7), fixed=fixed, **kw)
    uniform = torch.rand(len(PROMPTS), 3, 10, generator=torch.Generator().manual_seed(7))
    assert out == [[uncached(model, p, uniform[b, s], temperature, **kw) for s in range(3)] for b,
                   p in enumerate(PROMPTS)]


@pytest.mark.parametrize("fixed", [False, True])
def test_rows_that_finish_early_change_nothing(fixed):
    """With half the vocabulary as EOS-like mass, rows end at all times and the cache is compacted often."""
    model = M.GPT(M.GPTConfig(**dict(SMALL, vocab_size=6))).requires_grad_(False)
    prompts = [[i % 5] * (1 + i % 7) for i in range(12)]
    out = generate(model, prompts, 16, n=8, eos=EOS, rng=torch.Generator().manual_seed(1), fixed=fixed)
    uniform = torch.rand(12, 8, 16, generator=torch.Generator().manual_seed(1))
    assert out == [[uncached(model, p, uniform[b, s], 1.0) for s in range(8)] for b, p in enumerate(prompts)]
    assert len({len(r) for group in out for r in group}) > 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing is recorded")
def test_a_recorded_step_is_a_step(model):
    """On a GPU generate replays one recorded step; its kernels launched one by one draw the same tokens."""
    model = model.cuda()
    recorded, launched = (generate(model, PROMPTS, 20, n=8, eos=EOS, rng=torch.Generator().manual_seed(7),
                                     fixed=fixed) for fixed in (True, False))
    same = [a == b for of_a, of_b in zip(recorded, launched) for a, b in zip(of_a, of_b)]
    assert sum(same) >= 31          # of 32: sums in another order may turn one draw at the edge of a token


def test_any_of_several_ends_ends_a_response():
    """Published chat models stop at two tokens.  The same draws as with one, cut at the first of either."""
    model = M.GPT(M.GPTConfig(**dict(SMALL, vocab_size=6))).requires_grad_(False)
    one, both = (generate(model, PROMPTS[:1], 12, n=8, eos=eos, rng=torch.Generator().manual_seed(1))[0]
                 for eos in (None, (EOS, 2)))
    for whole, cut in zip(one, both):
        first = min((whole.index(i) for i in (EOS, 2) if i in whole), default=11)
        assert cut == whole[:first + 1]
    assert {row[-1] for row in both} >= {EOS, 2}


def test_ragged_batch_is_one_by_one(model):
    together = generate(model, PROMPTS, 8, temperature=0, eos=EOS)
    assert together == [generate(model, [p], 8, temperature=0, eos=EOS)[0] for p in PROMPTS]
    responses = [[[1, 2, EOS]], [[3]], [[4, 4, 4, 4, EOS]], [[9, EOS]]]
    packed = M.pack(PROMPTS, responses)
    whole = model.log_probs(packed)
    for row, prompt, response in zip(whole, PROMPTS, responses):
        alone, = model.log_probs(M.pack([prompt], [response]))
        torch.testing.assert_close(row[:len(alone)], alone, atol=1e-5, rtol=0)
        assert not row[len(alone):].any()


def test_packed_responses_are_separate_rows(model):
    responses = [[[1, 2, EOS], [3], [9, 9, 9, EOS]], [[4, EOS]], [[6, 7, 8], [8, 7, 6]], [[2, EOS], [2, EOS]]]
    packed = M.pack(PROMPTS, responses)
    alone = [M.pack([p], [[r]]) for p, group in zip(PROMPTS, responses) for r in group]
    scalar, inside = model.with_scalar_head(), packed.response_mask()
    torch.nn.init.normal_(scalar.head.weight)
    for read in (model.log_probs, scalar.values):
        torch.testing.assert_close(read(packed)[inside], torch.cat([read(b)[0] for b in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(scalar.rewards(packed), torch.cat([scalar.rewards(b) for b in alone]), atol=1e-5,
                               rtol=0)


def test_index_convention_by_hand():
    """Prompt p0 p1, responses a0 a1 and b0.  a0 and b0 are predicted at p1, a1 at a0; rewards stand at
    a1 and b0."""
    packed = M.pack([[10, 11]], [[[20, 21], [30]]])
    assert packed.tokens.tolist() == [[10, 11, 20, 21, 30]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 2]]
    assert packed.used[0, :4].tolist() == [1, 2, 3, 4]      # p1 a0 a1 b0: what follows counts from there
    assert packed.predict_idx.tolist() == [0, 1, 0] and packed.target.tolist() == [20, 21, 30]
    assert packed.last_idx.tolist() == [2, 3] and packed.lengths.tolist() == [2, 1]
    # b0 sees the prompt and itself, not a
    assert packed.mask[0, 0, 4].tolist() == [True, True, False, False, True]
    assert packed.to_grid(torch.tensor([1., 2., 3.])).tolist() == [[1, 2], [3, 0]]
    assert packed.response_mask().tolist() == [[True, True], [True, False]]
    assert torch.equal(packed.mask_at_used()[0, 0, :4], packed.mask[0, 0, 1:5])


@pytest.mark.parametrize("shape", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("frozen", [0, 2, 3])
def test_reading_some_positions_is_reading_all_of_them(shape, frozen):
    """The last layer answers at `used` only; a batch without `used` computes it everywhere."""
    model = M.GPT(M.GPTConfig(**SHAPES[shape], frozen=frozen))
    for responses in ([[[1, 2, EOS]], [[3]], [[4, 4, EOS]], [[9, EOS]]],
                      [[[1, 2, EOS], [7]], [[3]], [[4, EOS], [4, 4, EOS]], [[9, EOS]]]):
        packed = M.pack([p + [13] * 15 for p in PROMPTS], responses)
        everywhere = model(replace(packed, used=None))
        assert everywhere.shape[1] == packed.tokens.shape[1] > packed.used.shape[1]
        inside = M.gather(packed.tokens, packed.used) > 0     # not the padding
        torch.testing.assert_close(model(packed)[inside], M.gather(everywhere, packed.used)[inside], atol=1e-5,
                                   rtol=0)


def test_masks_come_from_lengths_not_token_values():
    """Id 0 pads the tensor, and is also a word: as a word it must count."""
    model = M.GPT(M.GPTConfig(**SMALL))
    packed = M.pack([[0, 0], [1, 2, 3]], [[[0, 0, 0]], [[0]]])
    assert packed.lengths.tolist() == [3, 1] and packed.target.tolist() == [0, 0, 0, 0]
    alone = M.pack([[0, 0]], [[[0, 0, 0]]])
    torch.testing.assert_close(model.log_probs(packed)[:1], model.log_probs(alone))


@pytest.mark.parametrize("frozen", [0, 2, 3])
def test_trunk_then_top_is_the_whole_and_frozen_parts_get_no_gradient(frozen):
    model = M.GPT(M.GPTConfig(**SHAPES["llama"]))
    packed = M.pack(PROMPTS, [[[1, 2]], [[3]], [[4, EOS]], [[9]]])
    whole = model.log_probs(packed)
    model.freeze(frozen)
    h = model.trunk(packed)
    assert (h is packed.tokens) == (frozen == 0)
    split = model.log_probs(packed, h)
    torch.testing.assert_close(split, whole)
    (-split.mean()).backward()
    assert all((p.grad is None) == (not p.requires_grad) for p in model.parameters())
    assert (model.blocks[0].attn.qkv.weight.grad is None) == (frozen > 0)


def test_shared_trunk_lies_in_memory_once_and_only_if_equal():
    policy = M.GPT(M.GPTConfig(**SMALL)).freeze(2)
    reference, value = copy.deepcopy(policy), policy.with_scalar_head()
    assert not policy.shares_trunk_with(reference) and M.share_trunk(policy, reference)
    assert policy.shares_trunk_with(reference) and policy.shares_trunk_with(value)
    assert reference.blocks[1] is policy.blocks[1] and value.embed is policy.embed
    assert reference.blocks[2] is not policy.blocks[2]
    other = M.GPT(M.GPTConfig(**SMALL)).freeze(2)
    assert not M.share_trunk(policy, other) and other.embed is not policy.embed


def test_filters_keep_what_they_promise():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    kept = lambda **kw: (G.filter_logits(logits, **kw) > -1e9).tolist()  # noqa: E731
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.7) == [True, True, False, False]       # .5 < .7, the token that crosses stays
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept() == [True] * 4


def test_sampling_follows_the_distribution():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    draws, logp = G.sample_token(logits.expand(40_000, 4), uniform)
    torch.testing.assert_close(logp, logits[draws])
    torch.testing.assert_close(torch.bincount(draws, minlength=4) / 40_000, logits.exp(), atol=0.01, rtol=0)
    edge = torch.tensor([0.0, 1 - 2 ** -24])
    # never a token of probability 0
    assert G.sample_token(torch.tensor([[-torch.inf, 0., -torch.inf]] * 2), edge)[0].tolist() == [1, 1]


@pytest.mark.parametrize("kw",
                         [dict(n=0), dict(temperature=-1), dict(max_new_tokens=0), dict(max_new_tokens=64),
                          dict(top_p=0), dict(top_k=-1)])
def test_generate_refuses(kw):
    with pytest.raises(ValueError):
        generate(M.GPT(M.GPTConfig(**SMALL)), [[1]], **{"max_new_tokens": 4, **kw})


def test_published_shapes_have_their_published_sizes():
    with torch.device("meta"):
        sizes = {name: M.GPT(M.GPTConfig(**M.SHAPES[name])).n_params()
                 for name in ("gpt2", "opt-125m", "smollm2-135m", "llama-7b")}
    assert sizes["gpt2"] == 124_439_808
    assert sizes["smollm2-135m"] == 134_515_008
    assert sizes["llama-7b"] == 6_738_415_616
    assert sizes["opt-125m"] == 125_239_296 - 2 * 768       # OPT's table has two unused rows in front


def test_bf16_is_near_fp32_and_keeps_fp32_where_it_matters(model):
    packed = M.pack(PROMPTS, [[[20, 21, EOS]]] * 4)
    exact = model.log_probs(packed)
    half = copy.deepcopy(model).freeze(2).compute_in(torch.bfloat16)
    near = half.log_probs(packed)
    assert near.dtype == torch.float32 and 0 < (near - exact).abs().max() < 0.2
    # frozen: no masters
    assert {p.dtype for b in half.blocks[:2] for p in b.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    near.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in half.parameters() if p.requires_grad)
    assert half.compute_in(torch.float32).blocks[0].attn.qkv.weight.dtype == torch.float32


def test_bf16_sampling_shares_frozen_layers_and_leaves_the_model_alone(model):
    half = copy.deepcopy(model).freeze(2).compute_in(torch.bfloat16)
    before = {k: v.clone() for k, v in half.state_dict().items()}
    sampler = full_copy(half, half.compute_dtype)
    place = lambda m, layer: m.blocks[layer].mlp.up.weight.data_ptr()  # noqa: E731
    assert place(sampler, 0) == place(half, 0) and place(sampler, 2) != place(half, 2)
    matrices = {p.dtype for name, p in sampler.named_parameters() if name.endswith(("qkv.weight", "up.weight"))}
    assert matrices == {torch.bfloat16} and sampler.head.weight.dtype == sampler.norm.weight.dtype == torch.float32
    out = generate(half, PROMPTS, 6, n=2, eos=EOS, rng=torch.Generator().manual_seed(7))
    assert all(1 <= len(r) <= 6 for group in out for r in group)
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in half.state_dict().items())


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize("dtype, each, mean", [(torch.float32, 1e-5, 1e-6), (torch.bfloat16, .4, .01)])
def test_what_is_sampled_is_what_is_scored(model, frozen, dtype, each, mean):
    """The log-probability that each token was drawn with, against that of a forward pass."""
    model = model.freeze(frozen).compute_in(dtype).requires_grad_(False)
    sampled = []
    out = generate(model, PROMPTS * 8, 12, n=8, eos=EOS, rng=torch.Generator().manual_seed(7), logp=sampled)
    packed = M.pack(PROMPTS * 8, out)
    gap = model.log_probs(packed)[packed.response_mask()] - torch.tensor(sampled)
    assert gap.abs().max() < each and gap.mean().abs() < mean and len(gap) > 1000


def test_rope_scaling_by_hand():
    """E = 4, theta 100: pairs turn 1 and 0.1 radians a position.  Stretched twice, a linear scaling halves
    both; Llama 3's, trained on 2 pi x 20 positions, sees the pairs turn 20 and 2 times: from 4 turns on a
    pair is kept, below 1 it is halved, and at 2 turns a third of the way is kept: 0.05 + 0.05 / 3."""
    cfg = M.GPTConfig(d_model=8, n_head=2, rope_theta=100.)
    assert M.rope_frequencies(cfg).tolist() == pytest.approx([1, .1])
    cfg.rope_scaling = {"rope_type": "linear", "factor": 2.}
    assert M.rope_frequencies(cfg).tolist() == pytest.approx([.5, .05])
    cfg.rope_scaling = {"rope_type": "llama3", "factor": 2., "low_freq_factor": 1., "high_freq_factor": 4.,
                        "original_max_position_embeddings": 40 * torch.pi}
    assert M.rope_frequencies(cfg).tolist() == pytest.approx([1, .05 + .05 / 3])
