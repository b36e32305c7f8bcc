"""The native kernels for LoRA on routed experts: `plan`, then `before` and `after` the base's.

A pair is one token with an adapter and one of its experts; pairs are numbered in token order. All
three kernels get the same table (int64, see loops.py), `plan` the first half of it:

    0, 8, 16  counters: next item of phase 1, finished items of phase 1, next item of phase 2
    24  tokens            25  slot of each token (int64 address)
    26  expert ids (address; int32 or int64)   27  bytes of an id   28  row stride of the ids
    29  top_k             30  experts          31  rank of each slot (int64 address)   32  slots
    33  scratch (int64 address), size: see pairs.py   34  expert id of each pair (int32 address)
    35  result: tokens with an adapter   36  result: pairs in segments   37  result: segments

    40  dtype             41  hidden states   42  their row stride     43  hidden size
    44  wide rows (one a pair: [hidden, columns of adapters])          45  their row stride
    46  first column of each slot in a wide row (int64 address)
    47  slices            48  address of slices (one a slice: the address of its factor's slots)
    49  fp32 scratch z, [pairs, rank]          50  highest rank (row stride of z)
    51  router weights (fp32 address; 0: all 1) 52  their row stride
    53  output            54  its row stride   55  width of a wide row    56  threads

A segment is a range of pairs, sorted by expert, then slot: (slot, expert, first, number). A slot of
a factor is (address, stride of experts, stride of rows), see `SlotStack.table`.
"""

from __future__ import annotations

import numpy as np

from .loops import compiled, expand_rows, share, shrink, turn, wait
from .memory import (
    BF16,
    COLUMNS,
    FP32,
    LANES,
    RANKS,
    address_of,
    copy,
    get,
    get32,
    put,
    put32,
    read,
    take,
    write,
)
from .vectors import (
    add_scaled,
    narrow,
)

SEGMENT, SLOT = 4, 3
CHUNK = 64  # pairs of one item
COLUMN_CHUNK = 64  # columns of the output of one item


@compiled
def _rows(table):
    return get(table, 33)


@compiled
def _order(table):
    return _rows(table) + (get(table, 24) << 3)


@compiled
def _segments(table):
    return _order(table) + ((2 * get(table, 24) * get(table, 29)) << 3)


@compiled
def _sort(source, target, count, counts, keys, ids, slots, top_k, rows):
    """Sort pairs stably by expert (ids != 0) or by the slot of their token, below ``keys``."""
    for k in range(keys + 1):
        put(counts, k, 0)
    for turn_ in range(2):
        for i in range(count):
            pair = get(source, i)
            key = get32(ids, pair) if ids != 0 else get(slots, get(rows, pair // top_k))
            if turn_ == 0:
                put(counts, key + 1, get(counts, key + 1) + 1)
            else:
                put(target, get(counts, key), pair)
                put(counts, key, get(counts, key) + 1)
        if turn_ == 0:
            for k in range(keys):
                put(counts, k + 1, get(counts, k + 1) + get(counts, k))


def plan(table):
    """Find the tokens with an adapter, their experts, and the segments. One thread only."""
    tokens, slots, top_k = get(table, 24), get(table, 25), get(table, 29)
    experts, ranks, ids = get(table, 30), get(table, 31), get(table, 34)
    rows, order = _rows(table), _order(table)
    copy_, segments = order + ((tokens * top_k) << 3), _segments(table)
    counts = segments + ((SEGMENT * tokens * top_k) << 3)
    count, pairs = 0, 0
    for token in range(tokens):
        slot = get(slots, token)
        if slot < 0 or slot >= get(table, 32) or get(ranks, slot) == 0:
            continue
        put(rows, count, token)
        for k in range(top_k):
            place = token * get(table, 28) + k
            given = get(table, 26)
            expert = get32(given, place) if get(table, 27) == 4 else get(given, place)
            pair = count * top_k + k
            if expert >= 0 and expert < experts:
                put32(ids, pair, expert)
                put(order, pairs, pair)
                pairs += 1
            else:
                put32(ids, pair, 0)  # an expert of another device
        count += 1
    _sort(order, copy_, pairs, counts, get(table, 32), 0, slots, top_k, rows)
    _sort(copy_, order, pairs, counts, experts, ids, slots, top_k, rows)
    number, last_slot, last_expert = 0, -1, -1
    for i in range(pairs):
        pair = get(order, i)
        expert, slot = get32(ids, pair), get(slots, get(rows, pair // top_k))
        if expert != last_expert or slot != last_slot:
            segment = segments + ((SEGMENT * number) << 3)
            put(segment, 0, slot)
            put(segment, 1, expert)
            put(segment, 2, i)
            put(segment, 3, 0)
            number += 1
            last_slot, last_expert = slot, expert
        put(segment, 3, get(segment, 3) + 1)
    # The copy is free again: it tells the pairs in a segment from those of other devices' experts.
    for pair in range(count * top_k):
        put(copy_, pair, 0)
    for i in range(pairs):
        put(copy_, get(order, i), 1)
    put(table, 35, count)
    put(table, 36, pairs)
    put(table, 37, number)


@compiled
def _slot(table, pair):
    """Return the slot of a pair."""
    return get(get(table, 25), get(_rows(table), pair // get(table, 29)))


@compiled
def _factor(table, slice_, slot, expert):
    """Return the address of a factor of one slot and expert, and its row stride."""
    place = get(get(table, 48), slice_) + ((slot * SLOT) << 3)
    shift = 1 if get(table, 40) == BF16 else 2
    return get(place, 0) + ((expert * get(place, 1)) << shift), get(place, 2)


@compiled
def _widen_item(table, item):
    """Copy hidden states into wide rows, and clear the columns of other slots."""
    shift = 1 if get(table, 40) == BF16 else 2
    hidden, top_k = get(table, 43), get(table, 29)
    start = item * CHUNK
    # The last item has fewer pairs.
    for pair in range(start, min(start + CHUNK, get(table, 35) * top_k)):
        row = get(_rows(table), pair // top_k)
        wide = get(table, 44) + ((pair * get(table, 45)) << shift)
        copy(get(table, 41) + ((row * get(table, 42)) << shift), wide, hidden << shift)
        slot = _slot(table, pair)
        first = hidden + get(get(table, 46), slot)
        last = first + get(table, 47) * get(get(table, 31), slot)
        if get(_order(table), get(table, 24) * top_k + pair) == 0:
            last = first  # the pair is in no segment, so nothing is written there
        for k in range(hidden, get(table, 55)):
            if k < first or k >= last:
                if shift == 1:
                    write(BF16, np.float32(0.0), wide, k)
                else:
                    write(FP32, np.float32(0.0), wide, k)


@compiled
def _shrink_item(table, segment, slice_, block, start, xs, z):
    """Compute RANKS rows of lora_a x for up to CHUNK pairs of a segment, into their wide rows."""
    dtype = get(table, 40)
    shift = 1 if dtype == BF16 else 2
    hidden, top_k = get(table, 43), get(table, 29)
    m = min(get(segment, 3) - start, CHUNK)
    pairs = _order(table) + ((get(segment, 2) + start) << 3)
    for i in range(m):
        row = get(_rows(table), get(pairs, i) // top_k)
        put(xs, i, get(table, 41) + ((row * get(table, 42)) << shift))
    slot = get(segment, 0)
    rank, j = get(get(table, 31), slot), block * RANKS
    ranks = min(rank - j, RANKS)
    a, stride = _factor(table, slice_, slot, get(segment, 1))
    shrink(dtype, xs, m, a + ((j * stride) << shift), stride, ranks, hidden, z, RANKS)
    first = hidden + get(get(table, 46), slot) + slice_ * rank + j
    for i in range(m):
        wide = get(table, 44) + ((get(pairs, i) * get(table, 45)) << shift)
        for k in range(ranks):
            if dtype == BF16:
                write(BF16, read(FP32, z, i * RANKS + k), wide, first + k)
            else:
                write(FP32, read(FP32, z, i * RANKS + k), wide, first + k)


@compiled
def _shrink_items(table, segment):
    """Return the number of items of one slice and one chunk of a segment, and of all of it."""
    blocks = (get(get(table, 31), get(segment, 0)) + RANKS - 1) // RANKS
    chunks = (get(segment, 3) + CHUNK - 1) // CHUNK
    return blocks, get(table, 47) * blocks * chunks


@compiled
def _next(table, item, step):
    """Return the item after ``item``: of those this thread has, or the first that it takes."""
    return item + 1 if (item + 1) % step != 0 else take(table, 0, step)


def before(table):
    """Fill the wide rows: hidden states, and lora_a x in the columns of the adapter's slot."""
    scratch = np.empty(CHUNK * (1 + RANKS), np.int64)
    xs = address_of(scratch)
    z = xs + (CHUNK << 3)
    copies = (get(table, 35) * get(table, 29) + CHUNK - 1) // CHUNK
    slices, total = get(table, 47), copies
    for s in range(get(table, 37)):
        total += _shrink_items(table, _segments(table) + ((s * SEGMENT) << 3))[1]
    step = share(total, get(table, 56))
    # Items count on over all segments, which differ in size: walk them along with the counter.
    item = take(table, 0, step)
    while item < copies:
        _widen_item(table, item)
        item = _next(table, item, step)
    base = copies
    for s in range(get(table, 37)):
        segment = _segments(table) + ((s * SEGMENT) << 3)
        blocks, items = _shrink_items(table, segment)
        end = base + items
        while item < end:
            part = item - base
            chunk, rest = part // (slices * blocks), part % (slices * blocks)
            place = chunk * CHUNK
            _shrink_item(table, segment, rest // blocks, rest % blocks, place, xs, z)
            item = _next(table, item, step)
        base = end
    scratch[0] = 0


@compiled
def _shrunk_item(table, item):
    """Copy the shrunk activations of pairs out of their wide rows, as fp32."""
    dtype = get(table, 40)
    shift = 1 if dtype == BF16 else 2
    top = get(table, 50)
    start = item * CHUNK
    for i in range(start, min(start + CHUNK, get(table, 36))):
        pair = get(_order(table), i)
        slot = _slot(table, pair)
        wide = get(table, 44) + ((pair * get(table, 45)) << shift)
        first = get(table, 43) + get(get(table, 46), slot)
        for j in range(get(get(table, 31), slot)):
            value = read(BF16, wide, first + j) if dtype == BF16 else read(FP32, wide, first + j)
            write(FP32, value, get(table, 49), i * top + j)


@compiled
def _add_pair(dtype, wide, columns, total, weight):
    """total[n] += weight * wide[n] in fp32, for n < columns."""
    n = 0
    while n + LANES <= columns:
        if dtype == BF16:
            add_scaled(BF16, total + (n << 2), wide + (n << 1), weight)
        else:
            add_scaled(FP32, total + (n << 2), wide + (n << 2), weight)
        n += LANES
    while n < columns:
        value = read(BF16, wide, n) if dtype == BF16 else read(FP32, wide, n)
        write(FP32, read(FP32, total, n) + weight * value, total, n)
        n += 1


@compiled
def _combine_item(table, item, totals, zs, ys, scales, tile, edge):
    """Compute COLUMN_CHUNK columns of the output of all tokens with an adapter."""
    dtype = get(table, 40)
    shift = 1 if dtype == BF16 else 2
    top_k, top = get(table, 29), get(table, 50)
    column = item * COLUMN_CHUNK
    stop = min(column + COLUMN_CHUNK, get(table, 43))
    count = get(table, 35)
    for n in range(count * COLUMN_CHUNK):
        write(FP32, np.float32(0.0), totals, n)
    for s in range(get(table, 37)):
        segment = _segments(table) + ((s * SEGMENT) << 3)
        slot, start = get(segment, 0), get(segment, 2)
        rank = get(get(table, 31), slot)
        b, stride = _factor(table, 0, slot, get(segment, 1))
        end = start + get(segment, 3)
        while start < end:
            m = min(end - start, CHUNK)
            for i in range(m):
                pair = get(_order(table), start + i)
                weight = np.float32(1.0)
                if get(table, 51) != 0:
                    token = get(_rows(table), pair // top_k)
                    weight = read(FP32, get(table, 51), token * get(table, 52) + pair % top_k)
                total = totals + (((pair // top_k) * COLUMN_CHUNK) << 2)
                wide = get(table, 44) + ((pair * get(table, 45) + column) << shift)
                _add_pair(dtype, wide, stop - column, total, weight)
                write(FP32, weight, scales, i)
                put(zs, i, get(table, 49) + (((start + i) * top) << 2))
                put(ys, i, total)
            at = column
            while at < stop:
                columns = min(stop - at, COLUMNS)
                turn(dtype, b + ((at * stride) << shift), stride, columns, rank, tile)
                expand_rows(FP32, m, zs, scales, tile, rank, ys, at - column, columns, edge)
                at += COLUMNS
            start += m
    for i in range(count):
        out = get(table, 53) + ((get(_rows(table), i) * get(table, 54) + column) << shift)
        total, n = totals + ((i * COLUMN_CHUNK) << 2), 0
        while n < stop - column:
            if dtype == FP32:
                write(FP32, read(FP32, total, n), out, n)
                n += 1
            elif n + LANES <= stop - column:
                narrow(BF16, total + (n << 2), out + (n << 1))
                n += LANES
            else:
                write(BF16, read(FP32, total, n), out, n)
                n += 1


def after(table):
    """output[token] = sum over its pairs of weight * (wide row + lora_b z), rounded once."""
    count = get(table, 35)
    places = 3 * CHUNK + COLUMNS + 1
    size = places + (get(table, 50) * COLUMNS + count * COLUMN_CHUNK + 1) // 2
    scratch = np.empty(size, np.int64)
    zs = address_of(scratch)
    ys = zs + (CHUNK << 3)
    scales = ys + (CHUNK << 3)
    edge = scales + (CHUNK << 3)
    tile = zs + (places << 3)
    totals = tile + ((get(table, 50) * COLUMNS) << 2)
    items = (get(table, 36) + CHUNK - 1) // CHUNK
    while True:
        item = take(table, 0, 1)
        if item >= items:
            break
        _shrunk_item(table, item)
        take(table, 8, 1)
    wait(table, 8, items)
    items = (get(table, 43) + COLUMN_CHUNK - 1) // COLUMN_CHUNK
    step = share(items, get(table, 56))
    while True:
        first = take(table, 16, step)
        if first >= items:
            break
        for item in range(first, min(first + step, items)):
            _combine_item(table, item, totals, zs, ys, scales, tile, edge)
    scratch[0] = 0
