"""Triton kernel: the base experts' grouped GEMM with LoRA fused into its end (the "tail").

It runs with VLLM_MOE_LORA_KERNELS=tail. For each token-expert pair it computes y = W x + B z in one
fp32 accumulator and rounds once. W is the expert's base weight, B its lora_b, and z = lora_a x
comes from shrink.py. So y is written once and never read, while a separate expand kernel has to
read and write all of y again. grouped.py launches the kernel.

The rows come in the order that vLLM's base kernel uses: sorted by expert, as `moe_align_block_size`
does it, or, in a small batch, unsorted with one pair per block. They need not be sorted by adapter.
After the sum over x, a block loops over the adapter slots of its rows and adds B z of each slot to
the rows that use it. With LORA=False the kernel skips this loop, so a row without an adapter gets
the same bits with and without LORA.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .shrink import paged_rows

# Names ending in "8" count groups of 8 elements (see shrink.py). Triton must not compile a variant
# for special values of these arguments: one variant serves every batch.
_COUNTS = [
    "row_blocks",
    "num_pairs",
    "top_k",
    "pairs_per_row",
    "num_slots",
    "num_experts",
    "width8",
    "out8",
    "max_rank8",
    "stride_x8",
    "stride_w_expert8",
    "stride_w_row8",
    "stride_y8",
    "stride_slot8",
    "stride_expert8",
    "stride_out8",
    "stride_part8",
]
_TABLES = ["pages0", "pages1", "ranks", "token_slots", "topk_weights"]
_TABLES += ["sorted_ids", "expert_ids", "num_padded"]


@triton.jit
def _tail(
    acc,
    z,
    b,
    pages,
    ranks,
    slots,
    pair,
    column,
    out,
    num_slots,
    num_experts,
    max_rank,
    z_row,
    stride_slot,
    stride_out,
    stride_part,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Return acc + B z.

    ``slots`` [BLOCK_M] has the adapter slot of each row, and num_slots for a row without one.
    """
    z += pair[:, None] * z_row
    if PAGE > 0:
        b += column[None, :]
    else:
        b += column.to(tl.int64)[None, :] * stride_out
    slot = tl.min(slots, 0)
    while slot < num_slots:
        mine = slots == slot
        rank = tl.minimum(tl.load(ranks + slot * num_experts), max_rank)
        factor = slot.to(tl.int64) * stride_slot
        up_start = b
        if PAGE == 0:
            up_start += factor
        groups = (rank + 7) // 8 * 8
        # The loop mostly has one step, so prefetching would only cost shared memory.
        for first in tl.range(0, rank, BLOCK_R, num_stages=1):
            r = first + tl.arange(0, BLOCK_R)
            place = r
            there = (r < groups)[:, None]
            if PAGE > 0:
                place = paged_rows(pages + factor, r, rank, out, PAGE)
                there = there & (column < out)[None, :]
            up = tl.load(up_start + place[:, None], mask=there, other=0.0)
            up = tl.where((r < rank)[:, None], up, 0.0)
            down = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            for part in tl.static_range(PARTS):
                offset = tl.cast(part, tl.int64) * stride_part
                inside = mine[:, None] & (r < groups)[None, :]
                down += tl.load(z + offset + r[None, :], mask=inside, other=0.0)
            down = tl.where((r < rank)[None, :], down, 0.0)
            if up.dtype == tl.float16:
                # z may be too large for fp16. tf32 has the range of fp32 and holds fp16 exactly.
                acc = tl.dot(down, up.to(tl.float32), acc, input_precision="tf32")
            else:
                acc = tl.dot(down.to(up.dtype), up, acc, input_precision="ieee")
        slots = tl.where(mine, num_slots, slots)
        slot = tl.min(slots, 0)
    return acc


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_TABLES)
def base_kernel(
    x,
    weight,
    y,
    z,
    b0,
    b1,
    pages0,
    pages1,
    ranks,
    token_slots,
    topk_weights,
    sorted_ids,
    expert_ids,
    num_padded,
    row_blocks,
    num_pairs,
    top_k,
    pairs_per_row,
    num_slots,
    num_experts,
    width8,
    out8,
    max_rank8,
    stride_x8,
    stride_w_expert8,
    stride_w_row8,
    stride_y8,
    stride_slot8,
    stride_expert8,
    stride_out8,
    stride_part8,
    SLICES: tl.constexpr,
    PARTS: tl.constexpr,
    SORTED: tl.constexpr,
    LORA: tl.constexpr,
    WEIGHTED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PAGE: tl.constexpr = 0,
):
    """One program computes BLOCK_M rows of one expert and BLOCK_N columns of one slice.

    Shapes:
        x [rows, width], one row per token or per pair
        weight [experts, SLICES * out, width]
        y [pairs, SLICES * out]
        z [PARTS, pairs, SLICES, max_rank] fp32, with rows in the order of the pairs
        b0, b1 [slots, experts or 1, out, max_rank], lora_b of each slice; with PAGE, which is the
            number of ranks of a page, both are the arena [pages, PAGE, out]
        pages0, pages1 [slots, experts or 1, pages] int32, the page table of each slice; only with
            PAGE. stride_slot8 and stride_expert8 are then its strides, in entries
        ranks [SLICES, slots, experts] int32
        token_slots [tokens]
        topk_weights [pairs]
        sorted_ids [row_blocks * BLOCK_M], the pair of each row; num_pairs or more for an empty row
        expert_ids [row_blocks]; -1 for an expert on another device, whose rows of y become zero
        num_padded [1], how many rows of sorted_ids are in use

    With SORTED=False sorted_ids is not read: block i has only the pair i, in its first row.
    """
    out = out8 * 8
    width = width8 * 8
    slice_blocks = (out + BLOCK_N - 1) // BLOCK_N
    # Neighbouring programs take GROUP_M row blocks and the same columns of a weight, so that these
    # columns are still in the cache.
    program = tl.program_id(0)
    per_group = GROUP_M * slice_blocks * SLICES
    first_block = program // per_group * GROUP_M
    in_group = tl.minimum(row_blocks - first_block, GROUP_M)
    block = first_block + program % per_group % in_group
    column_block = program % per_group // in_group
    if block * BLOCK_M >= tl.load(num_padded):
        return
    slice_id = column_block // slice_blocks

    rows = tl.arange(0, BLOCK_M)
    if SORTED:
        pair = tl.load(sorted_ids + block * BLOCK_M + rows)
    else:
        pair = tl.where(rows == 0, block, num_pairs)
    live = (pair >= 0) & (pair < num_pairs)
    # Empty rows and columns read row 0 or column 0 instead. A mask would make the loads narrower.
    pair = tl.where(live, pair, 0)
    first_column = column_block % slice_blocks * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    inside = column < out
    column = tl.where(inside, column, 0)
    expert = tl.load(expert_ids + block).to(tl.int64)
    if expert < 0:
        empty = y + pair.to(tl.int64)[:, None] * stride_y8 * 8 + (slice_id * out + column)[None, :]
        nothing = tl.zeros([BLOCK_M, BLOCK_N], y.dtype.element_ty)
        tl.store(empty, nothing, mask=live[:, None] & inside[None, :])
        return

    k = tl.arange(0, BLOCK_K)
    x += (pair // pairs_per_row).to(tl.int64)[:, None] * stride_x8 * 8 + k[None, :]
    weight += expert * stride_w_expert8 * 8
    weight += (slice_id * out + column).to(tl.int64)[None, :] * stride_w_row8 * 8 + k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, (width + BLOCK_K - 1) // BLOCK_K):
        if EVEN_K:
            left = tl.load(x)
            right = tl.load(weight)
        else:
            there = k < width - step * BLOCK_K
            left = tl.load(x, mask=there[None, :], other=0.0)
            right = tl.load(weight, mask=there[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        x += BLOCK_K
        weight += BLOCK_K

    if LORA:
        slots = tl.load(token_slots + pair // top_k).to(tl.int32)
        slots = tl.where(live & (slots >= 0) & (slots < num_slots), slots, num_slots)
        max_rank = max_rank8 * 8
        b = b0
        pages = pages0
        if SLICES == 2 and slice_id == 1:
            b = b1
            pages = pages1
        if PAGE > 0:
            # Rows of a page have the columns next to each other. So they must not be changed, and
            # a mask of whole groups of 8 does not make the loads narrower.
            column = first_column + tl.arange(0, BLOCK_N)
            pages += expert * stride_expert8
            stride_slot = stride_slot8
        else:
            b += expert * stride_expert8 * 8
            stride_slot = stride_slot8 * 8
        acc = _tail(
            acc,
            z + slice_id * max_rank,
            b,
            pages,
            ranks + slice_id * num_slots * num_experts + expert,
            slots,
            pair.to(tl.int64),
            column,
            out,
            num_slots,
            num_experts,
            max_rank,
            SLICES * max_rank,
            stride_slot,
            stride_out8 * 8,
            stride_part8 * 8,
            PARTS,
            BLOCK_M,
            BLOCK_R,
            PAGE,
        )
    if WEIGHTED:
        acc = acc * tl.load(topk_weights + pair).to(tl.float32)[:, None]
    # Computed only after the sum: there are as many addresses as sums, and they need registers.
    y += pair.to(tl.int64)[:, None] * stride_y8 * 8 + (slice_id * out + column)[None, :]
    tl.store(y, acc.to(y.dtype.element_ty), mask=live[:, None] & inside[None, :])
