"""The native kernel for LoRA on a dense layer: all slices and all adapters of a batch in one call.

The table (int64, see loops.py) and the tables it points to:

    0, 8, 16  counters: next item of shrink, finished items of shrink, next item of expand
    24  dtype   25  segments   26  address of segments   27  slices   28  address of slices
    29  x   30  its row stride   31  y   32  its row stride   33  z   34  its row stride
    35  scale, a float32   36  address of factors; 0: the slices have them   37  slots
    38  threads that run the kernel

    a segment: slot, address of the rows' numbers (int64; 0: adjacent rows), number of rows, the
               first of adjacent rows
    a slice:   lora_a, stride of slots, stride of rows, columns of x, rank,
               lora_b, stride of slots, stride of rows, columns of y, first column of y

    factors, by slice: address of lora_a's slots, of lora_b's (see `SlotStack.table`), and of each
               slot's rank. A segment's slot is then expert * slots + slot.

Strides count elements. z is fp32 scratch, [rows of all segments, ranks of all slices].
"""

from __future__ import annotations

import numpy as np

from .loops import compiled, expand_rows, share, shrink, turn, wait
from .memory import (
    BF16,
    COLUMNS,
    FP32,
    RANKS,
    address_of,
    get,
    put,
    read,
    take,
    write,
)

SEGMENT, SLICE, FACTOR, SLOT = 4, 10, 3, 3
ROW_CHUNK = 64  # rows of one item
COLUMN_CHUNK = 256  # columns of y of one item of expand


@compiled
def _row(segment, i):
    rows = get(segment, 1)
    return get(segment, 3) + i if rows == 0 else get(rows, i)


@compiled
def _rank_blocks(slice_):
    return (get(slice_, 4) + RANKS - 1) // RANKS


@compiled
def _column_blocks(slice_):
    return (get(slice_, 8) + COLUMN_CHUNK - 1) // COLUMN_CHUNK


@compiled
def _items(table, expanding):
    """Return the number of items of one chunk of rows, and of the whole phase."""
    blocks, chunks = 0, 0
    for s in range(get(table, 27)):
        part = get(table, 28) + (s * SLICE << 3)
        blocks += _column_blocks(part) if expanding else _rank_blocks(part)
    for s in range(get(table, 25)):
        rows = get(get(table, 26) + (s * SEGMENT << 3), 2)
        chunks += (rows + ROW_CHUNK - 1) // ROW_CHUNK
    return blocks, blocks * chunks


@compiled
def _find(table, item, blocks, expanding):
    """Return segment, its first row in z, first row of the chunk, slice, its rank before, block."""
    chunk, block = item // blocks, item % blocks
    segment, first = get(table, 26), 0
    while True:
        rows = get(segment, 2)
        chunks = (rows + ROW_CHUNK - 1) // ROW_CHUNK
        if chunk < chunks:
            break
        chunk -= chunks
        first += rows
        segment += SEGMENT << 3
    part, before = get(table, 28), 0
    while True:
        count = _column_blocks(part) if expanding else _rank_blocks(part)
        if block < count:
            break
        block -= count
        before += get(part, 4)
        part += SLICE << 3
    return segment, first, chunk * ROW_CHUNK, part, before, block


@compiled
def _factor(table, segment, part, side):
    """Return a segment's lora_a (side 0) or lora_b (side 1): address, row stride, rank."""
    shift = 1 if get(table, 24) == BF16 else 2
    number, own = get(segment, 0), get(table, 36)
    if own == 0:
        start = part + ((5 * side) << 3)
        return get(start, 0) + ((number * get(start, 1)) << shift), get(start, 2), get(part, 4)
    slot, expert = number % get(table, 37), number // get(table, 37)
    own += ((part - get(table, 28)) // (SLICE << 3) * FACTOR) << 3
    place = get(own, side) + ((slot * SLOT) << 3)
    start = get(place, 0) + ((expert * get(place, 1)) << shift)
    return start, get(place, 2), get(get(own, 2), slot)


@compiled
def _shrink_item(table, item, blocks, addresses):
    dtype = get(table, 24)
    shift = 1 if dtype == BF16 else 2
    segment, first, start, part, before, block = _find(table, item, blocks, False)
    m = min(get(segment, 2) - start, ROW_CHUNK)
    x, stride = get(table, 29), get(table, 30)
    for i in range(m):
        put(addresses, i, x + ((_row(segment, start + i) * stride) << shift))
    j = block * RANKS
    a, a_stride, rank = _factor(table, segment, part, 0)
    ranks = min(rank - j, RANKS)
    if ranks <= 0:  # another segment's rank is higher
        return
    z_stride = get(table, 34)
    z = get(table, 33) + (((first + start) * z_stride + before + j) << 2)
    a += (j * a_stride) << shift
    shrink(dtype, addresses, m, a, a_stride, ranks, get(part, 3), z, z_stride)


@compiled
def _expand_item(table, item, blocks, zs, ys, scales, tile, edge):
    dtype = get(table, 24)
    shift = 1 if dtype == BF16 else 2
    segment, first, start, part, before, block = _find(table, item, blocks, True)
    m = min(get(segment, 2) - start, ROW_CHUNK)
    b, b_stride, rank = _factor(table, segment, part, 1)
    z_stride = get(table, 34)
    y, stride = get(table, 31), get(table, 32)
    for i in range(m):
        put(zs, i, get(table, 33) + (((first + start + i) * z_stride + before) << 2))
        put(ys, i, y + ((_row(segment, start + i) * stride + get(part, 9)) << shift))
    # An adapter's rank may be smaller than its slot's: what follows is zero.
    while rank > 0:
        used = False
        for i in range(m):
            used = used or read(FP32, get(zs, i), rank - 1) != 0
        if used:
            break
        rank -= 1
    if rank == 0:
        return
    column = block * COLUMN_CHUNK
    stop = min(column + COLUMN_CHUNK, get(part, 8))
    while column < stop:
        columns = min(stop - column, COLUMNS)
        turn(dtype, b + ((column * b_stride) << shift), b_stride, columns, rank, tile)
        expand_rows(dtype, m, zs, scales, tile, rank, ys, column, columns, edge)
        column += COLUMNS


@compiled
def _highest_rank(table):
    rank = 1
    for s in range(get(table, 27)):
        rank = max(rank, get(get(table, 28) + (s * SLICE << 3), 4))
    return rank


def add_lora(table):
    """y[row, slice] += scale * lora_b (lora_a x[row]) for all rows, segments and slices."""
    # One allocation for all scratch of this thread: two lists of addresses, scales, edge and tile.
    scratch = np.empty(3 * ROW_CHUNK + COLUMNS + 1 + _highest_rank(table) * COLUMNS, np.int64)
    xs = address_of(scratch)
    blocks, total = _items(table, False)
    step = share(total, get(table, 38))
    while True:
        first = take(table, 0, step)
        if first >= total:
            break
        last = min(first + step, total)
        for item in range(first, last):
            _shrink_item(table, item, blocks, xs)
        take(table, 8, last - first)
    ys = xs + (ROW_CHUNK << 3)
    scales = ys + (ROW_CHUNK << 3)
    edge = scales + (ROW_CHUNK << 3)
    tile = edge + ((COLUMNS + 1) << 3)
    for i in range(ROW_CHUNK):
        write(FP32, read(FP32, table, 2 * 35), scales, i)
    wait(table, 8, total)
    blocks, total = _items(table, True)
    step = share(total, get(table, 38))
    while True:
        first = take(table, 16, step)
        if first >= total:
            break
        for item in range(first, min(first + step, total)):
            _expand_item(table, item, blocks, xs, ys, scales, tile, edge)
    # Keep the array alive until here: only its address is used above.
    scratch[0] = 0
