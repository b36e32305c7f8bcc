"""Triton kernel "expand": y += B z in place, for the token-expert pairs of each tile.

B is lora_b, and z = lora_a x comes from shrink.py. The product can be multiplied by the router
weight. With ADDED=False the kernel stores y = B z instead. launch.py calls it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .shrink import paged_rows

_COUNTS = [
    "num_experts",
    "num_segments",
    "max_rank8",
    "out8",
    "stride_y8",
    "stride_slot8",
    "stride_expert8",
    "stride_out8",
    "stride_part8",
]
_TABLES = ["ranks", "pages0", "pages1", "order", "tile_segment", "tile_start", "tile_rows"]
_TABLES += ["topk_weights"]


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_TABLES)
def expand_kernel(
    y,
    z,
    b0,
    b1,
    pages0,
    pages1,
    ranks,
    topk_weights,
    order,
    tile_segment,
    tile_start,
    tile_rows,
    num_experts,
    num_segments,
    max_rank8,
    out8,
    stride_y8,
    stride_slot8,
    stride_expert8,
    stride_out8,
    stride_part8,
    SLICES: tl.constexpr,
    PARTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr = 0,
):
    """One program computes one tile of pairs and BLOCK_N columns of one slice.

    Shapes:
        y [pairs, SLICES * out]
        z [PARTS, pairs, SLICES, max_rank] fp32, with rows in the order of the tiles
        b0, b1 [slots, experts or 1, out, max_rank], lora_b of each slice; with PAGE, which is the
            number of ranks of a page, both are the arena [pages, PAGE, out]
        pages0, pages1 [slots, experts or 1, pages] int32, the page table of each slice; only with
            PAGE. stride_slot8 and stride_expert8 are then its strides, in entries
        ranks [SLICES, slots, experts] int32
        topk_weights [pairs]
        order, tile_segment, tile_start, tile_rows: from routing.py

    Names ending in "8" count groups of 8 elements (see shrink.py).
    """
    tile = tl.program_id(0)
    segment = tl.load(tile_segment + tile)
    if segment < 0:
        return
    slice_id = tl.program_id(2)
    max_rank = max_rank8 * 8
    rank = tl.minimum(tl.load(ranks + slice_id * num_segments + segment), max_rank)
    if rank <= 0:
        return

    start = tl.load(tile_start + tile).to(tl.int64)
    row = tl.arange(0, TILE_ROWS)
    live = row < tl.load(tile_rows + tile)
    pair = tl.load(order + start + row, mask=live, other=0).to(tl.int64)
    out = out8 * 8
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < out
    y += pair[:, None] * stride_y8 * 8 + (slice_id * out + column)[None, :]
    touched = live[:, None] & inside[None, :]
    if ADDED:
        old = tl.load(y, mask=touched, other=0.0)

    slot = (segment // num_experts).to(tl.int64)
    expert = (segment % num_experts).to(tl.int64)
    factor = slot * stride_slot8 + expert * stride_expert8
    b = b0
    pages = pages0
    if SLICES == 2 and slice_id == 1:
        b = b1
        pages = pages1
    if PAGE > 0:
        b += column[None, :]
    else:
        b += factor * 8
        b += column.to(tl.int64)[None, :] * stride_out8 * 8
    z += (start + row)[:, None] * (SLICES * max_rank) + slice_id * max_rank
    # Loads are masked by whole groups of 8, and columns beyond the rank are set to zero later. A
    # mask at the rank itself would make every load one element wide.
    groups = (rank + 7) // 8 * 8

    acc = tl.zeros([TILE_ROWS, BLOCK_N], tl.float32)
    for first in range(0, rank, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        place = r
        if PAGE > 0:
            place = paged_rows(pages + factor, r, rank, out, PAGE)
        up = tl.load(b + place[:, None], mask=(r < groups)[:, None] & inside[None, :], other=0.0)
        up = tl.where((r < rank)[:, None], up, 0.0)
        down = tl.zeros([TILE_ROWS, BLOCK_R], tl.float32)
        for part in tl.static_range(PARTS):
            offset = tl.cast(part, tl.int64) * stride_part8 * 8
            down += tl.load(z + offset + r[None, :], mask=live[:, None] & (r < groups)[None, :])
        down = tl.where(live[:, None] & (r < rank)[None, :], down, 0.0)
        if up.dtype == tl.float16:
            # z may be too large for fp16. tf32 has the range of fp32 and holds fp16 exactly.
            acc = tl.dot(down, up.to(tl.float32), acc, input_precision="tf32")
        else:
            acc = tl.dot(down.to(up.dtype), up, acc, input_precision="ieee")
    if WEIGHTED:
        weight = tl.load(topk_weights + pair, mask=live, other=0.0).to(tl.float32)
        acc = acc * weight[:, None]
    if ADDED:
        acc = old.to(tl.float32) + acc
    tl.store(y, acc.to(y.dtype.element_ty), mask=touched)
