"""Slots in pages against vLLM's dense stacks, under any order of loads and evictions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_cases import factor_of, steps, written

from vllm_moe_lora.kernels.paged_stack import PAGE_RANKS, Arena, pages_for

SLOTS, EXPERTS, RANK, HIDDEN = 4, 5, 24, 16


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    steps=steps(SLOTS, RANK, 16),
    slices=st.integers(1, 2),
    axis=st.integers(1, 2),
    experts=st.sampled_from([1, EXPERTS]),
    spare=st.integers(1, 12),
    seed=st.integers(0, 10**6),
)
def test_against_dense(steps, slices, axis, experts, spare, seed):
    """Contents, the pages that are taken, and what happens when there are too few."""
    g = torch.Generator().manual_seed(seed)
    shape = (SLOTS, experts, *((RANK, HIDDEN) if axis == 1 else (HIDDEN, RANK)))
    pages = slices * experts * spare
    arena = Arena(shape, slices, axis, torch.float32, "cpu", pages)
    arena.memory.fill_(torch.nan)
    stacks, dense = arena.stacks(), [torch.zeros(shape) for _ in range(slices)]
    places = arena.memory.data_ptr(), arena.table.data_ptr(), [s.used.data_ptr() for s in stacks]
    taken = {}
    for slot, rank, kind in steps:
        for index in range(slices):
            taken.pop((slot, index), None)
            if not rank:
                stacks[index][slot] = dense[index][slot] = 0
                continue
            wide = HIDDEN - 3 if kind == "narrow" else HIDDEN
            factor = factor_of(g, (experts, *((rank, wide) if axis == 1 else (wide, rank))), kind)
            need = pages_for(rank) * {"shared": 1, "zeros": 0}.get(kind, experts)
            if need > pages - sum(taken.values()):
                dense[index][slot] = 0
                with pytest.raises(MemoryError, match=f"needs {need} pages"):
                    written(stacks[index], slot, factor)
                continue
            taken[slot, index] = need
            written(stacks[index], slot, factor)
            written(dense[index], slot, factor)
    assert arena.free_pages == pages - sum(taken.values())
    here = arena.table[arena.table >= 0]
    assert here.unique().numel() == sum(taken.values()), "a page of two factors, or one lost"
    for stack, whole in zip(stacks, dense, strict=True):
        assert stack.shape == whole.shape
        for slot in range(SLOTS):
            assert torch.equal(stack[slot], whole[slot])
            assert torch.equal(stack.used[slot], whole[slot].ne(0).any(3 - axis))
    # A captured graph reads them.
    assert places == (
        arena.memory.data_ptr(), arena.table.data_ptr(), [s.used.data_ptr() for s in stacks]
    )  # fmt: skip
    for stack in stacks:
        for slot in range(SLOTS):
            stack[slot] = 0
    assert arena.free_pages == pages
    assert (arena.table == -1).all()


def test_pages_that_are_not_next_to_each_other():
    """Slots of rank 8 are emptied, every second one; a slot of rank 16 then gets their pages."""
    arena = Arena((6, 2, 16, 8), 1, 1, torch.float32, "cpu", 12)
    (stack,) = arena.stacks()
    for slot in range(6):
        stack.write(slot, torch.full((2, PAGE_RANKS, 8), slot + 1.0))
    for slot in (1, 3):
        stack[slot] = 0
    whole = torch.randn(2, 16, 8)
    stack.write(1, whole)
    assert arena.free_pages == 0
    assert torch.equal(stack[1], whole)
    assert stack.table[1].unique().numel() == 4
    for slot in (0, 2, 4, 5):
        assert (stack[slot][:, :8] == slot + 1).all()


def test_it_looks_like_the_tensor_to_vllm():
    arena = Arena((2, 3, 8, 4), 2, 1, torch.bfloat16, "cpu")
    first, second = arena.stacks()
    assert arena.memory.shape == (2 * 2 * 3, 8, 4)
    assert first.data_ptr() != second.data_ptr()
    assert first[0][2].shape == (8, 4)
    assert first.expand(-1, 3, -1, -1).data_ptr() == first.data_ptr()
    first.write(0, torch.ones(3, 2, 4))
    assert first[0].dtype == torch.bfloat16
    assert first[0, 1, 0].tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="copy_"):
        first[0] = 1
