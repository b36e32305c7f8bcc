"""One routing pass for w13 and w2: which pairs share a factor, as tiles of rows.

A pair is one (token, expert choice); its segment is slot * experts + expert. The pass orders the
pairs by segment and cuts every segment into tiles of at most TILE_ROWS rows. Shrink and expand
launch one program a tile; a tile whose segment is -1 has no work and its program stops at once,
so the grid depends on the batch size only and can be captured in a CUDA graph.

Few pairs are ranked against each other, in one launch. More are counted, scanned and placed. The
atomics of that are on integers, and what they leave open, which row of its segment a pair
becomes, is part of no sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

# One compiled variant serves every batch: nothing is specialised on a count or on a view's start.
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
    """Segment of each pair; slots * experts where there is nothing to do. No id is trusted."""
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
    """Few pairs: each is ranked against all. The tile that starts at position p is tile p."""
    ids = topk_ids, token_slots, expert_map, active
    counts = num_pairs, top_k, num_slots, num_experts, map_size
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    segment = segment_of(mine, *ids, *counts, HAS_MAP, HAS_ACTIVE)
    before = tl.zeros([BLOCK], tl.int32)  # pairs of lower segments
    behind = tl.zeros([BLOCK], tl.int32)  # earlier pairs of the same segment
    together = tl.zeros([BLOCK], tl.int32)  # pairs of the same segment
    for first in range(0, num_pairs, AGAINST):
        others = first + tl.arange(0, AGAINST)
        against = segment_of(others, *ids, *counts, HAS_MAP, HAS_ACTIVE)
        # Past the end are pairs of no segment: lower than none, and nobody asks how many they are.
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
    """counts[segment] += its pairs; counts is zero before."""
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
    """One program: where the pairs and tiles of each segment start; tiles left over get -1."""
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
    """Put each live pair into its segment; the pair that begins a tile describes the tile."""
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
