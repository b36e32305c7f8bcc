"""The base's grouped product, with or without LoRA as its tail, as one call.

Nothing here waits for the GPU, and what is allocated comes from torch's pool, so a call can be
captured in a CUDA graph; the checks then run once, at capture.
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
    """Pairs sorted by expert, each expert's filled up to whole blocks; vLLM's own tensors.

    Attributes:
        sorted_ids: [blocks * block_m] int32: pair of each row, the number of pairs or more where
            there is none. None: not sorted, each pair in the first row of its own block.
        expert_ids: [blocks] int32, local expert of each block, -1 for one of another rank; [pairs]
            int32 or int64 without ``sorted_ids``.
        num_padded: [1] int32, rows in use.
        block_m: rows of a block.
    """

    sorted_ids: torch.Tensor | None
    expert_ids: torch.Tensor
    num_padded: torch.Tensor
    block_m: int


@dataclass(frozen=True)
class Lora:
    """What the tail adds.

    Attributes:
        factors: of the projection.
        routing: of this batch, active wherever ``factors`` has a rank.
        token_slots: [tokens], as `route` got them.
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
    """y = W x (+ B A x), for every pair; rows of experts of other ranks are zero.

    Args:
        y: [pairs, out], overwritten, the dtype of x; out is the sum of the slices'.
        x: [pairs // top_k, in], one row a token, or [pairs, in], one row a pair.
        weight: [experts, out, in] of that dtype.
        top_k: pairs of a token.
        topk_weights: [tokens, top_k] any float dtype, to multiply all of it by; or None.
        slices: of W, as many as ``lora`` has.

    Raises:
        TypeError: wrong dtypes or devices.
        ValueError: wrong shapes or strides, rows not aligned to 16 bytes, or no tiles for
            ``order.block_m``.
    """
    device, dtype, pairs = y.device, y.dtype, y.shape[0]
    if dtype not in config.DTYPES:
        fail(TypeError, "y", f"{dtype}; the kernels compute in {config.DTYPES}")
    if weight.ndim != 3 or weight.dtype != dtype or weight.device != device:
        what = f"{weight.dtype} on {weight.device}, {weight.ndim} dimensions"
        fail(TypeError, "weight", f"{what}; y is {dtype} on {device}, W [experts, out, in]")
    if top_k < 1 or pairs % top_k:
        fail(ValueError, "top_k", f"{top_k} does not divide {pairs} pairs")
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
        fail(ValueError, "weight", f"{rows} rows are not {slices} slices of a multiple of 8")
    if lora is not None:
        _check_lora(lora, device, dtype, (experts, slices, rows // slices, width), (tokens, top_k))
    arch = arch_of(device)
    if pairs == 0 or blocks == 0:
        return
    max_rank = 0 if lora is None else lora.factors.max_rank
    tiles = config.base_tiles(arch, dtype, order.block_m)
    if tiles is None:
        fail(ValueError, "order", f"no tiles of {order.block_m} rows for {dtype}")

    # What is not read still needs an address.
    ids = order.num_padded if order.sorted_ids is None else order.sorted_ids
    strides, ranks, slots, z = (0, 0, 0), ids, ids, y
    b, num_slots = (weight, weight), 0
    if lora is not None:
        factors = lora.factors
        z = shrink(x, factors, lora.routing, by_pair=True)
        b, num_slots = (factors.lora_b[0], factors.lora_b[-1]), factors.num_slots
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
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def _check_order(order: Order, device: torch.device, pairs: int) -> int:
    """Blocks to launch."""
    ids, blocks, kinds = order.sorted_ids, order.expert_ids.numel(), (torch.int32,)
    check_ids("num_padded", order.num_padded, device, kinds, (1,))
    if ids is None:  # the router's own, in its dtype
        check_ids("expert_ids", order.expert_ids, device, (*kinds, torch.int64), (pairs,))
        return pairs
    check_ids("expert_ids", order.expert_ids, device, kinds, (blocks,))
    check_ids("sorted_ids", ids, device, kinds, (ids.numel(),))
    if ids.numel() > blocks * order.block_m:
        fail(ValueError, "sorted_ids", f"{ids.numel()} rows in {blocks} blocks of {order.block_m}")
    return ids.numel() // order.block_m  # a block cut short has no row in use


def _check_lora(
    lora: Lora,
    device: torch.device,
    dtype: torch.dtype,
    weight: tuple[int, int, int, int],
    ids: tuple[int, int],
) -> None:
    """``weight``: experts, slices, out of a slice, in; ``ids``: tokens, top_k."""
    factors, routing = lora.factors, lora.routing
    if factors.dtype != dtype or factors.device != device:
        what = f"{factors.dtype} on {factors.device}"
        fail(TypeError, "factors", f"{what}, y is {dtype} on {device}")
    have = factors.num_experts, factors.slices, factors.out, factors.width
    if have != weight:
        fail(ValueError, "factors", f"experts, slices, out, in {have}; the weight's are {weight}")
    if (routing.num_slots, routing.num_experts) != (factors.num_slots, factors.num_experts):
        fail(ValueError, "routing", "made for other factors")
    if (routing.tokens, routing.top_k) != ids or routing.order.device != device:
        fail(ValueError, "routing", f"of {routing.tokens} tokens, y has {ids[0]}")
    kinds = (torch.int32, torch.int64)
    check_ids("token_slots", lora.token_slots, device, kinds, (routing.tokens,))
