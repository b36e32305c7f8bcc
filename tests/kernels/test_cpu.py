"""The CPU shrink and expand against plain loops in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_moe_lora.kernels import cpu, cpu_dense
from vllm_moe_lora.kernels.slot_stack import SlotStack


def _random(*shape, generator):
    return torch.randn(*shape, generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 9),
    top_k=st.integers(1, 3),
    slots=st.integers(1, 4),
    rank=st.integers(1, 9),
    shared=st.booleans(),
    foreign=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_shrink_and_expand(tokens, experts, top_k, slots, rank, shared, foreign, seed):
    """Small batches gather, large ones walk segments; experts of other ranks change nothing."""
    g = torch.Generator().manual_seed(seed)
    token_slots = torch.randint(-1, slots, (tokens,), generator=g)
    # Ids outside [0, experts) belong to experts of another rank.
    low, high = (-1, experts + 2) if foreign else (0, experts)
    topk_ids = torch.randint(low, high, (tokens, top_k), generator=g, dtype=torch.int32)
    x = _random(tokens, 12, generator=g)
    lora_a = _random(slots, 1 if shared else experts, rank, 12, generator=g)
    lora_b = _random(slots, 1 if shared else experts, 7, rank, generator=g)
    plan = cpu.make_plan(token_slots, topk_ids, experts)
    if not (token_slots >= 0).any():
        assert plan is None
        return
    assert plan.rows.tolist() == (token_slots >= 0).nonzero().flatten().tolist()
    pairs = x[plan.tokens()]
    y = torch.full((len(plan), 9), float("nan"))
    y[:, :7] = 1.0  # a strided view of wider, poisoned rows
    ranks = [int(r) for r in torch.randint(1, rank + 1, (slots,), generator=g)]
    for slot, own in enumerate(ranks):
        lora_a[slot, :, own:] = 0
    stacks = SlotStack.of(lora_a, ranks, 1), SlotStack.of(lora_b, ranks, 2)
    z = cpu.shrink(pairs, stacks[0], plan, max(ranks))
    cpu.expand_add(y[:, :7], z, stacks[1], plan)
    here = (topk_ids[plan.rows] >= 0) & (topk_ids[plan.rows] < experts)
    assert torch.equal(plan.by_token(plan.tokens()), plan.rows[:, None] * here)
    covered = [i for _, start, stop in plan.expert_slices() for i in range(start, stop)]
    assert covered == list(range(len(plan)))
    y = plan.by_token(y)
    for i, row in enumerate(plan.rows.tolist()):
        for k in range(top_k):
            expert, slot = int(topk_ids[row, k]), int(token_slots[row])
            local = 0 <= expert < experts
            want = torch.full((7,), float(local), dtype=torch.float64)
            if local:
                e = 0 if shared else expert
                a, b = lora_a[slot, e].double(), lora_b[slot, e].double()
                want += b @ (a @ x[row].double())
            got = y[i, k, :7].double()
            assert torch.allclose(got, want, atol=1e-4), (row, k)


@pytest.mark.parametrize("slots", [[-1, -1], [2, 2], [0, -1], [1, 0], [-1, 2, -1, 0, 2]])
def test_dense_leaves_base_rows_alone(slots):
    """Upstream gives rows with slot -1 the last slot's adapter; here they keep their bits."""
    g = torch.Generator().manual_seed(0)
    token_slots = torch.tensor(slots)
    x, y = _random(len(slots), 6, generator=g), _random(len(slots), 9, generator=g)
    a = tuple(_random(3, 1, 2, 6, generator=g) for _ in range(2))
    b = tuple(_random(3, 1, width, 2, generator=g) for width in (4, 5))
    got = y.clone()
    cpu_dense.add_lora(got, x, a, b, cpu_dense.row_segments(token_slots), 0.5, (4, 5))
    for i, slot in enumerate(slots):
        if slot < 0:
            assert torch.equal(got[i], y[i])
            continue
        delta = torch.cat([0.5 * (b[s][slot, 0] @ (a[s][slot, 0] @ x[i])) for s in range(2)])
        assert torch.allclose(got[i], y[i] + delta, atol=1e-5)


def test_embedding_expand():
    g = torch.Generator().manual_seed(0)
    y, z, b = (_random(*s, generator=g) for s in ((3, 5), (3, 2), (2, 1, 5, 2)))
    got = y.clone()
    cpu_dense.add_expanded(got, z, b, cpu_dense.row_segments(torch.tensor([1, -1, 0])))
    assert torch.equal(got[1], y[1])
    assert torch.allclose(got[0], y[0] + b[1, 0] @ z[0], atol=1e-6)
    assert torch.allclose(got[2], y[2] + b[0, 0] @ z[2], atol=1e-6)
