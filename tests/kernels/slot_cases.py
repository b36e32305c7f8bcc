"""What tests of slots share: loads and evictions, drawn, and factors as loading stages them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st


def steps(slots, rank, most):
    """Lists of (slot, rank, kind of factor); rank 0 empties the slot."""
    kinds = st.sampled_from(["plain", "shared", "zeros", "narrow", "view"])
    one = st.tuples(st.integers(0, slots - 1), st.integers(0, rank), kinds)
    return st.lists(one, min_size=1, max_size=most)


def written(stack, slot, factor):
    """What vLLM's `set_lora` does with a stack, dense or not."""
    stack[slot] = 0
    stack[slot, :, : factor.shape[1], : factor.shape[2]].copy_(factor, non_blocking=True)


def factor_of(g, shape, kind):
    """A factor as loading stages it: plain, the same for all experts, zeros, or a part of one."""
    if kind == "zeros":
        return torch.zeros(1, 1, 1).expand(shape)
    if kind == "shared":
        return torch.randn(1, *shape[1:], generator=g).expand(shape)
    if kind == "view":
        return torch.randn(shape[0], shape[1] + 2, shape[2] + 1, generator=g)[:, 1:-1, :-1]
    return torch.randn(shape, generator=g)
