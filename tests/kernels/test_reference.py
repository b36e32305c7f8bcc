"""The reference against dense algebra in fp64 that shares no line with it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_lora.kernels import reference


def _dense(x, lora_a, lora_b, ranks, token_slots, topk_ids, weights, expert_map):
    """[tokens, top_k, out] fp64: every expert's full matrix for every token, then a selection."""
    tokens, top_k = topk_ids.shape
    slots, experts = ranks.shape[1:]
    x = x.double().reshape(tokens, -1, x.shape[1]).expand(tokens, top_k, x.shape[1])
    local = topk_ids.long()
    if expert_map is not None:
        known = (local >= 0) & (local < expert_map.numel())
        local = torch.where(known, expert_map.long()[local.clamp(0, expert_map.numel() - 1)], -1)
    chosen = torch.nn.functional.one_hot(local.clamp(-1, experts).add(1), experts + 2)[..., 1:-1]
    owner = torch.nn.functional.one_hot(token_slots.long() + 1, slots + 1)[:, 1:]
    select = torch.einsum("ts,tke->tkse", owner, chosen).double()
    slices = []
    for a, b, rank in zip(lora_a, lora_b, ranks, strict=True):
        used = torch.arange(a.shape[2]) < rank[..., None]
        a = torch.where(used[..., None], a.double().expand(-1, experts, -1, -1), 0)
        b = torch.where(used[:, :, None], b.double().expand(-1, experts, -1, -1), 0)
        slices.append(torch.einsum("tkse,seor,seri,tki->tko", select, b, a, x))
    y = torch.cat(slices, -1)
    return y if weights is None else y * weights.double()[..., None]


def _case(seed, tokens, experts, top_k, slots, width, outs, rank, shared_a, shared_b):
    g = torch.Generator().manual_seed(seed)
    a = [torch.randn(slots, 1 if shared_a else experts, rank, width, generator=g) for _ in outs]
    b = [torch.randn(slots, 1 if shared_b else experts, o, rank, generator=g) for o in outs]
    ranks = torch.randint(0, rank + 1, (len(outs), slots, experts), generator=g)
    token_slots = torch.randint(-1, slots, (tokens,), generator=g)
    topk_ids = torch.randint(0, experts, (tokens, top_k), generator=g)
    return g, a, b, ranks, token_slots, topk_ids


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 12),
    experts=st.integers(1, 7),
    top_k=st.integers(1, 3),
    slots=st.integers(1, 4),
    outs=st.sampled_from([(5,), (4, 4), (4, 6)]),
    rank=st.integers(1, 6),
    shared_a=st.booleans(),
    shared_b=st.booleans(),
    per_pair=st.booleans(),
    weighted=st.booleans(),
    mapped=st.booleans(),
)
def test_equals_dense_algebra(
    seed, tokens, experts, top_k, slots, outs, rank, shared_a, shared_b, per_pair, weighted, mapped
):
    g, a, b, ranks, token_slots, topk_ids = _case(
        seed, tokens, experts, top_k, slots, 9, outs, rank, shared_a, shared_b
    )
    expert_map = None
    if mapped:  # every other expert of a model twice as large lives here, in another order
        expert_map = torch.full((2 * experts,), -1)
        expert_map[::2] = torch.randperm(experts, generator=g)
        topk_ids = torch.randint(-1, 2 * experts + 1, (tokens, top_k), generator=g)
    x = torch.randn(tokens * top_k if per_pair else tokens, 9, generator=g)
    weights = torch.rand(tokens, top_k, generator=g) if weighted else None
    y = torch.randn(tokens, top_k, sum(outs), generator=g)
    got = y.clone()
    reference.add_lora(got, x, a, b, ranks, token_slots, topk_ids, weights, expert_map)
    delta = _dense(x, a, b, ranks, token_slots, topk_ids, weights, expert_map)
    torch.testing.assert_close(got.double(), y.double() + delta, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounds_once_and_reads_nothing_past_a_rank(dtype):
    _, a, b, ranks, token_slots, topk_ids = _case(1, 20, 4, 2, 3, 16, (8, 8), 6, False, False)
    a, b = [t.to(dtype) for t in a], [t.to(dtype) for t in b]
    g = torch.Generator().manual_seed(2)
    x = torch.randn(20, 16, generator=g).to(dtype)
    y = torch.randn(20, 2, 16, generator=g).to(dtype)
    want = y.float()
    reference.add_lora(want, x, a, b, ranks, token_slots, topk_ids)
    for i, slot, expert in torch.cartesian_prod(*map(torch.arange, ranks.shape)).tolist():
        a[i][slot, expert, ranks[i, slot, expert] :] = float("nan")
        b[i][slot, expert, :, ranks[i, slot, expert] :] = float("nan")
    reference.add_lora(y, x, a, b, ranks, token_slots, topk_ids)
    assert torch.equal(y, want.to(dtype))


def test_pairs_without_a_factor_keep_their_bits():
    """Base tokens, experts of other ranks and rank 0: even a NaN in them stays as it was."""
    _, a, b, ranks, _, _ = _case(3, 1, 4, 2, 2, 8, (6,), 3, False, False)
    ranks = ranks.clamp(min=1)
    ranks[0, 1, 3] = 0
    token_slots = torch.tensor([-1, 0, 1, 1])
    topk_ids = torch.tensor([[0, 1], [-1, 4], [3, 7], [3, 0]])
    y = torch.full((4, 2, 6), float("nan"))
    y[2] = -0.0  # the sign would go if a zero were added
    y[3, 1] = 1.0
    before = y.clone()
    reference.add_lora(y, torch.ones(4, 8), a, b, ranks, token_slots, topk_ids)
    changed = y.view(torch.int32) != before.view(torch.int32)
    assert changed[3, 1].all()
    assert changed.sum() == 6


def test_one_fused_slice_is_two_that_share_a():
    g, a, b, ranks, token_slots, topk_ids = _case(4, 10, 4, 2, 3, 8, (5, 5), 4, False, True)
    x = torch.randn(10, 8, generator=g)
    two, one = torch.zeros(10, 2, 10), torch.zeros(10, 2, 10)
    both = ranks[:1].expand(2, -1, -1)
    reference.add_lora(two, x, [a[0], a[0]], b, both, token_slots, topk_ids)
    reference.add_lora(one, x, a[:1], [torch.cat(b, 2)], ranks[:1], token_slots, topk_ids)
    assert two.abs().max() > 1
    torch.testing.assert_close(one, two)
