"""The base experts' grouped GEMM with LoRA fused into its end: checks, then launches base.py.

layers/gpu/base_product.py calls `grouped_product` with VLLM_MOE_LORA_KERNELS=tail, in place of
vLLM's own kernel.

Nothing here waits for the GPU, and all memory comes from torch's allocator. So a call can be
captured in a CUDA graph. The checks then run once, during the capture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from . import config
from .base import base_kernel
from .checks import arch_of, check_aligned, check_ids, check_rows, fail
from .factors import Factors
from .launch import shrink
from .route import Routing


@dataclass(frozen=True)
class Order:
    """The order of the token-expert pairs in the GEMM: vLLM's tensors, from `moe_align_block_size`.

    Pairs are sorted by expert. The rows of each expert are padded to whole blocks, so that all rows
    of a block use the same weight.

    Attributes:
        sorted_ids: [blocks * block_m] int32, the pair of each row. A padding row has the number of
            pairs or more. None for a small batch, which is not sorted: each pair is then the first
            row of a block of its own.
        expert_ids: [blocks] int32, the local expert of each block; -1 if it lives on another
            device. Without ``sorted_ids``: [pairs] int32 or int64.
        num_padded: [1] int32, the number of rows in use, padding included.
        block_m: rows per block.
    """

    sorted_ids: torch.Tensor | None
    expert_ids: torch.Tensor
    num_padded: torch.Tensor
    block_m: int


@dataclass(frozen=True)
class Lora:
    """The LoRA that the GEMM adds.

    Attributes:
        factors: of this projection.
        routing: of this batch. It must contain all pairs for which ``factors`` has a rank.
        token_slots: [tokens] int32 or int64, the tensor that `route` got.
    """

    factors: Factors
    routing: Routing
    token_slots: torch.Tensor


def grouped_product(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    order: Order,
    top_k: int,
    topk_weights: torch.Tensor | None = None,
    lora: Lora | None = None,
    slices: int = 1,
) -> None:
    """Compute y = W x, or y = W x + lora_b (lora_a x), for each token-expert pair.

    Args:
        y: [pairs, out], is overwritten. out is the sum over the slices. Rows of experts on other
            devices become zero.
        x: [tokens, in] with one row per token, or [pairs, in] with one row per pair, in y's dtype.
        weight: [experts, out, in] in y's dtype, the base weights W.
        order: the pairs, sorted by expert.
        top_k: pairs per token.
        topk_weights: [tokens, top_k] float32, bfloat16 or float16: router weights to multiply the
            whole result with. None to multiply with 1.
        lora: what to add; None for the base experts alone.
        slices: how many slices W and ``lora`` have: two for gate and up, else one.

    Raises:
        TypeError: a wrong dtype or device.
        ValueError: a wrong shape or stride, a row that is not aligned to 16 bytes, or a
            ``order.block_m`` for which config.py has no tiles.
    """
    device, dtype, pairs = y.device, y.dtype, y.shape[0]
    if dtype not in config.DTYPES:
        fail(TypeError, "y", f"is {dtype}, expected one of {config.DTYPES}")
    if weight.ndim != 3 or weight.dtype != dtype or weight.device != device:
        found = f"{weight.dtype} on {weight.device} with {weight.ndim} dimensions"
        wanted = f"{dtype} on {device} (as y), [experts, out, in]"
        fail(TypeError, "weight", f"is {found}, expected {wanted}")
    if top_k < 1 or pairs % top_k:
        fail(ValueError, "top_k", f"is {top_k}, which does not divide {pairs} pairs")
    experts, rows, width = weight.shape
    tokens = pairs // top_k
    check_aligned("weight", weight)
    check_rows("y", y, device, dtype, (pairs,), rows)
    check_rows("x", x, device, dtype, (tokens, pairs), width)
    blocks = _check_order(order, device, pairs)
    if topk_weights is not None:
        floats = (torch.float32, torch.bfloat16, torch.float16)
        check_ids("topk_weights", topk_weights, device, floats, (tokens, top_k))
    if rows % (8 * slices):
        fail(
            ValueError,
            "weight",
            f"has {rows} rows, which are not {slices} slices of a multiple of 8 rows",
        )
    if lora is not None:
        _check_lora(lora, device, dtype, (experts, slices, rows // slices, width), (tokens, top_k))
    arch = arch_of(device)
    if pairs == 0 or blocks == 0:
        return
    max_rank = 0 if lora is None else lora.factors.max_rank
    tiles = config.base_tiles(arch, dtype, order.block_m)
    if tiles is None:
        why = f"has blocks of {order.block_m} rows, for which there are no tiles in {dtype}"
        fail(ValueError, "order", why)

    # Arguments that the kernel does not read still need some tensor.
    ids = order.num_padded if order.sorted_ids is None else order.sorted_ids
    strides, ranks, slots, z = (0, 0, 0), ids, ids, y
    b, num_slots, page = (weight, weight, ids, ids), 0, 0
    if lora is not None:
        factors = lora.factors
        z = shrink(x, factors, lora.routing, by_pair=True)
        b, num_slots, page = factors.pointers(factors.lora_b), factors.num_slots, factors.page
        strides, ranks, slots = factors.strides_b, factors.ranks, lora.token_slots
    column_blocks = triton.cdiv(rows // slices, tiles.block_n) * slices
    base_kernel[(blocks * column_blocks,)](
        x,
        weight,
        y,
        z,
        *b,
        ranks,
        slots,
        y if topk_weights is None else topk_weights,
        ids,
        order.expert_ids,
        order.num_padded,
        blocks,
        pairs,
        top_k,
        1 if x.shape[0] == pairs else top_k,
        num_slots,
        experts,
        width // 8,
        rows // slices // 8,
        max_rank // 8,
        x.stride(0) // 8,
        weight.stride(0) // 8,
        weight.stride(1) // 8,
        y.stride(0) // 8,
        *strides,
        z.stride(0) // 8,
        slices,
        1 if lora is None else z.shape[0],
        order.sorted_ids is not None,
        lora is not None,
        topk_weights is not None,
        width % tiles.block_k == 0,
        order.block_m,
        tiles.block_n,
        tiles.block_k,
        tiles.group_m,
        tiles.block_r,
        page,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _check_order(order: Order, device: torch.device, pairs: int) -> int:
    """Check the order's tensors and return the number of row blocks to launch."""
    ids, blocks, kinds = order.sorted_ids, order.expert_ids.numel(), (torch.int32,)
    check_ids("num_padded", order.num_padded, device, kinds, (1,))
    if ids is None:  # expert_ids are the router's topk_ids, in their dtype
        check_ids("expert_ids", order.expert_ids, device, (*kinds, torch.int64), (pairs,))
        return pairs
    check_ids("expert_ids", order.expert_ids, device, kinds, (blocks,))
    check_ids("sorted_ids", ids, device, kinds, (ids.numel(),))
    if ids.numel() > blocks * order.block_m:
        fail(
            ValueError,
            "sorted_ids",
            f"has {ids.numel()} rows, more than {blocks} blocks of {order.block_m}",
        )
    return ids.numel() // order.block_m  # no row of an incomplete last block is in use


def _check_lora(
    lora: Lora,
    device: torch.device,
    dtype: torch.dtype,
    weight: tuple[int, int, int, int],
    ids: tuple[int, int],
) -> None:
    """Check ``lora`` against the base weight and the batch.

    Args:
        weight: (experts, slices, out of a slice, in).
        ids: (tokens, top_k).
    """
    factors, routing = lora.factors, lora.routing
    if factors.dtype != dtype or factors.device != device:
        found = f"{factors.dtype} on {factors.device}"
        fail(TypeError, "factors", f"are {found}, but y is {dtype} on {device}")
    have = factors.num_experts, factors.slices, factors.out, factors.width
    if have != weight:
        fail(
            ValueError,
            "factors",
            f"have (experts, slices, out, in) = {have}, but the weight has {weight}",
        )
    if (routing.num_slots, routing.num_experts) != (factors.num_slots, factors.num_experts):
        fail(ValueError, "routing", "was made for other factors")
    if (routing.tokens, routing.top_k) != ids or routing.order.device != device:
        fail(
            ValueError,
            "routing",
            f"is for {routing.tokens} tokens * {routing.top_k} on {routing.order.device}, but y "
            f"has {ids[0]} * {ids[1]} on {device}",
        )
    kinds = (torch.int32, torch.int64)
    check_ids("token_slots", lora.token_slots, device, kinds, (routing.tokens,))
