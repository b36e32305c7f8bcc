"""LoRA on experts whose inner dimension a weight format pads.

Tiles of a kernel want the inner dimension in multiples, so weights are padded on each rank: w13
writes [gate, padding, up, padding], w2 reads [act, padding]. Slots are to be as wide, and what
they are given is to lie where the numbers are: a rank's part begins at a multiple of the size
without padding, up where the kernel has it.
"""

from __future__ import annotations

from typing import Any

import torch

MARLIN_TILE = 16  # rows of w2 that lie in one row of its packed form


def inner(wrapper: Any, size: int) -> int:
    """The inner dimension of one rank as the kernel has it.

    Args:
        wrapper: `FusedMoEWithLoRA` from 0.25 on, whose Marlin experts are padded when they are
            loaded, without a word to the layer's config.
        size: what the config says.
    """
    kernel = getattr(wrapper, "_moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    if not any(kind.__name__ == "MarlinExpertsBase" for kind in type(experts).__mro__):
        return size
    packed = wrapper.base_layer.routed_experts.w2_weight
    return max(size, int(packed.shape[1]) * MARLIN_TILE)


def of_rank(wrapper: Any, whole: torch.Tensor, dim: int) -> torch.Tensor:
    """A rank's part of an adapter's factor along its inner dimension, which is ``dim``."""
    size = whole.shape[dim] // wrapper.tp_size
    return whole.narrow(dim, wrapper.tp_rank * size, size)


def of_rank_fused(wrapper: Any, whole: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The same of gate and up in one lora_b [experts, 2 * inner, rank], up where the slot has it.

    Args:
        interleaved: rows alternate between gate and up.
    """
    if interleaved:
        return of_rank(wrapper, whole, 1)
    halves = [of_rank(wrapper, half, 1) for half in whole.chunk(2, 1)]
    gap = wrapper.w13_lora_b_stacked[0].shape[2] // 2 - halves[0].shape[1]
    if gap > 0:
        halves[0] = torch.nn.functional.pad(halves[0], (0, 0, 0, gap))
    return torch.cat(halves, 1)
