"""Slots at the adapters' own rank against vLLM's dense stacks, under any order of loads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_cases import factor_of, steps, written

from vllm_moe_lora.kernels.native import pairs
from vllm_moe_lora.kernels.slot_stack import SlotStack

SLOTS, EXPERTS, RANK, HIDDEN = 4, 5, 16, 24


def _dense(stack, rank_axis):
    """The same factors in one tensor, [slots, experts, max rank, in], as vLLM has them."""
    whole = torch.zeros(stack.shape, dtype=stack.dtype)
    for slot in range(SLOTS):
        own = stack[slot]
        whole[slot].narrow(rank_axis, 0, own.shape[rank_axis])[:] = own
    return whole


@settings(max_examples=60, deadline=None, derandomize=True)
@given(steps=steps(SLOTS, RANK, 12), seed=st.integers(0, 10**6))
def test_against_dense(steps, seed):
    """Loads, evictions and replacements: contents, bytes, and the bits that kernels compute."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(SLOTS, EXPERTS, RANK, HIDDEN)] * 2 + [(SLOTS, EXPERTS, HIDDEN, RANK)]
    stacks = [SlotStack(s, torch.float32, 1 + (i == 2)) for i, s in enumerate(shapes)]
    dense = [torch.zeros(s) for s in shapes]
    ranks, sizes = [0] * SLOTS, [0] * SLOTS
    for slot, rank, kind in steps:
        ranks[slot], sizes[slot] = rank, 0
        for i, (stack, whole) in enumerate(zip(stacks, dense, strict=True)):
            if not rank:
                stack[slot] = 0
                whole[slot] = 0
                continue
            wide = HIDDEN - 3 if kind == "narrow" else HIDDEN
            shape = (EXPERTS, rank, wide) if i < 2 else (EXPERTS, wide, rank)
            factor = factor_of(g, shape, kind)
            written(stack, slot, factor)
            written(whole, slot, factor)
            experts = 1 if kind in ("shared", "zeros") else EXPERTS
            if kind == "zeros" and i == 2 and rank == 1:
                sizes[slot] += 4  # a view of one number: the last axis is of one element
                continue
            sizes[slot] += 4 * experts * rank * HIDDEN
            if kind in ("plain", "shared", "view"):  # not copied
                assert stack[slot].data_ptr() == factor.data_ptr()
    assert sum(stack.nbytes for stack in stacks) == sum(sizes)
    for i, (stack, whole) in enumerate(zip(stacks, dense, strict=True)):
        assert torch.equal(_dense(stack, 1 + (i == 2)), whole)
        assert stack.shape == whole.shape
        assert stack.highest_rank == max(ranks)
    if any(ranks):
        _same_bits(g, ranks, stacks, dense)


def _same_bits(g, ranks, stacks, dense):
    tokens, top_k = 20, 2
    slots = torch.randint(-1, SLOTS, (tokens,), generator=g)
    ids = torch.stack([torch.randperm(EXPERTS, generator=g)[:top_k] for _ in range(tokens)])
    x = torch.randn(tokens, HIDDEN, generator=g)
    found = pairs.make_pairs(slots, torch.tensor(ranks), ids, EXPERTS)
    if found is None:
        pytest.skip("numba makes no kernels here")
    first = [2 * sum(ranks[:slot]) for slot in range(SLOTS)]
    second = [sum(ranks[:slot]) for slot in range(SLOTS)]
    answers = []
    for given_ in (stacks, [_views(w, 1 + (i == 2)) for i, w in enumerate(dense)]):
        wide = torch.full((len(found), HIDDEN + 2 * sum(ranks)), torch.nan)
        assert found.before(x, wide, first, given_[:2])
        base, out = wide[:, : HIDDEN + sum(ranks)].sin(), torch.zeros_like(x)
        assert found.after(base, out, second, given_[2], max(ranks), None)
        _, segments = found.sorted()
        y = torch.ones(sum(stop - start for *_, start, stop in segments), HIDDEN)
        x2 = torch.cos(torch.arange(y.numel()).view_as(y).float())
        own = pairs.dense_segments(segments, SLOTS)
        assert pairs.ExpertLora().add(y, x2, given_[:1], given_[2:], own)
        answers.append((wide, out, y))
    for own, whole in zip(*answers, strict=True):
        assert torch.equal(own, whole)


def _views(whole, rank_axis):
    """A dense stack as the kernels take it: each slot has the whole rank, and is not copied."""
    made = SlotStack(whole.shape, whole.dtype, rank_axis)
    for slot in range(SLOTS):
        made.write(slot, whole[slot])
    return made


def test_ranks_of_one_slot_become_the_same():
    stack = SlotStack((2, 3, 8, 4), torch.float32, 1)
    for factor in (torch.ones(3, 2, 4), torch.ones(1, 2, 4).expand(3, 2, 4)):
        stack.write(0, factor)
        stack.set_rank(0, 5)
        assert stack[0].shape == (3, 5, 4)
        assert torch.equal(stack[0][:, :2], factor)
        assert not stack[0][:, 2:].any()
    assert stack.nbytes == 5 * 4 * 4  # all experts share it
    stack.write(1, torch.ones(3, 2, 4, dtype=torch.float64))
    assert stack[1].dtype == torch.float32
    with pytest.raises(ValueError, match="copy_"):
        stack[0] = 1
