"""LoRA on experts whose intermediate size the weight format pads.

Some kernels need an intermediate size that is a multiple of their tile, so vLLM pads the weights on
each rank. The output of w13 is then [gate, padding, up, padding], and w2 reads [activation,
padding]. For LoRA this means:

- the slot buffers must have the padded size (`padded_size`);
- a rank's part of an adapter starts at a multiple of the size without padding (`rank_slice`);
- up's rows of a fused lora_b must start where up starts in the padded output (`rank_slice_fused`).

vLLM has these wrong in some releases; hooks/lora_layers_fused_moe.py says in which.
"""

from __future__ import annotations

from typing import Any

import torch

MARLIN_TILE = 16  # rows of w2 that one row of Marlin's packed format holds


def padded_size(wrapper: Any, size: int) -> int:
    """Return the intermediate size per rank that the experts' kernel really has.

    From vLLM 0.25 on Marlin's weights are padded after they are loaded, and the layer's config
    keeps the size without padding. For Marlin the padded size is read from the packed w2.

    Args:
        wrapper: the `FusedMoEWithLoRA`.
        size: the size in the layer's config; it is returned for other experts.
    """
    kernel = getattr(wrapper, "_moe_kernel", None)
    experts = getattr(kernel, "fused_experts", None)
    if not any(kind.__name__ == "MarlinExpertsBase" for kind in type(experts).__mro__):
        return size
    packed = wrapper.base_layer.routed_experts.w2_weight
    return max(size, int(packed.shape[1]) * MARLIN_TILE)


def rank_slice(wrapper: Any, whole: torch.Tensor, dim: int) -> torch.Tensor:
    """Return this rank's part of an adapter's factor under tensor parallelism.

    Args:
        wrapper: the `FusedMoEWithLoRA`.
        whole: the factor: lora_b of gate or up [experts, intermediate, rank], or lora_a of down
            [experts, rank, intermediate].
        dim: the dimension of the intermediate size.
    """
    size = whole.shape[dim] // wrapper.tp_size
    return whole.narrow(dim, wrapper.tp_rank * size, size)


def rank_slice_fused(wrapper: Any, whole: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Return this rank's part of a fused lora_b of gate and up under tensor parallelism.

    Args:
        wrapper: the `FusedMoEWithLoRA`.
        whole: [experts, 2 * intermediate, rank].
        interleaved: whether rows of gate and up alternate. If not, all of gate comes first.

    Returns:
        [experts, rows, rank]; up's rows start in the middle of the slot buffer's rows.
    """
    if interleaved:
        return rank_slice(wrapper, whole, 1)
    halves = [rank_slice(wrapper, half, 1) for half in whole.chunk(2, 1)]
    gap = wrapper.w13_lora_b_stacked[0].shape[2] // 2 - halves[0].shape[1]
    if gap > 0:
        halves[0] = torch.nn.functional.pad(halves[0], (0, 0, 0, gap))
    return torch.cat(halves, 1)
