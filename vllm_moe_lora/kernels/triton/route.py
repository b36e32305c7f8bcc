"""Routing for one call of a MoE layer: checks the arguments and launches the kernels of routing.py.

Nothing here waits for the GPU, and all memory comes from torch's allocator. So `route` can be
captured in a CUDA graph. The checks then run once, during the capture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from . import config, routing
from .checks import arch_of, check_ids, fail


@dataclass(frozen=True)
class Routing:
    """The token-expert pairs of one call of a MoE layer, sorted by (slot, expert), in tiles.

    routing.py explains segments and tiles.

    Attributes:
        order: [pairs] int32, the pair at each position of the sorted order. Positions that belong
            to no tile have no meaning.
        tile_segment: [tiles] int32, the segment slot * num_experts + expert of each tile; -1 for
            an empty tile.
        tile_start, tile_rows: [tiles] int32, the first position and the number of rows of each
            tile.
        rows: the most rows that a tile can have.
        tokens, top_k, num_slots, num_experts: the sizes of the call.
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
        """The number of token-expert pairs, with and without LoRA."""
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
    """Sort the token-expert pairs of a batch by (slot, expert). w13 and w2 use the same routing.

    Args:
        topk_ids: [tokens, top_k] int32 or int64, contiguous: the expert of each pair.
        token_slots: [tokens] int32 or int64: the adapter slot of each token, -1 for a base token. A
            slot that does not exist counts as -1; it is no error, because finding it would mean to
            wait for the device.
        num_slots: the number of adapter slots of the factors.
        num_experts: the number of experts on this device.
        dtype: of the activations. The number of rows per tile depends on it.
        expert_map: [experts of the whole model] int32 or int64, the local index of each expert; -1
            if it lives on another device. None if ``topk_ids`` are local indices.
        active: [num_slots, num_experts] bool, from `factors.active_segments`: which segments have
            LoRA at all. Pairs of the others are left out. None if all segments may have LoRA.

    Raises:
        TypeError: a wrong dtype or device.
        ValueError: a wrong shape, a tensor that is not contiguous, or too many pairs or segments.
    """
    if topk_ids.ndim != 2:
        fail(ValueError, "topk_ids", f"has shape {tuple(topk_ids.shape)}, expected [tokens, top_k]")
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
        fail(
            ValueError,
            "num_slots and num_experts",
            f"are {num_slots} and {num_experts}, but must be at least 1",
        )
    if dtype not in config.DTYPES:
        fail(TypeError, "dtype", f"is {dtype}, expected one of {config.DTYPES}")

    num_pairs, num_segments = tokens * top_k, num_slots * num_experts
    if num_segments >= 2**31 or num_pairs >= 2**31:
        fail(
            ValueError,
            "topk_ids",
            f"has {num_pairs} pairs, and there are {num_segments} segments (slots * experts); the "
            "kernels number both with 32 bits",
        )
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
