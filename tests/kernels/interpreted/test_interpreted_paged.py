"""The kernels on factors in pages, against the same kernels on dense stacks: to the bit."""

from __future__ import annotations

import base_cases
import lora_cases as cases
import paged_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_interpreted_numbers import KINDS, SHARED, bits, run

from vllm_moe_lora.kernels.paged_stack import Arena
from vllm_moe_lora.kernels.triton import config
from vllm_moe_lora.kernels.triton.factors import Factors

WIDTHS = {
    "width": st.integers(1, 24).map(lambda n: 8 * n),
    "out": st.integers(1, 24).map(lambda n: 8 * n),
    "max_rank": st.integers(1, 16).map(lambda n: 8 * n),
}


@settings(max_examples=cases.examples(16), deadline=None, derandomize=True)
@given(
    shape=cases.shapes(segments=4),
    dtype=st.sampled_from(config.DTYPES),
    kind=st.sampled_from(list(KINDS)),
    shared=st.sampled_from(SHARED),
    many=st.booleans(),
    **WIDTHS,
)
def test_shrink_and_expand(shape, dtype, kind, shared, many, width, out, max_rank):
    slices, per_pair, weighted = KINDS[kind]
    case = cases.make(
        shape, dtype, width, out, max_rank, slices, per_pair, weighted, shared
    )  # fmt: skip
    with cases.limits(few=0 if many else 10**6):
        dense = run(case, shape.experts)
        paged = run(paged_cases.paged(case, shape.seed), shape.experts)
    assert torch.equal(bits(dense), bits(paged))


SMALL = cases.Shape(7, 9, 5, 2, 3, 3, 5, 9)


@pytest.mark.parametrize("dtype", config.DTYPES, ids=str)
@pytest.mark.parametrize("is_sorted", [True, False])
def test_tail(dtype, is_sorted):
    """72 columns: the last block is not full. Rank 40: more than one step, and not all of one."""
    base = base_cases.make(SMALL, dtype, 72, 72, 40, slices=2)
    with cases.poisoned():
        dense = base.run(16, is_sorted=is_sorted)
        base.case = paged_cases.paged(base.case, 3)
        paged = base.run(16, is_sorted=is_sorted)
        plain = base.run(16, is_sorted=is_sorted, lora=False)
    assert torch.equal(bits(dense), bits(paged))
    assert not torch.equal(bits(dense), bits(plain))


def test_found_ranks_are_those_of_dense_stacks():
    case = cases.make(SMALL, torch.float32, 24, 16, 24, 2)
    for stack, axis in [(s, 2) for s in case.lora_a] + [(s, 3) for s in case.lora_b]:
        stack.copy_(torch.randn(stack.shape))
        stack.narrow(axis, 13, 5).zero_()
    case.lora_a[0][1, 2] = 0
    case.lora_b[1][2, 3].narrow(1, 5, 19).zero_()
    case.ranks.fill_(24)
    found = []
    for one in (case, paged_cases.paged(case, 5)):
        factors = Factors(one.lora_a, one.lora_b, SMALL.experts)
        for slot in range(SMALL.slots):
            factors.find_ranks(slot)
        found.append(factors.ranks)
    assert torch.equal(*found)
    assert found[0].unique().tolist() == [0, 5, 24]


def test_pages_and_tensors_do_not_mix():
    case = cases.make(SMALL, torch.float32, 24, 16, 8, 2)
    paged = paged_cases.paged(case, 5)
    with pytest.raises(TypeError, match="in pages for one of lora_a and lora_b only"):
        Factors(paged.lora_a, case.lora_b, SMALL.experts)
    with pytest.raises(TypeError, match="is a tensor, but other factors are in pages"):
        Factors([paged.lora_a[0], case.lora_a[1]], paged.lora_b, SMALL.experts)
    other = Arena(case.lora_a[0].shape, 1, 1, torch.float32, "cpu").stacks()
    with pytest.raises(TypeError, match="do not share their pages"):
        Factors([paged.lora_a[0], other[0]], paged.lora_b, SMALL.experts)
