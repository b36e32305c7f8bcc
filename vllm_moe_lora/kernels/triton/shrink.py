"""Triton kernel "shrink": z = A x in fp32, for the token-expert pairs of each tile.

A is lora_a. One program computes all slices of a projection, so x is read once. launch.py calls it.

The sum over the width of x is split into parts (split-K), which are added in order. The number of
parts depends on the layer's shape only. In a small batch each part is a program of its own, and
expand.py adds them. In a large batch one program computes all parts. Both give the same bits, so a
request gets the same result alone and in a batch.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Names ending in "8" count groups of 8 elements, for widths and strides. A group has at least 16
# bytes, so the compiler knows that every row is aligned and loads weights 16 bytes at a time.
# Triton must not compile a variant for special values of these arguments: one serves every batch.
_COUNTS = [
    "num_experts",
    "num_segments",
    "pairs_per_row",
    "max_rank8",
    "width8",
    "part_steps",
    "parts_here",
    "stride_x8",
    "stride_slot8",
    "stride_expert8",
    "stride_rank8",
    "stride_part8",
]
_TABLES = ["ranks", "pages0", "pages1", "order", "tile_segment", "tile_start", "tile_rows"]


@triton.jit
def paged_rows(pages, ranks, rank, width, PAGE: tl.constexpr):
    """Return where the rows of ``ranks`` of a factor begin, int64.

    ``pages`` points to the factor's entries of the page table (kernels/paged_stack.py), and
    ``width`` is the length of a row. Ranks of ``rank`` and more have no meaning.
    """
    page = tl.load(pages + ranks // PAGE, mask=ranks < rank, other=0).to(tl.int64)
    return (page * PAGE + ranks % PAGE) * width


@triton.jit
def _step(x, a, acc, ranks, places, columns, width, rank):
    """Return acc + x a^T for one block of columns. ``places`` are where rows of a begin."""
    tile = tl.load(
        a + places[None, :] + columns[:, None],
        mask=(ranks < rank)[None, :] & (columns < width)[:, None],
        other=0.0,
    )
    return tl.dot(x, tile, acc, input_precision="ieee")


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_TABLES)
def shrink_kernel(
    x,
    a0,
    a1,
    pages0,
    pages1,
    ranks,
    z,
    order,
    tile_segment,
    tile_start,
    tile_rows,
    num_experts,
    num_segments,
    pairs_per_row,
    max_rank8,
    width8,
    part_steps,
    parts_here,
    stride_x8,
    stride_slot8,
    stride_expert8,
    stride_rank8,
    stride_part8,
    SLICES: tl.constexpr,
    BY_PAIR: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAGE: tl.constexpr = 0,
):
    """One program computes one tile of pairs, BLOCK_R ranks and ``parts_here`` parts of the sum.

    Shapes:
        x [rows, width], one row per token or per pair
        a0, a1 [slots, experts or 1, max_rank, width], lora_a of each slice; with PAGE, which is the
            number of ranks of a page, both are the arena [pages, PAGE, width]
        pages0, pages1 [slots, experts or 1, pages] int32, the page table of each slice; only with
            PAGE. stride_slot8 and stride_expert8 are then its strides, in entries
        ranks [SLICES, slots, experts] int32
        z [parts, pairs, SLICES, max_rank] fp32, with rows in the order of the tiles; with BY_PAIR
            in the order of the pairs
        order, tile_segment, tile_start, tile_rows: from routing.py
    """
    tile = tl.program_id(0)
    segment = tl.load(tile_segment + tile)
    if segment < 0:
        return
    first_rank = tl.program_id(1) * BLOCK_R
    max_rank = max_rank8 * 8
    rank0 = tl.minimum(tl.load(ranks + segment), max_rank)
    rank1 = 0
    if SLICES == 2:
        rank1 = tl.minimum(tl.load(ranks + num_segments + segment), max_rank)
    if first_rank >= tl.maximum(rank0, rank1):
        return

    start = tl.load(tile_start + tile).to(tl.int64)
    row = tl.arange(0, TILE_ROWS)
    live = row < tl.load(tile_rows + tile)
    pair = tl.load(order + start + row, mask=live, other=0)
    x += (pair // pairs_per_row).to(tl.int64)[:, None] * stride_x8 * 8
    slot = (segment // num_experts).to(tl.int64)
    expert = (segment % num_experts).to(tl.int64)
    r = first_rank + tl.arange(0, BLOCK_R)
    width = width8 * 8
    factor = slot * stride_slot8 + expert * stride_expert8
    if PAGE > 0:
        places0 = paged_rows(pages0 + factor, r, rank0, width, PAGE)
        places1 = places0
        if SLICES == 2:
            places1 = paged_rows(pages1 + factor, r, rank1, width, PAGE)
    else:
        a0 += factor * 8
        a1 += factor * 8
        places0 = r * (stride_rank8 * 8)
        places1 = places0
    steps = (width + BLOCK_K - 1) // BLOCK_K
    part = tl.program_id(2) * parts_here
    z += part.to(tl.int64) * stride_part8 * 8

    sum0 = tl.zeros([TILE_ROWS, BLOCK_R], tl.float32)
    sum1 = tl.zeros([TILE_ROWS, BLOCK_R], tl.float32)
    for p in range(part, part + parts_here):
        acc0 = tl.zeros([TILE_ROWS, BLOCK_R], tl.float32)
        acc1 = tl.zeros([TILE_ROWS, BLOCK_R], tl.float32)
        for step in range(p * part_steps, tl.minimum((p + 1) * part_steps, steps)):
            columns = step * BLOCK_K + tl.arange(0, BLOCK_K)
            inside = live[:, None] & (columns < width)[None, :]
            rows = tl.load(x + columns[None, :], mask=inside, other=0.0)
            acc0 = _step(rows, a0, acc0, r, places0, columns, width, rank0)
            if SLICES == 2:
                acc1 = _step(rows, a1, acc1, r, places1, columns, width, rank1)
        sum0 += acc0
        sum1 += acc1

    place = start + row
    if BY_PAIR:
        place = pair.to(tl.int64)
    z += place[:, None] * (SLICES * max_rank) + r[None, :]
    tl.store(z, sum0, mask=live[:, None] & (r < rank0)[None, :])
    if SLICES == 2:
        tl.store(z + max_rank, sum1, mask=live[:, None] & (r < rank1)[None, :])
