"""The routing pass as a call: checks that need no device, then one launch or three.

Nothing here waits for the GPU, and what is allocated comes from torch's pool, so a call can be
captured in a CUDA graph; the checks then run once, at capture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from . import config, routing
from .checks import arch_of, check_ids, fail


@dataclass(frozen=True)
class Routing:
    """The pairs of one MoE layer call, ordered by (slot, expert) and cut into tiles.

    Attributes:
        order: [pairs] int32: position -> pair; positions outside the tiles mean nothing.
        tile_segment: [tiles] int32, slot * num_experts + expert, or -1 for no tile.
        tile_start, tile_rows: [tiles] int32, first position and number of rows of each tile.
        rows: the most rows a tile can have.
        tokens, top_k, num_slots, num_experts: sizes of the call.
    """

    order: torch.Tensor
    tile_segment: torch.Tensor
    tile_start: torch.Tensor
    tile_rows: torch.Tensor
    rows: int
    tokens: int
    top_k: int
    num_slots: int
    num_experts: int

    @property
    def num_pairs(self) -> int:
        return self.tokens * self.top_k


def route(
    topk_ids: torch.Tensor,
    token_slots: torch.Tensor,
    num_slots: int,
    num_experts: int,
    dtype: torch.dtype,
    expert_map: torch.Tensor | None = None,
    active: torch.Tensor | None = None,
) -> Routing:
    """One pass over the router's choice, for w13 and w2 alike.

    Args:
        topk_ids: [tokens, top_k] int32 or int64, contiguous.
        token_slots: [tokens] int32 or int64, adapter slot, -1 for a base token. A slot that does
            not exist counts as -1: it cannot be seen here without waiting for the device.
        num_slots: adapter slots of the factors.
        num_experts: experts on this rank.
        dtype: of the activations the routing will be used with.
        expert_map: [experts of the whole model] int32, local expert of each or -1.
        active: [num_slots, num_experts] bool, where any factor has a rank, see
            `factors.active_segments`; pairs of other segments are left out.

    Raises:
        TypeError: wrong dtypes or devices.
        ValueError: wrong shapes, or not contiguous.
    """
    if topk_ids.ndim != 2:
        fail(ValueError, "topk_ids", f"shape {tuple(topk_ids.shape)}, expected [tokens, top_k]")
    tokens, top_k = topk_ids.shape
    device = topk_ids.device
    ints = (torch.int32, torch.int64)
    check_ids("topk_ids", topk_ids, device, ints, (tokens, top_k))
    check_ids("token_slots", token_slots, device, ints, (tokens,))
    if expert_map is not None:
        check_ids("expert_map", expert_map, device, ints, (expert_map.numel(),))
    if active is not None:
        kinds = (torch.bool, torch.uint8, torch.int8)
        check_ids("active", active, device, kinds, (num_slots, num_experts))
    if num_slots < 1 or num_experts < 1:
        fail(ValueError, "num_slots, num_experts", f"{num_slots}, {num_experts}: both at least 1")
    if dtype not in config.DTYPES:
        fail(TypeError, "dtype", f"{dtype}; the kernels compute in {config.DTYPES}")

    num_pairs, num_segments = tokens * top_k, num_slots * num_experts
    if num_segments >= 2**31 or num_pairs >= 2**31:
        fail(ValueError, "topk_ids", "more pairs or segments than 32 bits can number")
    rows = config.tile_rows(arch_of(device), dtype, num_pairs)
    ranked = num_pairs <= config.RANKED_PAIRS
    tiles = num_pairs if ranked else config.max_tiles(num_pairs, num_segments, rows)
    order = torch.empty(num_pairs, dtype=torch.int32, device=device)
    segment, start, length = torch.empty((3, tiles), dtype=torch.int32, device=device)
    table = (segment, start, length)
    result = Routing(order, segment, start, length, rows, tokens, top_k, num_slots, num_experts)
    if num_pairs == 0:
        return result

    ids = (
        topk_ids,
        token_slots,
        topk_ids if expert_map is None else expert_map,
        topk_ids if active is None else active.view(torch.uint8),
    )
    sizes = (
        num_pairs,
        top_k,
        num_slots,
        num_experts,
        0 if expert_map is None else expert_map.numel(),
    )
    has = (expert_map is not None, active is not None)
    if ranked:
        routing.rank_kernel[(triton.cdiv(num_pairs, config.RANK_BLOCK),)](
            *ids,
            order,
            *table,
            *sizes,
            *has,
            rows,
            config.RANK_BLOCK,
            config.RANK_AGAINST,
            num_warps=config.RANK_WARPS,
        )
        return result
    counts = torch.zeros(num_segments, dtype=torch.int32, device=device)
    placed, first_pair, first_tile = torch.empty(
        (3, num_segments), dtype=torch.int32, device=device
    )
    grid = (triton.cdiv(num_pairs, config.COUNT_BLOCK),)
    routing.count_kernel[grid](
        *ids, counts, *sizes, *has, config.COUNT_BLOCK, num_warps=config.COUNT_WARPS
    )
    routing.scan_kernel[(1,)](
        counts,
        placed,
        first_pair,
        first_tile,
        segment,
        num_segments,
        tiles,
        rows,
        config.SCAN_BLOCK,
        num_warps=config.SCAN_WARPS,
    )
    routing.place_kernel[grid](
        *ids,
        counts,
        placed,
        first_pair,
        first_tile,
        order,
        *table,
        *sizes,
        *has,
        rows,
        config.COUNT_BLOCK,
        num_warps=config.COUNT_WARPS,
    )
    return result
