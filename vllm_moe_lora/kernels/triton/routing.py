"""Triton kernels for routing: they group the token-expert pairs that use the same LoRA factors.

A pair is a token and one of the experts that the router chose for it. Pairs with the same adapter
slot and the same expert use the same factors. They form a segment, with the number
slot * num_experts + expert. The routing sorts the pairs by segment and cuts each segment into tiles
of at most TILE_ROWS rows. It runs once per MoE layer, for w13 and w2. route.py launches it.

The shrink and expand kernels launch one program per tile. A tile with the segment -1 is empty, and
its program stops at once. So the grid depends on the batch size only, and the launches can be
captured in a CUDA graph.

In a small batch one launch is enough: `rank_kernel` compares each pair with all others. In a larger
batch three launches do a counting sort: `count_kernel`, `scan_kernel`, `place_kernel`. These use
atomic additions of integers. They leave open which row of its segment a pair gets, but no result
depends on that.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton must not compile a variant for special values or alignments of these arguments: one variant
# serves every batch.
_COUNTS = ["num_pairs", "top_k", "num_slots", "num_experts", "map_size"]
_IDS = ["topk_ids", "token_slots", "expert_map", "active"]
_TILES = ["order", "tile_segment", "tile_start", "tile_rows"]
_SEGMENTS = ["counts", "placed", "first_pair", "first_tile"]


@triton.jit
def segment_of(
    pairs,
    topk_ids,
    token_slots,
    expert_map,
    active,
    num_pairs,
    top_k,
    num_slots,
    num_experts,
    map_size,
    HAS_MAP: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
):
    """Return the segment of each pair; num_slots * num_experts for a pair without LoRA.

    Slots, experts and entries of the expert map that do not exist count as "without LoRA".
    """
    inside = pairs < num_pairs
    slot = tl.load(token_slots + pairs // top_k, mask=inside, other=-1).to(tl.int32)
    expert = tl.load(topk_ids + pairs, mask=inside, other=-1).to(tl.int32)
    live = inside & (slot >= 0) & (slot < num_slots) & (expert >= 0)
    if HAS_MAP:
        live = live & (expert < map_size)
        expert = tl.load(expert_map + expert, mask=live, other=-1).to(tl.int32)
        live = live & (expert >= 0)
    live = live & (expert < num_experts)
    segment = slot * num_experts + expert
    if HAS_ACTIVE:
        live = live & (tl.load(active + segment, mask=live, other=0) != 0)
    return tl.where(live, segment, num_slots * num_experts)


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_IDS + _TILES)
def rank_kernel(
    topk_ids,
    token_slots,
    expert_map,
    active,
    order,
    tile_segment,
    tile_start,
    tile_rows,
    num_pairs,
    top_k,
    num_slots,
    num_experts,
    map_size,
    HAS_MAP: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    AGAINST: tl.constexpr,
):
    """Sort a small batch: each pair counts the pairs that come before it.

    The number of a tile is the position of its first pair.
    """
    ids = topk_ids, token_slots, expert_map, active
    counts = num_pairs, top_k, num_slots, num_experts, map_size
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    segment = segment_of(mine, *ids, *counts, HAS_MAP, HAS_ACTIVE)
    before = tl.zeros([BLOCK], tl.int32)  # number of pairs in lower segments
    behind = tl.zeros([BLOCK], tl.int32)  # number of earlier pairs in the same segment
    together = tl.zeros([BLOCK], tl.int32)  # number of all pairs in the same segment
    for first in range(0, num_pairs, AGAINST):
        others = first + tl.arange(0, AGAINST)
        against = segment_of(others, *ids, *counts, HAS_MAP, HAS_ACTIVE)
        # Pairs beyond the end have the highest segment. They are before no other pair, and their
        # own counts are not used.
        lower = against[None, :] < segment[:, None]
        same = against[None, :] == segment[:, None]
        before += tl.sum(lower.to(tl.int32), axis=1)
        behind += tl.sum((same & (others[None, :] < mine[:, None])).to(tl.int32), axis=1)
        together += tl.sum(same.to(tl.int32), axis=1)
    position = before + behind
    inside = mine < num_pairs
    begins = (segment < num_slots * num_experts) & (behind % TILE_ROWS == 0)
    tl.store(order + position, mine, mask=inside)
    tl.store(tile_segment + position, tl.where(begins, segment, -1), mask=inside)
    tl.store(tile_start + position, position, mask=inside)
    tl.store(tile_rows + position, tl.minimum(together - behind, TILE_ROWS), mask=inside)


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=[*_IDS, "counts"])
def count_kernel(
    topk_ids,
    token_slots,
    expert_map,
    active,
    counts,
    num_pairs,
    top_k,
    num_slots,
    num_experts,
    map_size,
    HAS_MAP: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the pairs of each segment; ``counts`` must be zero at first."""
    ids = topk_ids, token_slots, expert_map, active
    sizes = num_pairs, top_k, num_slots, num_experts, map_size
    pairs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    segment = segment_of(pairs, *ids, *sizes, HAS_MAP, HAS_ACTIVE)
    live = segment < num_slots * num_experts
    tl.atomic_add(counts + segment, tl.full([BLOCK], 1, tl.int32), mask=live, sem="relaxed")


@triton.jit(
    do_not_specialize=["num_segments", "num_tiles"],
    do_not_specialize_on_alignment=[*_SEGMENTS, "tile_segment"],
)
def scan_kernel(
    counts,
    placed,
    first_pair,
    first_tile,
    tile_segment,
    num_segments,
    num_tiles,
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute where the pairs and tiles of each segment start. Only one program runs.

    Unused tiles get the segment -1.
    """
    pairs_before = tl.zeros([], tl.int32)
    tiles_before = tl.zeros([], tl.int32)
    for first in range(0, num_segments, BLOCK):
        segments = first + tl.arange(0, BLOCK)
        inside = segments < num_segments
        pairs = tl.load(counts + segments, mask=inside, other=0)
        tiles = (pairs + TILE_ROWS - 1) // TILE_ROWS
        tl.store(first_pair + segments, pairs_before + tl.cumsum(pairs, 0) - pairs, mask=inside)
        tl.store(first_tile + segments, tiles_before + tl.cumsum(tiles, 0) - tiles, mask=inside)
        tl.store(placed + segments, tl.zeros([BLOCK], tl.int32), mask=inside)
        pairs_before += tl.sum(pairs, 0)
        tiles_before += tl.sum(tiles, 0)
    for first in range(0, num_tiles, BLOCK):
        tiles = first + tl.arange(0, BLOCK)
        unused = (tiles >= tiles_before) & (tiles < num_tiles)
        tl.store(tile_segment + tiles, tl.full([BLOCK], -1, tl.int32), mask=unused)


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_IDS + _TILES + _SEGMENTS)
def place_kernel(
    topk_ids,
    token_slots,
    expert_map,
    active,
    counts,
    placed,
    first_pair,
    first_tile,
    order,
    tile_segment,
    tile_start,
    tile_rows,
    num_pairs,
    top_k,
    num_slots,
    num_experts,
    map_size,
    HAS_MAP: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Put each pair with LoRA into its segment. A tile's first pair writes the tile's entry."""
    ids = topk_ids, token_slots, expert_map, active
    sizes = num_pairs, top_k, num_slots, num_experts, map_size
    pairs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    segment = segment_of(pairs, *ids, *sizes, HAS_MAP, HAS_ACTIVE)
    live = segment < num_slots * num_experts
    one = tl.full([BLOCK], 1, tl.int32)
    behind = tl.atomic_add(placed + segment, one, mask=live, sem="relaxed")
    position = tl.load(first_pair + segment, mask=live, other=0) + behind
    tl.store(order + position, pairs, mask=live)
    begins = live & (behind % TILE_ROWS == 0)
    tile = tl.load(first_tile + segment, mask=begins, other=0) + behind // TILE_ROWS
    together = tl.load(counts + segment, mask=begins, other=0)
    tl.store(tile_segment + tile, segment, mask=begins)
    tl.store(tile_start + tile, position, mask=begins)
    tl.store(tile_rows + tile, tl.minimum(together - behind, TILE_ROWS), mask=begins)
