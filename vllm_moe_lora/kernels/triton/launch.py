"""LoRA on one projection of the routed experts: checks the arguments, launches shrink and expand.

Nothing here waits for the GPU, and all memory comes from torch's allocator. So `add_lora` can be
captured in a CUDA graph. The checks then run once, during the capture.
"""

from __future__ import annotations

import torch
import triton

from . import config
from .checks import arch_of, check_ids, check_rows, fail
from .expand import expand_kernel
from .factors import Factors
from .route import Routing
from .shrink import shrink_kernel


def add_lora(
    y: torch.Tensor,
    x: torch.Tensor,
    factors: Factors,
    routing: Routing,
    topk_weights: torch.Tensor | None = None,
    add_inputs: bool = True,
) -> None:
    """Compute y += lora_b (lora_a x) in place, for each token-expert pair with LoRA.

    kernels/reference.py defines the result.

    Args:
        y: [tokens, top_k, out] or [tokens * top_k, out], in the dtype of the factors. out is the
            sum over the slices. A row may be a part of a wider row.
        x: [tokens, in] with one row per token, or [tokens * top_k, in] with one row per pair, in
            the dtype of the factors.
        factors: of this projection.
        routing: of this batch, from `route`, made for the dtype of x.
        topk_weights: [tokens, top_k] float32, bfloat16 or float16, contiguous: router weights to
            multiply each product with. None to multiply with 1.
        add_inputs: if False, store y = lora_b (lora_a x). Columns of a pair without a factor still
            keep what they have.

    Raises:
        TypeError: a wrong dtype or device.
        ValueError: a wrong shape or stride, a row that is not aligned to 16 bytes, or a routing
            that was made for other factors.
    """
    dtype, device = factors.dtype, factors.device
    pairs = routing.num_pairs
    if (routing.num_slots, routing.num_experts) != (factors.num_slots, factors.num_experts):
        fail(
            ValueError,
            "routing",
            f"was made for {routing.num_slots} slots and {routing.num_experts} experts, but the "
            f"factors have {factors.num_slots} and {factors.num_experts}",
        )
    if y.ndim == 3:
        try:
            y = y.view(y.shape[0] * routing.top_k, y.shape[2])
        except RuntimeError:
            fail(ValueError, "y", "is not [tokens, top_k, out] with evenly spaced rows")
    check_rows("y", y, device, dtype, (pairs,), factors.slices * factors.out)
    check_rows("x", x, device, dtype, (routing.tokens, pairs), factors.width)
    if routing.order.device != device:
        fail(TypeError, "routing", f"is on {routing.order.device}, but the factors are on {device}")
    if topk_weights is not None:
        floats = (torch.float32, torch.bfloat16, torch.float16)
        check_ids("topk_weights", topk_weights, device, floats, (routing.tokens, routing.top_k))
    arch = arch_of(device)
    if pairs == 0:
        return

    z = shrink(x, factors, routing)
    tiles = config.tiles_for(arch, dtype, routing.rows, factors.max_rank)
    expand_kernel[
        (routing.tile_segment.numel(), triton.cdiv(factors.out, tiles.block_n), factors.slices)
    ](
        y,
        z,
        *factors.pointers(factors.lora_b),
        factors.ranks,
        z if topk_weights is None else topk_weights,
        *_tables(routing),
        factors.num_experts,
        factors.num_slots * factors.num_experts,
        factors.max_rank // 8,
        factors.out // 8,
        y.stride(0) // 8,
        *factors.strides_b,
        z.stride(0) // 8,
        factors.slices,
        z.shape[0],
        topk_weights is not None,
        add_inputs,
        tiles.tile_rows,
        tiles.block_r,
        tiles.block_n,
        factors.page,
        **config.expand_options(arch, tiles),
    )


def shrink(
    x: torch.Tensor, factors: Factors, routing: Routing, by_pair: bool = False
) -> torch.Tensor:
    """Compute z = lora_a x for each token-expert pair with LoRA.

    Args:
        x: as in `add_lora`. It is not checked here.
        factors: of this projection.
        routing: of this batch.
        by_pair: whether the rows of z are in the order of the pairs, as base.py needs it. If not,
            they are in the order of the routing's tiles.

    Returns:
        [parts, pairs, slices, max_rank] fp32. z is the sum over the parts (see shrink.py). Rows of
        pairs without LoRA and numbers beyond a rank are not written.
    """
    pairs = routing.num_pairs
    parts = config.parts_for(factors.width)
    split = parts > 1 and config.parts_are_programs(pairs)
    z = torch.empty(
        (parts if split else 1, pairs, factors.slices, factors.max_rank),
        dtype=torch.float32,
        device=factors.device,
    )
    arch = arch_of(factors.device)
    tiles = config.tiles_for(arch, factors.dtype, routing.rows, factors.max_rank)
    steps = triton.cdiv(factors.width, tiles.block_k)
    ranks = triton.cdiv(factors.max_rank, tiles.block_r)
    shrink_kernel[(routing.tile_segment.numel(), ranks, z.shape[0])](
        x,
        *factors.pointers(factors.lora_a),
        factors.ranks,
        z,
        *_tables(routing),
        factors.num_experts,
        factors.num_slots * factors.num_experts,
        1 if x.shape[0] == pairs else routing.top_k,
        factors.max_rank // 8,
        factors.width // 8,
        triton.cdiv(steps, parts),
        1 if split else parts,
        x.stride(0) // 8,
        *factors.strides_a,
        z.stride(0) // 8,
        factors.slices,
        by_pair,
        tiles.tile_rows,
        tiles.block_r,
        tiles.block_k,
        factors.page,
        **config.shrink_options(arch, tiles),
    )
    return z


def _tables(routing: Routing) -> tuple[torch.Tensor, ...]:
    """Return the routing's tensors in the order of the kernels' arguments."""
    return routing.order, routing.tile_segment, routing.tile_start, routing.tile_rows
